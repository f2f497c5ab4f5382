import gzip
import math
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from linear_gaussian import LinearGaussian
from torch import Tensor, nn

from vae.beta import GECO, ControlVAE, Linear
from vae.errors import VAEError
from vae.kl import gaussian_kl_to_standard_normal
from vae.model import Halves
from vae.objectives.capacity import Capacity, FreeBits
from vae.objectives.elbo import BetaVAE
from vae.seeding import generator

EXACT = LinearGaussian()


def run(objective, vae, step=0):
    return objective(vae, EXACT.batch(50), generator("noise"), step)


# --- one call ---------------------------------------------------------------------------------------------------------


def test_at_its_capacity_the_loss_is_the_distortion_and_off_it_gamma_a_nat():
    vae = EXACT.vae()
    at_zero = run(Capacity(0.0, gamma=3.0), vae)
    rate, distortion = float(at_zero["rate"]), float(at_zero["distortion"])
    assert at_zero["loss"].item() == pytest.approx(distortion + 3 * rate)
    for capacity, excess in ((rate, 0.0), (rate + 2, 2.0), (rate - 2, 2.0)):
        loss = run(Capacity(capacity, gamma=3.0), vae)["loss"]
        assert loss.item() == pytest.approx(distortion + 3 * excess, abs=1e-5)


def test_capacity_grows_with_the_schedule_and_is_whole_in_validation():
    objective = Capacity(25.0, schedule=Linear(100))
    for step, capacity in ((0, 0.0), (40, 10.0), (1000, 25.0)):
        assert float(run(objective, EXACT.vae(), step)["capacity"]) == pytest.approx(capacity)
    assert float(run(objective.eval(), EXACT.vae(), 0)["capacity"]) == 25.0


def test_a_capacity_refuses_a_feedback_controller():
    with pytest.raises(VAEError, match="clock"):
        Capacity(25.0, schedule=ControlVAE(25.0))


def test_free_bits_charge_each_dimension_its_batch_mean_but_no_less_than_the_floor():
    vae = EXACT.vae()
    kl = vae(EXACT.batch(50).x, generator("noise")).kl.mean(0).detach()
    floor = float(kl.sort().values[:2].mean())  # one of the three lies below it
    terms = run(FreeBits(floor, beta=2.0), vae)
    expected = terms["distortion"] + 2 * sum(max(floor, float(k)) for k in kl)
    assert terms["loss"].item() == pytest.approx(float(expected))
    assert float(terms["rate"]) == pytest.approx(float(kl.sum()))


def test_without_a_floor_free_bits_are_the_beta_vae_and_under_it_only_the_distortion_pulls():
    vae = EXACT.vae(shift=0.3)
    losses = run(FreeBits(0.0, beta=3.0), vae)["loss"], run(BetaVAE(3.0), vae)["loss"]
    torch.testing.assert_close(*losses)
    under_floor = run(FreeBits(1e4), vae)["loss"], run(BetaVAE(0.0), vae)["loss"]
    gradients = [torch.autograd.grad(loss, vae.encoder.weight)[0] for loss in under_floor]
    assert torch.equal(*gradients)


def test_a_group_of_dimensions_shares_its_floor():
    vae = EXACT.vae()
    rate = run(BetaVAE(), vae)["rate"]
    for floor in (0.0, float(rate) - 1, float(rate) + 1):
        terms = run(FreeBits(floor, groups=1), vae)
        assert (terms["loss"] - terms["distortion"]).item() == pytest.approx(max(floor, float(rate)))


# --- where training settles: the exact rate-distortion curve of a linear-Gaussian model -----------------------------------


@dataclass
class Pass(Halves):
    distortion: Tensor
    rate: Tensor
    kl: Tensor


class ExpectedLinearVAE(nn.Module):
    """x ~ N(w z, s) in each principal direction of data with these variances; E_x E_q in closed form, so without noise.

    At weight beta the optimum is reverse water-filling at the level beta s (Lucas et al. 2019, Alemi et al. 2018).
    """

    def __init__(self, variances, s):
        super().__init__()
        self.variances, self.s = variances, s
        self.w = nn.Parameter(0.5 * variances.sqrt())
        self.v = nn.Parameter(0.5 / variances.sqrt().clamp(min=0.1))
        self.log_var = nn.Parameter(torch.zeros_like(variances))

    def squared_error(self):
        noise = self.w.square() * self.log_var.exp()
        return (self.variances * (1 - self.w * self.v).square() + noise).sum()

    def forward(self, x, generator, y=None):
        constant = len(self.variances) / 2 * math.log(2 * math.pi * self.s)
        # E mean^2 = v^2 variance, and the KL is linear in mean^2
        kl = gaussian_kl_to_standard_normal(self.v * self.variances.sqrt(), self.log_var)
        return Pass(self.squared_error() / (2 * self.s) + constant, kl.sum(), kl[None])


