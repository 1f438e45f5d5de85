"""The notebooks are the source: requirements of nbdev, papermill and readers."""

import ast
import json
import re
import shutil
import statistics
import subprocess
import sys
from pathlib import Path

import filter as reader
import nbformat
import pytest
import repository
import text
from conftest import ROOT, cells_of, name_of, notebooks

CHAPTERS = [p for p in notebooks() if p.parent.name not in {"nbs", "runs", "results", "sample"}]
RUNS = [p for p in notebooks() if p.parent.name == "runs"]
EACH = pytest.mark.parametrize("path", notebooks(), ids=name_of)
TOOLS = Path(sys.executable).parent


def sources(path, kind="code"):
    return [reader.text(cell) for cell in cells_of(path, kind)]


# ---- the library is the export of the notebooks


@pytest.fixture(scope="module")
def copy(tmp_path_factory):
    "The notebooks, exported and cleaned in a folder of their own."
    folder = tmp_path_factory.mktemp("copy")
    for path in notebooks():
        target = folder / path.relative_to(ROOT)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, target)
    for name in ("pyproject.toml", "settings.ini"):
        shutil.copy(ROOT / name, folder)
    (folder / "scsa_book").mkdir()
    shutil.copy(ROOT / "scsa_book/__init__.py", folder / "scsa_book")
    for tool in ("nbdev-export", "nbdev-clean"):
        subprocess.run([TOOLS / tool], cwd=folder, check=True, capture_output=True)
    return folder


def modules(folder):
    return {
        p.relative_to(folder).as_posix(): p.read_text("utf-8") for p in (folder / "scsa_book").rglob("*.py")
    }


def test_the_library_is_what_the_notebooks_export(copy):
    exported, here = modules(copy), modules(ROOT)
    assert sorted(set(here) - set(exported)) == [], "modules that no notebook exports"
    assert [name for name in exported if exported[name] != here.get(name)] == [], "run make export"


def test_the_notebooks_are_clean(copy):
    dirty = [
        name_of(p)
        for p in notebooks()
        if json.loads(p.read_text()) != json.loads((copy / name_of(p)).read_text())
    ]
    assert dirty == [], "run make export"


@EACH
def test_a_notebook_that_exports_says_where_to(path):
    exports = [s for s in sources(path) if re.match(r"#\|\s*exports?\s*$", s, re.M)]
    assert not exports or reader.default_module(cells_of(path, "code")), "#| default_exp is missing"


@EACH
def test_nothing_stands_above_a_directive(path):
    # nbdev reads directives from the top of a cell and silently ignores those below a comment.
    late = [s for s in sources(path) if re.search(r"^#\|", reader.split_head(s)[1], re.M)]
    assert late == []


# ---- for readers


@EACH
def test_no_output_is_an_error(path):
    outputs = [o for cell in cells_of(path, "code") for o in cell["outputs"]]
    assert "error" not in [o["output_type"] for o in outputs]
    assert not [o["text"] for o in outputs if o.get("name") == "stderr"], "a warning on the page"


@EACH
def test_no_output_needs_a_script(path):
    kinds = {k for cell in cells_of(path, "code") for o in cell["outputs"] for k in o.get("data", {})}
    assert not {k for k in kinds if "javascript" in k or "widget" in k}


@EACH
def test_a_page_begins_with_its_title_and_one_line(path):
    first = next(reader.text(cell) for cell in cells_of(path, "markdown"))
    assert re.match(r"# [^\n]+\n\n> [^\n]+(\n|$)", first)


def lines_of(body):
    "Lines to follow: no blank ones, comments or docstrings; parameters and fields, one a line, are one."
    body = re.sub(r"^[!%].*$", "pass", body, flags=re.M)
    lines = {
        i for i, line in enumerate(body.splitlines(), 1) if line.strip() and not line.strip().startswith("#")
    }
    for node in ast.walk(ast.parse(body)):
        if isinstance(node, ast.ClassDef):
            fields = [line.lineno for line in node.body if isinstance(line, ast.AnnAssign)]
            lines -= set(fields[1:])
        if isinstance(node, ast.FunctionDef):
            lines -= set(range(node.lineno + 1, node.body[0].lineno))
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and ast.get_docstring(node) is not None:
            lines -= set(range(node.body[0].lineno, node.body[0].end_lineno + 1))
    return len(lines)


# It has one class that is still to be split; no other page may be longer than the rule.
LONG_CLASSES = {"nbs/networks/blocks.ipynb": 36}


@pytest.mark.parametrize("path", CHAPTERS, ids=name_of)
def test_cells_are_short(path):
    plain, exported = [0], [0]
    for source in sources(path):
        head, body = reader.split_head(source)
        folded = any(line.startswith("code-fold") for line in head)
        if not folded and not {"hide", "default_exp"} & {line.split()[0] for line in head}:
            group = exported if any(line.startswith("export") for line in head) else plain
            group.append(lines_of(body))
    assert statistics.median(plain) <= 4
    assert sorted(plain)[int(0.9 * (len(plain) - 1))] <= 12
    assert max(exported) <= LONG_CLASSES.get(name_of(path), 25)


def test_every_citation_is_in_the_bibliography():
    known = set(re.findall(r"@\w+\{([^,]+),", (ROOT / "nbs/references.bib").read_text("utf-8")))
    used = {}
    for path in notebooks():
        for source in sources(path, "markdown"):
            prose = re.sub(r"```.*?```|`[^`\n]+`", "", source, flags=re.S)
            for key in re.findall(r"(?<![\w.\\])@([A-Za-z][\w:-]*\w)", prose):
                if not key.startswith(("fig-", "tbl-", "eq-", "sec-", "lst-")):
                    used.setdefault(key, name_of(path))
    assert {key: where for key, where in used.items() if key not in known} == {}
    assert used


