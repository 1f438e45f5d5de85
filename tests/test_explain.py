"""What looks at attention: against scikit-learn, against closed forms, and what bad input gets."""

import math
from importlib.util import find_spec

import matplotlib.pyplot as plt
import pytest
import torch
from PIL import Image
from torch import nn

from scsa_book import cli
from scsa_book.attention import registry
from scsa_book.explain.browser import maps_model
from scsa_book.explain.cam import check_layer, class_map
from scsa_book.explain.descriptors import descriptor_maps
from scsa_book.explain.faithfulness import blurred, curves, randomised, rank_correlation, ranking
from scsa_book.explain.gates import GateMoments, fold, gates_of
from scsa_book.explain.initial_gain import initial_gain
from scsa_book.explain.localisation import (
    Claim,
    auroc,
    energy_inside,
    paired_claim,
    points_inside,
    regions,
)
from scsa_book.explain.maps import attention_map, draw_over, photograph, save_png, spatial_map
from scsa_book.explain.mechanisms import fact
from scsa_book.explain.receptive_field import contributions, drawn_sides, profile, side_length
from scsa_book.explain.runs import show_gates
from scsa_book.networks.build import build
from scsa_book.networks.placement import attend, attend_modules, attentions, detach, maps_of
from scsa_book.paths import DataError, embedded
from scsa_book.training.measured import hits, in_words, measured, photographs, run_images
from scsa_book.training.trained import from_file, from_name, trained_networks


def test_auroc_is_that_of_scikit_learn():
    metrics = pytest.importorskip("sklearn.metrics")
    rng = torch.Generator().manual_seed(0)
    for case in range(100):
        values = torch.randn(8, 9, generator=rng) * 10.0 ** (case % 7 - 3)
        if case % 3 == 0:
            values = values.round()  # ties
        mask = (torch.rand(8, 9, generator=rng) < 0.3).int()
        expected = metrics.roc_auc_score(mask.flatten(), values.flatten())
        assert auroc(values, mask) == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("score", [auroc, energy_inside, points_inside])
@pytest.mark.parametrize(
    ("values", "mask", "said"),
    [
        (torch.ones(4, 4), torch.zeros(4, 4, dtype=torch.int), "nothing or everything"),
        (torch.ones(4, 4), torch.ones(4, 4, dtype=torch.int), "nothing or everything"),
        (torch.ones(4, 4), torch.full((4, 4), 2), "zeros and ones"),
        (torch.full((4, 4), torch.nan), torch.eye(4, dtype=torch.int), "finite"),
        (torch.ones(1, 4, 4), torch.eye(4, dtype=torch.int), "height, width"),
    ],
)
def test_a_map_or_mask_that_cannot_be_scored_is_named(score, values, mask, said):
    with pytest.raises(ValueError, match=said):
        score(values, mask)


def test_claims_need_pairs_and_are_the_same_again():
    with pytest.raises(ValueError, match="two or more"):
        paired_claim([1.0], [0.0])
    a, b = torch.rand(2, 30, generator=torch.Generator().manual_seed(0)).tolist()
    assert paired_claim(a, b) == paired_claim(a, b)
    assert paired_claim(a, a).verdict == "inconclusive"


