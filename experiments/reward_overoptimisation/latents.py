"""A Gaussian policy over the latents of a frozen VAE, tuned to please a proxy classifier and judged by others.

The "prompt" is a digit; a policy answers it with a latent, the decoder with an image. pi_0 is the prior N(0, I). The loss
-E[proxy] + beta KL(pi || pi_0) is the VAE's own, with a reward in place of the log-likelihood.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from vae.data.images import Batch, Images
from vae.evaluation.samples import trained_classifier
from vae.gaussian import DiagonalGaussian
from vae.kl import gaussian_kl_to_standard_normal
from vae.model import VAE
from vae.seeding import generator

DIGITS = torch.arange(10)
Scores = Callable[[Tensor], Tensor]  # images (N, 1, H, W) -> (N, 10)


# --- who scores the images --------------------------------------------------------------------------------------------


def log_odds(logits: Tensor) -> Tensor:
    """log p(c) / (1 - p(c)) of every class, (N, 10): unlike a log-probability it never saturates."""
    others = torch.stack([logits[:, c != DIGITS].logsumexp(1) for c in DIGITS], dim=1)
    return logits - others


def linear_proxy(x: Tensor, y: Tensor, steps: int = 200) -> Scores:
    """Log-odds of a linear softmax classifier of images in [0, 1], from zero weights, by full-batch Adam."""
    x = x.flatten(1)
    weight, bias = torch.zeros(x.shape[1], 10, requires_grad=True), torch.zeros(10, requires_grad=True)
    optimizer = torch.optim.Adam([weight, bias], lr=3e-3)
    for _ in range(steps):
        optimizer.zero_grad()
        F.cross_entropy(x @ weight + bias, y).backward()
        optimizer.step()
    weight, bias = weight.detach(), bias.detach()
    return lambda images: log_odds(images.flatten(1) @ weight + bias)


def discriminative_judge(x: Tensor, y: Tensor, steps: int, seed: int, cache: Path) -> Scores:
    """Log-odds of the convolutional classifier of vae.evaluation.samples."""
    classifier = trained_classifier(Batch(x, y, seed), seed, cache, steps)
    return lambda images: log_odds(classifier(images)[0])


def generative_judge(x: Tensor, y: Tensor, components: int = 50, noise: float = 0.03) -> Scores:
    """log p(image | c) up to a constant in nats: a Gaussian a class on the leading principal components of the pixels.

    Quadratic discriminant analysis. It knows how far digits of a class vary, so that for it there is a too much.
    noise: variance added to each component.
    """
    pixels = x.flatten(1).double()
    centre = pixels.mean(0)
    basis = torch.linalg.eigh(torch.cov((pixels - centre).T)).eigenvectors[:, -components:]
    points = (pixels - centre) @ basis
    means = torch.stack([points[y == c].mean(0) for c in DIGITS])
    jitter = noise * torch.eye(components, dtype=torch.float64)
    roots = torch.stack([torch.linalg.cholesky(torch.cov(points[y == c].T) + jitter) for c in DIGITS])
    whiten = torch.linalg.inv(roots)  # (10, K, K)
    log_dets = roots.diagonal(dim1=1, dim2=2).log().sum(1)

    def scores(images: Tensor) -> Tensor:
        points = (images.flatten(1).double() - centre) @ basis
        return torch.stack(
            [-0.5 * ((points - means[c]) @ whiten[c].T).square().sum(1) - log_dets[c] for c in DIGITS], dim=1
        ).float()

    return scores


def accuracy(scores: Scores, split: Images, n: int = 5000) -> float:
    """Of the first n images of a split, pixels in [0, 1]."""
    x, y = split.gather(torch.arange(min(n, len(split))))
    with torch.no_grad():
        return (scores(x.float() / 255).argmax(1) == y).double().mean().item()


# --- policies -----------------------------------------------------------------------------------------------------------


class Policies(NamedTuple):
    """One Gaussian for each beta and digit, (B, 10, D) both, and how the last of the betas got there: its log."""

    gaussian: DiagonalGaussian
    path: list[DiagonalGaussian]

    @property
    def kl(self) -> Tensor:
        return kl_of(self.gaussian)


def kl_of(policy: DiagonalGaussian) -> Tensor:
    """KL to N(0, I) in nats, mean over digits: (..., 10, D) -> (...)."""
    return gaussian_kl_to_standard_normal(*policy).sum(-1).mean(-1)


def images_of(vae: VAE, z: Tensor) -> Tensor:
    """Mean images of latents (..., D) as (N, C, H, W)."""
    return vae.likelihood.mean(vae.decode(z.flatten(0, -2)))


def of_own_digit(scores: Tensor, shape: tuple[int, ...]) -> Tensor:
    """The score for the digit that was asked for, (..., 10), from the scores (N, 10) of images of latents (..., 10, D)."""
    return scores.view(*shape, 10).diagonal(dim1=-2, dim2=-1)


def tune(
    vae: VAE, proxy: Scores, betas: Tensor, steps: int, batch: int, lr: float, noise: torch.Generator, kept: set[int]
) -> Policies:
    """Minimise -E[proxy] + beta KL for all betas and digits side by side, from pi_0 on, through the frozen decoder.

    kept: the steps at which the policy of the last beta is kept as its path.
    """
    shape = (len(betas), 10, vae.latent_dim)
    mean, log_var = torch.zeros(shape, requires_grad=True), torch.zeros(shape, requires_grad=True)
    policy = DiagonalGaussian(mean, log_var)
    optimizer = torch.optim.Adam(policy, lr)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    path = []
    for step in range(steps):
        if step in kept:
            path.append(DiagonalGaussian(mean[-1].detach().clone(), log_var[-1].detach().clone()))
        z = policy.rsample(noise, (batch,))
        reward = of_own_digit(proxy(images_of(vae, z)), z.shape[:-1]).mean(0)
        kl = gaussian_kl_to_standard_normal(mean, log_var).sum(-1)
        optimizer.zero_grad()
        (betas[:, None] * kl - reward).sum().backward()  # a sum of problems of their own: Adam keeps them apart
        optimizer.step()
        schedule.step()
    return Policies(DiagonalGaussian(mean.detach(), log_var.detach()), path)


@torch.no_grad()
def judged(
    vae: VAE, policy: DiagonalGaussian, judges: dict[str, Scores], draws: int, noise: torch.Generator
) -> dict[str, Tensor]:
    """Each judge's mean over draws and digits, (...), of policies (..., 10, D)."""
    totals = dict.fromkeys(judges, 0.0)
    for _ in range(draws // 10):
        z = policy.rsample(noise, (10,))
        images = images_of(vae, z)
        for name, judge in judges.items():
            totals[name] += of_own_digit(judge(images), z.shape[:-1]).mean(0).mean(-1) / (draws // 10)
    return totals


# --- what needs no training: best of n, and the best of all policies ----------------------------------------------------


@torch.no_grad()
def prior_pool(vae: VAE, judges: dict[str, Scores], n: int, noise: torch.Generator) -> dict[str, Tensor]:
    """Every judge's scores (n, 10) of n draws of pi_0, each asked as every digit."""
    parts = [images_of(vae, z) for z in vae.prior.sample(n, noise).split(2000)]
    return {name: torch.cat([judge(part) for part in parts]) for name, judge in judges.items()}


def best_of_n(pool: dict[str, Tensor], n: int) -> dict[str, float]:
    """Each judge's mean over the draw of highest proxy among n, and over digits.

    Over all subsets of n of the pool: the i-th worst of N is the best of C(i - 1, n - 1) of the C(N, n). Unbiased.
    """
    size = len(pool["proxy"])
    i = torch.arange(n, size + 1, dtype=torch.float64)
    log_choose = torch.lgamma(i) - torch.lgamma(i - n + 1) - math.lgamma(n)
    log_choose -= math.lgamma(size + 1) - math.lgamma(size - n + 1) - math.lgamma(n + 1)
    weight = log_choose.exp()[:, None]
    order = pool["proxy"].argsort(0)[n - 1 :]
    return {name: (weight * scores.gather(0, order)).sum(0).mean().item() for name, scores in pool.items()}


def tilted(pool: dict[str, Tensor], beta: float) -> dict[str, float]:
    """pi_0 exp(proxy / beta), the best that any policy does, by weights on the pool; KL in nats, means over digits.

    The KL is that of the weights to the uniform, good while it is well below the log of the pool's size.
    """
    log_weight = torch.log_softmax(pool["proxy"].double() / beta, dim=0)
    weight = log_weight.exp()
    kl = (weight * (log_weight + math.log(len(weight)))).sum(0).mean().item()
    return {"kl": kl, **{name: (weight * scores).sum(0).mean().item() for name, scores in pool.items()}}


def sampled_images(vae: VAE, policy: DiagonalGaussian, each: int, noise: torch.Generator) -> Tensor:
    """`each` mean images a digit, (10 * each, H, W), of a policy (10, D)."""
    with torch.no_grad():
        images = images_of(vae, policy.rsample(noise, (each,)).transpose(0, 1))
    return images.flatten(0, -3)


def split_labels(train: Images, held: int) -> tuple[Tensor, Tensor]:
    """Indices of `held` training images for the proxies and of the others for the judges, shuffled once for all."""
    order = torch.randperm(len(train), generator=generator(0, "proxies and judges"))
    return order[:held], order[held:]
