"""per_image-SPLIT.npz: its numbers are those of the metrics before the mean, it is whole, and says which images it is of."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

from vae.engine import per_image
from vae.engine.measuring import measure
from vae.engine.module import VAEModule
from vae.engine.per_image import PerImage, digest_of, write_per_image
from vae.engine.run import train
from vae.errors import VAEError
from vae.report.per_image import per_image_path, read_per_image

LIKELIHOOD = {"measures": ["likelihood"]}


def trained(config, folder, **options):
    train(config, folder, [], progress_bar=False, **options)
    return json.loads((folder / "metrics.json").read_text())


def test_the_mean_over_images_is_the_metric_whatever_the_batches(tiny, tmp_path):
    metrics = trained(tiny("data.eval_batch_size=10"), tmp_path)
    found = read_per_image(tmp_path, "test")
    assert set(found) == {"elbo", "rate", "nll_iw5", "images", "weights"}
    for name in ("elbo", "rate", "nll_iw5"):
        assert found[name].shape == (64,) and found[name].dtype == np.float32
        assert found[name].astype(np.float64).mean() == pytest.approx(metrics[f"test/{name}"], rel=1e-6)
    assert np.corrcoef(found["elbo"], -found["nll_iw5"])[0, 1] > 0.95  # image for image, in one order


def test_of_a_model_that_sums_its_label_out_the_one_pass_is_named_by_what_it_is_of(tiny, tmp_path):
    metrics = trained(tiny("objective=m2", "data.labeled=20", "objective.labeled_per_batch=4"), tmp_path)
    found = read_per_image(tmp_path, "test")
    names = {"elbo_given_label", "rate_given_label", "nll_iw5", "nll_iw5_given_label"}
    assert set(found) == names | {"images", "weights"}
    for name in names:
        assert found[name].astype(np.float64).mean() == pytest.approx(metrics[f"test/{name}"], rel=1e-6)


def test_images_have_one_digest_for_every_run_and_other_images_another(tiny, tmp_path):
    configs = {
        "a": tiny(),
        "seed": tiny("seed=3", "data.eval_batch_size=7"),
        "fewer": tiny("data.limit=40"),
        "pixels": tiny("data.binarize=dynamic"),
    }
    for name, config in configs.items():
        trained(config, tmp_path / name)
    digests = {name: str(read_per_image(tmp_path / name, "test")["images"]) for name in configs}
    assert digests["a"] == digests["seed"]
    assert len({*digests.values()}) == 3


def test_a_digest_is_of_pixels_and_shape_and_not_of_a_last_bit():
    x = torch.rand(4, 1, 2, 6)

    def digest(*batches):
        seen = PerImage()
        for batch in batches:
            seen.see(batch)
        return seen.digest()

    assert digest(x) == digest(x[:1], x[1:]) == digest(x.double())
    assert digest(x / 255 * 255) == digest(x)
    assert digest(x) != digest(x.view(4, 1, 3, 4)) and digest(x) != digest(x.flip(0))
    other = x.clone()
    other[3, 0, 1, 5] += 1 / 255
    assert digest(other) != digest(x)


def test_the_digest_of_a_model_changes_with_any_weight():
    model = torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.BatchNorm1d(3))
    first = digest_of(model)
    assert digest_of(model) == first
    model[1].running_mean[2] += 1e-6
    assert digest_of(model) != first


def test_evaluating_again_adds_what_is_new_and_leaves_what_the_metrics_are_the_mean_of(tiny, tmp_path):
    trained(tiny(), tmp_path)
    before = read_per_image(tmp_path, "test")
    before["elbo"] += 0.01  # as another device draws
    np.savez(per_image_path(tmp_path, "test"), **before)
    measure(tmp_path, "test", LIKELIHOOD, nll_samples=7)
    after = read_per_image(tmp_path, "test")
    assert set(after) == {*before, "nll_iw7"}
    assert all(np.array_equal(after[name], before[name]) for name in before)
    measure(tmp_path, "val", LIKELIHOOD)
    assert read_per_image(tmp_path, "val")["images"] != before["images"]


def test_a_run_without_the_file_gets_it_by_evaluating(tiny, tmp_path):
    trained(tiny(), tmp_path)
    before = read_per_image(tmp_path, "test")
    for damage in (b"", b"PK\x03\x04 cut off", None):
        path = per_image_path(tmp_path, "test")
        path.unlink() if damage is None else path.write_bytes(damage)
        assert read_per_image(tmp_path, "test") == {}
        measure(tmp_path, "test", LIKELIHOOD)
        after = read_per_image(tmp_path, "test")
        assert all(np.array_equal(after[name], before[name]) for name in before)


def test_what_other_weights_left_is_not_kept_beside_what_is_new(tiny, tmp_path):
    trained(tiny(), tmp_path)
    path = per_image_path(tmp_path, "test")
    content = read_per_image(tmp_path, "test")
    content |= {"weights": np.array("0" * 32), "elbo": content["elbo"] + 1, "nll_iw9": content["elbo"]}
    np.savez(path, **content)
    measure(tmp_path, "test", LIKELIHOOD)
    assert "nll_iw9" not in read_per_image(tmp_path, "test")


def test_an_interrupted_bound_leaves_the_elbo_of_all_images_and_no_part_of_the_bound(tiny, tmp_path, monkeypatch):
    trained(tiny("data.eval_batch_size=20"), tmp_path)
    per_image_path(tmp_path, "test").unlink()
    calls, whole = [], VAEModule.mean_nll

    def interrupted(self, *arguments):
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return whole(self, *arguments)

    monkeypatch.setattr(VAEModule, "mean_nll", interrupted)
    with pytest.raises(VAEError, match="Interrupted while measuring likelihood"):
        measure(tmp_path, "test", LIKELIHOOD)
    assert set(read_per_image(tmp_path, "test")) == {"elbo", "rate", "images", "weights"}


def test_numbers_of_some_images_only_are_left_out():
    found = PerImage()
    found.see(torch.rand(3, 1, 2, 2))
    found.add({"elbo": torch.zeros(3), "nll_iw5": torch.zeros(2)})
    assert set(found.arrays()) == {"elbo"}


def test_a_write_that_fails_leaves_the_previous_file_whole(tmp_path, monkeypatch):
    found, model = PerImage(), torch.nn.Linear(1, 1)
    found.see(torch.rand(3, 1, 2, 2))
    found.add({"elbo": torch.tensor([1.0, 2.0, 3.0])})
    write_per_image(tmp_path, "test", found, model)

    def cut_off(file, **content):
        file.write(b"PK half a file")
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(per_image.np, "savez", cut_off)
    with pytest.raises(OSError):
        write_per_image(tmp_path, "test", found, model)
    assert read_per_image(tmp_path, "test")["elbo"].tolist() == [1.0, 2.0, 3.0]
    assert [path.name for path in tmp_path.iterdir()] == ["per_image-test.npz"]


def test_starting_anew_removes_what_was_there(tiny, tmp_path):
    trained(tiny(), tmp_path)
    measure(tmp_path, "val", LIKELIHOOD)
    trained(tiny("seed=1"), tmp_path, resume="restart")
    assert not per_image_path(tmp_path, "val").exists() and per_image_path(tmp_path, "test").exists()


def test_what_was_measured_of_other_weights_is_set_aside_when_a_longer_run_ends(tiny, tmp_path, caplog):
    config = tiny("trainer.max_epochs=1")
    train(config, tmp_path, [], progress_bar=False)
    measure(tmp_path, "test", {"measures": "samples"})
    (tmp_path / "priors" / "gaussian").mkdir(parents=True)
    kept = (tmp_path / "evaluation-test.json").read_text()
    train(config, tmp_path, [], resume=True, progress_bar=False)  # finished: nothing is trained, nothing moves
    assert (tmp_path / "evaluation-test.json").is_file()
    config.trainer.max_epochs = 3
    train(config, tmp_path, [], resume=True, progress_bar=False)
    place = next(tmp_path.glob("before-step-*"))
    assert (place / "evaluation-test.json").read_text() == kept and (place / "priors" / "gaussian").is_dir()
    assert not (tmp_path / "evaluation-test.json").exists() and not (tmp_path / "priors").exists()
    assert f"are now in {place}" in caplog.text
    (tmp_path / "priors" / "maf").mkdir(parents=True)
    config.seed = 1
    train(config, tmp_path, [], resume="restart", progress_bar=False)  # of as many steps, in the same folder
    assert (tmp_path / f"{place.name}-2" / "priors" / "maf").is_dir() and (place / "priors" / "gaussian").is_dir()
    (tmp_path / "priors").mkdir()
    config.seed = 2
    train(config, tmp_path, [], resume="restart", progress_bar=False)
    assert (tmp_path / "priors").is_dir() and not (tmp_path / f"{place.name}-3").exists()  # nothing was there
