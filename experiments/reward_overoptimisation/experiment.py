"""Goodhart's law by the numbers: what happens to the reward that is meant while the one that is measured is optimised.

Gao et al.'s curves in two worlds where they can be worked out (toys.py), and on images: a policy over the latents of a
frozen VAE that is to please a classifier of very little training (latents.py). Needs MNIST.
"""

from __future__ import annotations

import math
from functools import partial
from itertools import pairwise
from typing import TYPE_CHECKING

import numpy as np
import torch

from experiments.reward_overoptimisation import latents, toys
from experiments.reward_overoptimisation.toys import GaussianToy
from vae.engine.run import load
from vae.experiment import Claim, Context, Table
from vae.gaussian import DiagonalGaussian
from vae.policy import PPOClip, Reinforce
from vae.seeding import generator

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

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
LOG_GOLD = {"a": 2.0, "b": 1.0}
BEST_OF = [2, 3, 4, 6, 10, 16, 25, 40, 64, 100, 160, 250, 400, 640, 1000]
FAR_N = 60_000
DISTANCES = np.linspace(0.1, 2.4, 24)  # at which the arms' curves are averaged over worlds
ARM_BETAS = np.geomspace(30, 0.03, 80)
SLOPE_BETAS = np.geomspace(10, 0.3, 30)
TILTS = np.geomspace(30, 0.1, 40)
PICTURED = {"at the prior": 0.0, "low KL": 1.0}  # row of images: the distance it shows; the peak and the end follow
HELD = 3000  # training images set apart for the proxies

# --- measuring ----------------------------------------------------------------------------------------------------------


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
    name = "reward_overoptimisation" + "_quick" * context.quick
    run = context.train([f"experiment={name}"], "vae")
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
        measured["pictures"] = {"rows": shown, "images": latents.packed(torch.stack(rows))}
    return measured


def measure(context: Context) -> dict:
    return {
        "gaussian": context.cached("gaussian", lambda: gaussian(context.settings["gaussian"])),
        "arms": context.cached("arms", lambda: arms(context.settings["arms"])),
        "latents": tuned_latents(context),
    }


# --- claims -------------------------------------------------------------------------------------------------------------


def frontier_errors(gaussian: dict, method: str) -> float:
    """The largest relative deviation of KL, proxy or gold from the frontier at the same beta."""
    return max(
        abs(found[key] / wanted - 1)
        for d, found in zip(gaussian["distances"], gaussian["trained"][method], strict=True)
        for key, wanted in TOY.frontier(d).items()
    )


def peak_of_trained(gaussian: dict) -> tuple[float, float]:
    """(d, gold) at which d (alpha - beta d), fitted to all trained policies of the first method, peaks."""
    found = gaussian["trained"][next(iter(METHODS))]
    bon = toys.fit(np.sqrt([f["kl"] for f in found]), [f["gold"] for f in found])["bon"]
    return bon["alpha"] / (2 * bon["beta"]), bon["alpha"] ** 2 / (4 * bon["beta"])


def exact_fits(gaussian: dict) -> dict[str, dict]:
    """Both forms on three exact curves: the Gaussian's frontier, its best of n <= 1000, and the other gold's frontier."""
    d = np.linspace(1, 6, 21)
    best = [gaussian["best_of"][str(n)] for n in BEST_OF]
    return {
        "RL": toys.fit(d, [TOY.frontier(x)["gold"] for x in d]),
        "best of n": toys.fit(np.sqrt([b["kl"] for b in best]), [b["gold"] for b in best]),
        "RL, gold with u log u": toys.fit(d, [toys.gain_of_log_gold(x, **LOG_GOLD) for x in d]),
    }


def mean_curves(latent: dict, images: int) -> dict[str, np.ndarray]:
    """d, proxy, gold and convnet (betas,) along the policies, means over seeds; and their values at pi_0 under *_0."""
    of = [p for p in latent["proxies"] if p["images"] == images]
    curves = {key: np.mean([p["rl"][key] for p in of], axis=0) for key in ("kl", "proxy", "gold", "convnet")}
    curves["d"] = np.sqrt(curves["kl"])
    for key in ("proxy", "gold", "convnet"):
        curves[f"{key}_0"] = np.mean([p["reference"][key] for p in of])
    return curves


def fall(curves: dict, key: str) -> tuple[int, float]:
    """Where a curve peaks, and the part of its gain over pi_0 that is lost between there and the farthest policy."""
    peak = int(np.argmax(curves[key]))
    return peak, (curves[key][peak] - curves[key][-1]) / (curves[key][peak] - curves[f"{key}_0"])


