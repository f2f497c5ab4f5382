"""Priors fitted after training: RUN/priors/NAME holds weights.pt and config.json, or counts as absent."""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm

from vae.data.module import ImageDataModule
from vae.engine.assemble import require_plain_encoder
from vae.engine.callbacks.drawing import grid, to_png
from vae.engine.per_image import digest_of
from vae.errors import VAEError, choose, whole
from vae.evaluation.likelihood import ELBOTotals, nll
from vae.files import remove_leftovers, write_atomically, write_json
from vae.fitting import (
    EPOCHS,
    FLOWS,
    Aggregate,
    FullMixture,
    Whitened,
    fit_flow,
    fit_gaussian,
    fit_mixture,
    fit_vampprior,
    require_density,
)
from vae.flow_matching import FlowMatching, fit_flow_matching
from vae.model import VAE
from vae.objectives.labels import require_labels
from vae.precision import wide
from vae.priors import Prior, VampPrior
from vae.seeding import generator

_DESCENT = ("epochs", "batch_size", "lr")
#: The settings of each kind of prior, prior.NAME of `vae.fit_prior`.
KINDS: dict[str, tuple[str, ...]] = {
    "gaussian": ("covariance",),
    "mixture": ("components", "iterations"),
    "realnvp": ("layers", "hidden", *_DESCENT),
    "maf": ("layers", "hidden", *_DESCENT),
    "vampprior": ("pseudo_inputs", *_DESCENT),
    "flow_matching": ("width", "steps", *_DESCENT),
}
MEASURED = ("likelihood", "decomposition", "samples")  # what of `vae.evaluate` is there under a fitted prior
MOST_COVARYING = 4096  # latents: summing up the covariance of more over a data set takes many minutes
MOST_ESTIMATED = 1000  # draws whose density under a flow of maps is found: one takes hundreds of passes of its network
CLEAR = 3.0  # standard errors by which a prior is worse on new images than that of training, to be told so
SAMPLES = 64  # of the picture kept beside a prior


@torch.no_grad()
def aggregate(vae: VAE, data: ImageDataModule, split: str, seed: int) -> Aggregate:
    """The aggregate posterior of a split, one seeded draw of q(z|x) an image. Raises VAEError where it has no density."""
    require_density(vae.posterior)
    require_labels(vae, data, split)
    found, device = Aggregate(), next(vae.parameters()).device
    for number, batch in enumerate(data.batches(split)):
        y = batch.y.to(device) if vae.num_classes and batch.y is not None else None
        posterior = vae.encode(batch.x.to(device), y)
        found.add(posterior, posterior.rsample(generator(seed, "aggregate", split, number, device=device)))
    return found


def fit_prior(
    vae: VAE,
    data: ImageDataModule,
    folder: Path,
    kind: str,
    name: str | None = None,
    seed: int = 0,
    options: Mapping[str, Any] | None = None,
    resume: bool | str = False,
) -> dict[str, Any]:
    """Fit p(z) to the training split and keep it in `folder`/priors/NAME; returns what its config.json holds.

    log_prob: the mean log-density in nats of the training and the validation draws, and of the second under the model's own
    prior, below which a fit of too many numbers to too few images may fall: then there is a warning; of a flow of maps, over
    MOST_ESTIMATED of them. name: by default the kind. resume="restart" fits anew where there is
    one of that name, which stays while the fit runs.
    Raises VAEError for an unknown kind or option, a name in use, a model whose z is discrete or does not vary, and one that
    this kind of prior does not go with.
    """
    choose("prior", kind, KINDS)
    choose("resume", resume, (False, "restart"))
    whole("seed", seed, least=0)
    options = dict(options or {})
    for option in options:
        if option not in KINDS[kind]:
            raise VAEError(f"prior.{option} is unknown to prior={kind}: choose from {', '.join(KINDS[kind])}.")
    name = kind if name is None else name
    place = _place(folder, name)
    if (place / "config.json").exists() and resume != "restart":
        raise VAEError(f"{place} exists already: choose another name=, or fit it anew with resume=restart.")
    if kind == "vampprior":
        require_plain_encoder(vae.posterior, vae.num_classes)
    channels, epochs = _channels(vae, kind, options), whole("prior.epochs", options.get("epochs", EPOCHS), least=0)
    train, val = aggregate(vae, data, "train", seed), aggregate(vae, data, "val", seed)
    device = next(vae.parameters()).device
    with tqdm(total=epochs, unit="epoch", disable=None if "epochs" in KINDS[kind] else True, leave=False) as bar:
        prior = _fitted(vae, data, kind, train, val.z, channels, {"seed": seed, **options}, bar.update).to(device)
    scored = MOST_ESTIMATED if kind == "flow_matching" and vae.spatial else len(train.z)
    z = {split: found.z[:scored].to(device) for split, found in (("train", train), ("val", val))}
    log_prob = {split: wide(prior.log_prob(draws)) for split, draws in z.items()}
    own = wide(vae.prior.log_prob(z["val"]))
    _warn_if_worse(kind, name, log_prob["train"], log_prob["val"], own)
    config = {
        "prior": kind,
        "latent_shape": list(vae.latent_shape),
        "seed": seed,
        "options": options,
        "images": len(train.z),
        "log_prob": {
            **{split: values.mean().item() for split, values in log_prob.items()},
            "val_of_own_prior": own.mean().item(),
        },
        "weights": digest_of(vae),
    }
    picture = _samples(vae, prior, seed)
    # config.json, which makes the folder count, goes first and comes last: a kill in between leaves no prior, never a half.
    (place / "config.json").unlink(missing_ok=True)
    remove_leftovers(place)
    write_atomically(place / "weights.pt", partial(torch.save, prior.state_dict()))
    write_atomically(place / "samples.png", partial(to_png(picture).save, format="png"))
    write_json(place / "config.json", config)
    return config


