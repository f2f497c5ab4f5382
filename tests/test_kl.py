"""vae.kl against torch.distributions, closed forms, quadrature and limits, in values and in gradients."""

from __future__ import annotations

import math
from functools import partial

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch.distributions import Categorical, MixtureSameFamily, MultivariateNormal, Normal, kl_divergence

from vae.errors import VAEError
from vae.kl import (
    GaussianMixture,
    alpha_divergence_categorical,
    bits_to_nats,
    gaussian_kl_to_standard_normal,
    jensen_shannon_categorical,
    k1,
    k2,
    k3,
    kl_categorical,
    kl_gaussian,
    kl_gaussian_full,
    kl_monte_carlo,
    nats_to_bits,
    skewed_kl_categorical,
    total_variation_categorical,
)

INF = math.inf


@pytest.fixture
def noise() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def randn(noise: torch.Generator, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=noise, dtype=torch.float64)


def positive_definite(noise: torch.Generator, *batch: int, d: int) -> torch.Tensor:
    root = randn(noise, *batch, d, d)
    return root @ root.mT + 0.5 * torch.eye(d, dtype=torch.float64)


# --- Gaussians --------------------------------------------------------------------------------------------------------


def test_kl_to_the_standard_normal_is_that_of_torch_distributions(noise):
    mean, log_var = randn(noise, 50, 3), randn(noise, 50, 3)
    expected = kl_divergence(Normal(mean, (0.5 * log_var).exp()), Normal(torch.zeros(3).double(), 1.0))
    torch.testing.assert_close(gaussian_kl_to_standard_normal(mean, log_var), expected)


def test_kl_of_diagonal_gaussians_is_that_of_torch_distributions_both_ways(noise):
    a, b = (Normal(randn(noise, 50, 3), randn(noise, 50, 3).exp()) for _ in range(2))
    for p, q in ((a, b), (b, a)):
        value = kl_gaussian(p_mean=p.mean, p_log_var=p.variance.log(), q_mean=q.mean, q_log_var=q.variance.log())
        torch.testing.assert_close(value, kl_divergence(p, q))


def test_kl_of_diagonal_gaussians_to_the_origin_is_kl_to_the_standard_normal(noise):
    mean, log_var = randn(noise, 50), randn(noise, 50)
    zero = torch.zeros(())
    value = kl_gaussian(p_mean=mean, p_log_var=log_var, q_mean=zero, q_log_var=zero)
    torch.testing.assert_close(value, gaussian_kl_to_standard_normal(mean, log_var))


def test_kl_of_full_gaussians_is_that_of_torch_distributions_batched(noise):
    p = MultivariateNormal(randn(noise, 4, 5), positive_definite(noise, 4, d=5))
    q = MultivariateNormal(randn(noise, 5), positive_definite(noise, d=5))  # broadcast against p's batch
    value = kl_gaussian_full(
        p_mean=p.mean, p_covariance=p.covariance_matrix, q_mean=q.mean, q_covariance=q.covariance_matrix
    )
    torch.testing.assert_close(value, kl_divergence(p, q))


def test_kl_of_two_full_gaussians_that_are_nearly_one_is_never_negative_and_does_not_cancel(noise):
    for _ in range(50):
        mean, covariance = randn(noise, 5).float(), positive_definite(noise, d=5).float()
        own = {"p_mean": mean, "p_covariance": covariance, "q_mean": mean}
        assert 0 <= kl_gaussian_full(**own, q_covariance=covariance).item() < 1e-12
        near = kl_gaussian_full(**own, q_covariance=covariance * 1.001).item()
        assert near == pytest.approx(2.5 * (1 / 1.001 - 1 + math.log(1.001)), rel=5e-3)


def test_kl_of_full_gaussians_with_diagonal_covariances_is_the_sum_of_the_diagonal_kl(noise):
    p_mean, p_log_var, q_mean, q_log_var = randn(noise, 4, 6)
    full = kl_gaussian_full(
        p_mean=p_mean, p_covariance=p_log_var.exp().diag(), q_mean=q_mean, q_covariance=q_log_var.exp().diag()
    )
    diagonal = kl_gaussian(p_mean=p_mean, p_log_var=p_log_var, q_mean=q_mean, q_log_var=q_log_var).sum()
    torch.testing.assert_close(full, diagonal)


def test_both_optima_of_bishops_correlated_gaussian_are_equally_far():
    rho, zero, one = 0.8, torch.zeros(2).double(), torch.eye(2).double()
    p = torch.tensor([[1.0, rho], [rho, 1.0]], dtype=torch.float64)
    reverse = kl_gaussian_full(p_mean=zero, p_covariance=(1 - rho**2) * one, q_mean=zero, q_covariance=p)
    forward = kl_gaussian_full(p_mean=zero, p_covariance=p, q_mean=zero, q_covariance=one)
    expected = -0.5 * math.log(1 - rho**2)  # Bishop 2006, fig. 10.2
    assert reverse.item() == pytest.approx(expected, rel=1e-12)
    assert forward.item() == pytest.approx(expected, rel=1e-12)


