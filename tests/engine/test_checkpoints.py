"""What a checkpoint holds: tensors and plain values, whatever the config named."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf

from vae.cli import CONFIGS
from vae.engine.build import instantiate
from vae.engine.folder import read_metrics
from vae.engine.run import train

PLAIN = (torch.Tensor, int, float, str, bool, type(None))
OPTIONS = [
    f"{group}={path.stem}"
    for group in ("optimizer", "lr_schedule")
    for path in sorted((Path(CONFIGS) / group).glob("*.yaml"))
]


def foreign(value, path="checkpoint"):
    """The paths below `value` of everything that is neither a tensor nor a plain value nor a dict, list or tuple of such."""
    if isinstance(value, dict):
        of_keys = [f"{path} has the key {key!r}" for key in value if type(key) not in PLAIN]
        return of_keys + [found for key, item in value.items() for found in foreign(item, f"{path}[{key!r}]")]
    if type(value) in (list, tuple):
        return [found for index, item in enumerate(value) for found in foreign(item, f"{path}[{index}]")]
    return [] if type(value) in (*PLAIN, torch.nn.Parameter) else [f"{path} is a {type(value).__name__}"]


def test_what_is_foreign_to_a_checkpoint_is_seen_wherever_it_lies():
    listed = OmegaConf.create([0.9, 0.999])
    state = {"optimizer_states": [{"param_groups": [{"betas": listed, "lr": 1e-3}]}], "kept": (Path(), torch.ones(1))}
    assert foreign(state) == [
        "checkpoint['optimizer_states'][0]['param_groups'][0]['betas'] is a ListConfig",
        f"checkpoint['kept'][0] is a {type(Path()).__name__}",
    ]


@pytest.mark.parametrize("option", OPTIONS)
@pytest.mark.slow
def test_every_optimiser_and_schedule_trains_and_its_checkpoints_hold_tensors_and_plain_values(option, tiny, tmp_path):
    train(tiny(option, "logger=none", "evaluation.nll_samples=0"), tmp_path, [], progress_bar=False)
    assert math.isfinite(read_metrics(tmp_path)["test/elbo"])
    for name in ("best", "last"):
        content = torch.load(tmp_path / "checkpoints" / f"{name}.ckpt", weights_only=False)
        assert content["optimizer_states"][0]["param_groups"]
        assert foreign(content) == []


@pytest.mark.parametrize("option", [option for option in OPTIONS if "schedule" not in option] + ["lr_schedule=burda"])
def test_an_optimiser_is_made_with_plain_lists(option, tiny):
    """Older torch keeps the very list of betas that an optimiser is made with, and what is kept is in each checkpoint."""
    group = option.partition("=")[0]
    assert foreign(instantiate(tiny(option)[group]).keywords) == []
