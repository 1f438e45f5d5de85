"""A plain preview of the book where Quarto is not installed: `python nbs/_site/preview.py [OUT]`.

Order of pages from _quarto.yml, contents through filter.py, looks from nbs/theme/preview.css. Readable
without a network. It knows fewer things than Quarto: no search, no theme button (it follows the system).
A page that was converted before from the same files is read from .cache/pages.
"""

import html
import itertools
import json
import re
import shutil
import sys
from os.path import relpath
from pathlib import Path
from typing import NamedTuple

import download
import filter as reader
import pygments
import yaml
from jinja2 import Template
from latex2mathml.converter import convert
from nbconvert.filters import ansi2html, markdown2html, strip_ansi
from parallel import each
from pygments.formatters import HtmlFormatter
from pygments.lexers import PythonLexer
from stamps import installed, write_whole

ROOT = Path(__file__).resolve().parents[2]
NAMES = {"eq": "Equation", "fig": "Figure", "tbl": "Table", "sec": "Section", "lst": "Listing"}
TEMPLATE = Template(Path(__file__).with_name("preview.html").read_text("utf-8"))

# Code, in fences or between backticks, in which no notation below applies.
CODE = r"(^```.*?^```|`[^`\n]+`)"
MATH = re.compile(
    CODE + r"|\$\$(.+?)\$\$(?:\s*\{#([\w-]+)\})?|(?<![\\\w$])\$(?!\s)([^$\n]+?)(?<!\s)\$(?!\d)", re.S | re.M
)
CITATION = re.compile(CODE + r"|\[@[^\]]+\]|(?<![\w.])@[A-Za-z][\w:-]*\w", re.S | re.M)
KEY = re.compile(r"@([\w:-]*\w)")
NOTE = re.compile(r"^\[\^([\w-]+)\]: (.+(?:\n(?!\n).+)*)", re.M)
TABLE_CAPTION = re.compile(r"^: (.+?)\s*\{#(tbl-[\w-]+)\}\s*$", re.M)
SECTION_ID = re.compile(r"^(#+ .+?)\s*\{#([\w-]+)[^}]*\}\s*$", re.M)
FENCE = re.compile(r"^(:{3,})[ \t]*(\S.*)?$", re.M)
RAW_HTML = re.compile(r"\s*`{3,}\s*\{=html\}\n(.*)\n`{3,}\s*", re.S)
KEPT = re.compile(r"<p>KEPT(\d+)KEPT</p>|KEPT(\d+)KEPT")
# A minus after another operator, unless that closes a bracket, is a sign and stands close to its number.
SIGN = re.compile(r"(<mo[^>]*>(?!&#x00029;|&#x0005D;|&#x0007D;)[^<]*</mo>)<mo>(&#x02212;)</mo>")
HEADING = re.compile(r"<h([1-6])[^>]*>(.*?)</h\1>", re.S)

LEXER, FORMATTER = PythonLexer(), HtmlFormatter(cssclass="highlight hl-python")


# ---- the sidebar


def contents(items, root, depth=0):
    "The sidebar of _quarto.yml, flat and in order: (depth, text or None, notebook)."
    for item in items:
        if isinstance(item, str):
            yield depth, None, item
        elif "auto" in item:
            yield from matched(item["auto"], root, depth)
        else:
            if "href" in item:
                yield depth, item.get("text") or item.get("section"), item["href"]
            yield from contents(item.get("contents") or [], root, depth + 1)


def matched(pattern, root, depth):
    "Like Quarto's `auto: folder/*/*.ipynb`: each folder by its index page, the other pages under it."
    visible = (p for p in root.glob(pattern) if not p.parent.name.startswith("."))
    found = sorted(visible, key=lambda p: (p.parent, p.stem != "index", p.name.upper()))
    for path in found:
        yield depth + (path.stem != "index"), None, path.relative_to(root).as_posix()


# ---- the bibliography


