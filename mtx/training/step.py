"""The training step: one jitted, pure function of (state, batch), and its sibling for evaluation.

    weight    = sum of the loss weights of the global batch           known before any forward pass
    loss, g   = shard_map(microbatches: forward, backward, add)       every collective written out
                each gradient reduced over its devices once, after the last microbatch
    direction = optimizer(g)                                          elementwise, on shards, under pjit
    params   -= learning rate * direction                             the rate is an input: no recompilation

The order of transformations, outermost first: jit, shard_map, scan over microbatches, vjp, (scan over layers), remat.

Invariant: nothing in here depends on the process or asks for its devices; the mesh is the setup's.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax import lax
from jax.sharding import PartitionSpec as P

from mtx.collectives import cast_varying, varying_axes, zeros_like_varying
from mtx.nn.param import Params
from mtx.sharding import Placement, batch_spec
from mtx.training.forward import Forward, Inputs
from mtx.training.state import Setup, State

Batch = dict[str, jax.Array]
"""What `mtx.data` gives for a step ([batch, sequence + 1] and [batch] arrays), with the scalars `learning_rate`
(float32) and `num_microbatches` (int32, where the batch size ramps up)."""

Metrics = dict[str, jax.Array]
"""Scalars: `loss` (nats per target token), `grad_norm`, `target_tokens`."""


def _split_scalars(batch: Batch) -> tuple[Batch, Batch]:
    arrays = {k: v for k, v in batch.items() if v.ndim}
    return arrays, {k: v for k, v in batch.items() if not v.ndim}


def _reduce(setup: Setup, grads: Any) -> Params:
    """Gradients summed over devices, with the shapes and shards of the stored parameters, float32."""
    wire = jnp.dtype(setup.run.precision.gradients)

    def one(g: jax.Array, placement: Placement) -> jax.Array:
        return setup.context.comm.reduce_gradient(g.astype(wire), placement).astype(jnp.float32)

    # Layers are joined last: the shards are a fraction of the gradients.
    return setup.join_layers(jax.tree.map(one, grads, setup.split_placements))


def make_loss_and_gradients(setup: Setup) -> Callable[..., tuple[jax.Array, Params]]:
    """The function (params, inputs, weight, key, num_microbatches) -> (loss, gradients), to be called under jit.

    `params` and gradients are global arrays with the storage shardings, `inputs` [batch, sequence] arrays, `weight`
    the float32 sum of loss weights, `num_microbatches` an int32 scalar or None (all of them).
    """
    forward, train, comm = Forward(setup), setup.run.train, setup.context.comm

    def body(
        params: Params, inputs: Inputs, weight: jax.Array, key: jax.Array, num_microbatches: jax.Array | None
    ) -> tuple[jax.Array, Params]:
        prepared = forward.prepare(params)
        rows = inputs["tokens"].shape[0]
        size = min(train.microbatch_size or rows, rows)
        count = rows // size
        microbatches = jax.tree.map(lambda a: a.reshape(count, size, *a.shape[1:]), inputs)

        def differentiate(microbatch: Inputs) -> tuple[jax.Array, Any]:
            loss, pullback = jax.vjp(lambda w: forward.microbatch_loss(w, microbatch, key), prepared)
            (grads,) = pullback(cast_varying(1.0 / weight, varying_axes(loss)))
            return comm.share(loss), grads

        if count == 1 and num_microbatches is None:
            loss, grads = differentiate(jax.tree.map(lambda a: a[0], microbatches))
        else:

            def visit(carry: tuple[jax.Array, Any], microbatch: Inputs) -> tuple[jax.Array, Any]:
                loss, grads = differentiate(microbatch)
                added = jax.tree.map(lambda total, g: total + g.astype(total.dtype), carry[1], grads)
                return carry[0] + loss, added

            start = (comm.varying(jnp.float32(0)), comm.varying(zeros_like_varying(prepared, jnp.float32)))
            if num_microbatches is None:
                loss, grads = lax.scan(lambda c, m: (visit(c, m), None), start, microbatches)[0]
            else:  # a loop with a count known at run time only: the batch grows without a new program

                def at(i: jax.Array, carry: tuple[jax.Array, Any]) -> tuple[jax.Array, Any]:
                    pick = jax.tree.map(lambda a: lax.dynamic_index_in_dim(a, i, 0, keepdims=False), microbatches)
                    return visit(carry, pick)

                loss, grads = lax.fori_loop(0, num_microbatches, at, start)
        return comm.sum_shares(loss) / weight, _reduce(setup, grads)

    storage = jax.tree.map(lambda p: p.storage, setup.placements)

    def loss_and_gradients(
        params: Params, inputs: Inputs, weight: jax.Array, key: jax.Array, num_microbatches: jax.Array | None
    ) -> tuple[jax.Array, Params]:
        specs = {name: batch_spec(setup.rules, a.ndim) for name, a in inputs.items()}
        return jax.shard_map(
            body, mesh=setup.mesh, in_specs=(storage, specs, P(), P(), P()), out_specs=(P(), storage), check_vma=True
        )(params, inputs, weight, key, num_microbatches)

    return loss_and_gradients


def make_train_step(setup: Setup) -> Any:
    """The jitted function (state, batch) -> (state, metrics). Its state is consumed: that memory holds the result."""
    loss_and_gradients = make_loss_and_gradients(setup)
    objective: Any = setup.run.train.objective
    shards = jax.tree.map(lambda leaf: leaf.sharding, setup.abstract_state["params"])
    update_shards = jax.tree.map(lambda p: jax.sharding.NamedSharding(setup.mesh, p.optimizer), setup.placements)

    def step(state: State, batch: Batch) -> tuple[State, Metrics]:
        arrays, scalars = _split_scalars(batch)
        inputs = objective.inputs(arrays)
        if "rows" in arrays:
            inputs["rows"] = arrays["rows"]
        weight = inputs["weights"].sum()
        key = jax.random.fold_in(jax.random.key(setup.run.train.seed + 1), state["step"])
        loss, grads = loss_and_gradients(state["params"], inputs, weight, key, scalars.get("num_microbatches"))
        grads, params = lax.with_sharding_constraint((grads, state["params"]), (update_shards, update_shards))
        direction, optimizer = setup.transformation.update(grads, state["optimizer"], params)
        params = jax.tree.map(lambda p, d: (p - scalars["learning_rate"] * d).astype(p.dtype), params, direction)
        params = lax.with_sharding_constraint(params, shards)
        metrics = {"loss": loss, "grad_norm": optax.tree.norm(grads), "target_tokens": weight}
        return {"params": params, "optimizer": optimizer, "step": state["step"] + 1}, metrics

    return jax.jit(step, donate_argnums=0, out_shardings=(setup.state_shardings, None))


def make_eval_step(setup: Setup) -> Callable[[Params, Batch], tuple[jax.Array, jax.Array]]:
    """The jitted function (params, batch) -> (loss sum in nats, sum of weights) over the global batch."""
    forward, objective, comm = Forward(setup), setup.run.train.objective, setup.context.comm
    storage = jax.tree.map(lambda p: p.storage, setup.placements)

    def body(params: Params, inputs: Inputs) -> jax.Array:
        rows = inputs["tokens"].shape[0]
        size = min(setup.run.train.microbatch_size or rows, rows)
        microbatches = jax.tree.map(lambda a: a.reshape(rows // size, size, *a.shape[1:]), inputs)
        prepared = forward.prepare(params)
        losses = lax.map(lambda m: comm.share(forward.microbatch_loss(prepared, m, None)), microbatches)
        return comm.sum_shares(losses.sum())

    def evaluate(params: Params, batch: Batch) -> tuple[jax.Array, jax.Array]:
        inputs = objective.inputs(_split_scalars(batch)[0])  # type: ignore[union-attr]
        specs = {name: batch_spec(setup.rules, a.ndim) for name, a in inputs.items()}
        loss = jax.shard_map(body, mesh=setup.mesh, in_specs=(storage, specs), out_specs=P(), check_vma=True)(
            params, inputs
        )
        return loss, inputs["weights"].sum()

    return jax.jit(evaluate)
