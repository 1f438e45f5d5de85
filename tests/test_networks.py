"""Networks: attention where the papers have it, stock weights that load, and counts that were printed."""

import copy
import io
import pickle

import pytest
import timm
import torch
from conftest import shake
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from torchvision import models
from torchvision.models._utils import IntermediateLayerGetter
from torchvision.models.feature_extraction import create_feature_extractor
from torchvision.models.mobilenetv2 import InvertedResidual
from torchvision.models.resnet import BasicBlock, Bottleneck, ResNet
from torchvision.models.shufflenetv2 import InvertedResidual as ShuffleBlock
from torchvision.models.shufflenetv2 import channel_shuffle
from torchvision.ops import FrozenBatchNorm2d

from scsa_book.attention import registry
from scsa_book.attention.base import POSITIONS
from scsa_book.networks.backbone import Stages
from scsa_book.networks.build import build, network_names, shapes_only
from scsa_book.networks.placement import (
    attend,
    attend_modules,
    attentions,
    load_stock,
    maps_of,
    reconnect,
)
from scsa_book.networks.sites import BLOCKS, matches, placements, positions
from scsa_book.networks.small import resnet50_small, resnet101_small, small_resnet
from scsa_book.networks.small_mobile import mobilenetv2_small, shufflenetv2_small


def on_paper(make, *args, **options):
    with shapes_only():
        return make(*args, **options)


def size(network):
    return sum(p.numel() for p in network.parameters())


def tiny(attention=None, **options):
    "The smallest network with three stages of blocks; its stock weights are always the same."
    torch.manual_seed(0)
    network = small_resnet(8, 10)
    return attend(network, attention, **options) if attention else network


# ---- counts ----

SE_NORM = {"bias": False, "batch_norm": True}
CBAM_BARE = {"bias": False, "batch_norm": False}
HIDDEN = {"position": "before_projection"}


@pytest.mark.parametrize(
    ("make", "attention", "options", "expected"),
    [
        (models.resnet50, "scsa", {}, 25_617_448),
        (models.resnet50, "se", {"bias": False}, 28_071_976),
        (models.resnet50, "se", {}, 28_088_024),
        (models.resnet50, "se", SE_NORM, 28_073_864),
        (models.resnet50, "cbam", {}, 28_089_624),
        (models.resnet50, "cbam", CBAM_BARE, 28_073_544),
        (models.resnet101, "scsa", {}, 44_679_208),
        (models.resnet101, "se", SE_NORM, 49_296_392),
        (models.resnet101, "cbam", CBAM_BARE, 49_295_562),
        (models.mobilenet_v2, "scsa", {}, 3_619_048),
        (models.mobilenet_v2, "cbam", {**CBAM_BARE, "min_hidden": 8, **HIDDEN}, 4_071_338),
    ],
)
def test_published_counts(make, attention, options, expected):
    assert size(attend(on_paper(make), attention, **options)) == expected


def test_counts_of_timm_equal_those_of_torchvision():
    for attention, position, expected in [("scsa", None, 25_617_448), ("se", "after_conv3", 28_088_024)]:
        network = on_paper(timm.create_model, "resnet50")
        assert size(attend(network, attention, position=position)) == expected
    assert size(attend(on_paper(timm.create_model, "mobilenetv2_100"), "scsa")) == 3_619_048


CAT_TABLE = {  # the CAT paper's table for CIFAR-100: without, SE, CBAM, ECA, CAT
    resnet50_small: (23_705_252, 26_220_196, 26_221_764, 23_705_300, 26_221_108),
    resnet101_small: (42_697_380, 47_440_548, 47_443_782, 42_697_479, 47_442_429),
    mobilenetv2_small: (2_369_380, 2_397_796, 2_404_710, 2_369_431, 2_398_765),
    shufflenetv2_small: (1_360_896, 1_401_264, 1_407_008, 1_360_944, 1_402_176),
}
CAT_FORMS = {
    "se": {"bias": False},
    "cbam": {**CBAM_BARE, "min_hidden": 8},
    "eca": {"kernel": 3},
    "cat": {"bias": False},
}


@pytest.mark.parametrize("make", CAT_TABLE)
def test_counts_of_networks_for_cifar(make):
    sizes = [size(on_paper(make, 100))]
    sizes += [size(attend(on_paper(make, 100), name, **form)) for name, form in CAT_FORMS.items()]
    assert tuple(sizes) == CAT_TABLE[make]


def test_official_forms_of_cbam_in_the_mobile_ones():
    assert size(attend(on_paper(mobilenetv2_small, 100), "cbam")) == 2_401_093
    assert size(attend(on_paper(shufflenetv2_small, 100), "cbam")) == 1_405_076


def test_counts_of_other_networks():
    assert size(on_paper(small_resnet, 20, 10)) == 269_722
    # three stacked maps, which the paper's 47.45 M for ResNet-101 needs
    stacked = attend(on_paper(resnet101_small, 100), "cat", summaries="stack")
    assert size(stacked) == 47_445_663


@pytest.mark.parametrize("name", ["resnet8", "resnet20"])
def test_residual_branches_of_small_networks_begin_at_zero_if_asked(name):
    x = torch.rand(2, 16, 8, 8)
    networks = []
    for zero in (False, True):
        torch.manual_seed(0)
        networks.append(attend(build(name, 10, zero_init=zero), "scsa", position="before_add"))
    plain, zero = (network.eval() for network in networks)
    assert torch.equal(zero.layer1[0](x), x) and not torch.equal(plain.layer1[0](x), x)
    for (key, a), b in zip(plain.state_dict().items(), zero.state_dict().values(), strict=True):
        last = key.endswith("bn2.weight")
        assert not b.any() if last else torch.equal(a, b), "the other weights are those of the same seed"
    zero.train()(torch.rand(2, 3, 32, 32)).sum().backward()
    assert zero.layer1[0].bn2.weight.grad.any(), "it can grow"
    with pytest.raises(ValueError, match="resnet18 has no zero_init; it is for resnet8, resnet14"):
        build("resnet18", 10, zero_init=True)