def water_filling(variances, level):
    """Rate in nats and squared error at a water level."""
    rate = 0.5 * (variances / level).log().clamp(min=0).sum()
    return float(rate), float(variances.clamp(max=level).sum())


def settle(objective, vae, steps=2500, lr=0.03):
    optimizer = torch.optim.Adam(vae.parameters(), lr=lr, betas=(0.9, 0.99))
    decay = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for step in range(steps):
        terms = objective(vae, EXACT.batch(1), None, step)
        optimizer.zero_grad()
        terms["loss"].backward()
        objective.schedule.observe(rate=terms["rate"], distortion=terms["distortion"])
        optimizer.step()
        decay.step()
    return terms["rate"].item(), vae.squared_error().item()


SPECTRUM = 5.0 * 0.6 ** torch.arange(12, dtype=torch.float64)


def objectives(rate, squared_error, n, s, active):
    """Each way of asking for the same point of the curve, at the level 0.1."""
    target = squared_error / (2 * s) + n / 2 * math.log(2 * math.pi * s)
    beta = 0.1 / s
    return {
        "beta_vae": BetaVAE(beta),
        "capacity": Capacity(rate, gamma=2 * beta, schedule=Linear(300)),
        "geco": BetaVAE(schedule=GECO(target, alpha=0.9, eta=0.05 / (active * beta), init=beta / 2)),
        "control": BetaVAE(
            schedule=ControlVAE(rate, kp=0.01, ki=0.02 * beta / active, minimum=beta / 5, maximum=5 * beta)
        ),
    }


SLOW = [pytest.param(name, marks=pytest.mark.slow) for name in ("beta_vae", "geco", "control")]


@pytest.mark.parametrize("name", ["capacity", *SLOW])
@pytest.mark.slow
def test_rate_control_settles_on_the_exact_curve(name):
    rate, squared_error = water_filling(SPECTRUM, 0.1)
    active = int((SPECTRUM > 0.1).sum())
    objective = objectives(rate, squared_error, len(SPECTRUM), 0.01, active)[name]
    reached = settle(objective, ExpectedLinearVAE(SPECTRUM, 0.01), steps=1300 if name == "capacity" else 2500)
    assert reached == pytest.approx((rate, squared_error), rel=0.01)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["beta_vae", "capacity", "geco", "control"])
def test_rate_control_settles_on_the_published_point_of_mnist(data_dir, name):
    path = next((data_dir / "MNIST" / "raw").glob("train-images-idx3-ubyte*"))
    raw = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    x = torch.from_numpy(np.frombuffer(raw, np.uint8, offset=16).reshape(-1, 784).copy()).float() / 255
    x = x - x.mean(0)
    variances = torch.linalg.eigvalsh((x.T @ x / len(x)).double()).clamp(min=1e-9).flip(0)
    assert water_filling(variances, 0.1) == pytest.approx((45.109, 13.6441), rel=1e-4)

    objective = objectives(45.109, 13.6441, 784, 0.01, active=69)[name]
    reached = settle(objective, ExpectedLinearVAE(variances, 0.01), steps=4000)
    assert reached == pytest.approx((45.109, 13.6441), rel=0.01)


@pytest.mark.slow
def test_free_bits_keep_every_dimension_above_the_floor_and_cost_only_where_they_must():
    # at s = 1 most directions of this spectrum are not worth a nat, and collapse without a floor
    floor, variances = 0.4, SPECTRUM
    collapsed, kept = ExpectedLinearVAE(variances, 1.0), ExpectedLinearVAE(variances, 1.0)
    settle(BetaVAE(), collapsed, steps=700)
    settle(FreeBits(floor), kept, steps=700)
    kl = [vae(None, None).kl[0].detach() for vae in (collapsed, kept)]
    worth = 0.5 * variances.log().clamp(min=0)  # water-filling at the level 1
    assert (kl[0] < 0.05).sum() >= 8
    torch.testing.assert_close(kl[0], worth, rtol=0.02, atol=0.01)
    torch.testing.assert_close(kl[1], worth.clamp(min=floor), rtol=0.02, atol=0.01)
