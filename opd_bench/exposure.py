"""Exposure bias from recorded rollouts: what a student's own prefixes cost it, against the teacher's.

    recordings = [recording_of_seed_0, recording_of_seed_1]  # of one method
    gaps(recordings, np.random.default_rng(0))["forward_kl"]["zero"]["excess"]  # R − l·ε, nats per response
    prefix_contrast(recordings, 0.5, np.random.default_rng(0)).difference  # in solve rate
    falsifiers({"mine": recordings}, teacher_as_student)  # what must hold for the numbers to mean something

R(l) = Σ_{t≤l} E[d_t], prefixes from the student; l·ε(l) = the same sum, prefixes from the teacher, prompts shared;
ExAccErr(l) = 100 · (R / (l·ε) − 1) %. Sources: Arora et al. 2022, arXiv 2204.01171; MiniLLM App. B.5, arXiv 2306.08543.
A ratio flatters a student whose ε is poor: never show it without R, l·ε and R − l·ε.

Rollouts that ended: ``ended="zero"`` (the headline) lets a finished rollout contribute 0 from then on; ``ended="drop"``
averages each position over the living, then sums, so it is undefined from where nobody lives.

Intervals are 95 % percentile bootstraps over prompts and seeds, drawn independently; generators of one state give all the same draws.

Shapes: N prompts or items, T response positions, S training seeds, L numbers of steps, D draws (row 0 the sample), 2 sides, K states.

Known limits: the estimators see only what was recorded; in the ratio convention every value must come from a fresh teacher token. The
bootstrap over few seeds is narrow ((S−1)/S of the seeds' variance), and has no width at a rate of 0 or 1: claims come from
``statistics.claims`` on ``excess_matrix``. ``drop`` speaks of survivors, a prefix contrast of prompts whose prefixes were still right.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
from numpy.typing import NDArray

from opd_bench.errors import UserError
from opd_bench.statistics import ALPHA, Array, Interval, over_items, smallest_p, two_way_interval, two_way_variance

# Nats per position. Equal models differ by about 1e-8 to 1e-7 in float32, of either sign; sums below this are reported as 0.
NOISE = 1e-6
MEASURES = ("forward_kl", "reverse_kl", "total_variation", "log_ratio", "matched")
FRACTIONS = (0.25, 0.5, 0.75)
INJECTIONS = ("0 tokens", "1 token", "2 tokens", "4 tokens", "wrong result")

Bool = NDArray[np.bool_]
Ended = Literal["zero", "drop"]
Rng = np.random.Generator


@dataclass(frozen=True)
class Divergences:
    """Divergence of teacher and student (nats) at each response position of two rollouts of the same N prompts.

    Row n of both sides starts from prompt n. ``alive`` holds through EOS's own position; values elsewhere are ignored. The sides may be
    padded to different T. Raises UserError for shapes that don't match, a rollout that revives, or a living value that is not finite.
    """

    student_NT: Array
    student_alive_NT: Bool
    teacher_NT: Array
    teacher_alive_NT: Bool

    def __post_init__(self) -> None:
        for side, values_NT, alive_NT in (
            ("student", self.student_NT, self.student_alive_NT),
            ("teacher", self.teacher_NT, self.teacher_alive_NT),
        ):
            if values_NT.shape != alive_NT.shape or values_NT.ndim != 2 or not values_NT.size or len(values_NT) != len(self):
                raise UserError(f"{side} divergences and alive must both be prompts × positions, with the same prompts on both sides")
            if alive_NT.dtype != bool:
                raise UserError(f"{side} alive must be boolean, not {alive_NT.dtype}")
            if (alive_NT[:, 1:] & ~alive_NT[:, :-1]).any():
                raise UserError(f"a {side} rollout lives again after its end: count positions from the first response token")
            if not np.isfinite(values_NT[alive_NT]).all():
                raise UserError(f"a {side} divergence at a living position is not finite: mask tokens banned by both models")

    def __len__(self) -> int:
        return len(self.student_NT)


@dataclass(frozen=True)
class Recording:
    """What one model showed on N prompts, beside the teacher.

    ``along``: numbers by position on the student's and on the teacher's rollouts. "forward_kl" KL(T‖S) always; in a full recording also
    "reverse_kl", "total_variation", "log_ratio" (log T(y) − log S(y), y a fresh draw from T at every prefix, of either sign) and "matched"
    (KL(T‖S_τ), own rollouts written by S_τ too, with τ such that the student's mean entropy on the teacher's prefixes is the teacher's);
    and, no divergences, "teacher_entropy", "student_entropy" (nats), "support" (share of the likeliest next tokens that both name).

    ``continued``: N scores in [0, 1] by kind of continuation, NaN where a prompt has none. From fraction f of a sampled rollout, greedily:
    "own f" the student from its own, "teacher f" the student from the teacher's, "rescued f" the teacher from the student's; "own right f"
    and "teacher right f" say 1 or 0 whether that prefix was still right; "own 1" and "teacher 1" score the rollouts themselves. From one
    corrupted teacher prefix: "student after i" and "teacher after i", i of ``INJECTIONS``.
    """

    along: dict[str, Divergences]
    continued: dict[str, Array]
    temperature: float | None = None  # τ of "matched"


@dataclass(frozen=True)
class Gap:
    """The exposure-bias gap at ``length``; None where undefined.

    ``regret`` R, ``per_step`` l·ε, ``excess`` R − l·ε in nats, ``exaccerr`` in percent; ``*_alive``: rollouts alive at that position.
    """

    regret: float | None
    per_step: float | None
    excess: float | None
    exaccerr: float | None
    length: int
    student_alive: int
    teacher_alive: int


@dataclass(frozen=True)
class Curves:
    """The gap at every length 1..T, and the mean divergence and number alive at every position; NaN where undefined."""

    regret_T: Array
    per_step_T: Array
    exaccerr_T: Array
    student_T: Array
    teacher_T: Array
    student_alive_T: NDArray[np.int64]
    teacher_alive_T: NDArray[np.int64]


@dataclass(frozen=True)
class Band:
    """A mean and its 95 % interval along T; NaN where undefined."""

    mean_T: Array
    low_T: Array
    high_T: Array


@dataclass(frozen=True)
class Paired:
    """Two solve rates over the same ``entered`` pairs of a seed and a prompt; ``ratio`` = a / b is None where b is 0.

    The functions that return it give None where nothing entered, and raise UserError for what was not recorded.
    """

    a: Interval
    b: Interval
    difference: Interval
    ratio: Interval | None
    entered: int


@dataclass(frozen=True)
class Decay:
    """Accuracy observed and predicted by number of steps, and one-step accuracy.

    ``surplus`` = predicted − observed over the items with more than the fewest steps; ``share`` is what part of their failure it is: None
    where all are solved, below 0 where they do better than predicted.
    """

    accuracy: dict[int, Interval | None]
    predicted: dict[int, Interval | None]
    one_step: Interval
    surplus: Interval
    share: Interval | None


@dataclass(frozen=True)
class Precision:
    """Half the width of the 95 % two-way interval of R − l·ε (nats), and how many prompts would halve it with the same seeds.

    ``seed_share`` is the part of its variance that prompts do not remove. None where undefined, and where no number of prompts does it.
    """

    prompts: int
    half_width: float | None
    seed_share: float | None
    prompts_to_halve: int | None
    said: str


@dataclass(frozen=True)
class Falsifier:
    name: str
    held: bool | None  # None where it could not be told
    said: str


def _sides(record: Divergences, length: int) -> tuple[tuple[Array, Bool], tuple[Array, Bool]]:
    """(values_NT, alive_NT) of the student and of the teacher, T = ``length``; values 0 where not alive, as is all beyond the padding."""

    def side(values_NT: Array, alive_NT: Bool) -> tuple[Array, Bool]:
        pad = (0, 0), (0, max(0, length - alive_NT.shape[1]))
        return np.pad(np.where(alive_NT, values_NT, 0.0).astype(float)[:, :length], pad), np.pad(alive_NT[:, :length], pad)

    return side(record.student_NT, record.student_alive_NT), side(record.teacher_NT, record.teacher_alive_NT)


def _length(records: Sequence[Divergences], length: int | None, ended: Ended) -> int:
    """``length`` if it was recorded; by default the last position with a living rollout (on both sides for "drop")."""
    if not records or len({len(record) for record in records}) > 1:
        raise UserError("records of one method must share their prompts, and there must be at least one: record every seed")
    sides = zip(*((record.student_alive_NT.sum(1).max(), record.teacher_alive_NT.sum(1).max()) for record in records), strict=True)
    if length is None:
        return max(1, int(max(map(max, sides)) if ended == "zero" else min(map(min, sides))))
    recorded = max(max(record.student_NT.shape[1], record.teacher_NT.shape[1]) for record in records)
    if not 1 <= length <= recorded:
        raise UserError(f"length {length} was not recorded: choose 1 to {recorded}")
    return length


def _mean_by_position(values_NT: Array, alive_NT: Bool, ended: Ended, weight_DN: Array) -> Array:
    """Mean over prompts at each position, for each draw of prompts: DT; NaN where "drop" finds nobody alive."""
    count_DT = weight_DN @ alive_NT.astype(float) if ended == "drop" else weight_DN.sum(axis=1, keepdims=True)
    with np.errstate(invalid="ignore"):
        return (weight_DN @ values_NT) / count_DT


def _quotient(a: Array, b: Array) -> Array:
    """a / b where b is above zero; NaN elsewhere."""
    return np.where(b > 0, a / np.where(b > 0, b, 1.0), np.nan)


def _measures(regret: Array, per_step: Array, length: NDArray[np.int64] | int) -> dict[str, Array]:
    """The four columns of the gap, noise set to 0 and what is undefined to NaN."""

    def clean(nats: Array) -> Array:
        return np.where(np.abs(nats) <= NOISE * length, 0.0, nats)

    regret, per_step, excess = clean(regret), clean(per_step), clean(regret - per_step)
    return {"regret": regret, "per_step": per_step, "excess": excess, "exaccerr": _quotient(100 * excess, per_step)}


class _Bootstrap:
    """Draws of prompts and, independently, of seeds: (1 + draws) × N and × S; row 0 is the sample itself."""

    def __init__(self, seeds: int, prompts: int, draws: int, rng: Rng):
        drawn = [rng.multinomial(count, np.full(count, 1 / count), size=draws).astype(float) for count in (prompts, seeds)]
        self.weight_DN, self.weight_DS = (np.vstack([np.ones(weight_D.shape[1]), weight_D]) for weight_D in drawn)

    def by_position(self, records: Sequence[Divergences], length: int, ended: Ended) -> Array:
        """Mean over seeds of the mean over prompts at each position, student's and teacher's side: 2DT."""
        means_2DT = np.zeros((2, len(self.weight_DN), length))
        for record, weight_D in zip(records, self.weight_DS.T, strict=True):
            seed_2DT = np.stack([_mean_by_position(*side, ended, self.weight_DN) for side in _sides(record, length)])
            share_D1 = weight_D[:, None] / len(records)
            means_2DT += np.where(share_D1 > 0, share_D1 * seed_2DT, 0.0)
        return means_2DT

    def pooled(self, total_SN: Array, count_SN: Array) -> Array:
        """Σ total / Σ count over the drawn seeds and prompts: D; NaN where nothing was counted."""
        total_D, count_D = (((self.weight_DS @ table_SN) * self.weight_DN).sum(axis=1) for table_SN in (total_SN, count_SN))
        return _quotient(total_D, count_D)

    def interval(self, drawn_D: Array, level: float = 0.95) -> Interval | None:
        """None where the sample itself is undefined."""
        return None if np.isnan(drawn_D[0]) else self.known(drawn_D, level)

    def known(self, drawn_D: Array, level: float = 0.95) -> Interval:
        """The interval of what the sample defines; a bound is None with one prompt, and where undefined draws could move it."""
        band = self.band(drawn_D[:, None], level)
        low, high = (None if np.isnan(bound_T[0]) else float(bound_T[0]) for bound_T in (band.low_T, band.high_T))
        return Interval(float(band.mean_T[0]), low, high)

    def band(self, drawn_DT: Array, level: float = 0.95) -> Band:
        undefined_DT, tail = np.isnan(drawn_DT[1:]), (1 - level) / 2
        low_T = np.quantile(np.where(undefined_DT, -np.inf, drawn_DT[1:]), tail, axis=0, method="lower")
        high_T = np.quantile(np.where(undefined_DT, np.inf, drawn_DT[1:]), 1 - tail, axis=0, method="higher")
        known_T = ~np.isnan(drawn_DT[0]) & (self.weight_DN.shape[1] > 1)
        return Band(drawn_DT[0], *(np.where(known_T & np.isfinite(bound_T), bound_T, np.nan) for bound_T in (low_T, high_T)))


def curves(record: Divergences, ended: Ended = "zero") -> Curves:
    """R, l·ε and ExAccErr at every l, which are the running sums of the mean divergence by position; T = the wider side."""
    width = max(record.student_NT.shape[1], record.teacher_NT.shape[1])
    student, teacher = _sides(record, width)
    everyone_1N = np.ones((1, len(record)))
    student_T, teacher_T = (_mean_by_position(*side, ended, everyone_1N)[0] for side in (student, teacher))
    found = _measures(student_T.cumsum(), teacher_T.cumsum(), np.arange(1, width + 1))
    alive = (side[1].sum(axis=0) for side in (student, teacher))
    return Curves(found["regret"], found["per_step"], found["exaccerr"], student_T, teacher_T, *alive)


def gap(record: Divergences, length: int | None = None, ended: Ended = "zero") -> Gap:
    """The gap at ``length``, by default the last position with a living rollout (on both sides for "drop"); UserError beyond the record."""
    length = _length([record], length, ended)
    found, at = curves(record, ended), length - 1
    columns = _measures(found.regret_T[at], found.per_step_T[at], length)
    numbers = {name: None if np.isnan(value) else float(value) for name, value in columns.items()}
    return Gap(**numbers, length=length, student_alive=int(found.student_alive_T[at]), teacher_alive=int(found.teacher_alive_T[at]))


def gap_over_seeds(
    records: Sequence[Divergences], rng: Rng, draws: int = 1000, length: int | None = None, ended: Ended = "zero", level: float = 0.95
) -> dict[str, Interval | None]:
    """Gap with its intervals for regret, per_step, excess and exaccerr; one record per seed.

    With several seeds, ExAccErr is the ratio of the mean R to the mean l·ε. A column is None where undefined; a bound is None with one
    prompt, and where undefined draws could move it. Raises UserError where records differ in prompts or ``length`` was not recorded.
    """
    length = _length(records, length, ended)
    bootstrap = _Bootstrap(len(records), len(records[0]), draws, rng)
    regret_D, per_step_D = bootstrap.by_position(records, length, ended).sum(axis=-1)
    columns = _measures(regret_D, per_step_D, length)
    return {name: bootstrap.interval(column_D, level) for name, column_D in columns.items()}


def curves_over_seeds(records: Sequence[Divergences], rng: Rng, draws: int = 1000, ended: Ended = "zero") -> dict[str, Band]:
    """``gap_over_seeds`` at every length 1..T, T the last position with a living rollout, and the mean at every position.

    The means on "student" and "teacher" prefixes are over the living for "drop", where they are undefined once a seed has nobody alive.
    """
    length = _length(records, None, "zero")
    bootstrap = _Bootstrap(len(records), len(records[0]), draws, rng)
    student_DT, teacher_DT = bootstrap.by_position(records, length, ended)
    columns = _measures(student_DT.cumsum(axis=1), teacher_DT.cumsum(axis=1), np.arange(1, length + 1))
    return {name: bootstrap.band(column_DT) for name, column_DT in {**columns, "student": student_DT, "teacher": teacher_DT}.items()}


def excess_matrix(record: Divergences, length: int | None = None) -> Array:
    """R − l·ε of each prompt (nats, "zero"): N; a row per seed makes the scores that ``statistics.claims`` takes (better="lower")."""
    length = _length([record], length, "zero")
    (student_NT, _), (teacher_NT, _) = _sides(record, length)
    return _measures(student_NT.sum(axis=1), teacher_NT.sum(axis=1), length)["excess"]


def _recorded(recordings: Sequence[Recording], where: Literal["along", "continued"], name: str) -> list:
    tables = [getattr(recording, where) for recording in recordings]
    if not tables or not all(name in table for table in tables):
        raise UserError(f"{name!r} was not recorded: record every seed in full")
    return [table[name] for table in tables]


def gaps(recordings: Sequence[Recording], rng: Rng, draws: int = 1000) -> dict[str, dict[Ended, dict[str, Interval | None]]]:
    """``gap_over_seeds`` by measure and by treatment of ended rollouts, on the same draws, for the measures that every seed recorded."""
    return {
        measure: {
            ended: gap_over_seeds(_recorded(recordings, "along", measure), deepcopy(rng), draws, ended=ended) for ended in get_args(Ended)
        }
        for measure in MEASURES
        if all(measure in recording.along for recording in recordings)
    }


def support_overlap(recordings: Sequence[Recording], rng: Rng, draws: int = 1000) -> dict[str, Interval | None]:
    """Share of the likeliest next tokens that both models name, over the living positions of "student" and of "teacher" prefixes."""
    records = _recorded(recordings, "along", "support")
    length = _length(records, None, "zero")
    bootstrap = _Bootstrap(len(records), len(records[0]), draws, rng)
    sums_S22N = np.array([[[part_NT.sum(axis=1) for part_NT in side] for side in _sides(record, length)] for record in records], float)
    totals = (bootstrap.pooled(sums_S22N[:, at, 0], sums_S22N[:, at, 1]) for at in range(2))
    return {side: bootstrap.interval(total_D) for side, total_D in zip(("student", "teacher"), totals, strict=True)}


def _paired(recordings: Sequence[Recording], kinds: Sequence[str], right: Sequence[str], rng: Rng, draws: int) -> Paired | None:
    """Two kinds of continuation where both were scored and every flag of ``right`` is 1; None where nothing entered."""
    a_SN, b_SN, *flags = (np.stack(_recorded(recordings, "continued", kind)) for kind in (*kinds, *right))
    entered_SN = np.isfinite(a_SN) & np.isfinite(b_SN) & np.all([flag_SN == 1 for flag_SN in flags], axis=0)
    if not entered_SN.any():
        return None
    bootstrap = _Bootstrap(len(a_SN), a_SN.shape[1], draws, rng)
    a_D, b_D = (bootstrap.pooled(np.where(entered_SN, scores_SN, 0.0), entered_SN.astype(float)) for scores_SN in (a_SN, b_SN))
    a, b, difference = (bootstrap.known(column_D) for column_D in (a_D, b_D, a_D - b_D))
    return Paired(a, b, difference, bootstrap.interval(_quotient(a_D, b_D)), int(entered_SN.sum()))


def prefix_contrast(recordings: Sequence[Recording], fraction: float, rng: Rng, draws: int = 1000) -> Paired | None:
    """The student's solve rates from ``fraction`` of the teacher's rollout (a) and of its own (b), where both were still right."""
    right = (f"teacher right {fraction:g}", f"own right {fraction:g}")
    return _paired(recordings, (f"teacher {fraction:g}", f"own {fraction:g}"), right, rng, draws)


def recovery(recordings: Sequence[Recording], injection: str, rng: Rng, draws: int = 1000) -> Paired | None:
    """Solve rates of student (a) and teacher (b) from the same corrupted prefixes; their ratio is the recovery rate."""
    return _paired(recordings, (f"student after {injection}", f"teacher after {injection}"), (), rng, draws)


def usefulness(recordings: Sequence[Recording], fraction: float, rng: Rng, draws: int = 1000) -> Paired | None:
    """Solve rates of teacher (a) and student (b) from ``fraction`` of the student's rollout: where they meet, no guide is left."""
    return _paired(recordings, (f"rescued {fraction:g}", f"own {fraction:g}"), (), rng, draws)


def length_decay(scores_SN: Array, steps_N: Array, rng: Rng, draws: int = 1000) -> Decay | None:
    """Accuracy by the number of steps a problem needs, against errors that strike every step alike.

    One-step accuracy a is accuracy at the fewest steps n0 to the power 1 / n0; a**n is predicted for n steps. Items of unknown (NaN) steps
    are left out. None where fewer than two numbers of steps are known. Raises UserError for steps below 1.
    """
    known_N = np.isfinite(steps_N)
    scores_SN, steps_N = scores_SN[:, known_N], steps_N[known_N]
    levels_L = np.unique(steps_N)
    if len(levels_L) < 2:
        return None
    if levels_L[0] < 1:
        raise UserError(f"a problem is said to need {levels_L[0]:g} steps: count at least one")
    bootstrap = _Bootstrap(len(scores_SN), scores_SN.shape[1], draws, rng)
    at_NL = (steps_N[:, None] == levels_L).astype(float)
    items_DL = bootstrap.weight_DN @ at_NL
    right_DL = (bootstrap.weight_DS @ scores_SN * bootstrap.weight_DN) @ at_NL / len(scores_SN)
    accuracy_DL = _quotient(right_DL, items_DL)
    one_step_D = accuracy_DL[:, 0] ** (1 / levels_L[0])
    predicted_DL = one_step_D[:, None] ** levels_L
    longer_D = items_DL[:, 1:].sum(axis=1)
    observed_D, expected_D = (_quotient(sum_DL[:, 1:].sum(axis=1), longer_D) for sum_DL in (right_DL, items_DL * predicted_DL))
    accuracy, predicted = (
        {int(steps): bootstrap.interval(column_D) for steps, column_D in zip(levels_L, table_DL.T, strict=True)}
        for table_DL in (accuracy_DL, predicted_DL)
    )
    surplus_D = expected_D - observed_D
    share = bootstrap.interval(_quotient(surplus_D, 1 - observed_D))
    return Decay(accuracy, predicted, bootstrap.known(one_step_D), bootstrap.known(surplus_D), share)


def precision(recordings: Sequence[Recording], measure: str = "forward_kl") -> Precision:
    """What the prompts of ``recordings`` buy; the variance is split into what more prompts remove and what they do not."""
    excess_SN = np.stack([excess_matrix(record) for record in _recorded(recordings, "along", measure)])
    seeds, prompts = excess_SN.shape
    weights, several = {"prompts": 1.0}, seeds > 1
    interval = two_way_interval({"prompts": excess_SN}, weights) if several else over_items({"prompts": excess_SN[0]}, weights)
    if interval.high is None:
        return Precision(prompts, None, None, None, "One prompt has no interval: record more.")
    by_prompt = float(excess_SN.mean(axis=0).var(ddof=1)) / prompts
    variance = two_way_variance({"prompts": excess_SN}, weights) if several else by_prompt
    if not variance:
        return Precision(prompts, 0.0, None, None, "Every seed and every prompt gives the same R − l·ε.")
    fixed = max(0.0, variance - by_prompt)
    needed = int(np.ceil(round(prompts * (variance - fixed) / (variance / 4 - fixed), 6))) if variance > 4 * fixed else None
    half_width, share = interval.high - interval.mean, fixed / variance
    advice = f"{needed} prompts would halve that" if needed else "no number of prompts halves that: train more seeds"
    said = (
        f"± {half_width:.2g} nats from {prompts} prompts and {seeds} seed{'s' * several}, {share:.0%} of its variance from seeds: {advice}."
    )
    return Precision(prompts, half_width, share, needed, said)


def falsifiers(methods: Mapping[str, Sequence[Recording]], teacher: Recording) -> list[Falsifier]:
    """What must hold of ``methods`` (recordings by seed) and of ``teacher``, the teacher measured as if it were the student."""
    return [_nothing_where_models_are_equal(teacher), _nothing_from_swapped_labels(methods), _nothing_from_a_steady_student()]


def _nothing_where_models_are_equal(teacher: Recording) -> Falsifier:
    records = _recorded([teacher], "along", "forward_kl") + [teacher.along[name] for name in MEASURES[1:] if name in teacher.along]
    worst = max(float(np.abs(values_NT).max()) for record in records for values_NT, _ in _sides(record, _length([record], None, "zero")))
    undefined = all(gap(record, ended=ended).exaccerr is None for record in records for ended in get_args(Ended))
    said = f"The teacher measured as the student is at most {worst:.1g} nats from itself; the ratio is {'un' * undefined}defined."
    return Falsifier("teacher as student", worst <= NOISE and undefined, said)


def _nothing_from_swapped_labels(methods: Mapping[str, Sequence[Recording]], swaps: int = 200) -> Falsifier:
    """Whether R − l·ε, where its 99 % interval lies off 0, is more than what the same rollouts give under random labels.

    It fails where random labels give as much with a chance above .05, or lean to one side, which the estimators alone could cause.
    """
    rng = np.random.default_rng(0)
    lost, judged = [], []
    for name, recordings in methods.items():
        records = _recorded(recordings, "along", "forward_kl")
        found = gap_over_seeds(records, deepcopy(rng), level=0.99)["excess"]
        if found is None or not found.excludes_zero or smallest_p(len(records[0])) >= ALPHA:
            continue
        swap_KN = rng.random((swaps, len(records[0]))) < 0.5
        excess_K = np.array([np.mean([excess_matrix(_swapped(record, swap_N)).mean() for record in records]) for swap_N in swap_KN])
        p = (1 + (np.abs(excess_K) >= abs(found.mean)).sum()) / (1 + swaps)
        leans = abs(excess_K.mean()) > 4 * excess_K.std(ddof=1) / swaps**0.5
        judged.append(f"{name} {np.abs(excess_K).mean():.2g} of {abs(found.mean):.2g}")
        lost += [name] if p > ALPHA or leans else []
    if not judged:
        return Falsifier("labels swapped", None, "No method has an excess to destroy.")
    said = f"With the labels of the prefixes swapped at random, |R − l·ε| is in nats: {', '.join(judged)}"
    return Falsifier("labels swapped", not lost, said + (f"; chance alone could give that of {', '.join(lost)}." if lost else "."))


def _swapped(record: Divergences, swap_N: Bool) -> Divergences:
    """``record`` with what was written by student and by teacher exchanged for some prompts."""
    student, teacher = _sides(record, _length([record], None, "zero"))
    pairs = [*zip(student, teacher, strict=True), *zip(teacher, student, strict=True)]
    values_NT, alive_NT, other_NT, other_alive_NT = (np.where(swap_N[:, None], theirs_NT, own_NT) for own_NT, theirs_NT in pairs)
    return Divergences(values_NT, alive_NT, other_NT, other_alive_NT)


def _steady(prompts: int, length: int, rng: Rng) -> Divergences:
    """Log-ratios of fresh teacher tokens along a Markov pair of one KL(T‖S) in both states, but of other ratios and visits."""
    alike = 0.9 * np.log(0.9 / 0.6) + 0.1 * np.log(0.1 / 0.4)
    rare = (1 - np.sqrt(1 - np.exp(-2 * alike))) / 2  # KL((½, ½) ‖ (rare, 1 − rare)) is ``alike`` too
    teacher_KV, student_KV = np.array([[0.9, 0.1], [0.5, 0.5]]), np.array([[0.6, 0.4], [rare, 1 - rare]])
    sides = []
    for writer_KV in (student_KV, teacher_KV):
        state_N, values_NT = np.zeros(prompts, dtype=int), np.empty((prompts, length))
        for at in range(length):
            fresh_N, token_N = ((rng.random(prompts) >= policy_KV[state_N, 0]).astype(int) for policy_KV in (teacher_KV, writer_KV))
            values_NT[:, at] = np.log(teacher_KV / student_KV)[state_N, fresh_N]
            state_N = token_N  # a token is the next state
        sides += [values_NT, np.arange(length) < rng.geometric(0.05, (prompts, 1))]
    return Divergences(*sides)


def _nothing_from_a_steady_student() -> Falsifier:
    rng = np.random.default_rng(0)
    found = gap_over_seeds([_steady(500, 16, rng)], rng)["excess"]
    held = found is not None and found.low is not None and not found.excludes_zero
    said = "none" if found is None else f"{found.mean:.2g} [{found.low:.2g}, {found.high:.2g}] nats"
    return Falsifier("errors that no prefix changes", held, f"R − l·ε of a student that errs alike after every prefix: {said}.")
