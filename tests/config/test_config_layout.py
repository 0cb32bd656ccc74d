"""Which layouts are refused, why, and what is proposed instead."""

import dataclasses
import itertools
import math
import re
import time

import pytest

from mtx.config import fit, layout, reader, schema
from mtx.config.axes import MESH_AXES
from mtx.errors import UserError

TEXT = (
    "Model:\n  vocab_size = 100\n  d_model = 48\n  num_layers = 2\n  num_heads = 12\n  num_kv_heads = 4\n  d_ff = 96\n"
    "  max_seq_len = 64\n"
    "Train:\n  seq_len = 64\n  global_batch_size = 24\n  microbatch_size = 3\n  steps = 1\n"
)
RUN = reader.load_text(TEXT, "run.gin").run


def run_with(**sections):
    changed = {name: dataclasses.replace(getattr(RUN, name), **fields) for name, fields in sections.items()}
    return dataclasses.replace(RUN, **changed)


EXPERTS = {"num_experts": 4, "experts_per_token": 2}
LAYERS = {"num_layers": 30}
CHUNKS = {"virtual_stages": 2}


@pytest.mark.parametrize(
    ("sections", "mesh"),
    [
        ({}, {"data": 8}),
        ({}, {"data": 2, "fsdp": 4}),
        ({}, {"data": 2, "tensor": 4}),
        ({"train": {"seq_len": 48}}, {"tensor": 12}),  # 12 query heads; 4 key/value heads, each of three shards
        ({"model": {"num_layers": 7}}, {"pipe": 3, "data": 2, "tensor": 2}),  # uneven stages
        ({"model": {"num_layers": 7}, "pipeline": CHUNKS}, {"pipe": 2, "data": 2}),
        ({"pipeline": {"head": "last"}}, {"pipe": 2}),
        ({"train": {"microbatch_size": 24}}, {"pipe": 2}),  # all bubble, but it was asked for
        ({"train": {"microbatch_size": None}}, {}),
        ({}, {"context": 4, "tensor": 4}),
        ({"train": {"seq_len": 60}}, {"context": 15, "tensor": 4}),
        (
            {"train": {"context_exchange": "all_to_all", "attention": "cudnn", "seq_len": 48}},
            {"context": 3, "tensor": 4},
        ),
        ({"model": EXPERTS}, {"pipe": 2, "data": 2, "expert": 2, "context": 2, "tensor": 2}),
        ({"model": {**EXPERTS, "d_ff": 7, "expert_d_ff": 8}}, {"expert": 4, "tensor": 4}),
        ({"model": {"d_ff": 97}, "rules": {"overrides": {"vocab": None, "mlp": None}}}, {"tensor": 4}),
        ({"model": EXPERTS, "rules": {"overrides": {"experts": "data"}}}, {"data": 2}),
        ({"rules": {"overrides": {"batch": "data", "mlp": "fsdp", "embed": "tensor"}}}, {"fsdp": 2}),
        ({"rules": {"zero": 0}}, {}),
    ],
)  # fmt: skip
def test_layouts_that_fit(sections, mesh):
    layout.check_layout(run_with(**sections), schema.Mesh(**{"data": 1, **mesh}))


