"""Configuration, training and results: guarantees of a run, also when it is interrupted."""

import errno
import json
import os
import signal
import subprocess
import zipfile
from contextlib import redirect_stdout
from datetime import timedelta
from io import StringIO
from pathlib import Path

import pytest
import torch
from children import child, wait_at
from filelock import FileLock
from lightning.pytorch.utilities.rank_zero import rank_zero_only

from scsa_book.attention import registry
from scsa_book.data.images import TensorImages, load_dataset
from scsa_book.networks.placement import maps_of
from scsa_book.training import checkpoints, experiments, history, result, run
from scsa_book.training import config as configs
from scsa_book.training.config import ConfigError, Execution, RunConfig, configure
from scsa_book.training.presets import PRESETS
from scsa_book.training.result import DiskError, finished, load_result, result_path
from scsa_book.training.task import Classify, decay, rate_factor
from scsa_book.training.tasks import build_network

TINY = {"train_images": 192, "test_images": 40, "batch_size": 32, "epochs": 4}


def tiny(**given):
    return configure("sample", **{**TINY, **given})


@pytest.fixture
def where(tmp_path):
    return Execution(results_dir=tmp_path / "results", cache_dir=tmp_path / "cache", accelerator="cpu")


def dataset_of(config):
    return load_dataset(config.dataset, None, config.train_images, config.test_images)


def train(config, where):
    images = dataset_of(config)
    with redirect_stdout(StringIO()):
        return run.fit(config, build_network(config, len(images.classes)), images, where)


def train_and_save(config, where):
    return run.save_result(config, dataset_of(config), train(config, where), where)


def bytes_of(network):
    return {name: value.numpy().tobytes() for name, value in network.state_dict().items()}


def metrics(done):
    return [epoch.metrics for epoch in done.epochs]


# ---- the configuration


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"attention": "scas"}, "unknown attention 'scas'. Did you mean 'scsa'"),
        ({"attention": "se", "options": {"reducton": 4}}, "unknown option of se 'reducton'.*'reduction'"),
        ({"attention": "se", "options": {"reduction": 0}}, "SE: reduction=0 must be a positive integer"),
        ({"attention": "scsa", "options": {"heads": 3}}, "channels=16.*heads=3"),
        ({"attention": "scsa", "position": "after_conv9"}, "no position 'after_conv9'.*after_conv1"),
        ({"dataset": "fashion"}, "unknown dataset 'fashion'. Did you mean 'fashion-mnist'"),
        ({"network": "resnet9"}, "unknown network 'resnet9'.*resnet8"),
        ({"preset": "smaple"}, "unknown preset 'smaple'. Did you mean 'sample'"),
        ({"atention": "se"}, "unknown parameter 'atention'. Did you mean 'attention'"),
        ({"epochs": 0}, "epochs=0: .*greater than or equal to 1"),
        ({"lr": -1}, "lr=-1: .*greater than 0"),
        ({"lr": float("nan")}, "lr=nan: .*finite"),
        ({"lr": "fast"}, "lr='fast': .*number"),
        ({"batch_size": 1}, "batch_size=1"),
        ({"optimizer": "adam"}, "optimizer='adam': .*'sgd' or 'adamw'"),
        ({"precision": "fp16"}, "precision='fp16': .*'bf16-mixed'"),
        ({"seed": -1}, "seed=-1"),
        ({"task": "draw"}, "unknown task 'draw'.*classify, detect, segment"),
        ({"task": "detect", "network": "resnet8"}, "unknown network 'resnet8'.*faster_rcnn"),
        ({"task": "detect", "dataset": "camvid"}, "unknown dataset 'camvid'.*bccd"),
        ({"task": "detect", "network": "mask_rcnn", "dataset": "bccd"}, "boxes and no masks: use scenes"),
        ({"task": "detect", "data_options": {"crop": 5}}, "unknown data option of the task detect 'crop'"),
        ({"task": "detect", "data_options": {"scenes": {"noise": 9}}}, "noise=9 must be a number from 0"),
        ({"task": "detect", "network_options": {"widht": 9}}, "'widht'"),
        ({"task": "segment", "backbone": "resnet9"}, "unknown network 'resnet9'"),
        ({"task": "segment", "attention": "se", "position": "nowhere"}, "no position 'nowhere'"),
        ({"backbone": "resnet18"}, "a backbone is for detectors"),
        ({"data_options": {"augment": "flip"}}, "unknown data option of the task classify 'augment'"),
        ({"options": {"reduction": 4}}, "options are given, but no attention"),
        ({"position": "after_conv2"}, "a position is given, but no attention"),
        ({"schedule": "step"}, "'step' needs milestones"),
        ({"schedule": "step", "milestones": [3, 9]}, r"milestones \[9\] are after the last epoch \(4\)"),
        ({"schedule": "step", "milestones": [3, 2]}, "milestones must rise"),
        ({"warmup_epochs": 4}, "warmup_epochs=4 leaves nothing of epochs=4"),
        ({"paper": "scsa"}, "the preset is not 'paper'"),
        ({"preset": "paper", "dataset": "cifar100"}, "no recipe of scsa for resnet50 on cifar100.*cat"),
    ],
)
def test_a_wrong_name_or_value_is_one_line_that_says_what_is_right(given, said):
    with pytest.raises(ConfigError, match=said) as error:
        configure(**given)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", registry.names())
