"""Datasets and the order of their images: correct contents, and clear errors for missing or damaged files."""

import errno
import gzip
import importlib
import pickle
import shutil
import sys
import threading
import time
import urllib.error
from hashlib import md5, sha256
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import ROOT
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from scipy.stats import ks_2samp
from torchvision import transforms
from torchvision.datasets import CIFAR100

from scsa_book import paths
from scsa_book.data import fashion, images, loading
from scsa_book.data.crops import ResizedCrops
from scsa_book.data.images import BatchIndices, load_dataset
from scsa_book.paths import DataError


def draw(dataset, *indices, seed=0):
    return dataset[BatchIndices(torch.tensor(indices), seed)]


# ---- paths


def test_the_book_is_found_from_inside_and_around_the_package(tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT / "nbs" / "training")
    assert paths.book_root() == ROOT
    monkeypatch.chdir(tmp_path)
    assert paths.book_root() == ROOT


def test_another_book_wins_over_the_one_around_the_package(tmp_path):
    (tmp_path / "nbs" / "runs" / "deeper").mkdir(parents=True)
    (tmp_path / "_quarto.yml").touch()
    assert paths.book_root(tmp_path / "nbs" / "runs" / "deeper") == tmp_path


def test_the_data_root_is_the_option_else_the_environment(tmp_path, monkeypatch):
    monkeypatch.delenv("SCSA_BOOK_DATA", raising=False)
    assert paths.data_root() is None
    monkeypatch.setenv("SCSA_BOOK_DATA", str(tmp_path))
    assert paths.data_root() == tmp_path
    assert paths.data_root(tmp_path / "given") == tmp_path / "given"


def test_a_module_that_is_postponed_is_imported_for_what_is_not_known(tmp_path, monkeypatch):
    (tmp_path / "slow.py").write_text("known = other = 'real'")
    monkeypatch.syspath_prepend(tmp_path)
    with paths.postponed("slow", known="stand-in"):
        module = importlib.import_module("slow")
        assert module.known == "stand-in" and not hasattr(module, "__file__")
    assert "slow" not in sys.modules
    with paths.postponed("slow", known="stand-in"):
        assert importlib.import_module("slow").other == "real"
    with paths.postponed("slow", known="stand-in"):
        assert sys.modules.pop("slow").known == "real", "it was imported before"


def test_metrics_are_imported_without_the_module_that_they_change(executed):
    code = "import sys; from scsa_book.paths import importing\nwith importing(): import torchmetrics\n"
    code += "print('scipy.signal' in sys.modules)\nfrom scipy.signal import welch, windows"
    assert executed(code) == (0, "False\n")


# ---- the embedded sample


@pytest.fixture
def sample(tmp_path):
    "A copy of the sample that tests may damage."
    return shutil.copytree(ROOT / "data" / "fashion-mnist", tmp_path / "fashion-mnist")


def test_the_files_of_the_sample_are_those_that_it_lists():
    folder = ROOT / "data" / "fashion-mnist"
    listed = dict(line.split()[::-1] for line in (folder / "SHA256SUMS").read_text().splitlines())
    assert {"./LICENSE", "./SOURCE.md"} < set(listed)
    for name, expected in listed.items():
        assert sha256((folder / name).read_bytes()).hexdigest() == expected, name
    for name, expected in fashion.SHA256.items():
        assert listed[f"./{name}"] == expected


def test_the_split_is_whole_disjoint_and_fair():
    train, test = fashion.load_split("train"), fashion.load_split("test")
    assert train[0].shape == (8000, 28, 28) and test[0].shape == (2000, 28, 28)
    both = torch.cat([fashion.split_indices("train"), fashion.split_indices("test")])
    assert torch.equal(both.sort().values, torch.arange(10_000))
    assert test[1].bincount().min() >= 180


def test_the_split_never_changes():
    assert fashion.split_indices("test")[:3].tolist() == [4, 9, 14]
    with pytest.raises(ValueError, match="'train' or 'test'"):
        fashion.split_indices("valid")


