"""A few steps of full-batch training, for tests that only need a model to have learned something."""

from __future__ import annotations

import torch

from vae.data.images import Batch
from vae.model import VAE
from vae.seeding import generator


def fit(vae: VAE, batch: Batch, steps: int, lr: float) -> list[float]:
    """Minimise the negative ELBO of `batch` with Adam; the ELBO at each step, in nats per image."""
    elbos = []
    optimizer = torch.optim.Adam(vae.parameters(), lr=lr)
    for step in range(steps):
        out = vae(batch.x, generator("step", step))
        loss = (out.distortion + out.rate).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        elbos.append(-loss.item())
    return elbos
