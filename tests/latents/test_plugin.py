"""The Latents tab's routes: what they answer is what the run itself says, and nothing outside the logdir is read."""

from __future__ import annotations

import base64
import io
import os
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
import yaml
from conftest import composed
from PIL import Image
from tensorboard.plugins.base_plugin import TBContext
from werkzeug.test import Client

import vae
from vae.data.images import Images, Splits
from vae.engine.fitted_priors import fit_prior
from vae.engine.run import train
from vae.latents.plugin import MOST_BYTES, LatentsPlugin

SMALL = ["data.limit=64", "data.batch_size=32", "trainer.max_epochs=1", "evaluation.nll_samples=0", "threads=1"]
SMALL += ["callbacks=minimal", "logger=none", "network.hidden=[16]", "model.latent_dim=3"]


def trained(folder, *overrides):
    train(composed(*SMALL, *overrides), folder, [*SMALL, *overrides], progress_bar=False)


@pytest.fixture(scope="module")
def logdir(tmp_path_factory):
    folder = tmp_path_factory.mktemp("logdir")
    trained(folder / "sweep" / "beta=1")
    trained(folder / "labels", "objective=cvae")
    (folder / "unfinished").mkdir()
    (folder / "unfinished" / "config.yaml").write_text("seed: 0")
    return folder


class Tab:
    """The routes as the page calls them."""

    def __init__(self, logdir, run="sweep/beta=1"):
        self.plugin, self.run = LatentsPlugin(TBContext(logdir=str(logdir))), run
        self.apps = self.plugin.get_plugin_apps()

    def raw(self, route, body=None, **query):
        client = Client(self.apps[f"/{route}"])
        if isinstance(body, bytes):
            return client.post("/", data=body, query_string={"run": self.run, **query})
        if body is not None:
            return client.post("/", json={"run": self.run, **body})
        return client.get("/", query_string={"run": self.run, **query})

    def __call__(self, route, body=None, **query):
        answer = self.raw(route, body, **query)
        assert answer.status_code == 200, answer.text
        assert answer.headers["X-Content-Type-Options"] == "nosniff"
        return answer.json

    def refuses(self, route, body=None, **query):
        answer = self.raw(route, body, **query)
        assert answer.status_code == 400 and list(answer.json) == ["error"]
        return answer.json["error"]


@pytest.fixture(scope="module")
def tab(logdir):
    return Tab(logdir)


def pixels(url):
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(url.partition(",")[2])))).astype(int)


def shown(images):
    """Images (N, 1, H, W) as the page gets them, (N, H, W, 3)."""
    return (images.clamp(0, 1) * 255).round().int().expand(-1, 3, -1, -1).permute(0, 2, 3, 1).numpy()


def test_runs_are_the_folders_of_the_logdir_that_hold_a_model(tab, tmp_path):
    assert tab("runs") == {"runs": ["labels", "sweep/beta=1"]}
    assert tab.plugin.is_active() and not LatentsPlugin(TBContext(logdir=str(tmp_path))).is_active()
    assert not LatentsPlugin(TBContext(logdir="")).is_active()


def test_runs_are_named_by_the_parts_of_a_logdir_spec(logdir):
    from argparse import Namespace

    flags = Namespace(logdir_spec=f"a:{logdir / 'sweep'},b:{logdir / 'labels'}")
    tab = Tab.__new__(Tab)
    tab.plugin, tab.run = LatentsPlugin(TBContext(logdir="", flags=flags)), "a/beta=1"
    tab.apps = tab.plugin.get_plugin_apps()
    assert tab("runs") == {"runs": ["a/beta=1", "b/."]}
    assert tab("summary")["latents"] == 3