@pytest.mark.parametrize(
    ("make", "name", "options", "expected"),
    [
        # SKNet-50: 27.48 M by its authors' definition
        (models.resnext50_32x4d, "sk", {"position": "instead_of_conv2"}, 27_479_784),
        # BAM and non-local: the formulas of their chapters
        (models.resnet50, "bam", {"position": "between_stages"}, 25_557_032 + 358_067),
        (
            models.resnet50,
            "non_local",
            {"position": "after_block", "blocks": ["layer2.[13]", "layer3.[135]"]},
            25_557_032 + 2 * 526_592 + 3 * 2_101_760,
        ),
    ],
)
def test_counts_at_other_positions(make, name, options, expected):
    assert size(attend(on_paper(make), name, **options)) == expected


def test_sk_as_a_convolution_counts_what_timm_counts():
    ours = attend(on_paper(timm.create_model, "resnext50_32x4d"), "sk", position="instead_of_conv2")
    assert size(ours) == size(on_paper(timm.create_model, "skresnext50_32x4d"))


def initialised(where):
    "A network, and the functions that initialised it."
    with torch.profiler.profile() as seen, where:
        network = attend(build("resnet50", 10, width=16), "cbam")
    return network, {"aten::normal_", "aten::uniform_"} & {event.key for event in seen.key_averages()}


def test_shapes_only_gives_the_network_of_the_meta_device_and_initialises_nothing():
    expected, functions = initialised(torch.device("meta"))
    assert functions == {"aten::normal_", "aten::uniform_"}
    network, functions = initialised(shapes_only())
    assert not functions and {p.device.type for p in network.parameters()} == {"meta"}
    shapes = [{k: (v.shape, v.dtype) for k, v in n.state_dict().items()} for n in (network, expected)]
    assert shapes[0] == shapes[1]


def test_tensors_with_values_are_initialised_among_shapes_only():
    with shapes_only():
        layer = torch.nn.Linear(3, 4, device="cpu")
        values = torch.zeros(3, device="cpu").fill_(2)
    assert values.tolist() == [2, 2, 2] and layer.weight.abs().sum() > 0 and layer.weight.abs().max() < 1


# ---- positions ----


def add(block, x, out):
    return out + (x if block.downsample is None else block.downsample(x))


def by_hand_bottleneck(block, x, narrow, wide):
    out = block.relu(block.bn1(block.conv1(x)))
    out = narrow(block.relu(block.bn2(block.conv2(out))))
    return block.relu(add(block, x, wide(block.bn3(block.conv3(out)))))


def by_hand_basic(block, x, narrow, wide):
    out = narrow(block.relu(block.bn1(block.conv1(x))))
    return block.relu(add(block, x, wide(block.bn2(block.conv2(out)))))


def by_hand_inverted(block, x, narrow, wide):
    *layers, projection, norm = block.conv
    out = nn.Sequential(*layers)(x)
    out = wide(norm(projection(narrow(out))))
    return x + out if block.use_res_connect else out


def by_hand_timm_bottleneck(block, x, narrow, wide):
    out = block.act1(block.bn1(block.conv1(x)))
    out = narrow(block.act2(block.bn2(block.conv2(out))))
    return block.act3(add(block, x, wide(block.bn3(block.conv3(out)))))


def by_hand_timm_inverted(block, x, narrow, wide):
    out = narrow(block.bn2(block.conv_dw(block.bn1(block.conv_pw(x)))))
    return wide(block.bn3(block.conv_pwl(out))) + x


def by_hand_shuffle(block, x, narrow, wide):
    first, second = x.chunk(2, 1) if block.stride == 1 else (block.branch1(x), x)
    out = wide(block.branch2[5:](narrow(block.branch2[:5](second))))
    return channel_shuffle(torch.cat([first, out], 1), 2)


def down(width, out):
    return nn.Sequential(nn.Conv2d(width, out, 1, 2, bias=False), nn.BatchNorm2d(out))


IN_BOTTLENECK = (by_hand_bottleneck, "after_conv2", "after_conv3")
IN_BASIC = (by_hand_basic, "after_conv1", "after_conv2")
IN_INVERTED = (by_hand_inverted, "before_projection", "after_projection")
IN_SHUFFLE = (by_hand_shuffle, "inside_branch2", "after_branch2")
TIMM_BOTTLENECK = timm.models.resnet.Bottleneck
TIMM_INVERTED = timm.models._efficientnet_blocks.InvertedResidual
HAND = {
    "bottleneck": (lambda: Bottleneck(32, 8), *IN_BOTTLENECK),
    "bottleneck, halved": (lambda: Bottleneck(32, 16, 2, down(32, 64)), *IN_BOTTLENECK),
    "basic": (lambda: BasicBlock(32, 32), *IN_BASIC),
    "basic, halved": (lambda: BasicBlock(32, 64, 2, down(32, 64)), *IN_BASIC),
    "inverted": (lambda: InvertedResidual(32, 32, 1, 6), *IN_INVERTED),
    "inverted, halved": (lambda: InvertedResidual(32, 48, 2, 6), *IN_INVERTED),
    "inverted without expansion": (lambda: InvertedResidual(32, 16, 1, 1), *IN_INVERTED),
    "shuffle": (lambda: ShuffleBlock(32, 32, 1), *IN_SHUFFLE),
    "shuffle, halved": (lambda: ShuffleBlock(32, 64, 2), *IN_SHUFFLE),
    "timm bottleneck": (lambda: TIMM_BOTTLENECK(32, 8), by_hand_timm_bottleneck, *IN_BOTTLENECK[1:]),
    "timm inverted": (lambda: TIMM_INVERTED(32, 32, exp_ratio=4), by_hand_timm_inverted, *IN_INVERTED[1:]),
}


