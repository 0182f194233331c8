"""Rollouts from a server: they are the student's, weights travel only when they changed, and what can go wrong is said in one line.

The server here is a real one on loopback that answers as vLLM 0.32 does, by our own sampler and what it reads from the trainer's files. The
same sampler against vLLM itself is in test_samplers.py.
"""

from __future__ import annotations

import json
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch
from conftest import EOS, VOCABULARY, tiny_llama
from safetensors.torch import load_file
from test_compare import configured
from transformers import LlamaForCausalLM

from opd_bench import backends, vllm_server
from opd_bench.errors import RunError, UserError
from opd_bench.models import TokenHead
from opd_bench.rollouts import sample
from opd_bench.sequences import Prompts, Sequences
from opd_bench.vllm_server_sampler import VLLMServerSampler
from opd_bench.vllm_worker import EXTENSION, SHAPE

PROMPTS = Prompts([[3, 4, 5, 6], [8], [9, 2], [7, 7, 7]], ["task"] * 4)
LONGEST, RESPONSE = 20, 12


@dataclass
class Served:
    """What the server has and how it behaves; tests change it."""

    model: LlamaForCausalLM = field(default_factory=lambda: tiny_llama(9))
    name: str = "student"
    context: int = LONGEST
    absent: str = ""  # a path
    describes: dict = field(default_factory=dict)  # over the truth
    extended: bool = True
    reads: bool = True
    deaf: bool = False  # it loads nothing
    idle: bool = True
    version: str = "default"
    failures: list[int] = field(default_factory=list)  # statuses before the first answer
    asked: list[str] = field(default_factory=list)
    files: list[Path] = field(default_factory=list)


class Handler(BaseHTTPRequestHandler):
    server: FakeVLLM

    def do_GET(self) -> None:
        self.reply(None)

    def do_POST(self) -> None:
        self.reply(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))

    def reply(self, body) -> None:
        served = self.server.served
        served.asked.append(self.path)
        status = served.failures.pop(0) if served.failures else 200
        found = {"error": {"message": "busy"}} if status != 200 else self.server.answers[self.path](**body or {})
        if isinstance(found, str):
            status, found = 500, {"error": {"message": found}}
        data = json.dumps(found).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_: object) -> None:
        pass


