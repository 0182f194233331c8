"""Rebuilding the embedded teacher, students and tokenizer from a seed.

    opd-bench build-embedded rebuilt/

The teacher learns from generated documents (`corpus.py`); each student is cold-started on texts sampled from the
teacher, until it solves between .35 and .65 of what the teacher solves, on every task. A build that was interrupted goes on
where it stopped; other thread counts or library versions give other weights of the same quality.
"""

from __future__ import annotations

import os
import random
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from itertools import islice
from multiprocessing import get_context
from pathlib import Path

import torch
from rich.console import Console
from transformers import LlamaForCausalLM, PreTrainedModel, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from opd_bench import store
from opd_bench.embedded import measures
from opd_bench.embedded.corpus import FINISH, TASKS, documents, tokenizer_texts
from opd_bench.embedded.fit import encode, new_llama, optimizers
from opd_bench.embedded.tokenizer import train_tokenizer
from opd_bench.errors import RunError, UserError
from opd_bench.flops import flop_count
from opd_bench.models import COLD_START_FILE, eos_id, load_model, load_pairs, load_tokenizer
from opd_bench.readings import START
from opd_bench.resources import task_module
from opd_bench.rollouts import sample
from opd_bench.sequences import Prompts
from opd_bench.supervised import Example, batches, clock, fit

TEACHER_WIDTH, TEACHER_LAYERS = 160, 4
STAGES = (  # of the teacher's training: steps, learning rate, cooldown, what its documents are about
    (9_000, 4e-3, 0.35, TASKS),
    (3_000, 2e-3, 1.0, FINISH),
)
STUDENTS = 3
STUDENT_WIDTH, STUDENT_LAYERS, STUDENT_LR = 96, 2, 2e-3
BATCH_TOKENS = 4096
TEXTS = 2000  # teacher texts per task a student is cold-started on
ROUND, LOOK = 50, 120  # steps between two looks at a student, and problems per task it is looked at with
# Shares of the teacher's greedy score: the least a student may solve of a task, where the task is left alone, and the most.
COLD = (0.35, 0.5, 0.65)
MOST_ROUNDS = 200