@pytest.mark.parametrize("shape", [(6, 4, 1, 1), (6, 1, 3, 5), (6, 4, 3, 5)])
def test_shares_are_the_closed_form(shape):
    "A two-way table: the sums of squares of an analysis of variance."
    g = torch.rand(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    moments = GateMoments()
    for part in g.split(4):
        moments.add(part)
    found, mean = moments.shares(), g.mean()
    assert found.variance == pytest.approx(float(((g - mean) ** 2).mean()))
    channel = ((g.mean((0, 2, 3)) - mean) ** 2).mean()
    position = ((g.mean((0, 1)) - mean) ** 2).mean()
    assert found.channel * found.variance == pytest.approx(float(channel), abs=1e-12)
    assert found.position * found.variance == pytest.approx(float(position), abs=1e-12)
    assert sum(found[1:]) == pytest.approx(1)


def test_a_gate_of_constants_has_no_image_share_and_folds_to_itself():
    torch.manual_seed(0)
    attention = registry.create("se", 8, reduction=2)
    for name, parameter in attention.named_parameters():
        if name.startswith("expand.weight"):
            nn.init.zeros_(parameter)
        elif name.startswith("expand"):
            nn.init.normal_(parameter)
    network, x = nn.Sequential(nn.Conv2d(3, 8, 3), attention), torch.randn(5, 3, 9, 9)
    before, moments = network(x), gates_of(network, x.split(2))
    assert moments["1"]["channel"].shares().image == pytest.approx(0, abs=1e-12)
    torch.testing.assert_close(fold(network, moments)(x), before)


def a_network(name, **options):
    "ResNet-8 with a mechanism before the last convolution, in evaluation mode."
    torch.manual_seed(0)
    return attend(build("resnet8", 10), name, position="before_last_conv", **options).eval()


GATED = [name for name in registry.names() if fact(name).gates]


@pytest.mark.parametrize("name", GATED)
def test_gates_of_one_image_fold_to_the_network_itself(name):
    "The mean over one image is its own gate, whatever a mechanism does with its factors."
    narrow = {"sa": {"groups": 8}, "sge": {"groups": 8}, "ema": {"factor": 8}}
    network = a_network(name, **narrow.get(name, {}))
    x = torch.randn(1, 3, 16, 16)
    before = network(x)
    torch.testing.assert_close(fold(network, gates_of(network, [x]))(x), before, rtol=1e-4, atol=1e-5)


def test_a_mechanism_inside_another_is_a_part_of_it():
    assert [sorted(found) for found in gates_of(a_network("scsa"), [torch.randn(2, 3, 16, 16)]).values()] == [
        ["channel", "height", "width"]
    ] * 3


def test_folded_attention_keeps_its_gain_and_shows_its_constants():
    network, x = a_network("cbam", gain=3.0), torch.randn(1, 3, 16, 16)
    before, maps = network(x), maps_of(network, x)
    fold(network, gates_of(network, [x]))
    torch.testing.assert_close(network(x), before, rtol=1e-4, atol=1e-5)
    found = maps_of(network, torch.cat([x, 2 * x]))
    assert list(found) == list(maps) and attention_map(network, x).shape == (1, 4, 4)
    for name, factors in maps.items():
        for factor, expected in factors.items():
            torch.testing.assert_close(found[name][factor], expected.expand(2, -1, -1, -1))
    with pytest.raises(ValueError, match=r"layer1\S+ was never called: no images, or its gates are"):
        gates_of(network, [x])
    assert not attentions(detach(network))


def test_a_record_of_folded_attention_takes_every_batch():
    network, (x, *more) = a_network("cbam"), (torch.randn(n, 3, 16, 16) for n in (2, 1, 5))
    fold(network, gates_of(network, [x]))
    batch = {0: torch.export.Dim("batch", min=1)}
    exported = torch.export.export(network, (x,), dynamic_shapes=(batch,)).module()
    for record in (exported, torch.jit.trace(network, x)):
        for other in more:
            torch.testing.assert_close(record(other), network(other), rtol=1e-4, atol=1e-5)


def test_gates_of_restores_the_mode_and_removes_its_hooks():
    network = nn.Sequential(nn.Conv2d(3, 8, 3), registry.create("se", 8, reduction=2)).train()
    gates_of(network, [torch.randn(2, 3, 9, 9)])
    assert network.training and not network[1]._forward_pre_hooks


def test_a_network_without_gates_is_named():
    with pytest.raises(ValueError, match="contains no attention"):
        gates_of(nn.Sequential(nn.Conv2d(3, 8, 3)), [])
    with pytest.raises(ValueError, match=r"\(NonLocal\)"):
        gates_of(nn.Sequential(registry.create("non_local", 8)), [])


@pytest.mark.parametrize(("kernel", "dilation", "side"), [(3, 1, 3), (5, 1, 5), (3, 2, 5), (3, 3, 7)])
def test_known_fields_are_exact(kernel, dilation, side):
    conv = nn.Conv2d(2, 3, kernel, padding=dilation * (kernel // 2), dilation=dilation, bias=False)
    nn.init.ones_(conv.weight)
    a = contributions(nn.Sequential(conv), [torch.rand(2, 2, 13, 13)], "0")
    assert side_length(a, 1) == side
    assert int((a > 0).sum()) == kernel**2


def test_contributions_leave_the_network_as_it_was():
    network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)).train()
    state = {k: v.clone() for k, v in network.state_dict().items()}
    contributions(network, [torch.randn(2, 3, 9, 9)], "1")
    assert network.training and not network[1]._forward_hooks
    assert all(p.grad is None for p in network.parameters())
    for name, value in network.state_dict().items():
        assert torch.equal(value, state[name]), name


@pytest.mark.parametrize(
    ("layer", "images", "said"),
    [
        ("9", [torch.randn(1, 3, 9, 9)], "unknown layer '9'"),
        ("2", [torch.randn(1, 3, 9, 9)], "no map"),
        ("0", [], "no images"),
        ("0", [torch.randn(1, 3, 9, 9), torch.randn(1, 3, 8, 8)], "after"),
    ],
)
def test_a_field_that_cannot_be_measured_is_named(layer, images, said):
    network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    with pytest.raises(ValueError, match=said):
        contributions(network, images, layer)


def test_equal_values_are_not_ranked_by_where_they_stand():
    order = ranking(torch.ones(1, 1), (8, 8))
    assert sorted(order.tolist()) == list(range(64)) and order.tolist() != list(range(64))
    assert torch.equal(order, ranking(torch.ones(1, 1), (8, 8)))


@pytest.mark.parametrize("side", [1, 2, 16, 64])
def test_any_image_can_be_blurred(side):
    assert blurred(torch.rand(3, side, side)).shape == (3, side, side)


def test_curves_begin_and_end_at_the_two_images():
    image = torch.rand(3, 8, 8)
    found = curves(lambda x: x.mean((1, 2, 3)), image, torch.rand(4, 4), steps=7, batch=3)
    assert len(found.insertion) == len(found.deletion) == 8
    assert float(found.insertion[-1]) == pytest.approx(float(image.mean()), rel=1e-6)
    assert float(found.deletion[0]) == pytest.approx(float(image.mean()), rel=1e-6)
    assert float(found.deletion[-1]) == 0


def test_more_steps_than_pixels_are_refused():
    with pytest.raises(ValueError, match="number of pixels, 4"):
        curves(lambda x: x.sum((1, 2, 3)), torch.rand(1, 2, 2), torch.rand(2, 2), steps=5)


def test_impossible_numbers_are_refused():
    with pytest.raises(ValueError, match="curves: batch=0 must be a positive integer"):
        curves(lambda x: x.sum((1, 2, 3)), torch.rand(1, 2, 2), torch.rand(2, 2), steps=2, batch=0)
    for name in ("seeds", "side", "channels"):
        with pytest.raises(ValueError, match=f"initial_gain: {name}=0 must be a positive integer"):
            initial_gain("se", **{name: 0})


def test_an_unknown_category_is_refused():
    with pytest.raises(ValueError, match="unknown category 'dogg'. Did you mean 'dog'"):
        next(photographs("dogg"))


def test_randomised_leaves_the_random_state_alone():
    network = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    torch.manual_seed(3)
    expected = torch.rand(2)
    torch.manual_seed(3)
    drawn = [torch.rand(1) for _ in randomised(network)]
    assert torch.equal(torch.cat(drawn), expected)
    assert not torch.equal(network[0].weight, network[1].weight)


@pytest.mark.parametrize("name", registry.names())
def test_the_registry_states_the_initial_gain(name):
    options = {"sa": {"groups": 8, "shuffle": False}, "sge": {"groups": 8}}.get(name, {})
    assert initial_gain(name, **options) == pytest.approx(registry.INITIAL_GAINS[name], abs=0.03)


# ---- Grad-CAM, and maps over photographs

needs_grad_cam = pytest.mark.skipif(find_spec("pytorch_grad_cam") is None, reason="grad-cam is not installed")


@needs_grad_cam
@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("side", ["before", "after"])
def test_grad_cam_is_the_equation_on_either_side_of_attention(side, inplace):
    "Also if a ReLU that follows works in place, which changes what the package has kept."
    torch.manual_seed(0)
    attention = registry.create("cbam", 8, reduction=2, kernel=3)
    head = nn.Linear(8, 1)
    network = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1),
        attention,
        nn.ReLU(inplace=inplace),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        head,
    ).eval()
    x, kept = torch.randn(1, 3, 8, 8), {}
    module = attention if side == "after" else network[0]
    handle = module.register_forward_hook(lambda _, __, y: kept.update(y=y.clone()))
    found = class_map(network, x, "1", side=side, classes=[0])[0]
    handle.remove()
    y = kept["y"].detach().requires_grad_()
    rest = network[2:] if side == "after" else network[1:]
    (gradient,) = torch.autograd.grad(rest(y.clone()).sum(), y)
    expected = (gradient.mean((2, 3), keepdim=True) * y).sum(1)[0].clamp(min=0).detach()
    expected = (expected - expected.min()) / (expected.max() - expected.min())
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