def test_kl_to_the_standard_normal_holds_over_extreme_ranges_in_single_precision():
    log_var = torch.linspace(-40, 40, 81)
    mean = torch.tensor([0.0, 1e-6, 1.0, 1e6])[:, None].expand(4, 81).contiguous()
    mean.requires_grad_(), log_var.requires_grad_()
    value = gaussian_kl_to_standard_normal(mean, log_var)
    exact = [[0.5 * (m * m + math.expm1(v) - v) for v in log_var.tolist()] for m in mean[:, 0].tolist()]
    np.testing.assert_allclose(value.detach().numpy(), exact, rtol=1e-6)
    grad_mean, grad_log_var = torch.autograd.grad(value.sum(), (mean, log_var))
    torch.testing.assert_close(grad_mean, mean.detach())
    torch.testing.assert_close(grad_log_var, 2 * torch.expm1(log_var.detach()))  # 1/2 expm1 for each of four means


def test_kl_of_diagonal_gaussians_holds_over_extreme_ranges_in_single_precision():
    grid = torch.linspace(-40, 40, 9)
    p_log_var, q_log_var = (g.contiguous().requires_grad_() for g in torch.meshgrid(grid, grid, indexing="ij"))
    p_mean = torch.full((9, 9), 1e6, requires_grad=True)
    value = kl_gaussian(p_mean=p_mean, p_log_var=p_log_var, q_mean=torch.tensor(-1e6), q_log_var=q_log_var)
    p64, q64 = p_log_var.detach().double(), q_log_var.detach().double()
    shift, ratio = 4e12 * torch.exp(-q64), p64 - q64
    torch.testing.assert_close(value.detach().double(), 0.5 * (shift + torch.expm1(ratio) - ratio), rtol=1e-5, atol=0)
    grads = torch.autograd.grad(value.sum(), (p_mean, p_log_var, q_log_var))
    exact = (2e6 * torch.exp(-q64), 0.5 * torch.expm1(ratio), -0.5 * (shift + torch.expm1(ratio)))
    for grad, expected in zip(grads, exact, strict=True):
        torch.testing.assert_close(grad.double(), expected, rtol=1e-5, atol=0)


@pytest.mark.parametrize(
    ("dtype", "log_var"), [(torch.float32, -100.0), (torch.float32, -1000.0), (torch.float64, -4000.0)]
)
def test_kl_of_equal_gaussians_is_0_with_gradient_0_however_narrow(dtype, log_var):
    inputs = [torch.tensor(x, dtype=dtype, requires_grad=True) for x in (0.3, log_var, 0.3, log_var)]
    value = kl_gaussian(**dict(zip(("p_mean", "p_log_var", "q_mean", "q_log_var"), inputs, strict=True)))
    assert value.item() == 0
    assert all(gradient.item() == 0 for gradient in torch.autograd.grad(value, inputs))


