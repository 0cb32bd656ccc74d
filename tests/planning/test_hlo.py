"""The reader of compiled programs: on text written by hand, and on programs whose contents are known."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from mtx.planning.hlo import Shape, read_program
from mtx.planning.hlo_collectives import find_whole_gathers, read_collectives
from mtx.planning.hlo_products import Product, count_flops, read_products

MESH = {"data": 2, "context": 1, "tensor": 4}

LOOPS = """\
HloModule jit_step, is_scheduled=true, entry_computation_layout={(f32[8,4]{1,0})->f32[8,4]{1,0}}

%add (a: f32[], b: f32[]) -> f32[] {
  %a = f32[] parameter(0)
  %b = f32[] parameter(1)
  ROOT %sum = f32[] add(%a, %b), metadata={op_name="jit(step)/add (in words)"}
}

%inner_body (p: (s32[], f32[8,4])) -> (s32[], f32[8,4]) {
  %p = (s32[], f32[8,4]{1,0}) parameter(0)
  %i = s32[] get-tuple-element(%p), index=0
  %one = s32[] constant(1)
  %next = s32[] add(%i, %one)
  %x = f32[8,4]{1,0:T(8,128)} get-tuple-element(%p), index=1
  %reduced = f32[8,4]{1,0} all-reduce(%x), channel_id=1, replica_groups={{0,4},{1,5},{2,6},{3,7}}, to_apply=%add
  ROOT %out = (s32[], f32[8,4]{1,0}) tuple(%next, %reduced)
}

%inner_condition (q: (s32[], f32[8,4])) -> pred[] {
  %q = (s32[], f32[8,4]{1,0}) parameter(0)
  %limit = s32[] constant(7)
  %j = s32[] get-tuple-element(%q), index=0
  ROOT %less = pred[] compare(%j, %limit), direction=LT
}

%outer_body (r: (s32[], f32[8,4])) -> (s32[], f32[8,4]) {
  %r = (s32[], f32[8,4]{1,0}) parameter(0)
  %count = s32[] get-tuple-element(%r), index=0
  %y = f32[8,4]{1,0} get-tuple-element(%r), index=1
  %two = s32[] constant(2)
  %start = (s32[], f32[8,4]{1,0}) tuple(%two, %y)
  %inner = (s32[], f32[8,4]{1,0}) while(%start), condition=%inner_condition, body=%inner_body
  %z = f32[8,4]{1,0} get-tuple-element(%inner), index=1
  %sent = f32[8,4]{1,0} collective-permute(%z), channel_id=2, source_target_pairs={{0,1},{1,2},{2,3},{3,0}}
  ROOT %again = (s32[], f32[8,4]{1,0}) tuple(%count, %sent)
}

%outer_condition (s: (s32[], f32[8,4])) -> pred[] {
  %s = (s32[], f32[8,4]{1,0}) parameter(0)
  ROOT %true = pred[] constant(true)
}

%branch_a (t: f32[8,4]) -> f32[8,4] {
  ROOT %t = f32[8,4]{1,0} parameter(0)
}

%branch_b (u: f32[8,4]) -> f32[8,4] {
  %u = f32[8,4]{1,0} parameter(0)
  ROOT %swapped = f32[8,4]{1,0} all-to-all(%u), channel_id=3, replica_groups=[2,4]<=[8], dimensions={0}
}

%unused (v: f32[8,4]) -> f32[8,4] {
  %v = f32[8,4]{1,0} parameter(0)
  ROOT %never = f32[8,4]{1,0} all-to-all(%v), channel_id=9, replica_groups=[2,4]<=[8], dimensions={0}
}

