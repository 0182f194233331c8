"""Linear equations, solved by undoing one operation after the other.

    >>> problem = Problem(4, (("+", 3), ("*", 4), ("-", 7)))
    >>> print(problem.prompt + problem.solution)
    Solve (x+3)*4-7=21
    (x+3)*4=21+7=28=28
    x+3=28/4=7=7
    x=7-3=4=4
    #4

A problem's identity is its equation. Numbers stay within 0..99 and divisions have no remainder; difficulty is the number of
operations to undo, 2 to 4. Additive and multiplicative operations alternate, so no equation can be shortened.
"""

import random
from collections.abc import Iterator
from dataclasses import dataclass

from opd_bench import procedural
from opd_bench.procedural import LIMIT, Step, Stepwise, apply

VERSION = "1.0"
SIZES = {"train": 12_000, "validation": 250, "test": 250}
SEEDS = {"train": 31, "validation": 32, "test": 33}
STEPS = (2, 3, 4)
INVERSE = {"+": "-", "-": "+", "*": "/", "/": "*"}
FACTORS = range(2, 10)


@dataclass(frozen=True)
class Problem(Stepwise):
    x: int
    operations: tuple[tuple[str, int], ...]  # done to x, the first first

    def left_side(self, count: int) -> str:
        """The expression in x after ``count`` operations."""
        text = "x"
        for place, (operator, k) in enumerate(self.operations[:count]):
            text = f"({text}){operator}{k}" if operator in "*/" and place else f"{text}{operator}{k}"
        return text

    @property
    def identity(self) -> str:
        return f"{self.left_side(len(self.operations))}={self.start}"

    @property
    def prompt(self) -> str:
        return f"Solve {self.identity}\n"

    @property
    def start(self) -> int:
        value = self.x
        for operator, k in self.operations:
            value = apply(value, operator, k)
        return value

    @property
    def length(self) -> int:
        return len(self.operations)

    def step(self, position: int, value: int) -> Step:
        left = self.length - position - 1
        operator, k = self.operations[left]
        return Step(f"{self.left_side(left)}=", value, INVERSE[operator], k)


def draw(rng: random.Random) -> Problem:
    """One random problem of any split."""
    while True:
        x = value = rng.randint(1, 30)
        operations, additive = [], rng.random() < 0.5
        for _ in range(rng.choice(STEPS)):
            if additive:
                possible = [("+", k) for k in range(1, min(30, LIMIT - value) + 1)] + [("-", k) for k in range(1, min(30, value) + 1)]
            else:
                possible = [("*", k) for k in FACTORS if value * k <= LIMIT] + [("/", k) for k in FACTORS if value % k == 0]
            if not possible or not value:
                break
            operations.append(rng.choice(possible))
            value = apply(value, *operations[-1])
            additive = not additive
        else:
            return Problem(x, tuple(operations))


def problems(split: str, seed: int) -> Iterator[Problem]:
    return procedural.distinct(draw, "equations", split, seed)


def load(**_: object) -> dict:
    """The data set lm-eval asks for: ``{split: datasets.Dataset}``."""
    return procedural.data_sets(problems, lambda problem, _: {"answer": str(problem.answer), "steps": problem.length}, SEEDS, SIZES)
