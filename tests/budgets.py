"""Golden budgets: figures of programs and runs that no machine decides, so that a slow-down fails without a stopwatch.

A figure that has grown past its margin is a fault; one that has shrunk past it is a gain that the budget must keep. The
figures belong to a version of JAX. Where a change of them is meant:

    UPDATE_GOLDEN=1 pytest tests/training/test_budgets.py tests/planning/test_budgets_gpu.py \\
        tests/commands/test_train_counts.py

with the Python of each version in `tests/golden/`.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from importlib import metadata

import pytest
from programs import ROOT

VERSION = metadata.version("jax")
GOLDEN = ROOT / "tests" / "golden" / f"budgets_{VERSION}.json"

LOOSE = (
    "count of fusion", "count of copy", "count of transpose", "instructions", "equations", "bytes between",
    "bytes read and written",
)  # fmt: skip
"""Figures of which the compiler decides a little. All others (products, collectives, calls of libraries, bytes of
arguments, programs that are compiled, values that are waited for) may not move at all."""
MARGIN = 0.03


def check(case: str, found: Mapping[str, float]) -> None:
    """Fails where figures are not those of the golden file; with UPDATE_GOLDEN=1 writes them there."""
    document = json.loads(GOLDEN.read_text()) if GOLDEN.exists() else {}
    if os.environ.get("UPDATE_GOLDEN"):
        document[case] = dict(sorted(found.items()))
        GOLDEN.write_text(json.dumps(dict(sorted(document.items())), indent=1) + "\n")
        return
    if not document:
        pytest.skip(f"no budgets for JAX {VERSION}: UPDATE_GOLDEN=1 makes tests/golden/{GOLDEN.name}")
    moved = compare(document[case], found)
    assert not moved, f"{case}:\n" + "\n".join(moved)


def compare(golden: Mapping[str, float], found: Mapping[str, float]) -> list[str]:
    """A line for each figure that has moved past its margin; one that is missing counts as 0."""
    lines = []
    for name in sorted({*golden, *found}):
        old, new = golden.get(name, 0), found.get(name, 0)
        margin = MARGIN * old if name.startswith(LOOSE) else 0
        if abs(new - old) <= margin:
            continue
        share = f" ({new / old - 1:+.1%})" if old else ""
        verdict = "has grown" if new > old else "has shrunk; keep the gain with UPDATE_GOLDEN=1"
        lines.append(f"{name}: {old:,} -> {new:,}{share} {verdict}")
    return lines
