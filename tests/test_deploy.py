"""Files for other runtimes: every mechanism is right there, or refused with a reason and without a file."""

import functools
import importlib.util
import os
import subprocess
import sys

import pytest
import torch
from conftest import ROOT
from torch import nn

from scsa_book.attention import registry
from scsa_book.deploy import export as exporting
from scsa_book.deploy import matrix, runtimes
from scsa_book.deploy.export import ExportError, Report, error, export

MECHANISM = pytest.mark.parametrize("name", registry.names())
X = torch.randn(2, 3, 14, 14, generator=torch.Generator().manual_seed(0))
SMALL = [X[1:, :, :7, :5].contiguous(), X[1:, :, :1, :1].contiguous()]


def needs(runtime):
    known = runtimes.RUNTIMES[runtime]
    packages = runtimes.absent(known.to_write | known.to_run)
    return pytest.mark.skipif(bool(packages), reason=f"pip install {' '.join(packages)}")


@pytest.fixture(scope="module", autouse=True)
def translations_are_read_once():
    "PyTorch reads its five hundred translations into ONNX anew for every file, for a quarter of a second."
    if runtimes.absent({"onnxscript": "onnxscript"}):
        yield
        return
    from onnxscript.values import TracedOnnxFunction as Translation

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Translation, "function_ir", property(functools.cache(Translation.function_ir.fget)))
        yield


def with_source(report):
    "The files that say from which line of which file of this machine something comes."
    return [file.name for file in report.files if b'.py", line' in file.read_bytes()]


def off_in_openvino(model, network, inputs):
    "The largest error of a model, from a file or from memory."
    run = runtimes.load_openvino(model, threads=1)
    return max(error(run(x), network(x)) for x in inputs)


@MECHANISM
@pytest.mark.parametrize("runtime", [pytest.param(r, marks=needs(r)) for r in ("onnx", "openvino")])
@torch.no_grad()
def test_free_sizes_down_to_one(name, runtime, tmp_path):
    "The example, another size and the smallest that the network takes, which is one position."
    network = matrix.small_network(name)
    report = export(network, X, runtime, tmp_path / name, dynamic=True)
    assert set(report.errors) == {(2, 3, 14, 14), (1, 3, 8, 8), (1, 3, 1, 1)}
    assert report.error < 1e-4 and all(f.stat().st_size > 0 for f in report.files)
    assert with_source(report) == []
    if runtime == "onnx" and not runtimes.absent({"openvino": "openvino"}):  # the other way into OpenVINO
        assert off_in_openvino(report.files[0], network, [X, *SMALL]) < 1e-4


@needs("openvino")
@MECHANISM
@torch.no_grad()
@pytest.mark.filterwarnings("ignore")
def test_openvino_without_a_file(name):
    "As converted, with fixed and with free sizes: each is optimised in another way."
    network = matrix.small_network(name).requires_grad_(False)
    model = runtimes.import_openvino().convert_model(network, example_input=X)
    assert off_in_openvino(model, network, [X, *SMALL]) < 1e-4
    model.reshape(list(X.shape))
    assert off_in_openvino(model, network, [X]) < 1e-4
    model.reshape([-1, 3, -1, -1])
    assert off_in_openvino(model, network, [X, *SMALL]) < 1e-4


REPORTING = """
import os, sys
folder = os.path.dirname(sys.argv[1])

def made(event, values):  # the processes that report are forked, and inherit this
    if event in ("urllib.Request", "socket.getaddrinfo"):
        os.mkdir(os.path.join(folder, "reported"))
        raise OSError("no request leaves a test")

sys.addaudithook(made)
from scsa_book.paths import importing
with importing():
    import torch
    from scsa_book.deploy.export import export
export(torch.nn.Conv2d(3, 4, 3), torch.zeros(1, 3, 8, 8), "openvino", sys.argv[1])
"""


@needs("openvino")
def test_a_conversion_is_reported_to_nobody(tmp_path):
    "OpenVINO's converter would report the operators of the network."
    left = {name: value for name, value in os.environ.items() if name != "CI"}  # where it reports nothing
    command = [sys.executable, "-c", REPORTING, str(tmp_path / "network")]
    subprocess.run(command, cwd=ROOT, env={**left, "HOME": str(tmp_path)}, check=True, capture_output=True)
    assert {path.name for path in tmp_path.iterdir()} == {"network.xml", "network.bin"}


