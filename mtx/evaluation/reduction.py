"""A run's architecture at a size that any machine computes in seconds.

Kept: family, activation, norm, positions, biases, tied embeddings, the kind of attention (one key/value head for all
query heads, for some, for each), the pattern of layers with experts, packing, dropout, recomputation, objective, rules.
Reduced: layers, widths, vocabulary, experts, sequence, batch. Number formats are float32, so that sums in another order
differ in the last digits only.

Invariant: a size divides over a layout if and only if the full size divides over the layout that this one stands for,
as far as sizes that small exist; so each layout takes the path through the code that the run takes.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import replace

from mtx.config import schema
from mtx.evaluation.covering import Layout
from mtx.training.state import MOST_LAYERS_IN_LINE

Shards = set[tuple[int, int]]
"""(number of shards at the full size, number of shards at the reduced size) of one dim in each layout."""

FEW_EXPERTS, FEW_TOKENS, FEW_WORDS, MOST_VIRTUAL_STAGES = 8, 16, 96, 3


def reduce_run(run: schema.Run, layouts: Sequence[Layout]) -> schema.Run:
    """The reduced run; `place_run` puts it on a layout."""
    tokens = math.lcm(*(2 * x.counts["context"] * x.counts["tensor"] for x in layouts))
    tokens *= next(odd for odd in range(1, FEW_TOKENS + 2, 2) if tokens * odd >= FEW_TOKENS)
    batch_shards = math.lcm(*(x.counts["data"] * x.counts["fsdp"] * x.counts["expert"] for x in layouts))
    rounds = max(2, math.lcm(*(x.counts["pipe"] for x in layouts)))
    size = run.train.microbatch_size and min(run.train.microbatch_size, 2)
    share = batch_shards * (size or 1)
    train, scan_layers = run.train, run.train.scan_layers
    if scan_layers is None and run.model.num_layers > MOST_LAYERS_IN_LINE and len(set(run.model.layer_stacks)) == 1:
        scan_layers = True  # as so many layers do
    return replace(
        run,
        model=replace(_reduce_model(run, layouts), max_seq_len=tokens + 3 * (train.seq_len < run.model.max_seq_len)),
        pipeline=replace(run.pipeline, virtual_stages=_virtual_stages(run)),
        precision=schema.Precision(),
        train=replace(
            train,
            seq_len=tokens,
            global_batch_size=share * rounds,
            microbatch_size=size,
            batch_ramp=train.batch_ramp and schema.BatchRamp(start=share, increment=share, tokens=1),
            scan_layers=scan_layers,
            loss_chunk_tokens=7,  # so that there are several, as there are at full size, and the last one is shorter
            attention="auto" if train.attention == "cudnn" else train.attention,  # cuDNN has no float32
            eval_every=None,
            eval_batches=schema.Train.eval_batches,
        ),
        data=schema.Data(packing=run.data.packing),
        tokenizer=schema.Tokenizer(),
        checkpoint=schema.Checkpoint(),
    )


def place_run(run: schema.Run, layout: Layout) -> schema.Run:
    """A run on a layout, reduced or not, without the settings that have no meaning there."""
    pipeline, train = run.pipeline, run.train
    if layout.counts["pipe"] == 1:
        pipeline = schema.Pipeline()
    else:
        train = replace(train, scan_layers=None)
    if layout.counts["context"] == 1:
        train = replace(train, context_exchange="ring")
    return replace(run, mesh=layout.mesh, pipeline=pipeline, train=train)


def _reduce_model(run: schema.Run, layouts: Sequence[Layout]) -> schema.Model:
    model = run.model
    tensor, expert = _shards(layouts, "tensor"), _shards(layouts, "expert")
    heads = set(tensor)
    if run.train.context_exchange == "all_to_all":
        heads |= _shards(layouts, "tensor", "context")
    num_heads, kv_heads = _reduce_heads(model, heads)
    head_dim = 8 - model.head_width % 2
    d_model = num_heads * head_dim + (0 if model.d_model == model.num_heads * model.head_width else 8)
    fixed = {d_model} if model.head_dim is not None else set()

    def narrow(width: int) -> int:
        return _shrink(width, max(1, min(4 * d_model, width * d_model // model.d_model)), tensor)

    num_experts = model.num_experts
    if num_experts > FEW_EXPERTS:
        num_experts = _shrink(num_experts, FEW_EXPERTS, expert)
    return replace(
        model,
        vocab_size=_shrink(model.vocab_size, FEW_WORDS, tensor | _shards(layouts, "tensor", "pipe")),
        d_model=d_model,
        num_layers=_count_layers(run, layouts),
        num_heads=num_heads,
        num_kv_heads=None if model.num_kv_heads is None else kv_heads,
        head_dim=head_dim if fixed else None,
        d_ff=None if model.d_ff is None else narrow(model.d_ff),
        expert_d_ff=None if model.expert_d_ff is None else narrow(model.expert_d_ff),
        num_experts=num_experts,
        experts_per_token=min(model.experts_per_token, max(1, num_experts // 2)),
        first_dense_layers=min(model.first_dense_layers, 1),
        init_std=d_model**-0.5,  # activations of size one, so that every gradient has digits
    )


def _shards(layouts: Iterable[Layout], *axes: str) -> Shards:
    return {(math.prod(x.stands_for[a] for a in axes), math.prod(x.counts[a] for a in axes)) for x in layouts}


def _breaks(full: int, small: int, shards: Shards) -> int:
    """In how many layouts the one size divides and the other does not."""
    return sum((full % n == 0) != (small % m == 0) for n, m in shards)


def _shrink(size: int, target: int, shards: Shards) -> int:
    """The smallest number from `target` on that divides as `size` does over the shards, then by 2, 4 and 8."""
    if size <= target:
        return size
    return min(
        range(target, min(size, target + 8 * math.lcm(*(m for _, m in shards))) + 1),
        key=lambda small: (_breaks(size, small, shards), math.gcd(size, 8) != math.gcd(small, 8), small),
    )


def _reduce_heads(model: schema.Model, shards: Shards) -> tuple[int, int]:
    """Query heads and key/value heads: as few as keep one, some or all of them shared, split and uneven as they are."""
    heads, kv_heads = model.num_heads, model.kv_heads
    group = heads // kv_heads
    groups = [group] if group <= 8 and kv_heads > 1 else range(1, group + 1)

    def faults(small: int, per_head: int) -> tuple[object, ...]:
        count = small * per_head
        # More shards than key/value heads: several share one.
        sharing = sum((n % kv_heads == 0) != (m % small == 0) for n, m in shards if n > kv_heads)
        return (
            _breaks(heads, count, shards),
            _breaks(kv_heads, small, shards) + sharing,
            (small == 1) != (kv_heads == 1) or (per_head == 1) != (group == 1),
            count < 4,
            model.position == "alibi" and _is_power_of_two(count) != _is_power_of_two(heads),
            count,
        )

    limit = 8 * math.lcm(*(m for _, m in shards))
    pairs = [(k, g) for k in range(1, min(kv_heads, limit) + 1) for g in groups if g <= limit]
    small, per_head = min(pairs, key=lambda pair: faults(*pair))
    return small * per_head, small


def _is_power_of_two(count: int) -> bool:
    return count & (count - 1) == 0


def _virtual_stages(run: schema.Run) -> int:
    return min(run.pipeline.virtual_stages, MOST_VIRTUAL_STAGES)


def _count_layers(run: schema.Run, layouts: Sequence[Layout]) -> int:
    """As few layers as have all kinds of them, and divide over the shortest pipeline's chunks as all of them do."""
    model, virtual = run.model, _virtual_stages(run)
    pipes = sorted(_shards(layouts, "pipe") - {(1, 1)}, key=lambda pair: pair[1])
    least = max([2, *(stages * virtual for _, stages in pipes)])
    chunks = {(full * run.pipeline.virtual_stages, stages * virtual) for full, stages in pipes[:1]}
    if model.num_experts:
        every = model.expert_every
        least = max(least, min(model.first_dense_layers, 1) + max(2, every))
        chunks |= {(full * every, small * every) for full, small in chunks}
    return min(
        range(min(least, model.num_layers), min(model.num_layers, least + 24) + 1),
        key=lambda count: (_breaks(model.num_layers, count, chunks), count),
    )
