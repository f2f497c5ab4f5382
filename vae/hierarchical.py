"""Two layers of latents, as in Burda et al. 2016: q(h1|x) q(h2|h1) and p(h2) p(h1|h2) p(x|h1).

It is the ordinary VAE with other distributions in it: z = [h1 | h2] side by side, a posterior and a prior that factorise
over the two layers, and a decoder that reads h1 alone. So every objective that needs no more than draws and densities,
and every measure of such a model, serves it as it is. KL(q || p) is estimated by log q - log p at the z drawn.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from vae.gaussian import DiagonalGaussian
from vae.model import PosteriorFamily
from vae.networks.base import Decoder, checked_widths, dense_layers
from vae.priors import Prior, StandardNormal


class GaussianLayer(nn.Module):
    """p(b|a) = N(mean(a), diag(exp(log_var(a)))), a (..., inputs) -> (..., outputs): dense layers, then both heads.

    Glorot-uniform weights and zero biases, as Burda et al. 2016 start all layers.
    """

    def __init__(self, inputs: int, outputs: int, hidden: Sequence[int], activation: str) -> None:
        super().__init__()
        sizes = (inputs, *checked_widths(hidden))
        self.net = nn.Sequential(*dense_layers(sizes, activation), nn.Linear(sizes[-1], 2 * outputs))
        for layer in self.net:
            if isinstance(layer, nn.Linear):
                nn.init.xavier_uniform_(layer.weight)
                nn.init.zeros_(layer.bias)

    def forward(self, a: Tensor) -> DiagonalGaussian:
        return DiagonalGaussian.from_parameters(self.net(a))


class LayeredGaussian:
    """q(h1) q(h2|h1) as a distribution over z = [h1 | h2]."""

    def __init__(self, bottom: DiagonalGaussian, above: Callable[[Tensor], DiagonalGaussian]) -> None:
        self.bottom, self.above = bottom, above

    @property
    def mean(self) -> Tensor:
        """[E h1 | E[h2|h1] at h1 = E h1], (..., D1 + D2): exact in h1, a centre in h2."""
        return torch.cat([self.bottom.mean, self.above(self.bottom.mean).mean], -1)

    def rsample(self, generator: torch.Generator, sample_shape: tuple[int, ...] = ()) -> Tensor:
        """(*sample_shape, ..., D1 + D2), differentiable in every parameter."""
        h1 = self.bottom.rsample(generator, sample_shape)
        return torch.cat([h1, self.above(h1).rsample(generator)], -1)

    def log_prob(self, z: Tensor) -> Tensor:
        """log q(z), (...), in nats."""
        h1, h2 = z.tensor_split([self.bottom.mean.shape[-1]], -1)
        return self.bottom.log_prob(h1) + self.above(h1).log_prob(h2)


class TwoLayerPosterior(PosteriorFamily):
    """q(h1|x) from the encoder's output (B, 2 D1), q(h2|h1) from a network of its own; D1 = latent_dim, D2 = top_dim."""

    def __init__(
        self, latent_dim: int, top_dim: int = 50, hidden: Sequence[int] = (100, 100), activation: str = "tanh"
    ) -> None:
        super().__init__()
        self.encoder_outputs = 2 * latent_dim
        self.latent_dim = latent_dim + top_dim
        self.above = GaussianLayer(latent_dim, top_dim, hidden, activation)

    def forward(self, parameters: Tensor) -> LayeredGaussian:
        return LayeredGaussian(DiagonalGaussian.from_parameters(parameters), self.above)


class TwoLayerPrior(Prior):
    """p(h2) = N(0, I), p(h1|h2) from a network; over z = [h1 | h2] with D1 = latent_dim, D2 = top_dim."""

    def __init__(
        self, latent_dim: int, top_dim: int = 50, hidden: Sequence[int] = (100, 100), activation: str = "tanh"
    ) -> None:
        super().__init__()
        self.latent_dim, self.bottom_dim = latent_dim + top_dim, latent_dim
        self.top = StandardNormal(top_dim)
        self.below = GaussianLayer(top_dim, latent_dim, hidden, activation)

    def log_prob(self, z: Tensor) -> Tensor:
        """log p(h1|h2) + log p(h2), (..., D1 + D2) -> (...), in nats."""
        h1, h2 = z.tensor_split([self.bottom_dim], -1)
        return self.below(h2).log_prob(h1) + self.top.log_prob(h2)

    def sample(self, n: int, generator: torch.Generator) -> Tensor:
        """(n, D1 + D2)."""
        h2 = self.top.sample(n, generator)
        return torch.cat([self.below(h2).rsample(generator), h2], -1)


class BottomDecoder(Decoder):
    """A decoder that reads the first `latent_dim` numbers of z, which are h1."""

    def __init__(self, decoder: Decoder, latent_dim: int) -> None:
        super().__init__()
        self.decoder, self.latent_dim = decoder, latent_dim
        self.autoregressive = decoder.autoregressive

    @property
    def image_shape(self) -> tuple[int, int, int]:
        return self.decoder.image_shape

    def set_output_bias(self, bias: Tensor) -> None:
        self.decoder.set_output_bias(bias)

    def forward(self, z: Tensor, *others: Tensor) -> Tensor:
        return self.decoder(z[..., : self.latent_dim], *others)
