"""What was measured on one's own machine, for plans that are made for it: a GPU's figures, constants of the time model.

Decides the file that `mtx study --calibrate` writes and `mtx plan --calibration` reads. One JSON object:

    {"version": 1,
     "machine": {"device_kind": ..., "num_devices": ..., "simulated": ..., ...},     where and when it was measured
     "gpu": {fields of mtx.planning.hardware.Gpu} | null,                            null: the table's own row
     "constants": {fields of mtx.planning.constants.Constants},
     "points": [{"name": ..., "step_seconds": ..., "plan_before": ..., "plan_after": ...}, ...]}    seconds

Invariant: a calibration is never overwritten.
"""

from __future__ import annotations

import dataclasses
import json
import os
import tempfile
import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mtx.errors import UserError
from mtx.planning.constants import Constants, read_constants
from mtx.planning.hardware import Gpu

VERSION = 1


@dataclass(frozen=True)
class Calibration:
    """A machine as it was measured.

    Attributes:
        gpu: Its devices, where the table has no row of them; None: the row of the table holds.
        constants: Of the time model, fitted there.
        machine: Where and when; JSON values.
        points: What was fitted on; JSON objects.
    """

    gpu: Gpu | None
    constants: Constants
    machine: Mapping[str, Any] = field(default_factory=dict)
    points: Sequence[Mapping[str, Any]] = ()


def refuse_to_overwrite(path: Path) -> None:
    """Raises UserError where a file is there already, or no file could be."""
    if path.exists():
        raise UserError(f"{path} exists already, and a calibration is never overwritten: name another file, or move it")
    if not path.parent.is_dir():
        raise UserError(f"{path}: there is no folder {path.parent}; make it first")


def write_calibration(path: Path, calibration: Calibration) -> None:
    """Writes a calibration that is whole or not there.

    Raises:
        UserError: The file exists, or cannot be written.
    """
    refuse_to_overwrite(path)
    document = {
        "version": VERSION,
        "machine": dict(calibration.machine),
        "gpu": None if calibration.gpu is None else dataclasses.asdict(calibration.gpu),
        "constants": dataclasses.asdict(calibration.constants),
        "points": [dict(point) for point in calibration.points],
    }
    text = json.dumps(document, indent=1, allow_nan=False) + "\n"
    try:
        with tempfile.NamedTemporaryFile(
            "w", dir=path.parent, prefix=path.name, delete=False, encoding="utf-8"
        ) as file:
            file.write(text)
        try:
            os.link(file.name, path)  # fails where somebody else was faster
        finally:
            os.unlink(file.name)
    except FileExistsError:
        refuse_to_overwrite(path)
    except OSError as error:
        raise UserError(f"{path} cannot be written: {error.strerror}") from None


def read_calibration(path: Path) -> Calibration:
    """Reads what `write_calibration` wrote.

    Raises:
        UserError: It is no such file, or of another version.
    """
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}; `mtx study STUDY.gin --calibrate FILE` writes one") from None
    except ValueError as error:
        raise UserError(f"{path} is no calibration: {error}") from None
    if not isinstance(document, dict) or document.get("version") != VERSION:
        found = document.get("version") if isinstance(document, dict) else None
        raise UserError(f"{path} is no calibration of version {VERSION} (it says {found!r}): measure anew")
    constants, gpu = document.get("constants"), document.get("gpu")
    machine, points = document.get("machine", {}), document.get("points", [])
    if not isinstance(constants, dict) or not isinstance(machine, dict) or not isinstance(points, list):
        raise UserError(f"{path} is no calibration: 'constants' and 'machine' are objects, 'points' is a list")
    try:
        return Calibration(None if gpu is None else _read_gpu(gpu), read_constants(constants), machine, tuple(points))
    except UserError as error:
        raise UserError(f"{path}: {error}") from None


def _read_gpu(values: Any) -> Gpu:
    fields = {f.name: f for f in dataclasses.fields(Gpu)}
    if not isinstance(values, dict) or values.keys() - fields.keys():
        unknown = ", ".join(sorted(values.keys() - fields.keys())) if isinstance(values, dict) else repr(values)
        raise UserError(f"'gpu' is no object of {', '.join(fields)}: {unknown}")
    required = {
        name for name, f in fields.items() if f.default is f.default_factory is dataclasses.MISSING
    }  # no default of either kind
    if missing := required - values.keys():
        raise UserError(f"'gpu' lacks {', '.join(sorted(missing))}: measure anew")
    hints = typing.get_type_hints(Gpu)
    for name, value in values.items():
        if not _fits(value, hints[name]):
            raise UserError(f"'gpu': {name} = {value!r} is not {_WORDS.get(hints[name], 'a number of 0 or more')}")
    return Gpu(**values)


_WORDS = {str: "text", Mapping[str, float]: "an object of numbers"}


def _fits(value: Any, hint: Any) -> bool:
    if hint is str:
        return isinstance(value, str)
    if hint == Mapping[str, float]:
        return isinstance(value, dict) and all(_fits(item, float) for item in value.values())
    if value is None:
        return type(None) in typing.get_args(hint)
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value < float("inf")
