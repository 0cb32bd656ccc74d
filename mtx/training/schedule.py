"""Pipeline schedules as plain data: which stage works on which microbatch at which tick.

    S stages, v chunks of layers per stage, V = v * S virtual stages (chunk k of stage s is number k * S + s), M
    microbatches, U = M * v units of work per stage and direction

A function of `SCHEDULES` finds the tasks of a schedule by playing it: every stage takes the next unit of its order as
soon as what it needs has arrived. That is what tests and pictures read. A compiled step asks `Lockstep`, which says the
same in closed form, so that it also holds for a tick, a stage and a number of microbatches known at run time only.

Invariant: what is sent at the end of a tick is used at a later one, and every unit is done exactly once.

Source: arXiv 2104.04473, section 2.2; a lockstep stage does a forward and a backward unit within one tick.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

Kind = Literal["forward", "backward"]


class Task(NamedTuple):
    """One chunk of one stage, at work on one microbatch."""

    tick: int
    stage: int
    kind: Kind
    chunk: int
    microbatch: int


def _require_groups(num_stages: int, virtual_stages: int, num_microbatches: int) -> None:
    if virtual_stages > 1 and num_microbatches % num_stages:
        raise ValueError(
            f"{num_microbatches} microbatches in groups of {num_stages} (interleaved 1F1B): the last is not full"
        )


def one_f_one_b(num_stages: int, virtual_stages: int, num_microbatches: int) -> list[Task]:
    """(Interleaved) 1F1B in lockstep: at each tick every stage does at most one forward and one backward unit.

    Microbatches go through in groups of S: a stage does its first chunk for the whole group, then its second one.

    Raises:
        ValueError: There are several chunks, and the last group would not be full.
    """
    S, V = num_stages, num_stages * virtual_stages
    _require_groups(num_stages, virtual_stages, num_microbatches)
    groups = [range(first, min(first + S, num_microbatches)) for first in range(0, num_microbatches, S)]
    chunks: dict[Kind, range] = {"forward": range(virtual_stages), "backward": range(virtual_stages)[::-1]}
    todo = {
        (stage, kind): deque((chunk, microbatch) for group in groups for chunk in order for microbatch in group)
        for stage in range(S)
        for kind, order in chunks.items()
    }
    done: dict[tuple[Kind, int, int], int] = {}

    def has_arrived(tick: int, kind: Kind, virtual_stage: int, microbatch: int) -> bool:
        if kind == "forward":
            return virtual_stage == 0 or done.get(("forward", virtual_stage - 1, microbatch), tick) < tick
        if virtual_stage == V - 1:  # straight from its own forward unit, by way of the loss
            return ("forward", virtual_stage, microbatch) in done
        return done.get(("backward", virtual_stage + 1, microbatch), tick) < tick

    tasks = []
    tick = 0
    while any(todo.values()):
        for (stage, kind), order in todo.items():
            if order and has_arrived(tick, kind, order[0][0] * S + stage, order[0][1]):
                chunk, microbatch = order.popleft()
                done[kind, chunk * S + stage, microbatch] = tick
                tasks.append(Task(tick, stage, kind, chunk, microbatch))
        tick += 1
    return tasks


SCHEDULES: dict[str, Callable[[int, int, int], list[Task]]] = {"1f1b": one_f_one_b}
"""By the names of `Pipeline.schedule`: (stages, virtual stages, microbatches) -> tasks in the order of their ticks."""


def bubble_fraction(tasks: list[Task]) -> float:
    """The time that stages wait, relative to the time that they work.

    In lockstep: a tick takes the time of a forward unit if any stage does one, and of a backward unit, which is twice
    as long, if any stage does one.
    """
    cost = {"forward": 1, "backward": 2}
    total = sum(cost[kind] for kind, _ in {(task.kind, task.tick) for task in tasks})
    work = sum(cost[task.kind] for task in tasks if task.stage == 0)
    return total / work - 1


class Unit(NamedTuple):
    """What `Lockstep` says of a tick and a stage: integers, or arrays of them. Meaningless where it is not `valid`.

    Attributes:
        valid: Whether there is work.
        slot: Of the ring of stage inputs: where the forward unit writes and its backward unit reads. A forward unit
            that is not valid writes where nobody reads.
        chunk: Which chunk of the stage works.
        microbatch: On which microbatch.
    """

    valid: Any
    slot: Any
    chunk: Any
    microbatch: Any


@dataclass(frozen=True)
class Lockstep:
    """`one_f_one_b` in closed form. Pure arithmetic: on Python integers, NumPy arrays and traced arrays alike.

    Raises:
        ValueError: Several chunks, and a number of microbatches that does not fill groups (where it is known).
    """

    num_stages: int
    virtual_stages: int
    num_microbatches: Any

    def __post_init__(self) -> None:
        if isinstance(self.num_microbatches, int):
            _require_groups(self.num_stages, self.virtual_stages, self.num_microbatches)

    @property
    def _num_virtual(self) -> int:
        return self.num_stages * self.virtual_stages

    @property
    def _num_units(self) -> Any:
        return self.num_microbatches * self.virtual_stages

    @property
    def depth(self) -> int:
        """Slots of the ring of stage inputs.

        An input of chunk k of stage s is kept for 2V - 2 - 2 (k S + s) ticks, and a slot may be written again one
        tick later.
        """
        return 2 * self._num_virtual - 1

    @property
    def ticks(self) -> tuple[Any, Any, Any]:
        """First tick with backward units, first without forward units, number of ticks."""
        V, U, S = self._num_virtual, self._num_units, self.num_stages
        return V - 1, U + S - 1, U + V + S - 2

    def forward(self, tick: Any, stage: Any) -> Unit:
        """The forward unit of a stage at a tick."""
        i = tick - stage
        return self._unit(i, (i // self.num_stages) % self.virtual_stages)

    def backward(self, tick: Any, stage: Any) -> Unit:
        """The backward unit of a stage at a tick."""
        i = tick - (self._num_virtual - 1) - (self.num_stages - 1 - stage)
        return self._unit(i, self.virtual_stages - 1 - (i // self.num_stages) % self.virtual_stages)

    def _unit(self, i: Any, chunk: Any) -> Unit:
        """The `i`-th unit of a stage: groups of V of them, in a group S for each chunk."""
        S, group, place = self.num_stages, i // self._num_virtual, i % self.num_stages
        forward_unit = group * self._num_virtual + chunk * S + place
        return Unit(
            valid=(i >= 0) & (i < self._num_units),
            slot=forward_unit % self.depth,
            chunk=chunk,
            microbatch=group * S + place,
        )


CLOSED_FORMS: dict[str, type[Lockstep]] = {"1f1b": Lockstep}
"""By the same names as `SCHEDULES`: what the compiled step computes its units with."""
