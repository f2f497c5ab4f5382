"""p(x|z): the distribution of an image given the decoder's parameters. One room: each likelihood a class, then its formulas.

Every likelihood answers for one image in nats, all constants included, and shares one layout: `params` is
(..., P, C, H, W), where P = `params_per_pixel` numbers describe each sub-pixel, and `x` is (..., C, H, W) in [0, 1];
leading dimensions broadcast, so that (K, B, P, C, H, W) meets (B, C, H, W).

Where a formula needs a bounded scale, the bound is part of the parametrisation and is stated there; no value is
clamped. Noise comes from the caller's generator, drawn on the generator's device.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vae.errors import VAEError
from vae.gaussian import LOG_2PI
from vae.precision import full_precision


class Likelihood(nn.Module):
    """What every p(x|z) offers. A subclass writes `pixel_log_prob`, `mean`, `sample` and `bias_for_mean`."""

    params_per_pixel: int = 1
    of_whole_batches: bool = False  # True: in training log_prob of an image depends on the others of its batch
    discrete: bool = False  # True: log_prob is a log-mass, never above 0; False: a log-density on pixels in [0, 1]

    def log_prob(self, params: Tensor, x: Tensor) -> Tensor:
        """log p(x|params) in nats per image: params (..., P, C, H, W), x (..., C, H, W) -> (...); in float32 at least.

        Raises VAEError where the decoder's output does not fit the likelihood or the image.
        """
        if params.shape[-4] != self.params_per_pixel or params.shape[-3:] != x.shape[-3:]:
            expected = (self.params_per_pixel, *x.shape[-3:])
            raise VAEError(
                f"{type(self).__name__} on images {tuple(x.shape[-3:])} needs decoder outputs (..., P, C, H, W) with "
                f"(P, C, H, W) = {expected}, not {tuple(params.shape[-4:])}."
            )
        return self.image_log_prob(full_precision(params), full_precision(x))

    def image_log_prob(self, params: Tensor, x: Tensor) -> Tensor:
        """log_prob of what is known to fit; the sum of the pixels' terms."""
        return self.pixel_log_prob(params, x).sum(dim=(-3, -2, -1))

    def pixel_log_prob(self, params: Tensor, x: Tensor) -> Tensor:
        """The terms of log_prob, (..., C, H, W), or (..., 1, H, W) where the channels are not independent."""
        raise NotImplementedError

    def mean(self, params: Tensor) -> Tensor:
        """E[x|params]: (..., P, C, H, W) -> (..., C, H, W)."""
        raise NotImplementedError

    def sample(self, params: Tensor, generator: torch.Generator) -> Tensor:
        """One draw of x per image: (..., P, C, H, W) -> (..., C, H, W)."""
        raise NotImplementedError

    def bias_for_mean(self, mean: Tensor) -> Tensor:
        """The parameters that predict a given mean image: (C, H, W) -> (P, C, H, W).

        A decoder's output bias may start there: an initial value only, worth about one nat on MNIST at equal training.
        """
        raise NotImplementedError


class Bernoulli(Likelihood):
    """Binary pixels; the parameter is the logit. On grey pixels in (0, 1) it is the usual cross-entropy, which is not a
    normalised density: ContinuousBernoulli is."""

    discrete = True

    def pixel_log_prob(self, params: Tensor, x: Tensor) -> Tensor:
        return -cross_entropy(params.select(-4, 0), x)

    def image_log_prob(self, params: Tensor, x: Tensor) -> Tensor:
        # summed before it is negated, over pixels in one row: a tenth of a small network's step
        return -cross_entropy(params.flatten(-4), x.flatten(-3)).sum(-1)

    def mean(self, params: Tensor) -> Tensor:
        return torch.sigmoid(params.select(-4, 0))

    def sample(self, params: Tensor, generator: torch.Generator) -> Tensor:
        mean = self.mean(params)
        return (_uniform_like(mean, generator) < mean).to(mean.dtype)

    def bias_for_mean(self, mean: Tensor) -> Tensor:
        """logit of the mean clipped to [0.001, 0.999], as the code of Burda et al. 2016 does."""
        return torch.logit(mean.clamp(0.001, 0.999)).unsqueeze(0)


