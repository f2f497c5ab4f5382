"""Packed runs end as they would alone: folders, numbers and pictures; what cannot be packed is said and trained by itself."""

from __future__ import annotations

import csv
import functools
import itertools
import json
import logging

import own_objectives
import pytest
import torch
from commands import run as command

from vae.data.images import Images
from vae.engine import packing, traced, turns
from vae.engine.build import SHARED
from vae.engine.packing import Pack
from vae.engine.run import train
from vae.engine.stack import Stack
from vae.errors import VAEError


@pytest.fixture(autouse=True)
def soon(monkeypatch):
    """Let later steps of these short runs be taken as those of long ones are."""
    monkeypatch.setattr(traced, "TRACED_AFTER", 3)


@pytest.fixture
def float64():
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def run(config, folder, **options):
    try:
        return train(config, folder, [], progress_bar=False, **options)
    except VAEError as error:
        return str(error)


def packed(configs, folder, **options):
    jobs = [functools.partial(run, config, folder / str(n), **options) for n, config in enumerate(configs)]
    return Pack([f"run {n}" for n in range(len(jobs))]).run(jobs)


def alone(configs, folder, **options):
    return [run(config, folder / str(n), **options) for n, config in enumerate(configs)]


def numbers(folder):
    rows = list(csv.DictReader((folder / "metrics.csv").read_text().splitlines()))
    return [{name: float(value) for name, value in row.items() if value} for row in rows]


def assert_alike(one, other, within=1e-9):
    """The folders of two runs hold the same, to within rounding."""
    names = [{str(path.relative_to(f)) for path in f.rglob("*") if "tfevents" not in path.name} for f in (one, other)]
    assert names[0] == names[1]
    assert len(list(one.glob("*tfevents*"))) == len(list(other.glob("*tfevents*")))
    found = [
        {k: v for k, v in json.loads((f / "metrics.json").read_text()).items() if "seconds" not in k}
        for f in (one, other)
    ]
    assert found[0] == pytest.approx(found[1], rel=within, abs=within)
    for a, b in zip(numbers(one), numbers(other), strict=True):
        assert a == pytest.approx(b, rel=within, abs=within)
    for name in ("best", "last"):
        assert_same_checkpoint(
            *(torch.load(f / "checkpoints" / f"{name}.ckpt", weights_only=True) for f in (one, other)), within
        )


def assert_same_checkpoint(a, b, within, path=""):
    assert type(a) is type(b), path
    if isinstance(a, dict):
        assert a.keys() == b.keys(), path
        for key in a:
            if key not in ("seconds", "_saved"):
                assert_same_checkpoint(a[key], b[key], within, f"{path}.{key}")
    elif isinstance(a, list | tuple):
        assert len(a) == len(b), path
        for number, (x, y) in enumerate(zip(a, b, strict=True)):
            assert_same_checkpoint(x, y, within, f"{path}.{number}")
    elif isinstance(a, torch.Tensor):
        assert a.dtype == b.dtype, path
        torch.testing.assert_close(a, b, rtol=within, atol=within, equal_nan=True, msg=path)
        if not path.startswith(".open"):  # terms of neighbouring steps are kept together
            assert a.untyped_storage().nbytes() == b.untyped_storage().nbytes(), path
    elif isinstance(a, float):
        assert a == pytest.approx(b, rel=within, abs=within, nan_ok=True), path
    else:
        assert a == b, path


WHOLE = [
    "logger=[tensorboard,csv]",
    "data.limit=50",
    "data.batch_size=16",
    "data.binarize=dynamic",
    "objective/schedule=linear",
    "objective.schedule.steps=12",
    "lr_schedule=cosine",
    "trainer.max_epochs=5",
    "trainer.log_every_n_steps=3",
    "trainer.check_val_every_n_epoch=2",
    "callbacks.interruptible.every_n_steps=5",
]


