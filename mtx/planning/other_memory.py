"""GPU memory of a training step of other software: Megatron-LM and its relatives, DeepSpeed, FSDP.

Decides what such a program keeps, from the layout and the documented habits of its family, for the pipeline stage that
holds most. What allocators and libraries add is two measured numbers per family: bytes that every process has (CUDA
context, NCCL, workspaces) and a factor on all the rest (fragmentation, passing copies), fitted by
`benchmarks/check_memory.py`.

Not here: `mtx train`'s own step (`mtx.planning.memory`).

Invariant: the parts are those of `mtx.planning.memory.PARTS`, and sum to what the fullest GPU holds.

Source: activations: arXiv 2205.05198, table 2 and section 4, written out by widths so that gated MLPs and fewer
key/value heads count right. States: arXiv 1910.02054 (ZeRO).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from mtx.planning.case import Case
from mtx.planning.software import SOFTWARE

_LOGIT_BYTES = {"mosaic": 4, "llm.c": 2}
"""Of a logit where one kernel computes loss and gradient in 16 bits, llm.c's in place. Else 10: 16 bits, the float32
copy, and the float32 softmax that becomes the gradient."""

_BUCKET = 500_000_000
"""Gradients that DeepSpeed exchanges at a time, numbers; also about what ZeRO-3 keeps gathered."""


@dataclass(frozen=True)
class Allocator:
    """What a family's processes take besides their arrays.

    Attributes:
        fixed: Bytes: CUDA context, NCCL's buffers, workspaces of libraries.
        factor: All the memory that is reserved, over what is live at the peak.
    """

    fixed: float
    factor: float


def fit_allocator(live: Sequence[float], measured: Sequence[float]) -> Allocator:
    """The allocator with the least squares of relative errors; neither number below what is physical (0 and 1).

    Args:
        live: Bytes by `live_bytes`, per run.
        measured: Bytes as published, of the same runs.
    """
    share = [
        x / y for x, y in zip(live, measured, strict=True)
    ]  # minimize the sum of (fixed / y + factor * share - 1)^2
    inverse = [1 / y for y in measured]
    aa, ab, bb = _dot(inverse, inverse), _dot(inverse, share), _dot(share, share)
    a, b = sum(inverse), sum(share)
    determinant = aa * bb - ab * ab
    fixed = (a * bb - b * ab) / determinant if determinant > 1e-12 * aa * bb else 0.0
    fixed = max(0.0, fixed)
    factor = (b - fixed * ab) / bb
    if factor < 1:
        factor = 1.0
        fixed = max(0.0, (a - ab) / aa)
    return Allocator(fixed, factor)


def _dot(left: Sequence[float], right: Sequence[float]) -> float:
    return sum(x * y for x, y in zip(left, right, strict=True))


ALLOCATORS: Mapping[str, Allocator] = {
    "deepspeed": Allocator(fixed=4.19e9, factor=1.126),
    "fsdp": Allocator(fixed=0.0, factor=1.149),
    "megatron": Allocator(fixed=2 * 2**30, factor=1.1),
}
"""By family. DeepSpeed's and FSDP's are fitted on what `benchmarks/data/published_runs.csv` measured; nothing measured
is published there for Megatron, for which these are estimates."""

_SHARDED = ("torchtitan", "torchtitan-compile", "mosaic")  # over context, too


def family(case: Case) -> str:
    """Name of the case's allocator."""
    if case.software == "megatron-deepspeed":
        return "deepspeed"
    return "fsdp" if case.sizes["fsdp"] > 1 or case.software in _SHARDED else "megatron"


@dataclass(frozen=True)
class Layer:
    """Bytes of activations of one layer, microbatch and GPU, by what becomes of them.

    Attributes:
        inputs: The layer's input alone.
        residual: Kept around the branches: inputs of norms and of the first products, dropout masks.
        products: Kept inside them: queries, keys, values, hidden layers of the MLP.
        scores: Attention weights with their dropout, where attention is not one kernel.
        outputs: Results of the products and of attention.
    """

    inputs: float
    residual: float
    products: float
    scores: float
    outputs: float

    @property
    def whole(self) -> float:
        """All that the backward pass needs."""
        return self.residual + self.products + self.scores


def measure_layer(case: Case) -> Layer:
    """Sizes of one layer's activations; 16 bits each, 8 for dropout masks."""
    run, sizes, model = case.run, case.sizes, case.run.model
    split = sizes["tensor"]
    tokens = case.microbatch_size * run.train.seq_len / sizes["context"]
    residual_split = split if run.rules.sequence_parallel else 1
    width, heads, kv_heads = model.d_model, model.num_heads * model.head_width, model.kv_heads * model.head_width
    hidden = model.ff_width * (2 if model.gated else 1)
    # FSDP programs and Llama-like models train without dropout.
    masks = 0 if model.gated or family(case) == "fsdp" else 2 * width
    fused = SOFTWARE[case.software].attention != "unfused"
    return Layer(
        inputs=tokens * 2 * width / residual_split,
        residual=tokens * (8 * width + masks) / residual_split,
        products=tokens * (4 * heads + 4 * kv_heads + 2 * hidden + 2 * model.ff_width) / split,
        scores=0 if fused else 5 * tokens * run.train.seq_len * model.num_heads / split,
        outputs=tokens * (2 * (heads + 2 * kv_heads + hidden) / split + 4 * width / residual_split) / 2
        + tokens * 2 * heads / split,
    )


