"""Scaling: a run's step on more GPUs, and the model that makes the most of a number of GPUs and days.

Decides what is kept. Strong and weak scaling keep the model-parallel part of the layout (pipe, fsdp, expert, context,
tensor), the microbatch and the recomputation, and let `data` grow: so the curves show what replicas cost. In strong
scaling the batch stays, in weak scaling each replica keeps its share of it.

Source of the compute-optimal size: Hoffmann et al., arXiv 2203.15556, approach 3; Besiroglu et al., arXiv 2404.10102.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from mtx.config import schema
from mtx.planning.case import Case, Cluster
from mtx.planning.constants import Constants
from mtx.planning.plan import DAY_S, Plan, count_parameters, flops_per_token, make_plan
from mtx.planning.products import fastest_flops
from mtx.planning.search import SearchResult, find_misfit, search_layouts
from mtx.planning.step_time import estimate_time


@dataclass(frozen=True)
class ScalingPoint:
    """A step on a number of GPUs.

    Attributes:
        num_gpus: How many.
        global_batch_size: Sequences of a step.
        step_seconds: Of one.
        tokens_per_second: Of all GPUs.
        mfu: Model FLOPs, attention in full, over the peak; None without a peak.
        efficiency: Tokens per second and GPU, relative to the first point.
    """

    num_gpus: int
    global_batch_size: int
    step_seconds: float
    tokens_per_second: float
    mfu: float | None
    efficiency: float


def scale(case: Case, constants: Constants | None = None) -> dict[str, list[ScalingPoint]]:
    """'strong' and 'weak' scaling around a case, each from the fewest GPUs up."""
    return {"strong": strong(case, constants=constants), "weak": weak(case, constants=constants)}


def strong(case: Case, counts: Sequence[int] | None = None, constants: Constants | None = None) -> list[ScalingPoint]:
    """The same batch on more GPUs.

    Args:
        counts: Numbers of GPUs, those left out that the layout or the batch does not allow; None: data shards from one
            on, doubled as long as the batch divides.
    """
    return _scale(case, counts, constants, grow_batch=False)


def weak(case: Case, counts: Sequence[int] | None = None, constants: Constants | None = None) -> list[ScalingPoint]:
    """The batch grows with the GPUs; the arguments are those of `strong`."""
    return _scale(case, counts, constants, grow_batch=True)


def _scale(
    case: Case, counts: Sequence[int] | None, constants: Constants | None, *, grow_batch: bool
) -> list[ScalingPoint]:
    replica = case.cluster.num_gpus // case.sizes["data"]
    data = [count // replica for count in counts if count % replica == 0] if counts else _data_sizes(case)
    flops = flops_per_token(case)["full"]
    peak = case.cluster.gpu.peak_flops(case.run.precision.compute)
    points: list[ScalingPoint] = []
    for size in data:
        scaled = _with_data(case, size, grow_batch)
        if scaled is None:
            continue
        seconds = estimate_time(scaled, constants).seconds
        gpus, rate = scaled.cluster.num_gpus, scaled.tokens_per_step / seconds
        first = points[0].tokens_per_second / points[0].num_gpus if points else rate / gpus
        mfu = None if peak is None else flops * rate / gpus / peak
        batch = scaled.run.train.global_batch_size
        points.append(ScalingPoint(gpus, batch, seconds, rate, mfu, rate / gpus / first))
    return points


def _data_sizes(case: Case) -> list[int]:
    """The case's own, halved down to one replica and doubled up to 8 times as many."""
    own = case.sizes["data"]
    return sorted({own >> power for power in range(own.bit_length())} | {2 * own, 4 * own, 8 * own})


