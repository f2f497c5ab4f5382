"""Knowledge distillation: a student is held to a teacher by a divergence of their distributions.

From given inputs (Hinton et al. 2015; `Distillation`) or, for language models, on what the student itself writes
(GKD, Agarwal et al. 2024; MiniLLM, Gu et al. 2024; the functions at the end). Logits (..., K) of both; only the student
learns. float16 and bfloat16 are computed in float32. Each divergence is named by its direction as in `vae.kl`: forward is
KL(teacher || student).
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vae.errors import VAEError
from vae.importance import real, sequence_kl_loss
from vae.kl import (
    alpha_divergence_categorical,
    jensen_shannon_categorical,
    k1,
    kl_categorical,
    skewed_kl_categorical,
    total_variation_categorical,
)
from vae.precision import full_precision

IGNORED = -100  # the label that PyTorch and Hugging Face put on what is not to be learnt


def forward_kl(student: Tensor, teacher: Tensor) -> Tensor:
    """KL(teacher || student): the student covers all that the teacher finds possible. Hinton's."""
    return kl_categorical(p_logits=teacher, q_logits=student)


def reverse_kl(student: Tensor, teacher: Tensor) -> Tensor:
    """KL(student || teacher): the student stays within what the teacher finds likely (Gu et al. 2024, MiniLLM)."""
    return kl_categorical(p_logits=student, q_logits=teacher)


def jensen_shannon(student: Tensor, teacher: Tensor, beta: float = 0.5, scaled: bool = False) -> Tensor:
    """beta KL(teacher || m) + (1 - beta) KL(student || m), m = beta teacher + (1 - beta) student: GKD's, between the two.

    scaled: divided by beta (1 - beta), so that beta -> 0 is forward and beta -> 1 reverse without a jump.
    """
    return jensen_shannon_categorical(p_logits=teacher, q_logits=student, beta=beta, scaled=scaled)


def skewed_forward_kl(student: Tensor, teacher: Tensor, alpha: float = 0.1) -> Tensor:
    """KL(teacher || alpha teacher + (1 - alpha) student): DistiLLM's SKL (Ko et al. 2024), at most -log alpha."""
    return skewed_kl_categorical(p_logits=teacher, q_logits=student, alpha=alpha)


def skewed_reverse_kl(student: Tensor, teacher: Tensor, alpha: float = 0.1) -> Tensor:
    """KL(student || alpha student + (1 - alpha) teacher): DistiLLM's SRKL."""
    return skewed_kl_categorical(p_logits=student, q_logits=teacher, alpha=alpha)


def alpha_divergence(student: Tensor, teacher: Tensor, alpha: float = 0.5) -> Tensor:
    """Amari's, of the teacher from the student: alpha 1 is forward, 0 reverse, 1/2 (Hellinger's) in the middle."""
    return alpha_divergence_categorical(p_logits=teacher, q_logits=student, alpha=alpha)


def total_variation(student: Tensor, teacher: Tensor) -> Tensor:
    """1/2 sum |teacher - student|, either way."""
    return total_variation_categorical(p_logits=teacher, q_logits=student)


Divergence = Callable[[Tensor, Tensor], Tensor]  # of (student, teacher), both logits (..., K), to (...)
DIVERGENCES: dict[str, Divergence] = {
    "forward": forward_kl,
    "reverse": reverse_kl,
    "jensen_shannon": jensen_shannon,
    "skewed_forward": skewed_forward_kl,
    "skewed_reverse": skewed_reverse_kl,
    "alpha": alpha_divergence,
    "total_variation": total_variation,
}


def _divergence(named: str | Divergence) -> Divergence:
    if callable(named):
        return named
    if named not in DIVERGENCES:
        raise VAEError(f"There is no divergence {named!r}: choose among {', '.join(DIVERGENCES)}.")
    return DIVERGENCES[named]


def soft_target_divergence(
    *,
    student_logits: Tensor,
    teacher_logits: Tensor,
    temperature: float | Tensor,
    divergence: str | Divergence = "forward",
) -> Tensor:
    """T^2 times the divergence between both softmaxes at temperature T, in nats: logits (..., K) -> (...).

    The gradient of the divergence shrinks like 1 / T^2, which T^2 undoes, so that the balance with the hard labels
    outlives a change of T (Hinton et al. 2015, sec. 2). As T grows, the gradient of both KLs tends to
    (student - teacher) / K in centred logits, that of half their mean squared error; that of Jensen-Shannon to a
    quarter of it. No gradient reaches the teacher. divergence: a name in DIVERGENCES, or a function of both logits such as
    `partial(jensen_shannon, beta=0.1)`. Raises VAEError for another name.
    """
    student_logits, teacher_logits = full_precision(student_logits), full_precision(teacher_logits.detach())
    return temperature**2 * _divergence(divergence)(student_logits / temperature, teacher_logits / temperature)


