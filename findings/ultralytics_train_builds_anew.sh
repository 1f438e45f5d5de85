#!/bin/sh
# Guess: `YOLO.train()` trains the network that the object holds, so a layer that was exchanged in it is trained and saved.
# Seen (ultralytics 8.4.190): a model made from a yaml file is built anew from that file. The exchanged layer is gone afterwards, and
# nothing says so. A trainer whose `get_model` makes the exchange keeps it, in the object and in the saved file. Valid use of the public interface throughout.
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
pip="$folder/env/bin/python -m pip install --quiet --disable-pip-version-check"
$pip torch==2.14.1 matplotlib==3.11.2 numpy==2.4.6 pillow==13.0.0 psutil==7.2.2 PyYAML==6.0.4 \
    requests==2.34.2 scipy==1.17.1 torchvision==0.29.1 polars==2.1.0 opencv-python-headless==5.0.0.93 ultralytics-thop==2.2.3
$pip --no-deps ultralytics==8.4.190
cd "$folder"
HOME="$folder" YOLO_OFFLINE=true "$folder/env/bin/python" - <<'PY'
import logging
from pathlib import Path

import numpy as np
import ultralytics
from PIL import Image
from torch import nn
from ultralytics import YOLO
from ultralytics.models.yolo.detect import DetectionTrainer

logging.getLogger("ultralytics").setLevel(logging.ERROR)
root = Path("squares").resolve()
for split in ("train", "val"):
    for kind in ("images", "labels"):
        (root / kind / split).mkdir(parents=True)
    for i in range(4):
        scene = np.full((64, 64, 3), 40, np.uint8)
        scene[16:40, 16:40] = 220
        Image.fromarray(scene).save(root / "images" / split / f"{i}.png")
        (root / "labels" / split / f"{i}.txt").write_text("0 0.4375 0.4375 0.375 0.375\n")
(root / "data.yaml").write_text(f"path: {root}\ntrain: images/train\nval: images/val\nnames: [square]\n")
how = dict(data=str(root / "data.yaml"), epochs=1, imgsz=64, batch=4, workers=0, device="cpu", plots=False, verbose=False)


def exchanged(model):
    model.model[0].act = nn.Hardswish()
    return model


class Exchanging(DetectionTrainer):
    def get_model(self, cfg=None, weights=None, verbose=True):
        return exchanged(super().get_model(cfg, weights, verbose))


def activation(yolo):
    return type(yolo.model.model[0].act).__name__


plain = YOLO("yolov8n.yaml")
exchanged(plain.model)
before = activation(plain)
plain.train(**how)
after = activation(plain)
own = YOLO("yolov8n.yaml")
own.train(trainer=Exchanging, **how)
found = (ultralytics.__version__, before, after, activation(own), activation(YOLO(own.trainer.best)))
print("version, before, after train(), with a trainer, loaded again:", *found)
assert found == ("8.4.190", "Hardswish", "SiLU", "Hardswish", "Hardswish"), found
PY
