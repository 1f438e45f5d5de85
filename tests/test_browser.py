"""The page that computes attention maps, in a headless Chromium that reaches nothing but this machine."""

import html
import json
import re
import shutil
import subprocess
import threading
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer

import pytest
from conftest import ROOT

PAGE = ROOT / "nbs" / "see" / "browser"
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


class Quiet(SimpleHTTPRequestHandler):
    "A server that notes what was asked for."

    asked: list[str]

    def log_message(self, *_):
        self.asked.append(self.path)


@pytest.fixture
def address():
    handler = type("Noting", (Quiet,), {"asked": []})
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(handler, directory=str(PAGE)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}", handler.asked
    server.shutdown()


def opened(url, profile):
    "The page as Chromium has it when it has nothing left to do."
    words = "--headless --no-sandbox --disable-gpu --virtual-time-budget=60000 --dump-dom".split()
    alone = ["--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1", f"--user-data-dir={profile}"]
    done = subprocess.run([CHROMIUM, *words, *alone, url], capture_output=True, text=True, timeout=120)
    return done.stdout


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium: apt-get install chromium")
def test_the_maps_of_the_browser_are_those_of_pytorch(address, tmp_path):
    url, asked = address
    page = opened(f"{url}/index.html#test", tmp_path)
    assert "cannot" not in re.search(r'id="status"[^>]*>([^<]*)', page)[1]
    found = json.loads(html.unescape(re.search(r'data-found="([^"]*)"', page)[1]))
    listed = json.loads((PAGE / "files.json").read_text())
    assert found.keys() == {network["name"] for network in listed["networks"]} and found
    for network in listed["networks"]:
        assert found[network["name"]] == pytest.approx(network["grey"], rel=1e-4)
    assert page.count("<figure>") == 4, "the photograph and three maps"
    assert all((PAGE / path.lstrip("/").split("?")[0]).is_file() for path in asked), asked


def test_the_page_has_all_of_its_files_and_no_others():
    listed = json.loads((PAGE / "files.json").read_text())
    assert {p.name for p in (PAGE / "models").iterdir()} == {
        network["file"] for network in listed["networks"]
    }
    assert {p.name for p in (PAGE / "photos").iterdir()} == {photo["file"] for photo in listed["photographs"]}
    own = [PAGE / "index.html", PAGE / "maps.js"]
    assert not [address for path in own for address in re.findall(r"https?://[^\s\"']+", path.read_text())]
    assert "MIT" in (PAGE / "ort" / "LICENSE").read_text()
