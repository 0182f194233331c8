"""What finished arms and references left behind, as everything after training takes it: scores, charges, divergences. No model.

Shapes: N items of a task or prompts of the exposure measurement.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from opd_bench import exposure
from opd_bench.judge_audit import Judged
from opd_bench.statistics import macro_weights


@dataclass(frozen=True)
class CurvePoint:
    """An arm that stopped at ``share`` of the budget, after a cooldown of its own; share 0 is its cold start.

    What it spent is given by kind of charge; ``greedy`` holds N item scores in [0, 1] per task.
    """

    share: float
    flops: dict[str, int]
    tokens: dict[str, int]
    seconds: dict[str, float]
    greedy: dict[str, np.ndarray]
    recording: exposure.Recording  # in full at the cold start and at the whole budget, else of KL(T‖S) alone

    @property
    def divergences(self) -> exposure.Divergences:
        return self.recording.along["forward_kl"]


@dataclass(frozen=True)
class ArmRecord:
    """One method trained with one seed; ``sampled`` holds N item scores in [0, 1] per task, the end of ``curve`` the greedy ones."""

    method: str
    seed: int
    start: int  # which cold start it began from
    share_spent: float  # of the binding budget
    unit_share: float  # of the budget: the least a step may come to
    wall_s: float
    saw: list[str]  # e.g. teacher text, teacher distributions, judge
    sampled: dict[str, np.ndarray]
    curve: list[CurvePoint]  # from the cold start to the whole budget
    own_schedule: bool = False  # each smaller budget was trained for separately
    judge_auroc: float | None = None  # mean over tasks; None where no judge was asked
    retention: dict[str, np.ndarray] = field(default_factory=dict)  # of N general texts, by measure; nothing where it was not measured
    judged: Judged | None = None  # what that judge did, for its audit
    version: str | None = None  # of the method's source

    @property
    def end(self) -> CurvePoint:
        return self.curve[-1]

    @property
    def greedy(self) -> dict[str, np.ndarray]:
        return self.end.greedy

    @property
    def divergences(self) -> exposure.Divergences:
        return self.end.divergences

    @property
    def recording(self) -> exposure.Recording:
        return self.end.recording


@dataclass(frozen=True)
class Run:
    """What all arms share: budget, seeds, tasks, and the models every method is compared with (N item scores per task)."""

    tier: str
    command: str
    commit: str
    axis: str  # the binding axis of the budget, with its unit: "FLOPs", "seconds"
    limit: float
    seeds: list[int]
    stem: list[str]
    coding: list[str]
    teacher: dict[str, np.ndarray]
    teacher_sampled: dict[str, np.ndarray]
    cold_starts: list[dict[str, np.ndarray]]
    cold_starts_sampled: list[dict[str, np.ndarray]]
    cold_starts_recordings: list[exposure.Recording]
    teacher_recording: exposure.Recording  # the teacher as if it were the student
    cold_start_flops: dict[str, float]  # of training one and making its data, by kind of charge; nothing where it is unknown
    overlap: dict[str, float]  # share of each task's test items that are met in training
    steps: dict[str, np.ndarray]  # that each item's problem needs; NaN where its task does not say
    contaminated: dict[str, int] = field(default_factory=dict)  # training prompts taken out, by the tasks whose test items they met
    held_out: dict[str, str] = field(default_factory=dict)  # scored, and in no macro score: their group by task
    privileged: bool = False  # the teacher was shown more than the students
    teacher_retention: dict[str, np.ndarray] = field(default_factory=dict)  # as an arm's
    models: dict[str, list[str]] = field(default_factory=dict)  # student and teacher in words
    contrasts: dict[str, dict[str, float]] = field(default_factory=dict)  # declared beforehand: weight by method
    notes: list[str] = field(default_factory=list)  # what the configuration wants said

    @property
    def cold_starts_divergences(self) -> list[exposure.Divergences]:
        """KL(T‖S) along the rollouts of each cold start."""
        return [recording.along["forward_kl"] for recording in self.cold_starts_recordings]

    @property
    def weights(self) -> dict[str, float]:
        """Each task's weight in the macro score; a group without tasks leaves it to the other."""
        return macro_weights(self.stem, self.coding)

    def macro(self, scores: dict[str, np.ndarray]) -> float:
        """The macro score of one model."""
        return sum(weight * float(scores[task].mean()) for task, weight in self.weights.items())
