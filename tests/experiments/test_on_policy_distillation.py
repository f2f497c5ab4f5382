"""Equal compute, one small distillation, and the claims on results that miss them."""

from __future__ import annotations

import copy

import pytest
import torch

from experiments.on_policy_distillation import claims, protocol
from experiments.rlhf_reward_hacking.language import LanguageModel
from vae.seeding import generator

METHODS = protocol.SHARED["methods"]


@pytest.fixture
def results():
    """As the claims would have it."""
    reverse = {"own": {"forward": 4.0, "jensen_shannon": 3.0, "reverse": 2.0}}
    reverse["text"] = {divergence: value + 5 for divergence, value in reverse["own"].items()}
    methods = {}
    for method in METHODS:
        where, _, divergence = method.partition(", ")
        kl = reverse.get(where, {}).get(divergence, 1.9 if where == "own" else 5.0)
        forward = 3.0 if method == "text, forward" else 6.0
        one = {"reverse": kl, "forward": forward, "teacher_nll": 1.0, "nll": 2.0, "updates": 10}
        methods[method] = [one] * 3
    start = [{"reverse": 20.0, "forward": 20.0, "teacher_nll": 3.0, "nll": 2.5}] * 3
    return {"teacher_nll": 1.5, "answer": 32, "start": start, "methods": methods}


def test_every_claim_holds_of_results_that_bear_it_out(results):
    found = claims.claims(results)
    assert len(found) == 6 and all(claim.holds for claim in found)
    assert len(claims.table(results).rows) == 1 + len(METHODS)


@pytest.mark.parametrize(
    ("method", "changed", "word"),
    [
        ("own, reverse", {"reverse": 3.5}, "token by token"),
        ("half own, jensen_shannon", {"reverse": 1.0}, "token by token"),
        ("own, forward", {"reverse": 9.5}, "forward: the student's own"),
        ("own, jensen_shannon", {"reverse": 8.5}, "jensen_shannon: the student's own"),
        ("text, reverse", {"reverse": 1.95}, "reverse: the student's own"),
        ("own, forward", {"forward": 2.0}, "the other way round"),
        ("own, reverse of whole answers", {"reverse": 2.1}, "whole answers ends no higher"),
    ],
)
def test_each_claim_misses_where_its_target_is_missed_in_one_seed(results, method, changed, word):
    damaged = copy.deepcopy(results)
    damaged["methods"][method][1] = {**damaged["methods"][method][1], **changed}
    assert [word in claim.name for claim in claims.claims(damaged) if not claim.holds].count(True) == 1


def test_methods_that_write_get_as_many_fewer_updates_as_writing_costs():
    student, teacher = LanguageModel(5, 4, generator(0)), LanguageModel(5, 8, generator(0))
    of_student, of_teacher = protocol.multiply_adds(student), protocol.multiply_adds(teacher)
    assert of_student == 3 * 4 * (32 + 4 + 2) + 5 * 5  # a GRU's weights and biases, and the head's
    for own in (0.0, 0.5, 1.0):
        updates = protocol.updates_at_equal_compute({"updates": 10_000}, own, student, teacher)
        cost = updates * (3 * of_student + of_teacher + own * of_student)
        assert cost == pytest.approx(10_000 * (3 * of_student + of_teacher), rel=1e-3)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.slow
def test_a_student_comes_nearer_to_its_teacher_by_every_method(method):
    noise = generator(0, "test")
    teacher, student = (LanguageModel(4, 8, generator(0, name)) for name in ("teacher", "student"))
    with torch.no_grad():
        teacher.head.weight.mul_(4)  # far from uniform
    text = torch.randint(4, (400,), generator=noise)
    settings = {"methods": METHODS, "updates": 30, "lr": 2e-2, "prompt": 2, "answer": 4, "batch": 32}

    def kl() -> float:
        prompts = text.view(-1, 2)
        with torch.no_grad():
            answers = student.generate(prompts, 4, 1, generator(1))
            both = [net.log_probs(prompts, answers) for net in (student, teacher)]
            return (both[0].exp() * (both[0] - both[1])).sum((-2, -1)).mean().item()

    before = kl()
    teacher.requires_grad_(False)
    updates = protocol.distil(student, teacher, text, settings, method, noise)
    assert 20 < updates <= 30 and kl() < 0.7 * before
