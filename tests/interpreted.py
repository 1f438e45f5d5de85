"""Kernels of a GPU in the interpreter of Triton, on the CPU; `test_kernels.py` runs this in its own process.

The interpreter is chosen when Triton is imported: `TRITON_INTERPRET=1 pytest tests/interpreted.py`.
"""

import copy
import importlib
import warnings

import pytest
import torch
from test_operators import LAYOUTS, build, changed, close, example, relative, tuple_of, writes

from scsa_book.operators import choice

pytestmark = [
    pytest.mark.skipif(choice.GPU != "cpu", reason="set TRITON_INTERPRET=1"),
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),  # numpy's, about NaN and infinity
]
choice.load_kernels()
MODULES = [importlib.import_module(f"scsa_book.operators.gpu_{name}") for name in choice.KERNELS]
OURS = (
    "gate_axes", "gate_axes_gradient", "gate_in_turn", "gate_in_turn_gradient", "gate_sum",
    "gate_sum_gradient", "strip_means", "window_means", "window_means_whole", "gated_window_means",
    "gated_window_gradient", "group_norm", "descriptors", "convolve_strips", "channel_attention",
)  # fmt: skip
SMALL = (2, 4, 9, 5)  # all are as large as a window of 7 x 4
LARGE = [(2, 8, 15, 10), (3, 4, 8, 70), (1, 4, 40, 9)]
SHAPES = [SMALL, *(pytest.param(shape, marks=pytest.mark.slow) for shape in LARGE)]
CASE = pytest.mark.parametrize("case", OURS)
TOLERANCE = {torch.float32: 1e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}


def no_failure():
    return choice.REASONS == []


@CASE
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_values(case, layout, shape):
    operator, args = example(case, layout=LAYOUTS[layout], shape=shape)
    assert choice.chosen(operator.forms, args) is not None
    before = copy.deepcopy(changed(args, torch.clone))
    found = operator(*args)
    assert all(map(torch.equal, choice.tensors_of(args), choice.tensors_of(before)))
    close(found, operator.written(*args), TOLERANCE[torch.float32])
    assert no_failure()


@CASE
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_float16_and_bfloat16_are_rounded_once(case, layout, dtype):
    operator, args = example(case, dtype, LAYOUTS[layout], SMALL)
    found, exact = tuple_of(operator(*args)), operator.written(*changed(args, torch.Tensor.float))
    assert all(t.dtype in (dtype, torch.float32) for t in found)
    close(tuple(t.float() for t in found), exact, TOLERANCE[dtype])
    assert no_failure()


@CASE
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_gradients(case, layout, shape):
    operator, args = example(case, layout=LAYOUTS[layout], shape=shape)
    args = changed(args, lambda t: t.clone().requires_grad_())
    wanted = choice.tensors_of(args)
    if case == "descriptors":
        args[1].requires_grad_(False)  # a buffer of the module
        wanted = wanted[:1]
    both = [tuple_of(f(*args)) for f in (operator, operator.written)]
    weights = [torch.randn(t.shape) for t in both[0]]
    ours, written = (torch.autograd.grad(y, wanted, weights) for y in both)
    largest = max(t.abs().max() for t in written)
    assert all((a - b).abs().max() <= 1e-5 * largest for a, b in zip(ours, written, strict=True))
    assert no_failure()


@pytest.mark.parametrize("case", ["gate_axes", "gate_sum", "strip_means", "group_norm", "descriptors"])
@pytest.mark.parametrize("shape", [(1, 4, 1, 1), (2, 4, 1, 9), (2, 4, 9, 1)], ids=str)
def test_one_position_one_row_one_column(case, shape):
    operator, args = example(case, shape=shape)
    close(operator(*args), operator.written(*args), 5e-5)  # PyTorch's norm of one number is off by 2e-5
    assert no_failure()


