"""How good samples are: Frechet distance, precision and recall, density and coverage, in the space of image features.

The features are those of a small classifier trained here on the data set at hand, so that nothing is downloaded and
digits are compared as digits. Such numbers compare models on one data set; they are no FID. The Inception FID itself is
`inception_fid`, where torchmetrics has its weights.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vae.data.images import Batch
from vae.data.module import ImageDataModule
from vae.data.storage import cache_folder
from vae.errors import VAEError
from vae.evaluation.work import no_tick
from vae.files import write_atomically
from vae.model import VAE
from vae.objectives.feature import Features, untrained
from vae.precision import wide
from vae.seeding import derive, generator

FEATURES = 64
CLASSIFIER_STEPS = 600
PRECISION_NEIGHBOURS = 3  # Kynkaanniemi et al. 2019
COVERAGE_NEIGHBOURS = 5  # Naeem et al. 2020
MAX_ELEMENTS = 2**24  # of a block of pairwise distances held at a time


@torch.no_grad()
def sample_quality(
    vae: VAE,
    data: ImageDataModule,
    n: int = 5000,
    split: str = "test",
    seed: int = 0,
    cache: Path | None = None,
    y: Tensor | None = None,
    tick: Callable[[], None] = no_tick,
) -> dict[str, float]:
    """`compare` of the first n images of a split with as many samples of the model, on the classifier's features.

    Where the images are binary, samples are draws of the pixels, and mean images otherwise; both cut to [0, 1], which
    those of a Gaussian or a Laplace may leave. Beside the distance stands its floor on this data, `frechet_distance_floor`:
    that of as many training images, unless the split is of these. cache: a folder for the trained classifier. y: labels of
    the samples, (n,), for a conditional model. Deterministic from `seed`.
    """
    device = next(vae.parameters()).device
    real = data.examples(split, n).x
    n = len(real)
    train = training_batch(data, 20_000, seed)
    classifier = trained_classifier(train, seed, cache, tick=tick).to(device)
    binary = bool(((real == 0) | (real == 1)).all())
    fake = model_samples(vae, n, generator(seed, "samples", device=device), draw_pixels=binary, y=y).clamp(0, 1)
    features_of = in_parts(classifier.features, device)
    of_real = features_of(real)
    floor = {}
    if split != "train" and len(train.x) >= n:
        floor[f"frechet_distance_floor_n{n}"] = frechet_distance(of_real, features_of(train.x[:n]))
    return compare(of_real, features_of(fake)) | floor | {"classifier_accuracy": classifier.accuracy(data, split, n)}


def compare(real: Tensor, fake: Tensor) -> dict[str, float]:
    """All measures of two sets of features (N, F), (M, F); keys name N and the neighbourhoods' k."""
    n, p, c = len(real), PRECISION_NEIGHBOURS, COVERAGE_NEIGHBOURS
    precision, recall = precision_recall(real, fake, p)
    density, coverage = density_coverage(real, fake, c)
    return {
        f"frechet_distance_n{n}": frechet_distance(real, fake),
        f"precision_k{p}_n{n}": precision,
        f"recall_k{p}_n{n}": recall,
        f"density_k{c}_n{n}": density,
        f"coverage_k{c}_n{n}": coverage,
    }


@torch.no_grad()
def model_samples(
    vae: VAE, n: int, generator: torch.Generator, draw_pixels: bool, y: Tensor | None = None, at_a_time: int = 1000
) -> Tensor:
    """n images from the prior, (n, C, H, W): draws of p(x|z), or its means."""
    images = []
    for part in vae.prior.sample(n, generator).split(at_a_time):
        labels = None if y is None else y[sum(map(len, images)) :][: len(part)]
        images.append(
            vae.draw_image(part, generator, labels) if draw_pixels else vae.mean_image(part, labels, generator)
        )
    return torch.cat(images)


# --- measures of two sets of features ---------------------------------------------------------------------------------


def frechet_distance(a: Tensor, b: Tensor) -> float:
    """|m_a - m_b|^2 + tr(C_a + C_b - 2 (C_a C_b)^(1/2)) of the Gaussians fitted to two sets of features (N, F), (M, F).

    Dowson & Landau 1982; Heusel et al. 2017. Covariances with n - 1. With C = R'R from a QR decomposition of the centred
    features and R_a R_b' = U S V', the trace is |R_a' U - R_b' V|^2: a sum of squares, which rounding cannot make negative,
    and small distances do not cancel.
    Raises VAEError for fewer than two points.
    """
    if min(len(a), len(b)) < 2:
        raise VAEError("The Frechet distance needs at least two points on each side.")
    a, b = wide(a), wide(b)
    (mean_a, root_a), (mean_b, root_b) = _moments(a), _moments(b)
    rows = max(len(root_a), len(root_b))
    root_a, root_b = (F.pad(root, (0, 0, 0, rows - len(root))) for root in (root_a, root_b))
    left, _, right = torch.linalg.svd(root_a @ root_b.T)
    return ((mean_a - mean_b).square().sum() + (root_a.T @ left - root_b.T @ right.T).square().sum()).item()


