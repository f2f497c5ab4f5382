"""Optuna's samplers and pruners by name, and what makes a search repeatable: each trial draws from a seed of its own.

Optuna's samplers keep their random state in the process, so that a search that was killed goes on with other proposals. Here
a trial's random numbers follow from the search's seed, the trial's number and the parameter's name alone. Imports no torch.
"""

from __future__ import annotations

import hashlib
import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.exceptions import ExperimentalWarning
from optuna.pruners import BasePruner, HyperbandPruner, MedianPruner, NopPruner
from optuna.samplers import BaseSampler, NSGAIISampler, RandomSampler, TPESampler
from optuna.study import Study
from optuna.trial import FrozenTrial

from vae.errors import VAEError, choose


class PerTrial(BaseSampler):
    """Draws each trial with a new sampler, `make(seed)`, whose seed follows from the search's, the trial's number and what is
    drawn: all parameters together, or one. The same trial asks for the same values whatever process asks, and when.

    space: of the search; parameters with one value are not drawn.
    """

    def __init__(self, make: Callable[[int], BaseSampler], seed: int, space: Mapping[str, BaseDistribution]) -> None:
        self.make, self.seed = make, seed
        self.space = {name: one for name, one in space.items() if not one.single()}

    def _of(self, trial: FrozenTrial, drawn: str) -> BaseSampler:
        text = f"{self.seed}/{trial.number}/{drawn}"
        return self.make(int.from_bytes(hashlib.blake2b(text.encode(), digest_size=4).digest(), "big"))

    def infer_relative_search_space(self, study: Study, trial: FrozenTrial) -> dict[str, BaseDistribution]:
        return self.space

    def sample_relative(
        self, study: Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]
    ) -> dict[str, Any]:
        return self._of(trial, "").sample_relative(study, trial, search_space)

    def sample_independent(
        self, study: Study, trial: FrozenTrial, param_name: str, param_distribution: BaseDistribution
    ) -> Any:
        return self._of(trial, param_name).sample_independent(study, trial, param_name, param_distribution)


class QuasiRandom(BaseSampler):
    """Trial n is point n of Sobol's sequence, turned by one random shift (Cranley & Patterson 1976): whatever the number of
    trials, they fill the space more evenly than random ones. Up to 2**30 trials.

    Optuna's own counts in the study, and a trial that is asked for again after a kill would be another point.
    """

    def __init__(self, seed: int, space: Mapping[str, BaseDistribution]) -> None:
        self.space = {name: one for name, one in space.items() if not one.single()}
        self.shift = np.random.default_rng(seed).random(len(self.space))

    def infer_relative_search_space(self, study: Study, trial: FrozenTrial) -> dict[str, BaseDistribution]:
        return self.space

    def sample_relative(
        self, study: Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]
    ) -> dict[str, Any]:
        if not self.space:
            return {}
        points = (self.point(trial.number) + self.shift) % 1.0
        return {name: from_unit(float(u), one) for (name, one), u in zip(self.space.items(), points, strict=True)}

    def point(self, number: int) -> np.ndarray:
        """Point `number` of Sobol's sequence, unshifted, in [0, 1)^d."""
        from scipy.stats import qmc

        sequence = qmc.Sobol(len(self.space), scramble=False)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # that one point alone has no balance
            return np.asarray(sequence.fast_forward(number).random(1)[0] if number else sequence.random(1)[0])

    def sample_independent(
        self, study: Study, trial: FrozenTrial, param_name: str, param_distribution: BaseDistribution
    ) -> Any:
        raise AssertionError(f"{param_name} is not in the search space")


def from_unit(u: float, one: BaseDistribution) -> Any:
    """The value at `u` in [0, 1) of a distribution's own scale: its quantile."""
    if isinstance(one, CategoricalDistribution):
        return one.choices[int(u * len(one.choices))]
    assert isinstance(one, FloatDistribution | IntDistribution)
    if isinstance(one, IntDistribution) and one.log:
        low, high = math.log(one.low - 0.5), math.log(one.high + 0.5)
        return min(max(round(math.exp(low + u * (high - low))), one.low), one.high)
    if one.step is not None:  # every IntDistribution that is not logarithmic
        count = round((one.high - one.low) / one.step) + 1
        return one.low + int(u * count) * one.step
    if one.log:
        low, high = math.log(one.low), math.log(one.high)
        return min(max(math.exp(low + u * (high - low)), one.low), one.high)
    return one.low + u * (one.high - one.low)


def make_sampler(
    name: str,
    options: Mapping[str, Any],
    seed: int,
    space: Mapping[str, BaseDistribution],
    directions: Sequence[str],
) -> BaseSampler:
    """The sampler that `hydra.sweeper.sampler` names. Raises VAEError for one that does not exist, or that does not take
    these options."""
    known: dict[str, Callable[..., BaseSampler]] = {
        # the same of Optuna 4 and 5: all parameters together, and no two trials that run at a time alike
        "tpe": lambda **given: TPESampler(**{"multivariate": len(directions) == 1, "constant_liar": True, **given}),
        "random": RandomSampler,
        "qmc": lambda **given: QuasiRandom(space=space, **given),
        "nsga2": NSGAIISampler,
    }
    choose("hydra.sweeper.sampler", name, known)

    def make(seed: int) -> BaseSampler:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ExperimentalWarning)
            return known[name](seed=seed, **options)

    _try("sampler", name, options, lambda: make(0))
    return make(seed) if name == "qmc" else PerTrial(make, seed, space)


def make_pruner(name: str | None, options: Mapping[str, Any], epochs: int | None) -> BasePruner:
    """The pruner that `hydra.sweeper.pruner` names; steps are epochs, of which a run has `epochs`, where that is known.

    Raises VAEError for one that does not exist, or that does not take these options.
    """
    known: dict[str | None, Callable[..., BasePruner]] = {
        None: NopPruner,
        "median": MedianPruner,
        "hyperband": lambda **given: HyperbandPruner(**{"max_resource": epochs or "auto", **given}),
    }
    if name not in known:
        raise VAEError(f"hydra.sweeper.pruner={name} is unknown: choose one of null, median, hyperband.")
    return _try("pruner", name or "null", options, lambda: known[name](**options))


def _try(what: str, name: str, options: Mapping[str, Any], make: Callable[[], Any]) -> Any:
    try:
        return make()
    except (TypeError, ValueError) as error:
        why = (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")
        raise VAEError(f"hydra.sweeper.{what}_options={dict(options)} are not of {what}={name}: {why}.") from error
