#!/bin/sh
# Guess: a model computes the same whether it is compiled as `convert_model` returns it or is saved and read before. Seen (OpenVINO
# 2026.4.1, torch 2.14.1, CPU, single precision): a constant divided by a mean, w / x.mean(), is right from a file, and in memory it
# comes out upside down, as x.mean() / w, without a word. So do constants divided by a sum, and by what a convolution or an
# interpolation gives; divided by what an activation gives they are right. The front end of PyTorch marks every division as one to keep;
# files do not hold the mark, and without it the division becomes a product with a power, and is right. With it, the CPU computes the
# division together with the mean, as if the constant were the divisor. Written as x / x.mean() * w it is right. Fails when that changes.
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/pip" install --quiet --disable-pip-version-check torch==2.14.1 numpy==2.4.6 openvino==2026.4.1
"$folder/env/bin/python" - "$folder/model.xml" <<'PYTHON'
import sys
import warnings

sys.modules["openvino_telemetry"] = None  # which would report the conversions
import openvino
import torch
from torch import nn

warnings.simplefilter("ignore")
FILE, MARK = sys.argv[1], "nonconvertable_divide_0"
core = openvino.Core()


class Quotient(nn.Module):
    "A weight divided by something positive."

    def __init__(self, computed):
        super().__init__()
        self.weight = nn.Parameter(0.5 + torch.rand(1, 8, 1, 1))
        self.computed = computed

    def forward(self, x):
        return self.weight / self.computed(x)


def run(model, x):
    return torch.from_numpy(core.compile_model(model, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})(x.numpy())[0].copy())


def off(found, expected):
    "Largest difference, relative to the largest number."
    return float((found - expected).abs().max() / expected.abs().max())


@torch.no_grad()
def errors(computed, x):
    "In memory, of the reciprocal in memory, from a file, in memory without the mark."
    module = Quotient(computed).eval()
    expected, model = module(x), openvino.convert_model(module, example_input=x)
    found = run(model, x)
    openvino.save_model(model, FILE, compress_to_fp16=False)
    others = [off(found, 1 / expected), off(run(core.read_model(FILE), x), expected)]
    for node in model.get_ops():
        if MARK in node.get_rt_info():
            del node.get_rt_info()[MARK]
    return [off(found, expected), *others, off(run(model, x), expected)]


torch.manual_seed(0)
x = torch.rand(1, 8, 6, 6)
conv = nn.Conv2d(8, 8, 1)
nn.init.constant_(conv.bias, 3)
kinds = {
    "mean": lambda x: x.mean((2, 3), keepdim=True),
    "sum": lambda x: x.sum((2, 3), keepdim=True),
    "convolution": conv,
    "interpolation": lambda x: nn.functional.interpolate(x + 1, scale_factor=2.0),
}
print(f"openvino {openvino.__version__[:8]} torch {torch.__version__}: in memory, its reciprocal, from a file, without the mark")
for name, computed in kinds.items():
    memory, reciprocal, file, unmarked = errors(computed, x)
    print(f"{name:<14} {memory:.1e} {reciprocal:.1e} {file:.1e} {unmarked:.1e}")
    assert memory > 0.1 and max(reciprocal, file, unmarked) < 1e-5
memory, _, file, _ = errors(lambda x: x.relu() + 1, x)
print(f"{'activation':<14} {memory:.1e} {'':7} {file:.1e}")
assert max(memory, file) < 1e-5
PYTHON
