"""Bytes of GPU memory that a training step takes, by part.

Decides the estimate of `mtx train`'s own step; the parts of other software come from `mtx.planning.other_memory`.

Invariant: `Memory.state` is exact, to the byte: it follows from the placements that the training state is built from.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

from mtx.nn.loss import default_chunk
from mtx.planning.activations import FLOAT32, WIDTHS, Layer, keeps_attention
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
class _Head:
    """Attributes: all in bytes, but for the counts.

    chunks: How many there are of the tokens of a microbatch.
    scores, gradients: Logits of a chunk in float32, and their gradients.
    table: Numbers in the matrix on a device.
    padded: The matrix filled up for cuBLAS.
    seen: Its input.
    """

    chunks: int
    scores: int
    gradients: int
    table: int
    padded: int
    seen: int


@dataclass(frozen=True)
class _Step:
    case: Case

    @cached_property
    def width(self) -> int:
        """Bytes of a number that is computed with."""
        return WIDTHS[self.case.run.precision.activations]

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
        """What is there at the peak. The largest of the phases counts, not their sum."""
        phases = self._phases_in_turn(parts) if self.case.stages is None else self._phases_in_pipeline()
        parts |= max(phases, key=lambda changed: sum({**parts, **changed}.values()))
        parts["activations"] += self._library_work

    def _phases_in_pipeline(self) -> list[dict[str, int]]:
        """What each phase changes of the parts: the head, and the beginning of the backward pass of a chunk."""
        stages, layer, head = self.case.stages, next(iter(self.layers.values())), self._head
        assert stages is not None
        pipeline = (2 * stages.num_stages * stages.virtual_stages - 1) * self._ring_slot
        pipeline += 4 * layer.stream + self._chunk_weights  # what is passed on, both ways
        backward = max(layer.backward_work for layer in self.layers.values())
        copied = head.table * self.width if self.case.run.pipeline.head == "sharded" else 0
        product = head.table * FLOAT32
        if head.chunks > 1:  # the sum over chunks, and what goes into that over microbatches
            peak = head.gradients + max(head.scores, product) + head.padded + product
        else:
            peak = head.gradients + max(head.scores + head.padded, product)
        kept = self._recomputed_in_stage
        # The forward unit has all that a chunk keeps before it goes into the ring.
        at_head = {"activations": max(kept, self._ring_slot), "logits": peak + 2 * head.seen + copied}
        at_start = {"activations": kept + backward, "logits": head.table * self.width + layer.stream + copied}
        return [{"pipeline": pipeline, **phase} for phase in (at_head, at_start)]

    def _phases_in_turn(self, parts: Mapping[str, int]) -> list[dict[str, int]]:
        """The same without a pipeline: the head, the layers' backward pass at its beginning and end, and what follows.

        XLA puts off products that give gradients of weights, and keeps their factors: the head's until the layers are
        done, unless a loop over chunks has added it up; and with one microbatch those of layers in line, unless the
        barrier before the gathers of ZeRO-3 orders them.
        """
        head, kept, one_layer = self._head, self._kept, self._one_layer
        stream = next(iter(self.layers.values())).stream
        factors = head.gradients + head.seen
        product = head.table * FLOAT32
        stays = stream + (product if head.chunks > 1 else factors)
        copied = head.table * self.width if self._table_is_gathered and not head.padded else 0
        peak = head.scores + head.gradients + head.padded + 2 * head.seen + copied + product * (head.chunks > 1)
        work = max(layer.backward_work + self._one_mlp for layer in self.layers.values())
        work = max(work, one_layer)
        at_head = {"activations": kept, "logits": peak}
        at_first = {"activations": kept + self._recomputed + work, "logits": stays}
        at_last = {"activations": kept // len(self.case.slots) + self._recomputed + work, "logits": stays}
        zeros = 0 if self.case.run.model.tie_embeddings else head.table * self.width  # of the lookup's gradient
        at_end = {"activations": 0, "logits": product + head.table * self.width + zeros}
        if not self.scans_layers:
            gathered = self.case.sizes["fsdp"] > 1
            if self.accumulates:
                for phase in (at_last, at_end):
                    phase["gradients"] = parts["gradients"] + self._split_gradients
            elif gathered:
                at_first["gradients"] = 0
            else:
                at_first["gradients"] = at_last["gradients"] = 0
                at_last["activations"] += sum(self.layers[stack].factors for stack in self.case.slots)
        if not self.accumulates:  # each weight is used once, and its copy is gone then
            at_head["gradients"] = 0
            at_head["compute_weights"] = parts["compute_weights"] - self._copy_of_embedding
            at_first["compute_weights"] = at_head["compute_weights"]
            at_last["compute_weights"] = at_end["compute_weights"] = 0
        return [at_head, at_first, at_last, at_end]

    @cached_property
    def _split_gradients(self) -> int:
        """Of a microbatch, where ZeRO-3 splits them: they are added to the sums when all layers are done."""
        return sum(
            self.case.local_size(shape, placement.storage) * math.prod(self.case.sizes[a] for a in placement.step_axes)
            for _, shape, placement in self.case.placed
            if placement.layer_axes
        ) * self.width  # fmt: skip

    @cached_property
    def _copy_of_embedding(self) -> int:
        """Bytes of the embedding in the format of computation, where the head does not use it, too."""
        ends, total = self.case.declared.definition.ends, 0
        for parameter, shape, placement in self.case.placed:
            if parameter.path[0] in ends.embed and parameter.path[0] not in ends.head and not placement.in_float32:
                used = self.case.local_size(shape, placement.storage)
                used *= math.prod(self.case.sizes[a] for a in placement.step_axes)
                if self.width != WIDTHS[self.case.run.precision.params] or placement.step_axes:
                    total += used * self.width
        return total

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
                total += layer.keep(self._selected | {"layer_in"})
                total += layer.kept_by_attention if keeps_attention(self.case) else 0
        return total

    @cached_property
    def _recomputed(self) -> int:
        """Without a pipeline: what is computed again of a layer before it runs backward."""
        recompute = self.case.run.train.recompute
        if recompute == "none":
            return 0
        return max(layer.recompute(self._selected) for layer in self.layers.values())

    @property
    def _selected(self) -> frozenset[str]:
        """Without a pipeline: names of the values that the policy of recomputation keeps."""
        names = SELECTIVE if self.case.run.train.recompute == "selective" else ()
        return frozenset({*names, *(("attention_out",) if keeps_attention(self.case) else ())})

    @cached_property
    def _one_layer(self) -> int:
        """Weights of the largest layer gathered for ZeRO-3, or their gradients before they are split."""
        return max(map(sum, self._gathered.values()))

    @cached_property
    def _one_mlp(self) -> int:
        """The same of its feed-forward, which is there with the hidden layer."""
        return max(sum(sorted(sizes)[-(3 if self.case.run.model.gated else 2) :]) for sizes in self._gathered.values())

    @cached_property
    def _gathered(self) -> dict[str, list[int]]:
        """By stack: the bytes of each matrix of one layer that ZeRO-3 gathers."""
        found: dict[str, list[int]] = {stack: [0] for stack in self.layers}
        for parameter, shape, placement in self.case.placed:
            if parameter.path[0] in found and placement.is_matrix and placement.layer_axes:
                size = self.case.local_size(shape, placement.compute) * self.width
                found[parameter.path[0]].append(size // (shape[0] // self.case.shards("layers")))
        return found

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
    def _head(self) -> _Head:
        """A chunk of the loss."""
        case, run = self.case, self.case.run
        rows = run.model.vocab_size // case.shards("vocab")
        if case.stages is not None and run.pipeline.head == "sharded":
            rows = -(-rows // case.stages.num_stages)
        layer = next(iter(self.layers.values()))
        seen = layer.gathered if set(case.rules["vocab"]) & set(case.rules["seq_sp"]) else layer.stream
        tokens = seen // (run.model.d_model * self.width)
        chunk = min(run.train.loss_chunk_tokens or default_chunk(rows), tokens)
        chunks = -(-tokens // chunk)
        chunk = -(-tokens // chunks)
        table = rows * run.model.d_model
        return _Head(
            chunks=chunks,
            scores=chunk * rows * FLOAT32,
            gradients=chunk * rows * self.width,
            table=table,
            padded=table * self.width if rows % 8 else 0,
            seen=seen,
        )

    @property
    def _table_is_gathered(self) -> bool:
        """Whether ZeRO-3 splits the head's matrix."""
        ends = self.case.declared.definition.ends
        return any(p.path[0] == ends.table and placement.layer_axes for p, _, placement in self.case.placed)
