"""Reads a suite: which configs are measured beside which peers. `benchmarks/suites/*.toml` are the suites.

Their keys:

    steps = 6                 groups of steps that count, of every system
    warmup = 2                steps before them
    group = 4                 steps of a group
    [environment]             variables of every system, mtx and peers alike
    [peers.NAME]              arguments = [...] of benchmarks/peers/train.py
    [[cases]]                 name, config, overrides = [...], peers = [NAME, ...]
    [cases.arguments]         NAME = [...]: more arguments of that peer for this case
"""

from __future__ import annotations

import tomllib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
FOLDER = Path(__file__).parent / "suites"


@dataclass(frozen=True, kw_only=True)
class Case:
    """A config and whom it is measured beside."""

    name: str
    config: str
    overrides: list[str] = field(default_factory=list)
    peers: list[str] = field(default_factory=list)
    arguments: dict[str, list[str]] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Suite:
    """All that is read from a file."""

    steps: int
    warmup: int
    group: int
    environment: dict[str, str] = field(default_factory=dict)
    peers: dict[str, dict[str, list[str]]] = field(default_factory=dict)
    cases: list[Case]

    def peer_arguments(self, case: Case, peer: str) -> list[str]:
        """Of `benchmarks/peers/train.py`, the kind of model first."""
        return [*self.peers[peer]["arguments"], *case.arguments.get(peer, [])]


def read_suite(name: str) -> Suite:
    """The suite of a name in `benchmarks/suites`, or of a file.

    Raises:
        ValueError: There is none, or it names a config or a peer that is not there.
    """
    path = Path(name) if name.endswith(".toml") else FOLDER / f"{name}.toml"
    if not path.is_file():
        there = ", ".join(sorted(p.stem for p in FOLDER.glob("*.toml")))
        raise ValueError(f"{path}: no such suite; there is {there}")
    values: dict[str, Any] = tomllib.loads(path.read_text())
    try:
        suite = Suite(**{**values, "cases": [Case(**case) for case in values["cases"]]})
    except (TypeError, KeyError) as error:
        raise ValueError(f"{path}: {error}") from error
    for case in suite.cases:
        if not (ROOT / case.config).is_file():
            raise ValueError(f"{path}, case {case.name}: there is no {case.config}")
        if unknown := {*case.peers, *case.arguments} - {*suite.peers}:
            raise ValueError(f"{path}, case {case.name}: unknown peers {', '.join(sorted(unknown))}")
    return suite


def choose_cases(suite: Suite, names: list[str], peers: list[str] | None) -> list[Case]:
    """The cases of these names in the suite's order, all without names; with fewer peers where some are named.

    Raises:
        ValueError: A name is not in the suite.
    """
    there = [case.name for case in suite.cases]
    for chosen, known, what in ((names, there, "case"), (peers or [], list(suite.peers), "peer")):
        if unknown := [name for name in chosen if name not in known]:
            raise ValueError(f"no {what} {', '.join(unknown)}; there is {', '.join(known)}")
    cases = [case for case in suite.cases if not names or case.name in names]
    if peers is None:
        return cases
    return [Case(**{**vars(case), "peers": [name for name in case.peers if name in peers]}) for case in cases]
