#!/bin/sh
# torchmetrics 1.9.0, imported for a metric of tensors. Guess: the import of a library of metrics changes no other library. Seen:
# it imports scipy.signal, which no metric used here needs and which is a good part of its import time, and gives it the function
# `hamming` that SciPy removed (the windows are in scipy.signal.windows). `import lightning` imports torchmetrics where it is
# installed. So old code that calls scipy.signal.hamming works in a process that has imported either, and fails in another one.
# Fails when that changes.
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/pip" install --quiet --disable-pip-version-check torch==2.14.1 torchmetrics==1.9.0 scipy==1.17.1 lightning==2.6.6
for first in scipy.signal torchmetrics lightning; do
  echo "after import $first: $("$folder/env/bin/python" -c "
import $first, sys
print('scipy.signal' in sys.modules, hasattr(sys.modules['scipy.signal'], 'hamming'))")"
done | tee "$folder/seen"
printf 'after import %s\n' 'scipy.signal: True False' 'torchmetrics: True True' 'lightning: True True' | diff - "$folder/seen"
