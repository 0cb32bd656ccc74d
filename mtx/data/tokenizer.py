"""Text to token ids and back, for the tokenizer files that users have.

Decides which files are a tokenizer, what ends a document, and the fingerprint that ties stores and checkpoints to it.
Does not decide how texts become a store, nor how a vocabulary is learned (`tokenizer_training.py`).

Invariant: text never becomes a special token, whatever it contains, and `decode(encode(text)) == text` for every text,
unless the files themselves normalize (docs/data.md says which do); `mtx data build` counts the documents where they do.
"""

from __future__ import annotations

import hashlib
import json
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from mtx.errors import UserError

# Names under which vocabularies hold the token that ends a document, tried in this order.
END_OF_DOCUMENT = ("<|endoftext|>", "</s>", "<|end_of_text|>", "<eos>", "[EOS]", "<|eos|>")
CONFIG = "tokenizer_config.json"
_FORMATS = (
    "a SentencePiece .model, a tokenizer.json, or a folder with GPT-2's encoder.json and vocab.bpe (or vocab.json and "
    "merges.txt), a tokenizer.json or one .model"
)


class Tokenizer(ABC):
    """Token ids of text. Make one with `load_tokenizer`."""

    def __init__(self, files: Mapping[str, Path], end_of_document: str | None):
        """Args: files: canonical name -> path; end_of_document: the token, None: found by the rule."""
        self._content = dict(files)
        self._end_of_document = end_of_document

    @property
    def files(self) -> dict[str, Path]:
        """Canonical name -> path of all that it takes to load this tokenizer elsewhere."""
        config = self._place.with_name(CONFIG)
        return self._content | ({CONFIG: config} if config.is_file() else {})

    @property
    @abstractmethod
    def vocab_size(self) -> int:
        """One more than the largest token id."""

    @abstractmethod
    def token_id(self, token: str) -> int | None:
        """Id of a token by its name in the vocabulary."""

    @abstractmethod
    def token(self, token_id: int) -> str:
        """Name of an id in the vocabulary."""

    @abstractmethod
    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Ids of each text: int32[length of the text in tokens]."""

    @abstractmethod
    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        """The text of ids.

        Bytes that make no character show as U+FFFD. Ids outside the vocabulary, which a model with a padded embedding
        can sample, are left out.
        """

    def encode(self, text: str) -> list[int]:
        """Ids of a text, without any token before or after it."""
        return self.encode_batch([text])[0].tolist()

    @cached_property
    def fingerprint(self) -> str:
        """Hex digest of what decides the ids of text; neither the files' place nor their date counts."""
        digest = hashlib.blake2b(digest_size=16)
        for name, path in sorted(self._content.items()):
            content = path.read_bytes()
            digest.update(f"{name} {len(content)}\n".encode() + content)
        return digest.hexdigest()

    @cached_property
    def end_of_document_id(self) -> int:
        """Id of the token that ends every document of a store.

        The token that the caller of `load_tokenizer` named; else the one that the files declare; else the first of
        END_OF_DOCUMENT that the vocabulary has.

        Raises:
            UserError: There is none.
        """
        if self._end_of_document is not None:
            found = self.token_id(self._end_of_document)
            if found is None:
                raise UserError(f"{self._place}: no token {self._end_of_document!r} in its vocabulary")
            return found
        for token in (*self._declared_ends(), *END_OF_DOCUMENT):
            found = self.token_id(token)
            if found is not None:
                return found
        raise UserError(
            f"{self._place}: no token ends a document: the files declare none and the vocabulary has none of "
            f"{' '.join(END_OF_DOCUMENT)}; name one of its tokens with `mtx data build --end-of-document`, or in a "
            f'{CONFIG} beside it: {{"eos_token": "..."}}'
        )

    def _declared_ends(self) -> list[str]:
        """What the files say: `eos_token` of a Hugging Face `tokenizer_config.json` beside them."""
        config = self.files.get(CONFIG)
        end = _read_json(config).get("eos_token") if config else None
        end = end.get("content") if isinstance(end, dict) else end
        return [end] if isinstance(end, str) else []

    @property
    def _place(self) -> Path:
        return next(iter(self._content.values()))


