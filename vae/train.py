"""`python -m vae.train`: train one run, or with -m a sweep of them."""

from __future__ import annotations

import logging
from pathlib import Path

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig

from vae.cli import CONFIGS, enter, resuming, sentences
from vae.engine.search import Pruned, sweep_value
from vae.engine.sweep import REFUSED


@hydra.main(version_base="1.3", config_path=CONFIGS, config_name="train")
def main(config: DictConfig) -> float | tuple[float, ...] | None:
    """Of a run of a sweep, returns `sweep_metric` to the sweeper, for one that failed the worst value there is, and for one
    that a search has pruned None."""
    from vae.engine.callbacks.pruning import pruned_already, pruning
    from vae.engine.folder import read_status, resumed_config
    from vae.engine.run import tested_weights, train  # only now: importing torch takes seconds, and --help should not
    from vae.errors import VAEError
    from vae.files import write_json

    hydra_config = HydraConfig.get()
    log = logging.getLogger("vae.train")
    folder = Path(hydra_config.runtime.output_dir)
    overrides = list(hydra_config.overrides.task)
    if hydra_config.mode == RunMode.RUN:
        with sentences():
            resume = resuming(config.resume)
            if resume and (folder / "config.yaml").is_file():
                config, overrides = resumed_config(folder, overrides)
            metrics = train(config, folder, overrides, resume)
        log.info(f"Finished: {tested_weights(metrics)}. Run folder: {folder}")
        return None
    # One failed run must not end a sweep: it is recorded in its folder, and the report and the exit code show it.
    try:
        constant = hydra_config.job.config.override_dirname.exclude_keys
        overrides = [override for override in overrides if override.partition("=")[0] not in constant]
        if pruned_already(hydra_config, read_status(folder)):
            return None
        # The sweep's folder was empty when it began: what is there is of this very run, whose job was started again.
        resume = resuming(config.resume) or True
        metrics = train(config, folder, overrides, resume, progress_bar=False, callbacks=pruning(hydra_config))
        log.info(f"finished {folder.name}: {tested_weights(metrics)}")
        return sweep_value(config, metrics)
    except Pruned as reason:
        log.info(f"pruned   {folder.name}: {reason}")
        return None
    except VAEError as error:
        log.error(f"FAILED   {folder.name}: {error}")
        if read_status(folder).get("state") != "failed":  # refused, and what is there was left as it was
            write_json(folder / REFUSED, {"reason": str(error)})
    except Exception:
        log.exception(f"FAILED   {folder.name}")
    return sweep_value(config, None)


if __name__ == "__main__":
    enter(main)
