"""What the steps of some runs are made of, by a compile for their GPUs without having any: a table for docs/gpu.md.

    python benchmarks/rehearsed.py benchmarks/configs/h200_*.gin --out FILE.json

Nothing is timed. Every config is given to `mtx rehearse`; `make rehearsals` installs the compiler.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import measuring

KEPT = (
    "gpu", "gpus", "mesh", "jax", "argument_bytes", "alias_bytes", "temp_bytes", "peak_bytes", "usable_memory_bytes",
    "matmul_flops", "model_flops", "forward_equivalents", "attention_kernel_calls", "traffic_bytes",
)  # fmt: skip
COLUMNS = ("config", "peak GiB", "computed TFLOP", "model TFLOP", "GB of products", "of attention", "of all else")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("configs", type=Path, nargs="+", metavar="RUN.gin")
    parser.add_argument("--set", action="append", default=[], metavar="STATEMENT", help="as of mtx rehearse")
    parser.add_argument("--out", type=Path, help="a file that does not exist yet")
    args = parser.parse_args()
    print("| " + " | ".join(COLUMNS) + " |", "| --- |" + " ---: |" * (len(COLUMNS) - 1), sep="\n")
    rows = []
    for config in args.configs:
        rows.append(rehearse(config, args.set))
        print(as_line(rows[-1]), flush=True)
    if args.out:
        what = "compiled for these GPUs, not run: no figure is a time"
        described = {"what": what, "date": time.strftime("%Y-%m-%d"), "machine": measuring.describe_processor()}
        measuring.write_json(args.out, {**described, "rows": rows})


def rehearse(config: Path, overrides: list[str]) -> dict[str, Any]:
    """The figures of one step, and the words that ask for them."""
    words = ["rehearse", str(config), *(word for statement in overrides for word in ("--set", statement))]
    command = [sys.executable, "-m", "mtx", *words, "--json", "--quiet"]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    found = json.loads(done.stdout)
    return {"command": ["mtx", *words], "config": config.stem, **{name: found[name] for name in KEPT}}


def as_line(row: dict[str, Any]) -> str:
    """A line of the table."""
    moved = row["traffic_bytes"]
    cells = [
        f"`{row['config']}`",
        f"{row['peak_bytes'] / 2**30:.1f}",
        *(f"{row[name] / 1e12:,.1f}" for name in ("matmul_flops", "model_flops")),
        *(f"{moved[kind] / 1e9:,.0f}" for kind in ("products", "attention", "other")),
    ]
    return "| " + " | ".join(cells) + " |"


if __name__ == "__main__":
    main()
