"""What a command may change when it goes on with a run, and what it must never touch."""

from __future__ import annotations

import json
import logging
import shutil

import numpy as np
import pytest
import torch
from hydra import initialize_config_dir
from omegaconf import OmegaConf

from vae.cli import CONFIGS
from vae.engine.folder import OtherTraining, differences, read_config, refuse_other_training, resumed_config
from vae.engine.run import train
from vae.errors import VAEError


def trained(config, folder, overrides=(), **options):
    metrics = train(config, folder, list(overrides), progress_bar=False, **options)
    assert metrics == json.loads((folder / "metrics.json").read_text())
    return {name: value for name, value in metrics.items() if "seconds" not in name}


def contents(folder):
    """Every file of a run and what it holds, locks and logs aside."""
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file() and path.name != ".lock"}


def cut(config, folder, at, monkeypatch):
    """A run killed before training step `at`, with a last.ckpt of each step."""
    from vae.engine.module import VAEModule

    class Killed(Exception):
        pass

    step = VAEModule.training_step

    def stopping(self, batch, index):
        if self.steps == at:
            raise Killed
        return step(self, batch, index)

    with monkeypatch.context() as patched:
        patched.setattr(VAEModule, "training_step", stopping)
        with pytest.raises(Killed):
            train(config, folder, [], progress_bar=False)


FREE = [
    "threads=2",
    "evaluation.nll_samples=7",
    "trainer.log_every_n_steps=3",
    "trainer.accelerator=auto",
    "trainer.devices=[0]",
    "data.eval_batch_size=50",
    "+data.num_workers=1",
    "logger=none",
    "callbacks=default",
    "callbacks.interruptible.every_n_steps=5",
    "sweep_metric=val/loss",
    "+data.source.root=elsewhere",
    "progress_bar=false",
]
TRAINING = ["optimizer.lr=0.5", "data.batch_size=16", "seed=1", "trainer.precision=bf16-mixed", "data.limit=65"]
TRAINING += ["trainer.gradient_clip_val=1", "callbacks=early_stopping", "prior=mixture", "lr_schedule=exponential"]


@pytest.mark.parametrize("override", FREE)
def test_a_setting_that_does_not_change_what_is_trained_is_taken_over(override, tiny, tmp_path):
    assert not refuse_other_training(tmp_path, tiny(), changes(tiny(), tiny(override)))


@pytest.mark.parametrize("override", TRAINING)
def test_a_setting_that_changes_what_is_trained_is_refused_by_name(override, tiny, tmp_path):
    name = override.partition("=")[0].replace("callbacks", "callbacks.early_stopping.monitor")
    with pytest.raises(OtherTraining, match=rf"{name}.* there and .* now.*resume=restart"):
        refuse_other_training(tmp_path, tiny(), changes(tiny(), tiny(override)))


def changes(stored, settled):
    return differences(*(OmegaConf.to_container(config, resolve=True) for config in (stored, settled)))


@pytest.mark.parametrize(
    ("before", "now", "longer"),
    [
        ((5, -1), (5, -1), False),
        ((5, -1), (8, -1), True),
        ((5, -1), (-1, -1), True),
        ((5, 10), (None, 20), True),
        ((5, 10), (5, -1), True),
        ((8, -1), (5, -1), None),
        ((5, -1), (5, 10), None),
        ((5, 10), (8, 9), None),
        ((-1, 10), (8, 20), None),
    ],
)
def test_a_run_goes_on_for_longer_and_never_for_shorter(before, now, longer, tmp_path):
    stored, settled = ({"trainer": {"max_epochs": epochs, "max_steps": steps}} for epochs, steps in (before, now))
    if longer is None:
        with pytest.raises(OtherTraining, match=r"trainer\.max_"):
            refuse_other_training(tmp_path, stored, differences(stored, settled))
    else:
        assert refuse_other_training(tmp_path, stored, differences(stored, settled)) is longer


def test_a_finished_run_is_left_as_it_is_byte_for_byte(tiny, tmp_path, caplog):
    first = trained(tiny(), tmp_path)
    before = contents(tmp_path)
    assert trained(tiny(), tmp_path, resume=True) == first
    assert not caplog.records
    with caplog.at_level(logging.WARNING):
        assert trained(tiny("evaluation.nll_samples=7"), tmp_path, resume=True) == first
    assert f"python -m vae.evaluate run={tmp_path}" in caplog.text
    with pytest.raises(VAEError, match=r"objective\.beta is 1\.0 there and 3 now"):
        train(tiny("objective.beta=3"), tmp_path, [], resume=True, progress_bar=False)
    with pytest.raises(VAEError, match=r"trainer\.max_epochs is 1 there and 0 now"):
        train(tiny("trainer.max_epochs=0"), tmp_path, [], resume=True, progress_bar=False)
    assert contents(tmp_path) == before


