"""The course of a run, against a simulation that walks it sample by sample."""

import itertools

import numpy as np
import pytest
from data.entries import SAMPLES, THREE, TWO, make_entry

from mtx.config.schema import BatchRamp
from mtx.config.stages import parse_begin
from mtx.data import ledger
from mtx.data.batches import Batches
from mtx.data.blend import Blend
from mtx.data.course import Course, in_force
from mtx.data.entry import Entry
from mtx.data.samples import Sources
from mtx.data.shuffle import permute, unpermute


def walk(entries, steps):
    """What each step reads, as (digest, seed/source number/epoch, place), by counting alone; tokens before each."""
    numbers, given, regime, before = {}, {}, {}, []
    for entry in entries:
        for content in entry.stores.values():
            numbers.setdefault(content.digest, len(numbers))
    tokens, drawn, last, read = 0, 0, None, []
    for step in range(steps):
        entry = [entry for entry in entries if entry.step <= step][-1]
        blend = entry.train
        for key, staged in entry.stages.items():
            amount, unit = parse_begin(key)
            if (step if unit == "steps" else tokens) >= amount:
                blend = staged
        if step == entry.step:
            for digest, num_samples in ((content.digest, content.num_samples) for content in entry.stores.values()):
                was = regime.get(digest, (entry.order, num_samples))
                if was[0] != entry.order:
                    given[digest] = (given[digest] + was[1] - 1) // was[1] * num_samples
                regime[digest] = entry.order, num_samples
                given.setdefault(digest, 0)
        now = [(entry.stores[path].digest, weight) for path, weight in blend.items()]
        if now != last:
            drawn, last = 0, now
        mix = Blend([weight for _, weight in now])
        if step == entry.step:
            drawn = draw(mix, now, drawn, entry.skipped_samples, given)[1]
        size, ramp = entry.global_batch_size, entry.batch_ramp
        if ramp:
            increments = (size - ramp.start) // ramp.increment
            size = ramp.start + ramp.increment * min(increments, tokens * increments // ramp.tokens)
        before.append(tokens)
        rows, drawn = draw(mix, now, drawn, size, given)
        places = [(digest, *divmod(position, regime[digest][1])) for digest, position in rows]
        read.append([(digest, f"{entry.seed}/{numbers[digest]}/{epoch}", place) for digest, epoch, place in places])
        tokens += size * entry.seq_len
    return read, before


def draw(mix, blend, drawn, count, given):
    """So many samples one by one, each counted in `given`; and how many the blend has given then."""
    rows = []
    for _ in range(count):
        digest = blend[int(mix.locate(np.array([drawn]))[0][0])][0]
        rows.append((digest, given[digest]))
        given[digest] += 1
        drawn += 1
    return rows, drawn


def read(course, step, rows=None):
    rows = np.arange(course.size(step)) if rows is None else rows
    out = [None] * len(rows)
    for draw in course.draws(step, rows):
        for row, epoch, place in zip(draw.rows.tolist(), draw.epochs.tolist(), draw.places.tolist()):
            out[row] = draw.digest, f"{course.entry(step).seed}/{draw.source}/{epoch}", place
    return out


COURSES = {
    "stages": [make_entry(0, TWO, stages={"5 steps": {"b": 1.0, "c": 1.0}, "9e2 tokens": {"c": 2.0, "a": 1.0}})],
    "same blend goes on": [make_entry(0, TWO), make_entry(7, TWO, batch=3), make_entry(9, TWO, batch=5)],
    "a store leaves and comes back": [
        make_entry(0, TWO),
        make_entry(4, {"c": 1.0}),
        make_entry(9, {"b": 2.0, "a": 1.0}),
        make_entry(11, TWO),
    ],
    "stages begin before a later entry, and within it": [
        make_entry(0, TWO),
        make_entry(8, {"b": 1.0}, stages={"3 steps": THREE, "10 steps": {"c": 1.0}, "800 tokens": TWO}),
        make_entry(22, {"b": 1.0}, stages={"100 tokens": {"c": 1.0}}),
    ],
    "a stage that a later one overtakes": [
        make_entry(0, TWO, stages={"30 steps": {"a": 1.0}, "200 tokens": {"b": 1.0}, "12 steps": THREE})
    ],
    "skips": [
        make_entry(0, TWO, skipped_samples=3, cause="x"),
        make_entry(5, TWO, skipped_samples=17, cause="x"),
        make_entry(6, THREE, skipped_samples=30, cause="x"),
    ],
    "another order": [
        make_entry(0, THREE),
        make_entry(6, THREE, seq_len=5),
        make_entry(9, {"c": 1.0}, seed=4, seq_len=5),
        make_entry(12, TWO, seed=4, seq_len=5, packing="documents", skipped_samples=2, cause="x"),
        make_entry(15, THREE, seed=9, seq_len=20),
    ],
    "ramps": [
        make_entry(0, TWO, batch=10, ramp=BatchRamp(start=2, increment=2, tokens=900)),
        make_entry(7, TWO, batch=10, seq_len=5, ramp=BatchRamp(start=4, increment=1, tokens=700)),
        make_entry(12, TWO, batch=6, ramp=BatchRamp(start=1, increment=1, tokens=20_000)),
    ],
    "other content under the same path": [make_entry(0, TWO), make_entry(3, TWO, content="new "), make_entry(6, TWO)],
}


@pytest.mark.parametrize("name", COURSES)
def test_a_course_is_what_walking_it_gives(name):
    entries, steps = COURSES[name], 40
    course = Course(entries)
    expected, tokens = walk(entries, steps)
    assert [course.size(step) for step in range(steps)] == [len(rows) for rows in expected]
    assert [course.tokens(step) for step in range(steps)] == tokens
    samples = [0, *itertools.accumulate(map(len, expected))][:steps]
    assert [course.first_sample(step) for step in range(steps)] == samples
    for step in (39, 0, *range(steps)):
        assert read(course, step) == expected[step], step
    for wanted in range(0, tokens[-1], 7):
        assert course.step_at_tokens(wanted) == next(step for step, known in enumerate(tokens) if known >= wanted)
    assert course.max == entries[-1].global_batch_size


def random_entries(rng):
    entries, step = [], 0
    for _ in range(rng.integers(1, 5)):
        paths = rng.permutation(list(SAMPLES))
        blends = [
            {str(path): float(weight) for path, weight in zip(paths[: rng.integers(1, 4)], rng.uniform(0.2, 3, 3))}
            for _ in range(3)
        ]
        keys = [f"{rng.integers(1, 40)} steps", f"{rng.integers(1, 2000)} tokens"]
        ramp = BatchRamp(start=1, increment=2, tokens=int(rng.integers(1, 2000))) if rng.random() < 0.5 else None
        entries.append(
            make_entry(
                step,
                blends[0] if rng.random() < 0.6 or not entries else entries[-1].train,
                stages=dict(zip(keys, blends[1:])) if rng.random() < 0.6 else None,
                batch=7 if ramp else int(rng.integers(1, 9)),
                ramp=ramp,
                seq_len=int(rng.choice([5, 10])),
                seed=int(rng.integers(2)),
                skipped_samples=int(rng.integers(30)) if rng.random() < 0.4 else 0,
            )
        )
        step += int(rng.integers(1, 15))
    return entries


@pytest.mark.parametrize("seed", range(25))
def test_random_courses(seed):
    rng = np.random.default_rng(seed)
    entries = random_entries(rng)
    course, (expected, tokens) = Course(entries), walk(entries, 45)
    assert [read(course, step) for step in range(45)] == expected
    assert [course.tokens(step) for step in range(45)] == tokens
    # Any split of a step over processes, each of which may ask for any rows, is the same step.
    step = int(rng.integers(45))
    rows = rng.permutation(course.size(step))
    parts = [read(course, step, part) for part in np.array_split(rows, 3)]
    assert list(itertools.chain(*parts)) == [expected[step][row] for row in rows]
    # The ledger counts what was read.
    ledger = course.ledger(step)
    counts = {source["digest"]: source["samples"] for source in ledger["sources"]}
    rows = [digest for rows in expected[:step] for digest, _, _ in rows]
    assert counts == {digest: rows.count(digest) for digest in counts}
    assert (ledger["samples"], ledger["tokens"]) == (len(rows), tokens[step])


def test_no_sample_is_lost_or_twice():
    """In an epoch of a store, over stages, another batch size, another blend and a store that comes later."""
    entries = [
        make_entry(0, {"c": 1.0, "a": 1.0}, stages={"9 steps": {"c": 3.0, "b": 1.0}, "1000 tokens": {"c": 1.0}}),
        make_entry(50, {"b": 1.0, "c": 2.0}, batch=6),
        make_entry(90, {"b": 5.0, "c": 1.0, "a": 2.0}, batch=9, stages={"200 steps": {"c": 1.0}}),
    ]
    course = Course(entries)
    places = [
        place for step in range(400) for digest, key, place in read(course, step) if (digest, key) == ("c", "0/0/0")
    ]
    assert places == list(range(1000))


def test_a_skip_passes_over_what_the_steps_would_have_read():
    entries = [make_entry(0, {"a": 0.7, "c": 0.3}, batch=5)]
    plain = Course(entries)
    first = ledger.skip(entries, 10, 13, "a spike")
    assert (first.step, first.skipped_samples, first.cause) == (10, 15, "a spike")
    entries = in_force([*entries, first])
    skipped = Course(entries)
    assert [read(skipped, step) for step in range(10)] == [read(plain, step) for step in range(10)]
    assert [read(skipped, step) for step in range(10, 30)] == [read(plain, step) for step in range(13, 33)]
    assert skipped.tokens(20) == plain.tokens(20)
    totals = skipped.ledger(20)
    assert (totals["samples"], totals["tokens"], totals["skipped_samples"]) == (100, 1000, 15)
    a = totals["sources"][0]
    assert a["epochs"] == (a["samples"] + a["skipped_samples"]) / 7
    # Back to the same step: both windows. Back to an earlier one: all that was read or skipped since.
    again = ledger.skip(entries, 10, 12, "another")
    assert read(Course([*entries, again]), 10) == read(plain, 15)
    earlier = ledger.skip(entries, 8, 12, "another")
    assert (earlier.step, earlier.skipped_samples) == (8, 4 * 5 + 15)
    assert read(Course([*entries, earlier]), 8) == read(plain, 15)
    assert read(Course([*entries, earlier]), 7) == read(plain, 7)


def test_later_entries_supersede():
    steps = [0, 30, 100, 50, 50, 20, 60]
    entries = [make_entry(step, batch=number + 1) for number, step in enumerate(steps)]
    assert [entry.step for entry in in_force(entries)] == [0, 20, 60]
    assert [entry.global_batch_size for entry in in_force(entries[:5])] == [1, 2, 5]
    assert Course(entries).size(55) == 6
    with pytest.raises(ValueError, match="from step 0"):
        Course(entries[1:2])
    with pytest.raises(ValueError, match="from 0"):
        Course(entries).size(-1)


def test_a_permutation_is_undone():
    for length in (1, 5, 16, 1000, 10**12 + 7):
        indices = np.unique(np.random.default_rng(0).integers(0, length, 50))
        np.testing.assert_array_equal(unpermute(permute(indices, length, "3/1/4"), length, "3/1/4"), indices)


@pytest.mark.parametrize("weights", [[1.0], [0.7, 0.3], [5, 1e-3, 2, 0.4]])
def test_a_blend_is_undone(weights):
    mix, samples = Blend(weights), np.append(np.arange(70_000), 10**13 + np.arange(9))
    sources, positions = mix.locate(samples)
    for source in range(len(weights)):
        mine = sources == source
        np.testing.assert_array_equal(mix.find(source, positions[mine]), samples[mine])


@pytest.mark.parametrize("packing", ["windows", "documents"])
def test_batches_of_a_course(write_store, make_run, packing):
    """Tokens, over a stage that begins, for every split of the rows: as each source alone would give them."""
    a, b = (write_store(name, [9, 30, 5] * 20, seed=seed) for seed, name in enumerate("ab"))
    run = make_run({a.path: 3.0, b.path: 1.0}, stages={"6 steps": {b.path: 1.0}}, packing=packing, batch=6)
    opened = Sources()
    batches = Batches(Course([Entry.of(run, opened, 0)]), opened)
    for step in range(12):
        whole = batches.read(step)
        parts = [batches.read(step, rows) for rows in (slice(0, 1), slice(1, 4), [4, 5], slice(0, 0))]
        for name, array in whole.items():
            np.testing.assert_array_equal(np.concatenate([part[name] for part in parts]), array)
    samples = opened.samples(b, 16, packing)
    numbers = permute(np.arange(9, 15), len(samples), "0/1/0")  # 6 steps of 6 gave 9 of b
    for name, array in samples.read(numbers).items():
        np.testing.assert_array_equal(batches.read(6)[name], array)


def test_the_blend_in_force():
    course = Course([make_entry(0, TWO, stages={"5 steps": THREE})])
    assert (course.blend(4), course.blend(5)) == (TWO, THREE)
