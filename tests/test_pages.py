"""Pages as people read them: what stands on the first screen, and whether what they show can be pasted."""

import ast
import os
import re
import subprocess
import sys
from pathlib import Path

import filter as reader
import nbformat
import preview
import pytest
import text
from conftest import ROOT, cells_of, name_of, notebooks

from scsa_book.attention import registry
from scsa_book.explain.mechanisms import chapter

CORE = ["channel/se", "hybrid/cbam", "collaboration/cat", "hybrid/sa", "synergy/smsa", "synergy/pcsa"]
CORE_CHAPTERS = pytest.mark.parametrize("name", [*CORE, "synergy/scsa"])


def opening(name):
    "The cells of a chapter above its first section."
    for cell in cells_of(ROOT / f"nbs/{name}.ipynb"):
        if cell["cell_type"] == "markdown" and re.search(r"^## ", reader.text(cell), re.M):
            return
        yield cell


@pytest.mark.parametrize("name", sorted({chapter(name).removesuffix(".ipynb") for name in registry.names()}))
def test_a_chapter_opens_with_its_question_a_figure_and_the_equation(name):
    cells = list(opening(name))
    words = "\n".join(reader.text(cell) for cell in cells if cell["cell_type"] == "markdown")
    drawn = [cell for cell in cells if "#| label: fig-module" in reader.text(cell)]
    assert re.search(r"^\*\*.+\?\*\*", words, re.M), "a question in bold"
    assert len(drawn) == 1 and "image/svg+xml" in drawn[0]["outputs"][0]["data"]
    assert "$$" in words, "an equation"
    if name in (*CORE, "synergy/scsa"):
        assert r"\odot" in words and r"\sigma(t) = 1" in words


def shown(cells):
    "What cells show as Markdown."
    outputs = [o for cell in cells for o in cell.get("outputs", [])]
    return ["".join(o["data"]["text/markdown"]) for o in outputs if "text/markdown" in o.get("data", {})]


@pytest.mark.slow
def test_the_findings_on_the_home_page_are_those_of_the_committed_results():
    path = ROOT / "nbs/index.ipynb"
    again = nbformat.read(path, 4)
    text.run(again, path.parent)
    assert shown(again.cells) == shown(cells_of(path)), "execute the home page again, then make readme"


RESULTS = r"\]\(\.\./results/([\w-]+)\.ipynb"


@CORE_CHAPTERS
def test_a_core_chapter_links_to_its_evidence(name):
    cells = cells_of(ROOT / f"nbs/{name}.ipynb", "markdown")
    measured = [reader.text(cell) for cell in cells if "{.measured}" in reader.text(cell)]
    assert len(measured) == 1 and re.search(RESULTS, measured[0])


@pytest.mark.parametrize(
    "source, chapter", [("scsa", "synergy/scsa"), ("sanet", "hybrid/sa"), ("cat", "collaboration/cat")]
)
def test_the_page_of_a_paper_and_the_chapter_of_its_mechanism_link_to_each_other(source, chapter):
    there, back = ROOT / f"nbs/results/{source}.ipynb", ROOT / f"nbs/{chapter}.ipynb"
    assert f"](../{chapter}.ipynb)" in "".join(map(reader.text, cells_of(there, "markdown")))
    assert f"](../results/{source}.ipynb)" in "".join(map(reader.text, cells_of(back, "markdown")))


def test_every_reference_has_an_address():
    entries = preview.bibliography(ROOT / "nbs/references.bib")
    addresses = {key: entry.get("doi") or entry.get("url") for key, entry in entries.items()}
    assert [key for key, address in addresses.items() if not address] == []
    assert len(set(addresses.values())) == len(addresses) >= 59, "one address each"
    for key, address in addresses.items():
        assert re.fullmatch(r"https://\S+|10\.\d{4,9}/\S+", address), key
        assert address in preview.full_entry(entries[key])


# ---- code that can be pasted

JOB = sorted((ROOT / "nbs/use").glob("*.ipynb"))
# Their pages show results; the code is behind them.
SHOWN_BY_CODE = {"results", "see", "evidence"}
PARTS = SHOWN_BY_CODE | {"runs", "nbs", "cpu", "sample"}
READ = [path for path in notebooks() if path.parent.name not in PARTS]


