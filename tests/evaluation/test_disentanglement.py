"""Disentanglement metrics against closed forms, scikit-learn, and a slow reading of the definitions in plain loops."""

import inspect
import subprocess
import sys

import numpy as np
import pytest
from scipy.integrate import trapezoid
from scipy.linalg import sqrtm
from scipy.special import logsumexp
from scipy.stats import chisquare, norm
from sklearn.ensemble import GradientBoostingClassifier
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import mutual_info_score, roc_auc_score
from sklearn.svm import LinearSVC

from vae.errors import VAEError
from vae.evaluation.disentanglement import (
    METRICS,
    QUICK,
    Codes,
    dci,
    dci_fast,
    evaluate,
    explicitness,
    factor_vae,
    floor_and_ceiling,
    irs,
    mig,
    mig_chen,
    modularity,
    sap,
    summarise_over_seeds,
    udr,
    unsupervised,
)
from vae.evaluation.disentanglement.information import discretise, gap, log_mixture, mutual_information
from vae.evaluation.disentanglement.prediction import concentration
from vae.evaluation.disentanglement.unsupervised import (
    gaussian_total_correlation,
    gaussian_wasserstein_correlation,
    relative_strength,
)

DSPRITES = (3, 6, 40, 32, 32)
SMALL = (3, 4, 5)
FEW = {  # constants small enough for an everyday test
    "num_train": 1000,
    "num_test": 500,
    "num_train_batches": 300,
    "num_eval_batches": 200,
    "num_train_votes": 300,
    "num_eval_votes": 200,
    "num_samples": 600,
    "n_jobs": 1,
}


def few(names):
    """Those of the small constants that these metrics have."""
    return {key: FEW[key] for name in names for key in inspect.signature(METRICS[name]).parameters if key in FEW}


def grid(sizes):
    return np.stack([v.ravel() for v in np.meshgrid(*map(np.arange, sizes), indexing="ij")], axis=1)


def standardised(factors):
    return (factors - factors.mean(axis=0)) / factors.std(axis=0)


def rotation(dim, seed=0):
    return np.linalg.qr(np.random.default_rng(seed).standard_normal((dim, dim)))[0]


def only(scores, ending=""):
    """The one value whose key ends so."""
    (value,) = [value for key, value in scores.items() if key.endswith(ending)]
    return value


def perfect(sizes=SMALL, **fields):
    z = standardised(grid(sizes))
    return Codes(z, grid(sizes), sizes, np.full(z.shape, 2 * np.log(0.01)), kl=np.ones(z.shape[1]), **fields)


def random_code(sizes=SMALL, repeat=1, dim=4):
    factors = np.tile(grid(sizes), (repeat, 1))
    z = np.random.default_rng(3).standard_normal((len(factors), dim))
    return Codes(z, factors, sizes, np.zeros(z.shape))


def entangled(num_points=900, sizes=SMALL, seed=5):
    """Points (not a grid) whose codes are a noisy, partly mixed, partly nonlinear function of the factors."""
    rng = np.random.default_rng(seed)
    factors = rng.integers(0, sizes, size=(num_points, len(sizes)))
    z = standardised(factors)
    z = np.column_stack([z[:, 0] + 0.4 * z[:, 1], z[:, 1], np.tanh(z[:, 2]), z[:, 2] ** 2, np.zeros(num_points)])
    return Codes(z + 0.3 * rng.standard_normal(z.shape) * (z.std(axis=0) > 0), factors, sizes)


# --- mutual information and bins ---


def test_mutual_information_equals_scikit_learn():
    rng = np.random.default_rng(0)
    a = np.column_stack([rng.integers(0, 20, 5000), rng.integers(0, 2, 5000), np.full(5000, 7)])
    b = np.column_stack([(a[:, 0] + rng.integers(0, 3, 5000)) % 40, a[:, 1], rng.integers(0, 5, 5000)])
    expected = [[mutual_info_score(x, y) for y in b.T] for x in a.T]
    np.testing.assert_allclose(mutual_information(a, b), expected, atol=1e-12, rtol=0)


def test_mutual_information_of_independent_factors_on_a_grid_is_exactly_zero():
    information = mutual_information(grid(SMALL), grid(SMALL))
    assert np.all(information[~np.eye(3, dtype=bool)] == 0)
    np.testing.assert_allclose(np.diag(information), np.log(SMALL), rtol=1e-14)


