"""Prints loss and gradient errors of models whose sequences are split over devices, as JSON. Run with 8 devices."""

from __future__ import annotations

import json
import sys
from typing import Any

import numpy as np
from tiny import ALIBI, BATCH, GPT, LLAMA, SEQ_LEN, make_params, make_program, make_setup, make_tokens, worst_error

LAYOUTS: dict[str, dict[str, Any]] = {
    "context4": {"mesh": {"context": 4}},
    "context4 data2 micro": {"mesh": {"context": 4, "data": 2}, "train": {"microbatch_size": 2}},
    "context4 fsdp2 zero2 all_to_all": {
        "mesh": {"context": 4, "fsdp": 2}, "rules": {"zero": 2}, "train": {"context_exchange": "all_to_all"},
    },
    "context2 tensor2 data2": {"mesh": {"context": 2, "tensor": 2, "data": 2}},
    "context2 tensor2 data2 no-sp selective": {
        "mesh": {"context": 2, "tensor": 2, "data": 2}, "rules": {"sequence_parallel": False},
        "train": {"recompute": "selective"},
    },
    "context2 tensor2 data2 all_to_all": {
        "mesh": {"context": 2, "tensor": 2, "data": 2}, "train": {"context_exchange": "all_to_all"},
    },
    "context2 tensor2 fsdp2 full scan micro": {
        "mesh": {"context": 2, "tensor": 2, "fsdp": 2},
        "train": {"recompute": "full", "scan_layers": True, "microbatch_size": 1, "loss_chunk_tokens": 3},
    },
}  # fmt: skip
MODELS: dict[str, tuple[dict[str, Any], dict[str, Any], bool, list[str]]] = {
    # name: model, training, whether documents are packed, layouts
    "llama dropout": (
        LLAMA,
        {"dropout": 0.1},
        False,
        [
            "context2 tensor2 data2",
            "context4",
            "context4 fsdp2 zero2 all_to_all",
            "context2 tensor2 data2 no-sp selective",
            "context2 tensor2 fsdp2 full scan micro",
        ],
    ),
    "gpt": (GPT, {}, False, ["context2 tensor2 data2"]),
    "gpt packed": (
        GPT,
        {},
        True,
        [
            "context4 data2 micro",
            "context4 fsdp2 zero2 all_to_all",
            "context2 tensor2 data2 no-sp selective",
        ],
    ),
    # One key/value head, which all tensor shards need; no mesh axis divides the vocabulary.
    "alibi packed": (
        ALIBI,
        {},
        True,
        ["context2 tensor2 data2", "context2 tensor2 data2 all_to_all", "context2 tensor2 fsdp2 full scan micro"],
    ),
    "fast": (LLAMA, {"dropout": 0.1}, True, ["context2 tensor2 data2", "context4 fsdp2 zero2 all_to_all"]),
}


def make_batch(vocab_size: int, packed: bool) -> dict[str, np.ndarray]:
    """Rows of one document, or of several that end anywhere; then every other row ends with padding."""
    batch = {"tokens": make_tokens(vocab_size=vocab_size)}
    if packed:
        rng = np.random.default_rng(4)
        starts = rng.random((BATCH, SEQ_LEN + 1)) < 0.2
        starts[:, 0] = True
        places = np.arange(SEQ_LEN + 1)
        segments = np.cumsum(starts, axis=1)
        positions = places - np.maximum.accumulate(np.where(starts, places, 0), axis=1)
        segments[::2, -4:], positions[::2, -4:] = 0, 0
        batch |= {"segments": segments.astype(np.int32), "positions": positions.astype(np.int32)}
    return batch


def compute(model: dict[str, Any], train: dict[str, Any], packed: bool, layout: dict[str, Any]) -> tuple[float, Any]:
    """Loss and gradients of the first batch."""
    setup = make_setup(model, **{**layout, "train": {**train, **layout.get("train", {})}})
    return make_program(setup)(make_params(setup), make_batch(model["vocab_size"], packed))


def main(name: str) -> None:
    model, train, packed, layouts = MODELS[name]
    loss, grads = compute(model, train, packed, {})
    results = {}
    for layout in layouts:
        other, other_grads = compute(model, train, packed, LAYOUTS[layout])
        results[layout] = [abs(other / loss - 1), *worst_error(other_grads, grads)]
    print(json.dumps(results))


if __name__ == "__main__":
    main(sys.argv[1])
