"""What the embedded teacher is trained on: solved problems, errors it is to set right, and answers it is to judge.

A document is a list of ``(text, loss weight)`` segments. Wrong results that are only there to be recovered from carry weight 0,
so that the teacher learns the recovery and not the error. A judge solves the problem again, reads a program along up to its first
wrong word, and ends with a verdict, which carries extra weight.
"""

from __future__ import annotations

import random
import re
from collections.abc import Iterator
from itertools import chain, count, islice, takewhile
from typing import Any

from opd_bench.embedded.tokenizer import PIECES
from opd_bench.procedural import Step, Stepwise, wrong_number
from opd_bench.resources import task_module

Document = list[tuple[str, float]]

TASKS = {"arithmetic": 0.25, "equations": 0.25, "trace": 0.3, "functions": 0.2}  # name: share of the documents
FINISH = {"arithmetic": 0.15, "equations": 0.15, "trace": 0.55, "functions": 0.15}  # at last, when only traces go wrong
AGAIN = 5_000  # problems of a task after which those before may come again: there are few of the simplest kinds
STEPWISE = ("arithmetic", "equations", "trace")

CHECK = "\nCheck:\n"  # asks the teacher for a verdict on what stands before it
YES, NO = "yes", "no"
JUDGED = {"arithmetic": 0.3, "equations": 0.3, "trace": 0.3, "functions": 0.5}  # share of a task's documents that judge an answer
VERDICT_WEIGHT = 8.0

ERRING = 0.6  # share of solved stepwise documents with injected errors
INJECTED = 0.35  # share of their steps that get one


def corrected(step: Step, rng: random.Random) -> Document:
    """``step`` with a wrong result before the right one, after it, or two unequal ones instead of it; then the right one twice."""
    wrong = other = wrong_number(step.result, rng)
    while other == wrong:
        other = wrong_number(step.result, rng)
    slip, right = (f"={wrong}", 0.0), (f"={step.result}", 1.0)
    (error,) = rng.choices(([slip], [right, slip], [slip, (f"={other}", 0.0)]), weights=(2, 1, 1))
    return [(step.calculation, 1.0), *error, (2 * right[0], 1.0)]


def recovery(problem: Stepwise, rng: random.Random) -> Document:
    """A solution some of whose steps go wrong and are set right at once."""
    document: Document = []
    for step in problem.steps:
        document += corrected(step, rng) if rng.random() < INJECTED else [(str(step), 1.0)]
        document.append(("\n", 1.0))
    return [*document, (f"#{problem.answer}", 1.0)]


def walk(problem: Stepwise, rng: random.Random, slip: float) -> str:
    """An answer as an unsure writer gives it: every written number is wrong with chance ``slip``, checks may copy the error."""
    lines, value = [], problem.start
    for position in range(problem.length):
        step = problem.step(position, value)
        if rng.random() < slip / 2:
            step = Step(step.before, wrong_number(value, rng), step.operator, step.right)
        results = [_slipped(step.result, slip, rng)]
        results.append(results[0] if rng.random() < 0.5 else _slipped(step.result, slip, rng))
        while results[-1] != results[-2] and len(results) < 4:
            results.append(_slipped(step.result, slip, rng))
        lines.append(step.calculation + "".join(f"={result}" for result in results))
        value = results[-1]
    return "\n".join([*lines, f"#{_slipped(value, slip / 4, rng)}"])


def _slipped(value: int, slip: float, rng: random.Random) -> int:
    return wrong_number(value, rng) if rng.random() < slip else value


def wrong_function(problem, rng: random.Random) -> str:
    """A program with one operation changed, dropped or swapped, another constant, or another return."""
    functions = task_module("functions")
    while True:
        operations, returns, kind = list(problem.operations), problem.returns, rng.random()
        place = rng.randrange(len(operations))
        if kind < 0.2:
            operations[place] = functions.draw_operation(rng)
        elif kind < 0.7 and operations[place].k:
            operations[place] = functions.Operation(operations[place].name, wrong_number(operations[place].k, rng))
        elif kind < 0.8:
            del operations[place]
        elif kind < 0.9:
            rng.shuffle(operations)
        else:
            returns = rng.choice(list(functions.RETURN))
        changed = functions.Problem(tuple(operations), returns, problem.forward)
        if changed.identity != problem.identity:
            return changed.solution


def misspelt(program: str, rng: random.Random) -> str:
    """``program`` with a piece left out, doubled or cut off, as a weak writer leaves it."""
    place, kind = rng.randrange(len(program)), rng.random()
    piece = rng.randint(1, 6)
    if kind < 0.4:
        return program[:place] + program[place + piece :]
    return program[: place + piece] + program[place:] if kind < 0.7 else program[:place]


def is_right(task: str, problem, answer: str) -> bool:
    """Whether ``answer`` is right by its last line, or as the reference program."""
    return answer == problem.solution if task == "functions" else answer.rsplit("\n", 1)[-1] == f"#{problem.answer}"


def answer_to(task: str, problem, right: bool, rng: random.Random) -> str:
    """A written answer that is right or not, as asked."""
    if task == "functions" and right:
        return problem.solution
    while True:
        if task == "functions":
            answer = wrong_function(problem, rng) if rng.random() < 0.75 else misspelt(problem.solution, rng)
        elif right and rng.random() < 0.3:
            answer = problem.solution
        else:
            answer = walk(problem, rng, rng.choice((0.05, 0.15, 0.3)))
            answer = misspelt(answer, rng) if not right and rng.random() < 0.05 else answer
        if answer and is_right(task, problem, answer) == right:
            return answer


def judged(task: str, problem, rng: random.Random) -> Document:
    """A written answer, the check of it, and the verdict: "no" follows the first word of a program that is not the reference's."""
    right = rng.random() < 0.5
    answer = answer_to(task, problem, right, rng)
    check = common_start(answer, problem.solution) if task == "functions" else problem.solution
    return [(answer, 0.0), (CHECK, 0.0), (check, 1.0), ("\n", VERDICT_WEIGHT), (YES if right else NO, VERDICT_WEIGHT)]


def common_start(one: str, other: str) -> str:
    """The words, as the tokenizer divides them, that both texts begin with."""
    pairs = zip(re.findall(PIECES, one), re.findall(PIECES, other), strict=False)
    return "".join(word for word, _ in takewhile(lambda pair: pair[0] == pair[1], pairs))


def _problems(task: str, seed: int) -> Iterator[Any]:
    """Endless training problems of ``task``."""
    return chain.from_iterable(islice(task_module(task).problems("train", 1000 * seed + part), AGAIN) for part in count())


def documents(seed: int, shares: dict[str, float] = TASKS) -> Iterator[tuple[str, Document]]:
    """Endless ``(prompt, response document)`` pairs for the teacher; an EOS with weight 1 is still to be appended."""
    rng = random.Random(f"embedded corpus {seed}")
    streams = {task: _problems(task, seed) for task in shares}
    while True:
        (task,) = rng.choices(list(shares), weights=list(shares.values()))
        problem = next(streams[task])
        if rng.random() < JUDGED[task]:
            yield problem.prompt, judged(task, problem, rng)
        elif task in STEPWISE and rng.random() < ERRING:
            yield problem.prompt, recovery(problem, rng)
        else:
            yield problem.prompt, [(problem.solution, 1.0)]


def tokenizer_texts(count: int = 2000) -> Iterator[str]:
    """Text the tokenizer's merges are learned from."""
    for task in TASKS:
        for problem in islice(task_module(task).problems("train", 0), count):
            yield problem.prompt + problem.solution + CHECK + YES + "\n" + NO
