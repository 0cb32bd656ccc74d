"""The MLP of a transformer layer, plain or gated (arXiv 2002.05202)."""

from __future__ import annotations

from collections.abc import Callable

import jax

from mtx.config.schema import Model
from mtx.nn.context import Context, Extras, Sequence, Tap
from mtx.nn.linear import Linear
from mtx.nn.param import Module, Rngs


def _gelu(x: jax.Array) -> jax.Array:
    return jax.nn.gelu(x, approximate=False)


ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "gelu": _gelu,
    "gelu_tanh": jax.nn.gelu,
    "relu": jax.nn.relu,
    "silu": jax.nn.silu,
    "swiglu": jax.nn.silu,
    "geglu": jax.nn.gelu,
}


class FeedForward(Module):
    """x -> act(x W_up) W_down, or (act(x W_gate) * x W_up) W_down where the activation is gated.

    Args:
        width: Of the hidden layer; None: the config's.
    """

    def __init__(self, rngs: Rngs, config: Model, width: int | None = None):
        width = width or config.ff_width
        wide, narrow = (config.d_model, width), (width, config.d_model)
        std = config.init_std
        self.activation = config.activation
        self.gate = Linear(rngs, wide, ("embed", "mlp"), std=std, use_bias=config.use_bias) if config.gated else None
        self.up = Linear(rngs, wide, ("embed", "mlp"), std=std, use_bias=config.use_bias)
        # Residual branches start smaller, so that the stream's variance does not grow with depth (GPT-2).
        residual_std = std / (2 * config.num_layers) ** 0.5
        self.down = Linear(rngs, narrow, ("mlp", "embed"), std=residual_std, use_bias=config.use_bias)

    def __call__(self, x_BTD: jax.Array, sequence: Sequence, context: Context, tap: Tap) -> tuple[jax.Array, Extras]:
        """[B, T, D] sharded as `seq_sp` -> the same, and no extras."""
        comm = context.comm
        partial_BTD = self.partial(tap("mlp_in", comm.gather(x_BTD, "seq_sp", "seq", 1)), context, tap)
        return self.down.add_bias(comm.reduce(partial_BTD, "mlp", "seq", "seq_sp", 1)), {}

    def partial(self, x_BTD: jax.Array, context: Context, tap: Tap) -> jax.Array:
        """[B, T, D] sharded as `seq` -> partial sums over the shards of `mlp`, without the last bias."""
        act = ACTIVATIONS[self.activation]
        factor_BTD = context.factor("mlp", x_BTD)
        hidden_BTF = tap("mlp_hidden", self.up(factor_BTD, context.dtype))
        if self.gate is None:
            hidden_BTF = act(hidden_BTF)
        else:
            hidden_BTF = act(tap("mlp_gate", self.gate(factor_BTD, context.dtype))) * hidden_BTF
        return self.down.multiply(context.factor("mlp", hidden_BTF), context.dtype)
