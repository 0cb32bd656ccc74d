"""Prints, as JSON, how the state lies on its devices and what the compiled step exchanges. Run with 8 devices."""

from __future__ import annotations

import json
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from tiny import GPT, make_setup, make_tokens

from mtx.planning.hlo import read_program
from mtx.planning.hlo_collectives import read_collectives
from mtx.sharding import axis_sizes
from mtx.training.state import Setup
from mtx.training.step import make_train_step

MODEL = {**GPT, "num_layers": 1}
MICROBATCHES = {"global_batch_size": 32, "microbatch_size": 1}
CASES: dict[str, dict[str, Any]] = {
    "one": {"train": {"global_batch_size": 32, "microbatch_size": 8}},
    "data8 zero0": {"mesh": {"data": 8}, "rules": {"zero": 0}, "train": MICROBATCHES},
    "data8 zero1": {"mesh": {"data": 8}, "rules": {"zero": 1}, "train": MICROBATCHES},
    "data8 zero2": {"mesh": {"data": 8}, "rules": {"zero": 2}, "train": MICROBATCHES},
    "fsdp4 data2 zero2": {"mesh": {"fsdp": 4, "data": 2}, "rules": {"zero": 2}, "train": MICROBATCHES},
    "tensor4 data2 zero1": {"mesh": {"tensor": 4, "data": 2}, "rules": {"zero": 1}, "train": MICROBATCHES},
    "fsdp2 tensor2 data2 zero2": {"mesh": {"fsdp": 2, "tensor": 2, "data": 2}, "train": MICROBATCHES},
}


def describe(setup: Setup, state: Any) -> dict[str, Any]:
    """The share of each leaf that a device holds; asserts that every leaf is as the setup declares it."""
    shares = {}
    targets = jax.tree.leaves(setup.abstract_state)
    for (path, leaf), target in zip(jax.tree_util.tree_leaves_with_path(state), targets, strict=True):
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        assert leaf.sharding.is_equivalent_to(target.sharding, leaf.ndim), name
        assert (leaf.shape, leaf.dtype) == (target.shape, target.dtype), name
        held = {math.prod(shard.data.shape) for shard in leaf.addressable_shards}
        shares[name] = max(held) / max(1, leaf.size)
    return shares


def main() -> None:
    results: dict[str, Any] = {}
    first: Any = None
    for name, sections in CASES.items():
        setup = make_setup(MODEL, **sections)
        state = setup.initialize()
        shares = describe(setup, state)
        # Of a copy: an array that was read keeps a view of its buffers on the host, which then are not donated.
        values = jax.tree.map(lambda leaf: np.array(jnp.copy(leaf)), state["params"])
        first = values if first is None else first
        batch = {"tokens": make_tokens(batch=32), "learning_rate": np.float32(1e-3)}
        compiled = make_train_step(setup).lower(state, batch).compile()
        after, metrics = compiled(state, batch)
        results[name] = {
            "shares": shares,
            "same initial parameters": all(jax.tree.leaves(jax.tree.map(np.array_equal, first, values))),
            "same shares after a step": describe(setup, after) == shares,
            "donated": all(leaf.is_deleted() for leaf in jax.tree.leaves(state)),
            "loss": float(metrics["loss"]),
            "grad_norm": float(metrics["grad_norm"]),
            "parameter shapes": [leaf.shape for leaf in jax.tree.leaves(setup.definition.whole.params)],
            "collectives": [
                {
                    "kind": c.kind,
                    "shapes": [shape.dims for shape in c.results],
                    "group": c.group_size,
                    "looped": c.looped,
                }
                for c in read_collectives(read_program(compiled.as_text()), axis_sizes(setup.mesh))
            ],
        }
    print(json.dumps(results))


if __name__ == "__main__":
    main()
