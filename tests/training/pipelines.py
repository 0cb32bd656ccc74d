"""Prints loss and gradient errors of pipelines against one device, as JSON. Run with 8 devices, or as DEVICES says."""

from __future__ import annotations

import itertools
import json
import sys
from typing import Any

import jax
import numpy as np
from tiny import ALIBI, GPT, LLAMA, SEQ_LEN, make_params, make_program, make_setup, make_tokens, worst_error

from mtx.training.pipeline import _Pipeline

M8 = {"microbatch_size": 1}
MOE: dict[str, Any] = {
    **LLAMA, "num_layers": 3, "num_experts": 4, "experts_per_token": 2, "expert_every": 2, "load_balance_loss": 0.3,
    "router_z_loss": 0.1,
}  # fmt: skip


def layout(mesh: dict[str, int], recompute: str, *, head: str = "sharded", chunks: int = 1, **more: Any) -> Any:
    """The sections of a run."""
    train = {**M8, "recompute": recompute, **more.pop("train", {})}
    return {"mesh": mesh, "pipeline": {"head": head, "virtual_stages": chunks}, "train": train, **more}


GROUPS: dict[str, tuple[dict[str, Any], dict[str, Any], dict[str, Any]]] = {
    # name: model, training, layouts
    "four": (
        {**GPT, "num_layers": 4},
        {},
        {
            "pipe2 data2 tensor2": layout({"pipe": 2, "data": 2, "tensor": 2}, "selective"),
            "pipe4 data2 none": layout({"pipe": 4, "data": 2}, "none"),
        },
    ),
    "recompute": (
        {**GPT, "num_layers": 4},
        {},
        {
            f"{recompute} {head} {chunks}": layout(
                {"pipe": 2, "data": 2, "tensor": 2}, recompute, head=head, chunks=chunks
            )
            for recompute, head, chunks in (
                ("full", "sharded", 2), ("full", "last", 1), ("none", "sharded", 1), ("none", "last", 2),
                ("selective", "last", 2), ("selective", "sharded", 2),
            )
        },
    ),
    # Seven layers on three stages: layers and rows of the vocabulary that do not divide.
    "uneven": (
        {**LLAMA, "num_layers": 7},
        {"dropout": 0.1, "global_batch_size": 12},
        {
            "pipe3 x 2 chunks": layout({"pipe": 3}, "selective", chunks=2, train={"microbatch_size": 2}),
            "pipe3 data2 last": layout({"pipe": 3, "data": 2}, "none", head="last"),
            "pipe6": layout({"pipe": 6}, "full", train={"microbatch_size": 3}),  # fewer microbatches than stages
            "pipe6 of one sequence": layout({"pipe": 6}, "selective", train={"microbatch_size": None}),
            "pipe3 one microbatch": layout({"pipe": 3, "data": 2}, "selective", train={"microbatch_size": 6}),
        },
    ),
    # A vocabulary of 97, one key/value head.
    "odd": (
        {**ALIBI, "num_layers": 5},
        {},
        {
            "no-sp": layout({"pipe": 2, "data": 2, "tensor": 2}, "selective", rules={"sequence_parallel": False}),
            "tensor4": layout({"pipe": 2, "tensor": 4}, "none"),
            "no-sp last zero0": layout(
                {"pipe": 2, "data": 2, "tensor": 2}, "full", head="last",
                rules={"sequence_parallel": False, "zero": 0},
            ),
            "pipe4 zero1": layout({"pipe": 4, "data": 2}, "full", rules={"zero": 1}),
            "whole vocabulary": layout({"pipe": 2, "tensor": 2}, "full", rules={"overrides": {"vocab": None}}),
        },
    ),
    # With context and experts; routing and dropping as on one device.
    "context": (
        {**LLAMA, "num_layers": 5},
        {"dropout": 0.1},
        {
            "pipe2 context2 tensor2": layout({"pipe": 2, "context": 2, "tensor": 2}, "selective"),
            "pipe2 context4": layout({"pipe": 2, "context": 4}, "none", chunks=2, train={"microbatch_size": 2}),
            "pipe2 context2 all-to-all": layout(
                {"pipe": 2, "context": 2, "data": 2}, "full", train={"context_exchange": "all_to_all"}
            ),
        },
    ),
    "experts": (
        {**MOE, "expert_capacity_factor": 0.8},
        {},
        {
            "pipe3 expert2": layout({"pipe": 3, "expert": 2}, "none", train={"microbatch_size": 2}),
            "pipe2 expert2 tensor2": layout({"pipe": 2, "expert": 2, "tensor": 2}, "selective", head="last"),
        },
    ),
    "all axes": (
        MOE,
        {},
        {
            "pipe": layout({"pipe": 2, "data": 2, "expert": 2, "context": 2, "tensor": 2}, "selective"),
            "fsdp": layout({"data": 2, "fsdp": 2, "expert": 2, "context": 2, "tensor": 2}, "full"),
        },
    ),
}  # fmt: skip
DEVICES = {"all axes": 32}


def packed_batch(vocab_size: int, batch: int) -> dict[str, np.ndarray]:
    """Rows of two or three documents and some padding."""
    rng = np.random.default_rng(3)
    segments = np.zeros((batch, SEQ_LEN + 1), np.int32)
    positions = np.zeros_like(segments)
    for row in range(batch):
        cuts = [0, *sorted(rng.choice(np.arange(2, SEQ_LEN), 2, replace=False)), SEQ_LEN + 1 - row % 3]
        for number, (begin, end) in enumerate(itertools.pairwise(cuts), start=1):
            segments[row, begin:end] = number
            positions[row, begin:end] = np.arange(end - begin)
    return {"tokens": make_tokens(vocab_size=vocab_size, batch=batch), "segments": segments, "positions": positions}


def main(group: str) -> None:
    model, train, layouts = GROUPS[group]
    batch = packed_batch(model["vocab_size"], train.get("global_batch_size", 8))
    one = make_setup(model, train=train)
    params = make_params(one)
    expected, expected_grads = make_program(one)(params, batch)
    results = {}
    for name, sections in layouts.items():
        setup = make_setup(model, **{**sections, "train": {**train, **sections["train"]}})
        loss, grads = make_program(setup)(params, batch)
        results[name] = [abs(loss - expected) / expected, *worst_error(grads, expected_grads)]
    if group == "four":
        # What stages receive before there is anything must not matter, whatever it is.
        zeros = _Pipeline.zeros
        _Pipeline.zeros = lambda self: jax.tree.map(lambda a: a + np.nan, zeros(self))  # type: ignore[method-assign]
        setup = make_setup(model, **layouts["pipe2 data2 tensor2"])
        loss, grads = make_program(setup)(params, batch)
        results["begins with nan"] = [abs(loss - expected) / expected, *worst_error(grads, expected_grads)]
    print(json.dumps(results))


if __name__ == "__main__":
    main(sys.argv[1])
