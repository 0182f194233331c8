"""The qwen3 tier's way through, on a pair of two layers and random weights whose files disagree about what ends a text, as Qwen3's do."""

from __future__ import annotations

import copy
import re

import pytest
import torch
from datasets import config as datasets_config
from hub_copies import write_all
from qwen3_pair import TURN
from test_compare import in_this_process, run
from test_samplers import assert_logprobs
from transformers import AutoModelForCausalLM, AutoTokenizer

from opd_bench import arm, store
from opd_bench.config import load, read_yaml
from opd_bench.models import chat_text, load_pairs
from opd_bench.plan import jobs
from opd_bench.preflight import examine
from opd_bench.resources import TIERS
from opd_bench.rollouts import sample
from opd_bench.sequences import Prompts

METHODS = ("sft", "offline_kd", "opd", "opd_rlaif")


def configured(qwen3_folders, **changes):
    """The tier on the tiny pair, with tasks, a sampler and a teacher of this process."""
    small = {
        "students": [str(qwen3_folders["student"])],
        "teacher": str(qwen3_folders["teacher"]),
        "eos": TURN,
        "device": "cpu",
        "prompts": [],
        "tasks": {"stem": ["opd_bench_arithmetic"], "coding": ["opd_bench_functions"], "held_out": ["opd_bench_equations"]},
        "seeds": 1,
        "budget": {"limit": 5e-4},
        "rollouts": {"by": "model"},
        "scoring": {"by": "model", "url": None},
        "max_response": 12,
        "evaluation": {"limit": 2},
        "exposure": {"prompts": 2, "continued": 1, "draws": 20},
        "methods": {name: {"batch": 4} for name in METHODS},
        "gpu": None,
    }
    return load("qwen3", [small, changes])


def test_one_token_ends_the_texts_of_both_and_of_what_is_saved(qwen3_folders, tmp_path):
    (pair,) = load_pairs([str(qwen3_folders["student"])], str(qwen3_folders["teacher"]), eos=TURN)
    for model in (pair.student, pair.teacher):
        assert model.config.eos_token_id == model.generation_config.eos_token_id == pair.eos == pair.tokenizer.eos_token_id
    assert not examine(configured(qwen3_folders), pair, 40).warnings
    pair.student.save_pretrained(tmp_path)
    pair.tokenizer.save_pretrained(tmp_path)
    saved, tokenizer = AutoModelForCausalLM.from_pretrained(tmp_path), AutoTokenizer.from_pretrained(tmp_path)
    assert saved.generation_config.eos_token_id == tokenizer.eos_token_id == pair.eos
    assert chat_text(tokenizer, "1 + 1") == "[1 + 1]\n# "  # it is not asked to think


def test_pairs_that_end_otherwise_are_refused_with_the_key_that_mends_it(program, qwen3_folders, tmp_path):
    for eos, said in ((None, "different tokens, '<unk>' and '<eos>'; .*set eos: "), ("<none>", "has no token '<none>' to end texts with")):
        document = configured(qwen3_folders, eos=eos).model_dump(mode="json")
        store.write_json(tmp_path / "config.yaml", document)
        code, _, error = program("compare", "--tier", "qwen3", "--config", "config.yaml", "--out", "run")
        assert code == 2
        assert re.search(said, error), error


@pytest.mark.slow
def test_the_tier_compares_its_methods_on_its_own_prompts_and_tasks(qwen3_folders, tmp_path, monkeypatch):
    monkeypatch.setattr(datasets_config, "HF_DATASETS_CACHE", tmp_path / "cache")
    tier = read_yaml(TIERS / "qwen3.yaml")
    tasks = {**tier["tasks"], "held_out": [], "data_dir": str(write_all(tmp_path / "data"))}  # MATH-500 needs packages of its own
    config = configured(qwen3_folders, tasks=tasks, prompts=tier["prompts"])
    assert (config.dtype, config.rollouts.dtype, config.gradient_checkpointing, config.chat) == ("bfloat16", "bfloat16", True, True)
    with in_this_process():
        board = run(config, tmp_path / "run")
    assert board.budget.axis == "GPU-hours"
    assert {method.name for method in board.methods} == {*METHODS}
    assert (board.tasks.stem, board.tasks.coding) == (["gsm8k_cot_zeroshot"], ["humaneval_instruct"])
    taken = store.read_json(tmp_path / "run" / "manifest.json")["prompts"]
    assert {name: (of["read"], of["removed"], of["contaminated"]) for name, of in taken.items()} == dict.fromkeys(
        ("gsm8k", "mbpp"), (8, {}, {})
    )
    for job in jobs(config):
        if job.method:
            summary = store.read_json(job.folder(tmp_path / "run") / "arm.json")
            seconds = sum(charge["seconds"] for charge in store.read_jsonl(job.folder(tmp_path / "run") / "ledger.jsonl"))
            assert summary["share_spent"] == pytest.approx(2 * seconds / 3600 / config.limit)  # two GPUs an arm
            assert AutoModelForCausalLM.from_pretrained(job.folder(tmp_path / "run")).config.model_type == "qwen3"


@pytest.mark.parametrize("changes", [{}, {"lora": {"rank": 4}}], ids=["in full", "lora"])
def test_every_method_takes_a_step(qwen3_folders, tmp_path, changes):
    config = configured(qwen3_folders, budget={"axis": "flops", "limit": 1e12}, **changes)
    shop = arm.workshop(config.model_dump_json())
    for job in (job for job in jobs(config) if job.method):
        method, student = job.build(), copy.deepcopy(shop.pairs[0].student)
        before = [weight.clone() for weight in student.parameters()]
        engine = shop.engine(job, student, 1e-2, tmp_path / "corpus")
        bench = shop.bench(engine, config.limit)
        bench.batch = 4
        method.step(bench)
        assert all(map(torch.isfinite, map(torch.tensor, bench.losses)))
        assert any(not torch.equal(old, new) for old, new in zip(before, engine.plain.parameters(), strict=True))
        assert bench.ledger.by_kind()["student_update"] > 0


def test_rollouts_of_our_decoder_are_those_of_the_model(qwen3_folders):
    (pair,) = load_pairs([str(qwen3_folders["student"])], str(qwen3_folders["teacher"]), eos=TURN)
    assert_logprobs(written(pair), pair.student)


def written(pair, sampler=sample):
    ids = pair.tokenizer(["x = 1", "What is 2 + 2?"], add_special_tokens=False).input_ids
    generator = torch.Generator().manual_seed(0)
    return sampler(pair.student, Prompts(ids, [""] * 2), max_response=8, eos=pair.eos, generator=generator, group=2)
