"""What the KL term does: moments and distances against known answers, and the verdicts on made-up results."""

from __future__ import annotations

import copy
import math

import pytest
import torch

from experiments.what_the_kl_term_does import claims, protocol
from vae.gaussian import DiagonalGaussian
from vae.priors import StandardNormal

AS_CLAIMED = {
    #   distortion, active units, mixture's KL, moments' KL, Frechet of the prior
    "0": (60.0, 16, 400.0, 90.0, 500.0),
    "1": (80.0, 16, 10.0, 0.2, 50.0),
    "8": (130.0, 6, 1.0, 0.05, 150.0),
    "40": (200.0, 1, 0.1, 0.01, 400.0),
}
KEYS = ("distortion", "active_units", "marginal_kl", "moment_kl")


def results(**changed: dict[str, float]) -> dict:
    """As `measure` gives them, with two seeds; changed: by quantity, of the second seed, by beta."""
    runs = {}
    for beta, (*numbers, prior) in AS_CLAIMED.items():
        run = {
            **dict(zip(KEYS, numbers, strict=True)),
            "rate": 1.0,
            "frechet": {"prior": prior, "fitted Gaussian": 9.0, "aggregate posterior": 8.0, "training images": 1.0},
        }
        second = copy.deepcopy(run)
        for key, of_beta in changed.items():
            if beta in of_beta:
                (second["frechet"] if key == "prior" else second)[key] = of_beta[beta]
        runs[beta] = [run, second]
    maps = {beta: {"empty": 0.25} for beta in AS_CLAIMED}
    return {"runs": runs, "maps": maps, "epochs": 8, "limit": None}


def missed(made_up: dict) -> list[str]:
    return [claim.name for claim in claims.claims(made_up) if not claim.holds]


def test_every_claim_holds_of_results_as_expected():
    assert missed(results()) == []


@pytest.mark.parametrize(
    ("changed", "names"),
    [
        ({"distortion": {"0": 81.0}}, ["the autoencoder reconstructs best", "each step up in β costs reconstruction"]),
        ({"distortion": {"40": 129.0}}, ["each step up in β costs reconstruction"]),
        (
            {"prior": {"0": 49.0}},
            ["its prior samples are worse than the VAE's", "the VAE's prior samples are the best"],
        ),
        ({"prior": {"8": 49.0}}, ["the VAE's prior samples are the best"]),
        ({"moment_kl": {"0": 1.9}}, ["without the KL, the aggregate posterior's moments are far from the prior's"]),
        ({"marginal_kl": {"0": 90.0}}, ["and so is the mixture over the test images"]),
        ({"marginal_kl": {"40": 1.1}}, ["KL(q(z) || p(z)) falls as β rises"]),
        ({"moment_kl": {"8": 0.2}}, ["and so does the KL of its moments alone"]),
        ({"active_units": {"40": 16}}, ["β = 40 switches latents off"]),
    ],
)
def test_a_claim_is_missed_if_one_seed_misses_it(changed, names):
    assert missed(results(**changed)) == names


def test_the_table_has_a_row_for_each_weight_and_the_spread_of_seeds():
    table = claims.table(results(distortion={"0": 62.0}))
    assert [row[0] for row in table.rows] == list(AS_CLAIMED)
    assert table.rows[0][1] == "61.0 ± 1.4"
    assert table.rows[0][-1] == "25.0 %"


def test_moments_are_those_of_draws():
    torch.manual_seed(0)
    q = DiagonalGaussian(torch.randn(5, 3) * 2 + 1, torch.randn(5, 3))
    draws = q.rsample(torch.Generator().manual_seed(0), (200_000,)).flatten(0, 1).double()
    mean, covariance = protocol.moments(q)
    torch.testing.assert_close(mean, draws.mean(0), atol=0.01, rtol=0)
    torch.testing.assert_close(covariance, draws.T.cov(), atol=0.05, rtol=0)


def test_the_kl_of_moments_by_hand():
    assert protocol.moment_kl(torch.zeros(2).double(), torch.eye(2).double()) == pytest.approx(0)
    rho = 0.8
    covariance = torch.tensor([[1, rho], [rho, 1]]).double()
    by_hand = 0.5 * 9 - 0.5 * math.log(1 - rho**2)
    assert protocol.moment_kl(torch.tensor([3.0, 0.0]).double(), covariance) == pytest.approx(by_hand)


def test_a_latent_space_without_holes_is_full_and_one_of_points_is_empty():
    class Prior:
        prior = StandardNormal(2)

    alike = DiagonalGaussian(torch.zeros(3, 2), torch.zeros(3, 2))
    assert protocol.empty(Prior, alike, 500) == 0
    points = DiagonalGaussian(torch.randn(3, 2), torch.full((3, 2), -20.0))
    assert protocol.empty(Prior, points, 500) == 1


def test_codes_follow_what_they_are_drawn_from():
    class Prior:
        prior = StandardNormal(2)

    torch.manual_seed(0)
    q = DiagonalGaussian(torch.randn(4000, 2) + torch.tensor([5.0, 0.0]), torch.full((4000, 2), -2.0))
    drawn = protocol.codes(Prior, q, 4000)
    mean, covariance = protocol.moments(q)
    for source in ("fitted Gaussian", "aggregate posterior"):
        torch.testing.assert_close(drawn[source].double().mean(0), mean, atol=0.1, rtol=0)
        torch.testing.assert_close(drawn[source].double().T.cov(), covariance, atol=0.12, rtol=0)
    assert drawn["prior"].mean(0).abs().max() < 0.1
