"""A sweep on the SLURM that run.sh started: killed driver, cancelled job, time limit, refusal, Ctrl-C."""

import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
BOOK = Path(tempfile.mkdtemp(prefix="book-"))
EXPERIMENTS = """
four:
  title: four short runs
  preset: sample
  common: {train_images: 128, test_images: 30, batch_size: 32, epochs: 1, warmup_epochs: 0}
  resources: {gpus: 0, cores: 1, memory: 1900}
  runs: [{attention: none}, {attention: se}, {attention: eca}, {attention: scsa}]
long:
  title: longer than the limit of a job, which is a minute
  preset: sample
  common: {train_images: 512, test_images: 30, epochs: EPOCHS}
  resources: {gpus: 0, cores: 1, memory: 1900, runtime: 1}
  runs: [{attention: none}]
nowhere:
  title: a partition that does not exist
  preset: sample
  resources: {gpus: 0, partition: nowhere}
  runs: [{attention: none}]
"""


def book():
    "A book in a folder of its own, with the shipped profile as it is."
    (BOOK / "nbs" / "runs").mkdir(parents=True)
    (BOOK / "_quarto.yml").touch()
    for name in ("nbs/runs/Snakefile", "nbs/runs/classify.ipynb", "profiles", "data"):
        (BOOK / name).symlink_to(ROOT / name)
    write_experiments(epochs=1)


def write_experiments(epochs):
    (BOOK / "nbs" / "runs" / "experiments.yml").write_text(EXPERIMENTS.replace("EPOCHS", str(epochs)))


def sweep(name, *more):
    words = [sys.executable, "-u", "-m", "scsa_book.cli", "sweep", name, "--profile", "slurm", *more]
    variables = {**os.environ, "PYTHONPATH": f"{ROOT}:{os.environ.get('PYTHONPATH', '')}"}
    return subprocess.Popen(
        words, cwd=BOOK, env=variables, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def results():
    return sorted((BOOK / "nbs" / "results" / "sample").glob("*.json"), key=os.path.getmtime)


def jobs(states="PENDING,RUNNING"):
    words = ["squeue", "--noheader", f"--states={states}", "--format=%A %j %T"]
    return subprocess.run(words, capture_output=True, text=True, check=True).stdout.splitlines()


def until(condition, seconds=400):
    end = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < end, f"waited in vain; the queue: {jobs()}"
        time.sleep(0.5)
    return found


def starts(path):
    return int(re.search(r'"starts": (\d+)', path.read_text())[1])


def a_killed_driver():
    first = sweep("four")
    until(lambda: len(results()) >= 1)
    first.kill()
    first.wait()
    there, queued = len(results()), len(jobs())
    again = sweep("four")
    most = 0
    while again.poll() is None:
        most = max(most, len(jobs()))
        time.sleep(0.5)
    over = (BOOK / ".cache" / "sweeps" / "four" / "done").glob("*")
    prompt = time.time() - max(os.path.getmtime(path) for path in over)
    said = again.stdout.read()
    assert again.returncode == 0, said
    assert len(results()) == 4 and [starts(path) for path in results()] == [1] * 4, said
    names = [line.split()[1] for line in jobs("all")]
    assert sorted(set(names)) == sorted(path.stem for path in results()), "job names are run ids"
    assert len(names) == 4, f"a job was doubled: {jobs('all')}"
    assert prompt < 10, f"the prompt came {prompt:.0f} s after the last job was over"
    print(f"driver killed after {there} of 4 results, {queued} jobs in the queue: {most} after the restart,")
    print(f"  4 results, 4 jobs in all, the prompt {prompt:.1f} s after the last of them was over")


def a_cancelled_job_and_a_time_limit():
    before = set(results())
    fastest = min(json.loads(path.read_text())["epochs"][0]["seconds"] for path in before)
    # of four times as many images; a first epoch is slow, so that this is more than a minute in any case
    write_experiments(epochs=round(160 / (4 * fastest)))
    driver = sweep("long")
    log = until(lambda: next(iter((BOOK / ".cache" / "sweeps" / "long" / "log").glob("*.log")), None))
    until(lambda: "epoch 2/" in log.read_text())
    number, run, _ = jobs()[0].split()
    subprocess.run(["scancel", number], check=True)
    until(lambda: [line for line in jobs("RUNNING") if line.split()[0] != number])
    status = sweep("long", "--status")
    assert run[:20] in (shown := status.communicate()[0]), shown
    said = driver.communicate()[0]
    assert driver.returncode == 0, said
    (path,) = set(results()) - before
    ended = [line.split()[2] for line in jobs("all") if line.split()[1] == run]
    # the last one may have received SIGTERM during its last epoch, and have ended the run all the same
    assert sorted(ended)[0] == "CANCELLED" and "TIMEOUT" in ended and ended.count("COMPLETED") <= 1, ended
    assert starts(path) == len(ended) >= 3
    print(f"a run longer than the limit of its jobs: {len(ended)} jobs ({', '.join(ended)}), one result,")
    print(f"  {starts(path)} starts, none of them counted as a failure")


def a_refusal():
    driver = sweep("nowhere")
    said = driver.communicate(timeout=120)[0]
    assert driver.returncode == 1 and "invalid partition specified: nowhere" in said, said
    print("a partition that does not exist: " + re.search(r"SLURM refused.*?nowhere", said)[0])


def an_interrupted_driver():
    "Ctrl-C cancels the jobs, and --cancel-old is not needed then."
    for path in results():
        path.unlink()
    driver = sweep("four")
    until(lambda: jobs("RUNNING"))
    driver.send_signal(signal.SIGINT)
    driver.communicate(timeout=120)
    until(lambda: not jobs(), 60)
    print("Ctrl-C: no job is left in the queue")


if __name__ == "__main__":
    book()
    a_refusal()
    a_killed_driver()
    a_cancelled_job_and_a_time_limit()
    an_interrupted_driver()
