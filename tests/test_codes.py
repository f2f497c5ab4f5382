"""Codes and their price: bijections, k-means, enumerated priors, and vector-quantize-pytorch at the same weights."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from conftest import composed
from omegaconf import OmegaConf

from vae.code_priors import AutoregressiveCodes, CategoricalCodes, UniformCodes
from vae.codes import CodePosterior, histogram, nearest, sums_by_code, usage
from vae.data.images import Batch
from vae.engine.build import build
from vae.errors import VAEError
from vae.evaluation.likelihood import ELBOTotals, log_likelihood
from vae.quantizers import FiniteScalarQuantizer, VectorQuantizer
from vae.seeding import generator


def normal(*shape, name="normal"):
    return torch.randn(*shape, generator=generator(name, *shape))


def vq(latent_dim=6, codes=5, dim=2, **options):
    """A quantizer whose codebook is known."""
    found = VectorQuantizer(latent_dim, codes, dim, **options)
    found.codebook.copy_(normal(codes, dim, name="codebook"))
    return found


def small(*overrides):
    options = ["data.limit=64", "data.batch_size=32", "threads=1", "callbacks=minimal", "network.hidden=[16]"]
    return composed(*options, "trainer.accelerator=cpu", "model.latent_dim=6", *overrides)


FSQ, VQ = ["posterior=fsq", "posterior.levels=[4,3]"], ["posterior=vq", "posterior.dim=2", "posterior.codes=5"]


# --- codes ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("levels", [[3], [4], [8, 5, 5], [7, 4, 3, 6]])
def test_indices_and_vectors_of_fsq_are_a_bijection_onto_a_grid(levels):
    family = FiniteScalarQuantizer(len(levels), levels)
    indices = torch.arange(math.prod(levels))[:, None]
    z = family.vectors(indices)
    assert torch.equal(family.indices(z), indices)
    grid = [(torch.arange(level) - level // 2) / (level // 2) for level in levels]
    assert {tuple(row) for row in z.tolist()} == set(itertools.product(*(axis.tolist() for axis in grid)))


def test_fsq_keeps_zero_where_it_is_and_reaches_every_level():
    family = FiniteScalarQuantizer(2, [4, 5])
    torch.testing.assert_close(family.bounded(torch.zeros(2)), torch.zeros(2), rtol=0, atol=1e-6)
    assert family.bounded(torch.tensor([[-9.0, -9.0], [9.0, 9.0]])).round().tolist() == [[-2, -2], [1, 2]]
    line = torch.linspace(-3, 3, 601)[:, None].expand(-1, 2)
    assert [len(family(line).z[:, i].unique()) for i in (0, 1)] == [4, 5]


def test_indices_and_vectors_of_vq_are_a_bijection():
    family = vq(latent_dim=2)
    indices = torch.arange(5)[:, None]
    assert torch.equal(family.vectors(indices), family.codebook)
    assert torch.equal(family.indices(family.vectors(indices)), indices)


@pytest.mark.parametrize("family", [FiniteScalarQuantizer(6, [5, 4]), vq()])
def test_what_an_image_is_encoded_as_is_what_its_codes_stand_for(family):
    posterior = family.eval()(3 * normal(50, 6))
    assert posterior.indices.shape == (50, 3)
    assert torch.equal(posterior.z, family.vectors(posterior.indices))
    assert torch.equal(family.indices(posterior.z), posterior.indices)
    assert torch.equal(posterior.rsample(generator("any"), (2,)), posterior.z.expand(2, 50, 6))
    assert torch.equal(posterior.log_prob(posterior.z), torch.zeros(50))
    assert torch.equal(posterior.log_prob(posterior.z + 1), torch.full((50,), -torch.inf))


def test_of_a_map_each_place_has_a_code_of_its_channels():
    family = vq(latent_dim=2 * 3 * 4)
    maps = normal(7, 2, 3, 4)
    found = family(maps.flatten(1)).z.unflatten(1, (2, 3, 4))
    for row, column in itertools.product(range(3), range(4)):
        code = nearest(maps[:, :, row, column], family.codebook)
        assert torch.equal(found[:, :, row, column], family.codebook[code])


def test_the_nearest_code_is_that_of_brute_force_in_blocks_of_any_size(monkeypatch):
    vectors, codebook = normal(40, 3), normal(9, 3, name="codes")
    distances = torch.tensor([[float(np.sum((a - b) ** 2)) for b in codebook.numpy()] for a in vectors.numpy()])
    assert torch.equal(nearest(vectors, codebook), distances.argmin(1))
    whole = sums_by_code(vectors, distances.argmin(1), 9)
    monkeypatch.setattr("vae.codes.MAX_ELEMENTS", 18)
    assert torch.equal(nearest(vectors, codebook), distances.argmin(1))
    torch.testing.assert_close(sums_by_code(vectors, distances.argmin(1), 9), whole)


def test_the_gradient_passes_straight_through_rounding_and_codebook():
    family, target = vq(commitment=0.5), normal(4, 6, name="target")
    x = normal(4, 6).requires_grad_()
    posterior = family(x)
    assert torch.equal(torch.autograd.grad((posterior.z * target).sum(), x)[0], target)
    pull = torch.autograd.grad(posterior.mean_commitment, x)[0]  # 0.5 |e - c|^2 an image
    torch.testing.assert_close(pull, (x - posterior.z).detach() / 4)
    family = FiniteScalarQuantizer(6, [5, 4])
    through = torch.autograd.grad((family(x).z * target).sum(), x)[0]
    smooth = family.joined(family.bounded(family.split(x)) / torch.tensor([2, 2]))
    torch.testing.assert_close(through, torch.autograd.grad((smooth * target).sum(), x)[0])


def test_perplexity_and_use_of_known_histograms():
    def of(*indices, number=4):
        return {name: value.item() for name, value in usage(histogram(torch.tensor(indices), number)).items()}

    assert of(0, 1, 2, 3, 3, 2, 1, 0) == pytest.approx({"perplexity": 4, "codes_used": 4})
    assert of(2, 2, 2) == pytest.approx({"perplexity": 1, "codes_used": 1})
    assert of(0, 0, 1, 3) == pytest.approx({"perplexity": 2**1.5, "codes_used": 3})  # 1.5 bits


# --- the codebook -----------------------------------------------------------------------------------------------------


def test_a_step_of_decay_0_is_one_of_k_means():
    family = vq(codes=6, decay=0.0, restart=0.0, smoothing=0.0)
    family.codebook[5] = 100.0  # nothing is near it
    before, x = family.codebook.clone(), normal(30, 6)
    posterior = family.train()(x)
    assert torch.equal(family.codebook, before)
    posterior.rsample(generator("step"))
    vectors, codes = family.split(x).flatten(0, 1), posterior.indices.flatten()
    for k in range(6):
        mean = vectors[codes == k].mean(0) if (codes == k).any() else before[k]
        torch.testing.assert_close(family.codebook[k], mean)
    assert torch.equal(posterior.z, family.joined(before[posterior.indices]))  # z has the codes of before the step
    after = family.codebook.clone()
    posterior.rsample(generator("again"))
    family.eval()(x).rsample(generator("evaluation"))
    assert torch.equal(family.codebook, after)


def test_codes_that_are_hardly_used_start_anew_at_vectors_of_the_batch():
    family, x = vq(codes=40, decay=0.5, restart=0.5), normal(30, 6)
    posterior = family.train()(x)
    vectors, counts = family.split(x).flatten(0, 1), histogram(posterior.indices, 40)
    posterior.rsample(generator("restart", 1))
    dead = 0.5 * counts < 0.5 * 90 / 40
    assert 0 < dead.sum() < 40
    fresh = (family.codebook[:, None] == vectors).all(-1).any(1)
    assert torch.equal(fresh, dead)
    assert torch.equal(family.sizes[dead], torch.full((int(dead.sum()),), 90 / 40))
    torch.testing.assert_close(family.sums[dead], family.codebook[dead] * 90 / 40)
    assert len(family.codebook[dead].unique(dim=0)) > 0.5 * dead.sum()
    once = family.codebook.clone()
    posterior.rsample(generator("another draw of the same step"))
    assert torch.equal(family.codebook, once)
    twins = [vq(codes=40, decay=0.5, restart=0.5) for _ in range(3)]
    for twin, seed in zip(twins, (1, 1, 2), strict=True):
        twin.train()(x).rsample(generator("restart", seed))
    assert torch.equal(twins[0].codebook, family.codebook)
    assert torch.equal(twins[0].codebook, twins[1].codebook)
    assert not torch.equal(twins[0].codebook, twins[2].codebook)


# --- peers ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("levels", [[8, 5, 5, 5], [4, 3], [7]])
def test_fsq_is_that_of_vector_quantize_pytorch(levels):
    peers = pytest.importorskip("vector_quantize_pytorch")
    theirs, ours = peers.FSQ(levels), FiniteScalarQuantizer(len(levels), levels)
    x = (2 * normal(200, len(levels))).requires_grad_()
    (z, indices), found = theirs(x[:, None]), ours(x)
    torch.testing.assert_close(found.z, z[:, 0])
    assert torch.equal(found.indices, indices.long())
    target = normal(200, len(levels), name="target")
    gradients = [torch.autograd.grad((one * target).sum(), x)[0] for one in (found.z, z[:, 0])]
    torch.testing.assert_close(*gradients)


def test_steps_of_the_codebook_are_those_of_vector_quantize_pytorch():
    peers = pytest.importorskip("vector_quantize_pytorch")
    theirs = peers.VectorQuantize(2, 5, decay=0.8, eps=1e-3, commitment_weight=0.25, threshold_ema_dead_code=0)
    ours = vq(decay=0.8, restart=0.0, smoothing=1e-3)
    ours.sizes.copy_(torch.arange(1.0, 6.0))
    ours.sums.copy_(ours.codebook * ours.sizes[:, None])
    book = theirs._codebook
    for their, our in ((book.embed, ours.codebook), (book.embed_avg, ours.sums), (book.cluster_size, ours.sizes)):
        their.data.copy_(our[None])
    theirs.train()
    ours.train()
    for step in range(4):
        x = normal(20, 6, name=f"batch {step}")
        z, indices, loss = theirs(ours.split(x))
        found = ours(x)
        drawn = found.rsample(generator("none"))
        torch.testing.assert_close(drawn, ours.joined(z))
        assert torch.equal(found.indices, indices)
        torch.testing.assert_close(found.mean_commitment / 6, loss.squeeze())  # theirs is a mean over numbers
        for their, our in ((book.embed, ours.codebook), (book.embed_avg, ours.sums), (book.cluster_size, ours.sizes)):
            torch.testing.assert_close(our, their[0])


# --- priors -----------------------------------------------------------------------------------------------------------


def prior_of(kind, places=3, number=4, trained=True, **options):
    family = VectorQuantizer(2 * places, number, 2)
    prior = kind(2 * places, **options)
    torch.manual_seed(0)
    prior.read(family)
    with torch.no_grad():
        for parameter in prior.parameters() if trained else ():
            parameter.copy_(torch.randn(parameter.shape, generator=generator("weights", *parameter.shape)))
    return prior


PRIORS = [
    (UniformCodes, {}),
    (CategoricalCodes, {}),
    (CategoricalCodes, {"shared": True}),
    (AutoregressiveCodes, {"hidden": (8,), "embedding": 3, "features": 5}),
]


@pytest.mark.parametrize(("kind", "options"), PRIORS)
def test_the_probabilities_of_all_sequences_of_a_tiny_world_sum_to_one_and_samples_have_them(kind, options):
    prior = prior_of(kind, **options)
    world = torch.tensor(list(itertools.product(range(4), repeat=3)))
    log_p = prior.log_prob_of_codes(world).sum(-1).detach()
    assert log_p.exp().sum().item() == pytest.approx(1, abs=1e-5)
    z = prior._quantizer[0].vectors(world)
    torch.testing.assert_close(prior.log_prob(z), log_p)
    torch.testing.assert_close(prior.log_prob(z.expand(2, 64, 6)), log_p.expand(2, 64))
    drawn = prior.sample_codes(20_000, generator("draws"))
    shares = histogram((drawn * torch.tensor([16, 4, 1])).sum(-1), 64) / 20_000
    assert (shares - log_p.exp()).abs().max() < 0.012  # three standard errors of a half
    assert torch.equal(prior.sample(20_000, generator("draws")), prior._quantizer[0].vectors(drawn))


@pytest.mark.parametrize(("kind", "options"), PRIORS)
def test_the_rate_is_that_of_the_uniform_prior_before_any_training(kind, options):
    prior = prior_of(kind, trained=kind is UniformCodes, **options)
    posterior = prior._quantizer[0](normal(9, 6))
    assert prior.kl(posterior).shape == (9, 3)
    torch.testing.assert_close(prior.kl(posterior).sum(-1), torch.full((9,), 3 * math.log(4)))


def test_the_autoregressive_prior_gives_a_place_what_the_places_before_it_say():
    prior = prior_of(AutoregressiveCodes, hidden=(8,), embedding=3, features=5)
    codes = torch.tensor([[0, 1, 2], [0, 1, 3], [0, 2, 2], [1, 1, 2]])
    logits = prior.logits(codes)
    torch.testing.assert_close(logits[0], logits[1])
    torch.testing.assert_close(logits[0, :2], logits[2, :2])
    assert not torch.allclose(logits[0, 2], logits[2, 2])
    torch.testing.assert_close(logits[0, 0], logits[3, 0])
    assert not torch.allclose(logits[0, 1], logits[3, 1])


# --- models -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", [FSQ, VQ])
@pytest.mark.parametrize("prior", ["codes_uniform", "codes_categorical", "codes_autoregressive"])
def test_rate_distortion_and_elbo_are_those_of_a_point_mass(family, prior):
    data, module = build(small(*family, f"prior={prior}"))
    vae = module.eval().vae
    with torch.no_grad():
        for parameter in vae.prior.parameters():
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator("prior", *parameter.shape)))
    x = data.examples("val", 20).x
    out = vae(x, generator("noise"), None, (3,))
    codes = vae.encode(x).indices
    torch.testing.assert_close(out.rate, -vae.prior.log_prob_of_codes(codes).sum(-1))
    assert out.rate.requires_grad == (prior != "codes_uniform")  # only the prior learns from it
    encoder = list(vae.encoder.parameters())
    if out.rate.requires_grad:
        assert all(g is None for g in torch.autograd.grad(out.rate.sum(), encoder, allow_unused=True))
    torch.testing.assert_close(out.distortion[0], -vae.likelihood.log_prob(vae.decode(vae.posterior.vectors(codes)), x))
    elbo = -(out.distortion[0] + out.rate)
    torch.testing.assert_close(vae.log_weights(x, generator("noise"), 2), elbo.expand(2, 20))
    torch.testing.assert_close(log_likelihood(vae, Batch(x, None, 0, None), 4), elbo.detach())
    terms = module.objective(vae, Batch(x, None, 0, None), generator("noise"), 0)
    assert terms["rate"].item() == pytest.approx(out.mean_rate.item(), rel=1e-5)
    own = terms["commitment"].item() if family is VQ else 0.0
    assert terms["loss"].item() == pytest.approx(terms["distortion"].item() + terms["rate"].item() + own, rel=1e-5)
    counts = histogram(codes, vae.posterior.number)
    assert {name: terms[name].item() for name in usage(counts)} == pytest.approx(
        {name: value.item() for name, value in usage(counts).items()}
    )


def test_use_over_a_split_is_of_all_its_images_and_not_a_mean_over_batches():
    data, module = build(small(*VQ))
    totals, codes = ELBOTotals(), []
    for part in data.examples("val", 64).x.split(16):
        codes.append(totals.update(module.vae.eval(), Batch(part, None, 0, None)).posterior.indices)
    found = totals.compute()
    whole = usage(histogram(torch.cat(codes), 5))
    assert [found["perplexity"], found["codes_used"]] == pytest.approx([value.item() for value in whole.values()])
    assert totals.kl_per_dimension().shape == (3,)


def test_a_posterior_of_codes_chooses_a_prior_over_codes_and_another_one_is_taken():
    assert small(*FSQ).prior._target_.endswith("CategoricalCodes")
    assert small(*VQ, "prior=codes_uniform").prior._target_.endswith("UniformCodes")
    assert small().prior._target_.endswith("StandardNormal")


@pytest.mark.parametrize(
    ("overrides", "told"),
    [
        ([*FSQ, "prior=standard_normal"], "StandardNormal is no prior: use prior=codes_uniform"),
        (["prior=codes_uniform"], "UniformCodes is a prior over codes: it needs posterior=fsq or posterior=vq"),
        ([*FSQ, "posterior.levels=[8,5,5,5]"], r"latent_dim=6 cannot .* codes of 4 .* posterior\.levels=.* such as 8"),
        ([*VQ, "posterior.dim=4"], r"posterior\.dim=4 says: it takes a multiple of 4, such as 8"),
        ([*FSQ, "posterior.levels=[2,3]"], r"posterior\.levels=2 must be a whole number from 3"),
        ([*FSQ, "posterior.levels=[]"], r"posterior\.levels needs at least one"),
        ([*FSQ, "posterior.levels=[2000,2000]"], r"\.levels=\[2000, 2000\] makes 4,000,000 codes, and 1,048,576 are"),
        ([*VQ, "posterior.codes=1"], r"posterior\.codes=1 must be"),
        ([*VQ, "posterior.decay=1.0"], r"posterior\.decay=1\.0 must be at least 0 and below 1"),
        ([*VQ, "posterior.commitment=-1"], r"posterior\.commitment=-1 must be at least 0\."),
        ([*VQ, "prior=codes_autoregressive", "prior.hidden=[]"], r"prior\.hidden needs at least one width"),
        ([*VQ, "prior=codes_autoregressive", "prior.hidden=[0]"], r"prior\.hidden=0 must be a whole number from 1"),
        ([*VQ, "objective=iwae"], "IWAE makes no sense with codes.*objective=beta_vae"),
        ([*VQ, "objective/schedule=geco", "objective.schedule.target=5"], "GECO steers .*objective/schedule=constant"),
    ],
)
def test_what_makes_no_sense_with_codes_is_refused_at_the_start(overrides, told):
    with pytest.raises(VAEError, match=told):
        build(small(*overrides))


@pytest.mark.parametrize("network", ["linear", "autoencoder_kl"])
def test_networks_that_give_means_and_variances_give_codes_one_number_a_latent(network):
    narrow = ["network.block_out_channels=[8,8]", "model.latent_dim=32"] * (network == "autoencoder_kl")
    _, module = build(
        OmegaConf.merge(composed(f"network={network}", *VQ, "data.limit=64", "model.latent_dim=6", *narrow))
    )
    x = torch.rand(5, 1, 8, 8)
    assert module.vae.encoder(x).shape == (5, module.vae.latent_dim)
    assert isinstance(module.vae.encode(x), CodePosterior)
    assert module.vae.sample(2, generator("samples")).shape == (2, 1, 8, 8)
