"""The head of a pipeline: final norm, logits and loss of what the last stage gives.

Decides who computes it (`Pipeline.head`):

    sharded   all stages, each with its part of the vocabulary of the last stage's output, sent to all of them
    last      the last stage alone; the others wait for it at the end of the tick

In lockstep the tick is as long as its slowest stage either way. `sharded` spreads the work and costs two sums over the
stages of one activation each; `last` costs a branch, before which a GPU waits for its host.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from mtx.collectives import cast_varying, varying_axes
from mtx.nn.context import Context
from mtx.nn.loss import Rows
from mtx.nn.param import Params
from mtx.training.forward import Forward, Inputs


@dataclass(frozen=True)
class Head:
    """One device's part of the head.

    Attributes:
        prepared: As `Forward.prepare` gives it.
        stage: Of this device.
    """

    forward: Forward
    prepared: Any
    stage: jax.Array | int

    @property
    def is_sharded(self) -> bool:
        return self.forward.setup.run.pipeline.head == "sharded"

    @cached_property
    def context(self) -> Context:
        context = self.forward.setup.context
        if not self.is_sharded:
            return context
        rules = context.comm.rules
        vocab = (*rules["vocab"], *rules["layers"])  # a shard's rows are shared among the stages
        return replace(context, comm=replace(context.comm, rules={**rules, "vocab": vocab}))

    @cached_property
    def rows(self) -> tuple[jax.Array | int, int, Rows | None]:
        """First row of the local table that this stage has, how many, and what they stand for."""
        comm = self.forward.setup.context.comm
        table = self.prepared[self.forward.setup.definition.ends.table]["table"]
        if not self.is_sharded:
            return 0, table.shape[0], None
        wanted = -(-table.shape[0] // comm.size("layers"))
        # The last stages begin earlier where the rows do not divide, and leave out those that others have.
        start = jnp.minimum(self.stage * wanted, table.shape[0] - wanted)
        uneven = table.shape[0] % comm.size("layers") > 0
        first = comm.index("vocab") * table.shape[0] + start
        return start, wanted, Rows(first, self.stage * wanted - start if uneven else None)

    @cached_property
    def weights(self) -> Params:
        """The parameters of the head, its table cut to the rows of this stage."""
        ends = self.forward.setup.definition.ends
        start, count, _ = self.rows
        table = lax.dynamic_slice_in_dim(self.prepared[ends.table]["table"], start, count, 0)
        return {name: self.prepared[name] for name in ends.head} | {ends.table: {"table": table}}

    def _loss(self, weights: Params, x_BTD: jax.Array, inputs: Inputs) -> jax.Array:
        chunk = self.forward.setup.run.train.loss_chunk_tokens
        model = self.forward.bind(weights)
        return model.loss(x_BTD, inputs["targets"], inputs["weights"], self.context, chunk, self.rows[2])

    def _receive(self, out_BTD: jax.Array) -> jax.Array:
        """The last stage's output, on all stages."""
        comm = self.context.comm
        is_last = self.stage == comm.size("layers") - 1
        return comm.varying(comm.sum(jnp.where(is_last, out_BTD, 0), "layers"))

    def loss_sum(self, out_BTD: jax.Array, inputs: Inputs, valid: jax.Array) -> jax.Array:
        """This device's share of a microbatch's loss; 0 where it is not valid."""
        comm = self.context.comm
        if self.is_sharded:
            return comm.varying(
                jnp.where(valid, comm.share(self._loss(self.weights, self._receive(out_BTD), inputs)), 0)
            )
        return self._on_last_stage(
            valid, lambda: comm.varying(comm.share(self._loss(self.weights, out_BTD, inputs))), jnp.float32(0)
        )

    def _on_last_stage(self, valid: jax.Array, compute: Any, otherwise: Any) -> Any:
        comm = self.context.comm
        here = valid & (self.stage == comm.size("layers") - 1)
        return lax.cond(here, compute, lambda: comm.varying(otherwise))

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

        def compute(x_BTD: jax.Array, seed: jax.Array) -> tuple[jax.Array, jax.Array, Params]:
            loss, pullback = jax.vjp(lambda w, x: self._loss(w, x, inputs), self.weights, x_BTD)
            dw, dx_BTD = pullback(cast_varying(seed, varying_axes(loss)))
            return comm.varying((comm.share(loss), dx_BTD, dw))

        if self.is_sharded:
            loss, dx_BTD, dw = compute(self._receive(out_BTD), jnp.where(valid, seed, 0))
            loss, dx_BTD = jnp.where(valid, loss, 0), comm.varying(comm.sum(dx_BTD, "layers"))
        else:
            nothing = jax.tree.map(jnp.zeros_like, (jnp.float32(0), out_BTD, self.weights))
            loss, dx_BTD, dw = self._on_last_stage(valid, lambda: compute(out_BTD, seed), nothing)
        table, (start, count, _) = self.forward.setup.definition.ends.table, self.rows
        total = grads[table]["table"]
        added = lax.dynamic_slice_in_dim(total, start, count, 0) + dw[table]["table"].astype(total.dtype)
        new = {table: {"table": lax.dynamic_update_slice_in_dim(total, added, start, 0)}}
        for name in dw:
            if name != table:
                new[name] = jax.tree.map(lambda g, d: g + d.astype(g.dtype), grads[name], dw[name])
        return loss, dx_BTD, {**grads, **new}
