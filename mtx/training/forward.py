"""A model's forward pass inside `shard_map`: from stored weights to the loss of a microbatch.

    prepared = prepare(stored weights)         once a step: cast to the compute dtype, gather what ZeRO-2 split
    inputs   = read(rows of the batch)         once a microbatch: what the objective shows and asks, this device's part
    sums     = microbatch_sums(prepared, ...)  once a microbatch; ZeRO-3 gathers each layer's weights where it is used

Layers run in line, or in a `lax.scan` over their stacked weights; checkpoints know the stacked form only.
"""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Sequence as Rows
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from mtx.nn.attention import Cache, empty_cache
from mtx.nn.context import Dropout, Extras, Sequence, Tap
from mtx.nn.param import Params
from mtx.sharding import Placement
from mtx.training.remat import rematerialize, tap_for
from mtx.training.state import Setup, without
from mtx.training.sums import COUNTS, Sums

Inputs = dict[str, jax.Array]
"""`tokens`, `targets`, `weights` [B, T], and where they apply `segments`, `positions`, `visible` [B, T], `rows` [B]."""


def join_extras(extras: Rows[Extras]) -> Extras:
    """Losses summed over layers, counts stacked [layers with experts, ...]."""
    routed = [layer for layer in extras if layer]
    if not routed:
        return {}
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *routed)
    return {name: value if name in COUNTS else value.sum(0) for name, value in stacked.items()}


def trace_once(layer: Callable[..., Any]) -> Callable[..., Any]:
    """The same function, traced, differentiated and lowered once for all calls that are alike: layers in line are."""
    return jax.jit(layer)