class Distillation(nn.Module):
    """alpha T^2 KL(teacher_T || student_T) + (1 - alpha) cross-entropy of the student with the hard labels at T = 1.

    alpha is the weight of the soft targets: 1 is the teacher alone, 0 the labels alone. divergence: "forward" (Hinton's),
    another name in DIVERGENCES, or a function of (student, teacher) logits. Raises VAEError unless temperature > 0 and
    0 <= alpha <= 1.
    """

    temperature: Tensor
    alpha: Tensor

    def __init__(self, temperature: float = 4.0, alpha: float = 0.9, divergence: str | Divergence = "forward") -> None:
        super().__init__()
        if not (temperature > 0 and math.isfinite(temperature)):
            raise VAEError(f"temperature must be positive and finite, not {temperature}.")
        if not 0 <= alpha <= 1:
            raise VAEError(f"alpha, the weight of the soft targets, must lie between 0 and 1, not {alpha}.")
        self.register_buffer("temperature", torch.tensor(float(temperature)))
        self.register_buffer("alpha", torch.tensor(float(alpha)))
        self.divergence = _divergence(divergence)
        self.needs_labels = alpha < 1

    def forward(
        self,
        *,
        student_logits: Tensor,
        teacher_logits: Tensor,
        labels: Tensor | None = None,
        mask: Tensor | None = None,
    ) -> dict[str, Tensor]:
        """Means in nats: "loss" (the only one with a gradient), "soft" (with its T^2), and "hard" given labels.

        Shapes: logits (..., K), labels (...) of class numbers, mask (...), true where there is something to learn. Both
        terms are means over the same places, those on the mask whose label is not -100; where there are none, 0.
        Raises VAEError for labels left out where alpha < 1, labels beyond the classes, and shapes that differ.
        """
        if student_logits.shape != teacher_logits.shape:
            raise VAEError(
                f"Student and teacher disagree: logits {tuple(student_logits.shape)} and {tuple(teacher_logits.shape)}."
            )
        if labels is None and self.needs_labels:
            raise VAEError("Hard labels are missing: alpha = 1 is distillation from soft targets alone.")
        places, classes = student_logits.shape[:-1], student_logits.shape[-1]
        for name, given in (("labels", labels), ("mask", mask)):
            if given is not None and given.shape != places:
                raise VAEError(
                    f"{name} {tuple(given.shape)} are not one for each of the logits' places {tuple(places)}."
                )
        kept = torch.ones(places, dtype=torch.bool, device=student_logits.device) if mask is None else mask.bool()
        if labels is not None:
            kept = kept & (labels != IGNORED)
            if ((labels < 0) | (labels >= classes))[kept].any():
                raise VAEError(f"Labels are class numbers from 0 to {classes - 1}, or {IGNORED} where there is none.")
        student, teacher = student_logits[kept], teacher_logits[kept]
        count = max(1, len(student))
        soft = soft_target_divergence(
            student_logits=student,
            teacher_logits=teacher,
            temperature=self.temperature,
            divergence=self.divergence,
        )
        soft = soft.sum() / count
        if labels is None:
            return {"loss": soft, "soft": soft.detach()}
        hard = F.cross_entropy(full_precision(student), labels[kept].long(), reduction="sum") / count
        loss = self.alpha * soft + (1 - self.alpha) * hard
        return {"loss": loss, "soft": soft.detach(), "hard": hard.detach()}


# -------------------------------------------------------------------------------------------- on the student's own text
# Student and teacher logits (B, L, V) at the tokens (B, L) of B answers, mask (B, L) true on the student's tokens.


def drawn_by_student(n: int, fraction: float, generator: torch.Generator) -> Tensor:
    """Which of n prompts the student answers itself, the others being answered from data or by the teacher: (n,) bool.

    GKD's lambda: 0 is off-policy distillation, 1 on-policy. Raises VAEError unless 0 <= fraction <= 1.
    """
    if not 0 <= fraction <= 1:
        raise VAEError(f"The share of the student's own answers must lie between 0 and 1, not {fraction}.")
    return torch.rand(n, generator=generator, device=generator.device) < fraction


def token_distillation_loss(
    *, student_logits: Tensor, teacher_logits: Tensor, mask: Tensor, divergence: str | Divergence = "reverse"
) -> Tensor:
    """The divergence of the next token, summed over each answer, its tokens held fixed: (B,), in nats. GKD's.

    On the student's own answers the value is unbiased for the KL of whole sequences ("reverse"); the gradient lacks how
    a token changes what follows, which `sequence_distillation_loss` has.
    """
    token = soft_target_divergence(
        student_logits=student_logits, teacher_logits=teacher_logits, temperature=1.0, divergence=divergence
    )
    return real(token, mask).sum(-1)


def sequence_distillation_loss(
    *,
    student_logits: Tensor,
    teacher_logits: Tensor,
    tokens: Tensor,
    mask: Tensor,
    log_old: Tensor | None = None,
) -> Tensor:
    """KL(student || teacher) of whole answers that the student drew: (B,), value and gradient unbiased, in nats.

    See `vae.importance.sequence_kl_loss`. log_old (B, L): of the student as it was when it drew, None if it still is.
    """
    log_student = torch.log_softmax(full_precision(student_logits), -1)
    token_kl = kl_categorical(p_log_probs=log_student, q_logits=teacher_logits.detach())
    log_pi = log_student.gather(-1, tokens.unsqueeze(-1)).squeeze(-1)
    return sequence_kl_loss(token_kl=token_kl, log_pi=log_pi, mask=mask, log_old=log_old)


def distillation_reward(*, log_student: Tensor, log_teacher: Tensor, mask: Tensor) -> Tensor:
    """sum_(s >= t) log teacher_s - log student_s of the tokens drawn: (B, L), without gradient; 0 off the mask.

    As the advantage of `vae.surrogates.reinforce_loss` its expected gradient is that of KL(student || teacher) of whole
    sequences, without the teacher's whole distribution (MiniLLM; as a reward, k1 with reward-to-go).
    """
    reward = -real(k1(log_pi=log_student.detach(), log_ref=log_teacher.detach()), mask)
    return real(reward.flip(-1).cumsum(-1).flip(-1), mask)
