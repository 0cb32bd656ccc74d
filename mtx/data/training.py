"""The data of a run: its stores, opened and held against the model, and the batches that they make."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from mtx.config import schema
from mtx.data.batches import Batches, ValidationBatches, check_store
from mtx.data.course import Course
from mtx.data.entry import Entry, find_first_step
from mtx.data.samples import Sources
from mtx.data.tokenizer import load_tokenizer
from mtx.errors import UserError


@dataclass(frozen=True)
class TrainingData:
    """What a run reads.

    Attributes:
        train: The training batches.
        validation: The batches of each validation set, by its name.
        sizes: How many sequences each step has, and what else follows from the ledger.
        tokenizer_files: Files of the tokenizer that made all stores, by the names that it is loaded by.
    """

    train: Batches
    validation: Mapping[str, ValidationBatches]
    sizes: Course
    tokenizer_files: Mapping[str, Path]


def open_training_data(run: schema.Run, entries: Sequence[Entry] = (), sources: Sources | None = None) -> TrainingData:
    """Opens the stores of `Data.train`, `Data.stages` and `Data.validation`.

    Args:
        run: The run.
        entries: Of its ledger; none: the run as it is, from step 0 on.
        sources: Where stores may be open already; those of this run are checked and stay open in it.

    Raises:
        UserError: One is missing, damaged, too short, or does not fit the model or the tokenizer of the run; or a stage
            begins after the last step.
    """
    sources = Sources() if sources is None else sources
    staged = dict.fromkeys(path for blend in run.data.stages.values() for path in blend)
    stores = {
        key: [sources.open(path) for path in paths]
        for key, paths in (
            ("Data.train", run.data.train), ("Data.stages", staged), ("Data.validation", run.data.validation.values())
        )
    }  # fmt: skip
    first = stores["Data.train"][0]
    tokenizer = first.tokenizer() if run.tokenizer.path is None else load_tokenizer(run.tokenizer.path)
    for key, opened in stores.items():
        for store in opened:
            check_store(store, key=key, model_vocab_size=run.model.vocab_size, tokenizer=tokenizer)
    course = Course(entries or [Entry.of(run, sources, 0)])
    _check_stages(run, course)
    return TrainingData(
        train=Batches(course, sources),
        validation={
            name: ValidationBatches(
                store,
                seq_len=run.train.seq_len,
                batch_size=run.train.global_batch_size,
                max_batches=run.train.eval_batches,
                packing=run.data.packing,
            )
            for name, store in zip(run.data.validation, stores["Data.validation"])
        },
        sizes=course,
        tokenizer_files=tokenizer.files,
    )


def _check_stages(run: schema.Run, course: Course) -> None:
    sizes, steps = course.stretches[-1].sizes, run.train.steps
    total = course.step_at_tokens(run.train.tokens or 0) if steps is None else steps
    for key in run.data.stages:
        first = find_first_step(key, sizes)
        if first >= total:
            raise UserError(
                f"Data.stages[{key!r}] has no effect: it would begin after {first:,} steps, and the run has {total:,}: "
                "make the run longer (Train.steps, Train.tokens), or remove the stage"
            )
