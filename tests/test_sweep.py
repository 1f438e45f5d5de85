"""Sweeps: Snakemake and the driver are the real ones; a run is a stand-in that waits."""

import contextlib
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from types import SimpleNamespace

import psutil
import pytest
import yaml
from children import child
from conftest import ROOT
from filelock import FileLock

from scsa_book.paths import data_root
from scsa_book.training import sweep as sweeps
from scsa_book.training.experiments import experiment
from scsa_book.training.result import finished, load_result

pytest.importorskip("snakemake", reason="a sweep needs Snakemake")

EXPERIMENTS = """
twelve:
  title: four networks, three seeds
  preset: sample
  common: {train_images: 128, test_images: 30, batch_size: 32, epochs: 1, warmup_epochs: 0}
  seeds: [0, 1, 2]
  runs: [{attention: none}, {attention: se}, {attention: eca}, {attention: scsa}]
three:
  title: two that work and one that does not
  preset: sample
  common: {epochs: 1, warmup_epochs: 0}
  runs: [{attention: se, options: {reduction: 4}}, {attention: none, lr: 1.0e+30}, {attention: eca}]
"""

# `scsa-book job` with a short stand-in for the training.
WORKER = """
import os, sys, time
from datetime import datetime, timezone
from pathlib import Path
from filelock import FileLock
from scsa_book.paths import cache_folder
from scsa_book.training import sweep
from scsa_book.training.result import Code, Data, Epoch, Machine, RunResult, result_path, write_atomic

def execute(task, parameters, config, execution):
    assert task == "classify" and parameters["preset"] == config.preset and "task" not in parameters
    with FileLock(cache_folder() / config.id / "lock", timeout=0):
        with open(cache_folder() / config.id / "starts", "a") as file:
            gpu, threads = os.environ.get("CUDA_VISIBLE_DEVICES"), os.environ["OMP_NUM_THREADS"]
            print(os.getpid(), gpu, threads, file=file)
        print("at work")
        time.sleep(float(os.environ.get("WORK", 0)))
        if config.lr > 1:
            raise RuntimeError(f"{config.id}: the loss became nan")
        now = datetime.now(timezone.utc)
        result = RunResult(
            id=config.id, config=config, final={"top1": 1.0}, epochs=[], parameters=1, seconds=1,
            images_per_second=1, data_wait=0, starts=1, started=now, finished=now,
            data=Data(name="none", fingerprint="", train_images=1, test_images=1),
            machine=Machine(device="cpu", devices=1, threads=1, versions={}),
            code=Code(commit=None, dirty=None),
        )
        write_atomic(result_path(config, execution), result.model_dump_json())

folder, run_id = sys.argv[1:]
sweep.job(Path(folder), run_id, execute)
"""


@pytest.fixture
def book(tmp_path, monkeypatch):
    "A book with the workflow, the profiles and two experiments; the working directory is in it."
    root = tmp_path / "book of runs"  # with a blank, as folders of people have
    (root / "nbs" / "runs").mkdir(parents=True)
    (root / "_quarto.yml").touch()
    for name in ("Snakefile", "classify.ipynb"):
        shutil.copy(ROOT / "nbs" / "runs" / name, root / "nbs" / "runs")
    shutil.copytree(ROOT / "profiles", root / "profiles")
    (root / "nbs" / "runs" / "experiments.yml").write_text(EXPERIMENTS)
    (root / "data").symlink_to(ROOT / "data")
    (root / "worker.py").write_text(WORKER)
    monkeypatch.chdir(root)
    return root


@pytest.fixture
def swept(book, monkeypatch, capsys):
    "A sweep in this process: output, and what was raised."
    monkeypatch.setattr(sweeps, "JOB", (str(book / "worker.py"),))

    def sweep(name, **given):
        try:
            message = sweeps.sweep(name, **given)
        except sweeps.SweepFailed as error:
            message = str(error)
        return capsys.readouterr().out, message

    return sweep


def drive(say, book, work, name):
    "A sweep of two runs at a time, each of which takes `work` seconds; its output goes to a file."
    os.environ["WORK"] = str(work)
    sweeps.JOB = (str(book / "worker.py"),)
    with open(book.parent / "said", "w", buffering=1) as file, contextlib.redirect_stdout(file):
        sweeps.sweep(name, cores=2)


