"""`mtx checkpoint`: which checkpoints a run has, whether they are whole, what they hold. Changes nothing."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mtx.commands import options

if TYPE_CHECKING:
    from mtx.checkpoints.manifest import Manifest

NAME = "checkpoint"
HELP = "list, verify or show the checkpoints of a run"

BAD, ALL_BAD = 2, 5


def add_arguments(parser: argparse.ArgumentParser) -> None:
    actions = "list: steps and sizes; verify: read every byte; show: all about one checkpoint"
    parser.add_argument("action", choices=("list", "verify", "show"), help=actions)
    parser.add_argument("run_dir", type=Path, metavar="RUN_DIR", help="run directory")
    parser.add_argument("--step", type=int, metavar="N", help="one checkpoint; default: all, or the newest to show")
    options.add_common_arguments(parser, devices=False)


def run(args: argparse.Namespace) -> int:
    """Returns 2 where a checkpoint does not verify, 5 where none of the run's does."""
    from mtx.checkpoints import steps
    from mtx.errors import UserError

    directory = args.run_dir / steps.NAME
    found = steps.list_steps(directory)
    if not found:
        raise UserError(f"{directory}: no checkpoint there; is {args.run_dir} a run directory that saved one?")
    if args.step is not None and args.step not in found:
        raise UserError(f"{directory}: no step {args.step}; there are {', '.join(map(str, found))}")
    if args.action == "show":
        return _show(directory, found[-1] if args.step is None else args.step, args)
    chosen = found if args.step is None else [args.step]
    return _list(directory, chosen, args) if args.action == "list" else _verify(directory, chosen, found, args)


def _list(directory: Path, chosen: list[int], args: argparse.Namespace) -> int:
    from mtx.checkpoints import manifest
    from mtx.errors import CheckpointError
    from mtx.reports.units import format_bytes

    entries: list[dict[str, Any]] = []
    for step in chosen:
        try:
            entries.append({**_summarize(manifest.read(directory / str(step))), "problem": None})
        except CheckpointError as error:
            entries.append({"step": step, "problem": str(error)})
    aside = sorted(path.name for path in directory.iterdir() if path.is_dir() and not path.name.isdecimal())
    if args.json:
        options.print_json({"checkpoints": entries, "not_checkpoints": aside})
        return 0
    for entry in entries:
        if entry["problem"] is not None:
            print(f"step {entry['step']}  {entry['problem']}")
        else:
            size = format_bytes(entry["size_bytes"])
            print(f"step {entry['step']}  {size}  {entry['num_files']} files  saved {entry['saved_at']}")
    for name in aside:
        print(f"not a checkpoint: {name}")
    return 0


def _verify(directory: Path, chosen: list[int], found: list[int], args: argparse.Namespace) -> int:
    from mtx.checkpoints import manifest

    problems = {step: manifest.verify(directory / str(step)) for step in chosen}
    bad = [step for step in chosen if problems[step]]
    if args.json:
        checkpoints = [{"step": step, "ok": not problems[step], "problems": problems[step]} for step in chosen]
        options.print_json({"ok": not bad, "checkpoints": checkpoints})
    else:
        for step in chosen:
            if problems[step] or not args.quiet:
                print(f"step {step}  {'bad' if problems[step] else 'good'}")
            for problem in problems[step]:
                print(f"    {problem}")
    if not bad:
        return 0
    return ALL_BAD if bad == found else BAD


def _show(directory: Path, step: int, args: argparse.Namespace) -> int:
    import dataclasses

    from mtx.checkpoints import manifest
    from mtx.reports.units import format_bytes

    content = manifest.read(directory / str(step))
    if args.json:
        files = {name: dataclasses.asdict(entry) for name, entry in content.files.items()}
        arrays = {name: {"shape": list(e.shape), "dtype": e.dtype} for name, e in content.arrays.items()}
        options.print_json({**_summarize(content), "arrays": arrays, "files": files})
        return 0
    print(f"step {content.step}, saved {content.saved_at}, {format_bytes(content.size_bytes)}")
    for key, value in content.meta.items():
        print(f"{key}: {value if isinstance(value, str) else json.dumps(value)}")
    print(f"\n{len(content.arrays)} arrays")
    for name, array in content.arrays.items():
        print(f"  {array.dtype}{list(array.shape)}  {name}")
    print(f"\n{len(content.files)} files")
    for name, file in content.files.items():
        print(f"  {file.sha256}  {format_bytes(file.size_bytes):>8}  {name}")
    return 0


def _summarize(content: Manifest) -> dict[str, Any]:
    return {
        "step": content.step,
        "saved_at": content.saved_at,
        "size_bytes": content.size_bytes,
        "num_files": len(content.files),
        "meta": content.meta,
    }
