"""Every mechanism under float16 autocast: finite and close to single precision, forward and backward."""

import pytest
import torch
from test_attention import NARROW

from scsa_book.attention import cat, registry
from scsa_book.operators.precision import DilatedConv2d

SETTINGS = [(128, 1, (14, 14)), (128, 10, (9, 13)), (256, 50, (7, 7)), (128, 50, (14, 14))]


def module_of(name, channels):
    "A mechanism whose parameters that begin at zero do not stay there: γ of zero would hide everything."
    torch.manual_seed(0)
    module, generator = registry.create(name, channels).train(), torch.Generator().manual_seed(1)
    for p in module.parameters():
        if p.abs().max() == 0:
            p.data.copy_(0.5 * torch.randn(p.shape, generator=generator) + 0.5)
    return module


def forward_and_backward(module, x, autocast):
    torch.manual_seed(1)
    x = x.clone().requires_grad_()
    with torch.autocast("cpu", torch.float16, enabled=autocast):
        y = module(x)
    weights = torch.randn(y.shape, generator=torch.Generator().manual_seed(3))
    (1000 * (y.float() * weights).mean()).backward()
    return y.float().detach(), x.grad.float()


@pytest.mark.parametrize("name", registry.names())
@pytest.mark.parametrize(("channels", "deviation", "size"), SETTINGS)
def test_float16_autocast_is_within_two_per_cent(name, channels, deviation, size):
    module = module_of(name, channels)
    x = (deviation * torch.randn(4, channels, *size, generator=torch.Generator().manual_seed(2))).half()
    exact = forward_and_backward(module, x.float(), autocast=False)
    rough = forward_and_backward(module, x, autocast=True)
    for a, b in zip(rough, exact, strict=True):
        assert torch.isfinite(a).all() and (a - b).norm() <= 0.02 * b.norm()


@pytest.mark.parametrize("name", ["danet_position", "non_local", "strided_sparse"])
def test_attention_of_positions_stands_large_activations(name):
    module = module_of(name, 256)
    x = 100 * torch.randn(2, 256, 28, 28, generator=torch.Generator().manual_seed(2)).clamp(-3, 3)
    exact, rough = (forward_and_backward(module, x, autocast)[0] for autocast in (False, True))
    assert torch.isfinite(rough).all() and (rough - exact).norm() <= 0.02 * exact.norm()
    maps = module.attention_maps(x)
    with torch.autocast("cpu", torch.float16):
        assert all(torch.allclose(m, maps[k], atol=1e-5) for k, m in module.attention_maps(x).items())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
@pytest.mark.parametrize("name", registry.names())
def test_the_output_has_the_type_of_the_map_under_autocast(name, dtype):
    module, x = registry.create(name, 32, **NARROW.get(name, {})), torch.randn(2, 32, 9, 8, dtype=dtype)
    with torch.autocast("cpu", dtype):
        assert module(x).dtype == module.eval()(x).dtype == dtype


@pytest.mark.parametrize("fusion", cat.FUSIONS)
def test_cat_keeps_the_type_of_its_map_under_autocast(fusion):
    module, x = registry.create("cat", 32, fusion=fusion), torch.randn(2, 32, 9, 8, dtype=torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16):
        y, maps = module(x), module.attention_maps(x)
    assert {t.dtype for t in (y, *maps.values())} == {torch.bfloat16}
    assert module(x.float()).dtype == torch.float32


# ---- convolutions that a CPU does not compute right


DIRTY = """
import torch
from scsa_book.operators.precision import DilatedConv2d
from scsa_book.training.run import keep_memory

keep_memory()  # what is released is used again as it is
torch.set_num_threads(1)


def leave_nan_in_memory():
    tensors = [torch.full((2**k,), float("nan")) for k in range(6, 23) for _ in range(6)]
    del tensors


def gradients(conv, x, dtype):
    found = []
    for _ in range(6):
        leave_nan_in_memory()
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype is None):
            y = conv(x if dtype is None else x.to(dtype))
        leave_nan_in_memory()
        found += torch.autograd.grad(y.float().square().mean(), conv.weight)
    return found


x = torch.randn(2, 16, 32, 32).to(memory_format=torch.channels_last)
for groups in (2, 16):
    conv = DilatedConv2d(16, 16, 3, padding=2, dilation=2, groups=groups)
    conv.to(memory_format=torch.channels_last)
    expected = gradients(conv, x, torch.float32)[0]
    for found in (gradients(conv, x, None), gradients(conv.bfloat16(), x, torch.bfloat16)):
        for gradient in found:
            assert (gradient.float() - expected).norm() < 0.02 * expected.norm(), (conv, gradient)
"""


def test_the_gradient_of_a_dilated_convolution_with_groups_is_right(executed):
    assert executed(DIRTY) == (0, "")


def test_dilated_convolutions_are_computed_in_the_type_that_was_asked_for():
    x = torch.randn(2, 8, 9, 9)
    for kind in ({"groups": 4, "dilation": 2}, {"groups": 1, "dilation": 2}, {"groups": 4, "dilation": 1}):
        conv = DilatedConv2d(8, 8, 3, **kind)
        assert conv(x).dtype == torch.float32 and conv.double()(x.double()).dtype == torch.float64
        with torch.autocast("cpu", torch.bfloat16):
            assert conv.float()(x).dtype == torch.bfloat16
            assert conv.double()(x.double()).dtype == torch.float64
        assert conv.bfloat16()(x.bfloat16()).dtype == torch.bfloat16
