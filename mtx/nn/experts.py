"""Mixture of experts: each token is sent to a few of many MLPs, wherever they are, and their outputs are added.

Decides how tokens travel. Each choice (a token and one of its experts) gets a slot in a buffer; a buffer is a list of
rows, and both ways between tokens and slots are gathers. With experts split over devices, buffers are exchanged:

    capacity   [E, B * C] slots: those of an expert for each row of the batch; what has no slot is dropped
    dropless   the choices sorted by expert; for each shard of experts room for all of them, so that nothing is dropped

A token's weight is multiplied to the hidden layer of its expert, before the last matrix: the same sum, and the backward
pass does not need the experts' outputs.

Invariant: no array grows with tokens * experts * slots, and rows that belong to no token are zero wherever gradients
are summed.

Letters: E experts, K experts of a token, N = B * T tokens, R rows of a buffer, C slots of an expert for one row.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import jax
import jax.numpy as jnp

from mtx.collectives import shared_varying
from mtx.config.schema import Model
from mtx.nn.context import Context, Extras, Sequence, Tap
from mtx.nn.feedforward import ACTIVATIONS, FeedForward
from mtx.nn.grouped import Blocks
from mtx.nn.param import Module, Params, Rngs, param
from mtx.nn.router import Router, Routing, count_choices, rank_choices, slots_per_row


class ExpertLinear(Module):
    """y = x @ w + b for each of E experts."""

    def __init__(self, rngs: Rngs, shape: tuple[int, int, int], axes: tuple[str, str], *, std: float, use_bias: bool):
        names = ("experts", *axes)
        self.weight = param(rngs, jax.nn.initializers.normal(std), shape, names)
        zeros = jax.nn.initializers.zeros
        self.bias = param(rngs, zeros, (shape[0], shape[2]), (names[0], names[2])) if use_bias else None

    def multiply_slots(self, x_ERI: jax.Array, scale_ER: jax.Array | None) -> jax.Array:
        """[E, R, inputs] -> [E, R, outputs]; the bias is multiplied by `scale`, None: by one."""
        y_ERO = jnp.einsum("eri,eio->ero", *shared_varying(x_ERI, self.weight[...].astype(x_ERI.dtype)))
        if self.bias is None:
            return y_ERO
        bias_E1O = self.bias[...][:, None].astype(y_ERO.dtype)
        return y_ERO + (bias_E1O if scale_ER is None else scale_ER[..., None].astype(y_ERO.dtype) * bias_E1O)

    def multiply_blocks(self, x_RI: jax.Array, scale_R: jax.Array | None, blocks: Blocks) -> jax.Array:
        """[R, inputs] in blocks by expert -> [R, outputs]."""
        y_RO = blocks.multiply(x_RI, self.weight[...].astype(x_RI.dtype))
        if self.bias is None:
            return y_RO
        scale_R = jnp.ones(x_RI.shape[:1], x_RI.dtype) if scale_R is None else scale_R.astype(x_RI.dtype)
        return y_RO + blocks.multiply(scale_R[:, None], self.bias[...][:, None].astype(x_RI.dtype))


Product = Callable[[ExpertLinear, jax.Array, jax.Array | None], jax.Array]
"""(layer, rows, scale of the bias) -> rows."""


def _take(x_ND: jax.Array, index: jax.Array) -> jax.Array:
    """Rows of x; zero where the index is beyond them."""
    return jnp.take(x_ND, index, axis=0, mode="fill", fill_value=0)


Saved = tuple[jax.Array, jax.Array]
# Between tokens and slots both directions are known, so that no gradient has to be added up at random places: on a GPU
# that would be slow, and another sum every time.


@jax.custom_vjp
def _gather(x_ND: jax.Array, token_R: jax.Array, slot_NK: jax.Array) -> jax.Array:
    """The token of each slot."""
    return _take(x_ND, token_R)


def _gather_forward(x_ND: jax.Array, token_R: jax.Array, slot_NK: jax.Array) -> tuple[jax.Array, Saved]:
    return _gather(x_ND, token_R, slot_NK), (token_R, slot_NK)


def _gather_backward(saved: Saved, d_RD: jax.Array) -> tuple[jax.Array, None, None]:
    return _gather_sum(d_RD, *saved), None, None


@jax.custom_vjp
def _gather_sum(rows_RD: jax.Array, token_R: jax.Array, slot_NK: jax.Array) -> jax.Array:
    """The sum of the slots of each token."""
    return _take(rows_RD, slot_NK).sum(1)


def _gather_sum_forward(rows_RD: jax.Array, token_R: jax.Array, slot_NK: jax.Array) -> tuple[jax.Array, Saved]:
    return _gather_sum(rows_RD, token_R, slot_NK), (token_R, slot_NK)


def _gather_sum_backward(saved: Saved, d_ND: jax.Array) -> tuple[jax.Array, None, None]:
    return _gather(d_ND, *saved), None, None


_gather.defvjp(_gather_forward, _gather_backward)
_gather_sum.defvjp(_gather_sum_forward, _gather_sum_backward)


@dataclass(frozen=True)
class Slots:
    """Which choice is in which slot of a buffer, both ways round.

    Attributes:
        slot_NK: int32, the slot of each choice; R: it has none.
        choice_R: int32, the choice in each slot, n * K + k; N * K: it is empty.
    """

    slot_NK: jax.Array
    choice_R: jax.Array

    @staticmethod
    def from_choices(slot_NK: jax.Array, rows: int) -> Slots:
        """The slots of a buffer of `rows`."""
        choice_R = jnp.full(rows, slot_NK.size, jnp.int32)
        choices = jnp.arange(slot_NK.size, dtype=jnp.int32)
        return Slots(slot_NK, choice_R.at[slot_NK.reshape(-1)].set(choices, mode="drop"))

    @property
    def token_R(self) -> jax.Array:
        """The token in each slot; N: it is empty."""
        return self.choice_R // self.slot_NK.shape[1]

    def send(self, x_ND: jax.Array) -> jax.Array:
        """Each slot's token; zero where it is empty."""
        return _gather(*shared_varying(x_ND, self.token_R, self.slot_NK))

    def send_choices(self, weights_NK: jax.Array) -> jax.Array:
        """[N, K] -> [R]: what belongs to each slot's choice; zero where it is empty."""
        return _gather(*shared_varying(weights_NK.reshape(-1, 1), self.choice_R, self.slot_NK.reshape(-1, 1)))[:, 0]

    def collect(self, rows_RD: jax.Array) -> jax.Array:
        """[N, D]: the sum of each token's slots."""
        return _gather_sum(*shared_varying(rows_RD, self.token_R, self.slot_NK))