def test_kl_of_narrow_gaussians_apart_is_finite_where_the_inverse_variance_is_not():
    mean, zero, log_var = torch.tensor(1e-25, requires_grad=True), torch.tensor(0.0), torch.tensor(-100.0)
    value = kl_gaussian(p_mean=mean, p_log_var=log_var, q_mean=zero, q_log_var=log_var)
    assert value.item() == pytest.approx(1e-50 * math.exp(100) / 2, rel=1e-5)  # 1.344e-7
    assert torch.autograd.grad(value, mean)[0].item() == pytest.approx(1e-25 * math.exp(100), rel=1e-5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_gaussian_kls_of_low_precision_are_those_of_the_same_numbers_in_single(dtype):
    inputs = [torch.tensor(x, dtype=dtype) for x in (0.5, 3.0, 0.25, -6.0)]
    names = ("p_mean", "p_log_var", "q_mean", "q_log_var")
    value = kl_gaussian(**dict(zip(names, inputs, strict=True)))
    assert value.dtype == torch.float32
    assert value == kl_gaussian(**{name: x.float() for name, x in zip(names, inputs, strict=True)})
    mean, log_var = inputs[:2]
    assert gaussian_kl_to_standard_normal(mean, log_var) == gaussian_kl_to_standard_normal(
        mean.float(), log_var.float()
    )
    covariance = torch.eye(2, dtype=dtype)
    full = kl_gaussian_full(
        p_mean=covariance[0], p_covariance=covariance, q_mean=covariance[1], q_covariance=covariance
    )
    assert full.item() == 1.0


def test_kl_of_an_almost_standard_normal_keeps_its_digits():
    log_var = torch.tensor([1e-2, -1e-2, 3e-3], dtype=torch.float32)
    exact = 0.25 * log_var.double().square() + log_var.double() ** 3 / 12
    value = gaussian_kl_to_standard_normal(torch.zeros(3), log_var).double()
    torch.testing.assert_close(value, exact, rtol=1e-3, atol=0)  # exp(x) - x - 1 loses all but one digit here


def test_kl_to_the_standard_normal_is_never_negative_in_single_precision():
    log_var = torch.cat([torch.linspace(-1e-2, 1e-2, 100_001), torch.linspace(-40, 40, 100_001)])
    assert gaussian_kl_to_standard_normal(torch.zeros(()), log_var).min() >= 0


def test_gradients_of_gaussian_kls_pass_gradcheck(noise):
    inputs = [randn(noise, 3).requires_grad_() for _ in range(4)]
    assert torch.autograd.gradcheck(gaussian_kl_to_standard_normal, inputs[:2])
    assert torch.autograd.gradcheck(
        lambda a, b, c, d: kl_gaussian(p_mean=a, p_log_var=b, q_mean=c, q_log_var=d), inputs
    )
    roots = [randn(noise, 3, 3).requires_grad_() for _ in range(2)]

    def of_roots(a, b, root_p, root_q):
        eye = torch.eye(3, dtype=torch.float64)
        p, q = root_p @ root_p.mT + eye, root_q @ root_q.mT + eye
        return kl_gaussian_full(p_mean=a, p_covariance=p, q_mean=b, q_covariance=q)

    assert torch.autograd.gradcheck(of_roots, (*inputs[:2], *roots))


def test_a_covariance_that_is_not_positive_definite_is_refused_by_name():
    zero, eye = torch.zeros(2), torch.eye(2)
    with pytest.raises(VAEError, match="q_covariance"):
        kl_gaussian_full(p_mean=zero, p_covariance=eye, q_mean=zero, q_covariance=torch.ones(2, 2))


# --- categoricals -----------------------------------------------------------------------------------------------------


def test_worked_numbers_of_two_categoricals():
    p, q = torch.tensor([0.3, 0.5, 0.2]), torch.tensor([0.35, 0.4, 0.25])
    assert kl_categorical(p_probs=p, q_probs=q).item() == pytest.approx(0.020698, abs=5e-7)
    assert kl_categorical(p_probs=q, q_probs=p).item() == pytest.approx(0.020481, abs=5e-7)


def test_categorical_kl_is_that_of_torch_distributions_and_of_f_kl_div_in_all_nine_mixed_forms(noise):
    p_logits, q_logits = randn(noise, 20, 6), randn(noise, 20, 6)

    def forms(side, logits):
        log_probs = logits.log_softmax(-1)
        return [{f"{side}_logits": logits}, {f"{side}_log_probs": log_probs}, {f"{side}_probs": log_probs.exp()}]

    expected = kl_divergence(Categorical(logits=p_logits), Categorical(logits=q_logits))
    torch.testing.assert_close(
        F.kl_div(q_logits.log_softmax(-1), p_logits.softmax(-1), reduction="none").sum(-1), expected
    )
    for p in forms("p", p_logits):
        for q in forms("q", q_logits):
            torch.testing.assert_close(kl_categorical(**p, **q), expected)


def test_zeros_of_p_count_nothing_and_zeros_of_q_under_p_are_infinitely_far():
    p = torch.tensor([[0.5, 0.5, 0.0], [0.5, 0.5, 0.0], [1.0, 0.0, 0.0], [0.0, 0.0, 1.0]])
    q = torch.tensor([[0.25, 0.25, 0.5], [1.0, 0.0, 0.0], [1.0, 0.0, 0.0], [0.5, 0.5, 0.0]])
    expected = torch.tensor([math.log(2), INF, 0.0, INF])
    torch.testing.assert_close(kl_categorical(p_probs=p, q_probs=q), expected)
    torch.testing.assert_close(kl_categorical(p_log_probs=p.log(), q_log_probs=q.log()), expected)
    torch.testing.assert_close(kl_categorical(p_logits=p.log(), q_logits=q.log()), expected)


DIVERGENCES = {
    "kl": kl_categorical,
    "jensen_shannon": jensen_shannon_categorical,
    "jensen_shannon_0.1": partial(jensen_shannon_categorical, beta=0.1, scaled=True),
    "skewed": skewed_kl_categorical,
    "hellinger": partial(alpha_divergence_categorical, alpha=0.5),
    "chi_squared": partial(alpha_divergence_categorical, alpha=2.0),
    "alpha_-1": partial(alpha_divergence_categorical, alpha=-1.0),
    "total_variation": total_variation_categorical,
}


@pytest.mark.parametrize("form", ["probs", "log_probs", "logits"])
@pytest.mark.parametrize("divergence", DIVERGENCES.values(), ids=DIVERGENCES)
def test_gradients_at_zeros_are_those_of_the_categories_that_remain(divergence, form):
    p, q = torch.tensor([0.5, 0.3, 0.2, 0.0], dtype=torch.float64), torch.tensor([0.2, 0.3, 0.5, 0.0]).double()

    def gradients(p, q):
        p, q = (x.clone().requires_grad_() for x in (p, q))
        value = divergence(**{f"p_{form}": p, f"q_{form}": q})
        return torch.autograd.grad(value, (p, q))

    as_form = (lambda x: x) if form == "probs" else torch.log
    for masked, whole in zip(gradients(as_form(p), as_form(q)), gradients(as_form(p[:3]), as_form(q[:3])), strict=True):
        torch.testing.assert_close(masked[:3], whole)
        assert masked[3] == 0


def test_a_teacher_that_masks_what_the_student_allows_still_teaches():
    teacher = torch.tensor([1.0, 0.0, -INF])
    student = torch.tensor([0.0, 0.0, 0.0], requires_grad=True)
    kl_categorical(p_logits=teacher, q_logits=student).backward()
    torch.testing.assert_close(student.grad, student.detach().softmax(-1) - teacher.softmax(-1))


def test_nan_in_is_nan_out_and_not_a_category_that_counts_nothing():
    good, bad = torch.tensor([0.5, 0.5]), torch.tensor([math.nan, 1.0])
    assert kl_categorical(p_probs=bad, q_probs=good).isnan()
    assert kl_categorical(p_probs=good, q_probs=bad).isnan()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_probabilities_that_do_not_sum_to_1_are_refused(dtype):
    good, counts = torch.tensor([0.5, 0.5], dtype=dtype), torch.tensor([0.2, 0.3], dtype=dtype)
    with pytest.raises(VAEError, match="p_probs are no probabilities"):
        kl_categorical(p_probs=counts, q_probs=good)
    with pytest.raises(VAEError, match="q_probs"):
        jensen_shannon_categorical(p_probs=good, q_probs=torch.tensor([1.5, -0.5], dtype=dtype))
    third = torch.full((3,), 1 / 3, dtype=dtype)  # off by the dtype's own rounding
    assert kl_categorical(p_probs=third, q_probs=third) == 0


def test_log_probabilities_that_are_not_normalised_give_the_generalised_kl_which_is_never_negative(noise):
    p, q = randn(noise, 50, 4).exp(), randn(noise, 50, 4).exp()
    value = kl_categorical(p_log_probs=p.log(), q_log_probs=q.log())
    torch.testing.assert_close(value, (p * (p / q).log() - p + q).sum(-1))
    assert value.min() >= 0


# --- what is never negative -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("p", "q", "dtype", "expected"),
    [
        ([0.0, 1.0], [0.0, 1.0001], torch.float32, 2.4584e-10),
        ([0.0, 0.5], [0.0, 0.75], torch.bfloat16, 0.0017722),
    ],
)
def test_jensen_shannon_near_p_equal_to_q_has_its_value_in_low_precision(p, q, dtype, expected):
    p, q = torch.tensor(p, dtype=dtype), torch.tensor(q, dtype=dtype)
    exact = jensen_shannon_categorical(p_logits=p.double(), q_logits=q.double()).item()
    assert exact == pytest.approx(expected, rel=2e-3)
    assert jensen_shannon_categorical(p_logits=p, q_logits=q).item() == pytest.approx(exact, rel=0.01)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("divergence", DIVERGENCES.values(), ids=DIVERGENCES)
