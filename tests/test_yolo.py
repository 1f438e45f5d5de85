"""Attention in a YOLO of ultralytics: trained, resumed, loaded anew, exported, it is the same network."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT
from PIL import Image

# Before its import: its settings are no file of the user's, and it asks no server.
os.environ["YOLO_CONFIG_DIR"] = str(ROOT / ".cache/ultralytics")
os.environ["YOLO_OFFLINE"] = "true"
pytest.importorskip("ultralytics", reason="pip install ultralytics")

from ultralytics import YOLO

import scsa_book.integrations.ultralytics as attended
from scsa_book.attention.base import Attention
from scsa_book.networks.placement import attend_modules, attentions

WORDS = pytest.mark.parametrize("word", ["SE", "CBAM", "SA", "CAT", "SCSA"])
X = torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(0))
LIKE = {"imgsz": 64, "workers": 0, "device": "cpu", "batch": 4, "plots": False, "verbose": False}


def made(folder, word="SCSA"):
    return YOLO(attended.insert("yolo11n.yaml", {4: word, 10: word}, folder / f"yolo11n-{word}.yaml"))


def output(yolo, x=X):
    "Boxes and scores of the network as it is, (1, 4 + classes, positions)."
    with torch.no_grad():
        return yolo.model.float().eval()(x)[0]


def attention_in(network):
    "The mechanisms that are layers, or those inside of layers."
    layers = [layer for layer in network.model if isinstance(layer, Attention)]
    return layers or list(attentions(network).values())


def weights(network):
    "The parameters of its attention as they are saved, in half precision."
    return [p.detach().half() for m in attention_in(network) for p in m.parameters()]


def off(found, expected):
    return float((found - expected).abs().max() / expected.abs().max())


@pytest.fixture(scope="module")
def squares(tmp_path_factory):
    "Four images of a square for training, and four for validation."
    root = tmp_path_factory.mktemp("squares")
    for split in ("train", "val"):
        for kind in ("images", "labels"):
            (root / kind / split).mkdir(parents=True)
        for i in range(4):
            scene = np.full((64, 64, 3), 40, np.uint8)
            scene[16:40, 16:40] = 220
            Image.fromarray(scene).save(root / "images" / split / f"{i}.png")
            (root / "labels" / split / f"{i}.txt").write_text("0 0.4375 0.4375 0.375 0.375\n")
    text = f"path: {root}\ntrain: images/train\nval: images/val\nnames: [square]\n"
    (root / "squares.yaml").write_text(text)
    return root


def test_weights_move_past_the_rows(tmp_path):
    "Every layer without attention has the weights of its counterpart, and no other has."
    stock, yolo = YOLO("yolo11n.yaml"), made(tmp_path)
    report = attended.load_shifted(yolo, stock)
    assert len(report.loaded) == 499 and {k.split(".")[1] for k in report.skipped} == {"5", "12"}
    layers = [m for m in yolo.model.model if not isinstance(m, Attention)]
    for ours, theirs in zip(layers, stock.model.model, strict=True):
        pairs = zip(ours.state_dict().values(), theirs.state_dict().values(), strict=True)
        assert all(torch.equal(a, b) for a, b in pairs)
    another = YOLO(attended.insert("yolo11n.yaml", {3: "SE"}, tmp_path / "yolo11n-se.yaml"))
    with pytest.raises(ValueError, match="24 layers without attention take no weights of 25"):
        attended.load_shifted(yolo, another)
    with pytest.raises(ValueError, match=r"rows=\[40\]: yolo11n.yaml has layers 0 to 22"):
        attended.insert("yolo11n.yaml", {40: "SE"}, tmp_path / "n.yaml")


AGAIN = """
import sys, torch
from ultralytics import YOLO
network = YOLO(sys.argv[1]).model.float().eval()
with torch.no_grad():
    torch.save(network(torch.load(sys.argv[2]))[0], sys.argv[3])
"""


def in_a_fresh_process(file, folder):
    torch.save(X, folder / "x.pt")
    command = [sys.executable, "-c", AGAIN, str(file), str(folder / "x.pt"), str(folder / "y.pt")]
    subprocess.run(command, check=True, cwd=ROOT)
    return torch.load(folder / "y.pt")


def as_exported(kind, file):
    "The output of an exported file; OpenVINO computes in single precision."
    if kind == "openvino":
        import openvino

        single = {"INFERENCE_PRECISION_HINT": "f32"}
        model = openvino.Core().compile_model(next(Path(file).glob("*.xml")), "CPU", single)
        return torch.from_numpy(model(X.numpy())[0].copy())
    from ultralytics.nn.autobackend import AutoBackend

    y = AutoBackend(str(file), device=torch.device("cpu"), verbose=False)(X)
    return torch.as_tensor(y[0] if isinstance(y, (list, tuple)) else y)


def inside(word):
    "A trainer that puts a mechanism behind two layers, in Python."

    class Inside(attended.AttendedTrainer):
        def attend(self, network):
            return attend_modules(network, ["model.4", "model.10"], word.lower(), example=X)

    return Inside


@pytest.mark.slow
@WORDS
@pytest.mark.parametrize("way", ["rows", "trainer"])
def test_attention_is_kept(way, word, squares, tmp_path):
    "Trained, stopped and resumed, loaded anew, exported in all four ways with default options."
    rows = way == "rows"
    yolo = made(tmp_path, word) if rows else YOLO("yolo11n.yaml")
    trainer = None if rows else inside(word)
    where = {"data": str(squares / "squares.yaml"), "project": str(tmp_path), "name": "run", **LIKE}
    stop = lambda trainer: setattr(trainer, "stop", trainer.epoch == 0)  # noqa: E731
    start = []
    keep = lambda trainer: start.extend(weights(trainer.model))  # noqa: E731
    yolo.add_callback("on_train_start", keep)
    yolo.add_callback("on_fit_epoch_end", stop)
    yolo.train(trainer=trainer, epochs=2, save_period=1, warmup_epochs=0, nbs=4, **where)
    after = weights(YOLO(tmp_path / "run" / "weights" / "last.pt").model)
    assert after and any(not torch.equal(a, b) for a, b in zip(start, after, strict=True))
    resumed = YOLO(tmp_path / "run" / "weights" / "epoch0.pt")
    resumed.train(trainer=trainer, resume=True)
    assert resumed.trainer.epoch == 1
    best = YOLO(resumed.trainer.best)
    expected = output(best)
    assert len(attention_in(best.model)) == 2
    assert off(in_a_fresh_process(resumed.trainer.best, tmp_path), expected) < 1e-6
    for kind in ("torchscript", "onnx", "openvino", "ncnn"):
        file = YOLO(resumed.trainer.best).export(format=kind, imgsz=64)
        assert off(as_exported(kind, file), expected) < 1e-3, kind


@pytest.mark.slow
def test_a_trainer_takes_every_weight(squares, tmp_path):
    where = {"data": str(squares / "squares.yaml"), "project": str(tmp_path), "name": "run", **LIKE}
    yolo = YOLO("yolo11n.yaml")
    yolo.train(trainer=inside("SCSA"), epochs=1, **where)
    again = YOLO(yolo.trainer.last)
    assert len(attentions(yolo.model)) == len(attentions(again.model)) == 2
    network = again.model
    fresh = inside("SCSA")(overrides={"model": "yolo11n.yaml", "epochs": 1, **where})
    fresh.data = yolo.trainer.data
    loaded = fresh.get_model(network.yaml, network, verbose=False).state_dict()
    assert all(torch.equal(v.float(), loaded[k].float()) for k, v in network.state_dict().items())
