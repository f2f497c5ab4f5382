"""`python -m experiments.kl_estimators_off_policy.page`: writes docs/which_kl.md from the committed results."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from experiments.kl_estimators_off_policy.estimators import ESTIMATORS
from experiments.kl_estimators_off_policy.exact import WORLDS, key
from vae.claims import Table
from vae.files import write_text

CHECKOUT = Path(__file__).resolve().parents[2]
RESULTS = CHECKOUT / "experiments" / "kl_estimators_off_policy" / "results" / "quick" / "results.json"
PAGE = CHECKOUT / "docs" / "which_kl.md"
ON, OFF = 0.0, 0.5  # distances on the path at which the table is taken
EXACT = 1e-12  # a bias below is rounding

# To paste into any trainer; each is held to the function of vae beside it.
SNIPPETS = {
    "In the loss, several optimiser steps a batch: w k3": '''\
import torch

def kl_in_loss(log_pi, log_old, log_ref, mask):
    """(B, L) log-probabilities of the tokens that pi_old drew; beta times this is added to the loss."""
    ratio = torch.exp(log_pi - log_old.detach())  # with its gradient
    log_r = log_ref.detach() - log_pi
    k3 = torch.expm1(log_r) - log_r
    return (ratio * k3).masked_fill(~mask, 0.0).sum(-1).mean()
''',
    "The same for the KL of whole answers: the ratio of all tokens so far": '''\
import torch

def sequence_kl_in_loss(log_pi, log_old, log_ref, mask):
    """Sees how a token changes what follows, on-policy too: there log_old is log_pi.detach()."""
    log_ratio = (log_pi - log_old.detach()).masked_fill(~mask, 0.0).cumsum(-1)
    log_r = log_ref.detach() - log_pi
    k3 = torch.expm1(log_r) - log_r
    return (torch.exp(log_ratio) * k3).masked_fill(~mask, 0.0).sum(-1).mean()
''',
    "In the reward: k1 of the present policy": '''\
def penalised(rewards, log_pi, log_ref, mask, beta):
    """rewards (B,). Recomputed at each optimiser step; the policy gradient beside it carries the ratio of the answer."""
    k1 = (log_pi - log_ref).detach().masked_fill(~mask, 0.0)
    return rewards - beta * k1.sum(-1)
''',
    "From the logits of both: exact, no noise of the token drawn": '''\
import torch

def exact_token_kl(logits, ref_logits, mask):
    """KL(pi || pi_ref) of each next token, (B, L, V) logits; in chunks: vae.token_kl.token_kl."""
    log_pi, log_ref = logits.float().log_softmax(-1), ref_logits.detach().float().log_softmax(-1)
    return (log_pi.exp() * (log_pi - log_ref)).sum(-1).masked_fill(~mask, 0.0).sum(-1).mean()
''',
    "From a teacher's k likeliest tokens: with a bucket for the rest": '''\
import torch

def truncated_kl(student_logits, indices, teacher_log_probs):
    """KL(teacher || student), never negative and at most the whole; indices and log-probabilities (..., k), k < V."""
    log_q = student_logits.float().log_softmax(-1)
    q = torch.cat([log_q.gather(-1, indices), log_q.scatter(-1, indices, -torch.inf).logsumexp(-1, keepdim=True)], -1)
    rest = torch.log1p(-teacher_log_probs.exp().sum(-1, keepdim=True))
    p = torch.cat([teacher_log_probs, rest], -1)
    return (p.exp() * (p - q)).sum(-1)
''',
}

TEXT = """\
# Which KL, and where

A policy pi is held to a reference pi_ref by KL(pi || pi_ref). Trainers estimate it in different ways, and put the estimate
in different places: as a number that is logged, in the reward, in the loss. Most are right only while the samples come
from the present policy. This page has the exact bias of each.

In short:

* In the **loss**, with several optimiser steps a batch: the importance ratio w = pi / pi_old times k3, with the gradient of
  w, or w held constant times k2. Their gradients are the same, sample by sample. k3 alone descends the *forward* KL, and k2
  alone is right on-policy only; k1 alone has no gradient on-policy and drives pi away from the sampler off-policy.
* Token by token, none of these sees how a token changes what follows. The product of the ratios **so far** (w of the
  prefix) does: the gradient is then that of the KL of whole answers, on-policy as well, where all ratios are 1 but have
  gradients. It costs variance that grows with the length: on small reused batches it did worse than the token's ratio.
