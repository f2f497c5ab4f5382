"""Flow matching: p(z) as where an ODE takes N(0, I), its velocity learned by regression (Lipman et al. 2023)."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vae.errors import whole
from vae.fitting import Whitened, descend, whitened, whitened_by
from vae.priors import Prior, StandardNormal
from vae.seeding import derive, generator

MOST_EXACT = 64  # latents of a map, up to which the divergence is exact
PROBES = 1  # of Hutchinson's estimate beyond
MAX_ELEMENTS = 2**18  # numbers of a hidden layer at a time: they stay in the processor's cache
FREQUENCIES = 4  # of the time that a network is given, in cosines and sines

#: x (B, D) and t (0-dim) -> the velocity dx/dt (B, D) and its divergence (B,)
Field = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]


def integrate(field: Field, x: Tensor, start: float, end: float, steps: int) -> tuple[Tensor, Tensor]:
    """x (B, D) carried from time `start` to `end`, and the integral of the divergence on its way, (B,).

    The classical Runge-Kutta method of order 4 with equal steps: the error falls as steps^-4.
    """
    total, h = x.new_zeros(len(x)), (end - start) / steps
    for i in range(steps):
        t, middle, after = (
            torch.tensor(start + (i + part) * h, dtype=x.dtype, device=x.device) for part in (0, 0.5, 1)
        )
        v1, d1 = field(x, t)
        v2, d2 = field(x + h / 2 * v1, middle)
        v3, d3 = field(x + h / 2 * v2, middle)
        v4, d4 = field(x + h * v3, after)
        x = x + h / 6 * (v1 + 2 * v2 + 2 * v3 + v4)
        total = total + h / 6 * (d1 + 2 * d2 + 2 * d3 + d4)
    return x, total


def jacobian_trace(f: Callable[[Tensor], Tensor], x: Tensor, probes: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """f(x), (B, D) -> (B, D) row by row, and the trace of each row's Jacobian J, (B,).

    Exactly, by D products; or with `probes`, (P, B, D) of independent entries +1 or -1, as the mean of e'Je over them, which
    is right on average (Hutchinson 1990).
    """
    value, product = torch.func.vjp(f, x)[:2]
    if probes is None:
        units = torch.eye(x.shape[1], dtype=x.dtype, device=x.device)
        return value, torch.stack([product(unit.expand_as(x))[0][:, i] for i, unit in enumerate(units)]).sum(0)
    return value, torch.stack([(product(probe)[0] * probe).sum(-1) for probe in probes]).mean(0)


def time_features(t: Tensor) -> Tensor:
    """(...) -> (..., 1 + 2 FREQUENCIES): t, and cosines and sines of pi k t."""
    angle = math.pi * t.unsqueeze(-1) * torch.arange(1, FREQUENCIES + 1, dtype=t.dtype, device=t.device)
    return torch.cat([t.unsqueeze(-1), angle.cos(), angle.sin()], -1)


class FlatNet(nn.Module):
    """(B, D) and the time, (B,) or 0-dim, -> (B, D) by two hidden layers and a last one that starts at zero; with its
    divergence in closed form."""

    def __init__(self, latent_dim: int, width: int) -> None:
        super().__init__()
        self.latent_dim = latent_dim
        self.first = nn.Linear(latent_dim + 1 + 2 * FREQUENCIES, width)
        self.second, self.last = nn.Linear(width, width), _zero(nn.Linear(width, latent_dim))

    def _hidden(self, y: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        of_y, of_t = self.first.weight.tensor_split([self.latent_dim], 1)
        h1 = F.linear(y, of_y) + F.linear(time_features(t), of_t, self.first.bias)
        return h1, self.second(F.silu(h1))

    def forward(self, y: Tensor, t: Tensor) -> Tensor:
        return self.last(F.silu(self._hidden(y, t)[1]))

    def with_divergence(self, y: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        """Also tr dv/dy, (B,): tr(C S2 B S1 A) = s2' (B * (A C)') s1, with the layers' weights A, B, C and slopes S1, S2."""
        h1, h2 = self._hidden(y, t)
        both = self.second.weight * (self.first.weight[:, : self.latent_dim] @ self.last.weight).T
        return self.last(F.silu(h2)), ((_silu_slope(h1) @ both.T) * _silu_slope(h2)).sum(-1)


