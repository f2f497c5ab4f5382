"""Off-policy penalties over all sequences of a small Markov policy: expected values and gradients, exactly.

pi_old draws, pi learns; V = 4, up to 4 tokens, 121 sequences, float64.
"""

from __future__ import annotations

import math

import pytest
import torch

from experiments.kl_estimators_off_policy.enumeration import Policies, World, gradient, moments
from vae.advantages import token_rewards
from vae.distillation import (
    distillation_reward,
    drawn_by_student,
    sequence_distillation_loss,
    token_distillation_loss,
)
from vae.errors import VAEError
from vae.importance import RATIOS, importance_weights, log_importance, ratio_k1, ratio_k2, ratio_k3, sequence_kl_loss
from vae.kl import k1, k2, k3
from vae.policy import GRPO, PPOClip, Reinforce
from vae.surrogates import reinforce_loss

EXACT = {"rtol": 1e-12, "atol": 1e-12}
WORLD = World.of(4, 4)
RATIO_PENALTIES = {"k1": ratio_k1, "k2": ratio_k2, "k3": ratio_k3}


@pytest.fixture(params=[0.0, 0.7], ids=["on-policy", "off-policy"])
def policies(request) -> Policies:
    return Policies.draw(seed=0, vocabulary=4, distance=request.param)


@pytest.fixture
def off_policy() -> Policies:
    return Policies.draw(seed=0, vocabulary=4, distance=0.7)


def logs(policies: Policies) -> dict[str, torch.Tensor]:
    return {"log_pi": WORLD.log_probs(policies.pi), "log_ref": WORLD.log_probs(policies.ref)}


def log_ratio(policies: Policies, per: str) -> torch.Tensor:
    log_pi, log_old = WORLD.log_probs(policies.pi), WORLD.log_probs(policies.old)
    return log_importance(log_pi=log_pi, log_old=log_old, mask=WORLD.mask, per=per)


def of_sequences(token_loss: torch.Tensor, policies: Policies):
    """Moments under pi_old of a loss summed over tokens."""
    return moments((token_loss * WORLD.mask).sum(-1), WORLD.probabilities(policies.old), policies.pi)


def test_the_sequences_are_all_there_are(off_policy):
    for logits in off_policy:
        torch.testing.assert_close(WORLD.probabilities(logits).sum(), torch.ones(()).double(), **EXACT)
    assert len(WORLD.tokens) == 121


# --- ratios -----------------------------------------------------------------------------------------------------------


def test_a_ratio_carries_over_the_expectations_that_it_is_there_for(off_policy):
    noise = torch.Generator().manual_seed(1)
    of_sequence = torch.randn(121, generator=noise, dtype=torch.float64)
    p, old = WORLD.probabilities(off_policy.pi).detach(), WORLD.probabilities(off_policy.old)
    ratio = {per: log_ratio(off_policy, per).detach().exp() for per in RATIOS}
    torch.testing.assert_close((old * ratio["sequence"][:, 0] * of_sequence).sum(), (p * of_sequence).sum(), **EXACT)
    # a function of the first two tokens only
    of_two = torch.randn(16, generator=noise, dtype=torch.float64)[4 * WORLD.tokens[:, 0] + WORLD.tokens[:, 1]]
    torch.testing.assert_close((old * ratio["prefix"][:, 1] * of_two).sum(), (p * of_two).sum(), **EXACT)
    assert ((old * ratio["token"][:, 1] * of_two).sum() - (p * of_two).sum()).abs() > 0.01
    # of the first token alone all of them are right, but for GSPO's
    of_one = torch.randn(4, generator=noise, dtype=torch.float64)[WORLD.tokens[:, 0]]
    for per in ("token", "prefix", "sequence"):
        torch.testing.assert_close((old * ratio[per][:, 0] * of_one).sum(), (p * of_one).sum(), **EXACT)
    assert ((old * ratio["geometric"][:, 0] * of_one).sum() - (p * of_one).sum()).abs() > 0.01


