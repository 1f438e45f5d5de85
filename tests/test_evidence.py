"""Evidence: the published cells, the counter, intervals, and the ledger that joins them."""

import copy
import csv
import math
import shutil
import time
from collections import Counter
from datetime import datetime, timezone
from decimal import Decimal
from importlib.resources import files
from pathlib import Path

import matplotlib.pyplot as plt
import nbformat
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from IPython.core.interactiveshell import InteractiveShell
from IPython.utils.capture import capture_output
from torch import nn
from torchvision.models import get_model
from traitlets.config import Config

from scsa_book.attention import registry
from scsa_book.evidence import ledger, planned
from scsa_book.evidence.cost import Convention, Cost, cost, meta_copy
from scsa_book.evidence.published import METRICS, Cell, cells, tables
from scsa_book.evidence.statistics import paired, summarise
from scsa_book.evidence.tables import Html, entry, link, table, verdict
from scsa_book.training.config import RunConfig
from scsa_book.training.result import Code, Data, Epoch, Machine, RunResult

# ---- published


def test_the_file_is_whole():
    found = cells()
    assert len(found) == 1308 and len(tables()) == 16
    assert Counter(c.source for c in found) == {"scsa": 648, "sanet": 267, "cat": 393}
    sorts = Counter(METRICS[c.metric].sort for c in found)
    assert sorts == {"cost": 265, "speed": 33, "accuracy": 1010}
    costs = Counter(c.metric for c in found if METRICS[c.metric].sort == "cost")
    assert costs == {"params_M": 130, "flops_G": 115, "macs_G": 20}


def test_values_are_the_text_of_the_file():
    lines = files("scsa_book.evidence").joinpath("published.csv").read_text("utf-8").splitlines()
    assert [c.value for c in cells()] == [row["value"] for row in csv.DictReader(lines)]
    assert all(math.isfinite(c.number) for c in cells(added=True))


@pytest.mark.parametrize(
    ("value", "number", "decimals", "unit"),
    [("27.40", 27.4, 2, 0.01), ("2433", 2433.0, 0, 1.0), ("4.140", 4.14, 3, 0.001), ("37.6", 37.6, 1, 0.1)],
)
def test_the_last_digit_is_kept(value, number, decimals, unit):
    cell = Cell("s", "1", "t", "d", "", "b", "m", "", "top1", value)
    assert (cell.number, cell.decimals) == (number, decimals)
    assert cell.unit == pytest.approx(unit)


@pytest.mark.parametrize(
    ("question", "value"),
    [
        (dict(source="scsa", table="IV", backbone="resnet50", method="scsa", metric="params_M"), "25.62"),
        (dict(source="scsa", table="IV", backbone="resnet50", method="cpca", metric="params_M"), "27.40"),
        (dict(source="sanet", table="2", backbone="resnet101", method="se", metric="params_M"), "49.327"),
        (dict(source="cat", table="4", backbone="resnet50", method="baseline", metric="params_M"), "24.37"),
    ],
)
def test_known_cells(question, value):
    assert [c.value for c in cells(**question)] == [value]


def test_the_omitted_cells_are_asked_for():
    assert len(cells("scsa", "IV")) == 100
    extra = [c for c in cells("scsa", "IV", added=True) if c.added]
    assert len(extra) == 10 and {c.backbone for c in extra} == {"mobilenetv2"}
    assert [c.value for c in extra if c.metric == "params_M"] == ["4.07", "3.63"]
    assert not {ledger.cell_key(c) for c in extra} & {ledger.cell_key(c) for c in cells()}


@pytest.mark.parametrize(
    ("question", "words"),
    [
        (dict(source="scs"), ["source='scs'", "'cat'", "'sanet'", "'scsa'"]),
        (dict(source="sanet", table="IV"), ["'1'", "'2'", "'3'", "'4'"]),
        (dict(source="scsa", table="I", metric="top1"), ["'flops_G'", "'mIoU'", "'params_M'"]),
        (dict(sources="scsa"), ["no column 'sources'", "source, table, task"]),
        (dict(backbone="vgg"), ["'mobilenetv2'", "'resnet101'", "'resnet50'", "'shufflenetv2'"]),
    ],
)
def test_a_wrong_filter_lists_the_possible_values(question, words):
    with pytest.raises(ValueError) as error:
        cells(**question)
    assert all(word in str(error.value) for word in words)


