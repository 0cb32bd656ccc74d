"""Loss and every gradient of a run on one layout, compared with the same run on one device.

The first place that departs is found with weights set to zero. A layer without weights adds nothing to its input and
hands back the gradient it gets, so a model whose layers from number n on are zero tests what comes before, and its own
layers in place only. The first n that departs names the layer: n - 1, or embedding and head where none is left.

Invariant: parameters and batch depend on the config alone, so every layout computes the same.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np

from mtx.config import schema
from mtx.mesh import make_mesh
from mtx.training.state import Setup
from mtx.training.step import make_loss_and_gradients
from mtx.training.sums import COUNTS

LOSS_TOLERANCE, GRADIENT_TOLERANCE = 1e-6, 1e-5
"""Relative. A float32 has 6e-8 of precision; sums in another order are off by a few times that, in a gradient by more
through several layers. A wrong or missing exchange is off by a tenth or more."""

Leaves = dict[str, np.ndarray]
"""Name of a parameter, such as `layers.attention.query.weight`, -> float32 array, layers in their order."""


@dataclass(frozen=True)
class Outcome:
    """What a run computes: its losses (`loss`, and those of routing where there are experts) and its gradients."""

    losses: dict[str, float]
    gradients: Leaves


@dataclass(frozen=True)
class Difference:
    """How far an outcome is from another.

    Attributes:
        loss_error: Relative; the largest of all losses.
        gradient_error: The largest difference in a parameter as a share of its largest value, in the worst parameter.
        parameter: That one.
        layer: The layer of the worst value in it; None where it is of no layer.
    """

    loss_error: float
    gradient_error: float
    parameter: str
    layer: int | None

    @property
    def ok(self) -> bool:
        """Within the tolerances. NaN is not."""
        return self.loss_error <= LOSS_TOLERANCE and self.gradient_error <= GRADIENT_TOLERANCE


Program = Callable[[int], Outcome]
"""Computes the outcome with all layers from the given number on set to zero."""


def make_program(run: schema.Run, devices: list[jax.Device]) -> Program:
    """Compiles a run for the first devices that its mesh needs."""
    count = math.prod(run.mesh.__dict__.values())
    setup = Setup(run, make_mesh(run.mesh, devices[:count]))
    compute = jax.jit(make_loss_and_gradients(setup))
    objective: Any = run.train.objective
    batch, params = draw_batch(run), draw_params(setup)
    weight, key = objective.inputs(batch)["weights"].sum(), jax.random.key(run.train.seed + 1)
    # A batch that grows during the run has a number of microbatches that is known at run time only.
    ramp = run.train.batch_ramp
    rows, size = len(batch["tokens"]) // setup.batch_shards, run.train.microbatch_size
    num_microbatches = np.int32(rows // size) if ramp and size else None
    targets = setup.canonical.abstract_state["params"]
    shardings = jax.tree.map(lambda leaf: leaf.sharding, targets)

    def outcome(num_layers: int) -> Outcome:
        canonical = jax.device_put(_cut(run.model, params, num_layers), shardings)
        staged = setup.canonical.load({"params": canonical})["params"]
        sums, gradients = compute(staged, batch, weight, key, num_microbatches)
        losses = {name: float(value) for name, value in sums.items() if name not in COUNTS}
        return Outcome(losses, flatten(setup.canonical.store({"params": gradients})["params"]))

    return outcome


def draw_params(setup: Setup) -> Any:
    """Nested dict of float32 arrays. Biases and gains are random as well: with zeros and ones mistakes would hide."""
    rng = np.random.default_rng(setup.run.train.seed)
    whole = setup.definition.whole

    def draw(leaf: jax.ShapeDtypeStruct, axes: tuple[str, ...]) -> np.ndarray:
        is_vector = len(axes) - ("layers" in axes) == 1
        noise = rng.standard_normal(leaf.shape) * setup.run.model.init_std
        return (noise + is_vector).astype(np.float32)

    return jax.tree.map(draw, whole.params, whole.axes)


def draw_batch(run: schema.Run) -> dict[str, np.ndarray]:
    """Random rows as `mtx.data` gives them, packed with documents and padding where the run's are."""
    rng = np.random.default_rng(run.train.seed + 1)
    shape = (run.train.global_batch_size, run.train.seq_len + 1)
    batch = {"tokens": rng.integers(0, run.model.vocab_size, shape).astype(np.int32)}
    batch["rows"] = np.arange(shape[0], dtype=np.int32)
    if run.data.packing == "documents":
        segments, positions = np.zeros(shape, np.int32), np.zeros(shape, np.int32)
        for row in range(shape[0]):
            cuts = np.sort(rng.choice(np.arange(1, shape[1]), 3, replace=False))  # behind the last one is padding
            for number, (begin, end) in enumerate(zip([0, *cuts], cuts), 1):
                segments[row, begin:end], positions[row, begin:end] = number, np.arange(end - begin)
        batch |= {"segments": segments, "positions": positions}
    return batch


