"""A resolved run shown to people and programs: the dump that loads again, explanations, differences.

Decides the text; reads no file.

Invariant: every field of every class that takes part in the run is shown, defaults included, and nothing else.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from mtx.config import schema
from mtx.config.components import Setting, classes, settings
from mtx.config.statements import nearest
from mtx.config.values import describe, format_value
from mtx.errors import UserError

WIDTH = 100


@dataclass(frozen=True)
class Origin:
    """Where the value of a field was set, and what it replaced, newest first."""

    place: str  # "runs/x.gin:5" or "<command line>"
    through: tuple[str, ...] = ()  # "%NAME (runs/x.gin:2)" for each macro of the value
    overrode: tuple[tuple[str, str], ...] = ()  # (value, place)

    def __str__(self) -> str:
        parts = [self.place, *(f"through {macro}" for macro in self.through)]
        parts += [f"over {value} ({place})" for value, place in self.overrode]
        return ", ".join(parts)


@dataclass(frozen=True, kw_only=True)
class Difference:
    """A field in which two runs differ; a side that lacks it (another optimizer, say) holds ABSENT."""

    setting: Setting
    old: Any
    new: Any


ABSENT = object()


def parts(run: schema.Run) -> dict[str, Any]:
    """The objects of a run by class name: its sections in order, each followed by the components it refers to."""
    found: dict[str, Any] = {}

    def visit(value: Any) -> None:
        if isinstance(value, tuple):
            for item in value:
                visit(item)
        elif dataclasses.is_dataclass(value):
            if not isinstance(value, schema.Run):
                found[type(value).__name__] = value
            for field in dataclasses.fields(value):
                visit(getattr(value, field.name))

    visit(run)
    return found


def values(run: schema.Run) -> Iterator[tuple[Setting, Any]]:
    """Every field of the run with its value."""
    for owner, node in parts(run).items():
        for setting in settings(classes()[owner]).values():
            yield setting, getattr(node, setting.name)


def dump(run: schema.Run, provenance: Mapping[str, Origin]) -> str:
    """The run as a `.gin` text that loads to an equal run, each line with where its value comes from."""
    lines = ["# The resolved config; loads as it is."]
    owner = None
    for setting, value in values(run):
        if setting.owner != owner:
            owner = setting.owner
            lines += ["", f"# {_summary(classes()[owner])}"]
        origin = str(provenance[setting.key]) if setting.key in provenance else "default"
        comment = f"# {origin if origin.isprintable() else ascii(origin)}"
        statement = f"{setting.key} = {format_value(value)}"
        if isinstance(value, dict) and len(statement) > WIDTH:
            items = [f"    {format_value(k)}: {format_value(v)}," for k, v in value.items()]
            lines += [f"{setting.key} = {{  {comment}", *items, "}"]
        else:
            lines.append(f"{statement:<48}  {comment}")
    return "\n".join(lines) + "\n"


def explain(run: schema.Run, provenance: Mapping[str, Origin], key: str) -> list[dict[str, Any]]:
    """What there is to know about a field (`Class.field`) or about all fields of a class (`Class`).

    Raises:
        UserError: The key does not exist; names the nearest.
    """
    owner, _, name = key.partition(".")
    cls = classes().get(owner)
    if cls is None:
        raise UserError(f"no class {owner!r} in a config; {nearest(owner, classes())}")
    if name and name not in settings(cls):
        raise UserError(f"{owner} has no field {name!r}; {nearest(name, settings(cls))}")
    node = parts(run).get(owner)
    chosen = [settings(cls)[name]] if name else settings(cls).values()
    return [_explain(setting, node, provenance.get(setting.key)) for setting in chosen]


def explain_text(entry: Mapping[str, Any]) -> str:
    """One entry of `explain`, for people."""
    rows = [("set at", entry["place"])]
    rows += [("through", macro) for macro in entry["through"]]
    rows += [("overrode", f"{old['value']} at {old['place']}") for old in entry["overrode"]]
    rows += [("type", entry["type"]), ("default", entry["default"]), ("meaning", entry["meaning"])]
    rows += [("on resume", entry["on_resume"])]
    return "\n".join([f"{entry['key']} = {entry['value']}", *(f"  {head:<10} {text}" for head, text in rows)])


def compare(old: schema.Run, new: schema.Run) -> list[Difference]:
    """The fields in which two runs differ, in the order of the dump; those of components by themselves."""
    before, after = ({s.key: (s, v) for s, v in values(run)} for run in (old, new))
    differences = []
    for key, (setting, value) in {**after, **before}.items():
        other = after[key][1] if key in after else ABSENT
        value = value if key in before else ABSENT
        if show(value) != show(other):  # as text: the order of a dict counts, and a component by its name alone
            differences.append(Difference(setting=setting, old=value, new=other))
    return differences


def show(value: Any) -> str:
    """A value of a Difference as text."""
    return "(not part of the run)" if value is ABSENT else format_value(value)


def to_json(value: Any) -> Any:
    """A value of the tree as JSON has it; a component becomes its reference."""
    if dataclasses.is_dataclass(value):
        return format_value(value)
    if isinstance(value, dict):
        return {str(k): to_json(v) for k, v in value.items()}
    return [to_json(v) for v in value] if isinstance(value, tuple) else value


def _summary(cls: type) -> str:
    return f"{cls.__name__}: {(cls.__doc__ or '').strip().splitlines()[0]}"


ON_RESUME = {
    schema.FREE: "may change freely",
    schema.MATH: "a change alters the training from there on",
    schema.DATA: "a change alters which data follow",
    schema.IMPOSSIBLE: "cannot change: the checkpoints do not fit",
}


def _explain(setting: Setting, node: Any, origin: Origin | None) -> dict[str, Any]:
    required = setting.default is schema.REQUIRED
    place = "nowhere: nothing in this run refers to the class" if node is None else "default"
    return {
        "key": setting.key,
        "value": show(ABSENT if node is None else getattr(node, setting.name)),
        "place": origin.place if origin else place,
        "through": list(origin.through) if origin else [],
        "overrode": [{"value": value, "place": at} for value, at in origin.overrode] if origin else [],
        "type": describe(setting),
        "default": "none, it is required" if required else format_value(setting.default),
        "meaning": setting.doc,
        "on_resume": ON_RESUME[setting.drift],
    }
