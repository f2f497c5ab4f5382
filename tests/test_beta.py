"""vae.beta: schedules at exact steps; controllers on the exact linear-Gaussian rate-distortion curve."""

from __future__ import annotations

import copy
import gzip
import math
from pathlib import Path

import numpy as np
import pytest
import torch

from vae.beta import GECO, AdaptiveKL, Constant, ControlVAE, Cosine, Cyclical, Linear, Schedule
from vae.errors import VAEError

# --- by the clock -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("schedule", "values"),
    [
        (Constant(), {0: 1, 10**7: 1, math.inf: 1}),
        (Constant(0.25), {0: 0.25, 5: 0.25}),
        (Linear(10), {0: 0, 1: 0.1, 5: 0.5, 9: 0.9, 10: 1, 11: 1, 10**7: 1, math.inf: 1}),
        (Linear(4, start=2.0, end=1.0), {0: 2, 1: 1.75, 4: 1, 5: 1}),
        (Linear(1000, end=25.0), {0: 0, 200: 5, 1000: 25, 2000: 25}),  # the capacity of Burgess et al. 2018
        (Cosine(12), {0: 0, 2: 0.5 - math.sqrt(3) / 4, 4: 0.25, 6: 0.5, 8: 0.75, 12: 1, 13: 1, math.inf: 1}),
        (Cosine(10, start=1.0, end=0.0), {0: 1, 5: 0.5, 10: 0}),
        (Cyclical(40), {0: 0, 1: 0.2, 4: 0.8, 5: 1, 9: 1, 10: 0, 12: 0.4, 30: 0, 39: 1, 40: 1, 43: 1, math.inf: 1}),
        (Cyclical(30, cycles=3, ramp=1.0), {0: 0, 5: 0.5, 9: 0.9, 10: 0, 29: 0.9, 30: 1}),
        (Cyclical(10, cycles=3), {0: 0, 3: 1, 4: 0.4, 6: 1, 7: 0.2}),  # cycles of 3 1/3 steps
    ],
)
def test_schedule_has_its_value_at_each_step(schedule, values):
    for step, value in values.items():
        assert schedule(step).item() == pytest.approx(value, abs=1e-6), step


def test_cycles_start_on_their_very_step_even_late_in_a_long_run():
    schedule = Cyclical(1_000_000, cycles=10)
    for cycle in range(10):
        assert schedule(100_000 * cycle).item() == 0
        assert schedule(100_000 * cycle + 25_000).item() == pytest.approx(0.5)
        assert schedule(100_000 * cycle + 99_999).item() == 1


def test_schedules_of_the_clock_are_unmoved_by_what_is_observed():
    for schedule in (Constant(), Linear(10), Cosine(10), Cyclical(10)):
        before = schedule(3)
        schedule.observe(rate=torch.tensor(100.0), distortion=torch.tensor(100.0))
        assert torch.equal(schedule(3), before)


# --- by feedback, one step by hand ------------------------------------------------------------------------------------


def test_geco_is_algorithm_1_of_the_paper_with_the_weight_as_one_over_lambda():
    target, alpha, eta = 10.0, 0.9, 0.01
    schedule = GECO(target, alpha=alpha, eta=eta)
    lam, average = 1.0, None
    for distortion in (14.0, 12.0, 9.0, 8.0, 11.0):
        constraint = distortion - target
        average = constraint if average is None else alpha * average + (1 - alpha) * constraint
        lam *= math.exp(eta * average)
        schedule.observe(rate=torch.tensor(1.0), distortion=torch.tensor(distortion))
        assert schedule(0).item() == pytest.approx(1 / lam, rel=1e-5)


def test_control_vae_is_the_papers_formula_between_its_bounds():
    schedule = ControlVAE(target=16.0, kp=0.01, ki=0.001, minimum=1.0, maximum=100.0)
    assert schedule(0).item() == 1.0
    total = 0.0
    for rate in (30.0, 25.0, 18.0, 16.0, 17.0):
        error = 16.0 - rate
        total += error
        schedule.observe(rate=torch.tensor(rate))
        expected = 0.01 / (1 + math.exp(error)) - 0.001 * total + 1.0
        assert schedule(0).item() == pytest.approx(expected, rel=1e-5)