def _with_data(case: Case, size: int, grow_batch: bool) -> Case | None:
    """The case on other numbers of replicas; None where its batch does not divide over them."""
    run, before = case.run, case.sizes["data"]
    batch, rest = divmod(run.train.global_batch_size * size, before) if grow_batch else (run.train.global_batch_size, 0)
    mesh = dataclasses.replace(run.mesh, data=size)
    # A microbatch that is not named would shrink with the share.
    train = dataclasses.replace(
        run.train, global_batch_size=batch, batch_ramp=None, microbatch_size=case.microbatch_size
    )
    scaled = dataclasses.replace(run, mesh=mesh, train=train)
    sizes = case.sizes | {"data": size}
    if rest or batch % (case.shards("batch") // before * size) or find_misfit(scaled, sizes) is not None:
        return None
    cluster = dataclasses.replace(case.cluster, num_gpus=case.cluster.num_gpus // before * size)
    return Case(scaled, cluster, case.software)


@dataclass(frozen=True)
class Law:
    """The loss of a model of N parameters after D tokens: e + a / N**alpha + b / D**beta, in nats per token.

    Attributes:
        source: Where the coefficients stand.
    """

    source: str
    e: float
    a: float
    b: float
    alpha: float
    beta: float

    def loss(self, parameters: float, tokens: float) -> float:
        """Of the authors' models on their text: for comparing sizes."""
        return self.e + self.a / parameters**self.alpha + self.b / tokens**self.beta

    def optimal_parameters(self, flops: float) -> float:
        """The size whose loss is least for so many training FLOPs, 6 per parameter and token (2203.15556, eq. 4)."""
        total = self.alpha + self.beta
        return float((self.alpha * self.a / (self.beta * self.b)) ** (1 / total) * (flops / 6) ** (self.beta / total))


HOFFMANN = Law("arXiv 2203.15556, equation 10, as rounded there", e=1.69, a=406.4, b=410.7, alpha=0.34, beta=0.28)
LAW = Law(
    "arXiv 2404.10102, a refit of arXiv 2203.15556's approach 3",
    e=1.8172,
    a=482.01,
    b=2085.43,
    alpha=0.3478,
    beta=0.3658,
)
"""The one that sizes are chosen by. As printed, the first paper's coefficients have their optimum near 90 tokens a
parameter, which contradicts its other two approaches; those and this refit have it near 20."""
TOKENS_PER_PARAMETER = 20.0
"""The rule of thumb."""


@dataclass(frozen=True)
class OptimalSize:
    """A model for a number of GPUs and days.

    Attributes:
        plan: Of the model on its fastest layout, for the tokens that the days allow.
        search: The layouts.
    """

    plan: Plan
    search: SearchResult

    @property
    def tokens(self) -> int:
        return self.plan.tokens or 0

    @property
    def flops(self) -> float:
        """Of the training, 6 per parameter and token."""
        return 6.0 * self.plan.active_parameters * self.tokens

    def alternatives(self) -> list[Alternative]:
        """This size, and what others recommend for as many FLOPs."""
        sizes = {
            LAW.source: float(self.plan.active_parameters),
            HOFFMANN.source: HOFFMANN.optimal_parameters(self.flops),
            f"{TOKENS_PER_PARAMETER:g} tokens a parameter": math.sqrt(self.flops / 6 / TOKENS_PER_PARAMETER),
        }
        return [
            Alternative(source, n, self.flops / 6 / n, LAW.loss(n, self.flops / 6 / n)) for source, n in sizes.items()
        ]

    def as_json(self) -> dict[str, Any]:
        """The size, not its plan."""
        model = self.plan.case.run.model
        names = ("num_layers", "d_model", "num_heads", "num_kv_heads", "d_ff")
        return {
            "model": {name: getattr(model, name) for name in names},
            "active_parameters": self.plan.active_parameters,
            "tokens": self.tokens,
            "flops": self.flops,
            "law": dataclasses.asdict(LAW),
            "alternatives": [dataclasses.asdict(alternative) for alternative in self.alternatives()],
        }


@dataclass(frozen=True)
class Alternative:
    """A size that somebody recommends; the loss is LAW's."""

    source: str
    parameters: float
    tokens: float
    loss: float


TEMPLATE = """
Model.vocab_size = 51200
Model.d_model = 4096
Model.num_layers = 32
Model.num_heads = 32
Model.max_seq_len = 2048
Precision.compute = 'bfloat16'
Train.steps = 1
Train.seq_len = 2048
Train.global_batch_size = 2048
"""
"""The proportions where no config gives others: GPT, heads 128 wide, 128 of width to a layer, within the range in which
the loss hardly depends on it (arXiv 2001.08361, figure 5); batches of 4 million tokens."""
ROUNDS = 6
"""Sizes that are planned at most until the size repeats."""


def compute_optimal(
    template: schema.Run,
    cluster: Cluster,
    days: float,
    *,
    software: str = "mtx",
    constants: Constants | None = None,
    price: float | None = None,
    calibrated: bool = False,
) -> OptimalSize | None:
    """The model, of the template's proportions, that so many GPUs train best in so many days.

    The FLOPs that there are depend on how well the model's best layout uses the GPUs, and that on the model: size,
    layout and rate are found in turn, until the size stays.

    Args:
        template: Width / depth, width of a head and of the MLP are kept; its layout is searched for.

    Returns:
        None where no layout fits.
    """
    flops = 0.4 * fastest_flops(cluster.gpu, template.precision.compute) * cluster.num_gpus * days * DAY_S
    found: OptimalSize | None = None
    for _ in range(ROUNDS):
        run = resize(template, LAW.optimal_parameters(flops))
        if found is not None and run.model == found.plan.case.run.model:
            break
        search = search_layouts(run, cluster, software, constants)
        if not search.ranked:
            break
        plan = make_plan(search.ranked[0].case, constants, price=price, calibrated=calibrated)
        plan = dataclasses.replace(plan, steps=plan.timetable.steps_within(days * DAY_S))
        found = OptimalSize(plan, search)
        flops = found.flops
    return found


def resize(template: schema.Run, parameters: float) -> schema.Run:
    """A run of about so many active parameters, with the template's width / depth, heads and MLP in proportion.

    Depth is the whole number that comes nearest; the width is one of 8 heads or a multiple of them, which `tensor`
    divides.
    """
    model = template.model
    ratio, head = model.d_model / model.num_layers, model.head_width
    groups = model.num_heads // model.kv_heads

    def make(layers: int) -> schema.Run:
        heads = max(8 * groups, round(layers * ratio / head / 8 / groups) * 8 * groups)
        width = heads * head
        sized = dataclasses.replace(
            model,
            num_layers=layers,
            d_model=width,
            num_heads=heads,
            num_kv_heads=None if model.num_kv_heads is None else heads // groups,
            d_ff=None if model.d_ff is None else _near(model.d_ff / model.d_model * width),
            expert_d_ff=None if model.expert_d_ff is None else _near(model.expert_d_ff / model.d_model * width),
        )
        return dataclasses.replace(template, model=sized)

    low, high = 1, 2
    while count_parameters(make(high))[1] < parameters:
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if count_parameters(make(middle))[1] < parameters else (low, middle)
    return min((make(low), make(high)), key=lambda run: abs(count_parameters(run)[1] - parameters))


def _near(width: float) -> int:
    return max(128, round(width / 128) * 128)
