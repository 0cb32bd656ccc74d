"""From rows on the host to arrays on the mesh.

Decides which samples of a batch lie on which device; which tokens a sample holds is the data room's. Each process
reads the rows of its own devices only.

Invariant: which samples make up the batch of step i does not depend on the mesh or on the number of processes.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from mtx.data.ramp import Sizes
from mtx.sharding import batch_spec
from mtx.training.state import Setup
from mtx.training.step import Batch


class Reader(Protocol):
    """What `mtx.data.batches.Batches` offers."""

    def read(self, step: int, rows: Any) -> dict[str, np.ndarray]:
        """Rows of the batch of a step: arrays with a leading dim of `len(rows)`."""


def _spread(setup: Setup, sizes: Sizes, step: int) -> np.ndarray:
    """int [largest batch]: which sample of the batch each row of the global array holds; -1: none.

    Every shard's rows are filled from the front, so that while the batch ramps up its first microbatches are full and
    the others are never visited.
    """
    capacity, used = sizes.max // setup.batch_shards, sizes.size(step) // setup.batch_shards
    rows = np.full((setup.batch_shards, capacity), -1)
    rows[:, :used] = np.arange(sizes.size(step)).reshape(setup.batch_shards, used)
    return rows.reshape(-1)


def _sharding(setup: Setup, ndim: int) -> NamedSharding:
    # One token more than the model sees: the sequence is split later, when inputs and targets are cut from it.
    return NamedSharding(setup.mesh, batch_spec({**setup.rules, "seq": ()}, ndim))


def _on_mesh(setup: Setup, samples: np.ndarray, read: Callable[[np.ndarray], dict[str, np.ndarray]]) -> Batch:
    """Global arrays of which this process reads the rows that lie on its devices.

    Args:
        samples: The sample that each row of the global array holds; -1: none, the row is all zeros.
        read: From sample numbers to their rows.
    """

    def bounds(index: Any) -> tuple[int, int]:
        start, stop, _ = index[0].indices(len(samples))
        return start, stop

    shards = sorted(set(map(bounds, _sharding(setup, 1).addressable_devices_indices_map(samples.shape).values())))
    mine = np.concatenate([np.arange(start, stop) for start, stop in shards])
    row_of = {int(sample): row for row, sample in enumerate(mine)}
    filled = samples[mine] >= 0
    batch: Batch = {}
    for name, values in read(samples[mine][filled]).items():
        rows = np.zeros((len(mine), *values.shape[1:]), values.dtype)
        rows[filled] = values

        def pick(index: Any, rows: np.ndarray = rows) -> np.ndarray:
            start, stop = bounds(index)
            return rows[row_of[start] : row_of[start] + stop - start]

        shape = (len(samples), *values.shape[1:])
        batch[name] = jax.make_array_from_callback(shape, _sharding(setup, len(shape)), pick)
    return batch


def make_train_batch(setup: Setup, reader: Reader, sizes: Sizes, step: int) -> Batch:
    """The batch of a step (0-based) with its learning rate, on the mesh."""
    train = setup.run.train
    optimizer: Any = train.optimizer

    def read(samples: np.ndarray) -> dict[str, np.ndarray]:
        arrays = reader.read(step, samples)
        if train.batch_ramp is not None:
            arrays["weights"] = np.ones((len(samples), train.seq_len), np.float32)
        if train.dropout > 0:
            arrays["rows"] = samples.astype(np.int32)
        return arrays

    batch = _on_mesh(setup, _spread(setup, sizes, step), read)
    rate = optimizer.learning_rate_at(setup.run, step + 1, sizes.tokens(step + 1))
    batch["learning_rate"] = np.float32(rate)  # type: ignore[assignment]
    if train.batch_ramp is not None:
        assert train.microbatch_size is not None
        count = sizes.size(step) // setup.batch_shards // train.microbatch_size
        batch["num_microbatches"] = np.int32(count)  # type: ignore[assignment]
    return batch


def describe_train_batch(setup: Setup) -> Batch:
    """What `make_train_batch` gives as `jax.ShapeDtypeStruct` with shardings: what a step is compiled for."""
    train, rows = setup.run.train, setup.run.train.global_batch_size

    def array(dtype: Any, *shape: int) -> Any:
        sharding = _sharding(setup, len(shape)) if shape else NamedSharding(setup.mesh, P())
        return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)

    packed = ("segments", "positions") if setup.run.data.packing == "documents" else ()
    batch = {name: array(jnp.int32, rows, train.seq_len + 1) for name in ("tokens", *packed)}
    if train.batch_ramp is not None:
        batch["weights"] = array(jnp.float32, rows, train.seq_len)
    if train.dropout > 0:
        batch["rows"] = array(jnp.int32, rows)
    batch["learning_rate"] = array(jnp.float32)
    if train.batch_ramp is not None:
        batch["num_microbatches"] = array(jnp.int32)
    return batch


def make_eval_batch(setup: Setup, reader: Reader, step: int) -> Batch:
    """A batch of a validation set, on the mesh."""
    samples = np.arange(setup.run.train.global_batch_size)
    return _on_mesh(setup, samples, lambda mine: reader.read(step, mine))
