"""The rules of a run: which mesh axes split each logical axis.

Decides the preset, and what becomes of it on a mesh; what a run may override is decided in `mtx.config.fit`.

Invariant: only axes with more than one device are ever named.
"""

from __future__ import annotations

from collections.abc import Mapping

from mtx.config import schema
from mtx.config.axes import LOGICAL_AXES, MESH_AXES
from mtx.errors import UserError

Rules = dict[str, tuple[str, ...]]
"""Logical axis -> live mesh axes; empty where nothing shards it."""

MEGATRON: Rules = {
    "layers": ("pipe",),
    "vocab": ("tensor",),
    "embed": (),
    "heads": ("tensor",),
    "kv_heads": ("tensor",),
    "head_dim": (),
    "mlp": ("tensor",),
    "experts": ("expert",),
    "router": (),
    "batch": ("data", "fsdp", "expert"),
    "seq": ("context",),
    "seq_sp": ("context", "tensor"),
    "positions": (),
}


def choose_rules(run: schema.Run, sizes: Mapping[str, int]) -> Rules:
    """The Megatron preset, adapted to the model's counts and to the mesh, then the run's overrides.

    Args:
        sizes: Devices along each mesh axis.

    Raises:
        UserError: An override names an axis that does not exist.
    """
    table = dict(MEGATRON)
    if not run.rules.sequence_parallel:
        table["seq_sp"] = table["seq"]
    if run.model.vocab_size % sizes["tensor"]:
        table["vocab"] = ()  # whole rows on each shard; tokens are split instead (nn.embedding, nn.loss)
    if run.model.kv_heads % sizes["tensor"]:
        table["kv_heads"] = ()  # fewer key/value heads than shards: each shard computes the one that it needs
    for name, axes in run.rules.overrides.items():
        chosen = (axes,) if isinstance(axes, str) else tuple(axes or ())
        if name not in LOGICAL_AXES or not set(chosen) <= set(MESH_AXES):
            raise UserError(
                f"Rules.overrides: {name!r}: {axes!r}; logical axes are {', '.join(LOGICAL_AXES)}, "
                f"mesh axes are {', '.join(MESH_AXES)}"
            )
        table[name] = chosen
    return {name: tuple(axis for axis in axes if sizes[axis] > 1) for name, axes in table.items()}
