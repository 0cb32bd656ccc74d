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


def list_moments(
    transformation: optax.GradientTransformation, params: Any, dtype: str
) -> tuple[dict[tuple[str, ...], tuple[tuple[tuple[int, ...], int], ...]], tuple[tuple[tuple[int, ...], int], ...]]:
    """What an optimizer keeps for each parameter, without arrays or shardings.

    Args:
        transformation: An optimizer's.
        params: Nested dict of anything with a `shape`.
        dtype: Of the parameters in the training state.

    Returns:
        Path of a parameter -> shape and bytes per number of each array kept for it; the same of all else, such as
        counters.
    """
    import jax
    import jax.numpy as jnp
    import optax

    def is_masked(node: Any) -> bool:
        return isinstance(node, optax.MaskedNode)

    arrays = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, jnp.dtype(dtype)), params)
    paths = jax.tree_util.tree_map_with_path(lambda path, _: _Path(tuple(key.key for key in path)), arrays)
    found: dict[tuple[str, ...], list[tuple[tuple[int, ...], int]]] = {p.names: [] for p in jax.tree.leaves(paths)}
    others: list[tuple[tuple[int, ...], int]] = []

    def note_moment(leaf: Any, path: _Path) -> Any:
        if not is_masked(leaf):
            found[path.names].append((leaf.shape, leaf.dtype.itemsize))
        return leaf

    def note_other(leaf: Any) -> Any:
        others.append((leaf.shape, leaf.dtype.itemsize))
        return leaf

    optax.tree.map_params(
        transformation,
        note_moment,
        jax.eval_shape(transformation.init, arrays),
        paths,
        transform_non_params=note_other,
        is_leaf=is_masked,
    )
    return {names: tuple(moments) for names, moments in found.items()}, tuple(others)


class _Path:
    """Names of a parameter, as one leaf of a tree."""

    def __init__(self, names: tuple[str, ...]):
        self.names = names
