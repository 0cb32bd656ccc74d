"""Shards on many machines make the store that one machine makes, in any number and order, after kills and repeats."""

import gzip
import json
import pathlib
import random
import signal
import subprocess
import sys
import textwrap
import time

import pytest
import tokenizers
from tokenizers import normalizers

from mtx.cli import main
from mtx.data import build, inputs, shards
from mtx.data.build import build_store
from mtx.data.inputs import Selection, find_cuts, find_sources, read_blocks
from mtx.data.shards import build_shard, merge_shards, share_out
from mtx.errors import UserError

BLOCK = 2000


def contents(folder):
    """Path below the folder -> bytes."""
    return {str(p.relative_to(folder)): p.read_bytes() for p in pathlib.Path(folder).rglob("*") if p.is_file()}


def lines(texts, name):
    return "".join(json.dumps({"id": f"{name}{i}", "text": text}) + "\n" for i, text in enumerate(texts))


@pytest.fixture
def corpus(tmp_path, random_texts, monkeypatch):
    """Folder of files of every kind, some of many blocks and many of less than one, with bad records."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(build, "BLOCK_BYTES", BLOCK)
    monkeypatch.setattr(inputs, "_READ_BYTES", 500)
    folder = tmp_path / "corpus"
    folder.mkdir()
    texts = [text + "X" if i % 3 else f"word {i} " * 9 for i, text in enumerate(random_texts(900, seed=5))]
    (folder / "a.jsonl").write_text(lines(texts[:40], "a"))
    bad = lines(texts[40:600], "b").splitlines(keepends=True)
    bad[7] = bad[300] = bad[550] = '{"text": 7}\n'
    bad[400] = json.dumps({"text": "long " * 1500}) + "\n"  # a line of several blocks
    (folder / "b.jsonl").write_text("".join(bad))
    (folder / "c.jsonl.gz").write_bytes(gzip.compress(lines(texts[600:750], "c").encode()))
    (folder / "d.jsonl.gz").write_bytes(gzip.compress(lines(texts[750:], "d").encode())[:-2000])  # truncated
    for i in range(25):
        (folder / f"e{i:02}.txt").write_bytes(texts[i].encode() if i % 6 else b"")
        (folder / f"f{i:02}.jsonl").write_text(lines(texts[i * 3 : i * 3 + i % 4], f"f{i}"))
    (folder / "g.jsonl").write_text(lines(texts[:300], "g").rstrip("\n"))
    return folder


@pytest.fixture
def lower(tmp_path, bpe_json):
    """Path of a tokenizer that changes many texts."""
    backend = tokenizers.Tokenizer.from_file(str(bpe_json))
    backend.normalizer = normalizers.Lowercase()
    backend.save(str(tmp_path / "lower.json"))
    return tmp_path / "lower.json"


@pytest.fixture
def options(lower):
    return {"tokenizer_path": str(lower), "selection": Selection()}


def run_shard(options, shard, count, out="store", workers=1, **more):
    return build_shard(
        ["corpus"], out=pathlib.Path(out), shard=shard, num_shards=count, workers=workers, **options, **more
    )


def merge(options, out="store", max_bad=10, **more):
    return merge_shards(["corpus"], out=pathlib.Path(out), max_bad=max_bad, **options, **more)


@pytest.mark.parametrize("count", [1, 2, 3, 7, 40, 200])
def test_any_number_of_shards_in_any_order(corpus, options, count):
    plain = build_store(["corpus"], out=pathlib.Path("plain"), workers=1, max_bad=10, shard_tokens=8192, **options)
    order = random.Random(count).sample(range(count), count)
    for shard in order:
        run_shard(options, shard, count)
    again = run_shard(options, order[0], count)  # a repeat does nothing
    assert again.already
    assert again.parts == again.reused_parts
    built = merge(options, shard_tokens=8192)
    assert contents("store") == contents("plain")
    assert built == plain
    assert not list(pathlib.Path().glob("*.building"))
    counts = plain.manifest["counts"]
    assert 0 < counts["round_trips_inexact"] < counts["round_trips_checked"]  # the count that shards cannot make alone
    assert [line.split(": ")[0] for line in plain.bad[:3]] == [f"corpus/b.jsonl:{n}" for n in (8, 301, 551)]


def test_shards_are_alike_and_read_their_share_alone(corpus, options, monkeypatch):
    sources, _ = find_sources(["corpus/b.jsonl", "corpus/g.jsonl"])
    spans = share_out(sources, 4, BLOCK)
    sizes = [shards._stored_bytes(sources, span) for span in spans]
    assert sum(sizes) == sum(source.size_bytes for source in sources)
    assert max(sizes) < sum(sizes) / 4 + 9000  # the longest line, and a block
    assert min(sizes) > 0
    alone = [sum(len(segment.data) for block in read_blocks(sources, BLOCK, span) for segment in block.segments)
             for span in spans]  # fmt: skip
    assert all(read <= size for read, size in zip(alone, sizes))


def test_cuts_are_where_a_whole_reading_cuts(corpus):
    [source], _ = find_sources(["corpus/b.jsonl"])
    whole, position = [], 0
    for block in read_blocks([source], BLOCK):
        for segment in block.segments:
            position += len(segment.data) + 1
            whole.append((position, 2 * len(segment.data) >= BLOCK))
    cuts = [end for end, fills in whole if fills and end < source.size_bytes]
    assert len(cuts) > 10
    assert find_cuts(source, BLOCK, spacing=1) == cuts
    spaced = find_cuts(source, BLOCK, spacing=10_000)
    assert set(spaced) < set(cuts)
    assert all(after - before >= 10_000 for before, after in zip([0, *spaced], spaced))


def test_missing_shards_are_named(corpus, options):
    with pytest.raises(UserError, match=r"there is nothing to merge; run the same command with --shard 0/N"):
        merge(options)
    assert not pathlib.Path("store.building").exists()
    for shard in (0, 2, 4):
        run_shard(options, shard, 5)
    with pytest.raises(UserError, match=r"2 of 5 shards are not done; run --shard again for: 1/5 3/5$"):
        merge(options)
    run_shard(options, 1, 5)
    run_shard(options, 3, 5)
    next(pathlib.Path("store.building/parts/00002").iterdir()).unlink()
    with pytest.raises(UserError, match=r"1 of 5 shards are not done; run --shard again for: 2/5$"):
        merge(options)
    mended = run_shard(options, 2, 5)
    assert mended.parts - mended.reused_parts == 1
    merge(options)


def test_another_plan_stops_and_removes_nothing(corpus, options, sentencepiece_model):
    run_shard(options, 0, 3)
    before = contents("store.building")
    with pytest.raises(UserError, match="divided into 3 shards there, not 4; nothing was removed"):
        run_shard(options, 0, 4)
    with pytest.raises(UserError, match="made with another tokenizer"):
        run_shard({**options, "tokenizer_path": str(sentencepiece_model)}, 1, 3)
    with pytest.raises(UserError, match="another --field, --id-field or --select"):
        run_shard({**options, "selection": Selection(select=("a*",))}, 1, 3)
    with pytest.raises(UserError, match="of other inputs: 55 files, not these"):
        build_shard(["corpus/a.jsonl"], out=pathlib.Path("store"), shard=1, num_shards=3, workers=1, **options)
    with pytest.raises(UserError, match="holds the work of `--shard` commands; finish it with `--merge`"):
        build_store(["corpus"], out=pathlib.Path("store"), workers=1, **options)
    with (corpus / "g.jsonl").open("a") as file:
        file.write("\n")
    for use in (lambda: run_shard(options, 1, 3), lambda: merge(options)):
        with pytest.raises(UserError, match=r"corpus/g\.jsonl changed since \(its size or date\)"):
            use()
    assert contents("store.building") == before


def test_a_build_without_shards_is_not_taken_over(corpus, options):
    with pytest.raises(UserError, match="bad records, 0 allowed"):
        build_store(["corpus"], out=pathlib.Path("store"), workers=1, **options)
    before = contents("store.building")
    for use in (lambda: run_shard(options, 0, 3), lambda: merge(options)):
        with pytest.raises(UserError, match="holds a build without shards"):
            use()
    assert contents("store.building") == before


def plain(options, out="store"):
    return build_store(["corpus"], out=pathlib.Path(out), workers=1, max_bad=10, **options)


def test_who_may_be_there_at_the_same_time(corpus, options):
    seen = []

    def meddle(progress):
        if not seen:
            seen.append(1)
            run_shard(options, 1, 2)  # another shard
            run_shard(options, 0, 2)  # the same one again
            for use in (merge, plain):
                with pytest.raises(UserError, match="another process is building there"):
                    use(options)

    run_shard(options, 0, 2, on_progress=meddle)
    with build.locked(pathlib.Path("store.building")), pytest.raises(UserError, match="another process is building"):
        run_shard(options, 0, 2)
    merge(options)
    plain(options, "plain")
    assert contents("store") == contents("plain")


def test_a_file_system_without_locks(corpus, options, monkeypatch):
    def refuse(*_):
        raise OSError(build.errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr(build.fcntl, "flock", refuse)
    notes = []
    run_shard(options, 0, 1, on_note=notes.append)
    merge(options, on_note=notes.append)
    assert len(notes) == 2
    assert all("has no locks (Function not implemented)" in note for note in notes)


def test_a_merge_again(corpus, options, monkeypatch, tmp_path):
    run_shard(options, 0, 1)
    with monkeypatch.context() as patch:  # killed when the store has its name
        patch.setattr(shards.shutil, "rmtree", lambda path, **_: stop() if path.name.endswith(".building") else None)
        with pytest.raises(KeyboardInterrupt):
            merge(options)
    before, notes = contents("store"), []
    assert pathlib.Path("store.building").exists()
    built = merge(options, on_note=notes.append)
    assert "made from the same inputs; nothing is left to merge" in notes[0]
    assert built.manifest["counts"]["bad_records"] == len(built.bad) > 3
    assert not pathlib.Path("store.building").exists()
    assert run_shard(options, 0, 1).already
    with pytest.raises(UserError, match="exists already and was not made from these inputs"):
        merge({**options, "selection": Selection(select=("a*",))})
    with pytest.raises(UserError, match="exists already and was not made from these inputs"):
        run_shard({**options, "selection": Selection(select=("a*",))}, 0, 1)
    assert contents("store") == before


def stop():
    raise KeyboardInterrupt


def test_bad_records_and_changes_are_found_at_the_merge(corpus, options, monkeypatch):
    for shard in range(3):
        run_shard(options, shard, 3)
    with pytest.raises(UserError, match=r"4 bad records, 3 allowed.*\n  corpus/b.jsonl:8: .*\n  corpus/b.jsonl:301: "):
        merge(options, max_bad=3)
    assert merge(options, max_bad=4).manifest["counts"]["bad_records"] == 4


def test_a_source_that_changes_under_a_shard(corpus, options):
    def change(progress):
        with (corpus / "b.jsonl").open("a") as file:
            file.write("\n")

    with pytest.raises(UserError, match=r"b\.jsonl: changed while it was read"):
        run_shard(options, 0, 1, on_progress=change)
    assert not pathlib.Path("store.building/shards").exists()


SCRIPT = """
    import pathlib, sys, time
    from mtx.cli import main
    from mtx.data import build, encode_pool, inputs

    build.BLOCK_BYTES, inputs._READ_BYTES = 2000, 500
    slow = float(sys.argv.pop(1))
    Progress = encode_pool.Progress
    encode_pool.Progress = lambda **fields: time.sleep(slow) or Progress(**fields)
    if __name__ == "__main__":
        sys.exit(main(sys.argv[1:]))
