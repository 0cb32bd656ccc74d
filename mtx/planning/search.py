"""The layouts of a run on a number of GPUs, ranked, and for each other one the reason why not.

Decides which layouts there are: every mesh of so many GPUs, every microbatch size that divides, virtual stages, what is
recomputed, ZeRO. Which of them may be is for `mtx.config.fit` to say, what they take for the estimates.

Invariant: the fastest layout found is the fastest of all of them. What is passed over unestimated is slower than one
that fits (it computes more again, or it splits less by ZeRO), slower than enough others whatever its rate (its bubble
alone), or larger than one that does not fit (a longer microbatch).
"""

from __future__ import annotations

import dataclasses
import heapq
import itertools
import math
import sys
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from mtx.config import render, schema
from mtx.config.axes import MESH_AXES
from mtx.config.fit import Layout, contradictions, misfits
from mtx.data.ramp import BatchSizes
from mtx.errors import UserError
from mtx.planning.case import Case, Cluster, check_format, declare
from mtx.planning.constants import Constants, load_constants
from mtx.planning.flops import model_flops_per_token
from mtx.planning.layers import uses_fused_attention
from mtx.planning.memory import Memory, estimate_memory
from mtx.planning.plan import to_gib, usable_bytes
from mtx.planning.products import fastest_flops
from mtx.planning.step_time import StepTime, estimate_time

MARGIN = 0.05
"""Of a card's usable memory, that a layout of the search leaves free: the estimate is not exact."""

KEEP = 25
"""Layouts that are ranked, where so many fit."""

RECOMPUTE = ("none", "selective", "full")
"""From the fastest, which keeps most, to the smallest."""
ZERO = 2
"""The ZeRO stage that needs least memory, and that exchanges least: weights in the format that multiplies, gradients to
where they are needed. The others are never faster (a test holds them against it), so that they are not tried."""


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
    """A layout that is not ranked, or all those of a mesh or a microbatch size.

    Attributes:
        settings: What it is, by key of the config.
        kind: The class of the reason.
        reason: In words, with numbers.
        candidate: What it would take, of one that does not fit; None of the others, which were not estimated.
    """

    settings: Mapping[str, Any]
    kind: str
    reason: str
    candidate: Candidate | None = None


@dataclass(frozen=True, kw_only=True)
class SearchResult:
    """What a search found.

    Attributes:
        run: As it was before.
        ranked: The layouts that fit, by time, then memory.
        rejected: All others.
        closest: Where none fits, the rejection that is short of least memory, if memory is what was short.
        seconds: That the search took.
    """

    run: schema.Run
    ranked: tuple[Candidate, ...]
    rejected: tuple[Rejection, ...]
    closest: Rejection | None
    seconds: float

    @property
    def counts(self) -> dict[str, int]:
        """Kind of rejection -> how many, most frequent first."""
        return dict(Counter(rejection.kind for rejection in self.rejected).most_common())

    def lines(self, candidate: Candidate) -> list[str]:
        """The lines of a config that make the run's layout this one."""
        changes = render.compare(self.run, candidate.case.run)
        return [f"{change.setting.key} = {render.show(change.new)}" for change in changes]

    def as_json(self) -> dict[str, Any]:
        """All of it."""
        ranked = [
            {
                "settings": describe_layout(candidate.case.run),
                "step_seconds": candidate.step.seconds,
                "bubble_fraction": candidate.step.bubble_fraction,
                "memory_bytes": candidate.memory.total,
            }
            for candidate in self.ranked
        ]
        return {
            "seconds": self.seconds,
            "memory_margin": MARGIN,
            "ranked": ranked,
            "lines": self.lines(self.ranked[0]) if self.ranked else [],
            "counts": self.counts,
            "rejected": [
                {"settings": dict(rejection.settings), "kind": rejection.kind, "reason": rejection.reason}
                for rejection in self.rejected
            ],
        }


