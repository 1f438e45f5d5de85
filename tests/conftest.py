"""What several test files look at: the book's root and its notebooks."""

import json
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


def committed(pattern):
    "Files that git tracks or would track: nothing that a build, a run or an editor left."
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z", "--", pattern]
    names = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout
    return sorted(ROOT / name for name in set(names.split("\0")) if name and (ROOT / name).exists())


def notebooks():
    return committed("nbs/**/*.ipynb")


def name_of(path):
    return path.relative_to(ROOT).as_posix()


def cells_of(path, kind=None):
    cells = json.loads(path.read_text("utf-8"))["cells"]
    return [cell for cell in cells if kind in (None, cell["cell_type"])]


@pytest.fixture(scope="session")
def root():
    return ROOT
