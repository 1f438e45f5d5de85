#!/bin/sh
# nbdev 3.3.26 (execnb 0.3.4, IPython 9.18.1), the function behind nbdev-test. Guess: what a notebook has computed is gone when the
# next one begins. Seen: the process keeps the variables of every notebook that it has tested, since IPython keeps every shell until
# the process ends; garbage collection does not free them. Notebooks that hold networks and images fill the memory one after another.
# Fails when that changes.
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/pip" install --quiet --disable-pip-version-check nbdev==3.3.26 execnb==0.3.4 fastcore==2.2.41 ipython==9.18.1
cd "$folder"
"$folder/env/bin/python" - <<'PYTHON'
import gc
import json
from importlib.metadata import version

from nbdev.test import test_nb

code = "class Large:\n    pass\nlarge = Large()\n"
cell = {"cell_type": "code", "id": "a", "metadata": {}, "source": code, "outputs": [], "execution_count": None}
names = [f"{i}.ipynb" for i in range(3)]
for name in names:
    with open(name, "w") as file:
        json.dump({"cells": [cell], "metadata": {}, "nbformat": 4, "nbformat_minor": 5}, file)
counts = []
for name in names:
    passed, _ = test_nb(name, profile=False)
    assert passed
    gc.collect()
    counts.append(sum(type(o).__name__ == "Large" for o in gc.get_objects()))
print(f"nbdev {version('nbdev')}, IPython {version('ipython')}: kept after each notebook: {counts}")
assert counts == [1, 2, 3]
PYTHON
