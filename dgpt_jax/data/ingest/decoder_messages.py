"""Lines that libpng, libjpeg, libtiff and OpenCV write to standard error of damaged images: counted
by kind, instead of being shown."""

import contextlib
import json
import os
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator

OURS = re.compile(
    rb"libpng (warning|error): |Corrupt JPEG data|Premature end of JPEG file|Invalid SOS parameters"
    rb"|Inconsistent progression sequence|Unknown Adobe color transform|Warning: unknown JFIF"
    rb"|(\w*TIFF\w*|\w+Decode|JPEG(Lib|\w*Decode)|MissingRequired|tempfile\.tif): "
    rb"|\[ ?(WARN|ERROR):\d+@[\d.]+\] global "
)
END = b"\0end\n"  # no C library writes a NUL
SHOWN = 12  # kinds


@contextlib.contextmanager
def counted() -> Iterator[Counter]:
    """A context: at its end the Counter holds how often each line came, "N" in place of numbers.

    A process of its own reads the process's standard error and passes on at once all that is not of
    a decoder; Python's sys.stderr goes past it. No thread could read it: some decoders write while
    they hold the interpreter's lock.
    """
    found: Counter = Counter()
    before, real = sys.stderr, os.dup(2)
    filter_ = subprocess.Popen(
        [sys.executable, "-I", "-S", __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        start_new_session=True,
    )  # fmt: skip
    with contextlib.ExitStack() as stack:
        stack.callback(os.close, real)
        if _is_descriptor_2(before):
            before.flush()
            sys.stderr = stack.enter_context(
                os.fdopen(os.dup(real), "w", 1, errors="backslashreplace")
            )
            stack.callback(setattr, sys, "stderr", before)
        os.dup2(filter_.stdin.fileno(), 2)
        filter_.stdin.close()
        try:
            yield found
        finally:
            os.write(2, END)
            os.dup2(real, 2)
            found.update(json.loads(filter_.stdout.read()))
            filter_.stdout.close()
            filter_.wait()


def told(found: Counter) -> list[str]:
    """A line about what was counted; none where nothing was."""
    if not found:
        return []
    shown = ", ".join(f"{count} × {line}" for line, count in found.most_common(SHOWN))
    return [f"decoders said of damaged images: {shown}" + ", …" * (len(found) > SHOWN)]


def _is_descriptor_2(stream) -> bool:
    try:
        return stream.fileno() == 2
    except (AttributeError, OSError, ValueError):  # a notebook's, a test's
        return False


def _filter():
    """Counts the lines of standard input until END, and prints the counts."""
    found: Counter = Counter()
    for line in sys.stdin.buffer:
        text = line.removesuffix(END)
        if OURS.match(text):
            kind = re.sub(r"(0x)?\d[\d.:@]*", "N", text.decode("utf-8", "replace").strip())
            found[kind] += 1
        elif text:
            sys.stderr.buffer.write(text)
            sys.stderr.flush()
        if text != line:
            print(json.dumps(found))
            break  # else the process has died


if __name__ == "__main__":
    _filter()
