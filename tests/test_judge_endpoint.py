"""A judge behind a server: a real one on loopback that speaks chat completions and behaves as its script says.

What it says becomes a verdict, is bought once, and is charged as its usage says; what goes wrong is said in one line.
"""

from __future__ import annotations

import json
import math
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch

from opd_bench import vllm_server
from opd_bench.errors import RunError, UserError
from opd_bench.judge import Answer
from opd_bench.judge_endpoint import GARBAGE, RECENT, EndpointJudge, written_word
from opd_bench.judge_model import RATING, YES_NO, Options, rating, yes_or_no
from opd_bench.ledger import Dollars, Ledger, OverBudgetError
from opd_bench.settings import Endpoint
from opd_bench.vllm_server import TRIES

KEY = "a key that must never be shown"


@dataclass
class Script:
    """How the server behaves; tests change it."""

    text: str = "7"
    logprobs: dict[str, float] | None = None  # probabilities of the answer's token
    failures: list[tuple[int, dict[str, str]]] = field(default_factory=list)  # status and headers before an answer; 0 hangs up
    declines: str | None = None  # questions with this text get HTTP 400
    stalls: bool = False
    usage: tuple[int, int] | None = (30, 1)
    bodies: list[dict] = field(default_factory=list)
    keys: set[str | None] = field(default_factory=set)


class Handler(BaseHTTPRequestHandler):
    server: Served

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        script = self.server.script
        if script.stalls:
            self.server.released.wait()
        with self.server.lock:
            script.keys.add(self.headers.get("Authorization"))
            status, headers = script.failures.pop(0) if script.failures else (200, {})
            if script.declines and script.declines in body["messages"][0]["content"]:
                status = 400
            if status == 200:
                script.bodies.append(body)
        if status == 0:
            self.close_connection = True
            return
        found = self.answer(script) if status == 200 else {"error": {"message": "no", "code": status}}
        data = json.dumps(found).encode()
        self.send_response(status)
        for header, value in {**headers, "Content-Length": str(len(data))}.items():
            self.send_header(header, value)
        self.end_headers()
        self.wfile.write(data)

    def answer(self, script: Script) -> dict:
        assert self.path == "/v1/chat/completions"
        logprobs = None
        if script.logprobs:
            top = [{"token": token, "logprob": math.log(chance)} for token, chance in script.logprobs.items()]
            logprobs = {"content": [{"token": script.text, "logprob": top[0]["logprob"], "top_logprobs": top}]}
        choice = {"message": {"role": "assistant", "content": script.text}, "logprobs": logprobs}
        usage = script.usage and dict(zip(("prompt_tokens", "completion_tokens"), script.usage, strict=True))
        return {"choices": [choice], "usage": usage}

    def log_message(self, format: str, *_: object) -> None:
        pass


class Served(ThreadingHTTPServer):
    request_queue_size = 32

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.script, self.released, self.lock = Script(), threading.Event(), threading.Lock()


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    with Served() as served:
        thread = threading.Thread(target=served.serve_forever)
        thread.start()
        yield served
        served.released.set()
        served.shutdown()
        thread.join()


@pytest.fixture
def judge(server, tmp_path):
    """``judge(most_dollars=1.0)``: one that has waited ``judge.waited`` seconds in all, by a clock that only waiting moves."""

    def build(options: Options | None = None, template: str = RATING, path: Path = tmp_path / "judge.sqlite", **settings) -> EndpointJudge:
        waited: list[float] = []
        endpoint = Endpoint(url=f"http://127.0.0.1:{server.server_port}/v1", **settings)
        own, other = (options, options) if options else (rating(9), rating(9, swapped=True))
        built = EndpointJudge("org/judge", template, own, other, endpoint, path, None, waited.append, lambda: sum(waited))
        built.waited = waited  # pyright: ignore[reportAttributeAccessIssue]
        return built

    return build


def answers(*responses: str) -> list[Answer]:
    return [Answer([1], "2 + 2?", response) for response in responses]


@pytest.mark.parametrize(
    ("text", "best", "word"),
    [
        ("7", 9, "7"),
        ("Rating: 7.", 9, "7"),
        ("**7**", 9, "7"),
        ("7/9", 9, "7"),
        ("I saw 3 errors, so 2", 9, "2"),
        ("10", 10, "10"),
        ("9/10", 10, "9"),
        ("10", 9, None),
        ("17", 9, None),
        ("0.7", 9, None),
        ("7/10", 9, None),
        ("I cannot rate 7 things at once.", 9, None),
        ("", 9, None),
    ],
)
def test_a_rating_is_what_an_answer_ends_with_and_nothing_else(text: str, best: int, word: str | None):
    assert written_word(text, rating(best)) == word


@pytest.mark.parametrize(
    ("text", "word"),
    [("Yes", "yes"), ("no.", "no"), ("Yes, as 4 is right", "yes"), ("It is wrong: NO", "no"), ("I don't know", None), ("nothing", None)],
)
def test_yes_or_no_begins_or_ends_an_answer(text: str, word: str | None):
    assert written_word(text, yes_or_no()) == word


