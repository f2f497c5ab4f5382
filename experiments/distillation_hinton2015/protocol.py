"""Hinton, Vinyals & Dean 2015, section 3: what a net that generalises well knows can be passed on to a plain one.

A teacher (784-1200-1200-10, dropout, jittered images) and plain students (784-800-800-10, no regularisation at all) on
MNIST: students of the labels alone, students that also match the teacher's soft targets at temperature T, a student
that never saw a 3, and one that saw nothing but 7s and 8s. Biases are repaired on the validation split.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import partial
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vae.data.images import Images
from vae.data.sources import mnist
from vae.distillation import Distillation
from vae.experiment import Context
from vae.seeding import generator

PAPER = 'Hinton, Vinyals & Dean 2015, "Distilling the knowledge in a neural network", section 3'
CLAIM = "A teacher's soft targets make a plain student generalise almost as well as the teacher, even to a digit it never saw."

# images: drawn from the 55,000 left for training, and used by teacher and students alike. The quick form takes so few
# that the labels alone leave much to be learnt, which one seed can show.
SHARED = {
    "teacher": {"widths": [784, 1200, 1200, 10], "lr": 2e-3, "dropout": 0.25, "jitter": 2, "weight_decay": 0.05},
    "student": {"widths": [784, 800, 800, 10], "lr": 2e-3},
    "batch_size": 250,
    "alpha": 0.9,  # the weight of the soft targets; the labels have the rest
    "transfer_temperature": 20,
    "validation": 5000,
}
SETTINGS = {  # epochs: of a teacher and of a student, as many as the time allows
    "quick": {**SHARED, "seeds": [0], "images": 12_000, "epochs": [20, 15], "temperatures": [4, 20]},
    "full": {**SHARED, "seeds": [0, 1, 2], "images": 55_000, "epochs": [25, 10], "temperatures": [1, 2, 4, 8, 20]},
}
HARD = "labels alone"
PARTIAL = {"no 3s": [3], "7s and 8s alone": [7, 8]}  # transfer sets that lack classes: whose bias the repair moves
BIASES = [round(-12 + 0.05 * i, 2) for i in range(481)]


class ReLUNet(nn.Module):
    """Fully connected, He et al. 2015 initial weights from `noise`, biases 0. Pixels in [0, 1] (B, 784) -> logits."""

    def __init__(self, widths: list[int], noise: torch.Generator, dropout: float = 0.0) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.utils.skip_init(nn.Linear, n, m) for n, m in pairwise(widths))
        self.dropout = dropout
        for layer in self.layers:
            nn.init.kaiming_uniform_(layer.weight, nonlinearity="relu", generator=noise)
            nn.init.zeros_(layer.bias)

    def forward(self, x: Tensor, noise: torch.Generator | None = None) -> Tensor:
        """With `noise`, hidden units are dropped and the rest scaled up; without it, none are."""
        *hidden, last = self.layers
        for layer in hidden:
            x = F.relu(layer(x))
            if noise is not None and self.dropout:
                x = x * (torch.rand(x.shape, generator=noise) >= self.dropout) / (1 - self.dropout)
        return last(x)


def shifts(x: Tensor, most: int) -> Tensor:
    """Images (N, 784) at each shift of up to `most` pixels along each axis, a view: (N, 2 most + 1, 2 most + 1, 28, 28)."""
    return F.pad(x.view(-1, 28, 28), (most,) * 4).unfold(1, 28, 1).unfold(2, 28, 1)


def fit(
    net: ReLUNet,
    x: Tensor,
    loss: Callable[[Tensor, Tensor], Tensor],
    *,
    epochs: int,
    batch_size: int,
    lr: float,
    noise: torch.Generator,
    jitter: int = 0,
    weight_decay: float = 0.0,
) -> ReLUNet:
    """AdamW, lr rising over the first 15% of the steps and then falling along a cosine. loss(logits, index of images)."""
    windows = shifts(x, jitter)
    optimizer = torch.optim.AdamW(net.parameters(), lr=lr, weight_decay=weight_decay, fused=True)
    batches = len(x) // batch_size
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, epochs * batches, pct_start=0.15)
    for _ in range(epochs):
        for index in torch.randperm(len(x), generator=noise)[: batches * batch_size].split(batch_size):
            at = torch.randint(2 * jitter + 1, (2, len(index)), generator=noise)
            pixels = windows[index, at[0], at[1]].flatten(1)
            optimizer.zero_grad()
            loss(net(pixels / 255, noise), index).backward()
            optimizer.step()
            schedule.step()
    return net


@torch.no_grad()
def logits_of(net: ReLUNet, x: Tensor) -> Tensor:
    """(N, 10) of uint8 images (N, 784)."""
    return torch.cat([net(part / 255) for part in x.split(1000)])


def errors(logits: Tensor, y: Tensor) -> int:
    return int((logits.argmax(-1) != y).sum())


def images(settings: dict[str, Any], seed: int) -> tuple[Images, Images, Images]:
    """Train (as many as the settings say, drawn by seed), validation (the same for all seeds), test; flat."""
    splits = mnist(os.environ.get("VAE_DATA_DIR", "data"), settings["validation"])
    index = torch.randperm(len(splits.train), generator=generator(seed, "images"))[: settings["images"]]
    return splits.train.subset(index), splits.val, splits.test


def train_teacher(settings: dict[str, Any], seed: int, path: Path) -> dict[str, Any]:
    """Errors, and the mean soft targets of the test 3s; its logits of the training images go to `path`."""
    torch.set_num_threads(1)
    train, val, test = images(settings, seed)
    own, noise = dict(settings["teacher"]), generator(seed, "teacher")
    net = ReLUNet(own.pop("widths"), noise, own.pop("dropout"))
    x, y = train.x.flatten(1), train.y
    fit(
        net,
        x,
        lambda logits, index: F.cross_entropy(logits, y[index]),
        epochs=settings["epochs"][0],
        batch_size=settings["batch_size"],
        noise=noise,
        **own,
    )
    torch.save(logits_of(net, x), path)
    of_test = logits_of(net, test.x.flatten(1))
    return {
        "seed": seed,
        "validation": errors(logits_of(net, val.x.flatten(1)), val.y),
        "test": errors(of_test, test.y),
        "targets_of_3": {t: torch.softmax(of_test[test.y == 3] / t, -1).mean(0).tolist() for t in (1, 4, 20)},
    }


def train_student(
    settings: dict[str, Any], seed: int, teacher: Path, temperature: float | None, transfer: str | None = None
) -> dict[str, Any]:
    """Errors of a student of the labels alone (no temperature) or also of the teacher's soft targets.

    transfer: a key of PARTIAL, whose classes' biases are then repaired; all classes if not given.
    """
    torch.set_num_threads(1)
    train, val, test = images(settings, seed)
    # every student of a seed begins with the same weights and sees the same batches, so that they compare in pairs
    own, noise = dict(settings["student"]), generator(seed, "student")
    net = ReLUNet(own.pop("widths"), noise)
    keep = torch.ones_like(train.y, dtype=torch.bool)
    if transfer == "no 3s":
        keep = train.y != 3
    elif transfer is not None:
        keep = torch.isin(train.y, torch.tensor(PARTIAL[transfer]))
    x, y = train.x.flatten(1)[keep], train.y[keep]
    if temperature is None:

        def loss(logits: Tensor, index: Tensor) -> Tensor:
            return F.cross_entropy(logits, y[index])

    else:
        targets, objective = torch.load(teacher)[keep], Distillation(temperature, settings["alpha"])

        def loss(logits: Tensor, index: Tensor) -> Tensor:
            return objective(student_logits=logits, teacher_logits=targets[index], labels=y[index])["loss"]

    fit(net, x, loss, epochs=settings["epochs"][1], batch_size=settings["batch_size"], noise=noise, **own)
    of_val, of_test = logits_of(net, val.x.flatten(1)), logits_of(net, test.x.flatten(1))
    result = {"seed": seed, "validation": errors(of_val, val.y), "test": errors(of_test, test.y)}
    return result if transfer is None else {**result, **repair(of_val, val.y, of_test, test.y, PARTIAL[transfer])}


def repair(of_val: Tensor, val_y: Tensor, of_test: Tensor, test_y: Tensor, classes: list[int]) -> dict[str, Any]:
    """Errors on the test split before and after one bias is added to the logits of `classes`.

    The bias is the one of BIASES with the fewest errors on the validation split, the median of those that tie.
    """
    move = torch.zeros(10)
    move[classes] = 1.0
    of_bias = [errors(of_val + bias * move, val_y) for bias in BIASES]
    bias = median(b for b, n in zip(BIASES, of_bias, strict=True) if n == min(of_bias))
    on = torch.isin(test_y, torch.tensor(classes))

    def on_classes(bias: float) -> int:
        return errors((of_test + bias * move)[on], test_y[on])

    shown = BIASES[::5]
    return {
        "bias": bias,
        "repaired": errors(of_test + bias * move, test_y),
        "of_classes": int(on.sum()),
        "on_classes": on_classes(0.0),
        "repaired_on_classes": on_classes(bias),
        "curve": {
            "bias": shown,
            "validation": of_bias[::5],
            "test": [errors(of_test + b * move, test_y) for b in shown],
            "on_classes": [on_classes(b) for b in shown],
        },
    }


def measure(context: Context) -> dict[str, Any]:
    """Teachers and students of the labels first, which need no teacher; then all that learn from one."""
    settings, seeds = context.settings, context.settings["seeds"]
    teachers = {seed: context.folder / f"teacher,seed={seed}.pt" for seed in seeds}

    def student(seed: int, temperature: float | None, transfer: str | None = None) -> Callable[[], dict[str, Any]]:
        return partial(train_student, settings, seed, teachers[seed], temperature, transfer)

    found = context.cached_many(
        {f"teacher,seed={seed}": partial(train_teacher, settings, seed, teachers[seed]) for seed in seeds}
        | {f"labels,seed={seed}": student(seed, None) for seed in seeds}
    )
    found |= context.cached_many(
        {f"T={t},seed={seed}": student(seed, t) for t in reversed(settings["temperatures"]) for seed in seeds}
        | {
            f"{transfer.replace(' ', '_')},seed={seed}": student(seed, settings["transfer_temperature"], transfer)
            for transfer in PARTIAL
            for seed in seeds
        }
    )

    def of(name: str) -> list[Any]:
        return [found[f"{name},seed={seed}"] for seed in seeds]

    return {
        "teacher": of("teacher"),
        HARD: of("labels"),
        "soft": {str(t): of(f"T={t}") for t in settings["temperatures"]},
        **{transfer: of(transfer.replace(" ", "_")) for transfer in PARTIAL},
    }
