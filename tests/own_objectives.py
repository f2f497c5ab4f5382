"""Objectives of one's own that say they can be packed, and cannot; and a callback of one's own."""

import pytorch_lightning as pl
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


class BranchesOnTheStep(BetaVAE):
    """Another loss from the fourth step on."""

    def of_pass(self, out, step):
        terms = super().of_pass(out, step)
        return {**terms, "loss": terms["loss"] * (3.0 if step >= 3 else 1.0)}


class NamesTheStep(BranchesOnTheStep):
    """The same, without a comparison."""

    def of_pass(self, out, step):
        terms = BetaVAE.of_pass(self, out, step)
        return {**terms, "loss": terms["loss"] * {3: 3.0, 4: 2.0}.get(step, 1.0)}


class HooksTheLoss(BetaVAE):
    """A gradient that is changed on its way."""

    def forward(self, vae, batch, generator, step):
        posterior = vae.encode(batch.x, batch.y)
        z = posterior.rsample(generator)
        if z.requires_grad:
            z.register_hook(lambda gradient: 3 * gradient)
        return self.of_pass(vae.measure(batch.x, posterior, z, batch.y), step)


class Looks(pl.Callback):
    """A callback of one's own, which is given each batch after the step on it."""

    def __init__(self):
        self.seen = SEEN.setdefault(len(SEEN), [])

    def on_train_batch_end(self, trainer, module, outputs, batch, number):
        self.seen.append((module.steps, batch.x, float(outputs["loss"])))
        module.log("own/pixels", batch.x.mean())


SEEN = {}