@pytest.mark.parametrize("attention", ["se", "scsa"])
@pytest.mark.parametrize("role", POSITIONS)
@pytest.mark.parametrize("kind", HAND)
def test_block_computes_what_a_hand_written_one_does(kind, role, attention):
    make, by_hand, narrow, wide = HAND[kind]
    torch.manual_seed(0)
    stock = shake(make()).eval()
    literal = narrow if role == "before_last_conv" else wide
    options = {"reduction": 4} if attention == "se" else {}
    by_literal = attend(copy.deepcopy(stock), attention, position=literal, **options)
    by_role = attend(copy.deepcopy(stock), attention, position=role, **options)
    assert list(attentions(by_literal)) == list(attentions(by_role))

    (module,) = attentions(by_literal).values()
    x = torch.randn(2, 32, 9, 7)
    positions = (module, nn.Identity()) if literal == narrow else (nn.Identity(), module)
    expected = by_hand(stock, x, *positions)
    assert torch.allclose(by_literal(x), expected, atol=1e-6)
    assert not torch.allclose(stock(x), expected, atol=1e-3)
    if "basic" in kind:  # both positions have the same width, so the wrong one would fit, too
        assert not torch.allclose(by_hand(stock, x, *positions[::-1]), expected, atol=1e-3)


def test_default_position_is_the_registered_one():
    expected = {"se": "after_conv2", "cbam": "after_conv2", "scsa": "after_conv1"}
    for attention, position in expected.items():
        network = attend(small_resnet(8, 10), attention)
        blocks = [f"layer{i}.0.attention.{position}" for i in (1, 2, 3)]
        assert list(attentions(network)) == blocks, attention


@pytest.mark.parametrize("name", registry.names())
@pytest.mark.parametrize("role", POSITIONS)
def test_every_mechanism_at_every_role_gives_logits_and_gradients(name, role):
    narrow = {"sa": {"groups": 4}, "sge": {"groups": 4}, "ema": {"factor": 8}}  # 16 channels are few
    options = narrow.get(name, {})
    network = attend(small_resnet(8, 10, in_channels=1), name, position=role, **options)
    loss = network(torch.randn(2, 1, 28, 28)).square().sum()
    loss.backward()
    silent = [k for k, p in network.named_parameters() if p.grad is None]
    assert not silent


@pytest.mark.parametrize("kind", HAND)
def test_after_a_block_means_after_all_of_it(kind):
    torch.manual_seed(0)
    stock = shake(HAND[kind][0]()).eval()
    network = attend(copy.deepcopy(stock), "se", position="after_block", reduction=4)
    assert list(attentions(network)) == ["attention.after_block"]
    x = torch.randn(2, 32, 9, 7)
    assert torch.allclose(network(x), network.attention.after_block(stock(x)), atol=1e-6)
    assert not torch.allclose(network(x), stock(x), atol=1e-3)


@pytest.mark.parametrize("block", [Bottleneck, TIMM_BOTTLENECK])
@pytest.mark.parametrize("stride", [1, 2])
def test_instead_of_the_middle_convolution(block, stride):
    torch.manual_seed(0)
    network = shake(block(32, 8, stride, down(32, 32) if stride == 2 else None)).eval()
    stock = copy.deepcopy(network)
    attend(network, "sk", position="instead_of_conv2")
    assert list(attentions(network)) == ["conv2.attention"]
    x = torch.randn(2, 32, 9, 7)
    sk = network.conv2.attention
    activation = nn.functional.relu
    out = sk(activation(stock.bn1(stock.conv1(x))))[..., ::stride, ::stride]
    expected = activation(add(stock, x, stock.bn3(stock.conv3(out))))
    assert torch.allclose(network(x), expected, atol=1e-6)
    assert expected.shape == stock(x).shape
    assert not torch.allclose(stock(x), expected, atol=1e-3)


def test_stride_of_a_replaced_convolution_is_that_of_its_branches():
    "Every second position of a branch is what the branch with a stride of 2 gives."
    torch.manual_seed(0)
    network = attend(Bottleneck(32, 16, 2, down(32, 64)), "sk", position="instead_of_conv2").eval()
    x = torch.randn(1, 16, 7, 6)
    sk = network.conv2.attention
    shares = sk.attention_maps(x)
    halved = copy.deepcopy(sk)
    for branch in halved.branches:
        branch[0].stride = (2, 2)
    assert torch.allclose(network.conv2(x), halved.recombine(x, shares), atol=1e-6)


def test_stages():
    expected = {
        "between_stages": {"layer1.1": 64, "layer2.1": 128, "layer3.1": 256},
        "after_last_stage": {"layer4.1": 512},
    }
    for network in (on_paper(models.resnet18), on_paper(timm.create_model, "resnet18")):
        for position, blocks in expected.items():
            assert {n: s.channels for n, s in placements(network, position).items()} == blocks
    shuffle = on_paper(build, "shufflenet_v2_x1_0", 10)
    assert list(placements(shuffle, "between_stages")) == ["stage2.3", "stage3.7"]
    small = small_resnet(8, 10)
    assert list(placements(small, "between_stages")) == ["layer1.0", "layer2.0"]
    assert list(placements(small, "after_last_stage")) == ["layer3.0"]
    assert "between_stages" not in positions(on_paper(models.mobilenet_v2))


def test_a_head_on_a_dilated_network():
    network = models.resnet50(replace_stride_with_dilation=[False, True, True]).eval()
    body = IntermediateLayerGetter(network, {"layer4": "out"})
    x = torch.randn(1, 3, 32, 32)
    before = body(x)["out"]
    assert before.shape == (1, 2048, 4, 4)
    attend(body, "danet_position", position="after_last_stage")
    [(name, head)] = attentions(body).items()
    assert name == "layer4.2.attention.after_block"
    nn.init.ones_(head.gamma)  # it starts as the identity
    assert torch.allclose(body(x)["out"], head(before), atol=1e-5)
    assert not torch.allclose(body(x)["out"], before)


