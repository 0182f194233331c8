"""Known answers and falsifiers for the exposure-bias gap."""

from __future__ import annotations

import numpy as np
import pytest

from opd_bench.errors import UserError
from opd_bench.exposure import Divergences, Gap, curves, excess_matrix, gap, gap_over_seeds
from opd_bench.statistics import Interval, claims


def gap_interval(record, *arguments, **options):
    """One seed: the bootstrap is over prompts alone."""
    return gap_over_seeds([record], *arguments, **options)


def rng(seed: int = 7) -> np.random.Generator:
    return np.random.default_rng(seed)


def alive(lengths: list[int], width: int) -> np.ndarray:
    return np.arange(width) < np.array(lengths)[:, None]


def full(student_NT: np.ndarray, teacher_NT: np.ndarray) -> Divergences:
    """A record in which every rollout lives throughout."""
    return Divergences(student_NT, np.ones_like(student_NT, dtype=bool), teacher_NT, np.ones_like(teacher_NT, dtype=bool))


def noisy(prompts: int, bias: float = 0.0, seed: int = 7) -> Divergences:
    """Exponential divergences that lie ``bias`` nats higher on student prefixes after the first position."""
    draw = rng(seed)
    student_NT, teacher_NT = draw.exponential(size=(2, prompts, 6))
    student_NT[:, 1:] += bias
    return full(student_NT, teacher_NT)


def walk(policy_KV: np.ndarray, step_KV: np.ndarray, prompts: int, length: int, draw: np.random.Generator) -> np.ndarray:
    """State of a Markov chain before each of ``length`` tokens: NT. K states, V tokens; ``step`` gives the next state."""
    state_N = np.zeros(prompts, dtype=int)
    states = []
    for _ in range(length):
        states.append(state_N)
        token_N = (draw.random(prompts)[:, None] > policy_KV[state_N].cumsum(axis=1)[:, :-1]).sum(axis=1)
        state_N = step_KV[state_N, token_N]
    return np.stack(states, axis=1)


def kl_by_state(teacher_KV: np.ndarray, student_KV: np.ndarray) -> np.ndarray:
    ratio_KV = np.log(np.where(teacher_KV > 0, teacher_KV, 1) / student_KV)
    return (teacher_KV * ratio_KV).sum(axis=1)


# The biased pair. State 0 is right and the teacher never leaves it; state 1 is wrong and absorbing.
SLIP = 0.1
TEACHER_KV = np.array([[1.0, 0.0], [0.5, 0.5]])
STUDENT_KV = np.array([[1 - SLIP, SLIP], [0.05, 0.95]])
STEP_KV = np.array([[0, 1], [1, 1]])


def biased(prompts: int, length: int, seed: int = 7) -> Divergences:
    draw, d_K = rng(seed), kl_by_state(TEACHER_KV, STUDENT_KV)
    return full(
        d_K[walk(STUDENT_KV, STEP_KV, prompts, length, draw)],
        d_K[walk(TEACHER_KV, STEP_KV, prompts, length, draw)],
    )


# ---- known answers ---------------------------------------------------------------------------------------------------------------

UNEVEN = Divergences(np.array([[1.0, 5.0], [3.0, np.nan]]), alive([2, 1], 2), np.array([[1.0, 1.0], [2.0, 1.0]]), alive([2, 2], 2))


def test_a_finished_rollout_contributes_zero():
    assert gap(UNEVEN, 2, "zero") == Gap(4.5, 2.5, 2.0, pytest.approx(80), 2, 1, 2)


def test_or_leaves_the_average_by_position():
    assert gap(UNEVEN, 2, "drop") == Gap(7.0, 2.5, 4.5, pytest.approx(180), 2, 1, 2)


def test_a_pooled_token_mean_is_another_number():
    pooled = 2 * (1 + 5 + 3) / 3
    assert pooled not in (gap(UNEVEN, 2, "zero").regret, gap(UNEVEN, 2, "drop").regret)


def test_the_length_cuts_every_sum():
    assert gap(UNEVEN, 1) == Gap(2.0, 1.5, 0.5, pytest.approx(100 / 3), 1, 2, 2)


