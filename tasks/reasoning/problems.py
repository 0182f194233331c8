"""Problems of reasoning-gym with worked solutions that a program writes.

    >>> problem = next(problems("gcd", "train", 5))
    >>> print(problem.prompt, problem.solution, sep=chr(10))
    Find the Greatest Common Divisor (GCD) of these numbers: 44, 36.
    Work step by step. End with "Answer:" and the result.
    44 = 1 * 36 + 8
    36 = 4 * 8 + 4
    8 = 2 * 4 + 0
    Answer: 4

The question and the answer are reasoning-gym's (Apache-2.0); its own request for a bare answer gives way to that for steps. A problem's
identity is what is asked. Difficulty is the number of steps. gsm_symbolic has no worked solutions here: it is for evaluation only.
"""

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import count
from typing import Any

from opd_bench import procedural

SIZES = {"train": 2_000, "validation": 100, "test": 120}
SEEDS = {"train": 51, "validation": 52, "test": 53}
PART = 2_000  # problems asked of reasoning-gym at once
ASKED = 'Work step by step. End with "Answer:" and the result.'
DAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday")

Entry = dict[str, Any]  # of a data set of reasoning-gym
Steps = list[str] | None  # None: this entry is not taken


def _chain_sum(entry: Entry) -> Steps:
    first, *rest = re.findall(r"[+-]? ?\d+", entry["metadata"]["expression"])
    steps, value = [], int(first)
    for term in rest:
        steps.append(f"{value} {term} = {value + int(term.replace(' ', ''))}")
        value += int(term.replace(" ", ""))
    return steps


def _simple_equations(entry: Entry) -> Steps:
    """``a*x + b = c`` or ``b - a*x = c``, with or without ``b``."""
    x, (left, right) = entry["metadata"]["variable"], entry["metadata"]["equation"].split(" = ")
    found = re.fullmatch(rf"(?:(\d+) ([+-]) )?(?:(\d+)\*)?{x}(?: ([+-]) (\d+))?", left)
    if found is None:
        return None
    before, sign, factor, operator, after = found.groups()
    steps, value, minus = [], int(right), "-" if sign == "-" else ""
    term = f"{minus}{factor}*{x}" if factor else f"{minus}{x}"
    if before:
        steps.append(f"{term} = {value} - {before} = {value - int(before)}")
        value -= int(before)
    elif after:
        inverse = "-" if operator == "+" else "+"
        moved = int(f"{inverse}{after}")
        steps.append(f"{term} = {value} {inverse} {after} = {value + moved}")
        value += moved
    if factor or minus:
        divisor = int(f"{minus}{factor or 1}")
        steps.append(f"{x} = {value} / {divisor} = {value // divisor}")
    return steps


def _gcd(entry: Entry) -> Steps:
    large, small = sorted(entry["metadata"]["numbers"], reverse=True)
    steps = []
    while small:
        steps.append(f"{large} = {large // small} * {small} + {large % small}")
        large, small = small, large % small
    return steps


def _base_conversion(entry: Entry) -> Steps:
    """From base 10 to another below it: the remainders, the last one first, are the digits."""
    value, source, target = (entry["metadata"][key] for key in ("decimal_value", "source_base", "target_base"))
    if source != 10 or target > 9:
        return None
    steps = []
    while value:
        steps.append(f"{value} = {value // target} * {target} + {value % target}")
        value //= target
    return steps


def _calendar_arithmetic(entry: Entry) -> Steps:
    offset, start = entry["metadata"]["offset_days"], re.findall("|".join(DAYS), entry["question"])[0]
    steps, days = [f"{abs(offset)} = {abs(offset) // 7} * 7 + {abs(offset) % 7}"], abs(offset) % 7
    direction = 1 if offset > 0 else -1
    walked = [DAYS[(DAYS.index(start) + direction * day) % 7] for day in range(days + 1)]
    return [*steps, f"{days} {'after' if offset > 0 else 'before'}: {', '.join(walked)}"]


