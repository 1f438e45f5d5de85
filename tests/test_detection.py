"""Detectors: torchvision's names and results, the published counts, and the errors for wrong targets."""

import copy
import math
import pickle
import re

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from torchvision import models
from torchvision.models.detection import (
    FasterRCNN,
    MaskRCNN,
    RetinaNet,
    fasterrcnn_resnet50_fpn,
    maskrcnn_resnet50_fpn,
    retinanet_resnet50_fpn,
)
from torchvision.models.detection.backbone_utils import resnet_fpn_backbone
from torchvision.ops import FrozenBatchNorm2d, box_iou
from torchvision.ops.feature_pyramid_network import LastLevelP6P7

from scsa_book.evidence.cost import parameters
from scsa_book.networks.build import shapes_only
from scsa_book.networks.cascade import IOUS, LOSSES, WEIGHTS, Cascade, refine
from scsa_book.networks.detection import (
    build_detector,
    check_targets,
    dense,
    detector_names,
    detector_settings,
)
from scsa_book.networks.fpn import Pyramid, freeze, stages_of
from scsa_book.networks.placement import attentions, load_stock, maps_of
from scsa_book.networks.regions import BoxPredictor, MaskPredictor, anchors, region_pool

NAMES = detector_names()
EACH = pytest.mark.parametrize("name", NAMES)
TINY = {
    "backbone": "resnet18",
    "width": 8,
    "pyramid_channels": 16,
    "head_channels": 32,
    "anchor_scale": 4,
    "min_size": 64,
    "max_size": 96,
}


REGIONS = {"rpn_post_nms_top_n_train": 100, "rpn_post_nms_top_n_test": 60, "box_detections_per_img": 15}
FEWER_PROPOSALS = {
    "faster_rcnn": REGIONS,
    "mask_rcnn": {**REGIONS, "box_batch_size_per_image": 32},
    "cascade_rcnn": REGIONS,
    "retinanet": {"detections_per_img": 50},
}


def tiny(name="faster_rcnn", **options):
    "A detector of three classes that takes one step in a moment; its weights are always the same."
    torch.manual_seed(0)
    return build_detector(name, 3, **{**TINY, **FEWER_PROPOSALS[name], **options})


def on_paper(name, classes=80, **options):
    with shapes_only():
        return build_detector(name, classes, **options)


def scene(height=64, width=80, boxes=((5, 5, 30, 30), (20, 20, 60, 60)), labels=(1, 3)):
    "An image with bright boxes, and its target."
    image = torch.rand(3, height, width, generator=torch.Generator().manual_seed(height)) / 4
    masks = torch.zeros(len(boxes), height, width, dtype=torch.uint8)
    for n, (x1, y1, x2, y2) in enumerate(boxes):
        image[labels[n] % 3, y1:y2, x1:x2] += 0.7
        masks[n, y1:y2, x1:x2] = 1
    target = {"boxes": torch.tensor(boxes).float().view(-1, 4), "labels": torch.tensor(labels).long()}
    return image, {**target, "masks": masks}


def batch():
    images, targets = zip(scene(), scene(90, 64, ((10, 30, 40, 80),), (2,)), strict=True)
    return list(images), list(targets)


def total(losses):
    return sum(losses.values())


# ---- counts


@pytest.mark.parametrize(
    ("name", "backbone", "expected"),
    [
        ("faster_rcnn", "resnet50", 41_753_056),
        ("faster_rcnn", "resnet101", 60_745_184),
        ("cascade_rcnn", "resnet50", 69_394_766),
        ("cascade_rcnn", "resnet101", 88_386_894),
        ("retinanet", "resnet50", 37_968_692),
        ("retinanet", "resnet101", 56_960_820),
        ("mask_rcnn", "resnet50", 44_396_336),
    ],
)
def test_counts_of_mmdetection_3(name, backbone, expected):
    assert parameters(on_paper(name, backbone=backbone, layout="mmdet3")) == expected


@pytest.mark.parametrize(
    ("name", "classes", "norm", "expected"),
    [
        ("faster_rcnn", 90, "frozen", 41_755_286),
        ("faster_rcnn", 90, "batch", 41_755_286 + 53_120),
        ("faster_rcnn", 80, "batch", 41_757_156),
        ("mask_rcnn", 90, "batch", 44_454_513),
        ("mask_rcnn", 80, "batch", 44_400_693),
        ("retinanet", 90, "batch", 34_068_119),
    ],
)
def test_counts_of_torchvision(name, classes, norm, expected):
    assert parameters(on_paper(name, classes, norm=norm)) == expected


@pytest.mark.parametrize(
    ("name", "backbone", "attention", "expected"),
    [
        ("faster_rcnn", "resnet50", None, 41_531_812),
        ("faster_rcnn", "resnet101", None, 60_523_940),
        ("mask_rcnn", "resnet50", None, 44_175_349),
        ("mask_rcnn", "resnet101", None, 63_167_477),
        ("retinanet", "resnet50", None, 37_743_348),
        ("retinanet", "resnet101", None, 56_735_476),
        ("faster_rcnn", "resnet101", "sa", 60_525_428),
        ("retinanet", "resnet101", "sa", 56_736_964),
    ],
)
def test_trainable_counts_of_mmdetection_1(name, backbone, attention, expected):
    # The counts of the SA-Net slides: stem and first stage frozen, including their attention.
    detector = on_paper(name, backbone=backbone, attention=attention, layout="mmdet1", frozen_stages=1)
    assert parameters(detector, trainable=True) == expected


