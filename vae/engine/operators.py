"""The operators of a traced step, in fewer passes over memory and with less ado: to the same bits."""

from __future__ import annotations

import types
from typing import Any

import torch
from torch import Tensor
from torch.fx import Graph, Node

#: Operators that return the tensor they are given.
ALIASES = (torch.ops.aten.alias.default, torch.ops.aten.detach.default)
#: Operators that may return the memory they are given without saying so.
VIEWS = ("_unsafe_view", "_reshape_alias")


def without_aliases(graph: Graph) -> None:
    """Leave out what only gives a tensor another name."""
    for node in graph.nodes:
        if node.op == "call_function" and node.target in ALIASES:
            node.replace_all_uses_with(node.args[0])
            graph.erase_node(node)


def in_place(graph: Graph) -> None:
    """Let an operator that goes element by element write its result over what nothing else reads.

    The memory that a step of many runs passes through is more than a processor's cache holds.
    """
    own = set()  # what is in memory that no input shares
    for node in filter(_is_operator, graph.nodes):
        target: Any = node.target
        given: Any = node.args[0] if node.args else None
        returns = target._schema.returns
        if len(returns) == 1 and returns[0].alias_info is None and _name(node) not in VIEWS:
            own.add(node)
        is_read_last = isinstance(given, Node) and given in own and len(given.users) == 1
        if is_read_last and torch.Tag.pointwise in target.tags and _layout(given) == _layout(node):
            _write_over(node, given)


def _write_over(node: Node, given: Node) -> None:
    target: Any = node.target
    in_place = getattr(torch.ops.aten, f"{_name(node)}_", None)
    if in_place is not None and target._overloadname in in_place.overloads():
        node.target = getattr(in_place, target._overloadname)
    elif "grad_input" in target.overloadpacket.overloads():  # of an activation
        node.target, node.kwargs = target.overloadpacket.grad_input, {**node.kwargs, "grad_input": given}


def as_methods(graph: Graph) -> None:
    """Call each operator that is a method of tensors as one: torch finds the same operator in half the time."""
    for node in filter(_is_operator, graph.nodes):
        target: Any = node.target
        name, arguments = _name(node), target._schema.arguments
        is_method = isinstance(getattr(Tensor, name, None), types.MethodDescriptorType)  # and no function in Python
        if is_method and arguments[0].name == "self" and not any(argument.is_out for argument in arguments):
            node.op, node.target = "call_method", name


def _is_operator(node: Node) -> bool:
    return node.op == "call_function" and isinstance(node.target, torch._ops.OpOverload)


def _name(node: Node) -> str:
    """Of an operator, such as "mul"."""
    target: Any = node.target
    return str(target._schema.name.split("::")[1])


def _layout(node: Node) -> list[Any]:
    return [getattr(node.meta["tensor_meta"], of) for of in ("shape", "dtype", "stride")]
