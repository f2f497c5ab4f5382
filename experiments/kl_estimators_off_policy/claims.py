"""What the results must show, from them alone."""

from __future__ import annotations

from statistics import fmean
from typing import Any

from experiments.kl_estimators_off_policy.exact import key
from vae.claims import Claim, Table, above, below, listed, ordered, spread, within

ROUNDING = 1e-12
ONE_TOKEN = {  # unbiased on-policy and off
    "value": ["w k1, w of a token", "w k3, w of a token"],
    "reward": ["k1 of pi, w of a token"],
    "loss": ["w k1, w of a token", "w k2, w of a token, held", "w k3, w of a token", "exact next-token KL"],
}
WHOLE = {
    "value": ["w k1, w of the prefix", "w k3, w of the prefix", "exact next-token KLs, w of the past"],
    "reward": ["k1 of pi, w of the answer", "k1 of pi to go, w of the answer"],
    "loss": ["w k1, w of the prefix", "w k3, w of the prefix", "exact next-token KL, w of the past"],
}
BIASED = {"k2": "loss_k2", "k3": "loss_k3"}  # in the loss, as they are without a ratio
CORRECTED = "loss_k3_is"


def bias(results: dict[str, Any], world: str, place: str, name: str) -> list[float]:
    return results["exact"]["worlds"][world]["of"][key(place, name)]["bias"]


def sd(results: dict[str, Any], world: str, place: str, name: str) -> list[float]:
    return results["exact"]["worlds"][world]["of"][key(place, name)]["sd"]


def tuned(results: dict[str, Any], penalty: str, what: str) -> list[float]:
    """Of each seed."""
    return [of_seed[what] for of_seed in results["tuned"][penalty]]


def held(results: dict[str, Any], penalty: str) -> list[float]:
    """The KL of each seed over the last batches, in nats an answer."""
    traces = tuned(results, penalty, "trace")
    return [fmean(trace[-round(results["judged"] * len(trace)) :]) for trace in traces]


def claims(results: dict[str, Any]) -> list[Claim]:
    return [*exact_claims(results), *tuning_claims(results)]


def differences(a: list[float], b: list[float]) -> list[float]:
    return [x - y for x, y in zip(a, b, strict=True)]


def exact_claims(results: dict[str, Any]) -> list[Claim]:
    made = []
    for world, names in (("one token", ONE_TOKEN), ("sequences", WHOLE)):
        worst = max(max(bias(results, world, place, name)) for place in names for name in names[place])
        made.append(
            Claim.of(
                f"{world}: {sum(map(len, names.values()))} estimators with their ratios are unbiased at every distance",
                f"largest bias {worst:.0e}",
                "below {:g} of the exact KL or gradient",
                below(worst, ROUNDING),
            )
        )
    for name in BIASED:
        along = bias(results, "one token", "loss", name)
        made.append(
            Claim.of(
                f"one token: without its ratio the bias of {name} in the loss grows with the distance",
                f"{along[0]:.2f} on-policy to {along[-1]:.2f}",
                "grows at each step, to more than {:g}",
                ordered(*along),
                above(along[-1], 0.2),
            )
        )
    on_policy = {name: bias(results, "one token", "loss", name)[0] for name in ("k1", "k2", "k3")}
    made.append(
        Claim.of(
            "one token, on-policy: k2 in the loss is exact, k3 is not, k1 has no gradient",
            ", ".join(f"{name} {value:.2f}" for name, value in on_policy.items()),
            "k2 below {:g}, k3 above {:g}, k1 within {:g} of {:g}",
            below(on_policy["k2"], ROUNDING),
            above(on_policy["k3"], 0.1),
            within(on_policy["k1"], ROUNDING, 1),
        )
    )
    token_wise = [bias(results, "sequences", "loss", name)[0] for name in ONE_TOKEN["loss"]]
    made.append(
        Claim.of(
            "sequences, on-policy: what follows a token is a share of the gradient that token-wise losses lack, all the same",
            f"{min(token_wise):.3f} of the gradient",
            "more than {:g}, equal to {:g}",
            above(token_wise, 0.1),
            below(max(token_wise) - min(token_wise), ROUNDING),
        )
    )
    sampler = bias(results, "sequences", "reward", "k1 of the sampler, w of the answer")
    made.append(
        Claim.of(
            "sequences: k1 of the sampler in the reward is exact on-policy and misses more and more of the gradient off it",
            f"{sampler[0]:.0e} to {sampler[-1]:.2f}",
            "below {:g} on-policy, then grows at each step",
            below(sampler[0], ROUNDING),
            ordered(*sampler),
        )
    )
    pairs = [
        ("value", "exact next-token KLs, w of the past", "w k1, w of the prefix"),
        ("loss", "exact next-token KL, w of the past", "w k1, w of the prefix"),
        ("loss", "exact next-token KL, w of the past", "w k3, w of the prefix"),
    ]
    ratios = [
        a / b
        for place, ours, theirs in pairs
        for a, b in zip(sd(results, "sequences", place, ours), sd(results, "sequences", place, theirs), strict=True)
    ]
    made.append(
        Claim.of(
            "sequences: the exact next-token KL (Rao-Blackwell) varies less than tokens drawn, as value and as loss",
            f"{min(ratios):.2f} to {max(ratios):.2f} of their deviation",
            "below {:g} at every distance",
            below(ratios, 1),
        )
    )
    held, k3 = (sd(results, "one token", "loss", name) for name in ("w k2, w of a token, held", "w k3, w of a token"))
    apart = [abs(a / b - 1) for a, b in zip(held, k3, strict=True)]
    made.append(
        Claim.of(
            "one token: w k2, its ratio held, and w k3 have one and the same gradient",
            f"deviations equal to {max(apart):.0e}",
            "equal to {:g}",
            below(apart, ROUNDING),
        )
    )
    return made


