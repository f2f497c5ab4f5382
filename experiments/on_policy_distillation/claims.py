"""What the results must show, from them alone."""

from __future__ import annotations

from typing import Any

from vae.claims import Bound, Claim, Table, at_most, below, mean, ordered, spread, values

DIVERGENCES = ("forward", "jensen_shannon", "reverse")
WHOLE = "own, reverse of whole answers"  # the only one that is not token by token


def lowest(results: dict[str, Any], key: str, best: str, methods: list[str]) -> Bound:
    """Whether that method has the lowest value, in every seed."""
    of_best = values(results["methods"][best], key)
    others = [values(results["methods"][method], key) for method in methods if method != best]
    return below((a - b for other in others for a, b in zip(of_best, other, strict=True)), 0)


def claims(results: dict[str, Any]) -> list[Claim]:
    token_wise = [method for method in results["methods"] if method != WHOLE]
    of_reverse = {method: mean(of_seeds, "reverse") for method, of_seeds in results["methods"].items()}
    first, second = sorted(token_wise, key=of_reverse.get)[:2]
    made = [
        Claim.of(
            "token by token, on-policy reverse KL ends with the lowest KL(student || teacher) of whole answers, in every seed",
            f"{first} {of_reverse[first]:.2f} nats, next {second} {of_reverse[second]:.2f}",
            "own, reverse",
            lowest(results, "reverse", "own, reverse", token_wise),
        )
    ]
    for divergence in DIVERGENCES:
        own, text = (values(results["methods"][f"{where}, {divergence}"], "reverse") for where in ("own", "text"))
        made.append(
            Claim.of(
                f"{divergence}: the student's own answers lower that KL further than given text, in every seed",
                f"{spread(own)} and {spread(text)} nats",
                "lower on its own",
                ordered(own, text),
            )
        )
    of_forward = {method: mean(of_seeds, "forward") for method, of_seeds in results["methods"].items()}
    nearest = min(of_forward, key=of_forward.get)
    whole, token = (values(results["methods"][method], "reverse") for method in (WHOLE, "own, reverse"))
    return [
        *made,
        Claim.of(
            "the other way round, KL(teacher || student), the forward KL on given text is best, in every seed",
            f"{nearest} {of_forward[nearest]:.2f} nats; text, forward {of_forward['text, forward']:.2f}",
            "text, forward",
            lowest(results, "forward", "text, forward", list(results["methods"])),
        ),
        Claim.of(
            "what a token changes later is worth its noise: the gradient of whole answers ends no higher, in every seed",
            f"{spread(whole)} and {spread(token)} nats",
            "no higher",
            at_most((a - b for a, b in zip(whole, token, strict=True)), 0),
        ),
    ]


def table(results: dict[str, Any]) -> Table:
    rows = [("start", "0", *_row(results["start"]))]
    for method, of_seeds in results["methods"].items():
        rows.append((method.replace("_", "-"), str(of_seeds[0]["updates"]), *_row(of_seeds)))
    heads = (
        "answers, divergence",
        "updates",
        "KL(student || teacher), nats an answer",
        "KL(teacher || student)",
        "teacher's nats a character of the student's",
        "student's nats a character of text",
    )
    title = f"Answers of {results['answer']} characters; the teacher has {results['teacher_nll']:.2f} nats a character of text"
    return Table(heads, rows, title)


def _row(of_seeds: list[dict[str, float]]) -> list[str]:
    return [spread(of_seed[key] for of_seed in of_seeds) for key in ("reverse", "forward", "teacher_nll", "nll")]
