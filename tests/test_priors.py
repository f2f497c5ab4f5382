import math

import pytest
import torch
from fitting import fit
from linear_gaussian import LinearGaussian
from torch import nn

from vae.engine.build import build
from vae.errors import VAEError
from vae.gaussian import DiagonalGaussian
from vae.priors import MAF, MixtureOfGaussians, RealNVP, StandardNormal, VampPrior
from vae.seeding import generator


def randomised(module: nn.Module, scale: float = 0.5) -> nn.Module:
    noise = generator("randomised")
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(scale * torch.randn(parameter.shape, generator=noise))
    return module.double()


def plane(reach: float = 12.0, points: int = 481) -> tuple[torch.Tensor, float]:
    """A square grid (points^2, 2) and the area of its cells."""
    side = torch.linspace(-reach, reach, points, dtype=torch.float64)
    return torch.cartesian_prod(side, side), (side[1] - side[0]).item() ** 2


def torch_mixture(prior):
    logits, mean, log_var = prior.mixture()
    components = torch.distributions.Independent(torch.distributions.Normal(mean, (0.5 * log_var).exp()), 1)
    return torch.distributions.MixtureSameFamily(torch.distributions.Categorical(logits=logits), components)


def test_a_mixture_has_the_density_that_torch_gives_it():
    prior = randomised(MixtureOfGaussians(3, components=4))
    z = 2 * torch.randn(2, 5, 3, generator=generator("z"), dtype=torch.float64)
    torch.testing.assert_close(prior.log_prob(z), torch_mixture(prior).log_prob(z))


def test_a_mixture_is_evaluated_in_blocks_without_a_change(monkeypatch):
    prior = randomised(MixtureOfGaussians(3, components=4))
    z = torch.randn(50, 3, generator=generator("z"), dtype=torch.float64)
    whole = prior.log_prob(z)
    monkeypatch.setattr("vae.priors.MAX_ELEMENTS", 7 * 4 * 3)
    torch.testing.assert_close(prior.log_prob(z), whole, rtol=0, atol=1e-14)


@pytest.mark.parametrize(
    "prior",
    [
        StandardNormal(2),
        randomised(MixtureOfGaussians(2, 5)),
        randomised(RealNVP(2, 3, (8,))),
        randomised(MAF(2, 3, (8,))),
    ],
)
def test_draws_have_the_moments_of_the_density(prior):
    z, area = plane()
    weight = prior.log_prob(z).exp() * area
    mean = weight @ z
    covariance = (z - mean).T @ ((z - mean) * weight[:, None])
    draws = prior.double().sample(200_000, generator("draws"))
    torch.testing.assert_close(draws.mean(0), mean, rtol=0, atol=0.02)
    torch.testing.assert_close(draws.T.cov(), covariance, rtol=0.03, atol=0.02)


@pytest.mark.parametrize("flow", [RealNVP, MAF])
def test_a_flow_density_integrates_to_one(flow):
    z, area = plane()
    prior = randomised(flow(2, layers=3, hidden=(8,)))
    assert math.isclose(prior.log_prob(z).exp().sum().item() * area, 1, abs_tol=1e-4)


@pytest.mark.parametrize("flow, net", [(RealNVP, lambda layer: layer.net[-1]), (MAF, lambda layer: layer.net.last)])
def test_a_flow_prior_starts_as_the_standard_normal_with_its_gradient_alive(flow, net):
    prior = flow(5)
    z = torch.randn(10, 5, generator=generator("z"))
    torch.testing.assert_close(prior.log_prob(z), StandardNormal(5).log_prob(z), rtol=0, atol=0)
    prior.log_prob(z).sum().backward()
    assert all(net(layer).weight.grad.abs().sum() > 0 for layer in prior.layers)


def test_each_layer_of_maf_has_the_order_of_the_one_before_reversed():
    """One layer's Jacobian is triangular; two of them let every latent depend on every other."""
    z = torch.randn(4, generator=generator("z"), dtype=torch.float64)

    def seen(layers):
        flow = randomised(MAF(4, layers, (12,)))

        def noise(z):
            for layer in reversed(flow.layers):
                z, _ = layer.inverse(z)
            return z

        return torch.autograd.functional.jacobian(noise, z) != 0

    assert torch.equal(seen(1), torch.ones(4, 4).tril().bool()) and seen(2).all()


