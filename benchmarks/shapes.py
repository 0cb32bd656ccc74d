"""What the two sides of a comparison must have in common, read from a config: shape, batch, formats, optimizer, FLOPs.

    python benchmarks/shapes.py CONFIG [--set STATEMENT ...]      prints it as JSON

Counts come from the declarations that mtx builds its model from; a peer that counts otherwise is not measured.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
from typing import Any


def describe_case(path: str, overrides: list[str]) -> dict[str, Any]:
    """The work that a config describes, in words that need no mtx.

    Args:
        path: Of the config.
        overrides: Gin statements.

    Returns:
        `model` (the fields of `mtx.config.schema.Model`, defaults resolved), `seq_len`, `batch` (sequences of a step),
        `microbatch` (mtx's own), `recompute` (likewise), `compute`, `params`, `optimizer` (AdamW's settings and
        `clip_norm`), `parameters`, `matmul_parameters`, `flops_per_step` ('full' and 'causal').

    Raises:
        UserError: The config has a mistake, or asks for what no peer does: experts, dropout, another optimizer.
    """
    from mtx.config.reader import load
    from mtx.errors import UserError
    from mtx.models import abstract_parameters
    from mtx.optim.adamw import AdamW
    from mtx.planning.flops import count_matmul_parameters, model_flops_per_token

    run = load(path, overrides).run
    model, train = run.model, run.train
    optimizer = train.optimizer or AdamW()
    for is_foreign, what in (
        (not isinstance(optimizer, AdamW), "Train.optimizer is not AdamW"),
        (model.num_experts > 0, "Model.num_experts > 0"),
        (train.dropout > 0, "Train.dropout > 0"),
        (model.rope_scaling is not None, "Model.rope_scaling is set"),
    ):
        if is_foreign:
            raise UserError(f"{path}: {what}, which no peer here does; compare a config without it")
    params, axes = abstract_parameters(model)
    tokens = train.global_batch_size * train.seq_len
    fields = dataclasses.asdict(model)
    return {
        "model": {**fields, "num_kv_heads": model.kv_heads, "head_dim": model.head_width, "d_ff": model.ff_width},
        "seq_len": train.seq_len,
        "batch": train.global_batch_size,
        "microbatch": train.microbatch_size or train.global_batch_size,
        "recompute": train.recompute,
        "compute": run.precision.compute,
        "params": run.precision.params,
        "optimizer": {
            name: getattr(optimizer, name) for name in ("beta1", "beta2", "eps", "weight_decay", "clip_norm")
        },
        "parameters": _count(params),
        "matmul_parameters": count_matmul_parameters(model, params, axes),
        "flops_per_step": {
            "full": model_flops_per_token(model, params, axes, train.seq_len) * tokens,
            "causal": model_flops_per_token(model, params, axes, train.seq_len, "causal") * tokens,
        },
    }


def _count(tree: Any) -> int:
    import jax

    return sum(leaf.size for leaf in jax.tree.leaves(tree))


def main() -> None:
    """Prints the description of one config."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config")
    parser.add_argument("--set", action="append", default=[], dest="overrides", metavar="STATEMENT")
    args = parser.parse_args()
    os.environ["JAX_PLATFORMS"] = "cpu"  # shapes need no GPU
    print(json.dumps(describe_case(args.config, args.overrides), indent=1))


if __name__ == "__main__":
    main()
