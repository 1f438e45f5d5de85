"""Comparisons of finished runs: rows, baselines, intervals, what is missing, and the pages that show them."""

import ast
import re
import time
from dataclasses import replace
from datetime import datetime, timezone
from itertools import combinations

import matplotlib.pyplot as plt
import pytest
import repository
import torch
from conftest import ROOT, cells_of
from scipy import stats

from scsa_book.attention import registry
from scsa_book.evidence import claims, contrasts, curves, ledger, planned, recount, steps
from scsa_book.evidence import comparisons as co
from scsa_book.evidence.cost import parameters
from scsa_book.evidence.power import smallest_difference
from scsa_book.evidence.published import cells, tables
from scsa_book.evidence.speed import Spread
from scsa_book.evidence.statistics import summarise
from scsa_book.networks.build import shapes_only
from scsa_book.training.config import ConfigError, configure, digest
from scsa_book.training.experiments import Experiment, experiment
from scsa_book.training.result import Code, Data, Epoch, Machine, RunResult
from scsa_book.training.tasks import TASKS, build_network

PAGES = ("cifar100", "cifar100-resnet20", "imagenette", "gain", "ablations", "scenes", "report")
NOISE = {0: 0.0, 1: 0.5, 2: -0.4, 3: 0.1}


def result(config, value, seed=0):
    "A made-up result of a configuration."
    config = config.model_copy(update={"seed": seed})
    metric = TASKS[config.task].metrics[0]
    epochs = [
        Epoch(epoch=n, metrics={metric: v}, lr=0.1, seconds=1, train_seconds=1, wait_seconds=0)
        for n, v in ((1, value - 5), (2, value))
    ]
    now = datetime(2026, 1, 1, tzinfo=timezone.utc)
    return RunResult(
        id=config.id, config=config, final={metric: value}, epochs=epochs, parameters=77_000,
        seconds=61, images_per_second=1, data_wait=0, code=Code(commit=None, dirty=None), starts=1,
        data=Data(name=config.dataset, fingerprint="", train_images=8000, test_images=2000),
        machine=Machine(device="a processor", devices=1, threads=1, versions={}), started=now, finished=now,
    )  # fmt: skip


def results_of(name, values, seeds=(0, 1, 2)):
    "Results of the rows of an experiment: the row's mean plus a value for the seed; `values` by row number."
    rows = co.compare(name, results=[]).rows
    return [result(rows[i].config, mean + NOISE[s], s) for i, mean in values.items() for s in seeds]


# ---- experiments and their labels


def test_a_label_is_no_part_of_a_run():
    plain = [{"attention": "none"}, {"attention": "se"}]
    named = [{**run, "label": f"row {i}"} for i, run in enumerate(plain)]
    one, other = (Experiment(title="t", preset="sample", runs=runs) for runs in (plain, named))
    assert one.parameters() == other.parameters()
    assert [c.id for c, _ in one.plan()] == [c.id for c, _ in other.plan()]


def test_a_recipe_says_how_light_the_network_is():
    given = {"network_options": {"width": 16, "channels": 32}}
    said = co.recipe(configure("cpu", task="segment", **given))
    assert "Network: upernet on resnet18 (width 16, channels 32). Recipe: 20 epochs" in said
    sizes = co.recipe(configure("cpu", task="detect"))
    assert "head_channels 128, min_size 192, max_size 256)" in sizes and "rpn_" not in sizes
    assert "Network: resnet20. Recipe" in co.recipe(configure("cpu"))


def test_ids_that_results_rest_on_stay():
    ids = {c.id for name in ("cifar100", "scsa-ablation") for c, _ in experiment(name).plan(seeds=[0])}
    assert {
        "cifar100_resnet8_baseline_seed0_d29d5e5f", "cifar100_resnet8_se_seed0_032ce2c8",
        "cifar100_resnet8_eca_seed0_c692f8f6", "cifar100_resnet8_scsa_seed0_a533c374",
    } <= ids  # fmt: skip


@pytest.mark.parametrize(
    ("name", "source", "number", "metric"),
    [("scsa-ablation", "scsa", "III", "top1"), ("cat-ablation", "cat", "6", "AP")],
)
def test_rows_of_an_ablation_find_their_printed_numbers(name, source, number, metric):
    found = cells(source, number, metric=metric)
    ours = [co.printed(row, found) for row in co.compare(name, results=[]).rows]
    assert None not in ours and len(set(ours)) == len(found)
    by_variant = {cell.variant: cell.value for cell in ours}
    assert by_variant == {cell.variant: cell.value for cell in found}


# ---- every table of the papers is an experiment

SMALLER = ("sample", "cpu", "gpu")


def experiment_of(source, number):
    return experiment(planned.experiment_name(source, number))


def printed_row(cell):
    "The parameters that the run of a cell needs."
    method = None if cell.method == "baseline" else cell.method
    return (*planned.setting(cell).values(), method, planned.label(cell))


def planned_rows(asked, preset=None):
    "The same of every row of an experiment, with its configuration."
    given = asked.parameters(preset, [0])
    configs = [configure(**values) for values in given]
    labels = [row.get("label", "") for row in asked.rows]
    return {
        (c.dataset, c.network, c.backbone, c.attention, label): c
        for c, label in zip(configs, labels, strict=True)
    }


