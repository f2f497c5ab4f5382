import math
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import scipy.linalg
import torch
from torch import nn

from vae.engine.build import build
from vae.errors import VAEError
from vae.evaluation import samples
from vae.evaluation.samples import (
    compare,
    density_coverage,
    frechet_distance,
    inception_fid,
    model_samples,
    neighbour_distance,
    precision_recall,
    sample_quality,
    trained_classifier,
    training_batch,
)
from vae.seeding import generator


def normal(*shape, name="normal"):
    return torch.randn(shape, generator=generator(name, *shape), dtype=torch.float64)


def points_with(mean, covariance, n, name):
    """n points whose sample mean and covariance are exactly those given."""
    x = normal(n, len(mean), name=name)
    x = x - x.mean(0)
    x = x @ torch.linalg.inv(torch.linalg.cholesky(x.T.cov())).T
    return x @ torch.linalg.cholesky(covariance).T + mean


def test_frechet_distance_of_two_gaussians_is_the_closed_form():
    zero, eye = torch.zeros(3).double(), torch.eye(3).double()
    shift, stretch = torch.tensor([1.0, 2.0, -2.0]).double(), torch.tensor([4.0, 0.25, 9.0]).double()
    a = points_with(zero, eye, 50, "a")
    assert math.isclose(frechet_distance(a, points_with(shift, eye, 70, "b")), 9, rel_tol=1e-10)
    # commuting covariances: sum (sigma_a - sigma_b)^2
    b = points_with(shift, stretch.diag(), 70, "b")
    assert math.isclose(frechet_distance(a, b), 9 + 1 + 0.25 + 4, rel_tol=1e-10)
    mixed = [normal(3, 3, name=name) for name in "cd"]
    c, d = (m @ m.T + eye for m in mixed)
    expected = (c + d).trace().item() - 2 * np.trace(scipy.linalg.sqrtm(c.numpy() @ d.numpy()).real)
    assert math.isclose(frechet_distance(points_with(zero, c, 50, "c"), points_with(zero, d, 50, "d")), expected)


def test_a_small_frechet_distance_does_not_cancel_and_none_is_negative():
    a = normal(500, 64).relu() * torch.linspace(0, 30, 64)  # flat in its first direction
    for order in range(20):
        again = a[torch.randperm(500, generator=generator("order", order))]
        assert 0 <= frechet_distance(a, again) < 1e-20
    assert 0 <= frechet_distance(a[:20], a[:20].flip(0)) < 1e-20  # fewer points than dimensions
    assert math.isclose(frechet_distance(a, a + 1e-6), 64e-12, rel_tol=1e-6)


def test_training_images_have_no_floor_of_training_images(tiny, quick_classifier):
    data, module = build(tiny("data.limit=null"))
    floors = {
        split: "frechet_distance_floor_n40" in sample_quality(module.vae, data, 40, split, cache=quick_classifier)
        for split in ("train", "val")
    }
    assert floors == {"train": False, "val": True}


def test_frechet_distance_of_flat_features_is_finite_and_right():
    # three points in five dimensions: the covariance has no inverse
    a = normal(3, 5)
    b = 2 * (a - a.mean(0)) + a.mean(0)
    assert math.isclose(frechet_distance(a, b), (a - a.mean(0)).square().sum().item() / 2)


def test_precision_and_recall_of_hand_made_points():
    # k = 1. Real points 0, 1, 10, 12 reach [-1, 1], [0, 2], [8, 12], [10, 14]; fakes 1.5, 5, 13 reach +- 3.5, 3.5, 8.
    real = torch.tensor([[0.0], [1.0], [10.0], [12.0]])
    fake = torch.tensor([[1.5], [5.0], [13.0]])
    assert neighbour_distance(real, 1).tolist() == [1, 1, 2, 2]
    assert neighbour_distance(fake, 1).tolist() == [3.5, 3.5, 8]
    precision, recall = precision_recall(real, fake, k=1)
    assert math.isclose(precision, 2 / 3)  # 5 is in no real ball
    assert recall == 1
    # 1.5 is in one real ball, 13 in one; the balls of 1 and 12 hold them
    density, coverage = density_coverage(real, fake, k=1)
    assert math.isclose(density, 2 / 3)
    assert coverage == 0.5


def test_density_counts_every_ball_that_a_fake_is_in_and_may_exceed_one():
    real = torch.tensor([[0.0], [1.0], [2.0], [3.0]])
    fake = torch.full((5, 1), 1.5)
    density, coverage = density_coverage(real, fake, k=2)  # balls +- 2, 1, 1, 2: all four hold 1.5
    assert density == 4 / 2
    assert coverage == 1
    # Naeem et al.: real outliers make precision 1 where density stays low; fakes in one place cover little
    outlier = torch.cat([normal(200, 2, name="real"), torch.tensor([[30.0, 30.0]])])
    far = torch.tensor([[8.0, 8.0]]).double() + 0.1 * normal(50, 2, name="fake")
    assert precision_recall(outlier, far, k=3)[0] == 1
    density, coverage = density_coverage(outlier, far, k=3)
    assert density < 0.5
    assert coverage < 0.02


def test_two_sets_of_one_distribution_score_as_theory_says():
    real, fake = normal(1500, 8, name="real"), normal(1500, 8, name="fake")
    density, coverage = density_coverage(real, fake, k=5)
    assert math.isclose(density, 1, abs_tol=0.1)
    # Naeem et al. 2020: E coverage = 1 - (N - 1) .. (N - k) / ((2N - 1) .. (2N - k))
    expected = 1 - math.prod((1500 - i) / (3000 - i) for i in range(1, 6))
    assert math.isclose(coverage, expected, abs_tol=0.02)


