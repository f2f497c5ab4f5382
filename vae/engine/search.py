"""What a run of a sweep returns to the sweeper that started it, such as a search with Optuna. Imports no torch."""

from __future__ import annotations

import itertools
import math

from omegaconf import DictConfig

from vae.errors import VAEError


class Pruned(Exception):
    """A run of a search was ended because its validations were hopeless; the message says when and at what."""


def metrics_of(config: DictConfig) -> list[str]:
    """The metrics that a run returns to its sweeper."""
    return [config.sweep_metric] if isinstance(config.sweep_metric, str) else list(config.sweep_metric)


def sweep_directions(config: DictConfig) -> list[str]:
    """`maximize` or `minimize` for each of these metrics; null follows from the name.

    Raises VAEError for a name that says neither.
    """
    metrics = metrics_of(config)
    given = config.sweep_direction
    given = [given] * len(metrics) if given is None or isinstance(given, str) else list(given)
    known = {"elbo": "maximize", **dict.fromkeys(("loss", "distortion", "bits_per_dim"), "minimize")}
    directions = []
    for metric, direction in itertools.zip_longest(metrics, given):
        name = str(metric).rpartition("/")[2].removeprefix("best_")
        direction = direction or known.get("loss" if name.startswith("nll") else name)
        if direction not in ("maximize", "minimize") or metric is None:
            raise VAEError(
                f"sweep_direction={config.sweep_direction} does not say of each of sweep_metric={config.sweep_metric} "
                "whether to maximize or to minimize it."
            )
        directions.append(direction)
    return directions


def sweep_value(config: DictConfig, metrics: dict[str, float] | None) -> float | tuple[float, ...]:
    """What a run returns to its sweeper, a tuple of several metrics; of a run that failed, `None`, the worst: a NaN would
    end the search of sweepers that are not this project's.

    Raises VAEError for a metric that was not measured.
    """
    names = metrics_of(config)
    if metrics is None:
        values = [-math.inf if direction == "maximize" else math.inf for direction in sweep_directions(config)]
    elif missing := [name for name in names if name not in metrics]:
        raise VAEError(f"sweep_metric={missing[0]} was not measured: choose from {', '.join(sorted(metrics))}.")
    else:
        values = [metrics[name] for name in names]
    return values[0] if len(values) == 1 else tuple(values)