@pytest.mark.parametrize(("source", "number"), tables())
def test_every_row_of_a_table_is_a_run_of_its_experiment(source, number):
    asked = experiment_of(source, number)
    printed = cells(source, number, added=True)
    rows = planned_rows(asked)
    assert {printed_row(cell) for cell in printed} == set(rows)
    for key, cell in {printed_row(cell): cell for cell in printed}.items():
        given = planned.planned(cell)  # as the ledger finds it
        assert (given["attention"], given["network"]) == (key[3] or "none", key[1])
        assert given.get("options", {}) == rows[key].options
    assert len(rows) == len(asked.rows), "a row is listed once"
    assert asked.preset == "paper" and asked.seeds == [0]
    assert {c.paper for c in rows.values()} == {"cat" if source == "cat" else "scsa"}, "sanet prints none"
    # and its network is the one whose parameters are printed
    for cell in printed:
        if cell.metric == "params_M" and cell.task == "classification":
            config = rows[printed_row(cell)]
            facts = TASKS["classify"].facts(config.dataset)
            with shapes_only():
                made = parameters(build_network(config, facts.classes))
            where = recount.cell_key(cell)
            first = 2 if where == "scsa/IV/imagenet1k/mobilenetv2/eca/params_M" else 0
            assert made - first == ledger.stored()[where].count, where  # its first kernel is 1, not 3


@pytest.mark.parametrize("preset", SMALLER)
@pytest.mark.parametrize(("source", "number"), tables())
def test_every_table_can_be_made_at_a_smaller_scale(source, number, preset):
    plan = experiment_of(source, number).plan(preset)
    assert {c.preset for c, _ in plan} == {preset}
    mechanisms = {cell.method for cell in cells(source, number, added=True)} - {"baseline"}
    assert {c.attention for c, _ in plan} - {None} == mechanisms
    if preset != "gpu":
        there = {"fashion-mnist", "cifar100", "scenes", "bccd", "coco-mini", "camvid"}
        assert {c.dataset for c, _ in plan} <= there and len(plan) <= 20


def test_a_row_that_is_not_printed_finds_nothing():
    row = co.compare("bccd", results=[]).rows[1]
    assert co.printed(row, cells("scsa", "III", metric="top1")) is None


def test_the_scenes_are_a_full_grid():
    c = co.compare("scenes-size-brightness", results=[])
    settings = [(r.config.data_options["scenes"], r.config.attention) for r in c.rows]
    grid = {(d["size"], d["brightness"], name) for d, name in settings}
    names = (None, "se", "scsa", "cat")
    assert grid == {(s, b, n) for s in (0.3, 0.15) for b in (1.0, 0.15) for n in names}
    assert len(c.rows) == 16 and {r.position for r in c.rows} == {"", "before the addition"}


# ---- rows


def test_rows_have_names_and_positions():
    c = co.compare("cifar100", results=[])
    assert [r.label for r in c.rows[:3]] == ["no attention", "SE", "ECA"]
    assert [r.position for r in c.rows[:2]] == ["", "before the addition"]
    assert c.rows[-1].position == "before the last convolution"
    labels = [r.label for r in co.compare("cat-ablation", results=[]).rows]
    assert labels[0] == "no attention" and labels[1] == "+ channel" and len(set(labels)) == 11
    default = co.Row("SCSA", configure(attention="scsa"), (0,))
    assert default.position == "before the last convolution", "where its authors put it"


def test_runs_are_gathered_by_everything_but_the_seed():
    found = results_of("cifar100", {0: 28.0, 1: 25.0}, seeds=(2, 0))
    stranger = result(configure(preset="cpu", network="resnet8", epochs=5), 90.0)
    c = co.compare("cifar100", results=[*found, stranger])
    assert c.rows[0].by_seed("top1") == {0: 28.0, 2: 27.6}
    assert [r.missing for r in c.rows[:3]] == [[1], [1], [0, 1, 2]]
    assert len(c.runs) == 4 and c.rows[2].summary("top1") is None


def test_a_seed_beyond_the_plan_counts():
    c = co.compare("cifar100", results=results_of("cifar100", {0: 28.0}, seeds=(0, 3)))
    assert c.rows[0].summary("top1").n == 2 and c.rows[0].missing == [1, 2]
    assert co.measured(c.rows[0], "top1")[2] == "2 of 4"


def test_an_unknown_experiment_is_named():
    with pytest.raises(ConfigError, match="cifar100"):
        co.compare("cifar10")


# ---- differences


def compared(base, se, name="bccd"):
    "Baseline and SE of an experiment with given values by seed."
    rows = co.compare(name, results=[]).rows
    found = [result(rows[i].config, v, s) for i, values in ((0, base), (1, se)) for s, v in values.items()]
    c = co.compare(name, results=found)
    return c, c.rows[1]


def test_differences_are_taken_seed_by_seed():
    # 3.0, 3.1, 3.0: the mean is 3.0333 and the interval 4.303 * 0.0577 / sqrt(3) to either side
    c, se = compared({0: 10.0, 1: 12.0, 2: 11.0}, {2: 14.0, 1: 15.1, 0: 13.0})
    d = c.differences[se].summary
    assert (d.n, round(d.mean, 4), round(d.high - d.mean, 4)) == (3, 3.0333, 0.1434)
    assert c.rows[0] not in c.differences and c.differences[se].reading == "above"


def test_only_seeds_that_both_have_are_compared():
    c, se = compared({0: 10.0, 1: 12.0}, {1: 15.0, 2: 90.0})
    d = c.differences[se]
    assert (d.summary.n, d.summary.mean, d.p) == (1, 3.0, None) and d.reading == "one pair"
    c, se = compared({0: 10.0}, {1: 15.0})
    assert c.differences[se] == (None, None) and c.differences[se].reading == "not run"


