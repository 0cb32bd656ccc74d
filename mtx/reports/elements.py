"""Pieces of HTML that several parts of the report are made of: tables, legends, times, unknown values.

Decides their markup; `page` has the style sheet.

Invariant: headings and legends are escaped here, cells by those who make them.
"""

from __future__ import annotations

import datetime
from collections.abc import Callable, Iterable, Sequence
from html import escape
from typing import Any

UNKNOWN = "\N{EN DASH}"


def draw_table(head: Iterable[str], rows: Iterable[Sequence[str]], name: str) -> str:
    """A table of cells that are HTML already, under headings that are text."""
    top = "".join(f"<th>{escape(text)}</th>" for text in head)
    body = "".join(f"<tr>{''.join(f'<td>{cell}</td>' for cell in row)}</tr>" for row in rows)
    return f'<div class="scroll"><table class="{name}"><thead><tr>{top}</tr></thead><tbody>{body}</tbody></table></div>'


def draw_legend(entries: Iterable[tuple[str, str]]) -> str:
    """A legend of (class of the swatch, text)."""
    items = (f'<li><i class="swatch {name}"></i>{escape(text)}</li>' for name, text in entries)
    return f'<ul class="legend">{"".join(items)}</ul>'


def draw_facts(facts: Iterable[tuple[str, str, str]]) -> str:
    """Key figures as cards: (name, value, note), all text."""
    cells = (
        f"<div><dt>{escape(name)}</dt><dd>{escape(value)}</dd><dd class=note>{escape(note)}</dd></div>"
        for name, value, note in facts
    )
    return f'<dl class="facts">{"".join(cells)}</dl>'


def draw_figure(picture: str, caption: str = "") -> str:
    """A picture, which is SVG already, as wide as the page, under its caption."""
    above = f"<figcaption>{escape(caption)}</figcaption>" if caption else ""
    return f'<figure class="wide">{above}{picture}</figure>'


def fold(summary: str, content: str) -> str:
    """Content that is shown on a click."""
    return f"<details><summary>{escape(summary)}</summary>{content}</details>"


def show(value: Any, format_value: Callable[[Any], str]) -> str:
    """The text of a value, or a dash where it is unknown."""
    return UNKNOWN if value is None else format_value(value)


def format_time(seconds: float) -> str:
    """Unix seconds as date and time in UTC."""
    return datetime.datetime.fromtimestamp(seconds, datetime.UTC).strftime("%Y-%m-%d %H:%M:%S")


def plural(count: int, noun: str) -> str:
    """'1 attempt', '2 attempts'."""
    return f"{count:,} {noun}{'' if count == 1 else 's'}"
