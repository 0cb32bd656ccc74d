"""Compiled steps that no compiler has seen: small programs written by hand, on real cases."""

from __future__ import annotations

import math
from typing import Any

from tiny import GPT, make_run

from mtx.planning.case import Case, Cluster
from mtx.planning.dissection import Dissection
from mtx.planning.hardware import GPUS
from mtx.planning.rehearsal import Compiled

# One collective in a loop of 5 turns, one outside of it.
PROGRAM = """\
HloModule jit_step, is_scheduled=true

FileNames
1 "/somewhere/site-packages/mtx/nn/linear.py"

FunctionNames
1 "multiply"

FileLocations
1 {{file_name_id=1 function_name_id=1 line=40 end_line=40 column=0 end_column=0}}

StackFrames
7 {{file_location_id=1 parent_frame_id=7}}

%add (a: f32[], b: f32[]) -> f32[] {{
  %a = f32[] parameter(0)
  %b = f32[] parameter(1)
  ROOT %sum = f32[] add(%a, %b)
}}

%body (p: (s32[], {shape})) -> (s32[], {shape}) {{
  %p = (s32[], {shape}) parameter(0)
  %i = s32[] get-tuple-element(%p), index=0
  %x = {shape} get-tuple-element(%p), index=1
  %inside = {shape} {inside}(%x), channel_id=1, replica_groups={groups}, to_apply=%add, metadata={{op_name="jit(step)/while/body/dot_general" stack_frame_id=7}}
  ROOT %out = (s32[], {shape}) tuple(%i, %inside)
}}

%condition (q: (s32[], {shape})) -> pred[] {{
  %q = (s32[], {shape}) parameter(0)
  ROOT %true = pred[] constant(true)
}}

ENTRY %main (y: {shape}) -> {shape} {{
  %y = {shape} parameter(0)
  %zero = s32[] constant(0)
  %start = (s32[], {shape}) tuple(%zero, %y)
  %loop = (s32[], {shape}) while(%start), condition=%condition, body=%body, backend_config={{"known_trip_count":{{"n":"5"}}}}
  %z = {shape} get-tuple-element(%loop), index=1
  ROOT %outside = {shape} {outside}(%z), channel_id=2, replica_groups={groups}, to_apply=%add
}}
"""  # noqa: E501
BUFFERS = """\
BufferAssignment:
allocation 0: size 1024, parameter 0, shape |f32[256]| at ShapeIndex {{}}:
 value: <1 y @0> (size=1024,offset=0): f32[256]{{0}}
allocation 1: size {size}, preallocated-temp:
 value: <2 inside @0> (size={size},offset=0): {buffer}{{0}}
 value: <3 z @0> (size=512,offset=0): f32[128]{{0}}
"""


def make_case(model: dict[str, Any] | None = None, gpu: str = "H100", domain: int | None = None, **sections) -> Case:
    """A tiny run, on as many GPUs as its mesh has."""
    train = {"global_batch_size": 8, "microbatch_size": 1, **sections.pop("train", {})}
    run = make_run({**GPT, **(model or {})}, train=train, **sections)
    return Case.of(run, Cluster.of(GPUS[gpu], math.prod(sections["mesh"].values()), domain=domain))


def make_step(
    case: Case,
    *,
    shape: str = "f32[8]",
    inside: str = "negate",
    outside: str = "negate",
    groups: str = "{}",
    buffer: str = "f32[256]",
    size: int = 1024,
    **figures: Any,
) -> Dissection:
    """What is compiled keeps to the plan, where nothing else is said."""
    program = PROGRAM.format(shape=shape, inside=inside, outside=outside, groups=groups)
    planned = Dissection(case, Compiled(program, "", "", 0, 0, 0, 0, 0, 0, 0.0, 0.0, "0", 0))
    state, compiled = planned.memory.state, planned.memory.compiled
    usual = {
        "log": "", "argument_bytes": state + planned.batch_bytes, "output_bytes": state, "alias_bytes": state,
        "temp_bytes": compiled - state, "code_bytes": 0, "peak_bytes": compiled, "lower_seconds": 1.0,
        "compile_seconds": 2.0, "jax": "0.10.2", "memory_of_compiler_bytes": 2**29,
    }  # fmt: skip
    return Dissection(case, Compiled(program, BUFFERS.format(buffer=buffer, size=size), **{**usual, **figures}))