# ---- cost


@pytest.mark.parametrize(
    ("name", "parameters", "macs"),
    [
        ("resnet50", 25_557_032, 4_089_184_256),
        ("resnet101", 44_549_160, 7_801_405_440),
        ("mobilenet_v2", 3_504_872, 300_774_272),
    ],
)
def test_known_networks(name, parameters, macs):
    with torch.device("meta"):
        network = get_model(name, weights=None)
    assert cost(network) == Cost(parameters, parameters, macs)


def test_resnet101_takes_under_two_seconds():
    with torch.device("meta"):
        network = get_model("resnet101", weights=None)
    start = time.perf_counter()
    cost(network)
    assert time.perf_counter() - start < 2


@settings(max_examples=30, deadline=None)
@given(
    kernel=st.sampled_from([1, 3, 5]),
    groups=st.sampled_from([1, 2, 4]),
    stride=st.integers(1, 3),
    bias=st.booleans(),
    height=st.integers(5, 20),
    width=st.integers(5, 20),
)
def test_a_convolution_costs_what_the_formula_says(kernel, groups, stride, bias, height, width):
    conv = nn.Conv2d(8, 12, kernel, stride=stride, padding=kernel // 2, groups=groups, bias=bias)
    h, w = (math.floor((side - 1) / stride) + 1 for side in (height, width))
    weights = kernel * kernel * 8 * 12 // groups
    expected = Cost(weights + 12 * bias, weights + 12 * bias, weights * h * w)
    assert cost(conv, (8, height, width)) == expected


def test_only_trainable_parameters_are_trainable():
    network = nn.Sequential(nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 1))
    network[0].requires_grad_(False)
    assert cost(network, (3, 5, 5))[:2] == (36, 20)


def test_counting_leaves_the_network_alone():
    network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)).train()
    before = copy.deepcopy(network.state_dict())
    cost(network, (3, 8, 8))
    assert network.training and all(torch.equal(v, before[k]) for k, v in network.state_dict().items())
    shadow = meta_copy(network)
    assert {v.device.type for v in shadow.state_dict().values()} == {"meta"}
    assert shadow.state_dict().keys() == before.keys()


def test_shared_parameters_are_counted_once():
    first = nn.Linear(4, 4, bias=False)
    assert cost(nn.Sequential(nn.Flatten(), first, first), (4, 1, 1)) == Cost(16, 16, 32)


NORMS = nn.utils.parametrizations.weight_norm, nn.utils.parametrizations.spectral_norm, nn.utils.weight_norm


@pytest.mark.filterwarnings("ignore:.*weight_norm. is deprecated:FutureWarning")
@pytest.mark.parametrize("norm", NORMS)
def test_a_normalised_weight_is_counted(norm):
    network = nn.Sequential(norm(nn.Conv2d(3, 4, 3)), nn.Flatten(), norm(nn.Linear(16, 5)))
    found = cost(network, (3, 4, 4))
    assert found.macs == 27 * 4 * 4 + 16 * 5
    assert found.parameters == found.trainable == sum(p.numel() for p in network.parameters())
    assert all(p.requires_grad for p in network.parameters())


def test_a_parameter_may_be_an_argument():
    "As the class token of CaiT."
    network = nn.Module()
    network.token, network.layer = nn.Parameter(torch.zeros(1, 3)), nn.Linear(3, 4)
    found = cost(network, (3, 2, 2), forward=lambda network, x: network.layer(network.token))
    assert found == Cost(19, 19, 12)


