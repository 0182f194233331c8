"""The suite as a document: every figure of every student in tables, JSON and figures, undefined ones as such."""

from __future__ import annotations

import json

import numpy as np
import pytest
from test_exposure import full

from opd_bench import plots, suite
from opd_bench.exposure import FRACTIONS, INJECTIONS, Recording
from opd_bench.suite import COLD_START, Student

PROMPTS = 12


def recording(bias: float, own: float, seed: int, whole: bool = True) -> Recording:
    """``bias`` nats a position on own prefixes beyond the first; a share ``own`` of the student's continuations solves."""
    rng = np.random.default_rng(seed)
    teacher_NT = rng.uniform(0.1, 0.2, (PROMPTS, 5))
    student_NT = teacher_NT + bias * (np.arange(5) > 0)
    names = [*suite.MEASURES, "support"] if whole else ["forward_kl"]
    solved_N = (np.arange(PROMPTS) < own * PROMPTS).astype(float)
    kinds = {f"{kind} {at:g}": np.ones(PROMPTS) for at in FRACTIONS for kind in ("teacher", "rescued", "own right", "teacher right")}
    kinds |= {f"own {at:g}": solved_N for at in FRACTIONS}
    kinds |= {
        f"{who} after {what}": solved_N if who == "student" else np.ones(PROMPTS) for who in ("student", "teacher") for what in INJECTIONS
    }
    return Recording(dict.fromkeys(names, full(student_NT, teacher_NT)), kinds if whole else {}, 0.5 if whole else None)


def student(bias: float, own: float, seeds: int = 3, whole: bool = True) -> Student:
    solved = np.repeat(np.arange(8) < 4, seeds).reshape(8, seeds).T.astype(float)
    return Student([recording(bias, own, seed, whole) for seed in range(seeds)], {"task": solved}, {"task": np.tile([1.0, 1, 2, 2], 2)})


@pytest.fixture(scope="module")
def found():
    students = {"opd": student(0.1, 0.75), "sft": student(0.3, 0.5), COLD_START: student(0.5, 0.25, 2)}
    return suite.suite(students, recording(0.0, 1.0, 0), draws=200)


def test_every_figure_of_every_student_is_there(found):
    for name, bias, own in (("opd", 0.1, 0.75), ("sft", 0.3, 0.5), (COLD_START, 0.5, 0.25)):
        of = found.students[name]
        assert of.gaps["forward_kl"]["zero"]["excess"].mean == pytest.approx(4 * bias)
        assert of.gaps.keys() == suite.MEASURES.keys()
        assert of.drifts_from == 2
        assert of.by_length["excess"].mean_T.tolist() == pytest.approx([bias * length for length in range(5)], abs=1e-9)
        assert of.contrast["0.5"].difference.mean == pytest.approx(1 - own)
        assert of.usefulness["0.5"].difference.mean == pytest.approx(1 - own)
        assert of.recovery["4 tokens"].ratio.mean == pytest.approx(own)
        assert (of.temperature, of.decay.one_step.mean) == (0.5, 0.5)
    assert [falsifier.held for falsifier in found.falsifiers] == [False, True, True]  # this "teacher" is not its own student


def test_json_has_all_of_it_and_no_number_that_is_none(found):
    document = json.loads(suite.to_json(found), parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    assert document["students"].keys() == found.students.keys()
    assert document["students"]["sft"]["contrast"]["0.75"]["difference"]["mean"] == pytest.approx(0.5)


def test_markdown_has_a_table_for_each_and_says_what_failed(found):
    text = suite.markdown(found, ["recovery.png"])
    for title in ("The gap", "Prefix contrast", "Recovery", "Does the teacher still guide?", "Support overlap", "Length decay"):
        assert f"## {title}\n" in text
    rows = [line for line in text.splitlines() if line.startswith("| sft ")]
    assert len(rows) == 2 * len(suite.MEASURES) + len(FRACTIONS) * 2 + len(INJECTIONS) + 2
    assert "teacher as student FAILED" in text
    assert "![recovery](recovery.png)" in text
    assert "nan" not in text.lower()


def test_what_was_not_recorded_is_left_out():
    found = suite.suite({"opd": student(0.1, 1.0, whole=False)}, recording(0.0, 1.0, 0, whole=False), draws=50)
    assert list(suite.tables(found)) == ["The gap", "Length decay"]
    assert found.students["opd"].temperature is None


def test_figures_show_the_means_in_the_colours_of_the_methods(found, tmp_path):
    names = ["sft", "opd"]
    assert [path.name for path in plots.draw_exposure(found, names, tmp_path)] == [
        "exposure_by_length.png",
        "prefix_contrast.png",
        "recovery.png",
    ]
    assert all(path.stat().st_size > 5000 for path in tmp_path.iterdir())
    excess = plots.exposure_by_length(found, names).axes[0]
    lines = {line.get_label(): line for line in excess.lines}
    assert np.asarray(lines["sft"].get_ydata())[-1] == pytest.approx(1.2)
    assert {name: lines[name].get_color() for name in found.students} == {
        "opd": plots.COLOURS[1],
        "sft": plots.COLOURS[0],
        COLD_START: plots.GREY,
    }
    contrast = plots.prefix_contrast(found, names).axes[0]
    drawn = sorted({round(float(np.asarray(container[0].get_ydata())[0]), 6) for container in contrast.containers})
    assert drawn == [0.25, 0.5, 0.75]
