"""RLHF in miniature: a language model tuned for a reward that can be gamed, held to its reference by beta KL, or not.

A character-level GRU learns English from the reference manual in `pydoc_data.topics`; a small classifier learns from a few
hundred snippets which text is about strings; REINFORCE and GRPO tune the GRU to please it. A second GRU, of the other half
of the manual, judges whether the result is still English.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from itertools import pairwise
from math import inf, sqrt
from pathlib import Path
from statistics import fmean, stdev
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from experiments.rlhf_reward_hacking.language import (
    Classifier,
    Corpus,
    LanguageModel,
    corpus,
    distinct,
    fit_classifier,
    nats_a_character,
    pretrain,
    snippets,
    windows,
)
from vae.beta import AdaptiveKL
from vae.experiment import Claim, Context, Table, spread
from vae.files import write_atomically
from vae.kl import k1, k3, kl_categorical
from vae.policy import GRPO, PolicyObjective, Reinforce
from vae.seeding import generator

if TYPE_CHECKING:
    from matplotlib.figure import Figure

PAPER = (
    "Ziegler et al. 2019 (KL penalty and its controller); Shao et al. 2024 (GRPO); Gao et al. 2022 (over-optimisation)"
)
CLAIM = (
    "Without a KL penalty the proxy reward rises while fluency collapses into repetition; an intermediate beta raises the "
    "reward and keeps fluency; a large beta barely moves."
)

# A seed draws the classifier's snippets and weights and everything in tuning; the split of the manual and the two
# language models are the same for all seeds. Seed 0 served the pilots and is not among them.
SHARED = {
    "split": 0,
    "width": 192,
    "classifier": {"snippets": 300, "epochs": 40, "batch": 50, "lr": 3e-3, "dropout": 0.2},
    "prompt": 16,
    "answer": 48,
    "group": 8,
    "batch": 64,
    "lr": 2.5e-3,
    "updates": 120,
    "controller": {
        "target": 6.0,
        "horizon": 1024,
        "batch": 64,
        "init": {"REINFORCE": 0.05, "GRPO": 0.5},
        "updates": 150,
        "judged": 60,
    },
    "evaluated": 512,
}
SETTINGS = {
    "quick": {
        **SHARED,
        "pretraining": {"steps": 700, "batch": 32, "length": 32, "lr": 8e-3, "dropout": 0.15},
        "seeds": [1],
        "betas": {"REINFORCE": [0, 0.05, 0.5], "GRPO": [0, 0.5, 2]},
        "controlled": ["REINFORCE"],
    },
    "full": {
        **SHARED,
        "pretraining": {"steps": 1500, "batch": 32, "length": 32, "lr": 8e-3, "dropout": 0.25},
        "seeds": [2, 3, 4],
        "betas": {"REINFORCE": [0, 0.01, 0.05, 0.1, 0.5], "GRPO": [0, 0.01, 0.05, 0.1, 0.5, 2]},
        "controlled": ["REINFORCE", "GRPO"],
    },
}
# Decided on a pilot. GRPO divides the reward by its deviation in a group and so has another scale of beta.
INTERMEDIATE = {"REINFORCE": 0.05, "GRPO": 0.5}
LARGE = {"REINFORCE": 0.5, "GRPO": 2}
METHODS = ("REINFORCE", "GRPO")
COLOURS = {"REINFORCE": "#0072b2", "GRPO": "#d55e00"}


# --- tuning and measuring -------------------------------------------------------------------------------------------


def objective(settings: dict[str, Any], method: str, beta: float | None) -> PolicyObjective:
    """Of the library, as published, at a constant beta; without one, at what holds the KL to the controller's target."""
    schedule = None
    if beta is None:
        own = settings["controller"]
        schedule = AdaptiveKL(own["target"], own["horizon"], own["init"][method], own["batch"])
    made = {"REINFORCE": Reinforce, "GRPO": partial(GRPO, penalty="loss_k3")}[method]
    return made(group_size=settings["group"], beta=1.0 if beta is None else beta, schedule=schedule)


