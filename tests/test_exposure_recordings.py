"""Known answers for what is estimated from whole recordings, and falsifiers that can fail."""

from __future__ import annotations

import numpy as np
import pytest
from test_exposure import alive, full, rng

from opd_bench import exposure
from opd_bench.errors import UserError
from opd_bench.exposure import (
    Divergences,
    Recording,
    curves_over_seeds,
    falsifiers,
    gap_over_seeds,
    gaps,
    length_decay,
    precision,
    prefix_contrast,
    recovery,
    support_overlap,
    usefulness,
)
from opd_bench.statistics import Interval

NAN = float("nan")


def noisy(prompts: int, bias: float = 0.0, seed: int = 7) -> Divergences:
    """Divergences with a mean of 1 on the teacher's prefixes and of 1 + ``bias`` on the student's, after the first position."""
    student_NT, teacher_NT = rng(seed).exponential(size=(2, prompts, 6))
    student_NT[:, 1:] += bias
    return full(student_NT, teacher_NT)


def recording(record: Divergences | None = None, **continued: list[float]) -> Recording:
    scores = {kind.replace("_", " ").replace("half", "0.5"): np.array(scores_N) for kind, scores_N in continued.items()}
    return Recording({} if record is None else {"forward_kl": record}, scores)


def mean(interval: Interval | None) -> float:
    assert interval is not None
    return interval.mean


# ---- along the rollouts -----------------------------------------------------------------------------------------------------------


def test_every_measure_is_the_same_gap_on_the_same_draws():
    along = {"forward_kl": noisy(20, 0.5), "log_ratio": noisy(20, -3.0), "teacher_entropy": noisy(20)}
    found = gaps([Recording(along, {})], rng(3), 50)
    assert {*found} == {"forward_kl", "log_ratio"}  # an entropy is no divergence
    for measure, by_ended in found.items():
        for ended, columns in by_ended.items():
            assert columns == gap_over_seeds([along[measure]], rng(3), 50, ended=ended)
    assert mean(found["log_ratio"]["zero"]["regret"]) < 0  # of either sign, and not cut off


def test_a_band_at_a_length_is_the_interval_at_that_length():
    records = [noisy(30, bias, seed) for seed, bias in enumerate((0.0, 1.0))]
    for ended in ("zero", "drop"):
        bands = curves_over_seeds(records, rng(3), 80, ended=ended)
        for length in (1, 4, 6):
            columns = gap_over_seeds(records, rng(3), 80, length, ended)
            for column in ("excess", "exaccerr"):
                interval, band = columns[column], bands[column]
                assert interval is not None
                at = [values_T[length - 1] for values_T in (band.mean_T, band.low_T, band.high_T)]
                assert at == pytest.approx([interval.mean, interval.low, interval.high], abs=1e-9)


def test_means_by_position_are_those_of_the_living():
    record = Divergences(np.array([[1.0, 5.0], [3.0, NAN]]), alive([2, 1], 2), np.array([[1.0, 1.0], [2.0, 4.0]]), alive([2, 2], 2))
    bands = curves_over_seeds([record], rng(), 50, ended="drop")
    assert bands["student"].mean_T.tolist() == [2, 5]
    assert bands["teacher"].mean_T.tolist() == [1.5, 2.5]
    assert np.isnan(bands["student"].low_T[1])  # a quarter of the draws lose the one survivor


def test_support_is_the_mean_over_living_tokens():
    record = Divergences(np.array([[1.0, 0.5], [0.0, NAN]]), alive([2, 1], 2), np.array([[1.0, 1.0], [1.0, 0.0]]), alive([2, 2], 2))
    found = support_overlap([Recording({"support": record}, {})], rng(), 50)
    assert (mean(found["student"]), mean(found["teacher"])) == (0.5, 0.75)


# ---- continuations ----------------------------------------------------------------------------------------------------------------

RIGHT = {"own_right_half": [1, 1, 0, 1], "teacher_right_half": [1, 1, 1, 0]}


def test_a_prefix_contrast_takes_only_prompts_whose_prefixes_were_both_right():
    found = prefix_contrast([recording(teacher_half=[1, 1, 1, 1], own_half=[0, 1, 0, 0], **RIGHT)], 0.5, rng())
    assert found is not None
    assert (found.entered, found.a.mean, found.b.mean, found.difference.mean) == (2, 1.0, 0.5, 0.5)


def test_errors_alike_after_every_prefix_are_no_contrast_though_a_plain_swap_shows_one():
    """A step goes wrong with chance .2 wherever it stands; own prefixes that went wrong stay wrong, teacher prefixes never do."""
    prompts, draw = 40_000, rng()
    right_N = draw.random(prompts) < 0.8**2
    own_N, teacher_N = (right_N & (draw.random(prompts) < 0.8**2)), draw.random(prompts) < 0.8**2
    assert teacher_N.mean() - own_N.mean() > 0.2  # the plain swap
    scores = {"teacher 0.5": teacher_N, "own 0.5": own_N, "own right 0.5": right_N, "teacher right 0.5": np.ones(prompts)}
    found = prefix_contrast([Recording({}, {kind: scores_N.astype(float) for kind, scores_N in scores.items()})], 0.5, rng(), 30)
    assert found is not None
    assert abs(found.difference.mean) < 4 * (0.64 * 0.36 * (1 / right_N.sum() + 1 / right_N.sum())) ** 0.5


