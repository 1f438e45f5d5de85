"""Decoded images on disk: the same run with and without them, and no file that is stale or incomplete."""

import errno
import os
import pickle
import shutil
from contextlib import redirect_stdout
from io import StringIO
from itertools import product

import numpy as np
import PIL
import pytest
from PIL import Image, features

from scsa_book.data.images import ReadImage, load_dataset
from scsa_book.paths import DataError
from scsa_book.training import decoded, result, run
from scsa_book.training.config import Execution, configure
from scsa_book.training.tasks import build_network


@pytest.fixture
def birds(tmp_path):
    "A data root with images of two classes, each of another size."
    generator = np.random.default_rng(0)
    for number, (split, bird, i) in enumerate(product(("train", "val"), ("finch", "wren"), range(6))):
        file = tmp_path / "data" / "birds" / split / bird / f"{i}.{('jpg', 'png')[i % 2]}"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(generator.integers(256, size=(40 + number, 50, 3), dtype=np.uint8)).save(file)
    return tmp_path / "data"


@pytest.fixture
def where(tmp_path, birds):
    folders = {"results_dir": tmp_path / "results", "cache_dir": tmp_path / "cache", "data_root": birds}
    return Execution(**folders, accelerator="cpu", workers=0)


def birds_config(**given):
    fixed = {"train_images": 12, "test_images": 6, "batch_size": 4, "epochs": 2, "warmup_epochs": 0}
    options = {"data_options": {"size": 32}, "dataset": "folder:birds", "network": "resnet8"}
    return configure("sample", **{**fixed, **options, **given})


def train(config, where):
    limits = (config.train_images, config.test_images)
    images = load_dataset(config.dataset, where.data_root, *limits, **config.data_options)
    said = StringIO()
    with redirect_stdout(said):
        done = run.fit(config, build_network(config, 2), images, where)
    weights = {name: value.numpy().tobytes() for name, value in done.network.state_dict().items()}
    return weights, said.getvalue()


def files(where):
    return sorted(where.cache_dir.glob("images/*.rgb"))


def leftovers(where):
    return [path for path in where.cache_dir.glob("images/.*") if path.name.endswith(f".{os.getpid()}")]


@pytest.mark.parametrize("options", [{"size": 32}, {"size": 32, "shortest": 36}], ids=["as stored", "scaled"])
def test_a_run_is_the_same_with_and_without_and_writes_once(options, where, tmp_path):
    config = birds_config(data_options=options)
    without = {"cache_dir": tmp_path / "none", "image_cache": False}
    cold, said = train(config, where.model_copy(update=without))
    assert "decoded" not in said and not (tmp_path / "none" / "images").exists()
    first, said = train(config, where)
    (file,) = files(where)
    assert f"decoded images: {file.stat().st_size:,} bytes are written once" in said
    written = file.stat().st_mtime_ns
    second, said = train(config, where.model_copy(update={"again": True, "workers": 2}))
    assert "decoded" not in said and files(where) == [file] and file.stat().st_mtime_ns == written
    assert cold == first == second


def test_pixels_are_read_from_the_file(where, birds):
    train(birds_config(), where)
    (file,) = files(where)
    content = bytearray(file.read_bytes())
    content[-9:] = b"\x07" * 9
    file.write_bytes(content)
    images = load_dataset("folder:birds", birds, 12, 6, size=32)
    cached = decoded.with_cache(images, birds_config(), where)
    last = cached.test.paths[-1]
    assert np.asarray(cached.test.read(last))[-1, -3:].tolist() == [[7] * 3] * 3
    assert cached.test.read(last).tobytes()[:-9] == images.test.read(last).tobytes()[:-9]


def test_runs_of_the_same_images_share_a_file_and_others_have_their_own(where):
    train(birds_config(), where)
    train(birds_config(seed=1, attention="se", options={"reduction": 4}), where)
    assert len(files(where)) == 1
    train(birds_config(train_images=10), where)
    assert len(files(where)) == 2


