"""Prints tokens and logits errors of sharded models against one device, as JSON. Run with 8 devices."""

from __future__ import annotations

import json
from typing import Any

import jax
import numpy as np
from tiny import ALIBI, GPT, LLAMA, make_params, make_setup

from mtx.inference.decoding import Generator
from mtx.inference.layout import for_inference
from mtx.inference.logits import compute_logits
from mtx.inference.sampling import Sampling

CASES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "gpt tensor4 data2": (GPT, {"mesh": {"tensor": 4, "data": 2}}),
    "llama fsdp2 tensor2 data2": (LLAMA, {"mesh": {"fsdp": 2, "tensor": 2, "data": 2}}),
    # Whole rows of the vocabulary and the one key/value head on every shard.
    "alibi tensor4 fsdp2": (ALIBI, {"mesh": {"tensor": 4, "fsdp": 2}, "rules": {"zero": 1}}),
}


def compute(model: dict[str, Any], layout: dict[str, Any]) -> tuple[list[list[int]], np.ndarray]:
    setup = make_setup(model, **layout)
    params = jax.device_put(make_params(setup), setup.state_shardings["params"])
    sampling = Sampling(temperature=0.8, top_k=20)
    rows = Generator(for_inference(setup)).generate(params, [5, 6, 7], max_tokens=9, sampling=sampling, num_samples=2)
    ids = np.arange(24).reshape(2, 12)
    mask = np.array([[0] * 3 + [1] * 9, [1] * 9 + [0] * 3])
    return rows, compute_logits(setup, params, ids, attention_mask=mask)


def main() -> None:
    results = {}
    for name, (model, layout) in CASES.items():
        rows, logits = compute(model, {})
        other_rows, other_logits = compute(model, layout)
        assert jax.device_count() == 8
        error = float(np.abs(logits - other_logits).max())
        results[name] = [{"one device": rows, "sharded": other_rows}, error]
    print(json.dumps(results))


if __name__ == "__main__":
    main()
