"""The analytic count agrees with torch's own counter and with published sizes, exactly."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import (
    AutoModelForCausalLM,
    BertConfig,
    BloomConfig,
    DynamicCache,
    GemmaConfig,
    GPT2Config,
    GPTNeoConfig,
    GPTNeoXConfig,
    LlamaConfig,
    MambaConfig,
    MistralConfig,
    MixtralConfig,
    Olmo2Config,
    OPTConfig,
    PhiConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen3Config,
)
from transformers.pytorch_utils import Conv1D

from opd_bench import flops
from opd_bench.errors import UserError
from opd_bench.flops import FlopCount, causal, flop_count

SMALL: dict[str, Any] = {"vocab_size": 50, "hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 2, "num_attention_heads": 4}
CONFIGS = {
    "llama": LlamaConfig(**SMALL, num_key_value_heads=4),
    "llama-grouped": LlamaConfig(**SMALL, num_key_value_heads=2),
    "llama-tied": LlamaConfig(**SMALL, num_key_value_heads=1, tie_word_embeddings=True),
    "qwen3": Qwen3Config(**SMALL, num_key_value_heads=2, head_dim=10),
    "gpt2": GPT2Config(vocab_size=50, n_embd=24, n_layer=2, n_head=4, n_inner=36),
    "gpt2-without-dropout": GPT2Config(vocab_size=50, n_embd=24, n_layer=2, n_head=4, n_inner=36, resid_pdrop=0.0),
}
WIDER: dict[str, Any] = {**SMALL, "hidden_size": 32}
OTHERS = {  # counted from their modules
    "bloom": BloomConfig(vocab_size=50, hidden_size=24, n_layer=2, n_head=4),
    "gemma": GemmaConfig(**SMALL, num_key_value_heads=1, head_dim=8),
    "mistral": MistralConfig(**SMALL, num_key_value_heads=2, sliding_window=None),
    "neox": GPTNeoXConfig(**SMALL),
    "olmo2": Olmo2Config(**SMALL, num_key_value_heads=4),  # a norm after the last product of a layer
    "opt": OPTConfig(vocab_size=50, hidden_size=24, ffn_dim=40, num_hidden_layers=2, num_attention_heads=4, word_embed_proj_dim=24),
    "phi": PhiConfig(**WIDER),
    "qwen2": Qwen2Config(**SMALL, num_key_value_heads=2),
}
PUBLISHED = {
    "SmolLM2-135M": LlamaConfig(
        vocab_size=49152,
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=30,
        num_attention_heads=9,
        num_key_value_heads=3,
        tie_word_embeddings=True,
    ),
    "Qwen3-0.6B": Qwen3Config(
        vocab_size=151936,
        hidden_size=1024,
        intermediate_size=3072,
        num_hidden_layers=28,
        num_attention_heads=16,
        num_key_value_heads=8,
        head_dim=128,
        tie_word_embeddings=True,
    ),
    "GPT-2": GPT2Config(),
}
TRAINED: dict[str, dict[str, Any]] = {
    "in full": {},
    "checkpointing": {"checkpointing": True},
    "lora": {"lora_rank": 3},
    "lora, checkpointing": {"lora_rank": 3, "checkpointing": True},
}
EVERY = pytest.mark.parametrize("name", sorted(CONFIGS))
EVERY_WAY = pytest.mark.parametrize("how", sorted(TRAINED))
COUNT = FlopCount(matmul_parameters=1000, attention_per_position=7)


class Adapted(torch.nn.Module):
    """A frozen linear map with a low-rank adapter beside it, as peft computes it."""

    def __init__(self, frozen: torch.nn.Linear | Conv1D, rank: int) -> None:
        super().__init__()
        inputs, outputs = frozen.weight.shape if isinstance(frozen, Conv1D) else frozen.weight.shape[::-1]
        self.frozen, self.down, self.up = frozen, torch.nn.Linear(inputs, rank, bias=False), torch.nn.Linear(rank, outputs, bias=False)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        return self.frozen(inputs) + 0.5 * self.up(self.down(inputs))


def eager(config: Any, lora_rank: int = 0, checkpointing: bool = False) -> PreTrainedModel:
    """A model of random weights, ready for training in the way of ``flop_count``."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").train()
    if lora_rank:
        model.requires_grad_(False)
        for name, module in list(model.named_modules()):
            if isinstance(module, torch.nn.Linear | Conv1D) and name != "lm_head":
                model.set_submodule(name, Adapted(module, lora_rank))
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    return model


def without_dropout(config: Any) -> Any:
    """As the bench trains: checkpointing of transformers needs training mode, in which dropout has the last product run again."""
    rates = {name: 0.0 for name in config.to_dict() if "dropout" in name or name.endswith("_pdrop")}
    return type(config).from_dict({**config.to_dict(), **rates})


