"""The small image sets by name, and how a teacher and a store are made for each.

python -m dgpt_jax.examples.image_sets FOLDER --images=scenes [--size=32]
python tools/import_images.py FOLDER --out=SCENES
"""

import dgpt_jax.distributed.early_signals  # noqa: F401

import shlex
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from dgpt_jax import cli, invocation
from dgpt_jax.examples import digits, glyphs, scenes
from dgpt_jax.monitoring import progress
from dgpt_jax.storage import output_paths


@dataclass(frozen=True)
class TeacherRecipe:
    """steps: of 64 images. augmentation: shifts by a few pixels, or crops of half to all of the
    area. patch_loss: the classes are also predicted from the mean of the patch tokens."""

    steps: int
    augmentation: Literal["shift", "crop"]
    patch_loss: bool


@dataclass(frozen=True)
class ImageSet:
    """write: write(folder, size, show) writes folder/{train,test}/CLASS/… with files of size×size
    pixels. crop_scale, views:
    of the token store, and the crops of live views. labelled: end of the names of the training
    files whose labels are used to measure features."""

    write: Callable
    teacher: TeacherRecipe
    crop_scale: tuple[float, float]
    views: int
    labelled: str = ""


_CROPS = TeacherRecipe(600, "crop", patch_loss=False)
SETS = {
    "scenes": ImageSet(
        scenes.write_scenes,
        TeacherRecipe(1500, "shift", patch_loss=True),
        crop_scale=(0.8, 1.0),
        views=2,
        labelled="_0",
    ),
    "digits": ImageSet(digits.write_digits, _CROPS, crop_scale=(0.5, 1.0), views=4),
    "glyphs": ImageSet(glyphs.write_glyphs, _CROPS, crop_scale=(0.5, 1.0), views=4),
}


def create_once(path: Path, write: Callable[[Path], None]):
    """Creates the directory `path` atomically by `write(temporary path)`, unless it exists."""
    if not path.exists():
        temporary = path.with_name(f"{path.name}.part")
        shutil.rmtree(temporary, ignore_errors=True)
        write(temporary)
        temporary.rename(path)


def main():
    parser = cli.parser(__doc__)
    parser.add_argument("folder", type=cli.local_path, help="output directory")
    parser.add_argument("--images", required=True, choices=SETS, help="image set")
    parser.add_argument("--size", type=int, least=16, default=32, help="height and width in pixels")
    args = parser.parse_args()
    output_paths.directory(args.folder)
    bar = progress.Progress("file", interval=1.0)

    def show(done: int, total: int):
        if bar.is_due() or done == total:
            bar.show(done, total, "written")

    SETS[args.images].write(args.folder, args.size, show)
    bar.close()
    folder = shlex.quote(str(args.folder))
    print(f"next: {invocation.command('import')} {folder} --out=IMAGES")


if __name__ == "__main__":
    cli.run(main)
