"""Microbatches through the stages of a pipeline, forward and backward, in lockstep.

    warm     ticks of forward units
    steady   ticks of a forward unit, the head, and a backward unit
    cool     ticks of backward units
             after each tick activations go one stage further round the ring, and their gradients one stage back

Every device runs this program on its own layers; `training.schedule` says which microbatch a stage has at a tick. A
stage keeps the inputs of the microbatches in flight in a ring of fixed size, so that memory does not grow with their
number; and besides, by `Train.recompute`, what its layers have named with `tap`. The backward unit runs the stage again
with those values in their place: whatever only led up to them is dead code, collectives included.

Invariant: units out of the schedule compute on zeros and add nothing; gradients are summed over devices elsewhere.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from mtx.collectives import cast_varying, varying_axes
from mtx.nn.context import Context, Dropout, Extras, Sequence, Tap
from mtx.nn.param import Params
from mtx.training.accumulate import pick_microbatch
from mtx.training.forward import Forward, Inputs, join_extras
from mtx.training.pipeline_head import Head
from mtx.training.remat import ring_names
from mtx.training.schedule import CLOSED_FORMS, Unit
from mtx.training.stages import Stages
from mtx.training.sums import Sums, names_of_sums, split_counts

Saved = list[dict[str, jax.Array]]
"""For each slot of a chunk the values that its layer has named."""


@jax.custom_jvp
def _replace(value: jax.Array, saved: jax.Array) -> jax.Array:
    """`saved`, with the derivative of `value`."""
    return saved


_replace.defjvp(lambda primals, tangents: (primals[1], tangents[0]))


class _Pipeline:
    """One device's part of a step.

    Built before the loops: what it computes then is computed once, and used in all of them.
    """

    def __init__(
        self, forward: Forward, prepared: Any, microbatches: Inputs, key: jax.Array | None, count: jax.Array | int
    ):
        """Args: prepared: as `Forward.prepare` gives it; microbatches: [M, b, ...], whole rows; key: of the step's
        dropout, None: no dropout; count: how many of the microbatches are used."""
        setup = forward.setup
        assert setup.stages is not None
        self.forward, self.microbatches, self.key = forward, microbatches, key
        self.stages: Stages = setup.stages
        closed_form = CLOSED_FORMS[setup.run.pipeline.schedule]
        self.schedule = closed_form(self.stages.num_stages, self.stages.virtual_stages, count)
        self.stage = setup.context.comm.index("layers")
        self.embed_weights: Params = {name: prepared[name] for name in setup.definition.ends.embed}
        self.head = Head(forward, prepared, self.stage)
        line, slots = prepared["line"], len(self.stages.slots)
        # For each slot the weights of all chunks, [virtual_stages, ...]; without that dim if there is one chunk.
        self.weights: list[Params] = line
        if self.stages.virtual_stages > 1:
            self.weights = [jax.tree.map(lambda *chunks: jnp.stack(chunks), *line[s::slots]) for s in range(slots)]

    def chunk(self, index: jax.Array) -> list[Params]:
        """The weights of one chunk."""
        if self.stages.virtual_stages == 1:
            return self.weights
        return jax.tree.map(lambda w: lax.dynamic_index_in_dim(w, index, 0, keepdims=False), self.weights)

    def read(self, unit: Unit) -> Inputs:
        return self.forward.read(pick_microbatch(self.microbatches, unit.microbatch))

    def is_first(self, unit: Unit) -> jax.Array:
        return (self.stage == 0) & (unit.chunk == 0)

    def is_last(self, unit: Unit) -> jax.Array:
        return (self.stage == self.stages.num_stages - 1) & (unit.chunk == self.stages.virtual_stages - 1)

    def head_unit(self, unit: Unit) -> Unit:
        """A unit of the last stage, valid if its output goes into the head."""
        return unit._replace(valid=unit.valid & (unit.chunk == self.stages.virtual_stages - 1))

    def embed(self, inputs: Inputs) -> jax.Array:
        """The input of the first layer."""
        context, model = self.forward.setup.context, self.forward.bind(self.embed_weights)
        return context.comm.varying(model.embed(inputs["tokens"], *self._at_embedding(inputs)))

    def add_embed_gradient(self, grads: Params, dx_BTD: jax.Array, inputs: Inputs) -> Params:
        """Adds the gradient of what `embed` used to the accumulators."""
        totals, model = {name: grads[name] for name in self.embed_weights}, self.forward.bind(self.embed_weights)
        return grads | model.add_embed_gradient(totals, dx_BTD, inputs["tokens"], *self._at_embedding(inputs))

    def _at_embedding(self, inputs: Inputs) -> tuple[Sequence, Context, Dropout | None]:
        dropout = self.forward.dropout(inputs, self.key)
        return self.forward.sequence(inputs), self.forward.setup.context, None if dropout is None else dropout.at(0)

    def run(
        self, weights: list[Params], x_BTD: jax.Array, inputs: Inputs, chunk: jax.Array, saved: Saved | None = None
    ) -> tuple[jax.Array, Saved, Extras]:
        """A chunk of this stage.

        Args:
            weights: Of its slots.
            x_BTD: Its input, sharded as `seq_sp`.
            saved: What the layers named when they ran before, to be used instead; None: they run for the first time.

        Returns:
            Its output; what the layers named; the joined extras.
        """
        forward, stages, context = self.forward, self.stages, self.forward.setup.context
        names = ring_names(forward.setup.run.train.recompute)
        sequence, dropout = forward.sequence(inputs), forward.dropout(inputs, self.key)
        table = forward.bind(self.embed_weights).rotary_table(sequence, context)
        # The number of each slot's layer, and -1 where this chunk has none.
        layers = jnp.asarray(stages.layers)[self.stage, chunk]
        record: Saved = []
        extras: list[Extras] = []
        for slot, (stack, w) in enumerate(zip(stages.slots, weights)):
            site = None if dropout is None else dropout.at(layers[slot] + 1)

            def tap_into(named: dict[str, jax.Array], slot: int = slot) -> Tap:
                def tap(name: str, value: jax.Array) -> jax.Array:
                    if name not in names:
                        return value
                    if saved is not None:
                        return _replace(*context.comm.varying((value, saved[slot][name])))
                    named[name] = context.comm.varying(value)
                    return value

                return tap

            def apply(
                w: Params, x_BTD: jax.Array, stack: str = stack, site: Any = site, tap_into: Any = tap_into
            ) -> tuple[jax.Array, dict[str, jax.Array], Extras]:
                named: dict[str, jax.Array] = {}
                layer = forward.bind_layer(stack, w, x_BTD)
                y_BTD, _, extra = layer(x_BTD, sequence, table, context, site, tap_into(named))
                return context.comm.varying(y_BTD), named, extra

            kept: dict[str, jax.Array] = {}
            if slot:  # that of slot 0 is the input of the stage
                x_BTD = tap_into(kept)("layer_in", x_BTD)
            if stages.is_full(slot):
                x_BTD, named, extra = apply(w, x_BTD)
            else:
                x_BTD, named, extra = self._apply_if(layers[slot] >= 0, apply, w, x_BTD)
            record.append(kept | named)
            extras.append(extra)
        return x_BTD, record, join_extras(extras)

    def _apply_if(
        self, present: jax.Array, apply: Callable[..., Any], w: Params, x_BTD: jax.Array
    ) -> tuple[jax.Array, dict[str, jax.Array], Extras]:
        """A layer where there is one, else its input.

        With the head on the last stage, that stage has fewer layers to be done at the same time as the others: it must
        not compute those that it has not. Else stages wait for each other anyway, and a branch would cost.
        """
        comm = self.forward.setup.context.comm
        _, abstract, extras = jax.eval_shape(apply, w, x_BTD)
        # A branch makes all that comes out of it differ between devices, which counts of experts must not.
        if not self.head.is_sharded and not extras:
            nothing = comm.varying(jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), abstract))
            x_BTD, named = lax.cond(
                present, lambda w, x: apply(w, x)[:2], lambda w, x: (comm.varying(x), nothing), w, x_BTD
            )
            return x_BTD, named, {}
        y_BTD, named, extra = apply(w, x_BTD)
        return jnp.where(present, y_BTD, x_BTD), named, jax.tree.map(lambda value: jnp.where(present, value, 0), extra)

    def forward_unit(self, tick: jax.Array, received_BTD: jax.Array) -> tuple[jax.Array, jax.Array, Saved]:
        """The forward unit of a tick: its input, its output, and what its layers named."""
        unit = self.schedule.forward(tick, self.stage)
        inputs = self.read(unit)
        x_BTD = jnp.where(self.is_first(unit), self.embed(inputs), received_BTD)
        x_BTD = jnp.where(unit.valid, x_BTD, 0)  # always finite
        out_BTD, record, _ = self.run(self.chunk(unit.chunk), x_BTD, inputs, unit.chunk)
        return x_BTD, out_BTD, record

    def backward_unit(
        self, tick: jax.Array, dy_BTD: jax.Array, ring: Any, grads: Params, sums: Sums, seeds: Sums
    ) -> tuple[jax.Array, Params, Sums]:
        """The backward unit of a tick.

        Args:
            dy_BTD: Gradient by the output of the chunk.
            ring: Inputs and named values of the microbatches in flight.
            grads: Accumulators, shaped as `weights` and the ends of the model.
            sums: Accumulators.

        Returns:
            Gradient by the input of the chunk; the accumulators with this unit's gradients and extras added.
        """
        comm, unit = self.forward.setup.context.comm, self.schedule.backward(tick, self.stage)
        inputs = self.read(unit)
        held = jax.tree.map(lambda r: lax.dynamic_index_in_dim(r, unit.slot, 0, keepdims=False), ring)
        x_BTD, saved = jax.tree.map(lambda row, a: row.reshape(a.shape), held, self.held)

        def rerun(weights: list[Params], x_BTD: jax.Array) -> tuple[tuple[jax.Array, Sums], Sums]:
            y_BTD, _, extras = self.run(weights, x_BTD, inputs, unit.chunk, saved)
            losses, counts = split_counts(extras)
            return (y_BTD, losses), counts

        (_, losses), pullback, counts = jax.vjp(rerun, self.chunk(unit.chunk), x_BTD, has_aux=True)
        d_losses = {
            name: cast_varying(jnp.where(unit.valid, seeds[name], 0), varying_axes(loss))
            for name, loss in losses.items()
        }
        # With a gradient of zero and finite inputs, all gradients are zero where the unit is not valid.
        dw, dx_BTD = pullback((jnp.where(unit.valid, dy_BTD, 0), d_losses))
        grads = {**grads, "weights": self._add_to_chunk(grads["weights"], dw, unit.chunk)}
        is_embedded = unit.valid & self.is_first(unit)
        grads = self.add_embed_gradient(grads, jnp.where(is_embedded, dx_BTD, 0), inputs)
        shares = jax.tree.map(lambda value: jnp.where(unit.valid, comm.share(value), 0), {**losses, **counts})
        for name, value in shares.items():
            # Of counts, the rows of this chunk.
            rows = [*jnp.split(sums[name], self.stages.virtual_stages)] if value.ndim else [sums[name]]
            added = [row + jnp.where(unit.chunk == k, value, 0) for k, row in enumerate(rows)] if value.ndim else None
            sums = {**sums, name: jnp.concatenate(added) if added else sums[name] + value}
        return dx_BTD, grads, sums

    def _add_to_chunk(self, totals: list[Params], added: list[Params], chunk: jax.Array) -> list[Params]:
        if self.stages.virtual_stages == 1:
            return _add(totals, added)
        # In place: slicing out, adding and writing back would copy all weights at every tick.
        return jax.tree.map(
            lambda total, a: total.at[chunk].add(a.astype(total.dtype), mode="promise_in_bounds"), totals, added
        )

    def zeros(self) -> jax.Array:
        """What stages receive before there is anything: [b, T, D]."""
        unit = self.schedule.forward(0, self.stage)
        shape = jax.eval_shape(lambda: self.embed(self.read(unit)))
        return self.forward.setup.context.comm.varying(jnp.zeros(shape.shape, shape.dtype))

    @cached_property
    def held(self) -> tuple[jax.ShapeDtypeStruct, Any]:
        """What a stage keeps of a microbatch: its input and the named values, abstract."""
        x_BTD = jax.eval_shape(self.zeros)
        _, _, record = jax.eval_shape(lambda x: self.forward_unit(jnp.int32(0), x), x_BTD)
        return x_BTD, record

    def rings(self) -> Any:
        """Room for what is held of all microbatches in flight: of each value a row per slot, flat.

        Flat, since writer and readers may want the dims of a value in different orders of memory: then one value is
        turned round at a tick, where XLA would else copy the whole ring.
        """
        rings = jax.tree.map(lambda a: jnp.zeros((self.schedule.depth, a.size), a.dtype), self.held)
        return self.forward.setup.context.comm.varying(rings)

    def zero_sums(self) -> Sums:
        """Accumulators of losses and counts."""
        comm, model = self.forward.setup.context.comm, self.forward.setup.run.model
        rows = self.stages.slots.count("expert_layers") * self.stages.virtual_stages
        shapes = {"expert_load": (rows, model.num_experts), "dropped": (rows,)}
        return comm.varying({name: jnp.zeros(shapes.get(name, ()), jnp.float32) for name in names_of_sums(model)})


def _add(totals: Any, added: Any) -> Any:
    return jax.tree.map(lambda total, a: total + a.astype(total.dtype), totals, added)


def accumulate_in_pipeline(
    forward: Forward, prepared: Any, microbatches: Inputs, seeds: Sums, key: jax.Array, count: jax.Array | int
) -> tuple[Sums, Any]:
    """Sums and gradients of the first `count` microbatches; arguments and result as of `accumulate_in_turn`."""
    comm = forward.setup.context.comm
    pipeline = _Pipeline(forward, prepared, microbatches, key, count)
    schedule, head = pipeline.schedule, pipeline.head
    last_stage = pipeline.stages.num_stages - 1

    def do_forward(tick: jax.Array, received: jax.Array, ring: Any) -> tuple[jax.Array, Any]:
        x, out, record = pipeline.forward_unit(tick, received)
        slot = schedule.forward(tick, pipeline.stage).slot
        ring = jax.tree.map(lambda r, a: lax.dynamic_update_index_in_dim(r, a.reshape(-1), slot, 0), ring, (x, record))
        return out, ring

    def do_head(tick: jax.Array, out: jax.Array, dy: jax.Array, grads: Params, sums: Sums) -> Any:
        unit = pipeline.head_unit(schedule.backward(tick, last_stage))
        inputs = pipeline.read(unit)
        loss, dx, grads = head.differentiate(out, inputs, unit.valid, seeds["loss"], grads)
        dy = jnp.where(pipeline.is_last(schedule.backward(tick, pipeline.stage)), dx, dy)
        return dy, grads, {**sums, "loss": sums["loss"] + loss}

    def warm(tick: jax.Array, carry: tuple) -> tuple:
        received, dy, ring, grads, sums = carry
        out, ring = do_forward(tick, received, ring)
        return comm.pass_on(out, "layers"), dy, ring, grads, sums

    def steady(tick: jax.Array, carry: tuple) -> tuple:
        received, dy, ring, grads, sums = carry
        out, ring = do_forward(tick, received, ring)
        dy, grads, sums = do_head(tick, out, dy, grads, sums)
        dx, grads, sums = pipeline.backward_unit(tick, dy, ring, grads, sums, seeds)
        return comm.pass_on(out, "layers"), comm.pass_on(dx, "layers", -1), ring, grads, sums

    def cool(tick: jax.Array, carry: tuple) -> tuple:
        received, dy, ring, grads, sums = carry
        dx, grads, sums = pipeline.backward_unit(tick, dy, ring, grads, sums, seeds)
        return received, comm.pass_on(dx, "layers", -1), ring, grads, sums

    x = pipeline.zeros()
    accumulators = {"weights": pipeline.weights, **{n: w for n, w in prepared.items() if n != "line"}}
    grads = comm.varying(jax.tree.map(lambda w: jnp.zeros(w.shape, jnp.float32), accumulators))
    carry = (x, x, pipeline.rings(), grads, pipeline.zero_sums())
    starts = (0, *schedule.ticks)
    for body, begin, end in zip((warm, steady, cool), starts, starts[1:]):
        carry = lax.fori_loop(begin, end, body, carry)
    _, _, _, grads, sums = carry
    weights = grads.pop("weights")
    chunks = pipeline.stages.virtual_stages
    line = (
        weights if chunks == 1 else [jax.tree.map(lambda g, k=k: g[k], slot) for k in range(chunks) for slot in weights]
    )
    return sums, {**grads, "line": line}


def evaluate_in_pipeline(forward: Forward, prepared: Any, microbatches: Inputs) -> jax.Array:
    """This device's share of the loss sum of all microbatches."""
    comm, count = forward.setup.context.comm, microbatches["tokens"].shape[0]
    pipeline = _Pipeline(forward, prepared, microbatches, None, count)
    last_stage = pipeline.stages.num_stages - 1

    def visit(tick: jax.Array, carry: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        received, total = carry
        _, out, _ = pipeline.forward_unit(tick, received)
        unit = pipeline.head_unit(pipeline.schedule.forward(tick, last_stage))
        loss = pipeline.head.loss_sum(out, pipeline.read(unit), unit.valid)
        return comm.pass_on(out, "layers"), total + loss

    start = (pipeline.zeros(), comm.varying(jnp.float32(0)))
    return lax.fori_loop(0, pipeline.schedule.ticks[1], visit, start)[1]
