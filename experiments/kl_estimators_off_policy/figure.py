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
        words = f"{results['reuse']} steps a batch" if penalty != "target" else "1 step a batch"
        name = penalty if penalty != "target" else "exact, fresh samples"
        third.plot(
            tuned(results, penalty, "kl"),
            tuned(results, penalty, "reward"),
            "*" if penalty == "target" else "o",
            ms=10 if penalty == "target" else 6,
            mec="white",
            color=OF_PENALTY[penalty],
            label=f"{name}, {words}" if penalty == "target" else name,
        )
    third.set(
        xlabel="KL(pi || pi_ref), nats an answer", ylabel="reward", title=f"Tuned, {results['reuse']} steps a batch"
    )
    third.legend(fontsize=7)
    return fig
