"""How many GPUs: the fewest that meet a deadline, the most that a budget pays.

Decides which numbers of GPUs are looked at: those that some layout uses, whole machines, one in each 5 %. At each of
them the fastest layout counts.

Invariant: the answer was searched for and meets its condition. That none better is passed over rests on an assumption:
more GPUs are never slower and never cheaper, which holds but for how well their number divides.
"""

from __future__ import annotations

import dataclasses
import math
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from mtx.config import schema
from mtx.data.ramp import BatchSizes
from mtx.errors import UserError
from mtx.planning.case import Case, Cluster, declare
from mtx.planning.constants import Constants
from mtx.planning.flops import model_flops_per_token
from mtx.planning.plan import DAY_S, HOUR_S
from mtx.planning.products import fastest_flops
from mtx.planning.search import SearchResult, search_layouts
from mtx.planning.step_time import estimate_time
from mtx.planning.timetable import make_timetable

MOST_GPUS = 1 << 17
RUNG = 1.05
"""Ratio of neighbouring numbers of GPUs."""
LONGEST_STEP = 8
"""In rungs: where more GPUs are slower at last, a longer one could pass over those that are fast enough."""


@dataclass(frozen=True)
class Point:
    """A number of GPUs and the best of its layouts.

    Attributes:
        num_gpus: How many.
        search: Their layouts.
        run_seconds: The whole run with the fastest one; None: none fits.
    """

    num_gpus: int
    search: SearchResult
    run_seconds: float | None

    @property
    def gpu_hours(self) -> float:
        """Infinite where nothing fits."""
        return math.inf if self.run_seconds is None else self.run_seconds / HOUR_S * self.num_gpus


@dataclass(frozen=True)
class Sizing:
    """What was looked at, in order of the number of GPUs, and what was chosen."""

    points: tuple[Point, ...]
    chosen: Point

    def as_json(self) -> list[dict[str, Any]]:
        """The points; seconds and GPU-hours are null where nothing fits."""
        return [
            {
                "gpus": point.num_gpus,
                "run_seconds": point.run_seconds,
                "gpu_hours": None if point.run_seconds is None else point.gpu_hours,
                "chosen": point is self.chosen,
            }
            for point in self.points
        ]


