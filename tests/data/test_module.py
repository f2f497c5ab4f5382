import pytest
import torch

from vae.data.images import Images, Splits
from vae.data.loader import BatchLoader, EpochSampler
from vae.data.module import ImageDataModule
from vae.errors import VAEError


def grey(n=40, value=100):
    return Images(torch.full((n, 1, 4, 4), value, dtype=torch.uint8), torch.arange(n))


def module(**options):
    return ImageDataModule(lambda: Splits(grey(), grey(20), grey(20)), **{"batch_size": 8, **options})


def epoch(loader, number):
    loader.sampler.set_epoch(number)
    return list(loader)


def test_an_epoch_visits_every_image_once_in_an_order_that_follows_from_seed_and_epoch():
    loaders = [module(seed=seed).train_dataloader() for seed in (0, 0, 1)]
    orders = [torch.cat([batch.y for batch in epoch(loader, 3)]) for loader in loaders]
    assert sorted(orders[0].tolist()) == list(range(40))
    assert torch.equal(orders[0], orders[1])
    assert not torch.equal(orders[0], orders[2])
    assert not torch.equal(orders[0], torch.cat([batch.y for batch in epoch(loaders[0], 4)]))


def test_a_loader_resumes_in_the_middle_of_an_epoch_with_the_same_batches_and_seeds():
    whole = epoch(module().train_dataloader(), 2)
    stopped = module().train_dataloader()
    stopped.sampler.set_epoch(2)
    batches = iter(stopped)
    next(batches), next(batches)
    resumed = module().train_dataloader()
    resumed.load_state_dict(stopped.state_dict())
    rest = epoch(resumed, 2)
    assert [batch.seed for batch in rest] == [batch.seed for batch in whole[2:]]
    assert all(torch.equal(a.y, b.y) for a, b in zip(rest, whole[2:], strict=True))
    assert len(epoch(resumed, 3)) == 5  # and the next epoch is whole again


def test_an_epoch_has_each_image_once_the_last_batch_smaller():
    batches = [index.tolist() for index in EpochSampler(41, 8, 0, True)]
    assert [len(batch) for batch in batches] == [8, 8, 8, 8, 8, 1]
    assert sorted(image for batch in batches for image in batch) == list(range(41))


def test_dynamic_binarisation_draws_afresh_with_the_pixel_as_probability():
    data = module(binarize="dynamic", batch_size=40)
    loader = data.train_dataloader()
    first, second = (data.prepare(epoch(loader, number)[0], training=True).x for number in (0, 1))
    assert set(first.unique().tolist()) == {0.0, 1.0}
    assert not torch.equal(first, second)
    standard_error = (100 / 255 * (1 - 100 / 255) / 640) ** 0.5
    assert abs(first.mean() - 100 / 255) < 4 * standard_error


def test_black_and_white_pixels_survive_every_binarisation():
    x = torch.zeros(8, 1, 4, 4, dtype=torch.uint8)
    x[:, :, 2:] = 255
    for binarize in ("none", "threshold", "static", "dynamic"):
        data = ImageDataModule(lambda: Splits(*[Images(x)] * 3), batch_size=8, binarize=binarize)
        assert torch.equal(data.prepare(next(iter(data.train_dataloader())), True).x, x.float() / 255)


def test_static_binarisation_and_evaluation_see_one_draw_whatever_the_seed():
    for options in ({"binarize": "static"}, {"binarize": "dynamic"}):
        draws = [torch.cat([b.x for b in module(seed=seed, **options).test_dataloader()]) for seed in (0, 1)]
        assert torch.equal(*draws)
        assert set(draws[0].unique().tolist()) == {0, 255}
    a, b = (module(seed=s, binarize="static").splits_ready().train.x for s in (0, 1))
    assert torch.equal(a, b)


def test_training_images_are_measured_on_the_draw_that_static_binarisation_would_train_on():
    drawn, static = module(binarize="dynamic"), module(binarize="static")
    expected = static.scale(static.splits_ready().train.x)
    drawn.test_split = "train"
    measured = torch.cat([drawn.prepare(batch, training=False).x for batch in drawn.test_dataloader()])
    assert torch.equal(measured, expected)
    assert torch.equal(drawn.examples("train", 7).x, expected[:7])
    assert set(drawn.splits_ready().train.x.unique().tolist()) == {100}  # what training draws from is still grey


def test_labels_that_training_does_not_see_are_there_to_measure_with():
    def source():
        return Splits(*(Images(grey(n).x, torch.arange(n) % 5) for n in (40, 20, 20)))

    for binarize in ("none", "dynamic"):
        data = ImageDataModule(source, batch_size=8, binarize=binarize, labeled=10)
        assert (data.splits_ready().train.y >= 0).sum() == 10
        assert data.examples("train", 40).y.tolist() == [i % 5 for i in range(40)]
        assert set(torch.cat([batch.y for batch in data.train_dataloader()]).tolist()) == {-1, 0, 1, 2, 3, 4}


def test_threshold_is_at_one_half():
    data = module(binarize="threshold")
    assert data.scale(torch.tensor([127, 128], dtype=torch.uint8)).tolist() == [0.0, 1.0]


def test_mean_image_is_exact():
    assert torch.equal(module(binarize="dynamic").train_mean(), torch.full((1, 4, 4), 100 / 255))


def test_streamed_images_arrive_as_gathered_ones_do():
    images = grey()
    sampler = EpochSampler(40, 8, 0, True)
    gathered = list(BatchLoader(images, sampler, "train"))
    images.streaming = True
    streamed = list(BatchLoader(images, sampler, "train", num_workers=1))
    for a, b in zip(gathered, streamed, strict=True):
        assert torch.equal(a.x, b.x)
        assert torch.equal(a.y, b.y)
        assert a.seed == b.seed


def test_a_batch_larger_than_the_training_split_is_all_of_it_and_a_sentence_says_so():
    data = module(batch_size=41)
    with pytest.warns(
        UserWarning, match="data.batch_size=41 is larger than the training split, which has 40 images: each"
    ):
        batches = epoch(data.train_dataloader(), 0)
    assert [sorted(batch.y.tolist()) for batch in batches] == [list(range(40))]
    assert data.batch_size == 40


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"batch_size": 0}, "data.batch_size=0 must be a whole number of at least 1"),
        ({"eval_batch_size": 64.5}, "data.eval_batch_size=64.5 must be a whole number"),
        ({"limit": -1}, "data.limit=-1 must be a whole number of at least 1, or null"),
        ({"labeled": True}, "data.labeled=true must be a whole number"),
        ({"binarize": "maybe"}, "choose one of none, threshold, static, dynamic"),
    ],
)
def test_bad_options_are_refused_in_a_sentence(options, sentence):
    with pytest.raises(VAEError, match=sentence):
        module(**options).setup()


def test_grey_images_stay_grey_in_training_where_nothing_binarizes_them():
    data = module(binarize="none")
    x = data.prepare(epoch(data.train_dataloader(), 0)[0], training=True).x
    assert torch.equal(x.unique(), torch.tensor([100 / 255]))
