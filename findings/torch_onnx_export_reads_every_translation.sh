#!/bin/sh
# Guess: what PyTorch's exporter to ONNX needs for every network, the translations of its operators, is read at the first export of a process; the
# next export of a network of one convolution takes hundredths of a second. Seen (torch 2.14.1, onnxscript 0.7.2, CPU): every export, through
# `dynamo=True`, parses the source of some five hundred translations again, of which this network uses one. That is half of its time (0.51 s; 0.24 s without).
# Kept between exports, the files are the same. Whoever exports many small networks in a process, as tests do, waits for that. Fails when that changes.
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/pip" install --quiet --disable-pip-version-check torch==2.14.1 onnx==1.23.2 onnxscript==0.7.2
OMP_NUM_THREADS=1 "$folder/env/bin/python" - <<'PYTHON' 2>"$folder/said" || { cat "$folder/said"; exit 1; }
import functools
import statistics
import time
from importlib.metadata import version

import torch
from onnxscript.values import TracedOnnxFunction as Translation
from torch import nn

network, x = nn.Conv2d(3, 4, 3).eval(), torch.randn(1, 3, 8, 8)
read = Translation.function_ir.fget
seen = []


def counted(translation):
    seen.append(translation)
    return read(translation)


def exported():
    begin = time.process_time()
    program = torch.onnx.export(network, (x,), dynamo=True, verbose=False)
    return time.process_time() - begin, program.model_proto.SerializeToString()


Translation.function_ir = property(counted)
exported()
first = len(seen)
again = [exported() for _ in range(5)]
assert len(seen) == 6 * first, "later exports read less"
Translation.function_ir = property(functools.cache(read))
exported()
kept = [exported() for _ in range(5)]
slow, fast = (statistics.median(seconds for seconds, _ in runs) for runs in (again, kept))
used = {node.op_type for node in torch.onnx.export(network, (x,), dynamo=True, verbose=False).model_proto.graph.node}
print(f"torch {torch.__version__} onnxscript {version('onnxscript')}: {first} translations read by every export, for a graph of {used}")
print(f"processor time of an export: {slow:.2f} s; with what was read kept: {fast:.2f} s")
assert first > 400 and used == {"Conv"} and slow > 1.5 * fast
assert again[-1][1] == kept[-1][1]
PYTHON
