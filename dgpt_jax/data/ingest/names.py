"""File names: images, archives, hidden and system folders."""

from dgpt_jax.data.ingest.image_index import text
from dgpt_jax.data.ingest.user_images import EXTENSIONS

# Folders of operating systems, file servers and programs, besides those that begin with a dot.
SYSTEM = (
    b"__MACOSX", b"__pycache__", b"@eaDir", b"@Recycle", b"@Recently-Snapshot", b"@tmp",
    b"#recycle", b"#snapshot", b"$RECYCLE.BIN", b"System Volume Information", b"lost+found",
)  # fmt: skip


def is_image(name: bytes) -> bool:
    """True for the extension of an image; "._x.jpg" is macOS metadata of x.jpg."""
    return not name.startswith(b"._") and text(name[-6:]).lower().endswith(EXTENSIONS)


def is_hidden(folder: bytes) -> bool:
    """True for names of system folders, which are not meant for images."""
    return folder in SYSTEM or (folder.startswith(b".") and folder not in (b".", b".."))


def hidden_above(folder: bytes) -> bytes:
    """Returns the first hidden folder in a path, with its parents; b"" if there is none."""
    names = folder.split(b"/")
    for i, name in enumerate(names):
        if is_hidden(name):
            return b"/".join(names[: i + 1])
    return b""
