"""Encoder and decoder pairs.

A builder `f(image_shape, latent_dim, encoder_outputs, params_per_pixel, num_classes, **options) -> (encoder, decoder)`,
called with keywords, gives modules
encoder: (B, C, H, W) -> (B, encoder_outputs), by default 2 * latent_dim, mean beside log-variance, and
decoder: a `Decoder`, (N, latent_dim) -> (N, P, C, H, W), P numbers per sub-pixel for the likelihood. Latents are flat here and
everywhere; a decoder for which they are a map says so by its `latent_shape`, (c, h, w). `num_classes` > 0 makes
both take labels y as a last argument: (B,) class indices, or (B, num_classes) probabilities. A decoder that says
`autoregressive = True` is given the images x too, before y, and predicts each pixel from z and the pixels before it.

A network of one's own is one more such function; ImageEncoder and ImageDecoder give it labels and the output bias.
Initial weights come from torch's global generator, as every torch module's do: seed it before building.
"""

from vae.networks.autoencoder_kl import autoencoder_kl
from vae.networks.autoregressive import made
from vae.networks.base import Decoder, ImageDecoder, ImageEncoder
from vae.networks.conv import burgess, conv
from vae.networks.mlp import linear, mlp
from vae.networks.resnet import resnet

__all__ = [
    "Decoder",
    "ImageDecoder",
    "ImageEncoder",
    "autoencoder_kl",
    "burgess",
    "conv",
    "linear",
    "made",
    "mlp",
    "resnet",
]
