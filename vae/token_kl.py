"""KL of next-token distributions: exact, in chunks over the tokens; of the likeliest tokens and a bucket for the rest; and
the distribution that a sampler really drew from.

Directions are those of `vae.kl`: for a policy pi and a fixed reference, reverse is KL(pi || ref), forward KL(ref || pi).
Logits (..., V); everything is computed in float32 at least, in nats.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from vae.errors import VAEError
from vae.kl import kl_categorical
from vae.precision import full_precision

DIRECTIONS = ("reverse", "forward")


def _directed(pi: Tensor, ref: Tensor, direction: str) -> Tensor:
    """KL of two log-probabilities or logits, (..., K) -> (...)."""
    p, q = (pi, ref) if direction == "reverse" else (ref, pi)
    return kl_categorical(p_logits=p, q_logits=q)


def _check_direction(direction: str) -> None:
    if direction not in DIRECTIONS:
        raise VAEError(f"A KL of pi and a reference is 'reverse' or 'forward', not {direction!r}.")


# --------------------------------------------------------------------------------------------------------------- exact


def token_kl(
    *,
    pi: Tensor,
    ref: Tensor,
    pi_head: Callable[[Tensor], Tensor] | None = None,
    ref_head: Callable[[Tensor], Tensor] | None = None,
    direction: str = "reverse",
    chunk: int = 64,
) -> Tensor:
    """The exact KL of each next-token distribution, (...,), a value and a loss: gradients reach pi and its head.

    pi, ref: logits (..., V), or with heads the states (..., H) that they turn into logits, such as
    `pi_head=model.lm_head`. Then no (tokens, V) block is ever made: `chunk` tokens at a time are, and once more in the
    backward pass, where the logits are computed again. Along sampled answers the sum over tokens has the mean of k1 and
    never more variance (Rao-Blackwell; Amini et al. 2025). No gradient reaches ref.
    Raises VAEError for another direction, or numbers of tokens that differ.
    """
    _check_direction(direction)
    if pi.shape[:-1] != ref.shape[:-1]:
        raise VAEError(f"pi is of {tuple(pi.shape[:-1])} tokens and the reference of {tuple(ref.shape[:-1])}.")

    def of_chunk(pi_part: Tensor, ref_part: Tensor) -> Tensor:
        with torch.no_grad():
            ref_logits = ref_part if ref_head is None else ref_head(ref_part)
        return _directed(pi_part if pi_head is None else pi_head(pi_part), ref_logits, direction)

    parts = zip(pi.flatten(0, -2).split(chunk), ref.detach().flatten(0, -2).split(chunk), strict=True)
    if torch.is_grad_enabled():
        values = [checkpoint(of_chunk, *part, use_reentrant=False) for part in parts]
    else:
        values = [of_chunk(*part) for part in parts]
    return torch.cat(values).view(pi.shape[:-1])


# ----------------------------------------------------------------------------------------- the likeliest, and the rest


def with_tail(log_probs: Tensor) -> Tensor:
    """log-probabilities (..., k) of some tokens, as a teacher is served over a network, and of all others: (..., k + 1).

    Where they make up 1 the others are left what rounding cannot tell from nothing, eps, so that a KL to them is finite.
    Raises VAEError where they are no log-probabilities: above 0, NaN, or of more than 1 in all, beyond rounding.
    """
    log_probs = full_precision(log_probs)
    total = log_probs.exp().sum(-1, keepdim=True)
    if not ((log_probs <= 1e-3) & (total <= 1 + 1e-3)).all():
        raise VAEError("These are no log-probabilities of some tokens: one is NaN or above 0, or they exceed 1 in all.")
    rest = torch.log((1 - total).clamp(min=torch.finfo(total.dtype).eps))
    return torch.cat([log_probs, rest], -1)


def gathered_with_tail(logits: Tensor, indices: Tensor) -> Tensor:
    """log-probabilities of the tokens `indices` (..., k), and of all others, from logits (..., V): (..., k + 1).

    Raises VAEError for a token named twice.
    """
    if (indices.sort(-1).values.diff(dim=-1) == 0).any():
        raise VAEError("A token stands twice among the indices, and would be counted twice.")
    log_probs = torch.log_softmax(full_precision(logits), -1)
    chosen = log_probs.gather(-1, indices)
    if indices.shape[-1] == logits.shape[-1]:
        rest = torch.full_like(chosen[..., :1], -torch.inf)
    else:
        rest = log_probs.scatter(-1, indices, -torch.inf).logsumexp(-1, keepdim=True)
    return torch.cat([chosen, rest], -1)


def truncated_kl(*, p_logits: Tensor, q_logits: Tensor, k: int, of: str = "p") -> Tensor:
    """KL(p || q) of the k likeliest tokens of p (or of q) and one bucket for all others: (...,), in nats.

    Between 0 and KL(p || q), rising with k, equal at k = V: lumping tokens together can only hide differences. The sum
    over the k tokens alone, without the bucket, is no divergence: it falls below 0 (at k = 5 of 50 for a third of random
    pairs whose logits are 0.3 apart), and its least value is not where p = q. For other sets of tokens and other
    divergences give `gathered_with_tail` of both to them. Raises VAEError unless 1 <= k <= V and `of` is "p" or "q".
    """
    vocabulary = p_logits.shape[-1]
    if not 1 <= k <= vocabulary:
        raise VAEError(f"k must be between 1 and the {vocabulary} tokens that there are, not {k}.")
    if of not in ("p", "q"):
        raise VAEError(f"The likeliest tokens are those of 'p' or of 'q', not {of!r}.")
    indices = (p_logits if of == "p" else q_logits).detach().topk(k, -1).indices
    return kl_categorical(
        p_log_probs=gathered_with_tail(p_logits, indices), q_log_probs=gathered_with_tail(q_logits, indices)
    )


def served_kl(
    *, student_logits: Tensor, teacher_indices: Tensor, teacher_log_probs: Tensor, direction: str = "forward"
) -> Tensor:
    """`truncated_kl` of a teacher of whom only some tokens are known, (indices, log-probabilities) both (..., k): (...,).

    forward: KL(teacher || student), reverse: KL(student || teacher), the student being pi. No gradient reaches the
    teacher. Raises VAEError as `with_tail` and `gathered_with_tail` do.
    """
    _check_direction(direction)
    teacher = with_tail(teacher_log_probs.detach())
    student = gathered_with_tail(student_logits, teacher_indices)
    if teacher_indices.shape[-1] == student_logits.shape[-1]:  # there are no others
        teacher, student = teacher[..., :-1], student[..., :-1]
    p, q = (teacher, student) if direction == "forward" else (student, teacher)
    return kl_categorical(p_log_probs=p, q_log_probs=q)


# ---------------------------------------------------------------------------------------------------------- the sampler


def sampler_log_probs(
    logits: Tensor, *, temperature: float = 1.0, top_k: int | None = None, top_p: float = 1.0
) -> Tensor:
    """log-probabilities that a sampler draws with, (..., V): at a temperature, of the top_k likeliest, of those the fewest
    that hold a share top_p; -inf for what is cut off.

    What is kept is divided by its mass S, so that a ratio pi / pi_old taken with the whole softmax is too large by 1 / S at
    each token: log_old of such samples must be this. Raises VAEError unless temperature > 0, 1 <= top_k, 0 < top_p <= 1.
    """
    if not (temperature > 0 and 0 < top_p <= 1 and (top_k is None or top_k >= 1)):
        raise VAEError(f"No sampler: temperature {temperature} > 0, top_k {top_k} >= 1, 0 < top_p {top_p} <= 1.")
    logits = full_precision(logits) / temperature
    if top_k is not None and top_k < logits.shape[-1]:
        logits = logits.masked_fill(logits < logits.topk(top_k, -1).values[..., -1:], -torch.inf)
    if top_p < 1:
        probs, order = logits.softmax(-1).sort(-1, descending=True)
        cut = probs.cumsum(-1) - probs >= top_p  # the likelier ones already hold the share
        logits = logits.masked_fill(torch.zeros_like(cut).scatter(-1, order, cut), -torch.inf)
    return torch.log_softmax(logits, -1)