@CASE
def test_an_empty_batch_gets_the_written_form(case):
    operator, args = example(case, shape=SMALL)
    args = changed(args, lambda t: t[:0] if t.ndim == 4 and len(t) == 2 else t)
    assert choice.chosen(operator.forms, args) is None


@CASE
def test_any_strides(case):
    operator, args = example(case, shape=SMALL)

    def with_gaps(t):
        return torch.stack([t, t + 1], -1)[..., 0]

    assert not with_gaps(args[0]).is_contiguous()
    close(operator(*changed(args, with_gaps)), operator.written(*args), 1e-5)
    expanded = (args[0][:1].expand_as(args[0]), *args[1:])
    close(operator(*expanded), operator.written(*expanded), 1e-5)
    assert no_failure()


@CASE
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_numbers_that_are_none_go_where_the_equations_put_them(case, value):
    operator, args = example(case, shape=SMALL)
    args[0][0, 1, 0, 0] = value
    for found, exact in zip(tuple_of(operator(*args)), tuple_of(operator.written(*args)), strict=True):
        assert torch.equal(found.isnan(), exact.isnan())
        assert torch.equal(found.isinf(), exact.isinf())
        assert torch.allclose(found, exact, 1e-4, 1e-4, equal_nan=True)
    assert no_failure()


# ---- operators of torch.library, and gradients of gradients


def registered():
    return sorted(name for name in choice.LIBRARIES if name.startswith("scsa_book::"))


def inner():
    "Operators that only kernels have, with arguments."
    x = torch.randn(2, 4, 9, 10)
    norm, conv, attend, found, strips = (
        importlib.import_module(f"scsa_book.operators.gpu_{n}")
        for n in ("norm", "convolution", "channel_attention", "descriptors", "strips")
    )
    w, kernel, g = torch.randn(4), torch.outer(*torch.rand(2, 3)), torch.randn_like(x)
    packed, factors, strip = torch.randn(24 + 4), torch.randn(24), torch.randn(2, 4, 1, 9)
    indexed = found.indexed_descriptors.written(x, kernel)
    return {
        norm.group_norm_gradient: (g, x, w, w, 2, 1e-5),
        conv.convolve_packed: (strip, packed, [3, 5, 7, 9]),
        conv.convolve_packed_gradient: (strip, strip, packed, [3, 5, 7, 9]),
        attend.attend_channels: (x, factors, 2, True, 0.5),
        attend.attend_channels_gradient: (torch.randn(2, 4), x, factors, 2, True, 0.5),
        strips.strip_means_gradient: (torch.randn(2, 4, 9), torch.randn(2, 4, 10), x),
        strips.window_means_gradient: (torch.randn(2, 4, 1, 2), x, 7, 4),
        found.indexed_descriptors: (x, kernel),
        found.descriptors_gradient: (
            torch.randn(3, 2, 4, 1, 1), torch.randn(3, 2, 1, 9, 10), x, kernel, *indexed,
        ),
    }  # fmt: skip


@pytest.mark.parametrize("name", [operator.written.__name__ for operator in inner()])
def test_operators_below_an_operator(name):
    operator, args = next((o, a) for o, a in inner().items() if o.written.__name__ == name)
    close(operator(*args), operator.written(*args), 2e-5)
    assert no_failure()


@pytest.mark.parametrize("layout", LAYOUTS)
def test_opcheck(layout):
    pairs = dict(example(case, layout=LAYOUTS[layout], shape=SMALL) for case in OURS)
    for operator, args in (pairs | inner()).items():
        form = operator.forms.get("cpu")
        if form and isinstance(form.run, torch._ops.OpOverload):
            assert not writes(form.run._schema)
            torch.library.opcheck(form.run, args, test_utils=("test_schema", "test_faketensor"))