def _warn_if_worse(kind: str, name: str, train: Tensor, val: Tensor, own: Tensor) -> None:
    """Warn where log p(z) of the validation draws (N,) is below `own`, that under the prior of training, by more than CLEAR
    standard errors of its mean."""
    gain = val - own
    if gain.mean() + CLEAR * gain.std(correction=0) / len(gain) ** 0.5 < 0:
        logging.getLogger(__name__).warning(
            f"The prior {name} is worse on new images than the prior of training: log p(z) of the validation draws is "
            f"{val.mean():.2f} nats, {own.mean():.2f} under the prior of training, and {train.mean():.2f} of the {len(train)} "
            "training draws, which it knows by heart."
            + (" Fit prior=gaussian, or fewer prior.components." if kind == "mixture" else "")
        )


def _channels(vae: VAE, kind: str, options: dict[str, Any]) -> int | None:
    """`channels` of `Aggregate.moments`. Raises VAEError for too many latents, or an option that does not go with them."""
    by_channel = kind == "flow_matching" and vae.spatial
    if kind == "gaussian":
        by_channel = choose("prior.covariance", options.get("covariance", "full"), ("full", "channels")) == "channels"
        if by_channel and not vae.spatial:
            raise VAEError(
                "prior.covariance=channels is for latents that are maps, and those of this run are not: choose full."
            )
    if not by_channel and kind != "vampprior" and vae.latent_dim > MOST_COVARYING:
        other = "prior=gaussian prior.covariance=channels or prior=flow_matching" if vae.spatial else "prior=vampprior"
        raise VAEError(
            f"The covariance of {vae.latent_dim} latents, which prior={kind} begins with, would be too large, and "
            f"{MOST_COVARYING} are the most: choose {other}."
        )
    return vae.latent_shape[0] if by_channel else None


def _fitted(
    vae: VAE,
    data: ImageDataModule,
    kind: str,
    train: Aggregate,
    val: Tensor,
    channels: int | None,
    options: dict[str, Any],
    tick: Callable[[], Any],
) -> Prior:
    if kind == "vampprior":
        device = next(vae.parameters()).device

        def images(n: int) -> Tensor:
            return data.random_images(n, options["seed"]).to(device)

        return fit_vampprior(train.z.to(device), vae.encoder, images, val.to(device), tick=tick, **options)
    moments = train.moments(channels)
    if kind == "gaussian":
        return fit_gaussian(*moments)
    if kind == "mixture":
        return fit_mixture(train.z, moments, **options)
    if kind == "flow_matching":
        return fit_flow_matching(train.z, moments, vae.latent_shape, val, tick=tick, **options)
    sizes = {key: options.pop(key) for key in KINDS[kind] if key in options and key not in _DESCENT}
    return fit_flow(kind, train.z, moments, val, sizes=sizes, tick=tick, **options)


