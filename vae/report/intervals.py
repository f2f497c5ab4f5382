"""95% intervals of mean paired differences: over seeds by Student's t, over test images by the normal distribution."""

from __future__ import annotations

import math
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np

LEVEL = 0.95


@dataclass(frozen=True)
class Interval:
    """low and high ends; n: how many differences it is of."""

    low: float
    high: float
    n: int

    @property
    def excludes_zero(self) -> bool:
        return self.low > 0 or self.high < 0


def over_seeds(differences: list[float]) -> Interval | None:
    """mean ± t s / sqrt(n), with t of n - 1 degrees of freedom; None of fewer than two, or where one is not finite.

    Student 1908. It covers what another choice of seeds (initial weights, order and noise of training) could give, if the
    differences are roughly normal.
    """
    n = len(differences)
    if n < 2 or not all(map(math.isfinite, differences)):
        return None
    from scipy.special import stdtrit  # the quantile alone: scipy.stats takes a second to import

    return _around(np.asarray(differences, np.float64), float(stdtrit(n - 1, (1 + LEVEL) / 2)))


def over_images(differences: np.ndarray) -> Interval | None:
    """mean ± z s / sqrt(n) of the images' differences (n,); None of fewer than two, or where one is not finite.

    It covers what another draw of test images could give, at the weights as they are: of many images, by the central limit.
    """
    if len(differences) < 2 or not np.isfinite(differences).all():
        return None
    return _around(differences.astype(np.float64), NormalDist().inv_cdf((1 + LEVEL) / 2))


def _around(differences: np.ndarray, quantile: float) -> Interval:
    n, middle = len(differences), float(differences.mean())
    half = quantile * float(differences.std(ddof=1)) / math.sqrt(n)
    return Interval(middle - half, middle + half, n)
