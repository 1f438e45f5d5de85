"""Annotated images and scenes: read according to their formats, and exact if they are synthetic."""

import json
import shutil
import time
from collections import Counter
from dataclasses import replace
from hashlib import sha256

import numpy as np
import pytest
import torch
from conftest import ROOT
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torchvision.transforms import v2

from scsa_book.data import annotations as ann
from scsa_book.data import detection, fashion, loading, scenes
from scsa_book.data.detection import detection_dataset
from scsa_book.data.images import BatchIndices
from scsa_book.data.scenes import SceneOptions, scene
from scsa_book.paths import DataError


def draw(half, *indices, seed=0):
    return half[BatchIndices(torch.tensor(indices, dtype=torch.long), seed)]


def write_image(path, size=(40, 30), shade=200):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, (shade, 10, 10)).save(path)
    return path


def write(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


# ---- the embedded datasets


def listed(name):
    folder = ROOT / "data" / name
    return folder, dict(line.split()[::-1] for line in (folder / "SHA256SUMS").read_text().splitlines())


@pytest.mark.parametrize(("name", "files"), [("bccd", 734), ("coco-mini", 161)])
def test_an_embedded_dataset_is_the_files_that_it_lists(name, files):
    folder, sums = listed(name)
    here = {f"./{p.relative_to(folder).as_posix()}" for p in folder.rglob("*") if p.is_file()}
    assert here == {*sums, "./SHA256SUMS"} and len(sums) == files and "./SOURCE.md" in sums
    for path, expected in sums.items():
        assert sha256((folder / path).read_bytes()).hexdigest() == expected, path


def test_the_embedded_data_stay_small():
    sizes = {p: p.stat().st_size for p in (ROOT / "data").rglob("*") if p.is_file()}
    assert sum(size for p, size in sizes.items() if p.parent.name != "networks") < 25e6
    assert sum(size for p, size in sizes.items() if p.parent.name == "networks") < 25e6


def test_the_embedded_data_may_be_given_on():
    assert "MIT License" in (ROOT / "data/bccd/LICENSE").read_text()
    seen = Counter()
    for half in ("train", "val"):
        content = json.loads((ROOT / f"data/coco-mini/annotations/instances_{half}2017.json").read_text())
        allowed = {entry["id"]: entry["name"] for entry in content["licenses"]}
        assert not [n for n in allowed.values() if "NonCommercial" in n or "NoDeriv" in n]
        for image in content["images"]:
            seen[image["license"]] += 1
            assert image["license"] in allowed
            assert image["flickr_url"].startswith("http") and image["coco_url"].startswith("http")
    assert seen == {4: 98, 5: 57, 7: 3}


def test_blood_cells_are_read_and_the_two_clicks_are_reported():
    cells = detection_dataset("bccd")
    assert (len(cells.train), len(cells.test)) == (292, 72)
    labels = Counter()
    for half in (cells.train, cells.test):
        labels.update(label for p in half.images for label in p.labels.tolist())
    assert [labels[i] for i in (1, 2, 3)] == [4153, 372, 361] and cells.classes[0] == "RBC"
    assert len(cells.notes) == 2
    assert "BloodImage_00338.xml, object 13: box (504, 337, 504, 337) has no area" in cells.notes[0]
    assert not {p.file for p in cells.train.images} & {p.file for p in cells.test.images}


def test_coco_mini_is_read_with_masks_crowds_and_empty_images():
    coco = detection_dataset("coco-mini", masks=True)
    assert (len(coco.train), len(coco.test), len(coco.classes)) == (92, 66, 80)
    assert [sum(p.crowd.sum() for p in half.images) for half in (coco.train, coco.test)] == [9, 8]
    assert [sum(len(p.labels) == 0 for p in half.images) for half in (coco.train, coco.test)] == [1, 2]
    assert not {p.file.name for p in coco.train.images} & {p.file.name for p in coco.test.images}
    index = next(i for i, p in enumerate(coco.test.images) if p.crowd.any())
    [image], [target] = draw(coco.test, index)
    assert target["masks"].shape == (len(target["labels"]), *image.shape[1:])
    assert target["iscrowd"].sum() == coco.test.images[index].crowd.sum()


def test_masks_of_coco_have_the_stated_area():
    coco = detection_dataset("coco-mini", masks=True)
    ratios = [ann.masks_of(p).sum((1, 2)) / p.area for p in coco.test.images[:20] if len(p.labels)]
    assert abs(np.median(np.concatenate(ratios)) - 1) < 0.02


# ---- COCO


def coco_content():
    square = [[2, 3, 12, 3, 12, 23, 2, 23]]
    crowd = {"counts": [30 * 39, 30], "size": [30, 40]}  # the last column
    return {
        "categories": [{"id": 7, "name": "bus"}, {"id": 3, "name": "car"}],
        "images": [
            {"id": 11, "file_name": "a.jpg", "height": 30, "width": 40},
            {"id": 12, "file_name": "b.jpg", "height": 30, "width": 40},
        ],
        "annotations": [
            {"id": 1, "image_id": 11, "category_id": 3, "bbox": [2, 3, 10, 20], "area": 200,
             "iscrowd": 0, "segmentation": square},
            {"id": 2, "image_id": 11, "category_id": 7, "bbox": [39, 0, 1, 30], "area": 30,
             "iscrowd": 1, "segmentation": crowd},
        ],
    }  # fmt: skip


def coco_folder(folder, content=None, test=None):
    for half, value in (("train", content or coco_content()), ("val", test or content or coco_content())):
        write(folder / "annotations" / f"instances_{half}2017.json", json.dumps(value))
        for name in ("a.jpg", "b.jpg"):
            write_image(folder / f"{half}2017" / name)
    return folder


def test_coco_is_read(tmp_path):
    half = detection.coco_split(coco_folder(tmp_path), "train")
    a, b = half.images
    assert half.classes == ("car", "bus") and half.notes == ()
    assert a.boxes.tolist() == [[2, 3, 12, 23], [39, 0, 40, 30]] and a.labels.tolist() == [1, 2]
    assert a.crowd.tolist() == [False, True] and a.area.tolist() == [200, 30] and a.image_id == 11
    masks = ann.masks_of(a)
    assert masks[0, 3:23, 2:12].all() and masks[0].sum() == 200
    assert masks[1, :, 39].all() and masks[1].sum() == 30
    assert len(b.labels) == 0 and ann.masks_of(b).shape == (0, 30, 40)


def test_crowds_are_left_out_for_training_and_kept_for_evaluation(tmp_path):
    coco_folder(tmp_path / "mine")
    mine = detection_dataset("coco:mine", tmp_path, masks=True, augment="none")
    [_, empty], [learn, nothing] = draw(mine.train, 0, 1)
    _, [test] = draw(mine.test, 0)
    assert learn["labels"].tolist() == [1] and learn["iscrowd"].tolist() == [0]
    assert test["labels"].tolist() == [1, 2] and test["iscrowd"].tolist() == [0, 1]
    assert nothing["boxes"].shape == (0, 4) and nothing["masks"].shape == (0, 30, 40)
    assert empty.dtype == torch.float32 and 0 <= empty.min() and empty.max() <= 1


def without(name):
    content = coco_content()
    del content["annotations"][0][name]
    return json.dumps(content)


def with_(**fields):
    content = coco_content()
    content["annotations"][0].update(fields)
    return json.dumps(content)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (json.dumps(coco_content())[:-40], r"instances_train2017.json is no whole JSON \(line 1, column"),
        ("[]", "no field 'images'|no field 'categories'"),
        (without("bbox"), "no field 'bbox': .*instances_train2017.json, annotation 1"),
        (without("image_id"), "no field 'image_id': .*annotation 1"),
        (with_(category_id=99), "category_id 99 is not among the categories: .*annotation 1"),
        (with_(image_id=99), "image_id 99 is not among the images: .*annotation 1"),
        (with_(bbox=[1, 2, 3]), "bbox has 3 numbers, not 4: .*annotation 1"),
        (with_(bbox=[1, 2, 3, "x"]), "bbox is 'x' and no number: .*annotation 1"),
        (with_(segmentation=[[1, 2, 3, 4]]), "a polygon of less than three points: .*annotation 1"),
        (with_(segmentation={"counts": [9], "size": [3, 3]}), r"run lengths for an image of \[3, 3\]"),
    ],
)
def test_what_is_wrong_with_a_coco_file_is_said(tmp_path, text, said):
    coco_folder(tmp_path)
    write(tmp_path / "annotations/instances_train2017.json", text)
    with pytest.raises(DataError, match=said):
        detection.coco_split(tmp_path, "train")


