"""The training state: its shapes, its shardings and its first values, all from one declaration per parameter.

Invariant: every leaf of the state has one `NamedSharding`, derived here, which jit, the optimizer and checkpoints use
alike. (`jit(optimizer.init)` without them would replicate the moments on every device, without an error.)
"""

from __future__ import annotations

from collections.abc import Iterable
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
from mtx.errors import UserError
from mtx.mesh import host_memory
from mtx.models import ModelDefinition, define_model
from mtx.nn.context import Context
from mtx.nn.float8 import MIN_CAPABILITY
from mtx.nn.param import Params
from mtx.nn.threefry import IMPLEMENTATION
from mtx.optim.state import abstract_state
from mtx.sharding import Rules, axis_sizes, make_rules, place_params, shardings
from mtx.training.canonical import Canonical, stage_shapes
from mtx.training.stages import Stages, assign_stages, stage_costs

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
    def stages(self) -> Stages | None:
        """Which layers each pipeline stage has; None without a pipeline."""
        run, sizes = self.run, axis_sizes(self.mesh)
        if sizes["pipe"] == 1:
            return None
        return assign_stages(
            run.model.layer_stacks,
            sizes["pipe"],
            run.pipeline.virtual_stages,
            **stage_costs(self.definition, run, head_on_last=run.pipeline.head == "last"),
        )

    @property
    def microbatch_size(self) -> int | None:
        """Sequences of a microbatch on a device; None: all that it has. The stages of a pipeline need several."""
        return self.run.train.microbatch_size or (None if self.stages is None else 1)

    @cached_property
    def abstract_stacks(self) -> Params:
        """The parameters as the state holds them: the model's, with the rows of stacks in the order of the stages."""
        whole = self.definition.whole.params
        return whole if self.stages is None else stage_shapes(self.stages, whole)

    @cached_property
    def placements(self) -> Any:
        """A `Placement` per parameter."""
        return self._place(self.abstract_stacks)

    def _place(self, params: Params) -> Any:
        return place_params(params, self.definition.whole.axes, self.rules, self.mesh, self.run.rules.zero)

    @property
    def scans_layers(self) -> bool:
        """Whether layers run in a loop over their stacked weights; else one after the other in line."""
        wanted = self.run.train.scan_layers
        if wanted is not None:
            return wanted
        if self.stages is not None or len(self.definition.layers) > 1:
            return False
        # In line, weight gradients go straight into their accumulators and no weight is copied; past a few dozen
        # layers the program takes too long to compile.
        return self.run.model.num_layers > MOST_LAYERS_IN_LINE

    @cached_property
    def line(self) -> tuple[tuple[str, int], ...]:
        """The layers of a device in the order in which they run: each one's stack, and its row in there.

        With a pipeline: those of the first chunk, then those of the second, and so on.
        """
        if self.stages is not None:
            order: tuple[str, ...] = self.stages.slots * self.stages.virtual_stages
        else:
            order = self.run.model.layer_stacks
        return tuple((name, order[:place].count(name)) for place, name in enumerate(order))

    def split_layers(self, tree: Params) -> Any:
        """The stacks replaced by `line`, a list of one layer's slices each, where layers run in line; else as it is."""
        if self.scans_layers:
            return tree
        line = [jax.tree.map(lambda a, row=row: a[row], tree[name]) for name, row in self.line]
        return {**without(tree, self.definition.layers), "line": line}

    def join_layers(self, tree: Any) -> Params:
        """The inverse of `split_layers`."""
        if self.scans_layers:
            return tree

        def join(stack: str) -> Params:
            rows = [layer for layer, (name, _) in zip(tree["line"], self.line) if name == stack]
            return jax.tree.map(lambda *slices: jnp.stack(slices), *rows)

        return {**without(tree, ("line",)), **{stack: join(stack) for stack in self.definition.layers}}

    @cached_property
    def layer_placements(self) -> dict[str, Any]:
        """For each stack a `Placement` per parameter of a single layer."""
        return {
            name: jax.tree.map(lambda placement: placement.of_one_layer(), self.placements[name])
            for name in self.definition.layers
        }

    @cached_property
    def split_placements(self) -> Any:
        """The placements of what `split_layers` returns."""
        if self.scans_layers:
            return self.placements
        line = [self.layer_placements[name] for name, _ in self.line]
        return {**without(self.placements, self.definition.layers), "line": line}

    @cached_property
    def context(self) -> Context:
        """What layers are told about the layout.

        Raises:
            UserError: `Precision.compute` is float8 and the GPUs multiply no 8-bit numbers.
        """
        device, precision = self.mesh.devices.flat[0], self.run.precision
        capability = getattr(device, "compute_capability", None)
        if precision.float8_parts and capability is not None and float(capability) < MIN_CAPABILITY:
            raise UserError(
                f"Precision.compute = 'float8' needs GPUs that multiply 8-bit numbers, from compute capability "
                f"{MIN_CAPABILITY} on (Ada, Hopper and later), and {device.device_kind} has {capability}: set "
                "Precision.compute = 'bfloat16'"
            )
        return Context(
            comm=Comm(rules=self.rules, sizes=axis_sizes(self.mesh)),
            dtype=jnp.dtype(precision.activations),
            attention=self.run.train.attention,
            platform=device.platform,
            compute_capability=None if capability is None else float(capability),
            context_exchange=self.run.train.context_exchange,
            float8=precision.float8_parts,
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

    def _abstract_params(self, params: Params, placements: Any) -> Params:
        dtype = jnp.dtype(self.run.precision.params)
        return jax.tree.map(
            lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, dtype, sharding=sharding),
            params,
            shardings(placements, self.mesh, "storage"),
        )

    def describe_state(self, params: Params, placements: Any) -> State:
        """The state with these abstract parameters, in these places, as `jax.ShapeDtypeStruct` with shardings."""
        replicated = NamedSharding(self.mesh, P())
        arrays = self._abstract_params(params, placements)
        moments = shardings(placements, self.mesh, "optimizer")
        if self.run.train.offload_optimizer:
            kind = host_memory(self.mesh)
            moments = jax.tree.map(lambda sharding: sharding.with_memory_kind(kind), moments)
        optimizer = abstract_state(self.transformation, arrays, moments, replicated)
        step = jax.ShapeDtypeStruct((), jnp.int32, sharding=replicated)
        return {"params": arrays, "optimizer": optimizer, "step": step}

    @cached_property
    def abstract_state(self) -> State:
        """The state as `jax.ShapeDtypeStruct` with shardings: the target of init and of the step."""
        return self.describe_state(self.abstract_stacks, self.placements)

    @cached_property
    def state_shardings(self) -> Any:
        """The sharding of each leaf of the state."""
        return jax.tree.map(lambda leaf: leaf.sharding, self.abstract_state)

    @cached_property
    def canonical(self) -> Canonical:
        """The state as checkpoints hold it, whatever the layout: all layers in their order."""
        return Canonical(self)

    def initialize(self, params: Params | None = None) -> State:
        """The state before the first update, drawn on the devices where it lives. Depends on `Train.seed` alone.

        Args:
            params: Weights to start from (imported ones) instead of drawn ones, as `canonical.abstract_state` has them.
        """
        targets = self.canonical.abstract_state["params"]

        def draw(key: jax.Array) -> Params:
            drawn = self.definition.initialize(key)
            return jax.tree.map(lambda leaf, target: leaf.astype(target.dtype), drawn, targets)

        shards = self.state_shardings
        if params is None:
            key = jax.random.key(self.run.train.seed, impl=IMPLEMENTATION)
            params = jax.jit(draw, out_shardings=jax.tree.map(lambda leaf: leaf.sharding, targets))(key)
        params = self.canonical.load({"params": params})["params"]
        optimizer = jax.jit(self.transformation.init, out_shardings=shards["optimizer"])(params)
        step = jax.jit(lambda: jnp.int32(0), out_shardings=shards["step"])()
        return {"params": params, "optimizer": optimizer, "step": step}


def without(tree: Params, names: Iterable[str]) -> Params:
    """A nested dict without some of its outermost names."""
    return {name: value for name, value in tree.items() if name not in names}
