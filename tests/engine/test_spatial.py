"""A run whose latent is a map: pictures, loading, files of latents, export, the Latents tab, weights that it starts from."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
import torch
import yaml
from conftest import composed
from omegaconf import OmegaConf
from tensorboard.plugins.base_plugin import TBContext
from werkzeug.test import Client

import vae
from vae.data.module import as_floats
from vae.engine import run as engine
from vae.engine.build import build
from vae.engine.callbacks import maps
from vae.engine.callbacks.maps import MOST_CHANNELS, channel_traversals, channels_by_kl, kl_maps, latent_maps
from vae.engine.exporting import export
from vae.engine.latents import write_latents
from vae.errors import VAEError
from vae.latents import session
from vae.latents.plugin import LatentsPlugin
from vae.model import VAE

SMALL = ["data.limit=64", "data.batch_size=32", "trainer.max_epochs=1", "evaluation.nll_samples=5", "threads=1"]
SMALL += ["logger=none", "trainer.accelerator=cpu", "model.latent_dim=32"]
NETWORK = ["network=autoencoder_kl", "network.block_out_channels=[4,4]", "network.norm_num_groups=2"]
GAUSSIAN = ["likelihood=gaussian", "likelihood.sigma=0.3"]
OTHERS, SMALL = SMALL, [*SMALL, *NETWORK, *GAUSSIAN]
SHAPE = (2, 4, 4)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("spatial") / "run"
    engine.train(composed(*SMALL, "callbacks.pictures.points=16"), path, SMALL, progress_bar=False)
    return path


@pytest.fixture(scope="module")
def run(folder):
    return vae.load(folder)


def test_a_run_knows_its_latent_as_a_map_and_keeps_its_pictures(folder, run):
    assert run.latent_shape == run.vae.latent_shape == SHAPE and run.vae.spatial
    assert json.loads((folder / "facts.json").read_text())["latent_shape"] == list(SHAPE)
    assert "latent_shape=(2, 4, 4)" in repr(run)
    made = {path.stem for path in (folder / "pictures").iterdir()}
    assert {"channel_traversals", "latent_maps", "kl_per_channel", "traversals", "samples"} <= made
    flat = VAE(torch.nn.Identity(), run.vae.decoder, run.vae.prior, run.vae.likelihood)
    flat.decoder.latent_shape, kept = None, flat.decoder.latent_shape
    assert flat.latent_shape == (32,) and not flat.spatial
    flat.decoder.latent_shape = kept


def test_latents_go_in_flat_or_as_a_map_and_nothing_else(run):
    z = torch.randn(3, *SHAPE, generator=torch.Generator().manual_seed(0))
    assert torch.equal(run.decode(z), run.decode(z.flatten(1)))
    with pytest.raises(
        VAEError, match=r"are \(N, 32\), or \(N, c, h, w\) with \(c, h, w\) = \(2, 4, 4\), not \(3, 31\)\.$"
    ):
        run.decode(torch.zeros(3, 31))
    with pytest.raises(VAEError, match=r"not \(3, 4, 4, 2\)\.$"):
        run.decode(torch.zeros(3, 4, 4, 2))


# --- pictures ---------------------------------------------------------------------------------------------------------


def test_channels_are_ordered_by_the_sum_of_their_places():
    kl = torch.tensor([[1.0, 0, 0, 2], [4, 1, 1, 1], [0, 0, 0, 5]]).flatten()
    by_channel, order = channels_by_kl(kl, (3, 2, 2))
    assert by_channel.tolist() == [3, 7, 5] and order.tolist() == [1, 2, 0]
    by_channel, order = channels_by_kl(torch.tensor([9.0]), (3, 2, 2))  # only estimated
    assert by_channel.isnan().all() and order.tolist() == [0, 1, 2]


def cells(picture, rows, columns):
    """The picture of `grid`, cut into its cells (rows, columns, 3, 32, 32): digits are enlarged fourfold."""
    side, padding = 32, 2
    picture = picture[:, padding:, padding:]
    steps = [[picture[:, r * 34 : r * 34 + side, c * 34 : c * 34 + side] for c in range(columns)] for r in range(rows)]
    return torch.stack([torch.stack(row) for row in steps])


@torch.no_grad()
def test_a_channel_traversal_moves_all_places_of_one_channel_and_no_other(run):
    x, kl = run.data.examples("val", 1).x, torch.arange(32.0)  # channel 1 carries more
    drawn = cells(channel_traversals(run.vae, x, kl, columns=3, reach=2.0), 2, 3)
    mean = run.encode(x).mean.unflatten(1, SHAPE)
    for row, channel in enumerate((1, 0)):
        for column, shift in enumerate((-2.0, 0.0, 2.0)):
            z = mean.clone()
            z[:, channel] += shift
            shown = drawn[row, column, :, ::4, ::4]
            torch.testing.assert_close(shown, run.decode(z)[0].clamp(0, 1).expand(3, -1, -1), rtol=0, atol=1e-5)


@torch.no_grad()
def test_latent_maps_show_each_channel_beside_its_image_0_half_grey(run):
    x, kl = run.data.examples("val", 4).x, torch.arange(32.0)
    drawn = cells(latent_maps(run.vae, x, kl), 4, 3)
    mean = run.encode(x).mean.unflatten(1, SHAPE)
    torch.testing.assert_close(drawn[:, 0, :, ::4, ::4], x.expand(-1, 3, -1, -1))
    for column, channel in ((1, 1), (2, 0)):
        reach = 3 * max(1.0, mean[:, channel].square().mean().sqrt().item())
        expected = (0.5 + mean[:, channel] / (2 * reach)).clamp(0, 1)
        torch.testing.assert_close(drawn[:, column, 0, ::8, ::8], expected, rtol=0, atol=1e-5)


def test_bars_of_kl_bear_the_numbers_of_their_channels_where_there_is_room(monkeypatch):
    figures = []
    monkeypatch.setattr(maps, "draw", figures.append)
    kl_maps(torch.tensor([0.5, 0.25, 3.0, 1.0, 2.0, 2.5]), (3, 1, 2))
    bars = figures[0].axes[0]
    assert [tick.get_text() for tick in bars.get_xticklabels()] == ["2", "1", "0"]
    assert [bar.get_height() for bar in bars.patches] == [4.5, 4.0, 0.75]
    assert [bar.get_center()[0] for bar in bars.patches] == bars.get_xticks().tolist()
    assert bars.get_title() == "rate 9.25 nats" and bars.get_xlabel() == "channel, largest KL first"
    kl_maps(torch.arange(40.0), (40, 1, 1))
    assert figures[1].axes[0].get_xlabel() == "rank of the channel by KL"


def test_kl_maps_are_drawn_of_many_channels_and_of_one():
    for shape in ((1, 3, 5), (MOST_CHANNELS + 2, 1, 2)):
        picture = kl_maps(torch.rand(torch.Size(shape).numel()), shape)
        assert picture.shape[0] == 3 and picture.min() < 0.5 < picture.max()


# --- files ------------------------------------------------------------------------------------------------------------


def test_a_file_of_latents_says_their_shape_and_the_moments_of_each_channel(run, tmp_path):
    write_latents(run, run.data, "test", tmp_path / "latents.npz")
    kept = np.load(tmp_path / "latents.npz")
    assert tuple(kept["latent_shape"]) == SHAPE and kept["mean"].shape == (64, 32)
    mean, var = (kept[name].reshape(64, *SHAPE).astype(np.float64) for name in ("mean", "log_var"))
    var = np.exp(var)
    assert kept["channel_mean"] == pytest.approx(mean.mean((0, 2, 3)))
    assert kept["channel_std"] == pytest.approx(np.sqrt(mean.var((0, 2, 3)) + var.mean((0, 2, 3))))
    assert kept["latent_std"] == pytest.approx(np.sqrt(mean.var(0) + var.mean(0)).flatten())


def test_an_exported_model_loads_as_the_run_does(run, tmp_path):
    export(run, tmp_path / "out")
    again = vae.load(tmp_path / "out")
    x = run.data.examples("test", 4).x
    assert again.latent_shape == SHAPE and torch.equal(again.reconstruct(x), run.reconstruct(x))


def test_a_trained_autoencoder_is_exported_for_diffusers_with_the_scale_of_its_latents(run, tmp_path):
    names = export(run, tmp_path / "out", "diffusers", "mit")
    assert {path.name for path in (tmp_path / "out").iterdir()} == set(names)
    said = json.loads((tmp_path / "out" / "config.json").read_text())
    assert (said["_class_name"], said["latent_channels"], said["in_channels"]) == ("AutoencoderKL", 2, 1)
    x = run.data.examples("train", 64).x
    posterior = run.encode(x)
    std = (posterior.mean.double().var(correction=0) + posterior.log_var.double().exp().mean()).sqrt()
    assert said["scaling_factor"] == pytest.approx(1 / std.item(), rel=1e-5)
    card = (tmp_path / "out" / "README.md").read_text()
    assert "AutoencoderKL.from_pretrained" in card and "latents of 64 training images" in card
    export(run, tmp_path / "ours")
    export(vae.load(tmp_path / "ours"), tmp_path / "again", "diffusers")  # which has no data
    assert json.loads((tmp_path / "again" / "config.json").read_text())["scaling_factor"] == 1
    assert "scaling_factor is 1: the data were not there" in (tmp_path / "again" / "README.md").read_text()


@pytest.mark.slow
def test_diffusers_reads_what_was_exported_and_computes_the_same(run, tmp_path):
    diffusers = pytest.importorskip("diffusers", reason="needs diffusers: pip install diffusers")
    export(run, tmp_path / "out", "diffusers")
    twin = diffusers.AutoencoderKL.from_pretrained(tmp_path / "out").eval()
    x = run.data.examples("test", 4).x
    with torch.no_grad():
        decoded = twin.decode(twin.encode(2 * x - 1).latent_dist.mode()).sample
    torch.testing.assert_close(((decoded + 1) / 2).clamp(0, 1), run.reconstruct(x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("overrides", "sentence"),
    [
        (GAUSSIAN, "is for network=autoencoder_kl, and this run has another network"),
        (NETWORK, "gives the mean image itself, as with likelihood=gaussian"),
        ([*NETWORK, "likelihood=gaussian_per_pixel"], "gives the mean image itself"),
        ([*NETWORK, *GAUSSIAN, "objective=cvae"], "is given no labels"),
    ],
)
def test_what_diffusers_has_no_form_for_is_refused(overrides, sentence, run, tmp_path):
    config = composed(*OTHERS, *overrides)
    other = object.__new__(type(run))
    other.vae, other.config = build(config)[1].vae, OmegaConf.to_container(config)
    with pytest.raises(VAEError, match=sentence):
        export(other, tmp_path / "out", "diffusers")


# --- weights to start from --------------------------------------------------------------------------------------------


@pytest.fixture
def published(run, tmp_path):
    export(run, tmp_path / "published", "diffusers")
    return tmp_path / "published"


def test_a_run_that_starts_from_weights_and_learns_nothing_measures_them_and_needs_them_no_more(
    run, published, tmp_path
):
    still = [*SMALL, f"network.weights={published}", "optimizer.lr=0", "trainer.max_steps=1", "callbacks=minimal"]
    engine.train(composed(*still), tmp_path / "still", still, progress_bar=False)
    shutil.rmtree(published)
    measured = vae.load(tmp_path / "still")
    for (name, ours), theirs in zip(measured.vae.state_dict().items(), run.vae.state_dict().values(), strict=True):
        assert torch.equal(ours, theirs), name
    assert measured.metrics["test/elbo"] == pytest.approx(run.metrics["test/elbo"], rel=1e-6)
    again = engine.evaluate(tmp_path / "still")  # as `vae.evaluate` loads it
    assert again["test/elbo"] == measured.metrics["test/elbo"]
    longer = composed(*still[:-2], "trainer.max_steps=3", "callbacks=minimal")
    engine.train(longer, tmp_path / "still", still, resume=True, progress_bar=False)
    with pytest.raises(VAEError, match="There is no file"):
        engine.train(composed(*still), tmp_path / "new", still, progress_bar=False)


def test_weights_of_another_architecture_are_refused_before_anything_is_trained(published, tmp_path):
    given = [*SMALL, f"network.weights={published}", "network.layers_per_block=2", "callbacks=minimal"]
    with pytest.raises(VAEError, match=r"Its config.json asks for network.layers_per_block=1\.$"):
        engine.train(composed(*given), tmp_path / "run", given, progress_bar=False)


# --- the Latents tab --------------------------------------------------------------------------------------------------


def test_the_tab_shows_a_map_by_channels_and_takes_more_latents_than_it_has_sliders_for(folder, run, monkeypatch):
    monkeypatch.setattr(session, "MOST_LATENTS", 8)
    plugin = LatentsPlugin(TBContext(logdir=str(folder.parent)))
    apps = plugin.get_plugin_apps()
    answer = Client(apps["/summary"]).get("/", query_string={"run": "run"})
    assert answer.status_code == 200, answer.text
    summary = answer.json
    assert summary["map"] == list(SHAPE) and summary["latents"] == 32
    by_channel = torch.tensor(summary["kl"]).reshape(2, -1).sum(1)
    assert summary["channels"] == by_channel.argsort(descending=True).tolist()
    shown = session.Session(folder)
    carried = torch.zeros(32).index_fill(0, torch.tensor([1, 3]), 1.0)  # places of channel 0
    shown.__dict__["encoded"] = shown.encoded._replace(kl=carried)
    assert shown.summary()["channels"] == [0, 1]
    monkeypatch.setattr(session, "MOST_PLACES", 16)
    plugin = LatentsPlugin(TBContext(logdir=str(folder.parent)))
    answer = Client(plugin.get_plugin_apps()["/summary"]).get("/", query_string={"run": "run"})
    assert "32 latents, and 16 is the most shown" in answer.json["error"]


def test_the_example_of_the_documentation_composes_and_its_numbers_fit_together():
    from vae.networks import autoencoder_kl

    config = composed("experiment=spatial_latents")
    network = yaml.safe_load(
        yaml.safe_dump(dict(config.network, block_out_channels=list(config.network.block_out_channels)))
    )
    options = {key: value for key, value in network.items() if not key.startswith("_")}
    encoder, decoder = autoencoder_kl((1, 28, 28), config.model.latent_dim, 1, **options)
    assert decoder.latent_shape == (4, 7, 7)
    assert encoder(as_floats(torch.zeros(1, 1, 28, 28))).shape == (1, 2 * 196)