class SentencePieceTokenizer(Tokenizer):
    """A SentencePiece model.

    SentencePiece writes a space as U+2581 inside, and so turns a U+2581 of the text into a space. Here such a character
    is encoded as the three byte pieces of its UTF-8, which every SentencePiece decodes to U+2581.
    """

    _SPACE_MARK = "\u2581"

    def __init__(self, path: Path, end_of_document: str | None):
        """Raises: UserError: the file is not a SentencePiece model."""
        import sentencepiece

        super().__init__({"tokenizer.model": path}, end_of_document)
        try:
            self._processor = sentencepiece.SentencePieceProcessor(model_proto=path.read_bytes())
        except RuntimeError as error:
            raise UserError(f"{path}: not a SentencePiece model: {error}") from None

    @property
    def vocab_size(self) -> int:
        return self._processor.vocab_size()

    def token_id(self, token: str) -> int | None:
        found = self._processor.piece_to_id(token)
        return found if self._processor.id_to_piece(found) == token else None

    def token(self, token_id: int) -> str:
        return self._processor.id_to_piece(token_id)

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        # One thread: a build uses the cores by processes.
        encoded = self._processor.encode(list(texts), return_type="numpy", num_threads=1)
        marks = self._mark_ids
        if marks:
            for i, text in enumerate(texts):
                if self._SPACE_MARK in text:
                    encoded[i] = self._encode_around_marks(text, marks)
        return encoded

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        known = np.asarray(ids, np.int64)
        return self._processor.decode(known[known < self.vocab_size].tolist())

    def _declared_ends(self) -> list[str]:
        end = self._processor.eos_id()
        return super()._declared_ends() + ([self._processor.id_to_piece(end)] if end >= 0 else [])

    @cached_property
    def _mark_ids(self) -> list[int] | None:
        """The byte pieces of U+2581; None where the model has no byte pieces."""
        ids = [self.token_id(f"<0x{byte:02X}>") for byte in self._SPACE_MARK.encode()]
        return None if None in ids else [i for i in ids if i is not None]

    @cached_property
    def _inner(self) -> tuple[Any, bool]:
        """The same model for text that does not begin the document, and whether the first one adds a space there."""
        import sentencepiece
        from sentencepiece import sentencepiece_model_pb2

        proto = sentencepiece_model_pb2.ModelProto.FromString(self._processor.serialized_model_proto())
        adds_space = proto.normalizer_spec.add_dummy_prefix
        proto.normalizer_spec.add_dummy_prefix = False
        return sentencepiece.SentencePieceProcessor(model_proto=proto.SerializeToString()), adds_space

    def _encode_around_marks(self, text: str, marks: list[int]) -> np.ndarray:
        first, *rest = text.split(self._SPACE_MARK)
        inner, adds_space = self._inner
        # Decoding takes the added space away again, so it must be there even if nothing precedes the first mark.
        prefix = " " if adds_space else ""
        ids = inner.encode(prefix + first)
        for part in rest:
            ids += [*marks, *inner.encode(part)]
        return np.array(ids, np.int32)


class HuggingFaceTokenizer(Tokenizer):
    """What the `tokenizers` library reads: `tokenizer.json`, and GPT-2's two files."""

    def __init__(self, backend: Any, files: Mapping[str, Path], end_of_document: str | None):
        """Args: backend: tokenizers.Tokenizer."""
        super().__init__(files, end_of_document)
        self._backend = backend
        backend.no_truncation()
        backend.no_padding()
        backend.encode_special_tokens = True  # in the library's words: special tokens in text are split like any text

    @cached_property
    def vocab_size(self) -> int:
        return max(self._backend.get_vocab(with_added_tokens=True).values()) + 1

    def token_id(self, token: str) -> int | None:
        return self._backend.token_to_id(token)

    def token(self, token_id: int) -> str:
        return self._backend.id_to_token(token_id)

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        # Its threads are as many as RAYON_NUM_THREADS says.
        encoded = self._backend.encode_batch_fast(list(texts), add_special_tokens=False)
        return [np.array(one.ids, np.int32) for one in encoded]

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        return self._backend.decode(np.asarray(ids, np.int64).tolist(), skip_special_tokens=False)


