"""What is planned: a run, laid out on a cluster. Everything that the estimates read is derived here, once.

Decides nothing that the run does not decide itself: shapes, shards and stages come from the same declarations and the
same functions as the training state's.

Invariant: no array and no device is needed, whatever the size of the cluster.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from dataclasses import dataclass
from typing import Any

from mtx.config import layout, schema
from mtx.config.axes import MESH_AXES
from mtx.config.rules import Rules, choose_rules
from mtx.errors import UserError
from mtx.models import ModelDefinition, define_model
from mtx.optim.state import list_moments
from mtx.planning.hardware import Gpu
from mtx.sharding import Placement, mesh_axes, place
from mtx.training.stages import Stages, assign_stages, stage_costs


@dataclass(frozen=True, kw_only=True)
class Cluster:
    """The machines of a run.

    Attributes:
        gpu: The model of all of its GPUs.
        num_gpus: How many.
        domain: GPUs that reach each other through NVLink; neighbours in the order of the mesh's devices.
        nic_bandwidth: Bytes/s per GPU and direction between domains.
    """

    gpu: Gpu
    num_gpus: int
    domain: int
    nic_bandwidth: float

    @classmethod
    def of(cls, gpu: Gpu, num_gpus: int, *, domain: int | None = None, nic_bandwidth: float | None = None) -> Cluster:
        """The usual system of a GPU, unless something else is said."""
        return cls(
            gpu=gpu,
            num_gpus=num_gpus,
            domain=gpu.nvlink_domain if domain is None else domain,
            nic_bandwidth=gpu.nic_bandwidth if nic_bandwidth is None else nic_bandwidth,
        )


@dataclass(frozen=True)
class Parameter:
    """One declared parameter; of a stack of layers, all its rows.

    Attributes:
        path: Names from the outermost one.
        shape: Whole, in the canonical order of layers.
        axes: A logical axis per dim.
        moments: Shape and bytes per number of each array that the optimizer keeps for it.
    """

    path: tuple[str, ...]
    shape: tuple[int, ...]
    axes: tuple[str, ...]
    moments: tuple[tuple[tuple[int, ...], int], ...]


@dataclass(frozen=True)
class Declared:
    """What a model and an optimizer declare, whatever the layout.

    Attributes:
        definition: The model without its arrays.
        parameters: All of them.
        others: The same of the optimizer's state that belongs to no parameter, such as counters.
    """

    definition: ModelDefinition
    parameters: tuple[Parameter, ...]
    others: tuple[tuple[tuple[int, ...], int], ...]


@functools.lru_cache(maxsize=64)
def _define(model: schema.Model) -> ModelDefinition:
    return define_model(model)


_DECLARED: dict[str, Declared] = {}


def declare(run: schema.Run) -> Declared:
    """Traces the model and the optimizer abstractly; remembered, since a search asks for the same ones each time."""
    key = repr((run.model, run.train.optimizer, run.precision.params))
    if key not in _DECLARED:
        definition = _define(run.model)
        optimizer: Any = run.train.optimizer
        whole = definition.whole
        moments, others = list_moments(
            optimizer.transformation(whole.params, whole.axes), whole.params, run.precision.params
        )
        parameters = tuple(
            Parameter(path, leaf.shape, axes, moments[path]) for path, leaf, axes in _walk(whole.params, whole.axes)
        )
        _DECLARED[key] = Declared(definition, parameters, others)
    return _DECLARED[key]


def _walk(params: Any, axes: Any, path: tuple[str, ...] = ()) -> list[tuple[tuple[str, ...], Any, tuple[str, ...]]]:
    found = []
    for name, names in axes.items():
        if isinstance(names, tuple):
            found.append(((*path, name), params[name], names))
        else:
            found += _walk(params[name], names, (*path, name))
    return found


# A search asks for the same cuts and placements again and again.


@functools.lru_cache(maxsize=4096)
def _assign(
    layer_stacks: tuple[str, ...],
    num_stages: int,
    virtual_stages: int,
    layer_costs: tuple[tuple[str, float], ...],
    *,
    first_cost: float,
    last_cost: float,
) -> Stages:
    return assign_stages(
        layer_stacks,
        num_stages,
        virtual_stages,
        layer_costs=dict(layer_costs),
        first_cost=first_cost,
        last_cost=last_cost,
    )


@functools.lru_cache(maxsize=4096)
def _place_all(
    parameters: tuple[Parameter, ...],
    shapes: tuple[tuple[int, ...], ...],
    rules: tuple[tuple[str, tuple[str, ...]], ...],
    sizes: tuple[tuple[str, int], ...],
    zero: int,
) -> tuple[tuple[Parameter, tuple[int, ...], Placement], ...]:
    return tuple(
        (parameter, shape, place(shape, parameter.axes, dict(rules), dict(sizes), zero))
        for parameter, shape in zip(parameters, shapes)
    )


@dataclass(frozen=True)
class Case:
    """A run on a cluster.

    Attributes:
        run: With a mesh of counts only, whose product is the cluster's number of GPUs.
        cluster: The machines.
        software: Whose habits the estimates assume: 'mtx', or a name of `mtx.planning.software`.
    """

    run: schema.Run
    cluster: Cluster
    software: str = "mtx"

    @classmethod
    def of(cls, run: schema.Run, cluster: Cluster, software: str = "mtx", *, check: bool = True) -> Case:
        """Resolves the run's mesh for the cluster.

        Args:
            check: Whether the run must fit its mesh; False for the layouts of other software.

        Raises:
            UserError: The mesh does not take these GPUs, the run does not fit it, or they lack its number format.
        """
        mesh = layout.resolve_mesh(run.mesh, cluster.num_gpus)
        if check:
            layout.check_layout(run, mesh)
        check_format(run, cluster.gpu)
        return cls(dataclasses.replace(run, mesh=mesh), cluster, software)

    @functools.cached_property
    def sizes(self) -> dict[str, int]:
        """Devices along each mesh axis, outermost first."""
        return {axis: getattr(self.run.mesh, axis) for axis in MESH_AXES}

    @functools.cached_property
    def rules(self) -> Rules:
        """Logical axis -> live mesh axes."""
        return choose_rules(self.run, self.sizes)

    def shards(self, logical: str) -> int:
        """Over how many devices a logical axis is split."""
        return math.prod(self.sizes[axis] for axis in self.rules[logical])

    @functools.cached_property
    def declared(self) -> Declared:
        return declare(self.run)

    @functools.cached_property
    def stages(self) -> Stages | None:
        """Which layers each pipeline stage has; None without a pipeline."""
        if self.sizes["pipe"] == 1:
            return None
        run, definition = self.run, self.declared.definition
        costs = stage_costs(definition, run, head_on_last=run.pipeline.head == "last")
        layer_costs = tuple(costs.pop("layer_costs").items())
        return _assign(run.model.layer_stacks, self.sizes["pipe"], run.pipeline.virtual_stages, layer_costs, **costs)

    @functools.cached_property
    def slots(self) -> tuple[str, ...]:
        """The stack of each layer that a device runs, in order; with a pipeline those of all its chunks, empty ones
        among them."""
        if self.stages is None:
            return self.run.model.layer_stacks
        return self.stages.slots * self.stages.virtual_stages

    @property
    def microbatch_size(self) -> int:
        """Sequences of a microbatch on a data shard (b)."""
        wanted = self.run.train.microbatch_size
        share = max(1, self.run.train.global_batch_size // self.shards("batch"))
        return wanted or (share if self.stages is None else 1)

    @property
    def num_microbatches(self) -> int:
        """Microbatches of a data shard per step (M)."""
        return max(1, self.run.train.global_batch_size // (self.shards("batch") * self.microbatch_size))

    @property
    def tokens_per_step(self) -> int:
        """Of the full batch."""
        return self.run.train.global_batch_size * self.run.train.seq_len

    @functools.cached_property
    def placed(self) -> tuple[tuple[Parameter, tuple[int, ...], Placement], ...]:
        """Each parameter with its shape in the training state, where stages fill up stacks, and its placement."""
        shapes = tuple(map(self._staged_shape, self.declared.parameters))
        rules, sizes = tuple(self.rules.items()), tuple(self.sizes.items())
        return _place_all(self.declared.parameters, shapes, rules, sizes, self.run.rules.zero)

    def _staged_shape(self, parameter: Parameter) -> tuple[int, ...]:
        if self.stages is None or parameter.axes[0] != "layers":
            return parameter.shape
        stages = self.stages
        rows = stages.num_stages * stages.virtual_stages * stages.slots.count(parameter.path[0])
        return (rows, *parameter.shape[1:])

    def local_size(self, shape: tuple[int, ...], spec: Any) -> int:
        """Numbers of an array that one device holds."""
        return math.prod(shape) // math.prod(self.sizes[axis] for axis in mesh_axes(spec))


def check_format(run: schema.Run, gpu: Gpu) -> None:
    """Raises UserError where a GPU cannot multiply the numbers that a run multiplies."""
    if run.precision.compute == "float8" and gpu.peak_flops("float8") is None:
        raise UserError(
            f"Precision.compute = 'float8': {gpu.name} has no products of 8-bit numbers; set 'bfloat16', or plan for a "
            "later GPU (--list-gpus)"
        )


def check_mesh(mesh: schema.Mesh, num_gpus: int) -> None:
    """Raises UserError where a mesh does not take exactly these GPUs."""
    sizes = {axis: getattr(mesh, axis) for axis in MESH_AXES}
    product = math.prod(size for size in sizes.values() if size > 0)
    is_open = -1 in sizes.values()
    if product == num_gpus or (is_open and num_gpus % product == 0):
        return
    given = " * ".join(f"{axis} {size}" for axis, size in sizes.items() if size > 1) or "of one GPU"
    below = num_gpus // product * product
    fitting = f"{below} or {below + product}" if is_open and below else str(product)
    raise UserError(
        f"the mesh {given} takes {product} GPUs{' at a time' if is_open else ''}, and {num_gpus} are given: give "
        f"{fitting} GPUs{'' if is_open else ', or set one axis to -1'}, or let `mtx plan --search` find a mesh"
    )
