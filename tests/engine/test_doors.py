"""What a trained model is taken out by: generated images, latents in files, exported weights and programs."""

from __future__ import annotations

import inspect
import json
import subprocess
import sys
import zipfile

import numpy as np
import pytest
import torch
from hydra import compose, initialize_config_dir
from PIL import Image

import vae
from vae.cli import CONFIGS
from vae.engine.latents import write_latents
from vae.engine.run import train
from vae.errors import VAEError
from vae.seeding import generator


def trained(folder, *overrides):
    small = ["data.limit=64", "data.batch_size=32", "trainer.max_epochs=1", "evaluation.nll_samples=5", "threads=1"]
    small += [
        "trainer.accelerator=cpu",
        "callbacks=minimal",
        "logger=none",
        "model.latent_dim=3",
        "network.hidden=[16]",
    ]
    if any(override.startswith("network=") for override in overrides):
        small.pop()
    with initialize_config_dir(CONFIGS, version_base="1.3"):
        config = compose("train", [*small, *overrides])
    train(config, folder, [*small, *overrides], progress_bar=False)
    return folder


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    return trained(tmp_path_factory.mktemp("doors") / "run")


# --- generate -----------------------------------------------------------------------------------------------------------


def test_generated_files_are_the_samples_of_that_seed(finished, tmp_path):
    from commands import run as command

    done = command("vae.generate", f"run={finished}", "n=5", "seed=3", "out=images", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    expected = vae.load(finished).sample(5, seed=3)
    for number in range(5):
        pixels = np.asarray(Image.open(tmp_path / "images" / f"{number:05}.png").convert("L"))
        assert np.array_equal(pixels, (expected[number, 0] * 255).round().numpy())
    assert (tmp_path / "images" / "grid.png").is_file()
    again = command("vae.generate", f"run={finished}", "out=images", cwd=tmp_path)
    assert again.returncode == 1 and "exists already" in again.stderr and "Traceback" not in again.stderr


# --- encode -------------------------------------------------------------------------------------------------------------


def test_latents_in_a_file_are_those_of_the_model_whatever_the_batch(finished, tmp_path):
    run = vae.load(finished)
    for size in (500, 7):
        run.data.eval_batch_size = size
        n = write_latents(run, run.data, "test", tmp_path / f"{size}.npz")
    x, y = run.data.measured("test").gather(torch.arange(n))
    posterior = run.encode(x)
    found = np.load(tmp_path / "7.npz", allow_pickle=False)
    np.testing.assert_allclose(found["mean"], posterior.mean.numpy(), atol=1e-6)
    np.testing.assert_allclose(found["log_var"], posterior.log_var.numpy(), atol=1e-6)
    assert np.array_equal(found["label"], y.numpy())
    np.testing.assert_allclose(np.load(tmp_path / "500.npz")["mean"], found["mean"], atol=1e-6)
    # mean and standard deviation of z by the law of total variance
    var = posterior.mean.double().var(0, correction=0) + posterior.log_var.double().exp().mean(0)
    np.testing.assert_allclose(found["latent_mean"], posterior.mean.double().mean(0).numpy(), atol=1e-6)
    np.testing.assert_allclose(found["latent_std"], var.sqrt().numpy(), rtol=1e-5)
    standard = (found["z"] - posterior.mean.numpy()) / np.exp(0.5 * found["log_var"])
    assert abs(standard.mean()) < 0.3 and abs(standard.std() - 1) < 0.3
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]


def test_latents_as_parquet_have_a_row_per_image(finished, tmp_path):
    pq = pytest.importorskip("pyarrow.parquet")
    run = vae.load(finished)
    n = write_latents(run, run.data, "val", tmp_path / "latents.parquet")
    write_latents(run, run.data, "val", tmp_path / "latents.npz")
    table, arrays = pq.read_table(tmp_path / "latents.parquet"), np.load(tmp_path / "latents.npz")
    assert table["id"].to_pylist() == list(range(n))
    for i in range(3):
        assert np.array_equal(table[f"mean_{i}"].to_numpy(), arrays["mean"][:, i])
    assert table["label"].to_pylist() == arrays["label"].tolist()


