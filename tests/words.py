"""Where the book does not speak the field's language: `python tests/words.py [--text] [PATH ...]`.

Prints file, cell, line, the words found and the term to use. `--text` leaves identifiers out: code names
and of code spans in Markdown. Exit status 1 if anything was found. The list is words.yml beside this file.
"""

import functools
import html
import io
import json
import re
import subprocess
import sys
import tokenize
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import yaml

ROOT = Path(__file__).resolve().parents[1]
LIST = Path(__file__).with_name("words.yml")
KINDS = {".ipynb", ".py", ".yml", ".yaml", ".md", ".cff", ".ini", ".toml", ".csv"}
# The list itself, the tables of old names, and what other people wrote.
SKIPPED = re.compile(
    r"(^|/)(words\.(yml|py)|(test_)?renamed\.(csv|ipynb|py)|test_words\.py|_modidx\.py)$|(^|/)data/[^/]+/[A-Z].*/"
)
MIME = ("text/plain", "text/markdown", "text/html", "image/svg+xml")


class Line(NamedTuple):
    file: str
    cell: str  # id of a cell, "" elsewhere; "id>" of its outputs
    number: int
    text: str
    code: bool


class Use(NamedTuple):
    line: Line
    found: str
    term: str


def words_of(text: str) -> str:
    "`snake_case` and `CamelCase` as separate words."
    text = re.sub(r"(?<=[a-z0-9])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])", " ", text)
    return text.replace("_", " ")


@functools.cache
def rules() -> list[tuple[re.Pattern, str, str, re.Pattern | None]]:
    "Pattern, term, where it counts (all, names, text), what excuses the line."
    return [
        (
            re.compile(rf"\b(?:{entry['word']})\b", re.I),
            entry["term"],
            "names" if entry.get("names") else "text" if entry.get("text") else "all",
            re.compile(entry["beside"]) if "beside" in entry else None,
        )
        for entry in yaml.safe_load(LIST.read_text("utf-8"))["words"]
    ]


@functools.cache
def any_rule() -> re.Pattern:
    "What every use matches: one search instead of fifty leaves few lines to look at."
    return re.compile("|".join(pattern.pattern for pattern, *_ in rules()), re.I)


def identifiers(text: str, code: bool) -> list[str]:
    "The names in a line of code, or in the code spans of a line of prose."
    if not code:
        return re.findall(r"`([^`]+)`", text)
    found = []
    try:
        for token in tokenize.generate_tokens(io.StringIO(text.lstrip()).readline):
            if token.type == tokenize.NAME:
                found.append(token.string)
    except (tokenize.TokenError, IndentationError, SyntaxError):
        pass  # a line of a longer statement; what came before the end of the line was read
    return found


def without_identifiers(text: str, code: bool) -> str:
    "The strings and comments of a line of code, or prose without code spans."
    if not code:
        return re.sub(r"`[^`]+`", "`", text)
    if re.match(r"\s*[\"']{1,3}|\s*#", text):
        return text
    return " | ".join(re.findall(r"\"[^\"]*\"|'[^']*'|#.*", text))


def uses(line: Line, which: str = "all") -> Iterator[Use]:
    "The dialect words of a line: all, or those in its text only."
    plain = re.sub(r"https?://\S+|\]\([^)]*\)", "", line.text)
    if not any_rule().search(words_of(plain)):
        return
    names = words_of(" ; ".join(identifiers(plain, line.code)))
    text = words_of(without_identifiers(plain, line.code))
    parts = {"names": names, "text": text, "all": text if which == "text" else words_of(plain)}
    for pattern, term, where, beside in rules():
        if beside and beside.search(line.text) or (where, which) == ("names", "text"):
            continue
        for match in pattern.finditer(parts[where]):
            yield Use(line, match[0], term)


def shown(output: dict) -> str:
    "The text of an output, as a reader sees it."
    parts = ["".join(output.get("text", "")), "".join(output.get("traceback", ""))]
    for kind, value in output.get("data", {}).items():
        value = "".join(value) if isinstance(value, list) else str(value)
        if kind == "image/svg+xml":
            parts += [html.unescape(text) for text in re.findall(r"<t(?:ext|span)[^>]*>([^<]+)<", value)]
        elif kind in MIME:
            parts.append(html.unescape(re.sub(r"<[^>]+>", " ", value)) if kind == "text/html" else value)
    return "\n".join(parts)


def lines(path: Path, root: Path = ROOT) -> Iterator[Line]:
    "The lines of a file that a person reads."
    name = path.relative_to(root).as_posix() if path.is_relative_to(root) else str(path)
    if path.suffix != ".ipynb":
        for number, text in enumerate(path.read_text("utf-8").splitlines(), 1):
            if re.match(r"\| .*\| \*\w", text):  # a row of the style sheet in CONTRIBUTING.md
                continue
            yield Line(name, "", number, text, path.suffix == ".py")
        return
    for cell in json.loads(path.read_text("utf-8"))["cells"]:
        code = cell["cell_type"] == "code"
        for number, text in enumerate("".join(cell["source"]).splitlines(), 1):
            yield Line(name, cell["id"], number, text, code and not text.startswith("#|"))
        for output in cell.get("outputs", []):
            for number, text in enumerate(shown(output).splitlines(), 1):
                yield Line(name, cell["id"] + ">", number, text, False)


def files(root: Path = ROOT) -> list[Path]:
    "What git knows or would add, of the kinds that people read."
    listed = ["git", "-C", str(root), "ls-files", "-co", "--exclude-standard"]
    names = subprocess.run(listed, capture_output=True, text=True, check=True).stdout.splitlines()
    read = [root / n for n in names if Path(n).suffix in KINDS and not SKIPPED.search(n)]
    return [path for path in read if path.exists()]


def honest() -> list[dict[str, str]]:
    "The uses that may stay: `file` and `sentence`."
    return yaml.safe_load(LIST.read_text("utf-8"))["honest"] or []


def all_uses(paths: list[Path], root: Path = ROOT, which: str = "all") -> list[Use]:
    "The dialect words of files, without the honest ones."
    excused = honest()
    return [
        use
        for path in paths
        for line in lines(path, root)
        for use in uses(line, which)
        if not any(e["file"] == line.file and e["sentence"] in line.text for e in excused)
    ]


def main(arguments: list[str]) -> int:
    which = "text" if "--text" in arguments else "all"
    given = [Path(a).resolve() for a in arguments if not a.startswith("--")]
    paths = [q for p in given for q in (files(p) if p.is_dir() else [p])] or files(Path.cwd())
    found = all_uses(paths, Path.cwd(), which)
    for use in found:
        line = use.line
        print(f"{line.file}:{line.cell}:{line.number}: {use.found} -> {use.term} | {line.text.strip()[:110]}")
    print(f"{len(found)} words in {len({u.line.file for u in found})} files", file=sys.stderr)
    return int(bool(found))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
