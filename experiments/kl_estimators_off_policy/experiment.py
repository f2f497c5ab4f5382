"""Which KL estimators stay right once the sampler is no longer the present policy, exactly and in a policy that learns."""

from __future__ import annotations

from experiments.kl_estimators_off_policy.claims import claims, table
from experiments.kl_estimators_off_policy.figure import figure
from experiments.kl_estimators_off_policy.protocol import SETTINGS, measure

PAPER = "Liu et al. 2025; Tang & Munos 2025; Amini et al. 2025; DeepSeek-V3.2 2025 (importance-weighted k3)"
CLAIM = (
    "Off-policy, k2 and k3 in the loss are biased for grad KL(pi || pi_ref), and exact with their importance ratio; with "
    "several steps a batch they carry a tuned policy beyond where the exact penalty holds it, and the corrected ones do not."
)

__all__ = ["CLAIM", "PAPER", "SETTINGS", "claims", "figure", "measure", "table"]
