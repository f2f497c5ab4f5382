"""The latent-size experiment: its protocol, its curves, and its claims on made-up results."""

from __future__ import annotations

import shutil

import pytest
from hydra import compose, initialize_config_dir

from experiments.aevb_latent_size.claims import claims, of_size, table
from experiments.aevb_latent_size.protocol import COMPARED, PUBLISHED, curve, log_grid, measure, measure_run
from vae.cli import CONFIGS
from vae.engine.run import evaluate, train
from vae.experiment import Context


def made_up(epochs: int = 300) -> dict:
    """What a reproduction that lands on the published numbers would have measured."""
    runs = {
        str(size): [
            {"elbo": -p.others + 0.1 * seed, "train_elbo": -p.others + 1.5, "rate": 20.0, "active_units": float(size)}
            for seed in range(3)
        ]
        for size, p in PUBLISHED.items()
    }
    elbo = {size: -p.others for size, p in PUBLISHED.items()}
    gains = {f"{a} -> {b}": [{"mean": elbo[b] - elbo[a], "se": 0.1} for _ in range(3)] for a, b in COMPARED}
    return {"runs": runs, "gains": gains, "epochs": epochs}


def verdicts(results: dict) -> dict[str, bool]:
    return {claim.name: claim.holds for claim in claims(results)}


def test_the_published_numbers_pass_every_claim():
    assert all(verdicts(made_up()).values())
    assert len(verdicts(made_up())) == 4 + 1 + 5
    assert len(verdicts(made_up(epochs=24))) == 4  # what only long training reaches is not claimed of short
    assert table(made_up()).rows[0][:4] == ("3", "~140", "141.30 ± 0.40", "141.20 ± 0.10")


@pytest.mark.parametrize(
    ("gain", "value", "name"),
    [
        ("3 -> 10", 14.9, "10 latents are far better than 3"),
        ("10 -> 20", 1.9, "20 are better than 10"),
        ("20 -> 200", -4.1, "200 are neither much better nor much worse than 20"),
        ("20 -> 200", 4.1, "200 are neither much better nor much worse than 20"),
    ],
)
def test_a_gap_that_is_missing_is_told(gain, value, name):
    results = made_up()
    for found in results["gains"][gain]:
        found["mean"] = value
    assert [claim for claim, holds in verdicts(results).items() if not holds] == [name]


def test_an_ablation_is_held_to_the_reproduction_too():
    results = made_up()
    run = results["runs"]["20"][0]
    ablated = {"step 0.01": run, "step 0.01, decoder from 1/2": {**run, "elbo": run["elbo"] + 1.7}}
    results["ablations"] = {"size": 20, "runs": ablated}
    (name,) = [name for name, holds in verdicts(results).items() if not holds]
    assert name == "-ELBO of 20 latents, step 0.01, decoder from 1/2"
    assert [row[0] for row in table(results).rows[5:]] == ["20, step 0.01", "20, step 0.01, decoder from 1/2"]


def test_overfitting_is_told():
    results = made_up()
    for run in results["runs"]["200"]:
        run["train_elbo"] += 1.2
    assert of_size(results, 200, "gap") == pytest.approx([2.7 - 0.1 * seed for seed in range(3)])
    (name,) = [name for name, holds in verdicts(results).items() if not holds]
    assert name.startswith("superfluous latents do not overfit")


def test_a_wrong_order_and_a_wrong_number_are_told():
    results = made_up()
    results["runs"]["20"][1]["elbo"] = results["runs"]["10"][1]["elbo"] - 0.01
    failed = [name for name, holds in verdicts(results).items() if not holds]
    assert failed == ["every larger latent space is better, in every seed", "-ELBO of 20 latents"]


