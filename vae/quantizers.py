"""Encoders whose latent is a code: finite scalar quantization, and vector quantization by a learned codebook.

z (D,) is m vectors of d numbers, D = d m, and each vector is one of K codes. The first m numbers of z are the first of each
vector, and so on: of a latent that is a map (c, h, w) with c = d, each place has one code.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from vae.codes import CodePosterior, histogram, nearest, sums_by_code
from vae.errors import VAEError, whole
from vae.model import PosteriorFamily

MOST_CODES = 2**20


class Quantizer(PosteriorFamily):
    """The encoder's output (B, D) -> the codes nearest to it. size: d; number: K; places: m.

    Raises VAEError where D is no multiple of d, in a sentence with the option `setting` that d follows from.
    """

    discrete = True

    def __init__(self, latent_dim: int, size: int, number: int, setting: str) -> None:
        super().__init__()
        if latent_dim % size:
            fits = size * -(-latent_dim // size)
            raise VAEError(
                f"model.latent_dim={latent_dim} cannot be split into codes of {size} numbers, which is what {setting} says: "
                f"it takes a multiple of {size}, such as {fits}."
            )
        self.latent_dim = self.encoder_outputs = latent_dim
        self.size, self.number, self.places = size, number, latent_dim // size

    def split(self, z: Tensor) -> Tensor:
        """The vectors of z, (..., D) -> (..., m, d)."""
        return z.unflatten(-1, (self.size, self.places)).transpose(-1, -2)

    def joined(self, vectors: Tensor) -> Tensor:
        """What `split` was given, (..., m, d) -> (..., D)."""
        return vectors.transpose(-1, -2).flatten(-2)

    def indices(self, z: Tensor) -> Tensor:
        """The codes whose vectors are nearest to those of z, (..., D) -> (..., m) int64."""
        raise NotImplementedError

    def vectors(self, indices: Tensor) -> Tensor:
        """z of codes, (..., m) -> (..., D)."""
        raise NotImplementedError


class FiniteScalarQuantizer(Quantizer):
    """FSQ (Mentzer et al. 2024): number i of a vector is squashed to an interval and rounded to one of `levels[i]` values.

    zhat = round(f(e)), f(e) = tanh(e + shift) (L - 1) (1 + eps) / 2 - offset (their appendix A.1); offset is a half for an
    even L and otherwise 0, and shift is such that f(0) = 0. z = zhat / floor(L / 2), in [-1, 1]. The gradient is that of f,
    as if nothing were rounded (straight through). The index is sum_i (zhat_i + floor(L_i / 2)) prod_(j<i) L_j, of K = prod L.

    There is nothing to learn and nothing to add to the loss. Raises VAEError for no level, one below 3, or too many codes.
    """

    EPS = 1e-3

    levels: Tensor
    basis: Tensor

    def __init__(self, latent_dim: int, levels: Sequence[int] = (8, 5, 5, 5)) -> None:
        if not levels:
            raise VAEError("posterior.levels needs at least one number of levels.")
        levels = [whole("posterior.levels", level, least=3, most=MOST_CODES) for level in levels]
        number = math.prod(levels)
        if number > MOST_CODES:
            raise VAEError(f"posterior.levels={levels} makes {number:,} codes, and {MOST_CODES:,} are the most.")
        super().__init__(latent_dim, len(levels), number, f"posterior.levels={levels}")
        basis = [math.prod(levels[:i]) for i in range(len(levels))]
        self.register_buffer("levels", torch.tensor(levels), persistent=False)
        self.register_buffer("basis", torch.tensor(basis), persistent=False)

    def bounded(self, vectors: Tensor) -> Tensor:
        """f of vectors (..., d), which rounds to one of each number's levels, the middle one being 0."""
        half = (self.levels - 1) * (1 + self.EPS) / 2
        offset = torch.where(self.levels % 2 == 0, 0.5, 0.0)
        return torch.tanh(vectors + torch.atanh(offset / half)) * half - offset

    def forward(self, parameters: Tensor) -> CodePosterior:
        bounded = self.bounded(self.split(parameters))
        rounded = bounded.round().detach()
        through = rounded + (bounded - bounded.detach())
        return CodePosterior(self._index(rounded), self.joined(through / (self.levels // 2)), self.number)

    def _index(self, rounded: Tensor) -> Tensor:
        return ((rounded.long() + self.levels // 2) * self.basis).sum(-1)

    def indices(self, z: Tensor) -> Tensor:
        highest = (self.levels - 1) // 2
        scaled = (self.split(z) * (self.levels // 2)).round()
        return self._index(torch.minimum(torch.maximum(scaled, -(self.levels // 2)), highest))

    def vectors(self, indices: Tensor) -> Tensor:
        levels = indices.unsqueeze(-1) // self.basis % self.levels
        half = self.levels // 2
        return self.joined((levels - half) / half)


class VectorQuantizer(Quantizer):
    """VQ (van den Oord et al. 2017): each vector becomes the nearest of a codebook's `codes`, which follow the batches.

    The codebook has no gradient. It is an online k-means (their appendix A.1): n_k <- decay n_k + (1 - decay) (how many of
    the batch's vectors have code k), s_k likewise of their sum, and code k is s_k / n_k with n_k smoothed, (n_k + smoothing)
    N / (N + K smoothing) with N = sum n. A step of decay 0 without smoothing is one of k-means. z takes the codes of before
    the step. `commitment` times |vector - its code|^2, summed over an image's codes, is added to the loss of each image, in
    nats, so that it has to be of the distortion's scale; the decoder's gradient reaches the vector as if it were the code
    (straight through).

    A code with n_k below `restart` times what each would have if all had alike starts anew at a vector of the batch that is
    drawn at random (Dhariwal et al. 2020); in the first step these are most. restart=0 leaves that out. The codebook is a
    part of the weights. Raises VAEError for an option out of its range.
    """

    unpackable = "its codebook follows the batches, which only a run of its own lets it"

    codebook: Tensor
    sizes: Tensor
    sums: Tensor

    def __init__(
        self,
        latent_dim: int,
        codes: int = 512,
        dim: int = 4,
        decay: float = 0.99,
        commitment: float = 0.25,
        restart: float = 0.03,
        smoothing: float = 1e-5,
    ) -> None:
        dim = whole("posterior.dim", dim)
        super().__init__(
            latent_dim, dim, whole("posterior.codes", codes, least=2, most=MOST_CODES), f"posterior.dim={dim}"
        )
        for name, value, most in (
            ("decay", decay, 1.0),
            ("commitment", commitment, math.inf),
            ("restart", restart, 1.0),
            ("smoothing", smoothing, math.inf),
        ):
            if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < most:
                below = "" if most == math.inf else f" and below {most:g}"
                raise VAEError(f"posterior.{name}={value} must be at least 0{below}.")
        self.decay, self.commitment, self.restart, self.smoothing = decay, commitment, restart, smoothing
        self.register_buffer("codebook", torch.randn(codes, dim))
        self.register_buffer("sizes", torch.zeros(codes))
        self.register_buffer("sums", torch.zeros(codes, dim))

    def forward(self, parameters: Tensor) -> CodePosterior:
        vectors = self.split(parameters)
        indices = self._nearest(vectors.detach())
        codes = self.codebook[indices]  # a copy, which a step of the codebook leaves alone
        through = codes + (vectors - vectors.detach())
        commitment = self.commitment * (vectors - codes).square().sum((-2, -1))

        def learn(generator: torch.Generator) -> None:
            self.step(vectors.detach().flatten(0, -2), indices.flatten(), generator)

        return CodePosterior(indices, self.joined(through), self.number, commitment, learn if self.training else None)

    @torch.no_grad()
    def step(self, vectors: Tensor, indices: Tensor, generator: torch.Generator) -> None:
        """Let the codebook follow a batch's vectors (n, d), the nearest codes of which are `indices` (n,)."""
        counts = histogram(indices, self.number).to(self.sizes)
        sums = sums_by_code(vectors.to(self.sums), indices, self.number)
        self.sizes.lerp_(counts, 1 - self.decay)
        self.sums.lerp_(sums, 1 - self.decay)
        total = self.sizes.sum()
        smoothed = (self.sizes + self.smoothing) * total / (total + self.number * self.smoothing)
        self.codebook.copy_(
            torch.where(self.sizes[:, None] > 0, self.sums / smoothed[:, None].clamp(min=1e-30), self.codebook)
        )
        drawn = torch.randint(len(vectors), (self.number,), generator=generator, device=vectors.device)
        alike = len(vectors) / self.number
        dead = self.sizes < self.restart * alike
        self.sizes.masked_fill_(dead, alike)
        self.codebook.copy_(torch.where(dead[:, None], vectors[drawn].to(self.codebook), self.codebook))
        self.sums.copy_(torch.where(dead[:, None], self.codebook * alike, self.sums))

    def _nearest(self, vectors: Tensor) -> Tensor:
        return nearest(vectors.flatten(0, -2), self.codebook.to(vectors)).unflatten(0, vectors.shape[:-1])

    def indices(self, z: Tensor) -> Tensor:
        return self._nearest(self.split(z))

    def vectors(self, indices: Tensor) -> Tensor:
        return self.joined(self.codebook[indices])
