"""`mtx report`: one HTML file about a run, or about several compared."""

from __future__ import annotations

import argparse
from pathlib import Path

from mtx.commands import options

NAME = "report"
HELP = "write one HTML file: curves, throughput, goodput, incidents; several runs compared"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run_dirs", nargs="+", type=Path, metavar="RUN_DIR", help="run directory")
    parser.add_argument("--out", type=Path, metavar="FILE", help="default: report.html in the (first) RUN_DIR")
    options.add_common_arguments(parser, devices=False)


def run(args: argparse.Namespace) -> int:
    from mtx.errors import UserError
    from mtx.reports.html import write_report

    out = args.out or args.run_dirs[0] / "report.html"
    if out.suffix not in (".html", ".htm"):
        raise UserError(f"--out {out}: a report is HTML; name a file that ends in .html")
    if not out.parent.is_dir():
        raise UserError(f"--out {out}: there is no folder {out.parent}; make it first")
    figures = write_report(args.run_dirs, out)
    if args.json:
        options.print_json({"report": str(out), "runs": figures})
    else:
        print(out)
    return 0
