"""Normalizing flows: invertible maps with a known log-determinant, as posteriors q(z|x) and inside a prior.

A step maps `step(z) -> (z', log_det)` with log_det = log|det dz'/dz|, and `step.inverse(z') -> (z, log_det)` undoes it
and gives the log-determinant of the forward map at z. Shapes: z (..., D), log_det (...).

Of the encoder's output, the first 2 D numbers are mean and log-variance of the diagonal Gaussian that a flow starts from.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vae.errors import VAEError
from vae.gaussian import DiagonalGaussian
from vae.model import PosteriorFamily
from vae.networks.autoregressive import MADE
from vae.networks.base import checked_widths, dense_layers
from vae.precision import full_precision


class Step(Protocol):
    """One invertible map of z, its parameters already known."""

    def __call__(self, z: Tensor) -> tuple[Tensor, Tensor]: ...

    def inverse(self, z: Tensor) -> tuple[Tensor, Tensor]: ...


class FlowPosterior:
    """q(z|x): a draw of `base` carried through `steps`, so that log q(z) = log base(z_0) - sum of log-determinants.

    Rezende & Mohamed 2015, equation 13. KL(q || p) has no closed form: the model estimates it by log q - log p at z.
    """

    def __init__(self, base: DiagonalGaussian, steps: Sequence[Step]) -> None:
        self.base, self.steps = base, steps
        self._drawn: tuple[Tensor, Tensor] | None = None

    @property
    def mean(self) -> Tensor:
        """The base's mean carried through the flow, (..., D): a centre of q(z|x), not its expectation."""
        z = self.base.mean
        for step in self.steps:
            z, _ = step(z)
        return z

    def rsample(self, generator: torch.Generator, sample_shape: tuple[int, ...] = ()) -> Tensor:
        """z (*sample_shape, ..., D), differentiable in every parameter."""
        z = self.base.rsample(generator, sample_shape)
        log_q = self.base.log_prob(z)
        for step in self.steps:
            z, log_det = step(z)
            log_q = log_q - log_det
        self._drawn = z, log_q
        return z

    def log_prob(self, z: Tensor) -> Tensor:
        """log q(z), (...), in nats: known for the last draw, by inverting the flow for any other z."""
        if self._drawn is not None and self._drawn[0] is z:
            return self._drawn[1]
        log_dets = torch.zeros((), dtype=z.dtype, device=z.device)
        for step in reversed(self.steps):
            z, log_det = step.inverse(z)
            log_dets = log_dets + log_det
        return self.base.log_prob(z) - log_dets


# --- planar -----------------------------------------------------------------------------------------------------------


