"""Every page of the preview in a headless Chromium: widths, tables, first figures, keyboard, and axe-core.

axe-core is looked for in node_modules (`npm install axe-core`); without it only its own checks are left out.
"""

import json
import re
import threading
from collections import Counter
from functools import partial
from http.server import ThreadingHTTPServer

import preview
import pytest
from conftest import ROOT
from test_browser import CHROMIUM, Quiet, said_by

AXE = ROOT / "node_modules/axe-core/axe.min.js"
LARGEST = 1_000_000  # bytes of a page
TOUR = """<!doctype html><title>tour</title><body><script type="module">
const {pages, width, theme} = JSON.parse(decodeURIComponent(location.hash.slice(1)));
const axe = AXE ? await (await fetch("/axe.js")).text() : "";
document.documentElement.style.colorScheme = theme;  // an iframe follows it
const scrolls = (box) => /auto|scroll/.test(box.ownerDocument.defaultView.getComputedStyle(box).overflow);
function* look(page, view) {
  const doc = view.document, root = doc.documentElement;
  if (root.scrollWidth > width) yield `${root.scrollWidth} px wide`;
  const figure = doc.querySelector("main svg, main figure img");
  const chapter = /^nbs\\/(channel|spatial|hybrid|collaboration|synergy)\\/(?!index|open)/.test(page);
  const top = figure ? figure.getBoundingClientRect().top + view.scrollY : Infinity;
  if (chapter && width >= 1280 && top >= 900) yield `first figure at ${top}`;
  for (const table of doc.querySelectorAll("main table")) {
    const boxes = [];
    let box = table;
    while ((box = box.parentElement) !== doc.body) if (scrolls(box)) boxes.push(box);
    const name = table.caption?.textContent ?? table.rows[0].textContent;
    if (boxes.length > 1) yield `a scroll inside a scroll: ${name}`;
    if (boxes.some((box) => box.scrollHeight > box.clientHeight + 2)) yield `only a part in height: ${name}`;
    const verdict = table.querySelector("td .verdict");
    if (!verdict) continue;
    if (verdict.closest("td").cellIndex !== 1) yield `the verdict is not the second column: ${name}`;
    const [edge, right] = [boxes[0] ?? root, verdict].map((box) => box.getBoundingClientRect().right);
    if (width >= 1280 && right > edge) yield `the verdict is cut off: ${name}`;
  }
}
const found = [];
for (const page of pages) {
  const frame = Object.assign(document.createElement("iframe"), {width, height: 900, src: `/${page}`});
  frame.style.border = 0;
  const loaded = new Promise((done) => frame.addEventListener("load", done));
  document.body.append(frame);
  await loaded;
  const view = frame.contentWindow;
  found.push(...[...look(page, view)].map((fault) => `${page}: ${fault}`));
  if (axe) {
    view.eval(axe);
    const {violations} = await view.axe.run(view.document, {resultTypes: ["violations"], iframes: false});
    const heavy = violations.filter(({impact}) => ["serious", "critical"].includes(impact));
    found.push(...heavy.map(({id, nodes}) => `${page}: ${id} at ${nodes[0].target}`));
  }
  frame.remove();
}
fetch("/found?" + encodeURIComponent(JSON.stringify(found.slice(0, 40))));
</script>"""


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    out = tmp_path_factory.mktemp("site") / "site"
    preview.build(ROOT, out)
    (out / "tour.html").write_text(TOUR.replace("AXE", "true" if AXE.exists() else "false"))
    if AXE.exists():
        (out / "axe.js").write_bytes(AXE.read_bytes())
    return out


def pages_of(site):
    "The pages of the book; the page that computes maps has a test of its own."
    others = ("theme/page.html", "tour.html", "see/browser/index.html")
    found = (path.relative_to(site).as_posix() for path in sorted(site.rglob("*.html")))
    return [page for page in found if not page.endswith(others)]


@pytest.mark.slow
def test_no_page_is_heavy_and_no_id_is_there_twice(site):
    assert len(pages_of(site)) > 150
    for page in pages_of(site):
        source = (site / page).read_text("utf-8")
        assert len(source.encode()) <= LARGEST, page
        twice = [name for name, n in Counter(re.findall(r'<[^>]* id="([^"]+)"', source)).items() if n > 1]
        assert not twice, f"{page}: {twice}"


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium: apt-get install chromium")
@pytest.mark.parametrize("theme", ["light", "dark"])
@pytest.mark.parametrize("width", [1280, 390])
def test_every_page_fits_and_can_be_used_by_keyboard(site, tmp_path, width, theme):
    handler = type("Noting", (Quiet,), {"asked": []})
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(handler, directory=str(site)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    found = []
    every = pages_of(site)
    for i in range(0, len(every), 10):
        some = every[i : i + 10]
        handler.asked.clear()
        asked = json.dumps({"pages": some, "width": width, "theme": theme})
        url = f"http://127.0.0.1:{server.server_port}/tour.html#{asked}"
        found += said_by(url.replace('"', "%22").replace(" ", "%20"), handler.asked, tmp_path / str(i))
    server.shutdown()
    assert found == []
