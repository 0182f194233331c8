"""Claims about methods: intervals over crossed seeds × items, exact tests on seeds, and what may be claimed from them.

    scores = {"opd": {"arithmetic": opd_SN}, "sft": {"arithmetic": sft_SN}}
    found = claims("score", scores, weights={"arithmetic": 1.0})
    ranks(list(scores), found)
    contrasts("score", scores, {"arithmetic": 1.0}, {"own text": {"opd": 1, "sft": -1}})

Shapes: S training seeds (shared by all tasks: one student serves them all), N items of a task (may differ between tasks),
M methods, P tests. Every method is scored on the same seeds and the same items. Undefined numbers are None, never NaN.

Tested are all pairs of methods (claims), or declared sums of methods whose weights sum to 0 (contrasts), such as the effects of a
factorial design. p is the larger of two: the exact sign-flip test's, which needs no normal distribution but sees seeds only, and the
two-way t test's, which knows that all seeds share their items. Both must pass Holm.

Known limits: claims speak of new seeds and new items for this student, this teacher, these tasks and the given cold starts. The
sign-flip test takes seed differences as symmetric about zero; its smallest p is 2 / 2^S.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations, count
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from opd_bench.errors import UserError

ALPHA = 0.05
MOST_SEEDS = 20
ROUNDING = 1e-9  # of the terms of a sum: less is no difference

Array = NDArray[np.floating]
Scores = Mapping[str, Array]  # task -> SN
Weights = Mapping[str, float]  # task -> its share of the macro score
Better = Literal["higher", "lower"]


@dataclass(frozen=True)
class Interval:
    """A mean and its interval; ``low`` and ``high`` are None where there is none (one seed)."""

    mean: float
    low: float | None
    high: float | None

    @property
    def excludes_zero(self) -> bool:
        return self.low is not None and self.high is not None and not self.low <= 0 <= self.high


@dataclass(frozen=True)
class Tested:
    """A difference, its 95 % two-way interval (None where there is none), p, and p after Holm; claimed iff that is below .05."""

    difference: float
    low: float | None
    high: float | None
    p: float
    p_holm: float
    claimed: bool


@dataclass(frozen=True)
class Claim(Tested):
    """``difference`` = score of ``a`` − score of ``b``; ``a`` is the one observed better (either, where they tie)."""

    a: str
    b: str
    family: str


@dataclass(frozen=True)
class Contrast(Tested):
    """``difference`` = Σ weight · score of the method."""

    name: str
    family: str
    weights: Mapping[str, float]


def macro_weights(*groups: Sequence[str]) -> dict[str, float]:
    """Each task's weight in the mean of the groups' means (STEM, coding); a group without tasks leaves its weight to the others."""
    filled = [group for group in groups if group]
    return {task: 1 / len(filled) / len(group) for group in filled for task in group}


def seed_means(scores: Scores, weights: Weights) -> Array:
    """Macro score of each seed, Σ_k w_k · mean over items: S.

    Raises UserError where tasks and weights differ, seeds differ between tasks, or a score is missing.
    """
    if not scores or scores.keys() != weights.keys():
        raise UserError(f"tasks scored ({', '.join(scores)}) and tasks weighted ({', '.join(weights)}) differ: give each task one weight")
    for task, scores_SN in scores.items():
        if scores_SN.ndim != 2 or not scores_SN.size or not np.isfinite(scores_SN).all():
            raise UserError(f"scores of {task!r} must be a full seeds × items table of finite numbers: evaluate every seed on every item")
    if len({len(scores_SN) for scores_SN in scores.values()}) > 1:
        raise UserError("tasks have different numbers of seeds: evaluate every seed on every task")
    return np.sum([weights[task] * scores_SN.mean(axis=1, dtype=float) for task, scores_SN in scores.items()], axis=0)


def two_way_variance(scores: Scores, weights: Weights) -> float:
    """Variance of the macro mean over new seeds and new items, which are crossed. Needs two seeds, and two items per task.

    With c = d − mean(d) for each task: S/(S−1) · Σ_r(Σ_k w_k Σ_i c/N)²/S² over seeds jointly for all tasks, plus
    Σ_k w_k² · [N/(N−1) · Σ_i(Σ_r c)² − Σ c²] / (S·N)², floored at the larger of the seed and the item term.
    Source: the two-way cluster estimator (Cameron, Gelbach & Miller 2011), items as in Miller 2024, arXiv 2411.00640.
    """
    seed_means_S = seed_means(scores, weights)
    seeds = len(seed_means_S)
    if seeds < 2 or any(scores_SN.shape[1] < 2 for scores_SN in scores.values()):
        raise UserError("a variance over seeds and items needs at least two seeds, and two items per task")
    seed_term = float(seed_means_S.var(ddof=1)) / seeds
    item_term = cell_term = 0.0
    for task, scores_SN in scores.items():
        items = scores_SN.shape[1]
        centred_SN = scores_SN - scores_SN.mean(dtype=float)
        scale = (weights[task] / scores_SN.size) ** 2
        item_term += scale * items / (items - 1) * float((centred_SN.sum(axis=0) ** 2).sum())
        cell_term += scale * float((centred_SN**2).sum())
    return max(seed_term + item_term - cell_term, seed_term, item_term)


def two_way_interval(scores: Scores, weights: Weights, level: float = 0.95) -> Interval:
    """Macro mean ± t(S−1) · √two_way_variance; no bounds with one seed, or with one item in a task."""
    seed_means_S = seed_means(scores, weights)
    mean, seeds = float(seed_means_S.mean()), len(seed_means_S)
    if seeds < 2 or any(scores_SN.shape[1] < 2 for scores_SN in scores.values()):
        return Interval(mean, None, None)
    half = float(stats.t.ppf((1 + level) / 2, seeds - 1)) * two_way_variance(scores, weights) ** 0.5
    return Interval(mean, mean - half, mean + half)


def over_seeds(values: Sequence[float | None]) -> Interval | None:
    """Mean of one number per seed ± t(S−1) · its standard error; no bounds with one seed, None where a seed has no number."""
    known = np.array([value for value in values if value is not None], float)
    if not len(known) or len(known) < len(values):
        return None
    if len(known) < 2:
        return Interval(float(known.mean()), None, None)
    half = float(stats.t.ppf(0.975, len(known) - 1)) * float(known.std(ddof=1)) / len(known) ** 0.5
    return Interval(float(known.mean()), float(known.mean()) - half, float(known.mean()) + half)


def two_way_p(scores: Scores, weights: Weights) -> float:
    """Two-sided p of "the macro mean is 0" by the same t: below .05 where the 95 % interval excludes 0; 1 where there is none."""
    seed_means_S = seed_means(scores, weights)
    mean, seeds = float(seed_means_S.mean()), len(seed_means_S)
    if seeds < 2 or mean == 0 or any(scores_SN.shape[1] < 2 for scores_SN in scores.values()):
        return 1.0
    variance = two_way_variance(scores, weights)
    return float(2 * stats.t.sf(abs(mean) / variance**0.5, seeds - 1)) if variance else 0.0


def over_items(scores: Mapping[str, Array], weights: Weights) -> Interval:
    """Weighted mean of tasks of N items each, for one model; normal 95 % interval over items, none with a single item."""
    mean = sum(weight * float(scores[task].mean()) for task, weight in weights.items())
    if any(len(scores[task]) < 2 for task in weights):
        return Interval(mean, None, None)
    variance = sum(weight**2 * float(scores[task].var(ddof=1)) / len(scores[task]) for task, weight in weights.items())
    half = float(stats.norm.ppf(0.975)) * variance**0.5
    return Interval(mean, mean - half, mean + half)


def contrasted(scores: Mapping[str, Scores], weights: Mapping[str, float]) -> dict[str, Array]:
    """Σ weight · score over the methods of ``weights``, item by item: SN by task; what is left by rounding alone is 0.

    Raises UserError where their seeds, tasks or items differ.
    """
    shapes = [{task: scores_SN.shape for task, scores_SN in scores[method].items()} for method in weights]
    if any(shape != shapes[0] for shape in shapes):
        raise UserError("methods were scored on different seeds, tasks or items: evaluate all on the same ones")
    found = {}
    for task in shapes[0]:
        parts_MSN = np.array([np.multiply(weight, scores[method][task], dtype=float) for method, weight in weights.items()])
        sum_SN = parts_MSN.sum(axis=0)
        found[task] = np.where(np.abs(sum_SN) <= ROUNDING * np.abs(parts_MSN).sum(axis=0), 0.0, sum_SN)
    return found


def paired_scores(a: Scores, b: Scores) -> dict[str, Array]:
    """a − b, item by item: SN by task. Raises UserError where seeds, tasks or items differ."""
    return contrasted({"a": a, "b": b}, {"a": 1.0, "b": -1.0})


def paired_difference(a: Scores, b: Scores, weights: Weights) -> Interval:
    """95 % two-way interval of a − b, paired item by item."""
    return two_way_interval(paired_scores(a, b), weights)


def recovered_share(students: Scores, starts: Scores, teacher: Mapping[str, Array], weights: Weights) -> Interval | None:
    """Share of the gap recovered, (student − start) / (teacher − start), a ratio of macro means with its 95 % two-way interval.

    Row r of ``starts`` (SN by task, as ``students``) is the cold start that seed r began from; ``teacher`` holds N scores of the same
    items per task. None where the 95 % interval of teacher − start, over items, does not lie above zero.

    The interval is the delta method's: the two-way interval of the linearised ratio, gain − share · gap per seed and item over the mean
    gap. So it is exact where gain and gap move together, needs no draws, and has the t quantile that a bootstrap of few seeds lacks.
    """
    gains = paired_scores(students, starts)
    gaps = {task: np.subtract(teacher[task], starts[task], dtype=float) for task in starts}
    room = over_items({task: gap_SN.mean(axis=0) for task, gap_SN in gaps.items()}, weights)
    if room.low is None or room.low <= 0:
        return None
    share = float(seed_means(gains, weights).mean()) / room.mean
    error = two_way_interval({task: (gains[task] - share * gaps[task]) / room.mean for task in gains}, weights)
    return Interval(share, *(None if bound is None else share + bound for bound in (error.low, error.high)))


def sign_flip_p(differences_S: Array) -> float:
    """Exact two-sided p of "the mean is 0": share of the 2^S sign patterns whose |sum| is at least the observed one.

    Sums equal up to rounding count as ties. Raises UserError above 20 seeds.
    """
    if not 1 <= len(differences_S) <= MOST_SEEDS:
        raise UserError(f"the exact sign-flip test takes 1 to {MOST_SEEDS} seeds, not {len(differences_S)}")
    sums = np.zeros(1)
    for difference in differences_S:
        sums = np.concatenate([sums + difference, sums - difference])
    tie = ROUNDING * np.abs(differences_S).sum()
    return float((np.abs(sums) >= abs(np.sum(differences_S)) - tie).mean())


def holm(ps: Sequence[float] | Array) -> Array:
    """P adjusted p-values that hold the family-wise error rate (Holm 1979)."""
    ps_P = np.asarray(ps, dtype=float)
    order_P = np.argsort(ps_P, kind="stable")
    adjusted_P = np.empty_like(ps_P)
    adjusted_P[order_P] = np.maximum.accumulate(ps_P[order_P] * np.arange(len(ps_P), 0, -1))
    return np.minimum(adjusted_P, 1.0)


def benjamini_hochberg(ps: Sequence[float] | Array) -> Array:
    """P adjusted p-values that hold the false discovery rate (Benjamini & Hochberg 1995); for exploration."""
    return np.asarray(stats.false_discovery_control(ps, method="bh"))


def wilson(successes: int, n: int, level: float = 0.95) -> Interval:
    """Wilson score interval of a rate; sound at 0 % and 100 % too. Raises UserError for n = 0."""
    if n < 1:
        raise UserError("a rate needs at least one item")
    bounds = stats.binomtest(successes, n).proportion_ci(level, method="wilson")
    return Interval(successes / n, float(bounds.low), float(bounds.high))


def auroc(verdicts: Sequence[float], right: Sequence[bool]) -> float | None:
    """How often a right answer's verdict exceeds a wrong one's, ties by half: 0.5 is chance. None where all are right or all wrong."""
    good, bad = ([verdict for verdict, truth in zip(verdicts, right, strict=True) if truth == side] for side in (True, False))
    return float(stats.mannwhitneyu(good, bad).statistic) / (len(good) * len(bad)) if good and bad else None


def smallest_p(seeds: int) -> float:
    """The least p a two-sided sign-flip test over ``seeds`` can give."""
    return 2 / 2**seeds


def seeds_needed(tests: int, alpha: float = ALPHA) -> int:
    """The fewest seeds with which one of a family of ``tests`` differences can pass Holm at ``alpha``."""
    return next(seeds for seeds in count(1) if tests * smallest_p(seeds) < alpha)


def tested(differences: Sequence[Scores], weights: Weights) -> list[Tested]:
    """Each difference (SN by task) against 0, all as one family.

    p is the larger of the sign-flip p over seeds and the two-way p; a difference is claimed iff it stays under .05 after Holm, and then
    its two-way interval excludes 0.
    """
    ps = [max(sign_flip_p(seed_means(difference, weights)), two_way_p(difference, weights)) for difference in differences]
    gaps = [two_way_interval(difference, weights) for difference in differences]
    return [
        Tested(gap.mean, gap.low, gap.high, p, p_holm, p_holm < ALPHA) for gap, p, p_holm in zip(gaps, ps, holm(ps).tolist(), strict=True)
    ]


def claims(family: str, scores: Mapping[str, Scores], weights: Weights, better: Better = "higher") -> list[Claim]:
    """Every pair of methods, ``tested`` as one family; better methods come first.

    Raises UserError where methods were scored on different seeds or items.
    """
    macro = {method: float(seed_means(tasks, weights).mean()) for method, tasks in scores.items()}
    methods = sorted(scores, key=macro.__getitem__, reverse=better == "higher")
    pairs = list(combinations(methods, 2))
    found = tested([paired_scores(scores[a], scores[b]) for a, b in pairs], weights)
    return [Claim(**vars(test), a=a, b=b, family=family) for (a, b), test in zip(pairs, found, strict=True)]


def contrasts(family: str, scores: Mapping[str, Scores], weights: Weights, declared: Mapping[str, Mapping[str, float]]) -> list[Contrast]:
    """Every declared contrast (name: weight by method), ``tested`` as one family, in the order of their declaration.

    Raises UserError where its methods were scored on different seeds or items.
    """
    found = tested([contrasted(scores, methods) for methods in declared.values()], weights)
    return [
        Contrast(**vars(test), name=name, family=family, weights=methods)
        for (name, methods), test in zip(declared.items(), found, strict=True)
    ]


def ranks(methods: Iterable[str], claims: Iterable[Claim], better: Better = "higher") -> dict[str, int]:
    """1 + the number of methods claimed better, from the claims of one family.

    "Not claimed" is not transitive, so equal ranks do not mean equal methods.
    """
    losers = [claim.b if (claim.difference > 0) == (better == "higher") else claim.a for claim in claims if claim.claimed]
    return {method: 1 + losers.count(method) for method in methods}
