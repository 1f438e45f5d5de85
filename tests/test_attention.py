"""Properties of every mechanism of the registry, in one parametrised file."""

import copy
import io
import pickle

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import nn

from scsa_book.attention import registry
from scsa_book.explain import parity

GOLDEN = parity.recordings()
NAMES = registry.names()
WIDTH = 32  # accepted by the defaults of every mechanism
MECHANISM = pytest.mark.parametrize("name", NAMES)


def build(name, channels=WIDTH, *, awake=True, **options):
    "A mechanism with weights from one seed; `awake`: parameters that start at zero get random values."
    torch.manual_seed(0)
    module = registry.create(name, channels, **NARROW.get(name, {}) | options)
    for parameter in module.parameters() if awake else ():
        if not parameter.any():
            nn.init.normal_(parameter, std=0.3)
    return module


def normalises_the_batch(module):
    return any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in module.modules())


# Batch normalisation after the global mean: in training one image is one value.
NORMALISES_ITS_SUMMARY = {"sk", "bam"}
# A layer that starts at zero: the layers before it get their first gradient after one step.
STARTS_CLOSED = {"non_local", "gc", "cat", "danet_position", "sa"}
# Biases that shift all logits of a softmax alike: no output ever depends on them.
SHIFTS = {"non_local": {"phi.bias"}, "gc": {"mask.bias"}, "danet_position": {"key.bias"}}
# Groups that a narrow map can be split into.
NARROW = {"sa": {"groups": 4}, "sge": {"groups": 4}, "ema": {"factor": 8}}
# Options with trainable parameters, where the default has none.
WITH_PARAMETERS = {"ge": {"variant": "theta+", "extent": 4}}


def relative(a, b):
    return float(((a - b).abs().max() / b.abs().max()).detach())


# ---- the authors' implementations ----------------------------------------------------------------


def test_every_variant_has_recorded_vectors():
    assert set(registry.variants()) == set(GOLDEN)


@pytest.mark.parametrize("variant", GOLDEN)
def test_equals_the_authors_code(variant):
    error, bound = parity.agreement(variant), parity.bound(variant)
    assert error.output < bound
    assert error.gradient < bound


@pytest.mark.parametrize("variant", GOLDEN)
def test_a_state_dict_that_does_not_fit_is_refused(variant):
    options, state = parity.recorded(variant)[2:4]
    with pytest.raises(ValueError, match="unknown surplus"):
        registry.from_authors(variant, options, state | {"surplus": torch.zeros(1)})
    if state:
        key = next(iter(state))
        with pytest.raises(ValueError, match="missing"):
            registry.from_authors(variant, options, {k: v for k, v in state.items() if k != key})
        with pytest.raises(ValueError, match="has shape"):
            registry.from_authors(variant, options, state | {key: torch.zeros(3, 1, 1, 7)})
    with pytest.raises(ValueError, match="lacks"):
        registry.from_authors(variant, {}, state)


# ---- the contract --------------------------------------------------------------------------------


@MECHANISM
@settings(max_examples=15, deadline=None)
@given(batch=st.integers(0, 2), height=st.integers(1, 65), wide=st.integers(1, 65), train=st.booleans())
def test_any_size(name, batch, height, wide, train):
    module = build(name).train(train)
    if train:
        assume(batch * height * wide > 1 or not normalises_the_batch(module))  # one value has no variance
        assume(batch != 1 or name not in NORMALISES_ITS_SUMMARY)
    x = torch.randn(batch, WIDTH, height, wide)
    y = module(x)
    assert y.shape == x.shape and y.dtype == x.dtype and y.isfinite().all()


@MECHANISM
@pytest.mark.parametrize("channels", [8, 16, 64, 256, 2048])
def test_any_width_or_a_reason(name, channels):
    try:
        module = registry.create(name, channels).eval()
    except ValueError as reason:
        assert f"channels={channels}" in str(reason)
        module = build(name, channels).eval() if channels >= 16 else None
    if module is not None:
        x = torch.randn(2, channels, 7, 5)
        assert module(x).shape == x.shape and module(x).isfinite().all()


