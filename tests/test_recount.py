"""The recount: conventions, implementations, and every cost of the tables against independent counts."""

import re
import shutil
import subprocess
import sys
import time
from dataclasses import replace
from decimal import Decimal
from functools import partial
from pathlib import Path

import pytest
import torch
from conftest import ROOT
from test_cli import said
from torch import nn
from torch.nn import functional as F
from torchvision.models import get_model

from scsa_book.attention import registry
from scsa_book.evidence import implementations, ledger, recount
from scsa_book.evidence.conventions import CONVENTIONS, HOOKS, HOOKS_1D, HOOKS_OLD, THOP, TRACE
from scsa_book.evidence.cost import MATRIX, Convention, cost, parameters
from scsa_book.evidence.implementations import AVERAGE, CountedImplementation
from scsa_book.evidence.published import METRICS, Cell, cells
from scsa_book.networks.build import shapes_only
from scsa_book.networks.detection import build_detector, dense
from scsa_book.networks.placement import attentions

# ---- the counter


class Function(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, x):
        return self.function(x)


def macs(layer, size, convention):
    layer = layer if isinstance(layer, nn.Module) else Function(layer)
    return cost(layer, size, convention).macs


@pytest.mark.parametrize(
    ("layer", "count"),
    [
        (nn.Conv2d(4, 6, 3, bias=True), 6 * 36 * 6 * 10),
        (nn.BatchNorm2d(4), 2 * 4 * 96),
        (nn.GroupNorm(2, 4), 5 * 4 * 96),
        (nn.GroupNorm(2, 4, affine=False), 4 * 4 * 96),
        (nn.LayerNorm([8, 12]), 5 * 4 * 96),
        (nn.LayerNorm([8, 12], elementwise_affine=False), 4 * 4 * 96),
        (nn.AdaptiveAvgPool2d(1), 4 * 96),
        (nn.AdaptiveAvgPool2d((None, 1)), 4 * 96),
        (partial(F.adaptive_avg_pool2d, output_size=3), 4 * 96),
        (lambda x: x.mean((2, 3)), 0),
        (nn.AvgPool2d(2), 0),
        (nn.AdaptiveMaxPool2d(1), 0),
        (nn.ReLU(), 0),
        (nn.Upsample(scale_factor=2), 4 * 4 * 96),
        (partial(F.interpolate, size=(5, 7), mode="bilinear"), 4 * 4 * 35),
        (lambda x: x.flatten(2) @ x.flatten(2).mT, 4 * 96 * 4),
        (nn.Linear(12, 5), 5 * 12 * 32),
    ],
)
def test_what_the_trace_counts(layer, count):
    assert macs(layer, (4, 8, 12), TRACE) == count


@pytest.mark.parametrize(
    ("layer", "count"),
    [
        (nn.Conv2d(4, 6, 3, bias=False), 6 * 36 * 60),
        (nn.Conv2d(4, 6, 3, bias=True), 6 * 37 * 60),
        (nn.Conv2d(4, 4, 3, groups=4, bias=False), 4 * 9 * 60),
        (nn.Linear(12, 5), 5 * 12 * 32),
        (nn.BatchNorm2d(4), 2 * 4 * 96),
        (nn.GroupNorm(2, 4), 0),
        (nn.ReLU6(), 4 * 96),
        (F.relu, 0),
        (nn.AvgPool2d(2), 4 * 96),
        (nn.MaxPool2d(2), 4 * 96),
        (nn.AdaptiveMaxPool2d(1), 4 * 96),
        (partial(F.adaptive_avg_pool2d, output_size=1), 0),
        (nn.Upsample(scale_factor=2), 16 * 96),
        (lambda x: x.flatten(2) @ x.flatten(2).mT, 0),
        (nn.ConvTranspose2d(4, 6, 2, stride=2), 0),
    ],
)
def test_what_hooks_count(layer, count):
    assert macs(layer, (4, 8, 12), HOOKS) == count


def test_the_variants_of_the_hooks():
    along, back = nn.Conv1d(4, 6, 3, bias=False), nn.ConvTranspose2d(4, 6, 2, stride=2, bias=False)
    rows = Function(lambda x: along(x.flatten(2)))
    rows.along = along
    assert [macs(rows, (4, 8, 12), c) for c in (HOOKS, HOOKS_1D)] == [0, 6 * 12 * 94]
    assert macs(back, (4, 8, 12), HOOKS_OLD) == 4 * cost(back, (4, 8, 12)).macs