@pytest.mark.parametrize("name", fashion.SHA256)
def test_a_missing_or_damaged_file_of_the_sample_is_named(sample, name):
    content = bytearray((sample / name).read_bytes())
    content[len(content) // 2] ^= 1
    (sample / name).write_bytes(content)
    with pytest.raises(DataError, match=f"{name} is damaged .*git checkout"):
        fashion.load_sample(sample)
    (sample / name).unlink()
    with pytest.raises(DataError, match=f"no file {name}: .*{sample.name}.*git checkout"):
        fashion.load_sample(sample)


def test_a_file_of_another_format_is_refused(tmp_path):
    path = tmp_path / "floats.gz"
    path.write_bytes(gzip.compress(b"\0\0\x0d\x01" + bytes(8)))
    with pytest.raises(DataError, match="no idx file of bytes"):
        fashion.read_idx(path)


def test_images_of_a_figure_go_through_the_classes():
    x, y = fashion.sample_images(20)
    assert y.tolist() == [*range(10), *range(10)] and x.shape == (20, 1, 28, 28)
    assert 0 <= x.min() and x.max() <= 1
    _, first = fashion.sample_images(20, classes=False)
    assert torch.equal(first, fashion.load_split("test")[1][:20])


def test_a_figure_needs_neither_torchvision_nor_lightning(executed):
    code = "import sys, scsa_book.data.fashion; print({'torchvision', 'lightning'} & set(sys.modules))"
    assert executed(code) == (0, "set()\n")


# ---- datasets


def test_mean_and_deviation_are_those_of_the_training_images():
    clothes = load_dataset("fashion-mnist")
    pixels = clothes.train.images.float() / 255
    assert clothes.mean == (round(pixels.mean().item(), 3),)
    assert clothes.std == (round(pixels.std().item(), 3),)


def test_the_fingerprint_is_of_the_images(monkeypatch):
    before = load_dataset("fashion-mnist").fingerprint
    assert before == load_dataset("fashion-mnist", train_images=100).fingerprint
    real = fashion.load_split

    def changed(split, folder=None):
        x, y = real(split, folder)
        x[0, 0, 0] += 1
        return x, y

    monkeypatch.setattr(fashion, "load_split", changed)
    assert load_dataset("fashion-mnist").fingerprint != before


def test_a_subset_keeps_the_share_of_each_class():
    clothes = load_dataset("fashion-mnist", train_images=130, test_images=10**6)
    assert clothes.train.labels.bincount().tolist() == [13] * 10
    assert len(clothes.test) == 2000


@pytest.mark.parametrize("name", ["mnist", "folder:", "folder:../secrets", "cifar-100"])
def test_an_unknown_set_lists_the_known_ones(name):
    with pytest.raises(ValueError, match="unknown dataset .*fashion-mnist, cifar100, imagenet, folder:NAME"):
        load_dataset(name)


def test_random_changes_follow_the_seed_and_leave_the_generator_alone():
    clothes = load_dataset("fashion-mnist", train_images=64).train
    torch.manual_seed(1)
    state = torch.random.get_rng_state()
    first = draw(clothes, *range(64), seed=5)[0]
    assert torch.equal(torch.random.get_rng_state(), state)
    assert torch.equal(first, draw(clothes, *range(64), seed=5)[0])
    assert not torch.equal(first, draw(clothes, *range(64), seed=6)[0])
    mirrored = first == clothes.images.flip(-1)
    assert ((first == clothes.images) | mirrored).flatten(1).any(1).all()


def test_the_generator_comes_back_after_an_error():
    state = torch.random.get_rng_state()
    with pytest.raises(KeyError), images.seeded(3):
        raise KeyError
    assert torch.equal(torch.random.get_rng_state(), state)


# ---- CIFAR-100


@pytest.fixture
def cifar(tmp_path, monkeypatch):
    "Files in CIFAR-100's format with a few random images, and torchvision's checksums patched to match."
    folder, generator = tmp_path / CIFAR100.base_folder, np.random.default_rng(0)
    folder.mkdir()

    def half(n):
        pixels = generator.integers(0, 256, (n, 3072), dtype=np.uint8)
        return {"data": pixels, "fine_labels": [i % 100 for i in range(n)]}

    files = {
        "train": half(200),
        "test": half(100),
        "meta": {"fine_label_names": [f"c{i}" for i in range(100)]},
    }
    sums = {}
    for name, content in files.items():
        (folder / name).write_bytes(pickle.dumps(content))
        sums[name] = md5((folder / name).read_bytes()).hexdigest()
    monkeypatch.setattr(CIFAR100, "train_list", [["train", sums["train"]]])
    monkeypatch.setattr(CIFAR100, "test_list", [["test", sums["test"]]])
    monkeypatch.setattr(CIFAR100, "meta", {**CIFAR100.meta, "md5": sums["meta"]})
    return tmp_path, files


def test_cifar100_is_read(cifar):
    root, files = cifar
    found = load_dataset("cifar100", root)
    assert len(found.train), len(found.test) == (200, 100)
    assert found.classes[3] == "c3" and found.train.labels[7] == 7
    expected = torch.from_numpy(files["test"]["data"][4].reshape(3, 32, 32))
    assert torch.equal(draw(found.test, 4)[0][0], expected)
    assert draw(found.train, 0, 1)[0].shape == (2, 3, 32, 32)


def test_cifar100_is_found_through_the_environment(cifar, monkeypatch):
    monkeypatch.setenv("SCSA_BOOK_DATA", str(cifar[0]))
    assert len(load_dataset("cifar100", train_images=50).train) == 50


@pytest.mark.parametrize("name", ["train", "test", "meta"])
def test_a_missing_or_damaged_file_of_cifar100_is_named(cifar, name):
    path = cifar[0] / CIFAR100.base_folder / name
    path.write_bytes(path.read_bytes()[:-1] + b"!")
    with pytest.raises(DataError, match=f"{name} of CIFAR-100 is damaged.*cifar-100-python.tar.gz"):
        load_dataset("cifar100", cifar[0])
    path.unlink()
    with pytest.raises(DataError, match=f"no file {name} of CIFAR-100: .*cifar-100-python"):
        load_dataset("cifar100", cifar[0])


def test_a_folder_that_was_named_starts_no_download(tmp_path, monkeypatch):
    monkeypatch.setattr(images, "download_cifar100", lambda root: pytest.fail("it did"))
    with pytest.raises(DataError, match="no file train"):
        load_dataset("cifar100", tmp_path)


def test_of_several_runs_one_downloads_and_the_others_wait(tmp_path, monkeypatch):
    archive, at_once = tmp_path / "new" / "archive", []

    def slowly(root, download):
        if not archive.exists():
            at_once.append("downloading")
            time.sleep(0.3)
            archive.touch()

    monkeypatch.setattr("torchvision.datasets.CIFAR100", slowly)
    runs = [threading.Thread(target=images.download_cifar100, args=(archive.parent,)) for _ in range(5)]
    for run in runs:
        run.start()
    for run in runs:
        run.join(20)
    assert at_once == ["downloading"] and archive.exists()


def test_a_download_that_fails_says_where_to_get_it(tmp_path, monkeypatch):
    def offline(*arguments, **options):
        raise urllib.error.URLError(OSError(errno.ENETUNREACH, "Network is unreachable"))

    monkeypatch.delenv("SCSA_BOOK_DATA", raising=False)
    monkeypatch.setattr(images, "download_folder", lambda: tmp_path)
    monkeypatch.setattr("torchvision.datasets.cifar.download_and_extract_archive", offline)
    with pytest.raises(DataError, match="unreachable.*toronto.edu.*data_root, or SCSA_BOOK_DATA"):
        load_dataset("cifar100")


# ---- folders of images


@pytest.fixture
def birds(tmp_path):
    "ImageNet's layout with two classes; grey, colour and transparent images of different sizes."
    shapes = {"a.png": ("L", (40, 30)), "b.jpg": ("RGB", (300, 400)), "c.png": ("RGBA", (224, 224))}
    for half in ("train", "val"):
        for shade, name in ((10, "finch"), (200, "wren")):
            folder = tmp_path / "birds" / half / name
            folder.mkdir(parents=True)
            for file, (mode, size) in shapes.items():
                Image.new(mode, size, shade if mode == "L" else (shade,) * len(mode)).save(folder / file)
    return tmp_path


def test_a_folder_is_read(birds):
    found = load_dataset("folder:birds", birds)
    assert found.classes == ("finch", "wren") and found.test.labels.tolist() == [0, 0, 0, 1, 1, 1]
    for half in (found.train, found.test):
        x, y = draw(half, 0, 1, 2, 5)
        assert x.shape == (4, 3, 224, 224) and x.dtype == torch.uint8 and y.tolist() == [0, 0, 0, 1]
        assert (x[0].float() - 10).abs().max() <= 2 and (x[3].float() - 200).abs().max() <= 2


def test_crops_of_a_folder_follow_the_seed(birds):
    gradient = np.tile(np.arange(250, dtype=np.uint8)[:, None, None], (1, 250, 3))
    Image.fromarray(gradient).save(birds / "birds" / "train" / "finch" / "a.png")
    train = load_dataset("folder:birds", birds).train
    assert torch.equal(draw(train, 0, seed=1)[0], draw(train, 0, seed=1)[0])
    assert not torch.equal(draw(train, 0, seed=1)[0], draw(train, 0, seed=2)[0])


def test_the_fingerprint_of_a_folder_is_of_names_and_sizes(birds):
    before = load_dataset("folder:birds", birds).fingerprint
    assert load_dataset("folder:birds", birds).fingerprint == before
    (birds / "birds" / "val" / "wren" / "a.png").rename(birds / "birds" / "val" / "wren" / "d.png")
    assert load_dataset("folder:birds", birds).fingerprint != before


def test_a_subset_of_a_folder(birds):
    assert load_dataset("folder:birds", birds, test_images=4).test.labels.tolist() == [0, 1, 0, 1]


def harmed(birds, harm):
    root = birds / "birds"
    if harm == "empty":
        shutil.rmtree(root)
        root.mkdir()
    elif harm == "no classes":
        shutil.rmtree(root / "train")
        (root / "train").mkdir()
    elif harm == "no images":
        for path in (root / "val" / "wren").iterdir():
            path.rename(path.with_suffix(".txt"))
    elif harm == "one class less":
        shutil.rmtree(root / "val" / "wren")
    return birds


@pytest.mark.parametrize(
    ("harm", "said"),
    [
        ("empty", "no folder `train`: .*birds. A folder of images has train/CLASS"),
        ("no classes", "no class folders: .*train. A folder"),
        ("no images", "no images of class `wren`: .*val/wren"),
        ("one class less", "train and val differ: wren"),
    ],
)
def test_what_is_wrong_with_a_folder_is_said(birds, harm, said):
    with pytest.raises(DataError, match=said):
        load_dataset("folder:birds", harmed(birds, harm))


def test_a_damaged_image_is_named(birds):
    path = birds / "birds" / "train" / "finch" / "b.jpg"
    path.write_bytes(path.read_bytes()[:200])
    train = load_dataset("folder:birds", birds).train
    with pytest.raises(DataError, match=r"cannot decode b.jpg .*train/finch. Replace or remove"):
        draw(train, 1)


def test_a_folder_needs_a_data_root(monkeypatch):
    monkeypatch.delenv("SCSA_BOOK_DATA", raising=False)
    with pytest.raises(DataError, match="no data root for imagenet: neither data_root nor SCSA_BOOK_DATA"):
        load_dataset("imagenet")


# ---- the order of the images


SIZES = {"total": st.integers(1, 200), "batch": st.integers(2, 50), "world": st.integers(1, 4)}


def parts(total, batch, world, shuffle, epoch=3, seed=0):
    found = []
    for rank in range(world):
        sampler = loading.EpochSampler(total, batch, seed, shuffle, rank, world)
        sampler.set_epoch(epoch)
        found.append(list(sampler))
        assert len(sampler) == len(found[-1])
    return found


@settings(max_examples=60, deadline=None)
@given(**SIZES, shuffle=st.booleans())
def test_processes_share_each_batch_and_no_image_comes_twice(total, batch, world, shuffle):
    found = parts(total, batch, world, shuffle)
    alone = loading.EpochSampler(total, batch, 0, shuffle)
    alone.set_epoch(3)
    seen = []
    for step, shares in enumerate(zip(*found, strict=True)):
        together = sorted(i for share in shares for i in share.indices.tolist())
        assert together == sorted(list(alone)[step].indices.tolist())
        seen += together
    assert len(set(seen)) == len(seen)
    left_out = total - len(seen)
    assert left_out < 2 * world if shuffle else left_out == 0


@settings(max_examples=30, deadline=None)
@given(total=st.integers(20, 200), seed=st.integers(0, 1000), epoch=st.integers(0, 300))
def test_the_order_follows_from_seed_and_epoch(total, seed, epoch):
    def order(seed, epoch):
        sampler = loading.EpochSampler(total, 8, seed)
        sampler.set_epoch(epoch)
        return [(d.indices.tolist(), d.seed) for d in sampler]

    assert order(seed, epoch) == order(seed, epoch)
    assert order(seed, epoch) != order(seed, epoch + 1) != order(seed + 1, epoch)


def test_every_training_step_has_two_images_a_process():
    for total in range(2, 40):
        for share in parts(total, 6, 2, True):
            assert all(len(d.indices) >= 2 for d in share)


def test_evaluation_goes_through_all_images_in_order():
    sampler = loading.EpochSampler(10, 4, seed=1, shuffle=False)
    assert [d.indices.tolist() for d in sampler] == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]]