def test_torch_is_not_imported_before_a_run_is_asked_for(logdir):
    code = (
        "import sys; from tensorboard.plugins.base_plugin import TBContext; from vae.latents.plugin import LatentsPlugin; "
        "plugin = LatentsPlugin(TBContext(logdir=sys.argv[1])); plugin.get_plugin_apps(); assert plugin.is_active(); "
        "assert plugin.frontend_metadata().tab_name == 'Latents'; assert 'torch' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", code, str(logdir)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_what_is_decoded_is_what_the_run_decodes(tab, logdir):
    z = [[0.5, -1.0, 2.0], [0.0, 0.0, 0.0]]
    images = tab("decode", {"z": z})["images"]
    expected = shown(vae.load(logdir / "sweep" / "beta=1").decode(z))
    assert np.array_equal([pixels(image) for image in images], expected)


def test_a_conditional_model_decodes_the_label_that_is_chosen(logdir):
    tab, run = Tab(logdir, "labels"), vae.load(logdir / "labels")
    z = [[0.5, -1.0, 2.0]]
    for y in (0, 7):
        assert np.array_equal(pixels(tab("decode", {"z": z, "y": y})["images"][0]), shown(run.decode(z, y))[0])
    assert tab("summary")["classes"] == 10 and tab("point", {"index": 3})["y"] in range(10)
    assert "labels y" in tab.refuses("decode", {"z": z})
    assert "from 0 to 9" in tab.refuses("decode", {"z": z, "y": 10})


def test_the_summary_is_of_the_encoded_test_images(tab, logdir):
    summary, run = tab("summary"), vae.load(logdir / "sweep" / "beta=1")
    batch = run.data.examples("test", 1000)
    mean, log_var = run.encode(batch.x)
    kl = (0.5 * (mean**2 + log_var.exp() - log_var - 1)).mean(0)
    variance = mean.var(0, correction=0)
    assert summary["kl"] == pytest.approx(kl.tolist(), rel=1e-4)
    assert summary["order"] == kl.argsort(descending=True).tolist()
    assert summary["mean"] == pytest.approx(mean.mean(0).tolist(), abs=1e-5)
    assert summary["std"] == pytest.approx((variance + log_var.exp().mean(0)).sqrt().tolist(), rel=1e-4)
    assert summary["active"] == (variance > 0.01).tolist()
    assert summary["labels"]["label"] == batch.y.tolist() and summary["examples"] == f"{len(batch.x)} test images"
    sheet = np.asarray(Image.open(io.BytesIO(tab.raw("thumbnails").data)))
    assert summary["thumbnail"] == {"width": 32, "height": 32, "columns": 32}
    assert np.array_equal(sheet[:32, 32:64][::4, ::4], shown(batch.x[1:2])[0])  # digits, 8 x 8, enlarged


def test_an_uploaded_image_is_encoded_as_the_run_does(tab, logdir):
    run = vae.load(logdir / "sweep" / "beta=1")
    levels = (run.data.examples("test", 6).x[5, 0] * 255).round().byte().numpy()
    file = io.BytesIO()
    Image.fromarray(levels).save(file, "PNG")
    found = tab("encode", file.getvalue())
    mean, log_var = run.encode(levels)
    rates = 0.5 * (mean**2 + log_var.exp() - log_var - 1)
    assert found["z"] == pytest.approx(mean[0].tolist(), rel=1e-5)
    assert found["rates"] == pytest.approx(rates[0].tolist(), rel=1e-4)
    assert found["rate"] == pytest.approx(float(rates.sum()), rel=1e-4)
    assert np.array_equal(pixels(found["reconstruction"]), shown(run.reconstruct(levels))[0])
    assert np.array_equal(pixels(found["image"])[..., 0], levels)
    assert found["neighbours"][0]["index"] == 5 and found["neighbours"][0]["distance"] == pytest.approx(0, abs=1e-3)
    noise = mean + (log_var / 2).exp() * torch.randn(4000, 3, generator=torch.Generator().manual_seed(0))
    p = run.decode(noise).clamp(1e-6, 1 - 1e-6)
    x = run.images(levels)
    nats = -(x * p.log() + (1 - x) * (1 - p).log()).sum((1, 2, 3))
    assert abs(found["distortion"] - nats.mean()) < 4 * nats.std() / 16**0.5


@pytest.mark.parametrize("form", ["palette", "larger", "alpha"])
def test_an_upload_of_another_form_is_fitted(tab, form):
    image = Image.new("RGB", (40, 20), (200, 200, 200))
    image = {"palette": image.quantize(2), "larger": image.resize((300, 900)), "alpha": image.convert("RGBA")}[form]
    file = io.BytesIO()
    image.save(file, "PNG")
    assert abs(pixels(tab("encode", file.getvalue())["image"]) - 200).max() <= 1


def test_a_point_on_the_map_is_the_image_that_the_run_encodes(tab, logdir):
    run = vae.load(logdir / "sweep" / "beta=1")
    mean = run.encode(run.data.examples("test", 1000).x).mean
    plane = tab("plane", {"axes": [2, 0]})
    assert plane["points"][7] == pytest.approx(mean[7, [2, 0]].tolist(), rel=1e-5)
    assert plane["right"] == [0, 0, 1] and plane["up"] == [1, 0, 0] and plane["origin"] == [0, 0, 0]
    assert tab("point", {"index": 7})["z"] == pytest.approx(mean[7].tolist(), rel=1e-5)
    plane = tab("plane", {"axes": "pca"})
    axes = torch.tensor([plane["right"], plane["up"]])
    assert torch.allclose(axes @ axes.T, torch.eye(2), atol=1e-5)
    variances = torch.tensor(plane["points"]).var(0)
    assert variances.tolist() == pytest.approx(torch.linalg.eigvalsh(mean.T.cov()).flip(0)[:2].tolist(), rel=1e-4)


def test_the_density_beneath_is_that_of_the_prior(tab):
    plane = tab("plane", {"axes": [0, 1]})
    density = torch.tensor(plane["density"])
    low, high = torch.tensor(plane["low"]), torch.tensor(plane["high"])
    x, y = (low[k] + (torch.arange(48) + 0.5) / 48 * (high[k] - low[k]) for k in range(2))
    exact = torch.exp(-0.5 * (x[None] ** 2 + y[:, None] ** 2))
    assert density.max() == 1 and (density - exact).abs().max() < 0.15
    assert density.shape == (48, 48)


def test_a_prior_fitted_afterwards_is_drawn_from_and_lies_beneath(logdir, tmp_path):
    folder = shutil.copytree(logdir / "sweep" / "beta=1", tmp_path / "run")
    tab, run = Tab(tmp_path, "run"), vae.load(folder)
    assert tab("summary")["priors"] == []
    fit_prior(run.vae, run.data, folder, "gaussian", "mine")
    assert tab("summary")["priors"] == ["mine"]
    prior = run.with_prior("mine").vae.prior
    z = prior.sample(1, vae.generator(3, "latents draw"))[0]
    assert tab("draw", {"seed": 3, "temperature": 1, "prior": "mine"})["z"] == pytest.approx(z.tolist(), abs=1e-5)
    assert tab("draw", {"seed": 3, "temperature": 1, "prior": ""}) == tab("draw", {"seed": 3, "temperature": 1})
    plane = tab("plane", {"axes": [0, 1], "prior": "mine"})
    low, high = torch.tensor(plane["low"]), torch.tensor(plane["high"])
    x, y = (low[k] + (torch.arange(48) + 0.5) / 48 * (high[k] - low[k]) for k in range(2))
    grid = torch.stack([x.expand(48, 48), y[:, None].expand(48, 48)], -1)
    covariance = (prior.scale[0] @ prior.scale[0].T)[:2, :2]
    exact = torch.distributions.MultivariateNormal(prior.mean[0, :2], covariance).log_prob(grid).exp()
    assert (torch.tensor(plane["density"]) - exact / exact.max()).abs().max() < 0.2
    assert plane["density"] != tab("plane", {"axes": [0, 1]})["density"]
    # one that is fitted anew is read anew; what is not there, or lies elsewhere, is refused
    fit_prior(run.vae, run.data, folder, "mixture", "mine", options={"components": 2}, resume="restart")
    os.utime(folder / "priors" / "mine" / "config.json", ns=(1, 2**62))
    z = run.with_prior("mine").vae.prior.sample(1, vae.generator(3, "latents draw"))[0]
    assert tab("draw", {"seed": 3, "prior": "mine"})["z"] == pytest.approx(z.tolist(), abs=1e-4)
    assert "choose one of mine" in tab.refuses("draw", {"prior": "other"})
    shutil.move(folder / "priors" / "mine", tmp_path / "outside")
    (folder / "priors" / "mine").symlink_to(tmp_path / "outside")
    assert "link out of the run's folder" in tab.refuses("plane", {"axes": "pca", "prior": "mine"})


def test_draws_from_the_prior_scale_with_the_temperature(tab):
    cold, warm = (torch.tensor(tab("draw", {"seed": 3, "temperature": t})["z"]) for t in (0.5, 1))
    assert torch.allclose(2 * cold, warm) and warm.abs().max() > 0.1
    assert tab("draw", {"seed": 4, "temperature": 1})["z"] != warm.tolist()
    assert "0 to 10" in tab.refuses("draw", {"temperature": 11})


def test_a_walk_is_straight_or_turns_at_an_even_pace(tab, logdir):
    a, b = [2.0, 0.0, 0.0], [0.0, 2.0, 0.0]
    straight = tab("walk", {"a": a, "b": b, "steps": 5})
    assert np.allclose(straight["z"], [[2 - t, t, 0] for t in np.linspace(0, 2, 5)])
    expected = shown(vae.load(logdir / "sweep" / "beta=1").decode(straight["z"]))
    assert np.array_equal([pixels(image) for image in straight["images"]], expected)
    turned = tab("walk", {"a": a, "b": b, "steps": 5, "path": "spherical"})["z"]
    angles = np.linspace(0, np.pi / 2, 5)
    assert np.allclose(turned, np.stack([2 * np.cos(angles), 2 * np.sin(angles), 0 * angles], 1), atol=1e-5)
    assert np.allclose(tab("walk", {"a": a, "b": a, "steps": 2, "path": "spherical"})["z"], [a, a])


def test_what_is_shown_is_saved(tab, logdir):
    z = [[0.5, -1.0, 2.0], [1.0, 0.0, 0.0], [0.0, 0.0, 0.0]]
    images = vae.load(logdir / "sweep" / "beta=1").decode(z)
    saved = np.load(io.BytesIO(tab.raw("file", {"z": z, "format": "npz"}).data))
    assert np.array_equal(saved["z"], z) and np.array_equal(saved["images"], images)
    picture = Image.open(io.BytesIO(tab.raw("file", {"z": z[:1], "format": "png"}).data))
    assert np.array_equal(np.asarray(picture), shown(images)[0])
    film = Image.open(io.BytesIO(tab.raw("file", {"z": z, "format": "gif"}).data))
    assert film.n_frames == 4 and film.size == (128, 128)
    film.seek(1)
    assert abs(np.asarray(film.convert("RGB")).astype(int)[::16, ::16] - shown(images)[1]).max() <= 2
    assert "png, npz, gif" in tab.refuses("file", {"z": z, "format": "exe"})


# --- what is refused --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "run", ["../outside", "sweep/../../outside", "link", "weights", "nowhere", "", None, "a\0b", 3]
)
def test_nothing_outside_the_logdir_is_read(logdir, tmp_path, run):
    inside, outside = tmp_path / "logdir", tmp_path / "outside"
    shutil.copytree(logdir / "sweep" / "beta=1", outside)
    shutil.copytree(outside, inside / "weights")
    (inside / "weights" / "checkpoints" / "best.ckpt").unlink()
    os.symlink(outside / "checkpoints" / "best.ckpt", inside / "weights" / "checkpoints" / "best.ckpt")
    os.symlink(outside, inside / "link")
    tab = Tab(inside)
    assert "link" not in tab("runs")["runs"]
    assert tab.refuses("decode", {"run": run, "z": [[0, 0, 0]]})
    if run in ("link", "../outside"):
        assert "is not a run in TensorBoard's logdir" in tab.refuses("decode", {"run": run, "z": [[0, 0, 0]]})
    if run == "../outside":
        assert "is not a run" in tab.refuses("decode", {"run": str(outside), "z": [[0, 0, 0]]})


