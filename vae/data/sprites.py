"""dSprites (Matthey et al. 2017): white sprites on black, one image for every combination of five generative factors.

`sprites` draws them again from the geometry of the original, `dsprites` downloads the original; both give a `FactorGrid`.

Two traps for whoever measures disentanglement here. Orientation 39 is a full turn and the same image as orientation 0,
so at most 39 orientations can be told apart. Square and ellipse are symmetric (but for rounding), so that their
orientation cannot be identified, and no metric reaches its ceiling.
"""

from __future__ import annotations

import hashlib
import math
import zipfile
import zlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from vae.data.images import ImageSet, Splits
from vae.data.sources import Root
from vae.data.storage import cache_folder, cached_bits, check, expanded, fetch, open_bits, reason
from vae.errors import VAEError
from vae.seeding import generator

FACTORS = {"shape": 3, "scale": 6, "orientation": 40, "x": 32, "y": 32}  # row-major: y varies fastest
SHAPES = ("square", "ellipse", "heart")
CACHE_ABOVE = 100_000  # images; fewer are drawn as fast as they are read back
DRAWING = 2  # in the names of cache files; raised whenever the same factors are drawn differently
WHITE_PIXELS = 128_328_862  # of the original; the drawing here has 2 more, where a tie falls the other way

DSPRITES_FILE = "dsprites_ndarray_co1sh3sc6or40x32y32_64x64.npz"
DSPRITES_URL = f"https://github.com/google-deepmind/dsprites-dataset/raw/master/{DSPRITES_FILE}"
DSPRITES_MD5 = "7da33b31b13a06f4b04a70402ce90c2e"


# A grid of factors


