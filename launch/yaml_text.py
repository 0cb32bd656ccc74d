"""Plain data as YAML text, in block style.

Decides how a value is written, not what it means: every string is double-quoted, so that no parser takes one for a
number, a date, a boolean or anything else.

Invariant: a YAML 1.1 or 1.2 parser reads the same data back.
"""

from __future__ import annotations

import json
import re
from typing import Any

from launch.job import LaunchError

_PLAIN_KEY = re.compile(r"[A-Za-z][A-Za-z0-9_./-]*")
_READ_AS_OTHERS = ("y", "n", "yes", "no", "on", "off", "true", "false", "null")


def dump(document: dict[str, Any]) -> str:
    """A document, with a newline at its end.

    Args:
        document: Of dicts with string keys, lists, strings, whole numbers, booleans and None.

    Raises:
        LaunchError: A string holds what is not text: a byte that is not UTF-8, or NUL.
        TypeError: There is something else in it.
    """
    return "\n".join(_lines(document)) + "\n"


def dump_all(documents: list[dict[str, Any]]) -> str:
    """Several documents as one text."""
    return "---\n".join(dump(document) for document in documents)


def _lines(value: Any) -> list[str]:
    if isinstance(value, dict) and value:
        lines = []
        for key, item in value.items():
            first, *rest = _lines(item)
            if isinstance(item, (dict, list)) and item:
                lines += [f"{_key(key)}:", *(f"  {line}" for line in (first, *rest))]
            else:
                lines.append(f"{_key(key)}: {first}")
        return lines
    if isinstance(value, list) and value:
        lines = []
        for item in value:
            first, *rest = _lines(item)
            lines += [f"- {first}", *(f"  {line}" for line in rest)]
        return lines
    return [_scalar(value)]


def _key(key: str) -> str:
    return key if _PLAIN_KEY.fullmatch(key) and key.lower() not in _READ_AS_OTHERS else _quote(key)


def _scalar(value: Any) -> str:
    if isinstance(value, str):
        return _quote(value)
    if value is None or isinstance(value, (bool, int)) or value in ({}, []):
        return json.dumps(value)
    raise TypeError(f"{value!r} has no place in a manifest")


def _quote(text: str) -> str:
    """As in JSON, of which YAML reads all but pairs of surrogates and an unescaped DEL."""
    if "\0" in text or any("\ud800" <= letter <= "\udfff" for letter in text):
        raise LaunchError(f"{text!r}: not text (UTF-8, without NUL), so it cannot stand in a manifest")
    parts = [f"\\U{ord(c):08x}" if c > "\uffff" else "\\x7f" if c == "\x7f" else json.dumps(c)[1:-1] for c in text]
    return '"' + "".join(parts) + '"'
