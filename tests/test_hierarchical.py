import math

import pytest
import torch
from fitting import fit
from test_priors import randomised
from torch import nn

from vae import networks
from vae.engine.build import build
from vae.errors import VAEError
from vae.evaluation.likelihood import ELBOTotals, log_likelihood
from vae.gaussian import LOG_2PI, DiagonalGaussian
from vae.hierarchical import BottomDecoder, TwoLayerPosterior, TwoLayerPrior
from vae.likelihoods import Gaussian
from vae.model import VAE
from vae.seeding import generator

BURDA = ("network=burda", "posterior=two_layer", "prior=two_layer")


def normal(*shape, name="normal"):
    return torch.randn(*shape, generator=generator(name, *shape), dtype=torch.float64)


def log_normal(x, mean, log_var):
    return -0.5 * (LOG_2PI + log_var + (x - mean) ** 2 / log_var.exp()).sum(-1)


def test_prior_and_posterior_are_the_products_of_their_layers():
    prior, family = randomised(TwoLayerPrior(3, 2, (5,))), randomised(TwoLayerPosterior(3, 2, (5,)))
    h1, h2, parameters = normal(4, 6, 3), normal(4, 6, 2), normal(6, 6)
    z = torch.cat([h1, h2], -1)
    below = prior.below.net(h2)
    torch.testing.assert_close(
        prior.log_prob(z), log_normal(h2, 0 * h2, 0 * h2) + log_normal(h1, below[..., :3], below[..., 3:])
    )
    above = family.above.net(h1)
    expected = log_normal(h1, parameters[:, :3], parameters[:, 3:]) + log_normal(h2, above[..., :2], above[..., 2:])
    torch.testing.assert_close(family(parameters).log_prob(z), expected)


def linear_layer(weight: float, variance: float) -> nn.Module:
    class Layer(nn.Module):
        def forward(self, a):
            return DiagonalGaussian(weight * a, torch.full_like(a, math.log(variance)))

    return Layer()


def chain() -> tuple[VAE, torch.Tensor, torch.Tensor]:
    """h2 ~ N(0, 1), h1 ~ N(0.8 h2, 0.5), x ~ N(1.5 h1, 0.3) with the exact posterior; images and their log p(x)."""
    a, s, b, r = 0.8, 0.5, 1.5, 0.3
    marginal = a * a + s  # variance of h1
    prior, family = TwoLayerPrior(1, 1), TwoLayerPosterior(1, 1)
    prior.below = linear_layer(a, s)
    gain = a / marginal  # h2 | h1
    family.above = linear_layer(gain, 1 - gain * a)
    precision = b * b / r + 1 / marginal  # h1 | x

    class Encoder(nn.Module):
        def forward(self, x):
            mean = x.flatten(1) * b / r / precision
            return torch.cat([mean, torch.full_like(mean, -math.log(precision))], -1)

    class Decoder(networks.Decoder):
        def forward(self, z):
            return (b * z).reshape(-1, 1, 1, 1, 1)

    vae = VAE(Encoder(), BottomDecoder(Decoder(), 1), prior, Gaussian(sigma=r**0.5), 0, family).double()
    x = 2 * normal(50, 1, 1, 1)
    exact = torch.distributions.Normal(0, (b * b * marginal + r) ** 0.5).log_prob(x.flatten())
    return vae, x, exact


def test_a_linear_two_layer_model_with_its_exact_posterior_weighs_every_z_as_log_p_of_x():
    vae, x, exact = chain()
    log_w = vae.log_weights(x, generator("z"), samples=9)
    torch.testing.assert_close(log_w, exact.expand(9, -1), rtol=0, atol=1e-6)


def test_draws_from_a_linear_two_layer_model_have_its_marginal_variance():
    vae, _, _ = chain()
    h1 = vae.prior.sample(200_000, generator("h"))[:, 0]
    assert math.isclose(h1.var().item(), 0.8**2 + 0.5, rel_tol=0.01)
    torch.testing.assert_close(vae.sample(5, generator("x")).flatten(), 1.5 * vae.prior.sample(5, generator("x"))[:, 0])


def test_burdas_two_layers_come_from_config_and_every_measure_serves_them(tiny):
    data, module = build(tiny(*BURDA, "model.latent_dim=100"))
    vae, batch = module.vae, data.examples("train", 32)
    assert vae.latent_dim == 150
    widths = [(m.in_features, m.out_features) for m in vae.modules() if isinstance(m, nn.Linear)]
    assert widths == [
        *[(64, 200), (200, 200), (200, 200)],  # x -> h1
        *[(100, 200), (200, 200), (200, 64)],  # h1 -> x
        *[(50, 100), (100, 100), (100, 200)],  # h2 -> h1
        *[(100, 100), (100, 100), (100, 100)],  # h1 -> h2
    ]
    totals = ELBOTotals()
    totals.update(vae, batch)
    metrics = totals.compute()
    assert math.isclose(metrics["elbo"], -metrics["rate"] - metrics["distortion"])
    assert log_likelihood(vae, batch, 50).mean() > log_likelihood(vae, batch, 1).mean()
    assert torch.equal(vae.reconstruct(batch.x), vae.reconstruct(batch.x))


def test_two_layers_learn(tiny):
    data, module = build(tiny(*BURDA, "model.latent_dim=10", "posterior.top_dim=5", "prior.top_dim=5"))
    vae, batch = module.vae, data.examples("train", 64)
    elbos = fit(vae, batch, steps=60, lr=5e-3)
    assert all(p.grad is not None for p in vae.parameters())
    assert sum(elbos[-10:]) / 10 > sum(elbos[:10]) / 10 + 0.2


def test_one_layer_of_two_is_refused(tiny):
    for half in (["posterior=two_layer"], ["prior=two_layer"], [*BURDA, "prior.top_dim=49"]):
        with pytest.raises(VAEError, match="both prior=two_layer and posterior=two_layer, with the same top_dim"):
            build(tiny(*half))
