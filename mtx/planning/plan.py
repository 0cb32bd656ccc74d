"""The plan of a run: what it takes, in every number that the terminal, the JSON and the page show.

Decides the accounting: which FLOPs over which peak, what a fit is, days and energy. Memory and time are estimated in
`mtx.planning.memory` and `mtx.planning.step_time`.

Invariant: every number that is shown anywhere comes from one `Plan`.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from mtx.config import schema
from mtx.config.axes import MESH_AXES
from mtx.planning.case import Case, declare
from mtx.planning.constants import SHIPPED, Constants
from mtx.planning.flops import count_matmul_parameters, model_flops_per_token
from mtx.planning.hardware import Gpu
from mtx.planning.memory import Memory, estimate_memory
from mtx.planning.sensitivity import Change, vary
from mtx.planning.step_time import StepTime, estimate_time
from mtx.planning.timetable import Timetable, make_timetable

USABLE = 0.98
"""Of a card's nominal memory: the driver keeps 1 %, and the pool of JAX's allocator (`mtx.mesh.POOL_SHARE`) leaves the
plan's communication and overhead a little less room than they would need at 99 %."""

USABLE_BY_OTHERS = 0.80
"""The same for software whose memory is estimated from published runs: one of them ran out of memory where the estimate
says 81 %, for reasons that its row does not tell."""

GROUPS: Mapping[str, tuple[str, ...]] = {
    "parameters": ("parameters", "compute_weights"),
    "gradients": ("gradients",),
    "optimizer": ("optimizer",),
    "activations": ("activations", "logits"),
    "other": ("pipeline", "communication", "overhead"),
}
"""Five groups of `mtx.planning.memory.PARTS`."""

DAY_S, HOUR_S = 86400.0, 3600.0


@functools.cache
def _held_out_errors() -> dict[str, dict[str, Any]]:
    """By what was kept from the fit (`benchmarks/fit_planner.py`)."""
    return dict(json.loads(SHIPPED.read_text())["errors"]["held_out"])


def usable_bytes(gpu: Gpu, software: str = "mtx") -> int:
    """Memory of a GPU up to which an estimate is called fitting."""
    return int((USABLE if software == "mtx" else USABLE_BY_OTHERS) * gpu.memory_bytes)


