"""Content of the HTML report of a run, which loads nothing from outside."""

import base64
import html.parser
import io
import json
import re
import sys

import numpy as np
import pytest
from etils import epath
from PIL import Image

from dgpt_jax import cli
from dgpt_jax.commands import report, report_sections
from dgpt_jax.evals import html_results, results
from dgpt_jax.monitoring import logged_images, metrics, run_summary
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
        json.dumps(
            {"total": "4 steps", "platform": "cpu", "batch_size": 4096, "data": {"path": HOSTILE}}
        )
    )
    (run / "shown.png").write_bytes(PNG)
    rows = [
        {"protocol": "knn", "data": "x", "accuracy": 61.25, "low": 55.0, "high": 67.0,
         "how": {"k": 1}},
        {"protocol": HOSTILE, "data": "x", "k": 20},
    ]  # fmt: skip
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
    svgs = [x.decode() for x in images if x != PNG]
    assert len(images) - len(svgs) == 1 and len(svgs) == 3  # loss, heldout/next, learning_rate
    assert not page.tags & {"script", "link", "iframe", "object", "embed", "base", "svg", "a"}
    assert "url(" not in text and "@import" not in text
    assert any("default-src 'none'" in content for content in page.meta)
    for svg in svgs:  # references only its own elements
        assert all(x.startswith("#") for x in re.findall(r'href="([^"]*)"', svg))
        assert "<script" not in svg and "<image" not in svg
        assert all(x.startswith("#") for x in re.findall(r"url\(([^)]*)\)", svg))


def test_content(run, tmp_path):
    (tmp_path / "log").write_text("process 0: 8 devices")
    page = report.page(run, log_file=tmp_path / "log")
    text = Page(page).text
    assert "a<b" in text and text.count(HOSTILE) == 3  # as text: in subtitle, config and results
    cells = report_sections.evaluations(run_summary.read(run))
    assert cells_of(cells) == ["heldout/next", "2", "0.75", "2", "nan", "4"]
    for expected in (
        "finished 4 steps", "61.2\u00a0%", "55.0–67.0", "shown.png", "2023-11-14 22:13:20 UTC",
        "somehost", "8 devices", "results_bad.json", "run, step 4",
    ):  # fmt: skip
        assert expected in text, expected
    assert '{"k": 1}' not in text
    assert "4 keys, 3 differ" in text  # platform, total and data.path, but not batch_size


def cells_of(text) -> list[str]:
    return re.findall(r"<td[^>]*>([^<]*)</td>", text)


def test_units_of_evaluations(tmp_path):
    """Shares are in percent, effective ranks and losses are not."""
    rows = [{"step": 4, "loss": 1.0, "learning_rate": 0.1}]
    rows += [{"step": 4, "agreement/cls": 0.25, "rank/cls": 17.5, "heldout/next": 1.25}]
    write(tmp_path / "run", rows)
    text = Page(report.page(tmp_path / "run")).text
    for value in ("25.0\u00a0%", "17.5", "1.25"):
        assert value in text
    assert "1750.0" not in text


def test_published_numbers_are_beside_complete_results(run):
    """Only rows of all 50,000 images of ImageNet-1K are compared with published ones."""
    model = {"width": 768, "depth": 12, "heads": 12, "patch": 16}
    identity = {"protocol": "knn", "data": "imagenet2012", "k": 20, "shots": "all"}
    rows = [
        results.row(identity | {"features": "cls"}, 38_000, 50_000, selection="none", how={}),
        results.row(identity | {"features": "mean"}, 390, 500, selection="none", how={}),
        {"protocol": "knn", "data": "x", "accuracy": 3.0, "head": "a", "detail": True},
    ]
    results.merge(run / "results_step4.json", "run, step 4", model, rows)
    text = html_results.section(run)
    assert text.index("run, step 4 (B/16), cls") < text.index("DINOv2-B, LVD-142M")
    marked = re.search(r'<tr class="mark">(.*?)</tr>', text)
    assert cells_of(marked[1])[:2] == ["run, step 4 (B/16), cls", "76.0 [75.6, 76.4]"]
    assert text.count('class="mark"') == 1 and "Robustness" not in text
    columns = re.findall(r"<th>([^<]*)</th>", text)
    assert columns[:7] == [
        "protocol",
        "data",
        "features",
        "k",
        "shots",
        "accuracy",
        "95 % interval",
    ]
    assert "1 detailed rows" in text.partition("<details>")[2]


