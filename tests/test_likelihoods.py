"""Each p(x|z) against torch.distributions, scipy, quadrature, or a sum over all 256 values."""

import math

import numpy as np
import pytest
import scipy.integrate
import scipy.stats
import torch
import torch.distributions as td
import torch.nn.functional as F

from vae.errors import VAEError
from vae.likelihoods import (
    Bernoulli,
    ContinuousBernoulli,
    DiscretizedLogistic,
    DiscretizedLogisticMixture,
    Gaussian,
    Laplace,
    LearnedScaleLaplace,
    LearnedSigmaGaussian,
    OptimalSigmaGaussian,
    PixelSigmaGaussian,
    clipped_logistic_mean,
    continuous_bernoulli_mean,
    cross_entropy,
    log_sinhc,
)

LEVELS = torch.arange(256, dtype=torch.float64) / 255
ALL = [
    Bernoulli(),
    ContinuousBernoulli(),
    Gaussian(0.3),
    LearnedSigmaGaussian(0.3),
    PixelSigmaGaussian(),
    OptimalSigmaGaussian(0.3).eval(),
    Laplace(0.2),
    LearnedScaleLaplace(0.2),
    DiscretizedLogistic(),
    DiscretizedLogisticMixture(3),
    DiscretizedLogisticMixture(3, coupled=False),
]
EXTREMES = torch.tensor([-1e4, -90.0, -20.0, -7.0, -1e-3, 0.0, 1e-30, 0.3, 5.0, 30.0, 100.0, 1e4])


def name(likelihood):
    return f"{type(likelihood).__name__}-{likelihood.params_per_pixel}"


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def pixelwise(log_prob, params, x):
    """log_prob at images of a single pixel: params (..., P), x (...) -> (...)."""
    return log_prob(params[..., None, None, None], x[..., None, None, None])


@pytest.mark.parametrize("likelihood", ALL, ids=name)
def test_log_prob_sums_over_pixels_and_broadcasts_over_samples(likelihood):
    params = torch.randn(4, 2, likelihood.params_per_pixel, 3, 5, 6, generator=seeded(), dtype=torch.float64)
    x = LEVELS[torch.randint(256, (2, 3, 5, 6), generator=seeded(1))]
    log_prob = likelihood.log_prob(params, x)
    for k in range(4):
        for b in range(2):
            # a pixel's term is the log_prob of the image that is that pixel
            pixels = params[k, b].permute(2, 3, 0, 1)[..., None, None], x[b].permute(1, 2, 0)[..., None, None]
            torch.testing.assert_close(log_prob[k, b], likelihood.log_prob(*pixels).sum())


def test_bernoulli_and_its_mean_equal_torch_distributions():
    params = 5 * torch.randn(7, 1, 2, 3, 3, generator=seeded(), dtype=torch.float64)
    x = (torch.rand(7, 2, 3, 3, generator=seeded(1)) < 0.5).double()
    reference = td.Independent(td.Bernoulli(logits=params[:, 0]), 3)
    torch.testing.assert_close(Bernoulli().log_prob(params, x), reference.log_prob(x))
    torch.testing.assert_close(Bernoulli().mean(params), reference.mean)


def test_bernoulli_neither_overflows_nor_clips_where_it_is_nearly_certain():
    logits, x = torch.tensor([[18.0], [-18.0], [1e4], [-1e4], [1e4]]), torch.tensor([1.0, 0, 1, 0, 0])
    log_prob = pixelwise(Bernoulli().log_prob, logits, x)
    torch.testing.assert_close(log_prob, torch.tensor([-1.52e-8, -1.52e-8, 0, 0, -1e4]), rtol=0, atol=1e-6)