def test_curves_are_the_gap_at_every_length():
    record = Divergences(noisy(9).student_NT, alive([1, 2, 3, 4, 4, 5, 6, 6, 6], 6), noisy(9).teacher_NT, alive([6] * 4 + [2] * 5, 6))
    for ended in ("zero", "drop"):
        found = curves(record, ended)
        for length in range(1, 7):
            at = gap(record, length, ended)
            assert (at.regret, at.per_step, at.exaccerr) == (
                found.regret_T[length - 1],
                found.per_step_T[length - 1],
                found.exaccerr_T[length - 1],
            )
        assert found.student_T.cumsum() == pytest.approx(found.regret_T)
        assert found.student_alive_T.tolist() == [9, 8, 7, 6, 4, 3]
        assert found.teacher_alive_T.tolist() == [9, 9, 4, 4, 4, 4]


def test_equal_models_have_no_gap_and_an_undefined_ratio():
    noise = rng().normal(0, 2e-8, (2, 10, 50))  # what float32 leaves of equal models, both signs
    record = full(*noise)
    for ended in ("zero", "drop"):
        found = gap(record, ended=ended)
        assert (found.regret, found.per_step, found.excess, found.exaccerr) == (0, 0, 0, None)
        intervals = gap_interval(record, rng(), draws=50, ended=ended)
        assert intervals["regret"] == intervals["per_step"] == intervals["excess"] == Interval(0, 0, 0)
        assert intervals["exaccerr"] is None
    assert np.isnan(curves(record).exaccerr_T).all()
    assert not excess_matrix(record).any()


def test_a_perfect_student_on_teacher_prefixes_that_fails_on_its_own_has_an_undefined_ratio_but_an_excess():
    found = gap(full(np.ones((3, 4)), np.zeros((3, 4))))
    assert (found.excess, found.exaccerr) == (4, None)


def test_the_first_position_shows_no_gap():
    record = biased(prompts=500, length=6)
    found = gap(record, 1)
    assert found.regret == found.per_step
    assert (found.excess, found.exaccerr) == (0, 0)


def test_values_and_padding_after_the_end_do_not_matter():
    values, lengths = rng().exponential(size=(4, 5)), [2, 3, 1, 3]
    narrow = Divergences(values[:, :3], alive(lengths, 3), values, alive([5] * 4, 5))
    garbage = np.where(alive(lengths, 5), values, np.inf)
    wide = Divergences(garbage, alive(lengths, 5), values, alive([5] * 4, 5))
    for ended in ("zero", "drop"):
        assert gap(narrow, ended=ended) == gap(wide, ended=ended)
        assert gap_interval(narrow, rng(), 50, ended=ended) == gap_interval(wide, rng(), 50, ended=ended)


def test_where_nobody_lives_drop_is_undefined_and_zero_is_not():
    record = Divergences(np.ones((2, 4)), alive([2, 1], 4), np.ones((2, 4)), alive([4, 4], 4))
    assert gap(record, 3, "drop") == Gap(None, 3.0, None, None, 3, 0, 2)
    assert gap(record, 3, "zero").regret == 1.5
    assert (gap(record, ended="drop").length, gap(record, ended="zero").length) == (2, 4)
    assert gap_interval(record, rng(), 50, 3, "drop")["regret"] is None


@pytest.mark.parametrize(
    ("student_NT", "student_alive_NT"),
    [
        (np.ones((2, 3)), np.ones((2, 4), dtype=bool)),
        (np.ones((3, 3)), np.ones((3, 3), dtype=bool)),
        (np.ones((2, 3)), np.ones((2, 3))),
        (np.full((2, 3), np.nan), np.ones((2, 3), dtype=bool)),
        (np.ones((2, 3)), np.array([[True, False, True], [True, True, True]])),
    ],
)
def test_malformed_records_are_refused(student_NT: np.ndarray, student_alive_NT: np.ndarray):
    with pytest.raises(UserError):
        Divergences(student_NT, student_alive_NT, np.ones((2, 3)), np.ones((2, 3), dtype=bool))


def test_a_length_that_was_not_recorded_is_refused():
    for length in (0, 7):
        with pytest.raises(UserError, match="1 to 6"):
            gap(noisy(3), length)


# ---- falsifiers ------------------------------------------------------------------------------------------------------------------


