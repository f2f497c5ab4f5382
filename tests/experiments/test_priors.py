"""The priors experiment: its protocol, and its claims on made-up results."""

from __future__ import annotations

import copy

import pytest
from hydra import compose, initialize_config_dir

from experiments.priors.claims import LONG, claims, difference, table
from experiments.priors.protocol import SETTINGS, measure_model, overrides
from vae.claims import Gain
from vae.cli import CONFIGS
from vae.engine.run import evaluate, train


def cell(nll: list[float], spread: float, marginal: float) -> dict:
    """Three seeds of a prior; the images' NLLs, means over seeds, lie `spread` around their mean."""
    mean = sum(nll) / len(nll)
    numbers = {key: [10.0] * len(nll) for key in ("distortion", "rate", "mutual_information")}
    return {
        **numbers,
        "marginal_kl": [marginal] * len(nll),
        "nll": nll,
        "nll_of_images": [mean - spread, mean + spread],
    }


def made_up(epochs: int = LONG) -> dict:
    """The published numbers."""
    data = {
        "mnist": {
            "standard_normal": cell([84.4, 84.45, 84.5], 9.0, 8.0),
            "vampprior": cell([82.4, 82.43, 82.46], 8.9, 5.0),
        },
        "fashion_mnist": {
            "standard_normal": cell([228.6, 228.7, 228.8], 20.0, 8.0),
            "vampprior": cell([227.3, 227.35, 227.4], 20.1, 5.0),
        },
    }
    return {"data": data, "protocol": {**SETTINGS["full"], "epochs": epochs}}


def failed(results: dict) -> list[str]:
    return [claim.name for claim in claims(results) if not claim.holds]


def test_the_published_numbers_pass_every_claim():
    assert failed(made_up()) == []
    assert len(claims(made_up())) == 6
    assert len(claims(made_up(epochs=20))) == 4  # absolute numbers are claimed of long training alone
    assert difference("mnist") == pytest.approx(2.02)
    assert difference("fashion_mnist") == pytest.approx(1.35)


def test_gain_is_paired_over_images():
    found = Gain.of(made_up()["data"]["mnist"], "standard_normal", "vampprior")
    assert found.mean == pytest.approx(2.02)
    assert found.seeds == pytest.approx([2.0, 2.02, 2.04])
    assert found.se == pytest.approx(0.1)  # of differences 2.02 -+ 0.1: the images' own spread of 9 nats cancels


def test_a_small_an_uncertain_and_a_seeds_own_gain_are_told():
    small = made_up()
    small["data"]["mnist"]["vampprior"] = cell([83.5, 83.53, 83.56], 9.0, 5.0)
    assert failed(small) == ["MNIST: the VampPrior is better than N(0, I)"]
    uncertain = made_up()
    uncertain["data"]["fashion_mnist"]["vampprior"] = cell([227.3, 227.35, 227.4], 22.0, 5.0)
    assert failed(uncertain) == ["Fashion-MNIST: the VampPrior is better than N(0, I)"]
    one_seed = made_up()
    one_seed["data"]["fashion_mnist"]["vampprior"] = cell([229.0, 226.5, 226.5], 20.1, 5.0)
    assert failed(one_seed) == ["Fashion-MNIST: the VampPrior is better than N(0, I)"]


def test_a_prior_that_is_further_away_and_a_wrong_number_are_told():
    results = copy.deepcopy(made_up())
    results["data"]["mnist"]["vampprior"]["marginal_kl"][2] = 8.1
    results["data"]["mnist"]["standard_normal"]["nll"] = [88.5, 88.5, 88.5]
    assert failed(results) == [
        "MNIST: it is nearer to the aggregate posterior",
        "MNIST: NLL under N(0, I)",
    ]


def test_the_table_has_a_row_a_prior_and_says_how_it_was_measured():
    found = table(made_up())
    assert [row[0] for row in found.rows][:2] == ["MNIST, N(0, I)", "MNIST, VampPrior, 500"]
    assert found.rows[1][1:3] == ("82.43", "82.43 ± 0.03")


@pytest.mark.parametrize("form", ["quick", "full"])
def test_the_configs_are_the_protocol(form):
    settings = SETTINGS[form]
    with initialize_config_dir(CONFIGS, version_base="1.3"):
        config = compose("train", ["experiment=priors", "seed=2", *overrides("fashion_mnist", "vampprior", settings)])
    assert (list(config.network.hidden), config.network.activation, config.model.latent_dim) == (
        [300, 300],
        "gated",
        40,
    )
    assert (config.data.binarize, config.data.batch_size, config.seed) == ("dynamic", 100, 2)
    assert config.prior.pseudo_inputs == settings["priors"]["vampprior"]
    assert config.objective.schedule.steps == settings["warm_up"] * 550


def test_a_model_is_measured_as_the_library_measures_it(tiny, tmp_path, monkeypatch):
    monkeypatch.setattr("experiments.priors.protocol.AGGREGATE", 64)
    train(tiny("prior=vampprior", "prior.pseudo_inputs=4"), tmp_path, [], progress_bar=False)
    found = measure_model(tmp_path, images=64, samples=5, pictures=True)
    assert found["elbo"] == pytest.approx(evaluate(tmp_path)["test/elbo"], rel=1e-6)
    assert found["nll_of_images"].mean() < -found["elbo"]
    assert found["pseudo_inputs"]["shape"] == [4, 8, 8]
