"""The site: what the filter makes of a notebook, the preview, the checks, and the steps of a build."""

import errno
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import build
import check
import filter as reader
import nbformat
import parallel
import preview
import pytest
import readme
import stamps
import yaml
from conftest import ROOT, name_of, notebooks
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output, new_raw_cell

SVG = """<?xml version="1.0"?><svg xmlns:xlink="http://www.w3.org/1999/xlink" width="72pt" height="36pt" \
viewBox="0 0 72 36" xmlns="http://www.w3.org/2000/svg"><metadata>made today</metadata><g id="patch_1">
 <path d="M 0 0" style="fill: #ffffff"/></g><path id="a" style="fill: #000000"/><use xlink:href="#a"/>
<g clip-path="url(#c)"/></svg>"""


def plain(*cells, **metadata):
    "A notebook as the filter gets it."
    return json.loads(nbformat.writes(new_notebook(cells=list(cells), metadata=metadata)))


def code(source, *outputs, tags=()):
    return new_code_cell(source, outputs=list(outputs), metadata={"tags": list(tags)} if tags else {})


def shows(**data):
    return new_output(
        "display_data", {kind.replace("_", "/", 1).replace("svg", "svg+xml"): v for kind, v in data.items()}
    )


def cleaned(*cells, where=None, site=None, **metadata):
    "Sources of the cells that a reader sees."
    return [reader.text(cell) for cell in reader.clean(plain(*cells, **metadata), where, site)["cells"]]


# ---- the filter: cells


@pytest.mark.parametrize("directive", ["hide", "default_exp attention.se", "notest"])
def test_cells_for_nbdev_alone_are_dropped(directive):
    assert cleaned(code(f"#| {directive}\nx = 1"), code("y = 2")) == ["y = 2"]


def test_options_of_quarto_stay_and_words_of_nbdev_go():
    source = '#| slow\n#| label: fig-a\n#| fig-cap: "A: b"\nplot()'
    assert cleaned(code(source)) == ['#| label: fig-a\n#| fig-cap: "A: b"\nplot()']
    assert cleaned(code("#| hide_input\nx")) == ["#| echo: false\nx"]
    assert cleaned(code("#| hide_output\nx")) == ["#| output: false\nx"]


def test_a_colon_further_down_is_no_directive():
    assert cleaned(code("x = {1: 2}\n#| export")) == ["x = {1: 2}\n#| export"]


def test_an_exported_cell_names_its_module():
    default, other = code("#| export\nx = 1"), code("#| export options\ny = 1")
    first, second = cleaned(code("#| default_exp attention.se"), default, other)
    assert first == '#| filename: "scsa_book/attention/se.py"\n#| classes: exported\nx = 1'
    assert second == '#| filename: "scsa_book/options.py"\n#| classes: exported\ny = 1'


def test_an_empty_cell_is_dropped_unless_it_shows_something():
    assert cleaned(code(""), code("#| echo: false", shows(text_plain="3"))) == ["#| echo: false\n"]


def test_every_source_is_a_list_of_lines():
    # Quarto loses the line ends of one long string.
    nb = reader.clean(plain(new_markdown_cell("a\nb"), code("#| export\nx\ny")))
    assert [cell["source"] for cell in nb["cells"]] == [["a\n", "b"], ["x\n", "y"]]


# ---- the filter: outputs


def test_html_becomes_raw_html_inside_markdown():
    # One text/html output makes Quarto load scripts from another host.
    nb = reader.clean(plain(code("t", shows(text_html="<table></table>", text_plain="t"))))
    data = nb["cells"][0]["outputs"][0]["data"]
    assert "".join(data.pop("text/markdown")) == "```````{=html}\n<table></table>\n```````\n"
    assert not data


def test_colours_of_the_terminal_are_dropped():
    output = new_output("stream", name="stdout", text="\x1b[31mred\x1b[0m\n")
    nb = reader.clean(plain(code("f()", output)))
    assert nb["cells"][0]["outputs"][0]["text"] == ["red\n"]


def test_a_figure_takes_the_colours_of_the_page():
    source = '#| fig-alt: "A <small> figure"\nplot()'
    nb = reader.clean(plain(code(source, shows(image_svg=SVG)), code("again()", shows(image_svg=SVG))))
    one, two = ("".join(c["outputs"][0]["data"]["text/markdown"]) for c in nb["cells"])
    assert "#000000" not in one and "currentColor" in one
    assert "#ffffff" not in one and "var(--figure-ground, none)" in one
    assert 'aria-label="A small figure"' in one and 'aria-label="figure"' in two
    assert 'viewBox="0 0 72 36" style="--w:96px"' in one
    assert "made today" not in one and "<?xml" not in one
    ids = [m.split('"')[1] for m in (one + two).split(" ") if m.startswith('id="')]
    assert len(ids) == len(set(ids)) == 4, "two figures on a page share no id"
    assert f'href="#{ids[1]}"' in one