@pytest.mark.slow
@pytest.mark.parametrize(("latent_dims", "said"), [((3, 3, 3), ""), ((2, 7, 4), ", latents of 2, 4 padded to 7")])
def test_packed_runs_leave_what_they_leave_alone(tiny, tmp_path, float64, caplog, latent_dims, said):
    differ = (["seed=1"], ["seed=2", "objective.beta=3"], ["optimizer.lr=5e-3", "objective.schedule.steps=6"])
    whole = [*WHOLE, "callbacks=default", "callbacks.pictures.every_n_epochs=4"]
    configs = [tiny(*whole, f"model.latent_dim={d}", *more) for d, more in zip(latent_dims, differ, strict=True)]
    with caplog.at_level(logging.INFO, "vae.engine.packing"):
        together = packed(configs, tmp_path / "packed")
    assert [record.message for record in caplog.records] == [f"Packed: 3 runs are trained as one program{said}."]
    for number, (ours, theirs) in enumerate(zip(together, alone(configs, tmp_path / "alone"), strict=True)):
        assert ours["test/elbo"] == pytest.approx(theirs["test/elbo"], rel=1e-9)
        assert_alike(*(tmp_path / name / str(number) for name in ("packed", "alone")))


def test_a_callback_of_ones_own_sees_the_batches_that_it_sees_alone(tiny, tmp_path, monkeypatch):
    monkeypatch.setattr(own_objectives, "SEEN", {})
    own = [
        "callbacks=minimal",
        "+callbacks.looks._target_=own_objectives.Looks",
        "data.binarize=dynamic",
        "trainer.max_epochs=3",
        "logger=none",
    ]
    configs = [tiny(*own, f"seed={n}") for n in range(2)]
    packed(configs, tmp_path / "packed")
    alone(configs, tmp_path / "alone")
    found = list(own_objectives.SEEN.values())
    assert len(found) == 4 and len(found[0]) > 3
    for together, by_itself in zip(found[:2], found[2:], strict=True):
        for (step, x, loss), (number, pixels, value) in zip(together, by_itself, strict=True):
            assert step == number
            assert torch.equal(x, pixels)
            assert loss == pytest.approx(value, rel=1e-5)


