"""The decoder family: GPT-2, GPT-3, Megatron and Llama, by config.

    x = embed(tokens) + positions
    for each layer:  x = x + attention(norm(x));  x = x + feedforward(norm(x))
    logits = norm(x) @ head^T

Architecture only: no mesh axis, no collective, no recompute policy is decided here.
"""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp

from mtx.config import schema
from mtx.models import Ends
from mtx.nn.attention import Attention, Cache
from mtx.nn.context import Context, Dropout, Extras, Sequence, Tap, drop
from mtx.nn.embedding import Embedding, LearnedPositions
from mtx.nn.experts import Experts
from mtx.nn.feedforward import FeedForward
from mtx.nn.loss import Rows, cross_entropy
from mtx.nn.norm import Norm
from mtx.nn.param import Module, Params, Rngs, param, stack
from mtx.nn.position import rotary_table

RotaryTable = tuple[jax.Array, jax.Array]


class Layer(Module):
    """Two residual branches. In the stack `expert_layers` the second one sends each token to a few of many MLPs."""

    def __init__(self, rngs: Rngs, config: schema.Model, stack_name: str):
        self.attention_norm = Norm(rngs, config)
        self.attention = Attention(rngs, config)
        self.feedforward_norm = Norm(rngs, config)
        self.feedforward = Experts(rngs, config) if stack_name == "expert_layers" else FeedForward(rngs, config)

    def __call__(
        self,
        x_BTD: jax.Array,
        sequence: Sequence,
        table: RotaryTable | None,
        context: Context,
        dropout: Dropout | None,
        tap: Tap,
        cache: Cache | None = None,
        start: jax.Array | None = None,
    ) -> tuple[jax.Array, Cache | None, Extras]:
        """[B, T, D] sharded as `seq_sp` -> the same, the cache with this layer's keys and values, and the extras."""
        y_BTD = self.attention_norm(x_BTD, context.dtype)
        y_BTD, cache = self.attention(y_BTD, sequence, table, context, tap, cache, start)
        x_BTD = tap("after_attention", x_BTD + drop(dropout, 0, y_BTD, context.comm))
        y_BTD, extras = self.feedforward(self.feedforward_norm(x_BTD, context.dtype), sequence, context, tap)
        return x_BTD + drop(dropout, 1, y_BTD, context.comm), cache, extras


class Head(Module):
    """The untied output matrix, a row per token of the vocabulary."""

    def __init__(self, rngs: Rngs, config: schema.Model):
        shape, axes = (config.vocab_size, config.d_model), ("vocab", "embed")
        self.table = param(rngs, jax.nn.initializers.normal(config.init_std), shape, axes)


class Decoder(Module):
    """Embedding, one stack of layers or two (`schema.Model.layer_stacks`), and the head."""

    def __init__(self, rngs: Rngs, config: schema.Model):
        self.config = config
        self.embedding = Embedding(rngs, config.vocab_size, config.d_model, config.init_std)
        learned = config.position == "learned"
        self.positions = (
            LearnedPositions(rngs, config.max_seq_len, config.d_model, config.init_std) if learned else None
        )
        for name in sorted(set(config.layer_stacks), reverse=True):  # `layers` first
            setattr(
                self, name, stack(partial(Layer, config=config, stack_name=name), rngs, config.layer_stacks.count(name))
            )
        self.final_norm = Norm(rngs, config)
        self.head = None if config.tie_embeddings else Head(rngs, config)

    def embed(
        self, tokens_BT: jax.Array, sequence: Sequence, context: Context, dropout: Dropout | None = None
    ) -> jax.Array:
        """int32 [B, T] sharded as `seq` -> [B, T, D] sharded as `seq_sp`."""
        x_BTD = self.embedding(tokens_BT, context)
        if self.positions is not None:
            x_BTD = x_BTD + self.positions(sequence, context)
        return drop(dropout, 0, x_BTD, context.comm)

    def add_embed_gradient(
        self,
        totals: Params,
        dx_BTD: jax.Array,
        tokens_BT: jax.Array,
        sequence: Sequence,
        context: Context,
        dropout: Dropout | None = None,
    ) -> Params:
        """Adds the gradient of the parameters that `embed` uses to accumulators, in place.

        Args:
            totals: Nested dict of these parameters.
            dx_BTD: Gradient by the output of `embed`.
        """
        dx_BTD = drop(dropout, 0, dx_BTD, context.comm)  # its own transpose
        total = totals["embedding"]["table"]
        new = {"embedding": {"table": self.embedding.add_gradient(total, dx_BTD, tokens_BT, context)}}
        if self.positions is not None:
            total = totals["positions"]["table"]
            new["positions"] = {"table": self.positions.add_gradient(total, dx_BTD, sequence, context)}
        return new

    def rotary_table(self, sequence: Sequence, context: Context) -> RotaryTable | None:
        """What all layers share about the tokens' places; computed once."""
        return rotary_table(self.config, sequence.places(context.comm)) if self.config.position == "rotary" else None

    def _finish(self, x_BTD: jax.Array, context: Context) -> tuple[jax.Array, jax.Array]:
        head_VD = (self.embedding if self.head is None else self.head).table[...].astype(context.dtype)
        return self.final_norm(x_BTD, context.dtype), head_VD

    def loss(
        self,
        x_BTD: jax.Array,
        targets_BT: jax.Array,
        weights_BT: jax.Array,
        context: Context,
        chunk_tokens: int | None = None,
        rows: Rows | None = None,
    ) -> jax.Array:
        """This device's part of the weighted sum of cross entropies (nats); equal on devices that share its tokens.

        Args:
            x_BTD: Output of the last layer, sharded as `seq_sp`.
            targets_BT: int32, sharded as `seq`.
            weights_BT: float32, sharded as `seq`.
            chunk_tokens: Tokens whose logits are in memory at a time.
            rows: Which rows of the vocabulary the head has here; None: the shard of `vocab`.
        """
        comm = context.comm
        x_BTD, head_VD = self._finish(x_BTD, context)
        if comm.share_axis("vocab", "seq_sp"):  # then each device needs the tokens of those with other rows
            tokens_axis, x_BTD = "seq", comm.gather(x_BTD, "seq_sp", "seq", 1)
        else:
            tokens_axis = "seq_sp"
            targets_BT, weights_BT = (comm.split(a, "seq", "seq_sp", 1) for a in (targets_BT, weights_BT))
        loss = cross_entropy(comm, x_BTD, head_VD, targets_BT, weights_BT, chunk_tokens, rows)
        return comm.average_copies(loss, "batch", tokens_axis, "layers")

    def logits(self, x_BTD: jax.Array, context: Context) -> jax.Array:
        """float32 [B, T, V], whole on every device, of the output of the last layer sharded as `seq_sp`."""
        comm = context.comm
        x_BTD, head_VD = self._finish(x_BTD, context)
        x_BTD = comm.gather(x_BTD, "seq_sp", "seq", 1)
        logits_BTV = jnp.einsum("btd,vd->btv", x_BTD, head_VD, preferred_element_type=jnp.float32)
        return comm.join_copies(logits_BTV, "vocab", 2)


def ends(config: schema.Model) -> Ends:
    """What is before the first layer and after the last."""
    table = "embedding" if config.tie_embeddings else "head"
    positions = ("positions",) if config.position == "learned" else ()
    return Ends(embed=("embedding", *positions), head=("final_norm", table), table=table)


Model = Decoder
