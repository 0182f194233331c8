"""A model's next-token logits for sequences that stand at different positions: what `rollouts.py` samples from.

    decoder = decoder_of(model, rows=16, capacity=128)
    logits_RV = decoder.prefill(ids_RP, length_R, slot_R)   # these prompts now lie in the cache, a slot each
    logits_RV = decoder.step(token_R, position_R)           # one more token in every slot

The cache is allocated once, and a slot whose sequence has ended takes another prompt. Llama and Qwen3 run by `Fused`, which keeps the
projections that read one input side by side and makes one call where the modules of transformers make four; any other model runs by
`Cached`, which is those modules.

Shapes: R rows (slots), P prompt tokens, C positions of the cache, D width, H query heads, K key/value heads, Q head width, V vocabulary,
N tokens of all rows, J = H + 2 K, S: two or more of these side by side, U different lengths of prompts.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer

from opd_bench.scoring import output_head

FUSED = ("llama", "qwen3")
FIXED_ROTATIONS = ("default", "linear", "llama3", "yarn")  # whose angles do not depend on how long a sequence is


class Decoder(Protocol):
    def prefill(self, ids_RP: Tensor, length_R: Tensor, slot_R: Tensor) -> Tensor:
        """Logits (R, V) after prompts that are padded on the right; their keys and values go to the slots ``slot_R``."""
        ...

    def step(self, token_R: Tensor, position_R: Tensor) -> Tensor:
        """Logits (R, V) after ``token_R`` at ``position_R``, a token for every slot."""
        ...

    def move(self, sources: list[int], targets: list[int]) -> None:
        """Copy slots onto others. A step is for as many slots as it has tokens, from the first on."""
        ...


def decoder_of(model: PreTrainedModel, rows: int, capacity: int) -> Decoder:
    """A decoder for ``model`` as it is now, with ``rows`` slots of ``capacity`` tokens, prompt and response together."""
    return (Fused if fusible(model) else Cached)(model, rows, capacity)


def fusible(model: PreTrainedModel) -> bool:
    """Whether `Fused` computes what ``model`` computes."""
    config: Any = model.config
    rotation = (getattr(config, "rope_parameters", None) or {}).get("rope_type", "default")
    windowed = getattr(config, "use_sliding_window", False)
    return config.model_type in FUSED and rotation in FIXED_ROTATIONS and not windowed and not hasattr(model, "peft_config")


class Fused:
    """Llama and Qwen3."""

    def __init__(self, model: PreTrainedModel, rows: int, capacity: int) -> None:
        config: Any = model.config
        base: Any = model.base_model
        self.layers = [_Layer(layer) for layer in base.layers]
        self.embedding, self.norm, self.head = base.embed_tokens.weight, _rms_norm(base.norm), output_head(model)
        self.heads, self.kv_heads, self.width = config.num_attention_heads, config.num_key_value_heads, self.layers[0].head_width
        self.turned = self.heads + self.kv_heads  # queries and keys, which are rotated
        device, dtype = model.device, model.dtype
        self.place_C = torch.arange(capacity, device=device)
        cos_1CQ, sin_1CQ = base.rotary_emb(torch.empty(1, 1, 1, device=device, dtype=dtype), self.place_C[None])
        sign_Q = torch.where(self.place_C.new_ones(self.width).cumsum(0) <= self.width // 2, -1, 1)
        # the sine's sign lets a roll by half a head stand for cutting out both halves and negating one
        self.cos_sin_CS = torch.cat((cos_1CQ[0], sin_1CQ[0] * sign_Q), -1)
        self.cache_LCS = torch.zeros(len(self.layers), rows * capacity, 2 * self.kv_heads * self.width, device=device, dtype=dtype)
        self.start_R = torch.arange(rows, device=device) * capacity  # of each slot in the cache

    def prefill(self, ids_RP: Tensor, length_R: Tensor, slot_R: Tensor) -> Tensor:
        rows, longest = ids_RP.shape
        place_N = (self.start_R[slot_R, None] + self.place_C[:longest]).flatten()

        def attend(index: int, qkv_NJQ: Tensor) -> Tensor:
            self.cache_LCS[index].index_copy_(0, place_N, qkv_NJQ[:, self.heads :].flatten(1))
            q, k, v = qkv_NJQ.view(rows, longest, -1, self.width).transpose(1, 2).split((self.heads, self.kv_heads, self.kv_heads), 1)
            grouped, scale = self.heads > self.kv_heads, self.layers[index].scale
            attended_RHPQ = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale, enable_gqa=grouped)
            return attended_RHPQ.transpose(1, 2).reshape(rows * longest, -1)

        hidden_ND = self._run(ids_RP.flatten(), self.place_C[:longest].repeat(rows), attend)
        return self.head(self.norm(hidden_ND[torch.arange(rows, device=hidden_ND.device) * longest + length_R - 1]))

    def step(self, token_R: Tensor, position_R: Tensor) -> Tensor:
        rows, longest, groups = len(token_R), int(position_R.max()) + 1, self.heads // self.kv_heads
        place_R = self.start_R[:rows] + position_R
        seen_R11C = _mask(self.place_C[:longest] <= position_R[:, None], self.embedding.dtype)[:, None, None]
        cache_LRC2KQ = self.cache_LCS.view(len(self.layers), -1, len(self.place_C), 2, self.kv_heads, self.width)

        def attend(index: int, qkv_RJQ: Tensor) -> Tensor:
            self.cache_LCS[index].index_copy_(0, place_R, qkv_RJQ[:, self.heads :].flatten(1))
            k_RKCQ, v_RKCQ = cache_LRC2KQ[index, :rows, :longest].permute(2, 0, 3, 1, 4)
            # the queries that share a key stand where tokens usually do, so that no key is copied
            q_RKGQ = qkv_RJQ[:, : self.heads].view(rows, self.kv_heads, groups, self.width)
            return F.scaled_dot_product_attention(q_RKGQ, k_RKCQ, v_RKCQ, seen_R11C, scale=self.layers[index].scale).view(rows, -1)

        return self.head(self.norm(self._run(token_R, position_R, attend)))

    def move(self, sources: list[int], targets: list[int]) -> None:
        slots_LRS = self.cache_LCS.view(len(self.layers), len(self.start_R), -1)
        slots_LRS[:, targets] = slots_LRS[:, sources]

    def _run(self, ids_N: Tensor, position_N: Tensor, attend: Callable[[int, Tensor], Tensor]) -> Tensor:
        """The last hidden state (N, D), before the norm. ``attend(layer, qkv_NJQ)`` gives (N, H·Q)."""
        hidden_ND = F.embedding(ids_N, self.embedding)
        cos_N1Q, sin_N1Q = self.cos_sin_CS.index_select(0, position_N).view(-1, 1, 2 * self.width).chunk(2, -1)
        for index, layer in enumerate(self.layers):
            qkv_NJQ = layer.qkv(layer.norm_in(hidden_ND)).view(len(ids_N), -1, self.width)
            if layer.norm_q and layer.norm_k:
                q_NHQ, k_NKQ, v_NKQ = qkv_NJQ.split((self.heads, self.kv_heads, self.kv_heads), 1)
                qkv_NJQ = torch.cat((layer.norm_q(q_NHQ), layer.norm_k(k_NKQ), v_NKQ), 1)
            qk_NJQ = qkv_NJQ[:, : self.turned]
            torch.addcmul(qk_NJQ * cos_N1Q, qk_NJQ.roll(self.width // 2, -1), sin_N1Q, out=qk_NJQ)
            hidden_ND = hidden_ND + layer.out(attend(index, qkv_NJQ))
            gate_NI, up_NI = layer.gate_up(layer.norm_mid(hidden_ND)).chunk(2, -1)
            hidden_ND = hidden_ND + layer.down(layer.act(gate_NI) * up_NI)
        return hidden_ND


class _Layer:
    """A layer's modules, with q, k and v as one projection, and gate and up as one: a copy of those."""

    def __init__(self, layer: Any) -> None:
        attention, mlp = layer.self_attn, layer.mlp
        self.norm_in, self.norm_mid = _rms_norm(layer.input_layernorm), _rms_norm(layer.post_attention_layernorm)
        self.norm_q, self.norm_k = (_rms_norm(norm) if (norm := getattr(attention, name, None)) else None for name in ("q_norm", "k_norm"))
        self.qkv = _side_by_side(attention.q_proj, attention.k_proj, attention.v_proj)
        self.gate_up = _side_by_side(mlp.gate_proj, mlp.up_proj)
        self.out, self.down, self.act = attention.o_proj, mlp.down_proj, mlp.act_fn
        self.head_width, self.scale = attention.head_dim, attention.scaling


