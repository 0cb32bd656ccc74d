"""Prints loss and gradient errors of a model's layouts against one device, as JSON. Run with 8 devices."""

from __future__ import annotations

import json
import sys
from typing import Any

from tiny import ALIBI, GPT, LLAMA, make_params, make_program, make_setup, make_tokens, worst_error

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
    "tensor4 data2 whole-vocab no-sp": {
        "mesh": {"tensor": 4, "data": 2}, "rules": {"overrides": {"vocab": None}, "sequence_parallel": False},
    },
}  # fmt: skip
MODELS: dict[str, tuple[dict[str, Any], dict[str, Any], list[str]]] = {
    # name: model, training, layouts
    "gpt": (
        GPT,
        {},
        ["data8", "fsdp8", "tensor4 data2", "tensor4 data2 micro", "fsdp2 tensor2 data2 zero0"],
    ),
    # Two key/value heads: fewer than tensor shards.
    "llama dropout": (
        LLAMA,
        {"dropout": 0.1},
        [
            "data8 zero1",
            "fsdp4 data2 selective",
            "tensor4 data2",
            "tensor4 data2 no-sp micro",
            "fsdp2 tensor2 data2 full scan micro",
        ],
    ),
    "odd": (
        ALIBI,
        {},
        ["fsdp8", "tensor4 data2", "tensor4 data2 whole-vocab no-sp", "fsdp2 tensor2 data2 full scan micro"],
    ),
}


def compute(model: dict[str, Any], train: dict[str, Any], layout: dict[str, Any]) -> tuple[float, Any]:
    """Loss and gradients of the first batch."""
    setup = make_setup(model, **{**layout, "train": {**train, **layout.get("train", {})}})
    return make_program(setup)(make_params(setup), {"tokens": make_tokens(vocab_size=model["vocab_size"])})


def main(name: str) -> None:
    model, train, layouts = MODELS[name]
    loss, grads = compute(model, train, {})
    results = {}
    for layout in layouts:
        other, other_grads = compute(model, train, LAYOUTS[layout])
        results[layout] = [abs(other - loss), *worst_error(other_grads, grads)]
    print(json.dumps(results))


if __name__ == "__main__":
    main(sys.argv[1])
