"""The classes that a config file may name, found by walking directories.

Decides what can be configured by name: the sections of `Run`, and components, which a file refers to as `@Name()`.
A component is one dataclass in one file of `mtx/optim` or `mtx/objectives`; adding the file is all it takes.

Invariant: the files walked here import nothing heavy at their top, so that reading a config costs milliseconds.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib
import pkgutil
import types
import typing
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mtx.config import schema

ROOMS = ("mtx.optim", "mtx.objectives")
BASES = (schema.Optimizer, schema.Schedule, schema.Objective)
DEFAULTS: Mapping[str, str] = {"Train.objective": "Causal", "Train.optimizer": "AdamW"}
"""Field -> the component that it holds where no file sets it."""


@dataclass(frozen=True, kw_only=True)
class Setting:
    """What the schema says about one field of a class."""

    owner: str
    name: str
    annotation: Any
    default: Any  # schema.REQUIRED where there is none
    doc: str
    low: float | None
    high: float | None
    drift: str

    @property
    def key(self) -> str:
        """As a config file writes it: `Class.field`."""
        return f"{self.owner}.{self.name}"


@functools.cache
def sections() -> Mapping[str, type]:
    """The classes that every run has: `Model`, `Mesh`, ..., in the order of `Run`."""
    return {cls.__name__: cls for cls in typing.get_type_hints(schema.Run).values()}


@functools.cache
def components() -> Mapping[str, type]:
    """The classes that `@Name()` can mean: those of the schema that are no section, and those of the rooms."""
    found = {cls.__name__: cls for cls in _dataclasses(schema) if cls not in (*BASES, *sections().values(), schema.Run)}
    for room in ROOMS:
        for info in pkgutil.iter_modules(importlib.import_module(room).__path__):
            for cls in _dataclasses(importlib.import_module(f"{room}.{info.name}")):
                if issubclass(cls, BASES):
                    if cls.__name__ in found or cls.__name__ in sections():
                        raise RuntimeError(f"{cls.__module__}.{cls.__name__}: another class has this name")
                    found[cls.__name__] = cls
    return found


def classes() -> Mapping[str, type]:
    """Everything that may stand before the dot of `Class.field = value`."""
    return {**sections(), **components()}


@functools.cache
def settings(cls: type) -> Mapping[str, Setting]:
    """The fields of a config class by name, in order."""
    hints = typing.get_type_hints(cls)
    return {
        f.name: Setting(owner=cls.__name__, name=f.name, annotation=hints[f.name], default=_default(f), **f.metadata)
        for f in dataclasses.fields(cls)
    }


def alternatives(annotation: Any) -> tuple[Any, ...]:
    """The members of a union; the annotation alone where it is none."""
    if typing.get_origin(annotation) in (typing.Union, types.UnionType):
        return typing.get_args(annotation)
    return (annotation,)


def accepts(annotation: Any, component: type) -> bool:
    """Whether a field may hold an instance of the component."""
    return any(isinstance(arm, type) and issubclass(component, arm) for arm in alternatives(annotation))


def families() -> list[str]:
    """Names that `Model.family` may have: the files of `mtx/models`, a room that imports JAX and is only looked at."""
    return sorted(info.name for info in pkgutil.iter_modules([str(Path(__file__).parents[1] / "models")]))


def _dataclasses(module: types.ModuleType) -> Iterator[type]:
    for cls in vars(module).values():
        if isinstance(cls, type) and dataclasses.is_dataclass(cls) and cls.__module__ == module.__name__:
            yield cls


def _default(field: dataclasses.Field[Any]) -> Any:
    return field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
