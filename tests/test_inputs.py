"""Whatever file or option comes in: it is read right, or refused with what is wrong and where."""

import argparse
import io
import json
import struct
from collections import OrderedDict
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from pycocotools import mask as coco_masks

from scsa_book.data import annotations as ann
from scsa_book.data.images import read_image, shown_size
from scsa_book.networks.weights_file import WeightsError, read_weights
from scsa_book.paths import DataError
from scsa_book.training.config import RunConfig
from scsa_book.training.tasks import TASKS, typed_options

# No database: a failure then prints the seed that brings it back, and a blob for @reproduce_failure.
COMMON = dict(deadline=None, database=None, print_blob=True, suppress_health_check=list(HealthCheck))
QUICK = settings(max_examples=500, **COMMON)
THOROUGH = settings(max_examples=20_000, **COMMON)


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("inputs")
    for name in ("a.png", "b.png", "c.png"):
        Image.new("RGB", (12, 9)).save(folder / name)
    return folder


# ---- COCO files

HEIGHT, WIDTH = 4, 5


def runs_of(mask):
    "Run lengths of a mask, down the columns, the first of zeros."
    flat = mask.T.ravel().tolist()
    counts, value = [0], 0
    for pixel in flat:
        if pixel != value:
            counts.append(0)
            value = pixel
        counts[-1] += 1
    return counts


@st.composite
def outlines(draw, mask):
    "A mask as a COCO file may say it."
    counts = runs_of(mask)
    packed = coco_masks.encode(np.asfortranarray(mask))["counts"].decode()
    return {"size": [HEIGHT, WIDTH], "counts": draw(st.sampled_from([counts, packed]))}


@st.composite
def coco_files(draw):
    "A valid COCO file, and the masks of its annotations by id."
    number = st.integers(-(2**63), 2**63 - 1)
    text = st.text(st.characters(codec="utf-8", exclude_characters="\0"), min_size=1, max_size=5)

    def ids(n):
        kind = draw(st.sampled_from([number, text]))
        return draw(st.lists(kind, min_size=n, max_size=n, unique=True))

    names = draw(st.lists(text, min_size=1, max_size=3, unique=True))
    categories = [{"id": i, "name": n} for i, n in zip(ids(len(names)), names, strict=True)]
    files = draw(st.lists(st.sampled_from(["a.png", "b.png", "c.png"]), min_size=1, unique=True))
    size = {"height": HEIGHT, "width": WIDTH}
    images = [{"id": i, "file_name": f, **size} for i, f in zip(ids(len(files)), files, strict=True)]
    annotations, masks = [], {}
    for number_ in range(draw(st.integers(0, 3))):
        bits = draw(st.binary(min_size=HEIGHT * WIDTH, max_size=HEIGHT * WIDTH))
        mask = (np.frombuffer(bits, np.uint8) % 2).reshape(HEIGHT, WIDTH)
        x, y = draw(st.integers(0, WIDTH - 2)), draw(st.integers(0, HEIGHT - 2))
        w, h = draw(st.integers(1, WIDTH - x)), draw(st.integers(1, HEIGHT - y))
        annotations.append({
            "id": number_, "image_id": draw(st.sampled_from(images))["id"], "bbox": [x, y, w, h],
            "category_id": draw(st.sampled_from(categories))["id"], "iscrowd": draw(st.sampled_from([0, 1])),
            "segmentation": draw(outlines(mask)),
        })  # fmt: skip
        masks[number_] = mask
    return {"categories": categories, "images": images, "annotations": annotations}, masks


def read(folder, content):
    (folder / "file.json").write_text(json.dumps(content))
    return ann.read_coco(folder / "file.json", folder, "train")


def is_read_as_written(folder, file):
    content, masks = file
    half = read(folder, content)
    order = sorted(content["categories"], key=lambda c: c["id"])
    assert half.classes == tuple(c["name"] for c in order)
    label = {c["id"]: i for i, c in enumerate(order, 1)}
    for image, found in zip(content["images"], half.images, strict=True):
        own = [a for a in content["annotations"] if a["image_id"] == image["id"]]
        boxes = [[x, y, x + w, y + h] for x, y, w, h in (a["bbox"] for a in own)]
        assert found.file.name == image["file_name"] and found.boxes.tolist() == boxes
        assert found.labels.tolist() == [label[a["category_id"]] for a in own]
        assert found.crowd.tolist() == [a["iscrowd"] == 1 for a in own]
        for a, mask in zip(own, ann.masks_of(found), strict=True):
            assert np.array_equal(mask, masks[a["id"]])