def test_an_image_that_is_drawn_twice_has_no_id():
    image = '<image xlink:href="data:," id="imagea1" transform="x"/>'
    made = reader.theme_svg(f"<svg>{image}{image}</svg>", "f1-", "a")
    assert made.count("<image") == 2 and "imagea1" not in made and made.count('transform="x"') == 2


# ---- the filter: Markdown and front matter


def test_callouts_are_opened():
    (source,) = cleaned(new_markdown_cell('::: {.differ}\na\n:::\n\n:::: {.tryit title="Now you"}\nb\n::::'))
    assert '::: {.callout-warning .differ icon="false" title="Paper and code differ"}' in source
    assert ':::: {.callout-tip .tryit icon="false" title="Now you"}' in source


def test_a_solution_is_folded():
    (source,) = cleaned(new_markdown_cell("::: {.answer}\n7\n:::"))
    assert source.startswith('::: {.callout-note .answer icon="false" collapse="true" title="Answer"}')


def test_title_and_line_become_front_matter():
    top, rest = cleaned(new_markdown_cell('# A "title"\n\n> One line,\n> or two.\n\nText.'))
    assert yaml.safe_load(top.strip().strip("-")) == {
        "title": 'A "title"',
        "description": "One line, or two.",
    }
    assert rest == "Text."


def test_given_front_matter_wins():
    raw = new_raw_cell("---\ndescription: mine\ntoc: false\n---")
    (top,) = cleaned(raw, new_markdown_cell("# Title\n\n> line"))
    assert yaml.safe_load(top.strip().strip("-")) == {"title": "Title", "description": "mine", "toc": False}


def test_a_title_alone_is_enough():
    assert cleaned(new_markdown_cell("# Title")) == ['---\ntitle: "Title"\n---\n']


# ---- the filter: executed runs and links

PAPERMILL = {
    "start_time": "2025-02-01T10:00:00",
    "duration": 61.25,
    "input_path": "/there/nbs/runs/classify.ipynb",
}


def run_cells():
    defaults = "#| echo: true\nattention: str = 'none'\nseed = 0  # which\nepochs = 4"
    return [
        new_markdown_cell("# Run\n\n> line"),
        code(defaults, tags=["parameters"]),
        code("# Parameters\nseed = 3\n", tags=["injected-parameters"]),
        code("result"),
    ]


def test_parameters_of_a_run_are_one_block():
    *_, block, last = cleaned(*run_cells(), papermill=PAPERMILL)
    assert block == (
        '#| filename: "parameters of this run"\n#| classes: injected\n'
        "seed = 3\n# as in the template\nattention: str = 'none'\nepochs = 4"
    )
    assert last == "result"


def test_a_run_says_when_it_was_made_and_from_what():
    top, line, *_ = cleaned(*run_cells(), papermill=PAPERMILL)
    assert "repo-actions: false" in top, "an executed copy is in no repository"
    assert "Executed 2025-02-01 in 61.2 s from `classify.ipynb`" in line


SITE = {"repo-url": "https://github.com/a/b", "repo-branch": "trunk"}


def page_links(where, *cells, site=SITE, **metadata):
    cells = cells or (new_markdown_cell("# T\n\n> l"), code("1"))
    return [s for s in cleaned(*cells, where=Path(where), site=site, **metadata) if "page-links" in s]


def test_links_to_a_repository_need_an_address():
    (line,) = page_links("nbs/channel/se.ipynb", site={})
    assert re.findall(r"]\(|`", line) == [] and line.count(" download>") == 2, "the notebook, and the archive"
    (line,) = page_links("nbs/channel/se.ipynb")
    assert line.count(" download>") == 1
    assert "(https://colab.research.google.com/github/a/b/blob/trunk/nbs/channel/se.ipynb)" in line
    assert "(https://github.com/a/b/blob/trunk/nbs/channel/se.ipynb)" in line
    assert "`jupyter lab nbs/channel/se.ipynb`" in line


