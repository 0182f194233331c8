"""The tasks' own scorers: as a judge for reference (RLVR, not RLAIF), and to say afterwards which answers were right.

    verifier = Verifier(suite.score, {prompt: ("arithmetic", 17)}, {"arithmetic": documents})
    verifier.scores(answers)      # 0 to 1; None where the task cannot score the document

Known limit: an answer is found by the text of its prompt, so two documents with one prompt are the same document here.

Shapes: B answers.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from opd_bench.bench import Judgement, Usage
from opd_bench.errors import UserError
from opd_bench.flops import FlopCount
from opd_bench.judge import Answer
from opd_bench.ledger import VERIFIER

Scorer = Callable[[str, Sequence[Any], Sequence[str]], list[float]]  # of a task's documents and the responses to them


@dataclass(frozen=True)
class Verifier:
    """``places`` gives task and row by the text of a prompt, ``documents`` the rows of each task."""

    score: Scorer
    places: Mapping[str, tuple[str, int]] = field(repr=False)
    documents: Mapping[str, Any] = field(repr=False)
    kind = VERIFIER
    name = "the tasks' own scorers: RLVR, for reference"
    flops = FlopCount(0, 0)
    context = None

    def scores(self, answers: Sequence[Answer]) -> list[float | None]:
        """One for each answer; a task's answers are scored together, or one by one where the task refuses one of them."""
        by_task: dict[str, list[int]] = defaultdict(list)
        for row, answer in enumerate(answers):
            if answer.prompt in self.places:
                by_task[self.places[answer.prompt][0]].append(row)
        found: list[float | None] = [None] * len(answers)
        for task, rows in by_task.items():
            docs = [self.documents[task][self.places[answers[row].prompt][1]] for row in rows]
            responses = [answers[row].response for row in rows]
            try:
                scored: list[float | None] = [*self.score(task, docs, responses)]
            except UserError:
                scored = [self._one(task, doc, response) for doc, response in zip(docs, responses, strict=True)]
            for row, value in zip(rows, scored, strict=True):
                found[row] = value
        return found

    def _one(self, task: str, doc: Any, response: str) -> float | None:
        try:
            return self.score(task, [doc], [response])[0]
        except UserError:
            return None

    def worst(self, length_B: torch.Tensor) -> Usage:
        """Tokens that it reads, so that the ledger says so; they count on no axis."""
        return Usage(length_B, torch.zeros_like(length_B))

    def most(self, answers: Sequence[Answer]) -> Usage:
        return self.worst(torch.tensor([len(answer.ids) for answer in answers], dtype=torch.long))

    def __call__(self, answers: Sequence[Answer]) -> Judgement:
        found = self.scores(answers)
        verdict_B = torch.tensor([0.5 if score is None else min(1.0, max(0.0, score)) for score in found])
        return Judgement(verdict_B, self.most(answers), torch.tensor([score is None for score in found]))

    def swapped(self) -> None:
        """It is asked nothing."""
