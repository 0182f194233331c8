"""Runs read by other ledgers: known answers on curves made for it, and what no curve may break."""

from __future__ import annotations

import ast
import random
from collections.abc import Mapping
from dataclasses import replace

import pytest

from opd_bench import ledger
from opd_bench.errors import UserError
from opd_bench.readings import (
    BENCH,
    DATA_CHARGED,
    KINDS,
    LEDGERS,
    START,
    Basis,
    Point,
    Reading,
    Spent,
    compare_costs,
    cost,
    readable,
    readings,
)
from opd_bench.resources import PACKAGE

BY_NAME = {each.name: each for each in LEDGERS}
WRITTEN, DENSE = {"student_update": 1, "teacher_generate": 3}, {"student_sample": 1, "student_update": 1, "teacher_score": 2}  # of 4


def spent(kinds: Mapping[str, float], times: float = 1, start: tuple[float, float] | None = None) -> Spent:
    flops = {kind: times * amount for kind, amount in kinds.items()}
    return {"flops": flops if start is None else {**flops, **dict(zip(START, start, strict=True))}}


def curve(kinds: Mapping[str, float], *scores: float, start: tuple[float, float] | None = None) -> list[Point]:
    """A curve of equal steps from nothing at all."""
    return [Point(spent(kinds, times, start), score) for times, score in enumerate(scores)]


def read(curves: dict[str, list[list[Point]]], **options) -> dict[str, Reading]:
    return {reading.ledger.name: reading for reading in readings(curves, **options)}


# ---- ledgers and costs ------------------------------------------------------------------------------------------------------------


def test_the_kinds_are_those_the_bench_charges():
    calls = [node for node in ast.walk(ast.parse((PACKAGE / "bench.py").read_text(encoding="utf-8"))) if isinstance(node, ast.Call)]
    reserved = [call.args[0] for call in calls if isinstance(call.func, ast.Attribute) and call.func.attr == "reserve"]
    constant = {kind.value for kind in reserved if isinstance(kind, ast.Constant)}
    assert constant | {"judge"} == set(BENCH) >= set(ledger.SAW) - {ledger.VERIFIER}  # the judge says its own kind
    assert cost({"flops": {ledger.VERIFIER: 0}}, DATA_CHARGED) == 0


def test_each_ledger_charges_its_kinds():
    everything = {"flops": {kind: 10.0**place for place, kind in enumerate(KINDS)}, "seconds": {"student_update": 5.0, "judge": 0.5}}
    assert {name: cost(everything, each) for name, each in BY_NAME.items()} == {
        "data charged": 11_111,
        "data free": 11_011,
        "teacher scoring free": 10_011,
        "from scratch, data free": 111_011,
        "from scratch, data charged": 1_111_111,
        "wall clock": 5.5,
    }


def test_integers_stay_exact():
    huge = {"flops": {"student_update": 10**25, "judge": 1}}
    assert cost(huge, DATA_CHARGED) == 10**25 + 1


def test_a_kind_no_ledger_knows_is_refused():
    with pytest.raises(UserError, match=r"'teacher_scor' \(did you mean 'teacher_score'\?\)"):
        cost({"flops": {"teacher_scor": 1}}, DATA_CHARGED)


def test_a_ledger_needs_its_unit_and_the_cold_start_where_it_is_charged():
    plain, begun = spent(WRITTEN), spent(WRITTEN, start=(1, 1))
    flops = ["data charged", "data free", "teacher scoring free"]
    assert [each.name for each in readable([plain, begun])] == flops
    assert [each.name for each in readable([begun])] == [*flops, "from scratch, data free", "from scratch, data charged"]
    assert [each.name for each in readable([{**plain, "seconds": {}}])] == [*flops, "wall clock"]


def test_costs_are_times_the_cheapest():
    found = {costs.ledger.name: costs for costs in compare_costs({"dense": spent(DENSE, 3), "written": spent(WRITTEN, 6)})}
    assert found["data charged"].cost == {"dense": 12, "written": 24}
    assert found["data charged"].ratio == {"dense": 1, "written": 2}
    assert found["data free"].ratio == {"dense": 2, "written": 1}
    assert found["teacher scoring free"].ratio == {"dense": 1, "written": 1}


