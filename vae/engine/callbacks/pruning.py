"""Ends a run of a search whose validations are hopeless beside those of the trials before it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytorch_lightning as pl
from omegaconf import OmegaConf

from vae.engine.module import is_ending
from vae.engine.search import Pruned
from vae.errors import VAEError


class Pruning(pl.Callback):
    """Tells Optuna a metric of the validation at the end of each epoch that has one, and raises `Pruned` where its pruner
    says that the trial is hopeless; not after a run's last epoch, which costs nothing more.

    study: the search's file; number: of the trial; the study knows the metric and the pruner. A resumed run tells what is
    not told yet, so that it is judged as one that was never stopped.
    """

    def __init__(self, study: Path, number: int) -> None:
        from optuna.samplers import RandomSampler
        from optuna.trial import Trial

        from vae.engine.samplers import make_pruner
        from vae.engine.study_file import load_study

        found = load_study(study, sampler=RandomSampler())  # the parameters are drawn already
        terms = found.user_attrs["terms"]
        found.pruner = make_pruner(terms["pruner"], terms["pruner_options"], terms["epochs"])
        self.metric = terms["pruned_by"]
        self.trial = Trial(found, found.get_trials(deepcopy=False)[number]._trial_id)
        self.told = set(found.get_trials(deepcopy=False)[number].intermediate_values)

    def on_train_epoch_end(self, trainer: pl.Trainer, module: Any) -> None:
        if module.validated != module.steps:  # nothing was validated at the end of this epoch
            return
        if self.metric not in trainer.callback_metrics:
            known = ", ".join(sorted(name for name in trainer.callback_metrics if name.startswith("val/")))
            raise VAEError(f"sweep_metric={self.metric} is not measured by validations: choose one of {known}.")
        epoch, value = trainer.current_epoch + 1, float(trainer.callback_metrics[self.metric])
        if epoch not in self.told:
            self.trial.report(value, epoch)
        if self.trial.should_prune() and not is_ending(trainer) and not trainer.should_stop:
            raise Pruned(f"Pruned after epoch {epoch}, at which {self.metric} was {value:.6g}.")


def pruning(hydra: Any) -> list[pl.Callback]:
    """The callback of a job of a search that has a pruner; none of any other."""
    number = OmegaConf.select(hydra, "sweeper.trial")
    if number is None or hydra.sweeper.pruner is None:
        return []
    from vae.engine.study_file import STUDY

    return [Pruning(Path(hydra.runtime.cwd, hydra.sweep.dir, STUDY), number)]


def pruned_already(hydra: Any, status: dict[str, Any]) -> bool:
    """Whether a job of a search has nothing to do, for its run was pruned before."""
    return OmegaConf.select(hydra, "sweeper.trial") is not None and status.get("state") == "pruned"
