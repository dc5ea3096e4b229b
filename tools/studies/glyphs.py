"""A second set of real images, made on the spot: characters in the fonts that matplotlib brings.

    python tools/glyphs.py FOLDER [--size=64]
    python tools/import_images.py FOLDER --out=GLYPHS

62 classes (0-9, A-Z, a-z), white on black. 16 fonts make the training split, six pictures of each
character, 5,952; five other fonts make the test split, four of each, 1,240. So what is tested is a
style that was never seen. Size and position vary a little, by seed.
"""

import dgpt_jax.starting  # noqa: F401

import shlex
import string
from pathlib import Path

import digits
import numpy as np
from PIL import Image, ImageDraw, ImageFont

from dgpt_jax import cli, outputs

with cli.needs("dgpt_jax[quickstart]"):
    import matplotlib

TEST = (
    "DejaVuSans-Oblique", "DejaVuSansMono-Bold", "DejaVuSerif-Italic", "STIXGeneralItalic", "cmss10"
)  # fmt: skip
TRAIN = (
    "DejaVuSans", "DejaVuSans-Bold", "DejaVuSans-BoldOblique", "DejaVuSansMono",
    "DejaVuSansMono-Oblique", "DejaVuSansMono-BoldOblique", "DejaVuSerif", "DejaVuSerif-Bold",
    "DejaVuSerif-BoldItalic", "STIXGeneral", "STIXGeneralBol", "STIXGeneralBolIta", "cmb10",
    "cmr10", "cmti10", "cmtt10",
)  # fmt: skip
SPLITS = {"train": (TRAIN, 6), "test": (TEST, 4)}
# Names of folders that differ in more than their case, which some file systems ignore.
CLASSES = {
    **{c: f"digit_{c}" for c in string.digits},
    **{c: f"upper_{c}" for c in string.ascii_uppercase},
    **{c: f"lower_{c}" for c in string.ascii_lowercase},
}


def render(character: str, font: str, size: int, rng: np.random.Generator) -> Image.Image:
    """A size×size picture: of 0.6 to 0.72 of it the em, shifted by up to 0.04 either way."""
    path = Path(matplotlib.get_data_path()) / "fonts/ttf" / f"{font}.ttf"
    em = size * rng.uniform(0.6, 0.72)
    x, y = size * (np.array([0.5, 0.7]) + rng.uniform(-0.04, 0.04, 2))
    image = Image.new("L", (size, size))
    drawn = ImageDraw.Draw(image)
    # Centred, on a baseline: only its size tells an O from an o.
    drawn.text((x, y), character, fill=255, font=ImageFont.truetype(path, em), anchor="ms")
    return image


def write_glyphs(folder: Path, size: int = 32, seed: int = 0):
    """Files folder/{train,test}/CLASS/FONT_i.{png,jpg}."""
    rng = np.random.default_rng(seed)
    for split, (fonts, each) in SPLITS.items():
        for font in fonts:
            for character, name in CLASSES.items():
                for i in range(each):
                    path = folder / split / name / f"{font}_{i}"
                    digits.save(render(character, font, size, rng), path, lossless=bool(i % 2))


def main():
    made = cli.parser(__doc__)
    made.add_argument("folder", type=cli.local_path, help="where the pictures go")
    made.add_argument("--size", type=int, default=32, help="height and width in pixels")
    made.add_argument("--seed", type=int, least=0, default=0, help="of sizes and positions")
    args = made.parse_args()
    outputs.directory(args.folder)
    write_glyphs(args.folder, args.size, args.seed)
    print(f"next: python tools/import_images.py {shlex.quote(str(args.folder))} --out=GLYPHS")


if __name__ == "__main__":
    cli.run(main)