def test_seeds_are_pooled_and_a_prompt_that_never_entered_is_not_counted():
    none = recording(teacher_half=[1] * 4, own_half=[0] * 4, own_right_half=[0] * 4, teacher_right_half=[1] * 4)
    one = recording(teacher_half=[1] * 4, own_half=[0] * 4, own_right_half=[0, 0, 0, 1], teacher_right_half=[1] * 4)
    assert prefix_contrast([none, none], 0.5, rng()) is None
    found = prefix_contrast([none, one], 0.5, rng())
    assert found is not None
    assert found.entered == 1
    assert found.difference == Interval(1.0, None, None)  # most draws leave it out


def test_recovery_is_a_ratio_over_prompts_that_both_met():
    one = Recording({}, {"student after 4 tokens": np.array([0, 1, 0, NAN]), "teacher after 4 tokens": np.array([1, 1, 0, 1.0])})
    found = recovery([one], "4 tokens", rng())
    assert found is not None
    assert (found.entered, found.a.mean, found.b.mean, mean(found.ratio)) == (
        3,
        pytest.approx(1 / 3),
        pytest.approx(2 / 3),
        pytest.approx(0.5),
    )
    never = Recording({}, {"student after 4 tokens": np.array([0.0, 1]), "teacher after 4 tokens": np.zeros(2)})
    found = recovery([never], "4 tokens", rng())
    assert found is not None
    assert (found.b.mean, found.ratio) == (0, None)
    unplaced = Recording({}, {"student after 4 tokens": np.full(3, NAN), "teacher after 4 tokens": np.full(3, NAN)})
    assert recovery([unplaced], "4 tokens", rng()) is None


def test_numerator_and_denominator_of_a_recovery_are_drawn_together():
    teacher_N = (rng().random(60) < 0.5).astype(float)
    found = recovery([Recording({}, {"student after 1 token": teacher_N / 2, "teacher after 1 token": teacher_N})], "1 token", rng())
    assert found is not None
    assert found.ratio is not None
    assert (found.ratio.low, found.ratio.high) == pytest.approx((0.5, 0.5))
    assert found.b.low is not None
    assert found.b.low < found.b.mean


def test_usefulness_compares_teacher_and_student_from_the_students_prefix():
    found = usefulness([recording(rescued_half=[1, 1, 0, NAN], own_half=[0, 1, 0, 1])], 0.5, rng())
    assert found is not None
    assert (found.entered, found.difference.mean) == (3, pytest.approx(1 / 3))


def test_what_was_not_recorded_is_said():
    with pytest.raises(UserError):
        usefulness([recording(own_half=[1.0])], 0.5, rng())
    with pytest.raises(UserError):
        support_overlap([recording(noisy(3))], rng())


# ---- length decay -----------------------------------------------------------------------------------------------------------------


def solved(rates: dict[int, float], items: int = 100) -> tuple[np.ndarray, np.ndarray]:
    """One seed that solves exactly these rates of ``items`` problems with so many steps."""
    scores_LN = np.array([np.arange(items) < round(rate * items) for rate in rates.values()], dtype=float)
    return scores_LN.reshape(1, -1), np.repeat([float(steps) for steps in rates], items)


def test_independent_errors_leave_no_surplus():
    found = length_decay(*solved({1: 0.9, 2: 0.81, 3: 0.729, 4: 0.6561}, 10_000), rng(), 20)
    assert found is not None
    assert found.one_step.mean == pytest.approx(0.9)
    assert found.surplus.mean == pytest.approx(0, abs=1e-12)
    assert mean(found.share) == pytest.approx(0, abs=1e-11)


def test_the_surplus_is_what_independent_errors_do_not_explain():
    found = length_decay(*solved({2: 0.81, 4: 0.4, 6: 0.1}), rng(), 50)
    assert found is not None
    assert found.one_step.mean == pytest.approx(0.9)
    predicted, observed = (0.9**4 + 0.9**6) / 2, 0.25
    assert found.surplus.mean == pytest.approx(predicted - observed)
    assert mean(found.share) == pytest.approx((predicted - observed) / (1 - observed))
    assert found.surplus.excludes_zero


