"""What looks at attention: against scikit-learn, against closed forms, and what bad input gets."""

import pytest
import torch
from torch import nn

from scsa_book.attention import registry
from scsa_book.explain.faithfulness import blurred, curves, randomised, ranking
from scsa_book.explain.gates import GateMoments, fold, gates_of
from scsa_book.explain.initial_gain import initial_gain
from scsa_book.explain.localisation import auroc, energy_inside, paired_claim, points_inside
from scsa_book.explain.mechanisms import fact
from scsa_book.explain.receptive_field import contributions, side_length
from scsa_book.networks.build import build
from scsa_book.networks.placement import attend


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


def test_folded_attention_keeps_its_gain():
    network, x = a_network("se", gain=3.0), torch.randn(1, 3, 16, 16)
    before = network(x)
    torch.testing.assert_close(fold(network, gates_of(network, [x]))(x), before, rtol=1e-4, atol=1e-5)


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