def test_where_an_arm_costs_nothing_there_is_no_ratio():
    found = {costs.ledger.name: costs for costs in compare_costs({"writer": spent({"teacher_generate": 3}), "dense": spent(DENSE)})}
    assert found["data free"].cost == {"writer": 0, "dense": 4}
    assert found["data free"].ratio == {"writer": None, "dense": None}
    assert found["data charged"].ratio == {"writer": 1, "dense": pytest.approx(4 / 3)}


# ---- readings ---------------------------------------------------------------------------------------------------------------------


def test_a_reading_is_taken_at_the_largest_cost_all_arms_reached():
    found = read({"written": [curve(WRITTEN, 0.0, 0.5, 0.6)], "dense": [curve(DENSE, 0.0, 0.2, 0.8)]})
    assert {name: reading.cost for name, reading in found.items()} == {"data charged": 8, "data free": 2, "teacher scoring free": 2}
    assert found["data charged"].score == {"written": 0.6, "dense": 0.8}
    assert found["data charged"].order == ["dense", "written"]
    # without its data the written curve ends at a cost of 2, and dense is half-way to its first point there
    assert found["data free"].score == {"written": 0.6, "dense": pytest.approx(0.1)}
    assert found["data free"].order == ["written", "dense"]
    assert found["data free"].turned == [("dense", "written")]
    assert found["teacher scoring free"].score == {"written": 0.6, "dense": 0.2}  # at 1 of its 2 steps


def test_every_seed_is_read_on_its_own_curve_and_the_slowest_bounds_all():
    quick, slow = curve(WRITTEN, 0.0, 0.4, 1.0), curve(WRITTEN, 0.0, 0.2)
    reading = read({"written": [quick, slow], "dense": [curve(DENSE, 0.1, 0.5, 0.7), curve(DENSE, 0.1, 0.5)]})["data charged"]
    assert reading.cost == 4
    assert reading.score_by_seed == {"written": [0.4, 0.2], "dense": [0.5, 0.5]}
    assert reading.score == {"written": pytest.approx(0.3), "dense": 0.5}


def test_the_binding_ledger_comes_first_and_is_what_others_are_compared_with():
    curves = {"written": [curve(WRITTEN, 0.0, 0.5, 0.6)], "dense": [curve(DENSE, 0.0, 0.2, 0.8)]}
    found = read(curves, binding=BY_NAME["data free"])
    assert [*found] == ["data free", "data charged", "teacher scoring free"]
    assert found["data free"].turned == []
    assert found["data charged"].turned == [("written", "dense")]


def test_any_set_of_kinds_in_any_unit_can_bind():
    sampled = Basis("student tokens", ("student_sample", "student_update"), "what if the student's tokens are what counts?", "tokens")
    tokens = [replace(point, spent={**point.spent, "tokens": {"student_update": at}}) for at, point in enumerate(curve(DENSE, 0.1, 0.3))]
    first, *others = readings({"dense": [tokens]}, binding=sampled)
    assert (first.ledger, first.cost, first.score) == (sampled, 1, {"dense": 0.3})
    assert len(others) == 3


def test_a_tie_is_not_a_turn():
    found = read({"written": [curve(WRITTEN, 0.0, 0.5, 0.5)], "dense": [curve(DENSE, 0.5, 0.5, 0.5)]})
    assert found["data charged"].turned == found["data free"].turned == []
    assert found["data free"].order == ["written", "dense"]  # as given


@pytest.mark.parametrize("seed", range(20))
def test_a_shared_cold_start_changes_ratios_and_no_order(seed):
    draw = random.Random(seed)
    curves = {
        name: [curve({kind: draw.uniform(1, 5) for kind in BENCH}, *(draw.random() for _ in range(4)), start=(7, 11)) for _ in range(3)]
        for name in ("first", "second", "third")
    }
    found = read(curves)
    for bare, begun, start in (("data free", "from scratch, data free", 7), ("data charged", "from scratch, data charged", 18)):
        assert found[begun].cost == pytest.approx((found[bare].cost or 0) + start)
        assert found[begun].score == pytest.approx(found[bare].score)
        assert found[begun].order == found[bare].order
        assert found[begun].turned == found[bare].turned
    arms = {name: seeds[0][-1].spent for name, seeds in curves.items()}
    largest = {costs.ledger.name: max(ratio or 0 for ratio in costs.ratio.values()) for costs in compare_costs(arms)}
    assert 1 < largest["from scratch, data charged"] < largest["data charged"]


