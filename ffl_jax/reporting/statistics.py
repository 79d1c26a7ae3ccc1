"""Means, spreads and paired differences over seeds."""

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from scipy.special import stdtrit

CONFIDENCE = 0.95


@dataclass(frozen=True)
class Spread:
    """Of some values: their mean, sample standard deviation (None for one value) and number."""

    mean: float
    std: float | None
    count: int


@dataclass(frozen=True)
class Difference:
    """The mean of differences, its confidence interval (None for one pair), and the number of pairs."""

    mean: float
    low: float | None
    high: float | None
    count: int

    @property
    def clear(self) -> bool:
        """Whether the interval leaves out zero."""
        return self.low is not None and (self.low > 0 or self.high < 0)


def spread(values: Sequence[float | None]) -> Spread | None:
    """Mean and sample standard deviation, in the values' unit; None values are left out, None if all are."""
    values = [value for value in values if value is not None]
    if not values:
        return None
    std = statistics.stdev(values) if len(values) > 1 else None
    return Spread(statistics.fmean(values), std, len(values))


def paired_difference(
    ours: Mapping[int, float | None], theirs: Mapping[int, float | None]
) -> Difference | None:
    """The mean of `ours - theirs` over the seeds that both have, with Student's t interval.

    The interval is mean ± t · s / √n, where s is the sample standard deviation of the n differences and t the
    quantile of n - 1 degrees of freedom. It supposes that differences are normal, and their seeds alike.

    Args:
      ours, theirs: seed -> value; None counts as missing.

    Returns:
      None without a common seed.
    """
    pairs = [(ours[seed], theirs[seed]) for seed in sorted(ours.keys() & theirs.keys())]
    one = spread([a - b for a, b in pairs if a is not None and b is not None])
    if one is None or one.std is None:
        return one and Difference(one.mean, None, None, 1)
    half = stdtrit(one.count - 1, (1 + CONFIDENCE) / 2) * one.std / math.sqrt(one.count)
    return Difference(one.mean, one.mean - half, one.mean + half, one.count)
