import numpy as np
import pytest
import torch
from linear_gaussian import LinearGaussian
from scipy.integrate import quad

from vae.errors import VAEError
from vae.objectives.elbo import BetaVAE
from vae.objectives.mmd import WAE, InfoVAE, imq, rbf, squared_mmd
from vae.seeding import generator

EXACT = LinearGaussian()
DIM, BANDWIDTH = 3, 4.0
MEAN, VARIANCE = torch.tensor([0.5, -0.3, 0.0]), torch.tensor([0.5, 1.0, 2.0])


def rbf_mean(mean, variance, bandwidth=BANDWIDTH):
    """E exp(-|d|^2 / bandwidth) of d ~ N(mean, diag variance)."""
    factors = (1 + 2 * variance / bandwidth) ** -0.5 * torch.exp(-(mean**2) / (bandwidth + 2 * variance))
    return float(factors.prod())


def imq_mean(mean, variance):
    """E c / (c + |d|^2), by c / (c + u) = integral of c exp(-t (c + u)) over t > 0."""
    value, _ = quad(
        lambda t: BANDWIDTH * np.exp(-BANDWIDTH * t) * rbf_mean(mean, variance, 1 / max(t, 1e-12)), 0, np.inf
    )
    return value


def exact_mmd(kernel_mean):
    """MMD^2 of N(MEAN, VARIANCE) and N(0, I)."""
    zero, one = torch.zeros(DIM), torch.ones(DIM)
    within = kernel_mean(zero, 2 * VARIANCE) + kernel_mean(zero, 2 * one)
    return within - 2 * kernel_mean(MEAN, VARIANCE + one)


@pytest.mark.parametrize(("kernel", "kernel_mean"), [(rbf, rbf_mean), (imq, imq_mean)], ids=["rbf", "imq"])
def test_mmd_of_two_gaussians_has_its_closed_form(kernel, kernel_mean):
    noise = generator("two gaussians")
    estimates = []
    for _ in range(100):
        a = MEAN + VARIANCE.sqrt() * torch.randn(200, DIM, generator=noise)
        b = torch.randn(200, DIM, generator=noise)
        estimates.append(squared_mmd(a, b, kernel, BANDWIDTH, unbiased=True))
    estimates = torch.stack(estimates)
    exact = exact_mmd(kernel_mean)
    assert exact > 0.02
    assert abs(estimates.mean() - exact) < 3 * estimates.std() / 10


def test_mmd_of_prior_samples_is_zero_in_the_mean_unbiased_and_known_biased():
    noise, n = generator("prior"), 10
    pairs = [torch.randn(2, n, DIM, generator=noise) for _ in range(1000)]
    for unbiased, expected in ((True, 0.0), (False, 2 / n * (1 - rbf_mean(torch.zeros(DIM), 2 * torch.ones(DIM))))):
        estimates = torch.stack([squared_mmd(a, b, rbf, BANDWIDTH, unbiased) for a, b in pairs])
        assert abs(estimates.mean() - expected) < 3 * estimates.std() / len(pairs) ** 0.5


@pytest.mark.parametrize("n", [4, 16])
def test_outside_training_the_estimate_is_unbiased_so_that_no_batch_size_enters(n):
    vae, noise, objective = EXACT.vae(), generator("prior"), InfoVAE()
    pairs = [torch.randn(n, DIM, generator=noise, dtype=torch.float64) for _ in range(300)]
    bias = 2 / n * (1 - rbf_mean(torch.zeros(DIM), 2 * torch.ones(DIM), bandwidth=2 * DIM))
    for training, expected in ((True, bias), (False, 0.0)):
        objective.train(training)
        estimates = torch.stack([objective.mmd(vae, z, noise) for z in pairs])
        assert abs(estimates.mean() - expected) < 3 * estimates.std() / len(pairs) ** 0.5


def test_the_biased_estimate_is_never_negative_and_zero_only_for_equal_sets():
    a, b = torch.randn(2, 30, DIM, generator=generator("sets"), dtype=torch.float64)
    assert squared_mmd(a, a.flip(0), imq, BANDWIDTH, unbiased=False).abs() < 1e-12
    assert squared_mmd(a, b, imq, BANDWIDTH, unbiased=False) > 0
    assert squared_mmd(a, a.flip(0), imq, BANDWIDTH, unbiased=True) < 0


def test_a_single_draw_is_compared_with_a_single_draw():
    a, b = torch.tensor([[0.0, 0.0]]), torch.tensor([[1.0, 1.0]])
    assert squared_mmd(a, b, imq, 2.0, unbiased=True).item() == pytest.approx(1 + 1 - 2 * 2 / (2 + 2))


def run(objective, vae, n=20):
    return objective(vae, EXACT.batch(n), generator("noise"), 0)


def test_info_vae_is_the_vae_where_the_mmd_has_no_weight():
    vae = EXACT.vae(shift=0.3)
    torch.testing.assert_close(run(InfoVAE(0.0, 1.0), vae)["loss"], run(BetaVAE(), vae)["loss"])
    torch.testing.assert_close(run(InfoVAE(0.6, 0.4), vae)["loss"], run(BetaVAE(0.4), vae)["loss"])


def test_info_vae_weighs_rate_and_mmd_as_the_paper_does_and_the_bandwidth_is_twice_the_dimension():
    vae = EXACT.vae(shift=0.3)
    terms = run(InfoVAE(0.25, 10.0), vae)
    assert terms["loss"].item() == pytest.approx(
        (terms["distortion"] + 0.75 * terms["rate"] + 9.25 * terms["mmd"]).item()
    )
    assert run(InfoVAE(0.25, 10.0, bandwidth=6.0), vae)["mmd"] == terms["mmd"]
    assert run(InfoVAE(0.25, 10.0, bandwidth=1.0), vae)["mmd"] != terms["mmd"]


def test_wae_is_distortion_and_mmd_alone_and_deterministic_it_takes_the_mean():
    vae = EXACT.vae(shift=0.3)
    terms = run(WAE(5.0), vae)
    assert terms["loss"].item() == pytest.approx((terms["distortion"] + 5 * terms["mmd"]).item())
    loss = run(WAE(5.0, deterministic=True), vae)["loss"]
    of_mean, of_log_var = torch.autograd.grad(loss, [vae.encoder.weight, vae.encoder.log_var], allow_unused=True)
    assert of_mean.abs().max() > 0
    assert of_log_var is None or not of_log_var.any()
    x = EXACT.batch(20).x
    at_mean = -vae.likelihood.log_prob(vae.decode(vae.encode(x).mean), x).mean()
    torch.testing.assert_close(run(WAE(0.0, deterministic=True), vae)["loss"], at_mean)


@pytest.mark.parametrize(
    "make",
    [
        lambda: InfoVAE(alpha=2.0),
        lambda: InfoVAE(alpha=0.0, lambda_mmd=0.5),
        lambda: InfoVAE(kernel="laplace"),
        lambda: WAE(bandwidth=0.0),
    ],
)
def test_options_out_of_range_are_refused(make):
    with pytest.raises(VAEError):
        make()
