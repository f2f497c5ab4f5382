"""Gold and proxy against sqrt(KL) in the three worlds, and what a policy answers."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np

from experiments.reward_overoptimisation import toys
from experiments.reward_overoptimisation.claims import mean_curves, sizes_of
from experiments.reward_overoptimisation.protocol import BEST_OF, TOY
from vae.experiment_figures import BLUE, INK, MUTED, ORANGE, PURPLE, SKY, bare, guide, unpack_images

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

PROXY, GOLD, BON = ORANGE, BLUE, INK
SHADES = [BLUE, SKY, PURPLE]


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
    guide(ax, x=TOY.peak[0], ls=":")
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
    sizes = sizes_of(latent)
    for p in latent["proxies"]:
        if p["images"] == sizes[0]:
            ax.plot([0, *np.sqrt(p["rl"]["kl"])], [p["reference"][key], *p["rl"][key]], color=colour, lw=0.7, alpha=0.5)
            ax.plot(np.sqrt(p["path"]["kl"]), p["path"][key], ":", color=MUTED, lw=1)
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
    ax.plot([], [], ":", color=MUTED, label="on the way, least penalty")
    ax.set(xlim=(0, None), xlabel="d = sqrt(KL)")


def draw_pictures(ax: Axes, latent: dict) -> None:
    pictured = latent["proxies"][0]
    rows, packed = pictured["pictures"]["rows"], pictured["pictures"]["images"]
    images = unpack_images({"levels": packed.get("zlib"), **packed})  # zlib: as it was called in the committed results
    count, columns, height, width = images.shape
    wall = images.transpose(0, 2, 1, 3).reshape(count * height, columns * width)
    ax.imshow(np.rint(255 * wall) // 32, cmap="gray_r", interpolation="nearest")  # eight greys: the file is committed
    labels = []
    for name, number in rows.items():
        d = 0.0 if number is None else math.sqrt(pictured["rl"]["kl"][number])
        of = pictured["reference"] if number is None else {k: v[number] for k, v in pictured["rl"].items()}
        labels.append(f"{name}\nd {d:.1f}, proxy {of['proxy']:.1f}, gold {of['gold']:.0f}")
    ax.set_yticks([(i + 0.5) * height for i in range(count)], labels, fontsize=8)
    ax.set_xticks([(2 * c + 1) * width for c in range(10)], [f"asked for {c}" for c in range(10)], fontsize=8)
    bare(ax)
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
