"""The stages of `Data.stages`: what their keys mean, and which of them a run may not have.

Decides the unit and the amount behind '1000 steps' and '2e9 tokens'. Does not decide at which step a number of tokens
is reached (`mtx.data.course`), nor what the weights do (`mtx.data.blend`).

Invariant: amounts are exact whole numbers, however they are written.
"""

from __future__ import annotations

import decimal
from collections.abc import Iterator, Mapping
from typing import Literal, NamedTuple

from mtx.config import schema
from mtx.config.wording import Show, useless

Unit = Literal["steps", "tokens"]
_UNITS: tuple[Unit, ...] = ("steps", "tokens")


class Begin(NamedTuple):
    """When a stage begins: with the first step that has so many steps, or tokens, or more behind it."""

    amount: int
    unit: Unit


def parse_begin(key: str) -> Begin:
    """'1000 steps', '2e9 tokens' or '2_000_000 tokens' as numbers.

    Raises:
        ValueError: It is none of these.
    """
    number, _, word = key.partition(" ")
    unit = next((unit for unit in _UNITS if unit == word), None)
    try:
        amount = decimal.Decimal(number)
    except decimal.InvalidOperation:
        amount = decimal.Decimal("nan")
    if unit is None or not (amount.is_finite() and 0 < amount < 10**18 and amount == amount.to_integral_value()):
        raise ValueError(f"{key!r} is no beginning of a stage; '1000 steps' and '2e9 tokens' are")
    return Begin(int(amount), unit)


def check_blends(run: schema.Run, show: Show) -> Iterator[str]:
    """What is wrong with `Data.train` and `Data.stages`."""
    yield from _check_weights("Data.train", run.data.train)
    if run.data.stages and not run.data.train:
        yield useless(show, "Data.stages", "without Data.train", "set Data.train = {'STORE': 1.0}")
    earlier: dict[str, Begin] = {}
    for key, blend in run.data.stages.items():
        name = f"Data.stages[{key!r}]"
        if not blend:
            yield f"{name} is empty: name its stores and their weights, as in Data.train, or remove the stage"
        yield from _check_weights(name, blend)
        try:
            begin = parse_begin(key)
        except ValueError as error:
            yield f"Data.stages: {error}"
            continue
        if late := next((other for other, it in earlier.items() if _is_not_before(run, it, begin)), None):
            yield f"{name} does not begin after {late!r}, which stands before it: put the stages in the order of time"
        earlier[key] = begin
        for unit in _UNITS:
            length = getattr(run.train, unit)
            if length is not None and _is_not_before(run, begin, Begin(length, unit)):
                yield (
                    f"{name} has no effect, as the run ends before with {show(f'Train.{unit}')}: raise Train.{unit}, "
                    "or remove the stage"
                )


def _is_not_before(run: schema.Run, one: Begin, other: Begin) -> bool:
    """Whether `one` comes no earlier than `other`; False also where a ramp of the batch size leaves that open."""
    train = run.train
    smallest = train.batch_ramp.start if train.batch_ramp else train.global_batch_size

    def step(begin: Begin, batch_size: int) -> int:
        return begin.amount if begin.unit == "steps" else -(-begin.amount // (batch_size * train.seq_len))

    if one.unit == other.unit and one.amount >= other.amount:
        return True
    return step(one, train.global_batch_size) >= step(other, smallest)


def _check_weights(name: str, blend: Mapping[str, float]) -> Iterator[str]:
    for store, weight in blend.items():
        if weight <= 0:
            yield f"{name}: the weight of {store!r} is {weight} and must be above 0 (or remove the store)"