def test_the_names_of_files_go_with_their_latents(tmp_path):
    source = tmp_path / "photos"
    for label in ("a", "b"):
        (source / label).mkdir(parents=True)
        for i in range(20):
            Image.fromarray(np.full((8, 8), 5 * i + (label == "b"), np.uint8)).save(source / label / f"{i}.png")
    data = [
        "data=folder",
        f"data.source.path={source}",
        f"+data.source.cache={tmp_path / 'cache'}",
        "data.batch_size=8",
    ]
    run = vae.load(trained(tmp_path / "run", *data, "data.limit=null"))
    write_latents(run, run.data, "test", tmp_path / "latents.npz")
    found = np.load(tmp_path / "latents.npz")
    assert len(found["name"]) == len(found["mean"]) and {name[0] for name in found["name"]} == {"a", "b"}
    for name, mean in zip(found["name"], found["mean"], strict=True):
        np.testing.assert_allclose(run.encode(Image.open(source / name)).mean[0].numpy(), mean, atol=1e-6)


def test_images_of_another_shape_and_other_endings_are_refused(finished, tmp_path, tiny):
    from vae.engine.build import build_data

    run = vae.load(finished)
    other = build_data(tiny("data=sprites", "++data.source.size=16", "++data.source.subset={scale: 2, x: 2, y: 2}"))
    with pytest.raises(VAEError, match=r"takes images \(1, 8, 8\)"):
        write_latents(run, other, "test", tmp_path / "a.npz")
    with pytest.raises(VAEError, match=r"must end in \.npz or \.parquet"):
        write_latents(run, run.data, "test", tmp_path / "a.csv")
    assert not list(tmp_path.iterdir())


def test_data_of_fewer_images_than_a_batch_are_encoded(finished, tmp_path):
    from commands import run as command

    np.save(tmp_path / "few.npy", np.random.default_rng(0).integers(0, 256, (20, 8, 8), dtype=np.uint8))
    done = command(
        "vae.encode",
        f"run={finished}",
        "out=z.npz",
        "data=arrays",
        "data.source.path=few.npy",
        "split=train",
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr
    assert np.load(tmp_path / "z.npz")["mean"].shape == (16, 3)


@pytest.mark.parametrize("module", ["vae.generate", "vae.encode", "vae.export", "vae.evaluate"])
@pytest.mark.slow
def test_a_file_or_folder_that_is_not_named_is_asked_for(finished, tmp_path, module):
    from commands import run as command

    tried = [["run=null", "out=new.npz"]]
    if module != "vae.evaluate":
        tried += [[f"run={finished}", "out=null"]]
    for options in tried:
        done = command(module, *[o for o in options if module != "vae.evaluate" or "out" not in o], cwd=tmp_path)
        assert done.returncode == 1 and done.stderr.endswith("=null must be the name of a file or folder.\n"), (
            done.stderr
        )
    assert not list(tmp_path.iterdir())


# --- export -------------------------------------------------------------------------------------------------------------

KINDS = [(), ("prior=vampprior", "prior.pseudo_inputs=4"), ("posterior=iaf",), ("objective=cvae",), ("network=conv",)]


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: " ".join(kind) or "plain")
def test_an_exported_model_is_loaded_as_its_run_is(kind, tmp_path):
    pytest.importorskip("safetensors")
    from vae.engine.exporting import export

    run = vae.load(trained(tmp_path / "run", *kind))
    export(run, tmp_path / "out", licence="cc0-1.0")
    again = vae.load(tmp_path / "out")
    y = 3 if run.vae.num_classes else None
    assert torch.equal(again.sample(4, seed=1, y=y), run.sample(4, seed=1, y=y))
    assert again.metrics == run.metrics and again.image_shape == run.image_shape
    card = (tmp_path / "out" / "README.md").read_text()
    assert "license: cc0-1.0" in card and f"| elbo | {run.metrics['test/elbo']:.4f} |" in card
    with pytest.raises(VAEError, match="has no data set"):
        again.data  # noqa: B018
    with pytest.raises(VAEError, match="not an empty folder"):
        export(run, tmp_path / "out")
    assert json.loads((tmp_path / "out" / "config.json").read_text())["vae"] == vae.__version__


