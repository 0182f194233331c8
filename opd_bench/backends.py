"""Who samples, who scores and who judges, as the configuration says; what does not fit together is found before anything trains."""

from __future__ import annotations

import tempfile
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from opd_bench.behind import Behind
from opd_bench.config import Config
from opd_bench.errors import UserError
from opd_bench.evaluate import TaskSuite
from opd_bench.hub import unpinned
from opd_bench.judge import Judge
from opd_bench.judge_endpoint import VERDICTS, EndpointJudge
from opd_bench.judge_model import RATING, YES_NO, CheckJudge, Options, ReadJudge, rating, yes_or_no
from opd_bench.judge_solver import SolvingJudge
from opd_bench.judge_verifier import Verifier
from opd_bench.models import Pair, eos_id, load_model, load_tokenizer, token_count
from opd_bench.rollouts import ROWS, Sampler, sample
from opd_bench.scoring import FOREIGN, ModelTeacher, Teacher, signal_error
from opd_bench.sequences import Prompts
from opd_bench.teacher_cache import CachedTeacher
from opd_bench.teacher_server import PROBE, ServerTeacher
from opd_bench.teachers import Teachers
from opd_bench.vllm_sampler import VLLMSampler, library
from opd_bench.vllm_server_sampler import VLLMServerSampler

GROWN = 256  # prompts on which two vocabularies are compared
PROBED = 4  # texts on which a server or signal is compared with the model itself


def check_sampler(config: Config, pair: Pair, prompts: list[list[int]], longest: int, workers: int) -> None:
    """UserError where vLLM is wanted, and absent or of another version, or its server cannot be used by ``workers`` arms at once."""
    if config.rollouts.by == "vllm":
        library()
    if config.rollouts.by == "server":
        if workers > 1:
            raise UserError(
                f"the rollouts' server has the weights of one student at a time and {workers} arms would share it; add --jobs 1"
            )
        _server_sampler(config, longest).check(pair.student, _few(prompts), pair.eos)


def sampler_of(config: Config, tokens: int, longest: int) -> Sampler:
    """Whoever writes the rollouts over a vocabulary of ``tokens``, for sequences of up to ``longest``."""
    rollouts = config.rollouts
    if rollouts.by == "server":
        return _server_sampler(config, longest)
    if rollouts.by == "vllm":
        return VLLMSampler(config.location(config.students[0]), tokens, ROWS, longest, rollouts.dtype)
    return partial(sample, dtype=getattr(torch, rollouts.dtype))


def paced(config: Config, sampler: Sampler, student: PreTrainedModel) -> Sampler:
    """``sampler`` as far behind ``student`` as is allowed; only a GPU gains by it."""
    return Behind(sampler, overlap=student.device.type == "cuda") if config.rollouts.staleness else sampler


def _server_sampler(config: Config, longest: int) -> VLLMServerSampler:
    return VLLMServerSampler(str(config.rollouts.url), config.rollouts.served or unpinned(config.students[0]), longest)


def _few(prompts: list[list[int]]) -> Prompts:
    return Prompts(prompts[:PROBED], [""] * len(prompts[:PROBED]))


def teacher_of(config: Config, pair: Pair, teachers: Teachers, longest: int, kept: Path) -> Teacher:
    """Whoever gives the teacher's distributions; a cache lies in the folder ``kept``."""
    exact, scoring = ModelTeacher(pair.teacher), config.scoring
    if scoring.by == "model":
        return teachers
    if scoring.top >= pair.teacher.config.vocab_size:
        raise UserError(f"scoring.top is {scoring.top} and there are {pair.teacher.config.vocab_size} tokens; some must be left")
    if scoring.by == "cache":
        return CachedTeacher(exact, scoring.top, kept / "scores.sqlite")
    tokens = pair.tokenizer(PROBE, add_special_tokens=False).input_ids
    served = scoring.served or unpinned(config.teacher)
    columns, known = pair.teacher.config.vocab_size, token_count(pair.tokenizer)
    return ServerTeacher(str(scoring.url), served, scoring.top, columns, pair.eos, tokens, longest, known=known)