@pytest.mark.parametrize(
    ("differences", "said"),
    [([1.0, 1.1, 0.9], "above"), ([-1.0, -1.1, -0.9], "below"), ([1.0, -1.1, 0.9], "not distinguishable")],
)
def test_the_reading_of_one_comparison_is_that_of_its_interval(differences, said):
    d = co.differences({"only": (dict(enumerate(differences)), dict.fromkeys(range(3), 0.0))})["only"]
    assert d.reading == said and d.p == pytest.approx(stats.ttest_1samp(differences, 0).pvalue)


def test_a_baseline_is_that_of_the_own_setting():
    c = co.compare("scenes-size-brightness", results=[])
    for row in c.rows:
        base = c.baseline(row)
        assert base.config.attention is None and base.config.data_options == row.config.data_options
    assert len({c.baseline(row).config.id for row in c.rows}) == 4


def test_where_no_row_is_plain_the_first_is_the_baseline():
    c = co.compare("scsa-ablation", results=[])
    assert {c.baseline(row).label for row in c.rows} == {"scsa"}


def test_a_setting_without_a_plain_row_has_no_baseline():
    rows = co.compare("scenes-size-brightness", results=[]).rows
    c = co.Comparison("x", "x", (rows[0], rows[5]))
    assert c.baseline(rows[5]) is None and rows[5] not in c.differences
    assert co.difference_columns(c, rows[5])[0] == "no baseline"


def test_a_gain_is_compared_with_the_plain_network():
    c = co.compare("gain", results=[])
    zero = [row for row in c.rows if row.config.network_options]
    assert {c.baseline(row).label for row in c.rows if row not in zero} == {"no attention"}
    assert [c.baseline(row) for row in zero] == [zero[0]] * 2, "begins at zero, too"
    assert len(c.differences) == len(c.rows) - 2


@pytest.mark.parametrize("name", ["gain", "gain-resnet20", "gain-duration"])
def test_a_gain_is_the_initial_one_of_the_registry_divided_out(name):
    found = {row.label: row.config for row in co.compare(name, results=[]).rows if row.config.gain != 1}
    for label, config in found.items():
        if config.attention:
            stated = registry.INITIAL_GAINS[config.attention]
            assert label == f"{config.attention.upper()} / {stated:g}" and f"plain × {stated:g}" in found
            assert config.gain * stated == pytest.approx(1, abs=0.025)
        else:
            assert label == f"plain × {config.gain:g}"


def test_committed_results_keep_their_ids():
    paths = list((ROOT / "nbs/results/cpu").glob("*.json"))
    assert len(paths) > 200
    for path in paths:
        stored = RunResult.model_validate_json(path.read_text("utf-8"))
        given = {name: value for name, value in stored.config.model_dump().items() if value is not None}
        assert configure(**given).id == stored.id == path.stem


def test_a_family_is_corrected_for_all_planned_comparisons():
    # differences 1.0, 1.1, 1.2: t = 1.1 / (0.1 / sqrt(3)) = 19.05, p = 0.00274
    c, se = compared({0: 10.0, 1: 12.0, 2: 11.0}, {0: 11.0, 1: 13.1, 2: 12.2})
    assert len(c.differences) == 3, "planned, not finished"
    assert c.differences[se].p == pytest.approx(3 * 2 * stats.t.sf(1.1 / (0.1 / 3**0.5), 2))
    assert c.differences[se].reading == "above"
    # 0.9, 1.7, 1.3: its own interval excludes zero, and three comparisons are too many for it
    c, se = compared({0: 10.0, 1: 12.0, 2: 11.0}, {0: 10.9, 1: 13.7, 2: 12.3})
    d = c.differences[se]
    assert d.summary.low > 0 and d.p > 0.05 and d.reading == co.UNCLEAR
    alone = co.differences({"se": (se.by_seed("AP"), c.rows[0].by_seed("AP"))})["se"]
    assert alone.reading == "above", "as the only comparison it is distinguishable"


def test_nothing_is_emphasised_that_is_not_distinguishable():
    c, se = compared({0: 10.0, 1: 12.0, 2: 11.0}, {0: 10.9, 1: 13.7, 2: 12.3})
    assert "unmeasured" in co.mark(c.differences[se])
    (axis,) = co.show_differences(c)[0]
    assert {line.get_color() for line in axis.lines if line.get_marker() == "|"} == {"gray"}
    a = contrasts.shown(c.differences[se])
    assert "<strong>" not in a and "+1.30" in a
    c, se = compared({0: 10.0, 1: 12.0, 2: 11.0}, {0: 11.0, 1: 13.1, 2: 12.2})
    (axis,) = co.show_differences(c)[0]
    assert {line.get_color() for line in axis.lines if line.get_marker() == "|"} == {"C1"}
    assert "<strong>−1.10</strong>" in contrasts.shown(c.differences[se], -1)
    plt.close("all")


# ---- power


