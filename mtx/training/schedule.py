"""Pipeline schedules as plain data."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple


class Unit(NamedTuple):
    """One chunk of a stage at work on one microbatch. Meaningless where it is not `valid`."""

    valid: Any
    slot: Any
    chunk: Any
    microbatch: Any


@dataclass(frozen=True)
class Lockstep:
    """Interleaved 1F1B in lockstep: at each tick every stage does at most one forward and one backward unit."""

    num_stages: int
    virtual_stages: int
    num_microbatches: Any

    @property
    def depth(self) -> int:
        """Slots of the ring of stage inputs."""
        return 2 * self.num_stages * self.virtual_stages

    @property
    def ticks(self) -> tuple[Any, Any, Any]:
        """First tick with backward units, first without forward units, number of ticks."""
        V, U = self.num_stages * self.virtual_stages, self.num_microbatches * self.virtual_stages
        return V - 1, U + self.num_stages - 1, U + V + self.num_stages - 2

    def _unit(self, i: Any, chunk: Any) -> Unit:
        S, V = self.num_stages, self.num_stages * self.virtual_stages
        valid = (i >= 0) & (i < self.num_microbatches * self.virtual_stages)
        group, place = i // V, i % S
        return Unit(
            valid,
            (group * V + chunk * S + place) % self.depth,
            chunk,
            group * S + place if self.virtual_stages > 1 else i,
        )

    def forward(self, tick: Any, stage: Any) -> Unit:
        i = tick - stage
        return self._unit(i, (i // self.num_stages) % self.virtual_stages)

    def backward(self, tick: Any, stage: Any) -> Unit:
        V = self.num_stages * self.virtual_stages
        i = tick - (V - 1) - (self.num_stages - 1 - stage)
        return self._unit(i, self.virtual_stages - 1 - (i // self.num_stages) % self.virtual_stages)
