"""`python -m vae.evaluate run=FOLDER`: measure a finished run again, from its best checkpoint."""

from __future__ import annotations

import hydra
from omegaconf import DictConfig

from vae.cli import CONFIGS, sentences


@hydra.main(version_base="1.3", config_path=CONFIGS, config_name="evaluate")
def main(config: DictConfig) -> None:
    from pathlib import Path

    from rich.console import Console
    from rich.table import Table

    with sentences():
        from vae.errors import VAEError
        from vae.run import evaluate, read_metrics

        if config.split not in ("train", "val", "test"):
            raise VAEError(f"split={config.split!r} is unknown: choose train, val or test.")
        changes = {name: config[name] for name in ("nll_samples", "accelerator", "threads") if config[name] is not None}
        folder = Path(config.run)
        results = evaluate(folder, config.split, **changes)
        written = read_metrics(folder)
    table = Table("metric", "now", "when trained", title=str(folder))
    for name, value in results.items():
        table.add_row(name, f"{value:.6g}", f"{written[name]:.6g}" if name in written else "")
    Console().print(table)


if __name__ == "__main__":
    main()
