"""What several test files use: the book's root and its notebooks, and a network that hides nothing."""

import gc

# What is imported and collected lives as long as the tests. Looking for garbage in it takes a fifth of the
# time of the imports and a tenth of that of the tests.
gc.disable()

import json  # noqa: E402
import os  # noqa: E402
import subprocess  # noqa: E402
import sys  # noqa: E402
from pathlib import Path  # noqa: E402

import pytest  # noqa: E402
from children import executed, server  # noqa: E402, F401

# A grammar of addresses that nbformat could check with, and that takes a second of every process to import.
sys.modules.setdefault("rfc3987_syntax", None)

# As in `make test`: two workers with as many threads as cores wait for each other, and so do their children.
os.environ.setdefault("OMP_NUM_THREADS", "1")

ROOT = Path(__file__).resolve().parents[1]


# Files of tests that take the longest. They come first, so that at the end no worker has one of them left.
LONGEST = (
    "test_sweep", "test_devices", "test_cli", "test_tasks", "test_deploy", "test_operators", "test_attention",
)  # fmt: skip


def pytest_collection_modifyitems(items):
    first = {f"{name}.py": number for number, name in enumerate(LONGEST)}
    items.sort(key=lambda item: first.get(item.path.name, len(first)))


def pytest_collection_finish():
    gc.freeze()
    gc.set_threshold(100_000, 20, 20)
    gc.enable()


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


def shake(network):
    "Random statistics and affine values, and no γ at zero, so that no layer is the identity."
    import torch  # here, since the process that hands out the tests needs none
    from torch import nn

    generator = torch.Generator().manual_seed(1)
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            for tensor in (module.weight.data, module.running_var):
                tensor.copy_(torch.rand(tensor.shape, generator=generator) + 0.5)
            for tensor in (module.bias.data, module.running_mean):
                tensor.copy_(torch.randn(tensor.shape, generator=generator) / 4)
        if hasattr(module, "gamma"):
            module.gamma.data.fill_(0.5)
    return network


@pytest.fixture(scope="session")
def root():
    return ROOT
