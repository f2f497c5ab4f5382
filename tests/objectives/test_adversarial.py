import math

import pytest
import torch
from linear_gaussian import LinearGaussian
from torch import nn

from vae import networks
from vae.data.images import Batch
from vae.engine.build import build
from vae.engine.run import train
from vae.engine.trainer import warn_of_unreached_weight
from vae.errors import VAEError
from vae.likelihoods import Laplace, PixelSigmaGaussian
from vae.model import VAE
from vae.objectives.adversarial import (
    Adversarial,
    discriminator_loss,
    generator_loss,
    last_layer,
    lecam,
    patch_discriminator,
    r1,
)
from vae.objectives.elbo import BetaVAE
from vae.priors import StandardNormal
from vae.seeding import generator

EXACT = LinearGaussian()


class LinearJudge(nn.Module):
    """D(x) = w x, one logit per image."""

    def __init__(self, w):
        super().__init__()
        self.w = nn.Parameter(w)

    def forward(self, x):
        return (x.flatten(1) @ self.w)[:, None, None, None]


def adversarial(vae, judge=None, **options):
    torch.manual_seed(0)
    objective = Adversarial(channels=[4], **options)
    objective.setup(vae)
    if judge is not None:
        objective.discriminator = LinearJudge(judge)
    return objective.double()


def run(objective, vae, n=20, step=0):
    return objective(vae, EXACT.batch(n), generator("noise"), step)


def judge():
    return torch.randn(12, generator=generator("judge"), dtype=torch.float64)


# --- the two losses ---------------------------------------------------------------------------------------------------


def test_hinge_and_non_saturating_losses_of_known_logits():
    real, fake = torch.tensor([2.0, 0.5, -1.0]), torch.tensor([-3.0, 0.0])
    assert discriminator_loss(real, fake, "hinge").item() == pytest.approx(0.5 * (2.5 / 3 + 1 / 2))
    assert generator_loss(fake, "hinge").item() == 1.5
    real, fake = torch.tensor([math.log(3)]), torch.tensor([-math.log(4), 0.0])  # probabilities 3/4; 1/5, 1/2
    expected = -0.5 * (math.log(3 / 4) + (math.log(4 / 5) + math.log(1 / 2)) / 2)
    assert discriminator_loss(real, fake, "non_saturating").item() == pytest.approx(expected)
    assert generator_loss(fake, "non_saturating").item() == pytest.approx(-(math.log(1 / 5) + math.log(1 / 2)) / 2)
    undecided = torch.zeros(3)
    assert discriminator_loss(undecided, undecided, "hinge") == 1
    assert discriminator_loss(undecided, undecided, "non_saturating").item() == pytest.approx(math.log(2))


@pytest.mark.parametrize("gan", ["hinge", "non_saturating"])
def test_neither_loss_reaches_the_parameters_of_the_other(gan):
    vae, batch = EXACT.vae(shift=0.3), EXACT.batch(20)
    objective = adversarial(vae, gan=gan, adaptive=False, weight=7.0, beta=2.0)
    loss, own = run(objective, vae)["loss"], list(objective.parameters())
    out = vae(batch.x, generator("noise"))
    image = vae.likelihood.mean(out.params)
    passed = generator_loss(objective.discriminator(image), gan)
    vaes = out.distortion.mean() + 2 * out.rate.mean() + 7 * passed
    owns = discriminator_loss(objective.discriminator(batch.x), objective.discriminator(image.detach()), gan)
    assert loss.item() == pytest.approx(vaes.item(), rel=1e-12)  # the value is the VAE's alone
    for parameters, expected in ((list(vae.parameters()), vaes), (own, owns)):
        found = torch.autograd.grad(loss, parameters, retain_graph=True)
        torch.testing.assert_close(found, torch.autograd.grad(expected, parameters, retain_graph=True))


