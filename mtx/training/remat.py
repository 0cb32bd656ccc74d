"""What the backward pass computes again: `Train.recompute` as a transformation of one layer, or as names to keep.

`none` keeps every intermediate value, `selective` the inputs of the expensive-to-repeat parts (what `tap` names) and
recomputes attention (but for cuDNN's), norms and activations, `full` keeps the layer's input only. Weights gathered
for ZeRO-3 are gathered again under every policy: keeping them would hold the whole model on each device.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
from jax.ad_checkpoint import checkpoint_name

from mtx.nn.context import Tap, no_tap

SELECTIVE = (
    "query", "key", "value", "after_attention", "mlp_hidden", "mlp_gate",
    "router_logits", "expert_ids", "expert_ranks", "expert_sizes", "expert_weights", "expert_hidden", "expert_gate",
)  # fmt: skip
"""Values kept by `selective`: 9 to 11 times B x T x D per layer, and those of CUDNN_FORWARD; with experts, the hidden
layers of all that a token is sent to."""

CUDNN_FORWARD = "dot_product_attention_fwd_wrapper"
"""JAX's name of cuDNN's attention. `selective` keeps its results as well: the output, and the log-sum-exp of each
query's scores, with which the kernel's backward pass repeats nothing. Neither has a name of its own inside of
`jax.nn.dot_product_attention`."""

INPUTS = ("attention_in", "attention_out", "mlp_in", "expert_in")
"""What `none` keeps besides, where values are kept by name: with them no product and no collective is repeated."""


def ring_names(recompute: str) -> frozenset[str]:
    """The values that the ring of a pipeline keeps besides the inputs of the stages."""
    selective = ("layer_in", *SELECTIVE)
    return frozenset({"none": (*selective, *INPUTS), "selective": selective, "full": ()}[recompute])


def tap_for(recompute: str) -> Tap:
    """What layers are given to name the values that a policy may keep."""
    return (lambda name, value: checkpoint_name(value, name)) if recompute == "selective" else no_tap


def rematerialize(
    layer: Callable[..., Any], recompute: str, regathered: tuple[str, ...], *, scanned: bool
) -> Callable[..., Any]:
    """Applies the policy to a layer function.

    Args:
        layer: Pure function of arrays.
        recompute: `none`, `selective` or `full`.
        regathered: Mesh axes whose gathers must not be kept: those of ZeRO-3.
        scanned: Whether the layer is the body of a loop.
    """
    policies = jax.checkpoint_policies
    if recompute == "full":
        policy = policies.nothing_saveable
    elif recompute == "selective":
        named = policies.save_only_these_names(*SELECTIVE)

        def policy(primitive: Any, *args: Any, **params: Any) -> Any:
            return primitive.name == CUDNN_FORWARD or named(primitive, *args, **params)
    elif regathered:

        def policy(primitive: Any, *_: Any, **params: Any) -> bool:
            axes = params.get("axis_name", ()) if primitive.name.startswith("all_gather") else ()
            return not set(axes if isinstance(axes, tuple) else (axes,)) & set(regathered)
    else:
        return layer
    # In line, a layer that is computed again equals the layer computed before: without a barrier XLA would merge the
    # two and keep everything. In a loop the two are in different bodies, and a barrier would only cost fusions.
    return jax.checkpoint(layer, policy=policy, prevent_cse=not scanned)
