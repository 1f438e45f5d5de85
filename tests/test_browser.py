"""The page that computes attention maps, in a headless Chromium that reaches nothing but this machine."""

import json
import re
import shutil
import subprocess
import threading
import time
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote

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


def said_by(url, asked, profile):
    "What the page at `url` reports to its own server, and the files that it asked for."
    alone = ["--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1", f"--user-data-dir={profile}"]
    words = ["--headless", "--no-sandbox", "--disable-gpu", "--remote-debugging-port=0", *alone]
    browser = subprocess.Popen([CHROMIUM, *words, url], stderr=subprocess.DEVNULL)
    try:
        for _ in range(600):
            if found := [path for path in asked if path.startswith("/found?")]:
                return json.loads(unquote(found[0].partition("?")[2]))
            time.sleep(0.2)
        raise AssertionError(f"no report in two minutes; asked for: {asked}")
    finally:
        browser.terminate()
        browser.wait()


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium: apt-get install chromium")
def test_the_maps_of_the_browser_are_those_of_pytorch(address, tmp_path):
    url, asked = address
    said = said_by(f"{url}/index.html#test", asked, tmp_path)
    listed = json.loads((PAGE / "files.json").read_text())
    assert said["found"].keys() == {network["name"] for network in listed["networks"]}
    for network in listed["networks"]:
        assert said["found"][network["name"]] == pytest.approx(network["grey"], rel=1e-4)
    assert re.fullmatch(r"\w+ \d: \d+ ms", said["status"])
    assert said["figures"] == 4, "the photograph and three maps"
    files = {path.lstrip("/").split("#")[0] for path in asked if not path.startswith("/found?")}
    assert files and all((PAGE / file).is_file() for file in files), files


def test_the_page_has_all_of_its_files_and_no_others():
    listed = json.loads((PAGE / "files.json").read_text())
    assert {p.name for p in (PAGE / "models").iterdir()} == {
        network["file"] for network in listed["networks"]
    }
    assert {p.name for p in (PAGE / "photos").iterdir()} == {photo["file"] for photo in listed["photographs"]}
    own = [PAGE / "index.html", PAGE / "maps.js"]
    assert not [address for path in own for address in re.findall(r"https?://[^\s\"']+", path.read_text())]
    assert "MIT" in (PAGE / "ort" / "LICENSE").read_text()