@pytest.mark.parametrize(
    ("layer", "count"),
    [
        (nn.Conv2d(4, 6, 3, bias=True), 6 * 4 * 10 * 60),
        (nn.Linear(12, 5), 5 * 23 * 32),
        (nn.BatchNorm2d(4), 4 * 4 * 96),
        (nn.AdaptiveAvgPool2d(2), 4 * 4 * 25),
        (nn.AdaptiveMaxPool2d(1), 0),
        (nn.MaxPool2d(2), 0),
    ],
)
def test_what_the_last_one_counts(layer, count):
    assert macs(layer, (4, 8, 12), THOP) == count


def test_a_layer_that_is_called_again():
    act = nn.ReLU()
    twice = nn.Sequential(act, nn.MaxPool2d(2), act)
    assert macs(twice, (4, 8, 12), HOOKS) == 4 * 96 + 4 * 96 + 4 * 24
    assert macs(twice, (4, 8, 12), THOP) == 4 * 24


def test_a_rule_holds_for_derived_classes():
    class Own(nn.ReLU):
        pass

    assert macs(Own(), (4, 8, 12), HOOKS) == 4 * 96
    own = Convention("", layers={nn.ReLU: lambda *_: 1, Own: lambda *_: 7}, matrix=False)
    assert macs(Own(), (4, 8, 12), own) == 7


def test_a_layer_that_is_called_by_keyword():
    class Named(nn.Sequential):
        def forward(self, x):
            return self[1](input=self[0](input=x))

    named = Named(nn.Conv2d(4, 6, 1), nn.BatchNorm2d(6))
    assert macs(named, (4, 8, 12), HOOKS) == 6 * 5 * 96 + 2 * 6 * 96


def test_no_hook_is_left_when_the_count_is_over():
    hooks = torch.nn.modules.module._global_forward_hooks
    before = dict(hooks)

    def fails(x):
        raise RuntimeError("no")

    with pytest.raises(ValueError, match="no"):
        cost(Function(fails), (1, 2, 2), HOOKS)
    assert dict(hooks) == before


def test_a_part_of_the_pass_counts_and_the_network_stays():
    network = nn.Sequential(nn.Conv2d(3, 4, 1, bias=False), nn.Conv2d(4, 5, 1, bias=False))

    def first(shadow, x):
        del shadow[1]
        return shadow(x)

    found = cost(network, (3, 6, 6), forward=first)
    assert found == (32, 32, 12 * 36) and len(network) == 2


def test_every_convention_has_a_name():
    assert list(CONVENTIONS) == ["matrix", "trace", "hooks", "hooks-1d", "hooks-old", "thop"]
    assert CONVENTIONS["matrix"] is MATRIX


@pytest.mark.parametrize("kind", ["faster_rcnn", "retinanet"])
def test_a_detector_needs_a_forward_to_count(kind):
    with shapes_only():
        detector = build_detector(kind, 80, backbone="resnet50")
    with pytest.raises(ValueError, match=r"forward= .* scsa_book\.networks\.detection\.dense"):
        cost(detector, (3, 128, 128))
    assert cost(detector, (3, 128, 128), forward=dense).macs > 10**9


def test_units():
    assert (TRACE.mega, TRACE.giga, THOP.mega, THOP.giga) == (10**6, 10**9, 2**20, 2**30)


def test_a_detector_is_counted_in_seconds():
    with shapes_only():
        detector = build_detector("mask_rcnn", 80, backbone="resnet101", layout="mmdet1")
    start = time.perf_counter()
    cost(detector, (3, 800, 1280), HOOKS_OLD, dense)
    assert time.perf_counter() - start < 10


# ---- baselines, counted once with other tools' rules on skeletons of our own, before any of this was written

BASELINES = {
    "resnet50": {"trace": 4.1115, "hooks": 4.1219, "thop": 3.858},
    "resnet101": {"trace": 7.8340, "hooks": 7.8495, "thop": 7.337},
}


@pytest.mark.parametrize("name", BASELINES)
def test_conventions_on_plain_networks(name):
    with shapes_only():
        network = get_model(name, weights=None)
    for convention, giga in BASELINES[name].items():
        c, last_digit = CONVENTIONS[convention], 1e-3 if convention == "thop" else 1e-4
        assert abs(cost(network, convention=c).macs / c.giga - giga) < 0.6 * last_digit