def vampprior(pseudo_inputs: int = 7):
    exact = LinearGaussian()
    vae, x = exact.vae(), exact.batch(pseudo_inputs).x.sigmoid()
    prior = VampPrior(3, pseudo_inputs)
    prior.setup(vae.encoder, lambda n: x[:n])
    return prior.double(), vae, x


def test_a_vampprior_is_the_average_of_the_encoders_posteriors_at_its_pseudo_inputs():
    prior, vae, _ = vampprior()
    z = torch.randn(4, 6, 3, generator=generator("z"), dtype=torch.float64)
    posteriors = vae.encode(prior.pseudo_inputs())
    average = torch.stack([DiagonalGaussian(m, v).log_prob(z).exp() for m, v in zip(*posteriors, strict=True)]).mean(0)
    torch.testing.assert_close(prior.log_prob(z), average.log())


def test_pseudo_inputs_start_at_training_images_with_their_gradient_alive():
    black_and_white = (LinearGaussian().batch(50).x > 0.5).double()
    prior = VampPrior(3, 50)
    prior.setup(LinearGaussian().vae().encoder, lambda n: black_and_white[:n])
    prior = prior.double()
    assert ((prior.pseudo_inputs() > 0.5) == (black_and_white > 0.5)).all()
    assert (prior.pseudo_inputs() - black_and_white).abs().mean() < 0.06
    prior.log_prob(torch.zeros(1, 3, dtype=torch.float64)).sum().backward()
    assert (prior.logits.grad != 0).all()


def test_a_vampprior_uses_the_encoder_of_its_model_and_does_not_own_it():
    prior, vae, _ = vampprior()
    assert [name for name, _ in prior.named_parameters()] == ["logits"]
    before = prior.log_prob(torch.zeros(1, 3, dtype=torch.float64))
    with torch.no_grad():
        vae.encoder.weight.mul_(2)
    assert not torch.equal(before, prior.log_prob(torch.zeros(1, 3, dtype=torch.float64)))


def test_without_a_closed_form_the_rate_is_log_q_less_log_p_at_the_z_drawn():
    prior, vae, x = vampprior()
    vae.prior = prior
    out = vae(x, generator("z"), sample_shape=(3,))
    torch.testing.assert_close(out.rate, out.posterior.log_prob(out.z) - torch_mixture(prior).log_prob(out.z))


@pytest.mark.parametrize("prior", ["mixture", "vampprior", "realnvp"])
def test_each_prior_trains_from_its_config(tiny, prior):
    data, module = build(tiny(f"prior={prior}"))
    vae, batch = module.vae, data.examples("train", 64)
    own = [p for name, p in vae.named_parameters() if name.startswith("prior.")]
    elbos = fit(vae, batch, steps=60, lr=5e-3)
    assert all(p.grad.abs().sum() > 0 for p in own)
    assert sum(elbos[-10:]) / 10 > sum(elbos[:10]) / 10 + 0.2


def test_more_pseudo_inputs_than_images_are_set_apart(tiny):
    _, module = build(tiny("prior=vampprior", "prior.pseudo_inputs=100"))
    pseudo_inputs = module.vae.prior.pseudo_inputs()
    assert len(pseudo_inputs) == 100
    assert len(pseudo_inputs.unique(dim=0)) == 100


def test_priors_that_make_no_sense_are_refused(tiny):
    with pytest.raises(VAEError, match="at least one component"):
        MixtureOfGaussians(3, components=0)
    with pytest.raises(VAEError, match=r"latent_dim of at least 2"):
        build(tiny("prior=realnvp", "model.latent_dim=1"))
    with pytest.raises(VAEError, match="pseudo_inputs=0"):
        build(tiny("prior=vampprior", "prior.pseudo_inputs=0"))
    with pytest.raises(VAEError, match="posterior=diagonal"):
        build(tiny("prior=vampprior", "posterior=planar"))
