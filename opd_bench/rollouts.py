"""Sampling token ids from a model: rows of a batch end, and prompts that wait take their places.

    rollouts = sample(model, prompts, max_response=88, eos=1, generator=torch.Generator().manual_seed(0))

The full distribution is sampled (no top-p or top-k), at temperature 1 wherever something trains on it: the losses assume that.

Shapes: B sequences, R rows decoded together (each in a slot), S steps, P prompt tokens, T tokens, V vocabulary.
"""

from __future__ import annotations

import copy
from collections import deque
from typing import Protocol

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedModel

from opd_bench import clock
from opd_bench.decoder import decoder_of
from opd_bench.privilege import privilege_of
from opd_bench.sequences import Prompts, Sequences


class Sampler(Protocol):
    """Who writes rollouts with the weights that ``model`` has at the call: `sample` below, or vLLM, in this process or behind a server."""

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
    ) -> Sequences: ...


ROWS = 96  # sequences decoded together; more make the cache too large for a processor's own
REFILL = 0.8  # ended rows are replaced, or dropped where no prompt waits, once fewer than this share of them is alive


def sample(
    model: PreTrainedModel,
    prompts: Prompts,
    *,
    max_response: int,
    eos: int,
    generator: torch.Generator | None,
    group: int = 1,
    temperature: float = 1.0,
    dtype: torch.dtype | None = None,
) -> Sequences:
    """``group`` responses to every prompt; greedy where ``generator`` is None.

    A response ends with EOS or is cut, without EOS, after ``max_response`` tokens. With a ``dtype`` that is not the model's, a copy of it
    writes, which is faster where the processor multiplies such numbers faster. A privileged model is shown prompts of its own.
    """
    privilege = privilege_of(model)
    ids = (privilege.prompts(prompts) if privilege else prompts).repeat(group).ids
    answers = _Answers(len(ids), max_response, eos)  # made here: what is made in inference mode cannot be trained on
    with clock.part("decode"):  # all but what is another part
        _write(model, ids, answers, generator, temperature, dtype or model.dtype)
        written = answers.after(ids, group)
    return privilege.plain(written, prompts) if privilege else written


def converted(model: PreTrainedModel, dtype: torch.dtype) -> PreTrainedModel:
    """A copy of ``model`` with weights of ``dtype``."""
    weights = {id(weight): torch.nn.Parameter(weight.detach().to(dtype), requires_grad=False) for weight in model.parameters()}
    return copy.deepcopy(model, weights)  # which takes these for the copies of the old ones


@torch.inference_mode()
def _write(
    model: PreTrainedModel,
    ids: list[list[int]],
    answers: _Answers,
    generator: torch.Generator | None,
    temperature: float,
    dtype: torch.dtype,
) -> None:
    """Answer every prompt."""
    device, eos, max_response = model.device, answers.eos, answers.ids_BT.shape[1]
    waiting = deque(sorted(range(len(ids)), key=lambda row: -len(ids[row])))  # long prompts first: they tend to have long answers
    capacity = max(map(len, ids)) + max_response
    owners: list[int | None] = [None] * min(ROWS, len(ids))  # the row whose sequence is in a slot
    with clock.part("weight sync"):
        decoder = decoder_of(model if dtype == model.dtype else converted(model, dtype), len(owners), capacity)
    token_R, position_R = torch.zeros(2, len(owners), dtype=torch.long, device=device)
    while waiting or any(row is not None for row in owners):
        free = [slot for slot, row in enumerate(owners) if row is None]
        if free and waiting:
            taken = [waiting.popleft() for _ in free[: len(waiting)]]
            prompts_RP = pad_sequence([torch.tensor(ids[row]) for row in taken], batch_first=True).to(device)
            length_R, slot_R = (torch.tensor(numbers, device=device) for numbers in ([len(ids[row]) for row in taken], free[: len(taken)]))
            with clock.part("prefill"):
                drawn_R, chance_R = draw(decoder.prefill(prompts_RP, length_R, slot_R), generator, temperature)
            answers.add(taken, drawn_R[None], chance_R[None])
            token_R[slot_R], position_R[slot_R] = drawn_R, length_R
            for slot, row in zip(free, taken, strict=False):
                owners[slot] = None if answers.ended(row) else row
            continue
        if free:
            alive = len(owners) - len(free)
            holes, beyond = (
                [slot for slot in free if slot < alive],
                [slot for slot in range(alive, len(owners)) if owners[slot] is not None],
            )
            decoder.move(beyond, holes)
            token_R[holes], position_R[holes] = token_R[beyond], position_R[beyond]
            for hole, slot in zip(holes, beyond, strict=True):
                owners[hole] = owners[slot]
            owners, token_R, position_R = owners[:alive], token_R[:alive], position_R[:alive]
        rows = [row for row in owners if row is not None]  # all of them
        room_R = torch.tensor([max_response - answers.written[row] for row in rows], device=device)
        ended_R, steps = torch.zeros(len(owners), dtype=torch.bool, device=device), []
        while not steps or 0 < (alive := len(owners) - int(ended_R.sum())) >= REFILL * len(owners):
            token_R, chance_R = draw(decoder.step(token_R, position_R), generator, temperature)
            steps.append((token_R, chance_R))
            position_R = (position_R + 1).clamp_(max=capacity - 1)  # ended rows stay where there is room
            ended_R |= (token_R == eos) | (room_R <= len(steps))
        answers.add(rows, *(torch.stack(of) for of in zip(*steps, strict=True)))
        owners = [None if answers.ended(row) else row for row in rows]