@MECHANISM
@pytest.mark.parametrize("runtime", [pytest.param(r, marks=needs(r)) for r in ("onnx", "openvino")])
@torch.no_grad()
def test_fixed_size(name, runtime, tmp_path):
    network = matrix.small_network(name)
    report = export(network, X, runtime, tmp_path / name)
    assert set(report.errors) == {(2, 3, 14, 14)} and report.error < 1e-4
    assert with_source(report) == []
    if runtime == "onnx" and not runtimes.absent({"openvino": "openvino"}):
        assert off_in_openvino(report.files[0], network, [X]) < 1e-4


# What is known to be refused, with fixed sizes and in addition with free ones; everything else is right.
REFUSED = {
    "ncnn": ({"strided_sparse", "ema"}, {"fca", "sge", "pcsa", "scsa", "non_local"}),
    "executorch": (set(), {"non_local"}),
    "executorch_portable": (set(), {"non_local"}),
    "litert": (set(), set(registry.names())),
}


@pytest.mark.slow
@MECHANISM
@pytest.mark.parametrize("runtime", [pytest.param(r, marks=needs(r)) for r in REFUSED])
@pytest.mark.parametrize("dynamic", [False, True], ids=["fixed", "dynamic"])
def test_right_or_refused(name, runtime, dynamic, tmp_path):
    try:
        report = export(matrix.small_network(name), X, runtime, tmp_path / name, dynamic=dynamic)
    except ExportError as problem:
        assert str(problem).startswith(runtime) and not list(tmp_path.iterdir())
        assert name in set().union(*REFUSED[runtime][: 1 + dynamic]), problem
    else:
        assert report.error < 1e-4


# ---- blocks of channels ----


class Averaged(nn.Module):
    "Means over channels, which no runtime takes in blocks."

    def forward(self, x):
        return x.mean(1, keepdim=True)


def around(channels, hidden, after):
    "A convolution, squeeze-and-excitation, and a layer after it."
    attention = registry.create("se", channels, reduction=channels // hidden)
    return nn.Sequential(nn.Conv2d(3, channels, 3), attention, after).eval().requires_grad_(False)


@needs("onnx")
@pytest.mark.parametrize(
    ("channels", "hidden", "after", "dynamic", "resized"),
    [
        (64, 4, nn.ReLU(), False, 1),  # few hidden channels, which need no blocks
        (64, 32, nn.Conv2d(64, 8, 1), False, 1),
        (64, 4, nn.ReLU(), True, 0),  # free sizes: no known factor
        (24, 4, nn.ReLU(), False, 0),  # channels that fill no blocks
        (96, 24, nn.ReLU(), False, 0),  # hidden channels that fill none
        (64, 4, Averaged(), False, 0),  # the product leaves the blocks anyway
    ],
)
def test_gates_stay_in_blocks_where_they_can(channels, hidden, after, dynamic, resized, tmp_path):
    onnx = pytest.importorskip("onnx")
    report = export(around(channels, hidden, after), X, "onnx", tmp_path / "n", dynamic=dynamic)
    nodes = [node.op_type for node in onnx.load(report.files[0]).graph.node]
    assert report.error < 1e-5 and nodes.count("Resize") == nodes.count("GlobalAveragePool") == resized


# ---- what is refused before or after conversion ----


class Wrong(nn.Module):
    "Computes something else once it is recorded."

    def forward(self, x):
        return x * (2 if torch.compiler.is_compiling() else 1)


@needs("onnx")
def test_a_file_that_is_off_is_not_left(tmp_path):
    (tmp_path / "wrong.onnx").write_text("an earlier file")
    with pytest.raises(ExportError, match=r"onnx: the output for \(2, 3, 14, 14\) is off by 1\.0e\+00"):
        export(Wrong(), X, "onnx", tmp_path / "wrong")
    assert [f.read_text() for f in tmp_path.iterdir()] == ["an earlier file"]


def test_what_cannot_be(tmp_path, monkeypatch):
    network = nn.Conv2d(3, 4, 1)
    with pytest.raises(ValueError, match="unknown runtime 'onxx'. Did you mean 'onnx'"):
        export(network, X, "onxx", tmp_path / "n")
    with pytest.raises(ValueError, match=r"\(3, 14, 14\), not \(B, C, H, W\)"):
        export(network, X[0], "onnx", tmp_path / "n")
    with pytest.raises(ExportError, match="litert has no dynamic=; these have: onnx"):
        export(network, X, "litert", tmp_path / "n", dynamic=True)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ExportError, match="openvino is not installed: pip install openvino"):
        export(network, X, "openvino", tmp_path / "n")
    assert not list(tmp_path.iterdir())


