"""The written blocks against the stock ones, layers that hold attention, names of 0.1.0, and detaching."""

import copy
import warnings

import pytest
import torch
from conftest import shake
from torch import nn
from torch.nn.utils import prune
from torch.nn.utils.fusion import fuse_conv_bn_eval
from torchvision import models
from torchvision.models.feature_extraction import create_feature_extractor
from torchvision.models.mobilenetv3 import InvertedResidual as V3
from torchvision.models.mobilenetv3 import InvertedResidualConfig
from torchvision.models.quantization import resnet as quantizable
from torchvision.models.resnet import BasicBlock, Bottleneck

from scsa_book.attention import registry
from scsa_book.networks import blocks
from scsa_book.networks.blocks import AttendedBlock, AttendedModule, into_block, written_for
from scsa_book.networks.build import build
from scsa_book.networks.detection import build_detector
from scsa_book.networks.placement import attend, attend_modules, attentions, detach, load_stock, maps_of
from scsa_book.networks.segmentation import build_segmenter
from scsa_book.networks.sites import placements, positions
from scsa_book.networks.small import small_resnet

timm = pytest.importorskip("timm")
TIMM = timm.models.resnet
EFFICIENT = timm.models._efficientnet_blocks
X = torch.randn(2, 32, 9, 7, generator=torch.Generator().manual_seed(0))
NO_FUSION = (AssertionError, NotImplementedError)  # by version of torch
ALL_OPTIONS = {"attn_layer": "se", "aa_layer": timm.layers.BlurPool2d, "drop_path": timm.layers.DropPath(0.5)}


def down(width, out):
    return nn.Sequential(nn.Conv2d(width, out, 1, 2, bias=False), nn.BatchNorm2d(out))


def version3(stride, out, expanded, se):
    return V3(InvertedResidualConfig(32, 3, expanded, out, se, "HS", stride, 1, 1.0), nn.BatchNorm2d)


STOCK = {
    "basic": lambda: BasicBlock(32, 32),
    "bottleneck, halved": lambda: Bottleneck(32, 16, 2, down(32, 64)),
    "v2": lambda: models.mobilenetv2.InvertedResidual(32, 32, 1, 6),
    "v2, halved": lambda: models.mobilenetv2.InvertedResidual(32, 16, 2, 1),
    "v3": lambda: version3(1, 32, 64, True),
    "v3, halved, no squeeze": lambda: version3(2, 16, 64, False),
    "v3, no expansion": lambda: version3(1, 32, 32, False),
    "shuffle": lambda: models.shufflenetv2.InvertedResidual(32, 32, 1),
    "shuffle, halved": lambda: models.shufflenetv2.InvertedResidual(32, 64, 2),
    "timm basic": lambda: TIMM.BasicBlock(32, 32, **ALL_OPTIONS, drop_block=timm.layers.DropBlock2d),
    "timm basic, halved": lambda: TIMM.BasicBlock(32, 64, 2, down(32, 64), **ALL_OPTIONS),
    "timm bottleneck": lambda: TIMM.Bottleneck(32, 8, **ALL_OPTIONS, drop_block=timm.layers.DropBlock2d),
    "timm inverted": lambda: EFFICIENT.InvertedResidual(
        32, 32, exp_ratio=4, se_layer=timm.layers.SqueezeExcite, drop_path_rate=0.5
    ),
    "timm inverted, space to depth": lambda: EFFICIENT.InvertedResidual(32, 32, s2d=1, noskip=True),
    "timm separable": lambda: EFFICIENT.DepthwiseSeparableConv(32, 32, drop_path_rate=0.5),
    "timm separable, space to depth": lambda: EFFICIENT.DepthwiseSeparableConv(32, 32, s2d=1, noskip=True),
}


class Nothing(nn.Module):
    def forward(self, x):
        return x


@pytest.mark.parametrize("train", [False, True])
@pytest.mark.parametrize("kind", STOCK)
def test_written_forward_is_the_stock_one_with_all_options(kind, train):
    torch.manual_seed(0)
    stock = shake(STOCK[kind]()).train(train)
    block = copy.deepcopy(stock)
    for position in ("before_block", *positions(stock)):
        into_block(block, position, Nothing(), "")
    assert written_for(stock) and len(block.attention) >= 3
    torch.manual_seed(1)
    expected = stock(X.clone())
    torch.manual_seed(1)
    assert torch.equal(block(X.clone()), expected)
    expected.sum().backward()
    torch.manual_seed(1)
    block(X.clone()).sum().backward()
    theirs = dict(stock.named_parameters())
    assert all(torch.equal(p.grad, theirs[k].grad) for k, p in block.named_parameters())


