"""From `.gin` files to the frozen tree of a run, strictly: every mistake of every line is shown at once.

Decides what names, types, defaults and references mean; the grammar is `statements`, the rules between fields `checks`.

    files, --set --statements--> bindings in order --> last one of each field --> conform --> Run --checks--> Config

Invariant: a line that has no effect in the run is an error, except one that another file or the command line replaces.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mtx.config import checks, render, schema
from mtx.config.components import DEFAULTS, Setting, accepts, classes, components, sections, settings
from mtx.config.render import Origin
from mtx.config.statements import Binding, Macro, Mistake, Reference, Script, closest, nearest, read_file, read_text
from mtx.config.values import conform, describe, format_value
from mtx.errors import UserError


@dataclass(frozen=True)
class Config:
    """A resolved run and where its values come from."""

    run: schema.Run
    provenance: Mapping[str, Origin]
    """'Model.num_layers' -> its origin; fields that hold their default are absent."""

    def text(self) -> str:
        """The run as a `.gin` text that loads to an equal run, every field and component included."""
        return render.dump(self.run, self.provenance)


def load(path: str | Path | None, overrides: Sequence[str] = ()) -> Config:
    """Reads a config file and all that it includes.

    Args:
        overrides: Statements applied last, in the same grammar (`Model.num_layers = 12`).

    Raises:
        UserError: All mistakes, each with file:line.
    """
    found = locate(path)
    return _resolve(read_file(found, overrides), str(found))


def load_text(text: str, name: str, overrides: Sequence[str] = ()) -> Config:
    """Reads a config from text, which messages call `name`; its includes start at the working directory."""
    return _resolve(read_text(text, name, overrides), name)


def locate(path: str | Path | None, *, examples: str = "configs/runs") -> Path:
    """The path of a config file that exists.

    Args:
        examples: The folder that messages point to, besides the file's own.

    Raises:
        UserError: There is no such file.
    """
    if path is None:
        raise UserError(f"no config given: name a .gin file; {_examples(examples)}")
    path = Path(path)
    if path.is_dir():
        inside = f"its config is {path / 'config.gin'}" if (path / "config.gin").exists() else _examples(examples, path)
        raise UserError(f"{str(path)!r} is a folder and a config is a file; {inside}")
    if not path.exists():
        there = _examples(examples, path.parent)
        raise UserError(f"no config file {str(path)!r} (looked in {path.parent.resolve()}); {there}")
    return path


def _examples(examples: str, folder: Path | None = None) -> str:
    for place in (folder, Path(examples)):
        if place and (found := sorted(map(str, place.glob("*.gin")))):
            return f"there is {', '.join(found[:8])}{', ...' if len(found) > 8 else ''}"
    return f"the sources have examples in {examples}/"


def link(script: Script, name: str) -> tuple[Config, list[str]]:
    """The config of a script, and all mistakes in it, each with its place: of use only where there are none.

    The mistakes of `checks` are looked for where each line by itself means something.
    """
    linker = _Linker(script, name)
    run = linker.build_run()
    mistakes = [str(mistake) for mistake in linker.sorted_mistakes()] or checks.check_run(run, linker.provenance)
    return Config(run, linker.provenance), mistakes


def refuse(mistakes: Sequence[str], name: str) -> None:
    """Raises UserError with all mistakes; returns where there are none."""
    if mistakes:
        count = "1 mistake" if len(mistakes) == 1 else f"{len(mistakes)} mistakes"
        raise UserError(f"{count} in the config {name}\n" + "\n".join(mistakes))


def _resolve(script: Script, name: str) -> Config:
    config, mistakes = link(script, name)
    refuse(mistakes, name)
    return config


class _Linker:
    """Gives the bindings of a script their meaning; adds what has none to the script's mistakes."""

    def __init__(self, script: Script, name: str):
        self.script, self.name = script, name
        self.macros: dict[str, list[Binding]] = {}  # name -> definitions, the one in effect last
        self.fields: dict[str, list[_Assignment]] = {}  # key -> assignments, the one in effect last
        self.built: dict[str, Any] = {}  # class name -> what the run holds
        self.provenance: dict[str, Origin] = {}

    def build_run(self) -> schema.Run:
        """The run; of use only where there are no mistakes."""
        for binding in self.script.bindings:
            if not binding.owner:
                self.macros.setdefault(binding.field, []).append(binding)
        for order, binding in enumerate(self.script.bindings):
            if binding.owner and self._exists(binding):
                self.fields.setdefault(binding.key, []).append(self._assign(binding, order))
        for cls in sections().values():
            self._build(cls, ())
        self._check_macros()
        self._check_leftovers()
        names = [field.name for field in dataclasses.fields(schema.Run)]
        return schema.Run(**dict(zip(names, (self.built[name] for name in sections()))))

    def sorted_mistakes(self) -> list[Mistake]:
        """By file, in the order of reading, then by line."""
        files = [b.file for b in self.script.bindings] + [m.file for m in self.script.mistakes]
        return sorted(self.script.mistakes, key=lambda m: (files.index(m.file), m.line))

    def _complain(self, binding: Binding, message: str) -> None:
        self.script.complain(binding.file, binding.line, message, binding.text)

    def _exists(self, binding: Binding) -> bool:
        cls = classes().get(binding.owner)
        if cls is None:
            self._complain(binding, f"no class {binding.owner!r}; {nearest(binding.owner, classes())}")
        elif binding.field not in settings(cls):
            known = _keys_named(binding.field) or nearest(binding.field, settings(cls))
            self._complain(binding, f"{binding.owner} has no field {binding.field!r}; {known}")
        else:
            return True
        return False

    def _assign(self, binding: Binding, order: int) -> _Assignment:
        value = self._expand(binding.value, binding, ())
        if value is not _UNKNOWN:
            try:
                value = conform(value, settings(classes()[binding.owner])[binding.field])
            except ValueError as error:
                self._complain(binding, str(error))
                value = _UNKNOWN
        return _Assignment(binding, order, value)

    def _expand(self, value: Any, binding: Binding, trail: tuple[str, ...]) -> Any:
        """The value with every macro replaced; _UNKNOWN where one cannot be, or a reference means nothing."""
        if isinstance(value, Macro):
            if value.name in trail:
                self._complain(binding, f"macros go in a circle: {' -> '.join(f'%{n}' for n in (*trail, value.name))}")
            if value.name in trail or value.name not in self.macros:
                return _UNKNOWN
            return self._expand(self.macros[value.name][-1].value, binding, (*trail, value.name))
        if isinstance(value, Reference):
            return value if self._means_something(value, binding) else _UNKNOWN
        if isinstance(value, dict):
            keys = [self._expand(key, binding, trail) for key in value]
            if not all(isinstance(key, str | int | float | _Unknown) for key in keys) or len(set(keys)) < len(keys):
                self._complain(binding, "keys of a dict are strings or numbers, each of them once")
                return _UNKNOWN
            value = dict(zip(keys, [self._expand(item, binding, trail) for item in value.values()]))
            return _UNKNOWN if _UNKNOWN in keys or _UNKNOWN in value.values() else value
        if isinstance(value, list | tuple):
            value = type(value)(self._expand(item, binding, trail) for item in value)
            return _UNKNOWN if _UNKNOWN in value else value
        return value

    def _means_something(self, reference: Reference, binding: Binding) -> bool:
        scope, _, name = reference.name.rpartition("/")
        if scope:
            self._complain(binding, f"gin's scopes ({scope}/) have no meaning here: write @{name}()")
        elif reference.name in sections():
            self._complain(binding, f"@{reference.name} is a part of every run and is not referred to")
        elif reference.name not in components():
            self._complain(binding, f"@{reference.name} does not exist; {nearest(reference.name, components())}")
        elif not reference.called:
            self._complain(binding, f"write @{reference.name}(), with parentheses")
        else:
            return True
        return False

    def _build(self, cls: type, trail: tuple[str, ...]) -> Any:
        """The object of a class, once; None where a mistake prevents it."""
        name = cls.__name__
        if name in self.built:
            return self.built[name]
        arguments: dict[str, Any] = {}
        for setting in settings(cls).values():
            value = setting.default
            if history := self.fields.get(setting.key):
                value = history[-1].value
                self.provenance[setting.key] = self._find_origin(history)
            elif value is schema.REQUIRED and not (self.script.lost_files or self.script.may_lack(setting.name)):
                message = f"{setting.key} is not set and has no default: {describe(setting)}; {setting.doc}"
                self.script.complain(self.name, 0, message)
            if value is None and setting.key in DEFAULTS:
                value = Reference(DEFAULTS[setting.key], True)
            arguments[setting.name] = self._realize(value, setting, (*trail, name))
        self.built[name] = None if self.script.mistakes else cls(**arguments)
        return self.built[name]

    def _realize(self, value: Any, setting: Setting, trail: tuple[str, ...]) -> Any:
        """The value with references replaced by what they refer to."""
        if isinstance(value, tuple):
            return tuple(self._realize(item, setting, trail) for item in value)
        if not isinstance(value, Reference):
            return value
        if value.name in trail:
            self._complain(self.fields[setting.key][-1].binding, f"@{value.name}() refers to itself")
            return None
        return self._build(components()[value.name], trail)

    def _find_origin(self, history: Sequence[_Assignment]) -> Origin:
        *past, last = history
        macros = []
        for name in self._find_macros(last.binding.value, ()):
            *old, definition = self.macros[name]
            over = [f", over {format_value(d.value)} ({d.place})" for d in reversed(old)]
            macros.append(f"%{name} ({definition.place}{''.join(over)})")
        overrode = [(format_value(old.value), old.binding.place) for old in reversed(past)]
        return Origin(last.binding.place, tuple(macros), tuple(overrode))

    def _find_macros(self, value: Any, trail: tuple[str, ...]) -> Iterator[str]:
        for name in _names(value, Macro):
            if name in self.macros and name not in trail:
                yield name
                yield from self._find_macros(self.macros[name][-1].value, (*trail, name))

    def _check_macros(self) -> None:
        """Complains about uses of macros that do not exist, and about macros that nothing uses."""
        uses = [(name, binding) for binding in self.script.bindings for name in _names(binding.value, Macro)]
        used = {name for name, _ in uses}
        for name, binding in uses:
            if name not in self.macros and not self.script.may_lack(name):
                self._complain(binding, f"the macro %{name} is never defined; {nearest(name, self.macros)}")
        for name, (first, *_) in self.macros.items():
            if name not in used and not self.script.may_lack(name):
                cure = _keys_named(name) or closest(name, used) or "remove it"
                self._complain(first, f"nothing uses the macro {name}; {cure}")

    def _check_leftovers(self) -> None:
        """Complains about components that are configured and that nothing refers to, once for each."""
        checked = set(self.built)
        for history in self.fields.values():
            for assignment in history:
                owner = assignment.binding.owner
                if owner in checked or self._is_replaced(owner, assignment, ()):
                    continue
                checked.add(owner)
                takers = _takers(classes()[owner])
                if any(key in self.fields and self.fields[key][-1].value is _UNKNOWN for key in takers):
                    continue  # one of them was meant to refer to it
                live = [key for key in takers if key.split(".")[0] in self.built] or takers
                cure = f"set {' or '.join(live)} = @{owner}(), or remove it"
                self._complain(assignment.binding, f"no effect, for nothing refers to {owner}: {cure}")

    def _is_replaced(self, owner: str, assignment: _Assignment, trail: tuple[str, ...]) -> bool:
        """Whether a later file took away the reference to a component that an assignment counted on."""
        for key, (*past, last) in self.fields.items():
            names = {name for old in past for name in _names(old.value, Reference)} | {DEFAULTS.get(key)}
            if owner in names and last.order > assignment.order and last.binding.file != assignment.binding.file:
                return True
            holder, names = last.binding.owner, names | set(_names(last.value, Reference))
            idle = owner in names and holder not in self.built and holder not in trail
            if idle and self._is_replaced(holder, assignment, (*trail, owner)):
                return True
        return False


@dataclass(frozen=True)
class _Assignment:
    """A binding of a field that exists, with its value as the field holds it; references are still names."""

    binding: Binding
    order: int  # of application
    value: Any


class _Unknown:
    """A value that a mistake hides."""


_UNKNOWN = _Unknown()


def _names(value: Any, kind: type[Macro] | type[Reference]) -> Iterator[str]:
    """Names of the macros or references anywhere in a value."""
    if isinstance(value, kind):
        yield value.name
    elif isinstance(value, dict):
        for item in value.items():
            yield from _names(item, kind)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _names(item, kind)


def _takers(component: type) -> list[str]:
    """Keys of the fields that may hold a component."""
    every = (setting for cls in classes().values() for setting in settings(cls).values())
    return [setting.key for setting in every if accepts(setting.annotation, component)]


def _keys_named(name: str) -> str:
    """'did you mean ...?' where some class has a field of exactly this name."""
    keys = [f"{owner}.{name}" for owner, cls in classes().items() if name in settings(cls)]
    return f"did you mean {' or '.join(keys)}?" if keys else ""
