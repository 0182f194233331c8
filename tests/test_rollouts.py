"""The sampler of this process samples any architecture, whatever the batch that a row is decoded in."""

from __future__ import annotations

import copy

import pytest
import torch
from conftest import tiny_llama
from test_samplers import CONTEXT, EOS, PROMPTS, VOCABULARY, assert_conforms, llama
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, Qwen3Config, Qwen3ForCausalLM

from opd_bench import rollouts
from opd_bench.decoder import fusible
from opd_bench.rollouts import sample
from opd_bench.scoring import ModelTeacher
from opd_bench.sequences import Prompts

STRETCHED = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}


@pytest.fixture(scope="module")
def model():
    return tiny_llama(3)


def sampled(model, prompts: Prompts = PROMPTS, seed: int | None = 0, max_response: int = 12, group: int = 1):
    generator = None if seed is None else torch.Generator().manual_seed(seed)
    return sample(model, prompts, max_response=max_response, eos=EOS, generator=generator, group=group)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("architecture", ["llama", "qwen3", "gpt2", "llama with dynamic rotation"])
def test_every_architecture_is_sampled_as_it_is(architecture, attention):
    """The first two with fused projections (of Qwen3 with its norms of queries and keys), the others through their own modules."""
    torch.manual_seed(3)
    ends = {"vocab_size": VOCABULARY, "eos_token_id": EOS, "pad_token_id": 0, "bos_token_id": None, "attn_implementation": attention}
    shape = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
    made = {
        "llama": lambda: LlamaForCausalLM(
            LlamaConfig(max_position_embeddings=CONTEXT, attention_bias=True, mlp_bias=True, **shape, **ends)
        ),
        "qwen3": lambda: Qwen3ForCausalLM(Qwen3Config(head_dim=16, max_position_embeddings=CONTEXT, **shape, **ends)),
        "gpt2": lambda: GPT2LMHeadModel(GPT2Config(n_embd=64, n_layer=2, n_head=2, n_positions=CONTEXT, **ends)),
        "llama with dynamic rotation": lambda: LlamaForCausalLM(
            LlamaConfig(max_position_embeddings=CONTEXT, rope_parameters=STRETCHED, **shape, **ends)
        ),
    }[architecture]().eval()
    with torch.no_grad():
        for name, weight in made.named_parameters():
            if name.endswith("bias"):
                weight.normal_(std=0.1)
            elif "norm" not in name and "ln_" not in name:
                weight.mul_(14 if fusible(made) else 8)  # such that the distributions are peaked and depend on the whole context
    assert fusible(made) == (architecture in ("llama", "qwen3"))
    assert_conforms(sample, made)


def test_rollouts_can_be_trained_on(model):
    assert not sampled(model).ids_BT.is_inference()


@pytest.mark.parametrize("tied", [True, False])
def test_in_another_precision_a_copy_of_the_model_writes(tied, tmp_path):
    made = llama(VOCABULARY, tied)
    made.save_pretrained(tmp_path)
    weights = copy.deepcopy(made.state_dict())
    lower = sampled_in(torch.bfloat16, made)
    plain = sampled_in(None, LlamaForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16).eval())
    assert torch.equal(lower.ids_BT, plain.ids_BT)
    assert torch.equal(lower.logprob_BT, plain.logprob_BT)
    assert all(torch.equal(weight, weights[name]) and weight.dtype == torch.float32 for name, weight in made.state_dict().items())
    exact_N = ModelTeacher(made)(lower)[:][0].gather(1, lower.ids_BT[lower.response_BT][:, None])[:, 0]
    assert 1e-4 < (lower.logprob_BT[lower.response_BT] - exact_N).abs().mean() < 0.1


def sampled_in(dtype: torch.dtype | None, model):
    return sample(model, PROMPTS, max_response=12, eos=EOS, generator=torch.Generator().manual_seed(0), group=8, dtype=dtype)


def test_eos_at_the_very_limit_counts_as_finished(model):
    drawn = sampled(model, Prompts([[3, 4, 5]], ["task"]), max_response=1, group=400)
    assert torch.equal(drawn.finished_B, drawn.ids_BT[:, 3] == EOS)
    assert drawn.finished_B.any()


def test_greedy_does_not_depend_on_padding_order_or_compaction(model, monkeypatch):
    alone = [sampled(model, Prompts([ids], ["task"]), seed=None).response(0) for ids in PROMPTS.ids]
    assert len({len(response) for response in alone}) > 1, "rows must end at different times for the batch to be compacted"
    backwards = Prompts(PROMPTS.ids[::-1], PROMPTS.tasks)
    for rows, compact in ((256, 0.8), (256, 0.0), (256, 1.0), (3, 0.8)):
        monkeypatch.setattr(rollouts, "ROWS", rows)
        monkeypatch.setattr(rollouts, "REFILL", compact)
        assert [sampled(model, seed=None).response(row) for row in range(8)] == alone
        assert [sampled(model, backwards, seed=None).response(row) for row in range(8)] == alone[::-1]
