"""What a step adds up over its microbatches and devices besides gradients: losses, and counts of routed tokens.

Decides what each loss is divided by and with which weight it enters the objective that is differentiated:

    objective = loss / target weight + sum over layers of coefficient * auxiliary loss / sequences

Both divisors are known before any forward pass, so every microbatch's gradient is final up to a sum.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from mtx.config import schema
from mtx.sharding import Rules

Sums = dict[str, jax.Array]
"""`loss` (nats, weighted by the targets' weights) and, where there are experts, the extras of their layers
(`mtx.nn.context.Extras`): losses summed over layers, counts stacked [layers with experts, ...]."""

COUNTS = ("expert_load", "dropped")
"""Not differentiated, and kept apart by layer."""


def names_of_sums(model: schema.Model) -> tuple[str, ...]:
    """What there is to add up for a model."""
    routed = "expert_layers" in model.layer_stacks
    return ("loss", *(("load_balance_loss", "router_z_loss", *COUNTS) if routed else ()))


def split_counts(sums: Sums) -> tuple[Sums, Sums]:
    """The losses and the counts."""
    return {k: v for k, v in sums.items() if k not in COUNTS}, {k: v for k, v in sums.items() if k in COUNTS}


def sums_spec(rules: Rules, name: str) -> P:
    """How a finished sum lies on the mesh: counts are split as the layers are."""
    axes = rules["layers"]
    return P(axes) if name in COUNTS and axes else P()


def divisors_of_losses(model: schema.Model, weight: jax.Array, num_sequences: jax.Array | int) -> Sums:
    """What makes a mean of each summed loss: the weight of all targets, and the sequences of the batch."""
    losses, _ = split_counts(dict.fromkeys(names_of_sums(model), weight))
    return {name: weight if name == "loss" else weight * 0 + num_sequences for name in losses}


def coefficient(model: schema.Model, name: str) -> float:
    """With which weight a mean loss enters the objective."""
    routing = {"load_balance_loss": model.load_balance_loss, "router_z_loss": model.router_z_loss}
    return 1.0 if name == "loss" else routing[name]


def as_metrics(totals: Sums) -> dict[str, jax.Array]:
    """What is logged: the losses; each expert's share of the routed tokens [E]; the largest load of an expert in any
    layer, relative to the mean of the layer; the number of dropped tokens."""
    losses, counts = split_counts(totals)
    if not counts:
        return losses
    load_LE = counts["expert_load"]
    mean_L = load_LE.mean(1)
    worst = (load_LE.max(1) / jnp.maximum(mean_L, 1e-9)).max()
    return {
        **losses,
        "expert_load": load_LE.sum(0) / load_LE.sum(),
        "expert_load_max": worst,
        "dropped_tokens": counts["dropped"].sum(),
    }
