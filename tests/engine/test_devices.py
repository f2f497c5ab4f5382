"""One run on several devices: the same numbers as on one, whoever holds an image."""

from __future__ import annotations

import contextlib
import copy
import csv
import json
import os
import re
import signal
import time
import traceback
from pathlib import Path

import pytest
import pytorch_lightning as pl
import torch
import torch.distributed as dist
from commands import run
from conftest import composed
from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import OmegaConf

from vae import ranks
from vae.cli import CONFIGS
from vae.data.images import Batch, Images, Splits
from vae.data.loader import BatchLoader, EpochSampler
from vae.data.module import ImageDataModule
from vae.engine.build import build
from vae.engine.devices import Crew, digest, refuse_unequal, refuse_what_depends_on_rows
from vae.engine.run import evaluate, train
from vae.engine.trainer import build_trainer, device_count, trainer_options
from vae.errors import VAEError
from vae.seeding import generator

pytestmark = pytest.mark.usefixtures("quick_classifier")
OBJECTIVES = sorted(path.stem for path in (Path(CONFIGS) / "objective").glob("*.yaml"))
SMALL = ["data.limit=64", "data.batch_size=32", "evaluation.nll_samples=5", "threads=1", "trainer.accelerator=cpu"]
SMALL += ["callbacks=minimal", "network.hidden=[16]", "model.latent_dim=4"]
OF_OBJECTIVE = {
    "factor_vae": ["objective.hidden=[8]"],
    "adversarial": ["objective.channels=[4]", "objective.penalty=lecam"],
    "iwae": ["objective.samples=3"],
    "dreg": ["objective.samples=3"],
    "ciwae": ["objective.samples=3"],
    "miwae": ["objective.groups=2", "objective.samples=3"],
    "piwae": ["objective.groups=2", "objective.samples=3"],
    "m2": ["+data.labeled=20", "objective.hidden=[8]"],
    "ada_gvae": [
        "data=sprites",
        "++data.source.size=16",
        "++data.source.subset={scale: 2, orientation: 4, x: 4, y: 4}",
    ],
}
SPATIAL = ["network=autoencoder_kl", "network.block_out_channels=[4,4]", "network.norm_num_groups=2"]
SPATIAL += ["model.latent_dim=32"]
#: parts that use the encoder elsewhere, draw or estimate, or that have a statistic of the batch
PARTS = [
    ["likelihood=gaussian_optimal"],
    ["likelihood=gaussian_learned"],
    ["prior=vampprior", "prior.pseudo_inputs=5"],
    ["objective=sticking_the_landing", "posterior=iaf"],
    ["objective=piwae", "objective.samples=3", "prior=mixture", "likelihood=gaussian_optimal"],
    ["objective=dreg", "objective.samples=3", "prior=vampprior", "prior.pseudo_inputs=5"],
    ["network=made", "network.hidden=[8]"],
    ["objective/schedule=control", "objective.schedule.target=5"],
    [*SPATIAL, "regularizer=equivariance", "likelihood=gaussian_optimal"],
    [*SPATIAL, "regularizer=equivariance", "regularizer.side=encoder"],
    [*SPATIAL, "regularizer=spectrum"],
    ["posterior=vq", "posterior.codes=5", "posterior.dim=2", "posterior.restart=0.5", "prior=codes_categorical"],
    ["posterior=fsq", "posterior.levels=[4,3]", "prior=codes_autoregressive"],
]
CASES = [[f"objective={name}", *OF_OBJECTIVE.get(name, [])] for name in OBJECTIVES] + PARTS


def quickly(*overrides):
    """What `composed` gives. Groups but for `data` are read one by one, in a tenth of the time that Hydra takes for all."""
    groups = [o for o in overrides if (Path(CONFIGS) / o.partition("=")[0]).is_dir()]
    config = composed(*SMALL, *(o for o in groups if o.startswith("data=")))
    for group, _, name in (o.partition("=") for o in groups if not o.startswith("data=")):
        OmegaConf.update(config, group.replace("/", "."), of_file(group, name), merge=False)
    values = OverridesParser.create().parse_overrides([o for o in overrides if o not in groups])
    ConfigLoaderImpl._apply_overrides_to_config(values, config)
    return config


