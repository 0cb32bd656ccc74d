"""A store reads as it was written, and any damage to it is found and named."""

import json
import pathlib
import random
import shutil

import numpy as np
import pytest

from mtx.cli import main
from mtx.data import arrays
from mtx.data.arrays import CHUNK, ArrayReader, ArrayWriter
from mtx.data.batches import check_store
from mtx.data.store import open_store
from mtx.data.tokenizer import load_tokenizer
from mtx.errors import UserError


@pytest.mark.parametrize("length", [0, 1, CHUNK, 2 * CHUNK + 1, 5 * CHUNK + 17])
@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.uint32, np.int64])
def test_arrays_come_back(tmp_path, length, dtype):
    """Zeros too, which zarr would rather not store."""
    values = np.random.default_rng(0).integers(0, 200, length).astype(dtype)
    values[: length // 2] = 0
    writer = ArrayWriter(tmp_path / "a", dtype=np.dtype(dtype), length=length, shard=2 * CHUNK)
    for piece in np.array_split(values, 7):
        writer.append(piece)
    writer.close()
    reader = ArrayReader(tmp_path / "a")
    assert len(reader) == length
    assert reader.read().dtype == dtype
    np.testing.assert_array_equal(reader.read(), values)
    np.testing.assert_array_equal(reader.read(length // 3, length // 2), values[length // 3 : length // 2])


def test_an_array_of_the_wrong_length_is_not_closed(tmp_path):
    writer = ArrayWriter(tmp_path / "a", dtype=np.dtype(np.uint16), length=10, shard=CHUNK)
    writer.append(np.zeros(9, np.uint16))
    with pytest.raises(ValueError, match="9 elements were appended to an array of 10"):
        writer.close()


@pytest.fixture
def store(make_store, random_texts):
    return make_store([text + "." for text in random_texts(2000, seed=4)], shard_tokens=2 * CHUNK)


@pytest.mark.parametrize("cache_bytes", [0, 5 * CHUNK, 1 << 28])
def test_windows_and_spans(store, cache_bytes):
    store = open_store(store.path, cache_bytes=cache_bytes)
    everything = ArrayReader(store.path / "tokens").read().astype(np.int32)
    assert len(everything) == store.num_tokens > 3 * CHUNK
    rng = np.random.default_rng(0)
    for length in (1, 17, CHUNK + 5):
        starts = rng.integers(0, store.num_tokens - length + 1, 20)
        starts[0], starts[1] = 0, store.num_tokens - length
        windows = store.read_windows(starts, length)
        assert (windows.shape, windows.dtype) == ((20, length), np.int32)
        np.testing.assert_array_equal(windows, everything[starts[:, None] + np.arange(length)])
    starts, lengths = np.array([3, 0, store.num_tokens, 7]), np.array([0, CHUNK, 0, 1])
    np.testing.assert_array_equal(store.read_spans(starts, lengths), np.append(everything[:CHUNK], everything[7]))
    with pytest.raises(IndexError):
        store.read_windows(np.array([store.num_tokens]), 1)
    with pytest.raises(IndexError):
        store.read_windows(np.array([-1]), 1)


def files(folder):
    return sorted(path for path in pathlib.Path(folder).rglob("*") if path.is_file())


def test_verify_finds_a_flipped_byte_in_every_file(store, capsys):
    assert main(["data", "verify", str(store.path)]) == 0
    assert "whole" in capsys.readouterr().out
    rng = random.Random(0)
    names = [path for path in files(store.path) if path.stat().st_size]
    assert {path.name for path in names} > {"manifest.json", "0", "zarr.json", "sources.jsonl", "tokenizer.model"}
    for path in names:
        original = path.read_bytes()
        for position in (0, len(original) - 1, rng.randrange(len(original))):
            damaged = bytearray(original)
            damaged[position] ^= 1 << rng.randrange(8)
            path.write_bytes(damaged)
            assert main(["data", "verify", str(store.path)]) == 2
            assert str(path) in capsys.readouterr().err
        path.write_bytes(original)
    assert main(["data", "verify", str(store.path)]) == 0


def test_verify_finds_every_missing_or_truncated_file(store, capsys):
    for path in files(store.path):
        original = path.read_bytes()
        path.unlink()
        assert main(["data", "verify", str(store.path)]) == 2
        message = capsys.readouterr().err
        assert str(path) in message or path.name == "manifest.json"
        with pytest.raises(UserError):
            open_store(store.path)
        path.write_bytes(original + b"x")
        assert main(["data", "verify", str(store.path), "--json"]) == 2
        captured = capsys.readouterr()
        if path.name != "manifest.json":
            answer = json.loads(captured.out)
            assert not answer["ok"]
            [problem] = answer["problems"]
            assert problem.startswith(f"{path}: ")
        path.write_bytes(original)
    open_store(store.path)


def test_a_file_that_nobody_wrote_is_no_damage(store):
    (store.path / "notes.txt").write_text("mine")
    assert main(["data", "verify", str(store.path), "--quiet"]) == 0


@pytest.mark.parametrize("damage", ["flip", "remove"])
def test_reading_notices_damage_that_opening_cannot_see(store, damage):
    shard = store.path / "tokens/c/1"
    if damage == "flip":
        content = bytearray(shard.read_bytes())
        content[100] ^= 1
        shard.write_bytes(content)
    opened = open_store(store.path)
    if damage == "remove":
        shard.unlink()
    with pytest.raises(UserError, match=r"tokens: cannot be read.*(\n|.)*mtx data verify"):
        opened.read_windows(np.array([2 * CHUNK]), 100)


def test_the_specification_alone_would_not_notice_a_missing_shard(store, monkeypatch):
    """Why fill_missing_data_reads is off: the test above can fail."""
    (store.path / "tokens/c/1").unlink()
    spec = arrays._spec
    monkeypatch.setattr(arrays, "_spec", lambda path: spec(path) | {"fill_missing_data_reads": True})
    assert not ArrayReader(store.path / "tokens").read(2 * CHUNK, 3 * CHUNK).any()


def test_what_is_no_store(tmp_path, store):
    with pytest.raises(UserError, match=r"no such token store; make it with `mtx data build"):
        open_store(tmp_path / "absent")
    with pytest.raises(UserError, match=r"not a token store: it has no manifest\.json"):
        open_store(tmp_path)
    with pytest.raises(UserError, match="a file, not a token store"):
        open_store(store.path / "manifest.json")
    manifest = json.loads((store.path / "manifest.json").read_text())
    (store.path / "manifest.json").write_text(json.dumps(manifest))  # the same content in other bytes
    with pytest.raises(UserError, match=r"manifest\.json: changed since it was written"):
        open_store(store.path)
    (store.path / "manifest.json").write_text("[1]")
    with pytest.raises(UserError, match=r"manifest\.json: is not a manifest"):
        open_store(store.path)


def test_a_store_moves(store, tmp_path):
    shutil.move(store.path, tmp_path / "elsewhere")
    assert main(["data", "verify", str(tmp_path / "elsewhere")]) == 0
    assert open_store(tmp_path / "elsewhere").tokenizer().fingerprint == store.tokenizer_fingerprint


def test_stores_that_do_not_fit_the_run(store, sentencepiece_model, bpe_json):
    tokenizer = load_tokenizer(sentencepiece_model)
    check_store(store, key="Data.train", model_vocab_size=512, tokenizer=tokenizer)
    with pytest.raises(UserError, match=r"Model\.vocab_size = 499 .* Data\.train .* 500"):
        check_store(store, key="Data.train", model_vocab_size=499, tokenizer=tokenizer)
    with pytest.raises(UserError, match=r"Data\.validation .* another tokenizer .* Tokenizer\.path"):
        check_store(store, key="Data.validation", model_vocab_size=700, tokenizer=load_tokenizer(bpe_json))
    other_end = load_tokenizer(sentencepiece_model, end_of_document="a")
    with pytest.raises(UserError, match="ends documents with token 1"):
        check_store(store, key="Data.train", model_vocab_size=512, tokenizer=other_end)