def batches(workers, epochs=(0, 1)):
    module = loading.ImageModule(load_dataset("fashion-mnist", train_images=96), 32, seed=4, workers=workers)
    loader = module.train_dataloader()
    found = []
    for epoch in epochs:
        loader.sampler.set_epoch(epoch)
        found += [x for x, _ in loader]
    return torch.stack(found)


def test_worker_processes_change_no_image():
    assert torch.equal(batches(0), batches(2))


class Slow(torch.utils.data.Dataset):
    def __getitem__(self, batch):
        time.sleep(0.1)
        return batch.indices


@pytest.mark.parametrize("workers", [0, 1])
def test_a_loader_counts_what_its_batches_take_and_not_what_is_done_with_them(workers):
    loader = loading.loader(Slow(), loading.EpochSampler(4, 2, seed=1), workers)  # two batches
    for _ in loader:
        time.sleep(1)
    assert 0.1 <= loader.waited < 2


def test_loading_draws_nothing_from_the_runs_own_generator():
    torch.manual_seed(9)
    state = torch.random.get_rng_state()
    batches(0)
    batches(2, epochs=(0,))
    assert torch.equal(torch.random.get_rng_state(), state)


def test_sets_in_memory_need_no_workers_on_a_cpu(birds, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert loading.good_workers(load_dataset("fashion-mnist").train) == 0
    assert loading.good_workers(load_dataset("folder:birds", birds).train) >= 1


def test_workers_need_shared_memory_and_share_the_cores(birds, monkeypatch):
    dataset = load_dataset("folder:birds", birds).train
    monkeypatch.setattr(loading, "usable_cores", lambda: 8)
    trainers = [SimpleNamespace(num_devices=count) for count in (1, 4, 16)]
    assert [loading.good_workers(dataset, trainer) for trainer in trainers] == [8, 2, 1]
    monkeypatch.setattr(loading, "shared_memory", lambda: 64 * 2**20)
    assert loading.good_workers(dataset) == 0


def test_crops_of_a_batch_are_those_of_each_image():
    x = torch.randint(256, (300, 2, 5, 9), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    augment = images.CropAndFlip(3)
    top, left, mirrored = augment.draw(300, 11)
    padded = torch.nn.functional.pad(x, (3, 3, 3, 3))
    at_once = images.crops_at_once(padded, x.shape, top, left, mirrored)  # of an accelerator
    for *got, image, t, l, m in zip(augment(x, 11), at_once, padded, top, left, mirrored, strict=True):
        crop = image[:, t : t + 5, l : l + 9]
        assert all(torch.equal(one, crop.flip(-1) if m else crop) for one in got)
    for offsets in (top, left):  # every offset is drawn about as often as the others
        assert offsets.bincount(minlength=7).min() > 20 and offsets.max() == 6
    assert 110 < mirrored.sum() < 190


def test_every_batch_of_every_epoch_and_process_has_its_own_augmentation():
    seeds = []
    for epoch in range(3):
        for rank in range(2):
            sampler = loading.EpochSampler(64, 16, seed=0, rank=rank, world=2)
            sampler.set_epoch(epoch)
            seeds += [batch.seed for batch in sampler]
    assert len(set(seeds)) == len(seeds) == 3 * 2 * 4


def test_images_on_an_accelerator_are_indexed_and_augmented_there():
    train = load_dataset("fashion-mnist", train_images=64).train.to("meta")
    module = loading.loader(train, loading.EpochSampler(64, 16, seed=0), workers=2)
    assert (module.num_workers, module.pin_memory) == (0, False)
    x, y = next(iter(module))  # raises where a tensor of the CPU meets one of the device
    assert x.device.type == y.device.type == "meta" and x.shape == (16, 1, 28, 28)


@pytest.mark.parametrize("name", ["fashion-mnist", "cifar100"])
def test_options_of_folders_are_refused_for_images_of_a_fixed_size(name):
    with pytest.raises(ValueError, match=f"size.*are for imagenet and folder:NAME; .* of {name} have"):
        load_dataset(name, size=64)


def test_folders_of_images_have_a_size_and_a_least_crop(birds):
    found = load_dataset("folder:birds", birds, size=32, min_scale=1)
    assert found.train[BatchIndices(torch.tensor([0]))][0].shape == (1, 3, 32, 32)
    random_crop = found.train.transform.transforms[0]
    assert tuple(random_crop.size) == (32, 32) and tuple(random_crop.scale) == (1, 1)


# ---- photographs in memory


@pytest.mark.parametrize("size", [20, 64, 90])
def test_crops_of_a_batch_are_those_of_torchvision_one_by_one(size):
    "Scaled down and up; torchvision rounds at the end, too, and its sums have another order."
    x = torch.randint(256, (30, 3, 64, 64), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    crop = ResizedCrops(size, min_scale=0.1)
    drawn = zip(*(values.tolist() for values in crop.draw(64, len(x), seed=3)), strict=True)
    for image, ours, (top, height, left, width, mirrored) in zip(x, crop(x, seed=3), drawn, strict=True):
        box, how = (top, left, height, width, [size, size]), {"antialias": True}
        theirs = transforms.functional.resized_crop(image, *box, **how)
        assert (ours.int() - (theirs.flip(-1) if mirrored else theirs).int()).abs().max() <= 1


@pytest.mark.parametrize("min_scale", [0.08, 0.9])
def test_crops_of_a_batch_have_the_distribution_of_torchvision(min_scale):
    top, height, left, width, mirrored = ResizedCrops(8, min_scale).draw(50, 3000, seed=1)
    assert (top + height).max() <= 50 and (left + width).max() <= 50
    with images.seeded(2):
        whole, how = torch.zeros(3, 50, 50), ([min_scale, 1], [3 / 4, 4 / 3])
        theirs = [transforms.RandomResizedCrop.get_params(whole, *how) for _ in range(3000)]
    for ours, name in zip((top, left, height, width), zip(*theirs, strict=True), strict=True):
        assert ks_2samp(ours, name).pvalue > 0.001
    assert 1400 < mirrored.sum() < 1600


def test_photographs_in_memory_are_cropped_where_they_are(birds):
    found = load_dataset("folder:birds", birds, size=24, stored=40)
    kept, usual = found.test, load_dataset("folder:birds", birds, size=24).test
    assert torch.equal(kept.images, draw(usual, *range(6))[0]), "evaluation is as without the option"
    found.train.images.random_()  # the birds are of one colour
    first, again, other = (draw(found.train, 0, 4, seed=seed)[0] for seed in (7, 7, 8))
    assert torch.equal(first, again) and not torch.equal(first, other)
    x, y = draw(found.train.to("meta"), 0, 5)
    assert x.device.type == "meta" and x.shape == (2, 3, 24, 24) and x.dtype == torch.uint8
    assert loading.good_workers(found.train) == 0


def test_only_the_photographs_of_a_subset_are_read(birds, monkeypatch):
    read = []
    real = images.FolderImages.image
    noted = lambda self, path: read.append(path) or real(self, path)  # noqa: E731
    monkeypatch.setattr(images.FolderImages, "image", noted)
    load_dataset("folder:birds", birds, train_images=2, test_images=1, size=24, stored=40)
    assert len(read) == 3


def test_photographs_that_do_not_fit_into_memory_are_refused_before_they_are_read(birds, monkeypatch):
    monkeypatch.setattr(images, "memory_bytes", lambda: 50_000.0)
    with pytest.raises(ValueError, match="stored needs .* for 6 images of 40 x 40 pixels, .*Make it smaller"):
        load_dataset("folder:birds", birds, size=24, stored=40)
