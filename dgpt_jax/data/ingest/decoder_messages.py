"""Counts what libpng, libjpeg, libtiff and OpenCV print to standard error about damaged images."""

import contextlib
import json
import os
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from typing import TextIO

DECODERS = re.compile(
    rb"libpng (warning|error): |Corrupt JPEG data|Premature end of JPEG file|Invalid SOS parameters"
    rb"|Inconsistent progression sequence|Unknown Adobe color transform|Warning: unknown JFIF"
    rb"|(\w*TIFF\w*|\w+Decode|JPEG(Lib|\w*Decode)|MissingRequired|tempfile\.tif): "
    rb"|\[ ?(WARN|ERROR):\d+@[\d.]+\] global "
)
END = b"\0end\n"  # no C library writes a NUL
MAX_SHOWN = 12  # kinds of messages


@contextlib.contextmanager
def count_messages() -> Iterator[Counter]:
    """Context that yields a Counter; on exit it holds the count of each line, numbers replaced by
    "N".

    A subprocess reads this process's standard error and forwards all other lines at once; Python's
    sys.stderr bypasses it. A thread would deadlock: some decoders write while holding the GIL.
    """
    counts: Counter = Counter()
    previous, real = sys.stderr, os.dup(2)
    filter_ = subprocess.Popen(
        [sys.executable, "-I", "-S", __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        start_new_session=True,
    )  # fmt: skip
    assert filter_.stdin and filter_.stdout
    with contextlib.ExitStack() as stack:
        stack.callback(os.close, real)
        if _is_descriptor_2(previous):
            previous.flush()
            sys.stderr = stack.enter_context(
                os.fdopen(os.dup(real), "w", 1, errors="backslashreplace")
            )
            stack.callback(setattr, sys, "stderr", previous)
        os.dup2(filter_.stdin.fileno(), 2)
        filter_.stdin.close()
        try:
            yield counts
        finally:
            os.write(2, END)
            os.dup2(real, 2)
            counts.update(json.loads(filter_.stdout.read()))
            filter_.stdout.close()
            filter_.wait()


def summary(counts: Counter) -> list[str]:
    """Returns one line about the counted messages; no line if there are none."""
    if not counts:
        return []
    shown = ", ".join(f"{count} × {line}" for line, count in counts.most_common(MAX_SHOWN))
    return [f"decoder messages about damaged images: {shown}" + ", …" * (len(counts) > MAX_SHOWN)]


def _is_descriptor_2(stream: TextIO) -> bool:
    try:
        return stream.fileno() == 2
    except (AttributeError, OSError, ValueError):  # in notebooks and tests
        return False


def _filter():
    """Counts the lines of standard input until END, and prints the counts."""
    counts: Counter = Counter()
    for line in sys.stdin.buffer:
        text = line.removesuffix(END)
        if DECODERS.match(text):
            kind = re.sub(r"(0x)?\d[\d.:@]*", "N", text.decode("utf-8", "replace").strip())
            counts[kind] += 1
        elif text:
            sys.stderr.buffer.write(text)
            sys.stderr.flush()
        if text != line:
            print(json.dumps(counts))
            break  # without END, the process has died


if __name__ == "__main__":
    _filter()
