import numpy as np
import pytest
import torch

from vae.data.images import Images, Rows, Splits, accepted
from vae.data.module import ImageDataModule, binarized_once
from vae.errors import VAEError

N = 6
BYTES = torch.arange(N * 64, dtype=torch.uint8).view(N, 1, 8, 8)
FLOATS = torch.linspace(0.1, 0.9, N * 64).view(N, 1, 8, 8)


def data(x=BYTES, y=None, **options):
    return ImageDataModule(lambda: Splits(*[Images(x, y)] * 3), **{"batch_size": N, **options})


# --- images -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "held"),
    [
        (BYTES.numpy(), BYTES),
        (BYTES.numpy()[::-1], BYTES.flip(0)),
        (BYTES[:, 0], BYTES),
        (BYTES[:, 0].tolist(), None),
        (BYTES > 9, (BYTES > 9).to(torch.uint8) * 255),
        (FLOATS, FLOATS),
        (FLOATS.double(), FLOATS),
        (FLOATS.numpy().astype(">f8"), FLOATS),
        (FLOATS.half(), FLOATS.half().float()),
    ],
)
def test_what_holds_the_same_values_is_taken_for_images(given, held):
    if held is None:  # a list of ints is int64, which says nothing of its scale
        with pytest.raises(VAEError, match="not int64"):
            Images(given)
        return
    x = Images(given).x
    assert x.dtype == held.dtype
    assert torch.equal(x, held)


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        (torch.zeros(9, 28, 28, 1, dtype=torch.uint8), r"look like channels last, .* x.permute\(0, 3, 1, 2\)"),
        (torch.zeros(9, 64, 48, 3), "channels last"),
        (torch.zeros(9, 28, 28, 5), "channels last"),
        (BYTES.long(), r"not int64: convert them, by x.to\(torch.uint8\)"),
        (BYTES.numpy().astype(np.uint16), "not uint16"),
        (torch.zeros(9, 64), r"are \(N, C, H, W\).* not \(9, 64\)"),
        (torch.zeros(9, 0, 8, 8), "are"),
        (np.array([object()]), "not ndarray of object"),
        ("a.png", "not str"),
    ],
)
def test_what_is_not_images_is_refused_in_a_sentence_that_says_what_to_do(given, sentence):
    with pytest.raises(VAEError, match=sentence):
        Images(given)


def test_shapes_that_are_channels_first_are_left_alone():
    for shape in ((1, 28, 28), (3, 4, 4), (5, 8, 8), (28, 28, 28), (3, 64, 2), (64, 8, 8)):
        assert Images(torch.zeros(2, *shape)).shape == shape


@pytest.mark.parametrize(
    ("x", "sentence"),
    [
        (FLOATS * 255, r"Image 0 of the train split has values from 25.5 to .* by x / 255"),
        (FLOATS * 2 - 1, "Image 0 of the train split has values from -0.8"),
        (FLOATS.index_fill(0, torch.tensor(4), torch.nan), "Image 4 of the train split has pixels that are not finite"),
        (FLOATS.index_fill(0, torch.tensor(5), 1 + 1e-6), "Image 5 .* to 1.000001, "),
        (FLOATS[:0], "The train split has no images"),
    ],
)
def test_values_that_cannot_be_trained_on_are_refused_at_start(x, sentence):
    with pytest.raises(VAEError, match=sentence):
        data(x).setup()


def test_splits_must_be_of_one_kind_and_none_empty():
    train = Images(BYTES, torch.zeros(N))
    for other, sentence in (
        (Images(BYTES[:0]), "The val split has no images"),
        (Images(FLOATS), "images of the val split are .'float32', 1, 8, 8., those of the train split .'uint8'"),
        (Images(BYTES.view(N, 1, 4, 16)), "images of the val split"),
        (Images(BYTES, torch.zeros(N, 2)), r"labels of the val split are \(2,\), those of the train split \(\)"),
    ):
        with pytest.raises(VAEError, match=sentence):
            accepted(Splits(train, other, train))


def test_bytes_of_zero_and_one_are_warned_of_and_those_of_0_and_255_are_not(recwarn):
    data(BYTES.clamp(max=1) * 255).setup()
    data(BYTES * 0).setup()
    assert not recwarn.list
    with pytest.warns(UserWarning, match="nearly black: did you mean 0 and 255"):
        data(BYTES.clamp(max=1)).setup()


def test_rows_of_a_set_are_those_images_and_nothing_is_copied():
    whole = Images(BYTES, torch.arange(N))
    rows = Rows(whole, torch.tensor([4, 0, 5]), torch.tensor([7, 8, 9])).subset(torch.tensor([2, 0]))
    x, y = rows.gather(torch.tensor([1, 1, 0]))
    assert torch.equal(x, BYTES[[4, 4, 5]])
    assert y.tolist() == [7, 7, 9]
    assert rows.whole is whole and len(rows) == 2
    once, of_rows = (binarized_once(split, 3) for split in (whole, Rows(whole, torch.arange(N), whole.y)))
    assert torch.equal(once.x, of_rows.x) and torch.equal(once.y, of_rows.y)


