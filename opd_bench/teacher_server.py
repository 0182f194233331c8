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

import math
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import torch

from opd_bench.errors import RunError
from opd_bench.scoring import Sparse
from opd_bench.sequences import Sequences
from opd_bench.vllm_server import RefusedError, Server

PROBE = "Let f(x) = 3x² + 17;\n\tdef naïve(été): return 東京[1:]"  # text on which tokenizers differ
COMPLETIONS = "/v1/completions"
REQUESTS = 16  # sequences under way at once; the server makes batches of them
FLOOR = -11.5  # nats, the least that all other tokens get: below it is rounding of a float32 softmax over a real vocabulary


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
    known: int | None = None  # tokens of the tokenizer, where the model has output columns beyond them

    @property
    def server(self) -> Server:
        return Server(f"the teacher's server at {self.url}", self.url.removesuffix("/v1"), self.timeout_s)

    def check(self) -> None:
        """UserError unless the server answers, serves the model, and can score this student's sequences."""
        with self.server.checking():
            if not self.url.endswith("/v1"):
                raise RefusedError("the address of a vLLM server ends with /v1")
            self.server.check_context(self.model, self.longest, spare=1)
            self._check_vocabulary()
            self._check_top()

    def _check_vocabulary(self) -> None:
        text = {"model": self.model, "prompt": PROBE, "add_special_tokens": False}
        if self.server.ask("/tokenize", text)["tokens"] != self.tokens:
            raise RefusedError("its tokenizer is not the student's; token-level distillation needs one vocabulary")
        try:
            self._complete(prompt=[self.vocabulary - 1])
        except RefusedError as reason:
            raise RefusedError(f"it has fewer than the student's {self.vocabulary} tokens; resize the embeddings ({reason})") from None
        try:
            self._complete(prompt=[self.vocabulary])
        except RefusedError:
            pass
        else:
            raise RefusedError(f"it has more than the student's {self.vocabulary} tokens; resize the embeddings")
        if self._complete(allowed_token_ids=[self.eos], max_tokens=2)["finish_reason"] != "stop":
            raise RefusedError(f"it does not end with the student's EOS, token {self.eos}; give both the same eos_token")

    def _check_top(self) -> None:
        if self.top >= self.vocabulary:  # which would end the server
            raise RefusedError(f"it cannot give {self.top} of {self.vocabulary} tokens and have others left; lower top")
        try:
            self._complete(prompt_logprobs=self.top)
        except RefusedError as reason:
            raise RefusedError(f"start it with --max-logprobs {self.top} ({reason})") from None

    def __call__(self, sequences: Sequences) -> Sparse:
        """Log-probabilities (N, E), float32, and ids (N, K), the most probable first, at the response tokens, row after row.

        RunError if the server refuses a sequence, does not answer for long, or tells of tokens that the tokenizer does not have.
        """
        prompts, lengths = sequences.prompt_B.tolist(), sequences.length_B.tolist()
        rows = [ids[:length] for ids, length in zip(sequences.ids_BT.tolist(), lengths, strict=True)]
        with ThreadPoolExecutor(REQUESTS) as pool:
            scored = [position for positions in pool.map(self._score, rows, prompts) for position in positions]
        log_probs_NK = torch.tensor([[event["logprob"] for _, event in position] for position in scored], dtype=torch.float64)
        top_NK = torch.tensor([[int(token) for token, _ in position] for position in scored])
        if self.known is not None and top_NK.numel() and (most := int(top_NK.max())) >= self.known:
            raise RunError(f"{self.server.name} holds token {most} likely, which the tokenizer does not have; use scoring.by: model")
        return Sparse(torch.cat([log_probs_NK, _rest(log_probs_NK)], -1).float(), top_NK)

    def _score(self, ids: list[int], prompt: int) -> list[list[tuple[str, dict[str, Any]]]]:
        """What is most probable at each token after the prompt; the server adds the token written if it is not among them."""
        answer = self.server.persist(COMPLETIONS, self._body(prompt=ids, prompt_logprobs=self.top))
        positions = answer["choices"][0]["prompt_logprobs"]
        return [sorted(position.items(), key=lambda item: item[1]["rank"])[: self.top] for position in positions[prompt:]]

    def _complete(self, **request: Any) -> dict[str, Any]:
        return self.server.ask(COMPLETIONS, self._body(**request))["choices"][0]

    def _body(self, **request: Any) -> dict[str, Any]:
        return {"model": self.model, "prompt": self.tokens[:1], "max_tokens": 1, "temperature": 0.0, **request}


def _rest(log_probs_NK: torch.Tensor) -> torch.Tensor:
    """The log-probability (N, 1) of all other tokens together."""
    left_N1 = -torch.expm1(log_probs_NK.logsumexp(-1, keepdim=True))
    return left_N1.clamp(min=math.exp(FLOOR)).log()
