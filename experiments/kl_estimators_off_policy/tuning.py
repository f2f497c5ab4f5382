"""A character model tuned for a reward, several optimiser steps on each batch, held to its reference by one penalty or another.

The language, its model and the proxy reward are those of rlhf_reward_hacking.
"""

from __future__ import annotations

import copy
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from torch import Tensor, nn

from experiments.rlhf_reward_hacking.language import Classifier, Corpus, LanguageModel, corpus, windows
from experiments.rlhf_reward_hacking.protocol import load, of_drawn
from vae.kl import k1, kl_categorical
from vae.policy import PPOClip
from vae.seeding import generator


def objective(settings: dict[str, Any], penalty: str) -> PPOClip:
    """E[reward] - beta KL(pi || pi_ref), its penalty as named, e.g. "loss_k3_is" or, with the prefix ratio,
    "loss_k3_is, prefix"."""
    name, _, per = penalty.partition(", ")
    return PPOClip(
        settings["beta"],
        penalty=name,
        penalty_ratio=per or "token",
        group_size=settings["group"],
        aggregation="sequence_sum",
        clip=settings["clip"],
    )


def tune(
    policy: LanguageModel,
    reference: LanguageModel,
    classifier: Classifier,
    objective: PPOClip,
    text: Tensor,
    settings: dict[str, Any],
    reuse: int,
    noise: torch.Generator,
) -> list[float]:
    """settings["steps"] steps of Adam, `reuse` on each batch of fresh answers. Returns the exact KL to the reference of the
    policy that drew each batch, on its answers."""
    kl_of_batches = []
    optimizer = torch.optim.Adam(policy.parameters(), settings["lr"], betas=(0.9, 0.95), fused=True)
    prompts_a_batch = settings["batch"] // settings["group"]
    for step in range(settings["steps"]):
        optimizer.param_groups[0]["lr"] = settings["lr"] * min(1, (step + 1) / 10)
        if step % reuse == 0:
            prompts = windows(text, settings["prompt"], prompts_a_batch, noise)
            answers = policy.generate(prompts, settings["answer"], settings["group"], noise)
            with torch.no_grad():
                reward, log_ref = classifier(answers), reference.log_probs(prompts, answers)
                old = policy.log_probs(prompts, answers)
                log_old = of_drawn(old, answers)
                kl_of_batches.append(kl_categorical(p_log_probs=old, q_log_probs=log_ref).sum(-1).mean().item())
        log_pi = policy.log_probs(prompts, answers)
        terms = objective(
            rewards=reward,
            log_pi=of_drawn(log_pi, answers),
            log_ref=of_drawn(log_ref, answers),
            log_old=log_old,
            token_kl=kl_categorical(p_log_probs=log_pi, q_log_probs=log_ref),
            mask=torch.ones_like(answers, dtype=torch.bool),
            step=step,
        )
        optimizer.zero_grad()
        terms["loss"].backward()
        nn.utils.clip_grad_norm_(policy.parameters(), 1.0)
        optimizer.step()
    return kl_of_batches


@torch.no_grad()
def evaluated(
    policy: LanguageModel, reference: LanguageModel, classifier: Classifier, text: Corpus, settings: dict[str, Any]
) -> dict[str, float]:
    """On answers of its own to prompts that nothing was trained on, the same for every policy: reward, KL to the reference
    (Rao-Blackwell) and what is maximised, reward - beta KL."""
    noise = generator(settings["split"], "evaluation")
    prompts = windows(text.encode(text.held_out), settings["prompt"], settings["evaluated"], noise)
    answers = policy.generate(prompts, settings["answer"], 1, noise)
    log_pi, log_ref = policy.log_probs(prompts, answers), reference.log_probs(prompts, answers)
    kl = kl_categorical(p_log_probs=log_pi, q_log_probs=log_ref).sum(-1).mean()
    sampled = k1(log_pi=of_drawn(log_pi, answers), log_ref=of_drawn(log_ref, answers)).sum(-1).mean()
    reward = classifier(answers).mean()
    return {"reward": reward, "kl": kl, "k1": sampled, "objective": reward - settings["beta"] * kl}


def tuned(settings: dict[str, Any], penalty: str, reuse: int, seed: int, folder: Path) -> dict[str, float]:
    """The policy of one penalty, from the same prompts and the same uniform numbers as every other, evaluated."""
    torch.set_num_threads(1)
    text = corpus(settings["split"])
    characters, any_noise = len(text.alphabet), generator(0)
    reference = load(LanguageModel(characters, settings["width"], any_noise), folder / "reference.pt")
    classifier = load(Classifier(characters, any_noise), folder / f"classifier,seed={seed}.pt")
    policy = copy.deepcopy(reference).requires_grad_(True)
    own, half = objective(settings, penalty), text.encode(text.reference)
    trace = tune(policy, reference, classifier, own, half, settings, reuse, generator(seed, "tuning"))
    points = settings["steps"] // settings["reuse"]  # as many for every reuse: means of what lies between
    each = len(trace) // points
    trace = [float(f"{fmean(trace[i * each : (i + 1) * each]):.4g}") for i in range(points)]
    return {**evaluated(policy, reference, classifier, text, settings), "trace": trace}