def test_state_independent_errors_are_no_exposure_bias():
    teacher_KV = np.array([[0.7, 0.2, 0.1], [0.1, 0.7, 0.2], [0.2, 0.1, 0.7]])
    student_KV = np.array([[0.4, 0.3, 0.3], [0.3, 0.4, 0.3], [0.3, 0.3, 0.4]])
    step_KV = np.array([[0, 1, 2]] * 3)
    d_K, draw = kl_by_state(teacher_KV, student_KV), rng()
    on_student = walk(student_KV, step_KV, 400, 12, draw)
    on_teacher = walk(teacher_KV, step_KV, 400, 12, draw)
    assert (on_student != on_teacher).mean() > 0.3  # they visit other states, where the divergence is the same
    found = gap(full(d_K[on_student], d_K[on_teacher]))
    assert found.regret == pytest.approx(12 * d_K[0])
    assert found.exaccerr == pytest.approx(0, abs=1e-9)

    def fresh(states_NT: np.ndarray) -> np.ndarray:
        """The ratio convention: log T(y) − log S(y) of a fresh teacher token."""
        token_NT = (draw.random(states_NT.shape)[..., None] > teacher_KV[states_NT].cumsum(axis=-1)[..., :-1]).sum(axis=-1)
        return np.log(teacher_KV / student_KV)[states_NT, token_NT]

    record = full(fresh(on_student), fresh(on_teacher))
    standard_error = excess_matrix(record).std(ddof=1) / 400**0.5
    assert abs(gap(record).excess or 0) < 3 * standard_error
    found = gap_interval(record, rng())["exaccerr"]
    assert found is not None
    assert not found.excludes_zero


@pytest.mark.parametrize("length", [2, 8])
def test_an_absorbing_wrong_state_gives_the_exact_exposure_bias(length: int):
    prompts, (d_right, d_wrong) = 20_000, kl_by_state(TEACHER_KV, STUDENT_KV)
    wrong_T = 1 - (1 - SLIP) ** np.arange(length)  # chance of having slipped before each token
    regret = (d_right + (d_wrong - d_right) * wrong_T).sum()
    record = biased(prompts, length)
    found = gap(record)
    assert found.per_step == pytest.approx(length * d_right)
    standard_error = record.student_NT.sum(axis=1).std() / prompts**0.5
    assert found.regret == pytest.approx(regret, abs=4 * standard_error)
    assert found.exaccerr == pytest.approx(100 * (regret / (length * d_right) - 1), abs=400 * standard_error / (length * d_right))
    assert found.exaccerr is not None
    assert found.exaccerr > 100 * 4 * standard_error / (length * d_right)


def test_bias_makes_matched_positions_drift_apart():
    found = curves(biased(20_000, 8))
    difference_T = found.student_T - found.teacher_T
    assert difference_T[0] == 0
    assert (np.diff(difference_T) > 0).all()


def test_shuffling_which_side_a_rollout_came_from_destroys_the_effect():
    record = biased(2000, 8)
    swap_N1 = rng(1).random((2000, 1)) < 0.5
    shuffled = full(np.where(swap_N1, record.teacher_NT, record.student_NT), np.where(swap_N1, record.student_NT, record.teacher_NT))
    before, after = (gap_interval(each, rng())["excess"] for each in (record, shuffled))
    assert before is not None
    assert after is not None
    assert before.excludes_zero
    assert not after.excludes_zero


def test_ending_early_moves_zero_and_not_drop():
    d_NT = np.full((4, 6), 0.5)
    record = Divergences(d_NT, alive([2, 3, 4, 5], 6), d_NT, alive([5] * 4, 6))
    assert gap(record, 5, "zero").excess == pytest.approx(0.5 * (3.5 - 5))
    assert gap(record, 5, "drop").excess == 0


# ---- intervals -------------------------------------------------------------------------------------------------------------------


def test_the_bootstrap_agrees_with_normal_theory_for_a_mean():
    record = noisy(400)
    found = gap_interval(record, rng(), draws=4000)["excess"]
    excess_N = excess_matrix(record)
    assert found is not None
    assert found.low is not None
    assert found.high is not None
    assert found.mean == pytest.approx(excess_N.mean()) == gap(record).excess
    assert found.high - found.low == pytest.approx(2 * 1.96 * excess_N.std() / 400**0.5, rel=0.06)  # Monte-Carlo error about 2 %


