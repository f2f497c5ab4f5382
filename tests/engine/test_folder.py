"""vae.engine.folder: what earlier versions stored is read as what it means today."""

from __future__ import annotations

import hydra.utils
import pytest

from vae.engine.folder import read_config
from vae.engine.stored import MOVED
from vae.objectives.total_correlation import FactorVAE

STORED = """
callbacks:
  interruptible: {_target_: vae.checkpoints.Interruptible, every_n_steps: 7}
  pictures: {_target_: vae.callbacks.pictures.Pictures, points: 5}
  stopwatch: {_target_: vae.callbacks.records.Stopwatch}
  checkpoint: {_target_: pytorch_lightning.callbacks.ModelCheckpoint, monitor: val/loss, filename: best, verbose: false}
  every_ten: {_target_: pytorch_lightning.callbacks.ModelCheckpoint, filename: ten, every_n_epochs: 10}
logger: {_target_: pytorch_lightning.loggers.CSVLogger, _partial_: true, name: "", version: ""}
data:
  source: {_target_: vae.data.sources.digits, _partial_: true}
objective: {_target_: vae.objectives.total_correlation.FactorVAE, _partial_: true, hidden: [4]}
"""


def test_every_moved_class_of_a_stored_config_is_found_where_it_is_today(tmp_path):
    (tmp_path / "config.yaml").write_text(STORED)
    config = read_config(tmp_path)
    assert hydra.utils.instantiate(config.callbacks.interruptible).every_n_steps == 7
    assert hydra.utils.instantiate(config.callbacks.pictures).points == 5
    assert config.callbacks.stopwatch._target_ == "vae.engine.callbacks.records.Stopwatch"
    assert isinstance(hydra.utils.instantiate(config.objective), FactorVAE)
    assert config.data.source._target_ == "vae.data.sources.digits"


def test_what_kept_the_best_weights_and_the_rows_is_what_keeps_them_today(tmp_path, tiny):
    (tmp_path / "config.yaml").write_text(STORED)
    stored, now = read_config(tmp_path), tiny("logger=csv")
    assert stored.callbacks.checkpoint == now.callbacks.checkpoint
    assert stored.logger == now.logger.csv
    assert stored.callbacks.every_ten._target_ == "pytorch_lightning.callbacks.ModelCheckpoint"


@pytest.mark.parametrize("old", MOVED)
def test_no_module_is_left_where_a_moved_one_was(old):
    with pytest.raises(Exception, match="No module named"):
        hydra.utils.get_class(old + "Anything")
