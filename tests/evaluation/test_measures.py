"""Every measure of every kind of model on every split: the right number, or one sentence."""

from __future__ import annotations

import functools
import json
import math
import re
import shutil

import pytest
import torch

from vae.engine import run
from vae.engine.build import build
from vae.engine.measuring import measure
from vae.engine.module import VAEModule
from vae.errors import VAEError, typed
from vae.evaluation import ais, measures, samples
from vae.evaluation.likelihood import by_label, log_likelihood
from vae.evaluation.measures import MEASURES, check_options
from vae.evaluation.work import Work

TWO_LAYERS = ["prior=two_layer", "posterior=two_layer", "prior.top_dim=2", "posterior.top_dim=2"]
SPATIAL = [
    "network=autoencoder_kl",
    "network.block_out_channels=[4,4]",
    "network.norm_num_groups=2",
    "model.latent_dim=16",
]
KINDS = {
    "plain": [],
    "dynamic": ["data.binarize=dynamic"],
    "cvae": ["objective=cvae"],
    "m2": ["objective=m2", "+data.labeled=20"],
    "mixture": ["prior=mixture"],
    "vampprior": ["prior=vampprior", "prior.pseudo_inputs=4"],
    "realnvp": ["prior=realnvp"],
    "iaf": ["posterior=iaf"],
    "planar": ["posterior=planar"],
    "two_layer": TWO_LAYERS,
    "made": ["network=made"],
    "spatial": SPATIAL,
    "gaussian": ["likelihood=gaussian_optimal"],
    "continuous_bernoulli": ["likelihood=continuous_bernoulli"],
    "discretized_logistic_mixture": ["likelihood=discretized_logistic_mixture"],
    "cvae, iaf, realnvp": ["objective=cvae", "posterior=iaf", "prior=realnvp"],
    "cvae, made, two_layer": ["objective=cvae", "network=made", *TWO_LAYERS],
    "m2, planar, mixture": ["objective=m2", "+data.labeled=20", "posterior=planar", "prior=mixture"],
    "m2, made": ["objective=m2", "+data.labeled=20", "network=made", "data.binarize=dynamic"],
}
NO_GAUSSIAN = re.compile("iaf|planar|two_layer")  # q(z|x) is no diagonal Gaussian
EVERYDAY = [("plain", "test"), ("cvae", "test"), ("m2", "test"), ("m2", "train"), ("iaf", "test"), ("made", "test")]
EVERYDAY += [("two_layer", "test"), ("dynamic", "train"), ("vampprior", "test")]
SPLITS = [(kind, "test") for kind in KINDS] + [(kind, "train") for kind in ("dynamic", "cvae", "m2", "m2, made")]
SPLITS = [pytest.param(*case, marks=() if case in EVERYDAY else pytest.mark.slow) for case in SPLITS]
SMALL = {name: {"images": 4, "temperatures": 4, "chains": 4} for name in ("ais", "gaps")}


@pytest.mark.parametrize(("name", "split"), SPLITS)
def test_every_measure_of_every_kind_of_model_is_right_or_refused_in_a_sentence(
    name, split, tiny, monkeypatch, tmp_path_factory
):
    monkeypatch.setenv("VAE_CACHE_DIR", str(tmp_path_factory.getbasetemp() / "classifiers of measures"))
    monkeypatch.setattr(measures, "LOCAL_STEPS", 3)
    monkeypatch.setattr(ais, "tuning_temperatures", lambda temperatures: 4)
    monkeypatch.setattr(samples, "trained_classifier", functools.partial(samples.trained_classifier, steps=100))
    config = tiny(*KINDS[name])
    data, module = build(config)
    module.eval()
    vae, given = module.vae, "_given_label" * name.startswith("m2")

    def measured(measure, **options):
        work = Work(measure)
        values = MEASURES[measure](vae, data, split, work, **options)
        assert work.done == work.total or measure == "samples"  # whose classifier may be kept from before
        return values

    found = {}
    for part in run.likelihood_of(config, data, module, split):
        found |= part
    assert all(map(math.isfinite, found.values()))
    names = ["elbo", "rate", "distortion", "bits_per_dim", "nll_iw5"]
    assert {f"{split}/{name}{end}" for name in names for end in {"", given}} <= found.keys()
    elbo, likelihood = found[f"{split}/elbo"], -found[f"{split}/nll_iw5"]
    assert likelihood > elbo - 0.5  # L_5 is the tighter bound, from other draws

    batch = data.examples(split, 4)
    with torch.no_grad():
        exact = by_label(lambda batch: log_likelihood(vae, batch, 2000), vae, batch)
        bounds = by_label(
            lambda batch: vae.log_weights(batch.x, torch.Generator().manual_seed(0), 1000, batch.y).mean(0), vae, batch
        )
    annealed = measured("ais", **SMALL["ais"])
    for end, log_p in exact.items():
        assert -0.3 < annealed[f"nll_ais4{end}"] + log_p.mean() < 2.5  # a lower bound, of few temperatures
    assert f"bdmc_gap_ais4{given}" in annealed

    of_gaps = measured("gaps", **SMALL["gaps"])
    assert -2.5 < of_gaps[f"log_likelihood{given}"] - exact[given].mean() < 0.3
    assert of_gaps[f"elbo_amortised{given}"] == pytest.approx(bounds[given].mean().item(), abs=0.3)

    quality = measured("samples", images=20)
    assert quality["frechet_distance_n20"] > 0
    assert quality["classifier_accuracy"] > 0.5

    if NO_GAUSSIAN.search(name):
        with pytest.raises(VAEError, match="needs a diagonal Gaussian"):
            measured("decomposition", images=20)
    else:
        parts = measured("decomposition", images=20)
        total = parts[f"index_code_mi_n20{given}"] + parts[f"marginal_kl_n20{given}"]
        assert total == pytest.approx(parts[f"rate_sampled{given}"], abs=1e-4)
        assert bool(given) == all(key.endswith("_given_label") for key in parts)
    with pytest.raises(VAEError, match="generative factors are known: data=sprites or data=dsprites"):
        measured("disentanglement")


