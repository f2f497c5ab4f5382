"""The lean step against Lightning's own: the same weights to the last bit, the same hooks in the same order."""

import importlib.util
import logging
import sys

import pytest
import pytorch_lightning as pl
import torch
from omegaconf import OmegaConf
from pytorch_lightning.loggers.logger import DummyLogger
from pytorch_lightning.loops.training_epoch_loop import _TrainingEpochLoop

from vae.engine import lean
from vae.engine.build import build
from vae.engine.lean import Compile, LeanLoop
from vae.engine.trainer import build_trainer
from vae.errors import VAEError


class Witness(pl.Callback):
    """Notes each hook it is called in, and logs a number at some steps, as a callback of anyone's may."""

    def __init__(self):
        self.seen = []

    def on_train_batch_end(self, trainer, module, outputs, batch, number):
        self.seen.append(("on_train_batch_end", module._current_fx_name, trainer.global_step, number, outputs["loss"]))
        if number % 2:
            self.log("witness", float(number))


def note(name):
    def hook(self, trainer, module, *args):
        self.seen.append((name, module._current_fx_name, trainer.global_step))

    return hook


for hook_name in {*LeanLoop.HOOKS, "on_validation_start", "on_validation_end"} - {"on_train_batch_end"}:
    setattr(Witness, hook_name, note(hook_name))


class Written(DummyLogger):
    def __init__(self):
        super().__init__()
        self.seen = []

    def log_metrics(self, metrics, step=None):
        self.seen.append((step, metrics))


def trained(config, folder, lean, plain=True, **options):
    for name, value in options.items():
        OmegaConf.update(config, f"trainer.{name}", value, force_add=True)
    data, module = build(config)
    trainer = build_trainer(config, folder)
    assert type(trainer.fit_loop.epoch_loop) is LeanLoop
    if not lean:
        trainer.fit_loop.epoch_loop = _TrainingEpochLoop(trainer, max_steps=trainer.max_steps)
    witness = Witness()
    trainer.callbacks.append(witness)
    trainer.loggers = [Written()]
    trainer.fit(module, data)
    if lean:
        assert trainer.fit_loop.epoch_loop._plain is plain
    return module, trainer, witness


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"gradient_clip_val": 0.5},
        {"precision": "bf16-mixed"},
        {"val_check_interval": 0.5},
        {"val_check_interval": 3, "check_val_every_n_epoch": None},
        {"check_val_every_n_epoch": 2},
        {"max_steps": 7},
        {"limit_train_batches": 4},
    ],
    ids=str,
)
@pytest.mark.parametrize("overrides", [[], ["lr_schedule=exponential", "lr_schedule.gamma=0.5"]], ids=["", "schedule"])
def test_the_lean_step_is_lightnings_step(tiny, tmp_path, options, overrides):
    settings = {"max_epochs": 3, "log_every_n_steps": 2, **options}
    config = tiny("data.batch_size=10", *overrides)
    own, lean = (trained(config.copy(), tmp_path / str(lean), lean, **settings) for lean in (False, True))
    loops = [trainer.fit_loop.epoch_loop.state_dict() for _, trainer, _ in (own, lean)]
    assert loops[0] == loops[1]
    states = [trainer.optimizers[0].state_dict() for _, trainer, _ in (own, lean)]
    assert states[0]["param_groups"] == states[1]["param_groups"]
    for p, state in states[0]["state"].items():
        assert all(torch.equal(value, states[1]["state"][p][name]) for name, value in state.items())
    for name, weight in own[0].state_dict().items():
        assert torch.equal(weight, lean[0].state_dict()[name]), name
    assert own[1].global_step == lean[1].global_step > 0
    assert own[2].seen == lean[2].seen
    assert own[1].callback_metrics == lean[1].callback_metrics
    assert own[1].logger.seen == lean[1].logger.seen
    assert any("witness" in metrics for _, metrics in lean[1].logger.seen)


@pytest.mark.filterwarnings("ignore:ReduceLROnPlateau conditioned")
def test_a_schedule_that_watches_a_metric_at_each_step_steps_as_under_lightning(tiny, tmp_path, monkeypatch):
    def optimizers(self):
        optimizer = torch.optim.Adam(self.vae.parameters(), fused=True)
        plateau = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, factor=0.5, patience=0)
        watched = {"scheduler": plateau, "interval": "step", "monitor": "witness", "strict": False}
        return {"optimizer": optimizer, "lr_scheduler": watched}

    monkeypatch.setattr("vae.engine.module.VAEModule.configure_optimizers", optimizers)
    own, lean = (trained(tiny("data.batch_size=10"), tmp_path / str(lean), lean) for lean in (False, True))
    rates = [trainer.optimizers[0].param_groups[0]["lr"] for _, trainer, _ in (own, lean)]
    assert rates[0] == rates[1] < 1e-3


def test_what_is_not_plain_is_left_to_lightning(tiny, tmp_path):
    own, lean = (
        trained(tiny(), tmp_path / str(lean), lean, plain=False, accumulate_grad_batches=2)[0].state_dict()
        for lean in (False, True)
    )
    assert all(torch.equal(own[name], lean[name]) for name in own)


