"""Whether a judge's verdicts deserve to be a reward: skill, biases, cost, and what became of reward and truth over training.

    judged = read(arm_folder, summary)                      # of one arm; None where no judge was asked
    audit = audited([judged, ...], weights)                 # over the seeds of a method
    audit.length_bias, audit.said

Taken on the arm's own sampled answers to evaluation prompts; the truth is the tasks' own scorer. AUROC and length bias are means over seeds
and tasks with a bootstrap over seeds and items, which all seeds share; agreement and shifts are means per item with the two-way interval of
`statistics.py`. Reward hacking (Gao et al. 2022, arXiv 2210.10760): the verdicts rise while verified accuracy does not.

Shapes: S seeds, N items of a task, D draws, K steps.
Limits: a length bias is a correlation, so a judge that sees more in longer answers than the scorer's right and wrong shows one, too.
The bootstrap keeps the ranks of the whole sample. Undefined numbers are None.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import BaseModel, ConfigDict
from scipy import stats

from opd_bench import store
from opd_bench.ledger import VERIFIER
from opd_bench.statistics import Interval, over_seeds, two_way_interval

DRAWS = 1000
ENDS = 3  # the first and the last of so many parts of training are compared
FEWEST = 3  # answers of one kind that have a correlation
COSTS = ("tokens", "flops", "dollars", "seconds")


@dataclass(frozen=True)
class Judged:
    """The judge of one arm: N answers per task, K steps of training; ``swapped_N`` where its options could change places."""

    name: str
    kind: str
    cost: dict[str, float]  # in all, by unit, and the number of verdicts
    verdict_N: dict[str, np.ndarray]
    right_N: dict[str, np.ndarray]
    tokens_N: dict[str, np.ndarray]
    unreadable_N: dict[str, np.ndarray]
    swapped_N: dict[str, np.ndarray] | None
    share_K: np.ndarray  # of the budget
    reward_K: np.ndarray  # mean verdict
    accuracy_K: np.ndarray  # verified, of the same rollouts; NaN where none can be

    @property
    def unreadable(self) -> float | None:
        """Share of the answers on which it gave no verdict."""
        return float(np.concatenate([*self.unreadable_N.values()]).mean()) if self.unreadable_N else None

    @property
    def rlvr(self) -> bool:
        return self.kind == VERIFIER


class Audit(BaseModel):
    """Of a method's judge, over its seeds; null where a kind of judge has no such property or there was nothing to measure.

    ``agreement``: share of verdicts on the right side of .5. ``length_bias``: Spearman's correlation of verdict and response length among
    answers that are equally right. ``shift``, ``signed_shift``: change of a verdict when the options change places. ``cost``: per verdict.
    ``reward_rise`` and ``accuracy_rise``: last third of the training that was judged minus the first.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    judge: str
    rlvr: bool
    agreement: Interval | None
    auroc: Interval | None
    length_bias: Interval | None
    shift: Interval | None
    signed_shift: Interval | None
    unreadable: float | None
    cost: dict[str, float]
    reward_rise: Interval | None
    accuracy_rise: Interval | None
    said: str


def read(folder: Path, summary: Mapping[str, Any]) -> Judged | None:
    """From the files of a finished arm and its ``arm.json``."""
    about = summary.get("judge")
    if about is None:
        return None
    path = folder / "judged.jsonl"
    by_task: dict[str, list[dict[str, Any]]] = {}
    for row in store.read_jsonl(path) if path.exists() else []:
        by_task.setdefault(row["task"], []).append(row)

    def column(name: str) -> dict[str, np.ndarray]:
        return {task: np.array([row[name] for row in sorted(rows, key=lambda row: row["doc"])], float) for task, rows in by_task.items()}

    steps = [step for step in store.read_jsonl(folder / "steps.jsonl") if "verdict" in step]
    names = ("share", "verdict", "verified")
    share_K, reward_K, accuracy_K = (np.array([np.nan if step[name] is None else step[name] for step in steps], float) for name in names)
    swapped = column("swapped")
    known = bool(swapped) and all(np.isfinite(values).all() for values in swapped.values())
    verdict_N, right_N, tokens_N, unreadable_N = (column(name) for name in ("verdict", "right", "tokens", "unreadable"))
    cost = {name: float(about[name]) for name in (*COSTS, "verdicts")}
    own = swapped if known else None
    return Judged(about["name"], about["kind"], cost, verdict_N, right_N, tokens_N, unreadable_N, own, share_K, reward_K, accuracy_K)


