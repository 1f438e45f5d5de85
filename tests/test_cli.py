"""The command line: a complete run and sweep in a small book of its own, and messages for wrong arguments."""

import contextlib
import json
import os
import re
import shlex
import shutil
import subprocess
import sys

import click
import nbformat
import psutil
import pytest
import torch
import typer
from conftest import ROOT
from filelock import FileLock
from jupyter_core.utils import run_sync
from safetensors.torch import save_file

from scsa_book import cli
from scsa_book.evidence import gpu
from scsa_book.paths import KEEP_MEMORY
from scsa_book.training.config import Execution, RunConfig, configure
from scsa_book.training.result import load_result
from scsa_book.training.tasks import TASKS

TINY = {"train_images": 128, "test_images": 30, "batch_size": 32, "epochs": 1, "warmup_epochs": 0}
EXPERIMENTS = """
pair:
  title: one that works and one that does not
  preset: sample
  common: {train_images: 128, test_images: 30, batch_size: 32, epochs: 1, warmup_epochs: 0}
  runs:
    - {attention: se}
    - {lr: 1.0e+30}
"""


def scsa_book(*arguments, cwd, **environment):
    "The command in a process of its own, as typed in a shell."
    command = [sys.executable, "-m", "scsa_book.cli", *arguments]
    variables = {**os.environ, "OMP_NUM_THREADS": "1", **environment}
    return subprocess.run(command, cwd=cwd, env=variables, capture_output=True, text=True)


def said(capsys, *arguments):
    "Exit code, output and error of a command in this process."
    with pytest.raises(SystemExit) as end:
        cli.main(list(arguments))
    found = capsys.readouterr()
    return end.value.code, found.out, found.err


@pytest.fixture(scope="module")
def book(tmp_path_factory):
    "A book with the run notebooks, the sample data and one experiment; results of tests stay in it."
    root = tmp_path_factory.mktemp("book")
    (root / "_quarto.yml").touch()
    (root / "nbs" / "runs").mkdir(parents=True)
    for name in ("classify.ipynb", "Snakefile"):
        shutil.copy(ROOT / "nbs" / "runs" / name, root / "nbs" / "runs")
    (root / "nbs" / "runs" / "experiments.yml").write_text(EXPERIMENTS)
    (root / "data").symlink_to(ROOT / "data")
    return root


@pytest.fixture(scope="module")
def swept(book):
    return scsa_book("sweep", "pair", "--cores", "2", cwd=book)


@pytest.fixture
def inside(book, monkeypatch):
    monkeypatch.chdir(book)
    return book


@pytest.fixture(scope="module")
def ready(book):
    "A kernel for several runs; of the variables for its memory one was set before."
    with pytest.MonkeyPatch.context() as patch:
        one, other = KEEP_MEMORY
        patch.setenv(one, "1")
        patch.delenv(other, raising=False)
        with cli.kernel(book / "nbs" / "runs") as kernel:
            yield kernel


@pytest.fixture
def warm(ready, monkeypatch):
    "Runs do not start a kernel of their own."
    monkeypatch.setattr(cli, "kernel", lambda folder: contextlib.nullcontext(ready))


# ---- a sweep


def test_a_sweep_makes_what_it_can_and_reports_the_rest(swept, book):
    good = configure("sample", attention="se", **TINY).id
    bad = configure("sample", **TINY, lr=1e30).id
    assert swept.returncode == 1
    assert swept.stdout.startswith("pair: 2 runs, 0 finished\n")
    assert re.search(rf"\[\d/2\] {good}  top1 [\d.]+ %  top5 [\d.]+ %  of 30 images", swept.stdout)
    assert re.search(rf"\[\d/2\] failed: {bad}: the loss became nan at step 2 of epoch 1", swept.stdout)
    assert swept.stderr == f"scsa-book: 1 of 2 runs failed: {bad}\n"
    names = sorted(path.name for path in (book / "nbs" / "results" / "sample").iterdir())
    assert names == [f"{good}.ipynb", f"{good}.json"], "the other left a result"
    assert (book / ".cache" / "runs" / bad / "notebook.ipynb").is_file()
    attempts = (book / ".cache" / "sweeps" / "pair" / "attempts" / bad).read_text()
    assert attempts.count("begun") == 1, "another attempt would have ended like the first"


