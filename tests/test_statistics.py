"""Intervals over seeds × items and the claims drawn from them."""

from __future__ import annotations

from itertools import product
from math import comb

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from scipy import stats

from opd_bench.errors import UserError
from opd_bench.statistics import (
    Interval,
    auroc,
    benjamini_hochberg,
    claims,
    contrasted,
    contrasts,
    holm,
    macro_weights,
    over_items,
    paired_difference,
    ranks,
    recovered_share,
    seed_means,
    seeds_needed,
    sign_flip_p,
    smallest_p,
    two_way_interval,
    two_way_p,
    two_way_variance,
    wilson,
)

ONE = {"task": 1.0}
fixed = settings(derandomize=True, database=None, deadline=None)
tables = arrays(float, st.tuples(st.integers(2, 6), st.integers(2, 9)), elements=st.floats(-3, 3))


def rng() -> np.random.Generator:
    return np.random.default_rng(7)


def formula(scores_SN: np.ndarray) -> float:
    """V of one task, written out term by term."""
    s, n = scores_SN.shape
    c = scores_SN - scores_SN.mean()
    seeds = s / (s - 1) * sum(c[r].sum() ** 2 for r in range(s)) / (s * n) ** 2
    items = n / (n - 1) * sum(c[:, i].sum() ** 2 for i in range(n)) / (s * n) ** 2
    return max(seeds + items - (c**2).sum() / (s * n) ** 2, seeds, items)


def test_variance_by_hand():
    assert two_way_variance({"task": np.array([[4.0, 0.0], [0.0, -4.0]])}, ONE) == 4 + 4 - 2  # seeds + items − cells
    assert two_way_variance({"task": np.array([[0.0, 2.0], [4.0, 6.0]])}, ONE) == 4  # 4 + 1 − 1.25, floored at the seeds
    assert two_way_variance({"task": np.array([[1.0, -2.0], [2.0, -1.0]])}, ONE) == 2.25  # .25 + 2.25 − .625, floored at the items


@fixed
@given(tables)
def test_one_task_with_weight_one_is_the_published_formula(scores_SN: np.ndarray):
    assert two_way_variance({"task": scores_SN}, ONE) == pytest.approx(formula(scores_SN), rel=1e-9, abs=1e-12)


def test_noise_of_seeds_alone_gives_the_classical_variance():
    seed_S = rng().normal(size=5)
    scores = {"task": np.repeat(seed_S[:, None], 40, axis=1)}
    assert two_way_variance(scores, ONE) == pytest.approx(seed_S.var(ddof=1) / 5)


def test_noise_of_items_alone_gives_the_classical_variance():
    item_N = rng().normal(size=40)
    scores = {"task": np.repeat(item_N[None], 5, axis=0)}
    assert two_way_variance(scores, ONE) == pytest.approx(item_N.var(ddof=1) / 40)


def test_seeds_are_joint_over_tasks_and_items_are_not():
    weights = {"a": 0.5, "b": 0.5}
    by_seed = np.repeat(rng().normal(size=(6, 1)), 30, axis=1)
    assert two_way_variance({"a": by_seed, "b": by_seed}, weights) == pytest.approx(two_way_variance({"a": by_seed}, {"a": 1.0}))
    by_item = np.repeat(rng().normal(size=(1, 30)), 6, axis=0)
    assert two_way_variance({"a": by_item, "b": by_item}, weights) == pytest.approx(two_way_variance({"a": by_item}, {"a": 1.0}) / 2)


def test_tasks_of_different_size_weigh_by_their_weight_not_their_items():
    scores = {"small": np.ones((3, 2)), "large": np.zeros((3, 50))}
    assert two_way_interval(scores, {"small": 0.5, "large": 0.5}).mean == 0.5


def test_two_way_intervals_cover_where_seed_only_intervals_do_not():
    draw, weights, trials, seeds = rng(), {"a": 0.5, "b": 0.5}, 1500, 4
    two_way = seed_only = 0
    for _ in range(trials):
        student_S1 = draw.normal(0, 0.1, (seeds, 1))
        scores = {
            task: student_S1 + draw.normal(0, 1, (1, items)) + draw.normal(0, 0.5, (seeds, items)) for task, items in (("a", 40), ("b", 60))
        }
        found = two_way_interval(scores, weights)
        two_way += not found.excludes_zero
        seeds_alone = two_way_interval({"macro": np.repeat(seed_means(scores, weights)[:, None], 2, axis=1)}, {"macro": 1.0})
        seed_only += not seeds_alone.excludes_zero
    assert two_way / trials >= 0.93
    assert seed_only / trials < 0.90