@dataclass(frozen=True)
class Kind:
    """A data set of reasoning-gym: its settings, what of a question is the question itself, what tells problems apart, and the solution."""

    settings: dict[str, Any]
    question: str  # the part that stays, as a regular expression
    identity: Callable[[Entry], object]
    steps: Callable[[Entry], Steps]


KINDS = {
    "chain_sum": Kind(
        {"min_terms": 2, "max_terms": 4, "min_digits": 1, "max_digits": 2},
        r"(?s).*",
        lambda entry: entry["metadata"]["expression"],
        _chain_sum,
    ),
    "simple_equations": Kind({"max_value": 10}, r"(?s).*", lambda entry: entry["metadata"]["equation"], _simple_equations),
    "gcd": Kind({"min_value": 2, "max_value": 100}, r".*?\d\.", lambda entry: sorted(entry["metadata"]["numbers"]), _gcd),
    "base_conversion": Kind(
        {"min_base": 3, "max_base": 10, "min_value": 10, "max_value": 400},
        r"[Cc]onvert the base-.*",
        lambda entry: [entry["metadata"]["decimal_value"], entry["metadata"]["target_base"]],
        _base_conversion,
    ),
    "calendar_arithmetic": Kind(
        {"tasks": ["weekday_offset"], "offset_upper_bound": 60},
        r".*?\?",
        lambda entry: [entry["metadata"]["start_date"], entry["metadata"]["offset_days"]],
        _calendar_arithmetic,
    ),
}


@dataclass(frozen=True)
class Problem:
    identity: str
    question: str
    steps: tuple[str, ...]
    answer: str

    @property
    def prompt(self) -> str:
        return f"{self.question}\n{ASKED}"

    @property
    def solution(self) -> str:
        return "\n".join([*self.steps, f"Answer: {self.answer}"])


def entries(name: str, seed: int, settings: dict[str, Any]) -> Iterator[Entry]:
    """Endless entries of the data set ``name``."""
    try:
        import reasoning_gym
    except ModuleNotFoundError:
        raise ModuleNotFoundError("reasoning-gym is not installed: pip install 'opd-bench[smol]'") from None

    for part in count():  # entry k of a data set is drawn from its seed + k: the parts must not overlap
        yield from reasoning_gym.create_dataset(name, seed=PART * (10_000 * seed + part), size=PART, **settings)


def problems(name: str, split: str, seed: int) -> Iterator[Problem]:
    """Endless distinct problems of one split."""
    kind = KINDS[name]
    taken = (problem for entry in entries(name, seed, kind.settings) if (problem := _problem(kind, entry)))
    return procedural.distinct(lambda _: next(taken), name, split, seed)


def _problem(kind: Kind, entry: Entry) -> Problem | None:
    steps = kind.steps(entry)
    if not steps:
        return None
    found = re.search(kind.question, entry["question"])
    assert found
    question = found[0].strip()
    return Problem(str(kind.identity(entry)), question[0].upper() + question[1:], tuple(steps), entry["answer"])


def _load(name: str) -> dict:
    row = lambda problem, _: {"answer": problem.answer, "steps": len(problem.steps)}  # noqa: E731
    return procedural.data_sets(lambda split, seed: problems(name, split, seed), row, SEEDS, SIZES)


def chain_sum(**_: object) -> dict:
    return _load("chain_sum")


def simple_equations(**_: object) -> dict:
    return _load("simple_equations")


def gcd(**_: object) -> dict:
    return _load("gcd")


def base_conversion(**_: object) -> dict:
    return _load("base_conversion")


def calendar_arithmetic(**_: object) -> dict:
    return _load("calendar_arithmetic")


def gsm_symbolic(**_: object) -> dict:
    """Word problems without worked solutions: a test split alone."""
    import datasets

    found: dict[str, dict] = {}
    for entry in entries("gsm_symbolic", SEEDS["test"], {"difficulty": 1.0}):
        question = re.sub(r"\s*Give the result.*", "", entry["question"], flags=re.DOTALL)
        found[question] = {"identity": question, "prompt": f"{question}\n{ASKED}", "answer": entry["answer"]}
        if len(found) == SIZES["test"]:
            break
    return {"test": datasets.Dataset.from_list(list(found.values()))}
