"""Microbatches one after the other: forward, backward, add. What a device does that is no stage of a pipeline."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from mtx.collectives import cast_varying, varying_axes, zeros_like_varying
from mtx.training.forward import Forward, Inputs
from mtx.training.sums import Sums, split_counts


def cut_microbatches(batch: Inputs, size: int | None) -> Inputs:
    """[rows, ...] -> [M, size, ...]; one microbatch of all rows where the size is None."""
    rows = batch["tokens"].shape[0]
    size = min(size or rows, rows)
    return jax.tree.map(lambda a: a.reshape(rows // size, size, *a.shape[1:]), batch)


def pick_microbatch(microbatches: Inputs, index: jax.Array) -> Inputs:
    """One of them; an index out of range picks the nearest."""
    last = jax.tree.leaves(microbatches)[0].shape[0] - 1
    index = jnp.clip(index, 0, last)
    return jax.tree.map(lambda a: lax.dynamic_index_in_dim(a, index, 0, keepdims=False), microbatches)


def accumulate_in_turn(
    forward: Forward, prepared: Any, microbatches: Inputs, seeds: Sums, key: jax.Array, count: jax.Array | int
) -> tuple[Sums, Any]:
    """Sums and gradients of the first `count` microbatches.

    Args:
        prepared: As `Forward.prepare` gives it.
        microbatches: [M, b, ...] arrays, whole rows.
        seeds: For each loss the derivative of the objective by its sum.
        key: Of the step's dropout.
        count: How many of them; int32 where it is known at run time only.

    Returns:
        This device's share of the sums, and the gradient by `prepared`, float32 if there are several microbatches.
    """
    comm = forward.setup.context.comm

    def differentiate(microbatch: Inputs) -> tuple[Sums, Any]:
        inputs = forward.read(microbatch)
        losses, pullback, counts = jax.vjp(
            lambda w: split_counts(forward.microbatch_sums(w, inputs, key)), prepared, has_aux=True
        )
        (grads,) = pullback({name: cast_varying(seeds[name], varying_axes(loss)) for name, loss in losses.items()})
        return jax.tree.map(comm.share, {**losses, **counts}), grads

    if isinstance(count, int) and count == 1:
        return differentiate(jax.tree.map(lambda a: a[0], microbatches))

    def visit(carry: tuple[Sums, Any], microbatch: Inputs) -> tuple[Sums, Any]:
        added = differentiate(microbatch)
        return jax.tree.map(lambda total, a: total + a.astype(total.dtype), carry, added)

    first = jax.tree.map(lambda a: a[0], microbatches)
    zeros = jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), jax.eval_shape(differentiate, first)[0])
    start = (comm.varying(zeros), comm.varying(zeros_like_varying(prepared, jnp.float32)))
    if isinstance(count, int):
        return lax.scan(lambda carry, m: (visit(carry, m), None), start, microbatches)[0]
    # A loop with a count known at run time only: the batch grows without a new program.
    return lax.fori_loop(0, count, lambda i, carry: visit(carry, pick_microbatch(microbatches, i)), start)


def evaluate_in_turn(forward: Forward, prepared: Any, microbatches: Inputs) -> jax.Array:
    """This device's share of the loss sum of all microbatches."""
    comm = forward.setup.context.comm

    def one(microbatch: Inputs) -> jax.Array:
        return comm.varying(comm.share(forward.microbatch_sums(prepared, forward.read(microbatch), None)["loss"]))

    return lax.map(one, microbatches).sum()
