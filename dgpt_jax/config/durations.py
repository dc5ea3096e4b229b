"""Durations of a config as optimizer steps: "300 epochs", "5000 steps", "1e6 examples", "2%"."""

import math
from decimal import Decimal, DecimalException
from fractions import Fraction

from dgpt_jax.schema import UserError

# Decimal exponents of numbers beyond which no duration makes sense, and exact arithmetic is slow.
EXPONENTS = range(-30, 15)


def check(duration: str, key: str, *, percent: bool = True):
    """Raises UserError, which names the config key, unless the text is a duration."""
    _parse(duration, key, percent)


def steps(
    duration: str,
    key: str,
    *,
    batch_size: int,
    examples: int,
    total: int | None = None,
    least: int = 0,
) -> int:
    """A duration as whole optimizer steps, rounded down from the exact number.

    Epochs and examples are converted through `batch_size` and `examples` (dataset length), a
    percentage is one of `total` steps, and `least` where it is a smaller one: of a training of few
    steps. Raises UserError, which names the config key, where the text is no duration, or where it
    is fewer than `least` steps after rounding.
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
        raise UserError(
            f"{key}={duration!r} is {float(exact):.3g} steps ({examples} examples, batches of "
            f"{batch_size}): make it {least} or more"
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
    known = unit in ("step", "epoch", "example") or (unit == "%" and percent)
    small = value.is_finite() and (value == 0 or value.adjusted() in EXPONENTS)
    if not (known and small and value >= 0):
        raise UserError(
            f'{key}: cannot read the duration {duration!r}: write "300 epochs", "5000 steps", '
            f'"1000000 examples"' + (' or "2%"' if percent else "")
        )
    return Fraction(value), unit
