"""The rows of the SCSA ablation, and every other option of its parts, against a literal reading."""

import copy
import math
import pickle
import re

import peers
import pytest
import torch
from torch import nn

from scsa_book.attention import registry
from scsa_book.attention.pcsa import PCSA
from scsa_book.attention.scsa import SCSA
from scsa_book.attention.scsa_ablation import ABLATIONS
from scsa_book.attention.smsa import SMSA
from scsa_book.evidence import speed
from scsa_book.evidence.cost import cost
from scsa_book.evidence.published import cells

VERSIONS = ABLATIONS | {
    "no-scale": {"scale": "none"},
    "no-windows": {"window": 1},
    "recombination": {"pool": "recombination", "window": 2},
    "much-at-once": {
        "order": "channel-spatial",
        "kernels": (5, 3),
        "norm": "batch",
        "norm_first": True,
        "shared": False,
        "heads": 4,
        "shuffle": True,
        "scale": "windows",
        "pool": "recombination",
        "window": 3,
        "qkv_bias": True,
    },
}
VERSION = pytest.mark.parametrize("name", VERSIONS)
# To record a module takes seconds: the quick tests do it once for each kind; `much-at-once` has most options.
RECORDED = {"scsa", "without-smsa", "without-pcsa", "without-progressive-compression", "bn-for-gn"}
RECORDED |= {"much-at-once"}


def build(name, channels=16, seed=0, **kw):
    torch.manual_seed(seed)
    return SCSA(channels, **VERSIONS[name], **kw)


def with_random_values(module):
    "Nothing is left at one or zero, where a mistake would not be seen."
    for p in module.parameters():
        nn.init.normal_(p, std=0.7)
    for buffer in module.buffers():
        if buffer.dtype.is_floating_point:
            nn.init.uniform_(buffer, 0.5, 2)
    return module


# ---- the literal reading -------------------------------------------------------------------------


def convolved(z, convs):
    "Tap by tap, channel by channel: (B, C, L) -> (B, C, L), zeros outside."
    taps = [row[0] for conv in convs for row in conv.weight]
    biases = [bias for conv in convs for bias in conv.bias]
    u = torch.zeros_like(z)
    for c, (kernel, bias) in enumerate(zip(taps, biases, strict=True)):
        half = len(kernel) // 2
        for i in range(z.shape[2]):
            u[:, c, i] = bias
            for t in range(-half, half + 1):
                if 0 <= i + t < z.shape[2]:
                    u[:, c, i] = u[:, c, i] + kernel[half + t] * z[:, c, i + t]
    return u


def standard(u, dims):
    mean = u.mean(dims, keepdim=True)
    return (u - mean) / ((u - mean).square().mean(dims, keepdim=True) + 1e-5).sqrt()


def normalised(u, norm, options, training):
    "Of strips: each of the groups of one sample, or each channel over the batch."
    if options.get("norm") == "batch":
        if training:
            u = standard(u, (0, 2))
        else:
            mean, variance = norm.running_mean[:, None], norm.running_var[:, None]
            u = (u - mean) / (variance + 1e-5).sqrt()
    else:
        groups = len(options.get("kernels", (3, 5, 7, 9)))
        u = torch.cat([standard(part, (1, 2)) for part in u.chunk(groups, 1)], 1)
    return u * norm.weight[:, None] + norm.bias[:, None]


def literal_smsa(x, m, options):
    sigmoids = []
    shared = options.get("shared", True)
    for z, convs, norm in (
        (x.sum(3) / x.shape[3], m.convs, m.norm_h),
        (x.sum(2) / x.shape[2], m.convs if shared else m.convs_w, m.norm_w),
    ):
        if options.get("norm_first"):
            u = convolved(normalised(z, norm, options, m.training), convs)
        else:
            u = normalised(convolved(z, convs), norm, options, m.training)
        sigmoids.append(1 / (1 + torch.exp(-u)))
    return x * sigmoids[0][:, :, :, None] * sigmoids[1][:, :, None, :]


