"""Priors fitted to the aggregate posterior, known of a linear VAE off its optimum; densities held to torch's."""

from __future__ import annotations

import pytest
import torch
from linear_gaussian import LinearGaussian

from vae.errors import VAEError
from vae.evaluation.decomposition import elbo_decomposition
from vae.evaluation.likelihood import ELBOTotals, log_likelihood
from vae.fitting import Aggregate, FullMixture, descend, fit_flow, fit_gaussian, fit_mixture, fit_vampprior
from vae.gaussian import DiagonalGaussian
from vae.kl import kl_gaussian_full
from vae.seeding import generator


def exact_batch(exact: LinearGaussian, n: int = 2000):
    """Images whose mean and covariance are those of the model, not nearly but exactly."""
    batch = exact.batch(n)
    x = batch.x.flatten(1)
    covariance = exact.weight @ exact.weight.T + exact.variance * torch.eye(len(exact.mean), dtype=x.dtype)
    centred = x - x.mean(0)
    now, wanted = (torch.linalg.cholesky(c) for c in (centred.T @ centred / n, covariance))
    x = torch.linalg.solve_triangular(now, centred.T, upper=False).T @ wanted.T + exact.mean
    return batch._replace(x=x.unflatten(1, exact.shape)), covariance


def aggregate_of(vae, batch) -> Aggregate:
    found = Aggregate()
    with torch.no_grad():
        for number, x in enumerate(batch.x.split(700)):
            posterior = vae.encode(x)
            found.add(posterior, posterior.rsample(generator("draw", number)))
    return found


@pytest.fixture(scope="module")
def off():
    """A linear VAE off its optimum, its images, and the mean and covariance of q(z) in closed form."""
    exact = LinearGaussian()
    vae = exact.vae(shift=0.3, stretch=1.5)
    with torch.no_grad():  # a mean that mixes the latents, so that q(z) has a covariance
        vae.encoder.weight.copy_(
            torch.tensor([[1.0, 0.4, 0], [-0.3, 0.8, 0.2], [0, 0.5, 1.2]]).double() @ vae.encoder.weight
        )
    batch, S = exact_batch(exact)
    V, D = vae.encoder.weight.detach(), torch.diag(vae.encoder.log_var.detach().exp())
    return exact, vae, batch, V @ (exact.mean - vae.encoder.centre), V @ S @ V.T + D


def test_moments_of_a_linear_vae_off_its_optimum_are_those_of_its_closed_form(off):
    _, vae, batch, mean, covariance = off
    found = aggregate_of(vae, batch)
    torch.testing.assert_close(found.moments(), (mean, covariance), rtol=0, atol=1e-10)
    assert found.z.shape == (2000, 3)
    torch.testing.assert_close(found.z.mean(0), mean, rtol=0, atol=0.15)
    torch.testing.assert_close(torch.cov(found.z.T), covariance, rtol=0.1, atol=0.1)
    prior = fit_gaussian(mean, covariance, torch.float64)
    torch.testing.assert_close(prior.scale[0] @ prior.scale[0].T, covariance)


@pytest.mark.parametrize("beta", [0.5, 1.0, 2.0, 4.0])
def test_at_the_optimum_of_any_beta_it_is_the_standard_normal(beta):
    """Of the data's eigenvalues l and a decoder's variance s2: w^2 = l - beta s2, var = beta s2 / l, mean = w u'(x - m) / l."""
    exact = LinearGaussian()
    batch, _ = exact_batch(exact)
    eigenvalues = exact.weight.square().sum(0) + exact.variance
    directions = exact.weight / exact.weight.square().sum(0).sqrt()
    variance = 0.15
    vae = exact.vae()
    with torch.no_grad():
        vae.decoder.weight.copy_(directions * (eigenvalues - beta * variance).sqrt())
        vae.encoder.weight.copy_(vae.decoder.weight.T / eigenvalues[:, None])
        vae.encoder.log_var.copy_((beta * variance / eigenvalues).log())

    def loss() -> torch.Tensor:
        """E distortion + beta rate over images and z, in closed form and without constants: here its gradient vanishes."""
        q, x = vae.encode(batch.x), batch.x.flatten(1)
        error = (x - vae.decode(q.mean).flatten(1)).square().sum(1)
        error = error + (q.log_var.exp() * vae.decoder.weight.square().sum(0)).sum(1)
        return (error / (2 * variance) + beta * vae.prior.kl(q).sum(1)).mean()

    gradients = torch.autograd.grad(loss(), [vae.decoder.weight, vae.decoder.bias, *vae.encoder.parameters()])
    assert all(gradient.abs().max() < 1e-10 for gradient in gradients)
    mean, covariance = aggregate_of(vae, batch).moments()
    torch.testing.assert_close(mean, torch.zeros(3).double(), rtol=0, atol=1e-10)
    torch.testing.assert_close(covariance, torch.eye(3).double(), rtol=0, atol=1e-10)


