"""Kernels of a GPU on a machine without one: interpreted, built ahead of time, and without Triton."""

import shutil
from datetime import timedelta

import pytest
import torch
from conftest import ROOT
from test_attention import MECHANISM
from torch import nn

from scsa_book.evidence import gpu, speed
from scsa_book.networks.compilation import compile_blocks, repeated_blocks, uncompile

TESTS = ROOT / "tests"


@pytest.fixture
def printed(executed):
    "A function: what code prints in a process of its own, whose exit code must be zero."

    def execute(code, **variables):
        status, said = executed(f"import sys\nassert 'triton' not in sys.modules\n{code}", **variables)
        assert status == 0, said[-4000:]
        return said

    return execute


@pytest.fixture
def interpreted(printed):
    "A function: what the tests print whose kernels are interpreted."
    pytest.importorskip("triton")
    words = ["-p", "no:xdist", str(TESTS / "interpreted.py")]
    code = "import pytest\nsys.exit(pytest.main({}))"
    return lambda *arguments: printed(code.format([*words, *arguments]), TRITON_INTERPRET="1")


def test_kernels_compute_what_is_written(interpreted):
    "In single precision and small; the rest of the file is slow."
    chosen = "(test_values or test_gradients or fails or memory) and not last"
    assert "passed" in interpreted("-k", chosen)


@pytest.mark.slow
def test_kernels_in_all_types_layouts_and_sizes(interpreted):
    assert "passed" in interpreted("-m", "slow or not slow")


# ---- built ahead of time


def assert_fits(kernels, rows):
    assert [row for row in rows if not kernels.fits(row)] == []
    assert {row.kernel for row in rows} == kernels.names()


def test_every_kernel_is_built_for_a_gpu_and_fits():
    kernels = pytest.importorskip("scsa_book.evidence.kernels")
    assert_fits(kernels, kernels.build_all([80], [torch.bfloat16], [True]).rows)


@pytest.mark.slow
@pytest.mark.parametrize("shape", [(8, 256, 56, 56), (8, 2048, 7, 7), (2, 12, 1, 1), (2, 40, 33, 130)])
def test_every_kernel_fits_every_gpu(shape):
    kernels = pytest.importorskip("scsa_book.evidence.kernels")
    assert_fits(kernels, kernels.build_all(shape=shape).rows)


def test_the_page_lists_every_kernel():
    kernels = pytest.importorskip("scsa_book.evidence.kernels")
    stored = kernels.KernelsResult.model_validate_json(kernels.kernels_path().read_text("utf-8"))
    assert_fits(kernels, stored.rows)
    assert {row.capability for row in stored.rows} == set(kernels.CAPABILITIES)
    assert {row.dtype for row in stored.rows} == {"bfloat16", "float16", "float32"}


# ---- faults

WITHOUT = """
import torch, warnings
{change}
warnings.simplefilter("always")
from scsa_book.attention import registry
from scsa_book.operators import choice
module, x = registry.create("scsa", 32).eval(), torch.randn(1, 32, 8, 8)
with warnings.catch_warnings(record=True) as seen, torch.no_grad():
    module(x), module(x)
print([str(w.message) for w in seen if "equations" in str(w.message)])
"""


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ("sys.modules['triton'] = None", "triton"),
        ("import triton; triton.__version__ = '3.1.0'", "Triton 3.1.0 is too old; kernels need 3.2"),
    ],
)
def test_without_a_usable_triton_the_equations_run_and_one_warning_says_why(change, reason, printed):
    pytest.importorskip("triton")
    said = printed(WITHOUT.format(change=change), TRITON_INTERPRET="1")
    assert reason in said and said.count("equations run instead of kernels") == 1


def test_the_environment_forces_the_written_form(printed):
    ask = "from scsa_book.operators import choice, gating; import torch; t = torch.ones(1, 1, 1, 1); "
    ask += "print(choice.chosen(gating.gate_axes.forms, (t, t, t)))"
    assert "None" in printed(ask, SCSA_BOOK_OPERATORS="written")
    assert "gate_axes" in printed(ask, SCSA_BOOK_OPERATORS="auto")
    with pytest.raises(AssertionError, match="SCSA_BOOK_OPERATORS='fast' must be one of auto, written"):
        printed(ask, SCSA_BOOK_OPERATORS="fast")


