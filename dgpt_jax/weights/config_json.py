"""JSON beside weights: read strictly, so that nothing in it that changes numbers is passed over."""

import json
import math
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path

from dgpt_jax.schema import Range, UserError, printable
from dgpt_jax.sections import MEAN, STD

LFS = b"version https://git-lfs"  # how the text begins that stands for a file in a git repository
UNSAID = (None, "", [], {})  # values that state nothing


def read_json(path: Path) -> dict:
    """The object in a JSON file. Raises UserError on anything else."""
    try:
        data = path.read_bytes()
    except OSError as e:
        raise UserError(f"{path} cannot be read: {e.strerror}") from None
    if data.startswith(LFS):
        raise UserError(f"{path} is a git-LFS pointer, not the file: run `git lfs pull` beside it")
    try:
        content = json.loads(data)
    except (ValueError, RecursionError) as e:
        why = printable(str(e)) if data.strip() else "it is empty"
        raise UserError(f"{path} is no JSON ({why}): download it again, or remove it") from None
    if not isinstance(content, dict):
        raise UserError(
            f"{path} holds a JSON {type(content).__name__}, an object is expected: put the file "
            f"that came with the weights in its place"
        )
    return content


def group(content: Mapping, key: str, file) -> dict:
    """The object under a key, {} where there is none. Raises UserError on another value."""
    value = content.get(key)
    if value is not None and not isinstance(value, dict):
        raise UserError(f"{file}: {key} is {shown(value)}, an object is expected")
    return value or {}


def count(value, what: str) -> int:
    """A whole number of JSON from 1 on; one pair of equal ones is that number. UserError."""
    if isinstance(value, list) and len(value) == 2 and value[0] == value[1]:
        value = value[0]
    if type(value) not in (int, float) or value < 1 or value % 1 != 0:
        raise UserError(f"{what} is {shown(value)}, a whole number above 0 is expected")
    return int(value)


def share(value, what: str) -> float:
    """A number of JSON between 0 and 1, such as an eps. Raises UserError."""
    if type(value) not in (int, float) or not 0 < value < 1:
        raise UserError(f"{what} is {shown(value)}, a number between 0 and 1 is expected")
    return float(value)


def channels(value, within: Range, what: str) -> tuple[float, float, float]:
    """The mean or std of JSON: three numbers, or one that counts for all channels.

    They are of pictures in [0, 1]. Raises UserError on values outside the range.
    """
    values = value if isinstance(value, list) else [value] * 3
    good = all(type(v) in (int, float) and v in within and math.isfinite(v) for v in values)
    if len(values) != 3 or not good:
        raise UserError(
            f"{what} is {shown(value)}; expected are three numbers, or one for all channels, each "
            f"{within}: they are of pictures in [0, 1] (what is of 0 to 255 is divided by 255)"
        )
    return tuple(float(v) for v in values)


def mean_std(content: Mapping, mean: str, std: str, file) -> dict:
    """{"mean", "std"} from the keys of those names, what of them is there."""
    names = {"mean": (mean, MEAN), "std": (std, STD)}
    return {
        ours: channels(content[key], within, f"{file}: {key}")
        for ours, (key, within) in names.items()
        if content.get(key) is not None
    }


def class_names(value, count: int, what: str) -> tuple[str, ...]:
    """The names of a head's classes: a list, or an object from numbers to names; () where there are
    none, or only stand-ins ("LABEL_0"). Raises UserError on other values, and another number."""
    if isinstance(value, dict):
        value = [value.get(str(i)) for i in range(len(value))]
    if value in UNSAID or all(name == f"LABEL_{i}" for i, name in enumerate(value)):
        return ()
    if not isinstance(value, list) or not all(isinstance(name, str) for name in value):
        raise UserError(f"{what} is {shown(value)}, names of the classes 0, 1, … are expected")
    if len(value) != count:
        raise UserError(f"{what} names {len(value)} classes, the head has {count}")
    return tuple(value)


def is_timm(content: Mapping) -> bool:
    """Whether the object of a config.json is timm's."""
    return "architecture" in content or "pretrained_cfg" in content


def refuse_unknown(content: Mapping, known: Collection[str], file):
    """Raises UserError where a key that is not known has a value other than one of UNSAID."""
    odd = [key for key, value in content.items() if key not in known and value not in UNSAID]
    if odd:
        told = ", ".join(f"{key} {shown(content[key])}" for key in odd)
        raise UserError(
            f"{file}: {told}: what that changes is not known here; remove the key if the weights' "
            f"features do not depend on it"
        )


def refuse_unusual(content: Mapping, usual: Mapping, file):
    """Raises UserError where a key has another value than the only one that is computed here."""
    odd = [key for key, value in usual.items() if content.get(key, value) not in (value, None)]
    if odd:
        told = (f"{key} {shown(content[key])} (only {usual[key]!r})" for key in odd)
        raise UserError(f"{file}: not computed here: {', '.join(told)}")


def check_claims(claims: Mapping, found: Mapping, path):
    """Raises UserError where JSON claims another size than the arrays have.

    claims: {name: (value, key and file)}. found: {name: the arrays'}.
    """
    for name, (value, where) in claims.items():
        if value != found[name]:
            raise UserError(
                f"{path}: {where} is {shown(value)}, the arrays have {found[name]}: the JSON is of "
                f"other weights"
            )


def shown(value) -> str:
    """A value of JSON on one line, cut where it is long."""
    text = printable(json.dumps(value, ensure_ascii=False))
    return text if len(text) <= 60 else text[:57] + "…"


def objects(directory: Path, key: str) -> Iterable[Path]:
    """The JSON files of a directory that hold an object under a key, by name."""
    for path in sorted(directory.glob("*.json")):
        try:
            content = json.loads(path.read_bytes())
        except (OSError, ValueError, RecursionError):
            continue
        if isinstance(content, dict) and isinstance(content.get(key), dict):
            yield path
