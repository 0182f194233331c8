"""What the procedural tasks share: splits by identity, distinct problems, and steps that carry a value on."""

import random
from collections import Counter
from dataclasses import dataclass
from itertools import islice

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from opd_bench.procedural import LIMIT, Step, Stepwise, apply, data_sets, distinct, split_of
from opd_bench.resources import task_module

STEPWISE = ("arithmetic", "equations", "trace")
SPLITS = ("train", "validation", "test")
fixed = settings(derandomize=True, database=None, deadline=None)


@dataclass(frozen=True)
class Number:
    """The simplest problem there is."""

    value: int

    @property
    def identity(self) -> str:
        return str(self.value)

    prompt = solution = identity


@dataclass(frozen=True)
class Doubling(Stepwise):
    """Twice ``start``, ``length`` times over."""

    start: int
    length: int

    def step(self, position: int, value: int) -> Step:
        return Step(f"{position}: ", value, "*", 2)


def numbers(split: str, seed: int, below: int = 1000):
    return distinct(lambda rng: Number(rng.randrange(below)), "numbers", split, seed)


def drawn(name: str, seed: int) -> Stepwise:
    return task_module(name).draw(random.Random(seed))


def test_a_sixteenth_is_for_testing_and_another_for_validation():
    counts = Counter(split_of(f"problem {number}") for number in range(32_000))
    assert set(counts) == set(SPLITS)
    assert counts["test"] == pytest.approx(2000, abs=150)
    assert counts["validation"] == pytest.approx(2000, abs=150)


@pytest.mark.parametrize("split", SPLITS)
def test_the_split_follows_from_the_identity_alone(split):
    for seed in range(5):
        assert all(split_of(problem.identity) == split for problem in islice(numbers(split, seed), 20))
    assert {split_of(Number(value).identity) for value in range(1000)} == set(SPLITS)


def test_the_split_of_an_identity_never_changes():
    assert [split_of(identity) for identity in ("0", "16", "61", "12+34-5")] == ["train", "validation", "test", "train"]


@pytest.mark.parametrize("split", SPLITS)
def test_every_problem_of_a_split_is_drawn_once(split):
    everything = {value for value in range(1000) if split_of(str(value)) == split}
    drawn = [problem.value for problem in islice(numbers(split, 3), len(everything))]
    assert len(drawn) == len(everything)
    assert set(drawn) == everything


def test_the_same_seed_draws_the_same_problems_and_another_seed_others():
    first, again, other = (list(islice(numbers("train", seed, 10**9), 50)) for seed in (1, 1, 2))
    assert first == again
    assert set(first).isdisjoint(other)


def test_a_data_set_has_a_row_of_the_asked_columns_for_every_problem():
    seeds, sizes = dict.fromkeys(SPLITS, 4), {"train": 30, "validation": 5, "test": 6}
    sets = data_sets(numbers, lambda problem, split: {"twice": 2 * problem.value, "split": split}, seeds, sizes)
    assert {split: len(sets[split]) for split in sets} == sizes
    for split in SPLITS:
        assert [row["identity"] for row in sets[split]] == [problem.identity for problem in islice(numbers(split, 4), sizes[split])]
        for row in sets[split]:
            assert row == dict.fromkeys(("identity", "prompt", "solution"), row["identity"]) | {
                "twice": 2 * int(row["identity"]),
                "split": split,
            }


@fixed
@given(st.text("ix=:()", max_size=6), st.integers(0, LIMIT), st.sampled_from(["+", "-", "*", "/", "//"]), st.integers(1, LIMIT))
def test_a_step_is_its_calculation_with_the_result_written_twice(before, left, operator, right):
    step = Step(before, left, operator, right)
    assert step.result == eval(f"{left}{'//' if operator == '/' else operator}{right}")
    assert step.calculation == f"{before}{left}{operator}{right}"
    assert str(step) == f"{step.calculation}={step.result}={step.result}"


def test_a_problem_is_solved_by_carrying_each_result_to_the_next_step():
    problem = Doubling(3, 3)
    assert [step.left for step in problem.steps] == [3, 6, 12]
    assert problem.answer == 24
    assert problem.solution == "0: 3*2=6=6\n1: 6*2=12=12\n2: 12*2=24=24\n#24"


@pytest.mark.parametrize("name", STEPWISE)
@fixed
@given(seed=st.integers(0, 10**6))
def test_the_steps_of_every_task_carry_their_values(name, seed):
    problem = drawn(name, seed)
    steps = problem.steps
    assert len(steps) == problem.length
    assert [step.left for step in steps] == [problem.start, *(step.result for step in steps[:-1])]
    assert steps == [problem.step(position, step.left) for position, step in enumerate(steps)]
    assert problem.answer == steps[-1].result
    assert problem.solution == "\n".join([*map(str, steps), f"#{steps[-1].result}"])


@pytest.mark.parametrize("name", ["arithmetic", "equations"])
@fixed
@given(seed=st.integers(0, 10**6), wrong=st.integers(0, LIMIT))
def test_a_step_from_a_wrong_value_does_the_same_to_that_value(name, seed, wrong):
    problem = drawn(name, seed)
    for position, step in enumerate(problem.steps):
        assume(wrong != step.left)
        other = problem.step(position, wrong)
        assert other == Step(step.before, wrong, step.operator, step.right)
        assert other.result == apply(wrong, step.operator, step.right)
        assert other.calculation != step.calculation
        if step.operator in "+-":
            assert other.result - step.result == wrong - step.left
        if step.operator == "*":
            assert other.result - step.result == (wrong - step.left) * step.right


@fixed
@given(seed=st.integers(0, 10**6), wrong=st.integers(0, LIMIT))
def test_a_traced_step_from_a_wrong_value_is_what_python_does_to_that_value(seed, wrong):
    problem = drawn("trace", seed)
    body = [line.strip() for line in problem.prompt.split("\n")[2:-2]]
    for position in range(problem.length):
        state = {"a": wrong, "i": position}
        exec("\n".join(body), state)
        step = problem.step(position, wrong)
        assert (step.before, step.left, step.result) == (f"i={position}:", wrong, state["a"])
