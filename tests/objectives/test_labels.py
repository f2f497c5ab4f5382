import math
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from linear_gaussian import LinearGaussian
from torch import nn

from vae.data.images import Batch
from vae.engine.build import build
from vae.engine.module import VAEModule
from vae.errors import VAEError
from vae.evaluation.ais import nll_ais
from vae.networks import Decoder
from vae.objectives.elbo import BetaVAE
from vae.objectives.labels import CVAE, M2
from vae.priors import Prior
from vae.seeding import generator

EXACT, CLASSES = LinearGaussian(), 3
OFFSETS = 1.5 * torch.randn(CLASSES, 12, generator=generator("class means"), dtype=torch.float64)


class LabelledEncoder(nn.Module):
    def __init__(self, encoder):
        super().__init__()
        self.encoder = encoder

    def forward(self, x, y):
        return self.encoder(x - OFFSETS[y].reshape(x.shape))


class LabelledDecoder(Decoder):
    def __init__(self, decoder):
        super().__init__()
        self.decoder = decoder

    def forward(self, z, y):
        out = self.decoder(z)
        return out + OFFSETS[y].reshape(out.shape)


class UnknownKL(Prior):
    def __init__(self, prior):
        super().__init__()
        self.latent_dim, self.log_prob, self.sample = prior.latent_dim, prior.log_prob, prior.sample


def exact_mixture():
    """p(x|y, z) shifted by its class, with the exact q(z|x, y); the rate is estimated at z, so that no draw has noise."""
    vae = EXACT.vae()
    vae.encoder, vae.decoder, vae.num_classes = LabelledEncoder(vae.encoder), LabelledDecoder(vae.decoder), CLASSES
    vae.prior = UnknownKL(vae.prior)
    return vae


def log_joint(x):
    """log p(x, y) of each image and class, (B, classes)."""
    of_classes = [EXACT.log_prob(x - offset.reshape(x.shape[1:])) for offset in OFFSETS]
    return torch.stack(of_classes, -1) - math.log(CLASSES)


class ExactClassifier(nn.Module):
    def forward(self, x):
        return log_joint(x)


def m2(labelled_fraction=0.25, **options):
    objective = M2(**options)
    data = SimpleNamespace(
        image_shape=(1, 3, 4),
        num_classes=CLASSES,
        labelled_fraction=labelled_fraction,
        add_labelled=lambda n: None,
        measured=lambda split: SimpleNamespace(y=torch.arange(CLASSES)),
    )
    objective.setup(exact_mixture(), data)
    objective.classifier = ExactClassifier()
    return objective.double()


def batch(labels):
    return Batch(EXACT.batch(len(labels)).x, torch.tensor(labels), 0)


def run(objective, labels):
    return objective(exact_mixture(), batch(labels), generator("noise"), 0)


# --- M2 ---------------------------------------------------------------------------------------------------------------


def test_without_a_label_the_bound_is_log_p_of_x_at_the_exact_posteriors():
    terms = run(m2(), [-1] * 8)
    log_p = log_joint(batch([-1] * 8).x).logsumexp(-1).mean()
    torch.testing.assert_close(terms["elbo"], 0.75 * log_p, rtol=0, atol=1e-6)  # weighed by the unlabelled share
    torch.testing.assert_close(-terms["loss"], terms["elbo"], rtol=0, atol=1e-12)


def test_with_a_label_the_bound_is_log_p_of_x_and_y():
    labels = [0, 2, 1, 1, 0]
    terms = run(m2(alpha=0.0), labels)
    log_p = log_joint(batch(labels).x)[range(5), labels].mean()
    torch.testing.assert_close(-terms["loss"], 0.25 * log_p, rtol=0, atol=1e-6)


def test_a_mixed_batch_weighs_both_kinds_by_their_share_of_the_data_not_of_the_batch():
    labels = [0, -1, 2, -1, -1, 1]
    terms = run(m2(alpha=0.7), labels)
    joint = log_joint(batch(labels).x)
    known, y = [0, 2, 5], [0, 2, 1]
    classification = F.cross_entropy(joint[known], torch.tensor(y))
    elbo = 0.75 * joint[[1, 3, 4]].logsumexp(-1).mean() + 0.25 * joint[known, y].mean()
    torch.testing.assert_close(terms["classification"], classification)
    torch.testing.assert_close(terms["elbo"], elbo, rtol=0, atol=1e-6)
    torch.testing.assert_close(terms["loss"], 0.7 * classification - elbo, rtol=0, atol=1e-6)


def test_in_validation_every_image_counts_both_with_and_without_its_label():
    labels = [0, 2, 1, 1]
    terms = run(m2().eval(), labels)
    joint = log_joint(batch(labels).x)
    elbo = 0.75 * joint.logsumexp(-1).mean() + 0.25 * joint[range(4), labels].mean()
    loss = 0.1 * F.cross_entropy(joint, torch.tensor(labels)) - elbo
    torch.testing.assert_close(terms["loss"], loss, rtol=0, atol=1e-6)
    right = (joint.argmax(-1) == torch.tensor(labels)).double().mean()
    torch.testing.assert_close(terms["accuracy"], right)


def measured(objective, labels):
    """What validation and test report of a model with the exact posteriors, by the module."""
    vae = exact_mixture()
    vae.latent_label = objective.latent_label
    module = VAEModule(vae, objective, torch.optim.Adam, nll_samples=3).eval()
    module.on_validation_epoch_start()
    module._measure(batch(labels))
    return {**module._measured(), **module.mean_nll(batch(labels))}


