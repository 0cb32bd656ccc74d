"""Small runs that tests share: one place for shapes, so that few programs are compiled."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np

from mtx.config import schema
from mtx.mesh import make_mesh
from mtx.objectives.causal import Causal
from mtx.optim.adamw import AdamW
from mtx.training.state import Setup

GPT: dict[str, Any] = {"vocab_size": 96, "d_model": 32, "num_layers": 2, "num_heads": 4, "max_seq_len": 16, "init_std": 0.2}
LLAMA: dict[str, Any] = {
    **GPT, "num_kv_heads": 2, "d_ff": 48, "position": "rotary", "norm": "rmsnorm", "activation": "swiglu",
    "use_bias": False, "tie_embeddings": False,
}  # fmt: skip
SEQ_LEN, BATCH = 16, 8


def make_run(model: dict[str, Any], **sections: dict[str, Any]) -> schema.Run:
    """A run on one device unless `mesh` says otherwise."""
    train = {"seq_len": SEQ_LEN, "global_batch_size": BATCH, "steps": 4, "objective": Causal(), "optimizer": AdamW()}
    return schema.Run(
        model=schema.Model(**model),
        mesh=schema.Mesh(**{"data": 1, **sections.get("mesh", {})}),
        rules=schema.Rules(**sections.get("rules", {})),
        precision=schema.Precision(**sections.get("precision", {})),
        train=schema.Train(**{**train, **sections.get("train", {})}),
        data=schema.Data(),
        tokenizer=schema.Tokenizer(),
        checkpoint=schema.Checkpoint(),
    )


def make_setup(run: schema.Run) -> Setup:
    """On the first devices of the process that its mesh needs."""
    mesh = run.mesh
    count = mesh.pipe * mesh.data * mesh.fsdp * mesh.expert * mesh.context * mesh.tensor
    return Setup(run, make_mesh(mesh, jax.devices()[:count]))


def make_tokens(seed: int = 0, vocab_size: int = 96) -> np.ndarray:
    """int32 [BATCH, SEQ_LEN + 1]."""
    return np.random.default_rng(seed).integers(0, vocab_size, (BATCH, SEQ_LEN + 1)).astype(np.int32)


def relative_error(actual: Any, expected: Any) -> dict[str, float]:
    """Largest difference of each leaf, as a share of the largest value of all leaves of its kind of parameter.

    A key's bias has no gradient (softmax does not see it): its own size would be a measure of rounding alone.
    """
    scale = max(float(np.abs(leaf).max()) for leaf in jax.tree.leaves(expected))

    def one(a: np.ndarray, b: np.ndarray) -> float:
        return float(np.abs(np.asarray(a) - np.asarray(b)).max() / max(float(np.abs(b).max()), 1e-2 * scale))

    errors = jax.tree.map(one, actual, expected)
    return {jax.tree_util.keystr(path): error for path, error in jax.tree_util.tree_leaves_with_path(errors)}