def test_a_convention_counts_on_top_of_matrix_work():
    network = nn.Sequential(nn.Conv2d(3, 4, 1, bias=False), nn.BatchNorm2d(4))
    count = {torch.ops.aten.native_batch_norm: lambda x, *_, **__: 2 * torch.Size(x).numel()}
    norms = Convention("two for each normalised element", count)
    assert cost(network, (3, 5, 7)).macs == 12 * 35
    assert cost(network, (3, 5, 7), norms).macs == 12 * 35 + 2 * 4 * 35


@pytest.mark.parametrize("size", [(224, 224), (3, 0, 224), (1, 3, 224, 224), 224, (3, 22.0, 22), None])
def test_a_wrong_size_is_refused(size):
    with pytest.raises(ValueError, match="channels, height, width"):
        cost(nn.Identity(), size)


@pytest.mark.parametrize("convention", ["trace", None, {}])
def test_a_wrong_convention_is_refused(convention):
    with pytest.raises(ValueError, match=r"not a Convention; take .* scsa_book\.evidence\.conventions"):
        cost(nn.Identity(), (3, 4, 4), convention)


def test_wrong_channels_are_refused():
    with pytest.raises(ValueError, match=r"Conv2d: the pass fails for input_size=\(4, 5, 5\)"):
        cost(nn.Conv2d(3, 4, 1), (4, 5, 5))


@pytest.mark.parametrize("decide", [lambda x: x * x.sum().item(), lambda x: x[x > 0]])
def test_a_pass_that_depends_on_values_is_refused(decide):
    with pytest.raises(ValueError, match=r"depends on values.* forward= what counts"):
        cost(nn.Identity(), (3, 4, 4), forward=lambda _, x: decide(x))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_a_network_costs_the_same_in_any_precision(dtype):
    network = registry.create("scsa", 64)
    assert cost(network.to(dtype), (64, 14, 14)) == cost(registry.create("scsa", 64), (64, 14, 14))


# ---- statistics


def test_an_interval_by_hand():
    # mean 7/3, variance 7/3; 97.5% quantile of t with 2 degrees of freedom, from a printed table: 4.302653
    found = summarise([1, 2, 4])
    assert found.n == 3 and found.mean == pytest.approx(7 / 3) and found.std == pytest.approx((7 / 3) ** 0.5)
    half = 4.302653 * (7 / 9) ** 0.5
    assert (found.low, found.high) == pytest.approx((7 / 3 - half, 7 / 3 + half), abs=1e-5)
    assert found.show(3) == "2.333 ± 3.795"


def test_one_run_has_no_interval():
    found = summarise([90.125])
    assert (found.n, found.std, found.low, found.high) == (1, None, None, None)
    assert found.show(1) == "90.1" and not found.excludes_zero


@pytest.mark.filterwarnings("error")
def test_equal_runs_have_an_interval_of_no_width():
    found = summarise([2.5, 2.5, 2.5])
    assert (found.mean, found.std, found.low, found.high) == (2.5, 0, 2.5, 2.5)


@pytest.mark.parametrize("values", [[], [1, math.nan], [math.inf], [[1, 2]]])
def test_what_is_no_number_is_refused(values):
    with pytest.raises(ValueError, match="finite"):
        summarise(values)


def test_a_paired_difference_removes_what_the_seeds_share():
    a, b = {0: 91.0, 1: 93.0, 2: 95.5}, {0: 90.0, 1: 92.0, 2: 94.0, 3: 50.0}
    found = paired(a, b)
    assert found == summarise([1.0, 1.0, 1.5])
    assert found.excludes_zero and not paired(b, a).high > 0
    half = 4.302653 * found.std / 3**0.5
    assert found.high - found.mean == pytest.approx(half, abs=1e-5)


def test_a_pair_needs_a_common_seed():
    with pytest.raises(ValueError, match=r"no seed in both: \[0\] and \[1\]"):
        paired({0: 1.0}, {1: 1.0})


def test_zero_on_the_border_is_not_excluded():
    assert not summarise([0.0, 0.0]).excludes_zero
    assert summarise([1.0, 1.1, 0.9]).excludes_zero and summarise([-1.0, -1.1, -0.9]).excludes_zero


