"""Specification to Python function: a list goes through two to four operations and one final return.

    >>> problem = Problem((Operation("even"), Operation("add", 3)), "sum", forward=True)
    >>> print(problem.prompt + problem.solution)
    Write f(a): keep the even numbers, then add 3 to each, then return the sum.
    def f(a):
        a = [x for x in a if x % 2 == 0]
        a = [x + 3 for x in a]
        return sum(a)

A specification reads forward ("..., then ...") or backward ("... after you ..."); both share one identity, the sequence
of operations. The split is a hash of that identity, so training, validation and test problems can never meet. Hidden
tests come from evaluating the operations directly, never from running the reference text.
"""

import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from opd_bench import procedural

VERSION = "1.0"
SIZES = {"train": 12_000, "validation": 250, "test": 250}
SEEDS = {"train": 21, "validation": 22, "test": 23}
OPERATIONS = (2, 3, 4)
TESTS = 6

# name: (specification, Python line, meaning, range of k or None)
OPERATION: dict[str, tuple[str, str, Callable[[list[int], int], list[int]], range | None]] = {
    "add": ("add {k} to each", "[x + {k} for x in a]", lambda a, k: [x + k for x in a], range(2, 31)),
    "subtract": ("subtract {k} from each", "[x - {k} for x in a]", lambda a, k: [x - k for x in a], range(2, 31)),
    "multiply": ("multiply each by {k}", "[x * {k} for x in a]", lambda a, k: [x * k for x in a], range(2, 10)),
    "modulo": ("take each modulo {k}", "[x % {k} for x in a]", lambda a, k: [x % k for x in a], range(3, 13)),
    "square": ("square each", "[x * x for x in a]", lambda a, k: [x * x for x in a], None),
    "negate": ("negate each", "[-x for x in a]", lambda a, k: [-x for x in a], None),
    "even": ("keep the even numbers", "[x for x in a if x % 2 == 0]", lambda a, k: [x for x in a if x % 2 == 0], None),
    "odd": ("keep the odd numbers", "[x for x in a if x % 2 == 1]", lambda a, k: [x for x in a if x % 2 == 1], None),
    "above": ("keep numbers above {k}", "[x for x in a if x > {k}]", lambda a, k: [x for x in a if x > k], range(2, 31)),
    "below": ("keep numbers below {k}", "[x for x in a if x < {k}]", lambda a, k: [x for x in a if x < k], range(2, 31)),
    "multiples": ("keep multiples of {k}", "[x for x in a if x % {k} == 0]", lambda a, k: [x for x in a if x % k == 0], range(3, 8)),
    "sort": ("sort it", "sorted(a)", lambda a, k: sorted(a), None),
    "reverse": ("reverse it", "a[::-1]", lambda a, k: a[::-1], None),
    "drop": ("drop the first {k}", "a[{k}:]", lambda a, k: a[k:], range(1, 6)),
    "take": ("take the first {k}", "a[:{k}]", lambda a, k: a[:k], range(1, 9)),
}
# name: (specification, Python expression, meaning)
RETURN: dict[str, tuple[str, str, Callable[[list[int]], object]]] = {
    "sum": ("return the sum", "sum(a)", sum),
    "largest": ("return the largest or 0", "max(a, default=0)", lambda a: max(a, default=0)),
    "smallest": ("return the smallest or 0", "min(a, default=0)", lambda a: min(a, default=0)),
    "count": ("return how many are left", "len(a)", len),
    "list": ("return the list", "a", lambda a: a),
}


@dataclass(frozen=True)
class Operation:
    name: str
    k: int = 0

    @property
    def specification(self) -> str:
        return OPERATION[self.name][0].format(k=self.k)

    @property
    def line(self) -> str:
        return f"    a = {OPERATION[self.name][1].format(k=self.k)}"

    def __call__(self, values: list[int]) -> list[int]:
        return OPERATION[self.name][2](values, self.k)


