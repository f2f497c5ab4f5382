"""Knowledge distillation: a student is held to a teacher's soft targets by a KL divergence (Hinton et al. 2015)."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vae.errors import VAEError
from vae.kl import jensen_shannon_categorical, kl_categorical


def forward_kl(student: Tensor, teacher: Tensor) -> Tensor:
    """KL(teacher || student): the student covers all that the teacher finds possible. Hinton's."""
    return kl_categorical(p_logits=teacher, q_logits=student)


def reverse_kl(student: Tensor, teacher: Tensor) -> Tensor:
    """KL(student || teacher): the student stays within what the teacher finds likely (Gu et al. 2024, MiniLLM)."""
    return kl_categorical(p_logits=student, q_logits=teacher)


def jensen_shannon(student: Tensor, teacher: Tensor) -> Tensor:
    """1/2 KL(teacher || m) + 1/2 KL(student || m) with m their mean: between the two, and at most log 2."""
    return jensen_shannon_categorical(p_logits=teacher, q_logits=student)


DIVERGENCES = {"forward": forward_kl, "reverse": reverse_kl, "jensen_shannon": jensen_shannon}


def soft_target_divergence(
    *, student_logits: Tensor, teacher_logits: Tensor, temperature: float | Tensor, divergence: str = "forward"
) -> Tensor:
    """T^2 times the divergence between both softmaxes at temperature T, in nats: logits (..., K) -> (...).

    The gradient of the divergence shrinks like 1 / T^2, which T^2 undoes, so that the balance with the hard labels
    outlives a change of T (Hinton et al. 2015, sec. 2). As T grows, the gradient of both KLs tends to
    (student - teacher) / K in centred logits, that of half their mean squared error; that of Jensen-Shannon to a
    quarter of it. No gradient reaches the teacher. Raises VAEError for a divergence that is not in DIVERGENCES.
    """
    if divergence not in DIVERGENCES:
        raise VAEError(f"There is no divergence {divergence!r}: choose among {', '.join(DIVERGENCES)}.")
    teacher_logits = teacher_logits.detach()
    return temperature**2 * DIVERGENCES[divergence](student_logits / temperature, teacher_logits / temperature)


class Distillation(nn.Module):
    """alpha T^2 KL(teacher_T || student_T) + (1 - alpha) cross-entropy of the student with the hard labels at T = 1.

    alpha is the weight of the soft targets: 1 is the teacher alone, 0 the labels alone. divergence: "forward" (Hinton's),
    "reverse" or "jensen_shannon". Raises VAEError unless temperature > 0 and 0 <= alpha <= 1.
    """

    temperature: Tensor
    alpha: Tensor

    def __init__(self, temperature: float = 4.0, alpha: float = 0.9, divergence: str = "forward") -> None:
        super().__init__()
        if not (temperature > 0 and math.isfinite(temperature)):
            raise VAEError(f"temperature must be positive and finite, not {temperature}.")
        if not 0 <= alpha <= 1:
            raise VAEError(f"alpha, the weight of the soft targets, must lie between 0 and 1, not {alpha}.")
        if divergence not in DIVERGENCES:
            raise VAEError(f"There is no divergence {divergence!r}: choose among {', '.join(DIVERGENCES)}.")
        self.register_buffer("temperature", torch.tensor(float(temperature)))
        self.register_buffer("alpha", torch.tensor(float(alpha)))
        self.divergence = divergence
        self.needs_labels = alpha < 1

    def forward(
        self, *, student_logits: Tensor, teacher_logits: Tensor, labels: Tensor | None = None
    ) -> dict[str, Tensor]:
        """Batch means in nats: "loss" (the only one with a gradient), "soft" (with its T^2), and "hard" given labels.

        Shapes: logits (..., K), labels (...) of class numbers. Raises VAEError for labels left out where alpha < 1, and
        for logits of different shapes.
        """
        if student_logits.shape != teacher_logits.shape:
            raise VAEError(
                f"Student and teacher disagree: logits {tuple(student_logits.shape)} and {tuple(teacher_logits.shape)}."
            )
        soft = soft_target_divergence(
            student_logits=student_logits,
            teacher_logits=teacher_logits,
            temperature=self.temperature,
            divergence=self.divergence,
        ).mean()
        if labels is None:
            if self.needs_labels:
                raise VAEError("Hard labels are missing: alpha = 1 is distillation from soft targets alone.")
            return {"loss": soft, "soft": soft.detach()}
        hard = F.cross_entropy(student_logits.flatten(0, -2), labels.flatten())
        loss = self.alpha * soft + (1 - self.alpha) * hard
        return {"loss": loss, "soft": soft.detach(), "hard": hard.detach()}