def test_the_result_of_a_sweep_is_that_of_its_configuration(swept, book):
    config = configure("sample", attention="se", **TINY)
    found = load_result(book / "nbs" / "results" / "sample" / f"{config.id}.json")
    assert found.config == config and found.machine.threads == 1


def test_the_page_of_a_run_is_clean_and_of_no_machine(swept, book):
    path = next((book / "nbs" / "results" / "sample").glob("*.ipynb"))
    page = nbformat.read(path, 4)
    assert page.cells[0].source.startswith("# se in resnet8 on fashion-mnist, seed 0\n\n> One network")
    assert set(page.metadata) == {"kernelspec"}
    tags = [tag for cell in page.cells for tag in cell.metadata.get("tags", [])]
    assert tags == ["parameters", "injected-parameters"]
    assert all(set(cell.metadata) <= {"tags"} for cell in page.cells)
    assert not any(cell.get("execution_count") for cell in page.cells)
    text = path.read_text()
    assert str(book) not in text and str(ROOT) not in text and sys.prefix not in text
    injected = next(c.source for c in page.cells if "injected-parameters" in c.metadata.get("tags", []))
    assert 'attention = "se"' in injected and "again" not in injected
    template = next(c.source for c in page.cells if c.metadata.get("tags") == ["parameters"])
    assert template.splitlines()[0].startswith('preset = "sample"') and " = None" not in template
    printed = [o for c in page.cells if c.cell_type == "code" for o in c.outputs if o.get("name") == "stdout"]
    assert [o["text"].count("epoch ") for o in printed] == [1]


def test_links_of_a_page_lead_to_chapters(swept, book):
    path = next((book / "nbs" / "results" / "sample").glob("*.ipynb"))
    links = re.findall(r"\]\(([^)]+\.ipynb)\)", path.read_text())
    assert links
    for link in links:
        assert (ROOT / "nbs" / "results" / "sample" / link).resolve().is_file(), link


# ---- one run


def test_a_finished_run_is_not_repeated(swept, inside, capsys, monkeypatch):
    monkeypatch.setattr(cli, "execute", lambda *a, **k: pytest.fail("it was"))
    words = [f"-p{name}={value}" for name, value in TINY.items()]
    code, out, _ = said(capsys, "run", "classify", "-p", "attention=se", *words)
    assert code == 0 and out.count("\n") == 1 and "finished before; --again repeats it" in out


def test_again_repeats_it(swept, inside, monkeypatch, capsys):
    given = {}
    result = load_result(next((inside / "nbs/results/sample").glob("*.json")))
    monkeypatch.setattr(cli, "execute", lambda task, parameters, *rest: given.update(parameters) or result)
    words = [f"-p{name}={value}" for name, value in TINY.items()]
    code, out, _ = said(capsys, "run", "classify", "--again", "-p", "attention=se", *words)
    assert code == 0 and given["again"] is True and "finished before" not in out


def test_a_run_without_its_data_says_what_is_missing(inside, warm, tmp_path, capsys):
    words = ("-p", "dataset=folder:birds", "--data-root", str(tmp_path))
    code, out, err = said(capsys, "run", "classify", *words)
    assert code == 2 and out == ""
    line = err.splitlines()[-1]
    assert line.startswith("scsa-book: folder-birds_resnet8_baseline_seed0")
    assert f"no folder `train`: {tmp_path}/birds. A folder of images has train/CLASS" in line
    assert "Traceback" not in err


def test_a_run_that_another_process_is_at_is_refused_at_once(inside, capsys):
    config = configure("sample", seed=99)
    folder = inside / ".cache" / "runs" / config.id
    folder.mkdir(parents=True)
    with FileLock(folder / "lock"):
        code, _, err = said(capsys, "run", "classify", "-p", "seed=99")
    assert code == 1 and f"{config.id} is being executed by another process" in err


