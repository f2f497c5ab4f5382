import math

import pytest
import torch
from linear_gaussian import LinearGaussian

from vae.engine.build import build
from vae.errors import VAEError
from vae.gaussian import DiagonalGaussian
from vae.objectives.elbo import BetaVAE
from vae.objectives.weak_pairs import AdaGVAE, share_dimensions
from vae.seeding import generator

SPRITES = ["objective=ada_gvae", "data=sprites", "++data.source.size=16"]
SMALL = "++data.source.subset={scale: 2, orientation: 3, x: 3, y: 3}"


def gaussian(mean, variance):
    return DiagonalGaussian(torch.tensor([mean]), torch.tensor([variance]).log())


def test_dimensions_below_the_middle_of_the_kls_are_averaged_and_the_others_kept():
    # with variances of 1 the KLs are half the squared distances: 0.02, 2, 1.125, 0.5; their middle is 1.01
    a, b = gaussian([0.0, 0, 1, 5], [1.0, 1, 1, 1]), gaussian([0.2, 2, 2.5, 6], [1.0, 1, 1, 1])
    of_a, of_b, shared = share_dimensions(a, b)
    assert shared.tolist() == [[True, False, False, True]]
    torch.testing.assert_close(of_a.mean, torch.tensor([[0.1, 0, 1, 5.5]]))
    torch.testing.assert_close(of_b.mean, torch.tensor([[0.1, 2, 2.5, 5.5]]))


def test_the_average_has_the_mean_of_means_and_of_variances():
    a, b = gaussian([1.0, 0.0], [0.5, 1.0]), gaussian([1.2, 9.0], [0.7, 3.0])
    of_a, of_b, shared = share_dimensions(a, b)
    assert shared.tolist() == [[True, False]]
    torch.testing.assert_close(of_a.log_var, torch.tensor([[math.log(0.6), 0.0]]))
    torch.testing.assert_close(of_b.log_var, torch.tensor([[math.log(0.6), math.log(3.0)]]))


def test_with_nothing_to_share_it_is_the_vae_on_both_images():
    exact = LinearGaussian(latent_dim=1)  # of one dimension the largest and the smallest KL are the same
    both, vae = exact.batch(12), exact.vae(shift=0.3)
    pair = both._replace(x=both.x[:6], partner=both.x[6:])
    terms = AdaGVAE(beta=3.0)(vae, pair, generator("noise"), 0)
    expected = BetaVAE(3.0)(vae, both, generator("noise"), 0)
    assert terms["shared"] == 0
    assert terms["loss"] == expected["loss"]


def test_averaging_an_image_with_itself_changes_nothing():
    exact = LinearGaussian()
    vae, batch = exact.vae(), exact.batch(6)
    twins = AdaGVAE()(vae, batch._replace(partner=batch.x), generator("noise"), 0)
    single = BetaVAE()(vae, batch, generator("noise"), 0)
    torch.testing.assert_close(twins["rate"], single["rate"])


def test_the_data_gives_each_image_a_partner_with_one_factor_changed(tiny):
    data, module = build(tiny(*SPRITES, SMALL, "objective.changed_factors=1"))
    grid = data.splits.train.grid
    everything, factors = grid.gather(torch.arange(len(grid)))
    for loader in (data.train_dataloader(), data.val_dataloader()):
        for batch in loader:
            ready = data.prepare(batch, training=True)
            assert ready.partner.shape == ready.x.shape
            for image, y in zip(batch.partner, batch.y, strict=True):
                same = (everything == image).flatten(1).all(1)
                assert ((factors[same] != y).sum(-1) == 1).any()
    assert module.objective(module.vae, ready, generator("noise"), 0)["loss"].isfinite()


@pytest.mark.parametrize(
    "overrides",
    [
        ["objective=ada_gvae"],
        [*SPRITES, SMALL, "objective.changed_factors=5"],
        [*SPRITES, SMALL, "objective.changed_factors=0"],
        [*SPRITES, SMALL, "posterior=planar"],
    ],
)
def test_what_makes_no_pairs_or_cannot_be_averaged_is_refused(tiny, overrides):
    with pytest.raises(VAEError):
        build(tiny(*overrides))
