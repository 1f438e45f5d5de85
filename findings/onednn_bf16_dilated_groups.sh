#!/bin/sh
# Guess: in bfloat16 on a CPU a convolution is as right as in float32, to two or three digits, and twice the same twice. Seen (torch 2.14.1 and its
# oneDNN, AMD EPYC with AVX-512 and bfloat16, one thread): with channels last, the gradient of the weights of a dilated convolution with fewer than
# sixteen channels in a group, as in atrous separable convolutions, is not, for rows of 31, 32 and 56 positions: it depends on what released memory held
# and differs from call to call. The gradient of the input is right, and so is everything in the usual layout, in float16, in float32, with sixteen
# channels in a group, or without dilation. Nothing warns; a training run has NaN some day. Fails when that changes. Needs a CPU with avx512_bf16.
set -eu
grep -q -m1 avx512_bf16 /proc/cpuinfo || { echo "this CPU has no avx512_bf16: not looked at"; exit 0; }
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/pip" install --quiet --disable-pip-version-check torch==2.14.1 numpy
OMP_NUM_THREADS=1 "$folder/env/bin/python" - <<'PYTHON' 2>"$folder/said" || { cat "$folder/said"; exit 1; }
import ctypes

import torch
from torch import nn

library = ctypes.CDLL(None)
library.mallopt(-1, 2**31 - 1)  # released memory stays in the process, as it does in long runs
library.mallopt(-3, 2**25)
LAST, USUAL = torch.channels_last, torch.contiguous_format


def leave_thousands_in_memory():
    tensors = [torch.full((2**k,), 1000.0) for k in range(6, 23) for _ in range(6)]
    del tensors


def errors(dtype, layout, channels, groups, dilation, side=32):
    "Largest relative errors of six gradients of the weights, and of the input, against float64."
    torch.manual_seed(0)
    conv = nn.Conv2d(channels, channels, 3, padding=dilation, dilation=dilation, groups=groups, bias=False)
    conv, x = conv.to(dtype).to(memory_format=layout), torch.randn(2, channels, side, side).to(dtype).contiguous(memory_format=layout)

    def gradients(conv, x):
        x = x.clone().requires_grad_()
        leave_thousands_in_memory()
        y = conv(x)
        leave_thousands_in_memory()
        return torch.autograd.grad(y.double().square().mean(), [conv.weight, x])

    found = [gradients(conv, x) for _ in range(6)]
    expected = gradients(conv.double(), x.double())
    off = [[float((a.double() - b).norm() / b.norm()) for a, b in zip(g, expected)] for g in found]
    return tuple(max(e) for e in zip(*off))


print(f"torch {torch.__version__}, {torch.backends.cpu.get_cpu_capability()}: error of the gradient of weights, of input")
wrong = {
    "depthwise": (torch.bfloat16, LAST, 16, 16, 2),
    "eight channels in a group": (torch.bfloat16, LAST, 32, 4, 2),
}
right = {
    "usual layout": (torch.bfloat16, USUAL, 16, 16, 2),
    "float16": (torch.float16, LAST, 16, 16, 2),
    "float32": (torch.float32, LAST, 16, 16, 2),
    "sixteen channels in a group": (torch.bfloat16, LAST, 32, 2, 2),
    "no dilation": (torch.bfloat16, LAST, 16, 16, 1),
    "28 positions": (torch.bfloat16, LAST, 16, 16, 2, 28),
}
for name, case in (wrong | right).items():
    weight, given = errors(*case)
    print(f"{name:28} {weight:10.3g} {given:10.3g}")
    assert given < 0.02 and (weight > 1) == (name in wrong), name
PYTHON
