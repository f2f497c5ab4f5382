"""p(z): what the aggregate posterior is held to. Only the standard normal has its KL in closed form."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor, nn

from vae.errors import VAEError, whole
from vae.flows import AffineCoupling, MaskedAffine
from vae.gaussian import LOG_2PI, DiagonalGaussian
from vae.kl import GaussianMixture, gaussian_kl_to_standard_normal
from vae.networks.base import checked_widths
from vae.precision import full_precision

MAX_ELEMENTS = 2**24  # of a (rows, components, D) block held at a time


class Prior(nn.Module):
    """p(z) over `latent_dim` numbers. A prior of one's own defines `log_prob` and `sample`, and `kl` where it has one."""

    #: D, the size of z.
    latent_dim: int
    #: Whether `setup` uses the model's encoder, which then must take images alone and give a diagonal Gaussian.
    needs_encoder: bool = False

    def setup(self, encoder: nn.Module, images: Callable[[int], Tensor]) -> None:
        """Called once, before training. encoder: the model's own; images: called with n, returns n training images
        (n, C, H, W) in [0, 1], in the run's own random order."""

    def log_prob(self, z: Tensor) -> Tensor:
        """log p(z), (..., D) -> (...), in nats."""
        raise NotImplementedError

    def sample(self, n: int, generator: torch.Generator) -> Tensor:
        """n draws, (n, D)."""
        raise NotImplementedError

    def kl(self, posterior: DiagonalGaussian) -> Tensor | None:
        """KL(q(z|x) || p(z)) of each dimension, (..., D), in nats; None where it has no closed form, and the model then
        estimates the rate by log q(z|x) - log p(z) at the z it draws."""
        return None


class StandardNormal(Prior):
    """N(0, I), with its KL in closed form (Kingma & Welling 2014, appendix B)."""

    origin: Tensor

    def __init__(self, latent_dim: int) -> None:
        super().__init__()
        self.latent_dim = latent_dim
        self.register_buffer("origin", torch.zeros(()), persistent=False)  # knows the device and dtype

    def log_prob(self, z: Tensor) -> Tensor:
        """log p(z), (..., D) -> (...), in nats."""
        return -0.5 * (full_precision(z).square() + LOG_2PI).sum(-1)

    def sample(self, n: int, generator: torch.Generator) -> Tensor:
        """(n, D)."""
        shape = (n, self.latent_dim)
        return torch.randn(shape, generator=generator, device=self.origin.device, dtype=self.origin.dtype)

    def kl(self, posterior: DiagonalGaussian) -> Tensor:
        """KL(q(z|x) || p(z)) of each dimension, (..., D), in nats."""
        return gaussian_kl_to_standard_normal(posterior.mean, posterior.log_var)