def describe_layout(run: schema.Run) -> dict[str, Any]:
    """The settings that make a layout, those of axes of one device left out."""
    mesh = {f"Mesh.{axis}": getattr(run.mesh, axis) for axis in MESH_AXES if getattr(run.mesh, axis) > 1}
    virtual = {"Pipeline.virtual_stages": run.pipeline.virtual_stages} if run.pipeline.virtual_stages > 1 else {}
    train = {"Train.microbatch_size": run.train.microbatch_size, "Train.recompute": run.train.recompute}
    return {**mesh, **virtual, **train, "Rules.zero": run.rules.zero}


def search_layouts(
    run: schema.Run,
    cluster: Cluster,
    software: str = "mtx",
    constants: Constants | None = None,
    *,
    keep: int = KEEP,
) -> SearchResult:
    """All layouts of a run on a cluster.

    Args:
        run: Its mesh, microbatch size, virtual stages, recomputation and ZeRO stage are those that are searched for.
        cluster: The machines.
        software: Whose habits the estimates assume.
        constants: Of the time model; None: those that are shipped.
        keep: How many of the fastest are wanted; what cannot be one of them is not estimated.

    Raises:
        UserError: The GPU lacks the run's number format.
    """
    check_format(run, cluster.gpu)
    begin = time.perf_counter()
    search = _Search(run, cluster, software, constants, keep)
    for sizes in list_meshes(run, cluster.num_gpus):
        search.list_options(sizes)
    search.estimate()
    return SearchResult(
        run=run,
        ranked=tuple(search.found),
        rejected=tuple(search.rejected),
        closest=None if search.closest is None else search.closest[1],
        seconds=time.perf_counter() - begin,
    )