@pytest.mark.parametrize("kind", STOCK)
def test_every_position_of_the_table_is_called_once(kind):
    stock = STOCK[kind]().eval()
    for position, widths in positions(stock).items():
        if position == "instead_of_conv2":
            continue
        block, seen = copy.deepcopy(stock), []
        attend(block, "se", position=position, reduction=1)
        placed = attentions(block)[f"attention.{position}"]
        placed.register_forward_hook(lambda m, args, y, seen=seen: seen.append(y.shape[1]))
        block(X)
        assert seen == list(widths), position


def test_every_written_class_is_for_a_block_that_is_tested():
    assert {written_for(make()) for make in STOCK.values()} == set(blocks.WRITTEN.values())


# ---- blocks that are not written out ----


class OwnForward(BasicBlock):
    def forward(self, x):
        return 2 * super().forward(x)


class Later(BasicBlock):
    "What a new version of a library might be: one more layer in the forward pass."

    def forward(self, x):
        y = self.relu(self.bn1(self.conv1(x)))
        return self.relu(self.scale(self.bn2(self.conv2(y))) + x)


def test_a_forward_of_ones_own_is_kept_whole():
    stock = nn.Sequential(shake(OwnForward(32, 32)), shake(BasicBlock(32, 32))).eval()
    stock[1].forward = lambda x, f=stock[1].forward: 3 * f(x)
    network = attend(copy.deepcopy(stock), "eca", position="before_add")
    assert list(attentions(network)) == ["0.bn2.attention", "1.bn2.attention"]
    plain = detach(copy.deepcopy(network))
    assert torch.equal(plain(X), stock(X)) and not torch.allclose(network(X), stock(X), atol=1e-3)


def test_a_layer_that_ours_does_not_know_is_noticed(monkeypatch):
    monkeypatch.setitem(blocks.WRITTEN, f"{Later.__module__}.Later", blocks.AttendedBasicBlock)
    block = Later(32, 32)
    assert written_for(block) is None
    block.scale = nn.Identity()
    network = attend(nn.Sequential(block), "eca", position="before_add")
    assert list(attentions(network)) == ["0.bn2.attention"]


def test_quantizable_networks_keep_their_forward_and_cannot_lose_attention():
    network = quantizable.resnet18(weights=None, quantize=False).eval()
    attend(network, "eca", position="before_add")
    assert len(attentions(network)) == 8 and len(maps_of(network, torch.randn(1, 3, 32, 32))) == 8
    with pytest.raises(NO_FUSION, match="After"):
        network.fuse_model(is_qat=False)


def test_subclasses_without_a_forward_of_their_own_are_written():
    class Named(BasicBlock):
        def more(self):
            return 7

    block = attend(Named(32, 32), "eca", position="before_add")
    assert isinstance(block, (Named, AttendedBlock)) and block.more() == 7
    assert type(block).__name__ == "Named" and list(attentions(block)) == ["attention.after_conv2"]


def test_own_attribute_called_attention_is_not_overwritten():
    block = BasicBlock(32, 32)
    block.attention = nn.Identity()
    with pytest.raises(ValueError, match="of its own that is called attention"):
        attend(block, "eca")
    assert type(block) is BasicBlock and type(block.attention) is nn.Identity


# ---- any module ----


def small():
    torch.manual_seed(0)
    return shake(small_resnet(8, 5)).eval()


IMAGE = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))


def held():
    return attend_modules(small(), ["layer1.0.bn2", "layer2.0.conv2"], "eca")


def pair(network):
    return network.layer1[0].conv2, network.layer1[0].bn2


def script(network):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.jit.script(network)


def ao(network):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.ao.quantization.fuse_modules(network, [["layer1.0.conv2", "layer1.0.bn2"]])


REFUSED = {  # what asks a held layer for its weight: an error at that moment
    "fused": (lambda n: fuse_conv_bn_eval(*pair(n)), AttributeError, "BatchNorm2d together with attention"),
    "fused by ao": (ao, NO_FUSION, "After"),
    "pruned": (lambda n: prune.l1_unstructured(n.layer1[0].bn2, "weight", 0.5), AttributeError, r"`\.layer`"),
    "state": (
        lambda n: torch.func.functional_call(n, n.state_dict(), (IMAGE,)), AttributeError, "named_parameters"
    ),
    "script": (script, RuntimeError, r"torch\.jit\.trace"),
}  # fmt: skip


