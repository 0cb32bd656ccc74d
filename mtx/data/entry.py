"""An entry of the data course: the data settings of a run from some step on.

Decides what an entry holds, how it is written as JSON and what a well-formed one is. Does not decide which samples
follow from it (`course.py`), nor where entries are kept (`ledger.py`).

Invariant: stores are known by their content. Two entries with the same data draw the same samples, wherever the stores
lie.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any, Self, get_args

from mtx.config import schema
from mtx.config.stages import parse_begin
from mtx.data.ramp import BatchSizes
from mtx.data.samples import Packing, Sources
from mtx.errors import UserError

Blended = Mapping[str, float]  # path of a store -> weight


@dataclass(frozen=True)
class Content:
    """A store as a run reads it. `num_samples` follows from the seq_len and the packing of the entry."""

    digest: str
    num_samples: int


@dataclass(frozen=True, kw_only=True)
class Entry:
    """Holds from batch `step` (counted from 0) on, and supersedes the entries before it with that step or a later one.

    Attributes:
        train, stages: As in `Data`.
        stores: Every path in `train` and `stages`, in their order.
        skipped_samples: Samples that the blend in force at `step` passes over there.
        cause: Why, where samples are skipped.
    """

    step: int
    seed: int
    seq_len: int
    packing: Packing
    global_batch_size: int
    batch_ramp: schema.BatchRamp | None
    train: Blended
    stages: Mapping[str, Blended]
    stores: Mapping[str, Content]
    skipped_samples: int = 0
    cause: str | None = None

    @classmethod
    def of(cls, run: schema.Run, sources: Sources, step: int) -> Self:
        """The data settings of a run, from a step on.

        Raises:
            UserError: A store is missing, damaged or too short, or a blend has the same content twice.
        """
        data, train = run.data, run.train
        stores: dict[str, Content] = {}
        for key, blend in {"Data.train": data.train, **data.stages}.items():
            known: dict[str, str] = {}
            for path in blend:
                store = sources.open(path)
                if (other := known.setdefault(store.digest, path)) != path:
                    raise UserError(
                        f"{key}: {other} and {path} hold the same: keep one of them, with the sum of the weights"
                    )
                stores[path] = Content(store.digest, len(sources.samples(store, train.seq_len, data.packing)))
        return cls(
            step=step,
            seed=train.seed,
            seq_len=train.seq_len,
            packing=data.packing,
            global_batch_size=train.global_batch_size,
            batch_ramp=train.batch_ramp,
            train=data.train,
            stages=data.stages,
            stores=stores,
        )

    @property
    def order(self) -> tuple[int, int, Packing]:
        """What the order of a source's samples follows from, besides its content."""
        return self.seed, self.seq_len, self.packing

    def same_data(self, other: Entry) -> bool:
        """Whether both draw the same samples. Where the stores lie, the step, and what is skipped do not count."""
        return self._data() == other._data()

    def _data(self) -> tuple[Any, ...]:
        def by_content(blend: Blended) -> dict[str, float]:
            return {self.stores[path].digest: weight for path, weight in blend.items()}

        stages = [(parse_begin(key), by_content(blend)) for key, blend in self.stages.items()]
        return *self.order, self.global_batch_size, self.batch_ramp, by_content(self.train), stages

    def blends(self, sizes: BatchSizes) -> Iterator[tuple[int, Blended]]:
        """The blends in force from `step` on, each with the step that it begins with: the last stage that has begun.

        Args:
            sizes: From `step` on.
        """
        begun = [(self.step, self.train)]
        for key, blend in self.stages.items():
            first = max(self.step, find_first_step(key, sizes))
            begun = [*((step, earlier) for step, earlier in begun if step < first), (first, blend)]
        yield from begun

    def to_json(self) -> dict[str, Any]:
        """What `from_json` reads."""
        return asdict(self)

    @classmethod
    def from_json(cls, record: Mapping[str, Any]) -> Self:
        """An entry from JSON.

        Raises:
            ValueError: A field is missing, unknown, or not what it must be.
        """
        names = {item.name for item in fields(cls)}
        if record.keys() != names:
            raise ValueError(f"the fields {', '.join(sorted(record.keys() ^ names))} are missing or unknown")
        for name, holds in _RULES.items():
            if not holds(record[name]):
                raise ValueError(f"{name} = {record[name]!r} cannot be")
        paths = {path for blend in (record["train"], *record["stages"].values()) for path in blend}
        if paths != record["stores"].keys():
            raise ValueError("stores are not those of train and stages")
        ramp, stores = record["batch_ramp"], record["stores"]
        built = {
            "batch_ramp": None if ramp is None else schema.BatchRamp(**ramp),
            "stores": {path: Content(**content) for path, content in stores.items()},
        }
        return cls(**{**record, **built})


def find_first_step(key: str, sizes: BatchSizes) -> int:
    """The first step of a stage by its key; where it is before the first step of `sizes`, some step before that one."""
    amount, unit = parse_begin(key)
    return amount if unit == "steps" else sizes.step_at_tokens(amount)


def _is_count(value: Any, low: int = 0) -> bool:
    return type(value) is int and value >= low


def _is_size(value: Any) -> bool:
    return _is_count(value, 1)


def _has(value: Any, **rules: Any) -> bool:
    return isinstance(value, dict) and value.keys() == rules.keys() and all(rules[key](value[key]) for key in rules)


def _is_blend(value: Any) -> bool:
    return (
        isinstance(value, dict)
        and bool(value)
        and all(type(weight) in (int, float) and 0 < weight < math.inf for weight in value.values())
    )


def _are_stages(value: Any) -> bool:
    if not isinstance(value, dict) or not all(map(_is_blend, value.values())):
        return False
    for key in value:
        parse_begin(key)
    return True


def _are_stores(value: Any) -> bool:
    rules = {"digest": lambda digest: isinstance(digest, str), "num_samples": _is_size}
    return isinstance(value, dict) and all(_has(content, **rules) for content in value.values())


_RULES = {
    "step": _is_count,
    "seed": _is_count,
    "seq_len": _is_size,
    "packing": lambda value: value in get_args(Packing),
    "global_batch_size": _is_size,
    "batch_ramp": lambda value: value is None or _has(value, start=_is_size, increment=_is_size, tokens=_is_size),
    "train": _is_blend,
    "stages": _are_stages,
    "stores": _are_stores,
    "skipped_samples": _is_count,
    "cause": lambda value: value is None or isinstance(value, str),
}
