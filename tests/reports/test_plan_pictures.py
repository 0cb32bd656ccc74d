"""The pictures of plans: valid, true to their numbers, and whole for the least input that there can be."""

import math
import re
import xml.etree.ElementTree as ElementTree

import numpy as np
import pytest

from mtx.reports.accuracy_picture import Comparison, draw_accuracy
from mtx.reports.canvas import Scale, Swatch, draw_swatches, find_log_ticks, space_out, stand_alone
from mtx.reports.frontier_picture import Candidate, draw_frontier, find_frontier
from mtx.reports.memory_picture import MemoryBar, draw_memory
from mtx.reports.scaling_picture import Curve, draw_scaling
from mtx.reports.timeline_picture import draw_lanes, draw_parts
from mtx.training.schedule import one_f_one_b

GIB = 2**30
SVG = "{http://www.w3.org/2000/svg}"
HOSTILE = "</title><script>alert('x')</script>&\""


def parse(picture):
    """The picture as it stands alone: XML, with numbers for coordinates, all of them within its edges."""
    root = ElementTree.fromstring(stand_alone(picture))
    _, _, width, height = map(float, root.attrib["viewBox"].split())
    for shape in root.iter():
        for key, limit in (("x", width), ("x1", width), ("x2", width), ("cx", width), ("y", height), ("cy", height)):
            if key in shape.attrib and shape.tag != f"{SVG}pattern":
                assert 0 <= float(shape.attrib[key]) <= limit, shape.attrib
    return root


def boxes(root, title):
    """(left, width) of the boxes whose title contains a text."""
    return [
        (float(rect.attrib["x"]), float(rect.attrib["width"]))
        for rect in root.iter(f"{SVG}rect")
        if title in (rect.findtext(f"{SVG}title") or "")
    ]


def texts(root):
    return [text.text for text in root.iter(f"{SVG}text")]


def test_memory_stacks_parts_in_proportion_and_marks_what_is_too_much():
    bars = [
        MemoryBar("plan", {"parameters": 10 * GIB, "pipeline": 0, "activations": 30 * GIB}),
        MemoryBar("compiler", {"arguments": 10 * GIB, "temporaries": 10 * GIB}),
    ]
    root = parse(draw_memory(bars, 32 * GIB))
    ((left, width),) = boxes(root, "plan: parameters 10 GiB, 25.0%")
    ((next_left, next_width),) = boxes(root, "plan: activations 30 GiB")
    assert next_left == pytest.approx(left + width, abs=0.11)
    assert next_width == pytest.approx(3 * width, rel=0.01)
    assert not boxes(root, "pipeline")
    totals = {text.text: text.attrib["class"] for text in root.iter(f"{SVG}text") if "strong" in text.attrib["class"]}
    assert "bad" in totals["40 GiB"]
    assert "bad" not in totals["20 GiB"]
    (limit,) = (line for line in root.iter(f"{SVG}line") if line.attrib["class"] == "limit")
    assert float(limit.attrib["x1"]) == pytest.approx(left + 3.2 * width, abs=0.5)


@pytest.mark.parametrize("parts", [{}, {"parameters": 0}, {"parameters": 1}])
@pytest.mark.parametrize("capacity", [None, 80 * GIB])
def test_memory_of_next_to_nothing(parts, capacity):
    root = parse(draw_memory([MemoryBar("plan", parts)], capacity))
    assert "plan" in texts(root)


def test_parts_of_a_step_fill_its_width_and_communication_is_hatched():
    root = parse(draw_parts({"matmul": 6.0, "tensor": 3.0, "context": 0.0, "bubble": 1.0}))
    (matmul,), (tensor,), (bubble,) = (boxes(root, name) for name in ("matmul", "tensor", "bubble"))
    assert tensor[1] == pytest.approx(3 * bubble[1], rel=0.01)
    assert matmul[1] == pytest.approx(2 * tensor[1], rel=0.01)
    assert not boxes(root, "context")
    hatched = [float(rect.attrib["x"]) for rect in root.iter(f"{SVG}rect") if rect.attrib.get("fill") == "url(#hatch)"]
    assert tensor[0] in hatched
    assert matmul[0] not in hatched
    assert bubble[0] not in hatched
    assert "tensor 3 s (30.0%)" in texts(root)


def busy_spans(root, kind):
    """Of each lane, the drawn spans of a kind: dashes of its lines, as pixels."""
    lanes = {}
    for line in root.iter(f"{SVG}line"):
        if line.attrib.get("class") == kind and "stroke-dasharray" in line.attrib:
            dash, gap = map(float, line.attrib["stroke-dasharray"].split())
            x1, x2 = float(line.attrib["x1"]), float(line.attrib["x2"])
            at = x1 - float(line.attrib["stroke-dashoffset"])
            while at < x2 - 1e-3:
                start, end = max(at, x1), min(at + dash, x2)
                if end - start > 0.5:
                    lanes.setdefault(line.attrib["y1"], []).append((start, end))
                at += dash + gap
    return [sorted(spans) for _, spans in sorted(lanes.items(), key=lambda lane: float(lane[0]))]


