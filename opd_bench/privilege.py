"""A privileged teacher: wherever it writes or scores, the model is shown more than the student is, such as a worked solution.

    grant(teacher, Privilege({(5, 6, 7): [5, 6, 8, 9, 7]}))   # prompt ids: what the teacher is shown in their place
    sample(teacher, prompts, ...)          # written after the longer prompts, handed out after the plain ones
    response_hidden(teacher, sequences)    # of the same responses, after the longer prompts

So a model can teach itself: on-policy self-distillation (Zhao et al. 2026, arXiv 2601.18734), self-distillation fine-tuning (Shenfeld
et al. 2026, arXiv 2601.19897). A prompt that is not known is left as it is. Whether what such a teacher does can be taught is for a gate
to say (`gates.py`): shown a bare answer, it states it.

Shapes: B sequences, T tokens.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedModel

from opd_bench.errors import UserError
from opd_bench.sequences import Prompts, Sequences


@dataclass(frozen=True)
class Privilege:
    """``shown`` by prompt. A text that goes on from a prompt, such as a piece of a response to it, is known by its beginning."""

    shown: Mapping[tuple[int, ...], list[int]]
    lengths: list[int] = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "lengths", sorted({len(ids) for ids in self.shown}, reverse=True))

    def ids(self, plain: Sequence[int]) -> list[int]:
        """What the teacher is shown in the place of ``plain``."""
        known = next((length for length in self.lengths if tuple(plain[:length]) in self.shown), 0)
        return [*self.shown[tuple(plain[:known])], *plain[known:]] if known else list(plain)

    def prompts(self, plain: Prompts) -> Prompts:
        return Prompts(list(map(self.ids, plain.ids)), plain.tasks)

    def sequences(self, plain: Sequences) -> Sequences:
        """The same responses after what the teacher is shown."""
        return self._after([self.ids(ids) for ids in _prompts(plain)], plain)

    def plain(self, written: Sequences, prompts: Prompts) -> Sequences:
        """What the teacher wrote, after the prompts as the student knows them."""
        return self._after([ids for ids in prompts.ids for _ in range(written.group)], written)

    def extra_B(self, of: Prompts | Sequences) -> torch.Tensor:
        """Tokens that the teacher is shown beyond each prompt."""
        return torch.tensor([len(self.ids(ids)) - len(ids) for ids in (of.ids if isinstance(of, Prompts) else _prompts(of))])

    @property
    def most_extra(self) -> int:
        return max((len(ids) - len(plain) for plain, ids in self.shown.items()), default=0)

    @staticmethod
    def _after(prompts: list[list[int]], of: Sequences) -> Sequences:
        responses = [slice(int(start), int(end)) for start, end in zip(of.prompt_B, of.length_B, strict=True)]
        rows = [
            torch.cat([torch.tensor(ids), of.ids_BT[row, part]]) for row, (ids, part) in enumerate(zip(prompts, responses, strict=True))
        ]
        chances = [
            torch.cat([torch.zeros(len(ids)), of.logprob_BT[row, part]])
            for row, (ids, part) in enumerate(zip(prompts, responses, strict=True))
        ]
        prompt_B = torch.tensor([len(ids) for ids in prompts])
        return replace(
            of,
            ids_BT=pad_sequence(rows, batch_first=True),
            logprob_BT=pad_sequence(chances, batch_first=True),
            prompt_B=prompt_B,
            length_B=prompt_B + of.length_B - of.prompt_B,
        )


def grant(model: PreTrainedModel, privilege: Privilege) -> None:
    """From now on ``model`` is shown its own prompts."""
    model.__dict__["privilege"] = privilege


def privilege_of(model: PreTrainedModel) -> Privilege | None:
    return model.__dict__.get("privilege")


def told(template: str, prompt: str, doc: Mapping[str, Any]) -> str:
    """``template`` with the prompt and the document's columns filled in. UserError for a column that the document lacks."""
    try:
        return template.format(**{**doc, "prompt": prompt})
    except (KeyError, IndexError, ValueError) as error:
        raise UserError(f"privileged: {{{error.args[0]}}} is no column of the training documents; they have {', '.join(doc)}") from None


def _prompts(of: Sequences) -> Iterable[list[int]]:
    return map(of.prompt, range(len(of)))