@pytest.mark.parametrize("damage", ["cut", "pickle", "config", "facts"])
def test_a_damaged_run_is_a_sentence(logdir, tmp_path, damage):
    shutil.copytree(logdir / "sweep" / "beta=1", tmp_path / "run")
    checkpoint = tmp_path / "run" / "checkpoints" / "best.ckpt"
    if damage == "cut":
        checkpoint.write_bytes(checkpoint.read_bytes()[:500])
    elif damage == "pickle":
        torch.save({"state_dict": os.system}, checkpoint)
    elif damage == "config":
        (tmp_path / "run" / "config.yaml").write_text("{")
    else:
        (tmp_path / "run" / "facts.json").write_text("{}")
    assert "damaged" in Tab(tmp_path, "run").refuses("summary")


def test_a_run_without_facts_is_opened_with_its_data_unless_they_are_made_by_other_code(logdir, tmp_path):
    shutil.copytree(logdir / "sweep" / "beta=1", tmp_path / "run")
    expected = Tab(tmp_path, "run")("summary")
    (tmp_path / "run" / "facts.json").unlink()
    assert Tab(tmp_path, "run")("summary") == expected
    path = tmp_path / "run" / "config.yaml"
    config = yaml.safe_load(path.read_text())
    config["data"]["source"] = {"_target_": "os.system", "_partial_": True, "command": f"touch {tmp_path / 'ran'}"}
    path.write_text(yaml.safe_dump(config))
    assert "os.system" in Tab(tmp_path, "run").refuses("summary")
    assert not (tmp_path / "ran").exists()


