"""Networks of the authors: recorded outputs, files as people have them, guessed names, and back again."""

import importlib.util
import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT
from safetensors.torch import save_file
from torch import nn

from scsa_book.networks import authors
from scsa_book.networks.authors_parts import dct_patterns, frequencies_of
from scsa_book.networks.build import shapes_only
from scsa_book.networks.placement import attentions
from scsa_book.networks.trunks import Design, SelectiveConv, Trunk, mobile_trunk, reaches
from scsa_book.networks.weights_file import WeightsError

RECORDS = Path(os.environ.get("SCSA_BOOK_GOLDEN_NETWORKS", ROOT / "tests" / "golden-networks"))
spec = importlib.util.spec_from_file_location("formula", RECORDS / "formula.py")
formula = importlib.util.module_from_spec(spec)
spec.loader.exec_module(formula)

SIDES = {"scsa_resnet50": 224, "ge_theta_wrn16_2": 32, "ge_theta_plus_e2_wrn16_2": 32}


def record(name):
    return np.load(RECORDS / f"{name}.npz")


def their_state(name):
    r = record(name)
    return formula.state(r["names"], r["shapes"], r["kinds"])


def loaded(name):
    network = authors.build(name)
    network.load_state_dict(authors.convert(their_state(name), name))
    return network.eval()


def image(name):
    return formula.picture(24, 512) if name == "danet_head" else formula.picture(SIDES.get(name, 96))


def apart(a, b):
    "Largest difference, relative to the largest value."
    a, b = np.asarray(a, dtype=np.float64), np.asarray(b, dtype=np.float64)
    return np.abs(a - b).max() / np.abs(b).max()


def small_state(name, **options):
    "A state dict of theirs with random values."
    torch.manual_seed(0)
    return authors.to_authors(authors.build(name, **options), name)


# --- recorded outputs


@pytest.mark.parametrize("name", sorted(path.stem for path in RECORDS.glob("*.npz")))
def test_outputs_and_gradients_are_those_of_the_authors(name):
    r, network, x = record(name), loaded(name), image(name).requires_grad_()
    y = network(x)[0]
    assert apart(y.detach(), r["y"]) <= 1e-5
    (y * formula.cotangent(y.shape)).sum().backward()
    if "grad" in r:
        assert apart(x.grad[0], r["grad"]) <= 1e-4
    assert sum(p.numel() for p in network.parameters()) == json.loads(str(r["meta"]))["parameters"]
    back = authors.to_authors(network, name)
    assert set(back) == set(map(str, r["names"]))
    assert all(torch.equal(back[k], v) for k, v in their_state(name).items())


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(path.stem for path in RECORDS.glob("*.npz")))
def test_outputs_in_double_precision_are_those_of_the_authors(name):
    r, network = record(name), loaded(name).double()
    with torch.no_grad():
        assert apart(network(image(name).double())[0], r["y64"]) <= 1e-12
        if "y224" in r:
            assert apart(network.float()(formula.picture(224))[0], r["y224"]) <= 1e-5


# --- timm


def timm_names():
    return [name for name in authors.names() if name.startswith("timm_")]


QUICK = ("skresnet18", "gcresnext26ts", "legacy_seresnet18", "seresnext26t_32x4d", "eca_resnext26ts")


def as_timm(name):
    timm = pytest.importorskip("timm")
    return timm.create_model(name.removeprefix("timm_"))


@pytest.mark.parametrize("name", [f"timm_{name}" for name in QUICK])
def test_timm_gives_the_same_outputs(name):
    torch.manual_seed(0)
    theirs = as_timm(name).eval()
    for module in theirs.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.uniform_(module.running_var, 0.5, 1.5)
            nn.init.normal_(module.running_mean, std=0.1)
    ours = authors.build(name)
    ours.load_state_dict(authors.convert(theirs.state_dict(), name))
    x = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        assert apart(ours.eval()(x), theirs(x)) <= 1e-5
    assert authors.guess(theirs.state_dict()) == name


@pytest.mark.slow
def test_timm_has_the_same_names_and_shapes():
    for name in timm_names():
        with shapes_only():
            theirs = as_timm(name).state_dict()
            ours = authors.to_authors(authors.build(name), name)
        assert {k: v.shape for k, v in ours.items()} == {k: v.shape for k, v in theirs.items()}, name


# --- what is read from weights


def test_the_kernels_of_eca_are_read_from_the_weights():
    state = small_state("eca_resnet18", kernel=(3, 5, 5, 7))
    options, classes = authors.read_options(state, "eca_resnet18")
    assert (options, classes) == ({"kernel": (3, 5, 5, 7)}, 1000)
    assert authors.guess(state) == "eca_resnet18_k3557"


