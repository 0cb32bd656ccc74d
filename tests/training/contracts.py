"""Steps of many layouts, compiled and never run; and, by hand, what they should exchange and multiply.

Letters: L layers of a device, b rows of a microbatch, T tokens of a row, D model, F feed-forward.
"""

from __future__ import annotations

import functools
import math
import os
import tempfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from tiny import make_setup

from mtx.config.axes import MESH_AXES
from mtx.planning.hlo import Program, read_program
from mtx.planning.hlo_collectives import Collective, read_collectives
from mtx.planning.hlo_products import Product, read_products
from mtx.sharding import Placement, axis_sizes, mesh_axes
from mtx.training.state import Setup
from mtx.training.step import make_train_step

# Wide against the 16 tokens of a row, as large models are: attention is a small part of a layer. No two dims that
# products tell apart are equal on any of the layouts.
WIDE: dict[str, Any] = {
    "vocab_size": 208, "d_model": 128, "num_layers": 4, "num_heads": 4, "max_seq_len": 16, "init_std": 0.2,
}  # fmt: skip
GATED: dict[str, Any] = {
    "vocab_size": 208, "d_model": 96, "num_layers": 6, "num_heads": 4, "num_kv_heads": 2, "d_ff": 160,
    "max_seq_len": 16, "position": "rotary", "norm": "rmsnorm", "activation": "swiglu", "use_bias": False,
    "tie_embeddings": False,
}  # fmt: skip
ROUTED: dict[str, Any] = {**GATED, "num_layers": 2, "num_experts": 4, "experts_per_token": 2, "expert_d_ff": 40}
PIPE2 = {"pipe": 2, "data": 2, "tensor": 2}

CASES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "one": (WIDE, {}),
    "data8": (WIDE, {"mesh": {"data": 8}}),
    "fsdp4 data2": (WIDE, {"mesh": {"fsdp": 4, "data": 2}}),
    "fsdp4 data2 gated scan selective": (
        GATED, {"mesh": {"fsdp": 4, "data": 2}, "train": {"recompute": "selective", "scan_layers": True}},
    ),
    "tensor4 data2": (WIDE, {"mesh": {"tensor": 4, "data": 2}}),
    "tensor4 data2 gated full": (GATED, {"mesh": {"tensor": 4, "data": 2}, "train": {"recompute": "full"}}),
    "tensor4 data2 no-sp": (WIDE, {"mesh": {"tensor": 4, "data": 2}, "rules": {"sequence_parallel": False}}),
    "pipe2 selective": (WIDE, {"mesh": PIPE2, "train": {"recompute": "selective"}}),
    "pipe2 full": ({**WIDE, "num_layers": 6}, {"mesh": PIPE2, "train": {"recompute": "full"}}),
    "pipe2 gated none": (GATED, {"mesh": PIPE2, "train": {"recompute": "none"}}),
    "pipe2 v2 selective": (
        WIDE, {"mesh": PIPE2, "train": {"recompute": "selective"}, "pipeline": {"virtual_stages": 2}},
    ),
    "pipe2 last": (WIDE, {"mesh": PIPE2, "train": {"recompute": "selective"}, "pipeline": {"head": "last"}}),
    "pipe4 data2 gated": (GATED, {"mesh": {"pipe": 4, "data": 2}, "train": {"recompute": "selective"}}),
    "context2 tensor2 data2": (WIDE, {"mesh": {"context": 2, "tensor": 2, "data": 2}}),
    "context4 data2 gated selective": (
        GATED, {"mesh": {"context": 4, "data": 2}, "train": {"recompute": "selective"}},
    ),
    "expert2 tensor2 data2": (ROUTED, {"mesh": {"expert": 2, "tensor": 2, "data": 2}}),
}  # fmt: skip
MICROBATCHES = 8

BARRIERS_HOLD = jax.__version_info__ >= (0, 11)
"""Older compilers for CPUs take away the barriers between the forward pass and what the backward pass computes or
gathers again, and merge exchanges that are then equal. Loops keep the two apart in all of them."""

Bytes = Counter[tuple[str, tuple[str, ...]]]
"""(kind of a collective, mesh axes) -> bytes of a step and device."""