def test_divergences_of_near_neighbours_are_never_negative_and_vanish_at_equality(noise, divergence, dtype):
    logits = randn(noise, 2000, 50).float()
    for step in (1e-1, 1e-3, 1e-5, 0.0):
        p, q = logits.to(dtype), (logits + step * randn(noise, 2000, 50)).to(dtype)
        value = divergence(p_logits=p, q_logits=q)
        assert value.dtype == torch.float32 and value.min() >= 0
        torch.testing.assert_close(value, divergence(p_logits=p.float(), q_logits=q.float()), rtol=0, atol=0)
    assert value.max() < 1e-13


def test_kl_of_near_neighbours_and_its_gradient_keep_their_digits_in_single_precision(noise):
    p, step = randn(noise, 500, 20).float(), 1e-3 * randn(noise, 500, 20).float()
    q = (p + step).requires_grad_()
    value = kl_categorical(p_logits=p, q_logits=q)
    exact = kl_categorical(p_logits=p.double(), q_logits=q.detach().double())
    torch.testing.assert_close(value.double(), exact, rtol=1e-2, atol=0)
    gradient = torch.autograd.grad(value.sum(), q)[0]
    expected = q.detach().double().softmax(-1) - p.double().softmax(-1)
    torch.testing.assert_close(gradient.double(), expected, rtol=0, atol=1e-7)


def test_logits_of_any_size_give_finite_values_and_gradients():
    p = torch.tensor([1e4, 0.0, -1e4], requires_grad=True)
    q = torch.tensor([-1e4, 0.0, 1e4], requires_grad=True)
    value = kl_categorical(p_logits=p, q_logits=q)
    assert value.item() == 2e4
    for grad, expected in zip(torch.autograd.grad(value, (p, q)), ([0, 0, 0], [-1, 0, 1]), strict=True):
        torch.testing.assert_close(grad, torch.tensor(expected, dtype=torch.float32))


def test_gradients_of_categorical_divergences_pass_gradcheck(noise):
    p, q = (randn(noise, 3).requires_grad_() for _ in range(2))
    for divergence in DIVERGENCES.values():
        assert torch.autograd.gradcheck(lambda p, q: divergence(p_logits=p, q_logits=q), (p, q))  # noqa: B023
        assert torch.autograd.gradcheck(
            lambda p, q: divergence(p_probs=p.softmax(-1), q_log_probs=q.log_softmax(-1)),  # noqa: B023
            (p, q),
        )


