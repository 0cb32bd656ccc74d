"""The mesh that a number of devices gives."""

import dataclasses
import pathlib

import pytest

from mtx.config import layout, reader, schema
from mtx.errors import UserError


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


def load_mt_nlg(*overrides):
    return reader.load(pathlib.Path(__file__).parents[2] / "configs" / "runs" / "mt_nlg_530b.gin", overrides)


@pytest.mark.parametrize(("devices", "replicas"), [(2240, 8), (3360, 12)])
def test_mt_nlg_has_its_published_layout(devices, replicas):
    config = load_mt_nlg()
    mesh = layout.resolve_mesh(config.run.mesh, devices)
    assert mesh == schema.Mesh(pipe=35, data=replicas, tensor=8)
    layout.check_layout(config.run, mesh, config.provenance)


def test_mt_nlg_cannot_be_interleaved():
    """Groups of 35 microbatches are not the 240 of a replica."""
    config = load_mt_nlg("Pipeline.virtual_stages = 3", "Train.batch_ramp = None")
    with pytest.raises(UserError) as caught:
        layout.check_layout(config.run, layout.resolve_mesh(config.run.mesh, 2240), config.provenance)
    message = str(caught.value)
    assert "gives each of 8 data shards (Mesh.data) 240 microbatches" in message
    assert "set Train.global_batch_size to 1680 or 1960 (210 or 245 microbatches)" in message
    assert "2240 devices" in message
