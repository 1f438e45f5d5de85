"""Pages of evidence: growth of costs, quantities in several papers, and the tables of all three papers."""

import ast
import re
import shutil
from dataclasses import dataclass
from decimal import Decimal

import filter as reader
import pytest
import repository
from conftest import ROOT, cells_of
from test_evidence import keep_results, sample_runs

from scsa_book.attention import registry
from scsa_book.evidence import scaling
from scsa_book.evidence.cost import cost
from scsa_book.evidence.published import METRICS, Cell, cells, tables
from scsa_book.evidence.tables import (
    Html,
    badge,
    ledger_line,
    ledger_table,
    name,
    note,
    overview,
    tally,
    verdict,
)  # fmt: skip
from scsa_book.evidence.unreported import SAME, Claim, claims, gain, interval

# ---- growth


@pytest.mark.parametrize(
    ("mechanism", "width", "side"),
    [
        ("se", (2, 2), (0, 0)),
        ("eca", (0, 1), (0, 0)),
        ("ge", (None, None), (None, None)),
        ("sa", (1, None), (0, None)),
        ("danet_channel", (0, 2), (0, 2)),
        ("strided_sparse", (2, 2), (0, 3)),
        ("non_local", (2, 2), (0, 4)),
        ("scsa", (1, 2), (0, 2)),
        ("ela", (1, 1), (0, 1)),
    ],
)
def test_orders_are_those_of_the_formulas(mechanism, width, side):
    assert scaling.orders(mechanism, "width") == width
    assert scaling.orders(mechanism, "side") == side


@pytest.mark.parametrize("mechanism", registry.names())
def test_measured_growth_lies_between_the_terms_of_a_formula(mechanism):
    # Every formula is a sum of powers: between two sizes it grows no faster than its largest exponent.
    for axis in scaling.AXES:
        sizes = [scaling.scaled((128, 14, 14), axis, f) for f in (2, 4)]
        small, large = (cost(registry.create(mechanism, s[0], device="meta"), s).macs for s in sizes)
        order = scaling.orders(mechanism, axis)[1]
        measured = scaling.exponent(small, large)
        assert (measured is None) == (order is None)
        # rounding down to whole windows and to odd kernels makes steps
        assert order is None or measured <= order + 0.02 or mechanism == "eca"


def test_an_axis_is_width_or_side():
    assert scaling.scaled((8, 3, 5), "side", 4) == (8, 12, 20)
    assert scaling.scaled((8, 3, 5), "width", 4) == (32, 3, 5)
    with pytest.raises(ValueError, match="axis='height' is not one of width, side"):
        scaling.scaled((8, 3, 5), "height", 2)


# ---- quantities in several papers


def printed(source, value, metric="top1", method="se"):
    return Cell(source, "1", "classification", "imagenet1k", "", "resnet50", method, "", metric, value)


@pytest.mark.parametrize(
    ("values", "agrees", "spread"),
    [
        (["25.56", "25.557"], True, "0.003"),
        (["76.39", "76.384"], False, "0.006"),  # that one would print 76.38
        (["77.05", "77.480"], False, "0.430"),
        (["1.2", "1.3"], True, "0.1"),  # both can be 1.25
        (["1.20", "1.3"], False, "0.10"),  # 1.20 ends at 1.205
        (["1.2", "1.3", "1.4"], False, "0.2"),  # each agrees with the next, and the three do not
    ],
)
def test_numbers_agree_when_they_can_be_one_number(values, agrees, spread):
    claim = Claim(tuple(printed(s, v) for s, v in zip(("scsa", "sanet", "cat"), values, strict=False)))
    assert (claim.agrees, claim.spread) == (agrees, Decimal(spread))


def test_a_printed_number_is_a_range():
    assert interval(printed("scsa", "27.40")) == (Decimal("27.395"), Decimal("27.405"))
    assert interval(printed("scsa", "1895")) == (Decimal("1894.5"), Decimal("1895.5"))


def test_claims_are_all_that_two_papers_print():
    found, plain = claims(), [c for c in cells() if not c.variant]
    keys = [tuple(getattr(c, column) for column in SAME) for c in plain]
    several = {k for k, c in zip(keys, plain, strict=True)
               if any(j == k and d.source != c.source for j, d in zip(keys, plain, strict=True))}  # fmt: skip
    assert {tuple(getattr(c.cells[0], column) for column in SAME) for c in found} == several
    for claim in found:
        assert len({tuple(getattr(c, column) for column in SAME) for c in claim.cells}) == 1
        assert len(claim.cells) == len(claim.by_source()) > 1


