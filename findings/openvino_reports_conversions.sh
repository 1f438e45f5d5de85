#!/bin/sh
# Guess: importing OpenVINO and converting a network are local work, or ask before they tell anybody of it. Seen (OpenVINO 2026.4.1 with
# openvino-telemetry 2025.2.0, which it requires; Linux, no variable CI): no question is asked, and requests to www.google-analytics.com
# are made from processes that are forked for each: one for the import, and for a conversion among others one for every kind of operator
# in the network, with its number. A file in ~/intel keeps an identity. Nothing is made where the module openvino_telemetry cannot
# be imported, which is how our export works. Here every request is stopped before it leaves. Fails when that changes.
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/pip" install --quiet --disable-pip-version-check openvino==2026.4.1 openvino-telemetry==2025.2.0 onnx==1.23.2
unset CI
cat > "$folder/convert.py" <<'PYTHON'
import json
import os
import sys
import time

if "alone" in sys.argv:
    sys.modules["openvino_telemetry"] = None
seen = open(sys.argv[1], "a", buffering=1)


def stop(event, values):
    "Hooks are inherited by the processes that are forked."
    if event == "urllib.Request":
        body = json.loads(values[1])["events"][0]
        print(values[0].split("/")[2], body["name"], body["params"]["event_label"], file=seen)
        raise OSError("no request leaves this finding")


sys.addaudithook(stop)

import onnx  # noqa: E402
import openvino  # noqa: E402
from onnx import TensorProto, helper  # noqa: E402

shape = (1, 3, 4, 4)
x, y = (helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name in "xy")
nodes = [helper.make_node("Relu", ["x"], ["a"]), helper.make_node("Sigmoid", ["a"], ["y"])]
model = helper.make_model(helper.make_graph(nodes, "g", [x], [y]), opset_imports=[helper.make_opsetid("", 17)])
model.ir_version = 10
path = os.path.join(os.path.dirname(sys.argv[1]), "network.onnx")
onnx.save(model, path)
openvino.convert_model(path)
time.sleep(5)
PYTHON
mkdir "$folder/home" "$folder/other"
HOME="$folder/home" "$folder/env/bin/python" "$folder/convert.py" "$folder/reports"
HOME="$folder/other" "$folder/env/bin/python" "$folder/convert.py" "$folder/none" alone
sort "$folder/reports" | cut -c 1-110
test "$(grep -c '^www.google-analytics.com op_count ' "$folder/reports")" -ge 2
grep -q '^www.google-analytics.com import ' "$folder/reports"
test -e "$folder/home/intel/openvino_ga_cid"
test ! -s "$folder/none" && test ! -e "$folder/other/intel"
echo "reported by default; nothing without the module"
