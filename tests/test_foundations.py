"""Pooling and gates against their equations, read literally in double precision."""

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from scsa_book import pooling
from scsa_book.operators import gates


def mean(values: list[float]) -> float:
    return math.fsum(values) / len(values)


def entropy(values: list[float]) -> float:
    highest = max(values)
    e = [math.exp(v - highest) for v in values]
    p = [v / math.fsum(e) for v in e]
    return -math.fsum(q * math.log(q) for q in p if q > 0)


# ---- the equations, position by position


def of_channels(x: Tensor, summary) -> Tensor:
    B, C, H, W = x.shape
    z = torch.zeros(B, C, 1, 1, dtype=torch.float64)
    for b in range(B):
        for c in range(C):
            z[b, c, 0, 0] = summary([float(x[b, c, i, j]) for i in range(H) for j in range(W)])
    return z


def of_positions(x: Tensor, summary) -> Tensor:
    B, C, H, W = x.shape
    z = torch.zeros(B, 1, H, W, dtype=torch.float64)
    for b in range(B):
        for i in range(H):
            for j in range(W):
                z[b, 0, i, j] = summary([float(x[b, c, i, j]) for c in range(C)])
    return z


def of_windows(x: Tensor, window: int | None, summary) -> Tensor:
    B, C, H, W = x.shape
    h, w = (n if window is None else min(window, n) for n in (H, W))
    z = torch.zeros(B, C, H // h, W // w, dtype=torch.float64)
    for i in range(H // h):
        for j in range(W // w):
            tile = x[:, :, i * h : (i + 1) * h, j * w : (j + 1) * w]
            z[:, :, i, j] = of_channels(tile, summary)[:, :, 0, 0]
    return z


def strips(x: Tensor) -> tuple[Tensor, Tensor]:
    rows = [of_channels(x[:, :, i : i + 1], mean)[..., 0] for i in range(x.shape[2])]
    columns = [of_channels(x[..., j : j + 1], mean)[..., 0] for j in range(x.shape[3])]
    return torch.cat(rows, 2), torch.cat(columns, 2)


LITERAL = {
    pooling.global_average: lambda x: of_channels(x, mean),
    pooling.global_maximum: lambda x: of_channels(x, max),
    pooling.global_entropy: lambda x: of_channels(x, entropy),
    pooling.channel_average: lambda x: of_positions(x, mean),
    pooling.channel_maximum: lambda x: of_positions(x, max),
    pooling.channel_entropy: lambda x: of_positions(x, entropy),
}
every_pool = pytest.mark.parametrize("pool", LITERAL, ids=lambda pool: pool.__name__)


@st.composite
def maps(draw) -> Tensor:
    "Small maps, some of them full of ties, some of them far from zero."
    shape = [draw(st.integers(1, most)) for most in (2, 4, 7, 7)]
    seeded = torch.Generator().manual_seed(draw(st.integers(0, 999)))
    x = torch.randn(shape, generator=seeded, dtype=torch.float64)
    x = x * draw(st.sampled_from([0.1, 1.0, 30.0])) + draw(st.sampled_from([0.0, -5.0]))
    return x.round() if draw(st.booleans()) else x


quickly = settings(max_examples=25, deadline=None)


@every_pool
@given(x=maps())
@quickly
def test_summary_is_its_equation(pool, x):
    torch.testing.assert_close(pool(x), LITERAL[pool](x), rtol=1e-10, atol=1e-10)


@given(x=maps())
@quickly
def test_strips_are_their_equation(x):
    for ours, literal in zip(pooling.strip_average(x), strips(x), strict=True):
        torch.testing.assert_close(ours, literal, rtol=1e-10, atol=1e-10)


@given(x=maps(), window=st.none() | st.integers(1, 9))
@quickly
def test_windows_are_their_equation(x, window):
    close = {"rtol": 1e-10, "atol": 1e-10}
    torch.testing.assert_close(pooling.window_average(x, window), of_windows(x, window, mean), **close)
    torch.testing.assert_close(pooling.window_maximum(x, window), of_windows(x, window, max), **close)


@pytest.mark.parametrize("size", [(7, 7), (8, 13), (14, 20)])
def test_windows_of_seven_are_the_authors_pools(size):
    x = torch.randn(2, 3, *size)
    torch.testing.assert_close(pooling.window_average(x, 7), F.avg_pool2d(x, 7, 7))
    assert torch.equal(pooling.window_maximum(x, 7), F.max_pool2d(x, 7, 7))


def test_what_fills_no_window_is_not_seen():
    x = torch.zeros(1, 1, 9, 8)
    x[..., 7:, :] = x[..., 7:] = 100
    assert pooling.window_average(x, 7).item() == pooling.window_maximum(x, 7).item() == 0


# ---- gradients

FUNCTIONS = [
    *LITERAL,
    pooling.strip_average,
    pytest.param(lambda x: pooling.window_average(x, 2), id="window_average"),
    pytest.param(lambda x: pooling.window_maximum(x, 2), id="window_maximum"),
    pytest.param(lambda x: pooling.window_average(x, None), id="whole_average"),
]
every_function = pytest.mark.parametrize("f", FUNCTIONS, ids=lambda f: f.__name__)


@every_function
@pytest.mark.parametrize("size", [(1, 1), (5, 3)])
def test_gradient_is_the_numerical_one(f, size):
    x = torch.randperm(2 * 3 * math.prod(size), generator=torch.Generator().manual_seed(1)).double() / 7
    assert torch.autograd.gradcheck(f, x.view(2, 3, *size).requires_grad_())


def gradient(f, x: Tensor) -> Tensor:
    x = x.clone().requires_grad_()
    f(x).sum().backward()
    return x.grad


def test_the_first_of_a_tie_has_the_gradient():
    x = torch.tensor([[0.0, 5.0], [5.0, 1.0]])[None, None]
    assert gradient(pooling.global_maximum, x).flatten().tolist() == [0, 1, 0, 0]
    assert gradient(lambda t: pooling.window_maximum(t, 2), x).flatten().tolist() == [0, 1, 0, 0]
    pair = torch.ones(1, 2, 1, 1)
    assert gradient(pooling.channel_maximum, pair).flatten().tolist() == [1, 0]


# ---- entropy


@given(x=maps())
@quickly
def test_entropy_stays_within_its_limits(x):
    C, N = x.shape[1], x.shape[2] * x.shape[3]
    for h, most in ((pooling.global_entropy(x), math.log(N)), (pooling.channel_entropy(x), math.log(C))):
        assert h.min() >= 0 and h.max() <= most + 1e-9


@given(value=st.floats(-1e4, 1e4), n=st.integers(1, 50))
@quickly
def test_entropy_of_equal_positions_is_the_logarithm_of_their_number(value, n):
    flat = torch.full((1, n, 1, n), value)
    assert pooling.global_entropy(flat).flatten().tolist() == pytest.approx([math.log(n)] * n, abs=1e-4)
    assert pooling.channel_entropy(flat).flatten().tolist() == pytest.approx([math.log(n)] * n, abs=1e-4)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("height", [100.0, 60000.0])
def test_entropy_of_a_spike_is_zero_and_so_is_its_gradient(dtype, height):
    spike = torch.full((1, 2, 5, 5), -height, dtype=dtype)
    spike[:, 0, 2, 2] = spike[:, 1, 0, 4] = height
    assert pooling.global_entropy(spike).double().max() < 1e-30
    assert pooling.channel_entropy(spike)[0, 0, 2, 2].double() < 1e-30
    for f in (pooling.global_entropy, pooling.channel_entropy):
        assert gradient(f, spike).double().nan_to_num(1).abs().max() < 1e-6


# ---- what every map may be

TOLERANCE = {torch.float16: 2**-10, torch.bfloat16: 2**-7, torch.float32: 1e-5}


@every_function
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=["first", "last"])
def test_dtype_stays_and_precision_is_its_own(f, dtype, layout):
    # All values of one sign: a mean that cancels to zero has no relative precision.
    x = torch.rand(2, 5, 41, 37, generator=torch.Generator().manual_seed(0)).to(dtype, memory_format=layout)
    outs, references = f(x), f(x.double())
    if isinstance(outs, Tensor):
        outs, references = (outs,), (references,)
    for out, reference in zip(outs, references, strict=True):
        assert out.dtype == dtype
        torch.testing.assert_close(out.double(), reference, rtol=TOLERANCE[dtype], atol=0)


@every_function
def test_an_empty_batch_stays_empty(f):
    outs, full = f(torch.zeros(0, 3, 4, 5)), f(torch.zeros(2, 3, 4, 5))
    if isinstance(outs, Tensor):
        outs, full = (outs,), (full,)
    assert [t.shape for t in outs] == [(0, *t.shape[1:]) for t in full]


class Module(torch.nn.Module):
    def __init__(self, f):
        super().__init__()
        self.f = f

    def forward(self, x):
        return self.f(x)


@every_function
def test_compiles_whole_and_exports_with_free_sizes(f):
    x = torch.randn(2, 3, 6, 10)
    torch._dynamo.reset()
    compiled = torch.compile(f, fullgraph=True, backend="eager", dynamic=True)
    dim = torch.export.Dim
    free = {0: dim("b", max=64), 2: dim("h", min=4, max=512), 3: dim("w", min=4, max=512)}
    exported = torch.export.export(Module(f), (x,), dynamic_shapes={"x": free}).module()
    for size in ((2, 3, 6, 10), (3, 3, 9, 5)):
        x = torch.randn(size)
        torch.testing.assert_close(compiled(x), f(x))
        torch.testing.assert_close(exported(x), f(x))


# ---- errors


@every_function
@pytest.mark.parametrize("shape", [(3, 4, 4), (1, 1, 3, 4, 4), (4,)], ids=str)
def test_a_tensor_that_is_no_map_is_refused(f, shape):
    with pytest.raises(ValueError, match=r"got a tensor of shape .*takes \(batch, channels, height, width\)"):
        f(torch.zeros(shape))


@pytest.mark.parametrize("window", [0, -1, 2.0, True, "7", (7, 7)])
@pytest.mark.parametrize("pool", [pooling.window_average, pooling.window_maximum])
def test_a_bad_window_is_refused(pool, window):
    with pytest.raises(ValueError, match="must be a positive integer, or None") as message:
        pool(torch.zeros(1, 1, 4, 4), window)
    assert repr(window) in str(message.value)


def test_a_check_says_who_refuses():
    with pytest.raises(ValueError, match=r"^PCSA: window=0 "):
        pooling.check_window(0, "PCSA")
    with pytest.raises(ValueError, match=r"^SMSA: gate='relu' must be one of sigmoid, softmax$"):
        gates.check_gate("relu", "SMSA")
    pooling.check_window(None, "PCSA")
    pooling.check_window(7, "PCSA")


# ---- gates


@given(x=maps())
@quickly
def test_sigmoid_is_its_equation(x):
    literal = torch.tensor([1 / (1 + math.exp(-v)) for v in x.flatten().tolist()], dtype=torch.float64)
    torch.testing.assert_close(gates.gate(x), literal.view_as(x))
    torch.testing.assert_close(gates.gate(-x), 1 - gates.gate(x))


@given(x=maps(), dim=st.integers(0, 3))
@quickly
def test_softmax_is_its_equation(x, dim):
    y = gates.gate(x, "softmax", dim)
    lines, shares = (t.movedim(dim, -1).reshape(-1, x.shape[dim]).tolist() for t in (x, y))
    for line, share in zip(lines, shares, strict=True):
        e = [math.exp(v - max(line)) for v in line]
        assert share == pytest.approx([v / math.fsum(e) for v in e], rel=1e-9, abs=1e-12)


@pytest.mark.parametrize("kind", gates.GATES)
def test_every_gate_keeps_shape_dtype_and_a_finite_gradient(kind):
    gates.check_gate(kind)
    for dtype in (torch.float16, torch.bfloat16, torch.float32):
        x = torch.tensor([[-1e4, 0.0, 1e4]], dtype=dtype).requires_grad_()
        y = gates.gate(x, kind)
        y.sum().backward()
        assert y.dtype == dtype and y.shape == x.shape and 0 <= y.min() and y.max() <= 1
        assert x.grad.isfinite().all()
    assert gates.gate(torch.zeros(0, 3, 4), kind).shape == (0, 3, 4)


def test_softmax_competes_among_channels_unless_specified_otherwise():
    x = torch.randn(2, 3, 4, 5)
    torch.testing.assert_close(gates.gate(x, "softmax").sum(1), torch.ones(2, 4, 5))


@pytest.mark.parametrize("kind", ["relu", "", None, "Sigmoid"])
def test_an_unknown_gate_lists_the_known(kind):
    with pytest.raises(ValueError, match="sigmoid, softmax"):
        gates.gate(torch.zeros(1), kind)
