"""Regularisers of latents that are maps: networks that commute, spectra that are known, and any objective."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from vae.data.images import Batch
from vae.engine.build import build
from vae.engine.run import train
from vae.engine.stored import read_checkpoint
from vae.errors import VAEError
from vae.likelihoods import Gaussian
from vae.maps import quarter_turn, radial_power_spectrum, shrunk
from vae.model import VAE
from vae.networks.base import Decoder
from vae.objectives.elbo import BetaVAE
from vae.objectives.regularizers import Equivariance, Spectrum
from vae.priors import StandardNormal
from vae.seeding import generator

SPATIAL = ["network=autoencoder_kl", "network.block_out_channels=[4,4]", "network.norm_num_groups=2"]
SPATIAL += ["model.latent_dim=32", "likelihood=gaussian", "likelihood.sigma=0.3"]


class Encoder(nn.Module):
    """A map of means, `of` the image, and beside it log-variances that leave no noise to see."""

    def __init__(self, of, log_var=-1000.0):
        super().__init__()
        self.of, self.log_var = of, log_var

    def forward(self, x):
        mean = self.of(x).flatten(1)
        return torch.cat([mean, torch.full_like(mean, self.log_var)], 1)


class Repeat(Decoder):
    """Each place as 2 x 2 pixels of 0.5 z + 0.1, at any size."""

    any_size = True

    def __init__(self, image_shape):
        super().__init__()
        channels, height, width = image_shape
        self.image_shape, self.latent_shape = image_shape, (channels, height // 2, width // 2)

    def forward(self, z):
        channels, height, width = self.latent_shape
        factor = math.sqrt(z.shape[1] / math.prod(self.latent_shape))
        maps = z.unflatten(1, (channels, round(height * factor), round(width * factor)))
        return (0.5 * F.interpolate(maps, scale_factor=2.0) + 0.1).unsqueeze(1)


def halves(x):
    return shrunk(x, 2)


def model(of=halves, image_shape=(2, 8, 8), log_var=-1000.0):
    decoder = Repeat(image_shape)
    return VAE(Encoder(of, log_var), decoder, StandardNormal(math.prod(decoder.latent_shape)), Gaussian(0.5))


def images(*shape, seed=0):
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def term(regularizer, vae, x, step=0):
    regularizer.setup(vae, SimpleNamespace())
    return regularizer(vae, Batch(x, None, 0), generator("noise"), step)


# --- equivariance -----------------------------------------------------------------------------------------------------


def test_a_mean_pooling_encoder_commutes_with_shrinking_and_a_pointwise_network_with_turning():
    x = images(3, 2, 8, 8)
    scale = term(Equivariance(side="encoder", rotations=False), model(), x)
    assert scale.tolist() == [0, 0, 0]
    turns = term(Equivariance(side="encoder", scales=[]).eval(), model(lambda t: 3 * t[..., ::2, ::2].sin()), x)
    assert turns.min() > 0.1  # which is not the same place of a block
    pointwise = model(lambda t: (3 * t).sin())
    pointwise.decoder.latent_shape = (2, 8, 8)
    pointwise.prior = StandardNormal(128)
    assert term(Equivariance(side="encoder", scales=[]).eval(), pointwise, x).tolist() == [0, 0, 0]


def test_of_a_decoder_that_commutes_the_term_is_the_distortion_of_the_transformed_image():
    x, vae = images(3, 2, 8, 8), model(lambda t: shrunk(t, 2) + 0.2)
    z = vae.encode(x).mean
    decoded = vae.mean_image(z)
    for step, turns in enumerate((1, 2, 3)):
        found = term(Equivariance(scales=[]), vae, x, step)
        torch.testing.assert_close(
            found, -vae.likelihood.log_prob(quarter_turn(decoded, turns)[:, None], quarter_turn(x, turns))
        )
    found = term(Equivariance(rotations=False), vae, x)
    halved = (
        0.5 * F.interpolate(shrunk(z.unflatten(1, (2, 4, 4)), 2), scale_factor=2.0) + 0.1
    )  # 2 x 2 places, 4 x 4 pixels
    squares = (shrunk(x, 2) - halved).square().flatten(1).sum(1)
    constant = 2 * 16 * math.log(0.5 * math.sqrt(2 * math.pi))
    torch.testing.assert_close(found, squares / (2 * 0.25) + constant)


def test_the_encoders_term_is_half_the_squared_distance_of_the_maps():
    x = images(2, 2, 8, 8)

    def of(t):
        return shrunk(t, 2) * torch.arange(t.shape[-1] // 2)

    found = term(Equivariance(side="encoder", rotations=False), model(of), x)
    expected = 0.5 * (of(halves(x)) - halves(of(x))).square().flatten(1).sum(1)
    torch.testing.assert_close(found, expected)


def test_transformations_take_turns_in_training_and_are_all_averaged_outside():
    x, vae = images(2, 2, 8, 8), model(lambda t: shrunk(t, 2) * torch.arange(t.shape[-1] // 2))
    regularizer = Equivariance(side="encoder", scales=[2, 4])
    apart = [term(regularizer, vae, x, step) for step in range(10)]
    assert regularizer.transformations == [(1, 1), (2, 1), (3, 1), (0, 2), (0, 4)]
    assert all(torch.equal(apart[step], apart[step + 5]) for step in range(5))
    assert len({float(one.sum()) for one in apart}) == 5
    torch.testing.assert_close(term(regularizer.eval(), vae, x, 7), torch.stack(apart[:5]).mean(0))


def test_what_there_is_to_transform_by_follows_from_the_places():
    def transformations(image_shape, **options):
        regularizer = Equivariance(**options)
        regularizer.setup(model(image_shape=image_shape), SimpleNamespace())
        return regularizer.transformations

    assert transformations((1, 14, 14)) == [(1, 1), (2, 1), (3, 1)]  # 7 x 7 places cannot be halved
    assert transformations((1, 8, 16)) == [(2, 1), (0, 2)]
    assert transformations((1, 8, 16), rotations=False) == [(0, 2)]
    with pytest.raises(VAEError, match=r"regularizer\.scales=\[2\] must divide the 7x7 places"):
        transformations((1, 14, 14), scales=[2])
    with pytest.raises(VAEError, match=r"has nothing to transform by: set regularizer\.rotations=true"):
        transformations((1, 14, 14), rotations=False)
    with pytest.raises(VAEError, match=r"regularizer\.scales=1 must be a whole number of at least 2"):
        Equivariance(scales=[1])
    with pytest.raises(VAEError, match=r"regularizer\.side=middle is unknown: choose one of decoder, encoder"):
        Equivariance(side="middle")
    with pytest.raises(VAEError, match=r"^regularizer\.weight=-1 must be finite and zero or more"):
        Equivariance(-1)


@pytest.mark.parametrize("posterior", ["fsq", "vq"])
def test_the_encoder_of_codes_is_turned_and_not_shrunk(posterior, tiny, tmp_path):
    codes = [*SPATIAL, "regularizer=equivariance", "regularizer.side=encoder", f"posterior={posterior}"]
    codes += ["prior=codes_uniform", "evaluation.nll_samples=0"]
    metrics = train(tiny(*codes), tmp_path, [], progress_bar=False)
    assert metrics["test/equivariance"] > 0
    with pytest.raises(VAEError, match=r"regularizer\.scales=\[2\] shrinks images.* or regularizer\.side=decoder"):
        build(tiny(*codes, "regularizer.scales=[2]"))
    _, module = build(tiny(*codes, "regularizer.side=decoder"))
    assert (0, 2) in module.objective.regularizer.transformations


# --- spectrum ---------------------------------------------------------------------------------------------------------


def waves(amplitudes, side=8):
    """sum_k a_k cos(2 pi k column / side), k = 1, 2, ..., (1, 1, side, side)."""
    column = torch.arange(side, dtype=torch.float64)
    rows = sum(a * torch.cos(2 * math.pi * k * column / side) for k, a in enumerate(amplitudes, 1))
    return rows.expand(1, 1, side, side)


@pytest.mark.parametrize("delta", [0.0, 0.5])
def test_the_term_is_the_kl_of_the_shares_of_power_of_waves_to_the_flat_spectrum_of_an_impulse(delta):
    _, counts = radial_power_spectrum(images(1, 1, 8, 8))
    powers = torch.tensor([9.0, 4.0, 1.0]).double() / 4 * 64 * 2 / counts[1:4]  # |FFT|^2 / (h w) at +k and -k
    shares = torch.zeros(len(counts) - 1, dtype=torch.float64)
    shares[:3] = powers * torch.arange(1, 4) ** delta / (powers * torch.arange(1, 4) ** delta).sum()

    def impulse(x):
        z = torch.zeros(len(x), 2, 8, 8, dtype=x.dtype)
        z[..., 3, 5] = 0.7
        return z

    vae = model(impulse, (2, 16, 16))
    x = F.interpolate(waves([3, 2, 1]), scale_factor=2.0).repeat(1, 2, 1, 1) + 5
    found = term(Spectrum(delta=delta), vae, x)
    expected = (shares[:3] * (shares[:3] * len(shares)).log()).sum()
    assert found.item() == pytest.approx(expected.item(), rel=1e-5)


def test_it_is_0_where_the_latent_is_the_shrunk_image_at_any_scale_and_offset():
    x = images(4, 2, 16, 16)
    vae = model(lambda t: 7 * shrunk(t, 2) - 3, (2, 16, 16))
    assert term(Spectrum(), vae, x).abs().max() < 1e-6
    assert term(Spectrum(delta=1.0), vae, x).min() > 0.01
    grey = term(Spectrum(), vae, torch.full_like(x, 0.5))
    assert grey.tolist() == pytest.approx([0] * 4, abs=1e-3)


def test_white_noise_has_the_spectrum_of_a_white_image_and_not_of_a_wave():
    def white(x):
        return torch.randn(len(x), 60, 8, 8, generator=torch.Generator().manual_seed(1), dtype=x.dtype)

    vae = model(white, (60, 16, 16))
    assert term(Spectrum(), vae, images(100, 60, 16, 16)).mean() < 0.02  # of 60 channels, noise alone
    wave = F.interpolate(waves([1]), scale_factor=2.0).expand(100, 60, 16, 16)
    assert term(Spectrum(), vae, wave).mean().item() == pytest.approx(math.log(6), abs=0.02)  # 6 frequencies


def test_a_gradient_draws_the_spectra_together():
    x = images(8, 2, 16, 16)
    scale = torch.ones(2, 8, 8, dtype=torch.float64, requires_grad=True)
    vae = model(lambda t: shrunk(t, 2) * scale * torch.arange(8), (2, 16, 16))
    before = term(Spectrum(), vae, x).mean()
    (gradient,) = torch.autograd.grad(before, scale)
    with torch.no_grad():
        scale -= 0.5 * gradient / gradient.norm()
    assert term(Spectrum(), vae, x).mean() < before


# --- with an objective ------------------------------------------------------------------------------------------------


def first_batch(data):
    return data.prepare(next(iter(data.train_dataloader())), training=True)


@pytest.mark.parametrize("name", ["equivariance", "spectrum"])
@pytest.mark.parametrize(
    "objective",
    [
        ["beta_vae"],
        pytest.param(["iwae", "objective.samples=2"], marks=pytest.mark.slow),
        pytest.param(["factor_vae", "objective.hidden=[4]"], marks=pytest.mark.slow),
        pytest.param(["feature"], marks=pytest.mark.slow),
        pytest.param(["cvae"], marks=pytest.mark.slow),
    ],
    ids=lambda objective: objective[0],
)
def test_its_mean_joins_the_loss_of_any_objective(tiny, quick_classifier, objective, name):
    config = tiny(
        *SPATIAL, f"objective={objective[0]}", *objective[1:], f"regularizer={name}", "regularizer.weight=0.7"
    )
    data, module = build(config)
    batch, regularizer = first_batch(data), module.objective.regularizer
    noise = generator("noise")
    terms = module.objective(module.vae, batch, noise, 3)
    terms["loss"].backward()
    assert all(p.grad is not None for p in module.vae.decoder.parameters())
    module.objective.regularizer = None
    noise = generator("noise")
    plain = module.objective(module.vae, batch, noise, 3)
    alone = regularizer(module.vae, batch, noise, 3).mean()
    assert alone > 0 and terms[name] == alone and not terms[name].requires_grad
    assert terms["loss"].item() == pytest.approx((plain["loss"] + 0.7 * alone).item(), rel=1e-6)
    assert {k: v for k, v in terms.items() if k not in ("loss", name)} == {
        k: v for k, v in plain.items() if k != "loss"
    }


@pytest.mark.parametrize("name", ["equivariance", pytest.param("spectrum", marks=pytest.mark.slow)])
def test_at_weight_0_a_run_is_the_run_without_to_the_last_bit(tiny, tmp_path, name):
    metrics, states = {}, {}
    for folder, more in (("without", []), ("zero", [f"regularizer={name}", "regularizer.weight=0"])):
        config = tiny(*SPATIAL[:-2], "likelihood=gaussian_optimal", "data.limit=32", "logger=none", *more)
        metrics[folder] = train(config, tmp_path / folder, [], progress_bar=False)
        states[folder] = read_checkpoint(tmp_path / folder / "checkpoints" / "last.ckpt")["state_dict"]
    different = [key for key, value in states["without"].items() if not torch.equal(states["zero"][key], value)]
    assert different == []  # the scale that follows the training images among them
    assert {k for k, v in metrics["without"].items() if metrics["zero"][k] != v and "seconds" not in k} == set()
    assert metrics["zero"][f"test/{name}"] > 0 and f"test/{name}" not in metrics["without"]


def test_validation_has_the_term_in_its_loss(tiny, tmp_path):
    found = train(tiny(*SPATIAL, "logger=none", "regularizer=equivariance"), tmp_path, [], progress_bar=False)
    whole = found["val/distortion"] + found["val/rate"] + found["val/equivariance"]
    assert found["val/loss"] == pytest.approx(whole, rel=1e-6)


def test_what_makes_no_sense_is_refused_in_a_sentence(tiny):
    for name in ("equivariance", "spectrum"):
        with pytest.raises(
            VAEError, match=rf"regularizer={name} is of a latent that is a map, which network=autoencoder_kl"
        ):
            build(tiny(f"regularizer={name}"))
    with pytest.raises(VAEError, match=r"and M2 one per label: use regularizer=none\.$"):
        build(tiny(*SPATIAL, "objective=m2", "+data.labeled=20", "regularizer=spectrum"))
    small = [*SPATIAL, "network.block_out_channels=[4,4,4]", "regularizer=spectrum"]
    with pytest.raises(VAEError, match=r"2x2 places have one: it takes 4x4"):
        build(tiny(*small))


def test_without_one_an_objective_is_as_it_was(tiny):
    _, module = build(tiny(*SPATIAL))
    assert module.objective.regularizer is None and isinstance(module.objective, BetaVAE)
    assert set(module.objective.state_dict()) == {"beta", "schedule.value"}
