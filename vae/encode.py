"""`python -m vae.encode run=FOLDER split=test out=latents.npz`: the latents of a split, for another model or program."""

from __future__ import annotations

import hydra
from omegaconf import DictConfig

from vae.cli import CONFIGS, enter, sentences


@hydra.main(version_base="1.3", config_path=CONFIGS, config_name="encode")
def main(config: DictConfig) -> None:
    """Writes means, log-variances, a draw and labels of each image, and the latents' mean and standard deviation."""
    from rich.console import Console

    with sentences():
        from vae.engine.build import build_data
        from vae.engine.latents import write_latents
        from vae.engine.loading import load
        from vae.errors import choose, whole
        from vae.files import named

        split = choose("split", config.split, ("train", "val", "test"))
        run = load(named("run", config.run), trust=config.trust)
        other = config.get("data") is not None
        if other:
            config.data.batch_size = 1  # of training, for which a few images may be too few
        data = build_data(DictConfig({"data": config.data, "seed": 0})) if other else run.data
        data.eval_batch_size = whole("batch_size", config.batch_size)
        n = write_latents(run, data, split, named("out", config.out))
    Console().print(f"Latents of {n} images: {config.out}", highlight=False, soft_wrap=True)


if __name__ == "__main__":
    enter(main)