def cross_entropy(logits: Tensor, x: Tensor) -> Tensor:
    """-x log s(l) - (1 - x) log(1 - s(l)), s the logistic function, in nats: logits l and x broadcast, elementwise."""
    logits, x = torch.broadcast_tensors(logits, x)
    try:
        found: Tensor = CrossEntropy.apply(logits, x)
    except RuntimeError:  # of torch.vmap, torch.func and forward-mode differentiation
        found = F.binary_cross_entropy_with_logits(logits, x, reduction="none")
    return found


class CrossEntropy(torch.autograd.Function):
    """As max(l, 0) - l x - log s(|l|), with the gradient s(l) - x.

    Of a binary pixel it is off by less than 2e-7 of the value, or of 1 where that is less, in float32;
    F.binary_cross_entropy_with_logits by 5e-7. That takes log1p, five times as slow on some CPUs, and more passes.
    """

    @staticmethod
    def forward(ctx: Any, logits: Tensor, x: Tensor) -> Tensor:
        ctx.save_for_backward(logits, x)
        log = logits.abs().sigmoid_().log_()
        return logits.clamp_min(0).addcmul_(logits, x, value=-1).sub_(log)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor | None]:
        logits, x = ctx.saved_tensors
        mean = torch.sigmoid(logits)
        again = torch.is_grad_enabled()  # to be differentiated once more
        of_logits = (mean - x) * gradient if again else mean.sub_(x).mul_(gradient)
        return of_logits, -logits * gradient if ctx.needs_input_grad[1] else None


class ContinuousBernoulli(Likelihood):
    """Pixels in [0, 1]; the parameter is the logit. Loaiza-Ganem & Cunningham 2019.

    With logit l the density is l e^(lx) / (e^l - 1), so that log p = (x - 1/2) l - log(sinh(l/2) / (l/2)): the
    normaliser joins the rest in one smooth function, across l = 0 too.
    """

    def pixel_log_prob(self, params: Tensor, x: Tensor) -> Tensor:
        logits = params.select(-4, 0)
        return (x - 0.5) * logits - log_sinhc(logits / 2)

    def mean(self, params: Tensor) -> Tensor:
        return continuous_bernoulli_mean(params.select(-4, 0))

    def sample(self, params: Tensor, generator: torch.Generator) -> Tensor:
        """By the inverse CDF, x = log(1 + u (e^l - 1)) / l; for l > 0 one minus the draw at -l, which can't overflow."""
        logits = params.select(-4, 0)
        u = _uniform_like(logits, generator)
        flat = logits == 0
        negative = torch.where(flat, -1.0, -logits.abs())
        x = torch.where(flat, u, torch.log1p(u * torch.expm1(negative)) / negative)
        return torch.where(logits > 0, 1 - x, x)

    def bias_for_mean(self, mean: Tensor) -> Tensor:
        """The logit whose mean is the given one clipped to [0.001, 0.999]; by bisection, having no closed form."""
        target = mean.double().clamp(0.001, 0.999)
        low, high = torch.full_like(target, -1100.0), torch.full_like(target, 1100.0)
        for _ in range(64):
            middle = (low + high) / 2
            below = continuous_bernoulli_mean(middle) < target
            low, high = torch.where(below, middle, low), torch.where(below, high, middle)
        return middle.to(mean.dtype).unsqueeze(0)


