"""A judge behind a server that speaks OpenAI's chat completions (vLLM's, a hosted one): rate, purse and memory included.

    judge = EndpointJudge("org/judge", RATING, rating(9), rating(9, swapped=True), endpoint, path=out / "judge.sqlite")
    judge.check()

What it said is kept in a file and never bought twice, whichever arm asked; the ledger charges it each time, so that a resumed run is
charged what an undisturbed one is. Tokens are those of the server's ``usage``. The key comes from the environment and is not kept.

Known limits: several processes look at the purse before each request, not together, so each may pass it by the requests it has under way.
A rating of 10 is taken from the text alone.

Shapes: B answers.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
import sqlite3
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from opd_bench.bench import Judgement, Usage
from opd_bench.errors import RunError, UserError
from opd_bench.flops import FlopCount
from opd_bench.judge import Answer
from opd_bench.judge_model import Options
from opd_bench.settings import Endpoint
from opd_bench.vllm_server import RefusedError, Server

COMPLETIONS = "/chat/completions"
VERDICTS = "judge.sqlite"  # of all arms, in the folder of a comparison
UNFIT = (400, 413, 422)  # statuses by which a server declines one question and may take the next
TOP = 20  # likeliest tokens that servers give at most
RECENT, GARBAGE = 100, 20  # of so many answers, as many at most may be no verdict
WAIT_S = 60  # for another process that writes
PROBE = Answer([], "What is 2 + 2?", "4")


@dataclass(frozen=True)
class Said:
    """One answer: its text, the alternatives to each of its tokens where they are known, tokens read and written, dollars paid."""

    text: str
    logprobs: list[dict[str, Any]]
    read: int
    written: int
    dollars: float


@dataclass(frozen=True)
class Memory:
    """What was said, by question, in a file that any number of processes may share."""

    path: Path

    def get(self, key: bytes) -> Said | None:
        with self._open() as file:
            row = file.execute("SELECT text, logprobs, read, written, dollars FROM said WHERE key = ?", (key,)).fetchone()
        return None if row is None else Said(row[0], json.loads(row[1]), *row[2:])

    def put(self, key: bytes, said: Said) -> None:
        row = (key, said.text, json.dumps(said.logprobs), said.read, said.written, said.dollars)
        with self._open() as file:
            file.execute("INSERT OR REPLACE INTO said VALUES (?, ?, ?, ?, ?, ?)", row)

    def paid(self) -> float:
        """Dollars, for all that is in it."""
        with self._open() as file:
            return float(file.execute("SELECT TOTAL(dollars) FROM said").fetchone()[0])

    @contextmanager
    def _open(self) -> Iterator[sqlite3.Connection]:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with closing(sqlite3.connect(self.path, timeout=WAIT_S)) as file, file:
                columns = "key BLOB PRIMARY KEY, text TEXT, logprobs TEXT, read INTEGER, written INTEGER, dollars REAL"
                file.execute(f"CREATE TABLE IF NOT EXISTS said ({columns})")
                yield file
        except sqlite3.DatabaseError as error:
            raise UserError(
                f"cannot use {self.path}: {error}; free some space, or delete it and its verdicts will be bought again"
            ) from None


@dataclass
class EndpointJudge:
    """``model`` is what the server calls it. UserError where the key's variable is not set."""

    model: str
    template: str
    options: Options
    other: Options  # the same, said in the other order
    endpoint: Endpoint
    path: Path  # of what it said
    parameters: float | None = None
    wait: Callable[[float], None] = time.sleep
    clock: Callable[[], float] = time.monotonic
    recent: deque[bool] = field(default_factory=lambda: deque(maxlen=RECENT), repr=False)  # whether the last answers were no verdicts
    kind = "judge"
    context = None

    def __post_init__(self) -> None:
        variable = self.endpoint.key_variable
        if variable is not None and not os.environ.get(variable):
            raise UserError(f"the environment variable {variable} is not set; put the key of {self.endpoint.url} there")
        secrets = {} if variable is None else {"Authorization": f"Bearer {os.environ[variable]}"}
        name = f"the judge at {self.endpoint.url}"
        self._server = Server(name, self.endpoint.url, self.endpoint.timeout_s, secrets, self.wait)
        self._lock, self._under_way, self._next = threading.Lock(), 0, -math.inf

    @property
    def name(self) -> str:
        return f"{self.model} behind a server, {self.options.said}"

    @property
    def flops(self) -> FlopCount:
        """2 · parameters per token that it reads or writes, the last excepted, as in all sampling; nothing where they are not known."""
        return FlopCount(round(self.parameters or 0), 0)

    @cached_property
    def memory(self) -> Memory:
        return Memory(self.path)

    def at(self, path: Path) -> EndpointJudge:
        """The same judge with its memory in ``path``."""
        return replace(self, path=path, recent=deque(maxlen=RECENT))

    def swapped(self) -> EndpointJudge | None:
        if "{options}" not in self.template:
            return None
        return replace(self, options=self.other, other=self.options, recent=deque(maxlen=RECENT))

    def check(self) -> None:
        """One question with an answer to it, which is bought. UserError unless the server gives a usage and a verdict."""
        body = self._body(PROBE)
        if (said := self.memory.get(_key(body))) is None:
            with self._server.checking():
                said = self._said(self._server.ask(COMPLETIONS, body))
                self.memory.put(_key(body), said)
        self._within(said)
        if self._verdict(said) is None:
            raise UserError(f"{self._server.name} gives no verdict but {said.text!r}; ask for one in judge.template")

    def worst(self, length_B: torch.Tensor) -> Usage:
        count = len(length_B)
        read_B, written_B = (torch.full((count,), of) for of in (self.endpoint.max_read, self.endpoint.max_written))
        return Usage(read_B, written_B, count * self._price(self.endpoint.max_read, self.endpoint.max_written))

    def most(self, answers: Sequence[Answer]) -> Usage:
        return self.worst(torch.zeros(len(answers)))

    def __call__(self, answers: Sequence[Answer]) -> Judgement:
        """RunError if the server refuses or is silent for long, the purse is empty, or garbage comes back; what was said is kept."""
        bodies = [self._body(answer) for answer in answers]
        keys = [_key(body) for body in bodies]
        asked = dict(zip(keys, bodies, strict=True))
        known = {key: said for key in asked if (said := self.memory.get(key)) is not None}
        missing = [key for key in asked if key not in known]
        pool = ThreadPoolExecutor(self.endpoint.concurrency)
        try:
            known |= zip(missing, pool.map(lambda key: self._buy(key, asked[key]), missing), strict=True)
        finally:
            pool.shutdown(wait=True, cancel_futures=True)
        said = [known[key] for key in keys]
        for of in said:
            self._within(of)
        verdicts = [self._verdict(of) for of in said]
        self._watch(said, verdicts)
        read_B, written_B = (torch.tensor([getattr(of, name) for of in said], dtype=torch.long) for name in ("read", "written"))
        dollars = math.fsum(self._price(of.read, of.written) for of in said)
        verdict_B = torch.tensor([0.5 if verdict is None else verdict for verdict in verdicts])
        return Judgement(verdict_B, Usage(read_B, written_B, dollars), torch.tensor([verdict is None for verdict in verdicts]))

    def _body(self, answer: Answer) -> dict[str, Any]:
        text = self.template.format(prompt=answer.prompt, response=answer.response, options=self.options.said)
        body: dict[str, Any] = {"model": self.model, "messages": [{"role": "user", "content": text}]}
        body |= {"temperature": 0.0, "max_tokens": self.endpoint.max_written}
        return {**body, "logprobs": True, "top_logprobs": TOP} if self.endpoint.logprobs else body

    def _price(self, read: int, written: int) -> float:
        return (read * self.endpoint.dollars_per_million_read + written * self.endpoint.dollars_per_million_written) / 1e6

    def _buy(self, key: bytes, body: dict[str, Any]) -> Said:
        """Ask the server and remember what it says; what it declines is remembered, too."""
        self._open_purse()
        try:
            self._keep_pace()
            try:
                said = self._said(self._server.insist(COMPLETIONS, body))
            except RefusedError as reason:
                if reason.status not in UNFIT:
                    raise RunError(f"{self._server.name} refuses: {reason}; mend it and run the same command to resume") from None
                said = Said(f"(declined: {reason})", [], 0, 0, 0.0)
            except (KeyError, TypeError, IndexError):
                raise RunError(f"{self._server.name} gives no message or no usage; use a server that does") from None
            self.memory.put(key, said)
        finally:
            with self._lock:
                self._under_way -= 1
        return said

    def _within(self, said: Said) -> None:
        """RunError where it took more than is reserved."""
        for what, took, most in (("read", said.read, self.endpoint.max_read), ("written", said.written, self.endpoint.max_written)):
            if took > most:
                raise RunError(f"{self._server.name} counts {took} tokens {what}; give judge.endpoint.max_{what} at least that")

    def _open_purse(self) -> None:
        most, worst = self.endpoint.most_dollars, self._price(self.endpoint.max_read, self.endpoint.max_written)
        with self._lock:
            if most is not None and (paid := self.memory.paid()) + (self._under_way + 1) * worst > most:
                said = (
                    f"{paid:.4g} dollars are paid to the judge and another verdict may cost {worst:.2g}, which judge.endpoint.most_dollars"
                )
                raise RunError(f"{said}, {most:g}, does not allow; all verdicts are kept: raise it and run the same command to resume")
            self._under_way += 1

    def _keep_pace(self) -> None:
        if self.endpoint.per_minute is None:
            return
        with self._lock:
            now = self.clock()
            turn = max(now, self._next)
            self._next = turn + 60 / self.endpoint.per_minute
        if turn > now:
            self.wait(turn - now)

    def _said(self, answer: Any) -> Said:
        choice, usage = answer["choices"][0], answer["usage"]
        read, written = int(usage["prompt_tokens"]), int(usage["completion_tokens"])
        logprobs = (choice.get("logprobs") or {}).get("content") or []
        alternatives = [{"token": of["token"], "top": [[top["token"], top["logprob"]] for top in of["top_logprobs"]]} for of in logprobs]
        return Said(str(choice["message"].get("content") or ""), alternatives, read, written, self._price(read, written))

    def _verdict(self, said: Said) -> float | None:
        """0 to 1: of the written word, or over all words where their probabilities are known; None where no word was written."""
        word = written_word(said.text, self.options)
        if word is None:
            return None
        values = dict(zip(self.options.words, self.options.values, strict=True))
        places = [of["top"] for of in said.logprobs if _bare(of["token"]) == word]
        if places and all(len(one) == 1 or one.isalpha() for one in values):
            mass: dict[str, float] = {}
            for token, logprob in places[-1]:
                mass[_bare(token)] = mass.get(_bare(token), 0.0) + math.exp(logprob)
            whole = math.fsum(mass.get(one, 0.0) for one in values)
            if whole > 0:
                return min(1.0, math.fsum(mass.get(one, 0.0) * value for one, value in values.items()) / whole)
        return values[word]

    def _watch(self, said: list[Said], verdicts: list[float | None]) -> None:
        for of, verdict in zip(said, verdicts, strict=True):
            self.recent.append(verdict is None)
            if verdict is None and sum(self.recent) > GARBAGE:
                count = f"{sum(self.recent)} of its last {len(self.recent)} answers give no verdict"
                raise RunError(f"the judge returns garbage: {count}, such as {of.text[:200]!r}; change judge.template or judge.model")


def written_word(text: str, options: Options) -> str | None:
    """The option that ``text`` ends with, a rating perhaps as 7/9; or, if a word, begins with."""
    words, best = "|".join(options.words[::-1]), options.words[-1]  # 10 before 1
    found = re.search(rf"(?:^|[^\w.,/-])({words})(?:\s*/\s*{best})?\W*$", text.strip().lower())
    if found is None and best.isalpha():
        found = re.match(rf"\W*({words})\b", text.lower())
    return found[1] if found else None


def _bare(token: str) -> str:
    """A token as a word: no space, case or punctuation around it."""
    return re.sub(r"^[\W_]+|[\W_]+$", "", token).lower()


def _key(body: dict[str, Any]) -> bytes:
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).digest()
