"""Sampling token ids from a model: rows of a batch end, and prompts that wait take their places.

    rollouts = sample(model, prompts, max_response=88, eos=1, generator=torch.Generator().manual_seed(0))

The full distribution is sampled (no top-p or top-k), at temperature 1 wherever something trains on it: the losses assume that.

Shapes: B sequences, R rows decoded together, P prompt tokens, T tokens, V vocabulary.
"""

from __future__ import annotations

from collections import deque
from typing import Protocol

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedModel

from opd_bench.decoder import decoder_of
from opd_bench.sequences import Prompts, Sequences


class Sampler(Protocol):
    """Who writes rollouts with the weights that ``model`` has at the call: `sample` below, or vLLM (`vllm_sampler.py`)."""

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


ROWS = 256  # sequences decoded together
REFILL = 0.8  # ended rows are replaced, or dropped where no prompt waits, once fewer than this share of them is alive


@torch.inference_mode()
def sample(
    model: PreTrainedModel,
    prompts: Prompts,
    *,
    max_response: int,
    eos: int,
    generator: torch.Generator | None,
    group: int = 1,
    temperature: float = 1.0,
) -> Sequences:
    """``group`` responses to every prompt; greedy where ``generator`` is None.

    A response ends with EOS or is cut, without EOS, after ``max_response`` tokens.
    """
    ids, device = prompts.repeat(group).ids, model.device
    prompt_B = torch.tensor([len(row) for row in ids])
    waiting = deque(prompt_B.argsort(descending=True, stable=True).tolist())  # long ones first: they tend to have long answers
    rows, nobody = min(ROWS, len(ids)), len(ids)  # a slot whose sequence has ended writes to a row that nobody reads
    decoder = decoder_of(model, rows, int(prompt_B.max()) + max_response)
    response_BT = torch.full((nobody + 1, max_response), eos, device=device)
    logprob_BT = torch.zeros(nobody + 1, max_response, device=device)
    written_B = torch.zeros(nobody + 1, dtype=torch.long, device=device)
    row_R, token_R, position_R = torch.full((rows,), nobody, device=device), *torch.zeros(2, rows, dtype=torch.long, device=device)
    alive = 0
    while alive or waiting:
        if alive and alive >= REFILL * len(row_R):
            slot_R, logits_RV = torch.arange(len(row_R), device=device), decoder.step(token_R, position_R)
        elif waiting:
            slot_R = (row_R == nobody).nonzero()[: len(waiting), 0]
            row_R[slot_R] = torch.tensor([waiting.popleft() for _ in slot_R], device=device)
            prompts_RP = pad_sequence([torch.tensor(ids[row]) for row in row_R[slot_R].tolist()], batch_first=True, padding_value=eos)
            taken_R = prompt_B[row_R[slot_R].cpu()].to(device)
            logits_RV = decoder.prefill(prompts_RP.to(device), taken_R, slot_R)
            position_R[slot_R] = taken_R - 1
        else:
            source_R, target_R = (row_R[alive:] < nobody).nonzero()[:, 0] + alive, (row_R[:alive] == nobody).nonzero()[:, 0]
            decoder.move(source_R, target_R)
            for state_R in (row_R, token_R, position_R):
                state_R[target_R] = state_R[source_R]
            row_R, token_R, position_R = row_R[:alive], token_R[:alive], position_R[:alive]
            continue
        drawn_R, chance_R = draw(logits_RV, generator, temperature)
        at_R = row_R[slot_R]
        response_BT[at_R, written_B[at_R]], logprob_BT[at_R, written_B[at_R]] = drawn_R, chance_R
        written_B[at_R] += 1
        ended_R = (drawn_R == eos) | (written_B[at_R] == max_response) | (at_R == nobody)
        written_B[nobody] = 0
        token_R[slot_R], position_R[slot_R] = drawn_R, position_R[slot_R] + 1
        row_R[slot_R[ended_R]] = nobody
        position_R[slot_R[ended_R]] = 0
        alive = int((row_R < nobody).sum())
    return _right_padded(ids, prompt_B, response_BT.cpu(), logprob_BT.cpu(), written_B.cpu(), eos, group)


def draw(logits_RV: Tensor, generator: torch.Generator | None, temperature: float) -> tuple[Tensor, Tensor]:
    """A token for each row and its log-probability (nats); the most probable token where ``generator`` is None."""
    logprob_RV = torch.log_softmax(logits_RV.float() / temperature, -1)
    if generator is None:
        token_R = logprob_RV.argmax(-1)
    else:  # one random number a row, looked up among the cumulated probabilities; one per token would cost more than a small model
        cumulated_RV = logprob_RV.double().exp().cumsum(-1)
        uniform_R1 = torch.rand(len(logits_RV), 1, generator=generator, dtype=torch.float64).to(logits_RV.device)
        token_R = torch.searchsorted(cumulated_RV, uniform_R1 * cumulated_RV[:, -1:], right=True)[:, 0].clamp(max=logits_RV.shape[1] - 1)
    return token_R, logprob_RV.gather(1, token_R[:, None])[:, 0]


def _right_padded(ids, prompt_B, response_BT, logprob_BT, written_B, eos: int, group: int) -> Sequences:
    length_B = prompt_B + written_B[:-1]
    ids_BT = torch.zeros(len(ids), int(length_B.max()), dtype=torch.long)
    padded_BT = torch.zeros(ids_BT.shape)
    for row, prompt in enumerate(ids):
        start, end = len(prompt), int(length_B[row])
        ids_BT[row, :start] = torch.tensor(prompt)
        ids_BT[row, start:end] = response_BT[row, : end - start]
        padded_BT[row, start:end] = logprob_BT[row, : end - start]
    return Sequences(ids_BT, prompt_B, length_B, ids_BT.gather(1, length_B[:, None] - 1)[:, 0] == eos, padded_BT, group)
