"""Predicting what a short Python program prints, with its trace.

    >>> problem = Problem(7, 3, "a>9", ("-", "4"), ("+", "i"))
    >>> print(problem.prompt + problem.solution)
    a=7
    for i in range(3):
      if a>9:a=a-4
      else:a=a+i
    print(a)
    i=0:7+0=7=7
    i=1:7+1=8=8
    i=2:8+2=10=10
    #10

A problem's identity is its trace: programs that run alike are one problem. Numbers stay within 0..99; difficulty is the number of
iterations, 2 to 5. Most programs choose between two assignments by a condition on ``a`` or ``i``.
"""

import random
from collections.abc import Iterator
from dataclasses import dataclass

from opd_bench import procedural
from opd_bench.procedural import LIMIT, Step, Stepwise

VERSION = "2.0"
SIZES = {"train": 12_000, "validation": 250, "test": 250}
SEEDS = {"train": 41, "validation": 42, "test": 43}
STEPS = (2, 3, 4, 5)


@dataclass(frozen=True)
class Problem(Stepwise):
    start: int
    length: int
    condition: str  # of ``a`` or ``i``; empty where there is no choice
    then: tuple[str, str]  # operator and right operand: a number or ``i``
    otherwise: tuple[str, str]

    @property
    def prompt(self) -> str:
        body = [f"  if {self.condition}:a=a{''.join(self.then)}", f"  else:a=a{''.join(self.otherwise)}"]
        body = body if self.condition else [f"  a=a{''.join(self.then)}"]
        return "\n".join([f"a={self.start}", f"for i in range({self.length}):", *body, "print(a)\n"])

    @property
    def identity(self) -> str:
        return self.solution

    def step(self, position: int, value: int) -> Step:
        operator, right = self.then if self.holds(position, value) else self.otherwise
        return Step(f"i={position}:", value, operator, position if right == "i" else int(right))

    def holds(self, i: int, a: int) -> bool:
        """Whether the condition does in iteration ``i`` at value ``a``."""
        if not self.condition:
            return True
        value = a if self.condition[0] == "a" else i
        return value % 2 == 0 if self.condition[1] == "%" else value > int(self.condition[2:])


def draw_assignment(rng: random.Random) -> tuple[str, str]:
    operator = rng.choice(("+", "+", "-", "-", "*", "//"))
    if operator in "+-" and rng.random() < 0.2:
        return operator, "i"
    return operator, str(rng.randint(1, 30) if operator in "+-" else rng.choice((2, 3)))


def draw(rng: random.Random) -> Problem:
    """One random problem of any split."""
    while True:
        length = rng.choice(STEPS)
        condition = rng.choice(("", f"a>{rng.randint(5, 60)}", f"a>{rng.randint(5, 60)}", "a%2==0", "i%2==0", f"i>{rng.randint(0, 2)}"))
        then, otherwise = draw_assignment(rng), draw_assignment(rng)
        problem = Problem(rng.randint(1, 60), length, condition, then, otherwise if condition else then)
        if then != otherwise and all(0 <= step.result <= LIMIT for step in problem.steps):
            return problem


def problems(split: str, seed: int) -> Iterator[Problem]:
    return procedural.distinct(draw, "trace", split, seed)


def load(**_: object) -> dict:
    """The data set lm-eval asks for: ``{split: datasets.Dataset}``."""
    return procedural.data_sets(problems, lambda problem, _: {"answer": str(problem.answer), "steps": problem.length}, SEEDS, SIZES)
