"""The audit finds out a judge that rewards length, order or nothing at all, and clears one that does not."""

# pyright: reportOptionalMemberAccess=false, reportOptionalOperand=false, reportOperatorIssue=false
from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
from scipy import stats
from test_leaderboard import arms_of, read, run_of, write

from opd_bench import gates, judge_report, plots, report
from opd_bench.assemble import assemble
from opd_bench.judge_audit import Judged, audited, rise
from opd_bench.ledger import VERIFIER
from opd_bench.statistics import Interval, auroc, over_seeds

ITEMS, STEPS = 48, 40
WEIGHTS = {"arithmetic": 0.25, "trace": 0.25, "functions": 0.5}


def judged(seed: int, score, swap=None, reward=lambda share: 0.5, accuracy=lambda share: 0.5, kind: str = "judge") -> Judged:
    """One arm's judge, whose verdict is ``score(right, length, noise)``; right answers are shorter, as they often are."""
    rng = np.random.default_rng(seed)
    right_N = {task: (rng.random(ITEMS) < 0.5).astype(float) for task in WEIGHTS}
    tokens_N = {task: np.round(rng.normal(60 - 20 * right_N[task], 12)) for task in WEIGHTS}
    verdict_N = {task: np.clip(score(right_N[task], tokens_N[task], rng.normal(0, 0.1, ITEMS)), 0, 1) for task in WEIGHTS}
    share_K = np.linspace(0.02, 1, STEPS)
    along = (np.array([of(share) for share in share_K]) + rng.normal(0, 0.02, STEPS) for of in (reward, accuracy))
    swapped_N = swap and {task: np.clip(swap(verdict_N[task]), 0, 1) for task in WEIGHTS}
    cost = {"verdicts": 100.0, "tokens": 3000.0, "flops": 5e9, "dollars": 0.2, "seconds": 10.0}
    return Judged("scripted", kind, cost, verdict_N, right_N, tokens_N, {t: np.zeros(ITEMS) for t in WEIGHTS}, swapped_N, share_K, *along)


def fair(right_N, tokens_N, noise_N):
    return 0.2 + 0.6 * right_N + noise_N


def verbose(right_N, tokens_N, noise_N):
    return 0.2 + 0.4 * right_N + 0.005 * tokens_N + noise_N


def seeds(count: int, *script, **more) -> list[Judged]:
    return [judged(seed, *script, **more) for seed in range(count)]


def clears_zero(interval: Interval | None) -> bool:
    assert interval is not None
    return interval.excludes_zero


@pytest.mark.parametrize("count", [1, 4])
def test_a_judge_that_rewards_length_is_found_out_and_one_that_does_not_is_cleared(count: int):
    assert not clears_zero(audited(seeds(count, fair), WEIGHTS).length_bias)
    found = audited(seeds(count, verbose), WEIGHTS).length_bias
    assert clears_zero(found)
    assert found.mean > 0.2
    assert audited(seeds(count, lambda right, tokens, noise: verbose(right, -tokens, noise) + 0.6), WEIGHTS).length_bias.high < 0


def test_a_fair_judge_is_cleared_as_often_as_the_interval_promises():
    found = [clears_zero(audited([judged(seed, fair)], WEIGHTS, draws=200).length_bias) for seed in range(60)]
    assert np.mean(found) < 0.15


def test_length_bias_is_spearmans_within_each_kind_of_answer():
    arm = judged(0, verbose)
    parts = [
        (np.sum(chosen), stats.spearmanr(arm.verdict_N[task][chosen], arm.tokens_N[task][chosen])[0])
        for task in WEIGHTS
        for chosen in (arm.right_N[task] == 1, arm.right_N[task] == 0)
    ]
    expected = sum(count * value for count, value in parts) / sum(count for count, _ in parts)
    assert audited([arm], WEIGHTS).length_bias.mean == pytest.approx(expected)


def test_a_judge_that_heeds_the_order_of_its_options_is_found_out():
    moved = audited(seeds(3, fair, lambda verdict_N: verdict_N + 0.15), WEIGHTS)
    assert moved.signed_shift.low > 0.1
    assert moved.shift.mean == pytest.approx(moved.signed_shift.mean)
    steady = audited(seeds(3, fair, lambda verdict_N: verdict_N), WEIGHTS)
    assert (steady.shift.mean, steady.signed_shift.mean) == (0, 0)
    assert audited(seeds(3, fair), WEIGHTS).shift is None


def test_skill_is_agreement_and_auroc_over_seeds_and_tasks():
    arms = seeds(2, lambda right, tokens, noise: 0.4 + 0.1 * right + noise)
    found = audited(arms, WEIGHTS)
    each = [auroc(arm.verdict_N[task].tolist(), (arm.right_N[task] > 0.5).tolist()) for arm in arms for task in WEIGHTS]
    assert found.auroc.mean == pytest.approx(np.mean(np.array(each, float)))
    assert found.auroc.low < found.auroc.mean <= found.auroc.high <= 1
    blind = audited(seeds(2, lambda right, tokens, noise: 0.5 + noise), WEIGHTS)
    assert blind.auroc.low < 0.5 < blind.auroc.high
    mute = audited(seeds(2, lambda right, tokens, noise: 0.5 + 0 * noise), WEIGHTS)
    assert (mute.agreement.mean, mute.auroc.mean, mute.length_bias.mean) == (0.5, 0.5, 0.0)
    assert found.cost == {"tokens": 30.0, "flops": 5e7, "dollars": 0.002, "seconds": 0.1}


