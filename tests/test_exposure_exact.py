"""The gap's estimators against Markov pairs whose R, l·ε and ExAccErr are computed exactly."""

from __future__ import annotations

from typing import get_args

import numpy as np
import pytest
from markov import BIASED, EQUAL, MIXED, STEADY, Pair, enumerated, exact, sampled, visits
from scipy import stats

from opd_bench.exposure import Divergences, Ended, curves, curves_over_seeds, gap, gap_over_seeds

LENGTH = 8
CONVENTIONS = ("kl", "ratio")
COLUMNS = ("regret", "per_step", "excess", "exaccerr")
ENDED: tuple[Ended, ...] = get_args(Ended)
PAIRS = {"biased": BIASED, "mixed": MIXED, "steady": STEADY}
EVERY = [
    pytest.param(pair, convention, ended, id=f"{name}-{convention}-{ended}")
    for name, pair in PAIRS.items()
    for convention in CONVENTIONS
    for ended in ENDED
]


def rng(seed: int = 7) -> np.random.Generator:
    return np.random.default_rng(seed)


def first(record: Divergences, prompts: slice) -> Divergences:
    return Divergences(
        record.student_NT[prompts], record.student_alive_NT[prompts], record.teacher_NT[prompts], record.teacher_alive_NT[prompts]
    )


# ---- the answer key itself --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("pair", PAIRS.values(), ids=PAIRS)
def test_the_recursion_agrees_with_every_text_there_is(pair: Pair):
    for side, policy_KV in (("regret", pair.student_KV), ("per_step", pair.teacher_KV)):
        kl_T, alive_T = enumerated(pair, policy_KV, 5)
        assert visits(pair, policy_KV, 5).sum(axis=1) == pytest.approx(alive_T)
        for convention in CONVENTIONS:
            assert exact(pair, 5, convention, "zero").value[side] == pytest.approx(kl_T.sum())
            assert exact(pair, 5, convention, "drop").value[side] == pytest.approx((kl_T / alive_T).sum())


@pytest.mark.parametrize(("pair", "convention", "ended"), EVERY)
def test_its_standard_errors_are_those_of_rollouts(pair: Pair, convention: str, ended: Ended):
    """The spread of 1000 estimates of 300 prompts has a relative error of 1 / √2000; four of them, and 2 % for what is not linear."""
    repeats, prompts, truth = 1000, 300, exact(pair, LENGTH, convention, ended)
    record = sampled(pair, repeats * prompts, LENGTH, convention, rng(3))
    found = [gap(first(record, slice(at * prompts, (at + 1) * prompts)), LENGTH, ended) for at in range(repeats)]
    for column in COLUMNS:
        spread = float(np.std([getattr(one, column) for one in found], ddof=1)) * prompts**0.5
        assert spread == pytest.approx(truth.deviation[column], rel=4 / (2 * repeats) ** 0.5 + 0.02, abs=1e-9), column


def test_the_pairs_are_what_they_are_meant_to_be():
    assert visits(BIASED, BIASED.teacher_KV, LENGTH)[:, 1].max() == 0  # the teacher never visits the wrong state
    assert visits(BIASED, BIASED.student_KV, LENGTH)[-1, 1] > visits(BIASED, BIASED.student_KV, LENGTH)[1, 1] > 0
    apart_TK = visits(STEADY, STEADY.student_KV, LENGTH) - visits(STEADY, STEADY.teacher_KV, LENGTH)
    assert abs(apart_TK[-1]).max() > 0.2  # of .7 that live
    for convention in CONVENTIONS:
        assert exact(EQUAL, LENGTH, convention, "zero").value == {"regret": 0, "per_step": 0, "excess": 0}
        for ended in ENDED:
            assert exact(STEADY, LENGTH, convention, ended).value["exaccerr"] == pytest.approx(0, abs=1e-9)
            assert exact(BIASED, LENGTH, convention, ended).value["exaccerr"] > 100
    assert exact(MIXED, LENGTH, "kl", "zero").value["excess"] != pytest.approx(exact(MIXED, LENGTH, "kl", "drop").value["excess"], rel=0.1)


# ---- convergence ------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("pair", "convention", "ended"), EVERY)
def test_estimates_lie_within_standard_errors_of_the_exact_value(pair: Pair, convention: str, ended: Ended):
    record = sampled(pair, 100_000, LENGTH, convention, rng())
    for length in (1, 4, LENGTH):
        truth = exact(pair, length, convention, ended)
        for prompts in (1_000, 10_000, 100_000):
            found = gap(first(record, slice(prompts)), length, ended)
            for column in COLUMNS:
                error = truth.deviation[column] / prompts**0.5
                assert getattr(found, column) == pytest.approx(truth.value[column], abs=4 * error + 1e-9), (length, prompts, column)


