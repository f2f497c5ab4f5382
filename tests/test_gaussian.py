import torch
from torch.distributions import Independent, Normal

from vae.gaussian import DiagonalGaussian
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
