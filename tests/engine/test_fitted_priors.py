"""A prior fitted after training: kept beside the checkpoint, measured and sampled, refused where it is not the run's."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image

import vae
from vae.engine import fitted_priors
from vae.engine.fitted_priors import aggregate, fit_prior, read_prior
from vae.engine.folder import read_json
from vae.engine.measuring import measure
from vae.engine.run import train
from vae.errors import VAEError
from vae.evaluation.likelihood import log_likelihood

DESCENT = {"epochs": 2, "batch_size": 16}
OPTIONS = {
    "gaussian": {},
    "mixture": {"components": 2},
    "realnvp": {"layers": 2, "hidden": [8], **DESCENT},
    "maf": {"layers": 2, "hidden": [8], **DESCENT},
    "vampprior": {"pseudo_inputs": 5, **DESCENT, "lr": 0.1},
    "flow_matching": {"width": 8, "steps": 3, **DESCENT},
}


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A finished run of tiny digits, with a prior of each kind."""
    from conftest import composed

    small = ["data.limit=64", "data.batch_size=32", "trainer.max_epochs=1", "evaluation.nll_samples=5", "threads=1"]
    small += [
        "trainer.accelerator=cpu",
        "callbacks=minimal",
        "logger=none",
        "network.hidden=[16]",
        "model.latent_dim=3",
    ]
    folder = tmp_path_factory.mktemp("fitted") / "run"
    train(composed(*small), folder, small, progress_bar=False)
    run = vae.load(folder)
    for kind, options in OPTIONS.items():
        fit_prior(run.vae, run.data, folder, kind, options=options)
    return folder


@pytest.fixture
def copied(finished, tmp_path):
    """The same in a folder that may be spoilt."""
    return shutil.copytree(finished, tmp_path / "run")


@pytest.mark.parametrize("kind", OPTIONS)
def test_a_kept_prior_is_the_one_that_was_fitted(finished, kind):
    run = vae.load(finished)
    fitted = run.with_prior(kind)
    found = json.loads((finished / "priors" / kind / "config.json").read_text())
    for split in ("train", "val"):
        z = aggregate(run.vae, run.data, split, 0).z
        assert fitted.vae.prior.log_prob(z).mean().item() == pytest.approx(found["log_prob"][split], abs=1e-5)
    assert found["images"] == len(run.data.measured("train"))
    assert found["log_prob"]["val_of_own_prior"] == pytest.approx(run.vae.prior.log_prob(z).mean().item(), abs=1e-5)
    assert sorted(path.name for path in (finished / "priors" / kind).iterdir()) == [
        "config.json",
        "samples.png",
        "weights.pt",
    ]
    assert not torch.equal(fitted.sample(1), run.sample(1))


def test_a_prior_that_is_worse_on_new_images_than_that_of_training_is_told(copied, caplog):
    run = vae.load(copied)
    fit_prior(run.vae, run.data, copied, "gaussian", name="few")
    assert not caplog.records
    found = fit_prior(run.vae, run.data, copied, "mixture", name="many", options={"components": 30})["log_prob"]
    assert found["val"] < found["val_of_own_prior"] - 1 and found["train"] > found["val"] + 1
    (record,) = caplog.records
    shown = f"is {found['val']:.2f} nats, {found['val_of_own_prior']:.2f} under the prior of training, and {found['train']:.2f}"
    assert record.getMessage().startswith("The prior many is worse on new images") and shown in record.getMessage()
    assert record.getMessage().endswith("knows by heart. Fit prior=gaussian, or fewer prior.components.")


@pytest.mark.parametrize(("below", "told"), [(0.9, False), (1.1, True)])
def test_worse_by_three_standard_errors_is_told(below, told, caplog):
    noise = torch.tensor([-1.0, 1.0]).repeat(50).double()  # of mean 0 and standard error 0.1
    own = torch.linspace(-30, -20, 100).double()
    fitted_priors._warn_if_worse("maf", "some", own, own + noise - 3 * 0.1 * below, own)
    assert [record.getMessage().rpartition(" which it ")[2] for record in caplog.records] == ["knows by heart."] * told


