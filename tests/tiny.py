"""Small runs that tests share: one place for shapes, so that few programs are compiled."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import fields
from typing import Any

import jax
import numpy as np

from mtx.config import schema
from mtx.config.layout import check_layout
from mtx.data.ramp import BatchSizes
from mtx.mesh import make_mesh
from mtx.objectives.causal import Causal
from mtx.optim.adamw import AdamW
from mtx.training.inputs import make_train_batch
from mtx.training.state import Setup
from mtx.training.step import make_loss_and_gradients, make_train_step

GPT: dict[str, Any] = {
    "vocab_size": 96, "d_model": 32, "num_layers": 2, "num_heads": 4, "max_seq_len": 16, "init_std": 0.2,
}  # fmt: skip
LLAMA: dict[str, Any] = {
    **GPT, "num_kv_heads": 2, "d_ff": 48, "position": "rotary", "norm": "rmsnorm", "activation": "swiglu",
    "use_bias": False, "tie_embeddings": False,
}  # fmt: skip
ALIBI: dict[str, Any] = {
    **GPT, "vocab_size": 97, "num_kv_heads": 1, "position": "alibi", "activation": "gelu", "tie_embeddings": False,
}  # fmt: skip
"""A vocabulary that no mesh axis divides; all heads share one key/value head."""
SEQ_LEN, BATCH = 16, 8


def make_run(model: dict[str, Any], **sections: dict[str, Any]) -> schema.Run:
    """A run on one device unless `mesh` says otherwise."""
    base = {"seq_len": SEQ_LEN, "global_batch_size": BATCH, "steps": 4, "objective": Causal(), "optimizer": AdamW()}
    train = {"scan_layers": False, **base}
    return schema.Run(
        model=schema.Model(**model),
        mesh=schema.Mesh(**{"data": 1, **sections.get("mesh", {})}),
        pipeline=schema.Pipeline(**sections.get("pipeline", {})),
        rules=schema.Rules(**sections.get("rules", {})),
        precision=schema.Precision(**sections.get("precision", {})),
        train=schema.Train(**{**train, **sections.get("train", {})}),
        data=schema.Data(),
        tokenizer=schema.Tokenizer(),
        checkpoint=schema.Checkpoint(),
        health=schema.Health(**sections.get("health", {})),
        cluster=schema.Cluster(**sections.get("cluster", {})),
    )


def make_setup(model: dict[str, Any], **sections: dict[str, Any]) -> Setup:
    """On the first devices of the process that its mesh needs."""
    run = make_run(model, **sections)
    count = math.prod(getattr(run.mesh, field.name) for field in fields(run.mesh))
    return Setup(run, make_mesh(run.mesh, jax.devices()[:count]))


def make_tokens(seed: int = 0, vocab_size: int = 96, batch: int = BATCH) -> np.ndarray:
    """int32 [batch, SEQ_LEN + 1]."""
    return np.random.default_rng(seed).integers(0, vocab_size, (batch, SEQ_LEN + 1)).astype(np.int32)


def make_params(setup: Setup) -> Any:
    """Nested dict of float32 arrays on the host. All are random: with biases of 0 and gains of 1 mistakes hide."""
    rng = np.random.default_rng(7)

    def draw(leaf: jax.ShapeDtypeStruct, axes: tuple[str, ...]) -> np.ndarray:
        is_gain_or_bias = len(axes) - ("layers" in axes) == 1
        noise = rng.standard_normal(leaf.shape) * setup.run.model.init_std
        return (noise + is_gain_or_bias).astype(np.float32)

    whole = setup.definition.whole
    return jax.tree.map(draw, whole.params, whole.axes)


Program = Callable[..., tuple[float, Any]]


def make_program(setup: Setup) -> Program:
    """Compiles (params, batch, seed=1) -> loss and gradients; all on the host, `seed` is of the dropout.

    Parameters and gradients have their layers in the canonical order.
    """
    sums = make_sums_program(setup)

    def compute(params: Any, batch: dict[str, np.ndarray], seed: int = 1) -> tuple[float, Any]:
        totals, grads = sums(params, batch, seed)
        return float(totals["loss"]), grads

    return compute


def make_sums_program(setup: Setup) -> Callable[..., tuple[dict[str, np.ndarray], Any]]:
    """As `make_program`, but with all sums of the step (`mtx.training.sums`)."""
    program = jax.jit(make_loss_and_gradients(setup))
    shardings = jax.tree.map(lambda leaf: leaf.sharding, setup.abstract_state["params"])
    canonical = jax.tree.map(lambda leaf: leaf.sharding, setup.canonical.abstract_state["params"])
    objective: Any = setup.run.train.objective

    def compute(params: Any, batch: dict[str, np.ndarray], seed: int = 1) -> tuple[dict[str, np.ndarray], Any]:
        batch = {**batch, "rows": np.arange(len(batch["tokens"]), dtype=np.int32)}
        weight, key = objective.inputs(batch)["weights"].sum(), jax.random.key(seed)
        placed = setup.canonical.load({"params": jax.device_put(params, canonical)})["params"]
        sums, grads = program(placed, batch, weight, key, None)
        for g, sharding in zip(jax.tree.leaves(grads), jax.tree.leaves(shardings)):
            assert g.sharding.is_equivalent_to(sharding, g.ndim), (g.sharding, sharding)
            assert g.dtype == np.float32
        grads = setup.canonical.store({"params": grads})["params"]
        return jax.tree.map(np.asarray, (sums, grads))

    return compute


def worst_error(actual: Any, expected: Any) -> tuple[str, float]:
    """The leaf that differs most, and its largest difference as a share of its largest value.

    Of a leaf with tiny values it is a share of a hundredth of the largest of all leaves: a key's bias has no gradient
    (softmax does not see it), and its own size would be a measure of rounding alone.
    """
    scale = max(float(np.abs(leaf).max()) for leaf in jax.tree.leaves(expected))

    def one(a: np.ndarray, b: np.ndarray) -> float:
        return float(np.abs(np.asarray(a) - np.asarray(b)).max() / max(float(np.abs(b).max()), 1e-2 * scale))

    errors = jax.tree_util.tree_leaves_with_path(jax.tree.map(one, actual, expected))
    path, error = max(errors, key=lambda item: item[1])
    return jax.tree_util.keystr(path), error


class Samples:
    """Reads sample i of the run as tokens that follow from i alone."""

    def __init__(self, sizes: BatchSizes):
        self.sizes = sizes

    def read(self, step: int, rows: Any) -> dict[str, np.ndarray]:
        """The rows of the batch of a step (0-based)."""
        first = self.sizes.first_sample(step)
        return {"tokens": np.concatenate([make_tokens(seed=first + int(row), batch=1) for row in rows])}


def train(setup: Setup, steps: int, state: Any = None, *, first: int = 0) -> tuple[Any, list[list[float]]]:
    """Trains from a state, which is consumed, or from the first one; the state, and each step's loss and norm.

    The layout is one that users are let train on. Each step is waited for: simulated devices that are steps apart can
    take each other's threads and stand still.
    """
    check_layout(setup.run, setup.run.mesh)
    sizes = BatchSizes(
        global_batch_size=setup.run.train.global_batch_size, seq_len=SEQ_LEN, ramp=setup.run.train.batch_ramp
    )
    step, state, told = make_train_step(setup), setup.initialize() if state is None else state, []
    for number in range(first, first + steps):
        state, metrics = step(state, make_train_batch(setup, Samples(sizes), sizes, number))
        told.append([float(metrics["loss"]), float(metrics["grad_norm"])])
    return state, told
