"""vae.distillation against torch's own losses and the limits in Hinton et al. 2015."""

from __future__ import annotations

import math
from functools import partial

import pytest
import torch
import torch.nn.functional as F

from vae.distillation import (
    DIVERGENCES,
    Distillation,
    alpha_divergence,
    jensen_shannon,
    skewed_forward_kl,
    skewed_reverse_kl,
    soft_target_divergence,
)
from vae.errors import VAEError


@pytest.fixture
def batch():
    noise = torch.Generator().manual_seed(0)
    student, teacher = 2 * torch.randn(2, 32, 10, generator=noise, dtype=torch.float64)
    return student, teacher, torch.randint(10, (32,), generator=noise)


def gradient(student, teacher, **options):
    student = student.clone().requires_grad_()
    value = soft_target_divergence(student_logits=student, teacher_logits=teacher, **options).sum()
    return torch.autograd.grad(value, student)[0]


@pytest.mark.parametrize("temperature", [1.0, 4.0, 20.0])
def test_loss_is_f_kl_div_with_t_squared_plus_f_cross_entropy(batch, temperature):
    student, teacher, labels = batch
    alpha = 0.7
    soft = F.kl_div(
        F.log_softmax(student / temperature, -1), F.softmax(teacher / temperature, -1), reduction="batchmean"
    )
    hard = F.cross_entropy(student, labels)
    terms = Distillation(temperature, alpha).double()(student_logits=student, teacher_logits=teacher, labels=labels)
    torch.testing.assert_close(terms["soft"], temperature**2 * soft)
    torch.testing.assert_close(terms["hard"], hard)
    # alpha is held in single precision until .double()
    torch.testing.assert_close(terms["loss"], alpha * temperature**2 * soft + (1 - alpha) * hard, rtol=1e-6, atol=0)


def test_reverse_is_forward_with_student_and_teacher_exchanged(batch):
    student, teacher, _ = batch
    reverse = soft_target_divergence(
        student_logits=student, teacher_logits=teacher, temperature=3.0, divergence="reverse"
    )
    exchanged = soft_target_divergence(student_logits=teacher, teacher_logits=student, temperature=3.0)
    torch.testing.assert_close(reverse, exchanged)
    forward = soft_target_divergence(student_logits=student, teacher_logits=teacher, temperature=3.0)
    assert (forward - reverse).abs().max() > 0.1


def test_jensen_shannon_is_symmetric_and_at_most_t_squared_log_2(batch):
    student, teacher, _ = batch
    options = {"temperature": 2.0, "divergence": "jensen_shannon"}
    there = soft_target_divergence(student_logits=student, teacher_logits=teacher, **options)
    back = soft_target_divergence(student_logits=teacher, teacher_logits=student, **options)
    torch.testing.assert_close(there, back)
    assert there.max() <= 4 * math.log(2)


@pytest.mark.parametrize(("divergence", "factor"), [("forward", 1.0), ("reverse", 1.0), ("jensen_shannon", 0.25)])
def test_the_high_temperature_limit_is_logit_matching(batch, divergence, factor):
    student, teacher, _ = batch
    student, teacher = (x - x.mean(-1, keepdim=True) for x in (student, teacher))
    matching = (student - teacher) / 10  # gradient of (student - teacher)^2 / (2 N)
    at_100 = gradient(student, teacher, temperature=100.0, divergence=divergence)
    ratio = (at_100 * matching).sum() / matching.square().sum()
    assert ratio.item() == pytest.approx(factor, rel=0.02)
    assert F.cosine_similarity(at_100.flatten(), matching.flatten(), dim=0) > 0.999


def test_without_t_squared_the_gradient_would_vanish_like_one_over_t_squared(batch):
    student, teacher, _ = batch
    sizes = [gradient(student, teacher, temperature=t).norm().item() for t in (100.0, 1000.0)]
    assert sizes[1] == pytest.approx(sizes[0], rel=0.05)


def test_gradient_of_the_forward_kl_is_t_times_the_difference_of_softmaxes(batch):
    student, teacher, _ = batch
    expected = 5.0 * ((student / 5).softmax(-1) - (teacher / 5).softmax(-1))
    torch.testing.assert_close(gradient(student, teacher, temperature=5.0), expected)


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_gradients_pass_gradcheck(batch, divergence):
    student, teacher, _ = batch
    assert torch.autograd.gradcheck(
        lambda s: soft_target_divergence(
            student_logits=s, teacher_logits=teacher[:3], temperature=2.0, divergence=divergence
        ),
        student[:3].requires_grad_(),
    )


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_the_teacher_learns_nothing_and_is_where_the_student_stops(batch, divergence):
    _, teacher, _ = batch
    student, teacher = teacher.clone().requires_grad_(), teacher.clone().requires_grad_()
    terms = Distillation(alpha=1.0, divergence=divergence)(student_logits=student, teacher_logits=teacher)
    terms["loss"].backward()
    assert teacher.grad is None
    assert terms["loss"].abs() < 1e-12
    torch.testing.assert_close(student.grad, torch.zeros_like(student))


def test_alpha_0_is_the_labels_alone_and_alpha_1_the_teacher_alone(batch):
    student, teacher, labels = batch
    logits = {"student_logits": student, "teacher_logits": teacher}
    labels_alone = Distillation(alpha=0.0)(**logits, labels=labels)["loss"]
    torch.testing.assert_close(labels_alone, F.cross_entropy(student, labels))
    torch.testing.assert_close(
        Distillation(alpha=1.0)(**logits, labels=labels)["loss"], Distillation(alpha=1.0)(**logits)["loss"]
    )


