"""p(z) fitted to the aggregate posterior q(z) of a trained model, the second stage of Dai & Wipf 2019 and Ghosh et al. 2020."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from vae.codes import CodePosterior
from vae.errors import VAEError, whole
from vae.gaussian import LOG_2PI, DiagonalGaussian
from vae.precision import wide
from vae.priors import Prior, RealNVP
from vae.seeding import derive, generator

REG_COVAR = 1e-6  # added by EM to each component's covariance, in units of that of all latents


class FullMixture(Prior):
    """sum_k softmax(logits)_k N(mean_k, scale_k scale_k'): Gaussians with any covariance, one or several.

    Shapes: logits (K,), mean (K, D), scale (K, D, D), lower triangular with a positive diagonal.
    """

    logits: Tensor
    mean: Tensor
    scale: Tensor

    def __init__(self, latent_dim: int, components: int = 1) -> None:
        super().__init__()
        self.latent_dim = latent_dim
        self.register_buffer("logits", torch.zeros(components))
        self.register_buffer("mean", torch.zeros(components, latent_dim))
        self.register_buffer("scale", torch.eye(latent_dim).repeat(components, 1, 1))

    def log_prob(self, z: Tensor) -> Tensor:
        """log p(z), (..., D) -> (...), in nats; float64 within."""
        x, weights = wide(z).reshape(-1, self.latent_dim), torch.log_softmax(wide(self.logits), 0)
        total = x.new_full((len(x),), -torch.inf)
        for weight, mean, scale in zip(weights, wide(self.mean), wide(self.scale), strict=True):
            noise = torch.linalg.solve_triangular(scale, (x - mean).T, upper=False)
            log_det = scale.diagonal().log().sum()
            part = weight - 0.5 * (noise.square().sum(0) + self.latent_dim * LOG_2PI) - log_det
            total = torch.logaddexp(total, part)
        return total.reshape(z.shape[:-1]).to(z.dtype)

    def sample(self, n: int, generator: torch.Generator) -> Tensor:
        """(n, D)."""
        k = torch.multinomial(torch.softmax(self.logits, 0), n, replacement=True, generator=generator)
        noise = torch.randn(n, self.latent_dim, generator=generator, device=self.mean.device, dtype=self.mean.dtype)
        z = torch.empty_like(noise)
        for component, (mean, scale) in enumerate(zip(self.mean, self.scale, strict=True)):
            z[k == component] = mean + noise[k == component] @ scale.T
        return z

    def kl(self, posterior: DiagonalGaussian) -> Tensor | None:
        """KL(q(z|x) || p(z)) in nats where there is one component, (..., 1): with any covariance it is of all dimensions
        together. None where there are several."""
        if len(self.logits) > 1:
            return None
        scale, log_var = wide(self.scale[0]), wide(posterior.log_var)
        identity = torch.eye(self.latent_dim, dtype=scale.dtype, device=scale.device)
        precision = torch.linalg.solve_triangular(scale, identity, upper=False).square().sum(0)  # its diagonal
        spread = log_var.exp() @ precision - self.latent_dim
        shift = whitened(posterior.mean, self.mean[0], scale).square().sum(-1)
        found = 0.5 * (spread + shift - log_var.sum(-1)) + scale.diagonal().log().sum()
        return found.to(posterior.mean.dtype).unsqueeze(-1)


class WhitenedFlow(Prior):
    """z = mean + scale e with e from a RealNVP: it starts as the Gaussian N(mean, scale scale'). mean (D,), scale (D, D)."""

    mean: Tensor
    scale: Tensor

    def __init__(self, latent_dim: int, layers: int = 6, hidden: Sequence[int] = (64, 64)) -> None:
        super().__init__()
        self.latent_dim = latent_dim
        self.flow = RealNVP(latent_dim, layers, hidden)
        self.register_buffer("mean", torch.zeros(latent_dim))
        self.register_buffer("scale", torch.eye(latent_dim))

    def log_prob(self, z: Tensor) -> Tensor:
        """log p(z), (..., D) -> (...), in nats."""
        e = whitened(z, self.mean, self.scale).to(self.mean.dtype)
        return (self.flow.log_prob(e) - wide(self.scale).diagonal().log().sum()).to(z.dtype)

    def sample(self, n: int, generator: torch.Generator) -> Tensor:
        """(n, D)."""
        return self.mean + self.flow.sample(n, generator) @ self.scale.T


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
        """A batch's q(z|x), and its draws (B, D). Raises VAEError for codes, or a z that is not of real numbers."""
        if isinstance(posterior, CodePosterior) or not z.is_floating_point():
            raise VAEError(
                "The posterior of this run is discrete: a density p(z) cannot be fitted to its codes. Train with "
                "prior=codes_autoregressive."
            )
        self._draws.append(z.cpu())
        if isinstance(posterior, DiagonalGaussian):
            self._means.append(wide(posterior.mean).cpu())
            self._variance = self._variance + wide(posterior.log_var).exp().sum(0).cpu()
        else:
            self._means.append(wide(z).cpu())

    @property
    def z(self) -> Tensor:
        """The draws, (N, D)."""
        return torch.cat(self._draws)

    def moments(self) -> tuple[Tensor, Tensor]:
        """The mean (D,) and the covariance (D, D) of q(z), in float64; the covariance divides by N."""
        means = torch.cat(self._means)
        centred = means - means.mean(0)
        variance = torch.as_tensor(self._variance, dtype=means.dtype) / len(means)
        return means.mean(0), centred.T @ centred / len(means) + torch.diag(variance.expand(means.shape[1]))


def whitened(z: Tensor, mean: Tensor, scale: Tensor) -> Tensor:
    """scale^-1 (z - mean), (..., D), in float64."""
    x = (wide(z) - wide(mean)).reshape(-1, z.shape[-1]).T
    return torch.linalg.solve_triangular(wide(scale), x, upper=False).T.reshape(z.shape)


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
    """The Gaussian of this mean (D,) and covariance (D, D): of all Gaussians the one nearest in KL(q(z) || p(z))."""
    prior = FullMixture(len(mean)).to(dtype)
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


def fit_realnvp(
    z: Tensor,
    moments: tuple[Tensor, Tensor],
    val: Tensor | None = None,
    layers: int = 6,
    hidden: Sequence[int] = (64, 64),
    epochs: int = 50,
    batch_size: int = 256,
    lr: float = 1e-3,
    seed: int = 0,
    tick: Callable[[], None] = lambda: None,
) -> WhitenedFlow:
    """A RealNVP by maximum likelihood of draws z (N, D), with Adam, from the Gaussian of these moments.

    val: draws of the validation images (M, D); the weights of the epoch, the start included, that find them likeliest are
    kept, or of none the last. tick: called after each epoch. Raises VAEError for a loss that is not finite, or one latent.
    """
    whole("prior.epochs", epochs, least=0)
    whole("prior.batch_size", batch_size)
    whole("prior.layers", layers)
    if isinstance(lr, bool) or not isinstance(lr, int | float) or not 0 < lr < float("inf"):
        raise VAEError(f"prior.lr={lr} must be a number above 0.")
    mean, covariance = moments
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(derive(seed, "realnvp"))
        prior = WhitenedFlow(z.shape[1], layers, hidden)
    prior.mean.copy_(mean)
    prior.scale.copy_(cholesky(covariance))
    e = whitened(z, mean, prior.scale).float()
    optimizer = torch.optim.Adam(prior.flow.parameters(), lr=lr)

    def score() -> float:
        with torch.no_grad():
            return -torch.inf if val is None else prior.log_prob(val).mean().item()

    best, kept = score(), copy.deepcopy(prior.state_dict())
    for epoch in range(epochs):
        for part in torch.randperm(len(e), generator=generator(seed, "realnvp", epoch)).split(batch_size):
            loss = -prior.flow.log_prob(e[part]).mean()
            if not loss.isfinite():
                raise VAEError(f"The flow's loss is not finite in epoch {epoch}: choose a smaller prior.lr.")
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        if (reached := score()) > best or val is None:
            best, kept = reached, copy.deepcopy(prior.state_dict())
        tick()
    prior.load_state_dict(kept)
    return prior.requires_grad_(False)