def test_no_links_where_nothing_runs():
    assert page_links("nbs/index.ipynb") == []
    assert page_links("nbs/channel/index.ipynb", new_markdown_cell("# T\n\n> l")) == []


def test_a_run_links_to_its_template():
    line, _ = page_links("nbs/results/sample/x.ipynb", *run_cells(), papermill=PAPERMILL)
    assert "/blob/trunk/nbs/runs/classify.ipynb" in line
    assert "blob/trunk/nbs/results" not in line


def test_a_host_that_is_not_github_has_no_colab():
    (line,) = page_links("nbs/a/b.ipynb", site={"repo-url": "https://example.org/a/b"})
    assert "colab" not in line and "(https://example.org/a/b/blob/main/nbs/a/b.ipynb)" in line


# ---- a small book


def write(path, *cells, **metadata):
    path.parent.mkdir(parents=True, exist_ok=True)
    ids = (setattr(cell, "id", f"c{i}") or cell for i, cell in enumerate(cells))
    nbformat.write(new_notebook(cells=list(ids), metadata=metadata), path)
    return path


SIDEBAR = [
    {"text": "Home", "href": "nbs/index.ipynb"},
    {"section": "Part", "href": "nbs/part/index.ipynb", "contents": ["nbs/part/page.ipynb"]},
    {
        "section": "Runs",
        "href": "nbs/results/index.ipynb",
        "contents": [{"auto": "nbs/results/*/*.ipynb"}],
    },
]
EVERYTHING = """\
# Everything

> All that the preview knows.

See @eq-one, @fig-a, @tbl-t, @sec-s, [the other](index.ipynb#a-heading-with-code), $x^2$ and `$5 @nobody`.[^n]

[^n]: A note with @hu2018se.

$$
a = b
$$ {#eq-one}

## A section {#sec-s}

::: {.differ}
They *differ* [@hu2018se; @woo2018cbam].
:::

::: {.answer}
Folded.
:::

| a | b |
|--:|:--|
| 1 | 2 |

: A caption {#tbl-t}
"""


@pytest.fixture
def book(tmp_path):
    website = {"title": "Small", "sidebar": {"contents": SIDEBAR}, "page-footer": {"left": "l", "right": "r"}}
    (tmp_path / "_quarto.yml").write_text(yaml.safe_dump({"website": website}))
    shutil.copytree(ROOT / "nbs/theme", tmp_path / "nbs/theme")
    shutil.copy(ROOT / "nbs/references.bib", tmp_path / "nbs")
    write(
        tmp_path / "nbs/index.ipynb",
        new_markdown_cell("# Small\n\n> book\n\n::: {.parts}\n- [P](part/index.ipynb)\n:::"),
    )
    write(
        tmp_path / "nbs/part/index.ipynb", new_markdown_cell("# Part\n\n> line\n\n## A heading, with `code`!")
    )
    figure = '#| label: fig-a\n#| fig-cap: "Of $x$"\n#| code-fold: true\nplot()'
    cells = [new_markdown_cell(EVERYTHING), code("#| export\nx = 1"), code(figure, shows(image_svg=SVG))]
    table = shows(text_markdown="| c |\n|---|\n| 1 |\n\n: From code {#tbl-code}\n")
    linked = shows(text_html='<table><tr><td><a href="../index.ipynb">home</a></td></tr></table>')
    cells += [code("table", table), code("link", linked), code("#| default_exp a.b")]
    write(tmp_path / "nbs/part/page.ipynb", *cells)
    write(tmp_path / "nbs/results/index.ipynb", new_markdown_cell("# Runs\n\n> line"))
    write(tmp_path / "nbs/results/sample/index.ipynb", new_markdown_cell("# Sample\n\n> line"))
    write(tmp_path / "nbs/runs/classify.ipynb", new_markdown_cell("# Template\n\n> line"))
    return tmp_path


def html_of(out, name):
    return (out / f"nbs/{name}.html").read_text("utf-8")


def test_the_preview_of_a_small_book(book):
    out = book / "out"
    assert preview.build(book, out) == out / "nbs/index.html"
    assert check.problems(out) == []
    page = html_of(out, "part/page")
    assert "exported to" not in page and "scsa_book/a/b.py" in page
    for shown in ("<math", 'id="eq-one"', "(1)", 'href="#eq-one"', ">Figure&nbsp;1</a>", ">Table&nbsp;1</a>"):
        assert shown in page
    assert '<figure id="fig-a">' in page and "From code" in page and "Table&nbsp;2" in page
    assert 'href="#sec-s">A section</a>' in page
    assert "Hu et al. 2018" in page and 'id="ref-woo2018cbam"' in page and 'id="note-1"' in page
    assert '<a href="../index.html">home</a>' in page, "also in a table that a cell made"
    assert "$5 @nobody" in page, "code keeps its signs"
    assert (
        '<details class="callout note answer">' in page.replace("  ", " ")
        or "<summary>Answer</summary>" in page
    )
    assert "Paper and code differ" in page and "KEPT" not in page
    assert not (out / "nbs/runs").exists(), "templates are no pages"


