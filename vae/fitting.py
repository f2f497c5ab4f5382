"""p(z) fitted to the aggregate posterior q(z) of a trained model, the second stage of Dai & Wipf 2019 and Ghosh et al. 2020."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from vae.errors import VAEError, typed, whole
from vae.gaussian import LOG_2PI, DiagonalGaussian
from vae.model import PosteriorFamily
from vae.precision import wide
from vae.priors import MAF, FlowPrior, Prior, RealNVP, VampPrior
from vae.seeding import derive, generator

FLOWS: dict[str, type[RealNVP] | type[MAF]] = {"realnvp": RealNVP, "maf": MAF}
EPOCHS = 20
REG_COVAR = 1e-6  # added by EM to each component's covariance, in units of that of all latents


class FullMixture(Prior):
    """sum_k softmax(logits)_k N(mean_k, scale_k scale_k'): Gaussians with any covariance, one or several.

    Shapes: logits (K,), mean (K, D), scale (K, c, c), lower triangular with a positive diagonal. c is D, unless `channels`
    says otherwise: then the c channels of each of D / c places covary, alike at all places, and places do not.
    """

    logits: Tensor
    mean: Tensor
    scale: Tensor

    def __init__(self, latent_dim: int, components: int = 1, channels: int | None = None) -> None:
        super().__init__()
        self.latent_dim = latent_dim
        channels = latent_dim if channels is None else channels
        self.register_buffer("logits", torch.zeros(components))
        self.register_buffer("mean", torch.zeros(components, latent_dim))
        self.register_buffer("scale", torch.eye(channels).repeat(components, 1, 1))

    def log_prob(self, z: Tensor) -> Tensor:
        """log p(z), (..., D) -> (...), in nats; float64 within."""
        x, weights = wide(z).reshape(-1, self.latent_dim), torch.log_softmax(wide(self.logits), 0)
        total = x.new_full((len(x),), -torch.inf)
        for weight, mean, scale in zip(weights, self.mean, self.scale, strict=True):
            square = whitened(x, mean, scale).square().sum(-1)
            part = weight - 0.5 * (square + self.latent_dim * LOG_2PI) - log_det(scale, self.latent_dim)
            total = torch.logaddexp(total, part)
        return total.reshape(z.shape[:-1]).to(z.dtype)

    def sample(self, n: int, generator: torch.Generator) -> Tensor:
        """(n, D)."""
        k = torch.multinomial(torch.softmax(self.logits, 0), n, replacement=True, generator=generator)
        noise = torch.randn(n, self.latent_dim, generator=generator, device=self.mean.device, dtype=self.mean.dtype)
        z = torch.empty_like(noise)
        for component, (mean, scale) in enumerate(zip(self.mean, self.scale, strict=True)):
            z[k == component] = coloured(noise[k == component], mean, scale)
        return z

    def kl(self, posterior: DiagonalGaussian) -> Tensor | None:
        """KL(q(z|x) || p(z)) in nats where there is one component, (..., 1): with any covariance it is of all dimensions
        together. None where there are several."""
        if len(self.logits) > 1:
            return None
        scale, log_var = wide(self.scale[0]), wide(posterior.log_var)
        identity = torch.eye(len(scale), dtype=scale.dtype, device=scale.device)
        precision = torch.linalg.solve_triangular(scale, identity, upper=False).square().sum(0)  # its diagonal
        spread = log_var.exp() @ precision.repeat_interleave(self.latent_dim // len(scale)) - self.latent_dim
        shift = whitened(posterior.mean, self.mean[0], scale).square().sum(-1)
        found = 0.5 * (spread + shift - log_var.sum(-1)) + log_det(scale, self.latent_dim)
        return found.to(posterior.mean.dtype).unsqueeze(-1)


class Whitened(Prior):
    """z = mean + scale e with e from a prior of unit scale, which starts as N(0, I), so that this starts as a Gaussian.

    mean (D,), scale (c, c), as in `FullMixture`.
    """

    mean: Tensor
    scale: Tensor

    def __init__(self, flow: Prior, channels: int | None = None) -> None:
        super().__init__()
        self.latent_dim, self.flow = flow.latent_dim, flow
        self.register_buffer("mean", torch.zeros(self.latent_dim))
        self.register_buffer("scale", torch.eye(self.latent_dim if channels is None else channels))

    def log_prob(self, z: Tensor) -> Tensor:
        """log p(z), (..., D) -> (...), in nats."""
        e = whitened(z, self.mean, self.scale).to(self.mean.dtype)
        return (self.flow.log_prob(e) - log_det(self.scale, self.latent_dim)).to(z.dtype)

    def sample(self, n: int, generator: torch.Generator) -> Tensor:
        """(n, D)."""
        return coloured(self.flow.sample(n, generator), self.mean, self.scale)


class Aggregate:
    """The aggregate posterior q(z) = mean over images of q(z|x): one draw of z an image, and the exact mean and covariance.

    By the laws of total expectation and covariance: the mean of means; the covariance of means plus the mean of variances.
    Of a posterior without variances in closed form, the moments are those of the draws.
    """

    def __init__(self) -> None:
        self._draws: list[Tensor] = []
        self._means: list[Tensor] = []
        self._variance: Tensor | float = 0.0

    def add(self, posterior: object, z: Tensor) -> None:
        """A batch's q(z|x), and its draws (B, D)."""
        self._draws.append(z.cpu())
        if isinstance(posterior, DiagonalGaussian):
            self._means.append(posterior.mean.cpu())
            self._variance = self._variance + wide(posterior.log_var).exp().sum(0).cpu()
        else:
            self._means.append(self._draws[-1])

    @property
    def z(self) -> Tensor:
        """The draws, (N, D)."""
        return torch.cat(self._draws)

    def moments(self, channels: int | None = None) -> tuple[Tensor, Tensor]:
        """The mean (D,) and the covariance (D, D) of q(z), in float64; the covariance divides by N.

        channels: c of the D latents, channel after channel; then the covariance (c, c) is of those at one place, and its mean
        over the D / c places.
        """
        n = sum(map(len, self._means))
        mean: Tensor = sum(wide(part).sum(0) for part in self._means) / n  # type: ignore[assignment]
        c = len(mean) if channels is None else channels
        variance = torch.as_tensor(self._variance, dtype=mean.dtype).expand(len(mean)).reshape(c, -1).mean(1) / n
        total = torch.diag(variance)
        for part in self._means:
            x = by_channel(wide(part) - mean, c)
            total = total + x @ x.T / (n * (len(mean) // c))
        return mean, total


def require_density(family: PosteriorFamily) -> None:
    """Raises VAEError for a posterior over codes, to whose aggregate no density can be fitted."""
    if family.discrete:
        raise VAEError(
            "The posterior of this run is discrete: a density p(z) cannot be fitted to its codes. Train with "
            "prior=codes_autoregressive."
        )


def by_channel(x: Tensor, channels: int) -> Tensor:
    """Latents (N, D), channel after channel, as (c, N P) with D = c P."""
    return x.reshape(len(x), channels, -1).movedim(1, 0).flatten(1)


def whitened(z: Tensor, mean: Tensor, scale: Tensor) -> Tensor:
    """scale^-1 (z - mean), (..., D), in float64; scale (c, c) of the c channels at each place."""
    x = by_channel((wide(z) - wide(mean)).reshape(-1, z.shape[-1]), len(scale))
    e = torch.linalg.solve_triangular(wide(scale), x, upper=False)
    return e.unflatten(1, (-1, z.shape[-1] // len(scale))).movedim(0, 1).reshape(z.shape)


def coloured(e: Tensor, mean: Tensor, scale: Tensor) -> Tensor:
    """mean + scale e, (N, D): what `whitened` undoes."""
    return mean + (scale @ e.unflatten(1, (len(scale), -1))).flatten(1)


def log_det(scale: Tensor, latent_dim: int) -> Tensor:
    """log|det| of z = mean + scale e with so many latents, in nats."""
    return wide(scale).diagonal().log().sum() * (latent_dim // len(scale))


def cholesky(covariance: Tensor) -> Tensor:
    """Its lower triangular factor. Raises VAEError where latents are not finite, or do not vary in some direction."""
    if not covariance.isfinite().all():
        raise VAEError("The latents of this run are not all finite: no prior can be fitted to them.")
    scale, info = torch.linalg.cholesky_ex(covariance)
    if info.any():
        raise VAEError(
            "The latents of this run do not vary in every direction: a density p(z) over all of them does not exist."
        )
    return scale


def fit_gaussian(mean: Tensor, covariance: Tensor, dtype: torch.dtype = torch.float32) -> FullMixture:
    """The Gaussian of this mean (D,) and covariance (D, D), of all Gaussians the one nearest in KL(q(z) || p(z)); or (c, c),
    of those alike at all places."""
    prior = FullMixture(len(mean), channels=len(covariance)).to(dtype)
    prior.mean.copy_(mean[None])
    prior.scale.copy_(cholesky(covariance)[None])
    return prior


def fit_mixture(
    z: Tensor,
    moments: tuple[Tensor, Tensor],
    components: int = 10,
    iterations: int = 200,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
) -> FullMixture:
    """A mixture of Gaussians with full covariances, by EM from k-means (scikit-learn's GaussianMixture), of draws z (N, D).

    The draws are whitened by these moments first, so that the fit moves and scales with the latents. Raises VAEError for more
    components than draws.
    """
    import warnings

    import sklearn.exceptions
    import sklearn.mixture

    if len(z) < whole("prior.components", components):
        raise VAEError(f"prior.components={components} needs as many images at least, and there are {len(z)}.")
    whole("prior.iterations", iterations)
    mean, scale = moments[0], cholesky(moments[1])
    em = sklearn.mixture.GaussianMixture(
        components, max_iter=iterations, reg_covar=REG_COVAR, random_state=derive(seed, "mixture") % 2**32
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", sklearn.exceptions.ConvergenceWarning)
        em.fit(whitened(z, mean, scale).numpy())
    prior = FullMixture(z.shape[1], components).to(dtype)
    prior.logits.copy_(torch.from_numpy(em.weights_).log())
    prior.mean.copy_(mean + torch.from_numpy(em.means_) @ scale.T)
    prior.scale.copy_(scale @ cholesky(torch.from_numpy(em.covariances_)))
    return prior


def fit_flow(
    kind: str,
    z: Tensor,
    moments: tuple[Tensor, Tensor],
    val: Tensor | None = None,
    seed: int = 0,
    sizes: Mapping[str, Any] | None = None,
    **descent: Any,
) -> Whitened:
    """A flow of FLOWS by maximum likelihood of draws z (N, D), from the Gaussian of these moments. sizes: its own options.

    val: draws of the validation images (M, D), which choose the epoch; descent: further options of `descend`, which says
    what is raised.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(derive(seed, kind))
        flow: FlowPrior = FLOWS[kind](z.shape[1], **(sizes or {}))
    prior = whitened_by(moments, flow)
    e, held = (None if x is None else whitened(x, prior.mean, prior.scale).float() for x in (z, val))
    assert e is not None
    descend(flow, e, lambda batch, _: -flow.log_prob(batch).mean(), held, seed=seed, name=kind, **descent)
    return prior


def whitened_by(moments: tuple[Tensor, Tensor], flow: Prior) -> Whitened:
    """`flow`, whose draws have unit scale, with these moments put on it: mean (D,), covariance (c, c)."""
    prior = Whitened(flow, channels=len(moments[1]))
    prior.mean.copy_(moments[0])
    prior.scale.copy_(cholesky(moments[1]))
    return prior


def fit_vampprior(
    z: Tensor,
    encoder: nn.Module,
    images: Callable[[int], Tensor],
    val: Tensor | None = None,
    pseudo_inputs: int = 500,
    seed: int = 0,
    **descent: Any,
) -> VampPrior:
    """A VampPrior by maximum likelihood of draws z (N, D): pseudo-inputs are learned, and the encoder stays as it is.

    images: n -> n training images (n, C, H, W), where it starts. val, descent: as in `fit_flow`.
    """
    prior = VampPrior(z.shape[1], pseudo_inputs)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(derive(seed, "vampprior"))
        prior.setup(encoder, images)
    descend(prior, z, lambda batch, _: -prior.log_prob(batch).mean(), val, seed=seed, name="vampprior", **descent)
    return prior


def descend(
    module: nn.Module,
    data: Tensor,
    loss: Callable[[Tensor, torch.Generator], Tensor],
    val: Tensor | None = None,
    epochs: int = EPOCHS,
    batch_size: int = 256,
    lr: float = 1e-3,
    seed: int = 0,
    name: str = "",
    tick: Callable[[], None] = lambda: None,
) -> None:
    """Adam on `loss` of batches of `data` (N, D), 0-dim, with a rate that falls from `lr` to 0 along a line.

    The weights of the epoch, the start included, that have the lowest loss of `val` (M, D) are kept, or without it those of
    the last. loss: called with a batch and a generator, of the same draws whenever it is of `val`. tick: called after each
    epoch. Leaves the module without gradients. Raises VAEError for a loss that is not finite, or options that make no sense.
    """
    whole("prior.epochs", epochs, least=0)
    whole("prior.batch_size", batch_size)
    if isinstance(lr, bool) or not isinstance(lr, int | float) or not 0 < lr < float("inf"):
        raise VAEError(f"prior.lr={typed(lr)} must be a number above 0.")
    optimizer = torch.optim.Adam(module.parameters(), lr=lr)
    steps = epochs * -(-len(data) // batch_size)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / max(steps, 1))

    def reached() -> float:
        with torch.no_grad():
            if val is None:
                return torch.inf
            noise = generator(seed, name, "validation")
            return sum(loss(part, noise).item() * len(part) for part in val.split(1000)) / len(val)

    best, kept = reached(), copy.deepcopy(module.state_dict())
    for epoch in range(epochs):
        noise = generator(seed, name, epoch)
        for part in torch.randperm(len(data), generator=noise).split(batch_size):
            found = loss(data[part], noise)
            if not found.isfinite():
                raise VAEError(f"The loss is not finite in epoch {epoch + 1}: choose a smaller prior.lr.")
            optimizer.zero_grad()
            found.backward()
            optimizer.step()
            schedule.step()
        if (now := reached()) < best or val is None:
            best, kept = now, copy.deepcopy(module.state_dict())
        tick()
    module.load_state_dict(kept)
    module.requires_grad_(False)
