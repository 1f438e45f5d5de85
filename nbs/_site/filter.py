"""What a reader sees of a notebook: Quarto sends its JSON to stdin and shows what comes back on stdout.

Drops what only nbdev reads, puts a bar with its module over an exported cell, merges the parameters of an
executed run, lifts `# Title` and `> one line` into front matter, opens our callouts, links the first use of
a term to the glossary, and lets SVG figures follow the page's colours. A page that reads result files is
shown as the build executed it. preview.py and readme.py call `clean` too. Standard library only: Quarto may
start it with any Python.
"""

import ast
import csv
import hashlib
import json
import os
import re
import sys
import zlib
from pathlib import Path

DROP = {"hide", "default_exp", "notest"}  # directives that remove the whole cell
EXPORTS = ("export", "exporti", "exports", "exec_doc_export")
# ours -> (Quarto's kind, default title, more attributes)
CALLOUTS = {
    "differ": ("warning", "Paper and code differ", ""),
    "tryit": ("tip", "Try it", ""),
    "measured": ("note", "Measured", ""),
    "answer": ("note", "Answer", ' collapse="true"'),
}
DOWNLOAD, ARCHIVE = "download", "scsa-book.tar.gz"  # a folder of the site, written by download.py
XLINK = "http://www.w3.org/1999/xlink"
DIRECTIVE = re.compile(r"#\|\s?(.*?)\s*$")
CALLOUT = re.compile(rf"^(:{{3,}})\s*\{{\.({'|'.join(CALLOUTS)})\b([^}}]*)\}}\s*$", re.M)
HEAD = re.compile(r"\A\s*# +(?P<title>[^\n]+)\n*(?P<quote>(?:>[^\n]*(?:\n|\Z))+)?\s*(?P<rest>.*)\Z", re.S)
GLOSSARY = Path("nbs/foundations/glossary.ipynb")
# Not linked: code, formulas, links, citations, tags, headings, tables, captions, quotes and fences.
PROTECTED = re.compile(
    r"```.*?```|`[^`\n]*`|\$\$.*?\$\$(?:\s*\{[^}\n]*\})?|\$(?:[^$\n]|\n(?!\n))+\$|!?\[[^\]]*\](?:\([^)]*\)|\{[^}]*\})?|@[\w:-]+"
    r"|<[^>\n]+>|https?://\S+|^(?:#|\||:|>)[^\n]*$",
    re.S | re.M,
)
YAML = re.compile(r"\A\s*---\n(.*?)\n?---\s*\Z", re.S)
SVG_TAG = re.compile(r'<svg [^>]*?width="([\d.]+)pt"[^>]*?viewBox="([^"]+)"[^>]*>|<svg [^>]*>')
SITE_SETTING = re.compile(r"^\s*(repo-url|repo-branch):\s*[\"']?([^\s\"'#]+)", re.M)


# ---- cells


def text(cell):
    return "".join(cell["source"])


def tags(cell):
    return cell["metadata"].get("tags", [])


def markdown(source):
    return {"cell_type": "markdown", "metadata": {}, "source": source}


def split_head(source):
    "The leading `#|` lines (without `#|`) and the code below them."
    lines = source.lstrip("\n").splitlines()
    below = (i for i, line in enumerate(lines) if line.strip() and not line.startswith("#|"))
    n = next(below, len(lines))
    return [DIRECTIVE.match(line)[1] for line in lines[:n] if line.strip()], "\n".join(lines[n:])


def is_nbdev(line):
    "`export`, `export a.b`, `slow`: words without a colon, which are not YAML options of Quarto's."
    return bool(re.fullmatch(r"\w+(\s+[\w./ -]+)?", line))


def default_module(cells):
    "The module of the notebook's `#| export` cells."
    found = (re.search(r"^#\|\s*default_exp\s+([\w.]+)", text(c), re.M) for c in cells)
    return next((m[1] for m in found if m), None)


# ---- code cells


