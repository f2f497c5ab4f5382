"""Runs on data of one's own: what built-in data can, it can."""

import json

import numpy as np
import own
import pytest
import torch
from PIL import Image

from vae.data.module import ImageDataModule
from vae.engine.build import build, instantiate
from vae.engine.callbacks.drawing import as_rgb, grid
from vae.engine.run import train
from vae.errors import VAEError
from vae.likelihoods import Bernoulli, ContinuousBernoulli, DiscretizedLogistic, DiscretizedLogisticMixture


def test_images_of_any_number_of_channels_are_trained_on_measured_and_drawn(tiny, tmp_path):
    config = tiny("data.source._target_=own.images", "+data.source.channels=5", "callbacks=default")
    train(config, tmp_path, [], progress_bar=False)
    assert json.loads((tmp_path / "metrics.json").read_text())["test/rate"] > 0
    with Image.open(tmp_path / "pictures" / "reconstructions.png") as picture:
        assert picture.mode == "RGB"


def test_one_and_three_channels_are_shown_as_they_are():
    x = own.images(3).train.x[:2] / 255
    assert torch.equal(as_rgb(x), x)
    assert torch.equal(as_rgb(x[:, :1]), x[:, :1].repeat(1, 3, 1, 1))


def test_a_fourth_channel_is_opacity_before_white():
    red = torch.tensor([1.0, 0.0, 0.0, 0.25]).view(1, 4, 1, 1)
    assert as_rgb(red).flatten().tolist() == [1.0, 0.75, 0.75]


@pytest.mark.parametrize(("channels", "rows", "columns"), [(2, 1, 2), (5, 2, 3), (9, 3, 3)])
def test_other_numbers_of_channels_are_shown_as_a_grid_of_their_maps(channels, rows, columns):
    x = torch.rand(3, channels, 4, 6, generator=torch.Generator().manual_seed(0))
    shown = as_rgb(x)
    assert shown.shape == (3, 3, 4 * rows, 6 * columns)
    for place in range(rows * columns):
        row, column = divmod(place, columns)
        tile = shown[:, 1, 4 * row : 4 * row + 4, 6 * column : 6 * column + 6]
        assert torch.equal(tile, x[:, place] if place < channels else torch.full_like(tile, 0.5))
    assert len(grid(x, 2)) == 3


@pytest.mark.parametrize("likelihood", [Bernoulli(), DiscretizedLogistic(), DiscretizedLogisticMixture()])
def test_a_mass_refuses_floats_unless_they_are_binarised(likelihood):
    def data(floats, binarize="none"):
        return ImageDataModule(lambda: own.images(floats=floats), batch_size=8, binarize=binarize)

    with pytest.raises(VAEError, match="these images are floats: use the likelihood of a density"):
        data(True).require_fit(likelihood)
    for fitting in (data(False), data(True, "dynamic"), data(True, "static"), data(True, "threshold")):
        fitting.require_fit(likelihood)
    data(True).require_fit(ContinuousBernoulli())


def test_a_density_of_floats_is_that_of_the_very_values(tiny):
    floats = ["data.source._target_=own.images", "+data.source.floats=true"]
    with pytest.raises(VAEError, match="these images are floats"):
        build(tiny(*floats))
    data, module = build(tiny(*floats, "likelihood=gaussian"))
    x = data.examples("test", 4).x
    assert torch.equal(x, own.images(floats=True).test.x[:4])
    normal = torch.distributions.Normal(0.0, module.vae.likelihood.log_sigma.exp())
    found = module.vae.likelihood.log_prob(torch.zeros(4, 1, 1, 8, 8), x)
    torch.testing.assert_close(found, normal.log_prob(x).sum((1, 2, 3)))


@pytest.mark.parametrize("data", ["folder", "arrays"])
def test_data_without_a_path_ask_for_it(data, tiny):
    with pytest.raises(VAEError, match=r"data.source.path must say which (folder|file) the images are in"):
        instantiate(tiny(f"data={data}").data, seed=0).setup()


def test_a_hundred_photographs_train_with_the_settings_that_are_there(tiny, tmp_path, monkeypatch):
    monkeypatch.setenv("VAE_CACHE_DIR", str(tmp_path / "cache"))
    (tmp_path / "photographs").mkdir()
    noise = np.random.default_rng(0)
    for i in range(100):
        Image.fromarray(noise.integers(0, 256, (9, 12, 3), np.uint8)).save(tmp_path / "photographs" / f"{i}.png")
    where = [f"data.source.path={tmp_path / 'photographs'}", "data.batch_size=128", "data.limit=null"]
    with pytest.warns(UserWarning, match="data.batch_size=128 is larger than the training split, which has 80 images"):
        train(tiny("data=folder", *where), tmp_path / "run", [], progress_bar=False)
    assert json.loads((tmp_path / "run" / "metrics.json").read_text())["test/rate"] >= 0
