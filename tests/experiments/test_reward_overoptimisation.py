"""Reward over-optimisation: its exact worlds."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch

from experiments.reward_overoptimisation import latents, toys
from vae.kl import kl_categorical

TOY = toys.GaussianToy(a=1.0, b=0.2, dim=4)


def test_gold_on_the_gaussian_frontier_is_that_of_the_closed_form():
    gold = [TOY.frontier(d)["gold"] for d in (0.5, 1, 2, 3, 4)]
    assert gold == pytest.approx([0.6571, 1.2142, 2.0284, 2.4426, 2.4569], abs=5e-5)
    assert TOY.peak == pytest.approx((3.5355, 2.5), abs=5e-5)
    assert TOY.frontier(TOY.peak[0])["gold"] == pytest.approx(2.5)


def test_moments_of_the_largest_of_n_normals():
    assert toys.normal_maximum(1) == pytest.approx((0, 1), abs=1e-9)
    assert toys.normal_maximum(2) == pytest.approx((1 / math.sqrt(math.pi), 1), abs=1e-9)
    assert toys.normal_maximum(3) == pytest.approx(
        (1.5 / math.sqrt(math.pi), 1 + math.sqrt(3) / (2 * math.pi)), abs=1e-9
    )


def test_best_of_n_arms_is_what_drawing_says_and_stays_below_its_bound():
    noise = torch.Generator().manual_seed(0)
    log_ref = torch.log_softmax(torch.randn(6, generator=noise, dtype=torch.float64), 0)
    reward = torch.randn(6, generator=noise, dtype=torch.float64)
    draws = torch.multinomial(log_ref.exp(), 3 * 200_000, replacement=True, generator=noise).view(-1, 3)
    chosen = draws.gather(1, reward[draws].argmax(1, keepdim=True))[:, 0]
    log_probs = toys.best_of_n_arms(log_ref, reward, 3)
    assert torch.allclose(log_probs.exp(), chosen.bincount(minlength=6).double() / 200_000, atol=4e-3)
    assert kl_categorical(p_log_probs=log_probs, q_log_probs=log_ref) <= toys.best_of_n_kl(3)


def test_the_slope_of_reward_in_kl_is_beta():
    noise = torch.Generator().manual_seed(1)
    log_ref = torch.log_softmax(torch.randn(50, generator=noise, dtype=torch.float64), 0)
    reward = torch.randn(50, generator=noise, dtype=torch.float64)
    assert toys.slope_errors(log_ref, reward, torch.tensor([3.0, 1.0, 0.5], dtype=torch.float64)).max() < 1e-7


def test_a_fit_of_either_form_returns_the_curve_it_was_made_from():
    d = np.linspace(0.5, 4, 9)
    for form in toys.FORMS:
        curve = toys.fitted(form, {"alpha": 1.3, "beta": 0.4}, d)
        found = toys.fit(d, curve)[form]
        assert (found["alpha"], found["beta"], found["r2"]) == pytest.approx((1.3, 0.4, 1.0))


def test_best_of_n_of_a_pool_averages_over_all_its_subsets():
    pool = {"proxy": torch.tensor([[3.0], [1.0], [2.0]]), "gold": torch.tensor([[30.0], [-5.0], [7.0]])}
    # of {3,1}, {3,2}, {1,2} the best are 3, 3, 2
    assert latents.best_of_n(pool, 2) == pytest.approx({"proxy": 8 / 3, "gold": 67 / 3})
    assert latents.best_of_n(pool, 1)["gold"] == pytest.approx(32 / 3)


def test_tilting_a_pool_weighs_it_by_the_exponential_of_the_proxy():
    pool = {"proxy": torch.tensor([[0.0], [math.log(3.0)]])}
    found = latents.tilted(pool, beta=1.0)
    assert found["kl"] == pytest.approx(0.25 * math.log(0.5) + 0.75 * math.log(1.5))
    assert found["proxy"] == pytest.approx(0.75 * math.log(3), rel=1e-6)


def test_pictures_survive_being_written_as_text():
    images = torch.rand(2, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    back = latents.unpacked(json.loads(json.dumps(latents.packed(images))))
    assert np.array_equal(back, (images * 255).round().to(torch.uint8).numpy())


@pytest.fixture
def committed():
    from experiments.reward_overoptimisation import experiment

    path = Path(experiment.__file__).parent / "results" / "full" / "results.json"
    return experiment, json.loads(path.read_text())["results"]


def verdict(experiment, results, words):
    (claim,) = [claim for claim in experiment.claims(results) if words in claim.name]
    return claim.holds


def test_a_proxy_that_falls_at_one_step_is_no_rise(committed):
    experiment, results = committed
    words = "the proxy rises with KL at every step of beta"
    assert verdict(experiment, results, words)
    rewards = results["latents"]["proxies"][0]["rl"]["proxy"]
    rewards[-1] = rewards[-2] - 0.01
    assert not verdict(experiment, results, words)


def test_a_gold_that_rises_to_the_end_or_falls_from_the_start_has_no_peak(committed):
    experiment, results = committed
    words = "the gold of a proxy of 60 images peaks, then falls"
    assert verdict(experiment, results, words)
    for order in (sorted, lambda values: sorted(values, reverse=True)):
        for proxy in results["latents"]["proxies"]:
            proxy["rl"]["gold"] = order(proxy["rl"]["gold"])
        assert not verdict(experiment, results, words)


def test_the_part_that_is_lost_counts_from_the_peak_down():
    from experiments.reward_overoptimisation import experiment

    assert experiment.fall({"gold": [2.0, 5.0, 4.0], "gold_0": 1.0}, "gold") == (1, 0.25)
    assert experiment.fall({"gold": [2.0, 4.0, 5.0], "gold_0": 1.0}, "gold") == (2, 0.0)