def test_samples_of_a_conditional_model_have_the_labels_they_are_compared_with_and_of_m2_any(tiny, monkeypatch):
    seen = {}
    monkeypatch.setattr(measures, "sample_quality", lambda *_, y, **__: seen.update(y=y) or {})
    for options in (["objective=cvae"], ["objective=m2", "+data.labeled=20"], []):
        data, module = build(tiny(*options))
        measures.samples(module.vae, data, "test", Work("samples"), images=30)
        labels = data.examples("test", 30).y
        if not options:
            assert seen["y"] is None
        else:
            assert torch.equal(seen["y"], labels) == (options[0] == "objective=cvae")
            assert set(seen["y"].tolist()) <= set(range(10))
            assert len(seen["y"].unique()) > 5


@pytest.mark.parametrize("kind", ["diagonal", "iaf"])
def test_disentanglement_needs_factors_and_a_diagonal_gaussian(tiny, kind):
    grid = ["data=sprites", "data.source.size=32", "data.source.subset={orientation: 2, x: 4, y: 4}"]
    data, module = build(tiny(*grid, f"posterior={kind}"))

    def measured(*chosen):
        return measures.disentanglement(module.vae, data, "test", Work("scores"), images=1000, metrics=list(chosen))

    if kind == "iaf":
        with pytest.raises(VAEError, match="posterior=diagonal"):
            measured("mig")
    else:
        scores = measured("mig", "sap")
        assert 0 <= scores["mig/means_20bins"] < scores["mig/means_20bins/ceiling"]
        with pytest.raises(VAEError, match=r"metrics=\['gim'\] is unknown: choose from beta_vae"):
            measured("mig", "gim")


# --- the command's part -------------------------------------------------------------------------------------------------

OPTIONS = {"measures": ["likelihood"], "ais": SMALL["ais"], "decomposition": {"images": 50}, "disentanglement": {}}


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    from hydra import compose, initialize_config_dir

    from vae.cli import CONFIGS

    path = tmp_path_factory.mktemp("measured")
    small = ["data.limit=64", "data.batch_size=32", "trainer.max_epochs=1", "evaluation.nll_samples=5", "threads=1"]
    small += ["trainer.accelerator=cpu", "callbacks=minimal", "network.hidden=[16]", "model.latent_dim=3"]
    with initialize_config_dir(CONFIGS, version_base="1.3"):
        config = compose("train", [*small, "objective=m2", "+data.labeled=20"])
    run.train(config, path, [], progress_bar=False)
    return path


@pytest.fixture
def folder(trained, tmp_path):
    """A copy of its own for each test, since measuring adds to what a folder holds."""
    return shutil.copytree(trained, tmp_path / "run")


def kept(folder, split="test"):
    return json.loads((folder / f"evaluation-{split}.json").read_text())


