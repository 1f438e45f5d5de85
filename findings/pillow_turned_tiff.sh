#!/bin/sh
# Pillow 13.0.0: an uncompressed grey TIFF whose orientation swaps its sides is shown rightly when it is opened as a
# stream, and scrambled when it is opened by its name: by name the rows are mapped from the file, in the width that the
# image has after turning. Seen: 'stream' is [[0, 120], [40, 160], [80, 200]], 'name' is [[0, 80, 160], [40, 120, 200]].
# Fails when that changes.
set -eu
place=$(mktemp -d)
trap 'rm -rf "$place"' EXIT
python3 -m venv "$place/env"
"$place/env/bin/pip" install --quiet --disable-pip-version-check pillow==13.0.0 numpy==2.2.6
cd "$place"
env/bin/python - <<'PYTHON'
import numpy as np
from PIL import Image

stored = np.array([[0, 40, 80], [120, 160, 200]], np.uint8)
exif = Image.Exif()
exif[0x0112] = 5  # rows and columns change places
Image.fromarray(stored).save("turned.tif", exif=exif)
with open("turned.tif", "rb") as stream, Image.open(stream) as image:
    by_stream = np.asarray(image).tolist()
with Image.open("turned.tif") as image:
    by_name = np.asarray(image).tolist()
print("stream", by_stream)
print("name  ", by_name)
assert by_stream == stored.T.tolist(), "the stream is not shown as stored and turned"
assert by_name != by_stream, "both are right now: the finding is out of date"
PYTHON
