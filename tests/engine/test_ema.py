"""Averaged weights and skipped updates: closed forms, what is measured and kept, and the same bits after a kill."""

from __future__ import annotations

import csv
import json

import pytest
import torch
from kills import OFTEN, assert_the_same, killed, left_by

import vae
from vae.engine.build import build
from vae.engine.callbacks import gradients, pictures
from vae.engine.callbacks.ema import EMA
from vae.engine.callbacks.gradients import Gradients
from vae.engine.run import train
from vae.engine.trainer import build_trainer
from vae.errors import VAEError


@pytest.fixture(autouse=True)
def plots_in_no_time(monkeypatch):
    monkeypatch.setattr(pictures, "kl_bars", lambda kl, _: kl.float().expand(3, 1, -1))
    monkeypatch.setattr(pictures, "latent_space", lambda mean, kl, labels: mean[:, kl.argsort()].expand(3, -1, -1))


def weights(model):
    return torch.cat([p.detach().flatten().clone() for p in model.parameters()])


class Watch(EMA):
    """The weights after each step, and what the model has when it is validated."""

    def __init__(self, decay):
        super().__init__(decay)
        self.seen, self.validated = [], []

    def on_train_batch_end(self, trainer, module, *others):
        self.seen.append(weights(module.vae))
        super().on_train_batch_end(trainer, module, *others)

    def on_validation_end(self, trainer, module):
        self.validated.append(weights(module.vae))


def watched(tiny, tmp_path, decay, *overrides):
    config = tiny("data.batch_size=16", "trainer.max_epochs=2", *overrides)
    data, module = build(config)
    first, trainer, ema = weights(module.vae), build_trainer(config, tmp_path), Watch(decay)
    trainer.callbacks.insert(0, ema)
    trainer.fit(module, data)
    return first, ema, module