def test_every_mechanism_can_be_asked_for(name):
    assert f"_{name}_" in configure("sample", network="resnet50", attention=name).id


@pytest.mark.parametrize(("task", "preset"), [(task, name) for task in PRESETS for name in PRESETS[task]])
def test_every_preset_can_be_asked_for_and_overridden(task, preset):
    config = configure(preset, task=task, attention="scsa")
    assert (config.task, config.preset) == (task, preset)
    changed = configure(preset, task=task, attention="scsa", lr=0.123, batch_size=7)
    assert (changed.lr, changed.batch_size) == (0.123, 7)
    assert changed.model_copy(update={"lr": config.lr, "batch_size": config.batch_size}) == config


VOC = {"task": "detect", "paper": "cat", "dataset": "voc0712"}


@pytest.mark.parametrize(
    ("given", "printed"),
    [  # as the papers print them
        ({"network": "resnet101"}, (100, 128, 0.05, 0.9, 1e-4, "step", (30, 60, 90), 0.1)),
        ({"network": "mobilenet_v2"}, (400, 96, 0.045, 0.9, 4e-5, "exponential", (), 0.98)),
        ({"paper": "cat", "network": "resnet50"}, (100, 256, 0.1, 0.9, 1e-4, "step", (30, 60, 90), 0.1)),
        ({"paper": "cat", "dataset": "cifar100"}, (200, 128, 0.001, 0.9, 5e-4, "step", (50, 100, 150), 0.1)),
        ({"task": "detect"}, (12, 2, 0.0025, 0.9, 1e-4, "step", (8, 11), 0.1)),
        ({"task": "detect", "network": "retinanet"}, (12, 2, 0.00125, 0.9, 1e-4, "step", (8, 11), 0.1)),
        (VOC, (18, 8, 0.02, 0.9, 1e-4, "step", (12, 16), 0.1)),
        ({"task": "segment"}, (10, 16, 0.01, 0.9, 5e-4, "poly", (), 0.1)),
    ],
)
def test_recipes_are_those_of_the_papers(given, printed):
    c = configure("paper", **given)
    found = (c.epochs, c.batch_size, c.lr, c.momentum, c.weight_decay, c.schedule, c.milestones, c.gamma)
    assert found == printed and c.optimizer == "sgd"


def test_recipes_that_count_steps():
    steps = {
        (18, 1000): configure("paper", task="detect", paper="cat", dataset="voc0712"),
        (9, 10_000): configure("paper", task="detect", paper="cat"),
        (10, 8000): configure("paper", task="segment"),
    }
    assert all((c.epochs, c.epoch_steps) == printed for printed, c in steps.items())