DETECTORS = {  # at 800x1152 and 800x1216
    ("faster_rcnn", "resnet50"): (187.555, 197.180),
    ("faster_rcnn", "resnet101"): (255.927, 269.351),
    ("cascade_rcnn", "resnet50"): (215.193, 224.818),
    ("retinanet", "resnet50"): (215.095, 227.070),
}


@pytest.mark.parametrize("kind", DETECTORS, ids="-".join)
def test_closed_forms_of_the_detectors(kind):
    name, backbone = kind
    with shapes_only():
        detector = build_detector(name, 80, backbone=backbone, layout="mmdet3")
    found = [round(cost(detector, (3, 800, w), TRACE, dense).macs / 1e9, 3) for w in (1152, 1216)]
    assert tuple(found) == DETECTORS[kind]


# ---- implementations

BARE = {  # parameters outside of layers: channels -> number
    "sa": lambda c: 4 * (c // 128),
    "sge": lambda c: 128,
    "cat": lambda c: 8,
}


def example_rows():
    "One row with attention for each form, the first of the tables."
    found = {}
    for cell in cells(added=True):
        if METRICS[cell.metric].sort == "cost" and (form := recount.form_of(cell)).attention:
            found.setdefault(form, recount.row_of(cell))
    return found


def test_every_form_is_the_form_of_some_cell():
    used = {recount.form_of(c) for c in ledger.costs()}
    assert [pattern for pattern, form in recount.FORMS.items() if form not in used] == []


@pytest.mark.parametrize("row", example_rows().values(), ids=recount.cell_key)
def test_an_implementation_has_the_parameters_of_the_mechanism(row):
    for module in attentions(recount.network_of(row)).values():
        with torch.device("meta"):
            calls = module.implementation(module.channels, 28, 28)
            layers = nn.ModuleList(layer for layer, _ in calls if isinstance(layer, nn.Module))
        name = recount.form_of(row).attention
        extra = BARE.get(name, lambda c: 0)(module.channels)
        if recount.form_of(row).implementation is recount.sa_with_norm:
            extra -= 2 * module.channels  # the norm that was fitted
        if recount.form_of(row).options.get("transform"):  # without scales
            extra = 0
        assert parameters(module) == parameters(layers) + extra


def test_an_implementation_returns_its_input():
    x = torch.rand(1, 256, 7, 9)
    assert CountedImplementation(implementations.ema)(x) is x


def test_an_implementation_adds_its_own_cost_and_no_more():
    [cell] = cells("scsa", "IV", backbone="resnet50", method="cpca", metric="flops_G")
    [plain] = cells("scsa", "IV", backbone="resnet50", method="baseline", metric="flops_G")
    blocks = [(3, 64, 56), (4, 128, 28), (6, 256, 14), (3, 512, 7)]
    one = CountedImplementation(partial(implementations.cpca, reduction=16))
    own = sum(n * cost(one, (c, side, side), TRACE).macs for n, c, side in blocks)
    assert recount.count(cell) - recount.count(plain) == own
    assert round(own / 1e6) == 759


def test_fca_pools_maps_of_another_size_than_its_cosines():
    fca = CountedImplementation(implementations.fca)
    at = {side: macs(fca, (512, side, side), TRACE) for side in (28, 56)}
    assert at == {28: 2 * 512 * 32, 56: 2 * 512 * 32 + 512 * 56 * 56}


# ---- the recount against counts made with the authors' own modules

COUNTS = {
    "scsa/IV/imagenet1k/resnet50/baseline": 25_557_032,
    "scsa/IV/imagenet1k/resnet50/eca": 25_557_080,
    "scsa/IV/imagenet1k/resnet50/se": 28_073_864,
    "scsa/IV/imagenet1k/resnet50/fca": 28_071_976,
    "scsa/IV/imagenet1k/resnet50/cpca": 27_394_836,
    "scsa/IV/imagenet1k/resnet50/cbam": 28_073_544,
    "scsa/IV/imagenet1k/resnet50/sa": 25_557_740,
    "scsa/IV/imagenet1k/resnet50/ela": 25_591_016,
    "scsa/IV/imagenet1k/resnet50/ca": 25_692_376,
    "scsa/IV/imagenet1k/resnet50/ema": 25_569_784,
    "scsa/IV/imagenet1k/resnet50/scsa": 25_617_448,
    "scsa/IV/imagenet1k/resnet101/baseline": 44_549_160,
    "scsa/IV/imagenet1k/resnet101/eca": 44_549_259,
    "scsa/IV/imagenet1k/resnet101/se": 49_296_392,
    "scsa/IV/imagenet1k/resnet101/fca": 49_292_328,
    "scsa/IV/imagenet1k/resnet101/cbam": 49_295_562,
    "scsa/IV/imagenet1k/resnet101/ca": 44_797_928,
    "scsa/IV/imagenet1k/resnet101/scsa": 44_679_208,
    "scsa/IV/imagenet1k/mobilenetv2/baseline": 3_504_872,
    "scsa/IV/imagenet1k/mobilenetv2/eca": 3_504_921,
    "scsa/IV/imagenet1k/mobilenetv2/cbam": 4_071_338,
    "scsa/IV/imagenet1k/mobilenetv2/scsa": 3_619_048,
    "sanet/2/imagenet1k/resnet50/se": 28_088_024,
    "sanet/2/imagenet1k/resnet50/cbam": 28_089_624,
    "sanet/2/imagenet1k/resnet50/sge": 25_559_080,
    "sanet/2/imagenet1k/resnet50/sa": 25_557_740,
    "sanet/2/imagenet1k/resnet101/se": 49_326_872,
    "sanet/2/imagenet1k/resnet101/cbam": 49_330_172,
    "sanet/2/imagenet1k/resnet101/sge": 44_553_384,
    "sanet/2/imagenet1k/resnet101/sa": 44_550_684,
    "sanet/3/coco2017/faster_rcnn/resnet50/baseline": 41_531_812,
    "sanet/3/coco2017/faster_rcnn/resnet101/baseline": 60_523_940,
    "sanet/3/coco2017/faster_rcnn/resnet101/sa": 60_525_428,
    "sanet/3/coco2017/mask_rcnn/resnet50/baseline": 44_175_349,
    "sanet/3/coco2017/mask_rcnn/resnet101/baseline": 63_167_477,
    "sanet/3/coco2017/retinanet/resnet50/baseline": 37_743_348,
    "sanet/3/coco2017/retinanet/resnet101/baseline": 56_735_476,
    "sanet/3/coco2017/retinanet/resnet101/sa": 56_736_964,
    "cat/3/cifar100/resnet50/baseline": 23_705_252,
    "cat/3/cifar100/resnet50/se": 26_220_196,
    "cat/3/cifar100/resnet50/cbam": 26_221_764,
    "cat/3/cifar100/resnet50/eca": 23_705_300,
    "cat/3/cifar100/resnet101/baseline": 42_697_380,
    "cat/3/cifar100/resnet101/se": 47_440_548,
    "cat/3/cifar100/resnet101/cbam": 47_443_782,
    "cat/3/cifar100/resnet101/eca": 42_697_479,
    "cat/3/cifar100/resnet101/cat": 47_445_663,
    "cat/3/cifar100/mobilenetv2/baseline": 2_369_380,
    "cat/3/cifar100/mobilenetv2/se": 2_397_796,
    "cat/3/cifar100/mobilenetv2/eca": 2_369_431,
    "cat/3/cifar100/shufflenetv2/baseline": 1_360_896,
    "cat/3/cifar100/shufflenetv2/se": 1_401_264,
    "cat/3/cifar100/shufflenetv2/eca": 1_360_944,
    "cat/4/imagenet1k/resnet50/se": 28_071_976,
    "cat/4/imagenet1k/resnet50/cbam": 28_073_544,
    "cat/4/imagenet1k/resnet101/se": 49_292_328,
    "cat/4/imagenet1k/resnet101/cbam": 49_295_562,
}


@pytest.mark.parametrize("row", COUNTS)
def test_parameters_as_with_the_authors_modules(row):
    assert ledger.stored()[f"{row}/params_M"].count == COUNTS[row]


# SCSA's tables I and V: what each network has, and what each mechanism adds to it
PLAIN = {
    "upernet": (64_098_518, 83_090_646),
    "faster_rcnn": (41_753_056, 60_745_184),
    "cascade_rcnn": (69_394_766, 88_386_894),
    "retinanet": (37_968_692, 56_960_820),
}
ADDED = {
    "baseline": (0, 0),
    "se": (2_516_832, 4_747_232),
    "fca": (2_514_944, 4_743_168),
    "cbam": (2_516_512, 4_746_402),
    "eca": (48, 99),
    "sa": (708, None),
    "ca": (135_344, 248_768),
    "cpca": (1_837_804, None),
    "scsa": (60_416, 130_048),
}


@pytest.mark.parametrize("framework", PLAIN)
def test_parameters_of_detectors_and_segmentation(framework):
    for cell in cells("scsa", framework=framework, metric="params_M"):
        i = ("resnet50", "resnet101").index(cell.backbone)
        expected = PLAIN[framework][i] + ADDED[cell.method][i]
        assert ledger.stored()[ledger.cell_key(cell)].count == expected, cell


FLOPS = {  # G to four digits, or as many as were written down
    "scsa/I/ade20k/upernet": {
        "resnet50": dict(baseline="1895.098", cpca="1926.81", sa="1895.67", fca="1895.33", scsa="1895.45"),
        "resnet101": dict(baseline="2050.681", cbam="2050.76", se="2050.69", fca="2051.06", scsa="2051.41"),
    },
    "scsa/IV/imagenet1k": {
        "resnet50": dict(
            baseline="4.1095", eca="4.1095", se="4.1120", fca="4.1120", cpca="4.8685", cbam="4.1159",
            sa="4.1233", ela="4.1108", ca="4.1117", ema="4.1833", scsa="4.1193",
        ),
        "resnet101": dict(
            baseline="7.8319", eca="7.8320", se="7.8367", fca="7.8367", cbam="7.8431",
            ca="7.8361", scsa="7.8522",
        ),
        "mobilenetv2": dict(baseline="0.3129", eca="0.3129"),
    },
    "sanet/2/imagenet1k": {
        "resnet50": dict(
            baseline="4.1219", se="4.1300", cbam="4.1394", sge="4.1274", eca="4.1274", sa="4.1247",
        ),
        "resnet101": dict(
            baseline="7.8495", se="7.8632", cbam="7.8786", sge="7.8584", eca="7.8584", sa="7.8540",
        ),
    },
    "sanet/3/coco2017/faster_rcnn": {
        "resnet50": dict(baseline="207.0692", se="207.1844", sa="207.3508"),
        "resnet101": dict(baseline="283.1422", se="283.3292", sa="283.5979"),
    },
    "sanet/3/coco2017/mask_rcnn": {
        "resnet50": dict(baseline="275.576", se="275.691", sa="275.857"),
        "resnet101": dict(baseline="351.649", se="351.836", sa="352.104"),
    },
    "sanet/3/coco2017/retinanet": {
        "resnet50": dict(baseline="239.3165", se="239.4317", sa="239.5981"),
        "resnet101": dict(baseline="315.3895", se="315.5765", sa="315.8451"),
    },
    "cat/3/cifar100": {
        "resnet50": dict(baseline="63.9866", se="64.0775", cbam="64.1900", eca="64.0750", cat="64.2034"),
        "resnet101": dict(
            baseline="123.5733", se="123.7209", cbam="123.8955", eca="123.7163", cat="123.9137",
        ),
        "mobilenetv2": dict(baseline="2.4244", se="2.4273", cbam="2.4396", eca="2.4273", cat="2.4443"),
        "shufflenetv2": dict(baseline="2.2288", se="2.2354", cbam="2.2497", eca="2.2354", cat="2.2536"),
    },
    "cat/4/imagenet1k": {
        "resnet50": dict(baseline="3.858", se="3.8675", eca="3.8628", cbam="3.8664"),
        "resnet101": dict(baseline="7.337", se="7.3543", eca="7.3456", cbam="7.3515"),
    },
}  # fmt: skip


def expected_flops():
    for table, by_backbone in FLOPS.items():
        for backbone, by_method in by_backbone.items():
            for method, giga in by_method.items():
                metric = "macs_G" if table.startswith("cat/3") else "flops_G"
                yield f"{table}/{backbone}/{method}/{metric}", giga


@pytest.mark.parametrize(("name", "giga"), list(expected_flops()))
def test_flops_as_with_the_authors_modules(name, giga):
    entry = ledger.stored()[name]
    unit = 2**30 if name.startswith("cat/4") else 10**9
    last = Decimal(1).scaleb(Decimal(giga).as_tuple().exponent)
    assert abs(Decimal(entry.count) / unit - Decimal(giga)) <= last * Decimal("0.6")


# ---- fitted quantities


def with_form(pattern, cell, **changes):
    "The count of a cell with another form."
    form = replace(recount.form_of(cell), **changes)
    recount.counted.cache_clear()
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(recount.FORMS, pattern, form)
        count = recount.count(cell)
    recount.counted.cache_clear()
    return ledger.compare(cell.value, Decimal(count) / recount.unit(cell))


def test_cats_cells_need_three_maps():
    added = {
        c.backbone: with_form("cat/3/*/cat", c, options={"summaries": "add"})
        for c in cells("cat", "3", method="cat", metric="macs_G")
        if c.backbone != "resnet101"
    }
    assert added["resnet50"].status == "differs" and added["mobilenetv2"].twice
    assert added["shufflenetv2"] == ledger.Verdict("equal")


def test_sas_detectors_need_the_extra_norm():
    plain = partial(implementations.sa, pools=(AVERAGE,))
    [cell] = cells("sanet", "3", framework="faster_rcnn", backbone="resnet50", method="sa", metric="flops_G")
    assert with_form("sanet/3/*/sa", cell, implementation=plain).status == "differs"


@pytest.mark.parametrize("size", [(800, 1152), (800, 1280), (800, 1333 // 32 * 32)])
def test_no_single_size_gives_table_v(size, monkeypatch):
    question = dict(framework="faster_rcnn", backbone="resnet50", method="baseline", metric="flops_G")
    [cell] = cells("scsa", "V", **question)
    monkeypatch.setitem(recount.TOOLS, ("scsa", "V"), replace(recount.tool_of(cell), sizes={size: 1}))
    recount.counted.cache_clear()
    count = recount.count(cell)
    recount.counted.cache_clear()
    assert ledger.compare(cell.value, Decimal(count) / 10**9).status == "differs"


@pytest.mark.slow
def test_another_mix_of_the_same_mean_gives_most_of_table_v(monkeypatch):
    mix = {(800, 1088): 53, (800, 1216): 45, (768, 1344): 2}
    positions = [sum(n * h * w for (h, w), n in m.items()) for m in (mix, recount.COCO)]
    assert positions[0] == positions[1]
    tool = recount.TOOLS["scsa", "V"]
    monkeypatch.setitem(recount.TOOLS, ("scsa", "V"), replace(tool, sizes=mix))
    recount.counted.cache_clear()
    found = {c: Decimal(recount.count(c)) / 10**9 for c in cells("scsa", "V", metric="flops_G")}
    recount.counted.cache_clear()
    agree = [ledger.compare(c.value, n).status == "equal" for c, n in found.items()]
    assert (sum(agree), len(agree)) == (32, 36)
    assert round(max(abs(n - Decimal(c.value)) for c, n in found.items()), 3) == Decimal("0.008")


def test_a_cbam_with_a_floor_would_not_give_the_shufflenet():
    [cell] = cells("cat", "3", backbone="shufflenetv2", method="cbam", metric="params_M")
    assert with_form("cat/3/*/cbam", cell, options=recount.PLAIN).status == "differs"
    assert ledger.stored()[ledger.cell_key(cell)].status == "equal"


def test_flops_that_agree():
    found = [e for e in ledger.stored().values() if not e.key.endswith("params_M")]
    listed = {ledger.cell_key(c) for c in cells()}
    statuses = [e.status for e in found if e.key in listed]
    assert (len(statuses), statuses.count("equal")) == (135, 129)


# ---- forms, tools, networks


def test_what_is_not_recorded_is_refused():
    cell = Cell("scsa", "IV", "classification", "imagenet1k", "", "resnet50", "gct", "", "params_M", "1")
    with pytest.raises(recount.NoRecipe, match="Which GCT"):
        recount.count(cell)
    with pytest.raises(recount.NoRecipe, match="Table VI of scsa has no costs"):
        recount.count(replace(cell, table="VI", method="se"))


def test_the_kernel_of_eca_in_mobilenet():
    [cell] = cells("scsa", "IV", backbone="mobilenetv2", method="eca", metric="params_M")
    placed = attentions(recount.network_of(cell))
    kernels = {name.split(".")[1]: m.conv.kernel_size[0] for name, m in placed.items()}
    assert kernels == {"1": 1} | {str(i): 3 for i in range(2, 18)}


def test_the_first_stage_of_sanets_detectors_is_frozen_with_its_attention():
    [cell] = cells("sanet", "3", framework="retinanet", backbone="resnet50", method="se", metric="params_M")
    network = recount.network_of(cell)
    frozen = [n for n, p in network.named_parameters() if not p.requires_grad]
    assert {n.split(".")[2] for n in frozen} == {"conv1", "bn1", "layer1"}
    assert any(".attention." in n for n in frozen)


def test_networks_are_built_without_weights():
    [cell] = cells("scsa", "I", backbone="resnet50", method="scsa", metric="params_M")
    network = recount.network_of(cell)
    assert {p.device.type for p in network.parameters()} == {"meta"}
    assert len(attentions(network)) == 16


def test_matrix_work_alone_does_not_depend_on_how_a_mean_is_written():
    written = (partial(implementations.se, pools=p) for p in ((AVERAGE,), ()))
    by_layer, by_function = map(CountedImplementation, written)
    assert macs(by_layer, (64, 9, 9), MATRIX) == macs(by_function, (64, 9, 9), MATRIX) == 2 * 64 * 4
    assert registry.create("se", 64, bias=False).reduce.weight.numel() == 64 * 4


# ---- the cache


def test_every_cost_is_kept_and_nothing_else():
    stored = ledger.stored()
    assert [e.key for e in stored.values()] == [ledger.cell_key(c) for c in ledger.costs()]
    assert {p: e.printed for p, e in stored.items()} == {ledger.cell_key(c): c.value for c in ledger.costs()}
    assert len(stored) == 269


def test_kept_verdicts_follow_from_kept_counts():
    for cell in ledger.costs():
        entry = ledger.stored()[ledger.cell_key(cell)]
        verdict = ledger.compare(cell.value, Decimal(entry.count) / recount.unit(cell))
        assert (entry.status, entry.twice) == (verdict.status, verdict.twice), entry
        assert entry.fitted == recount.is_fitted(cell), entry


def test_a_sample_counted_again():
    wanted = [
        *ledger.costs(source="sanet", table="1"),
        *ledger.costs(source="cat", table="3", backbone="shufflenetv2"),
        *ledger.costs(source="scsa", table="I", backbone="resnet50", method="scsa"),
    ]
    message = []
    found = ledger.recount_all(wanted, message.append)
    assert ledger.changes(ledger.stored(), found) == [] and message == list(found.values())


def test_changes_are_named():
    stored = ledger.stored()
    name = "scsa/IV/imagenet1k/resnet50/se/params_M"
    other = replace(stored[name], count=28_071_976, status="differs")
    [line] = ledger.changes(stored, {name: other})
    assert line == f"{name}: count 28073864 is now 28071976, status equal is now differs"
    assert ledger.changes({}, {name: other}) == [f"{name}: not cached yet, differs"]


def test_what_is_written_is_read(tmp_path, monkeypatch):
    before = ledger.stored()
    monkeypatch.setattr(ledger, "STORED", tmp_path / "verdicts.csv")
    monkeypatch.setattr(ledger, "STAMP", tmp_path / "verdicts.digest")
    ledger.stored.cache_clear()
    assert ledger.write(before) == tmp_path / "verdicts.csv"
    assert ledger.stored() == before
    monkeypatch.undo()
    assert (tmp_path / "verdicts.csv").read_bytes() == ledger.STORED.read_bytes()
    ledger.stored.cache_clear()


def subset(monkeypatch):
    monkeypatch.setattr(ledger, "is_current", lambda: False)
    wanted = ledger.costs(source="scsa", table="IV", backbone="mobilenetv2", method="baseline")
    monkeypatch.setattr(ledger, "costs", lambda: wanted)
    return wanted


def test_the_command_fails_when_a_count_has_changed(monkeypatch, capsys):
    [parameter, _] = subset(monkeypatch)
    name = ledger.cell_key(parameter)
    stale = ledger.stored() | {name: replace(ledger.stored()[name], count=1)}
    monkeypatch.setattr(ledger, "stored", lambda: stale)
    code, out, err = said(capsys, "ledger", "--check")
    assert code == 1 and out.strip() == f"{name}: count 1 is now 3504872"
    assert "1 of 2 costs changed" in err and f"2 of 2  equal    {name.rpartition('/')[0]}/flops_G" in err


def test_the_command_writes(monkeypatch, capsys, tmp_path):
    subset(monkeypatch)
    monkeypatch.setattr(ledger, "STORED", tmp_path / "verdicts.csv")
    monkeypatch.setattr(ledger, "STAMP", tmp_path / "verdicts.digest")
    code, out, _ = said(capsys, "ledger", "--write")
    assert code == 0 and "nothing has changed" in out and "written: " in out
    assert len((tmp_path / "verdicts.csv").read_text().splitlines()) == 3


# ---- a recount is not made again while what it depends on is the same


@pytest.fixture
def library(tmp_path, monkeypatch):
    "A copy of the library, and the digest that it has."
    shutil.copytree(ROOT / "scsa_book", tmp_path / "scsa_book")
    folder = tmp_path / "scsa_book"
    before = ledger.counted_from(folder)
    assert before == ledger.counted_from()
    return folder, before


CHANGES = {  # a file -> a change of what it means
    "attention/se.py": (".sigmoid()", ".relu()"),
    "networks/fpn.py": ("def ", "async def "),
    "operators/pooling.py": ("return ", "return 2 * "),
    "evidence/conventions.py": ("2 *", "3 *"),
    "evidence/implementations.py": ("1", "2"),
    "evidence/recount.py": ('("scsa", "IV"): Tool(TRACE', '("scsa", "IV"): Tool(THOP'),
    "evidence/published.csv": ("resnet50", "resnet51"),
    "evidence/verdicts.csv": ("equal", "differs"),
}


@pytest.mark.parametrize("name", CHANGES)
def test_a_change_of_anything_that_is_counted_is_noticed(name, library):
    folder, before = library
    old, new = CHANGES[name]
    text = (folder / name).read_text()
    assert old in text
    (folder / name).write_text(text.replace(old, new))
    assert ledger.counted_from(folder) != before


def test_other_versions_are_noticed_and_other_words_are_not(library, monkeypatch):
    folder, before = library
    path = folder / "evidence/conventions.py"
    lines = path.read_text().splitlines()
    assert lines[0].startswith('"""')
    path.write_text("\n".join(['"""Other words."""', *lines[1:], "# and more"]))
    (folder / "cli.py").write_text("")
    assert ledger.counted_from(folder) == before
    monkeypatch.setattr(ledger, "version", lambda name: "9.9")
    assert ledger.counted_from(folder) != before


def test_all_modules_that_a_recount_imports_are_in_the_digest():
    code = "import sys, scsa_book.evidence.recount; print(*(m for m in sys.modules if m[:4] == 'scsa'))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    files = {sys.modules[name].__file__ for name in done.stdout.split() if name in sys.modules}
    used = {Path(file) for file in files if not file.endswith("__init__.py")}
    library = Path(recount.__file__).parents[1]
    assert used <= {path for pattern in ledger.COUNTED_FROM for path in library.glob(pattern)}
    assert len(used) > 30


def test_a_recount_that_is_current_is_not_made_and_another_convention_makes_it(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(ledger, "STAMP", tmp_path / "verdicts.digest")
    ledger.STAMP.write_text(ledger.counted_from())
    with monkeypatch.context() as patch:
        patch.setattr(ledger, "recount_all", lambda *a: pytest.fail("it was made"))
        assert said(capsys, "ledger", "--check")[0] == 0
    [_, flops] = ledger.costs(source="scsa", table="IV", backbone="mobilenetv2", method="baseline")
    monkeypatch.setattr(ledger, "costs", lambda: [flops])
    monkeypatch.setattr(ledger, "counted_from", lambda: "of another convention")
    monkeypatch.setitem(recount.TOOLS, ("scsa", "IV"), replace(recount.tool_of(flops), convention=HOOKS))
    recount.counted.cache_clear()
    code, out, _ = said(capsys, "ledger", "--check")
    recount.counted.cache_clear()
    assert code == 1 and f"{ledger.cell_key(flops)}: count" in out


def test_the_recount_that_is_kept_is_current_or_holds(capsys):
    code, out, _ = said(capsys, "ledger", "--check")
    assert code == 0
    assert re.match("269 costs (kept, nothing that they depend on|counted, nothing) has changed", out)


@pytest.mark.slow
def test_every_cost_again(capsys, monkeypatch):
    monkeypatch.setattr(ledger, "is_current", lambda: False)
    recount.counted.cache_clear()
    start = time.process_time()
    code, out, err = said(capsys, "ledger", "--check")
    assert time.process_time() - start < 360  # three minutes of two cores
    assert code == 0 and out.strip() == "269 costs counted, nothing has changed"
    assert len(re.findall(r"^ *\d+ of 269", err, re.M)) == 269