@MECHANISM
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_dtype_is_kept(name, dtype):
    module, x = build(name, dtype=dtype).eval(), torch.randn(2, WIDTH, 9, 14, dtype=dtype)
    y = module(x)
    assert y.dtype == dtype
    exact = build(name, dtype=torch.float64).eval()
    exact.load_state_dict(module.state_dict())
    tolerance = {torch.float32: 1e-5, torch.bfloat16: 5e-2, torch.float64: 1e-12}[dtype]
    assert relative(y.double(), exact(x.double())) < tolerance


@MECHANISM
def test_memory_format_is_kept(name):
    module, x = build(name).eval(), torch.randn(2, WIDTH, 9, 14)
    y = module(x.contiguous(memory_format=torch.channels_last))
    assert y.is_contiguous(memory_format=torch.channels_last)
    assert module(x).is_contiguous()
    assert relative(y, module(x)) < 1e-5


@MECHANISM
def test_maps_are_the_factors_of_forward(name):
    module, x = build(name).eval(), torch.randn(2, WIDTH, 9, 14)
    assert relative(module.recombine(x, module.attention_maps(x)), module(x)) < 1e-5


@MECHANISM
@pytest.mark.parametrize("size", [(9, 14), (40, 26)], ids=str)
@pytest.mark.parametrize("threads", [1, 4])
def test_in_use_it_computes_what_it_computes_in_training(name, size, threads):
    # Without gradients, in single precision on a CPU, other kernels may be used.
    channels = 256 if size == (40, 26) and name not in NARROW else WIDTH  # images are processed one at a time
    module, before = build(name, channels).eval(), torch.get_num_threads()
    x = torch.randn(2, channels, *size)
    exact = copy.deepcopy(module).double()(x.double()).detach()
    torch.set_num_threads(threads)
    try:
        with torch.no_grad():
            y = module(x)
    finally:
        torch.set_num_threads(before)
    assert relative(y.double(), exact) < 1e-5
    assert relative(y, module(x.requires_grad_()).detach()) < 1e-5


# PyTorch has no forward derivative for its fused attention.
WITHOUT_TANGENT = {"non_local", "strided_sparse"}


@MECHANISM
@torch.no_grad()
def test_function_transforms(name):
    module, x = build(name, dtype=torch.float64).eval(), torch.randn(3, 1, WIDTH, 9, 14, dtype=torch.float64)
    assert torch.allclose(torch.vmap(module)(x), torch.stack([module(image) for image in x]))
    single = copy.deepcopy(module).float()
    assert relative(torch.vmap(single)(x.float()).double(), torch.vmap(module)(x)) < 1e-5
    if name not in WITHOUT_TANGENT:
        step = 1e-6 * x[1]
        slope = torch.func.jvp(module, (x[0],), (x[1],))[1]
        assert relative(slope, (module(x[0] + step) - module(x[0] - step)) / 2e-6) < 1e-6


