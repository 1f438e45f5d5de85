"""Every mechanism under float16 autocast: finite and close to single precision, forward and backward."""

import pytest
import torch
from test_attention import NARROW

from scsa_book.attention import cat, registry

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