# ---- tables


def test_only_html_is_not_escaped():
    made = table({"a<": "", "b": "num"}, [["<i>", Html("<b>1</b>")]], label='x"y', filterable=True)
    assert '<th scope="row">&lt;i&gt;</th><td class="num"><b>1</b></td>' in made
    assert '<table class="filterable">' in made and 'aria-label="x&quot;y"' in made and "a&lt;" in made
    assert made._repr_html_() == made and "script" not in made and "style=" not in made


def test_pieces():
    assert entry("td", "a", class_="") == "<td>a</td>"
    assert link("a & b", "x.ipynb") == '<a href="x.ipynb">a &amp; b</a>'
    assert verdict("matches", "close") == '<span class="verdict close">matches</span>'


def test_a_crooked_table_is_refused():
    with pytest.raises(ValueError, match="3 entries and the head 2"):
        table({"a": "", "b": ""}, [[1, 2, 3]], label="")


# ---- ledger: rounding


@pytest.mark.parametrize(
    ("printed", "exact", "status", "twice"),
    [
        ("25.62", "25.617448", "equal", False),
        ("27.40", "27.43", "differs", False),  # the trailing zero is significant
        ("27.4", "27.43", "equal", False),
        ("27.40", "27.394836", "equal", True),  # 27.395, then 27.40
        ("3.51", "3.504872", "equal", True),
        ("3.63", "3.619048", "differs", False),
        ("25.62", "25.615", "equal", False),  # a tie agrees with both neighbours
        ("25.61", "25.615", "equal", False),
        ("25.62", "25.625", "equal", False),
        ("25.62", "25.6250001", "differs", False),
        ("25.62", "25.6149999", "equal", True),  # 25.615, then 25.62
        ("25.62", "25.6144999", "differs", False),
        ("25.558", "25.557", "differs", False),
        ("2433", "2433.5", "equal", False),
        ("2433", "2434", "differs", False),
    ],
)
def test_equal_to_the_printed_precision(printed, exact, status, twice):
    assert ledger.compare(printed, Decimal(exact)) == ledger.Verdict(status, twice)


@settings(max_examples=200, deadline=None)
@given(count=st.integers(10**5, 10**8), decimals=st.integers(0, 4))
def test_what_python_rounds_to_is_equal(count, decimals):
    exact = Decimal(count) / 10**6
    assert ledger.compare(f"{exact:.{decimals}f}", exact) == ledger.Verdict("equal")
    away = Decimal(f"{exact:.{decimals}f}") + Decimal(2).scaleb(-decimals)
    assert ledger.compare(f"{away:.{decimals}f}", exact).status == "differs"


# ---- ledger: rows


@pytest.fixture(scope="module")
def everything():
    return ledger.rows(added=True, results=[])


def test_verdicts_of_the_costs(everything):
    found = [r for r in everything if METRICS[r.cell.metric].sort == "cost" and not r.cell.added]
    verdicts = Counter((r.cell.metric, r.status) for r in found)
    assert verdicts == {
        ("params_M", "equal"): 122, ("params_M", "differs"): 8,
        ("flops_G", "equal"): 111, ("flops_G", "differs"): 4,
        ("macs_G", "equal"): 18, ("macs_G", "differs"): 2,
    }  # fmt: skip
    assert all(r.status in ledger.STATUSES for r in everything)


def test_the_cell_that_the_transcription_left_out(everything):
    [found] = [r for r in everything if r.cell.added and r.status == "differs"]
    assert ledger.cell_key(found.cell) == "scsa/IV/imagenet1k/mobilenetv2/scsa/params_M"
    assert found.ours == "3.619" and found.count == 3_619_048 and "16 parameters" in found.note


def test_what_was_rounded_twice_is_scsas(everything):
    twice = [r for r in everything if r.twice]
    assert len(twice) == 5 and {(r.cell.source, r.cell.metric) for r in twice} == {("scsa", "params_M")}
    assert "27.394836 → 27.395 → 27.40" in {r.note for r in twice}


