"""How long a training step takes: a microbatch's products, memory traffic and exchanges, and how a step repeats them.

Decides what waits for what. Efficiencies and overlaps are constants (`mtx.planning.constants`), fitted on published
runs; what the layers compute is read from the parameters that they declare.

Invariant: the parts sum to the seconds.

Source: arXiv 2104.04473 and 2205.05198; docs/planner.md has the formulas and the errors.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from mtx.planning.activations import keeps_attention
from mtx.planning.case import Case
from mtx.planning.communication import Network
from mtx.planning.constants import Constants, load_constants
from mtx.planning.hlo_products import Product
from mtx.planning.layers import LayerWork, StepWork, describe_step
from mtx.planning.products import fastest_flops, product_seconds
from mtx.planning.software import SOFTWARE

PARTS = (
    "matmul", "attention", "memory_bound", "recompute", "tensor", "context", "expert", "pipeline", "bubble", "data",
    "optimizer", "launch",
)  # fmt: skip
MISALIGNED = 1 / 8
"""Speed of attention's products where heads are not aligned to 16 bytes, and tensor cores are not used. Source: heads
of 108 in the BLOOM sweep, whose steps take a third longer."""


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
        self.network = Network(case.cluster, case.sizes, constants, self.software.shares_adapters)
        self.quality = constants.quality_of(case.software, self.gpu.generation)
        self.dtype = self.run.precision.compute
        self.width = 4 if self.dtype == "float32" else 2
        self.bandwidth = self.gpu.memory_bandwidth * constants.memory_efficiency

    def products(self, work: LayerWork) -> tuple[float, float]:
        """Forward; and backward, where the gradients of input and weight are a product each, as large as that."""
        forward = backward = 0.0
        for dtype, products in ((self.dtype, work.products), ("bfloat16", work.wide)):
            for p in products:
                forward += self._product(p, dtype)
                backward += self._product(Product(p.batch, p.rows, p.columns, p.contracted, 1), dtype)
                backward += self._product(Product(p.batch, p.contracted, p.rows, p.columns, 1), dtype)
        return forward / self.quality, backward / self.quality

    def _product(self, product: Product, dtype: str) -> float:
        return product_seconds(product, self.gpu, dtype, self.constants)

    def attention(self, work: LayerWork) -> tuple[float, float]:
        """The fused kernel computes what causality leaves, and backward the scores once more: 5 products for 2."""
        if work.fused:
            rate = fastest_flops(self.gpu, "bfloat16") * self.constants.attention_efficiency * self.quality
            if self.software.attention == "flash":
                rate *= self.constants.first_flash
            if self.software.attention in ("flash", "flash-2") and self.gpu.generation not in ("volta", "ampere"):
                rate *= self.constants.older_instructions
            forward = work.attention_flops / 2 / rate
            return forward, 2.5 * forward
        dtype = "float32" if self.dtype == "float32" else "bfloat16"  # never in 8 bits
        seconds = sum(product_seconds(p, self.gpu, dtype, self.constants) for p in work.attention)
        if self.run.model.head_width % 8 and self.case.software != "mtx":  # XLA fills up what is not aligned
            seconds /= MISALIGNED
        passes = work.score_bytes / self.bandwidth
        return (seconds + 5 * passes) / self.quality, (2 * seconds + 6 * passes) / self.quality

    def traffic(self, work: LayerWork, *, backward: bool = False) -> float:
        unfused = 1.0 if self.software.fused else self.constants.unfused_traffic
        return work.traffic * self.width * unfused * (1.5 if backward else 1) / self.bandwidth / self.quality

    def tensor(self, exchanges: int, work: LayerWork) -> float:
        """Exposed seconds of gathers and scatters over `tensor`, each of a whole activation."""
        seconds = exchanges * self.network.gather_seconds(work.exchanged * self.width, ("tensor",))
        return seconds * (1 - self.constants.tensor_overlap if self.software.tensor_overlaps else 1)

    def context(self, work: LayerWork, passes: float) -> float:
        """Exposed seconds of exchanges over `context`. Keys that go round a ring hide under attention."""
        c = self.case.sizes["context"]
        if c == 1:
            return 0.0
        if self.run.train.context_exchange == "all_to_all":
            return passes * self.network.exchange_seconds((2 * work.queries + work.keys) * self.width, ("context",))
        seconds = passes * (c - 1) * self.network.permute_seconds(work.keys * self.width, "context")
        return max(0.0, seconds - self.constants.overlap * self.attention(work)[passes > 1])

    def expert(self, work: LayerWork) -> float:
        """Seconds of sending tokens to their experts and back."""
        if not work.dispatched:
            return 0.0
        return 2 * self.network.exchange_seconds(work.dispatched * self.width, self.case.rules["experts"])

    def launch(self) -> float:
        return self.constants.layer_launch_s / self.quality

    def layer(self, work: LayerWork) -> tuple[_Pass, _Pass]:
        """Forward and backward of a layer; what backward computes again is in its `recompute`."""
        full = self.run.train.recompute == "full"
        (product, product_back), (attention, attention_back) = self.products(work), self.attention(work)
        forward = {
            "matmul": product,
            "attention": attention,
            "memory_bound": self.traffic(work),
            "tensor": self.tensor(4, work),
            "context": self.context(work, 1),
            "expert": self.expert(work),
            "launch": self.launch(),
        }
        computed = product + attention + forward["memory_bound"] + forward["launch"]
        if not self.software.repeats_last and self.case.stages is None:
            computed -= sum(self._product(p, self.dtype) for p in work.last) / self.quality
        again = self.repeated(computed, forward)
        backward = {
            "matmul": product_back,
            "attention": attention_back,
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

    def repeated(self, computed: float, forward: Mapping[str, float]) -> float:
        """Seconds of what the backward pass of a layer computes again.

        Args:
            computed: Seconds of all of it.
        """
        recompute, habit = self.run.train.recompute, self.software.selective
        if recompute == "full":
            return computed
        if recompute == "selective":
            attention = 0.0 if keeps_attention(self.case) else forward["attention"]
            attention += forward["memory_bound"] if habit == "elementwise" else 0.0
            return computed / 2 if habit == "half" else attention
        # What the ring of our pipeline keeps are the inputs of products.
        return forward["memory_bound"] if self.case.software == "mtx" and self.case.stages is not None else 0.0

    def gathered(self, work: LayerWork, forward: float, backward: float) -> tuple[float, float]:
        """Exposed seconds of ZeRO-3's exchanges of a layer: its weights twice, its gradients once."""
        if self.case.sizes["fsdp"] == 1:
            return 0.0, 0.0
        gather = self.network.gather_seconds(work.parameters * self.width, ("fsdp",))
        wide = 4 if self.run.precision.gradients == "float32" else 2
        scatter = self.network.gather_seconds(work.parameters * wide, ("fsdp",))
        overlap = self.constants.overlap if self.software.overlaps else 0.0
        return gather - min(gather * overlap, forward), gather + scatter - min((gather + scatter) * overlap, backward)

    def head(self, work: LayerWork) -> tuple[_Pass, _Pass]:
        """Forward and backward of the head; that of a lockstep pipeline may be shared by all stages."""
        shared = self.software.pipeline == "lockstep" and self.run.pipeline.head == "sharded"
        tensor = self.tensor(1, work)
        parts = self.case.shards("seq_sp") // self.case.shards("seq")
        passed = work.exchanged / parts * self.width
        both = 2 * self.network.reduce_seconds(passed, ("pipe",)) if shared else 0.0
        product, product_back = self.products(work)
        forward = {"matmul": product, "memory_bound": self.traffic(work), "tensor": tensor}
        backward = {
            "matmul": product_back,
            "memory_bound": self.traffic(work, backward=True),
            "tensor": tensor,
            "pipeline": both,
        }
        return _Pass(forward), _Pass(backward)

    def hop(self) -> float:
        """Exposed seconds of sending an activation to the next stage."""
        case = self.case
        numbers = case.microbatch_size * self.run.train.seq_len * self.run.model.d_model
        shards = (
            case.shards("seq_sp") if self.run.rules.sequence_parallel else case.shards("seq") * case.sizes["tensor"]
        )
        seconds = self.network.permute_seconds(numbers / shards * self.width, "pipe")
        return seconds * (1 - self.constants.overlap if self.software.tensor_overlaps else 1)

    def replicas(self, parameters: float, hideable: float) -> float:
        """Exposed seconds of what replicas exchange once a step: gradients, and with ZeRO weights.

        Args:
            parameters: Numbers of the weights that a device computes with.
            hideable: Seconds of computation that it can travel under, where software overlaps it.
        """
        rules, zero = self.case.rules, self.run.rules.zero
        axes = tuple(axis for axis in (*rules["batch"], *rules["seq"]) if axis != "fsdp")
        local = parameters / self.case.sizes["fsdp"]
        gradients = local * (4 if self.run.precision.gradients == "float32" else 2)
        seconds = self.network.gather_seconds(gradients, axes)  # each has the sum of its part
        if zero:
            seconds += self.network.gather_seconds(local * self.width, axes)
        if not zero or (zero == 1 and self.case.software == "mtx"):
            seconds += self.network.gather_seconds(gradients, axes)
        overlap = self.constants.overlap if self.software.overlaps else 0.0
        return seconds - min(seconds * overlap, hideable)

    def optimizer(self, state_bytes: float) -> float:
        """Seconds of the update."""
        rules = self.case.rules
        replicas = math.prod(self.case.sizes[axis] for axis in (*rules["batch"], *rules["seq"]) if axis != "fsdp")
        shards = self.case.sizes["fsdp"] * (replicas if self.run.rules.zero else 1)
        return state_bytes / shards / self.bandwidth