def starts(book, run_id):
    "A line for each start of a run: process, GPU, threads."
    path = book / ".cache" / "runs" / run_id / "starts"
    return path.read_text().splitlines() if path.exists() else []


def results(book):
    return {path.stem for path in (book / "nbs" / "results" / "sample").glob("*.json")}


def read(path):
    return path.read_text() if path.exists() else ""


def until(condition, seconds=60):
    end = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.05)
    return found


def alive(pid):
    try:
        state = open(f"/proc/{pid}/stat").read().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return False
    return state != "Z"


def children(pid):
    found = subprocess.run(["ps", "-o", "pid=", "--ppid", str(pid)], capture_output=True, text=True)
    return [int(word) for word in found.stdout.split()]


# ---- runs of a sweep


def test_a_run_that_fails_is_tried_again_and_reported_while_the_others_go_on(book, swept):
    se, bad, eca = (config.id for config, _ in experiment("three").plan())
    out, message = swept("three", cores=2)
    assert results(book) == {se, eca} and message == f"1 of 3 runs failed: {bad}"
    assert out.startswith("three: 3 runs, 0 finished\n")
    assert re.findall(r"^\[(\d)/3\]", out, re.M) == ["1", "2", "3"]
    assert re.search(rf"^\[\d/3\] {se}$", out, re.M) and re.search(rf"^\[\d/3\] {eca}$", out, re.M)
    assert re.search(rf"^\[\d/3\] failed: {bad}: the loss became nan$", out, re.M)
    log = sweeps.sweep_folder("three") / "log" / f"{bad}.log"
    assert out.endswith(f"failed: {bad}: the loss became nan\n        log: {log}\n")
    said = re.findall("^(attempt on|at work|RuntimeError: .*nan)", log.read_text(), re.M)
    assert [word.split(":")[0] for word in said] == ["attempt on", "at work", "RuntimeError"] * 2
    assert [len(starts(book, run)) for run in (se, bad, eca)] == [1, 2, 1]
    assert {line.split()[2] for run in (se, bad, eca) for line in starts(book, run)} == {"1"}, "threads"
    assert {path.name for path in book.iterdir()} == {
        *("_quarto.yml", "data", "nbs", "profiles", "worker.py", ".cache")
    }, "something lies outside the cache"


def test_only_what_is_not_finished_is_made(book, swept):
    torn, whole, *_ = plan = [config for config, _ in experiment("twelve").plan(seeds=[0])]
    assert swept("twelve", seeds=1)[1] is None
    path = book / "nbs" / "results" / "sample" / f"{torn.id}.json"
    path.write_text(path.read_text()[:-20])
    out, message = swept("twelve", seeds=1)
    assert message is None and out == f"twelve: 4 runs, 3 finished\n[1/1] {torn.id}\n"
    assert len(starts(book, torn.id)) == 2 and len(starts(book, whole.id)) == 1
    assert finished(torn) == load_result(path) and len(plan) == 4


def test_a_finished_sweep_ends_without_snakemake(book, monkeypatch, capsys):
    monkeypatch.setattr(sweeps, "finished", lambda config, execution=None: True)
    monkeypatch.setattr(sweeps, "require", lambda *words: pytest.fail("Snakemake was looked for"))
    sweeps.sweep("twelve")
    assert capsys.readouterr().out == "twelve: 12 runs, 12 finished\n"
    assert not (book / ".cache").exists()


def test_a_dry_run_says_what_is_to_do_and_does_nothing(book, capsys):
    sweeps.sweep("three", dry_run=True)
    ids = [config.id for config, _ in experiment("three").plan()]
    lines = capsys.readouterr().out.splitlines()
    assert lines == ["three: 3 runs, 0 finished", *(f"to do: {run}" for run in ids)]
    assert not (book / ".cache").exists() and not (book / "nbs" / "results").exists()


# ---- parameters of jobs


def test_the_plan_holds_the_configurations_and_is_written_whole(book):
    todo = experiment("three").plan()
    path = sweeps.write_plan(book / "here", todo, threads=3, gpus=("0",))
    plan = json.loads(path.read_text())
    assert [path.name for path in path.parent.iterdir()] == ["plan.json"], "a draft was left"
    assert plan["book"] == str(book) and plan["threads"] == 3 and plan["gpus"] == ["0"]
    for config, given in todo:
        kept = plan["runs"][config.id]
        assert kept["given"] == given and sweeps.RunConfig(**kept["config"]) == config