def test_what_is_fitted_says_what_was_fitted(everything):
    fitted = Counter((r.cell.source, r.cell.table, r.cell.metric) for r in everything if r.fitted)
    assert fitted == {
        ("scsa", "V", "flops_G"): 36, ("sanet", "3", "flops_G"): 6,
        ("cat", "3", "macs_G"): 4, ("cat", "3", "params_M"): 4,
    }  # fmt: skip
    assert all(r.note.startswith("Fitted: ") for r in everything if r.fitted)


def test_every_difference_has_its_reason(everything):
    assert all(r.note and r.see for r in everything if r.status == "differs" or r.twice)
    statuses = {ledger.cell_key(r.cell): r.status for r in everything}
    assert all(statuses.get(key) == "differs" for key in ledger.REASONS), "a reason for a cell that agrees"
    assert {p for p, status in statuses.items() if status == "differs"} == set(ledger.REASONS)


def test_reasons_link_to_pages_that_exist(everything):
    root = Path(ledger.__file__).parents[2] / "nbs"
    for see in {r.see for r in everything} - {""}:
        page, _, section = see.partition("#")
        assert (root / page).is_file(), page
        assert not section or f"{{#{section}}}" in (root / page).read_text("utf-8"), see


def test_what_is_not_measured_says_why(everything):
    open_rows = [r for r in everything if r.status == "unmeasured"]
    assert all(r.note and not r.ours and r.count is None for r in open_rows)
    notes = {r.cell.metric: r.note for r in open_rows if r.cell.table == "IV"}
    assert list(notes) == ["throughput_img_s", "top1", "top5"]
    assert "machine" in notes["throughput_img_s"] and "No run" in notes["top1"]
    assert all(r.note.endswith(".") for r in open_rows)


def test_a_cost_that_is_not_kept_says_how_to_keep_it(monkeypatch):
    monkeypatch.setattr(ledger, "stored", dict)
    [found] = ledger.rows("scsa", "IV", backbone="resnet50", method="se", metric="params_M", results=[])
    assert found.status == "unmeasured" and "ledger --write" in found.note


def test_the_summary_counts_every_cell(everything):
    counted = ledger.summary(results=[])
    assert list(counted) == tables()
    assert sum(sum(by.values()) for by in counted.values()) == 1308
    statuses = Counter(r.status for r in everything if not r.cell.added)
    for status in ledger.STATUSES:
        assert sum(by[status] for by in counted.values()) == statuses[status]
    by_status = {"equal": 39, "differs": 1, "other_scale": 0, "unmeasured": 60}
    assert counted["scsa", "IV"] == by_status


def test_a_filter_that_finds_nothing_lists_what_is_there():
    with pytest.raises(ValueError, match="'mobilenetv2', 'resnet101', 'resnet50'"):
        ledger.rows("scsa", "IV", backbone="vgg", results=[])


# ---- ledger: runs


def finished(attention=None, seed=0, top1=80.0, parameters=77_000, train_images=8000, **given):
    "A made-up result."
    given = {"preset": "sample", "dataset": "fashion-mnist", "network": "resnet8", "epochs": 2, **given}
    config = RunConfig(attention=attention, seed=seed, **given)
    epochs = [
        Epoch(epoch=n, metrics={"top1": value}, lr=0.1, seconds=1, train_seconds=1, wait_seconds=0)
        for n, value in ((1, top1 - 5), (2, top1))
    ]
    now = datetime(2026, 1, 1, tzinfo=timezone.utc)
    return RunResult(
        id=config.id, config=config, final={"top1": top1, "top5": 99.0}, epochs=epochs, parameters=parameters,
        seconds=61, images_per_second=1, data_wait=0, code=Code(commit=None, dirty=None), starts=1,
        data=Data(name=config.dataset, fingerprint="", train_images=train_images, test_images=2000),
        machine=Machine(device="a processor", devices=1, threads=1, versions={}), started=now, finished=now,
    )  # fmt: skip


