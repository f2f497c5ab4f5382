"""A step with a VampPrior as training takes it, with numbers below 1e-38 taken as 0, against one that keeps them."""

from __future__ import annotations

import argparse
import statistics
import time

import torch
from pair import compose

from vae.engine.build import build


def measure(options: argparse.Namespace) -> dict[str, float]:
    """Milliseconds a step of the priors experiment's VampPrior on one thread, blocks of steps in turn; medians."""
    torch.set_num_threads(1)  # the setting is a thread's own
    data, module = build(compose("experiment=priors", "prior=vampprior", "objective.schedule.steps=1000"))
    optimizer, batch = module.make_optimizer(module.parameters()), data.examples("train", data.batch_size)
    noise, taken = torch.Generator().manual_seed(0), 0
    module.train()

    def block(flush: bool, steps: int) -> float:
        nonlocal taken
        torch.set_flush_denormal(flush)
        start = time.perf_counter()
        for _ in range(steps):
            optimizer.zero_grad()
            module.objective(module.vae, batch, noise, taken)["loss"].backward()
            optimizer.step()
            taken += 1
        return 1e3 * (time.perf_counter() - start) / steps

    steps, repetitions = (2, 2) if options.quick else (10, 15)
    block(True, 4 * steps)
    times = [(block(False, steps), block(True, steps)) for _ in range(repetitions)]
    torch.set_flush_denormal(False)
    kept, flushed = (statistics.median(ms) for ms in zip(*times, strict=True))
    ratio = statistics.median(f / k for k, f in times)
    return {"kept_ms": kept, "flushed_ms": flushed, "ratio": ratio, "repetitions": repetitions, "steps": steps}
