"""A local model as the judge: it writes a check that ends in a verdict, or its next token after a question is read.

    judge = CheckJudge.from_text(teacher, tokenizer, question="\\nCheck:\\n", yes="yes", no="no", max_check=98)
    judge = ReadJudge(model, tokenizer, YES_NO, yes_or_no(), most_written=...)

A rating is the expectation over the digits' probabilities (G-Eval, Liu et al. 2023, arXiv 2303.16634); yes or no is the log-odds of one
against the other at one position. Spellings of one token each are added up; ratings end at 9, as 10 is two tokens in many vocabularies.

Shapes: B answers, V vocabulary, O options.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from opd_bench.bench import Judgement, Usage
from opd_bench.errors import UserError
from opd_bench.flops import FlopCount, flop_count
from opd_bench.judge import Answer
from opd_bench.models import chat_text, eos_id
from opd_bench.rollouts import sample
from opd_bench.scoring import output_head
from opd_bench.sequences import Prompts

SHOWN = "Here is a task and a response to it.\n\nTask:\n{prompt}\n\nResponse:\n{response}\n\n"
YES_NO = SHOWN + "Is the response correct? Answer with one word, {options}."
RATING = SHOWN + "How good is the response, {options}? Answer with the number alone."
BARE = "\nAnswer:\n"  # follows the question where a tokenizer has no chat template
READABLE = 0.1  # least probability of all options together: below it the model would have said something else
MICRO_TOKENS = 8192  # of questions, padded, that are read together


@dataclass(frozen=True)
class Options:
    """Words that may be the answer, what each is worth, 0 to 1, and how the question names them."""

    words: tuple[str, ...]
    values: tuple[float, ...]
    said: str

    def spellings(self, word: str) -> set[str]:
        return {space + form for space in ("", " ") for form in (word, word.capitalize(), word.upper())}


def yes_or_no(swapped: bool = False) -> Options:
    return Options(("yes", "no"), (1.0, 0.0), "no or yes" if swapped else "yes or no")


def rating(best: int, swapped: bool = False) -> Options:
    """1 to ``best``; swapped, 1 is right."""
    values = tuple(place / (best - 1) for place in range(best))
    ends = ("right", "wrong") if swapped else ("wrong", "right")
    said = f"from 1 ({ends[0]}) to {best} ({ends[1]})"
    return Options(tuple(str(place + 1) for place in range(best)), values[::-1] if swapped else values, said)


@dataclass(frozen=True)
class LocalJudge:
    """A judge whose model is in this process."""

    model: PreTrainedModel
    kind = "judge"

    @property
    def flops(self) -> FlopCount:
        return flop_count(self.model.config)

    @property
    def context(self) -> int:
        return int(self.model.config.max_position_embeddings)


@dataclass(frozen=True)
class CheckJudge(LocalJudge):
    """``question`` is appended to prompt and response; the last token before EOS of what follows is the verdict."""

    question: list[int]
    yes: int
    no: int
    eos: int
    max_check: int
    at_random: bool = False  # verdicts by lot, one for each text, whatever the check says
    tokenizer: PreTrainedTokenizerBase | None = None  # of its own, where the student's tokens are not its
    growth: float = 1.0  # tokens of its own for one of the student's, at most

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
    ) -> CheckJudge:
        """UserError where ``yes`` and ``no`` end alike."""

        def encode(text: str) -> list[int]:
            return list(tokenizer(text, add_special_tokens=False).input_ids)

        if encode(yes)[-1] == encode(no)[-1]:
            raise UserError(f"judge.yes {yes!r} and judge.no {no!r} end with the same token; choose words that don't")
        return cls(model, encode(question), encode(yes)[-1], encode(no)[-1], eos_id(tokenizer), max_check, at_random)

    @property
    def name(self) -> str:
        return "verdicts by lot beside its checks" if self.at_random else f"a check of up to {self.max_check} tokens, then yes or no"

    def _asked(self, answers: Sequence[Answer]) -> list[list[int]]:
        if self.tokenizer is None:
            return [answer.ids + self.question for answer in answers]
        texts = [answer.prompt + answer.response for answer in answers]
        return [list(ids) + self.question for ids in self.tokenizer(texts, add_special_tokens=False).input_ids]

    def worst(self, length_B: Tensor) -> Usage:
        return Usage((length_B * self.growth).ceil().long() + len(self.question), torch.full((len(length_B),), self.max_check))

    def most(self, answers: Sequence[Answer]) -> Usage:
        return Usage(_lengths(self._asked(answers)), torch.full((len(answers),), self.max_check))

    def __call__(self, answers: Sequence[Answer]) -> Judgement:
        """The probability of "yes" where "yes" or "no" was written, and 0.5 where neither was."""
        asked = self._asked(answers)
        checks = sample(self.model, Prompts(asked, [""] * len(asked)), max_response=self.max_check, eos=self.eos, generator=None)
        verdict_B, unreadable_B = torch.full((len(asked),), 0.5), torch.ones(len(asked), dtype=torch.bool)
        for row in range(len(asked)):
            place = int(checks.length_B[row]) - 1 - int(checks.finished_B[row])
            token, probability = int(checks.ids_BT[row, place]), float(checks.logprob_BT[row, place].exp())
            if place >= checks.prompt_B[row] and token in (self.yes, self.no):
                verdict_B[row], unreadable_B[row] = probability if token == self.yes else 1 - probability, False
        if self.at_random:
            verdict_B = torch.tensor([random.Random(str(ids)).random() for ids in asked])
        return Judgement(verdict_B, Usage(checks.prompt_B, checks.length_B - checks.prompt_B), unreadable_B)

    def swapped(self) -> None:
        """The question names no options that could change places."""


@dataclass(frozen=True)
class ReadJudge(LocalJudge):
    """``template`` with {prompt}, {response} and {options} is one chat message, or bare text where there is no chat template.

    What does not fit into ``context`` tokens is not asked, and so unreadable. UserError where a word has no spelling of one token.
    """

    tokenizer: PreTrainedTokenizerBase
    template: str
    options: Options
    other: Options  # the same, said in the other order
    growth: float = 1.0  # tokens of its own for one of the student's, at most

    def __post_init__(self) -> None:
        tokens = self._tokens()
        bare = [word for word, ids in zip(self.options.words, tokens, strict=True) if not ids]
        if bare or len({token for ids in tokens for token in ids}) < sum(map(len, tokens)):
            said = f"no spelling of {bare[0]!r} is one token" if bare else "two of the judge's words are one token"
            raise UserError(f"judge: {said} in this vocabulary; choose another model, or judge.by: check")

    def _tokens(self) -> list[list[int]]:
        """Tokens that spell each word, whole."""
        found = []
        for word in self.options.words:
            encoded = [self.tokenizer(text, add_special_tokens=False).input_ids for text in sorted(self.options.spellings(word))]
            found.append(sorted({ids[0] for ids in encoded if len(ids) == 1 and ids[0] != self.tokenizer.unk_token_id}))
        return found

    @property
    def name(self) -> str:
        return f"the next token after a question, {self.options.said}"

    def _asked(self, answers: Sequence[Answer]) -> list[list[int]]:
        """The tokens of each question; none where they do not fit."""
        texts = [self.template.format(prompt=of.prompt, response=of.response, options=self.options.said) for of in answers]
        if self.tokenizer.chat_template is None:
            texts = [text + BARE for text in texts]
        else:
            texts = [chat_text(self.tokenizer, text) for text in texts]
        encoded = self.tokenizer(texts, add_special_tokens=False).input_ids if texts else []
        return [list(ids) if len(ids) <= self.context else [] for ids in encoded]

    def worst(self, length_B: Tensor) -> Usage:
        (frame,) = self._asked([Answer([])])
        return Usage((length_B * self.growth).ceil().long() + len(frame), torch.ones(len(length_B), dtype=torch.long))

    def most(self, answers: Sequence[Answer]) -> Usage:
        read_B = _lengths(self._asked(answers))
        return Usage(read_B, (read_B > 0).long())

    @torch.no_grad()
    def __call__(self, answers: Sequence[Answer]) -> Judgement:
        asked = self._asked(answers)
        verdict_B, mass_B = torch.full((len(asked),), 0.5), torch.zeros(len(asked))
        value_O = torch.tensor(self.options.values)
        waiting = sorted((row for row in range(len(asked)) if asked[row]), key=lambda row: -len(asked[row]))
        while waiting:
            size = max(1, MICRO_TOKENS // len(asked[waiting[0]]))
            rows, waiting = waiting[:size], waiting[size:]
            log_prob_BV = self._next([asked[row] for row in rows])
            option_BO = torch.stack([log_prob_BV[:, ids].logsumexp(-1) for ids in self._tokens()], -1).cpu()
            verdict_B[rows], mass_B[rows] = option_BO.softmax(-1) @ value_O, option_BO.exp().sum(-1)
        read_B = _lengths(asked)
        return Judgement(verdict_B.clamp(0, 1), Usage(read_B, (read_B > 0).long()), mass_B < READABLE)

    def _next(self, asked: list[list[int]]) -> Tensor:
        """Log-probabilities (B, V) of what follows each; padding is on the right, where causal attention never looks."""
        ids_BT = torch.nn.utils.rnn.pad_sequence([torch.tensor(ids) for ids in asked], batch_first=True).to(self.model.device)
        hidden_BTD = self.model.base_model(input_ids=ids_BT, use_cache=False).last_hidden_state
        last_BD = hidden_BTD[torch.arange(len(asked)), _lengths(asked) - 1]
        return torch.log_softmax(output_head(self.model)(last_BD).float(), -1)

    def swapped(self) -> ReadJudge | None:
        if "{options}" not in self.template:
            return None
        return replace(self, options=self.other, other=self.options)


def _lengths(asked: list[list[int]]) -> Tensor:
    return torch.tensor([len(ids) for ids in asked], dtype=torch.long)
