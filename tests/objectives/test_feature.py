"""The feature loss: its value, its scale, and a network that is never trained and that a run holds itself."""

from __future__ import annotations

import logging
import shutil

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf
from weights import publish

from vae.engine.build import build
from vae.engine.module import VAEModule
from vae.engine.run import evaluate, train
from vae.engine.stored import read_checkpoint
from vae.errors import VAEError
from vae.evaluation import samples
from vae.evaluation.lpips import NETWORKS
from vae.seeding import generator

pytestmark = pytest.mark.usefixtures("quick_classifier")


@pytest.fixture
def published(tmp_path):
    return publish(tmp_path / "published")


def first_batch(data):
    return data.prepare(next(iter(data.train_dataloader())), training=True)


def terms_of(config, step=3):
    data, module = build(config)
    return data, module, module.objective(module.vae, first_batch(data), generator("noise"), step)


def weights(folder, name="last"):
    return read_checkpoint(folder / "checkpoints" / f"{name}.ckpt")["state_dict"]


def test_the_term_is_half_the_squared_distance_of_the_classifiers_features_at_the_mean_image(tiny):
    overrides = ["objective=feature", "objective.lambda_feature=0.3", "objective.beta=2"]
    data, module, terms = terms_of(tiny(*overrides))
    batch = first_batch(data)
    out = module.vae(batch.x, generator("noise"), batch.y)
    classifier = samples.trained_classifier(samples.training_batch(data, 20_000, 0), 0)
    features = [classifier.features(x) for x in (batch.x, torch.sigmoid(out.params[:, 0]))]
    expected = 0.5 * torch.dist(*features).square() / len(batch.x)
    assert terms["feature"].item() == pytest.approx(expected.item(), rel=1e-5)
    assert terms["loss"].item() == pytest.approx(
        (terms["distortion"] + 2 * terms["rate"] + 0.3 * expected).item(), rel=1e-6
    )


def test_the_gradient_goes_to_the_model_and_to_nothing_else(tiny):
    _, module, terms = terms_of(tiny("objective=feature", "objective.lambda_feature=1e6"))
    terms["loss"].backward()
    decoder = torch.cat([p.grad.flatten() for p in module.vae.decoder.parameters()])
    assert decoder.abs().max() > 1e3
    assert not list(module.objective.parameters())
    assert not any(value.requires_grad for value in module.objective.state_dict().values())


def test_the_weight_of_the_common_recipe_is_ours_over_the_number_of_sub_pixels(tiny):
    """rec_loss = |x - x'| + perceptual_weight p, summed over C H W sub-pixels, with p broadcast over them."""
    perceptual_weight, pixels = 0.01, 64
    config = tiny(
        "objective=feature", f"objective.lambda_feature={perceptual_weight * pixels}", "objective.beta=0",
        "likelihood=laplace", "likelihood.scale=1",
    )  # fmt: skip
    data, module, terms = terms_of(config)
    batch = first_batch(data)
    mean = module.vae(batch.x, generator("noise"), batch.y).params[:, 0]
    p = module.objective.features(batch.x, mean)
    rec_loss = (batch.x - mean).abs() + perceptual_weight * p[:, None, None, None]
    constant = pixels * torch.log(torch.tensor(2.0))  # of the Laplace density
    assert terms["loss"].item() == pytest.approx((rec_loss.sum() / len(batch.x) + constant).item(), rel=1e-5)


def test_at_weight_0_a_run_is_the_beta_vaes_to_the_last_bit(tiny, tmp_path):
    common = ["objective.beta=0.7", "logger=none", "data.binarize=dynamic"]
    plain = train(tiny(*common), tmp_path / "plain", [], progress_bar=False)
    zero = train(
        tiny("objective=feature", "objective.lambda_feature=0", *common), tmp_path / "zero", [], progress_bar=False
    )
    of_zero = weights(tmp_path / "zero")
    for name, value in weights(tmp_path / "plain").items():
        assert torch.equal(of_zero[name], value), name
    different = {name for name in plain if plain[name] != zero[name] and "seconds" not in name}
    assert different == set() and zero["test/feature"] > 0


