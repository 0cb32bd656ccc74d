"""The constants of the time model: few, physical, shared by all GPUs and all software; and one quality per software.

Decides their names, meaning and home. The values that are shipped stand in `fitted.json`, which
`benchmarks/fit_planner.py` writes from published runs, with the errors that they leave.

Invariant: a constant that exists is read by the time model.
"""

from __future__ import annotations

import dataclasses
import functools
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from mtx.errors import UserError

SHIPPED = Path(__file__).with_name("fitted.json")
TYPICAL = "typical"
"""In the place of a name: software without a quality of its own."""


@dataclass(frozen=True, kw_only=True)
class Constants:
    """All of the model. Efficiencies are fractions of what `mtx.planning.hardware` says, above 0 and at most 1."""

    matmul_efficiency: float = 0.9
    """Of the fastest measured product: what a large product inside a training step reaches."""
    float8_efficiency: float = 0.7
    """The same of products of 8-bit numbers, with all that scaling and casting them takes."""
    matmul_fill: float = 256.0
    """Summed length at which a product spends half its time on filling and draining its pipes."""
    attention_efficiency: float = 0.65
    """Of the fastest measured product: what a fused attention kernel reaches that is written for its GPU."""
    first_flash: float = 0.65
    """Of that, what the first fused kernels reached."""
    older_instructions: float = 0.62
    """Of that, what kernels written for Ampere reach on later GPUs, whose new instructions they do not use."""
    memory_efficiency: float = 0.8
    """Of the memory's bandwidth."""
    unfused_traffic: float = 2.0
    """Bytes moved by elementwise operations one by one, relative to fused ones."""
    nvlink_efficiency: float = 0.75
    """Of NVLink's bandwidth, in collectives."""
    network_efficiency: float = 0.75
    """Of the network adapter's bandwidth, in collectives."""
    nvlink_latency_s: float = 3e-6
    """Of each hop of a collective within a domain."""
    network_latency_s: float = 1e-5
    """Of each hop between domains."""
    overlap: float = 0.8
    """Of the exchange of weights and gradients, where software overlaps it: what can hide under computation."""
    tensor_overlap: float = 0.5
    """Of the exchange over `tensor`, where software cuts it into pieces that travel under the products."""
    layer_launch_s: float = 2e-5
    """Of each pass through a layer: gaps between its kernels."""
    step_launch_s: float = 5e-3
    """Of each step."""
    quality: Mapping[str, float] = field(default_factory=dict)
    """How fast software computes, relative to the model with all qualities 1: by 'NAME@GENERATION' of GPUs, or by
    NAME for all of them; TYPICAL@GENERATION and TYPICAL for all else."""

    def quality_of(self, software: str, generation: str) -> float:
        """Of a name of `mtx.planning.software` on a generation of `mtx.planning.hardware`.

        On a generation that it was not fitted on, software keeps its distance from what is typical.
        """
        exact = self.quality.get(f"{software}@{generation}", self.quality.get(software))
        if exact is not None:
            return exact
        typical = self.quality.get(f"{TYPICAL}@{generation}", self.quality.get(TYPICAL, 1.0))
        elsewhere = [
            value / self.quality.get(f"{TYPICAL}@{name.partition('@')[2]}", self.quality.get(TYPICAL, 1.0))
            for name, value in self.quality.items()
            if name.partition("@")[0] == software
        ]
        return typical * (sum(elsewhere) / len(elsewhere) if elsewhere else 1.0)


def read_constants(values: Mapping[str, object]) -> Constants:
    """Constants from the fields of a JSON object.

    Raises:
        UserError: A field is unknown or no number.
    """
    names = {f.name for f in dataclasses.fields(Constants)}
    qualities = values.get("quality", {})
    numbers = {name: value for name, value in values.items() if name != "quality"}
    wrong = sorted(set(values) - names)
    if wrong:
        raise UserError(
            f"constants of the time model: unknown {', '.join(wrong)}; there are {', '.join(sorted(names))}"
        )
    if not isinstance(qualities, Mapping):
        raise UserError(f"constants of the time model: quality = {qualities!r} is no object of software to number")
    for name, value in [*numbers.items(), *qualities.items()]:
        if not isinstance(value, int | float) or isinstance(value, bool) or not value >= 0:
            raise UserError(f"constants of the time model: {name} = {value!r} is no number of 0 or more")
    return Constants(**values)  # type: ignore[arg-type]


def load_constants(path: Path | None = None) -> Constants:
    """The constants of a file that `benchmarks/fit_planner.py --write` wrote; None: those that are shipped.

    Raises:
        UserError: The file is no such file.
    """
    return _shipped() if path is None else _load(path)


@functools.cache
def _shipped() -> Constants:
    return _load(SHIPPED)


def _load(path: Path) -> Constants:
    try:
        return read_constants(json.loads(path.read_text())["constants"])
    except (OSError, KeyError, TypeError, ValueError) as error:
        raise UserError(f"{path}: not a file of constants of the time model ({error})") from error