# ---- mistakes


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["clasify"], "unknown task 'clasify'. Did you mean 'classify'"),
        (["classify", "-p", "atention=se"], "unknown parameter 'atention'. Did you mean 'attention'"),
        (["classify", "-p", "attention=scas"], "unknown attention 'scas'. Did you mean 'scsa'"),
        (
            ["classify", "-p", "attention=se", "-p", "options={reducton: 4}"],
            "unknown option of se 'reducton'",
        ),
        (["classify", "-p", "attention=scsa", "-p", "options={heads: 3}"], "channels=16"),
        (["classify", "-p", "dataset=mnist"], "unknown dataset 'mnist'"),
        (["classify", "--preset", "smaple"], "unknown preset 'smaple'. Did you mean 'sample'"),
        (["classify", "-p", "epochs=none"], "epochs='none': "),
        (["classify", "-p", "devices=0"], "devices=0: "),
        (["classify", "-p", "seed"], "-p 'seed' is not name=value"),
        (["classify", "-p", "options={a: "], "the value is not YAML"),
    ],
)
def test_a_mistake_is_one_line_and_code_2(inside, capsys, monkeypatch, words, message):
    monkeypatch.setattr(cli, "execute", lambda *a, **k: pytest.fail("it was started"))
    code, out, err = said(capsys, "run", *words)
    assert code == 2 and out == "" and err.startswith("scsa-book: ") and err.count("\n") == 1
    assert message in err


def test_an_unknown_experiment_lists_the_known_ones(inside, capsys):
    code, _, err = said(capsys, "sweep", "pear")
    assert code == 2 and "unknown experiment 'pear'. Did you mean 'pair'" in err


def test_a_disk_that_is_full_ends_with_code_1(inside, capsys, monkeypatch):
    from scsa_book.training.result import DiskError

    def full(*arguments):
        raise DiskError("cannot write x (No space left on device): 5 bytes needed, 0 free")

    monkeypatch.setattr(cli, "execute", full)
    code, _, err = said(capsys, "run", "classify", "-p", "seed=98")
    assert code == 1 and "No space left on device" in err


