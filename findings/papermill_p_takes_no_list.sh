#!/bin/sh
# papermill 2.7.0, a list given with -p. Guess: -p reads its value as YAML, as it does of numbers, True and None, so that
# '[onnx, openvino]' is a list. Seen: only whole and decimal numbers, True, False and None become values; everything else, a lower-case
# true and a list too, is text. A notebook that goes over the list then goes over its letters. `-y 'timed: [onnx, openvino]'` is read as YAML.
# Fails when that changes.
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/pip" install --quiet --disable-pip-version-check papermill==2.7.0 nbformat==5.11.1
cd "$folder"
./env/bin/python - <<'PYTHON'
import nbformat

cell = nbformat.v4.new_code_cell("timed = []", metadata={"tags": ["parameters"]})
spec = {"kernelspec": {"name": "python3", "language": "python", "display_name": "Python 3"}}
nbformat.write(nbformat.v4.new_notebook(cells=[cell], metadata=spec), "a.ipynb")
PYTHON
injected() {  # the value of `timed` in the notebook that papermill prepares with these options
  ./env/bin/papermill a.ipynb b.ipynb --prepare-only --no-progress-bar "$@" 2> /dev/null
  ./env/bin/python -c "
import nbformat
print(nbformat.read('b.ipynb', 4).cells[1].source.splitlines()[-1])"
}
{
  for value in 5 True None true '[onnx, openvino]'; do injected -p timed "$value"; done
  injected -y 'timed: [onnx, openvino]'
} | tee seen
diff - seen <<'END'
timed = 5
timed = True
timed = None
timed = "true"
timed = "[onnx, openvino]"
timed = ["onnx", "openvino"]
END