def changed_file(birds, monkeypatch):
    path = birds / "birds" / "train" / "finch" / "0.jpg"
    state = path.stat()
    Image.new("RGB", (50, 40)).save(path)
    os.utime(path, ns=(state.st_atime_ns, state.st_mtime_ns))  # only its size differs


def touched_file(birds, monkeypatch):
    path = birds / "birds" / "val" / "wren" / "1.png"
    os.utime(path, ns=(0, path.stat().st_mtime_ns + 1))


def newer_pillow(birds, monkeypatch):
    monkeypatch.setattr(PIL, "__version__", "99.0")


def newer_library(birds, monkeypatch):
    version = features.version
    monkeypatch.setattr(features, "version", lambda name: "9" if name == "libjpeg_turbo" else version(name))


def other_code(birds, monkeypatch):
    monkeypatch.setattr(decoded, "sha256_of", lambda path: "other")


CHANGES = [changed_file, touched_file, newer_pillow, newer_library, other_code]


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_nothing_out_of_date_is_used(change, where, birds, monkeypatch):
    images = load_dataset("folder:birds", birds, size=32)
    with redirect_stdout(StringIO()):
        before = decoded.with_cache(images, birds_config(), where).train.read.file
        change(birds, monkeypatch)
        assert decoded.with_cache(images, birds_config(epochs=1), where).train.read == ReadImage()
        after = decoded.with_cache(images, birds_config(), where).train.read.file
    assert after != before and files(where) == [after]


def test_another_request_has_another_file(where, birds):
    with redirect_stdout(StringIO()):
        for options in ({}, {"shortest": 36}, {"shortest": 38}):
            images = load_dataset("folder:birds", birds, size=32, **options)
            decoded.with_cache(images, birds_config(), where)
    assert len(files(where)) == 3
    shutil.copy(birds / "birds/train/finch/0.jpg", birds / "birds/train/finch/9.jpg")
    images = load_dataset("folder:birds", birds, size=32)
    assert decoded.with_cache(images, birds_config(epochs=1), where).train.read == ReadImage()


@pytest.mark.parametrize("left", [0, 100, -1])
def test_a_file_that_was_cut_is_written_anew(left, where, birds):
    images = load_dataset("folder:birds", birds, size=32)
    with redirect_stdout(StringIO()):
        whole = decoded.with_cache(images, birds_config(), where).train.read.file
        content = whole.read_bytes()
        whole.write_bytes(content[:left])
        assert decoded.with_cache(images, birds_config(epochs=1), where).train.read == ReadImage()
        decoded.with_cache(images, birds_config(), where)
    assert whole.read_bytes() == content


def test_a_full_disk_is_said_and_the_run_goes_on(where, tmp_path, monkeypatch):
    without = {"cache_dir": tmp_path / "none", "image_cache": False}
    expected, _ = train(birds_config(), where.model_copy(update=without))
    with monkeypatch.context() as patch:
        patch.setattr(decoded, "free_bytes", lambda folder: 1000)
        got, said = train(birds_config(), where.model_copy(update={"image_cache": True}))
    assert "images are decoded in every epoch: cannot write" in said and "(not enough space): " in said
    assert got == expected and files(where) == []


