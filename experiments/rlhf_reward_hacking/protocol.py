"""RLHF in miniature: a language model tuned for a reward that can be gamed, held to its reference by beta KL, or not.

A character-level GRU learns English from the reference manual in `pydoc_data.topics`; a small classifier learns from a few
hundred snippets which text is about strings; REINFORCE and GRPO tune the GRU to please it. A second GRU, of the other half
of the manual, judges whether the result is still English.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import Any

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
from vae.experiment import Context
from vae.files import write_atomically
from vae.kl import k1, k3, kl_categorical
from vae.policy import GRPO, PolicyObjective, Reinforce
from vae.seeding import generator

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
METHODS = ("REINFORCE", "GRPO")


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
