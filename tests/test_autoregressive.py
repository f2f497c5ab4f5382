"""The autoregressive decoder: what each pixel may see, that its likelihood adds up to one, and that draws follow it."""

import itertools

import pytest
import torch
from torch import nn

from vae.engine.build import build
from vae.errors import VAEError
from vae.hierarchical import BottomDecoder
from vae.likelihoods import Bernoulli
from vae.model import VAE
from vae.networks import made
from vae.networks.autoregressive import MADE
from vae.priors import StandardNormal
from vae.seeding import generator


def tiny_vae(shape=(1, 3, 3), latent_dim=2, num_classes=0) -> VAE:
    """With every weight drawn anew, the last layer's zeros too."""
    pair = made(shape, latent_dim, 1, hidden=(8,), decoder_hidden=(16, 16), num_classes=num_classes)
    vae = VAE(*pair, StandardNormal(latent_dim), Bernoulli(), num_classes).double()
    noise = generator("weights")
    with torch.no_grad():
        for parameter in vae.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=noise, dtype=torch.float64) / 2)
    return vae


@pytest.mark.parametrize("shape, params", [((1, 3, 3), 1), ((2, 2, 3), 3), ((1, 5, 5), 1)])
def test_a_pixel_sees_z_and_the_pixels_before_it_and_nothing_else(shape, params):
    _, decoder = made(shape, 2, params, decoder_hidden=(64, 64), activation="tanh")
    nn.init.normal_(decoder.body.last.weight)
    z, x = torch.randn(1, 2, generator=generator(0)), torch.rand(1, *shape, generator=generator(1))
    channels, pixels = shape[0], shape[1] * shape[2]
    of_x, of_z = torch.autograd.functional.jacobian(lambda x, z: decoder(z, x)[0].flatten(2), (x, z))
    of_x = of_x.reshape(params, channels, pixels, channels, pixels).abs().amax((0, 1, 3))  # (told, seen)
    assert torch.equal(of_x.triu(), torch.zeros(pixels, pixels))
    assert (of_x + torch.ones(pixels, pixels).triu() > 0).all()  # and it does see all of them
    assert (of_z.abs() > 0).all()


@pytest.mark.parametrize("shape", [(1, 3, 3), (2, 2, 2)])
def test_masses_of_all_images_add_up_to_one_at_any_z(shape):
    vae = tiny_vae(shape)
    pixels = shape[0] * shape[1] * shape[2]
    images = torch.tensor(list(itertools.product((0.0, 1.0), repeat=pixels)), dtype=torch.float64).view(-1, *shape)
    z = torch.randn(3, 1, 2, generator=generator("z"), dtype=torch.float64).expand(3, len(images), 2)
    log_prob = vae.likelihood.log_prob(vae.decode(z, x=images), images)
    torch.testing.assert_close(log_prob.exp().sum(-1), torch.ones(3, dtype=torch.float64), rtol=0, atol=1e-12)


def test_a_draw_follows_the_likelihood():
    vae = tiny_vae((1, 2, 2))
    images = torch.tensor(list(itertools.product((0.0, 1.0), repeat=4)), dtype=torch.float64).view(-1, 1, 2, 2)
    z = torch.tensor([0.3, -1.2], dtype=torch.float64)
    mass = vae.likelihood.log_prob(vae.decode(z.expand(16, 2), x=images), images).exp()
    draws = vae.draw_image(z.expand(20_000, 2), generator("draws")).flatten(1) @ torch.tensor([8.0, 4, 2, 1]).double()
    seen = draws.long().bincount(minlength=16) / 20_000
    assert ((seen - mass).abs() < 4 * (mass * (1 - mass) / 20_000).sqrt() + 1e-12).all()


def test_importance_weights_share_the_image_and_not_the_latents():
    vae = tiny_vae()
    x = torch.rand(4, 1, 3, 3, generator=generator("x"), dtype=torch.float64).round()
    together = vae.log_weights(x, generator("z"), samples=5)
    out = vae(x, generator("z"), sample_shape=(5,))
    alone = torch.stack(
        [
            vae.likelihood.log_prob(vae.decode(out.z[k, b : b + 1], x=x[b : b + 1]), x[b : b + 1])[0]
            for k in range(5)
            for b in range(4)
        ]
    ).view(5, 4)
    torch.testing.assert_close(-out.distortion, alone)
    torch.testing.assert_close(together, alone + vae.prior.log_prob(out.z) - out.posterior.log_prob(out.z))


def test_samples_and_reconstructions_are_images_and_repeat():
    vae = tiny_vae(num_classes=3)
    x, y = torch.rand(4, 1, 3, 3, dtype=torch.float64, generator=generator("x")).round(), torch.tensor([0, 1, 2, 0])
    assert torch.equal(vae.reconstruct(x, y), vae.reconstruct(x, y))
    first, again = (vae.sample(4, generator("samples"), y) for _ in range(2))
    assert first.shape == (4, 1, 3, 3) and torch.equal(first, again)
    assert ((first > 0) & (first < 1)).all()


def test_every_pixel_is_told_from_those_before_it_though_units_be_fewer_than_pixels():
    net = MADE(100, (30,), 1, activation="tanh")
    nn.init.normal_(net.last.weight)
    seen = torch.autograd.functional.jacobian(lambda z: net(z)[0], torch.rand(100, generator=generator(0)))
    assert torch.equal(seen.triu(), torch.zeros(100, 100))
    assert (seen[99] != 0).sum() > 90  # of 99: the last unit stops a little short


def test_without_an_image_it_says_what_it_needs():
    vae = tiny_vae()
    with pytest.raises(VAEError, match="autoregressive"):
        vae.decode(torch.zeros(2, 2, dtype=torch.float64))


def test_a_two_layer_model_may_have_one():
    decoder = BottomDecoder(made((1, 3, 3), 2, 1)[1], 2)
    assert decoder.autoregressive and decoder.image_shape == (1, 3, 3)
    assert decoder(torch.zeros(4, 5), torch.zeros(4, 1, 3, 3)).shape == (4, 1, 1, 3, 3)


def test_it_is_built_by_name_and_starts_at_the_mean_image(tiny):
    data, module = build(tiny("network=made", "data=digits"))
    x = data.examples("val", 3).x
    mean = module.vae.likelihood.mean(module.vae.decode(torch.zeros(3, 3), x=x))
    torch.testing.assert_close(mean[0], data.train_mean().clamp(0.001, 0.999), rtol=0, atol=1e-5)
