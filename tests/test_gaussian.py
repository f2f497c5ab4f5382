import math

import pytest
import torch
from torch.distributions import Independent, Normal

from vae.gaussian import DiagonalGaussian, gaussian_log_prob
from vae.seeding import generator


def random_gaussian(*shape):
    parameters = torch.randn(*shape, generator=generator("parameters"), dtype=torch.float64)
    return DiagonalGaussian.from_parameters(parameters)


def test_log_prob_equals_torch_distributions():
    q = random_gaussian(5, 6)
    z = torch.randn(4, 5, 3, generator=generator("z"), dtype=torch.float64)
    reference = Independent(Normal(q.mean, torch.exp(q.log_var / 2)), 1)
    torch.testing.assert_close(q.log_prob(z), reference.log_prob(z), rtol=1e-12, atol=1e-12)


def test_samples_have_the_mean_and_variance_they_should():
    q, n = random_gaussian(2, 6), 200_000
    z = q.rsample(generator("draws"), (n,))
    standard_error = torch.exp(q.log_var / 2) / n**0.5
    assert ((z.mean(0) - q.mean).abs() < 4 * standard_error).all()
    torch.testing.assert_close(z.var(0), torch.exp(q.log_var), rtol=0.02, atol=0)


def test_reparameterised_gradient_is_that_of_the_expectation():
    # E[z^2] = mean^2 + exp(log_var): its gradient is (2 mean, exp(log_var))
    mean, log_var = torch.tensor([0.7, -1.2]).requires_grad_(), torch.tensor([0.3, -0.8]).requires_grad_()
    z = DiagonalGaussian(mean, log_var).rsample(generator("draws"), (400_000,))
    z.square().mean(0).sum().backward()
    torch.testing.assert_close(mean.grad, 2 * mean.detach(), rtol=0.02, atol=0)
    torch.testing.assert_close(log_var.grad, log_var.detach().exp(), rtol=0.02, atol=0)


def test_a_draw_follows_from_the_generator_alone():
    q = random_gaussian(2, 6)
    assert torch.equal(q.rsample(generator(1)), q.rsample(generator(1)))
    assert not torch.equal(q.rsample(generator(1)), q.rsample(generator(2)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_log_prob_is_exact_where_the_variance_or_the_square_leaves_the_range_of_floats(dtype):
    log_var = torch.tensor([-100.0, -100.0, -150.0, 120.0, -1e4, 1e4], dtype=dtype, requires_grad=True)
    noise = torch.tensor([0.0, 3.0, -2.0, 0.5, 0.0, 0.0], dtype=torch.float64)  # (x - mean) / sigma
    mean = (noise * torch.exp(log_var.detach().double() / 2).nan_to_num(posinf=0)).to(dtype).requires_grad_()
    log_prob = gaussian_log_prob(torch.zeros((), dtype=dtype), mean, log_var)
    expected = -0.5 * (math.log(2 * math.pi) + log_var.detach().double() + noise.square())
    assert log_prob[0].item() == pytest.approx(49.0811, abs=1e-4)
    torch.testing.assert_close(log_prob.double(), expected, rtol=1e-5, atol=0)
    of_mean, of_log_var = torch.autograd.grad(log_prob.sum(), (mean, log_var))
    torch.testing.assert_close(of_log_var.double(), 0.5 * (noise.square() - 1), rtol=1e-5, atol=1e-5)
    sigma = torch.exp(log_var.detach().double()[:4] / 2)
    torch.testing.assert_close(of_mean.double()[:4] * sigma, -noise[:4], rtol=1e-5, atol=1e-5)
    assert of_mean[4:].eq(0).all()


def test_low_precision_parameters_give_the_density_and_draws_of_float32():
    q = DiagonalGaussian.from_parameters(torch.randn(5, 6, generator=generator("parameters")).bfloat16())
    narrow = DiagonalGaussian(q.mean.bfloat16(), q.log_var.bfloat16())
    z = narrow.rsample(generator("z"), (1000,))
    assert q.mean.dtype == z.dtype == torch.float32
    assert z.unique().numel() > 10_000  # draws are not rounded to bfloat16
    assert torch.equal(z, q.rsample(generator("z"), (1000,)))
    assert torch.equal(narrow.log_prob(z), q.log_prob(z))