MISTAKES = [
    (
        {}, {"tensor": 6},
        "Model.num_kv_heads = 4 does not divide over Mesh.tensor = 6: set Model.num_kv_heads to 6, or Mesh.tensor"
        " to one of 1, 2, 4\n"
        "Train.seq_len = 64 does not divide over Mesh.tensor = 6: set Train.seq_len to 60 or 66, or Mesh.tensor "
        "to one of 1, 2, 4, 8, 16, 32, 64\n"
        "no layout of 6 devices passes with the other settings as they are",
    ),
    (
        {"model": {"num_kv_heads": 1, "d_ff": 90}}, {"tensor": 8},
        "Model.num_heads = 12 does not divide over Mesh.tensor = 8: set Model.num_heads to 8 or 16, or "
        "Mesh.tensor to one of 1, 2, 3, 4, 6, 12\n"
        "Model.d_ff = 90 does not divide over Mesh.tensor = 8: set Model.d_ff to 88 or 96, or Mesh.tensor to one "
        "of 1, 2, 3, 5, 6, 9, 10, 15, 18, 30, 45, 90\n"
        "the nearest layout of 8 devices that works with the other settings as they are: Mesh.data = 4, "
        "Mesh.tensor = 2",
    ),
    (
        {"rules": {"sequence_parallel": False, "overrides": {"kv_heads": None}}}, {"tensor": 6},
        "Model.num_kv_heads = 4 does not divide over Mesh.tensor = 6: set Model.num_kv_heads to 6, or Mesh.tensor"
        " to one of 1, 2, 4\n"
        "no layout of 6 devices passes with the other settings as they are",
    ),
    (
        {}, {"data": 3, "fsdp": 3},
        "Train.global_batch_size = 24 sequences do not divide over Mesh.data * Mesh.fsdp = 9 data shards: set "
        "Train.global_batch_size to 27, or Mesh.data * Mesh.fsdp to one of 1, 2, 3, 4, 6, 8, 12, 24\n"
        "no layout of 9 devices passes with the other settings as they are",
    ),
    (
        {}, {"data": 4, "fsdp": 3},
        "Train.global_batch_size = 24 gives each of 12 data shards (Mesh.data * Mesh.fsdp) 2 sequences, which "
        "Train.microbatch_size = 3 does not divide: set Train.microbatch_size to one of 1, 2, or "
        "Train.global_batch_size to 36\n"
        "no layout of 12 devices passes with the other settings as they are",
    ),
    (
        {"train": {"batch_ramp": schema.BatchRamp(start=6, increment=9, tokens=10)}}, {"data": 2},
        "BatchRamp.increment = 9 sequences do not divide over Mesh.data = 2 data shards: set BatchRamp.increment "
        "to 6 or 12, or Mesh.data to one of 1, 3, 9\n"
        "the nearest layout of 2 devices that works with the other settings as they are: Mesh.data = 1, "
        "Mesh.tensor = 2",
    ),
    (
        {}, {"pipe": 4},
        "Model.num_layers = 2 is too few for Mesh.pipe = 4, which each need one: set Model.num_layers to 4 or "
        "more, or Mesh.pipe to 2 or less\n"
        "the nearest layout of 4 devices that works with the other settings as they are: Mesh.pipe = 2, Mesh.data"
        " = 2",
    ),
    (
        {"pipeline": CHUNKS, "model": {"num_layers": 7}}, {"pipe": 4},
        "Model.num_layers = 7 is too few for Mesh.pipe * Pipeline.virtual_stages = 8, which each need one: set "
        "Model.num_layers to 8 or more, or Mesh.pipe to 3 or less, or Pipeline.virtual_stages to 1 or less\n"
        "the nearest layout of 4 devices that works with the other settings as they are: Mesh.pipe = 2, Mesh.data"
        " = 2",
    ),
    (
        {"pipeline": CHUNKS, "model": LAYERS}, {"pipe": 5},
        "Train.global_batch_size = 24 gives the one data shard 8 microbatches, and with Pipeline.virtual_stages ="
        " 2 they go through the stages in groups of Mesh.pipe = 5: set Train.global_batch_size to 15 or 30 "
        "(5 or 10 microbatches), or "
        "Pipeline.virtual_stages to 1\n"
        "no layout of 5 devices passes with the other settings as they are",
    ),
    (
        {"pipeline": CHUNKS, "model": LAYERS, "train": {"microbatch_size": None}}, {"pipe": 5},
        "Train.global_batch_size = 24 gives the one data shard 24 microbatches, and with "
        "Pipeline.virtual_stages = 2 they go through the stages in groups of Mesh.pipe = 5: set "
        "Train.global_batch_size to 20 or 25 (20 or 25 microbatches), or Pipeline.virtual_stages to 1\n"
        "no layout of 5 devices passes with the other settings as they are",
    ),
    (
        {"pipeline": {**CHUNKS, "head": "last"}}, {"data": 4},
        "Pipeline.virtual_stages = 2 has no effect with Mesh.pipe = 1: set Mesh.pipe to 2 or more, or leave "
        "Pipeline.virtual_stages at 1\n"
        "Pipeline.head = 'last' has no effect with Mesh.pipe = 1: set Mesh.pipe to 2 or more, or leave "
        "Pipeline.head at 'sharded'\n"
        "no layout of 4 devices passes with the other settings as they are",
    ),
    (
        {"train": {"scan_layers": True}}, {"pipe": 2, "data": 2},
        "Train.scan_layers = True with Mesh.pipe = 2: the few layers of a stage run in line; leave "
        "Train.scan_layers at None\n"
        "the nearest layout of 4 devices that works with the other settings as they are: Mesh.pipe = 1, Mesh.data"
        " = 4",
    ),
    (
        {"rules": {"zero": 1}}, {"pipe": 2, "data": 2, "fsdp": 2},
        "Mesh.fsdp = 2 with Mesh.pipe = 2: every weight would be gathered again for each microbatch; set "
        "Mesh.data = 4 and Mesh.fsdp = 1, with Rules.zero = 2, which splits the state alike and gathers once a "
        "step, or Mesh.pipe = 1\n"
        "the nearest layout of 8 devices that works with the other settings as they are: Mesh.pipe = 1, Mesh.fsdp"
        " = 4",
    ),
    (
        {"train": {"seq_len": 60}}, {"context": 4},
        "Train.seq_len = 60 does not divide into 8 slices, of which each shard over Mesh.context = 4 has an early "
        "and a late one, to have the same work under a causal mask: set Train.seq_len to 56 or 64, or "
        "Mesh.context to one of 1, 2, 3, 5, 6, 10, 15, 30\n"
        "the nearest layout of 4 devices that works with the other settings as they are: Mesh.data = 2, "
        "Mesh.context = 2",
    ),
    (
        {"train": {"seq_len": 60}}, {"context": 4, "tensor": 4},
        "Train.seq_len = 60 does not divide over Mesh.context * Mesh.tensor = 16: set Train.seq_len to 48 or 64\n"
        "the nearest layout of 16 devices that works with the other settings as they are: Mesh.data = 4, "
        "Mesh.context = 1",
    ),
    (
        {"train": {"seq_len": 45}}, {"context": 2},
        "Train.seq_len = 45 does not divide into 4 slices, of which each shard over Mesh.context = 2 has an early "
        "and a late one, to have the same work under a causal mask: set Train.seq_len to 44 or 48, or "
        "Mesh.context to 1\n"
        "the nearest layout of 2 devices that works with the other settings as they are: Mesh.data = 2, "
        "Mesh.context = 1",
    ),
    (
        {"train": {"context_exchange": "all_to_all"}}, {"context": 4, "tensor": 2},
        "Train.context_exchange = 'all_to_all' splits the heads of a device over Mesh.context = 4, and "
        "Model.num_heads = 12 leaves it 6: set Model.num_heads to 8 or 16, or Mesh.context to one of 1, 2, 3, 6, "
        "or Train.context_exchange = 'ring'\n"
        "the nearest layout of 8 devices that works with the other settings as they are: Mesh.data = 2, "
        "Mesh.context = 2",
    ),
    (
        {"train": {"context_exchange": "all_to_all"}}, {"data": 4},
        "Train.context_exchange = 'all_to_all' has no effect with Mesh.context = 1: set Mesh.context to 2 or "
        "more, or leave Train.context_exchange at 'ring'\n"
        "the nearest layout of 4 devices that works with the other settings as they are: Mesh.data = 2, "
        "Mesh.context = 2",
    ),
    (
        {"train": {"attention": "cudnn"}}, {"context": 4},
        "Train.attention = 'cudnn' computes whole sequences, and with Train.context_exchange = 'ring' a device "
        "has a part of them, over Mesh.context = 4: set Train.context_exchange = 'all_to_all', or Train.attention = "
        "'auto'\n"
        "the nearest layout of 4 devices that works with the other settings as they are: Mesh.data = 4, "
        "Mesh.context = 1",
    ),
    (
        {}, {"data": 2, "expert": 2},
        "Mesh.expert = 2 splits experts, and with Model.num_experts = 0 there are none: set Mesh.data = 4 and "
        "Mesh.expert = 1\n"
        "the nearest layout of 4 devices that works with the other settings as they are: Mesh.data = 4, "
        "Mesh.expert = 1",
    ),
    (
        {"model": {**EXPERTS, "num_experts": 6, "expert_d_ff": 50}}, {"expert": 4, "tensor": 4},
        "Model.num_experts = 6 does not divide over Mesh.expert = 4: set Model.num_experts to 4 or 8, or "
        "Mesh.expert to one of 1, 2, 3, 6\n"
        "Model.expert_d_ff = 50 does not divide over Mesh.tensor = 4: set Model.expert_d_ff to 48 or 52, or "
        "Mesh.tensor to one of 1, 2, 5, 10, 25, 50\n"
        "the nearest layout of 16 devices that works with the other settings as they are: Mesh.data = 4, "
        "Mesh.expert = 2, Mesh.tensor = 2",
    ),
    (
        {"rules": {"overrides": {"embed": "fsdp"}}}, {"fsdp": 2},
        "Rules.overrides puts 'embed' over fsdp, and layers need all of it: leave it out of Rules.overrides (to "
        "save memory, Mesh.fsdp and Rules.zero split each weight along a dim that divides)\n"
        "the nearest layout of 2 devices that works with the other settings as they are: Mesh.data = 2, Mesh.fsdp"
        " = 1",
    ),
    (
        {"rules": {"overrides": {"batch": ("data", "tensor")}}}, {"tensor": 2},
        "Rules.overrides makes tensor split 'batch' and also 'seq_sp', 'heads', 'kv_heads', 'mlp', 'vocab', and "
        "arrays have both: keep tensor for one of them\n"
        "the nearest layout of 2 devices that works with the other settings as they are: Mesh.data = 2, "
        "Mesh.tensor = 1",
    ),
    (
        {"rules": {"overrides": {"layers": None}}}, {"pipe": 2},
        "Rules.overrides puts 'layers' over nothing, and layers are split over pipe, as its stages, alone: leave "
        "it out of Rules.overrides\n"
        "the nearest layout of 2 devices that works with the other settings as they are: Mesh.pipe = 1, Mesh.data"
        " = 2",
    ),
    (
        {"rules": {"overrides": {"seq_sp": None}}}, {"context": 2},
        "Rules.overrides puts 'seq' over context and 'seq_sp' over nothing, and between blocks the sequence is "
        "split further, never less: begin 'seq_sp' with the axes of 'seq'\n"
        "the nearest layout of 2 devices that works with the other settings as they are: Mesh.data = 2, "
        "Mesh.context = 1",
    ),
    (
        {"rules": {"overrides": {"mlp": ("fsdp", "tensor"), "batch": "data"}}}, {"fsdp": 2, "tensor": 2},
        "Rules.overrides puts 'mlp' over fsdp, tensor, and what is summed over them would be split along the "
        "sequence over tensor ('seq_sp' beyond 'seq'): use the same axes for both, or set 'seq_sp' to None\n"
        "the nearest layout of 4 devices that works with the other settings as they are: Mesh.fsdp = 1, "
        "Mesh.tensor = 4",
    ),
    (
        {"rules": {"overrides": {"kv_heads": "context", "seq": None, "seq_sp": "tensor"}}}, {"context": 2, "tensor": 2},
        "Rules.overrides puts 'heads' over tensor and 'kv_heads' over context, and a device needs the keys of its"
        " queries: split both alike, or set 'kv_heads': None\n"
        "the nearest layout of 4 devices that works with the other settings as they are: Mesh.context = 1, "
        "Mesh.tensor = 4",
    ),
    (
        {"model": EXPERTS, "rules": {"overrides": {"experts": "tensor", "mlp": None}}}, {"tensor": 2},
        "Rules.overrides puts 'experts' over tensor, and tokens are exchanged among devices that have others: "
        "choose axes of 'batch' (none is live)\n"
        "the nearest layout of 2 devices that works with the other settings as they are: Mesh.data = 2, "
        "Mesh.tensor = 1",
    ),
]  # fmt: skip


