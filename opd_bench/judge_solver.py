"""A judge that solves the task itself and compares: right is what it found, too.

    judge = SolvingJudge(teacher, tokenizer, suite.put, suite.taken, {"Compute 1+2": "arithmetic"}, eos, max_solution=96)

Compared is what the task's own filter takes from either text, such as the number after "Answer:". The ground truth is not looked at, so the
judge is as good as its model. A task without a filter compares whole texts. Rollouts to one prompt share one greedy solution.

Shapes: B answers.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from transformers import PreTrainedTokenizerBase

from opd_bench.bench import Judgement, Usage
from opd_bench.judge import Answer
from opd_bench.judge_model import LocalJudge
from opd_bench.rollouts import sample
from opd_bench.sequences import Prompts

NOTHING = ("", "[invalid]")  # what a filter takes from a text that holds no answer


@dataclass(frozen=True)
class SolvingJudge(LocalJudge):
    """``put`` makes a model's prompt of a question, ``taken`` gives what a task takes from texts, ``tasks`` the task of a question."""

    tokenizer: PreTrainedTokenizerBase
    put: Callable[[str], str]
    taken: Callable[[str, Sequence[str]], list[str]]
    tasks: Mapping[str, str] = field(repr=False)
    eos: int
    max_solution: int
    growth: float = 1.0  # tokens of its own for one of the student's, at most

    @property
    def name(self) -> str:
        return f"its own solution of up to {self.max_solution} tokens, compared by what the task takes from it"

    def worst(self, length_B: torch.Tensor) -> Usage:
        """As if every answer were to another prompt."""
        return Usage((length_B * self.growth).ceil().long(), torch.full((len(length_B),), self.max_solution))

    def most(self, answers: Sequence[Answer]) -> Usage:
        new, read_B = self._new(answers), torch.zeros(len(answers), dtype=torch.long)
        for row, ids in new.items():
            read_B[row] = len(ids)
        return Usage(read_B, (read_B > 0) * self.max_solution)

    def __call__(self, answers: Sequence[Answer]) -> Judgement:
        """1 where its own solution says the same, 0 where it says something else; 0.5 where it says nothing or the task is unknown."""
        new = self._new(answers)
        read_B, written_B = (torch.zeros(len(answers), dtype=torch.long) for _ in range(2))
        own: dict[str, str] = {}
        if new:
            prompts = Prompts(list(new.values()), [""] * len(new))
            solutions = sample(self.model, prompts, max_response=self.max_solution, eos=self.eos, generator=None)
            for place, row in enumerate(new):
                own[answers[row].prompt] = str(self.tokenizer.decode(solutions.response(place), skip_special_tokens=True))
                read_B[row], written_B[row] = solutions.prompt_B[place], solutions.length_B[place] - solutions.prompt_B[place]
        verdict_B, unreadable_B = torch.full((len(answers),), 0.5), torch.ones(len(answers), dtype=torch.bool)
        for row, answer in enumerate(answers):
            if answer.prompt in own:
                mine, theirs = self.taken(self.tasks[answer.prompt], [own[answer.prompt], answer.response])
                if mine not in NOTHING:
                    verdict_B[row], unreadable_B[row] = float(mine == theirs), False
        return Judgement(verdict_B, Usage(read_B, written_B), unreadable_B)

    def _new(self, answers: Sequence[Answer]) -> dict[int, list[int]]:
        """By the first row of each question, what the model is given for it."""
        first: dict[str, int] = {}
        for row, answer in enumerate(answers):
            if answer.prompt in self.tasks:
                first.setdefault(answer.prompt, row)
        ids = self.tokenizer([self.put(question) for question in first], add_special_tokens=False).input_ids if first else []
        return {row: list(own) for row, own in zip(first.values(), ids, strict=True)}

    def swapped(self) -> None:
        """It is asked nothing but the task."""
