"""Which way round is the KL? A Gaussian fitted to a mixture both ways, a factorised one to a correlated one, and the three
Monte-Carlo estimators of KL as values and as losses. Every number has an exact answer. Seconds; nothing to download."""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import product

import numpy as np
import torch
from torch import Tensor

from vae.experiment import Claim, Context, Table
from vae.kl import GaussianMixture, k1, k2, k3, kl_gaussian_full
from vae.seeding import generator

PAPER = "Bishop 2006, figures 10.2 and 10.3; Minka 2005; Schulman 2020, Approximating KL divergence"
CLAIM = (
    "Minimising KL(p || q) covers every mode of p and KL(q || p) settles on one; as a loss, k2 descends the second and k3 "
    "the first, although both are estimates of the second."
)
SETTINGS = {form: {"seed": 0, "steps": 1500, "batch": 1000, "samples": 1_000_000} for form in ("quick", "full")}

# p = 1/2 N(-centre, sd^2) + 1/2 N(centre, sd^2), with the exact optima (mean, sd of q; KL in nats), by quadrature.
MIXTURES = {
    "far": {
        "centre": 2.0,
        "sd": 0.5,
        "forward": [(0.0, 2.0616, 0.72355)],
        "reverse": [(-1.9998, 0.5004, 0.69305), (0.0, 1.7364, 1.8712), (1.9998, 0.5004, 0.69305)],
    },
    "near": {
        "centre": 3.0,
        "sd": 1.0,
        "forward": [(0.0, 3.1623, 0.46199)],
        "reverse": [(-2.9843, 1.0234, 0.68877), (0.0, 2.7438, 0.84062), (2.9843, 1.0234, 0.68877)],
    },
}
STARTS = [(mean, sd) for sd in (0.4, 1.5, 4.0) for mean in (-4.0, -1.5, -0.2, 0.2, 1.5, 4.0)]
CORRELATIONS = (0.5, 0.9, 0.99)
SHIFTS = (0.1, 1.0)  # q = N(0, 1), p = N(shift, 1)
ESTIMATORS = {"k1": k1, "k2": k2, "k3": k3}
POSTED = {  # bias / KL, sd / KL in the post's table
    "0.1": {"k1": "0, 20", "k2": "0.002, 1.42", "k3": "0, 1.42"},
    "1.0": {"k1": "0, 2", "k2": "0.25, 1.73", "k3": "0, 1.7"},
}
DRAWN = ("near", "reverse")  # whose paths are kept for the picture
LOSS_START = (2.0, 1.6)  # mean and sd of q, from which each estimator is descended as a loss


# --- fits -----------------------------------------------------------------------------------------------------------


def mixture(name: str) -> GaussianMixture:
    centre, sd = MIXTURES[name]["centre"], MIXTURES[name]["sd"]
    mean = torch.tensor([[-centre], [centre]], dtype=torch.float64)
    return GaussianMixture(torch.zeros(2, dtype=torch.float64), mean, torch.full_like(mean, 2 * math.log(sd)))


def log_normal(x: Tensor, mean: Tensor, log_sd: Tensor) -> Tensor:
    """log N(x; mean, exp(log_sd)^2), in nats."""
    return -0.5 * ((x - mean) * torch.exp(-log_sd)).square() - log_sd - 0.5 * math.log(2 * math.pi)


