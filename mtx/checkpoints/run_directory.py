"""A run directory: created once, whole, and recognised again; the weights in it, on any mesh.

Decides what makes a directory a run's, and which config a run may go on with. Reads and writes arrays through
`Checkpoints` only.

Invariant: what a run directory holds is never overwritten: a file whose content changes is kept under another name.
"""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mtx.checkpoints import steps
from mtx.checkpoints.store import Checkpoints
from mtx.config.reader import Config, load
from mtx.config.render import compare, show
from mtx.config.schema import FREE
from mtx.errors import CheckpointError, UserError

if TYPE_CHECKING:
    from mtx.data.tokenizer import Tokenizer

CONFIG, TOKENIZER = "config.gin", "tokenizer"


@dataclass(frozen=True)
class RunDirectory:
    """A directory with the resolved config of a run. Made by `create`, found again by `open`."""

    path: Path

    @classmethod
    def open(cls, path: str | Path) -> RunDirectory:
        """Takes a directory for a run's.

        Raises:
            UserError: It is none.
        """
        path = Path(path)
        if not (path / CONFIG).is_file():
            problem = "is no run directory: it has no config.gin" if path.is_dir() else "does not exist"
            raise UserError(f"{path} {problem}; `mtx train RUN.gin --run-dir DIR` and `mtx import` make one")
        return cls(path)

    @classmethod
    def exists(cls, path: str | Path) -> bool:
        """Whether there is a run directory.

        Raises:
            UserError: Something else is there, which a run must not mix with.
        """
        path = Path(path)
        if (path / CONFIG).is_file():
            return True
        if path.exists() and not (path.is_dir() and all(_is_launchers(entry.name) for entry in path.iterdir())):
            raise UserError(f"{path} exists and is no run directory (it has no config.gin); give another --run-dir")
        return False

    @classmethod
    def create(cls, path: str | Path, config_text: str, tokenizer_files: Mapping[str, Path]) -> RunDirectory:
        """Makes a run directory; it becomes one with its last file, `config.gin`.

        Args:
            config_text: The resolved config (`Config.text`).
            tokenizer_files: `Tokenizer.files`, copied into `tokenizer/`, so that a run that is moved decodes its text.

        Raises:
            UserError: Something is there already.
        """
        path = Path(path)
        if cls.exists(path):
            raise UserError(f"{path} is the directory of a run already; give another one")
        path.mkdir(parents=True, exist_ok=True)
        for name, file in tokenizer_files.items():
            (path / TOKENIZER).mkdir(exist_ok=True)
            shutil.copyfile(file, path / TOKENIZER / name)
        _write(path / CONFIG, config_text)
        return cls(path)

    def config(self, overrides: Iterable[str] = ()) -> Config:
        """The config that the run was started with, or last went on with."""
        return load(self.path / CONFIG, list(overrides))

    def tokenizer(self) -> Tokenizer:
        """The run's own copy of its tokenizer.

        Raises:
            UserError: The run has none, as one imported from a folder without tokenizer.
        """
        from mtx.data.tokenizer import load_tokenizer

        folder = self.path / TOKENIZER
        if not folder.is_dir():
            raise UserError(f"{self.path} has no tokenizer/: put the tokenizer's files there")
        return load_tokenizer(folder)

    def checkpoints(self, **options: Any) -> Checkpoints:
        """The run's checkpoints; options as of `Checkpoints`."""
        return Checkpoints(self.path / steps.NAME, **options)

    def accept(self, config: Config, step: int) -> list[str]:
        """Goes on with a config that differs from the run's own in nothing that changes its course.

        Returns:
            What changed, a line per field. The old config is kept as `config.until-STEP.gin`.

        Raises:
            UserError: A field differs that decides the numbers, the data or the architecture of the run.
        """
        changes = compare(self.config().run, config.run)
        lines = [f"{c.setting.key}: {show(c.old)} -> {show(c.new)}" for c in changes]
        barred = [
            f"  {line} ({change.setting.drift})" for line, change in zip(lines, changes) if change.setting.drift != FREE
        ]
        if barred:
            raise UserError(
                f"{self.path} is the directory of another run: the config differs in\n" + "\n".join(barred) + "\n"
                f"Give another --run-dir, or go on with {self.path / CONFIG}"
            )
        if changes:
            kept = self.path / f"config.until-{step}.gin"
            number = 1
            while kept.exists():
                number += 1
                kept = self.path / f"config.until-{step}-{number}.gin"
            os.link(self.path / CONFIG, kept)
            _write(self.path / CONFIG, config.text())
        return lines


def digest_config(config: Config) -> str:
    """A short name of the resolved config, for the journal and for checkpoints."""
    values = "\n".join(line.split("  #")[0] for line in config.text().splitlines() if not line.startswith("#"))
    return hashlib.blake2b(values.encode(), digest_size=8).hexdigest()


def restore_params(
    directory: RunDirectory,
    abstract_params: Any,
    step: int | None = None,
    *,
    report: Callable[[str], None] = lambda line: None,
) -> tuple[Any, int]:
    """The weights of a run, without its optimizer state, on the mesh of `abstract_params`.

    Args:
        abstract_params: Nested dict of `jax.ShapeDtypeStruct` with shardings.
        step: Which checkpoint; None: the newest that verifies.
        report: Told of checkpoints that do not verify.

    Returns:
        The weights and the step that they are of.

    Raises:
        UserError: There is no such checkpoint.
        CheckpointError: It does not verify.
    """
    with directory.checkpoints(read_only=True, report=report) as checkpoints:
        chosen = choose_step(checkpoints, step)
        if chosen is None:
            raise UserError(f"{directory.path} has no checkpoint yet")
        return checkpoints.restore(chosen, {"params": abstract_params})["params"], chosen


def choose_step(checkpoints: Checkpoints, step: int | None) -> int | None:
    """The step asked for, or else the newest that verifies; None where nothing was ever saved.

    Raises:
        UserError: There is no such step.
        CheckpointError: It does not verify.
    """
    if step is None:
        return checkpoints.latest_verified()
    if step not in checkpoints.steps():
        raise UserError(
            f"{checkpoints.directory} has no checkpoint of step {step}; there is "
            f"{', '.join(map(str, checkpoints.steps())) or 'none'}"
        )
    if problems := checkpoints.verify(step):
        raise CheckpointError(f"checkpoint {step} does not verify: {'; '.join(problems)}")
    return step


def save_initial(directory: RunDirectory, params: Mapping[str, Any], meta: Mapping[str, Any]) -> None:
    """Saves weights that come from elsewhere as step 0."""
    with directory.checkpoints() as checkpoints:
        checkpoints.save(0, {"params": params}, meta)


def _is_launchers(name: str) -> bool:
    """Whether a launcher keeps it there, beginning before the run does (`launch/job.py`)."""
    return name in ("launch.jsonl", "logs") or fnmatch(name, "job*.json")


def _write(path: Path, text: str) -> None:
    """Writes a file that is either there whole or not at all."""
    draft = path.with_name(path.name + ".new")
    with draft.open("w", encoding="utf-8") as out:
        out.write(text)
        out.flush()
        os.fsync(out.fileno())
    draft.replace(path)
