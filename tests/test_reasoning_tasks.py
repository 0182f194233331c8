"""The reasoning-gym tasks of the smol tier: their splits never meet, their worked solutions are true, line by line, and score."""

import datetime
import doctest
import hashlib
import json
import math
import re
from fractions import Fraction
from itertools import islice, pairwise

import pytest

from opd_bench.evaluate import load_suite
from opd_bench.resources import TASKS, task_module

KINDS = ("chain_sum", "simple_equations", "gcd", "base_conversion", "calendar_arithmetic")
GSM = "opd_bench_gsm_symbolic"
MOST = 128  # tokens of a response
TEST_SET = {
    "chain_sum": "fd9f8036960c1fd85d203657e8c48e4721b6c9e522ee71408fe560ec67c36a36",
    "simple_equations": "e01de69bf1d13a2a60ce0fdd84f8a4c860c1397b91fb22ea1dd6c4584aba4242",
    "gcd": "eb6d126718a1eb1cc50d044f4e7cf65e6ccb578de84f13d08588be4d2a7ced96",
    "base_conversion": "aef3a61be5b74a7641088ccbcb9190487f2b6f711fae9d8491f13782718a0bb4",
    "calendar_arithmetic": "c9ecda324a054e7047177881b56732e0b1db6d4ca79e02dcb315a413cd8d9408",
    "gsm_symbolic": "92ef890791ad7ebfbb185fd5a02d6d41ebaeed7da1eb76f34df42ebbf486488c",
}
reasoning = task_module("reasoning")


@pytest.fixture(scope="module")
def suite():
    return load_suite(["opd_bench_reasoning"], ["opd_bench_write_function"], TASKS, held_out=[GSM])


def rows_of(suite, kind):
    return list(suite.tasks[f"opd_bench_{kind}"].test_docs())


def test_the_groups_are_those_of_the_tier(suite):
    assert suite.groups == {
        **{f"opd_bench_{kind}": "stem" for kind in KINDS},
        "opd_bench_write_function": "coding",
        GSM: "held_out",
    }
    assert list(suite.scored) == [name for name in suite.groups if name != GSM]


def test_what_is_held_out_is_neither_trained_on_nor_recorded(suite):
    assert GSM not in {task for task, _ in suite.docs("train")} | {task for task, _ in suite.first_docs(1)}
    assert GSM not in load_suite(["opd_bench_gcd"], [], TASKS, "validation", held_out=[GSM]).tasks


@pytest.mark.parametrize("kind", KINDS)
def test_splits_share_no_problem(suite, kind):
    task = suite.tasks[f"opd_bench_{kind}"]
    splits = {"train": task.training_docs(), "validation": task.validation_docs(), "test": task.test_docs()}
    for column in ("identity", "prompt"):
        seen = [value for rows in splits.values() for value in rows[column]]
        assert len(seen) == len(set(seen))
    assert {split: len(rows) for split, rows in splits.items()} == reasoning.SIZES


@pytest.mark.parametrize("kind", TEST_SET)
def test_the_test_set_never_changes(suite, kind):
    assert hashlib.sha256(json.dumps(rows_of(suite, kind), sort_keys=True).encode()).hexdigest() == TEST_SET[kind]


def test_the_example_of_the_docstring_is_what_the_generator_writes():
    failed, tried = doctest.testmod(reasoning)
    assert failed == 0
    assert tried == 2


def equal(line):
    """Whether all sides of a written line of arithmetic are equal."""
    sides = [Fraction(eval(side)) for side in line.split(" = ")]
    return len(set(sides)) == 1


def test_every_sum_is_right_term_by_term(suite):
    for row in rows_of(suite, "chain_sum"):
        *steps, last = row["solution"].split("\n")
        expression = re.search(r": (.*) =\n", row["prompt"])[1]
        assert eval(expression) == int(row["answer"])
        assert last == f"Answer: {row['answer']}"
        assert all(map(equal, steps))
        assert re.findall(r"[+-] \d+", expression) == [re.search(r"[+-] \d+(?= =)", step)[0] for step in steps]
        assert len(steps) == row["steps"]