class Experts(Module):
    """Router, routed experts, and those that every token goes to."""

    def __init__(self, rngs: Rngs, config: Model):
        self.config = config
        experts, width, std = config.num_experts, config.expert_d_ff or config.ff_width, config.init_std
        wide, narrow, bias = (experts, config.d_model, width), (experts, width, config.d_model), config.use_bias
        self.router = Router(rngs, config)
        self.gate = ExpertLinear(rngs, wide, ("embed", "mlp"), std=std, use_bias=bias) if config.gated else None
        self.up = ExpertLinear(rngs, wide, ("embed", "mlp"), std=std, use_bias=bias)
        residual_std = std / (2 * config.num_layers) ** 0.5  # as that of `FeedForward`
        self.down = ExpertLinear(rngs, narrow, ("mlp", "embed"), std=residual_std, use_bias=bias)
        shared = config.num_shared_experts
        self.shared = FeedForward(rngs, config, shared * width) if shared else None

    def __call__(self, x_BTD: jax.Array, sequence: Sequence, context: Context, tap: Tap) -> tuple[jax.Array, Extras]:
        """[B, T, D] sharded as `seq_sp` -> the same, and what was routed where."""
        comm = context.comm
        x_BTD = tap("mlp_in", comm.gather(x_BTD, "seq_sp", "seq", 1))
        routing, extras = self.router(x_BTD, sequence, context, tap)
        # A capacity counts the slots of whole rows. Of a part of a row they would be empty for the most part.
        in_slots = routing.ranks_BTK is not None and not comm.axes("seq")
        partial_BTD = (self._in_slots if in_slots else self._sorted)(x_BTD, routing, context, tap)
        if self.shared is not None:
            partial_BTD = partial_BTD + self.shared.partial(x_BTD, context, tap)
        y_BTD = comm.reduce(partial_BTD, "mlp", "seq", "seq_sp", 1)
        return y_BTD if self.shared is None else self.shared.down.add_bias(y_BTD), extras

    def _mlp(self, rows: jax.Array, weights: jax.Array, multiply: Product, context: Context, tap: Tap) -> jax.Array:
        """The experts' outputs times the weights of the choices: partial sums over the shards of `mlp`."""
        act = ACTIVATIONS[self.config.activation]
        rows, weights = tap("expert_in", rows), tap("expert_weights", weights)
        hidden = tap("expert_hidden", multiply(self.up, rows, None))
        if self.gate is None:
            hidden = act(hidden)
        else:
            hidden = act(tap("expert_gate", multiply(self.gate, rows, None))) * hidden
        hidden = (hidden * weights[..., None]).astype(context.dtype)
        # The last bias is no partial sum: one shard adds it.
        return multiply(self.down, hidden, jnp.where(context.comm.index("mlp") == 0, weights, 0))

    def _in_slots(self, x_BTD: jax.Array, routing: Routing, context: Context, tap: Tap) -> jax.Array:
        """A capacity: every expert has the same number of rows."""
        comm, (batch, length, width) = context.comm, x_BTD.shape
        experts, capacity = self.config.num_experts, slots_per_row(self.config, length)
        assert routing.ranks_BTK is not None
        row_B11 = jnp.arange(batch)[:, None, None]
        slot_BTK = (routing.ids_BTK * batch + row_B11) * capacity + routing.ranks_BTK
        rows = experts * batch * capacity
        slot_NK = jnp.where(routing.ids_BTK < experts, slot_BTK, rows).reshape(batch * length, -1)
        slots = Slots.from_choices(slot_NK, rows)

        def exchange(a: jax.Array) -> jax.Array:
            return comm.exchange(a.reshape(experts, -1, *a.shape[1:]), "experts", 0, 1)

        x_ERD = exchange(slots.send(x_BTD.reshape(-1, width)))
        weights_ER = exchange(slots.send_choices(routing.weights_BTK))
        y_ERD = self._mlp(x_ERD, weights_ER, ExpertLinear.multiply_slots, context, tap)
        return slots.collect(comm.exchange(y_ERD, "experts", 1, 0).reshape(rows, width)).reshape(x_BTD.shape)

    def _sorted(self, x_BTD: jax.Array, routing: Routing, context: Context, tap: Tap) -> jax.Array:
        """Any number of rows for each expert."""
        comm, (batch, length, width) = context.comm, x_BTD.shape
        experts, choices = self.config.num_experts, self.config.experts_per_token
        shards = comm.size("experts")
        here = experts // shards
        room = batch * length * min(choices, here)  # in one shard a token can have no more
        ids = routing.ids_BTK.reshape(-1)
        ranks, sizes_PE = rank_choices(ids, experts), count_choices(ids, experts).reshape(shards, here)
        blocks = Blocks(sizes_PE[0], room)
        if shards == 1:
            slot, rows = blocks.rows_of(ids, ranks), blocks.rows
        else:
            starts_PE = jnp.cumsum(sizes_PE, 1) - sizes_PE + room * jnp.arange(shards)[:, None]
            rows = shards * room
            slot = jnp.take(starts_PE.reshape(-1), jnp.minimum(ids, experts - 1)) + ranks
            slot = jnp.where(ids < experts, slot, rows)
        slots = Slots.from_choices(slot.reshape(batch * length, choices), rows)
        x_RD, weights_R = slots.send(x_BTD.reshape(-1, width)), slots.send_choices(routing.weights_BTK)

        if shards > 1:  # what each shard sent is sorted in itself; all of it has to be
            x_RD, weights_R, sizes_PE = (comm.exchange(a, "experts", 0, 0) for a in (x_RD, weights_R, sizes_PE))
            sizes_PE = tap("expert_sizes", sizes_PE)
            ends_P1E = jnp.cumsum(sizes_PE, 1)[:, None]
            ids_R = (jnp.arange(room)[:, None] >= ends_P1E).sum(-1).reshape(-1)  # `here` where there is no token
            blocks = Blocks(sizes_PE.sum(0), rows)
            received = Slots.from_choices(blocks.rows_of(ids_R, rank_choices(ids_R, here))[:, None], blocks.rows)
            x_RD, weights_R = received.send(x_RD), received.send_choices(weights_R)

        def multiply(layer: ExpertLinear, rows: jax.Array, scale: jax.Array | None) -> jax.Array:
            return layer.multiply_blocks(rows, scale, blocks)

        y_RD = self._mlp(x_RD, weights_R, multiply, context, tap)
        if shards > 1:
            y_RD = comm.exchange(received.collect(y_RD), "experts", 0, 0)
        return slots.collect(y_RD).reshape(x_BTD.shape)


def balance(stack: Params, load_LE: jax.Array, rate: jax.Array | float) -> Params:
    """Moves the biases of a stack of layers towards an even load (arXiv 2408.15664).

    Args:
        stack: Nested dict of stacked parameters; its leaves `balance_bias` are [L, E].
        load_LE: Tokens sent to each expert of each layer. Rows without tokens leave their biases as they are.
        rate: What is added to the bias of an expert with less than the mean load, and taken from one with more; 0
            leaves all biases as they are, and with it the load may be anything.
    """
    step_LE = jnp.where(rate == 0, 0.0, rate * jnp.sign(load_LE.mean(1, keepdims=True) - load_LE))

    def move(name: str, leaf: Params | jax.Array) -> Params | jax.Array:
        if isinstance(leaf, dict):
            return balance(leaf, load_LE, rate)
        return (leaf + step_LE).astype(leaf.dtype) if name == "balance_bias" else leaf

    return {name: move(name, leaf) for name, leaf in stack.items()}