@pytest.mark.parametrize("shapes", [((4, 5), (4, 5)), ((3, 4, 5), (4, 5)), ((5,), (4, 5)), ((), (2,))])
def test_cross_entropy_and_its_gradients_to_the_second_order_are_torchs(shapes):
    logits, x = 4 * torch.randn(shapes[0], generator=seeded(), dtype=torch.float64), torch.rand(shapes[1]).double()
    inputs = logits.requires_grad_(), x.requires_grad_()

    def of_torch(logits, x):
        return F.binary_cross_entropy_with_logits(*torch.broadcast_tensors(logits, x), reduction="none")

    def derivatives(function):
        """First and second, of a sum that is not linear in what is returned."""
        first = torch.autograd.grad(function(*inputs).square().sum(), inputs, create_graph=True)
        second = torch.autograd.grad(sum(part.sin().sum() for part in first), inputs)
        once = torch.autograd.grad(function(*inputs).square().sum(), inputs)  # which may overwrite what it made
        return [*first, *second, *once]

    close = {"rtol": 1e-12, "atol": 1e-12}
    torch.testing.assert_close(cross_entropy(*inputs), of_torch(*inputs), **close)
    for ours, theirs in zip(derivatives(cross_entropy), derivatives(of_torch), strict=True):
        torch.testing.assert_close(ours, theirs, **close)


def test_cross_entropy_goes_through_what_torch_makes_of_functions():
    logits, x = torch.randn(3, 4, generator=seeded(), dtype=torch.float64), torch.full((4,), 0.3, dtype=torch.float64)

    def total(logits):
        return cross_entropy(logits, x).sum()

    mean = torch.sigmoid(logits)
    torch.testing.assert_close(torch.vmap(torch.func.grad(total))(logits), mean - x)
    torch.testing.assert_close(torch.func.hessian(total)(logits[0]), torch.diag(mean[0] * (1 - mean[0])))
    _, along = torch.func.jvp(total, (logits,), (torch.ones_like(logits),))
    torch.testing.assert_close(along, (mean - x).sum())


def test_cross_entropy_of_binary_pixels_is_as_right_as_torchs_in_single_precision():
    logits = torch.linspace(-60, 60, 20_001).repeat(2)
    x = torch.tensor([0.0, 1.0]).repeat_interleave(20_001)
    exact = F.binary_cross_entropy_with_logits(logits.double(), x.double(), reduction="none")
    ours, theirs = (
        float(((found.double() - exact).abs() / exact.clamp(min=1)).max())
        for found in (cross_entropy(logits, x), F.binary_cross_entropy_with_logits(logits, x, reduction="none"))
    )
    assert ours < min(theirs, 2 * torch.finfo(torch.float32).eps)
    assert (cross_entropy(logits, x) >= 0).all()  # a log-mass is not above 0
    ends = cross_entropy(torch.tensor([-1e30, 1e30, -1e30, 1e30, math.nan]), torch.tensor([0.0, 1, 1, 0, 0]))
    assert ends[:4].tolist() == pytest.approx([0, 0, 1e30, 1e30]) and ends[4].isnan()


def test_continuous_bernoulli_normaliser_equals_quadrature_to_1e_6():
    for lam in [1e-4 + 1e-9, 1e-3, 0.1, 0.4, 0.49, 0.499, 0.4999, 0.5, 0.50001, 0.501, 0.57, 0.9, 0.999, 1 - 1e-4]:
        integral, _ = scipy.integrate.quad(lambda x, l=lam: l**x * (1 - l) ** (1 - x), 0, 1, epsabs=1e-14, epsrel=1e-13)
        logit = torch.tensor([math.log(lam) - math.log1p(-lam)], dtype=torch.float64)
        # at x = 0 the density is C (1 - lam)
        log_c = pixelwise(ContinuousBernoulli().log_prob, logit, torch.zeros((), dtype=torch.float64)) - math.log1p(
            -lam
        )
        assert log_c.item() == pytest.approx(-math.log(integral), abs=1e-6), lam
        single = pixelwise(ContinuousBernoulli().log_prob, logit.float(), torch.zeros(())) - math.log1p(-lam)
        assert single.item() == pytest.approx(-math.log(integral), abs=3e-6), lam


