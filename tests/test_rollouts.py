"""Rollouts follow the model's own distribution, whatever the batch they are decoded in."""

from __future__ import annotations

import pytest
import torch
from conftest import EOS, VOCABULARY, tiny_llama
from scipy.stats import chisquare
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, Qwen3Config, Qwen3ForCausalLM

from opd_bench import rollouts
from opd_bench.decoder import fusible
from opd_bench.rollouts import sample
from opd_bench.sequences import Prompts

STRETCHED = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}
PROMPTS = Prompts([[3, 4, 5, 6, 7], [8], [9, 2], [7, 7, 7], [2, 3, 4, 5, 6, 8, 9], [10, 2], [4], [5, 9, 3]], ["task"] * 8)


@pytest.fixture(scope="module", params=["llama", "qwen3", "gpt2", "scaled llama"])
def model(request):
    """Of an architecture with fused projections (the second with norms of queries and keys), and of two without."""
    if request.param == "llama":
        return tiny_llama(3)
    torch.manual_seed(3)
    ends = {"vocab_size": VOCABULARY, "eos_token_id": EOS, "pad_token_id": 0, "bos_token_id": None}
    shape = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
    made = {
        "qwen3": lambda: Qwen3ForCausalLM(Qwen3Config(head_dim=16, max_position_embeddings=64, **shape, **ends)),
        "gpt2": lambda: GPT2LMHeadModel(GPT2Config(n_embd=32, n_layer=2, n_head=2, n_positions=64, **ends)),
        "scaled llama": lambda: LlamaForCausalLM(LlamaConfig(max_position_embeddings=64, rope_parameters=STRETCHED, **shape, **ends)),
    }[request.param]().eval()
    with torch.no_grad():
        for name, weight in made.named_parameters():
            if "norm" not in name and "ln_" not in name:
                weight.mul_(8)
    assert fusible(made) == (request.param == "qwen3")
    return made


def sampled(model, prompts: Prompts = PROMPTS, seed: int | None = 0, max_response: int = 12, group: int = 1):
    generator = None if seed is None else torch.Generator().manual_seed(seed)
    return sample(model, prompts, max_response=max_response, eos=EOS, generator=generator, group=group)


def test_sampled_tokens_follow_the_models_distribution(model):
    """Chi-square of the first token, and of the second where a given first one came (so through the cache)."""
    drawn = sampled(model, Prompts([[3, 4, 5]], ["task"]), max_response=2, group=4000)
    first_B = drawn.ids_BT[:, 3]
    assert chi_square(model, [3, 4, 5], first_B) > 1e-3
    common = max((token for token in range(VOCABULARY) if token != EOS), key=lambda token: int((first_B == token).sum()))
    second_B = drawn.ids_BT[first_B == common, 4]
    assert len(second_B) > 500
    assert chi_square(model, [3, 4, 5, common], second_B) > 1e-3
    assert chi_square(model, [3, 4, 5], second_B) < 1e-4  # the test can tell distributions apart


@torch.no_grad()
def chi_square(model, prefix: list[int], tokens_B: torch.Tensor) -> float:
    expected_V = model(torch.tensor([prefix])).logits[0, -1].double().softmax(-1) * len(tokens_B)
    observed_V = torch.bincount(tokens_B, minlength=VOCABULARY).double()
    common_V = expected_V >= 5
    bins = [[*counts_V[common_V].tolist(), float(counts_V[~common_V].sum()) + 1e-9] for counts_V in (observed_V, expected_V)]
    return chisquare(*bins).pvalue


@torch.no_grad()
def test_log_probabilities_agree_with_a_teacher_forced_pass(model):
    drawn = sampled(model)
    for row in range(len(drawn)):
        start, end = int(drawn.prompt_B[row]), int(drawn.length_B[row])
        ids_T = drawn.ids_BT[row, :end]
        forced_TV = model(ids_T[None]).logits[0].log_softmax(-1)
        expected = forced_TV[start - 1 : end - 1].gather(1, ids_T[start:, None])[:, 0]
        torch.testing.assert_close(drawn.logprob_BT[row, start:end], expected, rtol=0, atol=1e-4)
    assert (drawn.logprob_BT[~drawn.response_BT] == 0).all()
    assert not drawn.ids_BT.is_inference()  # which could not be trained on


def test_finished_rows_end_with_eos_and_cut_rows_have_none(model):
    drawn = sampled(model)
    assert drawn.finished_B.any()
    assert not drawn.finished_B.all()
    for row in range(len(drawn)):
        response = drawn.response(row)
        assert (EOS in response) == bool(drawn.finished_B[row])
        if drawn.finished_B[row]:
            assert response.index(EOS) == len(response) - 1
        else:
            assert len(response) == 12


def test_eos_at_the_very_limit_counts_as_finished(model):
    drawn = sampled(model, Prompts([[3, 4, 5]], ["task"]), max_response=1, group=400)
    assert torch.equal(drawn.finished_B, drawn.ids_BT[:, 3] == EOS)
    assert drawn.finished_B.any()


def test_greedy_equals_generate_of_transformers(model):
    drawn = sampled(model, seed=None, max_response=20)
    for row, ids in enumerate(PROMPTS.ids):
        prompt = torch.tensor([ids])
        expected = model.generate(
            prompt, attention_mask=torch.ones_like(prompt), do_sample=False, max_new_tokens=20, eos_token_id=EOS, pad_token_id=0
        )
        assert drawn.response(row) == expected[0, len(ids) :].tolist()


def test_greedy_does_not_depend_on_padding_order_or_compaction(model, monkeypatch):
    alone = [sampled(model, Prompts([ids], ["task"]), seed=None).response(0) for ids in PROMPTS.ids]
    assert len({len(response) for response in alone}) > 1, "rows must end at different times for the batch to be compacted"
    backwards = Prompts(PROMPTS.ids[::-1], PROMPTS.tasks)
    for rows, compact in ((256, 0.8), (256, 0.0), (256, 1.0), (3, 0.8)):
        monkeypatch.setattr(rollouts, "ROWS", rows)
        monkeypatch.setattr(rollouts, "REFILL", compact)
        assert [sampled(model, seed=None).response(row) for row in range(8)] == alone
        assert [sampled(model, backwards, seed=None).response(row) for row in range(8)] == alone[::-1]


def test_a_group_shares_its_prompt_and_comes_in_order(model):
    drawn = sampled(model, group=3)
    assert (len(drawn), drawn.group) == (24, 3)
    for row in range(24):
        assert drawn.ids_BT[row, : drawn.prompt_B[row]].tolist() == PROMPTS.ids[row // 3]
    assert len({tuple(drawn.response(row)) for row in range(3)}) > 1


def test_the_same_generator_gives_the_same_rollouts(model):
    assert torch.equal(sampled(model, seed=5).ids_BT, sampled(model, seed=5).ids_BT)
    assert sampled(model, seed=5).ids_BT.tolist() != sampled(model, seed=6).ids_BT.tolist()