def test_missing_images_and_files_of_coco_are_named(tmp_path):
    coco_folder(tmp_path / "mine")
    (tmp_path / "mine/train2017/b.jpg").unlink()
    with pytest.raises(DataError, match="1 of 2 images missing, first b.jpg: .*train2017. A COCO folder"):
        detection_dataset("coco:mine", tmp_path)
    (tmp_path / "mine/annotations/instances_train2017.json").unlink()
    with pytest.raises(DataError, match=r"0 files instances_train\*.json, not one: .*annotations"):
        detection_dataset("coco:mine", tmp_path)


def test_splits_with_other_classes_are_refused(tmp_path):
    other = coco_content()
    other["categories"][0]["name"] = "tram"
    coco_folder(tmp_path / "mine", test=other)
    with pytest.raises(DataError, match="classes of the splits differ: bus, tram"):
        detection_dataset("coco:mine", tmp_path)


def test_a_image_of_another_size_or_damaged_is_named(tmp_path):
    coco_folder(tmp_path / "mine")
    write_image(tmp_path / "mine/train2017/a.jpg", size=(20, 15))
    with pytest.raises(DataError, match="a.jpg is 15 x 20, its annotation says 30 x 40: .*train2017"):
        draw(detection_dataset("coco:mine", tmp_path).train, 0)
    write(tmp_path / "mine/train2017/a.jpg", "no image")
    with pytest.raises(DataError, match="cannot decode a.jpg"):
        draw(detection_dataset("coco:mine", tmp_path).train, 0)


