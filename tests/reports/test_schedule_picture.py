"""The pictures of the documentation are what the schedules draw."""

import itertools
import pathlib
import re
import xml.etree.ElementTree as ElementTree

import pytest

from mtx.reports.schedule_picture import PICTURES, draw_schedule
from mtx.training.schedule import SCHEDULES, Task

DOCS = pathlib.Path(__file__).parents[2] / "docs"


@pytest.mark.parametrize("file", PICTURES)
def test_documentation_shows_what_is_drawn(file):
    name, *shape = PICTURES[file]
    drawn = draw_schedule(name, SCHEDULES[name](*shape))
    assert (DOCS / "pictures" / file).read_text() == drawn, "python -m mtx.reports.schedule_picture docs/pictures"
    assert f"pictures/{file}" in (DOCS / "parallelism.md").read_text()


def boxes(picture, name):
    """(left, top, width) of the boxes of a kind in the plot."""
    rects = [rect.attrib for rect in ElementTree.fromstring(picture).iter("{http://www.w3.org/2000/svg}rect")]
    return [
        tuple(float(rect[key]) for key in ("x", "y", "width"))
        for rect in rects
        if rect["class"] == name and rect["height"] != "14"
    ]


def test_a_picture_by_hand():
    tasks = [Task(0, 0, "forward", 0, 0), Task(1, 1, "forward", 0, 0)]
    tasks += [Task(1, 1, "backward", 0, 0), Task(2, 0, "backward", 0, 0)]
    picture = draw_schedule("a <name>", tasks)
    (first, second), (third, fourth) = boxes(picture, "forward"), boxes(picture, "backward")
    assert [box[0] - first[0] for box in (second, third, fourth)] == [17, 34, 68]
    assert first[1] == fourth[1] < second[1] == third[1]
    assert fourth[2] == third[2] == 2 * 17 - 1
    assert "a &lt;name&gt;, 2 stages, 1 microbatches: a bubble of 100 % of the work" in picture


@pytest.mark.parametrize("file", PICTURES)
def test_no_two_boxes_overlap(file):
    name, *shape = PICTURES[file]
    picture = draw_schedule(name, SCHEDULES[name](*shape))
    drawn = sorted((top, left, width) for kind in ("forward", "backward") for left, top, width in boxes(picture, kind))
    assert len(drawn) == 2 * shape[0] * shape[1] * shape[2]
    for (top, left, width), (next_top, next_left, _) in itertools.pairwise(drawn):
        assert top < next_top or left + width < next_left
    (_, _, width), *_ = boxes(picture, "idle")
    assert max(left + w for _, left, w in drawn) == pytest.approx(66.5 + width)
    assert re.search(r"37\.5 %|18\.75 %", picture)