def test_interval_uses_t_with_one_degree_of_freedom_less_than_seeds():
    scores = {"task": np.repeat([[1.0], [2.0], [3.0]], 4, axis=1)}
    found = two_way_interval(scores, ONE)
    half = 4.302652729911275 / 3**0.5  # t(.975, 2) · sd / √3
    assert (found.mean, found.low, found.high) == pytest.approx((2, 2 - half, 2 + half))


def test_one_seed_or_one_item_has_no_bounds():
    assert two_way_interval({"task": np.array([[1.0, 0.0]])}, ONE) == Interval(0.5, None, None)
    assert two_way_interval({"task": np.array([[1.0], [0.0]])}, ONE) == Interval(0.5, None, None)
    with pytest.raises(UserError, match="two seeds"):
        two_way_variance({"task": np.array([[1.0, 0.0]])}, ONE)


@fixed
@given(tables, st.data())
def test_swapping_two_methods_negates_their_difference(a_SN: np.ndarray, data: st.DataObject):
    b_SN = data.draw(arrays(float, a_SN.shape, elements=st.floats(-3, 3)))
    there, back = paired_difference({"task": a_SN}, {"task": b_SN}, ONE), paired_difference({"task": b_SN}, {"task": a_SN}, ONE)
    assert there.low is not None
    assert there.high is not None
    assert (back.mean, back.low, back.high) == pytest.approx((-there.mean, -there.high, -there.low), abs=1e-9)


def test_a_paired_difference_ignores_what_both_methods_share():
    shared_SN = rng().normal(size=(4, 20))
    found = paired_difference({"task": shared_SN + 0.25}, {"task": shared_SN}, ONE)
    assert (found.mean, found.low, found.high) == pytest.approx((0.25, 0.25, 0.25))


@pytest.mark.parametrize(
    ("a", "b", "weights"),
    [
        ({"task": np.zeros((2, 3))}, {"task": np.zeros((2, 4))}, ONE),
        ({"task": np.zeros((2, 3))}, {"other": np.zeros((2, 3))}, ONE),
        ({"task": np.zeros((2, 3))}, {"task": np.zeros((2, 3))}, {"other": 1.0}),
        ({"task": np.full((2, 3), np.nan)}, {"task": np.zeros((2, 3))}, ONE),
        ({"task": np.zeros((2, 3)), "more": np.zeros((3, 3))},) * 2 + ({"task": 0.5, "more": 0.5},),
    ],
)
def test_scores_that_do_not_pair_are_refused(a, b, weights):
    with pytest.raises(UserError):
        paired_difference(a, b, weights)


def test_eight_seeds_of_one_sign_reach_the_smallest_p():
    assert sign_flip_p(rng().uniform(0.1, 1, 8)) == 2 / 256 == smallest_p(8)


def test_sign_flip_by_hand():
    assert sign_flip_p(np.array([3.0, 2.0, -1.0])) == 4 / 8  # |sum| ≥ 4: ±(3+2+1) and ±(3+2−1)


def test_sign_flip_counts_ties_despite_rounding():
    equal = np.array([0.1, 0.2, -0.3, 0.1])  # sums of equal size differ in their last bits
    signs = np.array(list(product([1, -1], repeat=4)))
    exact = (np.abs(signs @ np.array([1, 2, -3, 1])) >= 1).mean()
    assert sign_flip_p(equal) == exact


def test_sign_flip_without_evidence_is_one():
    assert sign_flip_p(np.zeros(5)) == 1
    assert sign_flip_p(np.array([0.4])) == 1


def test_sign_flip_of_twenty_equal_seeds_is_the_binomial_test():
    differences_S = np.ones(20)
    differences_S[:4] = -1
    assert sign_flip_p(differences_S) == 2 * sum(comb(20, k) for k in range(5)) / 2**20
    with pytest.raises(UserError, match="21"):
        sign_flip_p(np.ones(21))