@pytest.mark.parametrize(
    "name, given, expected",
    [
        ("se_resnet20", {"reduction": 8, "bias": True}, {"reduction": 8, "bias": True}),
        ("cbam_resnet18", {"reduction": 8}, {"reduction": 8}),
        ("bam_resnet18", {"reduction": 32}, {"reduction": 32}),
        ("fcanet34", {"frequencies": "low8"}, {"reduction": 16}),
        ("ca_mobilenet_v2", {"reduction": 16}, {"reduction": 16}),
        ("ge_theta_wrn16_2", {"size": (48, 24, 12)}, {"size": (48, 24, 12)}),
    ],
)
def test_options_that_the_weights_show_are_read(name, given, expected):
    options, _ = authors.read_options(small_state(name, num_classes=7, **given), name)
    assert expected.items() <= options.items()


def test_the_frequencies_of_fcanet_are_read_from_patterns_in_half_precision():
    state = small_state("fcanet34", frequencies="low16")
    half = {k: v.half() if v.is_floating_point() else v for k, v in state.items()}
    options, _ = authors.read_options(half, "fcanet34")
    low = authors.pairs_of("low16", 64)
    assert options["frequencies"] == low and options["size"] == (56, 28, 14, 7)
    ours = authors.convert(half, "fcanet34")
    patterns = next(v for k, v in ours.items() if k.startswith("layer1.0") and k.endswith("patterns"))
    assert torch.equal(patterns, dct_patterns(low, 56))


def test_other_patterns_are_refused():
    with pytest.raises(ValueError, match="no cosine patterns"):
        frequencies_of(torch.randn(16, 14, 14))


def test_options_that_no_weight_shows_are_arguments_and_reported(tmp_path):
    torch.save(small_state("danet_resnet50", num_classes=3), tmp_path / "danet.pth")
    network = authors.load(tmp_path / "danet.pth", "danet_resnet50", full_size=True, multi_grid=(4, 8, 16))
    assert network.backbone.layer4[2].conv2.dilation == (16, 16)
    with torch.no_grad():
        assert network(torch.randn(1, 3, 64, 64)).shape == (1, 3, 64, 64)
    assert "multi_grid=(4, 8, 16)" in str(network.report)
    with pytest.raises(ValueError, match="unknown option of danet_resnet50 'grid'"):
        authors.build("danet_resnet50", grid=2)


# --- files as people have them


def plain(state):
    return state


def wrapped(state):
    return {"epoch": 3, "state_dict": {f"module.{k}": v for k, v in state.items()}, "best_acc1": 77.0}


def averaged(state):
    zeros = {k: torch.zeros_like(v) for k, v in state.items()}
    return {"model": zeros, "state_dict_ema": state}


def of_a_detector(state):
    return {
        "state_dict": {f"backbone.{k}": v for k, v in state.items()} | {"neck.conv.weight": torch.ones(3)}
    }


def without_counters(state):
    return {k: v for k, v in state.items() if not k.endswith("num_batches_tracked")}


@pytest.mark.parametrize("form", [plain, wrapped, averaged, of_a_detector, without_counters])
def test_a_file_is_read_however_it_is_wrapped(tmp_path, form):
    state = small_state("eca_resnet18", num_classes=5)
    torch.save(form(state), tmp_path / "weights.pth")
    network = authors.load(tmp_path / "weights.pth")
    assert network.report.name == "eca_resnet18" and network.fc.out_features == 5
    back = authors.to_authors(network, "eca_resnet18")
    assert all(torch.equal(back[k], v) for k, v in state.items())


def test_safetensors_in_half_precision_become_single(tmp_path):
    state = {k: v.half() if v.is_floating_point() else v for k, v in small_state("se_resnet20").items()}
    save_file(state, tmp_path / "weights.safetensors")
    network = authors.load(tmp_path / "weights.safetensors")
    assert all(p.dtype == torch.float32 and p.requires_grad for p in network.parameters())
    assert "half precision" in str(network.report)
    assert not any(t.is_meta for t in network.state_dict().values())


def test_a_whole_pickled_network_is_refused(tmp_path):
    torch.save(authors.build("se_resnet20"), tmp_path / "network.pth")
    with pytest.raises(WeightsError, match="more than weights"):
        authors.load(tmp_path / "network.pth")


def test_a_file_without_a_classifier_gives_means_of_the_last_map(tmp_path):
    torch.save(small_state("gcnet_r16_resnet50"), tmp_path / "backbone.pth")
    network = authors.load(tmp_path / "backbone.pth")
    x = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        assert torch.equal(network(x), network.last_map(x).mean((2, 3)))
    assert network.report.num_classes == 0 and len(attentions(network)) == 13


