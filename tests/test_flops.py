"""The analytic count agrees with torch's own counter and with published sizes, exactly."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM, BertConfig, DynamicCache, GPT2Config, LlamaConfig, Qwen3Config

from opd_bench.errors import UserError
from opd_bench.flops import FlopCount, causal, flop_count

SMALL: dict[str, Any] = {"vocab_size": 50, "hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 2, "num_attention_heads": 4}
CONFIGS = {
    "llama": LlamaConfig(**SMALL, num_key_value_heads=4),
    "llama-grouped": LlamaConfig(**SMALL, num_key_value_heads=2),
    "llama-tied": LlamaConfig(**SMALL, num_key_value_heads=1, tie_word_embeddings=True),
    "qwen3": Qwen3Config(**SMALL, num_key_value_heads=2, head_dim=10),
    "gpt2": GPT2Config(vocab_size=50, n_embd=24, n_layer=2, n_head=4, n_inner=36),
}
EVERY = pytest.mark.parametrize("name", sorted(CONFIGS))
COUNT = FlopCount(matmul_parameters=1000, attention_per_position=7)


def eager(name: str) -> torch.nn.Module:
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(CONFIGS[name], attn_implementation="eager")


def counted(counter: FlopCounterMode) -> int:
    """What torch counted outside the rotary embedding, a matrix product in some versions of transformers, which we leave out."""
    rotary = [sum(ops.values()) for module, ops in counter.get_flop_counts().items() if module.endswith("rotary_emb")]
    return counter.get_total_flops() - sum(rotary)


@EVERY
def test_forward_and_backward_match_torch(name: str) -> None:
    model, ids_BT = eager(name), torch.randint(50, (3, 9), generator=torch.Generator().manual_seed(0))
    forward = flop_count(CONFIGS[name]).forward(tokens=27, attended=3 * 9 * 9)
    with FlopCounterMode(display=False) as counter:
        loss = model(ids_BT, use_cache=False).logits.square().mean()
    assert counted(counter) == forward
    with FlopCounterMode(display=False) as counter:
        loss.backward()
    assert counted(counter) == 2 * forward


@EVERY
def test_cached_decoding_matches_torch(name: str) -> None:
    model, count = eager(name), flop_count(CONFIGS[name])
    prompt, response = 5, 4
    cache, ids_BT = DynamicCache(config=CONFIGS[name]), torch.ones(1, prompt, dtype=torch.long)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        for _ in range(response):
            logits_BTV = model(ids_BT, past_key_values=cache, use_cache=True).logits
            ids_BT = logits_BTV[:, -1:].argmax(-1)
    unseen = prompt * prompt - causal(0, prompt)  # torch counts the whole square of the prefill
    assert counted(counter) == count.sample(prompt, response) + count.attention_per_position * unseen


@pytest.mark.parametrize(
    ("config", "parameters", "attention"),
    [  # the published totals less the norms: (2 L + 1) D, with 2 L q more in Qwen3; GPT-2 also less biases and positions
        (
            LlamaConfig(
                vocab_size=49152,
                hidden_size=576,
                intermediate_size=1536,
                num_hidden_layers=30,
                num_attention_heads=9,
                num_key_value_heads=3,
                tie_word_embeddings=True,
            ),
            134_515_008 - 61 * 576,  # SmolLM2-135M
            30 * 4 * 9 * 64,
        ),
        (
            Qwen3Config(
                vocab_size=151936,
                hidden_size=1024,
                intermediate_size=3072,
                num_hidden_layers=28,
                num_attention_heads=16,
                num_key_value_heads=8,
                head_dim=128,
                tie_word_embeddings=True,
            ),
            596_049_920 - 57 * 1024 - 56 * 128,  # Qwen3-0.6B
            28 * 4 * 16 * 128,
        ),
        (GPT2Config(), 124_439_808 - 1024 * 768 - 25 * 2 * 768 - 12 * 9 * 768, 12 * 4 * 768),  # GPT-2 small
    ],
)
def test_parameters_of_published_models(config: LlamaConfig | Qwen3Config | GPT2Config, parameters: int, attention: int) -> None:
    assert flop_count(config) == FlopCount(parameters, attention)


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


def test_unknown_architecture_names_the_supported_ones() -> None:
    with pytest.raises(UserError, match=r"'bert'.*gpt2, llama, qwen3"):
        flop_count(BertConfig())


def test_sliding_window_is_refused() -> None:
    with pytest.raises(UserError, match="use_sliding_window"):
        flop_count(Qwen3Config(**SMALL, use_sliding_window=True))