def test_every_row_of_the_table_exists_in_a_network():
    "A row of BLOCKS that no network has would never be found wrong."
    networks = [
        on_paper(models.resnet18),
        on_paper(models.resnet50),
        on_paper(models.mobilenet_v2),
        on_paper(models.mobilenet_v3_large),
        on_paper(models.shufflenet_v2_x1_0),
        on_paper(timm.create_model, "mobilenetv2_100"),
    ]
    kinds = dict(BLOCKS)
    blocks = [m for net in networks for m in net.modules() if type(m).__name__ in kinds]
    used = {(type(b).__name__, *placements(b, "before_add")) for b in blocks}
    ends = {n: [s.child for s in sites.values() if s.role == "before_add"] for n, sites in BLOCKS}
    assert set(ends) == {name for name, _ in used}
    assert used == {
        (name, s.child) for name, sites in BLOCKS for s in sites.values() if s.role == "before_add"
    }


@pytest.mark.parametrize("name", ["resnext50_32x4d", "wide_resnet50_2", "resnetv2_50", "resnet50d"])
def test_variants_of_residual_networks_in_timm(name):
    "Those with torchvision's bottleneck are known; another order of layers is not taken for it."
    network = on_paper(timm.create_model, name)
    if name == "resnetv2_50":
        assert "attend_modules" in message(positions, network)
    else:
        assert list(positions(network))[:2] == ["after_conv2", "after_conv3"]
        assert len(attentions(attend(network, "se"))) == 16


def test_positions_and_their_widths():
    narrow, wide = (64, 128, 256, 512), (256, 512, 1024, 2048)
    assert positions(on_paper(models.resnet50)) == {
        "after_conv2": narrow,
        "after_conv3": wide,
        "after_block": wide,
        "instead_of_conv2": narrow,
        "between_stages": wide[:3],
        "after_last_stage": wide[3:],
    }
    late = positions(small_resnet(8, 10), "layer[23].*")
    assert {late[p] for p in ("after_conv1", "after_conv2", "after_block")} == {(32, 64)}
    assert late["between_stages"] == (32,) and late["after_last_stage"] == (64,)
    hidden = positions(on_paper(models.mobilenet_v2))["before_projection"]
    assert hidden == (32, 96, 144, 192, 384, 576, 960)
    half = positions(on_paper(models.shufflenet_v2_x1_0))
    assert half["after_branch2"] == (58, 116, 232) and half["after_block"] == (116, 232, 464)
    wide = positions(on_paper(models.resnext50_32x4d))
    assert wide["after_conv2"] == (128, 256, 512, 1024)


@pytest.mark.parametrize(
    ("patterns", "expected"),
    [
        ("*", "abc"),
        ("[ab]", "ab"),
        (["a", "c"], "ac"),
        ("!a", "bc"),
        (["!a", "!b"], "c"),
        (["[ab]", "!a"], "b"),
        ((), ""),
    ],
)
def test_patterns(patterns, expected):
    assert "".join(name for name in "abc" if matches(name, patterns)) == expected


def test_chosen_blocks_only():
    network = on_paper(models.mobilenet_v2)
    attend(network, "scsa", blocks="!features.1")  # without the block of expansion 1
    assert "features.1.attention.before_projection" not in attentions(network)
    assert len(attentions(network)) == 16


def test_frozen_norms_and_other_norms():
    for norm in (FrozenBatchNorm2d, lambda width: nn.GroupNorm(4, width)):
        network = attend(on_paper(models.resnet50, norm_layer=norm), "se")
        assert size(network) - size(on_paper(models.resnet50, norm_layer=norm)) == 2_530_992


# ---- errors ----


def message(act, *args, **options):
    with pytest.raises(ValueError) as caught:
        act(*args, **options)
    return str(caught.value)


def test_wrong_position_lists_the_right_ones_with_channels():
    error = message(attend, on_paper(models.resnet50), "se", position="before_projection")
    assert "'before_projection'" in error
    assert "after_conv2 (64, 128, 256, 512 channels)" in error
    assert "after_conv3 (256, 512, 1024, 2048 channels)" in error
    assert all(role in error for role in POSITIONS)


@pytest.mark.parametrize("position", ["between_stages", "after_last_stage"])
def test_blocks_without_stages_are_offered_another_way(position):
    network = on_paper(models.mobilenet_v2)
    assert "after_block with blocks=" in message(attend, network, "bam", position=position)
    assert "with blocks=" not in message(attend, network, "bam", position="after_conv3")
    attend(network, "bam", position="after_block", blocks=["features.3", "features.6", "features.13"])
    assert [m.channels for m in attentions(network).values()] == [24, 32, 96]


def test_unknown_network_is_named_with_a_way_out():
    error = message(attend, on_paper(models.vgg11), "se")
    assert error.startswith("VGG ") and "attend_modules(" in error and "features.0, features.3" in error
    assert "VGG" in message(positions, on_paper(models.vgg11))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"name": "scsaa"}, ["scsaa", "scsa"]),
        ({"name": "se", "reductoin": 4}, ["layer1.0.bn2", "reductoin", "reduction"]),
        ({"name": "scsa", "heads": 7}, ["layer1.0.conv2", "7"]),
        ({"name": "se", "blocks": "layer9.*"}, ["layer9.*", "layer1.0"]),
    ],
)
def test_wrong_words_change_nothing(options, words):
    network = small_resnet(8, 10)
    before = list(network.state_dict())
    error = message(attend, network, **options)
    assert all(word in error for word in words), error
    assert list(network.state_dict()) == before and not attentions(network)


def test_nothing_is_inserted_when_a_late_block_fails():
    network = nn.Sequential(BasicBlock(16, 16), BasicBlock(6, 6))  # 6 do not divide by SCSA's 4 groups
    error = message(attend, network, "scsa")
    assert "1.conv2" in error and "6" in error
    assert not attentions(network) and type(network[0]) is BasicBlock