@pytest.mark.parametrize("decay", [0.3, 0.999])
def test_the_average_after_n_steps_is_the_closed_form(decay, tiny, tmp_path):
    first, ema, _ = watched(tiny, tmp_path, decay)
    assert len(ema.seen) == ema.steps == 8
    average, rates = first.double(), [min(decay, (1 + n) / (10 + n)) for n in range(1, 9)]
    for n, after in enumerate(ema.seen):
        average = rates[n] * average + (1 - rates[n]) * after.double()
        if n in (3, 7):  # the end of an epoch
            torch.testing.assert_close(ema.validated[n // 4].double(), average, rtol=1e-6, atol=1e-6)
    # the same as a sum over all weights there were, which add up to 1
    tails = [torch.tensor(rates[n + 1 :], dtype=torch.float64).prod() for n in range(8)]
    shares = [(1 - rates[n]) * tails[n] for n in range(8)]
    total = torch.tensor(rates, dtype=torch.float64).prod() * first.double()
    total = total + sum(s * w.double() for s, w in zip(shares, ema.seen, strict=True))
    torch.testing.assert_close(ema.validated[1].double(), total, rtol=1e-6, atol=1e-6)


def test_training_goes_on_with_the_plain_weights_as_if_nothing_were_averaged(tiny, tmp_path):
    _, ema, _ = watched(tiny, tmp_path / "a", 0.9)
    _, plain, _ = watched(tiny, tmp_path / "b", 0.0)  # whose average is the weights themselves
    assert all(torch.equal(a, b) for a, b in zip(ema.seen, plain.seen, strict=True))
    assert torch.equal(plain.validated[1], plain.seen[7]) and not torch.equal(ema.validated[1], ema.seen[7])


def test_accumulated_batches_are_one_step_of_the_average(tiny, tmp_path):
    first, ema, _ = watched(tiny, tmp_path, 0.9, "+trainer.accumulate_grad_batches=2")
    assert len(ema.seen) == 8 and ema.steps == 4
    average = first
    for n, after in enumerate(ema.seen[1::2], 1):
        average = torch.lerp(average, after, 1 - (1 + n) / (10 + n))
    torch.testing.assert_close(ema.validated[1], average, rtol=1e-5, atol=1e-6)


def test_the_averaged_weights_are_validated_tested_kept_and_said_to_be(tiny, tmp_path):
    train(
        tiny("callbacks=ema", "callbacks.pictures=null", "callbacks.ema.decay=0.9"),
        tmp_path / "run",
        [],
        progress_bar=False,
    )
    folder = tmp_path / "run"
    last = torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True)
    best = torch.load(folder / "checkpoints" / "best.ckpt", weights_only=True)
    state = last["callbacks"]["EMA"]
    plain = {f"vae.{name}": value for name, value in state["others"].items()}
    assert state["averaged"] and state["steps"] == 2
    assert all(torch.equal(best["state_dict"][name], last["state_dict"][name]) for name in plain)  # both averaged
    assert not all(torch.equal(value, last["state_dict"][name]) for name, value in plain.items())
    run = vae.load(folder)
    assert torch.equal(weights(run.vae), torch.cat([best["state_dict"][name].flatten() for name in plain]))
    data, module = build(tiny())
    module.load_state_dict(best["state_dict"])
    trainer = build_trainer(tiny())
    trainer.validate(module, data, verbose=False)
    assert float(trainer.callback_metrics["val/elbo"]) == run.metrics["val/best_elbo"]
    assert json.loads((folder / "facts.json").read_text())["weights"] == "an exponential moving average of decay 0.9"


MOMENTS = [
    ("last.ckpt", 2, "before"),
    ("best.ckpt", 1, "after"),
    ("last.ckpt", 1, "after"),  # in the middle of an epoch: the plain weights
    ("last.ckpt", 2, "after"),  # after a validation: the averaged ones
    ("last.ckpt", 1, "after"),
    ("traversals.png", 1, "before"),
    ("metrics.json", 1, "before"),
]


def killed_at(moments, tiny, tmp_path, *overrides):
    often = [*OFTEN[2:], "callbacks.ema.decay=0.9", "callbacks.gradients.skip_above=2.5", *overrides]
    config = tiny(*often, "trainer.gradient_clip_val=1.5")
    train(config, tmp_path / "whole", [], progress_bar=False)
    for moment in moments:
        assert killed(config, tmp_path / "cut", moment), moment
    assert not killed(config, tmp_path / "cut")
    whole = left_by(tmp_path / "whole")
    assert whole["metrics"]["train/skipped_updates"] > 0 < whole["metrics"]["train/clipped_updates"]
    assert_the_same(left_by(tmp_path / "cut"), whole)


@pytest.mark.slow
def test_a_run_with_averaged_weights_and_skipped_updates_killed_while_it_has_either_ends_as_one_never_stopped(
    tiny, tmp_path
):
    moments = [
        ("last.ckpt", 2, "after"),
        ("last.ckpt", 2, "after"),
    ]  # after step 6, and after the validation at step 12
    killed_at(moments, tiny, tmp_path, "callbacks=[ema,gradients,minimal]", "trainer.max_epochs=4")


@pytest.mark.slow
def test_and_killed_again_and_again_at_every_moment_of_writing(tiny, tmp_path):
    drawn = ["callbacks=[ema,gradients]", "callbacks.pictures.points=16", "callbacks.pictures.every_n_epochs=2"]
    killed_at(MOMENTS, tiny, tmp_path, *drawn, "trainer.max_epochs=5")


# --- gradients --------------------------------------------------------------------------------------------------------


class Norms(Gradients):
    """The gradients' norms, by another way, and the weights before and after each step."""

    def __init__(self, skip_above):
        super().__init__(skip_above)
        self.norms, self.weights = [], []

    def on_before_optimizer_step(self, trainer, module, optimizer):
        flat = torch.cat([p.grad.flatten() for p in module.parameters() if p.grad is not None])
        self.norms.append(flat.double().square().sum().sqrt().item())
        self.weights.append(
            (weights(module), optimizer.state_dict()["state"].get(0, {}).get("step", torch.zeros(())).clone())
        )
        super().on_before_optimizer_step(trainer, module, optimizer)


def stepped(tiny, tmp_path, skip_above, *overrides):
    config = tiny("data.batch_size=16", "trainer.max_epochs=2", "trainer.log_every_n_steps=4", "logger=csv", *overrides)
    data, module = build(config)
    trainer, callback = build_trainer(config, tmp_path), Norms(skip_above)
    trainer.callbacks.insert(0, callback)
    trainer.fit(module, data)
    return callback, weights(module)


def test_an_update_is_left_out_where_the_norm_exceeds_the_threshold_and_there_alone(tiny, tmp_path):
    norms = stepped(tiny, tmp_path / "all", None)[0].norms
    threshold = sorted(norms)[4]
    callback, last = stepped(tiny, tmp_path / "some", threshold)
    after = [*[weight for weight, _ in callback.weights[1:]], last]
    stayed = [torch.equal(before, then) for (before, _), then in zip(callback.weights, after, strict=True)]
    assert stayed == [norm > threshold for norm in callback.norms] and 0 < sum(stayed) < 8
    assert callback.skipped == sum(stayed) == callback.metrics["train/skipped_updates"]
    taken = [step.item() for _, step in callback.weights]
    assert taken == [sum(not s for s in stayed[:i]) for i in range(8)]  # the optimiser has not counted those skipped
    rows = [row for row in csv.DictReader((tmp_path / "some" / "metrics.csv").open()) if row["train/gradient_norm"]]
    assert [row["step"] for row in rows] == ["3", "7"]
    assert float(rows[0]["train/gradient_norm"]) == pytest.approx(max(callback.norms[:4]), rel=1e-5)
    assert float(rows[1]["train/gradient_norm"]) == pytest.approx(max(callback.norms[4:]), rel=1e-5)
    assert [float(row["train/skipped_updates"]) for row in rows] == [sum(stayed[:4]), sum(stayed)]


def test_clipped_updates_are_counted_and_skipped_ones_are_not_among_them(tiny, tmp_path):
    norms = stepped(tiny, tmp_path / "all", None)[0].norms
    callback, _ = stepped(tiny, tmp_path / "clipped", None, f"trainer.gradient_clip_val={sorted(norms)[3]}")
    clip = sorted(norms)[3]
    assert callback.clipped == sum(norm > clip for norm in callback.norms) > 0 == callback.skipped
    callback, _ = stepped(tiny, tmp_path / "both", clip, f"trainer.gradient_clip_val={clip}")
    assert callback.clipped == 0 < callback.skipped


def test_gradients_that_are_not_finite_are_skipped_without_a_threshold(tiny, tmp_path):
    class Broken(Gradients):
        def on_before_optimizer_step(self, trainer, module, optimizer):
            if trainer.global_step == 2:
                next(module.parameters()).grad[0] = float("nan")
            super().on_before_optimizer_step(trainer, module, optimizer)

    config = tiny("data.batch_size=16", "trainer.max_epochs=1")
    data, module = build(config)
    trainer, callback = build_trainer(config, tmp_path), Broken()
    trainer.callbacks.insert(0, callback)
    trainer.fit(module, data)
    assert callback.skipped == 1 and weights(module).isfinite().all()


def test_skipped_updates_are_counted_in_a_row(tiny, tmp_path):
    norms = stepped(tiny, tmp_path / "all", None)[0].norms
    callback, _ = stepped(tiny, tmp_path / "some", sorted(norms)[4])
    last = [norm > sorted(norms)[4] for norm in callback.norms]
    assert callback.in_a_row == next((k for k, skipped in enumerate(reversed(last)) if not skipped), 8)
    assert callback.in_a_row < callback.skipped


def test_a_threshold_that_lets_nothing_pass_ends_the_run_in_a_sentence(tiny, tmp_path, monkeypatch):
    assert gradients.MOST_IN_A_ROW == 100
    monkeypatch.setattr(gradients, "MOST_IN_A_ROW", 3)
    config = tiny("callbacks=[gradients,minimal]", "callbacks.gradients.skip_above=1e-6", "trainer.max_epochs=2")
    with pytest.raises(VAEError, match=r"The last 3 updates were skipped, .* callbacks.gradients.skip_above=1e-06"):
        train(config, tmp_path / "run", [], progress_bar=False)


@pytest.mark.parametrize("decay", [1, -0.1, "much"])
def test_a_decay_or_a_threshold_that_makes_no_sense_is_refused(decay):
    with pytest.raises(VAEError, match=r"callbacks.ema.decay=.* must be at least 0 and less than 1\.$"):
        EMA(decay)
    for threshold in (0, -1, float("inf"), "much"):
        with pytest.raises(VAEError, match=r"callbacks.gradients.skip_above=.* must be a positive number, or null\.$"):
            Gradients(threshold)
