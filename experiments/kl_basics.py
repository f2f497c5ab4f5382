"""KL divergence by worked numbers: `python -m experiments.kl_basics`. A few seconds, nothing to download.

Two categoricals by hand, a policy penalty token by token, Schulman's three estimators as values and as losses, and the
three roles of KL in code to paste: a VAE's regulariser, distillation, a policy's penalty. Every number on the page is
computed here, and held to its known value in tests/test_kl_basics.py.
"""

from __future__ import annotations

import math
import sys
from typing import Any

import torch
import torch.nn.functional as F
from rich.console import Console, Group
from rich.markdown import Markdown
from rich.panel import Panel
from rich.syntax import Syntax
from rich.table import Table
from torch import Tensor

from vae.advantages import penalised_reward
from vae.kl import k1, k2, k3, kl_categorical, nats_to_bits

P, Q = torch.tensor([0.3, 0.5, 0.2]), torch.tensor([0.35, 0.4, 0.25])

REWARD, BETA = 2.5, 0.05
LOG_PI, LOG_REF = torch.tensor([-0.5, -1.2, -0.8, -0.3]), torch.tensor([-0.3, -0.5, -0.4, -0.2])

# What the README shows too, word for word; `role_of_...` below runs each on a problem whose answer is known.
SNIPPETS = {
    "vae": '''\
from vae.beta import Linear
from vae.kl import gaussian_kl_to_standard_normal

warm_up = Linear(steps=200)

def vae_loss(x, mean, log_var, reconstruction, step, beta=1.0):
    """x (B, pixels), mean and log_var (B, D) of q(z|x); nats per image, but for the Gaussian's constant."""
    distortion = 0.5 * (x - reconstruction).square().sum(-1)
    rate = gaussian_kl_to_standard_normal(mean, log_var).sum(-1)
    return (distortion + beta * warm_up(step) * rate).mean()
''',
    "distillation": '''\
import torch
from vae.distillation import Distillation

distil = Distillation(temperature=4.0, alpha=0.9, divergence="forward")

def distillation_loss(student, teacher, x, labels):
    """x (B, ...), labels (B,); student and teacher give logits (B, K), and only the student learns."""
    with torch.no_grad():
        teacher_logits = teacher(x)
    return distil(student_logits=student(x), teacher_logits=teacher_logits, labels=labels)["loss"]
''',
    "policy": '''\
from vae.policy import Reinforce

objective = Reinforce(beta=0.5, group_size=8)  # schedule=AdaptiveKL(target=6.0) would hold the KL instead

def policy_loss(logits, ref_logits, tokens, mask, rewards, step):
    """Logits (B, L, V) at the tokens (B, L) that the policy sampled; mask False on padding; rewards (B,)."""
    log_pi = logits.log_softmax(-1).gather(-1, tokens[..., None])[..., 0]
    log_ref = ref_logits.log_softmax(-1).gather(-1, tokens[..., None])[..., 0]
    return objective(rewards=rewards, log_pi=log_pi, log_ref=log_ref, mask=mask, step=step)["loss"]
''',
}


# --------------------------------------------------------------------------------------------------------- the numbers


def two_categoricals() -> dict[str, float]:
    """KL between P and Q in nats, through `vae.kl` and through every way in which `F.kl_div` is called."""
    numbers = {
        "KL(P||Q)": kl_categorical(p_probs=P, q_probs=Q),
        "KL(Q||P)": kl_categorical(p_probs=Q, q_probs=P),
        'F.kl_div(Q.log(), P, reduction="sum")': F.kl_div(Q.log(), P, reduction="sum"),
        'F.kl_div(Q.log(), P.log(), reduction="sum", log_target=True)': F.kl_div(
            Q.log(), P.log(), reduction="sum", log_target=True
        ),
        'F.kl_div(P.log(), Q, reduction="sum")': F.kl_div(P.log(), Q, reduction="sum"),
        'F.kl_div(Q, P, reduction="sum")': F.kl_div(Q, P, reduction="sum"),
        # what "mean" gives, without the warning that torch has for those who ask for it
        'F.kl_div(Q.log(), P, reduction="mean")': F.kl_div(Q.log(), P, reduction="none").mean(),
    }
    return {name: number.item() for name, number in numbers.items()}