def test_a_sign_is_not_set_like_a_difference():
    assert preview.mathml("f(-2)").count('form="prefix"') == 1
    assert preview.mathml("x = -1, -2").count('form="prefix"') == 2
    assert "prefix" not in preview.mathml("a - b") + preview.mathml("(a) - b")


def test_anchors_are_those_of_quarto(book):
    preview.build(book, book / "out")
    assert '<h2 id="a-heading-with-code">' in html_of(book / "out", "part/index")
    assert preview.identifier("2 × What?  (again)", []) == "what-again"
    assert preview.identifier("Cost", ["cost"]) == "cost-1"
    assert preview.identifier("12", []) == "section"


def test_executed_runs_appear_in_the_sidebar_and_none_is_no_dead_link(book):
    def listed():
        return [(depth, path) for depth, _, path in preview.contents(SIDEBAR, book)][3:]

    index = (0, "nbs/results/index.ipynb"), (1, "nbs/results/sample/index.ipynb")
    assert listed() == [*index]
    write(book / "nbs/results/sample/b.ipynb", *run_cells(), papermill=PAPERMILL)
    write(book / "nbs/results/sample/a.ipynb", *run_cells(), papermill=PAPERMILL)
    assert listed() == [*index, (2, "nbs/results/sample/a.ipynb"), (2, "nbs/results/sample/b.ipynb")]
    preview.build(book, book / "out")
    assert check.problems(book / "out") == []
    assert "parameters of this run" in html_of(book / "out", "results/sample/a")


def test_previous_and_next_follow_the_sidebar(book):
    preview.build(book, book / "out")
    page = html_of(book / "out", "part/index")
    assert '<a href="../index.html" class="previous">Home</a>' in page
    assert '<a href="page.html" class="next">Everything</a>' in page


def test_the_preview_leaves_nothing_of_an_older_one(book):
    stale = book / "out/nbs/gone.html"
    stale.parent.mkdir(parents=True)
    stale.touch()
    preview.build(book, book / "out")
    assert not stale.exists()


# ---- live pages


def test_a_live_page_is_shown_as_the_build_executed_it(book):
    page = write(book / "nbs/results/table.ipynb", new_markdown_cell("# Table\n\n> line"), code("6 * 7"))
    assert not build.is_fresh(page, "first")
    build.refresh(page, "first")
    assert "42" not in page.read_text(), "the source is left as it was"
    preview.build(book, book / "out")
    assert '<pre class="out">42</pre>' in html_of(book / "out", "results/table")
    assert build.is_fresh(page, "first") and not build.is_fresh(page, "second")
    write(page, new_markdown_cell("# Table\n\n> line"), code("7 * 7"))
    assert "42" not in json.dumps(reader.read(page)), "a copy of an older source is not shown"
    assert not build.is_fresh(page, "first")
    build.refresh(page, "first")
    assert "49" in json.dumps(reader.read(page))


def test_a_live_page_that_fails_stops_the_build(book):
    write(book / "nbs/results/broken.ipynb", new_markdown_cell("# T\n\n> l"), code("1 / 0"))
    with pytest.raises(SystemExit, match=r"(?s)nbs/results/broken.ipynb stopped:.*ZeroDivisionError"):
        build.refresh_live_pages(book)
    assert not (book / "nbs/results/.built/broken.ipynb").exists()


def test_live_pages_are_those_beside_the_results_that_have_code(book):
    live = write(book / "nbs/results/live.ipynb", code("1"))
    write(book / "nbs/results/sample/run.ipynb", code("1"))
    assert build.live_pages(book) == [live]


def different(digest, book, monkeypatch, *names):
    "Whether `digest` is another one after every change of a file, and with other versions."
    seen = [digest(book)]
    for name in names:
        (book / name).parent.mkdir(parents=True, exist_ok=True)
        for content in "12":
            (book / name).write_text(content)
            seen.append(digest(book))
    monkeypatch.setattr(build, "installed", lambda: "python-4")
    return len(set(seen) | {digest(book)}) == 2 * len(names) + 2


