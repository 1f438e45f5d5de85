"""What depends on `repo_url` in settings.ini: the hidden setup cell of every notebook, and Quarto's links.

`python nbs/_site/repository.py` writes both; a test holds them together.
"""

import ast
import re
from configparser import ConfigParser
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
MARK = "# setup"  # second line of the setup cell, by which it is found again
LOCAL = f"""\
#| hide
{MARK}
import importlib.util

if importlib.util.find_spec("scsa_book") is None:
    raise ModuleNotFoundError("scsa_book is missing: run `make lab` in the folder of the book")"""
EXTRAS = ("see", "deploy", "sweep", "dev")  # of settings.ini, besides `runs`, which every page gets
RENAMED = {"pytorch_grad_cam": "grad-cam"}  # a package whose name is not that of its import
PEERS = {"ultralytics", "segmentation_models_pytorch"}  # packages that a page shows and the book does without
# On Colab the requirements are lower bounds only, so the installed torch stays.
COLAB = f"""\
#| hide
{MARK}
import importlib.util
import sys

if importlib.util.find_spec("scsa_book") is None:
    if "google.colab" not in sys.modules:
        raise ModuleNotFoundError("scsa_book is missing: run `make lab` in the folder of the book")
    !git clone -q --depth 1 --branch BRANCH URL HOME
    %pip install -q -e PACKAGES
    %cd -q HOME/FOLDER
    sys.path.insert(0, "HOME")"""


def settings(root=ROOT):
    "The [DEFAULT] section of settings.ini."
    config = ConfigParser()
    config.read(root / "settings.ini", encoding="utf-8")
    return config["DEFAULT"]


def imported(cells):
    "The packages that code cells import, and those that only cells with `#| peers` import."
    found = {True: set(), False: set()}
    for cell in cells:
        source = "".join(cell["source"])
        plain = re.sub(r"^(\s*)[!%].*$", r"\1pass", source, flags=re.M)
        for node in ast.walk(ast.parse(plain if cell["cell_type"] == "code" else "")):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            found["#| peers" in source] |= {name.split(".")[0] for name in names}
    return found[False] | found[True], found[True] - found[False]


def needed(cells, meta, home):
    "What pip installs for a page, as words of its command line; `home` is the folder of the book."
    every, peers = imported(cells)
    asked = {RENAMED.get(name, name.replace("_", "-")) for name in every}
    known = {extra: {re.split("[<>=;]", line)[0].strip() for line in lines(meta, extra)} for extra in EXTRAS}
    extras = [extra for extra in EXTRAS[:-1] if asked & known[extra]]
    others = asked & known["dev"] - set().union(*(known[extra] for extra in EXTRAS[:-1]))
    others |= {name.replace("_", "-") for name in peers & PEERS}
    return " ".join([f'"{home}[{",".join(["runs", *extras])}]"', *sorted(others)])


def lines(meta, extra):
    return meta.get(f"{extra}_requirements", "").split("\n")[1:]


def setup_cell(folder, repo_url, branch="main", cells=()):
    "Source of the cell that makes `import scsa_book` work in a notebook of `folder` (relative to the root)."
    if not repo_url:
        return LOCAL
    home = "/content/" + repo_url.rstrip("/").split("/")[-1]
    packages = needed(cells, settings(), home)
    words = {"BRANCH": branch, "URL": repo_url, "PACKAGES": packages, "HOME": home, "FOLDER": folder}
    source = COLAB
    for word, value in words.items():
        source = source.replace(word, value)
    return source


def is_setup(cell):
    source = "".join(cell["source"])
    return cell["cell_type"] == "code" and source.split("\n")[1:2] == [MARK]


def quarto_links(text, repo_url, branch):
    "_quarto.yml with its repository block switched on (an address) or off (none)."
    block = {
        "repo-url": repo_url or "https://github.com/OWNER/REPO",
        "repo-branch": branch,
        "repo-actions": "[edit, issue]",
    }
    for key, value in block.items():
        line = f"{key}: {value}" if repo_url else f"# {key}: {value}"
        text = re.sub(rf"^(\s*)(?:# )?{key}:.*$", lambda m, line=line: m[1] + line, text, count=1, flags=re.M)
    return text


def main(root=ROOT):
    import nbformat

    meta = settings(root)
    url, branch = meta["repo_url"], meta["repo_branch"]
    quarto = root / "_quarto.yml"
    quarto.write_text(quarto_links(quarto.read_text("utf-8"), url, branch), "utf-8")
    for path in root.glob("nbs/**/*.ipynb"):
        notebook = nbformat.read(path, 4)
        cells = [c for c in notebook.cells if is_setup(c)]
        for cell in cells:
            folder, others = path.parent.relative_to(root), [c for c in notebook.cells if not is_setup(c)]
            cell["source"] = setup_cell(folder.as_posix(), url, branch, others)
        if cells:
            nbformat.write(notebook, path)


if __name__ == "__main__":
    main()
