"""Variational autoencoders, exactly.

    run = vae.load("runs/digits/...")        a trained run: run.sample(16), run.encode(x), run.metrics
    table = vae.runs("runs/sweep-digits/...")   a sweep as a pandas DataFrame

and the parts to build with: `vae.VAE`, `vae.DiagonalGaussian`, `vae.Batch`, `vae.generator`, `vae.VAEError`, the modules
`vae.kl`, `vae.beta`, `vae.objectives`, `vae.likelihoods`, `vae.priors`, `vae.networks`. On the command line:
`python -m vae.train`, `vae.evaluate`, `vae.report`, `vae.reproduce`. Nothing heavy is imported before it is used.
"""

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from vae import beta as beta
    from vae import kl as kl
    from vae import likelihoods as likelihoods
    from vae import networks as networks
    from vae import objectives as objectives
    from vae import priors as priors
    from vae.data.images import Batch as Batch
    from vae.engine.loading import LoadedRun as LoadedRun
    from vae.engine.loading import load as load
    from vae.errors import VAEError as VAEError
    from vae.gaussian import DiagonalGaussian as DiagonalGaussian
    from vae.model import VAE as VAE
    from vae.report.frame import runs as runs
    from vae.seeding import generator as generator

_WHERE = {
    "Batch": "vae.data.images",
    "DiagonalGaussian": "vae.gaussian",
    "LoadedRun": "vae.engine.loading",
    "VAE": "vae.model",
    "VAEError": "vae.errors",
    "generator": "vae.seeding",
    "load": "vae.engine.loading",
    "runs": "vae.report.frame",
}
_MODULES = ("beta", "kl", "likelihoods", "networks", "objectives", "priors")

__all__ = [*_WHERE, *_MODULES]


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return importlib.import_module(f"vae.{name}")
    if name in _WHERE:
        return getattr(importlib.import_module(_WHERE[name]), name)
    raise AttributeError(f"module 'vae' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
