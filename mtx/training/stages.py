"""Which layers each stage of a pipeline has.

A stage has one chunk of neighbouring layers, or several: of S stages, virtual stage q is chunk q // S of stage q % S.
All chunks of all stages run one program, which visits the same slots in the same order; where the layers do not divide,
or are of two kinds, some chunks leave slots empty.

Decides the cut: the most costly virtual stage costs as little as can be, since in lockstep all others wait for it. The
embedding is charged to the first one, the head to the last.

Invariant: read by virtual stage and slot, the layers are 0, 1, 2 ... and each is in a slot of its own stack.
"""

from __future__ import annotations

import itertools
import math
import operator
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import numpy as np

from mtx.config import schema
from mtx.errors import UserError
from mtx.models import ModelDefinition

PRODUCTS_PER_NUMBER = 300
"""Multiply-adds in the time in which a GPU reads or writes one number: those of an H100 in bfloat16, 989 TFLOP/s of
dense products and 3.35 TB/s of memory."""


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
        return np.array([row.get(layer, -1) for layer in self.layers[:, :, slots].reshape(-1).tolist()])

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
    """Cuts the layers into contiguous chunks so that the most costly chunk costs least.

    Of the cuts that do, one with few slots; of these the most even one (the least sum of squared costs), with the
    longer chunks first: 30 equal layers on 4 stages are 8, 8, 7, 7.

    Args:
        layer_stacks: The stack of each layer.
        num_stages: Stages of the pipeline.
        virtual_stages: Chunks per stage.
        layer_costs: What a layer of each stack costs, above 0; any unit.
        first_cost: What the first virtual stage does besides its layers.
        last_cost: What the last one does besides its layers.

    Raises:
        UserError: There are fewer layers than chunks.
    """
    V, L = num_stages * virtual_stages, len(layer_stacks)
    if V > L:
        raise UserError(
            f"Model.num_layers = {L} do not fill Mesh.pipe = {num_stages} stages with Pipeline.virtual_stages = "
            f"{virtual_stages} chunks each: {V} chunks need a layer at least; lower Mesh.pipe or "
            f"Pipeline.virtual_stages until their product is {L} or less"
        )
    # In whole numbers, without rounding: so equal costs are equal.
    scale = math.lcm(*(Fraction(c).denominator for c in (*layer_costs.values(), first_cost, last_cost)))
    first, last = int(Fraction(first_cost) * scale), int(Fraction(last_cost) * scale)
    sums = [0, *itertools.accumulate(int(Fraction(layer_costs[stack]) * scale) for stack in layer_stacks)]

    def cost(q: int, begin: int, end: int) -> float:
        return sums[end] - sums[begin] + first * (q == 0) + last * (q == V - 1)

    limit, ends = _cut(L, V, cost, max)
    for window in _windows(layer_stacks, -(-L // V)):
        reach = [begin + _count_matches(layer_stacks[begin:], window) for begin in range(L)]

        def squared_cost(q: int, begin: int, end: int, reach: list[int] = reach) -> float:
            total = cost(q, begin, end)
            return total**2 if total <= limit and end <= reach[begin] else math.inf

        badness, ends = _cut(L, V, squared_cost, operator.add)
        if badness < math.inf:  # at the latest in the longest window, all layers
            break
    chunks = [range(begin, end) for begin, end in itertools.pairwise((0, *ends))]
    kinds = [tuple(layer_stacks[layer] for layer in chunk) for chunk in chunks]
    slots = shortest_supersequence(kinds)
    layers = np.full((num_stages, virtual_stages, len(slots)), -1)
    for q, chunk in enumerate(chunks):
        slot = -1
        for layer in chunk:
            slot = slots.index(layer_stacks[layer], slot + 1)
            layers[q % num_stages, q // num_stages, slot] = layer
    return Stages(slots, layers, layer_stacks)


def _cut(
    num_layers: int,
    num_chunks: int,
    badness: Callable[[int, int, int], float],
    combine: Callable[[float, float], float],
) -> tuple[float, tuple[int, ...]]:
    """The least bad cut into chunks of one layer or more, by dynamic programming from the last chunk back.

    Args:
        badness: Of chunk q with the layers from begin to end - 1; infinite: not allowed.
        combine: The badness of several chunks.

    Returns:
        Its badness and where its chunks end; of equal ones the cut with the longer first chunks.
    """
    best: dict[int, tuple[float, tuple[int, ...]]] = {num_layers: (0, ())}
    for q in reversed(range(num_chunks)):
        after, best = best, {}
        most = num_layers - (num_chunks - 1 - q)
        for begin in range(q, most):
            found: tuple[float, tuple[int, ...]] = (math.inf, ())
            for end in range(max(begin + 1, min(after)), most + 1):
                value = combine(badness(q, begin, end), after[end][0])
                if value <= found[0]:
                    found = (value, (end, *after[end][1]))
            best[begin] = found
    return best[0]


def _windows(layer_stacks: tuple[str, ...], shortest: int) -> Iterator[tuple[str, ...]]:
    """The stretches of the network, shorter ones first: among them are the slots that all chunks fit into."""
    for size in range(shortest, len(layer_stacks) + 1):
        yield from dict.fromkeys(layer_stacks[begin : begin + size] for begin in range(len(layer_stacks) - size + 1))


def _count_matches(sequence: Sequence[str], slots: Sequence[str]) -> int:
    """How many of the first items of a sequence find a slot, in order."""
    count = 0
    for slot in slots:
        count += count < len(sequence) and sequence[count] == slot
    return count


def shortest_supersequence(sequences: Sequence[tuple[str, ...]]) -> tuple[str, ...]:
    """A shortest sequence from which each of these is got by leaving out items.

    Breadth first over how much of each sequence is done; a state that has done no more of any than another is dropped.
    """
    distinct = list(dict.fromkeys(sequences))
    needed = [a for a in distinct if not any(a != b and _count_matches(a, b) == len(a) for b in distinct)]
    names = list(dict.fromkeys(name for sequence in needed for name in sequence))
    goal = tuple(map(len, needed))
    states: dict[tuple[int, ...], tuple[str, ...]] = {(0,) * len(needed): ()}
    while goal not in states:
        grown = {
            tuple(done + (sequence[done : done + 1] == (name,)) for done, sequence in zip(state, needed)): (*path, name)
            for state, path in states.items()
            for name in names
        }
        states = {
            state: path
            for state, path in grown.items()
            if not any(state != other and all(a <= b for a, b in zip(state, other)) for other in grown)
        }
    return states[goal]


def stage_costs(definition: ModelDefinition, run: schema.Run, *, head_on_last: bool) -> dict[str, Any]:
    """What `assign_stages` charges, per token and for forward and backward together, in multiply-adds.

    A layer is charged the matrices that a token meets, of experts the token's own, and the attention to all places; the
    embedding multiplies nothing and is charged the rows that it moves.

    Args:
        definition: The model, whose parameters' shapes and logical axes are counted.
        run: For `Train.seq_len`, `Train.recompute` and the attention's width.
        head_on_last: Whether the last stage alone computes the head; else all stages share it, and nobody is charged.

    Returns:
        The arguments `layer_costs`, `first_cost` and `last_cost`.
    """
    model, whole = run.model, definition.whole
    attention = 2 * run.train.seq_len * model.num_heads * model.head_width
    passes = 4 if run.train.recompute == "full" else 3  # a backward pass is as long as two forward passes

    def layer_cost(stack: str) -> int:
        layer = definition.layers[stack]
        matrices = [_matrix_cost(shape, names, model) for shape, names in _leaves(layer.params, layer.axes)]
        return passes * (sum(matrices) + attention)

    tables = [leaf for name in definition.ends.embed for leaf in _leaves(whole.params[name], whole.axes[name])]
    table = definition.ends.table
    head = _matrix_cost(whole.params[table]["table"].shape, whole.axes[table]["table"], model)
    return {
        "layer_costs": {stack: layer_cost(stack) for stack in definition.layers},
        # Forward reads a row and writes it; backward reads its gradient and the accumulator's row, and writes that.
        "first_cost": sum(5 * PRODUCTS_PER_NUMBER * shape[1] for shape, _ in tables),
        "last_cost": 3 * head if head_on_last else 0,
    }


def _leaves(params: Any, axes: Any) -> list[tuple[tuple[int, ...], tuple[str, ...]]]:
    """Shape and logical axes of each parameter."""
    if isinstance(axes, tuple):
        return [(params.shape, axes)]
    return [leaf for name in axes for leaf in _leaves(params[name], axes[name])]


def _matrix_cost(shape: tuple[int, ...], names: tuple[str, ...], model: schema.Model) -> int:
    """Of a token's product with a matrix, forward: the multiply-adds, and the input and the output that are moved."""
    if len(set(names) - {"experts"}) < 2:  # a gain or a bias
        return 0
    inputs, outputs = shape[-2:]
    uses = model.experts_per_token if "experts" in names else 1
    return uses * (inputs * outputs + PRODUCTS_PER_NUMBER * (inputs + outputs))