@pytest.mark.parametrize("how", REFUSED)
def test_what_would_drop_attention_of_a_held_layer_is_refused(how):
    act, error, words = REFUSED[how]
    with pytest.raises(error, match=words):
        act(held())


def test_conversions_reach_a_held_layer_and_leave_attention():
    network = held()
    expected = network(IMAGE)
    synced = nn.SyncBatchNorm.convert_sync_batchnorm(copy.deepcopy(network))
    frozen = timm.layers.freeze_batch_norm_2d(copy.deepcopy(network))
    by_name = dict(network.named_parameters())
    for y in (synced(IMAGE), frozen(IMAGE), torch.func.functional_call(network, by_name, (IMAGE,))):
        assert torch.allclose(y, expected, atol=1e-5)
    assert type(synced.layer1[0].bn2.layer) is nn.SyncBatchNorm


def test_a_held_layer_has_its_stock_names_in_a_state():
    stock, network = small(), held()
    assert set(network.state_dict()) > set(stock.state_dict())
    spoilt = {k: v + 1 for k, v in stock.state_dict().items()}
    report = load_stock(network, spoilt)
    assert set(report.loaded) == set(spoilt) and report.modules == 2
    assert all(torch.equal(network.state_dict()[k], v) for k, v in spoilt.items())


def test_modules_with_other_arguments_and_containers():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(4, 4, 1)

        def forward(self, x, shift, scale=1):
            return self.conv(x) * scale + shift

    class Whole(nn.Module):
        def __init__(self):
            super().__init__()
            self.two = Two()
            self.lists = nn.ModuleList([nn.Conv2d(4, 4, 1)])

        def forward(self, x):
            return self.lists[0](self.two(x, 1.0, scale=2))

    network, x = Whole(), torch.randn(1, 4, 3, 3)
    stock = copy.deepcopy(network)
    attend_modules(network, ["two", "lists.0"], "eca", side="before", example=x)
    assert isinstance(network.two, AttendedModule) and network.two.conv.weight is not None
    first, second = attentions(network).values()
    assert torch.allclose(network(x), stock.lists[0](second(stock.two(first(x), 1.0, scale=2))))
    assert list(attentions(network)) == ["two.attention.before_block", "lists.0.attention"]


# ---- 33 combinations, of which 11 once gave another network without a word ----

FAULTS = {
    "compiled after": lambda n, plain: compiled(plain, n)[1],
    "compiled before": lambda n, plain: compiled(n, plain)[0],
    "deepcopy": lambda n, _: copy.deepcopy(n)(IMAGE),
    "synchronised": lambda n, _: nn.SyncBatchNorm.convert_sync_batchnorm(n)(IMAGE),
    "made anew": lambda n, _: anew(n)(IMAGE),
    "frozen by timm": lambda n, _: timm.utils.freeze(n) or n(IMAGE),
    "export": lambda n, _: torch.export.export(n, (IMAGE,)).module()(IMAGE),
    "fx": lambda n, _: torch.fx.symbolic_trace(n)(IMAGE),
    "fused": lambda n, _: fused(n)(IMAGE),
}


def compiled(*networks):
    torch._dynamo.reset()
    return [torch.compile(n, backend="eager")(IMAGE) for n in networks]


def anew(network):
    for module in list(network.modules()):
        for name, norm in list(module.named_children()):
            if type(norm) is nn.BatchNorm2d:
                made = nn.BatchNorm2d(norm.num_features)
                made.load_state_dict(norm.state_dict())
                setattr(module, name, made.eval())
    return network


def fused(network):
    for block in network.modules():
        if type(block).__name__ == "BasicBlock":
            for i in "12":
                both = getattr(block, f"conv{i}"), getattr(block, f"bn{i}")
                setattr(block, f"conv{i}", fuse_conv_bn_eval(*both))
                setattr(block, f"bn{i}", nn.Identity())
    return network


@torch.no_grad()
@pytest.mark.parametrize("how", FAULTS)
@pytest.mark.parametrize("name", ["scsa", "cbam"])
def test_no_combination_gives_another_network(name, how):
    plain = small()
    network = attend(small(), name)
    expected = network(IMAGE)
    assert not torch.allclose(plain(IMAGE), expected, atol=1e-3)
    assert torch.allclose(FAULTS[how](network, plain), expected, atol=1e-5)


