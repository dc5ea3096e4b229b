"""Photographs cut from images that ship inside packages."""

from pathlib import Path

import numpy as np
from PIL import Image


def sources() -> list[Path]:
    """Returns the files of photographs in installed packages."""
    import matplotlib
    import sklearn

    folder = Path(sklearn.__file__).parent / "datasets/images"
    files = [folder / "china.jpg", folder / "flower.jpg"]
    return [*files, Path(matplotlib.get_data_path()) / "sample_data/grace_hopper.jpg"]


def write(root: Path, count: int, *, classes: bool = False):
    """Writes JPEG files `root/[SOURCE/]i.jpg` of random square regions, 96 pixels or more."""
    rng, files = np.random.default_rng(0), sources()
    images = [np.asarray(Image.open(file).convert("RGB")) for file in files]
    for i in range(count):
        image, file = images[i % len(files)], files[i % len(files)]
        height, width = image.shape[:2]
        side = int(rng.integers(96, min(height, width)))
        y, x = rng.integers(height - side + 1), rng.integers(width - side + 1)
        folder = root / file.stem if classes else root
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image[y : y + side, x : x + side]).save(folder / f"{i:04d}.jpg", quality=92)