def code_cell(cell, module):
    "Quarto's version of a code cell, or None if it is hidden."
    head, body = split_head(text(cell))
    words = {line.split()[0]: line.split()[1:] for line in head if is_nbdev(line)}
    if words.keys() & DROP:
        return None
    options = [line for line in head if not is_nbdev(line)] + options_of(words, module)
    if "injected-parameters" in tags(cell):
        options += ['filename: "parameters of this run"', "classes: injected"]
        body = re.sub(r"\A\s*# Parameters\n", "", body)
    if not body.strip() and not cell.get("outputs"):
        return None
    for i, output in enumerate(cell.get("outputs", [])):
        show(output, f"f{zlib.crc32(text(cell).encode()):08x}{i}-", alternative_text(head))
    cell["source"] = "".join(f"#| {option}\n" for option in options) + body
    return cell


def options_of(words, module):
    "Quarto's options that correspond to nbdev's directives."
    options = []
    if "hide_input" in words:
        options.append("echo: false")
    if "hide_output" in words:
        options.append("output: false")
    word = next((w for w in EXPORTS if w in words), None)
    if word and (words[word] or module):
        target = (words[word] or [module])[0].replace(".", "/")
        options += [f'filename: "scsa_book/{target}.py"', "classes: exported"]
    return options


def alternative_text(head):
    "`fig-alt`, else `fig-cap`."
    options = dict(line.split(":", 1) for line in head if ":" in line)
    return (options.get("fig-alt") or options.get("fig-cap") or "").strip().strip("\"'")


def show(output, prefix, alt):
    "Adapt one output to the page, in place."
    if output["output_type"] == "stream":
        plain = re.sub(r"\x1b\[[\d;]*m", "", "".join(output["text"]))
        output["text"] = plain.splitlines(keepends=True)
    data = output.get("data", {})
    if svg := data.get("image/svg+xml"):
        html = theme_svg("".join(svg), prefix, alt)
    else:
        html = "".join(data.get("text/html", []))
    if html:
        # One text/html output makes Quarto load require.js and jQuery from a CDN; raw HTML in Markdown none.
        fenced = f"```````{{=html}}\n{html}\n```````\n"
        output["data"] = {"text/markdown": fenced.splitlines(keepends=True)}


def theme_svg(svg, prefix, alt):
    "Inline SVG whose black and white become the page's text and background colours; ids unique on the page."
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.S)
    # The id of an image follows from its content: one that is drawn twice would have it twice.
    svg = re.sub(r'(<image\b[^>]*?) id="[^"]*"', r"\1", svg)
    svg = re.sub(r'(\bid="|url\(#|href="#)', lambda m: m[1] + prefix, svg)
    ground = r'(<g id="\S*patch_\d+">\s*<path [^>]*?style="[^"]*?fill: )#ffffff'
    svg = re.sub(ground, r"\1var(--figure-ground, none)", svg)
    svg = svg.replace("#000000", "currentColor")
    label = re.sub(r'["<>&]', "", alt) or "figure"
    start = f'<svg class="house-figure" role="img" aria-label="{label}" xmlns:xlink="{XLINK}" '

    def tag(m):
        if m[2]:
            return start + f'viewBox="{m[2]}" style="--w:{float(m[1]) * 4 / 3:.0f}px">'  # 1 pt is 4/3 px
        return start + m[0][len("<svg ") :]

    svg = SVG_TAG.sub(tag, svg, count=1)
    return '<div class="figure-scroll" tabindex="0">' + re.sub(r"\n\s*", "\n", svg) + "</div>"


# ---- Markdown cells


def open_callouts(source):
    "`::: {.differ}` becomes Quarto's notation, with our title unless the author gave one."

    def one(m):
        kind, title, more = CALLOUTS[m[2]]
        attributes = m[3].strip()
        if "title=" not in attributes:
            attributes += f' title="{title}"'
        return f'{m[1]} {{.callout-{kind} .{m[2]} icon="false"{more} {attributes.strip()}}}'

    return CALLOUT.sub(one, source)


def asis(cell):
    "The Markdown that a cell with `output: asis` wrote, so that its headings are the page's; else None."
    if cell["cell_type"] != "code" or "output: asis" not in split_head(text(cell))[0]:
        return None
    parts = (o["data"].get("text/markdown", "") for o in cell["outputs"] if "data" in o)
    return markdown("\n\n".join("".join(part) for part in parts))


def glossary(root):
    "Each form of a term -> the anchor of its entry; longer forms first. See glossary.ipynb."
    file = root / "scsa_book/explain/glossary.csv"
    if not file.exists():
        return {}
    forms = {}
    for row in csv.DictReader(file.read_text("utf-8").splitlines()):
        anchor = "term-" + re.sub(r"\W+", "-", row["term"].lower())
        forms |= dict.fromkeys(filter(None, [row["term"], *row["forms"].split("|")]), anchor)
    return dict(sorted(forms.items(), key=lambda form: -len(form[0])))


