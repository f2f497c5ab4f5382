"""Steps by torch's kernel against steps by torch's optimisers: the same bits, whatever comes between."""

import copy

import pytest
import torch
from torch import nn
from torch.optim.optimizer import register_optimizer_step_pre_hook

from vae.engine.fused_adam import QuickStep

ADAM, ADAMW = torch.optim.Adam, torch.optim.AdamW


def pair(kind=ADAM, second=None, **options):
    """Two equal networks, each with an optimiser of its own that has two groups."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 3))
    nets = [net, copy.deepcopy(net)]
    options = {"lr": 0.01, "fused": True, **options}
    groups = [[{"params": n[0].parameters()}, {"params": n[2].parameters(), **(second or {})}] for n in nets]
    return nets, [kind(group, **options) for group in groups]


def take(net, step, number, loss=lambda out: out.square().mean()):
    x = torch.randn(11, 5, generator=torch.Generator().manual_seed(number))
    step.zero_grad()
    loss(net(x)).backward()
    step.step()


def counted(optimizer):
    """How many steps are torch's own, from now on."""
    calls = []
    own = type(optimizer).step
    optimizer.step = lambda *a: (calls.append(1), own(optimizer, *a))[1]
    optimizer.step._wrapped_by_lr_sched = True  # as torch's schedules mark what they put there
    return calls


def same(nets, optimizers):
    states = [o.state_dict()["state"] for o in optimizers]
    return all(torch.equal(a, b) for a, b in zip(*(n.parameters() for n in nets), strict=True)) and all(
        torch.equal(states[0][p][name], states[1][p][name]) for p in states[0] for name in states[0][p]
    )


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        (ADAM, {}),
        (ADAM, {"second": {"lr": 0.1, "betas": (0.5, 0.9)}}),
        (ADAM, {"weight_decay": 0.1, "eps": 1e-3}),
        (ADAMW, {"weight_decay": 0.1, "second": {"weight_decay": 0.0}}),
    ],
)
def test_the_kernel_takes_all_steps_but_the_first_and_to_the_same_bits(kind, options):
    nets, optimizers = pair(kind, **options)
    own, quick = optimizers[0], QuickStep(optimizers[1])
    calls = counted(optimizers[1])
    for number in range(6):
        if number == 3:  # as a schedule does
            for optimizer in optimizers:
                optimizer.param_groups[0]["lr"] *= 0.5
        take(nets[0], own, number)
        take(nets[1], quick, number)
    assert same(nets, optimizers)
    assert len(calls) == 1
    assert {float(state["step"]) for state in own.state.values()} == {6.0}


def test_a_step_without_some_gradients_is_torchs_own_and_moves_nothing_else():
    nets, optimizers = pair(weight_decay=0.1)
    own, quick = optimizers[0], QuickStep(optimizers[1])
    calls = counted(optimizers[1])
    for number in range(5):
        part = number in (2, 3)
        for net, step in zip(nets, (own, quick), strict=True):
            net[0].requires_grad_(not part)
            take(net, step, number)
    assert same(nets, optimizers)
    assert len(calls) == 3
    assert float(optimizers[1].state[nets[1][0].weight]["step"]) == 3
    assert float(optimizers[1].state[nets[1][2].weight]["step"]) == 5


def test_a_loaded_state_is_gone_on_from():
    nets, optimizers = pair()
    own, quick = optimizers[0], QuickStep(optimizers[1])
    for number in range(3):
        take(nets[0], own, number)
        take(nets[1], quick, number)
        if number == 1:
            kept = copy.deepcopy(optimizers[1].state_dict())
    for number in range(4):
        for optimizer in optimizers:
            if number == 0:
                optimizer.load_state_dict(copy.deepcopy(kept))
        take(nets[0], own, number)
        take(nets[1], quick, number)
    assert same(nets, optimizers)
    assert {float(state["step"]) for state in optimizers[1].state.values()} == {6.0}


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        (ADAM, {"amsgrad": True}),
        (ADAM, {"maximize": True}),
        (ADAM, {"fused": False}),
        (ADAM, {"lr": torch.tensor(0.01)}),
        (torch.optim.SGD, {"momentum": 0.9}),
        (torch.optim.Adagrad, {"fused": False}),
        (type("Own", (ADAM,), {"step": lambda self, closure=None: ADAM.step(self)}), {}),
    ],
    ids=str,
)
def test_what_is_not_a_plain_fused_adam_steps_by_itself(kind, options):
    nets, optimizers = pair(kind, **options)
    own, quick = optimizers[0], QuickStep(optimizers[1])
    calls = counted(optimizers[1])
    for number in range(3):
        take(nets[0], own, number)
        take(nets[1], quick, number)
    assert same(nets, optimizers)
    assert len(calls) == 3


def test_whoever_listens_to_steps_is_called_at_each():
    nets, optimizers = pair()
    heard = []
    optimizers[1].register_step_post_hook(lambda *_: heard.append(1))
    quick = QuickStep(optimizers[1])
    for number in range(3):
        take(nets[1], quick, number)
    assert heard == [1, 1, 1]

    everywhere = register_optimizer_step_pre_hook(lambda *_: heard.append(3))
    try:
        quick = QuickStep(optimizers[0])
        for number in range(3):
            take(nets[0], quick, number)
    finally:
        everywhere.remove()
    assert heard[3:] == [3, 3, 3]

    nets, (own, _) = pair()
    own.step = lambda *_: (heard.append(2), type(own).step(own))
    quick = QuickStep(own)
    for number in range(3):
        take(nets[0], quick, number)
    assert heard[6:] == [2, 2, 2]


@pytest.mark.parametrize("change", ["a group joins", "someone listens"])
def test_what_changes_between_two_steps_is_seen_at_the_next(change):
    nets, optimizers = pair()
    steps, heard = [optimizers[0], QuickStep(optimizers[1])], []
    for number in range(4):
        for net, optimizer, step in zip(nets, optimizers, steps, strict=True):
            if number == 2 and change == "a group joins":
                net.add_module("last", nn.Linear(3, 3))
                with torch.no_grad():
                    net.last.weight.fill_(0.1)
                    net.last.bias.zero_()
                optimizer.add_param_group({"params": net.last.parameters()})
            elif number == 2:
                optimizer.register_step_pre_hook(lambda *_: heard.append(1))
            take(net, step, number)
    assert same(nets, optimizers)
    assert len(heard) == (4 if change == "someone listens" else 0)


def test_a_state_of_one_count_is_saved_and_loaded_as_it_is(tmp_path):
    nets, optimizers = pair()
    quick = QuickStep(optimizers[1])
    for number in range(3):
        take(nets[1], quick, number)
    torch.save(optimizers[1].state_dict(), tmp_path / "state.pt")
    loaded = torch.load(tmp_path / "state.pt", weights_only=True)
    for number in range(3):
        take(nets[0], optimizers[0], number)
    expected = optimizers[0].state_dict()["state"]
    assert all(torch.equal(loaded["state"][p][name], expected[p][name]) for p in expected for name in expected[p])
