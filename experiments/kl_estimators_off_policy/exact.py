"""Bias and standard deviation of each estimator, by enumeration, along a path from pi_old = pi to far away."""

from __future__ import annotations

from typing import Any

import torch

from experiments.kl_estimators_off_policy.enumeration import Policies, World, gradient, moments
from experiments.kl_estimators_off_policy.estimators import ESTIMATORS, Answers

WORLDS = {"one token": (6, 1), "sequences": (4, 4)}  # vocabulary, longest answer


def key(place: str, name: str) -> str:
    return f"{place}: {name}"


def measured(world_name: str, distance: float, seed: int) -> dict[str, Any]:
    """Each estimator's bias and sd over the exact KL (a value) or over the norm of its gradient (a reward or a loss)."""
    vocabulary, length = WORLDS[world_name]
    world, policies = World.of(vocabulary, length), Policies.draw(seed, vocabulary, distance)
    exact = world.kl(policies.pi, policies.ref).item()
    slope = gradient(lambda pi: world.kl(pi, policies.ref), policies.pi)
    probabilities = world.probabilities(policies.old).detach()
    found = {}
    for estimator in ESTIMATORS:
        of = moments(estimator.of(Answers.of(world, policies)), probabilities, policies.pi)
        if estimator.place == "value":
            bias, sd, unit = (of.value - exact).abs(), of.value_sd, exact
        else:
            bias, sd, unit = (of.gradient - slope).norm(), of.gradient_sd, slope.norm()
        found[key(estimator.place, estimator.name)] = {"bias": bias / unit, "sd": sd / unit}
    p, q = world.probabilities(policies.pi).detach(), probabilities
    to_sampler = world.kl(policies.pi, policies.old).item()
    return {"effective_samples": 1 / (p.square() / q).sum(), "to_sampler": to_sampler, "of": found}


def along_the_path(world_name: str, distances: list[float], seeds: list[int]) -> dict[str, Any]:
    """Means over seeds of policies, a list over distances each. effective_samples: of one, (E w)^2 / E w^2."""
    by_distance = [[measured(world_name, distance, seed) for seed in seeds] for distance in distances]

    def over_seeds(get) -> list[float]:
        return [float(torch.tensor([float(get(of_seed)) for of_seed in of_seeds]).mean()) for of_seeds in by_distance]

    return {
        "effective_samples": over_seeds(lambda m: m["effective_samples"]),
        "to_sampler": over_seeds(lambda m: m["to_sampler"]),
        "of": {
            name: {what: over_seeds(lambda m, name=name, what=what: m["of"][name][what]) for what in ("bias", "sd")}
            for name in by_distance[0][0]["of"]
        },
    }
