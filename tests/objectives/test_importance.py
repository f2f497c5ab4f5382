import math
from itertools import pairwise

import numpy as np
import pytest
import torch
from linear_gaussian import LinearGaussian
from torch import nn

from vae.data.images import Batch
from vae.errors import VAEError
from vae.flows import PlanarFlow
from vae.gaussian import DiagonalGaussian
from vae.likelihoods import Gaussian
from vae.model import VAE
from vae.networks import Decoder
from vae.objectives.elbo import BetaVAE
from vae.objectives.importance import CIWAE, ESTIMATORS, IWAE, MIWAE, PIWAE
from vae.priors import Prior
from vae.seeding import generator

torch.set_num_threads(1)
EXACT = LinearGaussian()


class UnknownKL(Prior):
    """The standard normal of a prior that has no closed form to offer, so that rates are estimated at z."""

    def __init__(self, prior):
        super().__init__()
        self.latent_dim, self.log_prob = prior.latent_dim, prior.log_prob


def wrong_model():
    """A VAE whose posterior is off in mean and spread, its rate estimated."""
    vae = EXACT.vae(shift=0.4, stretch=1.5)
    vae.prior = UnknownKL(vae.prior)
    return vae


def run(objective, vae, n=6):
    """Terms and gradients, by parameter, on a batch and noise that are always the same."""
    terms = objective(vae, EXACT.batch(n), generator("noise"), step=0)
    gradients = torch.autograd.grad(terms["loss"], list(vae.parameters()))
    return terms, {name: g for (name, _), g in zip(vae.named_parameters(), gradients, strict=True)}


def assert_same_gradients(a, b, part=""):
    for name in a:
        if name.startswith(part):
            torch.testing.assert_close(a[name], b[name], rtol=1e-9, atol=1e-10, msg=name)


# --- values -----------------------------------------------------------------------------------------------------------


def test_with_one_sample_value_and_gradient_are_those_of_the_elbo():
    vae = wrong_model()
    expected, gradients = run(BetaVAE(), vae)
    for objective in (IWAE(1), MIWAE(1, 1), PIWAE(1, 1), CIWAE(1, mix=0.3)):
        terms, own = run(objective, vae)
        torch.testing.assert_close(terms["iw_bound"], expected["elbo"], rtol=0, atol=1e-12)
        torch.testing.assert_close(terms["loss"], expected["loss"], rtol=0, atol=1e-12)
        torch.testing.assert_close(terms["elbo"], expected["elbo"], rtol=0, atol=1e-12)
        assert_same_gradients(own, gradients)


def test_groups_of_one_sample_are_the_vae_with_as_many_draws():
    vae, batch = wrong_model(), EXACT.batch(6)
    out = vae(batch.x, generator("noise"), sample_shape=(5, 1))
    terms, _ = run(MIWAE(5, 1), vae)
    torch.testing.assert_close(terms["loss"].detach(), (out.distortion + out.rate).mean(), rtol=0, atol=1e-12)


def test_one_group_of_all_samples_is_the_iwae():
    vae = wrong_model()
    (a, of_a), (b, of_b) = run(MIWAE(1, 8), vae), run(IWAE(8), vae)
    assert a["loss"] == b["loss"]
    assert_same_gradients(of_a, of_b)


def test_the_bound_is_log_p_of_x_for_any_number_of_samples_at_the_exact_posterior():
    log_p = EXACT.log_prob(EXACT.batch(6).x).mean()
    for objective in (IWAE(1), IWAE(7), MIWAE(3, 4), PIWAE(3, 4), CIWAE(5, mix=0.5)):
        terms, _ = run(objective, EXACT.vae())
        torch.testing.assert_close(-terms["loss"].detach(), log_p, rtol=0, atol=1e-6)
        torch.testing.assert_close(terms["iw_bound"], log_p, rtol=0, atol=1e-6)