def test_stopping_by_hand_is_no_traceback(inside, capsys, monkeypatch):
    def stopped(*arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr(cli, "execute", stopped)
    assert said(capsys, "run", "classify", "-p", "seed=97") == (130, "", "")


def test_a_kernel_is_ready_for_a_run_and_keeps_memory(book, ready):
    code = "import sys; print(sorted({'torch', 'scsa_book.explain.runs'} & set(sys.modules)))"
    found = {}
    client = ready.client()
    client.start_channels()
    run_sync(client.wait_for_ready)(timeout=120)
    aggregate = lambda message: found.update(message["content"])  # noqa: E731
    run_sync(client.execute_interactive)(code, timeout=60, output_hook=aggregate)
    client.stop_channels()
    assert found["text"] == "['scsa_book.explain.runs', 'torch']\n"
    process = psutil.Process(ready.provisioner.pid)
    one, other = KEEP_MEMORY
    environment = process.environ()
    assert {name: environment[name] for name in KEEP_MEMORY} == {one: "1", other: KEEP_MEMORY[other]}
    assert process.cwd() == str(book / "nbs" / "runs")


def test_a_kernel_ends_with_the_block_and_so_do_its_variables(tmp_path, monkeypatch):
    "Variables that are set keep their values, and the others are unset again afterwards."
    monkeypatch.setattr(cli, "READY", [])
    one, other = KEEP_MEMORY
    monkeypatch.setenv(one, "1")
    monkeypatch.delenv(other, raising=False)
    with pytest.raises(ZeroDivisionError), cli.kernel(tmp_path) as kernel:
        process = psutil.Process(kernel.provisioner.pid)
        raise ZeroDivisionError
    assert not process.is_running()
    assert os.environ[one] == "1" and other not in os.environ


def test_a_run_that_is_asked_to_leave_says_so_and_the_next_one_ends_it(inside, warm, capsys):
    book = inside
    # SIGTERM reaches this command alone; the training is in a process that it has started.
    many = {**TINY, "epochs": 15, "seed": 5}
    words = [f"{name}={value}" for name, value in many.items()]
    parameters = [word for pair in words for word in ("-p", pair)]
    command = [sys.executable, "-m", "scsa_book.cli", "run", "classify", *parameters]
    quiet = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    process = subprocess.Popen(command, cwd=book, env={**os.environ, "OMP_NUM_THREADS": "1"}, **quiet)
    assert any(line.startswith("epoch 2/15") for line in process.stderr)
    process.terminate()
    out, err = process.communicate(timeout=60)
    assert (process.returncode, out) == (1, "")
    assert re.search(r"terminated after \d+ epochs; the same call resumes there", err)
    assert "Traceback" not in err
    code, out, err = said(capsys, "run", "classify", *parameters)
    config = configure("sample", **many)
    assert code == 0 and out.count("\n") == 1 and out.startswith(config.id)
    assert "epoch 15/15  train_loss" in err and "Traceback" not in err
    assert not (book / ".cache" / "runs" / config.id / "notebook.ipynb").exists()
    page = book / "nbs" / "results" / "sample" / f"{config.id}.ipynb"
    assert page.is_file()
    result = load_result(page.with_suffix(".json"))
    assert result.starts == 2 and [e.epoch for e in result.epochs] == [*range(1, 16)]


# ---- lists


def test_list_names_everything_and_the_finished_runs(swept, inside, capsys):
    code, out, _ = said(capsys, "list")
    assert code == 0
    for word in ("scsa", "resnet20", "fashion-mnist", "folder:NAME", "paper", "pair"):
        assert re.search(rf"(^|\s){word}(\s|$)", out), word
    assert configure("sample", attention="se", **TINY).id in out


def test_the_doctor_says_what_is_there_and_what_is_missing(inside, capsys, monkeypatch, tmp_path):
    monkeypatch.setenv("SCSA_BOOK_DATA", str(tmp_path))
    monkeypatch.setenv("PATH", str(tmp_path))
    code, out, _ = said(capsys, "doctor")
    lines = dict(line.split(maxsplit=1) for line in out.splitlines() if not line.startswith("data root"))
    assert code == 0 and lines["fashion-mnist"] == "found"
    assert "torch" in lines["versions"] and str(inside) in lines["book"]
    assert f"{tmp_path}/cifar-100-python" in lines["cifar100"] and "not here" in lines["imagenet"]
    assert lines["quarto"].startswith("not found")


def test_the_doctor_finds_damaged_data(tmp_path, capsys, monkeypatch):
    (tmp_path / "nbs" / "runs").mkdir(parents=True)
    (tmp_path / "_quarto.yml").touch()
    monkeypatch.chdir(tmp_path)
    code, out, _ = said(capsys, "doctor")
    assert code == 0 and re.search(r"fashion-mnist +not here: no file t10k", out)


def test_the_ledger_counts_the_cells_of_every_table(capsys):
    code, out, _ = said(capsys, "ledger")
    assert code == 0 and re.search(r"^scsa +IV +.*\d+ equal", out, re.M)


def test_help_needs_nothing_heavy():
    code = (
        "import sys\nfrom scsa_book import cli\n"
        "try: cli.main(['--help'])\nexcept SystemExit: pass\n"
        "print(sorted({'torch', 'lightning', 'papermill', 'pydantic', 'pandas'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"
    for command in ("run", "sweep", "list", "ledger", "doctor"):
        assert re.search(rf"^  {command} ", done.stdout, re.M)


# ---- the run notebooks


@pytest.mark.parametrize("path", [ROOT / "nbs" / "runs" / f"{task}.ipynb" for task in TASKS], ids=list(TASKS))
def test_a_run_notebook_has_a_parameter_for_every_setting(path):
    cells = json.loads(path.read_text())["cells"]
    source = next("".join(c["source"]) for c in cells if "parameters" in c["metadata"].get("tags", []))
    names = set(re.findall(r"^(\w+) = ", source, re.M))
    of_others = {"backbone"}
    others = of_others if path.stem == "classify" else {"label_smoothing"}
    assert names == (set(RunConfig.model_fields) | set(Execution.model_fields)) - {"task"} - others


@pytest.mark.parametrize("word", ["lr=1e-3", "lr=0.001", "lr=.001"])
def test_numbers_may_be_written_in_any_way(word):
    assert configure("sample", **cli.parse_parameters([word])).lr == 0.001


def test_a_network_without_attention_is_exported_by_either_name():
    plain, none = (cli.network_of_file("resnet20", name, None, 10).state_dict() for name in (None, "none"))
    assert plain.keys() == none.keys() < cli.network_of_file("resnet20", "se", None, 10).state_dict().keys()


def test_weights_that_do_not_fit_are_described(tmp_path, capsys):
    own = cli.network_of_file("resnet20", "se", None, 10)
    save_file({f"network.{k}": v for k, v in own.state_dict().items()}, tmp_path / "own.safetensors")
    how = ["export", "resnet20", "--weights", str(tmp_path / "own.safetensors")]
    code, _, err = said(capsys, *how, "--classes", "10")
    assert code == 2 and "own.safetensors does not fit this network: unexpected: " in err
    assert "--attention and --classes must be" in err and err.count("\n") == 1
    code, _, err = said(capsys, *how, "--attention", "se", "--classes", "7")
    assert code == 2 and re.search(r"network: other shape: \S+ is \(10, 64\) instead of \(7, 64\)", err)
    state = own.state_dict()
    save_file({k: v for k, v in state.items() if "num_batches" not in k}, tmp_path / "old.safetensors")
    old = cli.network_of_file("resnet20", "se", tmp_path / "old.safetensors", 10).state_dict()
    assert all(torch.equal(v, state[k]) for k, v in old.items())


def commands_in(text):
    "The commands of `scsa-book` that a text names, in code or as lines of a shell, without placeholders."
    found = re.findall(r"`scsa-book ([^`<{]+)`|^(?:uv run )?scsa-book ([^#\n|]+)", text, re.M)
    return {(one or other).strip() for one, other in found}


def test_every_command_that_is_named_exists():
    "Also its options, and no word too many: `scsa-book list results` was none."
    texts = [(ROOT / "README.md").read_text("utf-8")]
    for path in (p for p in (ROOT / "nbs").rglob("*.ipynb") if "_txt" not in p.parts):
        texts += [cell["source"] for cell in json.loads(path.read_text("utf-8"))["cells"]]
    for words in sorted(set().union(*(commands_in("".join(text)) for text in texts))):
        command, rest = typer.main.get_command(cli.app), shlex.split(words)
        while rest and hasattr(command, "commands"):
            command, rest = command.commands[rest[0]], rest[1:]
        if not hasattr(command, "commands"):
            context = click.Context(command)
            assert not command.make_parser(context).parse_args(rest)[1], words


def test_a_checkout_that_is_not_there_is_refused_at_once(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(gpu, "keep_memory", lambda: pytest.fail("it starts anew first"))
    for folder, why in ((tmp_path / "none", "does not exist"), (tmp_path, "no checkout of the book")):
        code, _, err = said(capsys, "bench", "gpu", "--device", "cpu", "--against", str(folder))
        assert code == 2 and why in err


def test_export_of_a_weights_file_in_eight_bits(tmp_path, capsys):
    "The weights of the file, and calibration on photographs; a folder without any is named."
    network = cli.network_of_file("resnet8", "se", None, 10)
    save_file(network.state_dict(), tmp_path / "own.safetensors")
    how = ["export", "resnet8", "--attention", "se", "--classes", "10", "--size", "32"]
    how += ["--weights", str(tmp_path / "own.safetensors"), "--file", str(tmp_path / "small")]
    code, out, _ = said(capsys, *how, "--int8", str(ROOT / "data" / "coco-mini" / "val2017"))
    assert code == 0 and "largest error" in out
    assert (tmp_path / "small.onnx").stat().st_size < (tmp_path / "own.safetensors").stat().st_size / 2
    code, _, err = said(capsys, *how, "--int8", str(tmp_path))
    assert code == 2 and "has no images for calibration" in err
