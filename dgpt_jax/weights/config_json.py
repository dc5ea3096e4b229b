"""Strict reading of JSON beside weights: a key that changes the outputs is never ignored."""

import json
import math
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Any

from dgpt_jax.config.data import MEAN, STD
from dgpt_jax.config.ranges import Range
from dgpt_jax.errors import UserError, printable

LFS_HEADER = b"version https://git-lfs"  # of a pointer file in a git repository
EMPTY_VALUES = (None, "", [], {})  # values that specify nothing


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file. Raises UserError on anything else."""
    try:
        data = path.read_bytes()
    except OSError as e:
        raise UserError(f"{path} cannot be read: {e.strerror}") from None
    if data.startswith(LFS_HEADER):
        raise UserError(f"{path} is a git-LFS pointer, not the file: run `git lfs pull` there")
    try:
        content = json.loads(data)
    except (ValueError, RecursionError) as e:
        reason = printable(str(e)) if data.strip() else "it is empty"
        raise UserError(
            f"{path} is not valid JSON ({reason}): download it again, or remove it"
        ) from None
    if not isinstance(content, dict):
        raise UserError(
            f"{path} contains a JSON {type(content).__name__}, expected an object: replace it with "
            f"the file that came with the weights"
        )
    return content


def get_object(content: Mapping, key: str, file: Path | str) -> dict[str, Any]:
    """The object under a key, {} if absent. Raises UserError on another value."""
    value = content.get(key)
    if value is not None and not isinstance(value, dict):
        raise UserError(f"{file}: {key} is {format_value(value)}, expected an object")
    return value or {}


def positive_int(value: Any, label: str) -> int:
    """A positive integer, or the value of a pair of equal ones. Raises UserError."""
    is_pair = isinstance(value, list) and len(value) == 2 and value[0] == value[1]
    number: Any = value[0] if is_pair else value
    if type(number) not in (int, float) or number < 1 or number % 1 != 0:
        raise UserError(f"{label} is {format_value(number)}, expected a positive integer")
    return int(number)


def fraction(value: Any, label: str) -> float:
    """A number between 0 and 1, such as an eps. Raises UserError."""
    if type(value) not in (int, float) or not 0 < value < 1:
        raise UserError(f"{label} is {format_value(value)}, expected a number between 0 and 1")
    return float(value)


def channel_values(value: Any, limits: Range, label: str) -> tuple[float, float, float]:
    """Mean or std of images in [0, 1]: three numbers, or one for all channels.

    Raises UserError on values outside the limits.
    """
    values = value if isinstance(value, list) else [value] * 3
    valid = all(type(v) in (int, float) and v in limits and math.isfinite(v) for v in values)
    if len(values) != 3 or not valid:
        raise UserError(
            f"{label} is {format_value(value)}; expected three numbers, or one for all channels, "
            f"each {limits}, for images in [0, 1] (divide values for 0 to 255 by 255)"
        )
    red, green, blue = map(float, values)
    return red, green, blue


def read_mean_std(content: Mapping, mean_key: str, std_key: str, file: Path | str) -> dict:
    """{"mean", "std"} from the keys of those names, as far as present."""
    keys = {"mean": (mean_key, MEAN), "std": (std_key, STD)}
    return {
        name: channel_values(content[key], limits, f"{file}: {key}")
        for name, (key, limits) in keys.items()
        if content.get(key) is not None
    }


def class_names(value: Any, count: int, label: str) -> tuple[str, ...]:
    """Class names of a head: a list, or an object from indices to names; () if there are none, or
    only placeholders ("LABEL_0"). Raises UserError on other values or another number of classes."""
    if isinstance(value, dict):
        value = [value.get(str(i)) for i in range(len(value))]
    if value in EMPTY_VALUES or all(name == f"LABEL_{i}" for i, name in enumerate(value)):
        return ()
    if not isinstance(value, list) or not all(isinstance(name, str) for name in value):
        raise UserError(f"{label} is {format_value(value)}, expected names of the classes 0, 1, …")
    if len(value) != count:
        raise UserError(f"{label} names {len(value)} classes, the head has {count}")
    return tuple(value)


def is_timm(content: Mapping) -> bool:
    """True for the content of a config.json by timm."""
    return "architecture" in content or "pretrained_cfg" in content


def refuse_unknown_keys(content: Mapping, known: Collection[str], file: Path | str) -> None:
    """Raises UserError if another key has a value outside EMPTY_VALUES."""
    unknown = [k for k, value in content.items() if k not in known and value not in EMPTY_VALUES]
    if unknown:
        pairs = ", ".join(f"{key} {format_value(content[key])}" for key in unknown)
        raise UserError(
            f"{file}: unsupported key: {pairs}; remove it if the weights' features do not depend "
            f"on it"
        )


def require_values(content: Mapping, supported: Mapping, file: Path | str) -> None:
    """Raises UserError if a key has a value other than its only supported one."""
    wrong = [k for k, value in supported.items() if content.get(k, value) not in (value, None)]
    if wrong:
        pairs = (f"{key} {format_value(content[key])} (only {supported[key]!r})" for key in wrong)
        raise UserError(f"{file}: unsupported: {', '.join(pairs)}")


def check_sizes(
    expected: Mapping[str, tuple[Any, str]], actual: Mapping[str, Any], path: Path | str
) -> None:
    """Raises UserError if JSON states another size than the arrays have.

    expected: {name: (value, key and file)}. actual: {name: value of the arrays}.
    """
    for name, (value, origin) in expected.items():
        if value != actual[name]:
            raise UserError(
                f"{path}: {origin} is {format_value(value)}, the arrays have {actual[name]}: the "
                f"JSON belongs to other weights"
            )


def format_value(value: Any) -> str:
    """A JSON value on one line, truncated to 60 characters."""
    text = printable(json.dumps(value, ensure_ascii=False))
    return text if len(text) <= 60 else text[:57] + "…"


def files_with_object(directory: Path, key: str) -> Iterable[Path]:
    """JSON files of a directory that have an object under the key, sorted by name."""
    for path in sorted(directory.glob("*.json")):
        try:
            content = json.loads(path.read_bytes())
        except (OSError, ValueError, RecursionError):
            continue
        if isinstance(content, dict) and isinstance(content.get(key), dict):
            yield path
