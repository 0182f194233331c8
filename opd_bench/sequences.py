"""Token sequences as the bench hands them out: a prompt and a response each, padded on the right.

Shapes: B sequences, T tokens of the longest (prompt + response). Tensors live on the CPU; the engine moves them.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from opd_bench.errors import RunError

Mix = tuple[tuple[str, float], ...]  # sources of prompts with their weights; (): all of them, as they are


@dataclass(frozen=True)
class Prompts:
    """B tokenised prompts with the task each came from."""

    ids: list[list[int]]
    tasks: list[str]

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def lengths_B(self) -> torch.Tensor:
        return torch.tensor([len(ids) for ids in self.ids])

    def repeat(self, group: int) -> Prompts:
        """Every prompt ``group`` times in a row."""
        return Prompts([ids for ids in self.ids for _ in range(group)], [task for task in self.tasks for _ in range(group)])


@dataclass(frozen=True)
class Sequences:
    """B prompts with their responses.

    A response ends with EOS where ``finished_B``; otherwise the length limit cut it and no EOS was appended.
    ``logprob_BT`` holds the sampler's log-probability (nats) of each response token and 0 elsewhere.
    """

    ids_BT: torch.Tensor
    prompt_B: torch.Tensor  # tokens of the prompt
    length_B: torch.Tensor  # tokens of prompt + response
    finished_B: torch.Tensor
    logprob_BT: torch.Tensor
    group: int = 1  # consecutive rows that share a prompt
    updates: int | None = None  # that the student had had when it was handed these as its own; None: somebody else's text

    def __post_init__(self) -> None:
        fits_B = (self.prompt_B >= 1) & (self.prompt_B < self.length_B) & (self.length_B <= self.ids_BT.shape[1])
        if not fits_B.all():
            raise RunError("every sequence needs a prompt and a response, at least a token each, that lie within its ids")

    def __len__(self) -> int:
        return len(self.ids_BT)

    def __getitem__(self, rows: slice | torch.Tensor | list[int]) -> Sequences:
        """The chosen rows, cut to the longest among them."""
        length_B = self.length_B[rows]
        width = int(length_B.max()) if len(length_B) else 0
        return replace(
            self,
            ids_BT=self.ids_BT[rows][:, :width],
            prompt_B=self.prompt_B[rows],
            length_B=length_B,
            finished_B=self.finished_B[rows],
            logprob_BT=self.logprob_BT[rows][:, :width],
        )

    @property
    def response_BT(self) -> torch.Tensor:
        """True at response tokens, EOS included; decided by length, never by token id."""
        position_T = torch.arange(self.ids_BT.shape[1])
        return (position_T >= self.prompt_B[:, None]) & (position_T < self.length_B[:, None])

    @property
    def response_tokens(self) -> int:
        return int((self.length_B - self.prompt_B).sum())

    def prompt(self, row: int) -> list[int]:
        return self.ids_BT[row, : self.prompt_B[row]].tolist()

    def response(self, row: int) -> list[int]:
        return self.ids_BT[row, self.prompt_B[row] : self.length_B[row]].tolist()


def concatenate(parts: list[Sequences]) -> Sequences:
    """The rows of ``parts`` one after the other: whose text it is, and which rows share a prompt, only where all say the same."""
    width = max(part.ids_BT.shape[1] for part in parts)

    def widen(tensor: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.pad(tensor, (0, width - tensor.shape[1]))

    groups, updates = {part.group for part in parts}, {part.updates for part in parts}
    return replace(
        parts[0],
        group=parts[0].group if len(groups) == 1 else 1,
        updates=parts[0].updates if len(updates) == 1 else None,
        ids_BT=torch.cat([widen(part.ids_BT) for part in parts]),
        prompt_B=torch.cat([part.prompt_B for part in parts]),
        length_B=torch.cat([part.length_B for part in parts]),
        finished_B=torch.cat([part.finished_B for part in parts]),
        logprob_BT=torch.cat([widen(part.logprob_BT) for part in parts]),
    )
