"""Controls: each one's verdict can come out either way, and on the shipped models all come out as expected."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from rich.console import Console
from test_leaderboard import arms_of, divergences, items, run_of

from opd_bench.assemble import assemble
from opd_bench.cli import main
from opd_bench.config import load, size
from opd_bench.embedded import controls
from opd_bench.errors import RunError
from opd_bench.exposure import Recording
from opd_bench.leaderboard import Leaderboard
from opd_bench.models import load_model, load_tokenizer
from opd_bench.records import ArmRecord, Run
from opd_bench.resources import EMBEDDED


def board(rates: dict[str, float], run: Run | None = None, silent: bool = False, **changes) -> Leaderboard:
    arms: list[ArmRecord] = [replace(arm, **changes) for arm in arms_of(rates, 2)]
    if silent:
        arms = [replace(arm, curve=[replace(arm.end, recording=Recording({"forward_kl": divergences(0.0, 0.0)}, {}))]) for arm in arms]
    return assemble(run or run_of(2), arms, draws=20)


def judged(auroc: float) -> Leaderboard:
    return board({"opd_rlaif": 0.5}, judge_auroc=auroc, saw=["judge"])


def held(read, of: Leaderboard) -> bool:
    answer, observed = read(of)
    assert "None" not in observed
    assert "nan" not in observed
    return answer


HEADROOMLESS = replace(run_of(2), teacher=items(0.5))
MUTE_TEACHER = replace(run_of(2), teacher=items(0.0))


@pytest.mark.parametrize(
    ("read", "expected", "other"),
    [
        (controls.teacher_as_student, board({"opd": 0.5}, HEADROOMLESS, silent=True), board({"opd": 0.5}, HEADROOMLESS)),
        (
            controls.teacher_as_student,
            board({"opd": 0.5}, HEADROOMLESS, silent=True),
            board({"opd": 0.6}, HEADROOMLESS, silent=True),
        ),
        (controls.deaf_student, board({"opd": 0.5, "sft": 0.5}), board({"opd": 0.5, "sft": 0.525})),
        (controls.no_headroom, board({"opd": 0.9}, HEADROOMLESS), board({"opd": 0.9})),
        (controls.other_protocol, board({"opd": 0.1, "sft": 0.2}, MUTE_TEACHER), board({"opd": 0.1, "sft": 0.6}, MUTE_TEACHER)),
        (controls.other_protocol, board({"opd": 0.1, "sft": 0.2}, MUTE_TEACHER), board({"opd": 0.1, "sft": 0.2}, HEADROOMLESS)),
        (controls.random_judge, judged(0.5), judged(0.9)),
    ],
)
def test_a_control_holds_on_the_outcome_it_expects_and_fails_on_another(read, expected, other):
    assert held(read, expected)
    assert not held(read, other)


def test_the_foreign_teacher_is_the_teacher_under_swapped_tokens(tmp_path):
    controls.write_foreign_teacher(tmp_path / "foreign")
    teacher, foreign = load_model(str(EMBEDDED / "teacher")), load_model(str(tmp_path / "foreign"))
    vocabulary = load_tokenizer(str(tmp_path / "foreign")).get_vocab()
    order = torch.arange(len(vocabulary))
    for ours, theirs in controls.FOREIGN.items():
        order[[vocabulary[ours], vocabulary[theirs]]] = torch.tensor([vocabulary[theirs], vocabulary[ours]])
    ids = torch.arange(len(vocabulary))[None, :200]
    assert torch.equal(foreign(order[ids]).logits, teacher(ids).logits[..., order])
    assert not torch.equal(order, torch.arange(len(order)))


def test_a_control_that_does_not_hold_fails_the_run_and_is_written_down(tmp_path, monkeypatch):
    monkeypatch.setattr(controls, "compare", lambda *_: board({"opd": 0.9, "opd_rlaif": 0.9}))
    with pytest.raises(RunError, match="deaf student"):
        controls.check(lambda over: load("embedded", [size("controls"), over]), tmp_path, "opd-bench", 1, Console(quiet=True))
    written = {control["name"]: control["held"] for control in json.loads((tmp_path / "controls.json").read_text())["controls"]}
    assert len(written) == 5
    assert not written["deaf student"]
    assert "| deaf student |" in (tmp_path / "controls.md").read_text()


@pytest.mark.parametrize(
    "more", [["--quick"], ["--smoke"], ["--methods", "opd"], ["--dry-run"]], ids=lambda more: more[0].removeprefix("--")
)
def test_controls_refuse_what_they_would_ignore(more, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["opd-bench", "compare", "--controls", *more])
    with pytest.raises(SystemExit) as leaving:
        main()
    assert leaving.value.code == 2
    assert capsys.readouterr().err.startswith("error: ")


@pytest.mark.slow
def test_all_controls_hold_on_the_shipped_models(tmp_path):
    call = [Path(sys.executable).parent / "opd-bench", "compare", "--controls", "--out", tmp_path / "run"]
    done = subprocess.run(call, cwd=tmp_path, capture_output=True, text=True, timeout=1800)
    assert (done.returncode, done.stderr) == (0, "")
    outcomes = json.loads((tmp_path / "run/controls.json").read_text())["controls"]
    assert [outcome["held"] for outcome in outcomes] == [True] * 5