def _moments(x: Tensor) -> tuple[Tensor, Tensor]:
    mean = x.mean(0)
    return mean, torch.linalg.qr((x - mean) / math.sqrt(len(x) - 1), mode="r").R


def precision_recall(real: Tensor, fake: Tensor, k: int = PRECISION_NEIGHBOURS) -> tuple[float, float]:
    """The part of the fakes within reach of the real ones, and the other way round; each in [0, 1].

    Kynkaanniemi et al. 2019, equations 1 and 2: a set reaches as far as the union of closed balls around its points,
    each up to the point's k-th nearest neighbour in its own set.
    """
    real_radius, fake_radius = neighbour_distance(real, k), neighbour_distance(fake, k)
    precision = torch.cat([(d <= real_radius).any(1) for d in _distances(fake, real)])
    recall = torch.cat([(d <= fake_radius).any(1) for d in _distances(real, fake)])
    return wide(precision).mean().item(), wide(recall).mean().item()


def density_coverage(real: Tensor, fake: Tensor, k: int = COVERAGE_NEIGHBOURS) -> tuple[float, float]:
    """density = 1/(kM) sum over fakes of the real balls each is in, which may exceed 1; coverage = the part of the real
    balls that hold a fake, in [0, 1].

    Naeem et al. 2020, section 3; balls as in `precision_recall`, around real points only.
    """
    radius = neighbour_distance(real, k)
    inside, covered = 0, torch.zeros(len(real), dtype=torch.bool, device=real.device)
    for d in _distances(fake, real):
        inside += (d <= radius).sum().item()
        covered |= (d <= radius).any(0)
    return inside / (k * len(fake)), wide(covered).mean().item()


def neighbour_distance(x: Tensor, k: int) -> Tensor:
    """From each point to its k-th nearest neighbour among the others, (N,). Raises VAEError for k or fewer points."""
    if len(x) <= k:
        raise VAEError(f"The distance to the {k}-th neighbour needs more than {k} points, not {len(x)}.")
    return torch.cat([d.kthvalue(k + 1, dim=1).values for d in _distances(x, x)])  # the nearest of all is the point