def policy_penalty() -> dict[str, float]:
    """A reward of 2.5 for four tokens, penalised by 0.05 KL to the reference, and what k1 and k3 say of these tokens."""
    tokens = {"log_pi": LOG_PI, "log_ref": LOG_REF}
    batch = {name: value.unsqueeze(0) for name, value in tokens.items()}
    mask = torch.ones(1, 4, dtype=torch.bool)
    reward = penalised_reward(rewards=torch.tensor([REWARD]), mask=mask, beta=BETA, per="token", **batch)
    return {"k1": k1(**tokens).mean().item(), "k3": k3(**tokens).mean().item(), "loss": -reward.item()}


def schulman_table(mu: float, n: int, generator: torch.Generator) -> dict[str, dict[str, float]]:
    """Bias, its exact value, its standard error, and standard deviation, exact too, of k1, k2, k3; all over the true KL.

    q = N(0, 1) draws, p = N(mu, 1): KL(q || p) = mu^2 / 2. Schulman 2020; closed forms by the moments of log-normals.
    """
    x = torch.randn(n, generator=generator, dtype=torch.float64)
    log_pi, log_ref, true = -0.5 * x.square(), -0.5 * (x - mu).square(), mu**2 / 2
    exact = {
        "k1": (0.0, 2 / mu),
        "k2": (mu**2 / 4, math.sqrt(2 + mu**2)),
        "k3": (0.0, 2 * math.sqrt(math.expm1(mu**2) - mu**2) / mu**2),
    }
    table = {}
    for estimator in (k1, k2, k3):
        values = estimator(log_pi=log_pi, log_ref=log_ref) / true
        bias, deviation = exact[estimator.__name__]
        table[estimator.__name__] = {
            "bias": values.mean().item() - 1,
            "exact bias": bias,
            "standard error": values.std().item() / math.sqrt(n),
            "deviation": values.std().item(),
            "exact deviation": deviation,
        }
    return table


def gradients_as_losses(logits: Tensor, ref_logits: Tensor) -> dict[str, Tensor]:
    """E_pi[grad k] with the samples held fixed, exactly, by going through all of them; and grad KL in both directions."""
    logits = logits.clone().requires_grad_()
    log_pi, log_ref = logits.log_softmax(-1), ref_logits.log_softmax(-1)
    losses = {
        "reverse": kl_categorical(p_log_probs=log_pi, q_log_probs=log_ref),
        "forward": kl_categorical(p_log_probs=log_ref, q_log_probs=log_pi),
    }
    for estimator in (k1, k2, k3):
        losses[estimator.__name__] = (log_pi.exp().detach() * estimator(log_pi=log_pi, log_ref=log_ref)).sum()
    return {name: torch.autograd.grad(loss, logits, retain_graph=True)[0] for name, loss in losses.items()}


# ------------------------------------------------------------------------------------------------------ the three roles


def _snippet(name: str) -> dict[str, Any]:
    namespace: dict[str, Any] = {}
    exec(SNIPPETS[name], namespace)
    return namespace


def role_of_regulariser(generator: torch.Generator, steps: int = 400) -> dict[str, float]:
    """A linear VAE on x ~ N(0, diag(4, 1/2)) with noise variance 1: the rates tend to 1/2 log 4 and to 0, a collapse.

    Lucas et al. 2019: a latent is kept where the variance of the data exceeds that of the noise.
    """
    vae_loss, kl = _snippet("vae")["vae_loss"], _snippet("vae")["gaussian_kl_to_standard_normal"]
    encode, decode = torch.full((2,), 0.3), torch.full((2,), 0.3)
    log_var = torch.zeros(2)
    parameters = [p.requires_grad_() for p in (encode, decode, log_var)]
    optimiser = torch.optim.Adam(parameters, lr=0.05)
    decay = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, steps)
    deviation = torch.tensor([4.0, 0.5]).sqrt()
    for step in range(steps):
        x = deviation * torch.randn(512, 2, generator=generator)
        mean = encode * x
        z = mean + torch.exp(0.5 * log_var) * torch.randn(512, 2, generator=generator)
        optimiser.zero_grad()
        vae_loss(x, mean, log_var.expand_as(mean), decode * z, step).backward()
        optimiser.step()
        decay.step()
    x = deviation * torch.randn(20_000, 2, generator=generator)
    rates = kl(encode * x, log_var).mean(0)
    return {"rate 1": rates[0].item(), "exact 1": 0.5 * math.log(4), "rate 2": rates[1].item(), "exact 2": 0.0}


