"""The exposure-bias suite: every figure of every student as one document, in numbers, in words and in tables.

    found = suite({"opd": Student(recordings, greedy, steps)}, teacher_as_student, draws=1000)
    (folder / "exposure.json").write_text(to_json(found))
    (folder / "exposure.md").write_text(markdown(found))

A *student* is what one method came to with each seed, or a checkpoint (one seed). What the figures mean, and when not to trust them, is in
docs/exposure-bias.md; they are estimated by `exposure.py`.

Shapes: S seeds, N items of a task.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from opd_bench import exposure
from opd_bench.exposure import FRACTIONS, INJECTIONS, Band, Decay, Ended, Falsifier, Paired, Recording
from opd_bench.report import estimate, markdown_table, percent
from opd_bench.statistics import Array, Interval

MEASURES = {
    "forward_kl": "KL(T‖S)",
    "reverse_kl": "KL(S‖T)",
    "total_variation": "total variation",
    "log_ratio": "sampled log-ratio",
    "matched": "KL(T‖S), entropy matched",
}
COLD_START = "cold start"
ENDED: dict[Ended, str] = {"zero": "", "drop": ", living only"}


@dataclass(frozen=True)
class Student:
    """Recordings, one per seed, and by task the greedy item scores (SN) with the steps each item needs (N; NaN: unknown)."""

    recordings: Sequence[Recording]
    greedy: Mapping[str, Array]
    steps: Mapping[str, Array]


@dataclass(frozen=True)
class Figures:
    """All figures of one student; None where undefined or not recorded."""

    gaps: Mapping[str, Mapping[Ended, Mapping[str, Interval | None]]]  # by measure and treatment of ended rollouts
    temperature: float | None  # mean over seeds, of the entropy-matched control
    contrast: dict[str, Paired | None]  # by fraction: from the teacher's prefix (a) and from its own (b)
    usefulness: dict[str, Paired | None]  # by fraction: the teacher (a) and the student (b), from the student's prefix
    recovery: dict[str, Paired | None]  # by injection: the student (a) and the teacher (b)
    support: dict[str, Interval | None]  # on own ("student") and on the teacher's prefixes
    decay: Decay | None
    by_length: dict[str, Band]  # "excess" and "exaccerr" up to each length
    drifts_from: int | None  # first length from which on the band of R − l·ε stays above 0
    precision: str


@dataclass(frozen=True)
class Suite:
    prompts: int
    seeds: int
    students: dict[str, Figures]
    falsifiers: list[Falsifier]


def suite(students: Mapping[str, Student], teacher: Recording, draws: int = 1000) -> Suite:
    """All figures of ``students``; ``teacher`` is the teacher measured as if it were the student, for the falsifiers."""
    recordings = {name: student.recordings for name, student in students.items()}
    first = next(iter(recordings.values()))
    found = {name: figures(student, draws) for name, student in students.items()}
    return Suite(len(first[0].along["forward_kl"]), len(first), found, exposure.falsifiers(recordings, teacher))


def figures(student: Student, draws: int = 1000) -> Figures:
    """Every figure of one student; all students of equal shape meet the same bootstrap draws."""
    records = student.recordings

    def rng() -> np.random.Generator:
        return np.random.default_rng(0)

    temperatures = [record.temperature for record in records if record.temperature is not None]
    by_length = exposure.curves_over_seeds([record.along["forward_kl"] for record in records], rng(), draws)
    steps_N = np.concatenate([student.steps[task] for task in student.greedy])
    full, placed = "support" in records[0].along, records[0].continued
    return Figures(
        gaps=exposure.gaps(records, rng(), draws),
        temperature=sum(temperatures) / len(temperatures) if temperatures else None,
        contrast={f"{at:g}": exposure.prefix_contrast(records, at, rng(), draws) for at in FRACTIONS} if placed else {},
        usefulness={f"{at:g}": exposure.usefulness(records, at, rng(), draws) for at in FRACTIONS} if placed else {},
        recovery={what: exposure.recovery(records, what, rng(), draws) for what in INJECTIONS} if placed else {},
        support=exposure.support_overlap(records, rng(), draws) if full else {},
        decay=exposure.length_decay(np.concatenate([*student.greedy.values()], axis=1), steps_N, rng(), draws),
        by_length={column: by_length[column] for column in ("excess", "exaccerr")},
        drifts_from=drifts_from(by_length["excess"].low_T),
        precision=exposure.precision(records).said,
    )


def drifts_from(low_T: Array) -> int | None:
    """The first length (counted from 1) from which on the lower bound stays above 0; None where it does not end there."""
    within_T = ~(low_T > 0)
    if within_T[-1]:
        return None
    return int(np.flatnonzero(within_T)[-1]) + 2 if within_T.any() else 1


def to_json(found: Suite) -> str:
    """The suite as JSON; what is undefined is null."""
    return as_json({"schema": "opd-bench/exposure/1", **asdict(found)})


def as_json(document: Any) -> str:
    return json.dumps(_finite(document), indent=2, ensure_ascii=False, allow_nan=False) + "\n"


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(key): _finite(each) for key, each in value.items()}
    if isinstance(value, np.ndarray):
        return _finite(value.tolist())
    if isinstance(value, list | tuple):
        return [_finite(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


# ---- in tables --------------------------------------------------------------------------------------------------------------------


def tables(found: Suite) -> dict[str, tuple[list[str], list[list[str]], str]]:
    """Columns, rows and a remark, by title."""
    students = found.students
    every = {name: of.gaps for name, of in students.items()}
    measures = [measure for measure in MEASURES if any(measure in gaps for gaps in every.values())]
    kept: dict[str, tuple[list[str], list[list[str]], str]] = {
        "The gap": (
            ["student", "measure", "R", "l·ε", "R − l·ε", "ExAccErr"],
            [
                [name, MEASURES[measure] + said, *_gap(every[name][measure][ended])]
                for measure in measures
                for ended, said in ENDED.items()
                for name in students
                if measure in every[name]
            ],
            "In nats (total variation: summed shares), summed over positions. A rollout that ended counts 0, or leaves the average (living "
            "only). "
            + "; ".join(f"{name}: entropy matched at temperature {of.temperature:.2f}" for name, of in students.items() if of.temperature),
        ),
        "Prefix contrast": (
            ["student", "prefix", "from the teacher's", "from its own", "difference", "pairs"],
            _paired(
                students, "contrast", lambda pair: [*map(estimate, (pair.a, pair.b, pair.difference)), f"{pair.entered:,}"], "of a rollout"
            ),
            "Solve rate going on greedily from a share of a rollout, over prompts and seeds where both prefixes were still right.",
        ),
        "Recovery": (
            ["student", "after", "student solves", "teacher solves", "ratio", "pairs"],
            _paired(students, "recovery", lambda pair: [*map(estimate, (pair.a, pair.b, pair.ratio)), f"{pair.entered:,}"]),
            "Solve rates from the same corrupted prefix of the teacher's right rollout.",
        ),
        "Does the teacher still guide?": (
            ["student", "after", "teacher solves", "student solves", "difference"],
            _paired(students, "usefulness", lambda pair: [*map(estimate, (pair.a, pair.b, pair.difference))], "of its rollout"),
            "Both go on greedily from the student's own prefix, right or wrong.",
        ),
        "Support overlap": (
            ["student", "on its own prefixes", "on the teacher's"],
            [[name, *(estimate(of.support[side], 2) for side in ("student", "teacher"))] for name, of in students.items() if of.support],
            "Share of the 8 likeliest next tokens that student and teacher both name.",
        ),
        "Length decay": (
            ["student", "one step", "surplus loss", "share of the failure"],
            [
                [name, estimate(of.decay.one_step), estimate(of.decay.surplus), percent(of.decay.share)]
                for name, of in students.items()
                if of.decay
            ],
            "Loss on longer problems beyond aⁿ, a being the accuracy of one step: what exposure bias may explain, at most.",
        ),
    }
    return {title: table for title, table in kept.items() if table[1]}


def _gap(gap: Mapping[str, Interval | None]) -> list[str]:
    return [*(estimate(gap[name], 2) for name in ("regret", "per_step", "excess")), estimate(gap["exaccerr"], 0, " %")]


def _paired(students: Mapping[str, Figures], what: str, cells: Any, of: str = "") -> list[list[str]]:
    found = {name: getattr(figures, what) for name, figures in students.items()}
    places = dict.fromkeys(place for pairs in found.values() for place in pairs)
    label = (lambda place: f"{float(place):.0%} {of}") if of else str
    return [[name, label(place), *cells(pairs[place])] for place in places for name, pairs in found.items() if pairs.get(place)]


def sentences(found: Suite) -> list[str]:
    """Whether the falsifiers held, and what the prompts buy."""
    state = {True: "held", False: "FAILED", None: "not determined"}
    said = [f"{falsifier.name} {state[falsifier.held]}: {falsifier.said}" for falsifier in found.falsifiers]
    return said + [f"{name}: {of.precision}" for name, of in found.students.items()]


def markdown(found: Suite, figures: Sequence[str] = ()) -> str:
    """The tables and sentences as Markdown, with the names of figures that lie beside it."""
    parts = [
        "# Exposure bias",
        f"{found.prompts} prompts, {found.seeds} {'seed' if found.seeds == 1 else 'seeds'}; brackets are 95 % intervals.",
    ]
    for title, (columns, rows, remark) in tables(found).items():
        parts += [f"## {title}", "\n".join(markdown_table(columns, rows)), remark]
    parts += [f"![{Path(name).stem.replace('_', ' ')}]({name})" for name in figures]
    parts += ["## Do the figures mean anything?", "\n".join(f"- {line}" for line in sentences(found))]
    return "\n\n".join(parts) + "\n"
