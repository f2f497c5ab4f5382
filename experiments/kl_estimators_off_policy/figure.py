"""Bias and deviation of the loss's gradient along the path, and where tuned policies end."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from experiments.kl_estimators_off_policy.claims import bias, sd, tuned

if TYPE_CHECKING:
    from matplotlib.figure import Figure

LOSSES = {  # in the loss, sequences: colour and words
    "k2": ("#0072b2", "k2"),
    "k3": ("#d55e00", "k3"),
    "w k3, w of a token": ("#b98600", "w k3, token"),
    "w k3, w of the prefix": ("#009e73", "w k3, prefix"),
    "exact next-token KL, w of the past": ("#7a5195", "exact, w of the past"),
}
OF_PENALTY = {
    "loss_k2": "#0072b2",
    "loss_k3": "#d55e00",
    "reward": "#2f9bd6",
    "reward_is": "#b3589a",
    "loss_k3_is": "#b98600",
    "loss_k3_is, prefix": "#009e73",
    "loss_exact": "#667080",
    "loss_exact, prefix": "#7a5195",
    "target": "#1d2127",
}


def figure(results: dict[str, Any]) -> Figure:
    import matplotlib.pyplot as plt

    fig, (first, second, third) = plt.subplots(1, 3, figsize=(12, 3.9))
    distances = results["exact"]["distances"]
    for name, (colour, words) in LOSSES.items():
        first.plot(distances, bias(results, "sequences", "loss", name), "o-", ms=3, color=colour, label=words)
        second.plot(distances, sd(results, "sequences", "loss", name), "o-", ms=3, color=colour, label=words)
    first.set(xlabel="distance of pi_old", ylabel="bias / norm of the gradient", title="Bias of a loss's gradient")
    first.legend(fontsize=7.5)
    second.set(
        xlabel="distance of pi_old", yscale="log", ylabel="sd / norm of the gradient", title="Its deviation, one answer"
    )
    for penalty in results["tuned"]:
        name = "exact, fresh samples" if penalty == "target" else penalty
        trace = [sum(of_seeds) / len(of_seeds) for of_seeds in zip(*tuned(results, penalty, "trace"), strict=True)]
        steps = [results["reuse"] * (i + 1) for i in range(len(trace))]
        third.plot(steps, trace, color=OF_PENALTY[penalty], lw=1.4, ls="--" if penalty == "target" else "-", label=name)
    third.axvline((1 - results["judged"]) * steps[-1], color="#667080", lw=0.8, ls=(0, (1, 2)))
    third.set(
        xlabel="optimiser step",
        ylabel="KL(pi || pi_ref), nats an answer",
        title=f"Tuned, {results['reuse']} steps a batch",
    )
    third.legend(fontsize=7)
    return fig
