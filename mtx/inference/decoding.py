"""Continuing a prompt, token by token, on the training mesh.

    fill the caches with the prompt                               one pass; a causal model does not mind what follows it
    until every row has ended or is long enough:
        logits = model(last token, caches)                        caches gain its keys and values
        token  = choose(logits)

Decides shapes and the loop. Prompts and rows are padded to powers of two, so that a few programs serve all lengths.

Invariant: without caches, where each token costs a pass over its whole row, the same tokens come out.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import PartitionSpec as P

from mtx.errors import UserError
from mtx.inference.layout import MATMUL_PRECISION
from mtx.inference.sampling import Sampling, choose_tokens
from mtx.nn.param import Params
from mtx.training.forward import Forward
from mtx.training.state import Setup

SMALLEST_BUCKET = 16
"""Tokens; shorter rows are padded to this."""

NO_TOKEN = -1


@dataclass(frozen=True)
class Generator:
    """Continues prompts with one model.

    Attributes:
        setup: Of `layout.for_inference`.
        use_cache: Whether keys and values of earlier tokens are kept, or computed anew for each token.
    """

    setup: Setup
    use_cache: bool = True

    def generate(
        self,
        params: Params,
        prompt: Sequence[int],
        *,
        max_tokens: int,
        sampling: Sampling,
        seed: int = 0,
        num_samples: int = 1,
        end_id: int = NO_TOKEN,
        usable_tokens: int | None = None,
    ) -> list[list[int]]:
        """The tokens that follow the prompt in each of `num_samples` samples; the last one is `end_id` if it came.

        Args:
            params: With the shardings of the setup's state.
            prompt: Token ids, at least one.
            max_tokens: Most tokens in a sample; fewer where the model's longest sequence leaves less room.
            end_id: Token that ends a sample; NO_TOKEN: none does.
            usable_tokens: Ids from here on are never chosen (rows of the embedding that no token has); None: all are.

        Raises:
            UserError: The prompt is empty, has ids that the model has not, or leaves no room for another token.
        """
        model = self.setup.run.model
        length, longest = len(prompt), model.max_seq_len
        if not length or min(prompt) < 0 or max(prompt) >= model.vocab_size:
            raise UserError(f"a prompt is one or more token ids from 0 to {model.vocab_size - 1} (Model.vocab_size)")
        if length >= longest:
            raise UserError(
                f"the prompt has {length} tokens and this model takes {longest} (Model.max_seq_len), the new ones "
                f"included: shorten it to {longest - 1} or fewer"
            )
        end = min(length + max_tokens, longest)
        tokens_BS = np.zeros((num_samples, _bucket(end, longest)), np.int32)
        tokens_BS[:, :length] = prompt
        with jax.default_matmul_precision(MATMUL_PRECISION):
            filled_BS, reached = self._program(
                params,
                tokens_BS,
                np.int32(length),
                np.int32(end),
                np.int32(end_id),
                jax.random.key(seed),
                prompt_size=_bucket(length, longest),
                sampling=sampling,
                usable_tokens=usable_tokens,
            )
        rows = np.asarray(filled_BS)[:, length : int(reached)].tolist()
        return [row[: row.index(end_id) + 1] if end_id in row else row for row in rows]

    @cached_property
    def _program(self) -> Callable[..., tuple[jax.Array, jax.Array]]:
        return jax.jit(self._generate, static_argnames=("prompt_size", "sampling", "usable_tokens"))

    def _generate(
        self,
        params: Params,
        *inputs: Any,
        prompt_size: int,
        sampling: Sampling,
        usable_tokens: int | None,
    ) -> tuple[jax.Array, jax.Array]:
        forward, context = Forward(self.setup), self.setup.context

        def body(
            params: Params, tokens_BS: jax.Array, length: jax.Array, end: jax.Array, end_id: jax.Array, key: jax.Array
        ) -> tuple[jax.Array, jax.Array]:
            prepared = forward.prepare(params)
            model = forward.bind(prepared)

            def logits_at(x_BTD: jax.Array, place: jax.Array | int) -> jax.Array:
                x_B1D = lax.dynamic_slice_in_dim(x_BTD, place, 1, axis=1)
                return model.logits(x_B1D, context)[:, 0, :usable_tokens]

            def score_next(tokens_BS: jax.Array, length: jax.Array, caches: Any) -> tuple[jax.Array, Any]:
                last = length - 1
                if caches is None:
                    x_BTD, _, _ = forward.hidden(model, prepared, {"tokens": tokens_BS})
                    return logits_at(x_BTD, last), None
                tokens_B1 = lax.dynamic_slice_in_dim(tokens_BS, last, 1, axis=1)
                inputs = {"tokens": tokens_B1, "positions": last[None, None]}
                x_B1D, caches, _ = forward.hidden(model, prepared, inputs, caches=caches, start=last)
                return logits_at(x_B1D, 0), caches

            def add_token(carry: tuple[Any, ...]) -> tuple[Any, ...]:
                tokens_BS, length, ended_B, caches = carry
                logits_BV, caches = score_next(tokens_BS, length, caches)
                chosen_B = jnp.where(ended_B, end_id, choose_tokens(logits_BV, sampling, key, length))
                tokens_BS = lax.dynamic_update_slice_in_dim(tokens_BS, chosen_B[:, None], length, axis=1)
                return tokens_BS, length + 1, ended_B | (chosen_B == end_id), caches

            caches = None
            if self.use_cache:
                # What the padding behind the prompt leaves in the caches is hidden until it is written over.
                caches = forward.empty_caches(*tokens_BS.shape)
                _, caches, _ = forward.hidden(model, prepared, {"tokens": tokens_BS[:, :prompt_size]}, caches=caches)
            ended_B = jnp.zeros(tokens_BS.shape[0], bool)
            tokens_BS, length, _, _ = lax.while_loop(
                lambda carry: (carry[1] < end) & ~carry[2].all(), add_token, (tokens_BS, length, ended_B, caches)
            )
            return tokens_BS, length

        storage = jax.tree.map(lambda p: p.storage, self.setup.placements)
        specs = (storage, *(P() for _ in inputs))
        return jax.shard_map(body, mesh=self.setup.mesh, in_specs=specs, out_specs=(P(), P()), check_vma=True)(
            params, *inputs
        )


def _bucket(length: int, longest: int) -> int:
    """The next power of two, within the model's longest sequence."""
    return min(longest, max(SMALLEST_BUCKET, 1 << (length - 1).bit_length()))
