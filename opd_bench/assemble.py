"""From scored arms to a leaderboard.

    board = assemble(run, arms)

The macro score is the mean of the STEM mean and the coding mean. Two families of claims cover all pairs of methods: "score" (greedy
macro score, higher is better; it makes the ranks) and "excess" (R − l·ε in nats, lower is better). Contrasts, where the configuration
declares some, are families by themselves: "score", "sampled" and "excess". A failed gate withholds ranks, claims and contrasts, and says
why.

Shapes: S seeds, N items of a task or prompts of the exposure measurement.
Limits: the teacher and the cold starts are given, not drawn, so their intervals are over items only; they are normal: no width
at a score of 0 or 1, and near it they reach beyond. Several cold starts are averaged over; each claim says what it is from each.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Collection, Mapping
from dataclasses import replace
from typing import Any, Literal

import numpy as np

from opd_bench import curves, exposure, gates, judge_audit, readings, records, statistics
from opd_bench.errors import RunError, UserError
from opd_bench.leaderboard import Leaderboard
from opd_bench.records import ArmRecord, Run
from opd_bench.standard import BESIDE

TARGETS = [0.2, 0.4, 0.6]  # of the way from the cold start to the teacher, task by task
TAUS = [1.0, 1.5, 2.0, 4.0]
SCOPE = "Claims hold for this student, this teacher, these tasks and "


def assemble(run: Run, arms: list[ArmRecord], draws: int = 1000, limits: gates.Limits = gates.Limits()) -> Leaderboard:  # noqa: B008
    """Rank the methods of ``arms`` (every method with every seed of ``run``); ``draws`` of the bootstrap for the exposure intervals.

    Raises UserError where an arm is missing, RunError where an item score is missing or not finite.
    """
    by_method = _by_method(run, arms)
    greedy = {name: _matrices(run, group, "greedy", run.weights) for name, group in by_method.items()}
    sampled = {name: _matrices(run, group, "sampled", run.weights) for name, group in by_method.items()}
    held_out = {name: _matrices(run, group, "greedy", run.held_out) for name, group in by_method.items()}
    excess = {name: {"prompts": np.stack([exposure.excess_matrix(arm.divergences) for arm in group])} for name, group in by_method.items()}
    checked = gates.check(run, by_method, limits)
    fair = {*by_method} - {name for gate in checked if gate.held is False for name in gate.methods}
    start_S = np.array([arm.start for arm in next(iter(by_method.values()))])
    measures: dict[str, tuple[Any, dict[str, float]]] = {
        "score": (greedy, run.weights),
        "sampled": (sampled, run.weights),
        "excess": (excess, {"prompts": 1.0}),
    }
    better: dict[str, statistics.Better] = {"score": "higher", "excess": "lower"}
    claims = [
        replace(claim, claimed=claim.claimed and {claim.a, claim.b} <= fair)
        for family in better
        for claim in statistics.claims(family, *measures[family], better[family])
    ]
    contrasts = [
        replace(contrast, claimed=contrast.claimed and contrast.weights.keys() <= fair)
        for family in measures
        for contrast in statistics.contrasts(family, *measures[family], run.contrasts)
    ]

    def by_start(family: str, weights: Mapping[str, float]) -> list[float]:
        scores, tasks = measures[family]
        return _by_start(statistics.seed_means(statistics.contrasted(scores, weights), tasks), start_S)

    start = _mean_of(run.cold_starts)
    along = {name: _curve(run, group) for name, group in by_method.items()}
    ranks = statistics.ranks(fair, [claim for claim in claims if claim.family == "score"])

    methods = [
        {
            "name": name,
            "version": group[0].version,
            "rank": ranks.get(name),
            **_scores(run, greedy[name], sampled[name], statistics.two_way_interval),
            "held_out": _each(held_out[name], run.held_out, statistics.two_way_interval),
            "score_by_seed": statistics.seed_means(greedy[name], run.weights).tolist(),
            "recovered": statistics.recovered_share(greedy[name], _starts(run, group), run.teacher, run.weights),
            "curve": [
                {"share": points[0].share, "score": score, "exposure": _gap([point.divergences for point in points], draws)}
                for points, score in zip(_points(group), curves.band(along[name], run.weights), strict=True)
            ],
            "exposure": _gap([arm.divergences for arm in group], draws),
            "retention": _retention([arm.retention for arm in group], statistics.two_way_interval),
            "spent": {
                "share": _mean([arm.share_spent for arm in group]),
                "flops": _mean_by_kind([arm.end.flops for arm in group]),
                "tokens": _mean_by_kind([arm.end.tokens for arm in group]),
                "seconds": _mean_by_kind([arm.end.seconds for arm in group], 4),
            },
            "wall_s": _mean([arm.wall_s for arm in group]),
            "judge_auroc": _mean_or_none([arm.judge_auroc for arm in group]),
            "judge": judge_audit.audited(judged, run.weights, draws) if (judged := [arm.judged for arm in group if arm.judged]) else None,
            "saw": list(dict.fromkeys(saw for arm in group for saw in arm.saw)),
        }
        for name, group in by_method.items()
    ]
    methods.sort(key=lambda method: (method["rank"] is None, method["rank"] or 0, -method["score"].mean))
    start_gap = _gap(run.cold_starts_divergences, draws) if run.cold_starts_divergences else None
    kept = {name: statistics.over_items({name: of_N}, {name: 1.0}) for name, of_N in run.teacher_retention.items()} or None
    teacher, cold_start = (
        {**_scores(run, of, of_sampled, statistics.over_items), "held_out": _each(of, run.held_out, statistics.over_items), **more}
        for of, of_sampled, more in (
            (run.teacher, run.teacher_sampled, {"exposure": None, "retention": kept}),
            (start, _mean_of(run.cold_starts_sampled), {"exposure": start_gap, "retention": None}),
        )
    )

    count = len(run.cold_starts)
    notes = [SCOPE + ("this one cold start." if count == 1 else f"the mean of these {count} cold starts.")]
    notes += [*_claimable(len(run.seeds), "pair", math.comb(len(by_method), 2))]
    notes += [*_claimable(len(run.seeds), "contrast", len(run.contrasts)), *run.notes]
    notes += [] if run.cold_start_flops else ["What the cold starts cost is not known, so nothing is read from scratch."]
    notes += [
        f"{name} has a schedule of its own, so it was trained for each smaller budget separately, not by branches."
        for name, group in by_method.items()
        if group[0].own_schedule
    ]
    return Leaderboard.model_validate(
        {
            "schema": "opd-bench/leaderboard/1",
            "tier": run.tier,
            "command": run.command,
            "commit": run.commit,
            "models": run.models,
            "budget": {"axis": run.axis, "limit": run.limit},
            "seeds": run.seeds,
            "tasks": {
                "stem": run.stem,
                "coding": run.coding,
                **{of: [task for task in run.held_out if run.held_out[task] == of] for of in BESIDE},
            },
            "teacher": teacher,
            "cold_start": cold_start,
            "methods": methods,
            "claims": [{**vars(claim), "by_start": by_start(claim.family, {claim.a: 1.0, claim.b: -1.0})} for claim in claims],
            "contrasts": [{**vars(contrast), "by_start": by_start(contrast.family, contrast.weights)} for contrast in contrasts],
            "gates": [vars(gate) for gate in checked],
            "readings": _readings(run, by_method),
            **_along_budgets(run, along, start),
            "notes": notes,
        }
    )


def _readings(run: Run, by_method: dict[str, list[ArmRecord]]) -> list[dict[str, Any]]:
    """What other ledgers say of the same runs; their first is that of the budget."""

    def along(arm: ArmRecord) -> list[readings.Point]:
        return [readings.Point(spent(point), run.macro(point.greedy)) for point in arm.curve]

    def spent(point: records.CurvePoint) -> readings.Spent:
        return {"flops": {**run.cold_start_flops, **point.flops}, "tokens": point.tokens, "seconds": point.seconds}

    unit = {"GPU-hours": "seconds"}.get(run.axis, run.axis)
    binding = next((ledger for ledger in readings.LEDGERS if ledger.unit == unit), readings.DATA_CHARGED)
    found = readings.readings({name: [along(arm) for arm in group] for name, group in by_method.items()}, binding)
    return [{**vars(one), "ledger": one.ledger.name, "question": one.ledger.question, "unit": one.ledger.unit} for one in found]


def _starts(run: Run, arms: list[ArmRecord]) -> dict[str, np.ndarray]:
    """The item scores of the cold start each arm began from: SN by task."""
    return {task: np.stack([run.cold_starts[arm.start][task] for arm in arms]) for task in run.weights}


def _points(arms: list[ArmRecord]) -> list[tuple[records.CurvePoint, ...]]:
    """The arms of a method at each budget, the cold start left out."""
    return list(zip(*([point for point in arm.curve if point.share > 0] for arm in arms), strict=True))


def _curve(run: Run, arms: list[ArmRecord]) -> curves.Curve:
    points = _points(arms)
    budgets_K = np.array([at[0].share for at in points]) * run.limit
    return curves.Curve(budgets_K, {task: np.array([[point.greedy[task] for point in at] for at in points]) for task in run.weights})


def _along_budgets(run: Run, found: dict[str, curves.Curve], start: dict[str, np.ndarray]) -> dict[str, Any]:
    """Crossings of every pair of methods and the performance profile; nothing where there is one budget."""
    if any(len(curve.budgets_K) < 2 for curve in found.values()):
        return {"crossings": [], "profile": None}
    crossings = [{"a": a, "b": b, **vars(curves.crossing(found[a], found[b], run.weights))} for a, b in itertools.combinations(found, 2)]
    targets = {
        task: [float(start[task].mean() + part * (run.teacher[task].mean() - start[task].mean())) for part in TARGETS]
        for task in run.weights
    }
    reached = curves.times_to_targets(found, targets)
    times = {name: {task: [of[task, target] for target in targets[task]] for task in targets} for name, of in reached.items()}
    solved = {name: list(of) for name, of in curves.performance_profile(reached, TAUS).items()}
    return {"crossings": crossings, "profile": {"targets": targets, "times": times, "tau": TAUS, "solved": solved}}


def _by_start(difference_S: np.ndarray, start_S: np.ndarray) -> list[float]:
    """The mean difference over the seeds of each cold start."""
    return [float(difference_S[start_S == start].mean()) for start in sorted(set(start_S.tolist()))]


def _mean_of(models: list[dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
    """Item scores averaged over models."""
    return {task: np.mean([scores[task] for scores in models], axis=0) for task in models[0]}


def _by_method(run: Run, arms: list[ArmRecord]) -> dict[str, list[ArmRecord]]:
    """The arms of each method in the order of the run's seeds."""
    by_method: dict[str, list[ArmRecord]] = {}
    for name in dict.fromkeys(arm.method for arm in arms):
        found = {arm.seed: arm for arm in arms if arm.method == name}
        missing = [seed for seed in run.seeds if seed not in found]
        if missing:
            raise UserError(f"{name} has no finished arm for seeds {missing}; run the same command again to finish it")
        by_method[name] = [found[seed] for seed in run.seeds]
    return by_method


