"""The layouts of a run on a number of GPUs, ranked, and for each other one the reason why not.

Invariant: the fastest layout of the search is the fastest of all that it may consider.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from mtx.config import render, schema
from mtx.planning.case import Case
from mtx.planning.memory import Memory
from mtx.planning.step_time import StepTime


@dataclass(frozen=True)
class Candidate:
    """A layout that fits.

    Attributes:
        case: The run with this layout.
        memory: Of the GPU that holds most.
        step: Time of a step.
    """

    case: Case
    memory: Memory
    step: StepTime


@dataclass(frozen=True)
class Rejection:
    """A layout, or all layouts of a mesh, that is not ranked.

    Attributes:
        settings: What it differs in, by key of the config.
        kind: The class of the reason.
        reason: In words, with numbers.
    """

    settings: Mapping[str, Any]
    kind: str
    reason: str


@dataclass(frozen=True, kw_only=True)
class SearchResult:
    """What a search found.

    Attributes:
        run: As it was before.
        ranked: The layouts that fit, by time, then memory.
        rejected: All others.
        seconds: That the search took.
    """

    run: schema.Run
    ranked: tuple[Candidate, ...]
    rejected: tuple[Rejection, ...]
    seconds: float

    @property
    def counts(self) -> dict[str, int]:
        """Kind of rejection -> how many, most frequent first."""
        return dict(Counter(rejection.kind for rejection in self.rejected).most_common())

    def lines(self, candidate: Candidate) -> list[str]:
        """The lines of a config that make the run's layout this one."""
        return [
            f"{change.setting.key} = {render.show(change.new)}" for change in render.compare(self.run, candidate.case.run)
        ]