def of_file(group, name):
    found = OmegaConf.load(Path(CONFIGS) / group / f"{name}.yaml")
    merged = OmegaConf.create()
    for default in found.pop("defaults", []):
        parts = [(None, default)] if isinstance(default, str) else default.items()
        for key, value in parts:
            if value != "_self_" and not str(key).startswith("override"):
                merged.merge_with(of_file(group, value) if key is None else {key: of_file(f"{group}/{key}", value)})
    return OmegaConf.merge(merged, found)


def together(task, world, folder, *arguments):
    """What `task(*arguments)` returns on each of `world` processes, forked from this one, which are a process group."""
    outs, pids = [folder / f"{task.__name__}-{rank}.pt" for rank in range(world)], []
    for rank in range(world):
        pids.append(os.fork())
        if pids[-1] == 0:
            try:
                torch.set_num_threads(1)
                store = f"file://{folder}/store-{task.__name__}"
                dist.init_process_group("gloo", init_method=store, rank=rank, world_size=world)
                answer = task(*arguments)
            except BaseException:
                answer = traceback.format_exc()
            torch.save(answer, outs[rank])
            os._exit(0)
    for pid in pids:
        os.waitpid(pid, 0)
    found = [torch.load(out, weights_only=False) for out in outs]
    for answer in found:
        assert not isinstance(answer, str), answer
    return found


def doubled(batch, images):
    """So many of its images, in float64."""
    x, y, seed, partner = batch
    x, partner = (part if part is None else part[:images].double() for part in (x, partner))
    return Batch(x, None if y is None else y[:images], seed, partner)


def of_step(module, batch, training=True):
    """The terms of a batch and the gradient of the loss, in one flat tensor."""
    module.train(training).zero_grad()
    with torch.set_grad_enabled(training):
        terms = module.objective(module.vae, batch, generator("noise"), 3)
    if training:
        terms["loss"].backward()
        if ranks.world_size() > 1 and ranks.are_sharing():
            ranks.average_gradients(module.parameters())
    gradients = [p.grad.flatten() for p in module.parameters() if p.grad is not None]
    return {name: value.item() for name, value in terms.items()}, torch.cat([*gradients, torch.zeros(1)])


def of_cases(built, shared):
    """What `of_step` finds in each case on batches of 7 images and of one, and the buffers after it."""
    found = []
    for data, module in built:
        whole = data.prepare(next(iter(data.train_dataloader())), training=True)
        for images, training in ((7, True), (7, False), (1, True)):
            copied = copy.deepcopy(module).double()  # a likelihood may keep what it saw
            if hasattr(copied.vae.prior, "_encoder"):
                copied.vae.prior._encoder = (copied.vae.encoder,)
            with ranks.sharing() if shared else contextlib.nullcontext():
                terms, gradient = of_step(copied, doubled(whole, images), training)
            found.append((terms, gradient, dict(copied.named_buffers())))
    return found