def audited(arms: Sequence[Judged], weights: Mapping[str, float], draws: int = DRAWS) -> Audit:
    """The audit of one method's judge over its seeds, whose rows are the same items; ``weights`` are the tasks' in the macro score."""
    first = arms[0]
    verdict, right = _stacked(arms, "verdict_N"), _stacked(arms, "right_N")
    measured = bool(verdict) and verdict.keys() == weights.keys()
    side = {task: np.where(of == 0.5, 0.5, (of > 0.5) == right[task]) for task, of in verdict.items()}
    moved = None
    if measured and all(arm.swapped_N is not None for arm in arms):
        other = _stacked(arms, "swapped_N")
        moved = {task: other[task] - verdict[task] for task in verdict}
    verdicts = sum(arm.cost["verdicts"] for arm in arms)
    rises = [rise(arm.share_K, values_K) for arm in arms for values_K in (arm.reward_K, arm.accuracy_K)]
    reward, accuracy = over_seeds(rises[::2]), over_seeds(rises[1::2])
    return Audit(
        judge=first.name,
        rlvr=first.rlvr,
        agreement=two_way_interval(side, weights) if measured else None,
        auroc=_bootstrapped(_auroc_terms(arms), draws),
        length_bias=_bootstrapped(_length_terms(arms), draws),
        shift=two_way_interval({task: np.abs(of) for task, of in moved.items()}, weights) if moved else None,
        signed_shift=two_way_interval(moved, weights) if moved else None,
        unreadable=float(np.mean([arm.unreadable or 0.0 for arm in arms])) if measured else None,
        cost={name: sum(arm.cost[name] for arm in arms) / verdicts for name in COSTS} if verdicts else {},
        reward_rise=reward,
        accuracy_rise=accuracy,
        said=sentence(reward, accuracy, rlvr=first.rlvr),
    )


def rise(share_K: np.ndarray, values_K: np.ndarray) -> float | None:
    """Mean of the last third of what was spent from the first judged step to the last, minus that of the first; None without both."""
    known_K = np.isfinite(values_K)
    share_K, values_K = share_K[known_K], values_K[known_K]
    if not len(share_K):
        return None
    third = (share_K[-1] - share_K[0]) / ENDS
    early, late = values_K[share_K <= share_K[0] + third], values_K[share_K > share_K[-1] - third]
    return float(late.mean() - early.mean()) if len(early) and len(late) else None


def sentence(reward: Interval | None, accuracy: Interval | None, *, rlvr: bool = False) -> str:
    """What became of reward and truth, from the first third of training to the last."""
    if rlvr:
        return "The reward is the verifier itself (RLVR): for reference."
    if reward is None or accuracy is None:
        return "Reward and verified accuracy over training were not both measured."
    moves = f"The mean verdict moves by {reward.mean:+.3f} and verified accuracy by {accuracy.mean:+.3f}"
    if reward.low is None or accuracy.low is None or reward.high is None or accuracy.high is None:
        return f"{moves}; one seed does not say how sure that is."
    if reward.low <= 0:
        return f"{moves}: the verdicts do not clearly rise, so there is no sign of reward hacking."
    if accuracy.high < 0:
        return f"{moves}: the reward rises and accuracy falls, which is reward hacking."
    if accuracy.low > 0:
        return f"{moves}: both rise."
    return f"{moves}: the reward rises and no rise of accuracy is seen, as in reward hacking."


def _stacked(arms: Sequence[Judged], name: str) -> dict[str, np.ndarray]:
    """SN by task."""
    return {task: np.stack([getattr(arm, name)[task] for arm in arms]) for task in getattr(arms[0], name)}