def sample_runs():
    means = {None: 80.0, "se": 80.0, "cbam": 75.0, "scsa": 83.0}
    noise = [0.0, 0.5, -0.4]
    wobble = {"se": [0.3, -0.3, 0.1], "cbam": [0.1, 0.0, 0.2], "scsa": [0.0, 0.1, 0.0]}
    return [
        finished(name, seed, mean + noise[seed] + wobble.get(name, [0, 0, 0])[seed])
        for name, mean in means.items()
        for seed in (2, 0, 1)
    ]


@pytest.fixture
def book(tmp_path):
    "A book that has only experiments, results and the pages that read them."
    root = Path(ledger.__file__).parents[2]
    (tmp_path / "_quarto.yml").touch()
    (tmp_path / "nbs/runs").mkdir(parents=True)
    shutil.copy(root / "nbs/runs/experiments.yml", tmp_path / "nbs/runs")
    (tmp_path / "nbs/results/sample").mkdir(parents=True)
    for page in (root / "nbs/results").glob("*.ipynb"):
        shutil.copy(page, tmp_path / "nbs/results")
    return tmp_path


def keep_results(book, results):
    for r in results:
        path = book / "nbs/results" / r.config.preset / f"{r.id}.json"
        path.parent.mkdir(exist_ok=True)
        path.write_text(r.model_dump_json(), encoding="utf-8")


def top1(results, method="scsa"):
    question = dict(backbone="resnet50", method=method, metric="top1")
    [found] = ledger.rows("scsa", "IV", results=results, **question)
    return found


def test_a_run_at_another_scale_never_counts_as_agreement():
    found = top1(sample_runs())
    assert found.status == "other_scale" and found.count is None
    assert found.ours == summarise([83.0, 83.6, 82.6]).show(2)
    assert all(word in found.note for word in ("fashion-mnist", "resnet8", "3 seeds", "sample"))
    assert top1(sample_runs(), "baseline").ours.startswith("80.03 ± ")
    assert top1(sample_runs(), "eca").status == "unmeasured"


def test_one_run_has_no_interval_in_the_ledger():
    found = top1([finished("scsa", top1=77.49)])
    assert (found.status, found.ours) == ("other_scale", "77.49") and "no interval" in found.note


def test_runs_with_other_options_do_not_stand_for_the_mechanism():
    assert top1([finished("scsa", options={"heads": 4})]).status == "unmeasured"
    table_form = {"bias": False, "batch_norm": True}
    assert top1([finished("se", options=table_form)], "se").status == "other_scale"


def test_the_largest_experiment_is_shown():
    small = sample_runs()
    given = dict(preset="cpu", dataset="cifar100", network="resnet20", train_images=50_000)
    large = [finished("scsa", 0, 60.0, **given), finished(None, 0, 58.0, **given)]
    found = top1([*small, *large])
    assert found.ours == "60.00" and "cifar100" in found.note
    # a run beside which no other stands in its setting comes last
    assert top1([*small, large[0]]).ours != "60.00"


def test_errors_are_a_hundred_minus_accuracy():
    question = dict(backbone="resnet50", method="se", metric="top1_error")
    [found] = ledger.rows("cat", "3", **question, results=[finished("se", top1=75.5)])
    assert found.ours == "24.50"


def test_only_classification_cells_take_classification_runs():
    found = ledger.rows("scsa", method="scsa", results=sample_runs())
    taken = [r.cell for r in found if r.status == "other_scale"]
    assert {(c.task, c.table) for c in taken} == {("classification", "III"), ("classification", "IV")}
    assert {c.metric for c in taken} == {"top1", "top5"}
    assert {c.variant for c in taken if c.table == "III"} == {"Baseline: scsa"}, "the other rows have options"


def found_by(attention, ap, seed=0, train_images=300, **given):
    "A made-up result of a detector."
    given = {"task": "detect", "dataset": "bccd", "network": "faster_rcnn", "backbone": "resnet18", **given}
    made = finished(attention, seed, train_images=train_images, **given)
    return made.model_copy(update={"final": {"AP": ap, "AP50": ap + 20, "mask_AP": ap - 3}})