def test_bins_have_equal_width_and_the_maximum_falls_into_the_last():
    z = np.column_stack([np.linspace(0, 1, 41), np.full(41, 0.1)])
    binned = discretise(z, 4)
    assert binned[:, 0].tolist() == [1] * 10 + [2] * 10 + [3] * 10 + [4] * 11
    assert len(set(binned[:, 1])) == 1


def test_gap_is_the_best_minus_the_second_and_a_single_latent_has_no_rival():
    np.testing.assert_allclose(gap(np.array([[0.1, 0.9], [0.5, 0.2], [0.4, 0.3]])), [0.1, 0.6])
    np.testing.assert_allclose(gap(np.array([[0.1, 0.9]])), [0.1, 0.9])


# --- a slow reading of the definitions, on the very arrays that the metric draws for the same seed ---


def slow_bins(z):
    return np.stack([np.digitize(c, np.histogram(c, 20)[1][:-1]) for c in z.T], axis=1)


def slow_information(z, v):
    binned = slow_bins(z)
    return np.array([[mutual_info_score(v[:, j], binned[:, i]) for j in range(v.shape[1])] for i in range(z.shape[1])])


def slow_mig(z, v, *_):
    m, total = slow_information(z, v), 0.0
    for j in range(v.shape[1]):
        first, second = sorted(m[:, j])[::-1][:2]
        total += (first - second) / mutual_info_score(v[:, j], v[:, j])
    return {"mig/means_20bins": total / v.shape[1]}


def slow_modularity(z, v, *_):
    scores = []
    for row in slow_information(z, v) ** 2:
        best = max(row)
        scores.append(0.0 if best == 0 else 1 - (sum(row) - best) / (best * (len(row) - 1)))
    return {"modularity/means_20bins": np.mean(scores)}


def slow_sap(z, v, z_test, v_test, _):
    svm, r2 = np.zeros((2, z.shape[1], v.shape[1]))
    for i in range(z.shape[1]):
        for j in range(v.shape[1]):
            model = LinearSVC(C=0.01, class_weight="balanced").fit(z[:, [i]], v[:, j])
            svm[i, j] = np.mean(model.predict(z_test[:, [i]]) == v_test[:, j])
            if np.var(z[:, i]) > 1e-12:
                r2[i, j] = np.corrcoef(z[:, i], v[:, j])[0, 1] ** 2
    svm, r2 = np.sort(svm, axis=0), np.sort(r2, axis=0)
    return {"sap/means_svm": np.mean(svm[-1] - svm[-2]), "sap/means_r2": np.mean(r2[-1] - r2[-2])}


def slow_explicitness(z, v, z_test, v_test, _):
    z_test, z = [np.nan_to_num((x - z.mean(axis=0)) / z.std(axis=0)) for x in (z_test, z)]
    train, test = [], []
    for j in range(v.shape[1]):
        probabilities = {"train": [], "test": []}
        for value in range(max(v[:, j]) + 1):  # the rest against one, then normalised over classes
            model = LogisticRegression(solver="liblinear").fit(z, v[:, j] == value)
            probabilities["train"].append(model.predict_proba(z)[:, 1])
            probabilities["test"].append(model.predict_proba(z_test)[:, 1])
        for out, labels, p in ((train, v, probabilities["train"]), (test, v_test, probabilities["test"])):
            p = np.array(p) / np.sum(p, axis=0)
            out.append(np.mean([roc_auc_score(labels[:, j] == value, p[value]) for value in range(len(p))]))
    return {"explicitness/means_train": np.mean(train), "explicitness/means_test": np.mean(test)}


def slow_irs(z, v, *_):
    z = z[:, z.var(axis=0) > 0]
    binned, scores, weights = slow_bins(v), [], []
    for i in range(z.shape[1]):
        largest = max(abs(z[:, i] - np.mean(z[:, i])))
        robust = []
        for j in range(v.shape[1]):
            moved = []
            for value in set(binned[:, j]):
                group = z[binned[:, j] == value, i]
                moved.append(np.quantile(abs(group - np.mean(group)), 0.99))
            robust.append(1 - np.mean(moved) / largest)
        scores.append(max(robust))
        weights.append(largest)
    score = sum(s * w for s, w in zip(scores, weights, strict=True)) / sum(weights)
    return {"irs/means_20bins": score, "irs/means_20bins_active_dims": z.shape[1]}


