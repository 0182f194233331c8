"""What the embedded models can do, measured on validation problems: solving, recovering, judging.

Programs are compared with the reference text here, so that a build needs no sandbox; the leaderboard runs them.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from itertools import islice

import torch
from scipy.stats import mannwhitneyu
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from opd_bench.embedded.corpus import CHECK, NO, YES, wrong_step
from opd_bench.judge import Judge
from opd_bench.models import eos_id
from opd_bench.resources import task_module
from opd_bench.rollouts import sample
from opd_bench.sequences import Prompts, Sequences

PROBLEMS = 200
MAX_RESPONSE, MAX_CHECK = 88, 92


@dataclass(frozen=True)
class Measured:
    """Accuracies in 0..1 by task: greedy and sampled at temperature 1; the share of injected errors the teacher still
    solves after; and how well its verdicts tell the student's right answers from its wrong ones (AUROC)."""

    teacher_greedy: dict[str, float]
    teacher_sampled: dict[str, float]
    student_greedy: dict[str, float]
    student_sampled: dict[str, float]
    recovery: dict[str, float]
    judge_auroc: dict[str, float]


def problems(task: str) -> list:
    return list(islice(task_module(task).problems("validation", 5), PROBLEMS))


def respond(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, texts: list[str], seed: int | None = None) -> Sequences:
    """Responses to ``texts``: greedy, or sampled under ``seed``."""
    generator = None if seed is None else torch.Generator().manual_seed(seed)
    prompts = Prompts([list(tokenizer(text).input_ids) for text in texts], [""] * len(texts))
    return sample(model, prompts, max_response=MAX_RESPONSE, eos=eos_id(tokenizer), generator=generator)


def solved(task: str, problem, response: str) -> bool:
    return response == problem.solution if task == "functions" else response.rsplit("\n", 1)[-1] == f"#{problem.answer}"


def verdicts(tokenizer: PreTrainedTokenizerFast, task: str, given: list, responses: Sequences) -> list[bool]:
    texts = tokenizer.batch_decode(list(map(responses.response, range(len(given)))), skip_special_tokens=True)
    return [solved(task, problem, text) for problem, text in zip(given, texts, strict=True)]


def accuracy(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, task: str, seed: int | None = None) -> float:
    """Share of validation problems solved."""
    given = problems(task)
    responses = respond(model, tokenizer, [problem.prompt for problem in given], seed)
    return sum(verdicts(tokenizer, task, given, responses)) / len(given)


def recovery(teacher: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast) -> float:
    """Share of arithmetic problems the teacher solves after one of its steps was replaced by a wrong one."""
    rng, given, texts = random.Random(0), problems("arithmetic"), []
    for problem in given:
        steps = problem.steps
        place = rng.randrange(len(steps))
        written = [*steps[:place], wrong_step(steps[place], rng)]
        texts.append(problem.prompt + "".join(f"{step}\n" for step in written))
    return sum(verdicts(tokenizer, "arithmetic", given, respond(teacher, tokenizer, texts))) / len(given)


def judge_auroc(teacher: LlamaForCausalLM, student: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, task: str) -> float:
    """AUROC of the judge's verdict on the student's own sampled answers; NaN where all are right or all wrong."""
    given = problems(task)
    answers = respond(student, tokenizer, [problem.prompt for problem in given], seed=0)
    right = torch.tensor(verdicts(tokenizer, task, given, answers))
    judge = Judge.from_text(teacher, tokenizer, question=CHECK, yes=YES, no=NO, max_check=MAX_CHECK)
    verdict_B = judge(answers).verdict_B
    if right.all() or not right.any():
        return float("nan")
    good, bad = verdict_B[right].numpy(), verdict_B[~right].numpy()
    return float(mannwhitneyu(good, bad).statistic / (len(good) * len(bad)))


def measure(teacher: LlamaForCausalLM, student: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast) -> Measured:
    def by_task(of: Callable[[str], float]) -> dict[str, float]:
        return {task: round(of(task), 3) for task in ("arithmetic", "functions")}

    return Measured(
        teacher_greedy=by_task(lambda task: accuracy(teacher, tokenizer, task)),
        teacher_sampled=by_task(lambda task: accuracy(teacher, tokenizer, task, seed=0)),
        student_greedy=by_task(lambda task: accuracy(student, tokenizer, task)),
        student_sampled=by_task(lambda task: accuracy(student, tokenizer, task, seed=0)),
        recovery={"arithmetic": round(recovery(teacher, tokenizer), 3)},
        judge_auroc=by_task(lambda task: judge_auroc(teacher, student, tokenizer, task)),
    )