def descend(
    loss: Callable[[Tensor, Tensor], Tensor],
    starts: list[tuple[float, float]],
    steps: int,
    lr: float,
    adam: bool = True,
) -> dict:
    """Descend loss(mean, log_sd) -> (S,) from S starts at once, the learning rate falling to zero along half a cosine.

    Returns where each ended, [mean, sd], and its path in up to 60 points, most of them early.
    """
    parameters = torch.tensor(starts, dtype=torch.float64)
    parameters[:, 1] = parameters[:, 1].log()
    parameters.requires_grad_(True)
    # A short memory of squares: the first gradients, from a start far out, are a thousand times the last.
    optimizer = torch.optim.Adam([parameters], lr, betas=(0.9, 0.99)) if adam else torch.optim.SGD([parameters], lr)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    path, kept = [], set(np.geomspace(1, steps, 60).astype(int) - 1)
    for step in range(steps):
        if step in kept:
            path.append(parameters.detach().clone())
        optimizer.zero_grad()
        loss(*parameters.unbind(-1)).sum().backward()
        optimizer.step()
        schedule.step()
    path = torch.stack([*path, parameters.detach()], 1)  # (S, T, 2)
    path[..., 1] = path[..., 1].exp()
    return {"end": path[:, -1], "path": (path * 1e3).round() / 1e3}


def forward_loss(p: GaussianMixture, batch: int, noise: torch.Generator) -> Callable[[Tensor, Tensor], Tensor]:
    """KL(p || q) up to a constant: -E_p[log q], on samples of p. Maximum likelihood."""
    return lambda mean, log_sd: -log_normal(p.sample(batch, noise), mean, log_sd).mean(0)


def reverse_loss(p: GaussianMixture, batch: int, noise: torch.Generator) -> Callable[[Tensor, Tensor], Tensor]:
    """KL(q || p) = E_q[log q - log p], reparameterised. Variational inference.

    The noise is spread evenly, one draw shifting all quantiles: unbiased as independent draws are, with far less variance.
    """

    def loss(mean: Tensor, log_sd: Tensor) -> Tensor:
        shift = torch.rand((), generator=noise, dtype=torch.float64)
        quantiles = (torch.arange(batch, dtype=torch.float64) + shift) / batch
        z = mean + torch.exp(log_sd) * torch.special.ndtri(quantiles).unsqueeze(-1)
        return (log_normal(z, mean, log_sd) - p.log_prob(z.unsqueeze(-1))).mean(0)

    return loss


def estimator_loss(
    estimator: Callable[..., Tensor], p: GaussianMixture, batch: int, noise: torch.Generator
) -> Callable[[Tensor, Tensor], Tensor]:
    """Mean of k1, k2 or k3 on samples of the present q, held fixed: what a policy's KL penalty in the loss does."""

    def loss(mean: Tensor, log_sd: Tensor) -> Tensor:
        with torch.no_grad():
            z = mean + torch.exp(log_sd) * torch.randn(batch, 1, generator=noise, dtype=torch.float64)
            log_ref = p.log_prob(z.unsqueeze(-1))
        return estimator(log_pi=log_normal(z, mean, log_sd), log_ref=log_ref).mean(0)

    return loss


def mean_gradient(loss: Callable[[Tensor, Tensor], Tensor], at: tuple[float, float], draws: int) -> dict[str, Tensor]:
    """The gradient of a loss in (mean, log_sd) at one point, averaged over so many draws, with its standard error."""
    here = torch.tensor([[at[0], math.log(at[1])]], dtype=torch.float64, requires_grad=True)
    drawn = torch.stack([torch.autograd.grad(loss(*here.unbind(-1)).sum(), here)[0][0] for _ in range(draws)])
    return {"mean": drawn.mean(0), "se": drawn.std(0) / math.sqrt(draws)}


def exact_gradient(direction: str, name: str, at: tuple[float, float]) -> Tensor:
    """d KL / d (mean, log_sd) of q at one point, by quadrature: KL(p || q) forward, KL(q || p) reverse."""
    here = torch.tensor([at[0], math.log(at[1])], dtype=torch.float64, requires_grad=True)
    x = torch.linspace(-20, 20, 40_001, dtype=torch.float64)
    log_p, log_q = mixture(name).log_prob(x.unsqueeze(-1)), log_normal(x, *here)
    terms = log_p.exp() * (log_p - log_q) if direction == "forward" else log_q.exp() * (log_q - log_p)
    return torch.autograd.grad(terms.sum() * (x[1] - x[0]), here)[0]