def test_control_vae_climbs_to_its_set_point_over_the_warm_up():
    schedule = ControlVAE(target=10.0, kp=0.0, ki=0.01, maximum=100.0, warmup=4)
    total = 0.0
    for set_point in (0.0, 2.5, 5.0, 7.5, 10.0, 10.0):
        total += 20.0 - set_point
        schedule.observe(rate=torch.tensor(20.0))
        assert schedule(0).item() == pytest.approx(0.01 * total, rel=1e-5)


def test_control_vae_leaves_a_bound_as_soon_as_the_error_turns():
    schedule = ControlVAE(target=10.0, kp=0.0, ki=0.01)
    for _ in range(1000):
        schedule.observe(rate=torch.tensor(50.0))
    assert schedule(0).item() == 1.0
    schedule.observe(rate=torch.tensor(5.0))
    assert schedule(0).item() == pytest.approx(0.95)  # not after as many steps as it stood there
    for _ in range(1000):
        schedule.observe(rate=torch.tensor(5.0))
    assert schedule(0).item() == 0.0
    schedule.observe(rate=torch.tensor(20.0))
    assert schedule(0).item() == pytest.approx(0.1)


def test_adaptive_kl_is_the_reference_implementations_formula():
    schedule = AdaptiveKL(target=6.0, horizon=10_000, init=0.2, batch=256)
    value = 0.2
    for rate in (1.0, 5.9, 6.0, 6.5, 60.0, -3.0):  # a one-sample KL may be negative
        value *= 1 + min(max(rate / 6.0 - 1, -0.2), 0.2) * 256 / 10_000
        schedule.observe(rate=torch.tensor(rate))
        assert schedule(0).item() == pytest.approx(value, rel=1e-6)


def test_adaptive_kl_rises_on_overshoot_and_falls_on_undershoot():
    for rate, sign in ((7.0, 1), (5.0, -1), (6.0, 0)):
        schedule = AdaptiveKL(target=6.0)
        schedule.observe(rate=torch.tensor(rate))
        assert np.sign(schedule(0).item() - schedule.__class__(target=6.0)(0).item()) == sign


# --- by feedback, where they settle -----------------------------------------------------------------------------------


class LinearGaussianVAE:
    """Rate and distortion of the optimal linear VAE at a weight, in nats, from the covariance's eigenvalues.

    With noise variance s the active directions are those above w = weight * s; reverse water-filling (Lucas et
    al. 2019; Alemi et al. 2018). The network follows the weight with a lag of `lag` steps.
    """

    def __init__(self, eigenvalues: torch.Tensor, s: float = 0.01, lag: float = 5.0) -> None:
        self.eigenvalues, self.s, self.lag = eigenvalues, s, lag
        self.state = torch.stack(self.at(1.0))

    def at(self, weight: float) -> tuple[torch.Tensor, torch.Tensor]:
        water = weight * self.s
        rate = 0.5 * (self.eigenvalues / water).log().clamp(min=0).sum()
        squared_error = self.eigenvalues.clamp(max=water).sum()
        return rate, self.distortion(squared_error)

    def distortion(self, squared_error):
        return squared_error / (2 * self.s) + 0.5 * len(self.eigenvalues) * math.log(2 * math.pi * self.s)

    def squared_error(self, distortion) -> float:
        return 2 * self.s * (distortion - self.distortion(0.0))

    def train(self, schedule: Schedule, steps: int) -> tuple[float, float, float]:
        """weight * s, rate and squared error at the end."""
        for step in range(steps):
            self.state += (torch.stack(self.at(schedule(step))) - self.state) / self.lag
            schedule.observe(rate=self.state[0], distortion=self.state[1])
        return schedule(steps).item() * self.s, self.state[0].item(), self.squared_error(self.state[1].item())


def geometric_spectrum() -> torch.Tensor:
    """lambda_i = 5 * 0.9^i, i < 60: 38 of them lie above 0.1."""
    return 5.0 * 0.9 ** torch.arange(60, dtype=torch.float64)


def geometric_point(water: float = 0.1) -> tuple[float, float]:
    """Rate and squared error of that spectrum in closed form, by the sums of an arithmetic and a geometric series."""
    active = 38
    rate = 0.5 * (active * math.log(5.0 / water) + math.log(0.9) * active * (active - 1) / 2)
    return rate, active * water + 5.0 * (0.9**active - 0.9**60) / (1 - 0.9)


