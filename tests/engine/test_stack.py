"""Many runs as one program: step by step the same numbers as each run alone, and the same draws."""

from __future__ import annotations

from pathlib import Path

import pytest
import stacks
import torch
import torch.nn.functional as F
from hydra.utils import instantiate
from omegaconf import OmegaConf
from stacks import OBJECTIVES, alone, assert_equal, batches_of, configs_of, made, packed
from torch import nn

from vae.cli import CONFIGS
from vae.data.images import Batch, Images, Unread
from vae.engine import batched, traced
from vae.engine import stack as stack_module
from vae.engine.draws import Unpackable
from vae.engine.gathering import Gatherer
from vae.engine.stack import Stack
from vae.engine.structure import signature
from vae.engine.template import untouched
from vae.engine.working_memory import bytes_of_run, free_bytes
from vae.seeding import generator, generators

pytestmark = pytest.mark.usefixtures("quick_classifier")


@pytest.fixture
def float64():
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.mark.slow
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_a_run_in_a_stack_is_the_run_alone(tiny, float64, monkeypatch, objective):
    monkeypatch.setattr(traced, "TRACED_AFTER", 20)
    assert_equal(configs_of(tiny, objective, "data.limit=48", "data.batch_size=20"), 100, 1e-10)


@pytest.mark.parametrize(
    "objective", [name for name in OBJECTIVES if "=" not in name or "geco" in name or "miwae" in name]
)
@pytest.mark.slow
def test_a_run_in_a_stack_begins_as_the_run_alone(tiny, float64, objective):
    assert_equal(configs_of(tiny, objective, "data.limit=48", "data.batch_size=20"), 4, 1e-12)


TRACED = ["beta_vae,objective/schedule=linear", "beta_vae,objective/schedule=geco"]


@pytest.mark.parametrize("objective", TRACED)
def test_and_goes_on_so_by_the_operators_alone(tiny, float64, monkeypatch, objective):
    monkeypatch.setattr(traced, "TRACED_AFTER", 1)
    assert_equal(configs_of(tiny, objective, "data.limit=40", "data.batch_size=20"), 4, 1e-12)


def test_every_objective_is_tried_here_or_says_why_it_cannot_be_packed(tiny):
    tried = {name.partition(",")[0] for name in OBJECTIVES}
    for name in sorted(path.stem for path in (Path(CONFIGS) / "objective").glob("*.yaml")):
        config = tiny(f"objective={name}").objective
        needed = {key: 2 for key in ("groups", "samples") if OmegaConf.is_missing(config, key)}
        objective = instantiate(config, **needed)
        assert (name in tried) == (objective.unpackable is None), name


SPATIAL = ["network=autoencoder_kl", "network.block_out_channels=[4,4]", "network.norm_num_groups=2"]
SPATIAL += ["model.latent_dim=32"]
PARTS = [
    ["prior=realnvp"],
    ["prior=mixture"],
    ["prior=vampprior", "prior.pseudo_inputs=7"],
    ["prior=two_layer", "posterior=two_layer"],
    ["posterior=iaf"],
    ["posterior=planar"],
    ["network=linear"],
    ["network=gated_mlp", "network.hidden=[16]"],
    ["network=burda"],
    ["network=made"],
    ["network=conv"],
    ["likelihood=continuous_bernoulli"],
    ["likelihood=gaussian_learned"],
    ["likelihood=gaussian_optimal"],
    ["likelihood=gaussian_per_pixel"],
    ["likelihood=discretized_logistic"],
    ["likelihood=discretized_logistic_mixture"],
    ["data.binarize=dynamic"],
    [*SPATIAL, "regularizer=equivariance"],
    [*SPATIAL, "regularizer=equivariance", "regularizer.side=encoder"],
    [*SPATIAL, "regularizer=spectrum", "regularizer.delta=0.5"],
]


@pytest.mark.slow
@pytest.mark.parametrize("parts", PARTS, ids=",".join)
def test_so_it_is_with_every_part_of_a_model(tiny, float64, monkeypatch, parts):
    monkeypatch.setattr(traced, "TRACED_AFTER", 8)
    configs = configs_of(tiny, "beta_vae", "data.limit=48", "data.batch_size=20", *parts)
    fixed = parts[0] != SPATIAL[0]  # on a CPU torch takes the attention of a stack apart, and looks at values for it
    assert_equal(configs, 30, 1e-10, fixed)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("lowers", [True, False])