def test_the_likelihood_under_it_is_the_gaussian_marginal(off):
    exact, vae, batch, mean, covariance = off
    vae.prior, standard = fit_gaussian(mean, covariance, torch.float64), vae.prior
    try:
        x = batch.x[:20]
        found = log_likelihood(vae, batch._replace(x=x), 20_000)
        ours = log_likelihood(vae, batch._replace(x=x), 1)
    finally:
        vae.prior = standard
    marginal = exact.weight @ covariance @ exact.weight.T + exact.variance * torch.eye(12).double()
    truth = torch.distributions.MultivariateNormal(exact.mean + exact.weight @ mean, marginal).log_prob(x.flatten(1))
    torch.testing.assert_close(found.mean(), truth.mean(), rtol=0, atol=0.1)
    assert ours.mean() < truth.mean()


def test_the_rate_falls_by_the_marginal_kl_and_no_more(off):
    _, vae, batch, mean, covariance = off
    rates, standard = [], vae.prior
    for prior in (standard, fit_gaussian(mean, covariance, torch.float64)):
        vae.prior, totals = prior, ELBOTotals()
        totals.update(vae, batch)
        rates.append(totals.compute()["rate"])
    vae.prior = standard
    zero, eye = torch.zeros(3).double(), torch.eye(3).double()
    marginal = kl_gaussian_full(p_mean=mean, p_covariance=covariance, q_mean=zero, q_covariance=eye)
    assert rates[0] - rates[1] == pytest.approx(marginal.item(), abs=1e-9)
    assert marginal > 0.3


def test_the_marginal_kl_falls_to_zero(off):
    """Measured with the exact aggregate posterior of N images, which lies about D (D + 3) / 4 N above that of all."""
    exact, vae, _, mean, covariance = off
    batch, _ = exact_batch(exact, 600)
    found, standard = [], vae.prior
    for prior in (standard, fit_gaussian(mean, covariance, torch.float64)):
        vae.prior = prior
        found.append(elbo_decomposition(vae, batch)["marginal_kl_n600"])
    vae.prior = standard
    zero, eye = torch.zeros(3).double(), torch.eye(3).double()
    before = kl_gaussian_full(p_mean=mean, p_covariance=covariance, q_mean=zero, q_covariance=eye).item()
    assert found[0] == pytest.approx(before, abs=0.1)
    assert found[1] == pytest.approx(0, abs=0.03)


def test_a_gaussian_alike_at_all_places_is_the_full_one_of_its_blocks():
    """c = 2 channels at P = 3 places: its covariance is C x I in the order of latents, channel after channel."""
    noise = generator("places")
    found = Aggregate()
    posterior = DiagonalGaussian(
        torch.randn(50, 6, generator=noise).double(), torch.randn(50, 6, generator=noise).double()
    )
    found.add(posterior, posterior.rsample(noise))
    mean, covariance = found.moments(channels=2)
    full_mean, full = found.moments()
    torch.testing.assert_close(mean, full_mean)
    blocks = full.reshape(2, 3, 2, 3).diagonal(dim1=1, dim2=3)  # (2, 2, P)
    torch.testing.assert_close(covariance, blocks.mean(-1))
    prior = fit_gaussian(mean, covariance, torch.float64)
    whole = torch.distributions.MultivariateNormal(mean, torch.kron(covariance, torch.eye(3).double()))
    z = torch.randn(4, 5, 6, generator=noise).double()
    torch.testing.assert_close(prior.log_prob(z), whole.log_prob(z))
    kl = kl_gaussian_full(
        p_mean=posterior.mean,
        p_covariance=torch.diag_embed(posterior.log_var.exp()),
        q_mean=mean,
        q_covariance=whole.covariance_matrix,
    )
    torch.testing.assert_close(prior.kl(posterior), kl[:, None])
    drawn = prior.sample(40_000, noise)
    torch.testing.assert_close(drawn.mean(0), mean, rtol=0, atol=0.05)
    torch.testing.assert_close(torch.cov(drawn.T), whole.covariance_matrix, rtol=0, atol=0.08)
    assert prior.scale.numel() == 4


