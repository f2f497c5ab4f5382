"""A trained model on its own: safetensors and a config that `vae.load` reads, a card, and programs for other runtimes."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import vae
from vae.engine.latents import Moments
from vae.engine.loading import LoadedRun
from vae.errors import VAEError
from vae.files import new_folder, write_atomically, write_text
from vae.likelihoods import LocationScale
from vae.networks.autoencoder_kl import SpatialDecoder, SpatialEncoder
from vae.networks.diffusers_format import WEIGHTS, architecture, state_dict

FORMATS = ("safetensors", "torch_export", "onnx", "diffusers")
SCALED_BY = 2000  # images, of whose latents diffusers' scaling_factor is the inverse standard deviation
#: The parts of a run's config that its model is assembled from.
PARTS = ("model", "network", "likelihood", "prior", "posterior")


class EncoderProgram(nn.Module):
    """Images (B, C, H, W) [, labels] -> what the posterior family is given, (B, encoder_outputs): for a diagonal Gaussian mean
    and log-variance side by side."""

    def __init__(self, model: vae.VAE) -> None:
        super().__init__()
        self.encoder = model.encoder

    def forward(self, x: Tensor, y: Tensor | None = None) -> Tensor:
        return self.encoder(x) if y is None else self.encoder(x, y)


class DecoderProgram(nn.Module):
    """Latents (B, D) [, labels] -> mean images (B, C, H, W), cut to [0, 1] as those of `vae.load` are."""

    def __init__(self, model: vae.VAE) -> None:
        super().__init__()
        self.model = model

    def forward(self, z: Tensor, y: Tensor | None = None) -> Tensor:
        return self.model.mean_image(z, y).clamp(0, 1)


def export(run: LoadedRun, out: Path, form: str = "safetensors", licence: str | None = None) -> list[str]:
    """Write a model into a new folder and return the names of its files. Raises VAEError where the folder is not empty, a
    package is missing, or the model is not one program (an autoregressive decoder draws pixel by pixel)."""
    new_folder("out", out)
    if form != "safetensors" and run.vae.autoregressive:
        raise VAEError(f"format={form} needs a decoder that makes an image in one pass: this one is autoregressive.")
    try:
        from safetensors.torch import save
    except ImportError as error:
        raise VAEError("Exporting needs safetensors: pip install 'vae[export]'.") from error
    if form == "diffusers":
        return _diffusers(run, out, licence, save)
    if form == "onnx":
        _needed_for_onnx()
    out.mkdir(parents=True, exist_ok=True)
    weights = {name: value.contiguous().clone() for name, value in run.vae.state_dict().items()}
    write_atomically(out / "model.safetensors", lambda file: file.write(save(weights)))
    config = {key: run.config.get(key) for key in PARTS}
    card = {"vae": vae.__version__, "config": config, "facts": run.facts, "metrics": run.metrics}
    write_text(out / "config.json", json.dumps(card, indent=2) + "\n")
    write_text(out / "README.md", model_card(run, licence))
    names = ["model.safetensors", "config.json", "README.md"]
    return names + {"safetensors": lambda *_: [], "torch_export": _torch_export, "onnx": _onnx}[form](run, out)


HOW_LOADED = "import vae\n\nrun = vae.load(FOLDER)\nimages = run.sample(16, seed=0)\n"


def model_card(run: LoadedRun, licence: str | None, how_loaded: str = HOW_LOADED) -> str:
    """What the model is, how it was trained and measured, and how it is loaded, as Markdown."""
    facts, config = run.facts, run.config
    kept = ("elbo", "rate", "distortion", "bits_per_dim", "active_units")
    numbers = {
        k: v for k, v in run.metrics.items() if k.startswith("test/") and (k[5:] in kept or k[5:].startswith("nll"))
    }
    rows = "".join(f"| {name.removeprefix('test/')} | {value:.4f} |\n" for name, value in numbers.items())
    settings = {
        "data": facts.get("data", "not recorded"),
        "image shape": tuple(facts["image_shape"]),
        "latent size": run.vae.latent_dim if len(run.latent_shape) == 1 else run.latent_shape,
        "network": config["network"]["_target_"],
        "weights": facts.get("weights", "as trained"),
        "likelihood": config["likelihood"]["_target_"],
        "prior": config["prior"]["_target_"],
        "objective": (config.get("objective") or {}).get("_target_", "not recorded"),
        "beta": (config.get("objective") or {}).get("beta", "not recorded"),
        "seed": config.get("seed", "not recorded"),
    }
    described = "".join(f"| {name} | {value} |\n" for name, value in settings.items())
    return (
        f"---\nlibrary_name: vae\nlicense: {licence or 'unknown'}\ntags: [variational-autoencoder]\n---\n\n"
        f"# A variational autoencoder of {settings['data']}\n\n| setting | value |\n|---|---|\n{described}\n"
        f"Measured on the test split, in nats per image unless said otherwise:\n\n| metric | value |\n|---|---|\n{rows}\n"
        f"```python\n{how_loaded}```\n"
    )


def _programs(run: LoadedRun) -> dict[str, tuple[nn.Module, tuple[Tensor, ...]]]:
    """Encoder and decoder, each with example inputs of two images."""
    labels = (torch.zeros(2, dtype=torch.long),) if run.vae.num_classes else ()
    return {
        "encoder": (EncoderProgram(run.vae).eval(), (torch.full((2, *run.image_shape), 0.5), *labels)),
        "decoder": (DecoderProgram(run.vae).eval(), (torch.zeros(2, run.vae.latent_dim), *labels)),
    }


def _any_batch(inputs: tuple[Tensor, ...]) -> tuple[dict[int, Any], ...]:
    """The same size of the first dimension of all inputs, whatever it is."""
    batch = torch.export.Dim("batch")
    return tuple({0: batch} for _ in inputs)


def _torch_export(run: LoadedRun, out: Path) -> list[str]:
    names = []
    for name, (program, inputs) in _programs(run).items():
        torch.export.save(torch.export.export(program, inputs, dynamic_shapes=_any_batch(inputs)), out / f"{name}.pt2")
        names.append(f"{name}.pt2")
    return names


def _needed_for_onnx() -> None:
    if tuple(map(int, torch.__version__.split(".")[:2])) < (2, 6):  # which export no program for batches of any size
        raise VAEError(f"format=onnx needs torch 2.6 or newer, and this is {torch.__version__}.")
    try:
        import onnx  # noqa: F401
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise VAEError("format=onnx needs onnx and onnxscript: pip install 'vae[onnx]'.") from error


def _onnx(run: LoadedRun, out: Path) -> list[str]:
    names = []
    for name, (program, inputs) in _programs(run).items():
        outputs = {"encoder": "parameters", "decoder": "images"}[name]
        first = {"encoder": "images", "decoder": "latents"}[name]
        with warnings.catch_warnings():  # one batch of labels and images, which is what is meant
            warnings.filterwarnings("ignore", message="# The axis name: batch will not be used")
            torch.onnx.export(
                program,
                inputs,
                str(out / f"{name}.onnx"),
                dynamo=True,
                input_names=[first, *["labels"][: len(inputs) - 1]],
                output_names=[outputs],
                dynamic_shapes=_any_batch(inputs),
                external_data=False,
                verbose=False,
            )
        names.append(f"{name}.onnx")
    return names


def _diffusers(run: LoadedRun, out: Path, licence: str | None, save: Any) -> list[str]:
    """The networks alone, as diffusers' `AutoencoderKL` reads them."""
    encoder, decoder = run.vae.encoder, run.vae.decoder
    if not (isinstance(encoder, SpatialEncoder) and isinstance(decoder, SpatialDecoder)):
        raise VAEError("format=diffusers is for network=autoencoder_kl, and this run has another network.")
    if run.vae.discrete:
        raise VAEError("format=diffusers needs posterior=diagonal, and the latents of this run are codes.")
    likelihood = run.vae.likelihood
    if run.vae.num_classes or not (isinstance(likelihood, LocationScale) and likelihood.params_per_pixel == 1):
        raise VAEError(
            "format=diffusers needs a decoder that is given no labels and gives the mean image itself, as with "
            "likelihood=gaussian, gaussian_learned, gaussian_optimal, laplace or laplace_learned."
        )
    try:
        x = run.data.examples("train", SCALED_BY).x
    except VAEError:  # an exported model, or data that are not here
        scale, scaled = 1.0, "scaling_factor is 1: the data were not there to measure the latents on"
    else:
        moments = Moments(run.vae.latent_dim, (1, 1, run.vae.latent_dim))  # as one channel
        for part in x.split(250):
            posterior: Any = run.encode(part)
            moments.add(posterior.mean, posterior.log_var.exp())
        scale = 1 / float(moments.compute()["channel_std"][0])
        scaled = f"scaling_factor is 1 over the standard deviation of the latents of {len(x)} training images"
    out.mkdir(parents=True, exist_ok=True)
    weights = {name: value.contiguous().clone() for name, value in state_dict(encoder, decoder).items()}
    write_atomically(out / WEIGHTS, lambda file: file.write(save(weights, {"format": "pt"})))
    config = {**architecture(encoder, decoder), "scaling_factor": scale}
    write_text(out / "config.json", json.dumps(config, indent=2) + "\n")
    loaded = "from diffusers import AutoencoderKL\n\nautoencoder = AutoencoderKL.from_pretrained(FOLDER)\n"
    loaded += "latents = autoencoder.encode(2 * images - 1).latent_dist.sample() * autoencoder.config.scaling_factor\n"
    loaded += "decoded = autoencoder.decode(latents / autoencoder.config.scaling_factor).sample\n"
    loaded += "images = ((decoded + 1) / 2).clamp(0, 1)\n"
    card = model_card(run, licence, loaded) + f"\nImages lie in [0, 1] here, and in [-1, 1] there; {scaled}.\n"
    write_text(out / "README.md", card)
    return [WEIGHTS, "config.json", "README.md"]
