"""The training step: one jitted, pure function of (state, batch), and its sibling for evaluation.

    weight    = sum of the loss weights of the global batch           known before any forward pass
    sums, g   = shard_map(microbatches: forward, backward, add)       every collective written out; so is a pipeline
                each gradient reduced over its devices once, after the last microbatch
    direction = optimizer(g)                                          elementwise, on shards, under pjit
    params   -= learning rate * direction                             the rate is an input: no recompilation
                where loss and |g| are finite; else nothing changes but the number of the step

The order of transformations, outermost first: jit, shard_map, scan over microbatches, vjp, (scan over layers), remat.

Invariant: nothing in here depends on the process or asks for its devices; the mesh is the setup's.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax import lax
from jax.sharding import PartitionSpec as P

from mtx.nn.experts import balance
from mtx.nn.param import Params
from mtx.sharding import Placement, batch_spec
from mtx.training.accumulate import accumulate_in_turn, cut_microbatches, evaluate_in_turn
from mtx.training.forward import Forward
from mtx.training.offload import update_in_turn
from mtx.training.pipeline import accumulate_in_pipeline, evaluate_in_pipeline
from mtx.training.state import Setup, State
from mtx.training.sums import COUNTS, Sums, as_metrics, coefficient, divisors_of_losses, names_of_sums, sums_spec

Batch = dict[str, jax.Array]
"""What `mtx.data` gives for a step ([batch, sequence + 1] and [batch] arrays), with the scalars `learning_rate`
(float32) and `num_microbatches` (int32, where the batch size ramps up)."""

Metrics = dict[str, jax.Array]
"""`loss` (nats per target token), `grad_norm`, `target_tokens`, `skipped` (bool: there was no update), and what
`mtx.training.sums.as_metrics` adds."""


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


def make_loss_and_gradients(setup: Setup) -> Callable[..., tuple[Sums, Params]]:
    """The function (params, batch, weight, key, num_microbatches) -> (sums, gradients), to be called under jit.

    `params` and gradients are global arrays with the storage shardings, `batch` what `mtx.data` gives ([batch, ...]
    arrays), `weight` the float32 sum of its loss weights, `num_microbatches` an int32 scalar or None (all of them).
    Of the sums, losses are divided as `mtx.training.sums` says, and counts have the rows of the stack `expert_layers`.
    """
    forward, model, comm = Forward(setup), setup.run.model, setup.context.comm
    accumulate = accumulate_in_turn if setup.stages is None else accumulate_in_pipeline

    def body(
        params: Params, batch: Batch, weight: jax.Array, key: jax.Array, num_microbatches: jax.Array | None
    ) -> tuple[Sums, Params]:
        microbatches = cut_microbatches(batch, setup.microbatch_size)
        most, size = microbatches["tokens"].shape[:2]
        count = most if num_microbatches is None else num_microbatches
        divisors = divisors_of_losses(model, weight, count * size * comm.size("batch"))
        seeds = {name: coefficient(model, name) / divisor for name, divisor in divisors.items()}
        sums, grads = accumulate(forward, forward.prepare(params), microbatches, seeds, key, count)
        totals = {
            name: comm.sum_shares(value, "layers") if name in COUNTS else comm.sum_shares(value) / divisors[name]
            for name, value in sums.items()
        }
        return totals, _reduce(setup, grads)

    storage = jax.tree.map(lambda p: p.storage, setup.placements)
    totals = {name: sums_spec(setup.rules, name) for name in names_of_sums(model)}

    def loss_and_gradients(
        params: Params, batch: Batch, weight: jax.Array, key: jax.Array, num_microbatches: jax.Array | None
    ) -> tuple[Sums, Params]:
        rows = {name: batch_spec(setup.rules, 1) for name in batch}
        return jax.shard_map(
            body,
            mesh=setup.mesh,
            in_specs=(storage, rows, P(), P(), P()),
            out_specs=(totals, storage),
            check_vma=True,
        )(params, batch, weight, key, num_microbatches)

    return loss_and_gradients


def _only_where(condition: jax.Array, transformation: optax.GradientTransformation) -> optax.GradientTransformation:
    """The optimizer, which remembers nothing where the condition, a scalar, is false."""

    def update(grads: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        direction, after = transformation.update(grads, state, params)
        return direction, jax.tree.map(lambda new, old: jnp.where(condition, new, old), after, state)

    return optax.GradientTransformation(transformation.init, update)


def make_train_step(setup: Setup) -> Any:
    """The jitted function (state, batch) -> (state, metrics). Its state is consumed: that memory holds the result."""
    loss_and_gradients = make_loss_and_gradients(setup)
    objective: Any = setup.run.train.objective
    shards = jax.tree.map(lambda leaf: leaf.sharding, setup.abstract_state["params"])
    update_shards = jax.tree.map(lambda p: jax.sharding.NamedSharding(setup.mesh, p.optimizer), setup.placements)
    model, offloaded = setup.run.model, setup.run.train.offload_optimizer

    def step(state: State, batch: Batch) -> tuple[State, Metrics]:
        arrays, scalars = _split_scalars(batch)
        weight = objective.inputs(arrays)["weights"].sum()
        key = jax.random.fold_in(jax.random.key(setup.run.train.seed + 1), state["step"])
        sums, grads = loss_and_gradients(state["params"], arrays, weight, key, scalars.get("num_microbatches"))
        grads, params = lax.with_sharding_constraint((grads, state["params"]), (update_shards, update_shards))
        norm = optax.tree.norm(grads)
        is_finite = jnp.isfinite(norm) & jnp.isfinite(sums["loss"])
        transformation = _only_where(is_finite, setup.transformation)
        update = partial(update_in_turn, transformation) if offloaded else transformation.update
        direction, optimizer = update(grads, state["optimizer"], params)
        rate = scalars["learning_rate"]
        # The old value, not a direction of zero: XLA would merge those zeros with the ones that gradients are added to,
        # and keep a copy of them during the whole step.
        params = jax.tree.map(lambda p, d: jnp.where(is_finite, (p - rate * d).astype(p.dtype), p), params, direction)
        params = lax.with_sharding_constraint(params, update_shards)  # chosen on shards, then gathered: not both sides
        if model.expert_bias_rate > 0:
            rate = jnp.where(is_finite, model.expert_bias_rate, 0.0)
            params = {**params, "expert_layers": balance(params["expert_layers"], sums["expert_load"], rate)}
        params = lax.with_sharding_constraint(params, shards)
        metrics = {**as_metrics(sums), "grad_norm": norm, "target_tokens": weight, "skipped": ~is_finite}
        return {"params": params, "optimizer": optimizer, "step": state["step"] + 1}, metrics

    return jax.jit(step, donate_argnums=0, out_shardings=(setup.state_shardings, None))


def make_eval_step(setup: Setup) -> Callable[[Params, Batch], tuple[jax.Array, jax.Array]]:
    """The jitted function (params, batch) -> (loss sum in nats, sum of weights) over the global batch."""
    forward, objective, comm = Forward(setup), setup.run.train.objective, setup.context.comm
    storage = jax.tree.map(lambda p: p.storage, setup.placements)
    evaluate = evaluate_in_turn if setup.stages is None else evaluate_in_pipeline

    def body(params: Params, batch: Batch) -> jax.Array:
        microbatches = cut_microbatches(batch, setup.microbatch_size)
        return comm.sum_shares(evaluate(forward, forward.prepare(params), microbatches))

    def step(params: Params, batch: Batch) -> tuple[jax.Array, jax.Array]:
        arrays = _split_scalars(batch)[0]
        rows = {name: batch_spec(setup.rules, 1) for name in arrays}
        loss = jax.shard_map(body, mesh=setup.mesh, in_specs=(storage, rows), out_specs=P(), check_vma=True)(
            params, arrays
        )
        return loss, objective.inputs(arrays)["weights"].sum()  # type: ignore[union-attr]

    return jax.jit(step)