def test_distances_in_blocks_give_the_same(monkeypatch):
    real, fake = normal(60, 3, name="real"), normal(40, 3, name="fake")
    whole = compare(real, fake)
    monkeypatch.setattr(samples, "MAX_ELEMENTS", 300)
    assert compare(real, fake) == whole


def test_too_few_points_are_refused():
    with pytest.raises(VAEError, match="more than 3 points"):
        precision_recall(normal(3, 2), normal(9, 2))
    with pytest.raises(VAEError, match="two points"):
        frechet_distance(normal(1, 2), normal(9, 2))


def test_the_classifier_knows_digits_is_the_same_from_its_seed_and_is_kept(tiny, tmp_path):
    data, _ = build(tiny("data.limit=null"))
    train = training_batch(data, 20_000, seed=0)
    classifier = trained_classifier(train, 0, tmp_path, steps=150)
    assert classifier.accuracy(data, "test", 1000) > 0.85
    (kept,) = tmp_path.iterdir()
    written = kept.stat().st_mtime_ns
    for again in (trained_classifier(train, 0, steps=150), trained_classifier(train, 0, tmp_path, steps=150)):
        assert all(torch.equal(a, b) for a, b in zip(classifier.parameters(), again.parameters(), strict=True))
    assert kept.stat().st_mtime_ns == written
    trained_classifier(train, seed=1, cache=tmp_path, steps=1)
    assert len(list(tmp_path.iterdir())) == 2


class Replay(nn.Module):
    """A stand-in for a model: its samples are given images."""

    def __init__(self, images):
        super().__init__()
        self.images, self.device_of = images, nn.Parameter(torch.zeros(()))
        self.prior = self
        self.at = 0

    def sample(self, n, generator):
        return n if isinstance(n, torch.Tensor) else torch.zeros(n, 2)

    def mean_image(self, z, y, generator):
        self.at += len(z)
        return self.images[self.at - len(z) : self.at]


@pytest.mark.slow
def test_real_images_pass_for_samples_and_noise_does_not(tiny, tmp_path):
    data, module = build(tiny("data.limit=null"))
    held_out, n = data.examples("val", 150).x, 150
    good = sample_quality(Replay(held_out), data, n, cache=tmp_path)
    noise = torch.rand(held_out.shape, generator=generator("noise"))
    bad = sample_quality(Replay(noise), data, n, cache=tmp_path)
    assert good["frechet_distance_n150"] < 2 * good["frechet_distance_floor_n150"]
    assert bad["frechet_distance_n150"] > 10 * good["frechet_distance_n150"]
    assert good["precision_k3_n150"] > 0.8
    assert good["recall_k3_n150"] > 0.8
    assert good["coverage_k5_n150"] > 0.8 > 0.4 > bad["coverage_k5_n150"]
    vae = module.vae
    assert sample_quality(vae, data, 50, cache=tmp_path) == sample_quality(vae, data, 50, cache=tmp_path)


def test_samples_are_pixels_drawn_or_their_means(tiny):
    _, module = build(tiny())
    drawn = model_samples(module.vae, 20, generator("x"), draw_pixels=True, at_a_time=7)
    means = model_samples(module.vae, 20, generator("x"), draw_pixels=False)
    assert set(drawn.unique().tolist()) == {0.0, 1.0}
    torch.testing.assert_close(means, module.vae.sample(20, generator("x")))


def test_labels_are_asked_for_where_there_are_none(tiny):
    data, module = build(tiny())
    data.splits = data.splits._replace(train=type(data.splits.train)(data.splits.train.x))
    with pytest.raises(
        VAEError, match=r"no labels to train one by: .*measures=\[decomposition,ais,gaps\]; test/elbo and test/nll_iwK"
    ):
        sample_quality(module.vae, data, 20)


def test_the_inception_fid_says_what_it_lacks(monkeypatch):
    monkeypatch.setitem(sys.modules, "torchmetrics.image.fid", None)
    with pytest.raises(VAEError, match="torch-fidelity"):
        inception_fid(torch.zeros(4, 1, 8, 8), torch.zeros(4, 1, 8, 8))


def test_the_inception_fid_is_given_images_cut_to_the_interval(monkeypatch):
    seen = []

    class Metric:
        def __init__(self, **_):
            pass

        def to(self, device):
            return self

        def update(self, images, real):
            seen.append(images)

        def compute(self):
            return torch.tensor(3.0)

    monkeypatch.setitem(sys.modules, "torchmetrics.image.fid", SimpleNamespace(FrechetInceptionDistance=Metric))
    x = torch.linspace(-0.5, 1.5, 4).reshape(4, 1, 1, 1).expand(4, 1, 8, 8)
    assert inception_fid(x.clamp(0, 1), x) == {"fid_inception_n4": 3.0}
    assert torch.equal(seen[0], seen[1]) and seen[1].shape == (4, 3, 8, 8)


def test_samples_are_compared_as_images_in_the_interval(tiny, quick_classifier):
    data, _ = build(tiny("data.limit=null"))
    x = data.examples("val", 40).x
    assert sample_quality(Replay(3 * x - 1), data, 40, cache=quick_classifier) == sample_quality(
        Replay((3 * x - 1).clamp(0, 1)), data, 40, cache=quick_classifier
    )