def bibliography(path):
    "Key -> fields of its BibTeX entry; enough of the format for our own file."
    entries = {}
    source = path.read_text("utf-8") if path.exists() else ""
    for key, body in re.findall(r"@\w+\{([^,]+),(.*?)\n\}", source, re.S):
        fields = re.findall(r"(\w+)\s*=\s*\{(.*)\},?\s*$", body, re.M)
        entries[key.strip()] = {name.lower(): re.sub(r"[{}]", "", value) for name, value in fields}
    return entries


def short_authors(entry):
    who = [author.split(",")[0].strip() for author in entry.get("author", "?").split(" and ")]
    if len(who) > 2:
        return f"{who[0]} et al."
    return " and ".join(who)


def full_entry(entry):
    year, title = entry.get("year", "n.d."), entry.get("title", "")
    where = entry.get("journal") or entry.get("booktitle") or entry.get("publisher") or ""
    address = f"https://doi.org/{entry['doi']}" if "doi" in entry else entry.get("url", "")
    parts = [f"{entry.get('author', '?')} ({year}). *{title}*."]
    return " ".join(parts + [f"{where}."] * bool(where) + [f"<{address}>"] * bool(address))


def mathml(tex, **options):
    return SIGN.sub(r'\1<mo form="prefix">\2</mo>', convert(tex.strip(), **options))


# ---- one page


