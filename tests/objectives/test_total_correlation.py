import itertools
import math
from types import SimpleNamespace

import pytest
import torch
from linear_gaussian import LinearGaussian
from torch import nn
from torch.distributions import Categorical, Independent, MixtureSameFamily, Normal

from vae.errors import VAEError
from vae.gaussian import DiagonalGaussian
from vae.objectives.elbo import BetaVAE
from vae.objectives.total_correlation import (
    BetaTCVAE,
    FactorVAE,
    log_densities,
    log_importance_weights,
    pairwise_log_prob,
    permute_dimensions,
)
from vae.seeding import generator

EXACT = LinearGaussian()


def posteriors(n, dim=3):
    """n different diagonal Gaussians and a draw of each."""
    noise = generator("posteriors", n, dim)
    q = DiagonalGaussian(*torch.randn(2, n, dim, generator=noise, dtype=torch.float64))
    return q, q.rsample(noise)


def estimated(q, z, dataset_size, sampling):
    weights = log_importance_weights(len(z), dataset_size, sampling).double()
    return log_densities(pairwise_log_prob(q, z), weights)


def mixture(q):
    """The exact aggregate posterior of q, all N of it, and its marginals, by torch.distributions."""
    normal, equal = Normal(q.mean, (0.5 * q.log_var).exp()), torch.ones(len(q.mean), dtype=torch.float64)
    joint = MixtureSameFamily(Categorical(equal), Independent(normal, 1))
    marginals = [MixtureSameFamily(Categorical(equal), Normal(normal.loc[:, j], normal.scale[:, j])) for j in range(3)]
    return joint, marginals


# --- log q(z) from a batch --------------------------------------------------------------------------------------------


def test_both_samplings_are_exact_when_the_batch_is_the_data():
    q, z = posteriors(12)
    joint, marginals = mixture(q)
    of_marginals = sum(m.log_prob(z[:, j]) for j, m in enumerate(marginals))
    for sampling in ("stratified", "weighted"):
        densities = estimated(q, z, 12, sampling)
        torch.testing.assert_close(densities.conditional, q.log_prob(z))
        torch.testing.assert_close(densities.aggregate, joint.log_prob(z))
        torch.testing.assert_close(densities.marginals, of_marginals)


def test_stratified_weights_give_q_of_z_in_the_mean_over_all_batches():
    q, z = posteriors(6)
    exact = mixture(q)[0].log_prob(z).exp()
    for own in range(6):
        others = [n for n in range(6) if n != own]
        batches = [torch.tensor([own, *rest]) for rest in itertools.combinations(others, 2)]
        densities = [
            estimated(DiagonalGaussian(q.mean[b], q.log_var[b]), z[b], 6, "stratified").aggregate[0].exp()
            for b in batches
        ]
        torch.testing.assert_close(torch.stack(densities).mean(), exact[own])


def test_stratified_weights_are_the_papers_averaged_over_its_choice_of_the_odd_one_out():
    size, dataset_size = 5, 40
    m = size - 1
    papers = []
    for odd in range(1, size):  # in the paper the own image is first and the last of the others is the odd one
        row = torch.full((size,), 1 / m, dtype=torch.float64)
        row[0], row[odd] = 1 / dataset_size, (dataset_size - m) / (dataset_size * m)
        assert row.sum().item() == pytest.approx(1)
        papers.append(row)
    ours = log_importance_weights(size, dataset_size, "stratified").double().exp()
    torch.testing.assert_close(ours[0], torch.stack(papers).mean(0), rtol=1e-6, atol=0)
    torch.testing.assert_close(ours.diagonal(), torch.full((size,), 1 / dataset_size).double())
    torch.testing.assert_close(ours.sum(1), torch.ones(size).double())


@pytest.mark.parametrize("sampling", ["weighted", "stratified"])
def test_a_batch_of_one_has_no_information_and_no_correlation(sampling):
    q, z = posteriors(1)
    densities = estimated(q, z, 1297, sampling)
    assert densities.mutual_information == densities.total_correlation == 0
    torch.testing.assert_close(densities.conditional, q.log_prob(z))


@pytest.mark.parametrize("batch_size", [1, 2, 16, 1297])
@pytest.mark.parametrize("sampling", ["weighted", "stratified"])
def test_the_weights_of_each_draw_sum_to_one(batch_size, sampling):
    total = log_importance_weights(batch_size, 1297, sampling).double().exp().sum(1)
    torch.testing.assert_close(total, torch.ones_like(total), rtol=1e-5, atol=0)


def test_equal_posteriors_have_no_information_and_no_correlation_in_any_number_of_dimensions():
    # weights that entered a dimension at a time would be summed over all fifty
    noise = generator("equal")
    q = DiagonalGaussian(torch.zeros(16, 50, dtype=torch.float64), torch.zeros(16, 50, dtype=torch.float64))
    densities = estimated(q, q.rsample(noise), 1000, "stratified")
    assert densities.mutual_information.abs() < 1e-5
    assert densities.total_correlation.abs() < 1e-5


