"""`mtx plan`: what a run takes on a cluster, which layout is fastest, how many GPUs, which size of model."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mtx.commands import options
from mtx.errors import UserError

if TYPE_CHECKING:
    from mtx.config import schema
    from mtx.planning.case import Cluster
    from mtx.planning.constants import Constants
    from mtx.planning.hardware import Gpu
    from mtx.planning.plan import Plan
    from mtx.planning.search import SearchResult
    from mtx.planning.sizing import Point

NAME = "plan"
HELP = "say what a run takes: memory, step time, MFU, days, cost; search its layout; without a GPU"

PAGE_SIGNS = (" - mtx</title>", "<h2>Memory per GPU</h2>")
"""What a file must have for `--html` to replace it: the page of an earlier plan."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    options.add_config_arguments(parser)
    machines = parser.add_argument_group("machines (defaults: Cluster of the config)")
    machines.add_argument("--gpu", metavar="NAME", help="model of GPU; --list-gpus names them")
    machines.add_argument("--gpus", type=options.positive_int, metavar="N", help="number of GPUs")
    machines.add_argument("--price", type=_positive, metavar="P", help="of a GPU for an hour")
    text = "network X times as fast as the cluster's"
    machines.add_argument("--network", type=_positive, default=1.0, metavar="X", help=text)
    text = "figures of your own machine, from `mtx study --calibrate`"
    machines.add_argument("--calibration", type=Path, metavar="FILE", help=text)
    machines.add_argument("--list-gpus", action="store_true", help="print the table of GPUs, and nothing else")
    run = parser.add_argument_group("the run")
    run.add_argument("--tokens", type=_count, metavar="T", help="to train on, such as 300e9 or 300B")
    text = "habits of another training program, such as megatron-core; default: %(default)s"
    run.add_argument("--software", default="mtx", metavar="NAME", help=text)
    questions = parser.add_argument_group("questions")
    text = "rank all layouts; with --days or --budget in place of --gpus, on as many GPUs as that takes"
    questions.add_argument("--search", action="store_true", help=text)
    text = "how many tokens in D days; with --search: the fewest GPUs that take no longer"
    questions.add_argument("--days", type=_positive, metavar="D", help=text)
    text = "with --search: the shortest run that costs no more"
    questions.add_argument("--budget", type=_positive, metavar="MONEY", help=text)
    text = "the size of model that --gpus train best in --days; the config, if any, gives its proportions"
    questions.add_argument("--compute-optimal", action="store_true", help=text)
    questions.add_argument(
        "--runs", type=Path, metavar="FILE.csv", help="predict every row of a table of published runs"
    )
    parser.add_argument("--html", type=Path, metavar="FILE", help="write the plan as a page, too")
    options.add_common_arguments(parser, devices=False)


def run(args: argparse.Namespace) -> int:
    _refuse_idle_options(args)
    if args.html is not None:
        _refuse_to_overwrite(args.html)
    if args.list_gpus:
        _list_gpus(args)
    elif args.runs is not None:
        _compare(args)
    elif args.compute_optimal:
        _optimize(args)
    elif args.search and (args.days or args.budget):
        _size(args)
    elif args.search:
        _search(args)
    else:
        _plan(args)
    return 0


def _plan(args: argparse.Namespace) -> None:
    from mtx.planning.case import Case, check_mesh
    from mtx.planning.plan import make_plan
    from mtx.reports import plan_text

    if args.budget:
        raise UserError("--budget asks how many GPUs it pays: give it with --search")
    config = options.load_config(args).run
    machines = _Machines(args, config)
    cluster = machines.cluster(config, machines.count(config))
    check_mesh(config.mesh, cluster.num_gpus)
    case = Case.of(config, cluster, args.software, check=args.software == "mtx")
    plan = make_plan(case, machines.constants, **machines.terms())
    document = plan.as_json()
    if args.days:
        document["within_days"] = {"days": args.days, "tokens": plan.tokens_within(args.days)}
    if not args.json:
        plan_text.print_plan(plan)
        if args.days:
            plan_text.print_deadline(plan, args.days)
    _finish(args, machines, plan, document)


def _search(args: argparse.Namespace) -> None:
    from mtx.planning.plan import make_plan
    from mtx.planning.search import search_layouts
    from mtx.reports import plan_text

    config = options.load_config(args).run
    machines = _Machines(args, config)
    cluster = machines.cluster(config, machines.count(config))
    search = search_layouts(config, cluster, args.software, machines.constants)
    if not search.ranked:
        raise UserError(plan_text.describe_failure(search))
    plan = make_plan(search.ranked[0].case, machines.constants, **machines.terms())
    if not args.json:
        plan_text.print_search(search)
        plan_text.print_plan(plan)
    _finish(args, machines, plan, {**plan.as_json(), "search": search.as_json()}, search)


