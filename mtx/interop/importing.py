"""A run directory at step 0 from the files of another project.

Decides what such a run is besides its model: one that trains nothing until it is told on what. Everything that can be
wrong with the files is found before the run directory is made.
"""

from __future__ import annotations

import secrets
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path

import jax

from mtx.checkpoints.run_directory import RunDirectory, digest_config, save_initial
from mtx.config import reader, schema
from mtx.config.layout import resolve_mesh
from mtx.config.render import Origin, values
from mtx.config.values import format_value
from mtx.data.tokenizer import load_tokenizer
from mtx.errors import UserError
from mtx.interop import find_family, open_source
from mtx.interop.tensors import check_tensors, load_params, name_as_in
from mtx.mesh import make_mesh
from mtx.training.state import Setup

TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "encoder.json")


def import_run(path: Path, out: Path, overrides: Sequence[str] = ()) -> RunDirectory:
    """Makes a run directory of a Hugging Face folder or a GGUF file: its weights are the checkpoint of step 0.

    Args:
        overrides: Statements such as `Train.steps = 100`, for a run that is to go on training.

    Raises:
        UserError: `out` exists, or the files are damaged or of a model that we have not; all that is wrong is named.
    """
    if RunDirectory.exists(out):
        raise UserError(f"{out} is the directory of a run already; give another one")
    with open_source(path) as source:
        family = find_family(source.config, path)
        config = _make_config(family.read_model(source.config), str(path), overrides)
        setup = Setup(config.run, make_mesh(resolve_mesh(config.run.mesh, jax.device_count())))
        tensors = name_as_in(source, family.list_tensors(config.run.model), family.PREFIX)
        abstract_params = setup.abstract_state["params"]
        check_tensors(source, tensors, abstract_params, ignored=family.IGNORED)
        tokenizer_files = _find_tokenizer_files(path)
        params = load_params(source, tensors, abstract_params)
    meta = {"imported_from": str(path.absolute()), "config_digest": digest_config(config)}
    draft = out.with_name(f".{out.name}.{secrets.token_hex(4)}")
    try:
        save_initial(RunDirectory.create(draft, config.text(), tokenizer_files), params, meta)
        draft.rename(out)  # only now: a run directory without its weights would begin with others
    except BaseException:
        shutil.rmtree(draft, ignore_errors=True)
        raise
    return RunDirectory.open(out)


def _make_config(model: schema.Model, source: str, overrides: Sequence[str]) -> reader.Config:
    run = schema.Run(
        model=model,
        mesh=schema.Mesh(),
        pipeline=schema.Pipeline(),
        rules=schema.Rules(),
        precision=schema.Precision(),
        train=schema.Train(steps=0, seq_len=model.max_seq_len, global_batch_size=1),
        data=schema.Data(),
        tokenizer=schema.Tokenizer(),
        checkpoint=schema.Checkpoint(),
        health=schema.Health(),
        cluster=schema.Cluster(),
    )
    text = "".join(f"{s.key} = {format_value(value)}\n" for s, value in values(run) if value != s.default)
    config = reader.load_text(text, source, overrides)
    # The lines of that text are nowhere to be looked up.
    provenance = {
        key: Origin(source) if origin.place.startswith(f"{source}:") else origin
        for key, origin in config.provenance.items()
    }
    return reader.Config(config.run, provenance)


def _find_tokenizer_files(folder: Path) -> Mapping[str, Path]:
    """The files of the folder's tokenizer, by name; none where it has none."""
    if not any((folder / name).is_file() for name in TOKENIZER_FILES):
        return {}
    return load_tokenizer(folder).files