def test_the_parts_of_a_gaussian_aggregate_posterior_have_their_closed_forms():
    # means from N(0, S) and noise of variance v: q(z) = N(0, S + v)
    noise, n, v = generator("gaussian aggregate"), 1500, 0.3
    s = torch.tensor([[1.0, 0.6], [0.6, 0.8]], dtype=torch.float64)
    mean = torch.randn(n, 2, generator=noise, dtype=torch.float64) @ torch.linalg.cholesky(s).T
    q = DiagonalGaussian(mean, torch.full_like(mean, v).log())
    densities = estimated(q, q.rsample(noise), n, "stratified")

    aggregate = s + v * torch.eye(2)
    variances = aggregate.diagonal()
    information = 0.5 * (aggregate.logdet() - 2 * math.log(v))
    correlation = 0.5 * (variances.log().sum() - aggregate.logdet())
    error = (densities.conditional - densities.aggregate).std() / n**0.5
    assert abs(densities.mutual_information - information) < 4 * error
    error = (densities.aggregate - densities.marginals).std() / n**0.5
    assert abs(densities.total_correlation - correlation) < 4 * error


# --- beta-TC-VAE ------------------------------------------------------------------------------------------------------


def run(objective, vae, n=20, step=0):
    return objective(vae, EXACT.batch(n), generator("noise"), step)


def encoder_gradient(loss, vae):
    return torch.autograd.grad(loss, vae.encoder.weight, retain_graph=True)[0]


@pytest.mark.parametrize("sampling", ["weighted", "stratified"])
def test_with_equal_weights_on_all_three_parts_it_is_the_beta_vae(sampling):
    vae = EXACT.vae(shift=0.3)
    ours = run(BetaTCVAE(1000, beta=3.0, alpha=3.0, gamma=3.0, sampling=sampling), vae)
    betas = run(BetaVAE(3.0), vae)
    torch.testing.assert_close(ours["loss"], betas["loss"])
    torch.testing.assert_close(encoder_gradient(ours["loss"], vae), encoder_gradient(betas["loss"], vae))


def test_each_weight_multiplies_its_own_part_and_the_parts_add_up_to_the_rate():
    vae = EXACT.vae(shift=0.3)
    terms = run(BetaTCVAE(1000, beta=0.0, alpha=0.0, gamma=0.0, sampling="stratified"), vae)
    parts = {name: terms[name] for name in ("mutual_information", "total_correlation", "dimension_wise_kl")}
    torch.testing.assert_close(sum(parts.values()), terms["rate"])
    torch.testing.assert_close(terms["loss"].detach(), terms["distortion"])
    for weight, part in zip(("alpha", "beta", "gamma"), parts.values(), strict=True):
        weights = {"alpha": 0.0, "beta": 0.0, "gamma": 0.0, weight: 2.0}
        loss = run(BetaTCVAE(1000, sampling="stratified", **weights), vae)["loss"].detach()
        torch.testing.assert_close(loss, terms["distortion"] + 2 * part)


def test_the_dimension_wise_kl_is_that_of_the_marginals_to_the_prior():
    # the whole data set in one batch, so that the marginals are known; the prior is N(0, 1) in each dimension
    vae, n = EXACT.vae(shift=0.3), 800
    terms = run(BetaTCVAE(n, sampling="stratified"), vae, n)
    q = vae.encode(EXACT.batch(n).x)
    grid = torch.linspace(-8, 8, 1001, dtype=torch.float64)
    kl = torch.zeros(())
    for mean, log_var in zip(q.mean.T, q.log_var.T, strict=True):
        density = torch.zeros_like(grid)
        for part in torch.arange(n).split(200):
            density += Normal(mean[part, None], (0.5 * log_var[part, None]).exp()).log_prob(grid).exp().sum(0) / n
        log_ratio = density.log() - Normal(0.0, 1.0).log_prob(grid)
        kl = kl + torch.trapezoid(density * log_ratio, grid)
    assert terms["dimension_wise_kl"].item() == pytest.approx(kl.item(), abs=0.1)  # Monte Carlo with 800 draws


