"""vae.engine.folder: what earlier versions stored is read as what it means today."""

from __future__ import annotations

import hydra.utils
import pytest

from vae.engine.folder import read_config
from vae.engine.stored import MOVED
from vae.likelihoods import DiscretizedLogisticMixture
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


def test_options_and_likelihoods_that_were_renamed_are_found_in_an_older_folder(tmp_path):
    (tmp_path / "config.yaml").write_text(
        "data: {_target_: vae.data.module.ImageDataModule, labelled: 20, batch_size: 8}\n"
        "objective: {_target_: vae.objectives.labels.M2, labelled_per_batch: 7}\n"
        "likelihood: {_target_: vae.likelihoods.DiscretisedLogisticMixture, components: 2}\n"
        "mine: {_target_: mine.Data, labelled: 3}\n"
    )
    config = read_config(tmp_path)
    assert config.data == {"_target_": "vae.data.module.ImageDataModule", "labeled": 20, "batch_size": 8}
    assert hydra.utils.instantiate(config.objective).labeled_per_batch == 7
    likelihood = hydra.utils.instantiate(config.likelihood)
    assert isinstance(likelihood, DiscretizedLogisticMixture) and likelihood.components == 2
    assert config.mine.labelled == 3


@pytest.mark.parametrize("old", MOVED)
def test_no_module_is_left_where_a_moved_one_was(old):
    with pytest.raises(Exception, match=r"No module named|has no attribute"):
        hydra.utils.get_class(old + "Anything")
