"""`python -m vae.evaluate run=FOLDER`: measure a finished run, from its best checkpoint."""

from __future__ import annotations

import hydra
from omegaconf import DictConfig, OmegaConf

from vae.cli import CONFIGS, enter, sentences


@hydra.main(version_base="1.3", config_path=CONFIGS, config_name="evaluate")
def main(config: DictConfig) -> None:
    """Prints what was measured beside what training wrote, and keeps it in evaluation-SPLIT.json in the run's folder."""
    from rich.console import Console
    from rich.table import Table

    with sentences():
        from vae.engine.folder import read_metrics
        from vae.engine.measuring import measure
        from vae.files import named

        changes = {name: config[name] for name in ("nll_samples", "accelerator", "threads") if config[name] is not None}
        folder = named("run", config.run)
        results = measure(folder, config.split, OmegaConf.to_container(config), **changes)
        written = read_metrics(folder)
    # What chance and perfection score stands beside a score, where it is known.
    columns = {"now": "", "floor": "/floor", "ceiling": "/ceiling"}
    columns = {name: end for name, end in columns.items() if any(key.endswith(end) for key in results)}
    table = Table("metric", *columns, "when trained", title=str(folder), show_lines=False)
    table.columns[0].overflow = "fold"
    for name in results:
        if not name.endswith(("/floor", "/ceiling")):
            own = name.replace(f"/priors/{config.fitted_prior}/", "/")  # under the prior of training
            numbers = [results.get(name + end) for end in columns.values()] + [written.get(own)]
            table.add_row(name, *("" if number is None else f"{number:.6g}" for number in numbers))
    Console().print(table)


if __name__ == "__main__":
    enter(main)
