"""`python -m vae.train`: train one run, or with -m a sweep of them."""

from __future__ import annotations

import logging
from pathlib import Path

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig

from vae.cli import CONFIGS, sentences


@hydra.main(version_base="1.3", config_path=CONFIGS, config_name="train")
def main(config: DictConfig) -> float:
    """Returns the best validation loss in nats, which any Hydra sweeper can minimise; NaN for a failed run of a sweep."""
    from vae.engine.folder import resumed_config
    from vae.engine.run import train  # only now: importing torch takes seconds, and --help should not
    from vae.errors import VAEError

    hydra_config = HydraConfig.get()
    log = logging.getLogger("vae.train")
    folder = Path(hydra_config.runtime.output_dir)
    overrides = list(hydra_config.overrides.task)
    if hydra_config.mode == RunMode.RUN:
        with sentences():
            resume = config.resume
            if resume and (folder / "config.yaml").is_file():
                config, overrides = resumed_config(folder, overrides)
            loss = train(config, folder, overrides, resume)
        log.info(f"Finished: best validation loss {loss:.4f} nats. Run folder: {folder}")
        return loss
    # One failed run must not end a sweep: it is recorded in its folder, and the report and the exit code tell.
    try:
        constant = hydra_config.job.config.override_dirname.exclude_keys
        overrides = [override for override in overrides if override.partition("=")[0] not in constant]
        jobs = hydra_config.launcher.get("n_jobs", 1)  # joblib's; other launchers give each job a machine of its own
        loss = train(config, folder, overrides, config.resume, progress_bar=False, jobs=jobs)
        log.info(f"finished {folder.name}: best validation loss {loss:.4f} nats")
        return loss
    except VAEError as error:
        log.error(f"FAILED   {folder.name}: {error}")
    except Exception:
        log.exception(f"FAILED   {folder.name}")
    return float("nan")


if __name__ == "__main__":
    with sentences():
        main()