def test_boxes_outside_are_clipped_and_those_without_area_dropped(tmp_path):
    content = coco_content()
    boxes = [[-5, 4, 10, 10], [35, 4, 5.6, 3], [50, 4, 5, 5], [3, 3, 0, 9], [3, 3, -2, 9]]
    content["annotations"] = [
        {"id": i, "image_id": 11, "category_id": 3, "bbox": box} for i, box in enumerate(boxes)
    ]
    half = detection.coco_split(coco_folder(tmp_path, content), "train")
    assert half.images[0].boxes.tolist() == [[0, 4, 5, 14], [35, 4, 40, 7]]
    assert half.images[0].outlines is None
    said = [note.split(", ", 1)[1] for note in half.notes]
    assert said[0] == "annotation 0: box (-5, 4, 5, 14) clipped to 40 x 30"
    assert [s.split(":")[0] for s in said[1:]] == ["annotation 2", "annotation 3", "annotation 4"]
    assert all("has no area; left out" in s for s in said[1:])


# ---- Pascal VOC


def voc_text(objects, size=(40, 30)):
    body = "".join(
        f"<object><name>{name}</name><difficult>{difficult}</difficult><bndbox><xmin>{x0}</xmin>"
        f"<ymin>{y0}</ymin><xmax>{x1}</xmax><ymax>{y1}</ymax></bndbox></object>"
        for name, difficult, x0, y0, x1, y1 in objects
    )
    head = f"<size><width>{size[0]}</width><height>{size[1]}</height><depth>3</depth></size>"
    return f"<annotation><filename>wrong.jpg</filename>{head}{body}</annotation>"


def voc_folder(folder, names=("p1",), split="trainval", text=None):
    default = voc_text([("car", 0, 1, 1, 40, 30), ("bus", 1, 3, 4, 12, 23)])
    write(folder / "ImageSets/Main" / f"{split}.txt", "\n".join(names) + "\n")
    for name in names:
        write_image(folder / "JPEGImages" / f"{name}.jpg")
        write(folder / "Annotations" / f"{name}.xml", text or default)
    return folder


def test_voc_counts_pixels_from_one(tmp_path):
    [p] = ann.read_voc(voc_folder(tmp_path), "trainval").images
    assert p.boxes.tolist() == [[0, 0, 40, 30], [2, 3, 12, 23]], "a box of all pixels is the image"
    assert p.labels.tolist() == [7, 6] and p.crowd.tolist() == [False, True]


def test_voc_0712_has_both_years_for_training(tmp_path):
    kit = tmp_path / "voc0712/VOCdevkit"
    voc_folder(kit / "VOC2007", ("p1", "p2"))
    voc_folder(kit / "VOC2007", ("p3",), split="test")
    voc_folder(kit / "VOC2012", ("q1",))
    found = detection_dataset("voc0712", tmp_path)
    assert [p.file.stem for p in found.train.images] == ["p1", "p2", "q1"]
    assert [p.image_id for p in found.train.images] == [0, 1, 2]
    assert [p.file.stem for p in found.test.images] == ["p3"]


def test_voc_2012_alone_is_tested_on_its_validation_part(tmp_path):
    year = tmp_path / "voc2012/VOCdevkit/VOC2012"
    voc_folder(year, ("q1", "q2"), split="train")
    voc_folder(year, ("q3",), split="val")
    found = detection_dataset("voc2012", tmp_path)
    assert (len(found.train), len(found.test)) == (2, 1)
    with pytest.raises(DataError, match="Unpack trainval of VOC2012"):
        detection_dataset("voc2012", tmp_path / "elsewhere")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (voc_text([("car", 0, 1, 1, 9, 9)])[:-20], "p1.xml is no whole XML .line 1"),
        (voc_text([("zebra", 0, 1, 1, 9, 9)]), "unknown class 'zebra': .*p1.xml, object 1. Known: aeroplane"),
        (voc_text([("car", 0, "", 1, 9, 9)]), "xmin is '' and no number: .*p1.xml, object 1"),
        ("<annotation><size><width>4</width></size></annotation>", "height is None and no number: .*p1.xml"),
    ],
)
def test_what_is_wrong_with_a_voc_file_is_said(tmp_path, text, said):
    with pytest.raises(DataError, match=said):
        ann.read_voc(voc_folder(tmp_path, text=text), "trainval")


def test_bytes_that_are_no_text_are_refused(tmp_path):
    folder = voc_folder(tmp_path)
    (folder / "Annotations/p1.xml").write_bytes(b"<a>\xff\xfe</a>")
    with pytest.raises(DataError, match=r"p1.xml is no text \(byte 3\): .*Annotations. Fetch"):
        ann.read_voc(folder, "trainval")


