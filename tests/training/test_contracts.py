"""What a layout costs is what its compiled step exchanges and multiplies: nothing more, and nothing more often."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from contracts import (
    CASES,
    classify,
    compile_aloud,
    compile_step,
    expected_bytes,
    forward_flops,
    head_rows,
    local_shape,
    measured_bytes,
    parameters,
    shard_bytes,
    work_of,
)
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from mtx.planning.hlo_collectives import find_whole_gathers
from mtx.planning.hlo_products import count_flops
from mtx.sharding import axis_sizes, mesh_axes

QUICK = ("tensor4 data2", "pipe2 selective")
REMATERIALIZED = "nvoluntary full rematerialization"


def layouts(*words: str) -> list:
    """Those with one of these words in their names; all without words. Only a few compile in seconds."""
    names = [name for name in CASES if not words or set(words) & set(name.split())]
    return [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in names]


@pytest.mark.parametrize("name", layouts())
def test_exchanges_are_those_of_hand_arithmetic(name):
    """Every byte by kind and axes: ZeRO once a step, layers, microbatches, stages. Kinds that no sum foresees fail."""
    step = compile_step(name)
    assert measured_bytes(step.collectives) == expected_bytes(step)


@pytest.mark.parametrize("name", layouts())
def test_only_what_belongs_to_a_microbatch_is_in_a_loop(name):
    """Gradients are reduced over data, stages and experts once a step; ZeRO-2 gathers once a step."""
    step = compile_step(name)
    in_loops = {(c.kind, c.axes) for c in step.collectives if c.looped and max(s.size for s in c.results) > 1}
    allowed = {
        *((kind, ("tensor",)) for kind in ("all-gather", "reduce-scatter", "all-reduce")),  # activations
        *((kind, ("fsdp",)) for kind in ("all-gather", "reduce-scatter")),  # ZeRO-3
        *(("collective-permute", (axis,)) for axis in ("pipe", "context")),
        ("all-to-all", ("expert",)),
    }
    if step.setup.stages is not None and step.setup.run.pipeline.head == "sharded":
        sums = [c for c in step.collectives if c.looped and c.axes == ("pipe",) and c.kind == "all-reduce"]
        activations = [c.executions for c in sums for shape in c.results if len(shape.dims) == 3]
        assert sum(activations) == 2 * work_of(step).head  # the output of the last stage, the gradient by it
        tensor = axis_sizes(step.setup.mesh)["tensor"] > 1
        allowed |= {("all-reduce", ("pipe",)), ("all-reduce", ("pipe", "tensor") if tensor else ("pipe",))}
    assert in_loops <= allowed
    assert not any(c.estimated for c in step.collectives)


@pytest.mark.parametrize("name", layouts())
def test_no_parameter_is_whole_where_the_rules_shard_it(name):
    """Neither where a layer is split to be computed, nor, of ZeRO-3, more than a layer at a time."""
    step = compile_step(name)
    for path, shape, placement in parameters(step.setup):
        if not placement.is_matrix:
            continue
        is_stack = "layers/" in path
        split = {*mesh_axes(placement.compute), *placement.layer_axes}
        along = [c for c in step.collectives if split & {*c.axes}]
        whole = find_whole_gathers(along, [shape[is_stack:]])
        if placement.layer_axes and is_stack:
            assert whole, path
            assert all(c.looped and c.kind == "all-gather" for c in whole), path
            assert find_whole_gathers(along, [shape]) == [], path
        elif not placement.layer_axes:
            assert whole == [], path


@pytest.mark.parametrize("name", layouts())
def test_nothing_is_exchanged_along_an_axis_of_one_device(name):
    step = compile_step(name)
    assert all(c.group_size > 1 and c.axes for c in step.collectives)
    assert bool(step.collectives) == (name != "one")


@pytest.mark.parametrize("name", layouts())
def test_the_state_is_as_large_as_its_shards_and_is_given_back(name):
    step = compile_step(name)
    assert step.memory.argument_size_in_bytes == step.argument_bytes
    state = sum(shard_bytes(leaf) for leaf in jax.tree.leaves(step.setup.abstract_state))
    assert step.memory.alias_size_in_bytes == state


@pytest.mark.parametrize("name", layouts())
def test_no_array_is_rematerialized_by_the_partitioner(name):
    assert REMATERIALIZED not in compile_step(name).log


@pytest.mark.parametrize("name", layouts("pipe2", "pipe4"))
def test_stages_pass_on_shards_of_the_sequence_once_a_tick(name):
    step = compile_step(name)
    work, sizes, run = work_of(step), axis_sizes(step.setup.mesh), step.setup.run
    sent = [c for c in step.collectives if c.axes == ("pipe",) and c.kind == "collective-permute"]
    # What a last tick sends is for nobody, and is not sent if that tick is no loop.
    ticks = work.forward + work.backward - (work.backward - work.head == 1)
    assert sum(c.executions for c in sent) == ticks
    shard = (1, run.train.seq_len // sizes["tensor"], run.model.d_model)
    assert {shape.dims for c in sent for shape in c.results} == {shard}


@pytest.mark.parametrize("name", layouts("pipe2", "pipe4"))
def test_the_gradient_of_each_table_is_summed_over_stages_once(name):
    step = compile_step(name)
    tables = [(shape, p) for path, shape, p in parameters(step.setup) if "layers/" not in path and p.is_matrix]
    shards = [math.prod(local_shape(step.setup, shape, placement.storage)) for shape, placement in tables]
    sums = [c for c in step.collectives if c.kind == "all-reduce" and "pipe" in c.axes and not c.looped]
    assert all(c.executions == 1 for c in sums)
    found = sorted(shape.size for c in sums for shape in c.results if len(shape.dims) == 2)
    assert found == sorted(shards)


@pytest.mark.parametrize("name", layouts("pipe2", "pipe4"))
def test_only_a_head_that_is_not_needed_everywhere_at_every_tick_takes_a_branch(name):
    step = compile_step(name)
    pipeline = step.setup.run.pipeline
    assert bool(step.program.conditionals()) == (pipeline.head == "last" or pipeline.virtual_stages > 1)


@pytest.mark.parametrize("name", [p for p in layouts() if p not in ("one",) and "expert2" not in str(p)])
def test_layers_are_multiplied_as_often_as_the_schedule_and_recompute_say(name):
    """Matrices of layers and attention, relative to a forward pass and a backward pass of twice its cost, in as many
    ticks as the schedule has: the bubble is no excess. (Sums of biases' gradients are not counted, nor the head.)"""
    step = compile_step(name)
    work, forward, recompute = work_of(step), forward_flops(step), step.setup.run.train.recompute
    flops = count_flops(step.products, lambda product: classify(step, product))
    assert set(flops) <= {"weights", "attention", "head", "bias"}
    once = work.layers * work.forward
    # The product that nobody needs again is the last one: of each layer, or of a stage whose layers run in one go.
    dead = (1 if step.setup.stages else work.layers) * work.backward * forward["last"]
    again = once * forward["weights"] - dead if recompute == "full" else 0
    assert flops["weights"] == 3 * once * forward["weights"] + again
    # Attention computes its scores again wherever they are not kept, and all of it under `full` and `selective`.
    kept = recompute == "none" and step.setup.stages is None and not step.setup.context.comm.axes("seq")
    ring = 0.5 if step.setup.context.comm.axes("seq") else 0
    most = {"none": 3 if kept else 3.5, "selective": 4 + ring, "full": 4 + ring}[recompute]
    assert flops["attention"] <= most * once * forward["attention"]
    if step.setup.run.model.d_model == 128:  # rows are short against it, as in large models
        ratio = (flops["weights"] + flops["attention"]) / (3 * once * (forward["weights"] + forward["attention"]))
        assert ratio <= (1.30 if recompute == "full" else 1.01)


@pytest.mark.parametrize("name", [p for p in layouts() if "expert2" not in str(p)])
def test_stages_share_the_head(name):
    """Each stage multiplies with 1 / stages of the rows that a device has, and only in ticks that have an output."""
    step = compile_step(name)
    setup, sizes = step.setup, axis_sizes(step.setup.mesh)
    rows = setup.run.model.vocab_size / math.prod(sizes[axis] for axis in setup.rules["vocab"])
    stages = sizes["pipe"] if setup.run.pipeline.head == "sharded" else 1
    assert head_rows(setup) == rows / stages
    tokens = setup.run.train.seq_len // sizes["context"]
    flops = count_flops(step.products, lambda product: classify(step, product))
    assert flops["head"] == 3 * 2 * tokens * setup.run.model.d_model * head_rows(setup) * work_of(step).head


@pytest.mark.slow
@pytest.mark.parametrize("name", ["pipe2 selective", "pipe2 full", "pipe2 gated none", "pipe2 v2 selective"])
def test_memory_is_flat_in_the_number_of_microbatches(name):
    few, many = (compile_step(name, microbatches).memory.temp_size_in_bytes for microbatches in (8, 64))
    assert many <= 1.05 * few


def test_a_contract_can_be_broken():
    """The log does tell of a rematerialization, and a gather of a sharded parameter is found."""
    mesh = Mesh(np.array(jax.devices()[:8]).reshape(2, 4), ("data", "tensor"), axis_types=(AxisType.Auto,) * 2)

    def constrain(x, *spec):
        return jax.lax.with_sharding_constraint(x, NamedSharding(mesh, P(*spec)))

    def twist(x):
        return constrain(jnp.sin(constrain(x, "data", "tensor", None)), None, None, ("tensor", "data")) + 1

    _, log = compile_aloud(jax.jit(twist).lower(jax.ShapeDtypeStruct((8, 8, 8), jnp.float32)))
    assert REMATERIALIZED in log
    step = compile_step("tensor4 data2")
    gathered = [shape.dims for c in step.collectives if c.kind == "all-gather" for shape in c.results]
    assert find_whole_gathers(step.collectives, gathered[:1])