@pytest.fixture
def warnings_of_lean(caplog):
    """What is said of the loop, from now on; each reason is said once a process."""
    lean._leave_to_lightning.cache_clear()
    caplog.set_level(logging.WARNING, "vae.engine.lean")
    yield lambda: [record.getMessage() for record in caplog.records if "its own loop" in record.getMessage()]
    lean._leave_to_lightning.cache_clear()


def test_the_installed_lightning_is_among_those_that_the_lean_loop_was_tried_with(warnings_of_lean):
    assert type(lean.make_lean(pl.Trainer(logger=False, accelerator="cpu")).fit_loop.epoch_loop) is LeanLoop
    assert warnings_of_lean() == []


def test_a_lightning_that_was_not_tried_trains_by_its_own_loop_with_one_warning(
    tiny, tmp_path, monkeypatch, warnings_of_lean
):
    ours = trained(tiny(), tmp_path / "ours", True)[0].state_dict()
    monkeypatch.setattr(pl, "__version__", "2.9.1")
    for name in ("a", "b"):
        data, module = build(tiny())
        trainer = build_trainer(tiny(), tmp_path / name)
        assert type(trainer.fit_loop.epoch_loop) is _TrainingEpochLoop
    trainer.fit(module, data)
    assert all(torch.equal(value, ours[name]) for name, value in module.state_dict().items())
    (said,) = warnings_of_lean()
    assert said.startswith("Lightning 2.9.1 trains by its own loop")
    assert "tried with 2.5 and 2.6 only" in said


def test_a_lightning_without_the_private_modules_trains_by_its_own_loop(monkeypatch, caplog):
    monkeypatch.setitem(sys.modules, "pytorch_lightning.loops.fetchers", None)
    spec = importlib.util.spec_from_file_location("lean_anew", lean.__file__)
    anew = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(anew)
    with caplog.at_level(logging.WARNING, "lean_anew"):
        trainer = anew.make_lean(pl.Trainer(logger=False, accelerator="cpu"))
    assert type(trainer.fit_loop.epoch_loop) is _TrainingEpochLoop
    assert caplog.text.count("pytorch_lightning.loops.fetchers") == 1


def test_a_lightning_without_a_private_attribute_trains_by_its_own_loop(tiny, tmp_path, monkeypatch, warnings_of_lean):
    ours = trained(tiny(), tmp_path / "ours", True)[0].state_dict()
    monkeypatch.setattr(LeanLoop, "OF_LIGHTNING", (*LeanLoop.OF_LIGHTNING, "trainer._gone_in_the_next_release"))
    left = trained(tiny(), tmp_path / "left", True, plain=False)[0].state_dict()
    assert all(torch.equal(value, ours[name]) for name, value in left.items())
    (said,) = warnings_of_lean()
    assert "'_gone_in_the_next_release'" in said


def test_an_unknown_mode_of_compilation_is_refused():
    with pytest.raises(VAEError, match="compile=fast is unknown: choose false, true or one of default"):
        Compile("fast")


def test_networks_that_cannot_be_compiled_are_trained_as_they_are(tiny, tmp_path, monkeypatch, caplog):
    def broken(self, **options):
        self._compiled_call_impl = lambda *inputs: (_ for _ in ()).throw(RuntimeError("no compiler"))

    config = tiny()
    plain = trained(tiny(), tmp_path / "plain", True)[0].state_dict()
    monkeypatch.setattr(torch.nn.Module, "compile", broken)
    config.compile = True
    with caplog.at_level(logging.WARNING, "vae.engine.lean"):
        compiled = trained(config, tmp_path / "compiled", True)[0].state_dict()
    assert "compile=default is not possible here (RuntimeError: no compiler)" in caplog.text
    assert all(torch.equal(plain[name], compiled[name]) for name in plain)


@pytest.mark.slow
@pytest.mark.parametrize(
    "overrides",
    [[], ["objective=piwae", "objective.groups=2", "objective.samples=3"], ["objective=m2", "+data.labeled=20"]],
    ids=["beta_vae", "piwae", "m2"],
)
def test_compiled_networks_train_to_the_same_weights_up_to_rounding(tiny, tmp_path, overrides):
    config = tiny(*overrides)
    plain = trained(tiny(*overrides), tmp_path / "plain", True)[0].state_dict()
    config.compile = True
    module, *_ = trained(config, tmp_path / "compiled", True)
    assert module.vae.encoder._compiled_call_impl is not None
    for name, weight in plain.items():
        torch.testing.assert_close(module.state_dict()[name], weight, rtol=1e-3, atol=1e-4)


def test_a_gpu_that_is_not_there_is_said_and_the_cpu_used(tiny, tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    config = tiny()
    config.trainer.accelerator = "gpu"
    with caplog.at_level(logging.WARNING, "vae.engine.run"):
        trainer = build_trainer(config, tmp_path)
    assert "there is no GPU here, so the CPU is used" in caplog.text
    assert trainer.strategy.root_device.type == "cpu"


def test_a_controller_observes_every_training_step_once_and_no_validation(tiny, tmp_path):
    data, module = build(tiny("objective/schedule=geco", "objective.schedule.target=25", "trainer.max_epochs=2"))
    seen = []
    observe = module.objective.schedule.observe
    module.objective.schedule.observe = lambda **terms: (seen.append(terms), observe(**terms))
    build_trainer(tiny("trainer.max_epochs=2"), tmp_path).fit(module, data)
    assert len(seen) == module.steps == 4
    assert all(set(terms) == {"rate", "distortion"} for terms in seen)