def test_ids_never_change():
    # Results are stored under these names: a change of this test renames every result.
    assert RunConfig().id == "fashion-mnist_resnet8_baseline_seed0_44136fa3"
    full = RunConfig(
        dataset="folder:birds", network="resnet50", attention="cbam", position="before_add",
        options={"reduction": 8, "bias": False}, epochs=3, lr=0.01,
        milestones=(1, 2), schedule="step", seed=7,
    )  # fmt: skip
    assert full.id == "folder-birds_resnet50_cbam_seed7_75879120"


def test_the_id_is_of_the_values_and_not_of_how_they_were_given():
    assert configure("sample", epochs="5").id == configure("sample", epochs=5.0).id
    one = configure("sample", attention="se", options={"reduction": 8, "bias": True})
    two = configure("sample", options={"bias": True, "reduction": 8}, attention="se")
    assert one.id == two.id
    assert configure("sample", attention="none").id == configure("sample", attention=None).id


def test_every_field_changes_the_id():
    base = RunConfig(attention="se")
    others = {
        "preset": "cpu", "dataset": "cifar100", "train_images": 5, "test_images": 5,
        "task": "detect", "data_options": {"augment": "none"}, "backbone": "resnet18", "epoch_steps": 7,
        "network_options": {"width": 16}, "weights": "imagenet", "power": 0.5,
        "network": "resnet20", "attention": "cbam", "position": "before_add",
        "options": {"reduction": 2}, "gain": 2.0,
        "epochs": 2, "batch_size": 8, "optimizer": "adamw", "lr": 1, "momentum": 0, "weight_decay": 0,
        "schedule": "constant", "milestones": (0,), "gamma": 0.5, "warmup_epochs": 0.5,
        "label_smoothing": 0.1, "precision": "bf16-mixed", "channels_last": True, "compile": True, "seed": 1,
    }  # fmt: skip
    ids = [RunConfig(**{"attention": "se", name: value}).id for name, value in others.items()]
    assert set(RunConfig.model_fields) - set(others) == {"paper"}
    assert len({base.id, *ids}) == len(others) + 1


def test_execution_is_no_part_of_the_id_and_knows_its_names():
    names = {"preset": "sample", "devices": 2, "workers": 3, "data_root": "/data", "seed": 1}
    config, execution = configs.from_notebook(names)
    assert config == configure("sample", seed=1)
    assert (execution.devices, execution.workers, execution.data_root) == (2, 3, Path("/data"))
    with pytest.raises(ConfigError, match="devices=0"):
        configs.from_notebook({"devices": 0})


def test_all_mechanisms_of_a_seed_share_the_networks_weights():
    plain = build_network(tiny(seed=3), 10).state_dict()
    for name in ("se", "cbam", "scsa"):
        state = build_network(tiny(seed=3, attention=name), 10).state_dict()
        assert set(plain) < set(state)
        assert all(torch.equal(value, state[key]) for key, value in plain.items())
    other = build_network(tiny(seed=4), 10).state_dict()
    assert not torch.equal(plain["conv1.weight"], other["conv1.weight"])


# ---- the learning rate


def test_rates_of_the_recipes():
    scsa = configure("paper")
    assert [round(decay(scsa, e), 6) for e in (29, 30, 59, 60, 90, 99)] == [1, 0.1, 0.1, 0.01, 0.001, 0.001]
    mobile = configure("paper", network="mobilenet_v2")
    assert decay(mobile, 10.5) == 0.98**10


def test_the_warm_up_ends_at_the_full_rate_and_the_cosine_at_nothing():
    config = tiny(warmup_epochs=1)
    factors = [rate_factor(config, 10, step) for step in range(40)]
    assert factors[:10] == [pytest.approx((s + 1) / 10) for s in range(10)]
    assert all(a >= b for a, b in zip(factors[9:], factors[10:], strict=False))
    assert factors[-1] < 0.01


def test_the_optimiser_steps_at_these_rates(where):
    config = tiny(epochs=2, warmup_epochs=0, schedule="step", milestones=[1], gamma=0.5)
    assert [e.lr for e in train(config, where).epochs] == [config.lr * 0.5, config.lr * 0.5]


# ---- the same numbers


