"""The project's metadata are consistent, and the core has no further dependencies."""

import re
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest
import readme
import repository
import yaml
from conftest import ROOT, committed

import scsa_book

META = repository.settings()
INSTALLED = metadata.metadata("scsa_book")


def requirements(name):
    return {re.sub(r"\s", "", line) for line in META[name].split("\n")[1:]}


def installed_requirements(extra=None):
    "Requirements of the installed package, of the core or of one extra."
    found = set()
    for line in metadata.requires("scsa_book"):
        spec, _, marker = line.partition(";")
        if (f'extra == "{extra}"' in marker) if extra else not marker:
            found.add(spec.strip() + (";python_version" if "python_version" in marker else ""))
    return {normal(spec) for spec in found}


def normal(spec):
    "`nbdev<4,>=3.3` and `nbdev>=3.3,<4` are one requirement."
    spec, _, marker = spec.partition(";")
    name, bounds = re.fullmatch(r"([\w.-]+)(.*)", spec).groups()
    return name, frozenset(bounds.split(",")), bool(marker)


def test_version_is_one():
    assert META["version"] == scsa_book.__version__ == INSTALLED["Version"]
    assert META["version"] == yaml.safe_load((ROOT / "CITATION.cff").read_text())["version"]


def test_description_author_and_licence_are_those_of_the_settings():
    assert INSTALLED["Summary"] == META["description"]
    assert INSTALLED["Author"] == META["author"]
    assert INSTALLED["License-Expression"] == META["license"]
    assert INSTALLED["Requires-Python"] == f">={META['min_python']}"


def test_requirements_come_in_layers():
    core, runs = requirements("requirements"), requirements("runs_requirements")
    sweep, development = requirements("sweep_requirements"), requirements("dev_requirements")
    see, peers = requirements("see_requirements"), requirements("peers_requirements")
    assert installed_requirements() == set(map(normal, core))
    assert installed_requirements("runs") == set(map(normal, runs))
    assert installed_requirements("sweep") == set(map(normal, runs | sweep))
    assert installed_requirements("see") == set(map(normal, runs | see))
    assert installed_requirements("dev") == set(map(normal, runs | sweep | see | peers | development))
    assert {normal(spec)[0] for spec in core} == {"torch", "einops"}


def test_torch_has_no_upper_bound():
    # Colab's torch has to stay.
    bounds = [spec for name in ("requirements", "runs_requirements") for spec in requirements(name)]
    assert not [spec for spec in bounds if "<" in spec or "==" in spec]


def test_the_licence_is_apache_on_the_pages_too():
    licence = (ROOT / "LICENSE").read_text()
    assert "Apache License" in licence and "END OF TERMS AND CONDITIONS" in licence
    footer = yaml.safe_load((ROOT / "_quarto.yml").read_text())["website"]["page-footer"]["left"]
    assert "Apache License 2.0" in footer


CORE_ALONE = """
import sys

class Missing:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in BLOCKED:
            raise ModuleNotFoundError(f"{name} is not there", name=name)

BLOCKED = THESE
sys.meta_path.insert(0, Missing())
import torch
import scsa_book.operators.pooling, scsa_book.operators.gates
from scsa_book.attention import registry
x = torch.randn(2, 128, 7, 5)
for name in registry.names():
    assert registry.create(name, 128)(x).shape == x.shape
print(*registry.names())
"""


def test_attention_needs_the_core_and_nothing_else():
    layers = requirements("runs_requirements") | requirements("dev_requirements")
    blocked = {normal(spec)[0].replace("-", "_") for spec in layers} | {"IPython", "yaml", "PIL"}
    assert {"torchvision", "lightning", "matplotlib", "pydantic", "typer", "scipy", "timm"} <= blocked
    command = [sys.executable, "-c", CORE_ALONE.replace("THESE", repr(blocked))]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert "scsa" in done.stdout.split()


def test_blocking_works():
    "The test above could not fail if the blocked packages could still be imported."
    script = CORE_ALONE.replace("THESE", repr({"torch"}))
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=ROOT)
    assert "torch is not there" in done.stderr


def test_ruff_is_content():
    tool = Path(sys.executable).parent / "ruff"
    done = subprocess.run(
        [tool, "check", "--output-format", "concise", "."], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout


def test_scripts_are_formatted():
    tool = Path(sys.executable).parent / "ruff"
    command = [tool, "format", "--check", "nbs/_site", "setup.py"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("name", readme.readme())
def test_the_readme_is_the_home_page(name):
    assert (ROOT / name).read_text("utf-8") == readme.readme()[name], "run make readme"


def test_links_of_the_readme_lead_somewhere():
    for name in ("README.md", "CONTRIBUTING.md"):
        targets = re.findall(r"\]\((?!https?:|#)([^)#]+)", (ROOT / name).read_text("utf-8"))
        assert [t for t in targets if not (ROOT / t).exists()] == []


def test_documented_commands_exist():
    makefile = (ROOT / "Makefile").read_text()
    goals = set(re.search(r"^\.PHONY: (.+)$", makefile, re.M)[1].split())
    for name in (
        "README.md",
        "CONTRIBUTING.md",
        ".ci/run",
        ".github/workflows/test.yml",
        ".github/workflows/site.yml",
    ):
        message = set(re.findall(r"\bmake ([a-z-]+)\b", (ROOT / name).read_text("utf-8")))
        assert message <= goals, f"{name}: {message - goals}"


def test_ci_does_what_a_reader_would():
    lines = (ROOT / ".ci/run").read_text().splitlines()
    assert [line for line in lines if line and not line.startswith("#")] == [
        "set -eu",
        'cd "$(dirname "$0")/.."',
        "make test",
    ]


def test_nbdev_left_no_site_of_its_own():
    assert not (ROOT / "nbs/_quarto.yml").exists(), "it would take the project away from the root's"


def test_no_large_file_is_committed():
    assert [p for p in committed(".") if p.stat().st_size > 5_000_000] == []
