"""The English in every Python, a character-level language model of it, a small classifier of topics, and distinct-n."""

from __future__ import annotations

import pydoc_data.topics
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vae.seeding import generator

STRINGS = {"strings", "string-methods", "formatstrings"}  # the topics that the reward is to recognise
TYPOGRAPHY = str.maketrans("’‘“”`", "''\"\"'")


# --- text -----------------------------------------------------------------------------------------------------------


class Paragraph(NamedTuple):
    """A paragraph of the language reference on one line, and whether it is about strings."""

    text: str
    strings: bool


def paragraphs() -> list[Paragraph]:
    """Every paragraph of prose once, in lower case, without grammars, sessions and what is less than 75% letters."""
    found: dict[str, Paragraph] = {}
    for topic, page in sorted(pydoc_data.topics.topics.items()):
        for paragraph in page.split("\n\n"):
            text = " ".join(paragraph.split()).translate(TYPOGRAPHY).lower()
            letters = sum(c.isalpha() or c == " " for c in text)
            if (
                len(text) >= 48
                and text.isascii()
                and letters >= 0.75 * len(text)
                and not {"::=", ">>>"} & {*text.split()}
            ):
                found.setdefault(text, Paragraph(text, topic in STRINGS))
    return list(found.values())


class Corpus(NamedTuple):
    """Paragraphs shuffled and split: what reference and classifier learn from, what the judge learns from, and neither."""

    reference: list[Paragraph]
    judge: list[Paragraph]
    held_out: list[Paragraph]
    alphabet: str

    def encode(self, part: list[Paragraph]) -> Tensor:
        """All of them as one line of characters each: (characters,) of indices into the alphabet."""
        index = {c: i for i, c in enumerate(self.alphabet)}
        return torch.tensor([index[c] for paragraph in part for c in paragraph.text + "\n"])

    def decode(self, characters: Tensor) -> str:
        return "".join(self.alphabet[i] for i in characters.tolist())


def corpus(seed: int) -> Corpus:
    """A twelfth is held out, the rest halved."""
    found = paragraphs()
    shuffled = [found[i] for i in torch.randperm(len(found), generator=generator(seed, "split")).tolist()]
    held_out = len(found) // 12
    half = (len(found) + held_out) // 2
    alphabet = "".join(sorted({"\n"}.union(*(paragraph.text for paragraph in found))))
    return Corpus(shuffled[held_out:half], shuffled[half:], shuffled[:held_out], alphabet)


def windows(text: Tensor, length: int, n: int, noise: torch.Generator) -> Tensor:
    """n stretches of `length` characters from anywhere in the text: (n, length)."""
    start = torch.randint(0, len(text) - length + 1, (n, 1), generator=noise)
    return text[start + torch.arange(length)]


# --- the language model ---------------------------------------------------------------------------------------------