def factorised_fit(correlation: float, steps: int) -> dict[str, float]:
    """The variances of a diagonal q that minimise KL to and from a Gaussian of unit variances, and the KL attained."""
    zero = torch.zeros(2, dtype=torch.float64)
    covariance = torch.tensor([[1.0, correlation], [correlation, 1.0]], dtype=torch.float64)
    directions = {
        "forward": lambda q: kl_gaussian_full(p_mean=zero, p_covariance=covariance, q_mean=zero, q_covariance=q),
        "reverse": lambda q: kl_gaussian_full(p_mean=zero, p_covariance=q, q_mean=zero, q_covariance=covariance),
    }
    fitted = {}
    for direction, divergence in directions.items():
        log_var = torch.tensor([1.0, -1.0], dtype=torch.float64, requires_grad=True)
        optimizer = torch.optim.Adam([log_var], lr=0.05, betas=(0.9, 0.99))
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
        for _ in range(steps):
            optimizer.zero_grad()
            kl = divergence(torch.diag(log_var.exp()))
            kl.backward()
            optimizer.step()
            schedule.step()
        fitted[direction] = {"variances": log_var.detach().exp(), "kl": kl.detach()}
    return fitted


def estimator_statistics(shift: float, samples: int, noise: torch.Generator) -> dict[str, dict[str, float]]:
    """Bias and sd of k1, k2, k3 on draws of q = N(0, 1) against p = N(shift, 1), each with its standard error, in nats."""
    x = torch.randn(samples, generator=noise, dtype=torch.float64)
    log_q, log_p = -0.5 * x.square(), -0.5 * (x - shift).square()
    numbers = {}
    for name, estimator in ESTIMATORS.items():
        value = estimator(log_pi=log_q, log_ref=log_p)
        sd = value.std()
        fourth = (value - value.mean()).pow(4).mean()
        numbers[name] = {
            "bias": value.mean() - shift**2 / 2,
            "bias_se": sd / math.sqrt(samples),
            "sd": sd,
            "sd_se": torch.sqrt((fourth - sd.pow(4)) / samples) / (2 * sd),  # the delta method on the variance
            "lowest": value.min(),
        }
    return numbers


def exact_statistics(shift: float) -> dict[str, tuple[float, float]]:
    """(bias, sd) of each estimator in nats, in closed form; x ~ N(0, 1) and -log r = shift^2 / 2 - shift x."""
    true = shift**2 / 2
    return {
        "k1": (0.0, shift),
        "k2": (true**2 / 2, true * math.sqrt(2 + shift**2)),
        "k3": (0.0, math.sqrt(math.expm1(shift**2) - shift**2)),
    }


def measure(context: Context) -> dict:
    seed, steps, batch, samples = (context.settings[key] for key in ("seed", "steps", "batch", "samples"))
    results: dict = {"fits": {}, "factorised": {}, "estimators": {}, "as_loss": {}}
    for name in MIXTURES:
        p = mixture(name)
        for direction, loss, lr in (("forward", forward_loss, 0.05), ("reverse", reverse_loss, 0.02)):
            noise = generator(seed, name, direction)
            fit = descend(loss(p, batch, noise), STARTS, steps, lr)
            drawn = (name, direction) == DRAWN
            results["fits"][f"{name}, {direction}"] = fit if drawn else {"end": fit["end"]}
    for correlation in CORRELATIONS:
        results["factorised"][str(correlation)] = factorised_fit(correlation, steps)
    for shift in SHIFTS:
        results["estimators"][str(shift)] = estimator_statistics(shift, samples, generator(seed, "estimators", shift))
    for name, estimator in ESTIMATORS.items():
        loss = estimator_loss(estimator, mixture("near"), 2 * batch, generator(seed, "loss", name))
        # Plain gradient descent: Adam would blow up the pure noise that k1's gradient is.
        results["as_loss"][name] = descend(loss, [LOSS_START], steps, lr=0.1, adam=False)
        results["as_loss"][name]["gradient"] = mean_gradient(loss, LOSS_START, draws=500)
    for direction in ("forward", "reverse"):
        results["as_loss"][direction] = {"gradient": exact_gradient(direction, "near", LOSS_START)}
    return results


