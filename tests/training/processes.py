"""Prints losses and gradient norms of a few steps per case, as JSON. Run in one process, or in several together.

The devices of a mesh are taken process by process, so that its outermost live axis crosses the border between
processes, and so does every axis that is longer than a process has devices.
"""

from __future__ import annotations

import json
import sys
from typing import Any

import jax
from tiny import GPT, LLAMA, make_setup, train

from mtx.mesh import start_process

STEPS = 3
EXPERTS = {**LLAMA, "num_experts": 4, "experts_per_token": 2, "load_balance_loss": 0.1, "router_z_loss": 0.1}
FOUR: dict[str, Any] = {"num_layers": 4}
CASES: dict[str, dict[str, Any]] = {
    "pipe": {"model": GPT, "mesh": {"pipe": 2}, "train": {"microbatch_size": 2}},
    "data": {"model": GPT, "mesh": {"data": 2, "tensor": 2}, "train": {"dropout": 0.1}},
    "fsdp": {"model": LLAMA, "mesh": {"fsdp": 4}, "train": {"microbatch_size": 1}},
    "tensor": {"model": GPT, "mesh": {"tensor": 4}},
    "pipe of 4": {"model": {**LLAMA, **FOUR}, "mesh": {"pipe": 4}, "train": {"microbatch_size": 1}},
    "pipe interleaved": {
        "model": {**GPT, **FOUR}, "mesh": {"pipe": 2, "data": 2}, "pipeline": {"virtual_stages": 2, "head": "last"},
        "train": {"microbatch_size": 1},
    },
    "context ring": {"model": LLAMA, "mesh": {"context": 4}},
    "context all_to_all": {
        "model": GPT, "mesh": {"context": 4}, "train": {"context_exchange": "all_to_all", "dropout": 0.1},
    },
    "expert": {"model": EXPERTS, "mesh": {"expert": 4}},
    "expert tensor": {"model": EXPERTS, "mesh": {"expert": 2, "tensor": 2}},
    "pipe context tensor": {
        "model": {**LLAMA, **FOUR}, "mesh": {"pipe": 2, "context": 2, "tensor": 2}, "train": {"microbatch_size": 2},
    },
    "data expert tensor": {"model": EXPERTS, "mesh": {"data": 2, "expert": 2, "tensor": 2}},
    "fsdp context": {"model": LLAMA, "mesh": {"fsdp": 2, "context": 4}},
}  # fmt: skip


def main(names: list[str]) -> None:
    start_process()
    results = {}
    for name in names:
        sections = dict(CASES[name])
        model, mesh = sections.pop("model"), sections.pop("mesh")
        setups = {"mesh": make_setup(model, **sections, mesh=mesh)}
        if jax.process_count() == 1:
            # Without what has no effect there.
            one = {"train": {k: v for k, v in sections.get("train", {}).items() if k != "context_exchange"}}
            setups["one device"] = make_setup(model, **{**sections, **one, "pipeline": {}})
        for layout, setup in setups.items():
            _, results[f"{name}: {layout}"] = train(setup, STEPS)
        assert make_setup(model, mesh=mesh).mesh.size == jax.device_count()
    print(json.dumps(results))


if __name__ == "__main__":
    main(sys.argv[1:])
