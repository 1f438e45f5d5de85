"""Properties that also hold on a GPU. Without one, these tests are skipped and say so."""

import copy

import pytest
import test_tasks
import test_training
import torch
from conftest import ROOT
from test_attention import MECHANISM, WIDTH, build, relative

from scsa_book.evidence import gpu, speed
from scsa_book.training import run
from scsa_book.training.config import Execution
from scsa_book.training.task import MISCOMPILED, Classify

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="PyTorch sees no GPU here")
FAST = {"precision": "bf16-mixed", "channels_last": True}


@pytest.fixture(autouse=True)
def exact_products(monkeypatch):
    "Products in full single precision, as on a CPU: TF32 has ten bits of mantissa."
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)


@pytest.fixture
def where(tmp_path):
    return Execution(results_dir=tmp_path / "results", cache_dir=tmp_path / "cache", accelerator="gpu")


def step(module, x):
    "Result, gradient to the map, and those to the parameters, end to end."
    x = x.detach().clone().requires_grad_()
    y = module(x)
    weight = torch.randn(y.shape, generator=torch.Generator().manual_seed(2)).to(y)
    (y * weight).sum().backward()
    grads = [p.grad.flatten() for p in module.parameters() if p.grad is not None]
    return y.detach(), x.grad, torch.cat(grads or [y.new_zeros(1)])


def assert_close(ours, theirs, bound):
    "All of ours within `bound` of theirs, relative to the largest value."
    for a, b in zip(ours, theirs, strict=True):
        assert (a.cpu() - b.cpu()).abs().max() <= bound * b.abs().max().cpu()


# ---- mechanisms


@MECHANISM
def test_it_computes_what_a_cpu_computes(name):
    module, x = build(name).eval(), torch.randn(2, WIDTH, 15, 22)
    assert_close(step(copy.deepcopy(module).cuda(), x.cuda()), step(module, x), 1e-3)


@MECHANISM
@torch.no_grad()
def test_reduced_precision_and_memory_format_are_kept(name):
    module, x = build(name).eval(), torch.randn(2, WIDTH, 15, 22)
    half = copy.deepcopy(module).to("cuda", torch.bfloat16, memory_format=torch.channels_last)
    y = half(x.to("cuda", torch.bfloat16, memory_format=torch.channels_last))
    assert y.dtype == torch.bfloat16 and y.is_contiguous(memory_format=torch.channels_last)
    assert relative(y.float().cpu(), module(x)) < 5e-2


@MECHANISM
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_mixed_precision_has_a_backward_pass(name, dtype):
    module = build(name).cuda()
    x = torch.randn(4, WIDTH, 15, 22, device="cuda", requires_grad=True)
    with torch.autocast("cuda", dtype=dtype):
        y = module(x)
    y.float().square().mean().backward()
    assert y.isfinite().all() and x.grad.isfinite().all()
    assert all(p.grad.isfinite().all() for p in module.parameters() if p.grad is not None)


@MECHANISM
def test_compiled_it_computes_the_same(name, request):
    if name in MISCOMPILED:
        request.applymarker(pytest.mark.xfail(reason="a fault of PyTorch 2.11; see nbs/training/task.ipynb"))
    row = gpu.compiled_gradients(name, "cuda")
    assert max(row.output, row.to_map, row.to_parameters) <= gpu.AGREE


# ---- runs


def test_a_classifier_trains_as_under_the_preset_gpu(where):
    config = test_training.tiny(attention="scsa", compile=True, **FAST)
    result = test_training.train_and_save(config, where)
    assert result.machine.device == torch.cuda.get_device_name()
    assert result.epochs[-1].metrics["train_loss"] < result.epochs[0].metrics["train_loss"]


@pytest.mark.parametrize("network", test_tasks.DETECTORS)
def test_a_detector_trains(network, where):
    config = test_tasks.tiny("detect", network=network, attention="scsa", **FAST)
    done, result = test_tasks.train(config, where)
    assert 0 <= result.final["AP"] <= 100
    assert {p.device.type for p in done.network.parameters()} == {"cpu"}


@pytest.mark.parametrize("network", ["upernet", "danet"])
def test_a_segmenter_trains(network, where):
    result = test_tasks.train(test_tasks.tiny("segment", network=network, attention="cat", **FAST), where)[1]
    assert 0 < result.final["aAcc"] <= 100


def test_a_run_that_was_stopped_goes_on(where, monkeypatch):
    config, real = test_training.tiny(attention="se", **FAST), Classify.training_step

    def failing(self, batch, batch_idx):
        if self.trainer.current_epoch == 2:
            raise ZeroDivisionError
        return real(self, batch, batch_idx)

    monkeypatch.setattr(Classify, "training_step", failing)
    with pytest.raises(ZeroDivisionError):
        test_training.train(config, where)
    monkeypatch.setattr(Classify, "training_step", real)
    done = test_training.train(config, where)
    assert (done.starts, len(done.epochs)) == (2, config.epochs)


def test_a_cpu_reads_what_a_gpu_left(where):
    config = test_training.tiny(attention="cbam")
    first = test_training.train(config, where)
    again = test_training.train(config, where.model_copy(update={"accelerator": "cpu"}))
    x = test_training.dataset_of(config).test.images[:8]
    assert relative(again.task(x), first.task(x)) < 1e-5


def test_too_little_memory_names_what_takes_less(where, monkeypatch):
    _, total = torch.cuda.mem_get_info()
    monkeypatch.setattr(
        Classify, "training_step", lambda self, *_: torch.empty(2 * total, dtype=torch.uint8, device="cuda")
    )
    with pytest.raises(run.OutOfMemory, match=r"batch_size=16 \(it is 32\), or precision=bf16-mixed"):
        test_training.train(test_training.tiny(), where)


# ---- speed


def test_time_and_memory_are_measured():
    result = speed.bench_modules(["se"], device="cuda", shape=(2, 32, 28, 28), budget=0.1, peers={})
    (row,) = result.rows
    assert result.machine.device == torch.cuda.get_device_name()
    assert row.ours.training_peak >= 2 * 32 * 28 * 28 * 4 and row.ours.forward.median > 0
    assert speed.result_path(result) == ROOT / "nbs/results/speed/modules-cuda-float32-channels_first.json"