@needs_grad_cam
def test_grad_cam_leaves_modes_and_gradients_alone():
    network = a_network("se").train()
    network.bn1.eval()
    for parameter in network.parameters():
        parameter.grad = torch.ones_like(parameter)
    state = {name: value.clone() for name, value in network.state_dict().items()}
    class_map(network, torch.randn(1, 3, 16, 16), "layer2")
    assert network.training and not network.bn1.training
    assert all(torch.equal(p.grad, torch.ones_like(p)) for p in network.parameters())
    assert all(torch.equal(value, state[name]) for name, value in network.state_dict().items())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in network.modules())


@needs_grad_cam
def test_grad_cam_needs_no_parameter_with_a_gradient():
    network, x = a_network("se"), torch.randn(2, 3, 16, 16)
    expected = class_map(network, x, "layer2")
    found = class_map(network.requires_grad_(False), x, "layer2")
    assert expected.max() > 0 and torch.equal(found, expected)


@needs_grad_cam
@pytest.mark.parametrize(
    ("how", "said"),
    [
        ({"layer": "layer9"}, "unknown layer 'layer9'. Did you mean 'layer"),
        ({"layer": "layer1.0.attention"}, "unknown layer"),  # a container that is never called
        ({"layer": "fc"}, "unknown layer 'fc'"),  # no map
        ({"layer": "layer2", "side": "inside"}, "unknown side"),
        ({"layer": "layer2", "classes": [10]}, "class 10 is none of 0 to 9"),
        ({"layer": "layer2", "classes": [1, 2]}, "2 classes for 1 images"),
        ({"layer": "layer2", "method": "Grad"}, "unknown method 'Grad'"),
        ({"layer": "layer2", "method": "AblationCAM"}, "unknown method 'AblationCAM'"),
        ({"layer": "layer2", "method": "RefineCAM"}, "unknown method 'RefineCAM'"),
        ({"layer": "layer2", "classes": [1.5]}, "class 1.5 is no integer"),
        ({"layer": "layer2", "x": torch.randn(0, 3, 16, 16)}, r"at least one image, got \(0, 3, 16, 16\)"),
        ({"layer": "layer2", "x": torch.randn(1, 3, 16, 16).bfloat16()}, "no bfloat16: pass x.float"),
    ],
)
def test_a_class_map_that_cannot_be_made_is_named(how, said):
    with pytest.raises(ValueError, match=said):
        class_map(a_network("se"), **{"x": torch.randn(1, 3, 16, 16), **how})