def test_missing_files_of_voc_are_named(tmp_path):
    folder = voc_folder(tmp_path, ("p1", "p2"))
    (folder / "JPEGImages/p2.jpg").unlink()
    with pytest.raises(DataError, match="1 of 2 images missing, first p2.jpg"):
        ann.read_voc(folder, "trainval")
    (folder / "Annotations/p1.xml").unlink()
    with pytest.raises(DataError, match="no file p1.xml: .*Annotations. A VOC folder"):
        ann.read_voc(folder, "trainval")
    with pytest.raises(DataError, match="no file test.txt"):
        ann.read_voc(folder, "test")


# ---- VisDrone


VISDRONE = "2,3,10,20,1,4,0,0\n20,3,10,20,0,0,0,0,\n5,1,4,4,0,11,0,1\n1,1,3,3,0,2,0,0\n"


def visdrone_folder(folder, text=VISDRONE):
    write_image(folder / "images/a.jpg")
    write(folder / "annotations/a.txt", text)
    return folder


def test_visdrone_is_read_and_what_is_not_counted_is_a_crowd(tmp_path):
    [p] = ann.read_visdrone(visdrone_folder(tmp_path), "train").images
    assert p.boxes[0].tolist() == [2, 3, 12, 23] and (p.height, p.width) == (30, 40)
    assert p.labels.tolist() == [4, 0, 0, 2] and p.crowd.tolist() == [False, True, True, True]


def test_a_region_without_a_class_is_a_crowd_of_each(tmp_path):
    for half in ("train", "val"):
        visdrone_folder(tmp_path / f"visdrone2019/VisDrone2019-DET-{half}")
    found = detection_dataset("visdrone2019", tmp_path, augment="none")
    assert draw(found.train, 0)[1][0]["labels"].tolist() == [4]
    target = draw(found.test, 0)[1][0]
    assert sorted(target["labels"].tolist()) == sorted([4, *range(1, 11), *range(1, 11), 2])
    assert target["iscrowd"].sum() == 21 and target["iscrowd"][0] == 0
    assert (target["boxes"][target["labels"] == 9] == torch.tensor([[20.0, 3, 30, 23], [5, 1, 9, 5]])).all()


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("1,2,3,4,1,4,0\n", "7 numbers, not 8: .*a.txt, line 1"),
        ("\n1,2,3,4,1,4,0,0\n1,2,x,4,1,4,0,0\n", "width is 'x' and no number: .*a.txt, line 3"),
        ("1,2,3,4,1,12,0,0\n", "unknown category 12: .*a.txt, line 1. Known: 0 to 11"),
        ("1,2,3,4,1,2.5,0,0\n", "unknown category 2.5"),
    ],
)
def test_what_is_wrong_with_a_visdrone_file_is_said(tmp_path, text, said):
    with pytest.raises(DataError, match=said):
        ann.read_visdrone(visdrone_folder(tmp_path, text), "train")


def test_missing_files_of_visdrone_are_named(tmp_path):
    folder = visdrone_folder(tmp_path)
    (folder / "annotations/a.txt").unlink()
    with pytest.raises(DataError, match="no file a.txt: .*annotations. VisDrone has"):
        ann.read_visdrone(folder, "train")
    with pytest.raises(DataError, match="no folder `images`"):
        ann.read_visdrone(folder / "nowhere", "train")
    (folder / "images/a.jpg").unlink()
    with pytest.raises(DataError, match="no images in the split 'train'"):
        ann.read_visdrone(folder, "train")


# ---- ExDark


EXDARK_LIST = "Name | Class | Light | In/Out | Train/Val/Test\na.jpg 5 2 1 1\nb.png 6 1 2 2\nc.jpg 5 1 2 3\n"


def exdark_folder(folder, text="% bbGt version=3\nCar 2 3 10 20 0 0 0 0 0 0 0\nDog 1 1 5 5 0 0 0 0 0 0 0\n"):
    for kind, name, disk in (("Car", "a.jpg", "a.JPG"), ("Cat", "b.png", "b.png"), ("Car", "c.jpg", "c.jpg")):
        write_image(folder / "ExDark" / kind / disk)
        write(folder / "ExDark_Annno" / kind / f"{name}.txt", text)
    write(folder / "imageclasslist.txt", EXDARK_LIST)
    return folder


