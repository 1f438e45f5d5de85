"""Segmentation: published counts, every step against a literal one, and training at a small size."""

import copy
import io
import pickle
import time
from itertools import product

import pytest
import torch
import torch.nn.functional as F
from conftest import shake
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from torchvision import models

from scsa_book.attention import danet
from scsa_book.evidence.cost import cost
from scsa_book.networks.backbone import Stages, dilate
from scsa_book.networks.build import build, shapes_only
from scsa_book.networks.danet_head import DANetHead
from scsa_book.networks.placement import attend, attentions, load_stock, maps_of
from scsa_book.networks.segmentation import (
    LOSS_WEIGHTS,
    PyramidPooling,
    UPerHead,
    build_segmenter,
    segmentation_loss,
    segmenter_names,
)

SMALL = {"backbone": "resnet18", "channels": 16}
NAMES = segmenter_names()


def on_paper(make, *args, **options):
    with shapes_only():
        return make(*args, **options)


def size(module):
    return sum(p.numel() for p in module.parameters())


def small(name, classes=5, seed=0, **options):
    torch.manual_seed(seed)
    return build_segmenter(name, classes, **SMALL | options)


def batch(images=2, side=(32, 48), classes=5):
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(images, 3, *side, generator=generator)
    return x, torch.randint(classes, (images, *side), generator=generator)


# ---- counts ----

UPERNET = {"resnet50": 64_098_518, "resnet101": 83_090_646}
DELTAS = {  # of the SCSA paper's Table I: form, R50, R101
    "se": ({"bias": False, "batch_norm": True}, "after_conv3", 2_516_832, 4_747_232),
    "fca": ({}, "after_conv3", 2_514_944, 4_743_168),
    "cbam": ({"bias": False, "batch_norm": False, "min_hidden": 8}, "after_conv3", 2_516_512, 4_746_402),
    "eca": ({"kernel": 3}, "after_conv3", 48, 99),
    "sa": ({}, "after_conv3", 708, None),
    "cpca": ({"reduction": 16}, "after_conv2", 1_837_804, None),
    "scsa": ({}, "after_conv2", 60_416, 130_048),
}


@pytest.mark.parametrize("backbone", UPERNET)
def test_upernet_has_the_published_parameters(backbone):
    network = on_paper(build_segmenter, "upernet", 150, backbone=backbone)
    assert size(network) == UPERNET[backbone]
    counted = on_paper(build_segmenter, "upernet", 150, backbone=backbone, auxiliary=True)
    assert size(counted) - size(network) == 2_398_358


@pytest.mark.parametrize("name", DELTAS)
def test_attention_adds_the_published_parameters(name):
    options, position, *expected = DELTAS[name]
    for (backbone, base), delta in zip(UPERNET.items(), expected, strict=True):
        if delta is not None:
            placing = {"attention": name, "position": position, "options": options}
            network = on_paper(build_segmenter, "upernet", 150, backbone=backbone, **placing)
            assert size(network) - base == delta