def test_holm_golden():
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.6, 0.7]).tolist() == [1.0, 1.0]
    assert holm([]).tolist() == []


def test_benjamini_hochberg_golden():
    assert benjamini_hochberg([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.02, 0.04, 0.04, 0.02])


@fixed
@given(st.lists(st.floats(0, 1), min_size=1, max_size=12))
def test_holm_is_monotone_and_at_least_as_strict_as_benjamini_hochberg(ps: list[float]):
    adjusted = holm(ps)
    assert (np.diff(adjusted[np.argsort(ps)]) >= 0).all()
    assert (adjusted >= benjamini_hochberg(ps) - 1e-12).all()
    assert (benjamini_hochberg(ps) >= np.array(ps) - 1e-12).all()


def test_wilson_golden_and_at_the_edges():
    found = wilson(8, 10)
    assert (found.mean, found.low, found.high) == pytest.approx((0.8, 0.4901624715, 0.9433178485))
    assert wilson(0, 10).low == 0
    assert wilson(0, 10).high == pytest.approx(0.2775327998)  # z² / (n + z²)
    assert wilson(10, 10).high == 1
    with pytest.raises(UserError):
        wilson(0, 0)


def test_seeds_needed_is_the_first_number_that_can_claim():
    assert seeds_needed(6) == 8
    assert seeds_needed(1) == 6
    for pairs in range(1, 30):
        assert pairs * smallest_p(seeds_needed(pairs)) < 0.05 <= pairs * smallest_p(seeds_needed(pairs) - 1)


def test_over_items_is_the_classical_interval():
    found = over_items({"a": np.array([1.0, 0.0, 1.0, 1.0]), "b": np.array([0.0, 1.0])}, {"a": 0.5, "b": 0.5})
    half = 1.959963984540054 * (0.25 * 0.25 / 4 + 0.25 * 0.5 / 2) ** 0.5  # variances 1/4 of four items, 1/2 of two
    assert (found.mean, found.low, found.high) == pytest.approx((0.625, 0.625 - half, 0.625 + half))
    assert over_items({"task": np.array([1.0])}, ONE) == Interval(1.0, None, None)


def test_auroc_by_hand():
    assert auroc([0.9, 0.4, 0.4, 0.1], [True, True, False, False]) == (1 + 1 + 0.5 + 1) / 4
    assert auroc([0.1, 0.9], [True, False]) == 0
    assert auroc([0.1, 0.9], [True, True]) is None


def test_macro_weights_are_a_mean_of_means():
    assert macro_weights(["a", "b"], ["c"]) == {"a": 0.25, "b": 0.25, "c": 0.5}
    assert macro_weights(["a", "b"], []) == {"a": 0.5, "b": 0.5}


# ---- share of the gap recovered ---------------------------------------------------------------------------------------------------


def solved(rate: float, items: int = 50) -> np.ndarray:
    return (np.arange(items) < rate * items).astype(float)


def repeated(item_N: np.ndarray, seeds: int = 4) -> dict[str, np.ndarray]:
    return {"task": np.repeat(item_N[None], seeds, axis=0)}


def test_recovered_share_by_hand():
    starts, teacher = repeated(np.array([0.0, 0.0, 1.0, 0.0])), {"task": np.array([1.0, 1.0, 1.0, 1.0])}
    found = recovered_share(repeated(np.array([1.0, 0.0, 1.0, 0.0])), starts, teacher, ONE)
    assert found is not None
    assert found.mean == pytest.approx(1 / 3)  # (1/2 − 1/4) / (1 − 1/4)
    # gain − share · gap = 2/3, −1/3, 0, −1/3 over the mean gap 3/4; nothing varies by seed, so V is that of the mean of four items
    half = 3.182446305284263 * (np.array([2, -1, 0, -1]) / 3).std(ddof=1) / 0.75 / 2  # t(.975, 3)
    assert (found.low, found.high) == pytest.approx((1 / 3 - half, 1 / 3 + half))


def test_recovered_share_of_the_start_is_none_of_it_and_of_the_teacher_all():
    starts, teacher = repeated(solved(0.4)), {"task": solved(0.9)}
    assert recovered_share(starts, starts, teacher, ONE) == Interval(0, 0, 0)
    found = recovered_share(repeated(solved(0.9)), starts, teacher, ONE)
    assert found is not None
    assert (found.mean, found.low, found.high) == pytest.approx((1, 1, 1))