def test_every_objective_gives_the_terms_and_gradients_of_the_whole_batch(tmp_path):
    """On three ranks: 7 images are 2, 2 and 3; of one image, two ranks have none. In float64, where only rounding differs."""
    built = [build(quickly(*case)) for case in CASES]
    expected = of_cases(built, shared=False)
    everyones = together(of_cases, 3, tmp_path, built, True)
    for number, (terms, gradient, buffers) in enumerate(expected):
        case = (CASES[number // 3], number % 3)
        for found in everyones:
            assert found[number][0] == pytest.approx(terms, rel=1e-9, abs=1e-9), case
            torch.testing.assert_close(found[number][1], gradient, rtol=1e-9, atol=1e-9 * float(gradient.abs().max()))
            torch.testing.assert_close(found[number][2], buffers, rtol=1e-9, atol=1e-12)
            assert torch.equal(found[number][1], everyones[0][number][1])
    assert all(len(gradient) > 100 for _, gradient, _ in expected[::3])


def of_parameters(module, x):
    """A loss of the likelihood's parameters, as an objective of one's own may ask for, and its gradient."""
    module.zero_grad()
    with ranks.sharing():
        out = module.vae(x, generator("z"), None, (2,))
        loss = out.params.sigmoid().std((0, 1)).sum() + out.params[:, -1].square().mean()
    loss.backward()
    if ranks.world_size() > 1:
        ranks.average_gradients(module.parameters())
    return tuple(out.params.shape), loss.item(), torch.cat([p.grad.flatten() for p in module.parameters()])


def test_an_objective_that_asks_for_the_parameters_of_the_pixels_has_those_of_all_images(tmp_path):
    _, module = build(quickly("objective=beta_vae"))
    module, x = module.double(), torch.rand(5, 1, 8, 8, dtype=torch.float64)
    shape, loss, gradient = of_parameters(module, x)
    assert shape[:2] == (2, 5)
    for found in together(of_parameters, 2, tmp_path, module, x):
        assert found[:2] == (shape, pytest.approx(loss, rel=1e-12))
        torch.testing.assert_close(found[2], gradient, rtol=1e-9, atol=1e-12)


def after_steps(data, module, shared):
    """The weights, buffers and optimiser's state after an epoch of training, float64, each batch with its schedule."""
    module = module.double().train()
    optimizer, found = module.configure_optimizers(), []
    for step, batch in enumerate(data.train_dataloader()):
        batch = data.prepare(batch, training=True)
        with ranks.sharing() if shared else contextlib.nullcontext():
            terms = module.objective(module.vae, batch._replace(x=batch.x.double()), generator(batch.seed, "z"), step)
        module.objective.schedule.observe(rate=terms["rate"], distortion=terms["distortion"])
        optimizer.zero_grad()
        terms["loss"].backward()
        if shared:
            ranks.average_gradients(module.parameters())
        optimizer.step()
        found.append(terms["loss"].item())
    return found, module.state_dict()


@pytest.mark.parametrize(
    ("objective", "schedule"), [("factor_vae", "control"), ("factor_vae", "geco"), ("adversarial", "control")]
)
def test_a_discriminator_and_a_controller_stay_equal_on_all_ranks(tmp_path, objective, schedule):
    case = [f"objective={objective}", *OF_OBJECTIVE[objective], f"objective/schedule={schedule}"]
    data, module = build(quickly(*case, "objective.schedule.target=5", "data.batch_size=9", "optimizer.lr=0.01"))
    everyones = together(after_steps, 2, tmp_path, data, module, True)
    losses, state = after_steps(data, module, False)
    assert len(losses) == 8  # the last of one image
    assert losses[0] != losses[-1]
    for found, weights in everyones:
        assert found == pytest.approx(losses, rel=1e-10)
        torch.testing.assert_close(weights, state, rtol=1e-8, atol=1e-10)
        assert all(torch.equal(weights[name], everyones[0][1][name]) for name in weights)


# --- rows ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("n", "world", "shares"), [(7, 3, [2, 2, 3]), (1, 3, [0, 0, 1]), (0, 2, [0, 0]), (8, 2, [4, 4])]
)
def test_rows_are_shared_out_equally_and_none_twice(n, world, shares):
    assert ranks.sizes(n, world) == shares


class Files(Images):
    """A split that is read from disk, and notes what is read."""

    streaming = True

    def gather(self, index):
        READ.extend(index.tolist())
        return super().gather(index)


READ: list[int] = []


def files():
    """30 / 15 / 15 random images that are read batch by batch."""
    x = torch.randint(256, (60, 1, 8, 8), generator=generator("files"), dtype=torch.uint8)
    return Splits(*(Files(part, torch.arange(len(part)) % 3) for part in x.split([30, 15, 15])))


def read_an_epoch(images):
    batches = [(batch.x, batch.y, batch.seed) for batch in BatchLoader(images, EpochSampler(11, 4, 0, True), "train")]
    return batches, list(READ)


def test_each_rank_reads_its_rows_from_the_disk_and_has_the_whole_batch(tmp_path):
    x = torch.arange(11, dtype=torch.uint8)[:, None, None, None].expand(11, 1, 2, 2).contiguous()
    images = Files(x, torch.arange(11))
    everyones = together(read_an_epoch, 2, tmp_path, images)
    expected, order = read_an_epoch(images)
    assert sorted(order) == list(range(11))
    for batches, read in everyones:
        assert len(read) in (5, 6)
        for batch, alone in zip(batches, expected, strict=True):
            assert torch.equal(batch[0], alone[0])
            assert torch.equal(batch[1], alone[1])
            assert batch[2] == alone[2]
    assert sorted(everyones[0][1] + everyones[1][1]) == list(range(11))


# --- what is refused ----------------------------------------------------------------------------------------------------


def data_of(n, value=0):
    x = torch.full((n, 1, 4, 4), value, dtype=torch.uint8)
    module = ImageDataModule(lambda: Splits(Images(x), Images(x[:3]), Images(x[:3])), batch_size=4)
    module.setup()
    return module


def test_ranks_with_other_data_are_refused_in_a_sentence():
    refuse_unequal([digest(data_of(9)), digest(data_of(9))])
    with pytest.raises(VAEError, match=r"Device 1 .* in the train split 8 images of shape \(1, 4, 4\), not 9 of"):
        refuse_unequal([digest(data_of(9)), digest(data_of(8))])
    with pytest.raises(VAEError, match=r"Device 2 has other data .* other pixels or labels"):
        refuse_unequal([digest(data_of(9)), digest(data_of(9)), digest(data_of(9, value=1))])


def test_ranks_tell_each_other_of_their_data_before_they_begin(monkeypatch):
    monkeypatch.setattr(dist, "init_process_group", lambda *_, **__: None)  # which would wait for the other
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    store.set("data 1", json.dumps(digest(data_of(8))))
    with pytest.raises(VAEError, match="Device 1 has other data than device 0"):
        Crew(0, 2, store).meet(data_of(9))


def told_of(module):
    module._open = [(4, {"loss": torch.tensor(2.0)}), (4, {"loss": 2.0 + torch.tensor(float(ranks.rank()))})]
    try:
        module._refuse_disagreement()
    except VAEError as error:
        return [str(error)]
    return []


def test_devices_that_come_to_different_losses_are_refused(tmp_path):
    _, module = build(quickly("objective=beta_vae"))
    for (told,) in together(told_of, 2, tmp_path, module):
        assert "come to different losses (2, 2.5)" in told
        assert told.endswith("Use trainer.devices=1.")
    module._open = [(4, {"loss": torch.tensor(2.0)})]
    module._refuse_disagreement()


def test_ranks_of_a_trainer_of_ones_own_are_refused_before_they_train():
    data, module = build(composed("data=digits"))
    own = pl.Trainer(accelerator="cpu", max_epochs=1, barebones=True)
    own.__class__ = type("OfTwo", (pl.Trainer,), {"world_size": 2})
    with pytest.raises(VAEError, match=r"A Trainer of your own with 2 processes .* devices=1"):
        own.fit(module, data)
    assert module.steps == 0


@pytest.mark.parametrize("gpus", [0, 2])
def test_a_run_on_several_devices_is_measured_on_one(gpus, monkeypatch):
    config = composed(*SMALL, "trainer.devices=2", "+trainer.strategy=ddp")
    assert build_trainer(config).world_size == 1
    config.trainer.devices = [0, 1]
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)  # of the machine, whose CPU measures
    assert build_trainer(config).world_size == 1


