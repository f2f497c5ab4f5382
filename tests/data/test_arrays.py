import os
import sys

import numpy as np
import pytest
import torch

from vae.data import arrays as module
from vae.data.arrays import arrays
from vae.data.images import accepted
from vae.data.module import ImageDataModule
from vae.errors import VAEError

N = 40
NOISE = np.random.default_rng(0)
BYTES = NOISE.integers(0, 256, (N, 3, 8, 9), dtype=np.uint8)
FLOATS = NOISE.random((N, 3, 8, 9), dtype=np.float32)
Y = np.arange(N) % 4


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("VAE_CACHE_DIR", str(tmp_path / "cache"))
    return tmp_path / "cache"


def save(path, **held):
    if path.suffix == ".npy":
        np.save(path, held["x"])
    elif path.suffix == ".npz":
        np.savez(path, **held)
    elif path.suffix == ".pt":
        torch.save({name: torch.from_numpy(np.array(value)) for name, value in held.items()}, path)
    else:
        h5py = pytest.importorskip("h5py")
        with h5py.File(path, "w") as file:
            for name, value in held.items():
                file.create_dataset(name, data=value)
    return path


def whole(splits) -> tuple[np.ndarray, list]:
    """All images, in the order of the file, and their labels."""
    rows = torch.cat([split.rows for split in splits]).argsort()
    x = torch.cat([split.gather(torch.arange(len(split)))[0] for split in splits])[rows].numpy()
    y = None if splits.train.y is None else torch.cat([split.y for split in splits])[rows].tolist()
    return x, y


@pytest.mark.parametrize("suffix", [".npy", ".npz", ".pt", ".h5"])
@pytest.mark.parametrize("x", [BYTES, FLOATS], ids=["bytes", "floats"])
def test_every_format_holds_the_very_values_and_is_mapped(suffix, x, tmp_path, monkeypatch):
    path = save(tmp_path / f"a{suffix}", x=x, y=Y)
    monkeypatch.setattr(np.lib.format, "read_array", None)  # what would read it into memory
    splits = arrays(path, val_size=4, test_size=8)
    found, labels = whole(splits)
    assert found.dtype == x.dtype and np.array_equal(found, x)
    assert labels == (None if suffix == ".npy" else Y.tolist())
    assert [len(split) for split in splits] == [28, 4, 8]
    if labels is not None:
        assert splits.test.y.bincount().tolist() == [2, 2, 2, 2]
    if suffix != ".pt":
        assert isinstance(module.read(path)["x"], np.memmap)
    with open(path, "rb") as file, open("/proc/self/maps") as maps:
        assert file.name in maps.read()


def test_what_is_packed_is_read(tmp_path):
    np.savez_compressed(tmp_path / "a.npz", x=BYTES, y=Y)
    assert np.array_equal(whole(arrays(tmp_path / "a.npz"))[0], BYTES)
    torch.save(torch.from_numpy(BYTES), tmp_path / "a.pt", _use_new_zipfile_serialization=False)
    assert np.array_equal(whole(arrays(tmp_path / "a.pt"))[0], BYTES)


def test_chunks_of_hdf5_are_read(tmp_path):
    h5py = pytest.importorskip("h5py")
    with h5py.File(tmp_path / "a.h5", "w") as file:
        file.create_dataset("x", data=BYTES, chunks=(4, 3, 8, 9), compression="gzip")
    assert np.array_equal(whole(arrays(tmp_path / "a.h5"))[0], BYTES)


@pytest.mark.parametrize(
    ("given", "held"),
    [
        (BYTES.transpose(0, 2, 3, 1), BYTES),
        (BYTES[:, 0], BYTES[:, :1]),
        (np.asfortranarray(BYTES), BYTES),
        (BYTES > 99, np.where(BYTES > 99, 255, 0)),
        (FLOATS.astype(np.float64), FLOATS),
        (FLOATS.astype(">f4"), FLOATS),
    ],
    ids=["channels last", "one channel", "Fortran's order", "bool", "float64", "big-endian"],
)
def test_other_layouts_and_types_are_the_same_images(given, held, tmp_path):
    found, _ = whole(arrays(save(tmp_path / "a.npy", x=given)))
    assert found.dtype == (np.float32 if held.dtype == np.float32 else np.uint8)
    assert np.array_equal(found, held)


def test_layout_settles_what_the_shape_does_not_tell(tmp_path):
    x = NOISE.integers(0, 256, (N, 3, 8, 3), dtype=np.uint8)
    path = save(tmp_path / "a.npy", x=x)
    with pytest.raises(
        VAEError, match=r"\(40, 3, 8, 3\), whose channels may come first or last: set data.source.layout"
    ):
        arrays(path)
    assert np.array_equal(whole(arrays(path, layout="NCHW"))[0], x)
    assert np.array_equal(whole(arrays(path, layout="NHWC"))[0], x.transpose(0, 3, 1, 2))
    with pytest.raises(VAEError, match=r"set data.source.layout"):
        arrays(save(tmp_path / "b.npy", x=np.zeros((N, 9, 9, 9), np.uint8)))


