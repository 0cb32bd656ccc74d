"""Mixture of experts: each token is sent to a few of many MLPs."""

from __future__ import annotations

import jax

from mtx.config.schema import Model
from mtx.nn.context import Context, Extras, Sequence, Tap
from mtx.nn.param import Module, Params, Rngs


class Experts(Module):
    """Router and experts."""

    def __init__(self, rngs: Rngs, config: Model):
        self.config = config

    def __call__(self, x_BTD: jax.Array, sequence: Sequence, context: Context, tap: Tap) -> tuple[jax.Array, Extras]:
        """[B, T, D] sharded as `seq_sp` -> the same, and what was routed where."""
        raise NotImplementedError


def balance(stack: Params, load_LE: jax.Array, rate: float) -> Params:
    """Moves the biases of a stack of layers towards an even load (arXiv 2408.15664)."""
    raise NotImplementedError