@pytest.mark.parametrize("length", ["trainer.max_epochs=2", "trainer.max_steps=4"])
def test_a_finished_run_goes_on_for_longer_as_if_it_had_been_asked_for_at_once(length, tiny, tmp_path):
    epochs = "trainer.max_epochs=1" if "epochs" in length else "trainer.max_epochs=-1"
    short = tiny(epochs, *(["trainer.max_steps=2"] if "steps" in length else []))
    trained(short, tmp_path / "two")
    longer = tiny(epochs, length)
    assert trained(longer, tmp_path / "two", resume=True) == trained(longer, tmp_path / "one")
    last = (torch.load(tmp_path / n / "checkpoints" / "last.ckpt", weights_only=True) for n in ("one", "two"))
    assert [content["steps"] for content in last] == [4, 4]


def test_restart_starts_anew_with_other_settings(tiny, tmp_path):
    trained(tiny(), tmp_path / "run")
    (tmp_path / "run" / "hpc_ckpt_1.ckpt").touch()
    again = trained(tiny("objective.beta=3"), tmp_path / "run", resume="restart")
    assert again == trained(tiny("objective.beta=3"), tmp_path / "other")
    assert not (tmp_path / "run" / "hpc_ckpt_1.ckpt").exists()


def test_a_run_that_trained_nothing_starts_with_whatever_settings_come(tiny, tmp_path):
    with pytest.raises(VAEError, match="64x64"):
        train(tiny("network=burgess"), tmp_path / "run", [], progress_bar=False)
    assert trained(tiny(), tmp_path / "run", resume=True) == trained(tiny(), tmp_path / "other")


def test_settings_taken_over_in_the_middle_of_a_run_leave_its_weights_alone(tiny, tmp_path, monkeypatch):
    whole = tiny("callbacks.interruptible.every_n_steps=1", "data.batch_size=16")
    trained(whole, tmp_path / "whole")
    cut(whole, tmp_path / "cut", 2, monkeypatch)
    other = ["evaluation.nll_samples=9", "trainer.log_every_n_steps=1", "data.eval_batch_size=7", "logger=none"]
    metrics = trained(tiny("data.batch_size=16", *other), tmp_path / "cut", resume=True)
    assert "test/nll_iw9" in metrics
    assert read_config(tmp_path / "cut").evaluation.nll_samples == 9
    one, two = (torch.load(tmp_path / n / "checkpoints" / "best.ckpt", weights_only=True) for n in ("whole", "cut"))
    assert one["steps"] == two["steps"] == 4
    for name, value in one["state_dict"].items():
        assert torch.equal(value, two["state_dict"][name])


def test_a_codebook_goes_on_bit_identical_after_a_kill(tiny, tmp_path, monkeypatch):
    options = ["posterior=vq", "posterior.dim=1", "posterior.codes=5", "posterior.restart=0.5", "logger=none"]
    config = tiny(*options, "callbacks.interruptible.every_n_steps=1", "trainer.max_epochs=2")
    whole = trained(config, tmp_path / "whole")
    cut(config, tmp_path / "cut", 3, monkeypatch)
    assert trained(config, tmp_path / "cut", resume=True) == whole
    one, two = (torch.load(tmp_path / n / "checkpoints" / "last.ckpt", weights_only=True) for n in ("whole", "cut"))
    assert "vae.posterior.codebook" in one["state_dict"]
    for name, value in one["state_dict"].items():
        assert torch.equal(value, two["state_dict"][name]), name


def test_a_run_cut_off_before_its_first_last_checkpoint_begins_again_under_its_own_settings_only(
    tiny, tmp_path, monkeypatch
):
    config = tiny("trainer.max_epochs=2")
    cut(config, tmp_path / "run", 3, monkeypatch)
    (tmp_path / "run" / "checkpoints" / "last.ckpt").unlink(missing_ok=True)
    assert (tmp_path / "run" / "checkpoints" / "best.ckpt").is_file()
    with pytest.raises(OtherTraining, match="seed is 0 there and 1 now"):
        train(tiny("trainer.max_epochs=2", "seed=1"), tmp_path / "run", [], resume=True, progress_bar=False)
    assert trained(config, tmp_path / "run", resume=True) == trained(config, tmp_path / "whole")
    (tmp_path / "run" / "checkpoints" / "last.ckpt").unlink()
    with pytest.raises(VAEError, match=r"last\.ckpt is gone"):
        train(tiny("trainer.max_epochs=3"), tmp_path / "run", [], resume=True, progress_bar=False)