def ap(results, method="scsa", framework="faster_rcnn", table="V"):
    asked = dict(framework=framework, backbone="resnet50", method=method, metric="AP")
    [row] = ledger.rows("scsa", table, **asked, results=results)
    return row


def test_a_detector_stands_beside_detectors_of_its_kind():
    row = ap([found_by("scsa", 30.0)])
    assert (row.status, row.ours) == ("other_scale", "30.0")
    assert row.note.startswith("bccd, faster_rcnn on resnet18, 2 epochs, preset sample: one run")
    assert ap([found_by("scsa", 30.0)], framework="retinanet").status == "unmeasured"
    assert ap([found_by("scsa", 30.0)], method="se").status == "unmeasured"
    assert ap([found_by("se", 30.0, options={"bias": False})], method="se").status == "unmeasured"
    masks = found_by("scsa", 30.0, network="mask_rcnn")
    assert ap([masks], framework="mask_rcnn", table="II").ours == "27.0", "the AP of the masks"
    no_masks = masks.model_copy(update={"final": {"AP": 30.0}})
    assert ap([no_masks], framework="mask_rcnn", table="II").status == "unmeasured"


def test_another_position_does_not_stand_for_the_mechanism():
    assert top1([finished("scsa", position="before_add")]).status == "unmeasured"
    assert top1([finished("scsa", position="before_last_conv")]).status == "other_scale"


def test_photographs_come_before_composed_scenes():
    scenes = found_by("scsa", 30.0, dataset="scenes", train_images=4000)
    assert ap([scenes]).ours == "30.0"
    assert ap([scenes, found_by("scsa", 20.0)]).ours == "20.0"


def test_rows_of_an_ablation_take_runs_with_their_options():
    runs = [finished("scsa", top1=70.0), finished("scsa", top1=60.0, options={"norm": "batch"})]
    rows = {r.cell.variant: r for r in ledger.rows("scsa", "III", metric="top1", results=runs)}
    assert rows["Baseline: scsa"].ours == "70.00" and rows["Micro Design: bn-for-gn"].ours == "60.00"
    assert sum(r.status == "other_scale" for r in rows.values()) == 2


@pytest.mark.parametrize(
    ("given", "status"),
    [
        ({}, "equal"),
        ({"ap": 39.2}, "differs"),
        ({"dataset": "bccd"}, "other_scale"),
        ({"paper": "cat"}, "other_scale"),
        ({"backbone": "resnet101"}, "other_scale"),
    ],
)
def test_a_detector_at_the_papers_own_scale_gives_a_verdict(given, status):
    own = dict(preset="paper", paper="scsa", dataset="coco2017", backbone="resnet50", ap=39.3)
    assert ap([found_by("scsa", **own | given)]).status == status


def test_a_row_of_an_ablation_at_the_papers_own_scale_gives_a_verdict():
    own = dict(preset="paper", paper="scsa", dataset="imagenet", network="resnet50")
    runs = [finished("scsa", top1=77.19, options={"norm": "batch"}, **own)]
    rows = {r.cell.variant: r for r in ledger.rows("scsa", "III", metric="top1", results=runs)}
    assert rows["Micro Design: bn-for-gn"].status == "equal"
    assert {r.status for v, r in rows.items() if v != "Micro Design: bn-for-gn"} == {"unmeasured"}


def test_a_detector_with_other_options_than_the_tables_is_none_of_its_own():
    own = dict(preset="paper", paper="scsa", dataset="coco2017", backbone="resnet50", ap=38.2)
    assert ap([found_by("se", **own)], "se").status == "other_scale"
    table_form = {"bias": False, "batch_norm": True}
    [printed] = cells("scsa", "V", framework="faster_rcnn", backbone="resnet50", method="se", metric="AP")
    own["ap"] = printed.number
    assert ap([found_by("se", options=table_form, **own)], "se").status == "equal"