@dataclass(frozen=True, kw_only=True)
class Plan:
    """A run on a cluster: estimates for one step, and what follows from them.

    Attributes:
        case: The run and the machines.
        memory: Of the GPU that holds most.
        step: Time of a step of the full batch.
        parameters: All that are stored once.
        active_parameters: Those that a token meets: of routed experts its own only.
        matmul_parameters: Those that a token is multiplied with (`mtx.planning.flops`).
        flops_per_token: Model FLOPs of training, by how attention counts: 'full', 'causal'.
        timetable: Of the whole run.
        steps: Of the whole run; None where neither the config nor the caller says how long it is.
        price: Of a GPU for an hour; None: no costs.
        sensitivity: The step with properties of the machines changed.
        calibrated: Whether the constants come from measurements on the user's own machine.
    """

    case: Case
    memory: Memory
    step: StepTime
    parameters: int
    active_parameters: int
    matmul_parameters: int
    flops_per_token: Mapping[str, float]
    timetable: Timetable
    steps: int | None
    price: float | None
    sensitivity: tuple[Change, ...]
    calibrated: bool

    @property
    def num_gpus(self) -> int:
        return self.case.cluster.num_gpus

    @functools.cached_property
    def memory_groups(self) -> dict[str, int]:
        """Bytes by GROUPS; they sum to `memory.total`."""
        return {group: sum(self.memory.parts[part] for part in parts) for group, parts in GROUPS.items()}

    @property
    def excess_bytes(self) -> int:
        """By how much the memory is exceeded; negative: what stays free."""
        return self.memory.total - usable_bytes(self.case.cluster.gpu, self.case.software)

    @property
    def fits(self) -> bool:
        return self.excess_bytes <= 0

    @property
    def step_seconds(self) -> float:
        return self.step.seconds

    @property
    def tokens_per_second(self) -> float:
        """Of all GPUs together, with the full batch."""
        return self.case.tokens_per_step / self.step.seconds

    @property
    def peak_flops(self) -> float | None:
        """Of a GPU in the format of the matrix products; None where the table has none to compare with."""
        return self.case.cluster.gpu.peak_flops(self.case.run.precision.compute)

    def model_flops_per_gpu(self, attention: str) -> float:
        """Model FLOP/s of a GPU; attention 'full' or 'causal'."""
        return self.flops_per_token[attention] * self.tokens_per_second / self.num_gpus

    @property
    def hardware_flops_per_gpu(self) -> float:
        """FLOP/s of a GPU, recomputation and all else that the program does included."""
        return self.step.hardware_flops / self.step.seconds

    def _utilisation(self, flops: float) -> float | None:
        return None if self.peak_flops is None else flops / self.peak_flops

    @property
    def mfu_model_full(self) -> float | None:
        return self._utilisation(self.model_flops_per_gpu("full"))

    @property
    def mfu_model_causal(self) -> float | None:
        return self._utilisation(self.model_flops_per_gpu("causal"))

    @property
    def hfu(self) -> float | None:
        return self._utilisation(self.hardware_flops_per_gpu)

    @property
    def tokens(self) -> int | None:
        """Of the whole run: those of whole steps."""
        return None if self.steps is None else self.timetable.tokens_of(self.steps)

    @property
    def run_seconds(self) -> float | None:
        """Of the whole run, its ramp included; nothing but steps."""
        return None if self.steps is None else self.timetable.seconds(self.steps)

    @property
    def days(self) -> float | None:
        return None if self.run_seconds is None else self.run_seconds / DAY_S

    @property
    def gpu_hours(self) -> float | None:
        return None if self.run_seconds is None else self.run_seconds / HOUR_S * self.num_gpus

    @property
    def energy_kwh(self) -> float | None:
        """GPUs at their full board power all the time: an upper bound for them; hosts, network and cooling not in."""
        watts = self.case.cluster.gpu.watts
        return None if self.gpu_hours is None or watts is None else self.gpu_hours * watts / 1e3

    @property
    def cost(self) -> float | None:
        """In the currency of the price."""
        return None if self.gpu_hours is None or self.price is None else self.gpu_hours * self.price

    @property
    def expected_error(self) -> dict[str, Any] | None:
        """Of the step's time, on published runs in 16 bits that were kept from the fit of the shipped constants.

        For `mtx`, of which none was published, runs of software that the fit had not seen; else models that it had not.
        Keys rows, median, percentile_90 (relative). None: the constants are others.
        """
        return None if self.calibrated else _held_out_errors()["population" if self.case.software == "mtx" else "model"]

    @property
    def trust(self) -> str:
        """What is known about how right the times are."""
        error = self.expected_error
        if error is None:
            return "The constants of the time model were fitted on measurements of your own machine."
        ours = self.case.software == "mtx"
        unseen = f"{error['rows']} runs of {'software' if ours else 'models'} that the fit had not seen"
        said = (
            f"The constants of the time model were fitted on published runs of other software; on {unseen} the error "
            f"has the median {error['median']:.1%} and the 90th percentile {error['percentile_90']:.1%}."
        )
        return (
            f"{said} mtx itself has not been timed on GPUs: `mtx study --calibrate` measures yours." if ours else said
        )

    def tokens_within(self, days: float) -> int:
        """Tokens that are trained on after so many days."""
        return self.timetable.tokens_of(self.timetable.steps_within(days * DAY_S))

    def as_json(self) -> dict[str, Any]:
        """The answer of `mtx plan --json`; null: not known."""
        run, cluster = self.case.run, self.case.cluster
        return {
            "gpu": cluster.gpu.name,
            "gpus": self.num_gpus,
            "software": self.case.software,
            "mesh": self.case.sizes,
            "global_batch_size": run.train.global_batch_size,
            "microbatch_size": self.case.microbatch_size,
            "microbatches": self.case.num_microbatches,
            "parameters": self.parameters,
            "active_parameters": self.active_parameters,
            "matmul_parameters": self.matmul_parameters,
            "model_flops_per_token_full": self.flops_per_token["full"],
            "model_flops_per_token_causal": self.flops_per_token["causal"],
            "hardware_flops_per_step_and_gpu": self.step.hardware_flops,
            "memory_per_gpu_bytes": {**self.memory_groups, "total": self.memory.total},
            "memory_parts_bytes": dict(self.memory.parts),
            "gpu_memory_bytes": cluster.gpu.memory_bytes,
            "usable_memory_bytes": usable_bytes(cluster.gpu, self.case.software),
            "fits": self.fits,
            "excess_bytes": self.excess_bytes,
            "step_seconds": self.step_seconds,
            "step_breakdown_seconds": dict(self.step.parts),
            "bubble_fraction": self.step.bubble_fraction,
            "tokens_per_second": self.tokens_per_second,
            "tokens_per_second_per_gpu": self.tokens_per_second / self.num_gpus,
            "model_tflops_per_gpu": self.model_flops_per_gpu("full") / 1e12,
            "model_tflops_per_gpu_causal": self.model_flops_per_gpu("causal") / 1e12,
            "hardware_tflops_per_gpu": self.hardware_flops_per_gpu / 1e12,
            "mfu": self.mfu_model_full,
            "mfu_model_full": self.mfu_model_full,
            "mfu_model_causal": self.mfu_model_causal,
            "hfu": self.hfu,
            "peak_tflops": None if self.peak_flops is None else self.peak_flops / 1e12,
            "tokens": self.tokens,
            "steps": self.steps,
            "days": self.days,
            "gpu_hours": self.gpu_hours,
            "energy_kwh": self.energy_kwh,
            "gpu_hour_price": self.price,
            "cost": self.cost,
            "sensitivity": [dataclasses.asdict(change) for change in self.sensitivity],
            "calibrated": self.calibrated,
            "expected_error": self.expected_error,
            "trust": self.trust,
        }