@pytest.mark.parametrize(
    ("attention", "options", "position", "deltas"),
    [
        ("se", {"bias": False, "batch_norm": True}, None, (2_516_832, 4_747_232)),
        ("fca", {}, None, (2_514_944, 4_743_168)),
        ("cbam", {"bias": False, "batch_norm": False}, None, (2_516_512, 4_746_402)),
        ("eca", {"kernel": 3}, None, (48, 99)),
        ("sa", {}, None, (708,)),
        ("ca", {"bias": False}, "after_conv2", (135_344, 248_768)),
        ("cpca", {"reduction": 16}, "after_conv2", (1_837_804,)),
        ("scsa", {}, None, (60_416, 130_048)),
    ],
)
def test_what_attention_adds(attention, options, position, deltas):
    # These options reproduce the SCSA paper's parameter cells; retinanet represents all four.
    asked = {"attention": attention, "options": options, "position": position, "layout": "mmdet3"}
    bases = {"resnet50": 37_968_692, "resnet101": 56_960_820}
    for (backbone, base), delta in zip(bases.items(), deltas, strict=False):
        assert parameters(on_paper("retinanet", backbone=backbone, **asked)) == base + delta


# ---- matrix work


def resnet_macs(blocks, height, width):
    "MACs of a ResNet of bottlenecks without its classifier; sides are multiples of 32."
    positions = height * width // 4
    macs, c_in = 49 * 3 * 64 * positions, 64
    positions //= 4
    for stage, count in enumerate(blocks):
        p = 64 * 2**stage
        fine, positions = positions, positions // (4 if stage else 1)
        macs += c_in * p * fine + (9 * p * p + 4 * p * p + c_in * 4 * p) * positions
        macs += (count - 1) * 17 * p * p * positions
        c_in = 4 * p
    return macs


