"""The data of a run: its stores, opened and held against the model, and the batches that they make."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from mtx.config import schema
from mtx.data.batches import Batches, ValidationBatches, check_store
from mtx.data.ramp import BatchSizes
from mtx.data.store import open_store
from mtx.data.tokenizer import load_tokenizer


@dataclass(frozen=True)
class TrainingData:
    """What a run reads.

    Attributes:
        train: The training batches.
        validation: The batches of each validation set, by its name.
        sizes: How many sequences each step has.
        tokenizer_files: Files of the tokenizer that made all stores, by the names that it is loaded by.
    """

    train: Batches
    validation: Mapping[str, ValidationBatches]
    sizes: BatchSizes
    tokenizer_files: Mapping[str, Path]


def open_training_data(run: schema.Run) -> TrainingData:
    """Opens the stores of `Data.train` and `Data.validation`.

    Raises:
        UserError: One is missing, damaged, too short, or does not fit the model or the tokenizer of the run.
    """
    train = {path: open_store(path) for path in run.data.train}
    validation = {name: open_store(path) for name, path in run.data.validation.items()}
    first = next(iter(train.values()))
    tokenizer = first.tokenizer() if run.tokenizer.path is None else load_tokenizer(run.tokenizer.path)
    for key, stores in (("Data.train", train), ("Data.validation", validation)):
        for store in stores.values():
            check_store(store, key=key, model_vocab_size=run.model.vocab_size, tokenizer=tokenizer)
    seq_len, packing = run.train.seq_len, run.data.packing
    sizes = BatchSizes(global_batch_size=run.train.global_batch_size, seq_len=seq_len, ramp=run.train.batch_ramp)
    return TrainingData(
        train=Batches(
            [(train[path], weight) for path, weight in run.data.train.items()],
            seq_len=seq_len,
            batch_sizes=sizes,
            seed=run.train.seed,
            packing=packing,
        ),
        validation={
            name: ValidationBatches(
                store,
                seq_len=seq_len,
                batch_size=run.train.global_batch_size,
                max_batches=run.train.eval_batches,
                packing=packing,
            )
            for name, store in validation.items()
        },
        sizes=sizes,
        tokenizer_files=tokenizer.files,
    )
