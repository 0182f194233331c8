"""Every verb charges what its tokens cost by hand; arms of a seed read one prompt stream; no request earns budget."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from opd_bench import bench as bench_module
from opd_bench.errors import RunError
from opd_bench.ledger import OverBudgetError
from opd_bench.losses import Tokens, cross_entropy, reverse_kl
from opd_bench.methods import find
from opd_bench.sequences import Prompts

METHODS = ("sft", "offline_kd", "opd", "opd_rlaif", "rlaif")


def scoring(flops, length_B) -> int:
    """2 FLOPs per matrix parameter and token, and attention to every position up to one's own."""
    return sum(2 * flops.matmul_parameters * n + flops.attention_per_position * n * (n + 1) // 2 for n in length_B.tolist())


def test_on_policy_charges_are_those_computed_by_hand(rig):
    bench = rig().bench
    rollouts = bench.sample(bench.prompts(5))
    assert len(set(rollouts.length_B.tolist())) > 1
    verdict_B = bench.judge(rollouts)
    bench.update(rollouts, reverse_kl, signal=bench.teacher(rollouts), weights=verdict_B)
    charged = bench.ledger.by_kind()
    assert charged["student_sample"] == scoring(bench.student_flops, rollouts.length_B - 1)  # the last token is not fed back
    assert charged["student_update"] == 3 * scoring(bench.student_flops, rollouts.length_B)
    assert charged["teacher_score"] == scoring(bench.teacher_flops, rollouts.length_B)
    asked_B = rollouts.length_B - rollouts.finished_B.long() + 2  # without EOS, with the question
    assert scoring(bench.teacher_flops, asked_B) <= charged["judge"] <= scoring(bench.teacher_flops, asked_B + 3 - 1)
    assert bench.ledger.by_kind("tokens")["student_sample"] == rollouts.response_tokens
    assert bench.ledger.spent == sum(charged.values())


def test_teacher_text_is_charged_as_generated_and_sft_sees_no_distribution(rig):
    bench = rig().bench
    texts = bench.teacher_corpus(6)
    bench.update(texts, cross_entropy)
    assert bench.ledger.by_kind() == {
        "teacher_generate": scoring(bench.teacher_flops, texts.length_B - 1),
        "student_update": 3 * scoring(bench.student_flops, texts.length_B),
    }
    assert bench.ledger.saw() == ["teacher text"]


def test_a_signal_that_is_not_used_is_not_charged(rig):
    bench = rig().bench
    texts = bench.teacher_corpus(2)
    bench.teacher(texts)
    assert "teacher_score" not in bench.ledger.by_kind()


def test_text_already_sampled_by_another_arm_costs_the_same(rig):
    first, second = rig().bench, rig().bench
    assert torch.equal(first.teacher_corpus(4).ids_BT, second.teacher_corpus(4).ids_BT)
    assert first.ledger.by_kind() == second.ledger.by_kind()
    assert first.ledger.by_kind("seconds") == second.ledger.by_kind("seconds")


def test_all_methods_of_a_seed_consume_a_prefix_of_one_stream(rig, monkeypatch):
    for name in METHODS:
        built, trained = rig(batch=8), []
        update = built.engine.update
        monkeypatch.setattr(built.engine, "update", lambda rows, *a, _u=update, _t=trained, **k: _t.append(rows) or _u(rows, *a, **k))
        method = find(name).build({"batch": 8})
        for _ in range(3):
            method.step(built.bench)
        met = [rows.ids_BT[row, : rows.prompt_B[row]].tolist() for rows in trained for row in range(0, len(rows), rows.group)]
        assert met == built.stream(0, built.bench.position).ids
        assert built.bench.position == 24 // method.unit


def test_epochs_replay_text_without_buying_it_again(rig, monkeypatch):
    monkeypatch.setattr(bench_module, "WINDOW", 8)
    bench = rig().bench
    passes = [bench.teacher_corpus(4, epochs=3) for _ in range(8)]
    bought = [charge for charge in bench.ledger.charges if charge.kind == "teacher_generate"]
    assert len(bought) == 4  # calls 1 and 2, then, after four of replay, 7 and 8
    assert bench.position == 16
    written = sorted(text.response(row) for text in passes[:6] for row in range(4))
    assert written == sorted(3 * [text.response(row) for text in passes[:2] for row in range(4)])


def test_requests_that_make_no_sense_are_refused_and_free(rig):
    bench = rig(10**9).bench
    prompts = bench.prompts(2)
    for request in (
        lambda: bench.prompts(0),
        lambda: bench.prompts(-1),
        lambda: bench.prompts(10**9),
        lambda: bench.teacher_corpus(10**9),
        lambda: bench.sample(prompts, group=0),
        lambda: bench.sample(prompts, group=-5),
        lambda: bench.sample(prompts, group=10**9),
        lambda: bench.sample(Prompts([], [])),
    ):
        with pytest.raises(RunError, match="sequences at once"):
            request()
    assert (bench.ledger.spent, bench.ledger.reserved, bench.position) == (0, 0, 2)


def test_lengths_cannot_be_forged_to_lower_a_charge(rig):
    bench = rig(10**9).bench
    rollouts = bench.sample(bench.prompts(3))
    for length in (-1000, 0, 10**6):
        length_B = rollouts.length_B.clone()
        length_B[0] = length
        with pytest.raises(RunError, match="at least a token each"):
            replace(rollouts, length_B=length_B)


def test_an_update_that_does_not_fit_is_charged_nothing(rig):
    bench = rig(10**9).bench
    rollouts = bench.sample(bench.prompts(8))
    scored = scoring(bench.teacher_flops, rollouts.length_B)
    bench.ledger.limit = bench.ledger.spent + scored + 1  # the scoring alone would fit
    before = [weight.clone() for weight in bench.engine.student.parameters()]
    with pytest.raises(OverBudgetError):
        bench.update(rollouts, reverse_kl, signal=bench.teacher(rollouts))
    assert set(bench.ledger.by_kind()) == {"student_sample"}
    assert all(torch.equal(old, new) for old, new in zip(before, bench.engine.student.parameters(), strict=True))


def test_an_update_that_fails_is_charged_and_leaves_nothing_behind(rig):
    def failing(logits_NV: torch.Tensor, tokens: Tokens) -> torch.Tensor:
        raise ValueError

    hurt, clean = rig(), rig()
    for built in (hurt, clean):
        built.engine.micro_tokens = 10  # several micro-batches
        texts = built.bench.teacher_corpus(4)
        if built is hurt:
            calls = iter([cross_entropy, failing])
            with pytest.raises(ValueError):  # noqa: PT011
                built.bench.update(texts, lambda *given, calls=calls: next(calls)(*given))
        built.bench.update(texts, cross_entropy)
    assert hurt.bench.ledger.by_kind()["student_update"] == 2 * clean.bench.ledger.by_kind()["student_update"]
    for one, other in zip(hurt.engine.student.parameters(), clean.engine.student.parameters(), strict=True):
        assert torch.equal(one, other)


def test_a_signal_or_weights_of_other_sequences_are_refused(rig):
    bench = rig().bench
    one, other = bench.teacher_corpus(2), bench.teacher_corpus(2)
    with pytest.raises(RunError, match="other sequences"):
        bench.update(one, reverse_kl, signal=bench.teacher(other))
    with pytest.raises(RunError, match="one weight per sequence"):
        bench.update(one, cross_entropy, weights=torch.ones(3))


def test_a_method_cannot_change_the_stream_of_the_others(rig):
    built = rig()
    built.bench.prompts(3).ids[0].clear()
    assert all(built.stream(0, 3).ids)
