"""Measures the configs of a suite beside their peers, in turns: A B A B, each measurement in a process of its own.

    python benchmarks/compare.py cpu [--case NAME ...] [--peer NAME ...] [--rounds 2] [--steps N] [--out FILE.json]

A suite is a file of benchmarks/suites. Rounds are outermost: round 1 of all cases, mtx and peers by turns, then
round 2; so a round that is cut off loses the last figures, not a case. Each system keeps its compilation caches from
one round to the next and begins without any: round 1 starts cold, later ones warm. The file is written after each
measurement. What fails is recorded with its error, and the exit code is 1 at the end.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import comparison
import measuring
from comparison import OWN, Record
from suites import ROOT, Case, Suite, choose_cases, read_suite

_PEER = "benchmarks/peers/train.py"


def main() -> int:
    """The exit code: 0 where all is measured and well, 1 where something failed, 2 for a mistake in the command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("suite", help="name of a file of benchmarks/suites, or path of another")
    parser.add_argument("--case", action="append", default=[], dest="cases", help="only this one; may be repeated")
    parser.add_argument("--peer", action="append", dest="peers", help="only this one; may be repeated")
    parser.add_argument("--no-peers", action="store_const", const=[], dest="peers", help="mtx alone")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--steps", type=int, help="groups of steps that count; default: the suite's")
    parser.add_argument("--peer-python", default=sys.executable, help="an interpreter with torch and transformers")
    parser.add_argument("--budget", type=float, help="seconds after which nothing more is started and all is stopped")
    parser.add_argument("--out", type=Path, help="a file that does not exist yet")
    args = parser.parse_args()
    begin = time.monotonic()
    try:
        suite = read_suite(args.suite)
        cases = choose_cases(suite, args.cases, args.peers)
    except ValueError as error:
        parser.error(str(error))
    if args.out and args.out.exists():
        parser.error(f"{args.out} exists: a measurement is never overwritten; name another file")
    with tempfile.TemporaryDirectory() as folder:
        runner = Runner(suite, cases, args, Path(folder), None if args.budget is None else begin + args.budget)
        runner.measure_all()
    print(describe_results(runner.document))
    return 1 if any(case["summary"]["faults"] for case in runner.document["cases"]) else 0


