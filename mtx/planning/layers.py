"""What a device does in one pass of a microbatch through a layer, or through the head: products, attention, traffic.

Decides what is counted. Products come from the declared parameters, and where several of them multiply one input they
are one product, as libraries and compilers join them. Elementwise work is counted as numbers that move through memory.

Invariant: a shape comes from a declaration and the rules of the run, never from a formula of its own.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from mtx.nn.blockwise import QUERY_BLOCK
from mtx.optim.decay import is_matrix
from mtx.planning.activations import choose_attention, keeps_attention
from mtx.planning.case import Case, Parameter
from mtx.planning.flops import attention_flops_per_token
from mtx.planning.hlo_products import Product
from mtx.planning.software import SOFTWARE


@dataclass(frozen=True)
class LayerWork:
    """Of one device, one microbatch, forward.

    Attributes:
        products: With weights, in the format of `Precision.compute`.
        wide: The others with weights, in 16 bits where `Precision.compute` has 8.
        last: Those of them that give the layer's result.
        attention: Products of attention with all keys, masked ones too; its FLOPs are `attention_flops`.
        fused: Whether attention is one kernel that leaves out what causality masks and keeps scores on chip.
        score_bytes: Of scores in memory, where it is not fused.
        traffic: Numbers that elementwise operations read and write.
        parameters: Numbers of its weights that a device computes with.
        exchanged: Numbers of the activation that `tensor` gathers or scatters, whole.
        keys: Numbers of keys and values that a ring over `context` passes on.
        queries: Numbers of queries, as many as of attention's output.
        dispatched: Numbers that go to experts and come back, each way.
    """

    products: tuple[Product, ...]
    wide: tuple[Product, ...]
    last: tuple[Product, ...]
    attention: tuple[Product, ...]
    fused: bool
    score_bytes: float
    traffic: float
    parameters: float
    exchanged: float
    keys: float
    queries: float
    dispatched: float

    @property
    def attention_flops(self) -> float:
        return float(sum(product.flops for product in self.attention))


def describe_layer(case: Case, stack: str) -> LayerWork:
    """The work of a layer of a stack (`schema.Model.layer_stacks`)."""
    run, model = case.run, case.run.model
    tokens = case.microbatch_size * run.train.seq_len // case.shards("seq")
    parameters = [p for p in case.declared.parameters if p.path[0] == stack]
    heads = model.num_heads // case.shards("heads")
    kv_heads = max(1, model.kv_heads // case.shards("kv_heads"))
    width, keys = model.head_width, run.train.seq_len
    batch, queries = case.microbatch_size * heads, keys // case.shards("seq")
    fused = uses_fused_attention(case)
    ours = case.software == "mtx"
    # Ours in plain XLA computes in blocks of queries, each with the keys up to its end, and keeps scores in float32.
    seen = keys if fused or not ours else min(keys, (keys + QUERY_BLOCK) // 2)
    # Over the layer, without attention's: two norms and two sums with the residual, each read and written; positions;
    # the hidden layer of the MLP.
    between = case.microbatch_size * run.train.seq_len // case.shards("seq_sp")
    rotated = 2 * tokens * (heads + kv_heads) * width if model.position == "rotary" else 0
    hidden = sum(
        _rows(case, p, tokens) * _local(case, p.shape[-1], p.axes[-1])
        for p in parameters
        if p.axes[-1] == "mlp" and is_matrix(p.axes)
    )
    routed = sum(1 for p in parameters if "experts" in p.axes) > 0
    narrow = [p for p in parameters if not _stays_wide(case, p)]
    return LayerWork(
        products=tuple(_products(case, narrow, tokens)),
        wide=tuple(_products(case, [p for p in parameters if _stays_wide(case, p)], tokens)),
        last=tuple(_products(case, [p for p in parameters if p.axes[-2] == "mlp"], tokens)),
        attention=(Product(batch, queries, width, seen, 1), Product(batch, queries, seen, width, 1)),
        fused=fused,
        score_bytes=0.0 if fused else float(batch * queries * seen * (4 if ours else 2)),
        traffic=float(10 * between * model.d_model + rotated + (2 if not model.gated else 1.5) * hidden),
        parameters=sum(local_numbers(case, p) / p.shape[0] for p in parameters),
        exchanged=float(tokens * model.d_model),
        keys=float(2 * tokens * kv_heads * width),
        queries=float(tokens * heads * width),
        dispatched=float(tokens * _dispatched_rows(case) * model.d_model) if routed else 0.0,
    )


@dataclass(frozen=True)
class StepWork:
    """Of one device, all that the time of a step depends on besides constants.

    Attributes:
        layers: By stack.
        slots: How many layers of each stack the slowest stage visits for a microbatch, in all its chunks.
        head: Of the stage that has it, or of all that share it.
        heads: How many times the slowest stage computes it for a microbatch: 0 or 1.
        parameters: Numbers of the weights that a device computes with, in all its layers.
        state_bytes: What the optimizer reads and writes, before replicas share it.
        hardware_flops: Of one device on average: recomputation counts, and attention to all places.
    """

    case: Case
    layers: Mapping[str, LayerWork]
    slots: Mapping[str, int]
    head: LayerWork
    heads: int
    parameters: float
    state_bytes: float
    hardware_flops: float


def describe_step(case: Case) -> StepWork:
    """The work of a step. Stages of other software have as many layers each, or the last one fewer, and the head."""
    model, pipe = case.run.model, case.sizes["pipe"]
    lockstep = SOFTWARE[case.software].pipeline == "lockstep"
    stacks = case.slots if lockstep else model.layer_stacks[: -(-model.num_layers // pipe)]
    shared = pipe > 1 and lockstep and case.run.pipeline.head == "sharded"
    # Where layers do not divide, the stage with the head has fewer of them.
    is_last_full = (
        model.num_layers % pipe == 0
        if case.stages is None or not lockstep
        else bool((case.stages.layers[-1, -1] >= 0).all())
    )
    heads = 1 if pipe == 1 or shared or is_last_full else 0
    numbers = state = 0.0
    for parameter in case.declared.parameters:
        local = local_numbers(case, parameter) / (pipe if parameter.axes[0] == "layers" else 1)
        moments = sum(math.prod(shape) * width for shape, width in parameter.moments) / math.prod(parameter.shape)
        numbers += local
        # Weight and moments are read and written, in float32; the gradient is read; a copy for computing is written.
        state += local * (8 + 2 * moments + 4 + 2)
    return StepWork(
        case=case,
        layers={stack: describe_layer(case, stack) for stack in dict.fromkeys(model.layer_stacks)},
        slots={stack: stacks.count(stack) for stack in dict.fromkeys(model.layer_stacks)},
        head=describe_head(case, shared=shared),
        heads=heads,
        parameters=numbers,
        state_bytes=state,
        hardware_flops=_hardware_flops(case),
    )


def _hardware_flops(case: Case) -> float:
    run, model = case.run, case.run.model
    layers = 0.0
    for parameter in case.declared.parameters:
        if parameter.axes[0] == "layers" and is_matrix(parameter.axes):
            share = model.experts_per_token / model.num_experts if "experts" in parameter.axes else 1.0
            layers += 2 * math.prod(parameter.shape) * share
    attention = attention_flops_per_token(model, run.train.seq_len)
    head = 2.0 * model.vocab_size * model.d_model
    selective = 0.0 if keeps_attention(case) else attention
    again = {"none": 0.0, "selective": selective, "full": layers + attention}[run.train.recompute]
    return case.tokens_per_step * (3 * (layers + attention + head) + again) / case.cluster.num_gpus


def describe_head(case: Case, *, shared: bool) -> LayerWork:
    """The work of the head and the loss; those of a vocabulary that the stages share, if it is `shared`."""
    model = case.run.model
    tokens = case.microbatch_size * case.run.train.seq_len // case.shards("seq")
    table = next(p for p in case.declared.parameters if "vocab" in p.axes)  # the head's is as large as the embedding's
    vocabulary = _local(case, table.shape[0], "vocab")
    if shared:
        vocabulary = -(-vocabulary // case.sizes["pipe"])
    logits = tokens * vocabulary
    products = (Product(1, tokens, model.d_model, vocabulary, 1),)
    narrow = case.run.precision.compute != "float8" or case.software != "mtx"
    return LayerWork(
        products=products if narrow else (),
        wide=() if narrow else products,
        last=(),
        attention=(),
        fused=True,
        score_bytes=0.0,
        traffic=float(4 * logits),  # float32: written, and read for the largest one, the sum and the loss
        parameters=float(vocabulary * model.d_model),
        exchanged=float(tokens * model.d_model),
        keys=0.0,
        queries=0.0,
        dispatched=0.0,
    )


def local_numbers(case: Case, parameter: Parameter) -> float:
    """Numbers of a parameter that a device computes with: its part by tensor and expert, all its layers."""
    layers = parameter.shape[0] if parameter.axes[0] == "layers" else 1
    size = math.prod(parameter.shape) // layers
    axes = [axis for axis in parameter.axes if axis != "layers"]
    return layers * size / math.prod(case.shards(axis) for axis in axes)


def uses_fused_attention(case: Case) -> bool:
    """Whether attention is one kernel; of 'mtx' as `mtx.nn.attention.choose_kernel` decides it."""
    habit = SOFTWARE[case.software].attention
    return choose_attention(case) == "cudnn" if habit == "auto" else habit != "unfused"


def _products(case: Case, parameters: Iterable[Parameter], tokens: int) -> Iterable[Product]:
    """The products of a layer's weights, those of one input joined."""
    joined: dict[tuple[object, ...], tuple[int, int, int, int]] = {}
    for p in parameters:
        if not is_matrix(p.axes):
            continue
        contracted, columns = (_local(case, p.shape[d], p.axes[d]) for d in (-2, -1))
        experts = _local(case, p.shape[1], "experts") if "experts" in p.axes else 1
        rows = _rows(case, p, tokens)
        reads_input = p.axes[-2] == "embed" and p.axes[-1] != "router"
        key = (p.path[1], "experts" in p.axes, "shared" in p.path, p.axes[-2]) if reads_input else p.path
        before = joined.get(key, (0, 0, 0, 0))[3]
        busy = min(experts, rows)  # where tokens are fewer than experts, the others have nothing to do
        joined[key] = (busy, rows // busy, contracted, before + columns)
    return [Product(*shape, 1) for shape in joined.values()]


def _stays_wide(case: Case, parameter: Parameter) -> bool:
    """Whether products with a parameter have 16 bits where a run has 8: of ours, all that are not `float8_parts`."""
    precision = case.run.precision
    if precision.compute != "float8" or case.software != "mtx":
        return False
    if "experts" in parameter.axes or "router" in parameter.axes:
        return True
    return ("attention" if "attention" in parameter.path else "mlp") not in precision.float8_parts


def _rows(case: Case, parameter: Parameter, tokens: int) -> int:
    """Rows of a product with a weight, over all experts that a device holds: they are taken to be chosen evenly."""
    if "experts" not in parameter.axes:
        return tokens
    factor = case.run.model.expert_capacity_factor or 1.0
    return math.ceil(tokens * case.run.model.experts_per_token * factor)


def _dispatched_rows(case: Case) -> float:
    """Rows that a token fills in an all-to-all. Ours without a capacity has room for the worst case."""
    model, shards = case.run.model, case.shards("experts")
    if case.software == "mtx" and model.expert_capacity_factor is None:
        return shards * min(model.experts_per_token, model.num_experts // shards)
    return model.experts_per_token * (model.expert_capacity_factor or 1.0)


def _local(case: Case, size: int, axis: str) -> int:
    return -(-size // case.shards(axis))