def test_each_measure_is_kept_as_soon_as_it_is_there_and_an_interruption_says_where(folder, monkeypatch):
    @functools.wraps(MEASURES["ais"])
    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setitem(MEASURES, "ais", functools.wraps(MEASURES["ais"])(interrupted))
    with pytest.raises(
        VAEError, match=r"Interrupted while measuring ais: what was measured before is in .*evaluation-test"
    ):
        measure(folder, "test", {**OPTIONS, "measures": ["decomposition", "ais", "likelihood"]})
    assert kept(folder).keys() == {key for key in kept(folder) if key.startswith("test/decomposition/")} != set()

    monkeypatch.setattr(VAEModule, "mean_nll", interrupted)  # in the middle of the likelihood: the ELBO is known
    with pytest.raises(VAEError, match="Interrupted while measuring likelihood"):
        measure(folder, "val", OPTIONS)
    assert kept(folder, "val")["val/elbo"] == pytest.approx(
        json.loads((folder / "metrics.json").read_text())["val/elbo"]
    )
    assert not [key for key in kept(folder, "val") if "nll" in key]


def test_a_measure_that_makes_no_sense_costs_none_of_the_others(folder):
    with pytest.raises(VAEError, match=r"^measures=disentanglement needs .* What else was asked for is in .*json\.$"):
        measure(folder, "train", {**OPTIONS, "measures": ["disentanglement", "decomposition"]})
    assert [key for key in kept(folder, "train") if key.startswith("train/decomposition/")]


def test_all_that_training_wrote_of_a_model_with_labels_is_measured_again_to_the_last_digit(folder):
    written = json.loads((folder / "metrics.json").read_text())
    again = measure(folder, "test", {**OPTIONS, "measures": "likelihood"})
    assert again == {name: value for name, value in written.items() if name.startswith("test/")}
    assert "test/nll_iw5_given_label" in again


@pytest.mark.parametrize(
    ("name", "options", "sentence"),
    [
        ("ais", {"chains": 10**9}, "ais.chains=1000000000 must be a whole number from 1 to 20,000"),
        ("gaps", {"temperatures": 10**9}, "gaps.temperatures=1000000000 must be .* to 1,000,000"),
        ("samples", {"images": 0}, "samples.images=0 must be"),
        ("decomposition", {"images": -5}, "decomposition.images=-5 must be"),
        ("disentanglement", {"images": 2.5}, "disentanglement.images=2.5 must be"),
        ("ais", {"images": True}, "ais.images=true must be"),
        ("gaps", {"images": None}, "gaps.images=null must be"),
        ("ais", {"walkers": 3}, "ais.walkers is unknown"),
    ],
)
def test_a_number_that_makes_no_sense_or_could_not_end_is_refused(name, options, sentence):
    with pytest.raises(VAEError, match=sentence):
        check_options(name, options)


@pytest.mark.parametrize("samples", [10**9, -5, 2.5, "many", True])
def test_so_are_samples_of_the_bound_before_anything_is_built_on_them(tiny, folder, samples):
    with pytest.raises(VAEError, match=f"nll_samples={typed(samples)} must be a whole number from 0.* to 10,000,000"):
        build(tiny(f"evaluation.nll_samples={samples}"))
    with pytest.raises(VAEError, match=f"^nll_samples={typed(samples)} must be"):  # as `vae.evaluate` calls it
        measure(folder, "test", OPTIONS, nll_samples=samples)


def test_an_unknown_split_or_measure_is_refused_whatever_is_measured(folder):
    with pytest.raises(VAEError, match="split=tests is unknown"):
        measure(folder, "tests", {**OPTIONS, "measures": ["decomposition"]})
    with pytest.raises(VAEError, match=r"measures=\['aic'\] is unknown: choose from likelihood, decomposition"):
        measure(folder, "test", {"measures": "aic"})
    for nothing in ([], None):
        with pytest.raises(VAEError, match="names nothing to measure: choose from likelihood, decomposition"):
            measure(folder, "test", {"measures": nothing})
    with pytest.raises(VAEError, match=r"^accelerator=tpu is unknown"):
        measure(folder, "test", OPTIONS, accelerator="tpu")


def test_so_they_are_where_a_module_is_built_in_python(tiny):
    module = build(tiny())[1]
    for number in (10_000_001, -1, 2.5, True):
        with pytest.raises(VAEError, match=f"^nll_samples={typed(number)} must be a whole number from 0 to 10,000,000"):
            VAEModule(module.vae, module.objective, module.make_optimizer, nll_samples=number)
    assert VAEModule(module.vae, module.objective, module.make_optimizer, nll_samples=10_000_000).nll_samples == 10**7
