"""Analytic FLOP count of a decoder-only transformer, from its config alone, in exact integers.

    student = flop_count(LlamaConfig(...))
    student.sample(prompt=20, response=50) + student.update(70)
    cheaper = flop_count(LlamaConfig(...), lora_rank=8, checkpointing=True)

A matrix product costs 2 FLOPs per parameter and token, attention 4 per layer, head, head dimension and attended position, the backward pass
twice the forward (Kaplan et al., arXiv 2001.08361; Hoffmann et al., arXiv 2203.15556, appendix F). The output head counts, tied or not.
Low-rank adapters (Hu et al., arXiv 2106.09685) spare the backward pass the gradients of the frozen weights; activation checkpointing
(Chen et al., arXiv 1604.06174) has it run the layers again. Rollouts are sampled from weights with the adapters merged.

Llama, Qwen3 and GPT-2 are counted by formulas. Of any other model a copy without weights is made and its linear maps are counted; the sum
must be what torch counts of that copy's forward pass, so a model that computes anything else is refused.

Shapes: B sequences.
Limits: norms, softmax, rotary embedding and the optimiser are left out, as is padding; the head is charged at prompt tokens too. Full
attention only; no mixture of experts, linear attention or state space.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from opd_bench.checkpointing import checkpointed
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
        """Prefill and cached decoding: ``prompt`` + ``response`` − 1 positions, as the last token is not fed back; 0 for no response.

        Adapters are merged for that and cost nothing.
        """
        return replace(self, adapter_parameters=0).score((prompt + response - 1) * (response > 0))

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


OWN_MASKS = ("opt", "bloom")  # which make more of a mask than to add it
_LAYERS = {"llama": _gated_layer, "qwen3": _gated_layer, "gpt2": _gpt2_layer}


PROBED = 8  # tokens of the forward pass that torch counts


def flop_count(config: Any, *, lora_rank: int = 0, checkpointing: bool = False, remote_code: bool = False) -> FlopCount:
    """The count for a transformers config; UserError for an architecture that cannot be counted.

    ``lora_rank`` above 0 freezes the model and puts an adapter of that rank beside every linear map of every layer; the gradient is
    taken as far as the embeddings, as with ``enable_input_require_grads``. ``checkpointing`` keeps the inputs of each layer alone and runs
    the layer again when its gradients are due, as far as torch's non-reentrant checkpointing goes: up to the last matrix product, whose
    output nothing needs, and through it where a dropout or a norm follows. ``remote_code`` lets the model's own code be run.
    """
    _refuse(config)
    layer, layers = _LAYERS.get(config.model_type), config.num_hidden_layers
    if layer is None:
        model = _weightless(config, remote_code)
        head = model.get_output_embeddings()
        maps = [_shape(module) for module in model.modules() if _is_map(module) and module is not head]
        columns, unneeded = head.out_features, _unneeded(model, maps) if checkpointing else 0
        unneeded = layers * lora_rank * config.hidden_size if lora_rank and unneeded else unneeded
    else:
        maps, columns = layers * layer(config), config.vocab_size
        inputs, outputs = maps[-1]
        unneeded = 0 if getattr(config, "resid_pdrop", 0) else layers * (lora_rank or inputs) * outputs
    frozen = sum(inputs * outputs for inputs, outputs in maps)
    adapters = lora_rank * sum(inputs + outputs for inputs, outputs in maps)
    return FlopCount(
        matmul_parameters=frozen + config.hidden_size * columns,
        attention_per_position=_attention(config),
        adapter_parameters=adapters,
        recomputed_parameters=frozen + adapters - unneeded if checkpointing else 0,
    )


def _attention(config: Any) -> int:
    """FLOPs per pair of query and attended position, all layers and query heads."""
    return config.num_hidden_layers * 4 * config.num_attention_heads * _head_dim(config)


def _refuse(config: Any) -> None:
    """UserError for what linear maps and full attention do not sum up to."""
    kind, every = config.model_type, config.to_dict()
    window, others = every.get("sliding_window"), {*(every.get("layer_types") or ())} - {"full_attention", "sliding_attention"}
    windowed = "sliding_attention" in (every.get("layer_types") or ()) if "layer_types" in every else every.get("use_sliding_window", True)
    if every.get("use_sliding_window") or (window and windowed and window < every.get("max_position_embeddings", window)):
        what = "sliding-window attention; if no text is longer than the window, set sliding_window to null or use_sliding_window to false"
        raise UserError(f"cannot count the FLOPs of {what} in the model's config")
    if any("expert" in name and isinstance(value, int) and value > 1 for name, value in every.items()):
        raise UserError(f"cannot count the FLOPs of a mixture of experts ({kind!r}); use a dense model")
    if others or "local" in str(every.get("attention_types")) or not getattr(config, "num_attention_heads", None):
        raise UserError(f"cannot count the FLOPs of {kind!r}: not all of its layers are full attention; use a plain decoder")


def _is_map(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D"  # GPT-2's, whose weight lies the other way


def _shape(module: Any) -> tuple[int, int]:
    """Inputs and outputs."""
    rows, columns = module.weight.shape
    return (columns, rows) if isinstance(module, nn.Linear) else (rows, columns)


def _weightless(config: Any, remote_code: bool) -> Any:
    """A model of shapes alone, whose forward pass costs what its linear maps and full attention do. UserError if it does not."""
    from transformers import AutoModelForCausalLM

    try:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config, attn_implementation="eager", trust_remote_code=remote_code).eval()
        model.requires_grad_()
        spent = _torch_count(model)[0]
        head = model.get_output_embeddings()
    except Exception as error:  # whatever the model's own code raises
        said = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UserError(f"cannot count the FLOPs of a {config.model_type!r} model: {said}; use a plain decoder") from None
    if any(getattr(module, "is_causal", None) is False for module in model.modules()):
        raise UserError(f"cannot count the FLOPs of {config.model_type!r}: its tokens see those after them; use a plain decoder")
    maps = sum(module.weight.numel() for module in model.modules() if _is_map(module))
    if not isinstance(head, nn.Linear) or spent != FlopCount(maps, _attention(config)).forward(PROBED, PROBED * PROBED):
        raise UserError(f"cannot count the FLOPs of a {config.model_type!r} model: it computes more than linear maps and full attention")
    return model


def _unneeded(model: Any, maps: list[tuple[int, int]]) -> int:
    """Parameters of the products that checkpointing does not run again."""
    plain = _torch_count(model)[1]
    with checkpointed(model):
        again = _torch_count(model)[1] - plain
    whole = FlopCount(sum(inputs * outputs for inputs, outputs in maps), _attention(model.config))
    return (whole.forward(PROBED, PROBED * PROBED) - again) // (2 * PROBED)


def _torch_count(model: Any) -> tuple[int, int]:
    """FLOPs of a forward and its backward pass, rotary embeddings apart, which are matrix products in some versions of transformers."""
    ids_1T = torch.zeros(1, PROBED, dtype=torch.long, device="meta")
    mask = {} if model.config.model_type in OWN_MASKS else {"attention_mask": torch.zeros(1, 1, PROBED, PROBED, device="meta")}
    with FlopCounterMode(display=False) as counter:
        logits_1TV = model(ids_1T, use_cache=False, **mask).logits
    rotary = [sum(ops.values()) for module, ops in counter.get_flop_counts().items() if module.endswith("rotary_emb")]
    with FlopCounterMode(display=False) as backward:
        logits_1TV.sum().backward()
    return counter.get_total_flops() - sum(rotary), backward.get_total_flops()
