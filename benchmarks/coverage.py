"""Coverage of the intervals and error rates of the claims, on simulated leaderboards whose truth is known.

    python benchmarks/coverage.py

A score is 1 where ability + difficulty of the item + effects of cold start, method × item, seed and seed × item exceed 0, all of them
normal, so the true mean is known exactly. Four methods on three tasks; seeds begin from three given cold starts in turn. What is
checked are the functions that make a leaderboard, not copies of them. Last figures: `docs/statistics.md`.

Shapes: M methods, S seeds, N items of a task, J cold starts.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass, replace
from itertools import combinations, product

import numpy as np
from scipy.stats import norm

from opd_bench.curves import Curve, crossing
from opd_bench.statistics import Interval, claims, macro_weights, recovered_share, seeds_needed, two_way_interval

WEIGHTS = macro_weights(["algebra", "logic"], ["code"])
EASIER = {"algebra": -0.02, "logic": 0.0, "code": 0.01}  # than the mean, in accuracy
START_J = np.array([-0.1, 0.0, 0.1])  # ability of the cold starts, relative to their mean
SEEDS, ITEMS = (3, 5, 8, 12), (50, 250)
EQUAL, DIFFERENT = (0.0, 0.0, 0.0, 0.0), (0.0, 0.0, 0.03, 0.10)  # what the four methods gain, in accuracy


@dataclass(frozen=True)
class World:
    """``accuracy`` of a method that gains nothing, and the standard deviations of what makes a score vary."""

    name: str
    accuracy: float = 0.6
    seed: float = 0.035  # for all tasks at once
    seed_task: float = 0.035
    method_item: float = 0.2
    cell: float = 0.6  # seed × item
    difficulty: float = 1.0
    start_item: float = 0.3

    @property
    def sd(self) -> float:
        """Of a student's item."""
        return float(np.linalg.norm((self.seed, self.seed_task, self.method_item, self.cell, self.difficulty, self.start_item)))

    @property
    def start_sd(self) -> float:
        return float(np.linalg.norm((self.cell, self.difficulty, self.start_item)))


TYPICAL = World("like the embedded run")
WORLDS = (
    TYPICAL,
    replace(TYPICAL, name="seeds vary", seed=0.15, seed_task=0.1),
    replace(TYPICAL, name="items vary", method_item=0.8, cell=0.3),
    replace(TYPICAL, name="near the ceiling", accuracy=0.88),
)


@dataclass(frozen=True)
class Board:
    """A simulated leaderboard (SN by task, N for the teacher), and the truth about it."""

    students: list[dict[str, np.ndarray]]
    starts: dict[str, np.ndarray]
    teacher: dict[str, np.ndarray]
    true_M: np.ndarray
    true_share_M: np.ndarray


def simulate(world: World, gains: tuple[float, ...], seeds: int, items: int, rng: np.random.Generator) -> Board:
    """New seeds and new items of the same methods, cold starts and teacher. ``gains`` are in accuracy, one per method."""
    start_S = np.arange(seeds) % len(START_J)
    seed_MS1 = rng.normal(0, world.seed, (len(gains), seeds, 1))
    students, starts, teacher = [{} for _ in gains], {}, {}
    true_M, true_start, true_teacher = np.zeros(len(gains)), 0.0, 0.0
    for task, weight in WEIGHTS.items():
        level = world.accuracy + EASIER[task]
        ability_M = norm.ppf(level + np.array(gains)) * world.sd
        ability_start, ability_teacher = norm.ppf(level - 0.25) * world.start_sd, norm.ppf(0.985) * world.start_sd
        difficulty_N = rng.normal(0, world.difficulty, items)
        start_JN = START_J[:, None] + rng.normal(0, world.start_item, (len(START_J), items))
        common_SN = difficulty_N + start_JN[start_S]
        varies_MSN = seed_MS1 + rng.normal(0, world.seed_task, (len(gains), seeds, 1)) + common_SN
        varies_MSN = (
            varies_MSN + rng.normal(0, world.method_item, (len(gains), 1, items)) + rng.normal(0, world.cell, (*seed_MS1.shape[:2], items))
        )
        for method, solved_SN in enumerate(ability_M[:, None, None] + varies_MSN > 0):
            students[method][task] = solved_SN.astype(float)
        luck_JN = rng.normal(0, world.cell, start_JN.shape)
        starts[task] = (ability_start + difficulty_N + start_JN + luck_JN > 0).astype(float)[start_S]
        spread = np.hypot(world.cell, world.start_item)
        teacher[task] = (ability_teacher + difficulty_N + rng.normal(0, spread, items) > 0).astype(float)
        true_M += weight * norm.cdf((ability_M + START_J[start_S][:, None]) / world.sd).mean(axis=0)
        true_start += weight * float(norm.cdf((ability_start + START_J[start_S]) / world.start_sd).mean())
        true_teacher += weight * float(norm.cdf(ability_teacher / world.start_sd))
    return Board(students, starts, teacher, true_M, (true_M - true_start) / (true_teacher - true_start))