"""


def test_killed_shards_go_on_where_they_were(corpus, options, tmp_path):
    (tmp_path / "slow.py").write_text(textwrap.dedent(SCRIPT))
    words = ["data", "build", "corpus", "--tokenizer", options["tokenizer_path"], "--out", "store", "--workers", "1"]
    random_source = random.Random(1)

    def command(slow, *more):
        return [sys.executable, "slow.py", str(slow), *words, *more]

    kills = 0
    for shard in range(2):
        for parts in (1, 6):
            process = subprocess.Popen(command(0.2, "--shard", f"{shard}/2"), stderr=subprocess.PIPE)
            deadline = time.monotonic() + 60
            folder = tmp_path / f"store.building/parts/{shard:05}"
            while len(list(folder.glob("*.npz"))) < parts and process.poll() is None:
                assert time.monotonic() < deadline
                time.sleep(random_source.random() * 0.02)
            process.send_signal(signal.SIGKILL)
            kills += process.wait() == -signal.SIGKILL
            process.stderr.close()
    assert kills == 4
    merging = subprocess.run(command(0, "--merge"), capture_output=True, text=True, check=False)
    assert (merging.returncode, merging.stdout) == (2, "")
    assert "2 of 2 shards are not done" in merging.stderr
    for shard in range(2):
        answer = subprocess.run(command(0, "--shard", f"{shard}/2", "--json"), capture_output=True, check=True)
        found = json.loads(answer.stdout)
        assert 6 <= found["reused_parts"] < found["parts"], found
        assert (found["shard"], found["shards"], found["already_done"]) == (shard, 2, False)
    merging = subprocess.run(command(0, "--merge", "--json", "--max-bad", "9"), capture_output=True, check=True)
    assert json.loads(merging.stdout)["bad_records"] == 4
    build_store(["corpus"], out=pathlib.Path("plain"), workers=2, max_bad=9, **options)
    assert contents("store") == contents("plain")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--shard", "0/2", "--merge"], "not allowed with argument"),
        (["--shard", "2/2"], "expected I/N with I from 0 to N-1, such as 0/64, not '2/2'"),
        (["--shard", "1"], "not '1'"),
        (["--shard", "-1/2"], "--shard"),
        (["--shard", "0/0"], "not '0/0'"),
        (["--shard", "a/b"], "not 'a/b'"),
        (["--merge"], "there is nothing to merge"),
        (["--merge", "--shard-tokens", "7"], "multiple of 8192"),
    ],
)
def test_mistakes(corpus, options, capsys, arguments, message):
    code = main(["data", "build", "corpus", "--tokenizer", options["tokenizer_path"], "--out", "s", *arguments])
    captured = capsys.readouterr()
    assert (code, captured.out) == (2, "")
    assert message in captured.err
    assert not pathlib.Path("s.building").exists()
