"""The glossary: its terms, the links of the filter to them, and what the site's search finds."""

import json
import re

import filter as reader
import pytest
from conftest import ROOT, name_of, notebooks

from scsa_book.explain.glossary import entry, terms

FORMS = reader.glossary(ROOT)
# What somebody who knows the field looks for, and the page that defines it.
STANDARD = {
    "spatial position": "foundations/feature-maps",
    "feature map": "foundations/feature-maps",
    "channel shuffle": "foundations/feature-maps",
    "depthwise convolution": "foundations/feature-maps",
    "receptive field": "see/receptive-field",
    "residual branch": "networks/where",
    "gate": "foundations/gates",
    "logit": "foundations/gates",
    "sigmoid": "foundations/gates",
    "softmax": "foundations/gates",
    "token": "spatial/non-local",
    "self-attention": "spatial/index",
    "fused kernel": "spatial/non-local",
    "head": "spatial/strided-sparse",
    "pooling window": "foundations/pooling",
    "descriptor": "foundations/pooling",
    "strip pooling": "foundations/pooling",
    "entropy": "foundations/pooling",
    "squeeze": "channel/se",
    "excitation": "channel/se",
    "reduction ratio": "channel/se",
    "bottleneck": "channel/se",
    "DCT": "channel/fca",
    "forward pass": "evidence/cost",
    "backward pass": "evidence/speed",
    "gradient": "foundations/gates",
    "batch normalisation": "networks/fpn",
    "augmentation": "training/data",
    "data loader": "training/loading",
    "dataset": "training/data",
    "checkpoint": "training/checkpoints",
    "seed": "foundations/symbols",
    "confidence interval": "evidence/statistics",
    "backbone": "networks/backbones",
    "feature pyramid": "networks/fpn",
    "anchor": "networks/regions",
    "IoU": "networks/regions",
    "bounding box": "training/annotations",
    "mask": "training/annotations",
    "average precision": "training/detect",
    "inference": "training/evaluate",
    "epoch": "training/history",
    "multiply-accumulate": "foundations/symbols",
}


def page(source, where="nbs/channel/se.ipynb", terms=FORMS):
    "What the filter makes of a page with one cell."
    cell = {"cell_type": "markdown", "metadata": {}, "source": source}
    nb = {"cells": [cell], "metadata": {}}
    done = reader.clean(nb, reader.Path(where), {"terms": terms})
    return "".join(reader.text(c) for c in done["cells"])


# ---- the terms


def test_every_term_says_where_it_is_defined():
    assert [t.term for t in terms() if not (ROOT / "nbs" / t.page.split("#")[0]).is_file()] == []
    assert [t.term for t in terms() if not t.definition.endswith(".")] == []


def test_a_page_that_defines_a_term_uses_it():
    lost = []
    for t in terms():
        cells = json.loads((ROOT / "nbs" / t.page.split("#")[0]).read_text("utf-8"))["cells"]
        text = " ".join(reader.text(c) for c in cells).lower().replace("\n", " ")
        forms = [t.term, *filter(None, t.forms.split("|"))]
        lost += [] if any(form.lower() in text for form in forms) else [(t.term, t.page)]
    assert lost == []


def test_no_form_belongs_to_two_terms():
    forms = [form.lower() for t in terms() for form in [t.term, *filter(None, t.forms.split("|"))]]
    assert len(forms) == len(set(forms))


def test_the_filter_and_the_library_have_the_same_anchors():
    assert {t.term: t.anchor for t in terms()} == {t.term: FORMS[t.term] for t in terms()}


def test_the_page_shows_every_term_as_it_is_in_the_library():
    path = ROOT / reader.GLOSSARY
    nb = reader.clean(reader.read(path), path.relative_to(ROOT), reader.settings(ROOT))
    shown = "\n".join(reader.text(c) for c in nb["cells"] if c["cell_type"] == "markdown")
    assert [t.term for t in terms() if entry(t) not in shown] == []
    assert "glossary.ipynb#" not in shown, "no links to itself"


# ---- the links


