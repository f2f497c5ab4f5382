"""A reconstruction that also looks like the image to a network that is not trained: the feature, or perceptual, loss."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, TypeVar

import torch
from torch import Tensor, nn

from vae.errors import VAEError
from vae.model import VAE
from vae.objectives.elbo import Objective, require_not_negative
from vae.precision import full_precision

if TYPE_CHECKING:
    from vae.data.images import Batch
    from vae.data.module import ImageDataModule

N = TypeVar("N", bound=nn.Module)


class Features(nn.Module):
    """How far apart two images are to a network: (N, C, H, W) in [0, 1], twice -> (N,), zero for equal ones.

    Made for an image shape, with all its weights as buffers (`untrained`): no optimiser sees them, and every checkpoint has
    them. `start` gives them their values.
    """

    def start(self, data: ImageDataModule) -> None:
        """Train or read the weights: called where training begins, not where a checkpoint brings them.

        Raises VAEError where they cannot be had.
        """

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        raise NotImplementedError


def untrained(network: N) -> N:
    """The network with its parameters made buffers; of layers that do the same in training as otherwise."""
    for part in network.modules():
        for name, parameter in list(part.named_parameters(recurse=False)):
            delattr(part, name)
            part.register_buffer(name, parameter.detach())
    return network


class Feature(Objective):
    """distortion + beta rate + lambda_feature mean d(x, E p(x|z)), with d the distance of the features of two images.

    features: image shape -> `Features`, in conf/objective/features. With the classifier d = 0.5 |f(x) - f(x')|^2, minus the
    log-density, but for a constant, of a Gaussian of unit variance around the features (Larsen et al. 2016, equations 7 and
    8). LPIPS is Zhang et al. 2018, equation 1. x' is the likelihood's mean, not cut to [0, 1].

    d counts once per image, as nats do. In the recipe of Esser et al. 2021 and Rombach et al. 2022 it is added to every
    sub-pixel before the sum: perceptual_weight = 1 there is lambda_feature = C H W here. At lambda_feature = 0 a run is bit-
    identical to the beta-VAE. Term: `feature`, the mean of d. Raises VAEError for a negative weight.
    """

    unpackable = None
    paddable = True
    lambda_feature: Tensor

    def __init__(
        self,
        features: Callable[..., Features],
        lambda_feature: float = 1.0,
        beta: float = 1.0,
        schedule: nn.Module | None = None,
    ) -> None:
        super().__init__(beta, schedule)
        require_not_negative("objective", lambda_feature=lambda_feature)
        if not callable(features):
            raise VAEError(
                f"objective.features={features} must be an option of objective/features, such as classifier."
            )
        self.register_buffer("lambda_feature", torch.tensor(float(lambda_feature)))
        self.make_features = features

    def setup(self, vae: VAE, data: ImageDataModule) -> None:
        self.features = self.make_features(data.image_shape)

    def start(self, vae: VAE, data: ImageDataModule) -> None:
        self.features.start(data)

    def forward(self, vae: VAE, batch: Batch, generator: torch.Generator, step: int) -> dict[str, Tensor]:
        out = vae(batch.x, generator, batch.y)
        weight = self.weight(step)
        x, mean = full_precision(batch.x), vae.likelihood.mean(out.params)
        with torch.autocast(x.device.type, enabled=False):
            distance = self.features(x, mean).mean()
        loss = out.mean_distortion + weight * out.mean_rate + self.lambda_feature * distance
        return self.named_terms(loss, out, feature=distance.detach(), beta=weight)
