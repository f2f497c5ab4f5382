"""Objectives of one's own that say they can be packed, and cannot."""

import torch

from vae.objectives.elbo import BetaVAE


class DrawsGlobally(BetaVAE):
    """Noise on the loss from torch's own generator."""

    def of_pass(self, out, step):
        terms = super().of_pass(out, step)
        return {**terms, "loss": terms["loss"] * (1 + 0.1 * torch.rand(()))}


class LooksAtValues(BetaVAE):
    """A Python branch on a tensor."""

    def of_pass(self, out, step):
        return super().of_pass(out, step if out.mean_rate > 1 else step + 1)


class DrawsBySeed(BetaVAE):
    """Noise from a generator made of the batch's seed."""

    def forward(self, vae, batch, generator, step):
        noise = torch.Generator().manual_seed(int(batch.seed) % 1000)
        terms = super().forward(vae, batch, generator, step)
        return {**terms, "loss": terms["loss"] * (1 + 0.1 * torch.rand((), generator=noise))}


class Hidden:
    def __init__(self, factor):
        self.factor = factor


class HidesNumbers(BetaVAE):
    """A number that differs between runs, within an object that nobody looks into."""

    def __init__(self, factor: float = 1.0, **options):
        super().__init__(**options)
        self.hidden = Hidden(factor)

    def of_pass(self, out, step):
        terms = super().of_pass(out, step)
        return {**terms, "loss": terms["loss"] * self.hidden.factor}


class HooksTheLoss(BetaVAE):
    """A gradient that is changed on its way."""

    def forward(self, vae, batch, generator, step):
        posterior = vae.encode(batch.x, batch.y)
        z = posterior.rsample(generator)
        if z.requires_grad:
            z.register_hook(lambda gradient: 3 * gradient)
        return self.of_pass(vae.measure(batch.x, posterior, z, batch.y), step)