def _empty(vae: VAE, kind: str, options: Mapping[str, Any], state: Mapping[str, Tensor]) -> Prior:
    """A prior of the kind, which takes this state."""
    size = vae.latent_dim
    if kind == "vampprior":
        with torch.random.fork_rng(devices=[]):
            prior = VampPrior(size, len(state["logits"]))
            prior.setup(vae.encoder, lambda n: torch.zeros_like(state["logits"]))
        return prior
    channels = state["scale"].shape[-1]
    sizes = {key: value for key, value in options.items() if key not in _DESCENT}
    if kind in FLOWS:
        return Whitened(FLOWS[kind](size, **sizes), channels)
    if kind == "flow_matching":
        return Whitened(FlowMatching(vae.latent_shape, **sizes), channels)
    return FullMixture(size, len(state["logits"]), channels)


@torch.no_grad()
def _samples(vae: VAE, prior: Prior, seed: int) -> Tensor:
    """SAMPLES images under the prior, one of each label in turn of a model that is given labels, as one picture."""
    device = next(vae.parameters()).device
    noise = generator(seed, "samples", device=device)
    y = torch.arange(SAMPLES, device=device) * vae.num_classes // SAMPLES if vae.num_classes else None
    return grid(vae.mean_image(prior.sample(SAMPLES, noise), y, noise), columns=round(SAMPLES**0.5))


def prior_names(folder: Path) -> list[str]:
    """The priors that a run's folder has, in order."""
    return sorted(path.parent.name for path in (folder / "priors").glob("*/config.json"))


def read_prior(folder: Path, name: object, vae: VAE) -> Prior:
    """The prior `folder`/priors/NAME, on the model's device. No code in its file is run.

    Raises VAEError, with the names that exist, for one that does not; for one that is damaged, of another latent shape, or
    fitted to other weights than the model's.
    """
    place = _place(folder, name)
    require_density(vae.posterior)
    known = prior_names(folder)
    if place.name not in known:
        there = f"choose one of {', '.join(known)}" if known else "there is none yet: python -m vae.fit_prior makes one"
        raise VAEError(f"fitted_prior={name} is unknown in {folder}: {there}.")
    damaged = f"{place} is damaged and cannot be read: fit it anew with resume=restart."
    try:
        config = json.loads((place / "config.json").read_text(encoding="utf-8"))
        kind, weights, options = (config[key] for key in ("prior", "weights", "options"))
        shape = tuple(config["latent_shape"])
    except Exception as error:
        raise VAEError(damaged) from error
    if shape != vae.latent_shape:
        raise VAEError(f"{place} is over latents {shape}, and those of this run are {vae.latent_shape}.")
    if weights != digest_of(vae):
        raise VAEError(f"{place} was fitted to other weights than the run has now: fit it anew with resume=restart.")
    try:
        state = torch.load(place / "weights.pt", map_location="cpu", weights_only=True)
        prior = _empty(vae, kind, options, state)
        prior.load_state_dict(state)
    except Exception as error:
        raise VAEError(damaged) from error
    device = next(vae.parameters()).device
    return prior.eval().requires_grad_(False).to(device)


@torch.no_grad()
def likelihood_under(
    vae: VAE, data: ImageDataModule, split: str, samples: int, tick: Any = lambda: None
) -> Iterator[dict[str, float]]:
    """elbo, rate, distortion and bits_per_dim, then nll_iwK with K = `samples`, under the prior that `vae` has now."""
    require_labels(vae, data, split)
    device, totals, images = next(vae.parameters()).device, ELBOTotals(), 0
    sums: dict[str, float] = {}
    given = "_given_label" if vae.latent_label else ""
    for batch in data.batches(split):
        totals.update(vae, batch._replace(x=batch.x.to(device), y=None if batch.y is None else batch.y.to(device)))
    found = totals.compute()
    yield {f"{key}{given}": found[key] for key in ("elbo", "distortion", "rate", "bits_per_dim")}
    for batch in data.batches(split) if samples else ():
        batch = batch._replace(x=batch.x.to(device), y=None if batch.y is None else batch.y.to(device))
        for key, value in nll(vae, batch, samples, tick).items():
            sums[key] = sums.get(key, 0.0) + value.double().sum().item()
        images += len(batch.x)
    if samples:
        yield {key: value / images for key, value in sums.items()}


def _place(folder: Path, name: object) -> Path:
    if not isinstance(name, str) or not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_.-]*", name):
        raise VAEError(f"The name of a prior is letters, digits, _, - and dots, not {name!r}.")
    return folder / "priors" / name