# --- floats -----------------------------------------------------------------------------------------------------------


def test_floats_are_trained_on_as_they_are():
    batch = next(iter(data(FLOATS).val_dataloader()))
    assert torch.equal(data(FLOATS).prepare(batch, True).x, FLOATS)
    torch.testing.assert_close(data(FLOATS).train_mean(), FLOATS.mean(0))


def test_floats_are_binarised_as_bytes_are():
    threshold = data(torch.tensor([0.4999, 0.5]).expand(N, 1, 1, 2), binarize="threshold")
    assert threshold.scale(threshold.splits_ready().train.x)[0].flatten().tolist() == [0.0, 1.0]
    grey = torch.full((N, 1, 40, 40), 0.3)
    for binarize in ("static", "dynamic"):
        module = data(grey, binarize=binarize)
        x = module.prepare(next(iter(module.train_dataloader())), True).x
        assert set(x.unique().tolist()) == {0.0, 1.0}
        assert abs(x.mean() - 0.3) < 4 * (0.3 * 0.7 / x.numel()) ** 0.5
        assert set(module.examples("val", N).x.unique().tolist()) == {0.0, 1.0}
    bytes_, floats = (binarized_once(Images(x), 3).x for x in (BYTES, BYTES / 255))
    assert torch.equal(bytes_, floats)


def test_floats_of_zero_and_one_are_held_as_bytes():
    module = data((FLOATS > 0.5).float())
    assert module.splits_ready().train.x.dtype == torch.uint8
    assert torch.equal(module.examples("train", N).x, (FLOATS > 0.5).float())


# --- labels -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "given",
    [
        torch.tensor([0, 1, 2, 0, 1, 2], dtype=torch.int32),
        torch.tensor([0, 1, 2, 0, 1, 2], dtype=torch.uint8),
        torch.tensor([0.0, 1.0, 2.0, 0.0, 1.0, 2.0]),
        torch.tensor([[0], [1], [2], [0], [1], [2]]),
        np.array([0, 1, 2, 0, 1, 2]),
        [0, 1, 2, 0, 1, 2],
        torch.eye(3).repeat(2, 1),
        torch.eye(3, dtype=torch.uint8).repeat(2, 1).numpy(),
    ],
)
def test_labels_of_any_kind_that_says_the_class_are_classes(given):
    module = data(y=given)
    assert module.num_classes == 3
    for split in module.splits_ready():
        assert split.y.dtype == torch.int64
        assert split.y.tolist() == [0, 1, 2, 0, 1, 2]


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        (torch.zeros(5), "There are 5 labels for 6 images"),
        (torch.tensor(3), "There are 1 labels for 6 images"),
        (torch.full((N,), 0.5), "whole numbers .* some of these float32 are not"),
        (torch.full((N,), torch.nan), "whole numbers"),
        (np.array(["cat"] * N), "Labels must be numbers in a tensor or an array, not ndarray of <U3"),
        (torch.full((N,), -2), "The train split has a label -2"),
        (torch.tensor([1, 2, 3] * 2), "without a gap, and 3 of them end at 3: np.unique"),
        (torch.full((N,), -1), "No image has a label"),
        (torch.tensor([0, 1, -1] * 2), "The val split has images without a label"),
        (torch.tensor([[0, 1], [1, 1], [0, 0]] * 2), "has 2 labels per image, which are no classes"),
        (None, "needs class labels, and the train split of the data has none"),
    ],
)
def test_labels_that_are_no_classes_are_refused_where_classes_are_needed(given, sentence):
    with pytest.raises(VAEError, match=sentence):
        _ = data(y=given).num_classes


def test_generative_factors_are_not_taken_for_one_hot_labels():
    factors = torch.tensor([[0, 1, 0], [1, 0, 0], [2, 0, 1]]).repeat(2, 1)
    assert torch.equal(data(y=factors).splits_ready().train.y, factors)


def test_a_limit_does_not_change_the_number_of_classes():
    assert data(y=torch.tensor([0, 1, 2, 0, 1, 2]), limit=2, batch_size=2).num_classes == 3


def test_fewer_labels_than_asked_for_are_told():
    y = torch.tensor([0, 0, 0, 0, 1, 1])
    with pytest.warns(UserWarning, match=r"3 images of each class, and there are only 2 of class 1: 5 are kept"):
        kept = data(y=y, labeled=6).splits_ready().train.y
    assert (kept[:4] >= 0).sum() == 3
    assert kept[4:].tolist() == [1, 1]
    with pytest.raises(VAEError, match="multiple of the number of classes, 2"):
        data(y=y, labeled=3).setup()