def test_arguments_cannot_be_swapped_silently():
    p, q = torch.tensor([0.3, 0.7]), torch.tensor([0.6, 0.4])
    with pytest.raises(TypeError):
        kl_categorical(p, q)
    with pytest.raises(VAEError, match="exactly one of p_probs"):
        kl_categorical(q_probs=q)
    with pytest.raises(VAEError, match="exactly one of q_probs"):
        kl_categorical(p_probs=p, q_probs=q, q_logits=q.log())
    with pytest.raises(TypeError, match="p_logit:"):
        kl_categorical(p_logit=p, q_probs=q)
    for divergence in DIVERGENCES.values():
        with pytest.raises(VAEError, match="2 categories and q has 3"):
            divergence(p_probs=p, q_logits=torch.zeros(3))
        with pytest.raises(VAEError, match="2 categories and q has 1"):
            divergence(p_probs=p, q_probs=torch.ones(1))


def test_jensen_shannon_is_its_definition_symmetric_and_log_2_for_disjoint_supports(noise):
    p, q = randn(noise, 20, 5).softmax(-1), randn(noise, 20, 5).softmax(-1)
    m = 0.5 * (p + q)
    value = jensen_shannon_categorical(p_probs=p, q_probs=q)
    expected = 0.5 * (kl_categorical(p_probs=p, q_probs=m) + kl_categorical(p_probs=q, q_probs=m))
    torch.testing.assert_close(value, expected)
    torch.testing.assert_close(value, jensen_shannon_categorical(p_probs=q, q_probs=p))
    disjoint = jensen_shannon_categorical(p_probs=torch.tensor([0.4, 0.6, 0.0]), q_probs=torch.tensor([0.0, 0.0, 1.0]))
    assert disjoint.item() == pytest.approx(math.log(2), rel=1e-6)


def test_jensen_shannon_of_near_neighbours_is_a_quarter_of_their_kl(noise):
    logits, step = randn(noise, 6), 1e-3 * randn(noise, 6)
    near = {"p_logits": logits, "q_logits": logits + step}
    ratio = jensen_shannon_categorical(**near) / kl_categorical(**near)
    assert ratio.item() == pytest.approx(0.25, rel=1e-3)


# --- between the two directions ---------------------------------------------------------------------------------------


def test_jensen_shannon_of_any_beta_is_its_definition(noise):
    p, q = randn(noise, 20, 5).softmax(-1), randn(noise, 20, 5).softmax(-1)
    for beta in (0.1, 0.7):
        m = beta * p + (1 - beta) * q
        expected = beta * kl_categorical(p_probs=p, q_probs=m) + (1 - beta) * kl_categorical(p_probs=q, q_probs=m)
        torch.testing.assert_close(jensen_shannon_categorical(p_probs=p, q_probs=q, beta=beta), expected)
        scaled = jensen_shannon_categorical(p_probs=p, q_probs=q, beta=beta, scaled=True)
        torch.testing.assert_close(scaled, expected / (beta * (1 - beta)))


@pytest.mark.parametrize(
    ("divergence", "of"),
    [(partial(jensen_shannon_categorical, scaled=True), "beta"), (alpha_divergence_categorical, "alpha")],
)
def test_the_ends_of_a_family_are_both_kls_and_are_met_without_a_jump_in_value_and_gradient(noise, divergence, of):
    p, q = randn(noise, 6), randn(noise, 6).requires_grad_()
    there, back = kl_categorical(p_logits=p, q_logits=q), kl_categorical(p_logits=q, q_logits=p)
    at_0, at_1 = (there, back) if of == "beta" else (back, there)
    for at, step, expected in ((0.0, 1e-6, at_0), (1.0, -1e-6, at_1)):
        for parameter in (at, at + step):
            value = divergence(p_logits=p, q_logits=q, **{of: parameter})
            assert value.item() == pytest.approx(expected.item(), rel=1e-5 if step else 1e-12)
            gradients = [torch.autograd.grad(x, q, retain_graph=True)[0] for x in (value, expected)]
            torch.testing.assert_close(*gradients, rtol=1e-5, atol=1e-6)


def test_the_published_jensen_shannon_jumps_at_its_ends(noise):
    p, q = randn(noise, 50), randn(noise, 50).requires_grad_()
    sizes = [
        torch.autograd.grad(jensen_shannon_categorical(p_logits=p, q_logits=q, beta=beta), q)[0].norm()
        for beta in (0.0, 0.01)
    ]
    assert sizes[0] > 50 * sizes[1]


def test_skewed_kl_is_its_definition_ends_in_kl_and_is_bounded_by_the_share(noise):
    p, q = randn(noise, 20, 5).softmax(-1), randn(noise, 20, 5).softmax(-1)
    expected = kl_categorical(p_probs=p, q_probs=0.3 * p + 0.7 * q)
    torch.testing.assert_close(skewed_kl_categorical(p_probs=p, q_probs=q, alpha=0.3), expected)
    whole = kl_categorical(p_probs=p, q_probs=q)
    torch.testing.assert_close(skewed_kl_categorical(p_probs=p, q_probs=q, alpha=0.0), whole)
    torch.testing.assert_close(skewed_kl_categorical(p_probs=p, q_probs=q, alpha=1e-9), whole, rtol=1e-6, atol=1e-6)
    disjoint = skewed_kl_categorical(p_probs=torch.tensor([1.0, 0.0]), q_probs=torch.tensor([0.0, 1.0]), alpha=0.1)
    assert disjoint.item() == pytest.approx(-math.log(0.1))


