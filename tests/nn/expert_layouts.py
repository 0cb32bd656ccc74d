"""Prints loss and gradient errors of layouts of models with experts against one device, as JSON. Run with 8 devices.

With the argument `steps`: metrics and balancing biases after two steps on one device and in a pipeline.
"""

from __future__ import annotations

import json
import sys
from typing import Any

import jax
import numpy as np
from tiny import BATCH, GPT, LLAMA, SEQ_LEN, make_params, make_program, make_setup, make_tokens, worst_error

from mtx.training.step import make_train_step

LOSSES = {"load_balance_loss": 0.3, "router_z_loss": 0.1}
MIXTRAL = {**LLAMA, "num_layers": 3, "num_experts": 4, "experts_per_token": 2, "expert_every": 2, **LOSSES}
SWITCH = {**GPT, "num_experts": 4, "experts_per_token": 1, "expert_capacity_factor": 0.8, **LOSSES}
DEEPSEEK = {
    **LLAMA, "num_layers": 3, "num_experts": 8, "experts_per_token": 3, "num_shared_experts": 1, "expert_d_ff": 16,
    "first_dense_layers": 1, "router_score": "sigmoid", "expert_bias_rate": 0.01, "use_bias": True, **LOSSES,
}  # fmt: skip
MODELS: dict[str, dict[str, Any]] = {
    "mixtral": MIXTRAL, "switch": SWITCH, "deepseek": DEEPSEEK,
    "deepseek capacity": {**DEEPSEEK, "expert_capacity_factor": 0.7},
}  # fmt: skip

LAYOUTS: dict[str, dict[str, Any]] = {
    "expert4 data2": {"mesh": {"expert": 4, "data": 2}},
    "expert2 tensor2 data2": {"mesh": {"expert": 2, "tensor": 2, "data": 2}},
    "expert2 tensor2 fsdp2 no-sp selective micro": {
        "mesh": {"expert": 2, "tensor": 2, "fsdp": 2}, "rules": {"sequence_parallel": False},
        "train": {"recompute": "selective", "microbatch_size": 1},
    },
    "expert4 fsdp2 full scan": {
        "mesh": {"expert": 4, "fsdp": 2}, "train": {"recompute": "full", "scan_layers": True},
    },
    "tensor2 fsdp4 zero1": {"mesh": {"tensor": 2, "fsdp": 4}, "rules": {"zero": 1}},
    "expert2 context2 tensor2": {"mesh": {"expert": 2, "context": 2, "tensor": 2}},
    "context4 expert2": {"mesh": {"expert": 2, "context": 4}},
    "pipe2 expert2 tensor2 selective": {
        "mesh": {"pipe": 2, "expert": 2, "tensor": 2}, "train": {"recompute": "selective", "microbatch_size": 1},
    },
    "pipe2 expert2 context2 none": {
        "mesh": {"pipe": 2, "expert": 2, "context": 2}, "train": {"recompute": "none", "microbatch_size": 2},
    },
}  # fmt: skip
CASES: dict[str, list[str]] = {
    "mixtral": ["expert4 data2", "expert2 tensor2 data2", "pipe2 expert2 tensor2 selective"],
    "switch": [
        "expert4 data2",
        "expert2 tensor2 fsdp2 no-sp selective micro",
        "expert4 fsdp2 full scan",
        "context4 expert2",
    ],
    "deepseek": ["expert2 tensor2 data2", "tensor2 fsdp4 zero1", "context4 expert2"],
    "deepseek capacity": [
        "expert2 tensor2 data2",
        "expert2 tensor2 fsdp2 no-sp selective micro",
        "pipe2 expert2 context2 none",
    ],
}


def make_batch() -> dict[str, np.ndarray]:
    """Rows of two documents and padding, each with other lengths."""
    tokens = make_tokens()
    ends = np.random.default_rng(1).integers(3, SEQ_LEN + 2, (len(tokens), 2))
    ends.sort(axis=1)
    place = np.arange(SEQ_LEN + 1)
    segments = 1 + (place >= ends[:, :1]).astype(np.int32)
    segments = np.where(place < ends[:, 1:], segments, 0).astype(np.int32)
    positions = np.where(segments == 2, place - ends[:, :1], place).astype(np.int32)
    return {"tokens": tokens, "segments": segments, "positions": positions}


def compute(model: dict[str, Any], layout: dict[str, Any]) -> tuple[float, Any]:
    """Loss and gradients of the first batch."""
    setup = make_setup(model, **layout)
    return make_program(setup)(make_params(setup), make_batch())


def train(layout: dict[str, Any]) -> dict[str, Any]:
    """Metrics of the second step, and the biases after it."""
    setup = make_setup(MODELS["deepseek capacity"], **layout)
    state, step = setup.initialize(), make_train_step(setup)
    batch = {**make_batch(), "rows": np.arange(BATCH, dtype=np.int32), "learning_rate": np.float32(1e-3)}
    for _ in range(2):
        state, metrics = step(state, batch)
    biases = setup.canonical.store(state)["params"]["expert_layers"]["feedforward"]["router"]["balance_bias"]
    return jax.tree.map(lambda a: np.asarray(a).tolist(), {**metrics, "balance_bias": biases})


def main(name: str, only: list[str]) -> None:
    if name == "steps":
        print(json.dumps([train({}), train(LAYOUTS["pipe2 expert2 tensor2 selective"])]))
        return
    loss, grads = compute(MODELS[name], {})
    results = {}
    for layout in only or CASES[name]:
        other, other_grads = compute(MODELS[name], LAYOUTS[layout])
        results[layout] = [abs(other - loss) / loss, *worst_error(other_grads, grads)]
    print(json.dumps(results))


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2:])