# --- claims ---------------------------------------------------------------------------------------------------------


def nearest(end: list[float], optima: list[tuple[float, float, float]]) -> tuple[float, tuple[float, float, float]]:
    """The optimum that is nearest to (mean, sd), and the larger of the two deviations from it."""
    return min((max(abs(end[0] - optimum[0]), abs(end[1] - optimum[1])), optimum) for optimum in optima)


def claims(results: dict) -> list[Claim]:
    made = []
    for name, direction in product(MIXTURES, ("forward", "reverse")):
        optima = MIXTURES[name][direction]
        landed = [nearest(end, optima) for end in results["fits"][f"{name}, {direction}"]["end"]]
        worst, reached = max(deviation for deviation, _ in landed), len({optimum for _, optimum in landed})
        many = f"the {len(optima)} optima, each reached" if len(optima) > 1 else "the only optimum"
        made.append(
            Claim(
                f"{direction} KL, {name} modes: every start ends on {many}",
                worst < 1e-2 and reached == len(optima),
                f"{reached} reached, worst deviation {worst:.4f}",
                "mean and sd within 0.01",
            )
        )
    worst = {"forward": 0.0, "reverse": 0.0, "kl": 0.0}
    for correlation, fitted in results["factorised"].items():
        rho2 = float(correlation) ** 2
        for direction, variance in (("forward", 1.0), ("reverse", 1 - rho2)):
            off = max(abs(v - variance) for v in fitted[direction]["variances"])
            worst[direction] = max(worst[direction], off)
            worst["kl"] = max(worst["kl"], abs(fitted[direction]["kl"] + 0.5 * math.log(1 - rho2)))
    for direction, target in (("forward", "1"), ("reverse", "1 - rho^2")):
        made.append(
            Claim(
                f"factorised q of a correlated Gaussian, {direction} KL: variances {target}",
                worst[direction] < 1e-3,
                f"off by at most {worst[direction]:.1e}",
                "within 0.001",
            )
        )
    made.append(
        Claim(
            "both directions attain KL = -1/2 log(1 - rho^2)",
            worst["kl"] < 1e-3,
            f"off by at most {worst['kl']:.1e} nats",
            "within 0.001 nats",
        )
    )
    for shift, numbers in results["estimators"].items():
        errors = []
        for name, (bias, sd) in exact_statistics(float(shift)).items():
            errors += [(numbers[name]["bias"] - bias) / numbers[name]["bias_se"]]
            errors += [(numbers[name]["sd"] - sd) / numbers[name]["sd_se"]]
        made.append(
            Claim(
                f"bias and sd of k1, k2, k3 at KL = {float(shift) ** 2 / 2:g} are Schulman's",
                max(map(abs, errors)) < 3,
                f"largest error {max(map(abs, errors)):.1f} standard errors",
                "3 standard errors",
            )
        )
    lowest = min(results["estimators"][str(shift)]["k3"]["lowest"] for shift in SHIFTS)
    made.append(Claim("k3 is never negative", lowest >= 0, f"lowest {lowest:.1e}", ">= 0 on every sample"))
    losses = results["as_loss"]
    for name, direction in (("k2", "reverse"), ("k3", "forward")):
        end = losses[name]["end"][0]
        deviation, optimum = nearest(end, MIXTURES["near"][direction])
        made.append(
            Claim(
                f"{name} as a loss descends to an optimum of the {direction} KL",
                deviation < 0.02,
                f"ends at ({end[0]:.3f}, {end[1]:.3f})",
                f"({optimum[0]:.3f}, {optimum[1]:.3f}) within 0.02",
            )
        )
    for name, direction in (("k1", None), ("k2", "reverse"), ("k3", "forward")):
        exact = losses[direction]["gradient"] if direction else (0.0, 0.0)
        ours = losses[name]["gradient"]
        errors = [abs(m - e) / se for m, e, se in zip(ours["mean"], exact, ours["se"], strict=True)]
        made.append(
            Claim(
                f"E[grad {name}] is " + (f"the gradient of the {direction} KL" if direction else "zero"),
                max(errors) < 3,
                f"({ours['mean'][0]:.4f}, {ours['mean'][1]:.4f}), {max(errors):.1f} standard errors off",
                f"({exact[0]:.4f}, {exact[1]:.4f}) within 3",
            )
        )
    return made


