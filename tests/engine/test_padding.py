"""Latents of several sizes in one stack: each run is what it is alone, and what it has not got stays zero."""

from __future__ import annotations

import copy

import pytest
import torch
from stacks import OBJECTIVES, assert_equal, configs_of, made, packed
from torch import nn

from vae.engine import traced
from vae.engine.draws import Unpackable
from vae.engine.padding import Stacking, is_paddable, places
from vae.engine.stack import Stack
from vae.engine.structure import signature
from vae.objectives.elbo import BetaVAE
from vae.seeding import generator

pytestmark = pytest.mark.usefixtures("quick_classifier")
SIZES = (2, 5, 3)
UNPADDABLE = ("free_bits", "dip_vae_i", "info_vae", "mmd_vae", "wae_mmd", "ada_gvae,data=sprites,++data.source.size=16")
PADDABLE = [name for name in OBJECTIVES if name not in UNPADDABLE]


@pytest.fixture
def float64():
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def of_sizes(tiny, objective, *common):
    """Runs of an objective that differ in numbers, and in the size of the latent: the largest is neither first nor last."""
    small = ("data.limit=40", "data.batch_size=20", *common)
    first, second = configs_of(tiny, objective, *small)
    configs = [first, second, copy.deepcopy(first)]
    for config, latent_dim in zip(configs, SIZES, strict=True):
        config.model.latent_dim = latent_dim
    configs[2].seed = 11
    return configs


def test_where_a_smaller_tensor_is_in_a_larger_one():
    assert places((4, 2), (4, 5), 2, 5).tolist() == [[0, 1], [5, 6], [10, 11], [15, 16]]  # a latent that is read
    assert places((4,), (10,), 2, 5).tolist() == [0, 1, 5, 6]  # a mean and a log-variance
    assert places((4, 2), (10, 2), 2, 5).tolist() == [[0, 1], [2, 3], [10, 11], [12, 13]]
    assert places((5,), (8,), 2, 5).tolist() == [0, 1, 5, 6, 7]  # a latent, and then three labels
    assert places((3, 7), (3, 7), 2, 5).tolist() == torch.arange(21).view(3, 7).tolist()
    assert places((2, 4), (5, 10), 2, 5).flatten().tolist() == [0, 1, 5, 6, 10, 11, 15, 16]
    for own, full in (((3,), (5,)), ((5,), (11,)), ((1,), (4,)), ((6,), (12,)), ((5,), (8, 1))):
        assert places(own, full, 2, 5) is None, (own, full)


def test_tensors_of_several_sizes_are_one_with_zeros_and_each_runs_own():
    noise = torch.Generator().manual_seed(0)
    own = [torch.randn(3, latent_dim, generator=noise) for latent_dim in (2, 4)]
    before = [value.clone() for value in own]
    stacking = Stacking((2, 4))
    stack = stacking.together("w", own)
    assert stack[0].tolist() == [[*row, 0.0, 0.0] for row in before[0].tolist()]
    assert torch.equal(stack[1], before[1])
    stack += torch.arange(24.0).view(2, 3, 4)
    assert torch.equal(own[0], before[0])  # until it is handed back
    stacking.hand_back()
    assert torch.equal(own[0], before[0] + torch.tensor([[0.0, 1], [4, 5], [8, 9]]))
    assert torch.equal(own[1], stack[1])
    assert all(value.is_contiguous() for value in own)
    own[0].fill_(7.0)  # as a callback may
    stacking.take_over()
    assert stack[0, :, :2].eq(7).all() and torch.equal(stack[1], own[1])
    assert [tuple(part.shape) for part in stacking.apart("w", stack)] == [(3, 2), (3, 4)]
    with pytest.raises(Unpackable, match="b has another shape"):
        stacking.together("b", [torch.zeros(2, 2), torch.zeros(3)])