def test_exdark_is_read_by_its_own_split(tmp_path):
    exdark_folder(tmp_path / "exdark")
    found = detection_dataset("exdark", tmp_path)
    assert [p.file.name for p in found.train.images] == ["a.JPG", "b.png"]
    assert [p.file.name for p in found.test.images] == ["c.jpg"]
    assert found.test.images[0].boxes.tolist() == [[2, 3, 12, 23], [1, 1, 6, 6]]
    assert [found.classes[i - 1] for i in found.test.images[0].labels] == ["Car", "Dog"]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("Car 2 3 10 20 0 0 0 0 0 0 0\n", "the first line is not `% bbGt version=3`: .*a.jpg.txt, line 1"),
        ("% bbGt version=3\nCar 2 3 10\n", "3 numbers, not 4 or more: .*a.jpg.txt, line 2"),
        ("% bbGt version=3\nOwl 2 3 10 20 0\n", "unknown class 'Owl': .*a.jpg.txt, line 2. Known: Bicycle"),
        ("% bbGt version=3\nCar 2 3 ten 20 0\n", "width is 'ten' and no number"),
    ],
)
def test_what_is_wrong_with_an_exdark_file_is_said(tmp_path, text, said):
    with pytest.raises(DataError, match=said):
        ann.read_exdark(exdark_folder(tmp_path, text))


def test_missing_files_and_odd_lines_of_the_list_of_exdark_are_named(tmp_path):
    folder = exdark_folder(tmp_path)
    write(folder / "imageclasslist.txt", "head\na.jpg 5 2 1\n")
    with pytest.raises(DataError, match="4 columns, not 5: .*imageclasslist.txt, line 2"):
        ann.read_exdark(folder)
    write(folder / "imageclasslist.txt", "head\na.jpg 15 2 1 1\n")
    with pytest.raises(DataError, match="unknown class 15: .*line 2"):
        ann.read_exdark(folder)
    write(folder / "imageclasslist.txt", EXDARK_LIST)
    (folder / "ExDark/Cat/b.png").unlink()
    with pytest.raises(DataError, match="no file b.png: .*ExDark/Cat. ExDark has"):
        ann.read_exdark(folder)
    (folder / "ExDark_Annno/Car/a.jpg.txt").unlink()
    with pytest.raises(DataError, match="no file a.jpg.txt: .*ExDark_Annno/Car"):
        ann.read_exdark(folder)


# ---- FLIR ADAS 2


def test_flir_is_coco_with_fifteen_of_its_classes(tmp_path):
    names = {1: "person", 2: "bike", 18: "deer", 79: "other vehicle"}
    content = {
        "categories": [{"id": i, "name": n} for i, n in names.items()],
        "images": [{"id": 0, "file_name": "data/a.jpg", "height": 30, "width": 40}],
        "annotations": [
            {"id": c, "image_id": 0, "category_id": c, "bbox": [2, 3, 10, 20]} for c in (79, 18, 2)
        ],
    }
    for half in ("train", "val"):
        folder = tmp_path / f"flir-adas2/images_thermal_{half}"
        write(folder / "coco.json", json.dumps(content))
        (folder / "data").mkdir()
        Image.new("L", (40, 30), 77).save(folder / "data/a.jpg")
    found = detection_dataset("flir-adas2", tmp_path)
    [image], [target] = draw(found.test, 0)
    assert target["labels"].tolist() == [15, 2] and len(found.classes) == 15
    assert image.shape == (3, 30, 40) and (image[0] == image[2]).all()
    assert "1 annotations of classes that are not used left out" in found.notes[0]
    (tmp_path / "flir-adas2/images_thermal_val/coco.json").unlink()
    with pytest.raises(DataError, match="no file coco.json: .*images_thermal_val. FLIR ADAS 2 has"):
        detection_dataset("flir-adas2", tmp_path)


# ---- scenes




OPTIONS = st.builds(
    SceneOptions,
    side=st.integers(48, 128), objects=st.integers(1, 25), size=st.floats(0.15, 0.8),
    spread=st.floats(1, 1.5), overlap=st.floats(0, 0.9), brightness=st.floats(0.02, 1),
    noise=st.floats(0, 0.5), tail=st.floats(0, 3), seed=st.integers(0, 99),
)  # fmt: skip


@settings(max_examples=60, deadline=None)
@given(options=OPTIONS, index=st.integers(0, 1000), split=st.sampled_from(scenes.SPLITS))
def test_scenes_are_exact(options, index, split):
    s = scene(options, split, index)
    n = len(s.labels)
    assert n >= 1 and s.image.shape == (3, options.side, options.side) and s.image.dtype == np.uint8
    assert s.masks.shape == (n, options.side, options.side) and s.boxes.shape == (n, 4)
    assert s.masks.sum(0).max() <= 1, "a pixel shows one object"
    assert s.masks.any((1, 2)).all() and 1 <= s.labels.min() and s.labels.max() <= 10
    assert s.hidden.min() >= 0 and s.hidden.max() <= options.overlap + 1e-6
    for mask, box in zip(s.masks, s.boxes, strict=True):
        ys, xs = np.nonzero(mask)
        assert box.tolist() == [xs.min(), ys.min(), xs.max() + 1, ys.max() + 1]


