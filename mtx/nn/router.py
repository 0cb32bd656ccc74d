"""Which experts a token is sent to, with which weights, and what that costs in balance.

    logits = x W_router            float32
    scores = softmax(logits)       or sigmoid(logits), which is each expert's own
    chosen = the K largest         of scores + balance_bias
    weights = scores[chosen]       divided by their sum, unless a token has one expert only

Decides nothing about how tokens travel. Padding (segment 0) is sent to no expert and counted nowhere.

Invariant: what is decided for a row depends on that row alone, so that no layout and no microbatch size changes it.

Letters: E experts, K experts of a token, C slots of an expert for one row.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jax import lax

from mtx.collectives import Comm
from mtx.config.schema import Model
from mtx.nn.context import Context, Extras, Sequence, Tap
from mtx.nn.linear import Linear
from mtx.nn.param import Module, Rngs, param


@dataclass(frozen=True)
class Routing:
    """Where the tokens of this device go.

    Attributes:
        ids_BTK: int32, the experts of each token, the best first; E: none (padding, or no slot left).
        weights_BTK: float32, with which the outputs of these experts are added.
        ranks_BTK: int32, how many choices of the whole row are served before this one by the same expert; None without
            a capacity.
    """

    ids_BTK: jax.Array
    weights_BTK: jax.Array
    ranks_BTK: jax.Array | None


class Router(Module):
    """The matrix that scores experts, and the biases that balance them."""

    def __init__(self, rngs: Rngs, config: Model):
        self.config = config
        shape, axes = (config.d_model, config.num_experts), ("embed", "router")
        self.score = Linear(rngs, shape, axes, std=config.init_std, use_bias=False)
        zeros, balanced = jax.nn.initializers.zeros, config.expert_bias_rate > 0
        self.balance_bias = param(rngs, zeros, shape[1:], axes[1:]) if balanced else None

    def __call__(self, x_BTD: jax.Array, sequence: Sequence, context: Context, tap: Tap) -> tuple[Routing, Extras]:
        """[B, T, D] sharded as `seq` -> where each token goes, and the extras of the layer."""
        config, comm = self.config, context.comm
        with jax.default_matmul_precision("highest"):  # half the digits would send other tokens elsewhere
            logits_BTE = tap("router_logits", self.score(x_BTD.astype(jnp.float32), jnp.float32))
        softmax = config.router_score == "softmax"
        scores_BTE = jax.nn.softmax(logits_BTE) if softmax else jax.nn.sigmoid(logits_BTE)
        ranking_BTE = lax.stop_gradient(scores_BTE)
        if self.balance_bias is not None:
            ranking_BTE = ranking_BTE + lax.stop_gradient(self.balance_bias[...])
        # Kept for the backward pass: rounded another way, two scores that are almost equal would change places.
        ids_BTK = tap("expert_ids", lax.top_k(ranking_BTE, config.experts_per_token)[1])
        chosen_BTKE = ids_BTK[..., None] == jnp.arange(config.num_experts)
        weights_BTK = jnp.where(chosen_BTKE, scores_BTE[..., None, :], 0).sum(-1)
        normalize = config.normalize_expert_weights
        if config.experts_per_token > 1 if normalize is None else normalize:
            weights_BTK = weights_BTK / (weights_BTK.sum(-1, keepdims=True) + 1e-20)

        valid_BT = jnp.ones(ids_BTK.shape[:2], bool) if sequence.segments_BT is None else sequence.segments_BT != 0
        routed_BTK = jnp.where(valid_BT[..., None], ids_BTK, config.num_experts)
        ranks_BTK, sent_BTK = None, routed_BTK
        if config.expert_capacity_factor is not None:
            capacity = slots_per_row(config, sequence.length * comm.size("seq"))
            ranks_BTK = tap("expert_ranks", _rank_in_row(comm, routed_BTK, config.num_experts))
            sent_BTK = jnp.where(ranks_BTK < capacity, routed_BTK, config.num_experts)

        probabilities_BTE = scores_BTE if softmax else scores_BTE / (scores_BTE.sum(-1, keepdims=True) + 1e-20)
        count_BE = (chosen_BTKE & valid_BT[..., None, None]).sum((1, 2)).astype(jnp.float32)
        extras = {
            **_losses(comm, config, logits_BTE, probabilities_BTE, count_BE, valid_BT.astype(jnp.float32)),
            "expert_load": count_BE.sum(0),
            "dropped": (sent_BTK != routed_BTK).sum().astype(jnp.float32),
        }
        extras = {name: comm.average_copies(value, "batch", "seq", "layers") for name, value in extras.items()}
        return Routing(sent_BTK, weights_BTK, ranks_BTK), extras


def slots_per_row(config: Model, length: int) -> int:
    """Slots that an expert has for each row of `length` tokens (C)."""
    assert config.expert_capacity_factor is not None
    wanted = config.expert_capacity_factor * config.experts_per_token * length / config.num_experts
    return min(math.ceil(wanted), length)


def count_choices(ids: jax.Array, num_experts: int) -> jax.Array:
    """int32 [..., N] -> int32 [..., E]: how often each expert is chosen."""
    return (ids[..., None] == jnp.arange(num_experts)).sum(-2, dtype=jnp.int32)


def rank_choices(ids: jax.Array, num_experts: int) -> jax.Array:
    """int32 [..., N] -> int32 [..., N]: how many choices of the same expert come before this one. By sorting."""
    counts = count_choices(ids, num_experts)
    starts = jnp.cumsum(counts, -1) - counts
    order = jnp.argsort(ids, axis=-1, stable=True)
    places = jnp.argsort(order, axis=-1)
    return places - jnp.take_along_axis(starts, jnp.minimum(ids, num_experts - 1), axis=-1)


def _rank_in_row(comm: Comm, ids_BTK: jax.Array, num_experts: int) -> jax.Array:
    """Ranks among all choices of a row: first choices before second ones, and in the order of the tokens."""
    places_T = comm.places(ids_BTK.shape[1])
    order_T = jnp.argsort(comm.gather_all(places_T, "seq", 0))
    ids_BTK = jnp.take(comm.gather_all(ids_BTK, "seq", 1), order_T, axis=1)
    batch, length, choices = ids_BTK.shape
    ranks = rank_choices(ids_BTK.swapaxes(1, 2).reshape(batch, -1), num_experts)
    return jnp.take(ranks.reshape(batch, choices, length).swapaxes(1, 2), places_T, axis=1)


def _losses(
    comm: Comm,
    config: Model,
    logits_BTE: jax.Array,
    probabilities_BTE: jax.Array,
    count_BE: jax.Array,
    valid_BT: jax.Array,
) -> Extras:
    """The balance loss of each row (arXiv 2412.19437, equations 17 to 20) and the z loss (arXiv 2202.08906), summed.

    Without valid tokens a row has none. Both are this device's part: the balance loss is equal on the shards of a row.
    """
    tokens_B = jnp.maximum(comm.sum(valid_BT.sum(1), "seq"), 1)
    shared_BE = comm.sum(count_BE, "seq") / (config.experts_per_token * tokens_B[:, None])
    mean_BE = comm.sum((probabilities_BTE * valid_BT[..., None]).sum(1), "seq") / tokens_B[:, None]
    z_BT = jax.nn.logsumexp(logits_BTE, -1) ** 2 * valid_BT
    return {
        "load_balance_loss": config.num_experts * (shared_BE * mean_BE).sum(),
        "router_z_loss": (z_BT.sum(1) / tokens_B).sum(),
    }
