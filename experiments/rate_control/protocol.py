"""How many nats the code carries: a weight on the KL, or a set-point and something that finds the weight. First on the linear
VAE, whose rate-distortion curve is known exactly, then on an MLP VAE of binarised MNIST."""

from __future__ import annotations

import logging
import math
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from vae.beta import GECO, ControlVAE, Linear
from vae.data.images import Batch
from vae.evaluation.ppca import LinearWeights, optimum, spectrum
from vae.experiment import Context, logged
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
        totals = ELBOTotals()
        for batch in data.batches(split):
            totals.update(module.vae, batch)
            if totals.images >= IMAGES:
                break
        result[split] = {name: totals.compute()[name] for name in ("rate", "distortion", "elbo")}
    result["kl"] = sorted_kl(totals.kl_per_dimension())
    metrics = read_metrics(folder)
    result["last_epoch"] = {name: metrics[f"train/{name}"] for name in ("rate", "distortion")}
    course, weights = logged(folder, "train/rate", "train/distortion"), logged(folder, "train/beta")
    weight_at = dict(zip(weights["step"], weights["train/beta"], strict=True))  # none where nothing controls it
    rows = zip(course["step"], course["train/rate"], course["train/distortion"], strict=True)
    result["trace"] = _columns(
        [[step, round(r, 4), round(d, 4), round(weight_at.get(step, math.nan), 4)] for step, r, d in rows]
    )
    return result


def train_mlps(context: Context, methods: dict[str, tuple[str, dict]]) -> dict[str, list[dict]]:
    """What was measured of each method's runs, a seed each; methods: name -> (method, target) of `mlp_overrides`."""
    settings, steps = context.settings["mlp"], mlp_steps(context)
    cells = {name: mlp_overrides(method, settings, target, steps) for name, (method, target) in methods.items()}
    folders = context.train_grid(cells, range(settings["seeds"]))
    return context.measure_grid({run: partial(measured, folder) for run, folder in folders.items()}, "mlp")


def mlp_steps(context: Context) -> int:
    from hydra import compose, initialize_config_dir

    from vae.cli import CONFIGS

    with initialize_config_dir(CONFIGS, version_base="1.3"):
        config = compose("train", [context.config])
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
