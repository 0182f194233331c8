"""A teacher behind a vLLM server: by HTTP, the log-probabilities of its most probable next tokens.

    teacher = ServerTeacher(
        "http://127.0.0.1:8000/v1", "org/teacher", top=64, vocabulary=len(tokenizer), eos=2,
        tokens=tokenizer(PROBE, add_special_tokens=False).input_ids, longest=1024,
    )
    teacher.check()
    log_probs_NE, top_NK = teacher(sequences)[:]

The server scores the sequences as prompts (``prompt_logprobs``); what a local teacher knows of every token is known of K tokens and of the
rest as a whole, so the probabilities of a position still sum to 1.

Shapes: N response tokens, K most probable tokens at each, E = K + 1 with all other tokens as one.
"""

from __future__ import annotations

import contextlib
import json
import math
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from http.client import HTTPException
from typing import Any
from urllib.error import HTTPError
from urllib.request import Request, urlopen

import torch

from opd_bench.errors import RunError, UserError
from opd_bench.scoring import Sparse
from opd_bench.sequences import Sequences

PROBE = "Let f(x) = 3x² + 17;\n\tdef naïve(été): return 東京[1:]"  # text on which tokenizers differ
REQUESTS = 16  # sequences under way at once; the server makes batches of them
TRIES = 5
WAIT_S = 1.0  # before the second try; doubles with each
FLOOR = -11.5  # nats, the least that all other tokens get: below it is rounding of a float32 softmax over a real vocabulary


class _PassingError(Exception):
    """No answer, or one after which another try may succeed."""


class _RefusedError(Exception):
    """The server's reason for not doing what was asked."""