def test_each_seed_is_taken_relative_to_its_own_start():
    # both seeds lie half-way from their start to the teacher on every item, so nothing is uncertain
    starts, teacher_N = np.stack([0.2 * solved(1), 0.6 * solved(1)]), solved(1)
    found = recovered_share({"task": (starts + teacher_N) / 2}, {"task": starts}, {"task": teacher_N}, ONE)
    assert found is not None
    assert (found.mean, found.low, found.high) == pytest.approx((0.5, 0.5, 0.5))


def test_recovered_share_is_undefined_without_room():
    weak = repeated(solved(0.5))
    assert recovered_share(weak, weak, {"task": solved(0.5)}, ONE) is None
    assert recovered_share(weak, weak, {"task": solved(0.4)}, ONE) is None
    assert recovered_share(weak, weak, {"task": solved(0.52)}, ONE) is None  # one item of fifty: [−.02, .06]
    assert recovered_share(weak, weak, {"task": solved(0.7)}, ONE) is not None


def test_recovered_share_with_one_seed_has_no_bounds_and_other_items_are_refused():
    starts, teacher = repeated(solved(0.4), 1), {"task": solved(0.9)}
    found = recovered_share(repeated(solved(0.6), 1), starts, teacher, ONE)
    assert found is not None
    assert (found.mean, found.low, found.high) == (pytest.approx(0.4), None, None)
    with pytest.raises(UserError, match="different seeds, tasks or items"):
        recovered_share(repeated(solved(0.6, 40)), starts, teacher, ONE)


@fixed
@given(st.floats(0.1, 10), st.floats(-5, 5), st.integers(0, 2**32 - 1))
def test_recovered_share_knows_no_unit(scale: float, shift: float, seed: int):
    draw = np.random.default_rng(seed)
    starts, students, teacher_N = draw.random((5, 20)), draw.random((5, 20)), draw.random(20) + 1
    first = recovered_share({"task": students}, {"task": starts}, {"task": teacher_N}, ONE)
    students, starts, teacher_N = (scale * scores + shift for scores in (students, starts, teacher_N))
    second = recovered_share({"task": students}, {"task": starts}, {"task": teacher_N}, ONE)
    assert first is not None
    assert second is not None
    assert (first.mean, first.low, first.high) == pytest.approx((second.mean, second.low, second.high), abs=1e-9)


# ---- claims -----------------------------------------------------------------------------------------------------------------------


def methods(seeds: int, gains: dict[str, float]) -> dict[str, dict[str, np.ndarray]]:
    """Scores that differ by a gain and a little noise."""
    draw = rng()
    base_SN = draw.normal(size=(seeds, 50))
    return {name: {"task": base_SN + gain + draw.normal(0, 0.01, (seeds, 50))} for name, gain in gains.items()}


def test_clear_differences_of_four_methods_are_claimed_with_eight_seeds_and_not_with_seven():
    gains = {"d": 0.0, "a": 0.3, "c": 0.1, "b": 0.2}
    found = claims("score", methods(8, gains), ONE)
    assert len(found) == 6
    assert all(claim.claimed and claim.difference > 0 for claim in found)
    assert min(claim.p_holm for claim in found) == pytest.approx(6 * 2 / 256)
    assert ranks(gains, found) == {"a": 1, "b": 2, "c": 3, "d": 4}
    assert not any(claim.claimed for claim in claims("score", methods(7, gains), ONE))


def test_lower_can_be_better():
    scores = methods(8, {"small": 0.0, "large": 1.0})
    (claim,) = claims("excess", scores, ONE, better="lower")
    assert (claim.a, claim.b, claim.family, claim.claimed) == ("small", "large", "excess", True)
    assert claim.difference == pytest.approx(-1, abs=0.01)
    assert ranks(scores, [claim], better="lower") == {"small": 1, "large": 2}


@fixed
@given(tables)
def test_identical_methods_are_never_claimed(scores_SN: np.ndarray):
    found = claims("score", {name: {"task": scores_SN} for name in "abc"}, ONE)
    assert [claim.p for claim in found] == [1, 1, 1]
    assert not any(claim.claimed for claim in found)
    assert set(ranks("abc", found).values()) == {1}


