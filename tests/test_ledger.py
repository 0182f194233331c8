"""The ledger reserves before, charges after, and cannot be overspent."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from opd_bench.errors import RunError
from opd_bench.ledger import Ledger, OverBudgetError


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
