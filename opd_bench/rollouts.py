"""Sampling token ids from a model: cached decoding in one process, rows leaving the batch as they end.

    rollouts = sample(model, prompts, max_response=88, eos=1, generator=torch.Generator().manual_seed(0))

The full distribution is sampled (no top-p or top-k), at temperature 1 wherever something trains on it: the losses assume that. Prompts are
padded on the left while decoding and given back padded on the right.

Shapes: B sequences, R rows still alive, P prompt tokens, T tokens, V vocabulary, H heads, Q head width.
"""

from __future__ import annotations

import inspect

import torch
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer

from opd_bench.sequences import Prompts, Sequences, concatenate

ROWS = 256  # sequences decoded together
COMPACT = 0.8  # rows are dropped once fewer than this share of them is alive


class PreallocatedLayer(DynamicLayer):
    """A key/value cache that writes in place instead of copying everything at every token."""

    def __init__(self, capacity: int) -> None:
        super().__init__()
        self.capacity, self.filled = capacity, 0

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        super().lazy_initialization(key_states, value_states)
        rows, heads, _, width = key_states.shape
        self.buffer_2RHTQ = key_states.new_empty(2, rows, heads, self.capacity, width)

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *args, **kwargs) -> tuple[torch.Tensor, torch.Tensor]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        end = self.filled + key_states.shape[-2]
        self.buffer_2RHTQ[0, :, :, self.filled : end] = key_states
        self.buffer_2RHTQ[1, :, :, self.filled : end] = value_states
        self.filled = end
        self.keys, self.values = self.buffer_2RHTQ[:, :, :, :end]
        return self.keys, self.values

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        self.buffer_2RHTQ = self.buffer_2RHTQ[:, indices]
        self.keys, self.values = self.buffer_2RHTQ[:, :, :, : self.filled]


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
    prompts = prompts.repeat(group)
    order = sorted(range(len(prompts)), key=lambda row: len(prompts.ids[row]))
    parts = [
        _decode(model, [prompts.ids[row] for row in order[start : start + ROWS]], max_response, eos, generator, temperature)
        for start in range(0, len(order), ROWS)
    ]
    rank_B = torch.empty(len(order), dtype=torch.long)
    rank_B[torch.tensor(order)] = torch.arange(len(order))
    rollouts = concatenate(parts)[rank_B]
    return Sequences(**{**vars(rollouts), "group": group})


@torch.inference_mode()
def _decode(
    model: PreTrainedModel, prompts: list[list[int]], max_response: int, eos: int, generator: torch.Generator | None, temperature: float
) -> Sequences:
    device, widest = model.device, max(map(len, prompts))
    layers: int = model.config.num_hidden_layers
    cache = DynamicCache()
    # transformers 5.24 renamed the argument
    cached = {"cache" if "cache" in inspect.signature(model.forward).parameters else "past_key_values": cache}
    cache.layers.extend(PreallocatedLayer(widest + max_response) for _ in range(layers))
    prompt_B = torch.tensor([len(ids) for ids in prompts])
    ids_BP = torch.tensor([[eos] * (widest - len(ids)) + ids for ids in prompts], device=device)
    real_RT = torch.arange(widest + max_response, device=device) >= (widest - prompt_B.to(device))[:, None]
    response_BT = torch.full((len(prompts), max_response), eos, device=device)
    logprob_BT = torch.zeros(len(prompts), max_response, device=device)
    length_B = torch.full((len(prompts),), max_response, device=device)
    alive_R = torch.arange(len(prompts), device=device)
    done_R = torch.zeros(len(prompts), dtype=torch.bool, device=device)
    inputs_RP, position_RP = ids_BP, (torch.arange(widest, device=device) - (widest - prompt_B.to(device))[:, None]).clamp(min=0)
    mask: torch.Tensor = real_RT[:, :widest].long()  # two-dimensional for the prefill, ready-made afterwards
    for step in range(max_response):
        logits_RV = model(
            input_ids=inputs_RP, attention_mask=mask, position_ids=position_RP, use_cache=True, logits_to_keep=1, **cached
        ).logits[:, -1]
        logprob_RV = torch.log_softmax(logits_RV.float() / temperature, -1)
        noise_RV = 0.0 if generator is None else -torch.empty(logprob_RV.shape).exponential_(generator=generator).log().to(device)
        token_R = (logprob_RV + noise_RV).argmax(-1)
        response_BT[alive_R[~done_R], step] = token_R[~done_R]
        logprob_BT[alive_R[~done_R], step] = logprob_RV.gather(1, token_R[:, None])[~done_R, 0]
        length_B[alive_R[~done_R & (token_R == eos)]] = step + 1
        done_R |= token_R == eos
        if done_R.all():
            break
        position_R = position_RP[:, -1] + 1
        if (~done_R).float().mean() < COMPACT:
            keep = (~done_R).nonzero()[:, 0]
            cache.batch_select_indices(keep)
            alive_R, done_R, token_R, position_R, real_RT = alive_R[keep], done_R[keep], token_R[keep], position_R[keep], real_RT[keep]
        inputs_RP, position_RP = token_R[:, None], position_R[:, None]
        mask = real_RT[:, None, None, : widest + step + 1]
    finished_B = response_BT.gather(1, length_B[:, None] - 1)[:, 0] == eos
    return _right_padded(prompts, prompt_B, response_BT.cpu(), logprob_BT.cpu(), length_B.cpu(), finished_B.cpu())


def _right_padded(prompts, prompt_B, response_BT, logprob_BT, length_B, finished_B) -> Sequences:
    total_B = prompt_B + length_B
    ids_BT = torch.zeros(len(prompts), int(total_B.max()), dtype=torch.long)
    padded_BT = torch.zeros(ids_BT.shape)
    for row, ids in enumerate(prompts):
        start, length = len(ids), int(length_B[row])
        ids_BT[row, :start] = torch.tensor(ids)
        ids_BT[row, start : start + length] = response_BT[row, :length]
        padded_BT[row, start : start + length] = logprob_BT[row, :length]
    return Sequences(ids_BT, prompt_B, total_B, finished_B, padded_BT)
