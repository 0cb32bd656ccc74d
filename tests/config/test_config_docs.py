"""docs/config.md shows what really happens: its commands are run on its files. UPDATE_GOLDEN=1 rewrites the output."""

import os
import pathlib
import re
import shlex

from mtx import cli
from mtx.config.components import accepts, classes, components, sections, settings

PAGE = pathlib.Path(__file__).parents[2] / "docs" / "config.md"
BLOCK = re.compile(r"```(gin|console)\n(.*?)```\n", re.DOTALL)


def test_outputs_are_real(tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)

    def run(match):
        language, text = match.groups()
        if language == "gin":
            path = tmp_path / text.splitlines()[0].removeprefix("# ")
            path.parent.mkdir(exist_ok=True)
            path.write_text(text)
            return match[0]
        command = text.splitlines()[0]
        cli.main(shlex.split(command)[2:])
        captured = capfd.readouterr()
        return f"```console\n{command}\n{captured.out}{captured.err}```\n"

    page = PAGE.read_text()
    shown = BLOCK.sub(run, page)
    if os.environ.get("UPDATE_GOLDEN"):
        PAGE.write_text(shown)
    assert shown == PAGE.read_text()


def test_every_class_is_in_the_tables():
    tables = [line for line in PAGE.read_text().splitlines() if line.startswith("|")]
    assert {name for name in sections() if not any(line.startswith(f"| `{name}` |") for line in tables)} == set()
    for name, cls in components().items():
        takers = [s.key for c in classes().values() for s in settings(c).values() if accepts(s.annotation, cls)]
        rows = [line for line in tables if f"`{name}`" in line]
        assert len(rows) == 1, name
        assert any(f"`{key}`" in rows[0] or f"`{key.split('.')[1]}`" in rows[0] for key in takers), (name, takers)
