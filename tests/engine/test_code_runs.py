"""Runs whose latents are codes: by every command."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from conftest import composed

import vae
from vae.engine.callbacks.pictures import all_pictures
from vae.engine.exporting import export
from vae.engine.fitted_priors import fit_prior
from vae.engine.latents import write_latents
from vae.engine.measuring import measure
from vae.engine.run import load, train
from vae.errors import VAEError
from vae.latents.session import Session

FSQ = ["posterior=fsq", "posterior.levels=[4,3]", "model.latent_dim=6"]
VQ = ["posterior=vq", "posterior.dim=2", "posterior.codes=5", "posterior.restart=0.5", "model.latent_dim=6"]


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A finished run of each quantizer."""
    common = ["data.limit=64", "data.batch_size=32", "trainer.max_epochs=1", "threads=1", "trainer.accelerator=cpu"]
    common += ["callbacks=minimal", "network.hidden=[16]", "logger=none"]
    folders = {}
    for name, options in (("fsq", FSQ), ("vq", VQ)):
        folders[name] = tmp_path_factory.mktemp(name)
        train(composed(*common, *options), folders[name], [], progress_bar=False)
    return folders


@pytest.mark.parametrize("name", ["fsq", "vq"])
def test_what_is_done_with_a_run_works_or_is_one_sentence(runs, tmp_path, name):
    folder = runs[name]
    run = vae.load(folder)
    metrics = run.metrics
    assert metrics["test/elbo"] == pytest.approx(-metrics["test/distortion"] - metrics["test/rate"], rel=1e-6)
    assert not any("nll_iw" in key for key in metrics)
    assert 1 <= metrics["test/perplexity"] <= metrics["test/codes_used"] <= run.vae.posterior.number
    x = torch.rand(3, 1, 8, 8)
    assert torch.equal(run.decode(run.vae.posterior.vectors(run.encode(x).indices)), run.reconstruct(x))
    assert run.interpolate(x[0], x[1], 4).shape == (4, 1, 8, 8)
    with pytest.raises(VAEError, match="codes, along which nothing moves"):
        run.traverse(x[0])
    assert write_latents(run, run.data, "test", tmp_path / "latents.npz") == len(run.data.splits.test)
    with np.load(tmp_path / "latents.npz") as found:
        assert np.array_equal(run.vae.posterior.vectors(torch.from_numpy(found["codes"])).numpy(), found["z"])
    with pytest.raises(VAEError, match=r"posterior of this run is discrete.*prior=codes_autoregressive"):
        fit_prior(run.vae, run.data, folder, "gaussian")
    pytest.importorskip("safetensors")
    export(run, tmp_path / "exported")
    assert torch.equal(vae.load(tmp_path / "exported").sample(4, seed=1), run.sample(4, seed=1))
    with pytest.raises(VAEError, match="use posterior=diagonal"):
        _, data, module = load(folder)
        measure(folder, "test", {"measures": ["decomposition"]})
    for measured in ("ais", "gaps"):
        with pytest.raises(VAEError, match=f"measures={measured} needs latents with a density.*posterior=diagonal"):
            measure(folder, "test", {"measures": [measured]})
    with pytest.raises(VAEError, match="nll_samples=7: leave it out"):
        measure(folder, "test", {"measures": ["likelihood"]}, nll_samples=7)
    again = measure(folder, "test", {"measures": ["likelihood"]})
    assert again["test/elbo"] == pytest.approx(metrics["test/elbo"], rel=1e-6)
    module.kl_per_dimension = torch.ones(3)
    with torch.no_grad():
        pictures = all_pictures(module, data.examples("val", 10))
    assert set(pictures) == {
        "samples",
        "reconstructions",
        "kl_per_dimension",
        "latent_space",
    }


def test_the_latents_tab_shows_a_run_of_codes(runs):
    session = Session(runs["vq"])
    assert session.summary()["kl"] is None
    drawn = session.draw(3, 1.0)["z"]
    codes = session.vae.posterior.indices(torch.tensor([drawn]))
    torch.testing.assert_close(session.vae.posterior.vectors(codes)[0], torch.tensor(drawn))
    assert len(session.decode([drawn])["images"]) == 1
    assert len(session.plane("pca")["points"]) == len(session.examples.x)
