"""What the procedural tasks under `tasks/` share: splits that never meet, data sets for lm-eval, and written-out steps.

A step's result is written twice: the second time is a check, computed anew. Where the two differ, further results follow until
two in a row agree, and the last one counts:

    12+34=46=46
    12+34=45=46=46
"""

from __future__ import annotations

import hashlib
import random
import re
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


TWICE = re.compile(r"(.*?)(=-?\d+)\2")  # a line that says its result twice: what stands before, and the result


def still_right(solution: str, text: str) -> bool:
    """Whether ``text`` begins the only ``solution``; a line may have come to its result by other results, written before it."""
    (*done, last), lines = text.split("\n"), solution.split("\n")
    if len(done) >= len(lines):
        return False
    return lines[len(done)].startswith(last) and all(map(_agrees, done, lines))


def _agrees(line: str, right: str) -> bool:
    twice = TWICE.fullmatch(right)
    return line == right or bool(twice and re.fullmatch(rf"{re.escape(twice[1])}(=\d+)*{twice[2]}{twice[2]}", line))


def corrupted(solution: str, rng: random.Random) -> str | None:
    """``solution`` as far as one of its results, which is wrong; None where no line says a result twice."""
    lines = solution.split("\n")
    places = [place for place, line in enumerate(lines) if TWICE.fullmatch(line)]
    if not places:
        return None
    place = rng.choice(places)
    twice = TWICE.fullmatch(lines[place])
    assert twice
    return "".join(f"{line}\n" for line in lines[:place]) + f"{twice[1]}={wrong_number(int(twice[2][1:]), rng)}"


def wrong_number(value: int, rng: random.Random) -> int:
    """A plausible slip: off by one or ten, one digit changed, or two digits swapped."""
    digits = str(abs(value))
    place = rng.randrange(len(digits))
    slips = [
        value + rng.choice((-1, 1)),
        value + rng.choice((-10, 10)),
        int(digits[:place] + rng.choice("0123456789") + digits[place + 1 :]),
        int(digits[::-1]),
    ]
    wrong = rng.choice(slips)
    return wrong if wrong != value and 0 <= wrong <= LIMIT else (value + 1) % (LIMIT + 1)


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