class LocationScale(Likelihood):
    """x = location + sigma * noise. The decoder gives the location; the scale sigma is one number for all pixels, kept as
    `log_sigma`: fixed, or trained where a subclass says `learned`, or found another way in `log_scale`.

    Raises VAEError if sigma is not a positive number.
    """

    log_sigma: Tensor

    learned = False

    def __init__(self, sigma: float = 1.0) -> None:
        super().__init__()
        if not 0 < sigma < math.inf:
            raise VAEError(f"The scale of {type(self).__name__} must be a positive number, not {sigma}.")
        log_sigma = torch.tensor(math.log(sigma))
        if self.learned:
            self.log_sigma = nn.Parameter(log_sigma)
        else:
            self.register_buffer("log_sigma", log_sigma)

    def noise_log_density(self, noise: Tensor) -> Tensor:
        raise NotImplementedError

    def noise_like(self, like: Tensor, generator: torch.Generator) -> Tensor:
        raise NotImplementedError

    def log_scale(self, params: Tensor, x: Tensor | None = None) -> Tensor:
        """log sigma, to broadcast with (..., C, H, W); x is the image when log_prob asks."""
        return self.log_sigma

    def pixel_log_prob(self, params: Tensor, x: Tensor) -> Tensor:
        log_scale = self.log_scale(params, x)
        # the exponential is kept finite, for an error of 0 is one of 0 sigma, however small sigma is
        limit = math.log(torch.finfo(log_scale.dtype).max) - 1
        return self.noise_log_density((x - self.mean(params)) * torch.exp((-log_scale).clamp(max=limit))) - log_scale

    def mean(self, params: Tensor) -> Tensor:
        return params.select(-4, 0)

    def sample(self, params: Tensor, generator: torch.Generator) -> Tensor:
        mean = self.mean(params)
        return mean + torch.exp(self.log_scale(params)) * self.noise_like(mean, generator)

    def bias_for_mean(self, mean: Tensor) -> Tensor:
        """The mean as location, and 0 for any further parameter."""
        return torch.stack([mean, *[torch.zeros_like(mean)] * (self.params_per_pixel - 1)])


class Gaussian(LocationScale):
    """N(mean, sigma^2) with sigma fixed. At sigma = 1 the distortion is half the summed squared error plus a constant."""

    def noise_log_density(self, noise: Tensor) -> Tensor:
        return -0.5 * (noise.square() + LOG_2PI)

    def noise_like(self, like: Tensor, generator: torch.Generator) -> Tensor:
        return torch.randn(like.shape, generator=generator, device=generator.device, dtype=_dtype(like)).to(like.device)


class LearnedSigmaGaussian(Gaussian):
    """N(mean, sigma^2) with one sigma for all pixels, trained by gradient on `log_sigma` from the given start."""

    learned = True


class PixelSigmaGaussian(Gaussian):
    """N(mean, sigma^2) with the decoder's own sigma for each sub-pixel; parameters (mean, raw).

    log sigma = soft_floor(log_sigma + raw, min_log_sigma), `sigma` being where it starts. Without a floor the density
    has no maximum: a pixel that never varies is worth infinitely many nats. -6 (0.63 of a grey level) is Rybkin et al.'s.
    """

    params_per_pixel = 2

    def __init__(self, sigma: float = 1.0, min_log_sigma: float = -6.0) -> None:
        super().__init__(sigma)
        self.min_log_sigma = min_log_sigma

    def log_scale(self, params: Tensor, x: Tensor | None = None) -> Tensor:
        return soft_floor(self.log_sigma + params.select(-4, 1), self.min_log_sigma)


