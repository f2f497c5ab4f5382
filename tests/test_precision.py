"""The widest numbers of a device."""

from __future__ import annotations

import torch

from vae.precision import wide, widest


def test_numbers_are_float64_except_where_a_device_has_none():
    assert widest(torch.device("mps", 0)) == torch.float32
    assert widest(torch.device("cuda", 1)) == widest(torch.device("cpu")) == torch.float64
    assert wide(torch.tensor([True, False])).dtype == torch.float64