def test_a_cpu_without_a_gpu_imports_no_triton(printed):
    ask = "from scsa_book.attention import registry; import torch; "
    ask += "registry.create('scsa', 32)(torch.randn(1, 32, 8, 8)); "
    ask += "print('scsa_book.operators.gpu' in sys.modules)"
    assert printed(ask).strip().endswith("False")


# ---- compiled


@pytest.mark.slow
@MECHANISM
def test_compiled_gradients(name):
    row = gpu.compiled_gradients(name, "cpu")
    assert max(row.output, row.to_map, row.to_parameters) <= gpu.AGREE


class Block(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.layer = nn.Sequential(nn.Linear(width, width), nn.ReLU())

    def forward(self, x):
        return x + self.layer(x)


def test_a_block_is_compiled_once_for_all_of_its_kind():
    network = nn.Sequential(*(Block(8) for _ in range(5)), nn.Linear(8, 6), *(Block(6) for _ in range(4)))
    assert len(repeated_blocks(network)) == 9
    x, graphs = torch.randn(2, 8), []

    def backend(graph, example):
        graphs.append(graph)
        return graph

    torch.compiler.reset()
    with torch.no_grad():
        expected = network(x)
        assert torch.allclose(compile_blocks(network, backend=backend)(x), expected)
        assert len(graphs) == 2
        uncompile(network)
        torch.compiler.reset()
        assert torch.allclose(network(x), expected) and len(graphs) == 2


def test_a_network_without_repeated_blocks_is_compiled_as_a_whole():
    network, graphs = nn.Sequential(nn.Linear(4, 4), nn.ReLU()), []
    torch.compiler.reset()
    compile_blocks(network, backend=lambda graph, example: graphs.append(graph) or graph)(torch.ones(1, 4))
    assert len(graphs) == 1


# ---- the command for a GPU


def test_what_is_older_than_the_kernels_says_so():
    before, after = gpu.KERNELS_SINCE - timedelta(days=1), gpu.KERNELS_SINCE + timedelta(days=1)
    assert "Not measured since the kernels" in gpu.remark("cuda", before)
    assert gpu.remark("cuda", after) == gpu.remark("cpu", before) == ""


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_the_command_says_what_can_be_done():
    with pytest.raises(ValueError, match="PyTorch sees no GPU here; device='cpu' tries the command"):
        gpu.bench_gpu("cuda")


@pytest.mark.slow
def test_the_command_measures_every_line_and_stores_it(tmp_path):
    said = []
    written = gpu.bench_gpu("cpu", 0, tmp_path, said.append)
    assert len(written) == 6 and all(path.stat().st_size > 500 for path in written)
    words_of_parts = ("forward with scsa", "training step with cat", "waiting", "eager, 2", "gradients of 1")
    for words in (*words_of_parts, "compiled, 0"):
        assert any(words in line for line in said), words


def test_another_checkout_runs_in_turns_with_ours(monkeypatch, tmp_path):
    calls = []
    (tmp_path / "scsa_book" / "training").mkdir(parents=True)
    (tmp_path / "scsa_book" / "training" / "run.py").touch()

    def run_in(folder, *given):
        calls.append(folder)
        if folder == tmp_path:
            return {"images_per_second": 100.0, "waiting": 0.5}
        return {"images_per_second": 500.0 * len(calls), "waiting": 0.1}

    monkeypatch.setattr(gpu, "run_in", run_in)
    row = gpu.bench_run("cpu", gpu.SCALES["small"], tmp_path)
    assert calls == [ROOT, tmp_path] * 2
    assert row.images_per_second == (500 + 1500) / 2 and row.waiting == 0.1
    assert row.against.images_per_second == 100 and row.against.waiting == 0.5
    assert (row.against.ratio.low, row.against.ratio.high) == pytest.approx((5, 15))
    assert any("times those of None (at least 10)" in line for line in gpu.lines(row))


def test_a_run_that_is_compared_with_no_other_build_says_how(monkeypatch):
    alone = {"images_per_second": 500.0, "waiting": 0.004}
    monkeypatch.setattr(gpu, "classifier_run", lambda *given: alone)
    first, second = gpu.lines(gpu.bench_run("cpu", gpu.SCALES["small"]))
    assert first == "run: 500 images a second, 0.4% waiting (at most 1 %)"
    assert second.startswith("compared with no other build: --against FOLDER")


def test_a_folder_without_the_library_is_refused_before_anything_is_measured(tmp_path):
    with pytest.raises(ValueError, match="no checkout of the book .*run.py is missing"):
        gpu.bench_gpu("cpu", 0, tmp_path, lambda line: pytest.fail(line), against=tmp_path / "nothing")


def test_a_run_that_fails_in_another_checkout_is_said(tmp_path):
    (tmp_path / "scsa_book").mkdir()
    (tmp_path / "scsa_book" / "__init__.py").write_text("raise RuntimeError('too old')")
    with pytest.raises(ValueError, match=f"failed in {tmp_path} .*too old"):
        gpu.run_in(tmp_path, "cpu", 64, 1, 32)


@pytest.mark.slow
def test_a_run_is_executed_by_the_library_of_its_checkout(tmp_path):
    shutil.copytree(ROOT / "scsa_book", tmp_path / "scsa_book")
    source = tmp_path / "scsa_book" / "training" / "history.py"
    source.write_text(source.read_text() + "\nraise RuntimeError('the copy was imported')\n")
    with pytest.raises(ValueError, match="the copy was imported"):
        gpu.run_in(tmp_path, "cpu", 64, 1, 32)
    found = gpu.run_in(ROOT, "cpu", 64, 1, 32)
    assert found["images_per_second"] > 0 and 0 <= found["waiting"] < 1


# ---- gradients of what is compiled


def test_gradients_that_differ_are_named_and_right_ones_leave_the_list():
    row = lambda name, d: gpu.GradientRow(name=name, output=0, to_map=d, to_parameters=1e-7)  # noqa: E731
    rows = [row("cbam", 1e-6), row("sge", 0.37), row("se", 1e-6)]
    how = speed.measured_on(torch.device("cpu"))
    first, second = gpu.lines(gpu.GradientsResult(shape=gpu.ODD, rows=rows, **how))
    assert first.endswith("gradients of 3 mechanisms, wrong (more than 0.002): sge by 3.7e-01")
    assert second == "right again, so they can leave MISCOMPILED for this PyTorch: cbam"


def test_a_wrong_gradient_is_measured(monkeypatch):
    "A compiler that returns the right output with a wrong gradient to the map."

    class Wrong(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, g):
            return g * 1.5

    def compile_wrong(module, fullgraph):
        module.register_forward_pre_hook(lambda m, args: (Wrong.apply(args[0]),))

    monkeypatch.setattr(torch.nn.Module, "compile", compile_wrong)
    row = gpu.compiled_gradients("sge", "cpu")
    assert row.output == 0 and row.to_parameters == 0 and row.to_map == pytest.approx(0.5)


def test_what_is_not_finite_differs_infinitely():
    assert gpu.largest_difference(torch.tensor([float("nan")]), torch.ones(1)) == float("inf")


# ---- CUDA graphs


@pytest.mark.parametrize("how", [{"device": "cpu", "compiled": True}, {"device": "cuda"}], ids=str)
def test_cuda_graphs_need_a_gpu_and_a_compiler(how):
    setting = speed.NetworkSetting(**how, graphs=True)
    with pytest.raises(ValueError, match="graphs=True needs device='cuda' and compiled=True"):
        speed.in_use(torch.nn.Identity(), setting, torch.ones(1, 3, 8, 8))


@pytest.mark.parametrize(("graphs", "options"), [(True, {"mode": "reduce-overhead"}), (False, {})])
def test_the_options_of_cuda_graphs_reach_the_compiler(graphs, options, monkeypatch):
    given = []
    monkeypatch.setattr(torch, "compile", lambda network, **how: given.append(how) or network)
    setting = speed.NetworkSetting(device="cuda", compiled=True, graphs=graphs)
    x = torch.ones(1, 3, 8, 8)
    assert torch.equal(speed.in_use(torch.nn.Identity(), setting, x)(), x)
    assert given == [options]
    assert speed.network_path(setting).name.endswith("compiled-graphs.json") == graphs