NUMBERS = st.lists(st.integers(-3, 30), max_size=7)
COUNTS = st.lists(st.integers(-2, 120), max_size=4) | st.text(max_size=6)
ODD = st.one_of(
    st.none(), st.booleans(), st.integers(-(2**70), 2**70), st.floats(), st.text(max_size=4),
    NUMBERS, st.lists(NUMBERS, max_size=2), st.dictionaries(st.text(max_size=3), NUMBERS, max_size=2),
    st.fixed_dictionaries({"size": st.just([HEIGHT, WIDTH]), "counts": COUNTS}),
)  # fmt: skip


@st.composite
def with_one_odd_field(draw):
    "A valid file in which one field of one entry has another value, is another's, or is away."
    content, _ = draw(coco_files())
    kind = draw(st.sampled_from([k for k in content if content[k]]))
    entry = draw(st.sampled_from(content[kind]))
    name = draw(st.sampled_from(sorted(entry)))
    how = draw(st.sampled_from(["odd", "odd", "away", "copied", "whole"]))
    if how == "away":
        del entry[name]
    elif how == "copied":
        entry[name] = draw(st.sampled_from(content[kind]))[name]
    elif how == "whole":
        content[draw(st.sampled_from([kind, "annotations"]))] = draw(ODD)
    else:
        entry[name] = draw(ODD)
    return content


def is_read_or_refused_with_its_source(folder, content):
    try:
        half = read(folder, content)
        masks = [ann.masks_of(p) for p in half.images]
    except DataError as error:
        assert "file.json" in str(error) or str(folder) in error.where
        return
    ids = [image["id"] for image in content["images"]]
    assert len(set(map(repr, ids))) == len(ids) == len({p.file for p in half.images})
    for p, own in zip(half.images, masks, strict=True):
        assert own.shape == (len(p.labels), p.height, p.width) and set(np.unique(own)) <= {0, 1}
        assert np.isfinite(p.boxes).all() and (p.boxes[:, 2:] > p.boxes[:, :2]).all()
        assert ((p.labels >= 1) & (p.labels <= len(half.classes))).all() and np.isfinite(p.area).all()
    for a in content["annotations"]:
        if isinstance(outline := a.get("segmentation"), dict) and outline:
            counts = outline["counts"]
            runs = ann.run_lengths(counts) if isinstance(counts, str) else counts
            assert sum(runs) == HEIGHT * WIDTH


test_a_valid_coco_file_is_read_as_it_was_written = QUICK(given(file=coco_files())(is_read_as_written))
test_valid_coco_files_all = pytest.mark.slow(THOROUGH(given(file=coco_files())(is_read_as_written)))
test_one_odd_field_of_a_coco_file = QUICK(
    given(content=with_one_odd_field())(is_read_or_refused_with_its_source)
)
test_one_odd_field_of_a_coco_file_all = pytest.mark.slow(
    THOROUGH(given(content=with_one_odd_field())(is_read_or_refused_with_its_source))
)


@QUICK
@given(st.lists(st.integers(0, 5000), min_size=1, max_size=40))
def test_run_lengths_are_unpacked_as_pycocotools_packs_them(counts):
    size = [sum(counts), 1]
    packed = coco_masks.frPyObjects({"counts": counts, "size": size}, *size)["counts"].decode()
    assert ann.run_lengths(packed) == counts


def coco(**changes):
    "A small valid file with fields of its first entries changed: images__id=3."
    square = [[1, 1, 5, 1, 5, 5, 1, 5]]
    files = {7: "a.png", 8: "b.png"}
    content = {
        "categories": [{"id": 1, "name": "cup"}, {"id": 2, "name": "fork"}],
        "images": [{"id": i, "file_name": f, "height": 9, "width": 12} for i, f in files.items()],
        "annotations": [
            {"id": n, "image_id": 7, "category_id": 1, "bbox": [1, 1, 4, 4], "segmentation": square}
            for n in (1, 2)
        ],
    }  # fmt: skip
    for key, value in changes.items():
        kind, name = key.split("__")
        content[kind][0][name] = value
    return content


