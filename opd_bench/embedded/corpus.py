"""What the embedded teacher is trained on: solved problems, recoveries from injected errors, and judged answers.

A document is a list of ``(text, loss weight)`` segments. Wrong text that is only there to be recovered from carries
weight 0, so that the teacher learns the recovery and not the error; a small share of the errors is supervised, so that
recoveries do appear in the teacher's own text. An answer is judged by solving the problem again and then writing a
verdict, which carries extra weight.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass
from types import ModuleType

from opd_bench.resources import task_module

Document = list[tuple[str, float]]

CHECK = "\nCheck:\n"  # asks the teacher for a verdict on what stands before it
YES, NO = "yes", "no"
WAIT = "wait\n"  # opens a recovery in the arithmetic task

SUPERVISED = 0.1  # share of those whose error the teacher learns to make, too
ARITHMETIC = 0.65  # share of documents of the arithmetic task
JUDGED = 0.35  # share of documents that judge an answer
VERDICT_WEIGHT = 8.0


@dataclass(frozen=True)
class Mix:
    """What a stage of the teacher's training is on."""

    injected: float  # share of solved arithmetic documents with an error and its recovery
    wait_weight: float  # weight of the word that opens a recovery
    walks: float  # share of judged arithmetic answers that err, notice and recover at random


SOLVING = Mix(injected=0.5, wait_weight=1.0, walks=0.0)
CHECKING = Mix(injected=0.6, wait_weight=3.0, walks=0.7)


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
    return wrong if wrong != value and wrong >= 0 else value + 1


def wrong_step(step, rng: random.Random):
    """``step`` with a wrong result, a miscopied operand or a miscarried left side (the rest consistent with it)."""
    kind = rng.choice(("result", "result", "right", "left"))
    arithmetic = task_module("arithmetic")
    if kind == "result":
        return arithmetic.Step(step.left, step.operator, step.right, wrong_number(step.result, rng))
    left = wrong_number(step.left, rng) if kind == "left" else step.left
    right = wrong_number(step.right, rng) if kind == "right" else step.right
    return arithmetic.Step(left, step.operator, right, arithmetic.apply(left, step.operator, right))


def recovery(problem, rng: random.Random, wait_weight: float = 1.0) -> Document:
    """A solution with one to two injected errors, each noticed at once or one step late, then corrected."""
    steps, document, pending, position = problem.steps, [], "", 0
    weight = float(rng.random() < SUPERVISED)
    erring = set(rng.sample(range(len(steps)), k=rng.choice((1, 1, 2))))
    while position < len(steps):
        step = steps[position]
        if position in erring:
            erring.discard(position)
            wrong = wrong_step(step, rng)
            text = f"{wrong}\n"
            if position + 1 < len(steps) and rng.random() < 0.3:
                following = steps[position + 1]
                carried = task_module("arithmetic").apply(wrong.result, following.operator, following.right)
                text += f"{wrong.result}{following.operator}{following.right}={carried}\n"
            document += [(pending, 1.0), (text, weight), (WAIT, wait_weight)]
            pending = ""
        pending += f"{step}\n"
        position += 1
    return [*document, (f"{pending}#{problem.answer}", 1.0)]


def walk(problem, rng: random.Random) -> str:
    """An answer as an unsure writer gives it: steps go wrong, are noticed or not, and are set right or not."""
    arithmetic, lines, total = task_module("arithmetic"), [], problem.operands[0]
    for step in problem.steps:
        true = arithmetic.Step(total, step.operator, step.right, arithmetic.apply(total, step.operator, step.right))
        written = wrong_step(true, rng) if rng.random() < 0.35 else true
        lines.append(str(written))
        while rng.random() < (0.6 if written != true else 0.15):
            written = wrong_step(true, rng) if rng.random() < 0.4 else true
            lines += [WAIT.strip(), str(written)]
        total = written.result
    return "\n".join([*lines, f"#{total if rng.random() < 0.95 else wrong_number(total, rng)}"])


def wrong_arithmetic(problem, rng: random.Random) -> str:
    """A written answer that ends wrong: an error carried to the end, a wrong last line, or a cut."""
    arithmetic, kind = task_module("arithmetic"), rng.random()
    lines, total = [], problem.operands[0]
    erring = rng.randrange(len(problem.steps)) if kind < 0.75 else None
    for position, step in enumerate(problem.steps):
        written = arithmetic.Step(total, step.operator, step.right, arithmetic.apply(total, step.operator, step.right))
        if position == erring:
            written = wrong_step(written, rng)
        lines.append(str(written))
        total = written.result
    if kind >= 0.95:
        return "\n".join(lines)[: rng.randint(1, 20)]
    answer = total if total != problem.answer else wrong_number(problem.answer, rng)
    return "\n".join([*lines, f"#{answer}"])


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


def judged(problem, kind: str, rng: random.Random, walks: float = 0.0) -> Document:
    """A written answer, the check that solves the problem again, and the verdict on the answer's last line."""
    right = rng.random() < 0.5
    if kind == "arithmetic" and walks and rng.random() < walks:
        answer = walk(problem, rng)
        while answer.endswith(f"#{problem.answer}") != right:
            answer = walk(problem, rng)
    elif right and kind == "arithmetic" and rng.random() < 0.2:
        answer = "".join(text for text, _ in recovery(problem, rng))
    elif right:
        answer = problem.solution
    else:
        answer = (wrong_arithmetic if kind == "arithmetic" else wrong_function)(problem, rng)
    return [(answer, 0.0), (CHECK, 0.0), (problem.solution + "\n", 1.0), (YES if right else NO, VERDICT_WEIGHT)]


def documents(seed: int, mix: Mix) -> Iterator[tuple[str, Document]]:
    """Endless ``(prompt, response document)`` pairs for the teacher; an EOS with weight 1 is still to be appended."""
    rng = random.Random(f"embedded corpus {seed}")
    streams = {name: task_module(name).problems("train", seed) for name in ("arithmetic", "functions")}
    while True:
        kind = "arithmetic" if rng.random() < ARITHMETIC else "functions"
        problem = next(streams[kind])
        if rng.random() < JUDGED:
            yield problem.prompt, judged(problem, kind, rng, mix.walks)
        elif kind == "arithmetic" and rng.random() < mix.injected:
            yield problem.prompt, recovery(problem, rng, mix.wait_weight)
        else:
            yield problem.prompt, [(problem.solution, 1.0)]


def tokenizer_texts(modules: list[ModuleType], count: int = 2000) -> Iterator[str]:
    """Text the tokenizer's merges are learned from."""
    from itertools import islice

    for module in modules:
        for problem in islice(module.problems("train", 0), count):
            yield problem.prompt + problem.solution + CHECK + YES + "\n" + NO + "\n" + WAIT
