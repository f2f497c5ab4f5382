"""What is claimed of gold and proxy in the three worlds."""

from __future__ import annotations

import math

import numpy as np

from experiments.reward_overoptimisation import toys
from experiments.reward_overoptimisation.protocol import BEST_OF, DISTANCES, FAR_N, METHODS, TOY
from vae.claims import Claim, Table, above, at_most, below, between, near, ordered

PEAK = 0.1  # how far the place and the height of a peak may be off
LOG_GOLD = {"a": 2.0, "b": 1.0}


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
    (d, gold), (wanted_d, wanted_gold) = peak_of_trained(gaussian), TOY.peak
    ratio = gaussian["k3"]["kl"] / gaussian["k3"]["distance"] ** 2
    fits, far = exact_fits(gaussian), gaussian["best_of"][str(FAR_N)]
    said = float(toys.fitted("bon", fits["best of n"]["bon"], np.array(math.sqrt(far["kl"]))))
    return [
        *(frontier_claim(method, frontier_errors(gaussian, method)) for method in METHODS),
        Claim.of(
            "Gaussian: the gold of the trained policies peaks where predicted",
            f"d = {d:.4f}, gold {gold:.4f}",
            "{1:.4f}, {3:.4f}, within {0:.0%}",
            near(d, PEAK, wanted_d),
            near(gold, PEAK, wanted_gold),
        ),
        Claim.of(
            "Gaussian: k3 in the loss does not hold the policy",
            f"KL {ratio:.0f} times",
            "> {:g} times",
            above(ratio, 2),
        ),
        *(
            form_claim(name, words, fits[name][form]["r2"])
            for name, form, words in (
                ("RL", "bon", "d (alpha - beta d)"),
                ("best of n", "bon", "d (alpha - beta d)"),
                ("RL, gold with u log u", "rl", "d (alpha - beta log d)"),
            )
        ),
        Claim.of(
            f"the form fitted to best of n <= 1000 foretells n = {FAR_N}",
            f"{said:.3f}",
            "{1:.3f} within {0:.0%}",
            near(said, 0.05, far["gold"]),
        ),
    ]


def frontier_claim(method: str, worst: float) -> Claim:
    measured = f"off by at most {100 * worst:.2f}%"
    bound = below(worst, 0.02)
    return Claim.of(f"Gaussian: {method}, lands on the frontier", measured, "KL, proxy and gold within {:.0%}", bound)


def form_claim(name: str, words: str, r2: float) -> Claim:
    return Claim.of(f"exact curve of {name}: {words} fits", f"R^2 = {r2:.5f}", "> {:g}", above(r2, 0.99))


def arms_claims(arms: dict) -> list[Claim]:
    least, *_, most = arms["curves"]
    few, many = (np.array(arms["curves"][key]["rl_gold"]) for key in (least, most))
    lost = 1 - few[-1] / few.max()
    return [
        Claim.of(
            "arms: d E[r] / d KL = beta along the frontier",
            f"off by at most {arms['slope_error']:.1e}",
            "{:g} of beta",
            below(arms["slope_error"], 1e-6),
        ),
        Claim.of(
            "arms: best of n spends at most log n - (n - 1) / n",
            f"at most {max(arms['bon_excess'], 0):.1e} nats more, {100 * arms['bon_shortfall']:.1f}% less",
            "no more",
            below(arms["bon_excess"], 1e-9),
        ),
        Claim.of(
            f"arms: with {least} comparisons the gold peaks and falls",
            f"{100 * lost:.0f}% of the gain lost at d = {DISTANCES[-1]:.1f}",
            "> {:.0%}",
            above(lost, 0.1),
        ),
        Claim.of(
            "arms: more comparisons, a higher peak",
            f"{few.max():.3f} with {least}, {many.max():.3f} with {most}",
            "rising",
            ordered(few.max(), many.max()),
        ),
    ]


def latent_claims(latent: dict) -> list[Claim]:
    sizes = sizes_of(latent)
    proxy_steps, kl_steps = ([np.diff(p["rl"][key]).min() for p in latent["proxies"]] for key in ("proxy", "kl"))
    lost = fall(mean_curves(latent, sizes[0]), "convnet")[1]
    gap = path_gap(latent, sizes[0])
    (bon, rl, every), (bon_gold, rl_gold, _) = at_equal_kl(latent, sizes[0], 1000).values()
    made = [
        Claim.of(
            "latents: the proxy rises with KL at every step of beta, for every proxy",
            f"smallest step {min(proxy_steps):+.3f}",
            "> {:g}",
            above(proxy_steps, 0),
            above(kl_steps, 0),
        ),
        *(fall_claim(size, mean_curves(latent, size)) for size in sizes),
        Claim.of(
            "latents: so does the log-odds of a convnet that learnt from all images",
            f"{100 * lost:.1f}% of the gain lost",
            "> {:.0%} lost",
            above(lost, 0.1),
        ),
        Claim.of(
            "latents: the penalty leaves the frontier of gold and KL where early stopping has it",
            f"off by at most {100 * gap:.0f}% of the gain",
            "{:.0%}",
            below(gap, 0.1),
        ),
        Claim.of(
            "latents: at the KL of best of 1000 neither it nor the Gaussian policy beats the best of all policies",
            f"{rl:.2f} Gaussian, {bon:.2f} best of n, {every:.2f} the optimum",
            "at most {:g} above it, for the interpolation",
            at_most([rl - every, bon - every], 0.1),
        ),
        Claim.of(
            "latents: at that KL best of n gets more of the proxy than the Gaussian policy",
            f"{bon:.2f} and {rl:.2f}",
            "more",
            ordered(rl, bon),
        ),
        Claim.of(
            "latents: and more of the gold", f"{bon_gold:.2f} and {rl_gold:.2f}", "more", ordered(rl_gold, bon_gold)
        ),
    ]
    if len(sizes) > 1:
        peaks = [mean_curves(latent, size)["gold"].max() for size in sizes]
        words = ", ".join(f"{p:.1f} ({s})" for p, s in zip(peaks, sizes, strict=True))
        name = "latents: the more images the proxy has seen, the higher the gold's peak"
        made.append(Claim.of(name, words, "rising", ordered(*peaks)))
    return made


def sizes_of(latent: dict) -> list[int]:
    """Of the proxies, in images."""
    return list(dict.fromkeys(p["images"] for p in latent["proxies"]))


def fall_claim(size: int, curves: dict) -> Claim:
    (peak, lost), d = fall(curves, "gold"), curves["d"]
    return Claim.of(
        f"latents: the gold of a proxy of {size} images peaks, then falls",
        f"peak at d = {d[peak]:.2f}, {100 * lost:.0f}% of the gain lost at d = {d[-1]:.1f}",
        "> {:.0%} lost",
        above(lost, 0.2),
        between(peak, 1, len(d) - 2),
    )


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
    for images in sizes_of(latent):
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
