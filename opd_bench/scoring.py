"""Next-token distributions at response tokens: hidden states first, the output head a few positions at a time, as V may be large.

    scores = ModelTeacher(teacher)(sequences)
    teacher_NE, top_NK = scores[0:100]        # of the first hundred response tokens, row after row

A teacher's distribution is dense, E = V log-probabilities and no ``top_NK``, or sparse: those of the K tokens ``top_NK`` and, last, of all
other tokens together, E = K + 1. The losses take either (`losses.py`).

Shapes: B sequences, T tokens, N response tokens, D width of the model, V vocabulary, K tokens that are told apart, E events.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor
from transformers import PreTrainedModel

from opd_bench.losses import events
from opd_bench.privilege import privilege_of
from opd_bench.sequences import Sequences

CHUNK_LOGITS = 2**22  # of one model that exist at once on a CPU: 16 MiB in float32, which an allocator keeps and hands out again
CHUNK_LOGITS_GPU = 2**27  # 512 MiB: every chunk reads the head and writes its gradient, which small ones would be all about
FOREIGN = 0.5  # nats; a gap between log-probabilities that no precision explains: other weights


class Scores(Protocol):
    """A teacher's distributions over the response tokens of some sequences."""

    def __getitem__(self, positions: slice) -> tuple[Tensor, Tensor | None]: ...


class Teacher(Protocol):
    def __call__(self, sequences: Sequences) -> Scores: ...


@dataclass(frozen=True)
class ModelTeacher:
    """The whole distribution, from a model in this process."""

    model: PreTrainedModel

    @torch.no_grad()  # not inference_mode: the losses save these tensors for their backward pass
    def __call__(self, sequences: Sequences) -> Scores:
        return _Dense(output_head(self.model), response_hidden(self.model, sequences))


@dataclass(frozen=True)
class _Dense:
    head: torch.nn.Linear
    hidden_ND: Tensor

    @torch.no_grad()
    def __getitem__(self, positions: slice) -> tuple[Tensor, None]:
        return torch.log_softmax(self.head(self.hidden_ND[positions]).float(), -1), None


@dataclass(frozen=True)
class Sparse:
    """Scores that are at hand: ``top_NK`` and, with one column more, ``log_probs_NE``."""

    log_probs_NE: Tensor
    top_NK: Tensor

    def __getitem__(self, positions: slice) -> tuple[Tensor, Tensor]:
        return self.log_probs_NE[positions], self.top_NK[positions]


def likeliest(log_probs_NV: Tensor, top: int) -> Sparse:
    """The ``top`` likeliest tokens of each distribution, and all others as one event."""
    top_NK = log_probs_NV.topk(top, -1).indices
    return Sparse(events(log_probs_NV, top_NK), top_NK)


@torch.no_grad()
def signal_error(teacher: Teacher, exact: ModelTeacher, sequences: Sequences) -> dict[str, float]:
    """What a sparse signal says against the model itself: the largest gap of a log-probability (nats), and the mean mass of "any other"."""
    (given_NE, top_NK), (exact_NV, _) = teacher(sequences)[:], exact(sequences)[:]
    assert top_NK is not None
    gap_NK = exact_NV.gather(-1, top_NK.to(exact_NV.device)) - given_NE[:, :-1].to(exact_NV.device)
    return {"largest_gap": gap_NK.abs().max().item(), "other_mass": given_NE[:, -1].exp().mean().item()}


def chunks(count: int, vocabulary: int, device: torch.device) -> Iterator[slice]:
    """``count`` positions in pieces whose logits are ``CHUNK_LOGITS`` at most, or on a GPU ``CHUNK_LOGITS_GPU``."""
    size = max(1, (CHUNK_LOGITS if device.type == "cpu" else CHUNK_LOGITS_GPU) // vocabulary)
    return (slice(at, min(at + size, count)) for at in range(0, count, size))


def micro_batches(sequences: Sequences, tokens: int) -> Iterator[Tensor]:
    """Row indices in groups of similar length that stay, padded, within ``tokens`` tokens."""
    order = sequences.length_B.argsort(descending=True)
    lengths = sequences.length_B[order].tolist()
    start = 0
    while start < len(order):
        count = max(1, tokens // lengths[start])
        yield order[start : start + count]
        start += count


def response_hidden(model: PreTrainedModel, sequences: Sequences) -> Tensor:
    """The last hidden state (N, D) that predicts each response token, rows one after the other.

    Padding is on the right, where causal attention never looks, so no mask is needed. A privileged model is shown its own prompts.
    """
    if privilege := privilege_of(model):
        sequences = privilege.sequences(sequences)
    ids_BT = sequences.ids_BT.to(model.device)
    hidden_BTD = model.base_model(input_ids=ids_BT, use_cache=False).last_hidden_state
    return hidden_BTD[:, :-1][sequences.response_BT[:, 1:].to(model.device)]


def output_head(model: PreTrainedModel) -> torch.nn.Linear:
    """The last linear map. It has ``out_features`` tokens; rows of its weight beyond them stand for none (`models.TokenHead`)."""
    head = model.get_output_embeddings()
    assert isinstance(head, torch.nn.Linear)
    return head