@pytest.mark.parametrize("shape", [(4, 1, 8), (4, 2, 8), (3, 1, 1), (2, 3, 4), (1, 1, 5)])
def test_lanes_are_the_schedule(shape):
    root = parse(draw_lanes(*shape, forward_s=1.0, backward_s=2.0, tail={}))
    tasks = one_f_one_b(*shape)
    ticks = 1 + max(task.tick for task in tasks)
    lasting = {kind: {task.tick for task in tasks if task.kind == kind} for kind in ("forward", "backward")}
    starts, now = {}, 0.0
    for tick in range(ticks):
        for kind, length in (("forward", 1.0), ("backward", 2.0)):
            if tick in lasting[kind]:
                starts[tick, kind] = now
                now += length
    left = min(start for spans in busy_spans(root, "s0") for start, _ in spans)
    right = max(end for spans in busy_spans(root, "s2") for _, end in spans)
    pixels = (right + 1 - left) / now  # dashes of units that can be seen end a pixel early
    for kind, color, length in (("forward", "s0", 1.0), ("backward", "s2", 2.0)):
        lanes = busy_spans(root, color)
        assert len(lanes) == shape[0]
        for stage, spans in enumerate(lanes):
            wanted = sorted(starts[task.tick, kind] for task in tasks if (task.stage, task.kind) == (stage, kind))
            assert len(spans) == len(wanted)
            for (start, end), at in zip(spans, wanted):
                assert start - left == pytest.approx(at * pixels, abs=0.4)
                assert end - start == pytest.approx(length * pixels - 1, abs=0.4)


def test_lanes_of_a_long_step_stay_small_and_end_with_what_follows():
    picture = draw_lanes(35, 1, 4800, forward_s=0.06, backward_s=0.14, tail={"data": 100.0, "optimizer": 0.0})
    assert len(picture) < 60_000
    root = parse(picture)
    ((left, width),) = boxes(root, "data")
    assert left + width == pytest.approx(1080 - 12, abs=0.1)
    idle = max(boxes(root, ""), key=lambda box: box[1])
    assert width / idle[1] == pytest.approx(100 / ((4800 + 34) * 0.2), rel=0.02)
    assert not boxes(root, "optimizer")
    dashes = [line.attrib["stroke-dasharray"] for line in root.iter(f"{SVG}line") if "stroke-dasharray" in line.attrib]
    striped = [sum(map(float, dash.split())) for dash in dashes if not dash.endswith(" 0.000")]
    assert striped
    assert min(striped) > 2


def test_scaling_draws_points_and_perfect_scaling():
    curve = Curve(label="batch", points=[(32, 2.0), (8, 5.0), (16, 3.0)], ideal="inverse")
    measured = Curve(label="batch", points=[(8, 6.0)], is_measured=True)
    root = parse(draw_scaling("s", [curve, measured], unit="s", format_y="{:g}".format, names=("s0", "s0")))
    told = [circle.findtext(f"{SVG}title") for circle in root.iter(f"{SVG}circle")]
    assert told[:3] == ["batch: 5 s on 8 GPUs", "batch: 3 s on 16 GPUs", "batch: 2 s on 32 GPUs"]
    assert told[3:] == ["batch, measured: 6 s on 8 GPUs"]
    line, ideal = (
        [tuple(map(float, place.split())) for place in path.attrib["d"][1:].split("L")]
        for path in sorted(root.iter(f"{SVG}path"), key=lambda path: path.attrib["class"], reverse=True)
    )
    assert ideal[0] == line[0]
    assert ideal[1][0] == line[2][0]
    per_factor = (line[1][1] - line[0][1]) / math.log(3 / 5)
    assert ideal[1][1] - line[0][1] == pytest.approx(per_factor * math.log(1 / 4), abs=0.5)
    assert {"8", "16", "32"} <= set(texts(root))


def test_scaling_on_one_number_of_gpus_and_in_shares():
    root = parse(draw_scaling("s", [Curve(label="a", points=[(8, 0.4)])], unit="MFU", is_log=False))
    assert len(list(root.iter(f"{SVG}circle"))) == 1
    assert "8" in texts(root)


def candidate(memory, seconds, *, fits=True, label="l", reason=""):
    return Candidate(label=label, memory_bytes=memory * GIB, seconds=seconds, fits=fits, reason=reason)