class Page:
    "One notebook as HTML: `meta` is its front matter, `body` the page below the title."

    def __init__(self, path, root, bib):
        self.bib = bib
        self.kept, self.open, self.cited = [], [], []
        self.number, self.counts, self.headings = {}, {}, []
        nb = reader.clean(reader.read(path), path.relative_to(root), reader.settings(root))
        cells = nb["cells"]
        head = reader.text(cells.pop(0)) if cells and cells[0]["cell_type"] == "raw" else ""
        self.meta = yaml.safe_load(head.strip().strip("-")) or {}
        self.title = self.meta.get("title", path.stem)
        self.body = self.finish("\n\n".join(self.source_of(cell) for cell in cells))

    def source_of(self, cell):
        if cell["cell_type"] == "code":
            return self.code(cell)
        return reader.text(cell) if cell["cell_type"] == "markdown" else ""

    def keep(self, text):
        "Put finished HTML aside while Markdown is being converted."
        self.kept.append(text)
        return f"KEPT{len(self.kept) - 1}KEPT"

    def block(self, text):
        return f"\n\n{self.keep(text)}\n\n"

    def label(self, name):
        "The next number of its kind, by which references find it."
        kind = name.split("-")[0]
        self.counts[kind] = self.counts.get(kind, 0) + 1
        self.number[name] = f"{NAMES[kind]}&nbsp;{self.counts[kind]}"
        return self.number[name]

    # -- code cells and their outputs

    def code(self, cell):
        head, source = reader.split_head(reader.text(cell))
        option = {k: yaml.safe_load(v) for k, _, v in (line.partition(":") for line in head) if v}
        parts = []
        if option.get("echo") is not False and source.strip():
            parts.append(self.block(self.listing(source, option)))
        if option.get("output") is not False:
            parts += [self.output(output) for output in cell.get("outputs", [])]
        name = str(option.get("label", ""))
        if name.startswith(("fig-", "tbl-")):
            caption = self.inline(str(option.get("fig-cap", option.get("tbl-cap", ""))))
            bottom = f"<figcaption>{self.label(name)}: {caption}</figcaption></figure>"
            parts = [self.block(f'<figure id="{name}">'), *parts, self.block(bottom)]
        return self.block('<div class="cell">') + "".join(parts) + self.block("</div>")

    def listing(self, source, option):
        block = pygments.highlight(source, LEXER, FORMATTER)
        if "filename" in option:
            bar = f"<div>{option['filename']}</div>"
            block = f'<div class="filename {option.get("classes", "")}">{bar}{block}</div>'
        if option.get("code-fold"):
            summary = option.get("code-summary", "Code")
            block = f'<details class="fold"><summary>{summary}</summary>{block}</details>'
        return block

    def output(self, output):
        "One output as Markdown of the page; all but Markdown is kept as HTML."
        if output["output_type"] == "stream":
            return self.block(f'<pre class="out">{html.escape(strip_ansi("".join(output["text"])))}</pre>')
        if output["output_type"] == "error":
            return self.block(f'<pre class="out error">{ansi2html(chr(10).join(output["traceback"]))}</pre>')
        data = {k: "".join(v) for k, v in output["data"].items() if isinstance(v, str | list)}
        if source := data.get("text/markdown"):
            raw = RAW_HTML.fullmatch(source)
            return self.block(raw[1]) if raw else f"\n\n{source}\n\n"
        for kind in ("image/png", "image/jpeg"):
            if kind in data:
                return self.block(f'<img alt="" src="data:{kind};base64,{data[kind].strip()}">')
        return self.block(f'<pre class="out">{html.escape(data.get("text/plain", ""))}</pre>')

    def inline(self, source):
        "A caption: formulas, citations and emphasis, without a paragraph around them."
        source = CITATION.sub(self.citation, MATH.sub(self.formula, source))
        return re.sub(r"\A\s*<p>(.*)</p>\s*\Z", r"\1", markdown2html(source), flags=re.S)

    # -- notation beyond Markdown; each takes a match of its pattern

    def formula(self, m):
        code, display, name, inline = m.groups()
        if code:
            return code
        if display is None:
            return self.keep(mathml(inline))
        out = mathml(display.replace("{aligned}", "{align*}"), display="block")
        number = f"<span>({self.label(name).split('&nbsp;')[1]})</span>" if name else ""
        anchor = f' id="{name}"' if name else ""
        return self.block(f'<div class="math"{anchor}><span>{out}</span>{number}</div>')

    def fence(self, m):
        "The beginning or the end of a `:::` block: a title makes it a callout, `collapse` a folded one."
        if not m[2]:
            return self.block(self.open.pop() if self.open else "")
        title = re.search(r'title="([^"]*)"', m[2])
        classes = re.findall(r"\.([\w-]+)", re.sub(r'"[^"]*"', "", m[2])) or [m[2].strip("{} ")]
        names = html.escape(" ".join(classes).replace("callout-", "callout "))
        if title and "collapse" in m[2]:
            self.open.append("</details>")
            return self.block(f'<details class="{names}"><summary>{title[1]}</summary>')
        self.open.append("</div>")
        heading = f'<p class="callout-title">{title[1]}</p>' if title else ""
        return self.block(f'<div class="{names}">{heading}')

    def citation(self, m):
        keys = KEY.findall(m[0])
        if m[1] or not all(key in self.number or key in self.bib for key in keys):
            return m[0]
        bracket = m[0].startswith("[")
        out = "; ".join(self.reference(key, bracket) for key in keys)
        return self.keep(f"({out})" if bracket and any(key in self.bib for key in keys) else out)

    def reference(self, key, bracket):
        if key in self.number:
            return f'<a href="#{key}">{self.number[key]}</a>'
        if key not in self.cited:
            self.cited.append(key)
        who, year = short_authors(self.bib[key]), self.bib[key].get("year", "n.d.")
        if bracket:
            return f'<a href="#ref-{key}">{who} {year}</a>'
        return f'{who} (<a href="#ref-{key}">{year}</a>)'

    def table_caption(self, m):
        return self.block(f'<p class="caption" id="{m[2]}">{self.label(m[2])}: {self.inline(m[1])}</p>')

    def section(self, m):
        self.number[m[2]] = m[1].lstrip("# ")
        return f"{self.anchor(m[2])}\n\n{m[1]}"

    # -- the whole page

    def finish(self, source):
        notes = dict(NOTE.findall(source))
        source = NOTE.sub("", source)
        source = MATH.sub(self.formula, source)
        source = TABLE_CAPTION.sub(self.table_caption, source)
        source = SECTION_ID.sub(self.section, source)
        source = FENCE.sub(self.fence, source)
        source = CITATION.sub(self.citation, source)
        source = self.footnotes(source, notes) + self.references()
        return to_pages(self.restore(HEADING.sub(self.heading, page_html(source))))

    def heading(self, m):
        "A heading with the anchor that Quarto gives it."
        words = re.sub(r"<[^>]+>", "", KEPT.sub("", m[2]))
        name = identifier(words, taken=[name for _, name, _ in self.headings])
        self.headings.append((int(m[1]), name, words))
        return f'<h{m[1]} id="{name}">{m[2]}</h{m[1]}>'

    def anchor(self, name):
        return self.keep(f'<a id="{name}"></a>')

    def footnotes(self, source, notes):
        order = [key for key in re.findall(r"\[\^([\w-]+)\]", source) if key in notes]
        lines = []
        for i, key in enumerate(dict.fromkeys(order), 1):
            source = source.replace(f"[^{key}]", self.keep(f'<sup><a href="#note-{i}">{i}</a></sup>'))
            note = CITATION.sub(self.citation, MATH.sub(self.formula, notes[key]))
            lines.append(f"{i}. {self.anchor(f'note-{i}')}{note}")
        return source + ("\n\n## Notes\n\n" + "\n".join(lines) if lines else "")

    def references(self):
        lines = [f"- {self.anchor('ref-' + key)}{full_entry(self.bib[key])}" for key in sorted(self.cited)]
        return "\n\n## References\n\n" + "\n".join(lines) if lines else ""

    def restore(self, page):
        "Put back what was kept, also what stands inside kept things."
        while KEPT.search(page):
            page = KEPT.sub(lambda m: self.kept[int(m[1] or m[2])], page)
        return page