def slow_unsupervised(z, *_):
    binned, pairs = slow_bins(z), []
    for i in range(z.shape[1]):
        pairs += [mutual_info_score(binned[:, i], binned[:, j]) for j in range(z.shape[1]) if i != j]
    c = np.cov(z[:, z.var(axis=0) > 0].T)
    wasserstein = np.real(2 * np.trace(c) - 2 * np.trace(sqrtm(c * np.diag(c)[:, None])))
    return {
        "unsupervised/means_gaussian_tc": 0.5 * (np.sum(np.log(np.diag(c))) - np.log(np.linalg.det(c))),
        "unsupervised/means_gaussian_wasserstein": wasserstein,
        "unsupervised/means_gaussian_wasserstein_norm": wasserstein / np.trace(c),
        "unsupervised/means_mi_20bins": np.mean(pairs),
    }


def slow_dci(z, v, z_test, v_test, rng):
    importance, train, test = [], [], []
    seeds = rng.integers(2**31, size=v.shape[1])  # which of two equally good splits is taken moves D by .005
    for j in range(v.shape[1]):
        model = GradientBoostingClassifier(random_state=int(seeds[j])).fit(z, v[:, j])
        importance.append(abs(model.feature_importances_))
        train.append(np.mean(model.predict(z) == v[:, j]))
        test.append(np.mean(model.predict(z_test) == v_test[:, j]))
    r = np.array(importance).T

    def one_minus_entropy(row):
        p = (row + 1e-11) / np.sum(row + 1e-11)
        return 1 + np.sum(p * np.log(p)) / np.log(len(p))

    d = sum(one_minus_entropy(r[i]) * r[i].sum() / r.sum() for i in range(len(r)))
    c = sum(one_minus_entropy(r[:, j]) * r[:, j].sum() / r.sum() for j in range(r.shape[1]))
    return {
        "dci/means_disentanglement": d,
        "dci/means_completeness": c,
        "dci/means_informativeness_train": np.mean(train),
        "dci/means_informativeness_test": np.mean(test),
    }