@pytest.mark.parametrize(
    ("form", "kind"),
    [
        ("onnx", ()),
        pytest.param("torch_export", ("objective=cvae",), marks=pytest.mark.slow),
        pytest.param("onnx", ("objective=cvae",), marks=pytest.mark.slow),
        pytest.param("onnx", ("network=conv",), marks=pytest.mark.slow),
        pytest.param("torch_export", (), marks=pytest.mark.slow),
        pytest.param("torch_export", ("network=conv",), marks=pytest.mark.slow),
    ],
)
def test_exported_programs_give_our_outputs_at_any_batch_size(form, kind, tmp_path):
    pytest.importorskip("safetensors")
    if form == "onnx":
        if "dynamic_shapes" not in inspect.signature(torch.onnx.export).parameters:
            pytest.skip("torch 2.6 is the first that exports programs for batches of any size")
        pytest.importorskip("onnxscript")
        ort = pytest.importorskip("onnxruntime")
    from vae.engine.exporting import export

    run = vae.load(trained(tmp_path / "run", *kind))
    export(run, tmp_path / "out", form)
    for n in (1, 5):
        x, z = torch.rand(n, *run.image_shape), torch.randn(n, 3)
        y = (torch.arange(n) % 10,) if run.vae.num_classes else ()
        with torch.no_grad():
            expected = {"encoder": run.vae.encoder(x, *y), "decoder": run.decode(z, *y)}
        for name, first in (("encoder", x), ("decoder", z)):
            if form == "torch_export":
                found = torch.export.load(tmp_path / "out" / f"{name}.pt2").module()(first, *y)
            else:
                session = ort.InferenceSession(
                    str(tmp_path / "out" / f"{name}.onnx"), providers=["CPUExecutionProvider"]
                )
                feed = {i.name: v.numpy() for i, v in zip(session.get_inputs(), (first, *y), strict=True)}
                found = torch.from_numpy(session.run(None, feed)[0])
            torch.testing.assert_close(found, expected[name], atol=1e-5, rtol=0)


def test_an_exported_decoder_gives_images_in_the_interval_too(tmp_path):
    from vae.engine.exporting import DecoderProgram

    run = vae.load(trained(tmp_path / "run", "likelihood=gaussian"))
    z = 30 * torch.randn(8, 3, generator=generator("z"))
    assert run.vae.mean_image(z).min() < -0.1
    assert torch.equal(DecoderProgram(run.vae)(z), run.decode(z))


def test_exporting_says_what_it_wrote_and_not_how_the_program_was_rewritten(tmp_path):
    for package in ("safetensors", "onnx", "onnxscript"):
        pytest.importorskip(package)
    if "dynamic_shapes" not in inspect.signature(torch.onnx.export).parameters:
        pytest.skip("torch 2.6 is the first that exports programs for batches of any size")
    from commands import run as command

    run = trained(tmp_path / "run", "objective=cvae")
    done = command("vae.export", f"run={run}", "out=out", "format=onnx", cwd=tmp_path)
    assert done.returncode == 0 and "axis name" not in done.stderr, done.stderr
    assert done.stdout == "model.safetensors, config.json, README.md, encoder.onnx, decoder.onnx: out\n"


def test_exporting_shows_warnings_of_any_package_and_what_this_one_says():
    code = (
        "import logging.config; from hydra import compose, initialize_config_dir; from omegaconf import OmegaConf\n"
        "from vae.cli import CONFIGS; context = initialize_config_dir(CONFIGS, version_base='1.3'); context.__enter__()\n"
        "logged = compose('export', ['run=a', 'out=b'], return_hydra_config=True).hydra.job_logging\n"
        "logging.config.dictConfig(OmegaConf.to_container(logged, resolve=True))\n"
        "for name in ('onnxscript', 'vae'):\n"
        "    logging.getLogger(name).info(name + ' says'); logging.getLogger(name).warning(name + ' warns')\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout == "onnxscript warns\nvae says\nvae warns\n", done.stderr


def test_an_older_torch_that_cannot_export_onnx_is_named_before_anything_is_written(tmp_path, monkeypatch):
    pytest.importorskip("safetensors")
    from vae.engine.exporting import export

    run = vae.load(trained(tmp_path / "run"))
    monkeypatch.setattr(torch, "__version__", "2.5.1")
    with pytest.raises(VAEError, match=r"needs torch 2\.6 or newer, and this is 2\.5\.1"):
        export(run, tmp_path / "out", "onnx")
    assert not (tmp_path / "out").exists()


def test_an_autoregressive_decoder_is_no_program_and_a_file_holds_no_pickle(tmp_path):
    pytest.importorskip("safetensors")
    from vae.engine.exporting import export

    run = vae.load(trained(tmp_path / "run", "network=made"))
    with pytest.raises(VAEError, match="autoregressive"):
        export(run, tmp_path / "out", "torch_export")
    export(run, tmp_path / "out")
    assert not zipfile.is_zipfile(tmp_path / "out" / "model.safetensors")