def draw(logits_RV: Tensor, generator: torch.Generator | None, temperature: float) -> tuple[Tensor, Tensor]:
    """A token for each row and its log-probability (nats); the most probable token where ``generator`` is None."""
    logits_RV = logits_RV.float()
    logprob_RV = torch.log_softmax(logits_RV if temperature == 1 else logits_RV / temperature, -1)
    if generator is None:
        token_R = logprob_RV.argmax(-1)
    else:  # one random number a row, looked up among the cumulated probabilities; one per token would cost more than a small model
        cumulated_RV = logprob_RV.double().exp().cumsum(-1)
        uniform_R1 = torch.rand(len(logits_RV), 1, generator=generator, dtype=torch.float64).to(logits_RV.device)
        token_R = torch.searchsorted(cumulated_RV, uniform_R1 * cumulated_RV[:, -1:], right=True)[:, 0].clamp(max=logits_RV.shape[1] - 1)
    return token_R, logprob_RV.gather(1, token_R[:, None])[:, 0]


class _Answers:
    """What has been written so far."""

    def __init__(self, count: int, max_response: int, eos: int) -> None:
        self.ids_BT, self.logprob_BT = torch.zeros(count, max_response, dtype=torch.long), torch.zeros(count, max_response)
        self.written, self.finished, self.eos = [0] * count, [False] * count, eos

    def ended(self, row: int) -> bool:
        return self.finished[row] or self.written[row] == self.ids_BT.shape[1]

    def add(self, rows: list[int], ids_SR: Tensor, logprob_SR: Tensor) -> None:
        """S more tokens for each of ``rows``, as far as its EOS or the limit."""
        ids_SR, logprob_SR = ids_SR.cpu(), logprob_SR.cpu()
        eos_SR = ids_SR == self.eos
        first_R = torch.where(eos_SR.any(0), eos_SR.int().argmax(0) + 1, len(ids_SR)).tolist()
        for slot, (row, first) in enumerate(zip(rows, first_R, strict=True)):
            start = self.written[row]
            count = min(first, self.ids_BT.shape[1] - start)
            self.ids_BT[row, start : start + count] = ids_SR[:count, slot]
            self.logprob_BT[row, start : start + count] = logprob_SR[:count, slot]
            self.written[row], self.finished[row] = start + count, bool(eos_SR[count - 1, slot])

    def after(self, prompts: list[list[int]], group: int) -> Sequences:
        """Each after its prompt, padded on the right."""
        prompt_B = torch.tensor([len(ids) for ids in prompts])
        length_B = prompt_B + torch.tensor(self.written)
        ids_BT = torch.zeros(len(prompts), int(length_B.max()), dtype=torch.long)
        logprob_BT = torch.zeros(ids_BT.shape)
        for row, (ids, written) in enumerate(zip(prompts, self.written, strict=True)):
            end = len(ids) + written
            ids_BT[row, : len(ids)] = torch.tensor(ids)
            ids_BT[row, len(ids) : end], logprob_BT[row, len(ids) : end] = self.ids_BT[row, :written], self.logprob_BT[row, :written]
        return Sequences(ids_BT, prompt_B, length_B, torch.tensor(self.finished), logprob_BT, group)
