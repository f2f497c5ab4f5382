import pytest
import torch
from linear_gaussian import LinearGaussian
from torch import nn

from vae.data.images import Batch
from vae.gaussian import DiagonalGaussian
from vae.objectives.dip_vae import DIPVAEI, DIPVAEII, covariance
from vae.objectives.elbo import BetaVAE
from vae.seeding import generator

EXACT = LinearGaussian()


class Given(nn.Module):
    """An encoder that puts out what it was given, whatever the image."""

    def __init__(self, mean, log_var):
        super().__init__()
        self.outputs = torch.cat([mean, log_var], -1)

    def forward(self, x):
        return self.outputs


def model():
    """Posterior means with the covariance [[4, 2, 0], [2, 4, 0], [0, 0, 1]] exactly, variances of mean 0.5."""
    signs = torch.cartesian_prod(*[torch.tensor([-1.0, 1.0], dtype=torch.float64)] * 3)
    target = torch.tensor([[4.0, 2, 0], [2, 4, 0], [0, 0, 1]], dtype=torch.float64)
    mean = signs @ torch.linalg.cholesky(target).T
    torch.testing.assert_close(covariance(mean), target)
    variances = torch.cat([torch.full((4, 3), 0.2), torch.full((4, 3), 0.8)]).double()
    vae = EXACT.vae()
    vae.encoder = Given(mean, variances.log())
    return vae, Batch(EXACT.batch(8).x, None, 0)


def regulariser(objective):
    vae, batch = model()
    terms = objective(vae, batch, generator("noise"), 0)
    plain = BetaVAE()(vae, batch, generator("noise"), 0)
    return (terms["loss"] - plain["loss"]).item(), terms


def test_dip_i_charges_the_covariance_of_means():
    value, terms = regulariser(DIPVAEI(lambda_od=3.0, lambda_d=5.0))
    assert terms["off_diagonal"].item() == pytest.approx(2 * 2**2)
    assert terms["diagonal"].item() == pytest.approx(3**2 + 3**2 + 0)
    assert value == pytest.approx(3 * 8 + 5 * 18)


def test_dip_ii_adds_the_mean_posterior_variance_to_the_diagonal():
    value, terms = regulariser(DIPVAEII(lambda_od=3.0, lambda_d=5.0))
    assert terms["off_diagonal"].item() == pytest.approx(8)
    assert terms["diagonal"].item() == pytest.approx(3.5**2 + 3.5**2 + 0.5**2)
    assert value == pytest.approx(3 * 8 + 5 * 24.75)


def test_lambda_d_is_ten_times_lambda_od_for_the_first_and_equal_for_the_second_unless_given():
    assert regulariser(DIPVAEI(lambda_od=3.0))[0] == pytest.approx(3 * 8 + 30 * 18)
    assert regulariser(DIPVAEII(lambda_od=3.0))[0] == pytest.approx(3 * 8 + 3 * 24.75)


def test_the_second_sees_the_covariance_of_samples_of_the_aggregate_posterior():
    vae, batch = model()
    q = vae.encode(batch.x)
    draws = DiagonalGaussian(*q).rsample(generator("draws"), (100_000,)).flatten(0, 1)
    torch.testing.assert_close(covariance(draws), DIPVAEII().covariance(q), rtol=0, atol=0.03)