def test_a_gradient_of_a_gradient_is_that_of_the_equations():
    for case in ("gate_axes", "gate_sum", "strip_means", "group_norm", "gated_window_means"):
        operator, args = example(case, shape=(1, 4, 8, 5))
        args = changed(args, lambda t: t.clone().requires_grad_())
        twice = []
        for f in (operator, operator.written):
            y = tuple_of(f(*args))[0]
            weight = torch.randn(y.shape, generator=torch.Generator().manual_seed(1))
            (g,) = torch.autograd.grad((y.sin() * weight).sum(), args[0], create_graph=True)
            twice.append(torch.autograd.grad(g.sin().sum(), args[0]))
        close(*twice, 1e-4)
    assert no_failure()


# ---- whole mechanisms


def step(module, x):
    x = x.detach().clone(memory_format=torch.preserve_format).requires_grad_()
    y = module(x)
    weight = torch.randn(y.shape, generator=torch.Generator().manual_seed(3))
    grads = torch.autograd.grad((y * weight).sum(), [x, *module.parameters()])
    return y.detach(), *grads


@pytest.mark.parametrize("name", ["scsa", "smsa", "pcsa", "cat", "cbam"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_mechanism_is_what_its_equations_are(name, layout, monkeypatch):
    module = build(name).train()
    x = torch.randn(2, 32, 9, 10).contiguous(memory_format=LAYOUTS[layout])
    ours = step(copy.deepcopy(module), x)
    assert ours[0].is_contiguous(memory_format=LAYOUTS[layout])
    monkeypatch.setattr(choice, "MODE", "written")
    for a, b in zip(ours, step(module, x), strict=True):
        assert relative(a, b) < 1e-4 or (a - b).abs().max() < 1e-6
    assert no_failure()


@pytest.mark.parametrize("name", ["scsa", "cat"])
def test_under_autocast(name):
    module, x = build(name).train(), torch.randn(2, 32, 7, 8)
    exact = step(module, x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        rounded = step(module, x.bfloat16())
    assert rounded[0].dtype == torch.bfloat16 and relative(rounded[0].float(), exact[0]) < 0.05
    assert all(t.dtype == torch.float32 for t in rounded[2:])
    assert no_failure()


def test_the_same_input_gives_the_same_output():
    module, x = build("scsa").eval(), torch.randn(2, 32, 9, 10)
    with torch.no_grad():
        assert torch.equal(module(x), module(x))


# ---- faults


@pytest.fixture
def fresh(monkeypatch):
    gpu = importlib.import_module("scsa_book.operators.gpu")
    monkeypatch.setattr(choice, "REASONS", [])
    monkeypatch.setattr(gpu, "FAILED", set())
    return monkeypatch


class Failing:
    def __init__(self, error):
        self.error = error

    def __getitem__(self, grid):
        raise self.error


@pytest.mark.parametrize("error", [
    RuntimeError("Triton Error [CUDA]: invalid device function"),
    NotImplementedError("out of resource: shared memory, Required: 131072, Hardware limit: 65536"),
])  # fmt: skip
def test_where_a_kernel_fails_the_equations_run_and_one_warning_says_why(error, fresh):
    fresh.setattr(MODULES[0], "gate_axes_kernel", Failing(error))
    fresh.setattr(MODULES[0], "two_gates_kernel", Failing(error))
    operator, args = example("gate_axes")
    with pytest.warns(UserWarning, match="equations run instead of kernels: gate_axes: .*(CUDA|shared)"):
        assert torch.equal(operator(*args), operator.written(*args))
    other, more = example("gate_sum")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert torch.equal(operator(*args), operator.written(*args))
        assert torch.equal(other(*more), other.written(*more))


def test_out_of_memory_is_raised_and_leaves_parameters_as_they_were(fresh):
    fresh.setattr(MODULES[0], "gate_axes_kernel", Failing(torch.OutOfMemoryError("out of memory")))
    module = build("scsa").train()
    before = copy.deepcopy(module.state_dict())
    with pytest.raises(torch.OutOfMemoryError):
        module(torch.randn(2, 32, 7, 8))
    assert all(map(torch.equal, before.values(), module.state_dict().values()))