@pytest.mark.parametrize(
    ("metric", "slow"),
    [
        (mig, slow_mig),
        (modularity, slow_modularity),
        (sap, slow_sap),
        (explicitness, slow_explicitness),
        (irs, slow_irs),
        (unsupervised, slow_unsupervised),
        (dci, slow_dci),
    ],
)
@pytest.mark.filterwarnings("ignore:invalid value")
def test_metric_equals_its_definition_in_plain_loops(metric, slow):
    codes = entangled(300, (2, 2, 3)) if metric is dci else entangled()
    constants = {"num_train": len(codes.codes)}
    if metric in (sap, explicitness, dci):
        constants = {"num_train": len(codes.codes) * 2 // 3, "num_test": len(codes.codes) // 3}
    if metric is dci:
        constants["n_jobs"] = 1
    rng = np.random.default_rng(11)
    expected = slow(*codes.split(constants["num_train"], constants.get("num_test", 0), rng), rng)
    scores = metric(codes, 11, **constants)
    assert scores.keys() == expected.keys()
    for key, value in scores.items():
        assert value == pytest.approx(expected[key], abs=5e-4 if key == "sap/means_svm" else 1e-9), key


# --- perfect, random and rotated codes ---


def test_perfect_code_gets_one_wherever_one_is_the_maximum():
    scores = evaluate(perfect(), 0, [*QUICK, "dci_fast"], **FEW)
    for key in (
        "beta_vae/means",
        "factor_vae/means",
        "mig/means_20bins",
        "mig_chen/samples",
        "sap/means_r2",
        "modularity/means_20bins",
        "irs/means_20bins",
        "dci_fast/means_disentanglement",
        "dci_fast/means_completeness",
        "dci_fast/means_informativeness_test",
    ):
        assert scores[key] == pytest.approx(1, abs=0.02), key  # 1,000 points leave chance correlations of .001


@pytest.mark.slow
def test_ceilings_and_floors_on_dsprites_are_the_documented_ones():
    bounds = floor_and_ceiling(grid(DSPRITES), DSPRITES, 0, ["mig", "modularity", "irs"])
    bounds |= floor_and_ceiling(grid(DSPRITES), DSPRITES, 0, ["sap"], latent_dim=2)
    for key, value, tolerance in (
        ("mig/means_20bins/ceiling", 0.896, 0.003),
        ("sap/means_svm/ceiling", 0.246, 0.004),
        ("modularity/means_20bins/ceiling", 1.0, 0.001),
        ("mig/means_20bins/floor", 0.0, 0.005),
        ("sap/means_svm/floor", 0.0, 0.02),
        ("modularity/means_20bins/floor", 0.64, 0.08),
        ("irs/means_20bins/floor", 0.34, 0.04),
    ):
        assert bounds[key] == pytest.approx(value, abs=tolerance), key


def test_random_code_gets_what_guessing_gets():
    names = ["beta_vae", "factor_vae", "explicitness", "mig_chen"]
    factors = np.tile(grid(SMALL), (20, 1))
    bounds = floor_and_ceiling(factors, SMALL, 0, names, latent_dim=4, **few(names) | {"num_train": 700})
    assert bounds["beta_vae/means/floor"] == pytest.approx(1 / 3, abs=0.1)
    assert bounds["factor_vae/means/floor"] == pytest.approx(1 / 3, abs=0.1)
    assert bounds["explicitness/means_test/floor"] == pytest.approx(0.5, abs=0.06)
    assert bounds["mig_chen/samples/floor"] == pytest.approx(0, abs=0.05)


@pytest.mark.slow
def test_rotation_lowers_what_claims_to_measure_alignment():
    straight = perfect()
    turned = Codes(straight.codes @ rotation(3), straight.factors, SMALL, straight.log_variances)
    names = ["mig", "mig_chen", "sap", "modularity", "irs", "dci_fast"]
    before, after = (evaluate(codes, 0, names, **few(names)) for codes in (straight, turned))
    for key in (
        "mig/means_20bins",
        "mig_chen/samples",
        "sap/means_svm",
        "sap/means_r2",
        "modularity/means_20bins",
        "irs/means_20bins",
        "dci_fast/means_disentanglement",
        "dci_fast/means_completeness",
    ):
        assert after[key] < before[key] - 0.1, key


def test_constant_latents_halve_modularity_and_leave_mig_alone():
    straight = perfect()
    padded = Codes(np.column_stack([straight.codes, np.full((60, 3), 0.1)]), straight.factors, SMALL)
    assert only(modularity(padded, 0, num_train=1000)) == pytest.approx(
        only(modularity(straight, 0, num_train=1000)) / 2
    )
    assert only(mig(padded, 0, num_train=1000)) == pytest.approx(only(mig(straight, 0, num_train=1000)), abs=0.02)


def test_no_score_depends_on_the_order_of_the_latents():
    codes, order = entangled(1800), [3, 1, 4, 0, 2]
    shuffled = Codes(codes.codes[:, order], codes.factors, SMALL)
    names = [name for name in METRICS if name not in ("mig_chen", "dci", "dci_fast")]
    before, after = (evaluate(c, 7, names, **few(names)) for c in (codes, shuffled))
    for key, value in before.items():
        assert after[key] == pytest.approx(value, abs=1e-3), key


# --- Chen's MIG ---


def test_log_mixture_equals_log_sum_exp():
    rng = np.random.default_rng(0)
    mean, sd = rng.standard_normal(700), np.exp(rng.standard_normal(700))
    z = mean[:600] + sd[:600] * rng.standard_normal(600)
    expected = logsumexp(norm.logpdf(z[:, None], mean, sd), axis=1) - np.log(700)
    np.testing.assert_allclose(log_mixture(z, mean, sd), expected, rtol=1e-12)


def test_chens_mig_equals_quadrature():
    sizes, rng = (4, 3), np.random.default_rng(1)
    factors = grid(sizes)
    mean = standardised(factors) @ np.array([[1.0, 0.3], [0.2, 0.8]])
    sd = rng.uniform(0.2, 0.7, mean.shape)
    z = np.linspace(-8, 8, 20_001)
    information = np.zeros((2, 2))
    for i in range(2):
        p = norm.pdf(z[:, None], mean[:, i], sd[:, i])  # (z, points)
        for j in range(2):
            for value in range(sizes[j]):
                inside = p[:, factors[:, j] == value].mean(axis=1)
                share = np.mean(factors[:, j] == value)
                ratio = np.log(np.maximum(inside, 1e-300) / np.maximum(p.mean(axis=1), 1e-300))
                information[i, j] += share * trapezoid(inside * ratio, z)
    exact = np.mean(np.abs(information[0] - information[1]) / np.log(sizes))
    score = mig_chen(Codes(mean, factors, sizes, 2 * np.log(sd)), 0, num_samples=40_000)
    assert score["mig_chen/samples"] == pytest.approx(exact, abs=0.01)


def test_chens_mig_is_relative_to_the_entropy_of_the_factor_as_it_is_spread_here():
    factors = (np.arange(100) < 10).astype(np.int64)[:, None]  # one in ten: an entropy of 0.325 nats, not of log 2
    codes = np.column_stack([factors[:, 0], np.zeros(100)]).astype(np.float64)
    narrow = Codes(codes, factors, (2,), np.full((100, 2), 2 * np.log(0.01)))
    assert only(mig_chen(narrow, 0, num_samples=1000)) == pytest.approx(1, abs=1e-6)


def test_chens_mig_of_posteriors_that_are_all_the_prior_is_zero():
    factors = grid(SMALL)
    codes = Codes(np.zeros((60, 2)), factors, SMALL, np.zeros((60, 2)))
    assert only(mig_chen(codes, 0, num_samples=200)) == pytest.approx(0, abs=1e-12)


def test_chens_mig_without_shape_is_reported_where_shape_is_known():
    straight = perfect(factor_names=("shape", "scale", "x"))
    blind = Codes(
        straight.codes * [0, 1, 1], straight.factors, SMALL, straight.log_variances, factor_names=straight.factor_names
    )
    scores = mig_chen(blind, 0, num_samples=600)
    assert scores["mig_chen/samples"] == pytest.approx(2 / 3, abs=1e-6)
    assert scores["mig_chen/samples_without_shape"] == pytest.approx(1, abs=1e-6)


# --- unsupervised scores ---


@pytest.mark.parametrize("dim", [2, 5])
def test_total_correlation_and_wasserstein_of_equal_correlations_are_the_closed_forms(dim):
    rho, rng = 0.6, np.random.default_rng(0)
    cov = np.full((dim, dim), rho) + (1 - rho) * np.eye(dim)
    eigenvalues = np.array([1 + (dim - 1) * rho] + [1 - rho] * (dim - 1))
    tc, wasserstein = -0.5 * np.log(eigenvalues).sum(), 2 * dim - 2 * np.sqrt(eigenvalues).sum()
    assert gaussian_total_correlation(cov) == pytest.approx(tc, rel=1e-12)
    assert gaussian_wasserstein_correlation(cov) == pytest.approx(wasserstein, rel=1e-12)
    white = rng.standard_normal((60, dim))
    white = np.linalg.qr(white - white.mean(axis=0))[0] * np.sqrt(59)  # sample covariance exactly the identity
    codes = Codes(white @ np.linalg.cholesky(cov).T, np.arange(60)[:, None] % 2, (2,))
    scores = unsupervised(codes, 0, num_train=60)
    assert scores["unsupervised/means_gaussian_tc"] == pytest.approx(tc, rel=1e-9)
    assert scores["unsupervised/means_gaussian_wasserstein"] == pytest.approx(wasserstein, rel=1e-9)
    assert scores["unsupervised/means_gaussian_wasserstein_norm"] == pytest.approx(wasserstein / dim, rel=1e-9)


def test_independent_latents_depend_on_one_another_by_nothing_and_never_by_less():
    rng = np.random.default_rng(0)
    covariances = [np.diag(rng.random(9)) for _ in range(100)]
    for measure in (gaussian_total_correlation, gaussian_wasserstein_correlation):
        values = [measure(cov) for cov in covariances]
        assert min(values) == 0 and max(values) < 1e-14


def test_total_correlation_ignores_scale_and_wasserstein_follows_it():
    cov, scale = np.array([[1.0, 0.5], [0.5, 1.0]]), np.diag([3.0, 0.2])
    scaled = scale @ cov @ scale
    assert gaussian_total_correlation(scaled) == pytest.approx(gaussian_total_correlation(cov), rel=1e-12)
    expected = 2 * np.trace(scaled) - 2 * np.trace(np.real(sqrtm(scaled * np.diag(scaled)[:, None])))
    assert gaussian_wasserstein_correlation(scaled) == pytest.approx(expected, rel=1e-10)


def test_relative_strength_by_hand():
    assert relative_strength(np.array([[0.0, 2.0], [1.0, 0.0]])) == pytest.approx(1.5)
    assert relative_strength(np.array([[1.0, 1.0], [0.0, 0.0]])) == pytest.approx((1.0 + 0.25) / 2)
    assert relative_strength(np.zeros((0, 3))) == 0


def test_udr_is_the_soft_threshold_of_the_correlations_for_white_codes():
    rng = np.random.default_rng(0)
    white = rng.standard_normal((400, 6))
    white = np.linalg.qr(white - white.mean(axis=0))[0] * np.sqrt(400)
    factors = np.arange(400)[:, None] % 2
    turn = rotation(3)
    of = lambda z, kl=(1, 1, 1): Codes(z, factors, (2,), kl=np.array(kl, float))  # noqa: E731
    same = [of(white[:, :3]), of(-white[:, [2, 0, 1]]), of(white[:, :3] @ turn), of(white[:, 3:])]
    pair = udr(same[:2], 0, num_points=400)
    assert pair["udr/means_lasso_model0"] == pytest.approx(0.9, abs=1e-6)
    turned = udr([same[0], same[2]], 0, num_points=400)["udr/means_lasso_model1"]
    strength = np.maximum(np.abs(turn) - 0.1, 0)
    assert turned == pytest.approx(relative_strength(strength), abs=1e-4)
    assert only(udr([same[0], same[3]], 0, num_points=400), "model0") == 0
    everyone = udr(same, 0, num_points=400)
    assert everyone["udr/means_lasso_model3"] == 0
    median = np.median([0.9, relative_strength(strength.T), 0.0])
    assert everyone["udr/means_lasso_model0"] == pytest.approx(median, abs=1e-4)
    masked = udr([of(white[:, :3], (1, 1, 0.01)), of(white[:, [0, 1, 3]], (1, 1, 0))], 0, num_points=400)
    assert masked["udr/means_lasso_model0"] == pytest.approx(0.9, abs=1e-6)
    assert set(udr([of(white[:, :3], (0, 0, 0)), same[0]], 0, num_points=400).values()) == {0.0}


# --- drawing points ---


def test_partners_share_the_factor_and_are_uniform_over_the_grid():
    codes, rng = perfect(), np.random.default_rng(0)
    points = np.full(20_000, 37)
    drawn = codes.partners(points, 1, rng)
    alike = np.flatnonzero(codes.factors[:, 1] == codes.factors[37, 1])
    assert set(drawn) == set(alike)
    assert chisquare(np.bincount(drawn, minlength=60)[alike]).pvalue > 1e-3
    mixed = rng.integers(60, size=500)
    assert np.array_equal(codes.factors[codes.partners(mixed, 2, rng), 2], codes.factors[mixed, 2])


def test_grid_in_any_order_is_drawn_from_independently_and_other_sets_never_twice():
    shuffle = np.random.default_rng(0).permutation(60)
    whole = Codes(standardised(grid(SMALL))[shuffle], grid(SMALL)[shuffle], SMALL)
    assert whole.is_grid
    counts = np.bincount(whole.draw(60_000, np.random.default_rng(1)), minlength=60)
    assert chisquare(counts).pvalue > 1e-3
    twice = whole.factors.copy()
    twice[0] = twice[1]
    part = Codes(whole.codes, twice, SMALL)
    assert not part.is_grid
    assert sorted(part.draw(60, np.random.default_rng(1))) == list(range(60))
    with pytest.raises(VAEError, match="61 points"):
        part.draw(61, np.random.default_rng(1))


def test_sampled_codes_have_the_posterior_mean_and_variance_and_say_so():
    factors = np.arange(40_000)[:, None] % 2
    codes = Codes(np.full((40_000, 1), 3.0), factors, (2,), np.full((40_000, 1), np.log(4.0)))
    drawn = codes.sampled(0)
    assert drawn.codes.mean() == pytest.approx(3, abs=0.04)
    assert drawn.codes.var() == pytest.approx(4, abs=0.12)
    assert list(mig(drawn, 0, num_train=100)) == ["mig/samples_20bins"]


def test_factor_vae_of_one_latent_names_one_factor_of_three():
    codes = perfect()
    alone = Codes(codes.codes[:, :1], codes.factors, SMALL)
    scores = factor_vae(alone, 0, num_train_votes=50, num_eval_votes=3000)
    assert scores["factor_vae/means"] == pytest.approx(1 / 3, abs=0.03)
    assert scores["factor_vae/means_active_dims"] == 1


def test_factor_vae_compares_variances_relative_to_those_of_all_points():
    factors, rng = grid((5, 5)), np.random.default_rng(0)
    noisy = standardised(np.tile(factors, (40, 1))) + 0.3 * rng.standard_normal((1000, 2))
    scaled = Codes(noisy * [0.1, 10.0], np.tile(factors, (40, 1)), (5, 5))
    scores = factor_vae(scaled, 0, num_train_votes=200, num_eval_votes=200)
    assert scores["factor_vae/means"] == 1  # the first latent's own variance is always the smallest


def test_factor_vae_prunes_flat_latents_and_counts_the_rest():
    codes = perfect()
    some = factor_vae(
        Codes(codes.codes * [1, 0.04, 1], codes.factors, SMALL), 0, num_train_votes=300, num_eval_votes=300
    )
    assert some["factor_vae/means_active_dims"] == 2
    assert some["factor_vae/means"] == pytest.approx(2 / 3, abs=0.1)
    none = factor_vae(Codes(codes.codes * 0.04, codes.factors, SMALL), 0)
    assert set(none.values()) == {0.0}


# --- DCI ---


def test_concentration_by_hand():
    assert concentration(np.eye(3)) == pytest.approx(1, abs=1e-8)
    assert concentration(np.ones((2, 4))) == pytest.approx(0, abs=1e-8)
    assert concentration(np.zeros((2, 4))) == pytest.approx(0, abs=1e-8)
    assert concentration(np.array([[3.0, 0, 0, 0], [0.5, 0.5, 0, 0]])) == pytest.approx((3 * 1 + 1 * 0.5) / 4, abs=1e-8)
    assert concentration(np.ones((3, 1))) == 1


def test_dci_reports_its_progress_in_trees():
    codes, seen = entangled(90, (2, 3, 4)), []
    dci(codes, 0, num_train=60, num_test=30, n_jobs=1, progress=lambda *done: seen.append(done))
    assert seen == [(400, 800), (700, 800), (800, 800)]


@pytest.mark.slow
def test_dci_does_not_depend_on_the_number_of_workers():
    codes = entangled(90, (2, 3, 4))
    one, two = (dci(codes, 0, num_train=60, num_test=30, n_jobs=n_jobs) for n_jobs in (1, 2))
    assert one == two


@pytest.mark.slow
def test_fast_dci_is_near_the_reference_and_named_apart():
    codes = entangled(1500)
    fast, exact = (metric(codes, 0, num_train=1000, num_test=500) for metric in (dci_fast, dci))
    assert all(key.startswith("dci_fast/") for key in fast)
    for (fast_key, value), (key, expected) in zip(fast.items(), exact.items(), strict=True):
        assert fast_key == key.replace("dci/", "dci_fast/")
        assert value == pytest.approx(expected, abs=0.1), key


@pytest.mark.slow
def test_dci_of_a_perfect_code_is_one():
    scores = dci(perfect(), 0, num_train=1000, num_test=500)
    assert all(value == pytest.approx(1, abs=0.01) for value in scores.values())


# --- edge cases ---


def test_factor_with_one_value_is_left_out():
    straight = perfect()
    coloured = np.column_stack([np.zeros(60, int), straight.factors])
    codes = Codes(straight.codes, coloured, (1, *SMALL), straight.log_variances)
    assert codes.is_grid and codes.factor_sizes == SMALL
    assert evaluate(codes, 0, **few(QUICK)) == evaluate(straight, 0, **few(QUICK))


@pytest.mark.filterwarnings("error")
def test_constant_latent_leaves_every_score_finite():
    straight = perfect()
    z = np.column_stack([straight.codes, np.full(60, 0.1)])  # whose variance, as computed, isn't quite 0
    codes = Codes(z, straight.factors, SMALL, np.zeros(z.shape), kl=np.ones(4))
    scores = evaluate(codes, 0, [*QUICK, "dci_fast"], **FEW)
    assert np.all(np.isfinite(list(scores.values())))
    assert scores["irs/means_20bins_active_dims"] == scores["factor_vae/means_active_dims"] == 3
    assert scores["dci_fast/means_disentanglement"] == pytest.approx(1, abs=0.01)


@pytest.mark.filterwarnings("error")
def test_code_that_is_all_constant_gets_the_documented_zeros():
    codes = Codes(np.full((60, 3), 0.1), grid(SMALL), SMALL, np.zeros((60, 3)))
    scores = evaluate(codes, 0, [*QUICK, "dci_fast"], **FEW)
    for key in ("factor_vae/means", "mig/means_20bins", "modularity/means_20bins", "irs/means_20bins", "sap/means_r2"):
        assert scores[key] == 0, key
    assert scores["mig_chen/samples"] == pytest.approx(0, abs=1e-12)
    assert scores["explicitness/means_test"] == 0.5
    assert scores["dci_fast/means_disentanglement"] == pytest.approx(0, abs=1e-8)
    assert all(value == 0 for key, value in scores.items() if key.startswith("unsupervised"))


@pytest.mark.filterwarnings("error")
def test_one_latent_gets_the_documented_values():
    straight = perfect()
    codes = Codes(straight.codes[:, :1], straight.factors, SMALL, straight.log_variances[:, :1])
    scores = evaluate(codes, 0, [*QUICK, "dci_fast"], **FEW)
    assert np.all(np.isfinite(list(scores.values())))
    for key in ("mig/means_20bins", "mig_chen/samples", "sap/means_r2"):  # one factor of three, without a rival
        assert scores[key] == pytest.approx(1 / 3, abs=0.01), key
    assert scores["dci_fast/means_completeness"] == 1
    assert all(value == 0 for key, value in scores.items() if key.startswith("unsupervised"))
    assert udr([Codes(codes.codes, codes.factors, SMALL, kl=np.ones(1))] * 2, 0, num_points=60) == {
        "udr/means_lasso_model0": pytest.approx(0.9),
        "udr/means_lasso_model1": pytest.approx(0.9),
    }


@pytest.mark.filterwarnings("error")
def test_one_factor_gets_the_documented_values():
    z = standardised(grid((5,)))
    codes = Codes(np.column_stack([z, np.zeros(5)]), grid((5,)), (5,), np.full((5, 2), -9.0))
    scores = evaluate(codes, 0, [*QUICK, "dci_fast"], **FEW)
    for key in ("beta_vae/means", "mig/means_20bins", "mig_chen/samples", "dci_fast/means_disentanglement"):
        assert scores[key] == pytest.approx(1, abs=1e-6), key
    assert scores["modularity/means_20bins"] == 0.5  # the constant latent counts


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"codes": np.zeros((4, 0))}, "Codes must be"),
        ({"codes": np.full((4, 1), np.nan)}, "finite"),
        ({"factors": np.zeros((4, 1))}, "integers"),
        ({"factors": np.array([[0], [1], [2], [0]])}, "integers"),
        ({"factors": np.zeros((4, 1), int)}, "nothing to disentangle"),
        ({"log_variances": np.zeros((4, 2))}, "Log-variances"),
        ({"kl": np.zeros(2)}, "KL"),
        ({"factor_names": ("a", "b")}, "names"),
    ],
)
def test_arrays_that_do_not_fit_are_refused(change, sentence):
    fields = {"codes": np.arange(4.0)[:, None], "factors": np.array([[0], [1], [0], [1]]), "factor_sizes": (2,)}
    Codes(**fields)
    with pytest.raises(VAEError, match=sentence):
        Codes(**(fields | change))


