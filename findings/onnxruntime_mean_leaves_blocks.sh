#!/bin/sh
# ONNX Runtime 1.32 on a CPU, a map between two convolutions that is pooled to one number a channel. Guess: ReduceMean over height and
# width is GlobalAveragePool by another name, and costs the same. Seen: the pooling takes the map in the blocks of channels that the
# convolutions use; for ReduceMean, which PyTorch's exporter writes, the whole map is first copied out of them (ReorderOutput).
# Fails when that changes.
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/pip" install --quiet --disable-pip-version-check onnxruntime==1.32.0 onnx==1.23.2
cd "$folder"
"$folder/env/bin/python" - <<'PYTHON'
import numpy as np
import onnx
import onnxruntime as ort
from onnx import TensorProto, helper, numpy_helper

x, y = (helper.make_tensor_value_info(n, TensorProto.FLOAT, s) for n, s in (("x", [1, 32, 14, 14]), ("y", [1, 32, 1, 1])))
w = numpy_helper.from_array(np.random.default_rng(0).normal(size=(32, 32, 1, 1)).astype(np.float32), "w")
axes = numpy_helper.from_array(np.array([2, 3]), "axes")


def arranged(pooling):
    nodes = [helper.make_node("Conv", ["x", "w"], ["u"]), pooling, helper.make_node("Conv", ["z", "w"], ["y"])]
    model = helper.make_model(helper.make_graph(nodes, "g", [x], [y], [w, axes]), opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    options = ort.SessionOptions()
    options.log_severity_level, options.optimized_model_filepath = 4, "optimised.onnx"
    session = ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    value = session.run(None, {"x": np.ones((1, 32, 14, 14), np.float32)})[0]
    return [node.op_type for node in onnx.load("optimised.onnx").graph.node], value


mean, a = arranged(helper.make_node("ReduceMean", ["u", "axes"], ["z"], keepdims=1))
pool, b = arranged(helper.make_node("GlobalAveragePool", ["u"], ["z"]))
print("onnxruntime", ort.__version__, "mean:", mean, "pooling:", pool)
assert np.allclose(a, b, atol=1e-4)
assert (mean.count("ReorderOutput"), pool.count("ReorderOutput")) == (2, 1)
PYTHON
