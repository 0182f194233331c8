"""Analytic FLOP count of a decoder-only transformer, from its config alone, in exact integers.

    student = flop_count(LlamaConfig(...))
    student.sample(prompt=20, response=50) + student.update(70)
    cheaper = flop_count(LlamaConfig(...), lora_rank=8, checkpointing=True)

A matrix product costs 2 FLOPs per parameter and token, attention 4 per layer, head, head dimension and attended position, the backward pass
twice the forward (Kaplan et al., arXiv 2001.08361; Hoffmann et al., arXiv 2203.15556, appendix F). The output head counts, tied or not.
Low-rank adapters (Hu et al., arXiv 2106.09685) spare the backward pass the gradients of the frozen weights; activation checkpointing
(Chen et al., arXiv 1604.06174) has it run the layers again.

Shapes: B sequences.
Limits: norms, softmax, rotary embedding and the optimiser are left out, as is padding; the head is charged at prompt tokens too. Full
attention only; no mixture of experts.
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
    adapter_parameters: int = 0  # of low-rank adapters, which alone are trained; 0: everything is
    recomputed_parameters: int = 0  # in matrix products that the backward pass runs again, attention with them; 0: it runs none

    def forward(self, tokens: int, attended: int) -> int:
        """A forward pass over ``tokens`` tokens that attend to ``attended`` positions in all."""
        return 2 * (self.matmul_parameters + self.adapter_parameters) * tokens + self.attention_per_position * attended

    def backward(self, tokens: int, attended: int) -> int:
        """The backward pass to such a forward pass: gradients of all activations and of what is trained, after what is run again."""
        activations = self.forward(tokens, attended)
        trained = 2 * (self.adapter_parameters or self.matmul_parameters) * tokens + self.attention_per_position * attended
        again = 2 * self.recomputed_parameters * tokens + bool(self.recomputed_parameters) * self.attention_per_position * attended
        return activations + trained + again

    def score(self, length: int | Tensor) -> int:
        """A causal forward pass over whole sequences."""
        return self.forward(*_positions(length))

    def sample(self, prompt: int | Tensor, response: int | Tensor) -> int:
        """Prefill and cached decoding: ``prompt`` + ``response`` − 1 positions, as the last token is not fed back; 0 for no response."""
        return self.score((prompt + response - 1) * (response > 0))

    def update(self, length: int | Tensor) -> int:
        """A forward and a backward pass over whole sequences."""
        positions = _positions(length)
        return self.forward(*positions) + self.backward(*positions)


def _positions(length: int | Tensor) -> tuple[int, int]:
    """Tokens of whole sequences, and positions they attend to."""
    lengths = torch.as_tensor(length).reshape(-1).tolist()
    return sum(lengths), sum(causal(0, tokens) for tokens in lengths)


def _gated_layer(config: Any) -> list[tuple[int, int]]:
    """Inputs and outputs of the matrix products of a layer with grouped-query attention and a gated MLP: q, k, v, o, gate, up, down."""
    width, inner = config.hidden_size, config.intermediate_size
    queries, keys = (_head_dim(config) * heads for heads in (config.num_attention_heads, config.num_key_value_heads))
    return [(width, queries), (width, keys), (width, keys), (queries, width), (width, inner), (width, inner), (inner, width)]


def _gpt2_layer(config: Any) -> list[tuple[int, int]]:
    width, inner = config.hidden_size, config.n_inner or 4 * config.hidden_size
    return [(width, 3 * width), (width, width), (width, inner), (inner, width)]


def _head_dim(config: Any) -> int:
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


_LAYERS = {"llama": _gated_layer, "qwen3": _gated_layer, "gpt2": _gpt2_layer}


def flop_count(config: Any, *, lora_rank: int = 0, checkpointing: bool = False) -> FlopCount:
    """The count for a transformers config; UserError if its architecture, or its sliding-window attention, is not supported.

    ``lora_rank`` above 0 freezes the model and puts an adapter of that rank beside every linear map of every layer; the gradient is
    taken as far as the embeddings, as with ``enable_input_require_grads``. ``checkpointing`` keeps the inputs of each layer alone and runs
    the layer again when its gradients are due, as far as torch's non-reentrant checkpointing goes: up to the last matrix product, whose
    output nothing needs, and through it where a dropout follows.
    """
    layer = _LAYERS.get(config.model_type)
    if layer is None:
        raise UserError(f"cannot count the FLOPs of a {config.model_type!r} model; use one of: {', '.join(sorted(_LAYERS))}")
    if getattr(config, "use_sliding_window", False):
        raise UserError("cannot count the FLOPs of sliding-window attention; set use_sliding_window to false in the model's config")
    maps, layers = layer(config), config.num_hidden_layers
    frozen = sum(inputs * outputs for inputs, outputs in maps)
    adapters = lora_rank * sum(inputs + outputs for inputs, outputs in maps)
    inputs, outputs = maps[-1]
    unneeded = 0 if getattr(config, "resid_pdrop", 0) else (lora_rank or inputs) * outputs
    return FlopCount(
        matmul_parameters=layers * frozen + config.hidden_size * config.vocab_size,
        attention_per_position=layers * 4 * config.num_attention_heads * _head_dim(config),
        adapter_parameters=layers * adapters,
        recomputed_parameters=layers * (frozen + adapters - unneeded) if checkpointing else 0,
    )
