"""A value from a config file against the annotation of its field, and back to text.

Decides which literals a type accepts and how they are written; knows nothing of files or of other fields.

Invariant: what `conform` returns, `format_value` writes, and the parser reads again to an equal value.
"""

from __future__ import annotations

import dataclasses
import math
import types
import typing
from typing import Any, Literal

from mtx.config.components import Setting, accepts, alternatives, components
from mtx.config.statements import Macro, Reference, closest


def conform(value: Any, setting: Setting) -> Any:
    """The value as the field holds it: lists become tuples, integers become floats where a float is wanted.

    Args:
        value: A literal, macros replaced, references to components that exist still in it.

    Raises:
        ValueError: It does not fit; says what does.
    """
    result = _convert(value, setting.annotation)
    if result is _MISFIT:
        raise ValueError(f"{setting.key} must be {describe(setting)}, not {format_value(value)}{_hint(value, setting)}")
    if isinstance(result, int | float) and not isinstance(result, bool):
        too_low = setting.low is not None and result < setting.low
        if too_low or (setting.high is not None and result > setting.high):
            raise ValueError(f"{setting.key} must be {describe(setting)}, not {format_value(value)}")
    return result


def describe(setting: Setting) -> str:
    """Type and range of a field in words: 'an integer >= 1 or None'."""
    bounds = ""
    if setting.low is not None and setting.high is not None:
        bounds = f" from {setting.low} to {setting.high}"
    elif setting.low is not None:
        bounds = f" >= {setting.low}"
    elif setting.high is not None:
        bounds = f" <= {setting.high}"
    arms = alternatives(setting.annotation)
    return " or ".join(_describe(arm) + (bounds if arm in (int, float) else "") for arm in arms)


def format_value(value: Any) -> str:
    """A value as a config file writes it."""
    match value:
        case Reference(name=name, called=called):
            return f"@{name}()" if called else f"@{name}"
        case Macro(name=name):
            return f"%{name}"
        case dict():
            return "{" + ", ".join(f"{format_value(k)}: {format_value(v)}" for k, v in value.items()) + "}"
        case tuple():
            return "(" + ", ".join(map(format_value, value)) + ("," if len(value) == 1 else "") + ")"
        case list():
            return "[" + ", ".join(map(format_value, value)) + "]"
    if dataclasses.is_dataclass(value):
        return f"@{type(value).__name__}()"
    return repr(value)


_MISFIT = object()


def _convert(value: Any, annotation: Any) -> Any:
    arms = [_convert_one(value, arm) for arm in alternatives(annotation)]
    fitting = [result for result in arms if result is not _MISFIT]
    same_type = [result for result in fitting if type(result) is type(value)]
    return (same_type or fitting or [_MISFIT])[0]


def _convert_one(value: Any, annotation: Any) -> Any:
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if annotation is None or annotation is types.NoneType:
        return None if value is None else _MISFIT
    if origin is Literal:
        return value if any(value == a and type(value) is type(a) for a in arguments) else _MISFIT
    if origin is dict:
        if not isinstance(value, dict):
            return _MISFIT
        items = {_convert(k, arguments[0]): _convert(v, arguments[1]) for k, v in value.items()}
        return items if _MISFIT not in items and not any(v is _MISFIT for v in items.values()) else _MISFIT
    if origin is tuple:
        if not isinstance(value, list | tuple) or (arguments[-1] is not ... and len(value) != len(arguments)):
            return _MISFIT
        kinds = [arguments[0]] * len(value) if arguments[-1] is ... else arguments
        result = tuple(_convert(v, kind) for v, kind in zip(value, kinds))
        return _MISFIT if any(v is _MISFIT for v in result) else result
    if annotation is float and isinstance(value, int | float) and not isinstance(value, bool):
        try:
            return float(value) if math.isfinite(value) else _MISFIT
        except OverflowError:
            return _MISFIT
    if isinstance(value, Reference):
        return value if issubclass(components()[value.name], annotation) else _MISFIT
    if annotation is int and isinstance(value, bool):
        return _MISFIT
    return value if isinstance(value, annotation) else _MISFIT


_NAMES = {int: "an integer", float: "a number", bool: "True or False", str: "a 'string'", types.NoneType: "None"}


def _describe(annotation: Any) -> str:
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if annotation in _NAMES:
        return _NAMES[annotation]
    if origin is Literal:
        return ("one of " if len(arguments) > 1 else "") + ", ".join(map(repr, arguments))
    if origin in (dict, tuple):
        inner = [" or ".join(_describe(arm) for arm in alternatives(a)) for a in arguments if a is not ...]
        return f"a dict {{{': '.join(inner)}}}" if origin is dict else f"a list of {', '.join(inner)}"
    return " or ".join(f"@{name}()" for name, cls in components().items() if accepts(annotation, cls))


def _hint(value: Any, setting: Setting) -> str:
    """How to mend the commonest misfits."""
    arms = alternatives(setting.annotation)
    if isinstance(value, float) and int in arms and value.is_integer():
        return f": write {int(value):_}"
    if isinstance(value, str):
        allowed = [a for arm in arms if typing.get_origin(arm) is Literal for a in typing.get_args(arm)]
        if found := closest(value, map(str, allowed)):
            return f"; {found}"
    return ""
