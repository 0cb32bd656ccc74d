"""How the rules between fields word what is wrong.

Decides the phrases that all rules share, and no rule.

Invariant: a number that is proposed satisfies the rule that proposes it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cache

from mtx.config import render, schema
from mtx.config.components import sections, settings
from mtx.config.render import Origin
from mtx.config.values import format_value

Show = Callable[[str], str]
"""'Model.d_model' -> 'Model.d_model = 770 (runs/x.gin:3)'."""


def show_setting(run: schema.Run, provenance: Mapping[str, Origin], key: str) -> str:
    """'Model.d_model = 770 (runs/x.gin:3)'; without the place where nothing sets it."""
    owner, name = key.split(".")
    return f"{key} = {format_value(getattr(render.parts(run)[owner], name))}{show_place(provenance, key)}"


def show_place(provenance: Mapping[str, Origin], key: str) -> str:
    """' (runs/x.gin:3)'; nothing where nothing sets it."""
    return f" ({provenance[key].place})" if key in provenance else ""


def useless(show: Show, key: str, circumstance: str, cure: str) -> str:
    """The message that a setting does nothing in some circumstance."""
    owner, name = key.split(".")
    default = settings(sections()[owner])[name].default
    return f"{show(key)} has no effect {circumstance}: {cure}, or leave {key} at {format_value(default)}"


def multiples(value: int, divisor: int) -> str:
    """The multiples of a divisor around a value: '8 or 12'."""
    below = value // divisor * divisor
    return f"{below} or {below + divisor}" if below else str(divisor)


@cache
def divisors(value: int) -> str:
    """'1, 2, 3, 4, 6, 12'; the twelve smallest, and the value itself."""
    found = [d for d in range(1, min(value, 4096) + 1) if value % d == 0][:12]
    return ", ".join(map(str, found if found[-1] == value else [*found, value]))