def test_comparison(run, tmp_path):
    """Curves on the same axes, key numbers side by side, differences of configs and logs."""
    other = write(tmp_path / "other", [{"step": s, "loss": 2.0 - s} for s in (1, 2)])
    (other / "config.json").write_text(
        '{"total": "8 steps", "batch_size": 4096, "platform": "cpu"}'
    )
    page = report.page(run, [other])
    text = Page(page).text
    sections = dict(re.findall(r"<h2>([^<]*)</h2>\n(.*?)</section>", page, re.DOTALL))
    cells = cells_of(sections["Comparison"])
    rows = [cells[i : i + 3] for i in range(0, len(cells), 3)]
    assert ["status", "finished 4 steps", "stopped at step 2 of 8"] in rows
    assert ["total", "4 steps", "8 steps"] in rows and "platform" not in cells
    differs = cells.index("loss", cells.index("total"))
    assert cells[differs : differs + 7] == ["loss", "2", "1", "2", "1", "1", "1"]
    assert "a<b" in text and "other" in text
    images = re.findall(r'base64,([^"]*)"', sections["Curves"])
    loss = base64.b64decode(images[0]).decode()
    for i in range(2):  # a line for each run
        assert f"stroke: var(--c{i})" in loss
    assert "(prefers-color-scheme: dark)" in loss


def test_images_of_tensorboard(tmp_path):
    """The last image of each name; files may be truncated, or too large to scan."""
    run = tmp_path / "run"
    writer = metrics.Writer(run)
    for step in (1, 2):
        writer.scalars(step, {"loss": 1.0})
        image = np.full((8, 8, 3), step, np.uint8)
        writer.images(step, lambda image=image: {"predictions": image, "crops": image})
    writer.close()
    (file,) = (run / "tensorboard").iterdir()
    images, skipped = logged_images.latest(epath.Path(run))
    assert {name: step for name, (step, _) in images.items()} == {"predictions": 2, "crops": 2}
    assert (np.asarray(Image.open(io.BytesIO(images["crops"][1]))) == 2).all() and not skipped
    content = file.read_bytes()
    file.write_bytes(content[: content.rindex(b"\x89PNG") + 20])
    assert logged_images.latest(epath.Path(run))[0]["crops"][0] == 1
    with file.open("ab") as stream:
        stream.truncate(logged_images.MAX_FILE_BYTES + 1)
    assert logged_images.latest(epath.Path(run)) == ({}, [file.name])
    assert f"{file.name} is too large" in report.page(run)


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


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["a.json", "b.json"], "python tools/results.py a.json"),
        (["results of x.json"], "python tools/results.py 'results of x.json'"),
        (["no_run", "--out=x.html"], "no_run has no metrics.jsonl"),
        (["RUN", "--with", "no_run", "--out=x.html"], "no_run has no metrics.jsonl"),
    ],
)
def test_refused(words, expected, tmp_path, monkeypatch):
    run = write(tmp_path / "run", [{"step": 1, "loss": 1.0}])
    monkeypatch.chdir(tmp_path)
    words = [str(run) if word == "RUN" else word for word in words]
    monkeypatch.setattr(sys, "argv", ["report.py", *words])
    with pytest.raises(SystemExit) as ended:
        cli.run(report.main)
    assert expected in ended.value.code and "\n" not in ended.value.code