def windows_of(x, m, options):
    "(B, C, N'), window by window."
    window = options.get("window", 7)
    h, w = (min(window or side, side) for side in x.shape[2:])
    found = []
    for i in range(0, x.shape[2] - h + 1, h):
        for j in range(0, x.shape[3] - w + 1, w):
            part = x[:, :, i : i + h, j : j + w]
            if options.get("pool") == "recombination":
                laid_out = part.flatten(1)  # channels, then rows, then columns: pixel-unshuffle
                found.append(laid_out @ m.squeeze.weight.flatten(1).T)
            else:
                found.append(part.sum((2, 3)) / (h * w))
    return torch.stack(found, 2)


def literal_pcsa(x, m, options):
    z = standard(windows_of(x, m, options), (1, 2))
    z = z * m.norm.weight[:, None] + m.norm.bias[:, None]
    q, k, v = (z * f.weight[:, 0, 0] for f in (m.q, m.k, m.v))
    if options.get("qkv_bias"):
        q, k, v = (t + f.bias[:, None] for t, f in zip((q, k, v), (m.q, m.k, m.v), strict=True))
    channels, heads = x.shape[1], options.get("heads", 1)
    d = channels // heads
    scale = options.get("scale", "channels")
    root = {"channels": math.sqrt(d), "windows": math.sqrt(z.shape[2]), "none": 1}[scale]
    gates = torch.zeros(x.shape[:2], dtype=x.dtype)
    for head in range(heads):
        members = range(head * d, head * d + d)
        if options.get("shuffle"):
            members = range(head, channels, heads)
        for c in members:
            e = [torch.exp((q[:, c] * k[:, other]).sum(1) / root) for other in members]
            mixed = sum(w[:, None] * v[:, o] for w, o in zip(e, members, strict=True)) / sum(e)[:, None]
            gates[:, c] = 1 / (1 + torch.exp(-mixed.mean(1)))
    return x * gates[:, :, None, None]


def literal(x, module, options):
    order = options.get("order", "spatial-channel")
    for half in order.split("-"):
        if half == "spatial":
            x = literal_smsa(x, module.smsa, options)
        else:
            x = literal_pcsa(x, module.pcsa, options)
    return x