def test_two_runs_are_equal_to_the_last_bit(where, tmp_path):
    config = tiny(epochs=2, attention="scsa", options={"dropout": 0.2})
    first = train(config, where)
    second = train(config, where.model_copy(update={"cache_dir": tmp_path / "other"}))
    assert bytes_of(first.network) == bytes_of(second.network)
    assert metrics(first) == metrics(second)


def test_worker_processes_change_no_number(where, tmp_path):
    config = tiny(epochs=2, train_images=96)
    first = train(config, where)
    second = train(config, where.model_copy(update={"cache_dir": tmp_path / "other", "workers": 2}))
    assert bytes_of(first.network) == bytes_of(second.network)


def test_mechanisms_see_the_same_batches_in_the_same_order(where, monkeypatch):
    seen, real = [], TensorImages.__getitem__

    def recorded(self, draw):
        x, y = real(self, draw)
        seen.append((draw.indices.tolist(), x.sum().item()))
        return x, y

    monkeypatch.setattr(TensorImages, "__getitem__", recorded)
    orders = []
    for attention in ("none", "se"):
        seen.clear()
        train(tiny(epochs=2, train_images=96, attention=attention), where)
        orders.append(list(seen))
    assert orders[0] == orders[1] and len(orders[0]) == 2 * (3 + 2)


def test_a_network_learns(where):
    config = configure("sample", train_images=1500, test_images=500, epochs=3)
    first, _, last = metrics(train(config, where))
    assert last["train_loss"] < first["train_loss"] and last["top1"] > 45, "chance is 10"


@pytest.fixture
def compiled(monkeypatch):
    "What a run compiles; the compiler keeps the operations as they are."
    real, parts = torch.nn.Module.compile, []

    def compile_eager(self):
        parts.append(type(self).__name__)
        real(self, backend="eager")

    monkeypatch.setattr(torch.nn.Module, "compile", compile_eager)
    return parts


def test_on_a_cpu_a_mechanism_that_a_gpu_gets_wrong_is_compiled(where, compiled, capsys):
    train(tiny(epochs=1, attention="cbam", compile=True), where)
    assert compiled == ["BasicBlock"] * 3 and "not compiled" not in capsys.readouterr().out


def test_a_compiled_network_keeps_its_names_and_can_be_looked_into(where, compiled):
    config = tiny(epochs=1, attention="se", compile=True)
    done = train(config, where)
    assert compiled
    assert list(done.network.state_dict()) == list(build_network(config, 10).state_dict())
    x = done.task.normalise(dataset_of(config).test.images[:2])
    assert {name: maps["channel"].shape[0] for name, maps in maps_of(done.network, x).items()} == {
        f"layer{i}.0.attention.after_conv2": 2 for i in (1, 2, 3)
    }


# ---- killed


def train_and_wait(say, config, where):
    "A run that says when it has begun step 4 of epoch 3, waits there to be asked to leave, and says so."
    wait_at(Classify, 2, 3, say)
    try:
        train(config, where)
    except run.RunInterrupted as error:
        say(str(error))


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    "A configuration, and the run of it without interruption."
    config = tiny(attention="scsa", options={"dropout": 0.2})
    folder = tmp_path_factory.mktemp("uninterrupted")
    return config, train(config, Execution(results_dir=folder, cache_dir=folder, accelerator="cpu"))


def test_a_run_that_is_killed_in_mid_epoch_ends_as_if_it_had_not_been(where, uninterrupted):
    config, whole = uninterrupted
    with child(train_and_wait, config, where) as (process, said):
        assert said.recv() == "in the middle"
        process.kill()
        process.join()
    assert process.exitcode == -signal.SIGKILL
    left = sorted(p.name for p in result.run_folder(config, where).glob("*.ckpt"))
    assert left == ["epoch=0000.ckpt", "epoch=0001.ckpt"]

    resumed = train(config, where)
    assert (resumed.starts, whole.starts) == (2, 1)
    assert [e.epoch for e in resumed.epochs] == [1, 2, 3, 4]
    assert metrics(resumed) == metrics(whole)
    assert bytes_of(resumed.network) == bytes_of(whole.network)