def test_live_pages_depend_on_results_data_library_and_versions(book, monkeypatch):
    library = ("scsa_book/evidence/ledger.py", "scsa_book/evidence/published.csv")
    others = ("nbs/results/sample/a.json", "data/fashion/images.gz")
    assert different(build.live_pages_follow, book, monkeypatch, *library, *others)


def test_sample_runs_depend_on_data_notebooks_library_and_versions(book, monkeypatch):
    others = ("data/fashion/images.gz", "nbs/runs/classify.ipynb", "nbs/runs/experiments.yml")
    assert different(build.samples_follow, book, monkeypatch, "scsa_book/attention/se.py", *others)


def test_sample_runs_do_not_depend_on_what_no_run_imports(book):
    before = build.samples_follow(book)
    write(book / "scsa_book/evidence/ledger.py")
    assert build.samples_follow(book) == before


def test_the_site_depends_on_pages_theme_tools_settings_and_versions(book, monkeypatch):
    names = ("nbs/part/page.ipynb", "nbs/theme/base.scss", "nbs/_site/preview.py", "nbs/references.bib")
    assert different(build.site_follows, book, monkeypatch, "_quarto.yml", *names)


def test_a_page_is_converted_again_when_anything_it_depends_on_has_changed(book, monkeypatch):
    def key(name="part/page"):
        return preview.key_of(book / f"nbs/{name}.ipynb", book, preview.what_all_pages_follow(book))

    seen = [key(), key("part/index")]
    write(book / "nbs/part/page.ipynb", new_markdown_cell("# Other\n\n> line"))
    seen.append(key())
    build.refresh(book / "nbs/part/page.ipynb", "")
    seen.append(key())
    (book / "nbs/references.bib").write_text("")
    seen.append(key())
    (book / "_quarto.yml").write_text("repo-url: https://github.com/a/b\n")
    seen.append(key())
    monkeypatch.setattr(preview, "installed", lambda: "python-4")
    seen.append(key())
    (book / "tools").mkdir()
    for name in ("preview.py", "filter.py"):
        (book / "tools" / name).write_text("other")
    monkeypatch.setattr(preview, "__file__", str(book / "tools" / "preview.py"))
    seen.append(key())
    assert len(set(seen)) == len(seen)


def test_versions_are_those_of_all_packages():
    words = stamps.installed().split()
    assert f"pytest-{pytest.__version__}" in words and f"nbformat-{nbformat.__version__}" in words
    assert words[0] == "python-" + sys.version.split()[0]


def filtered(path):
    "What Quarto gets: the filter as a program, with the standard library alone."
    command = [sys.executable, "-I", "-S", ROOT / "nbs/_site/filter.py"]
    done = subprocess.run(command, input=path.read_bytes(), cwd=path.parent, capture_output=True, check=True)
    return json.loads(done.stdout)


def test_the_filter_is_a_program_that_finds_the_executed_copy(book):
    page = write(book / "nbs/results/table.ipynb", new_markdown_cell("# Tafel äöü\n\n> line"), code("6 * 7"))
    before = filtered(page)
    assert "Tafel äöü" in reader.text(before["cells"][0])
    assert before["cells"][-1]["outputs"] == []
    build.refresh(page, "")
    assert filtered(page)["cells"][-1]["outputs"][0]["data"]["text/plain"] in ("42", ["42"])


# ---- the build


def test_the_site_is_made_again_only_when_something_changed(book):
    front = build.render(None, book)
    assert front == book / "_preview/nbs/index.html"
    made = front.stat().st_mtime_ns
    assert build.render(None, book) == front and front.stat().st_mtime_ns == made
    write(book / "nbs/index.ipynb", new_markdown_cell("# Other\n\n> book"))
    build.render(None, book)
    assert "Other" in front.read_text()
    front.unlink()
    assert build.render(None, book).exists()


@pytest.fixture
def no_quarto(monkeypatch):
    "A build where the runs are done and Quarto is out of reach; the list tells which commands were called."
    called = []
    monkeypatch.setattr(build, "find_quarto", lambda: None)
    monkeypatch.setattr(build, "fetch_quarto", lambda: None)
    done = subprocess.CompletedProcess((), returncode=0)
    monkeypatch.setattr(build.subprocess, "run", lambda command, **options: called.append(command) or done)
    return called


