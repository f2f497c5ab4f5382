"""Metrics that never look at the factors: how dependent the latents are, and how alike several models' latents (UDR)."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from sklearn.linear_model import Lasso
from sklearn.preprocessing import StandardScaler

from vae.errors import VAEError
from vae.evaluation.disentanglement.codes import Codes
from vae.evaluation.disentanglement.information import discretise, mutual_information


def gaussian_total_correlation(cov: np.ndarray) -> float:
    """KL(N(0, cov) || product of its marginals) in nats, cov (D, D): half of sum log diag minus log det, 0 where rounding
    puts it below."""
    return max(float(0.5 * (np.log(np.diag(cov)).sum() - np.linalg.slogdet(cov)[1])), 0.0)


def gaussian_wasserstein_correlation(cov: np.ndarray) -> float:
    """Squared 2-Wasserstein distance of N(0, cov) from the product of its marginals, cov (D, D).

    2 tr C - 2 tr (diag(C) C)^(1/2), by the eigenvalues of the similar symmetric matrix; neither they nor the distance are
    negative but for rounding, which is cut off.
    """
    sd = np.sqrt(np.diag(cov))
    eigenvalues = np.linalg.eigvalsh(sd[:, None] * cov * sd)
    return max(float(2 * np.trace(cov) - 2 * np.sqrt(np.maximum(eigenvalues, 0)).sum()), 0.0)


def unsupervised(
    codes: Codes, rng: np.random.Generator | int, *, num_train: int = 10_000, num_bins: int = 20
) -> dict[str, float]:
    """Locatello et al. 2019, dependence between latents: 0 when there is none, for each score.

    Gaussian total correlation in nats; Wasserstein correlation, raw (in squared units of the code) and over the trace
    of the covariance; mean mutual information in nats of the pairs of binned latents. A constant latent depends on
    nothing: it adds 0 to all of them (and counts in the mean over pairs). One latent alone: all 0.
    """
    z, _ = codes.sample(num_train, np.random.default_rng(rng))
    key = f"unsupervised/{codes.source}"
    varying = z[:, np.ptp(z, axis=0) > 0]
    tc = wasserstein = relative = mean_information = 0.0
    if varying.shape[1] > 1:
        cov = np.cov(varying, rowvar=False)
        tc, wasserstein = gaussian_total_correlation(cov), gaussian_wasserstein_correlation(cov)
        relative = wasserstein / float(np.trace(cov))
        binned = discretise(varying, num_bins)
        information = mutual_information(binned, binned)
        mean_information = float(information.sum() - np.trace(information)) / (z.shape[1] ** 2 - z.shape[1])
    return {
        f"{key}_gaussian_tc": tc,
        f"{key}_gaussian_wasserstein": wasserstein,
        f"{key}_gaussian_wasserstein_norm": relative,
        f"{key}_mi_{num_bins}bins": mean_information,
    }


def relative_strength(strength: np.ndarray) -> float:
    """How close a matrix (D, D') is to a permutation: mean of max^2 / sum over columns, and over rows, averaged.

    A row or column of zeros gets 0, and so does a matrix without any rows or columns.
    """

    def mean_over_columns(r: np.ndarray) -> float:
        total = r.sum(axis=0)
        used = total > 0
        return float((r.max(axis=0)[used] ** 2 / total[used]).sum() / r.shape[1])

    return (mean_over_columns(strength) + mean_over_columns(strength.T)) / 2 if strength.size else 0.0


def udr(
    models: Sequence[Codes],
    rng: np.random.Generator | int,
    *,
    num_points: int = 10_000,
    alpha: float = 0.1,
    kl_threshold: float = 0.01,
) -> dict[str, float]:
    """Unsupervised disentanglement ranking, Duan et al. 2020: do models trained from other seeds find the same latents?

    `models` are the codes of the same points, in the same order, by two models or more, each with its `kl`. A Lasso of
    strength alpha predicts each model's standardised codes from another's; latents with a KL of at most `kl_threshold`
    nats are masked. A model's score is the median over the others of how one-to-one |coefficients| are, 1 at best (0.9
    for identical independent codes, since the Lasso takes alpha away). The lower end is 0.
    Raises VAEError for fewer than two models, no kl, or different points.
    """
    if len(models) < 2:
        raise VAEError("UDR compares models: it needs the codes of two or more.")
    if any(model.kl is None for model in models):
        raise VAEError("UDR needs the KL of each latent of every model.")
    if any(not np.array_equal(model.factors, models[0].factors) for model in models):
        raise VAEError("UDR needs the same points in the same order from every model.")
    points = models[0].draw(num_points, np.random.default_rng(rng))
    active = [np.asarray(model.kl) > kl_threshold for model in models]
    z = [StandardScaler().fit_transform(m.codes[points]) * mask for m, mask in zip(models, active, strict=True)]

    def likeness(i: int, j: int) -> float:
        coefficients = Lasso(alpha=alpha).fit(z[i], z[j]).coef_.reshape(z[j].shape[1], z[i].shape[1])
        return relative_strength(np.abs(coefficients.T[np.ix_(active[i], active[j])]))

    return {
        f"udr/{model.source}_lasso_model{j}": float(np.median([likeness(i, j) for i in range(len(z)) if i != j]))
        for j, model in enumerate(models)
    }
