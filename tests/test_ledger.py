"""The ledger reserves before, charges after, and cannot be overspent."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from opd_bench.errors import RunError
from opd_bench.ledger import STUDENT_TOKENS, Axis, Dollars, Ledger, OverBudgetError, Seconds, Tokens


def test_a_reserve_is_refunded_what_it_did_not_use():
    ledger = Ledger(100)
    with ledger.reserve("student_sample", 60) as bill:
        assert ledger.left == 40
        bill.settle(25, tokens=3)
    assert (ledger.spent, ledger.left, ledger.share) == (25, 75, 0.25)
    assert [(charge.kind, charge.flops, charge.tokens) for charge in ledger.charges] == [("student_sample", 25, 3)]


def test_a_reserve_that_does_not_fit_is_refused_before_anything_runs():
    ledger, ran = Ledger(100), False
    with pytest.raises(OverBudgetError, match="student_update"), ledger.reserve("student_update", 101):
        ran = True
    assert not ran
    assert (ledger.spent, ledger.reserved, ledger.charges) == (0, 0, [])


def test_the_whole_budget_can_be_spent():
    ledger = Ledger(100)
    with ledger.reserve("student_update", 100) as bill:
        bill.settle(100, 1)
    assert ledger.left == 0


def test_a_failing_verb_is_charged_its_reserve():
    ledger = Ledger(100)
    with pytest.raises(ZeroDivisionError), ledger.reserve("judge", 60):
        raise ZeroDivisionError
    assert (ledger.spent, ledger.reserved, ledger.charges[0].flops) == (60, 0, 60)


def test_a_block_that_settles_nothing_is_charged_its_reserve():
    ledger = Ledger(100)
    with ledger.reserve("judge", 60):
        pass
    assert ledger.spent == 60


def test_spending_more_than_the_reserve_is_an_error_and_charges_the_reserve():
    ledger = Ledger(100)
    with pytest.raises(RunError, match="cost model"), ledger.reserve("judge", 10) as bill:
        bill.settle(11, 1)
    assert ledger.spent == 10


def test_reserving_nothing_charges_nothing():
    ledger = Ledger(100)
    with ledger.reserve("teacher_score", 0) as bill:
        bill.settle(0, 0)
    assert (ledger.charges, ledger.saw(), ledger.spent) == ([], [], 0)


def test_nested_reserves_see_each_other():
    ledger = Ledger(100)
    with ledger.reserve("teacher_score", 70) as outer:
        with pytest.raises(OverBudgetError), ledger.reserve("student_update", 31):
            pass
        with ledger.reserve("student_update", 30) as inner:
            inner.settle(20, 1)
        outer.settle(50, 1)
    assert ledger.spent == 70


def test_a_negative_reserve_cannot_earn_budget():
    ledger = Ledger(100)
    with pytest.raises(RunError), ledger.reserve("student_sample", -50):
        pass
    assert ledger.left == 100


@given(st.integers(1, 100), st.lists(st.tuples(st.integers(0, 60), st.floats(0, 1), st.booleans()), max_size=30))
def test_no_sequence_of_verbs_spends_more_than_the_limit(limit: int, verbs: list[tuple[int, float, bool]]):
    ledger = Ledger(limit)
    for worst, share, fails in verbs:
        try:
            with ledger.reserve("student_sample", worst) as bill:
                if fails:
                    raise ValueError
                bill.settle(int(worst * share), 1)
        except (OverBudgetError, ValueError):
            pass
        assert 0 <= ledger.spent <= limit
        assert ledger.spent == sum(charge.flops for charge in ledger.charges)
        assert ledger.left == limit - ledger.spent


def test_what_was_seen_follows_from_what_was_paid_for():
    ledger = Ledger(None)
    for kind, flops in (("judge", 5), ("student_sample", 5), ("teacher_generate", 7), ("judge", 2)):
        with ledger.reserve(kind, flops) as bill:
            bill.settle(flops, tokens=1, seconds=0.5)
    assert ledger.saw() == ["teacher text", "judge"]
    assert ledger.by_kind() == {"judge": 7, "student_sample": 5, "teacher_generate": 7}
    assert ledger.by_kind("tokens")["judge"] == 2
    assert ledger.by_kind("seconds")["judge"] == 1.0


AXES = {
    "FLOPs": Axis(),
    "student tokens": Tokens("student tokens", STUDENT_TOKENS),
    "dollars": Dollars("dollars", {"judge": 2.0}, exaflop=3.0),
    "seconds": Seconds("seconds"),
    "hours of two GPUs": Seconds("GPU-hours", 2 / 3600),
}


def spend(axis: Axis, limit: float | None = None) -> Ledger:
    ledger = Ledger(limit, axis)
    for kind, flops, tokens, seconds in (("student_update", 10**17, 5, 1.5), ("judge", 10**18, 10**6, 0.5)):
        with ledger.reserve(kind, 2 * flops, 2 * tokens) as bill:
            bill.settle(flops, tokens, seconds)
    return ledger


SPENT = [("FLOPs", 1.1e18), ("student tokens", 5), ("dollars", 2.3), ("seconds", 2.0), ("hours of two GPUs", 4 / 3600)]


@pytest.mark.parametrize(("name", "spent"), SPENT)
def test_an_axis_decides_what_counts_and_all_is_written_down_whichever_binds(name: str, spent: float):
    ledger = spend(AXES[name])
    assert ledger.spent == pytest.approx(spent)
    assert ledger.by_kind() == {"student_update": 10**17, "judge": 10**18}
    assert ledger.by_kind("tokens") == {"student_update": 5, "judge": 10**6}


def test_a_reserve_is_held_in_the_unit_of_the_axis():
    ledger = Ledger(10, Tokens("student tokens", STUDENT_TOKENS))
    with ledger.reserve("teacher_generate", 10**20, 10**9):
        assert ledger.left == 10
    with ledger.reserve("student_update", 1, 8), pytest.raises(OverBudgetError, match="student tokens"):
        ledger.require({"student_update": (1, 3)})


def test_a_verb_that_fails_is_charged_its_most_tokens():
    ledger = Ledger(10, Tokens("student tokens", STUDENT_TOKENS))
    with pytest.raises(ZeroDivisionError), ledger.reserve("student_update", 1, 8):
        raise ZeroDivisionError
    assert (ledger.spent, ledger.charges[0].tokens) == (8, 8)


@pytest.mark.parametrize("each", [1.0, 2 / 3600])
def test_seconds_are_expected_at_the_rate_so_far_and_a_trace_does_not_change_it(each: float):
    axis = Seconds("time", each)
    assert axis.most("judge", 1, 100) == 0
    spend(axis)
    assert axis.most("judge", 1, 10**19) == pytest.approx(5 * each)
    traced = Ledger(4.0 * each, axis.traced())
    with pytest.raises(OverBudgetError), traced.reserve("judge", 10**19):
        pass
    with traced.reserve("judge", 6 * 10**18) as bill:
        bill.settle(6 * 10**18, 1, 0.0)
    assert traced.spent == pytest.approx(3 * each)
    assert axis.most("judge", 1, 10**19) == pytest.approx(5 * each)
