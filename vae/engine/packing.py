"""Packed runs: each trained by its own Trainer in its own folder, as ever, but for the steps, which are taken together.

A run that takes turns (`vae.engine.turns`) collects the batches up to the next step after which anything looks at it, and
asks for them to be trained on. `Pack` answers all that have the same structure and are at the same step at once, by a
`Stack`. Whatever else happens to a run, such as its validation, checkpoints, pictures or its end, happens in its own turn.
"""

from __future__ import annotations

import collections
import functools
import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from pytorch_lightning.loops.fetchers import _DataFetcher
from pytorch_lightning.plugins.precision import Precision
from torch import Tensor

from vae.data.images import Batch, Loaded
from vae.data.module import ImageDataModule
from vae.engine import turns
from vae.engine.checkpoints import Interruptible
from vae.engine.draws import Unpackable
from vae.engine.lean import LeanLoop
from vae.engine.module import VAEModule
from vae.engine.padding import is_paddable
from vae.engine.stack import Member, Stack
from vae.engine.structure import signature
from vae.engine.working_memory import bytes_of_run, free_bytes

MOST_BYTES = 64 * 2**20  # of the loaded batches of a run that wait to be trained on
#: Weights times images by which a size of the latent may lengthen a step on a CPU by being padded, and needs no stack of its
#: own: six operations each, a third of a millisecond, against half a millisecond that a stack's operators cost by themselves.
MOST_PADDING = 4_000_000
MOST_SECONDS = 1.0  # that a pack trains before its runs may look whether a checkpoint is due


@dataclass
class Request:
    """What a run asks for: to be trained on these batches. Runs of the same `key` can be, at once."""

    member: Member
    batches: list[Loaded]
    step: int
    structure: str
    alone: str | None = None  # why it must be trained by itself, if it must
    padded: str | None = None  # the structure but for the size of the latent, if that may differ

    def key(self, padded: bool) -> tuple[Any, ...]:
        """What requests that can be answered at once have in common; padded: their latents may differ in size."""
        structure = self.padded if padded and self.padded is not None else self.structure
        return structure, self.step, tuple(batch.size for batch in self.batches)

    @property
    def latent_dim(self) -> int:
        return self.member.vae.latent_dim

    @property
    def weights(self) -> int:
        return sum(parameter.numel() for parameter in self.member.both.parameters())


@dataclass
class Answer:
    """The terms of the steps that were taken; the run takes those that are left, and with `alone` all later ones, itself."""

    terms: list[dict[str, Tensor]] = field(default_factory=list)
    alone: bool = False
    most: int | None = None  # steps to ask for at once from now on