def test_outside_of_the_book_no_run_is_planned(monkeypatch):
    def nowhere():
        raise FileNotFoundError("the book was not found")

    monkeypatch.setattr(planned, "experiments_file", nowhere)
    assert planned.planned(cells("scsa", "V", metric="AP")[0]) is None
    assert top1(sample_runs()).status == "unmeasured"


@pytest.mark.parametrize(
    ("values", "parameters", "status"),
    [
        ([77.3, 77.5, 77.6], 25_617_448, "equal"),
        ([76.1, 76.2, 76.15], 25_617_448, "differs"),
        ([77.49], 25_617_448, "equal"),
        ([77.48], 25_617_448, "differs"),
        ([77.3, 77.5, 77.6], 25_617_449, "other_scale"),  # not the paper's network
    ],
)
def test_the_papers_own_scale_gives_a_verdict(values, parameters, status):
    given = dict(preset="paper", paper="scsa", dataset="imagenet", network="resnet50", train_images=1_281_167)
    runs = [finished("scsa", seed, v, parameters, **given) for seed, v in enumerate(values)]
    assert top1(runs).status == status
    # a larger experiment at another scale does not replace the paper's own
    other = finished("scsa", 0, 50.0, preset="gpu", train_images=10**9)
    assert top1([*runs, other]).status == status


def test_experiments_gather_seeds_and_nothing_else():
    runs = [*sample_runs(), finished("scsa", 0, epochs=3), finished("scsa", 1, options={"heads": 4})]
    found = ledger.experiments(runs)
    assert sorted(len(e.runs) for e in found) == [1, 1, 3, 3, 3, 3]
    assert all([r.config.seed for r in e.runs] == sorted(r.config.seed for r in e.runs) for e in found)
    together = ledger.comparable(found)
    assert list(together) == ["baseline", "se", "cbam", "scsa"]
    assert len(together["scsa"].runs) == 3 and together["scsa"].config.epochs == 2


def test_results_are_read_from_the_book(book, monkeypatch):
    keep_results(book, sample_runs())
    (book / "nbs/results/sample/half.json").write_text('{"id": ')
    monkeypatch.chdir(book / "nbs/results")
    assert top1(None).status == "other_scale"
    assert len(ledger.experiments()) == 4


# ---- pages that read results


@pytest.fixture
def show(book, monkeypatch):
    "Runs the cells of a page in its folder and returns all of its outputs."
    monkeypatch.chdir(book / "nbs/results")
    shell = InteractiveShell(config=Config({"HistoryManager": {"enabled": False}}))

    def run(name):
        shown = []
        for cell in nbformat.read(f"{name}.ipynb", 4).cells:
            if cell.cell_type == "code":
                with capture_output():
                    done = shell.run_cell(cell.source)
                done.raise_error()
                shown.append(getattr(done.result, "data", done.result))
        return "\n".join(str(s) for s in shown if s is not None)

    yield run
    plt.close("all")


@pytest.mark.parametrize("name", ["index", "classification"])
def test_live_pages_without_results(show, name):
    assert "No run has finished here yet: `make book` runs them." in show(name)


def test_the_list_of_runs(book, show):
    results = sample_runs()
    keep_results(book, results)
    shown = show("index")
    assert f'<a href="sample/{results[0].id}.json">' in shown and shown.count("<a ") == len(results)
    assert len(results) == 12 and "0:12:12" in shown and "192,000" in shown
    assert "No run has finished" not in shown


def test_the_comparison_says_no_more_than_its_intervals(book, show):
    keep_results(book, sample_runs())
    shown = show("classification")
    assert shown.splitlines()[-1] == (
        "On this test split, with this recipe: SCSA is above the plain network; "
        "CBAM is below the plain network; these runs do not distinguish SE from the plain network."
    )
    # difference 3.0, 3.1, 3.0: mean 3.033, standard deviation 0.0577, times 4.303 / sqrt(3)
    assert ">+3.03<" in shown and ">+2.89 to +3.18<" in shown
    assert "77,000" in shown and ">80.03<" in shown
