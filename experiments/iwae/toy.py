"""The toy of Rainforth et al. 2018: z ~ N(mu, I), x|z ~ N(z, I), q(z|x) = N(A x + b, 2/3 I), near its optimum.

Every point of the data set draws its own noise, so that the variance of the gradient of the whole set is the sum of the
variances of its points: a few draws of each give it to a fraction of a percent. The *mean* of the encoder's gradient is
what drowns in noise as K grows. It is taken from the DReG estimator, which has the same mean and, at K = 16, some
four hundred times less variance; `agreement` holds that "same mean" against the plain estimator's own draws.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor, nn

from vae.data.images import Batch
from vae.gaussian import DiagonalGaussian
from vae.likelihoods import Gaussian
from vae.model import VAE
from vae.networks import Decoder
from vae.objectives.importance import IWAE
from vae.priors import Prior
from vae.seeding import generator

SPREAD = 2 / 3  # variance of q; the exact posterior's is 1/2
MAX_ELEMENTS = 500_000  # latent numbers drawn at a time: few enough for the cache


class RowsEncoder(nn.Module):
    """The encoder's output as a parameter of each data point, so that each has a gradient of its own."""

    def __init__(self, outputs: Tensor) -> None:
        super().__init__()
        self.outputs = nn.Parameter(outputs)

    def forward(self, x: Tensor) -> Tensor:
        return self.outputs


class RowsPrior(Prior):
    """N(mu, I), with a copy of mu for each data point."""

    def __init__(self, mu: Tensor) -> None:
        super().__init__()
        self.mu, self.latent_dim = nn.Parameter(mu), mu.shape[-1]

    def log_prob(self, z: Tensor) -> Tensor:
        return DiagonalGaussian(self.mu, torch.zeros_like(self.mu)).log_prob(z)


class IdentityDecoder(Decoder):
    def forward(self, z: Tensor) -> Tensor:
        return z[:, None, None, None, :]


class Moments(NamedTuple):
    """Of the gradient of the whole data set's bound: its mean over draws, the variance of one draw, and the draws."""

    mean: Tensor
    variance: Tensor
    draws: int

    @property
    def standard_error(self) -> Tensor:
        return (self.variance / self.draws).sqrt()

    def squared_signal(self) -> Tensor:
        """|E|^2, (), unbiased: the noise of the mean is taken off its square."""
        return (self.mean.square() - self.variance / self.draws).sum()


