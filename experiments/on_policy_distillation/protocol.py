"""What is measured: a small character model distilled from a larger one by three divergences, on given text and on its own."""

from __future__ import annotations

import copy
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from experiments.rlhf_reward_hacking.language import LanguageModel, corpus, nats_a_character, pretrain, windows
from experiments.rlhf_reward_hacking.protocol import load, of_drawn, save, train_language_model
from vae.distillation import drawn_by_student, sequence_distillation_loss, token_distillation_loss
from vae.experiment import Context
from vae.kl import kl_categorical
from vae.seeding import generator

PAPER = "Agarwal et al. 2024 (GKD); Gu et al. 2024 (MiniLLM)"
CLAIM = "At equal compute, reverse KL on the student's own answers lowers the KL of whole answers from student to teacher most."

SHARED = {
    "split": 0,
    "prompt": 16,
    "lr": 4e-3,
    # share of the student's own answers, the others being real text; divergence; whether its gradient is that of whole
    # answers
    "methods": {
        "text, forward": [0.0, "forward", False],
        "text, jensen_shannon": [0.0, "jensen_shannon", False],
        "text, reverse": [0.0, "reverse", False],
        "half own, jensen_shannon": [0.5, "jensen_shannon", False],
        "own, forward": [1.0, "forward", False],
        "own, jensen_shannon": [1.0, "jensen_shannon", False],
        "own, reverse": [1.0, "reverse", False],
        "own, reverse of whole answers": [1.0, "reverse", True],
    },
}
# Seed 0 served the pilots.
SETTINGS = {
    "quick": {
        **SHARED,
        "width": 96,
        "pretraining": {"steps": 400, "batch": 32, "length": 32, "lr": 8e-3, "dropout": 0.1},
        "student": {"width": 24, "pretraining": {"steps": 200, "batch": 32, "length": 32, "lr": 1e-2, "dropout": 0.0}},
        "answer": 32,
        "batch": 48,
        "updates": 80,
        "evaluated": 256,
        "seeds": [1, 2, 3],
    },
    "full": {
        **SHARED,
        "width": 128,
        "pretraining": {"steps": 700, "batch": 32, "length": 32, "lr": 8e-3, "dropout": 0.15},
        "student": {"width": 32, "pretraining": {"steps": 300, "batch": 32, "length": 32, "lr": 1e-2, "dropout": 0.0}},
        "answer": 48,
        "batch": 64,
        "updates": 250,
        "evaluated": 512,
        "seeds": [1, 2, 3],
    },
}


def multiply_adds(net: nn.Module) -> int:
    """Of one character forward: each weight once, but for the embedding, which is looked up."""
    return sum(w.numel() for name, w in net.named_parameters() if not name.startswith("embedding"))


def updates_at_equal_compute(settings: dict[str, Any], own: float, student: nn.Module, teacher: nn.Module) -> int:
    """The settings' number for a method on given text, fewer for one whose student must write first.

    An update is the teacher's forward pass, and three passes' worth of the student, forward and backward; writing is one
    more of the student.
    """
    of_student, of_teacher = multiply_adds(student), multiply_adds(teacher)
    given = 3 * of_student + of_teacher
    return round(settings["updates"] * given / (given + own * of_student))


def distil(
    student: LanguageModel,
    teacher: LanguageModel,
    text: Tensor,
    settings: dict[str, Any],
    method: str,
    noise: torch.Generator,
) -> int:
    """Adam, its rate falling to zero. Returns the number of updates."""
    own, divergence, whole = settings["methods"][method]
    updates = updates_at_equal_compute(settings, own, student, teacher)
    optimizer = torch.optim.Adam(student.parameters(), settings["lr"], betas=(0.9, 0.99), fused=True)
    length = settings["prompt"] + settings["answer"]
    for step in range(updates):
        optimizer.param_groups[0]["lr"] = settings["lr"] * min(1, (step + 1) / 10) * (1 - step / updates)
        given = windows(text, length, settings["batch"], noise)
        prompts, answers = given[:, : settings["prompt"]], given[:, settings["prompt"] :]
        itself = drawn_by_student(settings["batch"], own, noise)
        if itself.any():
            answers = answers.clone()
            answers[itself] = student.generate(prompts[itself], settings["answer"], 1, noise)
        with torch.no_grad():
            of_teacher = teacher.log_probs(prompts, answers)
        both = {"student_logits": student.log_probs(prompts, answers), "teacher_logits": of_teacher}
        mask = torch.ones_like(answers, dtype=torch.bool)
        if whole:
            loss = sequence_distillation_loss(tokens=answers, mask=mask, **both)
        else:
            loss = token_distillation_loss(mask=mask, divergence=divergence, **both)
        optimizer.zero_grad()
        loss.mean().div(settings["answer"]).backward()
        nn.utils.clip_grad_norm_(student.parameters(), 1.0)
        optimizer.step()
    return updates