def test_batches_of_packed_runs_are_gathered_at_once(tiny, tmp_path, monkeypatch):
    sizes, own = [], Images.gather
    monkeypatch.setattr(Images, "gather", lambda images, index: (sizes.append(len(index)), own(images, index))[1])
    shared = SHARED.set({})
    packed([tiny("data.batch_size=24", "trainer.max_epochs=2", "logger=none", f"seed={n}") for n in range(2)], tmp_path)
    SHARED.reset(shared)
    assert sizes.count(2 * 24) == 2 * (64 // 24)
    assert (
        sizes.count(24) == 4
    )  # of the first batches: what a step holds, what it draws, and the step of each run alone


@pytest.mark.slow
def test_packed_runs_in_bf16_end_as_alone(tiny, tmp_path):
    options = ["trainer.precision=bf16-mixed", "trainer.max_epochs=5", "data.batch_size=16", "logger=none"]
    configs = [tiny(*options, "objective/schedule=linear", "objective.schedule.steps=9", f"seed={n}") for n in range(2)]
    together, apart = packed(configs, tmp_path / "packed"), alone(configs, tmp_path / "alone")
    for ours, theirs in zip(together, apart, strict=True):
        assert ours["test/elbo"] == pytest.approx(theirs["test/elbo"], rel=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize("latent_dims", [(3, 3, 3), (3, 9, 2)])
def test_a_run_that_diverges_is_recorded_and_the_others_do_not_notice(tiny, tmp_path, float64, latent_dims):
    differ = zip((1e-3, 1e200, 2e-3), latent_dims, strict=True)
    configs = [tiny(*WHOLE, f"seed={d}", f"optimizer.lr={lr}", f"model.latent_dim={d}") for lr, d in differ]
    together, apart = packed(configs, tmp_path / "packed"), alone(configs, tmp_path / "alone")
    assert together[1] == apart[1]
    assert "stopped being finite at step" in together[1]
    status = [json.loads((tmp_path / name / "1" / "status.json").read_text()) for name in ("packed", "alone")]
    assert status[0]["state"] == status[1]["state"] == "failed"
    assert status[0]["reason"] == status[1]["reason"]
    for number in (0, 2):
        assert_alike(*(tmp_path / name / str(number) for name in ("packed", "alone")))


@pytest.mark.slow
def test_a_run_that_stops_early_leaves_and_the_others_go_on(tiny, tmp_path, float64):
    stopping = ["callbacks=early_stopping", "callbacks.pictures=null", "callbacks.early_stopping.patience=1"]
    configs = [tiny(*WHOLE[:-2], *stopping, "trainer.max_epochs=8", f"optimizer.lr={lr}") for lr in (1e-3, 0.3, 1.0)]
    together, apart = packed(configs, tmp_path / "packed"), alone(configs, tmp_path / "alone")
    steps = [torch.load(tmp_path / "packed" / str(n) / "checkpoints" / "last.ckpt")["steps"] for n in range(3)]
    assert len(set(steps)) > 1
    assert together[0]["test/elbo"] == pytest.approx(apart[0]["test/elbo"], rel=1e-9)
    for number in range(3):
        assert_alike(*(tmp_path / name / str(number) for name in ("packed", "alone")), within=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize(("at", "latent_dims"), [(5, (3, 3)), (11, (3, 3)), (11, (5, 2))])
def test_packed_runs_that_were_killed_go_on_as_if_they_had_not_been(
    tiny, tmp_path, float64, monkeypatch, at, latent_dims
):
    configs = [tiny(*WHOLE, f"seed={seed}", f"model.latent_dim={d}") for seed, d in enumerate(latent_dims)]

    class Killed(BaseException):
        pass

    train_on = Stack.train

    def killed(self, blocks, step):
        if step + len(blocks) > at:
            raise Killed
        return train_on(self, blocks, step)

    with monkeypatch.context() as patched:
        patched.setattr(Stack, "train", killed)
        with pytest.raises(Killed):
            packed(configs, tmp_path / "packed")
    assert json.loads((tmp_path / "packed" / "0" / "status.json").read_text())["state"] == "failed"
    packed(configs, tmp_path / "packed", resume=True)
    alone(configs, tmp_path / "alone")
    for number in range(2):
        ours, theirs = tmp_path / "packed" / str(number), tmp_path / "alone" / str(number)
        assert numbers(ours) == [pytest.approx(row, rel=1e-9) for row in numbers(theirs)]
        a, b = (torch.load(f / "checkpoints" / "last.ckpt", weights_only=True) for f in (ours, theirs))
        assert a["steps"] == b["steps"] == 20
        assert_same_checkpoint(a["state_dict"], b["state_dict"], 1e-10)
        assert_same_checkpoint(a["optimizer_states"], b["optimizer_states"], 1e-10)


# --- what cannot be packed --------------------------------------------------------------------------------------------


def said(configs, folder, caplog):
    caplog.clear()
    with caplog.at_level(logging.INFO, "vae.engine.packing"):
        results = packed(configs, folder)
    assert all("test/elbo" in result for result in results)
    return [record.message for record in caplog.records if record.name == "vae.engine.packing"]


OWN = {
    "DrawsGlobally": "its objective or its networks draw from the global generator",
    "LooksAtValues": "a Python branch of the model or the objective looks at the value of a tensor",
    "DrawsBySeed": "the objective draws by the batch's seed",
    "HidesNumbers": "the loss of a run in the pack is not that of the run alone",
    "HooksTheLoss": "the gradient of a run in the pack is not that of the run alone",
}


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=[] if name in ("DrawsGlobally", "HidesNumbers", "HooksTheLoss") else pytest.mark.slow)
        for name in OWN
    ],
)
@pytest.mark.slow
def test_an_objective_that_cannot_be_packed_is_found_out_and_trained_as_ever(tiny, tmp_path, caplog, name):
    varied = [f"++objective.factor={f}" if name == "HidesNumbers" else f"objective.beta={f}" for f in (1.0, 2.0)]
    configs = [tiny("logger=none", f"objective._target_=own_objectives.{name}", more) for more in varied]
    messages = said(configs, tmp_path / "packed", caplog)
    assert len(messages) == 1
    assert messages[0].startswith("Not packed: 2 runs are trained by themselves (run 0, run 1): ")
    assert OWN[name] in messages[0]
    if name != "DrawsGlobally":
        alone(configs, tmp_path / "alone")
        for number in ("0", "1"):
            a, b = (torch.load(tmp_path / f / number / "checkpoints" / "last.ckpt") for f in ("packed", "alone"))
            assert_same_checkpoint(a["state_dict"], b["state_dict"], 0.0)


