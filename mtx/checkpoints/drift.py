"""What a resume with another config would change, and whether that was agreed to.

Decides the class of each changed field at this resume: the schema's, except where the values say more. A schedule, and
the run's length, count by the learning rates that they give to the steps to come.

Invariant: a change that alters the numbers or the data beyond rounding is never taken for free, and one that the
checkpoint does not fit is never accepted. Reads and writes no file.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property

from mtx.config.components import classes, settings
from mtx.config.render import ABSENT, Difference, Origin, compare, show, values
from mtx.config.schema import FREE, IMPOSSIBLE, MATH, Optimizer, Run, Schedule
from mtx.config.statements import nearest
from mtx.data.ramp import BatchSizes
from mtx.errors import UserError
from mtx.optim.rates import describe_end, have_same_rates, is_bent_by_length

LENGTH = ("Train.steps", "Train.tokens")

SAMPLES = 4096
"""Updates at which learning rates are compared, where there are more: a schedule has a few pieces of many updates."""


@dataclass(frozen=True, kw_only=True)
class Drift:
    """What changes at a resume: a line `Key: old -> new` per field, with its class where it is not free.

    Attributes:
        free: Nothing beyond rounding.
        accepted: The math or the data, agreed to now or at an earlier attempt.
        needed: The math or the data, not agreed to.
        impossible: The checkpoint does not fit.
        keys: To be accepted for `needed`.
    """

    free: tuple[str, ...] = ()
    accepted: tuple[str, ...] = ()
    needed: tuple[str, ...] = ()
    impossible: tuple[str, ...] = ()
    keys: tuple[str, ...] = ()


def check_keys(keys: Iterable[str]) -> None:
    """Raises UserError where one of the keys that are to be accepted is no field of a config."""
    known = {setting.key for cls in classes().values() for setting in settings(cls).values()}
    for key in keys:
        if key not in known:
            raise UserError(f"--accept {key}: no such field; {nearest(key, sorted(known))}")


def compare_for_resume(
    saved: Run,
    recorded: Run,
    new: Run,
    accepted: frozenset[str] = frozenset(),
    step: int = 0,
    *,
    provenance: Mapping[str, Origin] | None = None,
) -> Drift:
    """Compares the config that a run is to go on with to that of its checkpoint.

    Args:
        saved: The checkpoint's.
        recorded: The run directory's. A change that it has already was agreed to by an earlier attempt.
        new: The one to go on with.
        accepted: Keys (`Train.seed`) whose change is agreed to. That of a field covers the fields of the components
            that come or go with it.
        step: Updates done.
        provenance: Where the values of `new` come from.
    """
    resume = _Resume(saved, new, step)
    settled = {setting.key: show(value) for setting, value in values(recorded)}
    lines: dict[str, list[str]] = {"free": [], "accepted": [], "needed": [], "impossible": []}
    needed: list[Difference] = []
    for change in resume.changes:
        key, root = change.setting.key, resume.find_root(change)
        kind = resume.classify(root)
        line = f"{key}: {show(change.old)} -> {show(change.new)}"
        if kind == FREE:
            lines["free"].append(line)
            continue
        place = f", set at {provenance[key].place}" if provenance and key in provenance else ""
        line += f" ({kind}{place})"
        if kind == IMPOSSIBLE:
            lines["impossible"].append(line)
        elif {key, root.setting.key} & accepted or settled.get(key, show(ABSENT)) == show(change.new):
            lines["accepted"].append(line)
        else:
            lines["needed"].append(line + resume.advise(key))
            needed.append(change)
    keys = dict.fromkeys(
        (root if (root := resume.find_root(change)) in needed else change).setting.key for change in needed
    )
    return Drift(keys=tuple(keys), **{name: tuple(found) for name, found in lines.items()})


class _Resume:
    """The differences of two runs, and what they mean for the updates after a step."""

    def __init__(self, saved: Run, new: Run, step: int) -> None:
        self.saved, self.new, self.step = saved, new, step
        self.changes = compare(saved, new)

    def find_root(self, change: Difference) -> Difference:
        """The change that brought or took the component that this field belongs to; the change itself if it is none."""
        if ABSENT in (change.old, change.new):
            for other in self.changes:
                if change.setting.owner in (type(other.old).__name__, type(other.new).__name__):
                    return self.find_root(other)
        return change

    def classify(self, change: Difference) -> str:
        """The class of a change here."""
        setting = change.setting
        if setting.key in LENGTH:
            return MATH if self._length_bends else FREE
        owner = classes()[setting.owner]
        if issubclass(owner, Schedule) or (issubclass(owner, Optimizer) and setting.name == "learning_rate"):
            return MATH if self._rates_differ else FREE
        if setting.key == "Model.expert_bias_rate" and 0 in (change.old, change.new):
            return IMPOSSIBLE  # at 0 there are no biases
        if setting.key == "Model.max_seq_len" and "learned" not in (self.saved.model.position, self.new.model.position):
            return FREE  # a bound alone
        return setting.drift

    def advise(self, key: str) -> str:
        """How the length of the run can change and the learning rates stay."""
        end = describe_end(self.saved)
        if key not in LENGTH or end is None or describe_end(self.new) is None:
            return ""
        return f"; the schedule ends with the run: set {end} to keep it"

    @cached_property
    def _updates(self) -> list[tuple[int, int]]:
        """Updates of the new run after the step: all, or SAMPLES of them, the first and the last included."""
        train = self.new.train
        sizes = BatchSizes(global_batch_size=train.global_batch_size, seq_len=train.seq_len, ramp=train.batch_ramp)
        last = sizes.step_at_tokens(train.tokens or 0) if train.steps is None else train.steps
        ahead = range(self.step + 1, last + 1)
        count = min(len(ahead), SAMPLES)
        sampled = (ahead[i * (len(ahead) - 1) // max(1, count - 1)] for i in range(count))
        return [(update, sizes.tokens(update)) for update in sampled]

    @cached_property
    def _rates_differ(self) -> bool:
        return not have_same_rates(self.saved, self.new, self._updates)

    @cached_property
    def _length_bends(self) -> bool:
        return self._rates_differ and is_bent_by_length(self.saved, self.new, self._updates)
