import math

import pytest
import torch
from fitting import fit
from linear_gaussian import LinearGaussian

from vae.engine.build import build
from vae.errors import VAEError
from vae.evaluation.ais import (
    TARGET_ACCEPTANCE,
    anneal,
    bdmc,
    chains_at,
    hmc,
    log_likelihood_ais,
    nll_ais,
    sandwich,
    sigmoid_schedule,
    tuned_steps,
)
from vae.evaluation.likelihood import log_likelihood
from vae.priors import MixtureOfGaussians
from vae.seeding import generator


@pytest.mark.slow
def test_ais_hits_the_exact_likelihood_of_a_linear_gaussian_model_at_1000_temperatures():
    exact = LinearGaussian()
    batch = exact.batch(10)
    estimate = log_likelihood_ais(exact.vae(), batch, temperatures=1000, chains=100, leapfrogs=2)
    error = estimate - exact.log_prob(batch.x)
    assert error.mean().abs() < 0.02
    assert error.abs().max() < 0.1


@pytest.mark.slow
def test_the_bdmc_sandwich_contains_the_exact_likelihood():
    exact = LinearGaussian()
    vae = exact.vae()
    rough, fine = (sandwich(vae, 30, seed=3, temperatures=t, chains=8, leapfrogs=3) for t in (10, 200))
    for both in (rough, fine):
        truth = exact.log_prob(both.x)
        noise = (both.upper - both.lower).std() / 30**0.5
        assert both.lower.mean() < truth.mean() + 2 * noise
        assert both.upper.mean() > truth.mean() - 2 * noise
    assert (rough.upper - rough.lower).mean() > 0.2
    assert (fine.upper - fine.lower).mean().abs() < 0.1


def test_the_metrics_are_means_over_images_with_their_interval():
    exact = LinearGaussian()
    vae, batch = exact.vae(), exact.batch(6)
    metrics = nll_ais(vae, batch, temperatures=20, chains=4, leapfrogs=2)
    bound = log_likelihood_ais(vae, batch, temperatures=20, chains=4, leapfrogs=2)
    assert metrics["nll_ais20"] == -bound.mean().item()
    assert math.isclose(metrics["nll_ais20_ci95"], 1.96 * bound.std().item() / 6**0.5)
    both = sandwich(vae, 5, 1, temperatures=20, chains=4, leapfrogs=2)
    gap = bdmc(vae, 5, 1, temperatures=20, chains=4, leapfrogs=2)["bdmc_gap_ais20"]
    assert math.isclose(gap, (both.upper - both.lower).mean().item())


def test_without_a_move_ais_is_importance_sampling_from_the_prior():
    exact = LinearGaussian()
    vae, batch = exact.vae(), exact.batch(4)
    z = vae.prior.sample(12, generator("z")).unflatten(0, (3, 4))
    betas = sigmoid_schedule(7)
    log_w, acceptance = anneal(vae, batch.x, None, z, betas, torch.zeros(8, 4), 1, generator("hmc"))
    torch.testing.assert_close(log_w, vae.likelihood.log_prob(vae.decode(z), batch.x).detach())
    torch.testing.assert_close(acceptance, torch.ones(4).double())


def test_hmc_leaves_the_tempered_posterior_invariant():
    # started from the exact posterior at beta = 0.4, the chains keep its mean and variance
    exact = LinearGaussian()
    vae, batch = exact.vae(), exact.batch(2)
    beta, chains = 0.4, 20_000
    precision = beta * exact.weight.square().sum(0) / exact.variance + 1
    mean = beta * (batch.x.flatten(1) - exact.mean) @ exact.weight / exact.variance / precision
    noise = generator("chains")
    z = mean + torch.randn(chains, 2, 3, generator=noise, dtype=mean.dtype) / precision.sqrt()
    state, accepted = chains_at(vae, batch.x, None, z), 0
    for _ in range(4):
        state, probability = hmc(vae, batch.x, None, state, beta, torch.tensor([0.3, 0.35]).double(), 3, noise)
        accepted = probability.mean()
    assert 0.3 < accepted < 0.97  # neither trivially exact nor stuck
    torch.testing.assert_close(
        state.z.mean(0), mean.detach(), rtol=0, atol=5 / (chains * precision.min()).sqrt().item()
    )
    torch.testing.assert_close(
        state.z.var(0), (1 / precision.detach()).expand(2, -1), rtol=5 * (2 / chains) ** 0.5, atol=0
    )


def test_the_tuning_pass_finds_steps_of_the_target_acceptance():
    exact = LinearGaussian()
    vae, batch = exact.vae(), exact.batch(10)
    betas = sigmoid_schedule(200)
    steps = tuned_steps(vae, batch.x, None, betas, 32, 3, generator("tune"))
    assert steps.shape == (201, 10)
    z = vae.prior.sample(320, generator("z")).unflatten(0, (32, 10))
    _, acceptance = anneal(vae, batch.x, None, z, betas, steps, 3, generator("hmc"))
    assert (acceptance.mean() - TARGET_ACCEPTANCE).abs() < 0.1
    assert steps[-1].mean() < 0.7 * steps[30].mean()  # the posterior is narrower than the prior


def test_images_in_parts_are_each_estimated():
    exact = LinearGaussian()
    batch = exact.batch(9)
    estimate = log_likelihood_ais(exact.vae(), batch, temperatures=50, chains=8, leapfrogs=2, max_decodes=8 * 5)
    torch.testing.assert_close(estimate, exact.log_prob(batch.x), rtol=0, atol=1.0)


def test_the_schedule_is_a_sigmoid_from_zero_to_one():
    betas = sigmoid_schedule(10)
    assert betas[0] == 0
    assert betas[-1] == 1
    torch.testing.assert_close(betas + betas.flip(0), torch.ones(11).double())
    expected = (1 / (1 + math.exp(2)) - 1 / (1 + math.exp(4))) / (1 / (1 + math.exp(-4)) - 1 / (1 + math.exp(4)))
    assert math.isclose(sigmoid_schedule(4)[1], expected)
    with pytest.raises(VAEError):
        sigmoid_schedule(0)


def test_a_learned_prior_is_annealed_from():
    # a mixture of one standard normal is the standard normal
    exact = LinearGaussian()
    vae, batch = exact.vae(), exact.batch(10)
    vae.prior = MixtureOfGaussians(3, components=1).double()
    with torch.no_grad():
        vae.prior.mean.zero_()
    estimate = log_likelihood_ais(vae, batch, temperatures=100, chains=16, leapfrogs=2)
    assert (estimate - exact.log_prob(batch.x)).mean().abs() < 0.2


@pytest.mark.slow
def test_ais_and_the_importance_weighted_bound_agree_on_a_trained_model(tiny):
    # Wu et al. 2017: AIS certifies L_5000 of a trained VAE to within a nat, and never falls far below it
    data, module = build(tiny("data.limit=1000", "network.hidden=[64]", "model.latent_dim=8"))
    vae, train = module.vae, data.examples("train", 1000)
    fit(vae, train, steps=1500, lr=2e-3)
    batch = data.examples("test", 50)
    difference = log_likelihood_ais(vae, batch, temperatures=1000, leapfrogs=5) - log_likelihood(vae, batch, 5000)
    assert -0.3 < difference.mean() < 1
    assert bdmc(vae, 50, seed=0, temperatures=300, leapfrogs=5)["bdmc_gap_ais300"] < 0.5