def test_the_folder_of_the_files_is_checked_before_anything_is_converted(tmp_path, monkeypatch):
    written = []
    monkeypatch.setattr(exporting, "write", lambda *given: written.append(given) or given[2].touch())
    monkeypatch.setattr(exporting, "compared", lambda *given: {})
    monkeypatch.setenv("HOME", str(tmp_path))
    network = nn.Conv2d(3, 4, 1)
    for file in (".", "..", "", ".onnx"):
        with pytest.raises(ValueError, match="is no name of a file"):
            export(network, X, "onnx", file)
    (tmp_path / "mine.onnx").mkdir()
    with pytest.raises(ValueError, match="mine.onnx is a folder, which is not replaced by a file"):
        export(network, X, "onnx", tmp_path / "mine")
    (tmp_path / "taken").touch()
    with pytest.raises(OSError, match="cannot write .*taken"):
        export(network, X, "onnx", tmp_path / "taken" / "net")
    assert not written
    assert export(network, X, "onnx", "~/new/net").files == [tmp_path / "new" / "net.onnx"]


def test_the_matrix_is_filled_for_runtimes_alone(tmp_path):
    for fill in (matrix.fill, matrix.fill_shares):
        with pytest.raises(ValueError, match=r"'\[onnx\]' is text .* -y 'runtimes: \[onnx\]'"):
            fill(tmp_path / "m.json", "[onnx]")
        with pytest.raises(ValueError, match="unknown runtime 'onxx'. Did you mean 'onnx'"):
            fill(tmp_path / "m.json", ["onxx"])
    with pytest.raises(ValueError, match="unknown runtime 'coreml'. Known: onnx, .*, litert"):
        matrix.fill_shares(tmp_path / "m.json", ["coreml"])
    assert not list(tmp_path.iterdir())


def test_errors_of_other_shapes_and_infinities():
    one = torch.ones(2, 3)
    assert error(one, one) == 0 and error(one + 0.5, one) == 0.5
    assert error(one[:1], one) == error(one * torch.nan, one) == error(one / 0, one) == float("inf")


@needs("onnx")
def test_weights_in_eight_bits_use_seven(tmp_path):
    "Without VNNI two products are added in sixteen bits: 2 * 255 * 64 is in range, 2 * 255 * 127 is not."
    onnx = pytest.importorskip("onnx")
    report = export(matrix.small_network("se"), X, "onnx", tmp_path / "n", int8=[X])
    stored = [onnx.numpy_helper.to_array(t) for t in onnx.load(report.files[0]).graph.initializer]
    weights = [t for t in stored if t.dtype == "int8" and t.ndim > 1]
    assert len(weights) >= 4 and max(abs(t.astype(int)).max() for t in weights) == 64


@needs("onnx")
@pytest.mark.parametrize("options", [{"half": True}, {"int8": [X]}], ids=["half", "int8"])
def test_smaller_files(options, tmp_path):
    network = matrix.small_network("se")
    whole = export(network, X, "onnx", tmp_path / "whole")
    small = export(network, X, "onnx", tmp_path / "small", **options)
    pytest.importorskip("onnx").checker.check_model(small.files[0], full_check=True)
    assert isinstance(small, Report) and 0 < small.error < 0.1
    assert small.files[0].stat().st_size < whole.files[0].stat().st_size
    assert network[0].weight.dtype is torch.float32 and network[0].weight.requires_grad
