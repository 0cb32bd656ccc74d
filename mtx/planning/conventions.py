"""From a published figure to seconds per step: how the sources of published runs count FLOPs.

Decides which figure of a row is converted and by which convention. A time is taken first, then a rate of tokens, which
needs no convention either, then FLOP/s, of the kind that the row or its source states.

Invariant: nothing is converted by a convention that the source does not state.

Source: arXiv 2104.04473 (appendix) and 2205.05198 (section 5).
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping

from mtx.planning.case import Case
from mtx.planning.flops import model_flops_per_token

_KINDS = (("nemo", "model"), ("mcore", "model"), ("mosaic", "model"), ("titan", "model"), ("korthikanti", "model"))
"""Beginning of an id -> how its source counts FLOPs, where the row itself does not say it."""


def find_noted(notes: str, key: str, unit: float = 1.0) -> float | None:
    """The number after `key=` or `key~` among a row's notes, times `unit`."""
    found = re.search(rf"\b{key}\s*[=~]\s*([0-9.]*[0-9])", notes)
    return float(found[1]) * unit if found else None


FORMATS = ("bf16", "fp16", "fp8")
"""Of the numbers that are multiplied, in the words of the rows."""


def product_format(precision: str) -> str | None:
    """One of FORMATS, from a row's words for it; None: products of something else, or of two formats."""
    return next((name for name in FORMATS if name in precision and "+" not in precision), None)


def case_to_time(case: Case, precision: str) -> Case | None:
    """A row's case with products in the row's format; None: no GPU of the table has a peak for them.

    A row's case has 16 bits, whatever the row has: that is right for its memory, not for its time.
    """
    found = product_format(precision)
    if found != "fp8":
        return None if found is None else case
    changed = dataclasses.replace(case.run.precision, compute="float8")
    return dataclasses.replace(case, run=dataclasses.replace(case.run, precision=changed))


def hardware_flops(case: Case) -> float:
    """FLOPs of a step as their sources count them with recomputation.

    Full recomputation repeats the forward pass of the layers, not of the head (arXiv 2104.04473, appendix).
    Selective: attention counts twice (arXiv 2205.05198, equation 9), more than the half again that is repeated.
    """
    run, definition = case.run, case.declared.definition
    whole = definition.whole
    model, seq_len = run.model, run.train.seq_len
    per_token = model_flops_per_token(model, whole.params, whole.axes, seq_len)
    attention = 4.0 * seq_len * model.num_heads * model.head_width * model.num_layers
    if run.train.recompute == "full":
        per_token += per_token / 3 - 2.0 * model.vocab_size * model.d_model
    elif run.train.recompute == "selective":
        per_token += 3.0 * attention
    return per_token * case.tokens_per_step


def seconds_per_step(case: Case, row: Mapping[str, str], values: Mapping[str, float]) -> float | None:
    """Of an optimizer step; None where nothing in the row can be converted.

    Args:
        case: The row's.
        row: As published, by column.
        values: Its numbers, by column; those that are not published are absent.
    """
    notes = row["notes"]
    if "columns look swapped" in notes:
        return None  # seconds and TFLOP/s, which are both about 120
    if "sec_per_iter" in values:
        return values["sec_per_iter"]
    for key in ("samples_per_second", "sequences_per_sec"):
        if rate := find_noted(notes, key):
            return case.run.train.global_batch_size / rate
    gpus = case.cluster.num_gpus
    if "tokens_per_s_per_gpu" in values:
        return case.tokens_per_step / (values["tokens_per_s_per_gpu"] * gpus)
    kind = next((kind for start, kind in _KINDS if row["id"].startswith(start)), None)
    if said := re.search(r"flops_kind=(hardware|model)", notes):
        kind = said[1]
    whole = case.declared.definition.whole
    model = case.tokens_per_step * model_flops_per_token(
        case.run.model, whole.params, whole.axes, case.run.train.seq_len
    )
    if "tflops_per_gpu" in values and kind:
        flops = hardware_flops(case) if kind == "hardware" else model
        return flops / (values["tflops_per_gpu"] * 1e12 * gpus)
    if "mfu_pct" in values and kind == "model":
        return model / (values["mfu_pct"] / 100 * values["peak_tflops_dense_bf16"] * 1e12 * gpus)
    return None