@VERSION
@pytest.mark.parametrize("size", [(15, 16), (4, 9), (3, 3)], ids=str)
@pytest.mark.parametrize("train", [False, True])
def test_equals_the_literal_reading(name, size, train):
    module = with_random_values(build(name, dtype=torch.float64)).train(train)
    x = torch.randn(3, 16, *size, dtype=torch.float64)
    with torch.no_grad():
        expected = literal(x, module, VERSIONS[name])
        assert torch.allclose(module(x), expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("name", [n for n, o in VERSIONS.items() if o])
def test_an_option_makes_a_difference(name):
    "With the default's weights wherever they fit; otherwise an option might be read and forgotten."
    module, default = build(name), build("scsa")
    own = module.state_dict()
    fits = {k: v for k, v in default.state_dict().items() if k in own and own[k].shape == v.shape}
    module.load_state_dict(fits, strict=False)
    x = torch.randn(2, 16, 15, 22)
    assert (module(x) - default(x)).abs().max() > 1e-4


# ---- the rows of the paper -----------------------------------------------------------------------


def test_the_rows_are_those_of_the_published_table():
    rows = cells("scsa", "III", metric="top1")
    assert [re.sub("^.*: | [(].*", "", c.variant) for c in rows] == list(ABLATIONS)


# taps and bias of a channel in each half, two norms of a strip, one of the windows, three factors
PARAMETERS = {
    "scsa": 6 + 1 + 4 + 2 + 3,
    "without-smsa": 2 + 3,
    "without-pcsa": 6 + 1 + 4,
    "unshared-convolutions": 2 * (6 + 1) + 4 + 2 + 3,
    "one-branch-k3": 3 + 1 + 4 + 2 + 3,
    "one-branch-k7": 7 + 1 + 4 + 2 + 3,
    "two-branches-k3-k7": 5 + 1 + 4 + 2 + 3,
}


@pytest.mark.parametrize("name", ABLATIONS)
@pytest.mark.parametrize("channels", [64, 256])
def test_parameters_of_a_row(name, channels):
    count = cost(SCSA(channels, **ABLATIONS[name], device="meta"), (channels, 14, 14)).parameters
    assert count == PARAMETERS.get(name, 16) * channels


def test_parameters_of_recombination():
    count = cost(SCSA(64, pool="recombination", device="meta"), (64, 14, 14)).parameters
    assert count == 16 * 64 + 49 * 64 * 64


def test_multiply_accumulates_of_the_rows():
    C, H, W = 64, 29, 44
    strips, factors, pairs = C * (H + W), 3 * C, 2 * C * C
    N = (29 // 7) * (44 // 7)
    default = 6 * strips + N * (factors + pairs)
    expected = dict.fromkeys(ABLATIONS, default) | {
        "without-smsa": N * (factors + pairs),
        "without-pcsa": 6 * strips,
        "without-progressive-compression": 6 * strips + factors + pairs,
        "multi-head-with-shuffle": 6 * strips + N * (factors + pairs // 8),
        "one-branch-k3": 3 * strips + N * (factors + pairs),
        "one-branch-k7": 7 * strips + N * (factors + pairs),
        "two-branches-k3-k7": 5 * strips + N * (factors + pairs),
    }
    measured = {n: cost(SCSA(C, **o, device="meta"), (C, H, W)).macs for n, o in ABLATIONS.items()}
    assert measured == expected


def test_names_of_the_default_stay():
    "Checkpoints depend on them."
    convs = [f"smsa.convs.{i}.{kind}" for i in range(4) for kind in ("weight", "bias")]
    norms = [f"smsa.norm_{axis}.{kind}" for axis in "hw" for kind in ("weight", "bias")]
    pcsa = ["pcsa.norm.weight", "pcsa.norm.bias", *(f"pcsa.{f}.weight" for f in "qkv")]
    assert list(SCSA(16).state_dict()) == convs + norms + pcsa


# ---- the contract --------------------------------------------------------------------------------


def refusal(name, size, batch, train):
    "What a call on such a map must be refused with, None if it must work."
    options = VERSIONS[name]
    if options.get("pool") == "recombination" and min(size) < options["window"]:
        return f"got a map of {size[0]}x{size[1]}.*window={min(size)} or less.*average"
    if options.get("norm") == "batch" and train and batch * min(size) == 1:
        return "more than 1 value per channel"
    return None


@VERSION
@pytest.mark.parametrize("batch", [0, 1, 3])
@pytest.mark.parametrize("train", [False, True])
def test_any_size(name, batch, train):
    module = build(name).train(train)
    for size in [(1, 1), (1, 9), (5, 3), (7, 7), (6, 33), (15, 22)]:
        x = torch.randn(batch, 16, *size)
        if says := refusal(name, size, batch, train):
            with pytest.raises(ValueError, match=says):
                module(x)
        else:
            y = module(x)
            assert y.shape == x.shape and y.dtype == x.dtype and y.isfinite().all()
    assert all(t.isfinite().all() for t in module.state_dict().values())


@VERSION
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_dtype_and_memory_format_are_kept(name, dtype):
    module = build(name, dtype=dtype).eval()
    x = torch.randn(2, 16, 15, 22, dtype=dtype)
    y, last = module(x), module(x.contiguous(memory_format=torch.channels_last))
    assert y.dtype == last.dtype == dtype
    assert y.is_contiguous() and last.is_contiguous(memory_format=torch.channels_last)
    exact = build(name, dtype=torch.float64).eval()
    exact.load_state_dict(module.state_dict())
    tolerance = {torch.float32: 1e-5, torch.bfloat16: 5e-2}[dtype]
    expected = exact(x.double())
    for found in (y, last):
        assert (found.double() - expected).abs().max() < tolerance * expected.abs().max()


@VERSION
def test_maps_are_the_factors_of_forward(name):
    module, x = build(name).eval(), torch.randn(2, 16, 15, 22)
    maps = module.attention_maps(x)
    parts = {"spatial": ["height", "width"], "channel": ["channel"]}
    order = VERSIONS[name].get("order", "spatial-channel").split("-")
    assert list(maps) == [key for half in order for key in parts[half]]
    assert torch.allclose(math.prod(maps.values(), start=x), module(x), rtol=1e-5, atol=1e-6)


@VERSION
def test_gradients(name):
    module = with_random_values(build(name, dtype=torch.float64)).eval()
    x = torch.randn(1, 16, 3, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(module, x, atol=1e-6, fast_mode=True)
    weight = torch.randn(2, 16, 15, 22, dtype=torch.float64)
    (module(torch.randn_like(weight)) * weight).sum().backward()
    assert [n for n, p in module.named_parameters() if not p.grad.abs().sum() > 0] == []


@VERSION
def test_autocast_and_copies(name):
    module, x = build(name).eval(), torch.randn(2, 16, 15, 22)
    y = module(x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert (module(x).float() - y).abs().max() < 5e-2 * y.abs().max()
    other = build(name, seed=1).eval()
    other.load_state_dict(module.state_dict())
    for copied in (copy.deepcopy(module), pickle.loads(pickle.dumps(module)), other):
        assert torch.equal(copied(x), y)


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=[] if n in RECORDED else pytest.mark.slow) for n in VERSIONS]
)
def test_compiles_whole_and_exports(name):
    torch._dynamo.reset()
    module, graphs = build(name).eval(), []

    def backend(graph, _):
        graphs.append(graph)
        return graph.forward

    compiled = torch.compile(module, fullgraph=True, backend=backend)
    for size in [(15, 22), (16, 23), (30, 29)]:
        x = torch.randn(2, 16, *size)
        assert torch.allclose(compiled(x), module(x), atol=1e-6)
    assert len(graphs) <= 2
    batch = {0: torch.export.Dim("batch", min=1)}
    program = torch.export.export(module, (torch.randn(2, 16, 15, 22),), dynamic_shapes=(batch,))
    many = torch.randn(5, 16, 15, 22)
    assert torch.allclose(program.module()(many), module(many), atol=1e-6)


# The quick tests export the module with free sizes in test_deploy and compile it for three sizes above.
@pytest.mark.slow
def test_sizes_may_be_free():
    "Of an exported program, which asks for two windows on either axis, and of a compiled one."
    module, free = build("scsa").eval(), {axis: torch.export.Dim(f"axis{axis}", min=14) for axis in (2, 3)}
    program = torch.export.export(module, (torch.randn(2, 16, 15, 22),), dynamic_shapes=(free,)).module()
    torch._dynamo.reset()
    compiled = torch.compile(module, fullgraph=True, dynamic=True, backend="aot_eager")
    for size in [(15, 22), (33, 16), (30, 57)]:
        x = torch.randn(2, 16, *size)
        for made in (program, compiled):
            assert torch.allclose(made(x), module(x), atol=1e-6)


# ---- the fast path: `attention_maps` is the definition -----------------------------------------------


@VERSION
@pytest.mark.parametrize("last", [False, True], ids=["channels_first", "channels_last"])
@pytest.mark.parametrize("size", [(15, 22), (7, 7), (56, 9)], ids=str)
def test_the_fast_path_is_the_definition(name, last, size):
    "Output and all gradients; with gradients, without, and without in single precision: paths of their own."
    module = with_random_values(build(name, dtype=torch.float64)).eval()
    layout = torch.channels_last if last else torch.contiguous_format
    x = torch.randn(3, 16, *size, dtype=torch.float64).contiguous(memory_format=layout).requires_grad_()
    weight, wanted = torch.randn_like(x), [x, *module.parameters()]
    y = module(x)
    expected = module.recombine(x, module.attention_maps(x))
    with torch.no_grad():
        assert torch.allclose(module(x), expected)
        single = copy.deepcopy(module).float()(x.float())  # whose rows are added by a kernel of their own
        assert torch.allclose(single.double(), expected, rtol=1e-4, atol=1e-5)
    assert torch.allclose(y, expected)
    found = torch.autograd.grad((y * weight).sum(), wanted)
    for a, b in zip(found, torch.autograd.grad((expected * weight).sum(), wanted), strict=True):
        assert torch.allclose(a, b, atol=1e-10)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_gates_of_channels_that_stand_side_by_side_stand_so_too(dtype):
    x = torch.randn(2, 16, 9, 14, dtype=dtype).contiguous(memory_format=torch.channels_last)
    s_h, s_w = SCSA(16, dtype=dtype).to(memory_format=torch.channels_last).smsa.attention_maps(x).values()
    assert s_h.stride(1) == s_w.stride(1) == 1


def test_gradients_of_gradients():
    module = with_random_values(build("scsa", 8, dtype=torch.float64)).eval()
    x = torch.randn(1, 8, 9, 8, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradgradcheck(module, x, atol=1e-5, fast_mode=True)


def test_the_input_is_left_alone():
    "The last product takes the memory of the first, never that of the input."
    for name, channels in (("scsa", 16), ("smsa", 16), ("pcsa", 16), ("cbam", 16), ("ca", 16), ("cat", 16)):
        module, x = registry.create(name, channels).eval(), torch.randn(2, channels, 14, 15)
        before = x.clone()
        with torch.no_grad():
            y = module(x)
            assert torch.equal(x, before) and y.data_ptr() != x.data_ptr()
            assert torch.allclose(y, module(x.clone().requires_grad_()), atol=1e-6)


def test_large_batches_go_in_pieces():
    "More scores than a cache holds, and images read one by one, give what small ones give."
    module = with_random_values(build("scsa", 256)).eval()
    x = torch.randn(5, 256, 36, 33)
    with torch.no_grad():
        whole, single = module(x), torch.cat([module(image[None]) for image in x])
    assert torch.allclose(whole, single, rtol=1e-4, atol=1e-5)
    assert torch.allclose(whole, module.recombine(x, module.attention_maps(x)), rtol=1e-4, atol=1e-5)


def test_dropout_needs_the_matrix():
    module, x = SCSA(16, dropout=0.5).train(), torch.randn(2, 16, 14, 14)
    assert not torch.equal(module(x), module(x))
    assert torch.equal(module.eval()(x), module(x))


def test_shapes_alone_are_counted_as_written():
    C, H, W = 64, 28, 28
    seen = cost(SCSA(C, device="meta"), (C, H, W)).macs
    assert seen == 6 * C * (H + W) + 16 * (3 * C + 2 * C * C)


STRIPS = ("scsa", "smsa", "ca", "ela")  # whose product with two gates has a gradient of its own


@pytest.mark.parametrize("name", STRIPS)
def test_less_is_kept_for_the_backward_pass(name):
    module, x = registry.create(name, 64), torch.randn(2, 64, 56, 56)
    ours = speed.bytes_of(module, x)["saved_for_backward"]
    literal = speed.bytes_of(peers.straightforward(name)(module), x)["saved_for_backward"]
    assert 0 < ours < 0.15 * literal and ours < 0.25 * x.nbytes


@pytest.mark.parametrize("layout", speed.LAYOUTS.values(), ids=speed.LAYOUTS)
@pytest.mark.parametrize("name", STRIPS)
def test_gradients_of_maps_in_pieces(name, layout):
    "Several pieces, rows and columns in no window, single precision; a gradient that has no memory."
    module = with_random_values(registry.create(name, 256)).eval()
    x = torch.randn(2, 256, 36, 33).contiguous(memory_format=layout).requires_grad_()
    weight, wanted = torch.randn(2, 1, 36, 33), [x, *module.parameters()]
    found = torch.autograd.grad((module(x) * weight).sum(), wanted)
    exact, leaf = copy.deepcopy(module).double(), x.detach().double().requires_grad_()
    y = exact.recombine(leaf, exact.attention_maps(leaf))
    expected = torch.autograd.grad((y * weight).sum(), [leaf, *exact.parameters()], retain_graph=True)
    for a, b in zip(found, expected, strict=True):
        assert (a - b).abs().max() < 1e-4 * b.abs().max()
    (spread,) = torch.autograd.grad(module(x).sum(), x)
    (alone,) = torch.autograd.grad(y.sum(), leaf)
    assert torch.allclose(spread.double(), alone, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", STRIPS)
def test_gradients_of_a_part(name):
    "Of the map alone, of the parameters alone, many at a time, and the other way round."
    module = with_random_values(build_double(name)).eval()
    x = torch.randn(2, 16, 9, 8, dtype=torch.float64)
    weight = torch.randn(3, 2, 16, 9, 8, dtype=torch.float64)
    leaf = x.clone().requires_grad_()
    parameters = list(module.parameters())
    both = torch.autograd.grad(module(leaf), [leaf, *parameters], weight[0])
    of_parameters = torch.autograd.grad(module(x), parameters, weight[0])
    many = torch.autograd.grad(module(leaf), [leaf, *parameters], weight, is_grads_batched=True)
    with torch.autograd.forward_ad.dual_level():
        y = module(torch.autograd.forward_ad.make_dual(x, weight[1]))
        slope = torch.autograd.forward_ad.unpack_dual(y).tangent
    assert torch.allclose(slope, torch.func.jvp(module, (x,), (weight[1],))[1])
    module.requires_grad_(False)
    (of_map,) = torch.autograd.grad(module(leaf), leaf, weight[0])
    (transformed,) = torch.func.vjp(module, x)[1](weight[0])
    for a, b in zip((of_map, *of_parameters), both, strict=True):
        assert torch.allclose(a, b)
    assert torch.allclose(transformed, of_map)
    assert torch.allclose((slope * weight[0]).sum(), (of_map * weight[1]).sum())
    assert all(torch.allclose(a[0], b) for a, b in zip(many, both, strict=True))


def build_double(name):
    options = {"ela": {"norm_groups": 4}}.get(name, {})
    return registry.create(name, 16, **options).double()


@pytest.mark.parametrize("name", STRIPS)
def test_training_under_autocast(name):
    module, x = with_random_values(registry.create(name, 32)), torch.randn(2, 32, 14, 15)
    grads = []
    for enabled in (False, True):
        leaf = x.clone().requires_grad_()
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
            y = module(leaf)
            y.float().square().sum().backward()
        grads.append(leaf.grad)
    assert (grads[0] - grads[1]).abs().max() < 0.1 * grads[0].abs().max()


# ---- clear errors --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name, options, says",
    [
        ("scsa", {"order": "sideways"}, "SCSA: order='sideways'.*spatial-channel"),
        ("smsa", {"norm": "layer"}, "SMSA: norm='layer'.*group, batch"),
        ("scsa", {"norm": "layer"}, "SMSA: norm='layer'"),
        ("pcsa", {"scale": "heads"}, "PCSA: scale='heads'.*channels, windows, none"),
        ("pcsa", {"pool": "recombine"}, "'recombine'.*recombination"),
        ("pcsa", {"pool": "recombination", "window": None}, "give a window"),
        ("pcsa", {"pool": "recombination", "window": -1}, "window=-1"),
    ],
)
def test_bad_options_are_refused_at_construction(name, options, says):
    with pytest.raises(ValueError, match=says):
        registry.create(name, 32, **options)


def test_a_part_that_is_left_out_requires_nothing():
    "Ten channels have no four groups, and need none without SMSA."
    assert SCSA(10, order="channel")(torch.ones(1, 10, 3, 3)).shape == (1, 10, 3, 3)
    with pytest.raises(ValueError, match="multiple of 4"):
        SCSA(10, order="spatial")


def test_the_parts_are_the_mechanisms_of_their_own():
    torch.manual_seed(0)
    x = torch.randn(2, 16, 15, 22)
    for order, make in (("spatial", SMSA), ("channel", PCSA)):
        half, whole = make(16), SCSA(16, order=order)
        next(whole.children()).load_state_dict(half.state_dict())
        assert torch.equal(whole(x), half(x))
