"""Disentanglement metrics on data whose generative factors are known: arrays in, a flat dict of floats out.

    codes = Codes(means, factors, factor_sizes, log_variances)     # one forward pass
    scores = evaluate(codes, rng=0)                                # every metric but DCI, which is slow
    scores |= dci(codes, rng=0, progress=print)                    # any metric of METRICS by itself; dci_fast is another
    bounds = floor_and_ceiling(factors, factor_sizes, rng=0)       # what chance and perfection score on this data

Every metric is `metric(codes, rng, **constants) -> dict`: a `numpy.random.Generator` or a seed for one, and the
constants of the field's reference implementation (Locatello et al. 2019) as keyword arguments. Keys are
`metric/source_variant`, where source says which codes ("means" or "samples" of q(z|x)). `udr` differs in one thing: it
takes the codes of several models. Nothing here needs torch.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from functools import partial

import numpy as np

from vae.errors import VAEError
from vae.evaluation.disentanglement.codes import Codes
from vae.evaluation.disentanglement.information import mig, mig_chen, modularity
from vae.evaluation.disentanglement.intervention import beta_vae, factor_vae, irs
from vae.evaluation.disentanglement.prediction import dci, explicitness, sap
from vae.evaluation.disentanglement.unsupervised import udr, unsupervised

dci_fast = partial(dci, fast=True)

METRICS: dict[str, Callable[..., dict[str, float]]] = {
    "beta_vae": beta_vae,
    "factor_vae": factor_vae,
    "mig": mig,
    "mig_chen": mig_chen,
    "sap": sap,
    "modularity": modularity,
    "explicitness": explicitness,
    "irs": irs,
    "unsupervised": unsupervised,
    "dci_fast": dci_fast,
    "dci": dci,
}

QUICK = tuple(name for name in METRICS if not name.startswith("dci"))

__all__ = [
    "METRICS",
    "QUICK",
    "Codes",
    "beta_vae",
    "dci",
    "dci_fast",
    "evaluate",
    "explicitness",
    "factor_vae",
    "floor_and_ceiling",
    "irs",
    "mig",
    "mig_chen",
    "modularity",
    "sap",
    "summarise_over_seeds",
    "udr",
    "unsupervised",
]


def evaluate(
    codes: Codes, rng: np.random.Generator | int, names: Sequence[str] | None = None, **constants
) -> dict[str, float]:
    """The scores of these metrics of METRICS; by default of all QUICK ones, `mig_chen` only where codes have what it needs.

    Each metric has its own generator, drawn from rng by its place in METRICS, so that asking for more or fewer of them
    changes no score. A constant goes to every metric that has it (`num_train`, `num_bins`, `n_jobs`, ...).
    On 10,000 points the QUICK ones take some 25 s of one core, most of it `mig_chen`, which grows with the points.
    Raises VAEError for a metric that does not exist and for a constant that none of those asked for has.
    """
    if names is None:
        chen = codes.log_variances is not None and codes.source == "means"
        names = [name for name in QUICK if name != "mig_chen" or chen]
    unknown = [name for name in names if name not in METRICS]
    if unknown:
        raise VAEError(f"There is no metric {', '.join(unknown)}; there are {', '.join(METRICS)}.")
    accepted = {name: set(inspect.signature(METRICS[name]).parameters) - {"codes", "rng"} for name in names}
    stray = [constant for constant in constants if not any(constant in a for a in accepted.values())]
    if stray:
        raise VAEError(f"No metric asked for has a constant {', '.join(stray)}.")
    seeds = dict(zip(METRICS, np.random.default_rng(rng).integers(2**63, size=len(METRICS)), strict=True))
    scores: dict[str, float] = {}
    for name in names:
        own = {constant: value for constant, value in constants.items() if constant in accepted[name]}
        scores |= METRICS[name](codes, np.random.default_rng(seeds[name]), **own)
    return scores


def floor_and_ceiling(
    factors: np.ndarray,
    factor_sizes: Sequence[int],
    rng: np.random.Generator | int,
    names: Sequence[str] | None = None,
    *,
    latent_dim: int = 10,
    factor_names: Sequence[str] | None = None,
    **constants,
) -> dict[str, float]:
    """What each score is for codes that know nothing (`key/floor`) and that are the factors (`key/ceiling`).

    The floor is of `latent_dim` independent standard normals. The ceiling is of one latent for each factor that varies:
    its class index, moved and scaled to mean 0 and variance 1, as a code's usually are. Both have posteriors as narrow
    as .01, for Chen's MIG. factors (N, F) as in `Codes`: give those of the points that the model was scored on, since
    floors fall with their number. The rest as in `evaluate`; the keys are its keys.
    """
    rng = np.random.default_rng(rng)

    def scores(z: np.ndarray) -> dict[str, float]:
        narrow = np.full(z.shape, 2 * np.log(0.01))
        sizes, labels = tuple(factor_sizes), tuple(factor_names) if factor_names else None
        return evaluate(Codes(z, factors, sizes, narrow, factor_names=labels), rng, names, **constants)

    factors = np.asarray(factors)
    known = factors[:, np.ptp(factors, axis=0) > 0]
    floor = scores(rng.standard_normal((len(factors), latent_dim)))
    ceiling = scores((known - known.mean(axis=0)) / known.std(axis=0))
    return {f"{key}/{bound}": s[key] for key in floor for bound, s in (("floor", floor), ("ceiling", ceiling))}


def summarise_over_seeds(scores: Sequence[dict[str, float]]) -> dict[str, float]:
    """`key/mean`, `key/sd` (of the sample; nan for one seed), `key/min` and `key/max` over the runs of several seeds.

    Raises VAEError if there is no run, or if runs do not have the same scores.
    """
    if not scores or any(run.keys() != scores[0].keys() for run in scores):
        raise VAEError("A summary over seeds needs at least one run, and the same scores from each.")
    summary: dict[str, float] = {}
    for key in scores[0]:
        values = np.array([run[key] for run in scores])
        sd = values.std(ddof=1) if len(values) > 1 else np.nan
        parts = {"mean": values.mean(), "sd": sd, "min": values.min(), "max": values.max()}
        summary |= {f"{key}/{part}": float(value) for part, value in parts.items()}
    return summary
