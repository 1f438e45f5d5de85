#!/bin/sh
# Guess: a kernel that is computed from parameters, here a softmax of them, is constant in inference, so that lowering computes it once and XNNPACK
# convolves with it. Seen (ExecuTorch 1.5.1, torch 2.14.1, CPU): the softmax stays in the program, and the convolution with what it gives is left to
# the portable kernels, without a word, though the XNNPACK partitioner was given: a depthwise convolution takes thirty times as long (10.8 to 0.34 ms).
# After `constant_prop_pass` on the exported program XNNPACK takes it, and the output is the same. Fails when that changes.
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/pip" install --quiet --disable-pip-version-check torch==2.14.1 executorch==1.5.1
OMP_NUM_THREADS=1 "$folder/env/bin/python" - "$folder" <<'PYTHON' 2>"$folder/said" || { cat "$folder/said"; exit 1; }
import statistics
import sys
import time
from importlib.metadata import version

import torch
import torch.nn.functional as F
from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
from executorch.exir import to_edge_transform_and_lower
from executorch.exir.passes.constant_prop_pass import constant_prop_pass
from executorch.extension.pybindings import portable_lib
from executorch.runtime import Runtime
from torch import nn

portable_lib._unsafe_reset_threadpool(1)


class Blur(nn.Module):
    "A depthwise convolution whose kernels sum to one."

    def __init__(self):
        super().__init__()
        self.logits = nn.Parameter(torch.randn(64, 1, 25))

    def forward(self, x):
        return F.conv2d(x, self.logits.softmax(-1).view(64, 1, 5, 5), padding=2, groups=64)


def left(lowered):
    "The operators that XNNPACK does not compute."
    nodes = lowered.exported_program().graph.nodes
    names = {n.target.__name__ for n in nodes if n.op == "call_function"}
    return {name for name in names if name.startswith("aten.")}


def loaded(lowered, name):
    path = f"{sys.argv[1]}/{name}.pte"
    with open(path, "wb") as file:
        file.write(lowered.to_executorch().buffer)
    return Runtime.get().load_program(path).load_method("forward")


torch.manual_seed(0)
blur, x = Blur().eval().requires_grad_(False), torch.randn(1, 64, 56, 56)
methods = {}
for name, change in {"as exported": lambda program: program, "constants computed": constant_prop_pass}.items():
    program = change(torch.export.export(blur, (x,)))
    lowered = to_edge_transform_and_lower(program, partitioner=[XnnpackPartitioner()])
    others = left(lowered)
    print(f"{name}: left to other kernels: {sorted(others) or 'nothing'}")
    assert ("aten.convolution.default" in others) == (name == "as exported")
    methods[name] = loaded(lowered, name.split()[0])
times = {name: [] for name in methods}
for _ in range(15):
    for name, method in methods.items():
        begin = time.process_time()
        y = method.execute([x])[0]
        times[name].append(time.process_time() - begin)
        assert torch.allclose(y, blur(x), atol=1e-5)
slow, fast = (statistics.median(t[3:]) for t in times.values())
print(f"executorch {version('executorch')} torch {torch.__version__}: {1e3 * slow:.2f} and {1e3 * fast:.2f} ms, {slow / fast:.1f} times")
assert slow > 4 * fast
PYTHON