def build(out: Path, seed: int, console: Console, shorten: int = 1) -> None:
    """Write ``teacher/`` and ``student-<k>/`` (weights, config, tokenizer) and ``measured.json`` into ``out``.

    ``shorten`` divides the teacher's steps and the students' texts, for a trial. UserError if ``out`` holds a build of other settings.
    """
    elapsed, settings = clock(), {"seed": seed, "shortened": shorten}
    if not (out / "build.json").exists():
        store.write_json(out / "build.json", settings)
    elif store.read_json(out / "build.json") != settings:
        raise UserError(f"{out} holds a build of another seed or size; choose another folder")
    if not (out / "teacher").exists():
        tokenizer = train_tokenizer(tokenizer_texts())
        save(build_teacher(out, tokenizer, seed, shorten, console), tokenizer, out / "teacher")
    texts = max(1, TEXTS // shorten)
    with ProcessPoolExecutor(min(STUDENTS, os.cpu_count() or 1), mp_context=get_context("spawn")) as pool:
        for line in pool.map(build_student, [out] * STUDENTS, range(STUDENTS), [seed] * STUDENTS, [texts] * STUDENTS):
            console.print(line)
    pairs = load_pairs([str(out / f"student-{number}") for number in range(STUDENTS)], str(out / "teacher"))
    report = measures.measure(pairs[0].teacher, [pair.student for pair in pairs], pairs[0].tokenizer) | settings
    store.write_json(out / "measured.json", report)
    console.print(report)
    console.print(f"Built in {elapsed()}.")


def build_teacher(out: Path, tokenizer: PreTrainedTokenizerFast, seed: int, shorten: int, console: Console) -> LlamaForCausalLM:
    teacher, elapsed = new_llama(TEACHER_WIDTH, TEACHER_LAYERS, tokenizer, seed), clock()
    for number, (steps, lr, cooldown, shares) in enumerate(STAGES):
        steps = steps // shorten
        examples = (encode(prompt, document, tokenizer) for prompt, document in documents(len(STAGES) * seed + number, shares))
        fit(
            teacher,
            batches(examples, BATCH_TOKENS, random.Random(seed)),
            steps,
            optimizers(teacher, lr),
            cooldown=cooldown,
            checkpoint=out / f"teacher-{number}.checkpoint",
            report=lambda step, loss, steps=steps, number=number: console.print(
                f"teacher, stage {number}: step {step} of {steps}, loss {loss:.4f}, {elapsed()}"
            ),
        )
    return teacher


def teacher_texts(
    teacher: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, task: str, seed: int, count: int
) -> tuple[list[Example], int]:
    """Texts sampled from the teacher at temperature 1, the prompt without weight, as the bench's own corpus is; their FLOPs."""
    problems = islice(task_module(task).problems("train", 1000 + seed), count)
    prompts = Prompts([list(tokenizer(problem.prompt).input_ids) for problem in problems], [task] * count)
    texts = sample(
        teacher, prompts, max_response=measures.MAX_RESPONSE, eos=eos_id(tokenizer), generator=torch.Generator().manual_seed(seed)
    )
    rows = zip(prompts.ids, map(texts.response, range(count)), strict=True)
    flops = flop_count(teacher.config).sample(texts.prompt_B, texts.length_B - texts.prompt_B)
    return [(prompt + response, [0.0] * len(prompt) + [1.0] * len(response)) for prompt, response in rows], flops


def build_student(out: Path, number: int, seed: int, texts_per_task: int) -> str:
    """Write ``student-<number>/`` unless it is there, and say what it solves. Runs in a process of its own, on one thread."""
    torch.set_num_threads(1)
    folder, elapsed = out / f"student-{number}", clock()
    if folder.exists():
        return f"student {number}: was there"
    teacher, tokenizer = load_model(str(out / "teacher")), load_tokenizer(str(out / "teacher"))
    student, flops, score = cold_start(teacher, tokenizer, seed + number, texts_per_task)
    save(student, tokenizer, folder, flops)
    return f"student {number}: {sum(flops.values()):.2e} FLOPs, {score}, {elapsed()}"


def cold_start(
    teacher: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, seed: int, texts_per_task: int
) -> tuple[LlamaForCausalLM, dict[str, int], dict[str, float]]:
    """A student trained on teacher text, round by round on the tasks it does not yet solve well enough; its FLOPs by kind; its scores."""
    student, training = new_llama(STUDENT_WIDTH, STUDENT_LAYERS, tokenizer, seed + 1), 0
    written = {task: teacher_texts(teacher, tokenizer, task, seed, texts_per_task) for task in TASKS}
    texts = {task: examples for task, (examples, _) in written.items()}
    ceiling = {task: measures.accuracy(teacher, tokenizer, task, count=LOOK) for task in TASKS}
    least, enough, most = COLD
    rng = random.Random(seed)
    score: dict[str, float] = {}
    for _ in range(MOST_ROUNDS):
        score = {task: measures.accuracy(student, tokenizer, task, count=LOOK) for task in TASKS}
        if all(least * ceiling[task] <= score[task] <= most * ceiling[task] for task in TASKS):
            spent = (training, sum(flops for _, flops in written.values()))
            return student, dict(zip(START, spent, strict=True)), score
        lacking = [task for task in TASKS if score[task] < enough * ceiling[task]]
        lacking = lacking or [task for task in TASKS if score[task] <= most * ceiling[task]]  # the others are to be forgotten a little
        if not lacking:
            break

        def draws(tasks: list[str] = lacking) -> Iterator[Example]:
            while True:
                yield rng.choice(texts[rng.choice(tasks)])

        training += fit(student, batches(draws(), BATCH_TOKENS, rng), ROUND, optimizers(student, STUDENT_LR))
    raise RunError(f"the student of seed {seed} came to {score}, never within {least} to {most} of the teacher on every task")


def save(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerBase, folder: Path, flops: dict[str, int] | None = None) -> None:
    """A plain `save_pretrained` folder in bf16, with what a cold start cost."""
    with store.whole_folder(folder) as part:
        model.bfloat16().save_pretrained(part)
        tokenizer.save_pretrained(part)
        if flops:
            store.write_json(part / COLD_START_FILE, flops)
    model.float()
