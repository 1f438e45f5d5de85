"""Edit notebooks as percent-format text.

python nbs/_site/text.py pull NB ...      notebook -> _txt/NAME.py beside it (git-ignored)
python nbs/_site/text.py push NB ...      text -> notebook; ids and outputs of unchanged cells survive
python nbs/_site/text.py execute NB ...   run it in its folder and keep the outputs
"""

import hashlib
import os
import sys
from pathlib import Path

import jupytext
import nbformat
from filter import split_head
from jupytext.combine import combine_inputs_with_outputs
from repository import ROOT, is_setup, settings, setup_cell

KERNEL = {"display_name": "python3", "language": "python", "name": "python3"}


def text_path(path):
    return path.parent / "_txt" / (path.stem + ".py")


def pull(path):
    notebook = nbformat.read(path, 4)
    notebook.cells = [c for c in notebook.cells if not is_setup(c)]  # push puts it back
    notebook.metadata["jupytext"] = {
        "notebook_metadata_filter": "kernelspec,-jupytext.text_representation.jupytext_version",
        "cell_metadata_filter": "tags,-all",
    }
    out = text_path(path)
    out.parent.mkdir(exist_ok=True)
    out.write_text(jupytext.writes(notebook, fmt="py:percent"), encoding="utf-8")
    return out


def with_setup_cell(cells, folder):
    "Insert the setup cell before the first code cell except `default_exp`; pages without code need none."
    code = [i for i, c in enumerate(cells) if c.cell_type == "code" and "#| default_exp" not in c.source]
    if not code:
        return cells
    meta = settings()
    cell = nbformat.v4.new_code_cell(setup_cell(folder, meta["repo_url"], meta["repo_branch"], cells))
    return cells[: code[0]] + [cell] + cells[code[0] :]


def push(path):
    new = jupytext.read(text_path(path), fmt="py:percent")
    new.nbformat, new.nbformat_minor = 4, 5
    new.cells = with_setup_cell(new.cells, path.resolve().parent.relative_to(ROOT).as_posix())
    old_ids = set()
    if path.exists():
        old = nbformat.read(path, 4)
        old_ids = {c.id for c in old.cells}
        new = combine_inputs_with_outputs(new, old, fmt="py:percent")
        drop_stale_outputs(new, old)
    new.metadata = metadata_of(new)
    seen = set()
    for cell in new.cells:
        cell.metadata = {k: v for k, v in cell.metadata.items() if k == "tags"}
        if cell.id not in old_ids or cell.id in seen:
            cell.id = fresh_id(f"{path.stem}|{cell.cell_type}|{cell.source}", seen | old_ids)
        seen.add(cell.id)
    nbformat.validate(new)
    nbformat.write(new, path)
    return path


def drop_stale_outputs(new, old):
    "jupytext pairs similar cells; the outputs of other code are dropped."
    code = {c.id: split_head(c.source)[1] for c in old.cells}
    for cell in new.cells:
        if cell.cell_type == "code" and split_head(cell.source)[1] != code.get(cell.id):
            cell.outputs = []


def metadata_of(notebook):
    "The metadata of a notebook that are kept in version control."
    return {"kernelspec": KERNEL, **{k: v for k, v in notebook.metadata.items() if k == "papermill"}}


def fresh_id(words, taken):
    "An id that follows from a new cell's words: the same on every machine, unlike jupytext's random ones."
    digest = hashlib.sha1(words.encode()).hexdigest()
    return next(digest[i : i + 8] for i in range(33) if digest[i : i + 8] not in taken)


def run(notebook, folder):
    "Execute `notebook` in place as if it were in `folder`, without metadata that differ between runs."
    from nbclient import NotebookClient

    # Figures and numbers must not depend on how many cores the author has.
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    where = {"metadata": {"path": str(folder)}}
    quiet = ["--log-level=ERROR"]  # no message at every start that the kernel uses the loopback address
    NotebookClient(notebook, timeout=600, resources=where, extra_arguments=quiet).execute()
    for cell in notebook.cells:
        cell.metadata.pop("execution", None)
        if cell.cell_type == "code":
            cell.execution_count = None
            for output in cell.outputs:
                if "execution_count" in output:
                    output["execution_count"] = None
    notebook.metadata = metadata_of(notebook)


def execute(path):
    notebook = nbformat.read(path, 4)
    run(notebook, path.parent)
    nbformat.write(notebook, path)
    return path


if __name__ == "__main__":
    verb = {"pull": pull, "push": push, "execute": execute}[sys.argv[1]]
    for name in sys.argv[2:]:
        print(verb(Path(name)))