def test_dense_layers_of_a_stack_have_the_values_and_gradients_of_each_by_itself(float64, monkeypatch, lowers, bias):
    monkeypatch.setattr(batched, "LOWERS", lowers)
    calls, own = [], batched.cross_entropy
    monkeypatch.setattr(batched, "cross_entropy", lambda *stacks: (calls.append(1), own(*stacks))[1])
    noise = generator("layers")
    x, weight = (torch.randn(shape, generator=noise, requires_grad=True) for shape in ((3, 2, 5, 4), (3, 6, 4)))
    b = torch.randn(3, 6, generator=noise, requires_grad=True) if bias else None
    target = torch.rand(3, 2, 5, 6, generator=noise, requires_grad=True)

    def of_one(x, weight, b, target):
        logits = F.linear(x, weight, b)
        once = F.linear(x[0, 0], weight, b).sum()  # a vector
        return once + F.binary_cross_entropy_with_logits(logits, target, reduction="none").square().sum()

    inputs = [t for t in (x, weight, b, target) if t is not None]
    dims = (0, 0, 0 if bias else None, 0)
    with batched.Batched():
        ours = torch.vmap(of_one, dims)(x, weight, b, target)
    assert calls == [1]  # and not what vmap makes of it
    theirs = torch.stack([of_one(x[k], weight[k], None if b is None else b[k], target[k]) for k in range(3)])
    torch.testing.assert_close(ours, theirs, rtol=1e-13, atol=1e-13)
    pairs = zip(torch.autograd.grad(ours.sum(), inputs), torch.autograd.grad(theirs.sum(), inputs), strict=True)
    for a, c in pairs:
        torch.testing.assert_close(a, c, rtol=1e-13, atol=1e-13)
        assert a.is_contiguous()


def operators(runs, tiny):
    made_of = [made(tiny("objective.beta=0.5", f"seed={n}", f"optimizer.lr={1e-3 * (1 + n)}")) for n in range(runs)]
    stack = Stack([member for member, _ in made_of])
    blocks = [[next(iter(loader)) for _, loader in made_of]]
    stack.train(blocks, 0)
    batch, noise = stack._together(blocks[0]), stack._drawn(blocks[0], 1)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as seen:
        _, gradients = stack._gradients(batch, noise, 1)
        stack.optimizer.step(gradients)
    return sum(event.name.startswith("aten::") for event in seen.events())


def test_the_operators_of_a_step_do_not_grow_with_the_runs(tiny):
    few, many = operators(2, tiny), operators(9, tiny)
    assert few == many < 700


def test_runs_in_a_stack_draw_what_they_draw_alone(tiny):
    configs = [tiny("objective=info_vae", "data.binarize=dynamic", f"seed={n}") for n in (1, 2)]
    pairs = [made(config) for config in configs]
    stack = Stack([member for member, _ in pairs])
    batches = [next(iter(loader)) for _, loader in pairs]
    drawn = stack._drawn(batches, 0)
    assert [tuple(draw.shape) for draw in drawn] == [(2, 32, 3), (2, 32, 3)]  # of q(z|x), then of the prior
    prepared = stack._together(batches)
    for run, (member, batch) in enumerate(zip(stack.members, batches, strict=True)):
        noise = generator(batch.seed, "z")
        for draw in drawn:
            assert torch.equal(draw[run], torch.randn(32, 3, generator=noise))
        assert torch.equal(prepared.x[run], member.data.prepare(batch, training=True).x)


def test_what_runs_of_one_seed_draw_is_drawn_once(tiny, monkeypatch):
    pairs = [made(tiny(f"seed={seed}", f"objective.beta={beta}")) for seed in (1, 2) for beta in (1, 2, 4)]
    stack = Stack([member for member, _ in pairs])
    batches = [next(iter(loader)) for _, loader in pairs]
    stack._drawn(batches, 0)  # finds out what a run draws
    seeds = []
    monkeypatch.setattr(stack_module, "generators", lambda own, *where: seeds.extend(own) or generators(own, *where))
    (drawn,) = stack._drawn(batches, 0)
    assert seeds == [batches[0].seed, batches[3].seed]
    for run, batch in enumerate(batches):
        assert torch.equal(drawn[run], torch.randn(32, 3, generator=generator(batch.seed, "z")))