def _size(args: argparse.Namespace) -> None:
    from mtx.planning import sizing
    from mtx.planning.plan import make_plan
    from mtx.reports import plan_text

    if args.gpus or (args.days and args.budget):
        raise UserError("--search takes one of --gpus, --days and --budget: the others follow from it")
    config = options.load_config(args).run
    machines = _Machines(args, config)
    terms = machines.terms()
    tokens = terms["tokens"] or config.train.tokens
    if tokens is None:
        raise UserError("how many GPUs that takes depends on the tokens to train on: give --tokens, or Train.tokens")
    cluster, price = machines.cluster(config, 1), terms["price"] or config.cluster.gpu_hour_price
    settings = {"software": args.software, "constants": machines.constants}
    if not args.quiet:
        settings["watch"] = _report_point
    if args.days:
        found = sizing.size_for_deadline(config, cluster, tokens, args.days, **settings)
    elif price is None:
        raise UserError("--budget needs what a GPU costs for an hour: give --price, or Cluster.gpu_hour_price")
    else:
        found = sizing.size_for_budget(config, cluster, tokens, args.budget, price, **settings)
    search = found.chosen.search
    plan = make_plan(search.ranked[0].case, machines.constants, **terms)
    if not args.json:
        plan_text.print_sizing(found, price)
        plan_text.print_search(search)
        plan_text.print_plan(plan)
    document = {**plan.as_json(), "search": search.as_json(), "sizing": found.as_json()}
    _finish(args, machines, plan, document, search)


def _report_point(point: Point) -> None:
    days = "nothing fits" if point.run_seconds is None else f"{point.run_seconds / 86400:.1f} days"
    print(f"{point.num_gpus} GPUs: {days}", file=sys.stderr, flush=True)


def _optimize(args: argparse.Namespace) -> None:
    from mtx.planning import scaling
    from mtx.reports import plan_text

    if args.days is None:
        raise UserError("--compute-optimal needs the days that the GPUs train: give --days")
    config = _template(args)
    machines = _Machines(args, config)
    cluster = machines.cluster(config, machines.count(config))
    optimal = scaling.compute_optimal(
        config,
        cluster,
        args.days,
        software=args.software,
        constants=machines.constants,
        price=args.price,
        calibrated=machines.calibrated,
    )
    if optimal is None:
        raise UserError(f"no layout of a model of these proportions fits {cluster.num_gpus} {cluster.gpu.name}")
    if not args.json:
        plan_text.print_optimal(optimal, args.days)
        plan_text.print_plan(optimal.plan)
    document = {**optimal.plan.as_json(), "compute_optimal": {"days": args.days, **optimal.as_json()}}
    _finish(args, machines, optimal.plan, document, optimal.search)


def _compare(args: argparse.Namespace) -> None:
    from mtx.planning.accuracy import compare_runs, summarize
    from mtx.planning.published import read_runs
    from mtx.reports import plan_text

    constants = None if args.calibration is None else _read_calibration(args.calibration).constants
    comparisons = compare_runs(read_runs(args.runs), constants)
    summary = summarize(comparisons)
    if args.json:
        options.print_json({"runs": [row.as_json() for row in comparisons], "summary": summary.as_json()})
    else:
        plan_text.print_comparisons(comparisons, summary)


def _list_gpus(args: argparse.Namespace) -> None:
    from mtx.planning.hardware import GPUS
    from mtx.reports.tables import print_table
    from mtx.reports.units import format_gib

    if args.json:
        options.print_json({"gpus": [_gpu_json(gpu) for gpu in GPUS.values()]})
        return
    rows = []
    for gpu in GPUS.values():
        peaks = (gpu.dense_flops.get(name) for name in ("float16", "bfloat16", "float8"))
        rows.append(
            [
                gpu.name,
                *("-" if peak is None else f"{peak / 1e12:g}" for peak in peaks),
                format_gib(gpu.memory_bytes),
                f"{gpu.memory_bandwidth / 1e12:g}",
                f"{gpu.nvlink_bandwidth / 1e9:g} x {gpu.nvlink_domain}",
                f"{gpu.nic_bandwidth * 8 / 1e9:g}",
            ]
        )
    head = ["name", "fp16 TFLOP/s", "bf16", "fp8", "memory", "TB/s", "NVLink GB/s x GPUs", "network Gb/s"]
    print_table(head, rows)


def _gpu_json(gpu: Gpu) -> dict[str, Any]:
    import dataclasses

    return {field.name: getattr(gpu, field.name) for field in dataclasses.fields(gpu) if field.name != "device_kind"}


