"""Small tokenizers, texts and stores for the tests of the data room."""

import gzip
import json
import pathlib
import random
from types import SimpleNamespace

import numpy as np
import pytest
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from mtx.config import schema
from mtx.data import integrity
from mtx.data.arrays import CHUNK, ArrayWriter
from mtx.data.build import build_store
from mtx.data.inputs import Selection
from mtx.data.store import FORMAT, VERSION, open_store
from mtx.data.tokenizer_training import train_sentencepiece

ROOT = pathlib.Path(__file__).parents[2]


@pytest.fixture(scope="session")
def chapters():
    """The texts of the first chapters of the embedded novels."""
    with gzip.open(ROOT / "texts/austen.jsonl.gz", "rt", encoding="utf-8") as file:
        return [json.loads(line)["text"] for line, _ in zip(file, range(12))]


@pytest.fixture(scope="session")
def sentencepiece_model(tmp_path_factory, chapters):
    """Path of a model of 500 pieces that `mtx tokenizer train` would make."""
    path = tmp_path_factory.mktemp("tokenizer") / "spm.model"
    train_sentencepiece(chapters, vocab_size=500, out=path)
    return path


@pytest.fixture(scope="session")
def bpe_json(tmp_path_factory, chapters):
    """Path of the tokenizer.json of a byte-level BPE that declares <|endoftext|> as a special token."""
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel()  # which adds a space before the text
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=600,
        special_tokens=["<|endoftext|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(chapters, trainer)
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    tokenizer.save(str(path))
    return path


@pytest.fixture(scope="session")
def gpt2_folder(tmp_path_factory, bpe_json):
    """The same BPE as GPT-2's two files."""
    folder = tmp_path_factory.mktemp("gpt2")
    model = json.loads(bpe_json.read_text(encoding="utf-8"))["model"]
    (folder / "encoder.json").write_text(json.dumps(model["vocab"]), encoding="utf-8")
    merges = "".join(f"{left} {right}\n" for left, right in model["merges"])
    (folder / "vocab.bpe").write_text("#version: 0.2\n" + merges, encoding="utf-8")
    return folder


@pytest.fixture
def make_store(tmp_path, sentencepiece_model):
    """Makes a store from texts: make_store(texts, name="store", **options of build_store) -> Store."""

    def make(texts, name="store", **options):
        source = tmp_path / f"{name}.jsonl"
        source.write_text("".join(json.dumps({"id": f"{name}/{i}", "text": t}) + "\n" for i, t in enumerate(texts)))
        options = {"tokenizer_path": str(sentencepiece_model), "selection": Selection(), "workers": 1} | options
        build_store([str(source)], out=tmp_path / name, **options)
        return open_store(tmp_path / name)

    return make


@pytest.fixture
def write_store(tmp_path):
    """Makes a store of documents of some lengths: write_store("name", lengths, seed=1) -> Store.

    Its tokens are random, or count from `first`, ends of documents included, so that each says where it is from.
    """

    def make(name, lengths, seed=0, first=None):
        path, ends = tmp_path / name, np.cumsum(np.asarray(lengths) + 1)
        tokens = np.random.default_rng(seed).integers(1, 500, ends[-1]).astype(np.uint16)
        tokens[ends - 1] = 0
        if first is not None:
            tokens = np.arange(first, first + ends[-1]).astype(np.uint16)
        ids = [f"{name}/{i}".encode() for i in range(len(ends))]
        arrays = {
            "tokens": tokens,
            "document_ends": ends.astype(np.int64),
            "id_ends": np.cumsum([len(i) for i in ids]).astype(np.int64),
            "id_bytes": np.frombuffer(b"".join(ids), np.uint8),
        }
        path.mkdir()
        for part, array in arrays.items():
            writer = ArrayWriter(path / part, dtype=array.dtype, length=len(array), shard=CHUNK)
            writer.append(array)
            writer.close()
        manifest = {"format": FORMAT, "version": VERSION, "dtype": "uint16", "num_tokens": int(ends[-1])}
        rest = {"num_documents": len(ends), "vocab_size": 1 << 16, "tokenizer_fingerprint": "", "end_of_document_id": 0}
        integrity.seal(path, manifest | rest)
        return open_store(path)

    return make


@pytest.fixture
def make_run():
    """The sections of a run that its data follow from: make_run({store: weight}, seq_len=8, stages={...}, ...)."""

    def make(train, *, stages=None, packing="windows", seq_len=16, batch=4, **rest):
        named = {key: {str(path): weight for path, weight in blend.items()} for key, blend in (stages or {}).items()}
        train = {str(path): weight for path, weight in train.items()}
        return SimpleNamespace(
            train=schema.Train(seq_len=seq_len, global_batch_size=batch, **rest),
            data=schema.Data(train=train, stages=named, packing=packing),
        )

    return make


def random_text(rng: random.Random, length: int) -> str:
    """Characters of every kind and plane, except surrogates; many of those that tokenizers treat in a special way."""
    special = "  \n\t\r\0\x1b\u2581\u2585\u2047\ufffd\ufeff\u200d\u0301\u00a0\u3000\U0001f926\U0010ffff<>|s0x"
    ranges = ((0, 0x80), (0x80, 0x3000), (0x3000, 0xD800), (0xE000, 0x10000), (0x10000, 0x110000))
    pieces = ["<|endoftext|>", "<s>", "</s>", "<unk>", "<0x41>", "<0xE2><0x96><0x81>", "\u2581\u2581", "\r\n", " the"]
    out = []
    for _ in range(length):
        kind = rng.randrange(4)
        if kind == 0:
            out.append(chr(rng.randrange(*rng.choice(ranges))))
        elif kind == 1:
            out.append(rng.choice(pieces))
        else:
            out.append(rng.choice(special))
    return "".join(out)


@pytest.fixture
def random_texts():
    """random_texts(count, seed) -> texts of 0 to 24 characters or pieces of them."""

    def make(count, seed):
        rng = random.Random(seed)
        return [random_text(rng, rng.randrange(25)) for _ in range(count)]

    return make
