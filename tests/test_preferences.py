"""vae.preferences: zero gradients at the known optima, over all pairs of a small world."""

from __future__ import annotations

import math

import pytest
import torch

from vae.errors import VAEError
from vae.preferences import implicit_reward, preference_loss


@pytest.fixture
def world():
    """Log-probabilities of seven answers under the reference, and their rewards."""
    noise = torch.Generator().manual_seed(0)
    reference, rewards = torch.randn(2, 7, generator=noise, dtype=torch.float64)
    return reference.log_softmax(-1), rewards


def expected_gradient(logits, reference, rewards, beta, kind):
    """Over all ordered pairs of answers, the first preferred with Bradley-Terry's probability."""
    logits = logits.clone().requires_grad_()
    log_pi, total = logits.log_softmax(-1), 0.0
    for first in range(7):
        for second in range(7):
            pair = [log[[i]] for log in (log_pi, reference) for i in (first, second)]
            names = ("log_pi_chosen", "log_pi_rejected", "log_ref_chosen", "log_ref_rejected")
            terms = preference_loss(**dict(zip(names, pair, strict=True)), beta=beta, kind=kind)
            total = total + torch.sigmoid(rewards[first] - rewards[second]) * terms["loss"]
    return torch.autograd.grad(total, logits)[0]


def test_dpo_is_at_rest_at_the_optimum_of_reward_less_beta_kl_and_nowhere_near(world):
    reference, rewards = world
    optimum = reference + rewards / 0.3
    at_rest = expected_gradient(optimum, reference, rewards, 0.3, "dpo")
    torch.testing.assert_close(at_rest, torch.zeros(7).double(), atol=1e-12, rtol=0)
    assert expected_gradient(optimum, reference, rewards, 0.2, "dpo").abs().max() > 0.05
    assert expected_gradient(reference, reference, rewards, 0.3, "dpo").abs().max() > 0.1


def test_the_implicit_reward_of_the_optimum_is_the_reward_but_for_a_constant(world):
    reference, rewards = world
    optimum = (reference + rewards / 0.3).log_softmax(-1)
    difference = implicit_reward(log_pi=optimum, log_ref=reference, beta=0.3) - rewards
    torch.testing.assert_close(difference, difference[:1].expand(7))


def test_ipo_rests_where_the_margin_is_the_preference_over_beta():
    # two answers, the first preferred with probability 0.8: margin / beta = (2 * 0.8 - 1) / (2 beta)
    beta, preferred = 0.4, 0.8
    distance = (2 * preferred - 1) / (2 * beta)
    log_pi = torch.tensor([distance, 0.0], dtype=torch.float64, requires_grad=True)
    zero = torch.zeros(1, dtype=torch.float64)

    def loss(chosen, rejected):
        return preference_loss(
            log_pi_chosen=log_pi[[chosen]],
            log_pi_rejected=log_pi[[rejected]],
            log_ref_chosen=zero,
            log_ref_rejected=zero,
            beta=beta,
            kind="ipo",
        )["loss"]

    total = preferred * loss(0, 1) + (1 - preferred) * loss(1, 0)
    torch.testing.assert_close(torch.autograd.grad(total, log_pi)[0], torch.zeros(2).double(), atol=1e-12, rtol=0)


def test_worked_numbers_of_one_pair():
    logs = {"log_pi_chosen": -1.0, "log_pi_rejected": -2.0, "log_ref_chosen": -1.5, "log_ref_rejected": -1.0}
    logs = {name: torch.tensor([x]) for name, x in logs.items()}
    dpo = preference_loss(beta=0.2, **logs)
    assert dpo["margin"].item() == pytest.approx(0.2 * (0.5 + 1.0))
    assert dpo["loss"].item() == pytest.approx(math.log1p(math.exp(-0.3)))
    assert dpo["accuracy"] == 1
    assert preference_loss(beta=0.2, kind="ipo", **logs)["loss"].item() == pytest.approx((1.5 - 2.5) ** 2)


def test_options_and_numbers_that_make_no_sense_are_refused():
    logs = dict.fromkeys(
        ("log_pi_chosen", "log_pi_rejected", "log_ref_chosen", "log_ref_rejected"), torch.tensor([-1.0])
    )
    with pytest.raises(VAEError, match="beta=0"):
        preference_loss(beta=0.0, **logs)
    with pytest.raises(VAEError, match="'dpo' or 'ipo'"):
        preference_loss(kind="kto", **logs)
    with pytest.raises(VAEError, match="real tokens"):
        preference_loss(**{**logs, "log_ref_chosen": torch.tensor([-math.inf])})
