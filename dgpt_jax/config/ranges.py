"""Ranges of the numbers in configs."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Range:
    """Numbers that a field may have: an interval, closed at `least` and `most`, open at `above` and
    `below`, and the single values `also`."""

    least: float | None = None
    above: float | None = None
    most: float | None = None
    below: float | None = None
    also: tuple[float, ...] = ()

    def __contains__(self, value: float) -> bool:
        return value in self.also or not (
            (self.least is not None and value < self.least)
            or (self.above is not None and value <= self.above)
            or (self.most is not None and value > self.most)
            or (self.below is not None and value >= self.below)
        )

    def __str__(self) -> str:
        words = {"least": "at least", "above": "above", "most": "at most", "below": "below"}
        bounds = ((text, getattr(self, name)) for name, text in words.items())
        text = " and ".join(f"{text} {bound}" for text, bound in bounds if bound is not None)
        return " or ".join([*map(str, self.also), text])


COUNT = Range(least=1)
NATURAL = Range(least=0)  # also for floats
POSITIVE = Range(above=0)
SHARE = Range(least=0, most=1)
BELOW_1 = Range(least=0, below=1)
