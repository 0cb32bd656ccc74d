"""A folder with a tokenizer, two token stores and a config, all made by commands, and ways to train there."""

from __future__ import annotations

import dataclasses
import gzip
import json
import shutil
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from programs import ROOT, environment, run, start

from mtx.checkpoints import manifest
from mtx.checkpoints.run_directory import RunDirectory
from mtx.config.schema import Mesh
from mtx.health.journal import read_journal
from mtx.mesh import make_mesh
from mtx.reports.metrics import read_metrics
from mtx.training.state import Setup

CONFIG = """
Model.vocab_size = 384
Model.d_model = 32
Model.num_layers = 2
Model.num_heads = 4
Model.max_seq_len = 32
Train.seq_len = 32
Train.global_batch_size = 8
Train.steps = 20
Train.dropout = 0.1
Train.log_every = 1
Train.eval_batches = 3
Data.train = {'FOLDER/train': 1.0}
Data.validation = {'later chapters': 'FOLDER/validation'}
AdamW.learning_rate = @WarmupCosine()
WarmupCosine.peak = 1e-2
WarmupCosine.final = 1e-3
WarmupCosine.warmup_steps = 4
WarmupCosine.decay_steps = 20
Checkpoint.every_steps = 4
Checkpoint.keep_last = 10
"""


@dataclasses.dataclass(frozen=True)
class Workplace:
    """A folder in which runs are trained; programs that were compiled there once are not compiled again."""

    folder: Path

    @property
    def config(self) -> Path:
        return self.folder / "run.gin"

    def command(self, name: str, *settings: str, devices: int = 1) -> list[str]:
        sets = [part for setting in settings for part in ("--set", setting)]
        run_dir = ["--run-dir", str(self.folder / name), "--cpu-devices", str(devices)]
        return ["-m", "mtx", "train", str(self.config), *run_dir, "--quiet", *sets]

    def environment(self, devices: int = 1, **more: str) -> dict[str, str]:
        return environment(devices, MTX_COMPILATION_CACHE=str(self.folder / "xla"), **more)

    def train(
        self, name: str, *settings: str, options: Sequence[str] = (), devices: int = 1, check: bool = True, **more: str
    ) -> subprocess.CompletedProcess[str]:
        """Options of the command, and `more` variables of its environment."""
        command = [*self.command(name, *settings, devices=devices), *options]
        process: subprocess.CompletedProcess[str] = run(
            command, env=self.environment(devices, **more), timeout_s=200, check=check
        )
        return process

    def interrupt(self, name: str, after: int, signal_number: int) -> int:
        """Trains until a step is done, then sends the signal. Slowed down, so that it is still running.

        Returns:
            The exit code.
        """
        settings = ["Train.eval_every = 1", "Train.eval_batches = 50", "Checkpoint.every_steps = 2"]
        process = start(self.command(name, *settings), env=self.environment())
        deadline, metrics = time.monotonic() + 120, self.folder / name / "metrics.jsonl"
        try:
            while not (metrics.exists() and f'"step": {after},' in metrics.read_text()):
                assert process.poll() is None, "it ended before it was interrupted"
                assert time.monotonic() < deadline
                time.sleep(0.01)
            process.send_signal(signal_number)
            return process.wait(timeout=100)
        finally:
            process.kill()

    def copy(self, name: str, copied: str) -> Path:
        """A run like another one, to spoil; its directory."""
        return Path(shutil.copytree(self.folder / name, self.folder / copied))

    def events(self, name: str, event: str) -> list[dict[str, Any]]:
        """Lines of the journal."""
        return [record for record in read_journal(self.folder / name) if record["event"] == event]

    def meta(self, name: str, step: int) -> dict[str, Any]:
        """What a checkpoint says beside its arrays."""
        return manifest.read(self.folder / name / "checkpoints" / str(step)).meta

    def content(self, name: str) -> dict[str, bytes]:
        """What a run directory holds, besides what every attempt says about itself."""
        folder = self.folder / name
        signs = ("lock", "journal.jsonl", "heartbeats", "stacks")
        paths = {path.relative_to(folder): path for path in folder.rglob("*") if path.is_file()}
        return {str(path): file.read_bytes() for path, file in paths.items() if path.parts[0] not in signs}

    def records(self, name: str) -> list[dict[str, Any]]:
        return read_metrics(self.folder / name)

    def losses(self, name: str) -> list[tuple[int, str | None, float]]:
        """Step, name of the validation set or None, loss: everything printed that the run alone decides."""
        return [(record["step"], record.get("eval"), record["loss"]) for record in self.records(name)]

    def state(self, name: str, step: int) -> dict[str, np.ndarray]:
        """Every array of a checkpoint, on one device."""
        directory = RunDirectory.open(self.folder / name)
        setup = Setup(directory.config().run, make_mesh(Mesh(data=1), jax.devices()[:1]))
        with directory.checkpoints(read_only=True) as checkpoints:
            assert checkpoints.verify(step) == []
            restored = checkpoints.restore(step, setup.abstract_state)
        leaves = jax.tree_util.tree_leaves_with_path(restored)
        return {jax.tree_util.keystr(path): np.asarray(leaf) for path, leaf in leaves}


@pytest.fixture(scope="session")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Workplace:
    folder = tmp_path_factory.mktemp("workplace")
    with gzip.open(ROOT / "texts/austen.jsonl.gz", "rt", encoding="utf-8") as file:
        chapters = [json.loads(line) for line, _ in zip(file, range(8))]
    for name, chosen in (("train", chapters[:6]), ("validation", chapters[6:])):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(chapter) + "\n" for chapter in chosen))
    tokenizer, text = str(folder / "tokenizer.model"), str(folder / "train.jsonl")
    run(["-m", "mtx", "tokenizer", "train", text, "--vocab-size", "384", "--out", tokenizer, "--quiet"])
    for name in ("train", "validation"):
        source, out = str(folder / f"{name}.jsonl"), str(folder / name)
        run(["-m", "mtx", "data", "build", source, "--tokenizer", tokenizer, "--out", out, "--quiet"])
    (folder / "run.gin").write_text(CONFIG.replace("FOLDER", str(folder)))
    return Workplace(folder)


@pytest.fixture(scope="session")
def straight(workplace: Workplace) -> str:
    """A run of 20 steps that nothing interrupted."""
    workplace.train("straight")
    return "straight"