def test_what_is_gained_is_told_seed_by_seed():
    results = made_up()
    for found, mean, error in zip(results["gains"]["3 -> 10"], (33, 34, 35), (0.1, 0.3, 0.2), strict=True):
        found.update(mean=mean, se=error)
    words = "+34.00 ± 1.00 nats (sd over seeds: +33.00, +34.00, +35.00; each ± 0.30, s.e. over paired images)"
    assert claims(results)[0].measured == words
    assert table(results).title.endswith("mean ± sd over 3 seeds")
    del results["gains"]["3 -> 10"][1:]
    assert claims(results)[0].measured == "+33.00 ± 0.10 nats (s.e., paired images); one seed"


@pytest.mark.slow
def test_a_seed_that_was_measured_is_kept_when_another_is_added(tiny, tmp_path, monkeypatch):
    trained = []

    def trained_now(context, runs):
        for name, overrides in runs.items():
            trained.append(name)
            config = tiny(*overrides[1:], "trainer.max_epochs=1", "trainer.log_every_n_steps=2")
            train(config, context.folder / name, [], resume=True, progress_bar=False)
        return {name: context.folder / name for name in runs}

    monkeypatch.setattr(Context, "train_many", trained_now)
    one = {"sizes": [3, 10], "seeds": [0]}
    first = measure(Context(quick=False, folder=tmp_path, settings=one, stamp={"settings": one}))
    assert trained == ["nz=10,seed=0", "nz=3,seed=0"]
    for name in trained:
        shutil.rmtree(tmp_path / name)
    changes = {"no bias": ["model.output_bias_from_data=false"]}
    more = {**one, "seeds": [0, 1], "ablations": {"size": 10, "seed": 0, "changes": changes}}
    both = measure(Context(quick=False, folder=tmp_path, settings=more, stamp={"settings": more}))
    assert trained[2:] == ["nz=10,seed=1", "nz=10,output_bias_from_data=false,seed=0", "nz=3,seed=1"]
    assert both["runs"]["10"][0] == first["runs"]["10"][0] != both["runs"]["10"][1]
    for number, found in enumerate(both["gains"]["3 -> 10"]):
        small, large = (both["runs"][size][number]["elbo"] for size in ("3", "10"))
        assert found["mean"] == pytest.approx(large - small, rel=1e-6)
    assert both["ablations"]["runs"]["no bias"]["elbo"] not in {run["elbo"] for run in both["runs"]["10"]}


def test_the_grid_is_even_in_the_logarithm():
    grid = list(log_grid(10, 1000, 3))
    assert grid == pytest.approx([10, 100, 1000])


def test_the_configs_are_the_protocol():
    with initialize_config_dir(CONFIGS, version_base="1.3"):
        full, quick = (compose("train", [f"experiment=aevb_latent_size{form}"]) for form in ("", "_quick"))
    assert full.optimizer._target_ == "torch.optim.Adagrad"
    assert quick.optimizer._target_ == "torch.optim.Adam"
    assert (full.network.init, full.trainer.max_epochs) == ("normal", 300)
    for config in (full, quick):
        assert (list(config.network.hidden), config.network.activation) == ([500], "tanh")
        assert (config.data.binarize, config.data.batch_size) == ("static", 100)
        assert config.optimizer.weight_decay == pytest.approx(1 / 55_000, rel=1e-4)


def test_a_run_is_measured_as_the_library_measures_it(tiny, tmp_path):
    config = tiny("optimizer=adagrad", "trainer.max_epochs=2", "trainer.log_every_n_steps=2", "data.binarize=static")
    train(config, tmp_path, [], progress_bar=False)
    found, expected = measure_run(tmp_path), evaluate(tmp_path)
    assert found["elbo"].item() == pytest.approx(expected["test/elbo"], rel=1e-6)
    assert found["train_elbo"].item() == pytest.approx(evaluate(tmp_path, "train")["train/elbo"], rel=1e-6)
    seen = curve(tmp_path, 32)
    assert seen["images"] == [64, 128]
    assert len(seen["validation"]) == len(seen["train"]) == 2