def test_the_spread_is_pooled_over_comparisons():
    zero = dict.fromkeys(range(3), 0.0)
    values = {"a": {0: 1.0, 1: 2.0, 2: 3.0}, "b": {0: 5.0, 1: 8.0}, "c": {0: 4.0}, "d": {}}
    family = co.differences({key: (of_key, zero) for key, of_key in values.items()})
    assert co.pooled_std(family.values()) == pytest.approx(((2 * 1 + 1 * 4.5) / 3) ** 0.5)
    found = co.detectable(family)
    assert found[3] == pytest.approx(smallest_difference(co.pooled_std(family.values()), 3, alpha=0.05 / 4))
    assert list(found) == [3, 5, 10] and found[3] > found[5] > found[10]
    assert f"{found[10]:.1f} points with 10 seeds" in co.power_sentence(family)


def test_without_pairs_the_power_is_not_known():
    family = co.compare("bccd", results=results_of("bccd", {0: 20.0, 1: 21.0}, (0,))).differences
    assert co.detectable(family) == {} and "not known" in co.power_sentence(family)


# ---- contrasts


def test_contrasts_are_all_pairs_of_mechanisms_in_one_family():
    c = co.compare("cifar100", results=results_of("cifar100", {9: 28.0, 15: 30.0, 16: 30.5}))
    rows = co.panels(c)["before the last convolution"]
    found = contrasts.contrasts(c, rows)
    assert len(found) == 8 * 7 / 2
    first = [(a.label, b.label) for a, b in found][:6]
    assert {frozenset(pair) for pair in first} == {
        frozenset(pair) for pair in combinations(("SCSA", "CAT", "SE", "CBAM"), 2)
    }
    by_name = {(a.label, b.label): d for (a, b), d in found.items()}
    d = by_name["SCSA", "SE"]
    assert d.summary.mean == pytest.approx(2.5) and d.reading == "above"
    assert by_name["SCSA", "ECA"].reading == "not run"
    said = contrasts.contrast_sentence(found)
    assert said == (
        "Of 28 contrasts, 3 are distinguishable from zero (SCSA is above CAT, SCSA is above SE and "
        "CAT is above SE); 25 have fewer than two pairs of runs."
    )
    matrix = entries(contrasts.contrast_matrix(found, "x"))
    assert [row[0] for row in matrix][:4] == ["SCSA", "CAT", "SE", "CBAM"]
    assert matrix[0][3].startswith("+2.50") and matrix[2][1].startswith("−2.50") and matrix[0][1] == ""
    axis = contrasts.show_contrasts(found, c.metric)
    assert axis.get_yticklabels()[1].get_text() == "SCSA − SE" and len(axis.get_yticklabels()) == 28
    plt.close("all")


# ---- curves and equal time


def test_a_curve_has_the_mean_and_the_range_over_seeds():
    c = co.compare("cifar100", results=results_of("cifar100", {0: 28.0, 9: 29.0}))
    assert curves.by_epoch(c.rows[0], "top1") == {1: [23.0, 23.5, 22.6], 2: [28.0, 28.5, 27.6]}
    left, right = curves.show_curves(c)
    assert [len(axis.lines) for axis in (left, right)] == [1, 2]
    assert list(right.lines[0].get_ydata()) == pytest.approx([69.1 / 3, 84.1 / 3])
    assert right.lines[0].get_color() == "black" and len(right.collections) == 2
    band = right.collections[0].get_paths()[0].vertices[:, 1]
    assert (band.min(), band.max()) == (22.6, 28.5)
    plt.close("all")


def times_of(c, ratios):
    "Step times in which the rows at some indices have these ratios to the first."
    same = Spread(low=1.0, median=1.0, high=1.0)
    rows = {
        digest(c.rows[i].config): steps.RowTime(
            label="", step=same, ratio=Spread(low=ratio, median=ratio, high=ratio)
        )
        for i, ratio in ratios.items()
    }  # fmt: skip
    machine, code = Machine(device="cpu", devices=1, threads=1, versions={}), Code(commit=None, dirty=None)
    return steps.StepTimes(
        experiment=c.name, rounds=1, rows=rows, noise=same, machine=machine, code=code,
        measured=datetime(2026, 1, 1, tzinfo=timezone.utc), seconds=1.0,
    )  # fmt: skip


@pytest.mark.parametrize(("ratio", "mean"), [(1.5, -3.0), (0.8, 2.0), (2.5, None), (None, None)])
def test_equal_time_takes_the_epochs_that_fit(ratio, mean):
    [plain], [slow] = (results_of("cifar100", {i: v}, (0,)) for i, v in ((0, 28.0), (9, 30.0)))
    se = co.compare("cifar100", results=[plain, slow]).rows[9]
    assert [curves.after(se, "top1", n) for n in (0, 1, 2, 3)] == [{}, {0: 25.0}, {0: 30.0}, {}]
    base = co.compare("cifar100", results=[plain]).rows[0]
    base, short = (replace(r, config=r.config.model_copy(update={"epochs": 2})) for r in (base, se))
    c = co.Comparison("x", "x", (base, short))
    assert c.differences[short].summary.mean == 2.0
    found = curves.at_equal_time(c, times_of(c, {0: 1.0} | ({1: ratio} if ratio else {})))[short]
    # two epochs of the plain network are one of a row that takes 1.5 times as long, and none of 2.5 times
    assert (found.summary and found.summary.mean) == mean
    assert found.reading == ("one pair" if mean else "not run")


# ---- time of a training step


def small_rows():
    "Two rows of the embedded sample with batches of eight images."
    rows = [{"batch_size": 8}, {"batch_size": 8, "attention": "se", "position": "before_add"}]
    configs = [configure("sample", **row) for row in rows]
    return co.Comparison("tiny", "tiny", tuple(co.Row(co.label_of(c), c, (0,)) for c in configs))


