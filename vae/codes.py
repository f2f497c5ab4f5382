"""q(z|x) as a point mass on codes, and how many of them are used. A code is a whole number; z holds the codes' vectors."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

MAX_ELEMENTS = 2**24  # distances held at a time


class CodePosterior:
    """A point mass on the m codes of each image: KL(q(z|x) || p(z)) = -log p(codes), exactly.

    indices: (B, m) int64, in 0 .. number - 1; z: (B, D), their vectors, whose gradient is the encoder's; commitment: (B,), what
    the quantizer adds to the loss of each image; learn: called with the generator when z is first drawn in training.
    """

    def __init__(
        self,
        indices: Tensor,
        z: Tensor,
        number: int,
        commitment: Tensor | None = None,
        learn: Callable[[torch.Generator], None] | None = None,
    ) -> None:
        self.indices, self.z, self.number, self.commitment = indices, z, number, commitment
        self._learn = learn

    @property
    def mean(self) -> Tensor:
        """z itself, (B, D)."""
        return self.z

    def rsample(self, generator: torch.Generator, sample_shape: tuple[int, ...] = ()) -> Tensor:
        """z, (*sample_shape, B, D): every draw is the same."""
        if self._learn is not None:
            self._learn(generator)
            self._learn = None
        return self.z.expand(*sample_shape, *self.z.shape)

    def log_prob(self, z: Tensor) -> Tensor:
        """log of the probability of the codes whose vectors are z, (..., B): 0 at the image's own, -inf at any other."""
        own = (z == self.z).all(-1)
        return torch.zeros(own.shape, dtype=z.dtype, device=z.device).masked_fill(~own, -torch.inf)

    def terms(self) -> dict[str, Tensor]:
        """What objectives report of a batch, 0-dim: perplexity, codes_used and, where there is one, the mean commitment."""
        found = usage(histogram(self.indices, self.number))
        return found if self.commitment is None else {**found, "commitment": self.mean_commitment.detach()}

    @property
    def mean_commitment(self) -> Tensor:
        """Over the images, 0-dim: what is added to the loss."""
        return self.z.new_zeros(()) if self.commitment is None else self.commitment.mean()


def histogram(indices: Tensor, number: int) -> Tensor:
    """How often each of `number` codes occurs in `indices`, of any shape -> (number,), in float32."""
    flat = indices.flatten()
    counts = torch.zeros(number, device=flat.device)
    return counts.scatter_add(0, flat, torch.ones(flat.shape, device=flat.device))


def usage(counts: Tensor) -> dict[str, Tensor]:
    """perplexity = exp(entropy in nats) of a histogram (K,), from 1 to K; codes_used, how many of its entries are not 0."""
    shares = counts / counts.sum()
    entropy = -torch.special.xlogy(shares, shares).sum()
    return {"perplexity": entropy.exp(), "codes_used": (counts > 0).sum().to(shares.dtype)}


def nearest(vectors: Tensor, codebook: Tensor) -> Tensor:
    """The index of the row of `codebook` (K, d) that is nearest to each of `vectors` (n, d), (n,); of equals the first."""
    rows = max(1, MAX_ELEMENTS // len(codebook))
    parts = [torch.cdist(part, codebook, compute_mode="donot_use_mm_for_euclid_dist") for part in vectors.split(rows)]
    return torch.cat([distances.argmin(1) for distances in parts])


def sums_by_code(vectors: Tensor, indices: Tensor, number: int) -> Tensor:
    """The sum of the vectors (n, d) of each code, (number, d), in an order that is always the same."""
    codes = torch.arange(number, device=indices.device).split(max(1, MAX_ELEMENTS // len(vectors)))
    with torch.autocast(vectors.device.type, enabled=False):
        return torch.cat([(indices == part[:, None]).to(vectors) @ vectors for part in codes])
