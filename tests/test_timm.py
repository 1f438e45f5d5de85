"""Where timm has the same module, ours agrees with it; and timm's networks take ours."""

from functools import partial

import pytest
import torch

from scsa_book.attention import registry
from scsa_book.networks.backbone import Stages, dilate
from scsa_book.networks.placement import attend_modules, attentions, load_stock, maps_of

timm = pytest.importorskip("timm")
layers = pytest.importorskip("timm.layers")
CbamModule = pytest.importorskip("timm.layers.cbam").CbamModule


def relative(a, b):
    return float(((a - b).abs().max() / b.abs().max()).detach())


def carried(theirs, ours, words):
    "Load timm's weights into ours: `words` of the names replaced, matrices and 1x1 convolutions reshaped."
    own, state = ours.state_dict(), {}
    for key, value in theirs.state_dict().items():
        for word, mine in words.items():
            key = key.replace(word, mine)
        state[key] = value.reshape(own[key].shape)
    ours.load_state_dict(state)
    return ours


def test_se():
    theirs = layers.SEModule(64, rd_ratio=1 / 16, rd_divisor=1)
    ours = carried(theirs, registry.create("se", 64), {"fc1": "reduce", "fc2": "expand"})
    x = torch.randn(2, 64, 9, 14)
    assert relative(ours(x), theirs(x)) < 1e-6


def test_cbam():
    "Theirs concatenates the mean first and normalises with another momentum, which evaluation does not see."
    theirs = CbamModule(32, rd_ratio=1 / 4, rd_channels=8, mlp_bias=True).eval()
    words = {"fc1": "reduce", "fc2": "expand", "conv.conv": "conv", "conv.bn": "norm"}
    ours = carried(theirs, registry.create("cbam", 32, reduction=4), words).eval()
    with torch.no_grad():
        ours.spatial.conv.weight.copy_(theirs.spatial.conv.conv.weight.flip(1))
    x = torch.randn(2, 32, 9, 14)
    assert relative(ours(x), theirs(x)) < 1e-6


@pytest.mark.parametrize("channels", [16, 64, 128, 2048])
def test_eca_equals_timm(channels):
    theirs = layers.EcaModule(channels)
    ours = registry.create("eca", channels)  # the paper's rule: theirs too, but never below 3
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(2, channels, 9, 14)
    assert relative(ours(x), theirs(x)) < 1e-6


@pytest.mark.parametrize("extent", [0, 2, 4, 8])
def test_parameter_free_ge_equals_timm(extent):
    # Their parameterised forms cannot be built (timm 1.0.31 passes a dictionary's keys as arguments).
    theirs = layers.GatherExcite(64, extent=extent, use_mlp=False)
    ours = registry.create("ge", 64, extent=extent or None)
    x = torch.randn(2, 64, 9, 14)
    assert relative(ours(x), theirs(x)) < 1e-6


@pytest.mark.parametrize("train", [False, True])
def test_sk_equals_timm(train):
    theirs = layers.SelectiveKernel(64, groups=32, rd_channels=32, split_input=False).train(train)
    ours = registry.create("sk", 64).train(train)
    words = {"paths": "branches", ".conv.": ".0.", "attn.bn": "attn.norm", ".bn.": ".1."}
    words |= {"attn.": "selector.", "fc_reduce": "reduce", "fc_select": "expand"}
    carried(theirs, ours, words)
    x = torch.randn(2, 64, 9, 14)
    assert relative(ours(x), theirs(x)) < 1e-5


@pytest.mark.parametrize("train", [False, True])
def test_ca(train):
    "Their default has no biases at all and another width of the bottleneck."
    coord_attn = pytest.importorskip("timm.layers.coord_attn")
    theirs = coord_attn.CoordAttn(64, rd_channels=8, bias=True).train(train)
    words = {"conv1": "reduce", "bn1": "norm", "conv_h": "height", "conv_w": "width"}
    ours = carried(theirs, registry.create("ca", 64).train(train), words)
    x = torch.randn(2, 64, 9, 14)
    assert relative(ours(x), theirs(x)) < 1e-6


@pytest.mark.parametrize("fusion, part", [("add", "shift"), ("mul", "scale")])
def test_gc(fusion, part):
    add = fusion == "add"
    theirs = layers.GlobalContext(64, fuse_add=add, fuse_scale=not add, rd_ratio=1 / 8)
    (theirs.mlp_add if add else theirs.mlp_scale).norm.eps = 1e-5  # the authors'; timm's is 1e-6
    for p in theirs.parameters():
        torch.nn.init.normal_(p, std=0.5)  # their adding branch starts at zero, which anything equals
    words = {"mlp_add.": f"{part}.", "mlp_scale.": f"{part}."}
    words |= {"conv_attn": "mask", "fc1": "reduce", "fc2": "expand"}
    ours = carried(theirs, registry.create("gc", 64, reduction=8, fusion=fusion), words).double()
    x = torch.randn(2, 64, 9, 14, dtype=torch.double)
    assert relative(ours(x), theirs.double()(x)) < 1e-12


@pytest.mark.parametrize("name", registry.names())
def test_networks_of_timm_take_ours(name):
    "timm calls `attn_layer(channels, device=..., dtype=...)`, which is our constructor."
    make = partial(registry.create, name)
    network = timm.create_model("resnet26", num_classes=5, block_args={"attn_layer": make})
    ours = [m for m in network.modules() if isinstance(m, registry.info(name).make)]
    assert len(ours) == 8
    assert network(torch.randn(2, 3, 64, 64)).shape == (2, 5)


def test_networks_of_timm_that_are_not_known_take_ours_by_name():
    network = timm.create_model("convnext_atto", num_classes=5).eval()
    x = torch.randn(1, 3, 64, 64)
    attend_modules(network, "*.conv_dw", "eca")
    attend_modules(network, "stages.[012]", "bam", example=x)
    names = list(attentions(network))
    assert len(names) == 12 + 3 and "stages.0.blocks.0.conv_dw.attention" in names
    assert network.stages[1].attention.after_block.channels == 80
    stock = timm.create_model("convnext_atto", num_classes=5)
    assert set(load_stock(network, stock.state_dict()).loaded) == set(stock.state_dict())
    assert set(maps_of(network, x)) == set(names)
    assert network(x).shape == (1, 5)


def on_paper(name):
    with torch.device("meta"):
        return timm.create_model(name, num_classes=5)


@pytest.mark.parametrize("name", ["resnet50", "resnet50d", "resnetaa50", "resnetblur50"])
def test_strides_of_residual_networks_of_timm(name):
    "Their strides are those of convolutions, mean poolings or blurs."
    stages = Stages(on_paper(name))
    maps = stages(torch.empty(1, 3, 64, 96, device="meta"))
    assert stages.strides == [4, 8, 16, 32] and stages.widths == [u.shape[1] for u in maps]
    assert [tuple(u.shape[2:]) for u in maps] == [(64 // s, 96 // s) for s in stages.strides]


@pytest.mark.parametrize(
    ("name", "where"),
    [
        ("resnet50d", r"layer3.0.downsample.0 \(AvgPool2d\)"),
        ("resnetaa50", r"layer3.0.aa \(AvgPool2d\)"),
        ("resnetblur50", r"layer3.0.aa \(BlurPool2d\)"),
    ],
)
def test_a_pooling_cannot_be_dilated(name, where):
    with pytest.raises(ValueError, match=f"{where} has the stride 2.* whose convolutions have the strides"):
        dilate(on_paper(name))
    assert Stages(dilate(on_paper("resnet50"))).strides == [4, 8, 8, 8]