def test_a_build_ends_with_the_path_of_the_front_page(book, no_quarto, capsys):
    write(book / "nbs/results/table.ipynb", new_markdown_cell("# Table\n\n> line"), code("6 * 7"))
    build.main(book)
    first, executed, what, front = capsys.readouterr().out.strip().splitlines()
    assert "plain preview" in what and "Quarto" in what
    assert front == str(book / "_preview/nbs/index.html") and Path(front).exists()
    assert first == f"with the committed results: {front}" and executed == "executed nbs/results/table.ipynb"
    forgotten, swept = (command[1:] for command in no_quarto)
    assert forgotten == ["-c", build.FORGET, *build.SAMPLES]
    assert swept == ["-m", "scsa_book.cli", "sweep", *build.SAMPLES]
    assert "42" in html_of(book / "_preview", "results/table")


def test_a_build_with_nothing_to_do_starts_nothing_and_writes_nothing(book, no_quarto, monkeypatch):
    write(book / "nbs/results/table.ipynb", new_markdown_cell("# Table\n\n> line"), code("6 * 7"))
    build.main(book)
    before = {path: path.stat().st_mtime_ns for path in book.rglob("*")}
    no_quarto.clear()
    for name in ("refresh", "problems"):
        monkeypatch.setattr(build, name, lambda *a: pytest.fail("there was nothing to do"))
    build.main(book)
    assert no_quarto == [] and {path: path.stat().st_mtime_ns for path in book.rglob("*")} == before


def test_sample_runs_that_are_gone_are_made_and_those_of_another_library_forgotten(book, no_quarto):
    def asked():
        build.sample_runs(book)
        words = [command[3] for command in no_quarto]
        no_quarto.clear()
        return words

    result = book / "nbs/results/sample/a.json"
    result.write_text("1")
    assert asked() == [build.SAMPLES[0], "sweep"] and asked() == []
    result.write_text("2")
    assert asked() == ["sweep"] and asked() == []
    result.unlink()
    assert asked() == ["sweep"] and asked() == []
    write(book / "scsa_book/attention/se.py")
    assert asked() == [build.SAMPLES[0], "sweep"] and asked() == []


def test_a_build_with_a_dead_link_fails_and_says_where(book, no_quarto):
    write(book / "nbs/part/index.ipynb", new_markdown_cell("# P\n\n> l\n\n[x](gone.ipynb)"))
    with pytest.raises(SystemExit, match=r"nbs/part/index.html: missing gone.html"):
        build.main(book)


def test_a_build_stops_when_the_runs_fail_and_tries_them_again(book, no_quarto, monkeypatch):
    def called(command, **options):
        no_quarto.append(command)
        return subprocess.CompletedProcess((), returncode=5 if "sweep" in command else 0)

    monkeypatch.setattr(build.subprocess, "run", called)
    for known in (False, True):  # whether results of another library were forgotten already
        with pytest.raises(SystemExit, match="5"):
            build.main(book)
        assert [command[3] for command in no_quarto] == [build.SAMPLES[0], "sweep"][known:]
        no_quarto.clear()
    assert (book / "_preview/nbs/index.html").exists(), "the committed results can be read"


def page_of(book):
    return (book / "_preview/nbs/index.html").read_text("utf-8")


@pytest.fixture
def shown(book):
    "A book with a site, and a change that is not on it yet."
    build.render(None, book)
    write(book / "nbs/index.ipynb", new_markdown_cell("# Changed\n\n> book"))
    return book


def test_a_disk_that_is_full_is_said_and_the_last_site_stays(shown, monkeypatch):
    def full(*arguments, **options):
        raise OSError(errno.ENOSPC, "No space left on device", "x.html")

    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_text", full)
        with pytest.raises(SystemExit, match="no space on the disk .No space left on device: x.html"):
            build.main(shown)
    assert "Small" in page_of(shown) and not (shown / "_preview_new").exists()
    build.render(None, shown)
    assert "Changed" in page_of(shown)


