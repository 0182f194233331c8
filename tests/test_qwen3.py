"""The qwen3 tier's way through, on a pair of two layers and random weights whose files disagree about what ends a text, as Qwen3's do."""

from __future__ import annotations

import copy
import re
from pathlib import Path

import pytest
import torch
from test_compare import in_this_process, run
from test_samplers import assert_logprobs, needs_vllm, serving
from transformers import AutoModelForCausalLM, AutoTokenizer, Qwen3Config, Qwen3ForCausalLM

from opd_bench import arm, store
from opd_bench.config import load
from opd_bench.losses import reverse_kl
from opd_bench.models import chat_text, load_pairs
from opd_bench.plan import jobs
from opd_bench.preflight import examine
from opd_bench.rollouts import sample
from opd_bench.scoring import ModelTeacher, signal_error
from opd_bench.sequences import Prompts
from opd_bench.teacher_server import PROBE, ServerTeacher
from opd_bench.vllm_sampler import VLLMSampler

TURN, TEXT = "<eos>", "<unk>"  # the tests' <|im_end|> and <|endoftext|>
TEMPLATE = (
    "{% for m in messages %}[{{ m.content }}]\n{% endfor %}{% if add_generation_prompt %}{% if enable_thinking is defined and "
    "enable_thinking is false %}# {% else %}<think>{% endif %}{% endif %}"
)
METHODS = ("sft", "offline_kd", "opd", "opd_rlaif")
PADDING = 3  # output columns beyond the tokenizer