def test_one_seed_claims_nothing():
    (claim,) = claims("score", methods(1, {"a": 0.0, "b": 9.0}), ONE)
    assert (claim.low, claim.high, claim.p, claim.p_holm, claim.claimed) == (None, None, 1.0, 1.0, False)


def test_items_that_differ_stop_a_claim_on_which_all_seeds_agree():
    # the sign-flip p is 2/256, yet one item out of five carries the whole difference: mean 1/5, V = 1/25
    a_SN = np.zeros((8, 5))
    a_SN[:, 0] = 1
    (claim,) = claims("score", {"a": {"task": a_SN}, "b": {"task": np.zeros((8, 5))}}, ONE)
    assert claim.p == pytest.approx(2 * stats.t.sf(1, 7))
    assert not claim.claimed


def test_seeds_that_disagree_stop_a_claim_on_many_items():
    # the two-way p is small, but seven large differences and a small one of the other sign are what 4 of 256 sign patterns give
    a_SN = np.repeat(np.array([1.0] * 7 + [-0.2])[:, None], 50, axis=1)
    (claim,) = claims("score", {"a": {"task": a_SN}, "b": {"task": np.zeros((8, 50))}}, ONE)
    assert two_way_p({"task": a_SN}, ONE) < 0.01 < claim.p == sign_flip_p(a_SN[:, 0])


@fixed
@given(tables)
def test_p_is_below_5_percent_where_the_interval_excludes_zero(scores_SN: np.ndarray):
    p, interval = two_way_p({"task": scores_SN}, ONE), two_way_interval({"task": scores_SN}, ONE)
    assert (p < 0.05) == (interval.excludes_zero and interval.mean != 0)
    assert two_way_p({"task": -scores_SN}, ONE) == p


def test_one_method_has_no_pairs():
    assert claims("score", methods(3, {"a": 0.0}), ONE) == []
    assert ranks(["a"], []) == {"a": 1}


# ---- contrasts --------------------------------------------------------------------------------------------------------------------

FACTORIAL = {
    "prefixes": {"sf": 0.5, "sr": 0.5, "tf": -0.5, "tr": -0.5},
    "divergence": {"sr": 0.5, "tr": 0.5, "sf": -0.5, "tf": -0.5},
    "interaction": {"sr": 1.0, "tr": -1.0, "sf": -1.0, "tf": 1.0},
}
CELLS = st.integers(0, 2**32 - 1).map(
    lambda seed: {name: {"task": table_SN} for name, table_SN in zip(("tf", "tr", "sf", "sr"), drawn(seed), strict=True)}
)


def drawn(seed: int) -> np.ndarray:
    """Scores of four methods, six seeds and nine items."""
    return np.random.default_rng(seed).random((4, 6, 9))


def test_a_contrast_by_hand():
    scores = {
        "a": {"task": np.array([[4.0, 2.0], [2.0, 0.0]])},
        "b": {"task": np.array([[0.0, 2.0], [2.0, 0.0]])},
        "c": {"task": np.array([[-2.0, 2.0], [2.0, 4.0]])},
    }
    weights = {"a": 0.5, "b": 0.5, "c": -1.0}
    assert contrasted(scores, weights)["task"].tolist() == [[4.0, 0.0], [0.0, -4.0]]
    (found,) = contrasts("score", scores, ONE, {"mean of two": weights})
    half = 12.706204736174698 * 6**0.5  # t(.975, 1), and the variance of test_variance_by_hand: 4 + 4 − 2
    assert (found.difference, found.low, found.high) == (0.0, pytest.approx(-half), pytest.approx(half))
    assert (found.name, found.family, found.weights, found.p, found.claimed) == ("mean of two", "score", weights, 1.0, False)