def test_a_step_trains_the_network_of_its_run():
    config = small_rows().rows[1].config
    x, labels = steps.random_batch(config)
    assert (tuple(x.shape), x.dtype, labels.max() < 10) == ((8, 1, 28, 28), torch.uint8, True)
    torch.manual_seed(0)
    step = steps.step_of(config)
    losses = [step().item() for _ in range(6)]
    assert losses[-1] < losses[0], "it learns the labels of its one batch"
    with pytest.raises(ValueError, match="task='detect': only steps of the task classify"):
        steps.step_of(configure("sample", task="detect"))
    photographs = configure("cpu", dataset="folder:x", data_options={"size": 112}, batch_size=2)
    assert steps.random_batch(photographs)[0].shape == (2, 3, 112, 112)


def test_steps_are_timed_in_turns_and_compared_within_a_round(monkeypatch, tmp_path):
    c = small_rows()
    taken = {c.rows[0]: [1.0, 10.0, 2.0], c.rows[1]: [2.0, 15.0, 6.0], "again": [1.0, 12.0, 2.0]}
    asked = []

    def turns(runs, device, budget, clock):
        asked.append((list(runs), device.type, budget, clock))
        return taken

    monkeypatch.setattr(steps, "take_turns", turns)
    found = steps.step_times(c, 7.0)
    assert asked == [([*c.rows, "again"], "cpu", 7.0, time.process_time)]
    assert (found.experiment, found.rounds) == ("tiny", 3)
    assert [found.ratio(row.config) for row in c.rows] == [1.0, 2.0]
    assert found.ratio(c.rows[0].config.model_copy(update={"seed": 7})) == 1.0, "of any seed"
    assert found.ratio(configure("sample", attention="cbam")) is None
    assert (found.noise.low, found.noise.median, found.noise.high) == (1.0, 1.0, 1.2)
    with pytest.raises(FileNotFoundError, match="`scsa-book bench steps tiny` measures tiny"):
        steps.load_steps("tiny", tmp_path)
    steps.steps_path("tiny", tmp_path).write_text(found.model_dump_json())
    assert steps.load_steps("tiny", tmp_path) == found


def test_the_rows_of_the_equal_time_control_are_measured():
    for name in ("cifar100-resnet20", "controls"):
        found, c = steps.load_steps(name), co.compare(name, results=[])
        assert [found.ratio(row.config) for row in c.rows].count(None) == 0, f"scsa-book bench steps {name}"
        assert found.ratio(c.rows[0].config) == 1 and abs(found.noise.median - 1) < 0.05
        assert found.machine.threads == 1 and found.code.dirty is False


# ---- claims


def claim_of(source, table, other, dataset="imagenet1k"):
    found = [c for c in claims.claims(source) if (c.own.table, c.own.dataset) == (table, dataset)]
    return next(c for c in found if c.other.method == other)


def test_claims_are_the_printed_differences_of_the_own_mechanism():
    scsa, cat = claim_of("scsa", "IV", "se"), claim_of("cat", "3", "eca", "cifar100")
    assert scsa.printed == pytest.approx(77.49 - 77.23) and scsa.words == "SCSA is above SE"
    assert cat.own.metric == "top1_error" and cat.printed == pytest.approx(cat.other.number - cat.own.number)
    assert cat.words == "CAT is below ECA", "its error is larger"
    every = claims.claims()
    assert len(set(every)) == len(every) and {c.own.source for c in every} == {"scsa", "sanet", "cat"}
    tables_of = {(c.own.source, c.own.table) for c in every}
    assert tables_of == set(tables()) - {("scsa", "III"), ("sanet", "1"), ("cat", "6")}, "all but ablations"
    for c in every:
        for column in ("source", "table", "dataset", "framework", "backbone", "metric"):
            assert getattr(c.own, column) == getattr(c.other, column)


def test_a_claim_is_compared_at_the_position_of_its_own_mechanism():
    c = co.compare("cifar100", results=[])
    for source, number, other, where in (
        ("scsa", "IV", "se", "before_last_conv"), ("sanet", "2", "se", "before_add"),
    ):  # fmt: skip
        mine, its = claims.pair_of(c, claim_of(source, number, other))
        assert mine.config.position == its.config.position == where and its.config.attention == other
        assert claims.pair_of(c, claim_of(source, number, "baseline"))[1].config.attention is None
    assert claims.pair_of(c, claim_of("scsa", "IV", "fca")) is None, "it is not planned"
    only = claims.pair_of(co.compare("bccd", results=[]), claim_of("scsa", "V", "se", "coco2017"))
    assert {row.config.position for row in only} == {"before_add"}, "the only one there is"


@pytest.mark.parametrize(
    ("name", "where"),
    [("bccd", "before_add"), ("camvid", "before_add")]
    + [("bccd-trained", "before_last_conv"), ("camvid-trained", "before_last_conv")],
)
def test_detection_and_segmentation_have_claims_at_both_positions(name, where):
    found = claims.all_outcomes(results=[])[name]
    assert {row.config.position for o in found for row in o.rows if row.config.attention} == {where}
    assert {o.claim.own.source for o in found} >= {"scsa"}
    page = "".join("".join(cell["source"]) for cell in cells_of(ROOT / "nbs/results/claims.ipynb", "code"))
    assert f'section("{name}")' in page


