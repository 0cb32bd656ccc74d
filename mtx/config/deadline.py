"""What `Train.stop_before` may say: seconds, a duration, or a time of day and date.

Decides the forms. What time it is, and what follows from it, is `mtx.health.deadline`.

Invariant: a text that is taken means one thing only.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from datetime import datetime

from mtx.config import schema
from mtx.config.wording import Show

_UNITS = re.compile(
    r"(?:(?P<days>\d+(?:\.\d+)?)d)?(?:(?P<hours>\d+(?:\.\d+)?)h)?(?:(?P<minutes>\d+(?:\.\d+)?)m)?"
    r"(?:(?P<seconds>\d+(?:\.\d+)?)s)?"
)
_CLOCK = re.compile(r"(?:(?P<days>\d+)-)?(?P<hours>\d+):(?P<minutes>[0-5]\d):(?P<seconds>[0-5]\d)")  # as Slurm's --time
_SECONDS = {"days": 86400, "hours": 3600, "minutes": 60, "seconds": 1}


def parse_stop_before(value: float | str) -> float | datetime:
    """What `Train.stop_before` means.

    Args:
        value: Seconds; a duration like `11h50m`, `90s`, `01:30:00` or `2-00:00:00`; or a time like
            `2026-11-23T18:00:00`, local where it names no zone.

    Returns:
        Seconds since the start of the process, or a time with its zone.

    Raises:
        ValueError: It is none of these.
    """
    if not isinstance(value, str):
        return float(value)
    match = _CLOCK.fullmatch(value) or _UNITS.fullmatch(value)
    if match and any(match.groups()):
        return sum(float(number or 0) * _SECONDS[unit] for unit, number in match.groupdict().items())
    try:
        if "T" in value or " " in value:  # a date alone could be its beginning or its end
            return datetime.fromisoformat(value).astimezone()
    except ValueError:
        pass
    raise ValueError(
        "no wall-clock limit; seconds (42600), a duration ('11h50m', '90s', '01:30:00') or a time "
        "('2026-11-23T18:00:00', local where it names no zone such as +01:00) are"
    )


def check_stop_before(run: schema.Run, show: Show) -> Iterator[str]:
    """What is wrong with `Train.stop_before`."""
    if run.train.stop_before is not None:
        try:
            parse_stop_before(run.train.stop_before)
        except ValueError as error:
            yield f"{show('Train.stop_before')} is {error}"