def test_a_verdict_is_the_mean_over_the_probabilities_of_the_answer_and_the_text_alone_without_them(server, judge):
    server.script.logprobs = {"7": 0.5, " 9": 0.25, "8": 0.05, "The": 0.2}
    expected = (0.5 * 6 / 8 + 0.25 * 1 + 0.05 * 7 / 8) / 0.8
    assert judge()(answers("4")).verdict_B.item() == pytest.approx(expected)
    assert server.script.bodies[0]["top_logprobs"] == 20
    server.script.logprobs = None
    assert judge()(answers("5")).verdict_B.item() == pytest.approx(6 / 8)
    assert judge(logprobs=False)(answers("6")).verdict_B.item() == pytest.approx(6 / 8)
    assert "top_logprobs" not in server.script.bodies[-1]
    server.script.text, server.script.logprobs = "Yes", {"Yes": 0.6, "no": 0.2, " NO": 0.1}
    assert judge(yes_or_no(), YES_NO)(answers("4")).verdict_B.item() == pytest.approx(0.6 / 0.9)


def test_a_rating_of_ten_is_never_taken_for_a_one(server, judge):
    server.script.text, server.script.logprobs = "10", {"1": 0.9, "9": 0.1}
    assert judge(rating(10))(answers("4")).verdict_B.item() == 1.0


def test_a_question_is_one_message_at_temperature_0_with_task_and_response_as_they_are(server, judge):
    judge()(answers("{braces} and {prompt}"))
    (body,) = server.script.bodies
    assert (body["model"], body["temperature"], len(body["messages"])) == ("org/judge", 0.0, 1)
    assert "{braces} and {prompt}" in body["messages"][0]["content"]
    assert "from 1 (wrong) to 9 (right)" in body["messages"][0]["content"]


def test_an_empty_response_is_judged_like_any_other(server, judge):
    judgement = judge()(answers(""))
    assert (judgement.verdict_B.tolist(), judgement.unreadable_B.tolist()) == ([0.75], [False])


def test_swapped_the_scale_is_reversed_and_so_is_its_worth(server, judge):
    asked = judge()
    other = asked.swapped()
    assert other(answers("4")).verdict_B.item() == pytest.approx(2 / 8)
    assert "from 1 (right) to 9 (wrong)" in server.script.bodies[-1]["messages"][0]["content"]
    assert judge(template="{prompt} {response}: rate 1 to 9").swapped() is None


def test_tokens_and_dollars_are_those_of_the_usage_and_never_more_than_reserved(server, judge):
    asked = judge(dollars_per_million_read=2.0, dollars_per_million_written=10.0, max_read=100, max_written=4)
    judgement = asked(answers("4", "5", "4"))
    assert (judgement.usage.read_B.tolist(), judgement.usage.written_B.tolist()) == ([30] * 3, [1] * 3)
    assert judgement.usage.dollars == pytest.approx(3 * (30 * 2 + 10) / 1e6)
    most = asked.most(answers("4", "5", "4"))
    assert (most.tokens, most.dollars) == (3 * 104, pytest.approx(3 * (200 + 40) / 1e6))
    assert len(server.script.bodies) == 2  # the same answer is asked about once
    assert asked.memory.paid() == pytest.approx(2 * 70 / 1e6)
    server.script.usage = (101, 1)
    with pytest.raises(RunError, match=r"counts 101 tokens read; give judge\.endpoint\.max_read at least that"):
        asked(answers("6"))
    server.script.usage = None
    with pytest.raises(RunError, match="no usage"):
        asked(answers("7"))


def test_the_ledger_is_charged_what_the_usage_says_to_the_token(server, judge, rig):
    asked = judge(dollars_per_million_read=2.0, max_read=100, max_written=4)
    asked.parameters = 1000
    built = rig()
    built.engine.judge_model = asked
    bench = built.bench
    bench.ledger.axis, bench.ledger.limit = Dollars("dollars"), 1.0
    rollouts = bench.sample(bench.prompts(3))
    bench.judge(rollouts)
    (charge,) = [charge for charge in bench.ledger.charges if charge.kind == "judge"]
    assert (charge.tokens, charge.flops, charge.dollars) == (3 * 31, 3 * 30 * 2000, pytest.approx(3 * 60 / 1e6))
    assert bench.ledger.spent == pytest.approx(charge.dollars)
    assert (bench.ledger.reserved, bench.ledger.saw()) == (0, ["judge"])
    bench.ledger.limit = bench.ledger.spent + 3 * 200 / 1e6 * 0.99
    sold = len(server.script.bodies)
    with pytest.raises(OverBudgetError):
        bench.judge(rollouts)
    assert len(server.script.bodies) == sold
    assert Ledger(None).spent == 0


