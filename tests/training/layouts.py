"""Prints loss and gradient errors of many layouts against one device, as JSON. Run with 8 devices."""

from __future__ import annotations

import json
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from tiny import BATCH, GPT, LLAMA, make_run, make_setup, make_tokens, relative_error

from mtx.training.step import make_loss_and_gradients

LAYOUTS: dict[str, dict[str, Any]] = {
    "data8": {"mesh": {"data": 8}},
    "data8 zero1": {"mesh": {"data": 8}, "rules": {"zero": 1}},
    "fsdp8": {"mesh": {"fsdp": 8}},
    "fsdp4 data2 selective": {"mesh": {"fsdp": 4, "data": 2}, "train": {"recompute": "selective"}},
    "tensor4 data2": {"mesh": {"tensor": 4, "data": 2}},
    "tensor4 data2 micro": {"mesh": {"tensor": 4, "data": 2}, "train": {"microbatch_size": 1}},
    "tensor4 data2 no-sp micro": {
        "mesh": {"tensor": 4, "data": 2}, "rules": {"sequence_parallel": False}, "train": {"microbatch_size": 1},
    },
    "fsdp2 tensor2 data2 zero0": {"mesh": {"fsdp": 2, "tensor": 2, "data": 2}, "rules": {"zero": 0}},
    "fsdp2 tensor2 data2 full scan micro": {
        "mesh": {"fsdp": 2, "tensor": 2, "data": 2},
        "train": {"recompute": "full", "scan_layers": True, "microbatch_size": 1, "loss_chunk_tokens": 5},
    },
    "tensor4 fsdp2 whole-vocab": {"mesh": {"tensor": 4, "fsdp": 2}, "rules": {"overrides": {"vocab": None}}},
    "tensor4 data2 whole-vocab no-sp": {
        "mesh": {"tensor": 4, "data": 2}, "rules": {"overrides": {"vocab": None}, "sequence_parallel": False},
    },
}  # fmt: skip
MODELS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "gpt": (GPT, {}),
    "llama dropout": (LLAMA, {"dropout": 0.1}),
    # A vocabulary that no tensor axis divides; the one key/value head is shared by all shards.
    "odd": ({**GPT, "vocab_size": 97, "num_kv_heads": 1, "position": "alibi"}, {}),
}
ODD_LAYOUTS = ("fsdp8", "tensor4 data2", "fsdp2 tensor2 data2 full scan micro")


def compute(model: dict[str, Any], train: dict[str, Any], layout: dict[str, Any]) -> tuple[float, Any]:
    """Loss and gradients of the first batch."""
    setup = make_setup(make_run(model, **{**layout, "train": {**train, **layout.get("train", {})}}))
    inputs = setup.run.train.objective.inputs({"tokens": make_tokens(vocab_size=model["vocab_size"])})
    inputs["rows"] = jnp.arange(BATCH, dtype=jnp.int32)
    params = setup.initialize()["params"]
    loss, grads = jax.jit(make_loss_and_gradients(setup))(
        params, inputs, inputs["weights"].sum(), jax.random.key(1), None
    )
    for g, p in zip(jax.tree.leaves(grads), jax.tree.leaves(setup.abstract_state["params"])):
        assert g.sharding.is_equivalent_to(p.sharding, g.ndim), (g.sharding, p.sharding)
    return float(loss), jax.tree.map(np.asarray, grads)


def main() -> None:
    results = {}
    for name, (model, train) in MODELS.items():
        loss, grads = compute(model, train, {})
        for layout_name in ODD_LAYOUTS if name == "odd" else LAYOUTS:
            other, other_grads = compute(model, train, LAYOUTS[layout_name])
            errors = relative_error(other_grads, grads)
            worst = max(errors, key=lambda key: errors[key])
            results[f"{name} | {layout_name}"] = [abs(other - loss), worst, errors[worst]]
    print(json.dumps(results))


if __name__ == "__main__":
    main()
