"""Runs that are killed while they write, and go on: everything they leave equals that of a run never stopped."""

from __future__ import annotations

import pytest
from kills import OFTEN, assert_the_same, killed, left_by

from vae.engine.callbacks import pictures
from vae.engine.run import train


@pytest.fixture(autouse=True)
def plots_in_no_time(monkeypatch):
    """Matplotlib takes most of the time of these runs: what it would show, as grey."""
    monkeypatch.setattr(pictures, "kl_bars", lambda kl, *_: kl.float().expand(3, 1, -1))
    monkeypatch.setattr(pictures, "latent_space", lambda mean, kl, labels, *_: mean[:, kl.argsort()].expand(3, -1, -1))


def test_a_run_killed_at_the_moments_of_writing_ends_as_one_never_stopped(tiny, tmp_path):
    config = tiny(*OFTEN, "trainer.max_epochs=4", "callbacks.pictures.every_n_epochs=2", "data.binarize=dynamic")
    train(config, tmp_path / "whole", [], progress_bar=False)  # and what it imports need not be imported again
    cut = tmp_path / "cut"
    for moment in (
        ("last.ckpt", 2, "before"),
        ("best.ckpt", 1, "after"),  # and so before last.ckpt, which knows of an earlier best
        ("traversals.png", 1, "before"),  # right after resuming, before any validation of this attempt
        ("events", 4, "within"),
        ("metrics.json", 1, "after"),
    ):
        assert killed(config, cut, moment), moment
        assert moment[2] != "before" or list(cut.rglob(".*.tmp"))
    assert not killed(config, cut)
    assert_the_same(left_by(cut), left_by(tmp_path / "whole"))


def test_rows_of_a_killed_run_are_kept_and_none_is_there_twice(tiny, tmp_path):
    config = tiny(*OFTEN, "callbacks.pictures=null", "logger=csv", "trainer.max_epochs=3")
    train(config, tmp_path / "whole", [], progress_bar=False)
    for moment in (("row", 4, "within"), ("metrics.csv", 1, "before"), ("row", 2, "within")):
        assert killed(config, tmp_path / "cut", moment), moment
    assert not killed(config, tmp_path / "cut")
    whole = left_by(tmp_path / "whole")
    assert [row["step"] for row in whole["metrics.csv"] if row["train/loss"]] == ["1", "3", "5", "7", "9", "11"]
    assert [row["step"] for row in whole["metrics.csv"] if row["val/loss"]] == ["3", "7", "11"]
    assert_the_same(left_by(tmp_path / "cut"), whole)


FAMILIES = {
    "factor_vae": ["objective=factor_vae", "objective.hidden=[8]"],
    "adversarial": [
        "objective=adversarial",
        "objective.channels=[4]",
        "objective.penalty=lecam",
        "objective.start_step=5",
    ],
    "geco": ["objective/schedule=geco", "objective.schedule.target=20"],
    "control": ["objective/schedule=control", "objective.schedule.target=2"],
    "m2": ["objective=m2", "+data.labeled=20"],
    "early stopping": [
        "callbacks=early_stopping",
        "callbacks.early_stopping.patience=7",
        "+callbacks.early_stopping.min_delta=100",
        "trainer.max_epochs=50",
    ],
    "early stopping, validated every 2": [
        "callbacks=early_stopping",
        "callbacks.early_stopping.patience=4",
        "+callbacks.early_stopping.min_delta=100",
        "trainer.max_epochs=50",
        "trainer.check_val_every_n_epoch=2",
    ],
    "learning rate": ["lr_schedule=cosine"],
    "an end between validations": [
        "trainer.check_val_every_n_epoch=3",
        "trainer.max_epochs=20",
        "trainer.max_steps=62",
    ],
    "csv": [
        "logger=csv",
        "callbacks.pictures=null",
        "data.binarize=dynamic",
        "posterior=iaf",
        "callbacks.checkpoint.monitor=val/distortion",
    ],
}
MOMENTS = [
    *(
        ("config.yaml", 1, "before"),
        ("status.json", 1, "after"),
        ("last.ckpt", 1, "before"),
        ("best.ckpt", 1, "before"),
    ),
    *(("best.ckpt", 1, "after"), ("last.ckpt", 2, "after"), ("traversals.png", 1, "before"), ("events", 3, "within")),
    *(("samples.png", 1, "after"), ("row", 2, "within"), ("metrics.csv", 1, "before"), ("last.ckpt", 2, "before")),
    *(("best.ckpt", 2, "after"), ("row", 3, "within"), ("events", 9, "within"), ("last.ckpt", 3, "before")),
    *(("metrics.json", 1, "before"), ("metrics.json", 1, "after"), ("status.json", 2, "before")),
]


def moments_of(family):
    """Those that its logger has."""
    others = ("events", "traversals.png", "samples.png") if family == "csv" else ("row", "metrics.csv")
    return [moment for moment in MOMENTS if moment[0] not in others]


def of_family(family, tiny):
    often = OFTEN[1:] if "early" in family else OFTEN  # which has callbacks of its own
    return tiny(*often, "trainer.max_epochs=9", "callbacks.pictures.every_n_epochs=1", *FAMILIES[family])


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_of_runs_killed_again_and_again_ends_as_one_never_stopped(family, tiny, tmp_path):
    config = of_family(family, tiny)
    train(config, tmp_path / "whole", [], progress_bar=False)
    for moment in moments_of(family):
        assert killed(config, tmp_path / "cut", moment), moment
    assert not killed(config, tmp_path / "cut")
    assert_the_same(left_by(tmp_path / "cut"), left_by(tmp_path / "whole"))


@pytest.mark.slow
@pytest.mark.parametrize("family", ["factor_vae", "early stopping", "an end between validations"])
def test_a_run_killed_once_at_any_moment_of_writing_ends_as_one_never_stopped(family, tiny, tmp_path):
    config = of_family(family, tiny)
    train(config, tmp_path / "whole", [], progress_bar=False)
    whole = left_by(tmp_path / "whole")
    for number, moment in enumerate(moments_of(family)):
        assert killed(config, tmp_path / str(number), moment), moment
        assert not killed(config, tmp_path / str(number))
        assert_the_same(left_by(tmp_path / str(number)), whole)
