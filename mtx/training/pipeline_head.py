"""The head of a pipeline: final norm, logits and loss of what the last stage gives.

Decides who computes it (`Pipeline.head`):

    sharded   all stages, each with its part of the vocabulary of the last stage's output, sent to all of them
    last      the last stage alone; the others wait for it at the end of the tick

In lockstep the tick is as long as its slowest stage either way. `sharded` spreads the work and costs two sums over the
stages of one activation each; `last` costs a branch, before which a GPU waits for its host. So does `sharded` where
stages have several chunks: then there is something for the head at some ticks only, at the same ones on all devices.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from mtx.collectives import cast_varying, varying_axes
from mtx.nn.loss import Rows
from mtx.nn.param import Params
from mtx.training.forward import Forward, Inputs


class Head:
    """One device's part of the head. Built before the loops, in which its weights do not change."""

    def __init__(self, forward: Forward, prepared: Any, stage: jax.Array | int):
        """Args: prepared: as `Forward.prepare` gives it; stage: of this device."""
        setup, ends = forward.setup, forward.setup.definition.ends
        self.forward, self.stage, self.context = forward, stage, setup.context
        self.is_sharded = setup.run.pipeline.head == "sharded"
        self.table, self.rows = ends.table, None
        table = prepared[ends.table]["table"]
        # The rows of the local table that this stage has: the first, and how many.
        self.start: jax.Array | int = 0
        self.count = table.shape[0]
        if self.is_sharded:
            comm = setup.context.comm
            stages = comm.size("layers")
            self.count = -(-table.shape[0] // stages)
            # The last stages begin earlier where the rows do not divide, and leave out those that others have.
            self.start = jnp.minimum(stage * self.count, table.shape[0] - self.count)
            skip = stage * self.count - self.start if table.shape[0] % stages else None
            self.rows = Rows(comm.index("vocab") * table.shape[0] + self.start, skip)
            rules = {**comm.rules, "vocab": (*comm.rules["vocab"], *comm.rules["layers"])}
            self.context = replace(setup.context, comm=replace(comm, rules=rules))
        cut = {"table": lax.dynamic_slice_in_dim(table, self.start, self.count, 0)}
        self.weights: Params = {name: prepared[name] for name in ends.head} | {ends.table: cut}

    def _loss(self, weights: Params, x_BTD: jax.Array, inputs: Inputs) -> jax.Array:
        chunk = self.forward.setup.run.train.loss_chunk_tokens
        model = self.forward.bind(weights)
        return model.loss(x_BTD, inputs["targets"], inputs["weights"], self.context, chunk, self.rows)

    def _receive(self, out_BTD: jax.Array) -> jax.Array:
        """The last stage's output, on the devices that have a part of the head."""
        comm = self.context.comm
        if not self.is_sharded:
            return out_BTD
        is_last = self.stage == comm.size("layers") - 1
        return comm.varying(comm.sum(jnp.where(is_last, out_BTD, 0), "layers"))

    def _where_needed(self, valid: jax.Array, compute: Callable[[], Any], nothing: Any) -> Any:
        """What `compute` gives, or zeros: without a branch where every device has something to do at every tick."""
        comm, stages = self.context.comm, self.context.comm.size("layers")
        if self.is_sharded and self.forward.setup.run.pipeline.virtual_stages == 1:
            return compute()
        here = valid if self.is_sharded else valid & (self.stage == stages - 1)
        return lax.cond(here, compute, lambda: comm.varying(nothing))

    def loss_sum(self, out_BTD: jax.Array, inputs: Inputs, valid: jax.Array) -> jax.Array:
        """This device's share of a microbatch's loss; 0 where it is not valid."""
        comm = self.context.comm

        def compute() -> jax.Array:
            loss = self._loss(self.weights, self._receive(out_BTD), inputs)
            return comm.varying(jnp.where(valid, comm.share(loss), 0))

        return self._where_needed(valid, compute, jnp.float32(0))

    def differentiate(
        self, out_BTD: jax.Array, inputs: Inputs, valid: jax.Array, seed: jax.Array, grads: Params
    ) -> tuple[jax.Array, jax.Array, Params]:
        """Loss and gradients of a microbatch.

        Args:
            out_BTD: Output of this device's stage, of which that of the last stage counts.
            inputs: Of the microbatch.
            valid: Whether there is one.
            seed: Derivative of the objective by the loss sum.
            grads: Accumulators.

        Returns:
            This device's share of the loss; the gradient by the last stage's output; the accumulators.
        """
        comm = self.context.comm

        def compute() -> tuple[jax.Array, jax.Array, Params]:
            x_BTD = self._receive(out_BTD)
            loss, pullback = jax.vjp(lambda w, x: self._loss(w, x, inputs), self.weights, x_BTD)
            dw, dx_BTD = pullback(cast_varying(jnp.where(valid, seed, 0), varying_axes(loss)))
            if self.is_sharded:
                dx_BTD = comm.sum(dx_BTD, "layers")
            return comm.varying((jnp.where(valid, comm.share(loss), 0), dx_BTD, dw))

        nothing = jax.tree.map(jnp.zeros_like, (jnp.float32(0), out_BTD, self.weights))
        loss, dx_BTD, dw = self._where_needed(valid, compute, nothing)
        total = grads[self.table]["table"]
        added = lax.dynamic_slice_in_dim(total, self.start, self.count, 0) + dw[self.table]["table"].astype(total.dtype)
        new = {self.table: {"table": lax.dynamic_update_slice_in_dim(total, added, self.start, 0)}}
        for name in dw:
            if name != self.table:
                new[name] = jax.tree.map(lambda g, d: g + d.astype(g.dtype), grads[name], dw[name])
        return loss, dx_BTD, {**grads, **new}
