"""The linear VAE with a Gaussian likelihood is probabilistic PCA, whose optimum is known (Lucas et al. 2019, section 4)."""

from __future__ import annotations

import math

import pytest
import torch

from vae.data.images import Batch
from vae.data.sources import mnist
from vae.engine.build import build
from vae.likelihoods import LearnedSigmaGaussian
from vae.model import VAE
from vae.networks import linear
from vae.objectives.elbo import BetaVAE
from vae.priors import StandardNormal
from vae.seeding import generator


def ppca(x, latent_dim):
    """Maximum log-likelihood, its rate and its sigma^2, in nats per image; x (N, n)."""
    eigenvalues = torch.linalg.eigvalsh(torch.cov(x.T.double(), correction=0)).flip(0)
    sigma2 = eigenvalues[latent_dim:].mean()
    n = x.shape[1]
    log_det = eigenvalues[:latent_dim].log().sum() + (n - latent_dim) * sigma2.log()
    rate = 0.5 * (eigenvalues[:latent_dim] / sigma2).log().sum()
    return -0.5 * (n * math.log(2 * math.pi) + log_det + n).item(), rate.item(), sigma2.item()


@pytest.mark.slow
def test_elbo_of_linear_vae_reaches_the_ppca_likelihood_on_digits(tiny):
    data, module = build(
        tiny(
            "network=linear",
            "likelihood=gaussian_learned",
            "likelihood.sigma=0.3",
            "model.latent_dim=4",
            "data.limit=null",
        )
    )
    images = data.splits_ready().train
    batch = data.prepare(next(iter(data.train_dataloader()))._replace(x=images.x, y=None), training=True)
    parameters = [p for p in module.vae.parameters() if p.requires_grad]
    optimizer = torch.optim.Adam(parameters, lr=0.03)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=1200)
    noise = generator("linear VAE")
    for step in range(1200):
        optimizer.zero_grad()
        module.objective(module.vae, batch, noise, step)["loss"].backward()
        optimizer.step()
        schedule.step()
    with torch.no_grad():
        terms = [module.objective(module.vae, batch, noise, 0) for _ in range(50)]
    elbo, rate = (sum(t[name].item() for t in terms) / len(terms) for name in ("elbo", "rate"))
    best, best_rate, sigma2 = ppca(batch.x.flatten(1), 4)
    assert best - 0.1 < elbo < best + 0.02  # the ELBO is a lower bound; the rest is the noise of z
    assert math.isclose(rate, best_rate, rel_tol=0.06)  # along a ridge: the last hundredths of a nat decide it
    assert math.isclose(module.vae.likelihood.log_sigma.exp().item() ** 2, sigma2, rel_tol=0.02)


@pytest.mark.slow
def test_linear_vae_trained_on_mnist_reaches_the_published_optimum(data_dir):
    # 182.155 nats and a rate of 21.030 at k = 10, from the eigenvalues of the 60,000 training images
    splits = mnist(data_dir)
    x = torch.cat([splits.train.x, splits.val.x]).float() / 255
    best, best_rate, sigma2 = ppca(x.flatten(1), 10)
    assert (round(best, 3), round(best_rate, 3)) == (182.155, 21.030)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        encoder, decoder = linear((1, 28, 28), 10, 1)
    vae, objective = VAE(encoder, decoder, StandardNormal(10), LearnedSigmaGaussian(0.3)), BetaVAE()
    decoder.set_output_bias(x.mean(0).unsqueeze(0))
    optimizer = torch.optim.Adam(vae.parameters(), lr=0.03)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=6000)
    noise = generator("linear VAE on MNIST")
    for step in range(6000):
        index = torch.randint(len(x), (250,), generator=noise)
        optimizer.zero_grad()
        objective(vae, Batch(x[index], None, 0), noise, step)["loss"].backward()
        optimizer.step()
        schedule.step()
    with torch.no_grad():
        terms = [objective(vae, Batch(part, None, 0), noise, 0) for part in x.split(6000)]
    elbo, rate = (sum(t[name].item() for t in terms) / len(terms) for name in ("elbo", "rate"))
    assert abs(elbo - best) < 0.5
    assert math.isclose(rate, best_rate, rel_tol=0.03)
    assert math.isclose(vae.likelihood.log_sigma.exp().item() ** 2, sigma2, rel_tol=0.05)