class Toy:
    """N points in D dimensions; mu, A, b are the optimum plus N(0, off^2) each. mu* = mean x, A* = I/2, b* = mu*/2."""

    def __init__(self, points: int, dim: int, off: float, seed: int, spread: float = SPREAD) -> None:
        noise = generator(seed, "toy")
        truth = torch.randn(dim, generator=noise, dtype=torch.float64)
        x = truth + math.sqrt(2) * torch.randn(points, dim, generator=noise, dtype=torch.float64)
        mu = x.mean(0)
        weight, shift = torch.eye(dim, dtype=torch.float64) / 2, mu / 2
        moved = [p + off * torch.randn(p.shape, generator=noise, dtype=torch.float64) for p in (mu, weight, shift)]
        self.mu = moved[0]
        self.x, self.means = x, x @ moved[1].T + moved[2]
        self.seed, self.spread = seed, spread

    def gradients(self, samples: int, estimator: str, draws: int) -> dict[str, Moments]:
        """Moments of d bound / d b, d A and d mu, from `draws` draws of the whole data set."""
        points, dim = self.x.shape
        sums = {name: [torch.zeros(points, dim, dtype=torch.float64) for _ in range(2)] for name in ("b", "mu")}
        rows = max(1, MAX_ELEMENTS // (samples * dim))
        objective = IWAE(samples, estimator)
        for block in torch.arange(points).split(rows):
            at_a_time = max(1, rows // len(block))
            for start in range(0, draws, at_a_time):
                n = min(at_a_time, draws - start)
                noise = generator(self.seed, estimator, samples, int(block[0]), start)
                for name, gradient in self._draw(objective, block, n, noise).items():
                    sums[name][0][block] += gradient.sum(0)
                    sums[name][1][block] += gradient.square().sum(0)
        moments = {name: self._moments(*of, draws) for name, of in sums.items()}
        moments["A"] = self._moments(*sums["b"], draws, self.x)
        return moments

    def _draw(self, objective: IWAE, block: Tensor, n: int, noise: torch.Generator) -> dict[str, Tensor]:
        """n draws of each point's gradient of its bound with respect to its mean of q and to mu, (n, points, D)."""
        means, x = (part[block].float().repeat(n, 1) for part in (self.means, self.x))
        encoder = RowsEncoder(torch.cat([means, torch.full_like(means, math.log(self.spread))], -1))
        prior = RowsPrior(self.mu.float().repeat(len(means), 1))
        vae = VAE(encoder, IdentityDecoder(), prior, Gaussian(1.0))
        bound = -objective(vae, Batch(x[:, None, None, :], None, 0), noise, 0)["loss"] * len(means)
        of_outputs, of_mu = torch.autograd.grad(bound, [encoder.outputs, prior.mu])
        of = {"b": of_outputs[:, : x.shape[-1]], "mu": of_mu}
        return {name: gradient.double().unflatten(0, (n, len(block))) for name, gradient in of.items()}

    @staticmethod
    def _moments(total: Tensor, squares: Tensor, draws: int, x: Tensor | None = None) -> Moments:
        """x: what each point's gradient is multiplied by, for A."""
        mean = total / draws
        variance = (squares / draws - mean.square()) * (draws / (draws - 1))
        points = len(mean)
        if x is None:
            return Moments(mean.mean(0), variance.sum(0) / points**2, draws)
        return Moments((mean.T @ x / points).flatten(), (variance.T @ x.square() / points**2).flatten(), draws)


def ratio(signal: Moments, noise: Moments) -> tuple[float, float]:
    """|E| / root of the summed variances, with the standard error that the mean's own noise gives it; infinite where no
    signal was found."""
    squared, variance = max(float(signal.squared_signal()), 0.0), float(noise.variance.sum())
    se_of_square = math.sqrt(
        float((4 * signal.mean.square() * signal.standard_error.square()).sum())
        + 2 * float(signal.standard_error.pow(4).sum())
    )
    snr = math.sqrt(squared / variance)
    return snr, se_of_square / (2 * snr * variance) if snr else math.inf


def agreement(plain: Moments, dreg: Moments) -> dict[str, float]:
    """The component of the plain estimator's mean along DReG's, as a multiple of it, with its standard error; and the root
    mean square, over the parameters, of their difference in standard errors (1 where the means are the same)."""
    length = float(dreg.mean.square().sum())
    multiple = float(plain.mean @ dreg.mean) / length
    variance = plain.standard_error.square() + dreg.standard_error.square()
    se = math.sqrt(float((dreg.mean.square() * variance).sum())) / length
    return {"multiple": multiple, "se": se, "rms": float(((plain.mean - dreg.mean).square() / variance).mean().sqrt())}


def measure_toy(points: int, dim: int, off: float, seed: int, samples: list[int], budget: int) -> dict:
    """SNR against K of the three gradients by both estimators, None where it is lost in noise; budget: draws times K."""
    toy = Toy(points, dim, off, seed)
    measured: dict = {"samples": samples, "agreement": []}
    rows: dict[str, list] = {f"{estimator} {name}": [] for estimator in ("iwae", "dreg") for name in ("b", "A", "mu")}
    rows["iwae b, own mean"] = []
    for k in samples:
        draws = max(2, budget // k)
        plain, dreg = (toy.gradients(k, e, draws) for e in ("reparameterised", "dreg"))
        for name in ("b", "A"):
            rows[f"iwae {name}"].append(ratio(dreg[name], plain[name]))
            rows[f"dreg {name}"].append(ratio(dreg[name], dreg[name]))
        rows["iwae b, own mean"].append(ratio(plain["b"], plain["b"]))
        rows["iwae mu"].append(ratio(plain["mu"], plain["mu"]))
        rows["dreg mu"].append(ratio(dreg["mu"], dreg["mu"]))
        measured["agreement"].append(agreement(plain["b"], dreg["b"]))
    for name, row in rows.items():
        resolved = [(snr, se) if snr > 3 * se else (None, None) for snr, se in row]
        measured[name] = {"snr": [snr for snr, _ in resolved], "se": [se for _, se in resolved]}
    exact = Toy(16, dim, 0.0, seed, spread=0.5)
    at_exact = {e: exact.gradients(8, e, 4) for e in ("reparameterised", "sticking_the_landing", "dreg")}
    measured["at exact posterior"] = {e: float(m["b"].mean.abs().max()) for e, m in at_exact.items()}
    return measured