def test_a_run_that_is_asked_to_leave_goes_on_from_that_very_step(where, uninterrupted):
    config, whole = uninterrupted
    with child(train_and_wait, config, where) as (process, said):
        assert said.recv() == "in the middle"
        process.terminate()
        assert said.poll(60) and "terminated after 2 epochs; the same call resumes" in said.recv()
        process.join()
    assert process.exitcode == 0
    left = sorted(p.name for p in result.run_folder(config, where).glob("*.ckpt"))
    assert left == ["epoch=0000.ckpt", "epoch=0001.ckpt", "epoch=0002-after-0000004.ckpt"]

    seen, real = [], Classify.training_step
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Classify, "training_step", lambda *a: seen.append(a[2]) or real(*a))
        resumed = train(config, where)
    steps = resumed.task.steps_per_epoch
    assert seen == [*range(4, steps), *range(steps)]  # the rest of epoch 3, and epoch 4
    assert (resumed.starts, [e.epoch for e in resumed.epochs]) == (2, [1, 2, 3, 4])
    assert metrics(resumed) == metrics(whole)
    assert bytes_of(resumed.network) == bytes_of(whole.network)
    assert [p.name for p in result.run_folder(config, where).glob("*.ckpt")] == ["epoch=0003.ckpt"]


def test_too_little_memory_names_what_takes_less(where, monkeypatch):
    def greedy(self, batch, batch_idx):
        return torch.empty(2**60, dtype=torch.uint8)

    monkeypatch.setattr(Classify, "training_step", greedy)
    said = r"batch_size=\d+ \(it is \d+\), or precision=bf16-mixed.*can't allocate"
    with pytest.raises(run.OutOfMemory, match=said):
        train(tiny(), where)


def test_too_little_memory_of_a_gpu_is_known():
    assert run.is_out_of_memory(torch.OutOfMemoryError("CUDA out of memory"))
    assert not run.is_out_of_memory(RuntimeError("shapes do not fit"))


@pytest.fixture
def stopped(where, monkeypatch):
    "A run that was stopped in its third epoch by an error, and what it was."
    config, real = tiny(attention="se"), Classify.training_step

    def failing(self, batch, batch_idx):
        if self.trainer.current_epoch == 2 and batch_idx == 3:
            raise ZeroDivisionError
        return real(self, batch, batch_idx)

    monkeypatch.setattr(Classify, "training_step", failing)
    with pytest.raises(ZeroDivisionError):
        train(config, where)
    monkeypatch.setattr(Classify, "training_step", real)
    return config


def test_a_damaged_checkpoint_is_said_and_the_one_before_it_is_used(stopped, where, tmp_path, capsys):
    newest = result.run_folder(stopped, where) / "epoch=0001.ckpt"
    content = bytearray(newest.read_bytes())
    middle = len(content) // 2
    content[middle : middle + 64] = bytes(64)
    newest.write_bytes(content)
    images = dataset_of(stopped)
    resumed = run.fit(stopped, build_network(stopped, 10), images, where)
    assert "epoch=0001.ckpt is damaged and skipped" in capsys.readouterr().out
    whole = train(stopped, where.model_copy(update={"cache_dir": tmp_path / "uninterrupted"}))
    assert bytes_of(resumed.network) == bytes_of(whole.network) and metrics(resumed) == metrics(whole)


def test_when_no_checkpoint_can_be_read_the_run_begins_anew(stopped, where, tmp_path):
    for path in result.run_folder(stopped, where).glob("*.ckpt"):
        path.write_bytes(path.read_bytes()[:1000])
    resumed = train(stopped, where)
    assert resumed.starts == 1 and len(resumed.epochs) == 4


def test_of_a_finished_run_the_last_checkpoint_is_kept_and_used(stopped, where):
    done = train(stopped, where)
    folder = result.run_folder(stopped, where)
    assert [p.name for p in folder.glob("*.ckpt")] == ["epoch=0003.ckpt"]
    again = train(stopped, where)
    assert again.epochs == done.epochs and bytes_of(again.network) == bytes_of(done.network)


