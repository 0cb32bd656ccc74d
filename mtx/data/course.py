"""The data course of a run: which samples each step reads, over all changes of the data settings.

    entries (`ledger.py`)  -> stretches of steps with one blend    stages begin, and entries supersede, at known steps
    step and row           -> source, position in it               by the blend in force (`blend.py`), from where each
                                                                   source stood when it came into force
    position               -> epoch, place in it                   an epoch is every sample of the source once

Every source keeps a position of its own, the number of samples that it has given: over stages, resumes with another
blend, and skips. Sources are known by the digest of their store and numbered in the order in which they first appear.
Where seed, seq_len or packing change, the order of the samples is another one; each source then begins its next epoch.

Decides what a step draws from each source. Does not decide the order within an epoch (`batches.py`), nor read a store.

Invariant: no state. All answers follow from the entries, never from a loop over steps.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import numpy as np

from mtx.data.blend import Blend, make_blend
from mtx.data.entry import Content, Entry
from mtx.data.ramp import BatchSizes


@dataclass(frozen=True, kw_only=True)
class Draw:
    """What one source gives to some rows of a step.

    Attributes:
        source: Its number.
        path, digest, num_samples: Of its store.
        rows: int64[m], which of the rows that were asked for.
        epochs, places: int64[m], the epoch of each and its place there, from 0.
    """

    source: int
    path: str
    digest: str
    num_samples: int
    rows: np.ndarray
    epochs: np.ndarray
    places: np.ndarray


def order_key(seed: int, source: int, epoch: int) -> str:
    """What the permutation of an epoch of a source follows from."""
    return f"{seed}/{source}/{epoch}"


@dataclass(frozen=True, kw_only=True)
class Tally:
    """How far a source is. `position` counts the samples that it has given, in its present order; the others all."""

    path: str
    content: Content
    order: tuple[Any, ...]
    position: int = 0
    samples: int = 0
    tokens: int = 0
    skipped: int = 0

    def under(self, entry: Entry, path: str) -> Tally:
        """At an entry that names it: where the order is another one, the next epoch begins."""
        content, position = entry.stores[path], self.position
        if self.order != entry.order:
            position = -(-position // self.content.num_samples) * content.num_samples
        return replace(self, path=path, content=content, order=entry.order, position=position)


@dataclass(frozen=True, kw_only=True)
class Stretch:
    """Steps with one entry and one blend in force.

    Attributes:
        first_step: Where it begins; it ends where the next one begins.
        first_sample: Samples that were trained on before it.
        drawn: Samples that the blend had given before it: not 0 where the same blend goes on, or samples are skipped.
        numbers: The numbers of its sources, in the order of the blend.
        tallies: All sources known by then, by number, as they are when it begins.
    """

    entry: Entry
    sizes: BatchSizes
    blend: Blend
    weights: Mapping[str, float]
    numbers: tuple[int, ...]
    first_step: int
    first_sample: int
    drawn: int
    tallies: Mapping[int, Tally] = field(repr=False)

    def gives_as(self, numbers: tuple[int, ...], weights: Mapping[str, float]) -> bool:
        """Whether its blend is one of these sources with these weights."""
        return self.numbers == numbers and list(self.weights.values()) == list(weights.values())

    def drawn_at(self, step: int) -> int:
        """Samples that the blend has given before a step of the stretch."""
        return self.drawn + self.sizes.first_sample(step) - self.first_sample

    def tallies_at(self, step: int) -> dict[int, Tally]:
        """All sources before a step of the stretch."""
        tallies = dict(self.tallies)
        given = self.blend.counts(self.drawn_at(step)) - self.blend.counts(self.drawn)
        for number, count in zip(self.numbers, given.tolist()):
            tally = tallies[number]
            tallies[number] = replace(
                tally,
                position=tally.position + count,
                samples=tally.samples + count,
                tokens=tally.tokens + count * self.entry.seq_len,
            )
        return tallies

    @cached_property
    def origins(self) -> np.ndarray:
        """The position of each source before the first sample of the blend: int64[sources]."""
        positions = np.array([self.tallies[number].position for number in self.numbers], np.int64)
        return positions - self.blend.counts(self.drawn)

    def steps_of(self, source: int, positions: np.ndarray) -> np.ndarray:
        """The steps that read some positions (int64[n]) of a source of the stretch, were it endless: int64[n]."""
        index = self.numbers.index(source)
        draws = self.blend.find(index, positions - self.origins[index])
        return self.sizes.steps_of(draws - self.drawn + self.first_sample)


class Course:
    """The course of a run. Steps count from 0: step i is the update after i updates."""

    def __init__(self, entries: Sequence[Entry]):
        """Args: entries: in the order in which they were recorded; the first holds from step 0."""
        self._entries = in_force(entries)
        if not self._entries or self._entries[0].step:
            raise ValueError("the first entry of a course holds from step 0")
        self.numbers: dict[str, int] = {}
        for entry in self._entries:
            for content in entry.stores.values():
                self.numbers.setdefault(content.digest, len(self.numbers))
        self.stretches: list[Stretch] = []
        for entry, after in zip(self._entries, [*self._entries[1:], None]):
            begun = bool(self.stretches)
            sizes = BatchSizes(
                global_batch_size=entry.global_batch_size,
                seq_len=entry.seq_len,
                ramp=entry.batch_ramp,
                first_step=entry.step,
                first_sample=self.first_sample(entry.step) if begun else 0,
                first_token=self.tokens(entry.step) if begun else 0,
            )
            for step, weights in entry.blends(sizes):
                if after is None or step < after.step:
                    self.stretches.append(self._begin(entry, sizes, step, weights))

    def _begin(self, entry: Entry, sizes: BatchSizes, step: int, weights: Mapping[str, float]) -> Stretch:
        """The stretch after those known so far."""
        before = self.stretches[-1] if self.stretches else None
        tallies = before.tallies_at(step) if before else {}
        if before is None or before.entry is not entry:
            for path, content in entry.stores.items():
                number = self.numbers[content.digest]
                new = Tally(path=path, content=content, order=entry.order)
                tallies[number] = tallies.get(number, new).under(entry, path)
        numbers = tuple(self.numbers[entry.stores[path].digest] for path in weights)
        blend = make_blend(tuple(weights.values()))
        drawn = before.drawn_at(step) if before and before.gives_as(numbers, weights) else 0
        if step == entry.step:
            skipped = blend.counts(drawn + entry.skipped_samples) - blend.counts(drawn)
            drawn += entry.skipped_samples
            for number, count in zip(numbers, skipped.tolist()):
                tally = tallies[number]
                tallies[number] = replace(tally, position=tally.position + count, skipped=tally.skipped + count)
        return Stretch(
            entry=entry,
            sizes=sizes,
            blend=blend,
            weights=weights,
            numbers=numbers,
            first_step=step,
            first_sample=sizes.first_sample(step),
            drawn=drawn,
            tallies=tallies,
        )

    @property
    def max(self) -> int:
        """Sequences in the largest step from the last entry on, which is where a run goes on."""
        return self._entries[-1].global_batch_size

    def size(self, step: int) -> int:
        """Sequences in a step."""
        return self._stretch(step).sizes.size(step)

    def first_sample(self, step: int) -> int:
        """Sequences that all steps before it trained on."""
        return self._stretch(step).sizes.first_sample(step)

    def tokens(self, step: int) -> int:
        """Tokens that all steps before it trained on."""
        return self._stretch(step).sizes.tokens(step)

    def step_at_tokens(self, tokens: int) -> int:
        """The number of steps that it takes to train on so many tokens or more."""
        # The last stretch that begins before so many tokens are done.
        index = bisect_left(self.stretches, tokens, key=lambda stretch: stretch.sizes.tokens(stretch.first_step))
        return max(0, self.stretches[max(0, index - 1)].sizes.step_at_tokens(tokens))

    def entry(self, step: int) -> Entry:
        """The entry in force at a step."""
        return self._stretch(step).entry

    def blend(self, step: int) -> Mapping[str, float]:
        """The blend in force at a step: store -> weight."""
        return self._stretch(step).weights

    def draws(self, step: int, rows: np.ndarray) -> Iterator[Draw]:
        """What each source gives to some rows (int64[n]) of a step; one of no rows where there are none."""
        stretch = self._stretch(step)
        indices, given = stretch.blend.locate(stretch.drawn_at(step) + rows)
        positions = stretch.origins[indices] + given
        for index in np.unique(indices).tolist() or [0]:
            mine = np.flatnonzero(indices == index)
            number = stretch.numbers[index]
            tally = stretch.tallies[number]
            epochs, places = np.divmod(positions[mine], tally.content.num_samples)
            yield Draw(
                source=number,
                path=tally.path,
                digest=tally.content.digest,
                num_samples=tally.content.num_samples,
                rows=mine,
                epochs=epochs,
                places=places,
            )

    def ledger(self, step: int) -> dict[str, Any]:
        """What the steps before a step took from each source, as JSON.

        Returns:
            `samples` and `tokens` trained on, and `skipped_samples`, in all; `sources`: for each, in the order of
            their numbers, `store` (path), `digest`, `samples`, `tokens`, `skipped_samples` and `epochs`: how often it
            was gone through, skips included.
        """
        tallies = self._stretch(step).tallies_at(step)
        sources = [
            {
                "store": tally.path,
                "digest": tally.content.digest,
                "samples": tally.samples,
                "tokens": tally.tokens,
                "skipped_samples": tally.skipped,
                "epochs": tally.position / tally.content.num_samples,
            }
            for _, tally in sorted(tallies.items())
        ]
        names = ("samples", "tokens", "skipped_samples")
        return {**{name: sum(source[name] for source in sources) for name in names}, "sources": sources}

    def _stretch(self, step: int) -> Stretch:
        if step < 0:
            raise ValueError(f"steps count from 0, not {step}")
        return self.stretches[bisect_right(self.stretches, step, key=lambda stretch: stretch.first_step) - 1]


def in_force(entries: Sequence[Entry]) -> list[Entry]:
    """The entries that hold, in order of their steps: each supersedes those before it with its step or a later one."""
    held: list[Entry] = []
    for entry in entries:
        while held and held[-1].step >= entry.step:
            held.pop()
        held.append(entry)
    return held
