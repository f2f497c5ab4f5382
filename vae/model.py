"""A variational autoencoder: encoder, prior, decoder, likelihood. It knows nothing of losses, optimisers or Lightning."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor, nn

from vae import ranks
from vae.gaussian import DiagonalGaussian
from vae.precision import full_precision
from vae.seeding import generator as generator_of

if TYPE_CHECKING:
    from vae.likelihoods import Likelihood
    from vae.networks.base import Decoder
    from vae.priors import Prior


class Posterior(Protocol):
    """q(z|x): a DiagonalGaussian, or what a posterior family makes of the encoder's output.

    rsample -> z (*sample_shape, B, D); log_prob(z) -> (*sample_shape, B), in nats; mean, or a centre that its class
    defines, (B, D).
    """

    @property
    def mean(self) -> Tensor: ...

    def rsample(self, generator: torch.Generator, sample_shape: tuple[int, ...] = ()) -> Tensor: ...

    def log_prob(self, z: Tensor) -> Tensor: ...


class PosteriorFamily(nn.Module):
    """The encoder's output (B, encoder_outputs) -> q(z|x) of each image; a module, since a family may have weights."""

    #: How many numbers per image the encoder gives.
    encoder_outputs: int
    #: D, the size of z.
    latent_dim: int
    #: Whether q(z|x) is a point mass on codes, a `vae.codes.CodePosterior`; the prior is then one over codes.
    discrete: bool = False
    #: Why runs that differ in numbers cannot be trained as one program, as in `vae.objectives.elbo.Objective`.
    unpackable: str | None = None

    def forward(self, parameters: Tensor) -> Posterior:
        raise NotImplementedError


class DiagonalFamily(PosteriorFamily):
    """N(mean, diag(exp(log_var))), as the encoder gives both: (B, 2 D) -> DiagonalGaussian (Kingma & Welling 2014)."""

    def __init__(self, latent_dim: int) -> None:
        super().__init__()
        self.latent_dim, self.encoder_outputs = latent_dim, 2 * latent_dim

    def forward(self, parameters: Tensor) -> DiagonalGaussian:
        return DiagonalGaussian.from_parameters(parameters)


class Halves:
    """The two halves of a negative ELBO, `distortion` and `rate`, each (*S, B) in nats, and their means.

    The means are taken once, because losses and what is logged beside them both need them.
    """

    distortion: Tensor
    rate: Tensor

    @cached_property
    def mean_distortion(self) -> Tensor:
        """Over the images and the draws, 0-dim."""
        return self.distortion.mean()

    @cached_property
    def mean_rate(self) -> Tensor:
        """Over the images and the draws, 0-dim."""
        return self.rate.mean()


@dataclass
class VAEOutput(Halves):
    """One pass of images through the model. S stands for the sample shape, () unless several z were asked for.

    posterior: q(z|x) of each image; z (*S, B, D); distortion = -log p(x|z), (*S, B); kl: KL(q(z|x) || p(z)) in nats,
    (B, D) a dimension where it has a closed form, (B, m) a code where z is one of m codes, otherwise the one-sample estimate
    log q(z|x) - log p(z), (*S, B, 1); params: the likelihood's parameters (*S, B, P, C, H, W).
    """

    posterior: Posterior
    z: Tensor
    params: Tensor
    distortion: Tensor
    kl: Tensor

    @cached_property
    def rate(self) -> Tensor:
        """KL(q(z|x) || p(z)) per image, in nats."""
        return self.kl.sum(-1)


class SharedOutput(VAEOutput):
    """The same where ranks share out the batch: made with this rank's `params`, which are put together once asked for."""

    _own: Tensor
    _all: Tensor | None = None

    @property
    def params(self) -> Tensor:
        if self._all is None:
            self._all = ranks.joined(self._own, self.z.shape[-2], self.z.ndim - 2)
        return self._all

    @params.setter
    def params(self, own: Tensor) -> None:
        self._own = own