def check_teacher(config: Config, pair: Pair, prompts: list[list[int]], longest: int) -> dict[str, float] | None:
    """How a sparse signal differs from the teacher on a few of its own texts (`signal_error`); None for a dense one.

    UserError if a server cannot be used or has other weights than the teacher of the configuration.
    """
    if config.scoring.by == "model":
        return None
    with tempfile.TemporaryDirectory() as kept:
        teacher = teacher_of(config, pair, Teachers(pair.teacher), longest, Path(kept))
        if isinstance(teacher, ServerTeacher):
            teacher.check()
        texts = sample(pair.teacher, _few(prompts), max_response=config.max_response, eos=pair.eos, generator=None)
        error = signal_error(teacher, ModelTeacher(pair.teacher), texts)
    if error["largest_gap"] > FOREIGN:
        raise UserError(
            f"the teacher's log-probabilities as served differ by {error['largest_gap']:.2g} nats from those of its weights; "
            "serve the teacher that the configuration names"
        )
    return error


def judge_of(config: Config, pair: Pair, suite: TaskSuite, prompts: list[str], verifier: Verifier) -> Judge:
    """Whoever gives verdicts. UserError where it cannot be asked; ``prompts`` are those of training, as text."""
    judging = config.judge
    if judging.by == "verifier":
        return verifier
    if judging.by == "endpoint":
        assert judging.endpoint
        rates = judging.endpoint.answer == "rating"
        template, options, other = _question(config, rates)
        return EndpointJudge(str(judging.model), template, options, other, judging.endpoint, Path(), judging.parameters)
    model, own, growth = pair.teacher, pair.tokenizer, 1.0
    if judging.model is not None:
        location = config.location(judging.model)
        model, own = load_model(location, device=config.device), load_tokenizer(location)
    if own.get_vocab() != pair.tokenizer.get_vocab() or judging.by != "check":
        growth = _growth(pair.tokenizer, own, prompts[:GROWN])
    if judging.by == "solve":
        tasks = {text: task for split in ("train", "test") for task, text in suite.asked(split)}
        return SolvingJudge(model, own, suite.put, suite.taken, tasks, eos_id(own), judging.max_check, growth)
    if judging.by == "check":
        said = judging.model_dump(include={"question", "yes", "no", "max_check", "at_random"})
        judge = CheckJudge.from_text(model, own, **said)
        return replace(judge, tokenizer=own, growth=growth) if judging.model is not None else judge
    return ReadJudge(model, own, *_question(config, judging.by == "rubric"), growth)


def check_judge(judge: Judge, out: Path) -> None:
    """UserError if an endpoint does not answer as it should; the one question that this takes is kept in ``out``."""
    if isinstance(judge, EndpointJudge):
        judge.at(out / VERDICTS).check()


def judge_in(judge: Judge, out: Path) -> Judge:
    """``judge`` with its memory, if it has one, in the folder ``out`` of the whole comparison."""
    return judge.at(out / VERDICTS) if isinstance(judge, EndpointJudge) else judge


def _question(config: Config, rates: bool) -> tuple[str, Options, Options]:
    judging = config.judge
    if rates:
        return judging.template or RATING, rating(judging.scale), rating(judging.scale, swapped=True)
    return judging.template or YES_NO, yes_or_no(), yes_or_no(swapped=True)


def _growth(student: PreTrainedTokenizerBase, judge: PreTrainedTokenizerBase, texts: list[str]) -> float:
    """The most tokens of the judge for one of the student's, over ``texts``; 1 at least."""
    pairs = zip(*(tokenizer(texts, add_special_tokens=False).input_ids for tokenizer in (judge, student)), strict=True)
    return max(1.0, *(len(its) / len(own) for its, own in pairs if own))
