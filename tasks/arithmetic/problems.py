"""Chains of additions and subtractions with every step written out and checked.

    >>> problem = Problem((12, 34, 5), "+-")
    >>> print(problem.prompt + problem.solution)
    Compute 12+34-5
    12+34=46=46
    46-5=41=41
    #41

A problem's identity is its expression. Numbers stay within 0..99; difficulty is the number of steps, 2 to 5.
"""

import random
from collections.abc import Iterator
from dataclasses import dataclass

from opd_bench import procedural
from opd_bench.procedural import LIMIT, Step, Stepwise, apply

VERSION = "2.0"
SIZES = {"train": 12_000, "validation": 250, "test": 250}
SEEDS = {"train": 11, "validation": 12, "test": 13}
STEPS = (2, 3, 4, 5)


@dataclass(frozen=True)
class Problem(Stepwise):
    operands: tuple[int, ...]
    operators: str

    @property
    def identity(self) -> str:
        tail = "".join(f"{operator}{value}" for operator, value in zip(self.operators, self.operands[1:], strict=True))
        return f"{self.operands[0]}{tail}"

    @property
    def prompt(self) -> str:
        return f"Compute {self.identity}\n"

    @property
    def start(self) -> int:
        return self.operands[0]

    @property
    def length(self) -> int:
        return len(self.operators)

    def step(self, position: int, value: int) -> Step:
        return Step("", value, self.operators[position], self.operands[position + 1])


def draw(rng: random.Random) -> Problem:
    """One random problem of any split."""
    value = rng.randint(1, LIMIT)
    operands, operators = [value], ""
    for _ in range(rng.choice(STEPS)):
        operator = rng.choice([sign for sign, possible in (("+", value < LIMIT), ("-", value > 0)) if possible])
        operands.append(rng.randint(1, LIMIT - value if operator == "+" else value))
        operators += operator
        value = apply(value, operator, operands[-1])
    return Problem(tuple(operands), operators)


def problems(split: str, seed: int) -> Iterator[Problem]:
    return procedural.distinct(draw, "arithmetic", split, seed)


def load(**_: object) -> dict:
    """The data set lm-eval asks for: ``{split: datasets.Dataset}``."""
    return procedural.data_sets(problems, lambda problem, _: {"answer": str(problem.answer), "steps": problem.length}, SEEDS, SIZES)