def list_meshes(run: schema.Run, num_gpus: int) -> Iterator[dict[str, int]]:
    """Devices along each mesh axis, in all ways to split the GPUs; `expert` only where there are experts."""
    axes = [axis for axis in MESH_AXES if axis != "expert" or run.model.num_experts]

    def split(left: int, places: int) -> Iterator[tuple[int, ...]]:
        if places == 1:
            yield (left,)
            return
        for size in _divide(left):
            yield from ((size, *rest) for rest in split(left // size, places - 1))

    for counts in split(num_gpus, len(axes)):
        yield dict.fromkeys(MESH_AXES, 1) | dict(zip(axes, counts))


def lay_out(run: schema.Run, sizes: Mapping[str, int], **changes: Any) -> schema.Run:
    """The run on another mesh. Options that have an effect only on axes which the mesh lacks go back to their defaults.

    Args:
        changes: microbatch_size, recompute, virtual_stages, zero.
    """
    pipeline = dataclasses.replace(run.pipeline, virtual_stages=changes.get("virtual_stages", 1))
    train = dataclasses.replace(
        run.train,
        microbatch_size=changes.get("microbatch_size", run.train.microbatch_size),
        recompute=changes.get("recompute", run.train.recompute),
    )
    if sizes["pipe"] == 1:
        pipeline = schema.Pipeline()
    elif train.scan_layers:
        train = dataclasses.replace(train, scan_layers=None)
    if sizes["context"] == 1:
        train = dataclasses.replace(train, context_exchange=schema.Train.context_exchange)
    rules = dataclasses.replace(run.rules, zero=changes.get("zero", run.rules.zero))
    return dataclasses.replace(run, mesh=schema.Mesh(**sizes), pipeline=pipeline, train=train, rules=rules)


@dataclass(frozen=True)
class _Option:
    """A layout but for what is recomputed, and the seconds that a step cannot go below."""

    sizes: Mapping[str, int]
    microbatch_size: int
    virtual_stages: int
    least_seconds: float

    @property
    def line(self) -> tuple[tuple[int, ...], int]:
        """What it shares with those of other microbatch sizes."""
        return tuple(self.sizes.values()), self.virtual_stages

    def run(self, run: schema.Run, recompute: str) -> schema.Run:
        """The run with it."""
        return lay_out(
            run,
            self.sizes,
            microbatch_size=self.microbatch_size,
            virtual_stages=self.virtual_stages,
            recompute=recompute,
            zero=ZERO,
        )


class _Search:
    """The layouts seen so far."""

    def __init__(self, run: schema.Run, cluster: Cluster, software: str, constants: Constants | None, keep: int):
        self.run, self.cluster, self.software, self.keep = run, cluster, software, keep
        self.constants = load_constants() if constants is None else constants
        self.limit = int((1 - MARGIN) * usable_bytes(cluster.gpu, software))
        self.options: list[_Option] = []
        self.found: list[Candidate] = []
        self.rejected: list[Rejection] = []
        self.closest: tuple[int, Rejection] | None = None
        self.layer_seconds = self._least_layer_seconds()

    def _least_layer_seconds(self) -> float:
        """Of the layers of a whole step, if all GPUs did nothing but products at the fastest measured rate."""
        run, whole = self.run, declare(self.run).definition.whole
        flops = model_flops_per_token(run.model, whole.params, whole.axes, run.train.seq_len, "causal")
        flops -= 6 * run.model.vocab_size * run.model.d_model  # the head has its own place in a pipeline
        gpu, tokens = self.cluster.gpu, run.train.global_batch_size * run.train.seq_len
        quality = max(1.0, self.constants.quality_of(self.software, gpu.generation))
        return flops * tokens / (fastest_flops(gpu, run.precision.compute) * quality * self.cluster.num_gpus)

    def list_options(self, sizes: Mapping[str, int]) -> None:
        """All that a mesh leaves open, unless it is rejected as a whole."""
        plain = lay_out(self.run, sizes, microbatch_size=1)
        refusal = self._refuse(plain, sizes)
        if refusal is not None:
            settings = {f"Mesh.{axis}": size for axis, size in sizes.items() if size > 1}
            self.rejected.append(Rejection(settings, *refusal))
            return
        share = self.run.train.global_batch_size // Case(plain, self.cluster).shards("batch")
        for microbatch_size in list_microbatch_sizes(plain, sizes):
            for virtual_stages in list_virtual_stages(plain, sizes["pipe"]):
                bubble = (sizes["pipe"] - 1) / (virtual_stages * (share // microbatch_size))
                option = _Option(sizes, microbatch_size, virtual_stages, self.layer_seconds * (1 + bubble))
                message = None
                if virtual_stages > 1:
                    message = find_misfit(option.run(self.run, self.run.train.recompute), sizes)
                if message is None:
                    self.options.append(option)
                else:
                    settings = describe_layout(option.run(self.run, self.run.train.recompute))
                    self.rejected.append(Rejection(settings, f"refused: {message.split()[0]}", message))

    def estimate(self) -> None:
        """Best first: an option waits with the seconds that it takes at least, then with those of a recomputation."""
        order = itertools.count()
        waiting = [(option.least_seconds, next(order), option, -1) for option in self.options]
        heapq.heapify(waiting)
        shortest: dict[object, int] = {}  # mesh and virtual stages -> the microbatch that does not fit at all
        while waiting and len(self.found) < self.keep:
            _, _, option, level = heapq.heappop(waiting)
            if option.microbatch_size >= shortest.get(option.line, sys.maxsize):
                reason = f"nor does Train.microbatch_size = {shortest[option.line]}"
                self._reject(option.run(self.run, RECOMPUTE[-1]), "does not fit", reason)
                continue
            if level >= 0 and self._try(option, level):
                continue
            if level + 1 < len(RECOMPUTE):
                seconds = estimate_time(self._case(option, level + 1), self.constants).seconds
                heapq.heappush(waiting, (seconds, next(order), option, level + 1))
            else:
                shortest[option.line] = option.microbatch_size
        self.found.sort(key=lambda candidate: (candidate.step.seconds, candidate.memory.total))
        for seconds, _, option, level in sorted(waiting):
            self._reject_slower(option, level, seconds)

    def _refuse(self, run: schema.Run, sizes: Mapping[str, int]) -> tuple[str, str] | None:
        """Why a mesh is not possible, or not sensible: class and words."""
        tensor, domain = sizes["tensor"], self.cluster.domain
        if domain % tensor:
            return "tensor leaves NVLink", (
                f"Mesh.tensor = {tensor} does not divide the {domain} GPUs of an NVLink domain: exchanges of every "
                "layer would cross the network"
            )
        message = find_misfit(run, sizes)
        if message is not None:
            return f"refused: {message.split()[0]}", message
        try:
            uses_fused_attention(Case(run, self.cluster, self.software))
        except UserError as error:  # the kernel that the run insists on
            return "no kernel", f"{error} ({self.cluster.gpu.name})"
        return None

    def _case(self, option: _Option, level: int) -> Case:
        return Case(option.run(self.run, RECOMPUTE[level]), self.cluster, self.software)

    def _try(self, option: _Option, level: int) -> bool:
        """Whether it fits."""
        case = self._case(option, level)
        candidate = Candidate(case, estimate_memory(case), estimate_time(case, self.constants))
        if candidate.memory.total > self.limit:
            self._reject_memory(candidate)
            return False
        self.found.append(candidate)
        for slower in RECOMPUTE[level + 1 :]:
            reason = f"recompute = {RECOMPUTE[level]!r} fits and computes less again"
            self._reject(option.run(self.run, slower), "needless recompute", reason)
        return True

    def _reject_slower(self, option: _Option, level: int, seconds: float) -> None:
        taken = f"{len(self.found)} layouts take {self.found[-1].step.seconds:.4g} s or less"
        run = option.run(self.run, RECOMPUTE[max(0, level)])
        if level < 0:
            bubble = option.least_seconds / self.layer_seconds - 1
            reason = (
                f"stages wait {bubble:.0%} of the time that they work: {seconds:.4g} s even if all else went at the "
                f"GPU's fastest rate; {taken}"
            )
            self._reject(run, "bubble", reason)
        else:
            self._reject(run, "slower", f"at least {seconds:.4g} s; {taken}")

    def _reject_memory(self, candidate: Candidate) -> None:
        memory = candidate.memory
        excess, largest = memory.total - self.limit, max(memory.parts, key=lambda part: memory.parts[part])
        reason = (
            f"needs {to_gib(memory.total)}, {to_gib(excess)} more than a layout may fill (of {self.cluster.gpu.name}'s "
            f"{to_gib(self.cluster.gpu.memory_bytes)}: {to_gib(self.limit)}); largest part: "
            f"{largest.replace('_', ' ')}, {to_gib(memory.parts[largest])}"
        )
        self._reject(candidate.case.run, "does not fit", reason, candidate)
        if self.closest is None or excess < self.closest[0]:
            self.closest = excess, self.rejected[-1]

    def _reject(self, run: schema.Run, kind: str, reason: str, candidate: Candidate | None = None) -> None:
        self.rejected.append(Rejection(describe_layout(run), kind, reason, candidate))


def find_misfit(run: schema.Run, sizes: Mapping[str, int]) -> str | None:
    """The first reason why a run cannot be on a mesh."""
    layout = Layout(run=run, sizes=sizes)
    return next(itertools.chain(misfits(layout), contradictions(layout)), None)


def list_microbatch_sizes(run: schema.Run, sizes: Mapping[str, int]) -> list[int]:
    """Those that divide a data shard's share of every batch, ramp included; with the rules of a run that fits."""
    train = run.train
    batches = BatchSizes(global_batch_size=train.global_batch_size, seq_len=train.seq_len, ramp=train.batch_ramp)
    shards = math.prod(sizes[axis] for axis in Layout(run=run, sizes=sizes).rules["batch"])
    return _divide(math.gcd(*(size // shards for size, _ in batches.spans(sys.maxsize))))


def list_virtual_stages(run: schema.Run, num_stages: int) -> list[int]:
    """Numbers of chunks with which a stage has no more slots for layers, empty ones counted, than with one chunk."""
    layers = run.model.num_layers
    slots = -(-layers // num_stages)
    chunks = range(1, layers // num_stages + 1) if num_stages > 1 else [1]
    return [v for v in chunks if v * -(-layers // (num_stages * v)) == slots]


def _divide(number: int) -> list[int]:
    """All its divisors."""
    return [divisor for divisor in range(1, number + 1) if number % divisor == 0]
