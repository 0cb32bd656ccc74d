"""Model families. The directory is the registry: `Model.family` names a file here, which defines `Model` and `Layer`.

A family's `Model(rngs, config)` has `layers`, a stack of its `Layer`, and the methods `embed`, `rotary_table`, `loss`
and `logits` of `mtx.models.decoder`, which is the one to read.
"""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from typing import Any

import jax

from mtx.config import schema
from mtx.config.components import families
from mtx.errors import UserError
from mtx.nn.param import Definition, Params, define, initialize


@dataclass(frozen=True)
class ModelDefinition:
    """A model without its arrays.

    Attributes:
        whole: The model; its `layers` carry a leading dim.
        layer: One layer, whose parameters are a slice of `whole`'s.
    """

    config: schema.Model
    whole: Definition
    layer: Definition

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
        layer=define(lambda rngs: family.Layer(rngs, config)),
    )


def abstract_parameters(config: schema.Model) -> tuple[Params, Params]:
    """Nested dicts of `jax.ShapeDtypeStruct` and of tuples of logical axes."""
    definition = define_model(config)
    return definition.whole.params, definition.whole.axes


def count_parameters(config: schema.Model) -> int:
    """Number of parameters."""
    return sum(leaf.size for leaf in jax.tree.leaves(abstract_parameters(config)[0]))
