"""Small Markov policies over sequences, all of whose sequences are enumerated: expectations and their gradients, exactly."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from vae.importance import real
from vae.kl import kl_categorical
from vae.seeding import generator

END = 0  # the token that ends a sequence


class World(NamedTuple):
    """All sequences of up to L of V tokens, where token 0 ends one. tokens, mask, past (N, L); past: the token before,
    V at the start, the row of the policy's logits (V + 1, V) that the next token is drawn by."""

    tokens: Tensor
    mask: Tensor
    past: Tensor

    @classmethod
    def of(cls, vocabulary: int, length: int) -> World:
        found = [
            s
            for n in range(1, length + 1)
            for s in itertools.product(range(vocabulary), repeat=n)
            if END not in s[:-1] and (s[-1] == END or n == length)
        ]
        padded = torch.tensor([[*s, *[END] * (length - len(s))] for s in found])
        mask = torch.tensor([[t < len(s) for t in range(length)] for s in found])
        past = torch.cat([torch.full((len(found), 1), vocabulary), padded[:, :-1]], 1)
        return cls(padded, mask, past)

    def next_logits(self, logits: Tensor) -> Tensor:
        """Logits of the next token at each place: (N, L, V)."""
        return logits[self.past]

    def log_probs(self, logits: Tensor) -> Tensor:
        """Of each token of each sequence: (N, L), 0 on padding."""
        table = self.next_logits(logits).log_softmax(-1)
        return real(table.gather(-1, self.tokens.unsqueeze(-1)).squeeze(-1), self.mask)

    def probabilities(self, logits: Tensor) -> Tensor:
        """Of each sequence: (N,)."""
        return self.log_probs(logits).sum(-1).exp()

    def kl(self, p: Tensor, q: Tensor) -> Tensor:
        """KL(p || q) of whole sequences, 0-dim, exact."""
        return kl_categorical(p_log_probs=self.log_probs(p).sum(-1), q_log_probs=self.log_probs(q).sum(-1))

    def token_kl(self, p: Tensor, q: Tensor) -> Tensor:
        """KL of the next token at each place: (N, L), 0 on padding."""
        return real(kl_categorical(p_logits=self.next_logits(p), q_logits=self.next_logits(q)), self.mask)

    def kl_given_pasts(self, p: Tensor, q: Tensor, of: Tensor) -> Tensor:
        """sum over pasts of their probability under `of`, held fixed, times the KL of the next token there; 0-dim."""
        return (self.probabilities(of).detach() * self.token_kl(p, q).sum(-1)).sum()


class Policies(NamedTuple):
    """Logits (V + 1, V) of the policy, of the one that drew the samples, and of the reference, float64."""

    pi: Tensor
    old: Tensor
    ref: Tensor

    @classmethod
    def draw(cls, seed: int, vocabulary: int, distance: float, from_ref: float = 1.0) -> Policies:
        """pi_old is pi plus `distance` times a fixed direction; at distance 0 the samples are on-policy."""
        noise = generator(seed, "policies")
        shape = (vocabulary + 1, vocabulary)
        pi, away, ref = (torch.randn(shape, generator=noise, dtype=torch.float64) for _ in range(3))
        return cls(pi.requires_grad_(), pi.detach() + distance * away, pi.detach() + from_ref * ref)


class Moments(NamedTuple):
    """Of a loss of one sequence drawn by pi_old: mean and sd of its value, mean of its gradient, and the gradient's sd,
    the root of the mean squared distance from that mean."""

    value: Tensor
    value_sd: Tensor
    gradient: Tensor
    gradient_sd: Tensor


def moments(loss: Tensor, probabilities: Tensor, parameters: Tensor) -> Moments:
    """loss, probabilities (N,): exact over all sequences."""
    each = torch.autograd.grad(loss, parameters, torch.eye(len(loss), dtype=loss.dtype), is_grads_batched=True)[0]
    p, values, each = probabilities.detach(), loss.detach(), each.flatten(1)
    value, gradient = (p * values).sum(), p @ each
    spread = p @ (each - gradient).square().sum(-1)
    return Moments(value, (p @ (values - value).square()).sqrt(), gradient.view_as(parameters), spread.sqrt())


def gradient(of: Callable[[Tensor], Tensor], at: Tensor) -> Tensor:
    """Of a 0-dim function of logits."""
    at = at.detach().clone().requires_grad_()
    return torch.autograd.grad(of(at), at)[0]
