"""vae.token_kl against whole-vocabulary KLs, enumeration and the laws of coarse-graining."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from vae.errors import VAEError
from vae.importance import importance_weights
from vae.kl import kl_categorical
from vae.token_kl import gathered_with_tail, sampler_log_probs, served_kl, token_kl, truncated_kl, with_tail


@pytest.fixture
def noise() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def randn(noise: torch.Generator, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=noise, dtype=torch.float64)


# --- exact, in chunks -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("direction", ["reverse", "forward"])
@pytest.mark.parametrize("chunk", [1, 7, 100])
def test_chunks_have_the_value_and_the_gradient_of_the_whole(noise, direction, chunk):
    pi, ref = randn(noise, 3, 5, 11).requires_grad_(), randn(noise, 3, 5, 11).requires_grad_()
    p, q = (pi, ref) if direction == "reverse" else (ref, pi)
    expected = kl_categorical(p_logits=p, q_logits=q)
    value = token_kl(pi=pi, ref=ref, direction=direction, chunk=chunk)
    torch.testing.assert_close(value, expected)
    weights = randn(noise, 3, 5)
    gradient, of_ref = torch.autograd.grad((weights * value).sum(), (pi, ref), allow_unused=True)
    assert of_ref is None
    torch.testing.assert_close(gradient, torch.autograd.grad((weights * expected).sum(), pi)[0])


def test_heads_are_applied_chunk_by_chunk_and_learn(noise):
    head, ref_head = nn.Linear(4, 11).double(), nn.Linear(3, 11).double()
    states, ref_states = randn(noise, 3, 5, 4).requires_grad_(), randn(noise, 3, 5, 3)
    largest = []
    head.register_forward_hook(lambda module, inputs, output: largest.append(len(output)))
    value = token_kl(pi=states, ref=ref_states, pi_head=head, ref_head=ref_head, chunk=4)
    everything = (states, *head.parameters(), *ref_head.parameters())
    *ours, of_ref, of_ref_bias = torch.autograd.grad(value.sum(), everything, allow_unused=True)
    assert of_ref is None and of_ref_bias is None
    assert max(largest) == 4 and len(largest) == 8  # four chunks, forward and again backward
    expected = kl_categorical(p_logits=head(states), q_logits=ref_head(ref_states))
    torch.testing.assert_close(value, expected)
    torch.testing.assert_close(tuple(ours), torch.autograd.grad(expected.sum(), (states, *head.parameters())))


def test_tokens_and_directions_that_do_not_fit_are_refused(noise):
    with pytest.raises(VAEError, match=r"\(3,\) tokens and the reference of \(4,\)"):
        token_kl(pi=randn(noise, 3, 5), ref=randn(noise, 4, 5))
    with pytest.raises(VAEError, match="reverse"):
        token_kl(pi=randn(noise, 3, 5), ref=randn(noise, 3, 5), direction="backward")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_low_precision_logits_give_the_kl_of_the_same_logits_in_single(noise, dtype):
    pi, ref = (5 * randn(noise, 8, 50)).to(dtype), (5 * randn(noise, 8, 50)).to(dtype)
    assert torch.equal(token_kl(pi=pi, ref=ref), token_kl(pi=pi.float(), ref=ref.float()))
    assert torch.equal(
        truncated_kl(p_logits=pi, q_logits=ref, k=5), truncated_kl(p_logits=pi.float(), q_logits=ref.float(), k=5)
    )


# --- a bucket for the rest --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("of", ["p", "q"])
def test_the_truncated_kl_rises_with_k_from_0_to_the_whole(noise, of):
    p, q = 2 * randn(noise, 500, 20), 2 * randn(noise, 500, 20)
    by_k = torch.stack([truncated_kl(p_logits=p, q_logits=q, k=k, of=of) for k in range(1, 21)])
    assert by_k.min() >= 0 and (by_k.diff(dim=0) >= -1e-12).all()
    torch.testing.assert_close(by_k[-1], kl_categorical(p_logits=p, q_logits=q))
    # 19 tokens leave a bucket of one: nothing is lumped together
    torch.testing.assert_close(by_k[-2], by_k[-1])


def test_the_sum_without_the_bucket_falls_below_zero_for_a_third_of_near_pairs(noise):
    p = randn(noise, 2000, 50)
    p, q = p.log_softmax(-1), (p + 0.3 * randn(noise, 2000, 50)).log_softmax(-1)
    top = p.topk(5, -1).indices
    p_top, q_top = p.gather(-1, top), q.gather(-1, top)
    bare = (p_top.exp() * (p_top - q_top)).sum(-1)
    assert 0.3 < (bare < 0).double().mean() < 0.4
    bucketed = truncated_kl(p_logits=p, q_logits=q, k=5)
    assert bucketed.min() >= 0 and (bucketed <= kl_categorical(p_logits=p, q_logits=q)).all()


def test_a_served_teacher_gives_the_truncated_kl_both_ways_with_the_students_gradient(noise):
    teacher, student = 2 * randn(noise, 6, 12), randn(noise, 6, 12).requires_grad_()
    served = teacher.log_softmax(-1).topk(4, -1)
    pairs = {"teacher_indices": served.indices, "teacher_log_probs": served.values}
    forward = served_kl(student_logits=student, **pairs)
    torch.testing.assert_close(forward, truncated_kl(p_logits=teacher, q_logits=student, k=4))
    reverse = served_kl(student_logits=student, direction="reverse", **pairs)
    torch.testing.assert_close(reverse, truncated_kl(p_logits=student, q_logits=teacher, k=4, of="q"))
    assert torch.autograd.gradcheck(lambda s: served_kl(student_logits=s, **pairs), student)
    assert torch.autograd.gradcheck(lambda s: served_kl(student_logits=s, direction="reverse", **pairs), student)


def test_a_teacher_served_whole_leaves_nothing_for_the_rest_whatever_its_rounding(noise):
    teacher, student = randn(noise, 6, 12).float(), randn(noise, 6, 12).float().requires_grad_()
    served = teacher.log_softmax(-1).topk(12, -1)
    for shift in (-1e-7, 0.0, 1e-7):  # sums just below and above 1
        value = served_kl(
            student_logits=student, teacher_indices=served.indices, teacher_log_probs=served.values + shift
        )
        expected = kl_categorical(p_logits=teacher, q_logits=student)
        torch.testing.assert_close(value, expected, rtol=1e-5, atol=1e-5)
        assert torch.autograd.grad(value.sum(), student)[0].isfinite().all()


@pytest.mark.parametrize(
    ("log_probs", "says"),
    [([0.5, -3.0], "above 0"), ([-0.1, -0.1], "exceed 1"), ([math.nan, -1.0], "NaN")],
)
def test_what_is_no_log_probability_is_refused(log_probs, says):
    with pytest.raises(VAEError, match=says):
        with_tail(torch.tensor(log_probs))


def test_sets_that_make_no_sense_are_refused(noise):
    logits = randn(noise, 6)
    with pytest.raises(VAEError, match="twice"):
        gathered_with_tail(logits, torch.tensor([1, 4, 1]))
    for k in (0, 7):
        with pytest.raises(VAEError, match="between 1 and the 6"):
            truncated_kl(p_logits=logits, q_logits=logits, k=k)
    with pytest.raises(VAEError, match="'p' or of 'q'"):
        truncated_kl(p_logits=logits, q_logits=logits, k=2, of="both")


# --- the sampler ------------------------------------------------------------------------------------------------------


def test_a_sampler_divides_what_it_keeps_by_its_mass():
    logits = torch.tensor([0.5, 0.2, 0.2, 0.1]).double().log()
    torch.testing.assert_close(sampler_log_probs(logits), logits.log_softmax(-1))
    kept = sampler_log_probs(logits, top_p=0.6).exp()  # 0.5 is not enough, 0.7 is; the first of equals is kept
    torch.testing.assert_close(kept.sort(descending=True).values, torch.tensor([5 / 7, 2 / 7, 0, 0]).double())
    torch.testing.assert_close(sampler_log_probs(logits, top_p=0.49).exp(), torch.tensor([1.0, 0, 0, 0]).double())
    torch.testing.assert_close(sampler_log_probs(logits, top_k=1).exp(), torch.tensor([1.0, 0, 0, 0]).double())
    torch.testing.assert_close(sampler_log_probs(logits, temperature=0.5), (2 * logits).log_softmax(-1))
    assert torch.equal(sampler_log_probs(logits, top_k=9), sampler_log_probs(logits))
    for options in ({"temperature": 0.0}, {"top_p": 0.0}, {"top_p": 1.5}, {"top_k": 0}):
        with pytest.raises(VAEError, match="No sampler"):
            sampler_log_probs(logits, **options)


def test_the_whole_softmax_leaves_the_ratio_too_large_by_one_over_the_kept_mass(noise):
    logits, now = randn(noise, 8), randn(noise, 8).log_softmax(-1)
    drawn = sampler_log_probs(logits, top_p=0.7)
    whole = logits.log_softmax(-1)
    kept = drawn.isfinite()
    mass = whole[kept].exp().sum()
    assert mass < 0.95
    mask = torch.ones(int(kept.sum()), 1, dtype=torch.bool)
    right, wrong = (
        importance_weights(log_pi=now[kept, None], log_old=old[kept, None], mask=mask) for old in (drawn, whole)
    )
    torch.testing.assert_close(right, mass * wrong)
    # expectations over what was kept are then those of the present policy, and were 1 / S too large
    f = randn(noise, 8)[kept]
    exact = (now[kept].exp() * f).sum()
    torch.testing.assert_close((drawn[kept].exp() * right[:, 0] * f).sum(), exact)
    torch.testing.assert_close((drawn[kept].exp() * wrong[:, 0] * f).sum(), exact / mass)