def test_terms_are_logged_each_by_itself():
    w = judge()
    vae = EXACT.vae(shift=0.3)
    objective = adversarial(vae, w, adaptive=False, weight=2.0, penalty="r1", penalty_weight=3.0)
    terms = run(objective, vae)
    x = EXACT.batch(20).x
    image = vae.likelihood.mean(vae(x, generator("noise")).params)
    of_real, of_fake = (images.flatten(1) @ w for images in (x, image))
    expected = {
        "generator_loss": -of_fake.mean(),
        "adversarial_weight": 2.0,
        "logits_real": of_real.mean(),
        "logits_fake": of_fake.mean(),
        "discriminator_loss": 0.5 * ((1 - of_real).clamp(min=0).mean() + (1 + of_fake).clamp(min=0).mean()),
        "penalty": 1.5 * w.square().sum(),
        "loss": terms["distortion"] + terms["rate"] - 2 * of_fake.mean(),
    }
    for name, value in expected.items():
        assert terms[name].item() == pytest.approx(torch.as_tensor(value).item(), rel=1e-9), name


# --- the weight -------------------------------------------------------------------------------------------------------


def test_the_adaptive_weight_is_the_ratio_of_two_gradients_known_in_closed_form():
    """At W of the decoder W z + m: -mean (x - Wz - m) z' / s^2 of the distortion, -mean w z' of a linear judge's logits."""
    vae, batch, w = EXACT.vae(shift=0.3), EXACT.batch(20), judge()
    out = vae(batch.x, generator("noise"))
    error = (batch.x.flatten(1) - out.params.flatten(1)).detach()
    of_distortion = (error.T @ out.z.detach() / 20 / EXACT.variance).norm()
    of_judge = (w[:, None] * out.z.detach().mean(0)).norm()
    terms = run(adversarial(vae, w, weight=0.75), vae)
    expected = 0.75 * of_distortion / (of_judge + 1e-4)
    assert terms["adversarial_weight"].item() == pytest.approx(expected.item(), rel=1e-7)
    loss = terms["distortion"] + terms["rate"] + terms["adversarial_weight"] * terms["generator_loss"]
    assert terms["loss"].item() == pytest.approx(loss.item(), rel=1e-12)
    # no gradient passes through the weight itself
    found = torch.autograd.grad(terms["loss"], vae.encoder.weight)[0]
    again = vae(batch.x, generator("noise"))
    fixed = again.distortion.mean() + again.rate.mean() - expected * (again.params.flatten(1) @ w).mean()
    torch.testing.assert_close(found, torch.autograd.grad(fixed, vae.encoder.weight)[0])


def test_the_adaptive_weight_stays_finite_beside_a_discriminator_that_says_nothing():
    vae = EXACT.vae(shift=0.3)
    terms = run(adversarial(vae, 0 * judge(), weight=0.5), vae)
    assert terms["adversarial_weight"].item() == 0.5e4


def test_the_adaptive_weight_does_not_depend_on_the_unit_of_the_discriminator():
    """Logits ten times as large have a weight a tenth as large, but for the constant 1e-4."""
    vae = EXACT.vae(shift=0.3)
    one, ten = (run(adversarial(vae, scale * judge()), vae) for scale in (1, 10))
    products = [terms["adversarial_weight"] * terms["generator_loss"] for terms in (one, ten)]
    torch.testing.assert_close(*products, rtol=1e-3, atol=0)


@pytest.mark.parametrize(
    ("network", "options", "name"),
    [
        (networks.mlp, {}, "body.2.weight"),
        (networks.mlp, {"hidden": (), "decoder_hidden": (8, 8)}, "body.4.weight"),
        (networks.linear, {}, "body.weight"),
        (networks.conv, {"channels": 8}, "body.5.weight"),
        (networks.resnet, {"channels": 8}, "body.10.weight"),
        (networks.made, {"hidden": (8,), "decoder_hidden": (8,)}, "body.last.weight"),
        (networks.autoencoder_kl, {"block_out_channels": (8, 8, 8)}, "conv_out.weight"),
    ],
)
def test_the_last_layer_is_found_in_every_network(network, options, name):
    encoder, decoder = network(image_shape=(1, 8, 8), latent_dim=16, params_per_pixel=2, **options)
    vae = VAE(encoder, decoder, StandardNormal(16), PixelSigmaGaussian())
    assert last_layer(vae) == name
    assert vae.training