class Failing(nn.Module):
    "Looks up a class that there is not, where gradients are computed."

    def forward(self, x):
        return x.mean((2, 3))[:, [0, 1, 9] if x.grad_fn else [0, 1]]


@needs_grad_cam
def test_an_index_error_of_a_network_is_raised():
    "grad-cam prints it, and its context returns nothing."
    network = nn.Sequential(nn.Conv2d(3, 4, 3), Failing())
    with pytest.raises(RuntimeError, match="GradCAM failed: index 9 is out of bounds"):
        class_map(network, torch.randn(1, 3, 8, 8), "0", classes=[0])


@needs_grad_cam
def test_gradients_are_computed_in_inference_mode_too():
    network, x = a_network("se"), torch.randn(1, 3, 16, 16)
    expected = class_map(network, x, "layer2"), contributions(network, [x], "layer2")
    with torch.inference_mode():
        found = class_map(network, x + 0, "layer2"), contributions(network, [x + 0], "layer2")
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize("look", [gates_of, lambda n, images: contributions(n, images, "layer2")])
def test_layers_in_evaluation_mode_stay_in_it(look):
    network = a_network("se").train()
    network.layer1.eval()
    look(network, [torch.randn(2, 3, 16, 16)])
    assert network.training and not any(m.training for m in network.layer1.modules())


