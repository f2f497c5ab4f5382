"""Measures of reconstruction: closed forms, scikit-image's SSIM, and a model that reconstructs perfectly."""

from __future__ import annotations

import functools
import math

import numpy as np
import pytest
import scipy.signal
import torch

from vae.data.module import ImageDataModule
from vae.engine.build import build
from vae.errors import VAEError
from vae.evaluation import reconstruction
from vae.evaluation.reconstruction import mean_squared_error, ms_ssim, psnr, reconstruction_quality, scales_of, ssim
from vae.evaluation.samples import frechet_distance, trained_classifier


def images(*shape, seed=0):
    """Smooth images with some noise, so that structure matters."""
    noise = torch.rand(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    waves = torch.sin(torch.arange(shape[-1]) / 3) * torch.cos(torch.arange(shape[-2]) / 4)[:, None]
    return (0.5 + 0.3 * waves + 0.2 * (noise - 0.5)).clamp(0, 1)


def test_psnr_of_a_known_noise_is_its_power_in_decibels():
    x = images(3, 2, 9, 7)
    sign = torch.where(torch.arange(x.numel()) % 2 == 0, 1.0, -1.0).reshape(x.shape)
    sigma = torch.tensor([0.1, 0.01, 0.5])
    noisy = x + sign * sigma[:, None, None, None]
    assert mean_squared_error(x, noisy) == pytest.approx(sigma.square().tolist(), rel=1e-6)
    assert psnr(x, noisy).tolist() == pytest.approx([20, 40, 20 * math.log10(2)], rel=1e-6)
    assert psnr(x, x).isposinf().all()


@pytest.mark.parametrize("shape", [(2, 1, 11, 11), (2, 3, 20, 17)])
def test_ssim_is_scikit_images_with_the_published_constants(shape):
    metrics = pytest.importorskip("skimage.metrics", reason="needs scikit-image: pip install scikit-image")
    a, b = images(*shape), images(*shape, seed=1)
    expected = [
        metrics.structural_similarity(
            one.numpy(),
            other.numpy(),
            channel_axis=0,
            data_range=1.0,
            gaussian_weights=True,
            sigma=1.5,
            use_sample_covariance=False,
        )
        for one, other in zip(a, b, strict=True)
    ]
    assert ssim(a, b).tolist() == pytest.approx(expected, abs=1e-12)


def test_ssim_of_constant_images_is_their_luminance_and_of_equal_ones_is_one():
    a, b = torch.full((1, 1, 12, 12), 0.2), torch.full((1, 1, 12, 12), 0.6)
    assert ssim(a, b).item() == pytest.approx((2 * 0.12 + 1e-4) / (0.04 + 0.36 + 1e-4))
    assert ssim(images(2, 3, 12, 12), images(2, 3, 12, 12)).tolist() == pytest.approx([1, 1])
    x = images(1, 1, 30, 30)
    scaled = x.mean() + 0.5 * (
        x - x.mean()
    )  # half the contrast: c s = 2 * 0.5 / (1 + 0.25), were the window's mean constant
    assert 0.75 < ssim(x, scaled).item() < 0.85


def by_hand(a, b, exponents):
    """MS-SSIM of one grey image as in Wang et al. 2003, with scipy's two-dimensional convolutions."""
    steps = np.arange(11) - 5
    kernel = np.exp(-(steps[:, None] ** 2 + steps**2) / (2 * 1.5**2))

    def blur(x):
        return scipy.signal.convolve2d(x, kernel / kernel.sum(), mode="valid")

    value = 1.0
    for scale, exponent in enumerate(exponents):
        ma, mb = blur(a), blur(b)
        va, vb, cab = blur(a * a) - ma**2, blur(b * b) - mb**2, blur(a * b) - ma * mb
        contrast = (2 * cab + 0.03**2) / (va + vb + 0.03**2)
        if scale == len(exponents) - 1:
            contrast = contrast * (2 * ma * mb + 0.01**2) / (ma**2 + mb**2 + 0.01**2)
        value *= contrast.mean() ** exponent
        even = len(a) // 2 * 2
        a, b = (x[:even, :even].reshape(even // 2, 2, -1, 2).mean((1, 3)) for x in (a, b))
    return value


@pytest.mark.parametrize("side", [176, 48])
def test_ms_ssim_is_that_of_its_definition_and_at_one_scale_ssim(side):
    a, b = images(2, 1, side, side), images(2, 1, side, side, seed=1)
    scales = scales_of((1, side, side))
    published = [0.0448, 0.2856, 0.3001, 0.2363, 0.1333][:scales]
    assert scales == {176: 5, 48: 3}[side]
    exponents = published if scales == 5 else [weight / sum(published) for weight in published]
    expected = [by_hand(one.numpy(), other.numpy(), exponents) for one, other in zip(a[:, 0], b[:, 0], strict=True)]
    assert ms_ssim(a, b, scales).tolist() == pytest.approx(expected, rel=1e-9)
    assert ms_ssim(a, b, 1).tolist() == pytest.approx(ssim(a, b).tolist())
    assert ms_ssim(a, 1 - a, scales).tolist() == [0, 0]  # the opposite: negative at every scale
    both = ms_ssim(torch.cat([a, a], 1), torch.cat([a, b], 1), scales)  # channels are averaged
    assert both.tolist() == pytest.approx([(1 + value) / 2 for value in expected])


def test_an_image_has_as_many_scales_as_the_window_fits_and_none_is_too_small():
    sides = {8: 0, 10: 0, 11: 1, 21: 1, 22: 2, 28: 2, 43: 2, 44: 3, 64: 3, 88: 4, 176: 5, 1024: 5}
    assert {side: scales_of((3, side, 2 * side)) for side in sides} == sides
    with pytest.raises(VAEError, match=r"^SSIM needs images of at least 11x11 pixels, not 8x20\.$"):
        ssim(torch.zeros(1, 1, 8, 20), torch.zeros(1, 1, 8, 20))


# --- of a model -------------------------------------------------------------------------------------------------------


@pytest.fixture
def quick(monkeypatch):
    monkeypatch.setattr(reconstruction, "trained_classifier", functools.partial(trained_classifier, steps=20))


def test_a_model_that_reconstructs_perfectly_is_at_distance_0_and_one_off_by_a_tenth_at_its_value(tiny, quick, caplog):
    data, module = build(tiny("data.binarize=none"))
    vae = module.vae.eval()
    vae.reconstruct = lambda x, y=None: x
    found = reconstruction_quality(vae, data, 50)
    assert found["mse"] == 0 and found["psnr"] == math.inf and abs(found["frechet_distance_n50"]) < 1e-6
    assert "ssim" not in found and "ssim: its window has 11x11 pixels, and the images 8x8" in caplog.text
    x = data.examples("test", 50).x
    vae.reconstruct = lambda x, y=None: x + torch.where(x > 0.5, -0.1, 0.1)
    found = reconstruction_quality(vae, data, 50)
    assert found["mse"] == pytest.approx(0.01, rel=1e-5) and found["psnr"] == pytest.approx(20, rel=1e-5)
    features = reconstruction.classifier_features(data, 0, None, torch.device("cpu"))
    expected = frechet_distance(features(x), features(x + torch.where(x > 0.5, -0.1, 0.1)))
    assert found["frechet_distance_n50"] == pytest.approx(expected, rel=1e-4)
    vae.reconstruct = lambda x, y=None: x + 5  # cut to 1
    assert reconstruction_quality(vae, data, 50)["mse"] == pytest.approx((1 - x.double()).square().mean().item())


def test_means_are_over_images_each_beside_its_own_and_data_without_labels_have_no_frechet_distance(caplog):
    from vae.data.images import Images, Splits

    levels = (images(30, 1, 24, 24) * 255).byte()
    data = ImageDataModule(lambda: Splits(*(Images(levels) for _ in range(3))), batch_size=4)
    data.setup()

    class Blur(torch.nn.Module):
        num_classes = 0

        def __init__(self):
            super().__init__()
            self.weight = torch.nn.Parameter(torch.zeros(1))

        def reconstruct(self, x, y=None):
            return torch.nn.functional.avg_pool2d(x, 3, 1, 1)

    found = reconstruction_quality(Blur(), data, 30, at_a_time=7)
    x = data.examples("test", 30).x
    fake = Blur().reconstruct(x)
    assert found["ssim"] == pytest.approx(
        np.mean([ssim(a[None], b[None]).item() for a, b in zip(x, fake, strict=True)])
    )
    assert found["psnr"] == pytest.approx(
        np.mean([psnr(a[None], b[None]).item() for a, b in zip(x, fake, strict=True)])
    )
    assert found["ms_ssim_s2"] == pytest.approx(ms_ssim(x, fake, 2).mean().item())
    assert set(found) == {"mse", "psnr", "ssim", "ms_ssim_s2"}
    assert "frechet_distance: it needs a classifier, and the data have no labels" in caplog.text