# ---- runs


@pytest.mark.parametrize("path", RUNS, ids=name_of)
def test_a_run_has_one_cell_of_parameters(path):
    tagged = [cell for cell in cells_of(path, "code") if "parameters" in reader.tags(cell)]
    assert len(tagged) == 1
    assert reader.assignments(reader.split_head(reader.text(tagged[0]))[1])


def test_there_are_runs():
    assert RUNS


@pytest.mark.parametrize("folder", ["nbs/runs", "nbs/results/sample"])
def test_runs_are_no_chapters(folder):
    assert (ROOT / folder / ".notest").exists(), "nbdev-test would execute every run"


# ---- setup cells


@EACH
def test_the_setup_cell_is_the_one_that_follows_from_the_settings(path):
    meta = repository.settings()
    code = [cell for cell in cells_of(path, "code") if "#| default_exp" not in reader.text(cell)]
    if code:
        others = [cell for cell in cells_of(path) if not repository.is_setup(cell)]
        wanted = repository.setup_cell(name_of(path.parent), meta["repo_url"], meta["repo_branch"], others)
        assert reader.text(code[0]) == wanted, "run make links"
        assert sum(map(repository.is_setup, code)) == 1


def test_the_setup_cell_installs_the_book_on_colab_and_nowhere_else():
    cell = repository.setup_cell("nbs/channel", "https://github.com/a/b", "main")
    assert "!git clone -q --depth 1 --branch main https://github.com/a/b /content/b" in cell
    assert "%cd -q /content/b/nbs/channel" in cell
    assert "torch" not in cell, "Colab's torch stays"
    plain = re.sub(r"^(\s*)[!%].*$", r"\1pass", cell, flags=re.M)
    elsewhere = plain.replace("scsa_book", "a_package_that_is_not_there")
    with pytest.raises(ModuleNotFoundError, match="make lab"):
        exec(compile(elsewhere, "cell", "exec"), {})
    exec(compile(plain, "cell", "exec"), {})  # the package is here: nothing happens


def test_links_are_switched_on_and_off_by_the_address():
    off = (ROOT / "_quarto.yml").read_text("utf-8")
    if repository.settings()["repo_url"]:
        off = repository.quarto_links(off, "", "main")
    on = repository.quarto_links(off, "https://github.com/a/b", "main")
    assert reader.SITE_SETTING.findall(off) == []
    assert dict(reader.SITE_SETTING.findall(on)) == {
        "repo-url": "https://github.com/a/b",
        "repo-branch": "main",
    }
    assert repository.quarto_links(on, "", "main") == off


def test_quarto_has_the_links_of_the_settings():
    meta, quarto = repository.settings(), (ROOT / "_quarto.yml").read_text("utf-8")
    assert quarto == repository.quarto_links(quarto, meta["repo_url"], meta["repo_branch"]), "run make links"


# ---- notebooks as text


@pytest.fixture
def notebook(tmp_path, monkeypatch):
    "A small executed notebook in a book of its own."
    monkeypatch.setattr(text, "ROOT", tmp_path)
    path = tmp_path / "nbs/part/page.ipynb"
    path.parent.mkdir(parents=True)
    nb = nbformat.v4.new_notebook(metadata={"kernelspec": text.KERNEL, "papermill": {"duration": 1.0}})
    setup = repository.setup_cell("nbs/part", repository.settings()["repo_url"])
    nb.cells = [
        nbformat.v4.new_markdown_cell("# Page\n\n> one line", id="title"),
        nbformat.v4.new_code_cell(setup, id="setup"),
        nbformat.v4.new_code_cell("seed = 1", id="parameters", metadata={"tags": ["parameters"]}),
        nbformat.v4.new_code_cell("1 + 1", id="sum", outputs=[result("2")]),
        nbformat.v4.new_code_cell("2 + 2", id="other", outputs=[result("4")]),
    ]
    nbformat.write(nb, path)
    return path


def result(words):
    return nbformat.v4.new_output("execute_result", data={"text/plain": words})


def test_text_and_back_changes_nothing(notebook):
    before = notebook.read_bytes()
    text.pull(notebook)
    assert repository.MARK not in text.text_path(notebook).read_text()
    text.push(notebook)
    assert notebook.read_bytes() == before


def test_an_edit_keeps_the_ids_and_outputs_of_the_other_cells(notebook):
    text.pull(notebook)
    file = text.text_path(notebook)
    file.write_text(file.read_text().replace("2 + 2", "2 * 3") + "\n# %%\nnew = 7\n")
    text.push(notebook)
    cells = nbformat.read(notebook, 4).cells
    assert [c.id for c in cells[:4]] == ["title", "setup", "parameters", "sum"]
    assert cells[2].metadata == {"tags": ["parameters"]}
    assert cells[3].outputs[0]["data"]["text/plain"] == "2"
    assert cells[4].outputs == [], "the old result is not the new cell's"
    assert cells[5].source == "new = 7"
    ids = [c.id for c in cells]
    text.push(notebook)
    assert [c.id for c in nbformat.read(notebook, 4).cells] == ids, "new cells keep their first id"


def test_execution_keeps_outputs_and_nothing_that_differs_from_run_to_run(notebook):
    text.execute(notebook)
    first = notebook.read_bytes()
    cell = nbformat.read(notebook, 4).cells[4]
    assert cell.outputs[0]["data"]["text/plain"] == "4"
    assert cell.execution_count is None
    text.execute(notebook)
    assert notebook.read_bytes() == first


def test_every_page_parses():
    for path in notebooks():
        for source in sources(path):
            body = reader.split_head(source)[1]
            ast.parse(re.sub(r"^(\s*)[!%].*$", r"\1pass", body, flags=re.M))
