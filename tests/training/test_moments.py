"""ZeRO: whatever the layout, no two devices hold the same piece of a matrix's moments."""

from __future__ import annotations

import math

import jax
import pytest
from tiny import LLAMA, make_setup

from mtx.sharding import axis_sizes

MODEL = {**LLAMA, "num_layers": 4}
EXPERTS = {**MODEL, "num_experts": 4, "experts_per_token": 2, "expert_every": 2}
LAYOUTS = {
    "data": (MODEL, {"mesh": {"data": 8}}),
    "pipe data": (MODEL, {"mesh": {"pipe": 2, "data": 4}}),
    "interleaved pipe data": (MODEL, {"mesh": {"pipe": 2, "data": 4}, "pipeline": {"virtual_stages": 2}}),
    "tensor data": (MODEL, {"mesh": {"tensor": 2, "data": 4}}),
    "context data": (MODEL, {"mesh": {"context": 2, "data": 4}}),
    "expert data": (EXPERTS, {"mesh": {"expert": 2, "data": 4}}),
    "fsdp data": (MODEL, {"mesh": {"fsdp": 2, "data": 4}}),
    "pipe data tensor": (MODEL, {"mesh": {"pipe": 2, "data": 2, "tensor": 2}}),
    "pipe context tensor": (MODEL, {"mesh": {"pipe": 2, "context": 2, "tensor": 2}}),
    "pipe expert tensor": (EXPERTS, {"mesh": {"pipe": 2, "expert": 2, "tensor": 2}}),
    "data expert context": (EXPERTS, {"mesh": {"data": 2, "expert": 2, "context": 2}}),
}


def pieces(leaf: jax.ShapeDtypeStruct) -> int:
    """Into how many pieces an array is cut."""
    return math.prod(leaf.shape) // math.prod(leaf.sharding.shard_shape(leaf.shape))


@pytest.mark.parametrize("zero", [0, 1, 2])
@pytest.mark.parametrize("name", list(LAYOUTS))
def test_moments_of_matrices_are_split_over_all_devices(name, zero):
    model, sections = LAYOUTS[name]
    setup = make_setup(model, **sections, rules={"zero": zero})
    sizes = axis_sizes(setup.mesh)
    state = setup.abstract_state
    placements = jax.tree.leaves(setup.placements)
    axes = jax.tree.leaves(setup.definition.whole.axes, is_leaf=lambda node: isinstance(node, tuple))
    num_matrices = 0
    for moments in (state["optimizer"][1].mu, state["optimizer"][1].nu):
        for leaf, param, placement, names in zip(
            jax.tree.leaves(moments), jax.tree.leaves(state["params"]), placements, axes, strict=True
        ):
            if not placement.is_matrix:
                continue
            num_matrices += 1
            # What computes with the matrix holds it whole along these axes: ends of the model are on every stage, and
            # a tensor's shards may each need all of a matrix (a router).
            elsewhere = math.prod(
                sizes[axis]
                for axis, logical in (("pipe", "layers"), ("tensor", ("vocab", "heads", "kv_heads", "mlp")))
                if not any(given in logical for given in names)
            )
            if zero > 0:
                assert pieces(leaf) == setup.mesh.size // elsewhere, names
            else:
                assert pieces(leaf) == pieces(param) <= setup.mesh.size // sizes["data"], names
            if zero == 2:
                assert leaf.sharding == param.sharding, names
    assert num_matrices >= 2 * 8
