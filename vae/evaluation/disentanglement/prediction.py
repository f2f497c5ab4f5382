"""Metrics that predict the factors from the codes: DCI, SAP and explicitness."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from joblib import Parallel, delayed
from scipy.stats import entropy
from sklearn.ensemble import GradientBoostingClassifier, HistGradientBoostingClassifier
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score
from sklearn.multiclass import OneVsRestClassifier
from sklearn.svm import LinearSVC

from vae.evaluation.disentanglement.codes import Codes
from vae.evaluation.disentanglement.information import gap


def one_vs_rest_logistic(z: np.ndarray, labels: np.ndarray) -> OneVsRestClassifier:
    """The logistic regression that the published scores rest on: scikit-learn's default before version 0.22."""
    return OneVsRestClassifier(LogisticRegression(solver="liblinear")).fit(z, labels)


def concentration(importance: np.ndarray) -> float:
    """How far each row of importance (R, C) is on one column: 1 - H(row) / log C, weighted by the row's share of all.

    Eastwood & Williams 2018. Nothing important at all gives 0; a single column leaves nothing to spread over: 1.
    """
    if importance.shape[1] == 1:
        return 1.0
    weights = importance.sum(axis=1)
    weights = weights if weights.sum() > 0 else np.ones_like(weights)
    per_row = 1 - entropy(importance + 1e-11, base=importance.shape[1], axis=1)
    return float(np.average(per_row, weights=weights))


def histogram_boosting_importance(model: HistGradientBoostingClassifier) -> np.ndarray:
    """Share of the loss reduction that the splits on each feature brought, (D,): what exact boosting reports itself.

    scikit-learn keeps the gains in the trees' private nodes only. Its public permutation importance measures something
    else: on codes with a D of .26 it gave .43, and this .24.
    """
    nodes = np.concatenate([tree.nodes for stage in model._predictors for tree in stage])
    splits = nodes[nodes["is_leaf"] == 0]
    gains = np.bincount(splits["feature_idx"], weights=splits["gain"], minlength=model.n_features_in_)
    return gains / gains.sum() if gains.sum() > 0 else gains


def dci(
    codes: Codes,
    rng: np.random.Generator | int,
    *,
    num_train: int = 10_000,
    num_test: int = 5_000,
    fast: bool = False,
    n_jobs: int = -1,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, float]:
    """Disentanglement, completeness and informativeness (accuracy) of Eastwood & Williams 2018, from tree importances.

    The reference's classifier for each factor: gradient boosting at scikit-learn's defaults (100 stages, rate .1, depth
    3, one sample a leaf), one tree a class and stage. That is minutes for 40 classes, so factors run in n_jobs
    processes (-1: one a core), longest first, and after each `progress(done, total)` is told how many trees have grown.

    `fast` boosts with the same settings on histograms of 255 bins, in seconds. It is another metric, which its keys
    say: on 10,000 codes it gave D .363 for .361 (half rotated) and .634 for .608 (noisy), on 1,000 easy ones .64 for .72.
    """
    rng = np.random.default_rng(rng)
    z, v, z_test, v_test = codes.split(num_train, num_test, rng)
    seeds = rng.integers(2**31, size=v.shape[1])
    num_trees = np.array([100 if size == 2 else 100 * size for size in (len(np.unique(v_j)) for v_j in v.T)])

    def grow(j: int) -> tuple[int, np.ndarray, float, float]:
        if fast:
            model = HistGradientBoostingClassifier(
                max_depth=3, min_samples_leaf=1, early_stopping=False, random_state=int(seeds[j])
            ).fit(z, v[:, j])
            importance = histogram_boosting_importance(model)
        else:
            model = GradientBoostingClassifier(random_state=int(seeds[j])).fit(z, v[:, j])
            importance = np.abs(model.feature_importances_)
        return j, importance, model.score(z, v[:, j]), model.score(z_test, v_test[:, j])

    longest_first = [delayed(grow)(int(j)) for j in np.argsort(-num_trees, kind="stable")]
    importance, accuracy, grown = np.zeros((z.shape[1], v.shape[1])), np.zeros((2, v.shape[1])), 0
    for j, importance_j, *accuracy_j in Parallel(n_jobs, return_as="generator_unordered")(longest_first):
        importance[:, j], accuracy[:, j], grown = importance_j, accuracy_j, grown + int(num_trees[j])
        if progress is not None:
            progress(grown, int(num_trees.sum()))
    key = f"{'dci_fast' if fast else 'dci'}/{codes.source}"
    return {
        f"{key}_disentanglement": concentration(importance),
        f"{key}_completeness": concentration(importance.T),
        f"{key}_informativeness_train": float(accuracy[0].mean()),
        f"{key}_informativeness_test": float(accuracy[1].mean()),
    }


