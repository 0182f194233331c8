"""Who samples and who scores, as the configuration says; what does not fit together is found before anything trains."""

from __future__ import annotations

import tempfile
from functools import partial
from pathlib import Path

import torch
from transformers import PreTrainedModel

from opd_bench.behind import Behind
from opd_bench.config import Config
from opd_bench.errors import UserError
from opd_bench.models import Pair
from opd_bench.rollouts import ROWS, Sampler, sample
from opd_bench.scoring import FOREIGN, ModelTeacher, Teacher, signal_error
from opd_bench.sequences import Prompts
from opd_bench.teacher_cache import CachedTeacher
from opd_bench.teacher_server import PROBE, ServerTeacher
from opd_bench.vllm_sampler import VLLMSampler, library
from opd_bench.vllm_server_sampler import VLLMServerSampler

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


def sampler_of(config: Config, longest: int) -> Sampler:
    """Whoever writes the rollouts, for sequences of up to ``longest`` tokens."""
    rollouts = config.rollouts
    if rollouts.by == "server":
        return _server_sampler(config, longest)
    if rollouts.by == "vllm":
        return VLLMSampler(config.location(config.students[0]), ROWS, longest, rollouts.dtype)
    return partial(sample, dtype=getattr(torch, rollouts.dtype))


def paced(config: Config, sampler: Sampler, student: PreTrainedModel) -> Sampler:
    """``sampler`` as far behind ``student`` as is allowed; only a GPU gains by it."""
    return Behind(sampler, overlap=student.device.type == "cuda") if config.rollouts.staleness else sampler


def _server_sampler(config: Config, longest: int) -> VLLMServerSampler:
    return VLLMServerSampler(str(config.rollouts.url), config.rollouts.served or config.students[0], longest)


def _few(prompts: list[list[int]]) -> Prompts:
    return Prompts(prompts[:PROBED], [""] * len(prompts[:PROBED]))


def teacher_of(config: Config, pair: Pair, longest: int, kept: Path) -> Teacher:
    """Whoever gives the teacher's distributions; a cache lies in the folder ``kept``."""
    exact, scoring = ModelTeacher(pair.teacher), config.scoring
    if scoring.by == "model":
        return exact
    if scoring.top >= pair.teacher.config.vocab_size:
        raise UserError(f"scoring.top is {scoring.top} and there are {pair.teacher.config.vocab_size} tokens; some must be left")
    if scoring.by == "cache":
        return CachedTeacher(exact, scoring.top, kept / "scores.sqlite")
    tokens = pair.tokenizer(PROBE, add_special_tokens=False).input_ids
    served = scoring.served or config.teacher
    return ServerTeacher(str(scoring.url), served, scoring.top, pair.teacher.config.vocab_size, pair.eos, tokens, longest)


def check_teacher(config: Config, pair: Pair, prompts: list[list[int]], longest: int) -> dict[str, float] | None:
    """How a sparse signal differs from the teacher on a few of its own texts (`signal_error`); None for a dense one.

    UserError if a server cannot be used or has other weights than the teacher of the configuration.
    """
    if config.scoring.by == "model":
        return None
    with tempfile.TemporaryDirectory() as kept:
        teacher = teacher_of(config, pair, longest, Path(kept))
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