def flatten(tree: Any) -> Leaves:
    """A nested dict as one of dotted names, on the host."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="."): np.asarray(leaf) for path, leaf in leaves}


def compare(model: schema.Model, actual: Outcome, expected: Outcome, num_layers: int | None = None) -> Difference:
    """How far an outcome is from the expected one.

    A parameter's error is a share of its largest value, but of a hundredth of the largest of all at least: a key's bias
    has no gradient (softmax does not see it), and its own size would be a measure of rounding alone.

    Args:
        num_layers: Only the parameters of that many layers, and of none, are looked at.
    """
    depth = model.num_layers if num_layers is None else num_layers
    scale = max(float(np.abs(leaf).max()) for leaf in expected.gradients.values())
    worst: tuple[float, str, int | None] = (-1.0, "", None)
    for name, leaf in expected.gradients.items():
        layers = _layers_of(model, name)
        kept = slice(None) if layers is None else slice(sum(layer < depth for layer in layers))
        error = np.abs(actual.gradients[name][kept] - leaf[kept])
        if not error.size:
            continue
        share = float(np.nan_to_num(error.max(), nan=np.inf)) / max(float(np.abs(leaf[kept]).max()), 1e-2 * scale)
        if share > worst[0]:
            row = int(np.unravel_index(error.argmax(), error.shape)[0])
            worst = (share, name, None if layers is None else layers[row])
    losses = [abs(actual.losses[k] - v) / max(abs(v), 1e-30) for k, v in expected.losses.items()]
    return Difference(float(np.max(losses)), *worst)


def find_departure(
    model: schema.Model, program: Program, expected: Mapping[int, Outcome]
) -> tuple[str, Difference] | None:
    """The first place in the network at which a program departs, and how far; None where none does.

    Args:
        expected: For each number of layers, none and all included, the outcome on one device.
    """
    for num_layers in range(model.num_layers + 1):
        difference = compare(model, program(num_layers), expected[num_layers], num_layers)
        if not difference.ok:
            return f"layer {num_layers - 1}" if num_layers else "embedding or head", difference
    return None


def _layers_of(model: schema.Model, name: str) -> list[int] | None:
    """The layer of each row of a parameter; None where it is in no stack of layers."""
    stack = name.split(".")[0]
    return [layer for layer, other in enumerate(model.layer_stacks) if other == stack] or None


def _cut(model: schema.Model, params: Any, num_layers: int) -> Any:
    """The parameters with all layers from a number on set to zero."""

    def cut(stack: str, leaf: np.ndarray) -> np.ndarray:
        kept = np.array([layer < num_layers for layer, other in enumerate(model.layer_stacks) if other == stack])
        return leaf * kept.reshape(-1, *[1] * (leaf.ndim - 1)).astype(leaf.dtype)

    stacks = set(model.layer_stacks)
    return {
        name: jax.tree.map(lambda leaf, name=name: cut(name, leaf), tree) if name in stacks else tree
        for name, tree in params.items()
    }
