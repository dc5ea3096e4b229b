"""What decoders of C write to standard error during an import is counted, and nothing else."""

import io
import os
import sys
import time

import numpy as np
import pytest
from PIL import Image

from dgpt_jax import decoder_lines
from tests import processes
from tests.data import smooth_image

PICTURE = Image.fromarray(smooth_image(np.random.default_rng(0), 40, 60))


def saved(form: str, image=PICTURE, **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, form, **options)
    return buffer.getvalue()


def changed(data: bytes, place: int, new: bytes) -> bytes:
    return data[:place] + new + data[place + len(new) :]


JPEG, PNG = saved("JPEG", quality=95), saved("PNG")
DAMAGED = {  # file: its bytes, and a part of what is counted
    "a.jpg": (JPEG[:-2] + bytes(5) + JPEG[-2:], "× Corrupt JPEG data"),
    "b.png": (changed(PNG, PNG.index(b"IEND") - 6, b"\0\0"), "libpng "),
    "c.tif": (
        changed(saved("TIFF", compression="tiff_adobe_deflate"), 200, b"\xff" * 9), "× ZIPDecode: "
    ),
    "d.tif": (
        changed(saved("TIFF", PICTURE.convert("1"), compression="group4"), 20, b"\0\1\2\3"),
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
    (line,) = [x for x in output.splitlines() if x.startswith("decoders said of damaged images: ")]
    assert expected in line
    others = output.replace(line, "")
    assert not decoder_lines.OURS.search(others.encode()), others


IN_CONTEXT = """
import logging, os, sys, threading
from dgpt_jax import decoder_lines
with decoder_lines.counted() as found:
    {}
print(decoder_lines.told(found))
"""


@pytest.mark.parametrize(
    "inside,code,shown",
    [
        ("os.write(2, b'libpng warning: x 12\\n' * 5)", 0, "['decoders said of damaged images: 5 "),
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
def test_all_else_is_shown(inside, code, shown):
    process = processes.start(["-c", IN_CONTEXT.format(inside)])
    (output,) = processes.outputs_of([process], timeout=60)
    assert process.returncode == code and shown in output, output
    assert "BrokenPipe" not in output


def test_standard_error_is_the_same_afterwards(capfd):
    before = sys.stderr
    with decoder_lines.counted() as found:
        os.write(2, b"libpng warning: x\n")
    os.write(2, b"libpng warning: y\n")
    time.sleep(0.1)
    assert sys.stderr is before and found == {"libpng warning: x": 1}
    assert capfd.readouterr().err == "libpng warning: y\n"