class Runner:
    """Goes through rounds, cases and systems, and keeps the document.

    Args:
        suite: Where peers and environment come from.
        cases: What is measured.
        args: Of the command.
        folder: For caches and results of single measurements.
        end: Time of `time.monotonic` at which all must be over; None: none.
    """

    def __init__(self, suite: Suite, cases: list[Case], args: argparse.Namespace, folder: Path, end: float | None):
        self.suite, self.cases, self.args, self.folder, self.end = suite, cases, args, folder, end
        self.environment = {**os.environ, **suite.environment}  # before the next line: shapes need no GPU
        os.environ["JAX_PLATFORMS"] = "cpu"
        self.begin = time.monotonic()
        self.document = self._begin_document()
        self._save()

    def measure_all(self) -> None:
        """All rounds."""
        for turn in range(1, self.args.rounds + 1):
            for case, record in zip(self.cases, self.document["cases"]):
                for system in record["systems"]:
                    self._report(f"round {turn}, {case.name}, {system}")
                    load = os.getloadavg()[0] / len(
                        os.sched_getaffinity(0)
                    )  # of the last minute: what ran before, and who else is here
                    measured = {
                        "system": system, "round": turn, "load_per_core": load, **self._measure(case, record, system)
                    }  # fmt: skip
                    record["measurements"].append(measured)
                    comparison.share_ceilings(record["measurements"])
                    record["summary"] = comparison.summarize(record["measurements"], record["systems"])
                    self._save()
                    told = measured.get("error") or f"{measured['tokens_per_second']:,.0f} tokens/s"
                    self._report(f"round {turn}, {case.name}, {system}: {told.splitlines()[-1]}")

    def _measure(self, case: Case, record: Record, system: str) -> Record:
        """One measurement, or its `error`."""
        left = None if self.end is None else self.end - time.monotonic()
        if left is not None and left <= 0:
            return {"error": "not started: the time of --budget is used up"}
        out = self.folder / f"{len(os.listdir(self.folder))}.json"
        command = self._make_command(case, system, out)
        log = self.folder / "log"
        begin = time.time()
        try:
            with log.open("w") as file:
                code = subprocess.run(
                    command, env=self._make_environment(case, system), cwd=ROOT, stdout=file, stderr=file, timeout=left
                ).returncode
        except subprocess.TimeoutExpired:
            return {"error": f"stopped after {left:.0f} s: the time of --budget is used up", "command": command}
        except OSError as error:
            return {"error": f"{command[0]} does not run: {error}", "command": command}
        wall = {"command": command, "wall_seconds": time.time() - begin}
        if code or not out.exists():
            return {"error": shorten(log.read_text(errors="replace")) or f"exit code {code}", "exit_code": code, **wall}
        measured = json.loads(out.read_text())
        self.document["versions"]["mtx" if system == OWN else "peers"] = measured["versions"]
        with contextlib.suppress(KeyError):
            self.document["machine"]["device"] = measured["machine"]["device"]
        try:
            return {**comparison.derive(measured, record["work"], self._find_peak(record)), **wall}
        except ValueError as error:
            return {"error": str(error), **wall}

    def _make_command(self, case: Case, system: str, out: Path) -> list[str]:
        counts = ["--steps", str(self.args.steps or self.suite.steps), "--warmup", str(self.suite.warmup)]
        counts += ["--group", str(self.suite.group), "--out", str(out)]
        if system == OWN:
            sets = [word for statement in case.overrides for word in ("--set", statement)]
            return [sys.executable, "benchmarks/train_step.py", case.config, *sets, *counts]
        kind, *options = self.suite.peer_arguments(case, system)
        return [self.args.peer_python, _PEER, kind, str(self._case_file(case)), *options, *counts]

    def _case_file(self, case: Case) -> Path:
        return self.folder / f"work_{case.name}.json"

    def _make_environment(self, case: Case, system: str) -> dict[str, str]:
        """Each system's own caches, empty at first and kept from round to round."""
        cache = self.folder / "caches" / case.name / system
        cache.mkdir(parents=True, exist_ok=True)
        names = ("MTX_COMPILATION_CACHE", "TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR")
        return {**self.environment, **{name: str(cache / name.lower()) for name in names}}

    def _find_peak(self, record: Record) -> float | None:
        from mtx.planning.hardware import find_gpu

        gpu = find_gpu(str(self.document["machine"]["device"]))
        return gpu.peak_flops(record["work"]["compute"]) if gpu else None

    def _begin_document(self) -> Record:
        from shapes import describe_case

        from mtx.health.revision import find_git_revision

        cases = []
        for case in self.cases:
            work = describe_case(str(ROOT / case.config), case.overrides)
            self._case_file(case).write_text(json.dumps(work))
            arguments = {name: self.suite.peer_arguments(case, name) for name in case.peers}
            cases.append(
                {
                    "name": case.name,
                    "config": case.config,
                    "overrides": case.overrides,
                    "work": work,
                    "systems": [OWN, *case.peers],
                    "peer_arguments": arguments,
                    "measurements": [],
                    "summary": comparison.summarize([], [OWN, *case.peers]),
                }
            )
        gpu = measuring.describe_gpu()
        cores = len(os.sched_getaffinity(0))
        return {
            "suite": self.args.suite,
            "command": " ".join(["benchmarks/compare.py", *sys.argv[1:]]),
            "environment": {k: v for k, v in self.environment.items() if k in measuring.VARIABLES},
            "git_revision": find_git_revision(ROOT),
            "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            "machine": {
                "processor": measuring.describe_processor(),
                "cores": cores,
                "gpu": gpu,
                "device": gpu["name"] if gpu else "cpu",
            },
            "versions": {"mtx": None, "peers": None},
            "cases": cases,
        }

    def _save(self) -> None:
        if self.args.out:
            measuring.write_json(self.args.out, self.document)

    def _report(self, text: str) -> None:
        print(f"{time.monotonic() - self.begin:6.0f} s  {text}", file=sys.stderr, flush=True)


def shorten(log: str, lines: int = 12) -> str:
    """The end of what a failed process wrote, where its error is."""
    return "\n".join(line[:400] for line in log.strip().splitlines()[-lines:])


def describe_results(document: Record) -> str:
    """A table per case, as text."""
    parts = []
    for case in document["cases"]:
        summary: dict[str, Any] = case["summary"]
        parts.append(f"\n{case['name']}")
        for name in case["systems"]:
            if name not in summary["systems"]:
                parts.append(f"  {name:28} not measured")
                continue
            values, ratio = summary["systems"][name], summary["ratios"].get(name)
            against = f"  mtx is {ratio['median']:.2f}x ({ratio['low']:.2f} to {ratio['high']:.2f})" if ratio else ""
            parts.append(
                f"  {name:28} {values['tokens_per_second']:>12,.0f} tokens/s  "
                f"{values['share_of_best_ceiling']:6.1%} of the best ceiling{against}"
            )
        parts += [f"  ! {fault}" for fault in summary["faults"]]
    return "\n".join(parts)


if __name__ == "__main__":
    sys.exit(main())