def table(results: dict) -> Table:
    rows = []
    for name, direction in product(MIXTURES, ("forward", "reverse")):
        p = MIXTURES[name]
        what = "KL(p || q)" if direction == "forward" else "KL(q || p)"
        fits = results["fits"][f"{name}, {direction}"]["end"]
        for optimum in p[direction]:
            mean, sd, kl = optimum
            here = [end for end in fits if nearest(end, p[direction])[1] == optimum]
            ours = f"{np.mean([e[0] for e in here]):.4f}, {np.mean([e[1] for e in here]):.4f} ({len(here)} starts)"
            words = f"min {what}, modes at ±{p['centre']:g}, sd {p['sd']:g}: mean, sd of q"
            rows.append((words, f"{mean:.4f}, {sd:.4f} (KL {kl:.5f})", ours))
    rows.append(("KL attained by a factorised q, rho 0.9, both ways", "0.8304", _both(results["factorised"]["0.9"])))
    for shift, numbers in results["estimators"].items():
        true = float(shift) ** 2 / 2
        for name, (bias, sd) in exact_statistics(float(shift)).items():
            exact = f"{bias / true:.4f}, {sd / true:.4f} ({POSTED[shift][name]})"
            ours = f"{numbers[name]['bias'] / true:.4f}, {numbers[name]['sd'] / true:.4f}"
            rows.append((f"{name} at KL {true:g}: bias / KL, sd / KL", exact, ours))
    return Table(("", "exact (as published)", "ours"), rows)


def _both(fitted: dict) -> str:
    return f"{fitted['forward']['kl']:.4f}, {fitted['reverse']['kl']:.4f}"


# --- picture --------------------------------------------------------------------------------------------------------

GREY, FORWARD, REVERSE, BROAD = "#c9ced6", "#d55e00", "#0072b2", "#2f9bd6"


def density(x: np.ndarray, mean: float, sd: float) -> np.ndarray:
    return np.exp(-0.5 * ((x - mean) / sd) ** 2) / (sd * math.sqrt(2 * math.pi))


def reverse_landscape(name: str, means: np.ndarray, sds: np.ndarray) -> np.ndarray:
    """KL(q || p) in nats by quadrature, (sds, means)."""
    noise = np.linspace(-7, 7, 1401)
    weight = density(noise, 0, 1) * (noise[1] - noise[0])
    z = means[None, :, None] + sds[:, None, None] * noise
    centre, sd = MIXTURES[name]["centre"], MIXTURES[name]["sd"]
    log_p = np.logaddexp(-0.5 * ((z - centre) / sd) ** 2, -0.5 * ((z + centre) / sd) ** 2)
    log_p -= math.log(2 * sd * math.sqrt(2 * math.pi))
    return -0.5 * math.log(2 * math.pi * math.e) - np.log(sds)[:, None] - (weight * log_p).sum(-1)


def draw_fits(ax, name: str, results: dict) -> None:
    p = MIXTURES[name]
    x = np.linspace(-7, 7, 800)
    ax.fill_between(x, 0.5 * (density(x, p["centre"], p["sd"]) + density(x, -p["centre"], p["sd"])), color=GREY, lw=0)
    mean, sd = results["fits"][f"{name}, forward"]["end"][0]
    ax.plot(x, density(x, mean, sd), color=FORWARD, label="KL(p || q): covers both")
    ends = results["fits"][f"{name}, reverse"]["end"]
    for number, optimum in enumerate(p["reverse"]):
        end = next(end for end in ends if nearest(end, p["reverse"])[1] == optimum)
        broad = optimum[0] == 0
        label = {0: "KL(q || p): picks one", 1: "its broad local minimum"}.get(number)
        style = {"color": BROAD, "ls": (0, (3, 1.5))} if broad else {"color": REVERSE}
        ax.plot(x, density(x, *end), **style, label=label)
    ax.set(xlim=(-7, 7), ylim=(0, None), yticks=[], xlabel="x")
    ax.grid(False)
    ax.spines["left"].set_visible(False)


