"""Runs whose latents differ in size as one program: the tensors of each filled up with zeros to those of the largest.

A latent dimension that no weight is on has q(z|x) = N(0, 1), which is the prior, and nothing of it reaches the image: its
KL is 0, and at z = 0 so is log q(z|x) - log p(z). A mask on the gradient keeps its weights at 0, and a run is what it would
be without the dimension.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from vae.engine.draws import Unpackable
from vae.model import VAE, DiagonalFamily
from vae.objectives.elbo import Objective
from vae.priors import StandardNormal

#: Attributes of modules that follow from the size of the latent, or are the sizes of a tensor.
SIZES = ("latent_dim", "encoder_outputs", "in_features", "out_features")


def is_paddable(vae: VAE, objective: Objective) -> bool:
    """Whether latent dimensions without weights change nothing in a run."""
    gaussian = type(vae.posterior) is DiagonalFamily and type(vae.prior) is StandardNormal
    return objective.paddable and objective.regularizer is None and gaussian and not vae.spatial


def places(own: Sequence[int], full: Sequence[int], fewer: int, most: int) -> Tensor | None:
    """Where the numbers of a tensor of shape `own`, of a run with `fewer` latent dimensions, are in one of shape `full`, of a
    run with `most`: indices of shape `own` into the other, flattened. None where that cannot be told.

    Each side is as long in both; or the latent and then what both have, as labels; or a mean and a log-variance.
    """
    if len(own) != len(full):
        return None
    found = torch.arange(torch.Size(full).numel()).view(*full)
    for side, (a, b) in enumerate(zip(own, full, strict=True)):
        if a == b:
            continue
        if b - a == most - fewer and a >= fewer:
            of_side = torch.cat([torch.arange(fewer), torch.arange(most, b)])
        elif a == 2 * fewer and b == 2 * most:
            of_side = torch.cat([torch.arange(fewer), most + torch.arange(fewer)])
        else:
            return None
        found = found.index_select(side, of_side)
    return found


class Stacking:
    """Tensors of K runs, by name, as one of shape (K, ...), of which those of the runs become views.

    Where the runs' latents differ in size the one has zeros where a run has nothing, and those of the runs become views of
    another: `take_over` writes them into the one, and `hand_back` reads them from it. Raises Unpackable for tensors that
    differ otherwise.
    """

    def __init__(self, latent_dims: Sequence[int]) -> None:
        self.latent_dims = list(latent_dims)
        self.most = max(latent_dims)
        #: The number of a run whose tensors have the full size.
        self.largest = self.latent_dims.index(self.most)
        self._index: dict[str, Tensor] = {}  # of the numbers of all runs in the one tensor, flattened
        self._shapes: dict[str, list[torch.Size]] = {}
        self._masks: dict[str, Tensor] = {}  # (K, ...), 1 where a run has a number
        self._padded: list[tuple[Tensor, Tensor, Tensor]] = []  # the one, the index, those of the runs

    def together(self, name: str, of_runs: Sequence[Tensor]) -> Tensor:
        """Tensors of one name, or of one parameter, as one."""
        values = [value.detach() for value in of_runs]
        if len({value.shape for value in values}) == 1:
            stack = torch.stack(values)
            views: Sequence[Tensor] = stack.unbind()
        else:
            index, shapes = self._index_of(name, values)
            stack = values[0].new_zeros(len(values), *shapes[self.largest])
            own = torch.cat([value.flatten() for value in values])
            self._padded.append((stack, index, own))
            stack.view(-1).index_copy_(0, index, own)
            views = _in_shapes(own, shapes)
        for value, view in zip(of_runs, views, strict=True):
            value.data = view
        return stack

    def apart(self, name: str, stack: Tensor) -> Sequence[Tensor]:
        """Of a tensor (K, ...) such as a gradient, each run's own."""
        if name not in self._index:
            return stack.unbind()
        return _in_shapes(stack.flatten()[self._index[name]], self._shapes[name])

    def masked(self, name: str, gradient: Tensor) -> Tensor:
        """A gradient (K, ...) that is 0 where a run has no number."""
        return gradient * self._masks[name] if name in self._masks else gradient

    def take_over(self) -> None:
        """What was made of the runs' own tensors since the last `hand_back`."""
        for stack, index, own in self._padded:
            stack.detach().view(-1).index_copy_(0, index, own)

    def hand_back(self) -> None:
        """Let the runs' own tensors be what the stack has come to."""
        for stack, index, own in self._padded:
            torch.index_select(stack.detach().view(-1), 0, index, out=own)

    def filled_up(self, draw: Tensor, shape: torch.Size) -> Tensor:
        """A draw of one run in the shape that it has of the largest."""
        if draw.shape == shape:
            return draw
        if draw.shape[:-1] != shape[:-1] or shape[-1] != self.most:
            raise Unpackable("what it draws has another shape with another size of the latent")
        return F.pad(draw, (0, shape[-1] - draw.shape[-1]))

    def _index_of(self, name: str, values: Sequence[Tensor]) -> tuple[Tensor, list[torch.Size]]:
        if name not in self._index:
            full, parts = values[self.largest].shape, list[Tensor]()
            for run, (value, latent_dim) in enumerate(zip(values, self.latent_dims, strict=True)):
                part = places(value.shape, full, latent_dim, self.most)
                if part is None:
                    raise Unpackable(f"{name} has another shape with another size of the latent")
                parts.append(run * full.numel() + part.flatten())
            self._index[name] = torch.cat(parts).to(values[0].device)
            mask = values[0].new_zeros(len(values) * full.numel()).index_fill_(0, self._index[name], 1.0)
            self._masks[name] = mask.view(-1, *full)
            self._shapes[name] = [value.shape for value in values]
        return self._index[name], self._shapes[name]


def _in_shapes(numbers: Tensor, shapes: Sequence[torch.Size]) -> list[Tensor]:
    """Numbers in a row as tensors of these shapes, one after the other."""
    parts = numbers.split([shape.numel() for shape in shapes])
    return [part.view(shape) for part, shape in zip(parts, shapes, strict=True)]
