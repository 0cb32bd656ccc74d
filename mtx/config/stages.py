"""The stages of `Data.stages`: what their keys mean, and which of them a run may not have.

Decides the unit and the amount behind '1000 steps' and '2e9 tokens'. Does not decide at which step a number of tokens
is reached, which depends on the batch sizes that the run had so far (`mtx.data.course`); so steps and tokens are not
compared here.

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
    known: list[tuple[str, Begin]] = []
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
        for other, earlier in known:
            if earlier.unit == begin.unit and earlier.amount >= begin.amount:
                yield f"{name} does not begin after {other!r}, which stands before it: put the stages in their order"
                break
        known.append((key, begin))
        length = getattr(run.train, begin.unit)
        if length is not None and begin.amount >= length:
            limit = f"Train.{begin.unit}"
            yield f"{name} has no effect, as the run ends before with {show(limit)}: raise {limit}, or remove the stage"


def _check_weights(name: str, blend: Mapping[str, float]) -> Iterator[str]:
    for store, weight in blend.items():
        if weight <= 0:
            yield f"{name}: the weight of {store!r} is {weight} and must be above 0 (or remove the store)"
