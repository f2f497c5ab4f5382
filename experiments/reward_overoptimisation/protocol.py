"""Goodhart's law by the numbers: what happens to the reward that is meant while the one that is measured is optimised.

Gao et al.'s curves in two worlds where they can be worked out (toys.py), and on images: a policy over the latents of a
frozen VAE that is to please a classifier of very little training (latents.py). Needs MNIST.
"""

from __future__ import annotations

import math
from functools import partial

import numpy as np
import torch

from experiments.reward_overoptimisation import latents, toys
from experiments.reward_overoptimisation.toys import GaussianToy
from vae.engine.run import load
from vae.experiment import Context
from vae.experiment_figures import pack_images
from vae.gaussian import DiagonalGaussian
from vae.policy import PPOClip, Reinforce
from vae.seeding import generator

PAPER = "Gao, Schulman & Hilton 2022, Scaling laws for reward model overoptimization"
CLAIM = (
    "The further a policy moves from its reference to please a proxy, the more the proxy rises; the gold reward rises with "
    "it at first, peaks, and falls, along d (alpha - beta d) or d (alpha - beta log d) with d = sqrt(KL)."
)
SETTINGS = {
    "quick": {
        "gaussian": {"distances": [1, 2, 3.5355, 5], "steps": 400, "batch": 2048, "lr": 0.1},
        "arms": {"arms": 1000, "spread": 1.0, "comparisons": [1000, 16000], "worlds": 8, "prior_precision": 0.02},
        "latents": {
            "images": [20],
            "seeds": [0, 1],
            "betas": [5, 2, 1, 0.5, 0.2, 0.1, 0.05, 0.02, 0.005],
            "steps": 150,
            "batch": 5,
            "lr": 0.1,
            "draws": 50,
            "pool": 20_000,
            "judge_steps": 400,
        },
    },
    "full": {
        "gaussian": {"distances": [0.5, 1, 2, 3, 3.5355, 4, 5], "steps": 600, "batch": 2048, "lr": 0.1},
        "arms": {
            "arms": 1000,
            "spread": 1.0,
            "comparisons": [1000, 4000, 16000],
            "worlds": 30,
            "prior_precision": 0.02,
        },
        "latents": {
            "images": [20, 60, 300],
            "seeds": [0, 1, 2],
            "betas": [5, 2, 1, 0.5, 0.3, 0.2, 0.1, 0.05, 0.02, 0.01, 0.003],
            "steps": 250,
            "batch": 6,
            "lr": 0.1,
            "draws": 100,
            "pool": 50_000,
            "judge_steps": 1000,
        },
    },
}
TOY = GaussianToy(a=1.0, b=0.2, dim=16)
METHODS = {
    "REINFORCE, penalty in the reward": Reinforce,
    "PPO-clip, penalty in the reward": partial(PPOClip, penalty="reward"),
    "REINFORCE, k2 in the loss": partial(Reinforce, penalty="loss_k2"),
}
FORWARD_PENALTY = partial(Reinforce, penalty="loss_k3")
BEST_OF = [2, 3, 4, 6, 10, 16, 25, 40, 64, 100, 160, 250, 400, 640, 1000]
FAR_N = 60_000
DISTANCES = np.linspace(0.1, 2.4, 24)  # at which the arms' curves are averaged over worlds
ARM_BETAS = np.geomspace(30, 0.03, 80)
SLOPE_BETAS = np.geomspace(10, 0.3, 30)
TILTS = np.geomspace(30, 0.1, 40)
PICTURED = {"at the prior": 0.0, "low KL": 1.0}  # row of images: the distance it shows; the peak and the end follow
HELD = 3000  # training images set apart for the proxies


def gaussian(settings: dict) -> dict:
    """Policies trained at the betas whose optimum lies at the wished distances, and best of n by quadrature."""
    options = {key: settings[key] for key in ("steps", "batch", "lr")}

    def trained(name: str, objective, distance: float) -> dict:
        return toys.tune(TOY, objective(1 / (math.sqrt(2) * distance)), noise=generator(0, name, distance), **options)

    return {
        "distances": settings["distances"],
        "trained": {name: [trained(name, o, d) for d in settings["distances"]] for name, o in METHODS.items()},
        "k3": {"distance": 2.0, **trained("k3", FORWARD_PENALTY, 2.0)},
        "best_of": {n: TOY.best_of(n) for n in [*BEST_OF, FAR_N]},
    }


def one_arms_world(settings: dict, seed: int) -> dict:
    """Gold along the frontier and for best of n, for each number of comparisons; and the checks of exactness."""
    noise = generator(seed, "arms")
    world = toys.ArmsWorld.draw(settings["arms"], settings["spread"], noise)
    measured: dict = {}
    for comparisons in settings["comparisons"]:
        proxy = world.proxy(comparisons, settings["prior_precision"], noise)
        numbers = {"log_ref": world.log_ref, "proxy": proxy, "gold": world.gold}
        rl = toys.on_arms(toys.tilted(world.log_ref, proxy, torch.tensor(ARM_BETAS)), **numbers)
        bon = toys.on_arms(torch.stack([toys.best_of_n_arms(world.log_ref, proxy, n) for n in BEST_OF]), **numbers)
        start = torch.zeros(1, dtype=torch.float64)  # pi_0 itself, whose gold is 0
        bounds = torch.tensor([toys.best_of_n_kl(n) for n in BEST_OF], dtype=torch.float64)
        measured[comparisons] = {
            "rl_gold": np.interp(DISTANCES, torch.cat([start, rl["kl"].sqrt()]), torch.cat([start, rl["gold"]])),
            "bon_gold": np.interp(
                DISTANCES, torch.cat([start, bon["kl"].sqrt()]), torch.cat([start, bon["gold"]]), right=np.nan
            ),
            "slope_error": toys.slope_errors(world.log_ref, proxy, torch.tensor(SLOPE_BETAS)).max(),
            "bon_excess": (bon["kl"] - bounds).max(),
            "bon_shortfall": ((bounds - bon["kl"]) / bounds).max(),
        }
    return measured


