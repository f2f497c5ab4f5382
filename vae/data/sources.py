"""Real data sets, one room: each is a function, `name(root) -> Splits` of uint8 images, fetched on first use.

Every function takes `root`, the folder that holds data sets in torchvision's layout, and splits off validation images
by `seed`; where a data set has official splits they are kept, and its test split is never touched. Labels are int64.
All raise VAEError, one sentence naming the file, where one is missing and cannot be fetched, damaged or truncated.
"""

from __future__ import annotations

import gzip
import math
import os
import pickle
import warnings
import zlib
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from vae.data.images import Images, ImageSet, Splits
from vae.data.storage import cache_folder, cached_bits, check, expanded, fetch, locked, reason, require_regular, unpack
from vae.errors import VAEError
from vae.files import write_atomically
from vae.seeding import generator

Root = str | os.PathLike[str]

# CRC-32 of the idx files, as it also stands at the end of their published .gz, whose MD5 torchvision knows
IDX_CRC = {
    "MNIST/train-images-idx3-ubyte": 0xE9F4D8B3,
    "MNIST/train-labels-idx1-ubyte": 0xE0CB4AD2,
    "MNIST/t10k-images-idx3-ubyte": 0x91373BDF,
    "MNIST/t10k-labels-idx1-ubyte": 0x4AB9EFF9,
    "FashionMNIST/train-images-idx3-ubyte": 0xB4F29F28,
    "FashionMNIST/train-labels-idx1-ubyte": 0x741A4657,
    "FashionMNIST/t10k-images-idx3-ubyte": 0x678FE0B1,
    "FashionMNIST/t10k-labels-idx1-ubyte": 0x80142C1F,
}
BINARIZED_MNIST_URL = "http://www.cs.toronto.edu/~larocheh/public/datasets/binarized_mnist"
BINARIZED_MNIST = {  # images and MD5 of each split
    "train": (50_000, "db28b1a6ae0fe70cbd3da91acf46e477"),
    "valid": (10_000, "bf37822a04e94123630de6a7dfd9c9ef"),
    "test": (10_000, "14e41ae11040adba6ab8cb291eda0dd8"),
}
FREY_URLS = ("https://cs.nyu.edu/~roweis/data/frey_rawface.mat", "http://www.cs.nyu.edu/~roweis/data/frey_rawface.mat")
FREY_MD5 = "7ee435166d628ecc0dcbc337dfba9cbe"


# Digits


def digits(root: Root | None = None, val_size: int = 200, test_size: int = 300, seed: int = 0) -> Splits:
    """The 1,797 handwritten 8x8 digits that ship with scikit-learn, split so that each class keeps its share.

    Their grey values 0..16 become round(255 v / 16). `root` is not needed. x (1, 8, 8), y the digit.
    """
    from sklearn.datasets import load_digits

    data = load_digits()
    x = torch.from_numpy(np.rint(data.images * (255 / 16)).astype(np.uint8)).unsqueeze(1)
    y = torch.from_numpy(data.target).long()
    train, test, val = stratified(y, [test_size, val_size], seed)
    return Splits(*(Images(x, y).subset(part) for part in (train, val, test)))


def stratified(y: Tensor, held_out: Sequence[int], seed: int) -> list[Tensor]:
    """Indices of what is left and of parts of these sizes held out, each ascending, in which every class of y (N,) has
    its share to within an image or two."""
    _check_sizes(len(y), *held_out)
    noise = generator(seed, "split")
    place = torch.empty(len(y), dtype=torch.double)
    for label in y.unique():
        members = (y == label).nonzero().squeeze(1)
        # the members of a class, shuffled, at even distances in (0, 1): any stretch of it takes each class's share
        place[members] = (torch.randperm(len(members), generator=noise).double() + 0.5) / len(members)
    *parts, rest = place.argsort(stable=True).split([*held_out, len(y) - sum(held_out)])
    return [part.sort().values for part in (rest, *parts)]


def hold_out(data: Images, val_size: int, seed: int) -> tuple[Images, Images]:
    """(train, val): `val_size` images drawn by `seed`; both keep the order of the data."""
    _check_sizes(len(data), val_size)
    order = torch.randperm(len(data), generator=generator(seed, "split"))
    return data.subset(order[val_size:].sort().values), data.subset(order[:val_size].sort().values)


def _check_sizes(total: int, *held_out: int) -> None:
    if min(held_out) < 1 or sum(held_out) >= total:
        raise VAEError(f"{' + '.join(map(str, held_out))} images cannot be held out of {total}: take 1 to {total - 1}.")