def refusal(sections, mesh, provenance=None):
    with pytest.raises(UserError) as caught:
        layout.check_layout(run_with(**sections), schema.Mesh(**{"data": 1, **mesh}), provenance)
    return str(caught.value)


@pytest.mark.parametrize(("sections", "mesh", "message"), MISTAKES)
def test_layouts_that_do_not_fit(sections, mesh, message):
    assert refusal({"mesh": {"data": 1}, **sections}, mesh) == message


def test_messages_say_where_values_were_set():
    config = reader.load_text(TEXT + "Mesh.data = 1\nMesh.context = 3\n", "run.gin")
    with pytest.raises(
        UserError,
        match=r"^Train.seq_len = 64 \(run.gin:10\) does not divide into 6 .* over Mesh.context = 3 \(run.gin:15\)",
    ):
        layout.check_layout(config.run, config.run.mesh, config.provenance)


def test_an_axis_that_takes_what_is_left_may_be_one():
    """On fewer devices the same config is no mistake; it is one where the config itself says so."""
    run = run_with(mesh={"data": 2, "pipe": -1}, pipeline={"head": "last"})
    layout.check_layout(run, schema.Mesh(data=2))
    assert "Pipeline.head = 'last' has no effect with Mesh.pipe = 1" in refusal(
        {"mesh": {}, "pipeline": {"head": "last"}}, {"data": 2}
    )