def test_claims_are_in_order_and_can_be_asked_for():
    found = claims(dataset="imagenet1k", backbone="resnet50", metric="params_M")
    assert [c.cells[0].method for c in found] == ["baseline", "se", "eca", "cbam", "sa"]
    metrics = [c.cells[0].metric for c in claims(backbone="resnet50", dataset="imagenet1k", method="se")]
    assert metrics == ["params_M", "flops_G", "top1", "top5"]
    with pytest.raises(ValueError, match="resnet18"):
        claims(backbone="resnet18")


def test_gains_are_over_the_baseline_of_the_same_table():
    def of(source, table, method, metric, backbone="resnet50", **asked):
        [cell] = cells(source, table, method=method, metric=metric, backbone=backbone, **asked)
        return gain(cell)

    assert of("scsa", "IV", "scsa", "top1") == Decimal("77.49") - Decimal("76.39")
    assert of("cat", "3", "se", "top1_error") == Decimal("35.60") - Decimal("34.93")
    assert of("sanet", "2", "baseline", "top1") == 0
    deep = dict(backbone="resnet101", framework="retinanet")
    assert of("scsa", "V", "se", "AP", **deep) == Decimal("39.8") - Decimal("39.3")


# ---- rows of the ledger on a page


@dataclass
class Row:
    cell: Cell
    word: str = "matches"
    ours: str = ""
    count: int | None = None
    note: str = ""
    see: str = ""
    status: str = "equal"
    fitted: bool = False

    def badge(self):
        return verdict(self.word, "matches")


CELL = printed("scsa", "28.07", "params_M")


def test_a_row_shows_the_number_as_printed_and_escapes_what_is_no_html():
    line = ledger_line(Row(CELL, ours="28.074", count=28_073_864, note="a < b"))
    assert line[:2] == ["ResNet-50 + SE", verdict("matches", "matches")] and isinstance(line[1], Html)
    assert line[2:6] == ["Parameters,\N{NO-BREAK SPACE}M", "28.07", "28.074", "28,073,864"]
    assert line[6] == "a &lt; b"
    assert ledger_line(Row(CELL))[5] == "" and ledger_line(Row(CELL, count=0))[5] == "0"


def test_a_number_of_another_scale_is_not_beside_the_printed_one():
    line = ledger_line(Row(CELL, "other scale", ours="91.2 ± 0.3", note="small.", status="other_scale"))
    assert line[3:5] == ["28.07", ""] and line[6] == "Here 91.2 ± 0.3: small."


def test_a_note_ends_with_a_link_and_says_what_was_added():
    assert note(Row(CELL)) == ""
    assert note(Row(CELL, note="N.", see="a/b.ipynb#c")) == 'N. <a href="../a/b.ipynb#c">More.</a>'
    assert note(Row(CELL, see="a.ipynb"), up="") == '<a href="a.ipynb">More.</a>'
    added = Cell(**{**CELL.__dict__, "added": True})
    assert note(Row(added, note="N.")) == "N. Not in the transcription."
    assert note(Row(added)) == "Not in the transcription."


def test_a_match_that_was_fitted_is_no_match():
    assert badge(Row(CELL)) == verdict("matches", "matches")
    assert badge(Row(CELL, fitted=True)) == verdict("fitted", "close")
    assert badge(Row(CELL, "differs", status="differs", fitted=True)) == verdict("differs", "matches")
    assert tally([Row(CELL), Row(CELL, fitted=True)]) == {"matches": 1, "fitted": 1}


def test_the_line_of_an_ablation_stands_below_the_name():
    cell = Cell(**{**CELL.__dict__, "variant": "a <b>"})
    assert name(cell) == "ResNet-50 + SE<br><small>a &lt;b&gt;</small>"


def test_verdicts_are_counted_as_they_are_shown():
    found = [Row(CELL, word) for word in ("differs", "other scale", "matches", "matches", "new")]
    assert list(tally(found).items()) == [("matches", 2), ("differs", 1), ("other scale", 1), ("new", 1)]
    shown = overview({"one": found, "two": found[2:4]}, "label")
    heads = re.findall(r'scope="col"[^>]*>([^<]*)', shown)
    assert heads == ["Table", "Numbers", "Matches", "Differs", "Other scale", "New"]
    rows = [re.findall(r">([^<]*)</t[hd]>", line) for line in shown.splitlines()[1:-1]]
    together = ["together", "7", "4", "1", "1", "1"]
    assert rows == [["one", "5", "2", "1", "1", "1"], ["two", "2", "2", "", "", ""], together]
    long = ledger_table(found, "label")
    assert 'class="filterable"' in long and long.count("<tr>") == 1 + len(found)


# ---- live pages

SOURCES = ("scsa", "sanet", "cat")