class OptimalSigmaGaussian(Gaussian):
    """N(mean, sigma^2) with sigma^2 at its analytic optimum, the mean squared error. Rybkin et al. 2021 (sigma-VAE).

    In training, sigma^2 is the mean over this very batch: all its images, samples and pixels. It is detached: at the
    optimum of the batch-mean log-likelihood its derivative is zero, so the gradient is that of Rybkin's (D/2) log MSE.

    In evaluation sigma must be a fixed parameter of p(x|z), or log_prob of an image would depend on its neighbours and
    an importance-weighted bound would bound nothing. It is then the running mean of the training batches' errors over
    about the last WINDOW-th part of the training, and never more than 1 / (1 - decay) batches; saved with the weights, at
    no extra pass. A relative error e of sigma^2 costs D e^2 / 4 nats in D dimensions: where the errors of training fall
    like 1 / steps, the lag is about 1 / WINDOW and costs D / 1600 nats. Against the error of the last weights themselves
    it cost 0.07 nats on digits (D = 64) after 20 epochs of 21 steps, 0.01 after 5. Before the first batch it is `sigma`^2.
    A batch without any error has infinite log-likelihood; one without any image leaves everything as it is.

    Raises VAEError if sigma is not positive or decay not in [0, 1).
    """

    WINDOW = 20
    of_whole_batches = True
    batches_seen: Tensor

    def __init__(self, sigma: float = 1.0, decay: float = 0.99) -> None:
        super().__init__(sigma)
        if not 0 <= decay < 1:
            raise VAEError(f"The decay of OptimalSigmaGaussian must be in [0, 1), not {decay}.")
        self.decay = decay
        self.register_buffer("batches_seen", torch.tensor(0.0))

    @torch.no_grad()
    def log_scale(self, params: Tensor, x: Tensor | None = None) -> Tensor:
        if x is None or not self.training or x.numel() == 0:
            return self.log_sigma
        batch = (x - self.mean(params)).square().mean()
        self.batches_seen += 1
        running = torch.exp(2 * self.log_sigma)
        # polynomial-decay averaging (Shamir & Zhang 2013, equation 4), whose memory grows with the training
        rate = (self.WINDOW / (self.batches_seen + (self.WINDOW - 1))).clamp(min=1 - self.decay)
        running = torch.lerp(running, batch.to(running), rate)
        self.log_sigma.copy_(0.5 * running.log())
        return 0.5 * batch.log()


class Laplace(LocationScale):
    """Density exp(-|x - mean| / b) / 2b, the absolute error's, with the scale b fixed; `log_sigma` is its log."""

    def __init__(self, scale: float = 1.0) -> None:
        super().__init__(scale)

    def noise_log_density(self, noise: Tensor) -> Tensor:
        return -noise.abs() - math.log(2)

    def noise_like(self, like: Tensor, generator: torch.Generator) -> Tensor:
        """A difference of two exponentials: unlike the inverse CDF of a float it is never infinite."""
        return _exponential_like(like, generator) - _exponential_like(like, generator)


class LearnedScaleLaplace(Laplace):
    """Laplace with one scale for all pixels, trained by gradient on `log_sigma` from the given start."""

    learned = True


class DiscretizedLogistic(Likelihood):
    """8-bit pixels x = k / 255: the mass that a logistic puts on each value's bin, the end bins reaching to infinity.

    Kingma et al. 2016, Salimans et al. 2017. Parameters (location, raw), in units where pixels span [-1, 1] as in
    PixelCNN++; log scale = soft_floor(raw, -7), where that has a clamp at -7. x is read as the nearest of 256 values.
    """

    params_per_pixel = 2
    discrete = True

    def pixel_log_prob(self, params: Tensor, x: Tensor) -> Tensor:
        location, raw = params.unbind(-4)
        return discretized_logistic_log_prob(_level(x), location, _log_scale(raw))

    def mean(self, params: Tensor) -> Tensor:
        """To half a grey level: the mean of the logistic clipped to [0, 1], its rounding not followed."""
        location, raw = params.unbind(-4)
        return (1 + clipped_logistic_mean(location, _log_scale(raw))) / 2

    def sample(self, params: Tensor, generator: torch.Generator) -> Tensor:
        location, raw = params.unbind(-4)
        return _discretise(location + torch.exp(_log_scale(raw)) * _logistic_like(location, generator)) / 255

    def bias_for_mean(self, mean: Tensor) -> Tensor:
        """The scale at raw = 0, and the location whose mean is the given one clipped to [0.001, 0.999]."""
        raw = torch.zeros_like(mean)
        return torch.stack([_location_for_mean(mean.clamp(0.001, 0.999), _log_scale(raw)), raw])


