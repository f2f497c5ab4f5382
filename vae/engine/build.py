"""From a config to the data and the untrained model that it describes."""

from __future__ import annotations

import functools
import inspect
import math
from collections.abc import Callable
from typing import Any

import hydra.utils
import torch
from hydra.errors import InstantiationException
from omegaconf import DictConfig, MissingMandatoryValue
from torch import Tensor, nn

from vae.data.module import ImageDataModule
from vae.engine.module import VAEModule
from vae.errors import VAEError
from vae.gaussian import DiagonalGaussian
from vae.hierarchical import BottomDecoder
from vae.model import VAE
from vae.networks import set_output_bias
from vae.seeding import derive, generator


def instantiate(config: Any, **options: Any) -> Any:
    """Hydra's instantiate; what the object's own constructor says against its options is raised as VAEError."""
    try:
        return hydra.utils.instantiate(config, **options)
    except MissingMandatoryValue as error:
        raise VAEError(f"{error.full_key} has no default: say what it should be.") from error
    except InstantiationException as error:
        cause: BaseException = error
        while cause.__cause__ is not None:
            cause = cause.__cause__
        sentence = str(cause) if isinstance(cause, VAEError) else f"{config.get('_target_')} cannot be made: {cause}"
        raise VAEError(sentence) from error


def build(config: DictConfig, facts: dict[str, Any] | None = None) -> tuple[ImageDataModule, VAEModule]:
    """The data and the untrained module that a config describes; initial weights follow from `config.seed`.

    facts: what a checkpoint tells of the images, where the data set is not there and only the module is wanted.
    Raises VAEError for a combination that makes no sense.
    """
    latent_dim = config.model.latent_dim
    if not isinstance(latent_dim, int) or latent_dim < 1:
        raise VAEError(f"model.latent_dim={latent_dim} must be a whole number of at least 1.")
    data: ImageDataModule = instantiate(config.data, seed=config.seed)
    if facts is None:
        data.setup()
    else:
        data.stand_in(**facts)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(derive(config.seed, "init"))
        objective = instantiate(config.objective)
        waiting = isinstance(objective, functools.partial)  # for what only the model and the data can tell
        num_classes = data.num_classes if (objective.func if waiting else objective).conditional else 0
        likelihood = instantiate(config.likelihood)
        network = functools.partial(
            instantiate(config.network),
            image_shape=data.image_shape,
            params_per_pixel=likelihood.params_per_pixel,
            num_classes=num_classes,
        )
        encoder, decoder = network(latent_dim=latent_dim)
        posterior = instantiate(config.posterior)(latent_dim=latent_dim) if config.posterior else None
        if posterior is not None and posterior.encoder_outputs > 2 * latent_dim:  # the same network, wider at its end
            encoder, _ = network(latent_dim=math.ceil(posterior.encoder_outputs / 2))
        prior = build_prior(config, data, encoder, posterior)
        vae = VAE(
            encoder,
            decoder if prior.latent_dim == latent_dim else BottomDecoder(decoder, latent_dim),
            prior,
            likelihood,
            num_classes,
            posterior or DiagonalGaussian.from_parameters,
        )
        if waiting:
            objective = objective(**facts_for(objective, vae, data))
    objective.prepare(vae, data)
    if config.model.output_bias_from_data:
        set_output_bias(decoder, likelihood.bias_for_mean(data.train_mean()))
    module = VAEModule(
        vae,
        objective,
        optimizer=instantiate(config.optimizer),
        lr_schedule=for_length(instantiate(config.lr_schedule), config.trainer, data),
        nll_samples=config.evaluation.nll_samples,
    )
    if facts is not None:
        data.withdraw()
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


def for_length(
    make: Callable[..., Any] | None, trainer: DictConfig, data: ImageDataModule
) -> Callable[..., Any] | None:
    """A learning rate schedule that asks for `epochs` and was given none gets those of the run."""
    if not make:
        return None
    if "epochs" in inspect.signature(make.func).parameters and make.keywords.get("epochs") is None:
        return functools.partial(make, epochs=run_length(trainer, data)[1])
    return make


def facts_for(objective: functools.partial, vae: VAE, data: ImageDataModule) -> dict[str, Any]:
    """What an objective's constructor asks for by these names, where the config does not give it."""
    facts: dict[str, Callable[[], Any]] = {
        "image_shape": lambda: data.image_shape,
        "latent_dim": lambda: vae.latent_dim,
        "num_classes": lambda: data.num_classes,
        "dataset_size": lambda: len(data.splits_ready().train),
        "labelled_fraction": lambda: data.labelled_fraction,
    }
    asked = inspect.signature(objective.func).parameters
    return {name: fact() for name, fact in facts.items() if name in asked and objective.keywords.get(name) is None}


def build_prior(
    config: DictConfig, data: ImageDataModule, encoder: nn.Module, posterior: nn.Module | None
) -> nn.Module:
    """The prior that a config describes; one that reads the model's encoder is given that and training images."""
    make = instantiate(config.prior)
    if getattr(make.func, "needs_encoder", False):
        if posterior is not None or encoder.num_classes:
            raise VAEError(
                "prior=vampprior needs posterior=diagonal and an objective that gives the encoder no labels."
            )

        def images(n: int) -> Tensor:
            train = data.splits_ready().train
            order = torch.randperm(len(train), generator=generator(config.seed, "pseudo-inputs"))
            return data.scale(train.gather(order[torch.arange(n) % len(train)])[0])

        make = functools.partial(make, encoder=encoder, images=images)
    prior = make(latent_dim=config.model.latent_dim)
    if prior.latent_dim != (config.model.latent_dim if posterior is None else posterior.latent_dim):
        raise VAEError("A two-layer model needs both prior=two_layer and posterior=two_layer, with the same top_dim.")
    return prior