@pytest.mark.slow
def test_runs_of_other_structures_make_groups_and_the_sweep_says_which_are_alone(tiny, tmp_path, caplog):
    factor = ["objective=factor_vae", "objective.hidden=[8]"]
    accumulating = ["+trainer.accumulate_grad_batches=2"]
    differ = [
        [],
        ["seed=1"],
        ["network.activation=tanh"],
        ["network.activation=tanh", "seed=5"],
        ["data.batch_size=16"],
        factor,
        [*factor, "seed=1"],
        accumulating,
    ]
    messages = said([tiny("logger=none", *more) for more in differ], tmp_path, caplog)
    assert messages[3:] == ["Packed: 2 runs are trained as one program."] * 2
    assert messages[:3] == [
        "Not packed: 1 run is trained by itself (run 4): no other run of the sweep has its structure.",
        "Not packed: 2 runs are trained by themselves (run 5, run 6): FactorVAE: its discriminator has an optimiser's options "
        "of its own.",
        "Not packed: 1 run is trained by itself (run 7): something in its trainer asks for Lightning's own loop.",
    ]


def test_an_objective_that_does_not_say_so_is_not_packed(tiny, tmp_path, caplog, monkeypatch):
    monkeypatch.setattr("vae.objectives.elbo.BetaVAE.unpackable", "it does not say so")
    messages = said([tiny("logger=none", f"seed={n}") for n in range(2)], tmp_path, caplog)
    assert messages == ["Not packed: 2 runs are trained by themselves (run 0, run 1): BetaVAE: it does not say so."]


def test_a_codebook_that_follows_the_batches_is_not_packed(tiny, tmp_path, caplog):
    options = ["posterior=vq", "posterior.dim=1", "posterior.codes=5", "logger=none"]
    messages = said([tiny(*options, f"seed={n}") for n in range(2)], tmp_path, caplog)
    assert messages == [
        "Not packed: 2 runs are trained by themselves (run 0, run 1): VectorQuantizer: its codebook follows the batches, "
        "which only a run of its own lets it."
    ]


def test_runs_of_codes_without_a_codebook_are_packed_and_end_as_alone(tiny, tmp_path, caplog):
    options = ["posterior=fsq", "posterior.levels=[4,3,3]", "prior=codes_autoregressive", "logger=none"]
    configs = [tiny(*options, f"seed={n}") for n in range(2)]
    with caplog.at_level("INFO", "vae.engine.packing"):
        together = packed(configs, tmp_path / "packed")
    assert "Packed: 2 runs are trained as one program." in caplog.text
    for ours, theirs in zip(together, alone(configs, tmp_path / "alone"), strict=True):
        names = ("test/elbo", "test/rate", "test/perplexity", "train/perplexity")
        assert [ours[n] for n in names] == pytest.approx([theirs[n] for n in names], rel=1e-4)


