"""Figures of a compiled step: what is counted, loops that learn their turns late, and what buffers are named after."""

import dataclasses
import math

import jax
import numpy as np
import pytest
from rehearsals import make_case, make_step
from tiny import GPT, SEQ_LEN, make_setup

from mtx.config import schema
from mtx.data.ramp import BatchSizes
from mtx.planning.case import Case, Cluster
from mtx.planning.dissection import count_turns
from mtx.planning.hardware import GPUS
from mtx.planning.hlo import Shape, read_program
from mtx.planning.hlo_products import AttentionCall, read_attention
from mtx.training.inputs import describe_train_batch, make_train_batch
from mtx.training.state import Setup

KERNEL = """\
ENTRY %main (q: bf16[2,64,8,32]) -> bf16[2,8,64,32] {{
  %q = bf16[2,64,8,32]{{3,2,1,0}} parameter(0)
  ROOT %out = (bf16[2,8,64,32]{{3,1,2,0}}, u8[0]{{0}}) custom-call(%q, %q, %q), \
custom_call_target="__cudnn$fmha{name}", \
backend_config={{"cudnn_fmha_backend_config": {{"intermediate_tensor_shape": {{"element_type": "BF16", "dimensions": \
["2", "8", "64", "128"]}}}}}}
}}
"""


@pytest.mark.parametrize(("name", "is_backward", "products"), [("Softmax", False, 2), ("SoftmaxBackward", True, 5)])
def test_attention_kernels_are_counted_by_shape(name, is_backward, products):
    (call,) = read_attention(read_program(KERNEL.format(name=name)))
    assert call == AttentionCall(16, 64, 128, 32, is_backward, 1)
    assert call.flops == products * 2 * 16 * 64 * 128 * 32


def test_other_calls_are_no_attention():
    assert read_attention(read_program(KERNEL.format(name="Softmax").replace("__cudnn$fmha", "__cublas$"))) == []


@pytest.mark.parametrize(
    ("mesh", "expected"),
    [({"data": 4}, [8]), ({"pipe": 2, "data": 2}, [16, 1]), ({"pipe": 4}, [32, 3])],
    ids=["in turn", "2 stages", "4 stages"],
)
def test_loops_over_microbatches_turn_as_often_as_the_full_batch_needs(mesh, expected):
    case = make_case({"num_layers": 4}, mesh=mesh, train={"global_batch_size": 32})
    program = read_program(make_step(case).compiled.program)
    (loop,) = [line for _, line in program.find("while")]
    turns = count_turns(case)
    assert [turns(loop) for _ in expected] == expected


def test_loops_over_experts_rows_are_told_from_those_over_microbatches():
    """Where layers are no loop, the experts' is in none either."""
    case = make_case({"num_experts": 4, "experts_per_token": 1}, mesh={"expert": 2})
    program = read_program(make_step(case).compiled.program)
    (loop,) = [line for _, line in program.find("while")]
    apart = dataclasses.replace(loop, shapes=(Shape("bf16", (18, 8, 64)),))
    assert count_turns(case)(apart) == 2 + (18 - 2) // 2


def test_the_source_of_a_buffer_is_that_of_its_largest_value():
    step = make_step(make_case(mesh={"data": 4}), buffer="f32[256]", size=4096)
    first, second = step.buffers
    assert (first.size_bytes, first.is_argument, first.source) == (4096, False, "mtx/nn/linear.py:40")
    assert first.origin == "jit(step)/while/body/dot_general"
    assert (second.size_bytes, second.is_argument, second.source) == (1024, True, "")


def test_the_loop_is_weighted_and_links_are_named():
    shape = {"shape": "f32[1024]", "groups": "{{0,1},{2,3}}"}
    step = make_step(make_case(mesh={"data": 2, "tensor": 2}, domain=2), inside="all-reduce", **shape)
    (exchange,) = step.exchanges
    assert (exchange.kind, exchange.axes, exchange.count) == ("all-reduce", ("tensor",), 5)
    assert exchange.size_bytes == 5 * 4096
    assert not exchange.leaves_domain
    assert step.leaves_domain(("data",))


class Rows:
    """Zeros, as a store of windows or of packed documents gives them."""

    def __init__(self, packing):
        self.names = ("tokens", "segments", "positions") if packing == "documents" else ("tokens",)

    def read(self, step, rows):
        return {name: np.zeros((len(rows), SEQ_LEN + 1), np.int32) for name in self.names}


@pytest.mark.parametrize("packing", ["windows", "documents"])
@pytest.mark.parametrize("ramp", [None, schema.BatchRamp(start=4, increment=4, tokens=256)], ids=["fixed", "ramp"])
def test_a_described_batch_is_the_one_that_is_made(packing, ramp):
    train = {"batch_ramp": ramp, "microbatch_size": 1, "dropout": 0.1}
    setup = make_setup(GPT, mesh={"data": 2}, train=train)
    setup = Setup(dataclasses.replace(setup.run, data=schema.Data(packing=packing)), setup.mesh)
    sizes = BatchSizes(global_batch_size=8, seq_len=SEQ_LEN, ramp=ramp)
    made, described = make_train_batch(setup, Rows(packing), sizes, 0), describe_train_batch(setup)
    assert set(made) == set(described)
    for name, array in made.items():
        assert (array.shape, array.dtype) == (described[name].shape, described[name].dtype), name
        if isinstance(array, jax.Array):
            assert array.sharding.is_equivalent_to(described[name].sharding, array.ndim)
    case = Case.of(setup.run, Cluster.of(GPUS["H100"], 2))
    shards = [leaf.dtype.itemsize * math.prod(leaf.sharding.shard_shape(leaf.shape)) for leaf in described.values()]
    assert make_step(case).batch_bytes == sum(shards)
