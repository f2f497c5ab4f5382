"""From a config to the data and the untrained model that it describes, by Hydra."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import hydra.utils
import torch
from hydra.errors import InstantiationException
from omegaconf import DictConfig, MissingMandatoryValue
from torch import Tensor

from vae.data.module import ImageDataModule
from vae.engine.assemble import ImageFacts, assemble
from vae.engine.module import VAEModule
from vae.errors import VAEError
from vae.objectives.elbo import Objective
from vae.seeding import derive, generator


def instantiate(config: Any, **options: Any) -> Any:
    """Hydra's instantiate; what the object's own constructor says against its options is raised as VAEError.

    Lists and groups of options arrive as plain lists and dicts: a torch optimiser keeps the betas that it is given, and
    whatever it keeps is in each checkpoint.
    """
    try:
        return hydra.utils.instantiate(config, **options, _convert_="all")
    except MissingMandatoryValue as error:
        raise VAEError(f"{error.full_key} has no default: say what it should be.") from error
    except InstantiationException as error:
        cause: BaseException = error
        while cause.__cause__ is not None:
            cause = cause.__cause__
        sentence = str(cause) if isinstance(cause, VAEError) else f"{config.get('_target_')} cannot be made: {cause}"
        raise VAEError(sentence) from error


def build_data(config: DictConfig) -> ImageDataModule:
    """The data set that a config describes, loaded."""
    data: ImageDataModule = instantiate(config.data, seed=config.seed)
    data.setup()
    return data


def image_facts(data: ImageDataModule, objective: Objective) -> ImageFacts:
    """What the size of a model trained on this data by this objective follows from."""
    return ImageFacts(data.image_shape, data.num_classes if objective.conditional else 0, objective.latent_label)


def build(config: DictConfig) -> tuple[ImageDataModule, VAEModule]:
    """The data and the untrained module that a config describes; initial weights follow from `config.seed`.

    Raises VAEError for a combination that makes no sense.
    """
    latent_dim = config.model.latent_dim
    if not isinstance(latent_dim, int) or latent_dim < 1:
        raise VAEError(f"model.latent_dim={latent_dim} must be a whole number of at least 1.")
    data = build_data(config)

    def images(n: int) -> Tensor:
        train = data.splits_ready().train
        order = torch.randperm(len(train), generator=generator(config.seed, "pseudo-inputs"))
        return data.scale(train.gather(order[torch.arange(n) % len(train)])[0])

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(derive(config.seed, "init"))
        objective: Objective = instantiate(config.objective)
        vae = assemble(config, image_facts(data, objective), images, instantiate)
        data.require_fit(vae.likelihood)
        objective.setup(vae, data)
    if config.model.output_bias_from_data:
        vae.decoder.set_output_bias(vae.likelihood.bias_for_mean(data.train_mean()))
    module = VAEModule(
        vae,
        objective,
        optimizer=instantiate(config.optimizer),
        lr_schedule=build_lr_schedule(config, data),
        nll_samples=config.evaluation.nll_samples,
    )
    return data, module


def run_length(trainer: DictConfig, data: ImageDataModule) -> tuple[float, float]:
    """The most batches and epochs that these options of Lightning's Trainer train for; infinite where nothing ends them."""
    batches = len(data.train_dataloader())
    limit = trainer.get("limit_train_batches")
    if limit is not None:  # a number of them, or a part
        batches = min(batches, limit) if isinstance(limit, int) else int(batches * limit)
    together = trainer.get("accumulate_grad_batches") or 1  # batches a step of the optimiser
    epochs, steps = (math.inf if value in (None, -1) else value for value in (trainer.max_epochs, trainer.max_steps))
    epochs = min(epochs, math.ceil(steps / math.ceil(batches / together)) if steps < math.inf else steps)
    return min(epochs * batches, steps * together), epochs


def build_lr_schedule(config: DictConfig, data: ImageDataModule) -> Callable[..., Any] | None:
    """optimizer -> scheduler, or None for a constant rate; `epochs: null` among its options means those of the run."""
    make = instantiate(config.lr_schedule)
    if make and "epochs" in make.keywords and make.keywords["epochs"] is None:
        return functools.partial(make, epochs=run_length(config.trainer, data)[1])
    return make or None
