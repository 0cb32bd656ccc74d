"""A build gives the same bytes however it is run, survives kills, and never leaves half a store under its name."""

import json
import pathlib
import random
import signal
import subprocess
import sys
import textwrap
import time

import numpy as np
import pytest
import tokenizers
from tokenizers import normalizers

from mtx.data import build, inputs
from mtx.data.build import build_store
from mtx.data.inputs import Selection
from mtx.data.store import open_store
from mtx.data.tokenizer import load_tokenizer
from mtx.errors import UserError


def contents(folder):
    """Path below the folder -> bytes."""
    return {str(p.relative_to(folder)): p.read_bytes() for p in pathlib.Path(folder).rglob("*") if p.is_file()}


@pytest.fixture
def corpus(tmp_path, random_texts, monkeypatch):
    """Folder of a jsonl, its gz twin under other ids, and text files: 60 blocks of work."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(build, "BLOCK_BYTES", 2000)
    monkeypatch.setattr(inputs, "_READ_BYTES", 1000)
    folder = tmp_path / "corpus"
    folder.mkdir()
    texts = [text + "x" for text in random_texts(1500, seed=3)]
    (folder / "a.jsonl").write_text(
        "".join(json.dumps({"id": f"a{i}", "text": text}) + "\n" for i, text in enumerate(texts))
    )
    for i, text in enumerate(texts[:30]):
        (folder / f"t{i:02}.txt").write_bytes(text.encode())
    return folder


@pytest.fixture
def run(tmp_path, sentencepiece_model):
    """run(inputs, out, **options): `build_store` with defaults."""

    def build_it(inputs, out, **options):
        options = {"tokenizer_path": str(sentencepiece_model), "selection": Selection(), "workers": 1} | options
        return build_store(inputs, out=tmp_path / out, **options)

    return build_it


def test_the_store_holds_the_documents(corpus, run, tmp_path, random_texts):
    built = run(["corpus"], "store", shard_tokens=8192)
    store = open_store(tmp_path / "store")
    texts = [text + "x" for text in random_texts(1500, seed=3)]
    texts += texts[:30]
    assert store.num_documents == len(texts) == built.manifest["counts"]["documents"]
    assert store.num_tokens > 8192  # several shards
    ids = [*(f"a{i}" for i in range(1500)), *(f"corpus/t{i:02}.txt" for i in range(30))]
    tokenizer = store.tokenizer()
    for i in random.Random(0).sample(range(len(texts)), 200):
        document = store.document(i)
        assert (document.id, tokenizer.decode(document.tokens)) == (ids[i], texts[i])
        assert (document.source, document.line) == (("corpus/a.jsonl", i + 1) if i < 1500 else (ids[i], 0))
    assert store.find_document("a77") == 77
    tokens = store.read_windows(np.array([0]), store.num_tokens)[0]
    assert (tokens[store.document_ends - 1] == store.end_of_document_id).all()
    assert (tokens == store.end_of_document_id).sum() == store.num_documents
    assert (
        store.tokenizer_fingerprint == tokenizer.fingerprint == load_tokenizer(tmp_path / "store/tokenizer").fingerprint
    )
    assert built.manifest["counts"]["text_bytes"] == sum(len(text.encode()) for text in texts)


def test_the_number_of_workers_changes_no_byte(corpus, run, tmp_path):
    run(["corpus"], "one")
    run(["corpus"], "two", workers=2)
    assert contents(tmp_path / "one") == contents(tmp_path / "two")
    assert not list(tmp_path.glob("*.building"))


SCRIPT = """
    import multiprocessing, os, pathlib, signal
    from mtx.data import build, inputs
    from mtx.data.inputs import Selection

    build.BLOCK_BYTES, inputs._READ_BYTES = 2000, 1000

    def die(progress):
        if progress.counts.documents > 700:
            print(*(child.pid for child in multiprocessing.active_children()), flush=True)
            os.kill(os.getpid(), signal.SIGKILL)

    if __name__ == "__main__":
        build.build_store(
            ["corpus"], tokenizer_path={model!r}, out=pathlib.Path("store"), selection=Selection(), workers={workers},
            on_progress=die,
        )