def _distances(a: Tensor, b: Tensor) -> Iterator[Tensor]:
    """Euclidean distances of a few rows of a to all of b at a time, each (rows, M), without the cancelling expansion."""
    for part in a.split(max(1, MAX_ELEMENTS // len(b))):
        yield torch.cdist(part, b, compute_mode="donot_use_mm_for_euclid_dist")


def inception_fid(real: Tensor, fake: Tensor, at_a_time: int = 100) -> dict[str, float]:
    """fid_inception_nN of images (N, C, H, W), cut to [0, 1], grey ones as RGB, by torchmetrics (Heusel et al. 2017).

    Raises VAEError where the Inception weights can't be had.
    """
    try:
        from torchmetrics.image.fid import FrechetInceptionDistance

        metric = FrechetInceptionDistance(feature=2048, normalize=True).to(real.device)
    except (ImportError, OSError) as error:
        raise VAEError(
            "The Inception FID needs the torch-fidelity package and its downloaded weights, which are not here: "
            "frechet_distance on the classifier's features needs neither."
        ) from error
    for images, is_real in ((real, True), (fake, False)):
        for part in images.clamp(0, 1).split(at_a_time):  # beyond, torchmetrics' bytes wrap round
            metric.update(part.expand(-1, 3, -1, -1) if part.shape[1] == 1 else part, real=is_real)
    return {f"fid_inception_n{len(real)}": metric.compute().item()}


# --- features ---------------------------------------------------------------------------------------------------------


class Classifier(nn.Module):
    """Two convolutions of stride 2, FEATURES linear features, and one softmax for each column of labels.

    classes: the number of classes of each column; one column for class labels, one a factor for data with factors.
    """

    def __init__(self, image_shape: tuple[int, int, int], classes: tuple[int, ...]) -> None:
        super().__init__()
        channels, height, width = image_shape
        smaller = math.ceil(height / 4) * math.ceil(width / 4)
        self.features = nn.Sequential(
            nn.Conv2d(channels, 16, 3, stride=2, padding=1),
            nn.ReLU(),
            nn.Conv2d(16, 32, 3, stride=2, padding=1),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(32 * smaller, FEATURES),
        )
        self.heads = nn.ModuleList(nn.Linear(FEATURES, count) for count in classes)

    def forward(self, x: Tensor) -> list[Tensor]:
        """(B, C, H, W) -> logits (B, classes) of each column."""
        features = F.relu(self.features(x))
        return [head(features) for head in self.heads]

    @torch.no_grad()
    def accuracy(self, data: ImageDataModule, split: str, n: int) -> float:
        """Part of the labels that it gets right on the first n images of a split, over all columns."""
        batch = data.examples(split, n)
        right = [
            wide(logits.argmax(1) == y)
            for x, labels in zip(batch.x.split(1000), _columns(batch).split(1000), strict=True)
            for logits, y in zip(
                self(x.to(self.heads[0].weight.device)), labels.to(self.heads[0].weight.device).T, strict=True
            )
        ]
        return torch.cat(right).mean().item()


class ClassifierFeatures(Features):
    """0.5 |f(a) - f(b)|^2, with f the features of the classifier that `measures=[samples]` compares images by, in nats.

    A model trained by it is judged by what it was trained on: its frechet_distance flatters. Raises VAEError, from `start`,
    for data without labels.
    """

    def __init__(self, image_shape: tuple[int, int, int]) -> None:
        super().__init__()
        self.network = untrained(Classifier(image_shape, ()).features)

    def start(self, data: ImageDataModule) -> None:
        if data.splits_ready().train.y is None:
            raise VAEError(
                "objective/features=classifier is trained on labels, and this data has none: use objective/features=lpips."
            )
        trained = trained_classifier(training_batch(data, 20_000, 0), 0, cache_folder() / "classifiers")
        self.network.load_state_dict(trained.features.state_dict())

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        return 0.5 * (self.network(a) - self.network(b)).square().sum(-1)


def training_batch(data: ImageDataModule, n: int, seed: int) -> Batch:
    """Up to n labelled training images at random, prepared as a training batch is, binarised if the data is.

    Raises VAEError if the data has no labels.
    """
    train = data.splits_ready().train
    index = torch.randperm(len(train), generator=generator(seed, "classifier images"))[:n]
    x, y = train.gather(index)
    if data.labeled is not None:
        _, y = data.measured("train").gather(index)  # what the model's training did not see, a measure may
    if y is None:
        raise VAEError(
            "measures=samples compares images by the features of a classifier, and this data has no labels to train one by: "
            "give it labels, or measure what needs none, measures=[decomposition,ais,gaps]; test/elbo and test/nll_iwK are "
            "there already."
        )
    kept = (y if y.ndim == 1 else y[:, 0]) >= 0  # -1 stands for a label that is withheld
    return data.prepare(Batch(x[kept], y[kept], derive(seed, "classifier pixels")), training=True)


@torch.enable_grad()
def trained_classifier(
    train: Batch,
    seed: int,
    cache: Path | None = None,
    steps: int = CLASSIFIER_STEPS,
    tick: Callable[[], None] = no_tick,
) -> Classifier:
    """A classifier of the batch's images, trained with Adam in `steps` minibatches of 128; the same from the same seed.

    cache: a folder in which it is kept, under a name that is a digest of the images, labels, seed and steps.
    """
    x, y = train.x, _columns(train)
    classes = tuple((y.amax(0) + 1).tolist())
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(derive(seed, "classifier"))
        model = Classifier(tuple(x.shape[1:]), classes)
    path = None
    if cache is not None:
        digest = hashlib.blake2b(digest_size=8)
        for part in (x.cpu().numpy().tobytes(), y.cpu().numpy().tobytes(), repr((model, seed, steps)).encode()):
            digest.update(part)
        path = Path(cache) / f"classifier-{digest.hexdigest()}.pt"
        if path.is_file():
            model.load_state_dict(torch.load(path, map_location="cpu", weights_only=True))
            return model.requires_grad_(False).eval()
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-3)
    noise = generator(seed, "classifier order")
    for _ in range(steps):
        index = torch.randint(len(x), (128,), generator=noise)
        loss = sum(F.cross_entropy(logits, target) for logits, target in zip(model(x[index]), y[index].T, strict=True))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        tick()
    if path is not None:
        write_atomically(path, lambda file: torch.save(model.state_dict(), file))
    return model.requires_grad_(False).eval()


def _columns(batch: Batch) -> Tensor:
    """Labels as int64 columns, (N, F)."""
    return batch.y.unsqueeze(1) if batch.y.ndim == 1 else batch.y


def in_parts(
    features: Callable[[Tensor], Tensor], device: torch.device, at_a_time: int = 1000
) -> Callable[[Tensor], Tensor]:
    """`features` of any number of images, a part of them at a time."""

    @torch.no_grad()
    def of(images: Tensor) -> Tensor:
        return torch.cat([features(part.to(device)) for part in images.split(at_a_time)])

    return of
