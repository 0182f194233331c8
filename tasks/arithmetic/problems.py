"""Chains of additions and subtractions with every step written out.

    >>> problem = Problem((12, 34, 5), "+-")
    >>> print(problem.prompt + problem.solution)
    Compute 12+34-5
    12+34=46
    46-5=41
    #41

A problem's identity is its expression. The split it belongs to is a hash of that identity, so training, validation and
test problems can never meet. Intermediate results stay within 0..999.
"""

import hashlib
import random
from collections.abc import Iterator
from dataclasses import dataclass

SPLIT_SIZES = {"train": 12_000, "validation": 250, "test": 250}
SPLIT_SEEDS = {"train": 11, "validation": 12, "test": 13}
OPERANDS = (3, 4, 5)


@dataclass(frozen=True)
class Step:
    """One written step, ``left operator right = result``."""

    left: int
    operator: str
    right: int
    result: int

    def __str__(self) -> str:
        return f"{self.left}{self.operator}{self.right}={self.result}"


def apply(left: int, operator: str, right: int) -> int:
    return left + right if operator == "+" else left - right


@dataclass(frozen=True)
class Problem:
    operands: tuple[int, ...]
    operators: str

    @property
    def identity(self) -> str:
        tail = "".join(f"{op}{value}" for op, value in zip(self.operators, self.operands[1:], strict=True))
        return f"{self.operands[0]}{tail}"

    @property
    def prompt(self) -> str:
        return f"Compute {self.identity}\n"

    @property
    def steps(self) -> list[Step]:
        written, total = [], self.operands[0]
        for operator, value in zip(self.operators, self.operands[1:], strict=True):
            result = apply(total, operator, value)
            written.append(Step(total, operator, value, result))
            total = result
        return written

    @property
    def answer(self) -> int:
        return self.steps[-1].result

    @property
    def solution(self) -> str:
        return "\n".join([*map(str, self.steps), f"#{self.answer}"])

    @property
    def split(self) -> str:
        bucket = hashlib.sha256(self.identity.encode()).digest()[0] % 16
        return {0: "test", 1: "validation"}.get(bucket, "train")


def draw(rng: random.Random) -> Problem:
    """One random problem of any split."""
    total = first = rng.randint(1, 99)
    operands, operators = [first], ""
    for _ in range(rng.choice(OPERANDS) - 1):
        value = rng.randint(1, 99)
        operator = rng.choice("+-") if total >= value else "+"
        total = apply(total, operator, value)
        operands.append(value)
        operators += operator
    return Problem(tuple(operands), operators)


def problems(split: str, seed: int) -> Iterator[Problem]:
    """Endless distinct problems of one split."""
    rng, seen = random.Random(f"arithmetic/{split}/{seed}"), set()
    while True:
        problem = draw(rng)
        if problem.split == split and problem.identity not in seen:
            seen.add(problem.identity)
            yield problem


def load(**_: object) -> dict:
    """The data set lm-eval asks for: ``{split: datasets.Dataset}``."""
    from itertools import islice

    import datasets

    return {
        split: datasets.Dataset.from_list(
            [
                {"identity": p.identity, "prompt": p.prompt, "answer": str(p.answer), "steps": len(p.operators), "solution": p.solution}
                for p in islice(problems(split, SPLIT_SEEDS[split]), size)
            ]
        )
        for split, size in SPLIT_SIZES.items()
    }
