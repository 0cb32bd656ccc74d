"""Reading the values of a config.json, whose types and features are not ours to trust."""

from __future__ import annotations

from typing import Any

from mtx.errors import UserError

_REQUIRED = object()


def get(config: dict[str, Any], key: str, kind: type, default: Any = _REQUIRED) -> Any:
    """A value of a type; where the file lacks it, the default of the library that wrote it.

    Args:
        kind: `float` takes whole numbers too; None passes where it is the default.

    Raises:
        UserError: The file lacks it and there is no default, or it is of another type.
    """
    value = config.get(key, default)
    if value is _REQUIRED:
        raise UserError(f"config.json: {key} is missing")
    if value is None and default is None:
        return None
    if kind is float and type(value) is int:
        return float(value)
    if type(value) is not kind:
        raise UserError(f"config.json: {key} is {value!r}; it must be of type {kind.__name__}")
    return value


def refuse(config: dict[str, Any], key: str, *, allowed: Any) -> None:
    """Refuses a file in which a key has another value than the one that we can compute with.

    Raises:
        UserError: It has.
    """
    if config.get(key, allowed) != allowed:
        raise UserError(f"config.json: {key} is {config[key]!r}; supported: {allowed!r}")
