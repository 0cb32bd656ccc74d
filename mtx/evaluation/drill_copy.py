"""The small copy of a run that a drill may damage: a reduced config and token stores of its own.

Kept: what `mtx.evaluation.reduction` keeps, the optimizer, the number of stores, their weights and their stages.
Reduced: the size, the length (with that of the schedule), and the text, which is an excerpt of the run's own stores
where these exist. Characters are its tokens, so that any vocabulary will do.

Invariant: nothing of the run itself is ever opened for writing.
"""

from __future__ import annotations

import dataclasses
import json
import random
import string
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from mtx.config import render, schema
from mtx.data.build import build_store
from mtx.data.inputs import Selection
from mtx.data.store import open_store
from mtx.errors import UserError
from mtx.evaluation.covering import make_layout
from mtx.evaluation.reduction import place_run, reduce_run

EVERY = 4
"""Steps between checkpoints."""

PEER_TIMEOUT_S = 5.0
_CHARACTERS = 12_000
_LENGTHS = (10, 60)  # of a document, characters
_LETTERS = " etaoinshrdlucmfwygpbvkxqjz" + string.ascii_uppercase + string.digits + ".,;:!?'\"-()\n"


@dataclass(frozen=True)
class Copy:
    """The copy of a run.

    Attributes:
        config: Its config file.
        stores: The folders of its token stores.
        steps: Updates of the whole run.
    """

    config: Path
    stores: tuple[Path, ...]
    steps: int


def make_copy(run: schema.Run, folder: Path, *, processes: int, steps: int) -> Copy:
    """Makes the copy of a run in a folder.

    Args:
        run: The run.
        folder: An empty one.
        processes: The largest number of devices that the copy must divide over, one each.
        steps: Updates of the copy.

    Raises:
        UserError: The run cannot be computed with data parallelism alone.
    """
    (folder / "tokenizer").mkdir(parents=True)
    reduced = reduce_run(run, [make_layout({}), make_layout({"data": processes})])
    _write_tokenizer(folder / "tokenizer" / "tokenizer.json", reduced.model.vocab_size)
    stores: dict[str, Path] = {}
    for original in _stores(run.data):
        stores[original] = folder / f"store-{len(stores)}"
        _build(original, stores[original], folder / "tokenizer")
    small = _shorten(place_run(reduced, make_layout({})), _move(run.data, stores, steps), run, steps)
    config = folder / "drill.gin"
    config.write_text(render.dump(small, {}), encoding="utf-8")
    return Copy(config, tuple(stores.values()), steps)


def _shorten(reduced: schema.Run, data: schema.Data, run: schema.Run, steps: int) -> schema.Run:
    optimizer: Any = reduced.train.optimizer
    rate = getattr(optimizer, "learning_rate", None)
    if isinstance(rate, schema.Schedule):
        optimizer = replace(optimizer, learning_rate=_shorten_schedule(rate, steps))
    evaluates = bool(data.validation)
    return replace(
        reduced,
        mesh=schema.Mesh(),
        train=replace(
            reduced.train,
            steps=steps,
            tokens=None,
            optimizer=optimizer,
            log_every=1,
            eval_every=2 * EVERY if evaluates else None,
            eval_batches=2 if evaluates else schema.Train.eval_batches,
            stop_before=None,
        ),
        data=data,
        checkpoint=schema.Checkpoint(every_steps=EVERY),
        health=replace(run.health, spike_score=None, peer_timeout_s=PEER_TIMEOUT_S, hang_timeout_s=120.0),
    )


def _shorten_schedule(schedule: schema.Schedule, steps: int) -> schema.Schedule:
    """The schedule with a warm-up where it has one, over the whole length of the copy."""
    optional = {f.name: None for f in dataclasses.fields(schedule) if f.default is None}
    lengths: dict[str, Any] = {name: None for name in optional if name.endswith(("_steps", "_tokens"))}
    if any(getattr(schedule, name, None) for name in ("warmup_steps", "warmup_tokens")):
        lengths["warmup_steps"] = steps // 4
    return replace(schedule, **lengths)


def _stores(data: schema.Data) -> Iterator[str]:
    """All stores, each once."""
    yield from dict.fromkeys([*data.train, *(s for blend in data.stages.values() for s in blend), *_validation(data)])


def _validation(data: schema.Data) -> Sequence[str]:
    return list(data.validation.values())


def _move(data: schema.Data, stores: Mapping[str, Path], steps: int) -> schema.Data:
    def move(blend: Mapping[str, float]) -> dict[str, float]:
        return {str(stores[store]): weight for store, weight in blend.items()}

    share = steps // (len(data.stages) + 1)
    stages = {f"{share * number} steps": move(blend) for number, blend in enumerate(data.stages.values(), 1)}
    return schema.Data(
        train=move(data.train),
        stages=stages,
        validation={name: str(stores[store]) for name, store in data.validation.items()},
        packing=data.packing,
    )


def _write_tokenizer(path: Path, vocab_size: int) -> None:
    """A tokenizer of single characters with no more ids than the model has."""
    tokens = ["<unk>", "<|endoftext|>", *_LETTERS][:vocab_size]
    if len(tokens) < 3:
        raise UserError(f"Model.vocab_size = {vocab_size} leaves no room for text")
    model = {"type": "BPE", "vocab": {t: i for i, t in enumerate(tokens)}, "merges": [], "unk_token": "<unk>"}
    content = {"version": "1.0", "model": model, "decoder": {"type": "Fuse"}}
    path.write_text(json.dumps(content), encoding="utf-8")


def _build(original: str, out: Path, tokenizer: Path) -> None:
    """Builds a store from an excerpt of another one, or of made-up text where that does not exist."""
    text = _excerpt(Path(original)) if Path(original).exists() else _invent(original)
    chance, documents, at = random.Random(original), list[str](), 0
    while at < len(text):
        length = chance.randint(*_LENGTHS)
        documents.append(text[at : at + length])
        at += length
    source = out.with_suffix(".jsonl")
    source.write_text("".join(json.dumps({"text": document}) + "\n" for document in documents), encoding="utf-8")
    build_store([str(source)], tokenizer_path=str(tokenizer), out=out, selection=Selection(), workers=1)


def _excerpt(path: Path) -> str:
    store = open_store(path, cache_bytes=1 << 20)
    tokenizer, text, number = store.tokenizer(), "", 0
    while len(text) < _CHARACTERS and number < store.num_documents:
        text += tokenizer.decode(store.document(number).tokens[:_CHARACTERS])
        number += 1
    return text[:_CHARACTERS]


def _invent(name: str) -> str:
    chance = random.Random(name)
    return "".join(chance.choice(_LETTERS[:27]) for _ in range(_CHARACTERS))
