"""Analytic FLOP count of a decoder-only transformer, from its config alone, in exact integers.

    student = flop_count(LlamaConfig(...))
    student.sample(prompt=20, response=50) + student.update(70)

A matrix product costs 2 FLOPs per parameter and token, attention 4 per layer, head, head dimension and attended position, the backward pass
twice the forward (Kaplan et al., arXiv 2001.08361; Hoffmann et al., arXiv 2203.15556, appendix F). The output head counts, tied or not.

Shapes: B sequences.
Limits: norms, softmax, rotary embedding and the optimiser are left out, as is padding; the head is charged at prompt tokens too. Full
attention only; no mixture of experts, LoRA or activation checkpointing.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from opd_bench.errors import UserError


def causal(start: int, end: int) -> int:
    """Positions attended by the tokens at ``start`` … ``end`` − 1, each of which sees itself and all before it."""
    return (end * (end + 1) - start * (start + 1)) // 2


@dataclass(frozen=True)
class FlopCount:
    """What one model costs. Lengths are tokens, of one sequence or a (B,) tensor of them, whose cost is summed; results are FLOPs."""

    matmul_parameters: int  # parameters in matrix products: with the output head, without the embedding look-up
    attention_per_position: int  # FLOPs per pair of query and attended position, all layers and query heads

    def forward(self, tokens: int, attended: int) -> int:
        """A forward pass over ``tokens`` tokens that attend to ``attended`` positions in all."""
        return 2 * self.matmul_parameters * tokens + self.attention_per_position * attended

    def score(self, length: int | Tensor) -> int:
        """A causal forward pass over whole sequences."""
        return sum(self.forward(tokens, causal(0, tokens)) for tokens in torch.as_tensor(length).reshape(-1).tolist())

    def sample(self, prompt: int | Tensor, response: int | Tensor) -> int:
        """Prefill and cached decoding: ``prompt`` + ``response`` − 1 positions, as the last token is not fed back; 0 for no response."""
        return self.score((prompt + response - 1) * (response > 0))

    def update(self, length: int | Tensor) -> int:
        """A forward and a backward pass over whole sequences."""
        return 3 * self.score(length)


def _gated_layer(config: Any) -> int:
    """Parameters in the matrix products of a layer with grouped-query attention and a gated MLP."""
    head_dim = _head_dim(config)
    attention = 2 * head_dim * (config.num_attention_heads + config.num_key_value_heads)  # q and o, k and v
    return config.hidden_size * (attention + 3 * config.intermediate_size)


def _gpt2_layer(config: Any) -> int:
    return config.hidden_size * (4 * config.hidden_size + 2 * (config.n_inner or 4 * config.hidden_size))


def _head_dim(config: Any) -> int:
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


_LAYERS = {"llama": _gated_layer, "qwen3": _gated_layer, "gpt2": _gpt2_layer}


def flop_count(config: Any) -> FlopCount:
    """The count for a transformers config; UserError if its architecture, or its sliding-window attention, is not supported."""
    layer = _LAYERS.get(config.model_type)
    if layer is None:
        raise UserError(f"cannot count the FLOPs of a {config.model_type!r} model; use one of: {', '.join(sorted(_LAYERS))}")
    if getattr(config, "use_sliding_window", False):
        raise UserError("cannot count the FLOPs of sliding-window attention; set use_sliding_window to false in the model's config")
    return FlopCount(
        matmul_parameters=config.num_hidden_layers * layer(config) + config.hidden_size * config.vocab_size,
        attention_per_position=config.num_hidden_layers * 4 * config.num_attention_heads * _head_dim(config),
    )
