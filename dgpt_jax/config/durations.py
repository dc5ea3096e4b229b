"""Durations in configs ("300 epochs", "5000 steps", "1e6 examples", "2%") as optimizer steps."""

import math
from decimal import Decimal, DecimalException
from fractions import Fraction

from dgpt_jax.errors import UserError, counted

# Decimal exponents of sensible numbers; with larger ones exact arithmetic is slow.
EXPONENTS = range(-30, 15)


def check(duration: str, key: str, *, percent: bool = True) -> None:
    """Raises UserError unless the value of the config key is a duration."""
    _parse(duration, key, percent)


def check_shorter(duration: str, key: str, than: str, than_key: str, batch_size: int) -> None:
    """Raises UserError if the value of `key` is at least as long as that of `than_key`, unless only
    the dataset's length decides that, between epochs and other units."""
    (number, unit), (limit, limit_unit) = _parse(duration, key, True), _parse(than, than_key, False)
    if unit == "%":
        limit = Fraction(100)
    elif "epoch" in (unit, limit_unit) and unit != limit_unit:
        return
    else:
        size = {"step": batch_size, "example": 1, "epoch": 1}
        number, limit = number * size[unit], limit * size[limit_unit]
    if 0 < limit <= number:
        raise UserError(f"{key}={duration!r} is not shorter than {than_key}={than!r}: shorten it")


def steps(
    duration: str,
    key: str,
    *,
    batch_size: int,
    examples: int,
    total: int | None = None,
    least: int = 0,
) -> int:
    """Returns a duration in optimizer steps, rounded down from the exact number.

    Epochs and examples are converted with `batch_size` and `examples` (dataset length). Percentages
    are of `total` steps, and at least `least` unless 0. Raises UserError if the value of the
    config key is not a duration, or fewer than `least` steps after rounding; if the reason is a
    batch larger than the dataset, the message says so.
    """
    number, unit = _parse(duration, key, total is not None)
    in_steps = {
        "step": Fraction(1),
        "epoch": Fraction(examples, batch_size),
        "example": Fraction(1, batch_size),
        "%": Fraction(total or 0, 100),
    }
    exact = number * in_steps[unit]
    count = math.floor(exact)
    if unit == "%" and exact > 0:
        count = max(count, least)
    if count < least:
        if unit == "epoch" and number >= least and batch_size > examples:
            raise UserError(
                f"config.batch_size={batch_size} exceeds the {counted(examples, 'example')}, so "
                f"that {key}={duration!r} is {float(exact):.3g} steps: set --config.batch_size to "
                f"at most {examples}"
            )
        raise UserError(
            f"{key}={duration!r} is {float(exact):.3g} steps ({counted(examples, 'example')}, "
            f"batches of {batch_size}): set it to '{least} steps' or more"
        )
    return count


def _parse(duration: str, key: str, percent: bool) -> tuple[Fraction, str]:
    """(number, "step", "epoch", "example" or "%")."""
    text = duration.strip()
    number, _, unit = text.partition(" ") if not text.endswith("%") else (text[:-1], "", "%")
    unit = unit.strip().removesuffix("s")
    try:
        value = Decimal(number)
    except DecimalException:
        value = Decimal(-1)
    is_unit = unit in ("step", "epoch", "example") or (unit == "%" and percent)
    in_range = value.is_finite() and (value == 0 or value.adjusted() in EXPONENTS)
    if not (is_unit and in_range and value >= 0):
        raise UserError(
            f'{key}: cannot read the duration {duration!r}: write "300 epochs", "5000 steps", '
            f'"1000000 examples"' + (' or "2%"' if percent else "")
        )
    return Fraction(value), unit