def test_the_simulated_curve_is_its_closed_form():
    rate, squared_error = geometric_point()
    model = LinearGaussianVAE(geometric_spectrum())
    assert model.at(10.0)[0].item() == pytest.approx(rate, rel=1e-12)
    assert model.squared_error(model.at(10.0)[1].item()) == pytest.approx(squared_error, rel=1e-9)


def controllers(model: LinearGaussianVAE, rate: float, squared_error: float) -> dict[str, tuple[Schedule, int]]:
    distortion = float(model.distortion(squared_error))
    active = int((model.eigenvalues > 0.1).sum())
    eta = 0.1 / 4 / (active * 10 / 2)  # the docstring's rule: (1 - alpha) / 4 over half a weight for each active unit
    return {
        "geco": (GECO(distortion, alpha=0.9, eta=eta), 600),
        "control_vae": (ControlVAE(rate, kp=0.01, ki=0.003, minimum=1.0, maximum=100.0), 1000),
        "adaptive_kl": (AdaptiveKL(rate, horizon=20, init=1.0), 600),
    }


@pytest.mark.parametrize("name", ["geco", "control_vae", "adaptive_kl"])
def test_controller_settles_on_the_exact_point_of_a_geometric_spectrum(name):
    model, (rate, squared_error) = LinearGaussianVAE(geometric_spectrum()), geometric_point()
    schedule, steps = controllers(model, rate, squared_error)[name]
    water, reached_rate, reached_error = model.train(schedule, steps)
    assert water == pytest.approx(0.1, rel=1e-2)
    assert reached_rate == pytest.approx(rate, rel=1e-2)
    assert reached_error == pytest.approx(squared_error, rel=1e-2)


@pytest.fixture(scope="module")
def mnist_eigenvalues(data_dir: Path) -> torch.Tensor:
    path = next((data_dir / "MNIST" / "raw").glob("train-images-idx3-ubyte*"))
    raw = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    x = torch.from_numpy(np.frombuffer(raw, np.uint8, offset=16).reshape(-1, 784).copy()).float() / 255
    x = x - x.mean(0)
    return torch.linalg.eigvalsh((x.T @ x / len(x)).double()).clamp(min=1e-12)


@pytest.mark.parametrize("name", ["geco", "control_vae", "adaptive_kl"])
@pytest.mark.slow
def test_controller_settles_on_the_published_point_of_mnist(mnist_eigenvalues, name):
    rate, squared_error = 45.109, 13.6441  # at beta s = 0.1, with 69 active directions
    model = LinearGaussianVAE(mnist_eigenvalues)
    schedule, steps = controllers(model, rate, squared_error)[name]
    water, reached_rate, reached_error = model.train(schedule, steps)
    assert water == pytest.approx(0.1, rel=1e-2)
    assert reached_rate == pytest.approx(rate, rel=1e-2)
    assert reached_error == pytest.approx(squared_error, rel=1e-2)


# --- what all of them keep --------------------------------------------------------------------------------------------

ALL = {
    "constant": Constant(0.5),
    "linear": Linear(10),
    "cosine": Cosine(10),
    "cyclical": Cyclical(40),
    "geco": GECO(10.0),
    "control_vae": ControlVAE(16.0),
    "adaptive_kl": AdaptiveKL(6.0, horizon=100),
}


def observe(schedule: Schedule, rate: float, distortion: float) -> None:
    schedule.observe(rate=torch.tensor(rate), distortion=torch.tensor(distortion))


@pytest.mark.parametrize("name", ALL)
def test_a_checkpoint_resumes_exactly(name):
    schedule = copy.deepcopy(ALL[name])
    for i in range(20):
        observe(schedule, 20.0 - i, 30.0 - i)
    resumed = copy.deepcopy(ALL[name])
    resumed.load_state_dict(schedule.state_dict())
    for i in range(20):
        observe(schedule, 3.0 * i, 2.0 * i)
        observe(resumed, 3.0 * i, 2.0 * i)
        assert torch.equal(schedule(i), resumed(i))