@torch.no_grad()
def evaluated(student: LanguageModel, teacher: LanguageModel, settings: dict[str, Any]) -> dict[str, float]:
    """After prompts that nothing was trained on: KL(student || teacher) of the student's own answers and KL(teacher ||
    student) of the teacher's, whole answers, in nats, by the exact KL of each next character; nats a character of text."""
    text = corpus(settings["split"])
    held_out, noise = text.encode(text.held_out), generator(settings["split"], "evaluation")
    prompts = windows(held_out, settings["prompt"], settings["evaluated"], noise)
    found = {}
    for name, p, q in (("reverse", student, teacher), ("forward", teacher, student)):
        answers = p.generate(prompts, settings["answer"], 1, generator(settings["split"], "answers"))
        log_p, log_q = p.log_probs(prompts, answers), q.log_probs(prompts, answers)
        kl = kl_categorical(p_log_probs=log_p, q_log_probs=log_q).sum(-1)
        found |= {name: kl.mean(), f"{name}_se": kl.std() / len(kl) ** 0.5}
        if p is student:
            found["teacher_nll"] = -of_drawn(log_q, answers).mean()
    return {**found, "nll": nats_a_character(student, held_out, settings["prompt"] + settings["answer"])}


def started(settings: dict[str, Any], seed: int, folder: Path) -> dict[str, float]:
    """The student as it starts, by maximum likelihood for a while, to folder/student,seed=N.pt."""
    torch.set_num_threads(1)
    text, noise, own = corpus(settings["split"]), generator(seed, "student"), settings["student"]
    student = LanguageModel(len(text.alphabet), own["width"], noise)
    pretrain(student, text.encode(text.reference), **own["pretraining"], noise=noise)
    save(student, folder / f"student,seed={seed}.pt")
    teacher = load(LanguageModel(len(text.alphabet), settings["width"], generator(0)), folder / "reference.pt")
    return evaluated(student, teacher, settings)


def distilled(settings: dict[str, Any], method: str, seed: int, folder: Path) -> dict[str, float]:
    """The student of one method, from the same start, prompts and uniform numbers as the others', evaluated."""
    torch.set_num_threads(1)
    text = corpus(settings["split"])
    characters, any_noise = len(text.alphabet), generator(0)
    teacher = load(LanguageModel(characters, settings["width"], any_noise), folder / "reference.pt")
    start = load(LanguageModel(characters, settings["student"]["width"], any_noise), folder / f"student,seed={seed}.pt")
    student = copy.deepcopy(start).requires_grad_(True)
    noise = generator(seed, "distillation")
    updates = distil(student, teacher, text.encode(text.reference), settings, method, noise)
    return {"updates": updates, **evaluated(student, teacher, settings)}


def measure(context: Context) -> dict[str, Any]:
    settings, folder, seeds = context.settings, context.folder, context.settings["seeds"]
    teacher = context.cached("reference", lambda: train_language_model(settings, "reference", folder))
    starts = context.cached_many({f"start,seed={seed}": partial(started, settings, seed, folder) for seed in seeds})
    names = {
        (method, seed): f"{method.replace(', ', '+').replace(' ', '_')},seed={seed}"
        for method in settings["methods"]
        for seed in seeds
    }
    found = context.cached_many({names[key]: partial(distilled, settings, *key, folder) for key in names})
    return {
        "teacher_nll": teacher["nll"],
        "answer": settings["answer"],
        "start": [starts[f"start,seed={seed}"] for seed in seeds],
        "methods": {method: [found[names[method, seed]] for seed in seeds] for method in settings["methods"]},
    }