@pytest.mark.parametrize("ended", ENDED)
def test_curves_follow_the_exact_ones_at_every_length(ended: Ended):
    prompts = 20_000
    record = sampled(MIXED, prompts, LENGTH, "ratio", rng())
    found, bands = curves(record, ended), curves_over_seeds([record], rng(), 20, ended=ended)
    for length in range(1, LENGTH + 1):
        truth = exact(MIXED, length, "ratio", ended)
        for column, values_T in (("regret", found.regret_T), ("exaccerr", found.exaccerr_T), ("excess", bands["excess"].mean_T)):
            error = truth.deviation[column] / prompts**0.5
            assert values_T[length - 1] == pytest.approx(truth.value[column], abs=4 * error), (length, column)


@pytest.mark.parametrize("convention", CONVENTIONS)
@pytest.mark.parametrize("pair", [BIASED, MIXED], ids=["biased", "mixed"])
def test_errors_fall_with_the_square_root_of_the_prompts(pair: Pair, convention: str):
    """rms errors of R repetitions at N = 64, 256, 1024 have sd 1 / √(2R) in their logarithms, so the slope's sd is that / √Σ(x − x̄)²."""
    repeats, sizes = 400, (64, 256, 1024)
    x = np.log(sizes)
    band = 4 / (2 * repeats) ** 0.5 / float(((x - x.mean()) ** 2).sum()) ** 0.5
    assert band < 0.08
    records = {prompts: sampled(pair, repeats * prompts, LENGTH, convention, rng(prompts)) for prompts in sizes}
    for ended in ENDED:
        truth = exact(pair, LENGTH, convention, ended)
        rms = {column: [] for column in COLUMNS}
        for prompts, record in records.items():
            parts = [gap(first(record, slice(at * prompts, (at + 1) * prompts)), LENGTH, ended) for at in range(repeats)]
            for column in COLUMNS:
                errors = np.array([getattr(part, column) for part in parts]) - truth.value[column]
                rms[column].append(float((errors**2).mean()) ** 0.5)
        for column in COLUMNS:
            if truth.deviation[column] < 1e-9:  # nothing varies, so there is no rate: right with any number of prompts
                assert max(rms[column]) < 1e-9, (ended, column)
            else:
                assert np.polyfit(x, np.log(rms[column]), 1)[0] == pytest.approx(-0.5, abs=band), (ended, column)


# ---- what must not show a gap -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ended", ENDED)
@pytest.mark.parametrize("convention", CONVENTIONS)
def test_a_student_that_is_the_teacher_has_none_and_no_ratio(convention: str, ended: Ended):
    record = sampled(EQUAL, 500, LENGTH, convention, rng())
    assert not np.array_equal(record.student_alive_NT, record.teacher_alive_NT)  # other rollouts, which end elsewhere
    found = gap(record, LENGTH, ended)
    assert (found.regret, found.per_step, found.excess, found.exaccerr) == (0, 0, 0, None)
    assert gap_over_seeds([record], rng(), 50, ended=ended)["exaccerr"] is None


@pytest.mark.parametrize("ended", ENDED)
def test_a_fresh_token_at_every_prefix_is_what_the_ratio_needs(ended: Ended):
    """The rollout's own next token would estimate −KL(S‖T) on the student's side; the exact value tells the two apart."""
    truth = exact(MIXED, LENGTH, "ratio", ended)
    reverse_K = (MIXED.student_KV * MIXED.log_ratio_KV()).sum(axis=1)
    visits_TK = visits(MIXED, MIXED.student_KV, LENGTH)
    wrong = float((visits_TK @ reverse_K / (1 if ended == "zero" else visits_TK.sum(axis=1))).sum())
    found = gap(sampled(MIXED, 20_000, LENGTH, "ratio", rng()), LENGTH, ended)
    assert wrong < 0 < truth.value["regret"]
    assert found.regret == pytest.approx(truth.value["regret"], abs=4 * truth.deviation["regret"] / 20_000**0.5)


# ---- intervals --------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ended", ENDED)
@pytest.mark.parametrize(("pair", "convention"), [(BIASED, "kl"), (MIXED, "ratio")], ids=["biased-kl", "mixed-ratio"])
def test_intervals_hold_the_exact_value_at_about_the_promised_rate(pair: Pair, convention: str, ended: Ended):
    """300 intervals of 95 % hold the truth 272 to 295 times, but for one in a thousand on either side."""
    repeats, prompts, truth = 300, 200, exact(pair, LENGTH, convention, ended)
    record = sampled(pair, repeats * prompts, LENGTH, convention, rng(11))
    held = dict.fromkeys(COLUMNS, 0)
    for at in range(repeats):
        found = gap_over_seeds([first(record, slice(at * prompts, (at + 1) * prompts))], rng(at), 300, LENGTH, ended)
        for column in COLUMNS:
            interval = found[column]
            assert interval is not None
            assert interval.low is not None
            assert interval.high is not None
            held[column] += interval.low - 1e-9 <= truth.value[column] <= interval.high + 1e-9
    least, most = stats.binom.ppf([0.001, 0.999], repeats, 0.95)
    constant = [column for column in COLUMNS if truth.deviation[column] < 1e-9]  # no width, and no error either
    assert all(held[column] == repeats for column in constant)
    assert all(least <= held[column] <= most for column in COLUMNS if column not in constant), held