def test_bounds_never_fall_with_the_samples_of_a_group_on_the_same_draws_and_stay_below_log_p():
    # groups nest: each is two of those before, so that the order holds for every single draw, by Jensen's inequality
    vae, batch = wrong_model(), EXACT.batch(1)
    shapes = [(32, 1), (16, 2), (8, 4), (4, 8), (2, 16), (1, 32)]
    totals = torch.zeros(len(shapes), dtype=torch.float64)
    for seed in range(200):
        noise = (generator("paired", seed) for _ in shapes)
        with torch.no_grad():
            bounds = [MIWAE(*shape)(vae, batch, g, 0)["iw_bound"] for shape, g in zip(shapes, noise, strict=True)]
        assert all(low <= high + 1e-12 for low, high in pairwise(bounds))
        totals += torch.stack(bounds)
    assert totals[-1] / 200 < EXACT.log_prob(batch.x)[0]


def test_the_logged_bound_is_the_bound_not_the_mean_of_log_weights_under_normalised_weights():
    vae, batch = wrong_model(), EXACT.batch(6)
    log_w = vae.log_weights(batch.x, generator("noise"), 32)
    terms, _ = run(IWAE(32), vae)
    torch.testing.assert_close(terms["iw_bound"], (log_w.logsumexp(0) - math.log(32)).mean().detach())
    surrogate = (log_w.softmax(0) * log_w).sum(0).mean()
    assert surrogate > terms["iw_bound"] + 0.1


def test_beta_weighs_the_kl_in_the_loss_and_leaves_the_logged_bound_alone():
    vae = wrong_model()
    at_one, _ = run(IWAE(8), vae)
    at_half, _ = run(IWAE(8, beta=0.5), vae)
    assert at_one["iw_bound"] == at_half["iw_bound"]
    assert at_half["loss"] < at_one["loss"]


def test_ciwae_lies_between_elbo_and_iwae_in_the_proportion_of_mix():
    vae = wrong_model()
    elbo, iwae = (run(CIWAE(8, mix=mix), vae)[0]["loss"] for mix in (1.0, 0.0))
    assert iwae == run(IWAE(8), vae)[0]["loss"]
    torch.testing.assert_close(run(CIWAE(8, mix=0.25), vae)[0]["loss"], 0.25 * elbo + 0.75 * iwae)


# --- gradients, exactly ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_piwae_trains_the_model_by_the_iwae_of_all_draws_and_the_encoder_by_miwae(estimator):
    vae = wrong_model()
    terms, gradients = run(PIWAE(4, 3, estimator), vae)
    iwae, of_iwae = run(IWAE(12, estimator), vae)
    _, of_miwae = run(MIWAE(4, 3, estimator), vae)
    torch.testing.assert_close(terms["loss"], iwae["loss"], rtol=0, atol=1e-12)
    assert_same_gradients(gradients, of_iwae, "decoder")
    assert_same_gradients(gradients, of_miwae, "encoder")
    assert (of_iwae["encoder.weight"] - of_miwae["encoder.weight"]).abs().max() > 1e-3


@pytest.mark.parametrize("make", [lambda e: IWAE(8, e), lambda e: MIWAE(2, 4, e), lambda e: CIWAE(8, 0.3, e)])
def test_estimators_share_the_loss_and_the_gradient_of_the_model(make):
    vae = wrong_model()
    expected, gradients = run(make("reparameterised"), vae)
    for estimator in ("sticking_the_landing", "dreg"):
        terms, own = run(make(estimator), vae)
        assert terms["loss"] == expected["loss"]
        assert_same_gradients(own, gradients, "decoder")
        assert (own["encoder.weight"] - gradients["encoder.weight"]).abs().max() > 1e-4


@pytest.mark.parametrize("make", [lambda e: IWAE(1, e), lambda e: IWAE(8, e), lambda e: PIWAE(2, 4, e)])
def test_path_gradients_of_the_encoder_vanish_at_the_exact_posterior(make):
    vae = EXACT.vae()
    for estimator, bound in (("reparameterised", math.inf), ("sticking_the_landing", 1e-6), ("dreg", 1e-6)):
        _, gradients = run(make(estimator), vae)
        largest = max(g.abs().max() for name, g in gradients.items() if name.startswith("encoder"))
        assert largest < bound
        assert largest > 1e-2 or estimator != "reparameterised"