def test_alpha_divergence_is_its_definition_and_finite_where_one_side_lacks_mass(noise):
    p, q = randn(noise, 20, 5).softmax(-1), randn(noise, 20, 5).softmax(-1)
    for alpha in (-1.0, 0.3, 0.5, 2.0):
        expected = ((p**alpha * q ** (1 - alpha)).sum(-1) - 1) / (alpha * (alpha - 1))
        torch.testing.assert_close(alpha_divergence_categorical(p_probs=p, q_probs=q, alpha=alpha), expected)
    p, q = torch.tensor([0.5, 0.5, 0.0]), torch.tensor([0.5, 0.0, 0.5])
    for alpha, expected in ((0.5, 2.0), (2.0, INF), (-1.0, INF), (0.25, (0.5 - 1) / (0.25 * -0.75))):
        value = alpha_divergence_categorical(p_probs=p, q_probs=q, alpha=alpha)
        assert value.item() == pytest.approx(expected)
    far = alpha_divergence_categorical(
        p_logits=torch.tensor([0.0, 300.0]), q_logits=torch.tensor([300.0, 0.0]), alpha=0.5
    )
    assert far.item() == pytest.approx(4.0)  # 4 squared Hellinger distances of at most 1


def test_total_variation_is_half_the_difference_and_within_pinskers_bound(noise):
    p, q = torch.tensor([0.3, 0.5, 0.2]), torch.tensor([0.35, 0.4, 0.25])
    assert total_variation_categorical(p_probs=p, q_probs=q).item() == pytest.approx(0.1)
    logits = {"p_logits": randn(noise, 500, 5), "q_logits": randn(noise, 500, 5)}
    assert (total_variation_categorical(**logits) <= (kl_categorical(**logits) / 2).sqrt()).all()


def test_shares_out_of_range_are_refused():
    pair = {"p_logits": torch.zeros(2), "q_logits": torch.zeros(2)}
    for divergence in (
        partial(jensen_shannon_categorical, beta=1.5),
        partial(jensen_shannon_categorical, beta=-0.1),
        partial(skewed_kl_categorical, alpha=1.0),
        partial(skewed_kl_categorical, alpha=-0.5),
    ):
        with pytest.raises(VAEError, match="share of p"):
            divergence(**pair)


# --- Monte Carlo ------------------------------------------------------------------------------------------------------


def test_mixtures_of_few_components_under_vmap_are_each_by_itself():
    noise = torch.Generator().manual_seed(0)
    parts = [torch.randn(shape, generator=noise, dtype=torch.float64) for shape in ((3, 4), (3, 4, 2), (3, 4, 2))]
    x = torch.randn(3, 5, 2, generator=noise, dtype=torch.float64)
    together = torch.vmap(lambda *of_one: GaussianMixture(*of_one[:3]).log_prob(of_one[3]))(*parts, x)
    for run in range(3):
        own = GaussianMixture(*(part[run] for part in parts)).log_prob(x[run])
        torch.testing.assert_close(together[run], own, rtol=1e-13, atol=1e-13)
    many = torch.zeros(2, 65), torch.zeros(2, 65, 2), torch.zeros(2, 65, 2)
    with pytest.raises(RuntimeError, match="data-dependent"):
        torch.vmap(lambda *of_one: GaussianMixture(*of_one).log_prob(torch.zeros(2)))(*many)


def mixture(weights, means, deviations) -> GaussianMixture:
    to = torch.float64
    return GaussianMixture(
        torch.tensor(weights, dtype=to).log(),
        torch.tensor(means, dtype=to)[:, None],
        2 * torch.tensor(deviations, dtype=to).log()[:, None],
    )


def test_mixture_density_is_that_of_torch_distributions(noise):
    logits, mean, log_var = randn(noise, 4), randn(noise, 4, 3), randn(noise, 4, 3)
    x = 3 * randn(noise, 50, 3)
    components = torch.distributions.Independent(Normal(mean, (0.5 * log_var).exp()), 1)
    expected = MixtureSameFamily(Categorical(logits=logits), components).log_prob(x)
    torch.testing.assert_close(GaussianMixture(logits, mean, log_var).log_prob(x), expected)


def test_mixture_density_in_single_precision_survives_narrow_components_far_away(noise):
    logits, mean, x = randn(noise, 50), 8 + randn(noise, 50, 40), 8 + randn(noise, 20, 40)
    log_var = -5 + randn(noise, 50, 40)
    narrow = GaussianMixture(logits.float(), mean.float(), log_var.float())
    exact = GaussianMixture(*(part.double() for part in narrow)).log_prob(x.float().double())
    torch.testing.assert_close(narrow.log_prob(x.float()).double(), exact, rtol=1e-6, atol=0)