# of the last, the greatest is 1.0000002 but for care
@pytest.mark.parametrize(("low", "high"), [(0, 255), (-1, 1), (-3.0, -2.8)])
def test_range_says_what_floats_become_0_and_1(low, high, tmp_path):
    x = low + FLOATS.astype(np.float64) * (high - low)
    x[0, 0, 0, :2] = low, high
    path = save(tmp_path / "a.npy", x=x.astype(np.float32))
    with pytest.raises(
        VAEError, match=r"image \d+ of x has values from .* outside data.source.range=\[0.0, 1.0\]: set it"
    ):
        arrays(path)
    splits = arrays(path, range=[low, high])
    found, _ = whole(accepted(splits))
    np.testing.assert_allclose(found, (x - low) / (high - low), atol=1e-6)
    assert found[0, 0, 0, :2].tolist() == [0, 1]


def test_splits_of_their_own_are_kept_and_missing_ones_held_out(tmp_path):
    held = {"train": BYTES[:30], "y_train": Y[:30], "test": BYTES[30:], "y_test": Y[30:]}
    splits = arrays(save(tmp_path / "a.npz", **held), val_size=6)
    assert [len(split) for split in splits] == [24, 6, 10]
    x, y = splits.test.gather(torch.arange(10))
    order = splits.test.rows
    assert np.array_equal(x, BYTES[30:][order]) and np.array_equal(y, Y[30:][order])
    assert set(splits.train.rows.tolist()) | set(splits.val.rows.tolist()) == set(range(30))
    with pytest.raises(VAEError, match="test_size=3 has no effect"):
        arrays(tmp_path / "a.npz", test_size=3)


def test_labels_of_any_kind_keep_their_shares(tmp_path):
    for y in (np.eye(4)[Y], Y[:, None].astype(np.uint8), Y.astype(np.float32)):
        splits = accepted(arrays(save(tmp_path / "a.npz", x=BYTES, y=y), val_size=4, test_size=4))
        assert whole(splits)[1] == Y.tolist()
        assert sorted(splits.val.y.tolist()) == [0, 1, 2, 3]


def test_images_in_two_splits_are_warned_of(tmp_path):
    path = save(tmp_path / "a.npz", train=BYTES[:30], val=BYTES[29:31], test=BYTES[31:])
    with pytest.warns(
        UserWarning, match=r"in two splits: 1 of train and val, such as image 29 of train and image 0 of val\."
    ):
        arrays(path)


def test_a_file_is_checked_once_until_it_changes(tmp_path, monkeypatch):
    path = save(tmp_path / "a.npy", x=FLOATS)
    asked = []
    monkeypatch.setattr(module, "_require_range", lambda *_: asked.append(1))
    arrays(path), arrays(path, seed=1), arrays(path, val_size=3)
    assert len(asked) == 1
    os.utime(path, (1, 1))
    arrays(path)
    save(path, x=FLOATS[:-1])
    arrays(path)
    assert len(asked) == 3


def with_value(value):
    x = FLOATS.copy()
    x[7, 0, 0, 0] = value
    return x