def page_html(source):
    out = re.sub(r'<a class="anchor-link".*?</a>', "", markdown2html(source))
    return out.replace("<table", '<div class="scroll"><table').replace("</table>", "</table></div>")


def to_pages(out):
    "Links to notebooks, except those to download, become links to their pages."
    return re.sub(rf'(href="(?!https?:|[./]*{reader.DOWNLOAD}/)[^"#]+)\.ipynb', r"\1.html", out)


def identifier(words, taken):
    "Pandoc's automatic identifier: lower case, no punctuation, from the first letter on."
    plain = re.sub(r"[^\w\s.-]", "", html.unescape(words).lower())
    name = re.sub(r"^[^a-z]+", "", re.sub(r"\s+", "-", plain.strip())) or "section"
    copies = (f"{name}-{i}" if i else name for i in itertools.count())
    return next(copy for copy in copies if copy not in taken)


# ---- cached pages


class Converted(NamedTuple):
    "The parts of a page that other pages need."

    title: str
    description: str | None
    toc: list  # headings: level, anchor, words; none where the page wants none
    body: str


def convert_page(job):
    "Convert one notebook; a job is its path, the root, and the bibliography."
    path, root, bib = job
    page = Page(path, root, bib)
    toc = [list(h) for h in page.headings if h[0] in (2, 3)] if page.meta.get("toc", True) else []
    return Converted(str(page.title), page.meta.get("description"), toc, page.body)


def what_all_pages_follow(root):
    "The inputs of every page besides its notebook: bibliography, address, these tools and their packages."
    tools = (Path(__file__).with_name(name).read_bytes() for name in ("preview.py", "filter.py"))
    bib, site = root / "nbs/references.bib", reader.settings(root)
    given = bib.read_bytes() if bib.exists() else b""
    return reader.digest(given, json.dumps(site, sort_keys=True).encode(), installed().encode(), *tools)


def key_of(path, root, common):
    "The inputs of a page: `common`, its path, its notebook, and its executed copy."
    where, copy = path.relative_to(root).as_posix().encode(), reader.executed_copy(path)
    return reader.digest(
        common.encode(), where, path.read_bytes(), copy.read_bytes() if copy.exists() else b""
    )