def test_checkpoints_without_their_config_are_not_touched(tiny, tmp_path):
    trained(tiny(), tmp_path)
    (tmp_path / "config.yaml").unlink()
    with pytest.raises(VAEError, match=r"has no config\.yaml"):
        train(tiny(), tmp_path, [], resume=True, progress_bar=False)
    assert (tmp_path / "checkpoints" / "best.ckpt").is_file()


def test_where_the_data_lie_does_not_make_a_run_another_but_a_folder_of_ones_own_images_does(tmp_path):
    for target, same in (("vae.data.sources.mnist", True), ("mine.photographs", False)):
        here, there = ({"data": {"source": {"_target_": target, "root": root}}} for root in ("a", "b"))
        assert (differences(here, there) == {}) is same


# --- command lines ----------------------------------------------------------------------------------------------------


def test_resuming_takes_the_stored_config_and_plain_values_as_hydra_reads_them(tiny, tmp_path):
    train(tiny("objective.beta=2"), tmp_path, ["objective.beta=2", "trainer.max_epochs=1"], progress_bar=False)
    more = [f"run={tmp_path}", "resume=true", "trainer.max_epochs=4", "progress_bar=false", "optimizer.lr=1e-2"]
    config, overrides = resumed_config(tmp_path, more)
    assert (config.objective.beta, config.trainer.max_epochs, config.progress_bar) == (2, 4, False)
    assert config.optimizer.lr == 0.01
    # by which its sweep's report knows the run
    assert overrides == ["objective.beta=2", "trainer.max_epochs=4", "optimizer.lr=1e-2"]


def test_the_same_command_line_may_be_repeated_groups_and_additions_included(tmp_path):
    line = ["data=digits", "callbacks=minimal", "objective=free_bits", "+data.labeled=10", "network.hidden=[16]"]
    line += ["trainer.max_epochs=1", "data.limit=64", "threads=1", f"run={tmp_path / 'run'}", "resume=true"]
    line[3] = "++data.labeled=null"
    with initialize_config_dir(CONFIGS, version_base="1.3"):
        from hydra import compose

        first = trained(compose("train", line), tmp_path / "run", line, resume=True)
        config, overrides = resumed_config(tmp_path / "run", line)
        assert overrides == line[:-2]
        assert trained(config, tmp_path / "run", overrides, resume=True) == first
        config, _ = resumed_config(tmp_path / "run", ["logger=csv", "objective=free_bits"])
        assert trained(config, tmp_path / "run", resume=True) == first
        assert config.model == read_config(tmp_path / "run").model
        config, _ = resumed_config(tmp_path / "run", ["objective=beta_vae"])
        with pytest.raises(OtherTraining, match=r"objective\._target_ is .*FreeBits there and .*BetaVAE now"):
            train(config, tmp_path / "run", [], resume=True, progress_bar=False)


def test_a_group_that_cannot_be_composed_again_is_told_in_a_sentence(tiny, tmp_path):
    trained(tiny(), tmp_path, ["data=of_my_own"])
    with (
        initialize_config_dir(CONFIGS, version_base="1.3"),
        pytest.raises(VAEError, match=r"data=of_my_own is unknown: .* Give the same --config-dir again"),
    ):
        resumed_config(tmp_path, ["trainer=cpu"])


# --- learning rates ---------------------------------------------------------------------------------------------------


@pytest.fixture
def rates(monkeypatch):
    """The learning rate of each training step."""
    from vae.engine.module import VAEModule

    found = []
    step = VAEModule.training_step

    def noting(self, batch, index):
        found.append(self.trainer.optimizers[0].param_groups[0]["lr"])
        return step(self, batch, index)

    monkeypatch.setattr(VAEModule, "training_step", noting)
    return found


COSINE = ["lr_schedule=cosine", "data.batch_size=64"]
HALF = [1.0, 0.8535533905932737, 0.5, 0.1464466094067262]  # (1 + cos(pi t / 4)) / 2