def at_equal_kl(latent: dict, images: int, n: int) -> dict[str, tuple[float, float, float]]:
    """Each judge's score of (best of n, Gaussian policy, best of all policies) at the KL of best of n; means over seeds."""
    scores: dict[str, list] = {"proxy": [], "gold": []}
    for p in (p for p in latent["proxies"] if p["images"] == images):
        best = p["best_of"][str(n)]
        d = math.sqrt(best["kl"])
        for key, rows in scores.items():
            rl = np.interp(d, [0, *np.sqrt(p["rl"]["kl"])], [p["reference"][key], *p["rl"][key]])
            every = np.interp(d, np.sqrt([t["kl"] for t in p["tilted"]]), [t[key] for t in p["tilted"]])
            rows.append((best[key], rl, every))
    return {key: tuple(np.mean(rows, axis=0)) for key, rows in scores.items()}


def path_gap(latent: dict, images: int) -> float:
    """How far, at most, the gold on the way of the least penalised run is from that of the policies at the same d, as a
    part of the gold's gain at its peak. Mean over seeds."""
    gaps = []
    for p in (p for p in latent["proxies"] if p["images"] == images):
        d, gold = np.sqrt(p["rl"]["kl"]), np.array(p["rl"]["gold"])
        way = np.sqrt(p["path"]["kl"])
        inside = (way > d[0]) & (way < d[-1])
        off = np.array(p["path"]["gold"])[inside] - np.interp(way[inside], d, gold)
        gaps.append(np.abs(off).max() / (gold.max() - p["reference"]["gold"]))
    return float(np.mean(gaps))


def claims(results: dict) -> list[Claim]:
    return [*gaussian_claims(results["gaussian"]), *arms_claims(results["arms"]), *latent_claims(results["latents"])]


def gaussian_claims(gaussian: dict) -> list[Claim]:
    made = []
    for method in METHODS:
        worst = frontier_errors(gaussian, method)
        words = f"off by at most {100 * worst:.2f}%"
        made.append(
            Claim(f"Gaussian: {method}, lands on the frontier", worst < 0.02, words, "KL, proxy and gold within 2%")
        )
    (d, gold), (wanted_d, wanted_gold) = peak_of_trained(gaussian), TOY.peak
    made.append(
        Claim(
            "Gaussian: the gold of the trained policies peaks where predicted",
            abs(d / wanted_d - 1) < 0.1 and abs(gold / wanted_gold - 1) < 0.1,
            f"d = {d:.4f}, gold {gold:.4f}",
            f"{wanted_d:.4f}, {wanted_gold:.4f}, within 10%",
        )
    )
    k3 = gaussian["k3"]
    ratio = k3["kl"] / k3["distance"] ** 2
    made.append(
        Claim("Gaussian: k3 in the loss does not hold the policy", ratio > 2, f"KL {ratio:.0f} times", "> 2 times")
    )
    fits = exact_fits(gaussian)
    for name, form, words in (
        ("RL", "bon", "d (alpha - beta d)"),
        ("best of n", "bon", "d (alpha - beta d)"),
        ("RL, gold with u log u", "rl", "d (alpha - beta log d)"),
    ):
        r2 = fits[name][form]["r2"]
        made.append(Claim(f"exact curve of {name}: {words} fits", r2 > 0.99, f"R^2 = {r2:.5f}", "> 0.99"))
    far = gaussian["best_of"][str(FAR_N)]
    said = float(toys.fitted("bon", fits["best of n"]["bon"], np.array(math.sqrt(far["kl"]))))
    made.append(
        Claim(
            f"the form fitted to best of n <= 1000 foretells n = {FAR_N}",
            abs(said / far["gold"] - 1) < 0.05,
            f"{said:.3f}",
            f"{far['gold']:.3f} within 5%",
        )
    )
    return made


def arms_claims(arms: dict) -> list[Claim]:
    least, *_, most = arms["curves"]
    few, many = (np.array(arms["curves"][key]["rl_gold"]) for key in (least, most))
    lost = 1 - few[-1] / few.max()
    return [
        Claim(
            "arms: d E[r] / d KL = beta along the frontier",
            arms["slope_error"] < 1e-6,
            f"off by at most {arms['slope_error']:.1e}",
            "1e-6 of beta",
        ),
        Claim(
            "arms: best of n spends at most log n - (n - 1) / n",
            arms["bon_excess"] < 1e-9,
            f"at most {max(arms['bon_excess'], 0):.1e} nats more, {100 * arms['bon_shortfall']:.1f}% less",
            "no more",
        ),
        Claim(
            f"arms: with {least} comparisons the gold peaks and falls",
            lost > 0.1,
            f"{100 * lost:.0f}% of the gain lost at d = {DISTANCES[-1]:.1f}",
            "> 10%",
        ),
        Claim(
            "arms: more comparisons, a higher peak",
            many.max() > few.max(),
            f"{few.max():.3f} with {least}, {many.max():.3f} with {most}",
            "rising",
        ),
    ]


