"""The scores of every next token for given token ids, to compare a model with another implementation of it."""

from __future__ import annotations

import os
import zipfile
from pathlib import Path

import jax
import numpy as np
from jax.sharding import PartitionSpec as P

from mtx.errors import UserError
from mtx.inference.layout import MATMUL_PRECISION, for_inference
from mtx.nn.param import Params
from mtx.training.forward import Forward, Inputs
from mtx.training.state import Setup

INPUTS = ("input_ids", "attention_mask", "position_ids")
FOREIGN = ("token_type_ids", "decoder_input_ids")
"""Inputs of other architectures: whoever gives them expects something else than a decoder computes."""


def read_inputs(path: Path) -> dict[str, np.ndarray]:
    """The arguments of `compute_logits` that a .npz file holds; its other arrays do not count.

    Raises:
        UserError: It is no such file, lacks `input_ids`, or holds inputs that a decoder does not take.
    """
    try:
        with np.load(path, allow_pickle=False) as file:
            inputs = {name: file[name] for name in INPUTS if name in file}
            foreign = [name for name in FOREIGN if name in file]
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except (ValueError, OSError, EOFError, TypeError, zipfile.BadZipFile) as error:
        raise UserError(f"{path}: not a readable .npz file of numbers: {error}") from None
    if "input_ids" not in inputs:
        raise UserError(f"{path}: input_ids is missing")
    if foreign:
        raise UserError(f"{path}: holds {', '.join(foreign)}, which a decoder does not take: leave it out")
    return inputs


def write_logits(path: Path, logits: np.ndarray) -> None:
    """Writes `logits` to a .npz file that is there whole or not at all."""
    draft = path.with_name(f"{path.name}.{os.getpid()}.new")
    with draft.open("xb") as file:
        np.savez(file, logits=logits)
    draft.rename(path)


def compute_logits(
    setup: Setup,
    params: Params,
    input_ids: np.ndarray,
    *,
    attention_mask: np.ndarray | None = None,
    position_ids: np.ndarray | None = None,
) -> np.ndarray:
    """float32[B, T, V] logits of integer token ids [B, T]. One row at a time is on the devices.

    Args:
        setup: Of the training run.
        attention_mask: [B, T], 0 for tokens that none attends to. It moves no positions, as in Hugging Face's models.
        position_ids: [B, T], places of the tokens; None: 0, 1, ... in each row.

    Raises:
        UserError: Shapes differ, or values are out of the model's range.
    """
    model = setup.run.model
    _check("input_ids", input_ids, None, model.vocab_size)
    inputs = {"tokens": input_ids.astype(np.int32)}
    if attention_mask is not None:
        _check("attention_mask", attention_mask, input_ids.shape, 2)
        inputs["visible"] = attention_mask.astype(bool)
    if position_ids is not None:
        _check("position_ids", position_ids, input_ids.shape, model.max_seq_len)
        inputs["positions"] = position_ids.astype(np.int32)
    if input_ids.shape[1] > model.max_seq_len:
        raise UserError(f"input_ids has {input_ids.shape[1]} tokens a row and the model takes {model.max_seq_len}")
    setup = for_inference(setup)
    forward = Forward(setup)

    def body(params: Params, inputs: Inputs) -> jax.Array:
        prepared = forward.prepare(params)
        bound = forward.bind(prepared)
        return bound.logits(forward.hidden(bound, prepared, inputs)[0], setup.context)

    storage = jax.tree.map(lambda p: p.storage, setup.placements)
    program = jax.jit(
        jax.shard_map(
            body, mesh=setup.mesh, in_specs=(storage, {name: P() for name in inputs}), out_specs=P(), check_vma=True
        )
    )
    with jax.default_matmul_precision(MATMUL_PRECISION):
        rows = [
            np.asarray(program(params, {name: values[row : row + 1] for name, values in inputs.items()}))
            for row in range(len(input_ids))
        ]
    return np.concatenate(rows)


def _check(name: str, values: np.ndarray, shape: tuple[int, ...] | None, limit: int) -> None:
    if values.dtype.kind not in "iub" or values.ndim != 2 or not values.size:
        raise UserError(f"{name}: expected integers [batch, tokens], got {values.dtype}{list(values.shape)}")
    if shape is not None and values.shape != shape:
        raise UserError(f"{name} has the shape {list(values.shape)} and input_ids {list(shape)}: they must be equal")
    if values.min() < 0 or values.max() >= limit:
        raise UserError(f"{name} holds values from {values.min()} to {values.max()}: allowed are 0 to {limit - 1}")