def draw_landscape(ax, name: str, results: dict) -> None:
    means, sds = np.linspace(-5, 5, 121), np.geomspace(0.3, 5, 80)
    levels = [0.75, 0.8, 0.9, 1.05, 1.3, 1.7, 2.3, 3.2, 4.5, 6.5, 9.5]
    kl = reverse_landscape(name, means, sds)
    ax.contourf(means, sds, kl, levels=[0, *levels, 1e3], cmap="Blues_r", alpha=0.75, norm="log", vmin=0.5, vmax=14)
    for path in results["fits"][f"{name}, reverse"]["path"]:
        ax.plot(*np.array(path).T, color="#1d2127", lw=0.8)
        ax.plot(*path[0], "o", color="#1d2127", ms=2.5)
    for mean, sd, divergence in MIXTURES[name]["reverse"]:
        ax.plot(mean, sd, "*", color="white", mec="#1d2127", mew=0.8, ms=11, zorder=5)
        ax.annotate(
            f"{divergence:.3f}",
            (mean, sd),
            (0, -13),
            textcoords="offset points",
            ha="center",
            fontsize=8,
            zorder=6,
            color="white",
        )
    mean, sd, _ = MIXTURES[name]["forward"][0]
    ax.plot(mean, sd, "D", color=FORWARD, mec="white", ms=6, zorder=5)
    ax.annotate(
        "optimum of KL(p || q)",
        (mean, sd),
        (0, 7),
        textcoords="offset points",
        ha="center",
        fontsize=8,
        bbox={"facecolor": "white", "edgecolor": "none", "pad": 1, "alpha": 0.8},
    )
    ax.set(xlim=(-5, 5), ylim=(0.3, 5), yscale="log", xlabel="mean of q", ylabel="sd of q")
    ax.set_yticks([0.3, 0.5, 1, 2, 4], ["0.3", "0.5", "1", "2", "4"])
    ax.minorticks_off()
    ax.grid(False)


def draw_factorised(ax, results: dict) -> None:
    rho = 0.9
    angle = np.linspace(0, 2 * np.pi, 200)
    circle = np.stack([np.cos(angle), np.sin(angle)])
    root = np.linalg.cholesky(np.array([[1, rho], [rho, 1]]))
    for radius in (1, 2):
        ax.fill(*(radius * root @ circle), color=GREY, alpha=0.55, lw=0)
        for direction, colour in (("forward", FORWARD), ("reverse", REVERSE)):
            scale = np.sqrt(results["factorised"][str(rho)][direction]["variances"])[:, None]
            ax.plot(*(radius * scale * circle), color=colour, lw=1.6 if radius == 1 else 0.9)
    ax.annotate("KL(p || q)", (-1.41, 1.41), (-3, 3), textcoords="offset points", ha="right", color=FORWARD, fontsize=8)
    ax.annotate("KL(q || p)", (0.62, -0.62), (4, -6), textcoords="offset points", ha="left", color=REVERSE, fontsize=8)
    ax.set(ylim=(-2.3, 2.3), xticks=[-2, 0, 2], yticks=[-2, 0, 2])
    ax.set_aspect("equal", adjustable="datalim")


