"""A rehearsal on the terminal: memory, exchanges, products, buffers, findings.

Invariant: every figure is of one device and one step of the full batch, and says whether it is the compiler's or the
plan's.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from mtx.planning.audit import Finding, gib
from mtx.planning.budget import Comparison
from mtx.planning.dissection import Dissection

_COLOURS = {"error": "bold red", "warning": "yellow", "note": "cyan"}


def print_rehearsal(step: Dissection, findings: Sequence[Finding]) -> None:
    """The whole report on stdout."""
    case, compiled = step.case, step.compiled
    mesh = " x ".join(f"{axis} {size}" for axis, size in case.sizes.items() if size > 1) or "one GPU"
    print(f"{case.cluster.num_gpus:,} {case.cluster.gpu.name}: {mesh}")
    seconds = compiled.lower_seconds + compiled.compile_seconds
    print(f"compiled in {seconds:.1f} s and {gib(compiled.memory_of_compiler_bytes)} by XLA of jax {compiled.jax}")
    _print_memory(step)
    rows = [
        [e.kind, ", ".join(e.axes), f"{e.count:,}", gib(e.size_bytes), "network" if e.leaves_domain else "NVLink"]
        for e in step.exchanges
    ]
    if rows:
        _print_table("exchanges of a GPU per step", ["collective", "along", "count", "bytes", "link"], rows)
    flops = step.matmul_flops
    kernels = sum(call.executions for call in step.attention)
    print(
        f"\nmatrix products: {flops / 1e12:,.1f} TFLOP, of which the model needs {step.model_flops / 1e12:,.1f} "
        f"(attention in full): {step.forward_equivalents:.2f} forward passes; the "
        f"layout implies {step.expected_forward_equivalents:.2f}; {kernels:,} runs of cuDNN's attention"
    )
    moved = {kind: f"{count / 1e9:,.0f} GB" for kind, count in step.traffic.items()}
    print(
        f"operands and results: {moved['products']} of products, {moved['attention']} of cuDNN's attention, "
        f"{moved['other']} of all else"
    )
    rows = []
    for b in step.buffers:
        source = b.source or ("argument" if b.is_argument else "XLA")
        rows.append([gib(b.size_bytes), f"{b.shape.dtype}{list(b.shape.dims)}", source, b.origin.rsplit("/", 1)[-1]])
    _print_table("largest buffers", ["bytes", "shape", "source", "operation"], rows)
    print_findings(findings)


def _print_memory(step: Dissection) -> None:
    memory, compiled = step.memory, step.compiled
    rest = memory.compiled - memory.state
    rows = [
        ["training state and batch", gib(compiled.argument_bytes), gib(memory.state + step.batch_bytes)],
        ["within the step", gib(compiled.temp_bytes), gib(rest)],
        *([f"  {name.replace('_', ' ')}", "", gib(memory.parts[name])] for name in memory.parts if name not in _OTHER),
        ["peak of the program", gib(compiled.peak_bytes), gib(memory.compiled)],
        ["communication and overhead", "", gib(memory.parts["communication"] + memory.parts["overhead"])],
        ["safe to use of the card", gib(step.usable_bytes), ""],
        ["left of it" if step.free_bytes >= 0 else "MISSING", gib(abs(step.free_bytes)), ""],
    ]
    _print_table("memory of a GPU", ["", "compiler", "plan"], rows)


_OTHER = ("parameters", "optimizer", "communication", "overhead")
"""Parts that the other rows show."""


def print_findings(findings: Sequence[Finding]) -> None:
    """A paragraph each."""
    print(f"\n{len(findings)} findings" if findings else "\nno findings")
    for finding in findings:
        keys = f" [{', '.join(finding.keys)}]" if finding.keys else ""
        _print_styled(f"{finding.severity}: {finding.text}{keys}", _COLOURS[finding.severity])


def print_comparison(rows: Sequence[Comparison]) -> None:
    """What has grown past a budget, and what has become less."""
    shown = [
        [row.name, "-" if row.limit is None else f"{row.limit.value:,.0f}",
         "-" if row.found is None else f"{row.found:,.0f}", _change(row), "GREW" if row.has_grown else ""]
        for row in rows
        if row.has_grown or row.limit is None or row.found != row.limit.value
    ]  # fmt: skip
    if shown:
        _print_table("against the budget", ["figure", "limit", "now", "change", ""], shown)
    grown = sum(row.has_grown for row in rows)
    print(f"\n{grown} of {len(rows)} figures grew past the budget" if grown else "\nwithin the budget")


def _change(row: Comparison) -> str:
    if row.limit is None or row.found is None or not row.limit.value:
        return "new" if row.limit is None else "gone"
    return f"{row.found / row.limit.value - 1:+.2%}"


def _print_styled(text: str, style: str) -> None:
    if sys.stdout.isatty():
        from rich.console import Console

        Console().print(text, style=style, markup=False, highlight=False)
    else:
        print(text)


def _print_table(title: str, head: list[str], rows: list[list[str]]) -> None:
    if sys.stdout.isatty():
        from rich.console import Console
        from rich.markup import escape
        from rich.table import Table

        table = Table(title=title, title_justify="left", title_style="bold")
        for name in head:
            table.add_column(name, justify="right" if name in _NUMBERS else "left")
        for row in rows:
            table.add_row(*map(escape, row))
        Console().print(table)
        return
    widths = [max(len(row[column]) for row in [head, *rows]) for column in range(len(head))]
    print(f"\n{title}")
    for row in [head, *rows]:
        cells = [c.rjust(w) if h in _NUMBERS else c.ljust(w) for c, w, h in zip(row, widths, head)]
        print("  " + "  ".join(cells).rstrip())


_NUMBERS = ("compiler", "plan", "count", "bytes", "limit", "now", "change")
