"""What happens to an attended network: compiled, copied, recorded, converted, distributed, and taken back.

The oracle is the plain network with hooks, put on after everything else has happened to it.
"""

import copy
import io
import pickle
import warnings
from functools import cache

import pytest
import torch
from conftest import shake
from torch import nn
from torch.nn.utils import parametrizations, prune
from torch.nn.utils.fusion import fuse_conv_bn_eval
from torch.utils.checkpoint import checkpoint
from torchvision.models import mobilenet, resnet
from torchvision.ops import FrozenBatchNorm2d

from scsa_book.networks.placement import attend, attentions, detach, maps_of
from scsa_book.networks.sites import placements

timm = pytest.importorskip("timm")

ROWS = [[1, 16, 1, 1], [6, 24, 2, 2]]


def short(network, width):
    "A residual network without its last two stages, which are wide."
    network.layer3 = network.layer4 = nn.Identity()
    network.fc = nn.Linear(width, 5)
    return network


TRUNKS = {  # few layers, every kind of block
    "resnet": lambda: short(resnet.ResNet(resnet.BasicBlock, [1, 1, 1, 1]), 128),
    "mobilenet": lambda: mobilenet.MobileNetV2(5, inverted_residual_setting=ROWS),
    "timm": lambda: short(
        timm.models.resnet.ResNet(timm.models.resnet.Bottleneck, (2, 1, 1, 1), channels=(16, 32, 8, 8)), 128
    ),
}
MECHANISMS = {  # plain, with batch normalisation, with buffers
    "se": {"position": "before_add", "reduction": 4},
    "ca": {"position": "before_last_conv"},
    "fca": {"position": "before_add", "frequencies": "top8"},
}
CASES = [(trunk, name) for trunk in TRUNKS for name in MECHANISMS]
X = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))


@cache
def built(trunk, name):
    "A plain network and the same one attended, in evaluation mode; to be copied."
    torch.manual_seed(0)
    plain = shake(TRUNKS[trunk]()).eval()
    network = attend(copy.deepcopy(plain), name, **MECHANISMS[name])
    for module in attentions(network).values():
        for p in module.parameters():
            nn.init.normal_(p, std=0.5)
        shake(module)
    return plain, network


def hooked(plain, network, name):
    "The plain network, with hooks that call the attention of the other: right while nothing happens to it."
    found = placements(built_like(plain), MECHANISMS[name]["position"])
    placed = copy.deepcopy(list(attentions(network).values()))
    for (host, placement), attention in zip(found.items(), placed, strict=True):
        layer = plain.get_submodule(host)
        if placement.side == "before":
            layer.register_forward_pre_hook(lambda m, args, a=attention: (a(args[0]),))
        else:
            layer.register_forward_hook(lambda m, args, out, a=attention: a(out))
    return plain


def built_like(plain):
    "The stock network of a converted one: what a conversion has fused has no width any more."
    return next(TRUNKS[k]() for k in TRUNKS if type(TRUNKS[k]()) is type(plain))


def equal(y, expected, tolerance=1e-6):
    scale = float(expected.detach().abs().max())
    return torch.allclose(y, expected, rtol=tolerance, atol=tolerance * scale)


@pytest.fixture(params=CASES, ids="-".join)
def case(request):
    plain, network = built(*request.param)
    with torch.no_grad():
        expected = network(X)
        assert not equal(plain(X), expected, 1e-2)
    return copy.deepcopy(plain), copy.deepcopy(network), request.param[1], expected


# ---- compiled ----


@pytest.fixture
def fresh():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def diagonal(cases):
    "Every trunk and every mechanism once; the other combinations are long."
    first = [c for i, c in enumerate(cases) if i % 4 == 0]
    return [pytest.param(*c, marks=() if c in first else pytest.mark.slow) for c in cases]