KILLED = """
import os, signal, sys
from pathlib import Path
import build
book, where, how = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])
if where == "writing":
    import preview
    render = preview.render
    def until_the_second(path, *rest):
        if path.name == "page.ipynb":
            os.kill(os.getpid(), how)
        return render(path, *rest)
    preview.render = until_the_second
else:
    rename = Path.rename
    def between(path, target):
        if path.name == "_preview_new":
            os.kill(os.getpid(), how)
        return rename(path, target)
    Path.rename = between
build.render(None, book)
"""


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT], ids=["killed", "Ctrl-C"])
@pytest.mark.parametrize("where", ["writing", "between the renames"])
def test_a_build_that_is_killed_shows_no_half_of_a_site_and_goes_on(shown, where, how):
    command = [sys.executable, "-c", KILLED, str(shown), where, str(int(how))]
    done = subprocess.run(command, env={**os.environ, "PYTHONPATH": str(ROOT / "nbs/_site")})
    assert done.returncode == -how
    if where == "writing":
        assert "Small" in page_of(shown)
    else:
        assert not (shown / "_preview").exists(), "no site rather than half of one"
    build.render(None, shown)
    assert "Changed" in page_of(shown) and check.problems(shown / "_preview") == []
    assert [path.name for path in shown.glob("_preview*")] == ["_preview"]


def test_pages_are_the_same_from_one_process_or_several(book, monkeypatch):
    monkeypatch.setattr(parallel, "MIN_ITEMS", 0)
    preview.build(book, book / "one", cores=1)
    shutil.rmtree(book / ".cache")
    preview.build(book, book / "two", cores=2)
    one, two = ({p.name: p.read_bytes() for p in (book / n).rglob("*.html")} for n in ("one", "two"))
    assert one == two and one
    assert check.problems(book / "one", cores=1) == check.problems(book / "two", cores=2) == []


def test_a_page_that_was_kept_torn_is_converted_again(book):
    preview.build(book, book / "one")
    for file in (book / ".cache/pages").iterdir():
        file.write_bytes(file.read_bytes()[:-9])
    preview.build(book, book / "two")
    assert html_of(book / "one", "part/page") == html_of(book / "two", "part/page")


def test_only_pages_of_the_present_book_are_kept(book, monkeypatch):
    converted = []
    convert = preview.convert_page
    monkeypatch.setattr(preview, "convert_page", lambda job: converted.append(job[0].name) or convert(job))
    preview.build(book, book / "out")
    many = len(converted)
    write(book / "nbs/index.ipynb", new_markdown_cell("# Changed\n\n> book"))
    preview.build(book, book / "out")
    assert converted[many:] == ["index.ipynb"] and "Changed" in html_of(book / "out", "index")
    assert len(list((book / ".cache/pages").iterdir())) == many


def test_quarto_is_called_with_our_python_and_its_failure_is_reported(book, monkeypatch):
    quarto = book / "quarto"
    quarto.write_text(
        '#!/bin/sh\nmkdir -p "$4"; echo "$QUARTO_PYTHON" > "$4/index.html"; exit "${CODE:-0}"\n'
    )
    quarto.chmod(0o755)
    front = build.render(str(quarto), book)
    assert front == book / "_docs/index.html" and front.read_text().strip() == sys.executable
    front.unlink()
    monkeypatch.setenv("CODE", "3")
    with pytest.raises(SystemExit, match="quarto render failed"):
        build.render(str(quarto), book)


def test_a_download_that_hangs_is_given_up_and_not_tried_again(tmp_path, monkeypatch):
    started = []

    def hang(command, **options):
        started.append(process := popen([sys.executable, "-c", "import time; time.sleep(60)"], **options))
        return process

    popen = subprocess.Popen
    monkeypatch.setattr(build.subprocess, "Popen", hang)
    monkeypatch.setattr(build, "PATIENCE", 0.2)
    monkeypatch.setattr(build, "find_quarto", lambda: None)
    monkeypatch.setattr(build.sys, "prefix", str(tmp_path))
    begin = time.monotonic()
    assert build.fetch_quarto() is None
    assert time.monotonic() - begin < 10
    assert started[0].poll() is not None, "nothing is left running"
    assert build.fetch_quarto() is None and len(started) == 1


def test_nothing_is_installed_outside_an_environment_of_our_own(monkeypatch):
    monkeypatch.setattr(build.sys, "prefix", sys.base_prefix)
    monkeypatch.setattr(build.subprocess, "Popen", None)
    assert build.fetch_quarto() is None


# ---- the check


def site(tmp_path, body, **files):
    (tmp_path / "index.html").write_text(f"<html><body>{body}</body></html>")
    for name, content in files.items():
        (tmp_path / name.replace("_", ".")).write_text(content)
    return check.problems(tmp_path)


