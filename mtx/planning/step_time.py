"""How long a training step takes: a microbatch's products, memory traffic and exchanges, and how a step repeats them.

Decides what waits for what. Efficiencies and overlaps are constants (`mtx.planning.constants`), fitted on published
runs; what the layers compute is read from the parameters that they declare.

Invariant: the parts sum to the seconds.

Source: arXiv 2104.04473 and 2205.05198; docs/foresight.md has the formulas and the errors.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from mtx.planning.case import Case
from mtx.planning.communication import Network
from mtx.planning.constants import Constants, load_constants
from mtx.planning.flops import attention_flops_per_token
from mtx.planning.layers import LayerWork, describe_head, describe_layer
from mtx.planning.products import fastest_flops, product_seconds
from mtx.planning.software import SOFTWARE

PARTS = (
    "matmul", "attention", "memory_bound", "recompute", "tensor", "context", "expert", "pipeline", "bubble", "data",
    "optimizer", "launch",
)  # fmt: skip


@dataclass(frozen=True)
class StepTime:
    """How long a step takes, and with what.

    Attributes:
        parts: Seconds by PARTS, of exchanges those that nothing hides; they sum to `seconds`.
        forward_s: Of one microbatch through one chunk of the slowest stage, forward.
        backward_s: The same, backward, with what it computes again.
        bubble_fraction: (p - 1) / (v M): the time that stages wait, relative to the time that they work.
        hardware_flops: Of one device and step, on average: recomputation counts, and attention to all places.
    """

    parts: Mapping[str, float]
    forward_s: float
    backward_s: float
    bubble_fraction: float
    hardware_flops: float

    @property
    def seconds(self) -> float:
        return sum(self.parts.values())


@dataclass(frozen=True)
class _Pass:
    """Seconds of one pass of a microbatch through a layer or the head, by part."""

    parts: Mapping[str, float]

    @property
    def seconds(self) -> float:
        return sum(self.parts.values())

    def __add__(self, other: _Pass) -> _Pass:
        names = (*self.parts, *(name for name in other.parts if name not in self.parts))
        return _Pass({name: self.parts.get(name, 0.0) + other.parts.get(name, 0.0) for name in names})

    def __mul__(self, times: float) -> _Pass:
        return _Pass({name: value * times for name, value in self.parts.items()})


_NOTHING = _Pass({})


class _Clock:
    """The time of everything in a case."""

    def __init__(self, case: Case, constants: Constants) -> None:
        self.case, self.constants = case, constants
        self.run, self.gpu, self.software = case.run, case.cluster.gpu, SOFTWARE[case.software]
        self.network = Network(case.cluster, case.sizes, constants)
        self.quality = constants.quality_of(case.software)
        self.dtype = self.run.precision.compute
        self.width = 4 if self.dtype == "float32" else 2
        self.bandwidth = self.gpu.memory_bandwidth * constants.memory_efficiency

    def products(self, work: LayerWork, *, backward: bool = False) -> float:
        """Backward, the gradients of input and weight are two products as large as the forward one."""
        seconds = sum(product_seconds(p, self.gpu, self.dtype, self.constants) for p in work.products)
        return (2 if backward else 1) * seconds / self.quality

    def attention(self, work: LayerWork, *, backward: bool = False) -> float:
        """The fused kernel computes what causality leaves, and backward the scores once more: 5 products for 2."""
        if work.fused:
            rate = fastest_flops(self.gpu, "bfloat16") * self.constants.attention_efficiency
            return work.attention_flops / 2 * (2.5 if backward else 1) / rate / self.quality
        seconds = sum(product_seconds(p, self.gpu, "bfloat16", self.constants) for p in work.attention)
        scores = work.score_numbers * 2 * (6 if backward else 5) / self.bandwidth
        return ((2 if backward else 1) * seconds + scores) / self.quality

    def traffic(self, work: LayerWork, *, backward: bool = False) -> float:
        unfused = 1.0 if self.software.fused else self.constants.unfused_traffic
        return work.traffic * self.width * unfused * (1.5 if backward else 1) / self.bandwidth / self.quality

    def tensor(self, exchanges: int, work: LayerWork) -> float:
        """Exposed seconds of gathers and scatters over `tensor`, each of a whole activation."""
        seconds = exchanges * self.network.gather_seconds(work.exchanged * self.width, ("tensor",))
        return seconds * (1 - self.constants.tensor_overlap if self.software.tensor_overlaps else 1)

    def context(self, work: LayerWork, passes: float) -> float:
        """Exposed seconds of exchanges over `context`: they hide under attention."""
        c = self.case.sizes["context"]
        if c == 1:
            return 0.0
        seconds = passes * (c - 1) * self.network.permute_seconds(work.keys * self.width, "context")
        return max(0.0, seconds - self.constants.overlap * self.attention(work, backward=passes > 1))

    def expert(self, work: LayerWork) -> float:
        return 2 * self.network.exchange_seconds(work.dispatched * self.width, self.case.rules["experts"])

    def launch(self) -> float:
        return self.constants.layer_launch_s / self.quality

    def layer(self, stack: str) -> tuple[_Pass, _Pass]:
        """Forward and backward of a layer; what backward computes again is in its `recompute`."""
        work = describe_layer(self.case, stack)
        full = self.run.train.recompute == "full"
        forward = {
            "matmul": self.products(work),
            "attention": self.attention(work),
            "memory_bound": self.traffic(work),
            "tensor": self.tensor(4, work),
            "context": self.context(work, 1),
            "expert": self.expert(work),
            "launch": self.launch(),
        }
        again = 0.0
        if full:
            again = forward["matmul"] + forward["attention"] + forward["memory_bound"] + forward["launch"]
        elif self.run.train.recompute == "selective":
            again = forward["attention"] + (forward["memory_bound"] if self.case.software == "mtx" else 0.0)
        backward = {
            "matmul": self.products(work, backward=True),
            "attention": self.attention(work, backward=True),
            "memory_bound": self.traffic(work, backward=True),
            "recompute": again,
            "tensor": self.tensor(4 + 4 * full, work),
            "context": self.context(work, 2 + full),
            "expert": forward["expert"] * (1 + full),
            "launch": 2 * self.launch(),
        }
        data = self.gathered(work, sum(forward.values()), sum(backward.values()))
        forward["data"], backward["data"] = data
        return _Pass(forward), _Pass(backward)

    def gathered(self, work: LayerWork, forward: float, backward: float) -> tuple[float, float]:
        """Exposed seconds of ZeRO-3's exchanges of a layer: its weights twice, its gradients once."""
        if self.case.sizes["fsdp"] == 1:
            return 0.0, 0.0
        gather = self.network.gather_seconds(work.parameters * self.width, ("fsdp",))
        wide = 4 if self.run.precision.gradients == "float32" and self.case.software == "mtx" else self.width
        scatter = self.network.gather_seconds(work.parameters * wide, ("fsdp",))
        overlap = self.constants.overlap if self.software.overlaps else 0.0
        return gather - min(gather * overlap, forward), gather + scatter - min((gather + scatter) * overlap, backward)

    def head(self, *, shared: bool) -> tuple[_Pass, _Pass]:
        work = describe_head(self.case, shared=shared)
        tensor = self.tensor(1, work)
        both = 2 * self.network.reduce_seconds(work.exchanged * self.width, ("pipe",)) if shared else 0.0
        forward = {"matmul": self.products(work), "memory_bound": self.traffic(work), "tensor": tensor}
        backward = {
            "matmul": self.products(work, backward=True),
            "memory_bound": self.traffic(work, backward=True),
            "tensor": tensor,
            "pipeline": both,
        }
        return _Pass(forward), _Pass(backward)

    def hop(self) -> float:
        """Seconds of sending an activation to the next stage."""
        case = self.case
        numbers = case.microbatch_size * self.run.train.seq_len * self.run.model.d_model
        shards = (
            case.shards("seq_sp") if self.run.rules.sequence_parallel else case.shards("seq") * case.sizes["tensor"]
        )
        return self.network.permute_seconds(numbers / shards * self.width, "pipe")

    def exchange_weights(self, parameters: float, hideable: float) -> float:
        """Exposed seconds of what replicas exchange once a step."""
        case, run = self.case, self.run
        axes = case.rules["batch"] + case.rules["seq"]
        axes = tuple(axis for axis in axes if axis != "fsdp")
        gradients = 4 if run.precision.gradients == "float32" else 2
        if run.rules.zero == 2:
            seconds = self.network.gather_seconds(parameters * self.width, axes)
            seconds += self.network.gather_seconds(parameters * gradients, axes)
        elif run.rules.zero == 1:
            seconds = self.network.gather_seconds(parameters * self.width, axes)
            seconds += self.network.gather_seconds(parameters * gradients, axes)
            if case.software == "mtx":
                seconds += self.network.gather_seconds(parameters * gradients, axes)
        else:
            seconds = self.network.reduce_seconds(parameters * gradients, axes)
        overlap = self.constants.overlap if self.software.overlaps else 0.0
        return seconds - min(seconds * overlap, hideable)


