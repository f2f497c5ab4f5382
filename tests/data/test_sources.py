import gzip
import hashlib
import io
import os
import pickle
import tarfile
import zipfile
import zlib
from pathlib import Path
from urllib.error import URLError

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.io import savemat
from torch.utils.data import DataLoader
from torchvision import datasets

from vae.data import sources, storage
from vae.data.sources import ImageFiles
from vae.data.storage import cache_folder, cached_bits, fetch, unpack
from vae.errors import VAEError


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("VAE_CACHE_DIR", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def offline(monkeypatch):
    def urlopen(*args, **kwargs):
        raise URLError(OSError(-2, "Name or service not known"))

    monkeypatch.setattr(storage.urllib.request, "urlopen", urlopen)


def real(*parts: str) -> str:
    root = os.environ.get("VAE_DATA_DIR")
    if not root or not Path(root, *parts).exists():
        pytest.skip(f"VAE_DATA_DIR has no {'/'.join(parts)}")
    return root


def md5(path: Path) -> str:
    return hashlib.md5(path.read_bytes()).hexdigest()


def refusal(call, *named: object) -> str:
    """The one sentence of the VAEError that `call` raises; it names all these."""
    with pytest.raises(VAEError) as caught:
        call()
    sentence = str(caught.value)
    assert "\n" not in sentence and sentence.endswith(".")
    for name in named:
        assert str(name) in sentence
    return sentence


# Splits


def test_digits_are_the_rounded_grey_values_of_scikit_learn_each_in_one_split():
    from sklearn.datasets import load_digits

    data = load_digits()
    expected = sorted(
        (int(y), *(round(v * 255 / 16) for v in x)) for x, y in zip(data.data.tolist(), data.target, strict=True)
    )
    splits = sources.digits()
    got = sorted((int(y), *x.flatten().tolist()) for split in splits for x, y in zip(split.x, split.y, strict=True))
    assert got == expected
    assert [len(split) for split in splits] == [1297, 200, 300]
    assert splits.train.shape == (1, 8, 8) and splits.train.y.dtype == torch.int64


def test_digits_classes_keep_their_share_in_every_split():
    totals = torch.tensor([178, 182, 177, 183, 181, 182, 181, 179, 174, 180])
    splits = sources.digits(seed=3)
    assert torch.equal(sum(split.y.bincount() for split in splits), totals)
    for split in splits:
        assert (split.y.bincount() - totals * len(split) / 1797).abs().max() < 2


def test_the_split_follows_from_the_seed_alone():
    torch.manual_seed(1)
    first = sources.digits(seed=1)
    torch.manual_seed(2)
    again, other = sources.digits(seed=1), sources.digits(seed=2)
    assert all(torch.equal(a.x, b.x) for a, b in zip(first, again, strict=True))
    assert not torch.equal(first.train.x, other.train.x)


def test_holding_out_everything_or_nothing_is_refused():
    refusal(lambda: sources.digits(val_size=1500), "1797")
    refusal(lambda: sources.digits(val_size=0))


# Real files


@pytest.mark.parametrize(
    ("name", "folder", "pixels", "test_labels", "counts"),
    [
        (
            "mnist",
            "MNIST",
            (1567298545, 264923200),
            [7, 2, 1, 0, 4, 1, 4, 9],
            [5923, 6742, 5958, 6131, 5842, 5421, 5918, 6265, 5851, 5949],
        ),
        ("fashion_mnist", "FashionMNIST", (3431114169, 573469082), [9, 2, 1, 1, 6, 1, 4, 6], [6000] * 10),
    ],
)
def test_mnist_has_the_known_pixels_and_labels_and_its_own_test_split(name, folder, pixels, test_labels, counts):
    root = real(folder, "raw")
    before = sorted((path, path.stat().st_mtime_ns) for path in Path(root, folder).rglob("*"))
    train, val, test = getattr(sources, name)(root)
    assert (len(train), len(val), len(test)) == (55_000, 5_000, 10_000)
    assert train.x.sum(dtype=torch.int64) + val.x.sum(dtype=torch.int64) == pixels[0]
    assert test.x.sum(dtype=torch.int64) == pixels[1]
    assert test.y[:8].tolist() == test_labels
    assert (train.y.bincount() + val.y.bincount()).tolist() == counts
    assert sorted((path, path.stat().st_mtime_ns) for path in Path(root, folder).rglob("*")) == before


def test_mnist_is_the_same_as_torchvision_reads_it():
    root = real("MNIST", "raw")
    ours, theirs = sources.mnist(root).test, datasets.MNIST(root, train=False)
    assert torch.equal(ours.x[:, 0], theirs.data) and torch.equal(ours.y, theirs.targets)
    assert sources._idx(Path(root, "MNIST", "raw"), "train-labels-idx1-ubyte")[:5].tolist() == [5, 0, 4, 1, 9]


@pytest.mark.slow
def test_binarized_mnist_has_the_known_white_pixels_with_and_without_its_cache():
    root = real("binarized_mnist", "binarized_mnist_test.amat")
    for _ in range(2):  # parsed, then from the cache
        splits = sources.binarized_mnist(root)
        assert [int((split.x == 255).sum()) for split in splits] == [5118041, 1028036, 1038896]
        assert [int((split.x == 0).sum()) for split in splits] == [
            n * 784 - white for n, white in ((50_000, 5118041), (10_000, 1028036), (10_000, 1038896))
        ]
    first = np.loadtxt(Path(root, "binarized_mnist", "binarized_mnist_valid.amat"), max_rows=3)
    assert np.array_equal(splits.val.x[:3].flatten(1).numpy(), first * 255)
    first = np.loadtxt(Path(root, "binarized_mnist", "binarized_mnist_test.amat"), max_rows=1)
    assert (splits.test.x.flatten(1).numpy() == first * 255).all(1).sum() == 1


def test_the_first_images_of_binarized_mnist_are_not_all_zeros():
    """Its test file is sorted by digit, and zeros take more ink than other digits: 133 white pixels against 104."""
    test = sources.binarized_mnist(real("binarized_mnist", "binarized_mnist_test.amat")).test.x.flatten(1) == 255
    ink = test.sum(1).double()
    # 1,000 images stray from all by a standard error; the first 1,000 of the file by 27 of them
    assert abs(ink[:1000].mean() - ink.mean()) < 4 * ink.std() / 1000**0.5


def test_frey_faces_have_the_known_pixels_each_in_one_split():
    splits = sources.frey_faces(real("frey_faces", "frey_rawface.mat"))
    assert [len(split) for split in splits] == [1565, 200, 200]
    assert splits.train.shape == (1, 28, 20)
    assert sum(split.x.sum(dtype=torch.int64) for split in splits) == 169968741


# idx files


def write_idx(path: Path, values: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    header = bytes((0, 0, 8, values.ndim)) + np.array(values.shape, ">u4").tobytes()
    path.write_bytes(header + values.astype(np.uint8).tobytes())


@pytest.fixture
def kmnist_root(tmp_path) -> Path:
    rng = np.random.default_rng(0)
    raw = tmp_path / "root" / "KMNIST" / "raw"
    for part, n in (("train", 12), ("t10k", 5)):
        write_idx(raw / f"{part}-images-idx3-ubyte", rng.integers(0, 256, (n, 28, 28)))
        write_idx(raw / f"{part}-labels-idx1-ubyte", np.arange(n) % 10)
    return tmp_path / "root"


def test_an_idx_file_is_read_as_written(kmnist_root):
    splits = sources.kmnist(kmnist_root, val_size=4)
    labels = torch.cat([splits.train.y, splits.val.y])
    assert sorted(labels.tolist()) == sorted(i % 10 for i in range(12))
    expected = np.random.default_rng(0).integers(0, 256, (12, 28, 28)).sum()
    assert splits.train.x.sum(dtype=torch.int64) + splits.val.x.sum(dtype=torch.int64) == expected
    assert splits.test.y.tolist() == [0, 1, 2, 3, 4]


def test_small_mnist_has_the_means_of_blocks_of_pixels(monkeypatch):
    x = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (3, 1, 28, 28), np.uint8))
    monkeypatch.setattr(sources, "_mnist_like", lambda *_: sources.Splits(*[sources.Images(x, torch.arange(3))] * 3))
    for size in (28, 14, 7):
        blocks = x.double().view(3, 1, size, 28 // size, size, 28 // size)
        assert torch.equal(sources.mnist("", size=size).test.x, blocks.mean((3, 5)).round().to(torch.uint8))
    refusal(lambda: sources.mnist("", size=8), "data.source.size=8")


@pytest.mark.parametrize("keep", [0, 3, 10, 100, 16 + 5 * 784 - 1])
def test_a_truncated_idx_file_is_named(kmnist_root, keep):
    path = kmnist_root / "KMNIST" / "raw" / "t10k-images-idx3-ubyte"
    path.write_bytes(path.read_bytes()[:keep])
    refusal(lambda: sources.kmnist(kmnist_root, val_size=4), path)


def test_an_idx_file_with_another_sum_is_named(kmnist_root, monkeypatch):
    path = kmnist_root / "KMNIST" / "raw" / "t10k-images-idx3-ubyte"
    monkeypatch.setitem(sources.IDX_CRC, "KMNIST/t10k-images-idx3-ubyte", zlib.crc32(path.read_bytes()))
    sources.kmnist(kmnist_root, val_size=4)
    damaged = bytearray(path.read_bytes())
    damaged[1000] ^= 1
    path.write_bytes(damaged)
    refusal(lambda: sources.kmnist(kmnist_root, val_size=4), path)


def test_labels_that_do_not_match_the_images_are_named(kmnist_root):
    path = kmnist_root / "KMNIST" / "raw" / "train-labels-idx1-ubyte"
    write_idx(path, np.arange(11))
    refusal(lambda: sources.kmnist(kmnist_root, val_size=4), path, "11", "12")


def test_a_damaged_mnist_file_is_named_though_its_length_is_right(tmp_path):
    root = real("MNIST", "raw")
    for part in ("train-images-idx3", "train-labels-idx1", "t10k-images-idx3", "t10k-labels-idx1"):
        link = tmp_path / "MNIST" / "raw" / f"{part}-ubyte"
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(Path(root, "MNIST", "raw", f"{part}-ubyte"))
    data = bytearray(link.read_bytes())
    data[5000] ^= 1
    link.unlink()
    link.write_bytes(data)
    refusal(lambda: sources.mnist(tmp_path), link)


# Fetching


@pytest.mark.parametrize(
    ("name", "looked_for"),
    [
        ("mnist", "MNIST/raw/train-images-idx3-ubyte"),
        ("fashion_mnist", "FashionMNIST/raw/train-images-idx3-ubyte"),
        ("kmnist", "KMNIST/raw/train-images-idx3-ubyte"),
        ("cifar10", "cifar-10-python.tar.gz"),
        ("svhn", "train_32x32.mat"),
        ("binarized_mnist", "binarized_mnist/binarized_mnist_train.amat"),
        ("frey_faces", "frey_faces/frey_rawface.mat"),
    ],
)
def test_offline_and_absent_one_sentence_says_what_where_and_how(tmp_path, offline, name, looked_for):
    root = tmp_path / "nowhere"
    refusal(
        lambda: getattr(sources, name)(root), root / looked_for, "http", "Name or service not known", "VAE_DATA_DIR"
    )
    assert not root.exists()


def test_celeba_offline_and_absent_one_sentence_says_what_where_and_how(tmp_path, monkeypatch):
    def quota(*args, **kwargs):
        raise RuntimeError("Too many users have viewed this file.\nTry later.")

    monkeypatch.setattr("torchvision.datasets.utils.download_file_from_google_drive", quota)
    path = tmp_path / "celeba" / "list_eval_partition.txt"
    refusal(
        lambda: sources.celeba(tmp_path), path, "Too many users", "https://drive.google.com/file/d/", "VAE_DATA_DIR"
    )


def test_kmnist_is_fetched_checked_and_unpacked_once(tmp_path, kmnist_root, monkeypatch):
    expected = sources.kmnist(kmnist_root, val_size=4)
    served = tmp_path / "server"
    served.mkdir()
    resources = []
    for path in (kmnist_root / "KMNIST" / "raw").iterdir():
        packed = served / f"{path.name}.gz"
        packed.write_bytes(gzip.compress(path.read_bytes()))
        resources.append((packed.name, md5(packed)))
    monkeypatch.setattr(datasets.KMNIST, "resources", resources)
    monkeypatch.setattr(datasets.KMNIST, "mirrors", [(tmp_path / "gone").as_uri() + "/", served.as_uri() + "/"])
    first = sources.kmnist(tmp_path / "new", val_size=4)
    for path in served.iterdir():
        path.unlink()
    again = sources.kmnist(tmp_path / "new", val_size=4)
    for splits in (first, again):
        assert all(torch.equal(a.x, b.x) for a, b in zip(splits, expected, strict=True))
    names = sorted(path.name for path in (tmp_path / "new" / "KMNIST" / "raw").iterdir())
    assert names == sorted(n for name, _ in resources for n in (name, name.removesuffix(".gz")))


def test_a_damaged_gz_is_named(tmp_path):
    path = tmp_path / "KMNIST" / "raw" / "train-images-idx3-ubyte.gz"
    path.parent.mkdir(parents=True)
    path.write_bytes(gzip.compress(bytes(100))[:-9])
    refusal(lambda: sources.kmnist(tmp_path), path)


def test_a_download_with_another_sum_is_refused_and_leaves_nothing(tmp_path):
    (tmp_path / "served").write_bytes(b"something else")
    path = tmp_path / "root" / "file"
    refusal(lambda: fetch(path, [(tmp_path / "served").as_uri()], "0" * 32), path, md5(tmp_path / "served"))
    assert list(path.parent.iterdir()) == []


def test_a_download_that_breaks_off_leaves_the_folder_as_it_was(tmp_path, monkeypatch):
    class Broken(io.BytesIO):
        def read(self, size=-1):
            if self.tell():
                raise ConnectionResetError(104, "Connection reset by peer")
            return super().read(4)

    monkeypatch.setattr(storage.urllib.request, "urlopen", lambda *args, **kwargs: Broken(b"12345678"))
    path = tmp_path / "root" / "file"
    refusal(lambda: fetch(path, ["http://example.org/file"], "0" * 32), path, "Connection reset by peer")
    assert list(path.parent.iterdir()) == []


def test_a_damaged_mat_is_named(tmp_path):
    path = tmp_path / "frey_faces" / "frey_rawface.mat"
    path.parent.mkdir()
    path.write_bytes(b"not a mat")
    refusal(lambda: sources.frey_faces(tmp_path), path)


# Archives


def tar_of(path: Path, *members: tuple[str, bytes], link: tuple[str, str] | None = None) -> Path:
    with tarfile.open(path, "w:gz") as tar:
        if link:
            info = tarfile.TarInfo(link[0])
            info.type, info.linkname = tarfile.SYMTYPE, link[1]
            tar.addfile(info)
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return path


@pytest.mark.parametrize("name", ["../evil", "/tmp/vae-evil", "data/../../evil", "..\\evil"])
def test_a_tar_or_zip_cannot_write_outside_its_folder(tmp_path, name):
    folder = tmp_path / "in"
    folder.mkdir()
    tar = tar_of(folder / "a.tar.gz", ("data/good", b"1"), (name, b"evil"))
    with zipfile.ZipFile(folder / "b.zip", "w") as archive:
        archive.writestr("data/good", b"1")
        archive.writestr(name, b"evil")
    for path in (tar, folder / "b.zip"):
        refusal(lambda path=path: unpack(path, "data"), path)
    assert sorted(path.name for path in folder.iterdir()) == ["a.tar.gz", "b.zip"]
    assert not (tmp_path / "evil").exists() and not Path("/tmp/vae-evil").exists()


def test_a_link_in_a_tar_leads_nowhere(tmp_path):
    folder = tmp_path / "in"
    folder.mkdir()
    unpack(tar_of(folder / "a.tar.gz", ("data/sub/evil", b"1"), link=("data/sub", str(tmp_path))), "data")
    assert (folder / "data" / "sub" / "evil").read_bytes() == b"1"
    assert not (tmp_path / "evil").exists()


def test_a_damaged_archive_is_named_and_leaves_nothing(tmp_path):
    path = tar_of(tmp_path / "a.tar.gz", ("data/x", os.urandom(10_000)))
    path.write_bytes(path.read_bytes()[:5000])
    refusal(lambda: unpack(path, "data"), path)
    assert [entry.name for entry in tmp_path.iterdir() if entry.name != "cache"] == ["a.tar.gz"]


@pytest.fixture
def cifar(tmp_path, monkeypatch) -> tuple[Path, np.ndarray]:
    """A root without CIFAR-10, and the pixels that the server's small archive holds."""
    pixels = np.random.default_rng(0).integers(0, 256, (6 * 4, 3072)).astype(np.uint8)
    names = [f"data_batch_{i}" for i in range(1, 6)] + ["test_batch"]
    batches = [pickle.dumps({"data": part, "labels": list(range(4))}, protocol=2) for part in np.array_split(pixels, 6)]
    files = [[name, hashlib.md5(batch).hexdigest()] for name, batch in zip(names, batches, strict=True)]
    (tmp_path / "server").mkdir()
    members = [(f"cifar-10-batches-py/{name}", batch) for name, batch in zip(names, batches, strict=True)]
    archive = tar_of(tmp_path / "server" / "cifar-10-python.tar.gz", *members)
    monkeypatch.setattr(datasets.CIFAR10, "url", archive.as_uri())
    monkeypatch.setattr(datasets.CIFAR10, "tgz_md5", md5(archive))
    monkeypatch.setattr(datasets.CIFAR10, "train_list", files[:5])
    monkeypatch.setattr(datasets.CIFAR10, "test_list", files[5:])
    return tmp_path / "root", pixels


def test_cifar10_is_fetched_unpacked_and_read(cifar):
    root, pixels = cifar
    for _ in range(2):
        train, val, test = sources.cifar10(root, val_size=5)
        assert np.array_equal(test.x.flatten(1).numpy(), pixels[20:]) and test.y.tolist() == [0, 1, 2, 3]
        assert train.shape == (3, 32, 32) and len(val) == 5
        together = np.concatenate([train.x.flatten(1).numpy(), val.x.flatten(1).numpy()])
        assert sorted(map(bytes, together)) == sorted(map(bytes, pixels[:20]))


def test_a_damaged_cifar10_batch_is_named_and_a_missing_one_unpacked_again(cifar):
    root, _ = cifar
    sources.cifar10(root, val_size=5)
    path = root / "cifar-10-batches-py" / "data_batch_3"
    path.write_bytes(pickle.dumps(print))  # whatever is in it, it is not unpickled
    refusal(lambda: sources.cifar10(root, val_size=5), path)
    path.unlink()
    assert len(sources.cifar10(root, val_size=5).train) == 15


def test_svhn_is_read_with_class_ten_as_the_digit_zero(tmp_path, monkeypatch):
    rng = np.random.default_rng(0)
    listed, pixels = {}, {}
    for split, n in (("train", 10), ("test", 4)):
        pixels[split] = rng.integers(0, 256, (32, 32, 3, n)).astype(np.uint8)
        path = tmp_path / f"{split}_32x32.mat"
        savemat(path, {"X": pixels[split], "y": np.arange(1, n + 1)[:, None]})
        listed[split] = ["http://unused", path.name, md5(path)]
    monkeypatch.setattr(datasets.SVHN, "split_list", listed)
    splits = sources.svhn(tmp_path, val_size=3)
    assert splits.test.y.tolist() == [1, 2, 3, 4]
    assert torch.cat([splits.train.y, splits.val.y]).sort().values.tolist() == list(range(10))
    assert int(splits.test.x[2, 1, 5, 7]) == pixels["test"][5, 7, 1, 2]
    path.write_bytes(path.read_bytes()[:-10])
    refusal(lambda: sources.svhn(tmp_path, val_size=3), path)


# CelebA


@pytest.fixture
def celeba_root(tmp_path, monkeypatch) -> Path:
    """Seven plain images: number i has the grey value 10 i in its central 148 pixels, 255 around them."""
    folder = tmp_path / "celeba"
    folder.mkdir()
    names = [f"{i:06d}.jpg" for i in range(7)]
    rng = np.random.default_rng(0)
    attributes = rng.choice([-1, 1], (7, 40))
    (folder / "list_eval_partition.txt").write_text(
        "".join(f"{name} {part}\n" for name, part in zip(names, [0, 0, 0, 0, 1, 2, 2], strict=True))
    )
    rows = (f"{name}  {' '.join(map(str, row))}\n" for name, row in zip(names, attributes, strict=True))
    (folder / "list_attr_celeba.txt").write_text("7\n" + "A " * 40 + "\n" + "".join(rows))
    with zipfile.ZipFile(folder / "img_align_celeba.zip", "w") as archive:
        for i, name in enumerate(names):
            pixels = np.full((218, 178, 3), 255, np.uint8)
            pixels[35:183, 15:163] = 10 * i
            buffer = io.BytesIO()
            Image.fromarray(pixels).save(buffer, "PNG")  # its name notwithstanding, so that it is exact
            archive.writestr(f"img_align_celeba/{name}", buffer.getvalue())
    files = [("id", md5(path), path.name) for path in folder.iterdir()]
    monkeypatch.setattr(datasets.CelebA, "file_list", files)
    return tmp_path


def test_celeba_keeps_its_official_splits_and_decodes_the_centre_of_each_image(celeba_root):
    splits = sources.celeba(celeba_root)
    assert [len(split) for split in splits] == [4, 1, 2]
    x, y = splits.test.gather(torch.tensor([1, 0]))
    assert x.dtype == torch.uint8 and x.shape == (2, 3, 64, 64) == (2, *splits.test.shape)
    assert x.flatten(1).unique(dim=1).tolist() == [[60], [50]]
    attributes = np.random.default_rng(0).choice([-1, 1], (7, 40))
    assert np.array_equal(y.numpy(), (attributes[[6, 5]] + 1) // 2)


def test_celeba_streams_through_a_dataloader_with_workers(celeba_root):
    train = sources.celeba(celeba_root, size=8).train
    assert isinstance(train, ImageFiles) and train.streaming
    batches = list(DataLoader(train, batch_size=3, num_workers=1))
    assert [int(v) for x, _ in batches for v in x[:, 0, 0, 0]] == [0, 10, 20, 30]
    assert torch.equal(torch.cat([y for _, y in batches]), train.y)


def test_a_damaged_celeba_image_is_named_and_a_missing_one_unpacked_again(celeba_root):
    splits = sources.celeba(celeba_root)
    path = celeba_root / "celeba" / "img_align_celeba" / "000005.jpg"
    path.write_bytes(path.read_bytes()[:200])
    refusal(lambda: splits.test.gather(torch.tensor([0])), path)
    path.unlink()
    assert int(sources.celeba(celeba_root).test.gather(torch.tensor([0]))[0].max()) == 50


# The cache of packed bits


@pytest.fixture
def amat(tmp_path, monkeypatch) -> tuple[Path, np.ndarray]:
    """A small binarised MNIST: the path of its training text, and its pixels."""
    pixels = np.random.default_rng(0).integers(0, 2, (5, 784))
    table = {}
    for split in ("train", "valid", "test"):
        path = tmp_path / "binarized_mnist" / f"binarized_mnist_{split}.amat"
        path.parent.mkdir(exist_ok=True)
        path.write_text("".join(" ".join(map(str, row)) + "\n" for row in pixels))
        table[split] = (5, md5(path))
    monkeypatch.setattr(sources, "BINARIZED_MNIST", table)
    return path.with_name("binarized_mnist_train.amat"), pixels


def test_a_damaged_cache_is_built_again(tmp_path, cache, amat):
    for damage in (lambda data: data, lambda data: data[:-3], lambda data: bytes([data[0] ^ 1]) + data[1:]):
        train = sources.binarized_mnist(tmp_path).train
        assert np.array_equal(train.x.flatten(1).numpy(), amat[1] * 255)
        (stored,) = cache.glob("binarized_mnist_train-*.bits")
        whole = stored.read_bytes()
        assert len(whole) == 5 * 98 + 4
        stored.write_bytes(damage(whole))
    assert np.array_equal(sources.binarized_mnist(tmp_path).train.x.flatten(1).numpy(), amat[1] * 255)
    assert stored.read_bytes() == whole


def test_a_truncated_amat_is_named_even_where_a_cache_has_its_bits(tmp_path, amat):
    sources.binarized_mnist(tmp_path)
    amat[0].write_bytes(amat[0].read_bytes()[:-1])
    refusal(lambda: sources.binarized_mnist(tmp_path), amat[0])


def test_where_the_cache_cannot_be_written_a_warning_says_so_and_the_data_is_there(tmp_path, amat):
    (tmp_path / "file").write_text("")
    with pytest.warns(UserWarning, match="could not be written"):
        train = sources.binarized_mnist(tmp_path, cache=tmp_path / "file" / "below").train
    assert np.array_equal(train.x.flatten(1).numpy(), amat[1] * 255)


def test_a_full_disk_leaves_no_part_of_a_cache(tmp_path, monkeypatch):
    def full(path, write):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(storage, "write_atomically", full)
    built = np.arange(6, dtype=np.uint8).reshape(2, 3)
    with pytest.warns(UserWarning, match="No space left"):
        assert np.array_equal(cached_bits(tmp_path / "x.bits", (2, 3), lambda: built), built)
    assert not (tmp_path / "x.bits").exists()


# --- paths that lead nowhere ------------------------------------------------------------------------------------------


def test_a_home_folder_that_does_not_exist_is_told_in_a_sentence(monkeypatch):
    with pytest.raises(VAEError, match="~nobody-at-all/data begins with the home folder of a user who does not exist"):
        sources.mnist("~nobody-at-all/data")
    monkeypatch.setenv("VAE_CACHE_DIR", "~nobody-at-all")
    with pytest.raises(VAEError, match="does not exist"):
        cache_folder()


@pytest.mark.parametrize("source", [sources.mnist, sources.binarized_mnist, sources.frey_faces, sources.cifar10])
@pytest.mark.parametrize("kind", ["pipe", "device"])
def test_a_pipe_or_device_in_place_of_a_data_file_is_refused_and_not_waited_for(source, kind, tmp_path):
    for name in (
        "MNIST/raw/train-images-idx3-ubyte",
        "binarized_mnist/binarized_mnist_train.amat",
        "frey_faces/frey_rawface.mat",
        *(f"cifar-10-batches-py/{name}" for name, _ in datasets.CIFAR10.train_list + datasets.CIFAR10.test_list),
    ):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        os.mkfifo(path) if kind == "pipe" else path.symlink_to("/dev/zero")
    with pytest.raises(VAEError, match="is not a regular file"):
        source(tmp_path)


def test_a_pipe_in_place_of_a_cache_is_replaced(tmp_path):
    path = tmp_path / "cache"
    os.mkfifo(path)
    bits = np.arange(6, dtype=np.uint8).reshape(2, 3)
    assert np.array_equal(cached_bits(path, (2, 3), lambda: bits), bits)
    assert path.is_file()