def counted(counter: FlopCounterMode) -> int:
    """What torch counted outside the rotary embedding, a matrix product in some versions of transformers, which we leave out."""
    rotary = [sum(ops.values()) for module, ops in counter.get_flop_counts().items() if module.endswith("rotary_emb")]
    return counter.get_total_flops() - sum(rotary)


def assert_as_torch_counts(config: Any, how: str) -> None:
    """Forward and backward pass over three rows of nine tokens."""
    model, ids_BT = eager(config, **TRAINED[how]), torch.randint(50, (3, 9), generator=torch.Generator().manual_seed(0))
    model.enable_input_require_grads()
    count, square = flop_count(config, **TRAINED[how]), {"tokens": 27, "attended": 3 * 9 * 9}
    with FlopCounterMode(display=False) as counter:
        loss = model(ids_BT, use_cache=False).logits.square().mean()
    assert counted(counter) == count.forward(**square)
    with FlopCounterMode(display=False) as counter:
        loss.backward()
    assert counted(counter) == count.backward(**square)


@EVERY
@EVERY_WAY
def test_forward_and_backward_match_torch(name: str, how: str) -> None:
    assert_as_torch_counts(CONFIGS[name], how)


@pytest.mark.parametrize("name", sorted(OTHERS))
@EVERY_WAY
def test_other_architectures_match_torch(name: str, how: str) -> None:
    assert_as_torch_counts(without_dropout(OTHERS[name]), how)


@pytest.mark.parametrize("name", ["llama-grouped", "qwen3", "gpt2-without-dropout"])
@EVERY_WAY
def test_modules_and_formulas_give_one_count(name: str, how: str, monkeypatch: pytest.MonkeyPatch) -> None:
    by_formula = flop_count(CONFIGS[name], **TRAINED[how])
    monkeypatch.setattr(flops, "_LAYERS", {})
    assert flop_count(CONFIGS[name], **TRAINED[how]) == by_formula


@pytest.mark.parametrize("name", sorted(PUBLISHED))
@pytest.mark.parametrize("how", ["checkpointing", "lora"])
def test_training_published_models_as_one_would_is_within_two_percent_of_torch(name: str, how: str) -> None:
    with torch.device("meta"):  # shapes alone, no work
        model, ids_BT, mask = eager(PUBLISHED[name], **TRAINED[how]), torch.zeros(2, 64, dtype=torch.long), torch.zeros(2, 1, 64, 64)
    with FlopCounterMode(display=False) as counter:
        model(ids_BT, attention_mask=mask, use_cache=False).logits.square().mean().backward()
    count, square = flop_count(PUBLISHED[name], **TRAINED[how]), {"tokens": 128, "attended": 2 * 64 * 64}
    assert counted(counter) == pytest.approx(count.forward(**square) + count.backward(**square), rel=0.02)


@EVERY
def test_cached_decoding_matches_torch(name: str) -> None:
    model, count = eager(CONFIGS[name]).eval(), flop_count(CONFIGS[name])
    prompt, response = 5, 4
    cache, ids_BT = DynamicCache(config=CONFIGS[name]), torch.ones(1, prompt, dtype=torch.long)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        for _ in range(response):
            logits_BTV = model(ids_BT, past_key_values=cache, use_cache=True).logits
            ids_BT = logits_BTV[:, -1:].argmax(-1)
    unseen = prompt * prompt - causal(0, prompt)  # torch counts the whole square of the prefill
    assert counted(counter) == count.sample(prompt, response) + count.attention_per_position * unseen


@pytest.mark.parametrize(
    ("name", "parameters", "attention"),
    [  # the published totals less the norms: (2 L + 1) D, with 2 L q more in Qwen3; GPT-2 also less biases and positions
        ("SmolLM2-135M", 134_515_008 - 61 * 576, 30 * 4 * 9 * 64),
        ("Qwen3-0.6B", 596_049_920 - 57 * 1024 - 56 * 128, 28 * 4 * 16 * 128),
        ("GPT-2", 124_439_808 - 1024 * 768 - 25 * 2 * 768 - 12 * 9 * 768, 12 * 4 * 768),
    ],
)
def test_parameters_of_published_models(name: str, parameters: int, attention: int) -> None:
    assert flop_count(PUBLISHED[name]) == FlopCount(parameters, attention)


def test_tying_the_head_changes_no_cost() -> None:
    tied, untied = (LlamaConfig(**SMALL, tie_word_embeddings=tie) for tie in (True, False))
    assert flop_count(tied) == flop_count(untied)


