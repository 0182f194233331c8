"""The lm-eval tasks we ship: they load, their splits never meet, their solutions are true, and their scores tell right from wrong."""

import doctest
import hashlib
import json
import re
from contextlib import redirect_stdout
from fractions import Fraction
from io import StringIO
from itertools import islice

import pytest
from lm_eval import evaluator
from lm_eval.api.model import LM

from opd_bench.embedded.corpus import tokenizer_texts
from opd_bench.embedded.tokenizer import train_tokenizer
from opd_bench.evaluate import load_suite
from opd_bench.resources import TASKS, task_module

TEST_SET = {
    "opd_bench_arithmetic": "cbd4e0a0f53b25105512fb80765c3a0c8ca97b0f72dda00eeeae0819b4ee244d",
    "opd_bench_equations": "cdaca5064f2c4879ff6085232ac63046363940e50f79d1dc1be7d1aab45801c2",
    "opd_bench_functions": "1a646f99a1de309d363825a29420ee61d7ab3095157c5afbe5bf919f1eb3b5bd",
    "opd_bench_trace": "cec2cf0561c6ce002340f7c475f8a40b1d06ef2fef4a479ca90a3ed155014028",
}
STEPWISE = ("opd_bench_arithmetic", "opd_bench_equations", "opd_bench_trace")


@pytest.fixture(scope="module")
def suite():
    return load_suite(["opd_bench_stem"], ["opd_bench_coding"], TASKS)


class Answering(LM):
    """A model that answers each prompt from a table."""

    def __init__(self, answers):
        super().__init__()
        self.answers = answers

    def generate_until(self, requests, disable_tqdm=True):
        return [self.answers[request.args[0]] for request in requests]

    def loglikelihood(self, requests, disable_tqdm=True):
        raise NotImplementedError

    loglikelihood_rolling = loglikelihood


def score(suite, name, answer, limit=None):
    """The score of each test item (the first ``limit``) when ``answer(row)`` is the response."""
    task = suite.tasks[name]
    answers = {row["prompt"]: answer(row) for row in task.test_docs()}
    model = Answering(answers)
    results = evaluator.evaluate(model, {"tasks": {name: task}}, limit=limit, bootstrap_iters=0, confirm_run_unsafe_code=True)
    (metric,) = task.aggregation()
    return [row[metric] for row in results["samples"][name]]


def folder(name):
    return name.removeprefix("opd_bench_")


def generator(name):
    return task_module(folder(name))


def splits(suite, name):
    task = suite.tasks[name]
    return {"train": task.training_docs(), "validation": task.validation_docs(), "test": task.test_docs()}


def printed(program):
    """What Python prints when it runs ``program``."""
    with redirect_stdout(StringIO()) as output:
        exec(program, {})
    return output.getvalue()


def test_every_yaml_file_is_a_task_or_group_that_loads(suite):
    from lm_eval.tasks import TaskManager

    manager = TaskManager(include_path=str(TASKS), include_defaults=False)
    files = {path.resolve() for path in TASKS.glob("**/[!_]*.yaml")}
    assert {entry.yaml_path.resolve() for entry in manager.task_index.values()} == files
    others = load_suite(["opd_bench_reasoning"], ["opd_bench_write_function"], TASKS, held_out=["opd_bench_gsm_symbolic"])
    assert sorted([*suite.tasks, *others.tasks]) == sorted(manager.all_subtasks)
    assert sorted(suite.tasks) == sorted(TEST_SET)
    assert suite.groups == {
        "opd_bench_arithmetic": "stem",
        "opd_bench_equations": "stem",
        "opd_bench_functions": "coding",
        "opd_bench_trace": "coding",
    }


@pytest.mark.parametrize("name", TEST_SET)
def test_splits_share_no_problem(suite, name):
    rows = splits(suite, name)
    for column in ("identity", "prompt"):
        seen = [value for split in rows.values() for value in split[column]]
        assert len(seen) == len(set(seen))
    assert {split: len(rows[split]) for split in rows} == generator(name).SIZES == {"train": 12_000, "validation": 250, "test": 250}


@pytest.mark.parametrize("name", TEST_SET)
def test_the_generator_draws_endless_training_problems_that_never_meet_the_test_set(suite, name):
    rows, size = splits(suite, name), generator(name).SIZES["train"]
    drawn = list(islice(generator(name).problems("train", 2024), size + 500))
    identities, prompts = {problem.identity for problem in drawn}, {problem.prompt for problem in drawn}
    assert len(identities) == len(prompts) == len(drawn)
    for split in ("validation", "test"):
        assert identities.isdisjoint(rows[split]["identity"])
        assert prompts.isdisjoint(rows[split]["prompt"])
    assert len(identities - set(rows["train"]["identity"])) > 0.5 * len(drawn)


@pytest.mark.parametrize("name", TEST_SET)
def test_the_test_set_never_changes(suite, name):
    rows = json.dumps(list(suite.tasks[name].test_docs()), sort_keys=True)
    assert hashlib.sha256(rows.encode()).hexdigest() == TEST_SET[name]


@pytest.mark.parametrize("name", TEST_SET)
def test_version_and_test_set_are_quoted_in_the_readme(suite, name):
    readme, version = (TASKS / folder(name) / "README.md").read_text(encoding="utf-8"), generator(name).VERSION
    assert str(suite.tasks[name].VERSION) == version
    assert f"**Generator version**: {version}.\n" in readme
    assert f"SHA-256 `{TEST_SET[name]}`" in readme
    assert f"at most {suite.tasks[name].config.generation_kwargs['max_gen_toks']} tokens" in readme


