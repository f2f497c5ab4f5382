"""From a config to the data and the untrained model that it describes."""

from __future__ import annotations

from typing import Any

import hydra.utils
import torch
from hydra.errors import InstantiationException
from omegaconf import DictConfig, MissingMandatoryValue
from torch import Tensor, nn

from vae.data.module import ImageDataModule
from vae.engine.module import VAEModule
from vae.errors import VAEError
from vae.hierarchical import BottomDecoder
from vae.model import VAE, DiagonalFamily, PosteriorFamily
from vae.networks import set_output_bias
from vae.objectives.elbo import Objective
from vae.priors import Prior
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


def build(config: DictConfig) -> tuple[ImageDataModule, VAEModule]:
    """The data and the untrained module that a config describes; initial weights follow from `config.seed`.

    Raises VAEError for a combination that makes no sense.
    """
    latent_dim = config.model.latent_dim
    if not isinstance(latent_dim, int) or latent_dim < 1:
        raise VAEError(f"model.latent_dim={latent_dim} must be a whole number of at least 1.")
    data: ImageDataModule = instantiate(config.data, seed=config.seed)
    data.setup()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(derive(config.seed, "init"))
        objective: Objective = instantiate(config.objective)
        num_classes = data.num_classes if objective.conditional else 0
        likelihood = instantiate(config.likelihood)
        posterior = (
            instantiate(config.posterior)(latent_dim=latent_dim) if config.posterior else DiagonalFamily(latent_dim)
        )
        encoder, decoder = instantiate(config.network)(
            image_shape=data.image_shape,
            latent_dim=latent_dim,
            encoder_outputs=posterior.encoder_outputs,
            params_per_pixel=likelihood.params_per_pixel,
            num_classes=num_classes,
        )
        prior = build_prior(config, data, encoder, posterior)
        vae = VAE(
            encoder,
            decoder if prior.latent_dim == latent_dim else BottomDecoder(decoder, latent_dim),
            prior,
            likelihood,
            num_classes,
            posterior,
        )
        objective.setup(vae, data)
    if config.model.output_bias_from_data:
        set_output_bias(decoder, likelihood.bias_for_mean(data.train_mean()))
    module = VAEModule(
        vae,
        objective,
        optimizer=instantiate(config.optimizer),
        lr_schedule=instantiate(config.lr_schedule) or None,
        nll_samples=config.evaluation.nll_samples,
    )
    return data, module


def build_prior(config: DictConfig, data: ImageDataModule, encoder: nn.Module, posterior: PosteriorFamily) -> Prior:
    """The prior that a config describes, set up with the model's encoder and training images."""
    prior: Prior = instantiate(config.prior)(latent_dim=config.model.latent_dim)
    if prior.needs_encoder and not (isinstance(posterior, DiagonalFamily) and encoder.num_classes == 0):
        raise VAEError("prior=vampprior needs posterior=diagonal and an objective that gives the encoder no labels.")
    if prior.latent_dim != posterior.latent_dim:
        raise VAEError("A two-layer model needs both prior=two_layer and posterior=two_layer, with the same top_dim.")

    def images(n: int) -> Tensor:
        train = data.splits_ready().train
        order = torch.randperm(len(train), generator=generator(config.seed, "pseudo-inputs"))
        return data.scale(train.gather(order[torch.arange(n) % len(train)])[0])

    prior.setup(encoder, images)
    return prior