ENTRY %main (x.1: f32[8,4], which: s32[]) -> f32[8,4] {
  %x.1 = f32[8,4]{1,0} parameter(0)
  %which = s32[] parameter(1)
  %zero = s32[] constant(0)
  %begin = (s32[], f32[8,4]{1,0}) tuple(%zero, %x.1)
  %outer = (s32[], f32[8,4]{1,0}) while(%begin), condition=%outer_condition, body=%outer_body, \
backend_config={"known_trip_count":{"n":"3"}}
  %w = f32[8,4]{1,0} get-tuple-element(%outer), index=1
  ROOT %chosen = f32[8,4]{1,0} conditional(%which, %w, %w), branch_computations={%branch_a, %branch_b}
}
"""


def test_loops_within_loops_multiply_and_branches_are_marked():
    program = read_program(LOOPS)
    reduce, permute, swap = read_collectives(program, MESH)
    assert (reduce.kind, reduce.axes, reduce.group_size) == ("all-reduce", ("data",), 2)
    assert (reduce.executions, reduce.looped, reduce.conditional) == (3 * (7 - 2), True, False)
    assert (permute.kind, permute.axes, permute.executions) == ("collective-permute", ("tensor",), 3)
    assert (swap.kind, swap.axes, swap.executions) == ("all-to-all", ("tensor",), 1)
    assert (swap.looped, swap.conditional) == (False, True)
    assert [(line.name, times) for line, times in program.conditionals()] == [("chosen", 1)]
    assert {c.size_bytes for c in (reduce, permute, swap)} == {128}


def test_a_loop_of_unknown_length_is_not_guessed():
    text = LOOPS.replace('"known_trip_count":{"n":"3"}', "")
    with pytest.raises(ValueError, match="the loop outer turn"):
        read_program(text)
    reduce, permute, swap = read_collectives(read_program(text, unknown_turns=2), MESH)
    assert (reduce.executions, permute.executions, swap.executions) == (10, 2, 1)
    assert (reduce.estimated, permute.estimated, swap.estimated) == (True, True, False)
    with pytest.raises(ValueError, match="the loop inner turn"):  # it counts by twos
        read_program(LOOPS.replace("%one = s32[] constant(1)", "%one = s32[] constant(2)"))


def test_what_is_no_program_is_refused():
    with pytest.raises(ValueError, match="no entry computation"):
        read_program("module @jit_step {}")
    with pytest.raises(ValueError, match="calls elsewhere"):
        read_program(one_line("%r = f32[8,4]{1,0} call(%x), to_apply=%elsewhere"))


def one_line(line: str, operand: str = "f32[8,4]{1,0}") -> str:
    return (
        f"HloModule m\n\nENTRY %main (x: f32[8,4]) -> f32[8,4] {{\n  %x = {operand} parameter(0)\n  ROOT {line}\n}}\n"
    )


@pytest.mark.parametrize(
    ("groups", "axes"),
    [
        ("{{0,1,2,3},{4,5,6,7}}", ("tensor",)),
        ("{{0,4},{1,5},{2,6},{3,7}}", ("data",)),
        ("{{0,1,2,3,4,5,6,7}}", ("data", "tensor")),
        ("{}", ("data", "tensor")),
        ("{{0},{1},{2},{3},{4},{5},{6},{7}}", ()),
        ("[2,4]<=[8]", ("tensor",)),
        ("[4,2]<=[2,4]T(1,0)", ("data",)),
        ("[1,8]<=[8]", ("data", "tensor")),
        ("mesh['data'=2,'context'=1,'tensor'=4] {'tensor'}", ("tensor",)),
        ("mesh['data'=2,'context'=1,'tensor'=4] {'tensor','data'}", ("data", "tensor")),
        ("mesh['axis_0'=2,'axis_1'=4] {'axis_0'}", ("data",)),
        ("mesh['axis_0'=4,'axis_1'=2], device_ids=([2,4]T(1,0)) {'axis_0'}", ("tensor",)),
    ],
)
def test_groups_are_axes_of_the_mesh(groups, axes):
    text = one_line(f"%r = f32[8,4]{{1,0}} all-reduce(%x), channel_id=1, replica_groups={groups}")
    (found,) = read_collectives(read_program(text), MESH)
    assert (found.axes, found.group_size) == (axes, {(): 1, ("data",): 2, ("tensor",): 4}.get(axes, 8))


@pytest.mark.parametrize(
    "groups", ["{{0,1},{2,3},{4,5},{6,7}}", "[2,4]<=[4,2]T(1,0)", "{{0,1,2,3}}", "mesh['a'=8] {'a':(1)2}"]
)
def test_other_groups_are_refused(groups):
    text = one_line(f"%r = f32[8,4]{{1,0}} all-reduce(%x), channel_id=1, replica_groups={groups}")
    with pytest.raises(ValueError, match="groups"):
        read_collectives(read_program(text), MESH)


@pytest.mark.parametrize(
    ("line", "kind", "size_bytes"),
    [
        ("%s = (f32[8,4]{1,0}, f32[32,4]{1,0}) all-gather-start(%x), replica_groups=[2,4]<=[8]", "all-gather", 512),
        ("%s = f32[8,4]{1,0} all-reduce-start(%x), replica_groups=[2,4]<=[8]", "all-reduce", 128),
        ("%s = f32[2,4]{1,0} reduce-scatter(%x), replica_groups=[2,4]<=[8]", "reduce-scatter", 128),
        (
            "%s = (f32[8,4]{1,0}, f32[8,4]{1,0}, u32[], u32[]) collective-permute-start(%x), "
            "source_target_pairs={{0,4},{4,0}}",
            "collective-permute",
            128,
        ),
    ],
)
def test_what_has_started_counts_once(line, kind, size_bytes):
    (found,) = read_collectives(read_program(one_line(line)), MESH)
    assert (found.kind, found.size_bytes) == (kind, size_bytes)


@pytest.mark.parametrize(
    ("dtype", "size_bytes"), [("f32", 12), ("bf16", 6), ("pred", 3), ("f8e4m3fn", 3), ("s4", 2), ("c64", 24)]
)
def test_sizes(dtype, size_bytes):
    assert Shape(dtype, (3,)).size_bytes == size_bytes


@pytest.mark.parametrize(
    "line",
    [
        "%d = f32[8,5]{1,0} dot(%x, %x), lhs_contracting_dims={1}, rhs_contracting_dims={0}",
        '%d = (f32[8,5]{1,0}, s8[64]{0}) custom-call(%x, %x), custom_call_target="__cublas$gemm", backend_config='
        '{"gemm_backend_config":{"dot_dimension_numbers":{"lhs_contracting_dimensions":["1"]}}}',
        '%d = f32[8,5]{1,0} custom-call(%x, %x), custom_call_target="__onednn$matmul", backend_config='
        '{"onednn_matmul_config":{"transpose_a":false}}',
    ],
)
def test_products_of_libraries_count_as_those_of_xla(line):
    text = one_line(line).replace("custom-call(%x, %x)", "custom-call(%x, %y)").replace("dot(%x, %x)", "dot(%x, %y)")
    text = text.replace("parameter(0)\n", "parameter(0)\n  %y = f32[4,5]{1,0} parameter(1)\n")
    assert read_products(read_program(text)) == [Product(batch=1, rows=8, contracted=4, columns=5, executions=1)]


def test_a_product_that_cannot_be_counted_is_no_zero():
    line = '%d = f32[8,4]{1,0} custom-call(%x, %x), custom_call_target="__new$matmul"'
    with pytest.raises(ValueError, match="over which dims"):
        read_products(read_program(one_line(line)))


@pytest.fixture(scope="module")
def compiled():
    """A loop of 5 x 3 products on a mesh, with a gather, a reduce-scatter and a batched product."""
    mesh = Mesh(np.array(jax.devices()[:8]).reshape(2, 1, 4), tuple(MESH), axis_types=(AxisType.Auto,) * 3)

    def body(w, x):
        def inner(x, _):
            return jnp.tanh(x @ lax.all_gather(w, "tensor", axis=0, tiled=True)), None

        def outer(x, _):
            x = lax.scan(inner, x, None, length=3)[0]
            return lax.pmean(x, "data"), None

        x = lax.scan(outer, x, None, length=5)[0]
        scores = jnp.einsum("nqh,nkh->nqk", x.reshape(4, 8, -1), x.reshape(4, 8, -1))
        return lax.psum_scatter(scores, "tensor", scatter_dimension=0, tiled=True)

    step = jax.shard_map(body, mesh=mesh, in_specs=(P("tensor"), P()), out_specs=P("tensor"), check_vma=False)
    weights = jax.ShapeDtypeStruct((64, 64), jnp.float32, sharding=NamedSharding(mesh, P("tensor")))
    return read_program(jax.jit(step).lower(weights, jnp.zeros((32, 64))).compile().as_text())


def test_a_compiled_program_holds_what_was_written(compiled):
    collectives = read_collectives(compiled, MESH)
    scatter = next(c for c in collectives if c.kind == "reduce-scatter")
    assert (scatter.axes, scatter.executions, scatter.size_bytes) == (("tensor",), 1, 4 * 4 * 8 * 8)
    mean = next(c for c in collectives if c.kind == "all-reduce")
    assert (mean.axes, mean.executions, mean.size_bytes) == (("data",), 5, 4 * 32 * 64)
    (gather,) = (c for c in collectives if c.kind == "all-gather")
    assert (gather.axes, gather.group_size, gather.results) == (("tensor",), 4, (Shape("f32", (64, 64)),))
    assert find_whole_gathers(collectives, [(1, 64, 64)]) == [gather]
    assert find_whole_gathers(collectives, [(16, 64)]) == []


def test_products_are_counted_with_their_loops(compiled):
    flops = count_flops(read_products(compiled), lambda product: "scores" if product.batch > 1 else "layers")
    assert flops == {"layers": 15 * 2 * 32 * 64 * 64, "scores": 2 * 4 * 8 * 8 * 64}