def sides(length, count, stride=4):
    "Sides of the levels; one above the stages is half the one below, rounded up."
    found = [length // stride]
    while len(found) < count:
        found.append(math.ceil(found[-1] / 2))
    return found


def pyramid_macs(name, height, width, classes=80, proposals=1000, masks=100, channels=256):
    "Pyramid and heads, in mmdetection 3's layout."
    first = 8 if name == "retinanet" else 4
    positions = [h * w for h, w in zip(sides(height, 5, first), sides(width, 5, first), strict=True)]
    c2, square = channels**2, 9 * channels**2
    stages = [256, 512, 1024, 2048][-3 if name == "retinanet" else -4 :]
    macs = sum((c * channels + square) * n for c, n in zip(stages, positions, strict=False))
    if name == "retinanet":
        macs += 9 * 2048 * channels * positions[3] + square * positions[4]
        return macs + sum((8 * square + 9 * channels * 9 * (classes + 4)) * n for n in positions)
    macs += sum((square + channels * 3 * 5) * n for n in positions)
    boxes = 4 if name == "cascade_rcnn" else 4 * classes
    head = 49 * channels * 1024 + 1024**2 + 1024 * (classes + 1 + boxes)
    macs += proposals * head * (3 if name == "cascade_rcnn" else 1)
    if name == "mask_rcnn":
        # four convolutions on 14x14, four products per position for the 2x2 upsampling, one logit per class
        macs += masks * (4 * square * 196 + 4 * c2 * 196 + channels * classes * 784)
    return macs


def macs_of(detector, height, width, **options):
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        dense(detector.eval(), torch.empty(1, 3, height, width, device="meta"), **options)
    return counter.get_total_flops() // 2


@EACH
@pytest.mark.parametrize(("backbone", "blocks"), [("resnet50", (3, 4, 6, 3)), ("resnet101", (3, 4, 23, 3))])
def test_matrix_work_is_what_the_shapes_say(name, backbone, blocks):
    detector = on_paper(name, backbone=backbone, layout="mmdet3")
    for height, width in [(800, 1152), (1280, 800), (736, 1248)]:
        expected = resnet_macs(blocks, height, width) + pyramid_macs(name, height, width)
        assert macs_of(detector, height, width) == expected


def test_matrix_work_follows_the_number_of_regions():
    detector = on_paper("mask_rcnn")
    one = macs_of(detector, 64, 64, proposals=1, mask_rois=0)
    box = 12_544 * 1024 + 1024**2 + 1024 * 5 * 81
    assert macs_of(detector, 64, 64, proposals=3, mask_rois=0) - one == 2 * box
    mask = 196 * (4 * 9 + 4) * 256**2 + 784 * 256 * 81
    assert macs_of(detector, 64, 64, proposals=1, mask_rois=2) - one == 2 * mask


@EACH
def test_dense_gives_what_the_parts_give(name):
    detector = tiny(name).eval()
    x = torch.rand(2, 3, 64, 96)
    found = dense(detector, x, proposals=5, mask_rois=2)
    levels = detector.backbone(x)
    assert all(torch.equal(u, found["levels"][k]) for k, u in levels.items())
    if name == "retinanet":
        count = 9 * sum(u[0, 0].numel() for u in levels.values())
        assert found["cls_logits"].shape == (2, count, 4)
        return
    assert [len(part) for part in found["rpn"]] == [5, 5]
    assert len(found["boxes"]) == (3 if name == "cascade_rcnn" else 1)
    assert all(s.shape == (5, 4) and d.shape == (5, 16) for s, d in found["boxes"])
    assert ("masks" in found) == (name == "mask_rcnn")
    if name == "mask_rcnn":
        assert found["masks"].shape == (2, 4, 28, 28)


# ---- the same as torchvision

OLD = {
    "faster_rcnn": (FasterRCNN, {}),
    "mask_rcnn": (MaskRCNN, {}),
    "retinanet": (RetinaNet, {"returned_layers": [2, 3, 4], "extra_blocks": LastLevelP6P7(256, 256)}),
}
PEER = {"min_size": 96, "max_size": 160}


def peer(name):
    kind, options = OLD[name]
    backbone = resnet_fpn_backbone(
        backbone_name="resnet18", weights=None, norm_layer=nn.BatchNorm2d, trainable_layers=5, **options
    )
    head = {}
    if name == "retinanet":
        # its own default, said here because torchvision has no public name for it
        sizes = tuple(tuple(int(s * 2 ** (i / 3)) for i in range(3)) for s in (32, 64, 128, 256, 512))
        generator = models.detection.anchor_utils.AnchorGenerator(sizes, ((0.5, 1.0, 2.0),) * 5)
        head = {"anchor_generator": generator}
    return kind(backbone, num_classes=4, **PEER, **FEWER_PROPOSALS[name], **head)


@pytest.mark.parametrize(
    ("name", "make"),
    [
        ("faster_rcnn", fasterrcnn_resnet50_fpn),
        ("mask_rcnn", maskrcnn_resnet50_fpn),
        ("retinanet", retinanet_resnet50_fpn),
    ],
)
def test_names_and_shapes_are_those_of_torchvision(name, make):
    with shapes_only():
        stock = make(weights=None, weights_backbone=None)
    ours = on_paper(name, 90)
    assert {k: v.shape for k, v in ours.state_dict().items()} == {
        k: v.shape for k, v in stock.state_dict().items()
    }


@pytest.mark.parametrize("name", OLD)
def test_losses_and_detections_are_those_of_torchvision(name):
    stock = peer(name)
    torch.manual_seed(1)
    ours = build_detector(name, 3, backbone="resnet18", **PEER, **FEWER_PROPOSALS[name])
    ours.load_state_dict(stock.state_dict())
    images, targets = batch()
    torch.manual_seed(2)
    expected = stock(images, targets)
    torch.manual_seed(2)
    losses = ours(images, targets)
    assert list(losses) == list(expected)
    for key in losses:
        torch.testing.assert_close(losses[key], expected[key])
    with torch.no_grad():
        expected, found = stock.eval()(images), ours.eval()(images)
    for e, f in zip(expected, found, strict=True):
        assert e.keys() == f.keys()
        for key in e:
            torch.testing.assert_close(f[key], e[key])
    assert name == "retinanet" or any(len(f["boxes"]) for f in found)


# ---- layouts


def moved(detector, other):
    "`other`, which predicts nothing for the background, with the weights of `detector`."
    state, own = detector.state_dict(), other.state_dict()
    for key, value in own.items():
        given = state[key]
        if given.shape != value.shape:  # the background is the first of the outputs
            given = given[len(given) - len(value) :]
        state[key] = given
    other.load_state_dict(state)
    return other


@pytest.mark.parametrize("name", ["faster_rcnn", "mask_rcnn"])
def test_boxes_and_masks_of_the_background_change_nothing(name):
    ours = tiny(name, box_score_thresh=0.0).eval()
    other = moved(ours, tiny(name, layout="mmdet3", box_score_thresh=0.0).eval())
    assert parameters(other) < parameters(ours)
    images, targets = batch()
    with torch.no_grad():
        expected, found = ours(images), other(images)
    for e, f in zip(expected, found, strict=True):
        assert len(e["boxes"]) > 0
        for key in e:
            torch.testing.assert_close(f[key], e[key])
    losses = []
    for detector in (ours, other):
        torch.manual_seed(3)
        losses.append(detector.train()(images, targets))
    torch.testing.assert_close(losses[1], losses[0])


def test_labels_begin_with_one_in_every_layout_of_retinanet():
    ours, other = (tiny("retinanet", layout=layout) for layout in ("torchvision", "mmdet3"))
    images, targets = batch()
    for detector in (ours, other):
        head = detector.head.classification_head
        scored = head.num_classes
        assert scored == (4 if detector is ours else 3)
        with torch.no_grad():  # every anchor predicts the last class with certainty
            head.cls_logits.weight.zero_()
            head.cls_logits.bias.fill_(-20.0).view(9, scored)[:, -1] = 3.0
        with torch.no_grad():
            found = detector.eval()(images)
        assert {int(label) for f in found for label in f["labels"]} == {3}
        detector.train()
        sure, wrong = (
            detector(images, [{**t, "labels": torch.full_like(t["labels"], label)} for t in targets])
            for label in (3, 1)
        )
        assert sure["classification"] < wrong["classification"]


def test_a_level_of_c5_is_of_c5_when_the_widths_agree():
    body = stages_of("resnet18", width=32)
    assert body.widths[-1] == 256
    x = torch.rand(1, 3, 64, 64)
    for top, source in (("C5", 256), ("P5", 256)):
        pyramid = Pyramid(body, 2, 256, top).eval()
        assert pyramid.fpn.extra_blocks.p6.in_channels == source
        with torch.no_grad():
            maps = pyramid(x)
            c5 = body(x)[-1]
            expected = pyramid.fpn.extra_blocks.p6(c5 if top == "C5" else maps["2"])
        torch.testing.assert_close(maps["p6"], expected)


def test_predictors_order_classes_at_their_numbers():
    x = torch.rand(5, 8)
    for boxes, outputs in {"background": 16, "classes": 12, "shared": 4}.items():
        predictor = BoxPredictor(8, 3, boxes)
        assert predictor.bbox_pred.out_features == outputs
        scores, deltas = predictor(x)
        assert scores.shape == (5, 4) and deltas.shape == (5, 16)
        torch.testing.assert_close(deltas[:, 12:], predictor.bbox_pred(x)[:, -4:])
    masks = MaskPredictor(8, 3, background=False)
    u = masks(torch.rand(2, 8, 14, 14))
    assert u.shape == (2, 4, 28, 28) and masks.mask_fcn_logits.out_channels == 3
    with pytest.raises(ValueError, match="boxes='all'"):
        BoxPredictor(8, 3, "all")


# ---- training and evaluating


@EACH
@pytest.mark.parametrize(("attention", "options"), [(None, {}), ("se", {"reduction": 1}), ("scsa", {})])
def test_it_trains_and_evaluates(name, attention, options):
    detector = tiny(name, attention=attention, options=options)
    images, targets = batch()
    losses = detector.train()(images, targets)
    total(losses).backward()
    assert all(torch.isfinite(v) for v in losses.values())
    silent = [n for n, p in detector.named_parameters() if p.grad is None or not p.grad.any()]
    assert not [n for n in silent if ".attention." in n]
    assert len(silent) < 0.2 * len(list(detector.parameters())), silent
    with torch.no_grad():
        found = detector.eval()(images)
    for image, f in zip(images, found, strict=True):
        assert {"boxes", "labels", "scores"} <= f.keys() and ("masks" in f) == (name == "mask_rcnn")
        assert f["boxes"].shape == (len(f["labels"]), 4) and f["scores"].shape == f["labels"].shape
        assert ((f["labels"] >= 1) & (f["labels"] <= 3)).all()
        assert (f["boxes"][:, 2::2] <= image.shape[2]).all() and (f["boxes"] >= 0).all()
        if name == "mask_rcnn":
            assert f["masks"].shape == (len(f["labels"]), 1, *image.shape[-2:])


@EACH
def test_training_steps_find_the_boxes(name):
    detector = tiny(name, attention="se", width=16).train()
    images, targets = batch()
    optimizer = torch.optim.AdamW(detector.parameters(), 3e-3)
    for _ in range(40):
        loss = total(detector(images, targets))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    with torch.no_grad():
        found = detector.train()(images, targets) and detector.eval()(images)
    for f, target in zip(found, targets, strict=True):
        iou = box_iou(target["boxes"], f["boxes"]) * (f["labels"] == target["labels"][:, None])
        assert (iou.max(1).values > 0.5).all(), f


def test_signals_of_narrow_heads_are_as_large_as_of_wide_ones():
    # initialised for 256 channels: with 16 the four layers of RetinaNet have a gain of 1/256 and do not learn
    spread = []
    for channels in (16, 256):
        torch.manual_seed(0)
        head = build_detector("retinanet", 3, **{**TINY, "pyramid_channels": channels}).head
        x = torch.rand(1, channels, 32, 32)
        with torch.no_grad():
            spread.append(float(head.regression_head.conv(x).std()))
    assert spread[0] == pytest.approx(spread[1], rel=0.5)


@EACH
def test_boxes_keep_their_precision(name):
    # 8 bits of a number near 1000 are steps of 4 pixels; torchvision decodes boxes in the type of the head
    detector = tiny(name).train()
    images, targets = batch()
    proposed = []
    if name != "retinanet":
        detector.rpn.register_forward_hook(lambda module, args, output: proposed.extend(output[0]))
    with torch.autocast("cpu", torch.bfloat16):
        losses = detector(images, targets)
        with torch.no_grad():
            found = detector.eval()(images)
    assert {p.dtype for p in [*proposed, *(f["boxes"] for f in found)]} == {torch.float32}
    assert torch.isfinite(total(losses))


@EACH
def test_an_image_without_objects(name):
    detector = tiny(name).train()
    (image, _), other = scene(), scene(64, 64)
    losses = detector([image, other[0]], [scene(boxes=(), labels=())[1], other[1]])
    assert torch.isfinite(total(losses))
    only = detector([image, image], [scene(boxes=(), labels=())[1]] * 2)
    assert torch.isfinite(total(only))
    total(only).backward()


@EACH
def test_copies_pickles_and_state_dicts(name):
    detector = tiny(name, attention="scsa").eval()
    images, _ = batch()
    other = tiny(name, attention="scsa")
    with torch.no_grad():
        for p in other.parameters():
            p.add_(1)
    other.load_state_dict(detector.state_dict())
    for copied in (other.eval(), copy.deepcopy(detector), pickle.loads(pickle.dumps(detector))):
        with torch.no_grad():
            torch.testing.assert_close(copied(images), detector(images))


def test_attention_draws_after_the_stock_weights():
    plain, attended = tiny("cascade_rcnn"), tiny("cascade_rcnn", attention="scsa")
    state = attended.state_dict()
    assert all(torch.equal(v, state[k]) for k, v in plain.state_dict().items())


@EACH
def test_maps_pass_through_a_detector(name):
    detector = tiny(name, attention="scsa").train()
    images, _ = batch()
    maps = maps_of(detector, images)
    assert len(maps) == 8 == len(attentions(detector))
    first = maps["backbone.body.layer1.0.attention.after_conv1"]
    assert first["height"].shape[:2] == (2, 8)
    assert detector.training


@pytest.mark.parametrize("norm", ["batch", "frozen"])
def test_stock_weights_load(norm):
    detector = tiny(width=64, attention="se", norm=norm)
    stock = models.resnet18()
    with torch.no_grad():
        for value in stock.state_dict().values():
            value.copy_(torch.rand(value.shape) + 0.1 if value.is_floating_point() else value)
    report = load_stock(detector.backbone.body, stock.state_dict(), skip="fc.*")
    assert len(report.new) == 8 * 4
    for key, value in detector.backbone.body.state_dict().items():
        assert ".attention." in key or torch.equal(value, stock.state_dict()[key])


@pytest.mark.parametrize("height", [33, 45, 64, 66, 67, 100])
def test_regions_come_from_the_right_positions(height):
    # torchvision's own pool guesses strides from the first image: wrong where padding is much of it.
    detector = tiny(min_size=64, max_size=160)
    pool = detector.roi_heads.box_roi_pool
    levels = {str(i): torch.zeros(1, 1, 128 // s, 128 // s) for i, s in enumerate((4, 8, 16, 32))}
    levels["0"][0, 0, 2:6, 2:6] = 1
    inside = pool(levels, [torch.tensor([[8.0, 8.0, 20.0, 20.0]])], [(height, height)])
    torch.testing.assert_close(inside, torch.ones(1, 1, 7, 7))


def test_regions_go_to_the_level_below_that_of_their_anchors():
    for scale in (2, 8):
        pool = region_pool((4, 8, 16, 32), 7, scale)
        made = anchors((4, 8, 16, 32), scale)
        square = [cell[1] for cell in made.cell_anchors]  # of ratio one
        assert pool.map_levels([torch.stack(square)]).tolist() == [0, 0, 1, 2]
    cells = anchors((4, 8, 16, 32, 64), 8).cell_anchors
    assert [int(c[1, 2] - c[1, 0]) for c in cells] == [32, 64, 128, 256, 512]


# ---- frozen parts


def test_attention_in_chosen_blocks():
    five = ["layer2.[13]", "layer3.[135]"]  # where Wang et al. (2018) put theirs
    placed = {"attention": "non_local", "position": "after_block"}
    detector = on_paper("faster_rcnn", backbone="resnet50", **placed, blocks=five)
    blocks = ["layer2.1", "layer2.3", "layer3.1", "layer3.3", "layer3.5"]
    assert list(attentions(detector)) == [f"backbone.body.{block}.attention.after_block" for block in blocks]
    as_option = on_paper("faster_rcnn", backbone="resnet50", **placed, options={"blocks": five})
    assert list(attentions(as_option)) == list(attentions(detector))


def test_frozen_stages_neither_learn_nor_move():
    detector = tiny(attention="se", options={"batch_norm": True, "bias": False}, frozen_stages=2).train()
    frozen = ("conv1.", "bn1.", "layer1.", "layer2.")
    body = detector.backbone.body
    before = copy.deepcopy(body.state_dict())
    optimizer = torch.optim.SGD([p for p in detector.parameters() if p.requires_grad], 0.1)
    total(detector(*batch())).backward()
    optimizer.step()
    assert all(p.requires_grad != n.startswith(frozen) for n, p in body.named_parameters())
    for key, value in body.state_dict().items():
        moved = not torch.equal(value, before[key])
        assert moved != key.startswith(frozen) or "num_batches" in key, key
    assert not body.layer1.training and body.layer3.training
    assert not detector.eval().backbone.body.layer3.training


def test_fixed_norms_learn_and_keep_their_statistics():
    options = {"attention": "se", "options": {"batch_norm": True, "bias": False}}
    body = tiny(norm="fixed", **options).train().backbone.body
    for name, module in body.named_modules():
        if isinstance(module, nn.BatchNorm2d):
            assert module.training == (".attention." in name)
            assert module.weight.requires_grad


def test_frozen_norms_are_constants():
    body = tiny(norm="frozen").backbone.body
    assert not [m for m in body.modules() if isinstance(m, nn.BatchNorm2d)]
    assert isinstance(body.layer4[0].bn1, FrozenBatchNorm2d)
    # as torchvision: every parameter of the stages is a convolution's
    assert all(p.ndim == 4 for p in body.parameters())


def test_freezing_can_be_undone_by_none():
    pyramid = Pyramid(stages_of("resnet18", width=8), channels=8)
    assert freeze(pyramid, 0).train().frozen_modules == ()
    assert all(m.training for m in pyramid.modules())
    for wrong in (-1, 5):
        with pytest.raises(ValueError, match=f"frozen_stages={wrong} must be 0 to 4"):
            freeze(pyramid, wrong)


# ---- the cascade


def head():
    return tiny("cascade_rcnn").roi_heads


def test_the_stages_are_those_of_the_paper():
    stages = head().stages
    assert IOUS == (0.5, 0.6, 0.7) and len(stages) == 3
    for stage, iou, weights in zip(stages, IOUS, WEIGHTS, strict=True):
        assert stage.proposal_matcher.high_threshold == stage.proposal_matcher.low_threshold == iou
        assert stage.box_coder.weights == weights
        assert stage.box_predictor.bbox_pred.out_features == 4
    # a correction of the same size in pixels counts twice and three times as much as in the first
    assert [w[0] / WEIGHTS[0][0] for w in WEIGHTS] == [w[2] / WEIGHTS[0][2] for w in WEIGHTS] == [1, 2, 3]


def test_refining_moves_a_box_by_its_correction():
    stage = head().stages[1]
    boxes = [torch.tensor([[10.0, 20.0, 30.0, 60.0]]), torch.tensor([[0.0, 0.0, 40.0, 40.0]])]
    # centre by a tenth of the width, width by a factor of two; then beyond the image
    deltas = torch.tensor([[2.0, 0.0, 10 * math.log(2), 0.0], [-20.0, 0.0, 0.0, 0.0]]).repeat(1, 4)
    first, second = refine(stage, deltas.requires_grad_(), boxes, [(100, 100), (100, 100)])
    torch.testing.assert_close(first, torch.tensor([[2.0, 20.0, 42.0, 60.0]]))
    torch.testing.assert_close(second, torch.tensor([[0.0, 0.0, 0.0, 40.0]]))
    assert not first.requires_grad
    assert [len(b) for b in refine(stage, deltas[:0], [b[:0] for b in boxes], [(9, 9)] * 2)] == [0, 0]


class Nudge(nn.Module):
    "A predictor that shifts boxes to the right and predicts one class, whatever its input."

    def __init__(self, shift, label, seen):
        super().__init__()
        self.deltas = torch.tensor([shift, 0.0, 0.0, 0.0])
        self.logits = torch.full((4,), -5.0)
        self.logits[label] = 5.0
        self.seen = seen

    def forward(self, x):
        self.seen.append(len(x))
        return self.logits.expand(len(x), -1), self.deltas.repeat(len(x), 4)


def nudged(cascade, labels):
    seen = []
    for stage, weights, label in zip(cascade.stages, WEIGHTS, labels, strict=True):
        stage.box_head = nn.Flatten()
        stage.box_predictor = Nudge(weights[0] * 0.1, label, seen)
        stage.score_thresh = 0.0
        stage.nms_thresh = 0.99
    return cascade.eval(), seen


def test_boxes_pass_from_stage_to_stage_and_scores_are_averaged():
    cascade, seen = nudged(head(), labels=(1, 1, 2))
    levels = {str(i): torch.zeros(1, 16, 64 // s, 64 // s) for i, s in enumerate((4, 8, 16, 32))}
    found, losses = cascade(levels, [torch.tensor([[10.0, 10.0, 30.0, 30.0]])], [(64, 64)])
    assert losses == {} and seen == [1, 1, 1]
    # three times a tenth of 20 pixels
    torch.testing.assert_close(found[0]["boxes"], torch.tensor([[16.0, 10.0, 36.0, 30.0]]).expand(3, 4))
    sure, other = torch.tensor([5.0, -5.0, -5.0, -5.0]).softmax(0)[:2].tolist()
    scores = dict(zip(found[0]["labels"].tolist(), found[0]["scores"].tolist(), strict=True))
    assert scores[1] == pytest.approx((2 * sure + other) / 3, abs=1e-5)
    assert scores[2] == pytest.approx((sure + 2 * other) / 3, abs=1e-5)


def test_a_stage_trains_on_what_the_one_before_has_made():
    cascade, seen = nudged(head(), labels=(1, 1, 1))
    cascade.train()
    levels = {str(i): torch.zeros(1, 16, 64 // s, 64 // s) for i, s in enumerate((4, 8, 16, 32))}
    # left of the object by three steps of 2 pixels: IoU 14/26, and after each step more
    truth = torch.tensor([[16.0, 10.0, 36.0, 30.0]])
    given, looked = [], [stage.select_training_samples for stage in cascade.stages]
    for stage, look in zip(cascade.stages, looked, strict=True):
        stage.select_training_samples = lambda boxes, targets, look=look: (
            given.append(boxes[0].clone()) or look(boxes, targets)
        )
    target = {"boxes": truth, "labels": torch.tensor([1])}
    _, losses = cascade(levels, [torch.tensor([[10.0, 10.0, 30.0, 30.0]])], [(64, 64)], [target])
    ious = [box_iou(truth, boxes)[0].tolist() for boxes in given]
    # one box each: the true box, which every stage adds, is not passed on
    expected = [[14 / 26], [16 / 24], [18 / 22]]
    assert ious == [pytest.approx(e, abs=1e-4) for e in expected]
    assert seen == [2, 2, 2]
    assert list(losses) == [f"loss_{kind}_{i}" for i in (1, 2, 3) for kind in ("classifier", "box_reg")]
    # both boxes are positive for every stage, with equal confidence: only the weights differ
    plain = [float(losses[f"loss_classifier_{i}"]) for i in (1, 2, 3)]
    assert plain == [pytest.approx(plain[0] * w, rel=1e-4) for w in LOSSES]


def test_a_cascade_of_one_stage_is_a_head():
    stage = head().stages[0].eval()
    levels = {str(i): torch.rand(1, 16, 64 // s, 64 // s) for i, s in enumerate((4, 8, 16, 32))}
    boxes = [torch.tensor([[10.0, 10.0, 30.0, 30.0], [5.0, 5.0, 60.0, 40.0]])]
    stage.score_thresh = 0.0
    with torch.no_grad():
        expected, _ = stage(levels, boxes, [(64, 64)])
        found, _ = Cascade([stage], [1.0]).eval()(levels, boxes, [(64, 64)])
    for key in expected[0]:
        torch.testing.assert_close(found[0][key], expected[0][key])


# ---- errors


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"name": "faster-rcnn"}, "unknown detector 'faster-rcnn'. Did you mean 'faster_rcnn'"),
        ({"num_classes": 0}, "num_classes=0 must be a positive integer"),
        ({"num_classes": 2.0}, "num_classes=2.0 must be a positive integer"),
        ({"backbone": "resnet_50"}, "unknown network 'resnet_50'. Did you mean 'resnet50'"),
        ({"backbone": "mobilenet_v2"}, "backbone='mobilenet_v2'.*no stages layer1"),
        ({"backbone": "resnet20"}, "backbone='resnet20' has 3 stages; a pyramid needs 4"),
        ({"attention": "scas"}, "unknown attention 'scas'. Did you mean 'scsa'"),
        ({"attention": "se", "options": {"kernels": (3,)}}, "unknown option of se 'kernels'"),
        ({"options": {"reduction": 4}}, "options={'reduction': 4} without attention"),
        ({"position": "before_add"}, "position='before_add' without attention"),
        ({"blocks": "layer4.*"}, "blocks='layer4.*' without attention"),
        ({"attention": "se", "blocks": "layer9.*"}, "blocks='layer9.*' matches no block"),
        ({"attention": "se", "position": "after_conv3"}, "no position 'after_conv3'. Possible here"),
        ({"layout": "mmdet"}, "layout='mmdet' must be one of torchvision, mmdet3, mmdet1"),
        ({"norm": "group"}, "norm='group' must be one of batch, fixed, frozen"),
        ({"frozen_stages": 5}, "frozen_stages=5 must be 0 to 4"),
        ({"frozen_stages": 1.5}, "frozen_stages=1.5 must be 0 to 4, a whole number"),
        ({"frozen_stages": True}, "frozen_stages=True must be 0 to 4, a whole number"),
        ({"width": 0}, "width=0 must be a positive integer"),
        ({"pyramid_channels": 0}, "channels=0 must be a positive integer"),
        ({"min_size": 63}, "min_size=63: .* at least 64 pixels"),
        ({"min_size": (128, 32)}, "at least 64 pixels"),
        ({"min_size": "800"}, "min_size='800', max_size=.* must be whole numbers"),
        ({"min_size": ()}, r"min_size=\(\), max_size=.* must be whole numbers"),
        ({"max_size": 1333.5}, "max_size=1333.5 must be whole numbers"),
        ({"min_size": 128, "max_size": 100}, "max_size=100 is less than min_size=128"),
        ({"anchor_scale": 0.5}, "anchor_scale=0.5 makes anchors of 2 pixels"),
        ({"image_mean": (0.5,)}, "need one value a channel"),
        ({"box_nms_tresh": 0.5}, "Did you mean 'box_nms_thresh'"),
        ({"name": "retinanet", "box_nms_thresh": 0.5}, "unknown setting of retinanet 'box_nms_thresh'"),
        ({"name": "cascade_rcnn", "box_fg_iou_thresh": 0.5}, "unknown setting of cascade_rcnn"),
    ],
)
def test_wrong_options_are_named(options, message):
    options = {"name": "faster_rcnn", "num_classes": 3, **TINY, **options}
    with pytest.raises(ValueError, match=message), torch.device("meta"):
        build_detector(**options)


BAD_TARGETS = {
    "no size": ({"boxes": torch.tensor([[5.0, 5.0, 30.0, 30.0], [9.0, 7.0, 9.0, 20.0]])}, r"box 1 is \[9.0"),
    "turned": ({"boxes": torch.tensor([[5.0, 30.0, 30.0, 5.0], [1.0, 1.0, 2.0, 2.0]])}, r"box 0 is \[5.0"),
    "nan": ({"boxes": torch.tensor([[5.0, math.nan, 30.0, 9.0], [1.0, 1.0, 2.0, 2.0]])}, "box 0 is .*nan"),
    "endless": ({"boxes": torch.tensor([[5.0, 5.0, math.inf, 9.0], [1.0, 1.0, 2.0, 2.0]])}, "box 0 is .*inf"),
    "background": ({"labels": torch.tensor([0, 1])}, "label 0 is 0; labels are 1 to 3"),
    "too many": ({"labels": torch.tensor([1, 4])}, "label 1 is 4; labels are 1 to 3"),
    "whole boxes": ({"boxes": torch.tensor([[5, 5, 30, 30], [1, 1, 2, 2]])}, "must be .n, 4. of floats"),
    "flat": ({"boxes": torch.rand(4)}, "must be .n, 4. of floats"),
    "one label": ({"labels": torch.tensor([1])}, "2 boxes need as many int64"),
    "kind of label": ({"labels": torch.tensor([1.0, 2.0])}, "2 boxes need as many int64"),
    "no boxes": ({"boxes": None}, "no tensor 'boxes'"),
    "no masks": ({"masks": None}, "no tensor 'masks'"),
    "small masks": ({"masks": torch.zeros(2, 8, 8)}, r"masks are \(2, 8, 8\); .* need \(2, 64, 80\)"),
}


@pytest.mark.parametrize(("change", "message"), BAD_TARGETS.values(), ids=BAD_TARGETS)
def test_wrong_targets_are_named_with_their_image(change, message):
    images, targets = zip(scene(), scene(), strict=True)
    targets = [targets[0], {k: v for k, v in {**targets[1], **change}.items() if v is not None}]
    with pytest.raises(ValueError, match=f"^image 1: .*{message}"):
        check_targets(images, targets, 3, masks=True)
    check_targets(images[:1], targets[:1], 3, masks=True)


def test_no_images_are_refused():
    detector = tiny()
    with pytest.raises(ValueError, match="no images: .* one or more"):
        detector.eval()([])
    with pytest.raises(ValueError, match="0 images"):
        detector.train()([], [])


@EACH
def test_targets_are_looked_at_before_the_loss(name):
    detector = tiny(name).train()
    images, targets = batch()
    before = copy.deepcopy(detector.state_dict())
    targets[1]["labels"] = torch.tensor([7])
    with pytest.raises(ValueError, match="image 1: label 0 is 7"):
        detector(images, targets)
    for wrong in (None, targets[:1], []):
        with pytest.raises(ValueError, match=re.escape("training needs one for each")):
            detector(images, wrong)
    with pytest.raises(ValueError, match="0 images"):
        detector([], [])
    assert all(torch.equal(v, before[k]) for k, v in detector.state_dict().items())
    detector.eval()(images)


def test_settings_are_those_of_torchvision():
    assert "box_nms_thresh" in detector_settings("mask_rcnn")
    assert "topk_candidates" in detector_settings("retinanet")
    detector = tiny("cascade_rcnn", box_detections_per_img=7, box_batch_size_per_image=33, rpn_nms_thresh=0.4)
    for stage in detector.roi_heads.stages:
        assert stage.detections_per_img == 7 and stage.fg_bg_sampler.batch_size_per_image == 33
    assert detector.rpn.nms_thresh == 0.4
    assert tiny(bbox_reg_weights=(1.0, 1.0, 1.0, 1.0)).roi_heads.box_coder.weights == (1.0, 1.0, 1.0, 1.0)


@pytest.mark.parametrize("channels", [1, 3, 5])
def test_images_of_any_channels(channels):
    options = {"image_mean": (0.5,) * channels, "image_std": (0.2,) * channels}
    detector = tiny(**options).train()
    images, targets = batch()
    images = [image[:1].expand(channels, -1, -1) for image in images]
    assert torch.isfinite(total(detector(images, targets)))
    assert detector.backbone.body.conv1.in_channels == channels


@pytest.mark.parametrize(("backbone", "width"), [("resnet50", 8), ("resnet34", 16), ("resnet18", 96)])
def test_a_width_scales_every_layer(backbone, width):
    body, stock = stages_of(backbone, width=width), stages_of(backbone)
    assert [w * 64 for w in body.widths] == [w * width for w in stock.widths]
    assert body.strides == stock.strides == [4, 8, 16, 32]
    assert list(body.state_dict()) == list(stock.state_dict())
    assert body.eval()(torch.rand(1, 3, 64, 64))[-1].shape[1] == body.widths[-1]
