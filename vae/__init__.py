"""Variational autoencoders: `python -m vae.train`, `vae.evaluate`, `vae.report`."""

__version__ = "0.1.0"
