"""A study file: what all of its points share, as in any config, and sizes and layouts that differ.

    include '../runs/base.gin'
    Study.sizes = {'1.7B': '../models/sc21_1b7.gin', 'small': {'Model.d_model': 512, 'Model.num_layers': 8}}
    Study.layouts = {'tensor 2': {'Mesh.tensor': 2}, 'data 2': {'Mesh.data': 2}}

Decides what a point is: a run whose config is the file's own lines, then those of a size, then those of a layout, then
the command line's. Runs nothing.

Invariant: every mistake of every point is shown at once, each once, with the line that it comes from.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mtx.config import reader
from mtx.config.components import settings
from mtx.config.reader import Config
from mtx.config.schema import setting
from mtx.config.statements import COMMAND_LINE, Binding, Macro, Reference, Script, nearest, read_file
from mtx.config.values import conform, format_value

AS_IT_IS = "as it is"
"""The name of the only size, or layout, of a study that names none."""
_FIELD = re.compile(r"[A-Za-z_]\w*\.[A-Za-z_]\w*")


@dataclass(frozen=True, kw_only=True)
class Study:
    """What the lines `Study.field = ...` say."""

    sizes: Mapping[str, Any] = setting(
        {}, doc="name -> .gin file (relative to this one) or {'Class.field': value}; what is large or small"
    )
    layouts: Mapping[str, Any] = setting(
        {}, doc="the same, or a list of such dicts, which name themselves: how a run lies on its devices"
    )
    points: tuple[tuple[str, str], ...] | None = setting(
        None, doc="pairs (size, layout), by name; None: each size in each layout"
    )
    steps: int = setting(10, low=1, doc="steps of a point that are measured")
    warmup_steps: int = setting(3, low=0, doc="steps before those, which are not")
    minutes: float = setting(
        5.0, low=0.01, doc="of a point at most, compilation included; the steps that it has measured by then count"
    )
    tokens: tuple[float, ...] = setting(
        (300e9,), low=1.0, doc="a list of numbers of tokens: how long it would take to train on them"
    )
    simulated: bool = setting(
        False, doc="points run on simulated CPU devices, as many as their meshes name, not on the devices there are"
    )


@dataclass(frozen=True)
class Point:
    """One size in one layout.

    Attributes:
        config: Of use where nothing is refused.
        refused: Why the fields of this run contradict each other; None: they do not.
    """

    size: str
    layout: str
    config: Config
    refused: str | None

    @property
    def name(self) -> str:
        return ", ".join(part for part in (self.size, self.layout) if part != AS_IT_IS) or AS_IT_IS


@dataclass(frozen=True)
class Plan:
    """A study and its points, in order."""

    study: Study
    points: tuple[Point, ...]


def load_study(path: str | Path | None, overrides: Sequence[str] = ()) -> Plan:
    """Reads a study file and all that it names.

    Args:
        overrides: Statements applied last, to every point or to the study itself (`Study.steps = 3`).

    Raises:
        UserError: All mistakes, each with file:line; or the fields of every single point contradict each other.
    """
    found = reader.locate(path, examples="configs/studies")
    script = read_file(found, overrides)
    own = [binding for binding in script.bindings if binding.owner == "Study"]
    shared = [binding for binding in script.bindings if binding.owner != "Study"]
    form = _Form(script)
    values = {binding.field: form.read(binding) for binding in own}  # the last line of a field holds
    lines = {binding.field: binding for binding in own}
    sizes = form.expand(values, lines, "sizes")
    layouts = form.expand(values, lines, "layouts")
    pairs = form.choose(values.get("points"), lines.get("points"), sizes, layouts)
    first = [binding for binding in shared if binding.file != COMMAND_LINE]
    last = [binding for binding in shared if binding.file == COMMAND_LINE]
    texts: dict[str, None] = dict.fromkeys(map(str, script.mistakes))
    points = []
    for size, layout in pairs:
        bindings = [*first, *sizes[size], *layouts[layout], *last]
        # What is wrong with the study itself hides what its points have: they are not said to lack anything.
        mine = Script(bindings, list(script.mistakes), script.lost, bool(script.mistakes))
        config, mistakes = reader.link(mine, str(found))
        if mine.mistakes:
            texts |= dict.fromkeys(mistakes)
        points.append(Point(size, layout, config, "\n".join(mistakes) or None))
    reader.refuse(list(texts), str(found))
    if all(point.refused for point in points):
        reader.refuse(list(dict.fromkeys(point.refused or "" for point in points)), str(found))
    scalars = {name: value for name, value in values.items() if name not in ("sizes", "layouts", "points")}
    return Plan(Study(**scalars, sizes=sizes, layouts=layouts, points=tuple(pairs)), tuple(points))


class _Form:
    """Reads the lines of a study; what is wrong with them is noted in the script."""

    def __init__(self, script: Script) -> None:
        self._script = script

    def _complain(self, binding: Binding, message: str) -> None:
        self._script.complain(binding.file, binding.line, message, binding.text)

    def read(self, binding: Binding) -> Any:
        """The value of a field as the study holds it; None where it is wrong."""
        known = settings(Study)
        if binding.field not in known:
            self._complain(binding, f"Study has no field {binding.field!r}; {nearest(binding.field, known)}")
            return None
        if binding.field in ("sizes", "layouts", "points"):
            return binding.value
        if isinstance(binding.value, Macro | Reference):
            self._complain(binding, f"{binding.key} takes a literal, not {format_value(binding.value)}")
            return None
        try:
            return conform(binding.value, known[binding.field])
        except ValueError as error:
            self._complain(binding, str(error))
            return None

    def expand(
        self, values: Mapping[str, Any], lines: Mapping[str, Binding], field: str
    ) -> dict[str, tuple[Binding, ...]]:
        """The statements of each size or layout, by its name."""
        if field not in values:
            return {AS_IT_IS: ()}
        value, binding = values[field], lines[field]
        if field == "layouts" and isinstance(value, list | tuple) and all(isinstance(item, dict) for item in value):
            value = {_describe(item): item for item in value}
        if not isinstance(value, dict) or not value:
            lists = ", or a list of such dicts" if field == "layouts" else ""
            self._complain(
                binding, f"{binding.key} must be {{'name': 'file.gin' or {{'Class.field': value}}, ...}}{lists}"
            )
            return {}
        return {str(name): self._statements(binding, name, entry) for name, entry in value.items()}

    def _statements(self, binding: Binding, name: Any, entry: Any) -> tuple[Binding, ...]:
        if not isinstance(name, str) or not name.strip() or not name.isprintable():
            self._complain(binding, f"{format_value(name)} is no name: quote some letters")
        elif isinstance(entry, str):
            return self._file(binding, entry)
        elif isinstance(entry, dict):
            wrong = [key for key in entry if not (isinstance(key, str) and _FIELD.fullmatch(key))]
            for key in wrong:
                self._complain(binding, f"{name!r}: {format_value(key)} is no 'Class.field'")
            if not wrong:
                pairs = ((key.split("."), value) for key, value in entry.items())
                return tuple(
                    dataclasses.replace(binding, owner=owner, field=field, value=value)
                    for (owner, field), value in pairs
                )
        else:
            self._complain(
                binding, f"{name!r} must be a 'file.gin' or {{'Class.field': value}}, not {format_value(entry)}"
            )
        return ()

    def _file(self, binding: Binding, entry: str) -> tuple[Binding, ...]:
        folder = Path() if binding.file == COMMAND_LINE else Path(binding.file).parent
        part = read_file(folder / entry)
        for mistake in part.mistakes:
            if mistake.line:
                self._script.mistakes.append(mistake)
            else:
                self._complain(binding, mistake.message)  # the file as a whole, which this line names
        for inner in part.bindings:
            if inner.owner == "Study":
                self._script.complain(inner.file, inner.line, "a size or layout is no study itself", inner.text)
        return tuple(part.bindings)

    def choose(
        self, value: Any, binding: Binding | None, sizes: Mapping[str, Any], layouts: Mapping[str, Any]
    ) -> list[tuple[str, str]]:
        """The pairs of names that are points."""
        if value is None or binding is None:
            return [(size, layout) for size in sizes for layout in layouts]
        if not isinstance(value, list | tuple) or not value or not all(map(_is_pair, value)):
            self._complain(binding, "Study.points must be [('size', 'layout'), ...]: names of Study.sizes and layouts")
            return []
        for size, layout in value:
            for field, name, known in (("sizes", size, sizes), ("layouts", layout, layouts)):
                if known and name not in known:
                    self._complain(binding, f"{name!r} is not in Study.{field}; {nearest(name, known)}")
        return list(dict.fromkeys((size, layout) for size, layout in value if size in sizes and layout in layouts))


def _is_pair(value: Any) -> bool:
    return isinstance(value, list | tuple) and len(value) == 2 and all(isinstance(item, str) for item in value)


def _describe(entry: Mapping[Any, Any]) -> str:
    """The name of a layout without one: 'data 2, tensor 2'."""
    return ", ".join(f"{str(key).rpartition('.')[2]} {value}" for key, value in entry.items()) or AS_IT_IS