def test_mixture_density_of_needles_far_from_the_origin_is_exact():
    # the square of the distance in units of e^-15, expanded, would cancel 2.5e14 against itself
    mean, log_var = torch.tensor([[5.0, -5.0]]), torch.full((1, 2), -30.0)
    x = mean + torch.tensor([[0.0, 0.0], [3e-7, 0.0], [5e-7, -1e-6]])
    value = GaussianMixture(torch.zeros(1), mean.double(), log_var.double()).log_prob(x.double())
    distance = (x.double() - mean.double()).square().sum(-1) * math.exp(30)
    torch.testing.assert_close(value, -0.5 * distance + 30 - math.log(2 * math.pi))
    single = GaussianMixture(torch.zeros(1), mean, torch.full((1, 2), -300.0)).log_prob(mean)
    assert single.item() == pytest.approx(300 - math.log(2 * math.pi))
    beyond = GaussianMixture(torch.zeros(1), torch.zeros(1, 2), torch.full((1, 2), -800.0))  # of a precision of inf
    assert beyond.log_prob(torch.zeros(2)).item() == pytest.approx(800 - math.log(2 * math.pi))


def test_mixture_density_is_the_same_by_products_and_by_blocks(noise):
    logits, mean, log_var = randn(noise, 4), 1e3 * randn(noise, 4, 3), -8 + randn(noise, 4, 3)
    x = mean[1] + 0.1 * randn(noise, 50, 3)
    components = torch.distributions.Independent(Normal(mean, (0.5 * log_var).exp()), 1)
    expected = MixtureSameFamily(Categorical(logits=logits), components).log_prob(x)
    torch.testing.assert_close(GaussianMixture(logits, mean, log_var).log_prob(x), expected)


def test_mixture_samples_have_its_mean_and_covariance(noise):
    q = mixture([0.2, 0.8], [-3.0, 1.0], [0.5, 2.0])
    x = q.sample(200_000, noise)
    mean = 0.2 * -3 + 0.8 * 1
    variance = 0.2 * (0.25 + 9) + 0.8 * (4 + 1) - mean**2
    assert x.mean().item() == pytest.approx(mean, abs=4 * math.sqrt(variance / 200_000))
    assert x.var().item() == pytest.approx(variance, rel=0.02)


@pytest.mark.parametrize(
    ("p", "q", "expected"),
    [  # one Gaussian fitted to 1/2 N(-2, 1/4) + 1/2 N(2, 1/4) both ways (Minka 2005), exact to five digits
        (([0.5, 0.5], [-2.0, 2.0], [0.5, 0.5]), ([1.0], [0.0], [2.0616]), 0.72355),
        (([1.0], [1.9998], [0.5004]), ([0.5, 0.5], [-2.0, 2.0], [0.5, 0.5]), 0.69305),
        (([1.0], [0.0], [1.7364]), ([0.5, 0.5], [-2.0, 2.0], [0.5, 0.5]), 1.8712),
    ],
)
def test_monte_carlo_kl_of_mixtures_is_the_exact_one_within_four_standard_errors(noise, p, q, expected):
    estimate = kl_monte_carlo(p=mixture(*p), q=mixture(*q), n=100_000, generator=noise)
    assert abs(estimate.value.item() - expected) < 4 * estimate.standard_error.item() + 1e-4
    assert estimate.standard_error < 0.02


def test_the_standard_error_is_the_deviation_over_repeats(noise):
    p, q = mixture([1.0], [0.0], [1.0]), mixture([1.0], [1.0], [1.0])  # log p - log q is N(1/2, 1)
    repeats = [kl_monte_carlo(p=p, q=q, n=100, generator=noise) for _ in range(400)]
    values, errors = (torch.stack(column) for column in zip(*repeats, strict=True))
    assert errors.mean().item() == pytest.approx(0.1, rel=0.02)
    assert values.std().item() == pytest.approx(0.1, rel=0.15)
    assert values.mean().item() == pytest.approx(0.5, abs=4 * 0.1 / 20)


def test_monte_carlo_draws_from_the_generator_it_is_given_and_no_other():
    p, q = mixture([0.5, 0.5], [-1.0, 1.0], [1.0, 1.0]), mixture([1.0], [0.0], [1.0])
    before = torch.get_rng_state()
    a, b = (kl_monte_carlo(p=p, q=q, n=10, generator=torch.Generator().manual_seed(3)).value for _ in range(2))
    assert a == b
    assert torch.equal(before, torch.get_rng_state())


def test_one_sample_is_refused_since_it_has_no_standard_error(noise):
    q = mixture([1.0], [0.0], [1.0])
    with pytest.raises(VAEError, match="two samples"):
        kl_monte_carlo(p=q, q=q, n=1, generator=noise)


# --- estimators -------------------------------------------------------------------------------------------------------


def gaussian_log_ratio(mu: float) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """Log-densities of pi = N(0, 1) and pi_ref = N(mu, 1) at Gauss-Hermite nodes, and pi's quadrature weights."""
    nodes, weights = np.polynomial.hermite_e.hermegauss(80)
    x = torch.from_numpy(nodes)
    logs = {"log_pi": -0.5 * x.square(), "log_ref": -0.5 * (x - mu).square()}
    return logs, torch.from_numpy(weights / weights.sum())