def qwen3(folder: Path, tokenizer, width: int, eos: str, said_eos: str) -> Path:
    """``eos`` is what the tokenizer ends texts with, ``said_eos`` what the model's configuration does."""
    torch.manual_seed(width)
    config = Qwen3Config(
        vocab_size=len(tokenizer) + PADDING,
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=32,  # vLLM takes no less
        max_position_embeddings=512,
        tie_word_embeddings=True,
        eos_token_id=tokenizer.get_vocab()[said_eos],
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=None,
    )
    Qwen3ForCausalLM(config).save_pretrained(folder)
    own = copy.deepcopy(tokenizer)
    own.eos_token, own.chat_template = eos, TEMPLATE
    own.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def folders(tokenizer, tmp_path_factory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("qwen3")
    return {
        "student": qwen3(root / "student", tokenizer, 32, TEXT, TEXT),
        "teacher": qwen3(root / "teacher", tokenizer, 64, TURN, TURN),
    }


def configured(folders, **changes):
    """The tier on the tiny pair, with tasks, a sampler and a teacher of this process."""
    small = {
        "students": [str(folders["student"])],
        "teacher": str(folders["teacher"]),
        "eos": TURN,
        "tasks": {"stem": ["opd_bench_arithmetic"], "coding": ["opd_bench_functions"], "held_out": ["opd_bench_equations"]},
        "seeds": 1,
        "budget": {"limit": 5e-4},
        "rollouts": {"by": "model"},
        "scoring": {"by": "model", "url": None},
        "max_response": 12,
        "evaluation": {"limit": 2},
        "exposure": {"prompts": 2, "continued": 1, "draws": 20},
        "judge": {"by": "check", "max_check": 4},
        "methods": {name: {"batch": 4} for name in METHODS},
        "gpu": None,
    }
    return load("qwen3", [small, changes])


def test_one_token_ends_the_texts_of_both_and_of_what_is_saved(folders, tmp_path):
    (pair,) = load_pairs([str(folders["student"])], str(folders["teacher"]), eos=TURN)
    for model in (pair.student, pair.teacher):
        assert model.config.eos_token_id == model.generation_config.eos_token_id == pair.eos == pair.tokenizer.eos_token_id
    assert not examine(configured(folders), pair, 40).warnings
    pair.student.save_pretrained(tmp_path)
    pair.tokenizer.save_pretrained(tmp_path)
    saved, tokenizer = AutoModelForCausalLM.from_pretrained(tmp_path), AutoTokenizer.from_pretrained(tmp_path)
    assert saved.generation_config.eos_token_id == tokenizer.eos_token_id == pair.eos
    assert chat_text(tokenizer, "1 + 1") == "[1 + 1]\n# "  # it is not asked to think


def test_pairs_that_end_otherwise_are_refused_with_the_key_that_mends_it(program, folders, tmp_path):
    for eos, said in ((None, "different tokens, '<unk>' and '<eos>'; .*set eos: "), ("<none>", "has no token '<none>' to end texts with")):
        document = configured(folders, eos=eos).model_dump(mode="json")
        store.write_json(tmp_path / "config.yaml", document)
        code, _, error = program("compare", "--tier", "qwen3", "--config", "config.yaml", "--out", "run")
        assert code == 2
        assert re.search(said, error), error


@pytest.mark.slow
def test_the_tier_compares_its_methods(folders, tmp_path):
    config = configured(folders)
    assert (config.dtype, config.rollouts.dtype, config.gradient_checkpointing, config.chat) == ("bfloat16", "bfloat16", True, True)
    with in_this_process():
        board = run(config, tmp_path / "run")
    assert board.budget.axis == "GPU-hours"
    assert {method.name for method in board.methods} == {*METHODS}
    for job in jobs(config):
        if job.method:
            summary = store.read_json(job.folder(tmp_path / "run") / "arm.json")
            seconds = sum(charge["seconds"] for charge in store.read_jsonl(job.folder(tmp_path / "run") / "ledger.jsonl"))
            assert summary["share_spent"] == pytest.approx(2 * seconds / 3600 / config.limit)  # two GPUs an arm
            assert AutoModelForCausalLM.from_pretrained(job.folder(tmp_path / "run")).config.model_type == "qwen3"


@pytest.mark.parametrize("changes", [{}, {"lora": {"rank": 4}}], ids=["in full", "lora"])
def test_every_method_takes_a_step(folders, tmp_path, changes):
    config = configured(folders, budget={"axis": "flops", "limit": 1e12}, **changes)
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


def test_rollouts_of_our_decoder_are_those_of_the_model(folders):
    (pair,) = load_pairs([str(folders["student"])], str(folders["teacher"]), eos=TURN)
    assert_logprobs(written(pair), pair.student)


def written(pair, sampler=sample):
    ids = pair.tokenizer(["x = 1", "What is 2 + 2?"], add_special_tokens=False).input_ids
    generator = torch.Generator().manual_seed(0)
    return sampler(pair.student, Prompts(ids, [""] * 2), max_response=8, eos=pair.eos, generator=generator, group=2)


@needs_vllm
def test_rollouts_of_vllm_are_those_of_the_weights_just_trained(folders, tmp_path):
    config = configured(folders, rollouts={"by": "vllm", "dtype": "float32"}, dtype="float32")
    shop, job = arm.workshop(config.model_dump_json()), jobs(config)[-1]
    assert isinstance(shop.sampler, VLLMSampler)
    engine = shop.engine(job, copy.deepcopy(shop.pair.student), 1e-2, tmp_path / "corpus")
    prompts = Prompts([shop.encoded[0][1]], [""])
    for _ in range(2):
        rollouts = engine.sample(prompts, 4)
        assert_logprobs(rollouts, engine.plain)
        engine.update(rollouts, reverse_kl, teacher=True, weights_B=None, lr_scale=1.0)


@needs_vllm
def test_a_served_teacher_ends_and_scores_as_its_weights_do(folders, tmp_path, monkeypatch):
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    (pair,) = load_pairs([str(folders["student"])], str(folders["teacher"]), eos=TURN)
    with serving(folders["teacher"], tmp_path / "log", "--max-model-len", 256, "--max-logprobs", 8) as url:
        tokens = pair.tokenizer(PROBE, add_special_tokens=False).input_ids
        teacher = ServerTeacher(url, "served", 8, pair.teacher.config.vocab_size, pair.eos, tokens, 64)
        teacher.check()
        assert signal_error(teacher, ModelTeacher(pair.teacher), written(pair))["largest_gap"] < 1e-3
