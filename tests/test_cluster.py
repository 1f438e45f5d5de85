"""Jobs of SLURM: submitted once, adopted, refused, and seen to end. tests/slurm/run.sh has the real SLURM."""

import json
import subprocess
import time
from types import SimpleNamespace

import pytest

from scsa_book.training import cluster

RUN = "fashion-mnist_resnet8_se_seed0_0ad76b18"


@pytest.fixture
def slurm(tmp_path, monkeypatch):
    "The folder of a sweep; a list of jobs, or None for a SLURM that is silent; what sbatch is to print."
    found = SimpleNamespace(folder=tmp_path / "a sweep", jobs=[], outputs=[], calls=[])
    found.folder.mkdir()
    monkeypatch.setattr(cluster.time, "sleep", lambda seconds: found.calls.append(seconds))

    def run(words, **options):
        found.calls.append(words)
        if words[0] == "squeue":
            if found.jobs is None:
                raise subprocess.TimeoutExpired(words, 60)
            text = "\n".join("|".join(vars(job).values()) for job in found.jobs)
            return SimpleNamespace(stdout=text, returncode=0)
        code, out, err = found.outputs.pop(0)
        return SimpleNamespace(stdout=out, stderr=err, returncode=code)

    monkeypatch.setattr(cluster.subprocess, "run", run)
    return found


def job(slurm, number, state, name=RUN, folder=None):
    return cluster.Job(number, name, state, "n1", "1:00", "None", folder or str(slurm.folder))


def script(slurm):
    "What Snakemake hands over."
    params = {"book": "/the book", "folder": str(slurm.folder), "run": RUN, "job": ["python", "-m", "job"]}
    resources = {"mem_mb": 16000, "mem_mib": 15259, "runtime": 240, "gpu": 2, "slurm_extra": "--qos=long"}
    path = slurm.folder / "script.sh"
    path.write_text(
        "#!/bin/sh\n# properties = " + json.dumps({"params": params, "resources": resources}) + "\n"
    )
    return path


def test_a_job_is_named_by_its_run_and_gets_what_it_requests(slurm):
    slurm.outputs = [(0, "17;here\n", "")]
    assert cluster.submit(script(slurm)) == "17"
    words = slurm.calls[-1]
    for word in (
        f"--job-name={RUN}",
        "--chdir=/the book",
        "--mem=16000M",
        "--time=240",
        "--gpus=2",
        "--qos=long",
    ):
        assert word in words
    assert f"--output={slurm.folder}/log/{RUN}.log" in words and "--open-mode=append" in words
    threads, work = words[-1].split(" exec ")
    assert threads == "--wrap=OMP_NUM_THREADS=${SLURM_CPUS_PER_TASK:-1}"
    assert work == f"python -m job '{slurm.folder}' {RUN} < /dev/null"


def test_a_job_in_the_queue_is_adopted(slurm):
    others = [job(slurm, "5", "RUNNING", folder="/another/sweep"), job(slurm, "6", "CANCELLED")]
    slurm.jobs = [*others, job(slurm, "7", "PENDING")]
    assert cluster.submit(script(slurm)) == "7"
    slurm.jobs, slurm.outputs = others, [(0, "8", "")]
    assert cluster.submit(script(slurm)) == "8"


def test_a_refusal_is_final_and_says_why(slurm):
    slurm.outputs = [(1, "", "sbatch: error: invalid partition specified: nowhere\n")]
    number = cluster.submit(script(slurm))
    assert cluster.status(slurm.folder, number) == "success", "nothing is left to do"
    said = (slurm.folder / "failed" / RUN).read_text()
    assert said == "SLURM refused the job: sbatch: error: invalid partition specified: nowhere"


def test_a_busy_slurm_is_asked_again(slurm):
    busy = (1, "", "sbatch: error: Batch job submission failed: Socket timed out on send/recv operation")
    slurm.outputs = [busy, busy, (0, "9", "")]
    assert cluster.submit(script(slurm)) == "9"
    assert [call for call in slurm.calls if not isinstance(call, list)] == list(cluster.PAUSES[:2])
    slurm.outputs = [busy] * 4
    assert cluster.submit(script(slurm)) == cluster.REFUSED


def test_a_submission_that_timed_out_and_yet_left_a_job_is_not_repeated(slurm, monkeypatch):
    busy = (1, "", "sbatch: error: Batch job submission failed: Socket timed out on send/recv operation")
    slurm.outputs = [busy]
    monkeypatch.setattr(cluster.time, "sleep", lambda seconds: slurm.jobs.append(job(slurm, "9", "PENDING")))
    assert cluster.submit(script(slurm)) == "9" and not slurm.outputs


def test_nothing_is_submitted_while_the_queue_is_unknown(slurm):
    slurm.jobs = None
    assert cluster.submit(script(slurm)) == cluster.REFUSED
    assert "sbatch" not in [call[0] for call in slurm.calls if isinstance(call, list)]
    assert "squeue does not respond" in (slurm.folder / "failed" / RUN).read_text()
    with pytest.raises(RuntimeError, match="submitted twice"):
        cluster.waiting_jobs(slurm.folder)


@pytest.mark.parametrize(
    ("state", "expected"),
    [
        ("PENDING", "running"),
        ("RUNNING", "running"),
        ("REQUEUED", "running"),
        ("COMPLETED", "success"),
        ("CANCELLED", "failed"),
        ("TIMEOUT", "failed"),
        ("PREEMPTED", "failed"),
        (None, "failed"),
    ],
)
def test_the_state_of_a_job(slurm, state, expected):
    slurm.jobs = [job(slurm, "7", state)] if state else []
    cluster.note(slurm.folder, "jobs", "7", RUN)
    assert cluster.status(slurm.folder, "7") == expected
    cluster.note(slurm.folder, "done", RUN)
    assert cluster.status(slurm.folder, "7") == "success"


def test_a_silent_slurm_ends_no_job(slurm):
    slurm.jobs = None
    cluster.note(slurm.folder, "jobs", "7", RUN)
    assert cluster.status(slurm.folder, "7") == "running"


def test_one_listing_serves_ten_seconds_but_no_newer_job(slurm):
    for _ in range(5):
        assert cluster.queue(slurm.folder) == {}
    assert len(slurm.calls) == 1
    slurm.jobs = [job(slurm, "7", "PENDING")]
    assert "7" in cluster.queue(slurm.folder, time.time()) and len(slurm.calls) == 2


def test_the_doctor_without_slurm(monkeypatch):
    monkeypatch.setattr(cluster.shutil, "which", lambda name: None)
    assert cluster.slurm_found() == "not found"


def test_the_doctor_with_slurm(slurm, monkeypatch):
    monkeypatch.setattr(cluster.shutil, "which", lambda name: name)
    slurm.outputs = [(0, "slurm 22.05.8\n", ""), (0, "gpu\nlong\n", "")]
    assert cluster.slurm_found() == "slurm 22.05.8, partitions gpu long"
    slurm.outputs = [(1, "", "slurm_load_partitions: Unable to contact"), (0, "", "")]
    assert cluster.slurm_found().startswith("does not respond: slurm_load")
