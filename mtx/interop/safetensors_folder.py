"""A folder as Hugging Face's libraries save it: config.json, and weights in one or several .safetensors files.

Reads parts of tensors without reading the rest. Pickled weights (.bin, .pt) are refused: unpickling runs whatever code
is in the file.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from contextlib import ExitStack
from functools import cached_property
from pathlib import Path
from typing import Any

import ml_dtypes  # noqa: F401  gives NumPy the bfloat16 that safetensors asks for
import numpy as np
from safetensors import SafetensorError, safe_open

from mtx.errors import UserError
from mtx.interop.tensors import Slices

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
DTYPES = ("F64", "F32", "F16", "BF16")


class SafetensorsFolder:
    """The config and the tensors of a folder."""

    def __init__(self, place: Path):
        """Raises: UserError: The folder lacks a file, or one of them is damaged or quantised."""
        self.place = place
        self.config = _read_json(place / "config.json")
        if "quantization_config" in self.config:
            raise UserError(f"{place / 'config.json'}: the weights are quantised; give a folder in {', '.join(DTYPES)}")
        self._files = ExitStack()
        self._tensors = self._open()

    def __enter__(self) -> SafetensorsFolder:
        return self

    def __exit__(self, *exception: object) -> None:
        self._files.close()

    def _open(self) -> dict[str, Any]:
        """Tensor -> what reads slices of it."""
        if (self.place / INDEX).is_file():
            listed = _read_json(self.place / INDEX).get("weight_map")
            if not isinstance(listed, dict) or not all(isinstance(name, str) for name in listed.values()):
                raise UserError(f"{self.place / INDEX}: has no weight_map from tensors to files")
        elif (self.place / SINGLE).is_file():
            listed = None
        else:
            raise UserError(f"{self.place}: there is neither {SINGLE} nor {INDEX}; other formats are not read")
        tensors: dict[str, Any] = {}
        for name in [SINGLE] if listed is None else sorted(set(listed.values())):
            path = self.place / name
            if path.parent != self.place or not path.is_file():
                raise UserError(f"{self.place / INDEX} names the file {name!r}, which is not in the folder")
            try:
                file = self._files.enter_context(safe_open(path, framework="numpy"))
            except SafetensorError as error:
                raise UserError(f"{path}: damaged, or no safetensors file: {error}") from None
            tensors |= {key: file.get_slice(key) for key in file.keys()}  # noqa: SIM118  it is no dict
        if listed is not None and (lost := sorted(listed.keys() - tensors.keys())):
            raise UserError(f"{self.place / INDEX} lists tensors that its files lack: {', '.join(lost)}")
        odd = [f"{name} is {t.get_dtype()}" for name, t in tensors.items() if t.get_dtype() not in DTYPES]
        if odd:
            raise UserError(f"{self.place}: weights must be {', '.join(DTYPES)}: {', '.join(odd[:10])}")
        return tensors

    @cached_property
    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """Of every tensor."""
        return {name: tuple(tensor.get_shape()) for name, tensor in self._tensors.items()}

    def read(self, name: str, slices: Slices) -> np.ndarray:
        """A part of a tensor, in the dtype of the file."""
        return self._tensors[name][slices]


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path}: no such file; give a folder with config.json and {SINGLE}") from None
    except ValueError as error:
        raise UserError(f"{path}: not JSON: {error}") from None
    if not isinstance(content, dict):
        raise UserError(f"{path}: not a JSON object")
    return content
