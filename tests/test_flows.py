import math

import pytest
import torch
from fitting import fit
from test_priors import plane, randomised

from vae.engine.build import build
from vae.errors import VAEError
from vae.evaluation.likelihood import log_likelihood
from vae.flows import MADE, AffineCoupling, IAFStep, InverseAutoregressiveFlow, MaskedAffine, PlanarFlow, PlanarStep
from vae.gaussian import DiagonalGaussian
from vae.seeding import generator


def normal(*shape, name="normal"):
    return torch.randn(shape, generator=generator(name, *shape), dtype=torch.float64)


def planar_step(d, batch=(), scale=2.0):
    return PlanarStep(
        scale * normal(*batch, d, name="w"), scale * normal(*batch, d, name="u"), normal(*batch, name="b")
    )


def iaf_step(d, flipped=True):
    net = randomised(MADE(d, (9, 7), outputs=2, context=4), scale=0.7)
    return IAFStep(net, normal(4, name="context"), flipped)


STEPS = {
    "planar": planar_step,
    "iaf": iaf_step,
    "coupling": lambda d: randomised(AffineCoupling(d, (8,), odd=True)),
    "masked": lambda d: randomised(MaskedAffine(d, (9, 7), flipped=True)),
}


@pytest.mark.parametrize("step", STEPS.values(), ids=STEPS)
@pytest.mark.parametrize("d", [1, 2, 5])
def test_log_determinant_is_that_of_the_jacobian(step, d):
    step = step(d)
    for z in normal(4, d, name="z"):
        jacobian = torch.autograd.functional.jacobian(lambda z: step(z)[0], z)
        torch.testing.assert_close(step(z)[1], jacobian.det().abs().log(), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("step", STEPS.values(), ids=STEPS)
def test_inverse_undoes_the_step_with_the_same_log_determinant(step):
    step, z = step(5), normal(3, 4, 5, name="z")
    new, log_det = step(z)
    back, same = step.inverse(new)
    torch.testing.assert_close(back, z, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(same, log_det, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("step", STEPS.values(), ids=STEPS)
def test_the_inverse_is_differentiated_as_well(step):
    step = step(3)
    for z in normal(3, 3, name="z"):
        new = step(z)[0]
        there = torch.autograd.functional.jacobian(lambda z: step(z)[0], z)
        back = torch.autograd.functional.jacobian(lambda z: step.inverse(z)[0], new)
        torch.testing.assert_close(back @ there, torch.eye(3, dtype=z.dtype), rtol=0, atol=1e-8)


def test_a_planar_step_is_invertible_however_strong_and_the_identity_at_zero():
    w, u = torch.tensor([3.0, 0.0]).double(), torch.tensor([-50.0, 1.0]).double()
    step = PlanarStep(w, u, torch.zeros(()).double())
    torch.testing.assert_close((w * step.u).sum(), step.slope)
    z = normal(6, 2, name="z")
    new, log_det = step(z)
    assert log_det.isfinite().all()
    torch.testing.assert_close(step.inverse(new)[0], z)
    for nothing in (PlanarStep(w, 0 * u, step.b), PlanarStep(0 * w, 0 * u, step.b)):
        torch.testing.assert_close(nothing(z)[0], z)
        assert nothing(z)[1].abs().max() < 1e-15


@pytest.mark.parametrize("size", [1e-2, 1e-5, 1e-15, 1e-25])
def test_a_planar_step_and_its_gradient_stay_exact_in_float32_as_w_goes_to_zero(size):
    def step(dtype):
        w = (size * torch.tensor([1.0, -2.0, 0.5, 3.0, 1.0], dtype=torch.float64)).to(dtype).requires_grad_()
        u, z = (torch.tensor(v, dtype=dtype) for v in ([1.0, 0.3, -1.0, 0.2, 0.7], [1.0, 1.0, -2.0, 0.5, 1.0]))
        new, log_det = PlanarStep(w, u, torch.ones((), dtype=dtype))(z)
        gradient = torch.autograd.grad((new * z).sum() + log_det, w)[0]
        return new.detach(), log_det.detach(), size * gradient  # the direction of w is all that new depends on

    for narrow, wide in zip(step(torch.float32), step(torch.float64), strict=True):
        torch.testing.assert_close(narrow.double(), wide, rtol=1e-6, atol=1e-6)


def test_a_planar_steps_gradient_along_w_is_not_lost_among_those_across_it():
    # the sum of z' and the log-determinant at u = b = z = 1 and w_i = 1e-5, differentiated with 50 digits
    w, ones = torch.full((5,), 1e-5, requires_grad=True), torch.ones(5)
    new, log_det = PlanarStep(w, ones, torch.ones(()))(ones)
    gradient = torch.autograd.grad(new.sum() + log_det, w)[0]
    torch.testing.assert_close(gradient, torch.full((5,), 2.0354875), rtol=1e-4, atol=0)


def test_made_outputs_depend_on_earlier_latents_and_on_the_context_alone():
    d = 6
    net = randomised(MADE(d, (11, 13), outputs=2, context=3))
    z, context = normal(d, name="z"), normal(3, name="context")
    jacobian = torch.autograd.functional.jacobian(lambda z: net(z, context), z)  # (outputs, D, D)
    assert (jacobian.triu() == 0).all()
    rows, columns = torch.tril_indices(d, d, offset=-1)
    assert (jacobian[:, rows, columns] != 0).all()
    to_context = torch.autograd.functional.jacobian(lambda c: net(z, c), context)
    assert (to_context != 0).all()


def family(name, d=2):
    if name == "planar":
        return PlanarFlow(d, steps=3)
    return randomised(InverseAutoregressiveFlow(d, steps=2, hidden=(7,), context=4), scale=0.7)


@pytest.mark.parametrize("name", ["planar", "iaf"])
def test_a_flow_posterior_integrates_to_one_and_is_what_its_draws_follow(name):
    flow = family(name)
    posterior = flow(0.7 * normal(flow.encoder_outputs, name="parameters"))
    z, area = plane(reach=10, points=401)
    density = posterior.log_prob(z).exp()
    assert math.isclose(density.sum().item() * area, 1, abs_tol=1e-3)
    draws = posterior.rsample(generator("draws"), (100_000,))
    mean = (density @ z) * area
    torch.testing.assert_close(draws.mean(0), mean, rtol=0, atol=0.03)


@pytest.mark.parametrize("name", ["planar", "iaf"])
def test_density_of_the_last_draw_is_that_found_by_inverting(name):
    flow = family(name, d=4)
    posterior = flow(normal(3, flow.encoder_outputs, name="parameters"))
    z = posterior.rsample(generator("draws"), (5,))
    torch.testing.assert_close(posterior.log_prob(z), posterior.log_prob(z.clone()), rtol=1e-8, atol=1e-8)


def test_a_planar_flow_without_a_push_is_its_base():
    flow = PlanarFlow(3, steps=2)
    parameters = normal(5, flow.encoder_outputs, name="parameters")
    extra = parameters[:, 6:].unflatten(1, (2, 7))
    extra[..., 3:6] = 0  # u of each step
    base = DiagonalGaussian.from_parameters(parameters[:, :6])
    z = normal(5, 3, name="z")
    torch.testing.assert_close(flow(parameters).log_prob(z), base.log_prob(z))
    torch.testing.assert_close(flow(parameters).mean, base.mean)


@pytest.mark.parametrize("posterior", ["planar", "iaf"])
@pytest.mark.slow
def test_flows_train_from_their_config_with_the_rate_estimated(tiny, posterior):
    data, module = build(tiny(f"posterior={posterior}"))
    vae, batch = module.vae, data.examples("train", 64)
    out = vae(batch.x, generator("z"))
    torch.testing.assert_close(out.rate, out.posterior.log_prob(out.z) - vae.prior.log_prob(out.z))
    elbos = fit(vae, batch, steps=150, lr=5e-3)
    assert sum(elbos[-10:]) / 10 > sum(elbos[:10]) / 10 + 0.2
    bounds = [log_likelihood(vae, batch, k).mean().item() for k in (1, 50)]
    assert bounds[0] < bounds[1]


def test_flows_that_make_no_sense_are_refused():
    with pytest.raises(VAEError, match="at least one step"):
        PlanarFlow(3, steps=0)
    with pytest.raises(VAEError, match="at least one step"):
        InverseAutoregressiveFlow(3, steps=0)
    with pytest.raises(VAEError, match="hidden layer"):
        InverseAutoregressiveFlow(3, hidden=())
    with pytest.raises(VAEError, match="context"):
        InverseAutoregressiveFlow(3, context=0)
