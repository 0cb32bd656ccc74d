"""Draws results of `compare.py` as one HTML page that needs nothing else.

python benchmarks/page.py benchmarks/results/FILE.json [...] --out PAGE.html
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Callable, Iterator
from html import escape
from pathlib import Path
from typing import Any

from comparison import OWN, Record
from comparison_pictures import Bar, color_systems, draw_bars, draw_ratios

from mtx.reports.elements import UNKNOWN, draw_facts, draw_figure, draw_table, fold, show
from mtx.reports.page import render_page, write_page
from mtx.reports.units import format_count, format_duration, format_gib, format_seconds

_SHARE = "{:.1%}".format


def main() -> None:
    """Writes the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", nargs="+", type=Path)
    parser.add_argument("--out", required=True, type=Path)
    args = parser.parse_args()
    write_page(args.out, render([json.loads(path.read_text()) for path in args.results]))
    print(args.out)


def render(documents: list[Record]) -> str:
    """The page of these results as text."""
    systems = dict.fromkeys(name for d in documents for case in d["cases"] for name in case["systems"])
    colors = color_systems(list(systems))
    machines = dict.fromkeys(str(d["machine"]["device"]) for d in documents)
    subtitle = f"mtx beside its peers, in turns on one machine \N{MIDDLE DOT} {', '.join(machines)}"
    return render_page("Training speed", subtitle, "".join(_draw_document(d, colors) for d in documents))


def _draw_document(document: Record, colors: dict[str, str]) -> str:
    cases = [case for case in document["cases"] if case["summary"]["systems"]]
    parts = [f"<h2>Suite {escape(document['suite'])}, {escape(document['date'][:10])}</h2>", _draw_facts(document)]
    parts += [f'<p class="loud">{escape(text)}</p>' for text in _warn(document)]
    if cases:
        parts += _draw_pictures(cases, colors)
        parts.append(f"<h2>Each measurement</h2>{''.join(_draw_measurements(cases))}")
    parts.append(fold("Machine, versions, commands", _draw_origin(document)))
    parts.append(f'<p class="note">{escape(_CONVENTIONS)}</p>')
    return "".join(parts)


_CONVENTIONS = (
    "Model FLOPs count attention in full and no recomputation; causal counts half of the attention. Both sides do the "
    "same work on a batch of random tokens that repeats: cross entropy, gradients clipped by their norm, AdamW. The "
    "ceiling is the best square matrix product between the steps; shares here are of the best one that any system of "
    "that round showed. Lines over bars go from the slowest to the fastest round. Compile seconds of PyTorch are its "
    "first step less a usual one. Round 1 starts without compilation caches, later rounds with them."
)


def _draw_facts(document: Record) -> str:
    facts = []
    for case in document["cases"]:
        summary = case["summary"]
        if (best := summary["best_peer"]) in summary["ratios"]:
            ratio = summary["ratios"][best]
            note = f"the tokens/s of {best}, {ratio['low']:.2f} to {ratio['high']:.2f}"
            facts.append((case["name"], f"{ratio['median']:.2f}x", note))
    return draw_facts(facts) if facts else ""


def _warn(document: Record) -> Iterator[str]:
    for case in document["cases"]:
        yield from (f"{case['name']}: {fault}" for fault in case["summary"]["faults"])


def _bars(case: Record, key: str) -> Iterator[Bar]:
    for system, medians in case["summary"]["systems"].items():
        good = [m for m in case["measurements"] if m["system"] == system and "error" not in m]
        values = [m[key] for m in good]
        note = ""
        if key == "share_of_best_ceiling" and good[-1]["mfu"]:
            note = f", MFU {_SHARE(good[-1]['mfu']['full'])} (causal {_SHARE(good[-1]['mfu']['causal'])})"
        yield Bar(
            case=case["name"], system=system, value=medians[key], low=min(values), high=max(values), note=note
        )  # fmt: skip


def _start_bars(case: Record) -> Iterator[Bar]:
    """Of rounds after the first, which find compiled programs in their caches."""
    for system in case["summary"]["systems"]:
        warm = [m for m in case["measurements"] if m["system"] == system and "error" not in m and m["round"] > 1]
        values = [m["seconds_to_first_loss"] for m in warm]
        if values:
            value = statistics.median(values)
            yield Bar(case=case["name"], system=system, value=value, low=min(values), high=max(values), note="")