def blocks(path, kind="visible"):
    "Code cells that a reader sees, folded ones included, or those that the page hides."
    for cell in cells_of(path, "code"):
        head, body = reader.split_head(reader.text(cell))
        words = {line.removeprefix("#|").strip() for line in head}
        hidden = any(word.startswith(("hide", "echo: false", "default_exp")) for word in words)
        if "peers" not in words and hidden == (kind == "hidden"):
            yield words, re.sub(r"^(\s*)[!%].*$", r"\1pass", body, flags=re.M)


def names(body, kind):
    "Names that code reads (`ast.Load`) or binds."
    found = set()
    for node in ast.walk(ast.parse(body)):
        if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load) == (kind is ast.Load):
            found.add(node.id)
        elif kind is not ast.Load and isinstance(node, ast.FunctionDef | ast.ClassDef):
            found.add(node.name)
        elif kind is not ast.Load and isinstance(node, ast.arg):
            found.add(node.arg)
        elif kind is not ast.Load and isinstance(node, ast.ExceptHandler) and node.name:
            found.add(node.name)
        elif kind is not ast.Load and isinstance(node, ast.Import | ast.ImportFrom):
            found |= {(alias.asname or alias.name).split(".")[0] for alias in node.names}
    return found


@pytest.mark.parametrize("path", READ, ids=name_of)
def test_visible_code_needs_no_hidden_cell(path):
    hidden = {name for _, body in blocks(path, "hidden") for name in names(body, ast.Store)}
    known = set()
    for _, body in blocks(path):
        known |= names(body, ast.Store)
        assert not (names(body, ast.Load) & hidden) - known, f"only a hidden cell defines it: {body}"


# `make test` executes every page, its hidden cells too; without them one page does for the quick tests.
QUICK = ROOT / "nbs/use/into-your-network.ipynb"


@pytest.mark.parametrize(
    "path",
    [
        pytest.param(p, marks=[] if p == QUICK else pytest.mark.slow, id=name_of(p))
        for p in JOB
        if list(blocks(p))
    ],
)
def test_what_a_page_for_the_job_shows_runs_as_it_stands(path, tmp_path, executed):
    # In the order of the page, without what it hides: so its first blocks stand alone, too.
    file = tmp_path / "pasted.py"
    whole = ["from IPython.display import display", *(body for _, body in blocks(path))]
    file.write_text("\n".join(whole), "utf-8")
    folder, name = str(path.parent), str(file)
    code = f"import os, runpy; os.chdir({folder!r}); runpy.run_path({name!r}, run_name='__main__')"
    status, said = executed(code, MPLBACKEND="agg")
    assert status == 0, said[-2000:]


# ---- exercises

CHECK = re.compile(r"^def (check_[123])\(yours\):", re.M)
SIX = pytest.mark.parametrize("name", CORE)


@SIX
def test_a_core_chapter_has_three_exercises_with_a_check_and_a_folded_solution(name):
    cells = cells_of(ROOT / f"nbs/{name}.ipynb")
    whole = [reader.text(cell) for cell in cells]
    checks = [i for i, source in enumerate(whole) if CHECK.search(source)]
    assert [CHECK.search(whole[i])[1] for i in checks] == ["check_1", "check_2", "check_3"]
    for i, end in zip(checks, [*checks[1:], len(whole)], strict=True):
        assert re.search(r"^\d\. ", whole[i - 1], re.M) and whole[i + 1].startswith("::: {.answer}")
        (solution,) = (cell for cell in cells[i + 1 : end] if reader.text(cell).startswith("check_"))
        assert "'right'" in str(solution["outputs"]), "the solution is checked, too"


@SIX
@pytest.mark.slow
def test_the_checks_of_a_core_chapter_refuse_what_is_wrong(name):
    program = "\n".join(body for _, body in blocks(ROOT / f"nbs/{name}.ipynb"))
    wrong = ("None", "(1, 2)", "0", "{'nothing'}", "lambda *given: 0 * x_real.mean()", "lambda *given: 1")
    for check in ("check_1", "check_2", "check_3"):
        for given in wrong:
            program += f"\ntry:\n    {check}({given})\nexcept Exception:\n    pass\n"
            program += f"else:\n    raise SystemExit({f'{check} takes {given}'!r})\n"
    quiet = {"cwd": ROOT / "nbs" / Path(name).parent, "capture_output": True, "text": True}
    command = [sys.executable, "-c", "from IPython.display import display\n" + program]
    done = subprocess.run(command, env=os.environ | {"MPLBACKEND": "agg"}, **quiet)
    assert done.returncode == 0, done.stderr[-1000:]
