"""The fixtures' own claims."""

from __future__ import annotations

import pytest
from conftest import composed
from hydra import compose, initialize_config_dir
from hydra.errors import ConfigCompositionException

from vae.cli import CONFIGS


@pytest.mark.parametrize(
    "overrides",
    [
        [],
        ["objective=tcvae", "objective/schedule=geco", "objective.schedule.target=20", "data.limit=7"],
        ["data=sprites", "++data.source.size=16", "++data.source.subset={scale: 2, x: [1, 2]}", "+data.labeled=20"],
        [
            "callbacks=default",
            "callbacks.pictures=null",
            "~callbacks.stopwatch",
            "network.hidden=[16,8]",
            "logger=none",
        ],
        ["experiment=rate_control", "trainer.max_epochs=3", "model.latent_dim=2"],
    ],
)
@pytest.mark.slow
def test_a_config_composed_in_two_steps_is_hydras(overrides):
    with initialize_config_dir(CONFIGS, version_base="1.3"):
        whole = compose("train", overrides)
    assert composed(*overrides) == whole
    changed = composed(*overrides)
    changed.seed = 99
    assert composed(*overrides).seed == 0


def test_an_option_that_does_not_exist_is_refused_as_by_hydra():
    with pytest.raises(ConfigCompositionException, match=r"Could not override 'objective\.bta'"):
        composed("objective.bta=4")