class PackedLoop(LeanLoop):
    """LeanLoop for a run that takes turns: several batches at a time where nothing looks at the run in between."""

    _alone = False
    _most: int | None = None

    def on_run_start(self, data_fetcher: _DataFetcher) -> None:
        super().on_run_start(data_fetcher)
        owners = [getattr(hook, "func", hook).__self__ for name in self.HOOKS for hook in self._hooks[name]]
        module = self.trainer.lightning_module
        trainer: Any = self.trainer
        if self._plain and turns.CURRENT is not None and type(trainer.datamodule) is ImageDataModule:
            trainer.train_dataloader.unread = True
        self._each_step = any(not (_is_interruptible(owner) or owner is module) for owner in owners)

    def advance(self, data_fetcher: _DataFetcher) -> None:
        seat = turns.CURRENT
        if seat is None or self._alone or self.restarting:
            super().advance(data_fetcher)
            return
        if not self._plain:
            seat.ask(Request(self._member, [], 0, "", "something in its trainer asks for Lightning's own loop"))
            self._alone = True
            super().advance(data_fetcher)
            return
        self.val_loop.restarting = False
        waiting = self._batches(data_fetcher)
        module: Any = self.trainer.lightning_module
        answer = seat.ask(
            Request(
                self._member,
                [batch for batch, _ in waiting],
                module.steps,
                self._structure,
                self._why_alone,
                self._padded,
            )
        )
        self._alone, self._most = answer.alone, answer.most
        done = len(answer.terms)
        for (batch, is_last), terms in zip(waiting[:done], answer.terms, strict=True):
            self._count(batch, is_last, terms)
        if done:
            self._after(waiting[done - 1][0])
        for batch, is_last in waiting[done:]:
            self.take(batch, is_last)
        self._batches_that_stepped += len(waiting) - 1

    # --- before -----------------------------------------------------------------------------------------------------

    def _batches(self, data_fetcher: _DataFetcher) -> list[tuple[Loaded, bool]]:
        """The batches up to the next step after which anything looks, and whether each is the last of the epoch."""
        found: list[tuple[Loaded, bool]] = []
        while not found or not (found[-1][1] or self._is_looked_at(found)):
            batch, _, _ = next(data_fetcher)
            found.append((batch, data_fetcher.done))
        return found

    def _is_looked_at(self, found: Sequence[tuple[Loaded, bool]]) -> bool:
        trainer: Any = self.trainer
        taken = len(found)
        steps = trainer.lightning_module.steps + taken
        every = [trainer.log_every_n_steps, *(c.every_n_steps for c in trainer.callbacks if _is_interruptible(c))]
        first = found[0][0]
        size = first.x.numel() * first.x.element_size() if isinstance(first, Batch) else 0
        return (
            any(n and steps % n == 0 for n in every)
            or taken >= (self._most or 1)
            or taken * size >= MOST_BYTES
            or 0 <= trainer.max_steps <= trainer.global_step + taken
            or self._may_validate(taken)
            or self.batch_idx + 1 + taken >= trainer.num_training_batches
            or self._each_step
        )

    @functools.cached_property
    def _why_alone(self) -> str | None:
        """Why this run must be trained by itself, if it must."""
        module: Any = self.trainer.lightning_module
        objective = module.objective
        if objective.unpackable:
            return f"{type(objective).__name__}: {objective.unpackable}"
        if module.vae.posterior.unpackable:
            return f"{type(module.vae.posterior).__name__}: {module.vae.posterior.unpackable}"
        for name in self.HOOKS:
            if name != "on_train_batch_end" and self._hooks[name]:
                owner = getattr(self._hooks[name][0], "func", self._hooks[name][0]).__self__
                return f"{type(owner).__name__} looks into each step ({name})"
        if type(module).training_step is not VAEModule.training_step:
            return f"{type(module).__name__} has a training_step of its own"
        return None

    @functools.cached_property
    def _member(self) -> Member:
        trainer: Any = self.trainer
        module, clip = trainer.lightning_module, None
        if trainer.gradient_clip_val:
            clip = (str(getattr(trainer.gradient_clip_algorithm, "value", None) or "norm"), trainer.gradient_clip_val)
        precision = trainer.precision_plugin
        options = {} if type(precision) is Precision else {"context": precision.train_step_context}
        return Member(module.vae, module.objective, trainer.optimizers[0], trainer.datamodule, clip, **options)

    @functools.cached_property
    def _structure(self) -> str:
        return signature(self._member, self.trainer)

    @functools.cached_property
    def _padded(self) -> str | None:
        member = self._member
        paddable = is_paddable(member.vae, member.objective)
        return signature(member, self.trainer, sizes=False) if paddable else None

    # --- after ------------------------------------------------------------------------------------------------------

    def _count(self, batch: Loaded, is_last: bool, terms: dict[str, Tensor]) -> None:
        """What `take` does of a step, but for training and for the hooks of an owner that does not look yet."""
        progress, optimizer = self.batch_progress, self.automatic_optimization.optim_progress.optimizer
        progress.is_last_batch = is_last
        progress.increment_ready()
        progress.increment_started()
        optimizer.step.increment_ready()
        optimizer.zero_grad.increment_ready()
        optimizer.zero_grad.increment_started()
        optimizer.zero_grad.increment_completed()
        optimizer.step.increment_completed()
        progress.increment_processed()
        module: Any = self.trainer.lightning_module
        connector, results = self.trainer._logger_connector, self._results
        connector._first_loop_iter = connector._first_loop_iter is None
        results.batch = results.batch_size = results.dataloader_idx = None
        module.logged = False
        module._current_fx_name = "training_step"
        module.note(batch.size, terms)
        self._loss = terms["loss"]
        progress.increment_completed()

    def _after(self, batch: Loaded) -> None:
        """What follows the last of the steps that were taken together."""
        trainer: Any = self.trainer
        connector, number = trainer._logger_connector, self.batch_idx
        self._update_schedules()
        if self._each_step:  # someone may look at it
            batch = self._results.batch = self._member.prepared(batch, trainer.strategy.root_device)
        self._call("on_train_batch_end", {"loss": self._loss}, batch, number)
        trainer.lightning_module._current_fx_name = None
        if trainer.lightning_module.logged:
            connector.on_batch_end()
        self._results.batch = self._results.batch_size = None
        if connector.should_update_logs or trainer.fast_dev_run:
            connector.update_train_step_metrics()