@pytest.mark.parametrize("layer", [torch.nn.BatchNorm2d(3), torch.nn.Dropout(0.1)])
def test_layers_that_look_at_the_rows_of_a_rank_are_refused(layer):
    module = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.LayerNorm(2), torch.nn.GroupNorm(1, 2))
    refuse_what_depends_on_rows(module)
    module.append(layer)
    with pytest.raises(
        VAEError, match=rf"trainer.devices: 3 is a {type(layer).__name__}, which .* use trainer.devices=1"
    ):
        refuse_what_depends_on_rows(module)


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (["trainer.devices=2", "+trainer.strategy=fsdp"], "trainer.strategy=fsdp is not supported with 2 devices"),
        (["trainer.devices=2", "+trainer.strategy=ddp_spawn"], "trainer.strategy=ddp_spawn is not supported"),
        (["trainer.devices=2", "+trainer.strategy=deepspeed"], "trainer.strategy=deepspeed is not supported"),
        (["+trainer.strategy=ddp"], "trainer.strategy=ddp is not supported with 1 device: leave"),
        (["trainer.devices=2", "+trainer.num_nodes=2"], "trainer.num_nodes=2: all devices of a run are of one machine"),
        (["trainer.devices=2", "+trainer.sync_batchnorm=true"], "trainer.sync_batchnorm: "),
        (["trainer.devices=[0,1]"], r"trainer.devices=\[0, 1\] lists GPUs, and none is used: trainer.devices=2"),
        (["trainer.devices=auto"], "trainer.devices=auto must be how many"),
        (["trainer.devices=-1"], "trainer.devices=-1 must be how many"),
        (["trainer.devices=0"], "trainer.devices=0 must be how many"),
        (["trainer.devices=1.5"], "trainer.devices=1.5 must be how many"),
    ],
)
def test_what_is_not_right_on_several_devices_is_refused(options, told):
    with pytest.raises(VAEError, match=told):
        trainer_options(composed(*SMALL, *options))