@pytest.fixture
def show(tmp_path, monkeypatch):
    "Runs the cells of a live page in a book of results and experiments, and gives back what it shows."
    (tmp_path / "_quarto.yml").touch()
    (tmp_path / "nbs/runs").mkdir(parents=True)
    shutil.copy(ROOT / "nbs/runs/experiments.yml", tmp_path / "nbs/runs")
    (tmp_path / "nbs/results/sample").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "nbs/results")

    def run(page, results=()):
        keep_results(tmp_path, results)
        names, shown = {}, []
        for cell in cells_of(ROOT / f"nbs/results/{page}.ipynb", "code"):
            if not repository.is_setup(cell):
                value = last_value(reader.text(cell), names)
                shown.append("" if value is None else str(getattr(value, "data", value)))
        return "\n".join(shown)

    return run


def last_value(source, names):
    tree = ast.parse(source)
    last = tree.body.pop() if isinstance(tree.body[-1], ast.Expr) else None
    exec(compile(tree, "cell", "exec"), names)
    return eval(compile(ast.Expression(last.value), "cell", "eval"), names) if last else None


def lines_of(shown):
    "Rows of all filterable tables: name, quantity, printed number; the verdict is between them."
    bodies = re.findall(r'<table class="filterable">.*?<tbody>(.*?)</tbody>', shown, re.S)
    rows = [row for body in bodies for row in re.findall(r"<tr>(.*?)</tr>", body, re.S)]
    entries = [re.findall(r"<t[hd][^>]*>(.*?)</t[hd]>", row) for row in rows]
    assert all('class="verdict' in entry[1] for entry in entries)
    return [[entry[0], *entry[2:4]] for entry in entries]


def wanted(cell):
    return [str(name(cell)), METRICS[cell.metric].title.replace(" ", "\N{NO-BREAK SPACE}"), cell.value]


@pytest.mark.parametrize("source", SOURCES)
def test_the_page_of_a_paper_shows_every_number_once(show, source):
    shown = show(source)
    found = cells(source, added=source == "scsa")
    assert sorted(lines_of(shown)) == sorted(map(wanted, found))
    assert "other scale</span>" not in shown
    numbers = [t for s, t in tables() if s == source]
    assert re.findall(r'href="#(table-\w+)"', shown) == [f"table-{n.lower()}" for n in numbers]


@pytest.mark.parametrize("source", ["scsa", "cat"])
def test_runs_stand_beside_the_numbers_of_a_paper(show, source):
    shown = show(source, sample_runs())
    assert "other scale</span>" in shown and "3 seeds" in shown


def test_the_page_of_costs_shows_every_cost_once(show):
    shown = show("costs")
    found = [c for c in cells(added=True) if METRICS[c.metric].sort == "cost"]
    assert len(found) == 269
    assert sorted(lines_of(shown)) == sorted(map(wanted, found))
    assert len(set(re.findall(r'href="#(\w+-\w+)"', shown))) == 8
    differ = re.search(r'aria-label="Costs that differ.*?</table>', shown, re.S)
    assert shown.count('verdict differs">') == 2 * (differ[0].count('verdict differs">') if differ else 0)


@pytest.mark.parametrize("page", ["costs", *SOURCES])
def test_links_within_a_page_lead_to_its_sections(page):
    cells = cells_of(ROOT / f"nbs/results/{page}.ipynb")
    sections = re.findall(r"\{#([\w-]+)\}", "\n".join(map(reader.text, cells)))
    assert len(set(sections)) == len(sections)
    shown = str([c.get("outputs") for c in cells])
    linked = set(re.findall(r'href="#([\w-]+)"', shown))
    assert linked and linked <= set(sections)


@pytest.mark.parametrize("page", ["costs", *SOURCES])
def test_a_live_page_shows_only_results_that_come_with_the_book(page):
    shown = str([c["outputs"] for c in cells_of(ROOT / f"nbs/results/{page}.ipynb", "code")])
    assert "preset sample" not in shown


# ---- the table of runs


def test_every_run_is_a_row_that_no_other_has_and_links_to_its_file(show):
    shown = show("index", sample_runs())
    rows = re.findall(r"<tr>(.*?)</tr>", re.search(r"<tbody>(.*?)</tbody>", shown, re.S)[1], re.S)
    assert len(rows) == len(sample_runs()) > 2
    committed = [o["data"] for c in cells_of(ROOT / "nbs/results/index.ipynb", "code") for o in c["outputs"]]
    found = re.findall(r"<tr>(<th scope=\"row\">.*?)</tr>", "".join(map(str, committed)))
    linked = {ROOT / "nbs/results" / name for name in re.findall(r'href="([^"]*\.json)"', str(found))}
    files = {p for p in (ROOT / "nbs/results").glob("cpu/*.json")}
    assert files <= linked, "make execute NB=nbs/results/index.ipynb"
    labels = {tuple(re.findall(r">([^<>]*)</", row)[:-2]) for row in found if ".json" in row}
    assert len(labels) >= len(linked), "two runs differ by their result alone"