def positions_of(side, stride):
    return (side[0] // stride) * (side[1] // stride)


def bottleneck_stage(blocks, wide_in, narrow, outer, inner):
    "Parameters of the convolutions times positions; only the first 1x1 sees the `outer` grid."
    wide = 4 * narrow
    first = wide_in * narrow * outer + (9 * narrow**2 + narrow * wide + wide_in * wide) * inner
    return first + (blocks - 1) * 17 * narrow**2 * inner


def resnet_macs(blocks, side, strides):
    total = 49 * 3 * 64 * positions_of(side, 2)
    wide, outer = 64, positions_of(side, 4)
    for stage, (n, stride) in enumerate(zip(blocks, strides, strict=True)):
        inner = positions_of(side, stride)
        total += bottleneck_stage(n, wide, 64 * 2**stage, outer, inner)
        wide, outer = 256 * 2**stage, inner
    return total


def uper_macs(side, classes, D=512):
    n2, n3, n4, n5 = (positions_of(side, s) for s in (4, 8, 16, 32))
    pyramid = 2048 * D * (1 + 4 + 9 + 36) + 9 * (2048 + 4 * D) * D * n5
    down = D * (256 * n2 + 512 * n3 + 1024 * n4) + 9 * D * D * (n2 + n3 + n4)
    return pyramid + down + (9 * 4 * D * D + D * classes) * n2


@pytest.mark.parametrize(("backbone", "blocks"), [("resnet50", (3, 4, 6, 3)), ("resnet101", (3, 4, 23, 3))])
def test_matrix_work_of_upernet_is_the_closed_form(backbone, blocks):
    network = on_paper(build_segmenter, "upernet", 150, backbone=backbone, auxiliary=True)
    for side in ((512, 512), (2048, 1024)):
        expected = resnet_macs(blocks, side, (4, 8, 16, 32)) + uper_macs(side, 150)
        start = time.perf_counter()
        assert cost(network, (3, *side)).macs == expected
        assert time.perf_counter() - start < 10


def test_cost_of_danet_is_the_closed_form():
    network, side, C, K = on_paper(build_segmenter, "danet", 19), (512, 256), 512, 19
    N = positions_of(side, 8)
    positions = N * C * C * 10 // 8 + N * N * C * 9 // 8
    head = 2 * 9 * 2048 * C * N + positions + 2 * C * C * N + 2 * 9 * C * C * N + C * K * N
    assert cost(network, (3, *side)).macs == resnet_macs((3, 4, 6, 3), side, (4, 8, 8, 8)) + head
    convs = 2 * (9 * 2048 * C + 2 * C + 9 * C * C + 2 * C) + 3 * (C * K + K)
    assert size(network.head) == convs + (C * C * 10 // 8 + C * 10 // 8 + 1) + 1


def test_scores_have_what_the_tools_count():
    "The final enlargement has no matrix work, and `logits` leaves it out."
    network = small("upernet").eval()
    x, _ = batch()
    with FlopCounterMode(display=False) as whole:
        out = network(x)
    with FlopCounterMode(display=False) as part:
        logits = network.logits(x)
    assert whole.get_total_flops() == part.get_total_flops() > 0
    assert logits.shape == (2, 5, 8, 12)
    assert torch.equal(out, F.interpolate(logits, (32, 48), mode="bilinear", align_corners=False))


# ---- the steps, literally ----


def cells_of(side, n):
    "First and last index (exclusive) of each of n cells that cover a side."
    return [(i * side // n, -(-(i + 1) * side // n)) for i in range(n)]


def pooled(x, n):
    rows, columns = cells_of(x.shape[2], n), cells_of(x.shape[3], n)
    out = x.new_empty(*x.shape[:2], n, n)
    for (i, (t, b)), (j, (l, r)) in product(enumerate(rows), enumerate(columns)):
        out[:, :, i, j] = x[:, :, t:b, l:r].mean((2, 3))
    return out


def stretched(x, size, dim):
    "Linear interpolation along one axis: centres of pixels at (i + ½) / size of the side."
    old = x.shape[dim]
    at = ((torch.arange(size, dtype=x.dtype) + 0.5) * old / size - 0.5).clamp(min=0)
    low = at.floor().long().clamp(max=old - 1)
    share = (at - low).view([-1 if d == dim else 1 for d in range(x.ndim)])
    high = (low + 1).clamp(max=old - 1)
    return x.index_select(dim, low) * (1 - share) + x.index_select(dim, high) * share


def enlarged(x, like):
    return stretched(stretched(x, like.shape[2], 2), like.shape[3], 3)


def layer(block, x):
    "Convolution, normalisation with running statistics, ReLU, from the numbers alone."
    conv, norm, _ = block
    x = F.conv2d(x, conv.weight, padding=conv.kernel_size[0] // 2)
    scale = norm.weight / (norm.running_var + norm.eps).sqrt()
    x = (x - norm.running_mean[:, None, None]) * scale[:, None, None] + norm.bias[:, None, None]
    return x.clamp(min=0)


@pytest.mark.parametrize("side", [(7, 5), (3, 4), (1, 1), (12, 6)])
def test_pyramid_pooling_is_what_it_says(side):
    module = shake(PyramidPooling(6, 4)).double().eval()
    x = torch.randn(2, 6, *side, dtype=torch.float64)
    parts = [x] + [
        enlarged(layer(squeeze, pooled(x, n)), x)
        for n, squeeze in zip((1, 2, 3, 6), module.squeeze, strict=True)
    ]
    assert torch.allclose(module(x), layer(module.merge, torch.cat(parts, 1)))


def literal_upernet(head, maps):
    "Stage by stage from the coarsest, as in the figure of the paper."
    c2, c3, c4, c5 = maps
    p5 = head.pyramid(c5)
    p4 = layer(head.laterals[2], c4) + enlarged(p5, c4)
    p3 = layer(head.laterals[1], c3) + enlarged(p4, c3)
    p2 = layer(head.laterals[0], c2) + enlarged(p3, c2)
    smooth = [layer(block, p) for block, p in zip(head.smooth, (p2, p3, p4), strict=True)]
    fused = layer(head.fuse, torch.cat([enlarged(p, c2) for p in (*smooth, p5)], 1))
    _, logits = head.classify
    return F.conv2d(fused, logits.weight, logits.bias)


@pytest.mark.parametrize("side", [(16, 24), (9, 21)])
def test_the_head_of_upernet_is_what_it_says(side):
    widths = (3, 4, 5, 6)
    head = shake(UPerHead(widths, 3, channels=4)).double().eval()
    sides = [tuple(-(-s // 2**k) for s in side) for k in range(4)]
    maps = [torch.randn(2, w, *s, dtype=torch.float64) for w, s in zip(widths, sides, strict=True)]
    outputs = head(maps)
    assert list(outputs) == ["out"]
    assert torch.allclose(outputs["out"], literal_upernet(head, maps))


def test_the_auxiliary_head_stands_on_the_last_stage_but_one():
    network = shake(small("upernet", auxiliary=True)).train()
    for module in network.modules():  # without dropout and batch statistics both sides agree
        if isinstance(module, nn.Dropout2d | nn.BatchNorm2d):
            module.eval()
    x, _ = batch()
    block, _, logits = network.auxiliary
    expected = F.conv2d(layer(block, network.backbone(x)[2]), logits.weight, logits.bias)
    outputs = network(x)
    assert list(outputs) == ["out", "aux"]
    assert torch.allclose(outputs["aux"], enlarged(expected, x), atol=1e-5)


# ---- dilation ----


@pytest.mark.parametrize("make", [models.resnet18, models.resnet50], ids=["basic", "bottleneck"])
@pytest.mark.parametrize("side", [(64, 64), (65, 47)])
def test_dilation_computes_the_old_positions_and_those_between(make, side):
    torch.manual_seed(0)
    stock = shake(make()).double().eval()
    x = torch.randn(1, 3, *side, dtype=torch.float64)
    coarse = Stages(copy.deepcopy(stock))(x)
    fine = Stages(dilate(copy.deepcopy(stock)))(x)
    for old, new, step in zip(coarse, fine, (1, 1, 2, 4), strict=True):
        assert torch.allclose(new[:, :, ::step, ::step], old)
        assert new.shape[2:] == fine[1].shape[2:] or step == 1


def test_dilation_is_that_of_torchvision():
    stock = models.resnet50(replace_stride_with_dilation=[False, True, True]).eval()
    ours = dilate(models.resnet50()).eval()
    ours.load_state_dict(stock.state_dict())
    for (name, theirs), mine in zip(stock.named_modules(), ours.modules(), strict=True):
        if isinstance(theirs, nn.Conv2d):
            for option in ("stride", "dilation", "padding"):
                assert getattr(theirs, option) == getattr(mine, option), name


@pytest.mark.parametrize(
    ("name", "output_stride", "strides"),
    [
        ("resnet18", 4, [4, 4, 4, 4]),
        ("resnet18", 8, [4, 8, 8, 8]),
        ("resnet50", 16, [4, 8, 16, 16]),
        ("resnet50", 32, [4, 8, 16, 32]),
        ("resnet50-small", 8, [1, 2, 4, 8]),
        ("resnet20", 8, [1, 2, 4]),
    ],
)
def test_strides_are_those_that_are_asked_for(name, output_stride, strides):
    stages = Stages(dilate(on_paper(build, name, 10), output_stride))
    assert stages.strides == strides
    maps = stages(torch.empty(2, 3, 64, 96, device="meta"))
    assert [u.shape[1] for u in maps] == stages.widths
    assert [tuple(u.shape[2:]) for u in maps] == [(64 // s, 96 // s) for s in strides]


def test_what_cannot_be_dilated_says_so():
    with pytest.raises(ValueError, match="less than that of the stem"):
        dilate(on_paper(build, "resnet18", 10), 2)
    with pytest.raises(ValueError, match="subsamples"):
        dilate(on_paper(build, "resnet8", 10), 1)
    with pytest.raises(ValueError, match="no stages.*Take a ResNet"):
        dilate(on_paper(build, "mobilenet_v2", 10))


def sizes(network):
    return [(m.stride, m.dilation, m.padding) for m in network.modules() if isinstance(m, nn.Conv2d)]


@pytest.mark.parametrize("blocks", ["*", "layer4.*"])
def test_a_replaced_convolution_cannot_be_dilated(blocks):
    network = on_paper(models.resnet50)
    attend(network, "sk", position="instead_of_conv2", blocks=blocks)
    before = sizes(network)
    first = "layer3" if blocks == "*" else "layer4"
    message = rf"{first}.0.conv2 \(Instead\) has the stride 2.* dilate before attend"
    with pytest.raises(ValueError, match=message):
        dilate(network)
    assert sizes(network) == before  # layer3 too, where only layer4 is in the way
    later = attend(dilate(on_paper(models.resnet50)), "sk", position="instead_of_conv2", blocks=blocks)
    maps = Stages(later)(torch.empty(2, 3, 64, 96, device="meta"))
    assert [tuple(u.shape[2:]) for u in maps] == [(16, 24), (8, 12), (8, 12), (8, 12)]


# ---- stock parts and attention ----


@pytest.mark.parametrize(
    ("name", "options"), [("scsa", {}), ("cbam", {}), ("ge", {"extent": 4, "variant": "theta"})]
)
def test_stages_are_those_of_the_network_with_attention_in_it(name, options):
    torch.manual_seed(0)
    network = shake(attend(models.resnet18(), name, position="before_add", **options)).eval()
    seen = []
    for stage in (network.layer1, network.layer2, network.layer3, network.layer4):
        stage.register_forward_hook(lambda module, args, output: seen.append(output))
    x = torch.randn(2, 3, 40, 56)
    network(x)
    expected = [u.clone() for u in seen]
    stages = Stages(network)
    assert all(torch.equal(u, v) for u, v in zip(stages(x), expected, strict=True))
    assert stages.widths == [64, 128, 256, 512] and stages.strides == [4, 8, 16, 32]
    assert len(attentions(stages)) == 8
    layers = [m for a in attentions(stages).values() for m in a.modules() if isinstance(m, nn.Conv2d)]
    geometry = [(m.stride, m.dilation, m.padding) for m in layers]
    assert Stages(dilate(network)).strides == [4, 8, 8, 8]
    assert geometry == [(m.stride, m.dilation, m.padding) for m in layers]


@pytest.mark.parametrize("name", NAMES)
def test_stock_weights_load_and_attention_stays_new(name):
    stock = models.resnet18().state_dict()
    network = small(name, attention="scsa")
    report = load_stock(network.backbone, stock, skip="fc.*")
    assert set(report.loaded) == {k for k in stock if not k.startswith("fc.")}
    assert report.new and all(".attention." in k for k in report.new)
    assert torch.equal(network.backbone.layer4[1].conv2.weight, stock["layer4.1.conv2.weight"])


@pytest.mark.parametrize("name", NAMES)
def test_one_seed_gives_the_same_stock_weights(name):
    plain, attended = small(name).state_dict(), small(name, attention="se").state_dict()
    assert all(torch.equal(plain[k], attended[k]) for k in plain)
    assert set(attended) - set(plain)


@pytest.mark.parametrize("name", NAMES)
def test_attention_maps_of_every_block(name):
    network = small(name, attention="cbam", position="before_add")
    x, _ = batch()
    found = maps_of(network, x)
    assert len(found) == 8 and network.training
    deepest = found["backbone.layer4.1.attention.after_conv2"]
    sides = {"upernet": (1, 2), "danet": (4, 6)}  # stride 32 and 8
    assert deepest["spatial"].shape == (2, 1, *sides[name])


def test_the_maps_of_the_dual_head_are_those_it_multiplies_by():
    network = shake(small("danet")).eval()
    x, _ = batch()
    maps = network.backbone(x)
    shares = network.head.attention_maps(maps)
    N, C = maps[-1].shape[2:].numel(), SMALL["channels"]
    assert shares["position"].shape == (2, N, N) and shares["channel"].shape == (2, C, C)
    for share in shares.values():
        assert torch.allclose(share.sum(-1), torch.ones(()), atol=1e-5)
    before, attention, after = network.head.channel
    narrow = before(maps[-1])
    received = (shares["channel"] @ narrow.flatten(2)).view_as(narrow)
    branch = after(narrow + attention.gamma * received)
    expected = network.head.both(network.head.position(maps[-1]) + branch)
    assert torch.allclose(network.logits(x), expected, atol=1e-5)


# ---- training and evaluation ----

OUTPUTS = {"upernet": ["out"], "danet": ["out", "position", "channel"]}


@pytest.mark.parametrize("auxiliary", [False, True])
@pytest.mark.parametrize("name", NAMES)
def test_outputs_in_training_and_evaluation(name, auxiliary):
    network = small(name, auxiliary=auxiliary)
    x, _ = batch()
    outputs, names = network(x), OUTPUTS[name] + ["aux"] * auxiliary
    if names == ["out"]:
        outputs = {"out": outputs}
    assert list(outputs) == names
    assert all(logits.shape == (2, 5, 32, 48) for logits in outputs.values())
    assert network.eval()(x).shape == (2, 5, 32, 48)


@pytest.mark.parametrize("attention", [None, "scsa", "cat"])
@pytest.mark.parametrize("name", NAMES)
def test_it_learns_and_every_parameter_takes_part(name, attention):
    network = shake(small(name, attention=attention, auxiliary=True))
    optimiser = torch.optim.SGD(network.parameters(), lr=0.02, momentum=0.9)
    x = F.interpolate(torch.randn(2, 3, 4, 6, generator=torch.Generator().manual_seed(3)), (32, 48))
    labels, losses, moved = x.argmax(1), [], set()
    for _ in range(6):  # CAT starts with one gate at zero: its factor gets gradients from step 2 on
        loss = segmentation_loss(network(x), labels)
        optimiser.zero_grad()
        loss.backward()
        moved |= {n for n, p in network.named_parameters() if p.grad is not None and p.grad.any()}
        optimiser.step()
        losses.append(loss.item())
    # A bias of the keys shifts all energies of a position alike, so the softmax does not change: no gradient.
    silent = {n for n, _ in network.named_parameters()} - moved
    assert not {n for n in silent if not n.endswith("key.bias")}
    assert losses[-1] < 0.9 * losses[0]
    assert network.eval()(x).argmax(1).shape == labels.shape


SIDES = [(1, 1), (1, 33), (17, 5), (33, 65)]


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("name", NAMES)
def test_any_size_is_evaluated_and_two_images_are_trained_on(name, side):
    network = shake(small(name, auxiliary=True))
    x, labels = batch(2, side)
    loss = segmentation_loss(network(x), labels)
    loss.backward()
    assert loss.isfinite()
    out = network.eval()(x[:1])
    assert out.shape == (1, 5, *side) and out.isfinite().all()
    assert network(x[:0]).shape == (0, 5, *side)


def test_one_image_to_train_on():
    x, labels = batch(1)
    with pytest.raises(ValueError, match="1 image of 32×48.*Train on 2"):
        small("upernet")(x)
    assert segmentation_loss(small("danet")(x), labels).isfinite()
    with pytest.raises(ValueError, match="1 image of 8×5: the head gets one position"):
        small("danet")(x[:, :, :8, :5])
    frozen = small("upernet")
    for module in frozen.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eval()
    assert frozen(x).isfinite().all()
    assert small("upernet").eval()(x).isfinite().all()


def test_other_colours_and_fewer_stages():
    network = build_segmenter("upernet", 2, backbone="resnet8", channels=8, in_channels=1)
    assert network(torch.rand(2, 1, 28, 28)).shape == (2, 2, 28, 28)
    network = build_segmenter("danet", 2, backbone="resnet8", channels=8, in_channels=4)
    assert network.eval()(torch.rand(2, 4, 28, 28)).shape == (2, 2, 28, 28)


# ---- the loss ----


def test_the_loss_is_the_mean_over_labelled_pixels():
    logits = torch.randn(2, 3, 4, 5, dtype=torch.float64)
    labels = torch.randint(3, (2, 4, 5))
    labels[0, :2], labels[1, 3, 3] = 255, 255
    log = logits.log_softmax(1)
    counted = [
        -log[b, labels[b, i, j], i, j]
        for b, i, j in product(range(2), range(4), range(5))
        if labels[b, i, j] != 255
    ]
    assert len(counted) == 29
    mean = sum(counted) / 29
    assert torch.isclose(segmentation_loss(logits, labels), mean)
    assert torch.isclose(segmentation_loss({"out": logits, "aux": logits}, labels), 1.4 * mean)
    three = dict.fromkeys(("out", "position", "channel"), logits)
    assert torch.isclose(segmentation_loss(three, labels), 3 * mean)
    assert torch.isclose(segmentation_loss(three, labels, weights=LOSS_WEIGHTS | {"channel": 0}), 2 * mean)


@pytest.mark.parametrize("wrong", [3, -1, 254])
def test_a_label_without_a_score_is_named(wrong):
    labels = torch.tensor([[[0, 2], [255, wrong]]])
    logits = torch.zeros(1, 3, 2, 2)
    with pytest.raises(ValueError, match=f"labels hold {wrong}; with 3 classes they must be 0 to 2"):
        segmentation_loss({"out": logits, "aux": logits}, labels)


def test_attention_in_chosen_blocks():
    network = on_paper(build_segmenter, "upernet", 5, **SMALL, attention="se", blocks="layer4.*")
    assert {name.split(".")[1] for name in attentions(network)} == {"layer4"}


def test_a_batch_without_labelled_pixels_costs_nothing():
    logits = torch.randn(1, 3, 4, 4, requires_grad=True)
    loss = segmentation_loss(logits, torch.full((1, 4, 4), 255))
    loss.backward()
    assert loss.item() == 0 and not logits.grad.any()


# ---- PyTorch's operations on modules ----


@pytest.mark.parametrize("name", NAMES)
def test_state_copies_and_pickles(name):
    network = shake(small(name, attention="scsa", auxiliary=True)).eval()
    x, _ = batch()
    expected = network(x)
    other = small(name, seed=1, attention="scsa", auxiliary=True).eval()
    file = io.BytesIO()
    torch.save(network.state_dict(), file)
    file.seek(0)
    other.load_state_dict(torch.load(file, weights_only=True))
    for again in (other, copy.deepcopy(network), pickle.loads(pickle.dumps(network))):
        assert torch.equal(again(x), expected)
        assert len(attentions(again)) == 8


@pytest.mark.parametrize("name", NAMES)
def test_compiled_and_exported_whole(name):
    network = shake(small(name, backbone="resnet8", attention="se", auxiliary=True)).eval()
    x, _ = batch()
    torch._dynamo.reset()
    compiled = torch.compile(network, fullgraph=True, backend="eager")
    assert torch.allclose(compiled(x), network(x), atol=1e-5)
    exported = torch.export.export(network, (x,)).module()
    assert torch.allclose(exported(x), network(x), atol=1e-5)
    network.train()
    assert list(compiled(x)) == list(network(x))


@pytest.mark.parametrize("name", NAMES)
def test_reduced_precision_and_channels_last(name):
    network = shake(small(name)).eval()
    x, _ = batch()
    expected = network(x)
    last = network.to(memory_format=torch.channels_last)(x.contiguous(memory_format=torch.channels_last))
    assert torch.allclose(last, expected, atol=1e-4)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert network(x).isfinite().all()


@pytest.mark.parametrize("name", NAMES)
def test_a_lighter_backbone_is_the_same_network_with_fewer_channels(name):
    stock, light = (build_segmenter(name, 5, **SMALL | {"width": width}) for width in (64, 16))
    assert list(light.state_dict()) == list(stock.state_dict())
    assert [4 * w for w in light.backbone.widths] == stock.backbone.widths
    assert light.backbone.strides == stock.backbone.strides
    x, _ = batch()
    assert light.eval()(x).shape == stock.eval()(x).shape


# ---- errors ----


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"name": "upper"}, "unknown segmentation network 'upper'. Did you mean 'upernet'"),
        ({"num_classes": 1}, "num_classes=1 must be at least 2"),
        ({"channels": 0}, "channels=0 must be a positive integer"),
        ({"backbone": "resnet-18"}, "unknown network 'resnet-18'"),
        ({"backbone": "mobilenet_v2"}, "no stages layer1.*Take a ResNet"),
        ({"attention": "sse"}, "unknown attention 'sse'. Did you mean 'se'"),
        ({"attention": "se", "options": {"ratio": 3}}, "unknown option of se 'ratio'"),
        ({"attention": "se", "position": "after_conv3"}, "no position 'after_conv3'.*after_conv1"),
        ({"position": "after_conv2"}, "without attention"),
        ({"blocks": "layer4.*"}, "blocks='layer4..' without attention"),
        ({"attention": "se", "blocks": "layer9.*"}, "blocks='layer9.*' matches no block"),
        ({"num_classes": "5"}, "num_classes='5' must be a positive integer"),
        ({"width": 0}, "width=0 must be a positive integer"),
        ({"backbone": "resnet20", "width": 16}, "width=16 scales a stem of 64 channels, but this has 16"),
        ({"options": {"reduction": 4}}, "without attention"),
        ({"dropout": 1.5}, "dropout probability"),
    ],
)
def test_a_wrong_request_says_what_is_possible(change, message):
    request = {"name": "upernet", "num_classes": 5, **SMALL} | change
    with pytest.raises(ValueError, match=message):
        on_paper(build_segmenter, **request)


@pytest.mark.parametrize("shape", [(2, 1, 32, 32), (3, 32, 32)])
def test_other_images_are_refused(shape):
    network = on_paper(build_segmenter, "danet", 5, **SMALL)
    x = torch.empty(shape, device="meta")
    for call in (network, network.logits):
        with pytest.raises(ValueError, match=r"it must be \(batch, 3, height, width\)"):
            call(x)


def test_the_head_knows_its_paper():
    assert issubclass(DANetHead, danet.DANetHead)
    assert set(DANetHead(8, 3).state_dict()) == set(danet.DANetHead(8, 3).state_dict())
