import hashlib
import os
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from vae.data import sprites as module
from vae.data.sprites import FACTORS, FactorGrid, chosen_values, dsprites, outlines, packed_npz, render_grid, sprites
from vae.errors import VAEError

ALL = {name: tuple(range(size)) for name, size in FACTORS.items()}
SMALL = {"shape": 3, "scale": 2, "orientation": 5, "x": 4, "y": 3}


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("VAE_CACHE_DIR", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture(scope="module")
def whole() -> FactorGrid:
    return FactorGrid(render_grid(ALL), ALL)


@pytest.fixture
def small() -> FactorGrid:
    return sprites(subset=SMALL).train.grid


# The drawing


def frames_of_the_animation() -> list[tuple[int, ...]]:
    """(shape, scale, orientation, x, y) of the 320 frames of the gif that the authors of dSprites published."""
    up, around, turn = list(range(6)), list(range(32)), list(range(40))
    grow, shrink = [(s, 0, 0, 0) for s in up], [(s, 0, 0, 0) for s in up[::-1]]
    pulse, spin = grow + shrink + grow, [(5, o, 0, 0) for o in turn]
    walk = [(5, 39, 0, y) for y in around] + [(5, 39, x, 31) for x in around]
    walk += [(5, 39, 31, y) for y in around[::-1]] + [(5, 39, x, 0) for x in around[::-1]]
    heart = [(2, *frame) for frame in pulse + spin + walk + shrink]
    return heart + [(shape, *frame) for shape in (1, 0) for frame in pulse + spin + shrink]


@pytest.mark.slow
def test_every_frame_of_the_original_animation_is_met_in_every_pixel(whole):
    path = Path(os.environ.get("VAE_DATA_DIR", ""), "dsprites", "dsprites.gif")
    if not path.is_file():
        pytest.skip("VAE_DATA_DIR has no dsprites/dsprites.gif")
    drawn = whole.images(torch.tensor(frames_of_the_animation()))[:, 0].numpy()
    with Image.open(path) as gif:
        assert gif.n_frames == len(drawn) == 320
        for number, image in enumerate(drawn):
            gif.seek(number)
            assert np.array_equal(np.array(gif.convert("L")), image), number


def test_the_whole_grid_has_two_white_pixels_more_than_the_original(whole):
    white = sum(np.count_nonzero(np.unpackbits(part)) for part in np.array_split(whole._bits, 1000))
    assert white == 128_328_864 == module.WHITE_PIXELS + 2


def test_the_last_orientation_is_the_first_in_every_image(whole):
    images = whole._bits.reshape(3, 6, 40, 32, 32, 512)
    assert np.array_equal(images[:, :, 39], images[:, :, 0])
    assert not np.array_equal(images[:, :, 38], images[:, :, 0])


def test_a_centre_on_a_right_edge_is_outside_and_on_a_left_edge_inside_as_in_the_original(whole):
    # the right edge of this ellipse runs through the centre of (row 27, column 47), which is black in the original
    ellipse = whole.images(torch.tensor([[1, 0, 15, 26, 11]]))[0, 0] // 255
    assert ellipse[27, 44:49].tolist() == [1, 1, 1, 0, 0]


def inside(polygon: np.ndarray, column: int, row: int) -> bool:
    """Even-odd rule in whole numbers, of a ray from the pixel's centre to the left, edges through the centre included."""
    x, y, odd = 256 * column + 128, 256 * row + 128, False
    for (x0, y0), (x1, y1) in zip(polygon.tolist(), np.roll(polygon, -1, axis=0).tolist(), strict=True):
        if min(y0, y1) < y <= max(y0, y1):
            odd ^= (x0 * (y1 - y0) + (y - y0) * (x1 - x0) - x * (y1 - y0)) * (1 if y1 > y0 else -1) <= 0
    return odd


@pytest.mark.parametrize("size", [64, 32])
def test_a_pixel_is_white_where_its_centre_lies_inside_the_outline(size):
    rng = np.random.default_rng(size)
    for shape in range(3):
        scale, orientation, x, y = (int(rng.integers(n)) for n in (6, 40, 32, 32))
        angle, unit = 2 * np.pi * orientation / 39, 4 * size
        px, py = outlines()[shape].T * (0.5 + 0.1 * scale)
        corners = np.stack([px * np.cos(angle) + py * np.sin(angle), py * np.cos(angle) - px * np.sin(angle)], axis=1)
        polygon = np.rint((corners + 16 + 32 * np.array([x, y]) / 31) * unit).astype(int)
        expected = np.array([[inside(polygon, c, r) for c in range(size)] for r in range(size)])
        bits = render_grid({"shape": [shape], "scale": [scale], "orientation": [orientation], "x": [x], "y": [y]}, size)
        assert np.array_equal(np.unpackbits(bits).reshape(size, size), expected)


def test_an_upright_square_has_the_area_that_its_sides_cover(whole):
    """Columns: centre on the left side or right of it, left of the right side. Rows: below the upper, not the lower."""
    for scale in range(6):
        half = 9.6 * (0.5 + 0.1 * scale)
        place = np.arange(32)
        centre = 16 + 32 * place / 31
        low, high = np.rint(256 * (centre - half)), np.rint(256 * (centre + half))
        columns, rows = (part((high - 128) / 256) - part((low - 128) / 256) for part in (np.ceil, np.floor))
        factors = torch.cartesian_prod(
            torch.tensor([0]), torch.tensor([scale]), torch.tensor([0]), *[torch.arange(32)] * 2
        )
        white = whole.images(factors).flatten(1).long().sum(1) // 255
        assert np.array_equal(white.reshape(32, 32).numpy(), np.outer(columns, rows))


# The grid


def test_factors_and_index_are_inverse_over_the_whole_grid(whole):
    index = torch.arange(len(whole))
    factors = whole.factors(index)
    assert len(whole) == 737_280 and whole.factor_names == ("shape", "scale", "orientation", "x", "y")
    assert torch.equal(whole.index(factors), index)
    assert factors[[0, 1, 32, 1024, 40_960, 245_760, -1]].tolist() == [
        [0, 0, 0, 0, 0],
        [0, 0, 0, 0, 1],
        [0, 0, 0, 1, 0],
        [0, 0, 1, 0, 0],
        [0, 1, 0, 0, 0],
        [1, 0, 0, 0, 0],
        [2, 5, 39, 31, 31],
    ]


def test_a_batch_holds_the_images_of_its_factors(whole):
    index = torch.tensor([5, 700_000, 123_456])
    x, factors = whole.gather(index)
    assert x.dtype == torch.uint8 and x.shape == (3, 1, 64, 64) and factors.dtype == torch.int64
    assert torch.equal(whole.images(factors), x)
    for image, values in zip(x, factors.tolist(), strict=True):
        bits = render_grid({name: [value] for name, value in zip(FACTORS, values, strict=True)})
        assert np.array_equal(np.unpackbits(bits) * 255, image.flatten().numpy())


def test_x_moves_the_sprite_right_and_y_down(whole):
    def centre(x, y):
        image = whole.images(torch.tensor([[0, 3, 0, x, y]]))[0, 0].double() / 255
        return [float((image.sum(axis) * (torch.arange(64) + 0.5)).sum() / image.sum()) for axis in (0, 1)]

    for x, y in ((0, 0), (31, 0), (0, 31), (31, 31), (7, 20)):
        assert centre(x, y) == pytest.approx([16 + 32 * x / 31, 16 + 32 * y / 31], abs=0.5)


def test_sampled_factors_are_uniform_independent_and_the_generators_own(small):
    draws = small.sample_factors(60_000, torch.Generator().manual_seed(0))
    assert torch.equal(draws, small.sample_factors(60_000, torch.Generator().manual_seed(0)))
    expected = 60_000 / len(small)
    counts = small.index(draws).bincount(minlength=len(small))
    # chi-squared with 359 degrees of freedom: mean 359, standard deviation 26.8
    assert abs(float(((counts - expected) ** 2 / expected).sum()) - 359) < 5 * 26.8


def test_factors_out_of_range_are_refused(small):
    for factors in ([[0, 0, 5, 0, 0]], [[-1, 0, 0, 0, 0]], [[0, 0, 0, 0]]):
        with pytest.raises(VAEError, match="'orientation': 5"):
            small.images(torch.tensor(factors))


# Part of the grid


def test_a_reduced_grid_keeps_the_documented_values():
    assert chosen_values({"shape": 2, "scale": 3, "orientation": 13, "x": 16, "y": 1}) == {
        "shape": (0, 2),
        "scale": (0, 3, 5),  # 0, 2.5, 5
        "orientation": tuple(range(0, 39, 3)),
        "x": (0, 2, 4, 6, 8, 10, 12, 14, 17, 19, 21, 23, 25, 27, 29, 31),
        "y": (16,),
    }
    assert chosen_values({"orientation": 10})["orientation"] == (0, 3, 7, 11, 15, 19, 23, 27, 31, 35)
    assert chosen_values({"orientation": 39})["orientation"] == tuple(range(39))
    assert chosen_values({"shape": [2]})["shape"] == (2,)
    assert chosen_values(None) == chosen_values({"orientation": 40}) == ALL


def test_every_reduced_count_gives_as_many_different_values():
    for name, size in FACTORS.items():
        for n in range(1, size + 1):
            values = chosen_values({name: n})[name]
            assert len(set(values)) == n and sorted(values) == list(values) and set(values) <= set(range(size))


def test_a_reduced_grid_holds_the_images_of_the_whole_one(whole, small):
    factors = small.factors(torch.arange(len(small)))
    original = torch.stack([torch.tensor(v)[factors[:, k]] for k, v in enumerate(small.factor_values)], dim=1)
    assert torch.equal(small.images(factors), whole.images(original))


@pytest.mark.parametrize(
    ("subset", "named"),
    [
        ({"colour": 1}, "colour"),
        ({"x": 0}, "x=0"),
        ({"scale": 7}, "scale=7"),
        ({"y": [1, 1]}, "y"),
        ({"shape": [3]}, "shape"),
    ],
)
def test_a_subset_that_the_grid_does_not_have_is_refused(subset, named):
    with pytest.raises(VAEError, match=named):
        sprites(subset=subset)


def test_an_image_size_that_does_not_fit_into_bytes_is_refused():
    for size in (0, 28, 128):
        with pytest.raises(VAEError, match=f"size={size}"):
            sprites(subset=SMALL, size=size)


# Splits, cache, processes


def test_the_first_images_of_a_split_are_a_fair_sample_of_every_factor():
    train = sprites(subset={"orientation": 5, "x": 8, "y": 8}).train
    _, factors = train.gather(torch.arange(900))
    for values, size in zip(factors.T, train.grid.factor_sizes, strict=True):
        share = 900 / size
        assert ((values.bincount(minlength=size) - share).abs() < 5 * share**0.5).all()


def test_splits_share_out_the_grid_by_seed_and_keep_it_within_reach():
    splits = sprites(subset=SMALL)
    assert [len(split) for split in splits] == [288, 36, 36]
    assert sorted(torch.cat([split.rows for split in splits]).tolist()) == list(range(360))
    assert splits.train.grid is splits.test.grid
    x, factors = splits.val.gather(torch.tensor([3, 1]))
    assert torch.equal(splits.val.grid.index(factors), splits.val.rows[[3, 1]])
    assert torch.equal(splits.val.grid.images(factors), x)
    assert torch.equal(sprites(subset=SMALL).test.rows, splits.test.rows)
    assert not torch.equal(sprites(subset=SMALL, seed=1).test.rows, splits.test.rows)
    assert [len(split) for split in sprites(subset=SMALL, val_size=10, test_size=20)] == [330, 10, 20]
    with pytest.raises(VAEError, match="grid of 360"):
        sprites(subset=SMALL, val_size=300, test_size=60)


def test_a_cached_grid_is_built_again_when_damaged_and_pickled_by_its_file_name(cache, small, monkeypatch):
    monkeypatch.setattr(module, "CACHE_ABOVE", 0)
    everything = torch.arange(360)
    for damage in (
        lambda data: data,
        lambda data: data[:-1],
        lambda data: data[:-5] + bytes([data[-5] ^ 4]) + data[-4:],
    ):
        splits = sprites(subset=SMALL)
        assert torch.equal(splits.train.grid.gather(everything)[0], small.gather(everything)[0])
        (stored,) = cache.glob("*.bits")
        whole_file = stored.read_bytes()
        pickled = pickle.dumps(splits)
        assert len(pickled) < 10_000 < len(pickle.dumps(small))
        assert torch.equal(
            pickle.loads(pickled).val.gather(torch.arange(36))[0], splits.val.gather(torch.arange(36))[0]
        )
        stored.write_bytes(damage(whole_file))
    with pytest.raises(VAEError, match="bits is missing or damaged"):
        pickle.loads(pickled)
    assert torch.equal(pickle.loads(pickle.dumps(small)).gather(everything)[0], small.gather(everything)[0])


def test_other_subsets_and_sizes_have_other_cache_files(cache, monkeypatch):
    monkeypatch.setattr(module, "CACHE_ABOVE", 0)
    for subset, size in ((SMALL, 64), (SMALL, 32), (SMALL | {"shape": [2]}, 64)):
        assert sprites(subset=subset, size=size).train.shape == (1, size, size)
    assert len(list(cache.glob("*.bits"))) == 3


# The original


@pytest.fixture
def original(tmp_path, monkeypatch) -> Path:
    """A small file in the form of the original, on a server."""
    sizes = {"shape": 3, "scale": 2, "orientation": 2, "x": 2, "y": 3}
    monkeypatch.setattr(module, "FACTORS", sizes)
    imgs = np.random.default_rng(0).integers(0, 2, (72, 64, 64)).astype(np.uint8)
    path = tmp_path / "served.npz"
    np.savez_compressed(path, imgs=imgs, metadata=np.array({"a": "pickle"}, dtype=object))
    monkeypatch.setattr(module, "DSPRITES_URL", path.as_uri())
    monkeypatch.setattr(module, "DSPRITES_MD5", hashlib.md5(path.read_bytes()).hexdigest())
    monkeypatch.setattr(module, "WHITE_PIXELS", int(imgs.sum()))
    return path


def test_the_original_is_fetched_checked_and_packed(tmp_path, original):
    grid = dsprites(tmp_path / "root").train.grid
    imgs = np.load(original)["imgs"]
    assert grid.factor_sizes == (3, 2, 2, 2, 3)
    assert np.array_equal(grid.gather(torch.arange(72))[0][:, 0].numpy(), imgs * 255)
    part = dsprites(tmp_path / "root", subset={"shape": [2, 0], "y": [1]}).train.grid
    expected = imgs.reshape(3, 2, 2, 2, 3, 64, 64)[[2, 0]][..., [1], :, :].reshape(-1, 64, 64)
    assert np.array_equal(part.gather(torch.arange(16))[0][:, 0].numpy(), expected * 255)


def test_a_damaged_original_is_named(tmp_path, original):
    path = tmp_path / "root" / "dsprites" / module.DSPRITES_FILE
    dsprites(tmp_path / "root")
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(VAEError) as caught:
        dsprites(tmp_path / "root")
    assert str(path) in str(caught.value)


def test_an_original_of_another_form_is_named(original):
    imgs = np.load(original)["imgs"]
    with pytest.raises(VAEError, match=r"served\.npz has .* white pixels"):
        packed_npz(original, 72, int(imgs.sum()) + 1)
    with pytest.raises(VAEError, match=r"served\.npz holds images"):
        packed_npz(original, 71, int(imgs.sum()))
    original.write_bytes(original.read_bytes()[:2000])
    with pytest.raises(VAEError, match=r"served\.npz is damaged"):
        packed_npz(original, 72, int(imgs.sum()))


def test_offline_and_absent_one_sentence_names_the_original(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "DSPRITES_URL", (tmp_path / "gone").as_uri())
    with pytest.raises(VAEError) as caught:
        dsprites(tmp_path / "root")
    for part in (str(tmp_path / "root" / "dsprites" / module.DSPRITES_FILE), "gone", "VAE_DATA_DIR"):
        assert part in str(caught.value)
