"""`python -m vae.generate run=FOLDER n=64 out=DIR`: draw images from a trained model, as PNG files and one grid."""

from __future__ import annotations

import hydra
from omegaconf import DictConfig

from vae.cli import CONFIGS, enter, sentences


@hydra.main(version_base="1.3", config_path=CONFIGS, config_name="generate")
def main(config: DictConfig) -> None:
    """Writes 00000.png and so on, and grid.png. The same seed gives the same images."""
    from rich.console import Console

    with sentences():
        from vae.engine.callbacks.drawing import grid, to_png
        from vae.engine.loading import load
        from vae.errors import whole
        from vae.files import named, new_folder

        n, out = whole("n", config.n, most=100_000), new_folder("out", config.out)
        run = load(named("run", config.run), trust=config.trust)
        if config.fitted_prior is not None:
            run = run.with_prior(str(config.fitted_prior))
        labels = config.label
        if run.vae.num_classes and labels is None:  # each class equally often
            labels = [number * run.vae.num_classes // n for number in range(n)]
        images = run.sample(n, whole("seed", config.seed, least=0), labels).cpu()
        out.mkdir(parents=True, exist_ok=True)
        for number, image in enumerate(images):
            to_png(grid(image[None], 1, padding=0) if image.shape[0] not in (1, 3) else image.expand(3, -1, -1)).save(
                out / f"{number:05}.png"
            )
        to_png(grid(images[:256], round(min(n, 256) ** 0.5))).save(out / "grid.png")
    Console().print(f"{n} images and grid.png: {out}", highlight=False, soft_wrap=True)


if __name__ == "__main__":
    enter(main)
