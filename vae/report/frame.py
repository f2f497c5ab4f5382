"""A sweep's runs as a pandas DataFrame: `vae.runs(folder)`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from vae.errors import VAEError
from vae.report.sweep import read_sweep

if TYPE_CHECKING:
    import pandas


def runs(folder: str | Path) -> pandas.DataFrame:
    """The runs at or below `folder`, one per row: `path`, `state`, `seed`, what the sweep varies, and every metric.

    Settings are named by their dotted keys (`objective.beta`), metrics as in metrics.json (`test/elbo`, nats per image).
    Raises VAEError for a folder without runs, and where pandas is not installed.
    """
    try:
        import pandas
    except ImportError as error:
        raise VAEError("vae.runs gives a pandas DataFrame: pip install pandas.") from error
    rows = [
        {"path": str(run.folder), "state": run.state, "seed": run.seed, **run.settings, **run.metrics}
        for run in read_sweep(Path(folder)).runs
    ]
    return pandas.DataFrame(rows)