def test_metrics_that_lack_what_they_need_are_refused():
    codes = entangled(60)
    for call, sentence in (
        (lambda: mig_chen(codes, 0), "log-variances"),
        (lambda: mig_chen(perfect().sampled(0), 0), "log-variances"),
        (lambda: codes.sampled(0), "log-variances"),
        (lambda: udr([codes], 0), "two or more"),
        (lambda: udr([codes, codes], 0), "KL"),
        (lambda: mig(codes, 0, num_train=1), "one value"),
        (lambda: evaluate(codes, 0, ["migg"]), "no metric migg"),
        (lambda: evaluate(codes, 0, ["mig"], num_test=3), "num_test"),
    ):
        with pytest.raises(VAEError, match=sentence):
            call()


# --- the table ---


def test_scores_do_not_depend_on_which_others_are_asked_for_nor_on_seed_or_generator():
    codes = perfect()
    every = evaluate(codes, 5, ["beta_vae", "irs", "sap", "mig"], **few(["beta_vae", "irs", "sap", "mig"]))
    some = evaluate(codes, np.random.default_rng(5), ["irs", "mig"], num_train=1000)
    assert some == {key: every[key] for key in some}
    for name in QUICK:
        small = few([name])
        assert METRICS[name](codes, 1, **small) == METRICS[name](codes, np.random.default_rng(1), **small), name


def test_summary_over_seeds_by_hand():
    summary = summarise_over_seeds([{"a": 1.0, "b": 0.0}, {"a": 3.0, "b": 0.0}])
    assert summary == {
        **{"a/mean": 2.0, "a/sd": np.sqrt(2), "a/min": 1.0, "a/max": 3.0},
        **{"b/mean": 0.0, "b/sd": 0.0, "b/min": 0.0, "b/max": 0.0},
    }
    assert np.isnan(summarise_over_seeds([{"a": 1.0}])["a/sd"])
    with pytest.raises(VAEError):
        summarise_over_seeds([{"a": 1.0}, {"b": 1.0}])


@pytest.mark.slow
def test_metrics_import_without_torch():
    check = "import sys, vae.evaluation.disentanglement; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", check], check=False).returncode == 0
