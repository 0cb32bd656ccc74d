"""What is wrong with a compiled step: rules, each of which has found a real fault, and what would mend it.

Decides what is an error (it cannot run, or computes or exchanges what it must not), a warning (it runs and wastes) and
a note. Figures are `mtx.planning.dissection`'s.

Invariant: a rule compares the program with what its own case implies, never with another program; a layout that does
what the documentation says of it has no errors and no warnings.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal

from mtx.planning.dissection import LARGE_BYTES, Dissection
from mtx.planning.hlo_collectives import Collective

Severity = Literal["error", "warning", "note"]
_ORDER = ("error", "warning", "note")
_REDUCTIONS = ("all-reduce", "reduce-scatter")
_ONCE = ("data", "fsdp", "expert", "context")

MORE_FLOPS = 1.1
"""A program may multiply so many times what its layout implies: losses, routers and padding are left out there."""
MORE_BYTES = 1.1
PLAN_ERROR = 0.1
MINOR = 0.01
"""Of the card's memory."""
SMALL_BYTES = 2**20
"""Sums of losses, counts and norms are smaller."""

CURES = {
    "parameters": ("Rules.zero", "Mesh.fsdp", "Mesh.tensor", "Mesh.pipe"),
    "compute_weights": ("Mesh.tensor", "Mesh.pipe", "Mesh.fsdp"),
    "gradients": ("Mesh.tensor", "Mesh.pipe", "Mesh.fsdp"),
    "optimizer": ("Rules.zero", "Mesh.data", "Mesh.fsdp"),
    "activations": ("Train.recompute", "Train.microbatch_size", "Mesh.context", "Mesh.tensor"),
    "logits": ("Train.loss_chunk_tokens", "Mesh.tensor"),
    "pipeline": ("Train.recompute", "Train.microbatch_size", "Mesh.context"),
    "communication": ("Cluster.gpus",),
    "overhead": ("Cluster.gpu",),
}
"""What lessens each part of the memory."""


@dataclass(frozen=True)
class Finding:
    """Something that a person should know.

    Attributes:
        severity: error, warning or note.
        rule: Name of the rule.
        text: In plain words, with figures.
        keys: Of the config, what would mend it.
    """

    severity: Severity
    rule: str
    text: str
    keys: tuple[str, ...] = ()


def audit(step: Dissection) -> list[Finding]:
    """All findings, the gravest first."""
    found = [finding for rule in RULES for finding in rule(step)]
    return sorted(found, key=lambda finding: _ORDER.index(finding.severity))


def gib(size: float) -> str:
    """Bytes for a person."""
    return f"{size / 2**30:.2f} GiB" if size >= 2**29 else f"{size / 2**20:.1f} MiB"


def _fits(step: Dissection) -> Iterator[Finding]:
    if step.free_bytes >= 0:
        return
    parts = step.memory.parts
    largest = max(parts, key=lambda part: parts[part])
    outside = parts["communication"] + parts["overhead"]
    text = (
        f"does not fit a {step.case.cluster.gpu.name}: the program takes {gib(step.compiled.peak_bytes)} at its peak "
        f"and communication and overhead about {gib(outside)}, {gib(-step.free_bytes)} more than is safe to use "
        f"({gib(step.usable_bytes)}); by the plan {largest.replace('_', ' ')} are the largest part, "
        f"{gib(parts[largest])}"
    )
    yield Finding("error", "memory", text, CURES[largest])


def _arguments(step: Dissection) -> Iterator[Finding]:
    expected = step.memory.state + step.batch_bytes
    if step.compiled.argument_bytes != expected:
        text = (
            f"the program takes {step.compiled.argument_bytes:,} bytes of state and batch, and the shards of the "
            f"layout make {expected:,}: something is placed where the rules do not put it"
        )
        yield Finding("error", "arguments", text)


def _donation(step: Dissection) -> Iterator[Finding]:
    missing = step.memory.state - step.compiled.alias_bytes
    if missing:
        text = f"{gib(missing)} of the old state are not overwritten by the new one: both are in memory at a time"
        yield Finding("error", "donation", text)


def _reductions_in_loops(step: Dissection) -> Iterator[Finding]:
    for c in step.collectives:
        if c.kind not in _REDUCTIONS or not c.looped or c.executions < 2 or c.size_bytes < SMALL_BYTES:
            continue
        if wrong := [axis for axis in c.axes if axis in _wrong_in_loop(step, c)]:
            text = (
                f"{c.kind} over {', '.join(c.axes)} runs {c.executions:,} times a step, "
                f"{gib(c.size_bytes)} each ({_where(step, c)}): gradients are summed once, after the last microbatch"
            )
            yield Finding("error", "reduction in a loop", text, tuple(f"Mesh.{axis}" for axis in wrong))


