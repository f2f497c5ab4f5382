"""What the Latents tab asks of one run's model: decode, encode, where the test images lie. Answers are plain values."""

from __future__ import annotations

import io
import math
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.utils import make_grid

from vae.engine.callbacks.drawing import as_rgb, grid
from vae.engine.fitted_priors import prior_names, read_prior
from vae.engine.latents import Moments
from vae.engine.loading import load
from vae.errors import VAEError, choose, whole
from vae.evaluation.likelihood import ACTIVE_UNIT_THRESHOLD
from vae.gaussian import DiagonalGaussian
from vae.latents.examples import Examples, examples_of
from vae.latents.images import gif, opened, png, thumbnails, url
from vae.priors import Prior, StandardNormal
from vae.seeding import generator

MOST_LATENTS = 512
MOST_PLACES = 4096  # latents of a map, which has no slider for each
BATCH = 64  # images a request
DRAWS = 16  # of z, over which the distortion of an uploaded image is averaged
PRIOR_DRAWS = 4000
SIDE = 48  # of the map of the prior's density
COLUMNS = 32  # of the sheet of thumbnails


class Encoded(NamedTuple):
    """Posterior means (N, D); KL per latent in nats (D,), None without a closed form; the aggregate posterior's mean and
    standard deviation (D,)."""

    mean: Tensor
    kl: Tensor | None
    centre: Tensor
    spread: Tensor