def test_a_program_writes_over_what_is_not_read_again(tiny, monkeypatch):
    monkeypatch.setattr(traced, "TRACED_AFTER", 0)
    pairs = [made(tiny(f"seed={n}")) for n in (1, 2)]
    stack = Stack([member for member, _ in pairs])
    batches = [next(iter(loader)) for _, loader in pairs]
    batch, noise = stack._together(batches), stack._drawn(batches, 0)
    stack._programs(batch, noise, 0)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as seen:
        stack._programs(batch, noise, 1)
    called = {event.name for event in seen.events()}
    assert "aten::relu_" in called and "aten::relu" not in called


@pytest.mark.slow
@pytest.mark.parametrize("objective", ["beta_vae", "tcvae"])
def test_in_float32_a_run_in_a_stack_is_as_near_as_another_adam(tiny, objective):
    """The distance to the run alone, against that of the same run by an Adam that is not fused."""
    config = tiny(f"objective={objective}", "data.limit=48", "data.batch_size=16")
    ours, (plain, loader) = made(config), made(config)
    other, _ = made(tiny(f"objective={objective}", "data.limit=48", "data.batch_size=16", "optimizer.fused=false"))
    packed([ours[0], made(config)[0]], [ours[1], ours[1]], 100)
    alone(plain, loader, 100)
    alone(other, loader, 100)

    def distance(member):
        pairs = zip(member.both.parameters(), plain.both.parameters(), strict=True)
        return max(float((a - b).detach().abs().max()) for a, b in pairs)

    assert distance(ours[0]) < 10 * max(distance(other), 1e-6)


class Transposed(nn.Linear):
    """A layer whose gradient torch leaves in another layout than the weight's, which a fused optimiser would not see."""

    def forward(self, x):
        return (x.unsqueeze(-1) * self.weight.mT).sum(-2) + self.bias


def test_a_layer_of_ones_own_is_trained_as_alone_whatever_the_layout_of_its_gradient(tiny, float64, monkeypatch):
    def changed(config, own=made, **options):
        member, loader = own(config, **options)
        for part in (member.vae.encoder, member.vae.decoder):
            for layer in (layer for layer in part.modules() if type(layer) is nn.Linear):
                layer.__class__ = Transposed
        return member, loader

    monkeypatch.setattr(stacks, "made", changed)
    monkeypatch.setattr(traced, "TRACED_AFTER", 2)
    configs = configs_of(tiny, "beta_vae", "data.limit=40", "data.batch_size=20")
    layer = next(part for part in changed(configs[0])[0].vae.encoder.modules() if type(part) is Transposed)
    (gradient,) = torch.autograd.grad(layer(torch.rand(20, layer.in_features)).sum(), layer.weight)
    assert gradient.stride() != layer.weight.stride()
    assert_equal(configs, 6, 1e-12)


@pytest.mark.parametrize(
    "schedule", [["geco", "objective.schedule.target=9"], ["linear", "objective.schedule.steps=49"]]
)
def test_a_program_has_the_bits_of_the_steps_that_it_stands_for(tiny, monkeypatch, schedule):
    monkeypatch.setattr(traced, "TRACED_AFTER", 0)
    pairs = [made(tiny(f"objective/schedule={schedule[0]}", schedule[1], f"seed={n}")) for n in (1, 2)]
    stack = Stack([member for member, _ in pairs])
    batches = [next(iter(loader)) for _, loader in pairs]
    batch, noise = stack._together(batches), stack._drawn(batches, 3)
    for step in (3, 5, 6, 47, 60):
        found = []
        for function in (stack._gradients, stack._programs):
            before = [buffer.clone() for buffer in stack.buffers.values()]
            with untouched(stack.buffers.values()):
                terms, gradients = function(batch, noise, step)
                found.append(
                    [*terms.items(), *enumerate(gradients), *enumerate(b.clone() for b in stack.buffers.values())]
                )
            assert all(map(torch.equal, before, stack.buffers.values()))
        for (a, ours), (b, theirs) in zip(*found, strict=True):
            assert a == b
            assert torch.equal(ours, theirs), (step, a)
            assert not theirs.requires_grad
    assert len(stack._programs.known) == 1


def test_tracing_a_step_counts_nothing(tiny, monkeypatch):
    monkeypatch.setattr(traced, "TRACED_AFTER", 1)
    schedule = ["objective/schedule=geco", "objective.schedule.target=9"]
    pairs = [made(tiny(*schedule, f"seed={n}")) for n in (1, 2)]
    stack = Stack([member for member, _ in pairs])
    stack.train(list(zip(*(batches_of(loader, 5) for _, loader in pairs), strict=True)), 0)
    assert stack.buffers["objective.schedule.observed"].tolist() == [5.0, 5.0]


