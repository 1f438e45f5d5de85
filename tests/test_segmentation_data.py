"""Images with a class for each pixel: both get the same augmentation."""

import os
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from scsa_book.data import fashion, loading, segmentation
from scsa_book.data.images import BatchIndices, seeded
from scsa_book.data.scenes import SceneOptions, scene
from scsa_book.data.segmentation import IGNORE, JointTransform, segmentation_dataset
from scsa_book.paths import DataError


def draw(half, *indices, seed=0):
    return half[BatchIndices(torch.tensor(indices, dtype=torch.long), seed)]


def frame(images, classes, name, greys):
    "An image whose red is ten times its class, and the file of its classes."
    for folder in (images, classes):
        folder.mkdir(parents=True, exist_ok=True)
    greys = np.asarray(greys, np.uint8)
    colours = np.stack([greys * 10, greys * 0, greys * 0], 2)
    Image.fromarray(colours).save(images / f"{name}.png")
    Image.fromarray(greys).save(classes / f"{name}.png")


def columns(classes=8, width=12, height=60):
    return np.tile(np.repeat(np.arange(classes), width), (height, 1))


# ---- image and label map together


@pytest.mark.parametrize("crop", [(48, 48), (20, 90), (120, 120)])
def test_image_and_classes_stay_together(crop):
    greys = torch.from_numpy(columns().astype(np.uint8))
    change = JointTransform(crop, (0.5, 2.0), colour=(0, 0, 0))
    with seeded(1):
        pairs = [change((greys * 30).expand(3, -1, -1), greys) for _ in range(40)]
    shares = []
    for image, classes in pairs:
        assert image.shape == (3, *crop) and classes.shape == crop and image.dtype == torch.uint8
        seen = classes != IGNORE
        shares.append(((image[0].float() / 30).round() == classes)[seen].float().mean().item())
        assert set(classes.unique().tolist()) <= {*range(8), IGNORE}, "classes are never averaged"
    assert min(shares) > 0.85
    assert {tuple(c.unique().tolist()) for _, c in pairs} != {tuple(range(8))}


def test_windows_are_mirrored_with_probability_one_half():
    greys = torch.from_numpy(columns().astype(np.uint8))
    change = JointTransform((60, 96), (1, 1), colour=(0, 0, 0))
    with seeded(2):
        pairs = [change(greys.expand(3, -1, -1), greys) for _ in range(200)]
    mirrored = sum(torch.equal(c, greys.flip(-1)) for _, c in pairs)
    assert 70 < mirrored < 130 and all(torch.equal(x[0], c) for x, c in pairs)
    assert mirrored + sum(torch.equal(c, greys) for _, c in pairs) == 200


def test_a_image_is_padded_with_its_average_colour_and_without_class():
    image, classes = torch.full((3, 4, 5), 9, dtype=torch.uint8), torch.ones(4, 5, dtype=torch.uint8)
    x, y = segmentation.pad_to_size(image, classes, 6, 5, (0.5, 0, 1))
    assert x.shape == (3, 6, 5) and x[:, 5, 0].tolist() == [128, 0, 255] and (x[:, :4] == 9).all()
    assert (y[4:] == IGNORE).all() and (y[:4] == 1).all()
    assert segmentation.pad_to_size(image, classes, 3, 5, (0, 0, 0))[0] is image


def test_windows_of_one_class_are_drawn_again():
    greys = torch.zeros(64, 256, dtype=torch.uint8)
    greys[:, 240:] = 1
    found = {}
    for tries in (1, 10):
        change = JointTransform((32, 32), (1, 1), (0, 0, 0), tries=tries)
        with seeded(3):
            windows = [change(greys.expand(3, -1, -1), greys)[1] for _ in range(100)]
        found[tries] = sum(not segmentation.one_class_dominates(w) for w in windows)
    assert found[10] > 2 * found[1]


def test_distortion_changes_colours_and_no_class():
    greys = torch.from_numpy(columns().astype(np.uint8))
    image = (greys * 30).expand(3, -1, -1)
    plain, bright = (JointTransform((60, 96), (1, 1), (0, 0, 0), distort) for distort in (False, True))
    different = 0
    for seed in range(20):
        with seeded(seed):
            x, y = plain(image, greys)
        with seeded(seed):
            a, b = bright(image, greys)
        assert torch.equal(y, b) and a.dtype == torch.uint8
        different += not torch.equal(x, a)
    assert different > 10


# ---- objects