def kept_per_layer(case: Case, layer: Layer) -> float:
    """Bytes that a layer keeps from the forward to the backward pass.

    "selective" of Megatron forgets the attention scores; that of FSDP programs (torchtitan's "op") keeps attention's
    result and every second product.
    """
    recompute = case.run.train.recompute
    if recompute == "full":
        return layer.inputs
    if recompute == "selective":
        if SOFTWARE[case.software].selective == "half":
            return layer.inputs + layer.outputs
        return layer.residual + layer.products
    return layer.whole


def stage_layers(case: Case, stage: int) -> int:
    """Layers of a stage. Where the embedding and the head fill up to an even split, they count as a layer each; else
    the first stages have one layer more."""
    layers, stages = case.run.model.num_layers, case.sizes["pipe"]
    if layers % stages and (layers + 2) % stages == 0:
        return (layers + 2) // stages - (stage == 0) - (stage == stages - 1)
    return layers // stages + (stage < layers % stages)


def microbatches_in_flight(case: Case, stage: int) -> float:
    """Microbatches whose activations of all of the stage's layers are kept at a time: 1F1B (arXiv 2104.04473, section
    2.2), with more than one chunk per stage its interleaved form."""
    stages, chunks = case.sizes["pipe"], case.run.pipeline.virtual_stages
    if stages == 1:
        return 1
    if chunks == 1:
        return min(stages - stage, case.num_microbatches)
    warm_up = 2 * (stages - stage - 1) + (chunks - 1) * stages + 1
    return min(warm_up, case.num_microbatches * chunks) / chunks


def estimate_parts(case: Case) -> Mapping[str, int]:
    """Bytes of the fullest GPU by part, see `mtx.planning.memory.PARTS`."""
    fullest = _fullest_stage(case)
    allocator = ALLOCATORS[family(case)]
    fullest["overhead"] = allocator.fixed + (allocator.factor - 1) * sum(fullest.values())
    return {name: round(size) for name, size in fullest.items()}


def live_bytes(case: Case) -> float:
    """Of the fullest GPU, without what the allocator adds."""
    return sum(_fullest_stage(case).values())


def _fullest_stage(case: Case) -> dict[str, float]:
    in_layers, tables = _count_parameters(case)
    stages = (_stage_parts(case, stage, in_layers, tables) for stage in range(case.sizes["pipe"]))
    return max(stages, key=lambda parts: sum(parts.values()))


def _stage_parts(case: Case, stage: int, in_layers: float, tables: list[float]) -> dict[str, float]:
    run, sizes = case.run, case.sizes
    first, last = stage == 0, stage == sizes["pipe"] - 1
    layers = stage_layers(case, stage)
    # A tied model with a pipeline has its table at both ends.
    ends = sum(tables) if sizes["pipe"] == 1 else first * tables[0] + last * tables[-1]
    held = (layers * in_layers + ends) / sizes["tensor"]
    parts = _state_parts(case, held, in_layers / sizes["tensor"], sum(tables) / sizes["tensor"])

    layer = measure_layer(case)
    flying = microbatches_in_flight(case, stage)
    kept = kept_per_layer(case, layer)
    # While one layer's backward pass runs, what it forgot is there again.
    parts["activations"] = flying * layers * kept + max(0.0, layer.whole - kept)
    boundary = layer.inputs if family(case) == "deepspeed" and not last else 0.0  # Megatron frees what it has sent
    parts["pipeline"] = flying * boundary
    tokens = case.microbatch_size * run.train.seq_len / sizes["context"]
    parts["logits"] = 0.0
    if last:
        logits = tokens * run.model.vocab_size / sizes["tensor"]
        parts["logits"] = _LOGIT_BYTES.get(case.software, 10) * logits
    width = 4 if run.precision.gradients == "float32" else 2
    parts["communication"] = width * min(held, _BUCKET) if family(case) == "deepspeed" else 0.0
    parts["overhead"] = 0.0
    return parts


def _count_parameters(case: Case) -> tuple[float, list[float]]:
    """Of one layer, and of each table of the vocabulary, the embedding's first."""
    stacked, tables = 0.0, []
    for parameter in case.declared.parameters:
        size = math.prod(parameter.shape)
        if parameter.axes[0] == "layers":
            stacked += size
        elif "vocab" in parameter.axes:
            tables.append(float(size))
    return stacked / case.run.model.num_layers, tables


def _state_parts(case: Case, held: float, in_layer: float, tables: float) -> dict[str, float]:
    """Weights, gradients and optimizer of `held` parameters of this GPU's share of the tensors."""
    sizes, run = case.sizes, case.run
    if family(case) == "fsdp":
        sharded = held / (sizes["fsdp"] * sizes["context"])
        # The layer at work, the one that is fetched ahead, and the tables, whole in 16 bits; one layer's gradients.
        gathered, passing = 2 * in_layer + tables, in_layer + tables
        if case.software == "deepspeed-zero3":
            gathered, passing = min(gathered, 2 * _BUCKET), min(passing, _BUCKET)
        return {
            "parameters": 4 * sharded,
            "compute_weights": 2 * gathered,
            "gradients": 4 * sharded + 2 * passing,
            "optimizer": 8 * sharded,
        }
    shards = sizes["data"] * sizes["context"] if run.rules.zero else 1
    gradients = 4.0 if run.precision.gradients == "float32" else 2.0
    if family(case) == "deepspeed":
        # fp16: the partition's float32 copy; bf16: the 16-bit ones besides the float32 sums.
        gradients += 4 / shards if gradients == 2 else 2
    return {
        "parameters": 4 * held / shards,
        "compute_weights": 2 * held,
        "gradients": gradients * held,
        "optimizer": 8 * held / shards,
    }
