"""`python -m vae.fit_prior run=FOLDER prior=NAME`: learn p(z) of a finished run's aggregate posterior."""

from __future__ import annotations

import hydra
from omegaconf import DictConfig, OmegaConf

from vae.cli import CONFIGS, enter, sentences


@hydra.main(version_base="1.3", config_path=f"{CONFIGS}/fit_prior", config_name="fit_prior")
def main(config: DictConfig) -> None:
    """Keeps the prior in FOLDER/priors/NAME, where `fitted_prior=NAME` of vae.evaluate and vae.generate finds it."""
    from rich.console import Console

    with sentences():
        from vae.engine.fitted_priors import fit_prior
        from vae.engine.loading import load
        from vae.files import named

        run = load(named("run", config.run), trust=config.trust)
        options = dict(OmegaConf.to_container(config).get("prior", {}))  # type: ignore[union-attr]
        kind = options.pop("kind", None)
        name = kind if config.name is None else str(config.name)
        found = fit_prior(run.vae, run.data, run.path, kind, name, config.seed, options, config.resume)["log_prob"]
    Console().print(
        f"log p(z) in nats, mean over draws of q(z|x): {found['train']:.6g} train, {found['val']:.6g} val "
        f"({found['val_of_own_prior']:.6g} under the prior of training): {run.path / 'priors' / name}",
        highlight=False,
        soft_wrap=True,
    )


if __name__ == "__main__":
    enter(main, f"{CONFIGS}/fit_prior")
