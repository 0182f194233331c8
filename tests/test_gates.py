"""Each gate holds where it should, trips on its scenario, and withholds the ranks of those it concerns."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
from test_leaderboard import arms_of, divergences, items, run_of

from opd_bench import gates
from opd_bench.exposure import Divergences, Recording
from opd_bench.gates import Gate, Limits
from opd_bench.records import ArmRecord, Run


def agreeing(share: float) -> Recording:
    """A cold start that names ``share`` of the teacher's likeliest tokens on its own text, and other shares on the teacher's."""
    return Recording({"forward_kl": divergences(0.3, 0.2), "support": divergences(share, 0.5)}, {})


OPEN = Limits(overlap=None, truncation=None, support=None, judge=None)


def ended(length: int, cut: int) -> Divergences:
    """Rollouts of both models, of which ``cut`` of 20 reach ``length`` and the others end before."""
    alive_NT = np.arange(length) < np.where(np.arange(20) < cut, length, length - 1)[:, None]
    return Divergences(np.zeros((20, length)), alive_NT, np.zeros((20, length)), alive_NT)


def sound() -> tuple[Run, dict[str, list[ArmRecord]]]:
    run = replace(run_of(2), cold_starts_recordings=[agreeing(0.8)])
    arms = [
        replace(arm, curve=[replace(arm.end, recording=Recording({"forward_kl": ended(5, 0)}, {}))])
        for arm in arms_of({"opd": 0.7, "opd_rlaif": 0.6}, 2)
    ]
    arms = [replace(arm, saw=["judge"], judge_auroc=0.9) if arm.method == "opd_rlaif" else arm for arm in arms]
    return run, {name: [arm for arm in arms if arm.method == name] for name in ("opd", "opd_rlaif")}


def one(found: list[Gate], name: str) -> Gate:
    (gate,) = [gate for gate in found if gate.name == name]
    return gate


def weak_teacher(run: Run, arms: dict) -> Run:
    return replace(run, teacher=items(0.5))


def mute_teacher(run: Run, arms: dict) -> Run:
    return replace(run, teacher=items(0.0))


def strangers(run: Run, arms: dict) -> Run:
    return replace(run, cold_starts_recordings=[agreeing(0.1)])


def leak(run: Run, arms: dict) -> Run:
    return replace(run, overlap={**run.overlap, "trace": 0.004})


def cut_short(run: Run, arms: dict) -> Run:
    arms["opd"] = [replace(arm, curve=[replace(arm.end, recording=Recording({"forward_kl": ended(5, 3)}, {}))]) for arm in arms["opd"]]
    return run


def idle(run: Run, arms: dict) -> Run:
    arms["opd"][1] = replace(arms["opd"][1], share_spent=0.97)
    return run


def by_lot(run: Run, arms: dict) -> Run:
    arms["opd_rlaif"] = [replace(arm, judge_auroc=0.52) for arm in arms["opd_rlaif"]]
    return run


SCENARIOS: list[tuple[Callable[[Run, dict], Run], str, tuple[str, ...]]] = [
    (weak_teacher, "headroom", ("opd", "opd_rlaif")),
    (mute_teacher, "headroom", ("opd", "opd_rlaif")),
    (strangers, "support", ("opd", "opd_rlaif")),
    (cut_short, "truncation", ("opd", "opd_rlaif")),
    (leak, "overlap", ("opd", "opd_rlaif")),
    (idle, "budget", ("opd",)),
    (by_lot, "judge", ("opd_rlaif",)),
]


def test_all_gates_hold_on_a_sound_comparison():
    found = gates.check(*sound(), Limits())
    assert [gate.name for gate in found] == ["headroom", "support", "truncation", "overlap", "budget", "judge"]
    assert all(gate.held for gate in found)


@pytest.mark.parametrize(("spoil", "name", "methods"), SCENARIOS, ids=[spoil.__name__ for spoil, _, _ in SCENARIOS])
def test_a_scenario_trips_its_gate_and_no_other_and_the_gate_says_what_to_do(spoil, name: str, methods: tuple[str, ...]):
    run, arms = sound()
    run = spoil(run, arms)
    found = gates.check(run, arms, Limits())
    assert [gate.name for gate in found if gate.held is not True] == [name]
    gate = one(found, name)
    assert gate.held is False
    assert gate.methods == methods
    assert ": " in gate.said
    assert gate.said.endswith(".")


@pytest.mark.parametrize("name", ["overlap", "truncation", "support", "judge"])
def test_a_gate_that_was_switched_off_is_neither_held_nor_failed_and_says_so(name: str):
    run, arms = sound()
    for spoil, _, _ in SCENARIOS[2:]:
        run = spoil(run, arms)
    gate = one(gates.check(run, arms, OPEN), name)
    assert (gate.held, gate.said) == (None, "switched off.")


def test_what_was_not_measured_is_not_said_to_hold():
    run, arms = sound()
    run = replace(run, cold_starts_recordings=[Recording({"forward_kl": divergences(0.3, 0.2)}, {})])
    arms["opd_rlaif"] = [replace(arm, judge_auroc=None) for arm in arms["opd_rlaif"]]
    found = gates.check(run, arms, Limits())
    assert [gate.name for gate in found if gate.held is None] == ["support", "judge"]


def test_an_arm_may_leave_one_unit_where_that_is_more_than_a_per_cent_and_it_is_said():
    run, arms = sound()
    arms["opd"] = [replace(arm, share_spent=0.97, unit_share=0.04) for arm in arms["opd"]]
    gate = one(gates.check(run, arms, Limits()), "budget")
    assert gate.held
    assert "97.0%" in gate.said
    assert "may come to 4.0%" in gate.said


def test_the_limits_are_those_of_the_configuration():
    run, arms = sound()
    run = strangers(leak(run, arms), arms)
    found = gates.check(by_lot(cut_short(run, arms), arms), arms, Limits(overlap=0.01, truncation=0.5, support=0.05, judge=0.5))
    assert all(gate.held for gate in found)
