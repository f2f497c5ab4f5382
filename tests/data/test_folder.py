import multiprocessing
import os
import time
import warnings

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps

from vae.data import decoding as module
from vae.data.decoding import Options, decode, decode_once
from vae.data.folder import folder, list_files
from vae.data.module import ImageDataModule
from vae.errors import VAEError

NOISE = np.random.default_rng(0)


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("VAE_CACHE_DIR", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def decodes(monkeypatch):
    """The names of the files that are decoded."""
    names = []

    def counted(path, options):
        names.append(path.name)
        return decode(path, options)

    monkeypatch.setattr(module, "decode", counted)
    return names


def pixels(height=8, width=8, channels=3) -> np.ndarray:
    image = NOISE.integers(0, 256, (height, width, channels), dtype=np.uint8)
    return image[..., 0] if channels == 1 else image


def write(root, name, image=None, **options):
    path = root / name
    path.parent.mkdir(parents=True, exist_ok=True)
    (Image.fromarray(pixels()) if image is None else image).save(path, **options)
    return path


def write_many(root, *names):
    for name in names:
        write(root, name)
    return root


def everything(splits) -> dict[bytes, list]:
    """The split and label of each image."""
    found = {}
    for name, split in zip(splits._fields, splits, strict=True):
        x, y = split.gather(torch.arange(len(split)))
        for i, image in enumerate(x):
            found.setdefault(image.numpy().tobytes(), []).append((name, None if y is None else int(y[i])))
    return found


def loaded(path) -> bytes:
    return np.asarray(Image.open(path)).transpose(2, 0, 1).tobytes()


# --- decoding ---------------------------------------------------------------------------------------------------------


def decoded(path, channels=3, size=(8, 8), fit="crop") -> np.ndarray:
    return decode(path, Options(size, fit, channels))


@pytest.mark.parametrize("suffix", ["png", "jpg", "webp", "bmp", "tiff"])
@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_files_are_decoded_as_pillow_does(suffix, mode, tmp_path):
    path = write(tmp_path, f"a.{suffix}", Image.fromarray(pixels()).convert(mode))
    for channels, shown in ((3, "RGB"), (1, "L")):
        expected = np.asarray(Image.open(path).convert(shown))
        assert np.array_equal(decoded(path, channels), np.atleast_3d(expected).transpose(2, 0, 1))


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P"])
def test_what_is_transparent_lies_on_white(mode, tmp_path):
    colour, alpha = pixels(), pixels(channels=1)
    alpha[0, 0], alpha[0, 1] = 0, 255
    if mode == "P":  # one entry of the palette is transparent
        image = Image.fromarray(colour).quantize(16)
        path = write(tmp_path, "a.png", image, transparency=3)
        opaque, a = np.asarray(image.convert("RGB"), float), (np.asarray(image) != 3) * 1.0
    else:
        opaque = Image.fromarray(colour).convert("L" if mode == "LA" else "RGB")
        image = opaque.copy()
        image.putalpha(Image.fromarray(alpha))
        assert image.mode == mode
        path = write(tmp_path, "a.png", image)
        opaque, a = np.asarray(opaque.convert("RGB"), float), alpha / 255
    expected = opaque * a[..., None] + 255 * (1 - a[..., None])
    assert np.abs(decoded(path).transpose(1, 2, 0) - expected).max() <= 0.5 + 1e-6
    if mode != "P":
        assert decoded(path)[:, 0, 0].tolist() == [255] * 3
        assert decoded(path)[:, 0, 1].tolist() == opaque[0, 1].tolist()


def test_palettes_bits_and_cmyk_are_shown_in_their_colours(tmp_path):
    palette = Image.fromarray(pixels()).quantize(16)
    path = write(tmp_path, "palette.png", palette)
    assert np.array_equal(decoded(path).transpose(1, 2, 0), np.asarray(palette.convert("RGB")))
    bits = Image.fromarray(pixels(channels=1) > 127)
    path = write(tmp_path, "bits.png", bits)
    assert bits.mode == "1" and np.array_equal(decoded(path, 1)[0], np.asarray(bits) * 255)
    ink = np.zeros((8, 8, 4), np.uint8)
    ink[..., 0] = 255  # cyan and nothing else
    path = write(tmp_path, "ink.tiff", Image.fromarray(ink, "CMYK"))
    assert decoded(path)[:, 0, 0].tolist() == [0, 255, 255]


@pytest.mark.parametrize("suffix", ["png", "tiff"])
def test_sixteen_bits_are_rounded_to_the_nearest_of_256_values(suffix, tmp_path):
    levels = np.linspace(0, 65535, 64).round().astype(np.uint16).reshape(8, 8)
    path = write(tmp_path, f"a.{suffix}", Image.fromarray(levels))
    assert Image.open(path).mode == "I;16"
    assert np.array_equal(decoded(path, 1)[0], np.rint(levels * (255 / 65535)))


@pytest.mark.parametrize("suffix", ["png", "jpg", "webp", "tiff"])
def test_images_are_turned_as_their_exif_says(suffix, tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # the first row is the right side
    image = Image.fromarray(np.repeat(np.repeat(pixels(1, 2), 16, 0), 16, 1))
    write(tmp_path, f"0.{suffix}", image, exif=exif)
    for name in "12":
        write(tmp_path, f"{name}.{suffix}", image.rotate(-90, expand=True))
    splits = folder(tmp_path)
    assert splits.train.shape == (3, 32, 16)  # the common size is that of what is seen
    turned = decoded(tmp_path / f"0.{suffix}", size=(32, 16)).astype(int)
    assert np.abs(turned.transpose(1, 2, 0) - np.asarray(image.rotate(-90, expand=True))).mean() < 12  # JPEG's loss


def test_crop_pad_and_stretch_fit_an_image_into_a_shape(tmp_path):
    image = Image.fromarray(pixels(6, 12))
    path = write(tmp_path, "a.png", image)

    def rgb(**options):
        return decoded(path, **options).transpose(1, 2, 0)

    assert np.array_equal(rgb(size=(6, 6)), np.asarray(image)[:, 3:9])
    padded = rgb(size=(12, 12), fit="pad")
    assert np.array_equal(padded[3:9], np.asarray(image))
    assert padded[:3].max() == padded[9:].max() == 0
    bilinear = Image.Resampling.BILINEAR
    assert np.array_equal(rgb(size=(3, 5), fit="stretch"), np.asarray(image.resize((5, 3), bilinear)))
    assert np.array_equal(rgb(size=(3, 3)), np.asarray(ImageOps.fit(image, (3, 3), bilinear)))


# --- what is in a folder ----------------------------------------------------------------------------------------------


def test_splits_are_disjoint_cover_the_folder_and_give_every_class_its_share(tmp_path):
    write_many(tmp_path, *(f"{name}/{i}.png" for name, n in (("cat", 30), ("ant", 20)) for i in range(n)))
    splits = folder(tmp_path, val_size=5, test_size=10)
    found = everything(splits)
    assert len(found) == 50 and all(len(places) == 1 for places in found.values())
    assert [len(split) for split in splits] == [35, 5, 10]
    assert [int((split.y == 0).sum()) for split in splits] == [14, 2, 4]  # ants are 0, two fifths of each
    for i, name in enumerate(("ant", "cat")):
        for path in (tmp_path / name).iterdir():
            assert found[loaded(path)][0][1] == i
    assert len(set(splits.train.y[:10].tolist())) == 2  # the first few are of all classes
    again, other = folder(tmp_path, val_size=5, test_size=10), folder(tmp_path, val_size=5, test_size=10, seed=1)
    assert everything(again) == found != everything(other)


def test_sub_folders_called_so_are_the_splits_and_what_lies_in_them_labels(tmp_path):
    for split, n in (("train", 20), ("test", 3)):
        write_many(tmp_path, *(f"{split}/{name}/{i}.png" for name in "ab" for i in range(n)))
    splits = folder(tmp_path, val_size=8)
    found = everything(splits)
    assert [len(split) for split in splits] == [32, 8, 6]
    for path in (tmp_path / "test" / "b").iterdir():
        assert found[loaded(path)] == [("test", 1)]
    with pytest.raises(VAEError, match="test_size=3 has no effect: the data has a test split of its own"):
        folder(tmp_path, test_size=3)
    write_many(tmp_path, "val/a/0.png", "val/b/0.png")
    assert [len(split) for split in folder(tmp_path)] == [40, 2, 6]


def test_one_sub_folder_or_none_is_no_label(tmp_path):
    write_many(tmp_path, *(f"images/{i}.png" for i in range(4)))
    assert folder(tmp_path).train.y is None
    assert folder(tmp_path / "images").train.y is None
    write_many(tmp_path, "others/0.png")
    assert folder(tmp_path).train.y is not None
    assert folder(tmp_path, labels=False).train.y is None


def test_size_and_channels_are_those_of_the_files_or_asked_for(tmp_path):
    grey, colour = tmp_path / "grey", tmp_path / "colour"
    for i in range(3):
        write(grey, f"{i}.png", Image.fromarray(pixels(5, 7, 1)))
        write(colour, f"{i}.png", Image.fromarray(pixels(200 + i, 300)))
    assert folder(grey).train.shape == (1, 5, 7)
    assert folder(grey, channels=3, size=4).train.shape == (3, 4, 4)
    assert folder(colour).train.shape == (3, 64, 64)
    assert folder(colour, size=[6, 9], channels=1).train.shape == (1, 6, 9)
    with pytest.raises(
        VAEError, match=r"grey images, such as grey/0.png, and coloured ones, such as colour/0.png: set "
    ):
        folder(tmp_path)
    assert folder(tmp_path, channels=1).train.shape == (1, 64, 64)


def test_a_pattern_says_which_files_count_and_hidden_ones_never_do(tmp_path):
    write_many(tmp_path, "a.png", "b.PNG", "c.jpg", ".d.png", "deep/er/e.png", ".hidden/f.png", "__MACOSX/._a.png")
    (tmp_path / "notes.txt").write_text("no image")
    (tmp_path / "deep" / "back").symlink_to(tmp_path)

    def names(*options):
        return [file.name for file in list_files(tmp_path, *options)]

    assert names() == ["a.png", "b.PNG", "c.jpg", "deep/er/e.png"]
    assert names("*.png") == ["a.png", "deep/er/e.png"]
    assert names("deep/*") == ["deep/er/e.png"]


@pytest.mark.parametrize(
    ("names", "options", "sentence"),
    [
        ([], {}, r"There are no images in .*here\."),
        (["a.txt"], {}, "There are no images in .*: the 1 files that it has, such as a.txt, do not end in .png"),
        (["a.png"], {"pattern": "*.jpg"}, r"such as a.png, do not match data.source.pattern=\*.jpg"),
        (["a.png"], {}, "The data has too few images to train on, 1, for 1 for test and 1 for val to be held out"),
        (
            ["a.png", "b.png", "c.png"],
            {"val_size": 3},
            "too few images to train on, 3, for 1 for test and 3 for val to be held out",
        ),
        (["a.png", "cat/b.png"], {}, "Sub-folders of .* are labels, and a.png has none: .*data.source.labels=false"),
        (["train/a/0.png", "train/b/0.png", "test/0.png"], {}, "are labels, and test/0.png has none"),
        (
            ["train/a/0.png", "train/b/0.png", "val/c/0.png"],
            {},
            "There are no training images of c, which val or test has",
        ),
        (["train/0.png", "dev/0.png"], {}, "are its splits, and dev/0.png lies beside them"),
        (["test/0.png", "val/0.png"], {}, "are its splits, and there are no images in train"),
        (["train/0.png", "test/0.txt"], {}, "There are no images in .*test: fill it, or remove it"),
        (["a.png"], {"fit": "zoom"}, "fit=zoom is unknown: choose one of crop, pad, stretch"),
        (["a.png"], {"channels": 4}, "channels=4 is unknown: choose one of 1, 3, auto"),
        (["a.png"], {"on_error": "cry"}, "on_error=cry is unknown"),
        (["a.png"], {"size": 0}, r"size=0 must be a number of pixels, \[height, width\], or null"),
        (["a.png"], {"size": [1, 2, 3]}, "must be a number of pixels"),
    ],
)
def test_what_can_be_read_in_two_ways_or_none_is_refused_before_anything_is_decoded(
    names, options, sentence, tmp_path, cache, decodes
):
    root = tmp_path / "here"
    root.mkdir()
    for name in names:
        write(root, name) if name.endswith("png") else write(root, f"{name}.png").rename(root / name)
    with pytest.raises(VAEError, match=sentence):
        folder(root, **options)
    assert decodes == [] or "held out" in sentence


def test_a_path_that_is_no_folder_is_refused(tmp_path):
    with pytest.raises(VAEError, match=r"data.source.path=.*nowhere is not a folder"):
        folder(tmp_path / "nowhere")


def test_images_in_two_splits_are_warned_of(tmp_path):
    for i in range(6):
        write(tmp_path, f"train/{i}.png")
    twin = Image.open(tmp_path / "train" / "4.png")
    write(tmp_path, "test/0.bmp", twin)  # other bytes, the same pixels
    write_many(tmp_path, "test/1.png", "val/0.png")
    with pytest.warns(UserWarning, match=r"in two splits: 1 of train and test, such as train/4.png and test/0.bmp\."):
        folder(tmp_path)


# --- what cannot be decoded -------------------------------------------------------------------------------------------


@pytest.fixture
def damaged(tmp_path):
    root = tmp_path / "damaged"
    write_many(root, *(f"{i}.png" for i in range(5)))
    whole = (root / "3.png").read_bytes()
    (root / "0-bad.png").write_bytes(whole[: len(whole) // 2])
    os.mkfifo(root / "pipe.png")
    (root / "lost.png").symlink_to(root / "nowhere")
    write(root, "floats.tiff", Image.fromarray(np.ones((8, 8), np.float32)))
    return root


def test_what_cannot_be_decoded_is_told_with_its_name(damaged, cache):
    with pytest.raises(
        VAEError, match=r"damaged/[\w.-]+ cannot be decoded as an image \(.*: mend or remove it, or set "
    ):
        folder(damaged, channels=3)
    assert not list(cache.glob("*.images")) and not list(cache.glob(".*.tmp"))


def test_or_is_left_out_and_listed(damaged, cache, decodes):
    for _ in range(2):  # decoded, and from the cache
        with pytest.warns(UserWarning, match="4 files of .*: 0-bad.png .*, floats.tiff .it has 32 bits .*, lost.png"):
            splits = folder(damaged, channels=3, on_error="skip")
        found = everything(splits)
        assert set(found) == {loaded(damaged / f"{i}.png") for i in range(5)}
    assert len(decodes) == 9
    listed = next(cache.glob("*.skipped.txt")).read_text().splitlines()
    assert [line.split(":")[0] for line in listed] == ["0-bad.png", "floats.tiff", "lost.png", "pipe.png"]


def test_a_folder_of_nothing_that_can_be_decoded_is_refused(tmp_path):
    (tmp_path / "a.png").write_text("text")
    with pytest.raises(VAEError, match="None of the 1 images"), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        folder(tmp_path, on_error="skip")


# --- the cache --------------------------------------------------------------------------------------------------------


def test_files_are_decoded_once_until_one_of_them_changes(tmp_path, cache, decodes):
    root = write_many(tmp_path / "here", *(f"{i}.png" for i in range(5)))
    first = everything(folder(root))
    assert sorted(decodes) == [f"{i}.png" for i in range(5)]
    for options in ({}, {"seed": 3}, {"val_size": 2}, {"labels": False}):
        folder(root, **options)
    assert len(decodes) == 5
    write(root, "2.png")
    assert len(set(everything(folder(root))) & set(first)) == 4
    assert len(decodes) == 10
    assert len(list(cache.glob("folder-*.images"))) == 1  # what was there before is gone
    os.utime(root / "0.png", (1, 1))
    folder(root)
    assert len(decodes) == 15
    folder(root, size=4)
    assert len(decodes) == 20
    assert len(list(cache.glob("folder-*.images"))) == 2


@pytest.mark.parametrize("damage", ["cut", "shortened", "emptied", "garbled", "pipe"])
def test_a_cache_that_is_not_whole_is_made_again(damage, tmp_path, cache, decodes):
    root = write_many(tmp_path / "here", *(f"{i}.png" for i in range(5)))
    whole = everything(folder(root))
    path = next(cache.glob("*.images"))
    content = path.read_bytes()
    path.unlink()
    if damage == "pipe":
        os.mkfifo(path)
    else:
        path.write_bytes(
            {"cut": content[:-100], "shortened": content[1:], "emptied": b"", "garbled": content[:-8] + b"\xff" * 8}[
                damage
            ]
        )
    assert everything(folder(root)) == whole
    assert len(decodes) == 10
    assert path.read_bytes() == content


def test_a_full_disk_is_told_and_leaves_nothing(tmp_path, cache, monkeypatch):
    root = write_many(tmp_path / "here", *(f"{i}.png" for i in range(5)))

    def full(*_):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "pwrite", full)
        with pytest.raises(VAEError, match="no space left on the disk"):
            folder(root)
    assert [path for path in cache.iterdir() if path.name != "locks"] == []
    assert len(everything(folder(root))) == 5


def test_a_cache_that_cannot_be_written_is_told(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("VAE_CACHE_DIR", str(tmp_path / "file"))
    with pytest.raises(VAEError, match=r"cannot be kept in .*: set VAE_CACHE_DIR to another folder"):
        folder(write_many(tmp_path / "here", "0.png", "1.png", "2.png"))


def test_a_process_killed_in_the_middle_leaves_nothing_that_counts(tmp_path, cache, monkeypatch):
    root = write_many(tmp_path / "here", *(f"{i}.png" for i in range(8)))

    def slow(path, options):
        time.sleep(0 if path.name < "4" else 60)
        return decode(path, options)

    with monkeypatch.context() as patch:
        patch.setattr(module, "decode", slow)
        process = multiprocessing.get_context("fork").Process(target=folder, args=(root,))
        process.start()
    deadline = time.monotonic() + 30
    while not any(path.stat().st_size for path in cache.glob(".folder-*.tmp")) and time.monotonic() < deadline:
        time.sleep(0.02)
    process.kill()
    process.join()
    assert len(list(cache.glob(".folder-*.tmp"))) == 1
    found = everything(folder(root))
    assert set(found) == {loaded(path) for path in root.iterdir()}
    assert not list(cache.glob(".*.tmp"))


def test_any_number_of_workers_gives_the_same_file(tmp_path):
    root = write_many(tmp_path / "here", *(f"{i}.png" for i in range(37)))
    files, options = list_files(root), Options((8, 8), "crop", 3)
    contents = [
        decode_once(root, files, options, store=tmp_path / str(n), workers=n).path.read_bytes() for n in (1, 2, 5)
    ]
    assert contents[0] == contents[1] == contents[2]


# --- as any data set --------------------------------------------------------------------------------------------------


def test_a_folder_is_binarised_limited_and_partly_labelled_as_any_data_set(tmp_path):
    write_many(tmp_path, *(f"{name}/{i}.png" for name in "ab" for i in range(20)))
    data = ImageDataModule(lambda: folder(tmp_path), batch_size=8, binarize="static", labeled=10, limit=30)
    train, val, test = data.splits_ready()
    assert (len(train), len(val), len(test)) == (30, 4, 4)
    assert sorted(train.y.tolist()).count(-1) == 20 and data.num_classes == 2
    assert set(train.gather(torch.arange(30))[0].unique().tolist()) == {0, 255}
