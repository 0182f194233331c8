"""What a step may cost before it begins: the method's own step on a bench whose engine only counts.

Every response comes out at the length limit and every prompt at the longest length of the stream, so the sum is an
upper bound for a method whose verbs do not depend on what the sequences say; for any other the bench's own reserve
still holds.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from opd_bench.bench import Bench, Judgement, Updated, Usage
from opd_bench.errors import UserError
from opd_bench.flops import FlopCount
from opd_bench.judge import Judge
from opd_bench.ledger import Axis, Ledger, OverBudgetError
from opd_bench.losses import Loss
from opd_bench.methods import Method, take_step
from opd_bench.sequences import Mix, Prompts, Sequences

FLOPS = Axis()


@dataclass(frozen=True)
class Counter:
    """An engine without models: sequences as long as they can get, nothing trained.

    The judge is the teacher, which reads ``question_tokens`` more and writes ``max_check``, unless there is another.
    """

    max_prompt: int
    max_response: int
    max_check: int
    question_tokens: int
    student_flops: FlopCount
    teacher_flops: FlopCount
    most_extra: int = 0  # tokens that a privileged teacher reads beyond a prompt
    judge_model: Judge | None = None

    @property
    def judge_kind(self) -> str:
        return self.judge_model.kind if self.judge_model else "judge"

    @property
    def judge_flops(self) -> FlopCount:
        return self.judge_model.flops if self.judge_model else self.teacher_flops

    def enter(self, mix: Mix) -> None:
        """Prompts are as long as they get in any stream."""

    def prompts(self, start: int, count: int) -> Prompts:
        return Prompts([[0] * self.max_prompt] * count, [""] * count)

    def _longest(self, prompt_B: torch.Tensor, response: int, group: int = 1) -> Sequences:
        prompt_B = prompt_B.repeat_interleave(group)
        length_B = prompt_B + response
        shape = (len(prompt_B), int(length_B.max()))
        cut_B = torch.zeros(len(prompt_B), dtype=torch.bool)
        return Sequences(torch.zeros(shape, dtype=torch.long), prompt_B, length_B, cut_B, torch.zeros(shape), group)

    def teacher_text(self, rows: Sequence[int]) -> tuple[Sequences, float]:
        return self._longest(torch.full((len(rows),), self.max_prompt), self.max_response), 0.0

    def sample(self, prompts: Prompts, group: int) -> Sequences:
        return self._longest(prompts.lengths_B, self.max_response, group)

    def judge_most(self, sequences: Sequences) -> Usage:
        if self.judge_model:
            return self.judge_model.worst(sequences.length_B)
        return Usage(sequences.length_B + self.question_tokens, torch.full((len(sequences),), self.max_check))

    def judge(self, sequences: Sequences) -> Judgement:
        unknown = torch.full((len(sequences),), 0.5)
        return Judgement(unknown, self.judge_most(sequences), unknown < 0)

    def extra_B(self, of: Prompts | Sequences) -> torch.Tensor:
        return torch.full((len(of),), self.most_extra)

    def fork(self) -> Counter:
        return self

    def update(self, sequences: Sequences, loss: Loss, *, teacher: bool, weights_B: torch.Tensor | None, lr_scale: float) -> Updated:
        return Updated(0.0, 0.0, 0.0)


def worst_case(method: Method, batch: int, counter: Counter, limit: float | None = None, axis: Axis = FLOPS) -> Ledger:
    """The ledger of one step of ``batch`` sequences at its longest; the method itself is left as it was.

    Raises OverBudgetError where that passes ``limit``, so that a step which goes on until its budget is spent ends here too.
    """
    ledger = Ledger(limit, axis.traced())
    bench = Bench(counter, ledger, counter.student_flops, counter.teacher_flops, batch)
    take_step(copy.deepcopy(method), bench)
    if ledger.refused:  # and the method went on regardless
        raise OverBudgetError(f"a step of {batch} sequences may cost more than {limit:.3e} {axis.unit}")
    return ledger


def full_batch(method: Method) -> int:
    """The method's batch, cut to a multiple of its unit. UserError if not one unit fits in."""
    batch = method.config.batch // method.unit * method.unit
    if batch == 0:
        raise UserError(f"{type(method).__name__}: batch: {method.config.batch} is less than one group of {method.unit}; raise it")
    return batch


def largest_batch(method: Method, counter: Counter, left: float, axis: Axis = FLOPS) -> int:
    """The most sequences, a multiple of the method's unit and at most its batch, whose worst case fits ``left``; 0 if none."""

    def fits(units: int) -> bool:
        try:
            worst_case(method, units * method.unit, counter, left, axis)
        except OverBudgetError:
            return False
        return True

    low, high = 0, full_batch(method) // method.unit
    if fits(high):
        return full_batch(method)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low * method.unit
