"""Gates before ranks: what must hold for a comparison to mean something. A failed gate withholds ranks and claims, and says what to do.

    for gate in check(run, by_method, Limits()):
        gate.name, gate.held, gate.said, gate.methods

That student and teacher share vocabulary and EOS, and that prompts fit the context, is refused before anything trains (`models.py`); the
budget's limit is kept by the ledger, so its gate is about arms that stopped too early.

Shapes: N rollouts, T response positions.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from pydantic import BaseModel, ConfigDict, Field

from opd_bench.ledger import VERIFIER
from opd_bench.records import ArmRecord, Run
from opd_bench.statistics import over_items

GARBAGE = 0.2  # most of a judge's answers that may give no verdict
UNSPENT = 0.01  # share of the budget an arm may leave, or pass where what a verb takes is not known before it ran (seconds)


class Limits(BaseModel):
    """Where the gates stand; null opens one, and the leaderboard says so."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    overlap: float | None = Field(
        default=0.0, ge=0, le=1, description="most test items that may be met in training, as a share of a task's"
    )
    truncation: float | None = Field(default=0.02, ge=0, le=1, description="most of the teacher's rollouts that may reach the length limit")
    support: float | None = Field(
        default=0.3, ge=0, le=1, description="least share of the likeliest tokens that start and teacher have in common"
    )
    taught: float | None = Field(
        default=0.05, ge=0, le=1, description="least gain in score by half a solution of a privileged teacher in place of half of one's own"
    )
    judge: float | None = Field(default=0.6, ge=0, le=1, description="least AUROC of the judge's verdicts")


@dataclass(frozen=True)
class Gate:
    """``held`` is None where the gate was opened or had nothing to measure; ``methods`` are those it withholds when it fails."""

    name: str
    held: bool | None
    said: str  # one sentence: what was found, and for a failed gate what to do
    methods: tuple[str, ...] = ()


def check(run: Run, arms: Mapping[str, Sequence[ArmRecord]], limits: Limits) -> list[Gate]:
    """Every gate, run-wide ones first; ``arms`` holds the arms of each method."""
    everyone = tuple(arms)
    gates = [_headroom(run, everyone), _support(run, everyone, limits.support), _truncation(arms, everyone, limits.truncation)]
    gates += [*_taught(run, everyone, limits.taught), _overlap(run, everyone, limits.overlap), *_budget(run, arms)]
    return [*gates, *_judge(arms, limits.judge)]


def _headroom(run: Run, everyone: tuple[str, ...]) -> Gate:
    start = {task: np.mean([scores[task] for scores in run.cold_starts], axis=0) for task in run.weights}
    room = over_items({task: run.teacher[task] - start[task] for task in run.weights}, run.weights)
    teacher, before = run.macro(run.teacher), run.macro(start)
    if room.low is not None and room.low > 0:
        return Gate("headroom", True, f"the teacher's score, {teacher:.3f}, is clearly above the cold start's, {before:.3f}.", everyone)
    said = f"the teacher's score, {teacher:.3f}, is not clearly above the cold start's, {before:.3f}"
    return Gate("headroom", False, f"{said}: there is nothing to distil; choose a stronger teacher or another task.", everyone)


def _support(run: Run, everyone: tuple[str, ...], least: float | None) -> Gate:
    along = [recording.along["support"] for recording in run.cold_starts_recordings if "support" in recording.along]
    measured = [record.student_NT[record.student_alive_NT].mean() for record in along]
    if least is None or not measured:
        return Gate("support", None, "not measured." if least is not None else "switched off.", everyone)
    found = float(np.mean(measured))
    said = f"of the likeliest next tokens on the cold start's own text, start and teacher have {found:.0%} in common"
    if found >= least:
        return Gate("support", True, f"{said}.", everyone)
    return Gate("support", False, f"{said}, less than {least:.0%}: train the cold start on the teacher's text for longer.", everyone)


def _taught(run: Run, everyone: tuple[str, ...], least: float | None) -> Iterator[Gate]:
    """Whether a privileged teacher teaches or tells: from half of its solutions a student must get further than from half of its own.

    Where it was shown an answer and states it, half of its text holds nothing to go on from.
    """
    if not run.privileged:
        return
    halves = [[recording.continued.get(f"{side} 0.5") for side in ("teacher", "own")] for recording in run.cold_starts_recordings]
    gains = [np.nanmean(theirs - own) for theirs, own in halves if theirs is not None and own is not None]
    if least is None or not gains:
        yield Gate("taught", None, "not measured." if least is not None else "switched off.", everyone)
        return
    found = float(np.mean(gains))
    said = f"half of a solution by the privileged teacher is worth {found:+.3f} of score to the cold start, beside half of its own"
    if found >= least:
        yield Gate("taught", True, f"{said}.", everyone)
    else:
        why = f"{said}, less than {least:.3f}: it states what it was shown"
        yield Gate("taught", False, f"{why}, which cannot be learnt from; show it worked solutions, not answers.", everyone)


