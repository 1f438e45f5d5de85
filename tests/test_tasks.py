"""Runs of detection and segmentation: they learn, are reproducible, resume, and have complete results."""

import os
import signal
from contextlib import redirect_stdout
from io import StringIO
from itertools import product

import pytest
import torch
from children import child, wait_at
from conftest import ROOT
from safetensors.torch import load_file
from torchvision.transforms.functional import to_pil_image

from scsa_book.data.images import BatchIndices
from scsa_book.networks.placement import attentions, maps_of
from scsa_book.paths import DataError
from scsa_book.training import run
from scsa_book.training.config import Execution, configure
from scsa_book.training.result import load_result, result_path, run_folder
from scsa_book.training.task import decay, rate_factor
from scsa_book.training.tasks import TASKS, build_network, stock_weights

SCENES = {"scenes": {"side": 64, "objects": 2, "size": 0.5}}
SMALL = {"rpn_post_nms_top_n_train": 20, "rpn_post_nms_top_n_test": 20}
TINY = {"width": 8, "pyramid_channels": 16, "head_channels": 16, "anchor_scale": 4}
TINY |= {"min_size": 64, "max_size": 64}
SHORT_RUN = {"train_images": 12, "test_images": 6, "batch_size": 4, "epochs": 3}
SHORT_RUN |= {"warmup_epochs": 0, "lr": 0.002}
DETECTORS = {
    "faster_rcnn": TINY | SMALL,
    "mask_rcnn": TINY | SMALL,
    "cascade_rcnn": TINY | SMALL,
    "retinanet": TINY,
}


def tiny(task, **given):
    network = given.get("network", "faster_rcnn" if task == "detect" else "upernet")
    options = DETECTORS.get(network, {"channels": 16, "width": 8})
    fixed = {"task": task, "data_options": SCENES, "network_options": options}
    return configure("sample", **{**fixed, **SHORT_RUN, **given})


@pytest.fixture
def where(tmp_path):
    return Execution(results_dir=tmp_path / "results", cache_dir=tmp_path / "cache", accelerator="cpu")


def train(config, where):
    images = TASKS[config.task].load(config, where.data_root)
    with redirect_stdout(StringIO()):
        done = run.fit(config, build_network(config, len(images.classes)), images, where)
        return done, run.save_result(config, images, done, where)


def bytes_of(network):
    return {name: value.numpy().tobytes() for name, value in network.state_dict().items()}


@pytest.mark.parametrize("network", DETECTORS)
def test_every_detector_runs_from_configuration_to_result(network, where):
    config = tiny("detect", network=network, attention="scsa", epochs=1)
    done, result = train(config, where)
    assert result == load_result(result_path(config, where))
    assert {"train_loss", "AP", "AP50", "AP75"} <= set(result.final)
    assert ("mask_AP" in result.final) == (network == "mask_rcnn")
    assert all(0 <= result.final[name] <= 100 for name in result.final if "AP" in name)
    assert len(maps_of(done.network, [torch.rand(3, 64, 64)])) == len(attentions(done.network)) == 8


@pytest.mark.parametrize("network", ["upernet", "danet"])
def test_every_segmenter_runs_from_configuration_to_result(network, where):
    config = tiny("segment", network=network, attention="se", epochs=1)
    done, result = train(config, where)
    assert set(result.final) == {"train_loss", "mIoU", "mAcc", "aAcc"}
    assert result.id.startswith(f"scenes_{network}_se_seed0_")
    assert len(maps_of(done.network, torch.rand(1, 3, 64, 64))) == 8


@pytest.mark.parametrize("task", ["detect", "segment"])
def test_two_runs_are_equal_to_the_last_bit_and_workers_change_nothing(task, where, tmp_path):
    config = tiny(task, epochs=2)
    first, _ = train(config, where)
    other = where.model_copy(update={"cache_dir": tmp_path / "other", "workers": 1})
    second, _ = train(config, other)
    assert [e.metrics for e in first.epochs] == [e.metrics for e in second.epochs]
    assert bytes_of(first.network) == bytes_of(second.network)


def train_and_wait(say, config, where):
    "A run that says when it has begun step 2 of epoch 2, and waits there to be asked to leave."
    wait_at(run.task_class(config.task), 1, 1, say)
    train(config, where)


@pytest.fixture(scope="module")
def whole_run(request, tmp_path_factory):
    "A configuration, and the run of it that nobody disturbs."
    config, folder = tiny(request.param, attention="scsa"), tmp_path_factory.mktemp("uninterrupted")
    where = Execution(results_dir=folder / "results", cache_dir=folder / "cache", accelerator="cpu")
    return config, train(config, where)[0]


@pytest.mark.parametrize(
    ("whole_run", "how"),
    [
        ("detect", signal.SIGTERM),
        ("segment", signal.SIGKILL),
        pytest.param("detect", signal.SIGKILL, marks=pytest.mark.slow),
        pytest.param("segment", signal.SIGTERM, marks=pytest.mark.slow),
    ],
    indirect=["whole_run"],
)
def test_a_run_that_is_killed_or_asked_to_leave_ends_as_if_it_had_not_been(whole_run, how, where):
    config, whole = whole_run
    with child(train_and_wait, config, where) as (process, said):
        assert said.recv() == "in the middle"
        os.kill(process.pid, how)
        process.join(60)
        assert process.exitcode == (-how if how == signal.SIGKILL else 1)
    left = sorted(p.name for p in run_folder(config, where).glob("*.ckpt"))
    middle = ["epoch=0001-after-0000002.ckpt"] if how == signal.SIGTERM else []
    assert left == ["epoch=0000.ckpt", *middle]
    resumed, result = train(config, where)
    assert result.starts == 2 and bytes_of(resumed.network) == bytes_of(whole.network)
    assert [e.metrics for e in resumed.epochs] == [e.metrics for e in whole.epochs]


