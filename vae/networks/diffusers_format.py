"""Weights of `network=autoencoder_kl` in the format of diffusers' `AutoencoderKL`: a config.json beside safetensors."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from vae.errors import VAEError

if TYPE_CHECKING:
    from vae.networks.autoencoder_kl import SpatialDecoder, SpatialEncoder

WEIGHTS = "diffusion_pytorch_model.safetensors"
#: Modules that stand beside encoder and decoder there, and the part of ours that they are in.
BESIDE = {"quant_conv": "encoder", "post_quant_conv": "decoder"}
#: What a config.json that leaves a setting out means.
DEFAULTS = {
    "block_out_channels": [64],
    "layers_per_block": 1,
    "norm_num_groups": 32,
    "mid_block_add_attention": True,
    "use_quant_conv": True,
}
#: What earlier versions of the format called the parts of an attention.
OLDER = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}


def state_dict(encoder: SpatialEncoder, decoder: SpatialDecoder) -> dict[str, Tensor]:
    """All weights under the names of the format."""
    ours = {
        f"{part}.{name}": value
        for part, module in (("encoder", encoder), ("decoder", decoder))
        for name, value in module.state_dict().items()
    }
    beside = {f"{part}.{name}.": f"{name}." for name, part in BESIDE.items()}
    return {_renamed(name, beside): value for name, value in ours.items()}


def architecture(encoder: SpatialEncoder, decoder: SpatialDecoder) -> dict[str, Any]:
    """What the format's config.json says of the networks."""
    widths = encoder.settings["block_out_channels"]
    return {
        "_class_name": "AutoencoderKL",
        "in_channels": encoder.conv_in.in_channels,
        "out_channels": decoder.conv_out.out_channels,
        "latent_channels": decoder.latent_shape[0],
        "down_block_types": ["DownEncoderBlock2D"] * len(widths),
        "up_block_types": ["UpDecoderBlock2D"] * len(widths),
        **encoder.settings,
        "use_post_quant_conv": encoder.settings["use_quant_conv"],
        "act_fn": "silu",
        "sample_size": max(decoder.image_shape[1:]),
    }


def load_weights(encoder: SpatialEncoder, decoder: SpatialDecoder, path: str | Path) -> None:
    """Put the weights of a folder, or of a safetensors file, into both networks.

    Raises VAEError where there are none, and for those of another architecture: which keys differ, and which settings the
    config.json beside them asks for.
    """
    path = Path(path).expanduser()
    file = path / WEIGHTS if path.is_dir() else path
    if not file.is_file():
        raise VAEError(
            f"network.weights={path}: there is no {WEIGHTS}." if path.is_dir() else f"There is no file {path}."
        )
    found, ours = _read(file), state_dict(encoder, decoder)
    if told := _differing_keys(ours, found):
        asked = _asked_for(encoder, decoder, file.parent / "config.json")
        raise VAEError(f"{file} holds weights of another architecture: {told}.{asked}")
    if told := _differing_settings(encoder, decoder, file.parent / "config.json"):
        raise VAEError(f"{file.parent / 'config.json'} describes another architecture: give {told}.")
    with torch.no_grad():
        for name, value in ours.items():
            value.copy_(found[name])


def _read(file: Path) -> dict[str, Tensor]:
    """The tensors of a file, by the names of the format as it is today."""
    try:
        from safetensors import SafetensorError
        from safetensors.torch import load_file
    except ImportError as error:
        raise VAEError("network.weights needs safetensors: pip install 'vae[export]'.") from error
    try:
        found = load_file(file)
    except (SafetensorError, OSError, ValueError) as error:
        raise VAEError(f"{file} is damaged or no safetensors file.") from error
    older = {f".attentions.0.{old}.": f".attentions.0.{new}." for old, new in OLDER.items()}
    renamed = {_renamed(name, older): value for name, value in found.items()}
    # some wrote an attention's matrices as 1x1 convolutions
    return {
        name: value.flatten(1) if ".attentions.0.to_" in name and value.ndim == 4 else value
        for name, value in renamed.items()
    }


def _renamed(name: str, table: Mapping[str, str]) -> str:
    for old, new in table.items():
        if old in name:
            return name.replace(old, new, 1)
    return name


def _differing_keys(ours: Mapping[str, Tensor], theirs: Mapping[str, Tensor], shown: int = 4) -> str:
    """In words, the keys that only one side has, or that have another shape; "" where there are none."""
    told = [f"{name} is not there" for name in ours if name not in theirs]
    told += [f"{name} has no place here" for name in theirs if name not in ours]
    told += [
        f"{name} is {tuple(theirs[name].shape)} there and {tuple(ours[name].shape)} here"
        for name in ours
        if name in theirs and theirs[name].shape != ours[name].shape
    ]
    more = f", and {len(told) - shown} more keys differ" if len(told) > shown else ""
    return ", ".join(told[:shown]) + more


def _asked_for(encoder: SpatialEncoder, decoder: SpatialDecoder, path: Path) -> str:
    settings = _differing_settings(encoder, decoder, path)
    return f" Its config.json asks for {settings}." if settings else ""


def _differing_settings(encoder: SpatialEncoder, decoder: SpatialDecoder, path: Path) -> str:
    """The settings of this project, as they are typed, that a config.json asks for and the networks do not have."""
    try:
        theirs = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return ""
    except (OSError, ValueError) as error:
        raise VAEError(f"{path} is damaged and cannot be read.") from error
    ours, asked = architecture(encoder, decoder), []
    if theirs.get("_class_name", "AutoencoderKL") != "AutoencoderKL":
        return f"weights of an AutoencoderKL, not of a {theirs['_class_name']}"
    theirs = {**DEFAULTS, **theirs}
    for name in DEFAULTS:
        if theirs[name] != ours[name]:
            asked.append(f"network.{name}={json.dumps(theirs[name]).replace(' ', '')}")
    if theirs.get("act_fn", "silu") != "silu":
        asked.append(f"weights trained with silu, not {theirs['act_fn']}")
    if theirs.get("in_channels", ours["in_channels"]) != ours["in_channels"]:
        asked.append(f"images of {theirs['in_channels']} channels, not {ours['in_channels']}")
    channels = theirs.get("latent_channels", ours["latent_channels"])
    if channels != ours["latent_channels"]:
        halvings = len(theirs["block_out_channels"]) - 1
        _, height, width = decoder.image_shape
        asked.append(f"model.latent_dim={channels * (height >> halvings) * (width >> halvings)}")
    return " ".join(asked)