def test_latents_that_cannot_be_padded_make_groups_of_their_own(tiny, tmp_path, caplog, monkeypatch):
    monkeypatch.setattr("vae.objectives.mmd.InfoVAE.paddable", True)  # it says so, and it is found out
    options = ["objective=mmd_vae", "logger=none"]
    configs = [tiny(*options, f"seed={n}", f"model.latent_dim={d}") for n, d in enumerate((2, 5, 2, 5, 4))]
    assert said(configs, tmp_path, caplog) == [
        "Not packed: 1 run is trained by itself (run 4): no other run of the sweep has its structure.",
        "Packed: 2 runs are trained as one program.",
        "Packed: 2 runs are trained as one program.",
    ]


@pytest.mark.parametrize(("most", "messages"), [(2 * 32 * 50, 1), (2 * 32 * 50 - 1, 2)])
def test_latents_are_padded_as_long_as_the_runs_gain_by_it(tiny, tmp_path, caplog, monkeypatch, most, messages):
    """With 16 hidden units a latent dimension has 50 weights: 16 of the decoder, and 34 of the encoder."""
    monkeypatch.setattr(packing, "MOST_PADDING", most)
    configs = [tiny("logger=none", f"seed={n}", f"model.latent_dim={d}") for n, d in enumerate((3, 4, 4, 3))]
    assert len(said(configs, tmp_path, caplog)) == messages


def test_a_pack_is_as_large_as_the_memory_holds(tiny, tmp_path, caplog, monkeypatch):
    monkeypatch.setattr(packing, "bytes_of_run", lambda member, batch: member.vae.latent_dim)
    monkeypatch.setattr(packing, "free_bytes", lambda member: 14)
    configs = [tiny("logger=none", f"seed={n}", f"model.latent_dim={d}") for n, d in enumerate((3, 6, 3, 3))]
    messages = said(configs, tmp_path, caplog)
    assert "Packed: 2 of 4 runs at a time, which is what the memory holds." in messages


# --- turns ------------------------------------------------------------------------------------------------------------


def test_jobs_take_turns_and_each_finds_what_it_left_around_it(monkeypatch):
    around = {"now": "outside"}

    def swap(own):
        there = around["now"]
        if own is not None:
            around["now"] = own
        return there

    seen = []

    def job(name):
        around["now"] = name
        answer = turns.CURRENT.ask(f"question of {name}")
        seen.append((name, around["now"], answer))
        return 2 * answer

    seats = [turns.Seat(functools.partial(job, name), swap) for name in ("a", "b")]
    assert [seat.resume() for seat in seats] == [True, True]
    assert [seat.request for seat in seats] == ["question of a", "question of b"]
    assert around["now"] == "outside"
    assert [seat.resume(answer) for seat, answer in zip(seats, (1, 2), strict=True)] == [False, False]
    assert seen == [("a", "a", 1), ("b", "b", 2)]
    assert [seat.result for seat in seats] == [2, 4]
    assert turns.CURRENT is None


def test_a_jobs_clock_stands_still_while_others_take_their_turns(monkeypatch):
    clock = itertools.count()
    monkeypatch.setattr(turns.time, "monotonic", lambda: float(next(clock)))
    read = []

    def job():
        start = turns.seconds()
        turns.CURRENT.ask("x")
        read.append(turns.seconds() - start)

    seats = [turns.Seat(job) for _ in range(3)]
    for seat in [*seats, *seats]:
        seat.resume()
    assert max(read) < 6  # of more than 18 ticks
    assert turns.seconds() >= 18


def test_an_interruption_ends_every_run_and_is_recorded_in_each(tiny, tmp_path, monkeypatch):
    def interrupted(self, blocks, step):
        raise KeyboardInterrupt

    monkeypatch.setattr(Stack, "train", interrupted)
    import signal

    before = signal.getsignal(signal.SIGINT)
    try:
        with pytest.raises(KeyboardInterrupt):
            packed([tiny("logger=none", f"seed={n}") for n in range(2)], tmp_path)
    finally:
        signal.signal(signal.SIGINT, before)
    for number in ("0", "1"):
        status = json.loads((tmp_path / number / "status.json").read_text())
        assert (status["state"], status["reason"]) == ("failed", "interrupted")


