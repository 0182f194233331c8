"""Pairs of Markov chains whose exposure bias is known exactly: expectations by dynamic programming, and rollouts to estimate them from.

    truth = exact(BIASED, length=8, convention="kl", ended="zero")
    truth.value["excess"], truth.deviation["excess"] / N**0.5  # what N prompts estimate, and the standard error they have
    record = sampled(BIASED, prompts=N, length=8, convention="kl", draw=np.random.default_rng(0))

A prompt is a start state, which both sides share. The last token ends a rollout; a rollout lives through the position of that token.
Knows nothing of ``opd_bench.exposure`` but the record it fills.

Shapes: K states, V tokens (the last one ends), T positions, N prompts.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import product

import numpy as np

from opd_bench.exposure import Divergences


@dataclass(frozen=True)
class Pair:
    start_K: np.ndarray
    teacher_KV: np.ndarray
    student_KV: np.ndarray
    step_KV: np.ndarray  # the state after each token; V − 1 columns, since the last token ends

    def log_ratio_KV(self) -> np.ndarray:
        """log T − log S; 0 where the teacher never goes."""
        return np.where(self.teacher_KV > 0, np.log(np.where(self.teacher_KV > 0, self.teacher_KV, 1) / self.student_KV), 0.0)

    def moving_KK(self, policy_KV: np.ndarray) -> np.ndarray:
        """Chance of each next state; a row misses what ends."""
        found_KK = np.zeros((len(policy_KV), len(policy_KV)))
        for state, token in np.ndindex(*self.step_KV.shape):
            found_KK[state, self.step_KV[state, token]] += policy_KV[state, token]
        return found_KK


def ending(rows: list[list[float]], chance: list[float]) -> np.ndarray:
    """Distributions over the tokens that go on, by state, with the chance of the one that ends put last."""
    end_K1 = np.array(chance)[:, None]
    return np.hstack([np.array(rows) * (1 - end_K1), end_K1])


# State 1 is wrong and absorbing; the teacher never goes there.
BIASED = Pair(
    np.array([1.0, 0.0]),
    ending([[1.0, 0.0], [0.5, 0.5]], [0.1, 0.2]),
    ending([[0.9, 0.1], [0.1, 0.9]], [0.1, 0.05]),
    np.array([[0, 1], [1, 1]]),
)
# Both visit every state, prompts differ, and the two end at different times.
MIXED = Pair(
    np.array([0.5, 0.3, 0.2]),
    ending([[0.7, 0.2, 0.1], [0.1, 0.8, 0.1], [0.3, 0.3, 0.4]], [0.05, 0.1, 0.02]),
    ending([[0.5, 0.3, 0.2], [0.2, 0.4, 0.4], [0.1, 0.2, 0.7]], [0.08, 0.05, 0.1]),
    np.array([[0, 1, 2]] * 3),
)
EQUAL = Pair(MIXED.start_K, MIXED.teacher_KV, MIXED.teacher_KV, MIXED.step_KV)
# KL((½, ½) ‖ (r, 1 − r)) is KL((.9, .1) ‖ (.6, .4)): errors alike in both states, which the two visit in other shares.
_ALIKE = 0.9 * np.log(0.9 / 0.6) + 0.1 * np.log(0.1 / 0.4)
_R = (1 - np.sqrt(1 - np.exp(-2 * _ALIKE))) / 2
STEADY = Pair(
    np.array([0.5, 0.5]),
    ending([[0.9, 0.1], [0.5, 0.5]], [0.05, 0.05]),
    ending([[0.6, 0.4], [_R, 1 - _R]], [0.05, 0.05]),
    np.array([[0, 1], [0, 1]]),
)


# ---- expectations -----------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Exact:
    """Expected regret, per_step, excess and exaccerr, and √N times the standard error (first order) of their estimates."""

    value: dict[str, float]
    deviation: dict[str, float]


def visits(pair: Pair, policy_KV: np.ndarray, length: int) -> np.ndarray:
    """Chance to be alive and in each state before each token: TK."""
    moving_KK, visits_TK = pair.moving_KK(policy_KV), [pair.start_K]
    for _ in range(length - 1):
        visits_TK.append(visits_TK[-1] @ moving_KK)
    return np.array(visits_TK)


def _moments(pair: Pair, policy_KV: np.ndarray, mean_TK: np.ndarray, square_TK: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mean and variance, by start state, of a rollout's sum of rewards with these first and second moments: backwards in time."""
    moving_KK = pair.moving_KK(policy_KV)
    sum_K, squared_K = np.zeros(len(moving_KK)), np.zeros(len(moving_KK))
    for mean_K, square_K in zip(mean_TK[::-1], square_TK[::-1], strict=True):
        squared_K = square_K + 2 * mean_K * (moving_KK @ sum_K) + moving_KK @ squared_K
        sum_K = mean_K + moving_KK @ sum_K
    return sum_K, squared_K - sum_K**2