def _side_by_side(*maps: torch.nn.Linear) -> Callable[[Tensor], Tensor]:
    weight = torch.cat([part.weight for part in maps])
    bias = None if maps[0].bias is None else torch.cat([part.bias for part in maps])
    return lambda inputs: F.linear(inputs, weight, bias)


def _rms_norm(norm: Any) -> Callable[[Tensor], Tensor]:
    """In float32 and a few calls; torch's own makes about three times as many on a CPU."""
    weight, eps = norm.weight, norm.variance_epsilon

    def normalised(inputs: Tensor) -> Tensor:
        values = inputs.float()
        scale = torch.linalg.vecdot(values, values).div_(values.shape[-1]).add_(eps).rsqrt_()
        return (values * scale.unsqueeze(-1)).to(inputs.dtype) * weight

    return normalised


class Cached:
    """Any causal language model of transformers, through its own modules."""

    def __init__(self, model: PreTrainedModel, rows: int, capacity: int) -> None:
        self.model = model
        self.layers = [_Slots(rows, capacity) for _ in range(model.config.num_hidden_layers)]
        self.cache = DynamicCache()
        self.cache.layers.extend(self.layers)
        # transformers 5.24 renamed the argument
        self.name = "cache" if "cache" in inspect.signature(model.forward).parameters else "past_key_values"
        self.place_C = torch.arange(capacity, device=model.device)

    def prefill(self, ids_RP: Tensor, length_R: Tensor, slot_R: Tensor) -> Tensor:
        rows, longest = ids_RP.shape
        seen_R1PP = _mask(self.place_C[:longest, None] >= self.place_C[:longest], self.model.dtype).expand(rows, 1, -1, -1)
        for layer in self.layers:
            layer.prefilled_R = slot_R
        last_U, which_R = torch.unique(length_R - 1, return_inverse=True)
        logits_RUV = self._forward(ids_RP, self.place_C[:longest].expand(rows, -1), seen_R1PP, logits_to_keep=last_U)
        return logits_RUV[torch.arange(rows, device=ids_RP.device), which_R]

    def step(self, token_R: Tensor, position_R: Tensor) -> Tensor:
        longest = int(position_R.max()) + 1
        for layer in self.layers:
            layer.prefilled_R, layer.position_R, layer.longest = None, position_R, longest
        seen_R11C = _mask(self.place_C[:longest] <= position_R[:, None], self.model.dtype)[:, None, None]
        return self._forward(token_R[:, None], position_R[:, None], seen_R11C)[:, 0]

    def move(self, sources: list[int], targets: list[int]) -> None:
        for layer in self.layers:
            layer.buffer_2RKCQ[:, targets] = layer.buffer_2RKCQ[:, sources]

    def _forward(self, ids_RT: Tensor, position_RT: Tensor, seen_R1TC: Tensor, **options: Any) -> Tensor:
        options |= {"use_cache": True, self.name: self.cache}
        return self.model(input_ids=ids_RT, attention_mask=seen_R1TC, position_ids=position_RT, **options).logits