@dataclass(frozen=True)
class Step:
    """A compiled step.

    Attributes:
        microbatches: Of a step, one row of each device.
        memory: What XLA says of it, in bytes.
        log: What was written to the standard error output while it was compiled.
    """

    setup: Setup
    microbatches: int
    program: Program
    memory: Any
    argument_bytes: int
    log: str

    @functools.cached_property
    def collectives(self) -> list[Collective]:
        return read_collectives(self.program, axis_sizes(self.setup.mesh))

    @functools.cached_property
    def products(self) -> list[Product]:
        return read_products(self.program)


@functools.cache
def compile_step(name: str, microbatches: int = MICROBATCHES) -> Step:
    """Compiles a layout for the first of the simulated devices; nothing is allocated."""
    model, sections = CASES[name]
    rows = microbatches * math.prod(sections.get("mesh", {}).get(axis, 1) for axis in ("data", "fsdp", "expert"))
    train = {**sections.get("train", {}), "microbatch_size": 1, "global_batch_size": rows}
    setup = make_setup(model, **{**sections, "train": train})
    by_rows = NamedSharding(setup.mesh, P(setup.rules["batch"] or None))
    tokens = jax.ShapeDtypeStruct((rows, setup.run.train.seq_len + 1), np.int32, sharding=by_rows)
    batch = {"tokens": tokens, "learning_rate": np.float32(1e-3)}
    lowered = make_train_step(setup).lower(setup.abstract_state, batch)
    compiled, log = compile_aloud(lowered)
    arguments = sum(shard_bytes(leaf) for leaf in jax.tree.leaves((setup.abstract_state, tokens)))
    # Experts turn as often as they have blocks of tokens; nothing is exchanged in there.
    program = read_program(compiled.as_text(), unknown_turns=1)
    return Step(setup, microbatches, program, compiled.memory_analysis(), arguments + 4, log)


def compile_aloud(lowered: Any) -> tuple[Any, str]:
    """The compiled program, and what XLA wrote to the standard error output: it does so past `sys.stderr`."""
    with tempfile.TemporaryFile() as file:
        terminal = os.dup(2)
        os.dup2(file.fileno(), 2)
        try:
            compiled = lowered.compile()
        finally:
            os.dup2(terminal, 2)
            os.close(terminal)
        file.seek(0)
        return compiled, file.read().decode()


def shard_bytes(leaf: jax.ShapeDtypeStruct) -> int:
    """Of an array's part on one device."""
    return math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize


@dataclass(frozen=True)
class Work:
    """How often the parts of a step run on each device, by the schedule."""

    forward: int
    backward: int
    head: int
    layers: int  # in one unit of work


def work_of(step: Step) -> Work:
    """1F1B in lockstep: a stage does a forward unit in U + S - 1 ticks, with and without a microbatch, and as many
    backward units; the head runs where both do. Otherwise all of it once for each microbatch."""
    stages, M = step.setup.stages, step.microbatches
    if stages is None:
        return Work(M, M, M, step.setup.run.model.num_layers)
    S, v = stages.num_stages, stages.virtual_stages
    return Work(M * v + S - 1, M * v + S - 1, M * v + S - S * v, len(stages.slots))


def local_shape(setup: Setup, shape: tuple[int, ...], spec: P) -> tuple[int, ...]:
    """What one device has of an array."""
    return NamedSharding(setup.mesh, spec).shard_shape(shape)


def parameters(setup: Setup) -> Iterator[tuple[str, tuple[int, ...], Placement]]:
    """Name, shape and placement of each parameter, layers stacked."""
    leaves = jax.tree_util.tree_leaves_with_path(setup.abstract_stacks)
    for (path, leaf), placement in zip(leaves, jax.tree.leaves(setup.placements), strict=True):
        yield jax.tree_util.keystr(path, simple=True, separator="/"), leaf.shape, placement


def layer_matrices(setup: Setup) -> list[tuple[int, ...]]:
    """[inputs, outputs] of each matrix of a layer, on one device."""
    return [
        local_shape(setup, shape, placement.compute)[1:]
        for name, shape, placement in parameters(setup)
        if name.startswith("layers/") and placement.is_matrix
    ]


def in_mesh_order(axes: Any) -> tuple[str, ...]:
    return tuple(axis for axis in MESH_AXES if axis in axes)