def test_densities_and_the_kl_are_those_of_torch():
    noise = generator("mixture")
    prior = FullMixture(3, 4).double()
    prior.logits.copy_(torch.randn(4, generator=noise))
    prior.mean.copy_(torch.randn(4, 3, generator=noise))
    lower = torch.randn(4, 3, 3, generator=noise).double().tril()
    prior.scale.copy_(lower - torch.diag_embed(lower.diagonal(dim1=1, dim2=2)) + torch.eye(3).double() * 0.7)
    normal = torch.distributions.MultivariateNormal(prior.mean, scale_tril=prior.scale)
    torchs = torch.distributions.MixtureSameFamily(torch.distributions.Categorical(logits=prior.logits), normal)
    z = torch.randn(2, 5, 3, generator=noise).double()
    torch.testing.assert_close(prior.log_prob(z), torchs.log_prob(z))
    drawn = prior.sample(40_000, noise)
    torch.testing.assert_close(drawn.mean(0), torchs.mean, rtol=0, atol=0.05)
    torch.testing.assert_close(drawn.var(0), torchs.variance, rtol=0.05, atol=0)
    first = normal.covariance_matrix[0]
    products = (drawn[:, 0] - torchs.mean[0]) * (drawn[:, 1] - torchs.mean[1])
    between = torchs.component_distribution.mean - torchs.mean
    covariance = (prior.logits.softmax(0) * (normal.covariance_matrix[:, 0, 1] + between[:, 0] * between[:, 1])).sum()
    assert products.mean().item() == pytest.approx(covariance.item(), abs=0.06)

    posterior = DiagonalGaussian(z[0], z[1])
    assert prior.kl(posterior) is None
    one = FullMixture(3).double()
    one.mean.copy_(prior.mean[:1])
    one.scale.copy_(prior.scale[:1])
    p_covariance = torch.diag_embed(z[1].exp())
    full = kl_gaussian_full(p_mean=z[0], p_covariance=p_covariance, q_mean=one.mean[0], q_covariance=first)
    torch.testing.assert_close(one.kl(posterior), full[:, None])


def test_a_mixture_of_one_is_the_gaussian_of_the_draws_wherever_they_lie(off):
    _, vae, batch, _, _ = off
    for scale, shift in ((1.0, 0.0), (1e-3, 5.0), (1e4, -3.0)):
        z = aggregate_of(vae, batch).z * scale + shift
        moments = z.mean(0), torch.cov(z.T, correction=0)
        found = fit_mixture(z, moments, components=1, dtype=torch.float64)
        gaussian = fit_gaussian(*moments, torch.float64)
        torch.testing.assert_close(found.mean, gaussian.mean, rtol=1e-6, atol=1e-9 * scale)
        torch.testing.assert_close(found.scale, gaussian.scale, rtol=1e-5, atol=1e-6 * scale)


def clusters(n: int = 1500):
    """Draws of two far Gaussians with a covariance each, 1 to 2; and their moments."""
    noise = generator("clusters", n)
    lower = torch.tensor([[[0.3, 0.0], [0.2, 0.1]], [[0.5, 0.0], [-0.4, 0.2]]]).double()
    mean = torch.tensor([[3.0, 0.0], [-2.0, 1.0]]).double()
    k = (torch.arange(n) % 3 > 0).long()
    z = mean[k] + (lower[k] @ torch.randn(n, 2, 1, generator=noise).double())[..., 0]
    return z, (z.mean(0), torch.cov(z.T, correction=0)), mean, lower @ lower.mT


def test_em_finds_clusters_and_the_same_ones_for_the_same_seed():
    z, moments, mean, covariance = clusters()
    found = fit_mixture(z, moments, components=2, seed=3, dtype=torch.float64)
    order = found.mean[:, 0].argsort(descending=True)
    torch.testing.assert_close(found.logits.softmax(0)[order], torch.tensor([1 / 3, 2 / 3]).double(), rtol=0, atol=1e-6)
    torch.testing.assert_close(found.mean[order], mean, rtol=0, atol=0.05)
    torch.testing.assert_close((found.scale @ found.scale.mT)[order], covariance, rtol=0, atol=0.03)
    # more components than clusters: where they end is the seed's to say
    first, again, other = (fit_mixture(z, moments, components=6, iterations=3, seed=seed).mean for seed in (3, 3, 4))
    assert torch.equal(first, again) and not torch.equal(first, other)


@pytest.mark.parametrize("kind", ["realnvp", "maf"])
def test_a_flow_starts_as_the_gaussian_and_ends_likelier(kind):
    z, moments, _, _ = clusters()
    val = clusters(600)[0]
    gaussian = fit_gaussian(*moments).log_prob(val)
    start = fit_flow(kind, z, moments, val, epochs=0)
    torch.testing.assert_close(start.log_prob(val), gaussian, rtol=0, atol=1e-4)
    options = {"sizes": {"layers": 4, "hidden": (16,)}, "batch_size": 100, "seed": 1}
    fitted = fit_flow(kind, z, moments, val, epochs=8, lr=1e-2, **options)
    assert fitted.log_prob(val).mean() > gaussian.mean() + 0.3
    # where training makes it worse, the start is kept
    worse = fit_flow(kind, z, moments, val, epochs=2, lr=2.0, **options)
    assert worse.log_prob(val).mean() >= gaussian.mean() - 1e-4
    again = fit_flow(kind, z, moments, val, epochs=8, lr=1e-2, **options)
    assert torch.equal(fitted.log_prob(val), again.log_prob(val))
    # a density: it integrates to 1, and its samples have the moments that it has
    axis = torch.linspace(-16, 16, 600).double()
    grid = torch.cartesian_prod(axis, axis)
    mass = fitted.log_prob(grid).exp() * (32 / 599) ** 2
    assert mass.sum().item() == pytest.approx(1, abs=0.01)
    drawn = fitted.sample(20_000, generator("flow")).double()
    mean = mass @ grid
    torch.testing.assert_close(drawn.mean(0), mean, rtol=0, atol=0.1)
    torch.testing.assert_close(torch.cov(drawn.T), (grid - mean).T * mass @ (grid - mean), rtol=0.05, atol=0.1)


