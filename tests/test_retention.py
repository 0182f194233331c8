"""Retention: nothing is lost where nothing changed, and what is lost is what the distributions say."""

import numpy as np
import pytest
import torch

from opd_bench.embedded.fit import new_llama
from opd_bench.errors import UserError
from opd_bench.retention import measure, written

TEMPLATE = "{% for m in messages %}Q:{{ m.content }}\n{% endfor %}{% if add_generation_prompt %}A:{% endif %}"
COUNT, LENGTH = 6, 12


@pytest.fixture
def chatting(tokenizer, monkeypatch):
    monkeypatch.setattr(tokenizer, "chat_template", TEMPLATE)
    return tokenizer


@pytest.fixture(scope="module")
def start(tokenizer):
    return new_llama(32, 1, tokenizer, seed=0).eval()


@pytest.fixture
def texts(start, chatting, tmp_path):
    return written(start, chatting, count=COUNT, max_response=LENGTH, kept=tmp_path / "retention.pt")


def test_the_start_writes_a_users_message_and_answers_it(texts, chatting):
    assert len(texts) == COUNT
    asked = [chatting.decode(texts.ids_BT[row, : texts.prompt_B[row]]) for row in range(COUNT)]
    assert all(text.startswith("Q:") and text.endswith("\nA:") for text in asked)
    assert len(set(asked)) > 1
    assert ((texts.length_B - texts.prompt_B) <= LENGTH).all()


def test_the_texts_are_written_once_and_are_the_same_for_all_arms(start, chatting, texts, tmp_path):
    again = written(new_llama(32, 1, chatting, seed=9), chatting, count=COUNT, max_response=LENGTH, kept=tmp_path / "retention.pt")
    assert torch.equal(again.ids_BT, texts.ids_BT)
    anew = written(start, chatting, count=COUNT, max_response=LENGTH, kept=tmp_path / "other.pt")
    assert torch.equal(anew.ids_BT, texts.ids_BT)


def test_a_student_that_was_not_trained_has_lost_nothing(start, texts):
    assert all((of_N == 0).all() for of_N in measure(start, start, texts).values())


def test_what_is_measured_is_the_divergence_and_the_gain_of_each_text(start, tokenizer, texts):
    student = new_llama(32, 1, tokenizer, seed=1).eval()
    found = measure(student, start, texts)
    for row in range(COUNT):
        ids_T, prompt = texts.ids_BT[row, : texts.length_B[row]], int(texts.prompt_B[row])
        with torch.no_grad():
            before_TV, after_TV = (model(ids_T[None]).logits[0, prompt - 1 : -1].log_softmax(-1) for model in (start, student))
        kl = (before_TV.exp() * (before_TV - after_TV)).sum(-1).mean()
        gain = (after_TV - before_TV).gather(1, ids_T[prompt:, None]).mean()
        assert found["kl"][row] == pytest.approx(kl.item(), rel=1e-4, abs=1e-6)
        assert found["gain"][row] == pytest.approx(gain.item(), rel=1e-4, abs=1e-6)
    assert (found["kl"] > 0).all()
    assert np.isfinite(found["gain"]).all()


def test_a_template_that_hides_the_message_is_refused(start, tokenizer, monkeypatch, tmp_path):
    monkeypatch.setattr(tokenizer, "chat_template", "{{ messages | length }}")
    with pytest.raises(UserError, match=r"retention\.prompts"):
        written(start, tokenizer, count=1, max_response=2, kept=tmp_path / "x.pt")