def exchange_of_parameters(setup: Setup) -> Bytes:
    """Once a step: what ZeRO-2 gathers, scatters and sums. All parameters and gradients have 4 bytes."""
    sizes, found = axis_sizes(setup.mesh), Bytes()
    for _, shape, placement in parameters(setup):
        size = 4 * math.prod(local_shape(setup, shape, placement.compute))
        size //= math.prod(sizes[axis] for axis in placement.layer_axes)
        if placement.step_axes:
            over = in_mesh_order(placement.step_axes)
            found["all-gather", over] += size
            found["reduce-scatter", over] += size
            size //= math.prod(sizes[axis] for axis in over)
        live = {axis for axis, count in sizes.items() if count > 1}
        if summed := in_mesh_order(live - {*mesh_axes(placement.storage)}):
            found["all-reduce", summed] += size
    return found


def exchange_of_layer_weights(step: Step) -> Bytes:
    """ZeRO-3: the ends of the model are gathered once a step, since they would be there all the time anyway.

    Layers are gathered for each forward and each backward pass.
    """
    found, passes = Bytes(), 2 if step.setup.scans_layers or BARRIERS_HOLD else 1
    for name, shape, placement in parameters(step.setup):
        if placement.layer_axes:
            size = 4 * math.prod(local_shape(step.setup, shape, placement.compute))
            is_layer = name.startswith("layers/")
            found["all-gather", placement.layer_axes] += size * (passes * step.microbatches if is_layer else 1)
            found["reduce-scatter", placement.layer_axes] += size * step.microbatches
    return found


def exchange_of_activations(step: Step) -> Bytes:
    """Tensor and sequence parallelism, stages, context."""
    setup, work, found = step.setup, work_of(step), Bytes()
    sizes, model, train = axis_sizes(setup.mesh), setup.run.model, setup.run.train
    tokens = train.seq_len // sizes["context"]
    whole = 4 * tokens * model.d_model
    shard = whole // (sizes["tensor"] if setup.run.rules.sequence_parallel else 1)
    head_is_sharded = sizes["pipe"] > 1 and setup.run.pipeline.head == "sharded"
    if sizes["tensor"] > 1 and setup.run.rules.sequence_parallel:
        # A layer gathers twice and scatters twice, and so do their transposes. Where the backward pass runs a layer
        # again, what its products multiply is gathered anew; its last sum is what nobody needs.
        rerun = {"none": (0, 0), "selective": (2, 0), "full": (2, 2)}[train.recompute]
        dead = 0 if train.recompute != "full" else 1 if setup.stages else work.layers
        gathers = work.layers * (2 * work.forward + (2 + rerun[0]) * work.backward)
        scatters = work.layers * (2 * work.forward + (2 + rerun[1]) * work.backward) - dead * work.backward
        # The embedding scatters, its transpose gathers; the head gathers, its transpose scatters.
        found["all-gather", ("tensor",)] += whole * (gathers + work.backward + work.head)
        found["reduce-scatter", ("tensor",)] += whole * (scatters + work.forward + work.head)
    elif sizes["tensor"] > 1:
        # Two sums of a layer and two of its transpose; one of the embedding, one of the head's transpose.
        found["all-reduce", ("tensor",)] += whole * (4 * work.layers * work.forward + work.forward + work.head)
    if vocab := in_mesh_order((*setup.rules["vocab"], *(("pipe",) if head_is_sharded else ()))):
        # Of each token's softmax: the maximum, the sum, the target's logit.
        found["all-reduce", vocab] += 3 * 4 * tokens * work.head
    if sizes["pipe"] > 1:
        # What the only tick with backward units alone sends is for nobody; a loop of such ticks sends it all the same.
        cool = work.backward - work.head
        found["collective-permute", ("pipe",)] += shard * (work.forward + work.backward - (cool == 1))
        if head_is_sharded:  # the last stage's output, and the gradient by it
            found["all-reduce", ("pipe",)] += 2 * shard * work.head
    if (ring := sizes["context"]) > 1:
        # A shard's keys and values visit all others in the forward pass, in the backward pass, and where attention is
        # computed again. The first steps of these journeys are equal, and one for XLA where no barrier is between
        # them. The gradients go once round.
        keys = 2 * 4 * tokens * math.prod(local_shape(setup, (model.kv_heads,), P(setup.rules["kv_heads"] or None)))
        again = train.recompute != "none"
        steps = 1 + (again and BARRIERS_HOLD) + (ring - 2) * (2 + again) + ring
        found["collective-permute", ("context",)] += keys * model.head_width * steps * work.layers * step.microbatches
    if model.num_experts:
        found += exchange_of_experts(step)
    return found