def test_a_disk_that_becomes_full_leaves_nothing_behind(where, birds, monkeypatch):
    def full(_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(result.os, "fsync", full)
    images, said = load_dataset("folder:birds", birds, size=32), StringIO()
    with redirect_stdout(said):
        assert decoded.with_cache(images, birds_config(), where) is images
    assert "every epoch: cannot write" in said.getvalue() and "No space left on device" in said.getvalue()
    assert files(where) == leftovers(where) == []


def test_what_a_killed_process_left_is_removed(where, birds):
    images = load_dataset("folder:birds", birds, size=32)
    with redirect_stdout(StringIO()):
        file = decoded.with_cache(images, birds_config(), where).train.read.file
        draft = file.with_name(f".{file.name}.12345")
        file.rename(draft)
        decoded.with_cache(images, birds_config(), where)
    assert not draft.exists() and files(where) == [file]


@pytest.mark.parametrize("harm", ["removed", "cut"])
def test_a_file_that_is_lost_during_a_run_changes_nothing(harm, where, birds):
    images = load_dataset("folder:birds", birds, size=32)
    with redirect_stdout(StringIO()):
        train_split = decoded.with_cache(images, birds_config(), where).train
    (file,) = files(where)
    file.unlink() if harm == "removed" else file.write_bytes(b"")
    for path in train_split.paths:
        assert train_split.read(path).tobytes() == ReadImage()(path).tobytes()


def test_a_damaged_image_is_named_and_nothing_is_written(where, birds):
    path = birds / "birds" / "train" / "wren" / "4.jpg"
    path.write_bytes(path.read_bytes()[:300])
    with pytest.raises(DataError, match=r"cannot decode 4.jpg .*train/wren. Replace or remove"):
        train(birds_config(train_images=None), where)
    assert files(where) == leftovers(where) == []


def test_images_that_cannot_be_reached_are_said_as_without_a_file(where, birds):
    images = load_dataset("folder:birds", birds, 12, 6, size=32)
    shutil.rmtree(birds / "birds")
    with redirect_stdout(StringIO()), pytest.raises(DataError, match="cannot reach .*restore the data"):
        run.fit(birds_config(), build_network(birds_config(), 2), images, where)


def test_a_file_is_written_only_where_it_is_read_twice_and_small_enough(where, monkeypatch):
    train(birds_config(epochs=1), where)
    assert files(where) == []
    monkeypatch.setattr(decoded, "most_bytes", lambda folder: 10_000)
    train(birds_config(), where)
    assert files(where) == []
    train(birds_config(epochs=1), where.model_copy(update={"image_cache": True, "again": True}))
    assert len(files(where)) == 1


def test_the_size_that_is_said_is_that_of_the_file_and_counting_ends_at_the_limit(where, birds, monkeypatch):
    images = load_dataset("folder:birds", birds)
    for read in (ReadImage(), ReadImage(37)):
        for path in images.train.paths:
            assert read.size(path) == read(path).size[::-1]
    seen = []
    monkeypatch.setattr(ReadImage, "size", lambda self, path: seen.append(path) or (10, 10))
    assert decoded.bytes_up_to(600 + 96, images.train.paths, ReadImage()) > 600 + 96 and len(seen) == 3


def test_a_run_with_photographs_in_memory_needs_no_file_and_can_be_repeated(where):
    config = birds_config(data_options={"size": 32, "stored": 40})
    first, said = train(config, where)
    again, _ = train(config, where.model_copy(update={"again": True, "workers": 2}))
    assert first == again and "decoded images" not in said
    assert not list((where.cache_dir / "images").glob("*")), "no file of pixels"


def test_the_limit_depends_on_memory_and_disk(tmp_path, monkeypatch):
    monkeypatch.setattr(decoded, "free_bytes", lambda folder: 1000)
    assert decoded.most_bytes(tmp_path) == 100
    monkeypatch.setattr(decoded, "free_bytes", lambda folder: 2**62)
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    assert decoded.most_bytes(tmp_path) == memory // 2


def test_datasets_in_memory_are_left_alone(where):
    images = load_dataset("fashion-mnist", train_images=20, test_images=10)
    assert decoded.with_cache(images, birds_config(), where) is images


def test_a_reader_travels_to_worker_processes_without_its_pixels(where, birds):
    images = load_dataset("folder:birds", birds, size=32)
    with redirect_stdout(StringIO()):
        read = decoded.with_cache(images, birds_config(), where).train.read
    sent = pickle.dumps(read)
    assert len(sent) < read.file.stat().st_size / 10
    assert all(pickle.loads(sent)(path).tobytes() == read(path).tobytes() for path in images.train.paths)
