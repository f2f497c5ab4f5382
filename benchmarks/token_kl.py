"""`python -m benchmarks.token_kl`: memory, time and gradients of the exact next-token KL in chunks, beside the plain form.

The plain form makes both (tokens, V) blocks of logits, their log-softmaxes and their product at once;
`vae.token_kl.token_kl` makes a chunk's at a time, twice. Peak memory at full size is counted: the bytes of all tensors alive
after each operation, forward and backward, on the meta device, where nothing is computed and nothing allocated. Time,
gradients and the resident memory of a real process are measured on fewer tokens, values and gradients held to the plain
form in 64 bits. Writes results/token_kl.json and .md beside this file.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import resource
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakIdKeyDictionary

from vae.claims import Table
from vae.experiment import surroundings
from vae.files import write_json, write_text
from vae.token_kl import token_kl

HERE = Path(__file__).parent
VOCABULARY, WIDTH = 128_000, 256
TOKENS, MEASURED = 4096, 128
CHUNKS = (32, 64)


def plain(states: Tensor, head: nn.Module, ref_states: Tensor, ref_head: nn.Module) -> Tensor:
    """KL(pi || ref) as it is usually written: (tokens,)."""
    with torch.no_grad():
        log_ref = ref_head(ref_states).log_softmax(-1)
    log_pi = head(states).log_softmax(-1)
    return (log_pi.exp() * (log_pi - log_ref)).sum(-1)


def in_chunks(chunk: int) -> Callable[..., Tensor]:
    def of(states: Tensor, head: nn.Module, ref_states: Tensor, ref_head: nn.Module) -> Tensor:
        return token_kl(pi=states, ref=ref_states, pi_head=head, ref_head=ref_head, chunk=chunk)

    return of


FORMS = {"plain": plain, **{f"chunks of {chunk}": in_chunks(chunk) for chunk in CHUNKS}}


def inputs(
    tokens: int, vocabulary: int = VOCABULARY, device: str = "cpu"
) -> tuple[Tensor, nn.Module, Tensor, nn.Module]:
    """States and heads of a policy and of its reference, near each other as after some training."""
    torch.manual_seed(0)
    with torch.device(device):
        states, away = torch.randn(tokens, WIDTH), torch.randn(tokens, WIDTH)
        head, ref_head = (nn.Linear(WIDTH, vocabulary, bias=False) for _ in range(2))
    ref_head.load_state_dict(head.state_dict())
    return states.requires_grad_(), head, states.detach() + 0.3 * away, ref_head.requires_grad_(False)


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of all storages that operations made and something still holds; `peak` is the most there were."""

    def __init__(self) -> None:
        super().__init__()
        self.alive, self.peak = WeakIdKeyDictionary(), 0

    def count(self, *tensors: Any) -> None:
        for tensor in tree_leaves(tensors):
            if isinstance(tensor, Tensor):
                storage = tensor.untyped_storage()
                self.alive[storage] = storage.nbytes()
        self.peak = max(self.peak, sum(self.alive.values()))

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        self.count(made)
        return made


def counted_peak(form: str, tokens: int = TOKENS, vocabulary: int = VOCABULARY) -> int:
    """The most bytes alive at once, inputs and gradients included."""
    given = inputs(tokens, vocabulary, device="meta")
    with LiveBytes() as live:
        live.count(given[0], given[2], *given[1].parameters(), *given[3].parameters())
        FORMS[form](*given).mean().backward()
    return live.peak


def measured(form: str, tokens: int, dtype: torch.dtype = torch.float32) -> dict[str, Any]:
    """Seconds and resident bytes of value and gradients, in this process, which should be a fresh one."""
    torch.set_num_threads(1)
    FORMS[form](*inputs(2, 8)).mean().backward()  # whatever is loaded at first use
    states, head, ref_states, ref_head = inputs(tokens)
    states = states.detach().to(dtype).requires_grad_()
    given = (states, head.to(dtype), ref_states.to(dtype), ref_head.to(dtype))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    started = time.perf_counter()
    value = FORMS[form](*given)
    value.mean().backward()
    seconds = time.perf_counter() - started
    return {
        "seconds": seconds,
        "resident": 1024 * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before),
        "value": value.detach().double().numpy(),
        "gradient": states.grad.double().numpy(),
        "gradient_of_head": head.weight.grad[::1000].double().numpy(),
    }


def benchmark(tokens: int = MEASURED) -> dict[str, Any]:
    # freed blocks go back to the system at once, so that what is resident is what is alive
    os.environ["MALLOC_MMAP_THRESHOLD_"] = "1000000"
    with multiprocessing.get_context("spawn").Pool(1, maxtasksperchild=1) as pool:
        exact = pool.apply(measured, ("plain", tokens, torch.float64))
        found = {form: pool.apply(measured, (form, tokens)) for form in FORMS}
    rows = {}
    for form, one in found.items():
        off = {
            name: float(abs(one[name] - exact[name]).max() / abs(exact[name]).max())
            for name in ("value", "gradient", "gradient_of_head")
        }
        rows[form] = {
            "counted_peak": counted_peak(form),
            "counted_beyond_inputs": counted_peak(form, tokens) - 4 * WIDTH * 2 * (VOCABULARY + tokens),
            "resident": one["resident"],
            "seconds": round(one["seconds"], 2),
            "off": off,
        }
    return {"vocabulary": VOCABULARY, "width": WIDTH, "tokens": TOKENS, "measured_tokens": tokens, "forms": rows}


def table(results: dict[str, Any]) -> Table:
    plain_form = results["forms"]["plain"]
    rows = [
        (
            form,
            f"{row['counted_peak'] / 1e9:.2f} GB",
            f"1 / {plain_form['counted_peak'] / row['counted_peak']:.1f}",
            f"{row['resident'] / 1e9:.2f} GB ({row['counted_beyond_inputs'] / 1e9:.2f} counted)",
            f"{row['seconds']:.1f} s",
            f"{max(row['off'].values()):.0e}",
        )
        for form, row in results["forms"].items()
    ]
    n, few = results["tokens"], results["measured_tokens"]
    return Table(
        (
            "form",
            f"peak, {n:,} tokens",
            "of the plain",
            f"resident beyond inputs, {few} tokens",
            f"time, {few} tokens",
            "value and gradients off the 64-bit ones by",
        ),
        rows,
        f"Exact KL of {results['vocabulary']:,} words, value and gradients, float32, one thread",
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, default=MEASURED, help="tokens that are really computed (default 128)")
    results = benchmark(parser.parse_args().tokens)
    write_json(HERE / "results" / "token_kl.json", {**surroundings(), **results})
    text = table(results).markdown()
    write_text(HERE / "results" / "token_kl.md", text)
    print(text)


if __name__ == "__main__":
    main()