def test_where_a_weight_underflows_the_gradients_stay_finite():
    vae = EXACT.vae(shift=300.0)
    for objective in (IWAE(8, "dreg"), CIWAE(8, 0.0, "dreg"), PIWAE(4, 2, "dreg")):
        _, gradients = run(objective, vae)
        assert all(g.isfinite().all() for g in gradients.values())


def test_validation_without_gradients_gives_the_same_loss():
    vae = wrong_model()
    for objective in (IWAE(4, "dreg"), PIWAE(2, 3, "dreg"), CIWAE(4, 0.5, "sticking_the_landing")):
        terms, _ = run(objective, vae)
        with torch.no_grad():
            again = objective.eval()(vae, EXACT.batch(6), generator("noise"), step=0)
        torch.testing.assert_close(again["loss"], terms["loss"].detach(), rtol=0, atol=1e-12)


# --- gradients, in the mean: the toy of Rainforth et al. 2018, z ~ N(mu, I), x|z ~ N(z, I), q = N(A x + b, 2/3 I) -----


class Rows(nn.Module):
    """The encoder's output as a parameter of each row, so that rows are independent draws of its gradient."""

    def __init__(self, outputs):
        super().__init__()
        self.outputs = nn.Parameter(outputs)

    def forward(self, x):
        return self.outputs


class Identity(Decoder):
    def forward(self, z):
        return z[:, None, None, None, :]


class ShiftedNormal(Prior):
    def __init__(self, mu):
        super().__init__()
        self.mu, self.latent_dim = nn.Parameter(mu), mu.shape[-1]

    def log_prob(self, z):
        return DiagonalGaussian(self.mu, torch.zeros_like(self.mu)).log_prob(z)