@pytest.mark.parametrize("options", [["trainer.devices=2"], ["trainer.devices='2'", "+trainer.strategy=ddp"]])
def test_what_is_right_on_several_devices_is_not_refused(options):
    assert device_count(trainer_options(composed(*SMALL, *options))) == 2


# --- whole runs ---------------------------------------------------------------------------------------------------------

RUN = ["data.limit=65", "data.batch_size=20", "data.eval_batch_size=20", "trainer.max_epochs=2", "progress_bar=false"]
RUN += ["trainer.log_every_n_steps=2", "callbacks=default", "callbacks.pictures.points=16"]
RUN += ["callbacks.interruptible.every_n_steps=1"]
UNLIKE = {"train/seconds_per_epoch"}


def trained(folder, *overrides, resume=False):
    groups = [o for o in overrides if (Path(CONFIGS) / o.partition("=")[0]).is_dir()]
    values = [o for o in overrides if o not in groups]
    return train(composed(*SMALL, *RUN, *groups, *values), folder, [], resume, progress_bar=False)


def close(metrics, expected, rel):
    return {k: v for k, v in metrics.items() if k not in UNLIKE} == pytest.approx(
        {k: v for k, v in expected.items() if k not in UNLIKE}, rel=rel, abs=1e-6
    )


@pytest.mark.slow
def test_a_command_on_two_devices_leaves_what_one_would_once(tmp_path):
    """65 images are an odd number of each split, and an odd last batch. One process writes, into one folder."""
    (tmp_path / "cwd").mkdir()
    expected = trained(tmp_path / "alone", "logger=[tensorboard,csv]")
    options = [*SMALL, *RUN, "logger=[tensorboard,csv]"]
    done = run("vae.train", *options, "trainer.devices=2", f"run={tmp_path / 'two'}", cwd=tmp_path / "cwd")
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("Finished:") == 1
    assert "Traceback" not in done.stderr
    assert list((tmp_path / "cwd").iterdir()) == []
    metrics = json.loads((tmp_path / "two" / "metrics.json").read_text())
    assert close(metrics, expected, rel=1e-5)
    files = [
        sorted(
            re.sub(r"\d{9,}.*", "", str(p.relative_to(f))) for p in f.rglob("*") if p.name not in ("train.log", ".lock")
        )
        for f in (tmp_path / "alone", tmp_path / "two")
    ]
    assert files[0] == files[1]
    rows = [list(csv.DictReader((tmp_path / name / "metrics.csv").open())) for name in ("alone", "two")]
    assert len(rows[0]) == len(rows[1])
    for alone, two in zip(*rows, strict=True):
        for name, value in alone.items():
            assert (two[name] == "") if value == "" else float(two[name]) == pytest.approx(float(value), rel=1e-5), name
    assert evaluate(tmp_path / "two") == pytest.approx(
        {k: v for k, v in metrics.items() if k.startswith("test/")}, rel=1e-6
    )


