"""`mtx`: finds the command, hands it its arguments, turns what it raises into an exit code.

Decides nothing about any command: each is a file of `mtx/commands`, found by walking that directory.

Invariant: help and mistakes cost no heavy import, and a user's mistake never shows a traceback.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import pkgutil
import select
import sys
from collections.abc import Sequence
from types import ModuleType
from typing import Any, NoReturn

from mtx import commands
from mtx.commands import options
from mtx.errors import UserError

INTERRUPTED, BROKEN_PIPE = 130, 141


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command.

    Args:
        argv: Arguments without the program's name; those of the process by default.

    Returns:
        The exit code. Our own bugs propagate: a traceback and exit code 1.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    try:
        code = _run(arguments)
        sys.stdout.flush()
        return code
    except UserError as error:
        if "--json" in arguments:
            print(json.dumps({"error": str(error), "exit_code": error.exit_code}))
        print(f"mtx: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print("mtx: interrupted", file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:
        if not _reader_is_gone():
            raise
        return BROKEN_PIPE


def find_commands() -> dict[str, ModuleType]:
    """The modules of `mtx/commands` by the name that the user types."""
    names = [info.name for info in pkgutil.iter_modules(commands.__path__) if info.name != "options"]
    modules = [importlib.import_module(f"{commands.__name__}.{name}") for name in names]
    return {module.NAME: module for module in modules}


class _Parser(argparse.ArgumentParser):
    """Takes no abbreviated options; raises instead of exiting, so that --json reports this mistake as any other."""

    def __init__(self, **kwargs: Any):
        super().__init__(**{"allow_abbrev": False, **kwargs})

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}; see `{self.prog} --help`")


def _run(arguments: list[str]) -> int:
    found = find_commands()
    name = next((argument for argument in arguments if not argument.startswith("-")), None)
    if name is not None and name not in found:
        from mtx.config.statements import nearest

        raise UserError(f"no command {name!r}; {nearest(name, found)}")
    parser = _Parser(prog="mtx", description="Pretrains large transformer language models.")
    subparsers = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for command, module in found.items():
        subparser = subparsers.add_parser(command, help=module.HELP, description=module.HELP)
        module.add_arguments(subparser)
        subparser.set_defaults(run=module.run)
    try:
        args, unknown = parser.parse_known_args(arguments)
    except SystemExit:  # --help, which argparse has printed
        return 0
    if unknown:
        raise UserError(f"unknown arguments: {' '.join(unknown)}; see `mtx {name} --help`")
    options.apply(args)
    return int(args.run(args))


def _reader_is_gone() -> bool:
    """Whether stdout is the pipe that broke; if so, Python must not complain again when it flushes at exit."""
    poll = select.poll()
    poll.register(sys.stdout.fileno(), 0)
    gone = any(event & select.POLLERR for _, event in poll.poll(0))
    if gone:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return gone