class Toy:
    """One data point; mu and b are `off` away, in each direction, from where they are optimal: mu = x, b = mu / 2."""

    def __init__(self, dim, off, spread=2 / 3):
        noise = generator("toy", dim)
        self.x = torch.randn(dim, generator=noise, dtype=torch.float64)
        self.mu = self.x + off * torch.randn(dim, generator=noise, dtype=torch.float64)
        self.mean = self.x / 2 + self.mu / 2 + off * torch.randn(dim, generator=noise, dtype=torch.float64)
        self.dim, self.spread = dim, spread

    def gradients(self, objective, draws, seed, chunk=2_000_000, family=None, more=0):
        """Draws of the gradient with respect to the encoder's output and to mu, (draws, outputs) and (draws, D)."""
        parts = []
        chunk = max(1, chunk // (objective.groups * objective.samples * self.dim))
        for start in range(0, draws, chunk):
            n = min(chunk, draws - start)
            outputs = torch.cat([self.mean, torch.full_like(self.mean, self.spread).log(), self.extra(more)])
            encoder, prior = Rows(outputs.repeat(n, 1)), ShiftedNormal(self.mu.repeat(n, 1))
            likelihood = Gaussian(1.0).double()
            vae = VAE(encoder, Identity(), prior, likelihood, 0, family or DiagonalGaussian.from_parameters)
            x = self.x.repeat(n, 1)[:, None, None, :]
            loss = objective(vae, Batch(x, None, 0), generator(seed, start), 0)["loss"] * n
            parts.append(torch.autograd.grad(loss, [encoder.outputs, prior.mu]))
        return tuple(torch.cat(part) for part in zip(*parts, strict=True))

    def extra(self, more):
        return torch.randn(more, generator=generator("extra"), dtype=torch.float64)


def in_standard_errors(difference):
    return difference.mean(0).abs() / (difference.std(0) / len(difference) ** 0.5)


@pytest.mark.parametrize(
    "make",
    [
        lambda e: IWAE(8, e),
        lambda e: MIWAE(2, 4, e),
        lambda e: CIWAE(8, 0.3, e),
        lambda e: PIWAE(2, 4, e),
        lambda e: IWAE(8, e, beta=0.4),
    ],
    ids=["iwae", "miwae", "ciwae", "piwae", "beta"],
)
def test_dreg_has_the_mean_of_the_reparameterised_gradient_and_less_variance(make):
    toy = Toy(dim=4, off=0.3)
    plain, dreg = (toy.gradients(make(e), 20_000, "paired")[0] for e in ("reparameterised", "dreg"))
    assert (in_standard_errors(plain - dreg) < 3).all()
    assert (in_standard_errors(dreg)[:4] > 5).all()  # there is a mean to agree on
    assert dreg.var(0).sum() < plain.var(0).sum()


def test_sticking_the_landing_is_unbiased_with_one_sample_and_not_with_more():
    toy = Toy(dim=4, off=0.3)
    for samples, biased in ((1, False), (8, True)):
        plain, path = (
            toy.gradients(IWAE(samples, e), 20_000, "stl")[0] for e in ("reparameterised", "sticking_the_landing")
        )
        assert (in_standard_errors(plain - path).max() > 5) == biased


def test_dreg_is_unbiased_through_a_flow():
    toy, family = Toy(dim=2, off=0.3), PlanarFlow(2, steps=2)
    more = family.encoder_outputs - 4
    plain, dreg = (
        toy.gradients(IWAE(4, e), 20_000, "flow", family=family, more=more)[0] for e in ("reparameterised", "dreg")
    )
    assert (in_standard_errors(plain - dreg) < 3.5).all()
    assert in_standard_errors(dreg).max() > 5


def log_slope(samples, ratios):
    return np.polyfit(np.log(samples), np.log(ratios), 1)[0]


def signal_to_noise(gradients):
    """|mean| over the root of the summed variances; the mean's own noise is taken off its square."""
    variance = gradients.var(0).sum()
    return float(((gradients.mean(0).square().sum() - variance / len(gradients)) / variance).sqrt())


def slopes(toy, samples, draws, estimator):
    """Of log SNR against log K, for the gradient of b and of mu."""
    gradients = [toy.gradients(IWAE(k, estimator), draws, "snr") for k in samples]
    return [
        log_slope(samples, [signal_to_noise(g) for g in part])
        for part in ([b[:, : toy.dim] for b, _ in gradients], [mu for _, mu in gradients])
    ]


@pytest.mark.slow
def test_more_samples_cost_the_encoder_its_signal_and_dreg_gives_it_back():
    toy, samples = Toy(dim=4, off=0.3), (4, 16, 64)
    of_encoder, of_model = slopes(toy, samples, 20_000, "reparameterised")
    assert of_encoder == pytest.approx(-0.5, abs=0.1)
    assert of_model == pytest.approx(0.5, abs=0.1)
    of_encoder, of_model = slopes(toy, samples, 2_000, "dreg")
    assert of_encoder >= 0.4
    assert of_model == pytest.approx(0.5, abs=0.1)


@pytest.mark.slow
def test_signal_to_noise_has_the_published_slopes_in_twenty_dimensions():
    toy, samples = Toy(dim=20, off=0.1), (16, 64, 256)
    of_encoder, of_model = slopes(toy, samples, 20_000, "reparameterised")
    assert of_encoder == pytest.approx(-0.5, abs=0.1)
    assert of_model == pytest.approx(0.5, abs=0.1)
    of_encoder, of_model = slopes(toy, samples, 4_000, "dreg")
    assert of_encoder >= 0.4
    assert of_model == pytest.approx(0.5, abs=0.1)


# --- refused ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "make", [lambda: IWAE(0), lambda: MIWAE(0, 5), lambda: IWAE(5, "score"), lambda: CIWAE(5, 1.5)]
)
def test_options_that_make_no_bound_are_refused(make):
    with pytest.raises(VAEError):
        make()
