"""The training state: its shapes, its shardings and its first values, all from one declaration per parameter.

Invariant: every leaf of the state has one `NamedSharding`, derived here, which jit, the optimizer and checkpoints use
alike. (`jit(optimizer.init)` without them would replicate the moments on every device, without an error.)
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from mtx.collectives import Comm
from mtx.config import schema
from mtx.models import ModelDefinition, define_model
from mtx.nn.context import Context
from mtx.nn.param import Params
from mtx.optim.state import abstract_state
from mtx.sharding import Rules, axis_sizes, make_rules, place_params, shardings

MOST_LAYERS_IN_LINE = 48

State = dict[str, Any]
"""`params` (nested dict), `optimizer` (optax state) and `step` (int32 scalar: updates done)."""


@dataclass(frozen=True)
class Setup:
    """Everything that a run's config and mesh decide about its program. Holds no arrays."""

    run: schema.Run
    mesh: Mesh

    @cached_property
    def definition(self) -> ModelDefinition:
        """The model without its arrays."""
        return define_model(self.run.model)

    @cached_property
    def rules(self) -> Rules:
        """Logical axis -> live mesh axes."""
        return make_rules(self.run, self.mesh)

    @cached_property
    def placements(self) -> Any:
        """A `Placement` per parameter."""
        whole = self.definition.whole
        return place_params(whole.params, whole.axes, self.rules, self.mesh, self.run.rules.zero)

    @property
    def scans_layers(self) -> bool:
        """Whether layers run in a loop over their stacked weights; else one after the other in line."""
        wanted = self.run.train.scan_layers
        if wanted is not None:
            return wanted
        # In line, weight gradients go straight into their accumulators and no weight is copied; past a few dozen
        # layers the program takes too long to compile.
        return self.run.model.num_layers > MOST_LAYERS_IN_LINE

    def split_layers(self, tree: Params) -> Any:
        """`layers` as a list with one layer's slices each, where layers run in line; else the tree as it is."""
        if self.scans_layers:
            return tree
        count = range(self.run.model.num_layers)
        return {**tree, "layers": [jax.tree.map(lambda a, i=i: a[i], tree["layers"]) for i in count]}

    def join_layers(self, tree: Any) -> Params:
        """The inverse of `split_layers`."""
        if self.scans_layers:
            return tree
        return {**tree, "layers": jax.tree.map(lambda *slices: jnp.stack(slices), *tree["layers"])}

    @cached_property
    def layer_placements(self) -> Any:
        """A `Placement` per parameter of a single layer."""
        return jax.tree.map(lambda placement: placement.of_one_layer(), self.placements["layers"])

    @cached_property
    def split_placements(self) -> Any:
        """The placements of what `split_layers` returns."""
        if self.scans_layers:
            return self.placements
        return {**self.placements, "layers": [self.layer_placements] * self.run.model.num_layers}

    @cached_property
    def context(self) -> Context:
        """What layers are told about the layout."""
        device = self.mesh.devices.flat[0]
        capability = getattr(device, "compute_capability", None)
        return Context(
            comm=Comm(rules=self.rules, sizes=axis_sizes(self.mesh)),
            dtype=jnp.dtype(self.run.precision.compute),
            attention=self.run.train.attention,
            platform=device.platform,
            compute_capability=None if capability is None else float(capability),
        )

    @cached_property
    def transformation(self) -> optax.GradientTransformation:
        """The optimizer: from gradients to the direction that the step walks against."""
        optimizer: Any = self.run.train.optimizer
        return optimizer.transformation(self.definition.whole.params, self.definition.whole.axes)

    @property
    def batch_shards(self) -> int:
        """Over how many devices the sequences of a batch are split."""
        return self.context.comm.size("batch")

    @cached_property
    def _abstract_params(self) -> Params:
        dtype = jnp.dtype(self.run.precision.params)
        return jax.tree.map(
            lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, dtype, sharding=sharding),
            self.definition.whole.params,
            shardings(self.placements, self.mesh, "storage"),
        )

    @cached_property
    def abstract_state(self) -> State:
        """The state as `jax.ShapeDtypeStruct` with shardings: the target of init, of restoring and of the step."""
        replicated = NamedSharding(self.mesh, P())
        optimizer = abstract_state(
            self.transformation,
            self._abstract_params,
            shardings(self.placements, self.mesh, "optimizer"),
            replicated,
        )
        step = jax.ShapeDtypeStruct((), jnp.int32, sharding=replicated)
        return {"params": self._abstract_params, "optimizer": optimizer, "step": step}

    @cached_property
    def state_shardings(self) -> Any:
        """The sharding of each leaf of the state."""
        return jax.tree.map(lambda leaf: leaf.sharding, self.abstract_state)

    def initialize(self, params: Params | None = None) -> State:
        """The state before the first update, drawn on the devices where it lives. Depends on `Train.seed` alone.

        Args:
            params: Weights to start from (imported ones) instead of drawn ones: arrays with the state's shardings.
        """

        def draw(key: jax.Array) -> Params:
            drawn = self.definition.initialize(key)
            return jax.tree.map(lambda leaf, target: leaf.astype(target.dtype), drawn, self._abstract_params)

        shards = self.state_shardings
        if params is None:
            key = jax.random.key(self.run.train.seed)
            params = jax.jit(draw, out_shardings=shards["params"])(key)
        optimizer = jax.jit(self.transformation.init, out_shardings=shards["optimizer"])(params)
        step = jax.jit(lambda: jnp.int32(0), out_shardings=shards["step"])()
        return {"params": params, "optimizer": optimizer, "step": step}
