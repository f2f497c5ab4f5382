"""The limit: a variational autoencoder trained by a plain PyTorch loop, with nothing around it.

No Trainer, no logging, no progress bar, no validation, no checkpoint: uint8 images in memory, gathered by index, and one
fused Adam. `python benchmarks/bare.py` trains several such models one after another, which is what a sweep is compared
with. Imports nothing of the project, so that its start-up is that of PyTorch.
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Iterable, Iterator
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

Noise = Iterable[tuple[torch.Generator, torch.Generator]]  # of each batch: for its pixels and for its latents


class Nets(NamedTuple):
    """encoder: (B, C, H, W) -> (B, 2 D); decoder: (B, D) -> logits of B * C * H * W pixels; and their optimiser."""

    encoder: nn.Module
    decoder: nn.Module
    optimizer: torch.optim.Optimizer


class PixelBias(nn.Module):
    """One bias per pixel, as the project's convolutional decoder has it."""

    def __init__(self, *shape: int) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(shape))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.bias


def mlp(latent_dim: int) -> tuple[nn.Module, nn.Module]:
    """784-400-D and back."""
    encoder = nn.Sequential(nn.Flatten(), nn.Linear(784, 400), nn.ReLU(), nn.Linear(400, 2 * latent_dim))
    return encoder, nn.Sequential(nn.Linear(latent_dim, 400), nn.ReLU(), nn.Linear(400, 784))


def burgess(latent_dim: int) -> tuple[nn.Module, nn.Module]:
    """The net of Burgess et al. 2018 for one channel of 64x64."""
    down = [layer for c in (1, 32, 32, 32) for layer in (nn.Conv2d(c, 32, 4, stride=2, padding=1), nn.ReLU())]
    up = [layer for _ in range(3) for layer in (nn.ConvTranspose2d(32, 32, 4, stride=2, padding=1), nn.ReLU())]
    dense = [nn.Linear(512, 256), nn.ReLU(), nn.Linear(256, 256), nn.ReLU()]
    back = [nn.Linear(latent_dim, 256), nn.ReLU(), nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 512), nn.ReLU()]
    last = nn.ConvTranspose2d(32, 1, 4, stride=2, padding=1, bias=False)
    encoder = nn.Sequential(*down, nn.Flatten(), *dense, nn.Linear(256, 2 * latent_dim))
    return encoder, nn.Sequential(*back, nn.Unflatten(1, (32, 4, 4)), *up, last, PixelBias(1, 64, 64))


def nets(encoder: nn.Module, decoder: nn.Module, device: torch.device | str = "cpu", capturable: bool = False) -> Nets:
    """Both on a device, with a fused Adam."""
    parameters = [*encoder.to(device).parameters(), *decoder.to(device).parameters()]
    return Nets(encoder, decoder, torch.optim.Adam(parameters, lr=1e-3, fused=True, capturable=capturable))


def one_generator(generator: torch.Generator) -> Noise:
    return itertools.repeat((generator, generator))


def loss_of(
    encoder: nn.Module,
    decoder: nn.Module,
    images: Tensor,
    dynamic: bool,
    noise: tuple[torch.Generator | None, torch.Generator | None],
    beta: float,
) -> Tensor:
    """The negative beta-ELBO of uint8 images (B, C, H, W), in nats per image; dynamic: pixels are drawn afresh."""
    x = images.float() / 255
    if dynamic:
        x = (torch.rand(x.shape, generator=noise[0], device=x.device) < x).float()
    mean, log_var = encoder(x).chunk(2, dim=1)
    z = mean + torch.exp(0.5 * log_var) * torch.randn(mean.shape, generator=noise[1], device=x.device)
    logits = decoder(z).flatten(1)
    distortion = F.binary_cross_entropy_with_logits(logits, x.flatten(1), reduction="none").sum(1).mean()
    rate = 0.5 * (mean.square() + log_var.exp() - 1 - log_var).sum(1).mean()
    return distortion + beta * rate


def steps(
    model: Nets, images: Tensor, order: Tensor, batch_size: int, dynamic: bool, noise: Noise, beta: float = 1.0
) -> Iterator[Tensor]:
    """Train on the images in that order, one batch each time a loss is asked for."""
    for index, pair in zip(order.split(batch_size), noise, strict=False):
        loss = loss_of(model.encoder, model.decoder, images.index_select(0, index), dynamic, pair, beta)
        model.optimizer.zero_grad()
        loss.backward()
        model.optimizer.step()
        yield loss.detach()


def epoch(
    model: Nets, images: Tensor, batch_size: int, dynamic: bool, noise: torch.Generator, beta: float = 1.0
) -> None:
    """Train on every image once, in random order."""
    order = torch.randperm(len(images), generator=noise, device=noise.device)
    for _ in steps(model, images, order, batch_size, dynamic, one_generator(noise), beta):
        pass


class CapturedStep:
    """A whole training step, data and optimiser included, as one CUDA graph; noise comes from the device's own generator."""

    def __init__(self, model: Nets, images: Tensor, batch_size: int, dynamic: bool) -> None:
        """`model` on the GPU, made with capturable=True."""
        self.index = torch.arange(batch_size, device=images.device)

        def step() -> None:
            model.optimizer.zero_grad(set_to_none=True)
            batch = images.index_select(0, self.index)
            loss_of(model.encoder, model.decoder, batch, dynamic, (None, None), 1.0).backward()
            model.optimizer.step()

        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):  # what is made on the first steps must not be part of the graph
            for _ in range(3):
                step()
        torch.cuda.current_stream().wait_stream(side)
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            step()

    def epoch(self, images: Tensor) -> None:
        order = torch.randperm(len(images), device=images.device)
        for index in order.split(len(self.index)):
            if len(index) == len(self.index):  # a graph has one shape
                self.index.copy_(index)
                self.graph.replay()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("images", help="a .npy file of uint8 images (N, 1, 28, 28)")
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--latent", type=int, default=20)
    parser.add_argument("--betas", type=float, nargs="+", default=[0.5, 1, 2, 4])
    parser.add_argument("--seeds", type=int, default=4)
    parser.add_argument("--threads", type=int, default=None)
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    images = torch.from_numpy(np.load(options.images))
    for beta, seed in itertools.product(options.betas, range(options.seeds)):
        torch.manual_seed(seed)
        noise = torch.Generator().manual_seed(seed)
        model = nets(*mlp(options.latent))
        for _ in range(options.epochs):
            epoch(model, images, options.batch, True, noise, beta)


if __name__ == "__main__":
    main()
