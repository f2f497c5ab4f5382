"""p(codes): the price of an image's codes in nats. Only these learn from the rate, since codes have no gradient."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from vae.codes import CodePosterior
from vae.errors import VAEError, whole
from vae.networks.autoregressive import MADE
from vae.networks.base import checked_widths
from vae.precision import full_precision
from vae.priors import Prior
from vae.quantizers import Quantizer


class CodePrior(Prior):
    """p(k_1 .. k_m) over the codes of a quantizer, as a Prior over their vectors z.

    A subclass defines `build`, `log_prob_of_codes` and `sample_codes`. The quantizer is used here, not owned.
    """

    def __init__(self, latent_dim: int) -> None:
        super().__init__()
        self.latent_dim = latent_dim

    def read(self, quantizer: Quantizer) -> None:
        """Called once, when the quantizer is known: of so many codes, at so many places."""
        self._quantizer = (quantizer,)  # in a tuple, so that its codebook is saved once, as the posterior's
        self.number, self.places = quantizer.number, quantizer.places
        self.build()

    def build(self) -> None:
        """Make what there is to learn."""

    def log_prob_of_codes(self, indices: Tensor) -> Tensor:
        """log p(k_i | k_1 .. k_(i-1)) of codes (..., m) -> (..., m), in nats."""
        raise NotImplementedError

    def sample_codes(self, n: int, generator: torch.Generator) -> Tensor:
        """n draws, (n, m) int64."""
        raise NotImplementedError

    def log_prob(self, z: Tensor) -> Tensor:
        """log p(codes) of the codes that z is nearest to, (..., D) -> (...), in nats."""
        return self.log_prob_of_codes(self._quantizer[0].indices(z)).sum(-1)

    def sample(self, n: int, generator: torch.Generator) -> Tensor:
        """The vectors of n draws, (n, D)."""
        return self._quantizer[0].vectors(self.sample_codes(n, generator))

    def kl(self, posterior: CodePosterior) -> Tensor:  # type: ignore[override]
        """What each code costs, -log p(k_i | k_1 .. k_(i-1)), (B, m), in nats: KL of the point mass, exactly."""
        return -self.log_prob_of_codes(posterior.indices)


class UniformCodes(CodePrior):
    """Every code as likely as another: m log K nats, whatever the image."""

    origin: Tensor

    def build(self) -> None:
        self.register_buffer("origin", torch.zeros(()), persistent=False)  # knows the device and dtype

    def log_prob_of_codes(self, indices: Tensor) -> Tensor:
        return self.origin.new_full(indices.shape, -math.log(self.number))

    def sample_codes(self, n: int, generator: torch.Generator) -> Tensor:
        return torch.randint(self.number, (n, self.places), generator=generator, device=self.origin.device)


class CategoricalCodes(CodePrior):
    """Independent codes with a learned histogram of each place, or with `shared` one of all; starts as the uniform one."""

    def __init__(self, latent_dim: int, shared: bool = False) -> None:
        super().__init__(latent_dim)
        self.shared = shared

    def build(self) -> None:
        self.logits = nn.Parameter(torch.zeros(1 if self.shared else self.places, self.number))

    def log_prob_of_codes(self, indices: Tensor) -> Tensor:
        log_p = full_precision(self.logits).log_softmax(-1).expand(self.places, self.number)
        return log_p[torch.arange(self.places, device=indices.device), indices]

    def sample_codes(self, n: int, generator: torch.Generator) -> Tensor:
        p = full_precision(self.logits).softmax(-1).expand(self.places, self.number)
        return torch.multinomial(p, n, replacement=True, generator=generator).T


class AutoregressiveCodes(CodePrior):
    """p(k_i | k_1 .. k_(i-1)) by MADE (Germain et al. 2015) over learned embeddings of the codes; starts as the uniform one.

    MADE gives `features` numbers for each place, which one linear layer that all places share turns into K logits.
    Sampling takes m passes. Raises VAEError for a size below 1, or no hidden layer.
    """

    def __init__(
        self, latent_dim: int, hidden: Sequence[int] = (256,), embedding: int = 16, features: int = 64
    ) -> None:
        super().__init__(latent_dim)
        self.hidden = checked_widths(hidden, "prior.hidden")
        if not self.hidden:
            raise VAEError("prior.hidden needs at least one width.")
        self.features = whole("prior.features", features, most=10_000)
        self.width = whole("prior.embedding", embedding, most=10_000)

    def build(self) -> None:
        self.embedding = nn.Embedding(self.number, self.width)
        self.net = MADE(self.places, self.hidden, self.features, channels=self.width)
        self.head = nn.Linear(self.features, self.number)
        nn.init.zeros_(self.head.bias)

    def logits(self, indices: Tensor) -> Tensor:
        """Of every place given the codes before it, (..., m) -> (..., m, K)."""
        inputs = self.embedding(indices).transpose(-1, -2).flatten(-2)
        return full_precision(self.head(self.net(inputs).transpose(-1, -2)))

    def log_prob_of_codes(self, indices: Tensor) -> Tensor:
        return self.logits(indices).log_softmax(-1).gather(-1, indices.unsqueeze(-1)).squeeze(-1)

    @torch.no_grad()
    def sample_codes(self, n: int, generator: torch.Generator) -> Tensor:
        indices = torch.zeros(n, self.places, dtype=torch.long, device=self.head.weight.device)
        for place in range(self.places):
            p = self.logits(indices)[:, place].softmax(-1)
            indices[:, place] = torch.multinomial(p, 1, generator=generator)[:, 0]
        return indices
