"""Summaries of learning curves: bands, where one method overtakes another, time to a target, performance profiles.

    curve = Curve(budgets_K, {"arithmetic": scores_KSN})
    band(curve, {"arithmetic": 1.0})
    crossing(curve, other, {"arithmetic": 1.0}).budget
    performance_profile(times_to_targets({"opd": curve, "sft": other}, {"arithmetic": [0.5, 0.7]}), taus_T=[1, 2, 4])

Between its points a curve is taken to be linear in the logarithm of the budget; it is never extrapolated.

Shapes: K budgets, G budgets at which two curves are compared, S training seeds (joint over budgets and tasks), N items of a task,
W workloads (tasks × targets), T thresholds τ.

Known limits: curves of few budgets may cross more often than they show. Times to target and profiles are summaries without intervals.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from opd_bench.errors import UserError
from opd_bench.statistics import Array, Interval, Scores, Weights, paired_scores, seed_means, two_way_interval

STEPS = 33  # budgets at which the lead is looked at, besides those of the curves

Times = Mapping[str, Mapping[tuple[str, float], float]]  # method -> (task, target) -> budget, ∞ for a miss


@dataclass(frozen=True)
class Curve:
    """One method's scores (KSN by task) at ``budgets_K``, in any one unit. Raises UserError unless budgets are positive and increase."""

    budgets_K: Array
    scores: Mapping[str, Array]

    def __post_init__(self) -> None:
        if (
            not len(self.budgets_K)
            or self.budgets_K[0] <= 0
            or (np.diff(self.budgets_K) <= 0).any()
            or not np.isfinite(self.budgets_K).all()
        ):
            raise UserError("the budgets of a learning curve must be positive and increase: leave out the cold start, which spent nothing")
        if any(scores_KSN.ndim != 3 or len(scores_KSN) != len(self.budgets_K) for scores_KSN in self.scores.values()):
            raise UserError("a learning curve takes a budgets × seeds × items table of scores per task")

    def at(self, k: int) -> Scores:
        """The scores at budget k: SN by task."""
        return {task: scores_KSN[k] for task, scores_KSN in self.scores.items()}

    def interpolated(self, budgets_G: Array) -> Curve:
        """The same curve at ``budgets_G`` within its range."""
        log_K, log_G = np.log(self.budgets_K), np.log(budgets_G)
        share_GK = np.stack([np.interp(log_G, log_K, unit_K) for unit_K in np.eye(len(log_K))], axis=1)
        return Curve(budgets_G, {task: np.tensordot(share_GK, scores_KSN, 1) for task, scores_KSN in self.scores.items()})


def band(curve: Curve, weights: Weights, level: float = 0.95) -> list[Interval]:
    """Macro mean at each of the K budgets with its two-way interval, which holds at that budget, not for the whole curve at once."""
    return [two_way_interval(curve.at(k), weights, level) for k in range(len(curve.budgets_K))]


# ---- where one overtakes the other ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Crossing:
    """The budget from which on the method that is ahead at the end of the common range stays ahead.

    ``budget`` is None where it is ahead throughout (no crossing in range); ``a_ahead`` says which one that is, None in a tie.
    ``low`` and ``high`` are None where the bound is not within the range.
    """

    budget: float | None
    low: float | None
    high: float | None
    a_ahead: bool | None


