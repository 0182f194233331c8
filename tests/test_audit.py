"""Auditing checkpoints that exist: the answers follow from the figures, and what cannot be measured is said."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
from rich.console import Console

from opd_bench import continuations, evaluate, models
from opd_bench.audit import Settings, audit, names_of
from opd_bench.errors import UserError
from opd_bench.page import html
from opd_bench.resources import EMBEDDED, TASKS
from opd_bench.suite import drifts_from

STUDENT, TEACHER = str(EMBEDDED / "student-0"), str(EMBEDDED / "teacher")
SETTINGS = Settings(["opd_bench_arithmetic"], [], TASKS, prompts=12, limit=40, batch_size=40)


@pytest.fixture(scope="module")
def audited(tmp_path_factory):
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("audit")
    twin = shutil.copytree(TEACHER, folder / "models" / "twin")
    return audit([STUDENT, str(twin)], TEACHER, SETTINGS, folder / "out", Console(quiet=True)), folder / "out"


def test_a_student_drifts_and_the_teachers_twin_does_not(audited):
    found, _ = audited
    drifting, twin = found.words["student-0"], found.words["twin"]
    assert any(line.startswith("It drifts: along its own text") for line in drifting)
    assert any(line.startswith("No drift was seen: R − l·ε is .00") for line in twin)
    assert found.suite
    gap = found.suite.students["twin"].gaps["forward_kl"]["zero"]
    assert (gap["regret"].mean, gap["exaccerr"]) == (0, None)
    assert [falsifier.held for falsifier in found.suite.falsifiers if falsifier.name == "teacher as student"] == [True]
    assert found.score["twin"] == found.score["teacher"]
    (pair,) = found.pairs
    assert pair.startswith("student-0 − twin: score −")


def test_a_teacher_at_another_temperature_is_found_out_as_one(tmp_path):
    hot = models.load_model(TEACHER)
    hot.base_model.norm.weight.data /= 2
    hot.save_pretrained(tmp_path / "hot")
    models.load_tokenizer(TEACHER).save_pretrained(tmp_path / "hot")
    found = audit([str(tmp_path / "hot")], TEACHER, replace(SETTINGS, limit=4), tmp_path / "out", Console(quiet=True))
    assert found.suite
    assert found.suite.students["hot"].temperature == pytest.approx(0.5, rel=1e-3)
    (line,) = (line for line in found.words["hot"] if line.startswith("It drifts"))
    assert "at temperature 0.50, it shows none (.00 [.00, .00] nats)" in line


def test_in_bfloat16_the_teachers_twin_does_not_drift(tmp_path):
    twin = shutil.copytree(TEACHER, tmp_path / "twin")
    rough = replace(SETTINGS, prompts=4, limit=4, dtype="bfloat16")
    found = audit([str(twin)], TEACHER, rough, tmp_path / "out", Console(quiet=True))
    assert found.suite
    assert found.suite.students["twin"].gaps["forward_kl"]["zero"]["regret"].mean == 0
    assert rough.model(TEACHER, rough.tokenizer(TEACHER), "teacher").dtype == torch.bfloat16


def test_every_file_is_there_and_the_page_needs_nothing_else(audited):
    _, out = audited
    document = json.loads((out / "audit.json").read_text(encoding="utf-8"))
    assert document["schema"] == "opd-bench/audit/1"
    assert document["suite"]["students"]["student-0"]["by_length"]["excess"]["mean_T"][0] == pytest.approx(0, abs=1e-5)
    page = (out / "audit.html").read_text(encoding="utf-8")
    assert page.count("data:image/png;base64,") == 3
    assert "http" not in page
    assert "<table>" in page
    text = (out / "audit.md").read_text(encoding="utf-8")
    assert "nan" not in text.lower()
    assert "None" not in text


def test_another_tokenizer_is_scored_and_the_rest_is_said_to_be_missing(tmp_path):
    other = shutil.copytree(STUDENT, tmp_path / "other")
    words = json.loads((other / "tokenizer.json").read_text(encoding="utf-8"))
    vocabulary = words["model"]["vocab"]
    a, b = [token for token in vocabulary if token.isdigit()][:2]
    vocabulary[a], vocabulary[b] = vocabulary[b], vocabulary[a]
    (other / "tokenizer.json").write_text(json.dumps(words), encoding="utf-8")
    found = audit([str(other)], TEACHER, SETTINGS, tmp_path / "out", Console(quiet=True))
    assert found.suite is None
    assert "could be measured: student and teacher have different vocabularies" in found.words["other"][1]
    assert "other" in found.score
    assert (tmp_path / "out/audit.html").is_file()


def test_the_same_audit_again_measures_nothing_and_another_one_takes_nothing_from_it(audited, monkeypatch):
    found, out = audited
    measured = []
    monkeypatch.setattr(continuations, "record", lambda *_, count, **__: measured.append(count))
    monkeypatch.setattr(evaluate, "evaluate", lambda *_, limit, **__: measured.append(limit))
    again = audit([STUDENT, str(out.parent / "models/twin")], TEACHER, SETTINGS, out, Console(quiet=True))
    assert (again.words, again.score, measured) == (found.words, found.score, [])
    with pytest.raises(TypeError):  # of the empty scores
        audit([TEACHER], STUDENT, SETTINGS, out, Console(quiet=True))
    assert measured == [40]


def test_a_student_with_broken_weights_is_named_and_the_others_are_measured(tmp_path):
    broken = models.load_model(STUDENT)
    next(iter(broken.parameters())).data[:] = float("nan")
    broken.save_pretrained(tmp_path / "broken")
    models.load_tokenizer(STUDENT).save_pretrained(tmp_path / "broken")
    found = audit(
        [str(tmp_path / "broken"), STUDENT], TEACHER, replace(SETTINGS, prompts=4, limit=4), tmp_path / "out", Console(quiet=True)
    )
    assert "could be measured: the student's logits are not finite" in found.words["broken"][1]
    assert found.suite
    assert {*found.suite.students} == {"student-0"}


def test_names_are_the_last_part_of_a_path_unless_that_says_too_little():
    assert names_of(["runs/a", "runs/b"]) == {"a": "runs/a", "b": "runs/b"}
    assert names_of(["x/a", "y/a"]) == {"x/a": "x/a", "y/a": "y/a"}
    assert names_of(["x/teacher"]) == {"x/teacher": "x/teacher"}
    with pytest.raises(UserError, match="named twice"):
        names_of(["x/a", "x/a"])


@pytest.mark.parametrize(
    ("low", "place"), [([1, 1], 1), ([0, 1, 2], 2), ([1, 0, 1], 3), ([1, 0], None), ([np.nan, 1], 2), ([np.nan], None)]
)
def test_drift_is_dated_from_where_it_stays_clear(low, place):
    assert drifts_from(np.array(low, float)) == place


def test_a_missing_model_or_task_is_one_line(tmp_path):
    for students, settings, said in (
        ([str(tmp_path / "none")], SETTINGS, "cannot load"),
        ([STUDENT], Settings(["nope"], [], TASKS), "nope"),
    ):
        with pytest.raises(UserError, match=said) as caught:
            audit(students, TEACHER, settings, tmp_path / "out", Console(quiet=True))
        assert "\n" not in str(caught.value)


def test_html_in_a_name_is_shown_and_not_obeyed(tmp_path):
    page = html("# <script>alert(1)</script>\n\n![x](none.png)", "<b>", tmp_path)
    assert "<script>" not in page
    assert "<title>&lt;b&gt;</title>" in page
