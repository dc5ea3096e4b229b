"""Images for a figure: which files there are, an even choice of them, their pixels and labels."""

import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from dgpt_jax import cli
from dgpt_jax.data import image_ops
from dgpt_jax.data.ingest import directory_walk, user_images
from dgpt_jax.data.ingest.image_index import OWN_FILE, ImageEntry, text
from dgpt_jax.errors import UserError


def list_images(paths: Sequence[str]) -> list[ImageEntry]:
    """Image files of these paths; directories are searched at any depth and sorted. Prints what an
    import would skip. Raises UserError on a directory without images."""
    images = []
    for path in map(os.fsencode, paths):
        walk = directory_walk.Walk()
        if not os.path.exists(path):
            raise UserError(f"no such file or directory: {text(path)}")
        if not os.path.isdir(path):
            if not os.path.isfile(path):
                raise UserError(f"{text(path)} is not a regular file")
            images.append(ImageEntry(text(path), path, OWN_FILE, -1, -1))
            continue
        walk.add_folder(path)
        entries = walk.builder.build().sorted()
        lines = walk.skipped.lines()
        if not len(entries):
            extensions = ", ".join(user_images.EXTENSIONS)
            raise UserError("; ".join([f"{text(path)} holds no images ({extensions})", *lines]))
        for line in lines:
            cli.say(f"{text(path)}: {line}")
        images += [replace(e, id=os.path.join(text(path), e.id)) for e in entries]
    return images


def spread(items: Sequence, count: int, flag: str = "--count") -> list:
    """`count` evenly spaced items, since adjacent ones may share a class; prints a note."""
    if len(items) > count:
        print(f"{count} of {len(items)} images, evenly spaced; {flag}=N changes the number")
    count = min(count, len(items))
    return [items[i * len(items) // count] for i in range(count)]


def read_images(entries: Sequence[ImageEntry], size: int) -> np.ndarray:
    """Central size×size pixels of images, decoded as by an import, (B, size, size, 3).
    Raises UserError."""
    images = []
    for entry in entries:
        try:
            image = user_images.rgb(entry.read())
        except (OSError, ValueError) as e:
            raise UserError(f"{entry.id}: {e}") from None
        images.append(image_ops.center_crop(image, size, size, squash=False))
    return np.stack(images)


def label(entry: ImageEntry) -> str:
    """Directory and name of an image, shortened to fit above it."""
    name = "/".join(Path(entry.id).with_suffix("").parts[-2:])
    return name if len(name) <= 18 else f"{name[:10]}…{name[-7:]}"
