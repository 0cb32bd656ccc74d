"""Measures the training step of one config under every combination of some options, each in a process of its own.

    python benchmarks/sweep.py CONFIG --over "Train.recompute='none'|'selective'" --over "Train.microbatch_size=4|8" \\
        [--over "XLA_FLAGS=|--xla_gpu_enable_command_buffer="] [--steps N] [--budget SECONDS] [--out FILE.json]

An option is a field of the config, with values as Gin writes them, or a variable of the environment (a name without a
dot), whose value is added behind what the variable has already. The table is printed at the end, fastest first, the
file written after each measurement. A combination that fails stands in the table with its error; then the exit code
is 1.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import measuring
from compare import shorten

STEP = Path(__file__).parent / "train_step.py"


def main() -> int:
    """The exit code: 0 where all combinations were measured, else 1."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config")
    parser.add_argument("--over", action="append", required=True, metavar="NAME=VALUE|VALUE", help="may be repeated")
    parser.add_argument("--set", action="append", default=[], dest="overrides", metavar="STATEMENT")
    parser.add_argument("--steps", type=int, default=4, help="groups of steps that count")
    parser.add_argument("--budget", type=float, help="seconds after which nothing more is started and all is stopped")
    parser.add_argument("--out", type=Path, help="a file that does not exist yet")
    args = parser.parse_args()
    end = None if args.budget is None else time.monotonic() + args.budget
    try:
        combinations = combine(args.over)
    except ValueError as error:
        parser.error(str(error))
    if args.out and args.out.exists():
        parser.error(f"{args.out} exists: a measurement is never overwritten; name another file")
    document: dict[str, Any] = {
        "command": " ".join(["benchmarks/sweep.py", *sys.argv[1:]]),
        "config": args.config,
        "overrides": args.overrides,
        "points": [],
    }
    with tempfile.TemporaryDirectory() as folder:
        for number, chosen in enumerate(combinations):
            print(f"{number + 1} of {len(combinations)}: {describe(chosen)}", file=sys.stderr, flush=True)
            left = None if end is None else end - time.monotonic()
            point = {"options": chosen, **measure(args, chosen, Path(folder) / f"{number}.json", left)}
            document["points"].append(point)
            if args.out:
                measuring.write_json(args.out, document)
    print(draw_table(document["points"]))
    return 1 if any("error" in point for point in document["points"]) else 0


def combine(options: list[str]) -> list[dict[str, str]]:
    """Every combination of `NAME=VALUE|VALUE` as name -> value.

    Raises:
        ValueError: An option has no `=`, or is named twice.
    """
    axes: dict[str, list[str]] = {}
    for option in options:
        name, equals, values = option.partition("=")
        if not equals or name.strip() in axes:
            raise ValueError(f"--over {option!r}: write NAME=VALUE|VALUE, each name once")
        axes[name.strip()] = values.split("|")
    return [dict(zip(axes, values)) for values in itertools.product(*axes.values())]


def measure(args: argparse.Namespace, chosen: dict[str, str], out: Path, left: float | None) -> dict[str, Any]:
    """What `train_step.py` says of one combination, or its `error`."""
    if left is not None and left <= 0:
        return {"error": "not started: the time of --budget is used up"}
    environment = dict(os.environ)
    command = [sys.executable, str(STEP), args.config, "--steps", str(args.steps), "--out", str(out)]
    statements = [*args.overrides, *(f"{name}={value}" for name, value in chosen.items() if "." in name)]
    for statement in statements:
        command += ["--set", statement]
    for name, value in chosen.items():
        if "." not in name:
            environment[name] = f"{environment.get(name, '')} {value}".strip()
    try:
        process = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=left)
    except subprocess.TimeoutExpired:
        return {"error": f"stopped after {left:.0f} s: the time of --budget is used up"}
    if process.returncode or not out.exists():
        return {"error": shorten(process.stderr) or f"exit code {process.returncode}"}
    return {"measured": json.loads(out.read_text())}


def describe(chosen: dict[str, str]) -> str:
    """A combination in a line."""
    return ", ".join(f"{name}={value}" for name, value in chosen.items())


def draw_table(points: list[dict[str, Any]]) -> str:
    """The points as a table in Markdown, fastest first, failures last."""
    names = list(points[0]["options"]) if points else []
    head = [*names, "tokens/s", "model TFLOP/s", "MFU", "share of ceiling", "compile s", "peak GiB"]
    rows = [head, ["---"] * len(head)]
    good = [point for point in points if "measured" in point]
    for point in sorted(good, key=lambda point: -point["measured"]["tokens_per_second"]):
        m = point["measured"]
        memory = m["peak_device_bytes"] or m["peak_resident_bytes"]
        rows.append(
            [
                *point["options"].values(),
                f"{m['tokens_per_second']:,.0f}",
                f"{m['model_tflops_per_device']:.3g}",
                "-" if m["mfu"] is None else f"{m['mfu']:.3f}",
                f"{m['share_of_matmul_ceiling']:.3f}",
                f"{m['compile_seconds']:.1f}",
                f"{memory / 2**30:.1f}",
            ]
        )
    rows += [
        [*point["options"].values(), point["error"].splitlines()[-1][:120], *["-"] * 5]
        for point in points
        if "error" in point
    ]
    return "\n".join(f"| {' | '.join(cell.replace('|', '/') or '(none)' for cell in row)} |" for row in rows)


if __name__ == "__main__":
    sys.exit(main())
