"""Metrics that predict the factors from the codes: DCI, SAP and explicitness."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from joblib import Parallel, delayed
from scipy.stats import entropy
from sklearn.ensemble import ExtraTreesClassifier, GradientBoostingClassifier
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
    3), one tree a class and stage. That is minutes for 40 classes, so factors run in n_jobs processes (-1: one a core)
    and `progress(done, total)` is told after each factor how many trees have been grown.

    `fast` puts ExtraTrees in its place (100 trees, all latents at each split, at least {FAST} points a leaf) and says
    so in its keys, `dci_fast/`: compare it with nothing else.
    """