@pytest.mark.parametrize(
    ("name", "held", "options", "sentence"),
    [
        ("a.npz", {"images": BYTES}, {}, "holds images: call the images x, or train"),
        ("a.npz", {"x": BYTES, "train": BYTES}, {}, "holds train, x: call the images x, or train"),
        ("a.npz", {"val": BYTES, "test": BYTES}, {}, "holds test, val: call"),
        ("a.npz", {"train": BYTES, "y": Y}, {}, "labels of some splits only: each of y_train must be there, or none"),
        ("a.npz", {"train": BYTES, "val": BYTES, "y_train": Y}, {}, "each of y_train, y_val must be there, or none"),
        ("a.npz", {"x": BYTES, "y": Y[:-1]}, {}, "a.npz: There are 39 labels for 40 images"),
        ("a.npz", {"x": BYTES, "y": np.array(["cat"] * N)}, {}, "a.npz: Labels must be numbers"),
        ("a.npy", {"x": BYTES.reshape(N, -1)}, {}, r"a.npy: Images are .* not \(40, 216\)"),
        ("a.npy", {"x": BYTES[None]}, {}, r"a.npy: Images are .* not \(1, 40, 3, 8, 9\)"),
        (
            "a.npy",
            {"x": BYTES.astype(int)},
            {},
            "a.npy: Images are uint8 from 0 to 255 or float32 from 0 to 1, not int64",
        ),
        ("a.npy", {"x": BYTES[:0]}, {}, "too few images to train on, 0, for"),
        ("a.npy", {"x": with_value(np.nan)}, {}, "image 7 of x has values that are not finite"),
        ("a.npy", {"x": with_value(-np.inf)}, {}, "image 7 of x has values that are not finite"),
        ("a.npy", {"x": with_value(1.5)}, {}, r"image 7 of x has values from .* to 1.5, outside data.source.range"),
        ("a.npy", {"x": BYTES}, {"range": [0, 255]}, "data.source.range has no effect on images that are not floats"),
        ("a.npy", {"x": FLOATS}, {"range": [1, 0]}, r"range=\[1, 0\] must be the least and the greatest"),
        ("a.npy", {"x": BYTES}, {"layout": "CHW"}, "layout=CHW is unknown: choose one of NCHW, NHWC"),
        (
            "a.npy",
            {"x": BYTES},
            {"val_size": 40},
            "too few images to train on, 40, for 4 for test and 40 for val",
        ),
        ("a.pt", {"x": BYTES[0, 0, 0, 0]}, {}, "Images must be a dense tensor"),
    ],
)
def test_what_is_ambiguous_or_wrong_is_refused_with_what_settles_it(name, held, options, sentence, tmp_path):
    with pytest.raises(VAEError, match=sentence):
        arrays(save(tmp_path / name, **held), **options)


class Harmful:
    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return open, (self.path, "w")


@pytest.mark.parametrize("packed", [False, True])
def test_nothing_is_unpickled(packed, tmp_path):
    objects = np.array([Harmful(tmp_path / "harm")], dtype=object)
    (np.savez_compressed if packed else np.savez)(tmp_path / "a.npz", x=BYTES, y=objects)
    np.save(tmp_path / "a.npy", objects)
    torch.save({"x": torch.from_numpy(BYTES), "extra": objects[0]}, tmp_path / "a.pt")
    for name, sentence in (
        ("a.npz", "y is a pickled object, which may run code and is not read"),
        ("a.npy", "a.npy is a pickled object"),
        ("a.pt", "more than tensors, or is damaged, and nothing of it was unpickled"),
    ):
        with pytest.raises(VAEError, match=sentence):
            arrays(tmp_path / name)
    assert not (tmp_path / "harm").exists()


def test_a_file_that_is_no_such_array_is_told(tmp_path):
    torch.save([torch.from_numpy(BYTES)], tmp_path / "list.pt")
    for name in ("a.npy", "a.npz", "a.pt"):
        (tmp_path / name).write_text("no array")
    content = save(tmp_path / "whole.npy", x=BYTES).read_bytes()
    (tmp_path / "cut.npy").write_bytes(content[:-9])
    for name, sentence in (
        ("nowhere.npy", r"nowhere.npy cannot be read as .npy \(No such file"),
        ("a.csv", "must end in one of .npy, .npz"),
        ("a.npy", "cannot be read as .npy"),
        ("a.npz", "cannot be read as .npz"),
        ("a.pt", "holds more than tensors, or is damaged"),
        ("cut.npy", "cannot be read as .npy"),
        ("list.pt", "holds a list: save a tensor, or a dict of tensors"),
        ("", "must end in one of"),
    ):
        with pytest.raises(VAEError, match=sentence):
            arrays(tmp_path / name)
    (tmp_path / "folder.npy").mkdir()
    with pytest.raises(VAEError, match="is not a regular file"):
        arrays(tmp_path / "folder.npy")


def test_without_h5py_a_sentence_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "h5py", None)
    (tmp_path / "a.h5").write_bytes(b"")
    with pytest.raises(VAEError, match="h5py is needed: pip install h5py"):
        arrays(tmp_path / "a.h5")


def test_arrays_are_binarised_limited_and_partly_labelled_as_any_data_set(tmp_path):
    path = save(tmp_path / "a.npz", x=FLOATS, y=Y)
    data = ImageDataModule(lambda: arrays(path), batch_size=8, binarize="dynamic", labeled=8, limit=20)
    train, val, _ = data.splits_ready()
    assert (len(train), len(val)) == (20, 4)
    assert (train.y >= 0).sum() <= 8 and data.num_classes == 4
    assert set(val.gather(torch.arange(4))[0].unique().tolist()) == {0, 255}
    grey = train.gather(torch.arange(20))[0]
    assert torch.equal(grey, torch.from_numpy(FLOATS)[train.rows])


def test_floats_of_zero_and_one_are_held_as_bytes(tmp_path):
    data = ImageDataModule(lambda: arrays(save(tmp_path / "a.npy", x=(FLOATS > 0.5) * 1.0)), batch_size=8)
    assert data.splits_ready().test.x.dtype == torch.uint8