class Block(nn.Module):
    """h -> h + two 3 x 3 convolutions of h and the time's features."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.time = nn.Linear(1 + 2 * FREQUENCIES, width)
        self.one, self.two = (nn.Conv2d(width, width, 3, padding=1) for _ in range(2))

    def forward(self, h: Tensor, features: Tensor) -> Tensor:
        return h + self.two(F.silu(self.one(F.silu(h + self.time(features)[..., None, None]))))


class MapNet(nn.Module):
    """The same of a map (c, h, w), flat, by residual blocks of convolutions."""

    BLOCKS = 2

    def __init__(self, latent_shape: tuple[int, ...], width: int) -> None:
        super().__init__()
        self.latent_shape, channels = latent_shape, latent_shape[0]
        self.first = nn.Conv2d(channels, width, 3, padding=1)
        self.blocks = nn.ModuleList(Block(width) for _ in range(self.BLOCKS))
        self.last = _zero(nn.Conv2d(width, channels, 3, padding=1))

    def forward(self, y: Tensor, t: Tensor) -> Tensor:
        h, features = self.first(y.unflatten(-1, self.latent_shape)), time_features(t)
        for block in self.blocks:
            h = block(h, features)
        return self.last(F.silu(h)).flatten(1)

    def with_divergence(self, y: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        """Also tr dv/dy, (B,): exact up to MOST_EXACT latents, and beyond by PROBES probes, the same at each call."""
        noise = generator("divergence", device=y.device)
        probes = None
        if y.shape[1] > MOST_EXACT:
            shape = (PROBES, *y.shape)
            probes = torch.randint(2, shape, generator=noise, device=y.device).to(y.dtype).mul(2).sub(1)
        return jacobian_trace(lambda y: self(y, t), y, probes)


class FlowMatching(Prior):
    """N(0, I) at t = 0 carried to p(z) at t = 1 along dx/dt = v(x, t). latent_shape: (D,), or (c, h, w) of a map.

    v = a(t) x + s(t) u(x / s(t), t) with a network u, s^2 = (1 - t)^2 + t^2, the variance on the path from a standard normal
    to another, and a = s'/s. With u = 0, as it starts, v is the closed form of that path, and p is N(0, I). The ODE is solved
    for y = x / s, which is x at both ends and moves by u alone, in `steps` of Runge-Kutta. width: of the hidden layers, by
    default 128, or 32 channels of a map's. Raises VAEError for numbers that are not whole.
    """

    def __init__(self, latent_shape: Sequence[int], width: int | None = None, steps: int = 10) -> None:
        super().__init__()
        self.latent_dim, spatial = math.prod(latent_shape), len(latent_shape) > 1
        self.width = whole("prior.width", width, optional=True) or (32 if spatial else 128)
        self.steps = whole("prior.steps", steps)
        self.net = MapNet(tuple(latent_shape), self.width) if spatial else FlatNet(self.latent_dim, self.width)
        self.noise = StandardNormal(self.latent_dim)

    def velocity(self, x: Tensor, t: Tensor) -> Tensor:
        """v(x, t), (B, D) and (B,) or 0-dim -> (B, D)."""
        t = t.unsqueeze(-1)
        variance = (1 - t).square() + t.square()
        s = variance.sqrt()
        return (2 * t - 1) / variance * x + s * self.net(x / s, t.squeeze(-1))

    def loss(self, x: Tensor, generator: torch.Generator) -> Tensor:
        """The mean over x (B, D) of |v(x_t, t) - (x - e)|^2 / D at x_t = (1 - t) e + t x, with t uniform and e from N(0, I).

        Lipman et al. 2023, section 4.1 (example II), with sigma_min = 0: draws of q(z) are smooth as they are.
        """
        e = torch.randn(x.shape, generator=generator, dtype=x.dtype)
        t = torch.rand(len(x), generator=generator, dtype=x.dtype)
        at = torch.lerp(e, x, t.unsqueeze(-1))
        return (self.velocity(at, t) - (x - e)).square().mean()

    def log_prob(self, z: Tensor) -> Tensor:
        """log p(z), (..., D) -> (...), in nats: log N(e; 0, I) less the integral of the divergence from e to z.

        Grathwohl et al. 2019, section 2. Of maps of more than MOST_EXACT latents it is an estimate, right on
        average and the same at each call.
        """
        found = []
        for part in z.reshape(-1, self.latent_dim).split(self._rows()):
            e, divergence = integrate(self._field, part, 1, 0, self.steps)
            found.append(self.noise.log_prob(e) + divergence)
        return torch.cat(found).reshape(z.shape[:-1])

    def sample(self, n: int, generator: torch.Generator) -> Tensor:
        """(n, D)."""
        parts = self.noise.sample(n, generator).split(self._rows())
        return torch.cat([integrate(self._still, part, 0, 1, self.steps)[0] for part in parts])

    def _field(self, y: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        return self.net.with_divergence(y, t)

    def _still(self, y: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        return self.net(y, t), y.new_zeros(())

    def _rows(self) -> int:
        places = self.latent_dim // self.net.latent_shape[0] if isinstance(self.net, MapNet) else 1
        return max(1, MAX_ELEMENTS // (self.width * places))


def fit_flow_matching(
    z: Tensor,
    moments: tuple[Tensor, Tensor],
    latent_shape: Sequence[int],
    val: Tensor | None = None,
    width: int | None = None,
    steps: int = 10,
    seed: int = 0,
    **descent: Any,
) -> Whitened:
    """A flow by matching of draws z (N, D), from the Gaussian of these moments; arguments as in `vae.fitting.fit_flow`."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(derive(seed, "flow_matching"))
        flow = FlowMatching(latent_shape, width, steps)
    prior = whitened_by(moments, flow)
    e, held = (None if x is None else whitened(x, prior.mean, prior.scale).float() for x in (z, val))
    assert e is not None
    descend(flow, e, flow.loss, held, seed=seed, name="flow_matching", **descent)
    return prior


def _zero(layer: Any) -> Any:
    nn.init.zeros_(layer.weight)
    nn.init.zeros_(layer.bias)
    return layer


def _silu_slope(h: Tensor) -> Tensor:
    gate = torch.sigmoid(h)
    return gate * (1 + h * (1 - gate))