@pytest.mark.parametrize("name", registry.names())
def test_feature_extractors_take_every_mechanism_and_restore_the_mode(name):
    position = "instead_of_conv2" if name == "sk" else "after_block"
    network = models.resnet.ResNet(Bottleneck, [1, 1, 1, 1], num_classes=5)
    network.layer3 = network.layer4 = network.fc = nn.Identity()
    attend(network, name, position=position).eval()
    (placed, *_) = attentions(network)
    extract = create_feature_extractor(network, {placed: "attended", "layer1.0.bn3": "before"})
    assert not network.training and not extract.training and len(attentions(extract)) > 0
    with torch.no_grad():
        seen = extract(IMAGE)
        by_hook = []
        network.get_submodule(placed).register_forward_hook(lambda m, args, y: by_hook.append(y))
        network(IMAGE)
    assert torch.equal(seen["attended"], by_hook[0])


# ---- what one sees ----


def test_hooks_of_the_user_see_the_map_before_and_after():
    network, seen = attend(small(), "eca", position="before_add"), {}
    for name in ("layer1.0.bn2", "layer1.0.attention.after_conv2"):
        network.get_submodule(name).register_forward_hook(lambda m, a, y, name=name: seen.update({name: y}))
    network(IMAGE)
    before, after = seen.values()
    assert torch.equal(network.layer1[0].attention.after_conv2(before), after)


def gradcam():
    "An attended network, its last attention, the map that left it, and Grad-CAM of class 2 by its formula."
    network = attend(small(), "eca", position="before_add")
    layer, seen = network.layer3[0].attention.after_conv2, {}

    def look(module, args, y):
        seen["y"] = y
        y.register_hook(lambda gradient: seen.update(g=gradient))

    layer.register_forward_hook(look)
    network(IMAGE)[:, 2].sum().backward()
    weights = seen["g"].mean((2, 3), keepdim=True)
    return network, layer, seen["y"].detach(), (seen["y"] * weights).sum(1).relu().detach()


def test_captum_sees_the_map_that_the_network_uses():
    attr = pytest.importorskip("captum.attr")
    network, layer, _, expected = gradcam()
    found = attr.LayerGradCam(network, layer).attribute(IMAGE, target=2, relu_attributions=True)
    assert torch.allclose(found[:, 0], expected, atol=1e-5)


def test_grad_cam_sees_the_map_that_the_network_uses():
    cam = pytest.importorskip("pytorch_grad_cam")
    network, layer, expected, _ = gradcam()
    with cam.GradCAM(model=network, target_layers=[layer]) as tool:
        tool(input_tensor=IMAGE, targets=None)
        assert torch.allclose(tool.activations_and_grads.activations[0], expected, atol=1e-5)


# ---- names of 0.1.0 ----


ROWS = [[1, 16, 1, 1], [6, 24, 2, 2]]
FIRST = {
    "resnet": lambda: small_resnet(8, 5),
    "mobilenet": lambda: models.MobileNetV2(5, inverted_residual_setting=ROWS),
    "shufflenet": lambda: models.ShuffleNetV2([2, 1, 1], [24, 48, 96, 192, 256], num_classes=5),
}


@pytest.mark.parametrize(
    ("make", "name", "position"),
    [
        ("resnet", "scsa", "before_last_conv"),
        ("resnet", "cbam", "before_add"),
        ("resnet", "se", "after_block"),
        ("mobilenet", "se", "before_projection"),
        ("mobilenet", "se", "after_projection"),
        ("shufflenet", "eca", "after_branch2"),
    ],
)
def test_states_of_the_first_version_load(make, name, position):
    "It kept attention as a child of the layer it stood at: `layer1.0.bn2.attention.reduce.weight`."
    torch.manual_seed(0)
    network = attend(FIRST[make](), name, position=position)
    found = placements(FIRST[make](), position)
    old, new = network.state_dict(), {}
    for host, placed in zip(found, attentions(network), strict=True):
        for key in [k for k in old if k.startswith(f"{placed}.")]:
            new[f"{host}.attention.{key.removeprefix(placed + '.')}"] = old.pop(key)
    old = {**old, **new}
    assert new and set(old) != set(network.state_dict())
    for load in (nn.Module.load_state_dict, load_stock):
        other = attend(FIRST[make](), name, position=position)
        load(other, old)
        assert all(torch.equal(v, network.state_dict()[k]) for k, v in other.state_dict().items())


# ---- out again ----