def test_sequences_of_tokens_are_batches_of_tokens(batch):
    student, teacher, labels = batch
    distil = Distillation()
    flat = distil(student_logits=student, teacher_logits=teacher, labels=labels)
    student, teacher, labels = student.view(4, 8, 10), teacher.view(4, 8, 10), labels.view(4, 8)
    torch.testing.assert_close(distil(student_logits=student, teacher_logits=teacher, labels=labels), flat)


def test_only_the_loss_has_a_gradient(batch):
    student, teacher, labels = batch
    terms = Distillation()(student_logits=student.requires_grad_(), teacher_logits=teacher, labels=labels)
    assert {name for name, term in terms.items() if term.requires_grad} == {"loss"}


def test_student_and_teacher_cannot_be_swapped_silently(batch):
    student, teacher, labels = batch
    with pytest.raises(TypeError):
        Distillation()(student, teacher, labels)
    with pytest.raises(TypeError):
        soft_target_divergence(student, teacher, temperature=1.0)


@pytest.mark.parametrize(
    "options", [{"temperature": 0.0}, {"temperature": -1.0}, {"alpha": 1.5}, {"alpha": -0.1}, {"divergence": "kl"}]
)
def test_options_out_of_range_are_refused(options):
    with pytest.raises(VAEError):
        Distillation(**options)


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_bfloat16_at_a_high_temperature_is_the_same_logits_in_single_precision(divergence):
    noise = torch.Generator().manual_seed(0)
    logits = [(2 * torch.randn(64, 10, generator=noise)).bfloat16() for _ in range(2)]
    distil = Distillation(temperature=20.0, alpha=1.0, divergence=divergence)
    low = distil(student_logits=logits[0], teacher_logits=logits[1])["loss"]
    single = distil(student_logits=logits[0].float(), teacher_logits=logits[1].float())["loss"]
    exact = distil.double()(student_logits=logits[0].double(), teacher_logits=logits[1].double())["loss"]
    assert low == single
    assert low.item() == pytest.approx(exact.item(), rel=1e-3)


def test_label_minus_100_and_the_mask_leave_out_of_both_terms_what_they_mark(batch):
    student, teacher, labels = batch
    labels, mask = labels.clone(), torch.arange(32) % 4 != 1
    labels[::3] = -100
    kept = mask & (labels != -100)
    whole = Distillation()(student_logits=student, teacher_logits=teacher, labels=labels, mask=mask)
    alone = Distillation()(student_logits=student[kept], teacher_logits=teacher[kept], labels=labels[kept])
    torch.testing.assert_close(whole, alone)
    soft = Distillation(alpha=1.0)(student_logits=student, teacher_logits=teacher, mask=kept)["loss"]
    torch.testing.assert_close(soft, whole["soft"])


def test_what_is_left_out_is_never_read(batch):
    student, teacher, labels = batch
    student, labels = student.clone().requires_grad_(), labels.clone()
    labels[:5] = -100
    bad = teacher.clone()
    bad[:5] = math.nan
    loss = Distillation()(student_logits=student, teacher_logits=bad, labels=labels)["loss"]
    gradient = torch.autograd.grad(loss, student)[0]
    assert loss.isfinite() and (gradient[:5] == 0).all() and gradient.isfinite().all()


def test_nothing_to_learn_from_is_a_loss_of_0_with_gradient_0(batch):
    student, teacher, labels = batch
    student = student.clone().requires_grad_()
    terms = Distillation()(student_logits=student, teacher_logits=teacher, labels=torch.full_like(labels, -100))
    assert {name: term.item() for name, term in terms.items()} == {"loss": 0, "soft": 0, "hard": 0}
    assert (torch.autograd.grad(terms["loss"], student)[0] == 0).all()


def test_a_divergence_may_be_a_function_and_its_direction_is_that_of_its_name(batch):
    student, teacher, _ = batch
    logits = {"student_logits": student, "teacher_logits": teacher, "temperature": 1.0}
    at = {
        "forward": [partial(jensen_shannon, beta=1e-7, scaled=True), partial(alpha_divergence, alpha=1 - 1e-7)],
        "reverse": [partial(jensen_shannon, beta=1 - 1e-7, scaled=True), partial(alpha_divergence, alpha=1e-7)],
    }
    at["forward"].append(partial(skewed_forward_kl, alpha=1e-12))
    at["reverse"].append(partial(skewed_reverse_kl, alpha=1e-12))
    for direction, nearly in at.items():
        expected = soft_target_divergence(divergence=direction, **logits)
        for divergence in nearly:
            torch.testing.assert_close(
                soft_target_divergence(divergence=divergence, **logits), expected, rtol=1e-5, atol=1e-5
            )


def test_missing_labels_and_mismatched_logits_are_refused(batch):
    student, teacher, labels = batch
    with pytest.raises(VAEError, match="labels"):
        Distillation(alpha=0.9)(student_logits=student, teacher_logits=teacher)
    with pytest.raises(VAEError, match="disagree"):
        Distillation()(student_logits=student, teacher_logits=teacher[:, :5], labels=labels)
    for wrong in (10, -1):
        with pytest.raises(VAEError, match="from 0 to 9"):
            Distillation()(
                student_logits=student, teacher_logits=teacher, labels=labels.index_fill(0, labels[:1], wrong)
            )
    with pytest.raises(VAEError, match="mask"):
        Distillation()(student_logits=student, teacher_logits=teacher, labels=labels, mask=torch.ones(5))
    with pytest.raises(VAEError, match="forward, reverse, jensen_shannon"):
        soft_target_divergence(student_logits=student, teacher_logits=teacher, temperature=1.0, divergence="js")
