import math

import torch
from linear_gaussian import LinearGaussian

from vae.evaluation.likelihood import ELBOTotals, log_likelihood


def test_importance_weighted_bound_of_a_linear_gaussian_model_is_its_exact_likelihood():
    exact = LinearGaussian()
    batch = exact.batch(10)
    for samples in (1, 3, 500):
        torch.testing.assert_close(
            log_likelihood(exact.vae(), batch, samples), exact.log_prob(batch.x), rtol=0, atol=1e-6
        )


def test_bound_rises_with_K_towards_the_likelihood_when_the_posterior_is_wrong():
    exact = LinearGaussian()
    batch, wrong = exact.batch(200), exact.vae(shift=0.3, stretch=1.5)
    bounds = [log_likelihood(wrong, batch, samples).mean().item() for samples in (1, 5, 5000)]
    assert bounds == sorted(bounds)
    truth = exact.log_prob(batch.x).mean().item()
    assert bounds[0] < truth - 0.3
    assert abs(bounds[-1] - truth) < 0.02


def test_decoding_in_parts_leaves_the_estimate_unbiased():
    exact = LinearGaussian()
    batch, wrong = exact.batch(50), exact.vae(stretch=1.3)
    whole = log_likelihood(wrong, batch, 4000)
    parts = log_likelihood(wrong, batch, 4000, max_decodes=50 * 7)
    torch.testing.assert_close(whole, parts, rtol=0, atol=0.15)
    assert not torch.equal(whole, parts)


def test_totals_are_means_over_images_whatever_the_batches():
    exact = LinearGaussian()
    batch, vae = exact.batch(100), exact.vae(shift=0.2)
    whole, parts = ELBOTotals(), ELBOTotals()
    whole.update(vae, batch)
    for i, x in enumerate(batch.x.split(30)):
        parts.update(vae, batch._replace(x=x, seed=i))
    assert math.isclose(whole.compute()["rate"], parts.compute()["rate"], rel_tol=1e-12)
    assert math.isclose(whole.compute()["rate"], whole.kl_per_dimension().sum().item(), rel_tol=1e-12)
    metrics = whole.compute()
    assert metrics["elbo"] == -(metrics["rate"] + metrics["distortion"])
    assert math.isclose(metrics["bits_per_dim"], -metrics["elbo"] / 12 / math.log(2), rel_tol=1e-12)


def test_a_unit_is_active_when_its_mean_varies_by_more_than_a_hundredth():
    exact = LinearGaussian()
    batch, vae = exact.batch(2000), exact.vae()
    with torch.no_grad():
        mean = vae.encode(batch.x).mean
        scale = (torch.tensor([1.2, 0.8, 0.5]) * 1e-2).sqrt() / mean.std(0, unbiased=False)
        vae.encoder.weight.mul_(scale[:, None])
    totals = ELBOTotals()
    totals.update(vae, batch)
    assert totals.compute()["active_units"] == 1