def test_a_job_knows_where_the_data_is(book, tmp_path):
    todo = sweeps.unfinished(experiment("three").plan(), tmp_path)
    sweeps.write_plan(book / "here", todo)
    found = {}
    sweeps.job(book / "here", todo[0][0].id, lambda *given: found.update(zip("tpce", given, strict=True)))
    assert found["p"]["data_root"] == str(tmp_path) and str(found["e"].data_root) == str(tmp_path)
    assert found["c"] == todo[0][0] and found["p"]["options"] == {"reduction": 4}


def test_a_job_waits_for_a_training_that_outlived_its_job(book):
    todo = experiment("three").plan()
    run = todo[0][0].id
    sweeps.write_plan(book / "here", todo)
    made = []
    worker = threading.Thread(target=sweeps.job, args=(book / "here", run, lambda *given: made.append(given)))
    (book / ".cache" / "runs" / run).mkdir(parents=True)
    with FileLock(book / ".cache" / "runs" / run / "lock"):
        worker.start()
        time.sleep(0.3)
        assert made == []
    worker.join(10)
    assert len(made) == 1


def test_a_run_that_was_finished_meanwhile_is_not_made(book, monkeypatch):
    todo = experiment("three").plan()
    sweeps.write_plan(book / "here", todo)
    monkeypatch.setattr(sweeps, "finished", lambda config, execution: True)
    sweeps.job(book / "here", todo[0][0].id, lambda *given: pytest.fail("it was made again"))


@pytest.mark.parametrize(
    ("cores", "gpus", "threads"), [(1, (), 8), (2, (), 1), (8, (), 1), (1, ("0",), 8), (4, tuple("0123"), 2)]
)
def test_threads_of_a_run(monkeypatch, cores, gpus, threads):
    monkeypatch.setattr(sweeps, "usable_cores", lambda: 8)
    assert sweeps.threads_of_a_run(cores, gpus) == threads


def test_each_run_has_a_gpu_of_its_own(book, swept, monkeypatch):
    monkeypatch.setattr(sweeps, "local_gpus", lambda: ("3", "5"))
    monkeypatch.setenv("WORK", "1")
    ids = [config.id for config, _ in experiment("twelve").plan(seeds=[0])]
    assert swept("twelve", seeds=1, cores=4)[1] is None
    assert {starts(book, run)[0].split()[1] for run in ids} == {"3", "5"}
    assert [path.name for path in sorted((book / ".cache" / "sweeps").glob("gpu-*"))] == [
        *("gpu-3-0.lock", "gpu-5-0.lock")
    ]


