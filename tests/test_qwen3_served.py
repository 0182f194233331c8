"""The qwen3 tier's engines, on a tiny pair of its shape: vLLM writes the rollouts, and a server of vLLM scores for the teacher."""

from __future__ import annotations

import copy

import pytest
import torch
from qwen3_pair import TURN
from test_compare import in_this_process, run
from test_qwen3 import configured
from test_samplers import assert_logprobs, needs_vllm, serving

from opd_bench import store
from opd_bench.engine import TorchEngine
from opd_bench.judge_model import CheckJudge
from opd_bench.losses import reverse_kl
from opd_bench.models import load_pairs
from opd_bench.plan import jobs
from opd_bench.rollouts import sample
from opd_bench.scoring import ModelTeacher, signal_error
from opd_bench.sequences import Prompts
from opd_bench.teacher_server import PROBE, ServerTeacher
from opd_bench.vllm_sampler import VLLMSampler


def prompts_of(pair) -> Prompts:
    ids = pair.tokenizer(["x = 1", "What is 2 + 2?"], add_special_tokens=False).input_ids
    return Prompts(ids, [""] * 2)


@needs_vllm
def test_rollouts_of_vllm_are_those_of_the_weights_just_trained(qwen3_folders):
    (pair,) = load_pairs([str(qwen3_folders["student"])], str(qwen3_folders["teacher"]), eos=TURN)
    prompts = prompts_of(pair)
    engine = TorchEngine(
        student=copy.deepcopy(pair.student),
        teacher=ModelTeacher(pair.teacher),
        eos=pair.eos,
        max_response=8,
        stream=lambda start, count: prompts,
        corpus=lambda rows: pytest.fail("no text of the teacher is needed"),
        judge_model=CheckJudge(pair.teacher, [2, 3], 4, 5, pair.eos, max_check=3),
        lr=1e-2,
        seed=0,
        sampler=VLLMSampler(str(qwen3_folders["student"]), len(pair.tokenizer), 8, 64, "float32"),
    )
    for _ in range(2):
        rollouts = engine.sample(prompts, 4)
        assert_logprobs(rollouts, engine.plain)
        engine.update(rollouts, reverse_kl, teacher=True, weights_B=None, lr_scale=1.0)


@needs_vllm
def test_a_served_teacher_ends_and_scores_as_its_weights_do(qwen3_folders, tmp_path, monkeypatch):
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    (pair,) = load_pairs([str(qwen3_folders["student"])], str(qwen3_folders["teacher"]), eos=TURN)
    texts = sample(pair.student, prompts_of(pair), max_response=8, eos=pair.eos, generator=torch.Generator().manual_seed(0), group=2)
    with serving(qwen3_folders["teacher"], tmp_path / "log", "--max-model-len", 256, "--max-logprobs", 8) as url:
        tokens = pair.tokenizer(PROBE, add_special_tokens=False).input_ids
        teacher = ServerTeacher(url, "served", 8, pair.teacher.config.vocab_size, pair.eos, tokens, 64)
        teacher.check()
        assert signal_error(teacher, ModelTeacher(pair.teacher), texts)["largest_gap"] < 1e-3


@needs_vllm
def test_the_tier_runs_arms_with_its_own_engines_and_judge(qwen3_folders, tmp_path, monkeypatch):
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    options = ("--max-model-len", 2048, "--max-logprobs", 20, "--dtype", "bfloat16")
    with serving(qwen3_folders["teacher"], tmp_path / "log", *options) as url, in_this_process():
        engines = {"rollouts": {"by": "vllm"}, "scoring": {"by": "server", "url": url, "served": "served"}}
        budget = {"axis": "flops", "limit": 3e9}  # in hours it might be spent on the first call of vLLM
        config = configured(qwen3_folders, **engines, budget=budget, methods={name: {"batch": 4} for name in ("sft", "opd_rlaif")})
        board = run(config, tmp_path / "run")
    assert {method.name for method in board.methods} == {"sft", "opd_rlaif"}
    (job,) = (job for job in jobs(config) if job.method == "opd_rlaif")
    charged = {charge["kind"] for charge in store.read_jsonl(job.folder(tmp_path / "run") / "ledger.jsonl") if charge["seconds"]}
    assert charged == {"student_sample", "teacher_score", "judge", "student_update"}
    assert store.read_json(job.folder(tmp_path / "run") / "arm.json")["mismatch"]["tokens"] > 0