def covers(interval: Interval, truth: float) -> bool:
    assert interval.low is not None
    assert interval.high is not None
    return interval.low <= truth <= interval.high


@dataclass(frozen=True)
class Rates:
    """Shares of intervals that hold the truth; share of boards with a false claim; share of pairs claimed, by true difference."""

    score: float
    difference: float
    recovered: float | None  # None where no board has room to recover
    false_claims: float
    power: dict[float, float]


def study(world: World, gains: tuple[float, ...], seeds: int, items: int, boards: int, rng: np.random.Generator) -> Rates:
    """What the intervals and claims of ``boards`` simulated leaderboards come to."""
    score, difference, recovered, false = [], [], [], []
    claimed: dict[float, list[bool]] = {}
    for _ in range(boards):
        board = simulate(world, gains, seeds, items, rng)
        wrong = False
        for method, scores in enumerate(board.students):
            score.append(covers(two_way_interval(scores, WEIGHTS), board.true_M[method]))
            share = recovered_share(scores, board.starts, board.teacher, WEIGHTS)
            if share:
                recovered.append(covers(share, board.true_share_M[method]))
        for claim in claims("score", {str(method): scores for method, scores in enumerate(board.students)}, WEIGHTS):
            a, b = int(claim.a), int(claim.b)
            truth = board.true_M[a] - board.true_M[b]
            difference.append(covers(Interval(claim.difference, claim.low, claim.high), truth))
            wrong |= claim.claimed and claim.difference * truth <= 0
            claimed.setdefault(round(abs(gains[a] - gains[b]), 4), []).append(claim.claimed and claim.difference * truth > 0)
        false.append(wrong)
    power = {gap: float(np.mean(claimed[gap])) for gap in sorted(claimed) if gap}
    held = float(np.mean(recovered)) if recovered else None
    return Rates(float(np.mean(score)), float(np.mean(difference)), held, float(np.mean(false)), power)


BUDGETS_K = np.array([0.25, 0.5, 1.0])
OVERTAKES = (-0.034, 0.016, 0.066)  # lead of the one method over the other at the three budgets: .05 per doubling


def crossing_study(world: World, seeds: int, items: int, boards: int, rng: np.random.Generator) -> float:
    """Share of crossing intervals that hold the true budget."""
    held = []
    for _ in range(boards):
        board = simulate(world, (*OVERTAKES, 0.0, 0.0, 0.0), seeds, items, rng)
        a, b = (
            Curve(BUDGETS_K, {task: np.stack([scores[task] for scores in board.students[first : first + 3]]) for task in WEIGHTS})
            for first in (0, 3)
        )
        found = crossing(a, b, WEIGHTS)
        lead_K = board.true_M[:3] - board.true_M[3:]
        truth = float(np.exp(np.interp(0, lead_K, np.log(BUDGETS_K)))) if found.a_ahead else np.inf  # the other never stays ahead
        held.append((found.low is None or found.low <= truth) and (found.high is None or truth <= found.high))
    return float(np.mean(held))


def percent(share: float | None) -> str:
    return "–" if share is None else f"{100 * share:.1f}"


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--boards", type=int, default=1000, help="simulated leaderboards per row")
    arguments.add_argument("--seed", type=int, default=0)
    given = arguments.parse_args()
    rng = np.random.default_rng(given.seed)

    gaps = sorted({round(abs(a - b), 4) for a, b in combinations(DIFFERENT, 2)} - {0.0})
    names = ["score", "difference", "recovered", "crossing", "false, equal", "false", *(f"power {gap:.2f}" for gap in gaps)]
    print(f"| world | S | N | {' | '.join(names)} |\n| :-- |{' --: |' * (2 + len(names))}")
    for world, seeds, items in product(WORLDS, SEEDS, ITEMS):
        found = study(world, DIFFERENT, seeds, items, given.boards, rng)
        cells = [found.score, found.difference, found.recovered]
        cells += [crossing_study(world, seeds, items, given.boards // 2, rng) if items == ITEMS[-1] else None]
        if seeds_needed(6) <= seeds:
            equal = study(world, EQUAL, seeds, items, given.boards, rng)
            cells += [equal.false_claims, found.false_claims, *(found.power[gap] for gap in gaps)]
        else:  # nothing can be claimed, true or false
            cells += [None] * (2 + len(gaps))
        print(f"| {world.name} | {seeds} | {items} | {' | '.join(map(percent, cells))} |", flush=True)


if __name__ == "__main__":
    main()