def tuning_claims(results: dict[str, Any]) -> list[Claim]:
    made = []
    for words, exact, corrected in (
        ("w k3 of a token", "loss_exact", "loss_k3_is"),
        ("w k3 of the prefix", "loss_exact, prefix", "loss_k3_is, prefix"),
    ):
        kl, of_exact = held(results, corrected), held(results, exact)
        off = fmean(kl) / fmean(of_exact) - 1
        made.append(
            Claim.of(
                f"tuned with {results['reuse']} steps a batch: {words} holds the KL that the exact penalty holds",
                f"{spread(kl)} nats over the last batches, the exact {spread(of_exact)}: {off:+.0%}",
                "within {:.0%}",
                below(abs(off), 0.1),
            )
        )
    for name, penalty in BIASED.items():
        kl = held(results, penalty)
        drift = [a / b - 1 for a, b in zip(kl, held(results, "loss_exact"), strict=True)]
        lower = differences(tuned(results, penalty, "objective"), tuned(results, CORRECTED, "objective"))
        made += [
            Claim.of(
                f"tuned likewise: {name} without its ratio drifts beyond it in every seed",
                f"{spread(kl)} nats: {listed(drift, '+.0%')}",
                "more than {:.0%} above",
                above(drift, 0.1),
            ),
            Claim.of(
                f"and {name} reaches less of reward - beta KL than w k3 of a token, in every seed",
                listed(lower, "+.3f"),
                "less",
                below(lower, 0),
            ),
        ]
    return made


def table(results: dict[str, Any]) -> Table:
    rows = []
    for penalty, of_seeds in results["tuned"].items():
        fresh = penalty == "target"
        cells = [
            spread(held(results, penalty)),
            *(spread(of_seed[what] for of_seed in of_seeds) for what in ("kl", "reward")),
        ]
        rows.append(
            (
                "loss_exact, prefix" if fresh else penalty,
                "1" if fresh else str(results["reuse"]),
                *cells,
                spread((of_seed["objective"] for of_seed in of_seeds), 3),
            )
        )
    heads = (
        "penalty",
        "steps a batch",
        "KL over the last batches",
        "KL at the end",
        "reward",
        f"reward - {results['beta']:g} KL",
    )
    return Table(
        heads, rows, "A character model tuned for a reward, mean ± sd over seeds; KL(pi || pi_ref) in nats an answer"
    )
