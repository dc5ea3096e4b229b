"""Content of the HTML report of a run, which loads nothing from outside."""

import base64
import html.parser
import json
import re
import shutil
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from dgpt_jax import cli
from dgpt_jax.commands import report
from tests.monitoring.metrics_log_test import write

PNG = base64.b64decode(
    "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk+M9QDwADhgGAWjR9awAAAABJRU5ErkJggg=="
)
HOSTILE = '"><script src="http://example.com/x.js"></script><img src=//example.com/y.png>'


class Page(html.parser.HTMLParser):
    """Tags, the URLs that they load, and the text."""

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
    rows = [
        {"protocol": "knn", "data": "x", "accuracy": 61.25, "how": {"k": 1}},
        {"protocol": HOSTILE, "data": "x", "k": 20},
    ]
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
    text = report.page(run, log_file=tmp_path / "log")
    page = Page(text)
    images = [base64.b64decode(x.partition(",")[2]) for x in page.loads]
    assert all(re.match(r"data:image/(png|svg\+xml);base64,", x) for x in page.loads)
    assert PNG in images and len(images) == 2
    assert not page.tags & {"script", "link", "iframe", "object", "embed", "base", "svg", "a"}
    assert "url(" not in text and "@import" not in text
    assert any("default-src 'none'" in content for content in page.meta)
    # the SVG of the curves references only its own elements
    svg = next(x for x in images if x != PNG).decode()
    assert all(x.startswith("#") for x in re.findall(r'href="([^"]*)"', svg))
    assert "<script" not in svg and "<image" not in svg
    assert all(x.startswith("#") for x in re.findall(r"url\(([^)]*)\)", svg))


def test_content(run, tmp_path):
    (tmp_path / "log").write_text("process 0: 8 devices")
    text = Page(report.page(run, log_file=tmp_path / "log")).text
    assert "a<b" in text and text.count(HOSTILE) == 2  # as text, in config and results
    assert "step: 4" in text and "config.total: 4 steps" in text
    cells = report.evaluations(report.metrics_log.read(run))
    assert re.findall(r"<td[^>]*>([^<]*)</td>", cells) == [
        "heldout/next", "2", "0.75", "2", "0.75", "2", "nan", "4",
    ]  # fmt: skip
    for expected in (
        "61.25", "shown.png", "2023-11-14 22:13:20 UTC", "somehost", "8 devices",
        "results_bad.json", "run, step 4",
    ):  # fmt: skip
        assert expected in text, expected
    assert '{"k": 1}' not in text
    assert re.search(r"checkpoints of steps\s*4", text)


BROWSERS = ("chromium-headless-shell", "chromium", "chromium-browser", "google-chrome")
BROWSER = next(filter(None, map(shutil.which, BROWSERS)), None)


# Turns off most of the browser's own requests (time, updates, accounts); no version has flags for
# all of them.
QUIET_FLAGS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-sync",
    "--disable-background-networking", "--disable-component-update", "--disable-extensions",
    "--disable-default-apps", "--host-resolver-rules=MAP * ~NOTFOUND",
)  # fmt: skip
BROWSER_ORIGIN = "not an origin"  # initiator of the browser's own requests


def render(page, scratch) -> tuple[np.ndarray, list[str]]:
    """(RGB pixels of a file rendered by Chromium, URLs that the page requests).

    No host name resolves, but Chromium's network log still lists the requests.
    """
    log = f"{page}.net.json"
    flags = [*QUIET_FLAGS, "--hide-scrollbars", "--window-size=1300,2500", f"--log-net-log={log}",
             f"--user-data-dir={scratch / 'user'}", f"--screenshot={page}.png"]  # fmt: skip
    subprocess.run(
        [BROWSER, *flags, f"file://{page}"], check=True, capture_output=True, timeout=120
    )
    with open(log) as file:
        net = json.load(file)
    started = net["constants"]["logEventTypes"]["URL_REQUEST_START_JOB"]
    requests = (event["params"] for event in net["events"] if event["type"] == started)
    urls = [x["url"] for x in requests if "url" in x and x.get("initiator") != BROWSER_ORIGIN]
    return np.asarray(Image.open(f"{page}.png").convert("RGB")), urls


@pytest.mark.skipif(not BROWSER, reason="no Chromium is installed")
def test_rendered_by_a_browser(run, tmp_path):
    """Text, image and curves are visible, and nothing is requested, even with a hostile config."""
    pixels = np.random.default_rng(0).integers(0, 256, (300, 600, 3), np.uint8)
    Image.fromarray(pixels).save(run / "shown.png")
    (tmp_path / "r.html").write_text(report.page(run))
    page, urls = render(tmp_path / "r.html", tmp_path)
    assert urls == []
    assert page.shape == (2500, 1300, 3) and (page.mean(axis=2) < 100).sum() > 5000  # text
    offsets = [m.start() for m in re.finditer(re.escape(pixels[0, :5].tobytes()), page.tobytes())]
    assert len(offsets) == 1  # the image, pixel by pixel
    blue = np.all(
        np.abs(page.astype(int) - (31, 119, 180)) < 12, axis=2
    )  # matplotlib's first line color
    assert blue.sum() > 100


@pytest.mark.skipif(not BROWSER, reason="no Chromium is installed")
def test_requests_are_detected(tmp_path):
    """Every kind of load counts, https too, but none of the browser's own requests."""
    loads = {
        "http://example.com/x.js": '<script src="{}"></script>',
        "http://example.com/y.png": "<img src={}>",
        "https://example.com/z.png": "<img src={}>",
        "https://example.com/a.css": '<link rel="stylesheet" href="{}">',
        "http://example.com/b.png": '<p style="background: url({})">b</p>',
        "http://example.com/c.html": '<iframe src="{}"></iframe>',
    }
    page = tmp_path / "loads.html"
    page.write_text("\n".join(tag.format(url) for url, tag in loads.items()))
    assert sorted(render(page, tmp_path)[1]) == sorted(loads)


def test_minimal_run(tmp_path, monkeypatch, capsys):
    run = write(tmp_path / "run", [{"step": 1, "loss": 1.0}])
    monkeypatch.setattr(sys, "argv", ["report.py", str(run), f"--out={tmp_path / 'r.html'}"])
    report.main()
    text = Page((tmp_path / "r.html").read_text()).text
    assert "no config.json" in text
    assert "next: open" in capsys.readouterr().out
    (run / "config.json").write_text('{"seed"')
    with pytest.raises(SystemExit) as ended:
        cli.run(report.main)
    assert str(run / "config.json") in ended.value.code
