"""`mtx config`: the resolved config, where each value comes from, and how it differs from another.

Invariant: answers without starting JAX.
"""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any

from mtx.commands import options

if TYPE_CHECKING:
    from mtx.config.reader import Config

NAME = "config"
HELP = "show the resolved config, explain a value, compare two configs"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    options.add_config_arguments(parser)
    options.add_common_arguments(parser, devices=False)
    question = parser.add_mutually_exclusive_group()
    question.add_argument(
        "--explain", metavar="KEY", help="a field (Model.num_layers) or class (Model): value, file:line, type, meaning"
    )
    question.add_argument("--diff", metavar="OTHER.gin", help="fields in which OTHER.gin differs; --set is not for it")


def run(args: argparse.Namespace) -> int:
    config = options.load_config(args)
    if args.explain:
        _explain(config, args)
    elif args.diff:
        _diff(config, args)
    elif args.json:
        _print_tree(config)
    else:
        print(config.text(), end="")
    return 0


def _explain(config: Config, args: argparse.Namespace) -> None:
    from mtx.config import render

    entries = render.explain(config.run, config.provenance, args.explain)
    if not args.json:
        print("\n\n".join(map(render.explain_text, entries)))
    elif "." in args.explain:
        options.print_json(entries[0])
    else:
        options.print_json({"class": args.explain, "fields": entries})


def _diff(config: Config, args: argparse.Namespace) -> None:
    from mtx.config import reader, render

    differences = [
        {
            "key": difference.setting.key,
            "value": render.show(difference.old),
            "other": render.show(difference.new),
            "on_resume": render.ON_RESUME[difference.setting.drift],
        }
        for difference in render.compare(config.run, reader.load(args.diff).run)
    ]
    if args.json:
        options.print_json({"config": args.config, "other": args.diff, "differences": differences})
        return
    print(f"# {args.config} -> {args.diff}: {len(differences)} differences")
    for line in differences:
        print(f"{line['key']}: {line['value']} -> {line['other']}  # {line['on_resume']}")


def _print_tree(config: Config) -> None:
    from mtx.config import render

    tree: dict[str, dict[str, Any]] = {}
    for setting, value in render.values(config.run):
        tree.setdefault(setting.owner, {})[setting.name] = render.to_json(value)
    origins = {
        key: {
            "place": origin.place,
            "through": list(origin.through),
            "overrode": [{"value": value, "place": place} for value, place in origin.overrode],
        }
        for key, origin in config.provenance.items()
    }
    options.print_json({"config": tree, "provenance": origins})