def layouts_of(devices):
    """All of them."""
    sizes = [size for size in range(1, devices + 1) if devices % size == 0]
    for mesh in itertools.product(sizes, repeat=6):
        if math.prod(mesh) == devices:
            yield schema.Mesh(**dict(zip(MESH_AXES, mesh)))


def passes(run, mesh):
    try:
        layout.check_layout(dataclasses.replace(run, mesh=mesh), mesh)
    except UserError:
        return False
    return True


@pytest.mark.parametrize(
    "sections",
    [
        {},
        {"model": EXPERTS, "train": {"seq_len": 48}},
        {"pipeline": CHUNKS, "model": LAYERS},
        {"train": {"microbatch_size": None, "context_exchange": "all_to_all"}},
        {"model": EXPERTS, "rules": {"overrides": {"experts": "data", "mlp": ("fsdp", "tensor"), "batch": "data"}}},
    ],
)
def test_nearest_layouts_are_all_that_pass_and_no_others(sections):
    run, mesh = run_with(**sections), schema.Mesh(data=6, tensor=2)
    found = list(layout.nearest_layouts(run, mesh, 12))
    assert sorted(map(dataclasses.astuple, found)) == sorted(
        dataclasses.astuple(other) for other in layouts_of(12) if other != mesh and passes(run, other)
    )

    def changes(other):
        return sum(a != b for a, b in zip(dataclasses.astuple(other), dataclasses.astuple(mesh)))

    assert [changes(other) for other in found] == sorted(map(changes, found))


