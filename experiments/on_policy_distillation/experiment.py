"""Distillation of a language model on given text and on what the student writes itself, by three divergences."""

from __future__ import annotations

from experiments.on_policy_distillation.claims import claims, table
from experiments.on_policy_distillation.figure import figure
from experiments.on_policy_distillation.protocol import SETTINGS, measure

PAPER = "Agarwal et al. 2024 (GKD); Gu et al. 2024 (MiniLLM)"
CLAIM = "At equal compute, reverse KL on the student's own answers lowers the KL of whole answers from student to teacher most."

__all__ = ["CLAIM", "PAPER", "SETTINGS", "claims", "figure", "measure", "table"]
