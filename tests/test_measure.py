"""What is recorded along rollouts: measures at living positions, and how far the models' likeliest tokens agree."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from conftest import EOS, RESPONSE, VOCABULARY, tiny_llama
from transformers import Gemma2Config, Gemma2ForCausalLM

from opd_bench import measure
from opd_bench.errors import UserError
from opd_bench.measure import TOP, Rollouts, along, check
from opd_bench.sequences import Prompts

PROMPTS = Prompts([[2, 3, 4], [5, 6], [7, 8, 9, 2]] * 20, [""] * 60)


def recorded(student, teacher, tmp_path, seed=0, full=True):
    rollouts = Rollouts.of(student, teacher, PROMPTS, max_response=RESPONSE, eos=EOS, seed=seed, kept=tmp_path / "kept")
    return rollouts, *along(rollouts, full, tmp_path / "kept")


def test_a_model_agrees_with_itself(tmp_path):
    model = tiny_llama(1)
    _, found, temperature = recorded(model, model, tmp_path)
    for name in ("forward_kl", "reverse_kl", "total_variation", "log_ratio", "matched"):
        assert max(abs(found[name].student_NT).max(), abs(found[name].teacher_NT).max()) < 1e-6
    assert temperature == pytest.approx(1, abs=1e-5)  # float32
    assert np.array_equal(found["student_entropy"].teacher_NT, found["teacher_entropy"].teacher_NT)
    assert (found["support"].student_NT[found["support"].student_alive_NT] == 1).all()


def test_measures_keep_their_bounds_and_agree_where_they_must(tmp_path):
    _, found, _ = recorded(tiny_llama(1), tiny_llama(2), tmp_path)
    kl, ratio = found["forward_kl"], found["log_ratio"]
    assert np.allclose(kl.student_NT[:, 0], kl.teacher_NT[:, 0], atol=1e-5)  # both stand on the prompt
    assert 0 <= found["total_variation"].student_NT.min() <= found["total_variation"].student_NT.max() <= 1
    difference = (ratio.student_NT - kl.student_NT)[kl.student_alive_NT]
    assert abs(difference.mean()) < 4 * difference.std(ddof=1) / len(difference) ** 0.5
    assert difference.std() > 0


def test_the_matched_student_has_the_teachers_entropy(tmp_path):
    student, teacher = tiny_llama(1), tiny_llama(2)
    _, found, temperature = recorded(student, teacher, tmp_path)
    assert temperature is not None
    rollouts = Rollouts.of(student, teacher, PROMPTS, max_response=RESPONSE, eos=EOS, seed=0, kept=tmp_path / "kept")
    student.lm_head.weight.data /= temperature
    cooled = Rollouts.of(student, teacher, PROMPTS, max_response=RESPONSE, eos=EOS, seed=0, kept=tmp_path / "kept")
    assert torch.equal(rollouts.theirs.ids_BT, cooled.theirs.ids_BT)
    again, _ = along(cooled, True, tmp_path / "kept")
    assert again["student_entropy"].teacher_NT.sum() == pytest.approx(found["teacher_entropy"].teacher_NT.sum(), rel=0.02)


def test_chunks_and_what_was_kept_change_nothing(tmp_path, monkeypatch):
    student, teacher = tiny_llama(1), tiny_llama(2)
    _, whole, _ = recorded(student, teacher, tmp_path)
    monkeypatch.setattr(measure, "CHUNK_LOGITS", 7 * VOCABULARY)
    for folder in (tmp_path, tmp_path / "anew"):
        _, chunked, _ = recorded(student, teacher, folder)
        for name, of in whole.items():
            if name not in ("log_ratio", "matched"):  # these draw, and match on fewer positions
                np.testing.assert_allclose(chunked[name].student_NT, of.student_NT, atol=1e-6)
                np.testing.assert_allclose(chunked[name].teacher_NT, of.teacher_NT, atol=1e-6)


def test_padding_of_the_vocabulary_leaves_the_divergence_over_the_tokens_both_have(tmp_path):
    student, teacher = tiny_llama(1), tiny_llama(2)
    _, found, _ = recorded(student, teacher, tmp_path, full=False)
    teacher.resize_token_embeddings(VOCABULARY + 8)
    teacher.lm_head.weight.data[VOCABULARY:] = 0  # far likelier than untrained padding is
    rollouts = Rollouts.of(student, teacher, PROMPTS, max_response=RESPONSE, eos=EOS, seed=0, kept=tmp_path / "kept")
    padded, _ = along(rollouts, False, tmp_path / "padded")
    np.testing.assert_allclose(padded["forward_kl"].student_NT, found["forward_kl"].student_NT, atol=1e-5)


def test_a_model_that_cannot_be_measured_says_so():
    broken, capped = tiny_llama(1), Gemma2ForCausalLM(Gemma2Config(vocab_size=16, hidden_size=8, num_hidden_layers=1, num_attention_heads=1,
        num_key_value_heads=1, head_dim=8, intermediate_size=8, final_logit_softcapping=0.01, pad_token_id=0))  # fmt: skip
    check(broken, [2, 3], "student")
    broken.lm_head.weight.data[3] = float("nan")
    with pytest.raises(UserError, match="the student's logits are not finite"):
        check(broken, [2, 3], "student")
    with pytest.raises(UserError, match=r"the teacher scales or caps the logits of its output head \(gemma2\)"):
        check(capped, [2, 3], "teacher")


def test_support_is_the_share_of_likeliest_tokens_both_models_name(tmp_path):
    student, teacher = tiny_llama(1), tiny_llama(2)
    rollouts, found, _ = recorded(student, teacher, tmp_path)
    own, support = rollouts.own, found["support"]
    for row in range(6):
        ids = own.ids_BT[row : row + 1, : own.length_B[row]]
        places = range(int(own.prompt_B[row]) - 1, int(own.length_B[row]) - 1)
        named = [[set(model(ids).logits[0, place].topk(TOP).indices.tolist()) for place in places] for model in (student, teacher)]
        shares = [len(ours & theirs) / TOP for ours, theirs in zip(*named, strict=True)]
        assert support.student_NT[row, : len(shares)].tolist() == pytest.approx(shares)


def test_the_teachers_rollouts_depend_on_the_seed_alone_and_a_recording_repeats(tmp_path):
    student, teacher = tiny_llama(1), tiny_llama(2)
    first, found, _ = recorded(student, teacher, tmp_path)
    second, again, _ = recorded(student, teacher, tmp_path)
    other, _, _ = recorded(tiny_llama(3), teacher, tmp_path)
    assert torch.equal(first.theirs.ids_BT, other.theirs.ids_BT)
    assert torch.equal(first.own.ids_BT, second.own.ids_BT)
    assert all(np.array_equal(found[name].student_NT, again[name].student_NT) for name in found)
    short, _ = along(first, False, tmp_path / "kept")
    assert list(short) == ["forward_kl"]
    assert np.array_equal(short["forward_kl"].student_NT, found["forward_kl"].student_NT)