def test_a_run_holds_its_network_and_resumes_exactly_without_training_it_again(
    tiny, tmp_path, quick_classifier, monkeypatch
):
    config = tiny(
        "objective=feature", "network=autoencoder_kl", "network.block_out_channels=[4,4]", "network.norm_num_groups=2",
        "model.latent_dim=32", "regularizer=equivariance", "regularizer.weight=0.3", "logger=none",
        "callbacks.interruptible.every_n_steps=1", "trainer.max_epochs=2", "evaluation.nll_samples=0",
    )  # fmt: skip
    whole = train(config, tmp_path / "whole", [], progress_bar=False)
    step = VAEModule.training_step

    def stopping(self, batch, index):
        if self.steps == 3:
            raise RuntimeError("killed")
        return step(self, batch, index)

    with monkeypatch.context() as patched:
        patched.setattr(VAEModule, "training_step", stopping)
        with pytest.raises(RuntimeError, match="killed"):
            train(config, tmp_path / "cut", [], progress_bar=False)
    before = weights(tmp_path / "cut")
    shutil.rmtree(quick_classifier)

    def refuse(*_, **__):
        raise AssertionError("trained again")

    monkeypatch.setattr(samples, "trained_classifier", refuse)
    resumed = train(config, tmp_path / "cut", [], resume=True, progress_bar=False)
    assert {k: v for k, v in resumed.items() if "seconds" not in k} == {
        k: v for k, v in whole.items() if "seconds" not in k
    }
    after = weights(tmp_path / "cut")
    for name, value in weights(tmp_path / "whole").items():
        assert torch.equal(after[name], value), name
        if "features" in name:
            assert torch.equal(before[name], value) and value.abs().max() > 0
    found = evaluate(tmp_path / "cut")
    assert all(found[name] == pytest.approx(whole[name], rel=1e-6) for name in ("test/feature", "test/equivariance"))


def test_data_without_labels_and_a_folder_without_weights_are_refused_before_anything_is_written(tiny, tmp_path):
    file = tmp_path / "images.npy"
    np.save(file, np.random.default_rng(0).integers(0, 255, (60, 1, 8, 8), dtype=np.uint8))
    unlabelled = tiny("data=arrays", f"data.source.path={file}", "objective=feature", "data.batch_size=16")
    with pytest.raises(VAEError, match=r"this data has none: use objective/features=lpips\.$"):
        build(unlabelled)
    lpips = tiny(
        "objective=feature", "objective/features=lpips", f"objective.features.weights={tmp_path}",
        "data=sprites", "++data.source.size=32", "++data.source.subset={scale: 2, orientation: 3, x: 3, y: 3}",
    )  # fmt: skip
    with pytest.raises(VAEError, match=r"no alexnet-owt-7be5be79\.pth in .*: set objective\.features\.weights to the"):
        build(lpips)
    with pytest.raises(
        VAEError, match=r"set objective\.features\.weights to a folder with alexnet-owt-7be5be79\.pth of"
    ):
        build(tiny("objective=feature", "objective/features=lpips"))
    for override, why in (
        ("objective.features.network=vgg", r"no vgg16-397923af\.pth"),
        ("objective.features.network=lenet", r"objective\.features\.network=lenet is unknown: choose one of alex, vgg"),
        ("objective.lambda_feature=-1", r"lambda_feature=-1 must be finite and zero or more"),
    ):
        with pytest.raises(VAEError, match=why):
            build(_with(lpips, override))
    with pytest.raises(VAEError, match=r"at least 31x31 pixels, not 8x8"):
        build(tiny("objective=feature", "objective/features=lpips", f"objective.features.weights={tmp_path}"))


def _with(config, override):
    key, _, value = override.partition("=")
    config = config.copy()
    OmegaConf.update(config, key, OmegaConf.create({"v": value}).v if not value.lstrip("-").isdigit() else int(value))
    return config


def test_lpips_is_in_the_checkpoint_and_a_change_of_its_file_is_said(tiny, published, caplog):
    config = tiny(
        "objective=feature", "objective/features=lpips", f"objective.features.weights={published}",
        "data=sprites", "++data.source.size=32", "++data.source.subset={scale: 2, orientation: 3, x: 3, y: 3}",
    )  # fmt: skip
    kept = build(config)[1].state_dict()
    assert kept["objective.features.w0"].min() >= 0 and kept["objective.features.w0"].max() > 0.9

    def loaded():
        caplog.clear()
        module = build(config, start=False)[1]
        module.load_state_dict(kept)
        assert all(torch.equal(value, kept[name]) for name, value in module.state_dict().items())
        return caplog.text

    with caplog.at_level(logging.WARNING):
        assert not loaded()
        linear = published / NETWORKS["alex"].linear
        torch.save({name: 2 * value for name, value in torch.load(linear, weights_only=True).items()}, linear)
        assert "are others than when the run began: it keeps those that it began with" in loaded()
        linear.unlink()
        assert not loaded()
