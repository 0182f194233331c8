"""Learning-curve summaries: bands, crossings, times to target, performance profiles."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from opd_bench.curves import Crossing, Curve, band, crossing, performance_profile, time_to_target, times_to_targets
from opd_bench.errors import UserError
from opd_bench.statistics import two_way_interval

ONE = {"task": 1.0}
BUDGETS_K = np.array([1.0, 2.0, 4.0])
fixed = settings(derandomize=True, database=None, deadline=None)


def rng() -> np.random.Generator:
    return np.random.default_rng(3)


def curve(
    means_K: Sequence[float], budgets_K: Sequence[float] = (1.0, 2.0, 4.0), seeds: int = 4, items: int = 6, noise: float = 0.0
) -> Curve:
    """Scores of the given means, with noise of seeds and items that has none of its own."""
    draw = rng()
    noise_SN = noise * draw.normal(size=(seeds, 1)) + noise * draw.normal(size=(1, items))
    return Curve(np.asarray(budgets_K, float), {"task": np.asarray(means_K, float)[:, None, None] + noise_SN - noise_SN.mean()})


def by_seed(scores_SK) -> Curve:
    return Curve(BUDGETS_K, {"task": np.repeat(np.asarray(scores_SK, float).T[:, :, None], 3, axis=2)})


@pytest.mark.parametrize("budgets", [[], [0.0, 1.0, 2.0], [1.0, 1.0, 2.0], [2.0, 1.0, 4.0], [1.0, 2.0, np.inf]])
def test_budgets_must_be_positive_and_increase(budgets):
    with pytest.raises(UserError, match="positive and increase"):
        Curve(np.array(budgets), {"task": np.zeros((3, 2, 2))})


def test_scores_must_have_a_row_per_budget():
    with pytest.raises(UserError, match="budgets × seeds × items"):
        Curve(BUDGETS_K, {"task": np.zeros((2, 2, 2))})


def test_a_band_is_the_two_way_interval_at_each_budget():
    noisy = curve([0.1, 0.2, 0.4], noise=0.1)
    found = band(noisy, ONE)
    assert [point.mean for point in found] == pytest.approx([0.1, 0.2, 0.4])
    assert found[1] == two_way_interval({"task": noisy.scores["task"][1]}, ONE)


# ---- crossings --------------------------------------------------------------------------------------------------------------------


def test_a_crossing_is_linear_in_the_logarithm():
    a, b = curve([0.0, 0.2, 0.5]), curve([0.1, 0.1, 0.1])  # the lead goes from −.1 to +.1 between 1 and 2
    found = crossing(a, b, ONE)
    assert found.budget == pytest.approx(2**0.5)
    assert (found.low, found.high, found.a_ahead) == (pytest.approx(2**0.5), pytest.approx(2**0.5), True)
    assert crossing(b, a, ONE) == Crossing(found.budget, found.low, found.high, False)


def test_the_last_crossing_counts():
    a, b = curve([0.1, -0.1, 0.3]), curve([0, 0, 0])
    assert crossing(a, b, ONE).budget == pytest.approx(2 * 2**0.25)  # a quarter of the doubling from 2 to 4


def test_no_crossing_in_range_is_an_answer():
    assert crossing(curve([0.2, 0.3, 0.4]), curve([0.1, 0.1, 0.1]), ONE) == Crossing(None, None, None, True)
    assert crossing(curve([0.1, 0.1, 0.1]), curve([0.1, 0.1, 0.1]), ONE) == Crossing(None, None, None, None)


def test_methods_that_met_at_a_point_cross_there():
    assert crossing(curve([-0.1, 0, 0.1]), curve([0, 0, 0]), ONE).budget == pytest.approx(2)


def test_curves_of_different_budgets_are_compared_where_both_are():
    a = curve([0.0, 0.4], [1, 4])  # .2 at 2
    b = curve([0.3, 0.1, 0.0], [2, 4, 8])
    found = crossing(a, b, ONE)  # the lead goes from −.1 at 2 to +.3 at 4
    assert found.budget == pytest.approx(2 * 2**0.25)
    with pytest.raises(UserError, match="share no range"):
        crossing(curve([0.0, 0.4], [1, 2]), curve([0.0, 0.4], [4, 8]), ONE)


def test_a_pair_takes_the_same_seeds_and_items():
    with pytest.raises(UserError, match="different seeds, tasks or items"):
        crossing(curve([0, 1, 2], seeds=3), curve([1, 1, 1]), ONE)
    # noise that both share is no noise
    found = crossing(curve([0.0, 0.2, 0.5], noise=5), curve([0.1, 0.1, 0.1], noise=5), ONE)
    assert (found.low, found.high) == (pytest.approx(found.budget), pytest.approx(found.budget))


def test_uncertain_crossings_have_wider_intervals_and_may_leave_the_range():
    flat = curve([0.1, 0.1, 0.1])
    clear, unclear = (crossing(curve([0.0, 0.2, 0.5], noise=noise), flat, ONE) for noise in (0.02, 0.2))
    assert None not in (clear.low, clear.budget, clear.high)
    assert np.array([1, clear.low, clear.budget, clear.high, 4], float).argsort().tolist() == [0, 1, 2, 3, 4]
    assert unclear.budget == pytest.approx(clear.budget)
    assert (unclear.low, unclear.high) == (None, None)


def test_the_interval_of_a_crossing_holds_the_budgets_where_the_lead_is_not_told_apart_from_zero():
    """Seeds shift the whole lead and nothing else varies, so its crossing shifts by as much over the slope."""
    shift_S = np.array([-0.06, -0.02, 0.0, 0.03, 0.05])
    a = Curve(BUDGETS_K, {"task": np.repeat((np.array([-0.15, 0.05, 0.25])[:, None] + shift_S)[:, :, None], 2, axis=2)})
    found = crossing(a, curve([0, 0, 0], seeds=5, items=2), ONE)
    half = 2.7764451051977987 * shift_S.std(ddof=1) / 5**0.5 / 0.2  # t(.975, 4), in doublings
    assert np.log2(np.array([found.low, found.budget, found.high], float)) == pytest.approx([0.75 - half, 0.75, 0.75 + half])


def test_one_seed_or_one_item_gives_no_bounds():
    for seeds, items in ((1, 6), (4, 1)):
        found = crossing(curve([0.0, 0.2, 0.5], seeds=seeds, items=items), curve([0.1, 0.1, 0.1], seeds=seeds, items=items), ONE)
        assert (found.budget, found.low, found.high) == (pytest.approx(2**0.5), None, None)


@fixed
@given(st.lists(st.floats(-1, 1).filter(lambda lead: abs(lead) > 0.01), min_size=3, max_size=3), st.floats(0.1, 100))
def test_the_unit_of_the_budget_does_not_matter(leads, unit):
    flat = [0.0] * 3
    here = crossing(curve(leads), curve(flat), ONE)
    there = crossing(curve(leads, (unit * BUDGETS_K).tolist()), curve(flat, (unit * BUDGETS_K).tolist()), ONE)
    assert (here.budget is None) == (there.budget is None)
    assert here.a_ahead == there.a_ahead == (leads[-1] > 0)
    if here.budget is not None:
        assert there.budget == pytest.approx(unit * here.budget)


# ---- time to target ---------------------------------------------------------------------------------------------------------------


def test_time_to_target_is_the_median_over_seeds():
    found = by_seed([[0.0, 0.4, 0.6], [0.2, 0.6, 0.8], [0.5, 0.6, 0.7]])  # reach .5 at 2√2, at 2^.75, and at their first point
    assert time_to_target(found, ONE, 0.5) == pytest.approx(2**0.75)
    assert time_to_target(found, ONE, 0.7) == pytest.approx(4)  # one misses, one is there at 2√2


def test_a_miss_is_infinite_and_half_of_the_seeds_missing_is_one():
    found = by_seed([[0.0, 0.1, 0.2], [0.0, 0.1, 0.9]])
    assert time_to_target(found, ONE, 0.5) == np.inf
    assert time_to_target(found, ONE, 0.95) == np.inf


def test_a_target_counts_from_when_it_is_first_reached():
    assert time_to_target(by_seed([[0.0, 0.8, 0.2]]), ONE, 0.4) == pytest.approx(2**0.5)


@fixed
@given(st.lists(st.lists(st.floats(0, 1), min_size=3, max_size=3), min_size=1, max_size=5), st.floats(0, 1), st.floats(0, 1))
def test_a_higher_target_never_takes_less(scores_SK, one, other):
    times = [time_to_target(by_seed(scores_SK), ONE, target) for target in sorted((one, other))]
    assert times[0] <= times[1] * (1 + 1e-9)
    assert times[0] >= 1
    assert times[1] <= 4 * (1 + 1e-9) or times[1] == np.inf


def test_workloads_are_tasks_by_targets():
    two = Curve(
        BUDGETS_K, {task: np.array(means_K)[:, None, None] * np.ones((3, 2, 2)) for task, means_K in (("a", [0, 0.5, 1]), ("b", [0, 0, 1]))}
    )
    found = times_to_targets({"mine": two}, {"a": [0.5, 1.0], "b": [0.5]})
    assert found["mine"] == pytest.approx({("a", 0.5): 2, ("a", 1.0): 4, ("b", 0.5): 2 * 2**0.5})


def test_performance_profile_by_hand():
    times = {
        "fast": {("a", 0.5): 1.0, ("a", 0.9): 4.0, ("b", 0.5): 2.0, ("b", 0.9): np.inf},
        "slow": {("a", 0.5): 2.0, ("a", 0.9): np.inf, ("b", 0.5): 1.0, ("b", 0.9): np.inf},
    }
    found = performance_profile(times, [1, 2, 100])
    assert found["fast"].tolist() == [0.5, 0.75, 0.75]  # nobody solves the last
    assert found["slow"].tolist() == [0.25, 0.5, 0.5]


@fixed
@given(st.lists(st.tuples(st.floats(1, 100), st.floats(1, 100)), min_size=1, max_size=8))
def test_a_profile_rises_to_one_and_somebody_is_best(pairs):
    times = {method: {("task", float(i)): pair[side] for i, pair in enumerate(pairs)} for side, method in enumerate("ab")}
    found = performance_profile(times, [1, 3, 10, 101])
    assert all((np.diff(shares_T) >= 0).all() and shares_T[-1] == 1 for shares_T in found.values())
    assert found["a"][0] + found["b"][0] >= 1