class Scaled(networks.Decoder):
    """A decoder without matrix: z is the image."""

    image_shape = (1, 3, 4)

    def __init__(self):
        super().__init__()
        self.scale, self.output_bias = (
            nn.Parameter(torch.ones(12).double()),
            nn.Parameter(torch.zeros(1, 1, 3, 4).double()),
        )

    def forward(self, z):
        return (z * self.scale).unflatten(-1, self.output_bias.shape) + self.output_bias


def test_without_a_last_layer_the_adaptive_weight_is_refused_and_a_fixed_one_works():
    vae = LinearGaussian(latent_dim=12).vae()
    vae.decoder = Scaled()
    with pytest.raises(
        VAEError, match=r"Scaled has no matrix or kernel that is trained: use objective.adaptive=false\."
    ):
        adversarial(vae)
    assert run(adversarial(vae, adaptive=False), vae)["adversarial_weight"] == 0.5


@pytest.mark.parametrize("adaptive", [True, False])
def test_before_its_start_both_losses_are_multiplied_by_zero(adaptive):
    vae = EXACT.vae(shift=0.3)
    objective = adversarial(vae, adaptive=adaptive, start_step=5, penalty="r1")
    before, plain = run(objective, vae, step=4), run(BetaVAE(), vae)
    assert before["adversarial_weight"] == before["discriminator_loss"] == before["penalty"] == 0
    assert before["generator_loss"] != 0
    torch.testing.assert_close(before["loss"], plain["loss"], rtol=0, atol=0)
    assert all(not gradient.any() for gradient in torch.autograd.grad(before["loss"], list(objective.parameters())))
    after = run(objective, vae, step=5)
    assert after["adversarial_weight"] > 0 and after["discriminator_loss"] > 0 and after["penalty"] > 0


def test_outside_training_the_weight_is_that_of_the_last_step():
    vae = EXACT.vae(shift=0.3)
    objective = adversarial(vae, penalty="lecam", start_step=5)
    weight, state = run(objective, vae, step=5)["adversarial_weight"], objective.state_dict()
    other = adversarial(vae, penalty="lecam", start_step=5)
    other.load_state_dict(state)
    averages = objective.lecam_averages.clone()
    with torch.no_grad():
        terms = run(other.eval(), vae, n=7, step=0)  # a command that measures a finished run knows of no steps
    assert terms["discriminator_loss"] > 0
    assert terms["adversarial_weight"] == weight
    assert torch.equal(other.lecam_averages, averages) and "penalty" not in terms
    expected = terms["distortion"] + terms["rate"] + weight * terms["generator_loss"]
    torch.testing.assert_close(terms["loss"], expected)


@pytest.mark.parametrize(
    "options", [["objective.penalty=lecam"], ["objective.adaptive=false", "objective.gan=non_saturating"]]
)
def test_at_weight_zero_the_vae_is_trained_to_the_bits_of_beta_vae(tiny, tmp_path, options):
    weights = []
    for name, more in (("beta_vae", []), ("adversarial", ["objective.weight=0", "objective.channels=[4]", *options])):
        config = tiny(f"objective={name}", "objective.beta=2", "trainer.max_epochs=2", "logger=none", *more)
        train(config, tmp_path / name, [], progress_bar=False)
        state = torch.load(tmp_path / name / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]
        weights.append({key: value for key, value in state.items() if key.startswith("vae.")})
    assert weights[0].keys() == weights[1].keys()
    assert all(torch.equal(weights[0][key], weights[1][key]) for key in weights[0])


def test_a_laplace_of_scale_one_half_is_the_published_reconstruction_loss_and_sums_are_means_times_their_number():
    """Rombach et al. 2022: the sum of |u - v| over sub-pixels in [-1, 1]; with its mean instead, all weights change alike."""
    x, mean = torch.rand(2, 5, 3, 4, 4, generator=generator("x"), dtype=torch.float64)
    difference = ((2 * x - 1) - (2 * mean - 1)).abs()
    distortion = -Laplace(0.5).log_prob(mean[:, None], x)
    torch.testing.assert_close(distortion, difference.sum((1, 2, 3)))
    torch.testing.assert_close(distortion.mean(), 3 * 4 * 4 * difference.mean())


