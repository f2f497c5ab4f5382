"""Flow matching, held to the one path whose velocity is known: that from N(0, I) to another Gaussian."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from test_priors import randomised

from vae.errors import VAEError
from vae.fitting import fit_gaussian
from vae.flow_matching import FlatNet, FlowMatching, MapNet, fit_flow_matching, integrate, jacobian_trace
from vae.priors import StandardNormal
from vae.seeding import generator

MEAN = torch.tensor([1.0, -0.5, 2.0]).double()
LOWER = torch.tensor([[1.2, 0, 0], [0.7, 0.4, 0], [-0.5, 0.3, 0.9]]).double()
NORMAL = torch.distributions.MultivariateNormal(MEAN, scale_tril=LOWER)


def closed_form(x, t, mean=MEAN, covariance=LOWER @ LOWER.T):
    """v(x, t) = m + (t S - (1 - t) I) ((1 - t)^2 I + t^2 S)^-1 (x - t m) of the path from N(0, I) to N(m, S), and its trace.

    E[x1 - x0 | xt = x], of x0 and x1 independent and xt = (1 - t) x0 + t x1.
    """
    eye = torch.eye(len(mean), dtype=x.dtype)
    slope = (t * covariance - (1 - t) * eye) @ torch.linalg.inv((1 - t) ** 2 * eye + t**2 * covariance)
    return mean + (x - t * mean) @ slope.T, slope.trace().expand(len(x))


def normal(*shape):
    return torch.randn(*shape, generator=generator("flow matching", *shape), dtype=torch.float64)


def test_the_exact_velocity_carries_noise_to_exact_draws_with_their_exact_density():
    """x1 = m + S^(1/2) x0: along each eigenvector of S the path is scaled by ((1 - t)^2 + t^2 l)^(1/2)."""
    noise = normal(7, 3)
    values, vectors = torch.linalg.eigh(LOWER @ LOWER.T)
    exact = MEAN + noise @ (vectors * values.sqrt()) @ vectors.T
    drawn, divergence = integrate(closed_form, noise, 0, 1, 20)
    torch.testing.assert_close(drawn, exact, rtol=0, atol=1e-5)
    torch.testing.assert_close(divergence, values.log().sum().expand(7) / 2, rtol=0, atol=1e-5)
    back, integral = integrate(closed_form, exact, 1, 0, 20)
    found = StandardNormal(3).log_prob(back) + integral
    torch.testing.assert_close(found, NORMAL.log_prob(exact), rtol=0, atol=1e-5)


def test_the_error_of_the_integrator_is_of_fourth_order():
    """dx/dt = cos(t) x has x(1) = x(0) exp(sin 1), and the integral of its divergence is D sin 1."""
    x = normal(2, 3)

    def errors(steps):
        end, integral = integrate(lambda x, t: (t.cos() * x, 3 * t.cos().expand(len(x))), x, 0, 1, steps)
        exact = x * math.exp(math.sin(1))
        return (end - exact).abs().max().item(), (integral - 3 * math.sin(1)).abs().max().item()

    for coarse, fine in zip(errors(8), errors(16), strict=True):
        assert coarse / fine == pytest.approx(16, rel=0.1)
        assert fine < 1e-6


@pytest.mark.parametrize("net", [FlatNet(12, 9), MapNet((3, 2, 2), 5)], ids=["flat", "map"])
def test_the_divergence_is_the_trace_of_the_jacobian(net):
    net, y = randomised(net, 0.4), normal(3, 12)
    for t in (torch.tensor(0.3).double(), torch.tensor([0.1, 0.6, 1.0]).double()):
        jacobian = torch.autograd.functional.jacobian(lambda y, t=t: net(y, t), y)
        with torch.no_grad():
            value, divergence = net.with_divergence(y, t)
        torch.testing.assert_close(value, net(y, t))
        torch.testing.assert_close(divergence, torch.stack([jacobian[i, :, i].trace() for i in range(3)]))


def test_hutchinsons_estimate_over_all_signs_is_exact_and_of_one_probe_is_right_on_average(monkeypatch):
    net, y, t = randomised(MapNet((1, 2, 2), 5), 0.4), normal(3, 4), torch.tensor(0.3).double()
    exact = jacobian_trace(lambda y: net(y, t), y)[1]
    signs = torch.tensor(list(itertools.product([1.0, -1], repeat=4))).double()[:, None].expand(-1, 3, -1)
    torch.testing.assert_close(jacobian_trace(lambda y: net(y, t), y, signs)[1], exact)
    monkeypatch.setattr("vae.flow_matching.MOST_EXACT", 3)
    one = net.with_divergence(y, t)[1]
    assert torch.equal(one, net.with_divergence(y, t)[1]) and not torch.allclose(one, exact)
    monkeypatch.setattr("vae.flow_matching.PROBES", 800)
    torch.testing.assert_close(net.with_divergence(y, t)[1], exact, rtol=0, atol=0.15)


@pytest.mark.parametrize("shape", [(3,), (1, 2, 3)])
def test_it_starts_as_the_standard_normal_with_its_closed_form_and_its_gradient_alive(shape):
    flow, d = FlowMatching(shape, steps=3).double(), math.prod(shape)
    z = normal(2, 5, d)
    torch.testing.assert_close(flow.log_prob(z), StandardNormal(d).log_prob(z), rtol=0, atol=1e-12)
    x = normal(4, d)
    for t in (0.0, 0.3, 1.0):
        exact = closed_form(x, t, torch.zeros(d).double(), torch.eye(d).double())[0]
        torch.testing.assert_close(flow.velocity(x, torch.tensor(t).double()), exact)
    # E over t of 1 / ((1 - t)^2 + t^2), the variance of x - e that no velocity explains: pi / 2
    loss = flow.loss(normal(9000 // d, d), generator("loss"))
    assert loss.item() == pytest.approx(math.pi / 2, abs=0.05)
    loss.backward()
    assert flow.net.last.weight.grad.abs().sum() > 0


def test_a_trained_network_approaches_the_closed_form():
    draws = MEAN.float() + normal(4000, 3).float() @ LOWER.T.float()
    unknown = torch.zeros(3), torch.eye(3)  # nothing is whitened: the flow has it all to learn
    options = {"width": 32, "steps": 10, "epochs": 20, "batch_size": 200, "lr": 1e-2}
    flow = fit_flow_matching(draws, unknown, (3,), draws[:500], **options).flow.double()
    error, scale = 0.0, 0.0
    for t in (0.1, 0.5, 0.9):
        at = (1 - t) * normal(2000, 3) + t * (MEAN + normal(3, 2000).T @ LOWER.T)
        exact = closed_form(at, t)[0]
        error += (flow.velocity(at, torch.tensor(t).double()) - exact).square().mean().item()
        scale += exact.var(0).mean().item()
    assert error < 0.02 * scale
    z = NORMAL.sample((500,))
    assert (NORMAL.log_prob(z) - flow.log_prob(z)).mean().item() == pytest.approx(0, abs=0.1)


def test_a_fitted_flow_is_a_density_that_its_draws_follow():
    noise = generator("moons")
    angle = math.pi * torch.rand(3000, generator=noise)
    z = torch.stack([angle.cos(), angle.sin()], 1) * 3 + 0.4 * torch.randn(3000, 2, generator=noise)
    moments = z.double().mean(0), torch.cov(z.double().T, correction=0)
    gaussian = fit_gaussian(*moments).log_prob(z).mean()
    options = {"width": 32, "steps": 8, "epochs": 12, "batch_size": 200, "lr": 1e-2, "seed": 3}
    fitted, again = (fit_flow_matching(z, moments, (2,), z[:300], **options) for _ in range(2))
    assert fitted.log_prob(z).mean() > gaussian + 0.3
    assert torch.equal(fitted.log_prob(z), again.log_prob(z))
    axis = torch.linspace(-7, 9, 120).double()
    grid = torch.cartesian_prod(axis, axis)
    mass = fitted.log_prob(grid).exp() * (16 / 119) ** 2
    assert mass.sum().item() == pytest.approx(1, abs=0.01)
    drawn, mean = fitted.sample(20_000, noise).double(), mass @ grid
    torch.testing.assert_close(drawn.mean(0), mean, rtol=0, atol=0.05)
    torch.testing.assert_close(torch.cov(drawn.T), (grid - mean).T * mass @ (grid - mean), rtol=0.05, atol=0.05)


def test_a_flow_of_maps_learns_what_a_gaussian_alike_at_all_places_leaves_out():
    """Places that covary with their neighbours: it starts at the Gaussian in which they do not, on the way to the full one."""
    z = normal(1500, 1, 3, 3)
    z = (z + 0.5 * z.roll(1, -1)).flatten(1).float()
    whole = z.double().mean(0), torch.cov(z.double().T)
    alone = whole[0], whole[1].diagonal().mean().reshape(1, 1)
    options = {"width": 12, "steps": 4, "batch_size": 100, "lr": 1e-2}
    start, fitted = (fit_flow_matching(z, alone, (1, 3, 3), z[:100], epochs=epochs, **options) for epochs in (0, 5))
    least, most = (fit_gaussian(*moments).log_prob(z[:100]).mean().item() for moments in (alone, whole))
    assert start.log_prob(z[:100]).mean().item() == pytest.approx(least, abs=1e-3)
    assert least + 0.4 * (most - least) < fitted.log_prob(z[:100]).mean().item() < most + 0.3


def test_numbers_that_make_no_sense_are_refused():
    for options, sentence in (({"width": 0}, r"prior\.width=0"), ({"steps": 0}, r"prior\.steps=0")):
        with pytest.raises(VAEError, match=sentence):
            FlowMatching((3,), **options)