def test_a_mask_is_where_the_image_changes():
    "With the same random numbers but no garments, the image differs exactly in the masks."
    options = SceneOptions(objects=6, overlap=0.5, noise=0)
    for index in range(10):
        s = scene(options, "train", index)
        canvas, owner, labels, whole = scenes.arrange(options, "train", generator(options, "train", index))
        blank = scenes.background(generator(options, "train", index), options.side)
        assert ((canvas != blank).any(0) <= (owner >= 0)).all(), "nothing is drawn outside the masks"
        assert (s.masks.any(0) == (owner >= 0)).all() and (s.masks.sum((1, 2)) <= whole).all()
        changed = (canvas != blank).any(0)[owner >= 0].mean()
        assert changed > 0.99 and labels.tolist() == s.labels.tolist()


def generator(options, split, index):
    return np.random.default_rng([options.seed, scenes.SPLITS.index(split), index])


def test_occlusion_is_what_lies_on_top():
    options = SceneOptions(objects=12, size=0.4, overlap=0.8, noise=0)
    hidden = 0
    for index in range(10):
        rng = generator(options, "test", index)
        _, owner, _, whole = scenes.arrange(options, "test", rng)
        s = scene(options, "test", index)
        assert np.allclose(s.hidden, 1 - np.bincount(owner[owner >= 0]) / whole)
        assert s.hidden[-1] == 0, "nobody lies on the last one"
        hidden += (s.hidden > 0.1).sum()
    assert hidden > 10


def test_scenes_are_the_same_on_each_call_and_differ_by_number_split_and_seed():
    options = SceneOptions()
    a, b = scene(options, "train", 7), scene(options, "train", 7)
    for part in ("image", "labels", "boxes", "masks", "hidden"):
        assert (getattr(a, part) == getattr(b, part)).all()
    others = (scene(options, "train", 8), scene(options, "test", 7), scene(SceneOptions(seed=1), "train", 7))
    assert all((a.image != other.image).any() for other in others)


def test_scenes_that_differ_in_light_have_the_same_items_at_the_same_positions():
    base = SceneOptions(noise=0)
    for change in ({"brightness": 0.2}, {"noise": 0.3}, {"brightness": 0.05, "noise": 0.1}):
        a, b = scene(base, "train", 3), scene(replace(base, **change), "train", 3)
        assert (a.masks == b.masks).all() and (a.labels == b.labels).all() and (a.image != b.image).any()


def mean_over(options, n=60):
    found = [scene(options, "train", i) for i in range(n)]
    sizes = np.concatenate([(s.boxes[:, 2:] - s.boxes[:, :2]).max(1) for s in found])
    return {
        "objects": len(sizes) / n,
        "size": sizes.mean() / options.side,
        "light": np.mean([s.image.mean() for s in found]),
        "hidden": np.concatenate([s.hidden for s in found]).mean(),
        "labels": np.bincount(np.concatenate([s.labels for s in found]), minlength=11)[1:],
    }


def test_each_option_changes_what_it_says():
    usual = mean_over(SceneOptions())
    assert abs(usual["objects"] - 5) < 0.5 and abs(usual["size"] - 0.3) < 0.03
    assert abs(mean_over(SceneOptions(objects=14, size=0.1))["objects"] - 14) < 1
    assert abs(mean_over(SceneOptions(size=0.12))["size"] - 0.12) < 0.02
    assert mean_over(SceneOptions(brightness=0.2))["light"] < 0.3 * usual["light"]
    assert mean_over(SceneOptions(overlap=0))["hidden"] == 0
    assert mean_over(SceneOptions(overlap=0.9, objects=12))["hidden"] > 0.1
    flat, long = usual["labels"], mean_over(SceneOptions(tail=2), 100)["labels"]
    assert flat.min() > 0.4 * flat.mean() and long[0] > 0.5 * long.sum()


def test_training_and_test_items_are_disjoint():
    train, test = fashion.split_indices("train"), fashion.split_indices("test")
    assert not set(train.tolist()) & set(test.tolist())
    images = fashion.load_sample()[0]
    for split, indices in (("train", train), ("test", test)):
        own = {images[i].numpy().tobytes() for i in indices}
        drawn = [g.tobytes() for group in scenes.clothing_items(split) for g in group]
        assert len(drawn) == len(indices) and set(drawn) <= own


def test_every_garment_shows_at_every_size():
    for split in scenes.SPLITS:
        for group in scenes.clothing_items(split):
            for garment in group[::40]:
                for length in (4, 7, 28, 60):
                    greys, mask = scenes.crop_item(garment, length)
                    assert mask.any() and max(greys.shape) == length


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"brightness": 0}, "brightness=0 must be a number from 0.02 to 1"),
        ({"objects": 2.5}, "objects=2.5 must be a whole number from 1 to 60"),
        ({"noise": "much"}, "noise='much' must be a number from 0 to 0.5"),
        ({"overlap": float("nan")}, "overlap=nan must be"),
        ({"side": True}, "side=True must be"),
        ({"size": 0.05, "side": 64}, "less than 4 pixels: enlarge size or side"),
        ({"seed": -1}, "seed=-1 must be"),
    ],
)
def test_an_option_outside_its_range_is_refused(options, said):
    with pytest.raises(ValueError, match=said):
        SceneOptions(**options)