@pytest.mark.parametrize(("scsa", "said"), [(31.0, "holds"), (27.0, "opposite"), (None, "not run")])
def test_the_verdict_of_a_claim_needs_the_printed_sign(scsa, said):
    values = {0: 28.0, 9: 29.0} | ({16: scsa} if scsa else {})
    c = co.compare("cifar100", results=results_of("cifar100", values))
    found = claims.outcomes(c, [claim_of("scsa", "IV", name) for name in ("baseline", "se")])
    assert [o.verdict for o in found] == [said, said]
    assert claims.tally(found).startswith("Of 2 comparisons with a printed difference 2 ")


def test_the_seeds_that_would_decide_a_claim_have_the_power():
    n = claims.seeds_needed(1.0, 0.5, 4)
    enough, less = (smallest_difference(1.0, k, alpha=0.05 / 4) for k in (n, n - 1))
    assert enough <= 0.5 < less
    assert claims.seeds_needed(None, 0.5, 4) is None and claims.seeds_needed(1.0, 0.001, 4) is None
    wobble = [{0: 28.0, 1: 28.4, 2: 28.8}, {0: 29.1, 1: 28.9, 2: 30.0}]
    rows = [co.compare("cifar100", results=[]).rows[i].config for i in (0, 16)]
    found = [result(row, v, s) for row, some in zip(rows, wobble, strict=True) for s, v in some.items()]
    [o] = claims.outcomes(co.compare("cifar100", results=found), [claim_of("scsa", "IV", "baseline")])
    assert o.verdict == co.UNCLEAR
    assert o.seeds == claims.seeds_needed(o.difference.summary.std, 1.1, 1)
    assert o.hours == pytest.approx(o.seeds * 2 * 61 / 3600)


def test_every_experiment_with_claims_has_some():
    found = claims.all_outcomes(results=[])
    assert {name: bool(some) for name, some in found.items()} == dict.fromkeys(claims.EXPERIMENTS, True)
    assert {o.verdict for some in found.values() for o in some} == {"not run"}


# ---- runs beside printed accuracies


def beside(results, method):
    "Status and note of the ledger for an accuracy of SCSA's Table IV on a ResNet-50."
    where = {"method": method, "backbone": "resnet50", "metric": "top1"}
    [row] = ledger.rows("scsa", "IV", results=results, **where)
    return row.status, row.note


def test_the_ledger_takes_runs_with_the_options_of_narrow_networks():
    rows = {(r.label, r.position): r.config for r in co.compare("cifar100-resnet20", results=[]).rows}
    se = rows["SE", "before the addition"]
    assert se.options == {"reduction": 4}, "not the table's"
    status, note = beside([result(se, 55.0)], "se")
    assert status == "other_scale" and "resnet20, 10 epochs" in note
    elsewhere = rows["SE", "before the last convolution"]
    assert beside([result(elsewhere, 55.0)], "se")[0] == "unmeasured"
    gained = se.model_copy(update={"gain": 2.0})
    assert beside([result(gained, 55.0)], "se")[0] == "unmeasured"


def test_a_plain_network_of_a_control_is_shown_only_where_there_is_no_other():
    plain, _, longer = (r.config for r in co.compare("controls", results=[]).rows)
    se = co.compare("cifar100-resnet20", results=[]).rows[1].config
    found = [result(c, 55.0) for c in (longer, plain, se)]
    assert "10 epochs" in beside(found, "baseline")[1]
    assert "15 epochs" in beside(found[:1], "baseline")[1]


# ---- what is shown


def test_progress_counts_what_is_missing():
    none = co.compare("bccd", results=[])
    assert co.progress(none) == (
        "**None of the 12 planned runs has finished here:** `scsa-book sweep bccd` makes them."
    )
    some = co.compare("bccd", results=[*results_of("bccd", {0: 20.0}), *results_of("bccd", {1: 20.0}, (1,))])
    assert co.progress(some).startswith("**8 of 12 planned runs are missing** (1 of 4 rows have all")
    full = co.compare("bccd", results=results_of("bccd", dict.fromkeys(range(4), 20.0)))
    assert co.progress(full) == "All 12 planned runs have finished."


def test_what_was_spent():
    assert "nothing was spent" in co.spent([])
    runs = results_of("bccd", {0: 20.0, 1: 21.0})
    assert co.spent(runs) == ("6 runs, 0:06:06 (h:mm:ss), 576,000 training images seen; on a processor × 1.")
    other = runs[0].model_copy(update={"machine": runs[0].machine.model_copy(update={"device": "another"})})
    assert co.spent([*runs, other]).endswith(f"; on a processor × 1 and another × 1. {co.SEVERAL}")
    steps = result(configure(task="detect", preset="cpu", epoch_steps=10), 20.0)
    assert co.images_seen(steps) == 12 * 10 * 4
    assert co.spent([steps]).startswith("1 run, 0:01:01")


def entries(table):
    body = re.search(r"<tbody>(.*)</tbody>", table, re.S)[1]
    lines = re.findall(r"<tr>(.*?)</tr>", body, re.S)
    rows = [re.findall(r"<t[hd][^>]*>(.*?)</t[hd]>", line) for line in lines]
    assert len(set(map(len, rows))) == 1
    return [[re.sub("<[^>]*>", "", entry.replace("<br>", " | ")) for entry in row] for row in rows]