def test_every_answer_satisfies_its_equation_and_every_line_on_the_way(suite):
    for row in rows_of(suite, "simple_equations"):
        name = re.search(r"[a-z](?= *[=+-])|(?<=\*)[a-z]", row["identity"])[0]
        x = {name: int(row["answer"])}
        *steps, _ = row["solution"].split("\n")
        for line in [row["identity"], *steps]:
            sides = [Fraction(eval(side, {}, x)) for side in line.split(" = ")]
            assert len(set(sides)) == 1, line
        assert steps[-1].endswith(f" = {row['answer']}")


def test_every_greatest_common_divisor_is_reached_by_division_with_remainder(suite):
    for row in rows_of(suite, "gcd"):
        *steps, _ = row["solution"].split("\n")
        numbers = [list(map(int, re.findall(r"\d+", step))) for step in steps]
        assert all(large == times * small + rest and 0 <= rest < small for large, times, small, rest in numbers)
        assert all([small, rest] == following[::2] for (_, _, small, rest), following in pairwise(numbers))
        assert sorted(json.loads(row["identity"])) == numbers[0][::2][::-1]
        assert int(row["answer"]) == math.gcd(*json.loads(row["identity"])) == numbers[-1][2]
        assert numbers[-1][3] == 0


def test_every_number_in_another_base_is_the_same_number(suite):
    for row in rows_of(suite, "base_conversion"):
        value, base = json.loads(row["identity"])
        *steps, _ = row["solution"].split("\n")
        assert int(row["answer"], base) == value
        assert f"base-10 number {value} to base-{base}" in row["prompt"]
        assert all(map(equal, steps))
        assert "".join(step.rsplit(" ", 1)[1] for step in reversed(steps)) == row["answer"]


def test_every_weekday_is_that_of_the_calendar(suite):
    for row in rows_of(suite, "calendar_arithmetic"):
        start, offset = re.fullmatch(r"\['(.*)', (-?\d+)\]", row["identity"]).groups()
        day = datetime.date.fromisoformat(start) + datetime.timedelta(days=int(offset))
        assert f"{day:%A}" == row["answer"]
        division, walk, _ = row["solution"].split("\n")
        assert equal(division)
        assert walk.endswith(row["answer"])


@pytest.mark.parametrize("kind", KINDS)
def test_the_worked_solution_scores_and_another_answer_does_not(suite, kind):
    name, rows = f"opd_bench_{kind}", rows_of(suite, kind)
    assert suite.score(name, rows, [row["solution"] for row in rows]) == [1.0] * len(rows)
    assert suite.score(name, rows, [f"Answer: {row['answer']}" for row in rows]) == [1.0] * len(rows)
    assert suite.score(name, rows, [f"{row['solution']}0" for row in rows]) == [0.0] * len(rows)
    assert suite.score(name, rows, [row["answer"] for row in rows]) == [0.0] * len(rows)
    assert suite.score(name, rows, [""] * len(rows)) == [0.0] * len(rows)


def test_word_problems_are_distinct_and_have_numbers_for_answers(suite):
    rows = rows_of(suite, "gsm_symbolic")
    assert len({row["prompt"] for row in rows}) == reasoning.SIZES["test"]
    assert all(float(row["answer"]) == float(row["answer"]) for row in rows)
    assert not any("Give the result" in row["prompt"] for row in rows)


def test_a_function_is_asked_for_in_words_and_scored_as_ever(suite):
    name = "opd_bench_write_function"
    rows = list(islice(suite.tasks[name].test_docs(), 10))
    assert suite.text(name, rows[0]).startswith("Write a Python function f(a): ")
    assert suite.text(name, rows[0]).endswith("\nReply with the code alone.")
    assert suite.score(name, rows, [row["solution"] for row in rows]) == [1.0] * len(rows)
    assert suite.score(name, rows, ["def f(a):\n    return None"] * len(rows)) == [0.0] * len(rows)


@pytest.mark.parametrize("kind", KINDS)
def test_new_training_problems_never_meet_the_test_set(suite, kind):
    drawn = {problem.identity for problem in islice(reasoning.problems(kind, "train", 2024), 500)}
    assert drawn.isdisjoint(row["identity"] for row in rows_of(suite, kind))
    assert len(drawn) == 500
