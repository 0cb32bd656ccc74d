"""From `.gin` text to a list of bindings, includes inlined, each with the line it came from.

Decides the grammar, which is stock gin's without scopes and imports, parsed by gin-config; knows no class and no field.

Invariant: text is data. Values are Python literals, references and macros stay names, nothing is imported or called.
"""

from __future__ import annotations

import difflib
import importlib.util  # noqa: F401  gin 0.5.0 uses importlib.util without importing it
import io
import tokenize
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from gin import config_parser

COMMAND_LINE = "<command line>"

_CLOSERS = {")": "(", "]": "[", "}": "{"}
_LITERALS = "values are numbers, 'quoted strings', True, False, None, lists, dicts"
_EXPLANATIONS = {  # beginning of gin's message -> ours
    "Couldn't parse statement": "expected `Class.field = value`, `NAME = value` or `include 'file.gin'`",
    "Unable to parse value": f"expected a value; {_LITERALS}",
    "Expected newline": f"expected the end of the line after the value; {_LITERALS}, never expressions",
    "Unexpected token": "expected a name at the beginning of the statement",
    "Malformatted scope or selector": "malformed name: `Class.field`, without spaces",
}


@dataclass(frozen=True)
class Reference:
    """`@Name()`, or `@Name` where `called` is False."""

    name: str
    called: bool


@dataclass(frozen=True)
class Macro:
    """`%NAME`."""

    name: str


@dataclass(frozen=True, kw_only=True)
class Binding:
    """`owner.field = value`, or the macro definition `field = value`, whose owner is empty."""

    owner: str
    field: str
    value: Any
    file: str
    line: int
    text: str

    @property
    def key(self) -> str:
        return f"{self.owner}.{self.field}" if self.owner else f"%{self.field}"

    @property
    def place(self) -> str:
        return place(self.file, self.line)


@dataclass(frozen=True, kw_only=True)
class Mistake:
    """One mistake; line 0 where the file as a whole is at fault."""

    file: str
    line: int
    message: str
    text: str = ""

    def __str__(self) -> str:
        return f"{place(self.file, self.line)}: {self.message}" + (f"\n    {self.text}" if self.text else "")


@dataclass
class Script:
    """All bindings in the order in which they apply, and every mistake met on the way."""

    bindings: list[Binding] = field(default_factory=list)
    mistakes: list[Mistake] = field(default_factory=list)
    lost: list[str] = field(default_factory=list)
    """Text that mistakes kept out of `bindings`."""
    lost_files: bool = False
    """Whether the text of whole files is missing."""

    def complain(self, file: str, line: int, message: str, text: str = "") -> None:
        """Notes a mistake, with the line that holds it."""
        self.mistakes.append(Mistake(file=file, line=line, message=message, text=text))

    def may_lack(self, name: str) -> bool:
        """Whether a name that seems missing stands in a line that could not be read."""
        return any(name in text for text in self.lost)


def place(file: str, line: int) -> str:
    """`runs/x.gin:5`; the command line has no line numbers."""
    return file if file == COMMAND_LINE or not line else f"{file}:{line}"


def closest(name: str, known: Iterable[str]) -> str:
    """'did you mean ...?' for a name that does not exist; empty where no name is like it."""
    folded = {k.lower().removesuffix(".gin"): k for k in known}
    matches = difflib.get_close_matches(name.lower().removesuffix(".gin"), folded, 3, 0.6)
    close = [folded[match] for match in matches]
    return f"did you mean {' or '.join(close)}?" if close else ""


def nearest(name: str, known: Iterable[str]) -> str:
    """'did you mean ...?', or where no name is like it, what there is."""
    known = list(known)
    listed = ", ".join(known[:16]) + (", ..." if len(known) > 16 else "")
    return closest(name, known) or f"there is {listed or 'none'}"


def read_file(path: Path, overrides: Sequence[str] = ()) -> Script:
    """The bindings of a file and of all that it includes, then the overrides, each a statement or several.

    What cannot be read is a mistake like any other.
    """
    script = Script()
    _read_file(script, path, str(path), asked_at=(str(path), 0, ""), outer=())
    _read_overrides(script, overrides)
    return script