def latent_claims(latent: dict) -> list[Claim]:
    sizes = list(dict.fromkeys(p["images"] for p in latent["proxies"]))
    curves = mean_curves(latent, sizes[0])
    steps = [np.diff(p["rl"]["proxy"]).min() for p in latent["proxies"]]
    kl_steps = [np.diff(p["rl"]["kl"]).min() for p in latent["proxies"]]
    made = [
        Claim(
            "latents: the proxy rises with KL at every step of beta, for every proxy",
            min(steps) > 0 and min(kl_steps) > 0,
            f"smallest step {min(steps):+.3f}",
            "> 0",
        ),
    ]
    for size in sizes:
        of_size = mean_curves(latent, size)
        peak, lost = fall(of_size, "gold")
        d = of_size["d"]
        made.append(
            Claim(
                f"latents: the gold of a proxy of {size} images peaks, then falls",
                0 < peak < len(latent["betas"]) - 1 and lost > 0.2,
                f"peak at d = {d[peak]:.2f}, {100 * lost:.0f}% of the gain lost at d = {d[-1]:.1f}",
                "> 20% lost",
            )
        )
    peak, lost = fall(curves, "convnet")
    made.append(
        Claim(
            "latents: so does the log-odds of a convnet that learnt from all images",
            lost > 0.1,
            f"{100 * lost:.1f}% of the gain lost",
            "> 10% lost",
        )
    )
    gap = path_gap(latent, sizes[0])
    made.append(
        Claim(
            "latents: the penalty leaves the frontier of gold and KL where early stopping has it",
            gap < 0.1,
            f"off by at most {100 * gap:.0f}% of the gain",
            "10%",
        )
    )
    (bon, rl, every), (bon_gold, rl_gold, _) = at_equal_kl(latent, sizes[0], 1000).values()
    made += [
        Claim(
            "latents: at the KL of best of 1000 neither it nor the Gaussian policy beats the best of all policies",
            max(rl, bon) <= every + 0.1,
            f"{rl:.2f} Gaussian, {bon:.2f} best of n, {every:.2f} the optimum",
            "at most 0.1 above it, for the interpolation",
        ),
        Claim(
            "latents: at that KL best of n gets more of the proxy than the Gaussian policy",
            bon > rl,
            f"{bon:.2f} and {rl:.2f}",
            "more",
        ),
        Claim(
            "latents: and more of the gold",
            bon_gold > rl_gold,
            f"{bon_gold:.2f} and {rl_gold:.2f}",
            "more",
        ),
    ]
    if len(sizes) > 1:
        peaks = [mean_curves(latent, size)["gold"].max() for size in sizes]
        words = ", ".join(f"{p:.1f} ({s})" for p, s in zip(peaks, sizes, strict=True))
        rising = all(b > a for a, b in pairwise(peaks))
        made.append(
            Claim("latents: the more images the proxy has seen, the higher the gold's peak", rising, words, "rising")
        )
    return made


