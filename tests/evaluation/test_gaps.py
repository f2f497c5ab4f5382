import math

import pytest
import torch
from linear_gaussian import LinearGaussian

from vae.errors import VAEError
from vae.evaluation.gaps import inference_gaps
from vae.flows import PlanarFlow


def test_gaps_are_zero_at_the_exact_posterior():
    exact = LinearGaussian()
    batch, vae = exact.batch(10), exact.vae()
    vae.likelihood.log_sigma.fill_(0.5 * math.log(exact.variance))  # in float64 to the last bit
    gaps = inference_gaps(vae, batch, exact.log_prob(batch.x), steps=200, elbo_samples=50)
    torch.testing.assert_close(gaps.approximation, torch.zeros(10).double(), rtol=0, atol=1e-5)
    torch.testing.assert_close(gaps.amortisation, torch.zeros(10).double(), rtol=0, atol=1e-5)


def test_both_elbos_meet_the_same_noise_so_that_no_search_is_no_gap():
    exact = LinearGaussian()
    batch, vae = exact.batch(10), exact.vae(shift=0.4, stretch=1.5)
    gaps = inference_gaps(vae, batch, exact.log_prob(batch.x), steps=1, learning_rate=0.0, elbo_samples=2)
    assert torch.equal(gaps.elbo_local, gaps.elbo_amortised)  # of two draws, whose noise is nats
    assert gaps.elbo_local.std() > 0.5


def test_what_a_wrong_encoder_loses_is_amortisation_and_equals_its_kl():
    exact = LinearGaussian()
    batch, vae = exact.batch(40), exact.vae(shift=0.4, stretch=1.5)
    gaps = inference_gaps(vae, batch, exact.log_prob(batch.x), steps=400, elbo_samples=4000)
    right, wrong = exact.vae().encode(batch.x), vae.encode(batch.x)
    kl = torch.distributions.kl_divergence(*(torch.distributions.Normal(m, (0.5 * v).exp()) for m, v in (wrong, right)))
    expected = kl.sum(-1).mean().item()
    summary = gaps.summary()
    assert math.isclose(summary["amortisation_gap"], expected, rel_tol=0.02)
    assert abs(summary["approximation_gap"]) < 1e-3
    assert summary["inference_gap"] == summary["approximation_gap"] + summary["amortisation_gap"]
    assert math.isclose(summary["inference_gap_ci95"], 1.96 * gaps.inference.std().item() / 40**0.5)
    torch.testing.assert_close(gaps.inference, gaps.log_likelihood - gaps.elbo_amortised)


def test_what_a_diagonal_gaussian_cannot_express_is_the_approximation_gap():
    # decoder columns that are not orthogonal: the exact posterior is correlated, and the best diagonal q has the
    # precisions of its diagonal, at a KL of 1/2 (sum log precision_jj - log det precision)
    exact = LinearGaussian()
    exact.weight = exact.weight @ torch.tensor([[1, 0.5, 0], [0, 1, 0.3], [0, 0, 1]], dtype=torch.float64)
    batch, vae = exact.batch(20), exact.vae()
    gaps = inference_gaps(vae, batch, exact.log_prob(batch.x), steps=500, elbo_samples=4000)
    precision = exact.weight.T @ exact.weight / exact.variance + torch.eye(3)
    expected = 0.5 * (precision.diagonal().log().sum() - torch.linalg.slogdet(precision).logabsdet).item()
    assert expected > 0.2
    assert math.isclose(gaps.summary()["approximation_gap"], expected, abs_tol=0.02)


def test_the_local_posterior_of_a_flow_is_a_flow():
    exact = LinearGaussian()
    batch, vae = exact.batch(10), exact.vae(shift=0.4)
    flow = PlanarFlow(3, steps=1)
    extra = torch.full((7,), 0.1, dtype=torch.float64)
    vae.encoder.register_forward_hook(lambda _, inputs, out: torch.cat([out, extra.expand(len(out), -1)], 1))
    vae.posterior = flow
    gaps = inference_gaps(vae, batch, exact.log_prob(batch.x), steps=200, elbo_samples=1000)
    assert gaps.summary()["amortisation_gap"] > 0.3
    assert abs(gaps.summary()["approximation_gap"]) < 0.05


def test_a_likelihood_for_each_image_is_asked_for():
    exact = LinearGaussian()
    with pytest.raises(VAEError, match="10 images"):
        inference_gaps(exact.vae(), exact.batch(10), torch.zeros(3))
