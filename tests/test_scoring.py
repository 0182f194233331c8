"""A teacher's signal is the same whoever gives it, dense or reduced to its likeliest tokens, kept or computed."""

from __future__ import annotations

import sqlite3
from dataclasses import replace

import pytest
import torch
from conftest import EOS, VOCABULARY, tiny_llama
from test_engine import ROWS, sequences

from opd_bench.errors import UserError
from opd_bench.losses import DIVERGENCES, Tokens, forward_kl, reverse_kl, total_variation
from opd_bench.rollouts import sample
from opd_bench.scoring import ModelTeacher, likeliest, signal_error
from opd_bench.sequences import Prompts, concatenate
from opd_bench.teacher_cache import CachedTeacher


@pytest.fixture
def teacher():
    return ModelTeacher(tiny_llama(2))


class Counting:
    """A teacher that counts the rows it is asked for."""

    def __init__(self, teacher: ModelTeacher) -> None:
        self.teacher, self.rows = teacher, 0

    def __call__(self, batch):
        self.rows += len(batch)
        return self.teacher(batch)


def pair(n: int = 40, v: int = 11) -> tuple[torch.Tensor, torch.Tensor]:
    draw = torch.Generator().manual_seed(1)
    return (torch.randn(n, v, generator=draw) * 2).log_softmax(-1), torch.randn(n, v, generator=draw) * 2


def of(loss, logits_NV, teacher_NE, top_NK=None):
    count = len(logits_NV)
    return loss(logits_NV, Tokens(torch.zeros(count, dtype=torch.long), teacher_NE, torch.ones(count), top_NK))


@pytest.mark.parametrize("name", sorted(DIVERGENCES))
def test_a_sparse_divergence_is_that_of_the_merged_distributions(name):
    """Against a vocabulary in which the other tokens have been added up by hand, in double precision."""
    teacher_NV, logits_NV = pair()
    sparse = likeliest(teacher_NV, 4)
    rows = torch.arange(len(teacher_NV))[:, None]
    merged = []
    for log_probs_NV in (teacher_NV.double(), logits_NV.double().log_softmax(-1)):
        kept_NK = log_probs_NV[rows, sparse.top_NK]
        merged.append(torch.cat((kept_NK, torch.log1p(-kept_NK.exp().sum(-1, keepdim=True))), -1))
    expected_N = of(DIVERGENCES[name], merged[1].float(), merged[0].float())
    found_N = of(DIVERGENCES[name], logits_NV, sparse.log_probs_NE, sparse.top_NK)
    torch.testing.assert_close(found_N, expected_N, rtol=1e-5, atol=1e-6)
    assert (found_N <= of(DIVERGENCES[name], logits_NV, teacher_NV) + 1e-6).all()  # data-processing inequality
    assert (found_N > 1e-4).any()


@pytest.mark.parametrize("loss", [forward_kl, reverse_kl, total_variation])
def test_a_sparse_divergence_of_all_tokens_but_one_is_the_dense_one_with_its_gradient(loss):
    teacher_NV, logits_NV = pair()
    sparse = likeliest(teacher_NV, VOCABULARY - 1)
    gradients = []
    for signal in ((teacher_NV, None), (sparse.log_probs_NE, sparse.top_NK)):
        leaf_NV = logits_NV.clone().requires_grad_()
        values_N = of(loss, leaf_NV, *signal)
        gradients.append((values_N.detach(), torch.autograd.grad(values_N.sum(), leaf_NV)[0]))
    torch.testing.assert_close(gradients[0], gradients[1], rtol=1e-4, atol=1e-6)


def test_a_kept_distribution_is_what_the_model_says(teacher, tmp_path):
    cached, batch = CachedTeacher(teacher, 5, tmp_path / "scores.sqlite"), sequences(*ROWS)
    dense_NV, _ = teacher(batch)[:]
    first, again = cached(batch)[:], cached(batch)[:]
    assert all(torch.equal(one, two) for one, two in zip(first, again, strict=True))
    torch.testing.assert_close(first[0][:, :-1], dense_NV.gather(1, first[1]), rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(first[0].exp().sum(-1), torch.ones(len(dense_NV)), rtol=0, atol=5e-3)
    assert torch.equal(first[1], dense_NV.topk(5).indices)
    error = signal_error(cached, teacher, batch)
    assert 0 < error["largest_gap"] < 5e-3
    assert error["other_mass"] == pytest.approx(float(1 - dense_NV.exp().topk(5).values.sum(-1).mean()), abs=2e-3)


def test_a_text_is_scored_once_whatever_batch_or_process_it_comes_in(teacher, tmp_path):
    counting = Counting(teacher)
    batch = sequences(*ROWS)
    whole = CachedTeacher(counting, 5, tmp_path / "scores.sqlite")(batch)[:]
    assert counting.rows == len(batch)
    later = CachedTeacher(counting, 5, tmp_path / "scores.sqlite")
    parts = [later(batch[[row]])[:] for row in range(len(batch))]
    assert counting.rows == len(batch)
    assert torch.equal(torch.cat([log_probs_NE for log_probs_NE, _ in parts]), whole[0])
    later(sequences(([3, 4], [5, 6, 7, 7])))  # another text
    CachedTeacher(counting, 6, tmp_path / "scores.sqlite")(batch[:1])  # another number of tokens
    later(sequences(([3, 4, 5], [6, 7, EOS])))  # the first text with another prompt
    assert counting.rows == len(batch) + 3


def test_rollouts_of_a_student_are_reduced_and_not_kept(teacher, tmp_path):
    counting, batch = Counting(teacher), replace(sequences(*ROWS), updates=3)
    cached = CachedTeacher(counting, 5, tmp_path / "scores.sqlite")
    assert cached(batch)[:][0].shape == (batch.response_tokens, 6)
    cached(batch)
    assert counting.rows == 2 * len(batch)


def test_a_damaged_cache_is_named(teacher, tmp_path):
    (tmp_path / "scores.sqlite").write_bytes(b"no database at all" * 100)
    with pytest.raises(UserError, match=r"scores\.sqlite.*delete it"):
        CachedTeacher(teacher, 5, tmp_path / "scores.sqlite")(sequences(*ROWS))


def test_a_full_disk_is_named(teacher, tmp_path, monkeypatch):
    cached = CachedTeacher(teacher, 5, tmp_path / "scores.sqlite")
    cached(sequences(*ROWS[:1]))
    connect = sqlite3.connect

    def full(*arguments, **options):
        file = connect(*arguments, **options)
        file.execute("PRAGMA max_page_count = 1")  # below what the file has: no page can be added
        return file

    monkeypatch.setattr(sqlite3, "connect", full)
    texts = [
        sample(teacher.model, Prompts([[3, 4]], ["a"]), max_response=40, eos=99, generator=torch.Generator().manual_seed(n))
        for n in range(40)
    ]
    with pytest.raises(UserError, match=r"full.*free some space"):
        cached(concatenate(texts))