class MixturePrior(Prior):
    """A mixture of diagonal Gaussians: a subclass says which, in `mixture()`."""

    def __init__(self, latent_dim: int) -> None:
        super().__init__()
        self.latent_dim = latent_dim

    def mixture(self) -> GaussianMixture:
        """The components as they are now."""
        raise NotImplementedError

    def log_prob(self, z: Tensor) -> Tensor:
        """log p(z), (..., D) -> (...), in nats. At most MAX_ELEMENTS numbers a block, whatever the number of z."""
        mixture = self.mixture()
        rows = max(1, MAX_ELEMENTS // mixture.mean.numel())
        parts = z.reshape(-1, self.latent_dim).split(rows)
        return torch.cat([mixture.log_prob(part) for part in parts]).reshape(z.shape[:-1])

    def sample(self, n: int, generator: torch.Generator) -> Tensor:
        """(n, D)."""
        return self.mixture().sample(n, generator)


class MixtureOfGaussians(MixturePrior):
    """`components` diagonal Gaussians, all weights, means and variances learned.

    Means start as draws from N(0, I / 4), variances at 1 and weights equal. Raises VAEError for no component.
    """

    def __init__(self, latent_dim: int, components: int = 10) -> None:
        super().__init__(latent_dim)
        if components < 1:
            raise VAEError(f"A mixture needs at least one component, not {components}.")
        self.logits = nn.Parameter(torch.zeros(components))
        self.mean = nn.Parameter(0.5 * torch.randn(components, latent_dim))
        self.log_var = nn.Parameter(torch.zeros(components, latent_dim))

    def mixture(self) -> GaussianMixture:
        return GaussianMixture(self.logits, self.mean, self.log_var)


class VampPrior(MixturePrior):
    """1/K sum_k q(z|u_k): the encoder's own posteriors at K learned pseudo-inputs u_k (Tomczak & Welling 2018, eq. 9).

    The model's encoder, (K, C, H, W) -> (K, 2 D), is used here, not owned. The pseudo-inputs are sigmoid(logits), strictly
    inside (0, 1): `setup` starts them at K training images drawn towards grey by START_MARGIN, where the sigmoid's gradient
    is alive (a clamp's would be 0 on black and white pixels), with a little noise that sets equal images apart.
    Raises VAEError for no pseudo-input.
    """

    logits: nn.Parameter  # made in `setup`

    needs_encoder = True
    START_MARGIN, START_NOISE = 0.05, 0.1  # the pixels' distance from 0 and 1; the standard deviation of the logits

    def __init__(self, latent_dim: int, pseudo_inputs: int = 500) -> None:
        super().__init__(latent_dim)
        self.number = whole("prior.pseudo_inputs", pseudo_inputs, most=100_000)

    def setup(self, encoder: nn.Module, images: Callable[[int], Tensor]) -> None:
        self._encoder = (encoder,)  # in a tuple, so that its weights are listed and saved once, as the model's
        start = torch.logit(self.START_MARGIN + (1 - 2 * self.START_MARGIN) * images(self.number))
        self.logits = nn.Parameter(start + self.START_NOISE * torch.randn_like(start))

    def pseudo_inputs(self) -> Tensor:
        """u, (K, C, H, W) in (0, 1)."""
        return torch.sigmoid(self.logits)

    def mixture(self) -> GaussianMixture:
        q = DiagonalGaussian.from_parameters(self._encoder[0](self.pseudo_inputs()))
        return GaussianMixture(torch.zeros_like(q.mean[:, 0]), q.mean, q.log_var)


class FlowPrior(Prior):
    """N(0, I) carried through `layers`, which a subclass makes: log p(z) = log N(e; 0, I) - log|det dz/de| with
    e = flow^-1(z), both directions in closed form."""

    def __init__(self, latent_dim: int, layers: Iterable[nn.Module]) -> None:
        super().__init__()
        self.latent_dim = latent_dim
        self.noise = StandardNormal(latent_dim)
        self.layers = nn.ModuleList(layers)

    def log_prob(self, z: Tensor) -> Tensor:
        """log p(z), (..., D) -> (...), in nats."""
        log_det = torch.zeros((), dtype=z.dtype, device=z.device)
        for layer in reversed(self.layers):
            z, part = layer.inverse(z)
            log_det = log_det + part
        return self.noise.log_prob(z) - log_det

    def sample(self, n: int, generator: torch.Generator) -> Tensor:
        """(n, D)."""
        z = self.noise.sample(n, generator)
        for layer in self.layers:
            z, _ = layer(z)
        return z


class RealNVP(FlowPrior):
    """Affine couplings (Dinh et al. 2017); starts as N(0, I).

    Raises VAEError for one latent, which leaves nothing to couple, or for no layer.
    """

    def __init__(self, latent_dim: int, layers: int = 6, hidden: Sequence[int] = (64, 64)) -> None:
        if latent_dim < 2:
            raise VAEError("prior=realnvp couples latents with one another: it needs model.latent_dim of at least 2.")
        number, hidden = whole("prior.layers", layers), checked_widths(hidden, "prior.hidden")
        super().__init__(latent_dim, (AffineCoupling(latent_dim, hidden, odd=i % 2 == 1) for i in range(number)))


class MAF(FlowPrior):
    """A masked autoregressive flow (Papamakarios et al. 2017), without their batch normalisation; starts as N(0, I).

    The order of the latents is reversed from layer to layer. A density is one pass of each layer, a draw D of them. Raises
    VAEError for no layer, or for no hidden one in it.
    """

    def __init__(self, latent_dim: int, layers: int = 5, hidden: Sequence[int] = (64, 64)) -> None:
        number, hidden = whole("prior.layers", layers), checked_widths(hidden, "prior.hidden")
        if not hidden:
            raise VAEError("prior.hidden needs at least one width.")
        super().__init__(latent_dim, (MaskedAffine(latent_dim, hidden, flipped=i % 2 == 1) for i in range(number)))
