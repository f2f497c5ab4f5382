"""The weight on the KL over time: constant, warm-up, cyclical, and feedback controllers.

A schedule is called with the step and returns a 0-dim multiplier; the weight on the KL is `beta * schedule(step)`, and
beta the number that people sweep (leave it at 1 beside a controller, whose output is the weight itself). A capacity
that grows with time is the same thing: that of Burgess et al. 2018 is `C * Linear(steps)(step)`.

A controller ignores the step and learns from what was observed: `schedule.observe(rate=..., distortion=...)` once an
optimiser step, with detached batch means in nats. The same classes serve the VAE (rate = KL(q(z|x) || p(z)) per image)
and the policy (rate = KL(pi || pi_ref) a sequence). Constants and state alike are buffers, so that a checkpoint holds
all of a schedule and a stack of runs is a stack of state; no number leaves the device.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from vae.errors import VAEError


class Schedule(nn.Module):
    """step -> 0-dim multiplier, where step math.inf asks for what it ends on. Controllers also learn by `observe`."""

    #: Whether it is a controller, whose weight follows from what it observed: it ends on nothing that the validation losses
    #: of two epochs could be compared at.
    learns: bool = False

    def forward(self, step: float) -> Tensor:
        raise TypeError(f"{type(self).__name__} does not say what the weight is: it must define forward().")

    def observe(self, *, rate: Tensor, distortion: Tensor | None = None) -> None:
        """Take in the batch means of one optimiser step, in nats. A schedule that watches the clock ignores them."""

    def _hold(self, **numbers: float) -> None:
        for name, value in numbers.items():
            self.register_buffer(name, torch.tensor(float(value)))


def _require_positive(**options: float) -> None:
    for name, value in options.items():
        if not (value > 0 and math.isfinite(value)):
            raise VAEError(f"{name} must be positive and finite, not {value}.")


def _require_not_negative(**options: float) -> None:
    for name, value in options.items():
        if not (value >= 0 and math.isfinite(value)):
            raise VAEError(f"{name} must be finite and not negative, not {value}.")


# ------------------------------------------------------------------------------------------------------- by the clock


class Constant(Schedule):
    """The same multiplier at every step. Raises VAEError for a negative one."""

    value: Tensor

    def __init__(self, value: float = 1.0) -> None:
        super().__init__()
        _require_not_negative(value=value)
        self._hold(value=value)

    def forward(self, step: float) -> Tensor:
        return self.value.clone()


class Linear(Schedule):
    """From `start` at step 0 to `end` at step `steps` in a straight line, `end` afterwards.

    KL warm-up: Bowman et al. 2016, Sonderby et al. 2016. Raises VAEError unless steps > 0, start >= 0 and end >= 0.
    """

    steps: Tensor
    start: Tensor
    end: Tensor

    def __init__(self, steps: float, start: float = 0.0, end: float = 1.0) -> None:
        super().__init__()
        _require_positive(steps=steps)
        _require_not_negative(start=start, end=end)
        self._hold(steps=steps, start=start, end=end)

    def progress(self, step: float) -> Tensor:
        """0 at the first step, 1 from step `steps` on."""
        return (step / self.steps).clamp(0.0, 1.0)

    def forward(self, step: float) -> Tensor:
        return torch.lerp(self.start, self.end, self.progress(step))


class Cosine(Linear):
    """The same between the same ends, along half a cosine."""

    def forward(self, step: float) -> Tensor:
        return torch.lerp(self.start, self.end, 0.5 - 0.5 * torch.cos(math.pi * self.progress(step)))


class Cyclical(Schedule):
    """`cycles` equal cycles in the first `steps` steps: each climbs from 0 to 1 over its first part `ramp`, then stays.

    Fu et al. 2019 (M = 4 cycles, R = 0.5). After the last cycle it stays at 1, so that what is trained on is the ELBO.
    Raises VAEError unless steps > 0, cycles > 0 and 0 < ramp <= 1.
    """

    steps: Tensor
    cycles: Tensor
    ramp: Tensor

    def __init__(self, steps: float, cycles: float = 4, ramp: float = 0.5) -> None:
        super().__init__()
        _require_positive(steps=steps, cycles=cycles, ramp=ramp)
        if ramp > 1:
            raise VAEError(f"ramp is a part of a cycle and cannot exceed 1, not {ramp}.")
        self._hold(steps=steps, cycles=cycles, ramp=ramp)

    def forward(self, step: float) -> Tensor:
        # cycles * step is exact for whole numbers up to 2^24, so that each cycle starts on its very step.
        part_of_cycle = torch.remainder(self.cycles * step, self.steps) / self.steps
        climbing = (part_of_cycle / self.ramp).clamp(max=1.0)
        return torch.where(self.steps > step, climbing, torch.ones_like(climbing))


# -------------------------------------------------------------------------------------------------------- by feedback


class GECO(Schedule):
    """The weight at which the distortion settles at `target` nats per image (Rezende & Viola 2018, algorithm 1).

    They minimise KL + lambda (D - target), with lambda <- lambda exp(eta C) and C the moving average of D - target.
    Divided by lambda that is D + weight KL with weight = 1 / lambda, so that here, in log-space,
        C <- alpha C + (1 - alpha) (D - target),    log weight <- log weight - eta C:
    too much distortion lowers the weight on the KL, slack raises it. A target on the squared error, kappa^2 an image,
    is a distortion of kappa^2 / (2 s) + n/2 log(2 pi s) nats under a Gaussian of n pixels with fixed variance s.

    eta: speed, per nat and step. The loop is an integrator behind an average over 1 / (1 - alpha) steps and rings where
        eta dD/dlog(weight) is far above (1 - alpha) / 4; dD/dlog(weight) is about weight / 2 for each active unit.
    init: the weight before anything was observed.
    minimum, maximum: bounds of the weight, and so of how far an early distortion far above the target can wind it down.
    Raises VAEError for options out of range, and from `observe` without a distortion.
    """

    learns = True
    target: Tensor
    alpha: Tensor
    eta: Tensor
    log_minimum: Tensor
    log_maximum: Tensor
    log_weight: Tensor
    excess: Tensor
    observed: Tensor

    def __init__(
        self,
        target: float,
        alpha: float = 0.99,
        eta: float = 1e-3,
        init: float = 1.0,
        minimum: float = 1e-3,
        maximum: float = 1e3,
    ) -> None:
        super().__init__()
        _require_positive(eta=eta, init=init, minimum=minimum, maximum=maximum)
        _require_not_negative(alpha=alpha)
        if not math.isfinite(target):
            raise VAEError(f"target, the distortion to hold, must be finite, not {target}.")
        if alpha >= 1:
            raise VAEError(f"alpha must be below 1, not {alpha}.")
        if not minimum <= init <= maximum:
            raise VAEError(f"init must lie between minimum and maximum, but {minimum} <= {init} <= {maximum} is false.")
        self._hold(target=target, alpha=alpha, eta=eta, log_minimum=math.log(minimum), log_maximum=math.log(maximum))
        self._hold(log_weight=math.log(init), excess=0.0, observed=0.0)

    def forward(self, step: float) -> Tensor:
        return self.log_weight.exp()

    @torch.no_grad()
    def observe(self, *, rate: Tensor, distortion: Tensor | None = None) -> None:
        if distortion is None:
            raise VAEError("GECO steers by the distortion, and observe() was given none.")
        excess = distortion - self.target
        # The average starts at the first observation, as in the paper, not at zero.
        excess = torch.where(self.observed > 0, self.alpha * self.excess + (1 - self.alpha) * excess, excess)
        log_weight = self.log_weight - self.eta * excess
        self.excess.copy_(excess)
        self.observed.add_(1.0)
        self.log_weight.copy_(torch.maximum(torch.minimum(log_weight, self.log_maximum), self.log_minimum))


class ControlVAE(Schedule):
    """The weight at which the rate settles at `target` nats, by proportional-integral control (Shao et al. 2020).

    With e = target - rate:    weight = kp / (1 + exp(e)) - ki sum e + minimum, held in [minimum, maximum].
    The paper's constants: kp 0.01, ki 0.001, minimum 1 for disentangling; kp 0.01, ki 0.0001, weights in [0, 1] for
    text and images.

    warmup: observations over which the set-point climbs from 0 to `target`, 0 for none (the paper climbs by 0.15 nats).
    Anti-windup: the sum goes no further than what puts the weight on its bound, and leaves with the first e of the
    other sign. (The authors stop it out of bounds whatever the sign of e, from where it cannot come back.)
    Raises VAEError for options out of range.
    """

    learns = True
    target: Tensor
    kp: Tensor
    ki: Tensor
    minimum: Tensor
    maximum: Tensor
    warmup: Tensor
    integral: Tensor
    weight: Tensor
    observed: Tensor

    def __init__(
        self,
        target: float,
        kp: float = 0.01,
        ki: float = 1e-4,
        minimum: float = 0.0,
        maximum: float = 1.0,
        warmup: float = 0,
    ) -> None:
        super().__init__()
        _require_positive(target=target, ki=ki, maximum=maximum)
        _require_not_negative(kp=kp, minimum=minimum, warmup=warmup)
        if minimum >= maximum:
            raise VAEError(f"minimum must be below maximum, but {minimum} < {maximum} is false.")
        self._hold(target=target, kp=kp, ki=ki, minimum=minimum, maximum=maximum, warmup=warmup)
        self._hold(integral=0.0, weight=minimum, observed=0.0)

    def forward(self, step: float) -> Tensor:
        return self.weight.clone()

    @torch.no_grad()
    def observe(self, *, rate: Tensor, distortion: Tensor | None = None) -> None:
        climbed = torch.where(self.observed < self.warmup, self.observed / self.warmup, 1.0)
        error = self.target * climbed - rate
        proportional = self.kp * torch.sigmoid(-error)
        integral = self.integral - self.ki * error
        unbounded = proportional + integral + self.minimum
        weight = torch.maximum(torch.minimum(unbounded, self.maximum), self.minimum)
        integral = torch.where(weight == unbounded, integral, weight - proportional - self.minimum)
        self.integral.copy_(integral)
        self.weight.copy_(weight)
        self.observed.add_(1.0)


class AdaptiveKL(Schedule):
    """The weight that holds the KL at `target` nats by small corrections (Ziegler et al. 2019, sec. 2.2; TRL).

        weight <- weight (1 + clip(rate / target - 1, -0.2, 0.2) batch / horizon)

    It rises where the KL overshoots and falls where it undershoots. batch and horizon count the same thing, episodes in
    the original: `batch` of them pass between two observations, and in `horizon` of them the weight changes by at most
    a fifth or so. Raises VAEError for options that are not positive, or batch > horizon.
    """

    learns = True
    target: Tensor
    horizon: Tensor
    batch: Tensor
    weight: Tensor

    def __init__(self, target: float, horizon: float = 10_000, init: float = 0.2, batch: float = 1) -> None:
        super().__init__()
        _require_positive(target=target, horizon=horizon, init=init, batch=batch)
        if batch > horizon:
            raise VAEError(f"batch must not exceed horizon, but {batch} > {horizon}.")
        self._hold(target=target, horizon=horizon, batch=batch, weight=init)

    def forward(self, step: float) -> Tensor:
        return self.weight.clone()

    @torch.no_grad()
    def observe(self, *, rate: Tensor, distortion: Tensor | None = None) -> None:
        error = (rate / self.target - 1).clamp(-0.2, 0.2)
        self.weight.mul_(1 + error * self.batch / self.horizon)
