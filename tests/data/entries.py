"""Entries of made-up stores, for tests that need no tokens."""

from mtx.data.entry import Content, Entry

SAMPLES = {"a": 7, "b": 11, "c": 1000}


def make_entry(step=0, train=None, *, seq_len=10, batch=4, stages=None, ramp=None, content="", **rest):
    """An entry of made-up stores with SAMPLES; `content` makes them others."""
    train, stages = train or {"a": 1.0}, stages or {}
    paths = dict.fromkeys(path for blend in (train, *stages.values()) for path in blend)
    return Entry(
        step=step,
        seed=rest.pop("seed", 0),
        seq_len=seq_len,
        packing=rest.pop("packing", "windows"),
        global_batch_size=batch,
        batch_ramp=ramp,
        train=train,
        stages=stages,
        stores={path: Content(f"{content}{path}", SAMPLES[path] * 10 // seq_len) for path in paths},
        **rest,
    )


TWO, THREE = {"a": 0.7, "b": 0.3}, {"a": 1.0, "b": 1.0, "c": 3.0}
