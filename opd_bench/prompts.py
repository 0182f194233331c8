"""The prompt stream of a seed, and the teacher's text for it.

All arms of a seed consume a prefix of one stream; SFT and offline distillation read the same teacher text. Text is
sampled in chunks when first asked for and kept on disk; an arm is charged, FLOPs and seconds, for the texts it uses,
whoever had them sampled.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from time import perf_counter

import torch
from transformers import PreTrainedTokenizerBase

from opd_bench import store
from opd_bench.errors import UserError
from opd_bench.sequences import Mix, Prompts, Sequences, concatenate
from opd_bench.teachers import Teachers

CHUNK = 256  # texts sampled together


@dataclass(frozen=True)
class Stream:
    """Tokenised training prompts in a seed's own order; after the last comes the first, in another order."""

    encoded: list[tuple[str, list[int]]]  # task, token ids
    seed: int
    orders: list[list[int]] = field(default_factory=list, repr=False)

    def __call__(self, start: int, count: int) -> Prompts:
        rows = [self._row(place) for place in range(start, start + count)]
        return Prompts([list(self.encoded[row][1]) for row in rows], [self.encoded[row][0] for row in rows])

    def _row(self, place: int) -> int:
        passed, within = divmod(place, len(self.encoded))
        while len(self.orders) <= passed:
            rows = range(len(self.encoded))
            self.orders.append(random.Random(f"prompt stream {self.seed}/{len(self.orders)}").sample(rows, len(rows)))
        return self.orders[passed][within]

    @property
    def longest(self) -> int:
        return max(len(ids) for _, ids in self.encoded)


@dataclass(frozen=True)
class MixedStream:
    """The streams of some sources, laid into each other: of the first n prompts each has its weight's share, to within one or two."""

    encoded: list[tuple[str, list[int]]]  # source, token ids
    seed: int
    mix: Mix
    drawn: list[tuple[int, int]] = field(default_factory=list, repr=False)  # which stream, and its row
    taken: list[int] = field(default_factory=list, repr=False)  # rows of each stream among them

    @cached_property
    def streams(self) -> list[Stream]:
        return [Stream([(source, ids) for source, ids in self.encoded if source == name], self.seed) for name, _ in self.mix]

    def __call__(self, start: int, count: int) -> Prompts:
        parts = [self.streams[which](row, 1) for which, row in map(self._place, range(start, start + count))]
        return Prompts([part.ids[0] for part in parts], [part.tasks[0] for part in parts])

    def _place(self, place: int) -> tuple[int, int]:
        if not self.taken:
            self.taken[:] = [0] * len(self.mix)
        total = sum(weight for _, weight in self.mix)
        while len(self.drawn) <= place:
            owed = [weight / total * (len(self.drawn) + 1) - count for (_, weight), count in zip(self.mix, self.taken, strict=True)]
            which = owed.index(max(owed))
            self.drawn.append((which, self.taken[which]))
            self.taken[which] += 1
        return self.drawn[place]


def encode_prompts(pairs: list[tuple[str, str]], tokenizer: PreTrainedTokenizerBase, room: int) -> list[tuple[str, list[int]]]:
    """Token ids of ``(task, text)``. UserError where a prompt leaves less than the rollout's room in the context."""
    ids_of = tokenizer([text for _, text in pairs], add_special_tokens=False).input_ids
    encoded = [(task, list(ids)) for (task, _), ids in zip(pairs, ids_of, strict=True)]
    task, longest = max(((task, len(ids)) for task, ids in encoded), key=lambda pair: pair[1])
    if longest > room:
        raise UserError(f"a prompt of task {task} has {longest} tokens and the context leaves {room} for it; lower max_response")
    return encoded


@dataclass
class Corpus:
    """The teachers' text to the rows of a stream: temperature 1, unfiltered, one text per prompt."""

    teachers: Teachers
    stream: Stream | MixedStream
    eos: int
    max_response: int
    folder: Path
    held: dict[int, tuple[Sequences, float]] = field(default_factory=dict, repr=False)

    def __call__(self, rows: Sequence[int]) -> tuple[Sequences, float]:
        """The texts of ``rows``, and the seconds it took to sample them."""
        parts, seconds = [], 0.0
        for row in rows:
            chunk, chunk_s = self._chunk(row // CHUNK)
            parts.append(chunk[row % CHUNK : row % CHUNK + 1])
            seconds += chunk_s / CHUNK
        return concatenate(parts), seconds

    def _chunk(self, index: int) -> tuple[Sequences, float]:
        if index not in self.held:
            path = self.folder / f"chunk-{index:05d}.pt"
            found = store.load_sequences(path)
            if found is None:
                start = perf_counter()
                generator = torch.Generator().manual_seed(1_000_003 * (self.stream.seed + 1) + index)
                prompts = self.stream(index * CHUNK, CHUNK)
                texts = self.teachers.write(prompts, max_response=self.max_response, eos=self.eos, generator=generator)
                found = texts, perf_counter() - start
                store.save_sequences(path, *found)
            self.held[index] = found
        return self.held[index]
