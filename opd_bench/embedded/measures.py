"""What the embedded models can do, measured on validation problems: solving, recovering, judging.

Programs are compared with the reference text here, so that a build needs no sandbox; the leaderboard runs them.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable
from itertools import islice

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from opd_bench import procedural
from opd_bench.embedded.corpus import CHECK, NO, STEPWISE, TASKS, YES, is_right
from opd_bench.judge import Reader
from opd_bench.judge_model import CheckJudge
from opd_bench.models import eos_id
from opd_bench.procedural import Stepwise
from opd_bench.resources import task_module
from opd_bench.rollouts import sample
from opd_bench.sequences import Prompts, Sequences
from opd_bench.statistics import auroc

PROBLEMS = 250
MAX_RESPONSE, MAX_CHECK = 96, 98
INJECTIONS = ("result", "both")  # the result is wrong and its check not yet written; both are, and agree


def problems(task: str, count: int | None = None) -> list:
    return list(islice(task_module(task).problems("validation", 5), count or PROBLEMS))


def respond(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, texts: list[str], seed: int | None = None) -> Sequences:
    """Responses to ``texts``: greedy, or sampled under ``seed``."""
    generator = None if seed is None else torch.Generator().manual_seed(seed)
    prompts = Prompts([list(tokenizer(text).input_ids) for text in texts], [""] * len(texts))
    return sample(model, prompts, max_response=MAX_RESPONSE, eos=eos_id(tokenizer), generator=generator)


def verdicts(tokenizer: PreTrainedTokenizerBase, task: str, given: list, responses: Sequences) -> list[bool]:
    texts = tokenizer.batch_decode(list(map(responses.response, range(len(given)))), skip_special_tokens=True)
    return [is_right(task, problem, text) for problem, text in zip(given, texts, strict=True)]


def accuracy(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, task: str, seed: int | None = None, count: int | None = None
) -> float:
    """Share of (the first ``count``) validation problems solved: greedily, or sampled under ``seed``."""
    given = problems(task, count)
    responses = respond(model, tokenizer, [problem.prompt for problem in given], seed)
    return sum(verdicts(tokenizer, task, given, responses)) / len(given)


def corrupted(problem: Stepwise, injection: str, rng: random.Random) -> str:
    """``problem`` solved up to a step, chosen at random, whose result is wrong."""
    text = procedural.corrupted(problem.solution, rng)
    assert text
    return problem.prompt + text + ("" if injection == "result" else f"={text.rsplit('=', 1)[1]}\n")


def recovery(teacher: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, task: str, injection: str) -> float:
    """Share of problems the teacher solves, greedily, after one of its intermediate results was replaced by a wrong one."""
    rng, given = random.Random(0), problems(task)
    texts = [corrupted(problem, injection, rng) for problem in given]
    return sum(verdicts(tokenizer, task, given, respond(teacher, tokenizer, texts))) / len(given)


def judge_auroc(
    teacher: PreTrainedModel, students: Iterable[PreTrainedModel], tokenizer: PreTrainedTokenizerBase, task: str
) -> float | None:
    """AUROC of the judge's verdict on the students' own sampled answers."""
    given, right, verdict = problems(task), [], []
    judge = CheckJudge.from_text(teacher, tokenizer, question=CHECK, yes=YES, no=NO, max_check=MAX_CHECK)
    for student in students:
        answers = respond(student, tokenizer, [problem.prompt for problem in given], seed=0)
        right += verdicts(tokenizer, task, given, answers)
        verdict += judge(Reader()(answers)).verdict_B.tolist()
    return auroc(verdict, right)


def by_task(of: Callable[[str], float | None], tasks: Iterable[str] = tuple(TASKS)) -> dict[str, float | None]:
    values = {task: of(task) for task in tasks}
    return {task: value if value is None else round(value, 3) for task, value in values.items()}


def measure(teacher: PreTrainedModel, students: list[PreTrainedModel], tokenizer: PreTrainedTokenizerBase) -> dict:
    """Accuracies in 0..1 by task, greedy and sampled at temperature 1; recovery by injection and task; the judge's AUROC by task."""
    return {
        "teacher": solving(teacher, tokenizer),
        "students": [solving(student, tokenizer) for student in students],
        "recovery": {kind: by_task(lambda task, kind=kind: recovery(teacher, tokenizer, task, kind), STEPWISE) for kind in INJECTIONS},
        "judge_auroc": by_task(lambda task: judge_auroc(teacher, students, tokenizer, task)),
    }


def solving(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> dict[str, dict[str, float | None]]:
    return {
        "greedy": by_task(lambda task: accuracy(model, tokenizer, task)),
        "sampled": by_task(lambda task: accuracy(model, tokenizer, task, seed=0)),
    }
