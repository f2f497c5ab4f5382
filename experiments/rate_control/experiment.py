"""How many nats the code carries: a weight on the KL, or a set-point and something that finds the weight. First on the linear
VAE, whose rate-distortion curve is known exactly, then on an MLP VAE of binarised MNIST."""

from __future__ import annotations

import csv
import logging
import math
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from vae.beta import GECO, ControlVAE, Linear
from vae.data.images import Batch
from vae.evaluation.ppca import LinearWeights, optimum, spectrum
from vae.experiment import Claim, Context, Table, spread
from vae.model import VAEOutput
from vae.objectives.capacity import Capacity, FreeBits
from vae.objectives.elbo import BetaVAE, Objective
from vae.seeding import generator

PAPER = (
    "Alemi et al. 2018, Fixing a broken ELBO; Burgess et al. 2018; Rezende & Viola 2018, GECO; Shao et al. 2020, ControlVAE; "
    "Kingma et al. 2016, free bits"
)
CLAIM = (
    "beta picks a point of the rate-distortion curve, where its slope is -beta; a capacity, GECO and ControlVAE reach a "
    "chosen point of the same curve without knowing beta, and free bits put a floor under every latent."
)

LINEAR = {"k": 100, "sigma2": 0.01, "steps": 3000, "lr": 0.03, "gammas": [20, 1000], "free_nats": 0.5, "free_beta": 30}
MLP = {"set_point": 2, "gammas": [10, 1000], "free_nats": 0.5, "free_beta": 4}
SETTINGS = {
    "quick": {
        "linear": {**LINEAR, "betas": [3, 10, 30], "set_points": [10]},
        "mlp": {**MLP, "betas": [0.5, 1, 2, 4], "seeds": 1},
    },
    "full": {
        "linear": {**LINEAR, "betas": [2, 5, 10, 20, 50, 100], "set_points": [5, 10, 20]},
        "mlp": {**MLP, "betas": [0.25, 0.5, 1, 2, 4, 8], "seeds": 3},
        # of the misses: more steps for the linear VAE, a GECO whose weight is kept near where it ends, and a gamma that is
        # just above the slope of the curve at the set-point
        "ablations": {"steps": 12_000, "beta": 2, "set_point": 10, "gamma": 1000, "geco_from": 1.5, "small_gamma": 3},
    },
}
# of the linear VAE of MNIST with sigma^2 = 0.01, every useful latent allowed: rate, squared error, latents in use
PUBLISHED = {1: (206.98, 3.6542, 251), 10: (45.109, 13.6441, 69)}
CONVERGED = 0.1  # nats: a linear VAE that ends further above the optimum is marked as not converged
LAST = 0.2  # the part of training over which a set-point has to be held


# --- the linear VAE, exactly ----------------------------------------------------------------------------------------


class ExactLinear(nn.Module):
    """Stands where a VAE stands: a linear one whose rate and distortion are the exact means over all images and all z.

    So an objective of the library trains it as it would any other, without the noise of minibatches. In coordinates in
    which the images' covariance is diagonal, the encoder's whitened: they only speed this up.
    """

    def __init__(self, values: Tensor, k: int, sigma2: float, noise: torch.Generator) -> None:
        super().__init__()
        n = len(values)
        self.values, self.scale = values.float(), values.float().sqrt().clamp(min=0.1)
        self.decoder = nn.Parameter(0.1 * torch.randn(n, k, generator=noise))
        self.encoder = nn.Parameter(0.1 * torch.randn(k, n, generator=noise))
        self.log_var = nn.Parameter(torch.zeros(k))
        self.fixed = torch.zeros(n), torch.zeros(k), torch.tensor(math.log(sigma2))

    def terms(self) -> dict[str, Tensor]:
        offset, shift, log_sigma2 = self.fixed
        weights = LinearWeights(self.decoder, self.encoder / self.scale, offset, shift, self.log_var, log_sigma2)
        return weights.terms(self.values)

    def forward(self, x: None, generator: None, y: None = None) -> VAEOutput:
        terms = self.terms()
        return VAEOutput(None, None, None, terms["distortion"].unsqueeze(0), terms["kl"].unsqueeze(0))


def linear_objective(method: str, settings: dict, target: dict[str, float]) -> Objective:
    """What is minimised. target: the "rate" or the "distortion" to reach, in nats, or the "beta" of a fixed weight."""
    if method == "fixed":
        return BetaVAE(beta=target["beta"])
    if method == "geco":  # its weight may not be wound down below 1 by the first errors
        return BetaVAE(schedule=GECO(target=target["distortion"], alpha=0.95, eta=2e-5, minimum=1.0))
    if method == "control":
        return BetaVAE(schedule=ControlVAE(target=target["rate"], ki=2e-3, maximum=100.0, warmup=settings["steps"] / 6))
    if method == "free_bits":
        return FreeBits(free_nats=settings["free_nats"], beta=settings["free_beta"])
    gamma = float(method.removeprefix("capacity"))
    return Capacity(capacity=target["rate"], gamma=gamma, schedule=Linear(steps=settings["steps"] / 3))