def exact(pair: Pair, length: int, convention: str, ended: str) -> Exact:
    """``convention`` "kl" or "ratio" (a fresh teacher token each), ``ended`` "zero" or "drop"."""
    log_KV = pair.log_ratio_KV()
    kl_K = (pair.teacher_KV * log_KV).sum(axis=1)
    square_K = kl_K**2 if convention == "kl" else (pair.teacher_KV * log_KV**2).sum(axis=1)
    totals, sums, variances = [], [], []
    for policy_KV in (pair.student_KV, pair.teacher_KV):
        visits_TK = visits(pair, policy_KV, length)
        alive_T1 = visits_TK.sum(axis=1, keepdims=True)
        if ended == "zero":
            mean_TK, square_TK = np.tile(kl_K, (length, 1)), np.tile(square_K, (length, 1))
            totals.append(float((visits_TK @ kl_K).sum()))
        else:  # Σ_t (x − μ_t) / α_t over the living: what one rollout moves the sum of averages by
            centre_T1 = (visits_TK @ kl_K)[:, None] / alive_T1
            mean_TK, square_TK = (kl_K - centre_T1) / alive_T1, (square_K - 2 * centre_T1 * kl_K + centre_T1**2) / alive_T1**2
            totals.append(float(centre_T1.sum()))
        sum_K, variance_K = _moments(pair, policy_KV, mean_TK, square_TK)
        sums.append(sum_K)
        variances.append(variance_K)
    regret, per_step = totals

    def deviation(of_student: float, of_teacher: float) -> float:
        """Of a combination of both sides, whose rollouts share their start and nothing else."""
        mean_K = of_student * sums[0] + of_teacher * sums[1]
        within = pair.start_K @ (of_student**2 * variances[0] + of_teacher**2 * variances[1])
        return float(max(0.0, within + pair.start_K @ mean_K**2 - (pair.start_K @ mean_K) ** 2)) ** 0.5

    value = {"regret": regret, "per_step": per_step, "excess": regret - per_step}
    spread = {"regret": deviation(1, 0), "per_step": deviation(0, 1), "excess": deviation(1, -1)}
    if per_step > 0:
        value["exaccerr"] = 100 * (regret / per_step - 1)
        spread["exaccerr"] = deviation(100 / per_step, -100 * regret / per_step**2)
    return Exact(value, spread)


def enumerated(pair: Pair, policy_KV: np.ndarray, length: int) -> tuple[np.ndarray, np.ndarray]:
    """Expected KL and chance to be alive at each position, over every text there is: T and T. Slow, and plain enough to trust."""
    kl_K = (pair.teacher_KV * pair.log_ratio_KV()).sum(axis=1)
    end = policy_KV.shape[1] - 1
    kl_T, alive_T = np.zeros(length), np.zeros(length)
    for start, tokens in product(range(len(pair.start_K)), product(range(end + 1), repeat=length)):
        state, lived, kls = start, [], []
        chance = pair.start_K[start]
        for token in tokens:
            lived.append(1.0)
            kls.append(kl_K[state])
            chance *= policy_KV[state, token]
            if token == end:
                break
            state = pair.step_KV[state, token]
        copies = (end + 1) ** (length - len(lived))  # what stands after the end is no text: count it once
        kl_T[: len(kls)] += chance / copies * np.array(kls)
        alive_T[: len(lived)] += chance / copies
    return kl_T, alive_T


# ---- rollouts ---------------------------------------------------------------------------------------------------------------------


def sampled(pair: Pair, prompts: int, length: int, convention: str, draw: np.random.Generator) -> Divergences:
    """One rollout of each model to each of N prompts."""
    start_N = draw.choice(len(pair.start_K), size=prompts, p=pair.start_K)
    log_KV = pair.log_ratio_KV()
    kl_K = (pair.teacher_KV * log_KV).sum(axis=1)

    def tokens(policy_KV: np.ndarray, state_N: np.ndarray) -> np.ndarray:
        return (draw.random((prompts, 1)) >= policy_KV.cumsum(axis=1)[state_N, :-1]).sum(axis=1)

    sides = []
    for policy_KV in (pair.student_KV, pair.teacher_KV):
        step_KV = np.hstack([pair.step_KV, np.zeros((len(policy_KV), 1), dtype=int)])
        state_N, living_N = start_N, np.ones(prompts, dtype=bool)
        values_NT, alive_NT = np.full((prompts, length), np.nan), np.zeros((prompts, length), dtype=bool)
        for at in range(length):
            alive_NT[:, at] = living_N
            values_N = kl_K[state_N] if convention == "kl" else log_KV[state_N, tokens(pair.teacher_KV, state_N)]
            values_NT[living_N, at] = values_N[living_N]
            token_N = tokens(policy_KV, state_N)
            living_N = living_N & (token_N < policy_KV.shape[1] - 1)
            state_N = step_KV[state_N, token_N]
        sides += [values_NT, alive_NT]
    return Divergences(*sides)