def test_what_was_said_is_never_bought_again_and_charged_all_the_same(server, judge):
    first = judge()(answers("4", "5"))
    server.script.text = "1"
    again = judge()(answers("5", "4"))
    assert torch.equal(first.verdict_B, again.verdict_B)
    assert (again.usage.tokens, again.usage.dollars) == (first.usage.tokens, first.usage.dollars)
    assert len(server.script.bodies) == 2


def test_verdicts_before_a_failure_are_kept(server, judge):
    server.script.failures = [(200, {}), (401, {})]
    with pytest.raises(RunError, match=r"refuses: HTTP 401.*same command to resume"):
        judge(concurrency=1)(answers("4", "5"))
    judge(concurrency=1)(answers("4", "5"))
    assert len(server.script.bodies) == 2


def test_what_passes_is_tried_again_ever_later_and_not_before_the_server_says(server, judge):
    server.script.failures = [(503, {}), (429, {"Retry-After": "7"}), (0, {}), (500, {})]
    asked = judge()
    assert asked(answers("4")).verdict_B.item() == 0.75
    assert asked.waited == [1, 7, 4, 8]
    server.script.failures = [(500, {})] * TRIES
    with pytest.raises(RunError, match=f"did not answer in {TRIES} tries"):
        asked(answers("5"))
    server.script.failures = [(429, {"Retry-After": "100000"})]
    asked(answers("6"))
    assert max(asked.waited) == vllm_server.MOST_WAIT_S


def test_a_server_that_stalls_is_given_up_on(server, judge):
    server.script.stalls = True
    with pytest.raises(RunError, match="timed out"):
        judge(timeout_s=0.05)(answers("4"))


def test_requests_keep_the_pace_that_is_allowed(server, judge):
    asked = judge(per_minute=30, concurrency=1)
    asked(answers("4", "5", "6"))
    assert asked.waited == [2, 2]


def test_no_verdict_is_bought_that_the_purse_might_not_cover_and_raising_it_resumes(server, judge):
    prices = {"dollars_per_million_read": 1e4, "max_read": 40, "concurrency": 1}  # 0.3 dollars each, 0.4 at most
    with pytest.raises(RunError, match=r"0\.6 dollars are paid.*most_dollars, 0\.9, does not allow.*raise it"):
        judge(most_dollars=0.9, **prices)(answers("4", "5", "6"))
    assert len(server.script.bodies) == 2
    assert len(judge(most_dollars=2.0, **prices)(answers("4", "5", "6")).verdict_B) == 3
    assert len(server.script.bodies) == 3


def test_a_question_that_is_declined_has_no_verdict_and_others_have_theirs(server, judge):
    server.script.declines = "a bomb"
    judgement = judge()(answers("4", "a bomb"))
    assert judgement.verdict_B.tolist() == [0.75, 0.5]
    assert judgement.unreadable_B.tolist() == [False, True]
    assert judgement.usage.read_B.tolist() == [30, 0]


def test_garbage_is_counted_and_says_nothing_until_it_is_too_much(server, judge):
    server.script.text = "As a language model I have no opinion."
    asked = judge()
    judgement = asked(answers(*map(str, range(GARBAGE))))
    assert judgement.verdict_B.tolist() == [0.5] * GARBAGE
    assert judgement.unreadable_B.all()
    with pytest.raises(RunError, match=r"returns garbage: 21 of its last 21 .*'As a language model"):
        asked(answers("once more"))
    server.script.text = "3"
    later = judge()
    later(answers(*map(str, range(GARBAGE))))  # the same garbage, remembered
    later(answers(*(f"good {place}" for place in range(RECENT))))
    server.script.text = "?"
    later(answers("forgiven"))


def test_the_key_comes_from_the_environment_and_is_seen_by_the_server_alone(server, judge, monkeypatch, tmp_path):
    monkeypatch.delenv("JUDGE_KEY", raising=False)
    with pytest.raises(UserError, match="the environment variable JUDGE_KEY is not set"):
        judge(key_variable="JUDGE_KEY")
    monkeypatch.setenv("JUDGE_KEY", KEY)
    asked = judge(key_variable="JUDGE_KEY")
    asked(answers("4"))
    assert server.script.keys == {f"Bearer {KEY}"}
    server.script.failures = [(403, {})]
    with pytest.raises(RunError) as refused:
        asked(answers("5"))
    assert KEY not in f"{refused.value} {asked!r} {asked._server!r}"
    assert KEY.encode() not in (tmp_path / "judge.sqlite").read_bytes()


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"failures": [(401, {})]}, "cannot be used: HTTP 401"),
        ({"failures": [(0, {})]}, "does not answer"),
        ({"text": "Hello!"}, "gives no verdict but 'Hello!'"),
        ({"usage": None}, "is not a"),
    ],
)
def test_what_cannot_judge_is_found_before_anything_trains(server, judge, changes, said):
    for name, value in changes.items():
        setattr(server.script, name, value)
    with pytest.raises(UserError, match=said):
        judge().check()


def test_a_check_buys_one_verdict_once(server, judge):
    for _ in range(2):
        judge().check()
    assert len(server.script.bodies) == 1