def test_the_table_has_a_line_for_every_row_of_the_plan():
    c, _ = compared({0: 10.0, 1: 12.0, 2: 11.0}, {0: 13.0, 1: 15.1, 2: 14.0})
    base, se, scsa, _ = entries(co.comparison_table(c))
    assert base[:4] == ["no attention", "baseline", "", ""]
    assert base[4:] == ["11.00 | 8.52 to 13.48", "1.00", "3 of 3", "77,000"]
    assert se[1:4] == ["above", "+3.03 | +2.89 to +3.18", "&lt; 0.001"]
    assert scsa == ["SCSA", "not run", "", "", "", "", "0 of 3", ""]
    words, numbers = {"Data": lambda r: r.config.dataset}, {"n": lambda r: len(r.runs)}
    wide = co.comparison_table(c, words=words, numbers=numbers)
    assert entries(wide)[0][1:3] == ["baseline", "bccd"] and entries(wide)[0][-1] == "3"
    assert "AP, %" in wide
    below, row = compared({0: 10.0, 1: 12.0}, {0: 9.0, 1: 11.0})
    assert entries(co.comparison_table(below, [row]))[0][2] == "−1.00 | −1.00 to −1.00"


def test_a_sentence_says_no_more_than_the_verdicts():
    assert co.sentence(co.compare("bccd", results=[])) == "There is no conclusion yet."
    found = results_of("bccd", {0: 20.0, 1: 22.0, 2: 18.0})
    unsure = co.compare("bccd", results=[]).rows[3].config
    found += [result(unsure, 20 + x, s) for s, x in enumerate((3.0, -3.0, 0.1))]
    assert co.sentence(co.compare("bccd", results=found)) == (
        "On this test split, with this recipe: SE is above the plain network; SCSA is below the plain "
        "network; these runs do not distinguish CAT from the plain network."
    )
    ablation = co.compare("scsa-ablation", results=results_of("scsa-ablation", {0: 30.0, 1: 28.0, 2: 28.0}))
    assert co.sentence(ablation).endswith("recipe: without-smsa and without-pcsa are below scsa.")


def test_a_verdict_has_its_position_beside_it():
    said = {name: co.position_sentence(co.compare(name, results=[])) for name in ("bccd", "camvid-trained")}
    assert said["bccd"] == (
        "Every mechanism is before the addition here; "
        "the authors of SCSA have it before the last convolution."
    )
    assert said["camvid-trained"] == (
        "Every mechanism is before the last convolution here; "
        "the authors of SE, SA and CAT have it before the addition."
    )
    with pytest.raises(ValueError, match="cifar100 has mechanisms at 2 positions"):
        co.position_sentence(co.compare("cifar100", results=[]))


@pytest.mark.parametrize(
    ("page", "where", "many"),
    [("scenes", "before the addition", 12 + 3 + 3), ("scenes-trained", "before the last convolution", 8)],
)
def test_the_pages_of_scenes_have_the_position_in_every_row(show, page, where, many):
    rows = [row for shown in re.findall(r"<table>.*?</table>", show(page), re.S) for row in entries(shown)]
    assert [row[2] for row in rows if len(row) > 5].count(where) == many


def test_panels_are_positions():
    shown = co.panels(co.compare("cifar100", results=[]))
    assert list(shown) == ["before the addition", "before the last convolution"]
    assert all(len(rows) == 9 and rows[0].label == "no attention" for rows in shown.values())
    assert list(co.panels(co.compare("bccd", results=[]))) == [""]


def test_an_axis_reaches_over_all_but_intervals_of_two_runs():
    three, two = summarise([1.0, 2.0, 3.0]), summarise([1.0, 2.0])
    low, high = co.axis_limits([([1.0, 2.0, 3.0], three), ([1.0, 2.0], two)])
    assert low < three.low and three.high < high < two.high
    assert co.axis_limits([]) is None and co.axis_limits([((), summarise([5.0]))], [0])[0] < 0


def test_figures_show_every_run_and_the_line_at_zero():
    c = co.compare("cifar100", results=results_of("cifar100", {0: 28.0, 1: 25.0, 9: 27.0}))
    left, right = co.show_values(c)[0]
    assert [len(line.get_xdata()) for line in left.lines if line.get_marker() == "o"] == [3, 3]
    assert [t.get_text() for t in right.get_yticklabels()][:2] == ["no attention", "SE"]
    axes = co.show_differences(c)[0]
    assert [t.get_text() for t in axes[0].get_yticklabels()][0] == "SE"
    means = [line.get_xdata()[0] for line in axes[0].lines if line.get_marker() == "|"]
    assert means == pytest.approx([-3.0])
    zero = [line for axis in axes for line in axis.lines if list(line.get_xdata()) == [0, 0]]
    low, high = axes[0].get_xlim()
    assert len(zero) == 2 and low < -3 and 0 < high
    plt.close("all")


# ---- pages


@pytest.fixture
def show(tmp_path, monkeypatch):
    "Runs the cells of a page in a book that has the data, the list of experiments and some results."
    (tmp_path / "_quarto.yml").touch()
    (tmp_path / "data").symlink_to(ROOT / "data")
    (tmp_path / "nbs/results").mkdir(parents=True)
    for folder in ("speed", "see"):
        (tmp_path / "nbs/results" / folder).symlink_to(ROOT / "nbs/results" / folder)
    (tmp_path / "nbs/runs").mkdir()
    listed = ROOT / "nbs/runs/experiments.yml"
    (tmp_path / "nbs/runs/experiments.yml").write_bytes(listed.read_bytes())
    monkeypatch.chdir(tmp_path / "nbs/results")

    def run(page, results=()):
        for r in results:
            path = tmp_path / "nbs/results" / r.config.preset / f"{r.id}.json"
            path.parent.mkdir(exist_ok=True)
            path.write_text(r.model_dump_json(), encoding="utf-8")
        names, shown = {}, []
        for cell in cells_of(ROOT / f"nbs/results/{page}.ipynb", "code"):
            if not repository.is_setup(cell):
                tree = ast.parse("".join(cell["source"]))
                last = tree.body.pop() if isinstance(tree.body[-1], ast.Expr) else None
                exec(compile(tree, page, "exec"), names)
                value = last and eval(compile(ast.Expression(last.value), page, "eval"), names)
                shown.append(str(getattr(value, "data", value)))
        return "\n".join(shown)

    yield run
    plt.close("all")


