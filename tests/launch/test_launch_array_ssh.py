"""Shards of a token store on two hosts that ssh reaches."""

import gzip
import os
import subprocess
import sys

from programs import ROOT
from ssh_hosts import servers  # noqa: F401 (a fixture)


def contents(folder):
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_a_token_store_over_ssh(servers, tmp_path):  # noqa: F811
    with gzip.open(ROOT / "texts/austen.jsonl.gz", "rt", encoding="utf-8") as file:
        rows = file.readlines()[:12]
    (tmp_path / "in").mkdir()
    for i in range(4):
        (tmp_path / f"in/{i}.jsonl").write_text("".join(rows[i * 3 : i * 3 + 3]))
    environment = {**os.environ, "XDG_STATE_HOME": str(tmp_path / "state")}
    mtx = [sys.executable, "-m", "mtx"]

    def call(*more):
        done = subprocess.run(more, capture_output=True, text=True, cwd=ROOT, env=environment, timeout=100, check=False)
        assert done.returncode == 0, done.stderr
        return done

    model = str(tmp_path / "t.model")
    call(*mtx, "tokenizer", "train", str(tmp_path / "in/0.jsonl"), "--vocab-size", "400", "--out", model, "--quiet")
    build = [*mtx, "data", "build", str(tmp_path / "in"), "--tokenizer", model, "--workers", "1", "--out"]
    call(*build, str(tmp_path / "plain"))
    flags = ["--hosts", "h[1-2]", "--ssh-config", str(servers.config), "--array", "4", "--backoff-s", "0.1"]
    done = call(sys.executable, "-m", "launch", "ssh", *flags, "--", *build, str(tmp_path / "store"))
    assert "launch: 4 of 4 done" in done.stderr
    hosts = {path.name.partition("-")[0] for path in (tmp_path / "store.launch/logs/hosts").iterdir()}
    assert hosts == {"h1", "h2"}  # both took part
    assert contents(tmp_path / "store") == contents(tmp_path / "plain")
