"""One line of progress for a whole run."""

from __future__ import annotations

import math
from typing import Any

import pytorch_lightning as pl
from tqdm.auto import tqdm


class Progress(pl.Callback):
    """A bar over all training steps, with the last training loss and validation ELBO in nats.

    Moves every `log_every_n_steps`, when the loss is read from the device anyway.
    """

    def on_train_start(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        batches = trainer.estimated_stepping_batches * trainer.accumulate_grad_batches
        self.bar = tqdm(
            total=None if batches == math.inf else int(batches),
            initial=module.steps,
            unit="step",
            dynamic_ncols=True,
            smoothing=0.05,
        )

    def _show(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        shown = {"epoch": math.ceil(module.steps / trainer.num_training_batches)}
        for label, name in (("loss", "train/loss"), ("val elbo", "val/elbo")):
            if name in trainer.callback_metrics:
                shown[label] = f"{float(trainer.callback_metrics[name]):.2f}"
        self.bar.set_postfix(shown, refresh=False)
        self.bar.update(module.steps - self.bar.n)

    def on_train_batch_end(self, trainer: pl.Trainer, module: pl.LightningModule, *_: Any) -> None:
        if module.steps % trainer.log_every_n_steps == 0:
            self._show(trainer, module)

    def on_train_end(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        self._show(trainer, module)
        self.bar.close()