class PlanarStep:
    """z' = z + u^ tanh(w.z + b), log|det| = log(1 + (w.u^) tanh'(w.z + b)); w, u (..., D), b (...).

    Rezende & Mohamed 2015, equations 10 to 12. Invertible since w.u^ > -1 by u^ = u + (m(w.u) - w.u) w / |w|^2 (their
    appendix A.1), here with m(a) = softplus(a + log(e - 1)) - 1 in place of softplus(a) - 1: then m(0) = 0, the step is
    the identity at u = 0, and u^ stays below 2 |u| as w goes to 0: m(a) - a is then near -a / e.
    """

    def __init__(self, w: Tensor, u: Tensor, b: Tensor) -> None:
        # In float64, because the gradient along a small w is what is left of much larger ones across it.
        wide = w.dtype if w.device.type == "mps" else torch.float64  # which has no float64
        wide_w = w.to(wide)
        dot = (wide_w * u.to(wide)).sum(-1)
        excess = planar_excess(dot)
        self.w, self.b = w, b
        self.extreme = F.softplus(dot + _LOG_E_MINUS_1).to(w.dtype)  # 1 + w.u^, the determinant at w.z + b = 0: above 0
        self.slope = (dot + excess).to(w.dtype)
        square = wide_w.square().sum(-1)
        correction = excess / torch.where(square == 0, 1.0, square)
        self.u = u + (correction.unsqueeze(-1) * wide_w).to(w.dtype)

    def _at(self, projection: Tensor) -> tuple[Tensor, Tensor]:
        """tanh(w.z + b) and the log-determinant, given w.z."""
        h = torch.tanh(projection + self.b)
        return h, torch.log(h.square() + self.extreme * (1 - h.square()))  # 1 + (w.u^) tanh', and nothing cancels

    def __call__(self, z: Tensor) -> tuple[Tensor, Tensor]:
        h, log_det = self._at((self.w * z).sum(-1))
        return z + self.u * h.unsqueeze(-1), log_det

    def inverse(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """w.z solves a + (w.u^) tanh(a + b) = w.z', which grows with a: bisection, to the last bit."""
        target = (self.w * z).sum(-1)
        with torch.no_grad():
            reach = self.slope.abs()
            low, high = target - reach, target + reach
            for _ in range(80):
                middle = (low + high) / 2
                above = middle + self.slope * torch.tanh(middle + self.b) > target
                low, high = torch.where(above, low, middle), torch.where(above, middle, high)
            root = (low + high) / 2
            h = torch.tanh(root + self.b)
            derivative = h.square() + self.extreme * (1 - h.square())
        # One Newton step from the root: it leaves the value and brings the implicit function's gradient.
        root = root - (root + self.slope * torch.tanh(root + self.b) - target) / derivative
        h, log_det = self._at(root)
        return z - self.u * h.unsqueeze(-1), log_det


_LOG_E_MINUS_1 = 0.5413248546129181


def planar_excess(a: Tensor) -> Tensor:
    """m(a) - a with m(a) = softplus(a + log(e - 1)) - 1: exact to rounding near 0 too, where it is -a / e. Shape kept.

    log(1 + (e^-a - 1) / e), unless e^-a is large; there nothing cancels in the definition.
    """
    left = a < -1
    near = torch.log1p(torch.expm1(-torch.where(left, 0.0, a)) / math.e)
    return torch.where(left, F.softplus(a + _LOG_E_MINUS_1) - 1 - a, near)


class PlanarFlow(PosteriorFamily):
    """Planar flows on a diagonal Gaussian, every parameter amortised: the encoder gives w, u, b of each step.

    Rezende & Mohamed 2015, section 4.1. (B, encoder_outputs) -> FlowPosterior. Raises VAEError for no step.
    """

    def __init__(self, latent_dim: int, steps: int = 10) -> None:
        super().__init__()
        if steps < 1:
            raise VAEError(f"A planar flow needs at least one step, not {steps}: posterior=diagonal has none.")
        self.latent_dim, self.steps = latent_dim, steps
        self.encoder_outputs = 2 * latent_dim + steps * (2 * latent_dim + 1)

    def forward(self, parameters: Tensor) -> FlowPosterior:
        d = self.latent_dim
        flow = parameters[..., 2 * d : self.encoder_outputs].unflatten(-1, (self.steps, 2 * d + 1))
        steps = [PlanarStep(p[..., :d], p[..., d : 2 * d], p[..., 2 * d]) for p in flow.unbind(-2)]
        return FlowPosterior(DiagonalGaussian.from_parameters(parameters[..., : 2 * d]), steps)


# --- autoregressive ---------------------------------------------------------------------------------------------------


def one_after_the_other(start: Tensor, solved: Callable[[Tensor], Tensor]) -> Tensor:
    """z of the shape of `start` (..., D) with z = solved(z), where solved(z)_i depends on z_1 .. z_(i-1) alone: D calls."""
    z = torch.zeros_like(start)
    for i in range(start.shape[-1]):
        z = torch.cat([z[..., :i], solved(z)[..., i : i + 1], z[..., i + 1 :]], -1)
    return z


class MaskedAffine(nn.Module):
    """z'_i = z_i exp(a_i) + m_i, with m and a functions of z'_1 .. z'_(i-1); with `flipped`, z_D comes first.

    A layer of MAF (Papamakarios et al. 2017, equations 2 to 5): `inverse`, from data to noise, is one pass of the network,
    and this way D of them. It starts as the identity. a = scale * tanh(net), as in a coupling, so that it stays finite far out.
    """

    def __init__(self, dim: int, hidden: Sequence[int], flipped: bool, activation: str = "relu") -> None:
        super().__init__()
        self.net, self.flipped = MADE(dim, hidden, 2, activation=activation), flipped
        self.scale = nn.Parameter(torch.ones(dim))

    def _order(self, z: Tensor) -> Tensor:
        return z.flip(-1) if self.flipped else z

    def _shift_and_scale(self, z: Tensor) -> tuple[Tensor, Tensor]:
        m, raw = full_precision(self.net(z)).unbind(-2)
        return m, self.scale * torch.tanh(raw)

    def forward(self, z: Tensor) -> tuple[Tensor, Tensor]:
        noise = self._order(z)

        def solved(z: Tensor) -> Tensor:
            m, a = self._shift_and_scale(z)
            return noise * torch.exp(a) + m

        z = one_after_the_other(noise, solved)
        return self._order(z), self._shift_and_scale(z)[1].sum(-1)

    def inverse(self, z: Tensor) -> tuple[Tensor, Tensor]:
        z = self._order(z)
        m, a = self._shift_and_scale(z)
        return self._order((z - m) * torch.exp(-a)), a.sum(-1)


# --- inverse autoregressive -------------------------------------------------------------------------------------------


class IAFStep:
    """z'_i = s_i z_i + (1 - s_i) m_i with s = sigmoid(net + 2), m = net, both of z_1 .. z_(i-1) and the context; the
    log-determinant is sum log s. With `flipped`, z_D comes first. Kingma et al. 2016, Algorithm 1.
    """

    def __init__(self, net: MADE, context: Tensor | None, flipped: bool) -> None:
        self.net, self.context, self.flipped = net, context, flipped

    def _order(self, z: Tensor) -> Tensor:
        return z.flip(-1) if self.flipped else z

    def _parameters(self, z: Tensor) -> tuple[Tensor, Tensor]:
        m, gate = full_precision(self.net(z, self.context)).unbind(-2)
        return m, gate + 2  # gates start open, as the paper advises

    def __call__(self, z: Tensor) -> tuple[Tensor, Tensor]:
        z = self._order(z)
        m, gate = self._parameters(z)
        new = torch.sigmoid(gate) * z + torch.sigmoid(-gate) * m
        return self._order(new), F.logsigmoid(gate).sum(-1)

    def inverse(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """One latent after the other, D passes of the network."""
        target = self._order(z)

        def solved(z: Tensor) -> Tensor:
            m, gate = self._parameters(z)
            return target + torch.exp(-gate) * (target - m)  # z' / s - (1 / s - 1) m, and 1 / s - 1 = exp(-gate)

        z = one_after_the_other(target, solved)
        _, gate = self._parameters(z)
        return self._order(z), F.logsigmoid(gate).sum(-1)


class InverseAutoregressiveFlow(PosteriorFamily):
    """IAF on a diagonal Gaussian: `steps` autoregressive networks of their own weights, amortised through a context that
    the encoder gives beside mean and log-variance; the order of the latents is reversed between steps.

    Kingma et al. 2016. (B, encoder_outputs) -> FlowPosterior. Raises VAEError for no step or no hidden layer.
    """

    def __init__(
        self,
        latent_dim: int,
        steps: int = 2,
        hidden: Sequence[int] = (320,),
        context: int = 64,
        activation: str = "elu",
    ) -> None:
        super().__init__()
        if steps < 1:
            raise VAEError(f"An inverse autoregressive flow needs at least one step, not {steps}.")
        if context < 1:
            raise VAEError(f"The context of an inverse autoregressive flow has at least one number, not {context}.")
        self.latent_dim = latent_dim
        self.encoder_outputs = 2 * latent_dim + context
        self.nets = nn.ModuleList(MADE(latent_dim, hidden, 2, context, activation) for _ in range(steps))

    def forward(self, parameters: Tensor) -> FlowPosterior:
        gaussian, context = parameters[..., : self.encoder_outputs].tensor_split([2 * self.latent_dim], -1)
        steps = [IAFStep(net, context, flipped=i % 2 == 1) for i, net in enumerate(self.nets)]
        return FlowPosterior(DiagonalGaussian.from_parameters(gaussian), steps)


# --- coupling ---------------------------------------------------------------------------------------------------------


class AffineCoupling(nn.Module):
    """z'_i = z_i exp(s_i) + t_i for one half of the dimensions, s and t functions of the other half, which is kept.

    Dinh et al. 2017 (RealNVP), equations 4 to 8: s = scale * tanh(net), with a learned scale per dimension. The last
    layer starts at zero, so that the step starts as the identity. Every second dimension is kept, the even ones or,
    with `odd`, the others.
    """

    kept: Tensor

    def __init__(self, dim: int, hidden: Sequence[int], odd: bool, activation: str = "relu") -> None:
        super().__init__()
        self.register_buffer("kept", (torch.arange(dim) % 2 == int(odd)).float(), persistent=False)
        sizes = (dim, *checked_widths(hidden))
        last = nn.Linear(sizes[-1], 2 * dim)
        nn.init.zeros_(last.weight)
        nn.init.zeros_(last.bias)
        self.net = nn.Sequential(*dense_layers(sizes, activation), last)
        self.scale = nn.Parameter(torch.ones(dim))

    def _scale_and_shift(self, kept: Tensor) -> tuple[Tensor, Tensor]:
        raw, shift = full_precision(self.net(kept)).chunk(2, -1)
        moved = 1 - self.kept
        return moved * self.scale * torch.tanh(raw), moved * shift

    def forward(self, z: Tensor) -> tuple[Tensor, Tensor]:
        log_scale, shift = self._scale_and_shift(z * self.kept)
        return z * torch.exp(log_scale) + shift, log_scale.sum(-1)

    def inverse(self, z: Tensor) -> tuple[Tensor, Tensor]:
        log_scale, shift = self._scale_and_shift(z * self.kept)
        return (z - shift) * torch.exp(-log_scale), log_scale.sum(-1)
