"""How a model declares its parameters, and how a nested dict of arrays becomes a module again.

The only file that touches Flax NNX. Modules are definitions: outside them parameters are a nested dict with string
keys, and every leaf carries the logical axes that it was declared with.

Invariant: one declaration per parameter (shape, logical axes, initializer); `len(axes) == ndim` for every leaf.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeAlias

import jax
import jax.numpy as jnp
from flax import nnx

# Tree mode: modules are plain pytrees, without the shared-reference bookkeeping that graph mode adds.
nnx.set_graph_mode(False)

if TYPE_CHECKING:  # the checker does not follow Flax, and a class it does not know can be anything
    Module: TypeAlias = Any
    Rngs: TypeAlias = Any
else:
    Module, Rngs = nnx.Module, nnx.Rngs
Params = dict[str, Any]
"""Nested dict of arrays (or of what describes them) with string keys."""


def _is_variable(node: Any) -> bool:
    return isinstance(node, nnx.Variable)


def param(rngs: Rngs, init: Callable[..., jax.Array], shape: tuple[int, ...], axes: tuple[str, ...]) -> nnx.Param:
    """Declares a parameter: float32[shape], drawn by `init(key, shape, dtype)`, with a logical axis for each dim."""
    if len(axes) != len(shape):
        raise ValueError(f"a parameter of shape {shape} needs {len(shape)} logical axes, got {axes}")
    # `axes` is our own metadata key: Flax's own sharding keys switch on eager sharding, which needs a mesh right here.
    return nnx.Param(init(rngs.params(), shape, jnp.float32), axes=axes)


def stack(make_layer: Callable[[Rngs], Module], rngs: Rngs, num_layers: int) -> Any:
    """`num_layers` layers as one module whose leaves have a leading `layers` dim. Layer i depends on the key and i."""
    key = rngs.params()
    layers = jax.vmap(lambda i: make_layer(Rngs(params=jax.random.fold_in(key, i))))(jnp.arange(num_layers))

    def name_leading_dim(variable: Any) -> Any:
        return variable.replace(axes=("layers", *variable.axes))

    return jax.tree.map(name_leading_dim, layers, is_leaf=_is_variable)


@dataclass(frozen=True)
class Definition:
    """A model without its arrays.

    Attributes:
        params: Nested dict of `jax.ShapeDtypeStruct`.
        axes: The same nested dict, with a tuple of logical axes per leaf.
    """

    graph: Any
    state: Any
    params: Params
    axes: Params

    def bind(self, params: Params) -> Any:
        """The module with these arrays in place of its parameters. Subtrees that are left out must not be used."""
        state = jax.tree.map(lambda leaf: leaf, self.state)
        nnx.replace_by_pure_dict(state, params)
        return nnx.merge(self.graph, state)


def define(make_model: Callable[[Rngs], Module]) -> Definition:
    """Traces the constructor abstractly: no array is allocated, whatever the size of the model."""
    graph, state = nnx.split(nnx.eval_shape(lambda: make_model(Rngs(params=0))), nnx.Param)
    axes = nnx.to_pure_dict(jax.tree.map(lambda v: v.replace(v.axes), state, is_leaf=_is_variable))
    return Definition(graph=graph, state=state, params=nnx.to_pure_dict(state), axes=axes)


def initialize(make_model: Callable[[Rngs], Module], key: jax.Array) -> Params:
    """Draws every parameter. Pure, to be jitted with the shardings of the state."""
    return nnx.to_pure_dict(nnx.state(make_model(Rngs(params=key)), nnx.Param))
