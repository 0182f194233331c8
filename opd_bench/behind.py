"""Rollouts a round late: those of a round are written with the weights that the student had when the round before was handed out.

    sampler = Behind(sample, overlap=True)
    rollouts = sampler(student, prompts, max_response=88, eos=1, generator=generator)
    sampler.go_on(student, next_prompts)      # on a GPU, written while the student trains on ``rollouts``

What is written does not depend on ``overlap`` nor on whether the next prompts were foreseen: without either it is written when it is asked
for, with the weights kept for it.
"""

from __future__ import annotations

import copy
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedModel

from opd_bench.rollouts import Sampler
from opd_bench.sequences import Prompts, Sequences

WRITER = ThreadPoolExecutor(1, "rollouts")  # one for all, as a sampler that arms share writes for one at a time


@dataclass(frozen=True)
class _Ahead:
    """Rollouts that are being written, for what is expected to be asked."""

    asked: dict[str, Any]
    generator: torch.Generator | None
    rollouts: Future[Sequences]


class Behind:
    """A sampler of one student, a round behind it."""

    def __init__(self, sampler: Sampler, overlap: bool) -> None:
        self.sampler, self.overlap = sampler, overlap
        self.older: PreTrainedModel | None = None  # the student as it was when the last round was handed out
        self.ahead: _Ahead | None = None

    def __call__(
        self,
        model: PreTrainedModel,
        prompts: Prompts,
        *,
        max_response: int,
        eos: int,
        generator: torch.Generator | None,
        group: int = 1,
        temperature: float = 1.0,
    ) -> Sequences:
        """``group`` responses to every prompt; those of the first round are by ``model`` as it is."""
        asked = {"prompts": prompts, "max_response": max_response, "eos": eos, "group": group, "temperature": temperature}
        self.asked, self.generator = asked, generator
        ahead, self.ahead = self.ahead, None
        if ahead and wait([ahead.rollouts]) and ahead.asked == asked:
            if generator and ahead.generator:
                generator.set_state(ahead.generator.get_state())
            return ahead.rollouts.result()
        if self.overlap:
            return self._begin(self.older or model, asked, generator).result()
        return self.sampler(self.older or model, **asked, generator=generator)

    def go_on(self, model: PreTrainedModel, prompts: Prompts) -> None:
        """Keep the weights of ``model`` for the next round, which is expected to be asked for ``prompts`` and for nothing else new."""
        if self.older is None:
            self.older = copy.deepcopy(model)
        with torch.no_grad():
            for kept, weight in zip(self.older.parameters(), model.parameters(), strict=True):
                kept.copy_(weight)
        if self.overlap:
            asked, generator = {**self.asked, "prompts": prompts}, _copy(self.generator)
            self.ahead = _Ahead(asked, generator, self._begin(self.older, asked, generator))

    def fork(self) -> Behind:
        """Another one, for a copy of the student; what is being written stays with this one."""
        other = Behind(self.sampler, self.overlap)
        if self.ahead:
            wait([self.ahead.rollouts])
        other.older = copy.deepcopy(self.older)
        return other

    def _begin(self, model: PreTrainedModel, asked: dict[str, Any], generator: torch.Generator | None) -> Future[Sequences]:
        on_gpu = model.device.type == "cuda"
        stream = torch.cuda.Stream(model.device) if on_gpu else None
        if stream:
            stream.wait_stream(torch.cuda.current_stream(model.device))

        def write() -> Sequences:
            with torch.cuda.stream(stream) if stream else nullcontext():
                return self.sampler(model, **asked, generator=generator)

        return WRITER.submit(write)


def _copy(generator: torch.Generator | None) -> torch.Generator | None:
    return generator and torch.Generator(generator.device).set_state(generator.get_state())
