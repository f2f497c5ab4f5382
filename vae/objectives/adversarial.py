"""The loss of the first stage of latent diffusion: a VAE's, and a discriminator of patches that judges its reconstructions.

Esser et al. 2021 (VQGAN), Rombach et al. 2022. The discriminator is trained inside the objective, as in `FactorVAE`.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vae import ranks
from vae.errors import VAEError, choose, whole
from vae.model import VAE, VAEOutput
from vae.networks.base import checked_widths
from vae.objectives.elbo import Objective, require_not_negative
from vae.precision import full_precision

if TYPE_CHECKING:
    from vae.data.images import Batch
    from vae.data.module import ImageDataModule

GANS = ("hinge", "non_saturating")
#: Penalties and the weight that each has in its paper.
PENALTIES = {"none": None, "r1": 10.0, "lecam": 0.3}


# --- the discriminator ------------------------------------------------------------------------------------------------


def patch_discriminator(image_shape: tuple[int, int, int], channels: Sequence[int]) -> nn.Sequential:
    """(B, C, H, W) -> the logit that each patch is of a real image, (B, 1, h, w); Isola et al. 2017, appendix 6.1.2.

    4x4 convolutions with these channels and leaky ReLU of slope 0.2, all but the last of stride 2, then one to a logit:
    [64, 128] sees patches of 16x16 pixels, [64, 128, 256] of 34x34, [64, 128, 256, 512] of 70x70. All but the first are
    normalised, here by GroupNorm with one group: batch normalisation would judge an image by the others of its batch.
    Weights start at N(0, 0.02), those of the norms at N(1, 0.02), biases at 0.

    Raises VAEError for no channels, and for images that cannot be halved so often.
    """
    widths = checked_widths(channels, "objective.channels")
    least = 3 * 2 ** (len(widths) - 1)
    if not widths:
        raise VAEError("objective.channels needs at least one width.")
    if min(image_shape[1:]) < least:
        raise VAEError(
            f"objective.channels={list(widths)} has {len(widths)} widths, which take images of at least {least}x{least} "
            f"pixels, not {image_shape[1]}x{image_shape[2]}: give it fewer."
        )
    layers: list[nn.Module] = []
    for i, (inputs, outputs) in enumerate(pairwise((image_shape[0], *widths))):
        layers.append(nn.Conv2d(inputs, outputs, 4, stride=2 if i < len(widths) - 1 else 1, padding=1))
        layers += [nn.GroupNorm(1, outputs)] if i else []
        layers.append(nn.LeakyReLU(0.2))
    layers.append(nn.Conv2d(widths[-1], 1, 4, padding=1))
    net = nn.Sequential(*layers)
    for name, parameter in net.named_parameters():
        if name.endswith("bias"):
            nn.init.zeros_(parameter)
        else:
            nn.init.normal_(parameter, float(parameter.ndim == 1), 0.02)
    return net


def discriminator_loss(real: Tensor, fake: Tensor, gan: str) -> Tensor:
    """What the discriminator minimises, 0-dim: the mean of its losses on logits of real images and of reconstructions.

    hinge: max(0, 1 - real), max(0, 1 + fake); 1 at logits of 0. non_saturating: the cross-entropy in nats (Goodfellow et
    al. 2014); log 2 at logits of 0.
    """
    if gan == "hinge":
        return 0.5 * (F.relu(1 - real).mean() + F.relu(1 + fake).mean())
    return 0.5 * (F.softplus(-real).mean() + F.softplus(fake).mean())


def generator_loss(fake: Tensor, gan: str) -> Tensor:
    """What the VAE minimises of the logits of its reconstructions, 0-dim: -fake (hinge), -log sigmoid(fake) otherwise."""
    return -fake.mean() if gan == "hinge" else F.softplus(-fake).mean()


def r1(logits: Tensor, x: Tensor) -> Tensor:
    """|grad D(x)|^2, its mean over images, 0-dim; D(x) is the mean logit of an image's patches, x (B, C, H, W) in [0, 1].

    Mescheder et al. 2018, equation 9, without its gamma / 2.
    """
    with torch.autocast(x.device.type, enabled=False):  # or a backward pass is narrower than its forward pass
        (gradient,) = torch.autograd.grad(logits.flatten(1).mean(1).sum(), x, create_graph=True)
    return gradient.square().flatten(1).sum(1).mean()


def lecam(real: Tensor, fake: Tensor, average_real: Tensor, average_fake: Tensor) -> Tensor:
    """Mean of max(0, real - average_fake)^2 plus mean of max(0, average_real - fake)^2, 0-dim.

    Tseng et al. 2021, with the positive parts that their code takes.
    """
    return F.relu(real - average_fake).square().mean() + F.relu(average_real - fake).square().mean()


# --- the weight -------------------------------------------------------------------------------------------------------


def last_layer(vae: VAE) -> str | None:
    """The name in `vae.decoder` of the trained matrix or kernel nearest to its output; None if there is none.

    Nearest by the steps from the output back, whatever the decoder is made of: a convolution, a dense or a masked layer.
    """
    names = {id(p): name for name, p in vae.decoder.named_parameters() if p.ndim > 1 and not name.endswith("bias")}
    if not names:
        return None
    like, training = next(vae.decoder.parameters()), vae.training
    z, x = (like.new_zeros(1, *shape) for shape in ((vae.latent_dim,), vae.decoder.image_shape))
    with torch.enable_grad():
        params = vae.eval().decode(z, x=x)
    vae.train(training)
    waiting, seen = [params.grad_fn], set()
    for node in waiting:
        if (name := names.get(id(getattr(node, "variable", None)))) is not None:
            return name
        if node is not None and node not in seen:
            seen.add(node)
            waiting += [before for before, _ in node.next_functions]
    return None


def gradient_ratio(reconstruction: Tensor, adversarial: Tensor, layer: Tensor) -> Tensor:
    """|grad of the one loss| / (|grad of the other| + 1e-4), at a layer's weights, between 0 and 10,000; 0-dim, detached.

    Esser et al. 2021, equation 7, with the constants of their code; the paper has 1e-6, and no bound.
    """
    norms = []
    for loss in (reconstruction, adversarial):
        with torch.autocast(layer.device.type, enabled=False):
            (gradient,) = torch.autograd.grad(loss, layer, retain_graph=True)
        if ranks.are_sharing():  # the norm is of the mean, and not the mean of norms
            ranks.average([gradient])
        norms.append(torch.linalg.vector_norm(gradient))
    return (norms[0] / (norms[1] + 1e-4)).clamp(max=1e4)


class Adversarial(Objective):
    """distortion + beta rate + lambda G, with G how badly reconstructions pass for real patches; Rombach et al. 2022.

    A discriminator tells the images of the batch, in [0, 1], from their reconstructions, the likelihood's mean images, which
    are not cut to it; of an autoregressive decoder a pixel's mean is that given the real ones before it. One backward pass
    trains both from one pass through the model (the published code takes turns): G sees the discriminator's parameters
    detached, the discriminator's loss sees the reconstructions detached, and its value is left out of "loss", which is the
    VAE's alone.

    gan: "hinge" or "non_saturating", see `discriminator_loss` and `generator_loss`. G is a mean over images and patches,
    whereas distortion and rate are sums over sub-pixels and latents, in nats per image.
    adaptive: lambda = weight |grad distortion| / |grad G|, both at the decoder's last layer, see `gradient_ratio`. It takes up
    the scale of the distortion, so that published weights hold as they are: 0.5 of Rombach et al., 0.8 of Esser et al. False:
    lambda = weight, in nats per image; one published beside a mean over sub-pixels is C H W times as much here.
    start_step: so many batches are trained on first with lambda and the discriminator's loss both times 0, as in the published
    code (50,001 there). Its optimiser counts these steps all the same.
    penalty, added to the discriminator's loss: "r1", penalty_weight / 2 times `r1`; "lecam", penalty_weight times `lecam`, with
    averages of decay 0.99 without the bias of their start; None takes the paper's weight, 10 or 0.3. The discriminator's loss
    is the mean of its two halves, which in both papers are added up: beside it a penalty weighs twice what it does there.

    Terms: generator_loss (G), adversarial_weight (lambda), discriminator_loss without its penalty, logits_real, logits_fake,
    and in training penalty. Outside training lambda is that of the last step, and the discriminator has always started; the
    loss moves with the discriminator (`loss_moves`), so that the last weights are tested.

    Raises VAEError for options out of range, binary draws of grey images, images that are too small, and where `adaptive`
    finds no last layer.
    """

    LECAM_DECAY = 0.99

    loss_moves = "the discriminator that judges the reconstructions is another each epoch"
    of_whole_batches = True  # norms of gradients are larger in a smaller batch
    unpackable = "its discriminator has an optimiser's options of its own"
    unaccumulable = "weighs its discriminator by the gradient of one batch, and trains both at each"
    adversarial_weight: Tensor
    penalty_weight: Tensor
    last_weight: Tensor
    lecam_averages: Tensor
    lecam_steps: Tensor

    def __init__(
        self,
        weight: float = 0.5,
        adaptive: bool = True,
        gan: str = "hinge",
        start_step: int = 0,
        penalty: str = "none",
        penalty_weight: float | None = None,
        channels: Sequence[int] = (64, 128),
        discriminator_lr: float = 1e-4,
        discriminator_betas: Sequence[float] = (0.5, 0.9),
        beta: float = 1.0,
        schedule: nn.Module | None = None,
    ) -> None:
        super().__init__(beta, schedule)
        self.gan, self.adaptive = choose("objective.gan", gan, GANS), adaptive
        self.start_step = whole("objective.start_step", start_step, least=0)
        self.penalty = choose("objective.penalty", penalty, PENALTIES)
        if penalty == "none" and penalty_weight is not None:
            raise VAEError(
                f"objective.penalty_weight={penalty_weight} weighs nothing with objective.penalty=none: choose r1 or lecam."
            )
        penalty_weight = PENALTIES[penalty] if penalty_weight is None else penalty_weight
        require_not_negative(
            "objective", weight=weight, penalty_weight=penalty_weight or 0.0, discriminator_lr=discriminator_lr
        )
        if len(discriminator_betas) != 2 or not all(0 <= b < 1 for b in discriminator_betas):
            raise VAEError(f"objective.discriminator_betas={list(discriminator_betas)} must be two numbers in [0, 1).")
        self.register_buffer("adversarial_weight", torch.tensor(float(weight)))
        self.register_buffer("penalty_weight", torch.tensor(float(penalty_weight or 0.0)))
        self.register_buffer("last_weight", torch.tensor(0.0))  # lambda
        self.register_buffer("lecam_averages", torch.zeros(2))  # of the logits of real images and of reconstructions
        self.register_buffer("lecam_steps", torch.tensor(0.0))
        self.channels = tuple(channels)
        self.optimizer_options = {"lr": discriminator_lr, "betas": tuple(discriminator_betas)}
        self.last_layer: str | None = None

    def setup(self, vae: VAE, data: ImageDataModule | None = None) -> None:
        if data is not None and data.binarize in ("static", "dynamic"):
            raise VAEError(
                f"data.binarize={data.binarize} draws binary pixels, which a discriminator tells from mean images whatever "
                "these are: objective=adversarial takes data.binarize=none."
            )
        self.last_layer = last_layer(vae) if self.adaptive else None
        if self.adaptive and self.last_layer is None:
            raise VAEError(
                f"objective.adaptive=true takes gradients at the decoder's last layer, and {type(vae.decoder).__name__} has no "
                "matrix or kernel that is trained: use objective.adaptive=false."
            )
        self.discriminator = patch_discriminator(vae.decoder.image_shape, self.channels)

    def forward(self, vae: VAE, batch: Batch, generator: torch.Generator, step: int) -> dict[str, Tensor]:
        out = vae(batch.x, generator, batch.y)
        image = vae.likelihood.mean(out.params)
        beta, started = self.weight(step), float(step >= self.start_step or not self.training)

        fixed = {name: parameter.detach() for name, parameter in self.discriminator.named_parameters()}
        passed = generator_loss(full_precision(torch.func.functional_call(self.discriminator, fixed, image)), self.gan)
        weight = started * self.relative_weight(vae, out, passed) if self.training else self.last_weight
        loss = out.mean_distortion + beta * out.mean_rate + weight * passed

        own, terms = self.of_discriminator(batch.x, image.detach(), started)
        if self.training:
            self.last_weight.copy_(weight)
        return self.named_terms(
            loss + own - own.detach(),
            out,
            generator_loss=passed.detach(),
            adversarial_weight=weight.detach(),
            beta=beta,
            **terms,
        )

    def relative_weight(self, vae: VAE, out: VAEOutput, passed: Tensor) -> Tensor:
        """lambda once the discriminator has started, 0-dim."""
        if self.last_layer is None:
            return self.adversarial_weight.clone()
        layer = vae.decoder.get_parameter(self.last_layer)
        return self.adversarial_weight * gradient_ratio(out.mean_distortion, passed, layer)

    def of_discriminator(self, real: Tensor, fake: Tensor, started: float) -> tuple[Tensor, dict[str, Tensor]]:
        """What the discriminator minimises, of images and their reconstructions (B, C, H, W), 0-dim, and its terms."""
        x = real.detach().requires_grad_() if self.training and self.penalty == "r1" else real
        of_real, of_fake = (full_precision(self.discriminator(images)) for images in (x, fake))
        own = started * discriminator_loss(of_real, of_fake, self.gan)
        terms = {"discriminator_loss": own, "logits_real": of_real.mean(), "logits_fake": of_fake.mean()}
        if self.training and self.penalty != "none":
            terms["penalty"] = started * self.penalty_of(x, of_real, of_fake)
            own = own + terms["penalty"]
        return own, {name: value.detach() for name, value in terms.items()}

    def penalty_of(self, x: Tensor, of_real: Tensor, of_fake: Tensor) -> Tensor:
        """The weighted penalty of a training step, 0-dim; LeCam's averages move on first, as in the authors' code."""
        if self.penalty == "r1":
            return 0.5 * self.penalty_weight * r1(of_real, x)
        self.lecam_steps += 1
        now = torch.stack([of_real.mean(), of_fake.mean()]).detach().to(self.lecam_averages)
        rate = (1 - self.LECAM_DECAY) / (1 - self.LECAM_DECAY**self.lecam_steps)
        self.lecam_averages.lerp_(now, rate)
        return self.penalty_weight * lecam(of_real, of_fake, *self.lecam_averages.clone())
