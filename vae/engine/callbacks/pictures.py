"""What a researcher looks at: samples, reconstructions, traversals and the latent space, in TensorBoard and as PNG."""

from __future__ import annotations

import contextlib
import io
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from torch import Tensor

from vae.engine.callbacks.drawing import as_rgb, draw, grid, kl_bars_on, to_png
from vae.engine.callbacks.maps import channel_traversals, kl_maps, latent_maps
from vae.engine.loggers import log_picture
from vae.engine.module import VAEModule, is_ending
from vae.errors import whole
from vae.files import is_disk_full, write_atomically
from vae.model import VAE
from vae.seeding import generator

# --- pictures: functions of a model, each returning one RGB image (3, H, W) in [0, 1] ---------------------------------


def samples(vae: VAE, generator: torch.Generator, n: int = 64, y: Tensor | None = None) -> Tensor:
    """n decoded draws from the prior."""
    return grid(vae.sample(n, generator, y), columns=round(n**0.5))


def reconstructions(vae: VAE, x: Tensor, y: Tensor | None = None, columns: int = 16) -> Tensor:
    """Rows of inputs, each above the row of their reconstructions."""
    rows = [row for pair in zip(x.split(columns), vae.reconstruct(x, y).split(columns), strict=True) for row in pair]
    return grid(torch.cat(rows), columns)


def traversals(
    vae: VAE,
    x: Tensor,
    kl: Tensor,
    y: Tensor | None = None,
    dimensions: int = 16,
    columns: int = 11,
    reach: float = 3.0,
) -> Tensor:
    """One image x (1, C, H, W) decoded while one latent moves from -reach to reach; a row per dimension, largest KL first."""
    mean = vae.encode(x, y).mean
    order = kl.argsort(descending=True)[:dimensions] if len(kl) == vae.latent_dim else torch.arange(vae.latent_dim)
    z = mean.repeat(len(order[:dimensions]), columns, 1)
    for row, dimension in enumerate(order[:dimensions]):
        z[row, :, dimension] = torch.linspace(-reach, reach, columns, device=z.device)
    z = z.flatten(0, 1)
    return grid(vae.mean_image(z, None if y is None else y[:1].expand(len(z))), columns)


def latent_grid(vae: VAE, columns: int = 20, y: Tensor | None = None) -> Tensor:
    """The decoded plane of a two-dimensional latent, at equal quantiles of N(0, I) (Kingma & Welling 2014, Fig. 4)."""
    quantiles = torch.special.ndtri(torch.linspace(0.5 / columns, 1 - 0.5 / columns, columns, dtype=torch.float64))
    side = quantiles.to(next(vae.parameters()))
    plane = torch.cartesian_prod(-side, side).flip(-1)  # first latent to the right, second upwards
    return grid(vae.mean_image(plane, None if y is None else y[:1].expand(len(plane))), columns, padding=0)


def kl_bars(kl: Tensor, of: str) -> Tensor:
    """KL in nats of each of what `of` names, largest first."""
    figure = Figure(figsize=(6, 3), dpi=120)  # margins by hand: matplotlib's layout engines triple the drawing time
    kl_bars_on(figure.add_axes((0.12, 0.17, 0.85, 0.72)), kl, of)
    return draw(figure)


def latent_space(mean: Tensor, kl: Tensor, labels: Tensor | None) -> Tensor:
    """Posterior means (N, D) in the plane of the two dimensions with the largest KL, coloured by label; of codes, whose KL is
    none of a dimension, the first two."""
    by_kl = len(kl) == mean.shape[1]
    order = kl.argsort(descending=True)[:2] if by_kl else torch.arange(min(2, mean.shape[1]))
    points = mean[:, order].cpu().numpy()
    x, y = points[:, 0], points[:, 1] if len(order) > 1 else np.zeros(len(points))
    figure = Figure(figsize=(5.5, 5), dpi=120)
    axes = figure.add_axes((0.12, 0.1, 0.72, 0.82))
    colours = None if labels is None or labels.ndim != 1 else labels.cpu().numpy()
    dots = axes.scatter(x, y, c=colours, cmap="tab10" if colours is not None else None, s=6, alpha=0.8, linewidths=0)
    if colours is not None and len(np.unique(colours)) <= 20:
        axes.legend(
            *dots.legend_elements(num=None), title="label", loc="center left", bbox_to_anchor=(1, 0.5), frameon=False
        )
    names = [f"$z_{{{int(i)}}}$" for i in order] + ["", ""]
    title = "posterior means, the two dimensions of largest KL" if by_kl else "codes, the first two dimensions"
    axes.set(xlabel=names[0], ylabel=names[1], aspect="equal", title=title)
    return draw(figure)