def link_terms(cells, where, forms):
    "The first use of each term in the text of a page leads to the glossary, in place."
    if not forms or where is None or where == GLOSSARY or where.parent == Path("nbs"):
        return
    page = Path(os.path.relpath(GLOSSARY, where.parent)).as_posix()
    used, pattern = set(), re.compile(rf"(?<![\w-])(?:{'|'.join(map(re.escape, forms))})(?![\w-])", re.I)
    lower = {form.lower(): anchor for form, anchor in forms.items()}

    def one(m):
        anchor = lower[m[0].lower()]
        if anchor in used:
            return m[0]
        used.add(anchor)
        return f"[{m[0]}]({page}#{anchor})"

    for cell in cells:
        if cell["cell_type"] == "markdown":
            source, end, parts = text(cell), 0, []
            for m in PROTECTED.finditer(source):
                parts += [pattern.sub(one, source[end : m.start()]), m[0]]
                end = m.end()
            cell["source"] = "".join([*parts, pattern.sub(one, source[end:])])


def front_matter(cells, extra=()):
    "Move `# Title` and `> one line` of the first Markdown cell into the YAML that Quarto reads."
    first = next((c for c in cells if c["cell_type"] == "markdown"), None)
    head = HEAD.match(text(first)) if first else None
    if not head:
        return cells
    raw = next((c for c in cells if c["cell_type"] == "raw" and YAML.match(text(c))), None)
    given = YAML.match(text(raw))[1] if raw else ""
    lines = []
    if not re.search(r"^title:", given, re.M):
        lines.append("title: " + json.dumps(head["title"].strip(), ensure_ascii=False))
    if head["quote"] and not re.search(r"^description:", given, re.M):
        quote = " ".join(line.lstrip("> ") for line in head["quote"].splitlines())
        lines.append("description: " + json.dumps(quote, ensure_ascii=False))
    first["source"] = head["rest"]
    source = "---\n" + "\n".join([*lines, *extra, given]).strip() + "\n---\n"
    top = {"cell_type": "raw", "metadata": {}, "source": source}
    return [top] + [c for c in cells if c is not raw and (c is not first or head["rest"].strip())]


# ---- executed runs


def assignments(source):
    "Name -> its assignment as written, for the top level of `source`."
    found = {}
    for node in ast.parse(source).body:
        if isinstance(node, ast.Assign | ast.AnnAssign):
            for target in getattr(node, "targets", None) or [node.target]:
                if isinstance(target, ast.Name):
                    found[target.id] = ast.get_source_segment(source, node)
    return found


def merge_parameters(cells):
    "Drop papermill's cell of defaults; those that this run did not override follow the injected ones."
    injected = next((c for c in cells if "injected-parameters" in tags(c)), None)
    if injected is None:
        return cells
    given = assignments(text(injected))
    defaults = {}
    for cell in cells:
        if "parameters" in tags(cell):
            defaults |= assignments(split_head(text(cell))[1])
    kept = [line for name, line in defaults.items() if name not in given]
    if kept:
        injected["source"] = text(injected).rstrip() + "\n# as in the template\n" + "\n".join(kept)
    return [c for c in cells if "parameters" not in tags(c)]


def provenance(nb):
    "When an executed run was made and how long it took, from papermill's own record."
    record = nb["metadata"].get("papermill") or {}
    if not record.get("start_time"):
        return []
    line = f"Executed {record['start_time'][:10]}"
    if record.get("duration"):
        line += f" in {record['duration']:.1f} s"
    if record.get("input_path"):
        line += f" from `{Path(record['input_path']).name}`"
    return [markdown(f"::: {{.page-links}}\n{line}\n:::\n")]


# ---- links


