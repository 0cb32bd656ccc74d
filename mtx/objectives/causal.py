"""Predict the next token from those before it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from mtx.config.schema import Objective

if TYPE_CHECKING:
    import jax


@dataclass(frozen=True, kw_only=True)
class Causal(Objective):
    """Causal language modelling: the target of a position is the token that follows it."""

    def inputs(self, batch: dict[str, Any]) -> dict[str, jax.Array]:
        """What the model sees and what it must predict. Pure; takes NumPy and traced arrays.

        Args:
            batch: `tokens`: int32[B, T+1]. Optional: `segments`: int32[B, T+1], the document that each token belongs
                to, from 1, 0 in padding, with `positions`: int32[B, T+1], its place in there; `weights`:
                float32[B, T], 0 for targets that only fill the batch.

        Returns:
            `tokens`, `targets`: int32[B, T]; `weights`: float32[B, T], 0 where the target belongs to another document,
            to padding or is filled in; `segments` and `positions` of `tokens` where the batch has them.
        """
        import jax.numpy as jnp

        tokens = jnp.asarray(batch["tokens"])
        inputs = {"tokens": tokens[:, :-1], "targets": tokens[:, 1:]}
        weights = jnp.ones(inputs["targets"].shape, jnp.float32)
        if "segments" in batch:
            segments = jnp.asarray(batch["segments"])
            weights *= (segments[:, 1:] == segments[:, :-1]) & (segments[:, 1:] != 0)
            inputs |= {"segments": segments[:, :-1], "positions": jnp.asarray(batch["positions"])[:, :-1]}
        if "weights" in batch:
            weights *= jnp.asarray(batch["weights"])
        return inputs | {"weights": weights}