@dataclass(frozen=True)
class Problem:
    operations: tuple[Operation, ...]
    returns: str
    forward: bool

    @classmethod
    def of(cls, identity: str) -> "Problem":
        """The problem with this identity, whose specification reads forward."""
        *operations, returns = identity.split()
        named = (operation.split(":") for operation in operations)
        return cls(tuple(Operation(name, int(k)) for name, k in named), returns, forward=True)

    @property
    def identity(self) -> str:
        return " ".join([*(f"{op.name}:{op.k}" for op in self.operations), self.returns])

    @property
    def prompt(self) -> str:
        phrases = [*(op.specification for op in self.operations), RETURN[self.returns][0]]
        text = ", then ".join(phrases) if self.forward else " after you ".join(reversed(phrases))
        return f"Write f(a): {text}.\n"

    @property
    def solution(self) -> str:
        return "\n".join(["def f(a):", *(op.line for op in self.operations), f"    return {RETURN[self.returns][1]}"])

    def __call__(self, values: list[int]) -> object:
        """What a correct ``f`` returns for ``values``."""
        for operation in self.operations:
            values = operation(values)
        return RETURN[self.returns][2](values)

    def near_misses(self) -> list["Problem"]:
        """The problem with one operation left out, for each, and with another return."""
        places = range(len(self.operations))
        fewer = [Problem(self.operations[:i] + self.operations[i + 1 :], self.returns, self.forward) for i in places]
        return fewer + [Problem(self.operations, other, self.forward) for other in RETURN if other != self.returns]

    def hidden_tests(self) -> list[str]:
        """Assertions on inputs drawn from the identity: each near miss, where it differs at all, fails at least one."""
        rng = random.Random(f"hidden tests of {self.identity}")
        inputs = [[], *([rng.randint(-40, 60) for _ in range(rng.randint(3, 18))] for _ in range(60))]
        expected = [repr(self(values)) for values in inputs]
        chosen = {0, 1}
        for miss in self.near_misses():
            caught = [place for place, values in enumerate(inputs) if repr(miss(values)) != expected[place]]
            if caught and chosen.isdisjoint(caught):
                chosen.add(caught[0])
        chosen |= set(list({result: place for place, result in reversed(list(enumerate(expected)))}.values())[:TESTS])
        return [f"assert f({inputs[place]!r}) == {expected[place]}" for place in sorted(chosen)[: 2 * TESTS]]

    @property
    def constant(self) -> bool:
        """Whether nearly every input gives the same result, so that a program could pass without doing anything."""
        return len({test.rsplit(" == ", 1)[1] for test in self.hidden_tests()}) < 4


def draw_operation(rng: random.Random) -> Operation:
    name = rng.choice(list(OPERATION))
    values = OPERATION[name][3]
    return Operation(name, rng.choice(values) if values else 0)


def draw(rng: random.Random) -> Problem:
    """One random problem of any split; no operation name appears twice in a row."""
    operations = [draw_operation(rng)]
    for _ in range(rng.choice(OPERATIONS) - 1):
        following = draw_operation(rng)
        while following.name == operations[-1].name:
            following = draw_operation(rng)
        operations.append(following)
    return Problem(tuple(operations), rng.choice(list(RETURN)), rng.random() < 0.5)


def problems(split: str, seed: int) -> Iterator[Problem]:
    """Endless distinct problems of one split; those to be scored on have results that vary."""
    drawn = procedural.distinct(draw, "functions", split, seed)
    return (problem for problem in drawn if split == "train" or not problem.constant)


def row(problem: Problem, split: str) -> dict:
    """What lm-eval's documents hold besides prompt and solution; training problems need no tests."""
    return {"steps": len(problem.operations), "tests": [] if split == "train" else problem.hidden_tests()}


def load(**_: object) -> dict:
    """The data set lm-eval asks for: ``{split: datasets.Dataset}``."""
    return procedural.data_sets(problems, row, SEEDS, SIZES)