def read_text(text: str, name: str, overrides: Sequence[str] = ()) -> Script:
    """The same for a text that messages call `name`; its includes start at the working directory."""
    script = Script()
    _read_text(script, text, name, Path(), own={}, chain=())
    _read_overrides(script, overrides)
    return script


def _read_overrides(script: Script, overrides: Sequence[str]) -> None:
    own: dict[str, Binding] = {}  # all of them count as one file
    for order, override in enumerate(overrides):
        _read_text(script, "\n" * order + override, COMMAND_LINE, Path(), own=own, chain=())


@dataclass(frozen=True)
class _Includer:
    """A file that is being read, seen from one that it includes."""

    path: Path
    own: dict[str, Binding]


_Chain = tuple[_Includer, ...]


class _Names(config_parser.ParserDelegate):
    def configurable_reference(self, name: str, evaluate: bool) -> Reference:
        return Reference(name, evaluate)

    def macro(self, name: str) -> Macro:
        return Macro(name)


def _read_file(script: Script, path: Path, name: str, *, asked_at: tuple[str, int, str], outer: _Chain) -> None:
    """Args: asked_at: File, line and text of the statement that wants the file."""
    file, line, statement = asked_at
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        siblings = sorted(p.name for p in path.parent.glob("*.gin"))
        script.complain(file, line, f"no file {name!r}; {nearest(path.name, siblings)}", statement)
    except UnicodeDecodeError as error:
        script.complain(file, line, f"{name!r} is not UTF-8 text: {error.reason} at byte {error.start}", statement)
    except OSError as error:
        script.complain(file, line, f"cannot read {name!r}: {error.strerror}", statement)
    else:
        own: dict[str, Binding] = {}
        _read_text(script, text, name, path.parent, own=own, chain=(*outer, _Includer(path, own)))
        return
    script.lost_files = True


def _read_text(
    script: Script, text: str, name: str, directory: Path, *, own: dict[str, Binding], chain: _Chain
) -> None:
    """Args: own: The bindings made so far in the same file. chain: The files being read, this one last."""
    if not _is_whole(script, text, name):
        script.lost.append(text)
        script.lost_files = True
        return
    parser = config_parser.ConfigParser(text, _Names())
    more = True
    while more:
        start = parser.current_token
        try:
            statement = parser.parse_statement()
        except SyntaxError as error:
            script.complain(name, error.lineno or 0, _explain(error, parser), _first_line(error.text))
        except TypeError:
            script.complain(name, start.start[0], "keys of a dict are strings or numbers", _first_line(start.line))
        except RecursionError:
            script.complain(name, start.start[0], "brackets are nested too deeply")
        else:
            if statement is None:
                return
            _add(script, statement, name, directory, own=own, chain=chain)
            continue
        more = _skip_statement(parser)
        script.lost += text.splitlines()[start.start[0] - 1 : parser.current_token.start[0] - 1 if more else None]


def _skip_statement(parser: config_parser.ConfigParser) -> bool:
    """Goes to the next line that begins with a name in the first column: bodies and continuations are indented.

    Returns:
        Whether there is such a line.
    """
    starts = (tokenize.NAME, tokenize.DEDENT)
    while parser.current_token.type != tokenize.ENDMARKER:
        try:
            parser.advance_one_line()
        except StopIteration:  # the last token was read, or its reading failed
            return False
        if parser.current_token.type in starts and parser.current_token.start[1] == 0:
            return True
    return False