@MECHANISM
@pytest.mark.parametrize("fast", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_gradcheck(name, fast):
    "The quick one compares a random projection of the Jacobian, at several maps; the long one every entry."
    module = build(name, dtype=torch.float64).eval()
    for x in torch.randn(5 if fast else 1, 1, WIDTH, 3, 8, dtype=torch.float64):
        assert torch.autograd.gradcheck(module, x.requires_grad_(), atol=1e-6, fast_mode=fast)


@MECHANISM
def test_every_parameter_gets_a_gradient(name):
    module = build(name, awake=False, **WITH_PARAMETERS.get(name, {})).eval()
    optimizer = torch.optim.SGD(module.parameters(), 0.1)
    # The gradient of the sum alone can be zero: after a normalisation it does not depend on the input.
    x, weight = torch.randn(2, 4, WIDTH, 15, 22)

    def idle():
        module.zero_grad()
        (module(x) * weight).sum().backward()
        return {n for n, p in module.named_parameters() if p.grad is None or p.grad.abs().max() < 1e-5}

    first = idle() - SHIFTS.get(name, set())
    assert bool(first) == (name in STARTS_CLOSED), first
    if first:
        optimizer.step()
        assert idle() <= SHIFTS.get(name, set())


@MECHANISM
def test_autocast(name):
    module, x = build(name).eval(), torch.randn(2, WIDTH, 9, 14)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = module(x)
    assert relative(y.float(), module(x)) < 5e-2


@MECHANISM
def test_copies_and_round_trips(name):
    module, x = build(name).eval(), torch.randn(2, WIDTH, 9, 14)
    other = build(name).eval()
    other.load_state_dict(module.state_dict())
    for copied in (copy.deepcopy(module), pickle.loads(pickle.dumps(module)), other):
        assert torch.equal(copied(x), module(x))
    file = io.BytesIO()
    torch.save(module.state_dict(), file)
    file.seek(0)
    other.load_state_dict(torch.load(file, weights_only=True))
    assert torch.equal(other(x), module(x))


@MECHANISM
def test_compiles_whole(name):
    torch._dynamo.reset()
    module = build(name).eval()
    graphs = []

    def backend(graph, _):
        graphs.append(graph)
        return graph.forward

    compiled = torch.compile(module, fullgraph=True, backend=backend)
    for size in [(15, 22), (16, 23), (30, 29)]:
        x = torch.randn(3, WIDTH, *size)
        assert relative(compiled(x), module(x)) < 1e-5
    assert len(graphs) <= 2, "one recompilation makes the sizes dynamic; more means a guard on a value"


# The quick tests have the same with free sizes, in test_deploy.
@MECHANISM
@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_onnx(name):
    runtime = pytest.importorskip("onnxruntime")
    module, x = build(name).eval(), torch.randn(2, WIDTH, 15, 22)
    program = torch.onnx.export(module, (x,), dynamo=True, verbose=False)
    session = runtime.InferenceSession(program.model_proto.SerializeToString())
    (y,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    assert relative(torch.from_numpy(y), module(x)) < 1e-4


# A norm divides rounding by a small deviation.
ROUNDED = {"non_local": 5e-4}


@MECHANISM
@pytest.mark.slow
def test_inductor(name):
    torch._dynamo.reset()
    module, copied = build(name), build(name)
    compiled = torch.compile(copied, fullgraph=True)
    for size in [(15, 22), (16, 23)]:
        x = torch.randn(4, WIDTH, *size, requires_grad=True)
        u = x.detach().clone().requires_grad_()
        weight = torch.randn_like(x)
        (module(x) * weight).sum().backward()
        (compiled(u) * weight).sum().backward()
        assert relative(compiled(u), module(x)) < ROUNDED.get(name, 1e-4)
        assert relative(u.grad, x.grad) < 1e-3


# ---- clear errors --------------------------------------------------------------------------------


@MECHANISM
@pytest.mark.parametrize("channels", [0, -8, 2.0, True, "64"])
def test_channels_must_be_a_positive_integer(name, channels):
    with pytest.raises(ValueError, match="channels"):
        registry.info(name).make(channels)


@MECHANISM
@pytest.mark.parametrize("shape", [(32, 5, 5), (1, 31, 5, 5), (1, 1, 32, 5, 5)])
def test_a_tensor_that_is_no_map_of_these_channels(name, shape):
    with pytest.raises(ValueError, match="it takes"):
        build(name)(torch.zeros(shape))


BAD = [  # mechanism, options, what the message must say: the value, and what would be right
    ("se", {"reduction": 0}, "reduction=0.*positive"),
    ("eca", {"kernel": 4}, "kernel=4.*odd"),
    ("eca", {"kernel": 0}, "kernel=0.*positive"),
    ("fca", {"reduction": 0}, "reduction=0.*positive"),
    ("fca", {"frequencies": "mid16"}, "mid16.*top16"),
    ("fca", {"frequencies": "top33"}, "top33.*up to 32"),
    ("fca", {"frequencies": [(0,7)]}, r"\(0, 7\).*from 0 to 6"),
    ("fca", {"frequencies": "top12"}, "channels=32.*12.*top32"),
    ("fca", {"size": 15}, "size=15.*multiple of 7.*56, 28, 14, 7"),
    ("ge", {"variant": "theta*"}, r"theta\*.*theta-"),
    ("ge", {"extent": 3}, "extent=3.*power of two"),
    ("ge", {"variant": "theta"}, "theta.*size="),
    ("ge", {"size": 7}, "size=7.*not used"),
    ("ge", {"variant": "theta+","size": (7,0)}, "width=0.*positive"),
    ("ge", {"reduction": 0}, "reduction=0.*positive"),
    ("sk", {"groups": 5}, "channels=32.*groups=5.*groups=1"),
    ("sk", {"dilations": (1,1)}, r"\(1, 1\).*different"),
    ("sk", {"dilations": 2}, r"dilations=2.*\(1, 2\)"),
    ("sk", {"dilations": (0,1)}, "dilations=0.*positive"),
    ("sk", {"min_hidden": 0}, "min_hidden=0.*positive"),
    ("cbam", {"kernel": 4}, "kernel=4.*odd"),
    ("cbam", {"reduction": -1}, "reduction=-1.*positive"),
    ("cbam", {"order": "sideways"}, "sideways.*channel-spatial"),
    ("non_local", {"pairwise": "cosine"}, "pairwise='cosine'.*embedded, gaussian"),
    ("non_local", {"pool": "max"}, "pool='max'.*before, after, none"),
    ("non_local", {"reduction": 0}, "NonLocal: reduction=0.*positive"),
    ("gc", {"reduction": 1 / 16}, "reduction=0.0625.*positive"),
    ("gc", {"min_hidden": 0}, "min_hidden=0.*positive"),
    ("gc", {"fusion": "multiply"}, "fusion='multiply'.*add, mul, both"),
    ("gc", {"pool": "max"}, "pool='max'.*attention, average"),
    ("danet_position", {"reduction": -8}, "PositionAttention: reduction=-8.*positive"),
    ("strided_sparse", {"patterns": "local"}, r"patterns='local'.*\('local', 'strided'\)"),
    ("strided_sparse", {"patterns": ("local", "dilated")}, "dilated.*local, strided, fixed"),
    ("strided_sparse", {"patterns": ("local", "local")}, "must be different"),
    ("strided_sparse", {"heads": 3}, "channels=32 with heads=3.*multiples of 2"),
    ("strided_sparse", {"heads": 0}, "heads=0.*positive"),
    ("strided_sparse", {"stride": 0}, "stride=0.*positive"),
    ("strided_sparse", {"summary": 0}, "summary=0.*positive"),
    ("sa", {"groups": 64}, "channels=32.*groups=64.*groups=16 would fit"),
    ("sa", {"groups": 0}, "groups=0.*positive"),
    ("sa", {"groups": 4, "transform": "fc"}, "fc.*scale, none, conv"),
    ("sge", {"groups": 64}, "channels=32.*groups=64.*groups=32 would fit"),
    ("sge", {"groups": 0}, "groups=0.*positive"),
    ("bam", {"combine": "vote"}, "vote.*product, sum"),
    ("bam", {"norm": "end"}, "end.*hidden, logits"),
    ("bam", {"reduction": 0}, "reduction=0.*positive"),
    ("bam", {"dilation": 0}, "dilation=0.*positive"),
    ("ela", {"kernel": 4}, "kernel=4.*odd"),
    ("ela", {"kernel": 0}, "kernel=0.*positive"),
    ("ela", {"norm_groups": 5}, "channels=32.*norm_groups=5.*norm_groups=1 can"),
    ("ela", {"conv_width": 12}, "channels=32.*conv_width=12.*conv_width=4 can"),
    ("ela", {"conv_width": 0}, "conv_width=0.*positive"),
    ("ca", {"reduction": 0}, "CA: reduction=0.*positive"),
    ("ca", {"min_hidden": -1}, "CA: min_hidden=-1.*positive"),
    ("ema", {"factor": 5}, "channels=32.*factor=5.*divides"),
    ("ema", {"factor": 0}, "EMA: factor=0.*positive"),
    ("cpca", {"reduction": 0}, "CPCA: reduction=0.*positive"),
    ("cat", {"reduction": 0}, "reduction=0.*positive"),
    ("cat", {"kernel": 6}, "kernel=6.*odd"),
    ("cat", {"filter_size": 4}, "filter_size=4.*odd"),
    ("cat", {"filter_sigma": -1.0}, "filter_sigma=-1.0.*positive"),
    ("cat", {"filter_border": "wrap"}, "wrap.*zeros, reflect"),
    ("cat", {"channel_filter": "width"}, "width.*2d, height"),
    ("cat", {"fusion": "product"}, "product.*algorithm"),
    ("cat", {"exterior": "none"}, "exterior='none'.*softmax, raw"),
    ("cat", {"interior": "sigmoid"}, "interior='sigmoid'.*raw"),
    ("cat", {"entropy": "shannon"}, "shannon.*proper"),
    ("cat", {"entropy_span": "01"}, "entropy_span='01'.*unit"),
    ("cat", {"entropy_scope": "channel"}, "entropy_scope='channel'.*sample"),
    ("cat", {"summaries": "concat"}, "concat.*add, stack"),
    ("smsa", {"kernels": ()}, "odd"),
    ("smsa", {"kernels": (3, 4, 5, 7)}, "4.*odd"),
    ("smsa", {"kernels": (3, 5, 7)}, "channels=32.*multiple of 3"),
    ("smsa", {"gate": "tanh"}, "tanh.*sigmoid"),
    ("pcsa", {"heads": 5}, "channels=32.*5"),
    ("pcsa", {"window": 0}, "window=0.*positive"),
    ("pcsa", {"pool": "median"}, "median.*average"),
    ("pcsa", {"dropout": 1.5}, "dropout=1.5.*1"),
    ("scsa", {"heads": 7}, "channels=32.*7"),
]


@pytest.mark.parametrize("name, options, says", BAD, ids=[f"{n}-{o}" for n, o, _ in BAD])
def test_bad_options_are_refused_at_construction(name, options, says):
    with pytest.raises(ValueError, match=says):
        registry.create(name, 32, **options)


def test_unknown_names_list_the_known_ones():
    with pytest.raises(ValueError, match="Did you mean 'scsa'.*Known: se, eca"):
        registry.create("scsaa", 32)
    with pytest.raises(ValueError, match="Did you mean 'reduction'"):
        registry.create("se", 32, reductoin=4)
    with pytest.raises(ValueError, match="authors' variant"):
        registry.from_authors("senet", {}, {})


def test_cpca_in_bfloat16_ends_on_a_cpu(executed):
    "In a process of its own with a time limit: our guard is what is tested."
    code = """
import signal
import torch
signal.alarm(120)
from scsa_book.attention.cpca import CPCA
x = torch.randn(1, 16, 8, 32).to(memory_format=torch.channels_last)
module = CPCA(16).to(memory_format=torch.channels_last)
expected = module(x)
with torch.autocast("cpu", torch.bfloat16):
    y = module(x)
y.float().sum().backward()
narrow = x.bfloat16()
found = module.bfloat16()(narrow)
traced = torch.jit.trace(module, narrow)(narrow)
for t in (y, found, traced):
    assert torch.allclose(t.float(), expected, atol=0.03), (t.float() - expected).abs().max()
"""
    status, said = executed(code)
    assert status == 0, said