@pytest.mark.parametrize("rank", [0, 1])
def test_only_the_first_process_removes_and_renames_checkpoints(rank, tmp_path, monkeypatch):
    monkeypatch.setattr(rank_zero_only, "rank", rank)
    names = ["epoch=0000.ckpt", "epoch=0001.ckpt", "epoch=0002.ckpt"]
    for name in names[:2]:
        with zipfile.ZipFile(tmp_path / name, "w") as archive:
            archive.writestr("data", "content")
    (tmp_path / names[2]).write_bytes(b"cut off")
    assert checkpoints.newest_checkpoint(tmp_path).name == names[1]
    left = sorted(path.name for path in tmp_path.iterdir())
    assert left == (names[:2] + ["epoch=0002.damaged"] if rank == 0 else names)
    for clean, first in ((checkpoints.keep_last, [names[1]]), (checkpoints.forget, [])):
        clean(tmp_path)
        left = sorted(path.name for path in tmp_path.iterdir())
        assert left == (first if rank == 0 else names)


def test_again_forgets_what_was_there(where):
    config = tiny(epochs=1)
    first = train(config, where)
    second = train(config, where.model_copy(update={"again": True}))
    assert second.starts == 1 and second.started > first.started


def test_resuming_with_workers_keeps_the_order(stopped, where, tmp_path):
    resumed = train(stopped, where.model_copy(update={"workers": 1}))
    whole = train(stopped, where.model_copy(update={"cache_dir": tmp_path / "uninterrupted"}))
    assert bytes_of(resumed.network) == bytes_of(whole.network)


def test_a_run_that_was_interrupted_by_hand_has_no_result(where, monkeypatch):
    def interrupted(self, batch, batch_idx):
        raise KeyboardInterrupt

    monkeypatch.setattr(Classify, "training_step", interrupted)
    with pytest.raises((KeyboardInterrupt, SystemExit, run.RunInterrupted)):
        train_and_save(tiny(), where)
    assert not list(where.results_dir.rglob("*.json"))


# ---- one process at a time


def test_a_second_process_is_refused(where):
    config = tiny()
    folder = result.run_folder(config, where)
    folder.mkdir(parents=True)
    said = f"{config.id} is being trained by another"
    with FileLock(folder / "lock"), pytest.raises(checkpoints.RunBusy, match=said):
        train(config, where)
    assert not list(folder.glob("*.ckpt"))


# ---- a loss that is not finite


def test_a_loss_that_is_no_number_stops_the_run_and_says_where(where):
    config = tiny(lr=1e30, warmup_epochs=0)
    said = r"became nan at step 2 of epoch 1 \(step 2 of the run\).*smaller lr"
    with pytest.raises(history.NonFiniteLoss, match=said):
        train(config, where)
    assert not list(result.run_folder(config, where).glob("*.ckpt"))


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_the_monitor_finds_the_first_bad_step_among_many(bad):
    monitor = history.LossMonitor(tiny(precision="16-mixed"), epoch=2, steps_before=200, every=50)
    for step in range(49):
        monitor.add(torch.tensor(bad if step in (36, 40) else 1.0))
    said = f"{bad} at step 37 of epoch 3 .step 237.*precision=32-true"
    with pytest.raises(history.NonFiniteLoss, match=said):
        monitor.add(torch.tensor(1.0))


def test_the_monitor_adds_up_the_losses():
    monitor = history.LossMonitor(tiny(), epoch=0, steps_before=0, every=4)
    for value in range(10):
        monitor.add(torch.tensor(float(value)))
    monitor.check()
    assert (monitor.mean, monitor.steps) == (4.5, 10)


# ---- disks


