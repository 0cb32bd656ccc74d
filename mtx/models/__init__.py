"""Model families. The directory is the registry: `Model.family` names a file here, which defines `Model` and `Layer`.

A family's `Model(rngs, config)` has a stack of its `Layer` for each name in `config.layer_stacks`, and the methods
`embed`, `rotary_table`, `loss` and `logits` of `mtx.models.decoder`, which is the one to read. `ends(config)` says
which parameters are in no layer.
"""

from __future__ import annotations

import functools
import importlib
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import jax

from mtx.config import schema
from mtx.config.components import families
from mtx.errors import UserError
from mtx.nn.param import Definition, Params, define, initialize


class Ends(NamedTuple):
    """Outermost names of a model's parameters, by the end of the network that uses them.

    Attributes:
        embed: Used before the first layer.
        head: Used after the last layer; with tied embeddings both ends use the embedding.
        table: The one of them whose leaf `table` is multiplied with to give logits.
    """

    embed: tuple[str, ...]
    head: tuple[str, ...]
    table: str


@dataclass(frozen=True)
class ModelDefinition:
    """A model without its arrays.

    Attributes:
        whole: The model; the leaves of its stacks of layers carry a leading dim.
        layers: For each stack (`schema.Model.layer_stacks`) one layer, whose parameters are a slice of the stack.
    """

    config: schema.Model
    whole: Definition
    layers: dict[str, Definition]

    @functools.cached_property
    def ends(self) -> Ends:
        """The parameters that are in no layer."""
        return _family(self.config).ends(self.config)

    def initialize(self, key: jax.Array) -> Params:
        """Draws every parameter, float32. Pure; the draw depends on the key alone."""
        return initialize(lambda rngs: _family(self.config).Model(rngs, self.config), key)


def _family(config: schema.Model) -> Any:
    if config.family not in families():
        raise UserError(f"Model.family = {config.family!r}: there is {', '.join(families())}")
    return importlib.import_module(f"{__name__}.{config.family}")


def define_model(config: schema.Model) -> ModelDefinition:
    """Traces a model abstractly: shapes and logical axes of all parameters, at any size, without memory.

    Raises:
        UserError: There is no such family.
    """
    family = _family(config)
    return ModelDefinition(
        config=config,
        whole=define(lambda rngs: family.Model(rngs, config)),
        layers={
            name: define(partial(family.Layer, config=config, stack_name=name)) for name in set(config.layer_stacks)
        },
    )


def abstract_parameters(config: schema.Model) -> tuple[Params, Params]:
    """Nested dicts of `jax.ShapeDtypeStruct` and of tuples of logical axes."""
    definition = define_model(config)
    return definition.whole.params, definition.whole.axes


def count_parameters(config: schema.Model) -> int:
    """Number of parameters."""
    return sum(leaf.size for leaf in jax.tree.leaves(abstract_parameters(config)[0]))


def count_active_parameters(config: schema.Model) -> int:
    """Number of parameters that have a part in the output of one token: of the routed experts, its own only."""
    params, axes = abstract_parameters(config)

    def count(leaf: jax.ShapeDtypeStruct, names: tuple[str, ...]) -> int:
        return leaf.size * config.experts_per_token // config.num_experts if "experts" in names else leaf.size

    return sum(jax.tree.leaves(jax.tree.map(count, params, axes)))
