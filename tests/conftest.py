from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from hydra import compose, initialize_config_dir

from vae.cli import CONFIGS

torch.set_num_threads(1)


@pytest.fixture
def tiny():
    """Compose conf/train.yaml with overrides, cut down so that a whole run takes a fraction of a second."""

    def composed(*overrides: str):
        small = ["data.limit=64", "data.batch_size=32", "trainer.max_epochs=1", "evaluation.nll_samples=5", "threads=1"]
        small += ["trainer.accelerator=cpu", "callbacks=minimal", "network.hidden=[16]", "model.latent_dim=3"]
        if any(override.startswith("network=") for override in overrides):
            small.remove("network.hidden=[16]")
        with initialize_config_dir(CONFIGS, version_base="1.3"):
            return compose("train", [*small, *overrides])

    return composed


@pytest.fixture(scope="session")
def data_dir() -> Path:
    """Where real data sets are; the test is skipped on a machine that has none."""
    folder = os.environ.get("VAE_DATA_DIR")
    if not folder or not (Path(folder) / "MNIST" / "raw").is_dir():
        pytest.skip("needs MNIST under $VAE_DATA_DIR")
    return Path(folder)
