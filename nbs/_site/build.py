"""What `make book` does after its set-up: sample runs, pages that read results, the site, and a check of it.

Each step is skipped when nothing that it depends on has changed.
"""

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import filter as reader
import nbformat
from check import problems
from nbclient.exceptions import CellExecutionError
from text import run

ROOT = Path(__file__).resolve().parents[2]
INPUTS = (".ipynb", ".py", ".bib", ".css", ".scss", ".theme", ".html", ".svg", ".png", ".woff2")
MADE_BY_HAND = ("_txt", ".ipynb_checkpoints", "__pycache__")  # folders beside notebooks that are not pages
PATIENCE = 30  # seconds for fetching Quarto
A_DAY = 24 * 3600


# ---- sample runs


SAMPLES = ("sample", "sample-detect", "sample-segment")


def sample_runs(root=ROOT):
    "The experiments on embedded pictures; the command skips runs that have a valid result."
    for name in SAMPLES:
        command = [sys.executable, "-m", "scsa_book.cli", "sweep", name]
        if code := subprocess.run(command, cwd=root).returncode:
            sys.exit(code)


# ---- live pages: committed as they look without results, shown with the results that are here


def live_pages(root=ROOT):
    return [p for p in sorted(root.glob("nbs/results/*.ipynb")) if has_code(p)]


def has_code(path):
    return any(cell["cell_type"] == "code" for cell in nbformat.read(path, 4).cells)


def digest_of(*files):
    return reader.digest(*(part for path in files for part in (path.as_posix().encode(), path.read_bytes())))


def digest_of_results(root=ROOT):
    "What a live page depends on beside itself: the results, and the library that reads them."
    found = [
        root.glob("nbs/results/**/*.json"),
        root.glob("scsa_book/**/*.py"),
        root.glob("scsa_book/**/*.csv"),
    ]
    return digest_of(*sorted(path for paths in found for path in paths))


def refresh(page, inputs):
    "Execute a live page into the copy that readers see, unless the copy is up to date; True if it did."
    made_from = {"source": reader.digest(page.read_bytes()), "inputs": inputs}
    copy = reader.executed_copy(page)
    if copy.exists() and nbformat.read(copy, 4).metadata.get("live") == made_from:
        return False
    notebook = nbformat.read(page, 4)
    run(notebook, page.parent)
    notebook.metadata["live"] = made_from
    copy.parent.mkdir(exist_ok=True)
    nbformat.write(notebook, copy)
    return True


def refresh_live_pages(root=ROOT):
    inputs = digest_of_results(root)
    for page in live_pages(root):
        try:
            if refresh(page, inputs):
                print(f"executed {page.relative_to(root)}")
        except CellExecutionError as error:
            sys.exit(f"{page.relative_to(root)} stopped:\n{error}")


# ---- the site


def find_quarto():
    "Quarto on the PATH or in this environment, else None."
    here = Path(sys.executable).parent
    return shutil.which("quarto") or shutil.which("quarto", path=str(here))


def fetch_quarto():
    "Try once a day to put Quarto into this environment; where its download is out of reach, give up soon."
    refused = Path(sys.prefix) / "quarto-out-of-reach"
    in_venv = sys.prefix != sys.base_prefix
    if not in_venv or (refused.exists() and time.time() - refused.stat().st_mtime < A_DAY):
        return None
    print(f"looking for Quarto (at most {PATIENCE} s) ...")
    command = [sys.executable, "-m", "pip", "install", "--quiet", "quarto-cli"]
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    process = subprocess.Popen(command, start_new_session=True, **quiet)
    try:
        process.wait(PATIENCE)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    found = find_quarto()
    if not found:
        refused.touch()
    return found


def site_inputs(root=ROOT):
    "Every file that the site is made from."
    pages = (p for p in root.glob("nbs/**/*") if p.suffix in INPUTS and not set(MADE_BY_HAND) & set(p.parts))
    return [root / "_quarto.yml", *sorted(pages)]


def render_with_quarto(quarto, out, root):
    environment = os.environ | {"QUARTO_PYTHON": sys.executable}  # for the filter
    command = [quarto, "render", "--output-dir", out.name]
    if code := subprocess.run(command, cwd=root, env=environment).returncode:
        sys.exit(f"quarto render failed ({code})")


def render(quarto, root=ROOT):
    "Make the site, or leave it when it is made from the same files; returns its front page."
    out = root / ("_docs" if quarto else "_preview")
    front = out / ("index.html" if quarto else "nbs/index.html")
    stamp = root / ".cache" / f"site{out.name}"
    digest = digest_of(*site_inputs(root))
    if front.exists() and stamp.exists() and stamp.read_text() == digest:
        return front
    stamp.unlink(missing_ok=True)
    if quarto:
        render_with_quarto(quarto, out, root)
    else:
        import preview

        preview.build(root, out)
    stamp.parent.mkdir(exist_ok=True)
    stamp.write_text(digest)
    return front


def main(root=ROOT):
    sample_runs(root)
    refresh_live_pages(root)
    quarto = find_quarto() or fetch_quarto()
    front = render(quarto, root)
    if found := problems(root / front.relative_to(root).parts[0]):
        sys.exit("\n".join(["The site is built, but not as it should be:", *found]))
    if not quarto:
        print("This is the plain preview; the full site needs Quarto (https://quarto.org), then `make book`.")
    print(front)


if __name__ == "__main__":
    main()
