"""vae.load: a trained run in three lines, equal to what training measured, without its data, Hydra or Lightning."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import vae
from vae.cli import CONFIGS
from vae.engine.run import load as load_module
from vae.engine.run import train
from vae.errors import VAEError
from vae.likelihoods import LocationScale
from vae.seeding import generator


@pytest.fixture(scope="module")
def finished(tmp_path_factory, request):
    """A finished run of tiny digits."""
    return _trained(tmp_path_factory.mktemp("sweep") / "run")  # alone in its folder: a test reads that


def _trained(folder, *overrides):
    from hydra import compose, initialize_config_dir

    small = ["data.limit=64", "data.batch_size=32", "trainer.max_epochs=1", "evaluation.nll_samples=5", "threads=1"]
    small += ["callbacks=minimal", "logger=none", "network.hidden=[16]", "model.latent_dim=3"]
    with initialize_config_dir(CONFIGS, version_base="1.3"):
        config = compose("train", [*small, *overrides])
    train(config, folder, [*small, *overrides], progress_bar=False)
    return folder


@pytest.mark.parametrize(
    "kind", [(), ("prior=vampprior", "prior.pseudo_inputs=4"), ("posterior=iaf",), ("objective=cvae",)]
)
def test_a_loaded_model_has_the_weights_that_were_tested(kind, tmp_path):
    folder = _trained(tmp_path / "run", *kind)
    _, data, module = load_module(folder)
    batch = data.examples("test", 8)
    y = batch.y if module.vae.num_classes else None
    ours = vae.load(str(folder))
    with torch.no_grad():
        assert torch.equal(ours.reconstruct(batch.x, y), module.vae.reconstruct(batch.x, y))
        assert torch.equal(ours.encode(batch.x, y).mean, module.vae.encode(batch.x, y).mean)
    assert ours.metrics["test/elbo"] == json.loads((folder / "metrics.json").read_text())["test/elbo"]


def test_it_needs_neither_data_nor_hydra_nor_lightning(finished, tmp_path):
    code = (
        "import sys, vae; run = vae.load(sys.argv[1]); x = run.sample(4, seed=1); "
        "assert x.shape == (4, 1, 8, 8) and not x.requires_grad; "
        "print([m for m in ('hydra', 'pytorch_lightning', 'sklearn', 'torchvision') if m in sys.modules])"
    )
    out = subprocess.run([sys.executable, "-c", code, str(finished)], capture_output=True, text=True, cwd=tmp_path)
    assert out.stdout.strip() == "[]", out.stderr


def test_import_vae_is_lazy_and_offers_what_it_lists():
    code = "import sys, vae; assert 'torch' not in sys.modules; [getattr(vae, name) for name in dir(vae)]"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True).returncode == 0


def test_every_form_of_the_same_image_is_the_same_image(finished):
    run = vae.load(finished)
    levels = (np.arange(64).reshape(8, 8) * 4).astype(np.uint8)
    expected = torch.from_numpy(levels).float()[None, None] / 255
    forms = [levels, levels[None], levels[..., None], levels[None, None], torch.from_numpy(levels), levels / 255]
    for form in [*forms, Image.fromarray(levels), [Image.fromarray(levels)]]:
        assert torch.equal(run.images(form), expected)
    assert run.images([levels, levels]).shape == (2, 1, 8, 8)
    assert torch.equal(run.encode(levels).mean, run.encode(expected).mean)


@pytest.mark.parametrize(
    ("image", "sentence"),
    [
        (np.zeros((9, 8), np.uint8), r"\(C, H, W\) = \(1, 8, 8\), not \(9, 8\)"),
        (np.full((8, 8), 255.0), "between 255 and 255"),
        (np.full((8, 8), np.nan), "lie in"),
        (np.zeros((8, 8), np.int64), "not int64"),
    ],
)
def test_other_images_are_refused_in_a_sentence(finished, image, sentence):
    with pytest.raises(VAEError, match=sentence):
        vae.load(finished).encode(image)


def test_samples_repeat_by_seed_and_lines_end_at_the_reconstructions(finished):
    run = vae.load(finished)
    assert torch.equal(run.sample(3, seed=5), run.sample(3, seed=5))
    assert not torch.equal(run.sample(3, seed=5), run.sample(3, seed=6))
    a, b = torch.zeros(1, 8, 8), torch.ones(1, 8, 8)
    line = run.interpolate(a, b, steps=5)
    torch.testing.assert_close(line[[0, -1]], torch.cat([run.reconstruct(a), run.reconstruct(b)]))
    middle = run.decode((run.encode(a).mean + run.encode(b).mean) / 2)
    torch.testing.assert_close(line[2:3], middle)


@pytest.mark.parametrize("likelihood", sorted(path.stem for path in (Path(CONFIGS) / "likelihood").glob("*.yaml")))
def test_images_are_means_cut_to_the_interval_and_are_taken_in_again(likelihood, tmp_path):
    run = vae.load(_trained(tmp_path / "run", f"likelihood={likelihood}", "data.binarize=none"))
    for parameter in run.vae.decoder.parameters():
        parameter.mul_(10)
    mean = run.vae.sample(32, generator(4, "samples"))
    unbounded = isinstance(run.vae.likelihood, LocationScale)
    assert (mean.min() < -0.1 and mean.max() > 1.1) == unbounded
    images = run.sample(32, seed=4)
    assert torch.equal(images, mean.clamp(0, 1))
    z = run.encode(images).mean  # which takes images in [0, 1] alone
    assert torch.equal(run.decode(z), run.vae.mean_image(z).clamp(0, 1))
    assert torch.equal(run.reconstruct(images), run.decode(z))
    for others in (run.interpolate(images[0], images[1]), run.traverse(images[0], reach=9.0)):
        assert others.min() >= 0 and others.max() <= 1


def test_a_traversal_moves_one_latent_and_leaves_the_others(finished):
    run = vae.load(finished)
    image = torch.zeros(1, 8, 8)
    pictures = run.traverse(image, dims=[2, 0], reach=2.0, steps=3)
    assert pictures.shape == (2, 3, 1, 8, 8)
    z = run.encode(image).mean.clone()
    z[0, 2] = 2.0
    torch.testing.assert_close(pictures[0, 2], run.decode(z)[0])
    with pytest.raises(VAEError, match="0 to 2"):
        run.traverse(image, dims=[3])


def test_labels_are_asked_for_and_checked(tmp_path, finished):
    run = vae.load(_trained(tmp_path / "run", "objective=cvae"))
    with pytest.raises(VAEError, match="one of 10 classes"):
        run.sample(2)
    with pytest.raises(VAEError, match="0 to 9"):
        run.sample(2, y=10)
    assert torch.equal(run.sample(2, y=3), run.sample(2, y=[3, 3]))
    with pytest.raises(VAEError, match="no labels"):
        vae.load(finished).sample(2, y=1)


def test_only_this_packages_own_classes_are_called_unless_trusted(finished, tmp_path):
    import shutil

    folder = tmp_path / "run"
    shutil.copytree(finished, folder)
    config = (folder / "config.yaml").read_text()
    (folder / "config.yaml").write_text(config.replace("vae.likelihoods.Bernoulli", "os.getcwd"))
    with pytest.raises(VAEError, match=r"os\.getcwd.*trust=True"):
        vae.load(folder)
    for own in (
        "vae.data.sources.digits",
        "vae.objectives.elbo.BetaVAE",
    ):  # of runs without facts, which their data replace
        assert own in config
        (folder / "config.yaml").write_text(config.replace(own, "os.getcwd"))
        (folder / "facts.json").unlink(missing_ok=True)
        with pytest.raises(VAEError, match=r"os\.getcwd.*trust=True"):
            vae.load(folder)
    with pytest.raises(VAEError, match=r"trust=no is unknown: choose one of false, true\."):
        vae.load(folder, trust="no")


def test_a_run_without_facts_falls_back_to_its_data(finished, tmp_path):
    import shutil

    folder = tmp_path / "run"
    shutil.copytree(finished, folder)
    (folder / "facts.json").unlink()
    assert torch.equal(vae.load(folder).sample(2), vae.load(finished).sample(2))


def test_facts_say_what_the_run_is(finished):
    facts = json.loads((finished / "facts.json").read_text())
    assert facts["data"] == "digits"
    assert facts["image_shape"] == [1, 8, 8]
    assert (facts["likelihood"], facts["discrete"], facts["num_classes"]) == ("Bernoulli", True, 0)
    assert facts["vae"] == vae.__version__
    assert "model.latent_dim" in facts["set"]


def test_a_sweep_is_a_data_frame(finished):
    pandas = pytest.importorskip("pandas")
    table = vae.runs(finished.parent)
    assert isinstance(table, pandas.DataFrame)
    assert table.loc[table.path == str(finished), "test/elbo"].item() == vae.load(finished).metrics["test/elbo"]


def test_a_folder_that_is_no_run_is_refused(tmp_path):
    with pytest.raises(VAEError, match=r"no config\.yaml"):
        vae.load(tmp_path)


def test_a_traversal_goes_from_one_end_through_0_to_the_other(finished):
    run = vae.load(finished)
    image = run.sample(1)
    moved = run.traverse(image, dims=[1], reach=2, steps=3)[0]
    z = run.encode(image).mean.repeat(3, 1)
    z[:, 1] = torch.tensor([-2.0, 0.0, 2.0])
    torch.testing.assert_close(moved, run.decode(z))