def _truncation(arms: Mapping[str, Sequence[ArmRecord]], everyone: tuple[str, ...], most: float | None) -> Gate:
    if most is None:
        return Gate("truncation", None, "switched off.", everyone)
    cut = float(np.mean([arm.divergences.teacher_alive_NT[:, -1].mean() for group in arms.values() for arm in group]))
    said = f"{cut:.1%} of the teacher's rollouts reach the length limit"
    if cut <= most:
        return Gate("truncation", True, f"{said}.", everyone)
    said += f", more than {most:.1%}, so students are taught unfinished answers"
    return Gate("truncation", False, f"{said}: raise max_response.", everyone)


def _overlap(run: Run, everyone: tuple[str, ...], most: float | None) -> Gate:
    if most is None:
        return Gate("overlap", None, "switched off.", everyone)
    task, share = max(run.overlap.items(), key=lambda pair: pair[1], default=("", 0.0))
    said = f"{share:.1%} of the test items of {task} are met in training" if share else "no test item is met in training"
    if run.contaminated:
        by_task = ", ".join(f"{tasks} {count:,}" for tasks, count in run.contaminated.items())
        said += f"; prompts taken out for that: {by_task}"
    if share <= most:
        return Gate("overlap", True, f"{said}.", everyone)
    return Gate("overlap", False, f"{said}: take them out of the training split.", everyone)


def _budget(run: Run, arms: Mapping[str, Sequence[ArmRecord]]) -> Iterator[Gate]:
    kept = True
    for name, group in arms.items():
        for arm in group:
            if not 1 - max(UNSPENT, arm.unit_share) <= arm.share_spent <= 1 + UNSPENT * (run.axis == "seconds"):
                kept = False
                said = f"{name} spent {arm.share_spent:.2%} of the budget with seed {arm.seed}, outside 99–100 %"
                yield Gate("budget", False, f"{said}: lower its batch or raise the budget.", (name,))
    if kept:
        every = [arm for group in arms.values() for arm in group]
        least, coarse = min(arm.share_spent for arm in every), max(arm.unit_share for arm in every)
        said = f"every arm spent {least:.1%} of the budget or more, and none passed it"
        said += f" (the least step of one may come to {coarse:.1%})" if least < 1 - UNSPENT else ""
        yield Gate("budget", True, f"{said}.", tuple(arms))


def _judge(arms: Mapping[str, Sequence[ArmRecord]], least: float | None) -> Iterator[Gate]:
    for name, group in arms.items():
        if any(VERIFIER in arm.saw for arm in group):
            yield Gate("judge", None, f"{name} was rewarded by the verifier itself: RLVR, a reference and not a judge's work.", (name,))
        if not any("judge" in arm.saw for arm in group):
            continue
        yield from _readable(name, group)
        known = [arm.judge_auroc for arm in group if arm.judge_auroc is not None]
        if least is None or not known:
            yield Gate("judge", None, "switched off." if least is None else f"{name}'s judge met answers of one kind only.", (name,))
            continue
        skill = float(np.mean(known))
        if skill >= least:
            yield Gate("judge", True, f"{name}'s judge tells right from wrong (AUROC {skill:.2f}).", (name,))
        else:
            said = f"{name}'s judge hardly tells right from wrong (AUROC {skill:.2f}, less than {least:.2f})"
            yield Gate("judge", False, f"{said}, so its verdicts taught nothing: use another judge.", (name,))


def _readable(name: str, group: Sequence[ArmRecord]) -> Iterator[Gate]:
    """Trips where a judge gives no verdict on many of an arm's own answers."""
    shares = [share for arm in group if arm.judged and (share := arm.judged.unreadable) is not None]
    if shares and (found := float(np.mean(shares))) > GARBAGE:
        said = f"{name}'s judge returns garbage: {found:.0%} of its answers give no verdict, more than {GARBAGE:.0%}"
        yield Gate("judge", False, f"{said}: change its template or use another judge.", (name,))
