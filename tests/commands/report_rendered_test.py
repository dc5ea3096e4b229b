"""The HTML report of a run, rendered by Chromium: visible, dark if asked for, without requests."""

import json
import re
import shutil
import subprocess

import numpy as np
import pytest
from PIL import Image

from dgpt_jax.commands import report
from tests.commands.report_test import run  # noqa: F401  # a fixture

BROWSERS = ("chromium-headless-shell", "chromium", "chromium-browser", "google-chrome")
BROWSER = next(filter(None, map(shutil.which, BROWSERS)), None)
pytestmark = pytest.mark.skipif(not BROWSER, reason="no Chromium is installed")


# Turns off most of the browser's own requests (time, updates, accounts); no version has flags for
# all of them.
QUIET_FLAGS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-sync",
    "--disable-background-networking", "--disable-component-update", "--disable-extensions",
    "--disable-default-apps", "--host-resolver-rules=MAP * ~NOTFOUND",
)  # fmt: skip
BROWSER_ORIGIN = "not an origin"  # initiator of the browser's own requests


def render(page, scratch, *more) -> tuple[np.ndarray, list[str]]:
    """(RGB pixels of a file rendered by Chromium, URLs that the page requests).

    No host name resolves, but Chromium's network log still lists the requests.
    """
    log = f"{page}.net.json"
    flags = [*QUIET_FLAGS, *more, "--hide-scrollbars", "--window-size=1300,2500",
             f"--log-net-log={log}", f"--user-data-dir={scratch / 'user'}",
             f"--screenshot={page}.png"]  # fmt: skip
    subprocess.run(
        [BROWSER, *flags, f"file://{page}"], check=True, capture_output=True, timeout=120
    )
    with open(log) as file:
        net = json.load(file)
    started = net["constants"]["logEventTypes"]["URL_REQUEST_START_JOB"]
    requests = (event["params"] for event in net["events"] if event["type"] == started)
    urls = [x["url"] for x in requests if "url" in x and x.get("initiator") != BROWSER_ORIGIN]
    return np.asarray(Image.open(f"{page}.png").convert("RGB")), urls


def test_rendered_by_a_browser(run, tmp_path):  # noqa: F811
    """Text, image and curves are visible, and nothing is requested, even with a hostile config."""
    pixels = np.random.default_rng(0).integers(0, 256, (300, 600, 3), np.uint8)
    Image.fromarray(pixels).save(run / "shown.png")
    (tmp_path / "r.html").write_text(report.page(run))
    page, urls = render(tmp_path / "r.html", tmp_path)
    assert urls == []
    assert page.shape == (2500, 1300, 3) and (page.mean(axis=2) < 100).sum() > 5000  # text
    offsets = [m.start() for m in re.finditer(re.escape(pixels[0, :5].tobytes()), page.tobytes())]
    assert len(offsets) == 1  # the image, pixel by pixel
    blue = np.all(np.abs(page.astype(int) - (9, 105, 218)) < 12, axis=2)  # the first line's color
    assert blue.sum() > 100


def test_dark_pages_have_dark_curves(run, tmp_path):  # noqa: F811
    """Page and SVGs follow the reader's color scheme."""
    (tmp_path / "r.html").write_text(report.page(run))
    dark = "--blink-settings=preferredColorScheme=0"
    pixels, _ = render(tmp_path / "r.html", tmp_path, dark)
    light, _ = render(tmp_path / "r.html", tmp_path)
    assert (light.mean(axis=2) > 200).mean() > 0.9 and (pixels.mean(axis=2) < 60).mean() > 0.9
    line = np.all(np.abs(pixels.astype(int) - (88, 166, 255)) < 12, axis=2)
    assert line.sum() > 100


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