def estimate_time(case: Case, constants: Constants | None = None) -> StepTime:
    """How long a training step takes.

    Args:
        constants: Of the model; None: those that are shipped, fitted on published runs.
    """
    clock = _Clock(case, load_constants() if constants is None else constants)
    stages, microbatches = case.sizes["pipe"], case.num_microbatches
    layers = {stack: clock.layer(stack) for stack in dict.fromkeys(case.run.model.layer_stacks)}
    chunks = case.run.pipeline.virtual_stages if stages > 1 else 1
    if stages == 1:
        slots = list(case.run.model.layer_stacks)
    elif clock.software.pipeline == "lockstep":
        slots = list(case.slots)
    else:
        slots = list(case.run.model.layer_stacks)[: -(-case.run.model.num_layers // stages)]
    forward, backward = _NOTHING, _NOTHING
    for stack, (ahead, back) in layers.items():
        forward, backward = forward + ahead * slots.count(stack), backward + back * slots.count(stack)
    # The head, once for each microbatch: of the stage that everybody waits for.
    shared = stages > 1 and clock.software.pipeline == "lockstep" and case.run.pipeline.head == "sharded"
    ahead, back = clock.head(shared=shared)
    full_stages = case.run.model.num_layers % stages == 0
    if stages == 1 or full_stages or shared:
        layer_forward, layer_backward = forward, backward
        forward, backward = forward + ahead, backward + back
    else:
        layer_forward, layer_backward = forward, backward
    once = (forward + backward) * microbatches
    parts = {name: once.parts.get(name, 0.0) for name in PARTS}
    waits = (stages - 1) / chunks
    if clock.software.pipeline == "lockstep":
        parts["bubble"] = waits * (forward.seconds + backward.seconds)
    else:
        parts["bubble"] = waits * (layer_forward.seconds + layer_backward.seconds)
    if stages > 1:
        hops = 2 * clock.hop() * (microbatches * chunks + stages - 1)
        parts["pipeline"] += hops * (1 - clock.constants.overlap if clock.software.tensor_overlaps else 1)
    _add_step(clock, parts, backward.seconds)
    return StepTime(
        parts=parts,
        forward_s=forward.seconds / chunks,
        backward_s=backward.seconds / chunks,
        bubble_fraction=waits / microbatches,
        hardware_flops=_hardware_flops(case),
    )


def _add_step(clock: _Clock, parts: dict[str, float], backward_s: float) -> None:
    """What a step does once."""
    case = clock.case
    model_shards = math.prod(case.sizes[axis] for axis in ("pipe", "tensor"))
    numbers = 0.0
    moved = 0.0
    for parameter in case.declared.parameters:
        size = math.prod(parameter.shape)
        moments = sum(math.prod(shape) * width for shape, width in parameter.moments)
        local = size / model_shards
        if "experts" in parameter.axes:
            local /= case.shards("experts")
        numbers += local
        moved += local * (4 + 8 + 2 + 2 * moments / size)
    replicas = case.cluster.num_gpus / model_shards / case.sizes["fsdp"]
    shards = case.sizes["fsdp"] * (replicas if case.run.rules.zero else 1)
    parts["data"] += clock.exchange_weights(numbers / case.sizes["fsdp"], backward_s)
    parts["optimizer"] = moved / shards / clock.bandwidth
    parts["launch"] += clock.constants.step_launch_s


def _hardware_flops(case: Case) -> float:
    run, model = case.run, case.run.model
    sizes = [
        (math.prod(p.shape), p)
        for p in case.declared.parameters
        if p.axes[0] == "layers" and len([axis for axis in p.axes if axis not in ("layers", "experts")]) == 2
    ]
    layers = 2.0 * sum(
        size * (model.experts_per_token / model.num_experts if "experts" in p.axes else 1) for size, p in sizes
    )
    attention = attention_flops_per_token(model, run.train.seq_len)
    head = 2.0 * model.vocab_size * model.d_model
    again = {"none": 0.0, "selective": attention, "full": layers + attention}[run.train.recompute]
    return case.tokens_per_step * (3 * (layers + attention + head) + again) / case.cluster.num_gpus