def test_a_split_of_another_name_is_refused():
    with pytest.raises(ValueError, match="'train' or 'test'"):
        scene(SceneOptions(), "val", 0)


def test_scenes_are_quick():
    "Five hundred scenes per second on one core; a quarter is required, as tests share their machine."
    options = SceneOptions()
    scene(options, "train", 0)
    start = time.process_time()
    for index in range(100):
        scene(options, "train", index)
    assert 100 / (time.process_time() - start) > 125


# ---- datasets


def test_scenes_come_as_torchvision_wants_them():
    found = detection_dataset("scenes", train_images=20, test_images=10, masks=True, augment="none")
    images, targets = draw(found.train, 4, 9)
    assert found.classes == fashion.CLASSES and (len(found.train), len(found.test)) == (20, 10)
    for image, target, index in zip(images, targets, (4, 9), strict=True):
        s = scene(SceneOptions(), "train", index)
        assert image.dtype == torch.float32 and torch.equal(image, torch.from_numpy(s.image) / 255)
        kinds = {name: value.dtype for name, value in target.items()}
        assert kinds == {
            "boxes": torch.float32, "labels": torch.int64, "image_id": torch.int64, "area": torch.float32,
            "iscrowd": torch.int64, "masks": torch.uint8,
        }  # fmt: skip
        assert type(target["boxes"]) is torch.Tensor and target["image_id"] == index
        assert (target["masks"].numpy() == s.masks).all()
        assert target["area"].tolist() == s.masks.sum((1, 2)).tolist()


def test_a_detector_of_torchvision_takes_the_batches():
    from torchvision.models import detection as detectors

    found = detection_dataset("scenes", train_images=4, masks=True)
    torch.manual_seed(0)
    backbone = {"weights": None, "weights_backbone": None}
    network = detectors.maskrcnn_resnet50_fpn(**backbone, num_classes=11, min_size=64, max_size=64)
    losses = network(*draw(found.train, 0, 1))
    assert "loss_mask" in losses and all(torch.isfinite(loss) for loss in losses.values())


def test_what_a_crop_leaves_fits_together():
    found = detection_dataset("scenes", train_images=60, masks=True, augment="flip-crop")
    cropped = 0
    for seed in range(2):
        images, targets = draw(found.train, *range(60), seed=seed)
        for image, target in zip(images, targets, strict=True):
            cropped += image.shape != (3, 96, 96)
            n, (h, w) = len(target["labels"]), image.shape[1:]
            assert n and target["boxes"].shape == (n, 4) and target["masks"].shape == (n, h, w)
            boxes = target["boxes"]
            assert boxes.min() >= 0 and boxes[:, 2].max() <= w and boxes[:, 3].max() <= h
            assert (boxes[:, 2:] - boxes[:, :2]).min() >= 1
            assert target["area"].tolist() == target["masks"].sum((1, 2)).tolist()
            for mask, box in zip(target["masks"], boxes.round().long(), strict=True):
                ys, xs = mask.nonzero(as_tuple=True)
                assert xs.min() >= box[0] - 1 and xs.max() <= box[2] and ys.max() <= box[3]
    assert cropped > 40


def test_a_mirrored_image_has_mirrored_objects():
    found = detection_dataset("scenes", train_images=8, masks=True, augment="none")
    change = v2.RandomHorizontalFlip(p=1)
    for index in range(8):
        image, target = found.train.pair(index)
        mirrored, moved = detection.augmented(image, target, change)
        assert torch.equal(mirrored, image.flip(-1)) and torch.equal(moved["masks"], target["masks"].flip(-1))
        expected = torch.from_numpy(scenes.boxes_of(moved["masks"].numpy() > 0))
        assert torch.equal(moved["boxes"], expected) and torch.equal(moved["area"], target["area"])


def test_images_without_objects_survive_every_augmentation(tmp_path):
    coco_folder(tmp_path / "mine")
    for augment in detection.AUGMENTS:
        found = detection_dataset("coco:mine", tmp_path, masks=True, augment=augment)
        for seed in range(5):
            _, [target] = draw(found.train, 1, seed=seed)
            assert target["boxes"].shape == (0, 4) and target["masks"].shape[0] == 0


@pytest.mark.parametrize("name", ["bccd", "scenes"])
def test_worker_processes_change_no_batch(name):
    found = detection_dataset(name, train_images=12, augment="flip-crop")

    def batches(workers):
        module = loading.ImageModule(found, 4, seed=2, workers=workers)
        loader = module.train_dataloader()
        loader.sampler.set_epoch(1)
        return [(x, y) for images, targets in loader for x, y in zip(images, targets, strict=True)]

    alone, helped = batches(0), batches(2)
    assert len(alone) == len(helped) == 12
    for (x, y), (a, b) in zip(alone, helped, strict=True):
        assert torch.equal(x, a) and all(torch.equal(y[key], b[key]) for key in y)
    assert any(not torch.equal(x, a) for (x, _), (a, _) in zip(alone, draws_of(found, seed=3), strict=True))