@torch.no_grad()
@pytest.mark.parametrize(("trunk", "name"), diagonal(CASES))
def test_compiled_in_either_order_each_gives_its_own(trunk, name, fresh):
    plain, network = built(trunk, name)
    expected = network(X)
    for order in ((plain, network), (network, plain)):
        torch._dynamo.reset()
        by_module = {m: torch.compile(m, backend="eager", fullgraph=True)(X) for m in order}
        assert equal(by_module[network], expected) and equal(by_module[plain], plain(X))


@torch.no_grad()
@pytest.mark.parametrize("how", ["function", "method", "blocks"])
def test_attended_after_it_was_compiled(how, fresh):
    plain, attended = built("resnet", "ca")
    network = copy.deepcopy(plain)
    if how == "function":
        call = torch.compile(network, backend="eager")
    else:
        for part in [network] if how == "method" else network.layer2:
            part.compile(backend="eager")
        call = network
    assert equal(call(X), plain(X))
    attend(network, "ca", **MECHANISMS["ca"]).load_state_dict(attended.state_dict())
    assert equal(call(X), attended(X))
    assert len(maps_of(call, X)) == 2
    detach(network)
    assert equal(call(X), plain(X))


@pytest.mark.slow
@torch.no_grad()
@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
def test_compiled_to_machine_code(mode, fresh):
    plain, network = built("resnet", "se")
    first = torch.compile(copy.deepcopy(plain), mode=mode)(X)
    second = torch.compile(copy.deepcopy(network), mode=mode)(X)
    assert equal(first, plain(X), 1e-5) and equal(second, network(X), 1e-5)


# ---- copied and recorded ----


def saved(network):
    buffer = io.BytesIO()
    torch.save(network, buffer)
    return torch.load(io.BytesIO(buffer.getvalue()), weights_only=False)


def traced(network):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # TorchScript is deprecated
        return torch.jit.trace(network, X)


RECORDED = {
    "deepcopy": copy.deepcopy,
    "copy": copy.copy,
    "pickle": lambda network: pickle.loads(pickle.dumps(network)),
    "save": saved,
    "export": lambda network: torch.export.export(network, (X,), strict=False).module(),
    "trace": traced,
    "fx": torch.fx.symbolic_trace,
    "averaged": torch.optim.swa_utils.AveragedModel,
}


@torch.no_grad()
@pytest.mark.parametrize("how", RECORDED)
def test_copies_and_records_have_the_attention(case, how):
    _, network, _, expected = case
    assert equal(RECORDED[how](network)(X), expected)


@torch.no_grad()
@pytest.mark.parametrize("name", MECHANISMS)
def test_strict_export(name):
    _, network = built("resnet", name)
    program = torch.export.export(network, (X,), strict=True)
    assert equal(program.module()(X), network(X))


@pytest.mark.slow
@torch.no_grad()
def test_onnx(case):
    runtime = pytest.importorskip("onnxruntime")
    _, network, _, expected = case
    program = torch.onnx.export(network, (X,), dynamo=True, verbose=False)
    session = runtime.InferenceSession(program.model_proto.SerializeToString())
    (y,) = session.run(None, {session.get_inputs()[0].name: X.numpy()})
    assert equal(torch.from_numpy(y), expected, 1e-5)


def test_scripts_are_refused_with_another_way(case):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with pytest.raises(RuntimeError, match=r"torch\.export\.export.*torch\.jit\.trace"):
            torch.jit.script(case[1])


def test_copies_share_nothing(case):
    _, network, _, expected = case
    duplicate = copy.deepcopy(network)
    for module in attentions(duplicate).values():
        for p in module.parameters():
            p.data.fill_(3.0)
    with torch.no_grad():
        assert not equal(duplicate(X), expected, 1e-3) and equal(network(X), expected)


# ---- converted ----


def layers(network, *kinds):
    "Stock layers by name, those inside of attention apart."
    return {n: m for n, m in network.named_modules() if isinstance(m, kinds) and ".attention." not in n}


