"""A run directory: created once, whole, and recognised again; the weights in it, on any mesh.

Decides what makes a directory a run's, and which config it holds; `drift` decides which one a run may go on with. Reads
and writes arrays through `Checkpoints` only.

Invariant: what a run directory holds is never overwritten: a file whose content changes is kept under another name.
"""

from __future__ import annotations

import filecmp
import hashlib
import logging
import os
import secrets
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mtx.checkpoints import steps
from mtx.checkpoints.drift import Drift, compare_for_resume
from mtx.checkpoints.lock import hold_lock
from mtx.checkpoints.store import Checkpoints
from mtx.config.reader import Config, load, load_text
from mtx.config.render import compare
from mtx.errors import CheckpointError, UserError

if TYPE_CHECKING:
    from mtx.data.tokenizer import Tokenizer

_LOG = logging.getLogger(__name__)

CONFIG, TOKENIZER = "config.gin", "tokenizer"

_DRAFT = ".create"
"""In a directory that is being made a run's. While it is there, `tokenizer/` is of that, too."""


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
        unfinished = (TOKENIZER, _DRAFT) if (path / _DRAFT).is_dir() else ()
        if path.exists() and not (
            path.is_dir() and all(_is_launchers(entry.name) or entry.name in unfinished for entry in path.iterdir())
        ):
            raise UserError(f"{path} exists and is no run directory (it has no config.gin); give another --run-dir")
        return False

    @classmethod
    def create(cls, path: str | Path, config_text: str, tokenizer_files: Mapping[str, Path]) -> RunDirectory:
        """Makes a run directory: whole, under another name that it is then renamed from.

        A directory that is there already, of a launcher or a volume of its own, is filled, `config.gin` last.

        Args:
            config_text: The resolved config (`Config.text`).
            tokenizer_files: `Tokenizer.files`, copied into `tokenizer/`, so that a run that is moved decodes its text.

        Raises:
            UserError: Something is there already, or nothing can be written there. Nothing is left behind.
        """
        path = Path(path)
        if cls.exists(path):
            raise UserError(f"{path} is the directory of a run already; give another one")
        fills = path.is_dir()
        draft = path / _DRAFT if fills else path.with_name(f".{path.name}.{secrets.token_hex(4)}")
        with _explain_failure(path):
            _remove_unfinished(path, draft)  # what a killed attempt left
            try:
                draft.mkdir(parents=True)
                for name, file in tokenizer_files.items():
                    (draft / TOKENIZER).mkdir(exist_ok=True)
                    shutil.copyfile(file, draft / TOKENIZER / name)
                _write(draft / CONFIG, config_text)
                if fills:
                    for name in (TOKENIZER, CONFIG):
                        if (draft / name).exists():
                            (draft / name).rename(path / name)
                    draft.rmdir()
                else:
                    draft.rename(path)
            except OSError:
                _remove_unfinished(path, draft)
                raise
        return cls(path)

    @contextmanager
    def lock(self, *, report: Callable[[str], None] = _LOG.warning) -> Iterator[None]:
        """Keeps other runs out of the directory for as long as the body takes. For process 0 alone.

        Args:
            report: Told where the file system has no locks, and nobody is kept out.

        Raises:
            UserError: A run uses the directory, or it cannot be written.
        """
        with ExitStack() as stack:
            with _explain_failure(self.path):
                stack.enter_context(hold_lock(self.path, report=report))
                tempfile.TemporaryFile(dir=self.path).close()  # the lock's may be older than a write protection
            yield

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

    def check_resume(
        self,
        config: Config,
        *,
        step: int | None,
        meta: Mapping[str, Any],
        accepted: frozenset[str] = frozenset(),
        tokenizer_files: Mapping[str, Path],
    ) -> Drift:
        """Whether the run may go on with a config. Writes nothing.

        Args:
            config: The one to go on with.
            step: The checkpoint to go on from; None where there is none yet.
            meta: What that checkpoint says (`Checkpoints.meta`). Its `config` is compared, or the directory's own
                where it has none, as imported weights have.
            accepted: Keys (`Train.seed`) whose change is agreed to.
            tokenizer_files: Of the data to go on with.

        Returns:
            What changes; nothing of it is `needed` or `impossible`.

        Raises:
            UserError: The checkpoint does not fit, the tokenizer is another, or what decides the numbers or the data
                changes and was not accepted. All such fields are named.
        """
        recorded = self.config().run
        source = f"the config of {self.path / steps.NAME / str(step)}"
        saved = load_text(meta["config"], source).run if "config" in meta else recorded
        drift = compare_for_resume(saved, recorded, config.run, accepted, step or 0, provenance=config.provenance)
        of = "that it was started with" if step is None else f"that of its checkpoint {step}"
        found = "".join(f"\n  {line}" for line in (*drift.impossible, *drift.needed))
        if drift.impossible:
            raise UserError(
                f"{self.path} cannot go on with this config, which differs from {of} in{found}\n"
                f"Start a new run with another --run-dir, or go on with {self.path / CONFIG}"
            )
        if drift.needed:
            raise UserError(
                f"{self.path} would go on as another run: the config differs from {of} in{found}\n"
                f"If that is meant, add {' '.join(f'--accept {key}' for key in drift.keys)}\n"
                f"If not, go on with {self.path / CONFIG}, or give another --run-dir"
            )
        self._check_tokenizer(tokenizer_files)
        return drift

    def _check_tokenizer(self, files: Mapping[str, Path]) -> None:
        """Raises UserError where the data have another tokenizer than the run, whatever their paths say."""
        from mtx.data.tokenizer import CONFIG as SETTINGS  # of Hugging Face; decides no id

        own = self.path / TOKENIZER
        differing = [
            file
            for name, file in files.items()
            if name != SETTINGS and not ((own / name).is_file() and filecmp.cmp(own / name, file, shallow=False))
        ]
        if own.is_dir() and differing:
            raise UserError(
                f"{differing[0]} is not the tokenizer that the run began with, which is in {own}: token ids would mean "
                "other text. Build the stores with that one, or start a new run with another --run-dir"
            )

    def record(self, config: Config, step: int) -> None:
        """Makes a config that `check_resume` let pass the run's own from a step on.

        The one before is kept as `config.until-STEP.gin`; nothing is written where no field differs.

        Raises:
            UserError: Nothing can be written there.
        """
        if not compare(self.config().run, config.run):
            return
        number, kept = 1, self.path / f"config.until-{step}.gin"
        while kept.exists():
            number += 1
            kept = self.path / f"config.until-{step}-{number}.gin"
        with _explain_failure(self.path):
            _write(kept, (self.path / CONFIG).read_text(encoding="utf-8"))
            _write(self.path / CONFIG, config.text())


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
        if not checkpoints.wait():
            raise UserError(f"the weights could not be saved to {checkpoints.directory}, for the reason told above")


def _is_launchers(name: str) -> bool:
    """Whether a launcher keeps it there, beginning before the run does (`launch/job.py`)."""
    return name in ("launch.jsonl", "logs") or fnmatch(name, "job*.json")


def _remove_unfinished(path: Path, draft: Path) -> None:
    """Removes what a creation that came to no end left."""
    if draft.is_dir():
        if draft.parent == path:
            shutil.rmtree(path / TOKENIZER, ignore_errors=True)
        shutil.rmtree(draft)


def _write(path: Path, text: str) -> None:
    """Writes a file that is either there whole or not at all."""
    draft = path.with_name(path.name + ".new")
    try:
        with draft.open("w", encoding="utf-8") as out:
            out.write(text)
            out.flush()
            os.fsync(out.fileno())
        draft.replace(path)
    except OSError:
        draft.unlink(missing_ok=True)
        raise


@contextmanager
def _explain_failure(path: Path) -> Iterator[None]:
    """Turns what the file system refuses into a message for people."""
    try:
        yield
    except OSError as error:
        raise UserError(
            f"{path} cannot be written: {error.strerror} ({error.filename}); mend that, or give another --run-dir"
        ) from None