def steer(values: list[float], settings: dict, method: str, target: dict[str, float]) -> dict:
    """Train the exact linear VAE; where it ends, and its course in 150 windows."""
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)  # collapsed latents have gradients below 1e-38: ten times as slow
    objective, steps = linear_objective(method, settings, target), settings["steps"]
    vae = ExactLinear(
        torch.tensor(values, dtype=torch.float64), settings["k"], settings["sigma2"], generator("linear start")
    )
    optimizer = torch.optim.Adam(vae.parameters(), lr=settings["lr"], fused=True)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    nothing, window, trace = Batch(None, None, 0), [], []
    for step in range(steps):
        optimizer.zero_grad()
        terms = objective(vae, nothing, None, step)
        terms["loss"].backward()
        objective.schedule.observe(rate=terms["rate"], distortion=terms["distortion"])
        optimizer.step()
        schedule.step()
        window.append([float(terms[name]) for name in ("rate", "distortion")] + [float(terms.get("beta", math.nan))])
        if (step + 1) % (steps // 150) == 0:
            trace.append([step + 1, *np.mean(window, 0).round(4)])
            window = []
    with torch.no_grad():
        final = vae.terms()
    ended = {name: final[name].item() for name in ("rate", "distortion", "squared_error")}
    if method == "fixed":
        best = optimum(torch.tensor(values, dtype=torch.float64), settings["k"], settings["sigma2"], target["beta"])
        ended["nats_above_optimum"] = nats_above(ended, best._asdict(), target["beta"])
        if ended["nats_above_optimum"] > CONVERGED:
            logging.getLogger(__name__).warning(
                f"The linear VAE at beta = {target['beta']:g} has not converged in {steps} steps: distortion + beta rate is "
                f"{ended['nats_above_optimum']:.2f} nats above the optimum."
            )
    return {**ended, "kl": sorted_kl(final["kl"]), "trace": _columns(trace)}


def nats_above(run: dict, exact: dict, beta: float) -> float:
    """How far a run's distortion + beta rate is above the least there is: 0 once it has converged."""
    return run["distortion"] - exact["distortion"] + beta * (run["rate"] - exact["rate"])


def sorted_kl(kl: Tensor) -> list[float]:
    return [round(nats, 4) for nats in kl.sort(descending=True).values.tolist()]


def _columns(trace: list) -> dict[str, list]:
    """step, rate, distortion, weight (null where there is none), each a list."""
    columns = {name: list(map(float, column)) for name, column in zip(TRACED, zip(*trace, strict=True), strict=True)}
    if any(map(math.isnan, columns["weight"])):
        columns["weight"] = None
    return columns


TRACED = ("step", "rate", "distortion", "weight")


def eigenvalues() -> list[float]:
    """Of the covariance of MNIST's 60,000 training images."""
    from hydra import compose, initialize_config_dir

    from vae.cli import CONFIGS
    from vae.engine.build import instantiate

    with initialize_config_dir(CONFIGS, version_base="1.3"):
        splits = instantiate(compose("train", ["data=mnist"]).data.source)()
    return spectrum(torch.cat([splits.train.x, splits.val.x])).values.tolist()


def spectrum_of_images(context: Context) -> tuple[list[float], partial]:
    """The eigenvalues, and the exact optimum of a linear VAE as a function of latent_dim and beta."""
    values = context.cached("eigenvalues", eigenvalues)
    sigma2 = context.settings["linear"]["sigma2"]
    return values, partial(optimum, torch.tensor(values, dtype=torch.float64), sigma2=sigma2)


def measure_linear(context: Context) -> dict:
    settings = context.settings["linear"]
    k = settings["k"]
    values, exact = spectrum_of_images(context)
    pieces, targets = {}, {}
    for beta in settings["betas"]:
        pieces[f"fixed-{beta:g}"] = ("fixed", {"beta": beta})
    for beta in settings["set_points"]:
        best = exact(latent_dim=k, beta=beta)
        targets[f"{beta:g}"] = target = {"rate": best.rate, "distortion": best.distortion}
        for method in ("geco", "control", *(f"capacity{gamma}" for gamma in settings["gammas"])):
            pieces[f"{method}-{beta:g}"] = (method, target)
    pieces["free_bits"] = ("free_bits", {})
    found = context.cached_many(
        {
            f"linear-{name}": partial(steer, values, settings, method, target)
            for name, (method, target) in pieces.items()
        }
    )
    curve = [exact(latent_dim=k, beta=beta) for beta in np.geomspace(1, 300, 100).tolist()]
    betas = {*settings["betas"], *settings["set_points"]}
    return {
        "pixels": len(values),
        "published": {str(b): _numbers(exact(latent_dim=len(values) - 1, beta=b)) for b in PUBLISHED},
        "exact": {f"{b:g}": _numbers(exact(latent_dim=k, beta=b)) for b in betas},
        "curve": {name: [round(getattr(best, name), 4) for best in curve] for name in ("rate", "squared_error")},
        "runs": {name: found[f"linear-{name}"] for name in pieces},
    }


def _numbers(best) -> dict[str, float]:
    return {name: getattr(best, name) for name in ("rate", "squared_error", "distortion", "active")}


# --- the MLP VAE ----------------------------------------------------------------------------------------------------

IMAGES = 10_000  # of each split, that a trained model is measured on


def mlp_overrides(method: str, settings: dict, target: dict[str, float], steps: int) -> list[str]:
    """What tells a run of conf/experiment/rate_control.yaml from the others. target: as of `linear_objective`."""
    if method == "fixed":
        return [f"objective.beta={target['beta']:g}"]
    if method.startswith("geco"):  # geco1.5: from that weight on, which it never goes below
        least = method.removeprefix("geco")
        return [
            "objective/schedule=geco",
            f"objective.schedule.target={target['distortion']:.3f}",
            "objective.schedule.alpha=0.95",
            "objective.schedule.eta=3e-4",
            f"objective.schedule.minimum={least or 0.3}",
            *([f"objective.schedule.init={least}"] if least else []),
        ]
    if method == "control":
        return [
            "objective/schedule=control",
            f"objective.schedule.target={target['rate']:.3f}",
            "objective.schedule.ki=1e-3",
            "objective.schedule.maximum=20",
            f"objective.schedule.warmup={steps // 6}",
        ]
    if method == "free_bits":
        free_nats, beta = settings["free_nats"], settings["free_beta"]
        return ["objective=free_bits", f"objective.free_nats={free_nats}", f"objective.beta={beta}"]
    gamma = method.removeprefix("capacity")
    return [
        "objective=capacity",
        f"objective.capacity={target['rate']:.3f}",
        f"objective.gamma={gamma}",
        f"objective.schedule.steps={steps // 3}",
    ]


def measured(folder: Path) -> dict:
    """A run's last weights on images of the training and the test split, one draw of the pixels and one z each, the same
    for every run; what it trained on in its last epoch; and its course."""
    from vae.engine.checkpoints import load_weights
    from vae.engine.folder import read_metrics
    from vae.engine.run import load
    from vae.evaluation.likelihood import ELBOTotals

    _, data, module = load(folder)
    load_weights(module, folder / "checkpoints" / "last.ckpt")
    result: dict[str, Any] = {}
    for split in ("train", "test"):
        data.test_split, totals = split, ELBOTotals()
        for batch in data.test_dataloader():
            totals.update(module.vae, data.prepare(batch, training=False))
            if totals.images >= IMAGES:
                break
        result[split] = {name: totals.compute()[name] for name in ("rate", "distortion", "elbo")}
    result["kl"] = sorted_kl(totals.kl_per_dimension())
    metrics = read_metrics(folder)
    result["last_epoch"] = {name: metrics[f"train/{name}"] for name in ("rate", "distortion")}
    with open(folder / "metrics.csv") as file:
        rows = [row for row in csv.DictReader(file) if row.get("train/rate")]
    names = ("step", "train/rate", "train/distortion", "train/beta")
    result["trace"] = _columns([[round(float(row.get(name) or "nan"), 4) for name in names] for row in rows])
    return result


def train_mlps(context: Context, methods: dict[str, tuple[str, dict]]) -> dict[str, list[dict]]:
    """What was measured of each method's runs, a seed each; methods: name -> (method, target) of `mlp_overrides`."""
    settings, seeds = context.settings["mlp"], range(context.settings["mlp"]["seeds"])
    base, steps = base_of(context), mlp_steps(context)
    overrides = {
        f"{name}-seed{seed}": [base, *mlp_overrides(method, settings, target, steps), f"seed={seed}"]
        for name, (method, target) in methods.items()
        for seed in seeds
    }
    folders = context.train_many(overrides)
    pieces = context.cached_many({f"mlp-{name}": partial(measured, folder) for name, folder in folders.items()})
    return {name: [pieces[f"mlp-{name}-seed{seed}"] for seed in seeds] for name in methods}


def base_of(context: Context) -> str:
    return f"experiment=rate_control{'_quick' if context.quick else ''}"


def mlp_steps(context: Context) -> int:
    from hydra import compose, initialize_config_dir

    from vae.cli import CONFIGS

    with initialize_config_dir(CONFIGS, version_base="1.3"):
        config = compose("train", [base_of(context)])
    return config.trainer.max_epochs * math.ceil(55_000 / config.data.batch_size)


def measure_mlp(context: Context) -> dict:
    settings = context.settings["mlp"]
    found = train_mlps(context, {f"fixed-{beta:g}": ("fixed", {"beta": beta}) for beta in settings["betas"]})
    # the set-point: where the first seed's run of that beta ended, on the images it trained on
    ended = found[f"fixed-{settings['set_point']:g}"][0]["last_epoch"]
    target = {name: round(value, 2) for name, value in ended.items()}
    methods = ["geco", "control", *(f"capacity{gamma}" for gamma in settings["gammas"]), "free_bits"]
    found |= train_mlps(context, {method: (method, target) for method in methods})
    return {"target": target, "steps": mlp_steps(context), "runs": found, **{k: settings[k] for k in ("betas", *MLP)}}


# --- why some miss --------------------------------------------------------------------------------------------------


def measure_ablations(context: Context, target: dict[str, float]) -> dict:
    """The misses once more with one thing changed. target: of the MLP's controllers."""
    settings, chosen = context.settings["linear"], context.settings["ablations"]
    longer = {**settings, "steps": chosen["steps"]}
    values, optimum_at = spectrum_of_images(context)
    exact = {name: optimum_at(latent_dim=settings["k"], beta=chosen[name]) for name in ("beta", "set_point")}
    told = {"fixed": {"beta": chosen["beta"]}, f"capacity{chosen['gamma']}": {"rate": exact["set_point"].rate}}
    steered = context.cached_many(
        {f"longer-{method}": partial(steer, values, longer, method, of) for method, of in told.items()}
    )
    methods = [f"geco{chosen['geco_from']}", f"capacity{chosen['small_gamma']}"]
    trained = train_mlps(context, {method: (method, target) for method in methods})
    kept = {
        method: [{key: run[key] for key in ("test", "last_epoch")} for run in trained[method]] for method in methods
    }
    return {
        "linear": [{key: run[key] for key in ("rate", "squared_error")} for run in steered.values()],
        "exact": list(map(_numbers, exact.values())),
        "mlp": list(kept.values()),
        "settings": chosen,
    }


def measure(context: Context) -> dict:
    results = {
        "linear": context.part("linear", ["linear"], lambda: {**measure_linear(context), **context.settings["linear"]}),
        "mlp": context.part("mlp", ["mlp"], lambda: measure_mlp(context)),
    }
    if "ablations" in context.settings:
        target = results["mlp"]["target"]
        results["ablations"] = context.part(
            "ablations", ["linear", "mlp", "ablations"], lambda: measure_ablations(context, target)
        )
    return results


# --- claims ---------------------------------------------------------------------------------------------------------

NAMES = {"geco": "GECO", "control": "ControlVAE", "free_bits": "free bits"}


def title(method: str) -> str:
    return NAMES.get(method) or f"capacity, gamma {method.removeprefix('capacity')}"


def log_mean(a: float, b: float) -> float:
    """Between the betas at the ends of a piece of the curve: minus its mean slope, where each nat halves the error alike.

    Under reverse water-filling with the same latents in use it is exact: R = c - a/2 log beta, D = d + a/2 beta.
    """
    return (b - a) / math.log(b / a)


def slopes(mlp: dict, split: str) -> list[tuple[float, list[float]]]:
    """Of each pair of neighbouring betas: their log-mean, and -dD/dR over it in each seed, which theory says is 1."""
    found = []
    for low, high in pairwise(mlp["betas"]):
        ratios = []
        for a, b in zip(mlp["runs"][f"fixed-{low:g}"], mlp["runs"][f"fixed-{high:g}"], strict=True):
            slope = (b[split]["distortion"] - a[split]["distortion"]) / (b[split]["rate"] - a[split]["rate"])
            ratios.append(-slope / log_mean(low, high))
        found.append((log_mean(low, high), ratios))
    return found


def mean(values) -> float:
    return float(np.mean(list(values)))


def last_part(trace: dict, steps: int, name: str) -> list[float]:
    """The windows of the last fifth of training."""
    return [value for step, value in zip(trace["step"], trace[name], strict=True) if step >= (1 - LAST) * steps]


def largest_error(trace: dict, steps: int, name: str, target: float) -> float:
    return max(abs(value / target - 1) for value in last_part(trace, steps, name))


def controlled(method: str) -> tuple[str, str]:
    """The quantity that a method holds, and the one that then follows."""
    return ("distortion", "rate") if method == "geco" else ("rate", "distortion")


def claims(results: dict) -> list[Claim]:
    of_ablations = ablation_claims(results["ablations"], results["mlp"]) if "ablations" in results else []
    return [*linear_claims(results["linear"]), *mlp_claims(results["mlp"]), *of_ablations]


def error_of(run: dict, exact: dict) -> float:
    """The larger relative error of the two coordinates."""
    return max(abs(run[name] / exact[name] - 1) for name in ("rate", "squared_error"))


def linear_claims(linear: dict) -> list[Claim]:
    made = []
    for beta, (rate, error, active) in PUBLISHED.items():
        ours = linear["published"][str(beta)]
        made.append(
            Claim(
                f"linear, closed form at beta = {beta}",
                abs(ours["rate"] - rate) < 6e-3
                and abs(ours["squared_error"] - error) < 6e-5
                and ours["active"] == active,
                f"R = {ours['rate']:.3f}, squared error {ours['squared_error']:.4f}, {ours['active']} latents",
                f"{rate:.3f}, {error:.4f}, {active}",
            )
        )

    errors = [error_of(linear["runs"][f"fixed-{b:g}"], linear["exact"][f"{b:g}"]) for b in linear["betas"]]
    made.append(
        Claim(
            "linear: training at a fixed beta ends on the exact curve",
            max(errors) < 0.01,
            f"rate and squared error at most {max(errors):.2%} off, {len(errors)} betas",
            "within 1%",
        )
    )
    for beta in linear["set_points"]:
        exact = linear["exact"][f"{beta:g}"]
        for method in ("geco", "control", *(f"capacity{gamma}" for gamma in linear["gammas"])):
            run = linear["runs"][f"{method}-{beta:g}"]
            set_point = (
                f"squared error {exact['squared_error']:.4f}" if method == "geco" else f"rate {exact['rate']:.3f}"
            )
            made.append(
                Claim(
                    f"linear: {title(method)}, told {set_point}, settles on the exact curve",
                    error_of(run, exact) < 0.01,
                    f"R = {run['rate']:.3f}, squared error {run['squared_error']:.4f}",
                    f"{exact['rate']:.3f}, {exact['squared_error']:.4f} within 1%",
                )
            )
            if run["trace"]["weight"]:
                weight = mean(last_part(run["trace"], linear["steps"], "weight"))
                made.append(
                    Claim(
                        f"linear: {title(method)}, told {set_point}, finds the weight",
                        abs(weight / beta - 1) < 0.05,
                        f"{weight:.2f}",
                        f"{beta:g} within 5%",
                    )
                )
    made.append(floor_claim("linear", linear["runs"]["free_bits"]["kl"], linear))
    return made


def floor_claim(kind: str, kl: list[float], settings: dict) -> Claim:
    floor = len(kl) * settings["free_nats"]
    return Claim(
        f"{kind}: free bits put a floor under the rate and under every latent",
        sum(kl) >= 0.95 * floor and min(kl) >= 0.9 * settings["free_nats"],
        f"rate {sum(kl):.2f}, least latent {min(kl):.3f} nats",
        f"rate >= {0.95 * floor:g}, every latent >= {0.9 * settings['free_nats']:g}",
    )


def mlp_claims(mlp: dict) -> list[Claim]:
    runs, betas, target, made = mlp["runs"], mlp["betas"], mlp["target"], []
    seeds = range(len(runs["free_bits"]))
    points = [[runs[f"fixed-{beta:g}"][seed]["test"] for beta in betas] for seed in seeds]
    ordered = all(a["rate"] > b["rate"] and a["distortion"] < b["distortion"] for p in points for a, b in pairwise(p))
    rates = [mean(p[i]["rate"] for p in points) for i in range(len(betas))]
    made.append(
        Claim(
            "MLP: the rate falls and the distortion rises with beta, in every seed",
            ordered,
            f"R = {rates[0]:.1f} to {rates[-1]:.1f} nats at beta {betas[0]:g} to {betas[-1]:g}",
            "in this order",
        )
    )
    elbos = {beta: mean(p[i]["elbo"] for p in points) for i, beta in enumerate(betas)}
    best = max(elbos, key=elbos.get)
    made.append(
        Claim(
            "MLP: the ELBO is best at beta = 1",
            elbos[1] > elbos[best] - 0.3,
            f"{elbos[1]:.2f}, best {elbos[best]:.2f} at beta = {best:g}",
            "within 0.3 nats of the best",
        )
    )
    for split in ("train", "test"):
        ratios = [mean(ratios) for _, ratios in slopes(mlp, split)]
        made.append(
            Claim(
                f"MLP: the slope of the curve is -beta, {split} images",
                all(abs(ratio - 1) < 0.25 for ratio in ratios),
                "-dD/dR over beta: " + ", ".join(f"{ratio:.2f}" for ratio in ratios),
                "1 within 25%, between each two betas",
            )
        )
    for method in ("geco", "control", *(f"capacity{gamma}" for gamma in mlp["gammas"])):
        held, _ = controlled(method)
        off = max(largest_error(run["trace"], mlp["steps"], held, target[held]) for run in runs[method])
        made.append(
            Claim(
                f"MLP: {title(method)} holds its set-point, {held} {target[held]:g}",
                off < 0.02,
                f"at most {off:.2%} off in any window",
                "within 2% over the last fifth of the steps",
            )
        )
        made.append(follows_beta(method, runs[method], mlp, f"MLP: {title(method)}"))
        if runs[method][0]["trace"]["weight"]:
            weight = mean(mean(last_part(run["trace"], mlp["steps"], "weight")) for run in runs[method])
            made.append(
                Claim(
                    f"MLP: {title(method)} finds the weight",
                    abs(weight / mlp["set_point"] - 1) < 0.25,
                    f"{weight:.3f}",
                    f"{mlp['set_point']:g} within 25%",
                )
            )
    least = min(runs["free_bits"], key=lambda run: min(run["kl"]))
    made.append(floor_claim("MLP", least["kl"], mlp))
    without = [mean(nats < 0.05 for nats in run["kl"]) for run in runs[f"fixed-{mlp['free_beta']:g}"]]
    made.append(
        Claim(
            f"MLP: without them, at the same beta = {mlp['free_beta']:g}, half the latents collapse",
            min(without) >= 0.5,
            f"{min(without):.0%} below 0.05 nats",
            "at least 50%",
        )
    )
    return made


def follows_beta(method: str, runs: list[dict], mlp: dict, name: str) -> Claim:
    """That what is not held ends where it does under the fixed weight of the set-point."""
    _, follows = controlled(method)
    there = mean(run["last_epoch"][follows] for run in runs)
    fixed = mean(run["last_epoch"][follows] for run in mlp["runs"][f"fixed-{mlp['set_point']:g}"])
    return Claim(
        f"{name} ends where beta = {mlp['set_point']:g} does",
        abs(there / fixed - 1) < 0.02,
        f"{follows} {there:.2f}",
        f"{fixed:.2f} within 2%",
    )


def ablation_claims(ablations: dict, mlp: dict) -> list[Claim]:
    """The thresholds are those that were missed."""
    chosen, error = ablations["settings"], error_of(ablations["linear"][0], ablations["exact"][0])
    geco, capacity = ablations["mlp"]
    return [
        Claim(
            f"ablation, linear: beta = {chosen['beta']:g} ends on the exact curve after {chosen['steps']} steps",
            error < 0.01,
            f"rate and squared error at most {error:.3%} off",
            "within 1%",
        ),
        follows_beta("geco", geco, mlp, f"ablation, MLP: GECO from a weight of {chosen['geco_from']} on"),
        follows_beta("capacity", capacity, mlp, f"ablation, MLP: a capacity, gamma {chosen['small_gamma']},"),
    ]


def table(results: dict) -> Table:
    linear, mlp = results["linear"], results["mlp"]
    rows = []
    controllers = ("geco", "control", *(f"capacity{gamma}" for gamma in linear["gammas"]))
    for beta in sorted({*linear["betas"], *linear["set_points"]}):
        exact = linear["exact"][f"{beta:g}"]
        there = f"{exact['rate']:.3f} / {exact['squared_error']:.4f}"
        rows_of = {f"fixed beta = {beta:g}": f"fixed-{beta:g}"} if beta in linear["betas"] else {}
        rows_of |= {title(m): f"{m}-{beta:g}" for m in controllers if beta in linear["set_points"]}
        for name, key in rows_of.items():
            run = linear["runs"][key]
            weight = run["trace"]["weight"]
            found = f"{mean(last_part(run['trace'], linear['steps'], 'weight')):.3f}" if weight else ""
            here = f"{run['rate']:.3f} / {run['squared_error']:.4f}"
            if key.startswith("fixed") and (above := nats_above(run, exact, beta)) > CONVERGED:
                here += f" (not converged: {above:.2f} nats above the optimum)"
            rows.append((f"linear: {name}", there, here, f"{beta:g}", found))
    for beta in mlp["betas"]:
        rows.append(_mlp_row(f"MLP: beta = {beta:g}", mlp["runs"][f"fixed-{beta:g}"], f"{beta:g}", ""))
    set_point = mlp["set_point"]
    for method in ("geco", "control", *(f"capacity{gamma}" for gamma in mlp["gammas"]), "free_bits"):
        runs = mlp["runs"][method]
        weight = ""
        if runs[0]["trace"]["weight"]:
            weight = spread((mean(last_part(run["trace"], mlp["steps"], "weight")) for run in runs), 3)
        expected = mlp["free_beta"] if method == "free_bits" else set_point
        rows.append(_mlp_row(f"MLP: {title(method)}", runs, f"{expected:g}", weight))
    if ablations := results.get("ablations"):
        chosen = ablations["settings"]
        of_linear = {"fixed beta": chosen["beta"], f"capacity, gamma {chosen['gamma']}": chosen["set_point"]}
        for (words, beta), *points in zip(of_linear.items(), ablations["exact"], ablations["linear"], strict=True):
            numbers = [f"{point['rate']:.3f} / {point['squared_error']:.4f}" for point in points]
            rows.append((f"ablation, linear: {words}, {chosen['steps']} steps", *numbers, f"{beta:g}", ""))
        of_mlp = (f"GECO from a weight of {chosen['geco_from']} on", f"capacity, gamma {chosen['small_gamma']}")
        for words, runs in zip(of_mlp, ablations["mlp"], strict=True):
            rows.append(_mlp_row(f"ablation, MLP: {words}", runs, f"{set_point:g}", ""))
    return Table(
        (
            "rate, nats / linear: squared error, MLP: distortion in nats on test images",
            "exact",
            "ours",
            "beta",
            "weight found",
        ),
        rows,
        "Mean ± sd over seeds",
    )


def _mlp_row(name: str, runs: list[dict], beta: str, weight: str) -> tuple[str, ...]:
    there = " / ".join(spread((run["test"][name] for run in runs), 2) for name in ("rate", "distortion"))
    return (name, "", there, beta, weight)


# --- picture --------------------------------------------------------------------------------------------------------

COLORS = {"geco": "C1", "control": "C2", "free_bits": "C4"}
DARK, GREY = "#1d2127", "#667080"


def color_of(method: str) -> str:
    return COLORS.get(method) or ("C3" if method == "capacity1000" else "C5")


def figure(results: dict):
    import matplotlib.pyplot as plt

    fig, axes = plt.subplots(2, 3, figsize=(11.5, 7.0))
    draw_linear_plane(axes[0, 0], results["linear"])
    draw_linear_course(axes[0, 1], results["linear"], "rate")
    draw_linear_course(axes[0, 2], results["linear"], "weight")
    draw_mlp_plane(axes[1, 0], results["mlp"])
    draw_mlp_course(axes[1, 1], results["mlp"])
    draw_floor(axes[1, 2], results["mlp"])
    return fig


def draw_linear_plane(ax, linear: dict) -> None:
    ax.plot(linear["curve"]["rate"], linear["curve"]["squared_error"], color=DARK, lw=1.2, label="exact")
    for beta in linear["betas"]:
        run = linear["runs"][f"fixed-{beta:g}"]
        ax.plot(
            run["rate"],
            run["squared_error"],
            "o",
            color="C0",
            ms=7,
            mfc="white",
            label="fixed beta" * (beta == linear["betas"][0]),
        )
        ax.annotate(
            f"{beta:g}", (run["rate"], run["squared_error"]), (6, 4), textcoords="offset points", fontsize=8, color="C0"
        )
    for method in ("geco", "control", *(f"capacity{gamma}" for gamma in linear["gammas"])):
        for number, beta in enumerate(linear["set_points"]):
            run = linear["runs"][f"{method}-{beta:g}"]
            marker = {"geco": "x", "control": "+"}.get(method, "1" if method == "capacity1000" else "2")
            ax.plot(
                run["rate"],
                run["squared_error"],
                marker,
                color=color_of(method),
                ms=9,
                mew=1.8,
                zorder=4,
                label=title(method) * (number == 0),
            )
    ax.set(
        xscale="log",
        yscale="log",
        xlabel="rate (nats)",
        ylabel="squared error of an image",
        title="Linear VAE: the exact curve",
    )
    ax.legend(fontsize=7.5, loc="lower left")


def draw_linear_course(ax, linear: dict, name: str) -> None:
    beta = 10 if 10 in linear["set_points"] else linear["set_points"][0]
    for method in ("geco", "control", *(f"capacity{gamma}" for gamma in linear["gammas"])):
        trace = linear["runs"][f"{method}-{beta:g}"]["trace"]
        if trace[name]:
            ax.plot(trace["step"], trace[name], color=color_of(method), lw=1.3, label=title(method))
    exact = linear["exact"][f"{beta:g}"]["rate"] if name == "rate" else beta
    ax.axhline(exact, color=DARK, lw=0.8, ls=(0, (4, 2)))
    label = f"set-point {exact:.3f}" if name == "rate" else f"beta = {beta:g} of the exact optimum"
    ax.annotate(label, (linear["steps"], exact), (0, 4), textcoords="offset points", ha="right", fontsize=8)
    ax.set(xlabel="step", ylabel="rate (nats)" if name == "rate" else "weight on the KL", yscale="log")
    ax.set_title("Linear VAE: steered to one point" if name == "rate" else "... and the weight that was found")
    ax.legend(fontsize=7.5, loc="lower right")


def draw_mlp_plane(ax, mlp: dict) -> None:
    for number, beta in enumerate(mlp["betas"]):
        points = [run["test"] for run in mlp["runs"][f"fixed-{beta:g}"]]
        rate, distortion = (mean(p[name] for p in points) for name in ("rate", "distortion"))
        reach = 1.6
        step = reach * 20 / math.hypot(1, beta * 0.7)
        ax.plot(
            [rate - step / 2, rate + step / 2],
            [distortion + beta * step / 2, distortion - beta * step / 2],
            color="#a9b2bf",
            lw=1.0,
            zorder=1,
            label="slope -beta" * (number == 0),
        )
        ax.plot(
            [p["rate"] for p in points],
            [p["distortion"] for p in points],
            "o",
            color="C0",
            ms=5,
            label="fixed beta" * (number == 0),
        )
        ax.annotate(f"{beta:g}", (rate, distortion), (5, 5), textcoords="offset points", fontsize=8, color="C0")
    for method in ("geco", "control", *(f"capacity{gamma}" for gamma in mlp["gammas"]), "free_bits"):
        points = [run["test"] for run in mlp["runs"][method]]
        marker = {"geco": "x", "control": "+", "free_bits": "s"}.get(method, "1" if method == "capacity1000" else "2")
        ax.plot(
            [p["rate"] for p in points],
            [p["distortion"] for p in points],
            marker,
            color=color_of(method),
            ms=8 if marker != "s" else 5,
            mew=1.6,
            ls="",
            label=title(method),
        )
    ax.set(xlabel="rate (nats)", ylabel="distortion (nats)", title="MLP VAE: test images")
    ax.legend(fontsize=7.5)


def draw_mlp_course(ax, mlp: dict) -> None:
    for method in ("geco", "control", *(f"capacity{gamma}" for gamma in mlp["gammas"])):
        held, _ = controlled(method)
        for number, run in enumerate(mlp["runs"][method]):
            share = np.array(run["trace"][held]) / mlp["target"][held]
            epochs = np.array(run["trace"]["step"]) / mlp["steps"]
            ax.plot(
                100 * epochs,
                share,
                color=color_of(method),
                lw=1.0,
                alpha=0.8,
                label=f"{title(method)}: {held}" * (number == 0),
            )
    ax.axhspan(0.98, 1.02, color="#dce0e6", lw=0, zorder=0)
    ax.axvline(100 * (1 - LAST), color=GREY, lw=0.8, ls=(0, (3, 2)))
    ax.set(ylim=(0.7, 1.3), xlim=(0, 100), xlabel="training (%)", ylabel="over the set-point")
    ax.set_title(f"MLP VAE: rate {mlp['target']['rate']:g}, distortion {mlp['target']['distortion']:g}")
    ax.legend(fontsize=7.5, loc="upper right")


def draw_floor(ax, mlp: dict) -> None:
    beta = mlp["free_beta"]
    place = np.arange(1, len(mlp["runs"]["free_bits"][0]["kl"]) + 1)
    shown = ((f"beta = {beta:g}", f"fixed-{beta:g}", "C0"), (f"free bits, beta = {beta:g}", "free_bits", "C4"))
    for label, key, color in shown:
        for number, run in enumerate(mlp["runs"][key]):
            ax.plot(place, run["kl"], "o-", color=color, ms=3.5, lw=1.0, label=label * (number == 0))
    ax.axhline(mlp["free_nats"], color=DARK, lw=0.8, ls=(0, (4, 2)))
    ax.annotate(
        f"floor {mlp['free_nats']:g}",
        (place[-1], mlp["free_nats"]),
        (0, -11),
        textcoords="offset points",
        ha="right",
        fontsize=8,
    )
    ax.set(xlabel="latent, by its KL", ylabel="KL (nats), test images", title="MLP VAE: free bits")
    ax.legend(fontsize=7.5)
