"""The notebook runs from start to end and shows its figures."""

import base64
import io
import re

import numpy as np
import pytest
from PIL import Image

from tests.support.paths import GOLDEN, ROOT

NOTEBOOK = ROOT / "docs/encoder.ipynb"


@pytest.mark.slow
def test_the_notebook(monkeypatch):
    pytest.importorskip("ipykernel", reason="the extra notebook is not installed")
    nbclient = pytest.importorskip("nbclient", reason="the extra notebook is not installed")
    import nbformat

    monkeypatch.setenv("ENCODER", str(GOLDEN / "hf_vit_tiny"))
    monkeypatch.setenv("PYTHONPATH", str(ROOT), prepend=":")
    book = nbformat.read(NOTEBOOK, as_version=4)
    for cell in book.cells:
        cell.pop("outputs", None)
    resources = {"metadata": {"path": str(NOTEBOOK.parent)}}
    client = nbclient.NotebookClient(book, timeout=300, kernel_name="python3", resources=resources)
    client.execute()
    outputs = [o for cell in book.cells for o in cell.get("outputs", ())]
    text = "".join(
        o.get("text", "") + str(o.get("data", {}).get("text/plain", "")) for o in outputs
    )
    assert re.search(r"the nearest one is the same digit for \d+% of 300", text) and "(300," in text
    figures = [o["data"]["image/png"] for o in outputs if "image/png" in o.get("data", {})]
    assert len(figures) == 3
    for figure in figures:
        pixels = np.asarray(Image.open(io.BytesIO(base64.b64decode(figure))).convert("RGB"))
        assert len(np.unique(pixels.reshape(-1, 3), axis=0)) > 30


def test_the_committed_notebook():
    """Its cells were run in order without errors, and it is small."""
    import json

    book = json.loads(NOTEBOOK.read_text())
    code = [cell for cell in book["cells"] if cell["cell_type"] == "code"]
    assert [cell["execution_count"] for cell in code] == list(range(1, len(code) + 1))
    kinds = [output["output_type"] for cell in code for output in cell["outputs"]]
    assert "error" not in kinds and NOTEBOOK.stat().st_size < 400_000
    assert not re.search(r"[\" ]/[a-z]+/[a-z]+/", json.dumps([cell["outputs"] for cell in code]))
