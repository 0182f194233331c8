"""An AI judge: the teacher is asked whether a written answer is right, checks it in writing and says yes or no.

Shapes: B sequences.
"""

from __future__ import annotations

import random
from dataclasses import dataclass

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from opd_bench.bench import Judgement
from opd_bench.errors import UserError
from opd_bench.models import eos_id
from opd_bench.rollouts import sample
from opd_bench.sequences import Prompts, Sequences


@dataclass(frozen=True)
class Judge:
    """``question`` is appended to prompt and response; the last token before EOS of what follows is the verdict."""

    model: PreTrainedModel
    question: list[int]
    yes: int
    no: int
    eos: int
    max_check: int
    at_random: bool = False  # verdicts by lot, one for each text, whatever the check says

    @classmethod
    def from_text(
        cls,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        *,
        question: str,
        yes: str,
        no: str,
        max_check: int,
        at_random: bool = False,
    ) -> Judge:
        def encode(text: str) -> list[int]:
            return list(tokenizer(text, add_special_tokens=False).input_ids)

        if encode(yes)[-1] == encode(no)[-1]:
            raise UserError(f"judge.yes {yes!r} and judge.no {no!r} end with the same token; choose words that don't")
        return cls(model, encode(question), encode(yes)[-1], encode(no)[-1], eos_id(tokenizer), max_check, at_random)

    def __call__(self, sequences: Sequences) -> Judgement:
        """Judge every response; one that was cut by the length limit is judged like any other: as it stands."""
        answers = []
        for row in range(len(sequences)):
            ids = sequences.ids_BT[row, : sequences.length_B[row]].tolist()
            answers.append(ids[:-1] if sequences.finished_B[row] else ids)
        return self.of(answers)

    def of(self, answers: list[list[int]]) -> Judgement:
        """The verdict on each prompt with its response, without EOS.

        It is the probability of "yes" where "yes" or "no" was written, and 0.5 where neither was.
        """
        asked = [ids + self.question for ids in answers]
        checks = sample(self.model, Prompts(asked, [""] * len(asked)), max_response=self.max_check, eos=self.eos, generator=None)
        if self.at_random:
            return Judgement(checks, torch.tensor([random.Random(str(ids)).random() for ids in asked]))
        verdict_B = torch.full((len(asked),), 0.5)
        for row in range(len(asked)):
            place = int(checks.length_B[row]) - 1 - int(checks.finished_B[row])
            token, probability = int(checks.ids_BT[row, place]), float(checks.logprob_BT[row, place].exp())
            if place >= checks.prompt_B[row] and token in (self.yes, self.no):
                verdict_B[row] = probability if token == self.yes else 1 - probability
        return Judgement(checks, verdict_B)
