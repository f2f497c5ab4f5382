"""Objectives for images with labels: the label-conditional VAE, and the semi-supervised M2."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vae.errors import VAEError
from vae.kl import kl_categorical
from vae.model import VAE, Halves
from vae.networks.base import dense_layers
from vae.objectives.elbo import BetaVAE, Objective, require_not_negative
from vae.precision import full_precision

if TYPE_CHECKING:
    from vae.data.images import Batch
    from vae.data.module import ImageDataModule


class CVAE(BetaVAE):
    """distortion + beta rate of p(x|y), with q(z|x, y), p(x|z, y) and p(z|y) = p(z); Sohn et al. 2015.

    Every number is of the image given its label. Raises VAEError for data without class labels, or with some missing.
    """

    conditional = True
    paddable = True

    def setup(self, vae: VAE, data: ImageDataModule) -> None:
        if data.labelled_fraction < 1:
            raise VAEError("CVAE needs the label of every image: leave data.labeled out, or use objective=m2.")
        require_labels(vae, data, "val", "test")


@dataclass
class Parts(Halves):
    """Those of images some of which have no label: (B,), or 0-dim of a batch."""

    distortion: Tensor
    rate: Tensor


class M2(Objective):
    """p(x|y, z) p(y) p(z) with a label y that few images show; Kingma et al. 2014, equations 6 to 9.

    The ELBO of an image is one of p(x, y) where the label is known and of p(x) where it is not, y then being summed over
    under the classifier q(y|x). Both are -(distortion + rate), with rate = KL(q(z|x, y) || p(z)) + KL(q(y|x) || p(y)),
    p(y) uniform and q(y|x) certain of a known label, which costs log num_classes. The loss is

        (1 - f) mean over unlabelled + f mean over labelled (distortion + beta rate) + alpha mean over labelled -log q(y|x)

    with f = labelled_fraction of the data: the paper's J^alpha an image, its alpha N being our alpha (0.1). Outside
    training, where all labels are known, every image counts as both.

    labeled_per_batch: so many labelled images join every training batch, or all if there are fewer, since batches
    drawn at random may hold none; each part is a mean, so this changes no weight. The classifier is a dense network on
    pixels. The terms `classification` (cross-entropy, nats) and, outside training, `accuracy` are of labelled images.

    Outside training `elbo`, `rate` and `distortion` are those of p(x), the label summed out; what is measured of p(x|y), with
    the true label, is reported beside them as `elbo_given_label` and so on. In training they are weighed as the loss is.
    """

    alpha: Tensor
    labelled_fraction: Tensor

    conditional = True
    latent_label = True
    unpackable = "how many images of a batch have a label differs between runs"

    def __init__(
        self,
        alpha: float = 0.1,
        hidden: Sequence[int] = (500,),
        activation: str = "softplus",
        labeled_per_batch: int = 32,
        beta: float = 1.0,
        schedule: nn.Module | None = None,
    ) -> None:
        super().__init__(beta, schedule)
        require_not_negative("objective", alpha=alpha, labeled_per_batch=labeled_per_batch)
        self.register_buffer("alpha", torch.tensor(float(alpha)))
        self.hidden, self.activation, self.labeled_per_batch = tuple(hidden), activation, labeled_per_batch

    def setup(self, vae: VAE, data: ImageDataModule) -> None:
        sizes = (math.prod(data.image_shape), *self.hidden)
        self.num_classes = data.num_classes
        self.register_buffer("labelled_fraction", torch.tensor(float(data.labelled_fraction)))
        self.classifier = nn.Sequential(
            nn.Flatten(), *dense_layers(sizes, self.activation), nn.Linear(sizes[-1], self.num_classes)
        )
        if not 0 < self.labelled_fraction < 1:
            raise VAEError(
                "M2 learns from labelled and unlabelled images: set data.labeled to how many keep their label."
            )
        require_labels(vae, data, "val", "test")
        data.add_labelled(self.labeled_per_batch)

    def forward(self, vae: VAE, batch: Batch, generator: torch.Generator, step: int) -> dict[str, Tensor]:
        known = batch.y >= 0
        unknown = ~known if self.training else torch.ones_like(known)
        x, y = batch.x[known], batch.y[known]
        logits = full_precision(self.classifier(batch.x))
        labelled = self.labelled(vae, x, y, generator)
        unlabelled = self.unlabelled(vae, batch.x[unknown], logits[unknown], generator)

        f = self.labelled_fraction
        both = Parts(
            (1 - f) * _mean(unlabelled.distortion) + f * _mean(labelled.distortion),
            (1 - f) * _mean(unlabelled.rate) + f * _mean(labelled.rate),
        )
        classification = _mean(F.cross_entropy(logits[known], y, reduction="none"))
        weight = self.weight(step)
        loss = both.distortion + weight * both.rate + self.alpha * classification
        shown = both if self.training else Parts(_mean(unlabelled.distortion), _mean(unlabelled.rate))
        terms = self.named_terms(loss, shown, classification=classification.detach(), beta=weight)
        return terms if self.training else {**terms, "accuracy": _mean((logits[known].argmax(-1) == y).to(logits))}

    def labelled(self, vae: VAE, x: Tensor, y: Tensor, generator: torch.Generator) -> Parts:
        """Distortion and rate of images with labels, (B,)."""
        out = vae(x, generator, y)
        return Parts(out.distortion, out.rate + math.log(self.num_classes))

    def unlabelled(self, vae: VAE, x: Tensor, logits: Tensor, generator: torch.Generator) -> Parts:
        """The same of images (B, C, H, W) without, every class tried and weighed by q(y|x) = softmax(logits), (B,)."""
        classes = (self.num_classes, len(x))
        y = torch.arange(self.num_classes, device=x.device)[:, None].expand(classes)
        out = vae(x.expand(self.num_classes, *x.shape).flatten(0, 1), generator, y.flatten())
        q = logits.softmax(-1).T
        rate_of_y = kl_categorical(p_logits=logits, q_logits=torch.zeros_like(logits))
        distortion, rate = ((q * value.view(classes)).sum(0) for value in (out.distortion, out.rate))
        return Parts(distortion, rate + rate_of_y)


def require_labels(vae: VAE, data: ImageDataModule, *splits: str) -> None:
    """Raises VAEError if the model is given labels and an image of these splits, as they are measured, has none of its."""
    for split in splits if vae.num_classes else ():
        y = getattr(data.measured(split), "y", None)
        if y is None or y.ndim != 1 or not ((y >= 0) & (y < vae.num_classes)).all():
            raise VAEError(
                f"A model that is given labels is measured with them: every image of the {split} split needs one from 0 to "
                f"{vae.num_classes - 1}."
            )


def _mean(values: Tensor) -> Tensor:
    """Mean of (n,), zero of none."""
    return values.sum() / max(len(values), 1)
