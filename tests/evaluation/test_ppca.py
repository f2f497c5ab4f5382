"""The exact optimum of the linear VAE, and the exact terms of given weights, against formulas, sampling and perturbation."""

from __future__ import annotations

import math

import pytest
import torch
from linear_gaussian import LinearGaussian

from vae.engine.build import build
from vae.errors import VAEError
from vae.evaluation.likelihood import ELBOTotals
from vae.evaluation.ppca import LinearWeights, optimum, spectrum
from vae.seeding import generator

VALUES = torch.tensor([5.0, 2.0, 1.5, 0.9, 0.5, 0.3, 0.2], dtype=torch.float64)


def at_the_optimum(values, k, sigma2, beta=1.0):
    """Tipping & Bishop 1999: W = U (Lambda - s)^1/2, s = beta sigma^2, q(z|x) = N(W' x / Lambda, s / Lambda)."""
    n, s = len(values), beta * sigma2
    length = (values[:k] - s).clamp(min=0).sqrt()
    kept = torch.maximum(values[:k], torch.tensor(s, dtype=values.dtype))
    decoder = torch.zeros(n, k, dtype=values.dtype)
    decoder[:k] = torch.diag(length)
    encoder = (decoder / kept).T
    zeros = torch.zeros(n, dtype=values.dtype), torch.zeros(k, dtype=values.dtype)
    log_sigma2 = torch.tensor(sigma2, dtype=values.dtype).log()
    return LinearWeights(decoder, encoder, *zeros, (s / kept).log(), log_sigma2)


@pytest.mark.parametrize(("k", "sigma2", "beta"), [(3, 0.475, 1.0), (4, 1.0, 1.0), (5, 0.1, 10.0), (5, 0.1, 4.0)])
def test_the_optimum_is_what_the_closed_form_weights_attain(k, sigma2, beta):
    best = optimum(VALUES, k, sigma2, beta)
    terms = at_the_optimum(VALUES, k, sigma2, beta).terms(VALUES)
    for name in ("elbo", "rate", "distortion", "squared_error"):
        assert terms[name].item() == pytest.approx(getattr(best, name))
    assert terms["kl"].tolist() == pytest.approx(best.kl)


def test_a_learned_variance_is_the_mean_of_the_eigenvalues_left_out():
    best = optimum(VALUES, 3)
    assert best.sigma2 == pytest.approx((0.9 + 0.5 + 0.3 + 0.2) / 4)
    assert best.active == 3
    log_det = VALUES[:3].log().sum().item() + 4 * math.log(best.sigma2)
    assert best.elbo == pytest.approx(-0.5 * (7 * math.log(2 * math.pi) + log_det + 7))  # pPCA's likelihood


def test_no_weights_nearby_are_better():
    best = optimum(VALUES, 3)
    weights = at_the_optimum(VALUES, 3, best.sigma2)
    noise = generator("nearby weights")
    for _ in range(50):
        moved = LinearWeights(*(p + 0.02 * torch.randn(p.shape, generator=noise, dtype=p.dtype) for p in weights))
        assert moved.terms(VALUES)["elbo"] < best.elbo


def test_only_eigenvalues_above_beta_sigma2_are_used():
    assert [optimum(VALUES, 6, 0.1, beta).active for beta in (1, 4, 10, 16, 60)] == [6, 5, 3, 2, 0]
    best = optimum(VALUES, 6, 0.1, 10.0)
    assert best.squared_error == pytest.approx(3 * 1.0 + 0.9 + 0.5 + 0.3 + 0.2)
    assert best.rate == pytest.approx(0.5 * math.log(5 * 2 * 1.5))


def test_exact_terms_are_the_sampled_ones(tiny):
    data, module = build(tiny("network=linear", "likelihood=gaussian", "likelihood.sigma=0.3", "model.latent_dim=4"))
    images = data.splits_ready().train.x
    weights = LinearWeights.of(module.vae, spectrum(images))
    terms = weights.terms(spectrum(images).values)
    batch = data.prepare(next(iter(data._loader("train", False, len(images)))), training=False)
    totals = ELBOTotals()
    for seed in range(400):
        totals.update(module.vae, batch._replace(seed=seed))
    sampled = totals.compute()
    assert terms["rate"].item() == pytest.approx(sampled["rate"], rel=1e-5)
    assert terms["elbo"].item() == pytest.approx(sampled["elbo"], rel=2e-2)
    assert terms["kl"].tolist() == pytest.approx(totals.kl_per_dimension().tolist(), rel=1e-4)


def test_weights_survive_the_change_of_coordinates(tiny):
    data, module = build(tiny("network=linear", "likelihood=gaussian", "model.latent_dim=4"))
    found = spectrum(data.splits_ready().train.x)
    before = {name: value.clone() for name, value in module.vae.state_dict().items()}
    weights = LinearWeights.of(module.vae, found)
    with torch.no_grad():
        for parameter in module.vae.parameters():
            parameter.zero_()
    weights.put_into(module.vae, found)
    for name, value in module.vae.state_dict().items():
        torch.testing.assert_close(value, before[name], atol=1e-5, rtol=1e-5)


def test_a_spectrum_has_the_moments_of_the_images():
    images = torch.randint(0, 256, (50, 1, 2, 3), generator=generator("images"), dtype=torch.uint8)
    found = spectrum(images, at_a_time=7)
    x = images.flatten(1).double() / 255
    torch.testing.assert_close(found.mean, x.mean(0))
    rebuilt = found.components @ torch.diag(found.values) @ found.components.T
    torch.testing.assert_close(rebuilt, torch.cov(x.T, correction=0))
    assert (found.values.diff() <= 0).all()


def test_what_has_no_closed_form_is_refused():
    with pytest.raises(VAEError, match="beta = 1"):
        optimum(VALUES, 3, beta=2.0)
    with pytest.raises(VAEError, match="between 1 and 6"):
        optimum(VALUES, 7, 0.1)
    with pytest.raises(VAEError, match="network=linear"):
        LinearWeights.of(LinearGaussian().vae(), spectrum(torch.zeros(2, 1, 3, 4, dtype=torch.uint8)))
