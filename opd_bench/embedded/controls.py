"""Controls of the embedded tier: comparisons whose outcome is known beforehand, so that the instrument itself can be checked.

    check(lambda overlay: load("embedded", [size("controls"), overlay]), out, "opd-bench compare --controls", 2, Console())

Each control is a small comparison like any other, in a folder of its own; the same command again resumes. A control says what it
expects before it runs, and what was observed is read from the leaderboard alone.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from opd_bench import store
from opd_bench.compare import compare
from opd_bench.config import Config, model_location
from opd_bench.errors import RunError
from opd_bench.leaderboard import Estimate, Leaderboard
from opd_bench.models import load_model, load_tokenizer

OTHER_STUDENT, TEACHER = "embedded/student-1", "embedded/teacher"
FOREIGN = {"#": "@", "def": "~"}  # what opens an answer, and a function, in the other protocol

Verdict = tuple[bool, str]  # whether the outcome is as expected, and what was observed


@dataclass(frozen=True)
class Control:
    """``overlay`` is laid over the tier; ``read`` compares its leaderboard with what was expected."""

    name: str
    expected: str
    overlay: dict[str, Any]
    read: Callable[[Leaderboard], Verdict]


@dataclass(frozen=True)
class Outcome:
    name: str
    expected: str
    observed: str
    held: bool


def score(of: Estimate) -> float:
    assert of.mean is not None
    return of.mean


def unranked(board: Leaderboard) -> bool:
    return all(method.rank is None for method in board.methods)


def scores(board: Leaderboard) -> str:
    return ", ".join(f"{method.name} {score(method.score):.3f}" for method in board.methods)


def references(board: Leaderboard) -> str:
    return f"teacher {score(board.teacher.score):.3f}, cold start {score(board.cold_start.score):.3f}"


def ranking(board: Leaderboard) -> str:
    return "ranks withheld" if unranked(board) else "ranks given"


def failed(board: Leaderboard, name: str) -> bool:
    return any(gate.held is False for gate in board.gates if gate.name == name)


def state(board: Leaderboard, name: str) -> str:
    return "failed" if failed(board, name) else "held"


def teacher_as_student(board: Leaderboard) -> Verdict:
    gaps = [method.exposure for method in board.methods if method.exposure]
    silent = all((gap.regret.mean, gap.per_step.mean) == (0, 0) and (gap.exaccerr is None or gap.exaccerr.mean is None) for gap in gaps)
    still = all(score(method.score) == score(board.teacher.score) for method in board.methods)
    regrets = ", ".join(f"{gap.regret.mean:.3g}" for gap in gaps)
    held = len(gaps) == len(board.methods) and silent and still and unranked(board)
    return held, f"{references(board)}; {scores(board)}; R {regrets}; {ranking(board)}"


def deaf_student(board: Leaderboard) -> Verdict:
    start = score(board.cold_start.score)
    still = all(value == start for method in board.methods for value in method.score_by_seed)
    claimed = [claim for claim in board.claims if claim.claimed]
    return still and not claimed, f"{references(board)}; {scores(board)}; {len(claimed)} claims"


def no_headroom(board: Leaderboard) -> Verdict:
    return failed(board, "headroom") and unranked(board), f"{references(board)}; headroom gate {state(board, 'headroom')}, {ranking(board)}"


def other_protocol(board: Leaderboard) -> Verdict:
    fell = all(score(method.score) < score(board.cold_start.score) for method in board.methods)
    return fell and unranked(board) and score(board.teacher.score) == 0, f"{references(board)}; {scores(board)}; {ranking(board)}"


def random_judge(board: Leaderboard) -> Verdict:
    skill = next(method.judge_auroc for method in board.methods if method.name == "opd_rlaif")
    caught = failed(board, "judge")
    better = [claim for claim in board.claims if claim.claimed and claim.a == "opd_rlaif" and claim.family == "score"]
    observed = f"AUROC {'undefined' if skill is None else f'{skill:.2f}'}, judge gate {state(board, 'judge')}; {len(better)} claims for it"
    return caught and skill is not None and 0.35 < skill < 0.65 and not better, observed


def controls(foreign_teacher: str, methods: dict[str, dict]) -> list[Control]:
    """The five; ``foreign_teacher`` is a teacher of another protocol, ``methods`` the tier's own."""
    return [
        Control(
            "teacher as student",
            "nothing to learn: scores stay the teacher's, R and l·ε are 0, ExAccErr is undefined, ranks are withheld",
            {"students": [TEACHER], "methods": {"offline_kd": {}, "opd": {}}},
            teacher_as_student,
        ),
        Control(
            "deaf student",
            "learning rate 0: every score is exactly the cold start's, nothing is claimed",
            {"methods": {name: {"lr": 0.0} for name in methods}},
            deaf_student,
        ),
        Control(
            "no headroom",
            "the teacher is another student: the headroom gate trips, ranks are withheld",
            {"teacher": OTHER_STUDENT, "methods": {"sft": {}, "opd": {}}},
            no_headroom,
        ),
        Control(
            "other answer protocol",
            "a teacher that opens answers otherwise scores 0, pulls every method below the cold start, and ranks are withheld",
            {"teacher": foreign_teacher, "methods": {"sft": {}, "offline_kd": {}, "opd": {}}},
            other_protocol,
        ),
        Control(
            "judge at random",
            "verdicts by lot: AUROC between .35 and .65, the judge gate trips, and OPD + RLAIF is claimed better than nothing",
            {"judge": {"at_random": True}, "methods": {"opd": {}, "opd_rlaif": {}}},
            random_judge,
        ),
    ]


