"""The field's words everywhere: none of words.yml in notebooks, library, tests, YAML and help texts."""

import json
import re

import pytest
import words
import yaml
from conftest import ROOT
from typer.testing import CliRunner

from scsa_book.cli import app

FILES = words.files(ROOT)
ENTRIES = yaml.safe_load(words.LIST.read_text("utf-8"))["words"]


def group(path):
    "The folder of a file, two levels deep."
    return "/".join(path.relative_to(ROOT).parts[:-1][:2]) or "root"


def shown(use):
    line = use.line
    return f"{line.file}:{line.cell}:{line.number}: {use.found} -> {use.term} | {line.text.strip()[:90]}"


@pytest.mark.parametrize("folder", sorted({group(path) for path in FILES}))
def test_no_word_of_the_list_is_used(folder):
    found = words.all_uses([path for path in FILES if group(path) == folder], ROOT)
    assert [shown(use) for use in found] == []


def commands(click, path=()):
    "Every command of the command line, as the words that call it."
    yield path
    for name, command in getattr(click, "commands", {}).items():
        yield from commands(command, (*path, name))


def test_no_word_of_the_list_is_in_the_help_of_the_command_line():
    from typer.main import get_command

    found = []
    for command in commands(get_command(app)):
        text = CliRunner().invoke(app, [*command, "--help"]).output
        assert "Usage" in text
        lines = [words.Line(" ".join(command), "", 0, line, False) for line in text.splitlines()]
        found += [shown(use) for line in lines for use in words.uses(line)]
    assert found == []


def test_an_honest_use_is_there_and_would_be_found():
    for entry in words.honest():
        lines = [line for line in words.lines(ROOT / entry["file"], ROOT) if entry["sentence"] in line.text]
        assert lines, f"{entry['file']} does not hold {entry['sentence']!r} any more: take it off the list"
        assert any(list(words.uses(line)) for line in lines), f"{entry['sentence']!r} needs no excuse"


def test_there_are_a_handful_of_honest_uses():
    assert len(words.honest()) <= 20


@pytest.mark.parametrize("entry", ENTRIES, ids=lambda entry: entry["term"])
def test_every_entry_is_a_pattern_with_a_term(entry):
    assert re.compile(entry["word"]) and entry["term"]
    assert set(entry) <= {"word", "term", "names", "text", "beside"}


def uses(text, code=False, which="all"):
    return [use.found for use in words.uses(words.Line("a", "", 1, text, code), which)]


def test_words_are_found_inside_names():
    assert uses("read_picture(PictureSet, places)", code=True) == ["picture", "Picture", "places"]
    assert uses("read_picture(PictureSet, places)  # a picture", code=True, which="text") == ["picture"]


def test_words_are_found_in_prose_and_not_in_addresses():
    assert uses("A picture of [it](picture.ipynb) at https://a.b/picture.") == ["picture"]
    assert uses("`picture` and more", which="text") == []


def test_expressions_of_the_language_are_no_dialect():
    assert uses("It takes place in place of another, at two decimal places.") == []
    assert uses("A stride of two halves the height, and torch.testing.assert_close holds.") == []


def test_words_are_found_in_outputs(tmp_path):
    data = {"text/plain": "a picture", "image/svg+xml": "<svg><text x='1'>places</text></svg>"}
    output = {"output_type": "display_data", "metadata": {}, "data": data}
    cells = [{"id": "c", "cell_type": "code", "source": "1", "outputs": [output]}]
    path = tmp_path / "a.ipynb"
    path.write_text(json.dumps({"cells": cells}))
    assert {use.found for use in words.all_uses([path], tmp_path)} == {"picture", "places"}


def test_the_style_sheet_of_contributors_names_terms_of_the_list():
    sheet = (ROOT / "CONTRIBUTING.md").read_text("utf-8").split("## Words")[1].split("\n## ")[0]
    rows = [row.split("|")[1:3] for row in sheet.splitlines() if row.startswith("| ")][1:]
    assert 20 <= len(rows) <= 45, "one screen"
    for _, avoided in rows:
        for word in avoided.replace("*", "").split(","):
            known = uses(word.strip()) or uses(word.strip(), code=True)
            assert known, f"{word.strip()!r} is not in words.yml"