def test_the_first_use_of_a_term_is_linked_and_no_other():
    out = page("A gate is a number. Each gate is one.")
    assert out == "A [gate](../foundations/glossary.ipynb#term-gate) is a number. Each gate is one."


def test_another_form_of_a_term_counts_as_the_same():
    out = page("Gates are numbers. One gate.")
    assert out.count("#term-gate") == 1 and out.startswith("[Gates](")


def test_the_longest_term_is_linked():
    out = page("The receptive field. A spatial position, and channel shuffle.")
    assert re.findall(r"#([\w-]+)", out) == [
        "term-receptive-field",
        "term-spatial-position",
        "term-channel-shuffle",
    ]


@pytest.mark.parametrize(
    "source",
    [
        "# The gate",
        "`gate` and ``` gate ```",
        "```\ngate\n```",
        "$gate$ and $$gate$$ {#eq-gate}",
        "[a gate](se.ipynb) and [@gate; @fig-gate] and @tbl-gate",
        "| gate | gate |\n: the gate {#tbl-gate}",
        "> one gate",
        '::: {.differ title="gate"}',
        '<div class="gate">',
        "pre-gate, gated and gate_x",
        "https://example.org/gate",
    ],
)
def test_what_is_no_text_is_not_linked(source):
    assert "#term-gate" not in page(source)


def test_the_link_leads_from_where_the_page_is():
    assert "](glossary.ipynb#term-gate)" in page("A gate.", "nbs/foundations/gates.ipynb")
    assert "](../../foundations/glossary.ipynb#term-gate)" in page("A gate.", "nbs/results/cpu/a.ipynb")


@pytest.mark.parametrize("where", ["nbs/index.ipynb", "nbs/foundations/glossary.ipynb"])
def test_the_home_page_and_the_glossary_have_no_such_links(where):
    assert "#term-" not in page("A gate.", where)


def test_without_a_glossary_nothing_is_linked(tmp_path):
    assert reader.glossary(tmp_path) == {} and page("A gate.", terms={}) == "A gate."


def test_every_chapter_links_to_the_glossary():
    site, without = reader.settings(ROOT), []
    for path in notebooks():
        if path.parent.name in {"channel", "hybrid", "spatial", "synergy"} and path.stem != "index":
            nb = reader.clean(reader.read(path), path.relative_to(ROOT), site)
            links = re.findall(r"glossary\.ipynb#(term-[\w-]+)", "".join(reader.text(c) for c in nb["cells"]))
            assert len(links) == len(set(links)), name_of(path)
            without += [] if len(links) >= 3 else [name_of(path)]
    assert without == []


# ---- the search


def sections(path):
    "Title and text of the parts of a page: one for each heading of level 1 or 2, as the search has them."
    nb = reader.clean(reader.read(path), path.relative_to(ROOT), reader.settings(ROOT))
    text = "\n\n".join(reader.text(c) for c in nb["cells"] if c["cell_type"] in ("markdown", "raw"))
    title = re.search(r'^title: "(.*)"$', text, re.M)
    parts = re.split(r"^##? ([^\n]+)$", text, flags=re.M)
    yield (title[1] if title else ""), parts[0]
    yield from zip(parts[1::2], parts[2::2], strict=True)


@pytest.fixture(scope="module")
def index():
    return [
        (name_of(path).removeprefix("nbs/").removesuffix(".ipynb"), re.sub(r"\s*\{#.*?\}", "", title), text)
        for path in notebooks()
        for title, text in sections(path)
    ]


def search(index, query):
    "Sections that hold the query, those with it as their title first."
    query = query.lower()
    found = [(title.lower() != query, query not in title.lower(), page, text) for page, title, text in index
             if query in title.lower() or query in text.lower()]  # fmt: skip
    return [(page, text) for *_, page, text in sorted(found, key=lambda f: f[:2])]


@pytest.mark.parametrize(("term", "defined"), STANDARD.items())
def test_search_finds_the_entry_of_a_standard_term_and_the_page_that_defines_it(index, term, defined):
    first, text = search(index, term)[0]
    assert first == "foundations/glossary" and f"(../{defined}.ipynb)" in text


def test_there_are_forty_standard_terms():
    assert len(STANDARD) >= 40
