"""Metrics that hold a factor fixed and watch the code: the beta-VAE score, the FactorVAE score and IRS."""

from __future__ import annotations

import numpy as np

from vae.evaluation.disentanglement.codes import Codes
from vae.evaluation.disentanglement.information import discretise
from vae.evaluation.disentanglement.prediction import one_vs_rest_logistic


def beta_vae(
    codes: Codes,
    rng: np.random.Generator | int,
    *,
    batch_size: int = 64,
    num_train_batches: int = 10_000,
    num_eval_batches: int = 5_000,
) -> dict[str, float]:
    """Higgins et al. 2017: name the factor that `batch_size` pairs share from their mean |z - z'|. Accuracy, 1 is best.

    Codes are neither pruned nor standardised. Stays high for a rotated code (about .8 on dSprites), so it's no evidence
    of alignment with the axes. With one factor there is one name to give, and the score is 1.
    """
    rng = np.random.default_rng(rng)

    def differences(num_batches: int) -> tuple[np.ndarray, np.ndarray]:
        factor = rng.integers(len(codes.factor_sizes), size=num_batches)
        features = np.empty((num_batches, codes.codes.shape[1]))
        for b, k in enumerate(factor):
            points = rng.integers(len(codes.codes), size=batch_size)
            features[b] = np.abs(codes.codes[points] - codes.codes[codes.partners(points, k, rng)]).mean(axis=0)
        return features, factor

    train, evaluation = differences(num_train_batches), differences(num_eval_batches)
    scores = (1.0, 1.0)
    if len(codes.factor_sizes) > 1:
        model = one_vs_rest_logistic(*train)
        scores = (model.score(*train), model.score(*evaluation))
    return {f"beta_vae/{codes.source}_train": float(scores[0]), f"beta_vae/{codes.source}": float(scores[1])}


def factor_vae(
    codes: Codes,
    rng: np.random.Generator | int,
    *,
    batch_size: int = 64,
    num_train_votes: int = 10_000,
    num_eval_votes: int = 5_000,
    num_variance_estimate: int = 10_000,
    prune_threshold: float = 0.05,
) -> dict[str, float]:
    """Kim & Mnih 2018: in a batch with one factor fixed, the latent that varies least votes for it. Accuracy, 1 is best.

    Variances are relative to those of all points; latents whose standard deviation is below `prune_threshold` have no
    say, and if none has, the score is 0. `_active_dims` is the number of those that have.
    """
    rng = np.random.default_rng(rng)
    variance = codes.codes[rng.integers(len(codes.codes), size=num_variance_estimate)].var(axis=0, ddof=1)
    active = np.sqrt(variance) >= prune_threshold
    z, variance, num_factors = codes.codes[:, active], variance[active], len(codes.factor_sizes)

    def votes(num_votes: int) -> np.ndarray:
        """How often each factor was fixed (rows) when each active latent varied least (columns)."""
        table = np.zeros((num_factors, len(variance)))
        for k in rng.integers(num_factors, size=num_votes):
            batch = z[codes.partners(np.full(batch_size, rng.integers(len(z))), k, rng)]
            table[k, np.argmin(batch.var(axis=0, ddof=1) / variance)] += 1
        return table

    accuracy = {"_train": 0.0, "": 0.0}
    if active.any():
        train, evaluation = votes(num_train_votes), votes(num_eval_votes)
        named, latent = train.argmax(axis=0), np.arange(len(variance))
        accuracy = {
            "_train": train[named, latent].sum() / train.sum(),
            "": evaluation[named, latent].sum() / evaluation.sum(),
        }
    scores = {f"factor_vae/{codes.source}{which}": float(value) for which, value in accuracy.items()}
    return scores | {f"factor_vae/{codes.source}_active_dims": float(active.sum())}


def irs(
    codes: Codes,
    rng: np.random.Generator | int,
    *,
    num_train: int = 10_000,
    num_bins: int = 20,
    diff_quantile: float = 0.99,
) -> dict[str, float]:
    """Interventional robustness, Suter et al. 2019: does a latent stay put when all factors but one change? 1 is best.

    For each (binned) value of a factor, the `diff_quantile` of |z - mean of z at this value|, averaged over values and
    relative to the largest |z - mean z|; a latent's score is 1 minus the least of these over factors, and latents count
    by their largest deviation. Constant latents have none and are dropped; if all are constant the score is 0.
    Random codes score about .34 on dSprites.
    """
    z, v = codes.sample(num_train, np.random.default_rng(rng))
    z = z[:, np.ptp(z, axis=0) > 0]
    score = 0.0
    if z.shape[1] > 0:
        largest = np.abs(z - z.mean(axis=0)).max(axis=0)
        deviation = np.empty((z.shape[1], v.shape[1]))
        for j, v_j in enumerate(discretise(v, num_bins).T):
            groups = [z[v_j == value] for value in np.unique(v_j)]
            spread = [np.quantile(np.abs(g - g.mean(axis=0)), diff_quantile, axis=0) for g in groups]
            deviation[:, j] = np.mean(spread, axis=0) / largest
        score = float(np.average(1 - deviation.min(axis=1), weights=largest))
    key = f"irs/{codes.source}_{num_bins}bins"
    return {key: score, f"{key}_active_dims": float(z.shape[1])}
