"""`python -m launch TARGET [options] -- COMMAND`: finds the target, a file of `launch/targets`, and hands it the job.

Invariant: a user's mistake ends in a short message and exit code 2, without a traceback.
"""

from __future__ import annotations

import argparse
import importlib
import pkgutil
import sys
from collections.abc import Sequence

from launch import targets
from launch.job import Job, LaunchError


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
        args = _parser().parse_args(options)
        if not command:
            raise LaunchError("no command: `python -m launch TARGET [options] -- mtx train RUN.gin --run-dir DIR`")
        job = args.target.make_job(args, command)
        if args.dry_run:
            print(args.target.render(job))
            return 0
        return int(args.target.submit(job))
    except LaunchError as error:
        print(f"launch: {error}", file=sys.stderr)
        return error.exit_code


def _parser() -> argparse.ArgumentParser:
    usage = "python -m launch TARGET [options] -- mtx train RUN.gin --run-dir DIR ..."
    parser = argparse.ArgumentParser(prog="python -m launch", usage=usage, allow_abbrev=False)
    subparsers = parser.add_subparsers(title="targets", metavar="TARGET", required=True)
    for info in pkgutil.iter_modules(targets.__path__):
        module = importlib.import_module(f"{targets.__name__}.{info.name}")
        target = subparsers.add_parser(info.name, help=module.HELP, description=module.HELP, allow_abbrev=False)
        module.add_arguments(target)
        _add_common_arguments(target)
        target.set_defaults(target=module)
    return parser


def _add_common_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--run-dir", metavar="DIR", help="the run directory, where the command does not say it")
    text = "failures in a row, without a newer checkpoint, after which to give up; default: %(default)s"
    add("--max-restarts", type=int, default=Job.max_restarts, metavar="N", help=text)
    text = "seconds before the first restart that waits, doubled with each failure; default: %(default)s"
    add("--backoff-s", type=float, default=Job.backoff_s, metavar="S", help=text)
    text = "seconds that processes have to end by themselves when one has failed, and again after SIGTERM, before "
    add("--grace-s", type=float, default=Job.grace_s, metavar="S", help=text + "SIGKILL; default: %(default)s")
    add("--dry-run", action="store_true", help="print what would be started, and start nothing")


if __name__ == "__main__":
    sys.exit(main())
