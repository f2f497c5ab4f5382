"""Inference gaps: the exact model against closed forms, and the claims on made-up results."""

from __future__ import annotations

import copy

import pytest
import torch
from hydra import compose, initialize_config_dir

from experiments.inference_gaps.claims import claims, pooled, table
from experiments.inference_gaps.exact import exact_model, measure_exact
from experiments.inference_gaps.protocol import PAPER_GAPS, SETTINGS, overrides, with_flows
from vae.cli import CONFIGS
from vae.evaluation.gaps import elbo, inference_gaps
from vae.evaluation.likelihood import log_likelihood
from vae.seeding import generator


def test_the_exact_model_is_what_it_says():
    model = exact_model(seed=3)
    batch = model.draw(10, seed=3)
    truth, exact = model.log_prob(batch.x), model.gaps()
    assert exact["approximation_gap"] > 0.1
    assert exact["amortisation_gap"] > 0.1
    assert (log_likelihood(model.vae, batch, 3000) - truth).mean().abs() < 0.03  # importance sampling, from its encoder
    encoded = elbo(model.vae, batch.x, None, model.vae.encoder(batch.x), 2000, generator("test"))
    assert (truth - encoded).mean().item() == pytest.approx(exact["inference_gap"], abs=0.03)


def test_the_best_flow_expresses_more_than_the_best_gaussian():
    model = exact_model(seed=3)
    batch, vae = model.draw(4, seed=3), model.vae.float()
    batch = batch._replace(x=batch.x.float())
    local = {"steps": 80, "samples": 20, "learning_rate": 0.05}
    gaps = inference_gaps(vae, batch, model.log_prob(batch.x.double()), **local, elbo_samples=2000)
    flowing = with_flows(vae, batch, 2, local)
    flow = elbo(flowing, batch.x, None, flowing.encoder(batch.x), 2000, generator("test"))
    assert (flow - gaps.elbo_local).mean() > 0.02
    assert (flow - gaps.log_likelihood).mean() < 0.02
    weighted = log_likelihood(flowing, batch, 2000) - gaps.log_likelihood
    assert weighted.mean().abs() < 0.02


def test_measuring_the_exact_model_finds_its_gaps():
    found = measure_exact(0, images=10, temperatures=20, chains=8, leapfrogs=2, steps=60, samples=10, elbo_samples=1500)
    assert abs(found["ais_error"]) < 0.5
    for name, value in found["exact_gaps"].items():
        assert found["gaps"][name] == pytest.approx(value, abs=0.08)


def test_the_configs_are_the_protocol():
    with initialize_config_dir(CONFIGS, version_base="1.3"):
        config = compose("train", ["experiment=inference_gaps", *overrides("fashion", SETTINGS["full"]["epochs"])])
    assert config.data.binarize == "threshold"
    assert (list(config.network.hidden), config.network.activation, config.model.latent_dim) == ([200, 200], "elu", 50)
    assert config.objective.schedule.steps == round(400 / 3280 * 50 * 550)
    assert config.lr_schedule.gamma**50 == pytest.approx(0.1)


# --- claims ---------------------------------------------------------------------------------------------------------


def seed_of(paper: dict) -> dict:
    intervals = {f"{name}_ci95": 0.2 for name in paper}
    names = (
        "ais_less_importance",
        "ais_less_importance_of_flows",
        "flow_gain",
        "second_half",
        "from_prior",
        "sandwich",
    )
    small = {name: {"mean": 0.02, "ci95": 0.01} for name in names}
    return {**paper, **intervals, **small, "adding_up": 0.0, "images": {"approximation": [1.0], "amortisation": [2.0]}}


def made_up() -> dict:
    gaps = {"approximation_gap": 0.5, "amortisation_gap": 0.4, "inference_gap": 0.9}
    exact = {"ais_error": 0.01, "ais_error_ci95": 0.01, "ais_worst": 0.1, "gaps": gaps, "exact_gaps": gaps}
    exact |= {"lower_error": -0.01, "lower_error_ci95": 0.005, "upper_error": 0.01, "upper_error_ci95": 0.005}
    kept = ("seeds", "epochs", "images", "importance_samples", "ais", "temperatures", "flow_steps")
    models = {name: [seed_of(paper) for _ in range(3)] for name, paper in PAPER_GAPS.items()}
    protocol = {key: SETTINGS["full"][key] for key in (*kept, "training_images")}
    return {"exact": exact, "models": models, "training": models, "protocol": protocol}


def failing(results: dict) -> list[str]:
    return [claim.name for claim in claims(results) if not claim.holds]


def test_the_papers_own_table_bears_out_every_claim():
    assert failing(made_up()) == []
    assert len(claims(made_up())) == 5 + 2 * 10 + 1
    assert len(table(made_up()).rows) == 4 + 2 * 19
    assert len(table({**made_up(), "training": {}}).rows) == 4 + 2 * 12


@pytest.mark.parametrize(
    ("key", "value", "claim"),
    [
        ("adding_up", 1e-3, "MNIST: the two gaps add up to the whole, image by image"),
        ("approximation_gap", 0.01, "MNIST: approximation gap above 0"),
        ("amortisation_gap", 0.01, "MNIST: amortisation gap above 0"),
        ("ais_less_importance", {"mean": -0.5, "ci95": 0.1}, "MNIST: AIS agrees with importance sampling from the enc"),
        (
            "ais_less_importance_of_flows",
            {"mean": 1.5, "ci95": 0.1},
            "MNIST: AIS agrees with importance sampling from e",
        ),
        ("flow_gain", {"mean": 0.0, "ci95": 0.1}, "MNIST: a planar flow for each image closes part of the"),
        ("second_half", {"mean": 0.3, "ci95": 0.1}, "MNIST: the search for the best q has ended"),
        ("from_prior", {"mean": 0.3, "ci95": 0.1}, "MNIST: a search from N(0, I) finds no better q"),
        ("sandwich", {"mean": 0.9, "ci95": 0.1}, "MNIST: the sandwich on simulated images is narrow"),
        ("inference_gap", 9.0, "Fashion's inference gap is larger than MNIST's"),
    ],
)
def test_a_claim_fails_where_its_numbers_do_not_bear_it_out(key, value, claim):
    results = made_up()
    for seed in results["models"]["mnist"]:
        seed[key] = value
    assert any(name.startswith(claim) for name in failing(results))


def test_a_wrong_measurement_of_the_exact_model_fails():
    biased, loose = made_up(), made_up()
    biased["exact"]["ais_error"] = -0.2
    loose["exact"]["gaps"] = {**loose["exact"]["exact_gaps"], "amortisation_gap": 0.5}
    assert failing(biased) == ["linear-Gaussian model: AIS finds the exact log p(x)"]
    assert failing(loose) == ["linear-Gaussian model: amortisation gap"]


def test_intervals_are_of_the_images_and_with_three_seeds_of_the_seeds_too():
    one = [{"gap": 2.0, "gap_ci95": 0.3}]
    assert pooled(one, "gap") == (2.0, pytest.approx(0.3))
    three = [copy.deepcopy(one[0]) | {"gap": gap} for gap in (1.0, 2.0, 3.0)]
    assert pooled(three, "gap") == (2.0, pytest.approx((4.30**2 / 3 + 0.3**2) ** 0.5))
    same = [copy.deepcopy(one[0]) for _ in range(3)]
    assert pooled(same, "gap") == (2.0, pytest.approx(0.3)), "the images are the same: seeds do not average them out"
    assert torch.tensor(pooled(three, "gap")).isfinite().all()
