"""Prints, as JSON, digests of states on layouts of several devices. Run with 8 devices, or as several processes.

layouts NAME...    digests of one state on layouts, before and after it went through a checkpoint
copies             what is found where copies of one shard differ
processes          both, of two arrays over all devices of all processes
noise FORMAT       largest relative differences of loss and gradient norm between programs that compute one step
"""

from __future__ import annotations

import json
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from tiny import LLAMA, make_setup, train

from mtx.checkpoints.store import Checkpoints
from mtx.config import schema
from mtx.errors import CheckpointError
from mtx.mesh import make_mesh, start_process
from mtx.optim.adamw import AdamW
from mtx.training.digest import Digester
from mtx.training.proof import prove_arrays
from mtx.training.state import Setup

MODEL = {**LLAMA, "num_layers": 4}
EXPERTS = {**LLAMA, "num_layers": 4, "num_experts": 4, "experts_per_token": 2, "expert_every": 2}
MICRO = {"microbatch_size": 1}
LAYOUTS: dict[str, dict[str, Any]] = {
    "one device": {},
    "data2 tensor2": {"mesh": {"data": 2, "tensor": 2}},
    "fsdp4": {"mesh": {"fsdp": 4}},
    "data8 zero0": {"mesh": {"data": 8}, "rules": {"zero": 0}},
    "pipe2 data2 tensor2": {"mesh": {"pipe": 2, "data": 2, "tensor": 2}},
    "pipe3 of uneven stages": {"mesh": {"pipe": 3}},
    "pipe2 of 2 chunks": {"mesh": {"pipe": 2}, "pipeline": {"virtual_stages": 2}},
    "offloaded": {"mesh": {"data": 2, "tensor": 2}, "train": {"offload_optimizer": True}},
}
PROGRAMS: dict[str, dict[str, Any]] = {
    "microbatches of 2, full": {"train": {"microbatch_size": 2, "recompute": "full"}},
    "selective, chunks of the loss": {"train": {"recompute": "selective", "loss_chunk_tokens": 5}},
    "context2": {"mesh": {"context": 2}},
    "fsdp2 tensor2 data2": {"mesh": {"fsdp": 2, "tensor": 2, "data": 2}},
    "pipe2 data2 tensor2": {"mesh": {"pipe": 2, "data": 2, "tensor": 2}, "train": MICRO},
}


def place(setup: Setup, values: Any) -> Any:
    """A canonical state on the host, as a setup holds it."""
    shards = jax.tree.map(lambda leaf: leaf.sharding, setup.canonical.abstract_state)
    return setup.canonical.load(jax.device_put(values, shards))


def after(setup: Setup, steps: int) -> Any:
    """The canonical state after some steps, on the host."""
    state, _ = train(setup, steps)
    # Of copies: an array that was read keeps a view of its buffers, which then are not donated.
    return jax.tree.map(lambda leaf: np.array(leaf.copy()), setup.canonical.store(state))


def layouts(*names: str) -> dict[str, Any]:
    rng, one = np.random.default_rng(0), make_setup(MODEL).canonical.abstract_state
    values = jax.tree.map(lambda leaf: (100 * rng.random(leaf.shape)).astype(leaf.dtype), one)
    values["step"] = np.int32(2)
    source = make_setup(MODEL, mesh={"pipe": 2, "data": 2, "tensor": 2})
    results = {}
    with tempfile.TemporaryDirectory() as folder, Checkpoints(Path(folder)) as checkpoints:
        checkpoints.save(2, source.canonical.store(place(source, values)), {})
        checkpoints.wait()
        for name in names:
            setup = make_setup(MODEL, **LAYOUTS[name])
            digester, canonical = Digester(setup.mesh), setup.canonical
            placed = digester(canonical.store(place(setup, values)))
            restored = checkpoints.restore(2, canonical.abstract_state)
            loaded = digester(restored)
            assert placed.disagreements() == loaded.disagreements() == []
            results[name] = {"placed": placed.leaf_digests(), "restored": loaded.leaf_digests()}
            table = restored["params"]["embedding"]["table"]
            restored["params"]["embedding"]["table"] = table.at[3, 1].multiply(1 + 2**-23)
            try:
                prove_arrays(placed.leaf_digests(), digester(restored).leaf_digests(), step=2)
            except CheckpointError as error:
                results[name]["message"] = str(error)
    return results


def make_copies(mesh: jax.sharding.Mesh, spec: P, wrong: set[int]) -> jax.Array:
    """float32 [8, 8] of which the devices in these places of the mesh hold a shard with one bit changed."""
    sharding, whole = NamedSharding(mesh, spec), np.arange(64, dtype=np.float32).reshape(8, 8)
    shards = []
    for number, device in enumerate(mesh.devices.flat):
        if device.process_index == jax.process_index():
            part = whole[sharding.devices_indices_map(whole.shape)[device]].copy()
            part.view(np.uint32)[1, 1] ^= int(number in wrong) << 22
            shards.append(jax.device_put(part, device))
    return jax.make_array_from_single_device_arrays(whole.shape, sharding, shards)


def copies() -> dict[str, Any]:
    mesh = make_mesh(schema.Mesh(data=2, fsdp=2, tensor=2))
    cases: dict[str, tuple[P, set[int]]] = {
        "all equal": (P("data", "tensor"), set()),
        "one of eight": (P(), {5}),
        "three of eight": (P(), {0, 1, 6}),
        "four of eight": (P(), {0, 1, 2, 3}),
        "one of two": (P("data", "tensor"), {2}),
        "two shards": (P("tensor"), {1, 6}),
        "without copies": (P("data", ("fsdp", "tensor")), {4}),
    }
    digester, results = Digester(mesh), {}
    for name, (spec, wrong) in cases.items():
        found = digester({"params": {"good": make_copies(mesh, P(), set()), "w": make_copies(mesh, spec, wrong)}})
        results[name] = [asdict(one) for one in found.disagreements()]
    return results


def processes() -> dict[str, Any]:
    start_process()
    mesh = make_mesh(schema.Mesh(data=2, tensor=jax.device_count() // 2))
    split = jax.jit(
        lambda: jnp.sin(jnp.arange(64.0)).reshape(8, 8), out_shardings=NamedSharding(mesh, P(None, "tensor"))
    )
    found = Digester(mesh)({"split": split(), "w": make_copies(mesh, P(), {3})})
    return {"digests": found.leaf_digests(), "disagreements": [asdict(one) for one in found.disagreements()]}


def noise(compute: str) -> dict[str, Any]:
    sections: dict[str, Any] = {"precision": {"compute": compute}}
    options = {"optimizer": AdamW(learning_rate=0.003)}
    apart = {}
    for name, model in (("dense", MODEL), ("experts", EXPERTS)):
        state, expected = after(make_setup(model, **sections, train=options), 5), np.zeros(2)
        for program, more in {"one device": {}, **PROGRAMS}.items():
            setup = make_setup(model, **{**sections, **more, "train": {**options, **more.get("train", {})}})
            told = np.array(train(setup, 1, place(setup, state), first=5)[1][0])
            expected = told if program == "one device" else expected
            apart[f"{name}: {program}"] = np.abs(told / expected - 1).tolist()
    return apart


if __name__ == "__main__":
    command = {"layouts": layouts, "copies": copies, "processes": processes, "noise": noise}[sys.argv[1]]
    print(json.dumps(command(*sys.argv[2:])))
