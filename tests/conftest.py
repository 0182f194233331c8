"""Tiny models with random weights: a saved pair with a real tokenizer, and a rig of bench and engine over eleven tokens."""

from __future__ import annotations

import random
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import qwen3_pair
import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from opd_bench.bench import Bench
from opd_bench.cli import main
from opd_bench.embedded.corpus import tokenizer_texts
from opd_bench.embedded.fit import new_llama
from opd_bench.embedded.tokenizer import train_tokenizer
from opd_bench.engine import TorchEngine
from opd_bench.flops import flop_count
from opd_bench.judge_model import CheckJudge
from opd_bench.ledger import Ledger
from opd_bench.methods import find
from opd_bench.prompts import Corpus, Stream
from opd_bench.scoring import ModelTeacher
from opd_bench.teachers import Teachers
from opd_bench.trace import Counter

torch.set_num_threads(1)  # the tests themselves run side by side
VOCABULARY, EOS, YES, NO, RESPONSE = 11, 1, 4, 5, 6


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    return train_tokenizer(tokenizer_texts(100))


@pytest.fixture(scope="session")
def pair_folders(tmp_path_factory: pytest.TempPathFactory, tokenizer: PreTrainedTokenizerFast) -> dict[str, Path]:
    """Folders of an untrained student and teacher, each with the tokenizer they share."""
    folders = {}
    for role, width in (("student", 32), ("teacher", 64)):
        folders[role] = tmp_path_factory.mktemp("models") / role
        new_llama(width, 1, tokenizer, seed=width).save_pretrained(folders[role])
        tokenizer.save_pretrained(folders[role])
    return folders


@pytest.fixture(scope="session")
def qwen3_folders(tmp_path_factory: pytest.TempPathFactory, tokenizer: PreTrainedTokenizerFast) -> dict[str, Path]:
    return qwen3_pair.pair(tmp_path_factory.mktemp("qwen3"), tokenizer)


@pytest.fixture
def program(monkeypatch, capsys, tmp_path):
    """``program("compare", "--seeds", 2)`` in this process: exit code, standard output, standard error."""
    monkeypatch.chdir(tmp_path)
    find.cache_clear()  # knows a file by its name, which tests share

    def call(*arguments):
        monkeypatch.setattr(sys, "argv", ["opd-bench", *map(str, arguments)])
        code = 0
        try:
            main()
        except SystemExit as leaving:
            code = leaving.code
        return code, *capsys.readouterr()

    return call


def tiny_llama(seed: int, layers: int = 2) -> LlamaForCausalLM:
    """Random weights over eleven tokens, with a head large enough that no distribution is flat."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=layers,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=64,
        eos_token_id=EOS,
        pad_token_id=0,
        bos_token_id=None,
    )
    model = LlamaForCausalLM(config).eval()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "norm" not in name:
                weight.mul_(8)  # from 0.02 to 0.16, so that attention and position matter
    return model


@dataclass(frozen=True)
class Rig:
    bench: Bench
    engine: TorchEngine
    counter: Counter
    stream: Stream


@pytest.fixture
def rig(tmp_path: Path) -> Callable[..., Rig]:
    """``rig(limit)``: a bench over real tiny models; rigs of a seed share prompt stream, cold start and teacher text."""

    def build(limit: int | None = None, seed: int = 0, batch: int = 8, lr: float = 1e-3) -> Rig:
        draw = random.Random("prompts")
        encoded = [("arithmetic", [draw.randrange(2, VOCABULARY) for _ in range(draw.randint(2, 5))]) for _ in range(100)]
        student, teacher, stream = tiny_llama(1, layers=1), tiny_llama(2), Stream(encoded, seed)
        engine = TorchEngine(
            student=student,
            teacher=ModelTeacher(teacher),
            eos=EOS,
            max_response=RESPONSE,
            stream=stream,
            corpus=Corpus(Teachers(teacher), stream, EOS, RESPONSE, tmp_path / f"seed-{seed}"),
            judge_model=CheckJudge(teacher, [2, 3], YES, NO, EOS, max_check=3),
            lr=lr,
            seed=seed,
        )
        counts = flop_count(student.config), flop_count(teacher.config)
        bench = Bench(engine, Ledger(limit), *counts, batch=batch, seed=seed)
        return Rig(bench, engine, Counter(stream.longest, RESPONSE, 3, 2, *counts), stream)

    return build