def test_scenes_give_each_pixel_the_class_of_its_garment():
    options = SceneOptions(objects=8, overlap=0.6)
    found = segmentation_dataset("scenes", train_images=10, test_images=5, scenes=options)
    x, y = draw(found.test, 0, 3)
    assert x.shape == (2, 3, 96, 96) and x.dtype == torch.uint8 and y.dtype == torch.int64
    for image, classes, index in zip(x, y, (0, 3), strict=True):
        s = scene(options, "test", index)
        assert (image.numpy() == s.image).all()
        expected = (s.masks * s.labels[:, None, None]).sum(0)
        assert (classes.numpy() == expected).all()
    assert found.classes == ("background", *fashion.CLASSES) and found.ignore == IGNORE


def target(masks, labels, areas, crowds):
    return {
        "masks": torch.tensor(masks, dtype=torch.uint8),
        "labels": torch.tensor(labels),
        "area": torch.tensor(areas, dtype=torch.float32),
        "iscrowd": torch.tensor(crowds),
    }


def test_the_smaller_object_is_on_top_and_crowds_are_ignored():
    masks = [[[0, 1, 0, 0, 0]], [[1, 1, 1, 0, 0]], [[0, 0, 1, 1, 0]]]
    for order in ([0, 1, 2], [2, 1, 0], [1, 2, 0]):
        parts = ([row[i] for i in order] for row in (masks, [2, 7, 5], [1, 3, 2], [0, 0, 1]))
        assert segmentation.class_map(target(*parts), 1, 5).tolist() == [[7, 2, 7, IGNORE, 0]]


def test_no_objects_are_all_background():
    nothing = target(np.zeros((0, 2, 3)), [], [], [])
    assert segmentation.class_map(nothing, 2, 3).tolist() == [[0, 0, 0], [0, 0, 0]]


def test_coco_mini_is_a_set_for_segmentation():
    found = segmentation_dataset("coco-mini", train_images=8, test_images=4)
    x, y = draw(found.train, 0, 5)
    assert x.shape == (2, 3, 320, 320) and len(found.classes) == 81
    assert y.max() <= IGNORE and ((y <= 80) | (y == IGNORE)).all() and (y > 0).any()
    assert len(found.train) == 8 and len(found.test) == 4


def test_test_images_keep_their_size_and_are_padded_in_a_batch():
    found = segmentation_dataset("coco-mini")
    sizes = [(p.height, p.width) for p in found.test.source.images[:3]]
    assert len(set(sizes)) > 1
    for i, size in enumerate(sizes):
        assert draw(found.test, i)[0].shape[2:] == size
    x, y = draw(found.test, 0, 1, 2)
    assert x.shape[2:] == tuple(np.max(sizes, 0))
    for (h, w), classes in zip(sizes, y, strict=True):
        assert (classes[h:] == IGNORE).all() and (classes[:, w:] == IGNORE).all()


# ---- CamVid and ADE20K


@pytest.fixture
def camvid(tmp_path):
    greys = columns(12, 4, 20)
    for half, names in (("train", "abc"), ("test", "de")):
        for name in names:
            frame(tmp_path / "camvid" / half, tmp_path / "camvid" / f"{half}annot", name, greys)
    return tmp_path


