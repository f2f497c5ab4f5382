"""What is done to the operators of a traced step changes none of its bits, nor anything that it is given."""

import pytest
import torch
import torch.nn.functional as F
from torch.fx.experimental.proxy_tensor import make_fx

from vae.engine.operators import as_methods, in_place, without_aliases


def graph_of(function, *inputs):
    return make_fx(function)(*inputs)


def targets(module):
    return [str(node.target).removeprefix("aten.") for node in module.graph.nodes if node.op.startswith("call")]


def relu_and_its_gradient(x, w):
    x, w = x.requires_grad_(), w.requires_grad_()
    h = (x @ w).relu()
    return [*torch.autograd.grad(h.square().sum(), [x, w]), h.detach().sum(0)]


def smoothed_and_its_gradient(x):
    """The gradient of a mean over neighbours is of the same shape and of neighbours too."""
    x = x.requires_grad_()
    return torch.autograd.grad(F.avg_pool2d(x.sin(), 3, 1, 1).pow(3).sum(), [x])


@pytest.fixture
def noise():
    return torch.Generator().manual_seed(0)


CASES = {
    "a chain over its own memory": (lambda x, y: (x @ y).neg().exp().mul(2), ["neg_", "exp_", "mul_"]),
    "not over an input": (lambda x, y: x.neg() + y, ["add_"]),
    "not over a view of an input": (lambda x, y: x.t().neg() + y.t(), ["add_"]),
    "not over what is read again": (lambda x, y: ((h := x @ y).neg() - 1) * h, ["sub_", "mul_"]),
    "not over what is returned": (lambda x, y: ((h := x @ y), h.neg()), []),
    "not over what a view of it is read through": (lambda x, y: (h := x @ y)[0].sum() + h.neg(), []),
    "not where the result is larger": (lambda x, y: (x @ y).sum(0) + y, []),
    "not where the result is of another type": (lambda x, y: (x @ y) > 0, []),
    "over its own memory twice": (lambda x, y: (h := x @ y) * h, ["mul_"]),
    "not over what may be an input's memory": (lambda x, y: torch.ops.aten._unsafe_view(x, [4, 4]).neg() + y, ["add_"]),
}


@pytest.mark.parametrize("case", CASES)
def test_an_operator_writes_over_what_nothing_else_reads(noise, case):
    function, expected = CASES[case]
    x, y = torch.randn(4, 4, generator=noise), torch.randn(4, 4, generator=noise)
    before = x.clone(), y.clone()
    theirs = function(x, y)
    module = graph_of(function, x, y)
    in_place(module.graph)
    found = [name.split(".")[0] for name in targets(module)]
    assert [name for name in found if name.endswith("_") and name != "copy_"] == expected
    module.recompile()
    ours = module(x, y)
    for a, b in zip(ours, theirs, strict=True):
        assert torch.equal(a, b)
    assert torch.equal(x, before[0]) and torch.equal(y, before[1])


def test_an_operator_that_looks_at_neighbours_writes_elsewhere(noise):
    x = torch.randn(1, 1, 4, 4, generator=noise)
    theirs = smoothed_and_its_gradient(x)
    module = graph_of(smoothed_and_its_gradient, x.detach())
    without_aliases(module.graph)
    in_place(module.graph)
    assert "avg_pool2d_backward.default" in targets(module)
    module.recompile()
    assert torch.equal(torch.no_grad()(module)(x)[0], theirs[0])


def test_so_does_the_gradient_of_an_activation(noise):
    x, w = torch.randn(4, 5, generator=noise), torch.randn(5, 6, generator=noise)
    theirs = relu_and_its_gradient(x, w)
    module = graph_of(relu_and_its_gradient, x.detach(), w.detach())
    without_aliases(module.graph)
    in_place(module.graph)
    assert "threshold_backward.grad_input" in targets(module)
    module.recompile()
    for ours, expected in zip(torch.no_grad()(module)(x, w), theirs, strict=True):
        assert torch.equal(ours, expected)


def test_operators_are_called_as_methods_where_those_take_the_same_arguments(noise):
    def function(x, y):
        chosen = torch.where(x > 0, x, y)  # as a method it is asked of x
        first, second = torch.ops.aten.split.Tensor(chosen, 2)  # whose method is Python
        both = torch.cat([first.exp(), second.mul(y[2:])])  # which is no method
        return [torch.add(both, y, out=torch.empty(4, 4)), both.sum(0).expand(4, 4), both.clamp_min(0).mean([1])]

    x, y = torch.randn(4, 4, generator=noise), torch.randn(4, 4, generator=noise)
    theirs = function(x, y)
    module = graph_of(function, x, y)
    as_methods(module.graph)
    module.recompile()
    left = {
        str(node.target).split(".")[1] for node in module.graph.nodes if isinstance(node.target, torch._ops.OpOverload)
    }
    assert left >= {"where", "split", "cat", "add"}  # the last with `out`
    assert not left & {"gt", "exp", "mul", "sum", "expand", "clamp_min", "mean"}
    for ours, expected in zip(module(x, y), theirs, strict=True):
        assert torch.equal(ours, expected)


def test_another_name_of_a_tensor_is_left_out():
    x = torch.ones(2)
    module = graph_of(lambda x: x.exp().detach().neg(), x)
    assert {*targets(module)} & {"detach.default", "alias.default"}
    without_aliases(module.graph)
    assert targets(module) == ["exp.default", "neg.default"]