@pytest.mark.parametrize("objective", [n for n in PADDABLE if n in ("beta_vae", "cvae", "iwae,objective.samples=3")])
def test_a_run_with_a_padded_latent_begins_as_the_run_alone(tiny, float64, monkeypatch, objective):
    monkeypatch.setattr(traced, "TRACED_AFTER", 2)
    assert_equal(of_sizes(tiny, objective), 5, 1e-12, padded_to=5)


@pytest.mark.slow
@pytest.mark.parametrize("objective", PADDABLE)
def test_a_run_with_a_padded_latent_is_the_run_alone(tiny, float64, monkeypatch, objective):
    monkeypatch.setattr(traced, "TRACED_AFTER", 20)
    assert_equal(of_sizes(tiny, objective), 100, 1e-10, padded_to=5)


@pytest.mark.slow
@pytest.mark.parametrize(
    "parts",
    [
        ["network=linear"],
        ["network=gated_mlp", "network.hidden=[16]"],
        ["network=burda"],
        ["network=conv"],
        ["network.hidden=[5]"],  # as wide as a latent
        ["likelihood=gaussian_learned"],
        ["likelihood=gaussian_optimal"],
        ["data.binarize=dynamic"],
        ["optimizer=sgd"],
        ["optimizer=sgd", "optimizer.momentum=0.9", "optimizer.weight_decay=0.1"],
        ["optimizer=adagrad"],
        ["optimizer=adamw"],
        ["optimizer.weight_decay=0.1"],
        ["+optimizer.amsgrad=true"],
    ],
    ids=",".join,
)
def test_so_it_is_with_every_part_and_every_optimiser(tiny, float64, monkeypatch, parts):
    monkeypatch.setattr(traced, "TRACED_AFTER", 8)
    assert_equal(of_sizes(tiny, "beta_vae", *parts), 30, 1e-10, padded_to=5)


@pytest.mark.parametrize("clip", [("norm", 5.0), ("value", 0.05)])
@pytest.mark.slow
def test_its_gradient_is_clipped_by_itself(tiny, float64, clip):
    assert_equal(of_sizes(tiny, "beta_vae"), 10, 1e-12, padded_to=5, clip=clip)


def test_what_a_run_has_not_got_stays_zero(tiny):
    pairs = [made(config) for config in of_sizes(tiny, "beta_vae", "optimizer.weight_decay=0.1")]
    members, loaders = zip(*pairs, strict=True)
    stack = Stack(members)
    blocks = [[next(iter(loader)) for loader in loaders]] * 20
    stack.train(blocks, 0)
    decoder, encoder = (stack.parameters[f"vae.{name}"] for name in ("decoder.body.0.weight", "encoder.head.2.weight"))
    assert decoder.shape[1:] == (16, 5) and encoder.shape[1:] == (10, 16)
    for run, latent_dim in enumerate(SIZES):
        assert not decoder[run, :, latent_dim:].any() and decoder[run, :, :latent_dim].all()
        halves = encoder[run].view(2, 5, 16)
        assert not halves[:, latent_dim:].any() and halves[:, :latent_dim].any(-1).all()


def test_weights_that_a_callback_changes_between_steps_are_those_that_are_trained(tiny):
    pairs = [made(config) for config in of_sizes(tiny, "beta_vae", "optimizer=sgd")]
    members, loaders = zip(*pairs, strict=True)
    for member in members:
        member.optimizer.param_groups[0]["lr"] = 0.0
    stack, block = Stack(members), [[next(iter(loader)) for loader in loaders]]
    stack.train(block, 0)
    own = members[0].vae.decoder.body[0].weight
    with torch.no_grad():
        own.fill_(0.5)
    (terms,) = stack.train(block, 1)
    assert own.eq(0.5).all()
    noise = generator(block[0][0].seed, "z")
    alone = members[0].objective(members[0].vae, members[0].prepared(block[0][0], stack.device), noise, 1)
    assert float(terms["loss"][0]) == pytest.approx(alone["loss"].item(), rel=1e-5)