def test_camvids_layout_is_read(camvid):
    found = segmentation_dataset("camvid", camvid, train_images=2)
    assert len(found.train) == 2 and len(found.test) == 2
    assert found.classes[3] == "Road" and len(found.classes) == 11
    x, y = draw(found.test, 1)
    assert y[0, 0].tolist() == np.repeat([*range(11), IGNORE], 4).tolist()
    assert torch.equal(x[0, 0, 0] // 10, torch.arange(12, dtype=torch.uint8).repeat_interleave(4))
    assert draw(found.train, 0, 1)[0].shape == (2, 3, 360, 480)


@pytest.fixture
def ade(tmp_path):
    base = tmp_path / "ade20k" / "ADEChallengeData2016"
    for half in ("training", "validation"):
        frame(base / "images" / half, base / "annotations" / half, "ADE_1", [[0, 1], [2, 150]])
    lines = [f"{i}\t0.1\t9\t9\t1\tclass {i}, other name" for i in range(1, 151)]
    (base / "objectInfo150.txt").write_text("\n".join(["Idx\tRatio\tTrain\tVal\tStuff\tName", *lines]))
    return tmp_path


def test_ade20ks_layout_is_read(ade):
    found = segmentation_dataset("ade20k", ade, crop=(32, 32))
    assert draw(found.test, 0)[1][0].tolist() == [[IGNORE, 0], [1, 149]]
    assert found.classes[149] == "class 150" and draw(found.train, 0)[0].shape == (1, 3, 32, 32)


def test_missing_and_odd_files_are_named(camvid, ade):
    folder = camvid / "camvid"
    (folder / "trainannot/b.png").unlink()
    with pytest.raises(DataError, match="no classes for 1 images, first b.png: .*trainannot. CamVid, as"):
        segmentation_dataset("camvid", camvid)
    Image.new("RGB", (48, 20)).save(folder / "trainannot/b.png")
    with pytest.raises(DataError, match="b.png has colours, not numbers of classes"):
        draw(segmentation_dataset("camvid", camvid).train, 1)
    Image.new("L", (48, 20), 12).save(folder / "trainannot/b.png")
    with pytest.raises(DataError, match="b.png holds 12, which is no class"):
        draw(segmentation_dataset("camvid", camvid).train, 1)
    Image.new("L", (20, 48), 1).save(folder / "trainannot/b.png")
    with pytest.raises(DataError, match="b.png and its classes b.png have different sizes"):
        draw(segmentation_dataset("camvid", camvid).train, 1)
    (folder / "trainannot/b.png").write_bytes(b"no image")
    with pytest.raises(DataError, match="cannot decode b.png"):
        draw(segmentation_dataset("camvid", camvid).train, 1)
    (ade / "ade20k/ADEChallengeData2016/objectInfo150.txt").write_text("head\n1\twall\n")
    with pytest.raises(DataError, match="objectInfo150.txt lists 1 classes, not 150"):
        segmentation_dataset("ade20k", ade)


def test_a_set_that_is_not_there_is_missed(tmp_path, monkeypatch):
    monkeypatch.delenv("SCSA_BOOK_DATA", raising=False)
    with pytest.raises(DataError, match="no data root for camvid: neither data_root nor SCSA_BOOK_DATA"):
        segmentation_dataset("camvid")
    with pytest.raises(DataError, match="no folder `ade20k`: .*sceneparsing"):
        segmentation_dataset("ade20k", tmp_path)
    with pytest.raises(ValueError, match="unknown dataset 'bccd'"):
        segmentation_dataset("bccd")


def test_the_real_camvid():
    root = os.environ.get("SCSA_BOOK_DATA")
    if not root or not Path(root, "camvid").is_dir():
        pytest.skip("no camvid below SCSA_BOOK_DATA")
    found = segmentation_dataset("camvid")
    assert (len(found.train), len(found.test)) == (367, 233)
    assert not {p.name for p, _ in found.train.files} & {p.name for p, _ in found.test.files}
    x, y = draw(found.test, *range(0, 233, 10))
    assert x.shape[1:] == (3, 360, 480)
    shares = torch.bincount(y.flatten(), minlength=256) / y.numel()
    assert shares[11:IGNORE].sum() == 0 and 0.2 < shares[3] < 0.4, "roads are the largest class"


# ---- loading


def test_worker_processes_change_no_batch():
    found = segmentation_dataset("coco-mini", train_images=8, crop=(64, 64), distort=True)
    alone, helped = (
        list(loading.ImageModule(found, 4, seed=1, workers=w).train_dataloader()) for w in (0, 2)
    )
    assert len(alone) == 2
    for (a, b), (c, d) in zip(alone, helped, strict=True):
        assert torch.equal(a, c) and torch.equal(b, d)
    again = next(iter(loading.ImageModule(found, 4, seed=2, workers=0).train_dataloader()))
    assert not torch.equal(again[0], alone[0][0])


def test_an_empty_share_of_a_batch_is_empty():
    x, y = draw(segmentation_dataset("scenes", test_images=4).test)
    assert len(x) == len(y) == 0


def test_facts_agree_with_the_sets_that_are_here():
    for name in ("scenes", "coco-mini"):
        known, found = segmentation.facts(name), segmentation_dataset(name, train_images=2, test_images=2)
        assert known.embedded and known.classes == len(found.classes)
        assert draw(found.train, 0, 1)[0].shape[2:] == known.crop
    assert segmentation.facts("camvid").classes == len(segmentation.CAMVID_CLASSES)


def test_scenes_of_another_size_are_cropped_to_it():
    found = segmentation_dataset("scenes", train_images=2, scenes={"side": 64})
    assert draw(found.train, 0)[0].shape == draw(found.test, 0)[0].shape == (1, 3, 64, 64)
