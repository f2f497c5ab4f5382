"""Objectives that say how many nats the code may take: a capacity to meet, free bits to spend."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from vae.errors import VAEError
from vae.model import VAE, VAEOutput
from vae.objectives.elbo import SinglePass, require_kl_per_dimension, require_not_negative

if TYPE_CHECKING:
    from vae.data.module import ImageDataModule


class Capacity(SinglePass):
    """distortion + gamma |rate - C(t)|, with C(t) = capacity * schedule(t) in nats and the rate per batch mean.

    Burgess et al. 2018, equation 8: capacity 25, gamma 1000, schedule Linear over 100,000 steps. Where gamma is above
    -d distortion / d rate at C, the rate settles at C itself. Raises VAEError for a negative option, or a feedback
    controller as schedule, which would move the target by what it observes.

    The weights that are tested are those of the lowest validation loss, as ever, with C where the schedule ends. At gamma
    1000 they are of the epoch whose rate is nearest to C, whatever its distortion; callbacks.checkpoint.monitor=val/elbo
    with callbacks.checkpoint.mode=max chooses by the bound instead.
    """

    unpackable = None
    paddable = True
    of_whole_batches = True  # the mean distance from C is larger in a smaller batch
    capacity: Tensor
    gamma: Tensor

    def __init__(self, capacity: float = 25.0, gamma: float = 1000.0, schedule: nn.Module | None = None) -> None:
        super().__init__(schedule=schedule)
        require_not_negative("objective", capacity=capacity, gamma=gamma)
        if self.schedule.learns:
            name = type(self.schedule).__name__
            raise VAEError(f"{name} steers a weight by feedback: a capacity needs a schedule that follows the clock.")
        self.register_buffer("capacity", torch.tensor(float(capacity)))
        self.register_buffer("gamma", torch.tensor(float(gamma)))

    def of_pass(self, out: VAEOutput, step: int) -> dict[str, Tensor]:
        capacity = self.capacity * self.multiplier(step)
        loss = out.mean_distortion + self.gamma * (out.mean_rate - capacity).abs()
        return self.named_terms(loss, out, capacity=capacity)


class FreeBits(SinglePass):
    """distortion + beta sum_j max(free_nats, KL_j), KL_j the batch mean of group j of the latent dimensions.

    Kingma et al. 2016, "free bits". groups: how many, each of neighbouring dimensions; None makes each dimension one. A
    rate that is only estimated, as under most priors, is one number: it takes groups=1, and other choices are refused.
    """

    unpackable = None
    of_whole_batches = True  # so is the mean of the maximum
    free_nats: Tensor

    def __init__(
        self,
        free_nats: float = 0.5,
        groups: int | None = None,
        beta: float = 1.0,
        schedule: nn.Module | None = None,
    ) -> None:
        super().__init__(beta, schedule)
        require_not_negative("objective", free_nats=free_nats)
        if groups is not None and groups < 1:
            raise VAEError(f"objective.groups={groups} must be at least 1, or null for a group a dimension.")
        self.register_buffer("free_nats", torch.tensor(float(free_nats)))
        self.groups = groups

    @property
    def paddable(self) -> bool:  # type: ignore[override]
        return self.groups == 1

    def setup(self, vae: VAE, data: ImageDataModule) -> None:
        if self.groups != 1:
            require_kl_per_dimension(self, vae, data)
        if self.groups is not None and vae.latent_dim % self.groups:
            raise VAEError(
                f"{vae.latent_dim} latent dimensions do not make objective.groups={self.groups} equal groups."
            )

    def of_pass(self, out: VAEOutput, step: int) -> dict[str, Tensor]:
        weight = self.weight(step)
        kl = out.kl.mean(0)
        of_groups = kl if self.groups is None else kl.unflatten(0, (self.groups, -1)).sum(-1)
        loss = out.mean_distortion + weight * torch.maximum(of_groups, self.free_nats).sum()
        return self.named_terms(loss, out, beta=weight)
