"""A search space from overrides in Hydra's grammar: `interval(1e-4,1e-2)`, `range(1,9)`, `choice(a,b)`. Imports no torch."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from hydra.core.override_parser.types import IntervalSweep, Override, RangeSweep

from vae.errors import VAEError

if TYPE_CHECKING:
    from optuna.distributions import BaseDistribution, CategoricalDistribution

MOST_CHOICES = 10_000


def search_space(overrides: Sequence[Override]) -> dict[str, BaseDistribution]:
    """key -> the distribution that Optuna draws its value from, of the overrides that are sweeps, in order of keys.

    `interval(a,b)` is all numbers from a to b, `int(interval(a,b))` the whole ones, `range(a,b[,step])` those that Hydra
    would try, `choice(...)`, `a,b` and `glob(...)` their elements as text, without order. `tag(log, ...)` makes an interval
    or a range of positive numbers uniform in the logarithm.
    Raises VAEError for what is no space.
    """
    swept = {override.get_key_element(): override for override in overrides if override.is_sweep_override()}
    if not swept:
        raise VAEError(
            "hydra/sweeper=optuna has nothing to search over: give a setting an interval, range or choice, "
            "as in 'objective.beta=tag(log, interval(0.1,10))'."
        )
    if "seed" in swept:
        raise VAEError(
            "seed is searched over, which would find the luckiest: fix it, and repeat the best settings with seed=0,1,2."
        )
    return {key: distribution(swept[key]) for key in sorted(swept)}


def distribution(override: Override) -> BaseDistribution:
    """What Optuna draws the value of one override from. Raises VAEError for what is no space."""
    from optuna.distributions import FloatDistribution, IntDistribution

    sweep: Any = override.value()
    line = str(override.input_line)
    tags = set(getattr(sweep, "tags", ()))
    numbers = isinstance(sweep, IntervalSweep | RangeSweep)
    if tags - {"log"} or (tags and not numbers):
        raise VAEError(f"{line}: the only tag of a search space is log, of an interval or a range.")
    if getattr(sweep, "shuffle", False):
        raise VAEError(f"{line}: the order of a search space means nothing, so there is nothing to shuffle.")
    if not numbers:
        return _choices(override)
    if isinstance(sweep, IntervalSweep):
        low, high, step = sweep.start, sweep.end, None
        whole = isinstance(low, int) and isinstance(high, int)
    else:
        low, high, step, whole = _ends(sweep, line)
    if low is None or high is None or not (math.isfinite(low) and math.isfinite(high) and low <= high):
        raise VAEError(f"{line} is empty: the first number must be finite and the smaller one.")
    if tags and low <= 0:
        raise VAEError(f"{line}: a logarithm needs numbers above 0.")
    if tags and step not in (None, 1):
        raise VAEError(f"{line}: tag(log, ...) needs an interval, or a range of whole numbers in steps of 1.")
    if whole:
        return IntDistribution(int(low), int(high), log=bool(tags), step=int(step or 1))
    return FloatDistribution(float(low), float(high), log=bool(tags), step=step)


def _ends(sweep: RangeSweep, line: str) -> tuple[Any, Any, Any, bool]:
    """The lowest and the highest number of a range (Hydra's ends before `stop`), its step, and whether they are whole."""
    values = sweep.range()
    if sweep.step == 0:
        raise VAEError(f"{line}: a range needs a step that is not 0.")
    if isinstance(values, range):
        return (min(values), max(values), abs(values.step), True) if values else (None, None, None, True)
    start, stop, step = (float(end) for end in (values.start, values.stop, values.step))
    count = math.ceil(round((stop - start) / step, 9))
    if count < 1 or not math.isfinite(step):
        return None, None, None, False
    low, high = sorted((start, float(f"{start + (count - 1) * step:.12g}")))
    return low, high, abs(step), False


def _choices(override: Override) -> CategoricalDistribution:
    from optuna.distributions import CategoricalDistribution

    choices = list(dict.fromkeys(str(text) for text in override.sweep_string_iterator()))
    if not 0 < len(choices) <= MOST_CHOICES:
        raise VAEError(f"{override.input_line} has {len(choices)} choices: a search needs from 1 to {MOST_CHOICES:,}.")
    return CategoricalDistribution(choices)


def as_text(value: Any, drawn_from: BaseDistribution) -> str:
    """A drawn value as Hydra reads it: what Optuna drew in steps of 0.1 is 0.3, not 0.30000000000000004."""
    if isinstance(value, float) and getattr(drawn_from, "step", None):
        value = float(f"{value:.12g}")
    return str(value)