def test_what_a_program_does_not_come_to_is_not_traced():
    calls = []

    def of_step(batch, noise, step):
        calls.append(1)
        return {"loss": batch.x.sum() * len(calls)}, []

    batch = Batch(torch.ones(2, 3), None, 0)
    programs = traced.Programs(of_step, [], [])
    assert [programs(batch, [], n) for n in range(traced.TRACED_AFTER + 3)] == [None] * (traced.TRACED_AFTER + 3)
    a, b = torch.ones(3), torch.tensor([1.0, 1.0, 1.001])
    assert traced.same([a, None], [a, None]) and not traced.same([a], [b]) and not traced.same([a], [None])
    nan = torch.tensor([1.0, float("nan")])
    assert traced.same([nan], [nan]) and not traced.same([a[:2]], [nan])


def test_a_program_that_leaves_a_buffer_as_it_was_is_not_taken(monkeypatch):
    monkeypatch.setattr(traced, "TRACED_AFTER", 0)
    count, ignored = torch.zeros(2, dtype=torch.int64), torch.zeros(2, dtype=torch.int64)

    def of_step(batch, noise, step):
        (ignored if isinstance(step, traced.Step) else count).add_(1)
        return {"loss": batch.x.sum(1)}, []

    batch = Batch(torch.ones(2, 3), None, 0)
    assert traced.Programs(of_step, [count, ignored], [count, ignored])(batch, [], 0) is None
    assert count.tolist() == ignored.tolist() == [0, 0]


def test_a_step_that_is_traced_can_be_calculated_with_and_not_be_looked_at():
    step, table = traced.Step(torch.tensor(6.0)), torch.tensor([2.0, 4.0])
    for found in (step / 2, 12 / step / 1 + 1, step + 0 - 3, 3 * step - 15, step % 4 + 1, (step - 3) * 1, 9 - step):
        assert float(found) == 3.0
    assert (step / table).tolist() == [3.0, 1.5]
    assert (table * step).tolist() == [12.0, 24.0]
    assert torch.maximum(table, step).tolist() == [6.0, 6.0]
    assert bool(step > 5) and bool(step == 6) and not bool(step != 6)
    for look in (hash, bool, str, float, int, repr, "{}".format, [1, 2].__getitem__):
        with pytest.raises(TypeError):
            look(step)


@pytest.mark.parametrize("objective", ["BranchesOnTheStep", "NamesTheStep"])
def test_an_objective_that_looks_at_the_step_is_not_taken_for_the_same_at_every_step(
    tiny, float64, monkeypatch, objective
):
    monkeypatch.setattr(traced, "TRACED_AFTER", 1)
    configs = configs_of(tiny, "beta_vae", "data.limit=40", "data.batch_size=20")
    for config in configs:
        config.objective._target_ = f"own_objectives.{objective}"
    assert_equal(configs, 6, 1e-12, fixed=False)


def test_a_model_with_hooks_is_not_traced_and_each_pass_calls_them(tiny, monkeypatch):
    monkeypatch.setattr(traced, "TRACED_AFTER", 0)
    pairs, calls = [made(tiny(f"seed={n}")) for n in (1, 2)], []
    pairs[0][0].vae.encoder.register_forward_hook(lambda *_: calls.append(1))
    stack = Stack([member for member, _ in pairs])
    blocks = list(zip(*(batches_of(loader, 5) for _, loader in pairs), strict=True))
    stack.train(blocks[:1], 0)
    before = len(calls)
    stack.train(blocks[1:], 1)
    assert len(calls) == before + 4


def test_batches_of_one_split_are_gathered_at_once_and_are_those_of_each_run(tiny):
    pairs = [made(tiny("data.binarize=dynamic", f"seed={n}")) for n in (1, 2)]
    members, loaders = zip(*pairs, strict=True)
    apart = [next(iter(loader)) for loader in loaders]
    calls, own = [], Images.gather
    for shared, times in ((False, 2), (True, 1)):
        if shared:
            members[1].data.share(members[0].data)
        later = [member.data.train_dataloader() for member in members]
        for loader in later:
            loader.unread = True
        unread = [next(iter(loader)) for loader in later]
        assert all(isinstance(batch, Unread) for batch in unread)
        gather = Gatherer(members, torch.device("cpu"))
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Images, "gather", lambda *a: (calls.append(1), own(*a))[1])
            together = gather(unread)
        assert len(calls) == times
        calls.clear()
        for k, (member, batch) in enumerate(zip(members, apart, strict=True)):
            alone = member.prepared(batch, torch.device("cpu"))
            assert torch.equal(together.x[k], alone.x) and torch.equal(together.y[k], alone.y)


