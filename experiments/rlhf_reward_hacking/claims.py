"""What is claimed of policies that please a proxy, by their beta."""

from __future__ import annotations

from itertools import pairwise
from math import inf
from statistics import fmean
from typing import Any

from experiments.rlhf_reward_hacking.protocol import METHODS
from vae.claims import (
    Claim,
    Limit,
    Table,
    above,
    at_most,
    below,
    between,
    listed,
    mean,
    mean_and_error,
    near,
    spread,
    values,
)

# Decided on a pilot. GRPO divides the reward by its deviation in a group and so has another scale of beta.
INTERMEDIATE = {"REINFORCE": 0.05, "GRPO": 0.5}
LARGE = {"REINFORCE": 0.5, "GRPO": 2}
TIE, TIE_ERRORS = 0.02, 2  # a rise below that part of the range, or so many standard errors, is none


def curve(results: dict[str, Any], method: str) -> dict[float, list[dict[str, Any]]]:
    """The policies by rising beta, a list over seeds each; the reference is beta = infinity."""
    of_beta = {float(beta): of_seeds for beta, of_seeds in results["policies"][method].items()}
    return {**dict(sorted(of_beta.items())), inf: results["reference"]}


def steps_up(by_beta: list[list[float]], tolerance: float = TIE, errors: float = TIE_ERRORS) -> tuple[int, int, float]:
    """How often a quantity that should fall with beta rises, how often it ties, and the worst rise over the range.

    by_beta: values over seeds for each beta, rising. A rise of the mean over seeds from one beta to the next is a tie if it
    is below `tolerance` of the range (the first less the last), or below two standard errors of the paired differences
    over the seeds where there are three or more.
    """
    spanned = abs(fmean(by_beta[0]) - fmean(by_beta[-1]))
    rises = ties = 0
    worst = 0.0
    for smaller, larger in pairwise(by_beta):
        step = mean_and_error(b - a for a, b in zip(smaller, larger, strict=True))
        rise, error = step["mean"], step["se"] if len(smaller) > 2 else 0.0
        worst = max(worst, rise / spanned)
        if rise > max(tolerance * spanned, errors * error):
            rises += 1
        elif rise > 0:
            ties += 1
    return rises, ties, worst


def claims(results: dict[str, Any]) -> list[Claim]:
    made = [classifier_claim(results["classifiers"])]
    reference = results["reference"]
    for method in METHODS:
        policies = curve(results, method)
        free, middle, large = (policies[beta] for beta in (0.0, INTERMEDIATE[method], LARGE[method]))
        made += [
            free_claim(method, free, reference, results["classifiers"]),
            intermediate_claim(method, middle, reference),
            large_claim(method, large, free, reference),
            falls_claim(method, policies, "reward", "proxy"),
            falls_claim(method, policies, "kl", "KL"),
        ]
    return [*made, *(controller_claim(results, method) for method in results["controlled"])]


def classifier_claim(classifiers: list[dict]) -> Claim:
    right = values(classifiers, "validation")
    return Claim.of(
        "the proxy is better than chance on text it has not seen, and far from perfect",
        f"{listed(right, '.1%')} right",
        "{:.0%} to {:.0%} (chance 50%)",
        between(right, 0.6, 0.9),
    )


def free_claim(method: str, free: list[dict], reference: list[dict], classifiers: list[dict]) -> Claim:
    reward, nll, repeated = (mean(free, key) for key in ("reward", "nll", "distinct4"))
    nll_before, repeated_before = mean(reference, "nll"), mean(reference, "distinct4")
    return Claim.of(
        f"{method}, beta 0: the proxy rises beyond real text, fluency collapses, into repetition",
        f"proxy {mean(reference, 'reward'):.2f} to {reward:.2f}; {nll_before:.2f} to {nll:.2f} nats a character; "
        f"distinct-4 {repeated_before:.2f} to {repeated:.2f}",
        "above {:.2f} (99% of real text on strings are below); {:g} nat a character worse; distinct-4 halved",
        above(reward, mean(classifiers, "strings_99")),
        above(nll - nll_before, 1),
        below(repeated / repeated_before, 1 / 2),
    )