def test_requests_are_bounded(tab):
    assert "1 to 64 rows" in tab.refuses("decode", {"z": [[0.0, 0.0, 0.0]] * 65})
    assert "1 to 64 rows" in tab.refuses("decode", {"z": [[0.0] * 4]})
    assert "2 to 64" in tab.refuses("walk", {"a": [0, 0, 0], "b": [1, 1, 1], "steps": 65})
    assert "10 MB" in tab.refuses("encode", bytes(MOST_BYTES + 1))
    assert "no image" in tab.refuses("encode", b"GIF89a, or so it says")
    assert "finite" in tab.refuses("decode", {"z": [[float("nan"), 0, 0]]})
    assert "not JSON" in Client(tab.apps["/decode"]).post("/", data=b"[").json["error"]
    assert "z is no list" in tab.refuses("decode", {"z": "x"})
    assert "axes" in tab.refuses("plane", {"axes": [0, 3]})


def test_where_the_data_are_gone_images_of_the_model_stand_in(logdir, tmp_path):
    shutil.copytree(logdir / "sweep" / "beta=1", tmp_path / "run")
    path = tmp_path / "run" / "config.yaml"
    config = yaml.safe_load(path.read_text())
    config["data"]["source"] = {"_target_": "os.system", "_partial_": True, "command": f"touch {tmp_path / 'ran'}"}
    path.write_text(yaml.safe_dump(config))
    tab = Tab(tmp_path, "run")
    summary = tab("summary")
    assert "256 images drawn from the model" in summary["examples"] and "os.system" in summary["examples"]
    assert len(summary["kl"]) == 3 and len(tab("plane", {"axes": "pca"})["points"]) == 256
    assert not (tmp_path / "ran").exists()