def test_frontier_is_what_nothing_beats():
    rng = np.random.default_rng(0)
    drawn = [candidate(m, s, fits=m < 70) for m, s in rng.uniform(1, 100, (60, 2))]
    front = find_frontier(drawn)
    for c in drawn:
        beaten = any(
            o.fits and o.memory_bytes <= c.memory_bytes and o.seconds <= c.seconds and o is not c for o in drawn
        )
        assert (c in front) == (c.fits and not beaten)
    assert find_frontier([candidate(1, 5), candidate(1, 5), candidate(2, 5)]) == [candidate(1, 5)]


def test_frontier_names_the_fastest_and_says_why_others_are_out():
    drawn = [candidate(20, 3.0, label="fast"), candidate(10, 4.0, label="small")]
    drawn.append(candidate(200, 1.0, fits=False, label="huge", reason="120 GiB too much"))
    root = parse(draw_frontier(drawn, 80 * GIB))
    assert "fast: 3 s, 20 GiB" in texts(root)
    assert {"2 fit", "1 do not", "2 that none beats in both"} <= set(texts(root))
    told = [path.findtext(f"{SVG}title") for path in root.iter(f"{SVG}path")]
    assert "huge: 1 s a step, 200 GiB per GPU; 120 GiB too much" in told


@pytest.mark.parametrize("fits", [True, False])
def test_frontier_of_one(fits):
    root = parse(draw_frontier([candidate(3000, 3.0, fits=fits, reason="")], 80 * GIB))
    assert len(list(root.iter(f"{SVG}circle"))) == (2 if fits else 0)


def test_accuracy_puts_right_plans_on_the_diagonal():
    points = [
        Comparison(label="right", group="a", measured=3.0, planned=3.0),
        Comparison(label="slow", group="b", measured=10.0, planned=11.0),
    ]
    root = parse(draw_accuracy(points, unit="s"))
    right, slow = root.iter(f"{SVG}circle")
    diagonal = next(line for line in root.iter(f"{SVG}line") if line.attrib["x1"] != line.attrib["x2"] and
                    line.attrib["y1"] != line.attrib["y2"] and line.attrib["class"] == "axis")  # fmt: skip
    x1, x2, y1, y2 = (float(diagonal.attrib[key]) for key in ("x1", "x2", "y1", "y2"))

    def above(circle):
        share = (float(circle.attrib["cx"]) - x1) / (x2 - x1)
        return y1 + share * (y2 - y1) - float(circle.attrib["cy"])

    assert abs(above(right)) < 0.2
    assert above(slow) > 5
    assert slow.findtext(f"{SVG}title") == "slow: measured 10, planned 11 (+10.0%)"
    parse(draw_accuracy(points[:1], unit="s"))


def test_hostile_names_stay_text():
    pictures = [
        draw_memory([MemoryBar(HOSTILE, {HOSTILE: GIB})], GIB, title=HOSTILE),
        draw_parts({HOSTILE: 1.0}, title=HOSTILE),
        draw_lanes(2, 1, 2, forward_s=1.0, backward_s=2.0, tail={HOSTILE: 1.0}, title=HOSTILE),
        draw_scaling(HOSTILE, [Curve(label=HOSTILE, points=[(1, 1.0)])], unit=HOSTILE),
        draw_frontier([candidate(1, 1.0, label=HOSTILE), candidate(2, 2.0, fits=False, reason=HOSTILE)], GIB),
        draw_accuracy([Comparison(label=HOSTILE, group=HOSTILE, measured=1, planned=1)], unit=HOSTILE, title=HOSTILE),
    ]
    for picture in pictures:
        assert "<script" not in picture
        assert HOSTILE in "".join(parse(picture).itertext()).replace("_", " ")


@pytest.mark.parametrize(
    ("low", "high", "count", "ticks"),
    [
        (1, 100, 8, [1, 2, 5, 10, 20, 50, 100]),
        (0.7, 2e4, 6, [1, 10, 100, 1000, 1e4]),
        (3, 3.4, 5, [3, 3.1, 3.2, 3.3, 3.4]),
        (3, 3, 5, [3]),
        (1e-12, 1e12, 4, [1e-12, 1e-5, 1e2, 1e9]),
    ],
)
def test_log_ticks_are_round(low, high, count, ticks):
    assert find_log_ticks(low, high, count) == pytest.approx(ticks)


def test_scales_keep_within_their_ends():
    scale = Scale.around([10.0, 1000.0], 0.0, 100.0, is_log=True)
    assert scale(100.0) == pytest.approx(50, abs=0.1)
    assert scale(1e9) == 100
    assert scale(0.0) == 0
    assert Scale.around([0.0], 0.0, 100.0)(0.0) == 0
    assert space_out([0, 10, 30, 45, 90], 25) == [0, 2, 4]


def test_legends_break_their_lines():
    parts, bottom = draw_swatches([Swatch("s0", "x" * 60)] * 4, 10, 8, 1000)
    tops = sorted({float(top) for top in re.findall(r'<rect[^>]* y="([\d.]+)"', "".join(parts))})
    assert tops == [8, 28]
    assert bottom == 48
