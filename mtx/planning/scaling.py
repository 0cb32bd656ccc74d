"""Scaling: a run's step on more GPUs, and the model that makes the most of a number of GPUs and days.

Decides what is kept. Strong and weak scaling keep the model-parallel part of the layout (pipe, fsdp, expert, context,
tensor), the microbatch and the recomputation, and let `data` grow: so the curves show what replicas cost. In strong
scaling the batch stays, in weak scaling each replica keeps its share of it.

Source of the compute-optimal size: Hoffmann et al., arXiv 2203.15556, approach 3 (equation 10).
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from mtx.config import schema
from mtx.planning.case import Case, Cluster
from mtx.planning.constants import Constants
from mtx.planning.plan import DAY_S, Plan, count_parameters, flops_per_token, make_plan
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


# Loss of a model of N parameters after D tokens: E + A / N**ALPHA + B / D**BETA (arXiv 2203.15556, equation 10, as
# rounded there).
E, A, B, ALPHA, BETA = 1.69, 406.4, 410.7, 0.34, 0.28
SOURCE = "arXiv 2203.15556, approach 3: L = 1.69 + 406.4 / N^0.34 + 410.7 / D^0.28"
TOKENS_PER_PARAMETER = 20.0
"""The rule of thumb that the same paper is known for (approaches 1 and 2)."""


def predict_loss(parameters: float, tokens: float) -> float:
    """Of a transformer on the authors' text, in nats per token."""
    return E + A / parameters**ALPHA + B / tokens**BETA


def optimal_parameters(flops: float) -> float:
    """The size whose loss is least for so many training FLOPs, with 6 FLOPs per parameter and token (equation 4)."""
    scale = (ALPHA * A / (BETA * B)) ** (1 / (ALPHA + BETA))
    return scale * (flops / 6) ** (BETA / (ALPHA + BETA))


def rule_parameters(flops: float) -> float:
    """The size that has TOKENS_PER_PARAMETER tokens for so many FLOPs."""
    return math.sqrt(flops / (6 * TOKENS_PER_PARAMETER))


@dataclass(frozen=True)
class OptimalSize:
    """A model for a number of GPUs and days.

    Attributes:
        plan: Of the model on its fastest layout, for the tokens that the days allow.
        search: The layouts.
        loss: As the law predicts it: for comparing sizes, not for this data.
    """

    plan: Plan
    search: SearchResult
    loss: float

    def as_json(self) -> dict[str, Any]:
        """The size, not its plan."""
        model, tokens = self.plan.case.run.model, self.plan.tokens or 0
        names = ("num_layers", "d_model", "num_heads", "num_kv_heads", "d_ff")
        return {
            "model": {name: getattr(model, name) for name in names},
            "parameters": self.plan.parameters,
            "active_parameters": self.plan.active_parameters,
            "tokens": tokens,
            "tokens_per_parameter": tokens / self.plan.active_parameters,
            "predicted_loss": self.loss,
            "mfu": self.plan.mfu_model_full,
        }


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
    choose: Callable[[float], float] = optimal_parameters,
    *,
    software: str = "mtx",
    constants: Constants | None = None,
    price: float | None = None,
) -> OptimalSize | None:
    """The model, of the template's proportions, that so many GPUs train best in so many days.

    The FLOPs that there are depend on how well the model's best layout uses the GPUs, and that on the model: size,
    layout and rate are found in turn, until the size repeats.

    Args:
        template: Width / depth, width of a head and of the MLP are kept; its layout is searched for.
        choose: From training FLOPs to parameters.

    Returns:
        None where no layout fits.
    """
    peak = cluster.gpu.peak_flops(template.precision.compute) or cluster.gpu.float32_flops
    flops = 0.4 * peak * cluster.num_gpus * days * DAY_S  # where to begin
    tried: dict[tuple[int, int], OptimalSize] = {}
    best: OptimalSize | None = None
    for _ in range(ROUNDS):
        run = resize(template, choose(flops))
        key = (run.model.num_layers, run.model.d_model)
        if key in tried:
            return tried[key]
        search = search_layouts(run, cluster, software, constants)
        if not search.ranked:
            return best
        plan = make_plan(search.ranked[0].case, constants, price=price)
        plan = dataclasses.replace(plan, steps=plan.timetable.steps_within(days * DAY_S))
        tokens = plan.tokens or 0
        best = tried[key] = OptimalSize(plan, search, predict_loss(plan.active_parameters, max(1, tokens)))
        flops = 6.0 * plan.active_parameters * tokens
    return best


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