def test_an_image_too_small_for_any_map_is_named():
    network = nn.Sequential(nn.Conv2d(3, 4, 3, stride=2), nn.Flatten())
    with pytest.raises(ValueError, match="no map with more than one position for 3 x 4 pixels"):
        check_layer(network, torch.randn(1, 3, 3, 4), "0")


def saved(folder, mode, size):
    path = folder / f"{mode}.png"
    Image.new(mode, size, 128).save(path)
    return path


@pytest.mark.parametrize("mode", ["L", "LA", "RGBA", "P", "1", "I;16"])
def test_a_photograph_of_any_mode_becomes_rgb(mode, tmp_path):
    x = photograph(saved(tmp_path, mode, (20, 10)), 8)
    assert x.shape == (3, 8, 16) and 0 <= float(x.min()) and float(x.max()) <= 1


def test_what_is_no_photograph_is_named(tmp_path):
    with pytest.raises(ValueError, match="L.png has 1 x 1 pixels"):
        photograph(saved(tmp_path, "L", (1, 1)))
    (tmp_path / "text.jpg").write_text("no image")
    with pytest.raises(DataError, match="cannot decode text.jpg"):
        photograph(tmp_path / "text.jpg")
    for path in (tmp_path / "away.jpg", tmp_path):
        with pytest.raises(ValueError, match="there is no such file"):
            photograph(path)


def test_a_map_of_strips_is_their_product():
    height, width = torch.rand(2, 4, 3, 1), torch.rand(2, 4, 1, 5)
    found = spatial_map({"height": height, "width": width, "channel": torch.rand(2, 4, 1, 1)})
    torch.testing.assert_close(found, height.mean(1) * width.mean(1))


@pytest.mark.parametrize(
    ("name", "layer", "said"),
    [
        (None, None, "no attention here"),
        ("se", None, r"\(SE\): no factor differs between positions: channel \(1, 64, 1, 1\)"),
        ("cbam", "layer9", "no attention at 'layer9'; there is layer1.0.attention"),
    ],
)
def test_a_network_without_a_map_is_named(name, layer, said):
    network = a_network(name) if name else build("resnet8", 10)
    with pytest.raises(ValueError, match=said):
        attention_map(network, torch.randn(1, 3, 16, 16), layer)


def test_placed_modules_without_maps_are_passed_over():
    "A module of another library, and a factor alone."
    network, x = attend_modules(build("resnet8", 10), "conv1", Closed), torch.randn(1, 3, 16, 16)
    with pytest.raises(ValueError, match="Closed here, and no maps"):
        maps_of(network, x)
    maps = maps_of(attend(network, "cbam"), x)
    assert list(maps) == [n for n in attentions(network) if n != "conv1.attention"]
    with pytest.raises(ValueError, match="Identity here, and no maps"):
        maps_of(attend(build("resnet8", 10), None, position="after_conv2", gain=0.5), x)


