"""A step of small models in 8 bits, on several layouts and ways to compute it: what of it differs. Prints JSON."""

from __future__ import annotations

import json
from typing import Any

import jax
import numpy as np
from tiny import BATCH, LLAMA, make_params, make_program, make_setup

MODEL = {**LLAMA, "d_model": 64, "d_ff": 96, "max_seq_len": 32, "init_std": 0.05}
LONG = {"seq_len": 32}
FLOAT8 = {"compute": "float8"}
CASES: dict[str, dict[str, Any]] = {
    "one device": {},
    "scanned": {"train": {"scan_layers": True}},
    "recomputed": {"train": {"recompute": "full"}},
    "tensor": {"mesh": {"tensor": 2}},
    "context": {"mesh": {"context": 2}},
    "pipe": {"mesh": {"pipe": 2}},
    "tensor and fsdp": {"mesh": {"tensor": 2, "fsdp": 2}},
    "bfloat16": {"precision": {"compute": "bfloat16"}},
}


def measure(case: dict[str, Any]) -> dict[str, float]:
    """Loss, and norm of the gradient; the gradient's distance to the one that was kept first."""
    setup = make_setup(MODEL, **{"precision": FLOAT8, **case, "train": {**LONG, **case.get("train", {})}})
    tokens = np.random.default_rng(0).integers(0, MODEL["vocab_size"], (BATCH, LONG["seq_len"] + 1))
    loss, grads = make_program(setup)(make_params(setup), {"tokens": tokens.astype(np.int32)})
    flat = np.concatenate([np.ravel(leaf).astype(np.float64) for leaf in jax.tree.leaves(grads)])
    first = _first.setdefault("gradient", flat)
    return {
        "loss": loss,
        "grad_norm": float(np.linalg.norm(flat)),
        "distance": float(np.linalg.norm(flat - first) / np.linalg.norm(first)),
    }


_first: dict[str, np.ndarray] = {}

if __name__ == "__main__":
    print(json.dumps({name: measure(case) for name, case in CASES.items()}))