def rle(counts):
    return {"size": [9, 12], "counts": counts}


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"images__id": 8}, "image id 8 twice: a.png and b.png"),
        ({"images__file_name": "./b.png"}, "file_name 'b.png' twice: image 7 and image 8"),
        ({"images__id": "8"}, "ids of images are numbers and texts: 8 and '8'"),
        ({"images__id": None}, "id is None, neither a whole number of 64 bits nor a text"),
        ({"images__id": 2**63}, "id is 9223372036854775808, neither"),
        ({"images__id": True}, "id is True, neither"),
        ({"images__height": 0}, "height is 0.* and no number of pixels: .*image 7"),
        ({"images__height": 2**40}, "height is 1099511627776.* and no number of pixels"),
        ({"images__height": 2**20, "images__width": 2**20}, "pixels are more than can be decoded: .*image 7"),
        ({"images__width": 12.5}, "width is 12.5 and no number of pixels"),
        ({"images__file_name": 5}, "file_name is 5 and no name"),
        ({"categories__id": 2}, "category id 2 twice: 'cup' and 'fork'"),
        ({"categories__name": "fork"}, "category name 'fork' twice: id 1 and id 2"),
        ({"categories__id": "2"}, "ids of categories are numbers and texts"),
        ({"annotations__id": 2}, "annotation id 2 twice: annotation number 0 and annotation number 1"),
        ({"annotations__category_id": True}, "category_id is True, neither .*annotation 1"),
        ({"annotations__category_id": [1]}, r"category_id is \[1\], neither"),
        ({"annotations__image_id": "7"}, "image_id '7' is not among the images"),
        ({"annotations__bbox": [1, 1, float("nan"), 4]}, "bbox is nan and no number"),
        ({"annotations__bbox": [1, 1, "4", 4]}, "bbox is '4' and no number"),
        ({"annotations__bbox": None}, "bbox is NoneType and no list"),
        ({"annotations__area": "big"}, "area is 'big' and no number"),
        ({"annotations__iscrowd": "0"}, "iscrowd is '0', not 0 or 1"),
        ({"annotations__segmentation": rle([9, 9])}, "run lengths add up to 18, not to 9 x 12 = 108"),
        ({"annotations__segmentation": rle([108, 1])}, "run lengths add up to 109"),
        ({"annotations__segmentation": rle([-1, 109])}, "no whole numbers from 0 up"),
        ({"annotations__segmentation": rle("é")}, "cannot be unpacked .*'é' is no letter"),
        ({"annotations__segmentation": rle("P")}, "its last number is cut off"),
        ({"annotations__segmentation": [1, 1, 5, 1, 5, 5]}, "holds 1 where a polygon should be"),
        ({"annotations__segmentation": [[1, 1, 5, 5]]}, "less than three points: .*annotation 1"),
        ({"annotations__segmentation": [[1, 1, 5, None, 5, 5]]}, "a coordinate of the polygon is None"),
        ({"annotations__segmentation": [[1, 1, 5, 1, 5e9, 5]]}, "far outside the image"),
        ({"annotations__segmentation": "polygon"}, "segmentation is 'polygon'"),
    ],
)
def test_what_is_wrong_with_a_coco_file_is_named(folder, changes, said):
    with pytest.raises(DataError, match=said):
        read(folder, coco(**changes))


def test_outlines_are_looked_at_only_for_masks(folder):
    content = coco(annotations__segmentation=None)
    (folder / "file.json").write_text(json.dumps(content))
    boxes = ann.read_coco(folder / "file.json", folder, "train", masks=False)
    assert len(boxes.images[0].boxes) == 2
    with pytest.raises(DataError, match="a.png has objects without masks"):
        ann.has_masks(read(folder, content).images[0])


# ---- image files

TURN = {
    2: Image.Transpose.FLIP_LEFT_RIGHT, 3: Image.Transpose.ROTATE_180, 4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE, 6: Image.Transpose.ROTATE_270, 7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}  # fmt: skip


def as_numpy(image, numbers):
    "What a person sees of an image whose stored numbers are known, uint8 (H, W, 3); None: nobody knows."
    if image.mode == "I;16":
        return np.repeat((numbers >> 8).astype(np.uint8)[..., None], 3, 2)
    if image.mode in ("I", "F"):
        return None
    return np.asarray(image.convert("RGBA" if image.mode in ("P", "LA") else "RGB").convert("RGB"))