def write_foreign_teacher(folder: Path) -> None:
    """The teacher with another answer protocol: the same model, with the tokens of ``FOREIGN`` swapped where it reads and writes."""
    model, tokenizer = load_model(model_location(TEACHER)), load_tokenizer(model_location(TEACHER))
    vocabulary = tokenizer.get_vocab()
    order = torch.arange(len(vocabulary))
    for ours, theirs in FOREIGN.items():
        order[[vocabulary[ours], vocabulary[theirs]]] = torch.tensor([vocabulary[theirs], vocabulary[ours]])
    weights = model.state_dict()
    model.load_state_dict(weights | {name: weights[name][order] for name in ("model.embed_tokens.weight", "lm_head.weight")})
    with store.whole_folder(folder) as part:
        model.save_pretrained(part)
        tokenizer.save_pretrained(part)


def check(configured: Callable[[dict], Config], out: Path, command: str, workers: int, console: Console) -> list[Outcome]:
    """Run every control under ``out`` and write ``controls.json`` and ``controls.md`` there. RunError if one did not hold.

    ``configured`` gives the configuration of the tier with an overlay.
    """
    foreign = out / "teacher-of-another-protocol"
    with store.disk_errors():
        if not foreign.exists():
            write_foreign_teacher(foreign)
    outcomes = []
    for control in controls(str(foreign), configured({}).methods):
        console.print(f"{control.name}: expecting {control.expected}", markup=False, highlight=False)
        board = compare(configured(control.overlay), out / control.name.replace(" ", "-"), command, workers, console)
        held, observed = control.read(board)
        outcomes.append(Outcome(control.name, control.expected, observed, held))
    store.write_json(out / "controls.json", {"schema": "opd-bench/controls/1", "command": command, "controls": list(map(asdict, outcomes))})
    store.write_text(out / "controls.md", markdown(outcomes, command))
    console.print(table(outcomes))
    if failed := [outcome.name for outcome in outcomes if not outcome.held]:
        raise RunError(f"controls that did not come out as expected: {', '.join(failed)}; see {out / 'controls.md'}")
    return outcomes


def rows(outcomes: list[Outcome]) -> list[list[str]]:
    return [[outcome.name, outcome.expected, outcome.observed, "yes" if outcome.held else "NO"] for outcome in outcomes]


COLUMNS = ["control", "expected", "observed", "held"]


def table(outcomes: list[Outcome]) -> Table:
    drawn = Table(*COLUMNS, box=box.SIMPLE_HEAD, pad_edge=False)
    for row in rows(outcomes):
        drawn.add_row(*map(escape, row), style=None if row[-1] == "yes" else "bold")
    return drawn


def markdown(outcomes: list[Outcome], command: str) -> str:
    lines = ["| " + " | ".join(row) + " |" for row in (COLUMNS, [":--"] * len(COLUMNS), *rows(outcomes))]
    return "\n".join(["# Controls", "", "```", command, "```", "", *lines]) + "\n"
