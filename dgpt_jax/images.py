"""Folders of images as a TFDS image dataset.

    SRC/*.jpg                      one split, no labels
    SRC/CLASS/*.jpg                one split, labels
    SRC/{train,val,test,…}/CLASS/… a split a folder, with or without class folders

JPEG and PNG bytes are kept as they are, except that EXIF orientation is baked in (training ignores
it) and CMYK becomes RGB; anything else Pillow reads becomes PNG. Unreadable files are reported,
counted and left out.
"""

import io
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

from etils import epath
from PIL import Image, ImageOps, UnidentifiedImageError

from dgpt_jax import records, shards
from dgpt_jax.schema import UserError

EXTENSIONS = {".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm"}
SPLITS = ("train", "val", "valid", "validation", "test")


@dataclass
class Report:
    """What became of the files."""

    examples: dict[str, int] = field(default_factory=dict)
    classes: list[str] = field(default_factory=list)
    broken: list[str] = field(default_factory=list)


def import_folder(
    src, out, *, split: str = "train", shard_size: int = 8192, threads: int = 8, say=print
) -> Report:
    """Writes the images below `src` as an image dataset `out`. Raises UserError."""
    src, out = Path(src), epath.Path(out)
    if not src.is_dir():
        raise UserError(f"no such directory: {src}")
    if (out / "dataset_info.json").exists():
        raise UserError(f"{out} already holds a dataset: choose another --out")
    folders = {p.name: p for p in sorted(src.iterdir()) if p.is_dir() and p.name in SPLITS}
    roots = folders or {split: src}
    classes = sorted({name for root in roots.values() for name in _classes(root)})
    report = Report(classes=classes)
    features = records.image_features(classes)
    out.mkdir(parents=True, exist_ok=True)
    written: dict[str, list[shards.Receipt]] = {}
    with ThreadPoolExecutor(threads) as pool:
        for name, root in roots.items():
            files = sorted(p for p in root.rglob("*") if p.suffix.lower() in EXTENSIONS)
            if not files:
                raise UserError(
                    f"{root} holds no images ({', '.join(sorted(EXTENSIONS))}), also not in its "
                    f"subdirectories"
                )
            count = -(-len(files) // shard_size)
            written[name] = []
            for shard in range(count):
                part = files[shard * shard_size : (shard + 1) * shard_size]
                examples = _examples(part, root, src, classes, pool.map, report)
                path = records.shard_path(out, name, shard, count)
                serialized = map(records.serializer(features), examples)
                written[name].append(shards.write(path, serialized))
                done = min((shard + 1) * shard_size, len(files))
                say(f"{name}: {done}/{len(files)} files, {len(report.broken)} unreadable so far")
            report.examples[name] = sum(receipt.records for receipt in written[name])
            if not report.examples[name]:
                raise UserError(f"none of the {len(files)} images below {root} could be read")
    records.write_metadata(out, features, written)
    return report


def _classes(root: Path) -> list[str]:
    """Names of the class folders; none where images lie in `root` itself."""
    if any(p.suffix.lower() in EXTENSIONS for p in root.iterdir() if p.is_file()):
        return []
    return [p.name for p in root.iterdir() if p.is_dir()]


def _examples(files, root, src, classes, parallel: Callable, report: Report) -> Iterator[dict]:
    for file, data in zip(files, parallel(_readable, files), strict=True):
        if isinstance(data, str):
            report.broken.append(f"{file}: {data}")
            continue
        example = {"id": file.relative_to(src).as_posix(), "image": data}
        if classes:
            example["label"] = file.relative_to(root).parts[0]
        yield example


def _readable(file: Path) -> bytes | str:
    """The bytes to store, or why there are none."""
    try:
        data = file.read_bytes()
        with Image.open(io.BytesIO(data)) as image:
            image.load()  # whole, so that a truncated file is found here
            upright = image.getexif().get(0x0112, 1) == 1
            if upright and image.format in ("JPEG", "PNG") and image.mode != "CMYK":
                return data
            lossy = image.format == "JPEG"
            image = ImageOps.exif_transpose(image).convert("RGB")
            buffer = io.BytesIO()
            if lossy:
                image.save(buffer, "JPEG", quality=95, subsampling=0)
            else:
                image.save(buffer, "PNG")
            return buffer.getvalue()
    except (OSError, ValueError, SyntaxError, UnidentifiedImageError) as e:
        return f"{type(e).__name__}: {e}"
    except Image.DecompressionBombError as e:
        return f"too large: {e}"
