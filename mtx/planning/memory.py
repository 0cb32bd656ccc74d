"""Bytes of GPU memory that a training step takes, by part.

Decides the estimate of `mtx train`'s own step; the parts of other software come from `mtx.planning.other_memory`.

Invariant: `Memory.state` is exact, to the byte: it follows from the placements that the training state is built from.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from mtx.planning.case import Case

PARTS = (
    "parameters", "compute_weights", "gradients", "optimizer", "activations", "logits", "pipeline", "communication",
    "overhead",
)  # fmt: skip
"""In the order in which pictures stack them."""

_WIDTHS = {"float32": 4, "bfloat16": 2, "float16": 2}


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
    """The memory of one step."""
    if case.software != "mtx":
        from mtx.planning.other_memory import estimate_parts

        return Memory(dict(estimate_parts(case)))
    parts = dict.fromkeys(PARTS, 0)
    run, sizes = case.run, case.sizes
    wide, compute = _WIDTHS[run.precision.params], _WIDTHS[run.precision.compute]
    several = case.num_microbatches > 1 or case.stages is not None
    for parameter, shape, placement in case.placed:
        stored = case.local_size(shape, placement.storage)
        parts["parameters"] += stored * wide
        for moment, width in parameter.moments:
            same = moment == parameter.shape
            parts["optimizer"] += width * (case.local_size(shape, placement.optimizer) if same else math.prod(moment))
        used = stored * math.prod(sizes[axis] for axis in placement.step_axes)
        width = 4 if placement.in_float32 else compute
        parts["compute_weights"] += used * width
        parts["gradients"] += used * (4 if several else width)
    parts["optimizer"] += case.declared.other_bytes + 4
    model = run.model
    tokens = case.microbatch_size * run.train.seq_len // case.shards("seq")
    heads = model.num_heads * model.head_width // case.shards("heads")
    kv_heads = 2 * model.kv_heads * model.head_width // case.shards("kv_heads")
    hidden = (2 if model.gated else 1) * model.ff_width // case.shards("mlp")
    residual = model.d_model * case.shards("seq") // case.shards("seq_sp")
    kept = heads + kv_heads + hidden + 2 * residual
    whole = kept + 2 * model.d_model + 2 * heads + hidden
    per_layer = {"none": whole, "selective": kept, "full": residual}[run.train.recompute] * tokens * compute
    if case.stages is None:
        parts["activations"] = per_layer * len(case.slots) + whole * tokens * compute
    else:
        depth = 2 * case.stages.num_stages * case.stages.virtual_stages - 1
        slots = len(case.stages.slots)
        parts["activations"] = whole * tokens * compute * slots
        ring = residual * tokens * compute if run.train.recompute == "full" else slots * per_layer
        parts["pipeline"] = depth * ring
    vocab = model.vocab_size // case.shards("vocab")
    parts["logits"] = 2 * min(2**28, 4 * vocab * tokens) + 4 * vocab * model.d_model
    parts["communication"] = 2**30 if case.cluster.num_gpus > 1 else 0
    parts["overhead"] = 2 * 2**30
    return Memory(parts)