def test_the_rate_falls_to_zero_along_a_line():
    """Of a constant gradient each step of Adam is its rate: n steps go lr (1 + (1 - 1/n) + ... + 1/n) = lr (n + 1) / 2."""
    module = torch.nn.Linear(1, 1, bias=False).double()
    start = module.weight.item()
    descend(module, torch.zeros(10, 1), lambda batch, _: -module.weight.sum(), epochs=3, batch_size=2, lr=0.1)
    assert module.weight.item() - start == pytest.approx(0.1 * 16 / 2, abs=1e-5)
    assert not module.weight.requires_grad


def test_maf_reaches_the_entropy_of_a_correlated_gaussian():
    noise = generator("correlated")
    lower = torch.tensor([[1.0, 0, 0], [0.9, 0.3, 0], [-0.5, 0.8, 0.2]]).double()
    normal = torch.distributions.MultivariateNormal(torch.tensor([1.0, -1, 0.5]).double(), scale_tril=lower)
    z, val = (normal.loc + torch.randn(n, 3, generator=noise).double() @ lower.T for n in (4000, 1000))
    unknown = torch.zeros(3), torch.eye(3).double()  # nothing is whitened: the flow has it all to learn
    found = fit_flow(
        "maf", z, unknown, val, sizes={"layers": 2, "hidden": (32,)}, epochs=20, lr=2e-2, batch_size=200
    ).log_prob(val)
    assert -found.mean() == pytest.approx(normal.entropy().item(), abs=0.15)
    assert (normal.log_prob(val) - found).mean() == pytest.approx(0, abs=0.1)


def test_a_vampprior_comes_nearer_and_leaves_the_encoder_as_it_is(off):
    exact, vae, batch, _, _ = off
    encoder = {key: value.clone() for key, value in vae.encoder.state_dict().items()}
    z, val = aggregate_of(vae, batch).z.split([1500, 500])
    images = torch.rand(40, *exact.shape, generator=generator("images"), dtype=torch.float64)
    options = {"pseudo_inputs": 40, "batch_size": 250, "seed": 2, "lr": 0.1}
    start, fitted, again = (
        fit_vampprior(z, vae.encoder, lambda n: images[:n], val, epochs=epochs, **options) for epochs in (0, 15, 15)
    )
    assert torch.equal(fitted.log_prob(val), again.log_prob(val))
    assert fitted.log_prob(val).mean() > start.log_prob(val).mean() + 0.5
    q = vae.encode(fitted.pseudo_inputs())
    torch.testing.assert_close(fitted.mixture().mean, q.mean, rtol=0, atol=1e-12)
    assert all(torch.equal(value, encoder[key]) for key, value in vae.encoder.state_dict().items())
    assert all(parameter.requires_grad for parameter in vae.encoder.parameters()), "the encoder is not its own"


def test_what_cannot_be_fitted_is_refused_in_a_sentence():
    z, moments, _, _ = clusters(6)
    with pytest.raises(VAEError, match="components=7 needs as many images at least, and there are 6"):
        fit_mixture(z, moments, components=7)
    with pytest.raises(VAEError, match=r"prior\.lr=0 must be"):
        fit_flow("realnvp", z, moments, lr=0)
    with pytest.raises(VAEError, match=r"not finite in epoch 1: choose a smaller prior\.lr"):
        fit_flow("maf", clusters()[0], moments, lr=1e30)
    with pytest.raises(VAEError, match="do not vary in every direction"):
        fit_gaussian(torch.zeros(2), torch.tensor([[1.0, 1.0], [1.0, 1.0]]).double())
    with pytest.raises(VAEError, match="not all finite"):
        fit_gaussian(torch.zeros(2), torch.tensor([[1.0, torch.nan], [torch.nan, 1.0]]).double())
    with pytest.raises(VAEError, match="at least 2"):
        fit_flow("realnvp", z[:, :1], (moments[0][:1], moments[1][:1, :1]))
