"""`python -m vae.export run=FOLDER out=DIR`: a trained model without its run: weights, config, a model card."""

from __future__ import annotations

import hydra
from omegaconf import DictConfig

from vae.cli import CONFIGS, enter, sentences


@hydra.main(version_base="1.3", config_path=CONFIGS, config_name="export")
def main(config: DictConfig) -> None:
    """Writes model.safetensors, config.json and README.md, which `vae.load` reads; and encoder and decoder as programs."""
    from rich.console import Console

    with sentences():
        from vae.engine.exporting import FORMATS, export
        from vae.engine.loading import load
        from vae.errors import choose
        from vae.files import named

        choose("format", config.format, FORMATS)
        run = load(named("run", config.run), trust=config.trust)
        written = export(run, named("out", config.out), config.format, config.licence)
    Console().print(f"{', '.join(written)}: {config.out}", highlight=False, soft_wrap=True)


if __name__ == "__main__":
    enter(main)
