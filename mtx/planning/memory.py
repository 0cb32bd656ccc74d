"""Bytes of GPU memory that a training step takes, by part.

Decides the estimate of `mtx train`'s own step; the parts of other software come from `mtx.planning.other_memory`.

Invariant: `Memory.state` is exact, to the byte: it follows from the placements that the training state is built from.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

from mtx.nn.loss import CHUNK_BYTES
from mtx.planning.activations import FLOAT32, WIDTHS, Layer
from mtx.planning.case import Case
from mtx.planning.target import TARGETS
from mtx.training.remat import SELECTIVE, ring_names
from mtx.training.state import MOST_LAYERS_IN_LINE

PARTS = (
    "parameters", "compute_weights", "gradients", "optimizer", "activations", "logits", "pipeline", "communication",
    "overhead",
)  # fmt: skip
"""In the order in which pictures stack them."""


COMMUNICATOR_BYTES = 256 * 2**20
"""Of NCCL's buffers for one axis of the mesh: channels between neighbours, each with buffers of some MiB. Not measured
by us; it depends on the version, the network and the number of channels."""
CONTEXT_BYTES = 768 * 2**20
"""Of CUDA's context, the kernels' code and the libraries' handles. Not measured by us."""
FRAGMENTATION = 0.02
"""Share of what is allocated that the allocator loses between blocks. Not measured by us: the temporaries of a step are
one block, in which XLA has packed them, and arguments are blocks that stay."""

EXPLAIN: Mapping[str, str] = {
    "parameters": "The weights that the optimizer updates (Precision.params), split by Mesh.tensor, pipe, expert and "
    "fsdp, with Rules.zero = 2 by all axes of data parallelism.",
    "compute_weights": "Their copy in Precision.compute for a step, split by Mesh.tensor, pipe, expert and fsdp.",
    "gradients": "Sums over microbatches in float32, split as the copy; with one microbatch and no pipeline in "
    "Precision.compute. Layers in a loop (Train.scan_layers) have those of a microbatch besides.",
    "optimizer": "Its moments, split by Rules.zero = 1 or 2; Train.offload_optimizer moves them to the host.",
    "activations": "What the backward pass needs of a microbatch (Train.recompute, microbatch_size, seq_len), split by "
    "Mesh.tensor and context; with a pipeline of one chunk, else of all layers; and what a layer works with.",
    "logits": "Those of Train.loss_chunk_tokens, and the gradient of the head, split by Mesh.tensor, and with "
    "Pipeline.head = 'sharded' by Mesh.pipe.",
    "pipeline": "Inputs and kept values of 2 * Mesh.pipe * Pipeline.virtual_stages - 1 microbatches "
    "(Train.recompute), what is passed on, and the weights of the chunk at work.",
    "communication": "NCCL's buffers: an estimate, for each axis of the mesh with devices that exchange.",
    "overhead": "CUDA's context and what the allocator cannot use: an estimate.",
}
"""What each part depends on."""


@dataclass(frozen=True)
class Memory:
    """Of the GPU that holds most.

    Attributes:
        parts: Each of PARTS -> bytes.
    """

    parts: Mapping[str, int]

    @property
    def total(self) -> int:
        """All of it, to be compared with what the GPU has."""
        return sum(self.parts.values())

    @property
    def state(self) -> int:
        """The training state between steps: exact."""
        return self.parts["parameters"] + self.parts["optimizer"]

    @property
    def compiled(self) -> int:
        """What the compiler sees: its arguments and the peak of what the program allocates."""
        return self.total - self.parts["communication"] - self.parts["overhead"]


def estimate_memory(case: Case) -> Memory:
    """The memory of one step at its peak."""
    if case.software != "mtx":
        from mtx.planning.other_memory import estimate_parts

        return Memory(dict(estimate_parts(case)))
    return Memory(_Step(case).parts())


