"""`hydra/sweeper=optuna`: Hydra looks for sweepers in packages named hydra_plugins, at every start. So little is here."""

from typing import Any

from hydra.plugins.launcher import Launcher
from hydra.plugins.sweeper import Sweeper
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig


class OptunaSweeper(Sweeper):
    """A search with Optuna in place of every combination; `vae.engine.searching.search` says what the options mean."""

    def __init__(self, **options: Any) -> None:
        self.options = options
        self.config: DictConfig | None = None
        self.launcher: Launcher | None = None
        self.hydra_context: HydraContext | None = None

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        from hydra.core.plugins import Plugins

        self.hydra_context, self.config = hydra_context, config
        self.launcher = Plugins.instance().instantiate_launcher(
            hydra_context=hydra_context, task_function=task_function, config=config
        )

    def sweep(self, arguments: list[str]) -> None:
        from vae.cli import sentences
        from vae.engine.searching import search

        assert self.config is not None and self.launcher is not None and self.hydra_context is not None
        with sentences():
            search(self.config, self.hydra_context.config_loader, self.launcher, arguments, **self.options)