def test_weighted_sampling_has_the_papers_gradient_whose_constants_are_in_the_value_alone():
    # equation 3 of Chen et al., to the letter: log q(z) = log sum_m q(z|x_m) - log(N M), and so for each q(z_j)
    vae, batch, n, dataset_size = EXACT.vae(shift=0.3), EXACT.batch(20), 20, 1000
    ours = run(BetaTCVAE(dataset_size, beta=6.0, sampling="weighted"), vae)["loss"]
    out = vae(batch.x, generator("noise"))
    log_q = pairwise_log_prob(out.posterior, out.z)
    aggregate = log_q.sum(-1).logsumexp(1) - math.log(dataset_size * n)
    marginals = (log_q.logsumexp(1) - math.log(dataset_size * n)).sum(-1)
    papers = out.distortion.mean() + out.rate.mean() + 5 * (aggregate - marginals).mean()
    torch.testing.assert_close(encoder_gradient(ours, vae), encoder_gradient(papers, vae))
    assert (papers - ours).item() == pytest.approx(5 * 2 * math.log(dataset_size))  # (beta - 1) (D - 1) log N


# --- FactorVAE --------------------------------------------------------------------------------------------------------


def factor_vae(**options):
    torch.manual_seed(0)
    objective = FactorVAE(hidden=(16, 16), **options)
    objective.setup(LinearGaussian().vae())
    return objective.double()


def test_the_discriminators_loss_does_not_reach_the_encoder_nor_the_vaes_loss_the_discriminator():
    vae, objective = EXACT.vae(shift=0.3), factor_vae(gamma=7.0)
    batch = EXACT.batch(20)
    loss = run(objective, vae)["loss"]
    own = dict(objective.named_parameters())
    noise = generator("noise")
    out = vae(batch.x, noise)
    vaes = out.distortion.mean() + out.rate.mean() + 7.0 * objective.discriminator(out.z).mean()
    discriminators = objective.discriminator_loss(out.z.detach(), noise)
    torch.testing.assert_close(encoder_gradient(loss, vae), encoder_gradient(vaes, vae))
    for got, expected in zip(
        torch.autograd.grad(loss, own.values()), torch.autograd.grad(discriminators, own.values()), strict=True
    ):
        torch.testing.assert_close(got, expected)


def test_the_value_of_the_loss_is_the_vaes_alone():
    vae, objective = EXACT.vae(), factor_vae(gamma=7.0)
    terms = run(objective, vae)
    expected = terms["distortion"] + terms["rate"] + 7.0 * terms["total_correlation"]
    torch.testing.assert_close(terms["loss"].detach(), expected)
    with torch.no_grad():
        again = run(objective.eval(), vae)
    torch.testing.assert_close(again["loss"], expected)


@pytest.mark.parametrize("separate_batches", [True, False])
def test_the_best_discriminators_mean_logit_is_the_total_correlation(separate_batches):
    # two standard normals of correlation rho: log q / prod q is quadratic in z, and so is this discriminator

    class Quadratic(nn.Module):
        def forward(self, z):
            return torch.stack([z[:, 0] * z[:, 1], z[:, 0] ** 2, z[:, 1] ** 2], -1)

    rho, n, noise = 0.7, 40_000, generator("correlated")
    z = torch.randn(n, 2, generator=noise, dtype=torch.float64)
    z[:, 1] = rho * z[:, 0] + (1 - rho**2) ** 0.5 * z[:, 1]
    objective = FactorVAE(hidden=(), separate_batches=separate_batches)
    objective.setup(SimpleNamespace(latent_dim=2))
    objective.discriminator = nn.Sequential(Quadratic(), nn.Linear(3, 1)).double()
    optimizer = torch.optim.LBFGS(objective.parameters(), max_iter=40, line_search_fn="strong_wolfe")

    def closure():
        optimizer.zero_grad()
        loss = objective.discriminator_loss(z, generator("permutation"))
        loss.backward()
        return loss

    optimizer.step(closure)
    correlation = -0.5 * math.log(1 - rho**2)
    assert objective.discriminator(z).mean().item() == pytest.approx(correlation, rel=0.04)


def test_permuted_dimensions_keep_their_values_and_lose_their_correlation():
    z = torch.randn(5000, 1, generator=generator("z")).repeat(1, 3)
    permuted = permute_dimensions(z, generator("order"))
    assert torch.equal(permuted.sort(0).values, z.sort(0).values)
    correlation = torch.corrcoef(permuted.T) - torch.eye(3)
    assert correlation.abs().max() < 4 / 5000**0.5


def test_the_discriminator_has_its_own_learning_rate_and_betas(tiny):
    from vae.engine.build import build

    _, module = build(tiny("objective=factor_vae", "objective.hidden=[8]", "optimizer.lr=0.01"))
    vaes, discriminators = module.configure_optimizers().param_groups
    assert (vaes["lr"], tuple(vaes["betas"])) == (0.01, (0.9, 0.999))
    assert (discriminators["lr"], discriminators["betas"]) == (1e-4, (0.5, 0.9))
    assert {id(p) for p in discriminators["params"]} == {id(p) for p in module.objective.discriminator.parameters()}


def test_an_unknown_sampling_is_refused():
    with pytest.raises(VAEError, match="sampling"):
        BetaTCVAE(100, sampling="mss")
