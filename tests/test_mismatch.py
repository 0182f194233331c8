"""The gap between sampler and trainer is measured on fresh rollouts, and tokens beyond the threshold are weighted."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from conftest import EOS

from opd_bench.losses import Tokens, cross_entropy
from opd_bench.mismatch import CAP, Mismatch
from opd_bench.rollouts import sample


def test_a_float32_engine_agrees_with_its_sampler_and_nothing_is_weighted(rig):
    engine, bench = rig().engine, rig().bench
    for _ in range(3):  # each time with the weights of the update before
        batch = engine.sample(bench.prompts(8), 1)
        engine.update(batch, cross_entropy, teacher=False, weights_B=None, lr_scale=1.0)
    assert engine.mismatch.tokens >= 24
    assert 0 <= engine.mismatch.mean <= engine.mismatch.largest < 1e-4
    assert engine.mismatch.weighted == 0


def test_only_rollouts_of_the_present_weights_are_measured(rig):
    engine, bench = rig().engine, rig().bench
    batch = engine.sample(bench.prompts(8), 1)
    theirs, _ = engine.teacher_text(range(4))
    engine.update(theirs, cross_entropy, teacher=False, weights_B=None, lr_scale=1.0)
    engine.update(batch, cross_entropy, teacher=False, weights_B=None, lr_scale=1.0)
    assert engine.mismatch == Mismatch()


def test_a_sampler_that_reports_other_log_probabilities_is_seen_and_its_tokens_weighted(rig):
    engine, bench = rig().engine, rig().bench

    def off(*arguments, **options):
        drawn = sample(*arguments, **options)
        return replace(drawn, logprob_BT=(drawn.logprob_BT - 0.5) * drawn.response_BT)

    engine.sampler = off
    batch = engine.sample(bench.prompts(8), 1)
    engine.update(batch, cross_entropy, teacher=False, weights_B=None, lr_scale=1.0)
    assert engine.mismatch.mean == pytest.approx(0.5, abs=1e-4)
    assert engine.mismatch.weighted == engine.mismatch.tokens == batch.response_tokens


def test_the_weight_is_the_truncated_importance_ratio():
    """Golden: tokens that the trainer finds e^0.1 and e^3 times as likely as the sampler did, and one within the threshold."""
    logits_MV = torch.zeros(3, 4, requires_grad=True)
    tokens = Tokens(torch.tensor([0, 1, EOS]), None, torch.ones(3))
    sampled_M = torch.tensor([0.25, 0.25, 0.25]).log() - torch.tensor([0.1, 3.0, 0.001])
    noted = Mismatch()
    loss_M = noted.corrected(cross_entropy, sampled_M)(logits_MV, tokens)
    plain_M = cross_entropy(logits_MV, tokens)
    torch.testing.assert_close(loss_M, plain_M * torch.tensor([torch.tensor(0.1).exp(), CAP, 1.0]))
    assert (noted.tokens, noted.weighted) == (3, 2)
    assert noted.largest == pytest.approx(3.0, abs=1e-5)