def test_a_gpu_that_is_taken_is_waited_for(tmp_path, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    held = [sweeps.take_gpu(["3", "5"], tmp_path)[0] for _ in range(2)]
    assert os.environ["CUDA_VISIBLE_DEVICES"] == "5"
    waiting = threading.Thread(target=sweeps.take_gpu, args=(["3", "5"], tmp_path))
    waiting.start()
    waiting.join(0.3)
    assert waiting.is_alive()
    held[0].release()
    waiting.join(10)
    assert not waiting.is_alive() and os.environ["CUDA_VISIBLE_DEVICES"] == "3"


def test_several_runs_share_a_gpu_if_it_is_repeated(tmp_path, monkeypatch):
    monkeypatch.setattr(sweeps, "local_gpus", lambda: ("3", "5"))
    monkeypatch.setattr(sweeps, "usable_cores", lambda: 16)
    where, plan = sweeps.where_to_run(None, None, per_gpu=2)
    assert plan == {"threads": 4, "gpus": ("3", "5", "3", "5")} and where[-1] == "gpu=4"
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    seen, held = [], []
    for _ in range(4):
        held += sweeps.take_gpu(list(plan["gpus"]), tmp_path)
        seen.append(os.environ["CUDA_VISIBLE_DEVICES"])
    assert seen == ["3", "5", "3", "5"] and len({lock.lock_file for lock in held}) == 4


# ---- order and time

# Stand-ins that load nothing: one notes the order, the other never ends.
NOTE = "import sys; open('order', 'a').write(sys.argv[2] + '\\n')"
WAIT = "import os, sys, time; open('begun', 'a').write(f'{os.getpid()}\\n'); time.sleep(600)"


def test_a_half_done_sweep_has_the_first_seed_of_everything(book, swept, monkeypatch):
    plan = [config for config, _ in experiment("twelve").plan()]
    assert [config.seed for config in plan] == [0] * 4 + [1] * 4 + [2] * 4
    (book / "note.py").write_text(NOTE)
    monkeypatch.setattr(sweeps, "JOB", (str(book / "note.py"),))
    assert swept("twelve", cores=1)[1].startswith("12 of 12 runs failed"), "a note is no result"
    assert (book / "order").read_text().split() == [config.id for config in plan]


@pytest.fixture
def ignored_interrupts():
    "As in a background process of a shell script."
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    yield
    signal.signal(signal.SIGINT, before)


def test_a_sweep_stops_at_its_time_limit(book, swept, monkeypatch, ignored_interrupts):
    (book / "wait.py").write_text(WAIT)
    monkeypatch.setattr(sweeps, "JOB", (str(book / "wait.py"),))
    begun = lambda: read(book / "begun").splitlines()  # noqa: E731
    clock = SimpleNamespace(monotonic=lambda: 61.0 if begun() else 0.0, sleep=time.sleep)
    monkeypatch.setattr(sweeps, "time", clock)
    out, message = swept("twelve", cores=2, time_limit=1)
    assert message is None and out == (
        "twelve: 12 runs, 0 finished\nstopped after 1 minutes: 12 runs are left; the same command continues\n"
    )
    until(lambda: not any(alive(int(pid)) for pid in begun()), 10)
    assert len(begun()) <= 2, "more were started"


def test_a_failure_before_the_time_limit_is_reported(book, swept, monkeypatch):
    se, bad, eca = (config for config, _ in experiment("three").plan())
    monkeypatch.setattr(sweeps, "run_plan", lambda *given: [se, eca])
    sweeps.note(sweeps.sweep_folder("three"), "attempts", bad.id)
    out, message = swept("three", time_limit=1)
    assert message == f"1 of 3 runs failed: {bad.id}" and "2 runs are left" in out


# ---- messages


def test_a_second_driver_is_refused(book, capsys):
    folder = sweeps.sweep_folder("three")
    folder.mkdir(parents=True)
    with FileLock(folder / "lock"), pytest.raises(sweeps.SweepFailed, match="three is being executed by"):
        sweeps.sweep("three")


def test_without_snakemake_the_error_says_how_to_get_it(book, monkeypatch):
    monkeypatch.setattr(sweeps, "find_spec", lambda name: None)
    with pytest.raises(sweeps.SweepFailed, match=r"needs snakemake.*pip install -e '\.\[sweep\]'"):
        sweeps.sweep("three")


def test_without_its_executor_a_profile_says_what_to_install(book, monkeypatch):
    missing = "snakemake_executor_plugin_cluster_generic"
    monkeypatch.setattr(sweeps, "find_spec", lambda name: None if name == missing else name)
    with pytest.raises(sweeps.SweepFailed, match="pip install snakemake-executor-plugin-cluster-generic"):
        sweeps.sweep("three", profile="slurm")


def test_an_unknown_profile_lists_the_known_ones(book):
    with pytest.raises(ValueError, match="unknown profile 'slrum'. Did you mean 'slurm'"):
        sweeps.sweep("three", profile="slrum")


def test_a_profile_that_snakemake_does_not_understand_is_said(book):
    (book / "mine").mkdir()
    (book / "mine" / "config.yaml").write_text("no-such-setting: 1\n")
    for dry_run in (True, False):
        with pytest.raises(sweeps.SweepFailed) as message:
            sweeps.sweep("three", profile=str(book / "mine"), dry_run=dry_run)
        assert "no-such-setting" in str(message.value)


# ---- kills


def test_a_sweep_survives_the_kill_of_a_worker_and_of_its_driver(book, swept):
    ids = {config.id for config, _ in experiment("twelve").plan()}
    with child(drive, book, 1, "twelve") as (first, _):
        until(lambda: len(results(book)) >= 2)
        victim = until(lambda: [run for run in ids - results(book) if starts(book, run)])[0]
        os.kill(int(starts(book, victim)[0].split()[0]), signal.SIGKILL)

        until(lambda: len(results(book)) >= 5)
        (snakemake,) = children(first.pid)
        first.kill()
    assert read(book.parent / "said").startswith("twelve: 12 runs, 0 finished\n[1/12] ")
    until(lambda: not alive(snakemake), 10)

    before = results(book)
    assert 5 <= len(before) < 12
    out, message = swept("twelve", cores=2)
    assert message is None and results(book) == ids
    there = int(re.match(r"twelve: 12 runs, (\d+) finished", out)[1])
    assert there >= len(before) and len(re.findall(r"^\[", out, re.M)) == 12 - there
    begun = {run: len(starts(book, run)) for run in ids}
    assert begun[victim] == 2, "the killed worker's run was not tried again"
    assert {begun[run] for run in before - {victim}} == {1}, "a finished run was made again"


def test_a_driver_that_is_interrupted_takes_its_jobs_along(book):
    ids = [config.id for config, _ in experiment("three").plan()]
    with child(drive, book, 60, "three") as (process, _):
        begun = until(lambda: [line for run in ids for line in starts(book, run)])
        os.kill(process.pid, signal.SIGINT)
        process.join(60)
        assert process.exitcode == 1
    until(lambda: not alive(int(begun[0].split()[0])), 10)


LONG = """
long:
  title: one run of many short epochs
  preset: sample
  common: {train_images: 640, test_images: 30, batch_size: 32, epochs: 40}
  runs: [{attention: sa, options: {groups: 4}}]
"""


@pytest.mark.slow
def test_ten_kills_at_random_moments_change_no_number(book):
    "The page on sweeps reports the same of a run of half an hour."
    (book / "nbs" / "runs" / "experiments.yml").write_text(LONG)
    [(config, _)] = experiment("long").plan()
    command = [sys.executable, "-m", "scsa_book.cli", "sweep", "long", "--cores", "2"]
    path, cache = book / f"nbs/results/sample/{config.id}.json", book / ".cache"
    ended, moments = [], random.Random(0)
    for kills in (0, 10):
        for _ in range(kills):
            process = subprocess.Popen(command, cwd=book, stdout=subprocess.DEVNULL, start_new_session=True)
            until(lambda: list(cache.glob("runs/*/*.ckpt")), 120)
            time.sleep(moments.uniform(0, 12))
            everyone = [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]
            for one in everyone:
                with contextlib.suppress(psutil.NoSuchProcess):
                    one.kill()
            process.wait()
            assert not path.exists(), "the run was over too early to be killed"
        subprocess.run(command, cwd=book, check=True, stdout=subprocess.DEVNULL)
        ended.append(load_result(path))
        path.unlink()
        shutil.rmtree(cache)
    assert [e.metrics for e in ended[0].epochs] == [e.metrics for e in ended[1].epochs]
    assert ended[0].final == ended[1].final and ended[1].starts > ended[0].starts == 1


@pytest.mark.slow
def test_twelve_real_runs_survive_both_kills(book):
    ids = {config.id for config, _ in experiment("twelve").plan()}
    command = [sys.executable, "-m", "scsa_book.cli", "sweep", "twelve", "--cores", "2"]
    first = subprocess.Popen(command, cwd=book, stdout=subprocess.DEVNULL)
    until(lambda: len(results(book)) >= 1, 300)
    (snakemake,) = children(first.pid)
    os.kill(workers(snakemake)[0], signal.SIGKILL)
    until(lambda: len(results(book)) >= 4, 300)
    os.kill(first.pid, signal.SIGKILL)
    first.wait()
    done = subprocess.run(command, cwd=book, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert results(book) == ids and {finished(c).config.id for c, _ in experiment("twelve").plan()} == ids


def processes_in(book):
    "Processes other than this one whose working directory is in a book."
    others = (p for p in psutil.process_iter(["cwd"]) if p.pid != os.getpid())
    return [p for p in others if (p.info["cwd"] or "").startswith(str(book))]


@pytest.fixture
def lent(book):
    "The experiment for a lent GPU, with few images and epochs; runs of it, and the folder of its results."
    if data_root() is None or not (data_root() / "cifar-100-python").is_dir():
        pytest.skip("CIFAR-100 is not in the data root (SCSA_BOOK_DATA)")
    whole = yaml.safe_load((ROOT / "nbs" / "runs" / "experiments.yml").read_text())["gpu-evidence"]
    whole["common"] |= {"train_images": 256, "test_images": 100, "epochs": 2}
    (book / "nbs" / "runs" / "experiments.yml").write_text(yaml.safe_dump({"gpu-evidence": whole}))
    return [config for config, _ in experiment("gpu-evidence").plan(seeds=[0])], book / "nbs/results/gpu"


@pytest.mark.slow
def test_the_command_for_a_lent_gpu_stops_and_continues(book, lent):
    "Two minutes of it on a CPU: a fourth of one, which ends within a run, then the rest."
    plan, folder = lent
    command = "scsa_book.cli sweep gpu-evidence --per-gpu 8 --seeds 1 --time-limit".split()
    before = set()
    for minutes in (0.25, 1.75):
        done = subprocess.run(
            [sys.executable, "-m", *command, str(minutes)], cwd=book, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stdout + done.stderr
        there = {path.stem for path in folder.glob("*.json")}
        left = f"stopped after {minutes:g} minutes: {len(plan) - len(there)} runs are left"
        assert before <= there <= {c.id for c in plan} and f"{len(before)} finished" in done.stdout
        assert left in done.stdout or len(there) == len(plan)
        assert not processes_in(book), "the sweep has ended, its runs have not"
        before = there
    assert before, "no run was finished"
    for config in plan:
        if config.id in before:
            result = finished(config)
            assert len(result.epochs) == 2 and (folder / f"{config.id}.ipynb").is_file()
            assert list((book / ".cache" / "runs" / config.id).glob("*.ckpt")), "the weights are kept"


def workers(snakemake):
    "The jobs of a Snakemake; a shell may stand between."
    found = [(pid, children(pid)) for pid in until(lambda: children(snakemake))]
    return [below[0] if below else pid for pid, below in found]


# ---- clusters


def test_the_slurm_profile_is_understood(book, capsys):
    pytest.importorskip("snakemake_executor_plugin_cluster_generic", reason="for Python 3.11 or newer")
    sweeps.sweep("three", profile="slurm", dry_run=True)
    assert capsys.readouterr().out.count("to do: ") == 3


def test_the_kubernetes_profile_is_understood(book, capsys):
    pytest.importorskip("snakemake_executor_plugin_kubernetes", reason="not needed for the book itself")
    pytest.importorskip("snakemake_storage_plugin_fs", reason="not needed for the book itself")
    sweeps.sweep("three", profile="kubernetes", dry_run=True)
    assert capsys.readouterr().out.count("to do: ") == 3


def test_a_profile_of_another_executor_keeps_its_own_commands(book):
    pytest.importorskip("snakemake_executor_plugin_cluster_generic", reason="for Python 3.11 or newer")
    (book / "mine").mkdir()
    (book / "mine" / "config.yaml").write_text(
        "executor: cluster-generic\ncluster-generic-submit-cmd: bsub\n"
    )
    assert sweeps.on_a_cluster(str(book / "mine"))[2:] == []
    assert "--cluster-generic-status-cmd" in sweeps.on_a_cluster("slurm", 3)


# What an experiment requests


def test_what_an_experiment_requests_goes_to_its_jobs(book, monkeypatch):
    path = book / "nbs" / "runs" / "experiments.yml"
    given = "title: x, preset: sample, resources: {gpus: 4, cores: 8, runtime: 60, partition: a}, runs: [{}]"
    path.write_text(f"big: {{{given}, at: {{cpu: {{resources: {{gpus: 0}}}}}}}}")
    (wanted,) = sweeps.requests_of(("big",), None, None).values()
    assert wanted == {"gpu": 4, "cpus_per_task": 8, "runtime": 60, "slurm_partition": "a"}
    assert list(sweeps.requests_of(("big",), "cpu", None).values()) == [{"gpu": 0}]
    assert list(sweeps.requests_of(("big",), None, tuple("0123")).values()) == [{"gpu": 4}]
    with pytest.raises(sweeps.SweepFailed, match="requests 4 GPUs .*this machine has 0"):
        sweeps.sweep("big", cores=1)


def test_a_run_on_several_gpus_takes_them_all(tmp_path, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    first = sweeps.take_gpu(["3", "5", "7"], tmp_path, 2)
    assert os.environ["CUDA_VISIBLE_DEVICES"] == "3,5"
    waiting = threading.Thread(target=sweeps.take_gpu, args=(["3", "5", "7"], tmp_path, 2))
    waiting.start()
    waiting.join(0.3)
    assert waiting.is_alive(), "one GPU is not enough"
    for lock in first:
        lock.release()
    waiting.join(10)
    assert not waiting.is_alive()


def test_a_job_of_several_gpus_is_a_run_on_as_many_devices(book):
    todo = experiment("three").plan()[:1]
    sweeps.write_plan(book / "here", todo, requests={todo[0][0].id: {"gpu": 2}})
    made = []
    sweeps.job(book / "here", todo[0][0].id, lambda *given: made.append(given))
    assert made[0][1]["devices"] == 2


# ---- attempts


def interrupting():
    os.kill(os.getpid(), signal.SIGTERM)
    raise RuntimeError("terminated after 1 epochs")


def test_interruptions_are_not_attempts(tmp_path, monkeypatch):
    checkpoints = iter(f"epoch={n:04d}.ckpt" for n in range(100))
    monkeypatch.setattr(sweeps, "newest", lambda run: next(checkpoints))
    for _ in range(20):
        with pytest.raises(RuntimeError, match="terminated"):
            sweeps.attempt(tmp_path, "run", interrupting)
    assert not (tmp_path / "done" / "run").exists()
    sweeps.attempt(tmp_path, "run", lambda: None)
    assert (tmp_path / "done" / "run").exists() and not (tmp_path / "failed" / "run").exists()


def test_a_run_that_is_interrupted_without_progress_is_given_up(tmp_path, monkeypatch):
    monkeypatch.setattr(sweeps, "newest", lambda run: "epoch=0001.ckpt")
    for _ in range(sweeps.STUCK - 1):
        with pytest.raises(RuntimeError):
            sweeps.attempt(tmp_path, "run", interrupting)
    sweeps.attempt(tmp_path, "run", interrupting)
    assert "5 times before it could write a checkpoint" in read(tmp_path / "failed" / "run")


def test_kills_without_notice_are_failures(tmp_path):
    attempts = sweeps.Attempts(tmp_path / "attempts" / "run")
    attempts.add("begun")
    attempts.add("begun", "epoch=0003.ckpt")
    sweeps.attempt(tmp_path, "run", lambda: pytest.fail("a third attempt"))
    assert read(tmp_path / "failed" / "run") == sweeps.KILLED and (tmp_path / "done" / "run").exists()


def test_a_run_whose_loss_is_no_number_is_not_tried_again(tmp_path):
    def diverging():
        raise sweeps.RunDiverged("the loss became nan")

    sweeps.attempt(tmp_path, "run", diverging)
    assert read(tmp_path / "failed" / "run") == "the loss became nan" and (tmp_path / "done" / "run").exists()


# ---- what is shown


def test_the_table_says_how_each_run_is(book, capsys, monkeypatch):
    se, bad, eca = (config for config, _ in experiment("three").plan())
    folder = sweeps.sweep_folder("three")
    sweeps.note(folder, "log", f"{se.id}.log", "attempt on n1\nepoch 3/9  train_loss 1.5  top1 9  60.0 s\n")
    jobs = {
        se.id: sweeps.Job("7", se.id, "RUNNING", "n1", "1:00", "None", str(folder)),
        bad.id: sweeps.Job("8", bad.id, "PENDING", "", "4:00:00", "Priority", str(folder)),
    }
    monkeypatch.setattr(sweeps, "current_jobs", lambda folder: jobs)
    found = sweeps.rows(folder, [bad, eca, se])
    assert found == [
        (se.id, "epoch 3 of 9", "0:06:00", "7", "n1", "1:00"),
        (bad.id, "queued: Priority", "", "8", "", "4:00:00"),
        (eca.id, "not started", "", "", "", ""),
    ]
    monkeypatch.setenv("COLUMNS", "200")
    sweeps.show_status("three")
    assert "epoch 3 of 9" in (out := capsys.readouterr().out) and "0 of 3 done" in out


def test_silence_is_broken_after_two_minutes(book, capsys, monkeypatch):
    configs = [config for config, _ in experiment("three").plan()]
    now = [0.0]
    monkeypatch.setattr(sweeps, "time", SimpleNamespace(monotonic=lambda: now[0]))
    display = sweeps.Display(sweeps.sweep_folder("three"), configs)
    for now[0] in (1.0, 60.0, 119.0):
        display.update()
    assert capsys.readouterr().out == ""
    now[0] = 122.0
    display.update()
    said = capsys.readouterr().out.splitlines()
    assert said[0] == "no news for 2 minutes:" and said[1:] == [f"  {c.id}  not started" for c in configs]
