"""Find defects of the built site: `python nbs/_site/check.py [FOLDER]`.

Anything a page would load from another host, local files and anchors that are not there, notation that was
meant to be rendered (`:::`, `?@fig`, `#| export`). Plain links to other sites are allowed.
"""

import re
import sys
from html.parser import HTMLParser
from os.path import normpath
from pathlib import Path
from typing import NamedTuple
from urllib.parse import unquote, urlsplit

from parallel import each

LOADS = {
    "script": ["src"],
    "img": ["src", "srcset"],
    "iframe": ["src"],
    "source": ["src", "srcset"],
    "video": ["src", "poster"],
    "audio": ["src"],
    "embed": ["src"],
    "object": ["data"],
    "link": ["href"],
    "image": ["href", "xlink:href"],
    "use": ["href", "xlink:href"],
}
PASSIVE = {"canonical", "alternate", "prev", "next", "license", "author"}  # <link rel> that loads nothing
LITERAL = ("script", "style", "pre", "code")  # text that is not rendered
CSS = re.compile(r"(?:url\(\s*|@import\s+)[\"']?([^\"')\s]+)")
HIGHLIGHTS = re.compile(r'<span class="[^"]*">|</span>')  # most tags; no address
UNRENDERED = re.compile(r":::|\?@[\w-]+|#\| ?\w+|\{#(?:fig|tbl|eq|sec)-")


class Page(HTMLParser):
    "The resources, links, anchors and visible text of a page."

    def __init__(self, source):
        super().__init__()
        self.loads, self.links, self.ids, self.words = [], [], set(), []
        self.open = []
        self.feed(HIGHLIGHTS.sub("", source))
        self.text = "".join(self.words)

    def handle_starttag(self, tag, attributes):
        given = {k: v for k, v in attributes if v}
        if tag in LITERAL:
            self.open.append(tag)
        if "id" in given:
            self.ids.add(given["id"])
        if tag == "a":
            self.ids.add(given.get("name", ""))
            self.links += [given["href"]] if "href" in given else []
        if tag != "link" or not set(given.get("rel", "").split()) & PASSIVE:
            for name in LOADS.get(tag, []):
                self.loads += addresses(given.get(name, ""), many=name == "srcset")
        self.loads += CSS.findall(given.get("style", ""))

    def handle_startendtag(self, tag, attributes):
        self.handle_starttag(tag, attributes)
        self.handle_endtag(tag)

    def handle_endtag(self, tag):
        if tag in LITERAL and self.open:
            self.open.pop()

    def handle_data(self, data):
        if not self.open:
            self.words.append(data)
        elif self.open[-1] == "style":
            self.loads += CSS.findall(data)


def addresses(value, many):
    "The addresses in an attribute: one, or as in srcset several with their sizes."
    if not many or value.startswith("data:"):
        return [value] if value else []
    return [part.split()[0] for part in value.split(",") if part.strip()]


def external(address):
    return bool(re.match(r"(?:[a-z]+:)?//", address, re.I)) and not address.startswith("http://www.w3.org/")


def is_local(address):
    parts = urlsplit(address)
    return not (parts.scheme or parts.netloc)


def target_of(page, address):
    "The file of a local address on `page`."
    path = unquote(urlsplit(address).path)
    target = Path(normpath(page.parent / path)) if path else page
    return target / "index.html" if target.is_dir() else target


class Found(NamedTuple):
    "The facts about a page that do not depend on other pages."

    ids: set
    problems: list
    targets: dict  # local address -> its file


def look_at(path):
    "The defects of one page, whose path has no symbolic link, and its links."
    page = Page(path.read_text("utf-8"))
    targets = {a: target_of(path, a) for a in dict.fromkeys(page.loads + page.links) if is_local(a)}
    wrong = [f"loads {address}" for address in page.loads if external(address)]
    wrong += [f"missing {address}" for address, target in targets.items() if not target.exists()]
    return Found(
        page.ids, wrong + [f"not rendered: {mark}" for mark in UNRENDERED.findall(page.text)], targets
    )


def dead_anchors(page, pages):
    "The addresses of a page whose anchor does not exist on the target page."
    for address, target in page.targets.items():
        anchor = unquote(urlsplit(address).fragment)
        if anchor not in {"", "top"} and target in pages and anchor not in pages[target].ids:
            yield f"no anchor {address}"


def is_page(path):
    "Neither a part of Quarto's own libraries nor the snippet that is included in every page."
    return "site_libs" not in path.parts and path.name != "page.html"


def problems(site, cores=None):
    "One line for each defect in the rendered folder `site`."
    site = Path(site).resolve()
    paths = [path for path in sorted(site.rglob("*.html")) if is_page(path)]
    pages = dict(each("check", look_at, paths, cores))
    if not pages:
        return [f"{site}: no page"]
    found = []
    for path, page in pages.items():
        lines = [*page.problems, *dead_anchors(page, pages)]
        found += [f"{path.relative_to(site)}: {line}" for line in lines]
    for sheet in sorted(site.rglob("*.css")):
        loads = filter(external, CSS.findall(sheet.read_text("utf-8")))
        found += [f"{sheet.relative_to(site)}: loads {address}" for address in loads]
    return found


def main():
    found = problems(sys.argv[1] if len(sys.argv) > 1 else "_docs")
    print("\n".join(found) or "no resources from other hosts, no dead links, no unrendered notation")
    return bool(found)


if __name__ == "__main__":
    sys.exit(main())
