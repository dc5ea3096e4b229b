"""The page about a run: what it shows, and that nothing of it comes from outside."""

import base64
import html.parser
import http.server
import json
import re
import shutil
import subprocess
import sys
import threading

import numpy as np
import pytest
import report_run
from PIL import Image

from dgpt_jax import cli
from tests.run_log_test import write

PNG = base64.b64decode(
    "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk+M9QDwADhgGAWjR9awAAAABJRU5ErkJggg=="
)
HOSTILE = '"><script src="http://example.com/x.js"></script><img src=//example.com/y.png>'


class Page(html.parser.HTMLParser):
    """Tags, what they load, and the text."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.loads, self.text, self.meta = set(), [], "", []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.add(tag)
        for name, value in attributes:
            assert not name.startswith("on"), name
            if name in ("src", "href", "srcset", "data", "action", "poster", "background"):
                self.loads.append(value)
            if name == "content":
                self.meta.append(value)

    def handle_data(self, data):
        self.text += data


@pytest.fixture
def run(tmp_path):
    lines = [{"step": s, "loss": 3.0 - s, "learning_rate": 0.1} for s in (1, 2, 3, 4)]
    lines += [{"step": 2, "heldout/next": 0.75}, {"step": 4, "heldout/next": "nan"}]
    lines.sort(key=lambda line: line["step"])
    run = write(tmp_path / "a<b", lines)
    (run / "config.json").write_text(
        json.dumps({"total": "4 steps", "platform": "cpu", "data": {"path": HOSTILE}})
    )
    (run / "shown.png").write_bytes(PNG)
    rows = [{"protocol": "knn", "accuracy": 61.25, "how": {"k": 1}}, {"protocol": HOSTILE, "k": 20}]
    (run / "results_step4.json").write_text(
        json.dumps({"format": 1, "weights": "run, step 4", "model": {}, "results": rows})
    )
    (run / "results_bad.json").write_text("{")
    (run / "checkpoints/4").mkdir(parents=True)
    (run / "tensorboard").mkdir()
    (run / "tensorboard/events.out.tfevents.1700000000.somehost").touch()
    return run


def test_nothing_is_loaded_from_outside(run, tmp_path):
    (tmp_path / "log").write_text(f"process 0: 8 devices\n{HOSTILE}")
    text = report_run.page(run, log_file=tmp_path / "log")
    page = Page(text)
    pictures = [base64.b64decode(x.partition(",")[2]) for x in page.loads]
    assert all(re.match(r"data:image/(png|svg\+xml);base64,", x) for x in page.loads)
    assert PNG in pictures and len(pictures) == 2
    assert not page.tags & {"script", "link", "iframe", "object", "embed", "base", "svg", "a"}
    assert "url(" not in text and "@import" not in text
    assert any("default-src 'none'" in content for content in page.meta)
    # the curves: an SVG that refers to nothing but its own parts
    drawn = next(x for x in pictures if x != PNG).decode()
    assert all(x.startswith("#") for x in re.findall(r'href="([^"]*)"', drawn))
    assert "<script" not in drawn and "<image" not in drawn
    assert all(x.startswith("#") for x in re.findall(r"url\(([^)]*)\)", drawn))


def test_what_the_page_shows(run, tmp_path):
    (tmp_path / "log").write_text("process 0: 8 devices")
    text = Page(report_run.page(run, log_file=tmp_path / "log")).text
    assert "a<b" in text and text.count(HOSTILE) == 2  # as text, in config and results
    assert "Last logged step: 4; config.total: 4 steps." in text
    cells = report_run.evaluations(report_run.run_log.read(run))
    assert re.findall(r"<td[^>]*>([^<]*)</td>", cells) == [
        "heldout/next", "2", "0.75", "2", "0.75", "2", "nan", "4",
    ]  # fmt: skip
    for shown in ("61.25", "shown.png", "2023-11-14 22:13:20 UTC, host somehost", "8 devices"):
        assert shown in text, shown
    assert (
        "results_bad.json is no file of results" in text
        and "run, step 4" in text
        and '{"k": 1}' not in text
    )
    assert re.search(r"checkpoints of steps\s*4", text)


BROWSERS = ("chromium-headless-shell", "chromium", "chromium-browser", "google-chrome")
BROWSER = next(filter(None, map(shutil.which, BROWSERS)), None)


@pytest.fixture
def internet():
    """(what a browser is to believe of every address, what was asked for there)."""
    asked = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            asked.append(self.path)
            self.send_error(404)

        def log_message(self, *_):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"--host-resolver-rules=MAP * 127.0.0.1:{server.server_address[1]}", asked
        server.shutdown()


def browse(flag, page, tmp_path) -> np.ndarray:
    """What the browser draws of a file."""
    flags = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking",
             "--disable-component-update", "--hide-scrollbars", "--window-size=1300,2500", flag,
             f"--user-data-dir={tmp_path / 'user'}", f"--screenshot={page}.png"]  # fmt: skip
    subprocess.run(
        [BROWSER, *flags, f"file://{page}"], check=True, capture_output=True, timeout=120
    )
    return np.asarray(Image.open(f"{page}.png").convert("RGB"))


@pytest.mark.skipif(not BROWSER, reason="no Chromium is installed")
def test_in_a_browser(run, internet, tmp_path):
    """It is drawn, curves and all, and asks for nothing, whatever a config says."""
    flag, asked = internet
    numbers = np.random.default_rng(0).integers(0, 256, (300, 600, 3), np.uint8)
    Image.fromarray(numbers).save(run / "shown.png")
    (tmp_path / "r.html").write_text(report_run.page(run))
    drawn = browse(flag, tmp_path / "r.html", tmp_path)
    assert not asked
    assert drawn.shape == (2500, 1300, 3) and (drawn.mean(axis=2) < 100).sum() > 5000  # text
    at = [m.start() for m in re.finditer(re.escape(numbers[0, :5].tobytes()), drawn.tobytes())]
    assert len(at) == 1  # the picture, to the pixel
    blue = np.all(np.abs(drawn.astype(int) - (31, 119, 180)) < 12, axis=2)  # a line of matplotlib
    assert blue.sum() > 100
    # The same text as a page of its own does ask.
    (tmp_path / "raw.html").write_text(HOSTILE.replace("//example.com/y", "http://example.com/y"))
    browse(flag, tmp_path / "raw.html", tmp_path)
    assert {"/x.js", "/y.png"} <= {*asked}


def test_a_run_with_little_in_it(tmp_path, monkeypatch, capsys):
    run = write(tmp_path / "run", [{"step": 1, "loss": 1.0}])
    monkeypatch.setattr(sys, "argv", ["report_run.py", str(run), f"--out={tmp_path / 'r.html'}"])
    report_run.main()
    text = Page((tmp_path / "r.html").read_text()).text
    assert "no config.json" in text and "none lies in the work directory" in text
    assert "next: open" in capsys.readouterr().out
    (run / "config.json").write_text('{"seed"')
    with pytest.raises(SystemExit) as ended:
        cli.run(report_run.main)
    assert "config.json is damaged" in ended.value.code
