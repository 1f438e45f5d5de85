#!/bin/sh
# ONNX Runtime 1.32 on a * (1 / b) with whole numbers, which ONNX divides by cutting the fraction off. Guess: 1 / 3 is 0, so the
# product is 0. Seen: an optimiser makes it a / b, which is right for fractions alone, and -7 * (1 / 3) is -2. Without the optimisers
# it is 0. A size that is computed so, such as that of a padding, makes a network of another shape.
# Fails when that changes.
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/pip" install --quiet --disable-pip-version-check onnxruntime==1.32.0 onnx==1.23.2
"$folder/env/bin/python" - <<'PYTHON'
import numpy as np
import onnx
import onnxruntime as ort
from onnx import TensorProto, helper

nodes = [helper.make_node("Div", ["one", "b"], ["q"]), helper.make_node("Mul", ["a", "q"], ["y"])]
a, b, y = (helper.make_tensor_value_info(name, TensorProto.INT64, [1]) for name in "aby")
one = helper.make_tensor("one", TensorProto.INT64, [1], [1])
graph = helper.make_graph(nodes, "product", [a, b], [y], [one])
model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
onnx.checker.check_model(model)


def output(level):
    options = ort.SessionOptions()
    options.graph_optimization_level = level
    session = ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return int(session.run(None, {"a": np.array([-7]), "b": np.array([3])})[0][0])


every, none = ort.GraphOptimizationLevel.ORT_ENABLE_ALL, ort.GraphOptimizationLevel.ORT_DISABLE_ALL
print("onnxruntime", ort.__version__, "-7 * (1 / 3):", output(every), "without optimisers:", output(none))
assert (output(every), output(none)) == (-2, 0)
PYTHON
