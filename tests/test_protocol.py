"""What is trained, chosen and reported on which images, with which weights, noise and weight on the KL: each by a number."""

from __future__ import annotations

import pytest
import torch

from vae.engine.build import build
from vae.engine.checkpoints import load_weights
from vae.engine.run import evaluate, train
from vae.engine.trainer import build_trainer
from vae.evaluation.likelihood import ELBOTotals


@pytest.fixture
def own(tiny):
    """A config on splits of known shades, four epochs."""

    def composed(*overrides: str, **shades: str):
        source = [f"+data.source.{split}={shade}" for split, shade in shades.items()]
        return tiny(
            "data.source._target_=own_splits.splits", "data.limit=null", "data.batch_size=16", *source, *overrides
        )

    return composed


def elbo(module, data, split: str) -> float:
    totals = ELBOTotals()
    for batch in data.batches(split):
        totals.update(module.vae, batch)
    return totals.compute()["elbo"]


def weights_at(config, folder, name: str):
    data, module = build(config)
    load_weights(module, folder / "checkpoints" / name)
    return data, module.eval()


def test_validation_and_test_numbers_are_of_their_own_splits(own, tmp_path):
    config = own(train="grey", val="bright", test="dark")
    metrics = train(config, tmp_path, [], progress_bar=False)
    data, module = weights_at(config, tmp_path, "best.ckpt")
    found = {split: elbo(module, data, split) for split in ("train", "val", "test")}
    assert len({round(value, 2) for value in found.values()}) == 3  # or nothing is shown
    assert metrics["test/elbo"] == pytest.approx(found["test"], abs=1e-4)
    assert metrics["val/elbo"] == pytest.approx(found["val"], abs=1e-4)  # one epoch: the best are the last
    for split, value in found.items():
        assert evaluate(tmp_path, split)[f"{split}/elbo"] == pytest.approx(value, abs=1e-4)


def test_the_tested_weights_are_the_best_on_validation_whatever_the_test_split_would_choose(own, tmp_path):
    # trained to be dark, which bright validation images punish at once and dark test images reward to the end
    four = ["trainer.max_epochs=4", "optimizer.lr=0.02", "model.output_bias_from_data=false"]
    config = own(*four, train="dark", val="bright", test="dark")
    metrics = train(config, tmp_path, [], progress_bar=False)
    assert metrics["val/best_epoch"] == 0
    (data, best), (_, last) = (weights_at(config, tmp_path, name) for name in ("best.ckpt", "last.ckpt"))
    assert elbo(last, data, "test") > elbo(best, data, "test") + 0.5  # the test split would choose the last
    assert metrics["test/elbo"] == pytest.approx(elbo(best, data, "test"), abs=1e-4)
    assert metrics["val/best_loss"] < metrics["val/loss"] - 0.5
    assert metrics["val/best_elbo"] == pytest.approx(elbo(best, data, "val"), abs=1e-4) != metrics["val/elbo"]


def validated(config, state, step: int = 0) -> dict[str, float]:
    data, module = build(config)
    module.load_state_dict(state)
    module.steps = step
    trainer = build_trainer(config)
    trainer.validate(module, data, verbose=False)
    return {name: float(value) for name, value in trainer.callback_metrics.items()}


def test_noise_and_pixels_of_validation_are_the_same_for_every_seed_and_every_epoch(own):
    grey = own("data.binarize=dynamic", train="grey", val="grey")
    _, module = build(grey)
    state = module.state_dict()
    first = validated(grey, state)
    assert validated(own("data.binarize=dynamic", "seed=7", train="grey", val="grey"), state) == first
    assert validated(grey, state, step=1000) == first


def test_validation_images_are_not_drawn_afresh_by_epoch(tiny, tmp_path):
    config = tiny("data=digits", "data.binarize=dynamic", "optimizer.lr=0", "trainer.max_epochs=3", "logger=csv")
    train(config, tmp_path, [], progress_bar=False)
    lines = (tmp_path / "metrics.csv").read_text().splitlines()
    column = lines[0].split(",").index("val/loss")
    losses = {line.split(",")[column] for line in lines[1:] if line.split(",")[column]}
    assert len(losses) == 1
    data, _ = build(config)
    batches = [next(iter(data.train_dataloader())) for _ in range(2)]
    draws = [data.prepare(batch._replace(seed=seed), True).x for seed, batch in enumerate(batches)]
    assert not torch.equal(*draws)  # as training images are


def test_validation_weighs_the_kl_as_the_schedule_ends_not_as_it_stands(own):
    config = own("objective/schedule=linear", "objective.schedule.steps=1000", "objective.beta=3")
    _, module = build(config)
    found = validated(config, module.state_dict(), step=10)
    assert found["val/loss"] == pytest.approx(found["val/distortion"] + 3 * found["val/rate"], rel=1e-5)


def test_pseudo_inputs_start_at_training_images(own):
    _, module = build(own("prior=vampprior", "prior.pseudo_inputs=20", train="dark", val="bright", test="bright"))
    assert module.vae.prior.pseudo_inputs().mean() < 0.3


def test_the_output_bias_starts_at_the_mean_training_image(own):
    data, module = build(own(train="dark", val="bright", test="bright"))
    mean = float(data.train_mean().mean())
    assert float(torch.sigmoid(module.vae.decoder.output_bias).mean()) == pytest.approx(mean, abs=0.02)
    assert mean < 0.2


def test_a_limit_holds_for_every_split(own):
    data, _ = build(own("data.limit=20"))
    assert [len(split) for split in data.splits_ready()] == [20, 20, 20]


def test_the_order_of_training_images_is_of_the_runs_seed_and_the_splits_are_not(own):
    (a, _), (b, _) = build(own()), build(own("seed=1"))
    assert all(torch.equal(x.x, y.x) for x, y in zip(a.splits_ready(), b.splits_ready(), strict=True))
    first, second = (torch.cat(list(data.train_dataloader().sampler)) for data in (a, b))
    assert sorted(first.tolist()) == sorted(second.tolist()) and not torch.equal(first, second)