def test_a_result_is_written_whole_or_not_at_all(where, monkeypatch):
    config = tiny(epochs=1)
    images, done = dataset_of(config), train(config, where)

    def full(_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(DiskError, match=r"cannot write .*\.json \(No space left.*bytes needed, .* free"):
        run.save_result(config, images, done, where)
    assert list(where.results_dir.rglob("*.*")) == [] and finished(config, where) is None


def test_too_little_space_is_noticed_before_training(where, monkeypatch):
    monkeypatch.setattr(result, "free_bytes", lambda folder: 1000)
    monkeypatch.setattr(run.L.Trainer, "fit", lambda *a, **k: pytest.fail("it trained"))
    with pytest.raises(DiskError, match=r"not enough space.*bytes needed, 1,000 free"):
        train(tiny(), where)


@pytest.mark.parametrize("folder", ["results_dir", "cache_dir"])
def test_a_folder_that_cannot_be_written_to_is_noticed_before_training(where, tmp_path, monkeypatch, folder):
    blocked = tmp_path / "a file"
    blocked.touch()
    monkeypatch.setattr(run.L.Trainer, "fit", lambda *a, **k: pytest.fail("it trained"))
    with pytest.raises(DiskError, match="cannot write .*a file"):
        train(tiny(), where.model_copy(update={folder: blocked}))


def test_a_disk_that_is_full_in_mid_run_is_named(where, monkeypatch):
    def full(*arguments, **options):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("lightning.fabric.plugins.io.torch_io._atomic_save", full)
    with pytest.raises(DiskError, match=r"cannot write .*cache.*No space left.*bytes needed"):
        train(tiny(), where)


# ---- results


def test_a_result_says_all_and_comes_back_as_it_was(where):
    config = tiny(epochs=2, attention="se", seed=5)
    saved = train_and_save(config, where)
    path = result_path(config, where)
    assert path == where.results_dir / "sample" / f"{config.id}.json"
    assert load_result(path) == saved == finished(config, where)
    assert saved.config == config and saved.id == config.id
    assert [e.epoch for e in saved.epochs] == [1, 2] and saved.final == saved.epochs[-1].metrics
    assert set(saved.final) == {"train_loss", "val_loss", "top1", "top5"}
    assert saved.final["top1"] <= saved.final["top5"] <= 100
    assert saved.data.test_images == 40
    assert saved.data.fingerprint == load_dataset("fashion-mnist").fingerprint
    assert saved.parameters == sum(p.numel() for p in build_network(config, 10).parameters())
    assert saved.machine.threads == torch.get_num_threads() and saved.machine.device
    assert set(saved.machine.versions) == {"python", *result.PACKAGES}
    assert "not installed" not in saved.machine.versions.values()
    assert saved.started < saved.finished and saved.started.utcoffset() == timedelta(0)
    assert 0 <= saved.data_wait < 1 and saved.images_per_second > 0


def test_top1_is_the_share_of_right_predictions(where):
    config = tiny(epochs=1, test_images=37)
    done = train(config, where)
    test = dataset_of(config).test
    right = (done.task(test.images).argmax(1) == test.labels).float().mean().item()
    assert done.epochs[-1].metrics["top1"] == round(100 * right, 4)


def test_a_broken_or_foreign_result_is_none(where):
    config = tiny()
    path = result_path(config, where)
    path.parent.mkdir(parents=True)
    for text in ("", "{", "[]", json.dumps({"id": config.id})):
        path.write_text(text)
        assert finished(config, where) is None
        assert list(result.all_results(where.results_dir)) == []


def test_code_is_its_commit_and_whether_the_tree_has_changes(tmp_path):
    def git(*words):
        identity = ["-c", "user.name=a", "-c", "user.email=a@b.c"]
        subprocess.run(["git", *identity, *words], cwd=tmp_path, check=True, capture_output=True)

    assert result.code_state(tmp_path) == result.Code(commit=None, dirty=None)
    git("init")
    (tmp_path / "a.py").write_text("1")
    git("add", "a.py")
    git("commit", "-m", "first")
    clean = result.code_state(tmp_path)
    assert len(clean.commit) == 40 and clean.dirty is False
    (tmp_path / "nbs/results/gpu").mkdir(parents=True)
    (tmp_path / "nbs/results/gpu/run.json").write_text("{}")
    assert result.code_state(tmp_path).dirty is False, "a result of another run is no change of the code"
    (tmp_path / "a.py").write_text("2")
    assert result.code_state(tmp_path) == result.Code(commit=clean.commit, dirty=True)


# ---- experiments


def test_the_listed_experiments_can_all_be_made():
    listed = experiments.load_experiments()
    assert "sample" in listed
    for name, experiment in listed.items():
        if "-table-" not in name:  # those have a test of their own
            assert len(experiment.plan()) == len(experiment.rows) * len(experiment.seeds), name


def test_the_sample_experiment_is_paired():
    plan = [config for config, _ in experiments.experiment("sample").plan()]
    seeds = {}
    for config in plan:
        seeds.setdefault(config.attention, set()).add(config.seed)
    assert set(seeds) == {None, "se", "cbam", "scsa"}
    assert all(found == {0, 1, 2} for found in seeds.values())


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("a: {title: t, preset: sample}", "runs"),
        ("a: {title: t, preset: sample, runs: []}", "at least 1 item"),
        ("a: {title: t, preset: sample, runs: [{}], sedes: [1]}", "sedes=.*not permitted"),
        ("a: {title: t, preset: sample, runs: [{}], options: {scas: {}}}", "Did you mean 'scsa'"),
        ("a: {title: t, preset: sample, runs: [{}], at: {sampel: {}}}", "at.sampel.*'sample'"),
        ("a: [", "not a list of experiments"),
        ("just words", "not a list of experiments"),
    ],
)
def test_a_mistake_in_the_list_is_said(tmp_path, text, said):
    path = tmp_path / "experiments.yml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=said):
        experiments.load_experiments(path)