def draw_estimators(ax, results: dict) -> None:
    """bias / KL and sd / KL, ours on the exact value."""
    offsets = {"k1": -0.3, "k2": 0.0, "k3": 0.3}
    colours = {"k1": "#009e73", "k2": REVERSE, "k3": FORWARD}
    for place, shift in enumerate(SHIFTS):
        true = shift**2 / 2
        for name, (bias, sd) in exact_statistics(shift).items():
            at = place + offsets[name]
            ours = results["estimators"][str(shift)][name]
            ax.bar(at, sd / true, 0.26, color=colours[name], alpha=0.35)
            ax.plot(at, ours["sd"] / true, "o", color=colours[name], ms=4, label=name if place == 0 else None)
            text = f"{ours['sd'] / true:.2f}\nbias {100 * bias / true:.2g}%"
            ax.annotate(
                text, (at, sd / true), (0, 5), textcoords="offset points", ha="center", fontsize=6.5, linespacing=1.3
            )
    ax.set(xticks=[0, 1], yscale="log", ylim=(0.9, 60), ylabel="sd of one draw / KL")
    ax.set_xticklabels([f"KL = {shift**2 / 2:g}" for shift in SHIFTS])
    ax.set_yticks([1, 2, 5, 10, 20, 50], ["1", "2", "5", "10", "20", "50"])
    ax.minorticks_off()
    ax.grid(axis="x", visible=False)
    ax.legend(loc="upper right", ncols=3)


def draw_losses(ax, results: dict) -> None:
    means, sds = np.linspace(-1.5, 4.5, 100), np.linspace(0.6, 4.0, 80)
    kl = reverse_landscape("near", means, sds)
    ax.contour(means, sds, kl, levels=[0.7, 0.75, 0.8, 0.85, 0.95, 1.1, 1.4], colors=GREY, linewidths=0.7)
    colours = {"k1": "#009e73", "k2": REVERSE, "k3": FORWARD}
    words = {"k1": "k1: no gradient, noise", "k2": "k2: to min KL(q || p)", "k3": "k3: to min KL(p || q)"}
    for name in ESTIMATORS:
        fit = results["as_loss"][name]
        path = np.array(fit["path"][0])
        ax.plot(*path.T, color=colours[name], marker=".", ms=3, lw=1.2, label=words[name])
        ax.plot(*fit["end"][0], "o", color=colours[name], ms=6, mec="white", zorder=4)
    for mean, sd, _ in [*MIXTURES["near"]["forward"], *MIXTURES["near"]["reverse"][1:]]:
        ax.plot(mean, sd, "*", color="white", mec="#1d2127", mew=0.8, ms=12, zorder=3)
    ax.set(xlim=(-1.5, 4.5), ylim=(0.6, 4.0), xlabel="mean of q", ylabel="sd of q")
    ax.grid(False)
    ax.legend(loc="lower left", fontsize=8)


def figure(results: dict):
    import matplotlib.pyplot as plt

    fig, axes = plt.subplots(2, 3, figsize=(12, 7), gridspec_kw={"width_ratios": [1.05, 1.05, 1]})
    draw_fits(axes[0, 0], "far", results)
    axes[0, 0].set_title("One Gaussian for two modes, both ways")
    axes[0, 0].legend(loc="upper center", bbox_to_anchor=(0.5, 0.98), fontsize=8)
    axes[0, 0].set_ylim(0, 1.15)
    draw_landscape(axes[0, 1], "near", results)
    axes[0, 1].set_title("KL(q || p), modes ±3: 18 starts, three minima")
    draw_factorised(axes[0, 2], results)
    axes[0, 2].set_title("Factorised q, correlation 0.9")
    draw_fits(axes[1, 0], "near", results)
    axes[1, 0].set_title("Broader modes: the same three fits")
    axes[1, 0].set_ylim(0, 0.47)
    draw_losses(axes[1, 1], results)
    axes[1, 1].set_title("k1, k2, k3 as losses, from one start")
    draw_estimators(axes[1, 2], results)
    axes[1, 2].set_title("k1, k2, k3 as values: dots on exact bars")
    fig.get_layout_engine().set(w_pad=0.12, h_pad=0.1)
    return fig
