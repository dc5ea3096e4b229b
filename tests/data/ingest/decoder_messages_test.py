"""Messages of C decoders on standard error during an import are counted, others are shown."""

import io
import os
import sys
import time

import numpy as np
import pytest
from PIL import Image

from dgpt_jax.data.ingest import decoder_messages
from tests.support import processes
from tests.support.data import smooth_image

IMAGE = Image.fromarray(smooth_image(np.random.default_rng(0), 40, 60))


def saved(form: str, image=IMAGE, **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, form, **options)
    return buffer.getvalue()


def changed(data: bytes, offset: int, new: bytes) -> bytes:
    return data[:offset] + new + data[offset + len(new) :]


JPEG, PNG = saved("JPEG", quality=95), saved("PNG")
DAMAGED = {  # file: its bytes, and part of the counted message
    "a.jpg": (JPEG[:-2] + bytes(5) + JPEG[-2:], "× Corrupt JPEG data"),
    "b.png": (changed(PNG, PNG.index(b"IEND") - 6, b"\0\0"), "libpng "),
    "c.tif": (
        changed(saved("TIFF", compression="tiff_adobe_deflate"), 200, b"\xff" * 9), "× ZIPDecode: "
    ),
    "d.tif": (
        changed(saved("TIFF", IMAGE.convert("1"), compression="group4"), 20, b"\0\1\2\3"),
        "× FaxNDecode: ",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", DAMAGED)
def test_an_import_of_damaged_images(tmp_path, name):
    (tmp_path / "src").mkdir()
    data, expected = DAMAGED[name]
    for i in range(3):
        (tmp_path / f"src/{i}{name}").write_bytes(data)
    (tmp_path / "src/good.png").write_bytes(PNG)
    words = ["tools/import_images.py", tmp_path / "src", f"--out={tmp_path / 'out'}"]
    (output,) = processes.outputs_of([process := processes.start(words)], timeout=120)
    assert process.returncode == 0, output
    (line,) = [
        x for x in output.splitlines() if x.startswith("decoder messages about damaged images: ")
    ]
    assert expected in line
    others = output.replace(line, "")
    assert not decoder_messages.DECODERS.search(others.encode()), others


IN_CONTEXT = """
import logging, os, sys, threading
from dgpt_jax.data.ingest import decoder_messages as decoder_lines
with decoder_lines.count_messages() as counts:
    {}
print(decoder_lines.summary(counts))
"""


@pytest.mark.parametrize(
    "statement,code,expected",
    [
        ("os.write(2, b'libpng warning: x 12\\n' * 5)", 0, "damaged images: 5 "),
        ("os.write(2, b'libpng warning: x\\n' * 200_000)", 0, "200000 × libpng warning: x"),
        ("os.write(2, b'Fatal Python error\\n')", 0, "Fatal Python error\n[]\n"),
        ("os.write(2, b'no end of a line')", 0, "no end of a line"),
        ("print('Python', file=sys.stderr)", 0, "Python\n[]\n"),
        ("1 / 0", 1, "ZeroDivisionError: division by zero\n"),
        ("threading.Thread(target=lambda: 1 / 0).start()", 0, "ZeroDivisionError: division"),
        ("logging.warning('logged')", 0, "WARNING:root:logged\n"),
        ("os.write(2, b'before\\n'); os.kill(os.getpid(), 9)", -9, "before\n"),
        ("os.write(2, b'terminate called'); os.abort()", -6, "terminate called"),
        ("import faulthandler; faulthandler.enable(); os.abort()", -6, "Fatal Python error: Abort"),
    ],
)
def test_other_messages_are_shown(statement, code, expected):
    process = processes.start(["-c", IN_CONTEXT.format(statement)])
    (output,) = processes.outputs_of([process], timeout=60)
    assert process.returncode == code and expected in output, output
    assert "BrokenPipe" not in output


def test_standard_error_is_restored(capfd):
    stderr = sys.stderr
    with decoder_messages.count_messages() as counts:
        os.write(2, b"libpng warning: x\n")
    os.write(2, b"libpng warning: y\n")
    time.sleep(0.1)
    assert sys.stderr is stderr and counts == {"libpng warning: x": 1}
    assert capfd.readouterr().err == "libpng warning: y\n"