* In the **reward**: k1 of the *present* policy, under the ratio of the whole answer. k1 of the policy that drew the
  samples, as it is usually computed once a batch, leaves out KL(pi || pi_old). k3 in the reward is right for neither
  direction.
* With the **logits** of both policies at hand, the exact KL of each next token has the same mean and less variance than any
  of these.
* To **log**: k3 near the reference; w k1 or w k3 where the samples are old.

k1 = log pi - log pi_ref, k2 = k1² / 2, k3 = exp(-k1) - 1 + k1, each at the tokens drawn.

## The table

Each cell is *bias (standard deviation of one sample)*, over the exact KL for a value, and over the norm of its gradient for
a reward or a loss. `exact` is a bias below 1e-12. By enumeration in float64: {token_vocabulary} words and one token, or
{vocabulary} words and answers of up to {length} tokens ({answers} of them); means over {seeds} draws of pi, pi_old and
pi_ref. On-policy pi_old is pi. Off-policy KL(pi || pi_old) is {token_away:.2f} nats for one token and {away:.2f} for answers,
whose whole ratio leaves {effective:.0%} of the samples effective. For one token the target is its own KL, for answers the KL
of the whole. In the rows on rewards the reward itself is 0.

{table}
Trainers were read in their code: TRL (July 2026), OpenRLHF and SkyRL (August 2026), verl (January 2026).

## To paste

{snippets}
## And

* float16 and bfloat16: subtract log-probabilities in float32. exp(12) is beyond float16.
* Tokens that the policy did not choose (the prompt, a tool's output) belong off the mask: neither their KL nor their ratio
  counts.
* Where a sampler cuts (top-p, top-k) or heats, log pi_old is that of *its* distribution: with the whole softmax each ratio
  is too large by one over the mass that was kept. `vae.token_kl.sampler_log_probs`.
* Bounded weights trade variance for bias: truncated at C they lack E_old[(w - C)+ f], masked beyond C all of E_pi[f; w > C].
  `vae.importance.importance_weights`.
* The sum over a teacher's k likeliest tokens, without a bucket for the rest, is no divergence and falls below 0.
  `vae.token_kl`.
* Jensen-Shannon with a share beta, as published, jumps at both ends; divided by beta (1 - beta) it meets both KLs.
  `vae.kl.jensen_shannon_categorical(scaled=True)`.

Written by `python -m experiments.kl_estimators_off_policy.page` from
[its results](../experiments/kl_estimators_off_policy/README.md); what the biases do to a policy that learns is told there.
"""


def cell(of: dict[str, list[float]], at: int) -> str:
    bias, sd = of["bias"][at], of["sd"][at]
    return f"{'exact' if bias < EXACT else f'{bias:.3f}'} ({'0' if sd < EXACT else f'{sd:.2f}'})"


def table(exact: dict[str, Any]) -> Table:
    on, off = (exact["distances"].index(distance) for distance in (ON, OFF))
    rows = []
    for estimator in ESTIMATORS:
        cells = [
            cell(exact["worlds"][world]["of"][key(estimator.place, estimator.name)], at)
            for world in WORLDS
            for at in (on, off)
        ]
        rows.append(
            (
                estimator.place,
                estimator.name,
                *cells,
                estimator.used,
                f"`{estimator.in_vae}`" if estimator.in_vae else "",
            )
        )
    heads = (
        "place",
        "estimator",
        "one token, on-policy",
        "off-policy",
        "answers, on-policy",
        "off-policy",
        "used by",
        "here",
    )
    return Table(heads, rows, numbers=False)


def page(results: dict[str, Any]) -> str:
    exact = results["exact"]
    off = exact["distances"].index(OFF)
    (token_vocabulary, _), (vocabulary, length) = WORLDS.values()
    token, answers = exact["worlds"].values()
    return TEXT.format(
        token_vocabulary=token_vocabulary,
        vocabulary=vocabulary,
        length=length,
        answers=exact["answers"],
        seeds=len(exact["seeds"]),
        token_away=token["to_sampler"][off],
        away=answers["to_sampler"][off],
        effective=answers["effective_samples"][off],
        table=table(exact).markdown(),
        snippets="\n".join(f"{title}:\n\n```python\n{code}```\n" for title, code in SNIPPETS.items()),
    )


def main() -> None:
    write_text(PAGE, page(json.loads(RESULTS.read_text())["results"]))


if __name__ == "__main__":
    main()