def draws_of(found, seed):
    loader = loading.ImageModule(found, 4, seed=seed, workers=0).train_dataloader()
    return [(x, y) for images, targets in loader for x, y in zip(images, targets, strict=True)]


def test_drawing_leaves_the_runs_own_generator_alone():
    found = detection_dataset("scenes", train_images=8, augment="flip-crop")
    torch.manual_seed(5)
    state = torch.random.get_rng_state()
    draw(found.train, 0, 1, 2)
    assert torch.equal(torch.random.get_rng_state(), state)


def test_fewer_images_come_from_all_over_and_keep_the_fingerprint():
    cells, some = detection_dataset("bccd"), detection_dataset("bccd", train_images=10, test_images=3)
    every = [p.image_id for p in cells.train.images]
    assert [p.image_id for p in some.train.images] == [every[i * 292 // 10] for i in range(10)]
    assert some.fingerprint == cells.fingerprint and len(some.test) == 3


def test_the_fingerprint_is_of_images_and_objects(tmp_path):
    coco_folder(tmp_path / "mine")
    before = detection_dataset("coco:mine", tmp_path).fingerprint
    assert detection_dataset("coco:mine", tmp_path).fingerprint == before
    content = coco_content()
    content["annotations"][0]["bbox"][0] = 3
    coco_folder(tmp_path / "mine", content)
    moved = detection_dataset("coco:mine", tmp_path).fingerprint
    write_image(tmp_path / "mine/train2017/a.jpg", shade=3)
    shutil.copy(ROOT / "data/coco-mini/val2017" / "000000005001.jpg", tmp_path / "mine/train2017/b.jpg")
    assert len({before, moved, detection_dataset("coco:mine", tmp_path).fingerprint}) == 3


def test_the_fingerprint_of_scenes_is_of_their_options():
    one, other = (detection_dataset("scenes", scenes={"brightness": b}).fingerprint for b in (0.5, 0.4))
    given = detection_dataset("scenes", scenes=SceneOptions(brightness=0.5))
    assert one != other and one == given.fingerprint


def test_mean_and_deviation_of_scenes_are_those_of_the_facts():
    some = np.stack([scene(SceneOptions(), "train", i).image for i in range(500)]) / 255
    known = detection.facts("scenes")
    assert np.allclose(some.mean((0, 2, 3)), known.mean, atol=0.006)
    assert np.allclose(some.std((0, 2, 3)), known.std, atol=0.006)


def test_facts_agree_with_the_sets_that_are_here():
    for name in ("scenes", "bccd", "coco-mini"):
        known, found = detection.facts(name), detection_dataset(name, train_images=4, test_images=2)
        assert known.embedded and known.classes == len(found.classes)
        assert detection.facts(name).masks == (name != "bccd")
        [image], _ = draw(found.test, 0)
        assert known.shape[1:] in ((None, None), tuple(image.shape[1:]))
    assert len(ann.VOC_CLASSES) == detection.facts("voc0712").classes == 20
    assert len(ann.VISDRONE_CLASSES) == detection.facts("visdrone2019").classes == 10
    assert len(ann.EXDARK_CLASSES) == detection.facts("exdark").classes == 12
    assert len(ann.FLIR_CLASSES) == detection.facts("flir-adas2").classes == 15
    assert detection.facts("coco:mine").classes is None


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("bcd",), "unknown dataset 'bcd'. Did you mean 'bccd'"),
        (("coco:../secrets",), "unknown dataset"),
        (("scenes", {"augment": "mixup"}), "unknown augmentation 'mixup'"),
        (("bccd", {"masks": True}), "bccd has boxes and no masks: use scenes, coco-mini"),
        (("bccd", {"scenes": {"size": 0.2}}), "scene options are given, but the dataset is 'bccd'"),
        (("scenes", {"scenes": {"dark": 1}}), "unknown scene option 'dark'"),
        (("scenes", {"scenes": {"size": 2}}), "size=2 must be"),
    ],
)
def test_wrong_wishes_are_refused(arguments, said):
    name, options = (*arguments, {})[:2]
    with pytest.raises(ValueError, match=said):
        detection_dataset(name, **options)


def test_sets_that_are_not_embedded_need_a_data_root(tmp_path, monkeypatch):
    monkeypatch.delenv("SCSA_BOOK_DATA", raising=False)
    with pytest.raises(DataError, match="no data root for exdark: neither data_root nor SCSA_BOOK_DATA"):
        detection_dataset("exdark")
    with pytest.raises(DataError, match="no folder `coco2017`: .*cocodataset.org"):
        detection_dataset("coco2017", tmp_path)


def test_masks_that_are_not_in_the_file_are_missed(tmp_path):
    content = coco_content()
    del content["annotations"][0]["segmentation"]
    coco_folder(tmp_path / "mine", content)
    with pytest.raises(DataError, match="a.jpg has objects without masks"):
        draw(detection_dataset("coco:mine", tmp_path, masks=True).train, 0)
