"""Evaluation of a checkpoint: as in a plain loop, after an interruption, and what is refused at once."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch
from conftest import ROOT
from safetensors.torch import load_file, save_file
from torchvision.transforms.functional import to_pil_image

from scsa_book import cli, paths
from scsa_book.evidence import ledger
from scsa_book.networks import authors
from scsa_book.paths import DataError, embedded
from scsa_book.training.config import Execution, configure
from scsa_book.training.evaluate import (
    DEFAULT,
    Classified,
    evaluate,
    load_images,
    load_network,
    plan,
    save_evaluation,
)
from scsa_book.training.evaluation import (
    Evaluation,
    EvaluationResult,
    evaluation_path,
    evaluations,
    printed,
    verdict_of,
    wilson,
)  # fmt: skip
from scsa_book.training.keep import keep, kept_networks, load_kept
from scsa_book.training.run import fit, save_result
from scsa_book.training.tasks import TASKS, build_network


@pytest.fixture
def where(tmp_path):
    return Execution(
        results_dir=tmp_path / "results", cache_dir=tmp_path / "cache", accelerator="cpu", workers=0
    )


@pytest.fixture(scope="module")
def photographs(tmp_path_factory):
    "A folder of images of several sizes, and weights of a small network of the authors for it."
    root = tmp_path_factory.mktemp("data")
    generator = torch.Generator().manual_seed(0)
    for split, count in (("train", 1), ("val", 11)):
        for label, word in enumerate(("one", "three", "two")):
            folder = root / "mine" / split / word
            folder.mkdir(parents=True)
            for i in range(count):
                size = (40 + 3 * i, 52 - 2 * i + label)
                image = torch.randint(256, (3, *size), generator=generator, dtype=torch.uint8)
                to_pil_image(image).save(folder / f"{i:02}.png")
    torch.manual_seed(0)
    torch.save(authors.to_authors(authors.build("se_resnet20", 3), "se_resnet20"), root / "se.pth")
    return root


def whole(checkpoint, where, root=None, batch_size=4, **given):
    "A whole evaluation."
    e, path, run = plan(checkpoint, **given)
    images = load_images(e, run, root)
    network = load_network(e, path, run, len(images.classes))
    done = evaluate(e, network, images, run, where, batch_size, store_every=0)
    return save_evaluation(e, network, images, done, run, where), done, images, network


SMALL = {"name": "se_resnet20", "data": "folder:mine", "resize": 36, "crop": 32}


def test_the_network_that_comes_with_the_book_has_the_accuracy_of_its_run(where):
    result, *_ = whole(None, where, batch_size=250)
    stated = json.loads(embedded(DEFAULT).with_suffix(".json").read_text())["final"]
    assert result.metrics == {k: stated[k] for k in ("top1", "top5")}
    assert {claim.verdict for claim in result.claims.values()} == {"equal"}
    right = sum(right for right, _ in result.right.values())
    assert right == round(result.metrics["top1"] * 20) and len(result.mistakes) == 10


def test_the_numbers_are_those_of_a_plain_loop(photographs, where):
    from PIL import Image
    from torchvision.transforms import v2

    result, done, images, network = whole(photographs / "se.pth", where, photographs, **SMALL)
    cut = v2.Compose([v2.Resize(36), v2.CenterCrop(32), v2.ToImage(), v2.ToDtype(torch.float32, scale=True),
                      v2.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))])  # fmt: skip
    files = sorted((photographs / "mine" / "val").rglob("*.png"))
    labels = torch.tensor([images.classes.index(file.parent.name) for file in files])
    with torch.no_grad():
        logits = torch.cat([network(cut(Image.open(file))[None]) for file in files])
    table = done.counted.table()
    assert torch.equal(table["labels"], labels)
    assert torch.equal(table["top5"][:, 0], logits.argmax(1))
    assert torch.allclose(table["confidence"], logits.softmax(1).amax(1), atol=1e-5)
    right = int((logits.argmax(1) == labels).sum())
    assert result.metrics["top1"] == round(100 * right / 33, 4)
    assert result.intervals["top1"] == wilson(right, 33)


def test_an_interrupted_evaluation_goes_on_and_gives_the_same(photographs, tmp_path, monkeypatch):
    folders = [
        Execution(results_dir=tmp_path / n, cache_dir=tmp_path / f"{n}c", accelerator="cpu", workers=0)
        for n in "ab"
    ]
    once, *_ = whole(photographs / "se.pth", folders[0], photographs, **SMALL)
    update, batches = Classified.update, []

    def interrupted(self, *batch):
        batches.append(batch)
        if len(batches) == 4:
            raise KeyboardInterrupt
        update(self, *batch)

    monkeypatch.setattr(Classified, "update", interrupted)
    with pytest.raises(KeyboardInterrupt):
        whole(photographs / "se.pth", folders[1], photographs, **SMALL)
    monkeypatch.undo()
    twice, *_ = whole(photographs / "se.pth", folders[1], photographs, **SMALL)
    alone = {"starts", "seconds", "finished"}
    assert (once.starts, twice.starts) == (1, 2)
    assert once.model_dump(exclude=alone) == twice.model_dump(exclude=alone)


def test_damaged_progress_is_begun_anew(photographs, where):
    once, *_ = whole(photographs / "se.pth", where, photographs, **SMALL)
    for path in where.cache_dir.rglob("progress.pt"):
        path.write_bytes(path.read_bytes()[:100])
    again, *_ = whole(photographs / "se.pth", where, photographs, **SMALL)
    assert again.metrics == once.metrics and again.starts == 1


@pytest.mark.slow
def test_a_killed_command_goes_on_and_gives_the_same(photographs, tmp_path):
    command = [sys.executable, "-m", "scsa_book.cli", "evaluate", str(photographs / "se.pth")]
    command += ["--data", "folder:mine", "--name", "se_resnet20", "--data-root", str(photographs)]
    options = {"resize": 36, "crop": 32, "workers": 0, "batch_size": 1, "accelerator": "cpu"}

    def start(name):
        folders = {"results_dir": tmp_path / name, "cache_dir": tmp_path / f"{name}-cache"}
        words = [w for k, v in (options | folders).items() for w in ("-p", f"{k}={v}")]
        return subprocess.Popen(
            command + words, cwd=ROOT, start_new_session=True, stdout=subprocess.PIPE, text=True
        )

    whole_text = start("once").communicate(timeout=300)[0]
    process = start("killed")
    while not list((tmp_path / "killed-cache").rglob("notebook.ipynb")):
        time.sleep(0.2)
    time.sleep(4)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    assert start("killed").communicate(timeout=300)[0] == whole_text


def test_outputs_can_be_chosen_for_the_classes(photographs, where):
    torch.save(authors.to_authors(authors.build("se_resnet20", 9), "se_resnet20"), photographs / "nine.pth")
    with pytest.raises(ValueError, match="9 outputs and folder:mine 3 classes"):
        whole(photographs / "nine.pth", where, photographs, **SMALL)
    result, done, *_ = whole(photographs / "nine.pth", where, photographs, **SMALL, class_indices=(7, 0, 3))
    assert set(done.counted.table()["labels"].tolist()) == {7, 0, 3} and len(result.right) == 3
    for wrong in ((0, 1), (0, 0, 1), (0, 1, 9)):
        with pytest.raises(ValueError, match="class_indices"):
            whole(photographs / "nine.pth", where, photographs, **SMALL, class_indices=wrong)


@pytest.mark.parametrize("task", ["segment", "detect"])
def test_networks_of_other_tasks_have_the_numbers_of_their_run(where, task):
    scenes = {"scenes": {"side": 64, "objects": 2, "size": 0.5}}
    options = {"segment": {"channels": 16}, "detect": {
        "width": 8, "pyramid_channels": 16, "head_channels": 16, "anchor_scale": 4,
        "min_size": 64, "max_size": 64,
    }}[task]  # fmt: skip
    config = configure("sample", task=task, data_options=scenes, network_options=options, train_images=8,
                       test_images=6, batch_size=4, epochs=1, warmup_epochs=0)  # fmt: skip
    images = TASKS[task].load(config, None)
    done = fit(config, build_network(config, len(images.classes)), images, where)
    run = save_result(config, images, done, where)
    file = where.cache_dir / "weights.pth"
    torch.save(done.network.state_dict(), file)
    file.with_suffix(".json").write_text(run.model_dump_json())
    result, *_ = whole(file, where, batch_size=4)
    assert result.metrics == {k: run.final[k] for k in result.metrics}
    assert {claim.verdict for claim in result.claims.values()} == {"equal"}


def test_the_interval_is_wilsons():
    low, high = wilson(38_745, 50_000)  # 77.49 %
    assert (low, high) == pytest.approx((77.122, 77.854), abs=1e-3)
    assert wilson(0, 10)[0] == 0 and wilson(10, 10)[1] == 100


def test_what_does_not_exist_is_refused_before_anything_is_loaded(photographs):
    for given, message in (
        ({"checkpoint": photographs / "none.pth", "name": "se_resnet20", "data": "cifar100"}, "no such file"),
        ({"checkpoint": photographs / "se.pth", "name": "se_resnet20"}, "data: say on what"),
        ({"checkpoint": photographs / "se.pth", "name": "se_resnet21", "data": "cifar100"}, "se_resnet20"),
        ({"data": "imagenette"}, "unknown dataset"),
        ({"resize": 200}, "evaluated at their own size"),
    ):
        with pytest.raises(ValueError, match=message):
            plan(**given)


# --- beside the printed number


def stored_result(where, right, of=50_000, **changes):
    "The result of an evaluation of SCSA's own ResNet-50 with so many right images."
    e = Evaluation(
        checkpoint="scsa.pth",
        sha256="0",
        network="scsa_resnet50",
        task="classify",
        dataset="imagenet",
        **changes,
    )
    base = json.loads(embedded(DEFAULT).with_suffix(".json").read_text())
    result = EvaluationResult(
        id=e.id, config=e, about="", metrics={"top1": 100 * right / of},
        intervals={"top1": wilson(right, of)}, parameters=1, starts=1, seconds=1,
        finished=base["finished"], machine=base["machine"], code=base["code"],
        data={**base["data"], "test_images": of},
    )  # fmt: skip
    path = evaluation_path(e, where)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(result.model_dump_json())
    return evaluations(path.parent)


def test_the_ledger_joins_an_evaluation_to_the_cell_of_its_network(where):
    cell = printed("scsa_resnet50", "imagenet")["top1"]
    assert cell.value == "77.49" and printed("se_resnet50", "imagenet") == {}
    row = ledger.evaluated(cell, stored_result(where, 38_745))
    assert row.status == "equal" and row.ours.startswith("77.49")
    assert ledger.evaluated(cell, stored_result(where, 37_000)).status == "differs"
    assert ledger.evaluated(cell, []) is None


def test_a_part_of_the_images_is_another_scale(where):
    cell = printed("scsa_resnet50", "imagenet")["top1"]
    found = stored_result(where, 775, 1000, test_images=1000)
    assert ledger.evaluated(cell, found).status == "other_scale"


def test_a_verdict_counts_the_last_digit():
    assert verdict_of(77.1, 77.8, 77.85, 0.01) == "differs"
    assert verdict_of(77.1, 77.8, 77.8, 0.1) == "equal" and verdict_of(77.1, 77.8, 77.9, 0.1) == "differs"


# --- the command


def test_the_command_says_accuracy_interval_and_claim(tmp_path, capsys):
    words = [
        "-p",
        f"results_dir={tmp_path}",
        "-p",
        f"cache_dir={tmp_path / 'cache'}",
        "-p",
        "test_images=100",
    ]
    with pytest.raises(SystemExit) as end:
        cli.main(["evaluate", *words])
    said = capsys.readouterr().out
    assert not end.value.code and "top1" in said and "other images" in said and "of 100 images" in said
    with pytest.raises(SystemExit):
        cli.main(["evaluate", *words])
    assert "finished before" in capsys.readouterr().out
    pages = list((tmp_path / "evaluations").glob("*.ipynb"))
    assert len(pages) == 1 and "surest" in pages[0].read_text()
    shutil.rmtree(tmp_path / "cache")


def test_a_mistake_in_the_command_is_one_line(capsys):
    with pytest.raises(SystemExit) as end:
        cli.main(["evaluate", "--data", "imagenette"])
    said = capsys.readouterr().err
    assert end.value.code == 2 and said.count("\n") == 1 and "unknown dataset" in said


# --- networks that are kept


@pytest.mark.parametrize("attention, precision", [("scsa", "32-true"), ("cat", "bf16-mixed")])
def test_a_kept_network_evaluates_as_its_run_states(attention, precision, where, tmp_path):
    small = {"train_images": 64, "test_images": 150, "epochs": 1, "warmup_epochs": 0}
    config = configure("sample", attention=attention, precision=precision, channels_last=True, **small)
    images = TASKS["classify"].load(config, None)
    network = TASKS["classify"].build(config, 10)
    run = save_result(config, images, fit(config, network, images, where), where)
    path = keep(run, tmp_path / "kept.safetensors", where)
    result, _, _, again = whole(path, where, batch_size=50)
    kept = load_kept(path)
    assert result.metrics == kept.run.kept and {c.verdict for c in result.claims.values()} == {"equal"}
    assert kept.run.final == run.final and abs(run.final["top1"] - kept.run.kept["top1"]) < 2
    weights = load_file(path)
    assert (weights["conv1.weight"].dtype, weights["bn1.weight"].dtype) == (torch.float16, torch.float32)
    assert kept.classes == images.classes and not kept.network.training
    state = again.state_dict()
    assert all(torch.equal(state[k], v) for k, v in kept.network.state_dict().items())


def test_what_is_no_kept_network_is_refused(tmp_path, where):
    with pytest.raises(ValueError, match="there is no such file"):
        load_kept(tmp_path / "none.safetensors")
    save_file({"w": torch.ones(1)}, tmp_path / "w.safetensors")
    shutil.copy(embedded(DEFAULT).with_suffix(".json"), tmp_path / "w.json")
    with pytest.raises(ValueError, match="does not name its classes"):
        load_kept(tmp_path / "w.safetensors")
    run = load_kept(embedded(DEFAULT)).run
    with pytest.raises(ValueError, match=r"must end with \.safetensors"):
        keep(run, tmp_path / "w.pth", where)
    with pytest.raises(ValueError, match="no checkpoint of .* weights are kept where the run was made"):
        keep(run, tmp_path / "w.safetensors", where)


@pytest.mark.parametrize("path", kept_networks(), ids=lambda path: path.stem)
def test_networks_of_the_book_are_small_and_can_be_loaded(path):
    assert path.stat().st_size <= 2 * 2**20
    network, classes, run = load_kept(path)
    if run.config.task == "detect":
        [found] = network([torch.zeros(3, 96, 128)])
        assert found.keys() == {"boxes", "labels", "scores"} and (found["labels"] <= len(classes)).all()
    elif run.config.task == "segment":
        assert network(torch.zeros(1, 3, 96, 128)).shape == (1, len(classes), 96, 128)
    else:
        image = torch.zeros(1, *TASKS["classify"].facts(run.config.dataset).shape)
        assert network(image).shape == (1, len(classes))


@pytest.mark.slow
@pytest.mark.parametrize("path", kept_networks(), ids=lambda path: path.stem)
def test_networks_of_the_book_have_the_accuracy_that_they_state(path, where):
    "On all test images, to the last; needs SCSA_BOOK_DATA for datasets that the book does not hold."
    run = load_kept(path).run
    try:
        TASKS[run.config.task].load(run.config, paths.data_root())
    except DataError as error:
        pytest.skip(str(error))
    result, *_ = whole(path, where, paths.data_root(), batch_size=50)
    stated = run.kept or {name: run.final[name] for name in result.metrics}
    # less than one image in 10,000; the precision of a detection's score may move its rank
    assert result.metrics == pytest.approx(stated, abs=0.005)