@st.composite
def image_files(draw):
    "Bytes of an image file, its ending, what it shows (None: it must be refused), and whether it is damaged."
    h, w = draw(st.integers(1, 9)), draw(st.integers(1, 9))
    mode = draw(st.sampled_from(["1", "L", "P", "RGB", "RGBA", "LA", "CMYK", "I;16", "I", "F"]))
    ending = {"CMYK": ["tif"], "I": ["tif"], "F": ["tif"]}.get(mode, ["png", "tif"])
    ending = draw(st.sampled_from([*ending, "webp"] if mode in ("RGB", "RGBA") else ending))
    bits = draw(st.binary(min_size=h * w * 4, max_size=h * w * 4))
    numbers = None
    if mode in ("I;16", "I", "F"):
        kind = {"I;16": np.uint16, "I": np.int32, "F": np.uint8}[mode]
        numbers = np.frombuffer(bits, kind)[: h * w].reshape(h, w)
        image = Image.fromarray(numbers.astype(np.float32) if mode == "F" else numbers)
    else:
        image = Image.frombytes("RGBA", (w, h), bits).convert("RGB" if mode in ("CMYK", "P") else "RGBA")
        image = image.quantize(8) if mode == "P" else image.convert(mode)
    shown = as_numpy(image, numbers)
    orientation, exif = draw(st.integers(0, 9)), Image.Exif()
    exif[0x0112] = orientation
    options = {"lossless": True, "exact": True} if ending == "webp" else {}
    if mode == "P" and ending == "png" and draw(st.booleans()):
        options["transparency"] = draw(st.sampled_from([0, bytes([0, 128])]))
    if shown is not None and orientation in TURN:
        shown = np.asarray(Image.fromarray(shown).transpose(TURN[orientation]))
    file = io.BytesIO()
    image.save(file, {"tif": "TIFF", "png": "PNG", "webp": "WEBP"}[ending], exif=exif, **options)
    content, harm = file.getvalue(), draw(st.sampled_from(["none", "none", "cut", "byte"]))
    if harm == "cut":
        content = content[: draw(st.integers(0, len(content) - 1))]
    elif harm == "byte":
        at = draw(st.integers(0, len(content) - 1))
        content = content[:at] + bytes([draw(st.integers(0, 255))]) + content[at + 1 :]
    return content, ending, shown, harm != "none"


def is_shown_or_refused_by_name(folder, file):
    content, ending, shown, damaged = file
    path = folder / f"odd.{ending}"
    path.write_bytes(content)
    try:
        image = np.asarray(read_image(path))
    except DataError as error:
        assert path.name in str(error) and (damaged or shown is None), error
        return
    assert image.ndim == 3 and image.shape[2] == 3 and image.dtype == np.uint8
    if not damaged:
        assert np.array_equal(image, shown) and shown_size(path) == shown.shape[:2]


@pytest.mark.filterwarnings("ignore")
def test_an_image_file_is_shown_or_refused(folder):
    QUICK(given(image_files())(lambda file: is_shown_or_refused_by_name(folder, file)))()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_image_files_all(folder):
    THOROUGH(given(image_files())(lambda file: is_shown_or_refused_by_name(folder, file)))()


# ---- options

TEXTS = st.sampled_from(["no", "1e-3", "5e-1", "x", "96"])
OPTIONS = st.sampled_from(["objects", "size", "side", "dark"])
VALUES = st.one_of(
    st.none(), st.booleans(), st.integers(-5, 3000), st.floats(-2, 5), TEXTS,
    st.lists(st.one_of(st.integers(-1, 600), st.floats(-1, 3), TEXTS), max_size=4),
    st.dictionaries(OPTIONS, st.floats(0, 9) | TEXTS, max_size=2),
)  # fmt: skip
NETWORKS = {task: TASKS[task].networks() for task in ("detect", "segment")}


@st.composite
def option_sets(draw):
    "A task, a network, and options by right names with any values."
    task = draw(st.sampled_from(["detect", "segment"]))
    network = draw(st.sampled_from(NETWORKS[task]))
    data = st.sampled_from(sorted(TASKS[task].data_options.model_fields))
    own = st.sampled_from(["heads", "kernels", "shared", "gate"])
    theirs = st.sampled_from(sorted(TASKS[task].network_options(network).model_fields))
    return {
        "task": task, "network": network, "dataset": "scenes", "attention": "scsa",
        "data_options": draw(st.dictionaries(data, VALUES, max_size=2)),
        "network_options": draw(st.dictionaries(theirs, VALUES, max_size=2)),
        "options": draw(st.dictionaries(own, VALUES, max_size=2)),
    }  # fmt: skip


def numbers_in(value):
    parts = value.values() if isinstance(value, dict) else value if isinstance(value, list | tuple) else ()
    return [value] if not parts else [n for part in parts for n in numbers_in(part)]


