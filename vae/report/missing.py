"""Runs that a sweep's command line asked for and that are not there."""

from __future__ import annotations

import itertools
import math
from pathlib import Path
from typing import Any

from vae.report.runs import Run, read_yaml

MOST_JOBS = 10_000  # of a sweep whose missing runs are named


def missing_runs(folder: Path, runs: list[Run]) -> tuple[tuple[str, ...], ...]:
    """Combinations of Hydra's grid sweep (its multirun.yaml) without a run; () where they cannot be told reliably."""
    expected = _expected(read_yaml(folder / "multirun.yaml"))
    common = set.intersection(*map(set, expected)) if expected else set()
    varied = [tuple(line for line in combination if line not in common) for combination in expected]
    present = [set(run.overrides) for run in runs]
    missing = tuple(lines for lines in varied if not any(set(lines) <= there for there in present))
    # if not one run is recognised, another command line made them
    return missing if len(missing) < len(expected) else ()


def _expected(multirun: Any) -> list[tuple[str, ...]]:
    """The overrides of each job that Hydra's basic sweeper makes of a multirun.yaml."""
    try:
        hydra = multirun["hydra"]
        if not hydra["sweeper"]["_target_"].endswith("BasicSweeper"):
            return []
        lines = [f"{key}={value}" for key, value in (hydra["sweeper"].get("params") or {}).items()]
        lines += hydra["overrides"]["task"]
    except (KeyError, TypeError, AttributeError, RecursionError):
        return []
    from hydra.core.override_parser.overrides_parser import OverridesParser  # slow to import, and seldom needed
    from hydra.core.override_parser.types import RangeSweep
    from hydra.errors import HydraException

    choices: dict[str, list[str]] = {}  # the command line, which comes later, replaces the config
    try:
        for override in OverridesParser.create().parse_overrides([str(line) for line in lines]):
            key = override.get_key_element()
            if override.is_discrete_sweep():
                swept = override.value()
                if isinstance(swept, RangeSweep):  # which Hydra lists whole where it is sorted or shuffled
                    start, stop, step = (float(end or 0) for end in (swept.start, swept.stop, swept.step))
                    if abs(stop - start) > MOST_JOBS * abs(step):
                        return []
                values = list(itertools.islice(override.sweep_string_iterator(), MOST_JOBS + 1))
                if len(values) > MOST_JOBS:
                    return []
                choices[key] = [f"{key}={value}" for value in values]
            elif override.is_sweep_override():
                return []
            else:
                choices[key] = [f"{key}={override.get_value_element_as_str()}"]
    except (HydraException, NotImplementedError, TypeError, ValueError, OverflowError, ArithmeticError):
        return []
    if math.prod(len(values) for values in choices.values()) > MOST_JOBS:
        return []
    return list(itertools.product(*choices.values()))
