"""README.md is the book's home page: `python nbs/_site/readme.py` makes it from nbs/index.ipynb."""

import re
from pathlib import Path

import filter as reader

ROOT = Path(__file__).resolve().parents[2]
FIGURE = "theme/home.svg"  # the home page's figure, as a file beside it that GitHub can show
NOTE = "<!-- Made from nbs/index.ipynb by `make readme`. -->"
INK = "<style>svg{color:#23262b}@media(prefers-color-scheme:dark){svg{color:#d9dce1}}</style>"


def readme(root=ROOT):
    "The files that follow from the home page: path -> text."
    raw = reader.read(root / "nbs/index.ipynb")
    image = next((svg for cell in raw["cells"] for svg in figures(cell)), None)
    parts = [NOTE, *(part for cell in reader.clean(raw)["cells"] if (part := section(cell)))]
    files = {"README.md": "\n\n".join(parts) + "\n"}
    return files | ({f"nbs/{FIGURE}": standalone(image)} if image else {})


def figures(cell):
    "The SVG outputs of a cell."
    data = [output.get("data", {}) for output in cell.get("outputs", [])]
    return ["".join(d["image/svg+xml"]) for d in data if "image/svg+xml" in d]


def section(cell):
    "One cell of the home page as plain Markdown."
    source = reader.text(cell)
    if cell["cell_type"] == "raw":
        title, description = (
            re.search(rf'^{key}: "(.+)"$', source, re.M)[1] for key in ("title", "description")
        )
        return f"# {title}\n\n> {description}"
    if cell["cell_type"] == "code":
        shown = "".join("".join(output["data"]["text/markdown"]) for output in cell["outputs"])
        alt = reader.alternative_text(reader.split_head(source)[0])
        source = f"![{alt}]({FIGURE})" if "<svg" in shown else shown
    source = re.sub(r"^:{3,}.*\n?", "", source, flags=re.M)
    source = re.sub(r"\]\((?!https?:|#)([^)]+)\)", r"](nbs/\1)", source)
    return re.sub(r"\n{3,}", "\n\n", source).strip()


def standalone(svg):
    "The figure as a separate file: transparent background, colour that follows the reader's theme."
    svg = svg[svg.index("<svg") :].replace("#000000", "currentColor")
    svg = svg.replace("fill: #ffffff", "fill: none", 1)  # the background of the whole figure
    svg = re.sub(r"<metadata>.*?</metadata>\s*", "", svg, flags=re.S)
    svg = re.sub(r"(<svg [^>]*>)", r"\1" + INK, svg, count=1)
    return re.sub(r"[ \t]+$", "", svg, flags=re.M).strip() + "\n"


if __name__ == "__main__":
    for name, text in readme().items():
        (ROOT / name).write_text(text, encoding="utf-8")
        print(name)