def is_typed_or_refused(given_):
    try:
        typed = typed_options(RunConfig(**given_))
    except ValueError as error:
        assert str(error)
        return
    again = typed_options(RunConfig(**{**given_, **typed}))
    assert repr(again) == repr(typed)  # what is right stays as it is
    threshold = [v for k, v in typed["network_options"].items() if k.endswith(("_thresh", "_fraction"))]
    assert all(type(v) in (int, float) and 0 <= v <= 1 for v in threshold)
    data = typed["data_options"]
    assert type(data.get("distort", False)) is bool
    if data.get("crop"):
        assert len(data["crop"]) == 2 and all(type(v) is int and v > 0 for v in data["crop"])
    if data.get("scale"):
        low, high = data["scale"]
        assert 0 < low <= high
    assert not any(isinstance(n, str) for n in numbers_in(data.get("scenes") or {}) if n != {})


test_options_are_typed_or_refused = QUICK(given(option_sets())(is_typed_or_refused))
test_options_all = pytest.mark.slow(THOROUGH(given(option_sets())(is_typed_or_refused)))


# ---- checkpoints

STATE = {
    "conv.weight": torch.arange(12.0).reshape(3, 4, 1, 1), "norm.running_var": torch.ones(3),
    "norm.num_batches_tracked": torch.tensor(7), "fc.bias": torch.tensor([0.5]),
}  # fmt: skip
PREFIXES = ("module.", "_orig_mod.", "module._orig_mod.", "_fsdp_wrapped_module.")


@st.composite
def checkpoints(draw):
    "A wrapped state dict as bytes, with its ending, and whether it is damaged."
    state = dict(STATE)
    for _ in range(draw(st.integers(0, 2))):
        prefix = draw(st.sampled_from(PREFIXES))
        state = {prefix + k: v for k, v in state.items()}
    if all(k.startswith("module.") for k in state) and draw(st.booleans()):
        state["n_averaged"] = torch.tensor(3)
    as_arrays = draw(st.booleans())
    form = draw(st.sampled_from(["zip", "zip", "old", "safetensors"]))
    content = {k: v.numpy() for k, v in state.items()} if as_arrays and form != "safetensors" else state
    for key in draw(st.lists(st.sampled_from(["model", "state_dict", "state_dict_ema", "net"]), max_size=2)):
        content = {"epoch": 3, key: content, "args": argparse.Namespace(lr=0.1), "best": np.float64(0.5)}
        if draw(st.booleans()):
            moments = {0: {"exp_avg": torch.zeros(3)}}
            content = OrderedDict(content, optimizer={"state": moments, "param_groups": []})
    if form == "safetensors":
        data = safetensors.torch.save(state)
    else:
        file = io.BytesIO()
        torch.save(content, file, _use_new_zipfile_serialization=form == "zip")
        data = file.getvalue()
    harm = draw(st.sampled_from(["none", "none", "cut", "text"]))
    if harm == "cut":
        data = data[: draw(st.integers(0, len(data) - 1))]
    elif harm == "text":
        pointer = b"version https://git-lfs.github.com/spec/v1\n"
        data = draw(st.sampled_from([pointer, b"<html>", b"{}", b"Not Found"]))
    return data, draw(st.sampled_from(["pth", "pt", "bin", "safetensors"])), harm != "none"


def is_unwrapped_or_refused_by_name(folder, file):
    data, ending, damaged = file
    path = folder / f"weights.{ending}"
    path.write_bytes(data)
    try:
        found = read_weights(path)
    except WeightsError as error:
        assert damaged and str(error).startswith(str(path))
        return
    assert not damaged and found.keys() == STATE.keys()
    assert all(torch.equal(found[k], v) for k, v in STATE.items())


test_a_checkpoint_is_unwrapped_or_refused = QUICK(given(file=checkpoints())(is_unwrapped_or_refused_by_name))
test_checkpoints_all = pytest.mark.slow(THOROUGH(given(file=checkpoints())(is_unwrapped_or_refused_by_name)))


def png_with(chunk, body):
    "The bytes of a PNG header, for errors that only odd files bring out."
    return b"\x89PNG\r\n\x1a\n" + struct.pack(">I", len(body)) + chunk + body


@pytest.mark.parametrize("name", ["size.png", "page.html.png"])
def test_what_is_no_image_is_named(folder, name):
    (Path(folder) / name).write_bytes(png_with(b"IHDR", b"\0" * 13))
    with pytest.raises(DataError, match=f"cannot decode {name}"):
        read_image(Path(folder) / name)
