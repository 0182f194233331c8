"""What is recorded along rollouts: divergences at living positions, and how far the models' likeliest tokens agree."""

from __future__ import annotations

import pytest
import torch
from conftest import EOS, RESPONSE, tiny_llama

from opd_bench.measure import TOP, divergence_by_position, divergences
from opd_bench.rollouts import sample
from opd_bench.sequences import Prompts

PROMPTS = Prompts([[2, 3, 4], [5, 6], [7, 8, 9, 2]], [""] * 3)


def rollouts(model):
    return sample(model, PROMPTS, max_response=RESPONSE, eos=EOS, generator=torch.Generator().manual_seed(0))


def test_a_model_agrees_with_itself():
    model = tiny_llama(1)
    values_NT, alive_NT, support = divergence_by_position(model, model, rollouts(model), RESPONSE)
    assert support == 1.0
    assert abs(values_NT).max() < 1e-6
    assert alive_NT.sum() == rollouts(model).response_tokens


def test_support_is_the_share_of_likeliest_tokens_both_models_name():
    student, teacher = tiny_llama(1), tiny_llama(2)
    own = rollouts(student)
    *_, support = divergence_by_position(student, teacher, own, RESPONSE)
    shares = []
    for row in range(len(own)):
        ids = own.ids_BT[row : row + 1, : own.length_B[row]]
        places = range(int(own.prompt_B[row]) - 1, int(own.length_B[row]) - 1)
        named = [[set(model(ids).logits[0, place].topk(TOP).indices.tolist()) for place in places] for model in (student, teacher)]
        shares += [len(ours & theirs) / TOP for ours, theirs in zip(*named, strict=True)]
    assert 0 < support < 1
    assert support == pytest.approx(sum(shares) / len(shares))


def test_the_support_of_a_record_is_that_on_the_students_rollouts(tmp_path):
    student, teacher = tiny_llama(1), tiny_llama(2)
    record = divergences(student, teacher, PROMPTS, max_response=RESPONSE, eos=EOS, seed=3, kept=tmp_path / "teacher.pt")
    own = sample(student, PROMPTS, max_response=RESPONSE, eos=EOS, generator=torch.Generator().manual_seed(3001))
    assert record.support == divergence_by_position(student, teacher, own, RESPONSE)[2]