class Session:
    """One run's model. Raises VAEError for a run that cannot be loaded, or has more latents than can be shown: MOST_LATENTS,
    or MOST_PLACES where they are a map."""

    def __init__(self, folder: Path) -> None:
        self.run = load(folder)
        self.vae = self.run.vae
        self._priors: dict[tuple[str, int], tuple[Prior, Tensor]] = {}
        most = MOST_PLACES if self.vae.spatial else MOST_LATENTS
        if self.vae.latent_dim > most:
            raise VAEError(f"This model has {self.vae.latent_dim} latents, and {most} is the most shown.")

    @cached_property
    def examples(self) -> Examples:
        return examples_of(self.run)

    @cached_property
    @torch.no_grad()
    def encoded(self) -> Encoded:
        moments, means, kls = Moments(self.vae.latent_dim), [], []
        noise = generator(0, "latents")
        for i in range(0, len(self.examples.x), 250):
            y = None if self.examples.y is None else self.examples.y[i : i + 250]
            posterior = self.vae.encode(self.examples.x[i : i + 250], y)
            z = posterior.rsample(noise)
            if isinstance(posterior, DiagonalGaussian):
                moments.add(posterior.mean, posterior.log_var.exp())
            else:
                moments.add(z, torch.zeros_like(z))
            means.append(posterior.mean)
            kls.append(self.vae.kl(posterior, z))
        kl = torch.cat(kls).mean(0)
        centre, spread = (torch.from_numpy(moments.compute()[name]).float() for name in ("latent_mean", "latent_std"))
        return Encoded(torch.cat(means), kl if len(kl) == self.vae.latent_dim else None, centre, spread)

    def prior(self, name: Any = None) -> tuple[Prior, Tensor]:
        """The prior of training, or the one that `vae.fit_prior` kept as `name`, and PRIOR_DRAWS draws from it.

        Raises VAEError for one that is not there, is not of this run, or is a link out of its folder.
        """
        folder = self.run.path.resolve()
        files = [folder / "priors" / str(name) / file for file in ("config.json", "weights.pt")] if name else []
        if not all(file.resolve().is_relative_to(folder) for file in files):
            raise VAEError(f"{name} is a link out of the run's folder.")
        key = str(name or ""), max((file.stat().st_mtime_ns for file in files if file.is_file()), default=0)
        if key not in self._priors:
            prior = read_prior(folder, name, self.vae) if name else self.vae.prior
            draws = prior.sample(PRIOR_DRAWS, generator(0, "latents prior")).detach()
            self._priors = {old: kept for old, kept in self._priors.items() if old[0] != key[0]} | {key: (prior, draws)}
        return self._priors[key]

    # --- the whole latent space -------------------------------------------------------------------------------------

    def summary(self) -> dict[str, Any]:
        """Latents in the order in which they are shown: by KL, or without one by the variance of the posterior mean.

        map: (c, h, w) where the latent is one, and channels: its channels in their order, by the sum over their places.
        """
        variance = self.encoded.mean.var(0, correction=0)
        by = variance if self.encoded.kl is None else self.encoded.kl
        height, width = thumbnails(self.examples.x).shape[-2:]
        shape = list(self.vae.latent_shape) if self.vae.spatial else None
        by_channel = by.reshape(shape[0], -1).sum(1) if shape else torch.zeros(0)
        return {
            "latents": self.vae.latent_dim,
            "map": shape,
            "channels": by_channel.argsort(descending=True).tolist(),
            "shape": list(self.run.image_shape),
            "classes": self.vae.num_classes,
            "priors": prior_names(self.run.path),
            "kl": None if self.encoded.kl is None else self.encoded.kl.tolist(),
            "mean": self.encoded.centre.tolist(),
            "std": self.encoded.spread.tolist(),
            "active": (variance > ACTIVE_UNIT_THRESHOLD).tolist(),
            "order": by.argsort(descending=True).tolist(),
            "examples": self.examples.what,
            "labels": self.examples.colours,
            "thumbnail": {"width": width, "height": height, "columns": COLUMNS},
        }

    def thumbnails(self) -> bytes:
        """All examples as one PNG, COLUMNS a row."""
        return png(make_grid(thumbnails(self.examples.x), nrow=COLUMNS, padding=0))

    def plane(self, axes: Any, prior: Any = None) -> dict[str, Any]:
        """The examples in a plane, p(z) = ((z - origin) . right, (z - origin) . up).

        axes: two latents, or "pca". prior: as in `prior`. density: of its projection, as a kernel estimate of PRIOR_DRAWS
        draws, rows upwards from the extent's lower left corner, its largest value 1.
        """
        mean, dimension = self.encoded.mean, self.vae.latent_dim
        directions = torch.zeros(2, dimension)
        if axes == "pca":
            origin = mean.mean(0)
            components = torch.linalg.svd(mean - origin, full_matrices=False).Vh[:2]
            directions[: len(components)] = components
        else:
            if not isinstance(axes, list) or len(axes) != 2:
                raise VAEError("axes are two latents, or pca.")
            origin = torch.zeros(dimension)
            for row, axis in enumerate(axes):
                if row == 0 or axis != axes[0]:  # a single latent has a line for its plane
                    directions[row, whole("axes", axis, 0, dimension - 1)] = 1
        points, draws = ((z - origin) @ directions.T for z in (mean, self.prior(prior)[1]))
        both = torch.cat([points, draws])
        low, high = both.quantile(0.002, 0), both.quantile(0.998, 0)
        low, high = torch.minimum(low, points.amin(0)) - 0.2, torch.maximum(high, points.amax(0)) + 0.2
        kernels = []
        for k in range(2):
            width = max(1e-3, float(draws[:, k].std()) * len(draws) ** (-1 / 6))  # Scott's rule
            centres = low[k] + (torch.arange(SIDE) + 0.5) / SIDE * (high[k] - low[k])
            kernels.append(torch.exp(-0.5 * ((draws[:, k : k + 1] - centres) / width) ** 2))
        density = kernels[1].T @ kernels[0]
        return {
            "origin": origin.tolist(),
            "right": directions[0].tolist(),
            "up": directions[1].tolist(),
            "points": points.tolist(),
            "low": low.tolist(),
            "high": high.tolist(),
            "density": (density / density.max().clamp(min=1e-30)).tolist(),
        }

    def point(self, index: Any) -> dict[str, Any]:
        """Where an example lies."""
        index = whole("index", index, 0, len(self.examples.x) - 1)
        y = None if self.examples.y is None else int(self.examples.y[index])
        return {"z": self.encoded.mean[index].tolist(), "y": y}

    def draw(self, seed: Any, temperature: Any, prior: Any = None) -> dict[str, Any]:
        """A draw from the prior, its distance from the prior's mean times the temperature. prior: as in `prior`."""
        if not isinstance(temperature, int | float) or not 0 <= temperature <= 10:
            raise VAEError("The temperature lies in 0 to 10.")
        own, draws = self.prior(prior)
        z = own.sample(1, generator(whole("seed", seed, 0), "latents draw")).detach()
        centre = torch.zeros(()) if isinstance(own, StandardNormal) else draws.mean(0)
        return {"z": (centre + temperature * (z - centre))[0].tolist()}

    # --- single images ----------------------------------------------------------------------------------------------

    def decode(self, z: Any, y: Any = None) -> dict[str, Any]:
        """Mean images at z (N, D)."""
        return {"images": [url(image) for image in as_rgb(self._images(z, y))]}

    def walk(self, a: Any, b: Any, steps: Any, path: Any, y: Any = None) -> dict[str, Any]:
        """From latent a to latent b, both included; path: straight, or spherical (Shoemake 1985), which turns at an even pace
        from the one's direction to the other's."""
        start, end = self._latents([a, b])
        weight = torch.linspace(0, 1, whole("steps", steps, 2, BATCH))[:, None]
        z = torch.lerp(start, end, weight)
        if choose("path", path, ("straight", "spherical")) == "spherical":
            cosine = F.cosine_similarity(start, end, dim=0).clamp(-1, 1)
            angle = torch.arccos(cosine)
            if 1e-4 < angle < math.pi - 1e-4:
                z = (torch.sin((1 - weight) * angle) * start + torch.sin(weight * angle) * end) / torch.sin(angle)
        return {"z": z.tolist(), **self.decode(z.tolist(), y)}

    @torch.no_grad()
    def encode(self, content: bytes, y: Any = None) -> dict[str, Any]:
        """An image file: its posterior mean and reconstruction; rate per latent and distortion (over DRAWS draws) in nats;
        the nearest examples by the distance of posterior means."""
        x = self.run.images(opened(content, self.run.image_shape))
        label = self.run._labels(self._label(y), 1)
        posterior = self.vae.encode(x, label)
        z = posterior.rsample(generator(0, "latents upload"), (DRAWS,))
        out = self.vae.measure(x, posterior, z, label)
        rate = out.kl.mean(0) if out.kl.ndim == 3 else out.kl
        distance, nearest = torch.cdist(posterior.mean, self.encoded.mean)[0].sort()
        return {
            "z": posterior.mean[0].tolist(),
            "rates": rate[0].tolist() if rate.shape[1] == self.vae.latent_dim else None,
            "rate": float(rate.sum()),
            "distortion": float(out.distortion.mean()),
            "image": url(as_rgb(x)[0]),
            "reconstruction": url(as_rgb(self.run.reconstruct(x, self._label(y)))[0]),
            "neighbours": [{"index": int(i), "distance": float(distance[k])} for k, i in enumerate(nearest[:8])],
        }

    def file(self, z: Any, y: Any, format: Any) -> tuple[bytes, str]:
        """Decoded images as a PNG (a row of them), an NPZ (`z`, `images` and the label `y`) or a GIF there and back."""
        choose("format", format, ("png", "npz", "gif"))
        images = self._images(z, y)
        if format == "npz":
            file = io.BytesIO()
            np.savez(file, z=self._latents(z).numpy(), images=images.numpy(), y=-1 if y is None else y)
            return file.getvalue(), "application/octet-stream"
        if format == "png":
            return png(grid(images, len(images)) if len(images) > 1 else as_rgb(images)[0]), "image/png"
        return gif(images), "image/gif"

    # --- what comes in ----------------------------------------------------------------------------------------------

    def _images(self, z: Any, y: Any) -> Tensor:
        return self.run.decode(self._latents(z), self._label(y))

    def _label(self, y: Any) -> int | None:
        return whole("y", y, 0, max(0, self.vae.num_classes - 1), optional=True)

    def _latents(self, z: Any) -> Tensor:
        try:
            latents = torch.tensor(z, dtype=torch.float32)
        except (TypeError, ValueError, RuntimeError) as error:
            raise VAEError("z is no list of latents.") from error
        if latents.ndim != 2 or not 1 <= len(latents) <= BATCH or latents.shape[1] != self.vae.latent_dim:
            raise VAEError(f"z has 1 to {BATCH} rows of {self.vae.latent_dim} latents, not {tuple(latents.shape)}.")
        if not latents.isfinite().all():
            raise VAEError("z must be finite.")
        return latents
