"""What any objective may also ask of a latent that is a map: that it turns and shrinks with the image, or has its spectrum."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from vae.errors import VAEError, choose, whole
from vae.maps import power_by_frequency, quarter_turn, shrunk
from vae.model import VAE
from vae.objectives.elbo import require_not_negative
from vae.precision import full_precision

if TYPE_CHECKING:
    from vae.data.images import Batch
    from vae.data.module import ImageDataModule

SIDES = ("decoder", "encoder")


class Regularizer(nn.Module):
    """A term of a pass of its own, whose mean over images times `weight` joins the loss of an objective.

    Called as an objective is, it returns the term of each image in nats, (B,). It draws from `generator` after the objective
    has, so that at weight 0 a run is bit-identical to one without.
    """

    #: What it is logged as.
    name: str
    weight: Tensor

    def __init__(self, weight: float) -> None:
        super().__init__()
        require_not_negative("regularizer", weight=weight)
        self.register_buffer("weight", torch.tensor(float(weight)))

    def setup(self, vae: VAE, data: ImageDataModule) -> None:
        """Called once, before training. Raises VAEError for a model or data that the term makes no sense with."""
        if not vae.spatial:
            raise VAEError(
                f"regularizer={self.name} is of a latent that is a map, which network=autoencoder_kl has: use that, or "
                "regularizer=none."
            )
        if vae.latent_label:
            raise VAEError(
                f"regularizer={self.name} takes one pass per image, and M2 one per label: use regularizer=none."
            )

    def forward(self, vae: VAE, batch: Batch, generator: torch.Generator, step: int) -> Tensor:
        raise NotImplementedError


class Equivariance(Regularizer):
    """The decoder, or the encoder, held to commute with turning by 90 degrees and with shrinking by the mean of blocks.

    side=decoder: -log p(t x | t z) at a draw of z, so that what is decoded of a transformed latent is the transformed image:
    L_rec(t x, D(t E(x))) of EQ-VAE (Kouzelis et al. 2025, section 3); with t a shrinking alone, the scale equivariance of
    Skorokhodov et al. 2025, whose weight is 0.25. A small image has few pixels, and so few nats. Likelihoods of binary or
    whole pixels see the means of blocks as the grey values that they are.
    side=encoder: 0.5 |E(t x) - t E(x)|^2 of posterior means, the KL of Gaussians of unit variance there. Kouzelis et al. 2025
    call it explicit, and found that it may flatten the latents.

    rotations: by 90, 180 and 270 degrees, or 180 alone where images are not square. scales: by how many each side is divided;
    None is 2 where the places can be halved and side=encoder need find no codes, and nothing otherwise. Step n takes
    transformation n mod their number; outside training the term is the mean over all. Raises VAEError for flat latents, places
    that a scale does not divide, a network of one size only, and where nothing is left to transform by.
    """

    name = "equivariance"

    def __init__(
        self,
        weight: float = 1.0,
        side: str = "decoder",
        rotations: bool = True,
        scales: Sequence[int] | None = None,
    ) -> None:
        super().__init__(weight)
        self.side: str = choose("regularizer.side", side, SIDES)
        self.rotations = rotations
        self.scales = None if scales is None else [whole("regularizer.scales", scale, least=2) for scale in scales]
        #: (turns, divisor), one of which is trivial.
        self.transformations: list[tuple[int, int]] = []

    def setup(self, vae: VAE, data: ImageDataModule) -> None:
        super().setup(vae, data)
        _, height, width = vae.latent_shape
        one_size = vae.discrete and self.side == "encoder"  # whose codes are as many as it was made for
        if one_size and self.scales:
            raise VAEError(
                f"regularizer.scales={self.scales} shrinks images, whose codes the encoder does not find: use "
                "regularizer.scales=[] or regularizer.side=decoder."
            )
        halves = vae.decoder.any_size and height % 2 == width % 2 == 0 and not one_size
        scales = ([2] if halves else []) if self.scales is None else self.scales
        for scale in scales:
            if height % scale or width % scale or not vae.decoder.any_size:
                raise VAEError(
                    f"regularizer.scales={scales} must divide the {height}x{width} places of the latent, and take a network "
                    "that works at any size, as autoencoder_kl does: regularizer.scales=[] leaves them out."
                )
        turns = ((1, 2, 3) if height == width else (2,)) if self.rotations else ()
        self.transformations = [(times, 1) for times in turns] + [(0, scale) for scale in scales]
        if not self.transformations:
            raise VAEError(
                "regularizer=equivariance has nothing to transform by: set regularizer.rotations=true, or regularizer.scales "
                f"to what divides the {height}x{width} places of the latent."
            )

    def forward(self, vae: VAE, batch: Batch, generator: torch.Generator, step: int) -> Tensor:
        posterior = vae.encode(batch.x, batch.y)
        z = posterior.rsample(generator) if self.side == "decoder" else posterior.mean
        maps = z.unflatten(-1, vae.latent_shape)
        chosen = self.transformations
        if self.training:
            chosen = [chosen[step % len(chosen)]]
        return torch.stack([self.distance(vae, batch, maps, _transformed(*one)) for one in chosen]).mean(0)

    def distance(self, vae: VAE, batch: Batch, maps: Tensor, transform: Callable[[Tensor], Tensor]) -> Tensor:
        """How far one transformation is from commuting, in nats, (B,); maps (B, c, h, w)."""
        x, z = transform(batch.x), transform(maps).flatten(1)
        if self.side == "decoder":
            return vae.distortion(x, z, batch.y)
        return 0.5 * (vae.encode(x, batch.y).mean - z).square().sum(-1)


def _transformed(turns: int, divisor: int) -> Callable[[Tensor], Tensor]:
    return lambda t: shrunk(t, divisor) if divisor > 1 else quarter_turn(t, turns)


class Spectrum(Regularizer):
    """KL(s_x || s_z) in nats of two distributions over spatial frequency: shares of power of the image and of a draw of z.

    s_k is the mean power at k cycles per map, k >= 1, averaged over channels, over its sum; the image is shrunk to the places
    of the latent by the mean of blocks. delta: the image's powers are multiplied by k^delta first, 0 asks for its own
    spectrum and about 2, of natural images, for a flat one. Encoding spectrum matching (Ning et al. 2026), with plain powers of
    a Fourier transform where their code takes log(1 + power) of a cosine transform of blurred images. An image without
    any structure counts 0.
    Raises VAEError for flat latents and for maps of fewer than 4 x 4 places, which have one frequency.
    """

    name = "spectrum"
    delta: Tensor

    def __init__(self, weight: float = 1.0, delta: float = 0.0) -> None:
        super().__init__(weight)
        require_not_negative("regularizer", delta=delta)
        self.register_buffer("delta", torch.tensor(float(delta)))

    def setup(self, vae: VAE, data: ImageDataModule) -> None:
        super().setup(vae, data)
        _, height, width = vae.latent_shape
        if min(height, width) < 4:
            raise VAEError(
                f"regularizer=spectrum compares several frequencies, and {height}x{width} places have one: it takes 4x4, with "
                "fewer widths in network.block_out_channels."
            )

    def forward(self, vae: VAE, batch: Batch, generator: torch.Generator, step: int) -> Tensor:
        z = vae.encode(batch.x, batch.y).rsample(generator).unflatten(-1, vae.latent_shape)
        x = shrunk(batch.x, batch.x.shape[-1] // z.shape[-1])
        target = _powers(x)
        frequencies = torch.arange(1, target.shape[-1] + 1, device=x.device)
        of_x, of_z = _shares(target * frequencies**self.delta), _shares(_powers(z))
        smallest = torch.finfo(of_z.dtype).tiny
        return (torch.xlogy(of_x, of_x) - of_x * of_z.clamp(min=smallest).log()).sum(-1)


def _powers(maps: Tensor) -> Tensor:
    """Mean power over channels at each frequency but 0, (N, c, h, w) -> (N, K - 1)."""
    power, _ = power_by_frequency(full_precision(maps))
    return power.mean(1)[:, 1:]


def _shares(power: Tensor) -> Tensor:
    """Each over their sum; all 0 where that is 0."""
    return power / power.sum(-1, keepdim=True).clamp(min=torch.finfo(power.dtype).tiny)
