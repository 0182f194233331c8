"""An AI judge: the teacher is asked whether a written answer is right, solves the problem again and says yes or no.

Shapes: B sequences.
"""

from __future__ import annotations

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

    @classmethod
    def from_text(
        cls, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, *, question: str, yes: str, no: str, max_check: int
    ) -> Judge:
        def encode(text: str) -> list[int]:
            return list(tokenizer(text, add_special_tokens=False).input_ids)

        if encode(yes)[-1] == encode(no)[-1]:
            raise UserError(f"judge.yes {yes!r} and judge.no {no!r} end with the same token; choose words that don't")
        return cls(model, encode(question), encode(yes)[-1], encode(no)[-1], eos_id(tokenizer), max_check)

    def __call__(self, sequences: Sequences) -> Judgement:
        """The verdict is the probability of "yes" where "yes" or "no" was written; 0.5 where neither was.

        A response that was cut by the length limit is judged like any other: as it stands.
        """
        asked = []
        for row in range(len(sequences)):
            ids = sequences.ids_BT[row, : sequences.length_B[row]].tolist()
            asked.append((ids[:-1] if sequences.finished_B[row] else ids) + self.question)
        checks = sample(self.model, Prompts(asked, [""] * len(asked)), max_response=self.max_check, eos=self.eos, generator=None)
        verdict_B = torch.full((len(asked),), 0.5)
        for row in range(len(asked)):
            place = int(checks.length_B[row]) - 1 - int(checks.finished_B[row])
            token, probability = int(checks.ids_BT[row, place]), float(checks.logprob_BT[row, place].exp())
            if place >= checks.prompt_B[row] and token in (self.yes, self.no):
                verdict_B[row] = probability if token == self.yes else 1 - probability
        return Judgement(checks, verdict_B)