class Closed(nn.Module):
    def __init__(self, channels):
        super().__init__()

    def forward(self, x):
        return x / 2


def test_a_png_needs_a_name_in_a_folder(tmp_path):
    for path, said in ((tmp_path / "no/a.png", "there is no folder .*no"), (tmp_path, "this is a folder")):
        with pytest.raises(ValueError, match=said):
            save_png(draw_over(torch.rand(3, 8, 8), {}), path)
    plt.close("all")


def test_a_png_is_written_whole_or_not_at_all(tmp_path, monkeypatch):
    image = torch.rand(3, 8, 8)
    path = save_png(draw_over(image, {"map": torch.rand(2, 2)}), tmp_path / "a.png")
    before = path.read_bytes()
    assert before[:4] == b"\x89PNG" and [p.name for p in tmp_path.iterdir()] == ["a.png"]

    def full(*_):
        raise OSError("no space left on device")

    monkeypatch.setattr("os.replace", full)
    with pytest.raises(OSError, match="no space"):
        save_png(draw_over(image, {}), path)
    assert path.read_bytes() == before and [p.name for p in tmp_path.iterdir()] == ["a.png"]


# ---- networks to look at


def test_the_file_of_a_run_gives_its_network():
    looked = from_file(embedded("networks") / "fashion-mnist.safetensors")
    assert (looked.attention, looked.dataset, len(looked.mean)) == ("scsa", "fashion-mnist", 1)
    assert looked.prepare(torch.rand(2, 3, 28, 28)).shape == (2, 1, 28, 28)
    assert not looked.network.training


def test_what_a_network_gets_is_normalised():
    looked = from_name("resnet8", "se", classes=10)
    mean, std = (torch.tensor(v).view(1, 3, 1, 1) for v in (looked.mean, looked.std))
    x = torch.rand(1, 3, 4, 4)
    torch.testing.assert_close(looked.prepare(x), (x - mean) / std)


def test_a_network_that_is_not_there_is_named(tmp_path):
    with pytest.raises(ValueError, match="Did you mean 'resnet8'"):
        from_name("resnet9")
    with pytest.raises(ValueError, match="there is no such file"):
        from_file(tmp_path / "no.pth")
    with pytest.raises(ValueError, match="no position 'nowhere'"):
        from_name("resnet8", "se", position="nowhere", classes=10)
    with pytest.raises(ValueError, match="kept networks 'cifar10'. Did you mean 'cifar100'"):
        trained_networks("cifar10")
    with pytest.raises(ValueError, match="position='after_conv2', heads=0 without attention"):
        from_name("resnet8", position="after_conv2", heads=0)


def test_a_network_by_its_name_draws_from_its_own_seed():
    torch.manual_seed(5)
    expected = torch.rand(2)
    torch.manual_seed(5)
    one, other = (from_name("resnet8", classes=4).network.state_dict() for _ in range(2))
    assert torch.equal(torch.rand(2), expected) and all(torch.equal(v, other[k]) for k, v in one.items())


@pytest.mark.parametrize(
    ("x", "said"),
    [
        (torch.zeros(1, 3, 8, 8, dtype=torch.uint8), r"got torch.uint8: x.float\(\) / 255"),
        (torch.zeros(3, 8, 8), r"\(B, 3, H, W\) or \(B, 1, H, W\), got \(3, 8, 8\)"),
        (torch.zeros(1, 4, 8, 8), r"got \(1, 4, 8, 8\)"),
    ],
)
def test_images_that_a_network_does_not_take_are_named(x, said):
    with pytest.raises(ValueError, match=said):
        from_name("resnet8", classes=4).prepare(x)


# ---- the command


