"""What all pages share: their style sheet, their frame, and how they are written.

Decides colours and sizes, light and dark, narrow and wide, on paper too, and how a page begins and ends.

Invariant: a page loads nothing, and is complete or not there.
"""

from __future__ import annotations

import os
from html import escape
from pathlib import Path

PICTURE_STYLE = """
:root { color-scheme: light dark;
  --page: #f6f7f9; --card: #ffffff; --text: #1b1f26; --soft: #667085; --line: #e3e6eb; --good: #1a7f4b; --bad: #c2332b;
  --warn: #a86200;
  --c0: #2f6fde; --c1: #e0772b; --c2: #1f9d6b; --c3: #b14ec4; --c4: #c9a017;
  --c5: #d6456b; --c6: #1d9bb0; --c7: #7a6a58; }
@media (prefers-color-scheme: dark) { :root {
  --page: #0f1217; --card: #171b22; --text: #e6e9ee; --soft: #98a2b3; --line: #2a303a; --good: #4cc38a; --bad: #ff7a70;
  --warn: #f0b35a;
  --c0: #6ea1ff; --c1: #ff9d57; --c2: #4cc38a; --c3: #d28ae2; --c4: #e8c547;
  --c5: #ff7d9d; --c6: #5ccbdd; --c7: #b8a690; } }
.grid { stroke: var(--line); } .axis { stroke: var(--soft); opacity: 0.5; }
.tick, .readout { fill: var(--soft); font-size: 12px; font-variant-numeric: tabular-nums; }
.readout { fill: var(--text); white-space: pre; }
.end { text-anchor: end; } .middle { text-anchor: middle; }
.line { fill: none; stroke-width: 1.8; stroke-linejoin: round; } .faint { opacity: 0.28; stroke-width: 1.1; }
.dashed { stroke-dasharray: 5 4; }
.s0 { stroke: var(--c0); --own: var(--c0); } .s1 { stroke: var(--c1); --own: var(--c1); }
.s2 { stroke: var(--c2); --own: var(--c2); } .s3 { stroke: var(--c3); --own: var(--c3); }
.s4 { stroke: var(--c4); --own: var(--c4); } .s5 { stroke: var(--c5); --own: var(--c5); }
.s6 { stroke: var(--c6); --own: var(--c6); } .s7 { stroke: var(--c7); --own: var(--c7); }
.dot { fill: var(--card); stroke-width: 1.8; }
.fill { fill: var(--own); stroke: none; } .gap { --own: var(--line); } .dull { --own: var(--soft); }
.edge { fill: none; stroke: var(--card); } .hatch { stroke: var(--card); stroke-width: 2; opacity: 0.75; }
.limit { stroke: var(--bad); stroke-width: 1.5; stroke-dasharray: 6 4; }
.caption { fill: var(--text); font-size: 12px; font-variant-numeric: tabular-nums; } .strong { font-weight: 600; }
.bad { fill: var(--bad); }
.halo { paint-order: stroke; stroke: var(--card); stroke-width: 4px; stroke-linejoin: round; }
.ideal { stroke: var(--soft); stroke-width: 1.2; stroke-dasharray: 2 4; fill: none; }
.cross { stroke: var(--soft); stroke-width: 1.3; fill: none; opacity: 0.7; }
"""
"""All that a picture needs to stand alone."""