def exchange_of_experts(step: Step) -> Bytes:
    """Dropless: each device keeps room for all that it may send to each shard of the experts."""
    setup, found = step.setup, Bytes()
    sizes, model = axis_sizes(setup.mesh), setup.run.model
    shards = sizes["expert"]
    here = model.num_experts // shards
    rows = shards * setup.run.train.seq_len * min(model.experts_per_token, here)
    # There and back, and the transposes; each row's weight, and its transpose; how many rows are of each expert.
    journeys = 4 * 4 * rows * model.d_model + 2 * 4 * rows + 4 * shards * here
    found["all-to-all", ("expert",)] += journeys * model.num_layers * step.microbatches
    # Counts of tokens are made known to be equal on the shards of a row, and are summed once a step.
    found["all-reduce", ("tensor",)] += 4 * model.num_experts * model.num_layers * step.microbatches
    found["all-reduce", ("data", "expert", "tensor")] += 4 * (model.num_experts + 1) * model.num_layers
    return found


def expected_bytes(step: Step) -> Bytes:
    """All that a step exchanges but single numbers: sums of losses, norms of gradients."""
    return exchange_of_parameters(step.setup) + exchange_of_layer_weights(step) + exchange_of_activations(step)


def measured_bytes(collectives: list[Collective]) -> Bytes:
    """The same, of the compiled program."""
    found = Bytes()
    for c in collectives:
        shapes = c.results if c.kind == "all-gather" else c.operands
        if size := sum(shape.size_bytes for shape in shapes if shape.size > 1):
            found[c.kind, c.axes] += size * c.executions
    return found


def classify(step: Step, product: Product) -> str:
    """`weights` of layers, `head`, `attention`, or `bias`: its gradient, a row of ones times the tokens' gradients."""
    setup = step.setup
    tokens = setup.run.train.seq_len // axis_sizes(setup.mesh)["context"]
    sides = sorted((product.rows, product.contracted, product.columns))
    if product.batch == 1 and product.rows == 1:
        return "bias"
    if product.batch == 1 and tokens in sides:
        sides.remove(tokens)
        if sides in [sorted(shape) for shape in layer_matrices(setup)]:
            return "weights"
        if sides == sorted((head_rows(setup), setup.run.model.d_model)):
            return "head"
    heads = setup.run.model.head_width
    return "attention" if heads in (product.rows, product.contracted, product.columns) else f"unknown: {product}"


def head_rows(setup: Setup) -> int:
    """Rows of the head that a device multiplies with."""
    sizes = axis_sizes(setup.mesh)
    shards = math.prod(sizes[axis] for axis in setup.rules["vocab"])
    stages = sizes["pipe"] if setup.run.pipeline.head == "sharded" else 1
    return -(-setup.run.model.vocab_size // shards // stages)


def forward_flops(step: Step) -> dict[str, int]:
    """Of one layer and one microbatch, on one device: its matrices, the last one of them, and attention.

    Attention in a ring multiplies c + 1/2 of the 2 c slices with those of a shard, on the average of its two.
    """
    setup, tokens = step.setup, step.setup.run.train.seq_len
    sizes = axis_sizes(setup.mesh)
    ring, heads = sizes["context"], setup.run.model.num_heads // sizes["tensor"]
    down = next(
        local_shape(setup, s, p.compute) for n, s, p in parameters(setup) if n == "layers/feedforward/down/weight"
    )
    pairs = tokens * tokens if ring == 1 else (2 * ring + 1) * (tokens // (2 * ring)) ** 2
    return {
        "weights": sum(2 * tokens // ring * math.prod(shape) for shape in layer_matrices(setup)),
        "last": 2 * tokens // ring * math.prod(down[1:]),
        "attention": 2 * 2 * pairs * heads * setup.run.model.head_width,
    }
