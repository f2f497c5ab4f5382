"""What runs tell the sweeper that started them."""

from __future__ import annotations

import math

import pytest
from omegaconf import OmegaConf

from vae.engine.search import sweep_directions, sweep_value
from vae.engine.sweep import tell_direction
from vae.errors import VAEError

MEASURED = {"val/elbo": -20.0, "val/loss": 30.0, "test/nll_iw500": 19.0, "val/active_units": 3.0}


def asked(metric, direction=None, **hydra):
    config = {"sweep_metric": metric, "sweep_direction": direction}
    return OmegaConf.create({**config, "hydra": {"overrides": {"hydra": []}, "sweeper": {}, **hydra}})


@pytest.mark.parametrize(
    ("metric", "direction", "directions", "value", "worst"),
    [
        ("val/elbo", None, ["maximize"], -20, -math.inf),
        ("val/loss", None, ["minimize"], 30, math.inf),
        ("test/nll_iw500", None, ["minimize"], 19, math.inf),
        ("val/active_units", "maximize", ["maximize"], 3, -math.inf),
        ("val/elbo", "minimize", ["minimize"], -20, math.inf),
        (["val/elbo", "val/loss"], None, ["maximize", "minimize"], (-20, 30), (-math.inf, math.inf)),
        (["val/elbo", "val/loss"], "minimize", ["minimize", "minimize"], (-20, 30), (math.inf, math.inf)),
        (
            ["val/active_units", "val/elbo"],
            ["minimize", None],
            ["minimize", "maximize"],
            (3, -20),
            (math.inf, -math.inf),
        ),
    ],
)
def test_a_run_returns_what_was_asked_for_and_one_that_failed_the_worst_never_nan(
    metric, direction, directions, value, worst
):
    config = asked(metric, direction)
    assert sweep_directions(config) == directions
    assert sweep_value(config, MEASURED) == value
    assert sweep_value(config, None) == worst


@pytest.mark.parametrize(
    ("metric", "direction"),
    [
        ("val/active_units", None),
        ("val/elbo", "up"),
        (["val/elbo", "val/loss"], ["maximize"] * 3),
        (["val/elbo", "val/active_units"], ["maximize"]),
    ],
)
def test_a_direction_that_is_not_told_is_asked_for(metric, direction):
    with pytest.raises(VAEError, match="whether to maximize or to minimize"):
        sweep_directions(asked(metric, direction))


def test_a_metric_that_was_not_measured_is_told_with_those_that_were():
    with pytest.raises(VAEError, match=r"sweep_metric=val/eblo was not measured: choose from .*val/elbo"):
        sweep_value(asked("val/eblo", "maximize"), MEASURED)


def test_a_sweeper_with_a_direction_is_given_it_and_may_not_say_otherwise(capsys):
    config = asked("val/elbo", sweeper={"direction": "minimize"})
    tell_direction(config)
    assert config.hydra.sweeper.direction == "maximize"
    config = asked(["val/elbo", "val/loss"], sweeper={"direction": "minimize"})
    tell_direction(config)
    assert config.hydra.sweeper.direction == ["maximize", "minimize"]
    config = asked("val/elbo")  # Hydra's own has none
    tell_direction(config)
    assert "direction" not in config.hydra.sweeper
    named = {"overrides": {"hydra": ["hydra.sweeper.direction=minimize"]}, "sweeper": {"direction": "minimize"}}
    tell_direction(asked("val/loss", **named))
    with pytest.raises(SystemExit):
        tell_direction(asked("val/elbo", **named))
    assert "hydra.sweeper.direction=minimize, but sweep_metric=val/elbo is to maximize" in capsys.readouterr().err
