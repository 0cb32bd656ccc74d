"""Which layers each stage of a pipeline has."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np


@dataclass(frozen=True)
class Stages:
    """Layers by stage, chunk and slot.

    Attributes:
        slots: The stack of each slot; equal for all chunks of all stages, since they run one program.
        layers: int [num_stages, virtual_stages, slots], the number of the layer in each slot; -1: none.
        layer_stacks: The stack of each layer.
    """

    slots: tuple[str, ...]
    layers: np.ndarray
    layer_stacks: tuple[str, ...]

    @property
    def num_stages(self) -> int:
        return int(self.layers.shape[0])

    @property
    def virtual_stages(self) -> int:
        return int(self.layers.shape[1])

    def order(self, stack: str) -> np.ndarray:
        """int [rows]: for each row of a staged stack its layer's row in the canonical stack; -1: it is filled up."""
        row = {layer: self.layer_stacks[:layer].count(stack) for layer in range(len(self.layer_stacks))}
        slots = [slot for slot, name in enumerate(self.slots) if name == stack]
        return np.array([row[layer] if layer >= 0 else -1 for layer in self.layers[:, :, slots].reshape(-1)])

    def is_full(self, slot: int) -> bool:
        """Whether every chunk of every stage has a layer in this slot."""
        return bool((self.layers[:, :, slot] >= 0).all())


def assign_stages(
    layer_stacks: tuple[str, ...],
    num_stages: int,
    virtual_stages: int,
    *,
    layer_costs: dict[str, float],
    first_cost: float,
    last_cost: float,
) -> Stages:
    """Cuts the layers into contiguous chunks so that the most costly chunk costs least."""
    V, L = num_stages * virtual_stages, len(layer_stacks)
    base, more = divmod(L, V)
    counts = [base + (i < more) for i in range(V)]
    width = max(counts)
    layers = -np.ones((num_stages, virtual_stages, width), int)
    start = 0
    for q, count in enumerate(counts):
        layers[q % num_stages, q // num_stages, :count] = range(start, start + count)
        start += count
    return Stages((layer_stacks[0],) * width, layers, layer_stacks)


def stage_costs(definition: Any, run: Any, *, head_on_last: bool) -> dict[str, Any]:
    return {"layer_costs": {}, "first_cost": 0.0, "last_cost": 0.0}