@pytest.mark.parametrize("page", PAGES)
def test_pages_say_that_nothing_has_run(show, page):
    shown = show(page)
    readings = ("above", "below", "not distinguishable")
    assert not any(f"{reading}</span>" in shown for reading in readings)
    if page == "report":
        assert "`scsa-book sweep cifar100`: 51 runs are missing." in shown and "251 are reproduced" in shown
    else:
        assert "**None of the" in shown and "nothing was spent" in shown


def test_the_page_of_claims_lists_each_with_its_cell(show):
    shown = show("claims", results_of("cifar100-resnet20", {0: 54.0, 8: 55.0}))
    [table] = re.findall(r'aria-label="Claims and the runs of Nine networks on.*?</table>', shown, re.S)
    first = entries(table)[0]
    assert first[:2] == ["SCSA is above the plain network", "holds"] and first[2].startswith("+1.00 | ")
    assert first[3:] == ["2 seeds, 0.1 h", "SCSA, Table IV, imagenet1k", "+1.10"]
    assert "1 hold here" in shown and "SCSA is above FCA (Table IV, imagenet1k)" in shown


def test_the_page_of_controls_compares_with_the_larger_network(show):
    found = results_of("controls", {0: 54.0, 1: 56.0}) + results_of("cifar100-resnet20", {8: 55.0})
    shown = show("controls", found)
    size = entries(
        re.search(r'aria-label="Every network minus the plain network of width 17.*?</table>', shown, re.S)[0]
    )
    by_name = {row[0]: row for row in size}
    assert by_name["SCSA, before the last convolution"][2].startswith("−1.00")
    assert by_name["no attention"][1] == "below" and by_name["no attention"][2].startswith("−2.00")
    caption = 'aria-label="Every mechanism minus the plain network, at equal training time'
    equal = entries(re.search(rf"{caption}.*?</table>", shown, re.S)[0])
    c, times = co.compare("cifar100-resnet20"), steps.load_steps("cifar100-resnet20")
    assert [row[-1] for row in equal] == [f"{times.ratio(row.config):.2f}" for row in c.rows[1:]]


def test_the_page_of_the_gain_says_what_the_factor_alone_costs(show):
    shown = show("gain", results_of("gain", {0: 28.0, 1: 12.0, 2: 17.0, 3: 31.0}))
    assert (
        "**SCSA** is 11.0 points below the plain network; the factor 0.14 alone costs 16.0, and "
        "with its gain divided out the mechanism is 3.0 above." in shown
    )
    assert "**CA**: a control has no run yet." in shown


def test_the_page_of_cifar100_with_some_results(show):
    shown = show("cifar100", results_of("cifar100", {0: 28.0, 1: 25.0, 16: 28.5}, (0, 1)))
    assert "**45 of 51 planned runs are missing**" in shown and "6 runs, 0:06:06" in shown
    assert "16 comparisons are planned and 2 have an interval" in shown and "not known" not in shown
    assert "**Before the last convolution.** On this test split" in shown


def test_the_page_of_ablations_with_some_results(show):
    shown = show("ablations", results_of("scsa-ablation", {0: 30.0, 1: 28.0}))
    assert "without-smsa is below scsa." in shown and "77.49" in shown and "−0.77" in shown
    assert "**33 of 39 planned runs are missing**" in shown and "**None of the 33" in shown


def test_the_page_of_scenes_shows_differences_of_differences(show):
    # SE adds 1 in large bright scenes (rows 0, 1) and 3 in small dark ones (rows 12, 13); no others were run.
    name = "scenes-size-brightness"
    found = results_of(name, {0: 20.0, 1: 21.0, 12: 5.0, 13: 8.0})
    wobble = [result(r.config, r.final["AP"] + 0.01 * r.config.seed, r.config.seed) for r in found[3:6]]
    shown = show("scenes", [*found[:3], *wobble, *found[6:]])
    more = entries(re.search(r'aria-label="Gain in difficult.*?</table>', shown, re.S)[0])
    assert [row[1] for row in more].count("not run") == 8
    [line] = [row for row in more if row[1] != "not run"]
    assert line[:3] == ["SE", "above", "small and dark"] and line[3].startswith("+1.99")


def test_the_report_counts_what_is_there(show):
    shown = show("report", results_of("cifar100", {0: 28.0, 1: 25.0, 16: 28.5}))
    outcome = entries(re.search(r'aria-label="Experiments, and.*?</table>', shown, re.S)[0])
    [line] = [row for row in outcome if row[0] == "cifar100"]
    assert line[2:] == ["9 of 51", "16", "1", "1", ""]
    assert "65 have no pair of runs yet" in shown
    assert "cpu" in shown and "cifar100 (9 runs)" in shown
