"""Settings by their dotted keys: which say what a run is, and in which order they stand."""

from __future__ import annotations

import re
from typing import Any

from vae.report.runs import Run

# Where and how a run was made and measured, not what it is.
OPERATIONAL_ROOTS = {"hydra", "logger", "run", "resume", "threads", "progress_bar", "sweep_metric", "sweep_direction"}
_MEASURING = re.compile(r"evaluation\.|data\.eval_batch_size$")
_OPERATIONAL_LEAF = re.compile(r"(^|_)(dir|dirpath|path|root|folder|file|filename|num_workers)$")
LATENT_SIZE = "latent_dim"


def preference(key: str) -> tuple[Any, ...]:
    """Data set first, then latent size; beta last, so that a table in this order reads curve by curve. A group, whose name
    has no dot, before what it brings."""
    late = [
        not (key == "data" or key.startswith("data.source")),
        leaf(key) != LATENT_SIZE,
        "beta" in key.split("."),
    ]
    return late, "." in key, leaf(key) not in ("_target_", "name"), key.count("."), key


def is_seed(key: str) -> bool:
    return leaf(key) == "seed"


def how_measured(key: str) -> bool:
    return bool(_MEASURING.match(key))


def is_operational(key: str, runs: list[Run]) -> bool:
    if key.split(".")[0] in OPERATIONAL_ROOTS or how_measured(key) or _OPERATIONAL_LEAF.search(leaf(key)):
        return True
    # a path into the run's own folder, under whatever name
    return any(f"/{run.name}/" in f"{run.config.get(key)}/" for run in runs)


def leaf(key: str) -> str:
    return key.rsplit(".", 1)[-1]
