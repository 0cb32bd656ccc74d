"""How a trained model is laid out for inference: on which mesh, and with which rules and numbers.

Decides that inference is in float32 with full matmul precision, on weights that stay where training stores them, and
that tokens are on every device: one answer, whatever the layout and whether or not keys and values are cached.
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import jax
from jax.sharding import Mesh

from mtx.checkpoints.run_directory import RunDirectory, restore_params
from mtx.config import schema
from mtx.config.axes import MESH_AXES
from mtx.config.layout import resolve_mesh
from mtx.errors import UserError
from mtx.mesh import make_mesh
from mtx.nn.param import Params
from mtx.sharding import axis_sizes
from mtx.training.state import Setup

MATMUL_PRECISION = "highest"
"""For `jax.default_matmul_precision`: GPUs would otherwise round float32 products to 10 bits (TF32)."""


def choose_mesh(counts: schema.Mesh, report: Callable[[str], None]) -> Mesh:
    """The run's mesh where it fits the devices that there are, else one device, which is reported."""
    devices = jax.devices()
    try:
        return make_mesh(_without_stages(resolve_mesh(counts, len(devices))), devices)
    except UserError as error:
        report(f"one device computes, since the run's mesh does not fit those here: {error}")
        return make_mesh(schema.Mesh(**dict.fromkeys(MESH_AXES, 1)), devices[:1])


def _without_stages(counts: schema.Mesh) -> schema.Mesh:
    """As many devices, of which those of stages, experts and contexts, which do not split the work of a few tokens,
    hold a share of the weights each and gather them layer by layer, as those of `fsdp` do."""
    fsdp = counts.pipe * counts.fsdp * counts.expert * counts.context
    return dataclasses.replace(counts, pipe=1, fsdp=fsdp, expert=1, context=1)


def move_from_training(setup: Setup, params: Params) -> tuple[Setup, Params]:
    """The weights of a training state where inference has them. The arrays may be those of `params`.

    Args:
        setup: Of the training run.
        params: With the shardings of its state.
    """
    counts = schema.Mesh(**axis_sizes(setup.mesh))
    if _without_stages(counts) == counts:
        return setup, params
    moved = Setup(run=setup.run, mesh=make_mesh(_without_stages(counts), setup.mesh.devices.flatten().tolist()))
    shards = jax.tree.map(lambda leaf: leaf.sharding, moved.abstract_state["params"])
    canonical = setup.canonical.store({"params": params})["params"]
    return moved, jax.jit(lambda tree: tree, out_shardings=shards)(canonical)


def for_inference(setup: Setup) -> Setup:
    """The same model on the same mesh, its weights stored alike, but batch and sequence split over no device."""
    run = setup.run
    alike = len(set(run.model.layer_stacks)) == 1
    overrides = {**run.rules.overrides, "batch": None, "seq": None, "seq_sp": None}
    run = dataclasses.replace(
        run,
        rules=dataclasses.replace(run.rules, sequence_parallel=False, overrides=overrides),
        precision=dataclasses.replace(run.precision, compute="float32"),
        # In line, layers compile many times longer; a token, which waits for the weights to be read, is no faster.
        train=dataclasses.replace(run.train, attention="auto", recompute="none", scan_layers=alike),
    )
    return Setup(run=run, mesh=setup.mesh)


@dataclass(frozen=True, kw_only=True)
class OpenRun:
    """A trained model on the devices of this process.

    Attributes:
        setup: Of the training run, on the mesh chosen here.
        params: The weights, with the shardings of the setup's state.
        step: The checkpoint that they are of.
        is_primary: Whether this process speaks for all.
    """

    directory: RunDirectory
    setup: Setup
    params: Params
    step: int
    is_primary: bool


def open_run(path: Path, step: int | None = None, *, quiet: bool = False) -> OpenRun:
    """Restores the weights of a run, and nothing else of its state.

    Args:
        path: Run directory.
        step: Which checkpoint; None: the newest that verifies.
        quiet: Whether nothing is said on stderr of a mesh that does not fit or a checkpoint that is passed over.

    Raises:
        UserError: There is no run, or no such checkpoint.
        CheckpointError: It does not verify.
    """

    def report(line: str) -> None:
        if not quiet:
            print(line, file=sys.stderr)

    directory = RunDirectory.open(path)
    run = directory.config().run
    setup = Setup(run=run, mesh=choose_mesh(run.mesh, report))
    params, found = restore_params(directory, setup.abstract_state["params"], step, report=report)
    return OpenRun(directory=directory, setup=setup, params=params, step=found, is_primary=jax.process_index() == 0)