def links(nb, where, site):
    "One line of ways to run the page, if it has code; more of them if _quarto.yml names a repository."
    repo, branch = site.get("repo-url", "").rstrip("/"), site.get("repo-branch", "main")
    home = where is not None and where.parent.name == "nbs"
    if not where or home or not any(c["cell_type"] == "code" for c in nb["cells"]):
        return []
    out = downloads(where, archive=not repo)
    if template := (nb["metadata"].get("papermill") or {}).get("input_path"):
        where = Path("nbs/runs") / Path(template).name  # the executed copy may exist only here
    path = where.as_posix()
    if repo:
        out += [f"[View the notebook]({repo}/blob/{branch}/{path})", f"`jupyter lab {path}`"]
    if m := re.match(r"https://github\.com/(.+)", repo):
        colab = f"https://colab.research.google.com/github/{m[1]}/blob/{branch}/{path}"
        out.insert(0, f"[Open in Colab]({colab})")
    return [markdown("::: {.page-links}\n" + " \n".join(out) + "\n:::\n")]


def downloads(where, archive):
    "Links to the notebook that runs on its own and, if it needs one, to the archive that it unpacks."
    up = "../" * (len(where.parts) - 1)
    files = {"Download the notebook": where.relative_to("nbs").as_posix()}
    files |= {"and the book, for the same folder": ARCHIVE} if archive else {}
    return [f'<a href="{up}{DOWNLOAD}/{file}" download>{words}</a>' for words, file in files.items()]


def settings(root):
    "The terms of the glossary and the two scalar settings we need, read by pattern without a YAML library."
    file = root / "_quarto.yml"
    if not file.exists():
        return {}
    return dict(SITE_SETTING.findall(file.read_text("utf-8"))) | {"terms": glossary(root)}


# ---- the whole notebook


def clean(nb, where=None, site=None):
    "The reader's version of notebook `nb` at the path `where` (relative to the root)."
    cells = merge_parameters(nb["cells"])
    module = default_module(cells)
    kept = []
    for cell in cells:
        if written := asis(cell):
            cell = written
        elif cell["cell_type"] == "code":
            cell = code_cell(cell, module)
        elif cell["cell_type"] == "markdown":
            cell["source"] = open_callouts(text(cell))
        if cell:
            kept.append(cell)
    nb["cells"] = kept
    link_terms(kept, where, (site or {}).get("terms"))
    ways = links(nb, where, site or {}) + provenance(nb)
    # An executed copy is git-ignored: "edit this page" would lead nowhere.
    extra = ["repo-actions: false"] if "papermill" in nb["metadata"] else []
    kept = front_matter(kept, extra)
    top = int(bool(kept) and kept[0]["cell_type"] == "raw")
    nb["cells"] = kept[:top] + ways + kept[top:]
    for cell in nb["cells"]:
        cell["source"] = text(cell).splitlines(keepends=True)  # Quarto loses the line ends of one long string
    return nb


def digest(*parts):
    "One fingerprint of many byte strings."
    whole = hashlib.sha256()
    for part in parts:
        whole.update(hashlib.sha256(part).digest())
    return whole.hexdigest()


def executed_copy(path):
    "The path of the executed copy of a page that reads result files."
    return path.parent / ".built" / path.name


def live_of(raw):
    "The inputs from which the build executed a copy."
    return json.loads(raw)["metadata"].get("live", {})


def read(path):
    "The notebook at `path`, or the copy that the build executed, if it was made from this very source."
    raw, copy = path.read_bytes(), executed_copy(path)
    if copy.exists() and live_of(found := copy.read_bytes()).get("source") == digest(raw):
        raw = found
    return json.loads(raw)


def notebooks(root):
    "Every notebook that Quarto renders: no templates, nothing in hidden folders."
    for path in sorted(root.glob("nbs/**/*.ipynb")):
        inside = path.relative_to(root)
        if inside.parts[1] != "runs" and not any(part[0] in "_." for part in inside.parts):
            yield path


def root_of(folder):
    return next((p for p in [folder, *folder.parents] if (p / "_quarto.yml").exists()), folder)


def main():
    raw, here = sys.stdin.buffer.read(), Path.cwd()
    # Quarto does not say which notebook it sends, but it runs us in its folder: the one with the same bytes.
    same = (p for p in here.glob("*.ipynb") if p.stat().st_size == len(raw) and p.read_bytes() == raw)
    path, root = next(same, None), root_of(here)
    nb = read(path) if path else json.loads(raw)
    nb = clean(nb, path and path.relative_to(root), settings(root))
    sys.stdout.buffer.write(json.dumps(nb).encode())


if __name__ == "__main__":
    main()