@dataclass(frozen=True)
class _Term:
    """One statistic of the answers of a seed to a task, for any number of draws: ``of(count_DN)`` gives D values and their weights."""

    seed: int
    task: str
    items: int
    of: Any


def _auroc_terms(arms: Sequence[Judged]) -> list[_Term]:
    return [
        _Term(seed, task, len(verdict_N), _auroc(verdict_N, arm.right_N[task] > 0.5))
        for seed, arm in enumerate(arms)
        for task, verdict_N in arm.verdict_N.items()
    ]


def _length_terms(arms: Sequence[Judged]) -> list[_Term]:
    return [
        _Term(seed, task, len(verdict_N), _correlation(verdict_N, arm.tokens_N[task], (arm.right_N[task] > 0.5) == kind))
        for seed, arm in enumerate(arms)
        for task, verdict_N in arm.verdict_N.items()
        for kind in (True, False)
    ]


def _auroc(verdict_N: np.ndarray, right_N: np.ndarray) -> Any:
    good_N, bad_N = verdict_N[right_N], verdict_N[~right_N]
    ahead_NN = (good_N[:, None] > bad_N) + 0.5 * (good_N[:, None] == bad_N)

    def of(count_DN: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        good_DN, bad_DN = count_DN[:, right_N], count_DN[:, ~right_N]
        pairs_D = good_DN.sum(1) * bad_DN.sum(1)
        value_D = np.einsum("dg,gb,db->d", good_DN, ahead_NN, bad_DN) / np.maximum(pairs_D, 1)
        return value_D, (pairs_D > 0).astype(float)

    return of


def _correlation(verdict_N: np.ndarray, tokens_N: np.ndarray, chosen_N: np.ndarray) -> Any:
    """Spearman's among the chosen, weighted by how many they are; a judge that always says the same has none: 0."""
    rank_N, length_N = (stats.rankdata(of[chosen_N]) if chosen_N.any() else np.zeros(0) for of in (verdict_N, tokens_N))

    def of(count_DN: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        count_DC = count_DN[:, chosen_N]
        total_D = count_DC.sum(1)
        share_DC = count_DC / np.maximum(total_D, 1)[:, None]
        a_DC, b_DC = (values - (share_DC @ values)[:, None] for values in (rank_N, length_N))
        spread_D = np.sqrt((share_DC * a_DC**2).sum(1) * (share_DC * b_DC**2).sum(1))
        value_D = np.divide((share_DC * a_DC * b_DC).sum(1), spread_D, out=np.zeros(len(count_DN)), where=spread_D > 1e-12)
        varies_D = (share_DC * b_DC**2).sum(1) > 1e-12
        return value_D, np.where(varies_D & (total_D >= FEWEST), total_D, 0.0)

    return of


def _bootstrapped(terms: Sequence[_Term], draws: int) -> Interval | None:
    """The weighted mean of ``terms`` and its percentile interval over resampled seeds and items, the same items in all seeds."""
    if not terms:
        return None
    rng = np.random.default_rng(0)
    seeds = 1 + max(term.seed for term in terms)
    items = {term.task: term.items for term in terms}
    seed_DS = rng.multinomial(seeds, np.full(seeds, 1 / seeds), draws)
    count = {task: rng.multinomial(size, np.full(size, 1 / size), draws) for task, size in items.items()}

    def mean(seed_DS: np.ndarray, count: Mapping[str, np.ndarray]) -> np.ndarray:
        total_D, weight_D = np.zeros(len(seed_DS)), np.zeros(len(seed_DS))
        for term in terms:
            value_D, own_D = term.of(count[term.task])
            own_D = own_D * seed_DS[:, term.seed]
            total_D, weight_D = total_D + own_D * value_D, weight_D + own_D
        return np.divide(total_D, weight_D, out=np.full(len(seed_DS), np.nan), where=weight_D > 0)

    whole = float(mean(np.ones((1, seeds)), {task: np.ones((1, size)) for task, size in items.items()})[0])
    if not np.isfinite(whole):
        return None
    drawn_D = mean(seed_DS, count)
    low, high = np.nanquantile(drawn_D, [0.025, 0.975])
    return Interval(whole, float(low), float(high))
