"""The commands: what they print, as text and as JSON, and the exit codes of mistakes."""

import json
import pathlib

import pytest

from mtx.cli import main
from mtx.data.store import open_store


@pytest.fixture
def run(capsys):
    """run(*arguments) -> exit code, stdout, stderr."""

    def call(*arguments):
        code = main([str(argument) for argument in arguments])
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return call


@pytest.fixture
def built(tmp_path, monkeypatch, sentencepiece_model, run):
    """A folder with a.jsonl of three documents and the store of two of them."""
    monkeypatch.chdir(tmp_path)
    lines = [
        {"id": f"{part}/{i}", "text": text}
        for i, (part, text) in enumerate([("t", "one"), ("v", "x"), ("t", "\0 two")])
    ]
    pathlib.Path("a.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    code, out, _ = run(
        "data", "build", "a.jsonl", "--tokenizer", sentencepiece_model, "--out", "store", "--select", "t/*"
    )
    assert code == 0
    assert "2 documents" in out
    assert "1 not selected" in out
    return tmp_path


def test_build_reports_json(built, run, sentencepiece_model):
    code, out, err = run("data", "build", "a.jsonl", "--tokenizer", sentencepiece_model, "--out", "s2", "--json")
    answer = json.loads(out)
    assert (code, err) == (0, "")
    assert (answer["documents"], answer["text_bytes"], answer["bad_records"]) == (3, 9, 0)
    assert answer["tokenizer_fingerprint"] == open_store("s2").tokenizer_fingerprint


def test_build_shows_what_it_left_out(built, run, sentencepiece_model):
    pathlib.Path("folder").mkdir()
    pathlib.Path("folder/a.jsonl").write_text('{"text": "good"}\n{}\n')
    pathlib.Path("folder/a.parquet").write_text("")
    arguments = ["data", "build", "folder", "--tokenizer", sentencepiece_model, "--out", "s3"]
    code, _, err = run(*arguments)
    assert code == 2
    assert "folder/a.jsonl:2: no field 'text'" in err
    code, out, err = run(*arguments, "--max-bad", "1")
    assert code == 0
    assert "1 bad" in out
    assert "folder/a.jsonl:2: no field 'text'" in err
    assert "folder/a.parquet" in err


def test_stats(built, run):
    code, out, _ = run("data", "stats", "store")
    assert code == 0
    assert "store: 2 documents" in out
    assert "1 not selected" in out
    code, out, _ = run("data", "stats", "store", "--json")
    answer = json.loads(out)
    assert (answer["documents"], answer["text_bytes"], answer["unselected_documents"]) == (2, 8, 1)
    lengths = sorted(len(open_store("store").document(i).tokens) for i in range(2))
    quantiles = answer["document_tokens_quantiles"]
    assert [quantiles["0"], quantiles["1"]] == lengths
    assert answer["document_tokens_mean"] == sum(lengths) / 2
    assert [source["path"] for source in answer["sources"]] == ["a.jsonl"]


def test_show(built, run):
    code, out, _ = run("data", "show", "store")
    header, text, end = out.split("\n")
    assert (code, text, end) == (0, "one", "")
    assert header.startswith("--- document 0  t/0  a.jsonl:1  ")
    code, out, _ = run("data", "show", "store", "--id", "t/2", "--json")
    [document] = json.loads(out)["documents"]
    assert (code, document["document"], document["line"], document["text"]) == (0, 1, 3, "\0 two")
    code, out, _ = run("data", "show", "store", "--document", "0", "--limit", "9", "--json")
    assert [d["id"] for d in json.loads(out)["documents"]] == ["t/0", "t/2"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["show", "store", "--document", "2"], "no document 2; it has 0 to 1"),
        (["show", "store", "--id", "v/1"], "no document has the id 'v/1'"),
        (["show", "absent"], "no such token store"),
        (["build", "a.jsonl", "--tokenizer", "absent.model", "--out", "s"], "no such file or folder"),
        (["build", "absent", "--tokenizer", "t.model", "--out", "s"], "no such file or folder"),
        (["build", "a.jsonl", "--out", "s"], "--tokenizer"),
        (["build", "a.jsonl", "--tokenizer", "t", "--out", "s", "--shard-tokens", "7"], "multiple of 8192"),
        (["build", "a.jsonl", "--tokenizer", "t", "--out", "store"], "exists already"),
    ],
)
def test_mistakes(built, run, arguments, message):
    code, out, err = run("data", *arguments)
    assert (code, out) == (2, "")
    assert message in err
    assert "Traceback" not in err


def test_tokenizer_train(built, run, chapters):
    pathlib.Path("text.txt").write_text(chapters[0])
    arguments = ["tokenizer", "train", "text.txt", "--vocab-size", "400", "--out", "t.model"]
    code, out, err = run(*arguments, "--json")
    assert code == 0
    assert json.loads(out)["vocab_size"] == 400
    code, out, err = run(*arguments)
    assert (code, out) == (2, "")
    assert "exists already" in err
    code, _, _ = run("data", "build", "text.txt", "--tokenizer", "t.model", "--out", "own", "--quiet")
    assert code == 0
    store = open_store("own")
    assert store.tokenizer().decode(store.document(0).tokens) == chapters[0]


def test_the_embedded_text(run, tmp_path, sentencepiece_model):
    """It is what its README says, and nothing of the validation book is in the training part."""
    texts = pathlib.Path(__file__).parents[2] / "texts"
    rows = [line.split("|")[1:-1] for line in (texts / "README.md").read_text().splitlines() if "/N` |" in line]
    described = {name.strip(" `"): (int(count), int(size.replace(",", ""))) for name, count, size in rows}
    build = ["data", "build", texts / "austen.jsonl.gz", "--tokenizer", sentencepiece_model, "--json", "--out"]
    for name, (documents, text_bytes) in described.items():
        code, out, _ = run(*build, tmp_path / name.split("/")[1], "--select", name.removesuffix("N") + "*")
        answer = json.loads(out)
        assert (code, answer["documents"], answer["text_bytes"]) == (0, documents, text_bytes)
        assert answer["unselected_documents"] == sum(count for count, _ in described.values()) - documents
    assert [name for name in described if name.startswith("validation/")] == ["validation/Persuasion/N"]