def estimate_time(case: Case, constants: Constants | None = None) -> StepTime:
    """How long a training step takes.

    Args:
        constants: Of the model; None: those that are shipped, fitted on published runs.
    """
    return time_step(describe_step(case), load_constants() if constants is None else constants)


def time_step(work: StepWork, constants: Constants) -> StepTime:
    """The same, of a step that is described already."""
    case = work.case
    clock = _Clock(case, constants)
    stages, microbatches = case.sizes["pipe"], case.num_microbatches
    chunks = case.run.pipeline.virtual_stages if stages > 1 else 1
    forward, backward = _NOTHING, _NOTHING
    for stack, layer in work.layers.items():
        ahead, back = clock.layer(layer)
        forward, backward = forward + ahead * work.slots[stack], backward + back * work.slots[stack]
    ahead, back = clock.head(work.head)
    slowest_forward, slowest_backward = forward + ahead * work.heads, backward + back * work.heads
    once = (slowest_forward + slowest_backward) * microbatches
    parts = {name: once.parts.get(name, 0.0) for name in PARTS}
    # In lockstep, all stages take the time of the slowest one at each tick, those that wait among them.
    waiting = once.seconds / microbatches if clock.software.pipeline == "lockstep" else (forward + backward).seconds
    parts["bubble"] = (stages - 1) / chunks * waiting
    if stages > 1:
        parts["pipeline"] += 2 * clock.hop() * (microbatches * chunks + stages - 1)
    parts["data"] += clock.replicas(work.parameters, slowest_backward.seconds)
    parts["optimizer"] = clock.optimizer(work.state_bytes)
    parts["launch"] += constants.step_launch_s
    return StepTime(
        parts=parts,
        forward_s=slowest_forward.seconds / chunks,
        backward_s=slowest_backward.seconds / chunks,
        bubble_fraction=(stages - 1) / chunks / microbatches,
        hardware_flops=work.hardware_flops,
    )
