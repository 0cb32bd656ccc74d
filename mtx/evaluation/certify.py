"""The certificate of a run: each layout computed and compared with one device, here or in a process of its own.

Invariant: a layout is ok only if its numbers were computed and compared; whatever else happens to it is a failure.
"""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax

from mtx.config import schema
from mtx.config.axes import MESH_AXES
from mtx.config.layout import check_layout
from mtx.errors import UserError
from mtx.evaluation.agreement import Outcome, compare, find_departure, make_program
from mtx.evaluation.covering import Layout, cover, make_layout
from mtx.evaluation.reduction import place_run, reduce_run


@dataclass(frozen=True, kw_only=True)
class Result:
    """What came of one layout. Numbers are None where they were not computed, or are not finite.

    Attributes:
        mesh: Devices along each mesh axis.
        loss: On this layout, nats per target token.
        loss_error: Relative to one device; of several losses (those of routing) the largest.
        gradient_error: Of the worst parameter (`mtx.evaluation.agreement.compare`).
        worst_parameter: Its name.
        worst_layer: The layer of the worst value in it; None where it is of no layer.
        departs_at: The first place in the network that departs, `embedding or head` or `layer 3`; None: none does.
        departs_parameter: What departs most there.
        failure: Why nothing could be compared; None where it was.
        seconds: How long it took, the compilation included.
        ok: Whether loss and gradients are within the tolerances.
    """

    mesh: dict[str, int]
    loss: float | None = None
    loss_error: float | None = None
    gradient_error: float | None = None
    worst_parameter: str | None = None
    worst_layer: int | None = None
    departs_at: str | None = None
    departs_parameter: str | None = None
    failure: str | None = None
    seconds: float = 0.0
    ok: bool = False


@dataclass(frozen=True)
class Plan:
    """What a certificate is made of.

    Attributes:
        reduced: At reduced size.
        layouts: Those that are compared with it.
        left_out: Layouts of the covering set that cannot be, and why.
    """

    reduced: schema.Run
    layouts: tuple[Layout, ...]
    left_out: dict[str, str]

    @property
    def reference(self) -> schema.Run:
        """The reduced run on one device."""
        return place_run(self.reduced, make_layout({}))

    def place(self, layout: Layout) -> schema.Run:
        """The reduced run on a layout."""
        return place_run(self.reduced, layout)


def plan_certificate(run: schema.Run, wanted: Sequence[Layout], max_devices: int) -> Plan:
    """Chooses the layouts and the reduced run.

    Args:
        wanted: Layouts to try; empty: those that cover the run's own mesh.
        max_devices: That a layout may need.

    Raises:
        UserError: The run's own mesh or a wanted layout does not fit the run, or needs more devices.
    """
    if wanted:
        for layout in wanted:
            check_layout(place_run(run, layout), layout.mesh)
            if layout.num_devices > max_devices:
                raise UserError(
                    f"the layout {layout} needs {layout.num_devices} devices and there are {max_devices}: "
                    f"`--cpu-devices {layout.num_devices}` simulates as many"
                )
        return Plan(reduce_run(run, wanted), tuple(wanted), {})
    check_layout(run, dataclasses.replace(run.mesh, **{a: 1 for a in MESH_AXES if getattr(run.mesh, a) == -1}))
    candidates = cover(run, max_devices)
    draft = Plan(reduce_run(run, candidates), (), {})
    kept, left_out = [], {}
    for layout in candidates:
        try:
            check_layout(draft.place(layout), layout.mesh)
            kept.append(layout)
        except UserError as error:
            left_out[str(layout)] = str(error)
    if not kept:
        reasons = "\n".join(f"{layout}: {reason}" for layout, reason in left_out.items())
        raise UserError(f"no layout to certify on {max_devices} devices; choose with --layout\n{reasons}".rstrip())
    return Plan(reduce_run(run, kept), tuple(kept), left_out)


def certify_here(plan: Plan) -> Iterator[Result]:
    """Compares on the devices of this process, one layout after the other. A hang of theirs hangs this process."""
    expected = compute_reference(plan.reference)
    for layout in plan.layouts:
        begin = time.monotonic()
        result = compare_layout(plan.place(layout), expected)
        yield dataclasses.replace(result, seconds=time.monotonic() - begin)


def compute_reference(run: schema.Run) -> dict[int, Outcome]:
    """For each number of layers that are not set to zero, the outcome of a run on one device."""
    with jax.default_matmul_precision("highest"):  # GPUs shorten float32 to 10 bits otherwise
        program = make_program(run, jax.devices())
        return {num_layers: program(num_layers) for num_layers in range(run.model.num_layers + 1)}


def compare_layout(placed: schema.Run, expected: Mapping[int, Outcome]) -> Result:
    """Computes a reduced run on its layout, on the devices of this process."""
    mesh, model = dataclasses.asdict(placed.mesh), placed.model
    with jax.default_matmul_precision("highest"):
        try:
            program = make_program(placed, jax.devices())
            actual = program(model.num_layers)
        except UserError as error:
            return Result(mesh=mesh, failure=f"refused: {error}")
        difference = compare(model, actual, expected[model.num_layers])
        departure = None if difference.ok else find_departure(model, program, expected)
    place, first = (None, None) if departure is None else departure
    return Result(
        mesh=mesh,
        loss=_finite(actual.losses["loss"]),
        loss_error=_finite(difference.loss_error),
        gradient_error=_finite(difference.gradient_error),
        worst_parameter=difference.parameter,
        worst_layer=difference.layer,
        departs_at=place,
        departs_parameter=None if first is None else first.parameter,
        ok=difference.ok,
    )


def _finite(number: float) -> float | None:
    return number if math.isfinite(number) else None


def as_json(results: Sequence[Result]) -> dict[str, Any]:
    """The certificate as a program reads it."""
    return {"ok": all(result.ok for result in results), "layouts": [dataclasses.asdict(r) for r in results]}