def colours_16_by_8() -> Splits:
    x = torch.randint(0, 256, (64, 3, 16, 8), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    return Splits(*(Images(x, None) for _ in range(3)))


@pytest.mark.parametrize("kind", [("posterior=iaf",), ("prior=mixture", "prior.components=2"), ("model.latent_dim=1",)])
def test_other_models_answer_too(tmp_path, kind):
    trained(tmp_path / "run", *kind)
    tab = Tab(tmp_path, "run")
    summary = tab("summary")
    assert summary["kl"] is None or len(summary["kl"]) == summary["latents"]
    assert sorted(summary["order"]) == list(range(summary["latents"]))
    axes = [0, min(1, summary["latents"] - 1)]
    assert len(tab("plane", {"axes": axes})["points"]) == len(tab("plane", {"axes": "pca"})["points"]) == 64
    z = tab("draw", {"seed": 0})["z"]
    assert len(tab("decode", {"z": [z]})["images"]) == 1
    file = io.BytesIO()
    Image.new("L", (8, 8), 100).save(file, "PNG")
    found = tab("encode", file.getvalue())
    assert found["rates"] is None or sum(found["rates"]) == pytest.approx(found["rate"], rel=1e-5)


def test_colour_images_that_are_not_square_keep_their_shape(tmp_path):
    np.save(tmp_path / "x.npy", colours_16_by_8().train.x.numpy())
    trained(
        tmp_path / "run",
        "data=arrays",
        f"data.source.path={tmp_path / 'x.npy'}",
        "likelihood=gaussian",
        "data.limit=32",
        "data.batch_size=8",
    )
    tab = Tab(tmp_path, "run")
    summary = tab("summary")
    assert summary["shape"] == [3, 16, 8] and summary["thumbnail"] == {"width": 16, "height": 32, "columns": 32}
    expected = vae.load(tmp_path / "run").decode([[0.0, 0.0, 0.0]])[0].clamp(0, 1).permute(1, 2, 0) * 255
    assert np.array_equal(pixels(tab("decode", {"z": [[0, 0, 0]]})["images"][0]), expected.round().int().numpy())


def test_the_page_is_one_module_that_loads_nothing_from_elsewhere(tab):
    answer = tab.raw("index.js")
    assert answer.status_code == 200 and answer.content_type.startswith("application/javascript")
    assert "export function render" in answer.text or "export async function render" in answer.text
    assert "http://" not in answer.text.replace("http://www.w3.org/", "") and "https://" not in answer.text
