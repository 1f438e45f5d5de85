"""The notebooks that readers download: each fetches the book, installs what it needs, and runs."""

import ast
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import venv
from functools import lru_cache
from importlib.metadata import PackageNotFoundError, packages_distributions, requires
from pathlib import Path

import build
import download
import filter as reader
import pytest
import repository
from conftest import ROOT
from IPython.core.inputtransformer2 import TransformerManager
from packaging.requirements import Requirement

META = repository.settings()
AT_ADDRESS = {"repo_url": "https://github.com/a/b", "repo_branch": "trunk"}
PAGES = list(reader.notebooks(ROOT))
WITH_CODE = [p for p in PAGES if '"cell_type": "code"' in p.read_text("utf-8")]


def alone(path, meta=META):
    "The downloaded notebook of a page, with the folder that it goes to."
    folder = path.parent.relative_to(ROOT).as_posix()
    return download.alone(json.loads(path.read_text("utf-8")), folder, {**META, **meta})["cells"], folder


def test_every_page_with_code_begins_with_the_cell_that_installs():
    assert len(WITH_CODE) > 150
    for path in WITH_CODE:
        for meta in ({"repo_url": ""}, AT_ADDRESS):
            cells, folder = alone(path, meta)
            first = reader.text(cells[0])
            compile(TransformerManager().transform_cell(first), str(path), "exec")
            assert f'os.chdir("scsa-book/{folder}")' in first and (ROOT / folder).is_dir()
            up = re.search(r'"([./]*)_quarto.yml"', first)[1]
            assert (path.parent / up / "_quarto.yml").is_file(), "it sees that it is in the book"
            assert not any(map(repository.is_setup, cells)), "the cell of the book asks for `make lab`"
            cloned = "git clone -q --depth 1 --branch trunk https://github.com/a/b" in first
            assert cloned == bool(meta["repo_url"])


def test_a_page_without_code_installs_nothing():
    for path in set(PAGES) - set(WITH_CODE):
        assert alone(path)[0] == json.loads(path.read_text("utf-8"))["cells"]


# ---- what is installed


@lru_cache
def required(name, extra):
    "The distributions that one asks for by itself, by its metadata."
    try:
        found = map(Requirement, requires(name) or [])
    except PackageNotFoundError:
        return set()
    return {r.name.lower() for r in found if r.marker is None or r.marker.evaluate({"extra": extra})}


def installed_with(name, extra=""):
    "The distributions that come with one."
    found, waiting = {name}, required(name, extra)
    while waiting:
        found |= waiting
        waiting = set().union(*(required(other, "") for other in waiting)) - found
    return found


def pip_words(cells):
    [line] = re.findall(r"%pip install -q (.*)", reader.text(cells[0]))
    book, *others = line.split()
    return re.fullmatch(r'"\./scsa-book\[(.*)\]"', book)[1].split(","), others


def imports(cells):
    "The packages that cells import as they are run, not those within functions."
    for cell in cells[1:]:
        if cell["cell_type"] == "code":
            tree = ast.parse(re.sub(r"^(\s*)[!%].*$", r"\1pass", reader.text(cell), flags=re.M))
            for node in tree.body:
                names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
                names += [node.module] if isinstance(node, ast.ImportFrom) else []
                yield from (name.split(".")[0] for name in names)


def test_every_page_installs_what_it_imports():
    found = packages_distributions()
    for path in WITH_CODE:
        cells, _ = alone(path)
        extras, others = pip_words(cells)
        there = set().union(*(installed_with("scsa_book", extra) for extra in extras), others)
        for name in set(imports(cells)) - sys.stdlib_module_names - {"scsa_book"}:
            names = {n.lower() for n in found.get(name, [name.replace("_", "-")])}
            assert names & there, f"{path}: nothing brings {name}"


def test_other_packages_are_installed_where_a_page_shows_them():
    assert pip_words(alone(ROOT / "nbs/see/cam.ipynb")[0]) == (["runs", "see"], [])
    assert pip_words(alone(ROOT / "nbs/use/yolo.ipynb")[0]) == (["runs"], ["ultralytics"])
    cells, _ = alone(ROOT / "nbs/see/cam.ipynb")
    colab = repository.setup_cell("nbs/see", "https://github.com/a/b", cells=cells)
    assert '%pip install -q -e "/content/b[runs,see]"' in colab


# ---- links and files


def test_the_page_links_to_its_notebook_and_to_the_archive_that_it_needs(tmp_path):
    line = "".join(reader.downloads(Path("nbs/channel/se.ipynb"), archive=True))
    addresses = re.findall(r'href="([^"]*)" download', line)
    download.write(tmp_path, tmp_path, [])  # a root without a book: the archive is empty
    assert (tmp_path / "nbs/channel" / addresses[1]).resolve().is_file()
    assert addresses[0] == "../../download/channel/se.ipynb"
    assert len(reader.downloads(Path("nbs/channel/se.ipynb"), archive=False)) == 1