# The MNIST family: idx files


def mnist(root: Root, val_size: int = 5000, seed: int = 0, size: int = 28) -> Splits:
    """Handwritten digits (LeCun et al. 1998), 60,000 + 10,000. x (1, size, size), y the digit.

    size: 28, or 14 or 7 for the means of 2x2 or 4x4 pixels, rounded.
    """
    if size not in (28, 14, 7):
        raise VAEError(f"data.source.size={size} must be 28, 14 or 7.")
    splits = _mnist_like("MNIST", root, val_size, seed)
    return splits if size == 28 else Splits(*(_shrunk(split, 28 // size) for split in splits))


def _shrunk(images: Images, factor: int) -> Images:
    return Images(F.avg_pool2d(images.x.float(), factor).round().to(torch.uint8), images.y)


def fashion_mnist(root: Root, val_size: int = 5000, seed: int = 0) -> Splits:
    """Articles of clothing (Xiao et al. 2017), 60,000 + 10,000. x (1, 28, 28), y one of ten kinds."""
    return _mnist_like("FashionMNIST", root, val_size, seed)


def kmnist(root: Root, val_size: int = 5000, seed: int = 0) -> Splits:
    """Cursive Japanese characters (Clanuwat et al. 2018), 60,000 + 10,000. x (1, 28, 28), y one of ten."""
    return _mnist_like("KMNIST", root, val_size, seed)


def _mnist_like(name: str, root: Root, val_size: int, seed: int) -> Splits:
    folder = expanded(root) / name / "raw"
    parts = []
    for part in ("train", "t10k"):
        x, y = (_idx(folder, f"{part}-{file}-ubyte") for file in ("images-idx3", "labels-idx1"))
        if len(x) != len(y):
            raise VAEError(f"{folder / part}-labels-idx1-ubyte has {len(y)} labels for the {len(x)} images beside it.")
        parts.append(Images(x.unsqueeze(1), y))
    train, test = parts
    return Splits(*hold_out(train, val_size, seed), test)


def _idx(folder: Path, file: str) -> Tensor:
    """The uint8 tensor of an idx file `folder/file`, or of its .gz, which is fetched if neither is there.

    The format: bytes 0, 0, 8 (uint8), number of dimensions; each dimension, 4 bytes big-endian; the values.
    """
    path, name = folder / file, folder.parent.name
    require_regular(path)
    try:
        data = np.fromfile(path, np.uint8) if path.exists() else np.frombuffer(_unzipped(path, name), np.uint8)
    except OSError as error:
        raise VAEError(f"{path} cannot be read ({reason(error)}).") from error
    ndim = 3 if "idx3" in file else 1
    start = 4 + 4 * ndim
    if len(data) < start or bytes(data[:4]) != bytes((0, 0, 8, ndim)):
        raise VAEError(f"{path} is not an idx file of {ndim}-dimensional bytes: delete it and it is fetched again.")
    shape = data[4:start].view(">u4").tolist()
    if len(data) != (promised := start + math.prod(shape)):
        raise VAEError(
            f"{path} is damaged or truncated (its header promises {promised} bytes, it has {len(data)}): delete it and "
            "it is fetched again."
        )
    crc = IDX_CRC.get(f"{name}/{file}")
    if crc is not None and zlib.crc32(data) != crc:
        raise VAEError(f"{path} is damaged (its CRC-32 is not that of {name}): delete it and it is fetched again.")
    return torch.from_numpy(data[start:]).view(shape)


def _unzipped(path: Path, name: str) -> bytearray:
    from torchvision import datasets

    family = getattr(datasets, name)
    md5 = dict(family.resources)[f"{path.name}.gz"]
    packed = fetch(path.with_name(f"{path.name}.gz"), [f"{mirror}{path.name}.gz" for mirror in family.mirrors], md5)
    check(packed, md5)
    data = bytearray(gzip.decompress(packed.read_bytes()))
    with suppress(OSError):  # a read-only folder only costs the next start some time
        write_atomically(path, lambda file: file.write(data))
    return data


# Other sets held in memory


def binarized_mnist(root: Root, cache: Root | None = None) -> Splits:
    """Larochelle's one Bernoulli draw of MNIST (Larochelle & Murray 2011), 50,000 / 10,000 / 10,000.

    x (1, 28, 28), values 0 and 255, no labels. Three .amat files of text; the packed bits are kept in `cache`, in the
    user's cache folder if not given. The test file is sorted by digit; its images are put into one fixed random order,
    so that the first n are a fair sample.
    """
    folder = expanded(root) / "binarized_mnist"
    store = expanded(cache) if cache else cache_folder()
    splits = []
    for split, (images, md5) in BINARIZED_MNIST.items():
        path = folder / f"binarized_mnist_{split}.amat"
        fetch(path, [f"{BINARIZED_MNIST_URL}/{path.name}"], md5)
        # Kept under the sum of the text, so what is read is what the text said; the text's own sum takes 0.3 s a time.
        if path.stat().st_size != images * 784 * 2:
            check(path, md5)
        bits = cached_bits(
            store / f"binarized_mnist_{split}-{md5[:8]}.bits", (images, 98), lambda path=path, md5=md5: _amat(path, md5)
        )
        if split == "test":
            bits = bits[torch.randperm(images, generator=generator(0, "order")).numpy()]
        x = torch.from_numpy(np.unpackbits(bits, axis=1)).mul_(255)
        splits.append(Images(x.view(-1, 1, 28, 28)))
    return Splits(*splits)


def _amat(path: Path, md5: str) -> np.ndarray:
    """Packed bits (N, 98) of lines of 784 characters 0 or 1 with one blank or newline after each."""
    check(path, md5)
    text = np.fromfile(path, np.uint8).reshape(-1, 784, 2)
    return np.packbits(text[:, :, 0] == ord("1"), axis=1)


def frey_faces(root: Root, val_size: int = 200, test_size: int = 200, seed: int = 0) -> Splits:
    """Brendan Frey's face in 1,965 frames of a film (Roweis et al. 2002), split at random. x (1, 28, 20), no labels.

    1,565 / 200 / 200 as in Tomczak & Welling 2018. Neighbouring frames are alike and fall into different splits.
    """
    from scipy.io import loadmat

    path = expanded(root) / "frey_faces" / "frey_rawface.mat"
    fetch(path, FREY_URLS, FREY_MD5)
    check(path, FREY_MD5)
    film = torch.from_numpy(loadmat(path)["ff"].T.reshape(-1, 1, 28, 20).copy())
    shuffled = Images(film[torch.randperm(len(film), generator=generator(seed, "order"))])
    rest, test = hold_out(shuffled, test_size, seed)
    return Splits(*hold_out(rest, val_size, seed), test)


def cifar10(root: Root, val_size: int = 5000, seed: int = 0) -> Splits:
    """Tiny colour photographs (Krizhevsky 2009), 50,000 + 10,000. x (3, 32, 32), y one of ten classes."""
    from torchvision.datasets import CIFAR10

    root = expanded(root)
    folder = root / CIFAR10.base_folder
    with locked(folder):
        if not all((folder / name).exists() for name, _ in CIFAR10.train_list + CIFAR10.test_list):
            archive = fetch(root / CIFAR10.filename, [CIFAR10.url], CIFAR10.tgz_md5)
            check(archive, CIFAR10.tgz_md5)
            unpack(archive, CIFAR10.base_folder)
    train, test = (
        _cifar_batches([(folder / name, md5) for name, md5 in files])
        for files in (CIFAR10.train_list, CIFAR10.test_list)
    )
    return Splits(*hold_out(train, val_size, seed), test)


def _cifar_batches(files: list[tuple[Path, str]]) -> Images:
    x, y = [], []
    for path, md5 in files:
        check(path, md5)  # before anything is unpickled: only the published bytes are
        with open(path, "rb") as file, warnings.catch_warnings():
            warnings.simplefilter("ignore")  # NumPy dislikes the dtypes that Python 2 pickled
            batch = pickle.load(file, encoding="latin1")
        x.append(torch.from_numpy(np.asarray(batch["data"])).view(-1, 3, 32, 32))
        y.append(torch.tensor(batch["labels"]))
    return Images(torch.cat(x), torch.cat(y))


def svhn(root: Root, val_size: int = 5000, seed: int = 0) -> Splits:
    """House numbers in street view (Netzer et al. 2011), 73,257 + 26,032. x (3, 32, 32), y the digit in the middle."""
    from scipy.io import loadmat
    from torchvision.datasets import SVHN

    parts = []
    for split in ("train", "test"):
        url, name, md5 = SVHN.split_list[split]
        path = fetch(expanded(root) / name, [url], md5)
        check(path, md5)
        data = loadmat(path)
        x = torch.from_numpy(data["X"]).permute(3, 2, 0, 1).contiguous()
        y = torch.from_numpy(data["y"].astype(np.int64)).flatten()
        parts.append(Images(x, y % 10))  # the files call the digit 0 class 10
    train, test = parts
    return Splits(*hold_out(train, val_size, seed), test)


# Sets larger than memory


@dataclass
class ImageFiles(ImageSet):
    """A split decoded from its files on access, for a DataLoader with worker processes.

    Each image is cut to its central `crop` x `crop` pixels and resized to `size`, with antialiasing. y int64 (N, ...).
    """

    folder: Path
    names: Sequence[str] = field()
    y: Tensor = field()
    size: int
    crop: int
    streaming: bool = field(default=True, init=False)

    def __post_init__(self) -> None:
        self.shape = (3, self.size, self.size)

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        return self._decode(self.names[index]), self.y[index]

    def gather(self, index: Tensor) -> tuple[Tensor, Tensor]:
        return torch.stack([self._decode(self.names[i]) for i in index.tolist()]), self.y[index]

    def _decode(self, name: str) -> Tensor:
        from PIL import Image

        require_regular(self.folder / name)
        try:
            with Image.open(self.folder / name) as image:
                left, top = (image.width - self.crop) // 2, (image.height - self.crop) // 2
                face = image.convert("RGB").crop((left, top, left + self.crop, top + self.crop))
                small = face.resize((self.size, self.size), Image.Resampling.BILINEAR)
        except (OSError, SyntaxError, ValueError) as error:
            raise VAEError(f"{self.folder / name} cannot be decoded as an image ({reason(error)}).") from error
        return torch.from_numpy(np.array(small)).permute(2, 0, 1)


def celeba(root: Root, size: int = 64, crop: int = 148) -> Splits:
    """Aligned faces of celebrities (Liu et al. 2015), official splits 162,770 / 19,867 / 19,962, decoded on access.

    x (3, size, size) from the central `crop` pixels, y the 40 attributes as 0 and 1, (40,). Papers differ in the crop,
    so that only results with the same one compare. The download, 1.4 GB from Google Drive, needs the package gdown.
    """
    from torchvision.datasets import CelebA

    if size < 1 or not 1 <= crop <= 178:
        raise VAEError(f"data.source.size={size} must be positive and data.source.crop={crop} lie between 1 and 178.")
    folder = expanded(root) / CelebA.base_folder
    files = {name: (drive_id, md5) for drive_id, md5, name in CelebA.file_list}
    for name in ("list_eval_partition.txt", "list_attr_celeba.txt"):
        _from_drive(folder / name, *files[name])
    names, parts = np.loadtxt(folder / "list_eval_partition.txt", dtype=str, ndmin=2).T
    images = folder / "img_align_celeba"
    with locked(images):
        if _missing(images, names):
            _from_drive(folder / f"{images.name}.zip", *files[f"{images.name}.zip"])
            unpack(folder / f"{images.name}.zip", images.name)
    if missing := _missing(images, names):
        raise VAEError(f"{images / missing[0]} is not among the images of the archive, with {len(missing) - 1} more.")
    columns = range(1, 41)
    y = torch.from_numpy(
        np.loadtxt(folder / "list_attr_celeba.txt", np.int64, skiprows=2, usecols=columns, ndmin=2) > 0
    )
    return Splits(
        *(ImageFiles(images, names[parts == part].tolist(), y[parts == part].long(), size, crop) for part in "012")
    )


def _missing(folder: Path, names: np.ndarray) -> list[str]:
    return sorted(set(names.tolist()).difference(os.listdir(folder) if folder.exists() else ()))


def _from_drive(path: Path, drive_id: str, md5: str) -> None:
    """`path`, fetched from Google Drive unless it is there, and checked."""
    from torchvision.datasets.utils import download_file_from_google_drive

    part = path.with_name(f".{path.name}.part")
    with locked(path):
        if not path.exists():
            try:
                part.unlink(missing_ok=True)
                download_file_from_google_drive(drive_id, str(path.parent), part.name, md5)
                os.replace(part, path)
            except Exception as error:  # gdown has exceptions of its own, for one where a quota is used up
                raise VAEError(
                    f"{path} is not there and could not be fetched from Google Drive ({reason(error).rstrip('.')}): "
                    f"download it in a browser from https://drive.google.com/file/d/{drive_id} and put it there, or set "
                    "data.source.root or VAE_DATA_DIR to a folder that has it."
                ) from error
    check(path, md5)
