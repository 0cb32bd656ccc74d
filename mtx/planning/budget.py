"""Budgets: the figures of a rehearsal that must not grow, in a file that is kept with the sources.

Decides which figures count, and when one has grown: beyond its limit by more than its own tolerance, which a person may
change in the file.

Invariant: a file that is no budget is never replaced, and a budget is replaced as a whole or not at all.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mtx.errors import UserError
from mtx.planning.audit import SMALL_BYTES
from mtx.planning.case import Case
from mtx.planning.dissection import Dissection

KIND = "budget of mtx rehearse"
TOLERANCE = 0.02
"""Between versions of JAX figures of equal programs differ by less."""


@dataclass(frozen=True)
class Limit:
    """Of one figure: it may be `value * (1 + tolerance)`."""

    value: float
    tolerance: float = TOLERANCE


@dataclass(frozen=True)
class Comparison:
    """A figure against its limit.

    Attributes:
        limit: None: the budget does not have it.
        found: None: the program does not have it any more.
    """

    name: str
    limit: Limit | None
    found: float | None

    @property
    def has_grown(self) -> bool:
        """Whether it is beyond the limit; what a budget does not have must not be."""
        if self.limit is None:
            return True
        return self.found is not None and self.found > self.limit.value * (1 + self.limit.tolerance)


@dataclass(frozen=True)
class Budget:
    """What a file says.

    Attributes:
        setting: GPU, number of GPUs, mesh: what figures can be compared for.
        limits: By the names of `figures`.
    """

    setting: Mapping[str, Any]
    limits: Mapping[str, Limit]

    def check_setting(self, case: Case) -> None:
        """Raises UserError where the budget is of another cluster or mesh."""
        now = setting(case)
        other = [
            f"{key} {self.setting.get(key)} there, {now[key]} here" for key in now if self.setting.get(key) != now[key]
        ]
        if other:
            raise UserError(f"the budget is of another rehearsal: {'; '.join(other)}; --write-budget writes one")

    def compare(self, step: Dissection) -> list[Comparison]:
        """Every figure of either.

        Raises:
            UserError: The budget is of another cluster or mesh.
        """
        self.check_setting(step.case)
        found = figures(step)
        names = [*self.limits, *(name for name in found if name not in self.limits)]
        return [Comparison(name, self.limits.get(name), found.get(name)) for name in names]


def setting(case: Case) -> dict[str, Any]:
    """What a budget holds for."""
    return {"gpu": case.cluster.gpu.name, "gpus": case.cluster.num_gpus, "mesh": dict(case.sizes)}


def figures(step: Dissection) -> dict[str, float]:
    """What a budget limits: memory, FLOPs, and bytes and number of each kind of exchange along the same axes."""
    compiled = step.compiled
    found: dict[str, float] = {
        "argument_bytes": compiled.argument_bytes,
        "temp_bytes": compiled.temp_bytes,
        "peak_bytes": compiled.peak_bytes,
        "matmul_flops": step.matmul_flops,
    }
    for exchange in step.exchanges:
        if exchange.size_bytes >= SMALL_BYTES:
            name = f"{exchange.kind} over {' '.join(exchange.axes)}"
            found |= {f"{name}, bytes": exchange.size_bytes, f"{name}, count": exchange.count}
    return found


def read_budget(path: Path) -> Budget:
    """Reads a file.

    Raises:
        UserError: There is none, or it is no budget.
    """
    try:
        document = json.loads(path.read_text())
        if not isinstance(document, dict) or document.get("kind") != KIND:
            raise ValueError(f'it does not say "kind": "{KIND}"')
        limits = {
            str(name): Limit(float(entry["limit"]), float(entry.get("tolerance", TOLERANCE)))
            for name, entry in document["figures"].items()
        }
        return Budget(dict(document["setting"]), limits)
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}; --write-budget FILE writes a budget") from None
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path} is not a budget ({error!s}); --write-budget writes one to a new file") from None


def check_place(path: Path) -> None:
    """Raises UserError where `write_budget` could not write: no folder, or something that is no budget."""
    if path.exists():
        read_budget(path)
    elif not path.parent.is_dir():
        raise UserError(f"--write-budget {path}: there is no folder {path.parent}; make it first")


def write_budget(path: Path, step: Dissection) -> list[str]:
    """Writes the figures of a rehearsal as limits. Tolerances that a file there has stay.

    Returns:
        What changed against the file that was there, a line each.

    Raises:
        UserError: What is there is no budget, or the folder cannot be written to.
    """
    old = read_budget(path).limits if path.exists() else {}
    limits = {
        name: Limit(value, old[name].tolerance if name in old else TOLERANCE) for name, value in figures(step).items()
    }
    entries = {name: {"limit": limit.value, "tolerance": limit.tolerance} for name, limit in limits.items()}
    document = {"kind": KIND, "version": 1, "setting": setting(step.case), "figures": entries}
    draft = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        draft.write_text(json.dumps(document, indent=2) + "\n")
        os.replace(draft, path)
    except OSError as error:
        draft.unlink(missing_ok=True)
        raise UserError(f"--write-budget {path}: {error.strerror}") from None
    if not old:
        return []
    return [
        f"{name}: {_show(old.get(name))} -> {_show(limits.get(name))}"
        for name in dict.fromkeys([*old, *limits])
        if old.get(name) != limits.get(name)
    ]


def _show(limit: Limit | None) -> str:
    return "none" if limit is None else f"{limit.value:,.0f}"
