"""Learns a SentencePiece vocabulary from texts.

Decides the settings that make it lossless. Does not decide how it is used (`tokenizer.py`).

Invariant: the same texts and settings give the same file, on any number of cores.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from io import BytesIO
from pathlib import Path

from mtx.errors import UserError

END_OF_DOCUMENT_PIECE = "<|endoftext|>"
_MAX_SENTENCE_BYTES = 4096
# SentencePiece adds up the threads' counts in floating point, so their number is part of the result.
_THREADS = 16


def train_sentencepiece(
    texts: Iterable[str], *, vocab_size: int, out: Path, model_type: str = "unigram", max_sentences: int = 2_000_000
) -> None:
    """Trains a vocabulary and writes the model file.

    Nothing is normalized, runs of spaces may be pieces, digits are single, and what the vocabulary lacks is spelt in
    256 byte pieces. Id 0 is <unk>, which never occurs, and id 1 ends documents.

    Args:
        texts: Documents.
        vocab_size: Pieces, the 258 above included.
        out: The `.model` file.
        model_type: `unigram` (encodes four times as fast) or `bpe`.
        max_sentences: Lines to learn from; of more, an even sample is taken. They must fit in memory.

    Raises:
        UserError: `out` exists, or the texts have too little variety for so many pieces, or too few pieces.
    """
    import sentencepiece

    if out.exists():
        raise UserError(f"{out}: exists already and is not overwritten; give another --out or remove it")
    model = BytesIO()
    sentencepiece.set_random_generator_seed(0)
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=_sentences(texts),
            model_writer=model,
            model_type=model_type,
            vocab_size=vocab_size,
            normalization_rule_name="identity",
            remove_extra_whitespaces=False,
            add_dummy_prefix=False,
            allow_whitespace_only_pieces=True,
            byte_fallback=True,
            split_digits=True,
            unk_id=0,
            eos_id=1,
            eos_piece=END_OF_DOCUMENT_PIECE,
            bos_id=-1,
            pad_id=-1,
            input_sentence_size=max_sentences,
            shuffle_input_sentence=True,
            max_sentence_length=_MAX_SENTENCE_BYTES,
            num_threads=_THREADS,
            minloglevel=2,
        )
    except RuntimeError as error:
        # "...cc(1) [condition] what is wrong. Increase ... with its own options", and nothing where there is no text.
        reason = str(error).rsplit("] ", 1)[-1].split(" Increase ")[0].strip()
        raise UserError(
            f"a vocabulary of {vocab_size} cannot be learned from these texts: {reason or 'there is no text'}"
        ) from None
    temporary = out.with_name(f".{out.name}.{os.getpid()}")
    with temporary.open("xb") as file:
        file.write(model.getvalue())
        file.flush()
        os.fsync(file.fileno())
    os.link(temporary, out)  # unlike a rename, fails where the name was taken meanwhile
    temporary.unlink()


def _sentences(texts: Iterable[str]) -> Iterator[str]:
    """Lines of the texts, cut where SentencePiece would drop them for their length."""
    step = _MAX_SENTENCE_BYTES // 4  # characters of up to four bytes
    for text in texts:
        for line in text.splitlines():
            for start in range(0, len(line), step):
                yield line[start : start + step]