def all_pictures(module: VAEModule, examples: Any) -> dict[str, Tensor]:
    """Every picture that the model allows, by name."""
    vae, kl = module.vae, module.kl_per_dimension
    x, y = examples.x, examples.y if vae.num_classes else None
    noise = generator(examples.seed, "samples", device=x.device)
    labels_of_samples = (
        None if y is None else torch.arange(vae.num_classes, device=x.device).repeat(64)[:64].sort().values
    )
    pictures = {
        "samples": samples(vae, noise, 64, labels_of_samples),
        "reconstructions": reconstructions(vae, x[:64], None if y is None else y[:64]),
        "latent_space": latent_space(vae.encode(x, y).mean, kl, examples.y),
    }
    if vae.discrete or len(kl) == vae.latent_dim:  # an estimated KL is one of all dimensions together
        pictures["kl_per_dimension"] = kl_bars(kl, "code" if vae.discrete else "latent dimension")
    if not vae.discrete:  # nothing moves along codes
        pictures["traversals"] = traversals(vae, x[:1], kl, None if y is None else y[:1])
    if vae.spatial and not vae.discrete:
        pictures["channel_traversals"] = channel_traversals(vae, x[:1], kl, None if y is None else y[:1])
    if vae.spatial:
        pictures["latent_maps"] = latent_maps(vae, x[:8], kl, None if y is None else y[:8])
        if len(kl) == vae.latent_dim:
            pictures["kl_per_channel"] = kl_maps(kl, vae.latent_shape)
    if vae.latent_dim == 2 and not vae.discrete:
        pictures["latent_grid"] = latent_grid(vae, y=y)
    return pictures


# --- when they are drawn ----------------------------------------------------------------------------------------------


class Pictures(pl.callbacks.Checkpoint):
    """Draws every `every_n_epochs` from the validation split, and once more from the weights that are tested.

    Dimensions are shown by their KL, which is that of the validation just made, and of the test in the last set. That
    also fills TensorBoard's projector: posterior means with thumbnails and labels of `points` images. A picture that cannot
    be drawn is a warning: it does not cost the training. A `Checkpoint`, so that Lightning calls it after early stopping
    and the checkpoints of the epoch.
    """

    def __init__(self, every_n_epochs: int = 10, points: int = 1000) -> None:
        self.every_n_epochs = whole("callbacks.pictures.every_n_epochs", every_n_epochs)
        self.points = whole("callbacks.pictures.points", points)

    def on_train_epoch_end(self, trainer: pl.Trainer, module: VAEModule) -> None:
        if not trainer.is_global_zero:
            return
        epoch, apart = trainer.current_epoch + 1, trainer.check_val_every_n_epoch or 1
        due = (
            epoch // self.every_n_epochs > (epoch - apart) // self.every_n_epochs
        )  # validation may skip the very epoch
        if due and module.validated == module.steps and not is_ending(trainer):  # the end's are drawn when it is tested
            with a_warning_at_most():
                self._draw(trainer, module)

    def on_test_end(self, trainer: pl.Trainer, module: VAEModule) -> None:
        if not trainer.is_global_zero:
            return
        with a_warning_at_most():
            self._draw_last(trainer, module)

    def _draw_last(self, trainer: pl.Trainer, module: VAEModule) -> None:
        examples = self._draw(trainer, module)
        writer = tensorboard_writer(trainer)
        if writer is not None:
            with torch.no_grad():
                mean = module.vae.encode(examples.x, examples.y).mean
            mean = F.pad(mean, (0, max(0, 3 - mean.shape[1])))  # the projector shows no fewer than three
            labels = examples.y.tolist() if examples.y is not None else None
            header = None
            if labels and isinstance(labels[0], list):
                header = [f"factor {i}" for i in range(len(labels[0]))]
            thumbnails = F.interpolate(as_rgb(examples.x.cpu()), size=32, mode="nearest")
            writer.add_embedding(
                mean.cpu(), labels, thumbnails, module.steps, "posterior_means", metadata_header=header
            )

    @torch.no_grad()
    def _draw(self, trainer: pl.Trainer, module: VAEModule) -> Any:
        training = module.training
        examples = module.transfer_batch_to_device(trainer.datamodule.examples("val", self.points), module.device, 0)
        try:
            pictures = all_pictures(module.eval(), examples)
        finally:
            module.train(training)
        for name, picture in pictures.items():
            path = Path(trainer.default_root_dir) / "pictures" / f"{name}.png"
            png = io.BytesIO()
            to_png(picture).save(png, "PNG")
            write_atomically(path, lambda file, png=png: file.write(png.getvalue()))
            for logger in trainer.loggers:
                log_picture(logger, name, picture, module.steps)
        return examples


@contextlib.contextmanager
def a_warning_at_most() -> Iterator[None]:
    """Whatever is wrong with a picture is said and passed over, but for a full disk, which is wrong with more than that."""
    try:
        yield
    except Exception as error:
        if is_disk_full(error):
            raise
        logging.getLogger(__name__).warning(f"Pictures could not be drawn ({type(error).__name__}: {error}).")


def tensorboard_writer(trainer: pl.Trainer) -> Any | None:
    """The SummaryWriter of the run, if TensorBoard is among its loggers."""
    for logger in trainer.loggers:
        if isinstance(logger, pl.loggers.TensorBoardLogger):
            return logger.experiment
    return None