def _wrong_in_loop(step: Dissection, c: Collective) -> set[str]:
    """Axes over which nothing of this kind and shape is to be summed for each microbatch."""
    weights = {
        _local(step, shape, placement.compute)[first:]
        for parameter, shape, placement in step.case.placed
        for first in (0, 1)  # of a stack, also one layer
        if placement.is_matrix and "positions" not in parameter.axes
    }
    is_gradient = any(shape.dims in weights for shape in c.operands)  # activations have a dim more
    wrong = {"data", "expert"} | ({"pipe", "context"} if is_gradient else set())
    return wrong if c.kind == "reduce-scatter" else wrong | {"fsdp"}  # where ZeRO-3's gradients go at once


def _local(step: Dissection, shape: tuple[int, ...], spec: object) -> tuple[int, ...]:
    parts = [*spec, *[None] * len(shape)][: len(shape)]  # type: ignore[misc]
    sizes = step.case.sizes
    names = [((part,) if isinstance(part, str) else part or ()) for part in parts]
    return tuple(dim // math.prod(sizes[axis] for axis in over) for dim, over in zip(shape, names))


def _where(step: Dissection, c: Collective) -> str:
    return step.sources.find(step.lines[c.name]) or c.name


def _zero_bytes(step: Dissection) -> Iterator[Finding]:
    case = step.case
    compute = {"float32": 4, "bfloat16": 2}
    wide, wire = compute[case.run.precision.activations], compute[case.run.precision.gradients]
    expected = 0
    exchanged = [c for c in step.collectives if c.kind != "all-to-all"]  # by which tokens come to their experts
    for _, shape, placement in case.placed:
        layer_axes = [axis for axis in placement.layer_axes if case.sizes[axis] > 1]
        whole = case.local_size(shape, placement.compute) // math.prod(case.sizes[axis] for axis in layer_axes)
        expected += whole * wire
        if layer_axes and not any(c.looped and set(layer_axes) & set(c.axes) for c in exchanged):
            # Few layers are no loop: each weight is gathered forward and backward, and its gradient scattered.
            expected += case.local_size(shape, placement.compute) * (2 * wide + wire)
        if placement.step_axes:
            expected += whole * (4 if placement.in_float32 else wide)
        elif placement.optimizer != placement.storage:
            expected += whole * 4
    measured = sum(
        c.size_bytes * c.executions for c in exchanged if not c.looped and set(c.axes) & set(_ONCE)
    )  # fmt: skip
    if measured > MORE_BYTES * expected + LARGE_BYTES:
        text = (
            f"once a step {gib(measured)} are exchanged among replicas, and the layout's weights and gradients make "
            f"{gib(expected)}"
        )
        yield Finding("warning", "exchange among replicas", text, ("Rules.zero", "Precision.gradients"))


def _flops(step: Dissection) -> Iterator[Finding]:
    found, expected = step.forward_equivalents, step.expected_forward_equivalents
    if found > MORE_FLOPS * expected and not step.case.run.model.num_experts:
        text = (
            f"the program multiplies as much as {found:.2f} forward passes, and recomputation, idle ticks and empty "
            f"slots of this layout explain {expected:.2f}"
        )
        yield Finding("warning", "matrix products", text, ("Train.recompute", "Train.loss_chunk_tokens"))


def _permutes(step: Dissection) -> Iterator[Finding]:
    if step.ticks is None:
        return
    found = sum(c.executions for c in step.collectives if c.kind == "collective-permute" and c.axes == ("pipe",))
    expected = step.ticks["warm"] + 2 * step.ticks["steady"] + step.ticks["cool"]
    # A phase of one tick is no loop, and what nobody receives after it is not sent.
    if not expected - len(step.ticks) <= found <= expected:
        text = f"{found:,} exchanges between stages, where the ticks of the schedule make {expected:,}"
        yield Finding("warning", "ticks", text, ("Pipeline.schedule",))


def _rematerialized(step: Dissection) -> Iterator[Finding]:
    count = step.compiled.log.count("Involuntary full rematerialization")
    if count:
        text = f"XLA gathered {count} arrays whole, since it did not know how to go from one sharding to the other"
        yield Finding("error", "resharding", text, ("Rules.overrides",))


def _long_buffers(step: Dissection) -> Iterator[Finding]:
    count = step.case.num_microbatches
    ticks = set() if step.ticks is None else {sum(step.ticks.values()), step.ticks["warm"] + step.ticks["steady"]}
    usual = {size for _, shape, placement in step.case.placed for size in _local(step, shape, placement.compute)}
    usual |= {2 * step.case.sizes["pipe"] * step.case.run.pipeline.virtual_stages - 1, len(step.case.slots), 1}
    for buffer in step.buffers:
        leading = buffer.shape.dims[0] if buffer.shape.dims else 0
        is_long = leading in ({count} | ticks) - usual
        if is_long and not buffer.is_argument and buffer.size_bytes > step.compiled.peak_bytes / 100:
            what = "microbatches" if leading == count else "ticks"
            text = (
                f"a buffer of {gib(buffer.size_bytes)} has a row for each of the {leading:,} {what} "
                f"({buffer.source or buffer.origin}): memory grows with the batch"
            )
            yield Finding("error", "buffers", text, ("Train.recompute", "Train.global_batch_size"))


def _links(step: Dissection) -> Iterator[Finding]:
    domain = step.case.cluster.domain
    for exchange in step.exchanges:
        if exchange.axes == ("tensor",) and exchange.leaves_domain:
            text = (
                f"{exchange.kind} over tensor leaves the NVLink domain of {domain} GPUs: {exchange.count:,} times and "
                f"{gib(exchange.size_bytes)} a step go over the network"
            )
            yield Finding("warning", "links", text, ("Mesh.tensor", "Cluster.nvlink_domain"))


def _replicated(step: Dissection) -> Iterator[Finding]:
    groups: dict[tuple[str, tuple[str, ...]], list] = {}
    for entry in step.replicated:
        groups.setdefault((entry.array, entry.axes), []).append(entry)
    for (array, axes), entries in groups.items():
        size = sum(entry.size_bytes for entry in entries)
        by_choice = step.case.run.rules.zero < (2 if array == "weight" else 1) and axes != ("tensor",)
        is_minor = by_choice or size < MINOR * step.target.memory_bytes
        names = ", ".join(entry.parameter for entry in entries[:3]) + (", ..." if len(entries) > 3 else "")
        what = "weights" if array == "weight" else "moments of the optimizer"
        text = f"{gib(size)} of {what} are the same on all devices along {', '.join(axes)}: {names}"
        dividing = ("Model.vocab_size", *(f"Mesh.{axis}" for axis in axes))
        keys = ("Rules.zero",) if by_choice else dividing
        yield Finding("note" if is_minor else "warning", "replicated", text, keys)


def _attention(step: Dissection) -> Iterator[Finding]:
    run = step.case.run
    if step.attention or run.train.attention == "xla":
        return
    major, _ = step.target.compute_capability
    widest = 256 if major >= 9 else 128
    reasons = {
        "Precision.compute": run.precision.compute == "float32",
        "Model.head_dim": run.model.head_width % 8 != 0 or run.model.head_width > widest,
        "Data.packing": run.data.packing == "documents",
        "Model.position": run.model.position == "alibi",
        "Train.context_exchange": step.case.shards("seq") > 1 and run.train.context_exchange == "ring",
    }
    keys = tuple(key for key, holds in reasons.items() if holds)
    text = f"attention runs in plain XLA, not in cuDNN's kernel (on this GPU for heads of up to {widest} numbers)"
    yield Finding("note", "attention", text, keys)


def _plan(step: Dissection) -> Iterator[Finding]:
    planned, found = step.memory.compiled, step.compiled.peak_bytes
    if abs(planned - found) > PLAN_ERROR * found:
        yield Finding("note", "plan", f"the plan's estimate, {gib(planned)}, is off by {planned / found - 1:+.0%}")


def _even_experts(step: Dissection) -> Iterator[Finding]:
    if step.case.run.model.num_experts and step.program.estimated and step.case.run.train.batch_ramp is None:
        yield Finding("note", "experts", "FLOPs and exchanges are counted as if experts got equally many tokens")


Rule = Callable[[Dissection], Iterator[Finding]]
RULES: tuple[Rule, ...] = (
    _fits, _arguments, _donation, _reductions_in_loops, _rematerialized, _long_buffers, _zero_bytes, _flops, _permutes,
    _links, _replicated, _attention, _plan, _even_experts,
)  # fmt: skip
