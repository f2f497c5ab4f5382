import torch

from vae.seeding import derive, generator


def test_a_seed_depends_on_every_part_and_on_nothing_else():
    assert derive(0, "train", 3, 17) == derive(0, "train", 3, 17)
    others = [derive(1, "train", 3, 17), derive(0, "val", 3, 17), derive(0, "train", 17, 3), derive(0, "train", 317)]
    assert len({derive(0, "train", 3, 17), *others}) == 5
    assert all(0 <= seed < 2**63 for seed in others)


def test_streams_are_uncorrelated():
    a, b = (torch.randn(100_000, generator=generator(0, name)) for name in ("a", "b"))
    assert abs((a * b).mean()) < 4 / 100_000**0.5


def test_the_global_generator_is_left_alone():
    before = torch.random.get_rng_state()
    torch.randn(3, generator=generator(0, "x"))
    assert torch.equal(before, torch.random.get_rng_state())
