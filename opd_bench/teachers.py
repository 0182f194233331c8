"""One teacher, or several specialists of one shape, each for the prompts of its own tasks: who writes, who scores.

    teachers = Teachers(model)                                      # one for all
    teachers = Teachers(stem, {"coding_task": coder}, prompts)      # the coder for one task, by the tokens of its prompts
    teachers.write(prompts, max_response=96, eos=1, generator=g)    # each prompt's own teacher writes
    teachers(sequences)[0:100]                                      # and scores

So specialists of one base are distilled into one student (DeepSeek-V3.2, 2025, arXiv 2512.02556). They have one shape, so what a token
costs does not depend on whose it is.

Shapes: B sequences, N response tokens, E events.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from transformers import PreTrainedModel

from opd_bench.rollouts import sample
from opd_bench.scoring import ModelTeacher, Scores
from opd_bench.sequences import Prompts, Sequences, concatenate


@dataclass(frozen=True)
class Teachers:
    """``routed``: other teachers than ``default``, by task (or source of prompts); ``tasks`` by the tokens of a prompt."""

    default: PreTrainedModel
    routed: Mapping[str, PreTrainedModel] = field(default_factory=dict)
    tasks: Mapping[tuple[int, ...], str] = field(default_factory=dict, repr=False)

    def of(self, task: str) -> PreTrainedModel:
        return self.routed.get(task, self.default)

    def groups(self, tasks: Sequence[str]) -> list[tuple[PreTrainedModel, list[int]]]:
        """Each teacher that has some of ``tasks``, and the places of those."""
        found: dict[int, tuple[PreTrainedModel, list[int]]] = {}
        for place, task in enumerate(tasks):
            model = self.of(task)
            found.setdefault(id(model), (model, []))[1].append(place)
        return list(found.values())

    def write(self, prompts: Prompts, *, max_response: int, eos: int, generator: torch.Generator) -> Sequences:
        """A response to every prompt, at temperature 1, by the teacher of its task."""
        parts, places = [], []
        for model, rows in self.groups(prompts.tasks):
            own = Prompts([prompts.ids[row] for row in rows], [prompts.tasks[row] for row in rows])
            parts.append(sample(model, own, max_response=max_response, eos=eos, generator=generator))
            places += rows
        return concatenate(parts)[torch.tensor(places).argsort()]

    def __call__(self, sequences: Sequences) -> Scores:
        """The distributions of each row's own teacher."""
        if not self.routed:
            return ModelTeacher(self.default)(sequences)
        length_B = sequences.length_B - sequences.prompt_B
        place_N = torch.arange(int(length_B.sum())).split(length_B.tolist())
        groups = self.groups([self.tasks.get(tuple(sequences.prompt(row)), "") for row in range(len(sequences))])
        return _Routed([(torch.cat([place_N[row] for row in rows]), ModelTeacher(model)(sequences[rows])) for model, rows in groups])


@dataclass(frozen=True)
class _Routed:
    parts: list[tuple[Tensor, Scores]]  # positions among the N, in order, and what their teacher says of them

    def __getitem__(self, positions: slice) -> tuple[Tensor, None]:
        found = []
        for place_M, scores in self.parts:
            first, end = torch.searchsorted(place_M, torch.tensor([positions.start, positions.stop])).tolist()
            if first < end:
                found.append((place_M[first:end] - positions.start, scores[first:end][0]))
        log_probs_ME = torch.cat([values_ME for _, values_ME in found])
        return log_probs_ME[torch.cat([place_M for place_M, _ in found]).argsort().to(log_probs_ME.device)], None
