"""The report: one file, well-formed, complete, and safe whatever a run directory holds."""

import html.parser
import json
import math
import re
from pathlib import Path
from typing import Any

import pytest

from mtx.errors import UserError
from mtx.health.journal import Journal
from mtx.reports.history import read_history
from mtx.reports.html import write_report
from mtx.reports.metrics import MetricsFile

VOID = {"meta", "br", "hr", "img", "input", "link"}


class Checker(html.parser.HTMLParser):
    """Collects the elements and the text of a page; a tag that does not close what is open is an error."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.seen: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.seen.append((tag, dict(attributes)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.seen.append((tag, dict(attributes)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if "style" not in self.open:
            self.text += data


def check(page: Path) -> Checker:
    checker = Checker()
    checker.feed(page.read_text(encoding="utf-8"))
    checker.close()
    assert checker.open == []
    return checker


def make_run(run_dir: Path, *, num_steps: int = 300, final: float = 2.0, name: str = "books") -> Path:
    """A run directory as a run leaves it, with an attempt that was lost from step 200 to 250."""
    run_dir.mkdir()
    (run_dir / "config.gin").write_text(
        f"Model.num_layers = 4  # default\nModel.d_model = 256\nModel.num_heads = 8\nTrain.steps = {num_steps}\n"
        "Data.train = {  # a\n    'stores/<a>': 1.0,\n}\n"
    )
    journal = Journal(run_dir, config_digest="abc")
    for start, end in [(0, 250), (200, num_steps)] if num_steps > 250 else [(0, num_steps)]:
        journal.record("start", parameters=3_200_000, devices=2, device_kind="<cpu>", mesh={"data": 2, "tensor": 1})
        if start:
            journal.record("resumed", step=start, seconds=0.5, proof={"arrays": "12 digests <equal>"})
        journal.record("compiled", seconds=0.0)
        metrics = MetricsFile(run_dir, start_step=start)
        for step in range(start + 1, end + 1):
            loss = final + 6 * math.exp(-step / 40)
            numbers = {"loss": loss, "grad_norm": 1.0, "learning_rate": 1e-3, "tokens_per_second": 640.0, "mfu": None}
            metrics.log({"step": step, "tokens": step * 64, "step_seconds": 0.1, **numbers})
            if step % 100 == 0:
                metrics.log({"step": step, "eval": name, "loss": loss + 0.1})
                journal.record("saved", step=step, seconds=0.5)
        metrics.close()
    journal.record("finished", step=num_steps)
    (run_dir / "samples.jsonl").write_text(json.dumps({"step": 300, "prompt": "Once", "text": " <script>x</script>"}))
    return run_dir


def test_report_of_one_run(tmp_path: Path) -> None:
    run_dir = make_run(tmp_path / "small")
    (figures,) = write_report([run_dir], tmp_path / "report.html")
    assert (figures["step"], figures["tokens"], figures["parameters"]) == (300, 19200, 3_200_000)
    assert figures["loss"] == 2.0 + 6 * math.exp(-300 / 40)
    assert figures["validation"] == {"books": figures["loss"] + 0.1}
    assert (figures["attempts"], figures["finished"]) == (2, True)
    assert figures["productive_seconds"] == pytest.approx(30.0)
    assert figures["lost_seconds"] == pytest.approx(5.0)
    assert figures["save_seconds"] == pytest.approx(1.5)
    page = check(tmp_path / "report.html")
    for text in ["small", "3.2M", "19.2k", f"{figures['loss']:.4f}", "2 x <cpu>", "3 checkpoints saved", "goodput"]:
        assert text in page.text
    assert " <script>x</script>" in page.text
    labels = [attributes["aria-label"] for tag, attributes in page.seen if tag == "svg" and "aria-label" in attributes]
    assert labels == ["Loss, nats per token", "Tokens per second", "Gradient norm", "Learning rate", "wall time"]


def test_report_needs_nothing_but_itself(tmp_path: Path) -> None:
    write_report([make_run(tmp_path / "small")], tmp_path / "report.html")
    page = check(tmp_path / "report.html")
    tags = {tag for tag, _ in page.seen}
    assert not tags & {"script", "link", "img", "iframe", "object", "embed"}
    for _, attributes in page.seen:
        assert not {"src", "href", "xlink:href"} & attributes.keys()
        assert not [name for name in attributes if name.startswith("on")]
    assert not re.search(r"url\(|@import|https?://", (tmp_path / "report.html").read_text())


def test_drawn_numbers_are_finite_and_curves_stay_in_their_plot(tmp_path: Path) -> None:
    write_report([make_run(tmp_path / "small")], tmp_path / "report.html")
    text = (tmp_path / "report.html").read_text()
    assert not re.search(r"[ \"L](nan|inf)\b", "".join(re.findall(r"<svg.*?</svg>", text)))
    paths = re.findall(r'<path class="line s\d" d="M([^"]*)"', text)
    assert len(paths) == 4
    for path in paths:
        xs = [float(place.split()[0]) for place in path.split("L")]
        assert xs == sorted(xs)
        assert min(xs) >= 58


def test_runs_are_compared(tmp_path: Path) -> None:
    runs = [make_run(tmp_path / "a"), make_run(tmp_path / "b", num_steps=120, final=3.0)]
    figures = write_report(runs, tmp_path / "both.html")
    assert [entry["name"] for entry in figures] == ["a", "b"]
    page = check(tmp_path / "both.html")
    assert "2 runs compared" in page.text
    assert "Train.steps300120" in page.text
    assert "Model.d_model" in page.text
    assert "Model.d_model256256" not in page.text


@pytest.mark.parametrize("num_steps", [0, 1, 2])
def test_a_run_that_just_began_has_a_report(tmp_path: Path, num_steps: int) -> None:
    run_dir = make_run(tmp_path / "small", num_steps=num_steps)
    (figures,) = write_report([run_dir], tmp_path / "report.html")
    assert figures["step"] == num_steps
    check(tmp_path / "report.html")
    for path in run_dir.iterdir():
        if path.name != "config.gin":
            path.unlink()
    (figures,) = write_report([run_dir], tmp_path / "report.html")
    assert figures["goodput"] is None
    assert "No loss" in check(tmp_path / "report.html").text


def test_a_diverged_run_has_a_report(tmp_path: Path) -> None:
    run_dir = make_run(tmp_path / "small", num_steps=20)
    metrics = MetricsFile(run_dir, start_step=20)
    metrics.log({"step": 21, "tokens": 21 * 64, "loss": math.nan, "grad_norm": math.inf, "step_seconds": 0.1})
    metrics.log({"step": 21, "eval": "books", "loss": math.nan})
    metrics.close()
    (figures,) = write_report([run_dir], tmp_path / "report.html")
    assert figures["loss"] is None
    check(tmp_path / "report.html")


def test_a_folder_that_is_no_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"holds no config\.gin"):
        read_history(tmp_path)


def test_commands(tmp_path: Path, capsys: Any) -> None:
    from mtx.cli import main

    run_dir = make_run(tmp_path / "small", num_steps=20)
    assert main(["report", str(run_dir), "--json"]) == 0
    answer = json.loads(capsys.readouterr().out)
    assert answer["report"] == str(run_dir / "report.html")
    assert answer["runs"][0]["step"] == 20
    assert (run_dir / "report.html").exists()
    assert main(["report", str(run_dir), "--out", str(run_dir / "config.gin")]) == 2
    assert main(["report", str(tmp_path)]) == 2
    assert "config.gin" in capsys.readouterr().err
    assert (run_dir / "config.gin").read_text().startswith("Model")