@pytest.mark.parametrize("name", ["resnet18", "mobilenet_v2", "shufflenet_v2_x1_0", "timm"])
def test_detached_is_the_stock_network(name):
    stock = timm.create_model("mobilenetv3_small_050") if name == "timm" else build(name, 5)
    network = copy.deepcopy(stock)
    for position in ("before_last_conv", "before_add", "after_block"):
        attend(network, "eca", position=position)
    convolution = next(n for n, m in network.named_modules() if isinstance(m, nn.Conv2d))
    attend_modules(network, convolution, "se")
    assert detach(network) is network and not attentions(network)
    state, expected = network.state_dict(), stock.state_dict()
    assert list(state) == list(expected) and state._metadata == expected._metadata
    assert all(torch.equal(v, expected[k]) for k, v in state.items())
    assert [type(m) for m in network.modules()] == [type(m) for m in stock.modules()]
    attend(network, "eca")


def test_replaced_layers_come_back():
    stock = Bottleneck(32, 8)
    network = attend(copy.deepcopy(stock), "sk", position="instead_of_conv2").double()
    assert not [k for k in network.state_dict() if "conv2.weight" in k]
    detach(network).float()
    assert all(torch.equal(v, stock.state_dict()[k]) for k, v in network.state_dict().items())
    assert torch.equal(network.eval()(X), stock.eval()(X))


# ---- initial gain ----


def test_gain_is_a_factor_behind_the_mechanism_and_no_state():
    for attending in (
        lambda n, **gain: attend(n, "se", position="before_add", **gain),
        lambda n, **gain: attend(n, "se", position="before_last_conv", **gain),
        lambda n, **gain: attend_modules(n, "layer?.0.conv1", "se", **gain),
    ):
        torch.manual_seed(0)
        one = attending(small())
        torch.manual_seed(0)
        seven = attending(small(), gain=7)
        assert list(one.state_dict()) == list(seven.state_dict())
        placed = list(attentions(one).values()), list(attentions(seven).values())
        assert all(a.attention_gain == 1 and b.attention_gain == 7 for a, b in zip(*placed, strict=True))

        def timed(m, args, y):
            return 7 * y

        for module in placed[0]:
            module.register_forward_hook(timed)
        assert torch.allclose(seven(IMAGE), one(IMAGE), atol=1e-5)
        assert torch.equal(torch.fx.symbolic_trace(seven)(IMAGE), seven(IMAGE))


def test_gain_of_one_is_not_computed():
    module, x = registry.create("eca", 8), torch.randn(1, 8, 3, 3)
    module.attention_gain = 1.0
    graph = torch.fx.symbolic_trace(Once(module))
    assert [n.op for n in graph.graph.nodes] == ["placeholder", "call_module", "output"]
    assert torch.equal(graph(x), module(x))


class Once(nn.Module):
    def __init__(self, attention):
        super().__init__()
        self.attention = attention

    def forward(self, x):
        return blocks.call(self.attention, x)


@pytest.mark.parametrize("gain", [0, -1.0, float("nan"), float("inf"), True, "7", None])
def test_wrong_gains(gain):
    network = small()
    with pytest.raises(ValueError, match="gain=.*positive number"):
        attend(network, "se", gain=gain)
    assert not attentions(network)


def test_gain_through_the_builders():
    options = {"attention": "eca", "width": 8, "backbone": "resnet18", "options": {"gain": 4.0}}
    detector = build_detector("retinanet", 3, min_size=64, max_size=64, **options)
    segmenter = build_segmenter("upernet", 3, channels=16, **options)
    for network in (detector, segmenter):
        assert {m.attention_gain for m in attentions(network).values()} == {4.0}


def test_a_gain_alone_scales_the_residual_branch():
    "The control for a mechanism's gain at initialisation: a constant where a mechanism would be."
    plain, scaled = small(), attend(small(), None, position="before_add", gain=0.5)
    scaled.load_state_dict(plain.state_dict())
    block, other = plain.eval().layer1[0], scaled.eval().layer1[0]
    x = torch.rand(1, block.conv1.in_channels, 8, 8)
    branch = block.bn2(block.conv2(torch.relu(block.bn1(block.conv1(x)))))
    torch.testing.assert_close(other(x), torch.relu(x + 0.5 * branch))


@pytest.mark.parametrize("given", [{"gain": 0.5}, {"position": "before_add", "reduction": 4}])
def test_a_gain_alone_needs_a_position_and_takes_no_option(given):
    with pytest.raises(ValueError, match="without a mechanism there are position= and gain= alone"):
        attend(small(), None, **given)