def test_several_names_are_a_run_each():
    runs = [{"network": ["resnet8", "resnet14"], "attention": ["none", "se"]}, {"attention": "eca"}]
    made = experiments.Experiment(title="t", preset="sample", runs=runs, seeds=[3, 4])
    found = [(c.network, c.attention, c.seed) for c, _ in made.plan()]
    pairs = [("resnet8", None), ("resnet8", "se"), ("resnet14", None), ("resnet14", "se"), ("resnet8", "eca")]
    assert found == [(*pair, seed) for seed in (3, 4) for pair in pairs]  # a seed is a whole table


def test_options_of_a_mechanism_yield_to_those_of_the_preset_and_those_to_a_runs_own():
    at = {"sample": {"options": {"se": {"reduction": 4}}, "overrides": {"network": None}}}
    runs = [{"network": "resnet50", "attention": ["se", "eca"]}]
    runs += [{"network": "resnet50", "attention": "se", "options": {"reduction": 2}}]
    options = {"se": {"bias": False, "reduction": 8}}
    made = experiments.Experiment(title="t", preset="gpu", runs=runs, options=options, at=at)
    se, eca, own = (config for config, _ in made.plan())
    assert [c.network for c in (se, eca, own)] == ["resnet50"] * 3
    assert (se.options, eca.options) == ({"bias": False, "reduction": 8}, {})
    assert own.options == {"bias": False, "reduction": 2}
    se, eca, own = (config for config, _ in made.plan("sample"))
    assert [c.network for c in (se, eca, own)] == ["resnet8"] * 3
    assert (se.options, eca.options) == ({"bias": False, "reduction": 4}, {})
    assert own.options == {"bias": False, "reduction": 2}


def test_what_begins_with_a_dot_is_no_experiment(tmp_path):
    path = tmp_path / "experiments.yml"
    text = ".shared: &s {se: {reduction: 4}}\na: {title: t, preset: sample, runs: [{}], options: *s}"
    path.write_text(text)
    assert list(experiments.load_experiments(path)) == ["a"]


@pytest.mark.parametrize(("preset", "rate"), [("sample", 0.001), ("cpu", 0.001), ("gpu", 0.01)])
def test_a_detector_of_one_stage_takes_every_preset(preset, rate):
    own = configure(preset, task="detect")
    light = configure(preset, task="detect", network="retinanet")
    proposals = {k for k in own.network_options if k.startswith(("rpn_", "box_"))}
    assert light.network_options.items() <= own.network_options.items()
    assert proposals == own.network_options.keys() - light.network_options.keys()
    assert light.lr == rate < own.lr and light.epochs == own.epochs
    assert configure(preset, task="detect", network="retinanet", lr=0.5).lr == 0.5


def test_a_mistake_in_a_run_is_said():
    wrong = experiments.Experiment(title="t", preset="sample", runs=[{"attention": "scas"}])
    with pytest.raises(ConfigError, match="Did you mean 'scsa'"):
        wrong.plan()
