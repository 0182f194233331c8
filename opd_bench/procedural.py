"""What the procedural tasks under `tasks/` share: splits that never meet, data sets for lm-eval, and written-out steps.

A step's result is written twice: the second time is a check, computed anew. Where the two differ, further results follow until
two in a row agree, and the last one counts:

    12+34=46=46
    12+34=45=46=46
"""

from __future__ import annotations

import hashlib
import random
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Any, Protocol, TypeVar

LIMIT = 99  # every number of a stepwise problem lies in 0..LIMIT


class Problem(Protocol):
    """A generated problem; two with the same identity are the same problem."""

    @property
    def identity(self) -> str: ...
    @property
    def prompt(self) -> str: ...
    @property
    def solution(self) -> str: ...


P = TypeVar("P", bound=Problem)


def split_of(identity: str) -> str:
    """The split a problem belongs to, whatever the seed: 1/16 test, 1/16 validation, the rest training, by SHA-256 of its identity."""
    bucket = hashlib.sha256(identity.encode()).digest()[0] % 16
    return {0: "test", 1: "validation"}.get(bucket, "train")


def distinct(draw: Callable[[random.Random], P], name: str, split: str, seed: int) -> Iterator[P]:
    """Endless distinct problems of one split. Ends only if ``draw`` never ends: give it room enough."""
    rng, seen = random.Random(f"{name}/{split}/{seed}"), set()
    while True:
        problem = draw(rng)
        if problem.identity not in seen and split_of(problem.identity) == split:
            seen.add(problem.identity)
            yield problem


def data_sets(
    problems: Callable[[str, int], Iterator[P]], row: Callable[[P, str], dict[str, Any]], seeds: dict[str, int], sizes: dict[str, int]
) -> dict:
    """What lm-eval's ``custom_dataset`` returns: a ``datasets.Dataset`` by split, a ``row(problem, split)`` per problem."""
    import datasets

    def rows(split: str) -> list[dict[str, Any]]:
        return [
            {"identity": problem.identity, "prompt": problem.prompt, "solution": problem.solution, **row(problem, split)}
            for problem in islice(problems(split, seeds[split]), sizes[split])
        ]

    return {split: datasets.Dataset.from_list(rows(split)) for split in sizes}


def apply(left: int, operator: str, right: int) -> int:
    """``left operator right`` with ``/`` and ``//`` both whole-number division."""
    if operator == "+":
        return left + right
    if operator == "-":
        return left - right
    return left * right if operator == "*" else left // right


@dataclass(frozen=True)
class Step:
    """One line of a solution: what stands before the calculation, then ``left operator right`` and its result."""

    before: str
    left: int
    operator: str
    right: int

    @property
    def result(self) -> int:
        return apply(self.left, self.operator, self.right)

    @property
    def calculation(self) -> str:
        return f"{self.before}{self.left}{self.operator}{self.right}"

    def __str__(self) -> str:
        return f"{self.calculation}={self.result}={self.result}"


class Stepwise(ABC):
    """A problem solved by steps, each of which takes one value further; the last value is the answer."""

    prompt: str
    start: int  # the value before the first step
    length: int  # how many steps there are: the problem's difficulty

    @abstractmethod
    def step(self, position: int, value: int) -> Step:
        """The step at ``position`` if ``value``, right or wrong, was reached before it."""

    @property
    def steps(self) -> list[Step]:
        written, value = [], self.start
        for position in range(self.length):
            written.append(self.step(position, value))
            value = written[-1].result
        return written

    @property
    def answer(self) -> int:
        return self.steps[-1].result

    @property
    def solution(self) -> str:
        return "\n".join([*map(str, self.steps), f"#{self.answer}"])