def test_the_gaussian_has_the_exact_moments_of_the_training_split(finished):
    run = vae.load(finished)
    x, _ = run.data.measured("train").gather(torch.arange(len(run.data.measured("train"))))
    q = run.encode(x)
    mean, centred = q.mean.mean(0), q.mean - q.mean.mean(0)
    covariance = centred.T @ centred / len(x) + torch.diag(q.log_var.exp().mean(0))
    prior = run.with_prior("gaussian").vae.prior
    torch.testing.assert_close(prior.mean[0], mean, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(prior.scale[0] @ prior.scale[0].T, covariance, rtol=1e-4, atol=1e-5)


def test_evaluation_under_it_has_keys_of_its_own_and_leaves_the_others(copied):
    own = measure(copied, "test", {"measures": ["likelihood"]})
    images = (copied / "per_image-test.npz").read_bytes()
    found = measure(copied, "test", {"measures": "likelihood", "fitted_prior": "gaussian"})
    keys = {"elbo", "rate", "distortion", "bits_per_dim", "nll_iw5"}
    assert set(found) == {f"test/priors/gaussian/{key}" for key in keys}
    assert read_json(copied / "evaluation-test.json") == {**own, **found}
    assert (copied / "per_image-test.npz").read_bytes() == images
    assert found["test/priors/gaussian/distortion"] == pytest.approx(own["test/distortion"], abs=1e-4)
    assert found["test/priors/gaussian/rate"] < own["test/rate"]  # of a run of one epoch, far from its optimum
    run = vae.load(copied).with_prior("gaussian")
    bounds = [log_likelihood(run.vae, batch, 5) for batch in run.data.batches("test")]
    assert found["test/priors/gaussian/nll_iw5"] == pytest.approx(-torch.cat(bounds).mean().item(), abs=1e-4)


def test_the_marginal_kl_is_measured_under_it_and_moves_as_the_rate(copied):
    options = {"measures": "decomposition"}
    own = measure(copied, "val", options)
    found = measure(copied, "val", {**options, "fitted_prior": "gaussian"})
    n = next(key.rsplit("_n", 1)[1] for key in own if "marginal_kl" in key)

    def moved(name):
        return found[f"val/priors/gaussian/decomposition/{name}"] - own[f"val/decomposition/{name}"]

    assert moved(f"index_code_mi_n{n}") == pytest.approx(0, abs=1e-5)
    assert moved(f"marginal_kl_n{n}") == pytest.approx(moved("rate_sampled"), abs=1e-4) and moved("rate_sampled") < 0


def test_samples_come_from_it(finished):
    run = vae.load(finished)
    fitted = run.with_prior("mixture")
    z = fitted.vae.prior.sample(4, vae.generator(7, "samples"))
    torch.testing.assert_close(fitted.sample(4, seed=7), run.decode(z))
    assert not torch.equal(fitted.sample(4, seed=7), run.sample(4, seed=7))
    assert torch.equal(run.sample(4, seed=7), vae.load(finished).sample(4, seed=7))


def test_the_command_fits_the_same(copied, tmp_path):
    from commands import run as command

    done = command("vae.fit_prior", f"run={copied}", "prior=mixture", "name=two", "prior.components=2", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "log p(z) in nats" in done.stdout and str(copied / "priors" / "two") in done.stdout
    two, mixture = (torch.load(copied / "priors" / name / "weights.pt") for name in ("two", "mixture"))
    assert all(torch.equal(two[key], mixture[key]) for key in mixture)


@pytest.mark.slow
def test_the_other_commands_take_it_and_refuse_in_a_sentence(copied, tmp_path):
    from commands import run as command

    shutil.copytree(copied / "priors" / "mixture", copied / "priors" / "two")
    done = command("vae.generate", f"run={copied}", "n=2", "out=images", "fitted_prior=two", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    pixels = np.asarray(Image.open(tmp_path / "images" / "00001.png").convert("L"))
    assert np.array_equal(pixels, (vae.load(copied).with_prior("two").sample(2)[1, 0] * 255).round().numpy())
    done = command("vae.evaluate", f"run={copied}", "fitted_prior=two", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "test/priors/two/nll_iw5" in done.stdout
    for words, sentence in (
        (("vae.fit_prior", "prior=vamp"), "prior=vamp is unknown: did you mean vampprior?"),
        (
            ("vae.fit_prior", "prior=gaussian"),
            "exists already: choose another name=, or fit it anew with resume=restart.",
        ),
        (
            ("vae.evaluate", "fitted_prior=three"),
            "choose one of flow_matching, gaussian, maf, mixture, realnvp, two, vampprior.",
        ),
    ):
        done = command(words[0], f"run={copied}", words[1], cwd=tmp_path)
        assert done.returncode == 1 and sentence in done.stderr and "Traceback" not in done.stderr, done.stderr


def test_restart_fits_anew_and_another_seed_draws_anew(copied):
    run = vae.load(copied)
    before = run.with_prior("mixture").vae.prior.mean.clone()
    first, again, other = (aggregate(run.vae, run.data, "train", seed).z for seed in (0, 0, 1))
    assert torch.equal(first, again) and not torch.equal(first, other)
    fit_prior(run.vae, run.data, copied, "mixture", seed=1, options={"components": 2}, resume="restart")
    assert not torch.equal(run.with_prior("mixture").vae.prior.mean, before)
    fit_prior(run.vae, run.data, copied, "mixture", seed=0, options={"components": 2}, resume="restart")
    assert torch.equal(run.with_prior("mixture").vae.prior.mean, before)


def test_one_that_a_kill_left_half_counts_as_absent(copied, monkeypatch):
    run = vae.load(copied)

    def killed(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("vae.engine.fitted_priors.write_json", killed)
    with pytest.raises(KeyboardInterrupt):
        fit_prior(run.vae, run.data, copied, "gaussian", seed=5, resume="restart")
    with pytest.raises(VAEError, match=r"fitted_prior=gaussian is unknown .* choose one of flow_matching, maf, mix"):
        run.with_prior("gaussian")


def test_a_prior_that_is_not_the_runs_is_refused_in_a_sentence(copied, tmp_path):
    run = vae.load(copied)
    config = copied / "priors" / "gaussian" / "config.json"
    written = config.read_text()
    with torch.no_grad():
        run.vae.encoder.requires_grad_(False)
        next(run.vae.encoder.parameters()).add_(1e-3)
    with pytest.raises(VAEError, match="fitted to other weights"):
        read_prior(copied, "gaussian", run.vae)
    run = vae.load(copied)
    state = copied / "priors" / "gaussian" / "weights.pt"
    kept = state.read_bytes()
    for shape, sentence in (([2], r"latents \(2,\)"), ([3, 1, 1], r"latents \(3, 1, 1\)")):
        config.write_text(json.dumps({**json.loads(written), "latent_shape": shape}))
        with pytest.raises(VAEError, match=rf"is over {sentence}, and those of this run are \(3,\)\."):
            run.with_prior("gaussian")
    config.write_text(written)
    torch.save({"logits": torch.zeros(1), "mean": torch.zeros(1, 2), "scale": torch.eye(2)[None]}, state)
    with pytest.raises(VAEError, match="is damaged and cannot be read"):
        run.with_prior("gaussian")
    state.write_bytes(kept)
    config.write_text(written[: len(written) // 2])
    with pytest.raises(VAEError, match="is damaged and cannot be read"):
        run.with_prior("gaussian")
    config.write_text(written)
    run.with_prior("gaussian")
    for name in ("../gaussian", "", "a/b", ".hidden"):
        with pytest.raises(VAEError, match="The name of a prior is letters"):
            run.with_prior(name)


def test_what_makes_no_sense_is_refused_before_anything_is_written(copied):
    run = vae.load(copied)
    for options, sentence in (
        ({"kind": "vamp"}, "prior=vamp is unknown"),
        (
            {"kind": "gaussian", "name": "new", "options": {"components": 2}},
            "components is unknown to prior=gaussian: choose from covariance",
        ),
        ({"kind": "mixture", "name": "new", "options": {"components": 10**6}}, "needs as many images"),
        ({"kind": "mixture", "name": "new", "seed": -1}, "seed=-1 must be"),
        ({"kind": "gaussian", "name": "new", "resume": True}, "resume=true is unknown: choose one of false, restart"),
        ({"kind": "gaussian", "name": "new", "options": {"covariance": "channels"}}, "are not: choose full"),
        ({"kind": "maf", "name": "new", "options": {"hidden": 64}}, "prior.hidden=64 must be a list of whole numbers"),
        ({"kind": "maf", "name": "new", "options": {"hidden": []}}, "prior.hidden needs at least one width"),
        ({"kind": "realnvp", "name": "new", "options": {"hidden": None}}, "prior.hidden=null must be a list"),
        ({"kind": "realnvp", "name": "new", "options": {"hidden": [8, 0]}}, "prior.hidden=0 must be a whole number"),
        ({"kind": "maf", "name": "new", "options": {"epochs": "two"}}, "prior.epochs=two must be a whole number"),
        ({"kind": "vampprior", "name": "new", "options": {"pseudo_inputs": 0}}, "prior.pseudo_inputs=0 must be"),
        ({"kind": "flow_matching", "name": "new", "options": {"steps": 0}}, "prior.steps=0 must be"),
    ):
        with pytest.raises(VAEError, match=sentence):
            fit_prior(run.vae, run.data, copied, **options)
    run.vae.num_classes = 10
    with pytest.raises(VAEError, match="prior=vampprior needs posterior=diagonal and an objective that gives"):
        fit_prior(run.vae, run.data, copied, "vampprior", "new")
    assert not (copied / "priors" / "new").exists()
    with pytest.raises(VAEError, match="does not go with fitted_prior=gaussian: choose from likelihood, decomposition"):
        measure(copied, "test", {"measures": ["gaps"], "fitted_prior": "gaussian"})
    with pytest.raises(VAEError, match=r"none yet: python -m vae\.fit_prior makes one"):
        shutil.rmtree(copied / "priors")
        run.with_prior("gaussian")


def test_a_discrete_posterior_has_no_second_stage(copied, monkeypatch):
    run = vae.load(copied)
    monkeypatch.setattr(type(run.vae.posterior), "discrete", True)
    with pytest.raises(VAEError, match="posterior of this run is discrete"):
        fit_prior(run.vae, run.data, copied, "gaussian", "new")
    with pytest.raises(VAEError, match="posterior of this run is discrete"):  # not: "fit_prior makes one"
        read_prior(copied, "new", run.vae)
    assert not (copied / "priors" / "new").exists()


def test_an_interrupted_fit_leaves_what_was_there(copied, monkeypatch):
    """Whatever the moment, here in the last epoch: the prior of that name stays, and a new one is not begun."""
    run = vae.load(copied)
    before = run.with_prior("maf").vae.prior.state_dict()
    monkeypatch.setattr("vae.engine.fitted_priors.tqdm", Interrupted)
    for name in ("maf", "new"):
        with pytest.raises(KeyboardInterrupt):
            fit_prior(run.vae, run.data, copied, "maf", name, seed=4, options=OPTIONS["maf"], resume="restart")
    after = run.with_prior("maf").vae.prior.state_dict()
    assert all(torch.equal(after[key], before[key]) for key in before)
    assert sorted(path.name for path in (copied / "priors").iterdir()) == sorted(OPTIONS)


class Interrupted:
    """A progress bar at whose second epoch Ctrl-C is pressed."""

    def __init__(self, **_):
        self.epochs = 0

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass

    def update(self):
        self.epochs += 1
        if self.epochs == 2:
            raise KeyboardInterrupt


KILLED = """
import os, sys, vae.files
from vae.engine import fitted_priors
kill = lambda *_, **__: os.kill(os.getpid(), 9)
moments = {"fit": (fitted_priors.tqdm, "update"), "weights": (os, "replace"), "config": (fitted_priors, "write_json")}
run = vae.load(sys.argv[1])
run.data
setattr(*moments[sys.argv[2]], kill)
fitted_priors.fit_prior(run.vae, run.data, run.path, "maf", "killed", options={"epochs": 2})
"""


@pytest.mark.slow
@pytest.mark.parametrize("moment", ["fit", "weights", "config"])
def test_a_kill_leaves_no_prior_and_the_next_fit_makes_it(copied, moment):
    done = subprocess.run([sys.executable, "-c", KILLED, str(copied), moment], capture_output=True, text=True)
    assert done.returncode == -9, done.stderr
    run = vae.load(copied)
    with pytest.raises(VAEError, match="fitted_prior=killed is unknown"):
        run.with_prior("killed")
    fit_prior(run.vae, run.data, copied, "maf", "killed", options=OPTIONS["maf"])
    assert len(list((copied / "priors" / "killed").iterdir())) == 3
    assert run.with_prior("killed").sample(1).isfinite().all()


def test_latents_that_are_maps_have_gaussians_by_channel_and_a_flow_of_convolutions(tmp_path):
    from conftest import composed

    small = ["data.limit=32", "data.batch_size=16", "trainer.max_epochs=1", "evaluation.nll_samples=2", "threads=1"]
    small += ["callbacks=minimal", "logger=none", "network=autoencoder_kl", "network.block_out_channels=[8,8]"]
    small += ["trainer.accelerator=cpu", "model.latent_dim=32"]
    train(composed(*small), tmp_path / "run", small, progress_bar=False)
    run = vae.load(tmp_path / "run")
    assert run.latent_shape == (2, 4, 4)
    for kind, name, options in (
        ("gaussian", "channels", {"covariance": "channels"}),
        ("flow_matching", "flow", OPTIONS["flow_matching"] | {"epochs": 0, "steps": 1}),
    ):
        fit_prior(run.vae, run.data, run.path, kind, name, options=options)
        assert run.with_prior(name).sample(3).shape == (3, 1, 8, 8)
    channels, flow = (run.with_prior(name).vae.prior for name in ("channels", "flow"))
    assert channels.scale.shape == (1, 2, 2) and flow.scale.shape == (2, 2)
    z = aggregate(run.vae, run.data, "val", 0).z
    torch.testing.assert_close(flow.log_prob(z), channels.log_prob(z), rtol=0, atol=1e-3)  # where it starts
    config = tmp_path / "run" / "priors" / "flow" / "config.json"
    assert json.loads(config.read_text())["latent_shape"] == [2, 4, 4]


def test_a_covariance_that_would_be_too_large_is_refused_with_what_goes_instead(copied, monkeypatch):
    run = vae.load(copied)
    monkeypatch.setattr("vae.engine.fitted_priors.MOST_COVARYING", 2)
    for kind in ("gaussian", "mixture", "realnvp", "maf", "flow_matching"):
        with pytest.raises(
            VAEError, match=rf"The covariance of 3 latents, which prior={kind} .* choose prior=vampprior"
        ):
            fit_prior(run.vae, run.data, copied, kind, "new")
    fit_prior(run.vae, run.data, copied, "vampprior", "new", options=OPTIONS["vampprior"])