@dataclass(frozen=True)
class ServerTeacher:
    """``model`` at ``url``. ``tokens`` is PROBE in the student's tokenizer, ``longest`` the length of the longest sequence."""

    url: str
    model: str
    top: int
    vocabulary: int
    eos: int
    tokens: list[int]
    longest: int
    timeout_s: float = 120.0

    def check(self) -> None:
        """UserError unless the server answers, serves the model, and can score this student's sequences."""
        try:
            self._check_service()
            self._check_vocabulary()
            self._check_top()
        except _PassingError as reason:
            raise UserError(f"the teacher's server at {self.url} does not answer ({reason}); start it, or mend its address") from None
        except _RefusedError as reason:
            raise UserError(f"the teacher's server at {self.url} cannot be used: {reason}") from None
        except (KeyError, TypeError, IndexError):
            raise UserError(f"what answers at {self.url} is not a vLLM server; give the address of one") from None

    def _check_service(self) -> None:
        if not self.url.endswith("/v1"):
            raise _RefusedError("the address of a vLLM server ends with /v1")
        served = {card["id"]: card["max_model_len"] for card in self._ask(f"{self.url}/models")["data"]}
        if self.model not in served:
            raise _RefusedError(f"it serves {', '.join(served)}, not {self.model}; name what it serves")
        if served[self.model] <= self.longest:
            raise _RefusedError(
                f"its context has {served[self.model]} tokens, and the longest sequence {self.longest} and one to spare; "
                f"start it with --max-model-len {self.longest + 1} or lower max_response"
            )

    def _check_vocabulary(self) -> None:
        text = {"model": self.model, "prompt": PROBE, "add_special_tokens": False}
        if self._ask(f"{self.url.removesuffix('/v1')}/tokenize", text)["tokens"] != self.tokens:
            raise _RefusedError("its tokenizer is not the student's; token-level distillation needs one vocabulary")
        try:
            self._complete(prompt=[self.vocabulary - 1])
        except _RefusedError as reason:
            raise _RefusedError(f"it has fewer than the student's {self.vocabulary} tokens; resize the embeddings ({reason})") from None
        try:
            self._complete(prompt=[self.vocabulary])
        except _RefusedError:
            pass
        else:
            raise _RefusedError(f"it has more than the student's {self.vocabulary} tokens; resize the embeddings")
        if self._complete(allowed_token_ids=[self.eos], max_tokens=2)["finish_reason"] != "stop":
            raise _RefusedError(f"it does not end with the student's EOS, token {self.eos}; give both the same eos_token")

    def _check_top(self) -> None:
        if self.top >= self.vocabulary:  # which would end the server
            raise _RefusedError(f"it cannot give {self.top} of {self.vocabulary} tokens and have others left; lower top")
        try:
            self._complete(prompt_logprobs=self.top)
        except _RefusedError as reason:
            raise _RefusedError(f"start it with --max-logprobs {self.top} ({reason})") from None

    def __call__(self, sequences: Sequences) -> Sparse:
        """Log-probabilities (N, E), float32, and ids (N, K), the most probable first, at the response tokens, row after row.

        RunError if the server refuses a sequence or does not answer for long.
        """
        prompts, lengths = sequences.prompt_B.tolist(), sequences.length_B.tolist()
        rows = [ids[:length] for ids, length in zip(sequences.ids_BT.tolist(), lengths, strict=True)]
        with ThreadPoolExecutor(REQUESTS) as pool:
            scored = [position for positions in pool.map(self._score, rows, prompts) for position in positions]
        log_probs_NK = torch.tensor([[event["logprob"] for _, event in position] for position in scored], dtype=torch.float64)
        top_NK = torch.tensor([[int(token) for token, _ in position] for position in scored])
        return Sparse(torch.cat([log_probs_NK, _rest(log_probs_NK)], -1).float(), top_NK)

    def _score(self, ids: list[int], prompt: int) -> list[list[tuple[str, dict[str, Any]]]]:
        """What is most probable at each token after the prompt; the server adds the token written if it is not among them."""
        positions = self._persist(prompt=ids, prompt_logprobs=self.top)["prompt_logprobs"]
        return [sorted(position.items(), key=lambda item: item[1]["rank"])[: self.top] for position in positions[prompt:]]

    def _persist(self, **request: Any) -> dict[str, Any]:
        reasons: list[str] = []
        while len(reasons) < TRIES:
            if reasons:
                time.sleep(WAIT_S * 2 ** (len(reasons) - 1))
            try:
                return self._complete(**request)
            except _PassingError as reason:
                reasons.append(str(reason))
            except _RefusedError as reason:
                raise RunError(
                    f"the teacher's server at {self.url} refuses: {reason}; mend it and run the same command to resume"
                ) from None
        raise RunError(
            f"the teacher's server at {self.url} did not answer in {TRIES} tries ({'; '.join(reasons)}); "
            "once it does, run the same command again to resume"
        )

    def _complete(self, **request: Any) -> dict[str, Any]:
        asked = {"model": self.model, "prompt": self.tokens[:1], "max_tokens": 1, "temperature": 0.0, **request}
        return self._ask(f"{self.url}/completions", asked)["choices"][0]

    def _ask(self, url: str, body: dict[str, Any] | None = None) -> dict[str, Any]:
        try:
            request = Request(url, None if body is None else json.dumps(body).encode(), {"Content-Type": "application/json"})
            with urlopen(request, timeout=self.timeout_s) as answer:
                return json.load(answer)
        except HTTPError as error:
            passing = error.code == 429 or error.code >= 500
            raise (_PassingError if passing else _RefusedError)(f"HTTP {error.code} {_message(error)}") from None
        except (OSError, HTTPException) as error:
            raise _PassingError(str(getattr(error, "reason", error)) or type(error).__name__) from None
        except ValueError as error:
            raise _RefusedError(f"no address, or no JSON behind it ({error})") from None


def _message(error: HTTPError) -> str:
    """The reason that an error's body gives, in one line; all of the body if it is not vLLM's."""
    text = str(error.reason)
    with error, contextlib.suppress(OSError, HTTPException, ValueError, KeyError, TypeError):
        text = error.read().decode(errors="replace")
        text = json.loads(text)["error"]["message"]
    return " ".join(text.split())


def _rest(log_probs_NK: torch.Tensor) -> torch.Tensor:
    """The log-probability (N, 1) of all other tokens together."""
    left_N1 = -torch.expm1(log_probs_NK.logsumexp(-1, keepdim=True))
    return left_N1.clamp(min=math.exp(FLOOR)).log()
