"""A case derives from a run and a mesh what the training state derives: the same shapes, shards and stages."""

import dataclasses
import math

import jax
import pytest
from jax.sharding import AbstractMesh
from tiny import GPT, LLAMA, make_run

from mtx.config import schema
from mtx.errors import UserError
from mtx.optim.adafactor import Adafactor
from mtx.optim.lion import Lion
from mtx.optim.muon import Muon
from mtx.planning.case import Case, Cluster, declare
from mtx.planning.hardware import GPUS
from mtx.planning.search import search_layouts
from mtx.training.state import Setup

EXPERTS = {**LLAMA, "num_layers": 5, "num_experts": 4, "experts_per_token": 2, "first_dense_layers": 1}
LAYOUTS = [{"data": 4}, {"fsdp": 2, "tensor": 2}, {"pipe": 2, "data": 2}, {"context": 2, "expert": 2}]


def plan_case(model, mesh, **sections):
    train = {"global_batch_size": 8, "microbatch_size": 1, **sections.pop("train", {})}
    run = make_run(model, mesh=mesh, train=train, **sections)
    return Case.of(run, Cluster.of(GPUS["H100"], math.prod(mesh.values())), check=False)


def set_up(case):
    """The training state's own derivations, on a mesh without devices."""
    return Setup(case.run, AbstractMesh(tuple(case.sizes.values()), tuple(case.sizes)))


def flatten(tree, path=()):
    for name, value in tree.items():
        yield from flatten(value, (*path, name)) if isinstance(value, dict) else [((*path, name), value)]


@pytest.mark.parametrize("zero", [0, 2])
@pytest.mark.parametrize("mesh", LAYOUTS, ids=str)
@pytest.mark.parametrize("model", [GPT, EXPERTS], ids=["gpt", "experts"])
def test_what_is_placed_is_what_the_training_state_places(model, mesh, zero):
    case = plan_case(model, mesh, rules={"zero": zero})
    setup = set_up(case)
    assert {parameter.path: placement for parameter, _, placement in case.placed} == dict(flatten(setup.placements))
    shapes = {path: leaf.shape for path, leaf in flatten(setup.abstract_stacks)}
    assert {parameter.path: shape for parameter, shape, _ in case.placed} == shapes


@pytest.mark.parametrize("mesh", LAYOUTS, ids=str)
def test_local_sizes_are_those_of_the_shardings(mesh):
    case = plan_case(EXPERTS, mesh)
    arrays = dict(flatten(set_up(case).abstract_state["params"]))
    for parameter, shape, placement in case.placed:
        leaf = arrays[parameter.path]
        assert case.local_size(shape, placement.storage) == math.prod(leaf.sharding.shard_shape(leaf.shape))


@pytest.mark.parametrize("optimizer", [None, Adafactor(), Lion(), Muon()], ids=lambda o: type(o).__name__)
def test_moments_are_all_that_the_optimizer_keeps(optimizer):
    train = {} if optimizer is None else {"optimizer": optimizer}
    case = plan_case(LLAMA, {"data": 1}, train=train)
    declared = declare(case.run)
    moments = sum(math.prod(shape) * size for p in declared.parameters for shape, size in p.moments)
    others = sum(math.prod(shape) * size for shape, size in declared.others)
    state = jax.tree.leaves(set_up(case).abstract_state["optimizer"])
    assert moments + others == sum(leaf.size * leaf.dtype.itemsize for leaf in state)


def test_stages_and_slots_are_those_of_the_pipeline():
    case = plan_case({**GPT, "num_layers": 7}, {"pipe": 2}, pipeline={"virtual_stages": 2})
    stages = set_up(case).stages
    assert case.stages.layers.tolist() == stages.layers.tolist()
    assert case.slots == stages.slots * 2


def test_batches_are_cut_as_the_step_cuts_them():
    case = plan_case(GPT, {"data": 2, "fsdp": 2}, train={"global_batch_size": 48, "microbatch_size": 3})
    assert (case.shards("batch"), case.microbatch_size, case.num_microbatches) == (4, 3, 4)
    whole = plan_case(GPT, {"data": 2}, train={"global_batch_size": 48, "microbatch_size": None})
    assert (whole.microbatch_size, whole.num_microbatches) == (24, 1)
    piped = plan_case(GPT, {"pipe": 2, "data": 2}, train={"global_batch_size": 48, "microbatch_size": None})
    assert (piped.microbatch_size, piped.num_microbatches) == (1, 24)


def test_the_rest_of_the_gpus_goes_where_the_mesh_says():
    run = make_run(GPT, mesh={"data": -1, "tensor": 2}, train={"global_batch_size": 8})
    assert Case.of(run, Cluster.of(GPUS["A100-80"], 8)).sizes["data"] == 4


def test_a_layout_that_the_run_does_not_fit_is_refused():
    run = make_run(GPT, mesh={"tensor": 8})
    with pytest.raises(UserError, match="num_heads"):
        Case.of(run, Cluster.of(GPUS["H100"], 8))


def test_a_cluster_is_the_usual_system_unless_told():
    gpu = GPUS["H100"]
    assert Cluster.of(gpu, 16).domain == 8
    told = Cluster.of(gpu, 16, domain=4, nic_bandwidth=1e9)
    assert dataclasses.astuple(told)[1:] == (16, 4, 1e9)
    assert schema.Cluster().gpus_per_host == 8


def test_a_gpu_without_8_bit_products_is_refused():
    run = make_run(LLAMA, precision={"compute": "float8"})
    for gpu in ("H100", "B200"):
        Case.of(run, Cluster.of(GPUS[gpu], 1))
    for plan in (Case.of, search_layouts):
        with pytest.raises(UserError, match="A100-80 has no products of 8-bit numbers"):
            plan(run, Cluster.of(GPUS["A100-80"], 1))