def test_a_layout_is_found_at_once_among_thousands():
    run = run_with(
        model={"num_layers": 105, "num_heads": 128, "num_kv_heads": None, "d_model": 2048, "d_ff": 8192, **EXPERTS},
        train={"seq_len": 2048, "global_batch_size": 1920, "microbatch_size": 1},
    )
    began = time.perf_counter()
    first = next(layout.nearest_layouts(run, schema.Mesh(pipe=35, data=4, tensor=16), 2240))
    assert time.perf_counter() - began < 1.0  # 0.02 s on an idle machine
    assert first == schema.Mesh(pipe=28, data=5, tensor=16)


PROPOSAL = re.compile(r"(?:set|or) (\w+)\.(\w+) to (?:one of )?(\d+(?:(?:, | or )\d+)*)(?! or more| or less)")


@pytest.mark.parametrize(("sections", "mesh", "message"), MISTAKES)
def test_proposals_mend_what_the_message_says(sections, mesh, message):
    """Each proposed value, put in place, makes that message go away."""
    run, mesh = run_with(**{"mesh": {"data": 1}, **sections}), {"data": 1, **mesh}

    def kinds(run, mesh):
        found = fit.Layout(run=run, sizes={**dict.fromkeys(MESH_AXES, 1), **mesh})
        return {
            re.sub(r"\d+", "#", text.partition(": set")[0])
            for text in (*fit.misfits(found), *fit.contradictions(found))
        }

    for line in message.splitlines()[:-1]:
        said = re.sub(r"\d+", "#", line.partition(": set")[0])
        assert said in kinds(run, mesh)
        for owner, name, values in PROPOSAL.findall(line):
            for value in map(int, re.findall(r"\d+", values)):
                if owner == "Mesh":
                    assert said not in kinds(run, {**mesh, name: value})
                else:
                    section = "train" if owner == "BatchRamp" else owner.lower()
                    part = getattr(run, section)
                    change = {name: value}
                    if owner == "BatchRamp":
                        change = {"batch_ramp": dataclasses.replace(part.batch_ramp, **change)}
                    other = dataclasses.replace(run, **{section: dataclasses.replace(part, **change)})
                    assert said not in kinds(other, mesh), (owner, name, value)