def test_images_on_the_disk_and_partners_are_not_left_to_be_gathered_later(tiny):
    member, _ = made(tiny("objective=ada_gvae", "data=sprites", "++data.source.size=16"))
    streaming = made(tiny())[0].data.train_dataloader()
    streaming.images.streaming = True
    for loader in (member.data.train_dataloader(), streaming):
        loader.unread = True
        assert isinstance(next(iter(loader)), Batch)


def test_a_stack_that_cannot_go_on_keeps_what_was_done_and_says_why(tiny):
    pairs = [made(tiny("logger=none", f"seed={n}")) for n in (1, 2)]
    stack = Stack([member for member, _ in pairs])
    blocks = list(zip(*(batches_of(loader, 4) for _, loader in pairs), strict=True))

    def failing(batches, step, own=stack._step):
        if step == 2:
            raise Unpackable("enough")
        return own(batches, step)

    stack._step = failing
    assert len(stack.train(blocks, 0)) == 2
    assert float(stack.members[1].optimizer.state[next(stack.members[1].both.parameters())]["step"]) == 2
    with pytest.raises(Unpackable, match="enough"):
        stack.train(blocks, 2)


def test_what_is_seen_alike_is_one_structure_and_what_is_not_is_another(tiny):
    def of(*overrides):
        return signature(made(tiny(*overrides))[0])

    same = ["seed=5", "objective.beta=9", "optimizer.lr=0.5", "optimizer.weight_decay=0.1"]
    assert len({of(override) for override in ["seed=0", *same]}) == 1
    other = ["optimizer.betas=[0.5,0.9]", "optimizer=sgd", "network.activation=tanh", "likelihood=continuous_bernoulli"]
    other += [
        "data.binarize=dynamic",
        "data.batch_size=16",
        "data.limit=48",
        "objective=free_bits",
        "model.latent_dim=2",
    ]
    assert len({of(override) for override in ["seed=0", *other]}) == 1 + len(other)
    assert of("objective=iwae", "objective.samples=2") != of("objective=iwae", "objective.samples=3")


OPTIMIZERS = {
    "adam": ["optimizer=adam"],
    "adam, not fused": ["optimizer.fused=false"],
    "adam with decay": ["optimizer.weight_decay=0.1"],
    "adamw": ["optimizer=adamw"],
    "adam, amsgrad": ["+optimizer.amsgrad=true"],
    "sgd": ["optimizer=sgd"],
    "adagrad": ["optimizer=adagrad"],
}


@pytest.mark.parametrize("same_rate", [False, True])
@pytest.mark.parametrize(
    "optimizer",
    [pytest.param(name, marks=[] if name in ("adam", "adamw", "sgd") else pytest.mark.slow) for name in OPTIMIZERS],
)
@pytest.mark.slow
def test_an_optimiser_over_the_stack_takes_each_runs_own_step(tiny, float64, optimizer, same_rate):
    rates = ["optimizer.lr=0.01"] * 2 if same_rate else ["optimizer.lr=0.002", "optimizer.lr=0.01"]
    small = ["data.limit=48", "data.batch_size=20", *OPTIMIZERS[optimizer]]
    assert_equal([tiny(*small, rate, f"seed={seed}") for seed, rate in enumerate(rates)], 12, 1e-12)


@pytest.mark.parametrize("clip", [("norm", 5.0), ("value", 0.05)])
def test_each_run_is_clipped_by_its_own_gradient(tiny, float64, clip):
    configs = [tiny("data.limit=40", "data.batch_size=20", f"objective.beta={beta}") for beta in (1, 500)]
    assert_equal(configs, 10, 1e-12, clip=clip)


def test_what_a_step_of_a_run_holds_is_estimated_from_its_own(tiny):
    member, loader = made(tiny("data.batch_size=32"))
    small, batch = bytes_of_run(member, next(iter(loader))), next(iter(loader))
    weights = 4 * sum(p.numel() for p in member.both.parameters())
    assert small > 4 * weights + 2 * 4 * 32 * 64  # the logits at least
    member, loader = made(tiny("data.batch_size=64"))
    assert bytes_of_run(member, next(iter(loader))) - 4 * weights == pytest.approx(2 * (small - 4 * weights), rel=0.05)
    assert free_bytes(member) > 10 * small
    assert len(batch.x) == 32
