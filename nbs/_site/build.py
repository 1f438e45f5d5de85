"""The steps of `make book` after installation: a first site, sample runs, live pages, and the site again.

Each step is skipped when nothing that it depends on has changed. A site is built beside the one that is
there, checked, and moved to its folder whole. Imports of anything heavy stand inside the functions.
"""

import os
import shutil
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import download
import filter as reader
from check import problems
from parallel import shown, tell, usable_cores
from stamps import FULL, digest_of, installed, read, write_whole

ROOT = Path(__file__).resolve().parents[2]
INPUTS = (
    ".ipynb", ".json",
    ".py", ".bib", ".css", ".scss", ".theme", ".html", ".svg", ".png", ".woff2", ".js", ".onnx",
)  # fmt: skip
MADE_BY_HAND = ("_txt", ".ipynb_checkpoints", "__pycache__")  # folders beside notebooks that are not pages
PATIENCE = 30  # seconds for fetching Quarto
A_DAY = 24 * 3600


# ---- sample runs


SAMPLES = ("sample-detect", "sample-segment", "sample")  # the longest first
FORGET = "import sys; from scsa_book.training.sweep import forget; forget(*sys.argv[1:])"
NOT_OF_RUNS = ("evidence", "_modidx.py")  # parts of the library that no run imports


def samples_follow(root=ROOT):
    "The inputs of the sample runs: data, run notebooks, the library without its evidence, versions."
    library = [p for p in root.glob("scsa_book/**/*.py") if not set(NOT_OF_RUNS) & set(p.parts)]
    others = [p for folder in ("data", "nbs/runs") for p in root.glob(f"{folder}/**/*") if p.is_file()]
    files = [p for p in library + others if not set(MADE_BY_HAND) & set(p.parts)]
    return reader.digest(digest_of(*sorted(files), root=root).encode(), installed().encode())


def samples_now(follow, root=ROOT):
    "The state of the sample runs: their inputs and results."
    results = sorted(root.glob("nbs/results/sample/*.json"))
    return reader.digest(follow.encode(), digest_of(*results, root=root).encode())


def ask(*words, root):
    "Run our Python with these arguments; the build stops if it fails."
    if code := subprocess.run([sys.executable, *words], cwd=root).returncode:
        sys.exit(code)


def sample_runs(root=ROOT):
    "The experiments on embedded images, one run per core; results with other inputs are removed."
    made_from, done = root / ".cache/samples-made-from", root / ".cache/samples-done"
    follow = samples_follow(root)
    if read(made_from) != follow:
        ask("-c", FORGET, *SAMPLES, root=root)
        write_whole(made_from, follow.encode())
    if read(done) != samples_now(follow, root):
        ask("-m", "scsa_book.cli", "sweep", *SAMPLES, root=root)
        write_whole(done, samples_now(follow, root).encode())


# ---- live pages: executed with the available results


def live_pages(root=ROOT):
    pages = sorted(root.glob("nbs/results/*.ipynb"))
    return [page for page in pages if '"cell_type": "code"' in page.read_text("utf-8")]


def live_pages_follow(root=ROOT):
    "The inputs of a live page besides itself: results, data, the library that reads them, versions."
    patterns = ("nbs/results/**/*.json", "scsa_book/**/*.py", "scsa_book/**/*.csv", "data/**/*")
    files = {p for pattern in patterns for p in root.glob(pattern) if p.is_file()}
    return reader.digest(digest_of(*sorted(files), root=root).encode(), installed().encode())


def made_from(page, inputs):
    return {"source": reader.digest(page.read_bytes()), "inputs": inputs}


def is_fresh(page, inputs):
    "Whether the executed copy of a page is up to date."
    copy = reader.executed_copy(page)
    return copy.exists() and reader.live_of(copy.read_bytes()) == made_from(page, inputs)


def refresh(page, inputs):
    "Execute a live page into the copy that the site shows."
    import nbformat
    from text import run

    made = made_from(page, inputs)
    notebook = nbformat.read(page, 4)
    run(notebook, page.parent)
    notebook.metadata["live"] = made
    write_whole(reader.executed_copy(page), nbformat.writes(notebook).encode())


