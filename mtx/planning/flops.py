"""Model FLOPs: what the mathematics of a training step costs, whatever the program does to compute it.

Decides the convention. One multiply-add is 2 FLOPs, and the backward pass costs twice the forward pass:

    training = 3 * forward
    forward per token = 2 * (parameters that are multiplied with) + attention
    attention per token = 4 * S * N * H * L  (scores and their sum over values; "causal": half of it)

S sequence length, N query heads, H head dim, L layers. Recomputation is not counted: that would be hardware FLOPs.
Empty slots of experts and dropped tokens change nothing: each token counts the experts that it is sent to.
"full" counts attention to all S positions, as Megatron-LM, NeMo and torchtitan do; "causal" counts the half that a
causal model needs, as MaxText does. Each number that is shown says which one it is.

Invariant: parameters are counted from the declarations that the model is built from, never from a formula.

Source: arXiv 2104.04473 (appendix) and 2205.05198, section 5, to which "full" is equal where d_ff = 4 * d_model.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, Literal

from mtx.config.schema import Model
from mtx.optim.decay import is_matrix

Attention = Literal["full", "causal"]


def _leaves(params: Any, axes: Any) -> Iterator[tuple[int, tuple[str, ...]]]:
    for name, names in axes.items():
        if isinstance(names, tuple):
            yield math.prod(params[name].shape), names
        else:
            yield from _leaves(params[name], names)


def count_matmul_parameters(model: Model, params: Any, axes: Any) -> int:
    """Number of parameters that each token is multiplied with.

    These are the matrices of the layers and one table of the vocabulary, the head's, which a tied model shares with
    the embedding. Looking up a token or a position multiplies nothing. Of the routed experts only a token's own count.

    Args:
        model: The architecture.
        params: Nested dict of anything with a `shape`, as `mtx.models.abstract_parameters` gives it.
        axes: The same nested dict, with a tuple of logical axes per leaf.
    """
    matrices = [(size, names) for size, names in _leaves(params, axes) if is_matrix(names) and "positions" not in names]
    head = max(size for size, names in matrices if "vocab" in names)
    layers = ((size, "experts" in names) for size, names in matrices if "vocab" not in names)
    return head + sum(
        size * model.experts_per_token // model.num_experts if routed else size for size, routed in layers
    )


def attention_flops_per_token(model: Model, seq_len: int, attention: Attention = "full") -> float:
    """Forward FLOPs of the attention scores and of the sums over values, per token."""
    full = 4.0 * seq_len * model.num_heads * model.head_width * model.num_layers
    return full / 2 if attention == "causal" else full


def model_flops_per_token(model: Model, params: Any, axes: Any, seq_len: int, attention: Attention = "full") -> float:
    """Model FLOPs per token of training: forward and backward.

    Args:
        model: The architecture.
        params: Nested dict of anything with a `shape`, as `mtx.models.abstract_parameters` gives it.
        axes: The same nested dict, with a tuple of logical axes per leaf.
        seq_len: Tokens per sequence.
        attention: Whether scores that causality masks are counted.
    """
    forward = 2.0 * count_matmul_parameters(model, params, axes) + attention_flops_per_token(model, seq_len, attention)
    return 3.0 * forward
