"""The teacher behind a server: what it says is the model's own distribution, and what can go wrong is said in one line.

The server here is a real one on loopback that answers as vLLM 0.32 does, from a tiny model.
"""

from __future__ import annotations

import json
import math
import re
import threading
from dataclasses import dataclass, field, replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
import torch
from conftest import EOS, VOCABULARY, tiny_llama

from opd_bench import teacher_server, vllm_server
from opd_bench.errors import RunError, UserError
from opd_bench.rollouts import sample
from opd_bench.scoring import ModelTeacher, output_head
from opd_bench.sequences import Prompts, Sequences
from opd_bench.teacher_server import PROBE, ServerTeacher
from opd_bench.vllm_server import TRIES

TOP, TOKENS, PROMPTS = 3, [3, 4, 5], Prompts([[3, 4, 5, 6], [8], [9, 2], [7, 7, 7]], ["task"] * 4)


@dataclass
class Served:
    """What the server has and how it behaves; tests change it."""

    model: torch.nn.Module = field(default_factory=lambda: tiny_llama(3))
    name: str = "teacher"
    context: int = 32
    max_logprobs: int = TOP
    vocabulary: int = VOCABULARY
    eos: int = EOS
    tokens: list[int] = field(default_factory=lambda: TOKENS)
    failures: list[int] = field(default_factory=list)  # statuses before the first answer; 0 hangs up
    stalls: bool = False
    requests: int = 0


class RefusedError(Exception):
    pass


class Handler(BaseHTTPRequestHandler):
    server: FakeVLLM

    def do_GET(self) -> None:
        served = self.server.served
        cards = [{"id": served.name, "max_model_len": served.context}, {"id": "another", "max_model_len": served.context}]
        self.reply({"/v1/models": lambda: {"data": cards}})

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.reply({"/tokenize": lambda: self.server.tokenize(**body), "/v1/completions": lambda: self.server.complete(**body)})

    def reply(self, routes) -> None:
        served = self.server.served
        served.requests += 1
        if served.stalls:
            self.server.released.wait()
        status = served.failures.pop(0) if served.failures else 200
        if status == 0:
            self.close_connection = True
            return
        try:
            found = routes[self.path]() if status == 200 else {"error": {"message": "busy", "code": status}}
        except KeyError:
            status, found = 404, {"detail": "Not Found"}
        except RefusedError as reason:
            status, found = 400, {"error": {"message": str(reason), "type": "BadRequestError", "code": 400}}
        data = json.dumps(found).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_: object) -> None:
        pass


