"""Which measure of a first stage predicts the samples of the second: first stages of many kinds, a prior fitted to each.

A cell is a kind of latent, its size, a regulariser and a weight on the KL. Every model is measured as it is, then
sampled under N(0, I) and under priors fitted to its aggregate posterior.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import torch

from vae.engine.fitted_priors import aggregate, fit_prior, read_prior
from vae.engine.folder import read_metrics
from vae.engine.run import load
from vae.evaluation.latent import latent_quality
from vae.evaluation.reconstruction import classifier_features, reconstruction_quality
from vae.evaluation.samples import frechet_distance, model_samples
from vae.experiment import Context
from vae.experiment_figures import pack_images
from vae.model import VAE
from vae.seeding import generator

PAPER = (
    "Xu et al. 2026, Making reconstruction FID predictive of diffusion generation FID; Ghosh et al. 2020 (RAE); "
    "Dai & Wipf 2019 (two-stage VAE)"
)
CLAIM = (
    "How good samples are once a prior is fitted is not said by the reconstructions but by decoding between neighbours, "
    "and a fitted prior samples better than N(0, I), the more so the lighter the KL."
)

KINDS = {  # overrides of each kind of latent
    "quick": {
        "flat": ["network=mlp", "optimizer.lr=2e-3"],
        "map": [
            "network=autoencoder_kl",
            "network.block_out_channels=[4,8,8]",
            "network.norm_num_groups=4",
            "network.mid_block_add_attention=false",
            "optimizer.lr=2e-3",
            "trainer.max_epochs=3",
            "trainer.check_val_every_n_epoch=3",
        ],
    },
    "full": {
        "flat": ["network=resnet"],
        "map": ["network=autoencoder_kl", "network.block_out_channels=[16,32,64]"],
    },
}
SETTINGS = {
    "quick": {
        "betas": [1e-4, 1e-2, 1e-1],
        "sizes": {"flat": [8, 16, 32, 128], "map": [98]},
        "regularizers": {"flat": ["none"], "map": ["none"]},
        "seeds": [0],
        "images": 5000,
        "priors": {"gaussian": {}, "mixture": {"components": 10}},
        "kinds": KINDS["quick"],
    },
    "full": {
        "betas": [1e-5, 1e-4, 1e-3, 1e-2, 1e-1],
        "sizes": {"flat": [8, 16, 32, 64, 128], "map": [49, 98, 196]},
        "regularizers": {"flat": ["none"], "map": ["none", "equivariance", "spectrum"]},
        "seeds": [0, 1],
        "images": 10_000,
        "priors": {"gaussian": {}, "mixture": {"components": 50}, "realnvp": {"epochs": 50}},
        "kinds": KINDS["full"],
    },
}
LATENT = (  # what is kept of `latent_quality`, where it is there
    "std",
    "effective_rank",
    "skewness",
    "excess_kurtosis",
    "ks",
    "active_units",
    "equivariance_error_shift",
    "equivariance_error_rotation",
    "equivariance_error_scale",
)
SHOWN = 8  # samples in a row


def cells(settings: dict[str, Any]) -> dict[str, tuple[dict[str, Any], list[str]]]:
    """{name: (what it is, its overrides)} of every first stage."""
    found = {}
    for kind, overrides in settings["kinds"].items():
        for size in settings["sizes"][kind]:
            for regularizer in settings["regularizers"][kind]:
                for beta in settings["betas"]:
                    name = f"{kind},D={size},{regularizer},beta={beta:g}"
                    options = [f"model.latent_dim={size}", f"regularizer={regularizer}", f"objective.beta={beta:g}"]
                    of = {"kind": kind, "size": size, "regularizer": regularizer, "beta": beta}
                    found[name] = (of, [*overrides, *options])
    return found


def measure(context: Context) -> dict[str, Any]:
    settings, classifiers = context.settings, context.folder / "classifiers"
    made = cells(settings)
    folders = context.train_grid({name: overrides for name, (_, overrides) in made.items()}, settings["seeds"])
    first = next(iter(folders.values()))
    classifier_features(load(first)[1], 0, classifiers, torch.device("cpu"))  # once: the processes that measure find it
    how = partial(measure_run, classifiers, images=settings["images"], priors=settings["priors"])
    found = context.measure_grid(
        {run: partial(how, folder, pictures=run[1] == settings["seeds"][0]) for run, folder in folders.items()}
    )
    return {
        "models": [{**of, "seeds": found[name]} for name, (of, _) in made.items()],
        "priors": list(settings["priors"]),
        "images": settings["images"],
    }


@torch.no_grad()
def measure_run(
    classifiers: Path, folder: Path, images: int, priors: dict[str, dict[str, Any]], pictures: bool
) -> dict[str, Any]:
    """Measures of the first stage, and under "frechet" the distances of its samples to the test images.

    They are of N(0, I), of each fitted prior, and of the aggregate posterior: draws of q(z|x) of training images, which a
    perfect second stage would decode.
    """
    _, data, module = load(folder)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    vae: VAE = module.vae.to(device)
    seen = reconstruction_quality(vae, data, images, cache=classifiers)
    latent = latent_quality(vae, data, images, cache=classifiers)
    n, metrics = min(images, len(data.splits_ready().test)), read_metrics(folder)
    found: dict[str, Any] = {
        **{key: latent[key] for key in LATENT if key in latent},
        "mse": seen["mse"],
        "reconstruction_fd": seen[f"frechet_distance_n{n}"],
        "interpolated_fd": latent[f"interpolated_frechet_distance_n{n}"],
        "prior_fd": latent[f"prior_frechet_distance_n{n}"] / vae.latent_dim,
        "rate": metrics["test/rate"],
        "latent_dim": vae.latent_dim,
        "frechet": {},
    }
    features = classifier_features(data, 0, classifiers, device)
    real = features(data.examples("test", n).x)
    found["floor"] = frechet_distance(real, features(data.examples("train", n).x))
    z = aggregate(vae, data, "train", seed=0).z[:n].to(device)
    fake = torch.cat([vae.mean_image(part) for part in z.split(500)])
    found["frechet"]["aggregate"] = frechet_distance(real, features(fake))
    shown = {}
    own, seed = vae.prior, generator("second stage", device=device)
    for name in ("N(0, I)", *priors):
        if name != "N(0, I)":
            with torch.enable_grad():  # of a flow
                fit_prior(vae, data, folder, name, options=priors[name], resume="restart")
            vae.prior = read_prior(folder, name, vae)
        fake = model_samples(vae, n, seed, draw_pixels=False, at_a_time=500)
        found["frechet"][name] = frechet_distance(real, features(fake))
        shown[name] = pack_images(fake[:SHOWN, 0].clamp(0, 1).cpu())
        vae.prior = own
    return {**found, "pictures": shown} if pictures else found
