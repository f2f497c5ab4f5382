"""What is claimed of students and teachers, beside the paper's errors."""

from __future__ import annotations

from typing import Any

from experiments.distillation_hinton2015.protocol import HARD
from vae.claims import Claim, Table, above, at_least, at_most, listed, mean, ordered, spread, values


def claims(results: dict[str, Any]) -> list[Claim]:
    """Errors are means over seeds, of the 10,000 test images."""
    teacher, hard, soft = (mean(runs, "test") for runs in (results["teacher"], results[HARD], results["soft"]["20"]))
    no3, few = results["no 3s"], results["7s and 8s alone"]
    before, after, all3 = (mean(no3, key) for key in ("on_classes", "repaired_on_classes", "of_classes"))
    wrong, repaired = mean(few, "test"), mean(few, "repaired")
    held = [
        Claim.of(
            "teacher < distilled (T = 20) < labels alone",
            f"{listed((teacher, soft, hard), '.1f', ' < ')} errors",
            "in this order (paper: 67 < 74 < 146)",
            ordered(teacher, soft, hard),
        ),
        Claim.of(
            "soft targets at T = 20 save errors",
            f"{hard - soft:.1f} errors fewer",
            "at least {:g} (paper: 72)",
            at_least(hard - soft, 8),
        ),
        Claim.of(
            "a student that never saw a 3 knows it, once its bias is repaired",
            f"{100 * (1 - after / all3):.1f}% of the 3s right",
            "at least {:.0%} (paper: 98.6%)",
            at_least(1 - after / all3, 0.95),
        ),
        Claim.of(
            "most of its errors on 3s were the bias",
            f"{before:.1f} to {after:.1f} errors on 3s",
            "{:words} or fewer are left (paper: 133 to 14)",
            at_most(after / before, 1 / 3),
        ),
        Claim.of(
            "so were those of a student of 7s and 8s alone",
            f"{wrong / 100:.1f}% to {repaired / 100:.1f}% errors",
            "{:words} or fewer are left (paper: 47.3% to 13.2%)",
            at_most(repaired / wrong, 1 / 2),
        ),
    ]
    if len(few) > 1:
        saved = [h["test"] - s["test"] for h, s in zip(results[HARD], results["soft"]["20"], strict=True)]
        held.append(
            Claim.of(
                "soft targets at T = 20 save errors from every seed",
                f"{', '.join(map(str, saved))} errors fewer",
                "fewer in each pair of students that begin alike",
                above(saved, 0),
            )
        )
    if "8" in results["soft"]:
        apart = abs(mean(results["soft"]["8"], "test") - soft)
        name = "temperatures of 8 and above are alike"
        held.append(Claim.of(name, f"{apart:.1f} errors apart", "at most {:g}", at_most(apart, 10)))
    return held


def table(results: dict[str, Any]) -> Table:
    def row(name: str, paper: str, others: str, runs: list[dict[str, Any]], key: str = "test") -> tuple[str, ...]:
        return name, paper, others, spread(values(runs, key), 1)

    no3, few = results["no 3s"], results["7s and 8s alone"]
    rows = [
        row("teacher 1200-1200", "67", "", results["teacher"]),
        row("student 800-800, labels alone", "146", "", results[HARD]),
        *(
            row(f"student, soft targets at T = {t}", "74" if t == "20" else "", "", runs)
            for t, runs in results["soft"].items()
        ),
        row("no 3s in the transfer set", "206", "", no3),
        row("... of these on the 1,010 3s", "133", "", no3, "on_classes"),
        row("... bias of the 3s moved by", "+3.5", "", no3, "bias"),
        row("... errors then", "109", "", no3, "repaired"),
        row("... of these on the 1,010 3s", "14", "22", no3, "repaired_on_classes"),
        row("7s and 8s alone in the transfer set", "4730", "", few),
        row("... biases of both moved by", "-7.6", "", few, "bias"),
        row("... errors then", "1320", "", few, "repaired"),
    ]
    return Table(
        ("errors on 10,000 test images", "paper", "reproduction (cybertronai)", "ours"), rows, "Mean ± sd over seeds"
    )
