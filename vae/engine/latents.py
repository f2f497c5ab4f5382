"""The latents of a split in a file, a batch in memory at a time."""

from __future__ import annotations

import os
import shutil
import tempfile
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm.auto import tqdm

from vae.codes import CodePosterior
from vae.data.module import ImageDataModule
from vae.engine.loading import LoadedRun
from vae.errors import VAEError
from vae.gaussian import DiagonalGaussian
from vae.seeding import generator


def write_latents(run: LoadedRun, data: ImageDataModule, split: str, out: Path) -> int:
    """Encode a split into a file and return how many images it has.

    .npz: `mean` and, of a diagonal Gaussian posterior, `log_var` (N, D), one draw `z` (N, D) with the noise of evaluation,
    of codes `codes` (N, m), `label` (N, ...) and `name` (N,) where there are any, and `latent_mean`, `latent_std` (D,):
    those of z over the split and the posterior's noise, which a second model needs to scale its input. Where the latent is a
    map, there are also its `latent_shape` (c, h, w), to which the D numbers are reshaped, and `channel_mean`, `channel_std`
    (c,). .parquet: a row per image with the columns id, mean_0 ..., and those of the whole split as metadata. Raises VAEError
    for images of another shape or another ending.
    """
    if data.image_shape != run.image_shape:
        raise VAEError(f"This model takes images {run.image_shape}, and those of the data are {data.image_shape}.")
    if out.suffix not in (".npz", ".parquet"):
        raise VAEError(f"out={out} must end in .npz or .parquet.")
    out.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=out.parent, prefix=f".{out.name}.", suffix=".tmp")
    os.close(handle)
    try:
        images = data.measured(split)
        moments = Moments(run.vae.latent_dim, run.latent_shape)
        rows = _rows(run, data, split, moments)
        write = _write_npz if out.suffix == ".npz" else _write_parquet
        write(Path(temporary), rows, len(images), images.names, moments)
        os.replace(temporary, out)
    finally:
        Path(temporary).unlink(missing_ok=True)
    return len(images)


class Moments:
    """Mean and variance of z over images and the posterior's noise: Var z = Var mean + E var (law of total variance).

    latent_shape: (c, h, w) of a latent that is a map; then also over the places of each channel.
    """

    def __init__(self, latent_dim: int, latent_shape: tuple[int, ...] = ()) -> None:
        self.latent_shape = latent_shape
        self.count, self.sums = 0, torch.zeros(3, latent_dim, dtype=torch.float64)

    def add(self, mean: Tensor, var: Tensor) -> None:
        mean, var = mean.double().cpu(), var.double().cpu()
        self.count += len(mean)
        self.sums += torch.stack([mean.sum(0), mean.square().sum(0), var.sum(0)])

    def compute(self) -> dict[str, np.ndarray]:
        mean, square, var = self.sums / self.count
        found = {"latent_mean": mean, "latent_std": self._std(mean, square, var)}
        if len(self.latent_shape) > 1:
            by_channel = [value.reshape(self.latent_shape[0], -1).mean(1) for value in (mean, square, var)]
            found |= {"channel_mean": by_channel[0], "channel_std": self._std(*by_channel)}
            found["latent_shape"] = torch.tensor(self.latent_shape)
        return {name: value.numpy() for name, value in found.items()}

    @staticmethod
    def _std(mean: Tensor, square: Tensor, var: Tensor) -> Tensor:
        return (square - mean.square() + var).clamp(min=0).sqrt()


@torch.no_grad()
def _rows(run: LoadedRun, data: ImageDataModule, split: str, moments: Moments) -> Iterator[dict[str, np.ndarray]]:
    total = -(-len(data.measured(split)) // data.eval_batch_size)
    for batch in tqdm(data.batches(split), total=total, unit="batch", disable=None, leave=False):
        y = batch.y.to(run.device) if run.vae.num_classes and batch.y is not None else None
        posterior = run.vae.encode(batch.x.to(run.device), y)
        z = posterior.rsample(generator(batch.seed, "z", device=run.device))
        found: dict[str, Tensor] = {"mean": posterior.mean, "z": z}
        if isinstance(posterior, DiagonalGaussian):
            found["log_var"] = posterior.log_var
            moments.add(posterior.mean, posterior.log_var.exp())
        else:
            moments.add(z, torch.zeros_like(z))
        if isinstance(posterior, CodePosterior):
            found["codes"] = posterior.indices
        if batch.y is not None:
            found["label"] = batch.y
        yield {name: value.cpu().numpy() for name, value in found.items()}


def _write_npz(path: Path, rows: Any, n: int, names: Any, moments: Moments) -> None:
    folder = Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name}."))
    try:
        arrays: dict[str, np.ndarray] = {}
        done = 0
        for part in rows:
            size = len(part["mean"])
            for name, value in part.items():
                if name not in arrays:
                    shape = (n, *value.shape[1:])
                    arrays[name] = np.lib.format.open_memmap(folder / f"{name}.npy", "w+", value.dtype, shape)
                arrays[name][done : done + size] = value
            done += size
        if names is not None:
            np.save(folder / "name.npy", np.array(list(names)))
        for name, value in moments.compute().items():
            np.save(folder / f"{name}.npy", value)
        del arrays
        with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED, allowZip64=True) as file:
            for array in sorted(folder.glob("*.npy")):
                file.write(array, array.name)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _write_parquet(path: Path, rows: Any, n: int, names: Any, moments: Moments) -> None:
    try:
        import pyarrow as pa
        import pyarrow.parquet as pq
    except ImportError as error:
        raise VAEError("Parquet files need pyarrow: pip install pyarrow.") from error
    writer, done, schema = None, 0, None
    with tempfile.NamedTemporaryFile(dir=path.parent, prefix=f".{path.name}.", delete=False) as file:
        body = Path(file.name)
    try:
        for part in rows:
            size = len(part["mean"])
            columns: dict[str, Any] = {"id": np.arange(done, done + size)}
            if names is not None:
                columns["name"] = list(names[done : done + size])
            for name, value in part.items():
                if value.ndim == 1:
                    columns[name] = value
                else:
                    columns |= {f"{name}_{i}": value[:, i] for i in range(value.shape[1])}
            table = pa.table(columns)
            schema = schema or table.schema
            writer = writer or pq.ParquetWriter(body, schema)
            writer.write_table(table)
            done += size
        if writer is not None:
            scales = {name: value.tolist() for name, value in moments.compute().items()}
            writer.add_key_value_metadata({name: str(value) for name, value in scales.items()})
            writer.close()
        os.replace(body, path)
    finally:
        body.unlink(missing_ok=True)