def _is_interruptible(callback: Any) -> bool:
    return type(callback) is Interruptible


# --- who is answered when ---------------------------------------------------------------------------------------------


class Pack:
    """Runs jobs, each of which may train, in turns in this process; those that can be are trained together.

    names: of the jobs, as they are spoken of. Says in one line each how many runs are trained together, and which are
    not, with the reason.
    """

    def __init__(self, names: Sequence[str]) -> None:
        self.names = names
        self.log = logging.getLogger(__name__)
        self._stack: tuple[list[turns.Seat], Stack] | None = None
        self._told: set[int] = set()  # the runs that it was said of
        self._unpaddable: set[str | None] = set()  # structures that were found to be so

    def run(self, jobs: Sequence[Callable[[], Any]], swap: Callable[[Any], Any] = lambda around: around) -> list[Any]:
        """What the jobs return. Whatever one raises ends all of them, each where it stands, and is raised again."""
        seats = [turns.Seat(job, swap) for job in jobs]
        self.numbers = {id(seat): number for number, seat in enumerate(seats)}
        try:
            pending = [seat for seat in seats if seat.resume()]
            self._tell_apart(pending)
            while pending:
                together, answers = self._answer(pending)
                rest = [seat for seat in pending if seat not in together]
                pending = [seat for seat, answer in zip(together, answers, strict=True) if seat.resume(answer)] + rest
        except BaseException as error:
            for seat in seats:
                while seat.request is not None:
                    try:
                        seat.stop(KeyboardInterrupt() if isinstance(error, KeyboardInterrupt | SystemExit) else error)
                    except BaseException as own:
                        self.log.debug(f"{type(own).__name__} ended a run")
            raise
        finally:
            self._stack = None
        return [seat.result for seat in seats]

    def _partners(self, pending: Sequence[turns.Seat]) -> list[turns.Seat]:
        """Of the first that waits and all that can be trained with it, those that gain by it."""
        first: Request = pending[0].request
        if first.alone:
            return [pending[0]]
        padded = first.padded not in self._unpaddable
        alike = [s for s in pending if not s.request.alone and s.request.key(padded) == first.key(padded)]
        of_size = collections.defaultdict[int, list[turns.Seat]](list)
        for seat in alike:
            of_size[seat.request.latent_dim].append(seat)
        most = of_size[max(of_size)][0].request.weights
        gaining = {
            latent_dim
            for latent_dim, seats in of_size.items()
            if len(seats) * (most - seats[0].request.weights) * first.batches[0].size <= MOST_PADDING
            or next(first.member.both.parameters()).device.type != "cpu"
        }
        return [seat for seat in alike if seat.request.latent_dim in gaining]

    def _tell_apart(self, pending: Sequence[turns.Seat]) -> None:
        left, apart = list(pending), collections.defaultdict[str, list[int]](list)
        while left:
            together = self._partners(left)
            left = [seat for seat in left if seat not in together]
            if len(together) == 1:
                reason = together[0].request.alone or "no other run of the sweep has its structure"
                apart[reason].append(self.numbers[id(together[0])])
        for reason, numbers in apart.items():
            self._say_alone(numbers, reason)

    def _say_alone(self, numbers: Sequence[int], reason: str) -> None:
        named = ", ".join(self.names[number] for number in numbers[:3]) + (", ..." if len(numbers) > 3 else "")
        runs = "1 run is trained by itself" if len(numbers) == 1 else f"{len(numbers)} runs are trained by themselves"
        self.log.warning(f"Not packed: {runs} ({named}): {reason}.")

    def _answer(self, pending: Sequence[turns.Seat]) -> tuple[list[turns.Seat], list[Answer]]:
        together = self._partners(pending)
        if len(together) == 1:
            together[0].moment = None
            return together, [Answer(alone=True)]
        started = time.monotonic()
        try:
            if self._stack is None or self._stack[0] != together:
                self._stack = None
                together = self._fitting(together)
                self._stack = together, Stack([seat.request.member for seat in together])
            requests = [seat.request for seat in together]
            blocks = list(zip(*(request.batches for request in requests), strict=True))
            terms = self._stack[1].train(blocks, requests[0].step)
        except Exception as error:
            self._stack = None
            if len({seat.request.latent_dim for seat in together}) > 1:
                self.log.debug(f"Latents of other sizes are not padded: {reason_of(error)}")
                self._unpaddable.add(together[0].request.padded)
                self._tell_apart(together)
                return self._answer(pending)
            self._say_alone([self.numbers[id(seat)] for seat in together], reason_of(error))
            for seat in together:
                seat.moment = None
            return together, [Answer(alone=True) for _ in together]
        if not any(id(seat) in self._told for seat in together):
            self._told |= {id(seat) for seat in together}
            sizes = sorted({seat.request.latent_dim for seat in together})
            padded = f", latents of {', '.join(map(str, sizes[:-1]))} padded to {sizes[-1]}" if len(sizes) > 1 else ""
            self.log.info(f"Packed: {len(together)} runs are trained as one program{padded}.")
        ended = time.monotonic()
        seconds = ended - started
        most = max(1, int(MOST_SECONDS * len(blocks) / max(seconds, 1e-6)))
        for seat in together:
            seat.seconds += seconds / len(together)
            seat.moment = ended
        return together, [Answer(of_run, most=most) for of_run in _of_runs(terms, len(together))]

    def _fitting(self, together: list[turns.Seat]) -> list[turns.Seat]:
        """As many of these as fit into memory. Raises Unpackable where that is one."""
        first: Request = max((seat.request for seat in together), key=lambda request: request.weights)
        fitting = int(free_bytes(first.member) // bytes_of_run(first.member, first.batches[0]))
        if fitting >= len(together):
            return together
        if fitting < 2:
            raise Unpackable("the memory does not hold two of them at once")
        self.log.info(f"Packed: {fitting} of {len(together)} runs at a time, which is what the memory holds.")
        return together[:fitting]


def _of_runs(terms: Sequence[dict[str, Tensor]], runs: int) -> list[list[dict[str, Tensor]]]:
    """Terms (K,) of each step -> of each run those of each step, 0-dim."""
    columns = {name: torch.stack([of_step[name] for of_step in terms]).T.contiguous() for name in terms[0]}
    found = []
    for run in range(runs):
        values = [column[run].clone().unbind() for column in columns.values()]
        found.append([dict(zip(columns, of_step, strict=True)) for of_step in zip(*values, strict=True)])
    return found


def reason_of(error: Exception) -> str:
    """Why a stack could not be trained, in words that follow a colon."""
    if isinstance(error, Unpackable):
        return str(error)
    if "data-dependent" in str(error):
        return "a Python branch of the model or the objective looks at the value of a tensor"
    first = (str(error).strip().splitlines() or ["no reason given"])[0].rstrip(".")
    return f"{type(error).__name__}: {first}"