@dataclass(frozen=True)
class Forward:
    """The forward pass of a run. All methods but the constructor run inside `shard_map`."""

    setup: Setup

    def prepare(self, params: Params) -> Any:
        """Weights as microbatches use them: matrices in the compute dtype, with what ZeRO-2 split joined.

        Gradients are taken by the result, which is as `Setup.split_layers` leaves it.
        """
        comm, dtype = self.setup.context.comm, self.setup.context.dtype

        def one(w: jax.Array, placement: Placement) -> jax.Array:
            return comm.gather_for_step(w if placement.in_float32 else w.astype(dtype), placement)

        return jax.tree.map(one, self.setup.split_layers(comm.varying(params)), self.setup.split_placements)

    def read(self, batch: Inputs) -> Inputs:
        """What the objective makes of whole rows of a batch, cut to this device's part of the sequence."""
        objective: Any = self.setup.run.train.objective
        comm = self.setup.context.comm
        inputs = {name: comm.cut_sequence(values, 1) for name, values in objective.inputs(batch).items()}
        return inputs | {"rows": batch["rows"]} if "rows" in batch else inputs

    def sequence(self, inputs: Inputs) -> Sequence:
        """Where the tokens of a microbatch stand."""
        length = inputs["tokens"].shape[1]
        return Sequence(inputs.get("positions"), inputs.get("segments"), length, inputs.get("visible"))

    def dropout(self, inputs: Inputs, key: jax.Array | None) -> Dropout | None:
        """The dropout of a microbatch; None where there is none."""
        rate = self.setup.run.train.dropout
        return Dropout(key, inputs["rows"], rate) if key is not None and rate > 0 else None

    def bind(self, prepared: Any) -> Any:
        """The model without its layers, weights whole but for tensor parallelism. Only what is given can be used."""
        rest = without(prepared, ("line", *self.setup.definition.layers))
        placements = {name: self.setup.placements[name] for name in rest}
        weights = jax.tree.map(self.setup.context.comm.gather_for_layer, rest, placements)
        return self.setup.definition.whole.bind(weights)

    def bind_layer(self, stack: str, weights: Params, x_BTD: jax.Array) -> Any:
        """One layer of a stack, for the input `x_BTD`."""
        placements = self.setup.layer_placements[stack]
        if any(placement.layer_axes for placement in jax.tree.leaves(placements)):
            # Made to wait for the input, weights cannot be gathered before it: XLA would take the gathers of all layers
            # out of the loop over microbatches, and hold the whole model.
            weights, _ = lax.optimization_barrier((weights, x_BTD))
        gathered = jax.tree.map(self.setup.context.comm.gather_for_layer, weights, placements)
        return self.setup.definition.layers[stack].bind(gathered)

    def empty_caches(self, batch: int, length: int) -> Any:
        """The caches of all layers, stacked: room for `length` tokens in each of `batch` rows."""
        config = self.setup.run.model
        cache = empty_cache(config, self.setup.context, batch, length)
        return jax.tree.map(lambda a: jnp.broadcast_to(a, (config.num_layers, *a.shape)), cache)

    def hidden(
        self,
        model: Any,
        prepared: Any,
        inputs: Inputs,
        dropout: Dropout | None = None,
        caches: Any = None,
        start: jax.Array | None = None,
    ) -> tuple[jax.Array, Any, Extras]:
        """Through all layers, without a pipeline.

        Args:
            caches: Keys and values of the tokens before these, stacked by layer; None when not decoding.
            start: int32, number of tokens in the caches; None: none.

        Returns:
            [B, T, D] sharded as `seq_sp`, the caches with the keys and values of `inputs`, and the joined extras.
        """
        setup, context = self.setup, self.setup.context
        sequence = self.sequence(inputs)
        table = model.rotary_table(sequence, context)
        recompute = setup.run.train.recompute
        tap: Tap = tap_for(recompute)
        regathered = tuple(axis for axis in ("fsdp",) if axis in context.comm.live)

        def make_layer(stack: str) -> Any:
            def apply(
                weights: Params, x_BTD: jax.Array, index: jax.Array | int, cache: Cache | None, shared: Any
            ) -> tuple[jax.Array, Cache | None, Extras]:
                sequence, table, dropout, start = shared
                site = None if dropout is None else dropout.at(index)
                layer = self.bind_layer(stack, weights, x_BTD)
                return layer(x_BTD, sequence, table, context, site, tap, cache, start)

            layer = rematerialize(apply, recompute, regathered, scanned=setup.scans_layers)
            return layer if setup.scans_layers else trace_once(layer)

        layers = {stack: make_layer(stack) for stack in setup.definition.layers}
        # Sites of the layers start at 1: site 0 is the embedding's.
        x_BTD = model.embed(inputs["tokens"], sequence, context, None if dropout is None else dropout.at(0))
        shared = (sequence, table, dropout, start)
        if not setup.scans_layers:
            new_caches, extras = [], []
            for index, ((stack, _), weights) in enumerate(zip(setup.line, prepared["line"])):
                cache = jax.tree.map(lambda a, index=index: a[index], caches)
                x_BTD, cache, extra = layers[stack](weights, x_BTD, index + 1, cache, shared)
                new_caches.append(cache)
                extras.append(extra)
            if caches is not None:
                caches = jax.tree.map(lambda *slices: jnp.stack(slices), *new_caches)
            return x_BTD, caches, join_extras(extras)

        ((stack, layer),) = layers.items()

        def visit(x_BTD: jax.Array, xs: tuple[Params, jax.Array, Cache | None]) -> tuple[jax.Array, Any]:
            weights, index, cache = xs
            x_BTD, cache, extra = layer(weights, x_BTD, index, cache, shared)
            return context.comm.varying(x_BTD), (context.comm.varying(cache), extra)

        xs = (prepared[stack], jnp.arange(1, setup.run.model.num_layers + 1), caches)
        x_BTD, (caches, extra) = lax.scan(visit, context.comm.varying(x_BTD), xs)
        return x_BTD, caches, {name: v if name in COUNTS else v.sum(0) for name, v in extra.items()}

    def microbatch_sums(self, prepared: Any, inputs: Inputs, key: jax.Array | None) -> Sums:
        """This device's part of the sums of a microbatch, float32.

        Args:
            inputs: As `read` gives them.
            key: Of the step's dropout; None: no dropout.
        """
        model = self.bind(prepared)
        x_BTD, _, extras = self.hidden(model, prepared, inputs, self.dropout(inputs, key))
        chunk = self.setup.run.train.loss_chunk_tokens
        loss = model.loss(x_BTD, inputs["targets"], inputs["weights"], self.setup.context, chunk)
        return {"loss": loss, **extras}