def test_each_run_draws_as_many_numbers_as_alone(tiny):
    pairs = [made(config) for config in of_sizes(tiny, "beta_vae")]
    stack = Stack([member for member, _ in pairs])
    batches = [next(iter(loader)) for _, loader in pairs]
    (drawn,) = stack._drawn(batches, 0)
    assert drawn.shape == (3, 20, 5)
    for run, (batch, latent_dim) in enumerate(zip(batches, SIZES, strict=True)):
        assert torch.equal(
            drawn[run, :, :latent_dim], torch.randn(20, latent_dim, generator=generator(batch.seed, "z"))
        )
        assert not drawn[run, :, latent_dim:].any()


PARTS = {
    "prior": ["prior=mixture"],
    "posterior": ["posterior=iaf"],
    "objective": ["objective=mmd_vae"],
    "groups of dimensions": ["objective=free_bits"],
    "regulariser": ["regularizer=spectrum", "network=autoencoder_kl", "network.block_out_channels=[4,4]"],
}


@pytest.mark.parametrize("options", PARTS.values(), ids=PARTS)
def test_what_depends_on_the_number_of_dimensions_is_not_padded(tiny, options):
    if "network=autoencoder_kl" in options:
        options = [*options, "network.norm_num_groups=2", "model.latent_dim=32"]
    member, _ = made(tiny(*options))
    assert not is_paddable(member.vae, member.objective)


def test_a_regulariser_may_look_at_the_latent(tiny):
    member, _ = made(tiny())
    assert is_paddable(member.vae, member.objective)
    member.objective.regularizer = nn.Identity()
    assert not is_paddable(member.vae, member.objective)


@pytest.mark.slow
@pytest.mark.parametrize("objective", UNPADDABLE)
def test_and_is_right_not_to_be(tiny, float64, objective):
    """An objective that does not say it can be padded, and yet can, is one that should say so."""
    configs = of_sizes(tiny, objective)
    members, loaders = zip(*[made(config) for config in configs], strict=True)
    assert not members[0].objective.paddable
    with pytest.raises(Unpackable):
        packed(members, loaders, 1, fixed=False)


def test_an_objective_of_ones_own_says_for_itself_whether_it_can_be_padded():
    class Silent(BetaVAE):
        pass

    class Says(Silent):
        paddable = True

    assert (BetaVAE().paddable, Silent().paddable, Says().paddable) == (True, False, True)


class Flipped(nn.Module):
    """A layer of one's own, to which the latent comes from the last dimension to the first."""

    def __init__(self, body):
        super().__init__()
        self.body = body

    def forward(self, z):
        return self.body(z.flip(-1))


def test_a_network_that_orders_its_latent_otherwise_is_found_out_and_nothing_is_changed(tiny, float64):
    pairs = [made(config) for config in of_sizes(tiny, "beta_vae")]
    members, loaders = zip(*pairs, strict=True)
    for member in members:
        member.vae.decoder.body[0] = Flipped(member.vae.decoder.body[0])
    before = [copy.deepcopy(member.vae.state_dict()) for member in members]
    stack = Stack(members)
    with pytest.raises(Unpackable, match="is not that of the run alone"):
        stack.train([[next(iter(loader)) for loader in loaders]], 0)
    for member, kept in zip(members, before, strict=True):
        assert all(torch.equal(value, kept[name]) for name, value in member.vae.state_dict().items())


def test_runs_that_differ_in_more_than_the_latent_are_not_of_one_structure(tiny):
    def of(*overrides):
        return signature(made(tiny(*overrides))[0], sizes=False)

    assert of() == of("model.latent_dim=7", "seed=3")
    other = (["network.activation=tanh"], ["network.hidden=[16,16]"], ["objective=iwae", "objective.samples=2"])
    assert len({of(), *(of(*more) for more in other)}) == 4
    with pytest.raises(Unpackable, match="another shape"):
        Stack([made(tiny(*more))[0] for more in (["model.latent_dim=5"], ["network.hidden=[12]"])])