@pytest.mark.slow
def test_a_sweep_of_runs_on_two_devices_has_its_folders_and_no_others(tmp_path):
    options = ["trainer.max_steps=3", "logger=csv", "trainer.devices=2", "seed=0,1", f"run={tmp_path / 'sweep'}"]
    done = run("vae.train", "-m", *SMALL, *options, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    found = sorted(path.parent.name for path in tmp_path.rglob("metrics.json"))
    assert found == ["seed=0", "seed=1"]
    assert [path.name for path in tmp_path.iterdir()] == ["sweep"]
    losses = [json.loads(path.read_text())["test/loss"] for path in tmp_path.rglob("metrics.json")]
    assert losses[0] != losses[1]


@pytest.mark.slow
@pytest.mark.parametrize(("before", "after"), [(2, 1), (1, 2)])
def test_a_run_goes_on_on_another_number_of_devices(tmp_path, before, after):
    case = ["objective=factor_vae", "objective.hidden=[8]", "objective/schedule=control", "objective.schedule.target=5"]
    expected = trained(tmp_path / "whole", *case)
    trained(tmp_path / "run", *case, "trainer.max_epochs=1", f"trainer.devices={before}")
    metrics = trained(tmp_path / "run", *case, f"trainer.devices={after}", resume=True)
    assert close(metrics, expected, rel=1e-4)


@pytest.mark.slow
def test_lightnings_own_loop_clipping_early_stopping_and_a_time_limit_work_too(tmp_path):
    """Batches that are accumulated are left to Lightning's loop; their gradients meet once, before they are clipped."""
    case = ["+trainer.accumulate_grad_batches=2", "trainer.gradient_clip_val=0.1", "callbacks=early_stopping", "seed=3"]
    case += [
        "callbacks.early_stopping.patience=1",
        "+callbacks.early_stopping.min_delta=5",
        "+trainer.max_time={hours: 1}",
    ]
    case += ["trainer.max_epochs=9", "callbacks.pictures=null"]
    expected = trained(tmp_path / "alone", *case)
    assert 1 <= json.loads((tmp_path / "alone" / "status.json").read_text())["epochs"] < 9
    metrics = trained(tmp_path / "two", *case, "trainer.devices=2")
    assert close(metrics, expected, rel=1e-4)
    ended = [json.loads((tmp_path / name / "status.json").read_text())["epochs"] for name in ("alone", "two")]
    assert ended[0] == ended[1]


@pytest.mark.slow
def test_images_in_files_are_read_by_workers_of_each_device(tmp_path):
    case = [
        f"data.source._target_={__name__}.files",
        "data.batch_size=7",
        "data.eval_batch_size=7",
        "+data.num_workers=1",
    ]
    expected = trained(tmp_path / "alone", *case)
    assert close(trained(tmp_path / "two", *case, "trainer.devices=2"), expected, rel=1e-5)


class Killer(pl.Callback):
    """Kills the process of one rank at a step, where there are several; the others say who they are."""

    def __init__(self, rank, step, notes):
        self.rank, self.step, self.notes = rank, step, Path(notes)

    def on_train_batch_end(self, trainer, module, *_):
        if trainer.world_size > 1 and module.steps == self.step:
            (self.notes / str(trainer.global_rank)).write_text(str(os.getpid()))
            if trainer.global_rank == self.rank:
                os.kill(os.getpid(), signal.SIGKILL)


def killer(rank, folder):
    return f"+callbacks.killer={{_target_: {__name__}.Killer, rank: {rank}, step: 6, notes: '{folder}'}}"


@pytest.mark.slow
def test_the_death_of_one_rank_is_told_and_the_run_goes_on_from_its_checkpoint(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parent))
    expected = trained(tmp_path / "whole")
    with pytest.raises(VAEError, match=r"The process of device 1 was killed by signal 9: resume=true goes on"):
        trained(tmp_path / "run", "trainer.devices=2", killer(1, tmp_path))
    assert "device 1 was killed" in json.loads((tmp_path / "run" / "status.json").read_text())["reason"]
    assert not dist.is_initialized()
    saved = torch.load(tmp_path / "run" / "checkpoints" / "last.ckpt", weights_only=False)
    assert saved["steps"] >= 5  # in the middle of the second epoch of 4 steps: of the steps nothing is lost
    assert close(trained(tmp_path / "run", killer(1, tmp_path), resume=True), expected, rel=1e-5)


@pytest.mark.slow
def test_the_other_ranks_end_with_the_first(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parent))
    pid = os.fork()
    if pid == 0:
        with contextlib.suppress(BaseException):
            trained(tmp_path / "run", "trainer.devices=2", killer(0, tmp_path))
        os._exit(0)
    assert os.WTERMSIG(os.waitpid(pid, 0)[1]) == signal.SIGKILL
    until = time.monotonic() + 20
    other = int((tmp_path / "1").read_text()) if (tmp_path / "1").exists() else None
    while other and Path(f"/proc/{other}").exists():
        assert time.monotonic() < until
        time.sleep(0.1)


@pytest.mark.slow
def test_a_run_that_diverges_on_two_devices_says_so_in_one_sentence(tmp_path):
    done = run(
        "vae.train", *SMALL, *RUN, "optimizer.lr=1e30", "trainer.devices=2", f"run={tmp_path / 'run'}", cwd=tmp_path
    )
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    assert "Error: " in done.stderr
    assert "diverged" in done.stderr or "stopped being finite" in done.stderr