def _matrices(run: Run, arms: list[ArmRecord], kind: Literal["greedy", "sampled"], tasks: Collection[str]) -> dict[str, np.ndarray]:
    """The item scores of one method's arms: SN by task."""
    for arm, task in itertools.product(arms, tasks):
        scores_N = getattr(arm, kind).get(task)
        if scores_N is None or scores_N.shape != run.teacher[task].shape or not np.isfinite(scores_N).all():
            raise RunError(f"{arm.method} with seed {arm.seed} lacks a finite {kind} score for each item of {task}; evaluate it again")
    return {task: np.stack([getattr(arm, kind)[task] for arm in arms]) for task in tasks}


def _scores(run: Run, greedy: dict[str, np.ndarray], sampled: dict[str, np.ndarray], interval: Any) -> dict[str, Any]:
    """Macro, sampled, STEM and coding scores, each by ``interval(scores, weights)``."""

    def mean(tasks: list[str]) -> statistics.Interval | None:
        return interval({task: greedy[task] for task in tasks}, dict.fromkeys(tasks, 1 / len(tasks))) if tasks else None

    return {
        "score": interval({task: greedy[task] for task in run.weights}, run.weights),
        "sampled": interval({task: sampled[task] for task in run.weights}, run.weights),
        "stem": mean(run.stem),
        "coding": mean(run.coding),
    }