def replaced(network, name, module):
    parent, _, child = name.rpartition(".")
    setattr(network.get_submodule(parent), child, module)


def pairs(network):
    "Convolutions with the normalisation behind them, in a network of any of the three kinds."
    found = []
    for name, module in network.named_modules():
        if hasattr(module, "conv1") and hasattr(module, "bn1"):
            found += [(f"{name}.conv{i}", f"{name}.bn{i}") for i in "123" if hasattr(module, f"conv{i}")]
        elif isinstance(module, nn.Sequential):
            rows = zip(module, list(module)[1:], strict=False)
            is_pair = [isinstance(c, nn.Conv2d) and isinstance(b, nn.BatchNorm2d) for c, b in rows]
            found += [(f"{name}.{i}", f"{name}.{i + 1}") for i, yes in enumerate(is_pair) if yes]
    return [(c.removeprefix("."), b.removeprefix(".")) for c, b in found if ".attention." not in c]


def fused(network):
    for conv, norm in pairs(network):
        both = map(network.get_submodule, (conv, norm))
        replaced(network, conv, fuse_conv_bn_eval(*both))
        replaced(network, norm, nn.Identity())
    return network


def fused_by_ao(network):
    both = [p for p in pairs(network) if type(network.get_submodule(p[1])) is nn.BatchNorm2d]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.ao.quantization.fuse_modules(network, list(map(list, both))) if both else network


def frozen(network):
    for name, norm in layers(network, nn.BatchNorm2d).items():
        constant = FrozenBatchNorm2d(norm.num_features, norm.eps)
        constant.load_state_dict(norm.state_dict(), strict=False)
        if type(norm) is not nn.BatchNorm2d:  # timm's normalisations have an activation inside
            constant = nn.Sequential(constant, norm.drop, norm.act)
        replaced(network, name, constant)
    return network


def over_convolutions(change):
    def convert(network):
        for conv in layers(network, nn.Conv2d).values():
            change(conv)
        return network

    return convert


def spectral(conv):
    torch.manual_seed(int(conv.weight.abs().sum()))
    return parametrizations.spectral_norm(conv)


CONVERSIONS = {
    "synchronised": nn.SyncBatchNorm.convert_sync_batchnorm,
    "fused": fused,
    "fused by ao": fused_by_ao,
    "frozen": frozen,
    "frozen by timm": timm.layers.freeze_batch_norm_2d,
    "pruned": over_convolutions(lambda conv: prune.l1_unstructured(conv, "weight", 0.3)),
    "weight norm": over_convolutions(parametrizations.weight_norm),
    "spectral norm": over_convolutions(spectral),
    "channels last": lambda network: network.to(memory_format=torch.channels_last),
    "double": lambda network: network.double().float(),
}


@torch.no_grad()
@pytest.mark.parametrize("how", CONVERSIONS)
def test_conversions_keep_it(case, how):
    plain, network, name, _ = case
    oracle = hooked(CONVERSIONS[how](plain), network, name)
    converted = CONVERSIONS[how](network)
    assert len(attentions(converted)) == len(attentions(network))
    assert equal(converted(X), oracle(X))
    del plain, oracle


def test_adapters_of_peft(case):
    peft = pytest.importorskip("peft")
    plain, network, name, _ = case
    names = [n for n, m in layers(plain, nn.Conv2d).items() if m.groups == 1]
    config = peft.LoraConfig(target_modules=names, r=2, init_lora_weights=False)
    adapted = []
    for net in (plain, network):
        torch.manual_seed(1)
        adapted.append(peft.get_peft_model(net, config).eval())
    oracle = hooked(adapted[0].base_model.model, network, name)
    assert equal(adapted[1](X), oracle(X)) and len(attentions(adapted[1])) == len(attentions(network))
    merged = adapted[1].merge_and_unload()
    assert equal(merged(X), oracle(X), 1e-5)


