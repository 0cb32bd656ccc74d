"""Which tensor of a file is which of our parameters, as data that both directions use; and the reading direction.

Decides layouts: transposition, tensors that hold several parameters side by side, one tensor per layer against our
leading `layers` dim. Knows neither file formats nor architectures.

Invariant: nothing is read before every name and every shape was found to fit, and only what a device needs is read.
"""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import jax
import numpy as np

from mtx.errors import UserError

Slices = tuple[slice, ...]


class Source(Protocol):
    """Files with named tensors and a config.json. Raises UserError where they are damaged."""

    @property
    def place(self) -> Path:
        """The folder or file."""

    @property
    def config(self) -> dict[str, Any]:
        """Its config.json."""

    @property
    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """Of every tensor."""

    def read(self, name: str, slices: Slices) -> np.ndarray:
        """A part of a tensor, in a floating-point dtype."""


@dataclass(frozen=True, kw_only=True)
class Tensor:
    """A tensor of a file.

    Attributes:
        name: Its name; `{layer}` stands for the number of the layer, where there is one tensor per layer.
        params: Paths of the parameters that it holds, side by side in its last dim.
        transposed: Whether its two dims are in the other order than ours: a Linear of PyTorch is [outputs, inputs].
        copy: Another name under which files may hold it a second time.
    """

    name: str
    params: tuple[str, ...]
    transposed: bool = False
    copy: str | None = None

    @property
    def per_layer(self) -> bool:
        """Whether there is one per layer, and the parameters have a leading `layers` dim."""
        return "{layer}" in self.name

    def shape(self, shapes: Sequence[tuple[int, ...]]) -> tuple[int, ...]:
        """Its shape, from those of its parameters."""
        first = shapes[0][1:] if self.per_layer else shapes[0]
        shape = (*first[:-1], sum(s[-1] for s in shapes))
        return shape[::-1] if self.transposed else shape

    def slices(self, wanted: Slices, offset: int) -> Slices:
        """Where a part of one of its parameters is, whose last dim begins at `offset` in this tensor's."""
        last = wanted[-1]
        wanted = (*wanted[:-1], slice(last.start + offset, last.stop + offset))
        return wanted[::-1] if self.transposed else wanted


def name_as_in(source: Source, tensors: Iterable[Tensor], prefix: str) -> list[Tensor]:
    """The tensors under the names of a file, which may lack a prefix throughout."""
    if any(name.startswith(prefix) for name in source.shapes):
        return list(tensors)
    return [replace(tensor, name=tensor.name.removeprefix(prefix)) for tensor in tensors]


def check_tensors(source: Source, tensors: Iterable[Tensor], params: Any, *, ignored: Sequence[str]) -> None:
    """Compares the names and shapes of a file with those of a model.

    Args:
        params: Nested dict of what has a shape.
        ignored: Patterns of names that hold no weights.

    Raises:
        UserError: Tensors are missing, unknown or of another shape, all of them named.
    """
    found = source.shapes
    expected: dict[str, tuple[int, ...]] = {}
    problems = []
    for tensor in tensors:
        shapes = [find_param(params, path).shape for path in tensor.params]
        for layer in range(shapes[0][0]) if tensor.per_layer else [0]:
            expected[tensor.name.format(layer=layer)] = tensor.shape(shapes)
        if tensor.copy is not None and tensor.copy in found and tensor.name in found:
            expected[tensor.copy] = tensor.shape(shapes)
            if not _are_equal(source, tensor.name, tensor.copy):
                problems.append(f"tied in the config and different in the files: {tensor.name} and {tensor.copy}")
    problems += [f"missing: {name} {list(shape)}" for name, shape in expected.items() if name not in found]
    problems += [
        f"not part of the model: {name} {list(found[name])}"
        for name in sorted(found.keys() - expected.keys())
        if not any(fnmatch.fnmatchcase(name, pattern) for pattern in ignored)
    ]
    problems += [
        f"misshapen: {name} is {list(found[name])}, the config asks for {list(shape)}"
        for name, shape in expected.items()
        if found.get(name, shape) != shape
    ]
    if problems:
        raise UserError(
            f"{source.place}: {len(problems)} tensors do not fit the model that its config describes:\n  "
            + "\n  ".join(_merge_layers(problems))
        )


def _merge_layers(lines: Iterable[str]) -> list[str]:
    """Lines that differ in the number of the layer alone become one, which names all these layers."""
    merged: dict[tuple[str, str], list[str]] = {}
    for line in lines:
        parts = re.split(r"(?<=\.)(\d+)(?=\.)", line, maxsplit=1)
        before, layer, after = parts if len(parts) == 3 else (line, "", "")
        merged.setdefault((before, after), []).append(layer)
    return [f"{before}{','.join(layers)}{after}" for (before, after), layers in merged.items()]


def _are_equal(source: Source, name: str, other: str) -> bool:
    shape = source.shapes[name]
    parts = [(slice(row, min(row + 1024, shape[0])),) for row in range(0, shape[0], 1024)]
    return shape == source.shapes[other] and all(
        np.array_equal(source.read(name, part), source.read(other, part)) for part in parts
    )


def find_param(params: Any, path: str) -> Any:
    """The leaf of a nested dict at a path such as `layers/attention/query/weight`."""
    for key in path.split("/"):
        params = params[key]
    return params


def load_params(source: Source, tensors: Iterable[Tensor], params: Any) -> Any:
    """Reads a model onto its devices, parameter by parameter.

    Args:
        tensors: What `check_tensors` has found to fit.
        params: Nested dict of `jax.ShapeDtypeStruct` with shardings.

    Returns:
        The nested dict with `jax.Array` leaves.
    """
    loaded: dict[str, Any] = {}
    for tensor in tensors:
        offset = 0
        for path in tensor.params:
            leaf = find_param(params, path)
            read = partial(_read_part, source, tensor, leaf, offset)
            loaded[path] = jax.make_array_from_callback(leaf.shape, leaf.sharding, read)
            offset += leaf.shape[-1]
    return jax.tree_util.tree_map_with_path(
        lambda path, _: loaded[jax.tree_util.keystr(path, simple=True, separator="/")], params
    )


def _read_part(source: Source, tensor: Tensor, leaf: Any, offset: int, index: Any) -> np.ndarray:
    """What `index` takes of the parameter that begins at `offset` in the last dim of a tensor."""
    wanted = tuple(slice(*part.indices(size)[:2]) for part, size in zip(index, leaf.shape))

    def read_one(name: str, part: Slices) -> np.ndarray:
        values = source.read(name, tensor.slices(part, offset)).astype(leaf.dtype)
        return values.T if tensor.transposed else values

    if not tensor.per_layer:
        return read_one(tensor.name, wanted)
    layers = range(wanted[0].start, wanted[0].stop)
    return np.stack([read_one(tensor.name.format(layer=layer), wanted[1:]) for layer in layers])