def test_a_start_that_a_run_does_not_reach_is_a_warning(caplog):
    warn_of_unreached_weight(Adversarial(start_step=9), 10)
    assert not caplog.text
    warn_of_unreached_weight(Adversarial(start_step=10), 10)
    assert "objective.start_step=10 is never reached in 10 training steps" in caplog.text


# --- penalties --------------------------------------------------------------------------------------------------------


def test_r1_of_a_linear_discriminator_is_half_its_weight_times_the_squared_norm():
    vae, w = EXACT.vae(), judge()
    objective = adversarial(vae, w, penalty="r1", penalty_weight=6.0)
    terms = run(objective, vae)
    assert terms["penalty"].item() == pytest.approx(3 * w.square().sum().item(), rel=1e-12)
    without = adversarial(vae, w)
    of_both, of_loss = (torch.autograd.grad(run(o, vae)["loss"], o.discriminator.w)[0] for o in (objective, without))
    torch.testing.assert_close(of_both - of_loss, 6 * w)
    assert Adversarial(penalty="r1").penalty_weight == 10


def test_r1_is_of_the_mean_logit_of_an_images_patches():
    x = torch.rand(3, 1, 4, 4, generator=generator("x"), dtype=torch.float64).requires_grad_()
    patches = torch.stack([x.flatten(1).square().sum(1), 3 * x.flatten(1).sum(1)], 1)  # gradients 2 x and 3
    assert r1(patches, x).item() == pytest.approx((x + 1.5).square().sum((1, 2, 3)).mean().item())


def test_lecam_is_its_formula_and_its_averages_are_those_of_the_steps_so_far():
    real, fake = torch.tensor([2.0, -1.0]), torch.tensor([0.5, -2.0])
    assert lecam(real, fake, torch.tensor(1.0), torch.tensor(-0.5)).item() == (2.5**2) / 2 + (0.5**2 + 3**2) / 2
    vae, w, means = EXACT.vae(shift=0.3), judge(), []
    objective = adversarial(vae, w, penalty="lecam")
    for n in (5, 9, 20):
        terms = run(objective, vae, n)
        means.append(torch.stack([terms["logits_real"], terms["logits_fake"]]))
    decay = torch.tensor([0.99**2, 0.99, 1.0], dtype=torch.float64)
    averages = (decay[:, None] * torch.stack(means)).sum(0) / decay.sum()
    torch.testing.assert_close(objective.lecam_averages, averages)
    x = EXACT.batch(20).x
    of_real, of_fake = (i.flatten(1) @ w for i in (x, vae.likelihood.mean(vae(x, generator("noise")).params)))
    assert terms["penalty"].item() == pytest.approx(0.3 * lecam(of_real, of_fake, *averages).item())