def test_the_archive_leaves_out_what_tools_made(tmp_path):
    made = ("scsa_book/__pycache__/a.pyc", "nbs/a/_txt/b.py")
    for name in ("scsa_book/a.py", "nbs/a/b.ipynb", "other/c.py", *made):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    download.archive(tmp_path, tmp_path / "x.tar.gz")
    with tarfile.open(tmp_path / "x.tar.gz") as file:
        files = sorted(member.name for member in file if member.isfile())
    assert files == ["scsa-book/nbs/a/b.ipynb", "scsa-book/scsa_book/a.py"]


# ---- executed in an empty environment


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    out = tmp_path_factory.mktemp("site")
    download.write(ROOT, out, PAGES)
    return out / reader.DOWNLOAD


@pytest.fixture(scope="module")
def empty(tmp_path_factory):
    "A new environment that borrows the book's requirements, which are gigabytes, and not the book."
    folder = tmp_path_factory.mktemp("empty")
    venv.create(folder, with_pip=True)
    python = folder / "bin/python"
    ask = "import sysconfig; print(sysconfig.get_path('purelib'))"
    packages = Path(subprocess.check_output([python, "-c", ask], text=True).strip())
    (packages / "borrowed.pth").write_text(sysconfig.get_path("purelib"))
    run(python, "-m", "pip", "uninstall", "-q", "-y", "setuptools", folder=folder)  # Python's own, too old
    return python


def run(python, *words, folder):
    "A command of the environment's Python, without a network."
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    environment |= {"PIP_NO_INDEX": "1", "PIP_NO_BUILD_ISOLATION": "0", "OMP_NUM_THREADS": "1"}
    how = {"capture_output": True, "text": True, "timeout": 900}
    return subprocess.run([python, *words], cwd=folder, env=environment, **how)


def executed(python, notebook, folder):
    "The notebook as the environment's own Jupyter executes it."
    words = ["--execute", "--to", "notebook", "--output", "done.ipynb", notebook.name]
    done = run(python, "-m", "nbconvert", *words, folder=folder)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads((folder / "done.ipynb").read_text("utf-8"))["cells"]


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("setuptools") is None, reason="no setuptools to build with")
@pytest.mark.parametrize("page", ["channel/se", "results/imagenette", "networks/regions"])
def test_a_downloaded_page_runs_in_an_empty_environment(site, empty, tmp_path, page):
    notebook = Path(shutil.copy(site / f"{page}.ipynb", tmp_path))
    run(empty, "-m", "pip", "uninstall", "-q", "-y", "scsa_book", folder=tmp_path)
    missing = run(empty, "-c", "import scsa_book", folder=tmp_path)
    assert "No module named 'scsa_book'" in missing.stderr
    shutil.copy(site / reader.ARCHIVE, tmp_path)
    add = {"cell_type": "code", "id": "where", "metadata": {}, "execution_count": None, "outputs": []}
    nb = json.loads(notebook.read_text("utf-8"))
    nb["cells"].append(add | {"source": ["import scsa_book\n", "print(scsa_book.__file__)"]})
    notebook.write_text(json.dumps(nb), "utf-8")
    *_, last = executed(empty, notebook, tmp_path)
    assert str(empty.parent.parent) in "".join(last["outputs"][0]["text"]), "the book that the cell installed"


@pytest.mark.slow
def test_with_an_address_the_book_is_cloned(site, empty, tmp_path):
    with tarfile.open(site / reader.ARCHIVE) as file:
        file.extractall(tmp_path / "there", filter="data")
    there = tmp_path / "there/scsa-book"
    who = ["-c", "user.name=a", "-c", "user.email=a@b"]
    commit = [*who, "commit", "-q", "-m", "book"]
    for words in (["init", "-q", "-b", "trunk"], ["add", "-A", "-f", "."], commit):
        subprocess.run(["git", *words], cwd=there, check=True)
    run(empty, "-m", "pip", "uninstall", "-q", "-y", "scsa_book", folder=tmp_path)
    meta = {"repo_url": there.as_uri(), "repo_branch": "trunk"}
    notebook = tmp_path / "page.ipynb"
    path = ROOT / "nbs/foundations/pooling.ipynb"
    nb = json.loads(path.read_text("utf-8"))
    notebook.write_text(json.dumps(nb | {"cells": alone(path, meta)[0]}), "utf-8")
    executed(empty, notebook, tmp_path)
    assert (tmp_path / "scsa-book/.git").is_dir()


def test_the_downloads_are_there_before_quarto_and_it_does_not_remove_them(tmp_path):
    page = tmp_path / "book/nbs/part/page.ipynb"
    page.parent.mkdir(parents=True)
    shutil.copy(ROOT / "nbs/use/index.ipynb", page)
    quarto = tmp_path / "quarto"
    quarto.write_text('#!/bin/sh\ntest "$2" = --no-clean && test -f "$4/download/part/page.ipynb"\n')
    quarto.chmod(0o755)
    build.render_with_quarto(str(quarto), tmp_path / "book/out", tmp_path / "book")
    page.unlink()
    shutil.rmtree(tmp_path / "book/out")
    with pytest.raises(SystemExit, match="quarto render failed"):
        build.render_with_quarto(str(quarto), tmp_path / "book/out", tmp_path / "book")
