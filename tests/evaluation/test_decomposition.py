import math

import pytest
import torch
from linear_gaussian import LinearGaussian

from vae.data.images import Batch
from vae.errors import VAEError
from vae.evaluation.decomposition import aggregate_log_prob, elbo_decomposition
from vae.flows import PlanarFlow
from vae.gaussian import DiagonalGaussian
from vae.priors import MixtureOfGaussians
from vae.seeding import generator


def correlated(n: int):
    """A model of which q(z|x) = N(a(x), diag v) and q(z) = N(0, C + diag v), both known, and n images of it."""
    exact = LinearGaussian(latent_dim=2)
    vae = exact.vae()
    covariance = torch.tensor([[1.5, 0.9], [0.9, 1.0]], dtype=torch.float64)
    variance = torch.tensor([0.3, 0.2], dtype=torch.float64)
    with torch.no_grad():
        # pixels 0 and 1 hold the code, and the encoder reads it off
        vae.encoder.weight.zero_()
        vae.encoder.weight[:, :2] = torch.eye(2)
        vae.encoder.centre.zero_()
        vae.encoder.log_var.copy_(variance.log())
    x = torch.randn(n, 12, generator=generator("images"), dtype=torch.float64)
    x[:, :2] -= x[:, :2].mean(0)
    x[:, :2] @= torch.linalg.inv(torch.linalg.cholesky(x[:, :2].T @ x[:, :2] / n)).T  # exactly white
    x[:, :2] @= torch.linalg.cholesky(covariance).T
    return vae, Batch(x.unflatten(1, exact.shape), None, 7), covariance + variance.diag(), variance


def test_terms_of_a_known_gaussian_aggregate_posterior():
    n = 3000
    vae, batch, total, variance = correlated(n)
    terms = elbo_decomposition(vae, batch)
    half_log_det = 0.5 * torch.linalg.slogdet(total).logabsdet
    spread = total.diagonal()
    expected = {
        f"index_code_mi_n{n}": half_log_det - 0.5 * variance.log().sum(),
        f"total_correlation_n{n}": 0.5 * spread.log().sum() - half_log_det,
        f"dimension_wise_kl_n{n}": 0.5 * (spread - 1 - spread.log()).sum(),
        f"marginal_kl_n{n}": 0.5 * (spread - 1).sum() - half_log_det,
        "rate": 0.5 * (spread - 1 - variance.log()).sum(),  # exact: the sample covariance of the means is
    }
    for name, value in expected.items():
        assert math.isclose(terms[name], value, abs_tol=1e-9 if name == "rate" else 0.05), name


def test_the_terms_add_up_to_the_rate():
    vae, batch, _, _ = correlated(500)
    terms = elbo_decomposition(vae, batch)
    parts = [terms[f"{name}_n500"] for name in ("index_code_mi", "total_correlation", "dimension_wise_kl")]
    assert math.isclose(sum(parts), terms["rate_sampled"], rel_tol=1e-12)
    assert math.isclose(terms["index_code_mi_n500"] + terms["marginal_kl_n500"], terms["rate_sampled"], rel_tol=1e-12)
    assert math.isclose(terms["rate_sampled"], terms["rate"], abs_tol=0.1)


def test_mutual_information_of_codes_far_apart_is_log_n_and_of_equal_codes_zero():
    q = DiagonalGaussian(100.0 * torch.arange(8.0)[:, None].expand(-1, 3), torch.zeros(8, 3))
    z = q.rsample(generator("z"))
    joint, _ = aggregate_log_prob(z, q)
    torch.testing.assert_close(q.log_prob(z) - joint, torch.full((8,), math.log(8)))
    q = DiagonalGaussian(torch.ones(8, 3), torch.zeros(8, 3))
    joint, marginals = aggregate_log_prob(z, q)
    torch.testing.assert_close(q.log_prob(z), joint)
    torch.testing.assert_close(marginals.sum(1), joint)


def test_blocks_and_fewer_draws_leave_the_aggregate_as_it_is():
    vae, batch, _, _ = correlated(60)
    q = vae.encode(batch.x)
    z = q.rsample(generator("z"))
    for whole, parts in zip(aggregate_log_prob(z, q), aggregate_log_prob(z, q, max_elements=7 * 60 * 2), strict=True):
        torch.testing.assert_close(whole, parts, rtol=0, atol=1e-14)
    some = elbo_decomposition(vae, batch, draws=10)
    assert math.isclose(some["index_code_mi_n60"] + some["marginal_kl_n60"], some["rate_sampled"], rel_tol=1e-12)


def test_a_prior_that_does_not_factorise_has_a_marginal_kl_and_no_total_correlation():
    vae, batch, _, _ = correlated(50)
    vae.prior = MixtureOfGaussians(2).double()
    terms = elbo_decomposition(vae, batch)
    assert "marginal_kl_n50" in terms
    assert "total_correlation_n50" not in terms


def test_a_flow_posterior_is_refused():
    vae, batch, _, _ = correlated(5)
    flow = PlanarFlow(2, 1)
    flow.forward = lambda parameters: PlanarFlow(2, 1)(torch.cat([parameters, parameters[:, :1], parameters], 1))
    vae.posterior = flow
    with pytest.raises(VAEError, match="diagonal Gaussian"):
        elbo_decomposition(vae, batch)