def test_a_layer_that_holds_attention_is_not_replaced():
    network = attend_modules(ResNet(Bottleneck, [1, 1, 1, 1]), "layer3.0.bn2", "se")
    error = message(attend, network, "sk", position="instead_of_conv2")
    assert "layer3.0.bn2" in error and len(attentions(network)) == 1
    assert isinstance(network.layer1[0].conv2, nn.Conv2d)


def test_twice_at_one_position_is_refused_and_at_two_is_not():
    network = tiny("se")
    assert "layer1.0.bn2" in message(attend, network, "cbam")
    attend(network, "scsa")
    assert len(attentions(network)) == 6


# ---- any network ----


def test_modules_by_pattern():
    network = attend_modules(on_paper(models.densenet121), "*.conv2", "scsa", side="before")
    assert len(attentions(network)) == 58
    assert {m.channels for m in attentions(network).values()} == {128}
    placed = network.features.denseblock1.denselayer1.conv2.attention
    assert type(placed) is registry.info("scsa").make


def test_channels_are_looked_up_with_an_example():
    network = tiny()
    error = message(attend_modules, network, "layer?", "se")
    assert "layer1.0, layer2.0, layer3.0" in error and "BasicBlock" in error and "example=" in error
    before = copy.deepcopy(network.state_dict())
    attend_modules(network, "layer?", "se", example=torch.randn(1, 3, 32, 32))
    assert [m.channels for m in attentions(network).values()] == [16, 32, 64]
    assert all(torch.equal(network.state_dict()[k], v) for k, v in before.items())  # no statistics moved
    assert network.training and all(m.training for m in network.modules())
    assert "layer1.0.attention.after_block" in attentions(network)
    network(torch.randn(2, 3, 32, 32))


def test_attention_at_a_container_is_called_once():
    "Registered with an `nn.Sequential` it would be one of the layers that the container runs."

    class Count(torch.nn.Module):
        calls = 0

        def forward(self, x):
            self.calls += 1
            return x

    held = "layer2.0.attention"
    for side, name in (("after", f"{held}.after_block"), ("before", f"{held}.before_block")):
        network = tiny()
        example = torch.randn(2, 3, 32, 32)
        attend_modules(network, "layer2", lambda channels: Count(), side=side, example=example)
        assert list(attentions(network)) == [name]
        network(example)
        assert attentions(network)[name].calls == 1


def test_own_modules_and_their_options():
    class Half(nn.Module):
        def __init__(self, channels, factor):
            super().__init__()
            self.scale = nn.Parameter(torch.full((channels, 1, 1), factor))

        def forward(self, x):
            return x * self.scale

    network = tiny().double().eval()
    attend_modules(network, "layer2.0.conv1", Half, side="before", factor=0.5)
    conv = network.layer2[0].conv1
    assert conv.attention.scale.dtype == torch.float64
    x = torch.randn(2, 16, 8, 8, dtype=torch.float64)
    assert torch.allclose(conv(x), nn.functional.conv2d(x / 2, conv.layer.weight, stride=2, padding=1))


@pytest.mark.parametrize(
    ("pattern", "options", "words"),
    [
        ("stage*", {}, ["stage*", "conv1"]),
        ("conv1", {"side": "around"}, ["around", "before", "after"]),
        ("fc", {"example": torch.zeros(1, 3, 8, 8)}, ["fc", "Linear", "(B, C, H, W)"]),
    ],
)
def test_wrong_patterns(pattern, options, words):
    error = message(attend_modules, tiny(), pattern, "se", **options)
    assert all(word in error for word in words), error


def test_attention_inside_attention_is_not_matched():
    network = tiny("scsa")
    assert any(name.endswith("pcsa.q") for name, _ in network.named_modules())
    attend_modules(network, ["conv1", "*.q"], "se")
    assert list(attentions(network))[0] == "conv1.attention" and len(attentions(network)) == 4


# ---- stock weights ----


def stock_and_attended(attention="scsa"):
    torch.manual_seed(0)
    stock = shake(ResNet(Bottleneck, [1, 1, 1, 1], num_classes=5))
    torch.manual_seed(5)
    return stock, attend(ResNet(Bottleneck, [1, 1, 1, 1], num_classes=5), attention)


@pytest.mark.parametrize("attention", ["scsa", "cbam"])
def test_stock_weights_load_and_the_report_is_exact(attention):
    stock, network = stock_and_attended(attention)
    names = set(network.state_dict())
    assert names > set(stock.state_dict())  # no stock name has changed
    report = load_stock(network, stock.state_dict())
    assert set(report.loaded) == set(stock.state_dict())
    assert set(report.new) == names - set(stock.state_dict())
    assert all(".attention." in name for name in report.new) and report.skipped == ()
    assert all(torch.equal(network.state_dict()[k], v) for k, v in stock.state_dict().items())
    assert "4 attention modules" in str(report)


def test_its_own_checkpoint_loads_whole():
    network, other = tiny("cbam"), attend(small_resnet(8, 10), "cbam")
    report = load_stock(other, network.state_dict())
    assert report.new == () and set(report.loaded) == set(network.state_dict())
    x = torch.randn(2, 3, 16, 16)
    assert torch.equal(other.eval()(x), network.eval()(x))


def test_replaced_layers_are_reported():
    stock, network = stock_and_attended("se")
    attend(network, "sk", position="instead_of_conv2")
    report = load_stock(network, stock.state_dict())
    gone = {k for k in stock.state_dict() if ".conv2." in k or ".bn2." in k}
    assert set(report.replaced) == gone and len(gone) == 4 * 6
    assert set(report.loaded) == set(stock.state_dict()) - gone
    assert set(report.new) == {k for k in network.state_dict() if ".attention." in k}
    assert "24 not used" in str(report)
    assert load_stock(network, network.state_dict()).replaced == ()
    spoilt = dict(stock.state_dict())
    del spoilt["layer1.0.conv3.weight"]
    assert "missing: layer1.0.conv3.weight" in message(load_stock, network, spoilt)


