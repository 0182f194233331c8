"""The lm-eval tasks we ship: they load, their splits never meet, and their scores tell right from wrong."""

import hashlib
import json

import pytest
from lm_eval import evaluator
from lm_eval.api.model import LM

from opd_bench.evaluate import load_suite
from opd_bench.resources import TASKS

TEST_SET = {
    "opd_bench_arithmetic": "2cd96621f479dc8347c65997cb56a7833d175d7a2b5bea6f8c19ce527b29d894",
    "opd_bench_functions": "1a646f99a1de309d363825a29420ee61d7ab3095157c5afbe5bf919f1eb3b5bd",
}


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


def test_every_yaml_file_is_a_task_or_group_that_loads(suite):
    from lm_eval.tasks import TaskManager

    manager = TaskManager(include_path=str(TASKS), include_defaults=False)
    files = {path.resolve() for path in TASKS.glob("**/*.yaml")}
    assert {entry.yaml_path.resolve() for entry in manager.task_index.values()} == files
    assert sorted(suite.tasks) == sorted(manager.all_subtasks) == sorted(TEST_SET)
    assert suite.groups == {"opd_bench_arithmetic": "stem", "opd_bench_functions": "coding"}


@pytest.mark.parametrize("name", TEST_SET)
def test_splits_share_no_problem(suite, name):
    task = suite.tasks[name]
    splits = [list(docs) for docs in (task.training_docs(), task.validation_docs(), task.test_docs())]
    for column in ("identity", "prompt"):
        seen = [row[column] for rows in splits for row in rows]
        assert len(seen) == len(set(seen))
    assert len(splits[2]) >= 250


@pytest.mark.parametrize("name", TEST_SET)
def test_the_test_set_never_changes(suite, name):
    rows = json.dumps(list(suite.tasks[name].test_docs()), sort_keys=True)
    assert hashlib.sha256(rows.encode()).hexdigest() == TEST_SET[name]


@pytest.mark.parametrize("name", TEST_SET)
def test_the_reference_solution_of_every_test_item_passes(suite, name):
    assert score(suite, name, lambda row: row["solution"]) == [1.0] * 250


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
def test_arithmetic_counts_the_number_that_ends_the_response(suite, answer, passes):
    values = score(suite, "opd_bench_arithmetic", lambda row: answer.format(right=row["answer"], wrong=int(row["answer"]) + 1))
    assert values == [float(passes)] * 250


@pytest.mark.parametrize(
    ("answer", "items"),
    [("def f(a):\n    return None", 250), ("def f(a) return sum(a)", 20), ("", 20), ("import os\nos._exit(0)", 20)],
)
def test_a_wrong_program_fails_every_test_item(suite, answer, items):
    assert score(suite, "opd_bench_functions", lambda row: answer, limit=items) == [0.0] * items


def test_another_problems_solution_hardly_ever_passes(suite):
    rows = list(suite.tasks["opd_bench_functions"].test_docs())
    other = {row["prompt"]: following["solution"] for row, following in zip(rows, rows[1:] + rows[:1], strict=True)}
    assert sum(score(suite, "opd_bench_functions", lambda row: other[row["prompt"]])) <= 0.05 * 250


def test_a_response_fits_the_generation_limit(suite):
    from opd_bench.embedded.corpus import tokenizer_texts
    from opd_bench.embedded.tokenizer import train_tokenizer
    from opd_bench.resources import task_module

    tokenizer = train_tokenizer(tokenizer_texts([task_module("arithmetic"), task_module("functions")]))
    for task in suite.tasks.values():
        for row in task.training_docs().select(range(3000)):
            assert len(tokenizer(row["solution"]).input_ids) + 1 <= task.config.generation_kwargs["max_gen_toks"]