@pytest.mark.parametrize("name", TEST_SET)
def test_the_example_in_docstring_and_readme_is_what_the_generator_writes(name):
    assert doctest.testmod(generator(name)) == (0, 2)
    written = doctest.DocTestParser().get_examples(generator(name).__doc__)[-1].want
    assert f"```\n{written}```\n" in (TASKS / folder(name) / "README.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("name", TEST_SET)
def test_every_problem_takes_the_steps_its_document_says_and_the_test_set_has_all_lengths(suite, name):
    around = 1 if name in STEPWISE else 2  # lines of a solution that are no steps
    lengths = getattr(generator(name), "STEPS", None) or generator(name).OPERATIONS
    for rows in splits(suite, name).values():
        assert [text.count("\n") + 1 - around for text in rows["solution"]] == rows["steps"]
        assert set(rows["steps"]) == set(lengths)
    assert min(lengths) >= 2


@pytest.mark.parametrize("name", STEPWISE)
def test_every_number_written_lies_within_the_limit_and_every_result_is_written_twice(suite, name):
    for rows in splits(suite, name).values():
        for solution, answer in zip(rows["solution"], rows["answer"], strict=True):
            assert all(int(number) <= 99 for number in re.findall(r"\d+", solution))
            assert "=-" not in solution
            *steps, last = solution.split("\n")
            assert all(re.search(r"=(\d+)=\1$", step) for step in steps)
            assert last == f"#{answer}" == f"#{steps[-1].rsplit('=', 1)[1]}"


def test_every_arithmetic_answer_is_the_value_of_its_expression(suite):
    for row in suite.tasks["opd_bench_arithmetic"].test_docs():
        assert row["prompt"] == f"Compute {row['identity']}\n"
        assert eval(row["identity"]) == int(row["answer"])
        for line in row["solution"].split("\n")[:-1]:
            calculation, result, check = line.split("=")
            assert eval(calculation) == int(result) == int(check)


def test_every_answer_satisfies_its_equation_and_every_line_on_the_way(suite):
    for row in suite.tasks["opd_bench_equations"].test_docs():
        assert row["prompt"] == f"Solve {row['identity']}\n"
        x = {"x": Fraction(row["answer"])}
        left, right = row["identity"].split("=")
        assert eval(left, x) == int(right)
        for line in row["solution"].split("\n")[:-1]:
            left, calculation, result, check = line.split("=")
            assert eval(left, x) == eval(calculation) == int(result) == int(check)


def test_python_prints_the_answer_of_every_trace_and_each_value_on_the_way(suite):
    for row in suite.tasks["opd_bench_trace"].test_docs():
        assert row["identity"] == row["solution"]
        assert printed(row["prompt"]) == row["answer"] + "\n"
        after_each_iteration = printed(row["prompt"].replace("print(a)", "  print(i,a)"))
        steps = [re.fullmatch(r"i=(\d+):(.+)=(\d+)=\3", line).groups() for line in row["solution"].split("\n")[:-1]]
        assert after_each_iteration == "".join(f"{i} {result}\n" for i, _, result in steps)
        assert all(eval(calculation) == int(result) for _, calculation, result in steps)


def test_both_readings_of_a_function_are_one_problem():
    for problem in islice(generator("opd_bench_functions").problems("train", 7), 200):
        other = type(problem)(problem.operations, problem.returns, not problem.forward)
        assert other.identity == problem.identity
        assert other.solution == problem.solution
        assert other.prompt != problem.prompt


@pytest.mark.parametrize("name", TEST_SET)
def test_the_reference_solution_of_every_test_item_passes(suite, name):
    assert score(suite, name, lambda row: row["solution"]) == [1.0] * 250


@pytest.mark.parametrize("name", STEPWISE)
@pytest.mark.parametrize(
    ("answer", "passes"),
    [
        ("#{right}", True),
        ("1+1=3\n#{wrong}#{right}", True),
        ("#{wrong}", False),
        ("#{right}#{wrong}", False),
        ("{right}", False),
        ("#{right}\n", False),
        ("#{right} or so", False),
        ("#0{right}", False),
        ("", False),
    ],
)
def test_the_number_that_ends_the_response_counts(suite, name, answer, passes):
    values = score(suite, name, lambda row: answer.format(right=row["answer"], wrong=int(row["answer"]) + 1))
    assert values == [float(passes)] * 250


@pytest.mark.parametrize(
    ("answer", "items"),
    [("def f(a):\n    return None", 250), ("def f(a) return sum(a)", 20), ("", 20), ("import os\nos._exit(0)", 20)],
)
def test_a_wrong_program_fails_every_test_item(suite, answer, items):
    assert score(suite, "opd_bench_functions", lambda row: answer, limit=items) == [0.0] * items


def test_every_function_is_tested_on_several_inputs(suite):
    assert all(4 <= len(tests) <= 12 for tests in suite.tasks["opd_bench_functions"].test_docs()["tests"])


@pytest.mark.parametrize("name", TEST_SET)
def test_another_problems_solution_hardly_ever_passes(suite, name):
    rows = list(suite.tasks[name].test_docs())
    other = {row["prompt"]: following["solution"] for row, following in zip(rows, rows[1:] + rows[:1], strict=True)}
    assert sum(score(suite, name, lambda row: other[row["prompt"]])) <= 0.05 * 250


def test_a_response_fits_the_generation_limit(suite):
    tokenizer = train_tokenizer(tokenizer_texts())
    for name, task in suite.tasks.items():
        for rows in splits(suite, name).values():
            assert max(map(len, tokenizer(rows["solution"][:]).input_ids)) + 1 <= task.config.generation_kwargs["max_gen_toks"]