class VAE(nn.Module):
    """p(x, z) = p(x|z) p(z) with the amortised posterior q(z|x) (Kingma & Welling 2014; Rezende et al. 2014).

    encoder: (B, C, H, W) -> (B, encoder_outputs of the posterior family); decoder: (N, D) -> (N, P, C, H, W); with
    `num_classes` both also take labels. posterior: the family of q(z|x), by default diagonal Gaussians. latent_label: the label
    is a latent variable too, with a uniform p(y): p(x) = 1/num_classes sum_y p(x|y). Every method here is of x given y all
    the same.
    """

    def __init__(
        self,
        encoder: nn.Module,
        decoder: Decoder,
        prior: Prior,
        likelihood: Likelihood,
        num_classes: int = 0,
        posterior: PosteriorFamily | None = None,
        latent_label: bool = False,
    ) -> None:
        super().__init__()
        self.encoder: nn.Module = encoder
        self.decoder: Decoder = decoder
        self.prior: Prior = prior
        self.likelihood: Likelihood = likelihood
        self.num_classes, self.latent_label = num_classes, latent_label
        self.posterior = DiagonalFamily(prior.latent_dim) if posterior is None else posterior

    @property
    def latent_dim(self) -> int:
        return self.prior.latent_dim

    @property
    def discrete(self) -> bool:
        """Whether q(z|x) is a point mass on codes."""
        return self.posterior.discrete

    @property
    def latent_shape(self) -> tuple[int, ...]:
        """(c, h, w) of a latent that is a map, `z.unflatten(-1, latent_shape)`; (D,) of a flat one."""
        return self.decoder.latent_shape or (self.latent_dim,)

    @property
    def spatial(self) -> bool:
        """Whether the latent is a map, whose channels and places are known as such."""
        return self.decoder.latent_shape is not None

    def encode(self, x: Tensor, y: Tensor | None = None) -> Posterior:
        """q(z|x) or q(z|x, y); x (B, C, H, W) in [0, 1]. Its parameters are float32 however narrow the encoder's are."""
        if not ranks.are_sharing():
            return self.posterior(full_precision(self._encoded(x, y)))
        parameters = full_precision(self._encoded(ranks.own(x), None if y is None else ranks.own(y)))
        return self.posterior(ranks.joined(parameters, len(x)))

    def _encoded(self, x: Tensor, y: Tensor | None) -> Tensor:
        return self.encoder(x, y) if self.num_classes else self.encoder(x)

    @property
    def autoregressive(self) -> bool:
        return self.decoder.autoregressive

    def decode(self, z: Tensor, y: Tensor | None = None, x: Tensor | None = None) -> Tensor:
        """The likelihood's parameters, (..., D) -> (..., P, C, H, W), float32 at least; labels y (...) broadcast against z.

        x (B, C, H, W), for z (..., B, D): the images that an autoregressive decoder reads; any other is not given them.
        """
        inputs = [z.flatten(0, -2)]
        if self.autoregressive:
            inputs.append(x)
        if self.num_classes:
            inputs.append(y.expand(z.shape[:-1]).flatten())
        params = full_precision(self.decoder(*inputs))
        return params if z.ndim == 2 else params.unflatten(0, z.shape[:-1])

    def forward(
        self, x: Tensor, generator: torch.Generator, y: Tensor | None = None, sample_shape: tuple[int, ...] = ()
    ) -> VAEOutput:
        """Encode, draw z with the reparameterisation, decode, and measure both halves of the ELBO in nats."""
        posterior = self.encode(x, y)
        return self.measure(x, posterior, posterior.rsample(generator, sample_shape), y)

    def measure(self, x: Tensor, posterior: Posterior, z: Tensor, y: Tensor | None = None) -> VAEOutput:
        """Decode z, (*S, B, D), wherever it comes from, and measure both halves of the ELBO of x in nats."""
        params, distortion = self._decoded(x, z, y)
        output = SharedOutput if ranks.are_sharing() else VAEOutput
        return output(posterior, z, params, distortion, self.kl(posterior, z))

    def distortion(self, x: Tensor, z: Tensor, y: Tensor | None = None) -> Tensor:
        """-log p(x|z) of each image in nats, (*S, B), at z (*S, B, D), by the likelihood as it is in evaluation: a scale that
        follows the training batches is not moved by these. Where the decoder takes maps of `any_size`, image and z may both be
        smaller or larger by one factor."""
        training = self.likelihood.training
        self.likelihood.eval()
        try:
            return self._decoded(x, z, y)[1]
        finally:
            self.likelihood.train(training)

    def _decoded(self, x: Tensor, z: Tensor, y: Tensor | None) -> tuple[Tensor, Tensor]:
        """The likelihood's parameters, of this rank's images where ranks share, and the distortion of all."""
        if not ranks.are_sharing():
            params = self.decode(z, y, x)
            return params, -self.likelihood.log_prob(params, x)
        images = z.ndim - 2  # the dimension of z, params and distortion that counts them
        own_x, own_y = ranks.own(x), None if y is None else ranks.own(y, y.ndim - 1)
        params = self.decode(ranks.own(z, images), own_y, own_x)
        if self.likelihood.training and self.likelihood.of_whole_batches:
            return params, -self.likelihood.log_prob(ranks.joined(params, len(x), images), x)
        return params, ranks.joined(-self.likelihood.log_prob(params, own_x), len(x), images)

    def kl(self, posterior: Posterior, z: Tensor) -> Tensor:
        """KL(q || p) by closed form, (B, D), where prior and posterior have one; otherwise estimated at z, (..., 1).

        Of codes, what each of an image's m codes costs, (B, m).
        """
        closed = self.prior.kl(posterior) if isinstance(posterior, DiagonalGaussian) or self.discrete else None
        if closed is not None:
            return closed
        return (posterior.log_prob(z) - self.prior.log_prob(z)).unsqueeze(-1)

    def log_weights(self, x: Tensor, generator: torch.Generator, samples: int, y: Tensor | None = None) -> Tensor:
        """log w = log p(x|z) + log p(z) - log q(z|x) at `samples` draws of z, (samples, B), in nats.

        Their log-mean-exp is the importance-weighted bound (Burda et al. 2016, equation 8); their mean is the ELBO.
        """
        out = self(x, generator, y, (samples,))
        return -out.distortion + self.prior.log_prob(out.z) - out.posterior.log_prob(out.z)

    def sample(self, n: int, generator: torch.Generator, y: Tensor | None = None) -> Tensor:
        """Mean images of n draws from the prior, (n, C, H, W); the pixels' own noise is left out."""
        return self.mean_image(self.prior.sample(n, generator), y, generator)

    def reconstruct(self, x: Tensor, y: Tensor | None = None) -> Tensor:
        """The mean image at the posterior's mean, (B, C, H, W); deterministic."""
        return self.mean_image(self.encode(x, y).mean, y)

    def mean_image(self, z: Tensor, y: Tensor | None = None, generator: torch.Generator | None = None) -> Tensor:
        """E[x|z], (N, D) -> (N, C, H, W); of a Gaussian or a Laplace likelihood it may leave [0, 1].

        Of an autoregressive decoder, each pixel's mean given a draw of those before it: by `generator`, or without one by
        the same noise at each call.
        """
        if not self.autoregressive:
            return self.likelihood.mean(self.decode(z, y))
        generator = generator_of("pixels", device=z.device) if generator is None else generator
        return self.likelihood.mean(self.decode(z, y, self.draw_image(z, generator, y)))

    def draw_image(self, z: Tensor, generator: torch.Generator, y: Tensor | None = None) -> Tensor:
        """A draw of p(x|z), (N, D) -> (N, C, H, W); pixel after pixel, H W passes, if the decoder is autoregressive."""
        if not self.autoregressive:
            return self.likelihood.sample(self.decode(z, y), generator)
        channels, height, width = self.decoder.image_shape
        x = z.new_zeros(len(z), channels, height, width)
        for row in range(height):
            for column in range(width):
                drawn = self.likelihood.sample(self.decode(z, y, x), generator)
                x[..., row, column] = drawn[..., row, column]
        return x