def test_numerator_and_denominator_are_drawn_together():
    teacher_NT = noisy(50).teacher_NT
    found = gap_interval(full(1.5 * teacher_NT, teacher_NT), rng())
    ratio, regret = found["exaccerr"], found["regret"]
    assert ratio is not None
    assert (ratio.mean, ratio.low, ratio.high) == pytest.approx((50, 50, 50))
    assert regret is not None
    assert regret.low is not None
    assert regret.low < regret.mean


def test_seeds_share_their_draw_of_prompts():
    record = noisy(50)
    once, four = gap_interval(record, rng()), gap_over_seeds([record] * 4, rng())
    for name, interval in once.items():
        copy = four[name]
        assert interval is not None
        assert copy is not None
        assert (copy.mean, copy.low, copy.high) == pytest.approx((interval.mean, interval.low, interval.high))


def test_seeds_that_differ_widen_the_interval():
    def width(records: list[Divergences]) -> float:
        found = gap_over_seeds(records, rng())["excess"]
        assert found is not None
        assert found.low is not None
        assert found.high is not None
        return found.high - found.low

    assert width([noisy(200, bias) for bias in (0.0, 1.0, 2.0, 3.0)]) > 3 * width([noisy(200, 1.5)] * 4)


def test_over_seeds_the_ratio_is_that_of_the_means():
    records = [full(np.full((3, 1), 4.0), np.full((3, 1), 1.0)), full(np.full((3, 1), 2.0), np.full((3, 1), 2.0))]
    found = gap_over_seeds(records, rng())["exaccerr"]
    assert found is not None
    assert found.mean == pytest.approx(100)


def test_the_same_generator_gives_the_same_interval():
    assert gap_interval(noisy(20), rng(3)) == gap_interval(noisy(20), rng(3))
    assert gap_interval(noisy(20), rng(3)) != gap_interval(noisy(20), rng(4))


def test_one_prompt_has_no_bounds():
    found = gap_interval(noisy(1), rng(), 50)["regret"]
    assert found is not None
    assert (found.low, found.high) == (None, None)


def test_a_bound_that_undefined_draws_could_move_is_none():
    record = Divergences(np.ones((5, 2)), alive([2, 1, 1, 1, 1], 2), np.ones((5, 2)), alive([2] * 5, 2))
    found = gap_interval(record, rng(), 200, ended="drop")  # a third of the draws lose the one survivor
    assert found["regret"] == Interval(2, None, None)
    assert found["per_step"] == Interval(2, 2, 2)


def test_seeds_with_other_prompts_are_refused():
    with pytest.raises(UserError, match="share their prompts"):
        gap_over_seeds([noisy(3), noisy(4)], rng())
    with pytest.raises(UserError, match="at least one"):
        gap_over_seeds([], rng())


def test_the_excess_of_prompts_carries_a_family_of_claims():
    def seeds(bias: float) -> dict[str, np.ndarray]:
        return {"prompts": np.stack([excess_matrix(noisy(60, bias, seed)) for seed in range(8)])}

    scores = {"sft": seeds(0.5), "opd": seeds(0.0), "twin": seeds(0.0)}
    found = {(claim.a, claim.b): claim for claim in claims("excess", scores, {"prompts": 1.0}, better="lower")}
    assert found["opd", "sft"].claimed
    assert found["opd", "sft"].difference == pytest.approx(-2.5)
    assert not found["opd", "twin"].claimed


def test_a_seed_that_is_not_drawn_cannot_make_a_draw_undefined():
    sparse = Divergences(np.ones((5, 2)), alive([2, 1, 1, 1, 1], 2), np.ones((5, 2)), alive([2] * 5, 2))
    records = [sparse, full(np.ones((5, 2)), np.ones((5, 2)))]
    found = gap_over_seeds(records, rng(), length=2, ended="drop", level=0.44)["regret"]
    assert found == Interval(2, 2, 2)  # .8^5 · 3/4 = 25 % of the draws are undefined, less than a tail of 28 %; else 33 % were
