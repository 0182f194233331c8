"""Exposure bias from recorded divergences: regret on the student's own prefixes against the same sum on the teacher's.

    record = Divergences(student_NT, student_alive_NT, teacher_NT, teacher_alive_NT)
    gap(record).excess  # R − l·ε, nats per response
    gap_over_seeds([record_of_seed_0, record_of_seed_1], np.random.default_rng(0))["exaccerr"]

R(l) = Σ_{t≤l} E[d_t], prefixes from the student; l·ε(l) = the same sum, prefixes from the teacher, prompts shared;
ExAccErr(l) = 100 · (R / (l·ε) − 1) %. Sources: Arora et al. 2022, arXiv 2204.01171; MiniLLM App. B.5, arXiv 2306.08543.
A ratio flatters a student whose ε is poor: never show it without R, l·ε and R − l·ε.

Rollouts that ended: ``ended="zero"`` (the headline) lets a finished rollout contribute 0 from then on; ``ended="drop"``
averages each position over the living, then sums, so it is undefined from where nobody lives.

Shapes: N prompts, T positions counted from the first response token, S training seeds, D bootstrap draws, 2 sides (student, teacher).

Known limits: the estimators see only the divergence they are given; in the ratio convention every value must come from a
fresh teacher token. The bootstrap over few seeds is narrow ((S−1)/S of the seeds' variance): claims come from
``statistics.claims`` on ``excess_matrix``. ``drop`` speaks of survivors, hence the counts of the living.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from opd_bench.errors import UserError
from opd_bench.statistics import Array, Interval

# Nats per position. Equal models differ by about 1e-8 to 1e-7 in float32, of either sign; sums below this are reported as 0.
NOISE = 1e-6

Bool = NDArray[np.bool_]
Ended = Literal["zero", "drop"]


@dataclass(frozen=True)
class Divergences:
    """Divergence of teacher and student (nats) at each response position of two rollouts of the same N prompts.

    Row n of both sides starts from prompt n. ``alive`` holds through EOS's own position; values elsewhere are ignored. The
    sides may be padded to different T. Raises UserError for shapes that don't match, a rollout that comes back to life, or
    a value at a living position that is not finite.
    """

    student_NT: Array
    student_alive_NT: Bool
    teacher_NT: Array
    teacher_alive_NT: Bool
    support: float | None = None  # top-k tokens both models name, as a share of k, on the student's rollouts

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
class Gap:
    """The exposure-bias gap at ``length``; None where undefined.

    ``regret`` R, ``per_step`` l·ε and ``excess`` R − l·ε in nats, ``exaccerr`` in percent; ``*_alive`` counts the rollouts
    still alive at position ``length``.
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


def _cut(array_NT: NDArray, length: int) -> NDArray:
    """The first ``length`` positions; beyond the padding nobody lives."""
    return np.pad(array_NT[:, :length], ((0, 0), (0, max(0, length - array_NT.shape[1]))))


def _sides(record: Divergences, length: int) -> tuple[tuple[Array, Bool], tuple[Array, Bool]]:
    """(values_NT, alive_NT) of the student and of the teacher, T = ``length``, values 0 where not alive."""

    def side(values_NT: Array, alive_NT: Bool) -> tuple[Array, Bool]:
        return _cut(np.where(alive_NT, values_NT, 0.0).astype(float), length), _cut(alive_NT, length)

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


def _measures(regret: Array, per_step: Array, length: Array | int) -> dict[str, Array]:
    """The four columns of the gap, noise set to 0 and what is undefined to NaN."""

    def clean(nats: Array) -> Array:
        return np.where(np.abs(nats) <= NOISE * length, 0.0, nats)

    regret, per_step, excess = clean(regret), clean(per_step), clean(regret - per_step)
    with np.errstate(invalid="ignore"):
        exaccerr = np.where(per_step > 0, 100 * excess / np.where(per_step > 0, per_step, 1.0), np.nan)
    return {"regret": regret, "per_step": per_step, "excess": excess, "exaccerr": exaccerr}


def _resample(count: int, draws: int, rng: np.random.Generator) -> Array:
    """How often each of ``count`` units enters each draw: (1 + draws) × count; row 0 is the sample itself."""
    drawn = rng.multinomial(count, np.full(count, 1 / count), size=draws).astype(float)
    return np.vstack([np.ones((1, count)), drawn])


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
    """The gap at ``length``; by default at the last position with a living rollout (on both sides for "drop").

    Raises UserError for a length that was not recorded.
    """
    length = _length([record], length, ended)
    found, at = curves(record, ended), length - 1
    columns = _measures(found.regret_T[at], found.per_step_T[at], length)
    numbers = {name: None if np.isnan(value) else float(value) for name, value in columns.items()}
    return Gap(**numbers, length=length, student_alive=int(found.student_alive_T[at]), teacher_alive=int(found.teacher_alive_T[at]))


def gap_over_seeds(
    records: Sequence[Divergences],
    rng: np.random.Generator,
    draws: int = 1000,
    length: int | None = None,
    ended: Ended = "zero",
    level: float = 0.95,
) -> dict[str, Interval | None]:
    """Gap with two-way bootstrap intervals (percentile) for regret, per_step, excess and exaccerr; one record per seed.

    Seeds and prompts are drawn independently of each other; a draw of prompts holds for all seeds and for both sides. With
    several seeds, ExAccErr is the ratio of the mean R to the mean l·ε. A column is None where undefined; a bound is None
    with one prompt, and where undefined draws could move it. Raises UserError where records differ in their prompts or
    ``length`` was not recorded.
    """
    length = _length(records, length, ended)
    seeds, prompts = len(records), len(records[0])
    weight_DN, weight_DS = (_resample(count, draws, rng) for count in (prompts, seeds))

    sums_2D = np.zeros((2, draws + 1))
    for record, weight_D in zip(records, weight_DS.T, strict=True):
        seed_2D = np.stack([_mean_by_position(*side, ended, weight_DN).sum(axis=1) for side in _sides(record, length)])
        sums_2D += np.where(weight_D > 0, weight_D / seeds * seed_2D, 0.0)
    regret_D, per_step_D = sums_2D

    def interval(column_D: Array) -> Interval | None:
        if np.isnan(column_D[0]):
            return None
        tail = (1 - level) / 2
        low = np.quantile(np.nan_to_num(column_D[1:], nan=-np.inf), tail, method="lower")
        high = np.quantile(np.nan_to_num(column_D[1:], nan=np.inf), 1 - tail, method="higher")
        bounds = (float(bound) if prompts > 1 and np.isfinite(bound) else None for bound in (low, high))
        return Interval(float(column_D[0]), *bounds)

    return {name: interval(column_D) for name, column_D in _measures(regret_D, per_step_D, length).items()}


def excess_matrix(record: Divergences, length: int | None = None) -> Array:
    """R − l·ε of each prompt (nats, finished rollouts contribute 0): N; its mean is the gap's excess.

    Stack one row per seed to get the scores that ``statistics.claims`` takes (better="lower").
    """
    length = _length([record], length, "zero")
    (student_NT, _), (teacher_NT, _) = _sides(record, length)
    return _measures(student_NT.sum(axis=1), teacher_NT.sum(axis=1), length)["excess"]