def test_factors_that_add_up_have_their_effects_and_no_interaction():
    base_SN = np.random.default_rng(3).normal(size=(8, 50))
    gains = {"tf": 0.0, "tr": 0.1, "sf": 0.3, "sr": 0.4}
    scores = {name: {"task": base_SN + gain} for name, gain in gains.items()}
    prefixes, divergence, interaction = contrasts("score", scores, ONE, FACTORIAL)
    assert (prefixes.difference, divergence.difference) == pytest.approx((0.3, 0.1))
    assert (interaction.difference, interaction.low, interaction.high, interaction.p) == (0.0, 0.0, 0.0, 1.0)
    assert [one.claimed for one in (prefixes, divergence, interaction)] == [True, True, False]
    scores["sr"] = {"task": base_SN + 0.9}  # half a point more than the sum
    prefixes, divergence, interaction = contrasts("score", scores, ONE, FACTORIAL)
    assert (prefixes.difference, divergence.difference, interaction.difference) == pytest.approx((0.55, 0.35, 0.5))


@fixed
@given(CELLS)
def test_one_against_another_is_their_claim(cells: dict):
    (claim,) = claims("score", {name: cells[name] for name in ("sr", "tf")}, ONE)
    (found,) = contrasts("score", cells, ONE, {"pair": {claim.a: 1.0, claim.b: -1.0}})
    assert (found.difference, found.low, found.high) == (claim.difference, claim.low, claim.high)
    assert (found.p, found.p_holm, found.claimed) == (claim.p, claim.p_holm, claim.claimed)


@fixed
@given(CELLS, st.permutations(["tf", "tr", "sf", "sr"]), st.sampled_from(sorted(FACTORIAL)), st.sampled_from([-1, 0.25, 8, 1e6]))
def test_the_order_of_methods_changes_nothing_and_a_factor_only_the_unit(cells: dict, order: list[str], name: str, factor: float):
    weights = FACTORIAL[name]
    (first,) = contrasts("score", cells, ONE, {name: weights})
    (second,) = contrasts("score", {method: cells[method] for method in order}, ONE, {name: {m: factor * weights[m] for m in order}})
    bounds = (first.low, first.high) if factor > 0 else (first.high, first.low)
    assert (second.difference, second.low, second.high) == pytest.approx([factor * value for value in (first.difference, *bounds)])
    assert second.p == pytest.approx(first.p)


@fixed
@given(CELLS)
def test_what_all_methods_share_leaves_a_contrast(cells: dict):
    shared_SN = 5 * drawn(1)[0]
    moved = {method: {"task": tables["task"] + shared_SN} for method, tables in cells.items()}
    for found, again in zip(*(contrasts("score", scores, ONE, FACTORIAL) for scores in (cells, moved)), strict=True):
        assert (found.difference, found.low, found.high, found.p) == pytest.approx((again.difference, again.low, again.high, again.p))


def test_holm_goes_over_the_declared_contrasts_alone():
    scores = methods(8, {"a": 0.3, "b": 0.2, "c": 0.1, "d": 0.0})
    names = [{"a": 1.0, name: -1.0} for name in "bcd"]
    for declared in (names[:1], names, names * 3):
        found = contrasts("score", scores, ONE, {str(place): weights for place, weights in enumerate(declared)})
        assert [one.p_holm for one in found] == holm([one.p for one in found]).tolist()
        assert min(one.p_holm for one in found) == len(declared) * 2 / 256
    assert not any(one.claimed for one in found)  # nine, and eight seeds are enough for six


def test_rounding_is_no_effect():
    draw_SN = drawn(5)[0]
    same = {name: {"task": draw_SN} for name in "abcdefg"}
    weights = {**dict.fromkeys("abcdef", 1 / 6), "g": -1.0}
    assert any(sum(weight * x for weight in weights.values()) != 0 for x in draw_SN.flat)  # so it has to be seen to
    (found,) = contrasts("score", same, ONE, {"nothing": weights})
    assert (found.difference, found.p) == (0.0, 1.0)


def test_contrasts_of_methods_that_do_not_pair_are_refused_and_none_are_none():
    scores = {"a": {"task": np.zeros((2, 3))}, "b": {"task": np.zeros((2, 4))}, "c": {"task": np.ones((2, 3))}}
    with pytest.raises(UserError, match="different seeds, tasks or items"):
        contrasts("score", scores, ONE, {"x": {"a": 1.0, "b": -1.0}})
    assert contrasts("score", scores, ONE, {"x": {"a": 1.0, "c": -1.0}})[0].difference == -1  # b has no part in it
    assert contrasts("score", scores, ONE, {}) == []
