from __future__ import annotations

import copy
import functools
import itertools
import os
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir
from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import DictConfig

from vae.cli import CONFIGS

# Known answers are those of a CPU, and a process that has used a GPU cannot be forked, which tests of kills and devices do.
os.environ.setdefault("CUDA_VISIBLE_DEVICES", "")


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> None:
    import torch  # only where tests run: pytest-xdist's own process, which begins before its workers do, needs none

    torch.set_num_threads(1)


@functools.cache
def of_groups(*overrides: str) -> DictConfig:
    """What Hydra composes of conf/train.yaml; it takes a quarter of a second, as long as a small run."""
    with initialize_config_dir(CONFIGS, version_base="1.3"):
        return compose("train", list(overrides))


def composed(*overrides: str) -> DictConfig:
    """The config that Hydra composes with these overrides: groups once a session, values each time."""
    parsed = OverridesParser.create().parse_overrides(list(overrides))
    chosen = [(Path(CONFIGS) / override.key_or_group).is_dir() for override in parsed]
    config = copy.deepcopy(of_groups(*itertools.compress(overrides, chosen)))
    values = [override for override, of_group in zip(parsed, chosen, strict=True) if not of_group]
    ConfigLoaderImpl._apply_overrides_to_config(values, config)
    return config


@pytest.fixture
def tiny():
    """Compose conf/train.yaml with overrides, cut down so that a whole run takes a fraction of a second."""

    def small_config(*overrides: str) -> DictConfig:
        small = ["data.limit=64", "data.batch_size=32", "trainer.max_epochs=1", "evaluation.nll_samples=5", "threads=1"]
        small += ["trainer.accelerator=cpu", "callbacks=minimal", "network.hidden=[16]", "model.latent_dim=3"]
        if any(override.startswith("network=") for override in overrides):
            small.remove("network.hidden=[16]")
        return composed(*small, *overrides)

    return small_config


@pytest.fixture
def quick_classifier(monkeypatch, tmp_path_factory) -> Path:
    """The classifier that images are compared by is trained briefly, and kept in the folder that this is."""
    from vae.evaluation import samples

    folder = tmp_path_factory.getbasetemp() / "classifiers of tests"
    monkeypatch.setenv("VAE_CACHE_DIR", str(folder))
    monkeypatch.setattr(samples, "trained_classifier", functools.partial(samples.trained_classifier, steps=50))
    return folder / "classifiers"


@pytest.fixture(scope="session")
def data_dir() -> Path:
    """Where real data sets are; the test is skipped on a machine that has none."""
    folder = os.environ.get("VAE_DATA_DIR")
    if not folder or not (Path(folder) / "MNIST" / "raw").is_dir():
        pytest.skip("needs MNIST under $VAE_DATA_DIR")
    return Path(folder)
