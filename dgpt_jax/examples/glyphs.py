"""An image set of characters in matplotlib's fonts.

62 classes (0-9, A-Z, a-z), white on black. The training split has 16 fonts and six images of each
character, 5,952; the test split has five other fonts and four of each, 1,240, so it measures
generalization to unseen fonts. Size and position are jittered by seed.
"""

import string
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from dgpt_jax import cli
from dgpt_jax.examples import digits

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
# Directory names that stay distinct on case-insensitive file systems.
CLASSES = {
    **{c: f"digit_{c}" for c in string.digits},
    **{c: f"upper_{c}" for c in string.ascii_uppercase},
    **{c: f"lower_{c}" for c in string.ascii_lowercase},
}


def render(character: str, font: str, size: int, rng: np.random.Generator) -> Image.Image:
    """A size×size image; the em is 0.6 to 0.72 of `size`, the shift up to 0.04 in x and y."""
    with cli.needs("quickstart"):
        import matplotlib

    path = Path(matplotlib.get_data_path()) / "fonts/ttf" / f"{font}.ttf"
    em = size * rng.uniform(0.6, 0.72)
    x, y = size * (np.array([0.5, 0.7]) + rng.uniform(-0.04, 0.04, 2))
    image = Image.new("L", (size, size))
    # Centered on a baseline: O and o differ only in size.
    ImageDraw.Draw(image).text(
        (x, y), character, fill=255, font=ImageFont.truetype(path, em), anchor="ms"
    )
    return image


def write_glyphs(folder: Path, size: int = 32, show: digits.Show = digits.ignore, *, seed: int = 0):
    """Writes folder/{train,test}/CLASS/FONT_i.{png,jpg}."""
    rng, done = np.random.default_rng(seed), 0
    total = sum(len(fonts) * len(CLASSES) * per_font for fonts, per_font in SPLITS.values())
    for split, (fonts, per_font) in SPLITS.items():
        for font in fonts:
            for character, name in CLASSES.items():
                for i in range(per_font):
                    path = folder / split / name / f"{font}_{i}"
                    digits.save(render(character, font, size, rng), path, lossless=bool(i % 2))
                    show(done := done + 1, total)