def load_tokenizer(path: str | Path, *, end_of_document: str | None = None) -> Tokenizer:
    """Loads a tokenizer.

    Args:
        path: A SentencePiece `.model`; a `tokenizer.json`; or a folder, in which the first of these counts:
            `encoder.json` with `vocab.bpe` (GPT-2 as published), `tokenizer.json`, `vocab.json` with `merges.txt`
            (GPT-2 as Hugging Face names it), a single `.model`.
        end_of_document: Name of the token that ends documents; None: see `Tokenizer.end_of_document_id`.

    Raises:
        UserError: Nothing there, not one of these, or damaged.
    """
    path = Path(path)
    if not path.exists():
        raise UserError(f"tokenizer {path}: no such file or folder; give {_FORMATS}")
    if path.is_dir():
        for vocabulary, merges in (("encoder.json", "vocab.bpe"), ("vocab.json", "merges.txt")):
            if (path / vocabulary).is_file() and (path / merges).is_file():
                return _load_gpt2(path / vocabulary, path / merges, end_of_document)
            if (path / "tokenizer.json").is_file():
                return _load_json(path / "tokenizer.json", end_of_document)
        models = list(path.glob("*.model"))
        if len(models) == 1:
            return SentencePieceTokenizer(models[0], end_of_document)
    elif path.suffix == ".model":
        return SentencePieceTokenizer(path, end_of_document)
    elif path.suffix == ".json":
        return _load_json(path, end_of_document)
    raise UserError(f"tokenizer {path}: not a tokenizer; give {_FORMATS}")


def _load_json(path: Path, end_of_document: str | None) -> Tokenizer:
    import tokenizers

    content = _read_json(path)
    splitter = content.get("pre_tokenizer") or {}
    for part in (splitter, *splitter.get("pretokenizers", ())):
        if part.get("type") == "ByteLevel":
            # It would put a space before texts that have none, and decoding could not tell the two apart.
            part["add_prefix_space"] = False
    try:
        backend = tokenizers.Tokenizer.from_str(json.dumps(content))
    except Exception as error:  # the library raises nothing narrower
        raise UserError(f"{path}: not a tokenizer.json: {error}") from None
    return HuggingFaceTokenizer(backend, {"tokenizer.json": path}, end_of_document)


def _load_gpt2(vocabulary_path: Path, merges_path: Path, end_of_document: str | None) -> Tokenizer:
    from tokenizers import Tokenizer as Backend
    from tokenizers import decoders, models, pre_tokenizers

    vocabulary = _read_json(vocabulary_path)
    # Lines are split at "\n" alone: merges contain characters that Python takes for line ends.
    if not all(isinstance(i, int) for i in vocabulary.values()):
        raise UserError(f"{vocabulary_path}: must hold an id for each token")
    # Lines are split at "\n" alone: merges contain characters that Python takes for line ends.
    lines = _read_text(merges_path).split("\n")
    merges = []
    for number, line in enumerate(lines, start=1):
        left, _, right = line.partition(" ")
        if line and not (number == 1 and line.startswith("#version")):
            if not (left in vocabulary and right in vocabulary and left + right in vocabulary):
                raise UserError(f"{merges_path}:{number}: {line!r} does not fit {vocabulary_path.name}")
            merges.append((left, right))
    backend = Backend(models.BPE(vocab=vocabulary, merges=merges))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    # The file names differ between the two sources and the contents do not: the canonical names are the first ones.
    return HuggingFaceTokenizer(backend, {"encoder.json": vocabulary_path, "vocab.bpe": merges_path}, end_of_document)


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: invalid UTF-8 at byte {error.start}") from None


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(_read_text(path))
    except ValueError as error:
        raise UserError(f"{path}: not JSON: {error}") from None
    if not isinstance(content, dict):
        raise UserError(f"{path}: holds {type(content).__name__}, not a JSON object")
    return content
