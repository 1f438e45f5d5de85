#!/bin/sh
# PyTorch 2.14.1, torch.onnx.export(dynamo=True). Guess: an ONNX file holds the graph, its weights and names, as that of the older
# exporter does. Seen: every node also holds a stack trace (metadata pkg.torch.onnx.stack_trace), that is absolute paths of the
# machine that exported and lines of its source code, the user's own forward among them. onnx.save and ONNX Runtime's optimised
# models keep them, ONNX Runtime needs none.
# Fails when that changes.
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/pip" install --quiet --disable-pip-version-check torch==2.14.1 onnx==1.23.2 onnxscript==0.7.2 onnxruntime==1.32.0
cat > "$folder/network.py" <<'PYTHON'
from torch import nn


class Network(nn.Module):
    def forward(self, x):
        return x.relu() * 3  # a remark of mine
PYTHON
cd "$folder"
"$folder/env/bin/python" - "$folder" <<'PYTHON'
import sys
import warnings
from pathlib import Path

import onnx
import onnxruntime as ort
import torch

warnings.simplefilter("ignore")
folder = Path(sys.argv[1])
sys.path.insert(0, str(folder))
from network import Network

x = torch.randn(1, 4)
torch.onnx.export(Network(), (x,), folder / "new.onnx", dynamo=True, verbose=False)
torch.onnx.export(Network(), (x,), folder / "old.onnx", dynamo=False)
options = ort.SessionOptions()
options.optimized_model_filepath = str(folder / "optimised.onnx")
ort.InferenceSession(folder / "new.onnx", options, providers=["CPUExecutionProvider"])
words = str(folder).encode(), b"a remark of mine"
found = {f: [w in (folder / f"{f}.onnx").read_bytes() for w in words] for f in ("new", "old", "optimised")}
model = onnx.load(folder / "new.onnx")
kept = {p.key for n in model.graph.node for p in n.metadata_props if words[0].decode() in p.value}
print(f"torch {torch.__version__}: path and line of source in the file: {found}; where: {kept}")
assert found["new"] == [True, True] and found["old"] == [False, False]
assert found["optimised"] == [True, True] and kept == {"pkg.torch.onnx.stack_trace"}
PYTHON