def crossing(a: Curve, b: Curve, weights: Weights, level: float = 0.95) -> Crossing:
    """Where the mean of one method overtakes the other's for good.

    The interval inverts the two-way interval of the paired lead (Fieller's argument): it holds the budgets at which the lead is not
    told apart from 0, so it covers a single true crossing as often as that interval covers. One seed or item gives no bounds.
    Raises UserError where the curves share no range of budgets, or were scored on different seeds or items.
    """
    first, last = max(a.budgets_K[0], b.budgets_K[0]), min(a.budgets_K[-1], b.budgets_K[-1])
    if first > last:
        raise UserError("the two learning curves share no range of budgets: train both for the same ones")
    budgets_G = np.unique(np.concatenate([a.budgets_K, b.budgets_K, np.geomspace(first, last, STEPS)]))
    budgets_G = budgets_G[(budgets_G >= first) & (budgets_G <= last)]
    lead = Curve(budgets_G, paired_scores(a.interpolated(budgets_G).scores, b.interpolated(budgets_G).scores))
    band_G = band(lead, weights, level)
    sign = np.sign(band_G[-1].mean)
    if not sign:
        return Crossing(None, None, None, None)
    ends_G2 = sign * np.array([(np.nan, np.nan) if point.low is None else (point.low, point.high) for point in band_G], float)
    mean_G = sign * np.array([point.mean for point in band_G])
    budget, low, high = (_stays_above_zero(lead_G, budgets_G) for lead_G in (mean_G, ends_G2.max(axis=1), ends_G2.min(axis=1)))
    return Crossing(budget, low, high, bool(sign > 0))


def _stays_above_zero(lead_G: Array, budgets_G: Array) -> float | None:
    """The budget from which on ``lead_G`` is above 0; None where it always is, does not end so, or is unknown."""
    behind_G = ~(lead_G > 0)
    if behind_G[-1] or not behind_G.any():
        return None
    last = int(np.flatnonzero(behind_G)[-1])
    log_budget = np.interp(0, lead_G[last : last + 2], np.log(budgets_G[last : last + 2]))
    return float(np.exp(log_budget))


# ---- time to target ---------------------------------------------------------------------------------------------------------------


def time_to_target(curve: Curve, weights: Weights, target: float) -> float:
    """Median over seeds of the budget at which the macro score of the tasks in ``weights`` first reaches ``target``; a miss is ∞.

    A seed that is there at its first point counts with that point's budget. Source: AlgoPerf, arXiv 2306.07179, section 4.1.
    """
    log_K = np.log(curve.budgets_K)
    scores_KS = np.stack([seed_means({task: curve.scores[task][k] for task in weights}, weights) for k in range(len(log_K))])
    return float(np.median([_first(scores_K, log_K, target) for scores_K in scores_KS.T]))


def _first(scores_K: Array, log_K: Array, target: float) -> float:
    reached_K = scores_K >= target - 1e-12  # a mean of items is equal up to rounding
    k = int(reached_K.argmax())
    if not reached_K[k]:
        return np.inf
    if k == 0:
        return float(np.exp(log_K[0]))
    share = (target - scores_K[k - 1]) / (scores_K[k] - scores_K[k - 1])
    return float(np.exp(log_K[k - 1] + share * (log_K[k] - log_K[k - 1])))


def times_to_targets(curves: Mapping[str, Curve], targets: Mapping[str, Sequence[float]]) -> Times:
    """Every method's time to each target of each task; a workload is a task and a target."""
    workloads = [(task, target) for task, levels in targets.items() for target in levels]
    return {
        method: {(task, target): time_to_target(curve, {task: 1.0}, target) for task, target in workloads}
        for method, curve in curves.items()
    }


def performance_profile(times: Times, taus_T: Sequence[float] | Array) -> dict[str, Array]:
    """ρ(τ) of each method: the share of workloads it solves in at most τ times the best method's budget: T.

    A workload that nobody solves counts for nobody. Sources: Dolan & Moré 2002; AlgoPerf, arXiv 2306.07179, section 4.2.
    """
    workloads = list(next(iter(times.values())))
    best = {workload: min(solved[workload] for solved in times.values()) for workload in workloads}
    profile = {}
    for method, solved in times.items():
        ratios_W = np.array([solved[workload] / best[workload] if np.isfinite(best[workload]) else np.inf for workload in workloads])
        profile[method] = (ratios_W <= np.asarray(taus_T, float)[:, None]).mean(axis=1)
    return profile