@pytest.mark.parametrize("position", ["after_block", "between_stages", "after_last_stage"])
def test_stock_weights_load_at_every_position(position):
    stock, _ = stock_and_attended()
    network = attend(ResNet(Bottleneck, [1, 1, 1, 1], num_classes=5), "se", position=position)
    report = load_stock(network, stock.state_dict())
    assert set(report.loaded) == set(stock.state_dict()) and report.replaced == ()


def test_old_checkpoints_without_counters_load():
    stock, network = stock_and_attended()
    state = {k: v for k, v in stock.state_dict().items() if not k.endswith("num_batches_tracked")}
    report = load_stock(network, state)
    assert set(report.loaded) == set(state)
    frozen = attend(ResNet(Bottleneck, [1, 1, 1, 1], num_classes=5, norm_layer=FrozenBatchNorm2d), "scsa")
    assert set(load_stock(frozen, stock.state_dict()).loaded) == set(state)


def test_another_number_of_classes():
    stock, _ = stock_and_attended()
    network = attend(ResNet(Bottleneck, [1, 1, 1, 1], num_classes=3), "scsa")
    before = {k: v.clone() for k, v in network.state_dict().items()}
    error = message(load_stock, network, stock.state_dict())
    assert "fc.weight is (5, 2048) instead of (3, 2048)" in error and 'skip=["fc.*"]' in error
    assert all(torch.equal(v, before[k]) for k, v in network.state_dict().items())  # nothing was loaded
    report = load_stock(network, stock.state_dict(), skip=["fc.*"])
    assert report.skipped == ("fc.weight", "fc.bias")
    assert torch.equal(network.fc.weight, before["fc.weight"])
    assert torch.equal(network.conv1.weight, stock.conv1.weight)


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (lambda s: s.pop("layer2.0.conv1.weight"), ["missing: layer2.0.conv1.weight"]),
        (lambda s: s.update(extra=torch.zeros(1)), ["unexpected: extra"]),
        (lambda s: s.update({"bn1.bias": torch.zeros(3)}), ["bn1.bias is (3,) instead of (64,)"]),
        (lambda s: [s.update({f"module.{k}": s.pop(k)}) for k in list(s)], ["begin with 'module.'"]),
        (lambda s: s.update(optimizer={}), ["optimizer", "not a state dict"]),
    ],
)
def test_what_does_not_fit_is_named_and_nothing_loads(spoil, words):
    stock, network = stock_and_attended()
    state = dict(stock.state_dict())
    spoil(state)
    before = {k: v.clone() for k, v in network.state_dict().items()}
    error = message(load_stock, network, state)
    assert all(word in error for word in words), error
    assert all(torch.equal(v, before[k]) for k, v in network.state_dict().items())


@pytest.mark.parametrize("given", [models.resnet18(), "resnet18.pth"])
def test_what_is_no_state_dict(given):
    error = message(load_stock, models.resnet18(), given)
    assert type(given).__name__ in error and "model.state_dict()" in error and "read_weights(path)" in error


def test_the_error_of_a_part_says_how_to_load_the_whole():
    whole, part = models.resnet18(), Stages(models.resnet18())
    assert 'skip=["fc.*"]' in message(load_stock, part, whole.state_dict())
    assert len(load_stock(part, whole.state_dict(), skip=["fc.*"]).loaded) == 120
    averaged = {k: v for k, v in whole.state_dict().items() if not k.startswith("fc.")}
    averaged["n_averaged"] = torch.tensor(3)
    for skip in ("n_averaged", "n_averaged.*"):  # the entry itself, and all below a part of that name
        assert len(load_stock(part, averaged, skip=["fc.*", skip]).loaded) == 120
    error = message(load_stock, part, whole.state_dict(), skip="head.*")
    assert "skip='head.*' matches no name" in error


def test_loading_onto_the_meta_device_is_refused():
    network = attend(on_paper(small_resnet, 8, 10), "se")
    assert "meta" in message(load_stock, network, small_resnet(8, 10).state_dict())


# ---- what happens to a network in its life ----


@pytest.mark.parametrize("attention", ["se", "scsa"])
def test_copies_own_their_attention(attention):
    network = tiny(attention).eval()
    x = torch.randn(2, 3, 16, 16)
    expected = network(x)
    buffer = io.BytesIO()
    torch.save(network, buffer)
    saved = torch.load(io.BytesIO(buffer.getvalue()), weights_only=False)
    for copied in (copy.deepcopy(network), pickle.loads(pickle.dumps(network)), saved):
        assert torch.equal(copied(x), expected)
        for module in attentions(copied).values():
            for p in module.parameters():
                p.data.fill_(3.0)
        assert not torch.equal(copied(x), expected)
        assert torch.equal(network(x), expected)


@pytest.mark.parametrize("attention", ["se", "scsa", "cbam"])
def test_compiles_in_one_graph(attention):
    network = tiny(attention).eval()
    compiled = torch.compile(network, fullgraph=True, backend="eager")
    x = torch.randn(2, 3, 16, 16)
    assert torch.allclose(compiled(x), network(x), atol=1e-6)


@pytest.mark.parametrize("attention", ["se", "scsa"])
@pytest.mark.parametrize("strict", [False, True])
def test_exports(attention, strict):
    network = tiny(attention).eval()
    x = torch.randn(2, 3, 16, 16)
    program = torch.export.export(network, (x,), strict=strict)
    assert torch.allclose(program.module()(x), network(x), atol=1e-6)
    assert any(".attention." in name for name in program.state_dict)