def test_ratios_by_hand_and_nothing_on_padding():
    log_pi, log_old = torch.tensor([[-1.0, -2.0, math.nan]]), torch.tensor([[-1.5, -1.0, -9.0]])
    mask = torch.tensor([[True, True, False]])
    expected = {
        "token": [0.5, -1.0, 0.0],
        "prefix": [0.5, -0.5, -0.5],
        "sequence": [-0.5] * 3,
        "geometric": [-0.25] * 3,
    }
    for per, values in expected.items():
        value = log_importance(log_pi=log_pi, log_old=log_old, mask=mask, per=per)
        torch.testing.assert_close(value, torch.tensor([values]))
    with pytest.raises(VAEError, match="token, prefix, sequence, geometric"):
        log_importance(log_pi=log_pi, log_old=log_old, mask=mask, per="batch")


def test_bounded_weights_are_biased_by_exactly_what_they_leave_out(off_policy):
    cap, options = 1.3, {"mask": WORLD.mask, "per": "sequence"}
    pi, old = WORLD.log_probs(off_policy.pi), WORLD.log_probs(off_policy.old)
    p, q = WORLD.probabilities(off_policy.pi).detach(), WORLD.probabilities(off_policy.old)
    f = torch.randn(121, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    w = p / q
    assert 10 < (w > cap).sum() < 111
    free, truncated, masked = (
        importance_weights(log_pi=pi, log_old=old, cap=bound, beyond=beyond, **options)[:, 0]
        for bound, beyond in ((math.inf, "truncate"), (cap, "truncate"), (cap, "mask"))
    )
    assert not free.requires_grad
    torch.testing.assert_close((q * free * f).sum(), (p * f).sum(), **EXACT)
    torch.testing.assert_close(
        (q * truncated * f).sum(), (p * f).sum() - (q * (w - cap).clamp(min=0) * f).sum(), **EXACT
    )
    torch.testing.assert_close((q * masked * f).sum(), (p * f * (w <= cap)).sum(), **EXACT)
    for wrong, says in (({"cap": 0.0}, "cap"), ({"beyond": "drop"}, "'truncate'd or 'mask'ed")):
        with pytest.raises(VAEError, match=says):
            importance_weights(log_pi=pi, log_old=old, **{**options, **wrong})


# --- penalties in the loss --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", RATIO_PENALTIES)
def test_with_a_tokens_ratio_the_gradient_is_each_tokens_kl_on_the_pasts_that_were_drawn(policies, name):
    loss = RATIO_PENALTIES[name](**logs(policies), log_ratio=log_ratio(policies, "token"))
    found = of_sequences(loss, policies)
    expected = WORLD.kl_given_pasts(policies.pi, policies.ref, of=policies.old)
    exact = gradient(lambda pi: WORLD.kl_given_pasts(pi, policies.ref, of=policies.old), policies.pi)
    torch.testing.assert_close(found.gradient, exact, **EXACT)
    if name == "k2":  # whose value is biased
        assert abs(found.value / expected - 1) > 0.01
    else:
        torch.testing.assert_close(found.value, expected, **EXACT)


@pytest.mark.parametrize("per", ["prefix", "sequence"])
@pytest.mark.parametrize("name", ["k1", "k3"])
def test_with_the_ratio_of_all_tokens_so_far_value_and_gradient_are_those_of_whole_sequences(policies, name, per):
    found = of_sequences(RATIO_PENALTIES[name](**logs(policies), log_ratio=log_ratio(policies, per)), policies)
    torch.testing.assert_close(found.value, WORLD.kl(policies.pi, policies.ref), **EXACT)
    exact = gradient(lambda pi: WORLD.kl(pi, policies.ref), policies.pi)
    torch.testing.assert_close(found.gradient, exact, **EXACT)
    if per == "sequence":  # more noise for the same mean, off-policy
        prefix = of_sequences(
            RATIO_PENALTIES[name](**logs(policies), log_ratio=log_ratio(policies, "prefix")), policies
        )
        assert found.gradient_sd > prefix.gradient_sd


def test_k2_with_the_prefix_ratio_is_each_tokens_kl_on_the_pasts_of_the_present_policy(policies):
    found = of_sequences(ratio_k2(**logs(policies), log_ratio=log_ratio(policies, "prefix")), policies)
    exact = gradient(lambda pi: WORLD.kl_given_pasts(pi, policies.ref, of=policies.pi.detach()), policies.pi)
    torch.testing.assert_close(found.gradient, exact, **EXACT)
    missed = gradient(lambda pi: WORLD.kl(pi, policies.ref), policies.pi) - exact
    assert missed.norm() > 0.1  # how a token changes what follows


def test_off_policy_without_ratios_k1_flees_the_sampler_and_k2_and_k3_are_biased(off_policy):
    def found(estimator):
        return of_sequences(estimator(**logs(off_policy)), off_policy).gradient

    flees = gradient(lambda pi: -WORLD.kl_given_pasts(off_policy.old, pi, of=off_policy.old), off_policy.pi)
    torch.testing.assert_close(found(k1), flees, **EXACT)
    exact = gradient(lambda pi: WORLD.kl_given_pasts(pi, off_policy.ref, of=off_policy.old), off_policy.pi)
    for estimator in (k2, k3):
        assert (found(estimator) - exact).norm() / exact.norm() > 0.1


def test_a_detached_ratio_makes_k3_descend_the_forward_kl_and_k2_with_its_ratio_neither(off_policy):
    ratio = log_ratio(off_policy, "token")
    forward = gradient(lambda pi: WORLD.kl_given_pasts(off_policy.ref, pi, of=off_policy.old), off_policy.pi)
    detached = of_sequences(ratio_k3(**logs(off_policy), log_ratio=ratio.detach()), off_policy).gradient
    torch.testing.assert_close(detached, forward, **EXACT)
    reverse = gradient(lambda pi: WORLD.kl_given_pasts(pi, off_policy.ref, of=off_policy.old), off_policy.pi)
    undetached = of_sequences(ratio.exp() * k2(**logs(off_policy)), off_policy).gradient
    for direction in (forward, reverse):
        assert (undetached - direction).norm() / direction.norm() > 0.05


# --- exact next-token KL along sampled prefixes -----------------------------------------------------------------------


def test_the_rao_blackwell_sum_is_unbiased_for_whole_sequences_in_value_and_gradient(policies):
    log_pi, token_kl = WORLD.log_probs(policies.pi), WORLD.token_kl(policies.pi, policies.ref)
    loss = sequence_kl_loss(token_kl=token_kl, log_pi=log_pi, mask=WORLD.mask, log_old=WORLD.log_probs(policies.old))
    found = moments(loss, WORLD.probabilities(policies.old), policies.pi)
    torch.testing.assert_close(found.value, WORLD.kl(policies.pi, policies.ref), **EXACT)
    exact = gradient(lambda pi: WORLD.kl(pi, policies.ref), policies.pi)
    torch.testing.assert_close(found.gradient, exact, **EXACT)
    sampled = of_sequences(ratio_k1(**logs(policies), log_ratio=log_ratio(policies, "prefix")), policies)
    assert found.value_sd < sampled.value_sd and found.gradient_sd < sampled.gradient_sd


def test_the_token_that_was_averaged_over_brings_no_noise_of_its_own():
    world, policies = World.of(4, 1), Policies.draw(seed=0, vocabulary=4, distance=0.7)
    log_pi, log_old = world.log_probs(policies.pi), world.log_probs(policies.old)
    token_kl = world.token_kl(policies.pi, policies.ref)
    loss = sequence_kl_loss(token_kl=token_kl, log_pi=log_pi, mask=world.mask, log_old=log_old)
    found = moments(loss, world.probabilities(policies.old), policies.pi)
    assert found.value_sd < 1e-12 and found.gradient_sd < 1e-12


def test_its_variance_is_never_above_k1s_whatever_the_prefix():
    policies = Policies.draw(seed=0, vocabulary=4, distance=0.0)
    probability = WORLD.probabilities(policies.pi).detach()
    exact, sampled = WORLD.token_kl(policies.pi, policies.ref), k1(**logs(policies)) * WORLD.mask
    compared = 0
    for t in range(4):
        for prefix in {tuple(s[:t]) for s, m in zip(WORLD.tokens.tolist(), WORLD.mask.tolist(), strict=True) if m[t]}:
            here = torch.tensor(
                [s[:t] == list(prefix) and m[t] for s, m in zip(WORLD.tokens.tolist(), WORLD.mask, strict=True)]
            )
            p = probability[here] / probability[here].sum()
            variances = []
            for estimator in (exact, sampled):
                rest = estimator[here, t:].detach().sum(-1)
                variances.append((p * (rest - (p * rest).sum()).square()).sum())
            assert variances[0] <= variances[1] + 1e-12
            compared += 1
    assert compared == 1 + 3 + 9 + 27


# --- k1 in the reward -------------------------------------------------------------------------------------------------


def test_k1_in_the_reward_with_reward_to_go_is_exact_for_whole_sequences_on_policy():
    policies = Policies.draw(seed=0, vocabulary=4, distance=0.0)
    batch = {**logs(policies), "mask": WORLD.mask}
    each = token_rewards(rewards=torch.zeros(121), beta=1.0, **batch)
    to_go = each.flip(-1).cumsum(-1).flip(-1)
    exact = gradient(lambda pi: WORLD.kl(pi, policies.ref), policies.pi)
    found = of_sequences(reinforce_loss(log_pi=batch["log_pi"], advantages=to_go), policies)
    torch.testing.assert_close(found.gradient, exact, **EXACT)
    # the token's own reward alone misses what follows: that of the tokens' KLs
    alone = of_sequences(reinforce_loss(log_pi=WORLD.log_probs(policies.pi), advantages=each), policies).gradient
    tokens = gradient(lambda pi: WORLD.kl_given_pasts(pi, policies.ref, of=policies.pi.detach()), policies.pi)
    torch.testing.assert_close(alone, tokens, **EXACT)


@pytest.mark.parametrize("penalty", ["reward", "reward_is"])
def test_off_policy_the_reward_of_the_sampler_lacks_the_kl_to_it_and_that_of_the_present_lacks_nothing(
    off_policy, penalty
):
    beta, rewards = 0.5, torch.randn(121, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    objective = PPOClip(
        beta, penalty=penalty, baseline="none", aggregation="sequence_mean", ratio="sequence", clip=0.999, clip_high=1e9
    ).double()
    # weighed by the probabilities of the sequences, the batch is its own expectation
    weights = 121 * WORLD.probabilities(off_policy.old)[:, None].expand(121, 4)
    old = {"log_old": WORLD.log_probs(off_policy.old), "weights": weights}
    loss = objective(rewards=rewards, mask=WORLD.mask, step=0, **logs(off_policy), **old)["loss"]
    found = torch.autograd.grad(loss, off_policy.pi)[0]

    def objective_of(pi):
        exact = beta * WORLD.kl(pi, off_policy.ref) - (WORLD.probabilities(pi) * rewards).sum()
        return exact - (beta * WORLD.kl(pi, off_policy.old) if penalty == "reward" else 0.0)

    torch.testing.assert_close(found, gradient(objective_of, off_policy.pi), **EXACT)


# --- as a part of the objectives --------------------------------------------------------------------------------------


@pytest.mark.parametrize("penalty", ["loss_k1_is", "loss_k2_is", "loss_k3_is", "loss_exact"])
@pytest.mark.parametrize("per", ["token", "prefix"])
def test_the_objectives_add_beta_times_the_penalty_that_they_name(off_policy, penalty, per):
    beta = 0.5
    objective = GRPO(121, beta, penalty=penalty, penalty_ratio=per, aggregation="sequence_sum").double()
    log_old = WORLD.log_probs(off_policy.old)
    token_kl = WORLD.token_kl(off_policy.pi, off_policy.ref)
    same = {"rewards": torch.zeros(121), "mask": WORLD.mask, "step": 0, "log_old": log_old, **logs(off_policy)}
    loss = objective(token_kl=token_kl, **same)["loss"]
    if penalty == "loss_exact":
        before = {"token": torch.zeros(121, 4), "prefix": log_ratio(off_policy, per) - log_ratio(off_policy, "token")}
        each = before[per].exp() * token_kl
    else:
        each = RATIO_PENALTIES[penalty[5:7]](**logs(off_policy), log_ratio=log_ratio(off_policy, per)) * WORLD.mask
    expected = beta * each.sum(-1).mean()
    found, right = (torch.autograd.grad(value, off_policy.pi, retain_graph=True)[0] for value in (loss, expected))
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(found, right)
    if penalty == "loss_exact":
        with pytest.raises(VAEError, match="token_kl"):
            objective(**same)


@pytest.mark.parametrize("make", [GRPO, Reinforce])
def test_without_log_old_the_default_penalties_are_those_of_the_present_policy(make):
    policies = Policies.draw(seed=0, vocabulary=4, distance=0.0)
    objective = make(group_size=121, beta=1.0, penalty="loss_k3_is", aggregation="sequence_sum").double()
    terms = objective(rewards=torch.zeros(121), mask=WORLD.mask, step=0, **logs(policies))
    expected = (k3(**logs(policies)) * WORLD.mask).sum(-1).mean()
    torch.testing.assert_close(terms["loss"].detach(), expected.detach())


# --- distillation on the student's own text ---------------------------------------------------------------------------


def distilled(policies: Policies, loss: torch.Tensor):
    return moments(loss, WORLD.probabilities(policies.old), policies.pi)


def test_sequence_distillation_has_the_gradient_of_the_kl_of_whole_answers(policies):
    loss = sequence_distillation_loss(
        student_logits=WORLD.next_logits(policies.pi),
        teacher_logits=WORLD.next_logits(policies.ref),
        tokens=WORLD.tokens,
        mask=WORLD.mask,
        log_old=WORLD.log_probs(policies.old),
    )
    found = distilled(policies, loss)
    torch.testing.assert_close(found.value, WORLD.kl(policies.pi, policies.ref), **EXACT)
    torch.testing.assert_close(found.gradient, gradient(lambda pi: WORLD.kl(pi, policies.ref), policies.pi), **EXACT)


def test_token_distillation_on_own_answers_has_its_value_and_lacks_how_a_token_changes_what_follows():
    policies = Policies.draw(seed=0, vocabulary=4, distance=0.0)
    loss = token_distillation_loss(
        student_logits=WORLD.next_logits(policies.pi), teacher_logits=WORLD.next_logits(policies.ref), mask=WORLD.mask
    )
    found = distilled(policies, loss)
    torch.testing.assert_close(found.value, WORLD.kl(policies.pi, policies.ref), **EXACT)
    tokens = gradient(lambda pi: WORLD.kl_given_pasts(pi, policies.ref, of=policies.pi.detach()), policies.pi)
    torch.testing.assert_close(found.gradient, tokens, **EXACT)


def test_distillation_as_a_reward_has_the_gradient_of_the_kl_of_whole_answers():
    policies = Policies.draw(seed=0, vocabulary=4, distance=0.0)
    log_student, log_teacher = logs(policies).values()
    reward = distillation_reward(log_student=log_student, log_teacher=log_teacher, mask=WORLD.mask)
    assert not reward.requires_grad and (reward[~WORLD.mask] == 0).all()
    loss = reinforce_loss(log_pi=log_student, advantages=reward).sum(-1)
    exact = gradient(lambda pi: WORLD.kl(pi, policies.ref), policies.pi)
    torch.testing.assert_close(distilled(policies, loss).gradient, exact, **EXACT)


def test_the_students_share_of_the_answers_is_what_was_asked_for():
    noise = torch.Generator().manual_seed(0)
    for fraction in (0.0, 0.3, 1.0):
        share = drawn_by_student(10_000, fraction, noise).float().mean().item()
        assert share == pytest.approx(fraction, abs=0.02 if 0 < fraction < 1 else 0)
    with pytest.raises(VAEError, match="between 0 and 1"):
        drawn_by_student(3, 1.1, noise)


def test_the_kl_of_a_first_token_has_no_ratio():
    one = {"log_pi": torch.tensor([[-1.0, -1.0]]), "log_old": torch.tensor([[-2.0, -1.5]])}
    found = sequence_kl_loss(token_kl=torch.tensor([[0.7, 0.2]]), mask=torch.ones(1, 2, dtype=torch.bool), **one)
    torch.testing.assert_close(found, torch.tensor([0.7 + math.e * 0.2]))
