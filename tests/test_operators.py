"""A form for a device computes what is written, one rule chooses, and nothing is half recorded."""

import ast
import copy
import io
import math
import re
import sys
from pathlib import Path

import pytest
import torch
from test_attention import NARROW
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.fx.experimental.proxy_tensor import make_fx

import scsa_book
from scsa_book.attention import registry
from scsa_book.operators import (
    affine,
    channel_attention,
    choice,
    convolution,
    descriptors,
    entropy,
    extremes,
    frequency,
    gated_windows,
    gating,
    group_statistics,
    mean_and_maximum,
    norm,
    reductions,
    shuffle,
    strips,
    windows,
)
from scsa_book.operators.memory import OF_SEVERAL

LAYOUTS = {"first": torch.contiguous_format, "last": torch.channels_last}


def example(name, dtype=torch.float32, layout=torch.contiguous_format, shape=(2, 8, 15, 10)):
    "Arguments for an operator of `CASES`."
    torch.manual_seed(0)
    B, C, H, W = shape
    x = torch.randn(shape, dtype=dtype).contiguous(memory_format=layout)
    s_h, s_w, s_c, s_p = (
        torch.rand(s, dtype=dtype) for s in ((B, C, H, 1), (B, C, 1, W), (B, C, 1, 1), (B, 1, H, W))
    )
    g = torch.randn_like(x)
    rows, columns = (torch.randn(B, C, 1, n, dtype=dtype) for n in (H, W))
    taps = [torch.randn(C // 4, 1, k, dtype=dtype) for k in (3, 5, 7, 9)]
    biases = [torch.randn(C // 4, dtype=dtype) for _ in range(4)]
    factors, shifts = ([torch.randn(*s, dtype=dtype) for _ in range(3)] for s in ((C, 1, 1, 1), (C,)))
    kernel, bias, shares = (torch.randn(s, dtype=dtype) for s in ((C, C, 3, 3), (C,), (C,)))
    sub_gates = [torch.rand(B, C // 2, *s, dtype=dtype) for s in ((1, 1), (H, W))]
    return {
        "add_product": (affine.add_product, (x, s_c, g)),
        "normalise_channels": (
            affine.normalise_channels,
            (x.unflatten(1, (4, C // 4)), *torch.randn(2, C // 4, dtype=dtype), 1e-5),
        ),
        "strip_means": (strips.strip_means, (x,)),
        "strip_means_gradient": (strips.strip_means_gradient, (g.mean(3), g.mean(2), x)),
        "window_means": (windows.window_means, (x, 7, 4)),
        "window_means_whole": (windows.window_means, (x, H, W)),
        "gate_axes": (gating.gate_axes, (x, s_h, s_w)),
        "gate_axes_gradient": (gating.gate_axes_gradient, (g, x, s_h, s_w)),
        "gate_in_turn": (gating.gate_in_turn, (x, s_c, s_p)),
        "gate_in_turn_gradient": (gating.gate_in_turn_gradient, (g, x, s_c, s_p)),
        "gate_sum": (gating.gate_sum, (x, s_c, s_p)),
        "gated_window_means": (gated_windows.gated_window_means, (x, s_h, s_w, 7, 4)),
        "gated_window_gradient": (
            gated_windows.gated_window_gradient,
            (g[:, :, : H // 7, : W // 4].contiguous(memory_format=layout), x, s_h, s_w, 7, 4),
        ),
        "gate_by_windows": (
            gated_windows.gate_by_windows,
            (x, s_h, s_w, 7, 4, lambda z: z.mean((2, 3), keepdim=True).sigmoid()),
        ),
        "gated_extremes": (extremes.gated_extremes, (x, s_c)),
        "gated_extremes_gradient": (
            extremes.gated_extremes_gradient,
            (g[:, :2].contiguous(), x, s_c),
        ),
        "mean_and_maximum": (mean_and_maximum.mean_and_maximum, (x,)),
        "mean_of_positions": (reductions.mean, (x, reductions.POSITIONS)),
        "mean_of_channels": (reductions.mean, (x, reductions.CHANNELS)),
        "maximum_of_channels": (reductions.maximum_of_channels, (x,)),
        "maximum_of_positions": (reductions.maximum_of_positions, (x,)),
        "gate_groups": (gating.gate_groups, (x, torch.rand(B, 4, H, W, dtype=dtype))),
        "gate_and_shuffle": (shuffle.gate_and_shuffle, (x, *sub_gates, C // 4, 2)),
        "gate_and_shuffle_odd": (shuffle.gate_and_shuffle, (x, *sub_gates, 1, 2)),
        "similarity_gates": (
            group_statistics.similarity_gates,
            (x.unflatten(1, (4, C // 4)), *torch.randn(2, 4, 1, 1, dtype=dtype), 1e-5),
        ),
        "entropy": (entropy.entropy, (x, (1,))),
        "entropy_over_positions": (entropy.entropy, (x, (2, 3))),
        "entropy_of_logs": (entropy.entropy_of_logs, (x.log_softmax(1), 1)),
        "entropy_of_logs_gradient": (entropy.entropy_of_logs_gradient, (g[:, :1], x.log_softmax(1))),
        "pattern_sums": (frequency.pattern_sums, (x, torch.randn(4, H, W, dtype=dtype))),
        "convolve_strips": (convolution.convolve_strips, (rows, columns, taps, biases)),
        "mixture_and_mean": (convolution.mixture_and_mean, (x, x.mean(2), kernel, bias, shares)),
        "gate_sum_gradient": (gating.gate_sum_gradient, (g, x, s_c, s_p)),
        "group_norm": (norm.group_norm, (x, factors[0].flatten(), shifts[0], 4, 1e-5)),
        "descriptors": (descriptors.descriptors, (x, torch.outer(*2 * [torch.rand(5, dtype=dtype)]) / 9)),
        "channel_attention": (
            channel_attention.channel_attention,
            (x, factors, shifts, 2, True, lambda d, n: d**-0.5, 0.0),
        ),
    }[name]


CASES = (
    "add_product", "normalise_channels", "strip_means", "strip_means_gradient", "window_means",
    "window_means_whole", "gate_axes", "gate_axes_gradient",
    "gate_in_turn", "gate_in_turn_gradient", "gate_sum", "gated_window_means", "gated_window_gradient",
    "gate_by_windows", "group_norm",
    "gated_extremes", "gated_extremes_gradient", "mean_and_maximum", "mean_of_positions",
    "mean_of_channels", "maximum_of_positions", "maximum_of_channels", "gate_groups", "gate_and_shuffle",
    "gate_and_shuffle_odd", "similarity_gates", "entropy", "entropy_over_positions", "entropy_of_logs",
    "entropy_of_logs_gradient", "pattern_sums", "convolve_strips",
    "mixture_and_mean", "channel_attention",
)  # fmt: skip
WRITTEN = ("gate_sum_gradient", "descriptors")  # without a form for a CPU
CASE = pytest.mark.parametrize("case", CASES)


def tuple_of(result):
    return result if isinstance(result, tuple) else (result,)


def changed(args, change):
    "The arguments, with `change` of every tensor."
    lists = ([change(t) for t in a] if isinstance(a, list) else a for a in args)
    return tuple(change(a) if isinstance(a, Tensor) else a for a in lists)


def test_every_operator_has_a_case():
    modules = [sys.modules[n] for n in sorted(sys.modules) if n.startswith("scsa_book.operators.")]
    operators = {v for module in modules for v in vars(module).values() if hasattr(v, "forms")}
    assert operators == {example(case)[0] for case in (*CASES, *WRITTEN)}
    assert all(set(o.forms) <= {"cpu", "cuda"} for o in operators)


# ---- the same numbers

TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-5, torch.float16: 1e-2, torch.bfloat16: 4e-2}
SHAPES = {"small": (2, 8, 15, 10), "several pieces": (3, 64, 76, 75), "far": (5, 48, 133, 133)}
FAR_APART = {"strip_means", "mean_and_maximum"}  # which take another way for a map that no cache holds


def close(found, expected, tolerance):
    for a, b in zip(tuple_of(found), tuple_of(expected), strict=True):
        assert a.shape == b.shape and a.dtype == b.dtype
        assert (a.double() - b.double()).abs().max() <= tolerance * b.double().abs().max()


@CASE
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("shape", SHAPES)
def test_a_form_computes_what_is_written(case, layout, dtype, shape):
    if shape == "far" and case not in FAR_APART:
        pytest.skip("the same way as several pieces")
    if shape != "small" and dtype not in (torch.float32, torch.float64):
        pytest.skip("half precision takes the same way and long on a CPU")
    operator, args = example(case, dtype, LAYOUTS[layout], SHAPES[shape])
    assert choice.chosen(operator.forms, args) is not None
    before = copy.deepcopy(changed(args, torch.clone))
    found = operator(*args)
    for now, then in zip(choice.tensors_of(args), choice.tensors_of(before), strict=True):
        assert torch.equal(now, then), "an argument was written to"
    if case == "gated_extremes_gradient" and dtype in (torch.float16, torch.bfloat16):
        exact = operator.written(*args)  # what ties depends on the precision
    else:
        exact = operator.written(*changed(args, Tensor.double))
    close(*(tuple(t.double() for t in tuple_of(r)) for r in (found, exact)), TOLERANCE[dtype])
    assert all(t.dtype == dtype for t in tuple_of(found))


@CASE
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("threads", [1, 4])
def test_gradients_are_those_of_what_is_written(case, layout, threads):
    operator, args = example(case, torch.float64, LAYOUTS[layout])
    args = changed(args, lambda t: t.clone().requires_grad_())
    wanted, before = choice.tensors_of(args), torch.get_num_threads()
    if case == "mixture_and_mean":  # the means of the columns are no argument of their own
        args, wanted = (args[0], args[0].mean(2), *args[2:]), [args[0], *wanted[2:]]
    torch.set_num_threads(threads)
    try:
        found, expected = tuple_of(operator(*args)), tuple_of(operator.written(*args))
    finally:
        torch.set_num_threads(before)
    weights = [torch.randn_like(t) for t in expected]
    both = (torch.autograd.grad(y, wanted, weights, allow_unused=True) for y in (found, expected))
    for a, b in zip(*both, strict=True):
        assert b is None or torch.allclose(a, b, rtol=1e-9, atol=1e-11)


LISTS = {"convolve_strips", "channel_attention"}  # which gradcheck does not look into
DIFFERENTIABLE = [c for c in CASES if example(c)[0].forms["cpu"].differentiable and c not in LISTS]
DIFFERENTIABLE.remove("mixture_and_mean")  # whose second argument follows from its first


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("axes", [(0,), (1,), (2,), (3,), (2, 3), (1, 2, 3)])
def test_an_entropy_is_along_its_axes_in_every_layout(layout, axes):
    x = torch.randn(3, 5, 4, 6, dtype=torch.float64).contiguous(memory_format=LAYOUTS[layout])
    found, exact = x.clone().requires_grad_(), x.clone().requires_grad_()
    h, expected = entropy.entropy(found, axes), entropy.entropy.written(exact, axes)
    weight = torch.randn_like(expected)
    (h * weight).sum().backward()
    (expected * weight).sum().backward()
    close((h, found.grad), (expected, exact.grad), 1e-12)
    assert found.grad.stride() == x.stride()



@pytest.mark.parametrize("case", DIFFERENTIABLE)
def test_gradients_of_gradients(case):
    operator, args = example(case, torch.float64, shape=(1, 4, 8, 4))
    args = changed(args, lambda t: t.requires_grad_())
    assert torch.autograd.gradcheck(operator, args)
    assert torch.autograd.gradgradcheck(operator, args)


# ---- an operator of torch.library is one in every respect

WHOLE = [case for case in CASES if isinstance(example(case)[0].forms["cpu"].run, torch._ops.OpOverload)]


@pytest.mark.parametrize("case", WHOLE)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_opcheck(case, layout):
    operator, args = example(case, layout=LAYOUTS[layout])
    assert set(torch.library.opcheck(operator.forms["cpu"].run, args).values()) == {"SUCCESS"}


@pytest.mark.parametrize("case", WHOLE)
@pytest.mark.filterwarnings("ignore:.*batching rule")
def test_vmap_of_an_operator_goes_over_its_examples(case):
    operator, args = example(case)
    many = changed(args, lambda t: torch.stack([t, 2 * t]))
    dims = tuple(0 if isinstance(a, Tensor) else None for a in args)
    found = torch.vmap(operator.forms["cpu"].run, dims)(*many)
    twice = operator.written(*changed(args, lambda t: 2 * t))
    close(tuple(t[1] for t in tuple_of(found)), twice, 1e-5)


# ---- who chooses


class Subclass(Tensor):
    pass


def probe(case):
    "Whether the rule chose a form, asked from within whatever surrounds the call."
    operator, args = example(case)
    seen = []

    def ask(x, *rest):
        seen.append(choice.chosen(operator.forms, (x, *rest)) is not None)
        return tuple_of(operator(x, *rest))[0].sum()

    return seen, ask, args


def calls(case, shape, layout):
    "How often PyTorch's operators are called."
    operator, args = example(case, layout=layout, shape=shape)
    with torch.no_grad(), torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as seen:
        operator(*args)
    return sum(e.count for e in seen.key_averages() if e.key.startswith("aten::"))


@CASE
@pytest.mark.parametrize("layout", LAYOUTS)
def test_small_images_are_done_together(case, layout):
    "A call for each of them takes longer than what it computes; one for as many as a cache holds does not."
    small, many = (2, 8, 12, 12), (1088, 8, 12, 12)  # five times as many numbers as are done together
    pieces = math.prod(many) / OF_SEVERAL
    assert calls(case, many, LAYOUTS[layout]) <= 10 * pieces * calls(case, small, LAYOUTS[layout])


@CASE
def test_ordinary_tensors_get_the_form_of_their_device(case):
    seen, ask, args = probe(case)
    ask(*args)
    with torch.no_grad():
        ask(*args)
    with torch.inference_mode():
        ask(*args)
    assert seen == [True] * 3


@CASE
def test_the_written_form_runs_wherever_something_records(case):
    seen, ask, (x, *rest) = probe(case)
    def ask_lists(*tensors):
        left = iter(tensors)
        return ask(*changed((x, *rest), lambda _: next(left)))

    torch.func.grad(ask)(x, *rest)
    torch.func.jvp(lambda t: ask(t, *rest), (x,), (x,))
    torch.vmap(lambda t: ask(t, *rest))(torch.stack([x, x]))
    with forward_ad.dual_level():
        ask(forward_ad.make_dual(x, x), *rest)
    with torch._subclasses.FakeTensorMode() as mode:
        ask(*changed((x, *rest), mode.from_tensor))
    ask(*changed((x, *rest), lambda t: t.to("meta")))
    ask(x.as_subclass(Subclass), *rest)
    torch.jit.trace(lambda t: ask(t, *rest), x, check_trace=False)
    make_fx(ask_lists, tracing_mode="symbolic")(*choice.tensors_of((x, *rest)))
    assert seen == [False] * 9


@CASE
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_under_autocast_a_form_computes_what_is_written(case, dtype, layout):
    operator, args = example(case, dtype, LAYOUTS[layout])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert choice.chosen(operator.forms, args) is not None
        found = tuple_of(operator(*args))
    if case == "gated_extremes_gradient" and dtype is torch.bfloat16:
        exact = tuple_of(operator.written(*args))  # what ties depends on the precision
    else:
        exact = tuple_of(operator.written(*changed(args, Tensor.double)))
    close(*(tuple(t.double() for t in r) for r in (found, exact)), TOLERANCE[torch.bfloat16])


def test_several_types_under_autocast_need_a_form_that_takes_them():
    x, s_h, s_w = example("gate_axes", torch.bfloat16)[1]
    u, weight, bias, *settings = example("group_norm", torch.bfloat16)[1]
    mixed = u, weight.float(), bias.float(), *settings
    assert choice.chosen(norm.group_norm.forms, mixed) is None
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert choice.chosen(gating.gate_axes.forms, (x, s_h.float(), s_w)) is None
        assert choice.chosen(norm.group_norm.forms, mixed) is not None
        assert norm.group_norm(*mixed).dtype is torch.bfloat16


def test_other_kinds_of_tensors():
    x, s_h, s_w = example("gate_axes")[1]
    forms = gating.gate_axes.forms

    def takes(*args):
        return choice.chosen(forms, args) is not None

    assert takes(x, s_h, s_w) and takes(nn.Parameter(x), s_h, s_w)
    assert not takes(x, s_h.double(), s_w)
    assert not takes(*(t.int() for t in (x, s_h, s_w)))
    assert not takes(x[:0], s_h[:0], s_w[:0])
    assert not takes(x.to_sparse(), s_h, s_w)
    assert not takes(torch.quantize_per_tensor(x, 0.1, 0, torch.qint8), s_h, s_w)
    assert not takes(x, s_h.to("meta"), s_w)
    graph = torch.fx.Graph()
    assert not takes(torch.fx.Proxy(graph.placeholder("x")), s_h, s_w)


def test_a_form_without_a_gradient_is_for_inference_alone():
    forms, (x, patterns) = frequency.pattern_sums.forms, example("pattern_sums")[1]
    leaf = x.clone().requires_grad_()
    assert choice.chosen(forms, (leaf, patterns)) is None
    with torch.no_grad():
        assert choice.chosen(forms, (leaf, patterns)) is forms["cpu"].run


def test_a_gradient_of_many_and_a_graph_of_a_gradient():
    "Of the backward pass: batched gradients have no memory, and a recorded one must be differentiable."
    x, s_h, s_w = (t.double().requires_grad_() for t in example("gate_axes")[1])
    y = gating.gate_axes(x, s_h, s_w)
    g = torch.randn(3, *y.shape, dtype=y.dtype)
    many = torch.autograd.grad(y, (x, s_h, s_w), g, is_grads_batched=True, retain_graph=True)
    one = torch.autograd.grad(y, (x, s_h, s_w), g[1], create_graph=True)
    assert all(torch.allclose(a[1], b) and b.requires_grad for a, b in zip(many, one, strict=True))


def test_a_plain_map_inside_of_a_transform_of_something_else():
    x, s_h, s_w = example("gate_axes")[1]
    s_h.requires_grad_()
    found = torch.vmap(lambda t: (gating.gate_axes(x, s_h, s_w) * t).sum())(torch.ones(2))
    assert torch.allclose(found, (x * s_h * s_w).sum().expand(2), rtol=1e-4)


def test_a_cell_that_runs_again_replaces_its_operator():
    space = {"operator": choice.operator, "Tensor": Tensor, "__name__": "__main__"}
    source = (
        "@operator\ndef again(x: Tensor) -> Tensor:\n    return x + 1\n\n"
        "@again.on('cpu')\ndef again_cpu(x: Tensor) -> Tensor:\n    return x + VALUE\n"
    )
    for value in (1, 2):
        exec(source.replace("VALUE", str(value)), space)
        assert space["again"](torch.zeros(1)).item() == value
    assert "__main__::again_cpu" in choice.LIBRARIES


# ---- what is recorded

WIDTH = 32
MECHANISM = pytest.mark.parametrize("name", registry.names())


def build(name):
    torch.manual_seed(0)
    module = registry.create(name, WIDTH, **NARROW.get(name, {})).eval()
    for parameter in module.parameters():
        if not parameter.any():
            nn.init.normal_(parameter, std=0.3)
    return module


def relative(a, b):
    return float((a - b).abs().max() / b.abs().max())


def writes(schema) -> bool:
    return any(a.alias_info is not None and a.alias_info.is_write for a in schema.arguments)


# Operators that some runtime of `scsa_book.deploy` lacks or takes for another, and a use of each.
LACKED = {
    "adaptive_max_pool2d": lambda x: nn.functional.adaptive_max_pool2d(x, 2),
    "addcdiv": lambda x: x.addcdiv(x, x),
    "addcmul": lambda x: x.addcmul(x, x),
    "embedding_bag": lambda x: nn.functional.embedding_bag(torch.zeros(1, 2).long(), x[0, 0]),
    "exp2": lambda x: x.exp2(),
    "hypot": lambda x: x.hypot(x),
    "kthvalue": lambda x: x.kthvalue(1)[0],
    "logaddexp": lambda x: x.logaddexp(x),
    "logaddexp2": lambda x: x.logaddexp2(x),
    "mT": lambda x: x.mT,
    "median": lambda x: x.median(1)[0],
    "mv": lambda x: torch.mv(x[0, 0], x[0, 0, 0]),
    "new_ones": lambda x: x + x.new_ones(1),
    "std": lambda x: x.std((2, 3)),
    "std_mean": lambda x: torch.std_mean(x, 1)[0],
    "var": lambda x: x.var((2, 3)),
    "var_mean": lambda x: torch.var_mean(x, 1)[0],
}


class Use(nn.Module):
    def __init__(self, use, weight=None):
        super().__init__()
        self.use, self.weight = use, weight

    def forward(self, x):
        return self.use(x) if self.weight is None else self.use(x, self.weight)


def plain_program(module, x):
    return torch.export.export(module, (x,)).run_decompositions({})


def names_in(recorded):
    "The operators of a trace or of an exported program."
    if isinstance(recorded, torch.export.ExportedProgram):
        targets = graph_targets(recorded.graph)
        full = {t._schema.name for t in targets if isinstance(t, torch._ops.OpOverload)}
    else:
        full = {node.kind() for node in recorded.inlined_graph.nodes()}
    return {name.removeprefix("aten::") for name in full}


def constants_divided(program):
    "Divisions of what does not depend on the input by what does."
    varying, found = set(program.graph_signature.user_inputs), []
    for node in program.graph.nodes:
        given = [n.name in varying for n in node.all_input_nodes]
        if any(given):
            varying.add(node.name)
        if str(node.target).startswith("aten.div.Tensor") and given == [False, True]:
            found.append(node)
    return found


@pytest.mark.parametrize("name", LACKED)
def test_what_some_runtime_lacks_is_recognised(name):
    module, x = Use(LACKED[name]), torch.rand(1, 2, 4, 4)
    seen = names_in(torch.jit.trace(module, x, check_trace=False)), names_in(plain_program(module, x))
    assert name in seen[0] and (name in seen[1] or name == "mT")  # a transposition once it is exported


def test_a_constant_that_is_divided_is_recognised():
    weight, x = nn.Parameter(torch.ones(2, 1, 1)), torch.rand(1, 2, 4, 4)
    for use, count in ((lambda x, w: w / x.sum() * x, 1), (lambda x, w: x / x.sum() * w / w, 0)):
        assert len(constants_divided(plain_program(Use(use, weight), x))) == count


@MECHANISM
@pytest.mark.parametrize("grad", [True, False])
def test_a_trace_holds_no_write_and_no_python(name, grad):
    module, (x, other) = build(name).requires_grad_(grad), torch.randn(2, 2, WIDTH, 15, 22)
    with torch.set_grad_enabled(grad):
        traced = torch.jit.trace(module, x)  # which compares what it records with gradients and without
        assert relative(traced(other).detach(), module(other).detach()) < 1e-5
    assert not names_in(traced) & set(LACKED)
    nodes = list(traced.inlined_graph.nodes())
    for node in nodes:
        assert node.kind() != "aten::dropout" or list(node.inputs())[2].toIValue() is False, node
        assert node.kind() != "prim::PythonOp" and node.kind().split("::")[0] in ("aten", "prim"), node
        assert node.kind().startswith("prim") or not re.search(r"\(\w!\)", node.schema()), node


def graph_targets(graph):
    return [n.target for n in graph.nodes if n.op == "call_function"]


def test_cat_runs_where_the_compiler_does_not_tell_an_exporter(monkeypatch):
    "PyTorch 2.6, the oldest that is supported, has no `is_exporting`."
    module, x = build("cat"), torch.randn(1, WIDTH, 9, 8)
    expected = module(x)
    monkeypatch.delattr(torch.compiler, "is_exporting", raising=False)
    assert torch.equal(module(x), expected)


# The quick tests export with free sizes, and without gradients, in test_deploy.
@MECHANISM
@pytest.mark.parametrize(
    ("grad", "free"), [(True, False), *(pytest.param(g, True, marks=pytest.mark.slow) for g in (True, False))]
)
def test_an_exported_program_holds_no_write_and_no_python(name, grad, free):
    x, other = (torch.randn(batch, WIDTH, 15, 22) for batch in (2, 5 if free else 2))
    batch, module = {0: torch.export.Dim("batch", min=1)}, build(name).requires_grad_(grad)
    with torch.set_grad_enabled(grad):
        program = torch.export.export(module, (x,), dynamic_shapes=(batch,) if free else None)
    plain = program.run_decompositions({})
    for target in graph_targets(plain.graph):
        if isinstance(target, torch._ops.OpOverload):
            assert target.namespace == "aten" and not writes(target._schema), target
    assert not names_in(plain) & set(LACKED) and not constants_divided(plain)
    assert relative(program.module()(other).detach(), module(other).detach()) < 1e-5


# What knows symbolic sizes is the choice of a form, which is tested above for every operator.
@MECHANISM
@pytest.mark.parametrize("mode", ["real", pytest.param("symbolic", marks=pytest.mark.slow)])
def test_a_functional_graph_holds_no_write(name, mode):
    "In the mode of real tensors an operator of ours appears whole."
    module, (x, other) = build(name), torch.randn(2, 2, WIDTH, 15, 22)
    recorded = copy.deepcopy(module)  # CAT's parts share a buffer, which `functional_call` does not put back
    state = dict(module.named_parameters()) | dict(module.named_buffers())

    def run(state, x):
        return torch.func.functional_call(recorded, state, (x,))

    with torch.no_grad():
        graph = make_fx(run, tracing_mode=mode)(state, x)
        assert relative(graph(state, other), module(other)) < 1e-5
    for target in graph_targets(graph.graph):
        if isinstance(target, torch._ops.OpOverload):
            assert target.namespace in ("aten", "scsa_book") and not writes(target._schema), target


@MECHANISM
@pytest.mark.filterwarnings("ignore")
def test_the_older_onnx_exporter_keeps_the_input_of_a_frozen_module(name):
    runtime = pytest.importorskip("onnxruntime")
    module, (x, other) = build(name).requires_grad_(False), torch.randn(2, 2, WIDTH, 15, 22)
    file = io.BytesIO()
    torch.onnx.export(module, (x,), file, dynamo=False, opset_version=17)
    session = runtime.InferenceSession(file.getvalue())
    (given,) = session.get_inputs()
    (y,) = session.run(None, {given.name: other.numpy()})
    assert relative(torch.from_numpy(y), module(other)) < 1e-4


# ---- the library's own text

PACKAGE = Path(scsa_book.__file__).parent


def test_no_private_names_of_torch():
    private = re.compile(r"\btorch(\.\w+)*\._\w+|from torch(\.\w+)*\._")
    texts = {p.name: p.read_text("utf-8") for p in PACKAGE.rglob("*.py")}
    found = [f"{name}: {m[0]}" for name, text in texts.items() for m in private.finditer(text)]
    assert found == []


def imports_of(path):
    nodes = ast.walk(ast.parse(path.read_text("utf-8")))
    return {("." * n.level) + (n.module or "") for n in nodes if isinstance(n, ast.ImportFrom)}


@pytest.mark.parametrize("path", sorted((PACKAGE / "operators").glob("*.py")), ids=lambda p: p.stem)
def test_operators_know_nothing_of_mechanisms(path):
    assert not any(n.startswith("..") for n in imports_of(path))


MECHANISMS = {m.stem for m in (PACKAGE / "attention").glob("*.py")} - {"base", "registry", "__init__"}
# Mechanisms that are made of others.
PARTS = {"scsa": {".pcsa", ".smsa"}, "danet": {".non_local"}}


@pytest.mark.parametrize("stem", sorted(MECHANISMS - {"scsa_ablation"}))
def test_a_mechanism_imports_base_and_operators(stem):
    found = imports_of(PACKAGE / "attention" / f"{stem}.py")
    ours = {n for n in found if n.startswith(".") or "scsa_book" in n}
    allowed = {".base", "scsa_book.attention.base"} | PARTS.get(stem, set())
    assert all(n in allowed or n.startswith("..operators.") for n in ours), ours