def arms(settings: dict) -> dict:
    """Mean curves over worlds, and the worst of each check."""
    worlds = [one_arms_world(settings, seed) for seed in range(settings["worlds"])]
    curves = {}
    for comparisons in settings["comparisons"]:
        of = [world[comparisons] for world in worlds]
        stack = {key: np.stack([np.asarray(o[key]) for o in of]) for key in of[0]}
        curves[comparisons] = {
            "rl_gold": stack["rl_gold"].mean(0),
            "rl_se": stack["rl_gold"].std(0, ddof=1) / math.sqrt(len(of)),
            # where n = 1000 of some world ends short of a distance, the mean would be of fewer worlds
            "bon_gold": [None if np.isnan(column).any() else column.mean() for column in stack["bon_gold"].T],
        }
    checks = {
        key: max(float(world[c][key]) for world in worlds for c in settings["comparisons"])
        for key in ("slope_error", "bon_excess", "bon_shortfall")
    }
    return {"distances": DISTANCES, "curves": curves, **checks}


def tuned_latents(context: Context) -> dict:
    """Curves of every proxy (number of images, seed) on the VAE that `context` trains, and the pictures of one."""
    settings = context.settings["latents"]
    run = context.train([context.config], "vae")
    _, data, module = load(run)
    vae, splits = module.vae.requires_grad_(False), data.source()
    for_proxies, for_judges = latents.split_labels(splits.train, HELD)

    def labelled(index: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        x, y = splits.train.gather(index)
        return x.float() / 255, y

    x, y = labelled(for_judges)
    judges = {
        "gold": latents.generative_judge(x, y),
        "convnet": latents.discriminative_judge(x, y, settings["judge_steps"], 0, context.folder),
    }
    results = {
        "betas": settings["betas"],
        "accuracy": {judge: latents.accuracy(scores, splits.test) for judge, scores in judges.items()},
        "real": real_scores(judges, splits.test),
        "proxies": [],
    }
    for images in settings["images"]:
        for seed in settings["seeds"]:
            chosen = for_proxies[torch.randperm(HELD, generator=generator(seed, "proxy images"))[:images]]
            proxy = latents.linear_proxy(*labelled(chosen))
            scorers = {"proxy": proxy, **judges}
            measure = partial(one_proxy, vae, scorers, settings, seed, pictured=not results["proxies"])
            curves = context.cached(f"proxy-{images}-{seed}", measure)
            own = {"images": images, "seed": seed, "accuracy": latents.accuracy(proxy, splits.test)}
            results["proxies"].append({**own, **curves})
    return results


def real_scores(judges: dict, split, n: int = 2000) -> dict[str, float]:
    """What real digits score as what they are."""
    x, y = split.gather(torch.arange(n))
    with torch.no_grad():
        return {name: judge(x.float() / 255).gather(1, y[:, None]).mean().item() for name, judge in judges.items()}


def one_proxy(vae, scorers: dict, settings: dict, seed: int, pictured: bool) -> dict:
    """Tune, judge, and compare with best of n and with the best of all policies."""
    noise = generator(seed, "policy")
    pool = latents.prior_pool(vae, scorers, settings["pool"], noise)
    steps = settings["steps"]
    kept = set(np.unique(np.geomspace(1, steps, 16).astype(int) - 1).tolist())
    options = {key: settings[key] for key in ("batch", "lr")}
    policies = latents.tune(
        vae, scorers["proxy"], torch.tensor(settings["betas"]), steps, noise=noise, kept=kept, **options
    )
    path = DiagonalGaussian(*(torch.stack(part) for part in zip(*policies.path, strict=True)))
    rl = {"kl": policies.kl, **latents.judged(vae, policies.gaussian, scorers, settings["draws"], noise)}
    measured = {
        "reference": {name: scores.mean() for name, scores in pool.items()},
        "rl": rl,
        "path": {"kl": latents.kl_of(path), **latents.judged(vae, path, scorers, settings["draws"], noise)},
        "best_of": {n: {"kl": toys.best_of_n_kl(n), **latents.best_of_n(pool, n)} for n in BEST_OF},
        "tilted": [latents.tilted(pool, beta) for beta in TILTS],
    }
    if pictured:
        distance = rl["kl"].sqrt()
        shown = {name: None if d == 0 else int((distance - d).abs().argmin()) for name, d in PICTURED.items()}
        shown |= {"gold at its peak": int(rl["gold"].argmax()), "far beyond": len(distance) - 1}
        rows = []
        for number in shown.values():
            zero = torch.zeros_like(policies.gaussian.mean[0])
            chosen = (
                DiagonalGaussian(zero, zero)
                if number is None
                else DiagonalGaussian(*(p[number] for p in policies.gaussian))
            )
            rows.append(latents.sampled_images(vae, chosen, 2, generator(seed, "pictures")))
        measured["pictures"] = {"rows": shown, "images": pack_images(torch.stack(rows))}
    return measured


def measure(context: Context) -> dict:
    return {
        "gaussian": context.cached("gaussian", lambda: gaussian(context.settings["gaussian"])),
        "arms": context.cached("arms", lambda: arms(context.settings["arms"])),
        "latents": tuned_latents(context),
    }