class FakeVLLM(ThreadingHTTPServer):
    request_queue_size = 32  # all connections of a teacher at once

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.served, self.released = Served(), threading.Event()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}/v1"

    def tokenize(self, model: str, prompt: str, add_special_tokens: bool) -> dict:
        assert (model, prompt, add_special_tokens) == (self.served.name, PROBE, False)
        return {"tokens": self.served.tokens}

    def complete(self, model: str, prompt: list[int], max_tokens: int, temperature: float, prompt_logprobs=None, allowed_token_ids=None):
        served = self.served
        assert (model, temperature) == (served.name, 0.0)
        if max(prompt) >= served.vocabulary:
            raise RefusedError(f"Token id {max(prompt)} is out of vocabulary")
        if len(prompt) + max_tokens > served.context:
            raise RefusedError("This model's maximum context length is too short")
        if (prompt_logprobs or 0) > served.max_logprobs:
            raise RefusedError(f"Requested prompt logprobs of {prompt_logprobs}, which is greater than max allowed: {served.max_logprobs}")
        stops = served.eos in (allowed_token_ids or [])
        return {"choices": [{"finish_reason": "stop" if stops else "length", "prompt_logprobs": self.scored(prompt, prompt_logprobs)}]}

    @torch.no_grad()
    def scored(self, ids: list[int], top: int | None) -> list | None:
        """The token that is there comes first, and once more if it is among the most probable: as keys of a dict."""
        if top is None:
            return None
        positions: list[dict | None] = [None]
        for token, logprob_V in zip(ids[1:], self.served.model(torch.tensor([ids])).logits[0].log_softmax(-1), strict=False):
            best = [
                (token, int((logprob_V >= logprob_V[token]).sum())),
                *((int(i), r + 1) for r, i in enumerate(logprob_V.topk(top).indices)),
            ]
            positions.append({str(i): {"logprob": float(logprob_V[i]), "rank": rank, "decoded_token": "?"} for i, rank in best})
        return positions


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.setattr(vllm_server, "WAIT_S", 0.001)
    with FakeVLLM() as running:
        thread = threading.Thread(target=running.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield running
        running.released.set()
        running.shutdown()
        thread.join()


@pytest.fixture
def teacher(server) -> ServerTeacher:
    return ServerTeacher(server.url, "teacher", top=TOP, vocabulary=VOCABULARY, eos=EOS, tokens=TOKENS, longest=20)


def rollouts(model, group: int = 5) -> Sequences:
    return sample(model, PROMPTS, max_response=12, eos=EOS, generator=torch.Generator().manual_seed(0), group=group)


def test_a_server_that_fits_passes(teacher):
    teacher.check()


@pytest.mark.parametrize("top", [1, TOP, VOCABULARY - 1])
def test_the_most_probable_tokens_and_the_rest_are_the_models_own(server, teacher, top):
    """Some tokens that were written are not among them: those must not take a place."""
    server.served.max_logprobs = VOCABULARY
    sequences = rollouts(server.served.model)
    log_probs_NE, top_NK = replace(teacher, top=top)(sequences)[:]
    expected_NV = ModelTeacher(server.served.model)(sequences)[:][0]
    expected_NK = expected_NV.topk(top)
    assert (log_probs_NE.dtype, top_NK.dtype) == (torch.float32, torch.int64)
    assert torch.equal(top_NK, expected_NK.indices)
    rest_NV = expected_NV.scatter(1, top_NK, -torch.inf)
    torch.testing.assert_close(log_probs_NE, torch.cat([expected_NK.values, rest_NV.logsumexp(-1, keepdim=True)], -1), atol=1e-4, rtol=0)
    written_N = sequences.ids_BT[sequences.response_BT]
    assert not (top_NK == written_N[:, None]).any(-1).all()


def test_tokens_that_the_tokenizer_does_not_have_end_the_run_where_they_are_likely(server, teacher):
    sequences = rollouts(server.served.model)
    assert int(replace(teacher, known=VOCABULARY)(sequences)[:][1].max()) < VOCABULARY
    with pytest.raises(RunError, match=r"which the tokenizer does not have; use scoring\.by: model"):
        replace(teacher, known=1)(sequences)


def test_a_distribution_without_rest_stays_finite_and_sums_to_one(server, teacher):
    with torch.no_grad():
        output_head(server.served.model).weight.mul_(40)
    log_probs_NE, _ = teacher(rollouts(server.served.model))[:]
    assert log_probs_NE[:, -1].min() == teacher_server.FLOOR
    assert log_probs_NE[:, -1].max() > -10
    torch.testing.assert_close(log_probs_NE.exp().sum(-1), torch.ones(len(log_probs_NE)), atol=1.1 * math.exp(teacher_server.FLOOR), rtol=0)


@pytest.mark.parametrize(
    ("at_server", "at_student", "complaint"),
    [
        ({"name": "other"}, {}, "serves other, another, not teacher"),
        ({"context": 20}, {}, "context has 20 tokens.*--max-model-len 21"),
        ({"tokens": [3, 4]}, {}, "tokenizer is not the student's"),
        ({"vocabulary": 10}, {}, "fewer than the student's 11 tokens.*id 10 is out of vocabulary"),
        ({"vocabulary": 12}, {}, "more than the student's 11 tokens"),
        ({"eos": 2}, {}, "student's EOS, token 1"),
        ({"max_logprobs": 2}, {}, "--max-logprobs 3 .*max allowed: 2"),
        ({}, {"top": VOCABULARY}, "lower top"),
        ({"failures": [503]}, {}, "does not answer.*503 busy"),
        ({"failures": [0]}, {}, "does not answer.*closed connection"),
        ({"failures": [401]}, {}, "HTTP 401 busy"),
        ({"stalls": True}, {"timeout_s": 0.05}, "does not answer.*timed out"),
    ],
)
def test_what_cannot_work_is_said_before_training(server, teacher, at_server, at_student, complaint):
    server.served = replace(server.served, **at_server)
    with pytest.raises(UserError, match=complaint) as caught:
        replace(teacher, **at_student).check()
    assert "\n" not in str(caught.value)
    assert server.url in str(caught.value)


def test_the_longest_sequence_that_passes_can_be_scored(server, teacher):
    server.served.context = 21
    teacher.check()
    longest = Sequences(torch.full((1, 20), 3), torch.tensor([1]), torch.tensor([20]), torch.tensor([False]), torch.zeros(1, 20))
    assert len(teacher(longest)[:][0]) == 19


def test_a_server_that_is_down_and_a_wrong_address(server, teacher):
    with pytest.raises(UserError, match="ends with /v1"):
        replace(teacher, url=server.url.removesuffix("/v1")).check()
    with pytest.raises(UserError, match="404"):
        replace(teacher, url=server.url.replace("/v1", "/no/v1")).check()
    server.shutdown()
    server.server_close()
    with pytest.raises(UserError, match=r"does not answer.*refused.*start it"):
        teacher.check()


def test_answers_of_another_kind_of_server(server, teacher, monkeypatch):
    monkeypatch.setattr(server, "tokenize", lambda **_: {"ids": []})
    with pytest.raises(UserError, match="not a vLLM server"):
        teacher.check()


def test_passing_failures_change_nothing(server, teacher):
    sequences = rollouts(server.served.model, group=1)
    expected = teacher(sequences)[:]
    server.served.requests, server.served.failures = 0, [0, 429, 500, 503]
    found = teacher(sequences)[:]
    assert server.served.requests == len(sequences) + 4
    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))


def test_a_server_that_never_answers_ends_the_run_with_every_reason(server, teacher):
    sequences = rollouts(server.served.model, group=1)[:1]
    server.served.failures = [503, 500, 0, 429, 503, 200]
    with pytest.raises(RunError, match=r"5 tries.*503.*500.*closed connection.*429.*503.*run the same command again to resume") as caught:
        teacher(sequences)
    assert len(re.findall("busy", str(caught.value))) == TRIES - 1
    assert server.served.failures == [200], "no more tries than said"


def test_a_server_that_stalls_ends_the_run(server, teacher):
    server.served.stalls = True
    with pytest.raises(RunError, match=r"timed out.*resume"):
        replace(teacher, timeout_s=0.05)(rollouts(server.served.model)[:1])


def test_a_refusal_is_not_tried_again(server, teacher):
    sequences = rollouts(server.served.model)[:1]
    server.served.max_logprobs, server.served.requests = 0, 0
    with pytest.raises(RunError, match=r"refuses.*max allowed: 0.*resume"):
        teacher(sequences)
    assert server.served.requests == 1