def _draw_pictures(cases: list[Record], colors: dict[str, str]) -> Iterator[str]:
    ratios = [
        Bar(case=c["name"], system=peer, value=r["median"], low=r["low"], high=r["high"],
            note=f" ({r['low']:.2f} to {r['high']:.2f})" if r["pairs"] > 1 else " (one pair)")
        for c in cases for peer, r in c["summary"]["ratios"].items()
    ]  # fmt: skip
    if ratios:
        unit = "tokens/s of mtx, divided by the peer's of the same round"
        yield draw_figure(
            draw_ratios(ratios, colors, title="Ratios", unit=unit), "How much faster mtx is than each peer"
        )
    bars = [bar for case in cases for bar in _bars(case, "share_of_best_ceiling")]
    picture = draw_bars(
        bars, colors, title="Shares", unit="share of the best measured matrix product", format_value=_SHARE, limit=1.0
    )
    yield draw_figure(picture, "How much of the machine's matrix products each gets")
    for case in cases:
        picture = draw_bars(
            list(_bars(case, "tokens_per_second")),
            colors,
            title="Tokens",
            unit="tokens/s",
            format_value="{:,.0f}".format,
        )
        work = case["work"]
        shape = f"{format_count(work['parameters'])} parameters, batch {work['batch']:,} x {work['seq_len']:,}"
        yield draw_figure(picture, f"{case['name']}: {shape}, {work['compute']}")
    if bars := [bar for case in cases for bar in _start_bars(case)]:
        picture = draw_bars(bars, colors, title="Start", unit="seconds", format_value="{:.1f} s".format)
        yield draw_figure(picture, "From the start of the process to the first loss, with full compilation caches")


def _draw_measurements(cases: list[Record]) -> Iterator[str]:
    measured = [(case["name"], m) for case in cases for m in case["measurements"] if "error" not in m]
    for columns in (_SPEED, _START):
        rows = [
            [escape(case), escape(m["system"]), str(m["round"]), *(show_it(m) for show_it in columns.values())]
            for case, m in measured
        ]
        yield draw_table(("case", "system", "round", *columns), rows, "numbers worded tight")


_SPEED: dict[str, Callable[[Record], str]] = {
    "tokens/s": lambda m: f"{m['tokens_per_second']:,.0f}",
    "step min / median / max": lambda m: " / ".join(
        format_seconds(m["step_seconds"][name]) for name in ("min", "median", "max")
    ),
    "model TFLOP/s": lambda m: f"{m['model_tflops']['full']:.3g}",
    "causal": lambda m: f"{m['model_tflops']['causal']:.3g}",
    "MFU": lambda m: show(m["mfu"], lambda mfu: _SHARE(mfu["full"])),
    "of own ceiling": lambda m: _SHARE(m["share_of_own_ceiling"]),
    "of best": lambda m: _SHARE(m["share_of_best_ceiling"]),
}
_START: dict[str, Callable[[Record], str]] = {
    "compile": lambda m: format_duration(m["compile_seconds"]),
    "to first loss": lambda m: format_duration(m["seconds_to_first_loss"]),
    "peak memory": lambda m: f"{format_gib(m['peak_memory_bytes'])} {m['peak_memory_kind']}",
    "first, last loss": lambda m: f"{m['first_loss']:.2f}, {m['last_loss']:.2f}",
    "load per core before": lambda m: f"{m['load_per_core']:.1f}",
}


def _draw_origin(document: Record) -> str:
    machine, versions = document["machine"], document["versions"]
    facts = [
        ("command", document["command"]),
        ("date", document["date"]),
        ("git revision", document["git_revision"] or UNKNOWN),
        ("machine", f"{machine['processor']}, {machine['cores']} cores; {machine['device']}"),
        ("driver", machine["gpu"]["driver"] if machine["gpu"] else UNKNOWN),
        ("environment", _join(document["environment"])),
        (f"versions, {OWN}", _join(versions["mtx"] or {})),
        ("versions, peers", _join(versions["peers"] or {})),
    ]
    for case in document["cases"]:
        facts.append((case["name"], " ".join([case["config"], *case["overrides"]])))
        facts += [(f"{case['name']}, {name}", " ".join(words)) for name, words in case["peer_arguments"].items()]
    return draw_table(("what", "value"), [(escape(name), escape(value)) for name, value in facts], "plain")


def _join(values: dict[str, Any]) -> str:
    return ", ".join(f"{name} {value}" for name, value in values.items() if value is not None) or UNKNOWN


if __name__ == "__main__":
    main()
