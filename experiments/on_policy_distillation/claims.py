"""What the results must show, from them alone."""

from __future__ import annotations

from statistics import fmean
from typing import Any

from vae.claims import Claim, Table, spread

DIVERGENCES = ("forward", "jensen_shannon", "reverse")
WHOLE = "own, reverse of whole answers"  # the only one that is not token by token


def values(results: dict[str, Any], method: str, key: str) -> list[float]:
    """Of each seed."""
    return [of_seed[key] for of_seed in results["methods"][method]]


def lowest(results: dict[str, Any], key: str, methods: list[str]) -> list[str]:
    """The method with the lowest value, for each seed."""
    return [min(methods, key=lambda m: values(results, m, key)[seed]) for seed in range(len(results["start"]))]


def claims(results: dict[str, Any]) -> list[Claim]:
    token_wise = [method for method in results["methods"] if method != WHOLE]
    of_reverse = {method: fmean(values(results, method, "reverse")) for method in results["methods"]}
    first, second = sorted(token_wise, key=of_reverse.get)[:2]
    made = [
        Claim(
            "token by token, on-policy reverse KL ends with the lowest KL(student || teacher) of whole answers, in every seed",
            set(lowest(results, "reverse", token_wise)) == {"own, reverse"},
            f"{first} {of_reverse[first]:.2f} nats, next {second} {of_reverse[second]:.2f}",
            "own, reverse",
        )
    ]
    for divergence in DIVERGENCES:
        own, text = (values(results, f"{where}, {divergence}", "reverse") for where in ("own", "text"))
        made.append(
            Claim(
                f"{divergence}: the student's own answers lower that KL further than given text, in every seed",
                all(a < b for a, b in zip(own, text, strict=True)),
                f"{spread(own)} and {spread(text)} nats",
                "lower on its own",
            )
        )
    of_forward = {method: fmean(values(results, method, "forward")) for method in results["methods"]}
    nearest = min(of_forward, key=of_forward.get)
    made += [
        Claim(
            "the other way round, KL(teacher || student), the forward KL on given text is best, in every seed",
            set(lowest(results, "forward", list(results["methods"]))) == {"text, forward"},
            f"{nearest} {of_forward[nearest]:.2f} nats; text, forward {of_forward['text, forward']:.2f}",
            "text, forward",
        ),
        Claim(
            "what a token changes later is worth its noise: the gradient of whole answers ends no higher, in every seed",
            all(
                whole <= token
                for whole, token in zip(
                    values(results, WHOLE, "reverse"), values(results, "own, reverse", "reverse"), strict=True
                )
            ),
            f"{spread(values(results, WHOLE, 'reverse'))} and {spread(values(results, 'own, reverse', 'reverse'))} nats",
            "no higher",
        ),
    ]
    return made


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