def test_a_cosine_ends_with_the_run_whether_epochs_or_steps_end_it(tiny, tmp_path, rates):
    small = ["optimizer.lr=1e-9"]
    for length in (["trainer.max_epochs=4"], ["trainer.max_epochs=-1", "trainer.max_steps=4"]):
        rates.clear()
        trained(tiny(*COSINE, *small, *length), tmp_path / length[-1])
        assert [rate * 1e9 for rate in rates] == pytest.approx(HALF)
    rates.clear()  # 2 batches an epoch; the fourth epoch is begun
    two = ["data.batch_size=32", "trainer.max_epochs=-1", "trainer.max_steps=7"]
    trained(tiny(*COSINE, *small, *two), tmp_path / "two")
    assert [rate * 1e9 for rate in rates] == pytest.approx([rate for rate in HALF for _ in range(2)][:7])
    with pytest.raises(VAEError, match=r"lr_schedule=cosine needs to know where it ends"):
        train(tiny(*COSINE, "trainer.max_epochs=-1"), tmp_path / "endless", [], progress_bar=False)


def test_a_longer_run_follows_the_cosine_of_its_new_length_and_says_so(tiny, tmp_path, rates, caplog):
    trained(tiny(*COSINE, "optimizer.lr=1e-9", "trainer.max_epochs=2"), tmp_path)
    rates.clear()
    with caplog.at_level(logging.WARNING):
        trained(tiny(*COSINE, "optimizer.lr=1e-9", "trainer.max_epochs=4"), tmp_path, resume=True)
    assert [rate * 1e9 for rate in rates] == pytest.approx(HALF[2:])
    assert "after 2 epochs, and now after 4: it goes on at 5e-10 instead of 0" in caplog.text


def test_a_cosine_planned_for_longer_goes_on_bit_identical_and_stays_at_zero_after_it(tiny, tmp_path, rates):
    planned = [*COSINE, "optimizer.lr=1e-3", "lr_schedule.epochs=3"]
    trained(tiny(*planned, "trainer.max_epochs=2"), tmp_path / "two")
    longer = trained(tiny(*planned, "trainer.max_epochs=6"), tmp_path / "two", resume=True)
    assert rates == pytest.approx([1e-3, 7.5e-4, 2.5e-4, 0, 0, 0], abs=1e-12)
    assert longer == trained(tiny(*planned, "trainer.max_epochs=6"), tmp_path / "one")


def test_a_cosine_that_an_earlier_version_stored_is_of_the_runs_length(tmp_path):
    old = "lr_schedule: {_target_: torch.optim.lr_scheduler.CosineAnnealingLR, _partial_: true, T_max: %d}\n"
    for stored, epochs in ((4, None), (9, 9)):
        (tmp_path / "config.yaml").write_text("trainer: {max_epochs: 4}\n" + old % stored)
        assert read_config(tmp_path).lr_schedule == {
            "_target_": "vae.engine.lr_schedule.Cosine",
            "_partial_": True,
            "epochs": epochs,
        }


# --- where a run runs -------------------------------------------------------------------------------------------------


@pytest.fixture
def slurm(monkeypatch):
    """The environment of a Slurm job, as Lightning looks for it."""
    for name, value in {
        "NTASKS": "1",
        "JOB_ID": "7",
        "JOB_NAME": "vae",
        "PROCID": "0",
        "LOCALID": "0",
        "NODEID": "0",
    }.items():
        monkeypatch.setenv(f"SLURM_{name}", value)


def test_lightning_saves_and_requeues_nothing_of_its_own_under_slurm(slurm, tiny, tmp_path, monkeypatch):
    import signal

    from vae.engine.module import VAEModule

    step, found = VAEModule.training_step, []

    def noting(self, batch, index):
        found.append(signal.getsignal(signal.SIGUSR1))  # on which Lightning's own would save and requeue
        return step(self, batch, index)

    monkeypatch.setattr(VAEModule, "training_step", noting)
    before = signal.signal(signal.SIGUSR1, signal.SIG_DFL)
    try:
        trained(tiny(), tmp_path)
    finally:
        signal.signal(signal.SIGUSR1, before)
    assert found == [signal.SIG_DFL] * 2


def test_a_run_never_starts_from_what_lightning_left_in_its_folder(slurm, tiny, tmp_path):
    trained(tiny("optimizer.lr=0.1"), tmp_path / "other")
    (tmp_path / "run").mkdir()
    shutil.copy(tmp_path / "other" / "checkpoints" / "last.ckpt", tmp_path / "run" / "hpc_ckpt_1.ckpt")
    for resume in (False, True):
        with pytest.raises(VAEError, match=r"hpc_ckpt_1\.ckpt was left by Lightning"):
            train(tiny(), tmp_path / "run", [], resume=resume, progress_bar=False)
    assert (tmp_path / "run" / "hpc_ckpt_1.ckpt").is_file()


