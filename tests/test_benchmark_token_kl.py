"""benchmarks/token_kl.py: it counts what is alive, and the committed result holds what is claimed of the chunks."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest
import torch

# by its place: a package of that name may be installed
spec = importlib.util.spec_from_file_location("benchmark", Path(__file__).parents[1] / "benchmarks" / "token_kl.py")
benchmark = importlib.util.module_from_spec(spec)
spec.loader.exec_module(benchmark)

RESULT = Path(__file__).resolve().parent.parent / "benchmarks" / "results" / "token_kl.json"


def test_live_bytes_are_those_of_the_tensors_that_something_holds():
    with benchmark.LiveBytes() as live:
        a = torch.empty(1000, device="meta")
        b = a + 1  # 8,000 bytes
        view = b[:10]  # shares b's
        del a
        c = torch.empty(500, device="meta")  # 6,000
    assert live.peak == 8000
    assert sum(live.alive.values()) == 6000 and len(view) + len(c) == 510


@pytest.mark.slow
def test_chunks_need_at_most_an_eighth_of_the_plain_forms_memory():
    plain, chunked = (
        benchmark.counted_peak(form) for form in ("plain", "chunks of 64")
    )  # of 4,096 tokens, 128,000 words
    assert chunked < plain / 8


def test_the_committed_result_has_an_eighth_of_the_memory_and_gradients_to_1e_5():
    result = json.loads(RESULT.read_text())
    assert (result["vocabulary"], result["tokens"]) == (128_000, 4096)
    plain, ours = (result["forms"][form] for form in ("plain", "chunks of 64"))
    assert ours["counted_peak"] <= plain["counted_peak"] / 8
    assert max(ours["off"].values()) < 1e-5
    for row in result["forms"].values():  # what was counted is about what a process takes
        assert row["resident"] < 1.5 * row["counted_beyond_inputs"]