class FakeVLLM(ThreadingHTTPServer):
    request_queue_size = 32

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.served, self.url, self.lock = Served(), f"http://127.0.0.1:{self.server_port}", threading.Lock()
        self.answers = {
            "/v1/models": lambda: {"data": [{"id": self.served.name, "max_model_len": self.served.context}]},
            "/openapi.json": lambda: {"paths": {path: {} for path in self.answers if path != self.served.absent}},
            "/collective_rpc": self.call,
            "/update_weight_version": self.mark,
            "/reset_prefix_cache": lambda: {"success": self.served.idle},
            "/inference/v1/generate": self.generate,
        }

    def call(self, method: str, args: list):
        if not self.served.extended:
            return f"'CPUWorker' object has no attribute '{method}'"
        if method == "describe":
            config = self.served.model.config
            truth = {**{key: getattr(config, key, None) for key in ("vocab_size", *SHAPE)}, "logprobs_mode": "processed_logprobs"}
            return {"results": [{**truth, **self.served.describes}]}
        assert method == "take_weights_from"
        self.served.files.append(Path(args[0]))
        if not self.served.reads:
            return {"results": [f"No such file or directory: {args[0]}"]}
        if not self.served.deaf:
            missing, unexpected = self.served.model.load_state_dict(load_file(args[0]), strict=False)
            assert not unexpected
            assert set(missing) <= ({"lm_head.weight"} if self.served.model.config.tie_word_embeddings else set())
        return {"results": [None]}

    def mark(self, new_version: str) -> dict:
        self.served.version = new_version
        return {"success": True}

    def generate(self, model: str, token_ids: list[int], sampling_params: dict) -> dict:
        assert model == self.served.name
        assert (sampling_params["ignore_eos"], sampling_params["logprobs"]) == (True, 0)
        greedy, (eos,) = sampling_params["temperature"] == 0, sampling_params["stop_token_ids"]
        with self.lock:
            drawn = sample(
                self.served.model,
                Prompts([token_ids], ["task"]),
                max_response=sampling_params["max_tokens"],
                eos=eos,
                generator=None if greedy else torch.Generator().manual_seed(sampling_params["seed"]),
                temperature=sampling_params["temperature"] or 1.0,
            )
        written = [{"token_id": token} for token in drawn.response(0)]
        for entry, logprob in zip(written, drawn.logprob_BT[drawn.response_BT].tolist(), strict=True):
            entry["logprob"] = logprob
        spans = [{"version": self.served.version, "start": 0, "end": len(written)}]
        return {"choices": [{"token_ids": drawn.response(0), "logprobs": {"content": written}, "weight_versions": spans}]}


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.setattr(vllm_server, "WAIT_S", 0.001)
    with FakeVLLM() as running:
        thread = threading.Thread(target=running.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield running
        running.shutdown()
        thread.join()


@pytest.fixture
def sampler(server) -> VLLMServerSampler:
    return VLLMServerSampler(server.url, "student", LONGEST)


def draw(by, model, seed: int | None = 0, group: int = 1, temperature: float = 1.0) -> Sequences:
    generator = None if seed is None else torch.Generator().manual_seed(seed)
    return by(model, PROMPTS, max_response=RESPONSE, eos=EOS, generator=generator, group=group, temperature=temperature)


def padded(model: LlamaForCausalLM, columns: int) -> LlamaForCausalLM:
    """``model`` with output columns that stand for no token."""
    model.resize_token_embeddings(VOCABULARY + columns, mean_resizing=False)
    model.set_output_embeddings(TokenHead.of(model.get_output_embeddings(), VOCABULARY))
    return model


@torch.no_grad()
def change(model) -> None:
    for weight in model.parameters():
        weight.add_(0.2)


@pytest.mark.parametrize("columns", [0, 3])
def test_what_is_written_are_the_students_tokens_with_its_probabilities(server, sampler, columns):
    """Other weights than the server began with; greedily they are what our own sampler writes. ``columns`` beyond the tokens stay here."""
    student = padded(tiny_llama(3), columns)
    sampler.check(student, PROMPTS, EOS)
    for _ in range(2):
        ours, theirs = (draw(by, student, seed=None) for by in (sample, sampler))
        for name in ("ids_BT", "prompt_B", "length_B", "finished_B"):
            assert torch.equal(getattr(ours, name), getattr(theirs, name)), name
        torch.testing.assert_close(ours.logprob_BT, theirs.logprob_BT, atol=1e-5, rtol=0)
        change(student)


def test_a_seed_decides_all_and_the_rows_of_a_group_differ(server, sampler):
    student = tiny_llama(3)
    one, again, other = (draw(sampler, student, seed, group=3, temperature=3.0).ids_BT.tolist() for seed in (0, 0, 1))
    assert one == again != other
    assert len({tuple(row) for row in one[:3]}) == 3


def test_weights_travel_only_when_they_changed_and_leave_no_file(server, sampler):
    student = tiny_llama(3)
    for action, sent in ((lambda: None, 1), (lambda: None, 1), (lambda: change(student), 2), (lambda: None, 2)):
        action()
        draw(sampler, student)
        assert server.served.asked.count("/collective_rpc") == sent
    assert len(server.served.files) == 2
    assert not any(path.exists() or path.parent.exists() for path in server.served.files)


@pytest.mark.parametrize(
    ("at_server", "complaint"),
    [
        ({"name": "other"}, "serves other, not student"),
        ({"context": LONGEST - 1}, f"--max-model-len {LONGEST}"),
        ({"absent": "/collective_rpc"}, "has no /collective_rpc; start it with VLLM_SERVER_DEV_MODE=1"),
        ({"absent": "/inference/v1/generate"}, "has no /inference/v1/generate; .*--enable-scale-out"),
        ({"extended": False}, f"no attribute 'describe'.*--worker-extension-cls {EXTENSION}"),
        ({"describes": {"hidden_size": 33}}, "hidden_size of its model is 33, and 32 of the student"),
        (
            {"describes": {"vocab_size": VOCABULARY + 3}},
            f"{VOCABULARY + 3} output columns, and the student {VOCABULARY} tokens; start it with .*'{{\"vocab_size\": {VOCABULARY}}}'",
        ),
        ({"describes": {"logprobs_mode": "raw_logprobs"}}, "gives raw_logprobs.*--logprobs-mode processed_logprobs"),
        ({"reads": False}, "cannot read the weights .*No such file.* set TMPDIR"),
        ({"deaf": True}, "differ by .* nats from those of the weights that it was given"),
        ({"idle": False}, "writing for somebody else"),
        ({"failures": [503]}, "does not answer.*503 busy"),
    ],
)
def test_what_cannot_work_is_said_before_training(server, sampler, at_server, complaint):
    for name, value in at_server.items():
        setattr(server.served, name, value)
    student = tiny_llama(3)
    change(student)
    with pytest.raises(UserError, match=complaint) as caught:
        sampler.check(student, PROMPTS, EOS)
    assert "\n" not in str(caught.value)
    assert server.url in str(caught.value)


def test_a_server_that_is_down_is_said_before_training(pair_folders):
    sampler = backends.sampler_of(configured(pair_folders, rollouts={"by": "server", "url": "http://127.0.0.1:9"}), VOCABULARY, LONGEST)
    assert isinstance(sampler, VLLMServerSampler)
    with pytest.raises(UserError, match="does not answer"):
        sampler.check(tiny_llama(3), PROMPTS, EOS)


def test_passing_failures_change_nothing(server, sampler):
    student = tiny_llama(3)
    expected = draw(sampler, student)
    server.served.failures = [429, 500, 503]
    assert torch.equal(draw(sampler, student).ids_BT, expected.ids_BT)
    assert not server.served.failures


def test_a_server_that_fails_for_long_ends_the_run_and_is_given_the_weights_again(server, sampler):
    student = tiny_llama(3)
    draw(sampler, student)
    change(student)
    server.served.failures = [500] * vllm_server.TRIES
    with pytest.raises(RunError, match=r"5 tries.*run the same command again to resume"):
        draw(sampler, student)
    assert torch.equal(draw(sampler, student, seed=None).ids_BT, draw(sample, student, seed=None).ids_BT)


def test_weights_of_somebody_else_end_the_run(server, sampler):
    student = tiny_llama(3)
    draw(sampler, student)
    draw(VLLMServerSampler(server.url, "student", LONGEST), tiny_llama(4))
    with pytest.raises(RunError, match="other weights by somebody else"):
        draw(sampler, student)


def test_arms_side_by_side_cannot_share_a_server(pair_folders, server):
    config = configured(pair_folders, rollouts={"by": "server", "url": server.url})
    with pytest.raises(UserError, match="add --jobs 1"):
        backends.check_sampler(config, None, PROMPTS.ids, LONGEST, workers=2)
    assert not server.served.asked