def intermediate_claim(method: str, middle: list[dict], reference: list[dict]) -> Claim:
    gain = fmean((m["reward"] - r["reward"]) / r["reward_sd"] for m, r in zip(middle, reference, strict=True))
    worse = mean(middle, "nll") - mean(reference, "nll")
    kept = mean(middle, "distinct4") / mean(reference, "distinct4")
    return Claim.of(
        f"{method}, beta {INTERMEDIATE[method]:g}: the proxy rises and fluency is kept",
        f"proxy up {gain:.2f} sd of the reference's; {worse:+.2f} nats a character; {kept:.1%} of distinct-4",
        "more than {:g} sd; less than {:g} nats worse; more than {:.0%}",
        above(gain, 1),
        below(worse, 0.25),
        above(kept, 0.95),
    )


def large_claim(method: str, large: list[dict], free: list[dict], reference: list[dict]) -> Claim:
    before, kl = mean(reference, "reward"), mean(large, "kl")
    gain = (mean(large, "reward") - before) / (mean(free, "reward") - before)
    return Claim.of(
        f"{method}, beta {LARGE[method]:g}: barely moves",
        f"{gain:.1%} of the proxy's rise at beta 0, KL {kl:.3f} nats",
        "less than {:.0%}, less than {:g} nat",
        below(gain, 0.1),
        below(kl, 1),
    )


def falls_claim(method: str, policies: dict[float, list[dict]], key: str, name: str) -> Claim:
    rises, ties, worst = steps_up([values(of_seeds, key) for of_seeds in policies.values()])
    return Claim.of(
        f"{method}: the {name} falls as beta rises, over {len(policies)} betas",
        f"{rises} rises, {ties} ties, the largest {worst:.1%} of the range",
        f"no rise; below {TIE:.0%} of the range or {Limit(TIE_ERRORS):words} standard errors is a tie",
        at_most(rises, 0),
    )


def controller_claim(results: dict[str, Any], method: str) -> Claim:
    own = results["controller"]
    held = [fmean(of_seed["trace"]["kl"][-own["judged"] :]) for of_seed in results["controlled"][method]]
    return Claim.of(
        f"{method}: the adaptive controller holds its KL target, each seed's mean over the last {own['judged']} updates",
        f"{listed(held)} nats",
        "{1:g} nats within {0:.0%}",
        near(held, 0.1, own["target"]),
    )


def as_code(text: str) -> str:
    return "`" + text.replace("\n", "⏎") + "`"


def table(results: dict[str, Any]) -> Table:
    classifiers, real = results["classifiers"], results["real"]
    prompt = as_code(results["reference"][0]["prompts"][0])

    def row(name: str, of_seeds: list[dict[str, Any]]) -> tuple[str, ...]:
        def over_seeds(key: str, digits: int) -> str:
            return spread(values(of_seeds, key), digits)

        kl = mean(of_seeds, "kl")
        return (
            name,
            over_seeds("reward", 3),
            "0" if kl == 0 else over_seeds("kl", 2 if kl < 10 else 1),
            over_seeds("nll", 2),
            over_seeds("distinct4", 2),
            over_seeds("distinct4_all", 3),
            as_code(of_seeds[0]["answers"][0]),
        )

    rows = [
        (
            "real text (proxy: of that on strings)",
            spread(values(classifiers, "strings"), 3),
            "",
            f"{real['nll']:.2f}",
            f"{real['distinct4']:.2f}",
            "",
            "",
        ),
        row("reference (beta infinite)", results["reference"]),
    ]
    for method in METHODS:
        for beta, of_seeds in reversed(curve(results, method).items()):
            if beta < inf:
                rows.append(row(f"{method}, beta {beta:g}", of_seeds))
        if method in results["controlled"]:
            target = f"{method}, KL held to {results['controller']['target']:g}"
            rows.append(row(target, results["controlled"][method]))
    columns = (
        "",
        "proxy",
        "KL, nats",
        "judge's nats a character",
        "distinct-4",
        "over all answers",
        f"answer to {prompt}",
    )
    return Table(columns, rows, "Mean ± sd over seeds")
