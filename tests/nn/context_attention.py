"""Attention over sequences that are split over devices, against `attend` on whole ones. Run with 8 devices.

Prints as JSON, for each case, the errors of the output and of the gradients by queries, keys and values, each as a
share of the largest value.
"""

from __future__ import annotations

import json
import sys
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from mtx.collectives import Comm
from mtx.config.schema import Model
from mtx.nn import ring_attention
from mtx.nn.attention import Attention, attend
from mtx.nn.context import Context, Sequence
from mtx.nn.param import define
from mtx.nn.position import alibi_slopes

HEAD_DIM = 8
CASES: dict[str, dict[str, Any]] = {
    # Defaults: 2 rows, 4 heads with keys and values of their own, slices of at most one block, float32, no masks.
    "ring 2": {"context": 2, "length": 12},
    "ring 4, everything": {
        "context": 4, "length": 56, "block": 3, "kv_heads": 2, "alibi": True, "packed": True, "hidden": True,
    },
    "ring 8, slices of 3": {"context": 8, "length": 48, "kv_heads": 1, "packed": True},
    "ring 2, blocks with gaps": {"context": 2, "length": 52, "block": 5},
    "ring 4, alibi": {"context": 4, "length": 8, "alibi": True},
    "ring 4, blocks": {"context": 4, "length": 64, "block": 4, "kv_heads": 1},
    "ring 4, bfloat16": {"context": 4, "length": 64, "block": 4, "kv_heads": 2, "dtype": "bfloat16"},
    "all_to_all 2": {"exchange": "all_to_all", "context": 2, "length": 12, "kv_heads": 2},
    "all_to_all 4, everything": {
        "exchange": "all_to_all", "context": 4, "length": 24, "kv_heads": 2, "alibi": True, "packed": True,
        "hidden": True,
    },
    "all_to_all 4, heads across groups": {
        "exchange": "all_to_all", "context": 4, "length": 24, "heads": 12, "kv_heads": 6, "alibi": True,
    },
    "all_to_all 8": {"exchange": "all_to_all", "context": 8, "length": 48, "heads": 8, "kv_heads": 1, "packed": True},
    "all_to_all 4, bfloat16": {"exchange": "all_to_all", "context": 4, "length": 64, "dtype": "bfloat16"},
}  # fmt: skip


def make_inputs(case: dict[str, Any]) -> tuple[list[np.ndarray], dict[str, np.ndarray]]:
    """Queries, keys, values and the gradient of the output [2, T, heads, H], and the masks [2, T] that apply."""
    rng, length, heads = np.random.default_rng(3), case["length"], case.get("heads", 4)
    counts = (heads, case.get("kv_heads", heads), case.get("kv_heads", heads), heads)
    arrays = [rng.standard_normal((2, length, count, HEAD_DIM)).astype(np.float32) for count in counts]
    masks = {}
    if case.get("packed"):  # documents end anywhere; the second row ends with padding
        starts = rng.random((2, length)) < 0.15
        segments = 1 + np.cumsum(starts, axis=1)
        segments[1, -length // 5 :] = 0
        masks["segments_BT"] = segments.astype(np.int32)
    if case.get("hidden"):
        visible = rng.random((2, length)) < 0.8
        visible[:, 0] = True
        masks["visible_BT"] = visible
    return arrays, masks


def make_attention(case: dict[str, Any], context: int) -> Any:
    """The inner part of an attention layer: (queries, keys, values, masks) of one shard -> outputs."""
    heads, dtype = case.get("heads", 4), jnp.dtype(case.get("dtype", "float32"))
    config = Model(
        vocab_size=8, d_model=heads * HEAD_DIM, num_layers=1, num_heads=heads, max_seq_len=case["length"],
        num_kv_heads=case.get("kv_heads"), position="alibi" if case.get("alibi") else "rotary",
    )  # fmt: skip
    layer = define(lambda rngs: Attention(rngs, config)).bind({})
    axes = ("context",) if context > 1 else ()
    names = ("heads", "kv_heads", "batch")
    comm = Comm(rules={"seq": axes, "seq_sp": axes, **dict.fromkeys(names, ())}, sizes={"context": context})
    facts = Context(comm, dtype, context_exchange=case.get("exchange", "ring"))

    def compute(q: jax.Array, k: jax.Array, v: jax.Array, masks: dict[str, jax.Array]) -> jax.Array:
        segments_BT, visible_BT = masks.get("segments_BT"), masks.get("visible_BT")
        sequence = Sequence(None, segments_BT, q.shape[1], visible_BT)
        return layer._core(*(x.astype(dtype) for x in (q, k, v)), sequence, facts, lambda out: out, None)

    return compute, comm


def make_program(case: dict[str, Any]) -> Any:
    """Jitted (q, k, v, d_out, masks), all split over devices in the order of shards -> output and its gradients."""
    ring_attention.BLOCK = case.get("block", 1024)
    context = case["context"]
    compute, _ = make_attention(case, context)

    def shard(q: Any, k: Any, v: Any, d_out: Any, masks: Any) -> Any:
        out, pull = jax.vjp(lambda *arrays: compute(*arrays, masks), q, k, v)
        return out.astype(jnp.float32), *pull(d_out.astype(out.dtype))

    mesh = Mesh(np.array(jax.devices()[:context]), ("context",))
    split = P(None, "context")
    return jax.jit(jax.shard_map(shard, mesh=mesh, in_specs=split, out_specs=split))


def run(case: dict[str, Any]) -> list[float]:
    """Errors of the output and of three gradients."""
    arrays, masks = make_inputs(case)
    length, shards = case["length"], case["context"]
    slices = np.arange(length).reshape(2 * shards, -1)
    order = np.concatenate([np.r_[slices[r], slices[2 * shards - 1 - r]] for r in range(shards)])
    slopes = jnp.array(alibi_slopes(arrays[0].shape[2])) if case.get("alibi") else None
    sees = np.tri(length, dtype=bool) & masks.get("visible_BT", np.ones((1, 1), bool))[:, None]
    if "segments_BT" in masks:
        sees = sees & (masks["segments_BT"][:, :, None] == masks["segments_BT"][:, None])
    # Of tokens that see nothing, outputs are arbitrary: nothing may depend on them.
    arrays[3] = np.where(sees.any(2)[..., None, None], arrays[3], 0)

    @jax.jit
    def expect(q: Any, k: Any, v: Any, d_out: Any) -> Any:
        out, pull = jax.vjp(lambda *arrays: attend(*arrays, **masks, slopes_N=slopes), q, k, v)
        return out, *pull(d_out)

    expected = [np.asarray(x)[:, order] for x in expect(*arrays)]
    cut = [x[:, order] for x in arrays]
    actual = [np.asarray(x) for x in make_program(case)(*cut, {name: x[:, order] for name, x in masks.items()})]
    assert all(np.isfinite(x).all() for x in actual)
    relevant = np.broadcast_to(sees.any(2)[:, order, None, None], expected[0].shape)
    actual[0], expected[0] = (np.where(relevant, x, 0) for x in (actual[0], expected[0]))
    return [float(np.abs(a - e).max() / np.abs(e).max()) for a, e in zip(actual, expected)]


if __name__ == "__main__":
    names = sys.argv[1:] or list(CASES)
    print(json.dumps({name: run(CASES[name]) for name in names}))