class DiscretizedLogisticMixture(Likelihood):
    """A mixture of discretised logistics for 8-bit grey or RGB images, as in PixelCNN++ (Salimans et al. 2017).

    A pixel chooses one of K components for all its channels; then, when `coupled`, green is centred on
    m_G + a r and blue on m_B + b r + c g, where r, g are the channels already known, in [-1, 1].

    Layout, params (..., 4K, C, H, W), in blocks of K: [weight logits | locations | raw log-scales | raw couplings].
    Weight: a pixel's K logits are the sums of its C channels' planes. Scale: as in DiscretizedLogistic.
    Coupling: tanh of the planes 0, 1, 2, which hold a, b, c. A grey image has nothing to couple and does not read
    them. `coupled=False` leaves that block out (3K planes): the channels are then independent given the component.

    Raises VAEError if components < 1, or if a coupled mixture meets images of neither 1 nor 3 channels.
    """

    discrete = True

    def __init__(self, components: int = 5, coupled: bool = True) -> None:
        super().__init__()
        if components < 1:
            raise VAEError(f"A mixture needs at least one component, not {components}.")
        self.components, self.coupled = components, coupled
        self.params_per_pixel = (4 if coupled else 3) * components

    def _unpack(self, params: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """log weights (..., K, 1, H, W); locations, log scales (..., K, C, H, W); couplings (..., K, 3, H, W) or None."""
        channels = params.shape[-3]
        if self.coupled and channels not in (1, 3):
            raise VAEError(f"The coupled logistic mixture is for 1 or 3 channels, not {channels}: set coupled=False.")
        logits, location, raw, *coupling = params.unflatten(-4, (-1, self.components)).unbind(-5)
        log_weights = torch.log_softmax(logits.sum(-3, keepdim=True), dim=-4)
        return log_weights, location, _log_scale(raw), torch.tanh(coupling[0]) if coupling and channels == 3 else None

    def pixel_log_prob(self, params: Tensor, x: Tensor) -> Tensor:
        log_weights, location, log_scale, coupling = self._unpack(params)
        level = _level(x).unsqueeze(-4)
        channels = (level / 127.5 - 1).unbind(-3)
        centres = torch.broadcast_tensors(*(_centre(c, location, coupling, channels) for c in range(len(channels))))
        centre = torch.stack(centres, dim=-3)
        log_mass = discretized_logistic_log_prob(level, centre, log_scale).sum(-3, keepdim=True)
        return torch.logsumexp(log_weights + log_mass, dim=-4)

    def mean(self, params: Tensor) -> Tensor:
        """To half a grey level, as in DiscretizedLogistic, without coupling. A coupled channel is taken at the means of
        those before it in its component: an approximation where its own clipping at 0 and 1 bends what it sees of them
        (with random parameters 0.004 on average, at worst 0.1). `sample` is exact."""
        log_weights, location, log_scale, coupling = self._unpack(params)
        mean = _in_turn(location, coupling, lambda c, at: clipped_logistic_mean(at, log_scale.select(-3, c)))
        return (log_weights.exp() * (1 + mean) / 2).sum(-4)

    def sample(self, params: Tensor, generator: torch.Generator) -> Tensor:
        log_weights, location, log_scale, coupling = self._unpack(params)
        # the Gumbel-max trick: Gumbel noise is minus the log of an exponential's
        chosen = (log_weights - _exponential_like(log_weights, generator).log()).argmax(-4, keepdim=True)

        def pick(t: Tensor) -> Tensor:
            return t.gather(-4, chosen.expand_as(t.narrow(-4, 0, 1))).squeeze(-4)

        noise = torch.exp(pick(log_scale)) * _logistic_like(pick(location), generator)
        coupling = None if coupling is None else pick(coupling)
        draw = _in_turn(pick(location), coupling, lambda c, at: _discretise(at + noise.select(-3, c)) / 127.5 - 1)
        return _level((1 + draw) / 2) / 255

    def bias_for_mean(self, mean: Tensor) -> Tensor:
        """Every component as in DiscretizedLogistic, equally likely, uncoupled; the net's weights tell them apart."""
        location, zero = DiscretizedLogistic().bias_for_mean(mean)
        blocks = [zero, location, zero, zero][: self.params_per_pixel // self.components]
        return torch.stack(blocks).repeat_interleave(self.components, dim=0)


# Formulas


def log_sinhc(y: Tensor) -> Tensor:
    """log(sinh(y) / y), even and smooth; value and gradient are finite, and exact to rounding, for every finite y.

    y - log 2y + log(1 - e^(-2y)); within 0.3 of zero, where that cancels, the series in Bernoulli numbers (its next
    term is below 1e-15 there). Shape kept.
    """
    small = y.abs() < 0.3
    # each branch sees only arguments of its own, or the gradient of the one not taken would be NaN
    s = torch.where(small, y, 0.0).square()
    a = torch.where(small, 1.0, y.abs())
    series = s * (1 / 6 + s * (-1 / 180 + s * (1 / 2835 + s * (-1 / 37800 + s * (1 / 467775 - s * 691 / 3831077250)))))
    doubled = 2 * a.clamp(max=torch.finfo(a.dtype).max / 2)  # beyond, its log is lost in the rounding of a
    return torch.where(small, series, a - torch.log(doubled) + torch.log1p(-torch.exp(-2 * a)))


def continuous_bernoulli_mean(logits: Tensor) -> Tensor:
    """E[x] = 1 / (1 - e^(-l)) - 1 / l, which is 1/2 at l = 0 and 1 - E[x] at -l. Shape kept, in (0, 1).

    Exact to rounding, which makes 1 of the logits whose mean no float tells from 1 (in float32 from 3e7 on).
    """
    small = logits.abs() < 0.3
    l = torch.where(small, logits, 0.0)
    a = torch.where(small, 1.0, logits.abs())
    s = l.square()
    series = 0.5 + l * (1 / 12 + s * (-1 / 720 + s * (1 / 30240 - s / 1209600)))
    expm1 = torch.expm1(-a)
    return torch.where(small, series, torch.where(logits > 0, -1 / expm1 - 1 / a, 1 / a + torch.exp(-a) / expm1))


def soft_floor(raw: Tensor, floor: float) -> Tensor:
    """floor + softplus(raw - floor): above the floor for every raw, and raw itself far above it. Shape kept."""
    return floor + F.softplus(raw - floor)


def discretized_logistic_log_prob(level: Tensor, location: Tensor, log_scale: Tensor) -> Tensor:
    """log of a logistic's mass in the bin of each grey level 0.0 .. 255.0, the end bins open; broadcasts.

    Location and scale are in units where the levels span [-1, 1].
    With a, b the standardised bin edges, sigmoid(b) - sigmoid(a) = sigmoid(b) sigmoid(-a) (1 - e^(-(b - a))), and
    log(1 - e^(-d)) = log d - d/2 + log(sinh(d/2) / (d/2)): nothing cancels.
    """
    # in units of levels, where edges are exact in floats: neighbouring bins then share theirs to the bit
    centre, inverse_scale = 127.5 * (location + 1), torch.exp(-log_scale) / 127.5
    below = F.logsigmoid((level + 0.5 - centre) * inverse_scale)
    above = F.logsigmoid((centre - (level - 0.5)) * inverse_scale)
    inner = -log_scale - math.log(127.5) - inverse_scale / 2 + log_sinhc(inverse_scale / 2)
    return torch.where(level == 0, below, torch.where(level == 255, above, below + above + inner))


def clipped_logistic_mean(location: Tensor, log_scale: Tensor) -> Tensor:
    """E[clip(y, -1, 1)] of a logistic y, m = 2s artanh(tanh(location / 2s) tanh(1 / 2s)). Broadcasts, in [-1, 1].

    The integral of the CDF's complement, s log[(1 + e^((location + 1) / s)) / (1 + e^((location - 1) / s))] - 1, is the
    same and serves narrow scales, where tanh rounds to 1; the other serves wide ones, where the logarithms cancel.
    """
    wide = log_scale > 0  # each branch sees only scales of its own, or the gradient of the one not taken would be NaN
    s = torch.exp(torch.where(wide, 0.0, log_scale))
    narrow = s * (F.softplus((location + 1) / s) - F.softplus((location - 1) / s)) - 1
    r = torch.exp(-torch.where(wide, log_scale, 0.0)).clamp(min=1e-30)  # 1 / s; by there the mean is 0 in any float
    return torch.where(wide, 2 / r * torch.atanh(torch.tanh(location * r / 2) * torch.tanh(r / 2)), narrow)


def _location_for_mean(mean: Tensor, log_scale: Tensor) -> Tensor:
    """The location whose clipped_logistic_mean is 2 mean - 1: its formula solved for the location."""
    half = 0.5 * torch.exp(-log_scale)
    return torch.atanh(torch.tanh((2 * mean - 1) * half) / torch.tanh(half)) / half


def _log_scale(raw: Tensor) -> Tensor:
    return soft_floor(raw, -7.0)


def _level(x: Tensor) -> Tensor:
    """The grey level 0.0 .. 255.0 nearest to x in [0, 1]."""
    return torch.round(255 * x)


def _discretise(y: Tensor) -> Tensor:
    """The grey level whose bin holds y, in units where pixels span [-1, 1]; the end bins are open."""
    return _level((1 + y) / 2).clamp(0, 255)


# of each channel: which plane of couplings multiplies which channel before it
_COUPLINGS = ((), ((0, 0),), ((1, 0), (2, 1)))


def _centre(c: int, location: Tensor, coupling: Tensor | None, known: Sequence[Tensor]) -> Tensor:
    """Where channel c is centred given the values in [-1, 1] of those before it: (..., C, H, W) -> (..., H, W)."""
    centre = location.select(-3, c)
    if coupling is not None:
        for plane, channel in _COUPLINGS[c]:
            centre = centre + coupling.select(-3, plane) * known[channel]
    return centre


def _in_turn(location: Tensor, coupling: Tensor | None, value: Callable[[int, Tensor], Tensor]) -> Tensor:
    """value(c, centre of c given the values before it) of each channel in turn, stacked to (..., C, H, W)."""
    values: list[Tensor] = []
    for c in range(location.shape[-3]):
        values.append(value(c, _centre(c, location, coupling, values)))
    return torch.stack(values, dim=-3)


# Noise, from the caller's generator


def _dtype(like: Tensor) -> torch.dtype:
    """That of noise for a tensor: float32 at least, for bfloat16 has 256 uniform numbers and 0 is one of them."""
    return torch.promote_types(like.dtype, torch.float32)


def _uniform_like(like: Tensor, generator: torch.Generator) -> Tensor:
    return torch.rand(like.shape, generator=generator, device=generator.device, dtype=_dtype(like)).to(like.device)


def _exponential_like(like: Tensor, generator: torch.Generator) -> Tensor:
    empty = torch.empty(like.shape, device=generator.device, dtype=_dtype(like))
    return empty.exponential_(generator=generator).to(like.device)


def _logistic_like(like: Tensor, generator: torch.Generator) -> Tensor:
    """A difference of two Gumbels, that is the log of a ratio of exponentials."""
    return _exponential_like(like, generator).log() - _exponential_like(like, generator).log()
