"""Made-up weights in the format in which those of AlexNet and LPIPS are published."""

from __future__ import annotations

import torch

from vae.evaluation.lpips import NETWORKS


def publish(folder, network="alex", seed=0):
    """Both files of a network, with random weights; linear ones are not negative, as the published are."""
    noise = torch.Generator().manual_seed(seed)
    published = NETWORKS[network]
    backbone, linear, number, inputs = {}, {}, 0, 3
    for block, convolutions in enumerate(published.blocks):
        number += block in published.pooled
        for outputs, kernel, _, _ in convolutions:
            fan = inputs * kernel**2
            weight = torch.randn(outputs, inputs, kernel, kernel, generator=noise) * (2 / fan) ** 0.5
            backbone[f"features.{number}.weight"] = weight
            backbone[f"features.{number}.bias"] = 0.1 * torch.randn(outputs, generator=noise)
            number, inputs = number + 2, outputs
        linear[f"lin{block}.model.1.weight"] = torch.rand(1, inputs, 1, 1, generator=noise)
    backbone["classifier.6.bias"] = torch.zeros(1000)  # of what is not used
    folder.mkdir(exist_ok=True)
    torch.save(backbone, folder / published.backbone)
    torch.save(linear, folder / published.linear)
    return folder
