"""Priors fitted after training: RUN/priors/NAME holds weights.pt and config.json, or counts as absent."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from tqdm.auto import tqdm

from vae.data.module import ImageDataModule
from vae.errors import VAEError, choose, whole
from vae.evaluation.likelihood import ELBOTotals, nll
from vae.files import write_atomically, write_json
from vae.fitting import Aggregate, FullMixture, WhitenedFlow, fit_gaussian, fit_mixture, fit_realnvp
from vae.model import VAE
from vae.objectives.labels import require_labels
from vae.priors import Prior
from vae.seeding import generator

KINDS = ("gaussian", "mixture", "realnvp")
OPTIONS = {"mixture": ("components", "iterations"), "realnvp": ("layers", "hidden", "epochs", "batch_size", "lr")}
MEASURED = ("likelihood", "samples")  # what of `vae.evaluate` is there under a fitted prior


@torch.no_grad()
def aggregate(vae: VAE, data: ImageDataModule, split: str, seed: int) -> Aggregate:
    """The aggregate posterior of a split, one seeded draw of q(z|x) an image."""
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
    prior. name: by default the kind. resume="restart" fits anew where there is one of that name.
    Raises VAEError for an unknown kind or option, a name in use, a model whose z is discrete or does not vary.
    """
    choose("prior", kind, KINDS)
    choose("resume", resume, (False, "restart"))
    whole("seed", seed, least=0)
    options = dict(options or {})
    for option in options:
        if option not in (known := OPTIONS.get(kind, ())):
            there = f"choose from {', '.join(known)}" if known else "it has no settings"
            raise VAEError(f"prior.{option} is unknown to prior={kind}: {there}.")
    name = kind if name is None else name
    place = _place(folder, name)
    if (place / "config.json").exists() and resume != "restart":
        raise VAEError(f"{place} exists already: choose another name=, or fit it anew with resume=restart.")
    train, val = aggregate(vae, data, "train", seed), aggregate(vae, data, "val", seed)
    if kind == "gaussian":
        prior: Prior = fit_gaussian(*train.moments())
    elif kind == "mixture":
        prior = fit_mixture(train.z, train.moments(), seed=seed, **options)
    else:
        with tqdm(total=options.get("epochs", 50), unit="epoch", disable=None, leave=False) as bar:
            prior = fit_realnvp(train.z, train.moments(), val.z, seed=seed, tick=bar.update, **options)
    own = vae.prior.log_prob(val.z.to(next(vae.parameters()).device)).mean().item()
    log_prob = {"train": prior.log_prob(train.z).mean().item(), "val": prior.log_prob(val.z).mean().item()}
    config = {
        "prior": kind,
        "latent_dim": vae.latent_dim,
        "seed": seed,
        "options": options,
        "images": len(train.z),
        "log_prob": {**log_prob, "val_of_own_prior": own},
        "weights": weights_digest(vae),
    }
    # config.json, which makes the folder count, goes first and comes last: a kill in between leaves no prior, never a half.
    (place / "config.json").unlink(missing_ok=True)
    write_atomically(place / "weights.pt", partial(torch.save, prior.state_dict()))
    write_json(place / "config.json", config)
    return config


def read_prior(folder: Path, name: object, vae: VAE) -> Prior:
    """The prior `folder`/priors/NAME, on the model's device. No code in its file is run.

    Raises VAEError, with the names that exist, for one that does not; for one that is damaged, of another latent size, or
    fitted to other weights than the model's.
    """
    place = _place(folder, name)
    known = sorted(path.parent.name for path in (folder / "priors").glob("*/config.json"))
    if place.name not in known:
        there = f"choose one of {', '.join(known)}" if known else "there is none yet: python -m vae.fit_prior makes one"
        raise VAEError(f"fitted_prior={name} is unknown in {folder}: {there}.")
    try:
        config = json.loads((place / "config.json").read_text(encoding="utf-8"))
        state = torch.load(place / "weights.pt", map_location="cpu", weights_only=True)
        kind, size, weights, options = (config[key] for key in ("prior", "latent_dim", "weights", "options"))
        sizes = {key: options[key] for key in ("layers", "hidden") if key in options}
        prior: Prior = WhitenedFlow(size, **sizes) if kind == "realnvp" else FullMixture(size, len(state["logits"]))
        prior.load_state_dict(state)
    except Exception as error:
        raise VAEError(f"{place} is damaged and cannot be read: fit it anew with resume=restart.") from error
    if size != vae.latent_dim:
        raise VAEError(f"{place} is over {size} latents, and those of this run are {vae.latent_dim}.")
    if weights != weights_digest(vae):
        raise VAEError(f"{place} was fitted to other weights than the run has now: fit it anew with resume=restart.")
    device = next(vae.parameters()).device
    return prior.eval().requires_grad_(False).to(device)


def weights_digest(vae: VAE) -> str:
    """A digest of the model's weights, by which a prior knows the ones that it was fitted to."""
    digest = hashlib.blake2b(digest_size=16)
    for name, value in sorted(vae.state_dict().items()):
        digest.update(f"{name} {tuple(value.shape)} ".encode())
        digest.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


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