def refresh_live_pages(root=ROOT):
    "Execute the live pages that are not up to date, one per core at a time."
    inputs = live_pages_follow(root)
    todo = [page for page in live_pages(root) if not is_fresh(page, inputs)]
    if not todo:
        return
    from nbclient.exceptions import CellExecutionError

    pool = ThreadPoolExecutor(usable_cores())  # each waits for a kernel, which is a process
    try:
        waiting = [(page, pool.submit(refresh, page, inputs)) for page in todo]
        for page, done in shown(waiting, len(waiting), "live pages"):
            done.result()
            tell(f"executed {page.relative_to(root)}")
    except CellExecutionError as error:
        sys.exit(f"{page.relative_to(root)} stopped:\n{error}")
    finally:
        pool.shutdown(cancel_futures=True)


# ---- the site


def find_quarto():
    "Quarto on the PATH or in this environment, else None."
    here = Path(sys.executable).parent
    return shutil.which("quarto") or shutil.which("quarto", path=str(here))


def fetch_quarto():
    "Try once a day to install Quarto into this environment; give up soon if the download is unreachable."
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


def site_follows(root=ROOT):
    return reader.digest(digest_of(*site_inputs(root), root=root).encode(), installed().encode())


def render_with_quarto(quarto, out, root):
    environment = os.environ | {"QUARTO_PYTHON": sys.executable}  # for the filter
    # Quarto warns of a link to a notebook that it neither renders nor finds, so the downloads come first.
    download.write(root, out, list(reader.notebooks(root)))
    command = [quarto, "render", "--no-clean", "--output-dir", out.name]
    if code := subprocess.run(command, cwd=root, env=environment).returncode:
        sys.exit(f"quarto render failed ({code})")


@contextmanager
def beside(out):
    "A folder for a new site, which replaces `out` at the end; until then `out` does not change."
    new, old = out.with_name(f"{out.name}_new"), out.with_name(f"{out.name}_old")
    if old.exists() and not out.exists():  # an earlier build was killed between the two renames
        old.rename(out)
    for folder in (new, old):
        shutil.rmtree(folder, ignore_errors=True)
    try:
        yield new
    except Exception:
        shutil.rmtree(new, ignore_errors=True)
        raise
    if out.exists():
        out.rename(old)
    new.rename(out)
    shutil.rmtree(old, ignore_errors=True)


def render(quarto, root=ROOT):
    "Make and check the site, unless it is up to date; returns its front page."
    out = root / ("_docs" if quarto else "_preview")
    front = out / ("index.html" if quarto else "nbs/index.html")
    stamp, follow = root / ".cache" / f"site{out.name}", site_follows(root)
    if front.exists() and read(stamp) == follow:
        return front
    stamp.unlink(missing_ok=True)
    with beside(out) as new:
        if quarto:
            render_with_quarto(quarto, new, root)
        else:
            import preview

            preview.build(root, new)
        if found := problems(new):
            sys.exit("\n".join([f"The site is built, but not as it should be. It is in {new}:", *found]))
    write_whole(stamp, follow.encode())
    return front


def main(root=ROOT):
    sys.modules.setdefault(
        "rfc3987_syntax", None
    )  # nbformat could check with it, and takes a second to import it
    try:
        build(root)
    except OSError as error:
        if error.errno not in FULL:
            raise
        where = f"{error.strerror}: {error.filename}"
        sys.exit(
            f"no space on the disk ({where}). What was built before stays; free some, then make book goes on."
        )


def build(root):
    first = render(None, root)
    tell(f"with the committed results: {first}")
    sample_runs(root)
    refresh_live_pages(root)
    quarto = find_quarto() or fetch_quarto()
    front = render(quarto, root)
    if not quarto:
        print("This is the plain preview; the full site needs Quarto (https://quarto.org), then `make book`.")
    print(front)


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit(130)