STYLE = (
    PICTURE_STYLE
    + """* { box-sizing: border-box; }
body { margin: 0; background: var(--page); color: var(--text);
  font: 15px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif; }
main { max-width: 1160px; margin: 0 auto; padding: 36px 24px 72px; }
h1 { font-size: 27px; line-height: 1.2; margin: 0; letter-spacing: -0.01em; overflow-wrap: anywhere; }
header p { color: var(--soft); margin: 6px 0 26px; }
h2 { font-size: 17px; margin: 38px 0 12px; }
.facts { display: grid; grid-template-columns: repeat(auto-fit, minmax(128px, 1fr)); gap: 12px; margin: 0; }
.facts div, figure, blockquote, .scroll, details { background: var(--card); border: 1px solid var(--line);
  border-radius: 10px; }
.facts div { padding: 12px 16px; display: flex; flex-direction: column; }
.facts dt { flex: 1; color: var(--soft); font-size: 13px; }
.facts dd { margin: 0; font-size: 23px; font-weight: 600; font-variant-numeric: tabular-nums; letter-spacing: -0.01em; }
.facts dd.note { min-height: 1.5em; font-size: 12.5px; font-weight: 400; letter-spacing: 0; }
.note, .none { color: var(--soft); font-size: 13px; }
.charts { display: grid; grid-template-columns: repeat(2, minmax(0, 1fr)); gap: 14px; }
.charts h2, .wide { grid-column: 1 / -1; margin-bottom: 0; }
figure { margin: 0; padding: 14px 16px 8px; min-width: 0; }
figcaption { color: var(--soft); font-size: 13px; }
.chart { display: block; width: 100%; height: auto; }
.column { opacity: 0; } .column:hover { opacity: 1; }
.column rect { fill: transparent; } .column line { stroke: var(--soft); opacity: 0.6; }
.t0 { --own: var(--c2); } .t1 { --own: var(--c4); } .t2 { --own: var(--c6); } .t3 { --own: var(--c3); }
.t4 { --own: var(--c0); } .t5 { --own: var(--c1); } .t6 { --own: var(--bad); } .t7 { --own: var(--c5); }
.t8 { --own: var(--soft); } .t9 { --own: var(--line); }
.mark { stroke: var(--own); stroke-dasharray: 2 3; } .resumed { --own: var(--soft); }
.mark.spike, .swatch.spike { --own: var(--bad); } .mark.rollback, .swatch.rollback { --own: var(--c1); }
.swatch.stroke { width: 3px; border: 0; border-radius: 0; height: 13px; vertical-align: -2px; }
.bar { display: block; width: 100%; height: 22px; border-radius: 6px; } .bar rect { fill: var(--own); }
.swatch { display: inline-block; width: 11px; height: 11px; border-radius: 3px; margin-right: 7px;
  background: var(--own); border: 2px solid var(--own); }
.swatch.ring { background: none; border-radius: 50%; }
.legend { display: flex; flex-wrap: wrap; gap: 2px 18px; list-style: none; margin: 6px 0 4px;
  padding: 0; font-size: 13px; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-size: 14px; }
th { text-align: left; color: var(--soft); font-weight: 500; font-size: 13px; white-space: nowrap; }
th, td { padding: 7px 16px; border-bottom: 1px solid var(--line); vertical-align: top; }
tbody tr:last-child td { border-bottom: 0; }
.numbers { font-variant-numeric: tabular-nums; }
.numbers th:not(:first-child), .numbers td:not(:first-child) { text-align: right; }
.numbers.worded td:nth-child(2), .numbers.worded th:nth-child(2), .numbers.ranked td:last-child,
.numbers.ranked th:last-child { text-align: left; }
.compact { width: auto; min-width: min(560px, 100%); }
.scroll:has(> .compact) { width: fit-content; max-width: 100%; }
.estimates td:nth-child(2), .estimates th:nth-child(2) { text-align: right; font-variant-numeric: tabular-nums;
  white-space: nowrap; }
.estimates td:last-child { color: var(--soft); font-size: 13px; width: 60%; }
figure + figure, .facts + figure, figure + .scroll, .scroll + figure, .scroll + .scroll {
  margin-top: 14px; }
.loud { background: var(--card); border: 2px solid var(--bad); border-radius: 10px; padding: 12px 16px;
  font-weight: 600; }
.tight th, .tight td { padding: 6px 9px; } .tight td { white-space: nowrap; }
.tight th { white-space: normal; vertical-align: bottom; }
.failed { color: var(--bad); font-weight: 600; } .waiting, .simulated { color: var(--warn); }
.journal td:first-child { white-space: nowrap; font-variant-numeric: tabular-nums; color: var(--soft); }
.journal td:last-child { overflow-wrap: anywhere; }
.event { font-weight: 600; } .event.finished { color: var(--good); }
.event.spike, .event.rollback, .event.hang, .event.corruption, .event.save_failed, .event.killed, .event.diverged {
  color: var(--bad); }
.event.skipped, .event.straggler, .event.preempted, .event.accepted { color: var(--warn); }
.advice { background: var(--card); border: 1px solid var(--line); border-left: 4px solid var(--own);
  border-radius: 10px; padding: 11px 16px; margin: 14px 0 0; }
.advice.good { --own: var(--good); } .advice.bad { --own: var(--warn); }
.attempts { font-variant-numeric: tabular-nums; } .attempts td:first-child { color: var(--soft); }
blockquote { margin: 0 0 10px; padding: 14px 18px; white-space: pre-wrap; overflow-wrap: anywhere;
  font-family: Georgia, "Iowan Old Style", "Times New Roman", serif; font-size: 16px; }
blockquote footer { color: var(--soft); font: 12.5px system-ui, sans-serif; margin-top: 6px; }
details { margin-top: 14px; padding: 0 16px; } details .scroll { border: 0; }
summary { cursor: pointer; padding: 11px 0; font-weight: 500; }
pre { font: 12.5px/1.55 ui-monospace, SFMono-Regular, Menlo, Consolas, monospace; overflow-x: auto; margin: 0 0 14px; }
code { font: 13px ui-monospace, SFMono-Regular, Menlo, Consolas, monospace; }
@media (max-width: 760px) { main { padding: 22px 14px 48px; } .charts { grid-template-columns: minmax(0, 1fr); }
  .wide { overflow-x: auto; } .wide .chart { min-width: 700px; } }
@media print { body { background: none; } figure, .facts div { break-inside: avoid; } }
"""
)


def render_page(title: str, subtitle: str, body: str) -> str:
    """A whole page.

    Args:
        title: Text.
        subtitle: Text.
        body: HTML.
    """
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(title)} - mtx</title><style>{STYLE}</style></head><body><main>"
        f"<header><h1>{escape(title)}</h1><p>{escape(subtitle)}</p></header>{body}</main></body></html>\n"
    )


def write_page(path: Path, text: str) -> None:
    """Writes a page; nobody sees half of it.

    Raises:
        OSError: The folder is missing, read-only or full.
    """
    partial = path.with_name(path.name + ".partial")
    partial.write_text(text, encoding="utf-8")
    os.replace(partial, path)
