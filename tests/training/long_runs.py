"""Prints, as JSON, what runs of many steps do on layouts of several devices. Run with 8 devices.

noise FORMAT           losses of 20 steps of layouts and of one-device programs that are as valid as each other
endless NAME           losses of 200 steps
checkpoint OPTIMIZER   a state saved on one layout, opened on others, and trained on
ramp, evaluation       losses of layouts and of one device
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import jax
import numpy as np
from tiny import GPT, LLAMA, SEQ_LEN, Samples, make_setup, train

from mtx.checkpoints.store import Checkpoints
from mtx.config import schema
from mtx.config.layout import check_layout
from mtx.data.ramp import BatchSizes
from mtx.optim.adafactor import Adafactor
from mtx.optim.adamw import AdamW
from mtx.optim.muon import Muon
from mtx.optim.warmup_cosine import WarmupCosine
from mtx.training.inputs import make_eval_batch
from mtx.training.state import Setup
from mtx.training.step import make_eval_step

MODEL = {**LLAMA, "num_layers": 4}
MOE = {**MODEL, "num_experts": 4, "experts_per_token": 2, "expert_every": 2, "load_balance_loss": 0.1}
TOKENS = SEQ_LEN * 8
SCHEDULE = WarmupCosine(peak=0.003, final=0.0003, warmup_tokens=5 * TOKENS, decay_tokens=20 * TOKENS)
MICRO = {"microbatch_size": 1}

PIPE, CONTEXT = {"pipe": 2, "data": 2, "tensor": 2}, {"pipe": 2, "context": 2, "tensor": 2}
EXPERT = {"expert": 2, "tensor": 2, "pipe": 2}
INTERLEAVED = {"virtual_stages": 2, "head": "last"}


def noise(compute: str) -> dict[str, Any]:
    """Losses of 20 steps."""
    cases = {
        "dense": (MODEL, {"pipe data tensor": {"mesh": PIPE, "train": MICRO},
                          "pipe context tensor": {"mesh": CONTEXT, "train": MICRO}}),
        "experts": (MOE, {"expert tensor pipe": {"mesh": EXPERT, "train": MICRO}}),
    }  # fmt: skip
    alone = {
        "whole batch": {"train": {}},
        "microbatches of 1": {"train": MICRO},
        "chunks of the loss": {"train": {"microbatch_size": 4, "loss_chunk_tokens": 5, "recompute": "full"}},
    }
    told: dict[str, Any] = {}
    for model_name, (model, layouts) in cases.items():
        for name, sections in {**alone, **layouts}.items():
            options = {"optimizer": AdamW(learning_rate=SCHEDULE), "steps": 20, **sections["train"]}
            setup = make_setup(model, mesh=sections.get("mesh", {}), precision={"compute": compute}, train=options)
            _, told[f"{model_name}: {name}"] = train(setup, 20)
    return told


def endless(name: str) -> Any:
    """Losses of 200 steps."""
    model, mesh, pipeline = {
        "pipe tensor data": (MODEL, PIPE, INTERLEAVED),
        "pipe context tensor": (MODEL, CONTEXT, {}),
        "expert tensor pipe": (MOE, EXPERT, {}),
    }[name]
    options = {"microbatch_size": 2, "recompute": "selective", "optimizer": AdamW(learning_rate=0.003)}
    setup = make_setup(model, mesh=mesh, pipeline=pipeline, train=options)
    return train(setup, 200)[1]


def leaves(setup: Setup, state: Any) -> dict[str, np.ndarray]:
    """All arrays of a state in canonical order, on the host."""
    found = jax.tree_util.tree_leaves_with_path(setup.canonical.store(state))
    # Of copies: an array that was read keeps a view of its buffers, which then are not donated.
    return {jax.tree_util.keystr(path): np.array(leaf.copy()) for path, leaf in found}


def checkpoint(name: str) -> dict[str, Any]:
    """From a pipeline of 3 stages of 2 chunks, for 7 layers, to other layouts."""
    optimizer = {"adafactor": Adafactor, "adamw": AdamW, "muon": Muon}[name](learning_rate=0.01)
    model = {**LLAMA, "num_layers": 7}
    options = {"optimizer": optimizer, "microbatch_size": 2, "global_batch_size": 12}

    def make(mesh: dict[str, int], pipeline: dict[str, Any] | None = None, **train: Any) -> Setup:
        return make_setup(model, mesh=mesh, pipeline=pipeline or {}, train={**options, **train})

    source = make({"pipe": 3}, {"virtual_stages": 2})
    targets = {
        "one device": make({}),
        "pipe2": make({"pipe": 2}),
        "data2 tensor2": make({"data": 2, "tensor": 2}),
        "pipe3 of 2 chunks, data2, offloaded": make(
            {"pipe": 3, "data": 2}, {"virtual_stages": 2}, offload_optimizer=True, microbatch_size=1
        ),
    }
    state, _ = train(source, 2)
    saved = leaves(source, state)
    results: dict[str, Any] = {"arrays": len(saved)}
    with tempfile.TemporaryDirectory() as folder, Checkpoints(Path(folder)) as checkpoints:
        checkpoints.save(2, source.canonical.store(state), {})
        checkpoints.wait()
        _, results["source"] = train(source, 2, state, first=2)
        for target, setup in targets.items():
            restored = setup.canonical.load(checkpoints.restore(2, setup.canonical.abstract_state))
            wanted = jax.tree.map(lambda leaf: leaf.sharding, setup.abstract_state)
            assert jax.tree.all(jax.tree.map(lambda a, b: a.sharding == b, restored, wanted)), target
            found = leaves(setup, restored)
            assert found.keys() == saved.keys()
            differing = [path for path, values in saved.items() if not np.array_equal(values, found[path])]
            results[target] = {"differing": differing, "told": train(setup, 2, restored, first=2)[1]}
    return results


def ramp() -> dict[str, Any]:
    """Batches that grow from 4 to 12 sequences, in microbatches of 1 per shard."""
    growth = schema.BatchRamp(start=4, increment=4, tokens=SEQ_LEN * 16)
    options = {**MICRO, "global_batch_size": 12, "batch_ramp": growth, "optimizer": AdamW(learning_rate=0.01)}
    layouts: dict[str, dict[str, Any]] = {
        "one device": {},
        "pipe2 data2 tensor2": {"mesh": PIPE},
        "pipe2 data2 of 2 chunks": {"mesh": {"pipe": 2, "data": 2}, "pipeline": INTERLEAVED},
    }
    sizes = BatchSizes(global_batch_size=12, seq_len=SEQ_LEN, ramp=growth)
    told: dict[str, Any] = {"sizes": [sizes.size(step) for step in range(5)]}
    for name, sections in layouts.items():
        told[name] = train(make_setup(MODEL, **sections, train=options), 5)[1]
    return told


def evaluation() -> dict[str, Any]:
    """Loss sum and weight of a batch, some of whose targets are padding."""

    class Padded(Samples):
        def read(self, step: int, rows: Any) -> dict[str, np.ndarray]:
            lengths = (np.asarray(rows) % 5 + SEQ_LEN - 4)[:, None]
            segments = (np.arange(SEQ_LEN + 1) < lengths).astype(np.int32)
            positions = np.arange(SEQ_LEN + 1, dtype=np.int32) * segments
            return {**super().read(step, rows), "segments": segments, "positions": positions}

    layouts: dict[str, dict[str, Any]] = {
        "one device": {},
        "pipe2 data2 tensor2": {"mesh": PIPE},
        "pipe2 context2 tensor2": {"mesh": CONTEXT},
        "pipe3 of 2 chunks, head on the last": {"mesh": {"pipe": 3}, "pipeline": INTERLEAVED},
        "pipe2 expert2 tensor2": {"mesh": EXPERT},
    }
    told: dict[str, Any] = {}
    for name, model in {"tied": {**GPT, "num_layers": 7}, "experts": {**MOE, "num_layers": 6}}.items():
        for layout, sections in layouts.items():
            if "expert" in sections.get("mesh", {}) and name == "tied":
                continue
            setup = make_setup(model, **sections, train={"microbatch_size": 2, "global_batch_size": 12})
            check_layout(setup.run, setup.run.mesh)
            sizes = BatchSizes(global_batch_size=setup.run.train.global_batch_size, seq_len=SEQ_LEN)
            params = setup.initialize()["params"]
            sums = make_eval_step(setup)(params, make_eval_batch(setup, Padded(sizes), 0))
            told[f"{name}: {layout}"] = [float(value) for value in sums]
    return told


def main(what: str, *arguments: str) -> None:
    programs: dict[str, Any] = {
        "noise": noise, "endless": endless, "checkpoint": checkpoint, "ramp": ramp, "evaluation": evaluation,
    }  # fmt: skip
    print(json.dumps(programs[what](*arguments)))


if __name__ == "__main__":
    main(*sys.argv[1:])