class FactorGrid(ImageSet):
    """Every combination of generative factors and its binary image: an `ImageSet` whose labels are the factors.

    Images are bits, eight to a byte, in row-major order of the factors; they are unpacked a batch at a time. A factor
    is an index below its size; `factor_values[k][i]` is the place of index i of factor k in the full grid.
    A grid that lies in a cache file is pickled as that file's name.
    """

    def __init__(self, bits: np.ndarray, factor_values: Mapping[str, tuple[int, ...]], size: int = 64) -> None:
        """bits: uint8 (N, size * size / 8), N the product of the numbers of values."""
        self.factor_names = tuple(factor_values)
        self.factor_values = tuple(factor_values.values())
        self.factor_sizes = tuple(len(values) for values in self.factor_values)
        self.shape = (1, size, size)
        self._strides = torch.tensor([math.prod(self.factor_sizes[k + 1 :]) for k in range(len(self.factor_sizes))])
        self._file = getattr(bits, "filename", None)  # of a memory map
        self._bits = np.asarray(bits)
        if bits.shape != (len(self), size * size // 8):
            raise ValueError(f"{bits.shape} bytes do not hold {len(self)} images of {size} x {size} bits")

    def __len__(self) -> int:
        return math.prod(self.factor_sizes)

    def factors(self, index: Tensor) -> Tensor:
        """index (...) -> the factors of those images, int64 (..., F)."""
        return index.unsqueeze(-1) // self._strides % torch.tensor(self.factor_sizes)

    def index(self, factors: Tensor) -> Tensor:
        """factors int64 (..., F) -> index (...). Raises VAEError for a factor out of range."""
        if (
            factors.shape[-1] != len(self.factor_sizes)
            or ((factors < 0) | (factors >= torch.tensor(self.factor_sizes))).any()
        ):
            raise VAEError(f"Factors must be below {dict(zip(self.factor_names, self.factor_sizes, strict=True))}.")
        return (factors * self._strides).sum(-1)

    def sample_factors(self, n: int, generator: torch.Generator) -> Tensor:
        """n independent draws, uniform over the grid: int64 (n, F)."""
        return self.factors(torch.randint(len(self), (n,), generator=generator))

    def images(self, factors: Tensor) -> Tensor:
        """factors (n, F) -> uint8 (n, 1, H, W), values 0 and 255."""
        return self._unpacked(self.index(factors))

    def gather(self, index: Tensor) -> tuple[Tensor, Tensor]:
        """index (n,) -> images uint8 (n, 1, H, W), values 0 and 255, and their factors int64 (n, F)."""
        return self._unpacked(index), self.factors(index)

    def _unpacked(self, index: Tensor) -> Tensor:
        # NumPy: 2048 images take 1 ms, a table of bytes in torch twice that
        pixels = np.unpackbits(self._bits[index.cpu().numpy()], axis=1)
        return torch.from_numpy(pixels).mul_(255).view(-1, *self.shape)

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | ({"_bits": self._bits.shape} if self._file else {})

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        if self._file:
            bits = open_bits(Path(self._file), state["_bits"])
            if bits is None:
                raise VAEError(f"The cache {self._file} is missing or damaged: load the data set again.")
            self._bits = np.asarray(bits)


@dataclass
class FactorSplit(ImageSet):
    """Some images of a grid, by their index into it; the whole of it stays within reach as `grid`."""

    grid: FactorGrid = field()
    rows: Tensor  # int64 (n,)

    def __post_init__(self) -> None:
        self.shape = self.grid.shape

    def __len__(self) -> int:
        return len(self.rows)

    def gather(self, index: Tensor) -> tuple[Tensor, Tensor]:
        """As `FactorGrid.gather`."""
        return self.grid.gather(self.rows[index])

    def subset(self, index: Tensor) -> FactorSplit:
        return FactorSplit(self.grid, self.rows[index])


def split_grid(grid: FactorGrid, val_size: int | None = None, test_size: int | None = None, seed: int = 0) -> Splits:
    """Validation and test drawn from the grid by `seed`, a tenth of it each and at most 10,000 images unless said.

    Each lies in the order of the draw, not of the grid, so that its first n images are a fair sample of all factors.
    """
    held_out = [min(10_000, max(1, len(grid) // 10)) if size is None else size for size in (test_size, val_size)]
    if min(held_out) < 1 or sum(held_out) >= len(grid):
        raise VAEError(f"{held_out[1]} + {held_out[0]} images cannot be held out of a grid of {len(grid)}.")
    order = torch.randperm(len(grid), generator=generator(seed, "split"))
    # copies, for a view would be pickled with the whole order
    test, val, train = (rows.clone() for rows in order.split([*held_out, len(grid) - sum(held_out)]))
    return Splits(*(FactorSplit(grid, rows) for rows in (train, val, test)))


Subset = Mapping[str, int | Iterable[int]]


def chosen_values(subset: Subset | None) -> dict[str, tuple[int, ...]]:
    """The indices of the full grid that are kept, by factor.

    A number n of values keeps n at even distances: of shape, scale, x and y, of size S, index k (S - 1) / (n - 1),
    rounded (halves up), for k = 0..n-1, so both ends, and the middle, S // 2, if n = 1; of orientation floor(39 k / n),
    so that the full turn is not met twice (all 40 if n = 40). A list keeps those indices. Raises VAEError otherwise.
    """
    for name in dict(subset or {}):
        if name not in FACTORS:
            raise VAEError(f"data.source.subset has no factor {name!r}: choose among {', '.join(FACTORS)}.")
    return {name: _chosen(name, (subset or {}).get(name, size)) for name, size in FACTORS.items()}


def _chosen(name: str, choice: int | Iterable[int]) -> tuple[int, ...]:
    size = FACTORS[name]
    if not isinstance(choice, int):
        values = tuple(choice)
        if not values or len(set(values)) < len(values) or not set(values) <= set(range(size)):
            raise VAEError(
                f"data.source.subset.{name} must list different indices from 0 to {size - 1}, not {list(values)}."
            )
        return values
    if not 1 <= choice <= size:
        raise VAEError(f"data.source.subset.{name}={choice} must lie between 1 and {size}, or list indices.")
    if choice == size:
        return tuple(range(size))
    if name == "orientation":
        return tuple(39 * k // choice for k in range(choice))
    if choice == 1:
        return (size // 2,)
    return tuple((2 * k * (size - 1) + choice - 1) // (2 * (choice - 1)) for k in range(choice))


# Drawn again


def sprites(
    root: Root | None = None,
    subset: Subset | None = None,
    size: int = 64,
    val_size: int | None = None,
    test_size: int | None = None,
    seed: int = 0,
    cache: Root | None = None,
) -> Splits:
    """dSprites re-rendered, splits of a `FactorGrid`. x (1, size, size), y the five factors. `root` is not needed.

    subset: how many values of each factor, or which, e.g. {"orientation": 13, "x": 16, "y": 16} (see `chosen_values`).
    size: 64, or a multiple of 8 below it, for the same sprites on fewer pixels. Grids of more than 100,000 images are
    kept in the folder `cache`, the user's cache folder if not given (the whole grid: 377 MB).
    """
    if size not in range(16, 65, 8):
        raise VAEError(f"data.source.size={size} must be a multiple of 8 from 16 to 64.")
    values = chosen_values(subset)
    shape = (math.prod(map(len, values.values())), size * size // 8)
    if shape[0] <= CACHE_ABOVE:
        bits = render_grid(values, size)
    else:
        name = hashlib.blake2b(repr((DRAWING, values)).encode(), digest_size=6).hexdigest()
        folder = expanded(cache) if cache else cache_folder()
        bits = cached_bits(folder / f"sprites-{size}-{name}.bits", shape, lambda: render_grid(values, size))
    return split_grid(FactorGrid(bits, values, size), val_size, test_size, seed)


def outlines() -> tuple[np.ndarray, ...]:
    """Vertices (V, 2) of square, ellipse and heart, in pixels of 64 about the sprite's position, y downwards.

    At scale factor 1 and orientation 0. Constants fitted to images of the original: with them every frame of the
    animation that its authors published (dsprites.gif) is met in every pixel.
    """
    square = 9.6 * np.array([(-1, -1), (1, -1), (1, 1), (-1, 1)])
    a = 2 * np.pi * np.arange(100) / 100
    ellipse = 9.6 * np.stack([1.33 * np.cos(a), np.sin(a) / 1.33], axis=1)
    t = 2 * np.pi * np.arange(150) / 150
    up = 13 * np.cos(t) - 5 * np.cos(2 * t) - 2 * np.cos(3 * t) - np.cos(4 * t)
    heart = np.stack([19.2 / 32 * 16 * np.sin(t) ** 3, -19.2 / 29 * up - 1.44], axis=1)
    return square, ellipse, heart


def render_grid(values: Mapping[str, Iterable[int]], size: int = 64) -> np.ndarray:
    """Packed images uint8 (N, size * size / 8) of the product of these indices of the factors, row-major."""
    shapes, scales, orientations, x, y = (np.array(tuple(values[name])) for name in FACTORS)
    turns = [(a, b, c) for a in shapes for b in scales for c in orientations]
    bits = np.empty((len(turns), len(x) * len(y), size * size // 8), np.uint8)
    polygons = outlines()
    for image, (shape, scale, orientation) in zip(bits, turns, strict=True):
        image[:] = render(polygons[shape], scale, orientation, x, y, size).reshape(image.shape)
    return bits.reshape(-1, bits.shape[-1])


def render(
    polygon: np.ndarray, scale: int, orientation: int, x: np.ndarray, y: np.ndarray, size: int = 64
) -> np.ndarray:
    """One turned sprite at all positions (x, y): packed rows uint8 (len(x), len(y), size, size / 8).

    A pixel is white iff its centre lies inside the polygon, whose vertices are rounded to 1/256 pixel once moved to
    their place; a centre on an edge is inside on the left and outside on the right, as in the original. The lower end of
    an edge belongs to it, the upper does not. All in integers from there on.
    """
    angle = 2 * np.pi * orientation / 39
    px, py = (0.5 + 0.1 * scale) * polygon.T
    unit = 256 * size / 64
    # vertices (positions, V): those across depend on x alone, those down on y alone
    across = np.rint((px * np.cos(angle) + py * np.sin(angle) + 16 + 32 * x[:, None] / 31) * unit).astype(np.int64)
    down = np.rint((py * np.cos(angle) - px * np.sin(angle) + 16 + 32 * y[:, None] / 31) * unit).astype(np.int64)
    across_next, down_next = np.roll(across, -1, axis=1), np.roll(down, -1, axis=1)

    # Each edge crosses the centre lines of rows above + 1 .. above + crossings; one entry for every crossing.
    above = (np.minimum(down, down_next) - 128) // 256
    crossings = (np.maximum(down, down_next) - 128) // 256 - above
    place, edge = np.divmod(np.repeat(np.arange(crossings.size), crossings.ravel()), len(polygon))
    first = np.cumsum(crossings) - crossings.ravel()
    row = above[place, edge] + 1 + np.arange(len(place)) - np.repeat(first, crossings.ravel())
    line = place * size + row
    order = np.argsort(line, kind="stable")
    place, edge, row, line = place[order], edge[order], row[order], line[order]

    # The first column whose centre lies on the crossing or right of it, for every x: (crossings, len(x)).
    rise = down_next[place, edge] - down[place, edge]
    run = (across_next - across).T[edge]
    ahead = np.sign(rise) * (256 * row + 128 - down[place, edge])
    rise = np.abs(rise)[:, None]
    column = -((128 * rise - across.T[edge] * rise - ahead[:, None] * run) // (256 * rise))

    # A crossing flips all pixels from there on: a row is the exclusive or of its crossings, 64 bits at once.
    flips = np.array([(1 << (64 - c)) - 1 for c in range(65)], np.uint64)[column]
    start = np.flatnonzero(np.diff(line, prepend=-1))
    rows = np.zeros((len(y) * size, len(x)), ">u8")
    rows[line[start]] = np.bitwise_xor.reduceat(flips, start, axis=0)
    return np.ascontiguousarray(rows.T).view(np.uint8).reshape(len(x), len(y), size, 8)[..., : size // 8]


# The original


def dsprites(
    root: Root,
    subset: Subset | None = None,
    val_size: int | None = None,
    test_size: int | None = None,
    seed: int = 0,
    cache: Root | None = None,
) -> Splits:
    """The original dSprites, fetched to root/dsprites (26 MB), its packed bits (377 MB) kept in `cache`; as `sprites`.

    Raises VAEError if the file is not the published one: by its MD5, and by its shape and number of white pixels.
    """
    path = fetch(expanded(root) / "dsprites" / DSPRITES_FILE, [DSPRITES_URL], DSPRITES_MD5)
    check(path, DSPRITES_MD5)
    whole, values = chosen_values(None), chosen_values(subset)
    sizes = tuple(FACTORS.values())
    shape = (math.prod(sizes), 512)
    folder = expanded(cache) if cache else cache_folder()
    bits = cached_bits(
        folder / f"dsprites-{DSPRITES_MD5[:8]}.bits", shape, lambda: packed_npz(path, shape[0], WHITE_PIXELS)
    )
    if values != whole:
        bits = np.asarray(bits).reshape(*sizes, 512)[np.ix_(*values.values())].reshape(-1, 512)
    return split_grid(FactorGrid(bits, values), val_size, test_size, seed)


def packed_npz(path: Path, images: int, white_pixels: int) -> np.ndarray:
    """The array `imgs` of an npz, uint8 (images, 64, 64) of 0 and 1, as packed bits (images, 512).

    Unzipped piece by piece, for whole it is 3 GB. Nothing else of the file is read: it also holds a pickle.
    """
    bits, white = np.empty((images, 512), np.uint8), 0
    try:
        with zipfile.ZipFile(path) as archive, archive.open("imgs.npy") as file:
            np.lib.format.read_magic(file)
            shape, fortran, dtype = np.lib.format.read_array_header_1_0(file)
            if shape != (images, 64, 64) or fortran or dtype != np.uint8:
                raise VAEError(f"{path} holds images {dtype} {shape}, not uint8 {(images, 64, 64)}.")
            for part in np.array_split(bits, max(1, images // 4096)):
                pixels = np.frombuffer(file.read(len(part) * 4096), np.uint8).reshape(-1, 4096)
                part[:] = np.packbits(pixels, axis=1)
                white += int(pixels.sum(dtype=np.int64))
    except (OSError, EOFError, KeyError, ValueError, zipfile.BadZipFile, zlib.error) as error:
        raise VAEError(f"{path} is damaged or truncated ({reason(error)}).") from error
    if white != white_pixels:
        raise VAEError(f"{path} has {white} white pixels where the original has {white_pixels}.")
    return bits
