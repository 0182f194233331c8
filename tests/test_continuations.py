"""How solutions go on from pieces of rollouts: the shipped models on their own tasks, a few prompts each."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch

from opd_bench import continuations, procedural
from opd_bench.evaluate import evaluate, load_suite
from opd_bench.exposure import FRACTIONS, INJECTIONS
from opd_bench.models import load_model, load_pairs
from opd_bench.resources import EMBEDDED, TASKS

COUNT = 3  # prompts per task
STEM, CODING = ["opd_bench_arithmetic", "opd_bench_trace"], ["opd_bench_functions"]


@pytest.fixture(scope="module")
def shop():
    torch.set_num_threads(1)
    return load_pairs([str(EMBEDDED / "student-0")], str(EMBEDDED / "teacher"))[0], load_suite(STEM, CODING, TASKS)


def recorded(shop, student, folder, **options):
    pair, suite = shop
    return continuations.record(student, pair.teacher, pair.tokenizer, suite, count=COUNT, max_response=96, seed=0, kept=folder, **options)


@pytest.fixture(scope="module")
def student(shop, tmp_path_factory):
    folder = tmp_path_factory.mktemp("kept")
    return recorded(shop, shop[0].student, folder), folder


def test_every_kind_has_a_score_or_none_for_every_prompt(student):
    recording, _ = student
    sides = [f"{side} {at:g}" for side in ("own", "teacher", "rescued", "own right", "teacher right") for at in FRACTIONS]
    after = [f"{side} after {what}" for side in ("student", "teacher") for what in INJECTIONS]
    assert recording.continued.keys() == {*sides, *after, "own 1", "teacher 1"}
    for score_N in recording.continued.values():
        assert score_N.shape == (3 * COUNT,)
        assert set(score_N[np.isfinite(score_N)]) <= {0.0, 1.0}
    wrong_N = recording.continued["student after wrong result"]
    assert np.isnan(wrong_N[-COUNT:] if "functions" in CODING[0] else wrong_N).all()  # programs have no results to get wrong


def test_the_teacher_ends_what_it_wrote_rightly_and_recovers_from_a_wrong_result(student):
    recording, _ = student
    right_N = recording.continued["teacher 1"] == 1
    assert right_N.mean() > 0.8
    for at in FRACTIONS:
        assert (recording.continued[f"teacher right {at:g}"][right_N] == 1).all()
    placed_N = recording.continued["teacher after wrong result"]
    assert np.nanmean(placed_N) > 0.9
    assert (np.isfinite(placed_N)[: 2 * COUNT] == right_N[: 2 * COUNT]).all()


def test_the_teacher_as_student_is_the_teacher(shop, student, tmp_path):
    twin = load_model(str(EMBEDDED / "teacher"))
    recording = recorded(shop, twin, student[1])
    for at in FRACTIONS:
        assert np.array_equal(recording.continued[f"own {at:g}"], recording.continued[f"rescued {at:g}"])
    for what in INJECTIONS:
        assert np.array_equal(recording.continued[f"student after {what}"], recording.continued[f"teacher after {what}"], equal_nan=True)


def test_a_recording_repeats_to_the_bit_from_what_was_kept_and_anew(shop, student, tmp_path):
    first, folder = student
    for kept in (folder, tmp_path):
        again = recorded(shop, shop[0].student, kept)
        assert all(np.array_equal(again.continued[kind], score_N, equal_nan=True) for kind, score_N in first.continued.items())


def test_only_the_first_prompts_of_each_task_are_continued_where_asked(shop, student):
    recording = recorded(shop, shop[0].student, student[1] / "one", continued=1)
    for kind in ("own 0.5", "teacher 1"):
        assert np.isfinite(recording.continued[kind]).tolist() == [True, False, False] * 3
    assert recorded(shop, shop[0].student, student[1] / "none", continued=0).continued == {}


def test_given_responses_are_scored_as_evaluate_scores_them(shop):
    pair, suite = shop
    items = evaluate(pair.student, pair.tokenizer, suite, limit=6)
    for task in suite.tasks:
        mine = [item for item in items if item.task == task]
        docs = [doc for name, doc in suite.first_docs(6) if name == task]
        assert suite.score(task, docs, [item.response for item in mine]) == [item.score for item in mine]
    assert {item.score for item in items} == {0.0, 1.0}


SOLUTION = "12+34=46=46\n46-5=41=41\n#41"


@pytest.mark.parametrize(
    ("text", "right"),
    [
        ("", True), ("12+3", True), ("12+34=46=46\n", True), (SOLUTION, True), ("12+34=45=46=46\n46", True), ("12+34=45=4", False),
        ("12+34=46=45\n", False), ("12+34=45=45\n", False), ("13", False), (SOLUTION + "\n", False), ("12+34=46=46\n46-5=41=41\n#4", True),
    ],
)  # fmt: skip
def test_a_piece_is_still_right_where_the_solution_begins_so(text: str, right: bool):
    assert procedural.still_right(SOLUTION, text) == right


def test_a_wrong_result_is_wrong_and_the_last_thing_written():
    for seed in range(40):
        text = procedural.corrupted(SOLUTION, random.Random(seed))
        assert text is not None
        before, wrong = text.rsplit("=", 1)
        assert SOLUTION.startswith(before)
        assert not SOLUTION.startswith(text + "=")
        assert 0 <= int(wrong) <= procedural.LIMIT
    assert procedural.corrupted("def f(a):\n    return a", random.Random(0)) is None