def table(results: dict) -> Table:
    gaussian, arms, latent = results["gaussian"], results["arms"], results["latents"]
    rows = []
    first = gaussian["trained"][next(iter(METHODS))]
    for d, found in zip(gaussian["distances"], first, strict=True):
        wanted = TOY.frontier(d)
        rows.append(
            (
                f"Gaussian, REINFORCE, beta {1 / (math.sqrt(2) * d):.3f}: KL, proxy, gold",
                ", ".join(f"{wanted[key]:.4f}" for key in wanted),
                ", ".join(f"{found[key]:.4f}" for key in wanted),
            )
        )
    d, gold = peak_of_trained(gaussian)
    rows.append(("Gaussian: gold peaks at d, at", "3.5355, 2.5", f"{d:.4f}, {gold:.4f}"))
    for name, fits in exact_fits(gaussian).items():
        rows.append((f"R^2 of both forms, exact, {name}", "", f"{fits['bon']['r2']:.5f}, {fits['rl']['r2']:.5f}"))
    for n in (4, 64, 1000, FAR_N):
        if str(n) in gaussian["best_of"]:
            best = gaussian["best_of"][str(n)]
            bound = math.sqrt(2 * best["kl"])
            rows.append((f"best of {n}: KL; proxy / sqrt(2 KL)", "", f"{best['kl']:.4f}; {best['proxy'] / bound:.3f}"))
    for comparisons, curve in arms["curves"].items():
        gold = np.array(curve["rl_gold"])
        top = gold.argmax()
        words = (
            f"{gold[top]:.3f} at {DISTANCES[top]:.1f}, {gold[-1]:.3f} ± {curve['rl_se'][-1]:.3f} at {DISTANCES[-1]:.1f}"
        )
        rows.append((f"arms, {comparisons} comparisons: peak of the gold at d, and at the end", "", words))
    rows.append(("judges right on test digits: generative, convnet", "", _percentages(latent["accuracy"].values())))
    for images in dict.fromkeys(p["images"] for p in latent["proxies"]):
        curves = mean_curves(latent, images)
        right = _percentages(np.mean([[p["accuracy"]] for p in latent["proxies"] if p["images"] == images], axis=0))
        for key, words in (
            ("proxy", f"proxy ({right} right)"),
            ("gold", "gold, nats"),
            ("convnet", "convnet's log-odds"),
        ):
            top = int(np.argmax(curves[key]))
            ours = f"{curves[key + '_0']:.2f}; {curves[key][top]:.2f} at {curves['d'][top]:.2f}; {curves[key][-1]:.2f}"
            rows.append(
                (f"proxy of {images} images: {words} at pi_0; peak at d; end, d = {curves['d'][-1]:.1f}", "", ours)
            )
        fits = toys.fit(curves["d"], curves["gold"] - curves["gold_0"])
        rows.append(
            (f"proxy of {images} images: R^2 of both forms", "", f"{fits['bon']['r2']:.3f}, {fits['rl']['r2']:.3f}")
        )
        for n in (10, 1000):
            scores = at_equal_kl(latent, images, n)
            for key in ("proxy", "gold"):
                ours = ", ".join(f"{value:.2f}" for value in scores[key])
                rows.append((f"proxy of {images} images, KL of best of {n}: {key} of BoN, Gaussian, optimum", "", ours))
    rows.append(("real digits: gold, convnet", "", ", ".join(f"{v:.2f}" for v in latent["real"].values())))
    return Table(("", "exact", "ours"), rows)


def _percentages(values) -> str:
    return ", ".join(f"{100 * value:.1f}%" for value in values)


# --- picture ------------------------------------------------------------------------------------------------------------

PROXY, GOLD, CONVNET, BON = "#d55e00", "#0072b2", "#009e73", "#1d2127"
SHADES = ["#0072b2", "#2f9bd6", "#7a5195"]


def draw_gaussian(ax: Axes, gaussian: dict) -> None:
    d = np.linspace(0, 6, 100)
    ax.plot(d, math.sqrt(2) * d, color=PROXY)
    ax.plot(d, [TOY.frontier(x)["gold"] for x in d], color=GOLD)
    for marker, found in zip("o^s", gaussian["trained"].values(), strict=True):
        x = np.sqrt([f["kl"] for f in found])
        ax.plot(x, [f["proxy"] for f in found], marker, color=PROXY, ms=4, mfc="none")
        ax.plot(x, [f["gold"] for f in found], marker, color=GOLD, ms=4, mfc="none")
    best = list(gaussian["best_of"].values())
    x = np.sqrt([b["kl"] for b in best])
    ax.plot(x, [b["proxy"] for b in best], color=BON, lw=1, ls="--", label="best of n")
    ax.plot(x, [b["gold"] for b in best], color=BON, lw=1, ls="--")
    ax.axvline(TOY.peak[0], color="#667080", lw=0.8, ls=":")
    ax.annotate("proxy", (3.1, 5.6), color=PROXY)
    ax.annotate("gold", (5.2, 0.9), color=GOLD)
    ax.set(xlim=(0, 6), ylim=(0, 8.5), xlabel="d = sqrt(KL)", ylabel="reward")
    ax.legend(loc="upper left")


