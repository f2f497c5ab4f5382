"""What every disentanglement metric takes: the codes of a set of points, encoded once, and the factors behind them."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np

from vae.errors import VAEError


@dataclass(eq=False)
class Codes:
    """Codes of N points whose generative factors are known. One forward pass makes it, and it serves every metric.

    codes (N, D) floats; factors (N, F) class indices, 0 <= factors[:, k] < factor_sizes[k], in any order of points.
    log_variances (N, D) of q(z|x), wanted by `mig_chen` and `sampled`; kl (D,) mean KL of each latent in nats, wanted
    by `udr`. `source` says in every key what the codes are ("means" of q(z|x), or "samples" from it).

    Points are only ever drawn from those given, so the metrics' "random points" and "points that share factor k" need
    no encoder. When the points are the complete grid of factors, each combination once, both are exactly the draws of
    the papers: independent, uniform over the grid, with replacement. For any other set, points are drawn from it
    without replacement, so that test points are never training points, and those that share a factor's value uniformly
    from the points that have it; this approaches the same draws as the set grows (thousands of points a factor value).

    A factor that takes one value only carries no information (its entropy is 0) and is left out, as the reference
    leaves out the colour of dSprites. Codes keep their dtype: bins depend on it in the last digit.
    Raises VAEError for arrays that do not fit together, codes that are not finite, or no factor that varies.
    """

    codes: np.ndarray
    factors: np.ndarray
    factor_sizes: tuple[int, ...]
    log_variances: np.ndarray | None = None
    kl: np.ndarray | None = None
    source: str = "means"
    factor_names: tuple[str, ...] | None = None

    def __post_init__(self):
        self.codes, self.factors, sizes = np.asarray(self.codes), np.asarray(self.factors), np.array(self.factor_sizes)
        names = self.factor_names or tuple(f"factor{k}" for k in range(len(sizes)))
        if self.codes.ndim != 2 or self.codes.shape[1] == 0 or self.factors.shape != (len(self.codes), len(sizes)):
            raise VAEError(
                f"Codes must be (points, latents) and factors (points, {len(sizes)}), "
                f"not {self.codes.shape} and {self.factors.shape}."
            )
        if len(names) != len(sizes):
            raise VAEError(f"{len(sizes)} factors cannot have {len(names)} names.")
        if not np.issubdtype(self.factors.dtype, np.integer) or np.any((self.factors < 0) | (self.factors >= sizes)):
            raise VAEError("Factors must be class indices: integers from 0 to the factor's size minus 1.")
        if self.log_variances is not None and np.shape(self.log_variances) != self.codes.shape:
            raise VAEError(f"Log-variances must have the codes' shape {self.codes.shape}.")
        if self.kl is not None and np.shape(self.kl) != self.codes.shape[1:]:
            raise VAEError(f"The KL must be one number for each of {self.codes.shape[1]} latents.")
        if not all(np.isfinite(a).all() for a in (self.codes, self.log_variances, self.kl) if a is not None):
            raise VAEError("Codes, log-variances and KL must be finite.")
        varies = np.ptp(self.factors, axis=0) > 0
        if not varies.any():
            raise VAEError("No factor takes two values, so there is nothing to disentangle.")
        self.factors = self.factors[:, varies].astype(np.int64)
        self.factor_sizes = tuple(int(size) for size in sizes[varies])
        self.factor_names = tuple(name for name, keep in zip(names, varies, strict=True) if keep)
        if not np.issubdtype(self.codes.dtype, np.floating):
            self.codes = self.codes.astype(np.float64)

    def sampled(self, rng: np.random.Generator | int) -> Codes:
        """The same points with codes drawn from q(z|x) = N(codes, exp(log_variances)) in place of its means."""
        if self.log_variances is None:
            raise VAEError("Sampling codes needs their log-variances.")
        noise = np.random.default_rng(rng).standard_normal(self.codes.shape)
        drawn = self.codes + np.exp(0.5 * self.log_variances) * noise
        return replace(self, codes=drawn.astype(self.codes.dtype), log_variances=None, source="samples")

    @cached_property
    def is_grid(self) -> bool:
        """Whether the points are all combinations of the factors' values, each exactly once."""
        if len(self.codes) != np.prod([float(size) for size in self.factor_sizes]):
            return False
        return int(np.bincount(np.ravel_multi_index(self.factors.T, self.factor_sizes)).max()) == 1

    def draw(self, num_points: int, rng: np.random.Generator) -> np.ndarray:
        """Indices (num_points,) of random points: with replacement from a complete grid, else without."""
        if self.is_grid:
            return rng.integers(len(self.codes), size=num_points)
        if num_points > len(self.codes):
            raise VAEError(
                f"{num_points} points are asked for, but {len(self.codes)} were encoded and they are not the complete "
                "grid of factors; encode more of them or ask for fewer."
            )
        return rng.permutation(len(self.codes))[:num_points]

    def sample(self, num_points: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        """Random codes (num_points, D) and their factors (num_points, F)."""
        return self.split(num_points, 0, rng)[:2]

    def split(
        self, num_train: int, num_test: int, rng: np.random.Generator
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """Random (training codes, training factors, test codes, test factors). Every factor varies in training."""
        train, test = np.split(self.draw(num_train + num_test, rng), [num_train])
        if np.any(np.ptp(self.factors[train], axis=0) == 0):
            raise VAEError(f"{num_train} points are too few: a factor takes one value in all of them.")
        return self.codes[train], self.factors[train], self.codes[test], self.factors[test]

    @cached_property
    def _groups(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Points sorted by each factor's value (F, N); where each value starts there and how many have it, (F, K)."""
        counts = np.stack([np.bincount(v, minlength=max(self.factor_sizes)) for v in self.factors.T])
        return np.argsort(self.factors.T, axis=1, kind="stable"), np.cumsum(counts, axis=1) - counts, counts

    def partners(self, points: np.ndarray, factor: int, rng: np.random.Generator) -> np.ndarray:
        """For each of these points (indices, any shape), a random point that has the same value of this factor."""
        order, start, count = self._groups
        value = self.factors[points, factor]
        return order[factor, start[factor, value] + rng.integers(count[factor, value])]