@pytest.mark.parametrize("mu", [0.1, 1.0])
def test_bias_and_deviation_of_the_estimators_are_schulmans_by_quadrature(mu):
    logs, weights = gaussian_log_ratio(mu)
    true = mu**2 / 2
    exact = {
        k1: (0, 2 / mu),
        k2: (mu**2 / 4, math.sqrt(2 + mu**2)),
        k3: (0, 2 * math.sqrt(math.exp(mu**2) - 1 - mu**2) / mu**2),
    }
    for estimator, (bias, deviation) in exact.items():
        values = estimator(**logs) / true
        mean = (weights * values).sum().item()
        assert mean - 1 == pytest.approx(bias, abs=1e-9)
        assert math.sqrt((weights * (values - mean).square()).sum()) == pytest.approx(deviation, rel=1e-6)


def test_k2_and_k3_are_never_negative_and_k1_is_where_pi_is_below_the_reference(noise):
    log_pi, log_ref = -randn(noise, 10_000).exp(), -randn(noise, 10_000).exp()
    assert k2(log_pi=log_pi, log_ref=log_ref).min() >= 0
    assert k3(log_pi=log_pi, log_ref=log_ref).min() >= 0
    assert torch.equal(k1(log_pi=log_pi, log_ref=log_ref) < 0, log_pi < log_ref)


def test_k3_keeps_its_digits_where_pi_is_almost_the_reference():
    log_ref = torch.tensor([1e-2, -1e-2], dtype=torch.float32)
    value = k3(log_pi=torch.zeros(2), log_ref=log_ref).double()
    exact = log_ref.double().square() / 2 + log_ref.double() ** 3 / 6
    torch.testing.assert_close(value, exact, rtol=1e-4, atol=0)


def expected_gradient(loss_of_logs, logits, ref_logits):
    """E_pi[grad loss(log pi(x), log pi_ref(x))] with the samples held fixed: exact, by going through all of them."""
    logits = logits.clone().requires_grad_()
    log_pi = logits.log_softmax(-1)
    losses = loss_of_logs(log_pi=log_pi, log_ref=ref_logits.log_softmax(-1))
    return torch.autograd.grad((log_pi.exp().detach() * losses).sum(), logits)[0]


def true_gradient(kl_of_logs, logits, ref_logits):
    logits = logits.clone().requires_grad_()
    return torch.autograd.grad(kl_of_logs(logits, ref_logits), logits)[0]


@pytest.fixture
def policies(noise):
    return 2 * randn(noise, 7), 2 * randn(noise, 7)


def reverse(pi, ref):
    return kl_categorical(p_logits=pi, q_logits=ref)


def forward(pi, ref):
    return kl_categorical(p_logits=ref, q_logits=pi)


def test_k1_as_a_loss_has_no_gradient_in_expectation(policies):
    torch.testing.assert_close(expected_gradient(k1, *policies), torch.zeros(7).double())


def test_k2_as_a_loss_has_the_gradient_of_the_reverse_kl(policies):
    torch.testing.assert_close(expected_gradient(k2, *policies), true_gradient(reverse, *policies))


def test_k3_as_a_loss_has_the_gradient_of_the_forward_kl(policies):
    torch.testing.assert_close(expected_gradient(k3, *policies), true_gradient(forward, *policies))
    assert (true_gradient(forward, *policies) - true_gradient(reverse, *policies)).abs().max() > 0.1


def test_k1_in_the_reward_has_the_gradient_of_the_reverse_kl(policies):
    def score(*, log_pi, log_ref):
        return k1(log_pi=log_pi, log_ref=log_ref).detach() * log_pi

    torch.testing.assert_close(expected_gradient(score, *policies), true_gradient(reverse, *policies))


def test_k3_in_the_reward_has_the_gradient_of_neither_direction(policies):
    def score(*, log_pi, log_ref):
        return k3(log_pi=log_pi, log_ref=log_ref).detach() * log_pi

    gradient = expected_gradient(score, *policies)
    for direction in (reverse, forward):
        assert (gradient - true_gradient(direction, *policies)).abs().max() > 0.1


@pytest.mark.parametrize("estimator", [k1, k2, k3])
def test_estimators_of_low_precision_are_those_of_the_same_numbers_in_single(estimator):
    log_pi, log_ref = torch.tensor([-13.0, -2.0]).half(), torch.tensor([-1.0, -2.5]).half()  # exp(12) is beyond float16
    value = estimator(log_pi=log_pi, log_ref=log_ref)
    assert torch.equal(value, estimator(log_pi=log_pi.float(), log_ref=log_ref.float()))


# --- units ------------------------------------------------------------------------------------------------------------


def test_a_fair_coin_against_a_certain_one_is_one_bit():
    nats = kl_categorical(p_probs=torch.tensor([1.0, 0.0]), q_probs=torch.tensor([0.5, 0.5]))
    assert nats_to_bits(nats).item() == pytest.approx(1.0)
    assert bits_to_nats(nats_to_bits(1.7)) == pytest.approx(1.7)
