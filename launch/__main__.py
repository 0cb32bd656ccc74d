"""`python -m launch TARGET [options] -- COMMAND`: finds the target, a file of `launch/targets`, and hands it the job.
`python -m launch ACTION`: does something with a job that was started (`launch.control`).

Invariant: a user's mistake ends in a short message and exit code 2, without a traceback.
"""

from __future__ import annotations

import argparse
import importlib
import pkgutil
import shlex
import sys
from collections.abc import Sequence

from launch import arguments, control, environment, registry, stream, targets
from launch.job import LaunchError, keep

PROGRAM = "python -m launch"


def main(argv: Sequence[str] | None = None) -> int:
    """Starts a job.

    Args:
        argv: Arguments without the program's name; those of the process by default.

    Returns:
        The exit code: that of the run, or 2.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    options, command = words, []
    if "--" in words:
        options, command = words[: words.index("--")], words[words.index("--") + 1 :]
    try:
        args, unknown = _parser().parse_known_args(options)
        if unknown:
            after = "; the command goes after `--`" if args.action is None and not command else ""
            args.parser.error(f"unknown: {shlex.join(unknown)}{after}; see `{args.parser.prog} --help`")
        if args.action is not None:
            if command:
                raise LaunchError(f"{args.action} takes no command")
            return control.run(args.action, args, main)
        if not command:
            raise LaunchError(f"no command: `{args.parser.prog} [options] -- mtx train RUN.gin --run-dir DIR`")
        job = args.target.make_job(args, command)
        if args.dry_run:
            stream.write(sys.stdout, environment.with_notes(args.environment, args.target.render(job)) + "\n")
            return 0
        job = registry.with_free_name(job) if args.name is None else job
        registry.refuse_taken(job.name)
        untried = environment.check(args.environment)
        if untried is not None:
            stream.say(untried)
        try:
            if getattr(args.target, "RUN_DIR_IS_HERE", True):
                keep(job, args.target.__name__.rpartition(".")[2], words)
            return int(args.target.submit(job))
        except OSError as error:
            raise LaunchError(f"{error.filename or job.run_dir}: {error.strerror}; no attempt can be started") from None
    except KeyboardInterrupt:
        return 130
    except LaunchError as error:
        print(f"launch: {error}", file=sys.stderr)
        return error.exit_code


def _parser() -> argparse.ArgumentParser:
    usage = f"{PROGRAM} TARGET [options] -- mtx train RUN.gin --run-dir DIR ...\n       {PROGRAM} ACTION ..."
    parser = argparse.ArgumentParser(
        prog=PROGRAM,
        usage=usage,
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    subparsers = parser.add_subparsers(metavar="TARGET | ACTION", required=True)
    found = [info.name for info in pkgutil.iter_modules(targets.__path__)]
    modules = {name: importlib.import_module(f"{targets.__name__}.{name}") for name in found}
    for name, module in modules.items():
        target = subparsers.add_parser(
            name,
            prog=f"{PROGRAM} {name}",
            description=module.HELP,
            allow_abbrev=False,
            usage=f"{PROGRAM} {name} [options] -- COMMAND ...",
        )
        module.add_arguments(target)
        arguments.add_common_arguments(target)
        target.set_defaults(target=module, action=None, parser=target)
    for name, text in control.ACTIONS.items():
        action = subparsers.add_parser(name, prog=f"{PROGRAM} {name}", description=text, allow_abbrev=False)
        control.add_arguments(name, action)
        action.set_defaults(action=name, parser=action)
    groups = (("targets", {name: module.HELP for name, module in modules.items()}), ("actions", control.ACTIONS))
    parser.epilog = "\n\n".join(
        f"{title}:\n" + "\n".join(f"  {name:<12}{text}" for name, text in group.items()) for title, group in groups
    )
    return parser


if __name__ == "__main__":
    sys.exit(main())