def test_m2_is_measured_by_p_of_x_with_the_labels_summed_out_and_by_p_of_x_given_y_under_its_own_name():
    labels = [0, 2, 1, 1, 0]
    joint, found = log_joint(batch(labels).x), measured(m2(), labels)
    log_p, given = joint.logsumexp(-1).mean().item(), joint[range(5), labels].mean().item() + math.log(CLASSES)
    assert abs(given - log_p) > 0.1
    for name, value in {
        "elbo": log_p,
        "nll_iw3": -log_p,
        "elbo_given_label": given,
        "nll_iw3_given_label": -given,
    }.items():
        assert float(found[name]) == pytest.approx(value, abs=1e-6), name
    for given in ("", "_given_label"):
        assert float(found[f"elbo{given}"]) == pytest.approx(
            -float(found[f"rate{given}"] + found[f"distortion{given}"])
        )
        bits = -float(found[f"elbo{given}"]) / 12 / math.log(2)
        assert float(found[f"bits_per_dim{given}"]) == pytest.approx(bits)


def test_of_a_cvae_every_number_is_of_p_of_x_given_y_and_has_the_plain_name():
    labels = [0, 2, 1, 1, 0]
    given = log_joint(batch(labels).x)[range(5), labels].mean().item() + math.log(CLASSES)
    found = measured(CVAE(), labels)
    assert found["elbo"] == pytest.approx(given, abs=1e-6)
    assert found["nll_iw3"].item() == pytest.approx(-given, abs=1e-6)
    assert not [name for name in found if "given" in name]


@pytest.mark.parametrize("latent", [True, False])
def test_ais_sums_the_labels_out_where_the_model_does(latent):
    labels = [0, 2, 1]
    vae = exact_mixture()
    vae.latent_label = latent
    joint = log_joint(batch(labels).x)
    given = -joint[range(3), labels].mean().item() - math.log(CLASSES)
    expected = {"nll_ais100": -joint.logsumexp(-1).mean().item(), "nll_ais100_given_label": given}
    found = nll_ais(vae, batch(labels), temperatures=100, chains=16, leapfrogs=2)
    for name, value in (expected if latent else {"nll_ais100": given}).items():
        assert found[name] == pytest.approx(value, abs=0.15)
    assert len(found) == (4 if latent else 2)


def test_a_wrong_classifier_loosens_the_bound_by_its_divergence_from_the_posterior_of_y():
    objective = m2()
    objective.classifier = nn.Sequential(ExactClassifier(), nn.Softmax(-1))  # its output, as logits, is too flat
    terms = run(objective, [-1] * 8)
    joint = log_joint(batch([-1] * 8).x)
    log_q = joint.softmax(-1).log_softmax(-1)
    gap = (log_q.exp() * (log_q - joint.log_softmax(-1))).sum(-1).mean()
    torch.testing.assert_close(terms["elbo"], 0.75 * (joint.logsumexp(-1).mean() - gap), rtol=0, atol=1e-6)


def test_labelled_images_join_every_training_batch(tiny):
    data, module = build(tiny("objective=m2", "+data.labeled=20", "objective.labeled_per_batch=8", "data.limit=200"))
    assert module.objective.labelled_fraction.item() == pytest.approx(0.1)
    loader = data.train_dataloader()
    first, second = (list(loader.sampler) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert sorted(torch.cat([i[:-8] for i in first]).tolist()) == list(range(200))
    for batch in loader:
        guests = batch.y[-8:]
        assert (guests >= 0).all()
    loader.sampler.set_epoch(1)
    assert not torch.equal(torch.cat([i[-8:] for i in loader.sampler]), torch.cat([i[-8:] for i in first]))
    assert sum(len(batch.x) for batch in data.val_dataloader()) == 200


@pytest.mark.parametrize("overrides", [["objective=m2"], ["objective=cvae", "+data.labeled=20"]])
def test_labels_that_are_missing_or_not_are_told_in_one_sentence(tiny, overrides):
    with pytest.raises(VAEError, match="label"):
        build(tiny(*overrides))


@pytest.mark.parametrize("objective", ["cvae", "m2"])
def test_an_image_without_a_label_is_refused_before_training_where_numbers_would_need_it(tiny, objective):
    labelled = ["+data.labeled=20"] if objective == "m2" else []
    data, module = build(tiny(f"objective={objective}", *labelled))
    module.objective.setup(module.vae, data)
    data.splits.val.y[3] = -1
    with pytest.raises(VAEError, match="every image of the val split needs one from 0 to 9"):
        module.objective.setup(module.vae, data)


# --- CVAE -------------------------------------------------------------------------------------------------------------


def test_cvae_is_the_elbo_of_x_given_y():
    labels = [0, 2, 1, 1, 0]
    terms = run(CVAE(), labels)
    log_p = log_joint(batch(labels).x)[range(5), labels].mean() + math.log(CLASSES)
    torch.testing.assert_close(terms["elbo"], log_p, rtol=0, atol=1e-6)
    assert terms["loss"] == run(BetaVAE(), labels)["loss"]


def test_the_optimal_sigma_survives_a_batch_in_which_every_label_is_known(tiny):
    data, module = build(
        tiny("objective=m2", "+data.labeled=20", "objective.hidden=[16]", "likelihood=gaussian_optimal")
    )
    batch = data.prepare(next(iter(data.train_dataloader())), training=True)
    batch = batch._replace(y=batch.y.clamp(min=0))
    terms = module.objective(module.vae, batch, generator("noise"), 0)
    assert all(value.isfinite() for value in terms.values())
    assert module.vae.likelihood.log_sigma.isfinite() and module.vae.likelihood.batches_seen == 1
