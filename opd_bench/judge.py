"""What a judge is: it is shown a task and a response, and says how probable it holds the response to be right.

    answers = Reader(tokenizer, prompts)(sequences)
    with ledger.reserve(judge.kind, cost_of(judge.most(answers))) as bill:
        judgement = judge(answers)
        judgement.verdict_B, judgement.usage, judgement.unreadable_B

Kinds: `judge_model.py` (a local model that writes a check, or whose next token is read), `judge_solver.py` (one that solves the task and
compares), `judge_endpoint.py` (a server of others) and `judge_verifier.py` (the tasks' own scorers, for reference). `backends.py` has the
choice, by configuration.

Shapes: B answers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch
from transformers import PreTrainedTokenizerBase

from opd_bench.bench import Judgement, Usage
from opd_bench.flops import FlopCount
from opd_bench.sequences import Sequences


@dataclass(frozen=True)
class Answer:
    """A prompt with a response to it: in the student's tokens without EOS, and as text without chat markup where that is known."""

    ids: list[int]
    prompt: str = ""
    response: str = ""


class Judge(Protocol):
    """Who gives verdicts. No answer carries the ground truth, so none but the verifier, which has it, can look at it."""

    @property
    def name(self) -> str:
        """For the report: what it is and how it is asked."""
        ...

    @property
    def kind(self) -> str:
        """Of its charges: "judge", or "verifier"."""
        ...

    @property
    def flops(self) -> FlopCount: ...

    @property
    def context(self) -> int | None:
        """Tokens that question and answer may have together; None where only a server knows."""
        ...

    def worst(self, length_B: torch.Tensor) -> Usage:
        """What verdicts on answers of so many tokens may take, as far as lengths can tell: for the trace of a step."""
        ...

    def most(self, answers: Sequence[Answer]) -> Usage:
        """What the verdicts on these very answers may take: for the reserve. None takes more."""
        ...

    def __call__(self, answers: Sequence[Answer]) -> Judgement: ...

    def swapped(self) -> Judge | None:
        """The same judge asked with its options in the other order; None where the question names no options."""
        ...


@dataclass(frozen=True)
class Reader:
    """Text of sequences. ``prompts`` has the tasks' own text by the tokens of a prompt; any other is decoded without special tokens.

    Without a tokenizer there is no text, and a judge that reads tokens still can be asked.
    """

    tokenizer: PreTrainedTokenizerBase | None = None
    prompts: Mapping[tuple[int, ...], str] = field(default_factory=dict, repr=False)

    def __call__(self, sequences: Sequences) -> list[Answer]:
        """Every response; one that was cut by the length limit as it stands."""
        return [self._answer(sequences, row) for row in range(len(sequences))]

    def _answer(self, sequences: Sequences, row: int) -> Answer:
        start, end = int(sequences.prompt_B[row]), int(sequences.length_B[row]) - int(sequences.finished_B[row])
        ids = sequences.ids_BT[row, :end].tolist()
        if self.tokenizer is None:
            return Answer(ids)
        prompt = self.prompts.get(tuple(ids[:start]))
        return Answer(ids, self._text(ids[:start]) if prompt is None else prompt, self._text(ids[start:]))

    def _text(self, ids: list[int]) -> str:
        assert self.tokenizer is not None
        return str(self.tokenizer.decode(ids, skip_special_tokens=True))
