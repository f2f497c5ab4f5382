"""Measures of a latent space on spaces whose answers are known."""

from __future__ import annotations

import functools
import math

import pytest
import torch
import torch.nn.functional as F

from vae.engine.build import build
from vae.errors import VAEError
from vae.evaluation import latent, reconstruction
from vae.evaluation.latent import (
    effective_rank,
    equivariance_error,
    gaussian_kl_to_prior,
    gaussianity,
    halved,
    interpolated_frechet_distance,
    latent_quality,
    nearest_neighbours,
    quarter_turn,
    radial_power_spectrum,
    statistics,
)
from vae.evaluation.measures import MEASURES
from vae.evaluation.reconstruction import reconstruction_quality
from vae.evaluation.samples import trained_classifier
from vae.evaluation.work import Work
from vae.gaussian import DiagonalGaussian


def normal(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def with_moments(mean, covariance, n):
    """n points whose sample mean and covariance (by n) are exactly those given."""
    x = normal(n, len(mean))
    x = x - x.mean(0)
    x = x @ torch.linalg.inv(torch.linalg.cholesky(x.T.cov(correction=0))).T
    return x @ torch.linalg.cholesky(covariance).T + mean


def test_k_equal_directions_have_effective_rank_k():
    for k in (1, 3, 5):
        spread = torch.tensor([1.0] * k + [0.0] * (5 - k)).double()
        x = with_moments(torch.ones(5).double(), torch.eye(5).double(), 40) * spread
        assert effective_rank(x) == pytest.approx(k)
    x = with_moments(torch.zeros(2).double(), torch.tensor([3.0, 1.0]).double().diag(), 40)
    assert effective_rank(x) == pytest.approx(math.exp(-0.75 * math.log(0.75) - 0.25 * math.log(0.25)))


def test_quantiles_of_a_gaussian_are_gaussian_and_of_others_have_their_moments():
    n = 4000
    levels = (torch.arange(n, dtype=torch.float64) + 0.5) / n
    of_normal = gaussianity(torch.special.ndtri(levels)[:, None] * 3 + 1)
    assert of_normal["skewness"] < 1e-9 and of_normal["excess_kurtosis"] < 0.01
    assert 0.5 / n <= of_normal["ks"] < 1 / n
    uniform = gaussianity(levels[:, None])
    assert uniform["excess_kurtosis"] == pytest.approx(1.2, abs=1e-3) and uniform["skewness"] < 1e-9
    x = (levels - 0.5) * math.sqrt(12)  # against the normal's distribution function
    assert uniform["ks"] == pytest.approx((torch.special.ndtr(x) - levels).abs().max().item(), abs=1e-3)
    exponential = gaussianity(-torch.log1p(-levels)[:, None])
    assert exponential["skewness"] == pytest.approx(2, abs=0.1) and exponential["excess_kurtosis"] == pytest.approx(
        6, abs=1
    )
    both = gaussianity(
        torch.stack([levels, -torch.log1p(-levels), torch.ones(n).double()], 1)
    )  # the last does not vary
    assert both["skewness"] == pytest.approx(exponential["skewness"] / 2)
    with pytest.raises(VAEError, match="No latent varies"):
        gaussianity(torch.ones(5, 2))


def test_a_circular_convolution_commutes_with_shifts_and_mean_pooling_with_scaling_and_turning():
    x, kernel = normal(5, 2, 16, 16), normal(3, 2, 3, 3, seed=1)

    def circular(images):
        return F.conv2d(F.pad(images, (1, 1, 1, 1), mode="circular"), kernel)

    def shift(t):
        return t.roll(3, -1)

    assert equivariance_error(circular, x, shift, shift) < 1e-25
    assert equivariance_error(circular, x, quarter_turn, quarter_turn) > 0.1  # the kernel does not look the same turned
    assert equivariance_error(halved, x, quarter_turn, quarter_turn) < 1e-25
    assert equivariance_error(halved, x, halved, halved) < 1e-25
    assert equivariance_error(circular, x, halved, halved) > 0.1

    def zero_padded(images):
        return F.conv2d(images, kernel, padding=1)

    assert 0 < equivariance_error(zero_padded, x, shift, shift) < 0.5


def test_the_error_is_1_where_only_the_mean_is_right_and_is_relative_to_the_variance():
    x = normal(4, 1, 8, 8)
    constant = lambda t: t.mean((0, 2, 3), keepdim=True).expand_as(t)  # noqa: E731
    assert equivariance_error(lambda t: t, x, lambda t: t, constant) == pytest.approx(1)
    assert equivariance_error(lambda t: 7 * t + 3, x, lambda t: t, lambda t: t + 0.7) == pytest.approx(
        0.49 / (49 * x.var(correction=0).item())
    )


def test_powers_of_all_frequencies_add_up_to_the_variance():
    for shape in ((6, 2, 8, 8), (3, 1, 7, 7), (3, 2, 4, 6)):
        maps = normal(*shape) + 5
        power, counts = radial_power_spectrum(maps)
        centred = maps - maps.mean((0, 2, 3), keepdim=True)
        assert (power * counts).sum().item() == pytest.approx(centred.square().sum((-2, -1)).mean().item())
        assert counts.sum() == shape[2] * shape[3] and counts[0] == 1


def test_white_noise_is_flat_and_a_wave_has_all_its_power_at_its_frequency():
    power, _ = radial_power_spectrum(normal(4000, 1, 8, 8))
    assert power.tolist() == pytest.approx([1] * len(power), abs=0.06)
    column = torch.arange(16).double()
    wave = torch.cos(2 * math.pi * 3 * column / 16).expand(1, 1, 16, 16)
    power, counts = radial_power_spectrum(wave)
    assert (power * counts)[3].item() == pytest.approx(0.5 * 256)
    assert (power * counts).sum().item() == pytest.approx(0.5 * 256)


def test_the_nearest_neighbour_is_another_point():
    x = normal(1203, 3)
    distance = (x[:, None] - x).square().sum(-1).fill_diagonal_(math.inf)
    assert torch.equal(nearest_neighbours(x), distance.argmin(1))


def test_kl_of_gaussians_to_the_prior_is_the_closed_form():
    mean = torch.tensor([1.0, -2.0]).double()
    covariance = torch.tensor([[2.0, 0.6], [0.6, 0.5]]).double()
    z = with_moments(mean, covariance, 60)
    p = torch.distributions.MultivariateNormal(torch.zeros(2).double(), torch.eye(2).double())
    q = torch.distributions.MultivariateNormal(mean, covariance)
    assert gaussian_kl_to_prior(z) == pytest.approx(torch.distributions.kl_divergence(q, p).item())
    q = torch.distributions.MultivariateNormal(mean, covariance.diag().diag())
    assert gaussian_kl_to_prior(z, diagonal=True) == pytest.approx(torch.distributions.kl_divergence(q, p).item())
    for n in range(20, 120):
        z = with_moments(0 * mean, torch.eye(2).double(), n)
        assert 0 <= gaussian_kl_to_prior(z) < 1e-28 and 0 <= gaussian_kl_to_prior(z, diagonal=True) < 1e-28
    assert gaussian_kl_to_prior(normal(3, 5)) == math.inf  # singular


def test_the_kl_of_draws_of_the_prior_is_as_large_as_its_docstring_says():
    n, d = 2000, 60
    assert gaussian_kl_to_prior(normal(n, d)) == pytest.approx(d * (d + 3) / (4 * n), rel=0.1)


def test_statistics_are_per_channel_over_images_and_places():
    maps = torch.stack([normal(50, 3, 4), 2 * normal(50, 3, 4, seed=1) + 5], 1)  # (50, 2, 3, 4)
    mean = maps.clone()
    mean[:, 0, 0, 0] = 1
    found = statistics(mean.flatten(1), maps.flatten(1), (2, 3, 4))
    for i in (0, 1):
        assert found[f"channel{i}_mean"] == pytest.approx(maps[:, i].mean().item())
        assert found[f"channel{i}_std"] == pytest.approx(maps[:, i].std(correction=0).item())
    assert found["std"] == pytest.approx(maps.std(correction=0).item()) and found["active_units"] == 23
    assert found["effective_rank"] == pytest.approx(effective_rank(mean.flatten(1)))
    rows = mean.permute(0, 2, 3, 1).reshape(-1, 2)
    assert found["effective_rank_of_channels"] == pytest.approx(effective_rank(rows))
    assert found["skewness"] == pytest.approx(gaussianity(maps.permute(0, 2, 3, 1).reshape(-1, 2))["skewness"])
    flat = statistics(mean.flatten(1), maps.flatten(1), (24,))
    assert (
        flat["channel23_mean"] == pytest.approx(maps[:, 1, 2, 3].mean().item())
        and "effective_rank_of_channels" not in flat
    )


# --- of a model -------------------------------------------------------------------------------------------------------


@pytest.fixture
def quick(monkeypatch):
    monkeypatch.setattr(reconstruction, "trained_classifier", functools.partial(trained_classifier, steps=20))


SPATIAL = [
    "network=autoencoder_kl",
    "network.block_out_channels=[4,4]",
    "network.norm_num_groups=2",
    "model.latent_dim=32",
]


@pytest.mark.parametrize("binarize", ["none", "threshold"])
def test_the_interpolated_distance_at_weight_0_is_that_of_the_reconstructions(binarize, tiny, quick):
    data, module = build(tiny(f"data.binarize={binarize}"))
    vae, x = module.vae.eval(), data.examples("test", 60).x
    with torch.no_grad():
        mean = vae.encode(x).mean
    ends = interpolated_frechet_distance(vae, data, x, mean, weight=0.0)
    assert ends["interpolated_frechet_distance_n60"] == reconstruction_quality(vae, data, 60)["frechet_distance_n60"]
    half = interpolated_frechet_distance(vae, data, x, mean, weight=0.5)
    assert half["interpolated_frechet_distance_n60"] != ends["interpolated_frechet_distance_n60"]


def test_latents_of_a_spatial_model_have_every_measure_each_of_its_own_numbers(tiny, quick):
    data, module = build(tiny(*SPATIAL))
    vae = module.vae.eval()
    found = latent_quality(vae, data, 60)
    x = data.examples("test", 60).x
    with torch.no_grad():
        mean = vae.encode(x).mean
        half = vae.encode(halved(x)).mean.unflatten(1, (2, 2, 2))
        shifted = vae.encode(x.roll(2, -1)).mean.unflatten(1, (2, 4, 4))
    maps = mean.unflatten(1, (2, 4, 4))
    for name, moved, expected in (("scale", half, halved(maps)), ("shift", shifted, maps.roll(1, -1))):
        moved = moved.double()
        variance = (moved - moved.mean((0, 2, 3), keepdim=True)).square().sum()
        assert found[f"equivariance_error_{name}"] == pytest.approx(
            ((moved - expected).square().sum() / variance).item(), rel=1e-4
        )
    assert {
        "equivariance_error_rotation",
        "power_k0",
        "power_k2",
        "gaussian_kl_n60",
        "interpolated_frechet_distance_n60",
    } <= set(found)
    counts = radial_power_spectrum(maps)[1]
    assert sum(found[f"power_k{k}"] * int(count) for k, count in enumerate(counts)) == pytest.approx(16)
    assert all(map(math.isfinite, found.values()))
    assert latent_quality(vae, data, 60) == found


def test_an_encoder_that_is_the_prior_is_at_no_distance_from_it(tiny, quick):
    data, module = build(tiny("model.latent_dim=2"))
    vae = module.vae.eval()
    means = with_moments(torch.tensor([3.0, 0]).double(), torch.tensor([[4.0, 0], [0, 1]]).double(), 60).float()
    vae.encode = lambda x, y=None: DiagonalGaussian(means[: len(x)], torch.full((len(x), 2), -60.0))
    found = latent_quality(vae, data, 60)
    assert found["dimension_wise_gaussian_kl_n60"] == pytest.approx(0.5 * (4 + 9 - 1 - math.log(4)), rel=1e-4)
    assert found["gaussian_kl_n60"] == pytest.approx(found["dimension_wise_gaussian_kl_n60"], rel=1e-4)
    assert found["channel0_mean"] == pytest.approx(3, rel=1e-4) and found["channel0_std"] == pytest.approx(2, rel=1e-4)
    assert found["prior_frechet_distance_n60"] == pytest.approx(9 + 1, rel=0.2)  # of 60 draws of the prior
    assert not any(name.startswith(("power", "equivariance")) for name in found)
    assert latent.MOST_CHANNELS == 64


TWO_LAYERS = ["prior=two_layer", "posterior=two_layer", "prior.top_dim=2", "posterior.top_dim=2"]
M2 = ["objective=m2", "+data.labeled=20", "posterior=planar", "prior=mixture"]


@pytest.mark.parametrize(
    "kind",
    [M2, pytest.param(["objective=cvae", "network=made", *TWO_LAYERS], marks=pytest.mark.slow)],
    ids=["m2", "cvae"],
)
def test_models_of_other_kinds_are_measured_given_their_labels(kind, tiny, quick, monkeypatch, tmp_path):
    monkeypatch.setenv("VAE_CACHE_DIR", str(tmp_path))
    data, module = build(tiny(*kind))
    given = "_given_label" * (kind is M2)
    for name, key in (("latent", "prior_frechet_distance_n20"), ("reconstruction", "psnr")):
        found = MEASURES[name](module.vae.eval(), data, "test", Work(name), images=20)
        assert all(map(math.isfinite, found.values())) and key + given in found
        assert "gaussian_kl_n20" not in found
