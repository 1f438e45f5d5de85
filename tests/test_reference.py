"""The pages generated from the registry are complete, up to date, and correct."""

import re

import nbformat
import pytest
import text
import torch
from conftest import ROOT, cells_of

from scsa_book.attention import registry
from scsa_book.attention.base import Attention
from scsa_book.evidence.cost import cost
from scsa_book.explain import mechanisms

MECHANISMS = ROOT / "nbs/reference/mechanisms.ipynb"
DIFFERENCES = ROOT / "nbs/reference/differences.ipynb"
EACH = pytest.mark.parametrize("name", registry.names())
LICENCES = {"Apache-2.0", "MIT", "CC-BY-NC-4.0", mechanisms.NO_FILE}
NO_CODE = {"ela", "cat"}  # their authors published none


def shown(path):
    "The outputs of a page's cells, except printed values."
    outputs = [o.get("data", {}) for cell in cells_of(path, "code") for o in cell["outputs"]]
    return ["".join(d[kind]) for d in outputs for kind in ("text/markdown", "text/html") if kind in d]


# ---- all mechanisms


def test_facts_and_registry_have_the_same_names():
    assert sorted(mechanisms.FACTS) == sorted(registry.names())


@EACH
def test_facts_are_complete(name):
    f = mechanisms.fact(name)
    assert f.placement and f.parameters and f.macs
    assert (ROOT / "nbs" / mechanisms.chapter(name)).exists()
    if name in NO_CODE:
        assert not f.code and not f.licence
    else:
        assert re.fullmatch(r"[\w-]+/[\w.-]+@[0-9a-f]{12}", f.code)
        assert f.licence in LICENCES
    assert not f.part_of or registry.info(f.part_of).authors


def test_a_mechanism_without_facts_is_named(monkeypatch):
    monkeypatch.delitem(mechanisms.FACTS, "se")
    with pytest.raises(ValueError, match=r"no facts about 'se': add FACTS\['se'\]"):
        mechanisms.fact("se")


@EACH
def test_formulas_are_the_counts(name):
    size = (384, 35, 14)  # not one of the sizes on the page
    counted = cost(registry.create(name, size[0]), size)
    assert mechanisms.formula_cost(name, size) == (counted.parameters, counted.macs)


@EACH
def test_widths_are_needed_as_said(name):
    multiple = mechanisms.fact(name).multiple
    width = 7 if multiple == 1 else multiple
    x = torch.randn(2, width, 6, 5)
    assert registry.create(name, width).eval()(x).shape == x.shape
    if multiple > 1:
        with pytest.raises(ValueError, match=str(multiple + 1)):
            registry.create(name, multiple + 1)


@EACH
def test_batches_are_needed_as_said(name):
    module = registry.create(name, 128).train()
    module(torch.randn(2, 128, 6, 5))
    if mechanisms.fact(name).batch == 1:
        module(torch.randn(1, 128, 6, 5))
    else:
        with pytest.raises(ValueError, match="training"):
            module(torch.randn(1, 128, 6, 5))


@EACH
def test_maps_that_are_no_gates_do_not_multiply_the_input(name):
    if not mechanisms.fact(name).gates:
        assert registry.info(name).make.recombine is not Attention.recombine


@EACH
def test_the_paper_is_from_the_year_that_the_registry_says(name):
    entry, bib = registry.info(name), (ROOT / "nbs/references.bib").read_text("utf-8")
    fields = re.search(rf"^@\w+\{{{entry.paper},(.*?)^\}}", bib, re.M | re.S)[1]
    assert re.search(r"year\s*=\s*\{(\d+)\}", fields)[1] == str(entry.year)


def test_the_page_has_a_row_for_every_mechanism():
    table, authors = (out for out in shown(MECHANISMS) if "filterable" in out)
    assert re.findall(r'<th scope="row"><code>(\w+)</code>', authors) == list(registry.names())
    rows = re.findall(r'<th scope="row"><a href="\.\./(.+?)"><code>(\w+)</code>', table)
    now = [(mechanisms.chapter(name), name) for name in registry.names()]
    assert rows == now, "run make execute NB=nbs/reference/mechanisms.ipynb"


def test_what_the_page_says_of_networks_runs():
    pytest.importorskip("timm")
    page = "\n".join("".join(cell["source"]) for cell in cells_of(MECHANISMS, "markdown"))
    blocks = re.findall(r"^```python\n(.*?)^```", page, re.M | re.S)
    assert len(blocks) == 2
    for block in blocks:
        names = {}
        with torch.device("meta"):
            exec(block, names)
        scsa = registry.info("scsa").make
        assert sum(isinstance(m, scsa) for m in names["network"].modules()) == 16


# ---- paper and code differ


def test_the_notes_are_those_of_the_chapters():
    fresh = nbformat.read(DIFFERENCES, 4)
    text.run(fresh, DIFFERENCES.parent)
    now = [o["data"]["text/markdown"] for c in fresh.cells for o in c.get("outputs", []) if "data" in o
           if "text/markdown" in o["data"]]  # fmt: skip
    old = [out for out in shown(DIFFERENCES) if not out.startswith("<")]
    assert len(old) == 2 and "**Biases.**" in old[1]
    assert old == now, "run make execute NB=nbs/reference/differences.ipynb"
