"""Where the optimizer's state lives, which follows from where the parameters live.

Invariant: every array of the state has a sharding. `jit(init)` without them would replicate the moments, silently.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import optax
    from jax.sharding import Sharding


def abstract_state(
    transformation: optax.GradientTransformation, params: Any, shardings: Any, replicated: Sharding
) -> Any:
    """The state of an optimizer as `jax.ShapeDtypeStruct` with shardings; nothing is allocated.

    Args:
        transformation: An optimizer's.
        params: Nested dict of arrays or `jax.ShapeDtypeStruct`.
        shardings: The same nested dict, with the sharding of the moments of each parameter.
        replicated: What all else gets: counters, and factored moments, which are small.

    Returns:
        A pytree shaped as `transformation.init(params)`.
    """
    import jax
    import optax

    def is_masked(node: Any) -> bool:
        return isinstance(node, optax.MaskedNode)

    def place(leaf: Any, sharding: Sharding) -> Any:
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)

    def place_moment(leaf: Any, param: Any, sharding: Sharding) -> Any:
        if is_masked(leaf):  # of a parameter that another part of the optimizer takes care of
            return leaf
        return place(leaf, sharding if leaf.shape == param.shape else replicated)

    return optax.tree.map_params(
        transformation,
        place_moment,
        jax.eval_shape(transformation.init, params),
        params,
        shardings,
        transform_non_params=lambda leaf: place(leaf, replicated),
        is_leaf=is_masked,
    )
