"""vae.engine.folder: what earlier versions stored is read as what it means today."""

from __future__ import annotations

import hydra.utils
import pytest

from vae.engine.folder import MOVED, read_config

STORED = """
callbacks:
  interruptible: {_target_: vae.checkpoints.Interruptible, every_n_steps: 7}
  pictures: {_target_: vae.callbacks.pictures.Pictures, points: 5}
  stopwatch: {_target_: vae.callbacks.records.Stopwatch}
data:
  source: {_target_: vae.data.sources.digits}
"""


def test_every_moved_class_of_a_stored_config_is_found_where_it_is_today(tmp_path):
    (tmp_path / "config.yaml").write_text(STORED)
    config = read_config(tmp_path)
    assert hydra.utils.instantiate(config.callbacks.interruptible).every_n_steps == 7
    assert hydra.utils.instantiate(config.callbacks.pictures).points == 5
    assert config.callbacks.stopwatch._target_ == "vae.engine.callbacks.records.Stopwatch"
    assert config.data.source._target_ == "vae.data.sources.digits"


@pytest.mark.parametrize("old", MOVED)
def test_no_module_is_left_where_a_moved_one_was(old):
    with pytest.raises(Exception, match=r"Error locating target|ModuleNotFoundError|No module named"):
        hydra.utils.get_class(old + "Anything")
