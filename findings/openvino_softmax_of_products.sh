#!/bin/sh
# Guess: `convert_model` of OpenVINO gives a model that computes what the traced module computes, or says that it cannot. Seen (OpenVINO
# 2026.4.1, torch 2.14.1, CPU, single precision): the attention softmax(r @ r^T) @ r is right, and the same with a reshape of the
# result behind it is off by half of the largest output, without a word. DANet's channel attention is written around it.
# Fails when that changes.
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/pip" install --quiet --disable-pip-version-check torch==2.14.1 numpy==2.4.6 openvino==2026.4.1
"$folder/env/bin/python" - <<'PYTHON'
import warnings

import openvino
import torch
from torch import nn

warnings.simplefilter("ignore")


class Rows(nn.Module):
    def forward(self, x):
        r = x.flatten(2)
        return torch.softmax(r @ r.transpose(1, 2), -1) @ r


class Map(Rows):
    def forward(self, x):
        return super().forward(x).reshape(x.shape)


def off(module, x):
    "Largest difference to PyTorch, relative to the largest output."
    with torch.no_grad():
        model, expected = openvino.convert_model(module.eval(), example_input=x), module(x)
    compiled = openvino.Core().compile_model(model, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    return float((torch.from_numpy(compiled(x.numpy())[0]) - expected).abs().max() / expected.abs().max())


torch.manual_seed(0)
x = 0.3 * torch.randn(1, 8, 5, 6)
rows, reshaped = off(Rows(), x), off(Map(), x)
print(f"openvino {openvino.__version__[:8]} torch {torch.__version__}: rows off by {rows:.1e}, reshaped by {reshaped:.1e}")
assert rows < 1e-5 and reshaped > 0.1
PYTHON