@needs_grad_cam
@pytest.mark.parametrize("attention", ["cbam", "none"])
def test_see_cam_writes_one_file(attention, tmp_path, capsys):
    image = saved(tmp_path, "RGBA", (40, 30))
    with pytest.raises(SystemExit) as end:
        cli.main(["see", "cam", "--image", str(image), *f"--network resnet8 --attention {attention}".split()])
    assert end.value.code == 0
    assert capsys.readouterr().out.strip() == str(tmp_path / "RGBA-cam.png")
    assert Image.open(tmp_path / "RGBA-cam.png").format == "PNG"
    assert len(list(tmp_path.iterdir())) == 2


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "which network?"),
        (["--weights", "no.pth"], "there is no such file"),
        (["--weights", "no.pth", "--attention", "se"], "--weights alone"),
        (["--network", "resnet9"], "unknown network"),
        (["--network", "resnet8", "--output", "nowhere/a.png"], "there is no folder nowhere"),
    ],
)
def test_see_cam_says_what_is_missing(arguments, said, tmp_path, capsys):
    with pytest.raises(SystemExit) as end:
        cli.main(["see", "cam", "--image", str(saved(tmp_path, "L", (9, 9))), *arguments])
    assert end.value.code == 2 and said in capsys.readouterr().err
    assert len(list(tmp_path.iterdir())) == 1


def test_see_cam_does_not_write_over_the_photograph(tmp_path, capsys):
    image = saved(tmp_path, "RGB", (40, 30))
    before, arguments = image.read_bytes(), ["--network", "resnet8", "--output", str(image)]
    with pytest.raises(SystemExit) as end:
        cli.main(["see", "cam", "--image", str(image), *arguments])
    assert end.value.code == 2 and "is the photograph itself" in capsys.readouterr().err
    assert image.read_bytes() == before


# ---- what the pages measure with


def test_regions_are_counted_with_corners_and_by_the_maximum():
    values = torch.zeros(6, 6)
    values[0, 0], values[1, 1], values[4, 4], values[0, 5] = 1.0, 0.6, 0.9, 0.4
    assert [regions(values), regions(values, 0.3), regions(7 * values)] == [2, 3, 2]
    with pytest.raises(ValueError, match="level=0"):
        regions(values, 0)


def test_the_rank_correlation_is_that_of_the_order():
    values = torch.rand(5, 5, generator=torch.Generator().manual_seed(0))
    assert rank_correlation(values, values.exp()) == pytest.approx(1)
    assert rank_correlation(values, -values) == pytest.approx(-1)
    assert math.isnan(rank_correlation(values, torch.ones(5, 5)))
    with pytest.raises(ValueError, match="cannot be compared"):
        rank_correlation(values, torch.rand(4, 4))


def test_drawn_sides_of_equal_photographs_are_the_side():
    a = torch.zeros(11, 11)
    a[3:8, 3:8] = 1
    by_image = profile(a).expand(7, -1)
    for share in (0.04, 0.36, 1):
        assert drawn_sides(by_image, share, draws=5).unique().tolist() == [side_length(a, share)]


def test_drawn_sides_vary_with_the_photographs_and_not_with_the_call():
    a, b = torch.zeros(2, 6, dtype=torch.float64)
    a[0], b[5] = 1, 1
    found = drawn_sides(torch.stack([a, b, b]), 0.5, draws=200)
    assert set(found.tolist()) == {1, 11}
    assert torch.equal(found, drawn_sides(torch.stack([a, b, b]), 0.5, draws=200))


def test_every_own_parameter_is_randomised():
    network = a_network("sa", groups=4)
    for parameter in network.parameters():
        nn.init.normal_(parameter)
    before = {name: value.clone() for name, value in network.named_parameters()}
    list(randomised(network))
    assert [n for n, p in network.named_parameters() if p.numel() > 8 and torch.equal(p, before[n])] == []


