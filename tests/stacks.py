"""Runs in a stack beside the same runs alone, step by step."""

from __future__ import annotations

import itertools

import torch

from vae.engine import traced
from vae.engine.build import build
from vae.engine.padding import is_paddable
from vae.engine.stack import Member, Stack
from vae.engine.structure import signature
from vae.seeding import generator

#: Of each objective that says it can be packed: what two runs differ in.
OBJECTIVES = {
    "beta_vae": (["objective.beta=0.5"], ["objective.beta=4"]),
    "beta_vae,objective/schedule=linear": (["objective.schedule.steps=30"], ["objective.schedule.steps=90"]),
    "beta_vae,objective/schedule=cyclical": (["objective.schedule.steps=50"], ["objective.schedule.ramp=0.3"]),
    "beta_vae,objective/schedule=control": (["objective.schedule.target=3"], ["objective.schedule.target=9"]),
    "beta_vae,objective/schedule=geco": (["objective.schedule.target=20"], ["objective.schedule.target=40"]),
    "capacity": (["objective.capacity=2"], ["objective.gamma=30"]),
    "free_bits": (["objective.free_nats=0.1"], ["objective.free_nats=1"]),
    "free_bits,objective.groups=1": (["objective.free_nats=0.1"], ["objective.beta=2"]),
    "dip_vae_i": (["objective.lambda_od=1"], ["objective.lambda_d=50"]),
    "dip_vae_ii": (["objective.lambda_od=1"], ["objective.beta=3"]),
    "info_vae": (["objective.alpha=0.2"], ["objective.lambda_mmd=20"]),
    "mmd_vae": (["objective.lambda_mmd=10"], ["objective.lambda_mmd=100"]),
    "wae_mmd": (["objective.lambda_mmd=1"], ["objective.lambda_mmd=30"]),
    "tcvae": (["objective.beta=2"], ["objective.alpha=3"]),
    "iwae,objective.samples=3": (["objective.beta=1"], ["objective.beta=2"]),
    "sticking_the_landing,objective.samples=3": (["objective.beta=1"], ["objective.beta=2"]),
    "miwae,objective.groups=2,objective.samples=3": (["objective.beta=1"], ["objective.beta=2"]),
    "ciwae,objective.samples=3": (["objective.mix=0.1"], ["objective.mix=0.6"]),
    "feature": (["objective.lambda_feature=0.1"], ["objective.lambda_feature=2"]),
    "cvae": (["objective.beta=0.5"], ["objective.beta=4"]),
    "ada_gvae,data=sprites,++data.source.size=16": (["objective.beta=0.5"], ["objective.beta=4"]),
}


def made(config, **options):
    data, module = build(config)
    module.train()
    optimizer = module.configure_optimizers()
    return Member(module.vae, module.objective, optimizer, data, **options), data.train_dataloader()


def batches_of(loader, steps):
    found = []
    for epoch in itertools.count():
        loader.sampler.set_epoch(epoch)
        for batch in loader:
            if len(found) == steps:
                return found
            found.append(batch)


def alone(member, loader, steps):
    """The terms of each step, as VAEModule and Lightning take them."""
    found = []
    for step, batch in enumerate(batches_of(loader, steps)):
        prepared = member.data.prepare(batch, training=True)
        noise = generator(batch.seed, "z")
        terms = member.objective(member.vae, prepared, noise, step)
        member.objective.schedule.observe(rate=terms["rate"], distortion=terms["distortion"])
        member.optimizer.zero_grad()
        terms["loss"].backward()
        if member.clip is not None:
            kind, most = member.clip
            clip = torch.nn.utils.clip_grad_norm_ if kind == "norm" else torch.nn.utils.clip_grad_value_
            clip(member.both.parameters(), most)
        member.optimizer.step()
        found.append({name: value.detach().clone() for name, value in terms.items()})
    return found


def packed(members, loaders, steps, at_once=7, fixed=True):
    """The terms of each step, the batches left unread where they can be. fixed: whether later steps are taken by programs."""
    for member in members:
        member.data.share(members[0].data)
    for loader in loaders:
        loader.images, loader.unread = members[0].data.splits.train, True
    stack, found = Stack(members), []
    blocks = list(zip(*(batches_of(loader, steps) for loader in loaders), strict=True))
    while len(found) < steps:
        found += stack.train(blocks[len(found) : len(found) + at_once], len(found))
    sizes = {size for size, taken in stack._programs.taken.items() if taken > traced.TRACED_AFTER}
    assert (sizes if fixed else set()) == {size for size, program in stack._programs.known.items() if program}
    return found


def assert_equal(configs, steps, within, fixed=True, padded_to=None, **options):
    """padded_to: the size of the latent that those of other runs are padded to, if they are."""
    ours = [made(config, **options) for config in configs]
    theirs = [made(config, **options) for config in configs]
    if padded_to is None:
        assert len({signature(member) for member, _ in ours}) == 1
    else:
        assert all(is_paddable(member.vae, member.objective) for member, _ in ours)
        assert len({signature(member, sizes=False) for member, _ in ours}) == 1
        assert len({signature(member) for member, _ in ours}) > 1
        assert max(member.vae.latent_dim for member, _ in ours) == padded_to
    together = packed([member for member, _ in ours], [loader for _, loader in ours], steps, fixed=fixed)
    for run, ((one, _), (other, loader)) in enumerate(zip(ours, theirs, strict=True)):
        by_itself = alone(other, loader, steps)
        for step, terms in enumerate(by_itself):
            assert terms.keys() == together[step].keys()
            for name, value in terms.items():
                torch.testing.assert_close(
                    together[step][name][run], value, rtol=within, atol=within, msg=f"{name} {step}"
                )
        for (name, a), (_, b) in zip(one.both.state_dict().items(), other.both.state_dict().items(), strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=within, msg=name)
        for a, b in zip(one.both.parameters(), other.both.parameters(), strict=True):
            states = one.optimizer.state[a], other.optimizer.state[b]
            assert states[0].keys() == states[1].keys()
            for name, value in states[1].items():
                torch.testing.assert_close(states[0][name], value, rtol=0, atol=within, check_dtype=True, msg=name)


def configs_of(tiny, objective, *common):
    name, *more = objective.split(",")
    differ = OBJECTIVES.get(objective, ([], []))
    return [
        tiny(f"objective={name}", *more, *common, f"seed={seed}", f"optimizer.lr={lr}", *varied)
        for seed, lr, varied in zip((3, 8), (1e-3, 3e-3), differ, strict=True)
    ]
