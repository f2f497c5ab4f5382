"""A trained run in Python: `vae.load(folder)` and what one does with it. Needs neither its data nor Hydra nor Lightning."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import yaml
from torch import Tensor

from vae.engine.assemble import ImageFacts, assemble, make_trusted, without_start
from vae.engine.stored import read_checkpoint, renewed
from vae.errors import VAEError, choose
from vae.files import refuse_aliases
from vae.model import VAE, Posterior
from vae.seeding import generator

if TYPE_CHECKING:
    from vae.data.module import ImageDataModule


def load(path: str | Path, device: str | torch.device = "cpu", trust: bool = False) -> LoadedRun:
    """A finished run, from its folder or an exported one: the weights that were tested, in evaluation mode, without gradients.

    trust: import and call classes of other packages that the config names; this package's own always are. No code in the
    checkpoint is ever run. Raises VAEError for a folder that holds no finished run.
    """
    return LoadedRun(Path(path), device, trust)


class LoadedRun:
    """A trained model with its config and metrics.

    Images go in as uint8 or as floats in [0, 1]: arrays, tensors, PIL images or lists of them, one (C, H, W), (H, W) or
    (H, W, C), or a batch (N, C, H, W). They come out as float tensors (N, C, H, W) in [0, 1], without gradients: mean images,
    without the likelihood's noise, cut to [0, 1], which the mean of a Gaussian or a Laplace may leave; `vae.mean_image` is not
    cut. Labels y, (N,) class indices, are needed by label-conditional models alone.
    """

    def __init__(self, path: Path, device: str | torch.device = "cpu", trust: bool = False) -> None:
        self.path, self.exported = path, (path / "model.safetensors").is_file()
        self._trust = choose("trust", trust, (False, True))
        #: The run's resolved config, as nested dictionaries.
        self.config: dict[str, Any] = self._read_config()
        #: What training wrote of the data and the likelihood (facts.json).
        self.facts: dict[str, Any] = self._read_facts()
        try:
            facts = ImageFacts(
                tuple(self.facts["image_shape"]), self.facts["num_classes"], self.facts.get("latent_label", False)
            )
        except (KeyError, TypeError) as error:
            raise VAEError(f"{path}: the facts of the run are damaged.") from error

        def grey(n: int) -> Tensor:
            return torch.full((n, *facts.image_shape), 0.5)  # in place of training images: the weights replace it

        with torch.random.fork_rng(devices=[]):
            vae = assemble(without_start(self.config), facts, grey, partial(make_trusted, trust=trust))
        try:
            vae.load_state_dict(self._read_weights())
        except RuntimeError as error:
            raise VAEError(f"The weights in {path} are of another model than its config describes.") from error
        #: The model, in evaluation mode, its parameters without gradients.
        self.vae: VAE = vae.eval().requires_grad_(False).to(device)
        self.device, self.image_shape = torch.device(device), facts.image_shape
        #: (c, h, w) of a latent that is a map: `z.unflatten(1, run.latent_shape)`; (D,) of a flat one.
        self.latent_shape: tuple[int, ...] = vae.latent_shape

    # --- what is read -----------------------------------------------------------------------------------------------

    def _read_config(self) -> dict[str, Any]:
        if self.exported:
            return self._card["config"]
        path = self.path / "config.yaml"
        if not path.is_file():
            raise VAEError(f"{self.path} is not a run folder: it has no config.yaml.")
        try:
            text = path.read_text(encoding="utf-8")
            refuse_aliases(text)
            return renewed(yaml.safe_load(text))
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            raise VAEError(f"{path} is damaged and cannot be read.") from error

    @cached_property
    def _card(self) -> dict[str, Any]:
        return _read_json(self.path / "config.json")

    def _read_facts(self) -> dict[str, Any]:
        if self.exported:
            return self._card["facts"]
        if (self.path / "facts.json").is_file():
            return _read_json(self.path / "facts.json")
        from vae.engine.build import image_facts  # of a run that an earlier version made: from its data

        return asdict(image_facts(self.data, make_trusted(self.config["objective"], "objective", self._trust)))

    def _read_weights(self) -> dict[str, Tensor]:
        if self.exported:
            try:
                from safetensors.torch import load_file
            except ImportError as error:
                raise VAEError("An exported model needs safetensors: pip install 'vae[export]'.") from error
            return load_file(self.path / "model.safetensors")
        weights = read_checkpoint(self.path / "checkpoints" / "best.ckpt")["state_dict"]
        return {key.removeprefix("vae."): value for key, value in weights.items() if key.startswith("vae.")}

    @cached_property
    def metrics(self) -> dict[str, float]:
        """What training measured (metrics.json), by name; names say the split, and nats unless they say otherwise."""
        if self.exported:
            return self._card["metrics"]
        path = self.path / "metrics.json"
        return _read_json(path) if path.is_file() else {}

    @cached_property
    def data(self) -> ImageDataModule:
        """The run's data set, loaded on first use. Raises VAEError where it is not to be found."""
        if self.exported:
            raise VAEError(f"{self.path} is an exported model, which has no data set.")
        from omegaconf import OmegaConf

        from vae.engine.folder import read_config

        config: Any = OmegaConf.to_container(read_config(self.path), resolve=True)
        data = make_trusted({**config["data"], "seed": config["seed"]}, "data", self._trust)
        data.setup()
        return data

    def with_prior(self, name: str) -> LoadedRun:
        """The same run with the prior that `python -m vae.fit_prior` kept as `name`. Raises VAEError if it is not there."""
        from vae.engine.fitted_priors import read_prior

        run = LoadedRun(self.path, self.device, self._trust)
        run.vae.prior = read_prior(self.path, name, run.vae)
        return run

    # --- what goes in -----------------------------------------------------------------------------------------------

    def images(self, images: Any) -> Tensor:
        """Images of any accepted form as (N, C, H, W) floats in [0, 1]. Raises VAEError for another shape or range."""
        if isinstance(images, Sequence) and not isinstance(images, str | bytes):
            return torch.cat([self.images(image) for image in images])
        channels, height, width = self.image_shape
        x = torch.as_tensor(images if isinstance(images, Tensor) else np.array(images))
        last = (height, width, channels)
        if x.ndim == 2:
            x = x[None]
        elif tuple(x.shape[-3:]) == last and last != self.image_shape:
            x = x.movedim(-1, -3)
        if x.ndim == 3:
            x = x[None]
        if x.ndim != 4 or tuple(x.shape[1:]) != self.image_shape:
            raise VAEError(f"This model takes images (C, H, W) = {self.image_shape}, not {tuple(np.shape(images))}.")
        if x.dtype == torch.uint8:
            x = x / 255
        elif not x.is_floating_point():
            raise VAEError(f"Images are uint8, or floats in [0, 1], not {str(x.dtype).removeprefix('torch.')}.")
        if not (x >= 0).all() or not (x <= 1).all():
            raise VAEError(f"Float images lie in [0, 1], not between {float(x.min()):g} and {float(x.max()):g}.")
        return x.float().to(self.device)

    def _labels(self, y: Any, n: int) -> Tensor | None:
        classes = self.vae.num_classes
        if (y is None) != (classes == 0):
            needs = f"labels y, one of {classes} classes for each image" if classes else "no labels"
            raise VAEError(f"This model takes {needs}.")
        if y is None:
            return None
        labels = torch.as_tensor(y, device=self.device).reshape(-1).long().expand(n)
        if not ((labels >= 0) & (labels < classes)).all():
            raise VAEError(f"Labels of this model are 0 to {classes - 1}.")
        return labels

    # --- what comes out ---------------------------------------------------------------------------------------------

    @torch.no_grad()
    def sample(self, n: int = 1, seed: int = 0, y: Any = None) -> Tensor:
        """Mean images of n draws from the prior; the same for the same seed. y: (n,), or one for all."""
        noise = generator(seed, "samples", device=self.device)
        return self.vae.sample(n, noise, self._labels(y, n)).clamp(0, 1)

    @torch.no_grad()
    def encode(self, images: Any, y: Any = None) -> Posterior:
        """q(z|x) of each image: of a diagonal Gaussian `mean` and `log_var`, (N, D); of codes `indices` (N, m)."""
        x = self.images(images)
        return self.vae.encode(x, self._labels(y, len(x)))

    @torch.no_grad()
    def decode(self, z: Any, y: Any = None) -> Tensor:
        """Mean images at latents z (N, D), or (N, c, h, w) where the latent is a map. Raises VAEError for another shape."""
        z = torch.as_tensor(z, dtype=torch.float32, device=self.device)
        if tuple(z.shape[1:]) not in ((self.vae.latent_dim,), self.latent_shape):
            of = "" if len(self.latent_shape) == 1 else f", or (N, c, h, w) with (c, h, w) = {self.latent_shape}"
            raise VAEError(f"Latents of this model are (N, {self.vae.latent_dim}){of}, not {tuple(z.shape)}.")
        z = z.flatten(1)
        return self.vae.mean_image(z, self._labels(y, len(z))).clamp(0, 1)

    @torch.no_grad()
    def reconstruct(self, images: Any, y: Any = None) -> Tensor:
        """Mean images at each image's posterior mean."""
        x = self.images(images)
        return self.vae.reconstruct(x, self._labels(y, len(x))).clamp(0, 1)

    @torch.no_grad()
    def interpolate(self, a: Any, b: Any, steps: int = 8, y: Any = None) -> Tensor:
        """`steps` images on the straight line between the posterior means of images a and b, both ends included."""
        ends = [self.encode(image, y).mean for image in (a, b)]
        if any(len(end) != 1 for end in ends):
            raise VAEError("interpolate() takes two single images.")
        weight = torch.linspace(0, 1, steps, device=self.device)[:, None]
        return self.decode(torch.lerp(ends[0], ends[1], weight), y)

    @torch.no_grad()
    def traverse(
        self, image: Any, dims: Sequence[int] | None = None, reach: float = 3.0, steps: int = 11, y: Any = None
    ) -> Tensor:
        """One image decoded while one latent moves from -reach to reach: (len(dims), steps, C, H, W).

        dims: which latents, by default all. Raises VAEError where the latents are codes.
        """
        if self.vae.discrete:
            raise VAEError(
                "The latents of this run are codes, along which nothing moves: decode(vae.posterior.vectors(codes)) gives the "
                "images of any codes (N, m)."
            )
        mean = self.encode(image, y).mean
        if len(mean) != 1:
            raise VAEError("traverse() takes a single image.")
        dims = range(mean.shape[1]) if dims is None else dims
        if any(not -mean.shape[1] <= d < mean.shape[1] for d in dims):
            raise VAEError(f"dims lie in 0 to {mean.shape[1] - 1}, not {list(dims)}.")
        z = mean.repeat(len(dims), steps, 1)
        for row, dimension in enumerate(dims):
            z[row, :, dimension] = torch.linspace(-reach, reach, steps, device=self.device)
        return self.decode(z.flatten(0, 1), y).unflatten(0, (len(dims), steps))

    def _latent(self) -> str:
        spatial = len(self.latent_shape) > 1
        return f"latent_shape={self.latent_shape}" if spatial else f"latent_dim={self.vae.latent_dim}"

    def __repr__(self) -> str:
        target = {key: value for key, value in self.metrics.items() if key in ("test/elbo", "test/rate")}
        numbers = ", ".join(f"{key} {value:.2f}" for key, value in target.items())
        return f"LoadedRun({str(self.path)!r}, {self._latent()}{', ' + numbers if numbers else ''})"


def _read_json(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise VAEError(f"{path} is damaged and cannot be read.") from error
    if not isinstance(found, dict):
        raise VAEError(f"{path} is damaged: it holds no names and values.")
    return found