def test_continuous_bernoulli_equals_torch_distributions_away_from_the_half():
    logits = torch.tensor([-12.0, -3.0, -1.0, 0.5, 2.0, 8.0], dtype=torch.float64)[:, None]
    x = torch.linspace(0, 1, 5, dtype=torch.float64)
    reference = td.ContinuousBernoulli(logits=logits)
    ours = pixelwise(ContinuousBernoulli().log_prob, logits[..., None], x)
    torch.testing.assert_close(ours, reference.log_prob(x), rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(continuous_bernoulli_mean(logits), reference.mean, rtol=1e-9, atol=1e-9)


def test_continuous_bernoulli_gradient_is_x_minus_its_mean_and_smooth_across_the_half():
    logits = torch.cat([torch.linspace(-1, 1, 401, dtype=torch.float64), EXTREMES.double()]).requires_grad_()
    gradient = torch.autograd.grad(
        pixelwise(ContinuousBernoulli().log_prob, logits[:, None], torch.zeros_like(logits)).sum(), logits
    )
    torch.testing.assert_close(-gradient[0], continuous_bernoulli_mean(logits).detach(), rtol=1e-8, atol=1e-10)
    assert (continuous_bernoulli_mean(logits[:401]).diff() > 0).all()
    assert continuous_bernoulli_mean(torch.zeros(1)).item() == 0.5


def test_log_sinhc_series_meets_the_formula_and_its_limits():
    y = torch.tensor([0.0, 1e-20, 0.29999, 0.30001, 2.0, -2.0, 1e4], dtype=torch.float64)
    expected = [0, 0, *(math.log(math.sinh(v) / v) for v in (0.29999, 0.30001, 2.0, 2.0)), 1e4 - math.log(2e4)]
    torch.testing.assert_close(log_sinhc(y), torch.tensor(expected, dtype=torch.float64), rtol=1e-12, atol=1e-15)


def test_continuous_bernoulli_is_finite_and_exact_up_to_the_largest_logits():
    y = torch.tensor([1.6e38, 1.8e38, 3.4e38, -3.4e38], requires_grad=True)
    assert torch.equal(log_sinhc(y), y.detach().abs())  # less log 2y, which is lost in the rounding
    assert torch.autograd.grad(log_sinhc(y).sum(), y)[0].tolist() == [1, 1, 1, -1]
    logits = torch.tensor([-1e30, -1e8, -100.0, 100.0, 1e6, 1e8], requires_grad=True)
    mean = continuous_bernoulli_mean(logits)
    torch.testing.assert_close(mean, torch.tensor([1e-30, 1e-8, 1e-2, 0.99, 1 - 1e-6, 1.0]), rtol=1e-7, atol=0)
    slope = torch.autograd.grad(mean.sum(), logits)[0]
    torch.testing.assert_close(slope, logits.detach().double().square().reciprocal().float(), rtol=1e-6, atol=0)


@pytest.mark.parametrize("sigma", [0.01, 0.3, 1.0])
def test_gaussians_and_laplace_equal_torch_distributions(sigma):
    params = torch.randn(4, 1, 2, 3, 3, generator=seeded(), dtype=torch.float64)
    x = torch.rand(4, 2, 3, 3, generator=seeded(1), dtype=torch.float64)
    mean = params[:, 0]
    normal, laplace = td.Normal(mean, sigma).log_prob(x), td.Laplace(mean, sigma).log_prob(x)
    for likelihood in (Gaussian(sigma), LearnedSigmaGaussian(sigma), OptimalSigmaGaussian(sigma).eval()):
        torch.testing.assert_close(likelihood.double().log_prob(params, x), normal.sum((1, 2, 3)), rtol=1e-6, atol=1e-6)
    for likelihood in (Laplace(sigma), LearnedScaleLaplace(sigma)):
        torch.testing.assert_close(
            likelihood.double().log_prob(params, x), laplace.sum((1, 2, 3)), rtol=1e-6, atol=1e-6
        )


def test_sigma_of_a_pixel_is_a_softly_floored_exponential():
    params = torch.tensor([[0.2, 0.2, 0.2], [0.0, -1e4, 3.0]], dtype=torch.float64).reshape(1, 2, 3, 1, 1)
    log_sigma = torch.tensor([-6 + math.log1p(math.exp(6)), -6.0, -6 + math.log1p(math.exp(9))], dtype=torch.float64)
    x = torch.full((1, 3, 1, 1), 0.21, dtype=torch.float64)
    expected = td.Normal(0.2, log_sigma.exp()).log_prob(x.flatten()).sum()
    torch.testing.assert_close(PixelSigmaGaussian().log_prob(params, x).squeeze(), expected)


@pytest.mark.parametrize("sigma", [0.1, 0.5, 2.0])
def test_gradient_of_the_learned_log_sigma_is_d_times_mse_over_sigma_squared_less_one(sigma):
    likelihood = LearnedSigmaGaussian(sigma).double()
    params, x = torch.zeros(8, 1, 1, 4, 4).double(), torch.rand(8, 1, 4, 4, generator=seeded()).double()
    likelihood.log_prob(params, x).mean().backward()
    expected = 16 * (x.square().mean() / sigma**2 - 1)
    assert likelihood.log_sigma.grad.item() == pytest.approx(expected.item(), rel=1e-6)


def test_optimal_sigma_maximises_the_batch_likelihood():
    params = torch.randn(3, 8, 1, 2, 4, 4, generator=seeded())  # three samples of z for eight images
    x = torch.rand(8, 2, 4, 4, generator=seeded(1))
    best = OptimalSigmaGaussian().log_prob(params, x)
    sigma = (x - params[:, :, 0]).square().mean().sqrt().item()
    torch.testing.assert_close(best, Gaussian(sigma).log_prob(params, x))  # one sigma, a value for each image
    for factor in (0.9, 0.99, 1.01, 1.1):
        assert Gaussian(sigma * factor).log_prob(params, x).mean() < best.mean()


def test_gradient_through_optimal_sigma_is_that_of_half_d_log_mse():
    params = torch.randn(8, 1, 2, 4, 4, generator=seeded(), dtype=torch.float64, requires_grad=True)
    x = torch.rand(8, 2, 4, 4, generator=seeded(1), dtype=torch.float64)
    (ours,) = torch.autograd.grad(-OptimalSigmaGaussian().double().log_prob(params, x).mean(), params)
    (theirs,) = torch.autograd.grad(x[0].numel() / 2 * (x - params[:, 0]).square().mean().log(), params)
    torch.testing.assert_close(ours, theirs)


def test_optimal_sigma_in_evaluation_is_the_running_training_error_whatever_the_batch():
    likelihood = OptimalSigmaGaussian(sigma=0.5, decay=0.75).double()
    params, x = torch.zeros(2, 1, 1, 2, 2).double(), torch.ones(2, 1, 2, 2).double()
    assert likelihood.eval().log_sigma.exp().item() == pytest.approx(0.5)
    likelihood.train()
    errors = [float(n) ** 2 for n in range(1, 71)]  # the two rules meet at the 61st
    expected, running = [], 0.0
    for n, error in enumerate(errors, start=1):
        likelihood.log_prob(params, x * math.sqrt(error))
        running += (error - running) * max(20 / (n + 19), 0.25)  # the last twentieth, and never more than 4 batches
        expected.append(running)
        assert likelihood.log_sigma.mul(2).exp().item() == pytest.approx(running)
    likelihood.eval()
    alone, together = likelihood.log_prob(params[:1], x[:1]), likelihood.log_prob(params, x)
    torch.testing.assert_close(together, alone.expand(2))
    torch.testing.assert_close(alone, Gaussian(math.sqrt(running)).double().log_prob(params[:1], x[:1]))
    assert likelihood.log_sigma.mul(2).exp().item() == pytest.approx(running)  # and evaluation has not moved it
    assert set(likelihood.state_dict()) == {"log_sigma", "batches_seen"}


def test_optimal_sigma_in_evaluation_follows_errors_that_fall_as_one_over_the_steps():
    likelihood = OptimalSigmaGaussian().double()
    for n in range(1, 421):
        likelihood.log_prob(torch.zeros(1, 1, 1, 1, 1).double(), torch.full((1, 1, 1, 1), n**-0.5).double())
    lag = likelihood.log_sigma.mul(2).exp().item() * 420 - 1
    assert lag == pytest.approx(1 / 19, rel=1e-4)  # sum_n w_n / n with the weights of the average, w_n ~ n^19
    assert 64 * lag**2 / 4 < 0.05  # nats, of an image of 64 pixels


def test_a_part_of_a_batch_without_images_leaves_the_optimal_sigma_as_it_is():
    likelihood = OptimalSigmaGaussian(sigma=0.5)
    likelihood.log_prob(torch.zeros(2, 1, 1, 2, 2), torch.full((2, 1, 2, 2), 0.25))
    before = {name: value.clone() for name, value in likelihood.state_dict().items()}
    assert likelihood.log_prob(torch.zeros(0, 1, 1, 2, 2), torch.zeros(0, 1, 2, 2)).shape == (0,)
    assert likelihood.state_dict() == before
    assert likelihood.log_sigma.exp().item() == pytest.approx(0.25)


def test_no_error_at_all_is_infinitely_likely_under_the_optimal_sigma_and_finite_under_a_tiny_one():
    params, x = torch.zeros(2, 1, 1, 2, 2, requires_grad=True), torch.zeros(2, 1, 2, 2)
    assert OptimalSigmaGaussian().log_prob(params, x).tolist() == [math.inf] * 2
    for make, constant in ((LearnedSigmaGaussian, 0.5 * math.log(2 * math.pi)), (LearnedScaleLaplace, math.log(2))):
        likelihood = make(1e-40)
        log_prob = likelihood.log_prob(params, x)
        assert log_prob.tolist() == pytest.approx([4 * (40 * math.log(10) - constant)] * 2, rel=1e-5)
        of_params, of_log_sigma = torch.autograd.grad(log_prob.sum(), (params, likelihood.log_sigma))
        assert not of_params.any() and of_log_sigma.item() == -8


@pytest.mark.parametrize("likelihood", ALL, ids=name)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_parameters_give_the_density_of_float32(likelihood, dtype):
    params = torch.randn(4, likelihood.params_per_pixel, 1, 6, 6, generator=seeded()).to(dtype)
    x = LEVELS.float()[torch.randint(256, (4, 1, 6, 6), generator=seeded(1))]
    log_prob = likelihood.log_prob(params, x)
    assert log_prob.dtype == torch.float32
    assert torch.equal(log_prob, likelihood.log_prob(params.float(), x))


def test_rare_pixels_are_drawn_as_rarely_from_low_precision_parameters():
    logits = torch.full((200_000, 1, 1, 1, 1), -7.0).bfloat16()  # a uniform number of 8 bits is 0 four times as often
    rate = torch.sigmoid(torch.tensor(-7.0)).item()
    drawn = Bernoulli().sample(logits, seeded()).float().mean().item()
    assert abs(drawn - rate) < 4 * math.sqrt(rate / 200_000)


def scipy_log_mass(level, location, scale):
    """log of the mass of the bins in double precision, by the smaller tail: level (N,) 0..255, units of [-1, 1]."""
    low = np.where(level == 0, -np.inf, (level - 0.5) / 127.5 - 1)
    high = np.where(level == 255, np.inf, (level + 0.5) / 127.5 - 1)
    logistic = scipy.stats.logistic(location, scale)
    right = low > location
    return np.log(np.where(right, logistic.sf(low) - logistic.sf(high), logistic.cdf(high) - logistic.cdf(low)))


@pytest.mark.parametrize(
    "location, raw", [(0.0, 0.0), (0.3, -3.0), (-0.7, -5.0), (0.99, 1.5), (-2.0, -1.0), (0.1, 4.0)]
)
def test_discretized_logistic_equals_scipy_on_all_256_values(location, raw):
    params = torch.tensor([location, raw], dtype=torch.float64).expand(256, 2)
    scale = math.exp(-7 + np.logaddexp(0, raw + 7))
    expected = torch.from_numpy(scipy_log_mass(np.arange(256.0), location, scale))
    finite = expected > -600  # further out scipy's difference of tails is zero
    ours = pixelwise(DiscretizedLogistic().log_prob, params, LEVELS)
    torch.testing.assert_close(ours[finite], expected[finite], rtol=1e-7, atol=1e-7)
    torch.testing.assert_close(pixelwise(DiscretizedLogistic().log_prob, params.float(), LEVELS.float()), ours.float())


def test_discretized_logistic_mass_sums_to_one_at_extreme_parameters_too():
    locations = torch.tensor([-1e4, -30.0, -1.0, -0.5, -0.49804, 0.0, 0.3, 1.0, 30.0, 1e4])
    location, raw, x = torch.meshgrid(locations, EXTREMES, LEVELS.float(), indexing="ij")
    mass = pixelwise(DiscretizedLogistic().log_prob, torch.stack([location, raw], -1), x).exp().sum(-1)
    torch.testing.assert_close(mass, torch.ones_like(mass), rtol=0, atol=1e-6)


def test_logistic_mixture_mass_of_grey_pixels_sums_to_one():
    likelihood = DiscretizedLogisticMixture(5)
    params = 4 * torch.randn(300, 1, 20, generator=seeded())
    params[:100] *= 1e3  # weights, locations and scales at their extremes
    mass = pixelwise(likelihood.log_prob, params.expand(300, 256, 20), LEVELS.float()).exp().sum(-1)
    torch.testing.assert_close(mass, torch.ones_like(mass), rtol=0, atol=1e-5)


@pytest.mark.parametrize("coupled", [True, False])
def test_logistic_mixture_of_colours_equals_its_definition(coupled):
    K, N = 4, 200
    rng = np.random.default_rng(0)
    params = rng.normal(size=((4 if coupled else 3), K, 3, N))
    level = rng.integers(0, 256, size=(3, N)).astype(float)
    logits, location, raw = params[:3]
    log_scale = -7 + np.logaddexp(0, raw + 7)
    r, g = level[0] / 127.5 - 1, level[1] / 127.5 - 1
    a, b, c = np.tanh(params[3]).swapaxes(0, 1) if coupled else (0, 0, 0)
    centres = location[:, 0], location[:, 1] + a * r, location[:, 2] + b * r + c * g
    log_mass = sum(scipy_log_mass(level[i], centres[i], np.exp(log_scale[:, i])) for i in range(3))
    expected = scipy.special.logsumexp(scipy.special.log_softmax(logits.sum(1), axis=0) + log_mass, axis=0)

    likelihood = DiscretizedLogisticMixture(K, coupled)
    images = torch.from_numpy(params).reshape(-1, 3, N).permute(2, 0, 1)[..., None, None]
    ours = likelihood.log_prob(images, torch.from_numpy(level / 255).T[..., None, None])
    torch.testing.assert_close(ours, torch.from_numpy(expected), rtol=1e-9, atol=1e-8)


def test_logistic_mixture_of_coupled_colours_sums_to_one_over_the_colours():
    K = 2
    params = torch.zeros(4, K, 3, 1, 1)
    params[1] = torch.tensor([[-0.2, 0.3, 0.1], [0.1, 0.0, -0.3]])[..., None, None]  # all mass within the window below
    params[2] = -7.0
    params[3] = torch.tensor([[0.5, -0.4, 0.3], [-0.2, 0.6, 0.1]])[..., None, None]
    window = (torch.arange(60, 200) / 255.0)[:, None, None]
    total = 0.0
    for red in [
        *range(94, 111),
        *range(132, 149),
    ]:  # 8 levels about either component's location, at a scale of 1/4 level
        x = torch.stack(torch.broadcast_tensors(torch.tensor(red / 255), window[:, 0], window[:, 0].T), -1)
        log_prob = DiscretizedLogisticMixture(K).log_prob(params.reshape(-1, 3, 1, 1), x[..., None, None])
        total += log_prob.exp().sum().item()
    assert total == pytest.approx(1, abs=1e-5)


def test_one_component_without_coupling_is_the_discretized_logistic():
    params = torch.randn(50, 2, 3, 2, 2, generator=seeded(), dtype=torch.float64)
    x = LEVELS[torch.randint(256, (50, 3, 2, 2), generator=seeded(1))]
    mixture = DiscretizedLogisticMixture(1, coupled=False)
    stacked = torch.cat([torch.full_like(params[:, :1], 3.0), params], dim=1)
    torch.testing.assert_close(mixture.log_prob(stacked, x), DiscretizedLogistic().log_prob(params, x))
    torch.testing.assert_close(mixture.mean(stacked), DiscretizedLogistic().mean(params))


def test_mean_of_a_clipped_logistic_equals_quadrature_on_both_of_its_formulas():
    for location in (-3.0, -1.0, 0.2, 0.9, 5.0):
        for log_scale in (-6.0, -2.0, -1e-6, 1e-6, 1.0, 4.0, 12.0):
            distribution = scipy.stats.logistic(location, math.exp(log_scale))
            # E clip(y) = -1 + the integral of P(y > t) from -1 to 1
            integral, _ = scipy.integrate.quad(distribution.sf, -1, 1, points=[min(max(location, -1), 1)], epsabs=1e-13)
            for dtype, tolerance in ((torch.float64, 1e-9), (torch.float32, 1e-6)):
                mean = clipped_logistic_mean(torch.tensor(location, dtype=dtype), torch.tensor(log_scale, dtype=dtype))
                assert mean.item() == pytest.approx(integral - 1, abs=tolerance), (location, log_scale)
    assert clipped_logistic_mean(torch.tensor(0.5), torch.tensor(1e4)).item() == 0


def test_mean_of_a_discretized_logistic_is_within_half_a_grey_level():
    location, raw = torch.meshgrid(torch.linspace(-1.3, 1.3, 53), torch.linspace(-9, 3, 25), indexing="ij")
    params = torch.stack([location, raw], -1).flatten(0, 1).double()
    mass = pixelwise(DiscretizedLogistic().log_prob, params[:, None].expand(-1, 256, 2), LEVELS).exp()
    exact = (mass * LEVELS).sum(-1)
    ours = DiscretizedLogistic().mean(params[..., None, None, None]).flatten()
    assert (ours - exact).abs().max() <= 0.5 / 255


@pytest.mark.parametrize("likelihood", ALL, ids=name)
def test_samples_average_to_the_mean(likelihood):
    N = 40_000
    # couplings and scales mild enough that clipping hardly bends the coupled means
    params = 0.5 * torch.randn(likelihood.params_per_pixel, 3, 2, 2, generator=seeded(3), dtype=torch.float64)
    if isinstance(likelihood, DiscretizedLogistic | DiscretizedLogisticMixture):
        blocks = params.unflatten(0, (-1, getattr(likelihood, "components", 1)))
        blocks[-2 if getattr(likelihood, "coupled", False) else -1] -= 3
    with torch.no_grad():
        draws = likelihood.sample(params.expand(N, *params.shape), seeded(4))
        mean = likelihood.mean(params)
    standard_error = draws.std(0) / math.sqrt(N)
    bias = 1 / 510 if likelihood.discrete else 0
    assert ((draws.mean(0) - mean).abs() < 4.5 * standard_error + bias).all()
    if likelihood.discrete:
        assert torch.equal(draws, torch.round(draws * 255) / 255) and draws.min() >= 0 and draws.max() <= 1


@pytest.mark.parametrize("location, raw, channels", [(0.2, -4.0, 1), (-0.95, -2.0, 1), (0.2, -4.0, 3)])
def test_samples_of_the_mixture_have_the_frequencies_of_its_masses(location, raw, channels):
    likelihood, N = DiscretizedLogisticMixture(2), 20_000
    params = torch.zeros(4, 2, channels, 1, 1, dtype=torch.float64)
    params[0, 1], params[1, 0], params[1, 1], params[2] = 0.3, location, -location, raw
    draws = likelihood.sample(params.flatten(0, 1).expand(N, 8, channels, 1, 1), seeded(5))
    frequency = torch.bincount((draws[:, 0] * 255).round().long().flatten(), minlength=256) / N
    grey = params[:, :, :1].clone()
    grey[0] *= channels  # a pixel's weight logit is the sum of its channels' planes
    mass = pixelwise(likelihood.log_prob, grey.flatten().expand(256, 8), LEVELS).exp()
    assert ((frequency - mass).abs() < 5 * (mass / N).sqrt() + 1e-4).all()


def test_sampled_colours_lean_on_each_other_by_the_couplings():
    params = torch.zeros(4, 1, 3, 1, 1, dtype=torch.float64)
    params[2], params[3] = -3.0, torch.tensor([0.5, -0.4, 0.8])[:, None, None]
    draws = DiscretizedLogisticMixture(1).sample(params.flatten(0, 1).expand(40_000, 4, 3, 1, 1), seeded(5))
    red, green, blue = 2 * draws[:, :, 0, 0].T - 1
    (a,) = torch.linalg.lstsq(red[:, None], green).solution
    b, c = torch.linalg.lstsq(torch.stack([red, green], 1), blue).solution
    assert [a.item(), b.item(), c.item()] == pytest.approx([math.tanh(0.5), math.tanh(-0.4), math.tanh(0.8)], abs=0.03)


@pytest.mark.parametrize("likelihood", [Gaussian(0.3), Laplace(0.2), ContinuousBernoulli()], ids=name)
def test_continuous_samples_follow_the_density(likelihood):
    params = torch.tensor([2.5], dtype=torch.float64)
    draws = likelihood.sample(params.expand(20_000, 1)[..., None, None, None], seeded(6)).flatten().numpy()
    grid = torch.linspace(-3, 8, 20_001, dtype=torch.float64)
    if isinstance(likelihood, ContinuousBernoulli):
        grid = torch.linspace(0, 1, 20_001, dtype=torch.float64)
    density = pixelwise(likelihood.log_prob, params.expand(len(grid), 1), grid).exp()
    cdf = torch.cat([torch.zeros(1), torch.cumulative_trapezoid(density, grid)]).numpy()
    assert cdf[-1] == pytest.approx(1, abs=1e-5)  # the density integrates to one
    assert scipy.stats.kstest(draws, lambda v: np.interp(v, grid.numpy(), cdf)).pvalue > 1e-3


@pytest.mark.parametrize("likelihood", ALL, ids=name)
def test_extreme_parameters_give_finite_values_and_gradients(likelihood):
    P = likelihood.params_per_pixel
    params = EXTREMES[torch.randint(len(EXTREMES), (400, P, 3, 2, 2), generator=seeded())]
    params[: len(EXTREMES)] = EXTREMES[:, None, None, None, None]
    params.requires_grad_()
    x = (LEVELS.float()[torch.randint(256, (400, 3, 2, 2), generator=seeded(1))] * 3 - 1).clamp(0, 1)  # edges included
    log_prob, mean = likelihood.log_prob(params, x), likelihood.mean(params)
    assert (
        log_prob.isfinite().all()
        and mean.isfinite().all()
        and likelihood.sample(params.clamp(max=30), seeded()).isfinite().all()
    )  # e^1e4 is infinite
    for value in (log_prob, mean):
        (gradient,) = torch.autograd.grad(value.sum(), params)
        assert gradient.isfinite().all()
    if likelihood.discrete:
        assert (log_prob <= 1e-4).all()


@pytest.mark.parametrize("likelihood", ALL, ids=name)
@pytest.mark.parametrize("channels", [1, 3])
def test_bias_for_mean_predicts_that_mean(likelihood, channels):
    mean = torch.linspace(0.001, 0.999, channels * 20).reshape(channels, 4, 5)
    bias = likelihood.bias_for_mean(mean)
    assert bias.shape == (likelihood.params_per_pixel, channels, 4, 5)
    torch.testing.assert_close(likelihood.mean(bias), mean, rtol=0, atol=1e-5)
    black = likelihood.bias_for_mean(torch.zeros(channels, 4, 5))
    assert black.isfinite().all() and likelihood.mean(black).abs().max() <= 0.001 + 1e-5


def test_what_makes_no_sense_is_refused_in_a_sentence():
    for build in (
        lambda: Gaussian(-1.0),
        lambda: Laplace(0.0),
        lambda: Gaussian(float("nan")),
        lambda: OptimalSigmaGaussian(decay=1.0),
        lambda: DiscretizedLogisticMixture(0),
        lambda: DiscretizedLogisticMixture().log_prob(torch.zeros(20, 2, 4, 4), torch.zeros(2, 4, 4)),
        lambda: Gaussian().log_prob(torch.zeros(2, 1, 4, 4), torch.zeros(1, 4, 4)),
        lambda: Bernoulli().log_prob(torch.zeros(1, 1, 4, 4), torch.zeros(1, 5, 4)),
    ):
        with pytest.raises(VAEError, match=r"\.$"):
            build()