def test_unknown_steps_do_not_count_and_one_level_says_nothing():
    scores_SN, steps_N = solved({1: 0.9, 2: 0.7})
    more_SN, more_N = np.hstack([scores_SN, np.zeros((1, 50))]), np.concatenate([steps_N, np.full(50, NAN)])
    assert length_decay(more_SN, more_N, rng(), 50) == length_decay(scores_SN, steps_N, rng(), 50)
    assert length_decay(*solved({3: 0.5}), rng()) is None
    assert length_decay(scores_SN, np.full(200, NAN), rng()) is None
    with pytest.raises(UserError):
        length_decay(scores_SN, steps_N - 1, rng())


def test_no_failure_has_no_share():
    found = length_decay(*solved({1: 0.5, 2: 1.0}), rng(), 50)
    assert found is not None
    assert (found.surplus.mean, found.share) == (pytest.approx(-0.75), None)


# ---- precision --------------------------------------------------------------------------------------------------------------------


def crossed(seeds: int, prompts: int, seed_sd: float, prompt_sd: float, rest_sd: float, seed: int = 1) -> list[Recording]:
    """Recordings whose R − l·ε is a sum of a seed's, a prompt's and a residual normal."""
    draw = rng(seed)
    excess_SN = (
        50 + seed_sd * draw.normal(size=(seeds, 1)) + prompt_sd * draw.normal(size=prompts) + rest_sd * draw.normal(size=(seeds, prompts))
    )
    return [Recording({"forward_kl": full(excess_N[:, None], np.ones((prompts, 1)))}, {}) for excess_N in excess_SN]


def test_prompts_that_should_halve_the_width_do():
    found = precision(crossed(8, 200, 0.05, 2.0, 2.0))
    assert found.prompts_to_halve is not None
    more = precision(crossed(8, found.prompts_to_halve, 0.05, 2.0, 2.0, seed=2))
    assert found.half_width is not None
    assert more.half_width == pytest.approx(found.half_width / 2, rel=0.25)
    assert 4 * 200 <= found.prompts_to_halve < 12 * 200


def test_where_seeds_dominate_no_prompts_help_and_it_says_so():
    found = precision(crossed(8, 200, 2.0, 1.0, 1.0))
    assert found.prompts_to_halve is None
    assert found.seed_share is not None
    assert found.seed_share > 0.9
    assert "seeds" in found.said
    more = precision(crossed(8, 20_000, 2.0, 1.0, 1.0))
    assert found.half_width is not None
    assert more.half_width is not None
    assert more.half_width > found.half_width / 2


def test_one_seed_speaks_of_its_prompts_alone():
    recordings = crossed(1, 50, 1.0, 1.0, 1.0)
    found, excess_N = precision(recordings), exposure.excess_matrix(recordings[0].along["forward_kl"])
    assert found.half_width == pytest.approx(1.959963984540054 * excess_N.std(ddof=1) / 50**0.5)
    assert (found.seed_share, found.prompts_to_halve) == (0, 200)
    assert precision(crossed(1, 1, 1.0, 1.0, 1.0)).half_width is None


# ---- falsifiers -------------------------------------------------------------------------------------------------------------------


def twin(size: float = 2e-8) -> Recording:
    return Recording({measure: full(*rng().normal(0, size, (2, 20, 6))) for measure in ("forward_kl", "total_variation")}, {})


def method(bias: float) -> list[Recording]:
    return [Recording({"forward_kl": noisy(80, bias, seed)}, {}) for seed in range(4)]


def test_a_sound_measurement_passes():
    assert [found.held for found in falsifiers({"biased": method(1.0), "none": method(0.0)}, twin())] == [True, True, True]


def test_a_teacher_that_diverges_from_itself_is_found_out():
    assert falsifiers({}, twin(1e-4))[0].held is False
    astray = twin()
    values_NT = astray.along["total_variation"].teacher_NT
    values_NT[3, 2] = 0.01
    assert falsifiers({}, astray)[0].held is False


def test_where_there_was_no_effect_swaps_cannot_destroy_one():
    assert falsifiers({"none": method(0.0)}, twin())[1].held is None
    assert falsifiers({}, twin())[1].held is None
    few = [Recording({"forward_kl": noisy(3, 5.0, seed)}, {}) for seed in range(4)]
    assert falsifiers({"few": few}, twin())[1].held is None  # of 8 ways to swap 3 prompts, 2 leave it as it was


def test_an_estimator_that_does_not_look_at_the_labels_is_found_out(monkeypatch: pytest.MonkeyPatch):
    """It finds a gap in any two piles of rollouts, however they are labelled."""
    sound = exposure.excess_matrix
    monkeypatch.setattr(exposure, "excess_matrix", lambda record, length=None: np.abs(sound(record, length)))
    assert falsifiers({"biased": method(1.0)}, twin())[1].held is False


def test_an_estimator_that_sees_bias_where_none_is_fails_the_known_pair(monkeypatch: pytest.MonkeyPatch):
    sound = exposure._measures
    monkeypatch.setattr(exposure, "_measures", lambda regret, per_step, length: sound(1.3 * regret, per_step, length))
    assert falsifiers({}, twin())[2].held is False
