"""From a config to the data and the untrained model that it describes, by Hydra."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from contextvars import ContextVar
from typing import Any

import hydra.utils
import torch
from hydra.errors import InstantiationException
from omegaconf import DictConfig, MissingMandatoryValue, OmegaConf
from torch import Tensor

from vae.data.module import ImageDataModule
from vae.engine.assemble import ImageFacts, assemble, called
from vae.engine.module import VAEModule
from vae.engine.typed import check_types
from vae.errors import VAEError, whole
from vae.evaluation.likelihood import MOST_SAMPLES
from vae.objectives.elbo import Objective
from vae.seeding import derive, generator


def instantiate(config: Any, key: str | None = None, **options: Any) -> Any:
    """Hydra's instantiate; what the object's own constructor says against its options is raised as VAEError. key: the
    config's place, by which options of a wrong type are named.

    Lists and groups of options arrive as plain lists and dicts: a torch optimiser keeps the betas that it is given, and
    whatever it keeps is in each checkpoint.
    """
    if key is not None and isinstance(config, DictConfig):
        check_types(OmegaConf.to_container(config, resolve=True), key)
    try:
        return hydra.utils.instantiate(config, **options, _convert_="all")
    except MissingMandatoryValue as error:
        raise VAEError(f"{error.full_key} has no default: say what it should be.") from error
    except InstantiationException as error:
        cause: BaseException = error
        while cause.__cause__ is not None:
            cause = cause.__cause__
        why = (str(cause).strip().splitlines() or [type(cause).__name__])[0].rstrip(".")
        sentence = str(cause) if isinstance(cause, VAEError) else f"{config.get('_target_')} cannot be made: {why}."
        raise VAEError(sentence) from error


def build_data(config: DictConfig) -> ImageDataModule:
    """The data set that a config describes, loaded."""
    data: ImageDataModule = instantiate(config.data, "data", seed=config.seed)
    data.source = functools.partial(called, "data.source", data.source)
    loaded, named = SHARED.get(), OmegaConf.to_yaml(config.data, resolve=True)
    if type(data) is not ImageDataModule or loaded is None:
        data.setup()
        return data
    if named in loaded:
        data.share(loaded[named])
    data.setup()
    loaded[named] = data
    return data


#: Where the data of several runs are in memory once: by their options, the first module that has them.
SHARED: ContextVar[dict[str, ImageDataModule] | None] = ContextVar("SHARED", default=None)


def image_facts(data: ImageDataModule, objective: Objective) -> ImageFacts:
    """What the size of a model trained on this data by this objective follows from."""
    return ImageFacts(data.image_shape, data.num_classes if objective.conditional else 0, objective.latent_label)


def build(config: DictConfig, start: bool = True) -> tuple[ImageDataModule, VAEModule]:
    """The data and the untrained module that a config describes; initial weights follow from `config.seed`.

    start: whether training begins with it; otherwise what others replace is neither read nor trained: the weights that it is
    to begin with (`network.weights`), and those of `Objective.start`.
    Raises VAEError for a combination that makes no sense.
    """
    if not start and config.network.get("weights"):
        config = OmegaConf.create({**config, "network": {**config.network, "weights": None}})
    data = build_data(config)

    def images(n: int) -> Tensor:
        train = data.splits_ready().train
        order = torch.randperm(len(train), generator=generator(config.seed, "pseudo-inputs"))
        return data.scale(train.gather(order[torch.arange(n) % len(train)])[0])

    whole("evaluation.nll_samples", config.evaluation.nll_samples, least=0, most=MOST_SAMPLES)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(derive(config.seed, "init"))
        objective: Objective = instantiate(config.objective, "objective")
        vae = assemble(config, image_facts(data, objective), images, instantiate)
        data.require_fit(vae.likelihood)
        objective.setup(vae, data)
        if config.get("regularizer"):
            objective.regularizer = instantiate(config.regularizer, "regularizer")
            objective.regularizer.setup(vae, data)
        if start:
            objective.start(vae, data)
    if config.model.output_bias_from_data:
        vae.decoder.set_output_bias(vae.likelihood.bias_for_mean(data.train_mean()))
    optimizer, lr_schedule = instantiate(config.optimizer, "optimizer"), build_lr_schedule(config, data)
    tried = called(
        "optimizer", optimizer, [torch.nn.Parameter(torch.zeros(1))]
    )  # what they refuse, they refuse at once
    if lr_schedule is not None:
        called("lr_schedule", lr_schedule, tried)
    module = VAEModule(
        vae,
        objective,
        optimizer=optimizer,
        lr_schedule=lr_schedule,
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
    make = instantiate(config.lr_schedule, "lr_schedule")
    if make and "epochs" in make.keywords and make.keywords["epochs"] is None:
        return functools.partial(make, epochs=run_length(config.trainer, data)[1])
    return make or None