def kept(file):
    "A page as it was converted before, or None."
    try:
        return Converted(*json.loads(file.read_bytes()))
    except (OSError, ValueError, TypeError):  # missing, damaged, or of another format
        return None


def converted(paths, root, cores=None):
    "Path -> its page; pages that are not cached yet are converted, one process per core, and cached."
    folder, common = root / ".cache/pages", what_all_pages_follow(root)
    files = {path: folder / f"{key_of(path, root, common)}.json" for path in paths}
    pages = {path: kept(file) for path, file in files.items()}
    bib = bibliography(root / "nbs/references.bib")
    todo = [path for path, page in pages.items() if page is None]
    for path, page in each("pages", convert_page, [(path, root, bib) for path in todo], cores):
        pages[path[0]] = page
        write_whole(files[path[0]], json.dumps(page).encode())
    for file in set(folder.glob("*.json")) - set(files.values()):
        file.unlink(missing_ok=True)
    return pages


# ---- the whole book


AS_THEY_ARE = ("nbs/theme/*", "nbs/theme/fonts/*")  # what Quarto puts into every page by itself


def files_beside(patterns, root):
    "Files that pages link to or load: as `resources` of _quarto.yml, and the theme."
    for pattern in (*patterns, *AS_THEY_ARE):
        yield from filter(Path.is_file, root.glob(re.sub(r"\*\*$", "**/*", pattern)))


def build(root, out, cores=None):
    "Write the preview of the book at `root` to the folder `out`; returns its front page."
    site = yaml.safe_load((root / "_quarto.yml").read_text("utf-8"))
    website = site["website"]
    listed = [(d, text, root / path) for d, text, path in contents(website["sidebar"]["contents"], root)]
    pages = converted(
        dict.fromkeys([path for _, _, path in listed] + list(reader.notebooks(root))), root, cores
    )
    entries = [(d, text or pages[path].title, path) for d, text, path in listed]
    shutil.rmtree(out, ignore_errors=True)
    for path, page in pages.items():
        target = (out / path.relative_to(root)).with_suffix(".html")
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(render(path, page, entries, website, root), encoding="utf-8")
    for file in files_beside(site.get("project", {}).get("resources", []), root):
        target = out / file.relative_to(root)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(file, target)
    download.write(root, out, pages)
    return out / "nbs/index.html"


def render(path, page, entries, website, root):
    "The whole HTML of one page: the template filled."

    def link(other):
        return Path(relpath(other.with_suffix(".html"), path.parent)).as_posix()

    return TEMPLATE.render(
        site=website["title"],
        footer=website.get("page-footer", {}),
        title=page.title,
        description=page.description,
        body=page.body,
        toc=page.toc,
        nav=parts([{"depth": d, "text": t, "href": link(q), "here": q == path} for d, t, q in entries]),
        turn=[(arrow, text, link(q)) for arrow, text, q in neighbours(entries, path)],
        up=Path(relpath(root / "nbs", path.parent)).as_posix(),
        script=(root / "nbs/theme/page.html").read_text("utf-8"),
    )


def parts(entries):
    "The flat sidebar as parts, each with the pages below it."
    found = []
    for entry in entries:
        if entry["depth"] == 0:
            found.append(entry | {"pages": []})
        else:
            found[-1]["pages"].append(entry)
    for part in found:
        part["open"] = part["here"] or any(page["here"] for page in part["pages"])
    return found


def neighbours(entries, path):
    "The pages before and after `path` in reading order."
    i = next((i for i, (_, _, q) in enumerate(entries) if q == path), None)
    if i is None:
        return []
    found = [("←", *entries[i - 1][1:])] if i else []
    return found + [("→", text, q) for _, text, q in entries[i + 1 : i + 2]]


if __name__ == "__main__":
    print(build(ROOT, Path(sys.argv[1] if len(sys.argv) > 1 else "_preview").resolve()))
