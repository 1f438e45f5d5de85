"""Ten deliberate faults, each of another kind and in another module: the quick tests must find every one."""

import os
import shutil
import subprocess
import sys

import pytest
from conftest import ROOT

# Module, what is there, what is wrong instead, and the file of tests that fails.
FAULTS = {
    "gate-without-bound": ("attention/se.py", ".relu()).sigmoid()", ".relu()).exp()", "test_attention.py"),
    "position-after-instead-of-before": (
        "networks/sites.py", 'Site(last_conv, "before", "before_last_conv")',
        'Site(last_conv, "after", "before_last_conv")', "test_networks.py",
    ),
    "warm-up-one-step-late": ("training/task.py", "(step + 1) / warmup", "step / warmup", "test_training.py"),
    "same-augmentation-in-every-epoch": (
        "data/loading.py", '"change", self.epoch, number', '"change", number', "test_data.py"
    ),
    "offset-never-drawn": ("data/images.py", "2 * self.padding + 1", "2 * self.padding", "test_data.py"),
    "oldest-checkpoint": ("training/checkpoints.py", "reverse=True", "reverse=False", "test_training.py"),
    "transposed-size": ("data/annotations.py", "limits = (width, height, width, height)",
                        "limits = (height, width, height, width)", "test_detection_data.py"),
    "prefix-kept": (
        "networks/weights_file.py", 'name.startswith("module.")', 'name.endswith("module.")', "test_inputs.py"
    ),
    "population-deviation": ("evidence/statistics.py", "ddof=1", "ddof=0", "test_evidence.py"),
    "usage-error-as-success": ("cli.py", "fail(error, 2)", "fail(error, 0)", "test_cli.py"),
}  # fmt: skip


@pytest.fixture(scope="module")
def copy(tmp_path_factory):
    "A copy of the book, so that a fault never stands in the original."
    target = tmp_path_factory.mktemp("copy") / "book"
    left = shutil.ignore_patterns(".venv", ".git", ".cache", "_site", "_txt", "__pycache__", "*_cache")
    shutil.copytree(ROOT, target, ignore=left)
    subprocess.run(["git", "init", "-q"], cwd=target, check=True)
    return target


def run_tests(book, name):
    "Exit status of one file of the quick tests, and its last lines."
    environment = {**os.environ, "PYTHONPATH": str(book), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "pytest", "-x", "-p", "no:cacheprovider", f"tests/{name}"]
    done = subprocess.run(command, cwd=book, env=environment, capture_output=True, text=True, timeout=1200)
    return done.returncode, done.stdout[-1500:]


@pytest.mark.slow
@pytest.mark.parametrize("fault", FAULTS)
def test_a_deliberate_fault_is_found(fault, copy):
    module, right, wrong, tests = FAULTS[fault]
    path = copy / "scsa_book" / module
    source = path.read_text("utf-8")
    assert source.count(right) == 1
    path.write_text(source.replace(right, wrong), "utf-8")
    try:
        status, said = run_tests(copy, tests)
    finally:
        path.write_text(source, "utf-8")
    assert status == 1 and " failed" in said, said  # 1: tests failed; others: they did not run


def test_every_fault_is_about_a_line_that_is_there():
    for module, right, _, tests in FAULTS.values():
        assert (ROOT / "scsa_book" / module).read_text("utf-8").count(right) == 1, (module, right)
        assert (ROOT / "tests" / tests).is_file(), tests