def draw_arms(ax: Axes, arms: dict) -> None:
    for shade, (comparisons, curve) in zip(SHADES, arms["curves"].items(), strict=False):
        gold, se = np.array(curve["rl_gold"]), np.array(curve["rl_se"])
        ax.plot(arms["distances"], gold, color=shade, label=f"{int(comparisons):,} comparisons")
        ax.fill_between(arms["distances"], gold - se, gold + se, color=shade, alpha=0.2, lw=0)
        ax.plot(arms["distances"], np.array(curve["bon_gold"], float), color=shade, ls="--", lw=1)
    ax.set(xlim=(0, None), ylim=(0, None), xlabel="d = sqrt(KL)", ylabel="gold gain")
    ax.legend(loc="upper left", title="dashed: best of n", fontsize=8, title_fontsize=8)


def draw_latents(ax: Axes, latent: dict, key: str, colour: str) -> None:
    sizes = list(dict.fromkeys(p["images"] for p in latent["proxies"]))
    for p in latent["proxies"]:
        if p["images"] == sizes[0]:
            ax.plot([0, *np.sqrt(p["rl"]["kl"])], [p["reference"][key], *p["rl"][key]], color=colour, lw=0.7, alpha=0.5)
            ax.plot(np.sqrt(p["path"]["kl"]), p["path"][key], ":", color="#667080", lw=1)
    curves = mean_curves(latent, sizes[0])
    x, y = [0, *curves["d"]], [curves[f"{key}_0"], *curves[key]]
    ax.plot(x, y, "o-", color=colour, ms=4, label=f"Gaussian policies, {sizes[0]} images")
    for size, marker in zip(sizes[1:], "s^", strict=False):
        other = mean_curves(latent, size)
        x, y = [0, *other["d"]], [other[f"{key}_0"], *other[key]]
        ax.plot(x, y, f"{marker}-", color=colour, ms=3, lw=0.9, alpha=0.6, label=f"{size} images")
    of = [p for p in latent["proxies"] if p["images"] == sizes[0]]
    best = np.mean([[p["best_of"][str(n)][key] for n in BEST_OF] for p in of], axis=0)
    ax.plot([math.sqrt(toys.best_of_n_kl(n)) for n in BEST_OF], best, color=BON, ls="--", label="best of n ≤ 1000")
    ax.plot([], [], ":", color="#667080", label="on the way, least penalty")
    ax.set(xlim=(0, None), xlabel="d = sqrt(KL)")


def draw_pictures(ax: Axes, latent: dict) -> None:
    pictured = latent["proxies"][0]
    rows, images = pictured["pictures"]["rows"], latents.unpacked(pictured["pictures"]["images"])
    count, columns, height, width = images.shape
    wall = images.transpose(0, 2, 1, 3).reshape(count * height, columns * width)
    ax.imshow(wall // 32, cmap="gray_r", interpolation="nearest")  # eight greys: the file is committed
    labels = []
    for name, number in rows.items():
        d = 0.0 if number is None else math.sqrt(pictured["rl"]["kl"][number])
        of = pictured["reference"] if number is None else {k: v[number] for k, v in pictured["rl"].items()}
        labels.append(f"{name}\nd {d:.1f}, proxy {of['proxy']:.1f}, gold {of['gold']:.0f}")
    ax.set_yticks([(i + 0.5) * height for i in range(count)], labels, fontsize=8)
    ax.set_xticks([(2 * c + 1) * width for c in range(10)], [f"asked for {c}" for c in range(10)], fontsize=8)
    ax.tick_params(length=0)
    ax.grid(False)
    for side in ax.spines.values():
        side.set_visible(False)
    for i in range(1, count):
        ax.axhline(i * height - 0.5, color="white", lw=2)


def figure(results: dict) -> Figure:
    import matplotlib.pyplot as plt

    fig = plt.figure(figsize=(13, 7))
    grid = fig.add_gridspec(2, 4, height_ratios=[1.35, 1])
    axes = [fig.add_subplot(grid[0, i]) for i in range(4)]
    draw_gaussian(axes[0], results["gaussian"])
    axes[0].set_title("Gaussian: trained on the frontier")
    draw_arms(axes[1], results["arms"])
    axes[1].set_title("1000 arms, learnt proxy")
    draw_latents(axes[2], results["latents"], "proxy", PROXY)
    axes[2].set_title("VAE latents: the proxy")
    axes[2].set_ylabel("log-odds of the digit asked for")
    draw_latents(axes[3], results["latents"], "gold", GOLD)
    axes[3].set_title("VAE latents: the gold")
    axes[3].set_ylabel("log p(image | digit) + const, nats")
    axes[2].legend(loc="lower right", fontsize=7.5)
    below = fig.add_subplot(grid[1, :])
    draw_pictures(below, results["latents"])
    below.set_title("What a policy answers, two draws a digit")
    return fig