@pytest.mark.parametrize(
    "runs",
    [
        [Linear(10), Linear(5, start=0.2), Linear(20, end=3.0)],
        [Cyclical(40), Cyclical(20, cycles=2), Cyclical(10, ramp=1.0)],
        [GECO(10.0), GECO(20.0, eta=0.1), GECO(-5.0, alpha=0.0)],
        [ControlVAE(16.0), ControlVAE(1.0, ki=0.01, maximum=50.0), ControlVAE(9.0, warmup=3)],
        [AdaptiveKL(6.0), AdaptiveKL(2.0, horizon=10), AdaptiveKL(1.0, init=1.0, batch=256)],
    ],
    ids=lambda runs: type(runs[0]).__name__,
)
def test_a_stack_of_runs_is_a_stack_of_state(runs):
    _, stacked = torch.func.stack_module_state(runs)
    stacked = {name: value.clone() for name, value in stacked.items()}
    blank = copy.deepcopy(runs[0])

    class Told(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.schedule = blank

        def forward(self, step, rate, distortion):
            self.schedule.observe(rate=rate, distortion=distortion)
            return self.schedule(step)

    for step in range(12):
        rates, distortions = torch.tensor([20.0, 3.0, 8.0 - step]), torch.tensor([30.0, 10.0 - step, 1.0])
        prefixed = {f"schedule.{name}": value for name, value in stacked.items()}
        together = torch.vmap(
            lambda state, rate, distortion: torch.func.functional_call(Told(), state, (step, rate, distortion))  # noqa: B023
        )(prefixed, rates, distortions)
        for i, run in enumerate(runs):
            run.observe(rate=rates[i], distortion=distortions[i])
            torch.testing.assert_close(together[i], run(step), msg=f"run {i}, step {step}")


@pytest.mark.parametrize("name", ALL)
def test_no_number_leaves_the_device(name, monkeypatch):
    def refuse(*_):
        raise AssertionError("a tensor was read")

    schedule = copy.deepcopy(ALL[name])
    observed = {"rate": torch.tensor(3.0), "distortion": torch.tensor(5.0)}
    with monkeypatch.context() as patched:
        for way in ("item", "tolist", "numpy", "cpu", "__bool__", "__float__", "__int__", "__index__"):
            patched.setattr(torch.Tensor, way, refuse)
        schedule.observe(**observed)
        schedule(3)


@pytest.mark.parametrize("name", ALL)
def test_what_a_caller_does_to_the_weight_stays_with_the_caller(name):
    schedule = copy.deepcopy(ALL[name])
    before = schedule(3).clone()
    schedule(3).add_(1.0)
    assert torch.equal(schedule(3), before)
    assert not schedule(3).requires_grad


@pytest.mark.parametrize(
    "make",
    [
        lambda: Constant(-1.0),
        lambda: Constant(math.nan),
        lambda: Linear(0),
        lambda: Linear(-5),
        lambda: Linear(10, start=-0.1),
        lambda: Linear(10, end=math.inf),
        lambda: Cosine(0),
        lambda: Cosine(10, end=-1.0),
        lambda: Cyclical(0),
        lambda: Cyclical(10, cycles=0),
        lambda: Cyclical(10, ramp=0.0),
        lambda: Cyclical(10, ramp=1.5),
        lambda: GECO(math.nan),
        lambda: GECO(1.0, alpha=1.0),
        lambda: GECO(1.0, alpha=-0.1),
        lambda: GECO(1.0, eta=0.0),
        lambda: GECO(1.0, init=0.0),
        lambda: GECO(1.0, init=10.0, maximum=5.0),
        lambda: ControlVAE(0.0),
        lambda: ControlVAE(-3.0),
        lambda: ControlVAE(3.0, ki=0.0),
        lambda: ControlVAE(3.0, kp=-0.1),
        lambda: ControlVAE(3.0, minimum=2.0, maximum=1.0),
        lambda: ControlVAE(3.0, warmup=-1),
        lambda: AdaptiveKL(0.0),
        lambda: AdaptiveKL(6.0, horizon=0),
        lambda: AdaptiveKL(6.0, init=-0.2),
        lambda: AdaptiveKL(6.0, horizon=100, batch=256),
    ],
)
def test_options_out_of_range_are_refused(make):
    with pytest.raises(VAEError):
        make()


def test_geco_without_a_distortion_is_refused():
    with pytest.raises(VAEError, match="distortion"):
        GECO(1.0).observe(rate=torch.tensor(1.0))
