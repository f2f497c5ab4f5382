import torch
from linear_gaussian import LinearGaussian

from vae.engine.build import build
from vae.seeding import generator


def test_weights_at_the_exact_posterior_are_the_likelihood_whatever_z():
    exact = LinearGaussian()
    batch = exact.batch(20)
    log_weights = exact.vae().log_weights(batch.x, generator("z"), samples=7)
    torch.testing.assert_close(log_weights, exact.log_prob(batch.x).expand(7, -1), rtol=0, atol=1e-6)


def test_distortion_and_rate_are_the_two_halves_of_the_elbo():
    # at the exact posterior the ELBO is log p(x); averaging over z leaves only Monte Carlo error in the distortion
    exact = LinearGaussian()
    batch = exact.batch(5)
    out = exact.vae()(batch.x, generator("z"), sample_shape=(40_000,))
    elbo = -(out.distortion + out.rate)
    error = elbo.mean(0) - exact.log_prob(batch.x)
    assert (error.abs() < 4 * elbo.std(0) / 40_000**0.5).all()


def test_decode_keeps_every_leading_dimension_in_place():
    vae = LinearGaussian().vae()
    z = torch.randn(4, 5, 3, dtype=torch.float64, generator=generator("z"))
    torch.testing.assert_close(vae.decode(z)[2, 3], vae.decode(z[2, 3:4])[0])


def test_reconstructions_are_deterministic_and_at_the_posterior_mean():
    vae = LinearGaussian().vae()
    x = LinearGaussian().batch(3).x
    assert torch.equal(vae.reconstruct(x), vae.reconstruct(x))
    torch.testing.assert_close(vae.reconstruct(x), vae.decode(vae.encode(x).mean)[:, 0])


def test_under_autocast_images_are_those_of_the_decoders_numbers_in_float32(tiny):
    _, module = build(tiny("likelihood=continuous_bernoulli"))
    vae, z = module.vae, torch.randn(4, 3, generator=generator("z"))
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        narrow = vae.decoder(z)
        image, draw = vae.mean_image(z), vae.draw_image(z, generator("pixels"))
    assert narrow.dtype == torch.bfloat16
    assert torch.equal(image, vae.likelihood.mean(narrow.float()))
    assert torch.equal(draw, vae.likelihood.sample(narrow.float(), generator("pixels")))
