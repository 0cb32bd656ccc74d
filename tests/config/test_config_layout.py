"""Rules between fields and devices."""

import dataclasses

import pytest

from mtx.config import checks, layout, reader, schema
from mtx.errors import UserError

RUN = reader.load_text(
    "Model:\n  vocab_size = 100\n  d_model = 48\n  num_layers = 2\n  num_heads = 12\n  num_kv_heads = 4\n  d_ff = 96\n"
    "  max_seq_len = 64\n"
    "Train:\n  seq_len = 64\n  global_batch_size = 24\n  microbatch_size = 3\n  steps = 1\n",
    "run.gin",
).run


def run_with(**sections):
    changed = {name: dataclasses.replace(getattr(RUN, name), **fields) for name, fields in sections.items()}
    return dataclasses.replace(RUN, **changed)


@pytest.mark.parametrize(
    ("mesh", "devices", "sizes"),
    [
        ({}, 8, (1, 8, 1, 1, 1, 1)),
        ({}, 1, (1, 1, 1, 1, 1, 1)),
        ({"tensor": 4}, 8, (1, 2, 1, 1, 1, 4)),
        ({"data": 2, "fsdp": -1, "tensor": 2}, 8, (1, 2, 2, 1, 1, 2)),
        ({"data": 2, "fsdp": 2, "tensor": 2}, 8, (1, 2, 2, 1, 1, 2)),
        ({"data": 8, "tensor": -1}, 8, (1, 8, 1, 1, 1, 1)),
    ],
)
def test_mesh_takes_all_devices(mesh, devices, sizes):
    assert dataclasses.astuple(layout.resolve_mesh(schema.Mesh(**mesh), devices)) == sizes


@pytest.mark.parametrize(
    ("mesh", "message"),
    [
        (
            {"data": 1, "fsdp": 4, "tensor": 8},
            "the mesh fsdp 4 * tensor 8 needs 32 devices and there are 8: lower Mesh.fsdp or Mesh.tensor, or give it "
            "the devices (`--cpu-devices 32` simulates them)",
        ),
        (
            {"tensor": 16},
            "the mesh tensor 16 needs 16 devices and there are 8: lower Mesh.tensor, or give it the devices "
            "(`--cpu-devices 16` simulates them)",
        ),
        (
            {"tensor": 3},
            "the mesh tensor 3 takes 3 devices at a time, which do not divide the 8 that there are: the product must "
            "be one of 1, 2, 4, 8",
        ),
        (
            {"data": 2, "tensor": 2},
            "the mesh data 2 * tensor 2 would leave 4 of 8 devices idle: set Mesh.data = 4, or Mesh.data = -1 for "
            "whatever is left",
        ),
    ],
)
def test_mesh_that_does_not_fit(mesh, message):
    with pytest.raises(UserError) as caught:
        layout.resolve_mesh(schema.Mesh(**mesh), 8)
    assert str(caught.value) == message


@pytest.mark.parametrize(
    "mesh",
    [
        {"data": 8},
        {"data": 2, "fsdp": 4},
        {"data": 2, "tensor": 4},
        {"data": 1, "tensor": 12},  # 12 query heads; 4 key/value heads, each of which serves three shards
    ],
)
def test_layouts_that_divide(mesh):
    model = {"model": {"max_seq_len": 96}, "train": {"seq_len": 96}} if mesh.get("tensor") == 12 else {}
    layout.check_layout(run_with(**model), schema.Mesh(**mesh))


@pytest.mark.parametrize(
    ("sections", "mesh", "message"),
    [
        (
            {},
            {"tensor": 6},
            "Model.num_kv_heads = 4 does not divide over Mesh.tensor = 6: set Model.num_kv_heads to 6, or Mesh.tensor "
            "to one of 1, 2, 4\n"
            "Train.seq_len = 64 does not divide over Mesh.tensor = 6: set Train.seq_len to 60 or 66, or Mesh.tensor to "
            "one of 1, 2, 4, 8, 16, 32, 64",
        ),
        (
            {"model": {"num_kv_heads": 1, "d_ff": 90}},
            {"tensor": 8},
            "Model.num_heads = 12 does not divide over Mesh.tensor = 8: set Model.num_heads to 8 or 16, or Mesh.tensor "
            "to one of 1, 2, 3, 4, 6, 12\n"
            "Model.d_ff = 90 does not divide over Mesh.tensor = 8: set Model.d_ff to 88 or 96, or Mesh.tensor to one "
            "of 1, 2, 3, 5, 6, 9, 10, 15, 18, 30, 45, 90",
        ),
        (
            {},
            {"data": 3, "fsdp": 3},
            "Train.global_batch_size = 24 sequences do not divide over Mesh.data * Mesh.fsdp = 9 data shards: set "
            "Train.global_batch_size to 27, or Mesh.data * Mesh.fsdp to one of 1, 2, 3, 4, 6, 8, 12, 24",
        ),
        (
            {},
            {"data": 4, "fsdp": 3},
            "Train.global_batch_size = 24 gives each of 12 data shards (Mesh.data * Mesh.fsdp) 2 sequences, which "
            "Train.microbatch_size = 3 does not divide: set Train.microbatch_size to one of 1, 2, or "
            "Train.global_batch_size to 36",
        ),
        (
            {"train": {"batch_ramp": schema.BatchRamp(start=6, increment=9, tokens=10)}},
            {"data": 2},
            "BatchRamp.increment = 9 sequences do not divide over Mesh.data = 2 data shards: set BatchRamp.increment "
            "to 6 or 12, or Mesh.data to one of 1, 3, 9",
        ),
        (
            {},
            {"data": 2, "context": 2},
            "Mesh.context = 2: this version trains with pipe, expert and context at 1; use Mesh.fsdp (weights gathered "
            "layer by layer) and Mesh.tensor (matrices split inside a layer) instead",
        ),
    ],
)
def test_layouts_that_do_not_divide(sections, mesh, message):
    with pytest.raises(UserError) as caught:
        layout.check_layout(run_with(**sections), schema.Mesh(**{"data": 1, **mesh}))
    assert str(caught.value) == message


def test_overrides_change_what_must_divide():
    mesh = schema.Mesh(data=1, tensor=6)
    rules = {"sequence_parallel": False, "overrides": {"kv_heads": None}}
    layout.check_layout(run_with(rules=rules), mesh)
    with pytest.raises(UserError, match=r"Model\.num_kv_heads = 4 does not divide over Mesh\.tensor = 6"):
        layout.check_layout(run_with(rules={"sequence_parallel": False}), mesh)


def test_training_needs_data():
    with pytest.raises(UserError, match=r"Data\.train is empty.*mtx data build"):
        checks.require_training_data(RUN)
    checks.require_training_data(run_with(data={"train": {"store": 1.0}}))
