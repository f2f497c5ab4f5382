"""What is measured: the exact part, and a character model tuned with one penalty or another."""

from __future__ import annotations

from functools import partial
from typing import Any

from experiments.kl_estimators_off_policy.enumeration import World
from experiments.kl_estimators_off_policy.exact import WORLDS, along_the_path
from experiments.kl_estimators_off_policy.tuning import tuned
from experiments.rlhf_reward_hacking.protocol import train_classifier, train_language_model
from vae.experiment import Context

PAPER = "Liu et al. 2025; Tang & Munos 2025; Amini et al. 2025; DeepSeek-V3.2 2025 (importance-weighted k3)"
CLAIM = (
    "Off-policy, k2 and k3 in the loss are biased for grad KL(pi || pi_ref), and exact with their importance ratio; with "
    "several steps a batch they carry a tuned policy beyond where the exact penalty holds it, and the corrected ones do not."
)

# Seed 0 served the pilots and is not among the seeds. `policies` seeds the enumerated ones.
SHARED = {
    "distances": [0.0, 0.1, 0.25, 0.5, 0.75, 1.0, 1.5],
    "policies": [1, 2, 3],
    "split": 0,
    "classifier": {"snippets": 300, "epochs": 20, "batch": 50, "lr": 3e-3, "dropout": 0.2},
    "prompt": 16,
    "group": 8,
    "lr": 3e-3,
    "beta": 0.03,
    "clip": 0.2,
    "reuse": 8,
    "judged": 0.25,  # the last part of the steps, over which the KL is averaged
    "target": "loss_exact, prefix",
}
SETTINGS = {
    "quick": {
        **SHARED,
        "width": 64,
        "pretraining": {"steps": 400, "batch": 32, "length": 32, "lr": 8e-3, "dropout": 0.1},
        "answer": 16,
        "batch": 64,
        "steps": 240,
        "evaluated": 256,
        "seeds": [1, 2, 3],
        "penalties": [
            "loss_k2",
            "loss_k3",
            "loss_k3_is",
            "loss_exact",
            "loss_k3_is, prefix",
            "loss_exact, prefix",
        ],
    },
    "full": {
        **SHARED,
        "width": 96,
        "pretraining": {"steps": 600, "batch": 32, "length": 32, "lr": 8e-3, "dropout": 0.1},
        "answer": 32,
        "batch": 128,
        "steps": 480,
        "evaluated": 512,
        "seeds": [1, 2, 3],
        "penalties": [
            "loss_k2",
            "loss_k3",
            "reward",
            "reward_is",
            "loss_k3_is",
            "loss_k3_is, prefix",
            "loss_exact",
            "loss_exact, prefix",
        ],
    },
}


def measure(context: Context) -> dict[str, Any]:
    settings, folder, seeds = context.settings, context.folder, context.settings["seeds"]
    first = {
        f"exact,{world}": partial(along_the_path, world, settings["distances"], settings["policies"])
        for world in WORLDS
    }
    first = {name.replace(" ", "_"): piece for name, piece in first.items()}
    first["reference"] = partial(train_language_model, settings, "reference", folder)
    first |= {f"classifier,seed={seed}": partial(train_classifier, settings, seed, folder) for seed in seeds}
    found = context.cached_many(first)

    # the target: on fresh samples at every step, the exact penalty
    runs = {("target", seed): partial(tuned, settings, settings["target"], 1, seed, folder) for seed in seeds}
    for penalty in settings["penalties"]:
        runs |= {(penalty, seed): partial(tuned, settings, penalty, settings["reuse"], seed, folder) for seed in seeds}
    names = {key: f"{key[0].replace(', ', '+')},seed={key[1]}" for key in runs}
    policies = context.cached_many({names[key]: run for key, run in runs.items()})
    return {
        "exact": {
            "distances": settings["distances"],
            "seeds": settings["policies"],
            "answers": len(World.of(*WORLDS["sequences"]).tokens),
            "worlds": {world: found[f"exact,{world}".replace(" ", "_")] for world in WORLDS},
        },
        "beta": settings["beta"],
        "reuse": settings["reuse"],
        "judged": settings["judged"],
        "tuned": {
            penalty: [policies[names[penalty, seed]] for seed in seeds]
            for penalty in ("target", *settings["penalties"])
        },
    }