class LanguageModel(nn.Module):
    """A GRU over characters; initial weights from `noise`."""

    def __init__(self, characters: int, width: int, noise: torch.Generator, embedding: int = 32) -> None:
        super().__init__()
        self.embedding = nn.Embedding(characters, embedding)
        self.gru = nn.GRU(embedding, width, batch_first=True)
        self.head = nn.Linear(width, characters)
        for name, weights in self.named_parameters():
            if name.startswith("embedding"):
                nn.init.normal_(weights, std=0.5, generator=noise)
            else:
                nn.init.uniform_(weights, -(width**-0.5), width**-0.5, generator=noise)
        for gate in self.gru.weight_hh_l0.chunk(3):
            nn.init.orthogonal_(gate, generator=noise)

    def forward(self, x: Tensor, state: Tensor | None = None, drop: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Characters (B, L) -> logits of the next ones (B, L, V), and the state after the last. drop: factors (B, L, H)."""
        hidden, state = self.gru(self.embedding(x), state)
        return self.head(hidden if drop is None else hidden * drop), state

    def log_probs(self, prompts: Tensor, answers: Tensor) -> Tensor:
        """log p(. | prompt, answer so far) at each character of the answers: (B, L, V).

        Answers to the same prompt stand next to each other, as many for each: prompts (B / group, P), answers (B, L).
        """
        group = len(answers) // len(prompts)
        of_prompt, state = self(prompts)
        of_answer, _ = self(answers[:, :-1], state.repeat_interleave(group, 1))
        logits = torch.cat([of_prompt[:, -1:].repeat_interleave(group, 0), of_answer], 1)
        return torch.log_softmax(logits, -1)

    @torch.no_grad()
    def generate(self, prompts: Tensor, length: int, group: int, noise: torch.Generator) -> Tensor:
        """`group` answers to each prompt, sampled at temperature 1: (B * group, length)."""
        logits, state = self(prompts)
        h, logits = state[0].repeat_interleave(group, 0), logits[:, -1].repeat_interleave(group, 0)
        # The GRU's own equations, with what one character contributes looked up in a table: half the time of nn.GRU.
        table = F.linear(self.embedding.weight, self.gru.weight_ih_l0, self.gru.bias_ih_l0)
        uniform = torch.rand(length, len(h), 1, generator=noise)
        answers = []
        for step in range(length):
            below = logits.softmax(-1).cumsum(-1)
            answers.append(torch.searchsorted(below, uniform[step], right=True).clamp(max=below.shape[-1] - 1)[:, 0])
            if step + 1 < length:
                x_r, x_z, x_n = table[answers[-1]].chunk(3, -1)
                h_r, h_z, h_n = F.linear(h, self.gru.weight_hh_l0, self.gru.bias_hh_l0).chunk(3, -1)
                candidate = torch.tanh(x_n + torch.sigmoid(x_r + h_r) * h_n)
                h = candidate + torch.sigmoid(x_z + h_z) * (h - candidate)
                logits = self.head(h)
        return torch.stack(answers, 1)


def pretrain(
    net: LanguageModel,
    text: Tensor,
    *,
    steps: int,
    batch: int,
    length: int,
    lr: float,
    dropout: float,
    noise: torch.Generator,
) -> None:
    """Maximum likelihood by AdamW, lr rising over a fifth of the steps and falling along a cosine."""
    optimizer = torch.optim.AdamW(net.parameters(), lr, betas=(0.9, 0.99), weight_decay=0.01, fused=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, steps, pct_start=0.2, cycle_momentum=False)
    for _ in range(steps):
        x = windows(text, length + 1, batch, noise)
        keep = torch.rand(batch, length, net.gru.hidden_size, generator=noise) >= dropout
        logits, _ = net(x[:, :-1], drop=keep / (1 - dropout))
        optimizer.zero_grad()
        F.cross_entropy(logits.flatten(0, 1), x[:, 1:].flatten()).backward()
        nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        optimizer.step()
        schedule.step()


@torch.no_grad()
def nats_a_character(net: LanguageModel, text: Tensor, length: int, warm_up: int = 16) -> float:
    """-log p of running text in pieces of `length`, the first `warm_up` characters of each given."""
    pieces = text[: len(text) // length * length].view(-1, length)
    log_probs = net.log_probs(pieces[:, :warm_up], pieces[:, warm_up:])
    return -log_probs.gather(-1, pieces[:, warm_up:, None]).mean().item()


# --- the proxy reward -----------------------------------------------------------------------------------------------


class Classifier(nn.Module):
    """The share of a text that looks as if it were about strings: between 0 and 1 at each position, averaged over them.

    A convolution over `span` characters, ReLU, softsign. Trained so that the share is the probability of the label.
    """

    def __init__(
        self, characters: int, noise: torch.Generator, embedding: int = 16, width: int = 64, span: int = 7
    ) -> None:
        super().__init__()
        self.embedding = nn.Embedding(characters, embedding)
        self.convolution = nn.Conv1d(embedding, width, span)
        self.head = nn.Linear(width, 1)
        nn.init.normal_(self.embedding.weight, std=0.3, generator=noise)
        for layer, fan_in in ((self.convolution, embedding * span), (self.head, width)):
            for weights in layer.parameters():
                nn.init.uniform_(weights, -(fan_in**-0.5), fan_in**-0.5, generator=noise)

    def forward(self, x: Tensor, drop: Tensor | None = None) -> Tensor:
        """Characters (B, L) -> (B,) in [0, 1]. drop: factors (B, 1, width)."""
        features = F.relu(self.convolution(self.embedding(x).transpose(1, 2))).transpose(1, 2)
        # Softsign, not the logistic: it saturates so slowly that a policy always has something left to gain.
        return 0.5 + 0.5 * F.softsign(self.head(features if drop is None else features * drop)).mean((-2, -1))


def snippets(text: Corpus, part: list[Paragraph], n: int, length: int, noise: torch.Generator) -> tuple[Tensor, Tensor]:
    """n stretches of paragraphs on strings and n of others: characters (2 n, length), labels (2 n,)."""
    drawn = [
        windows(text.encode([p for p in part if p.strings == strings]), length, n, noise) for strings in (True, False)
    ]
    return torch.cat(drawn), torch.arange(2).repeat_interleave(n).eq(0)


def fit_classifier(
    net: Classifier, x: Tensor, y: Tensor, *, epochs: int, batch: int, lr: float, dropout: float, noise: torch.Generator
) -> None:
    """Cross-entropy, AdamW."""
    optimizer = torch.optim.AdamW(net.parameters(), lr, weight_decay=0.05)
    for _ in range(epochs):
        for index in torch.randperm(len(x), generator=noise).split(batch):
            keep = torch.rand(len(index), 1, net.head.in_features, generator=noise) >= dropout
            optimizer.zero_grad()
            F.binary_cross_entropy(net(x[index], keep / (1 - dropout)), y[index].float()).backward()
            optimizer.step()


# --- repetition -----------------------------------------------------------------------------------------------------


def distinct(x: Tensor, n: int, pooled: bool = False) -> float:
    """Different n-grams of characters over all n-grams of texts (B, L), Li et al. 2016: the mean over texts, or pooled."""
    texts = [[tuple(gram) for gram in text] for text in x.unfold(1, n, 1).tolist()]
    if pooled:
        texts = [[gram for text in texts for gram in text]]
    return sum(len({*text}) / len(text) for text in texts) / len(texts)
