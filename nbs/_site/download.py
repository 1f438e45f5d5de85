"""Notebooks that run on their own, for readers to download: `python nbs/_site/download.py [FOLDER]`.

Their first cell fetches the book, installs what the page needs, and goes to the page's folder in it. With
`repo_url` in settings.ini the book is a clone of the repository; without, it is an archive that is
beside the notebooks on the site. Standard library only.
"""

import json
import sys
import tarfile
from pathlib import Path

import filter as reader
from repository import is_setup, needed, settings

ROOT = Path(__file__).resolve().parents[2]
BOOK = (
    "settings.ini", "setup.py", "pyproject.toml", "README.md", "LICENSE", "_quarto.yml",
    "scsa_book", "nbs", "data", "tests", "profiles",
)  # fmt: skip
NOT_OF_BOOK = {"_txt", "__pycache__", ".ipynb_checkpoints", ".built"}
CELL = """\
# Where there is no book yet: {what}, and install what this page needs.
import importlib.util
import os
from pathlib import Path

if not Path("{up}_quarto.yml").exists():
    if not Path("scsa-book").exists():
{fetch}
    if importlib.util.find_spec("scsa_book") is None:
        %pip install -q {packages}
    os.chdir("scsa-book/{folder}")"""
CLONE = """\
        !git clone -q --depth 1 --branch {branch} {url} scsa-book"""
UNPACK = f"""\
        import shutil

        if not Path("{reader.ARCHIVE}").exists():
            raise FileNotFoundError("{reader.ARCHIVE} is missing: download it into this folder")
        shutil.unpack_archive("{reader.ARCHIVE}")"""


def install_cell(folder, packages, meta):
    "Source of the first cell of a notebook of `folder`, which is relative to the root of the book."
    url, branch = meta.get("repo_url", ""), meta.get("repo_branch", "main")
    fetch = CLONE.format(branch=branch, url=url) if url else UNPACK
    what = f"clone {url}" if url else f"unpack {reader.ARCHIVE}"
    up = "../" * len(Path(folder).parts)
    return CELL.format(what=what, up=up, fetch=fetch, folder=folder, packages=packages)


def alone(nb, folder, meta):
    "The notebook with an install cell in front, and without the cell that expects the book around it."
    cells = [cell for cell in nb["cells"] if not is_setup(cell)]
    if any(cell["cell_type"] == "code" for cell in cells):
        source = install_cell(folder, needed(cells, meta, "./scsa-book"), meta).splitlines(keepends=True)
        first = {"cell_type": "code", "id": "install", "metadata": {}, "source": source}
        cells.insert(0, first | {"execution_count": None, "outputs": []})
    return nb | {"cells": cells}


def member(info):
    "A file of the archive, or None for what tools have made."
    return None if NOT_OF_BOOK & set(Path(info.name).parts) else info


def archive(root, path):
    "What the pages need to run, as one file; the data in it are compressed already."
    with tarfile.open(path, "w:gz", compresslevel=1) as file:
        for name in filter(lambda name: (root / name).exists(), BOOK):
            file.add(root / name, f"scsa-book/{name}", filter=member)


def write(root, out, paths):
    "The folder `download` of the site `out`: notebooks `paths`, and the archive if they need one."
    meta, folder = settings(root), out / reader.DOWNLOAD
    folder.mkdir(parents=True, exist_ok=True)
    for path in paths:
        where = path.relative_to(root)
        target = folder / where.relative_to("nbs")
        target.parent.mkdir(parents=True, exist_ok=True)
        nb = alone(reader.read(path), where.parent.as_posix(), meta)
        target.write_text(json.dumps(nb, ensure_ascii=False, indent=1) + "\n", "utf-8")
    if not meta.get("repo_url"):
        archive(root, folder / reader.ARCHIVE)


if __name__ == "__main__":
    write(ROOT, Path(sys.argv[1] if len(sys.argv) > 1 else "_docs").resolve(), list(reader.notebooks(ROOT)))