@torch.no_grad()
def test_functional_call_takes_the_given_values(case):
    _, network, _, _ = case
    other = {k: v * 0.9 if v.is_floating_point() else v for k, v in network.state_dict().items()}
    duplicate = copy.deepcopy(network)
    duplicate.load_state_dict(other)
    assert equal(torch.func.functional_call(network, other, (X,)), duplicate(X))


@torch.no_grad()
def test_made_real_from_meta(case):
    _, network, _, expected = case
    state = network.state_dict()
    empty = network.to("meta").to_empty(device="cpu")
    empty.load_state_dict(state)
    assert equal(empty(X), expected)


def test_activation_checkpointing_gives_the_same_gradients(case):
    _, network, _, _ = case
    blocks = [m for m in network.modules() if hasattr(m, "attended")]
    network(X).square().sum().backward()
    expected = {k: p.grad.clone() for k, p in network.named_parameters()}
    network.zero_grad()
    for block in blocks:
        block.forward = lambda x, f=block.forward: checkpoint(f, x, use_reentrant=False)
    network(X).square().sum().backward()
    assert blocks and all(equal(p.grad, expected[k], 1e-4) for k, p in network.named_parameters())


# ---- on several devices ----


def step_of_two(rank, folder, results):
    "What each of two processes computes with DDP and with FSDP2: logits, and gradients of the attention."
    from torch.distributed import device_mesh, fsdp

    torch.set_num_threads(1)
    store = f"file://{folder}/group"
    torch.distributed.init_process_group("gloo", init_method=store, rank=rank, world_size=2)
    mesh = device_mesh.init_device_mesh("cpu", (2,))
    for trunk, name in CASES:
        network = built(trunk, name)[1]
        for kind in ("ddp", "fsdp"):
            wrapped = copy.deepcopy(network)
            if kind == "ddp":
                wrapped = nn.parallel.DistributedDataParallel(wrapped)
            else:
                for block in [m for m in wrapped.modules() if hasattr(m, "attended")]:
                    fsdp.fully_shard(block, mesh=mesh)
                fsdp.fully_shard(wrapped, mesh=mesh)
            y = wrapped(X[rank : rank + 1])
            y.square().sum().backward()
            grads = {}
            for key, p in wrapped.named_parameters():
                grad = p.grad.full_tensor() if kind == "fsdp" else p.grad
                grads[key.removeprefix("module.")] = grad.clone()
            torch.save((y.detach(), grads), f"{results}/{kind}-{trunk}-{name}-{rank}.pt")
    torch.distributed.destroy_process_group()


@pytest.mark.slow
def test_two_processes(tmp_path):
    results = tmp_path / "results"
    results.mkdir()
    torch.multiprocessing.spawn(step_of_two, (tmp_path, results), nprocs=2)
    for trunk, name in CASES:
        network = copy.deepcopy(built(trunk, name)[1])
        y = network(X)
        (y.square().sum() / 2).backward()  # the mean over processes
        own = {k: p.grad for k, p in network.named_parameters()}
        for kind in ("ddp", "fsdp"):
            for rank in range(2):
                logits, grads = torch.load(results / f"{kind}-{trunk}-{name}-{rank}.pt")
                assert equal(logits, y[rank : rank + 1], 1e-5), (kind, trunk, name)
                assert set(grads) == set(own)
                assert all(torch.allclose(g, own[k], rtol=1e-3, atol=1e-4) for k, g in grads.items())


def test_what_is_distributed_already_takes_no_attention(tmp_path):
    plain, _ = built("resnet", "se")
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/g", rank=0, world_size=1)
    try:
        wrapped = nn.parallel.DistributedDataParallel(copy.deepcopy(plain))
        with pytest.raises(ValueError, match=r"DistributedDataParallel.*attend\(\) before it"):
            attend(wrapped, "se")
    finally:
        torch.distributed.destroy_process_group()
    assert not attentions(wrapped)
