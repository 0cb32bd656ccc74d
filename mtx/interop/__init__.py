"""Weights of other projects, in and out. The directory is the registry of families.

A family is a file here that declares

    MODEL_TYPES: tuple[str, ...]              `model_type` of the config.json files that it understands
    PREFIX: str                               of tensor names, which some files leave out
    IGNORED: tuple[str, ...]                  names of tensors that hold no weights, patterns of `fnmatch`
    read_model(config) -> schema.Model        architecture of a config.json
    list_tensors(model) -> list[Tensor]       which tensor of a file is which parameter, for both directions

A family is written against saved files, never against another library's objects.
"""

from __future__ import annotations

import importlib
import pkgutil
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

from mtx.errors import UserError

if TYPE_CHECKING:
    from mtx.interop.gguf import GgufFile
    from mtx.interop.safetensors_folder import SafetensorsFolder


def open_source(path: Path) -> SafetensorsFolder | GgufFile:
    """The weights at a path: a context manager.

    Raises:
        UserError: They are not there, in another format, or damaged.
    """
    from mtx.interop.gguf import GgufFile
    from mtx.interop.safetensors_folder import SafetensorsFolder

    if path.is_dir():
        return SafetensorsFolder(path)
    if not path.is_file():
        raise UserError(f"{path}: no such file or folder; give a folder with config.json, or a .gguf file")
    return GgufFile(path)


def find_family(config: dict[str, Any], place: Path) -> ModuleType:
    """The family of a config.json.

    Raises:
        UserError: No file here declares its `model_type`.
    """
    modules = [importlib.import_module(f"{__name__}.{info.name}") for info in pkgutil.iter_modules(__path__)]
    families = {name: module for module in modules for name in getattr(module, "MODEL_TYPES", ())}
    model_type = config.get("model_type")
    if model_type not in families:
        raise UserError(f"{place}: model_type is {model_type!r}; this version imports {', '.join(sorted(families))}")
    return families[model_type]