@pytest.mark.parametrize(
    "body",
    [
        '<script src="https://cdn.org/a.js"></script>',
        '<img src="//cdn.org/a.png">',
        '<img srcset="b.png 1x, https://cdn.org/a.png 2x" src="index.html">',
        '<link rel="stylesheet" href="http://cdn.org/a.css">',
        '<p style="background: url(https://cdn.org/a.png)"></p>',
        "<style>@import 'https://cdn.org/a.css';</style>",
        '<svg><image xlink:href="https://cdn.org/a.png"/></svg>',
        '<iframe src="https://cdn.org/"></iframe>',
    ],
)
def test_a_load_from_another_host_is_found(tmp_path, body):
    found = site(tmp_path, body, b_png="")
    assert len(found) == 1 and "loads" in found[0] and "cdn.org" in found[0]


def test_a_style_sheet_that_loads_from_another_host_is_found(tmp_path):
    assert site(tmp_path, "", a_css="@font-face { src: url('https://cdn.org/a.woff2') }") == [
        "a.css: loads https://cdn.org/a.woff2"
    ]


@pytest.mark.parametrize(
    ("body", "problem"),
    [
        ('<a href="gone.html">x</a>', "missing gone.html"),
        ('<img src="gone.png">', "missing gone.png"),
        ('<a href="#gone">x</a>', "no anchor #gone"),
        ('<a href="index.html#gone">x</a>', "no anchor index.html#gone"),
        ("<p>::: {.differ}</p>", "not rendered: :::"),
        ("<p>see ?@fig-a</p>", "not rendered: ?@fig-a"),
        ("<p>#| export</p>", "not rendered: #| export"),
        ("<p>{#tbl-a}</p>", "not rendered: {#tbl-"),
    ],
)
def test_what_is_dead_or_unrendered_is_found(tmp_path, body, problem):
    assert site(tmp_path, body) == [f"index.html: {problem}"]


@pytest.mark.parametrize(
    "body",
    [
        '<a href="https://example.org">elsewhere</a>',
        '<a id="here" href="#here">x</a><a href="#top">x</a><a href=".">x</a>',
        '<img src="data:image/png;base64,AAAA">',
        '<link rel="canonical" href="https://example.org">',
        '<svg xmlns:xlink="http://www.w3.org/1999/xlink"></svg>',
        "<pre>::: #| export</pre><code>?@fig-a</code>",
        '<a href="index.html?q=1#%C3%A4">x</a><p id="ä"></p>',
    ],
)
def test_what_is_fine_is_not_reported(tmp_path, body):
    assert site(tmp_path, body) == []


def test_an_empty_site_is_a_problem(tmp_path):
    assert check.problems(tmp_path) == [f"{tmp_path}: no page"]


def test_a_site_is_read_anew_each_time(tmp_path):
    assert site(tmp_path, '<a href="#gone">x</a>')
    assert site(tmp_path, '<a id="gone" href="#gone">x</a>') == []


# ---- the real book


def test_every_page_is_in_the_sidebar_and_every_entry_is_a_page():
    website = yaml.safe_load((ROOT / "_quarto.yml").read_text("utf-8"))["website"]
    listed = [path for _, _, path in preview.contents(website["sidebar"]["contents"], ROOT)]
    assert [path for path in listed if not (ROOT / path).exists()] == []
    assert [name_of(path) for path in reader.notebooks(ROOT) if name_of(path) not in listed] == []
    assert len(listed) == len(set(listed))


def test_the_real_book_is_as_it_should_be(tmp_path):
    preview.build(ROOT, tmp_path / "site", cores=1)  # the others have tests to do
    assert check.problems(tmp_path / "site", cores=1) == []


def test_quarto_renders_what_the_preview_shows():
    project = yaml.safe_load((ROOT / "_quarto.yml").read_text("utf-8"))
    assert project["project"]["render"] == ["nbs/index.ipynb", "nbs/**/*.ipynb", "!nbs/runs/"]
    assert project["execute"] == {"enabled": False}
    for name in [
        *project["ipynb-filters"],
        project["bibliography"],
        *project["format"]["html"]["theme"]["light"],
    ]:
        assert (ROOT / name).exists()


@pytest.mark.parametrize("path", notebooks(), ids=name_of)
def test_the_filter_leaves_no_directive_of_nbdev(path):
    cells = reader.clean(reader.read(path), path.relative_to(ROOT))["cells"]
    for cell in cells:
        if cell["cell_type"] == "code":
            assert not any(map(reader.is_nbdev, reader.split_head(reader.text(cell))[0]))


def test_the_figure_of_the_readme_follows_the_theme():
    image = readme.standalone(SVG)
    assert image.startswith("<svg") and "prefers-color-scheme:dark" in image
    assert "#000000" not in image and "fill: none" in image and "made today" not in image