def tune(
    policy: LanguageModel,
    reference: LanguageModel,
    classifier: Classifier,
    objective: PolicyObjective,
    text: Tensor,
    settings: dict[str, Any],
    updates: int,
    noise: torch.Generator,
) -> dict[str, list[float]]:
    """One step of Adam on each batch of fresh answers. Returns what each batch had: reward, exact KL, k1, beta."""
    lr, group = settings["lr"], settings["group"]
    # A short memory of squares: REINFORCE's gradient shrinks with the reward's spread, and the step should not.
    optimizer = torch.optim.Adam(policy.parameters(), lr, betas=(0.9, 0.95), fused=True)
    trace: dict[str, list[float]] = {"reward": [], "kl": [], "k1": [], "beta": []}
    for step in range(updates):
        optimizer.param_groups[0]["lr"] = lr * min(1, (step + 1) / 10) * (1 - step / updates)
        prompts = windows(text, settings["prompt"], settings["batch"] // group, noise)
        answers = policy.generate(prompts, settings["answer"], group, noise)
        with torch.no_grad():
            reward, log_ref = classifier(answers), reference.log_probs(prompts, answers)
        log_pi = policy.log_probs(prompts, answers)
        terms = objective(
            rewards=reward,
            log_pi=of_drawn(log_pi, answers),
            log_ref=of_drawn(log_ref, answers),
            mask=torch.ones_like(answers, dtype=torch.bool),
            step=step,
        )
        optimizer.zero_grad()
        terms["loss"].backward()
        nn.utils.clip_grad_norm_(policy.parameters(), 1.0)
        optimizer.step()
        exact = kl_categorical(p_log_probs=log_pi.detach(), q_log_probs=log_ref).sum(-1).mean()
        for name, value in (("reward", terms["reward"]), ("kl", exact), ("k1", terms["kl"]), ("beta", terms["beta"])):
            trace[name].append(float(f"{value.item():.4g}"))
    return trace


def of_drawn(log_probs: Tensor, characters: Tensor) -> Tensor:
    """(B, L) out of (B, L, V)."""
    return log_probs.gather(-1, characters.unsqueeze(-1)).squeeze(-1)


@torch.no_grad()
def evaluate(
    policy: LanguageModel,
    reference: LanguageModel,
    judge: LanguageModel,
    classifier: Classifier,
    text: Corpus,
    settings: dict[str, Any],
) -> dict[str, Any]:
    """One answer to each of many prompts that nothing was trained on; the same prompts and noise for every policy."""
    noise = generator(settings["split"], "evaluation")
    prompts = windows(text.encode(text.held_out), settings["prompt"], settings["evaluated"], noise)
    answers = policy.generate(prompts, settings["answer"], 1, noise)
    log_pi, log_ref = policy.log_probs(prompts, answers), reference.log_probs(prompts, answers)
    of_pi, of_ref = of_drawn(log_pi, answers), of_drawn(log_ref, answers)
    measured = {
        "reward": classifier(answers),
        "kl": kl_categorical(p_log_probs=log_pi, q_log_probs=log_ref).sum(-1),
        "k1": k1(log_pi=of_pi, log_ref=of_ref).sum(-1),
        "k3": k3(log_pi=of_pi, log_ref=of_ref).sum(-1),
        "nll": -of_drawn(judge.log_probs(prompts, answers), answers).mean(-1),
    }
    shown = slice(0, 3)
    return {
        **{name: value.mean() for name, value in measured.items()},
        **{f"{name}_sd": value.std() for name, value in measured.items()},
        **{f"distinct{n}": distinct(answers, n) for n in (1, 2, 4)},
        "distinct4_all": distinct(answers, 4, pooled=True),
        "prompts": [text.decode(prompt) for prompt in prompts[shown]],
        "answers": [text.decode(answer) for answer in answers[shown]],
    }


# --- the pieces: each may run in a process of its own ---------------------------------------------------------------


def save(net: nn.Module, path: Path) -> None:
    write_atomically(path, lambda file: torch.save(net.state_dict(), file))


def load(net: nn.Module, path: Path) -> Any:
    net.load_state_dict(torch.load(path))
    return net.requires_grad_(False)


def train_language_model(settings: dict[str, Any], name: str, folder: Path) -> dict[str, float]:
    """The reference or the judge, each on its own half, to folder/name.pt; nats a character on what neither has seen."""
    torch.set_num_threads(1)
    text, noise = corpus(settings["split"]), generator(settings["split"], name)
    net = LanguageModel(len(text.alphabet), settings["width"], noise)
    own = text.encode(getattr(text, name))
    pretrain(net, own, **settings["pretraining"], noise=noise)
    save(net, folder / f"{name}.pt")
    return {"nll": nats_a_character(net, text.encode(text.held_out), settings["prompt"] + settings["answer"])}


@torch.no_grad()
def share_right(net: Classifier, x: Tensor, y: Tensor) -> float:
    return ((net(x) > 0.5) == y).float().mean().item()


def train_classifier(settings: dict[str, Any], seed: int, folder: Path) -> dict[str, Any]:
    """The proxy reward, on snippets of the reference's half; how often right, and how it rates real text, on the judge's."""
    torch.set_num_threads(1)
    own = dict(settings["classifier"])
    text, noise, n = corpus(settings["split"]), generator(seed, "classifier"), own.pop("snippets")
    x, y = snippets(text, text.reference, n, settings["answer"], noise)
    net = Classifier(len(text.alphabet), noise)
    fit_classifier(net, x, y, **own, noise=noise)
    save(net, folder / f"classifier,seed={seed}.pt")
    x_new, y_new = snippets(text, text.judge, 2000, settings["answer"], generator(seed, "validation"))
    with torch.no_grad():
        strings, others = net(x_new[y_new]), net(x_new[~y_new])
    return {
        "trained": share_right(net, x, y),
        "validation": share_right(net, x_new, y_new),
        "strings": strings.mean(),
        "strings_99": strings.quantile(0.99),
        "others": others.mean(),
    }


def tuned(settings: dict[str, Any], method: str | None, beta: float | None, seed: int, folder: Path) -> dict[str, Any]:
    """A policy evaluated, with the trace of its tuning. No method: the reference itself; no beta: the controller."""
    torch.set_num_threads(1)
    text = corpus(settings["split"])
    characters, any_noise = len(text.alphabet), generator(0)
    reference, judge = (
        load(LanguageModel(characters, settings["width"], any_noise), folder / f"{name}.pt")
        for name in ("reference", "judge")
    )
    classifier = load(Classifier(characters, any_noise), folder / f"classifier,seed={seed}.pt")
    policy, trace = copy.deepcopy(reference).requires_grad_(True), {}
    if method is not None:
        updates = settings["updates"] if beta is not None else settings["controller"]["updates"]
        # the same prompts and the same uniform numbers for every beta and both methods
        noise, half = generator(seed, "tuning"), text.encode(text.reference)
        own = objective(settings, method, beta)
        trace = tune(policy, reference, classifier, own, half, settings, updates, noise)
    if beta is not None:  # a controller's trace is kept whole, of the others one number for four updates
        trace = {name: [float(f"{fmean(v[i : i + 4]):.4g}") for i in range(0, len(v), 4)] for name, v in trace.items()}
    return {**evaluate(policy, reference, judge, classifier, text, settings), "trace": trace}


@torch.no_grad()
def real_text(settings: dict[str, Any], folder: Path) -> dict[str, float]:
    """How what was really written after the prompts fares with the judge and with distinct-n."""
    text = corpus(settings["split"])
    judge = load(LanguageModel(len(text.alphabet), settings["width"], generator(0)), folder / "judge.pt")
    noise, length = generator(settings["split"], "evaluation"), settings["prompt"] + settings["answer"]
    whole = windows(text.encode(text.held_out), length, settings["evaluated"], noise)
    prompts, answers = whole[:, : settings["prompt"]], whole[:, settings["prompt"] :]
    nll = -of_drawn(judge.log_probs(prompts, answers), answers)
    return {"nll": nll.mean(), **{f"distinct{n}": distinct(answers, n) for n in (1, 2, 4)}}


def measure(context: Context) -> dict[str, Any]:
    """Language models and classifiers side by side, then every policy."""
    settings, folder, seeds = context.settings, context.folder, context.settings["seeds"]
    first: dict[str, Callable[[], Any]] = {
        name: partial(train_language_model, settings, name, folder) for name in ("reference", "judge")
    }
    first |= {f"classifier,seed={seed}": partial(train_classifier, settings, seed, folder) for seed in seeds}
    found = context.cached_many(first)

    betas = {method: [*settings["betas"][method], *[None] * (method in settings["controlled"])] for method in METHODS}
    names = {
        (method, beta, seed): f"{method},beta={'adaptive' if beta is None else beta},seed={seed}"
        for seed in seeds
        for method in METHODS
        for beta in betas[method]
    }
    names |= {(None, None, seed): f"untuned,seed={seed}" for seed in seeds}
    policies = context.cached_many({name: partial(tuned, settings, *key, folder) for key, name in names.items()})
    text = corpus(settings["split"])

    def by_seed(method: str | None, beta: float | None) -> list[dict[str, Any]]:
        return [policies[names[method, beta, seed]] for seed in seeds]

    return {
        "alphabet": len(text.alphabet),
        "characters": {part: len(text.encode(getattr(text, part))) for part in ("reference", "judge", "held_out")},
        "language_models": {name: found[name]["nll"] for name in ("reference", "judge")},
        "classifiers": [found[f"classifier,seed={seed}"] for seed in seeds],
        "real": context.cached("real", lambda: real_text(settings, folder)),
        "reference": by_seed(None, None),
        "policies": {method: {str(b): by_seed(method, b) for b in settings["betas"][method]} for method in METHODS},
        "controlled": {method: by_seed(method, None) for method in settings["controlled"]},
        "controller": settings["controller"],
    }


# --- claims ---------------------------------------------------------------------------------------------------------


def curve(results: dict[str, Any], method: str) -> dict[float, list[dict[str, Any]]]:
    """The policies by rising beta, a list over seeds each; the reference is beta = infinity."""
    of_beta = {float(beta): of_seeds for beta, of_seeds in results["policies"][method].items()}
    return {**dict(sorted(of_beta.items())), inf: results["reference"]}


def mean(of_seeds: list[dict[str, Any]], key: str) -> float:
    return fmean(of_seed[key] for of_seed in of_seeds)


def steps_up(by_beta: list[list[float]], tolerance: float = 0.02) -> tuple[int, int, float]:
    """How often a quantity that should fall with beta rises, how often it ties, and the worst rise over the range.

    by_beta: values over seeds for each beta, rising. A rise of the mean over seeds from one beta to the next is a tie if it
    is below `tolerance` of the range (the first less the last), or below two standard errors of the paired differences
    over the seeds where there are three or more.
    """
    spanned = fmean(by_beta[0]) - fmean(by_beta[-1])
    rises = ties = 0
    worst = 0.0
    for smaller, larger in pairwise(by_beta):
        differences = [b - a for a, b in zip(smaller, larger, strict=True)]
        rise, n = fmean(differences), len(differences)
        error = stdev(differences) / sqrt(n) if n > 2 else 0.0
        worst = max(worst, rise / spanned)
        if rise > max(tolerance * spanned, 2 * error):
            rises += 1
        elif rise > 0:
            ties += 1
    return rises, ties, worst


def claims(results: dict[str, Any]) -> list[Claim]:
    made = [judge_classifier(results)]
    reference = results["reference"]
    for method in METHODS:
        policies = curve(results, method)
        free, middle, large = (policies[beta] for beta in (0.0, INTERMEDIATE[method], LARGE[method]))
        made += [
            judge_free(method, free, reference, results["classifiers"]),
            judge_intermediate(method, middle, reference),
            judge_large(method, large, free, reference),
        ]
        for key, name in (("reward", "proxy"), ("kl", "KL")):
            rises, ties, worst = steps_up([[of_seed[key] for of_seed in of_seeds] for of_seeds in policies.values()])
            made.append(
                Claim(
                    f"{method}: the {name} falls as beta rises, over {len(policies)} betas",
                    rises == 0,
                    f"{rises} rises, {ties} ties, the largest {worst:.1%} of the range",
                    "no rise; below 2% of the range or two standard errors is a tie",
                )
            )
    return [*made, *(judge_controller(results, method) for method in results["controlled"])]


def judge_classifier(results: dict[str, Any]) -> Claim:
    right = [classifier["validation"] for classifier in results["classifiers"]]
    return Claim(
        "the proxy is better than chance on text it has not seen, and far from perfect",
        all(0.6 < share < 0.9 for share in right),
        f"{' , '.join(f'{share:.1%}' for share in right)} right".replace(" ,", ","),
        "60% to 90% (chance 50%)",
    )


def judge_free(method: str, free: list[dict], reference: list[dict], classifiers: list[dict]) -> Claim:
    reward, nll, repeated = mean(free, "reward"), mean(free, "nll"), mean(free, "distinct4")
    real, nll_before, repeated_before = (
        mean(classifiers, "strings_99"),
        mean(reference, "nll"),
        mean(reference, "distinct4"),
    )
    return Claim(
        f"{method}, beta 0: the proxy rises beyond real text, fluency collapses, into repetition",
        reward > real and nll > nll_before + 1 and repeated < repeated_before / 2,
        f"proxy {mean(reference, 'reward'):.2f} to {reward:.2f}; {nll_before:.2f} to {nll:.2f} nats a character; "
        f"distinct-4 {repeated_before:.2f} to {repeated:.2f}",
        f"above {real:.2f} (99% of real text on strings are below); 1 nat a character worse; distinct-4 halved",
    )


def judge_intermediate(method: str, middle: list[dict], reference: list[dict]) -> Claim:
    gain = fmean((m["reward"] - r["reward"]) / r["reward_sd"] for m, r in zip(middle, reference, strict=True))
    worse = mean(middle, "nll") - mean(reference, "nll")
    kept = mean(middle, "distinct4") / mean(reference, "distinct4")
    return Claim(
        f"{method}, beta {INTERMEDIATE[method]:g}: the proxy rises and fluency is kept",
        gain > 1 and worse < 0.25 and kept > 0.95,
        f"proxy up {gain:.2f} sd of the reference's; {worse:+.2f} nats a character; {kept:.1%} of distinct-4",
        "more than 1 sd; less than 0.25 nats worse; more than 95%",
    )


def judge_large(method: str, large: list[dict], free: list[dict], reference: list[dict]) -> Claim:
    before = mean(reference, "reward")
    gain = (mean(large, "reward") - before) / (mean(free, "reward") - before)
    kl = mean(large, "kl")
    return Claim(
        f"{method}, beta {LARGE[method]:g}: barely moves",
        gain < 0.1 and kl < 1,
        f"{gain:.1%} of the proxy's rise at beta 0, KL {kl:.3f} nats",
        "less than 10%, less than 1 nat",
    )


def judge_controller(results: dict[str, Any], method: str) -> Claim:
    own = results["controller"]
    held = [fmean(of_seed["trace"]["kl"][-own["judged"] :]) for of_seed in results["controlled"][method]]
    return Claim(
        f"{method}: the adaptive controller holds its KL target, each seed's mean over the last {own['judged']} updates",
        all(abs(kl / own["target"] - 1) < 0.1 for kl in held),
        f"{', '.join(f'{kl:.2f}' for kl in held)} nats",
        f"{own['target']:g} nats within 10%",
    )


# --- table and figure -----------------------------------------------------------------------------------------------


def as_code(text: str) -> str:
    return "`" + text.replace("\n", "⏎") + "`"


def table(results: dict[str, Any]) -> Table:
    classifiers, real = results["classifiers"], results["real"]
    prompt = as_code(results["reference"][0]["prompts"][0])

    def row(name: str, of_seeds: list[dict[str, Any]]) -> tuple[str, ...]:
        def over_seeds(key: str, digits: int) -> str:
            return spread((of_seed[key] for of_seed in of_seeds), digits)

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
            spread((c["strings"] for c in classifiers), 3),
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


def figure(results: dict[str, Any]) -> Figure:
    import matplotlib.pyplot as plt

    fig, axes = plt.subplots(2, 3, figsize=(12, 6.8))
    panels = (
        ("reward", "proxy reward", "The proxy rises with KL ..."),
        ("nll", "judge's nats a character", "... while English is lost ..."),
        ("distinct4", "distinct-4 within an answer", "... to repetition"),
    )
    for ax, (key, label, title) in zip(axes[0], panels, strict=True):
        draw_against_kl(ax, results, key)
        ax.set(title=title, xlabel="KL(policy || reference), nats an answer", ylabel=label)
    draw_real(axes[0], results)
    axes[0, 0].legend(fontsize=8, loc="upper left")
    draw_beta(axes[1, 0], results)
    draw_controller(axes[1, 1], axes[1, 2], results)
    fig.get_layout_engine().set(w_pad=0.12, h_pad=0.1)
    return fig


def draw_against_kl(ax, results: dict[str, Any], key: str) -> None:
    """A large dot is the mean over seeds at the beta that is written beside it, small ones are the seeds."""
    for method in METHODS:
        colour = COLOURS[method]
        policies = {beta: of_seeds for beta, of_seeds in curve(results, method).items() if beta < inf}
        each = [of_seed for of_seeds in policies.values() for of_seed in of_seeds]
        x, y = ([mean(of_seeds, k) for of_seeds in policies.values()] for k in ("kl", key))
        if key == "reward":  # how the policies without a penalty went there
            for of_seed in policies[0.0]:
                ax.plot(of_seed["trace"]["kl"], of_seed["trace"][key], color=colour, lw=0.8, alpha=0.6)
        else:
            ax.plot(x, y, color=colour, lw=1)
        ax.plot(
            [of_seed["kl"] for of_seed in each], [of_seed[key] for of_seed in each], "o", color=colour, ms=3, alpha=0.5
        )
        ax.plot(x, y, "o", color=colour, ms=6, mec="white", label=method)
        upper = (method == "REINFORCE") != (key == "distinct4")
        for beta, *at in zip(policies, x, y, strict=True):
            ax.annotate(
                f"{beta:g}",
                at,
                (-4, 5) if upper else (4, -11),
                textcoords="offset points",
                ha="right" if upper else "left",
                fontsize=7.5,
                color=colour,
            )
    ax.plot(0, mean(results["reference"], key), "o", color="#1d2127", ms=8, zorder=5, label="reference, beta infinite")
    ax.set_xscale("symlog", linthresh=0.1, linscale=0.5)
    ax.set_xlim(-0.02, 600)
    ax.set_xticks([0, 0.1, 1, 10, 100], ["0", "0.1", "1", "10", "100"])
    ax.minorticks_off()
    ax.margins(y=0.12)


def draw_real(axes, results: dict[str, Any]) -> None:
    """What real text has, as dashed lines."""
    levels = (
        (mean(results["classifiers"], "strings"), "real text on strings"),
        (results["real"]["nll"], "real text"),
        (results["real"]["distinct4"], "real text"),
    )
    for ax, (level, words) in zip(axes, levels, strict=True):
        ax.axhline(level, color="#667080", lw=1, ls=(0, (4, 2)), zorder=0)
        ax.annotate(
            words,
            (0.98, level),
            (0, 3),
            xycoords=("axes fraction", "data"),
            textcoords="offset points",
            ha="right",
            fontsize=7.5,
            color="#667080",
        )


def predicted_kl(reference: list[dict[str, Any]], method: str, beta: float) -> float:
    """KL of the best policy if the reference's rewards are Gaussian: (sd / beta)^2 / 2; GRPO makes the sd 1."""
    sd = 1.0 if method == "GRPO" else mean(reference, "reward_sd")
    return (sd / beta) ** 2 / 2


def draw_beta(ax, results: dict[str, Any]) -> None:
    for method in METHODS:
        colour = COLOURS[method]
        policies = {beta: of_seeds for beta, of_seeds in curve(results, method).items() if 0 < beta < inf}
        ax.plot(list(policies), [mean(p, "kl") for p in policies.values()], "o", color=colour, label=method)
        betas = [0.008 * 400 ** (i / 40) for i in range(41)]
        ax.plot(betas, [predicted_kl(results["reference"], method, beta) for beta in betas], color=colour, lw=0.9)
        ax.axhline(mean(curve(results, method)[0.0], "kl"), color=colour, lw=0.9, ls=(0, (1, 2)))
    lowest = min(mean(curve(results, method)[0.0], "kl") for method in METHODS)
    ax.annotate(
        "dotted: beta 0",
        (0.98, lowest),
        (0, -4),
        xycoords=("axes fraction", "data"),
        textcoords="offset points",
        ha="right",
        va="top",
        fontsize=7.5,
        color="#667080",
    )
    ax.set(
        xscale="log",
        yscale="log",
        xlim=(0.008, 3.2),
        ylim=(0.02, 1000),
        xlabel="beta",
        ylabel="KL, nats an answer",
        title="KL by beta; lines: (sd / beta)² / 2",
    )
    ax.set_xticks([0.01, 0.05, 0.1, 0.5, 2], ["0.01", "0.05", "0.1", "0.5", "2"])
    ax.set_yticks([0.1, 1, 10, 100], ["0.1", "1", "10", "100"])
    ax.minorticks_off()
    ax.legend(fontsize=8, loc="lower left")


def draw_controller(ax, right, results: dict[str, Any]) -> None:
    own = results["controller"]
    ax.axhspan(0.9 * own["target"], 1.1 * own["target"], color="#dce0e6", lw=0, label="target ± 10%")
    ax.axhline(own["target"], color="#667080", lw=1)
    for method, of_seeds in results["controlled"].items():
        for number, of_seed in enumerate(of_seeds):
            label = method if number == 0 else None
            ax.plot(of_seed["trace"]["kl"], color=COLOURS[method], lw=1, alpha=0.8, label=label)
            right.plot(of_seed["trace"]["beta"], color=COLOURS[method], lw=1.2, alpha=0.8)
    judged = own["updates"] - own["judged"]
    ax.axvline(judged, color="#667080", lw=0.8, ls=(0, (1, 2)))
    ax.annotate("judged", (judged, 0), (3, 4), textcoords="offset points", fontsize=7.5, color="#667080")
    ax.set(xlabel="update", ylabel="KL, nats an answer", ylim=(0, None), title="The controller holds the KL ...")
    ax.legend(fontsize=8, loc="lower center")
    right.set(xlabel="update", ylabel="beta", yscale="log", ylim=(0.02, 1), title="... by moving beta")
    right.set_yticks([0.02, 0.05, 0.1, 0.2, 0.5, 1], ["0.02", "0.05", "0.1", "0.2", "0.5", "1"])
    right.minorticks_off()
