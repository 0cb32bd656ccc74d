"""Prints loss and gradient errors of layouts with rules of their own, as JSON. Run with 8 devices."""

from __future__ import annotations

import json
from typing import Any

from tiny import GPT, make_params, make_program, make_setup, make_tokens, worst_error

from mtx.config.layout import check_layout

MODEL = {**GPT, "num_experts": 4, "experts_per_token": 2, "expert_every": 2}
SPLIT = ("heads", "kv_heads", "mlp", "vocab", "seq_sp")
LAYOUTS: dict[str, dict[str, Any]] = {
    "experts over data": {"mesh": {"data": 2, "tensor": 2}, "rules": {"overrides": {"experts": "data"}}},
    "tensor over two axes": {
        "mesh": {"data": 2, "fsdp": 2, "tensor": 2},
        "rules": {"overrides": {"batch": "data", **dict.fromkeys(SPLIT, ("fsdp", "tensor"))}},
    },
    "copies": {
        "mesh": {"data": 2, "context": 2, "tensor": 2},
        "rules": {"overrides": dict.fromkeys(("batch", "seq", "seq_sp", "heads", "kv_heads"))},
    },
}


def compute(layout: dict[str, Any]) -> tuple[float, Any]:
    """Loss and gradients of the first batch, on a layout that the checks accept."""
    setup = make_setup(MODEL, **layout)
    check_layout(setup.run, setup.run.mesh)
    return make_program(setup)(make_params(setup), {"tokens": make_tokens()})


if __name__ == "__main__":
    loss, grads = compute({})
    results = {}
    for name, layout in LAYOUTS.items():
        other, other_grads = compute(layout)
        results[name] = [abs(other - loss), *worst_error(other_grads, grads)]
    print(json.dumps(results))