def to_gib(size_bytes: float) -> str:
    """'75.2 GiB': cards are sold in these, though their vendors write GB."""
    return f"{size_bytes / 2**30:.1f} GiB"


def describe_mesh(sizes: Mapping[str, int]) -> str:
    """'pipe 35, data 8, tensor 8'."""
    return ", ".join(f"{axis} {sizes[axis]}" for axis in MESH_AXES if sizes[axis] > 1) or "one GPU"


def count_parameters(run: schema.Run) -> tuple[int, int]:
    """All that are stored once, and those that a token meets: of routed experts its own only."""
    model = run.model
    sizes = [(math.prod(p.shape), "experts" in p.axes) for p in declare(run).parameters]
    active = (size * model.experts_per_token // model.num_experts if routed else size for size, routed in sizes)
    return sum(size for size, _ in sizes), sum(active)


def flops_per_token(case: Case) -> dict[str, float]:
    """Model FLOPs of training, by how attention counts: 'full', 'causal'."""
    run, whole = case.run, case.declared.definition.whole
    return {
        attention: model_flops_per_token(run.model, whole.params, whole.axes, run.train.seq_len, attention)
        for attention in ("full", "causal")
    }


def make_plan(
    case: Case,
    constants: Constants | None = None,
    *,
    tokens: int | None = None,
    price: float | None = None,
    calibrated: bool = False,
) -> Plan:
    """Plans a run.

    Args:
        case: The run and the machines.
        constants: Of the time model; None: those that are shipped.
        tokens: To train on; None: as the config says.
        price: Of a GPU for an hour; None: as the config says.
        calibrated: Whether the constants are of the user's own machine.
    """
    model, train, whole = case.run.model, case.run.train, case.declared.definition.whole

    def step_seconds(other: Case) -> float:
        return estimate_time(other, constants).seconds

    total, active = count_parameters(case.run)
    step = estimate_time(case, constants)
    timetable = make_timetable(case, step_seconds)
    tokens = train.tokens if tokens is None else tokens
    return Plan(
        case=case,
        memory=estimate_memory(case),
        step=step,
        parameters=total,
        active_parameters=active,
        matmul_parameters=count_matmul_parameters(model, whole.params, whole.axes),
        flops_per_token=flops_per_token(case),
        timetable=timetable,
        steps=train.steps if tokens is None else timetable.steps_to(tokens),
        price=case.run.cluster.gpu_hour_price if price is None else price,
        sensitivity=vary(case, step.seconds, step_seconds),
        calibrated=calibrated,
    )