def sap(
    codes: Codes, rng: np.random.Generator | int, *, num_train: int = 10_000, num_test: int = 5_000, C: float = 0.01
) -> dict[str, float]:
    """Separated attribute predictability, Kumar et al. 2018: how much better the best single latent predicts a factor.

    `_svm`: test accuracy of a balanced linear SVM on one latent, the study's choice; lines cannot name 40 classes on an
    axis, so a perfect code of dSprites gets .246. `_r2`: squared correlation in the training points with the
    factor's index, for factors that are ordered. A constant latent has an r2 of 0.
    """
    z, v, z_test, v_test = codes.split(num_train, num_test, np.random.default_rng(rng))

    def accuracy(i: int, j: int) -> float:
        svm = LinearSVC(C=C, class_weight="balanced", dual="auto").fit(z[:, i : i + 1], v[:, j])
        return svm.score(z_test[:, i : i + 1], v_test[:, j])

    def squared_correlation(i: int, j: int) -> float:
        (var_z, cov), (_, var_v) = np.cov(z[:, i], v[:, j])
        return cov**2 / (var_z * var_v) if var_z > 1e-12 else 0.0

    def score(of_pair: Callable[[int, int], float]) -> float:
        return float(gap(np.array([[of_pair(i, j) for j in range(v.shape[1])] for i in range(z.shape[1])])).mean())

    return {f"sap/{codes.source}_svm": score(accuracy), f"sap/{codes.source}_r2": score(squared_correlation)}


def explicitness(
    codes: Codes, rng: np.random.Generator | int, *, num_train: int = 10_000, num_test: int = 5_000
) -> dict[str, float]:
    """Can the factors be read linearly from the whole code? Ridgeway & Mozer 2018: ROC-AUC, .5 for nothing, 1 at best.

    One-against-the-rest logistic regression on codes standardised by the training points; the mean over classes, then
    over factors. Classes without a point inside or outside them among those scored have no AUC and are left out.
    """
    z, v, z_test, v_test = codes.split(num_train, num_test, np.random.default_rng(rng))
    mean, sd = z.mean(axis=0), z.std(axis=0)
    sd[np.ptp(z, axis=0) == 0] = 1.0
    z, z_test = (z - mean) / sd, (z_test - mean) / sd

    def auc(model: OneVsRestClassifier, x: np.ndarray, labels: np.ndarray) -> float:
        inside = [(labels == value, p) for value, p in zip(model.classes_, model.predict_proba(x).T, strict=True)]
        return float(np.mean([roc_auc_score(is_class, p) for is_class, p in inside if 0 < is_class.sum() < len(x)]))

    models = [one_vs_rest_logistic(z, labels) for labels in v.T]
    return {
        f"explicitness/{codes.source}_train": float(np.mean([auc(m, z, y) for m, y in zip(models, v.T, strict=True)])),
        f"explicitness/{codes.source}_test": float(
            np.mean([auc(m, z_test, y) for m, y in zip(models, v_test.T, strict=True)])
        ),
    }
