"""The same runs by other ledgers: what an arm cost and how methods compare, according to what is charged.

    for reading in readings(curves):            # curves: method -> one learning curve per seed
        reading.cost, reading.order, reading.turned
    for costs in compare_costs({"a": {"flops": {"student_update": 8e19}}, "b": ...}):
        costs.ledger, costs.ratio

A *ledger* is a set of charge kinds in one unit; it decides which charges count. Charging finished scores differently cannot reorder
them, so a reading goes back along the learning curves: it takes every arm at the largest cost that all arms reached in that ledger.

Limits: a reading is a point estimate without a test. Between the points of a curve the score is taken to be linear in the cost; it is
never extrapolated. Undefined numbers are None, never NaN.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import permutations

import numpy as np

from opd_bench.errors import UserError, did_you_mean
from opd_bench.ledger import VERIFIER

Spent = Mapping[str, Mapping[str, float]]  # unit -> kind of charge -> amount, as an arm records it

BENCH = ("student_sample", "student_update", "teacher_generate", "teacher_score", "judge")  # charged by the bench
START = ("cold_start_student", "cold_start_teacher")  # training the student all arms start from, and making its data
KINDS = (*BENCH, *START)
TOLERANCE = 0.01  # costs this close count as matched, as budgets do


@dataclass(frozen=True)
class Basis:
    """A ledger: the kinds of charge that count, in one unit, and the question that its readings answer."""

    name: str
    kinds: tuple[str, ...]
    question: str
    unit: str = "flops"  # or another that arms record: tokens, seconds


def _without(*free: str) -> tuple[str, ...]:
    return tuple(kind for kind in BENCH if kind not in free)


DATA_CHARGED = Basis("data charged", BENCH, "what if all of it has to be computed?")
LEDGERS = (
    DATA_CHARGED,
    Basis("data free", _without("teacher_generate"), "what if the teacher's text is there already?"),
    Basis(
        "teacher scoring free", _without("teacher_generate", "teacher_score"), "what if its text is there and its scoring is not counted?"
    ),
    Basis(
        "from scratch, data free",
        (*_without("teacher_generate"), "cold_start_student"),
        "what if the text is there and the cold start must be trained?",
    ),
    Basis("from scratch, data charged", KINDS, "what did it take from the base model on, data included?"),
    Basis("wall clock", BENCH, "how long did it take on this machine?", "seconds"),
)


def cost(spent: Spent, ledger: Basis) -> float:
    """What ``spent`` comes to in ``ledger``, whose unit it records. UserError for an unknown kind: it would be free in every ledger."""
    amounts = spent[ledger.unit]
    for kind in amounts:
        if kind not in (*KINDS, VERIFIER):
            raise UserError(f"unknown kind of charge {kind!r}{did_you_mean(kind, KINDS)}")
    return sum(amounts.get(kind, 0) for kind in ledger.kinds)


def readable(arms: Collection[Spent], ledgers: Iterable[Basis] = LEDGERS) -> list[Basis]:
    """The ledgers whose unit every arm recorded, with the cold start where it is charged."""
    start = {ledger: [kind for kind in START if kind in ledger.kinds] for ledger in ledgers}
    return [ledger for ledger in start if all(ledger.unit in spent and set(start[ledger]) <= spent[ledger.unit].keys() for spent in arms)]


# ---- what arms cost ---------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Costs:
    """What each arm cost in one ledger, and how many times the cheapest: None for all where an arm costs nothing."""

    ledger: Basis
    cost: dict[str, float]
    ratio: dict[str, float | None]


def compare_costs(arms: Mapping[str, Spent]) -> list[Costs]:
    """The costs of ``arms`` in every ledger they can be read in."""
    found = []
    for ledger in readable(arms.values()):
        costs = {name: cost(spent, ledger) for name, spent in arms.items()}
        least = min(costs.values(), default=0)
        found.append(Costs(ledger, costs, {name: amount / least if least else None for name, amount in costs.items()}))
    return found


# ---- how methods compare at equal cost --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Point:
    """What an arm had spent in all, cold start included where it is known, and the score it had then."""

    spent: Spent
    score: float


Curves = Mapping[str, Sequence[Sequence[Point]]]  # method -> seed -> points in the order they were reached


@dataclass(frozen=True)
class Reading:
    """Every method at one cost in one ledger. All is empty or None where an arm costs nothing, so that no cost can be matched."""

    ledger: Basis
    cost: float | None  # the largest that all arms, every seed of every method, reached
    score: dict[str, float | None]  # mean over seeds; None where one of them is
    score_by_seed: dict[str, list[float | None]]  # None where the curve begins above the cost
    order: list[str]  # the methods that have a score, best first
    turned: list[tuple[str, str]]  # pairs whose first is ahead in the binding ledger and behind in this one


def readings(curves: Curves, binding: Basis = DATA_CHARGED) -> list[Reading]:
    """The reading of ``binding``, the ledger of the budget, and then of every other ledger that all points can be read in.

    UserError where there is nothing to read (no method, no seeds, no points) or ``binding`` charges for what was not recorded.
    """
    if not curves or not all(curves.values()):
        raise UserError("there are no learning curves to read: give every method one per seed")
    if not all(curve for seeds in curves.values() for curve in seeds):
        raise UserError("a learning curve has no points: score every arm at least once")
    points = [point.spent for seeds in curves.values() for curve in seeds for point in curve]
    if not readable(points, [binding]):
        raise UserError(f"the learning curves do not record all that the ledger {binding.name!r} charges, in {binding.unit}")
    first = _read(curves, binding, {})
    return [first, *(_read(curves, ledger, first.score) for ledger in readable(points) if ledger != binding)]


def _read(curves: Curves, ledger: Basis, bound: Mapping[str, float | None]) -> Reading:
    costs = {name: [[cost(point.spent, ledger) for point in curve] for curve in seeds] for name, seeds in curves.items()}
    matched = min(max(curve) for seeds in costs.values() for curve in seeds)
    by_seed = {
        name: [
            _interpolated(along, [point.score for point in curve], matched) if matched else None
            for along, curve in zip(costs[name], seeds, strict=True)
        ]
        for name, seeds in curves.items()
    }
    score = {name: _mean(scores) for name, scores in by_seed.items()}
    known = {name: value for name, value in score.items() if value is not None}
    ahead = {name: value for name, value in bound.items() if value is not None and name in known}
    turned = [(a, b) for a, b in permutations(ahead, 2) if ahead[a] > ahead[b] and known[a] < known[b]]
    return Reading(ledger, matched or None, score, by_seed, sorted(known, key=known.__getitem__, reverse=True), turned)


def _interpolated(costs: Sequence[float], scores: Sequence[float], at: float) -> float | None:
    """The score at the cost ``at``, linear in the cost between neighbouring points; of points of equal cost the last counts.

    ``at`` is at most the largest of ``costs``. Below the smallest the score is unknown, unless that is within 1 % of ``at``.
    """
    curve = dict(sorted(zip(costs, scores, strict=True), key=lambda point: point[0]))
    if at < min(curve) * (1 - TOLERANCE):
        return None
    return float(np.interp(at, list(curve), list(curve.values())))


def _mean(scores: Sequence[float | None]) -> float | None:
    known = [score for score in scores if score is not None]
    return sum(known) / len(known) if len(known) == len(scores) else None