@pytest.fixture
def birds(tmp_path):
    "A data root with images of two classes in files of their own."
    generator = torch.Generator().manual_seed(0)
    for half, bird, number in product(("train", "val"), ("finch", "wren"), range(6)):
        file = tmp_path / "data" / "birds" / half / bird / f"{number}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        pixels = torch.randint(256, (3, 40, 40), generator=generator, dtype=torch.uint8)
        to_pil_image(pixels).save(file)
    return tmp_path / "data"


@pytest.mark.parametrize("workers", [0, 2])
def test_data_that_goes_away_in_mid_epoch_is_said_and_the_run_goes_on(workers, birds, where, monkeypatch):
    small = {"dataset": "folder:birds", "data_options": {"size": 32}, "network": "resnet8"}
    config = configure("sample", **SHORT_RUN, **small)
    here = where.model_copy(update={"data_root": birds, "workers": workers, "image_cache": False})
    kind, away = run.task_class("classify"), birds.with_name("away")
    step = kind.training_step

    def until_the_disk_is_gone(self, batch, batch_idx):
        if (self.trainer.current_epoch, batch_idx) == (1, 0):
            birds.rename(away)
        return step(self, batch, batch_idx)

    with monkeypatch.context() as patch:
        patch.setattr(kind, "training_step", until_the_disk_is_gone)
        said = r"^cannot reach \d.png \(No such file or directory\): .*birds.*restore the data.*resumes"
        with pytest.raises(DataError, match=said):
            train(config, here)
    away.rename(birds)
    done, result = train(config, here)
    whole, _ = train(config, here.model_copy(update={"cache_dir": where.cache_dir / "other"}))
    assert result.starts == 2 and bytes_of(done.network) == bytes_of(whole.network)


def test_an_epoch_of_steps_goes_through_the_images_as_often_as_it_takes(where):
    config = tiny("segment", epochs=2, epoch_steps=5)
    seen = []
    images = TASKS["segment"].load(config, None)
    pair = images.train.pair
    images.train.pair = lambda i: seen.append(i) or pair(i)
    with redirect_stdout(StringIO()):
        here = where.model_copy(update={"workers": 0})
        done = run.fit(config, build_network(config, len(images.classes)), images, here)
    assert len(seen) == 2 * 5 * 4 and done.task.steps_per_epoch == 5
    assert sorted(seen[:12]) == sorted(seen[20:32]) == list(range(12))


def test_the_polynomial_ends_at_nothing():
    config = configure("paper", task="segment")
    assert decay(config, 0) == 1 and decay(config, config.epochs) == 0
    assert rate_factor(config, 8000, 40_000) == pytest.approx(0.5**0.9)


def test_a_backbone_begins_with_the_weights_of_a_file(tmp_path):
    from torchvision.models import resnet18

    state = resnet18(weights=None).state_dict()
    torch.save(state, tmp_path / "body.pth")
    path = str(tmp_path / "body.pth")
    for task, options in (("detect", TINY | SMALL | {"width": 64}), ("segment", {"channels": 16})):
        config = tiny(task, attention="scsa", weights=path, network_options=options)
        body = TASKS[task].body(build_network(config, 4)).state_dict()
        kept = {name: value for name, value in state.items() if not name.startswith("fc.")}
        assert all(torch.equal(value, body[name]) for name, value in kept.items())


def test_weights_that_are_not_there_are_said():
    with pytest.raises(ValueError, match="'nowhere.pth' is neither 'imagenet', nor a file"):
        stock_weights("resnet18", "nowhere.pth")
    with pytest.raises(ValueError, match="torchvision has none for resnet8"):
        stock_weights("resnet8", "imagenet")


@pytest.mark.parametrize(("task", "options"), [("detect", TINY | SMALL), ("segment", {"channels": 16})])
def test_a_backbone_begins_with_the_network_in_the_book_that_has_its_mechanism(task, options):
    placed = {"attention": "scsa", "position": "before_last_conv"}
    config = tiny(task, **placed, weights="imagenette", network_options=options | {"width": 16})
    kept = load_file(ROOT / "data" / "networks" / "imagenette-scsa.safetensors")
    body = TASKS[task].body(build_network(config, 4)).state_dict()
    assert body.keys() == {key for key in kept if not key.startswith("fc.")}
    assert all(torch.equal(body[key], kept[key].to(body[key].dtype)) for key in body)


def test_a_mechanism_without_a_network_of_the_book_is_refused():
    with pytest.raises(ValueError, match="'imagenette' is neither .* has a network with cbam"):
        stock_weights("resnet18", "imagenette", "cbam")


def test_objects_that_are_found_exactly_have_a_precision_of_100():
    config = tiny("detect", network="mask_rcnn")
    images = TASKS["detect"].load(config, None)
    task = run.task_class("detect")(config, build_network(config, 10), images, 1)
    x, targets = images.test[BatchIndices(torch.arange(6))]
    exact = [
        {**t, "scores": torch.ones(len(t["labels"])), "masks": t["masks"][:, None].float()}
        for t in targets
    ]
    task.metrics.update(exact, targets)
    found = task.metrics.read()
    assert found["AP"] == found["mask_AP"] == 100


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("task", ["detect", "segment"])
def test_the_sample_learns_visibly_and_never_waits_for_images(task, seed, where):
    done, result = train(configure("sample", task=task, attention="scsa", seed=seed), where)
    metric = TASKS[task].metrics[0]
    first, last = (epoch.metrics[metric] for epoch in (done.epochs[0], done.epochs[-1]))
    assert last > first + 5
    assert result.data_wait < 0.1
