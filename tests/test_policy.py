"""vae.policy against small cases by hand, TRL's formulas, and exact gradients by enumeration."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from vae.advantages import advantages, penalised_reward, token_rewards
from vae.beta import AdaptiveKL, Linear
from vae.errors import VAEError
from vae.kl import kl_categorical
from vae.policy import CISPO, GRPO, GSPO, PENALTIES, DrGRPO, PPOClip, Reinforce
from vae.surrogates import AGGREGATIONS, clipped_loss, reinforce_loss

NAN = math.nan


@pytest.fixture
def batch():
    """Six sequences in two groups of three, of lengths 5, 3, 1, 4, 5, 2, as a policy may have left them behind."""
    noise = torch.Generator().manual_seed(0)
    log_pi, log_old, log_ref = -torch.randn(3, 6, 5, generator=noise, dtype=torch.float64).exp()
    log_pi, log_ref = log_old + 0.3 * (log_pi - log_old), log_old + 0.3 * (log_ref - log_old)
    mask = torch.arange(5) < torch.tensor([5, 3, 1, 4, 5, 2])[:, None]
    rewards = torch.randn(6, generator=noise, dtype=torch.float64)
    return {"log_pi": log_pi, "log_old": log_old, "log_ref": log_ref, "mask": mask, "rewards": rewards}


def on_policy(batch):
    return {name: value for name, value in batch.items() if name != "log_old"}


def call(objective, batch, **more):
    return objective.double()(**{"step": 0, **batch, **more})


# --- by hand ----------------------------------------------------------------------------------------------------------


def test_the_baseline_of_the_release_before_is_taken_with_a_warning():
    returns = torch.tensor([1.0, 2.0, 6.0])
    with pytest.warns(FutureWarning, match="group_normalized"):
        old = advantages(returns, baseline="group_normalised")
    assert torch.equal(old, advantages(returns, baseline="group_normalized"))
    with pytest.warns(FutureWarning, match="group_normalized"):
        assert Reinforce(baseline="group_normalised").baseline == "group_normalized"


def test_worked_numbers_of_the_policy_penalty():
    log_pi = torch.tensor([[-0.5, -1.2, -0.8, -0.3]])
    log_ref = torch.tensor([[-0.3, -0.5, -0.4, -0.2]])
    tokens = {"log_pi": log_pi, "log_ref": log_ref, "mask": torch.ones(1, 4, dtype=torch.bool)}
    rewards = torch.tensor([2.5])
    per_token = penalised_reward(rewards=rewards, beta=0.05, per="token", **tokens)
    assert -per_token.item() == pytest.approx(-2.5175, abs=1e-6)  # k1's mean is -0.35
    per_sequence = penalised_reward(rewards=rewards, beta=0.05, **tokens)
    assert per_sequence.item() == pytest.approx(2.5 + 0.05 * 1.4, abs=1e-6)
    each = token_rewards(rewards=rewards, beta=0.05, **tokens)
    torch.testing.assert_close(each, torch.tensor([[0.01, 0.035, 0.02, 2.505]]))


def test_three_aggregations_of_ragged_sequences():
    values = torch.tensor([[1.0, 2.0, NAN], [6.0, NAN, NAN], [NAN, NAN, NAN], [1.0, 1.0, 1.0]])
    mask = torch.tensor([[1, 1, 0], [1, 0, 0], [0, 0, 0], [1, 1, 1]]).bool()
    expected = {"sequence_sum": (3 + 6 + 0 + 3) / 4, "sequence_mean": (1.5 + 6 + 0 + 1) / 4, "token_mean": 12 / 6}
    assert {name: how(values, mask).item() for name, how in AGGREGATIONS.items()} == pytest.approx(expected)


def test_advantages_of_two_groups():
    returns = torch.tensor([1.0, 2.0, 6.0, 5.0, 5.0, 5.0])
    deviation = math.sqrt(7)  # of 1, 2, 6 with K - 1
    expected = {
        "none": [1, 2, 6, 5, 5, 5],
        "mean": [-2, -1, 3, 0, 0, 0],
        "leave_one_out": [-3, -1.5, 4.5, 0, 0, 0],
        "group_normalized": [-2 / deviation, -1 / deviation, 3 / deviation, 0, 0, 0],
    }
    for baseline, values in expected.items():
        value = advantages(returns, baseline=baseline, group_size=3)
        torch.testing.assert_close(value, torch.tensor(values, dtype=torch.float32))


def test_a_group_of_equal_rewards_has_no_advantage():
    returns = torch.full((7,), 0.1)  # their mean is not 0.1 but for rounding, which divided by itself would be -0.93
    assert torch.equal(advantages(returns, baseline="group_normalized"), torch.zeros(7))


def test_a_group_whose_rewards_differ_by_rounding_has_no_advantage():
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        returns = torch.tensor([0.1 + 0.2, 0.3, 0.3, 0.3], dtype=dtype)
        assert torch.equal(advantages(returns, baseline="group_normalized"), torch.zeros(4))
    nearly = 3.7 - torch.tensor([1, 1 + 1e-7, 1, 1]) * 0.2
    assert torch.equal(advantages(nearly, baseline="group_normalized"), torch.zeros(4))


@pytest.mark.parametrize("scale", [1e-30, 1e-3, 1.0, 1e15])
def test_normalised_advantages_do_not_depend_on_the_scale_of_the_rewards(scale):
    returns = scale * torch.tensor([1.0, 2.0, 6.0])
    expected = torch.tensor([-2.0, -1.0, 3.0]) / math.sqrt(7)
    torch.testing.assert_close(advantages(returns, baseline="group_normalized"), expected)


@pytest.mark.parametrize(
    ("ratio", "advantage", "loss", "slope"),
    [  # clip 0.2; slope: d loss / d log pi
        (1.0, 2.0, -2.0, -2.0),
        (1.1, 2.0, -2.2, -2.2),
        (1.5, 2.0, -2.4, 0.0),  # enough was gained: no more of it
        (0.5, 2.0, -1.0, -1.0),  # a good sample lost is still won back
        (1.5, -2.0, 3.0, 3.0),  # a bad sample gained is still undone
        (0.5, -2.0, 1.6, 0.0),
    ],
)
def test_clipping_removes_the_gain_beyond_the_range_and_never_the_loss(ratio, advantage, loss, slope):
    log_pi = torch.tensor([[math.log(ratio)]], requires_grad=True)
    value = clipped_loss(log_pi=log_pi, log_old=torch.zeros(1, 1), advantages=torch.tensor([advantage]), clip=0.2)
    assert value.item() == pytest.approx(loss)
    assert torch.autograd.grad(value.sum(), log_pi)[0].item() == pytest.approx(slope)


def test_clip_high_widens_the_range_upwards_only():
    log_pi, one = torch.tensor([[1.5, 1.25, 0.5]]).log(), torch.tensor([1.0])
    value = clipped_loss(log_pi=log_pi, log_old=torch.zeros(1, 3), advantages=one, clip=0.2, clip_high=0.28)
    torch.testing.assert_close(value, -torch.tensor([[1.28, 1.25, 0.5]]))
    value = clipped_loss(log_pi=log_pi, log_old=torch.zeros(1, 3), advantages=-one, clip=0.2, clip_high=0.28)
    torch.testing.assert_close(value, torch.tensor([[1.5, 1.25, 0.8]]))


def test_token_rewards_sum_to_the_penalised_reward_and_are_zero_on_padding(batch):
    tokens = {name: batch[name] for name in ("rewards", "log_pi", "log_ref", "mask")}
    each = token_rewards(beta=0.1, **tokens)
    torch.testing.assert_close(each.sum(-1), penalised_reward(beta=0.1, **tokens))
    assert (each[~batch["mask"]] == 0).all()


def test_the_reward_falls_on_the_last_real_token_wherever_the_padding_is():
    zero = torch.zeros(3, 3)
    mask = torch.tensor([[0, 1, 1], [1, 0, 0], [0, 1, 0]]).bool()
    each = token_rewards(rewards=torch.tensor([1.0, 2.0, 3.0]), log_pi=zero, log_ref=zero, mask=mask, beta=0.1)
    torch.testing.assert_close(each, torch.tensor([[0.0, 0, 1], [2, 0, 0], [0, 3, 0]]))


def test_no_gradient_reaches_the_advantages_or_the_old_policy(batch):
    log_pi, log_old, gain = (batch[name].clone().requires_grad_() for name in ("log_pi", "log_old", "rewards"))
    loss = clipped_loss(log_pi=log_pi, log_old=log_old, advantages=gain, clip=0.2)
    (loss + reinforce_loss(log_pi=log_pi, advantages=gain)).sum().backward()
    assert log_pi.grad is not None
    assert log_old.grad is None and gain.grad is None


# --- the reference implementations ------------------------------------------------------------------------------------
# TRL's formulas, written here from its documentation with loops over sequences and tokens instead of masks.


def per_sequence(batch, name):
    lengths = batch["mask"].sum(-1).tolist()
    return [batch[name][i, :length].tolist() for i, length in enumerate(lengths)]


@pytest.mark.parametrize("loss_type", ["sequence_mean", "token_mean"])
@pytest.mark.parametrize("high", [0.2, 0.28])
def test_grpo_is_the_formula_of_trls_grpo_trainer(batch, loss_type, high):
    beta, low, group = 0.04, 0.2, 3
    losses = []
    logs = zip(*(per_sequence(batch, name) for name in ("log_pi", "log_old", "log_ref")), strict=True)
    rewards = batch["rewards"].tolist()
    for i, sequence in enumerate(logs):
        peers = rewards[i // group * group : (i // group + 1) * group]
        mean = sum(peers) / group
        std = math.sqrt(sum((r - mean) ** 2 for r in peers) / (group - 1))
        advantage = (rewards[i] - mean) / std  # TRL has std + 1e-4
        losses.append([])
        for pi, old, ref in zip(*sequence, strict=True):
            ratio = math.exp(pi - old)
            gain = min(ratio * advantage, min(max(ratio, 1 - low), 1 + high) * advantage)
            losses[-1].append(-gain + beta * (math.exp(ref - pi) - (ref - pi) - 1))
    if loss_type == "sequence_mean":  # loss_type "grpo"
        expected = sum(sum(tokens) / len(tokens) for tokens in losses) / len(losses)
    else:  # loss_type "bnpo", and "dapo" over one batch
        expected = sum(map(sum, losses)) / sum(map(len, losses))
    objective = GRPO(3, beta, penalty="loss_k3", aggregation=loss_type, clip=low, clip_high=high)
    assert call(objective, batch)["loss"].item() == pytest.approx(expected, rel=1e-6)


def test_trls_1e_4_in_the_deviation_changes_advantages_by_less_than_one_part_in_a_thousand(batch):
    rewards = batch["rewards"].view(2, 3)
    trl = (rewards - rewards.mean(-1, keepdim=True)) / (rewards.std(-1, keepdim=True) + 1e-4)
    ours = advantages(batch["rewards"], baseline="group_normalized", group_size=3).view(2, 3)
    torch.testing.assert_close(ours, trl, rtol=1e-3, atol=0)


def test_reinforce_is_the_formula_of_trls_rloo_trainer(batch):
    beta, k = 0.1, 3
    rewards = []
    for i, (pi, ref) in enumerate(zip(per_sequence(batch, "log_pi"), per_sequence(batch, "log_ref"), strict=True)):
        rewards.append(batch["rewards"][i].item() - beta * sum(a - b for a, b in zip(pi, ref, strict=True)))
    expected = 0.0
    for i, pi in enumerate(per_sequence(batch, "log_pi")):
        others = [rewards[j] for j in range(i // k * k, (i // k + 1) * k) if j != i]
        expected += -(rewards[i] - sum(others) / (k - 1)) * sum(pi) / 6
    terms = call(Reinforce(beta=beta, group_size=3), on_policy(batch))
    assert terms["loss"].item() == pytest.approx(expected, rel=1e-6)


def test_ppo_has_the_clipped_loss_the_score_and_the_kl_of_trls_ppo_trainer(batch):
    beta, clip = 0.1, 0.2
    kl = [
        [a - b for a, b in zip(old, ref, strict=True)]
        for old, ref in zip(per_sequence(batch, "log_old"), per_sequence(batch, "log_ref"), strict=True)
    ]
    scores = [reward - beta * sum(tokens) for reward, tokens in zip(batch["rewards"].tolist(), kl, strict=True)]
    mean, losses = sum(scores) / 6, []
    for i, (pi, old) in enumerate(zip(per_sequence(batch, "log_pi"), per_sequence(batch, "log_old"), strict=True)):
        advantage = scores[i] - mean
        for a, b in zip(pi, old, strict=True):
            ratio = math.exp(a - b)
            losses.append(max(-advantage * ratio, -advantage * min(max(ratio, 1 - clip), 1 + clip)))
    terms = call(PPOClip(beta=beta, penalty="reward", baseline="mean", clip=clip), batch)
    assert terms["loss"].item() == pytest.approx(sum(losses) / len(losses), rel=1e-6)
    assert terms["kl"].item() == pytest.approx(sum(map(sum, kl)) / 6, rel=1e-6)  # TRL's objective/kl


def test_gspo_dr_grpo_and_cispo_by_hand():
    # one group of two answers, of two tokens and one; ratios 1.1, 1.2 and 0.5
    log_ratio = torch.tensor([[math.log(1.1), math.log(1.2)], [math.log(0.5), NAN]])
    batch = {
        "log_pi": (-1.0 + log_ratio).requires_grad_(),
        "log_old": torch.full((2, 2), -1.0),
        "log_ref": torch.full((2, 2), -1.0),
        "mask": torch.tensor([[True, True], [True, False]]),
        "rewards": torch.tensor([1.0, 3.0]),
        "step": 0,
    }
    a = math.sqrt(0.5)  # normalised advantages -a and a: 2 apart, whose deviation with K - 1 is sqrt(2)

    def found(objective):
        loss = objective(**batch)["loss"]
        return loss.item(), torch.autograd.grad(loss, batch["log_pi"])[0].nan_to_num().tolist()

    s = math.sqrt(1.1 * 1.2)  # beyond the clip, and not held since it pays to come back
    loss, slope = found(GSPO(2, clip=0.1, clip_high=0.1))
    assert loss == pytest.approx((s * a - 0.5 * a) / 2)
    assert slope == [pytest.approx([s * a / 4, s * a / 4]), pytest.approx([-0.5 * a / 2, 0.0])]
    loss, slope = found(DrGRPO(2, clip=0.15))
    assert loss == pytest.approx((1.1 + 1.2 - 0.5) / 2)  # advantages -1 and 1, sums over tokens
    assert slope == [pytest.approx([1.1 / 2, 1.2 / 2]), pytest.approx([-0.5 / 2, 0.0])]
    loss, slope = found(CISPO(2, clip_high=0.15))
    weights = (-a * 1.1, -a * 1.15, a * 0.5)
    log_pi = (-1 + math.log(1.1), -1 + math.log(1.2), -1 + math.log(0.5))
    assert loss == pytest.approx(-sum(w * x for w, x in zip(weights, log_pi, strict=True)) / 3)
    assert slope == [pytest.approx([a * 1.1 / 3, a * 1.15 / 3]), pytest.approx([-a * 0.5 / 3, 0.0])]


def test_dr_grpo_is_unbiased_but_for_the_mean_baseline_and_grpo_weighs_by_length(batch):
    rewards, mask = batch["rewards"], batch["mask"]
    same = {**batch, "log_old": batch["log_pi"]}
    each = torch.where(mask, batch["log_pi"], 0.0)
    centred = rewards - rewards.view(2, 3).mean(-1).repeat_interleave(3)

    def slope(objective):
        log_pi = batch["log_pi"].clone().requires_grad_()
        return torch.autograd.grad(call(objective, {**same, "log_pi": log_pi})["loss"], log_pi)[0]

    torch.testing.assert_close(slope(DrGRPO(3)), -(centred[:, None] / 6).expand_as(each) * mask)
    deviation = rewards.view(2, 3).std(-1).repeat_interleave(3)
    by_length = -(centred / deviation / mask.sum(-1) / 6)[:, None] * mask
    torch.testing.assert_close(slope(GRPO(3, beta=0.0)), by_length)


@pytest.mark.parametrize("make", [GRPO, GSPO, DrGRPO, CISPO])
def test_tokens_that_the_policy_did_not_choose_count_nowhere(batch, make):
    # a tool's output of two tokens in the middle of every answer
    def with_tool(values, inserted):
        return torch.cat([values[:, :1], torch.full((6, 2), inserted, dtype=values.dtype), values[:, 1:]], 1)

    longer = {k: v if k == "rewards" else with_tool(v, False if k == "mask" else NAN) for k, v in batch.items()}
    torch.testing.assert_close(call(make(3, beta=0.1), longer), call(make(3, beta=0.1), batch))


@pytest.mark.parametrize(
    ("make", "unbiased", "published"), [(GRPO, "loss_k3_is", "loss_k3"), (PPOClip, "reward_is", "reward")]
)
def test_the_default_penalty_is_the_unbiased_one_where_log_old_is_given(batch, make, unbiased, published):
    default, corrected, biased = (
        call(make(group_size=3, beta=0.5, **penalty), batch)["loss"]
        for penalty in ({}, {"penalty": unbiased}, {"penalty": published})
    )
    assert default == corrected and (default - biased).abs() > 1e-4


def test_weights_multiply_the_whole_loss_token_by_token(batch):
    weights = torch.rand(6, 5, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    log_pi = batch["log_pi"].clone().requires_grad_()
    slopes = [
        torch.autograd.grad(call(GRPO(3, beta=0.1), {**batch, "log_pi": log_pi}, **more)["loss"], log_pi)[0]
        for more in ({}, {"weights": weights})
    ]
    torch.testing.assert_close(slopes[1], weights * slopes[0])


# --- exact gradients, by going through every sequence -----------------------------------------------------------------

VOCABULARY, LENGTH, END = 3, 3, 0


class TabularPolicy:
    """Sequences over three tokens that end with token 0 or after three; one logit vector for each past."""

    def __init__(self) -> None:
        noise = torch.Generator().manual_seed(1)
        pasts = [past for n in range(LENGTH) for past in itertools.product(range(1, VOCABULARY), repeat=n)]
        self.row = {past: i for i, past in enumerate(pasts)}
        self.logits = torch.randn(len(pasts), VOCABULARY, generator=noise, dtype=torch.float64).requires_grad_()
        self.ref_logits = torch.randn(len(pasts), VOCABULARY, generator=noise, dtype=torch.float64)
        self.sequences = [
            s
            for n in range(1, LENGTH + 1)
            for s in itertools.product(range(VOCABULARY), repeat=n)
            if END not in s[:-1] and (s[-1] == END or n == LENGTH)
        ]
        self.rewards = torch.randn(len(self.sequences), generator=noise, dtype=torch.float64)
        self.mask = torch.tensor([[t < len(s) for t in range(LENGTH)] for s in self.sequences])

    def log_probs(self, logits: torch.Tensor) -> torch.Tensor:
        """(sequences, LENGTH), with NaN on padding."""
        table = logits.log_softmax(-1)
        padding = torch.full((), NAN, dtype=torch.float64)
        return torch.stack(
            [
                torch.stack([table[self.row[s[:t]], s[t]] if t < len(s) else padding for t in range(LENGTH)])
                for s in self.sequences
            ]
        )

    def batch(self) -> dict[str, torch.Tensor]:
        log_ref = self.log_probs(self.ref_logits)
        return {"rewards": self.rewards, "log_pi": self.log_probs(self.logits), "log_ref": log_ref, "mask": self.mask}

    def sequence_log_probs(self, logits: torch.Tensor) -> torch.Tensor:
        return self.log_probs(logits).nan_to_num(0.0).sum(-1)

    def exact_gradient(self, beta: float) -> torch.Tensor:
        """Of -(E[reward] - beta KL(pi || pi_ref)), the KL between distributions of whole sequences."""
        log_pi, log_ref = self.sequence_log_probs(self.logits), self.sequence_log_probs(self.ref_logits)
        objective = (log_pi.exp() * self.rewards).sum() - beta * kl_categorical(p_log_probs=log_pi, q_log_probs=log_ref)
        return torch.autograd.grad(-objective, self.logits)[0]

    def expected_gradient(self, objective, of_group: int) -> torch.Tensor:
        """E[grad loss] over all groups of `of_group` sequences drawn from the policy, samples held fixed."""
        objective = objective.double()
        batch, total = self.batch(), 0.0
        probability = self.sequence_log_probs(self.logits).exp().detach()
        for group in itertools.product(range(len(self.sequences)), repeat=of_group):
            chosen = {name: value[list(group)] for name, value in batch.items()}
            total = total + probability[list(group)].prod() * objective(**chosen, step=0)["loss"]
        return torch.autograd.grad(total, self.logits)[0]


@pytest.fixture
def policy() -> TabularPolicy:
    return TabularPolicy()


def test_the_enumerated_sequences_are_all_there_are(policy):
    assert policy.sequence_log_probs(policy.logits).exp().sum().item() == pytest.approx(1.0)


@pytest.mark.parametrize(("baseline", "of_group"), [("none", 1), ("leave_one_out", 2)])
def test_reinforce_with_the_penalty_in_the_reward_is_unbiased_for_sequences(policy, baseline, of_group):
    beta = 0.5  # exact in single precision
    gradient = policy.expected_gradient(Reinforce(beta=beta, baseline=baseline), of_group)
    torch.testing.assert_close(gradient, policy.exact_gradient(beta))


def test_the_mean_baseline_shrinks_the_gradient_by_one_part_in_k(policy):
    gradient = policy.expected_gradient(Reinforce(beta=0.5, baseline="mean"), 2)
    torch.testing.assert_close(gradient, 0.5 * policy.exact_gradient(0.5))


def test_ppo_on_policy_has_the_gradient_of_reinforce(policy):
    options = {"beta": 0.5, "baseline": "none", "aggregation": "sequence_sum"}
    torch.testing.assert_close(policy.expected_gradient(PPOClip(**options), 1), policy.exact_gradient(0.5))


@pytest.mark.parametrize("penalty", ["loss_k2", "loss_k3"])
def test_the_penalty_in_the_loss_is_each_tokens_kl_given_its_past(policy, penalty):
    policy.rewards.zero_()
    gradient = policy.expected_gradient(Reinforce(beta=0.5, baseline="none", penalty=penalty), 1)
    # the probability of each past, held fixed, times the KL of the next token there
    probability = policy.sequence_log_probs(policy.logits).exp().detach()
    expected = 0.0
    for past, row in policy.row.items():
        visited = sum(p for p, s in zip(probability, policy.sequences, strict=True) if s[: len(past)] == past)
        pi, ref = policy.logits[row], policy.ref_logits[row]
        p, q = (pi, ref) if penalty == "loss_k2" else (ref, pi)
        expected = expected + 0.5 * visited * kl_categorical(p_logits=p, q_logits=q)
    torch.testing.assert_close(gradient, torch.autograd.grad(expected, policy.logits)[0])
    # and so not that of whole sequences: a token's effect on what follows is not seen
    assert (gradient - policy.exact_gradient(0.5)).abs().max() > 0.01


# --- what all of them keep --------------------------------------------------------------------------------------------

ALL = {
    "reinforce": lambda **options: Reinforce(group_size=3, **options),
    "ppo": lambda **options: PPOClip(group_size=3, **options),
    "grpo": lambda **options: GRPO(group_size=3, **options),
    "gspo": lambda **options: GSPO(group_size=3, **options),
    "cispo": lambda **options: CISPO(group_size=3, **options),
}


@pytest.mark.parametrize("penalty", [name for name in PENALTIES if name != "loss_exact"])
@pytest.mark.parametrize("name", ALL)
def test_what_stands_on_padding_is_never_read(batch, name, penalty):
    batch = on_policy(batch) if name == "reinforce" else batch
    objective = ALL[name](penalty=penalty)
    results = []
    for junk in (0.0, NAN, -math.inf, 1e30):
        junked = {k: torch.where(batch["mask"], v, junk) if k.startswith("log") else v for k, v in batch.items()}
        junked["log_pi"].requires_grad_()
        terms = call(objective, junked)
        results.append((terms, torch.autograd.grad(terms["loss"], junked["log_pi"])[0]))
    for other in results[1:]:
        torch.testing.assert_close(other, results[0])
    assert (results[0][1][~batch["mask"]] == 0).all()


@pytest.mark.parametrize("name", ALL)
def test_only_the_loss_has_a_gradient_and_none_reaches_reference_old_policy_or_rewards(batch, name):
    batch = on_policy(batch) if name == "reinforce" else batch
    leaves = {k: v.clone().requires_grad_() if v.is_floating_point() else v for k, v in batch.items()}
    terms = call(ALL[name](), leaves)
    assert {k for k, v in terms.items() if v.requires_grad} == {"loss"}
    terms["loss"].backward()
    assert {k for k, v in leaves.items() if v.grad is not None} == {"log_pi"}


@pytest.mark.parametrize("name", ALL)
def test_at_the_reference_the_penalty_is_nothing_whatever_beta(batch, name):
    batch = {**on_policy(batch), "log_ref": batch["log_pi"]}
    small, large = (call(ALL[name](beta=beta), batch) for beta in (0.0, 8.0))
    torch.testing.assert_close(small["loss"], large["loss"])
    assert small["kl"] == 0 and small["kl_k3"] == 0


def test_the_weight_follows_the_schedule(batch):
    objective = Reinforce(beta=0.5, schedule=Linear(10), group_size=3)
    for step, weight in ((0, 0.0), (5, 0.25), (10, 0.5), (20, 0.5)):
        fixed = call(Reinforce(beta=weight, group_size=3), on_policy(batch))
        scheduled = call(objective, on_policy(batch), step=step)
        torch.testing.assert_close(scheduled, fixed)


def test_a_controller_is_told_the_kl_of_the_sampling_policy_and_only_in_training(batch):
    objective = PPOClip(beta=1.0, schedule=AdaptiveKL(target=1.0, horizon=10), group_size=3).double()
    expected = AdaptiveKL(target=1.0, horizon=10).double()
    objective.eval()
    kl = call(objective, batch)["kl"]
    assert objective.schedule(0) == expected(0)
    objective.train()
    call(objective, batch)
    expected.observe(rate=kl)
    assert objective.schedule(0) == expected(0)
    by_hand = torch.where(batch["mask"], batch["log_old"] - batch["log_ref"], 0.0).sum(-1).mean()
    torch.testing.assert_close(kl, by_hand)


def test_the_adaptive_controller_holds_the_kl_of_a_bandit_at_its_target():
    # On a bandit the optimum at weight w is pi_ref exp(r / w): the KL falls with w, so a target picks one weight.
    noise = torch.Generator().manual_seed(0)
    reward, log_ref = torch.tensor([0.0, 0.5, 1.0, 2.0]), torch.full((4,), math.log(0.25))
    target = 0.4
    schedule = AdaptiveKL(target=target, horizon=20, init=0.2)
    objective = Reinforce(beta=1.0, schedule=schedule)
    logits = log_ref.clone().requires_grad_()
    optimiser = torch.optim.Adam([logits], lr=0.05)
    kls = []
    for step in range(400):
        log_pi = logits.log_softmax(-1)
        token = torch.multinomial(log_pi.detach().exp(), 256, replacement=True, generator=noise)
        sample = {"log_pi": log_pi[token, None], "log_ref": log_ref[token, None], "rewards": reward[token]}
        optimiser.zero_grad()
        objective(mask=torch.ones(256, 1, dtype=torch.bool), step=step, **sample)["loss"].backward()
        optimiser.step()
        kls.append(kl_categorical(p_logits=logits.detach(), q_logits=log_ref).item())
    assert sum(kls[-100:]) / 100 == pytest.approx(target, rel=0.05)
    tilted = log_ref + reward / schedule(0)
    assert kl_categorical(p_logits=tilted, q_logits=log_ref).item() == pytest.approx(target, rel=0.1)


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: Reinforce(beta=-0.1), "zero or more"),
        (lambda: Reinforce(beta=NAN), "zero or more"),
        (lambda: Reinforce(penalty="loss_k1"), "no gradient in expectation"),
        (lambda: Reinforce(penalty="kl"), "reward, reward_is, loss_k2, loss_k3"),
        (lambda: Reinforce(baseline="critic"), "leave_one_out"),
        (lambda: Reinforce(aggregation="mean"), "sequence_mean"),
        (lambda: GRPO(group_size=0), "group_size"),
        (lambda: PPOClip(ratio="answer"), "token, prefix"),
        (lambda: GRPO(3, penalty_ratio="answer"), "token, prefix"),
        (lambda: PPOClip(clip=0.0), "clip"),
        (lambda: PPOClip(clip=1.0), "clip"),
        (lambda: PPOClip(clip_high=-0.1), "clip"),
    ],
)
def test_options_out_of_range_are_refused(make, says):
    with pytest.raises(VAEError, match=says):
        make()


def test_batches_that_do_not_fit_are_refused(batch):
    with pytest.raises(VAEError, match="whole groups of 4"):
        call(GRPO(group_size=4), batch)
    with pytest.raises(VAEError, match="at least two"):
        call(GRPO(group_size=1), batch)
    with pytest.raises(VAEError, match="one shape"):
        call(GRPO(group_size=3), {**batch, "rewards": batch["rewards"][:5]})
    with pytest.raises(VAEError, match="one shape"):
        call(GRPO(group_size=3), {**batch, "mask": batch["mask"][:, :4]})
    with pytest.raises(VAEError, match="log_old"):
        call(Reinforce(group_size=3), batch)
    with pytest.raises(VAEError, match="'sequence' or per 'token'"):
        penalised_reward(beta=0.1, per="batch", **{k: v for k, v in batch.items() if k != "log_old"})


def test_an_advantage_of_each_token_is_taken_as_it_is(batch):
    each = torch.arange(30.0, dtype=torch.float64).view(6, 5)
    torch.testing.assert_close(reinforce_loss(log_pi=batch["log_pi"], advantages=each), -each * batch["log_pi"])


# --- ends of the range ------------------------------------------------------------------------------------------------


def one_token(log_pi: float, log_ref: float, dtype=torch.float32, **more):
    log_pi, log_ref = (torch.full((4, 1), x, dtype=dtype) for x in (log_pi, log_ref))
    rewards = torch.tensor([1.0, 2.0, 3.0, 4.0])
    mask = torch.ones(4, 1, dtype=torch.bool)
    return {"log_pi": log_pi.requires_grad_(), "log_ref": log_ref, "rewards": rewards, "mask": mask, "step": 0, **more}


@pytest.mark.parametrize("options", [{"beta": 0.0}, {"beta": 1.0, "schedule": Linear(10)}])
def test_a_penalty_of_weight_0_is_0_where_its_ratio_overflows(options):
    batch = one_token(-120.0, -1.0)
    terms = GRPO(group_size=4, **options)(**batch)
    terms["loss"].backward()
    assert terms["loss"].item() == pytest.approx(0.0, abs=1e-6)
    expected = -advantages(batch["rewards"], baseline="group_normalized")[:, None] / 4
    torch.testing.assert_close(batch["log_pi"].grad, expected)


def test_a_ratio_that_overflows_is_told_in_a_sentence_and_k2_takes_it():
    with pytest.raises(VAEError, match="119 nats per token away"):
        GRPO(group_size=4)(**one_token(-120.0, -1.0))
    loss = GRPO(group_size=4, penalty="loss_k2", beta=1.0)(**one_token(-120.0, -1.0))["loss"]
    assert loss.item() == pytest.approx(119**2 / 2)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("penalty", [name for name in PENALTIES if name != "loss_exact"])
def test_low_precision_is_computed_in_float32(dtype, penalty):
    half = one_token(-13.0, -1.0, dtype)  # exp(12) overflows in float16
    terms = GRPO(group_size=4, penalty=penalty)(**half)
    assert terms["loss"].dtype == torch.float32
    torch.testing.assert_close(terms, GRPO(group_size=4, penalty=penalty)(**one_token(-13.0, -1.0)))
    assert half["log_pi"].grad_fn is None and torch.autograd.grad(terms["loss"], half["log_pi"])[0].isfinite().all()


def test_rewards_may_be_whole_numbers():
    whole = one_token(-2.0, -1.0, rewards=torch.tensor([0, 1, 1, 0]))
    torch.testing.assert_close(
        GRPO(group_size=4)(**whole), GRPO(group_size=4)(**{**whole, "rewards": whole["rewards"].float()})
    )
    tokens = {name: whole[name] for name in ("rewards", "log_pi", "log_ref", "mask")}
    torch.testing.assert_close(token_rewards(beta=0.1, **tokens).sum(-1), penalised_reward(beta=0.1, **tokens))


@pytest.mark.parametrize("name", ["log_pi", "log_ref", "log_old", "rewards"])
@pytest.mark.parametrize("value", [NAN, -math.inf])
def test_a_number_on_the_mask_that_is_not_finite_is_named(batch, name, value):
    broken = batch[name].clone()
    broken[0] = value
    with pytest.raises(VAEError, match=f"{name} is NaN or infinite"):
        call(GRPO(group_size=3), {**batch, name: broken})


@pytest.mark.parametrize(
    ("make", "unbiased", "biased"), [(GRPO, "loss_k3_is", "loss_k3"), (PPOClip, "reward_is", "reward")]
)
def test_the_penalty_by_default_is_unbiased_off_policy(batch, make, unbiased, biased):
    def loss(**options):
        return call(make(beta=0.5, group_size=3, **options), batch)["loss"]

    assert loss() == loss(penalty=unbiased) and abs(loss() - loss(penalty=biased)) > 1e-3