def test_another_number_of_classes_makes_a_new_classifier(tmp_path):
    torch.save(small_state("se_resnet20"), tmp_path / "weights.pth")
    network = authors.load(tmp_path / "weights.pth", num_classes=3)
    assert network(torch.randn(2, 3, 32, 32)).shape == (2, 3)
    assert "new classifier for 3 classes" in str(network.report)


# --- a file of another network


def test_a_wrong_file_is_described_briefly_and_the_authors_names(tmp_path):
    state = small_state("se_resnet20")
    del state["layer1.0.se.fc.2.weight"]
    state["layer1.0.sa.extra"] = torch.ones(1)
    state["layer1.1.conv1.weight"] = torch.ones(2, 2)
    torch.save(state, tmp_path / "wrong.pth")
    with pytest.raises(authors.Misfit) as error:
        authors.load(tmp_path / "wrong.pth", "se_resnet20")
    lines = str(error.value).splitlines()
    assert len(lines) <= 10 and "nothing was changed" in lines[0] and "wrong.pth" in lines[0]
    assert "missing: layer1.0.se.fc.2.weight" in lines
    assert "unexpected: layer1.0.sa.extra" in lines
    assert "other shape: layer1.1.conv1.weight is (2, 2) instead of (16, 16, 3, 3)" in lines


@pytest.mark.parametrize(
    "name", ["eca_resnet18", "timm_skresnet18", "scsa_resnet50", "danet_head", "fcanet34"]
)
def test_weights_of_a_stock_network_fit_none(name):
    with shapes_only():
        stock = Trunk(Design()).state_dict()
    with pytest.raises(authors.Misfit, match="missing"):
        authors.convert(stock, name)
    with pytest.raises(ValueError, match="no network of authors.names"):
        authors.guess(stock)


def test_what_no_weight_shows_is_said_when_several_networks_fit():
    with shapes_only():
        state = authors.to_authors(authors.build("danet_resnet50"), "danet_resnet50")
    with pytest.raises(ValueError) as error:
        authors.guess(state)
    lines = str(error.value).splitlines()
    assert lines[1:] == ["danet_resnet50_multigrid: multi_grid=(4, 8, 16)", "danet_resnet50: multi_grid=()"]


@pytest.mark.slow
def test_every_network_is_guessed_from_its_own_weights():
    for name in authors.names():
        with shapes_only():
            state = authors.to_authors(authors.build(name), name)
        if name.startswith("fcanet") or name.endswith("_cifar"):
            continue  # patterns without values; two stems with the same names
        try:
            assert authors.guess(state) == name
        except ValueError as error:
            assert f"\n{name}: " in str(error)


@pytest.mark.slow
def test_every_network_goes_to_its_authors_and_back():
    for name in authors.names():
        with shapes_only():
            network = authors.build(name)
            state = authors.to_authors(network, name)
            shapes = {k: v.shape for k, v in network.state_dict().items()}
            if name.startswith("fcanet"):
                state = {k: v for k, v in state.items() if "dct_layer" not in k}
            back = authors.convert(state, name)
        assert {k: v.shape for k, v in back.items()} == shapes, name


def test_an_unknown_name_suggests_the_nearest():
    with pytest.raises(ValueError, match="Did you mean 'eca_resnet50'"):
        authors.build("eca_resnet_50")


# --- trunks


def test_residual_branches_begin_at_zero_where_the_authors_have_it():
    last = {
        name: authors.build(name, num_classes=2).layer1[0].bn3.weight
        for name in ("scsa_resnet50", "sa_resnet50")
    }
    assert (last["scsa_resnet50"] == 0).all() and (last["sa_resnet50"] == 1).all()
    assert (authors.build("scsa_resnet50", 2, zero_init=False).layer1[0].bn3.weight == 1).all()


@pytest.mark.parametrize("stride", [8, 16, 32])
def test_dilation_keeps_the_size_that_was_asked_for(stride):
    with torch.no_grad():
        network = Trunk(Design((1, 1, 1, 1), planes=(4, 4, 4, 4), output_stride=stride), 0)
        assert network.last_map(torch.randn(1, 3, 64, 64)).shape[2:] == (64 // stride,) * 2
    assert len(reaches(Design(output_stride=stride))) == 4


def test_a_selection_with_a_stride_has_it_in_both_branches():
    layer, x = SelectiveConv(32, 64, 2).eval(), torch.randn(1, 32, 9, 11)
    maps = layer.attention_maps(x)
    assert layer(x).shape == (1, 64, 5, 6)
    assert torch.allclose(sum(maps.values()), torch.ones(1, 64, 1, 1))


def test_widths_that_break_numbers_of_channels_are_refused():
    with pytest.raises(ValueError, match="whole"):
        mobile_trunk(width=0.3, multiple=1)
    with pytest.raises(ValueError, match="narrowing"):
        Design(block="narrowing")