def role_of_teacher(generator: torch.Generator, steps: int = 150) -> dict[str, float]:
    """A linear student of a linear teacher, labels drawn from the teacher: KL(teacher || student) before and after."""
    distillation_loss = _snippet("distillation")["distillation_loss"]
    weights = torch.randn(8, 5, generator=generator)
    student_weights = torch.zeros(8, 5, requires_grad=True)
    x = torch.randn(1_000, 8, generator=generator)
    labels = torch.multinomial(torch.softmax(x @ weights, -1), 1, generator=generator).squeeze(-1)

    def divergence() -> float:
        return kl_categorical(p_logits=x @ weights, q_logits=(x @ student_weights).detach()).mean().item()

    before = divergence()
    optimiser = torch.optim.Adam([student_weights], lr=0.05)
    for _ in range(steps):
        optimiser.zero_grad()
        distillation_loss(lambda x: x @ student_weights, lambda x: x @ weights, x, labels).backward()
        optimiser.step()
    return {"before": before, "after": divergence()}


def role_of_penalty(generator: torch.Generator, steps: int = 250) -> dict[str, Tensor]:
    """A policy over four one-token answers: what REINFORCE reaches, and the optimum, pi_ref exp(reward / beta) / Z."""
    policy_loss = _snippet("policy")["policy_loss"]
    reference, reward = torch.tensor([0.4, 0.3, 0.2, 0.1]), torch.tensor([0.0, 0.5, 0.3, 0.6])
    logits = reference.log().requires_grad_()
    optimiser = torch.optim.Adam([logits], lr=0.05)
    decay = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, steps)
    mask = torch.ones(512, 1, dtype=torch.bool)
    for step in range(steps):
        tokens = torch.multinomial(torch.softmax(logits.detach(), -1), 512, replacement=True, generator=generator)
        tokens = tokens.unsqueeze(-1)
        optimiser.zero_grad()
        policy_loss(
            logits.expand(512, 1, 4), reference.log().expand(512, 1, 4), tokens, mask, reward[tokens[:, 0]], step
        ).backward()
        optimiser.step()
        decay.step()
    return {
        "reference": reference,
        "reached": torch.softmax(logits.detach(), -1),
        "optimum": torch.softmax(reference.log() + reward / 0.5, -1),
    }


# ------------------------------------------------------------------------------------------------------------- the page


def _table(*columns: str) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold cyan")
    for i, column in enumerate(columns):
        table.add_column(column, justify="left" if i == 0 else "right")
    return table


def _vector(values: Tensor, form: str = "+.4f") -> str:
    return "  ".join(f"{v:{form}}" for v in values.tolist())


def page_of_categoricals() -> Panel:
    n = two_categoricals()
    terms = _table("", "a", "b", "c", "sum")
    terms.add_row("P", *(f"{v:g}" for v in P.tolist()), "1")
    terms.add_row("Q", *(f"{v:g}" for v in Q.tolist()), "1")
    for name, p, q in (("KL(P||Q)", P, Q), ("KL(Q||P)", Q, P)):
        row = (p * (p / q).log()).tolist()
        total = f"[bold]{n[name]:.6f}[/] nats = {nats_to_bits(n[name]):.6f} bits"
        terms.add_row(f"{name}, term by term", *(f"{v:+.6f}" for v in row), total)
    calls = _table("the same through F.kl_div(input, target)", "", "")
    verdicts = {
        'F.kl_div(Q.log(), P, reduction="sum")': "[green]KL(P||Q)[/]",
        'F.kl_div(Q.log(), P.log(), reduction="sum", log_target=True)': "[green]KL(P||Q)[/]",
        'F.kl_div(P.log(), Q, reduction="sum")': "[yellow]KL(Q||P), the other direction[/]",
        'F.kl_div(Q, P, reduction="sum")': "[red]no KL at all: input must be a log[/]",
        'F.kl_div(Q.log(), P, reduction="mean")': "[red]KL(P||Q) / 3: the default is no KL[/]",
    }
    for call, verdict in verdicts.items():
        calls.add_row(call, f"{n[call]:.6f}", verdict)
    note = Markdown(
        "`F.kl_div` takes the **second** distribution first, and as a logarithm. `vae.kl.kl_categorical(p_probs=P, "
        "q_probs=Q)` takes both by name, in any of three forms, and has no other order to get wrong."
    )
    return Panel(Group(terms, "", calls, "", note), title="1  Two categoricals, both directions")


