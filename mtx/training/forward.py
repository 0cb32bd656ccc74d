"""A model's forward pass inside `shard_map`: from stored weights to the loss of a microbatch.

    prepared = prepare(stored weights)         once a step: cast to the compute dtype, gather what ZeRO-2 split
    loss     = microbatch_loss(prepared, ...)  once a microbatch; ZeRO-3 gathers each layer's weights where it is used

Layers run in line, or in a `lax.scan` over their stacked weights; checkpoints know the stacked form only.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from mtx.nn.attention import Cache, empty_cache
from mtx.nn.context import Dropout, Sequence
from mtx.nn.param import Params
from mtx.sharding import Placement
from mtx.training.remat import rematerialize, tap_for
from mtx.training.state import Setup

Inputs = dict[str, jax.Array]
"""`tokens`, `targets`, `weights` [B, T], and where they apply `segments`, `positions`, `visible` [B, T], `rows` [B]."""


def _without_layers(tree: Any) -> Any:
    return {name: value for name, value in tree.items() if name != "layers"}


@dataclass(frozen=True)
class Forward:
    """The forward pass of a run. All methods but the constructor run inside `shard_map`."""

    setup: Setup

    def prepare(self, params: Params) -> Any:
        """Weights as microbatches use them: matrices in the compute dtype, with what ZeRO-2 split joined.

        Gradients are taken by the result, whose `layers` are as `Setup.split_layers` leaves them.
        """
        comm, dtype = self.setup.context.comm, self.setup.context.dtype

        def one(w: jax.Array, placement: Placement) -> jax.Array:
            # Gains and biases stay as they are stored: they enter sums in float32.
            return comm.gather_for_step(w.astype(dtype) if placement.is_matrix else w, placement)

        return jax.tree.map(one, self.setup.split_layers(comm.varying(params)), self.setup.split_placements)

    def bind(self, prepared: Any) -> Any:
        """The model without its layers, its weights whole but for tensor parallelism."""
        rest, placements = (_without_layers(tree) for tree in (prepared, self.setup.placements))
        weights = jax.tree.map(self.setup.context.comm.gather_for_layer, rest, placements)
        return self.setup.definition.whole.bind(weights)

    def _bind_layer(self, weights: Params) -> Any:
        gathered = jax.tree.map(self.setup.context.comm.gather_for_layer, weights, self.setup.layer_placements)
        return self.setup.definition.layer.bind(gathered)

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
    ) -> tuple[jax.Array, Any]:
        """Output of the last layer, [B, T, D] sharded as `seq_sp`, and the caches with the keys and values of `inputs`.

        Args:
            caches: Keys and values of the tokens before these, where layers are scanned; None when not decoding.
            start: int32, number of tokens in the caches; None: none.
        """
        setup, context = self.setup, self.setup.context
        tokens_BT = inputs["tokens"]
        sequence = Sequence(inputs.get("positions"), inputs.get("segments"), tokens_BT.shape[1], inputs.get("visible"))
        table = model.rotary_table(sequence, context)
        recompute = setup.run.train.recompute
        tap = tap_for(recompute)

        def apply_layer(
            weights: Params, x_BTD: jax.Array, index: jax.Array | int, cache: Cache | None, shared: Any
        ) -> tuple[jax.Array, Cache | None]:
            sequence, table, dropout, start = shared
            site = None if dropout is None else dropout.at(index)
            return self._bind_layer(weights)(x_BTD, sequence, table, context, site, tap, cache, start)

        regathered = tuple(axis for axis in ("fsdp",) if axis in context.comm.live)
        apply_layer = rematerialize(apply_layer, recompute, regathered, scanned=setup.scans_layers)
        # Sites of the layers start at 1: site 0 is the embedding's.
        x_BTD = model.embed(tokens_BT, sequence, context, None if dropout is None else dropout.at(0))
        shared = (sequence, table, dropout, start)
        num_layers = setup.run.model.num_layers
        if not setup.scans_layers:
            assert caches is None
            for index, weights in enumerate(prepared["layers"]):
                x_BTD, _ = apply_layer(weights, x_BTD, index + 1, None, shared)
            return x_BTD, None

        def visit(x_BTD: jax.Array, layer: tuple[Params, jax.Array, Cache | None]) -> tuple[jax.Array, Cache | None]:
            weights, index, cache = layer
            return context.comm.varying(apply_layer(weights, x_BTD, index, cache, shared))

        layers = (prepared["layers"], jnp.arange(1, num_layers + 1), caches)
        return lax.scan(visit, context.comm.varying(x_BTD), layers)

    def microbatch_loss(self, prepared: Any, inputs: Inputs, key: jax.Array | None) -> jax.Array:
        """This device's part of the weighted loss sum of a microbatch, float32 nats.

        Args:
            inputs: Local rows of the microbatch.
            key: Of the step's dropout; None: no dropout.
        """
        model = self.bind(prepared)
        rate = self.setup.run.train.dropout
        dropout = Dropout(key, inputs["rows"], rate) if key is not None and rate > 0 else None
        x_BTD, _ = self.hidden(model, prepared, inputs, dropout)
        chunk = self.setup.run.train.loss_chunk_tokens
        return model.loss(x_BTD, inputs["targets"], inputs["weights"], self.setup.context, chunk)