def _each(scores: Mapping[str, np.ndarray], tasks: Collection[str], interval: Any) -> dict[str, statistics.Interval]:
    """The greedy score of every one of ``tasks`` by itself."""
    return {task: interval({task: scores[task]}, {task: 1.0}) for task in tasks}


def _retention(of: list[dict[str, np.ndarray]], interval: Any) -> dict[str, statistics.Interval] | None:
    """What was measured of each seed (N by measure), None where nothing was."""
    if not all(of):
        return None
    return {name: interval({name: np.stack([values[name] for values in of])}, {name: 1.0}) for name in of[0]}


def _gap(records: list[exposure.Divergences], draws: int) -> dict[str, statistics.Interval | None]:
    """The exposure-bias gap over the seeds, by a bootstrap that is the same for every method."""
    return exposure.gap_over_seeds(records, np.random.default_rng(0), draws)


def _claimable(seeds: int, kind: str, tests: int) -> list[str]:
    """That a family of so many tests is too large for the seeds, and how many it takes."""
    if statistics.smallest_p(seeds) * tests < statistics.ALPHA:
        return []
    have, among = (f"{count} {noun}{'s' * (count != 1)}" for count, noun in ((seeds, "seed"), (tests, kind)))
    return [f"Nothing can be claimed with {have} and {among}; it takes {statistics.seeds_needed(tests)} seeds."]


def _mean(values: list[float]) -> float:
    return sum(values) / len(values)


def _mean_or_none(values: list[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return _mean(known) if known else None


def _mean_by_kind(amounts: list[dict[str, Any]], digits: int | None = None) -> dict[str, Any]:
    kinds = dict.fromkeys(kind for amount in amounts for kind in amount)
    return {kind: round(_mean([amount.get(kind, 0) for amount in amounts]), digits) for kind in kinds}