# --- the command ------------------------------------------------------------------------------------------------------

SMALL = ["data.limit=64", "data.batch_size=32", "trainer.max_epochs=2", "evaluation.nll_samples=5", "callbacks=minimal"]
SMALL += ["network.hidden=[16]", "model.latent_dim=3", "trainer.accelerator=cpu"]


@pytest.mark.slow
def test_a_packed_sweep_has_its_report_each_run_its_log_and_one_that_fails_is_told(tmp_path):
    sweep = ["objective.beta=0.5,2", "optimizer.lr=1e-3,1e30", "run=sweep", "hydra/launcher=packed", *SMALL]
    done = command("vae.train", "-m", *sweep, cwd=tmp_path)
    assert done.returncode == 1
    assert "Packed: 4 runs are trained as one program." in done.stdout
    folders = sorted(path.parent for path in tmp_path.glob("sweep/*/status.json"))
    assert len(folders) == 4
    for folder in folders:
        state = json.loads((folder / "status.json").read_text())["state"]
        assert state == ("failed" if "1e+30" in folder.name or "1e30" in folder.name else "finished")
        log = (folder / "train.log").read_text()
        assert folder.name in log
        assert log.count("objective.beta") == 1
    again = command("vae.train", "-m", *sweep, "resume=true", cwd=tmp_path)
    assert again.returncode == 1


@pytest.mark.slow
def test_convolutions_and_large_networks_on_a_cpu_are_left_to_joblib_and_the_rest_is_packed(tmp_path):
    small = [option for option in SMALL if "hidden" not in option]
    options = ["seed=0,1", "hydra/launcher=packed", "hydra.launcher.n_jobs=2", *small]
    done = command("vae.train", "-m", "network=mlp,conv", "run=sweep", *options, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "Not packed: 2 runs have convolutions, which gain little or nothing from it on a CPU" in done.stdout
    assert "Packed: 2 runs are trained as one program." in done.stdout
    large = command("vae.train", "-m", "network.hidden=[6000],[16]", "run=large", *options, cwd=tmp_path)
    assert large.returncode == 0, large.stderr
    assert (
        "Not packed: 2 runs have more than 800,000 weights, which gain little or nothing from it on a CPU"
        in large.stdout
    )
    assert "Packed: 2 runs are trained as one program." in large.stdout
    for sweep in ("sweep", "large"):
        assert len(list(tmp_path.glob(f"{sweep}/*/metrics.json"))) == 4


@pytest.mark.slow
def test_a_sweep_of_latent_sizes_is_one_pack_in_the_order_of_its_jobs(tmp_path):
    small = [option for option in SMALL if "latent_dim" not in option]
    sweep = ["model.latent_dim=5,2", "objective.beta=0.5,2", "run=sweep", "hydra/launcher=packed", *small]
    done = command("vae.train", "-m", *sweep, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "Packed: 4 runs are trained as one program, latents of 2 padded to 5." in done.stdout
    shapes = {}
    for path in tmp_path.glob("sweep/*/checkpoints/last.ckpt"):
        saved = torch.load(path, weights_only=True)
        (name,) = (n for n in saved["state_dict"] if n.endswith("decoder.body.0.weight"))
        shapes[path.parts[-3]] = saved["state_dict"][name].shape[1]
        assert f"latent_dim={shapes[path.parts[-3]]}" in path.parts[-3]
    assert sorted(shapes.values()) == [2, 2, 5, 5]
    wrong = command(
        "vae.train", "-m", "model.latent_dim=2,0,x", "run=wrong", "hydra/launcher=packed", *small, cwd=tmp_path
    )
    assert wrong.returncode == 1
    assert "Traceback" not in wrong.stdout + wrong.stderr
    assert "model.latent_dim=x" in wrong.stdout
