"""Image, label and text columns of parquet files, and the class names that belong to them.

Hugging Face writes its features as JSON into the schema's metadata; older datasets have them in the
README.md or dataset_infos.json beside the files.
"""

import json
import posixpath
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import yaml

from dgpt_jax.data.ingest.image_index import text
from dgpt_jax.data.ingest.types import Columns
from dgpt_jax.errors import UserError, one_line
from dgpt_jax.storage import byte_ranges

LABEL_NAMES = ("label", "labels")


@dataclass(frozen=True)
class ParquetColumns:
    """Columns to read. has_path: the image is a struct of bytes and path, rather than bytes.

    label: None if there is none. keep: stored as text. names: of the classes; () if unknown.
    """

    image: str
    has_path: bool
    label: str | None
    keep: tuple[str, ...]
    names: tuple[str, ...]

    @property
    def of_index(self) -> list[str]:
        """Columns without the images' bytes."""
        path = [f"{self.image}.path"] if self.has_path else []
        return path + ([self.label] if self.label else [])

    @property
    def of_images(self) -> list[str]:
        """Columns with the images' bytes, but not the labels."""
        image = [f"{self.image}.bytes", f"{self.image}.path"] if self.has_path else [self.image]
        return image + list(self.keep)

    @property
    def image_bytes(self) -> str:
        """Path of the column of the images' bytes."""
        return f"{self.image}.bytes" if self.has_path else self.image


def choose(schema: Any, file: bytes, root: bytes, columns: Columns) -> ParquetColumns:
    """Returns the columns of a pyarrow schema that `columns` asks for. Raises UserError."""
    kinds = {name: str(schema.field(name).type) for name in schema.names}
    features = _features(schema, file, root)
    image = columns.image or _only_image(kinds, features, file)
    _require(kinds, image, "image_column", file)
    if not _is_image(kinds[image]):
        raise UserError(
            f"{text(file)}: column {image!r} ({kinds[image]}) is no image: it must be binary, or "
            f"a struct of bytes and path"
        )
    label = _only_label(kinds, features, file) if columns.label is None else columns.label or None
    if label is not None:
        _require(kinds, label, "label_column", file)
        if "int" not in kinds[label] and "string" not in kinds[label]:
            raise UserError(
                f"{text(file)}: label column {label!r} ({kinds[label]}) is neither integers nor "
                f"strings: choose another --label_column, or none (--label_column=)"
            )
    for name in columns.keep:
        _require(kinds, name, "keep", file)
    names = _class_names(features.get(label)) if label else ()
    has_path = kinds[image].startswith("struct")
    return ParquetColumns(image, has_path, label, columns.keep, names)


def _require(kinds: dict[str, str], name: str, flag: str, file: bytes):
    if name not in kinds:
        raise UserError(f"--{flag}={name}: {text(file)} has only the columns {', '.join(kinds)}")


def _is_image(kind: str) -> bool:
    """True for binary, and for structs of bytes (binary) and path (string)."""
    is_struct = kind.startswith("struct<") and "bytes: " in kind and "path: " in kind
    return "binary" in kind and (is_struct or not kind.startswith(("struct", "list", "map")))


def _only_image(kinds: dict[str, str], features: dict, file: bytes) -> str:
    """Returns the only image column: by the features, else by the types."""
    images = [name for name in kinds if _kind(features.get(name)) == "Image"]
    images = images or [name for name in kinds if _is_image(kinds[name])]
    if len(images) == 1:
        return images[0]
    if images:
        raise UserError(
            f"{text(file)} has several image columns, {', '.join(images)}: choose one with "
            f"--image_column={images[0]}"
        )
    shown = ", ".join(f"{name} ({kind})" for name, kind in kinds.items())
    raise UserError(f"{text(file)} has no image column (binary, or bytes and path): {shown}")


def _only_label(kinds: dict[str, str], features: dict, file: bytes) -> str | None:
    """Returns the only column of class labels, else one of LABEL_NAMES; None if there is none."""
    labels = [name for name in kinds if _kind(features.get(name)) == "ClassLabel"]
    labels = labels or [name for name in LABEL_NAMES if name in kinds][:1]
    if len(labels) > 1:
        raise UserError(
            f"{text(file)} has several columns of labels, {', '.join(labels)}: choose one with "
            f"--label_column={labels[0]}"
        )
    return labels[0] if labels else None


def _kind(feature: Any) -> str:
    return str(feature.get("_type", "")) if isinstance(feature, dict) else ""


def _class_names(feature: Any) -> tuple[str, ...]:
    names = feature.get("names") if isinstance(feature, dict) else None
    return tuple(map(str, names)) if isinstance(names, Sequence) else ()


def _features(schema: Any, file: bytes, root: bytes) -> dict[str, Any]:
    """Returns Hugging Face's features by column, {} if there are none. Raises UserError."""
    if content := (schema.metadata or {}).get(b"huggingface"):
        try:
            return json.loads(content)["info"]["features"]
        except (ValueError, KeyError, TypeError) as e:
            raise UserError(
                f"{text(file)}: its metadata 'huggingface' cannot be read: {one_line(e)}"
            ) from None
    for folder in dict.fromkeys((posixpath.dirname(file), root, posixpath.dirname(root))):
        for name, parse in ((b"README.md", _readme), (b"dataset_infos.json", _infos)):
            path = posixpath.join(folder, name)
            if byte_ranges.exists(path):
                described = [f for f in _parsed(path, parse) if f and f.keys() <= set(schema.names)]
                if len({json.dumps(f, sort_keys=True) for f in described}) > 1:
                    raise UserError(
                        f"{text(path)} describes several datasets with these columns: remove the "
                        f"others"
                    )
                if described:
                    return described[0]
    return {}


def _parsed(path: bytes, parse) -> list[dict[str, Any]]:
    try:
        return list(parse(byte_ranges.read(path).decode()))
    except (ValueError, KeyError, TypeError, AttributeError, yaml.YAMLError) as e:
        raise UserError(f"{text(path)}: its features cannot be read: {one_line(e)}") from None


def _readme(content: str) -> Iterator[dict[str, Any]]:
    """Yields the features of each dataset_info in the YAML between the first lines "---"."""
    if not content.startswith("---"):
        return
    info = (yaml.safe_load(content.split("\n---", 1)[0][3:]) or {}).get("dataset_info", [])
    for config in info if isinstance(info, list) else [info]:
        features = {}
        for feature in config.get("features", ()):
            dtype = feature.get("dtype")
            if dtype == "image":
                features[feature["name"]] = {"_type": "Image"}
            elif isinstance(dtype, dict) and "class_label" in dtype:
                names = dtype["class_label"]["names"]  # {"0": name, …}, or a list
                if isinstance(names, dict):
                    names = [names[key] for key in sorted(names, key=int)]
                features[feature["name"]] = {"_type": "ClassLabel", "names": names}
            else:
                features[feature["name"]] = {}
        yield features


def _infos(content: str) -> Iterator[dict[str, Any]]:
    for config in json.loads(content).values():
        yield config["features"]