@pytest.mark.parametrize("seed", range(20))
def test_arms_that_pay_in_equal_parts_read_the_same_in_every_ledger(seed):
    draw = random.Random(seed)
    shares = {kind: draw.uniform(1, 5) for kind in BENCH}
    curves = {name: [curve(shares, *(draw.random() for _ in range(draw.randint(2, 5))))] for name in ("first", "second")}
    first, *others = readings(curves)
    for reading in others:
        assert reading.score == pytest.approx(first.score)
        assert reading.turned == []


def test_the_order_of_points_in_a_curve_does_not_matter_unless_costs_are_equal():
    points = curve(DENSE, 0.1, 0.4, 0.7, 0.9)
    shorter = [curve(DENSE, 0.0, 0.5, 0.6)]
    assert readings({"dense": [points], "other": shorter}) == readings({"dense": [points[::-1]], "other": shorter})
    again = [*points, Point(points[2].spent, 0.8)]
    assert read({"dense": [again], "other": shorter})["data charged"].score["dense"] == 0.8


# ---- where there is nothing to read -----------------------------------------------------------------------------------------------


def test_where_an_arm_costs_nothing_no_cost_can_be_matched():
    found = read({"writer": [curve({"teacher_generate": 1}, 0.1, 0.9)], "dense": [curve(DENSE, 0.1, 0.5)]})
    assert found["data charged"].order == ["writer", "dense"]
    assert found["data free"] == Reading(
        BY_NAME["data free"], None, {"writer": None, "dense": None}, {"writer": [None], "dense": [None]}, [], []
    )


def test_a_curve_of_one_point_is_read_at_its_own_cost_alone():
    found = read({"written": [curve(WRITTEN, 0.0, 0.5)[1:]], "dense": [curve(DENSE, 0.0, 0.6)[1:]]})
    assert found["data charged"].score == {"written": 0.5, "dense": 0.6}
    assert found["data free"].cost == 1
    assert found["data free"].score == {"written": 0.5, "dense": None}  # it cost 4, and nobody knows what it was before
    assert found["data free"].order == ["written"]


@pytest.mark.parametrize(("short", "score"), [(0.995, 0.6), (0.985, None)])
def test_an_arm_within_a_percent_of_the_cost_counts_as_matched(short, score):
    found = read({"written": [[Point(spent(WRITTEN, short), 0.5)]], "dense": [[Point(spent(DENSE), 0.6)]]})
    assert found["data charged"].score == {"written": 0.5, "dense": score}


def test_a_method_has_a_score_only_if_each_of_its_seeds_has():
    late = curve(DENSE, 0.0, 0.1, 0.2)[2:]
    reading = read({"dense": [curve(DENSE, 0.0, 0.3, 0.4), late], "written": [curve(WRITTEN, 0.0, 0.5)] * 2})["data charged"]
    assert reading.score_by_seed["dense"] == [0.3, None]
    assert reading.score == {"dense": None, "written": 0.5}


@pytest.mark.parametrize(
    ("curves", "options", "said"),
    [
        ({}, {}, "no learning curves"),
        ({"dense": []}, {}, "no learning curves"),
        ({"dense": [[]]}, {}, "no points"),
        ({"dense": [curve(DENSE, 0.1, 0.2)]}, {"binding": BY_NAME["wall clock"]}, "'wall clock'.*seconds"),
        ({"dense": [curve(DENSE, 0.1, 0.2)]}, {"binding": BY_NAME["from scratch, data free"]}, "from scratch"),
    ],
)
def test_curves_that_cannot_be_read_are_refused(curves, options, said):
    with pytest.raises(UserError, match=said):
        readings(curves, **options)
