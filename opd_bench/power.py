"""How many seeds and items it takes to claim a difference, from the variances of a finished run: ``opd-bench power FOLDER``.

    plan = plan_power(*read_scores(Path("results/embedded")), difference=0.02)
    show(plan, console)

The paired difference of two methods varies by seed, by item and by what is left:
V(S seeds, N items per task) = seed/S + item/N + residual/(S·N). The claim rule of ``statistics.claims`` is then played through for
other S and N on normal draws of that size, for one pair that is the first in Holm's order: with clearer pairs beside it, power is higher.

Shapes: S seeds, N items of a task, D draws. Limits: the variances are estimates, from few seeds poor ones; a method, budget or task
that the run did not have may vary more.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import combinations
from pathlib import Path

import numpy as np
from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from scipy import stats

from opd_bench import store
from opd_bench.errors import UserError, did_you_mean
from opd_bench.report import number
from opd_bench.statistics import ALPHA, Scores, Weights, macro_weights, paired_scores, seed_means, seeds_needed, sign_flip_p, smallest_p

SEEDS = (4, 6, 8, 10, 12, 16)
ITEMS = (50, 100, 250, 500, 1000, 2000)
ENOUGH = 0.8
DRAWS = 1000


@dataclass(frozen=True)
class Components:
    """Variances of a paired difference of macro scores: of its seeds, of one item in every task, and of what is left per seed and item."""

    seed: float
    item: float
    residual: float


@dataclass(frozen=True)
class Size:
    """A run that could be made; ``half_width`` is the mean one of the 95 % interval, ``power`` the chance that the claim is made."""

    seeds: int
    items: int  # per task
    half_width: float
    power: float


@dataclass(frozen=True)
class Plan:
    """``pooled`` is the mean of the pairs; ``smallest`` has the fewest seeds, then the fewest items, with 80 % power; None: no size has."""

    difference: float
    seeds: int  # of the run the variances come from
    items: int
    pairs: dict[str, Components]
    pooled: Components
    sizes: list[Size]
    smallest: Size | None


# ---- what a run left --------------------------------------------------------------------------------------------------------------


def read_scores(folder: Path) -> tuple[Mapping[str, Scores], Weights]:
    """Greedy scores at the whole budget by method and task (SN), and each task's weight, from a results folder.

    Raises UserError where items.csv or leaderboard.json is missing or damaged, or items are missing.
    """
    board = store.read_json(folder / "leaderboard.json")
    table: dict[tuple[str, str], dict[int, dict[str, float]]] = {}
    try:
        weights = macro_weights(board["tasks"]["stem"], board["tasks"]["coding"])
        methods = [method["name"] for method in board["methods"]]
        with (folder / "items.csv").open(encoding="utf-8", newline="") as file:
            for row in csv.DictReader(file):
                if row["decoding"] == "greedy" and float(row.get("share", 1)) == 1 and row["method"] in methods:
                    by_seed = table.setdefault((row["method"], row["task"]), {})
                    by_seed.setdefault(int(row["seed"]), {})[row["doc"]] = float(row["score"])
        scores = {method: {task: _matrix(table[method, task]) for task in weights} for method in methods}
    except OSError as error:
        raise UserError(f"cannot read {folder / 'items.csv'}: {error.strerror}; name the folder of a finished comparison") from None
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(
            f"items.csv and leaderboard.json in {folder} are damaged or do not fit: {error!r}; run the comparison again"
        ) from None
    return scores, weights


def _matrix(by_seed: Mapping[int, Mapping[str, float]]) -> np.ndarray:
    """SN, items in the order of their hashes, so that methods pair up."""
    docs = sorted(next(iter(by_seed.values())))
    if any(len(scores) != len(docs) for scores in by_seed.values()):
        raise ValueError("seeds were scored on different items")
    return np.array([[by_seed[seed][doc] for doc in docs] for seed in sorted(by_seed)])


# ---- variances, and what they promise ---------------------------------------------------------------------------------------------


def components(difference: Scores, weights: Weights) -> Components:
    """Variance components of paired differences (SN by task) with seeds and items crossed, by mean squares; negative ones are 0.

    Raises UserError with fewer than two seeds, or two items in a task.
    """
    seed_means_S = seed_means(difference, weights)
    if len(seed_means_S) < 2 or any(scores_SN.shape[1] < 2 for scores_SN in difference.values()):
        raise UserError("variances need a run of at least two seeds, and two items per task")
    item = residual = left_in_seeds = 0.0
    for task, scores_SN in difference.items():
        seeds, items = scores_SN.shape
        item_N = scores_SN.mean(axis=0)
        left_SN = scores_SN - item_N - scores_SN.mean(axis=1, keepdims=True) + scores_SN.mean()
        left = float((left_SN**2).sum()) / ((seeds - 1) * (items - 1))
        item += weights[task] ** 2 * max(0.0, float(item_N.var(ddof=1)) - left / seeds)
        residual += weights[task] ** 2 * left
        left_in_seeds += weights[task] ** 2 * left / items
    return Components(max(0.0, float(seed_means_S.var(ddof=1)) - left_in_seeds), item, residual)


def size(parts: Components, difference: float, seeds: int, items: int, pairs: int, rng: np.random.Generator, draws: int = DRAWS) -> Size:
    """Play the claim rule through for a true ``difference`` of macro scores, one of ``pairs`` that are tested."""
    shift_D1 = rng.normal(0, (parts.item / items) ** 0.5, (draws, 1))
    scores_DS = difference + shift_D1 + rng.normal(0, (parts.seed + parts.residual / items) ** 0.5, (draws, seeds))
    seed_term_D = scores_DS.var(axis=1, ddof=1) / seeds
    item_term = parts.item / items + parts.residual / items / seeds
    both_D = seed_term_D + item_term - (parts.item + parts.residual) / items / seeds  # as in statistics.two_way_variance
    error_D = np.maximum(both_D, np.maximum(seed_term_D, item_term)) ** 0.5
    clear_D = pairs * 2 * stats.t.sf(scores_DS.mean(axis=1) / error_D, seeds - 1) < ALPHA  # as in statistics.two_way_p
    clear_DS = scores_DS[clear_D] if pairs * smallest_p(seeds) < ALPHA else []
    claimed = sum(pairs * sign_flip_p(scores_S) < ALPHA for scores_S in clear_DS)
    half_width = stats.t.ppf(1 - ALPHA / 2, seeds - 1) * error_D.mean()
    return Size(seeds, items, float(half_width), claimed / draws)


def plan_power(scores: Mapping[str, Scores], weights: Weights, difference: float, methods: Sequence[str] | None = None) -> Plan:
    """What it takes to claim ``difference``, if all pairs of ``methods`` (default: all) are tested and vary as in ``scores``.

    Raises UserError for a difference that is not between 0 and 1, an unknown method, fewer than two, or a run with one seed.
    """
    if not 0 < difference < 1:
        raise UserError(f"--difference {difference:g}: give a difference of scores between 0 and 1, such as 0.02")
    names = list(dict.fromkeys(scores if methods is None else methods))
    for name in names:
        if name not in scores:
            raise UserError(f"no method {name!r} in this run{did_you_mean(name, scores)}")
    if len(names) < 2:
        raise UserError("a difference takes two methods")
    parts = {f"{a} − {b}": components(paired_scores(scores[a], scores[b]), weights) for a, b in combinations(names, 2)}
    pooled = Components(*np.mean([(pair.seed, pair.item, pair.residual) for pair in parts.values()], axis=0).tolist())
    tables = scores[names[0]].values()
    seeds, items = len(next(iter(tables))), min(scores_SN.shape[1] for scores_SN in tables)
    rng = np.random.default_rng(0)
    grid = [(s, n) for s in sorted({*SEEDS, min(seeds, SEEDS[-1])}) for n in sorted({*ITEMS, items})]
    sizes = [size(pooled, difference, s, n, len(parts), rng) for s, n in grid]
    return Plan(difference, seeds, items, parts, pooled, sizes, next((found for found in sizes if found.power >= ENOUGH), None))


# ---- saying it --------------------------------------------------------------------------------------------------------------------


def to_json(plan: Plan) -> str:
    """What ``show`` prints, unrounded, as variances where it gives standard deviations."""
    return json.dumps(asdict(plan), indent=2, ensure_ascii=False)


def show(plan: Plan, console: Console) -> None:
    """Print the components, power and half-width by seeds and items, and the smallest size that suffices."""
    console.print(
        f"Paired differences in this run ({plan.seeds} seeds, {plan.items} items per task), standard deviations:", highlight=False
    )
    varies = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    varies.add_column("pair", no_wrap=True)
    for name in ("seed", "item", "residual"):
        varies.add_column(name, justify="right")
    for name, parts in {**plan.pairs, f"pooled over {len(plan.pairs)}": plan.pooled}.items():
        varies.add_row(escape(name), *(number(variance**0.5) for variance in (parts.seed, parts.item, parts.residual)))
    console.print(varies)

    said = f"Power to claim a difference of {plan.difference:g} (± half-width of its interval), by seeds and items per task:"
    console.print(said, highlight=False)
    grid = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    grid.add_column("seeds", justify="right")
    for items in dict.fromkeys(found.items for found in plan.sizes):
        grid.add_column(str(items), justify="right", no_wrap=True)
    for seeds in dict.fromkeys(found.seeds for found in plan.sizes):
        row = [found for found in plan.sizes if found.seeds == seeds]
        grid.add_row(str(seeds), *(f"{found.power:.0%} ±{number(found.half_width)}" for found in row))
    console.print(grid)
    console.print(sentence(plan), highlight=False, markup=False)


def sentence(plan: Plan) -> str:
    """The answer in words."""
    pairs = len(plan.pairs)
    tested = f"Testing {pairs} pair{'s' * (pairs > 1)}, nothing can be claimed with fewer than {seeds_needed(pairs)} seeds."
    if plan.smallest:
        return f"{plan.smallest.seeds} seeds and {plan.smallest.items} items per task have {plan.smallest.power:.0%} power. {tested}"
    best = max(plan.sizes, key=lambda found: found.power)
    return f"No size here has {ENOUGH:.0%} power; {best.seeds} seeds and {best.items} items per task have {best.power:.0%}. {tested}"
