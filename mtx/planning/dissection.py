"""A compiled step in figures: what it holds, multiplies and exchanges, and what its case says that it should.

Decides what is counted and per what: everything per device and step of the full batch. What the figures are good or bad
for is `mtx.planning.audit`'s.

Invariant: figures come from the program and from the compiler; estimates stand apart, in `expected` and `memory`.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from mtx.config.axes import MESH_AXES
from mtx.planning.activations import keeps_attention
from mtx.planning.case import Case
from mtx.planning.flops import model_flops_per_token
from mtx.planning.hlo import Instruction, Program, read_program
from mtx.planning.hlo_buffers import Buffer, Sources, operation, read_buffers
from mtx.planning.hlo_collectives import Collective, read_collectives
from mtx.planning.hlo_products import AttentionCall, Product, read_attention, read_products
from mtx.planning.hlo_traffic import count_traffic
from mtx.planning.memory import Memory, estimate_memory
from mtx.planning.plan import usable_bytes
from mtx.planning.rehearsal import Compiled
from mtx.planning.target import Target, find_target
from mtx.sharding import ZERO_AXES, mesh_axes
from mtx.training.schedule import CLOSED_FORMS

NUM_BUFFERS = 12
LARGE_BYTES = 16 * 2**20
"""What is smaller is not worth a word."""

SPLIT_BY_TENSOR = ("vocab", "heads", "kv_heads", "mlp")
"""Logical axes that `tensor` splits where they divide; it never splits the others."""


@dataclass(frozen=True)
class Exchange:
    """All collectives of one kind along the same axes.

    Attributes:
        kind: As `Collective.kind`.
        axes: Mesh axes.
        count: How often they run.
        size_bytes: Of all of them.
        leaves_domain: Whether a group reaches beyond GPUs that NVLink joins.
    """

    kind: str
    axes: tuple[str, ...]
    count: int
    size_bytes: int
    leaves_domain: bool


@dataclass(frozen=True)
class Replicated:
    """Arrays of a parameter of which several devices have the same, though an axis could split them.

    Attributes:
        parameter: 'layers/mlp/up/weight'.
        array: `weight` or `moments`.
        size_bytes: Of a device.
        axes: Mesh axes along which devices hold the same.
    """

    parameter: str
    array: str
    size_bytes: int
    axes: tuple[str, ...]


@dataclass(frozen=True)
class Dissection:
    """A case and the program that it became."""

    case: Case
    compiled: Compiled

    @property
    def target(self) -> Target:
        return find_target(self.case.cluster.gpu.name)

    @cached_property
    def program(self) -> Program:
        return read_program(self.compiled.program, count_turns(self.case))

    @cached_property
    def lines(self) -> dict[str, Instruction]:
        """The program's instructions by name."""
        return {name: line for computation in self.program.computations.values() for name, line in computation.items()}

    @cached_property
    def sources(self) -> Sources:
        return Sources(self.compiled.program)

    @cached_property
    def collectives(self) -> list[Collective]:
        """Every one that has somebody to talk to."""
        return [c for c in read_collectives(self.program, self.case.sizes) if c.axes]

    @cached_property
    def exchanges(self) -> list[Exchange]:
        """The collectives in sums, those with most bytes first."""
        counts: Counter[tuple[str, tuple[str, ...]]] = Counter()
        sizes: Counter[tuple[str, tuple[str, ...]]] = Counter()
        for c in self.collectives:
            counts[c.kind, c.axes] += c.executions
            sizes[c.kind, c.axes] += c.executions * c.size_bytes
        return [
            Exchange(kind, axes, counts[kind, axes], size, self.leaves_domain(axes))
            for (kind, axes), size in sizes.most_common()
        ]

    def leaves_domain(self, axes: tuple[str, ...]) -> bool:
        """Whether devices that differ along these axes are of several NVLink domains."""
        shape = tuple(self.case.sizes.values())
        domains = (np.arange(math.prod(shape)) // self.case.cluster.domain).reshape(shape)
        along = tuple(MESH_AXES.index(axis) for axis in axes)
        return bool((domains.max(axis=along) != domains.min(axis=along)).any())

    @cached_property
    def products(self) -> list[Product]:
        return read_products(self.program)

    @cached_property
    def attention(self) -> list[AttentionCall]:
        """Attention in kernels of cuDNN."""
        return read_attention(self.program)

    @property
    def attention_flops(self) -> int:
        """Of the products in attention kernels."""
        return sum(call.flops for call in self.attention)

    @property
    def matmul_flops(self) -> int:
        """Of all products, those in attention kernels included. Each branch of a conditional counts as taken."""
        return sum(product.flops for product in self.products) + self.attention_flops

    @cached_property
    def model_flops(self) -> float:
        """What the step needs: forward and backward, attention in full, no recomputation."""
        run, whole = self.case.run, self.case.declared.definition.whole
        per_token = model_flops_per_token(run.model, whole.params, whole.axes, run.train.seq_len)
        return per_token * self.case.tokens_per_step / self.case.cluster.num_gpus

    @property
    def forward_equivalents(self) -> float:
        """Forward passes that the products would make up; 3 without recomputation, bubbles and padding."""
        return 3 * self.matmul_flops / self.model_flops

    @cached_property
    def traffic(self) -> dict[str, int]:
        """Bytes of operands and results of all operations, by what they are (`count_traffic`)."""
        return count_traffic(self.program)

    @cached_property
    def buffers(self) -> list[Buffer]:
        """The largest ones."""
        return read_buffers(self.compiled.buffers, self.program, self.sources, NUM_BUFFERS)

    @cached_property
    def memory(self) -> Memory:
        """The plan's estimate."""
        return estimate_memory(self.case)

    @property
    def usable_bytes(self) -> int:
        """Of the card, as plans reckon it."""
        return usable_bytes(self.case.cluster.gpu)

    @property
    def free_bytes(self) -> int:
        """Of that, beside the program and what the plan reckons for communication and overhead; negative: too much."""
        outside = self.memory.parts["communication"] + self.memory.parts["overhead"]
        return self.usable_bytes - outside - self.compiled.peak_bytes

    @property
    def batch_bytes(self) -> int:
        """Of a device's part of a batch, as `mtx.training.inputs` describes it."""
        run = self.case.run
        rows, length = run.train.global_batch_size // self.case.shards("batch"), run.train.seq_len
        arrays = 3 if run.data.packing == "documents" else 1
        numbers = arrays * rows * (length + 1) + 1  # the learning rate
        if run.train.batch_ramp is not None:
            numbers += rows * length + 1
        if run.train.dropout > 0:
            numbers += rows
        return 4 * numbers

    @cached_property
    def replicated(self) -> list[Replicated]:
        """Arrays of LARGE_BYTES and more that a mesh axis leaves whole, though it splits others."""
        found = []
        sizes, wide = self.case.sizes, {"float32": 4, "bfloat16": 2}[self.case.run.precision.params]
        for parameter, shape, placement in self.case.placed:
            arrays = {"weight": (placement.storage, wide)}
            if own := sum(width for moment, width in parameter.moments if moment == parameter.shape):
                arrays["moments"] = (placement.optimizer, own)
            for name, (spec, width) in arrays.items():
                size = self.case.local_size(shape, spec) * width
                splitting = (*ZERO_AXES, "tensor") if set(SPLIT_BY_TENSOR) & set(parameter.axes) else ZERO_AXES
                unused = [axis for axis in splitting if sizes[axis] > 1 and axis not in mesh_axes(spec)]
                if size >= LARGE_BYTES and unused:
                    axes = tuple(axis for axis in MESH_AXES if axis in unused)
                    found.append(Replicated("/".join(parameter.path), name, size, axes))
        return sorted(found, key=lambda entry: -entry.size_bytes)

    @cached_property
    def ticks(self) -> Mapping[str, int] | None:
        """Ticks of the pipeline by what they do; None without one."""
        return _ticks(self.case)

    @property
    def expected_forward_equivalents(self) -> float:
        """By layout and recomputation: idle ticks and empty slots multiply as others do."""
        case, run = self.case, self.case.run
        attention = 4.0 * run.train.seq_len * run.model.num_heads * run.model.head_width * run.model.num_layers
        share = 3 * attention / (self.model_flops * case.cluster.num_gpus / case.tokens_per_step)
        again = {"none": 0.0, "selective": 0.0 if keeps_attention(case) else share, "full": 1.0}[run.train.recompute]
        if self.attention:  # the kernel's backward pass multiplies queries and keys again
            again += share / 2
        factor = 1.0
        if case.stages is not None and self.ticks is not None:
            units = case.num_microbatches * run.pipeline.virtual_stages
            factor = (self.ticks["warm"] + self.ticks["steady"]) / units
            factor *= len(case.slots) * case.sizes["pipe"] / run.model.num_layers
        return (3 + again) * factor

    def as_json(self) -> dict[str, Any]:
        """All figures; the plan's under `plan`."""
        compiled = self.compiled
        return {
            "gpu": self.case.cluster.gpu.name,
            "gpus": self.case.cluster.num_gpus,
            "mesh": self.case.sizes,
            "jax": compiled.jax,
            "argument_bytes": compiled.argument_bytes,
            "output_bytes": compiled.output_bytes,
            "alias_bytes": compiled.alias_bytes,
            "temp_bytes": compiled.temp_bytes,
            "generated_code_bytes": compiled.code_bytes,
            "peak_bytes": compiled.peak_bytes,
            "gpu_memory_bytes": self.target.memory_bytes,
            "usable_memory_bytes": self.usable_bytes,
            "free_bytes": self.free_bytes,
            "fits": self.free_bytes >= 0,
            "lower_seconds": compiled.lower_seconds,
            "compile_seconds": compiled.compile_seconds,
            "compiler_memory_bytes": compiled.memory_of_compiler_bytes,
            "matmul_flops": self.matmul_flops,
            "attention_kernel_flops": self.attention_flops,
            "attention_kernel_calls": sum(call.executions for call in self.attention),
            "model_flops": self.model_flops,
            "forward_equivalents": self.forward_equivalents,
            "traffic_bytes": self.traffic,
            "collectives": [
                {
                    "kind": e.kind, "axes": list(e.axes), "count": e.count, "bytes": e.size_bytes,
                    "crosses_nvlink_domain": e.leaves_domain,
                }
                for e in self.exchanges
            ],
            "replicated_parameters": [
                {"name": r.parameter, "array": r.array, "bytes": r.size_bytes, "axes": list(r.axes)}
                for r in self.replicated
            ],
            "largest_buffers": [
                {
                    "bytes": b.size_bytes, "shape": f"{b.shape.dtype}{list(b.shape.dims)}", "argument": b.is_argument,
                    "operation": b.origin, "source": b.source,
                }
                for b in self.buffers
            ],
            "plan": {
                "state_bytes": self.memory.state, "batch_bytes": self.batch_bytes,
                "compiled_bytes": self.memory.compiled, "parts": dict(self.memory.parts),
            },
        }  # fmt: skip


def _ticks(case: Case) -> dict[str, int] | None:
    if case.stages is None:
        return None
    closed_form = CLOSED_FORMS[case.run.pipeline.schedule]
    first, last, end = closed_form(
        case.stages.num_stages, case.stages.virtual_stages, case.num_microbatches
    ).ticks  # fmt: skip
    return {"warm": first, "steady": last - first, "cool": end - last}


def count_turns(case: Case) -> Callable[[Instruction], int]:
    """How often loops turn that learn it at run time, to be asked of each in the order of the program: those over the
    microbatches of a batch that ramps up, at its full size, and those over the blocks of rows that experts have
    received, as if all received equally many."""
    ticks, ramps, routed = _ticks(case), case.run.train.batch_ramp is not None, case.run.model.num_experts > 0
    # The ticks that only warm up are the same for every batch, and known.
    outer = iter([case.num_microbatches] if ticks is None else [ticks["steady"], ticks["cool"]])

    def turns(loop: Instruction) -> int:
        if not routed or (ramps and "while/body" not in operation(loop)):
            return next(outer, case.num_microbatches)
        # Room is for the case that all devices send all they have here: [blocks, rows, width].
        blocks = next((shape.dims[0] for shape in loop.shapes if len(shape.dims) == 3), 1)
        experts = max(1, case.run.model.num_experts // case.shards("experts"))
        return min(blocks, experts + math.ceil((blocks - experts) / case.shards("experts")))

    return turns