@pytest.mark.parametrize(
    ("reward", "accuracy", "said"),
    [
        (lambda share: 0.4 + 0.4 * share, lambda share: 0.6 - 0.3 * share, "which is reward hacking"),
        (lambda share: 0.4 + 0.4 * share, lambda share: 0.5, "as in reward hacking"),
        (lambda share: 0.4 + 0.4 * share, lambda share: 0.4 + 0.2 * share, "both rise"),
        (lambda share: 0.5, lambda share: 0.4 + 0.2 * share, "no sign of reward hacking"),
    ],
)
def test_reward_hacking_is_a_reward_that_rises_without_the_truth(reward, accuracy, said: str):
    found = audited(seeds(4, fair, reward=reward, accuracy=accuracy), WEIGHTS)
    if said == "as in reward hacking":
        assert found.said.endswith((said + ".", "which is reward hacking.", "both rise.")), found.said
        assert abs(found.accuracy_rise.mean) < 0.02
    else:
        assert said in found.said


def test_a_rise_is_the_last_third_of_what_was_spent_minus_the_first():
    share_K = np.array([0.1, 0.3, 0.5, 0.8, 0.9])
    assert rise(share_K, np.array([1.0, 2.0, 9.0, 4.0, np.nan])) == pytest.approx(4.0 - (1.0 + 2.0) / 2)
    assert rise(share_K, np.full(5, np.nan)) is None
    assert over_seeds([0.1, None]) is None
    assert over_seeds([0.1]) == Interval(0.1, None, None)


def test_a_stage_that_is_judged_late_is_judged_by_its_own_thirds():
    assert rise(np.array([0.7, 0.8, 0.9, 1.0]), np.array([1.0, 5.0, 5.0, 4.0])) == pytest.approx(4.0 - 1.0)
    assert rise(np.array([0.7]), np.array([1.0])) is None
    interval = over_seeds([0.1, 0.2, 0.3])
    assert interval is not None
    assert interval.high == pytest.approx(0.2 + stats.t.ppf(0.975, 2) * 0.1 / 3**0.5)


def test_one_seed_says_how_reward_and_truth_moved_and_not_how_sure_that_is():
    assert "one seed does not say" in audited(seeds(1, fair), WEIGHTS).said


def board_of(judges: list[Judged]):
    arms = arms_of({"feedback": 0.7, "other": 0.6}, 2)
    own = iter(judges)
    saw = [VERIFIER if judges[0].rlvr else "judge"]
    arms = [replace(arm, saw=saw, judge_auroc=0.9, judged=next(own)) if arm.method == "feedback" else arm for arm in arms]
    return assemble(run_of(2), arms), arms


def test_the_audit_stands_in_the_leaderboard_and_beside_it(tmp_path):
    judges = seeds(2, verbose, lambda verdict_N: verdict_N + 0.1)
    board, _ = board_of(judges)
    write(board, tmp_path / "leaderboard.json")
    assert read(tmp_path / "leaderboard.json") == board
    (audit,) = [method.judge for method in board.methods if method.judge]
    assert "length bias" in report.markdown(board)
    page = judge_report.markdown({"feedback": audit})
    assert "prefers longer ones" in page
    assert "With its options in the other order a verdict moves by" in page
    document = json.loads(judge_report.to_json({"feedback": audit}, {"feedback": judges}))
    assert document["judges"]["feedback"]["length_bias"]["mean"] == audit.length_bias.mean
    assert len(document["along"]["feedback"][0]["verified"]) == STEPS
    path = plots.draw_judges({"feedback": judges}, ["feedback", "other"], tmp_path)
    assert path.read_bytes().startswith(b"\x89PNG")


def test_the_figure_draws_reward_and_accuracy_of_the_same_rollouts():
    arms = seeds(2, fair, reward=lambda share: share, accuracy=lambda share: 1 - share)
    axes = plots.reward_and_accuracy({"feedback": arms}, ["feedback"]).axes[0]
    reward, accuracy = (np.asarray(line.get_ydata(), float) for line in axes.lines)
    assert reward[0] < 0.1 < 0.9 < reward[-1]
    assert accuracy[-1] < 0.1 < 0.9 < accuracy[0]


def test_a_judge_that_gives_no_verdicts_trips_its_gate():
    garbage = [replace(one, unreadable_N={task: np.full(ITEMS, 1.0) for task in WEIGHTS}) for one in seeds(2, fair)]
    board, _ = board_of(garbage)
    (gate,) = [gate for gate in board.gates if gate.name == "judge" and gate.held is False]
    assert "returns garbage: 100% of its answers" in gate.said
    assert next(method.rank for method in board.methods if method.name == "feedback") is None
    assert gates.GARBAGE == 0.2


def test_the_verifier_as_reward_is_said_to_be_rlvr_and_no_judge():
    board, _ = board_of(seeds(2, fair, kind=VERIFIER))
    (gate,) = [gate for gate in board.gates if gate.name == "judge"]
    assert (gate.held, "RLVR" in gate.said) == (None, True)
    (audit,) = [method.judge for method in board.methods if method.judge]
    assert audit.rlvr
    assert "RLVR" in audit.said