"""


@pytest.mark.parametrize("workers", [1, 2])
def test_a_killed_build_goes_on_where_it_was(corpus, run, tmp_path, sentencepiece_model, workers):
    script = tmp_path / "die.py"
    script.write_text(textwrap.dedent(SCRIPT.format(model=str(sentencepiece_model), workers=workers)))
    killed = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, timeout=120)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert not (tmp_path / "store").exists()
    with pytest.raises(UserError, match="its build did not finish"):
        open_store(tmp_path / "store")
    orphans = killed.stdout.split()
    assert len(orphans) == (0 if workers == 1 else 2)
    deadline = time.monotonic() + 30
    while any(pathlib.Path("/proc", pid).exists() for pid in orphans):
        assert time.monotonic() < deadline, "workers outlived the build"
        time.sleep(0.05)

    seen = []
    run(["corpus"], "store", workers=workers, on_progress=seen.append)
    assert seen[-1].reused_parts > 10
    run(["corpus"], "fresh")
    assert contents(tmp_path / "store") == contents(tmp_path / "fresh")


def test_parts_of_another_build_are_not_taken(corpus, run, tmp_path):
    run(["corpus"], "fresh", selection=Selection(select=("a*",)))

    def stop(progress):
        if progress.counts.documents > 700:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(["corpus"], "store", on_progress=stop)
    assert len(list((tmp_path / "store.building/parts").iterdir())) > 10
    seen = []
    run(["corpus"], "store", selection=Selection(select=("a*",)), on_progress=seen.append)
    assert seen[-1].reused_parts == 0
    assert contents(tmp_path / "store") == contents(tmp_path / "fresh")


def test_bad_records_stop_a_build_unless_they_are_allowed(run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    pathlib.Path("a.jsonl").write_text('{"text": "good"}\n{"text": 7}\n{"text": ""}\n{broken\n{"text": "good too"}\n')
    with pytest.raises(UserError, match="2 bad records, 1 allowed") as caught:
        run(["a.jsonl"], "store", max_bad=1)
    assert "a.jsonl:2: field 'text' is a JSON number, not a string" in str(caught.value)
    assert "a.jsonl:4: invalid JSON" in str(caught.value)
    assert not (tmp_path / "store").exists()
    seen = []
    built = run(["a.jsonl"], "store", max_bad=2, on_progress=seen.append)
    assert seen[-1].reused_parts == 1
    counts = built.manifest["counts"]
    assert (counts["documents"], counts["bad_records"], counts["empty_documents"]) == (2, 2, 1)
    assert [line.split(": ")[0] for line in built.bad] == ["a.jsonl:2", "a.jsonl:4"]
    assert (tmp_path / "store/bad_records.txt").read_text().splitlines() == built.bad


def test_nothing_is_overwritten(run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    pathlib.Path("a.txt").write_text("one")
    pathlib.Path("b.txt").write_text("two")
    run(["a.txt"], "store")
    before = contents("store")
    with pytest.raises(UserError, match="not overwritten"):
        run(["b.txt"], "store")
    assert contents("store") == before

    def appear(progress):
        pathlib.Path("late").mkdir()
        pathlib.Path("late/file").write_text("precious")

    with pytest.raises(UserError, match="came to exist during the build"):
        run(["b.txt"], "late", on_progress=appear)
    assert contents("late") == {"file": b"precious"}


def test_two_builds_of_one_store(run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    pathlib.Path("a.txt").write_text("one")

    def meddle(progress):
        with pytest.raises(UserError, match="another process is building"):
            run(["a.txt"], "store")

    run(["a.txt"], "store", on_progress=meddle)
    assert open_store("store").num_documents == 1


def test_inputs_that_change_during_the_build(run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    pathlib.Path("a.txt").write_text("one")
    with pytest.raises(UserError, match=r"a\.txt: changed while it was read"):
        run(["a.txt"], "store", on_progress=lambda progress: pathlib.Path("a.txt").write_text("other"))
    assert not (tmp_path / "store").exists()


def test_no_documents(run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    pathlib.Path("a.jsonl").write_text('{"text": "", "id": "x"}\n{"text": "t", "id": "y"}\n')
    with pytest.raises(UserError, match="no documents in 1 files: 1 empty, 1 not selected"):
        run(["a.jsonl"], "store", selection=Selection(select=("x",)))


def test_types_of_tokens(run, tmp_path, monkeypatch, bpe_json):
    monkeypatch.chdir(tmp_path)
    pathlib.Path("a.txt").write_text("some text")
    assert build.token_dtype(1 << 16) == np.uint16
    assert build.token_dtype((1 << 16) + 1) == np.uint32
    monkeypatch.setattr("mtx.data.encode.token_dtype", lambda vocab_size: np.dtype(np.uint32))
    monkeypatch.setattr("mtx.data.build.token_dtype", lambda vocab_size: np.dtype(np.uint32))
    run(["a.txt"], "store", tokenizer_path=str(bpe_json))
    store = open_store("store")
    assert store.manifest["dtype"] == "uint32"
    assert store.tokenizer().decode(store.document(0).tokens) == "some text"


def test_a_tokenizer_that_changes_text_is_found_out(run, tmp_path, monkeypatch, bpe_json):
    monkeypatch.chdir(tmp_path)
    pathlib.Path("a.txt").write_text("Some Text")
    backend = tokenizers.Tokenizer.from_file(str(bpe_json))
    backend.normalizer = normalizers.Lowercase()
    backend.save("lower.json")
    assert run(["a.txt"], "exact").manifest["counts"]["round_trips_inexact"] == 0
    counts = run(["a.txt"], "lower", tokenizer_path="lower.json").manifest["counts"]
    assert (counts["round_trips_checked"], counts["round_trips_inexact"]) == (1, 1)


def test_the_end_of_document_goes_with_the_store(run, tmp_path, monkeypatch, bpe_json):
    monkeypatch.chdir(tmp_path)
    pathlib.Path("a.txt").write_text("text")
    run(["a.txt"], "store", tokenizer_path=str(bpe_json), end_of_document="th")
    store = open_store("store")
    assert store.tokenizer().end_of_document_id == store.end_of_document_id == load_tokenizer(bpe_json).token_id("th")


def test_an_unreadable_input_is_named(run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    pathlib.Path("a.txt").write_text("text")
    monkeypatch.setattr(build, "read_blocks", lambda *_: pathlib.Path("absent/a.txt").read_bytes())
    with pytest.raises(UserError, match=r"absent/a\.txt: No such file"):
        run(["a.txt"], "store")
