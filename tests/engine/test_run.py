"""A run from config to folder and back: what is written, what repeats, what is refused."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf

from vae.cli import CONFIGS
from vae.engine import run
from vae.engine.build import build
from vae.engine.run import evaluate, train
from vae.engine.trainer import build_trainer
from vae.errors import VAEError


def trained(config, folder, **options):
    train(config, folder, [], progress_bar=False, **options)
    return json.loads((folder / "metrics.json").read_text())


def without_times(metrics):
    return {name: value for name, value in metrics.items() if "seconds" not in name}


def test_same_seed_gives_bit_identical_metrics_and_weights_and_another_seed_does_not(tiny, tmp_path):
    metrics = [
        trained(tiny(f"seed={seed}", "data.binarize=dynamic"), tmp_path / str(i)) for i, seed in enumerate((0, 0, 1))
    ]
    assert without_times(metrics[0]) == without_times(metrics[1])
    assert metrics[0]["test/elbo"] != metrics[2]["test/elbo"]
    weights = [
        torch.load(tmp_path / str(i) / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"] for i in (0, 1)
    ]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


def test_a_run_does_not_depend_on_the_global_generator(tiny, tmp_path):
    torch.manual_seed(1)
    first = trained(tiny(), tmp_path / "a")
    torch.manual_seed(2)
    assert without_times(trained(tiny(), tmp_path / "b")) == without_times(first)


def test_training_takes_numbers_below_the_smallest_normal_one_as_zero(tiny, tmp_path):
    if not torch.set_flush_denormal(True):
        pytest.skip("this processor cannot")
    torch.set_flush_denormal(False)
    below = torch.full((32,), 1e-39)
    assert (2 * below != 0).all()
    try:
        trained(tiny(), tmp_path)
        assert (2 * below == 0).all()
    finally:
        torch.set_flush_denormal(False)


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_evaluating_a_run_again_gives_the_numbers_that_training_wrote(tiny, tmp_path, precision):
    written = trained(tiny("trainer.max_epochs=3", f"trainer.precision={precision}"), tmp_path)
    again = evaluate(tmp_path)
    assert again == {name: value for name, value in written.items() if name.startswith("test/")}
    assert "test/nll_iw7" in evaluate(tmp_path, nll_samples=7)
    assert evaluate(tmp_path, split="val")["val/elbo"] != again["test/elbo"]


def test_metrics_keep_their_definitions(tiny, tmp_path):
    metrics = trained(tiny("objective.beta=4"), tmp_path)
    for split in ("train", "val", "test"):
        assert math.isclose(
            metrics[f"{split}/elbo"], -metrics[f"{split}/distortion"] - metrics[f"{split}/rate"], rel_tol=1e-5
        )
        assert math.isclose(
            metrics[f"{split}/bits_per_dim"], -metrics[f"{split}/elbo"] / 64 / math.log(2), rel_tol=1e-5
        )
    assert math.isclose(metrics["val/loss"], metrics["val/distortion"] + 4 * metrics["val/rate"], rel_tol=1e-5)
    assert -metrics["test/nll_iw5"] > metrics["test/elbo"]


def test_a_run_folder_is_complete(tiny, tmp_path):
    trained(tiny("callbacks=default", "model.latent_dim=2"), tmp_path)
    names = {path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*")}
    expected = {"config.yaml", "overrides.yaml", "environment.json", "status.json", "metrics.json"}
    expected |= {"checkpoints/best.ckpt", "checkpoints/last.ckpt"}
    pictures = ("samples", "reconstructions", "traversals", "latent_grid", "kl_per_dimension", "latent_space")
    expected |= {f"pictures/{picture}.png" for picture in pictures}
    assert expected <= names
    assert any(name.startswith("events.out.tfevents") for name in names)
    assert json.loads((tmp_path / "status.json").read_text())["state"] == "finished"
    environment = json.loads((tmp_path / "environment.json").read_text())
    assert environment["torch"] == torch.__version__
    assert {"python", "device", "command", "git_commit", "date"} <= set(environment)


def test_a_kl_that_is_estimated_for_all_dimensions_together_has_no_bars(tiny, tmp_path):
    trained(tiny("callbacks=default", "prior=mixture", "prior.components=2"), tmp_path)
    names = {path.stem for path in (tmp_path / "pictures").iterdir()}
    assert names == {"samples", "reconstructions", "traversals", "latent_space"}


OPTIONS = [
    f"{group.name}={option.stem}"
    for group in sorted(Path(CONFIGS).iterdir())
    if group.is_dir() and group.name in ("network", "likelihood", "logger", "callbacks")
    for option in sorted(group.glob("*.yaml"))
    if option.stem != "burgess"  # for 64x64 images only: below
] + [f"objective/schedule={schedule}" for schedule in ("constant", "linear", "cosine", "cyclical")]


@pytest.mark.parametrize(
    "option",
    # networks and likelihoods are also built, and their values tested, in files of their own
    [pytest.param(o, marks=pytest.mark.slow if o.startswith(("network", "likelihood")) else ()) for o in OPTIONS],
)
def test_every_option_trains_a_step(option, tiny, tmp_path):
    if option in ("logger=mlflow", "logger=wandb"):
        pytest.importorskip(option.partition("=")[2], exc_type=ImportError)
    also = {"network=autoencoder_kl": ["model.latent_dim=4"]}.get(option, [])  # a channel of 2 x 2 places
    also += [] if "callbacks" in option else ["callbacks.pictures=null"]
    metrics = trained(tiny(option, *also), tmp_path)
    assert math.isfinite(metrics["test/elbo"])
    assert math.isfinite(metrics["test/nll_iw5"])


def test_the_burgess_network_refuses_other_images_in_a_sentence(tiny):
    with pytest.raises(VAEError, match="64x64"):
        build(tiny("network=burgess"))


@pytest.mark.parametrize(
    ("override", "sentence"),
    [
        ("model.latent_dim=0", "from 1 to 100,000"),
        ("model.latent_dim=2.5", "whole number"),
        ("objective.beta=-1", "zero or more"),
        ("data.batch_size=0", "at least 1"),
        ("trainer.max_epochs=0", "at least 1"),
        ("threads=0", "at least 1"),
    ],
)
def test_bad_settings_are_refused_in_a_sentence(override, sentence, tiny, tmp_path):
    with pytest.raises(VAEError, match=sentence):
        train(tiny(override), tmp_path, [], progress_bar=False)


def test_threads_auto_is_one_thread_whatever_the_machine_and_the_run_says_so(tiny, tmp_path, monkeypatch):
    monkeypatch.delenv("SLURM_CPUS_PER_TASK", raising=False)
    torch.set_num_threads(2)
    try:
        train(tiny("threads=auto", "logger=none"), tmp_path, [], progress_bar=False)
        assert torch.get_num_threads() == 1  # and so a run with it takes what one with threads=1 does
        assert json.loads((tmp_path / "environment.json").read_text())["threads"] == 1
    finally:
        torch.set_num_threads(1)


def test_the_closing_line_counts_epochs_from_one():
    said = run.tested_weights({"val/best_loss": 27.06379, "val/best_epoch": 19.0})
    assert said == "validation loss 27.0638 nats of the tested weights, epoch 20"


def test_a_diverged_loss_stops_the_run_and_keeps_the_last_good_checkpoint(tiny, tmp_path):
    # a learning rate that grows a thousandfold each epoch: the first epoch is harmless, a later one explodes
    config = tiny(
        "trainer.max_epochs=9", "likelihood=gaussian_learned", "lr_schedule=exponential", "lr_schedule.gamma=1e6"
    )
    config.callbacks.interruptible.every_n_seconds = 0
    told = r"stopped being finite at step (\d+) \(epoch (\d+), learning rate .*beta 1"
    with pytest.raises(VAEError, match=told) as raised:
        train(config, tmp_path, [], progress_bar=False)
    step, epoch = map(int, re.search(told, str(raised.value)).groups())
    assert epoch == step // 2 + 1 > 1  # of two batches each, the first being epoch 1
    status = json.loads((tmp_path / "status.json").read_text())
    assert status["state"] == "failed"
    assert "stopped being finite" in status["reason"]
    assert not (tmp_path / "metrics.json").exists()
    for name in ("best", "last"):
        weights = torch.load(tmp_path / "checkpoints" / f"{name}.ckpt", weights_only=True)["state_dict"]
        assert all(value.isfinite().all() for value in weights.values())


@pytest.mark.parametrize("content", [None, b"", b"not a checkpoint"])
def test_a_missing_or_damaged_checkpoint_is_told_in_a_sentence(content, tiny, tmp_path):
    trained(tiny(), tmp_path)
    best = tmp_path / "checkpoints" / "best.ckpt"
    best.unlink()
    if content is not None:
        best.write_bytes(content)
    with pytest.raises(VAEError, match=r"best\.ckpt"):
        evaluate(tmp_path)


def test_a_checkpoint_of_another_model_is_told_in_a_sentence(tiny, tmp_path):
    trained(tiny(), tmp_path)
    config = OmegaConf.load(tmp_path / "config.yaml")
    config.model.latent_dim = 5
    OmegaConf.save(config, tmp_path / "config.yaml")
    with pytest.raises(VAEError, match="another model"):
        evaluate(tmp_path)


def test_loading_a_checkpoint_never_runs_code_from_it(tiny, tmp_path):
    trained(tiny(), tmp_path)
    best = tmp_path / "checkpoints" / "best.ckpt"
    content = torch.load(best, weights_only=True)
    content["surprise"] = Surprise(tmp_path / "owned")
    torch.save(content, best)
    with pytest.raises(VAEError, match="more than weights"):
        evaluate(tmp_path)
    assert not (tmp_path / "owned").exists()


class Surprise:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (Path.touch, (self.path,))


def test_a_folder_that_is_no_run_is_told_in_a_sentence(tmp_path):
    with pytest.raises(VAEError, match="not a run folder"):
        evaluate(tmp_path)


# --- resuming ---------------------------------------------------------------------------------------------------------


class Killed(Exception):
    pass


@pytest.mark.parametrize("stop_at", [1, 2, 3, 5, 6, 9])
def test_a_run_stopped_at_any_step_and_resumed_ends_bit_identical(stop_at, tiny, tmp_path, monkeypatch):
    from vae.engine.module import VAEModule

    schedule = [
        "objective/schedule=linear",
        "objective.schedule.steps=7",
        "lr_schedule=cosine",
        "data.binarize=dynamic",
    ]
    config = tiny(*schedule, "trainer.max_epochs=3", "data.batch_size=16", "callbacks.interruptible.every_n_steps=1")
    whole = trained(config, tmp_path / "whole")
    step = VAEModule.training_step

    def stopping(self, batch, index):
        if self.steps == stop_at:
            raise Killed
        return step(self, batch, index)

    monkeypatch.setattr(VAEModule, "training_step", stopping)
    with pytest.raises(Killed):
        train(config, tmp_path / "cut", [], progress_bar=False)
    monkeypatch.setattr(VAEModule, "training_step", step)
    resumed = trained(config, tmp_path / "cut", resume=True)
    assert without_times(resumed) == without_times(whole)
    last = [torch.load(tmp_path / name / "checkpoints" / "last.ckpt", weights_only=True) for name in ("whole", "cut")]
    assert last[0]["steps"] == last[1]["steps"] == 12
    for name, value in last[0]["state_dict"].items():
        assert torch.equal(value, last[1]["state_dict"][name])


def test_a_runs_seconds_are_those_of_all_its_attempts(tiny, tmp_path):
    train(tiny(), tmp_path, [], progress_bar=False)
    last = tmp_path / "checkpoints" / "last.ckpt"
    content = torch.load(last, weights_only=True)
    assert 0 < content["callbacks"]["Interruptible"]["seconds"] < 100
    content["callbacks"]["Interruptible"]["seconds"] = 1000.0
    torch.save(content, last)
    train(tiny("trainer.max_epochs=2"), tmp_path, [], resume=True, progress_bar=False)
    assert 1000 < json.loads((tmp_path / "status.json").read_text())["seconds"] < 1100
    assert 1000 < torch.load(last, weights_only=True)["callbacks"]["Interruptible"]["seconds"] < 1100


def test_a_controller_keeps_the_last_weights_as_best_for_losses_at_other_weights_say_nothing(tiny, tmp_path):
    # a target that is all slack winds the weight up each step, and with it the loss: the first epoch's is the lowest
    geco = {"target": 500, "init": 0.01, "eta": 0.01}
    options = ["objective/schedule=geco", *(f"objective.schedule.{name}={value}" for name, value in geco.items())]
    found = trained(tiny(*options, "trainer.max_epochs=3"), tmp_path)
    assert found["val/best_epoch"] == 2
    assert found["val/best_loss"] == found["val/loss"]
    best, last = (
        torch.load(tmp_path / "checkpoints" / f"{name}.ckpt", weights_only=True)["state_dict"]
        for name in ("best", "last")
    )
    for name, value in best.items():
        assert torch.equal(value, last[name])
    assert len(list((tmp_path / "checkpoints").iterdir())) == 2


def test_early_stopping_on_losses_that_a_controller_reweighs_is_refused_in_a_sentence(tiny, tmp_path):
    options = ["objective/schedule=geco", "objective.schedule.target=20", "callbacks=early_stopping"]
    with pytest.raises(VAEError, match="GECO changes the weight"):
        train(tiny(*options), tmp_path, [], progress_bar=False)
    changed = tiny(*options, "callbacks.early_stopping.monitor=val/distortion")
    assert trained(changed, tmp_path)["val/best_epoch"] == 0


def test_two_processes_do_not_train_the_same_run(tiny, tmp_path):
    from vae.engine.folder import only_process

    with only_process(tmp_path), pytest.raises(VAEError, match="Another process"):
        train(tiny(), tmp_path, [], progress_bar=False)


@pytest.mark.parametrize(
    "override",
    [
        "+callbacks.mine={_target_: pytorch_lightning.callbacks.ModelCheckpoint, filename: ../../best}",
        "+callbacks.mine={_target_: pytorch_lightning.callbacks.ModelCheckpoint, dirpath: /tmp/elsewhere}",
        "logger.tensorboard.version=../..",
    ],
)
def test_a_config_cannot_make_a_run_write_outside_its_folder(tiny, tmp_path, override):
    config = tiny("callbacks=default", override)
    with pytest.raises(VAEError, match="is outside the run's folder"):
        build_trainer(config, tmp_path / "sweep" / "run")
    assert not (tmp_path / "best.ckpt").exists()


@pytest.mark.parametrize("given", [{"model": 3}, {"evaluation": None}, {"network": ...}, {"posterior": ...}])
def test_a_value_in_place_of_a_group_of_settings_is_refused_in_a_sentence(given, tiny, tmp_path):
    config, (name, value) = tiny(), *given.items()
    OmegaConf.set_struct(config, False)
    if value is ...:
        del config[name]
    else:
        config[name] = value
    typed = {3: "3", None: "null", ...: "[]"}[value]
    with pytest.raises(VAEError, match=rf"^{name}={re.escape(typed)} leaves out what is set under {name}: give"):
        train(config, tmp_path / "run", [])
    assert not (tmp_path / "run").exists()