def list_counts(run: schema.Run, cluster: Cluster) -> list[int]:
    """Numbers of GPUs that layouts can use, ascending, one in each RUNG: the one with the most layouts."""
    model, train = run.model, run.train
    batches = BatchSizes(global_batch_size=train.global_batch_size, seq_len=train.seq_len, ramp=train.batch_ramp)
    shared = math.gcd(*(size for size, _ in batches.spans(MOST_GPUS**2)))
    host = min(run.cluster.gpus_per_host, cluster.domain)
    tensors = [t for t in range(1, cluster.domain + 1) if cluster.domain % t == model.num_heads % t == 0]
    contexts = [c for c in (1, 2, 4, 8, 16) if train.seq_len % (2 * c) == 0]
    stages = [p for p in range(1, model.num_layers + 1) if -(-model.num_layers // p) * p <= RUNG * model.num_layers]
    layouts = Counter(
        t * c * p * d
        for t in tensors
        for c in contexts
        for p in stages
        for d in range(1, shared + 1)
        if shared % d == 0 and t * c * p * d <= MOST_GPUS
    )
    best: dict[int, int] = {}
    for count in sorted(layouts):
        rung = round(math.log(count) / math.log(RUNG))
        whole_machines = count % host == 0 or host % count == 0
        if whole_machines and layouts[count] > layouts.get(best.get(rung, 0), 0):
            best[rung] = count
    return sorted(best.values())


class _Ladder:
    """The numbers of GPUs, searched one at a time and remembered."""

    def __init__(
        self,
        run: schema.Run,
        cluster: Cluster,
        tokens: int,
        software: str,
        constants: Constants | None,
        watch: Callable[[Point], None],
    ):
        self.run, self.cluster, self.tokens, self.watch = run, cluster, tokens, watch
        self.software, self.constants = software, constants
        self.counts = list_counts(run, cluster)
        self.points: dict[int, Point] = {}

    def point(self, index: int) -> Point:
        count = self.counts[index]
        if count not in self.points:
            cluster = dataclasses.replace(self.cluster, num_gpus=count)
            search = search_layouts(self.run, cluster, self.software, self.constants)
            seconds = self._run_seconds(search.ranked[0].case) if search.ranked else None
            self.points[count] = Point(count, search, seconds)
            self.watch(self.points[count])
        return self.points[count]

    def _run_seconds(self, case: Case) -> float:
        timetable = make_timetable(case, lambda other: estimate_time(other, self.constants).seconds)
        return timetable.seconds(timetable.steps_to(self.tokens))

    def boundary(self, start: int, holds: Callable[[Point], bool]) -> tuple[int, int]:
        """Indices of the last number for which a condition does not hold, and of the first for which it does.

        It holds for all numbers above some number. -1, or the number of numbers: there is none.
        """
        low, high, step = -1, len(self.counts), 4
        index = min(start, high - 1)
        while low < index < high:
            if holds(self.point(index)):
                high, index = index, index - step
            else:
                low, index = index, index + step
            step = min(2 * step, LONGEST_STEP)
        while high - low > 1:
            middle = (low + high) // 2
            if holds(self.point(middle)):
                high = middle
            else:
                low = middle
        return low, high

    def sizing(self, index: int) -> Sizing:
        return Sizing(tuple(self.points[count] for count in sorted(self.points)), self.point(index))


def _ideal_gpu_seconds(run: schema.Run, cluster: Cluster, tokens: int) -> float:
    """GPU-seconds at the fastest rate that was measured for a product: no run takes less."""
    whole = declare(run).definition.whole
    flops = model_flops_per_token(run.model, whole.params, whole.axes, run.train.seq_len, "causal")
    return flops * tokens / fastest_flops(cluster.gpu, run.precision.compute)


def size_for_deadline(
    run: schema.Run,
    cluster: Cluster,
    tokens: int,
    days: float,
    software: str = "mtx",
    constants: Constants | None = None,
    watch: Callable[[Point], None] = lambda point: None,
) -> Sizing:
    """The fewest GPUs that train on so many tokens in so many days.

    Args:
        run: Its layout is searched for.
        cluster: The machines; how many is the question.
        watch: Told of each number that is looked at.

    Raises:
        UserError: No number of GPUs does.
    """
    ladder = _Ladder(run, cluster, tokens, software, constants, watch)
    ideal = _ideal_gpu_seconds(run, cluster, tokens) / (days * DAY_S)
    start = sum(count < 2 * ideal for count in ladder.counts)  # half of the fastest rate
    _, index = ladder.boundary(start, lambda p: p.run_seconds is not None and p.run_seconds <= days * DAY_S)
    if index == len(ladder.counts):
        fastest = min(ladder.points.values(), key=lambda p: math.inf if p.run_seconds is None else p.run_seconds)
        seconds = fastest.run_seconds
        best = "none fits" if seconds is None else f"{fastest.num_gpus} take {seconds / DAY_S:.3g} days"
        raise UserError(
            f"no number of GPUs up to {ladder.counts[-1]}, the most that a batch of {run.train.global_batch_size} "
            f"sequences has layouts for, trains on {tokens} tokens in {days:g} days ({best}): give it more days, fewer "
            "tokens, or a larger Train.global_batch_size"
        )
    return ladder.sizing(index)


def size_for_budget(
    run: schema.Run,
    cluster: Cluster,
    tokens: int,
    budget: float,
    price: float,
    software: str = "mtx",
    constants: Constants | None = None,
    watch: Callable[[Point], None] = lambda point: None,
) -> Sizing:
    """The most GPUs, and so the shortest run, whose cost a budget pays.

    Args:
        budget: Money, in the currency of the price.
        price: Of a GPU for an hour.

    Raises:
        UserError: No number of GPUs is cheap enough.
    """
    ladder = _Ladder(run, cluster, tokens, software, constants, watch)
    state_bytes = 12 * sum(math.prod(p.shape) for p in declare(run).parameters)
    start = sum(count * cluster.gpu.memory_bytes < state_bytes for count in ladder.counts)
    low, _ = ladder.boundary(start, lambda p: p.run_seconds is not None and p.gpu_hours * price > budget)
    if low < 0 or ladder.point(low).run_seconds is None:
        cheapest = min(p.gpu_hours for p in ladder.points.values()) * price
        ideal = _ideal_gpu_seconds(run, cluster, tokens) / HOUR_S * price
        raise UserError(
            f"--budget {budget:g} does not pay for {tokens} tokens: the cheapest that was found costs {cheapest:,.0f}, "
            f"and with all products at the card's fastest measured rate it would be {ideal:,.0f}"
        )
    return ladder.sizing(low)
