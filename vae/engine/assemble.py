"""A model from its config and a few facts of the data: what training builds on, and all that loading a run needs.

Imports neither Hydra nor Lightning, and no image is read.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from vae.code_priors import CodePrior
from vae.errors import VAEError, whole
from vae.hierarchical import BottomDecoder
from vae.model import VAE, DiagonalFamily, PosteriorFamily
from vae.priors import Prior

MOST_LATENTS = 100_000  # beyond which a slip of the keyboard is likelier than a model


@dataclass(frozen=True)
class ImageFacts:
    """What a model's size follows from. image_shape: (C, H, W); num_classes: of the labels that encoder and decoder are
    given, 0 where they are given none; latent_label: whether the label is a latent variable too."""

    image_shape: tuple[int, int, int]
    num_classes: int = 0
    latent_label: bool = False


def assemble(
    config: Mapping[str, Any],
    facts: ImageFacts,
    images: Callable[[int], Tensor],
    make: Callable[[Any, str], Any],
) -> VAE:
    """The untrained model of a run's config; initial weights come from torch's global generator.

    images: n -> n training images (n, C, H, W) in [0, 1], for a prior that starts at some; make: a config's node with a
    `_target_`, and its group -> the object. Raises VAEError for a combination that makes no sense.
    """
    latent_dim = whole("model.latent_dim", config["model"]["latent_dim"], most=MOST_LATENTS)
    likelihood = make(config["likelihood"], "likelihood")
    family: PosteriorFamily = (
        called("posterior", make(config["posterior"], "posterior"), latent_dim=latent_dim)
        if config["posterior"]
        else DiagonalFamily(latent_dim)
    )
    encoder, decoder = called(
        "network",
        make(config["network"], "network"),
        image_shape=facts.image_shape,
        latent_dim=latent_dim,
        encoder_outputs=family.encoder_outputs,
        params_per_pixel=likelihood.params_per_pixel,
        num_classes=facts.num_classes,
    )
    prior: Prior = called("prior", make(config["prior"], "prior"), latent_dim=latent_dim)
    read_codes(prior, family)
    if prior.needs_encoder:
        require_plain_encoder(family, facts.num_classes)
    if prior.latent_dim != family.latent_dim:
        raise VAEError("A two-layer model needs both prior=two_layer and posterior=two_layer, with the same top_dim.")
    prior.setup(encoder, images)
    if prior.latent_dim != latent_dim:
        decoder = BottomDecoder(decoder, latent_dim)
    return VAE(encoder, decoder, prior, likelihood, facts.num_classes, family, facts.latent_label)


def require_plain_encoder(family: PosteriorFamily, num_classes: int) -> None:
    """Raises VAEError for a model whose encoder a prior cannot use."""
    if not (isinstance(family, DiagonalFamily) and num_classes == 0):
        raise VAEError("prior=vampprior needs posterior=diagonal and an objective that gives the encoder no labels.")


def read_codes(prior: Prior, family: PosteriorFamily) -> None:
    """Let a prior over codes know the quantizer. Raises VAEError where one of the two is of codes and the other is not."""
    if isinstance(prior, CodePrior) != family.discrete:
        over = "prior=codes_uniform, codes_categorical or codes_autoregressive"
        raise VAEError(
            f"The latents are codes, over which {type(prior).__name__} is no prior: use {over}."
            if family.discrete
            else f"{type(prior).__name__} is a prior over codes: it needs posterior=fsq or posterior=vq."
        )
    if isinstance(prior, CodePrior):
        called("prior", prior.read, family)


def without_start(config: Mapping[str, Any]) -> dict[str, Any]:
    """A run's config without the weights that its training began with: what reads its own needs no others to be there."""
    network = config["network"]
    return {**config, "network": {**network, "weights": None} if "weights" in network else network}


def called(what: str, make: Any, *arguments: Any, **sizes: Any) -> Any:
    """`make(*arguments, **sizes)`. Where a class or function of this package or of torch cannot take the options that a
    config gives it, raises VAEError that shows them; one of the user's own keeps its traceback."""
    try:
        return make(*arguments, **sizes)
    except VAEError:
        raise
    except Exception as error:
        made = getattr(make, "func", make)
        if made.__module__.partition(".")[0] not in ("vae", "torch"):
            raise
        options = getattr(make, "keywords", {})
        if made.__module__.startswith("torch."):
            options = _at_fault(made, options, arguments) or options
        shown = ", ".join(f"{what}.{key}={value}" for key, value in options.items())
        why = (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")
        raise VAEError(f"{shown or what} cannot be used: {why}.") from error


def _at_fault(made: Any, options: Mapping[str, Any], arguments: tuple[Any, ...]) -> dict[str, Any]:
    """The one of these options without which `made` can be called; none where there is none, as where two are wrong."""
    for key, value in options.items():
        with contextlib.suppress(Exception):
            made(*arguments, **{other: options[other] for other in options if other != key})
            return {key: value}
    return {}


def make_trusted(node: Mapping[str, Any], group: str = "", trust: bool = False) -> Any:
    """The object that a stored config's node describes: its `_target_` called with its other entries, or, with
    `_partial_`, waiting for more. Only this package's own classes and functions are called, unless `trust` is true.

    Raises VAEError for a target of another package that is not trusted, and for one that does not exist.
    """
    target = str(node["_target_"])
    if not (trust or target.startswith("vae.")):
        raise VAEError(
            f"The run's config names {target}, which is not part of vae: pass trust=True to let it be imported and called."
        )
    module, _, name = target.rpartition(".")
    try:
        found = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise VAEError(f"The run's config names {target}, which cannot be imported: {error}.") from error
    options = {
        key: make_trusted(value, group, trust) if isinstance(value, Mapping) and "_target_" in value else value
        for key, value in node.items()
        if key not in ("_target_", "_partial_")
    }
    return functools.partial(found, **options) if node.get("_partial_") else found(**options)