def _mask(seen: Tensor, dtype: torch.dtype) -> Tensor:
    """To be added to attention's scores: 0 where a position is seen. Every implementation of attention takes it; not all take booleans."""
    return torch.zeros_like(seen, dtype=dtype).masked_fill_(~seen, torch.finfo(dtype).min)


class _Slots(DynamicLayer):
    """The keys and values of one layer, each row written at a position of its own."""

    prefilled_R: Tensor | None  # the slots that a prefill is for
    position_R: Tensor
    longest: int

    def __init__(self, rows: int, capacity: int) -> None:
        super().__init__()
        self.rows, self.capacity = rows, capacity

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        super().lazy_initialization(key_states, value_states)
        _, heads, _, width = key_states.shape
        self.buffer_2RKCQ = key_states.new_zeros(2, self.rows, heads, self.capacity, width)

    def update(self, key_states: Tensor, value_states: Tensor, *args, **kwargs) -> tuple[Tensor, Tensor]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        keys_RKCQ, values_RKCQ = self.buffer_2RKCQ
        if self.prefilled_R is not None:
            keys_RKCQ[self.prefilled_R, :, : key_states.shape[2]] = key_states
            values_RKCQ[self.prefilled_R, :, : key_states.shape[2]] = value_states
            return key_states, value_states
        slot_R = torch.arange(len(self.position_R), device=key_states.device)
        keys_RKCQ, values_RKCQ = keys_RKCQ[: len(slot_R)], values_RKCQ[: len(slot_R)]
        keys_RKCQ[slot_R, :, self.position_R] = key_states[:, :, 0]
        values_RKCQ[slot_R, :, self.position_R] = value_states[:, :, 0]
        return keys_RKCQ[:, :, : self.longest], values_RKCQ[:, :, : self.longest]