def test_descriptors_are_those_that_the_module_adds():
    network, x = a_network("cat"), torch.randn(2, 3, 16, 16)
    cat = network.layer1[0].attention["after_conv1"]
    kept = {}
    handle = cat.register_forward_pre_hook(lambda _, args: kept.update(u=args[0]))
    found = descriptor_maps(network, x)["layer1.0.attention.after_conv1"]
    handle.remove()
    torch.testing.assert_close(found["-S_avg"], -kept["u"].mean(1))
    torch.testing.assert_close(found["sum"], found["-S_avg"] + found["S_max"] + found["S_ent"])
    torch.testing.assert_close(found["trained gate"], cat.spatial(kept["u"]).sigmoid()[:, 0])
    assert not any(m._forward_pre_hooks for m in network.modules())
    with pytest.raises(ValueError, match="no CAT"):
        descriptor_maps(a_network("se"), x)


def test_photographs_have_masks_that_are_neither_empty_nor_full():
    first = next(photographs("dog"))
    assert "dog" in first.categories and first.image.shape == (3, 112, 112) and "http" in first.credit
    assert 0.01 <= float(first.mask.float().mean()) <= 0.99 and set(first.mask.unique().tolist()) == {0, 1}


def test_the_images_of_a_run_are_those_that_it_was_tested_on():
    looked = from_file(embedded("networks") / "fashion-mnist.safetensors")
    right = hits(looked, run_images(looked, 2000))
    assert len(right) == 2000 and 100 * sum(right) / 2000 == pytest.approx(looked.run.final["top1"], abs=0.06)
    with pytest.raises(ValueError, match="made by no run"):
        next(run_images(from_name("resnet8", classes=10), 2))


def test_what_was_measured_is_read_and_what_was_not_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr("scsa_book.training.measured.results_folder", lambda name: tmp_path)
    with pytest.raises(FileNotFoundError, match="-p measure True"):
        measured("page", lambda: 1)
    assert measured("page", lambda: {"a": [1 / 3]}, again=True) == {"a": [0.333333]}
    assert measured("page", lambda: 1 / 0) == {"a": [0.333333]}
    with pytest.raises(FileNotFoundError, match=r"page-cifar100.json .*page.ipynb .* -p dataset cifar100"):
        measured("page", lambda: 1, dataset="cifar100")


@pytest.mark.parametrize(
    ("ends", "verdict"),
    [((0.1, 0.3), "holds"), ((-0.3, -0.1), "does not hold"), ((-0.1, 0.3), "inconclusive")],
)
def test_a_sentence_has_the_verdict_of_its_interval(ends, verdict):
    said = in_words("a exceeds b", Claim(12, sum(ends) / 2, *ends))
    assert f"**{verdict}**" in said and "n = 12" in said and f"({ends[0]:+.3f} to {ends[1]:+.3f})" in said
    assert "**inconclusive**" in in_words("a exceeds b", None)


@pytest.mark.parametrize("name", registry.names())
def test_the_page_of_a_run_shows_the_maps_of_every_mechanism(name):
    options = {"groups": 4} if name in ("sge", "sa") else {"factor": 4} if name == "ema" else {}
    network = attend(build("resnet8", 10), name, **options).eval()
    image = torch.rand(3, 24, 24)
    modules = maps_of(network, image[None])
    show_gates(modules, image)
    grid = plt.gcf().axes[: (1 + len(modules)) * len(next(iter(modules.values())))]
    columns = [grid[i :: 1 + len(modules)] for i in range(1, 1 + len(modules))]
    for axes, maps in zip(columns, modules.values(), strict=True):
        for axis, (factor, weights) in zip(axes, maps.items(), strict=True):
            bars, values = [bar.get_height() for bar in axis.patches], weights[0]
            drawn = torch.tensor(bars) if bars else torch.from_numpy(axis.get_images()[0].get_array().data)
            expected = values.flatten() if bars else values.reshape(-1, *values.shape[-2:]).mean(0)
            assert axis.get_ylabel() == factor and torch.equal(drawn, expected)
    plt.close("all")


def test_a_model_for_the_browser_holds_no_line_of_source():
    "What is published names neither files nor code of the machine that built it."
    pytest.importorskip("onnxscript")
    model = maps_model(from_name("resnet8", "cbam", position="before_last_conv", classes=10), side=32)
    assert b"stage3" in model and b'.py", line' not in model
