"""From the scores of the next token to a token.

Invariant: the random bits of a token depend on the seed, the sample's number and the token's place in the row, never on
the layout, on how many samples are drawn together, or on whether keys and values are cached.
"""

from __future__ import annotations

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jax import lax

from mtx.errors import UserError


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How tokens are drawn. The three narrow the distribution in this order; hashable, for it is part of the program.

    Attributes:
        temperature: Scores are divided by it; 0: always the most likely token.
        top_k: Draw among this many most likely tokens; None: among all.
        top_p: Draw among the fewest most likely tokens that have this probability together (arXiv 1904.09751).

    Raises:
        UserError: A value is out of range or has no effect.
    """

    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None

    def __post_init__(self) -> None:
        if not 0 <= self.temperature < float("inf"):
            raise UserError(f"temperature {self.temperature}: give 0 (the most likely token) or more, such as 0.8")
        if self.top_k is not None and self.top_k < 1:
            raise UserError(f"top-k {self.top_k}: give a number of tokens, 1 or more")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise UserError(f"top-p {self.top_p}: give a probability above 0 and up to 1")
        if self.temperature == 0 and (self.top_k is not None or self.top_p is not None):
            raise UserError("top-k and top-p have no effect at temperature 0: leave them out, or raise the temperature")


def choose_tokens(logits_BV: jax.Array, sampling: Sampling, key: jax.Array, place: jax.Array) -> jax.Array:
    """int32[B]: a token for each row of float32 logits.

    Args:
        key: Of the seed.
        place: int32, where in their rows the tokens will stand.
    """
    if sampling.temperature == 0:
        return logits_BV.argmax(-1).astype(jnp.int32)
    logits_BV = logits_BV / sampling.temperature
    if sampling.top_k is not None and sampling.top_k < logits_BV.shape[1]:
        smallest_B1 = lax.top_k(logits_BV, sampling.top_k)[0][:, -1:]
        logits_BV = jnp.where(logits_BV < smallest_B1, -jnp.inf, logits_BV)
    if sampling.top_p is not None:
        sorted_BV = jnp.sort(logits_BV, axis=-1, descending=True)
        likelier_BV = jax.nn.softmax(sorted_BV, axis=-1)
        likelier_BV = jnp.cumsum(likelier_BV, axis=-1) - likelier_BV  # probability of all tokens before this one
        smallest_B1 = jnp.where(likelier_BV < sampling.top_p, sorted_BV, jnp.inf).min(-1, keepdims=True)
        logits_BV = jnp.where(logits_BV < smallest_B1, -jnp.inf, logits_BV)

    def draw(row: jax.Array, logits_V: jax.Array) -> jax.Array:
        return jax.random.categorical(jax.random.fold_in(jax.random.fold_in(key, row), place), logits_V)

    return jax.vmap(draw)(jnp.arange(logits_BV.shape[0]), logits_BV).astype(jnp.int32)