def test_runs_in_data_parallel_training(tmp_path):
    network = tiny("scsa")
    x = torch.randn(2, 3, 16, 16)
    network(x).sum().backward()
    alone = {k: p.grad.clone() for k, p in network.named_parameters()}
    network.zero_grad()
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/group", rank=0, world_size=1)
    try:
        nn.parallel.DistributedDataParallel(network)(x).sum().backward()
    finally:
        torch.distributed.destroy_process_group()
    assert all(torch.allclose(p.grad, alone[k]) for k, p in network.named_parameters())


def test_feature_extractors_of_torchvision_keep_the_attention():
    network = tiny("se").eval()
    x = torch.randn(2, 3, 16, 16)
    by_graph = create_feature_extractor(network, ["layer2", "fc"])
    assert torch.equal(by_graph(x)["fc"], network(x)) and len(attentions(by_graph)) == 3
    by_layer = IntermediateLayerGetter(network, {"layer2": "0"})
    assert torch.equal(by_layer(x)["0"], by_graph(x)["layer2"])


def test_flops_are_counted_in_the_attention():
    with FlopCounterMode(display=False) as with_se:
        tiny("se")(torch.zeros(1, 3, 16, 16))
    with FlopCounterMode(display=False) as without:
        tiny()(torch.zeros(1, 3, 16, 16))
    widths = (16, 32, 64)
    expected = sum(2 * 2 * c * max(c // 16, 1) for c in widths)
    assert with_se.get_total_flops() - without.get_total_flops() == expected


def test_one_step_trains_stock_and_new_parameters():
    network = tiny("scsa")
    optimiser = torch.optim.SGD(network.parameters(), lr=0.1)
    before = {k: p.detach().clone() for k, p in network.named_parameters()}
    x, y = torch.randn(4, 3, 16, 16), torch.tensor([0, 1, 2, 3])
    first = nn.functional.cross_entropy(network(x), y)
    first.backward()
    optimiser.step()
    moved = {k for k, p in network.named_parameters() if not torch.equal(p, before[k])}
    attention = {k for k in before if ".attention." in k}
    assert moved - attention == set(before) - attention
    assert moved & attention and nn.functional.cross_entropy(network(x), y) < first


def test_device_precision_and_mode_are_those_of_the_layer():
    network = attend(small_resnet(8, 10).double().eval(), "scsa")
    assert {p.dtype for p in network.parameters()} == {torch.float64}
    assert not any(m.training for m in network.modules())
    assert {p.device.type for p in attend(on_paper(small_resnet, 8, 10), "cbam").parameters()} == {"meta"}


def test_stock_weights_are_those_of_the_seed():
    stock, placed = tiny().state_dict(), tiny("scsa").state_dict()
    assert all(torch.equal(placed[k], v) for k, v in stock.items())


def test_the_repair_of_hooks_is_not_needed_and_says_so():
    with pytest.warns(DeprecationWarning, match="does nothing"):
        assert reconnect(tiny("se")) == []


def test_maps_of_recombine_to_what_the_module_does():
    network = tiny("scsa")
    before = copy.deepcopy(network.state_dict())
    x = torch.randn(2, 3, 16, 16)
    maps = maps_of(network, x)
    assert list(maps) == list(attentions(network))
    assert network.training and all(torch.equal(network.state_dict()[k], v) for k, v in before.items())
    network.eval()
    for name, module in attentions(network).items():
        seen = {}
        record = lambda m, args, out, seen=seen: seen.update(x=args[0], y=out)  # noqa: E731
        handle = module.register_forward_hook(record)
        network(x)
        handle.remove()
        product = seen["x"]
        for gate in maps[name].values():
            assert not gate.requires_grad
            product = product * gate
        assert torch.allclose(product, seen["y"], atol=1e-6)
    assert not any(m._forward_pre_hooks for m in attentions(network).values())  # ours have gone
    assert "attend(" in message(maps_of, small_resnet(8, 10), x)


# ---- small networks, and networks by name ----


@pytest.mark.parametrize(("depth", "millions"), [(20, 0.27), (32, 0.46), (44, 0.66), (56, 0.85)])
def test_sizes_of_the_residual_networks_paper(depth, millions):
    assert round(size(on_paper(small_resnet, depth, 10)) / 1e6, 2) == millions
    layers = [m for m in on_paper(small_resnet, depth, 10).modules() if isinstance(m, (nn.Conv2d, nn.Linear))]
    assert len(layers) == depth


def test_small_stem_keeps_the_resolution():
    network, seen = on_paper(resnet50_small, 100).eval(), []
    network.layer1.register_forward_pre_hook(lambda m, args: seen.append(args[0].shape))
    network.layer4.register_forward_hook(lambda m, args, out: seen.append(out.shape))
    network(torch.empty(2, 3, 32, 32, device="meta"))
    assert seen == [(2, 64, 32, 32), (2, 2048, 4, 4)]


def test_convolutions_start_from_their_fan_out():
    torch.manual_seed(0)
    grey = build("mobilenet_v2", 10, in_channels=1).features[0][0].weight
    assert grey.shape == (32, 1, 3, 3)
    small = small_resnet(8, 10).layer3[0].conv1.weight
    stem = resnet50_small(10).conv1.weight
    for weight, fan_out in [(grey, 32 * 9), (small, 64 * 9), (stem, 64 * 9)]:
        assert weight.std().item() == pytest.approx((2 / fan_out) ** 0.5, rel=0.15)


@pytest.mark.parametrize("shortcut", ["pad", "projection"])
@pytest.mark.parametrize("side", [7, 28, 32, 33])
def test_small_networks_take_any_side(shortcut, side):
    network = small_resnet(8, 3, in_channels=1, width=4, shortcut=shortcut)
    assert network(torch.randn(2, 1, side, side)).shape == (2, 3)


def test_option_a_keeps_every_second_position_and_adds_zeros():
    shortcut = small_resnet(8, 10).layer2[0].downsample
    x = torch.randn(2, 16, 5, 4).contiguous(memory_format=torch.channels_last).requires_grad_()
    y = shortcut(x * 1)
    assert y.shape == (2, 32, 3, 2)
    assert torch.equal(y[:, :16], x[:, :, ::2, ::2]) and not y[:, 16:].any()
    assert not list(shortcut.parameters())
    g = torch.randn(2, 32, 3, 2).contiguous(memory_format=torch.channels_last)
    (to_x,) = torch.autograd.grad(y, x, g)
    assert torch.equal(to_x[:, :, ::2, ::2], g[:, :16]) and to_x.count_nonzero() == 2 * 16 * 6
    assert to_x.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("depth", [7, 2, 18, 50.5])
def test_wrong_depth(depth):
    assert "6n + 2" in message(small_resnet, depth, 10)


def test_wrong_shortcut():
    assert "'pad'" in message(small_resnet, 8, 10, shortcut="conv")


@pytest.mark.parametrize("name", network_names())
def test_every_name_builds_and_takes_attention(name):
    network = attend(on_paper(build, name, 7, in_channels=1), "se").eval()
    assert network(torch.empty(2, 1, 28, 28, device="meta")).shape == (2, 7)


CLASSIFIERS = {  # on maps of one position a normalisation sees two values, and gradients explode
    **dict.fromkeys(("resnet50", "mobilenet_v2", "shufflenet_v2_x1_0"), 64),
    **dict.fromkeys(("resnet50-small", "mobilenetv2-small", "shufflenetv2-small"), 32),
}


@pytest.mark.parametrize("name", CLASSIFIERS)
def test_classifiers_load_train_and_evaluate(name):
    torch.manual_seed(0)
    stock, network = build(name, 5), attend(build(name, 5), "cbam")
    assert set(load_stock(network, stock.state_dict()).loaded) == set(stock.state_dict())
    before = {k: p.detach().clone() for k, p in network.named_parameters()}
    x, y = torch.randn(2, 3, CLASSIFIERS[name], CLASSIFIERS[name]), torch.tensor([1, 4])
    optimiser = torch.optim.SGD(network.parameters(), lr=0.01)
    nn.functional.cross_entropy(network(x), y).backward()
    optimiser.step()
    moved = {k for k, p in network.named_parameters() if not torch.equal(p, before[k])}
    # not all norms: one before ReLU, depthwise convolution and norm changes nothing by its scale
    kernels = {k for k, p in before.items() if p.ndim == 4 and ".attention." not in k}
    assert kernels <= moved and any(".attention." in k for k in moved)

    network.eval()
    with torch.no_grad():
        logits = network(x)
    assert logits.shape == (2, 5) and logits.isfinite().all()
    maps = maps_of(network, x)
    assert list(maps) == list(attentions(network))
    assert {tuple(m) for m in maps.values()} == {("channel", "spatial")}


@pytest.mark.parametrize(
    ("name", "position"),
    [
        ("sk", "instead_of_conv2"),
        ("bam", "between_stages"),
        ("non_local", "after_block"),
        ("danet_position", "after_last_stage"),
        ("danet_channel", "after_last_stage"),
    ],
)
def test_other_positions_train_evaluate_copy_and_export(name, position):
    torch.manual_seed(0)
    network = attend(ResNet(Bottleneck, [1, 2, 1, 1], num_classes=5), name, position=position)
    x, y = torch.randn(2, 3, 64, 64), torch.tensor([1, 4])
    nn.functional.cross_entropy(network(x), y).backward()
    assert not [k for k, p in network.named_parameters() if p.grad is None]
    network.eval()
    expected = network(x)
    assert expected.isfinite().all()
    maps = maps_of(network, x)
    assert list(maps) == list(attentions(network)) and all(maps.values())
    assert torch.equal(pickle.loads(pickle.dumps(network))(x), expected)
    assert torch.equal(copy.deepcopy(network)(x), expected)
    program = torch.export.export(network, (x,))
    assert torch.allclose(program.module()(x), expected, atol=1e-5)
    synced = nn.SyncBatchNorm.convert_sync_batchnorm(network)  # no norm calls these
    assert list(attentions(synced)) == list(maps) and torch.equal(synced(x), expected)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("mobilenetv2-small", {"features.0": 34, "features.3": 17, "features.18": 5}),
        ("shufflenetv2-small", {"conv1": 32, "stage2": 16, "stage4": 4}),
        ("resnet101-small", {"conv1": 32, "layer1": 32, "layer4": 4}),
    ],
)
def test_sides_of_the_maps(name, expected):
    network, seen = on_paper(build, name, 10).eval(), {}
    for part in expected:
        note = lambda module, args, y, part=part: seen.update({part: y.shape[-1]})  # noqa: E731
        network.get_submodule(part).register_forward_hook(note)
    network(torch.empty(1, 3, 32, 32, device="meta"))
    assert seen == expected


def test_idle_biases_start_at_zero():
    network = build("mobilenetv2-small", 10)
    biases = [m.bias for m in network.modules() if isinstance(m, nn.Conv2d)]
    assert sum(b.numel() for b in biases) == 17_056 + 32  # torchvision's layers, and the expansion
    assert not any(b.any() for b in biases)


def test_colour_networks_are_the_stock_ones():
    for name, make in [("resnet50", models.resnet50), ("mobilenet_v2", models.mobilenet_v2)]:
        ours, stock = on_paper(build, name, 1000).state_dict(), on_paper(make).state_dict()
        assert {k: v.shape for k, v in ours.items()} == {k: v.shape for k, v in stock.items()}


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("resnet-20", 10), ["resnet-20", "'resnet20'", *network_names()]),
        (("resnet20", 0), ["num_classes=0"]),
        (("resnet20", 10, 0), ["in_channels=0"]),
        (("resnet20", "10"), ["num_classes='10'", "positive integer"]),
        (("resnet20", 10.5), ["num_classes=10.5", "positive integer"]),
    ],
)
def test_wrong_networks(arguments, words):
    error = message(build, *arguments)
    assert all(word in error for word in words), error