@dataclass(frozen=True)
class _Step:
    case: Case

    @cached_property
    def width(self) -> int:
        """Bytes of a number that is computed with."""
        return WIDTHS[self.case.run.precision.compute]

    @cached_property
    def layers(self) -> dict[str, Layer]:
        return {stack: Layer(self.case, stack == "expert_layers") for stack in self.case.declared.definition.layers}

    @cached_property
    def scans_layers(self) -> bool:
        """As `mtx.training.state.Setup.scans_layers`."""
        wanted = self.case.run.train.scan_layers
        if wanted is not None:
            return wanted
        return self.case.stages is None and len(self.layers) == 1 and len(self.case.slots) > MOST_LAYERS_IN_LINE

    @cached_property
    def accumulates(self) -> bool:
        """Whether gradients of several microbatches are added up."""
        return self.case.num_microbatches > 1 or self.case.stages is not None

    def parts(self) -> dict[str, int]:
        parts = dict.fromkeys(PARTS, 0)
        run, case = self.case.run, self.case
        for parameter, shape, placement in case.placed:
            parts["parameters"] += case.local_size(shape, placement.storage) * WIDTHS[run.precision.params]
            for moment, width in parameter.moments:
                if moment != parameter.shape:  # factored: on every device, with a row per layer of a filled up stack
                    parts["optimizer"] += math.prod(moment) * shape[0] // parameter.shape[0] * width
                elif not run.train.offload_optimizer:
                    parts["optimizer"] += case.local_size(shape, placement.optimizer) * width
            used = case.local_size(shape, placement.storage) * math.prod(case.sizes[a] for a in placement.step_axes)
            width = FLOAT32 if placement.in_float32 else self.width
            if width != WIDTHS[run.precision.params] or placement.step_axes:
                parts["compute_weights"] += used * width
            parts["gradients"] += used * (FLOAT32 if self.accumulates else width)
            if self.scans_layers and self.accumulates and parameter.axes[0] == "layers":
                parts["gradients"] += used * width  # of a microbatch, stacked by the loop
        # Counters, of which there may be one per layer; and that of the steps.
        rows = {parameter.shape[0]: shape[0] for parameter, shape, _ in case.placed if parameter.axes[0] == "layers"}
        for shape, width in case.declared.others:
            staged = (rows.get(shape[0], shape[0]), *shape[1:]) if shape else ()
            parts["optimizer"] += math.prod(staged) * width
        parts["optimizer"] += FLOAT32
        self._fill_peak(parts)
        compiled = sum(parts.values())
        parts["communication"] = COMMUNICATOR_BYTES * sum(size > 1 for size in case.sizes.values())
        parts["overhead"] = CONTEXT_BYTES + int(FRAGMENTATION * compiled)
        return parts

    def _fill_peak(self, parts: dict[str, int]) -> None:
        """What is there at the peak, which is in the head or at the beginning of the backward pass of the layers."""
        case = self.case
        kept = self._kept
        head, table = self._head
        workspace = self._library_work
        backward = max((layer.backward_work for layer in self.layers.values()), default=0) + self._one_layer
        if case.stages is not None:
            a_chunk = self._ring_slot
            parts["pipeline"] = (2 * case.stages.num_stages * case.stages.virtual_stages - 1) * a_chunk
            parts["pipeline"] += 4 * next(iter(self.layers.values())).stream  # what is passed on, both ways
            parts["pipeline"] += self._chunk_weights
            kept = self._recomputed_in_stage
            if a_chunk > kept and a_chunk + head > kept + backward + table:
                kept = a_chunk  # of the forward unit, before it goes into the ring
        work, logits = (backward, table) if backward + table >= head else (0, head)
        if not self.accumulates and not self.scans_layers:  # gradients come to be as what layers keep goes
            if kept + work + logits > parts["gradients"] + backward:
                parts["gradients"] = 0
            else:
                kept, work, logits = 0, backward, 0
        parts["activations"], parts["logits"] = kept + work, logits
        parts["activations"] += workspace

    @cached_property
    def _library_work(self) -> int:
        """What cuBLASLt is given to work in."""
        target = TARGETS.get(self.case.cluster.gpu.name)
        return (32 if target is not None and target.compute_capability >= (9, 0) else 4) * 2**20

    @cached_property
    def _kept(self) -> int:
        """Without a pipeline: what all layers keep of a microbatch."""
        recompute = self.case.run.train.recompute
        explicit = self.scans_layers or self.case.sizes["fsdp"] > 1
        total = 0
        for stack in self.case.slots:
            layer = self.layers[stack]
            if recompute == "none":
                total += layer.keep_all(explicit=explicit)
            else:
                total += layer.keep(frozenset({"layer_in", *(SELECTIVE if recompute == "selective" else ())}))
        if recompute != "none":
            total += max(
                self.layers[stack].recompute(frozenset(SELECTIVE) if recompute == "selective" else frozenset())
                for stack in self.case.slots
            )
        return total

    @cached_property
    def _one_layer(self) -> int:
        """Weights of the largest layer gathered for ZeRO-3, and their gradients; gradients alone without it."""
        most = 0
        for stack in self.layers:
            gathered = 0
            for parameter, shape, placement in self.case.placed:
                if parameter.path[0] == stack and placement.is_matrix:
                    size = self.case.local_size(shape, placement.compute) * self.width
                    rows = shape[0] // self.case.shards("layers")
                    gathered += size // rows if placement.layer_axes else 0
            most = max(most, gathered)
        return most

    @cached_property
    def _chunk_weights(self) -> int:
        """Of interleaved stages: the weights of the chunk at work."""
        stages = self.case.stages
        if stages is None or stages.virtual_stages == 1:
            return 0
        total = 0
        for parameter, shape, placement in self.case.placed:
            if parameter.axes[0] == "layers" and placement.is_matrix:
                total += self.case.local_size(shape, placement.compute) * self.width // stages.virtual_stages
        return total

    @cached_property
    def _ring_slot(self) -> int:
        """Input and named values of a microbatch in a chunk."""
        stages = self.case.stages
        assert stages is not None
        names = ring_names(self.case.run.train.recompute)
        layer = self.layers[stages.slots[0]]
        return sum(self.layers[stack].keep(names) for stack in stages.slots) + layer.stream * ("layer_in" not in names)

    @cached_property
    def _recomputed_in_stage(self) -> int:
        """What the backward unit of a stage computes again of all its layers, before it runs them backward."""
        stages, run = self.case.stages, self.case.run
        assert stages is not None
        names, total = ring_names(run.train.recompute), 0
        for slot, stack in enumerate(stages.slots):
            layer = self.layers[stack]
            if run.pipeline.head == "last" and not stages.is_full(slot) and not layer.routed:
                total += layer.keep_all(explicit=True) - layer.keep(
                    names
                )  # a branch: of what is in it XLA keeps what JAX says
            else:
                total += layer.recompute(names)
        return total

    @cached_property
    def _head(self) -> tuple[int, int]:
        """Bytes at the peak of the head, and those that stay of it until the layers are done."""
        case, run = self.case, self.case.run
        rows = run.model.vocab_size // case.shards("vocab")
        if case.stages is not None and run.pipeline.head == "sharded":
            rows = -(-rows // case.stages.num_stages)
        layer = next(iter(self.layers.values()))
        seen = layer.gathered if set(case.rules["vocab"]) & set(case.rules["seq_sp"]) else layer.stream
        tokens = seen // (run.model.d_model * self.width)
        chunk = min(run.train.loss_chunk_tokens or max(1, CHUNK_BYTES // (FLOAT32 * rows)), tokens)
        chunks = -(-tokens // chunk)
        chunk = -(-tokens // chunks)
        table = rows * run.model.d_model
        scores, gradients = chunk * rows * FLOAT32, chunk * rows * self.width
        padded = table * self.width if rows % 8 else 0  # filled up for cuBLAS
        if chunks > 1:  # the gradient of the table is added up
            peak = gradients + max(scores, table * FLOAT32) + padded + table * FLOAT32
        else:
            peak = gradients + max(scores + padded, table * FLOAT32)
        is_cut = case.stages is not None and run.pipeline.head == "sharded"
        copied = table * self.width if is_cut or self._table_is_gathered else 0
        return peak + 2 * seen + copied, table * self.width + layer.stream + (copied if is_cut else 0)

    @property
    def _table_is_gathered(self) -> bool:
        """Whether ZeRO-3 splits the head's matrix."""
        ends = self.case.declared.definition.ends
        return any(p.path[0] == ends.table and placement.layer_axes for p, _, placement in self.case.placed)