@pytest.mark.parametrize(
    "options", [["objective=cvae"], ["prior=vampprior", "prior.pseudo_inputs=5"], ["objective=m2", "data.labeled=10"]]
)
def test_a_model_loads_and_samples_where_its_data_are_not(options, tiny, tmp_path, monkeypatch):
    import vae
    from vae.engine.run import evaluate

    trained(tiny(*options), tmp_path)

    def drawn():
        run = vae.load(tmp_path)
        return run, run.sample(6, y=range(6) if run.vae.num_classes else None)

    here = drawn()[1]

    def absent():
        raise VAEError("There are no digits here.")

    monkeypatch.setattr("vae.data.sources.digits", absent)
    run, there = drawn()
    assert torch.equal(here, there)
    for use in (lambda: run.data, lambda: evaluate(tmp_path)):
        with pytest.raises(VAEError, match="There are no digits here"):
            use()


def test_a_data_set_is_looked_for_where_the_machine_says_unless_the_run_was_told_a_folder_that_exists(
    tmp_path, monkeypatch
):
    stored = "data: {source: {_target_: vae.data.sources.mnist, root: %s}}\n"
    for root in (tmp_path, "/nowhere"):
        (tmp_path / "config.yaml").write_text(stored % root)
        monkeypatch.delenv("VAE_DATA_DIR", raising=False)
        assert read_config(tmp_path).data.source.root == str(root)
        monkeypatch.setenv("VAE_DATA_DIR", "/here")
        assert read_config(tmp_path).data.source.root == "/here"
    (tmp_path / "overrides.yaml").write_text("- data.source.root=anything\n")
    assert read_config(tmp_path).data.source.root == "/here"
    (tmp_path / "config.yaml").write_text(stored % tmp_path)
    assert read_config(tmp_path).data.source.root == str(tmp_path)
    (tmp_path / "config.yaml").write_text("data: {source: {_target_: mine.images, root: /nowhere}}\n")
    assert read_config(tmp_path).data.source.root == "/nowhere"


def test_images_of_ones_own_may_be_moved_and_other_images_in_another_place_are_another_run(tiny, tmp_path):
    from vae.engine.run import evaluate

    def held(path, seed):
        path.parent.mkdir(exist_ok=True)
        np.save(path, np.random.default_rng(seed).integers(0, 256, (100, 8, 8), dtype=np.uint8))
        return ["data=arrays", f"data.source.path={path}"]

    before, after, other = (held(tmp_path / name / "x.npy", seed) for name, seed in (("a", 0), ("b", 0), ("c", 1)))
    run = tmp_path / "run"
    first = trained(tiny(*before), run, before)
    shutil.rmtree(tmp_path / "a")
    everything = contents(run)
    with pytest.raises(OtherTraining, match=r"data\.source\.path is .*/a/x\.npy there and .*/c/x\.npy now"):
        train(tiny(*other), run, other, resume=True, progress_bar=False)
    assert contents(run) == everything
    assert trained(tiny(*after), run, after, resume=True) == first
    assert read_config(run).data.source.path == str(tmp_path / "b" / "x.npy")  # where later commands find them
    assert evaluate(run)["test/elbo"] == first["test/elbo"]
    held(tmp_path / "a" / "x.npy", 0)  # and back again, for longer
    longer = trained(tiny(*before, "trainer.max_epochs=2"), run, before, resume=True)
    assert longer == trained(tiny(*after, "trainer.max_epochs=2"), tmp_path / "one", after)


def test_an_absent_setting_is_null_or_the_default_of_an_option_that_was_added():
    absent, null = {"seed": 0}, {"compile": None, "seed": 0}
    assert differences(null, absent) == differences(absent, null) == {}
    assert differences(absent, {"compile": True, "seed": 0}) == {"compile": (None, True)}
    assert differences(absent, {"compile": False, "seed": 0}) == {}
    assert differences({"threads": 2}, {}) == {"threads": (2, None)}
    adam = {"_target_": "torch.optim.Adam", "lr": 0.1}
    for old, options, changed in (
        (adam, {"betas": [0.9, 0.999], "eps": 1e-8}, []),
        (adam, {"betas": [0.9, 0.99]}, ["optimizer.betas"]),
        (adam, {"speed": 1}, ["optimizer.speed"]),
        (adam, {"_target_": "torch.optim.AdamW", "eps": 1e-8}, ["optimizer._target_", "optimizer.eps"]),
        ({**adam, "betas": None}, {"betas": [0.9, 0.999]}, ["optimizer.betas"]),
        (None, adam, ["optimizer._target_", "optimizer.lr"]),
    ):
        assert [*differences({"optimizer": old}, {"optimizer": {**(old or {}), **options}})] == changed
