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

_MAX_VALUE = 200  # characters of one value of the meta on the terminal


def add_arguments(parser: argparse.ArgumentParser) -> None:
    actions = "list: steps, sizes, losses; verify: read every byte; show: all about one checkpoint"
    parser.add_argument("action", choices=("list", "verify", "show"), help=actions)
    parser.add_argument("run_dir", type=Path, metavar="RUN_DIR", help="run directory")
    parser.add_argument("--step", type=int, metavar="N", help="one checkpoint; default: all, or the newest to show")
    parser.add_argument("--config", action="store_true", help="with show: print the resolved config and nothing else")
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
    if args.config and (args.action != "show" or args.json):
        raise UserError("--config goes with `mtx checkpoint show` without --json, which has the config in `meta`")
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
            known = [text for _, text in _describe(entry["meta"])]
            print("  ".join([f"step {entry['step']}", size, f"saved {entry['saved_at']}", *known]))
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
    from mtx.errors import UserError
    from mtx.reports.units import format_bytes

    content = manifest.read(directory / str(step))
    if args.config:
        if "config" not in content.meta:
            raise UserError(f"{directory / str(step)}: nothing was noted of its config; see config.gin of the run")
        print(content.meta["config"], end="")
        return 0
    if args.json:
        files = {name: dataclasses.asdict(entry) for name, entry in content.files.items()}
        arrays = {name: {"shape": list(e.shape), "dtype": e.dtype} for name, e in content.arrays.items()}
        options.print_json({**_summarize(content), "arrays": arrays, "files": files})
        return 0
    print(f"step {content.step}, saved {content.saved_at}, {format_bytes(content.size_bytes)}")
    described = {key: text for key, text in _describe(content.meta) if key != "probe"}
    print("\n".join(described.values()))
    shown = {*described, "config", "ledger", "digests"}
    for key, value in content.meta.items():
        if key not in shown:
            text = value if isinstance(value, str) else json.dumps(value)
            print(f"{key}: {text if len(text) <= _MAX_VALUE else f'{len(text)} characters, see --json'}")
    if "ledger" in content.meta:
        _print_ledger(content.meta["ledger"])
    digests = content.meta.get("digests", {})
    print(f"\n{len(content.arrays)} arrays")
    for name, array in content.arrays.items():
        print(f"  {array.dtype}{list(array.shape)}  {name}  {digests.get(name, '')}".rstrip())
    print(f"\n{len(content.files)} files")
    for name, file in content.files.items():
        print(f"  {file.sha256}  {format_bytes(file.size_bytes):>8}  {name}")
    return 0


def _describe(meta: dict[str, Any]) -> list[tuple[str, str]]:
    """What a run notes beside its state, in the words of a person: key in the meta and text."""
    from mtx.reports.units import format_count

    lines = []
    if "tokens" in meta:
        lines.append(("tokens", f"{format_count(meta['tokens'])} tokens"))
    if "mesh" in meta:
        axes = ", ".join(f"{axis} {size}" for axis, size in meta["mesh"].items() if size > 1)
        lines.append(("mesh", f"mesh {axes or 'of one device'}"))
    if meta.get("validation"):
        losses = ", ".join(f"{name} {loss:.4f}" for name, loss in meta["validation"].items() if loss is not None)
        lines.append(("validation", f"validation {losses}"))
    lines.append(("probe", "with probe" if meta.get("probe") else "no probe"))
    return lines


def _print_ledger(ledger: dict[str, Any]) -> None:
    """What was taken of every source (`Course.ledger`), a row each."""
    columns = ("samples", "tokens", "skipped_samples", "epochs")
    rows = [["source", *columns]]
    rows += [
        [source["store"], *(f"{source[name]:,}" for name in columns[:-1]), f"{source['epochs']:.3f}"]
        for source in ledger["sources"]
    ]
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    print()
    for first, *rest in rows:
        print("  ".join([f"  {first:{widths[0]}}", *(f"{text:>{width}}" for text, width in zip(rest, widths[1:]))]))


def _summarize(content: Manifest) -> dict[str, Any]:
    return {
        "step": content.step,
        "saved_at": content.saved_at,
        "size_bytes": content.size_bytes,
        "num_files": len(content.files),
        "meta": content.meta,
    }