def test_causal_matches_brute_force() -> None:
    for start in range(6):
        for end in range(start, 9):
            assert causal(start, end) == sum(t + 1 for t in range(start, end))


def test_sampling_costs_what_scoring_all_but_the_last_token_costs() -> None:
    for prompt in range(1, 5):
        for response in range(1, 6):
            steps = COUNT.forward(prompt, causal(0, prompt)) + sum(COUNT.forward(1, prompt + i) for i in range(1, response))
            assert COUNT.sample(prompt, response) == COUNT.score(prompt + response - 1) == steps


def test_no_response_costs_nothing() -> None:
    assert COUNT.sample(9, 0) == COUNT.sample(0, 0) == COUNT.score(0) == 0
    assert COUNT.sample(torch.tensor([9, 9]), torch.tensor([0, 2])) == COUNT.sample(9, 2)


def test_per_token_rates_without_attention_are_two_and_six_per_parameter() -> None:
    plain = FlopCount(matmul_parameters=1000, attention_per_position=0)
    teacher = FlopCount(matmul_parameters=5000, attention_per_position=0)
    assert plain.score(100) == 100 * 2 * 1000
    assert plain.update(100) == 100 * 6 * 1000
    on_policy = plain.sample(20, 81) + teacher.score(100) + plain.update(100)
    assert on_policy == 100 * (2 * 1000 + 2 * 5000 + 6 * 1000)


def test_per_token_rates_of_adapters_and_checkpointing() -> None:
    frozen, adapters, layers = 10**6, 10**3, 6 * 10**5
    assert FlopCount(frozen, 0, adapter_parameters=adapters).update(100) == 100 * (4 * frozen + 6 * adapters)
    assert FlopCount(frozen, 0, recomputed_parameters=layers).update(100) == 100 * (6 * frozen + 2 * layers)
    assert FlopCount(0, 7, recomputed_parameters=layers).update(100) == 200 * layers + 4 * FlopCount(0, 7).score(100)
    assert FlopCount(frozen, 7, recomputed_parameters=layers).score(100) == FlopCount(frozen, 7).score(100)


def test_batch_costs_the_sum_of_its_sequences_without_padding() -> None:
    prompt_B, response_B = torch.tensor([3, 5, 2]), torch.tensor([7, 1, 4])
    pairs = list(zip(prompt_B.tolist(), response_B.tolist(), strict=True))
    assert COUNT.sample(prompt_B, response_B) == sum(COUNT.sample(p, r) for p, r in pairs)
    assert COUNT.score(prompt_B + response_B) == sum(COUNT.score(p + r) for p, r in pairs)
    assert COUNT.update(prompt_B + response_B) == sum(COUNT.update(p + r) for p, r in pairs)


def test_counts_beyond_64_bits_stay_exact() -> None:
    huge = FlopCount(matmul_parameters=10**12, attention_per_position=10**7)
    length_B = torch.full((1000,), 100_000, dtype=torch.int32)
    assert huge.update(length_B) == 3 * 1000 * (2 * 10**12 * 100_000 + 10**7 * 100_000 * 100_001 // 2)


def test_rollouts_are_sampled_without_adapters() -> None:
    assert FlopCount(1000, 7, adapter_parameters=50).sample(5, 6) == FlopCount(1000, 7).sample(5, 6)


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        (BertConfig(**SMALL), "see those after them"),
        (
            GPTNeoConfig(vocab_size=50, hidden_size=24, num_layers=2, num_heads=4, attention_types=[[["global", "local"], 1]]),
            "full attention",
        ),
        (MambaConfig(vocab_size=50, hidden_size=24, num_hidden_layers=2), "full attention"),
        (MistralConfig(**SMALL, num_key_value_heads=2, sliding_window=16), "sliding_window to null"),
        (MixtralConfig(**SMALL, num_key_value_heads=2), "mixture of experts"),
        (OPTConfig(vocab_size=50, hidden_size=24, ffn_dim=40, num_attention_heads=5), "cannot count"),
        (Qwen3Config(**SMALL, use_sliding_window=True), "use_sliding_window"),
    ],
    ids=lambda of: getattr(of, "model_type", ""),
)
def test_what_cannot_be_counted_is_refused_in_one_line(config: Any, reason: str) -> None:
    with pytest.raises(UserError, match=reason) as raised:
        flop_count(config)
    assert "\n" not in str(raised.value)


def test_a_window_that_no_text_exceeds_is_full_attention() -> None:
    shape = {**SMALL, "num_key_value_heads": 2, "max_position_embeddings": 64}
    wide, none = (flop_count(MistralConfig(**shape, sliding_window=window)) for window in (64, None))
    assert wide == none