def page_of_penalty() -> Panel:
    n = policy_penalty()
    table = _table("token", "1", "2", "3", "4", "mean")
    tokens = {"log_pi": LOG_PI, "log_ref": LOG_REF}
    rows = {"log pi": LOG_PI, "log pi_ref": LOG_REF, "k1 = log pi - log pi_ref": k1(**tokens)}
    rows["k3 = pi_ref/pi - 1 - log pi_ref/pi"] = k3(**tokens)
    for name, values in rows.items():
        mean = f"[bold]{values.mean():+.4f}[/]" if name.startswith("k") else ""
        table.add_row(name, *(f"{v:+.4f}" for v in values.tolist()), mean)
    note = Markdown(
        f"loss = -(reward - beta k1) = -({REWARD} - {BETA} * {n['k1']:.2f}) = **{n['loss']:.4f}**\n\n"
        "A KL divergence is never negative, but this is none: it is k1, one sample a token, and every one of these tokens "
        "is one that the current policy finds *less* likely than the reference does. Averaged over tokens that the policy "
        "itself draws, the sign turns; here the penalty pays a bonus instead. k3 of the same tokens is "
        f"**{n['k3']:.4f}**: it has the same mean over samples and no sample below zero."
    )
    return Panel(Group(table, "", note), title="2  The policy penalty, token by token")


def page_of_estimators(generator: torch.Generator) -> Panel:
    table = _table("over the true KL", "bias", "exact", "deviation", "exact", "published")
    published = {0.1: ("20", "1.42", "1.42"), 1.0: ("2", "1.73", "1.7")}
    for mu in (0.1, 1.0):
        for (name, row), paper in zip(schulman_table(mu, 1_000_000, generator).items(), published[mu], strict=True):
            table.add_row(
                f"mu = {mu:g}  {name}",
                f"{row['bias']:+.4f} ± {row['standard error']:.4f}",
                f"{row['exact bias']:.4f}",
                f"{row['deviation']:.4f}",
                f"{row['exact deviation']:.4f}",
                paper,
            )
    gradients = gradients_as_losses(torch.tensor([0.5, 0.0, -1.0]), torch.tensor([-0.5, 0.8, 0.0]))
    losses = _table("as a loss, samples held fixed", "expected gradient, exactly", "")
    losses.add_row("k1", _vector(gradients["k1"]), "[red]nothing to learn from[/]")
    losses.add_row("k2", _vector(gradients["k2"]), "[green]the reverse KL's[/]")
    losses.add_row("k3", _vector(gradients["k3"]), "[yellow]the forward KL's[/]")
    losses.add_row("grad KL(pi||pi_ref), reverse", _vector(gradients["reverse"]))
    losses.add_row("grad KL(pi_ref||pi), forward", _vector(gradients["forward"]))
    note = Markdown(
        "Log k3 near the reference and k1 far from it. Put k1 in the **reward** or k2 in the **loss**, never k1 in the loss "
        "as it is. Once the samples are not the present policy's, k2 and k3 need their importance ratio (docs/which_kl.md)."
    )
    return Panel(Group(table, "", losses, "", note), title="3  Schulman's estimators, as values and as losses")


def page_of_roles(generator: torch.Generator) -> list[Panel]:
    vae, teacher, policy = role_of_regulariser(generator), role_of_teacher(generator), role_of_penalty(generator)
    results = {
        "vae": (
            "4  Role one: the regulariser of a VAE.  reverse, KL(q(z|x) || p(z))",
            f"On N(0, diag(4, 1/2)) the rates come to **{vae['rate 1']:.4f}** and **{vae['rate 2']:.4f}** nats; exactly "
            f"1/2 log 4 = {vae['exact 1']:.4f}, and 0: a latent that is not worth its nats collapses.",
        ),
        "distillation": (
            "5  Role two: distillation.  forward, KL(teacher || student)",
            f"A linear student of a linear teacher: **{teacher['before']:.4f}** nats from it before, "
            f"**{teacher['after']:.4f}** after.",
        ),
        "policy": (
            "6  Role three: the penalty on a policy.  reverse, KL(pi || pi_ref)",
            f"Four one-token answers. Reference `{_vector(policy['reference'], '.4f')}`, reached "
            f"`{_vector(policy['reached'], '.4f')}`, optimum pi_ref exp(reward / beta) / Z "
            f"`{_vector(policy['optimum'], '.4f')}`.",
        ),
    }
    return [Panel(Group(_code(SNIPPETS[name]), Markdown(text)), title=title) for name, (title, text) in results.items()]


def _code(source: str) -> Syntax:
    return Syntax(source, "python", theme="ansi_dark", background_color="default", word_wrap=True)


def main(console: Console | None = None) -> None:
    console = console or Console(width=None if sys.stdout.isatty() else 120)
    generator = torch.Generator().manual_seed(0)
    console.print(page_of_categoricals(), page_of_penalty(), page_of_estimators(generator), *page_of_roles(generator))


if __name__ == "__main__":
    main()