def _add(script: Script, statement: Any, name: str, directory: Path, *, own: dict[str, Binding], chain: _Chain) -> None:
    line, text = statement.location.line_num, _first_line(statement.location.line_content)
    if isinstance(statement, config_parser.ImportStatement):
        message = "a config imports nothing: components are found by their name; remove the line"
        script.complain(name, line, message, text)
    elif isinstance(statement, config_parser.IncludeStatement):
        path = directory / statement.filename
        shown = _shorten(path)
        if any(path.resolve() == includer.path.resolve() for includer in chain):
            loop = " -> ".join([*(_shorten(includer.path) for includer in chain), shown])
            script.complain(name, line, f"includes go in a circle: {loop}", text)
        else:
            _read_file(script, path, shown, asked_at=(name, line, text), outer=chain)
    elif statement.scope:
        message = f"gin's scopes ({statement.scope}/) have no meaning here: write Class.field = value"
        script.complain(name, line, message, text)
    elif isinstance(statement, config_parser.BindingStatement):
        owner, target = (statement.selector, statement.arg_name) if statement.arg_name else ("", statement.selector)
        binding = Binding(owner=owner, field=target, value=statement.value, file=name, line=line, text=text)
        if binding.key in own:
            script.complain(name, line, f"{binding.key} is set at {own[binding.key].place} too: keep one", text)
        for includer in chain:
            if includer.own is not own and binding.key in includer.own:
                earlier = includer.own[binding.key].place
                script.complain(name, line, f"replaces {earlier}, which stands above the include: move that up", text)
        own.setdefault(binding.key, binding)
        script.bindings.append(binding)


def _is_whole(script: Script, text: str, name: str) -> bool:
    """Whether text consists of whole tokens; complains about what breaks it, and about keys that stand twice in a dict.

    The parser looks one token ahead and keeps dicts only, so that it can tell neither.
    """
    lines = text.splitlines()

    def complain(line: int, message: str) -> None:
        script.complain(name, line, message, _show(lines[line - 1]) if 0 < line <= len(lines) else "")

    opened: list[tuple[str, int, set[str]]] = []  # bracket, its line, the keys seen in it
    previous = ""
    try:
        for token in tokenize.generate_tokens(io.StringIO(text).readline):
            if token.type == tokenize.ERRORTOKEN and token.string[0] in "'\"":
                raise tokenize.TokenError("unterminated string", token.start)
            if token.type == tokenize.OP and token.string in _CLOSERS.values():
                opened.append((token.string, token.start[0], set()))
            elif token.type == tokenize.OP and token.string in _CLOSERS:
                if not opened or opened[-1][0] != _CLOSERS[token.string]:
                    raise tokenize.TokenError(f"unmatched {token.string!r}", token.start)
                opened.pop()
            elif token.string == ":" and opened:
                if previous in opened[-1][2]:
                    complain(token.start[0], f"the key {previous!r} stands twice in one dict: keep one")
                opened[-1][2].add(previous)
            previous = token.string.strip("'\"")
    except (tokenize.TokenError, SyntaxError) as error:
        message = str(error.args[0])
        line = error.args[1][0] if isinstance(error, tokenize.TokenError) else (error.lineno or 1)
        if "string" in message:
            complain(line, "the string is never closed")
        elif opened:
            complain(opened[-1][1], f"{opened[-1][0]!r} is never closed")
        else:
            complain(line, message)
        return False
    return True


def _explain(error: SyntaxError, parser: config_parser.ConfigParser) -> str:
    message = error.msg or ""
    if "Failed to parse token" in message:
        token = message.rsplit("Failed to parse token ", 1)[1]
        return f"{token} is no value: a string needs quotes; {_LITERALS}"
    for beginning, ours in _EXPLANATIONS.items():
        if message.startswith(beginning):
            got = parser.current_token.string.strip()
            return f"{ours} (at {got!r})" if got else ours
    return message


def _first_line(text: str | None) -> str:
    return _show(((text or "").splitlines() or [""])[0])


def _show(line: str) -> str:
    """A line for messages: no control characters reach a terminal."""
    line = line.strip()
    return line if line.isprintable() else ascii(line)[1:-1]


def _shorten(path: Path) -> str:
    """A path for messages, without the `..` that joining leaves; what is opened keeps them (symbolic links)."""
    parts: list[str] = []
    for part in path.parts:
        if part == ".." and parts and parts[-1] not in ("..", path.anchor):
            parts.pop()
        else:
            parts.append(part)
    return str(Path(*parts))