# --- the discriminator ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("widths", "patch"), [(2, 16), (3, 34), (4, 70)])
def test_a_logit_sees_a_patch_of_isolas_sizes(widths, patch):
    torch.manual_seed(0)
    layers = patch_discriminator((1, 160, 160), [2] * widths)
    net = nn.Sequential(*(layer for layer in layers if not isinstance(layer, nn.GroupNorm)))
    x = torch.rand(1, 1, 160, 160, requires_grad=True)
    logits = net(x)
    logits[0, 0, logits.shape[2] // 2, logits.shape[3] // 2].backward()
    seen = x.grad[0, 0].abs() > 0
    assert (seen.any(0).sum(), seen.any(1).sum()) == (patch, patch)


@pytest.mark.parametrize(
    ("shape", "channels", "map_of_logits"),
    [
        ((1, 28, 28), [8, 8, 8], (5, 5)),
        ((3, 28, 28), [8, 8], (12, 12)),
        ((3, 64, 48), [8] * 4, (6, 4)),
        ((1, 8, 8), [8, 8], (2, 2)),
    ],
)
def test_it_judges_grey_and_colour_images_from_8x8(shape, channels, map_of_logits):
    net = patch_discriminator(shape, channels)
    x = torch.rand(3, *shape, generator=generator("images"))
    assert net(x).shape == (3, 1, *map_of_logits)
    torch.testing.assert_close(net(x)[:1], net(x[:1]))  # an image's verdict is its own


def test_it_starts_at_the_published_initial_values():
    torch.manual_seed(0)
    layers = patch_discriminator((3, 32, 32), [64, 128, 256])
    for layer in layers:
        if hasattr(layer, "weight"):
            norm = isinstance(layer, nn.GroupNorm)
            n = layer.weight.numel()
            assert abs(layer.weight.mean().item() - norm) < 4 * 0.02 / n**0.5
            assert abs(layer.weight.std().item() / 0.02 - 1) < 4 / (2 * n) ** 0.5
            assert not layer.bias.any()
    kinds = [type(layer).__name__ for layer in layers]
    first, normalised = ["Conv2d", "LeakyReLU"], ["Conv2d", "GroupNorm", "LeakyReLU"]
    assert kinds == [*first, *normalised, *normalised, "Conv2d"]
    assert layers[1].negative_slope == 0.2


def test_it_has_its_own_learning_rate_and_betas(tiny):
    _, module = build(tiny("objective=adversarial", "objective.channels=[4]", "objective.discriminator_lr=0.003"))
    vaes, own = module.configure_optimizers().param_groups
    assert (vaes["lr"], tuple(vaes["betas"])) == (0.001, (0.9, 0.999))
    assert (own["lr"], own["betas"]) == (0.003, (0.5, 0.9))
    assert {id(p) for p in own["params"]} == {id(p) for p in module.objective.discriminator.parameters()}


def test_it_learns_to_tell_images_from_blurred_ones():
    vae, batch = EXACT.vae(), EXACT.batch(64)
    objective = adversarial(vae)
    vae.decoder.weight.data.zero_()  # every reconstruction is the mean image
    optimizer = torch.optim.Adam(objective.parameters(), lr=0.02)
    losses = []
    for step in range(60):
        terms = objective(vae, Batch(batch.x, None, 0), generator("noise", step), step)
        optimizer.zero_grad()
        terms["loss"].backward()
        optimizer.step()
        losses.append(terms["discriminator_loss"].item())
    assert losses[0] > 0.9 and losses[-1] < 0.2
    assert terms["logits_real"] > terms["logits_fake"]


# --- what is refused --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("overrides", "sentence"),
    [
        (
            ["objective.channels=[8,8,8]"],
            r"objective\.channels=\[8, 8, 8\] has 3 widths, .* at least 12x12 pixels, not 8x8",
        ),
        (["objective.channels=[]"], r"objective\.channels needs at least one width"),
        (["data.binarize=dynamic"], r"data\.binarize=dynamic draws binary pixels.*takes data\.binarize=none"),
        (
            ["+trainer.accumulate_grad_batches=2"],
            r"^trainer\.accumulate_grad_batches=2: Adversarial .*raise data\.batch_size",
        ),
        (["objective.penalty_weight=2"], r"objective\.penalty_weight=2.* weighs nothing with objective\.penalty=none"),
        (["objective.gan=wasserstein"], r"objective\.gan=wasserstein is unknown: choose one of hinge, non_saturating"),
        (["objective.penalty=r2"], r"objective\.penalty=r2 is unknown: choose one of none, r1, lecam"),
        (["objective.weight=-1"], r"weight=-1.* must be finite and zero or more"),
        (["objective.start_step=-1"], r"objective\.start_step=-1 must be a whole number"),
        (["objective.discriminator_betas=[0.5,1]"], r"objective\.discriminator_betas=\[0\.5, 1\] must be two numbers"),
    ],
)
def test_what_makes_no_sense_is_refused_at_the_start_in_one_sentence(tiny, overrides, sentence):
    with pytest.raises(VAEError, match=sentence) as told:
        build(tiny("objective=adversarial", *overrides))
    assert str(told.value).endswith(".") and "\n" not in str(told.value)


def test_other_objectives_may_add_batches_up(tiny):
    build(tiny("objective=factor_vae", "objective.hidden=[8]", "+trainer.accumulate_grad_batches=2"))
