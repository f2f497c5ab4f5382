import pytest
import torch

from vae.data.pairs import change_factors
from vae.seeding import generator

SIZES = torch.tensor([3, 1, 6, 4])


def changed(count, n=6000):
    factors = (torch.rand(n, 4, generator=generator("factors")) * SIZES).long()
    return factors, change_factors(factors, SIZES, count, generator("changes", count))


@pytest.mark.parametrize("count", [1, 2])
def test_exactly_so_many_factors_change_and_stay_in_range(count):
    before, after = changed(count)
    assert ((before != after).sum(-1) == count).all()
    assert (after >= 0).all()
    assert (after < SIZES).all()


def test_every_factor_that_can_change_does_so_equally_often_and_one_with_a_single_value_never():
    before, after = changed(1)
    share = (before != after).double().mean(0)
    assert share[1] == 0
    assert (share[[0, 2, 3]] - 1 / 3).abs().max() < 4 * (2 / 9 / 6000) ** 0.5


def test_a_changed_factor_takes_each_other_value_equally_often():
    before, after = changed(2)
    moved = before[:, 2] != after[:, 2]
    shift = (after[moved, 2] - before[moved, 2]) % 6
    counts = shift.bincount(minlength=6).double()
    assert counts[0] == 0
    expected = counts.sum() / 5
    assert ((counts[1:] - expected).square() / expected).sum() < 18.5  # chi-squared with 4 degrees, p = 0.001


def test_a_random_number_changes_up_to_one_less_than_can():
    before, after = changed("random")
    share = (before != after).sum(-1).bincount(minlength=5).double() / len(before)
    assert share[[0, 3, 4]].sum() == 0
    assert (share[[1, 2]] - 0.5).abs().max() < 4 * (0.25 / 6000) ** 0.5