class _Machines:
    """What the arguments, the calibration and the config say of the machines, in this order."""

    def __init__(self, args: argparse.Namespace, config: schema.Run):
        from mtx.planning.hardware import GPUS
        from mtx.planning.software import SOFTWARE

        if args.software not in SOFTWARE:
            raise UserError(f"--software {args.software}: there are {', '.join(SOFTWARE)}")
        calibration = None if args.calibration is None else _read_calibration(args.calibration)
        self.constants: Constants | None = None if calibration is None else calibration.constants
        self.calibrated, self.args = calibration is not None, args
        name = args.gpu or config.cluster.gpu
        measured = None if calibration is None else calibration.gpu
        if measured is not None and name in (None, measured.name):
            self.gpu = measured
        elif measured is not None:
            raise UserError(
                f"--calibration {args.calibration} is of {measured.name}, and says nothing about {name}: leave out one "
                "of them (--gpu, Cluster.gpu)"
            )
        elif name is None:
            raise UserError(f"which GPU? Give --gpu NAME, or Cluster.gpu = 'NAME'; there are {', '.join(GPUS)}")
        elif name not in GPUS:
            raise UserError(f"no GPU {name!r} in the table; there are {', '.join(GPUS)}")
        else:
            self.gpu = GPUS[name]

    def count(self, config: schema.Run) -> int:
        """The number of GPUs."""
        import math

        from mtx.config.axes import MESH_AXES

        sizes = [getattr(config.mesh, axis) for axis in MESH_AXES]
        count = self.args.gpus or config.cluster.gpus or (None if -1 in sizes else math.prod(sizes))
        if count is None:
            raise UserError("how many GPUs? Give --gpus N, or Cluster.gpus = N, or a mesh without -1")
        return int(count)

    def cluster(self, config: schema.Run, count: int) -> Cluster:
        """So many GPUs of it."""
        from mtx.planning.case import Cluster

        gbps = config.cluster.nic_gbps
        nic = self.gpu.nic_bandwidth if gbps is None else gbps * 1e9 / 8
        domain = config.cluster.nvlink_domain
        return Cluster.of(self.gpu, count, domain=domain, nic_bandwidth=nic * self.args.network)

    def terms(self) -> dict[str, Any]:
        """What a plan is told besides its case."""
        return {"tokens": self.args.tokens, "price": self.args.price, "calibrated": self.calibrated}


def _read_calibration(path: Path) -> Any:
    from mtx.planning.calibration import read_calibration

    return read_calibration(path)


def _template(args: argparse.Namespace) -> schema.Run:
    """The model whose proportions are kept."""
    if args.config is not None:
        return options.load_config(args).run
    from mtx.config import reader
    from mtx.planning import scaling

    return reader.load_text(scaling.TEMPLATE, "(the default proportions)", args.overrides).run


def _finish(
    args: argparse.Namespace,
    machines: _Machines,
    plan: Plan,
    document: dict[str, Any],
    search: SearchResult | None = None,
) -> None:
    """Writes the page and the JSON."""
    if args.html is not None:
        from mtx.planning.scaling import scale
        from mtx.reports.plan_page import write_plan_page

        scaling = scale(plan.case, machines.constants)
        try:
            write_plan_page(args.html, plan, search=search, scaling=scaling)
        except OSError as error:
            raise UserError(f"--html {args.html}: {error.strerror}; name a file that can be written") from None
    if args.json:
        options.print_json(document)


def _refuse_idle_options(args: argparse.Namespace) -> None:
    """Raises UserError where an option is given that the question would not look at."""
    machines: tuple[str, ...] = (
        "gpu",
        "gpus",
        "price",
        "tokens",
        "search",
        "days",
        "budget",
        "compute_optimal",
        "html",
    )
    idle = machines
    if args.list_gpus:
        question, idle = "--list-gpus", (*machines, "calibration", "runs")
    elif args.runs is not None:
        question = "--runs"
    elif args.compute_optimal:
        question, idle = "--compute-optimal", ("tokens", "search", "budget")
    else:
        return
    given = [f"--{name.replace('_', '-')}" for name in idle if getattr(args, name) not in (None, False)]
    if given:
        raise UserError(f"{question} makes nothing of {', '.join(given)}: leave one of them out")


def _refuse_to_overwrite(path: Path) -> None:
    """Raises UserError where a file is in the way that is no page of a plan, or there is no folder."""
    if not path.parent.is_dir():
        raise UserError(f"--html {path}: there is no folder {path.parent}; make it first")
    if path.is_dir():
        raise UserError(f"--html {path}: that is a folder; name a file in it")
    if path.exists() and not all(sign in path.read_text(errors="replace") for sign in PAGE_SIGNS):
        raise UserError(f"--html {path}: there is a file that no plan wrote, and it is left alone; name another one")


def _positive(text: str) -> float:
    """An argument type: a number above 0, and below what nobody pays or trains."""
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < _MOST:
        raise argparse.ArgumentTypeError(f"expected a number above 0 and below {_MOST:.0e}, not {text!r}")
    return value


_MOST = 1e24  # tokens, money, days: products of two stay finite
_SUFFIXES = {"K": 1e3, "M": 1e6, "B": 1e9, "T": 1e12}


def _count(text: str) -> int:
    """An argument type: 300e9, 300B, 300_000_000_000."""
    factor = _SUFFIXES.get(text[-1:].upper(), 1.0)
    value = _positive(text[:-1] if factor > 1 else text) * factor
    if value < 1:
        raise argparse.ArgumentTypeError(f"expected a count, not {text!r}")
    return round(value)
